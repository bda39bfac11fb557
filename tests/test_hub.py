"""The Hub kernel without the package `kernels`: what its command writes, and its Triton kernels on the virtual GPU.

tests/integrations/hub loads it as users do.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from ling_kernels.integrations.hub.__main__ import main
from ling_kernels.integrations.hub.write import VARIANTS, imported, write
from tests.cases import BF16, Rand, runs


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """The CUDA variant, imported by the name of its metadata."""
    folder = tmp_path_factory.mktemp("hub")
    write(folder)
    variant = folder / "build/torch-cuda"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for loaded in [n for n in sys.modules if n == name or n.startswith(f"{name}.")]:
        del sys.modules[loaded]


class Experts(torch.nn.Module):
    def __init__(self, rand, E, F, H):
        super().__init__()
        self.gate_up_proj, self.down_proj = (torch.nn.Parameter(rand.data(*s)) for s in ((E, 2 * F, H), (E, H, F)))


@pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")
def test_its_triton_kernels_run(kernel):
    """Routed experts with one index of another device, forward and backward; the copy has a backend of its own."""
    backend, op = (importlib.import_module(f"{kernel.__name__}.{file}") for file in ("backend", "op"))
    assert not backend.EXPECTS_C and backend._C is None
    rand = Rand(BF16)
    x, experts = rand(9, 64), Experts(rand, 4, 32, 64)
    index, weights = rand.ints(0, 4, 9, 2, dtype=torch.int64), rand.fp32(9, 2)
    index[:, 1] = (index[:, 0] + 1) % 4
    index[3, 1] = 4
    dy, results = rand.data(9, 64), []
    for name in ("torch", "triton"):
        with backend.force(name):
            y = kernel.layers.Experts.forward(experts, x, index, weights)
            grads = torch.autograd.grad(y, [x, weights, *experts.parameters()], dy)
            results.append([y.detach(), *grads])
            names = {c.implementation for c in op.explain(kernel.layers.Experts.forward, experts, x, index, weights)}
        assert names == {name}
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-6 * float(want.abs().max()))
    assert not results[0][2][3, 1] and results[0][2][3, 0]


def test_two_copies_have_ops_of_their_own(kernel):
    """A process may load several versions of a kernel, beside the package."""
    own = getattr(torch.ops, kernel.__name__)
    assert own.rms_norm_fwd is not torch.ops.ling.rms_norm_fwd
    assert str(own.rms_norm_fwd.default._schema).startswith(f"{kernel.__name__}::rms_norm_fwd")


def test_the_imports_of_a_file():
    assert set(imported("ops/permute.py")) >= {"op.py", "ops/dispatch.py", "ops/quantize.py", "ops/unpermute.py"}
    assert "backend.py" in imported("op.py")
    assert imported("ops/__init__.py") == []  # its imports are for type checkers
    assert imported("integrations/hub/layers.py")[-1].startswith("ops/")


def test_command(tmp_path, capsys):
    (tmp_path / "build/torch-universal").mkdir(parents=True)  # a variant of before
    assert main([str(tmp_path)]) == 0
    assert sorted(p.name for p in (tmp_path / "build").iterdir()) == sorted(VARIANTS)
    files = [p.relative_to(tmp_path) for p in tmp_path.rglob("*.py")]
    assert Path("build/torch-cuda/ops/route_kernels.py") in files and "torch-cpu" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write the kernel into {tmp_path / 'file'}: ")

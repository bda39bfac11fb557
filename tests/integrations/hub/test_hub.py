"""The kernel's repository, as the package `kernels` loads it, on the CPU: the ops run as torch references."""

import json
import logging
import re
import sys

import pytest
import torch
from kernels import (
    KernelizeFallback,
    LocalLayerRepository,
    Mode,
    get_loaded_kernels,
    get_local_kernel,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)
from kernels._rust import Digest, DigestAlgorithm, Metadata
from torch import nn

import ling_kernels as lk
from ling_kernels.integrations.hub.write import FUNCTIONS, PACKAGE, VARIANTS, write

LAYERS = ("Experts", "Permute", "Quantize", "RMSNorm", "Router", "SiluAndMul")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def kernel(repository):
    return get_local_kernel(repository)


def test_metadata_and_digest(repository):
    for variant, backend in VARIANTS.items():
        folder = repository / "build" / variant
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert str(metadata.name) == "ling-kernels" and metadata.backend.archs == backend.get("archs")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, folder))
    ids = [json.loads((repository / f"build/{v}/metadata.json").read_text())["id"] for v in VARIANTS]
    assert len(set(ids)) == len(VARIANTS) and all(name.isidentifier() for name in ids)
    assert "ling-kernels" in (repository / "README.md").read_text()


def test_files_are_the_packages(repository):
    """All but __init__.py and metadata.json, byte by byte, and nothing that the kernel does not import."""
    folder = repository / "build/torch-cuda"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for name in names - {"__init__.py", "metadata.json"}:
        assert (folder / name).read_bytes() == (PACKAGE / name).read_bytes(), name
    assert not [name for name in names if name.startswith(("nn", "model", "train", "generate"))]


def test_the_kernel_imports_only_itself_torch_and_triton(kernel):
    identifier = kernel.__name__
    assert identifier in [str(loaded.metadata.id) for loaded in get_loaded_kernels()]
    assert kernel.__all__ == ["layers", *FUNCTIONS] and all(hasattr(kernel, name) for name in kernel.__all__)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{identifier}."):
            origins = {getattr(v, "__module__", None) or "" for v in vars(module).values()}
            assert not [o for o in origins if o.split(".")[0] == "ling_kernels"], name
    assert hasattr(getattr(torch.ops, identifier), "rms_norm_fwd")  # beside torch.ops.ling, which the package registers
    assert lk.rms_norm is not kernel.rms_norm


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(32)), 0.1

    def forward(self, hidden_states):
        x = hidden_states
        return x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt() * self.weight


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.expert_bias = nn.Parameter(torch.randn(16, 32)), nn.Parameter(torch.randn(16))
        self.n_group, self.topk_group, self.top_k, self.routed_scaling_factor = 4, 2, 4, 2.5

    def forward(self, hidden_states):
        x = hidden_states.flatten(0, -2)
        logits = x @ self.weight.T
        scores = logits.sigmoid()
        grouped = (scores + self.expert_bias).view(len(x), self.n_group, -1)
        best = grouped.topk(2).values.sum(-1).topk(self.topk_group).indices
        keep = torch.zeros(len(x), self.n_group, dtype=torch.bool).scatter_(1, best, True)
        chosen = grouped.masked_fill(~keep[..., None], -torch.inf).flatten(1).topk(self.top_k).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) * self.routed_scaling_factor, logits


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(16, 2 * 24, 32) / 4)
        self.down_proj = nn.Parameter(torch.randn(16, 32, 24) / 4)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        x = hidden_states.flatten(0, -2)
        y = torch.zeros_like(x)
        for e, (gate_up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True)):
            weight = torch.where(top_k_index.view(len(x), -1) == e, top_k_weights.view(len(x), -1), 0).sum(1)
            gate, up = (x @ gate_up.T).chunk(2, -1)
            y = y + (nn.functional.silu(gate) * up @ down.T) * weight[:, None]
        return y.view_as(hidden_states)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.gate, self.experts = Norm(), Gate(), Experts()

    def forward(self, x):
        h = self.norm(x)
        index, weights, logits = self.gate(h)
        return x + self.experts(h, index, weights), logits


for cls, layer in ((Norm, "RMSNorm"), (Gate, "Router"), (Experts, "Experts")):
    replace_kernel_forward_from_hub(cls, layer)


def mapping(repository, *layers):
    return {name: {"cpu": LocalLayerRepository(repository, layer_name=name)} for name in layers}


@pytest.mark.parametrize("mode", [Mode.TRAINING, Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE])
def test_kernelized_model(repository, mode, caplog):
    """Results and gradients of a layer before and after; without a fallback, so that ours do run."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 7, 32, requires_grad=True)

    def run(forward):
        model.zero_grad(), setattr(x, "grad", None)
        y, logits = forward(x)
        (y.square().sum() + logits.sum()).backward()
        return [y, logits, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    before = [t.detach().clone() for t in run(model)]
    with use_kernel_mapping(mapping(repository, "RMSNorm", "Router", "Experts")), caplog.at_level(logging.INFO):
        kernelize(model, mode=mode, use_fallback=KernelizeFallback.NONE)
    for module in (model.norm, model.gate, model.experts):
        assert type(module).forward is not module.forward.__func__
        assert module.forward.__func__.__module__.endswith(".integrations.hub.layers")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True) if Mode.TORCH_COMPILE in mode else model
    for got, want in zip(run(compiled), before, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_experts_of_other_devices(repository, kernel):
    """Indices outside 0..E-1, as expert parallelism passes them, add nothing and pass no gradient."""
    torch.manual_seed(1)
    experts, x = Experts(), torch.randn(9, 32)
    index, weights = torch.randint(0, 16, (9, 4)), torch.rand(9, 4)
    index[2:5, 1:], index[5], index[7, 0] = 16, 17, -1
    dropped = weights.masked_fill((index < 0) | (index >= 16), 0)
    want = experts(x, index.clamp(0, 15), dropped)
    got = kernel.layers.Experts.forward(experts, x, index, weights)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not got[5].any()


def test_layers_without_members(kernel):
    x = torch.randn(6, 256)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(kernel.layers.SiluAndMul()(x), nn.functional.silu(gate) * up)
    x_q, x_scale = kernel.layers.Quantize()(x)
    torch.testing.assert_close(lk.dequantize(x_q, x_scale), x, rtol=0.07, atol=0.01)
    experts = torch.tensor([[1, 0], [2, 1], [9, 0], [1, -1], [0, 2], [2, 0]])
    rows, plan = kernel.layers.Permute()(x, experts, 3)
    order = [(t, k) for e in range(3) for t in range(6) for k in range(2) if experts[t, k] == e]
    assert plan.offsets.tolist() == [0, 4, 7, 10]
    assert torch.equal(rows[:10], x[[t for t, _ in order]])
    assert [plan.slot[t, k].item() for t, k in order] == list(range(10))
    assert sorted(n for n in dir(kernel.layers) if n in LAYERS) == list(LAYERS)


def test_the_pages_lines_run(repository, monkeypatch, capsys):
    page = (PACKAGE.parent / "docs/integrations/hub.md").read_text()
    monkeypatch.chdir(repository.parent)
    (repository.parent / "build").mkdir()
    (repository.parent / "build/hub").symlink_to(repository)
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {"__name__": "page"})
    assert "torch.Size([3, 64]) _ling_kernels_cpu_" in capsys.readouterr().out

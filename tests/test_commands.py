"""What every command does with misuse: one line and exit code 2; and `info` for programs."""

import json
import subprocess
import sys

import pytest

import ling_kernels
from ling_kernels import backend, info, ops
from ling_kernels.backend import force
from ling_kernels.commands import Parser
from ling_kernels.model import LingConfig
from ling_kernels.plan import decode, kernels
from tests.test_package import CLEAN, ROOT

MODULES = ["info", "plan", "train", "train.data", "train.report", "generate", "generate.server", "generate.plan",
           "posttrain.rl", "posttrain.dpo", "posttrain.choose"]  # fmt: skip


def run(*args: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", *args]
    return subprocess.run(command, cwd=ROOT, env=CLEAN | dict(CUDA_VISIBLE_DEVICES="") | env, capture_output=True,
                          text=True)  # fmt: skip


def is_one_line(result: subprocess.CompletedProcess, text: str) -> bool:
    error = result.stderr
    return result.returncode == 2 and error.startswith("error: ") and error.count("\n") == 1 and text in error


@pytest.mark.parametrize("module", MODULES)
def test_a_backend_that_does_not_exist(module):
    if module == "generate.server":
        pytest.importorskip("fastapi")
    result = run(f"ling_kernels.{module}", LING_BACKEND="cpu")
    assert is_one_line(result, "LING_BACKEND is one of torch, triton, cuda; not 'cpu'"), result.stderr


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("command", [
    "ling_kernels.train --model tiny --steps 1 --out {run}", "ling_kernels.generate --model {model} --prompt a",
])  # fmt: skip
def test_kernels_without_a_gpu(tmp_path, name, command):
    if name == "cuda" and not any(ROOT.glob("ling_kernels/_C*.so")):
        pytest.skip("csrc/ is not built")
    model = tmp_path / "model"
    save_tiny(model)
    result = run(*command.format(run=tmp_path / "run", model=model).split(), LING_BACKEND=name)
    assert is_one_line(result, f"LING_BACKEND is {name}, but its kernels need a GPU"), result.stderr
    assert not (tmp_path / "run").exists()


def save_tiny(folder) -> None:
    from ling_kernels.model import Ling, save_model
    from ling_kernels.tokenizer import Tokenizer

    save_model(Ling(LingConfig.tiny()), folder)
    Tokenizer().save(folder)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_op_without_a_gpu(name):
    """The reason is the last error of a Python user's traceback, not Triton's or pybind11's."""
    if name == "cuda" and not any(ROOT.glob("ling_kernels/_C*.so")):
        pytest.skip("csrc/ is not built")
    code = "import torch, ling_kernels as lk; lk.rms_norm(torch.randn(4, 256), torch.ones(256))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                            env=CLEAN | dict(CUDA_VISIBLE_DEVICES="", LING_BACKEND=name))  # fmt: skip
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ling_kernels.errors.InputError: LING_BACKEND is") and "During handling" not in result.stderr


def test_plans_need_no_gpu():
    result = run("ling_kernels.plan", "train", "--model", "tiny", LING_BACKEND="triton")
    assert result.returncode == 0 and "peak" in result.stdout, result.stderr


@pytest.mark.parametrize("command", [
    "info --mode mini", "plan train --mod tiny", "plan decode --mod mini", "train --ste 3 --plan",
    "train.data --ou x.bin", "generate --model x --promp a", "generate.server --mod x",
])  # fmt: skip
def test_abbreviated_flags_are_refused(command):
    module, *flags = command.split()
    assert is_one_line(run(f"ling_kernels.{module}", *flags), "--help lists the flags")


def test_parsers_take_no_abbreviation():
    parser = Parser("x")
    parser.add_argument("--long-name")
    with pytest.raises(ling_kernels.InputError, match="--long"):
        parser.parse_args(["--long", "1"])


def test_the_kernels_of_a_model_as_json(capsys):
    assert info.main(["--json", "--model", "mini"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "mini" and {*found["steps"]} == {*kernels.STEPS}
    first = found["steps"]["decode layer, bf16"][0]
    assert {*first} == {"name", "implementation", "reason"} and first["name"] in ops.EXPORTS | {first["name"]: 1}


def test_info_says_what_it_cannot_check_without_csrc(monkeypatch):
    lines = "\n".join(kernels.lines(LingConfig.mini()))
    assert " launchers of this package" in lines
    monkeypatch.setattr(backend, "_C", None)
    monkeypatch.setattr(backend, "_C_missing", "it is not built")
    assert "not checked: whether 8 rows fit" in kernels.lines(LingConfig.mini())[-1]


def test_a_context_beyond_the_models_positions(capsys):
    limit = LingConfig.mini().max_positions
    assert decode.main(["--model", "mini", "--context", str(limit)]) == 0
    assert decode.main(["--model", "mini", "--context", str(limit + 1)]) == 2
    assert f"--context {limit + 1} exceeds the {limit} positions of mini" in capsys.readouterr().err


def test_a_star_import_has_every_op():
    names: dict = {}
    exec("from ling_kernels.ops import *", names)
    assert {*names} - {"__builtins__"} == ops.EXPORTS.keys() | ops.HELPERS.keys()
    assert names["rms_norm"] is ling_kernels.rms_norm


def test_force_is_not_ling_backend():
    """`force` is for comparisons and plans: it never complains about a device."""
    import torch

    with force("cuda"):
        assert backend.why_not_forced(torch.device("cpu")) is None

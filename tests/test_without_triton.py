"""Where Triton is not installed (macOS, Windows) everything runs on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HIDE = "import sys; sys.modules['triton'] = None\n"
IMPORT_ALL = """
import importlib, pkgutil, ling_kernels
SHIMS = ("deep_gemm", "hub", "liger", "linghe", "linghe_block", "transformer_engine", "versions")
for room in pkgutil.iter_modules(ling_kernels.__path__):
    path, prefix = [f"{ling_kernels.__path__[0]}/{room.name}"], f"ling_kernels.{room.name}."
    integrations = room.name == "integrations"  # of which most need a library, and are tested in its environment
    walk = pkgutil.iter_modules if integrations else pkgutil.walk_packages
    for m in walk(path, prefix) if room.ispkg else [room]:
        name = m.name if room.ispkg else f"ling_kernels.{m.name}"
        if integrations and name.removeprefix(prefix) not in SHIMS:
            continue
        if not name.endswith(("._C", "._cutlass", "__main__")):
            importlib.import_module(name)
for name in ling_kernels.__all__:
    getattr(ling_kernels, name)
"""
COMMAND = "from ling_kernels.{}.__main__ import main; sys.exit(main(sys.argv[1:]))"


def run(code: str, *arguments) -> str:
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-W", "ignore", "-c", HIDE + code, *map(str, arguments)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_module_can_be_imported():
    run(IMPORT_ALL)


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_training_and_generating(precision, tmp_path):
    text, line = tmp_path / "text.jsonl", "All the world is a stage, and all the men and women merely players. "
    text.write_text("".join(json.dumps(dict(text=line * i)) + "\n" for i in range(1, 50)))
    kind = ["--device", "cpu", "--precision", precision]
    run(COMMAND.format("train"), "--model", "tiny", "--data", text, "--out", tmp_path / "run", "--steps", 2,
        "--batch", 2, "--seq-len", 64, "--holdout", 5, "--sample-tokens", 0, *kind)  # fmt: skip
    out = run(
        COMMAND.format("generate"), "--model", tmp_path / "run/model", "--prompt", "All", "--max-new-tokens", 3, *kind
    )
    assert out.strip()


def test_the_backend_says_that_triton_is_missing():
    code = "from ling_kernels.backend import why_not; print(why_not('triton', 0))"
    assert run(code) == "triton is not installed\n"

"""What importing the package changes in a process: nothing that the user's own code would notice."""

import os
import subprocess
import sys

import pytest


def run(code: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout


@pytest.mark.parametrize("module", ["train", "train.trainer", "train.__main__", "nn", "generate", "plan.train"])
def test_imports_leave_the_process_alone(module):
    """Neither its environment nor the steps of its optimizers."""
    code = f"""
import os, torch
from torch.optim import optimizer
before = dict(os.environ), dict(optimizer._global_optimizer_post_hooks)
import ling_kernels.{module}
added = {{k for k in os.environ if not k.startswith("KMP_")}} - set(before[0])
print(sorted(added), len(optimizer._global_optimizer_post_hooks) - len(before[1]))
"""
    assert run(code).strip() == "[] 0"


def test_the_command_prepares_openmp_before_torch_is_loaded():
    code = """
import runpy, sys, os
import ling_kernels.train
assert "torch" not in sys.modules
sys.argv = ["train", "--help"]
try:
    runpy.run_module("ling_kernels.train", run_name="__main__", alter_sys=True)
except SystemExit:
    pass
print(os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"])
"""
    assert run(code).strip().endswith("passive 10000")


def test_names_of_train():
    code = "from ling_kernels.train import Diverged, Settings, Trainer; print(Trainer.__name__, Settings.__name__)"
    assert run(code).split() == ["Trainer", "Settings"]

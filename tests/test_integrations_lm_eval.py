"""What the integration of lm-evaluation-harness does where it is not installed."""

import importlib.util
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_missing():
    command = [sys.executable, "-m", "ling_kernels.integrations.lm_eval", "--tasks", "gsm8k"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: this integration needs lm_eval") and result.stderr.count("\n") == 1

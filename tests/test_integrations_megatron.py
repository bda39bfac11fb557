"""What the integration of Megatron-core does where it is not installed."""

import importlib.util
import subprocess
import sys

import pytest

from ling_kernels.integrations import megatron
from ling_kernels.integrations.versions import MissingPackage

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is not None, reason="Megatron-core is installed")


def test_missing(tmp_path):
    with pytest.raises(MissingPackage, match='pip install "megatron-core>=0.16,<0.20"'):
        megatron.apply()
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        megatron.aply  # noqa: B018
    script = tmp_path / "train.py"
    script.write_text("print('ran')\n")
    command = [sys.executable, "-m", "ling_kernels.integrations.megatron", script]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: this integration needs megatron.core") and result.stderr.count("\n") == 1

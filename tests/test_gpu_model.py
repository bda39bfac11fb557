"""`python -m tests.gpu`: the trainer and the engine on the virtual GPU, with csrc/, beside the references."""

import warnings

import pytest
import torch

from tests.gpu import __main__ as command
from tests.gpu import build

if torch.cuda.is_available():
    pytest.skip("there is a GPU", allow_module_level=True)
if build.missing():
    pytest.skip(f"csrc/ needs {build.missing()} to run on the virtual GPU", allow_module_level=True)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_step_of_training(precision, capfd):
    assert command.main(["train", "--steps", "1", "--precision", precision]) == 0
    assert "on the virtual GPU" in capfd.readouterr().out


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_two_tokens(precision, capfd):
    assert command.main(["generate", "--tokens", "2", "--precision", precision]) == 0
    assert capfd.readouterr().out.count("on the virtual GPU") == 3


def test_a_difference_is_reported(capfd):
    rows = iter((1.0, 1.5))
    assert command.compare("cuda", lambda: [next(rows)], lambda a, b: a == b) == 1
    assert "DIFFERENT" in capfd.readouterr().out


def test_an_op_that_falls_back_is_an_error():
    def run():
        warnings.warn("swiglu_fwd: csrc/ does not support this; Triton runs", stacklevel=1)
        return [0]

    with pytest.raises(UserWarning, match="swiglu_fwd"):
        command.compare("cuda", run, lambda a, b: True)

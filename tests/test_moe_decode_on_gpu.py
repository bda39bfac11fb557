"""moe_decode where its launch is cooperative for good: every number of rows, in graphs, on two streams at once."""

import pytest
import torch

from ling_kernels.backend import force, why_not
from ling_kernels.ops.moe_decode import moe_decode
from tests.cases import DEVICE, Rand, moe_decode_args
from tests.graphs import replayed_side_by_side

SIZES = dict(E=256, H=2048, F=512, groups=8, group_topk=4, topk=8, Fs=512, residual=True, norm=True)


def not_here() -> str | None:
    return "there is no GPU" if DEVICE == "cpu" else why_not("cuda", 0)


pytestmark = pytest.mark.skipif(not_here() is not None, reason=str(not_here()))


def decode(args):
    with force("cuda"):
        return moe_decode(*args)


@pytest.mark.parametrize("fp8", [False, True])
def test_every_number_of_rows(fp8):
    x, *args, residual, norm, eps = moe_decode_args(Rand(torch.bfloat16), T=8, fp8=fp8, **SIZES)
    with force("torch"):
        want = moe_decode(x, *args, residual, norm, eps).float()
    for T in range(1, 9):
        y = decode((x[:T], *args, residual[:T], norm, eps))
        assert (y.float() - want[:T]).norm() < 0.01 * want[:T].norm()
        assert torch.equal(y, decode((x[:T], *args, residual[:T], norm, eps)))


def test_in_graphs_and_on_two_streams():
    """Replays, and two graphs side by side: no barrier of one may take the other's blocks for its own."""
    args = moe_decode_args(Rand(torch.bfloat16), T=2, fp8=True, **SIZES)
    want = decode(args)
    assert all(torch.equal(y, want) for (y,) in replayed_side_by_side(lambda: (decode(args),)))

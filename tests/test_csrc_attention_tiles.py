"""The order in which csrc/'s attention kernels take tiles: every tile once, and SMs end at about the same time."""

import functools
import heapq
from collections import Counter

import pytest
import torch

from tests.gpu.build import ROOT, Kernels, missing

if missing():
    pytest.skip(f"csrc/ needs {missing()} to run on the virtual GPU", allow_module_level=True)

MIXED = [4096, 2048, 1024, 512, 256, 160]
SHAPES = {  # sequences: share of SM time that tiles should fill, forward and backward, with 16 heads and 4 KV heads
    "1 x 4096": ([4096], 0.97, 0.88),
    "2 x 4096": ([4096] * 2, 0.97, 0.98),
    "4 x 4096": ([4096] * 4, 0.97, 0.98),
    "8 x 4096": ([4096] * 8, 0.98, 0.98),
    "1 x 8192": ([8192], 0.98, 0.98),
    "1 x 16384": ([16384], 0.98, 0.98),
    "1 x 32768": ([32768], 0.98, 0.98),
    "16 x 1024": ([1024] * 16, 0.97, 0.98),
    "mixed": (MIXED, 0.97, 0.98),
    "mixed, shortest first": (MIXED[::-1], 0.95, 0.95),
}


@functools.cache
def kernels() -> Kernels:
    return Kernels(ROOT / "tests/cuda/attention_tiles.cu")


def tiles(direction, Hq, Hkv, lengths):
    """(keys, first row of the sequence, head, first row, rows, rows of the other side) of each tile, in order."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    found = []
    for keys in (1, 0) if direction == "backward" else (0,):
        out, count = torch.zeros(40000, 6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        kernels().list_tiles(1, 32, cu, len(lengths), int(cu[-1]), Hq, Hkv, keys, out, count)
        found += map(tuple, out[: int(count)].tolist())
    return found


def clocks(tile, direction):
    """Of tensor cores at 2048 multiply-adds a clock in the 2, 3 or 4 products of a block, and 1500 more for a tile."""
    keys, _, _, _, _, others = tile
    block, products = (128, 2) if direction == "forward" else (64, 4 if keys else 3)
    return -(-others // block) * products * 128 * block * 128 / 2048 + 1500


def share(work, sms):
    """Of the SMs' time until the last one ends, when each takes the next tile as it ends one."""
    free = [0.0] * sms
    for w in work:
        heapq.heapreplace(free, free[0] + w)
    return sum(work) / sms / max(free)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("sms", [132, 78])
@pytest.mark.parametrize("heads", [(16, 4), (32, 4), (64, 8)], ids=str)
def test_sms_end_at_about_the_same_time(name, sms, heads):
    lengths, *shares = SHAPES[name]
    for direction, least in zip(("forward", "backward"), shares, strict=True):
        assert share([clocks(t, direction) for t in tiles(direction, *heads, lengths)], sms) >= least


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (8, 1)], ids=str)
def test_every_tile_is_there_once(heads):
    lengths, (Hq, Hkv) = [300, 0, 128, 1, 17000, 129], heads
    want, first = [], 0
    for n in lengths:
        for keys, H in ((1, Hkv), (0, Hq)):
            for head in range(H):
                for i in range(0, n, 128):
                    others = Hq // Hkv * (n - i) if keys else min(i + 128, n)
                    want.append((keys, first, head, first + i, min(n - i, 128), others))
        first += n
    assert Counter(tiles("backward", *heads, lengths)) == Counter(want)
    assert Counter(tiles("forward", *heads, lengths)) == Counter(t for t in want if not t[0])

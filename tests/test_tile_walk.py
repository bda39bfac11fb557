"""The order in which SMs take tiles: csrc/ and Triton against the walk in docs/tile_walk.py; and bank conflicts."""

import pytest
import torch
import triton
import triton.language as tl

from docs.tile_walk import BAND, EXAMPLE, SMS, walk
from ling_kernels.ops.gemm_fp8 import tile_position
from tests.cases import DEVICE
from tests.gpu.build import ROOT, Kernels, load, missing
from tests.gpu.counters import by_line, counting

if not missing():
    from tests.test_csrc_gemm import check_transposed

needs_csrc = pytest.mark.skipif(
    DEVICE != "cpu" or bool(missing()), reason=f"csrc/ needs {missing()} to run on the virtual GPU"
)
RAGGED = {
    "the picture's": EXAMPLE["rows"],
    "one group": [300],
    "empty first, middle and last": [0, 0, 130, 0, 5, 0],
    "bands that end and bands that do not": [2048, 2049, 4096, 1],
    "more groups than a warp, and than a block": [(7 * g) % 300 * (g % 3 > 0) for g in range(500)],
    "no rows": [0, 0],
}


def walk_of_csrc(variant: str, N: int, rows: list[int]) -> list[list[tuple[int, ...]]]:
    """The tiles (group, first row, first column, rows, both, joint) that each SM takes."""
    offsets = torch.tensor([0, *rows]).cumsum(0).int()
    out = torch.full((SMS, 6000, 6), -1, dtype=torch.int32)
    kernel = getattr(Kernels(ROOT / "tests/cuda/walk.cu"), f"walk_{variant}")
    kernel(SMS, 384, offsets, N, len(rows), out, out.shape[1], shared=227 << 10)
    assert (out[:, -1] == -1).all(), "too many tiles"
    return [[tuple(tile) for tile in of_one if tile[0] >= 0] for of_one in out.tolist()]


@needs_csrc
@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize(
    "variant, block_m, block_n",
    [("128x256", 128, 256), ("64x128", 64, 128), ("16x128", 16, 128), ("64x128_swiglu", 64, 128)],
    ids=lambda v: str(v),
)
def test_every_sm_takes_the_tiles_of_the_walk(name, variant, block_m, block_n):
    rows, N = RAGGED[name], EXAMPLE["N"]
    first = [sum(rows[:g]) for g in range(len(rows))]
    tiles = walk(rows, N // 2 if "swiglu" in variant else N, block_m, block_n)
    got = walk_of_csrc(variant, N, rows)
    for sm in range(SMS):
        want = [(g, first[g] + m * block_m, n * block_n, own) for g, m, n, own in tiles[sm::SMS]]
        assert [tile[:4] for tile in got[sm]] == want


@needs_csrc
@pytest.mark.parametrize("name", RAGGED)
def test_blocks_of_a_pair_share_weights_where_their_tiles_do(name):
    got = walk_of_csrc("128x256", EXAMPLE["N"], RAGGED[name])
    for first, second in zip(got[::2], got[1::2], strict=True):
        assert len(first) - len(second) in (0, 1)
        for mine, other in zip(first, [*second, None], strict=False):
            same = other is not None and (mine[0], mine[2]) == (other[0], other[2])
            assert mine[4:] == (other is not None, same)
            assert other is None or other[4:] == (True, same)


@needs_csrc
@pytest.mark.parametrize("variant", ["wgrad", "wgrad_bf16"])
def test_a_weight_gradient_has_all_tiles_of_every_group(variant):
    N, rows = 2304, [128, 0, 256]
    got = sorted(tile[:4] for of_one in walk_of_csrc(variant, N, rows) for tile in of_one)
    assert got == sorted((g, m * 128, n * 256, own) for g, m, n, own in walk([N] * len(rows), N, 128, 256))


@needs_csrc
def test_transposing_weights_has_no_bank_conflicts():
    with counting() as kernels:
        check_transposed(load())
    lines = [c for k in kernels if "gemm_fp8_kernel" in k.entry.name for c in by_line(k).values() if c["wavefronts"]]
    assert len(lines) >= 4 and all(c["wavefronts"] == c["least_wavefronts"] for c in lines)


@triton.jit
def places_kernel(out, tiles_m, tiles_n, BAND: tl.constexpr):
    m, n = tile_position(tl.program_id(0), tiles_m, tiles_n, BAND)
    tl.store(out + 2 * tl.program_id(0), m)
    tl.store(out + 2 * tl.program_id(0) + 1, n)


@pytest.mark.parametrize("tiles_m, tiles_n", [(1, 1), (3, 4), (18, 4), (35, 3)])
def test_triton_walks_alike(tiles_m, tiles_n):
    out = torch.empty(tiles_m * tiles_n, 2, dtype=torch.int32, device=DEVICE)
    places_kernel[(len(out),)](out, tiles_m, tiles_n, BAND=BAND)
    assert out.tolist() == [[m, n] for _, m, n, _ in walk([tiles_m * 128], tiles_n * 256, 128, 256)]

"""The order in which SMs take tiles: csrc/ and Triton against the walk in docs/tile_walk.py; and bank conflicts."""

import subprocess
from collections import defaultdict

import pytest
import torch
import triton
import triton.language as tl

from docs.tile_walk import BAND, EXAMPLE, SMS, walk
from ling_kernels.ops.gemm_fp8 import tile_position
from tests.cases import DEVICE
from tests.host import build

needs_host = pytest.mark.skipif(build.missing() is not None, reason=f"the host build needs {build.missing()}")
RAGGED = {
    "the picture's": EXAMPLE["rows"],
    "one group": [300],
    "empty first, middle and last": [0, 0, 130, 0, 5, 0],
    "bands that end and bands that do not": [2048, 2049, 4096, 1],
    "more groups than a warp, and than a block": [(7 * g) % 300 * (g % 3 > 0) for g in range(500)],
    "no rows": [0, 0],
}


def walk_on_host(*args):
    program = build.link([build.HERE / "walk.cu", build.HERE / "cuda_on_host.cpp"], ".exe", "-pthread")
    run = subprocess.run([program, *map(str, args)], capture_output=True, text=True, check=True)
    return [line.split() for line in run.stdout.splitlines()]


@needs_host
@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize(
    "variant, block_m, block_n",
    [("128x256", 128, 256), ("64x128", 64, 128), ("16x128", 16, 128), ("64x128+128", 64, 128)],
    ids=lambda v: str(v),
)
def test_every_sm_takes_the_tiles_of_the_walk(name, variant, block_m, block_n):
    rows, N = RAGGED[name], EXAMPLE["N"]
    first = [sum(rows[:g]) for g in range(len(rows))]
    tiles = walk(rows, N // 2 if "+" in variant else N, block_m, block_n)
    got = defaultdict(list)
    for sm, *tile in walk_on_host(variant, SMS, N, *rows):
        got[int(sm)].append(tuple(map(int, tile)))
    for sm in range(SMS):
        want = [(g, first[g] + m * block_m, n * block_n, own) for g, m, n, own in tiles[sm::SMS]]
        assert got[sm] == want


@needs_host
@pytest.mark.parametrize("variant", ["wgrad", "wgrad_bf16"])
def test_a_weight_gradient_has_all_tiles_of_every_group(variant):
    N, rows = 2304, [128, 0, 256]
    got = sorted(tuple(map(int, tile)) for _, *tile in walk_on_host(variant, SMS, N, *rows))
    assert got == sorted((g, m * 128, n * 256, own) for g, m, n, own in walk([N] * len(rows), N, 128, 256))


@needs_host
def test_transposing_weights_has_no_bank_conflicts():
    """Each matrix of ldmatrix and stmatrix is 8 lines of 16 bytes, one in every eighth of the 128 bytes of banks."""
    matrices = walk_on_host("banks")
    assert len(matrices) == 2 * 128 * 128 // (8 * 16)
    assert all(sorted(m) == [*"01234567"] for m in matrices)


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

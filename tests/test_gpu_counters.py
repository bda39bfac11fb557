"""Counters of the virtual GPU against their definition, and the budgets of csrc/'s kernels."""

import json
import shutil

import pytest
import torch

from tests.gpu import build
from tests.pack import nvcc_release

if build.missing():
    pytest.skip(f"there is no {build.missing()}", allow_module_level=True)

from benchmarks.profile import main, profiles
from tests.gpu.counters import by_line, counting, of_lines
from tests.gpu.counters_page import EXEMPT, differences, faults, page
from tests.tables import COUNTERS

PATTERNS = {  # what each lane accesses
    **{f"stride {n}": [n * lane for lane in range(32)] for n in (0, 1, 2, 3, 8, 32)},
    "eights apart": [lane % 8 * 8 + lane // 8 for lane in range(32)],  # for 16 bytes, each quarter has banks of its own
    "backwards": [*range(31, -1, -1)],
    "any": torch.randint(0, 512, (32,), generator=torch.Generator().manual_seed(0)).tolist(),
}
OPS = (  # those that take seconds; the shapes of others are larger
    "attention", "attention_decode", "balance_bias_", "dispatch", "permute", "qk_norm_rope", "quantize", "rms_norm",
    "rms_norm_router", "route", "swiglu", "unpermute",
)  # fmt: skip


@pytest.fixture(scope="module")
def kernels():
    return build.Kernels(build.ROOT / "tests/cuda/counters.cu")


def count(kernels, name: str, *args) -> dict:
    with counting() as found:
        getattr(kernels, name)(1, 32, *args, shared=32 * 32 * 16)
    (kernel,) = found
    return of_lines(by_line(kernel)) | dict(owed=kernel.totals[5])


def aligned(n: int, size: int) -> torch.Tensor:
    """n random vectors of `size` bytes that begin at a sector."""
    memory = torch.randn(n + 8, size // 4)
    return memory[-memory.data_ptr() % 32 // size :]


def words(pattern: list[int], size: int) -> list[list[int]]:
    """The words that the lanes of each pass access at least together: 128 bytes."""
    lanes = 128 // size
    groups = (pattern[i : i + lanes] for i in range(0, 32, lanes))
    return [sorted({size // 4 * at + i for at in group for i in range(size // 4)}) for group in groups]


def wavefronts(pattern: list[int], size: int) -> int:
    """By definition: a bank of 4 bytes gives one word in a pass."""
    return sum(max(sum(w % 32 == bank for w in group) for bank in range(32)) for group in words(pattern, size))


def test_wavefronts_that_are_well_known():
    strides = {n: wavefronts(PATTERNS[f"stride {n}"], 4) for n in (0, 1, 2, 3, 32)}
    assert strides == {0: 1, 1: 1, 2: 2, 3: 1, 32: 32}
    assert wavefronts(PATTERNS["eights apart"], 16) == 32 and wavefronts(PATTERNS["stride 1"], 16) == 4


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", (4, 8, 16))
def test_wavefronts(kernels, size, pattern):
    at = PATTERNS[pattern]
    found = count(kernels, f"shared_{size}", aligned(32, size), torch.tensor(at, dtype=torch.int32))
    assert found["wavefronts"] == wavefronts(at, size)
    assert found["least_wavefronts"] == sum(-(-len(group) // 32) for group in words(at, size))


def test_neighbouring_words_are_one_access(kernels):
    """As ptxas merges them: 4 passes of 8 lanes where 4 loads of single words with that stride would take 16."""
    found = count(kernels, "shared_merged", aligned(32, 4), torch.arange(32, dtype=torch.int32))
    assert (found["wavefronts"], found["least_wavefronts"]) == (4, 4)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("size", (4, 16))
def test_sectors(kernels, size, pattern):
    """Besides the load in question, the kernel loads 128 bytes and stores 32 vectors."""
    at, dense = PATTERNS[pattern], 4 + size
    indices = aligned(32, 4).view(torch.int32).flatten()[:32].copy_(torch.tensor(at))
    found = count(kernels, f"global_{size}", aligned(32, size), indices, aligned(1024, size))
    assert found["sectors"] == dense + len({size * i // 32 for i in at})
    assert found["least_sectors"] == dense + -(-size * len({*at}) // 32)
    assert found["owed"] == 32 * dense + size * len({*at})
    assert found["moved"] == 32 * found["sectors"]


def test_lanes_and_instructions(kernels):
    few, many = (count(kernels, "few_lanes", torch.rand(32), 5, n) for n in (10, 110))
    assert many["fp32"] - few["fp32"] == 100
    assert many["lanes"] - few["lanes"] == 5 * (many["instructions"] - few["instructions"])


def test_how_often_a_wait_fails_is_not_work(monkeypatch):
    """Instructions and bytes of a kernel with TMA and mbarriers are the same in another order of its warps."""
    found = []
    for seed in "01":
        monkeypatch.setenv("LING_GPU_SEED", seed)
        found.append(next(row for row, _ in profiles(("attention",))))
    first, other = found
    assert first["polls"] != other["polls"] and min(first["polls"], other["polls"], first["macs"]) > 0
    same = ("instructions", "lanes", "sectors", "wavefronts", "bulk_bytes", "macs", "moved", "owed")
    assert [first[k] for k in same] == [other[k] for k in same]


@pytest.fixture(scope="module")
def fresh() -> list[dict]:
    return [row for row, _ in profiles(OPS)]


def test_budgets_are_kept(fresh):
    committed, here = json.loads(COUNTERS.read_text()), nvcc_release(shutil.which("nvcc"))
    if committed["cuda"] != here:
        pytest.skip(f"{COUNTERS.name} was made with nvcc {committed['cuda']}, here is {here}")
    names = {r["op"] for r in fresh}
    found = differences(fresh, [r for r in committed["rows"] if r["op"] in names])
    assert not found, f"{COUNTERS.name}: if it is meant, make tables. {found}"
    assert page(committed).count("\n| ") > len(committed["rows"])


def test_limits_are_kept(fresh):
    assert not faults(fresh)
    assert not faults(json.loads(COUNTERS.read_text())["rows"])


def test_every_exception_is_needed():
    lines = [(k, r["kernel"], line) for r in json.loads(COUNTERS.read_text())["rows"] for k, line, *_ in r["lines"]]
    assert not [e for e in EXEMPT if not any(e.matches(*line) for line in lines)]


def test_what_is_worse_is_seen(fresh):
    row = fresh[0]
    worse = row | dict(sectors=2 * row["sectors"])
    assert [f for f in faults([worse]) if "2.0" in f and "sectors" in f]
    assert differences([worse], [row]) == [
        f"{row['op']} {row['kernel']}: sectors {row['sectors']} -> {worse['sectors']}, worse"
    ]
    assert differences(fresh, fresh[1:]) == [f"{row['op']} {row['kernel']}: new"]


def test_command(capsys):
    assert main(["swiglu", "--lines", "1"]) == 0
    printed = capsys.readouterr().out
    assert "swiglu_rows_kernel<bfloat16, false>" in printed and "csrc/moe/swiglu.cu" in printed
    assert main(["rope_tables"]) == 2 and "no kernels of rope_tables" in capsys.readouterr().err

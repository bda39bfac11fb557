"""Every Triton kernel of the table builds for Hopper (hopper.py), with resources that a GPU has."""

import importlib.util
import json

import pytest

from tests.cases import CASES
from tests.hopper import builds
from tests.sass.clocks import differences
from tests.tables import ROOT, TRITON_CLOCKS, stale_kernels, triton_table
from tests.tables import TRITON as COMMITTED

OLDER = ROOT / "build/triton-3.6"  # a version that GPU machines may have; `make build/triton-3.6` installs it there
SHARED = 227 << 10  # bytes that a block can have on sm_90
WITH_KERNELS = sorted({c.op.__name__ for c in CASES if builds(c)})


def table_of(name: str) -> dict:
    if name == "installed":
        return triton_table()
    if importlib.util.find_spec("triton").origin.startswith(str(OLDER)) or not OLDER.is_dir():
        pytest.skip(f"there is no second Triton in {OLDER.relative_to(ROOT)}")
    return triton_table(OLDER)


@pytest.mark.parametrize("version", ["installed", "3.6"])
def test_every_kernel_fits_hopper(version):
    """And the committed tables are current, where this Triton made them. One test: the table takes minutes."""
    table = table_of(version)
    rows = table["kernels"]
    assert sorted({name for r in rows for name in r["ops"]}) == WITH_KERNELS
    assert not [r for r in rows if "error" in r]
    for r in rows:
        assert r["spilled"] == 0, f"registers spill: {r}"
        assert r["shared"] <= SHARED, f"too much shared memory: {r}"
        assert r["float_atomics"] == 0, f"sums by floating-point atomics: {r}"
        assert r["wgmma"] or not r["dot"] or r["dtype"] == "float32", f"a product without wgmma: {r}"
    # The PTX ISA calls it undefined to write the registers of a wgmma's operand A, or to use its sums, before its wait.
    assert not [row["kernel"] for row in table["rows"] if row.get("hazards")]
    if version == "installed":
        committed = json.loads(COMMITTED.read_text())
        if committed["triton"] != table["triton"]:
            pytest.skip(f"{COMMITTED.name} was made with Triton {committed['triton']}, here is {table['triton']}")
        assert not stale_kernels(table, committed), f"{COMMITTED.relative_to(ROOT)} is out of date: make tables"
        slower = differences(table["rows"], json.loads(TRITON_CLOCKS.read_text())["rows"])
        assert not slower, f"{TRITON_CLOCKS.relative_to(ROOT)}: if it is meant, make tables. {slower}"

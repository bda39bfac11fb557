"""Every Triton kernel of the table builds for Hopper, with resources that can run there; the work is hopper.py's."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import CASES
from tests.hopper import builds, markdown

ROOT = Path(__file__).parents[1]
OLDER = ROOT / "build/triton-3.6"  # what GPU machines may have; `make build/triton-3.6` puts it there
RESULTS = ROOT / "benchmarks/results"
SHARED = 227 << 10  # bytes that a block can have on sm_90
WITH_KERNELS = sorted({c.op.__name__ for c in CASES if builds(c)})


def table(out: Path, packages: Path | None = None) -> dict:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, [packages, ROOT])))
    subprocess.run([sys.executable, "-m", "tests.hopper", out], check=True, env=env, cwd=ROOT)
    return json.loads(out.read_text())


@pytest.fixture(scope="module", params=["installed", "3.6"])
def built(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("hopper") / "resources.json"
    if request.param == "installed":
        result = table(out)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "resources.json").write_text(out.read_text())
        page = markdown(result)
        (ROOT / "docs/kernels-resources.md").write_text(page)
        print(page)
        return result
    if importlib.util.find_spec("triton").origin.startswith(str(OLDER)) or not OLDER.is_dir():
        pytest.skip(f"no second Triton in {OLDER.relative_to(ROOT)}")
    result = table(out, OLDER)
    assert result["triton"].startswith("3.6")
    return result


@pytest.mark.timeout(900)
def test_every_kernel_fits_hopper(built):
    rows = built["kernels"]
    assert sorted({name for r in rows for name in r["ops"]}) == WITH_KERNELS
    assert not [r for r in rows if "error" in r]
    for r in rows:
        assert r["spilled"] == 0, f"registers spill: {r}"
        assert r["shared"] <= SHARED, f"too much shared memory: {r}"
        assert r["float_atomics"] == 0, f"sums by floating-point atomics: {r}"
        assert r["wgmma"] or not r["dot"] or r["dtype"] == "float32", f"a product without wgmma: {r}"

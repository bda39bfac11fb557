"""What the integrations share, without their libraries: versions, and the environments of tests/integrations."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ling_kernels.errors import LingError
from ling_kernels.integrations.versions import MissingPackage, fits, require
from tests.integrations import environments

ROOT = Path(__file__).parents[1]


def distribution(folder: Path, version: str, source: str = "value = 3\n"):
    (folder / "some_library").mkdir()
    (folder / "some_library/__init__.py").write_text("")
    (folder / "some_library/core.py").write_text(source)
    metadata = folder / f"some_library-{version}.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: some-library\nVersion: {version}\n")


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda *args: distribution(tmp_path, *args)
    for name in [n for n in sys.modules if n.startswith("some_library")]:
        del sys.modules[name]


def test_a_library_of_the_right_version_is_imported(library):
    library("0.16.1")
    assert require("some_library.core", "some-library", ">=0.16,<1").value == 3
    assert require("some_library.core", "some-library").value == 3


def test_another_version_is_named_before_it_is_imported(library):
    library("0.15.9", "raise SystemExit('imported')\n")
    with pytest.raises(MissingPackage) as error:
        require("some_library.core", "some-library", ">=0.16")
    assert str(error.value) == (
        "this integration needs some_library.core (some-library>=0.16), but 0.15.9 is installed: "
        'pip install "some-library>=0.16"'
    )


def test_a_missing_library_is_named():
    with pytest.raises(MissingPackage) as error:
        require("no_such_library.core", "no-such-library", ">=2")
    assert isinstance(error.value, LingError) and isinstance(error.value, ImportError)
    assert str(error.value) == (
        "this integration needs no_such_library.core (no-such-library>=2), which is not installed: "
        'pip install "no-such-library>=2"'
    )


def test_a_library_that_lacks_another_says_which(library):
    library("1.0", "import no_such_module\n")
    with pytest.raises(MissingPackage, match="cannot be imported: No module named 'no_such_module'"):
        require("some_library.core", "some-library")


@pytest.mark.parametrize(
    "version, versions, right",
    [("5.0", ">=5", True), ("5", ">=5.0.0", True), ("4.57.6", ">=5", False), ("10.1", ">=9.2", True),
     ("5.23.0", ">=5.0,<6", True), ("6.0.0", ">=5.0,<6", False), ("2.13.0+cpu", "==2.13", True),
     ("5.0.0rc1", ">=5", True), ("0.19.2", "!=0.19.2", False), ("1.0", "", True)],
)  # fmt: skip
def test_versions_are_compared_as_numbers(version, versions, right):
    assert fits(version, versions) == right


def test_the_package_imports_no_integration():
    code = "import sys, ling_kernels, ling_kernels.train.trainer, ling_kernels.generate; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [n for n in names if n.startswith(("ling_kernels.integrations", "transformers", "megatron"))]


def test_every_folder_of_tests_has_an_environment():
    folders = {p.parent.name for p in (ROOT / "tests/integrations").glob("*/test_*.py")}
    assert folders <= set(environments.ENVIRONMENTS)


def test_an_environment_is_known_by_its_pins():
    one = environments.digest(["transformers==5.23.0"])
    assert one == environments.digest(["transformers==5.23.0"]) != environments.digest(["transformers==5.24.0"])


def test_environments_that_nothing_uses_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, age in (("old", environments.KEEP + 60), ("new", 60)):
        marker = tmp_path / "ling_kernels/environments" / name / "complete"
        marker.parent.mkdir(parents=True)
        marker.touch()
        os.utime(marker, (time.time() - age,) * 2)
    environments.prune()
    assert [path.name for path in (tmp_path / "ling_kernels/environments").iterdir()] == ["new"]


def test_without_a_registry_one_line_says_so(tmp_path, monkeypatch):
    """And what was begun is neither used nor left as if it were complete."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(environments.ENVIRONMENTS, "clients", ["no-such-package==1.2.3"])
    for _ in range(2):
        with pytest.raises(SystemExit) as error:
            environments.make("clients")
        message = str(error.value)
        assert message.startswith("error: environment clients: ") and "no-such-package==1.2.3" in message
        assert "\n" not in message
    assert not list(tmp_path.rglob("complete"))

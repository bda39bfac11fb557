"""The package from outside: the import, its public names, `info`, the build and its error messages, make."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import ling_kernels
from ling_kernels import backend, info, ops

ROOT = Path(__file__).parents[1]
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith("LING_")}


def python(*args, cwd=ROOT, **env):
    return subprocess.run([sys.executable, *args], cwd=cwd, env=CLEAN | env, capture_output=True, text=True)


def test_import_is_light():
    code = "import sys; before = {*sys.modules}; import ling_kernels; print(*{*sys.modules} - before)"
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert not {"torch", "numpy", "triton"} & {*result.stdout.split()}


def test_an_op_loads_neither_triton_nor_the_compiler():
    code = "import sys, ling_kernels as lk; lk.grad_norm; lk.moe; print('torch._dynamo' in sys.modules, "
    code += "sys.modules['torch'].cuda.is_initialized())"
    result = python("-c", code)
    assert result.stdout.split() == ["False"] * 2, result.stderr


def test_import_needs_no_torch():
    result = python(
        "-c", "import sys; sys.modules['torch'] = None; import ling_kernels; print(ling_kernels.__version__)"
    )
    assert result.stdout.strip() == ling_kernels.__version__, result.stderr


def test_every_name_is_there():
    assert {*ling_kernels.__all__} <= {*dir(ling_kernels)}
    for name in (*ops.EXPORTS, *ops.HELPERS):
        assert getattr(ling_kernels, name) is getattr(ops, name) and not isinstance(getattr(ops, name), ModuleType)
    for module in (ling_kernels, ops):
        with pytest.raises(AttributeError, match="no_such_op"):
            getattr(module, "no_such_op")  # noqa: B009


def test_an_op_name_is_its_function_after_any_import():
    code = (
        "import importlib, pickle, ling_kernels.ops.rms_norm\n"
        "from ling_kernels.ops import rms_norm, quantize\n"
        "from ling_kernels.ops.rms_norm import rms_norm as same\n"
        "file = importlib.import_module('ling_kernels.ops.rms_norm')\n"
        "print(rms_norm is same is file.rms_norm, callable(quantize), pickle.loads(pickle.dumps(rms_norm)) is same)"
    )
    result = python("-c", code)
    assert result.stdout.split() == ["True"] * 3, result.stderr


def test_type_checkers_see_every_op():
    names = (ops.EXPORTS | ops.HELPERS).items()
    lines = sorted(names, key=lambda item: (item[1], not item[0][0].isupper(), item[0]))
    block = "".join(f"    from .{file} import {name} as {name}\n" for name, file in lines)
    expected = f"if TYPE_CHECKING:\n{block}"
    assert Path(ops.__file__).read_text().endswith(expected), f"ops/__init__.py should end with\n{expected}"


def test_mypy_checks_a_users_calls(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(
        "import ling_kernels as lk\n"
        "from ling_kernels.ops import rms_norm\n"
        "cache: lk.KVCache\n"
        "lk.route(no_such_argument=1)\n"
        "rms_norm(no_such_argument=1)\n"
        "lk.no_such_op\n"
        "lk.LingError('right')\n"
    )
    result = python("-m", "mypy", tmp_path / "user.py")
    faults = {line.split(":")[1] for line in result.stdout.splitlines() if ": error:" in line}
    assert faults == {"4", "5", "6"}, result.stdout + result.stderr


def test_the_errors_have_one_base():
    from ling_kernels.generate import Busy
    from ling_kernels.train import Diverged

    for error in (ling_kernels.InputError, ling_kernels.Busy, ling_kernels.Diverged):
        assert issubclass(error, ling_kernels.LingError)
    assert issubclass(ling_kernels.InputError, ValueError)
    assert Busy is ling_kernels.Busy and Diverged is ling_kernels.Diverged


def test_info_prints_versions_and_reasons():
    result = python("-m", "ling_kernels.info", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0 and not result.stderr, result.stderr
    for words in (
        f"ling_kernels   {ling_kernels.__version__}",
        torch.__version__,
        "gpu            none: ",
        "backend torch  available",
        "backend triton not available: no GPU",
        "backend cuda   not available: no GPU",
    ):
        assert words in result.stdout


def test_info_as_json():
    result = python("-m", "ling_kernels.info", "--json", CUDA_VISIBLE_DEVICES="")
    found = json.loads(result.stdout)
    assert found["torch"] == torch.__version__ and found["gpus"] == [] and found["backends"]["torch"] is None


def test_info_without_torch():
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_module('ling_kernels.info', run_name='__main__')"
    result = python("-c", code)
    assert result.returncode == 0 and "torch cannot be imported" in result.stdout, result.stderr


@pytest.mark.parametrize("name", ["nonsense", pytest.param("cuda", marks=pytest.mark.skipif(
    any(ROOT.glob("ling_kernels/_C*.so")), reason="_C is built"))])  # fmt: skip
def test_an_unavailable_backend(name):
    result = python("-m", "ling_kernels.info", LING_BACKEND=name)
    assert result.returncode == 2 and result.stderr.startswith("error: LING_BACKEND is"), result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def hopper(monkeypatch):
    """Makes backend.py and info.py see a machine with one H200 and a working _C."""
    gpu = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, total_memory=140 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: gpu)
    monkeypatch.setattr(backend, "_C", SimpleNamespace(device_count=lambda: 1, __file__="_C.so"))
    monkeypatch.setattr(backend, "_forced", None)
    monkeypatch.setattr(backend, "_kernels_on", {})
    return gpu


def raises(error):
    def call():
        raise error

    return call


def test_hopper_runs_cuda(hopper):
    assert backend.kernels_on(0) == "cuda"
    text = "\n".join(info.lines(info.info()))
    assert "gpu 0          NVIDIA H200, 132 SMs, 140 GiB, sm_90" in text
    assert "backend triton available" in text and "backend cuda   available" in text and "csrc/          _C.so" in text


def test_the_reason_why_cuda_does_not_run(hopper, monkeypatch):
    too_old = RuntimeError("CUDA driver version is insufficient for CUDA runtime version")
    monkeypatch.setattr(backend._C, "device_count", raises(too_old))
    with pytest.warns(UserWarning, match="backend cuda is off: CUDA driver version is insufficient"):
        assert backend.kernels_on(0) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.kernels_on(0) == "triton"  # it warns once
    assert "backend cuda   not available: CUDA driver version" in "\n".join(info.lines(info.info()))
    hopper.major = 8
    assert backend.why_not("cuda", 0) == "its kernels are built for sm_90a, and this GPU is sm_80"
    with pytest.warns(UserWarning, match="backend cuda is off: its kernels are built for sm_90a.*; Triton runs"):
        assert backend.kernels_on(1) == "triton"
    monkeypatch.setattr(backend, "_C", None)
    monkeypatch.setattr(backend, "_C_missing", "it is not built")
    assert backend.why_not("cuda", 0) == "it is not built"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.kernels_on(2) == "triton"  # nothing else could be expected
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match="no kernel runs: triton is not installed, and it is not built; the torch ref"):
        assert backend.kernels_on(3) == "torch"


def test_info_on_a_gpu_machine_with_a_broken_driver(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "init", raises(RuntimeError("The NVIDIA driver is too old.\nMore words")))
    text = "\n".join(info.lines(info.info()))
    assert "gpu            none: The NVIDIA driver is too old\n" in text and "not available: no GPU" in text


def test_the_choice_is_a_constant_for_torch_compile(hopper):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + (1 if backend.kernels_on(0) == "cuda" else 2), fullgraph=True, backend="eager"
    )
    assert compiled(torch.zeros(())) == 1


@pytest.fixture
def tree(tmp_path):
    """A copy of the files that a build reads."""
    skip = shutil.ignore_patterns("__pycache__", "_C*.so")
    for folder in ("csrc", "ling_kernels"):
        shutil.copytree(ROOT / folder, tmp_path / "tree" / folder, ignore=skip)
    for file in (p for p in ROOT.iterdir() if p.is_file()):
        shutil.copy(file, tmp_path / "tree")
    (tmp_path / "tree/tests").mkdir()
    shutil.copy(ROOT / "tests/test_package.py", tmp_path / "tree/tests")
    return tmp_path / "tree"


def program(path: Path, text: str = "exit 0") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def build(tree, hook, before="", **env):
    """Run a hook of the build backend as pip does; `before` runs first in its process."""
    code = f"{before}\nimport sys; sys.path.insert(0, '.')\nimport setup; print('result', setup.{hook}('dist'))"
    return python("-c", code, cwd=tree, **env)


def test_a_wheel_without_nvcc_is_all_python(tree):
    result = build(tree, "build_wheel", LING_CUDA="0")
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"ling_kernels-{ling_kernels.__version__}-py3-none-any.whl" == wheel.name
    assert {"ling_kernels/py.typed", "ling_kernels/ops/route.py", "ling_kernels/backend.py"} <= {*names}
    assert all(n.startswith("ling_kernels") for n in names) and not any(n.endswith((".cu", ".so")) for n in names)


CMAKE = """
[ "$1" = --version ] && { echo cmake version 3.30.1; exit; }
[ "$1" = --build ] && { build=$2; shift 3; for name; do echo built > "$build/$name$(cat suffix)"; done; exit; }
printf '%s\\n' "$@" > configured
mkdir -p "$4"
"""


@pytest.fixture
def builder(tree):
    """The environment for a build of csrc/ in the tree, with fakes of all programs and headers that it needs."""
    program(tree / "bin/nvcc"), program(tree / "bin/ninja"), program(tree / "bin/cmake", CMAKE)
    (tree / "suffix").write_text(sysconfig.get_config_var("EXT_SUFFIX"))
    for folder, header in (("dlpack", "dlpack/dlpack.h"), ("cutlass", "cutlass/cutlass.h")):
        (tree / folder / header).parent.mkdir(parents=True)
        (tree / folder / header).touch()
    (tree / "share/cmake/pybind11").mkdir(parents=True)
    return dict(PATH=f"{tree}/bin:/usr/bin:/bin", DLPACK_INCLUDE_DIR=f"{tree}/dlpack")


PYBIND11 = """
import sys, types
sys.modules['pybind11'] = types.ModuleType('pybind11')
sys.modules['pybind11'].__spec__ = types.SimpleNamespace(submodule_search_locations=['.'])
"""


@pytest.mark.parametrize("setting, headers", [("", True), ("", False), ("0", True), ("1", True)])
def test_a_wheel_with_nvcc_holds_the_modules(tree, builder, setting, headers):
    if headers:
        builder["CUTLASS_INCLUDE_DIR"] = f"{tree}/cutlass"
    builder["LING_CUTLASS"] = setting
    result = build(tree, "build_wheel", PYBIND11 + "sys.modules['cutlass_library'] = None", **builder)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert not wheel.name.endswith("none-any.whl")
    modules = {n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")}
    names = {"_C", "_cutlass"} if headers and setting != "0" else {"_C"}
    assert modules == {f"ling_kernels/{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in names}
    configured = (tree / "configured").read_text().splitlines()
    assert f"-DDLPACK_INCLUDE_DIR={tree}/dlpack" in configured
    assert f"-DCUTLASS_INCLUDE_DIR={f'{tree}/cutlass' if headers else ''}" in configured


def test_a_wheel_for_every_python_holds_one_module(tree, builder):
    made = 'mkdir -p "$2/limited"; echo built > "$2/limited/_C.abi3.so"; echo "$4" > target; exit; }'
    program(tree / "bin/cmake", CMAKE.replace("build=$2;", f"{made}\n[ 0 = 1 ] && {{ build=$2;"))
    result = build(
        tree, "build_wheel", PYBIND11, **builder, LING_LIMITED_API="1", CUTLASS_INCLUDE_DIR=f"{tree}/cutlass"
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name and (tree / "target").read_text() == "_C_limited\n"
    modules = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]
    assert modules == ["ling_kernels/_C.abi3.so"]


def test_make_wheels_tries_what_it_builds(tree):
    """In a fresh environment, outside of the source tree. --pure: no compiler."""
    shutil.copytree(ROOT / ".ci", tree / ".ci")
    stale = tree / "build/lib/ling_kernels/stale.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    result = python(".ci/wheels.py", "--pure", cwd=tree)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    assert f"[wheels] {wheel.name}" in result.stdout and f"torch {torch.__version__} without _C" in result.stdout
    assert "ling_kernels/stale.py" not in zipfile.ZipFile(wheel).namelist()


def test_make_wheels_without_nvcc_says_so(tree):
    result = python(str(ROOT / ".ci/wheels.py"), cwd=tree, PATH=str(tree))
    assert result.returncode == 2 and result.stderr.startswith("error: the wheels with _C need nvcc"), result.stderr


@pytest.mark.parametrize(
    "env", [dict(CUTLASS_INCLUDE_DIR="nowhere"), dict(LING_CUTLASS="1")], ids=lambda env: [*env][0]
)
def test_cutlass_that_is_asked_for_must_be_there(tree, builder, env):
    result = build(tree, "build_wheel", PYBIND11 + "sys.modules['cutlass_library'] = None", **builder | env)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode and "_cutlass needs cutlass/cutlass.h" in last, result.stderr


def test_an_sdist_can_be_built(tree):
    result = build(tree, "build_sdist")
    assert result.returncode == 0, result.stderr
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    names = {n.partition("/")[2] for n in tarfile.open(sdist).getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= names
    assert not any(n.startswith("tests") for n in names)


MISSING = {  # name: (code that runs before the build, environment, words of the error)
    "dlpack": ("", dict(DLPACK_INCLUDE_DIR="nowhere"), "dlpack/dlpack.h"),
    "the wheel with dlpack": ("import sys; sys.modules['tvm_ffi'] = None", {}, "dlpack/dlpack.h"),
    "pybind11": ("import sys; sys.modules['pybind11'] = None", {}, "pybind11"),
    "cmake": ("import sysconfig; sysconfig.get_path = lambda *a: ''", dict(PATH="bin"), "CMake 3.24"),
}


@pytest.mark.parametrize("name", MISSING)
def test_the_error_of_a_build_that_lacks_something(tree, name):
    before, env, words = MISSING[name]
    program(tree / "bin/nvcc")
    program(tree / "tools/cmake", "echo cmake version 3.30.1")
    program(tree / "tools/ninja")
    env = {"PATH": f"{tree}/bin:{tree}/tools", "DLPACK_INCLUDE_DIR": ""} | env
    result = build(tree, "build_wheel", before, **env)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode and last.startswith("error: nvcc was found, but"), result.stderr
    assert words in last and "LING_CUDA=0 installs without" in last


def test_a_failed_build_names_the_way_without_it(tree, builder):
    program(tree / "bin/cmake", '[ "$1" = --version ] && echo cmake version 3.30.1 || { echo a reason; exit 1; }')
    result = build(tree, "build_wheel", PYBIND11, **builder)
    assert "a reason" in result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("error: csrc/ did not build"), result.stderr


def test_cuda_that_is_asked_for_must_be_there(tree):
    result = build(tree, "get_requires_for_build_wheel", LING_CUDA="1", PATH=str(tree))
    assert result.returncode and "error: LING_CUDA=1, but there is no nvcc on PATH" in result.stderr


def test_a_build_requires_only_missing_packages(tree):
    nothing = "import sysconfig; sysconfig.get_path = lambda *a: ''"
    assert "result []" in build(tree, "get_requires_for_build_wheel", nothing, PATH=str(tree)).stdout
    program(tree / "bin/nvcc")
    everything = build(tree, "get_requires_for_build_wheel", nothing, PATH="bin", DLPACK_INCLUDE_DIR="")
    assert "result ['pybind11>=3.0', 'apache-tvm-ffi', 'cmake>=3.24', 'ninja']" in everything.stdout
    program(tree / "bin/cmake", "echo cmake version 3.22.1")
    program(tree / "bin/ninja")
    too_old = build(tree, "get_requires_for_build_wheel", nothing, PATH="bin", DLPACK_INCLUDE_DIR="somewhere")
    assert "result ['pybind11>=3.0', 'cmake>=3.24']" in too_old.stdout


@pytest.mark.skipif(not any(ROOT.glob("ling_kernels/_C*.so")), reason="_C is not built in place")
def test_the_extension_links_neither_torch_nor_the_driver():
    for extension in ROOT.glob("ling_kernels/_*.so"):
        linked = subprocess.run(["ldd", extension], capture_output=True, text=True).stdout
        assert not any(name in linked for name in ("libcuda", "torch", "c10", "not found")), linked
    result = python("-c", "import ling_kernels._C as C, sys; assert 'torch' not in sys.modules; print(dir(C))",
                    LD_LIBRARY_PATH="")  # fmt: skip
    assert "rms_norm_fwd" in result.stdout, result.stderr


PYTHON = """
case "$*" in
  "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo venv >> log;;
  *"import site"* | *importlib.metadata* | *get_requires*) ;;
  *sysconfig*) echo .venv;;
  *"pip install"*) echo install >> log;;
  *build_ext*) echo "build LING_CUTLASS=$LING_CUTLASS" >> log;;
  *) echo run >> log;;
esac
"""


def test_make_repeats_no_step(tree):
    """make, with a Python that logs the kind of each call."""
    fake = program(tree / "fake/python", PYTHON)
    for folder in ("gpu", "cuda"):
        (tree / "tests" / folder).mkdir()

    def make(target):
        (tree / "log").unlink(missing_ok=True)
        inherited = ("ARGS", "FAST", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")  # from the make that runs this test
        env = {k: v for k, v in CLEAN.items() if k not in inherited}
        result = subprocess.run(["make", target, f"PYTHON={fake}"], cwd=tree, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return [*dict.fromkeys((tree / "log").read_text().splitlines())]

    def touch(name):
        later = (tree / ".venv/.train").stat().st_mtime + 1
        os.utime(tree / name, (later, later))

    def settle():
        for stamp in (tree / ".venv").glob(".*"):
            later = stamp.stat().st_mtime + 2
            os.utime(stamp, (later, later))

    assert make("train") == ["venv", "install", "run"]
    assert make("train") == ["run"]
    assert make("test") == ["install", "run"]
    assert make("test") == ["run"] and make("train") == ["run"]
    touch("csrc/tensor.h")
    assert make("test") == ["build LING_CUTLASS=0", "run"]
    settle()
    assert make("test") == ["run"] and make("train") == ["run"]
    assert make("cutlass") == ["run", "build LING_CUTLASS=1"]  # it asks for the headers, which this Python has
    touch("pyproject.toml")
    assert make("train") == ["install", "run"]
    shutil.rmtree(tree / ".venv")
    assert make("install") == ["venv", "install"]

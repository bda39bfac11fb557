"""Forms of instructions, an opcode with its modifiers: each that a kernel has is tested alone."""

import json
import re
import time

import pytest

from tests.gpu import build, syntax
from tests.gpu.program import CACHE

if build.missing():
    pytest.skip(f"csrc/ needs {build.missing()} to run on the virtual GPU", allow_module_level=True)

from tests import test_gpu_arithmetic, test_gpu_checks, test_gpu_floats, test_gpu_machine, test_gpu_memory

OPCODE = re.compile(r"(?:^|[;{}:])\s*(?:@!?%?\w+\s+)?([a-z]\w*(?:\.[\w:]+)*)(?=\s|;)", re.MULTILINE)
CUTLASS = (build.CUTLASS / "cutlass/cutlass.h").exists()
DAY = 24 * 3600
# Control flow, and what has no effect
PLAIN = "bra ret exit trap brkpt call prefetch nanosleep griddepcontrol".split()


def forms_of(text: str) -> set[str]:
    """With modifiers in alphabetical order, where their order has no meaning."""
    found = OPCODE.findall(re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL))
    parts = [form.split(".") for form in found if form.split(".")[0] in syntax.FORMS]
    return {".".join([name, *(rest if name == "cvt" else sorted(rest))]) for name, *rest in parts}


def of_an_op(ptx: str) -> bool:
    """Whether all lines of a Triton kernel are those of files in ops/: tests have kernels of their own."""
    files = set(re.findall(r"// (\w+\.py):\d+", ptx))
    return bool(files) and all((build.ROOT / "ling_kernels/ops" / name).exists() for name in files)


def forms_of_kernels() -> set[str]:
    """Of csrc/, with CUTLASS's where its headers are, and of the ops that ran with Triton in the last day."""
    texts = [f.read_text() for name in ["_C", *["_cutlass"] * CUTLASS] for f in build.compile_module(name, "")[1]]
    made = [f for f in CACHE.glob("*.triton") if time.time() - f.stat().st_mtime < DAY]
    triton = filter(of_an_op, (json.loads(f.read_text())[0] for f in made))
    return set().union(*map(forms_of, [*texts, *triton]))


def tested() -> set[str]:
    modules = test_gpu_checks, test_gpu_machine, test_gpu_memory
    texts = [k.text for module in modules for k in module.Kernel.all.values()]
    tables = test_gpu_arithmetic.INTEGERS, test_gpu_floats.TABLE
    return set().union(*map(forms_of, [*texts, *map(test_gpu_arithmetic.table_kernel, tables)]))


def test_every_form_of_a_kernel_is_tested():
    forms = {form for form in forms_of_kernels() if form.split(".")[0] not in PLAIN}
    assert len(forms) > 200
    assert not sorted(forms - tested())

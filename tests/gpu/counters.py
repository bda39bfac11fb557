"""What a kernel did on the virtual GPU, as Nsight Compute's counters would tell: by kernel and by source line.

Instructions are PTX's, without those that ptxas adds, drops or merges. A request of a warp to global memory takes
sectors of 32 bytes, one to shared memory takes wavefronts of 128 bytes: "least" is what its bytes need if they lie
densely and in different banks. Bytes moved are sectors and the boxes of TMA; bytes owed are the global memory that a
launch reads, and that it writes, each byte once.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from .flow import running_order
from .program import SITE, Emulated
from .ptx import Instruction
from .translate import Translator

CLASSES = ("fp32", "int", "sfu", "lsu", "tensor", "branch", "move", "other")
CLASS_OF = {
    **dict.fromkeys("ex2 lg2 rcp rsqrt sqrt sin cos tanh".split(), "sfu"),
    **dict.fromkeys("ld st atom red ldmatrix stmatrix shfl cp prefetch".split(), "lsu"),
    **dict.fromkeys(
        "bar barrier mbarrier fence membar vote redux match elect griddepcontrol setmaxnreg".split(), "other"
    ),
    **dict(mma="tensor", wgmma="tensor", bra="branch", ret="branch", exit="branch", mov="move", cvta="move", cvt="int"),
}
FLOATS = ("f32", "f16", "bf16", "f16x2", "bf16x2")


def class_of(c: Instruction) -> str:
    return CLASS_OF.get(c.name) or ("fp32" if c.op[-1] in FLOATS else "int")


@contextmanager
def counting() -> Iterator[list[Emulated]]:
    """While open, launches count; afterwards the list has the kernels that ran, with this time's counts."""
    kernels: list[Emulated] = []
    before, os.environ["LING_GPU_COUNT"] = os.environ.get("LING_GPU_COUNT", "0"), "1"
    for kernel in [*Emulated.counted]:
        kernel.reset()
    try:
        yield kernels
    finally:
        os.environ["LING_GPU_COUNT"] = before
        kernels.extend(Emulated.counted)


def by_line(kernel: Emulated) -> dict[str, Counter]:
    """By source line ("file:line", and where that was inlined): warp instructions of each of CLASSES, "instructions"
    and "lanes" of all of them, and the counts of SITE."""
    entry = kernel.module.entry(kernel.entry.name)
    order = running_order(Translator(entry, kernel.module).following())
    lines: dict[str, Counter] = {}
    for block, runs, lanes in zip(order, kernel.runs, kernel.lanes, strict=False):
        for c in entry.blocks[block].code:
            kind = class_of(c)
            lines.setdefault(c.source, Counter()).update({kind: runs, "instructions": runs, "lanes": lanes})
    for i in range(kernel.kernel.sites):
        counts = zip(SITE, kernel.sites[len(SITE) * i : len(SITE) * (i + 1)], strict=True)
        lines.setdefault(kernel.site_info[i].source.decode(), Counter()).update(dict(counts))
    return lines


def of_lines(lines: dict[str, Counter]) -> dict[str, int]:
    """The sums of a kernel's lines, and the bytes that it "moved"."""
    total: Counter = sum(lines.values(), Counter())
    names = ("instructions", *CLASSES, "lanes", *SITE)
    return {k: total[k] for k in names} | dict(moved=32 * total["sectors"] + total["bulk_bytes"])

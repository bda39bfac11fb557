"""docs/kernels-clocks.md."""

import re

from tests.sass.clocks import MARGIN, SHORT
from tests.sass.walk import EARLY, JUMP, LATENCIES, OTHERWISE

PAGE = """\
# Clocks of the kernels on Hopper

Made by `make tables`, without a GPU, from the machine code that nvcc {cuda} and Triton {triton} built for sm_90.
**Nothing here is measured.** A walk follows one warp along the usual path: each loop once, no slow path of a division,
the options of a kernel switched off. It knows each instruction's scheduling fields, and assumes the latencies below. It
does not see:

- other warps, which hide one another's waits and compete for the scheduler: bounded by the share below;
- memory that is busy, misses of the instruction cache, bank conflicts of registers and of shared memory;
- waits for other warps and for TMA: everybody counts as having come already;
- the tensor cores' time, which has a column of its own; a warp alone takes both, two warpgroups hide one in the other;
- power, which lowers the clock.

`python -m tests.sass FILE KERNEL` walks a cubin, an object of nvcc or the built module: from opcode to opcode, by
source line, with the instructions. The tables are budgets: a test compares them with fresh ones, with a margin of
{margin:.0%}.

| column | of one warp on its way through the part |
|---|---|
| instr | instructions: slots of its scheduler |
| clocks | of this warp alone, without tensor time |
| tensor | clocks of the scheduler's tensor core, at wgmma's rate |
| bytes | of global memory, if every lane has its own; without TMA |
| busiest | the scheduler (issue) or a unit: fma, integer, special, shared (wgmma's operands too); its busy clocks |
| share | of these clocks in those that the tensor core, or memory at 4.8 TB/s, needs: above 100% it must wait |
| CALL | calls in the code of the whole kernel: slow paths, mostly of divisions |
| BSSY | sections whose lanes may diverge |
| early | loads that one of the next {early} instructions waits for |
| pred | P2R, R2P, PLOP3: predicates that are packed or combined |

A row is a kernel from start to end ("whole"), or a loop, called after its work: products (wgmma), mma (mma.sync), tiles
(TMA loads), copies (cp.async), loads, stores; "around": with another one within. "After a wait": the longest section
from a wait for wgmma to the next issue; "before the first issue" and "after the last wait": what a tile costs besides
its products. "After the kernel ahead": from the wait for the preceding kernel. `attention_decode_kernel` is walked for
at most 32 sequences, all with keys. Loops of fewer than {short} instructions are left out, here also kernels of f16 and
f32. Nothing spills. No register is beyond setmaxnreg's limit. Nothing uses a wgmma's sums between its issue and the
wait for it, or writes its operand A.

| latency of | clocks | from |
|---|---|---|
{latencies}
| a jump that is taken, besides its stall | {jump} | assumed |
| any other instruction that sets a scoreboard | {otherwise} | assumed |

An SM has four schedulers; each issues one instruction a clock. A warp's instruction keeps a unit busy for 32 lanes over
its width: fma 1 clock (IMAD 2), integer and logic 2, special functions 8, shared memory 128 bytes a clock and SM (CUDA
Programming Guide, throughput of native arithmetic instructions, compute capability 9.0).

"""
HEAD = """\
| kernel | part | instr | clocks | tensor | bytes | busiest | share | CALL | BSSY | early | pred |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def page(cuda: dict, triton: dict) -> str:
    latencies = "\n".join(f"| {', '.join(names.split())} | {n} | {source} |" for names, n, source in LATENCIES)
    numbers = dict(margin=MARGIN, early=EARLY, short=SHORT, jump=JUMP, otherwise=OTHERWISE)
    head = PAGE.format(cuda=cuda["cuda"], triton=triton["triton"], latencies=latencies, **numbers)
    few = [r for r in triton["rows"] if r["part"] in ("whole", "products", "mma")]
    return head + "## csrc/\n\n" + lines(cuda["rows"]) + "\n## Triton\n\nWithout other loops.\n\n" + lines(few)


def lines(rows: list[dict]) -> str:
    shown = {}  # without rows that say the same: builds that differ in more than their name says
    for r in rows:
        if re.search(r"__half|float\b|\b(?:long|int|float16|float32)\b", r["kernel"]):
            continue
        name, share = f"`{r['kernel']}`", "" if r["share"] is None else f"{r['share']:.0%}"
        cells = [r["part"], r["instructions"], r["clocks"], r["tensor"] or "", r["bytes"] or ""]
        cells += [f"{r['unit']} {r['busy']}", share]
        cells += [r.get(k) or "" for k in ("call_sites", "branches", "early", "predicates")]
        shown[(name, *cells)] = f"| {name * (r['part'] == 'whole')} | {' | '.join(map(str, cells))} |\n"
    return HEAD + "".join(shown.values())

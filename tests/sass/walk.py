"""The clocks of one warp along a path, and what the path asks of its scheduler.

Each instruction issues when the warp's preceding one allows it (stall), the scoreboards that it waits for are free, and
its unit takes it. It knows one warp alone whose data are in L1, L2 or memory as LATENCY says. It does not see:

* other warps. They hide one another's waits, and compete for the scheduler, which issues one instruction a clock;
* memory that is busy, misses of the instruction cache, bank conflicts of registers and of shared memory;
* waits for another warp or for TMA (barriers, mbarriers): they count as if everybody else had come already;
* the tensor cores: wgmma and its wait cost their issue. `Walk.tensor` says how long they compute;
* power, which lowers the clock.
"""

from typing import NamedTuple

from ling_kernels.gpu import HOPPER, Gpu
from tests.sass.decode import LANES, Instruction, global_bytes, tensor_clocks, width

SCHEDULERS = 4  # of an SM; each has a warp of every four

# Clocks until the result of an instruction whose latency the compiler does not know is there.
LATENCY = {
    "LDG": 590, "LD": 590, "ATOMG": 590, "ATOM": 590,  # L2 260, + 150 / 2 for its far half, + 254 for memory
    "LDS": 29, "LDSM": 33, "ATOMS": 60, "LDL": 39, "SHFL": 24, "REDUX": 24, "VOTE": 12,
    "SYNCS": 32, "MUFU": 19, "FCHK": 19, "POPC": 19, "FLO": 19, "BREV": 19, "I2F": 19, "F2I": 19, "F2F": 19,
    "LDC": 30, "ULDC": 30, "S2R": 20, "S2UR": 20, "R2UR": 12, "HMMA": 33, "BAR": 15,
}  # fmt: skip
OTHERWISE = 20
OPERANDS_READ = 12  # until a load or store has read its address and data, and their registers may be overwritten
JUMP = 10  # added by a jump that is taken
EARLY = 5  # a load that is waited for within as many instructions stands alone

# Clocks for which an instruction of a warp keeps its unit in the scheduler's quarter of the SM busy: 32 lanes over the
# unit's width. Of the SM's shared memory, 128 bytes a clock, a scheduler has a quarter.
FMA = {"FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "IMAD"}
SPECIAL = {"MUFU", "FCHK", "POPC", "FLO", "BREV", "I2F", "F2I", "F2F", "I2I"}
INTEGER = {
    "IADD3", "VIADD", "VIADDMNMX", "VIMNMX", "IMNMX", "IABS", "LOP3", "PLOP3", "SHF", "LEA", "PRMT", "SEL", "MOV",
    "ISETP", "FSETP", "FMNMX", "FSEL", "HMNMX2", "HSETP2", "HSET2", "P2R", "R2P", "F2FP", "BMSK", "SGXT", "CS2R",
}  # fmt: skip
SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}


class Walk(NamedTuple):
    instructions: int  # issue slots of a warp
    clocks: int  # of a warp alone, without tensor time
    tensor: int  # clocks of a scheduler's tensor core
    bytes: int  # of global memory a warp, without TMA
    units: dict[str, int]  # clocks of the scheduler's fma, integer, special and shared units
    calls: int  # CALLs
    branches: int  # BSSYs: sections whose lanes may diverge
    early: int  # loads of global memory that are waited for within EARLY instructions
    predicates: int  # P2R, R2P and PLOP3: predicates kept in bits or combined
    spills: int  # loads and stores of local memory

    def slots(self, gpu: Gpu = HOPPER["H200"]) -> float | None:
        """Issue slots over the clocks that tensor cores or memory need for the path: above 1 they cannot be kept busy.

        Both sides grow alike with the number of warps, if all walk this path. None where the path has neither.
        """
        memory = self.bytes / (gpu.bandwidth / gpu.sms / SCHEDULERS / gpu.clock)
        return self.instructions / max(self.tensor, memory) if self.tensor or memory else None


def walk(path: list[Instruction]) -> Walk:
    def count(*opcodes: str) -> int:
        return sum(i.base in opcodes for i in path)

    return Walk(
        len(path), clocks(path), sum(map(tensor_clocks, path)), sum(map(global_bytes, path)), units(path),
        calls=count("CALL"), branches=count("BSSY"), early=early(path), predicates=count("P2R", "R2P", "PLOP3"),
        spills=count("LDL", "STL"),
    )  # fmt: skip


def clocks(path: list[Instruction], latency: dict[str, int] = LATENCY) -> int:
    """From the first instruction's issue to where the one after the last may issue."""
    now, free, busy = 0, [0] * 6, dict.fromkeys(UNITS, 0)
    for i, after in zip(path, [*path[1:], None], strict=True):
        unit, n = unit_of(i)
        now = max([now, busy.get(unit, 0), *(free[s] for s in i.waits)])
        if unit:
            busy[unit] = now + n
        if i.sets is not None:
            free[i.sets] = max(free[i.sets], now + latency.get(i.base, OTHERWISE))
        if i.frees is not None:
            free[i.frees] = max(free[i.frees], now + OPERANDS_READ)
        now += max(1, i.stall)
        if after and after.address != i.address + 16:
            now += JUMP
    return now


UNITS = ("fma", "integer", "special", "shared")


def unit_of(i: Instruction) -> tuple[str | None, int]:
    """(unit, clocks for which it is busy)."""
    if i.base in FMA:
        return "fma", 2 if i.base == "IMAD" else 1
    if i.base in INTEGER:
        return "integer", 2
    if i.base in SPECIAL:
        return "special", 8
    if i.base in SHARED:
        return "shared", shared_clocks(i)
    return ("shared", 4) if i.base in ("SHFL", "REDUX") else (None, 0)


def shared_clocks(i: Instruction) -> int:
    n = int(i.modifiers[-1]) * 4 if i.base in ("LDSM", "STSM") else width(i)
    return max(1, n * LANES // 128) * SCHEDULERS


def units(path: list[Instruction]) -> dict[str, int]:
    total = dict.fromkeys(UNITS, 0)
    for unit, n in map(unit_of, path):
        if unit:
            total[unit] += n
    return total


def early(path: list[Instruction]) -> int:
    """Loads whose scoreboard one of the next EARLY instructions waits for."""
    return sum(
        any(i.sets in after.waits for after in path[k + 1 : k + 1 + EARLY])
        for k, i in enumerate(path)
        if i.base in ("LDG", "LD") and i.sets is not None
    )

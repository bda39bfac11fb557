"""The clocks of one warp along a path, and what the path asks of its scheduler.

Each instruction issues when the warp's preceding one allows it (stall), the scoreboards that it waits for are free, and
its unit takes it. docs/kernels-clocks.md says what this cannot see.
"""

from typing import NamedTuple

from ling_kernels.gpu import HOPPER
from tests.sass.decode import LANES, Instruction, global_bytes, tensor_clocks, width

H200 = HOPPER["H200"]
SCHEDULERS = 4  # of an SM; each has a warp of every four

CALIBRATED = "FlashGPU-Sim, calibrated on an H100"  # its configs/SM90_H100
ASSUMED = "assumed"
# Opcodes, clocks until the result is there, and where the number is from.
LATENCIES = [
    ("LDG LD ATOMG ATOM", 590, f"{CALIBRATED}: L2 260, half of 150 for its far half, memory 254"),
    ("LDS ATOMS", 29, CALIBRATED),
    ("LDSM", 33, ASSUMED),
    ("LDL", 39, f"{CALIBRATED}: L1"),
    ("MUFU FCHK POPC FLO BREV I2F F2I F2F I2I", 19, f"{CALIBRATED}: ex2"),
    ("SYNCS", 32, f"{CALIBRATED}: mbarrier try_wait"),
    ("BAR", 15, f"{CALIBRATED}: named barrier"),
    ("SHFL REDUX", 24, ASSUMED),
    ("LDC ULDC", 30, ASSUMED),
    ("S2R S2UR", 20, ASSUMED),
    ("R2UR VOTE", 12, ASSUMED),
    ("HMMA", 33, ASSUMED),
]
LATENCY = {opcode: n for opcodes, n, _ in LATENCIES for opcode in opcodes.split()}
OTHERWISE = 20  # any other
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
    calls: int  # CALLs that cannot be avoided
    branches: int  # BSSYs: sections whose lanes may diverge
    early: int  # loads of global memory that are waited for within EARLY instructions
    predicates: int  # P2R, R2P and PLOP3: predicates kept in bits or combined
    spills: int  # loads and stores of local memory

    @property
    def busiest(self) -> tuple[str, int]:
        """The unit that is busy for most clocks, and these: "issue", or one of UNITS."""
        return max([("issue", self.instructions), *self.units.items()], key=lambda unit: unit[1])

    @property
    def share(self) -> float | None:
        """Clocks of the busiest unit over those that an H200's tensor cores or memory need for the path.

        Above 1 they cannot be kept busy. Both sides grow alike with the number of a scheduler's warps, if all walk this
        path. None where the path has neither products nor loads and stores of global memory.
        """
        memory = self.bytes / (H200.bandwidth / H200.sms / SCHEDULERS / H200.clock)
        return self.busiest[1] / max(self.tensor, memory) if self.tensor or memory else None


def walk(path: list[Instruction]) -> Walk:
    def count(*opcodes: str) -> int:
        return sum(i.base in opcodes for i in path)

    return Walk(
        len(path), clocks(path), sum(map(tensor_clocks, path)), sum(map(global_bytes, path)), units(path),
        calls=count("CALL"), branches=count("BSSY"), early=early(path), predicates=count("P2R", "R2P", "PLOP3"),
        spills=count("LDL", "STL"),
    )  # fmt: skip


def clocks(path: list[Instruction]) -> int:
    """From the first instruction's issue to where the one after the last may issue."""
    now, free, busy = 0, [0] * 6, dict.fromkeys(UNITS, 0)
    for i, after in zip(path, [*path[1:], None], strict=True):
        unit, n = unit_of(i)
        now = max([now, busy.get(unit, 0), *(free[s] for s in i.waits)])
        if unit:
            busy[unit] = now + (n // SCHEDULERS if unit == "shared" else n)
        if i.sets is not None:
            free[i.sets] = max(free[i.sets], now + LATENCY.get(i.base, OTHERWISE))
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
        return "shared", max(1, width(i) * LANES // 128) * SCHEDULERS
    return ("shared", SCHEDULERS) if i.base in ("SHFL", "REDUX") else (None, 0)


def units(path: list[Instruction]) -> dict[str, int]:
    total = dict.fromkeys(UNITS, 0)
    for i in path:
        unit, n = unit_of(i)
        if unit:
            total[unit] += n
        total["shared"] += operand_clocks(i)
    return total


def operand_clocks(i: Instruction) -> int:
    """Clocks of shared memory for a wgmma's operands: 32 bytes of each of B's N rows, and of 64 of A if it is there.

    A warpgroup has a warp in each scheduler, so that each scheduler's quarter of the SM's memory serves its own.
    """
    if not i.base.endswith("GMMA"):
        return 0
    rows = 2 * tensor_clocks(i) + 64 * (i.operands.split(",")[1].strip().startswith("gdesc"))
    return rows * 32 // 128


def early(path: list[Instruction]) -> int:
    """Loads whose scoreboard one of the next EARLY instructions waits for."""
    return sum(
        any(i.sets in after.waits for after in path[k + 1 : k + 1 + EARLY])
        for k, i in enumerate(path)
        if i.base in ("LDG", "LD") and i.sets is not None
    )

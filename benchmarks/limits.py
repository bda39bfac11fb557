"""What a GPU can do at most, by its data sheet or as measured, and how long a piece of work must therefore take."""

from dataclasses import dataclass

from ling_kernels.gpu import Gpu, named


@dataclass(frozen=True)
class Work:
    """The least that an op must move, and what it multiplies, with which operands."""

    bytes: int
    flops: int = 0
    precision: str = "bf16"  # or fp8


def measured(name: str, rows: list[dict]) -> Gpu | None:
    """That GPU with the rates that the run measured first, where all are there."""
    found = {r["rate"]: r["per_second"] for r in rows if r.get("rate")}
    plate = named(name)
    if not plate or not {"copy", "bf16"} <= {*found}:
        return None
    fp8 = found.get("fp8", found["bf16"] * plate.fp8 / plate.bf16)
    return plate._replace(bandwidth=max(found["copy"], found.get("read", 0)), bf16=found["bf16"], fp8=fp8)


def floor(work: Work, gpu: Gpu) -> float:
    """Seconds: the larger of the time to move the bytes and the time to multiply."""
    return max(work.bytes / gpu.bandwidth, work.flops / gpu.rate(work.precision))


def bound(work: Work, gpu: Gpu) -> str:
    return "memory" if work.bytes / gpu.bandwidth >= work.flops / gpu.rate(work.precision) else "compute"


LAUNCH = 2e-6  # seconds of a kernel that no limit explains: launch, first loads, last stores
MODEL = (
    "A GPU that was not measured is predicted from the H200 that was: of its time, 2 us (launch and tail) stay; the "
    "rest grows as the limit that binds the op there (bytes over bandwidth or FLOPs over rate, by data sheet) has "
    "grown; where the op reached less than half of its limit on the H200, its own instructions take the time, and it "
    "grows at least as SMs times clock have shrunk."
)


def predict(seconds: float, work: Work, on: Gpu, to: Gpu) -> float:
    """Seconds on `to` of what took `seconds` on `on`, by MODEL."""
    rest = max(seconds - LAUNCH, 0.0)
    growth = floor(work, to) / floor(work, on)
    if floor(work, on) < rest / 2:
        growth = max(growth, on.sms * on.clock / (to.sms * to.clock))
    return min(seconds, LAUNCH) + rest * growth

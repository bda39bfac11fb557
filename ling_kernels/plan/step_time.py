"""Predicted time of a whole training step: its micro batches, simulated over roofline times (units.py), then what comes
once. Messages between GPUs are hidden where DualPipeV puts a forward and a backward together, nowhere else. Nothing
here is measured."""

from dataclasses import replace

from ..gpu import Gpu
from ..model import LingConfig
from ..train.prepare.checks_parallel import schedule_of, stages_of
from ..train.settings import Settings
from .processes import processes_of
from .search import known_order
from .simulate import Timeline, simulate
from .train_time import LINKS, NODE, once, total
from .units import letters, stage_times, transfer_seconds

UNTIMED = ("dp_replicate", "cp", "tp", "vocab_parallel")  # settings that have no time where they are not 1


def timeline_of(c: LingConfig, s: Settings, gpu: Gpu) -> Timeline:
    """The micro batches of a step on the processes that share the stages."""
    size, layout = processes_of(s), stages_of(s, c)
    rows = s.batch // (size // s.pp)
    s = replace(s, micro_batch=s.micro_batch or rows)
    schedule, number = schedule_of(s, layout), rows // s.micro_batch
    order = known_order(schedule, s.pp, len(layout.stages), number) if isinstance(schedule, str) else schedule
    return simulate(order, stage_times(layout, c, s, gpu), transfer_seconds(c, s, size <= NODE))


def step_seconds(c: LingConfig, s: Settings, timeline: Timeline, peaks: list[dict[str, int]], gpu: Gpu) -> float:
    """peaks: the plan's bytes by kind of a process of each rank of the pipeline."""
    layers = moe_layers(c, s, timeline)
    return timeline.seconds + max(last_seconds(c, s, n, peak, gpu) for n, peak in zip(layers, peaks, strict=True))


def last_seconds(c: LingConfig, s: Settings, layers: int, peak: dict[str, int], gpu: Gpu) -> float:
    """What comes once on a process: the sums over dp, the optimizer. layers: with experts, of it; peak: its bytes of
    weights, optimizer and FP8 weights."""
    return total(once(s, peak), gpu) + gradient_seconds(c, s, layers, peak["weights"])


def moe_layers(c: LingConfig, s: Settings, timeline: Timeline) -> list[int]:
    """Of each rank of the pipeline."""
    layout, found = stages_of(s, c), [0] * s.pp
    rank_of = {a.stage: r for r, events in enumerate(timeline.events) for e in events for a in e.step}
    for stage, units in enumerate(letters(layout, c)):
        found[rank_of[stage]] += units.count("t") + units.count("m")
    return found


def gradient_seconds(c: LingConfig, s: Settings, layers: int, weights: int) -> float:
    """Seconds in which gradients are summed on their owners and weights come back, once a step. layers: with experts,
    of this process; weights: its bytes of all."""
    dp, master = processes_of(s) // s.pp, 4 if s.master == "fp32" else 2
    experts = layers * (c.num_experts // s.ep) * 3 * c.moe_intermediate_size * c.hidden_size * master
    copies = dp // s.ep  # of an expert's weights
    sent = max(weights - experts, 0) * (dp - 1) / dp + experts * (copies - 1) / copies
    return 2 * sent / LINKS[dp <= NODE]

"""The units of a pipeline, the letters of its layouts: their times, parameters and bytes on one GPU, predicted.

    E embedding   d dense layer   t MoE layer   m MTP layer   L head and one loss

A layout writes d and t alike, t: the first layers are dense.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ..gpu import Gpu
from ..model import LingConfig
from ..parallel.pipeline_layout import PipelineLayout
from ..train.settings import Settings
from .memory import EXCHANGE, plan_training
from .simulate import Times
from .train_time import LINKS, Pass, exchange_seconds, total, unit

NOTHING = Times(0.0, 0.0, 0.0)


class Unit(NamedTuple):
    """Of one unit, or of several together."""

    times: Times  # seconds
    parameters: int  # on this GPU, without experts
    experts: int  # parameters of experts on this GPU
    kept: float  # bytes between a micro batch's forward and its backward

    def __add__(self, other: "Unit") -> "Unit":  # type: ignore[override]
        _, parameters, experts, kept = other
        return Unit(
            self.times + other.times, self.parameters + parameters, self.experts + experts, self.kept + kept
        )  # fmt: skip


def predicted_units(c: LingConfig, s: Settings, gpu: Gpu, ep: int) -> dict[str, Unit]:
    """{letter: Unit} of a model. Times are train_time.py's roofline; the embedding takes none. linear_cross_entropy
    computes its gradients in the forward, so all of L's time is there."""
    kept = kept_bytes(c, s, ep)
    groups, found = c.num_experts // ep, {}
    for kind in "EdtmL":
        times = unit_times(c, s, kind, gpu, ep)
        experts = 3 * groups * c.moe_intermediate_size * c.hidden_size if kind in "tm" else 0
        found[kind] = Unit(times, parameters(c, kind), experts, kept[kind])
    return found


def with_measured(units: dict[str, Unit], measured: dict[str, Times]) -> dict[str, Unit]:
    """The units with measured times, but for what they send, which stays predicted."""
    found = dict(units)
    for kind, seconds in measured.items():
        sending = units[kind].times[3:]
        found[kind] = units[kind]._replace(times=Times(*seconds[:3], *sending))
    return found


def unit_times(c: LingConfig, s: Settings, kind: str, gpu: Gpu, ep: int) -> Times:
    """Of a unit of this kind, and of its rows' exchange between GPUs."""
    if kind == "E":
        return NOTHING
    exchange = exchange_seconds(c, s, ep, kind == "m") if kind in "tm" else (0.0, 0.0)
    return times_of(unit(c, s, kind, c.num_experts // ep), kind, gpu, exchange)


def times_of(work: Pass, kind: str, gpu: Gpu, exchange: tuple[float, float]) -> Times:
    weights = total((w for w in work.backward if w.name.endswith("wgrad")), gpu)
    rest = total((w for w in work.backward if not w.name.endswith("wgrad")), gpu)
    if kind == "L":
        return Times(total(work.forward, gpu) + rest + weights, 0.0, 0.0)
    return Times(total(work.forward, gpu), rest, weights, *exchange)


def parameters(c: LingConfig, kind: str) -> int:
    """Parameters of a unit without its experts and without the final norm."""
    if kind in "EL":
        return c.vocab_size * c.hidden_size
    dense = kind == "d"
    one = replace(c, num_hidden_layers=1, first_k_dense_replace=int(dense), num_nextn_predict_layers=0)
    layer = one.num_parameters() - 2 * c.vocab_size * c.hidden_size - c.hidden_size
    if not dense:
        layer -= 3 * c.num_experts * c.moe_intermediate_size * c.hidden_size
    return layer + (2 * c.hidden_size**2 + 3 * c.hidden_size if kind == "m" else 0)


def kept_bytes(c: LingConfig, s: Settings, ep: int) -> dict[str, float]:
    """Bytes that each unit keeps for its backward, by fake runs of models of one and two layers."""
    micro = s.micro_batch or s.batch
    s = replace(s, batch=ep * micro, micro_batch=micro, dp=ep, ep=ep, batch_ramp=None, step_in_backward=False)

    def kept(dense: int, moe: int, mtp: int = 0) -> dict[str, int]:
        part = replace(
            c, num_hidden_layers=dense + moe, first_k_dense_replace=dense, num_nextn_predict_layers=mtp
        )  # fmt: skip
        return plan_training(part, s).kept_bytes

    def layers(kept: dict[str, int]) -> int:
        return kept["activations"] + kept[EXCHANGE]

    one, two, dense, mtp = kept(0, 1), kept(0, 2), kept(1, 1), kept(0, 1, 1)
    t, d, m = (float(layers(more) - layers(one)) for more in (two, dense, mtp))
    return dict(E=0.0, d=d, t=t, m=m, L=float(one["loss"]))


def letters(layout: PipelineLayout, c: LingConfig) -> list[str]:
    """The units of each stage, d for the first, dense layers; one L for all losses counts as one for each."""
    found, layers = [], 0
    losses = 1 + c.num_nextn_predict_layers if "".join(layout.stages).count("L") == 1 else 1
    for stage in layout.stages:
        units = ""
        for letter in stage:
            dense = letter == "t" and layers < c.first_k_dense_replace
            layers += letter == "t"
            units += "d" if dense else letter * (losses if letter == "L" else 1)
        found.append(units)
    return found


def stage_units(layout: PipelineLayout, c: LingConfig, units: dict[str, Unit]) -> list[Unit]:
    """Each stage's units together."""
    empty = Unit(NOTHING, 0, 0, 0.0)
    return [sum((units[letter] for letter in stage), start=empty) for stage in letters(layout, c)]


def stage_times(layout: PipelineLayout, c: LingConfig, s: Settings, gpu: Gpu) -> list[Times]:
    """Seconds of each stage."""
    found = letters(layout, c)
    times = {kind: unit_times(c, s, kind, gpu, s.ep) for kind in {*"".join(found)}}
    return [sum((times[letter] for letter in stage), start=NOTHING) for stage in found]


def transfer_seconds(c: LingConfig, s: Settings, near: bool) -> float:
    """Seconds that a stage's bf16 hidden states take to another GPU, within a node (NVLink) or beyond."""
    return 2.0 * (s.micro_batch or s.batch) * s.seq_len * c.hidden_size / LINKS[near]


def rank_parameters(layout: PipelineLayout, ranks: Sequence[int], units: list[Unit], c: LingConfig) -> list[list[int]]:
    """[without experts, experts] of each rank. A rank with m holds the embedding, too; head and embedding count once a
    rank. The final norm is with the first m or L."""
    table, whole = [[0, 0] for _ in range(max(ranks) + 1)], c.vocab_size * c.hidden_size
    for rank, held in zip(ranks, units, strict=True):
        table[rank][0] += held.parameters
        table[rank][1] += held.experts
    normed = next(r for stage, r in zip(layout.stages, ranks, strict=True) if set(stage) & {"m", "L"})
    table[normed][0] += c.hidden_size
    for rank, row in enumerate(table):
        mine = "".join(stage for stage, r in zip(letters(layout, c), ranks, strict=True) if r == rank)
        row[0] += whole * (("m" in mine and "E" not in mine) - max(mine.count("L") - 1, 0))
    return table

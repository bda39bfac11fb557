"""The units of a pipeline, the letters of its layouts: their times, parameters and bytes on one GPU, predicted.

    E embedding   d dense layer   t MoE layer   m MTP layer   L head and one loss

A layout writes d and t alike, t: the first layers are dense. The final norm is n.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ..gpu import Gpu
from ..model import LingConfig
from ..parallel.exchange import expert_parameters
from ..parallel.pipeline_layout import PipelineLayout
from ..parallel.shares import Owners
from ..train.settings import Settings
from .memory import EXCHANGE, plan_training
from .processes import one_process, state_bytes
from .simulate import Times
from .train_time import LINKS, Pass, exchange_seconds, total, unit

NOTHING = Times(0.0, 0.0, 0.0)


class Weight(NamedTuple):
    """A parameter on one GPU."""

    name: str  # in a model whose only dense layer is the first, the others alike
    size: int
    bytes: int  # of the master
    state: int  # bytes of the optimizer's state
    expert: bool  # --ep divides it


class Unit(NamedTuple):
    """Of one unit."""

    times: Times  # seconds
    weights: tuple[Weight, ...]
    kept: float  # bytes between a micro batch's forward and its backward

    @property
    def experts(self) -> int:
        """Parameters of experts on this GPU."""
        return sum(w.size for w in self.weights if w.expert)


class StageWork(NamedTuple):
    """Of a stage's units together, for a micro batch."""

    times: Times  # seconds
    kept: float  # bytes between forward and backward


class Gpus(NamedTuple):
    """dp data-parallel GPUs of each of pp ranks; groups of ep of them share the experts, and all the optimizer's
    state."""

    dp: int = 1
    ep: int = 1
    pp: int = 1


class Share(NamedTuple):
    """What the fullest GPU of a rank of the pipeline holds."""

    plain: int  # parameters without experts
    experts: int
    weights: int  # bytes of the masters; gradients take as many
    optimizer: int  # bytes of its state


def predicted_units(c: LingConfig, s: Settings, gpu: Gpu, ep: int) -> dict[str, Unit]:
    """{letter: Unit} of a model. Times are train_time.py's roofline; embedding and final norm take none.
    linear_cross_entropy computes its gradients in the forward, so all of L's time is there."""
    kept, weights = kept_bytes(c, s, ep), unit_weights(c, s, ep)
    return {kind: Unit(unit_times(c, s, kind, gpu, ep), weights[kind], kept[kind]) for kind in "EdtnmL"}


def with_measured(units: dict[str, Unit], measured: dict[str, Times]) -> dict[str, Unit]:
    """The units with measured times, but for what they send, which stays predicted."""
    found = dict(units)
    for kind, seconds in measured.items():
        sending = units[kind].times[3:]
        found[kind] = units[kind]._replace(times=Times(*seconds[:3], *sending))
    return found


def unit_times(c: LingConfig, s: Settings, kind: str, gpu: Gpu, ep: int) -> Times:
    """Of a unit of this kind, and of its rows' exchange between GPUs."""
    if kind in "En":
        return NOTHING
    exchange = exchange_seconds(c, s, ep, kind == "m") if kind in "tm" else (0.0, 0.0)
    return times_of(unit(c, s, kind, c.num_experts // ep), kind, gpu, exchange)


def times_of(work: Pass, kind: str, gpu: Gpu, exchange: tuple[float, float]) -> Times:
    weights = total((w for w in work.backward if w.name.endswith("wgrad")), gpu)
    rest = total((w for w in work.backward if not w.name.endswith("wgrad")), gpu)
    if kind == "L":
        return Times(total(work.forward, gpu) + rest + weights, 0.0, 0.0)
    return Times(total(work.forward, gpu), rest, weights, *exchange)


def unit_weights(c: LingConfig, s: Settings, ep: int) -> dict[str, tuple[Weight, ...]]:
    """The parameters of each unit, in their order in the model, by a fake model that the trainer divides."""
    small = replace(c, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1)
    places = {"word_embeddings": "E", "layers.0": "d", "layers.1": "t", "norm": "n", "lm_head": "L", "mtp.0": "m"}
    found: dict[str, tuple[Weight, ...]] = dict.fromkeys(places.values(), ())
    with one_process(small, of_one_rank(s, ep)) as shares:
        states = state_bytes(shares.stepped, s)
        experts = expert_parameters(shares.model)
        for name, p in shares.model.named_parameters():
            kind = next(kind for place, kind in places.items() if name.startswith(place + "."))
            found[kind] += (Weight(name, p.numel(), p.nbytes, states[name], p in experts),)
    return found


def of_one_rank(s: Settings, ep: int) -> Settings:
    """The settings of a step of one micro batch on `ep` GPUs without a pipeline."""
    micro = s.micro_batch or s.batch
    s = replace(s, dp=ep, ep=ep, pp=1, pipeline=None, schedule=None)
    return replace(s, batch=ep * micro, micro_batch=micro, batch_ramp=None, step_in_backward=False)


def kept_bytes(c: LingConfig, s: Settings, ep: int) -> dict[str, float]:
    """Bytes that each unit keeps for its backward, by fake runs of models of one and two layers."""
    s = of_one_rank(s, ep)

    def kept(dense: int, moe: int, mtp: int = 0) -> dict[str, int]:
        part = replace(
            c, num_hidden_layers=dense + moe, first_k_dense_replace=dense, num_nextn_predict_layers=mtp
        )  # fmt: skip
        return plan_training(part, s).kept_bytes

    def layers(kept: dict[str, int]) -> int:
        return kept["activations"] + kept[EXCHANGE]

    one, two, dense, mtp = kept(0, 1), kept(0, 2), kept(1, 1), kept(0, 1, 1)
    t, d, m = (float(layers(more) - layers(one)) for more in (two, dense, mtp))
    return dict(E=0.0, d=d, t=t, n=0.0, m=m, L=float(one["loss"]))


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


def stage_work(layout: PipelineLayout, c: LingConfig, units: dict[str, Unit]) -> list[StageWork]:
    """Each stage's units together."""
    stages = [[units[letter] for letter in stage] for stage in letters(layout, c)]
    return [StageWork(sum((u.times for u in stage), start=NOTHING), sum(u.kept for u in stage)) for stage in stages]


def stage_times(layout: PipelineLayout, c: LingConfig, s: Settings, gpu: Gpu) -> list[Times]:
    """Seconds of each stage."""
    found = letters(layout, c)
    times = {kind: unit_times(c, s, kind, gpu, s.ep) for kind in {*"".join(found)}}
    return [sum((times[letter] for letter in stage), start=NOTHING) for stage in found]


def transfer_seconds(c: LingConfig, s: Settings, near: bool) -> float:
    """Seconds that a stage's bf16 hidden states take to another GPU, within a node (NVLink) or beyond."""
    return 2.0 * (s.micro_batch or s.batch) * s.seq_len * c.hidden_size / LINKS[near]


def rank_units(layout: PipelineLayout, ranks: Sequence[int], c: LingConfig) -> list[str]:
    """The letters of the units whose weights each rank holds, in their order in the model. A rank with m holds the
    embedding, too; head and embedding are there once a rank, and the final norm is with the first m or L."""
    found = [""] * (max(ranks) + 1)
    for rank, units in zip(ranks, letters(layout, c), strict=True):
        if set(units) & {"m", "L"} and not any("n" in held for held in found):
            units += "n"
        found[rank] += units + "E" * ("m" in units)
    return ["".join(u * (min(held.count(u), 1) if u in "EL" else held.count(u)) for u in "EdtnLm") for held in found]


def rank_share(held: str, units: dict[str, Unit], gpus: Gpus) -> Share:
    """What the fullest GPU of a rank holds. held: of rank_units. The optimizer's state is shared out as the trainer
    does it, by whole parameters (parallel/shares.py)."""
    weights, owners = [w for u in held for w in units[u].weights], Owners(gpus.pp)
    plain, experts = [0] * gpus.dp, [0] * (gpus.dp // gpus.ep)  # bytes of state
    for w in weights:
        states = experts if w.expert else plain
        states[owners.add(w.name, w.size, w.expert, len(states))] += w.state
    state = max(plain[replica] + experts[replica // gpus.ep] for replica in range(gpus.dp))
    number = sum(w.size for w in weights if w.expert)
    return Share(sum(w.size for w in weights) - number, number, sum(w.bytes for w in weights), state)

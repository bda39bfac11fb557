"""A cost model of a training step on thousands of GPUs: time, MFU, bytes over NVLink and the network. Nothing measured.

The pipeline is simulated over roofline times (units.py). Added to it, not hidden: the sums of gradients over
data-parallel ranks, the weights' way back (ZeRO-1), and the optimizer's passes. Left out: failures, checkpoints,
stragglers, uneven loads of experts, the host. ASSUMPTIONS lists what is assumed.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from ..gpu import HOPPER, Gpu, find_gpu
from ..model import LingConfig
from ..parallel.pipeline_layout import PipelineLayout
from ..train.settings import Settings
from .decode_time import EFFICIENCY
from .search import Problem, Result
from .train_time import BF16_SHARE, LAUNCH, LINKS, Work, exchange_seconds, unit
from .units import Gpus, Unit, predicted_units, stage_work, times_of, transfer_seconds

NETWORK = LINKS[False]


class Cluster(NamedTuple):
    name: str
    gpu: Gpu
    nvlink: float  # bytes/s of a GPU to the others of its node, one direction


CLUSTERS = (  # the H800 is an H100 with half of its NVLink (400 GB/s of both directions)
    Cluster("H800", find_gpu("H800"), 200e9),
    Cluster("H20", HOPPER["H20"], LINKS[True]),
    Cluster("H200", HOPPER["H200"], LINKS[True]),
)


@dataclass(frozen=True)
class Software:
    """What a step of the ladder changes. exchange: share of NVLink's rate that dispatch and combine reach. passes:
    bytes of everything but products, as a multiple of this package's fused kernels. fast: the recomputation of a layer
    leaves out the experts' down projection and the combine."""

    exchange: float = 0.8
    passes: float = 1.0
    fast: bool = True


ASSUMPTIONS = (
    f"products in bf16 reach {BF16_SHARE:.0%} of the peak, FP8 ones the shares of docs/kernels-predicted.md",
    f"passes over memory reach {EFFICIENCY:.0%} of the bandwidth; no kernel takes less than {LAUNCH * 1e6:g} us",
    f"a GPU sends {LINKS[True] / 1e9:g} GB/s over NVLink, an H800 200, and {NETWORK / 1e9:g} GB/s over the network",
    "dispatch and combine are hidden where DualPipeV puts a forward and a backward together, nowhere else; they reach"
    " 80 % of NVLink, and 40 % before DeepEP (both assumed)",
    "before the fused kernels, passes over memory move twice the bytes (assumed)",
    "a layer is recomputed as a whole with its exchange, or, fast, without down projection and combine",
    "gradients are summed in fp32 over the network once a step, weights come back in bf16; none of it is hidden",
    "experts get equally many tokens; all GPUs run at the data sheet's clock",
)


class Step(NamedTuple):
    seconds: float
    mfu: float  # of the bf16 peak
    idle: float  # share of the pipeline's time
    nvlink: float  # bytes that the GPU with most of them sends in a step
    network: float
    memory: float  # bytes of the fullest GPU


def cluster_units(
    c: LingConfig, s: Settings, cluster: Cluster, ep: int, software: Software, units: dict[str, Unit]
) -> dict[str, Unit]:
    """predicted_units with the cluster's links and the software's passes."""

    def kept(w: Work, backward: bool) -> bool:
        return not (backward and software.fast and w.name == "experts down forward")

    forward, back = (t * LINKS[True] / (cluster.nvlink * software.exchange) for t in exchange_seconds(c, s, ep))
    back = 1.5 * forward if software.fast else back  # both ways of the gradients, and the rows once more to the experts
    found = {}
    for kind, one in units.items():
        if kind in "En":
            found[kind] = one
            continue
        work = unit(c, s, kind, c.num_experts // ep)
        parts = [
            [w if w.flops else w._replace(bytes=software.passes * w.bytes) for w in part if kept(w, i == 1)]
            for i, part in enumerate(work)
        ]
        exchange = (forward, back) if kind in "tm" else (0.0, 0.0)
        found[kind] = one._replace(times=times_of(type(work)(*parts), kind, cluster.gpu, exchange))
    return found


def plan_step(
    c: LingConfig, s: Settings, cluster: Cluster, gpus: Gpus, layout: PipelineLayout, schedule: str,
    software: Software = Software(), units: dict[str, Unit] | None = None,
) -> Step:  # fmt: skip
    """A step of s.batch rows on gpus.dp x gpus.pp GPUs, of which each 8 are a node. units: predicted_units for this
    model and ep, where they are there already; their times are not used."""
    units = predicted_units(c, s, cluster.gpu, gpus.ep) if units is None else units
    units = cluster_units(c, s, cluster, gpus.ep, software, units)
    number = s.batch // (gpus.dp * s.micro_batch)
    problem = Problem(c, s, units, gpus, number, transfer_seconds(c, s, near=False), cluster.gpu.memory)
    result = problem.evaluate(layout, schedule)
    summed, seconds = sums(problem, result, cluster.gpu)
    whole = result.timeline.seconds + seconds
    flops = c.flops_per_token(s.seq_len) * s.batch * s.seq_len
    network = summed + passed_on(problem, result)
    nvlink = max(
        sum(t.exchange + t.exchange_back for t in times) for times in by_rank(result, units, c)
    ) * number * cluster.nvlink * software.exchange  # fmt: skip
    share = flops / whole / (gpus.dp * gpus.pp) / cluster.gpu.bf16
    return Step(whole, share, result.timeline.bubble(), nvlink, network, result.peak)


def by_rank(result: Result, units: dict[str, Unit], c: LingConfig) -> list[list]:
    times = [stage.times for stage in stage_work(result.layout, c, units)]
    return [[t for t, r in zip(times, result.ranks, strict=True) if r == rank] for rank in range(len(result.usage))]


def sums(problem: Problem, result: Result, gpu: Gpu) -> tuple[float, float]:
    """Bytes that a GPU of the fullest rank sends for the sums over data-parallel ranks and for the weights' way back,
    and the seconds of both and of the optimizer."""
    gpus, most, longest = problem.gpus, 0.0, 0.0
    for usage in result.usage:
        sent = passes = 0.0
        for number, copies in ((usage.plain, gpus.dp), (usage.experts, gpus.dp // gpus.ep)):
            sent += (4 + 2) * number * (copies - 1) / copies
            passes += (4 + 2 * 4 + 2 * 8 + 2) * number / copies  # gradient, master, moments, bf16 weights
        most = max(most, sent)
        longest = max(longest, sent / NETWORK + passes / (gpu.bandwidth * EFFICIENCY))
    return most, longest


def passed_on(problem: Problem, result: Result) -> float:
    """Bytes that a GPU sends to the ranks before and after it: hidden states, and their gradients."""
    s, hidden = problem.settings, problem.config.hidden_size
    stages = len(result.layout.stages) // problem.gpus.pp if problem.gpus.pp > 1 else 0
    return 2.0 * 2 * problem.micro_batches * s.micro_batch * s.seq_len * hidden * stages


def recipe(c: LingConfig, batch: int) -> Settings:
    """The published run's settings: FP8, full recomputation, rows of 4096 tokens, one a micro batch."""
    s = Settings(model="1t", batch=batch, micro_batch=1, seq_len=4096, precision="fp8", recompute="full")
    return replace(s, mtp=c.num_nextn_predict_layers)

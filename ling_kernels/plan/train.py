"""python -m ling_kernels.plan train: memory, time and disk that a training run takes, predicted without a GPU.

Takes the flags of `python -m ling_kernels.train`, whose --plan is an alias. Of several processes it plans the one that
holds most. docs/training.md explains the tables.
"""

import math
import textwrap
from collections.abc import Sequence

from ..commands import Parser, command
from ..errors import InputError
from ..files import format_bytes
from ..gpu import HOPPER
from ..model import LingConfig
from ..nn.fp8 import FP8_ROWS
from ..ops.quantize import BLOCK, padded_slots
from ..train.flags import add_flags
from ..train.prepare.checks import check
from ..train.prepare.models import model_config
from ..train.prepare.sizes import checkpoint_bytes, checkpoints_at_once, disk_bytes
from ..train.scaling import with_defaults
from ..train.settings import Settings, settings_of
from .decode_time import EFFICIENCY
from .memory import EXCHANGE, KINDS, RESERVE, MemoryPlan, plan_training
from .processes import Held, held_by_processes, processes_of
from .step_time import UNTIMED, step_seconds, timeline_of
from .train_time import BF16_SHARE, LAUNCH

FP8_WEIGHTS = dict(kept="quantised once a step, then kept",
                   each_forward="quantised in each forward, until its backward")  # fmt: skip
FP8_BYTES = 1 + 4 / BLOCK  # of an element: its code, and its share of an fp32 scale for each 128


@command
def main(argv: Sequence[str] | None = None) -> int:
    about = __doc__.partition(": ")[2].split("\n\n")[0]
    parser = Parser("python -m ling_kernels.plan train", usage="%(prog)s [flags]", description=about)
    parser.add_argument(
        "--gpu-hour", type=float, metavar="PRICE", help="price of an hour of one GPU, for a line of costs"
    )
    add_flags(parser)
    options = vars(parser.parse_args(argv))
    return show(options, options.pop("gpu_hour"))


def show(options: dict, gpu_hour: float | None = None) -> int:
    """Print the plan of a new run. options: the flags given, by setting; gpu_hour: the price of an hour of one GPU."""
    if gpu_hour is not None and not 0 < gpu_hour < math.inf:
        raise InputError(f"--gpu-hour {gpu_hour}: a price is more than 0")
    s = settings_of(options)
    if s.lora_rank:
        raise InputError(f"a plan does not know adapters: leave --lora-rank {s.lora_rank} out")
    config, weights = model_config(s)
    s, _ = with_defaults(s, config, trained=weights is not None)
    check(s, config)
    size = processes_of(s)
    held = held_by_processes(config, s) if size > 1 else []
    ranks = fullest_of_stages(held, s.pp) if held else [0]
    plans = [plan_training(config, s, rank) for rank in ranks]
    rank, plan = max(zip(ranks, plans, strict=True), key=lambda pair: pair[1].peak)
    worst = plan_training(config, s, rank, worst_load=True).peak if s.ep > 1 else None
    parameters, where = f"{config.num_parameters(mtp=True):,} parameters", "on one GPU"
    if held:
        print(f"Processes of {s.model}, {parameters}")
        print(*process_lines(held, [plan.peak for plan in plans], idle_shares(config, s), s), "", sep="\n")
        where = f"of process {rank}, the fullest of {size}"
    print(f"Memory of a step: {s.model}, {parameters}, {where}")
    print(batch_line(s))
    print(*table(plan, s, config, worst), sep="\n")
    print(*time_lines(config, s, plans, worst, gpu_hour), sep="\n")
    host = max((h.written for h in held), default=checkpoint_bytes(config, s))
    print(*storage_lines(config, s, host), sep="\n")
    return 0


def idle_shares(config: LingConfig, s: Settings) -> list[float] | None:
    """The share of the step's micro batches in which each rank of a pipeline waits, on an H200; None where there is no
    pipeline, or no time is predicted."""
    if s.pp == 1 or not_timed(s):
        return None
    timeline = timeline_of(config, s, HOPPER["H200"])
    return [timeline.bubble(rank) for rank in range(s.pp)]


def not_timed(s: Settings) -> list[str]:
    """The flags given for which no time is predicted."""
    return [f"--{name.replace('_', '-')}" for name in UNTIMED if getattr(s, name) != 1]


def table(plan: MemoryPlan, s: Settings, config: LingConfig, worst: int | None = None) -> list[str]:
    """The lines of the table. worst: the peak if the experts' load is uneven."""
    later = not plan.peak_bytes["gradients"] and plan.gradients
    comments = dict(
        weights=f"{s.master} masters; norms, routers and their biases fp32",
        gradients=f"none yet at the peak; {format_bytes(plan.gradients)} later" if later else
        "of the masters' precision" + ", each used in the backward" * s.step_in_backward,
        optimizer=s.optimizer,
        loss="with the activations, as the vocabulary is divided" if s.vocab_parallel > 1 else
        "logits of 1024 tokens at a time, gradients of head and last hidden states",
        activations=f"recompute {s.recompute}" + ", of MTP layers full" * s.recompute_mtp,
        exchange="what travels to and from other processes",
    ) | {"FP8 weights": FP8_WEIGHTS[s.fp8_weights] if s.precision == "fp8" else "none: no --precision fp8"}  # fmt: skip
    kinds = [*KINDS, *[EXCHANGE] * (plan.peak_bytes[EXCHANGE] > 0)]
    rows = [f"{kind:<12}{format_bytes(plan.peak_bytes[kind]):>10}  {comments[kind]}" for kind in kinds]
    rows.append(f"{'peak':<12}{format_bytes(plan.peak):>10}  the sum; besides, {format_bytes(RESERVE)} for CUDA and"
                " fragments")  # fmt: skip
    kept, padded = plan.kept_bytes["activations"] + plan.kept_bytes[EXCHANGE], padding(s, config)
    more = f"; {format_bytes(padded)} of it pads column-wise copies" if padded else ""
    what = "activations" + " and exchange" * (plan.kept_bytes[EXCHANGE] > 0)
    rows.append(f"{'saved':<12}{format_bytes(kept):>10}  {what} for the backward, where a forward has ended: not"
                f" at the peak{more}")  # fmt: skip
    if worst is not None:
        rows.append(f"{'worst':<12}{format_bytes(worst):>10}  the peak if every token takes all the experts that it can"
                    " from this process")  # fmt: skip
    fits = ", ".join(
        f"{g.name} ({g.memory / 1e9:.0f} GB) {verdict(plan.peak, worst, g.memory)}" for g in HOPPER.values()
    )
    return [*rows, f"{'fits':<12}  {fits}"]


def batch_line(s: Settings) -> str:
    """The tokens of a step, and its rows."""
    dp = processes_of(s) // (s.cp * s.tp * s.pp)
    share = f", {s.batch // dp} for each of {dp} data parallel processes" if dp > 1 else ""
    passes = f", {s.micro_batch} in a forward pass" if s.micro_batch and s.micro_batch < s.batch // dp else ""
    return f"{'batch':<12}  {s.batch * s.seq_len:,} tokens a step: {s.batch} rows of {s.seq_len:,}{share}{passes}"


def verdict(peak: float, worst: float | None, memory: float) -> str:
    """Whether a plan fits a GPU, also with the load of experts at its most uneven."""
    if peak + RESERVE > memory:
        return "no"
    return "with even experts only" if worst and worst + RESERVE > memory else "yes"


def time_lines(
    config: LingConfig, s: Settings, plans: list[MemoryPlan], worst: int | None, gpu_hour: float | None
) -> list[str]:  # fmt: skip
    """Step time, speed, MFU, days and cost on each GPU that the plans fit; of one process of each stage."""
    if flags := not_timed(s):
        return ["", f"{'time':<12}  none: it is not predicted with {', '.join(flags)}"]
    tokens, gpus = s.batch * s.seq_len, processes_of(s)
    peak = max(plan.peak for plan in plans)
    fitting = [gpu for gpu in HOPPER.values() if verdict(peak, worst, gpu.memory) != "no"]
    if not fitting:
        return [
            "",
            f"{'time':<12}  none: these GPUs do not have the memory (docs/fp8.md lists the options that need less)",
        ]
    rows = [("time", *(gpu.name for gpu in fitting))]
    seconds = [
        step_seconds(config, s, timeline_of(config, s, gpu), [plan.peak_bytes for plan in plans], gpu)
        for gpu in fitting
    ]
    mfu = [config.flops_per_token(s.seq_len) * tokens / t / gpus / gpu.bf16
           for t, gpu in zip(seconds, fitting, strict=True)]  # fmt: skip
    billion = [t / tokens * 1e9 for t in seconds]
    rows += [
        ("step", *(span(t) for t in seconds)),
        ("tokens/s", *(f"{tokens / t:,.0f}" for t in seconds)),
        ("MFU", *(f"{100 * m:.1f} %" for m in mfu)),
        (f"run, {tokens * s.steps / 1e9:.3g} B tokens", *(span(t * s.steps) for t in seconds)),
        ("1 B tokens", *(span(t) for t in billion)),
    ]
    if gpu_hour:
        rows.append(("cost of 1 B tokens", *(f"{t / 3600 * gpus * gpu_hour:,.2f}" for t in billion)))
    lines = ["".join([f"{row[0]:<22}", *(f"{cell:>14}" for cell in row[1:])]) for row in rows]
    fp8 = "; FP8 products at the shares that their machine code allows (docs/kernels-predicted.md)" * (
        s.precision == "fp8"
    )
    about = (
        f"Prediction, nothing of it measured: products in bf16 at {BF16_SHARE:.0%} of the peak (assumed){fp8}; memory"
        f" at {EFFICIENCY:.0%} (assumed); a kernel takes {LAUNCH * 1e6:g} us or more (assumed); experts' load is even."
        " A real step is slower."
    )
    if s.precision == "fp32":
        about += " fp32 is planned as bf16."
    if gpus > 1:
        about += (
            " Messages between GPUs, 450 GB/s within 8 GPUs, 50 GB/s beyond (assumed), are hidden only where"
            " DualPipeV puts a forward and a backward together."
        )
    about += " MFU is of the bf16 peak, as the trainer prints it."
    return ["", *lines, *textwrap.wrap(about, 118)]


def storage_lines(config: LingConfig, s: Settings, host: int) -> list[str]:
    """Disk and host memory of the checkpoints. host: of one process, which holds its part of them."""
    one, (usual, most), one_gpu = checkpoint_bytes(config, s), checkpoints_at_once(s), processes_of(s) == 1
    all_of_them = f"{format_bytes(disk_bytes(config, s, usual))} for {usual} at once and the exported model"
    if most > usual:
        all_of_them += f"; for {most}, as after a stop, {format_bytes(disk_bytes(config, s, most))}"
    part = "" if one_gpu else " for the part of a process"
    whose = "a checkpoint" if one_gpu else "a checkpoint of all GPUs together"
    return ["", f"{'disk':<12}{format_bytes(one):>10}  {whose}; {all_of_them}",
            f"{'host':<12}{format_bytes(host):>10}  at most{part}, while a checkpoint is written"]  # fmt: skip


def span(seconds: float) -> str:
    """A time in the unit that suits it."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:,.4g} {unit}" if seconds / size < 1000 else f"{seconds / size:,.0f} {unit}"
    return f"{1000 * seconds:.3g} ms"


def padding(s: Settings, config: LingConfig) -> float:
    """Bytes of padding in the experts' column-wise FP8 copies of a micro batch; 0 for a pipeline, as stages differ."""
    if s.precision != "fp8" or s.pp > 1:
        return 0
    micro = s.micro_batch or s.batch // (processes_of(s) // (s.cp * s.tp))
    rows = config.num_experts_per_tok * s.seq_len * micro // (s.cp * s.tp)
    wgrad = "bf16" if s.fp8_wgrad == "auto" and rows // (config.num_experts // s.ep) < FP8_ROWS else s.fp8_wgrad
    mtp = 0 if s.recompute_mtp else config.num_nextn_predict_layers
    layers = config.num_hidden_layers - config.first_k_dense_replace + mtp
    return layers * padding_bytes(config, rows, s.recompute, wgrad, s.ep)


def padding_bytes(config: LingConfig, rows: int, recompute: str = "none", wgrad: str = "fp8", ep: int = 1) -> float:
    """Bytes of padding in the column-wise FP8 copies of a layer's experts, whose rows begin at multiples of 128.

    rows: of one micro batch, for the experts on this GPU; a group of `ep` GPUs shares the layer's experts.
    """
    if recompute != "none" or wgrad != "fp8":
        return 0
    padded = padded_slots(rows, config.num_experts // ep)
    return FP8_BYTES * (padded - rows) * (config.hidden_size + config.moe_intermediate_size)


def fullest_of_stages(held: list[Held], stages: int) -> list[int]:
    """Of each stage, the process that holds most of the optimizer's state."""
    number = len(held) // stages
    return [
        max(range(first, first + number), key=lambda rank: held[rank].optimizer)
        for first in range(0, len(held), number)
    ]


def process_lines(held: list[Held], peaks: list[int], idle: list[float] | None, s: Settings) -> list[str]:
    """The mesh, and a line for the processes of each stage. held: of every process; peaks: of the fullest of each
    stage; idle: shares of the stages' time."""
    number = len(held) // s.pp
    lines = [
        f"{'processes':<12}  {len(held)}: dp {number // (s.cp * s.tp)} x cp {s.cp} x tp {s.tp} x pp {s.pp}; of a"
        f" stage's {number}, {s.ep} divide the experts, {s.vocab_parallel} the vocabulary"
        + f", {number // s.dp_replicate} the optimizer's state"
        * (s.dp_replicate > 1),
        f"{'rank':<12}{'parameters':>18}{'weights':>12}{'gradients':>12}{'optimizer':>24}{'peak':>12}"
        + f"{'idle':>8}" * (idle is not None)
        + "  stages" * (s.pp > 1),
    ]
    for stage in range(s.pp):
        of_stage = held[stage * number : (stage + 1) * number]
        first, states = of_stage[0], sorted(h.optimizer for h in of_stage)
        optimizer = " to ".join(dict.fromkeys(format_bytes(n) for n in (states[0], states[-1])))
        name = f"{stage * number}" + f" to {(stage + 1) * number - 1}" * (number > 1)
        sizes = f"{format_bytes(first.weights):>12}{format_bytes(first.gradients):>12}{optimizer:>24}"
        waits = "" if idle is None else f"{100 * idle[stage]:>6.1f} %"
        peak = f"{format_bytes(peaks[stage]):>12}"
        lines.append(f"{name:<12}{first.parameters:>18,}{sizes}{peak}{waits}  {first.stages}".rstrip())
    return lines

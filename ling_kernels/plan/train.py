"""python -m ling_kernels.plan train: memory, time and disk that a training run takes, predicted without a GPU.

Takes the flags of `python -m ling_kernels.train`, whose --plan is an alias. With --dp, --ep and --pp, or --layout, it
plans one GPU of many, the one that holds most. docs/training.md explains the tables.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from torch._subclasses import FakeTensorMode

from ..commands import Parser, command
from ..errors import InputError
from ..files import format_bytes
from ..gpu import HOPPER
from ..model import LingConfig
from ..nn.fp8 import FP8_ROWS
from ..ops.quantize import BLOCK, padded_slots
from ..parallel.layout import Layout
from ..parallel.ranks import Ranks
from ..train.flags import add_flags, add_layout_flag
from ..train.optimizer import to_masters
from ..train.prepare.checks import check
from ..train.prepare.checks_parallel import check_parallel
from ..train.prepare.models import model_config
from ..train.prepare.sizes import checkpoint_bytes, checkpoints_at_once, disk_bytes
from ..train.scaling import with_defaults
from ..train.settings import Settings, settings_of
from ..train.trainer import apply_fp8_and_recompute
from .decode_time import EFFICIENCY
from .memory import KINDS, LAYOUT_KINDS, RESERVE, MemoryPlan, plan_memory
from .processes import held_by_processes, process_lines, processes_of
from .ranks import SINGLE_GPU, Rank
from .train_time import BF16_SHARE, LAUNCH, step_seconds

FP8_WEIGHTS = dict(kept="quantised once a step, then kept",
                   each_forward="quantised in each forward, until its backward")  # fmt: skip
FP8_BYTES = 1 + 4 / BLOCK  # of an element: its code, and its share of an fp32 scale for each 128


@command
def main(argv: Sequence[str] | None = None) -> int:
    about = __doc__.partition(": ")[2].split("\n\n")[0]
    parser = Parser("python -m ling_kernels.plan train", usage="%(prog)s [flags]", description=about)
    add_layout_flag(parser)
    parser.add_argument(
        "--gpu-hour", type=float, metavar="PRICE", help="price of an hour of one GPU, for a line of costs"
    )
    add_flags(parser)
    options = vars(parser.parse_args(argv))
    return show(options, options.pop("layout"), options.pop("gpu_hour"))


def show(options: dict, layout: str | None, gpu_hour: float | None = None) -> int:
    """Print the plan of a new run. options: the flags given, by setting; layout: the value of --layout; gpu_hour: the
    price of an hour of one GPU."""
    if gpu_hour is not None and not 0 < gpu_hour < math.inf:
        raise InputError(f"--gpu-hour {gpu_hour}: a price is more than 0")
    settings = settings_of(options)
    given, layout = layout, layout_of(settings) if layout is None else Layout.parse(layout)
    if settings.lora_rank:
        raise InputError(f"a plan does not know adapters: leave --lora-rank {settings.lora_rank} out")
    config, weights = model_config(settings)
    settings, _ = with_defaults(settings, config, trained=weights is not None)
    check(settings, config)
    check_division(given, settings, config)
    host = checkpoint_bytes(config, settings) // (layout.dp * layout.pp)
    if given is None and processes_of(settings) > 1:
        held = held_by_processes(config, settings)
        host = max(h.written for h in held)
        print(f"Processes of {settings.model}, {config.num_parameters(mtp=True):,} parameters")
        print(*process_lines(held, settings), "", sep="\n")
        if (
            settings.cp * settings.tp * settings.vocab_parallel * settings.dp_replicate > 1
            or settings.pipeline
            or config.num_hidden_layers % layout.pp
        ):
            print("Time, and memory of activations, are predicted for layers in equal numbers, whole rows, a whole"
                  " vocabulary and one copy\nof the state alone; python -m ling_kernels.plan pipeline predicts them for"
                  " any stages.")  # fmt: skip
            print(*storage_lines(config, settings, False, host), sep="\n")
            return 0
    settings, one_gpu = rank_settings(layout, settings, config), layout == Layout()
    where = "on one GPU" if one_gpu else f"on the fullest of {layout.dp * layout.pp} GPUs: {layout}"
    print(f"Memory of a step: {settings.model}, {config.num_parameters(mtp=True):,} parameters, {where}")
    print(batch_line(settings, layout))
    plans = {stage: plan_training(config, settings, Rank(layout, stage)) for stage in layout.distinct_stages(config)}
    stage = max(plans, key=lambda stage: plans[stage].peak)
    part, rank = layout.part(config, stage), Rank(layout, stage)
    worst = plan_training(config, settings, replace(rank, worst_load=True)).peak if layout.ep > 1 else None
    print(*table(plans[stage], settings, part, rank, worst), sep="\n")
    if not one_gpu:
        print(*layout_lines(settings, layout, stage, plans), sep="\n")
    print(*time_lines(config, settings, layout, plans, worst, gpu_hour), sep="\n")
    print(*storage_lines(config, settings, one_gpu, host), sep="\n")
    return 0


def check_division(layout: str | None, s: Settings, config: LingConfig) -> None:
    """Raise InputError for flags of several processes that --layout would leave out, or that one process cannot have;
    those of several are checked where they are divided."""
    if layout is None:
        if processes_of(s) == 1:
            check_parallel(s, config, Ranks())
        return
    names = ("dp", "dp_replicate", "cp", "tp", "ep", "vocab_parallel", "pp", "pipeline", "schedule")
    given = [f"--{name.replace('_', '-')} {value}" for name in names if (value := getattr(s, name)) not in (None, 1)]
    if given:
        raise InputError(f"--layout {layout} takes the place of {', '.join(given)}: give one of the two")


def layout_of(s: Settings) -> Layout:
    """The layout of the trainer's own flags; --dp that is not given is taken to be --ep."""
    ranks = Layout(s.dp or s.ep, s.ep, s.pp)
    return ranks if ranks == Layout() else replace(ranks, zero=1)


def rank_settings(layout: Layout, s: Settings, config: LingConfig) -> Settings:
    """The settings with the rows that one GPU takes. Raises InputError where model or batch cannot be divided so."""
    micro = s.micro_batch or 1
    if s.batch % (micro * layout.dp):
        per = f" x --micro-batch {micro}" if s.micro_batch else ""
        raise InputError(f"--layout {layout}: --batch {s.batch} is not a multiple of dp {layout.dp}{per}")
    layout.check(config, s.model)
    if s.step_in_backward and layout != Layout():
        raise InputError(
            f"--layout {layout}: --step-in-backward is for one GPU, several each have a part of a gradient"
        )
    if layout.zero and s.optimizer == "muon":
        raise InputError(f"--layout {layout}: --optimizer muon needs whole matrices, zero=0")
    if layout.zero == 3 and s.precision == "fp8" and s.fp8_weights == "kept":
        raise InputError(
            f"--layout {layout}: --fp8-weights kept keeps all of them on every GPU; zero=3 needs each_forward"
        )
    return replace(s, batch=s.batch // layout.dp)


def plan_training(config: LingConfig, settings: Settings, rank: Rank = SINGLE_GPU) -> MemoryPlan:
    """Plan a run of the model on one GPU of a layout. settings.batch is the rows that this GPU takes."""
    with FakeTensorMode():
        model = rank.model(config)
        to_masters(model, settings.master)
        apply_fp8_and_recompute(model, settings)
        return plan_memory(model.train(), settings, rank)


def table(plan: MemoryPlan, s: Settings, config: LingConfig, rank: Rank, worst: int | None = None) -> list[str]:
    """The lines of the table; s and config are the rank's. worst: the peak if the experts' load is uneven."""
    later = not plan.peak_bytes["gradients"] and plan.gradients
    comments = dict(
        weights=f"{s.master} masters; norms, routers and their biases fp32",
        gradients=f"none yet at the peak; {format_bytes(plan.gradients)} later" if later else
        "of the masters' precision" + ", each used in the backward" * s.step_in_backward,
        optimizer=s.optimizer,
        loss="logits of 1024 tokens at a time, gradients of head and last hidden states",
        activations=f"recompute {s.recompute}" + ", of MTP layers full" * s.recompute_mtp,
        gathered="weights of the layer that computes and of the next; embedding, head and norm all the time",
        reduced="a layer's gradients on their way to the GPUs that keep them",
        exchange="rows to and from the experts of a layer",
    ) | {"FP8 weights": FP8_WEIGHTS[s.fp8_weights] if s.precision == "fp8" else "none: no --precision fp8"}  # fmt: skip
    kinds = [*KINDS, *(kind for kind in LAYOUT_KINDS if plan.peak_bytes[kind])]
    rows = [f"{kind:<12}{format_bytes(plan.peak_bytes[kind]):>10}  {comments[kind]}" for kind in kinds]
    rows.append(f"{'peak':<12}{format_bytes(plan.peak):>10}  the sum; besides, {format_bytes(RESERVE)} for CUDA and"
                " fragments")  # fmt: skip
    kept, padded = plan.kept_bytes["activations"], padding(s, config, rank)
    more = f"; {format_bytes(padded)} of it pads column-wise copies" if padded else ""
    rows.append(f"{'saved':<12}{format_bytes(kept):>10}  activations for the backward, where a forward has ended: not"
                f" at the peak{more}")  # fmt: skip
    if worst is not None:
        rows.append(f"{'worst':<12}{format_bytes(worst):>10}  the peak if every token takes all the experts that it can"
                    " from this GPU")  # fmt: skip
    fits = ", ".join(
        f"{g.name} ({g.memory / 1e9:.0f} GB) {verdict(plan.peak, worst, g.memory)}" for g in HOPPER.values()
    )
    return [*rows, f"{'fits':<12}  {fits}"]


def batch_line(s: Settings, layout: Layout) -> str:
    """The tokens of a step, and its rows; s.batch is the rows of one GPU."""
    rows, micro = s.batch * layout.dp, s.micro_batch or s.batch
    share = f", {s.batch} for each of {layout.dp} data parallel GPUs" if layout.dp > 1 else ""
    passes = f", {micro} in a forward pass" if micro < s.batch else ""
    return f"{'batch':<12}  {rows * s.seq_len:,} tokens a step: {rows} rows of {s.seq_len:,}{share}{passes}"


def verdict(peak: float, worst: float | None, memory: float) -> str:
    """Whether a plan fits a GPU, also with the load of experts at its most uneven."""
    if peak + RESERVE > memory:
        return "no"
    return "with even experts only" if worst and worst + RESERVE > memory else "yes"


def time_lines(
    config: LingConfig, s: Settings, layout: Layout, plans: dict[int, MemoryPlan], worst: int | None,
    gpu_hour: float | None,
) -> list[str]:  # fmt: skip
    """Step time, speed, MFU, days and cost on each GPU that the plan fits; s.batch is the rows of one GPU."""
    tokens, gpus = s.batch * layout.dp * s.seq_len, layout.dp * layout.pp
    peak = max(plan.peak for plan in plans.values())
    fitting = [gpu for gpu in HOPPER.values() if verdict(peak, worst, gpu.memory) != "no"]
    if not fitting:
        return [
            "",
            f"{'time':<12}  none: these GPUs do not have the memory (docs/fp8.md lists the options that need less)",
        ]
    rows = [("time", *(gpu.name for gpu in fitting))]
    seconds = [
        max(step_seconds(layout.part(config, i), s, Rank(layout, i), plan.peak_bytes, gpu) for i, plan in plans.items())
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
        about += " Messages between GPUs are not hidden: 450 GB/s within 8 GPUs, 50 GB/s beyond (assumed)."
    about += " MFU is of the bf16 peak, as the trainer prints it."
    return ["", *lines, *textwrap.wrap(about, 118)]


def storage_lines(config: LingConfig, s: Settings, one_gpu: bool, host: int) -> list[str]:
    """Disk and host memory of the checkpoints. host: of one process, which holds its part of them."""
    one, (usual, most) = checkpoint_bytes(config, s), checkpoints_at_once(s)
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


def layout_lines(s: Settings, layout: Layout, stage: int, plans: dict[int, MemoryPlan]) -> list[str]:
    """The peaks of the other stages."""
    lines, number = [], s.batch // (s.micro_batch or s.batch)
    if layout.pp > 1:
        stages = ", ".join(
            f"{i + 1} {format_bytes(plan.peak)} ({layout.in_flight(i, number)} in flight)" for i, plan in plans.items()
        )
        lines.append(f"{'stages':<12}  {stages}; this is stage {stage + 1}; equal ones have fewer in flight")
    return lines


def padding(s: Settings, config: LingConfig, rank: Rank) -> float:
    """Bytes of padding in the experts' column-wise FP8 copies of all micro batches in flight."""
    if s.precision != "fp8":
        return 0
    micro, ep = s.micro_batch or s.batch, rank.layout.ep
    rows = config.num_experts_per_tok * s.seq_len * micro
    wgrad = "bf16" if s.fp8_wgrad == "auto" and rows // (config.num_experts // ep) < FP8_ROWS else s.fp8_wgrad
    mtp = 0 if s.recompute_mtp else config.num_nextn_predict_layers
    layers = config.num_hidden_layers - config.first_k_dense_replace + mtp
    return rank.in_flight(s.batch // micro) * layers * padding_bytes(config, rows, s.recompute, wgrad, ep)


def padding_bytes(config: LingConfig, rows: int, recompute: str = "none", wgrad: str = "fp8", ep: int = 1) -> float:
    """Bytes of padding in the column-wise FP8 copies of a layer's experts, whose rows begin at multiples of 128.

    rows: of one micro batch, for the experts on this GPU; a group of `ep` GPUs shares the layer's experts.
    """
    if recompute != "none" or wgrad != "fp8":
        return 0
    padded = padded_slots(rows, config.num_experts // ep)
    return FP8_BYTES * (padded - rows) * (config.hidden_size + config.moe_intermediate_size)

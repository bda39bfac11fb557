"""python -m ling_kernels.plan train: the GPU memory that a training run takes, predicted without a GPU.

Takes the flags of `python -m ling_kernels.train`, whose --plan is an alias. With --layout it plans one GPU of many, the
one that holds most; the trainer itself uses one GPU. docs/fp8.md explains the table.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch._subclasses import FakeTensorMode

from ..errors import InputError, Parser, command
from ..gpu import HOPPER
from ..model import LingConfig
from ..nn.fp8 import FP8_ROWS
from ..ops.quantize import BLOCK, padded_slots
from ..parallel.layout import Layout
from ..train.checks import check
from ..train.cli import add_layout_flag
from ..train.models import model_config
from ..train.optimizer import to_masters
from ..train.scaling import with_defaults
from ..train.settings import Settings, add_flags, settings_of
from ..train.trainer import apply_fp8_and_recompute
from .memory import KINDS, LAYOUT_KINDS, RESERVE, MemoryPlan, plan_memory
from .ranks import SINGLE_GPU, Rank

FP8_BYTES = 1 + 4 / BLOCK  # of an element: its code, and its share of an fp32 scale for each 128


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m ling_kernels.plan train", description=__doc__.partition(": ")[2].split("\n\n")[0])
    add_layout_flag(parser)
    add_flags(parser)
    options = vars(parser.parse_args(argv))
    return show(options, options.pop("layout"))


def show(options: dict, layout: str | None) -> int:
    """Print the plan of a new run. options: the flags given, by setting; layout: the value of --layout."""
    layout = Layout() if layout is None else Layout.parse(layout)
    settings = settings_of(options)
    config, weights = model_config(settings)
    settings, _ = with_defaults(settings, config, trained=weights is not None)
    check(settings, config)
    settings, one_gpu = rank_settings(layout, settings, config), layout == Layout()
    where = "on one GPU" if one_gpu else f"on the fullest of {layout.dp * layout.pp} GPUs: {layout}"
    print(f"Memory of a step: {settings.model}, {config.num_parameters(mtp=True):,} parameters, {where}")
    plans = {stage: plan_training(config, settings, Rank(layout, stage)) for stage in layout.distinct_stages(config)}
    stage = max(plans, key=lambda stage: plans[stage].peak)
    print(*table(plans[stage], settings, layout.part(config, stage), Rank(layout, stage)), sep="\n")
    if not one_gpu:
        print(*layout_lines(config, settings, layout, stage, plans), sep="\n")
    return 0


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


def table(plan: MemoryPlan, s: Settings, config: LingConfig, rank: Rank) -> list[str]:
    """The lines of the table; s and config are the rank's."""
    comments = dict(
        weights=f"{s.master} masters; norms, routers and their biases fp32",
        gradients="of the masters' precision" + ", each used in the backward" * s.step_in_backward,
        optimizer=s.optimizer,
        loss="logits of 1024 tokens at a time, gradients of head and last hidden states",
        activations=f"recompute {s.recompute}; {format_bytes(plan.kept_bytes['activations'])} kept for the backward,"
        f" {format_bytes(padding(s, config, rank))} of it the padding of column-wise copies",
        gathered="weights of the layer that computes and of the next; embedding, head and norm all the time",
        reduced="a layer's gradients on their way to the GPUs that keep them",
        exchange="rows to and from the experts of a layer",
    ) | {"FP8 weights": s.fp8_weights}  # fmt: skip
    kinds = [*KINDS, *(kind for kind in LAYOUT_KINDS if plan.peak_bytes[kind])]
    rows = [f"{kind:<12}{format_bytes(plan.peak_bytes[kind]):>10}  {comments[kind]}" for kind in kinds]
    need = plan.peak + RESERVE
    fits = ", ".join(
        f"{g.name} ({g.memory / 1e9:.0f} GB) {'yes' if need <= g.memory else 'no'}" for g in HOPPER.values()
    )
    rows.append(f"{'peak':<12}{format_bytes(plan.peak):>10}  besides, {format_bytes(RESERVE)} for CUDA and fragments")
    return [*rows, f"{'fits':<12}  {fits}"]


def layout_lines(
    config: LingConfig, s: Settings, layout: Layout, stage: int, plans: dict[int, MemoryPlan]
) -> list[str]:
    """The peaks of the other stages, the peak with an uneven load of experts, and that the trainer uses one GPU."""
    lines, number = [], s.batch // (s.micro_batch or s.batch)
    if layout.pp > 1:
        stages = ", ".join(
            f"{i + 1} {format_bytes(plan.peak)} ({layout.in_flight(i, number)} in flight)" for i, plan in plans.items()
        )
        lines.append(f"{'stages':<12}  {stages}; this is stage {stage + 1}; equal ones have fewer in flight")
    if layout.ep > 1:
        worst = format_bytes(plan_training(config, s, Rank(layout, stage, worst_load=True)).peak)
        lines.append(f"{'experts':<12}  with an even load; {worst} if every token takes all it can from this GPU")
    return [*lines, f"{'planned':<12}  this package trains on one GPU"]


def padding(s: Settings, config: LingConfig, rank: Rank) -> float:
    """Bytes of padding in the experts' column-wise FP8 copies of all micro batches in flight."""
    if s.precision != "fp8":
        return 0
    micro, ep = s.micro_batch or s.batch, rank.layout.ep
    rows = config.num_experts_per_tok * s.seq_len * micro
    wgrad = "bf16" if s.fp8_wgrad == "auto" and rows // (config.num_experts // ep) < FP8_ROWS else s.fp8_wgrad
    layers = config.num_hidden_layers - config.first_k_dense_replace + config.num_nextn_predict_layers
    return rank.in_flight(s.batch // micro) * layers * padding_bytes(config, rows, s.recompute, wgrad, ep)


def padding_bytes(config: LingConfig, rows: int, recompute: str = "none", wgrad: str = "fp8", ep: int = 1) -> float:
    """Bytes of padding in the column-wise FP8 copies of a layer's experts, whose rows begin at multiples of 128.

    rows: of one micro batch, for the experts on this GPU; a group of `ep` GPUs shares the layer's experts.
    """
    if recompute != "none" or wgrad != "fp8":
        return 0
    padded = padded_slots(rows, config.num_experts // ep)
    return FP8_BYTES * (padded - rows) * (config.hidden_size + config.moe_intermediate_size)


def format_bytes(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"

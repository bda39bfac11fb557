"""Checks of what several processes divide: rows, tokens, experts, vocabulary, layers."""

from ...errors import InputError, counted
from ...model import LingConfig
from ...ops.adamw_8bit import BLOCK
from ...ops.quantize import BLOCK as FP8_BLOCK
from ...parallel.exchange import OVER_BUFFERS
from ...parallel.pipeline_layout import PipelineLayout
from ...parallel.ranks import Ranks
from ...parallel.schedules import Order, check, is_split, placement, read_csv, schedule_order
from ..settings import Settings


def mesh_of(s: Settings) -> dict:
    """How `Ranks.arranged` arranges the processes."""
    return dict(dp=s.dp, ep=s.ep, pp=s.pp, cp=s.cp, vocab=s.vocab_parallel, tp=s.tp, copies=s.dp_replicate)


def check_parallel(s: Settings, config: LingConfig, ranks: Ranks) -> None:
    """Raise InputError where the processes cannot divide the work of a step and the model equally."""
    ep, cp = ranks.experts.number, ranks.cp
    if config.num_experts % ep:
        raise InputError(f"--ep {ep} does not divide the {config.num_experts} experts of {s.model}")
    if config.vocab_size % ranks.vocabulary.number:
        raise InputError(f"--vocab-parallel {ranks.vocabulary.number} does not divide the vocabulary of"
                         f" {config.vocab_size} tokens")  # fmt: skip
    if s.seq_len % ranks.tokens_multiple:
        flags = " and ".join(f"{flag} {n}" for flag, n in (("--cp", cp), ("--tp", ranks.tensor.number)) if n > 1)
        raise InputError(f"--seq-len {s.seq_len} is not a multiple of {ranks.tokens_multiple}, for {flags} to divide a"
                         " row's tokens equally")  # fmt: skip
    if ranks.tensor.number > 1:
        check_tensor(s, config, ranks.tensor.number)
    for option, given in (("--pipeline", s.pipeline), ("--schedule", s.schedule)):
        if given is not None and ranks.pp == 1:
            raise InputError(f"{option} {given} needs --pp, the number of processes that share the stages")
    if s.exchange != "bf16" and ep == 1:
        raise InputError(f"--exchange {s.exchange} needs --ep, the number of processes that share the experts")
    if s.exchange == "fp8":
        check_fp8_exchange(s, config)
    if s.exchange in OVER_BUFFERS and s.exchange_by_nodes:
        raise InputError(f"--exchange {s.exchange} has its own way between machines: leave out --exchange-by-nodes")
    if ranks.size == 1:
        return
    if s.fp8_weights == "only":
        raise InputError("--fp8-weights only is for one process: several divide the weights before they are FP8")
    if s.step_in_backward:
        raise InputError("--step-in-backward is for one process: several add up their gradients first")
    rows = ranks.dp * (s.micro_batch or 1)
    each = f"--dp {ranks.dp}" + (f" times --micro-batch {s.micro_batch}" if s.micro_batch else "")
    if s.batch % rows:
        raise InputError(f"--batch {s.batch} is not a multiple of {each}: every process takes equally many rows")
    if s.ramp and s.ramp[0] % rows:
        raise InputError(f"--batch-ramp {s.batch_ramp}: START is not a multiple of {each}")
    if ranks.pp > 1:
        check_pipeline(s, config, ranks)
    expert = config.hidden_size * config.moe_intermediate_size * config.num_experts // ep
    if ep > 1 and s.optimizer != "adamw" and expert % BLOCK:
        raise InputError(f"--optimizer {s.optimizer}: the experts of one of --ep {ep} processes are no multiple"
                         f" of {BLOCK} weights, which share a scale")  # fmt: skip


def check_tensor(s: Settings, config: LingConfig, tp: int) -> None:
    sizes = dict(num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads)
    if config.first_k_dense_replace:
        sizes["intermediate_size"] = config.intermediate_size
    if config.num_shared_experts:
        sizes["moe_intermediate_size x num_shared_experts"] = config.moe_intermediate_size * config.num_shared_experts
    for name, size in sizes.items():
        if size % tp:
            raise InputError(f"--tp {tp} does not divide {name} {size} of {s.model}")


def check_fp8_exchange(s: Settings, config: LingConfig) -> None:
    if s.precision != "fp8" or s.fp8_scales != "pow2":
        raise InputError("--exchange fp8 needs --precision fp8 --fp8-scales pow2, so that experts quantise alike")
    for name in ("hidden_size", "moe_intermediate_size"):
        if getattr(config, name) % FP8_BLOCK:
            raise InputError(f"--exchange fp8 needs experts in FP8, and {name} {getattr(config, name)} of {s.model} is"
                             f" not a multiple of {FP8_BLOCK}")  # fmt: skip


def check_pipeline(s: Settings, config: LingConfig, ranks: Ranks) -> None:
    """Raise InputError for a layout that is not the model's, and for rows that cannot fill the pipeline."""
    layout, pp = stages_of(s, config), ranks.pp
    layout.check(config, s.model)
    stages, schedule = len(layout.stages), schedule_of(s, layout)
    numbers = [batch // ranks.dp // (s.micro_batch or batch // ranks.dp) for batch in (s.batch, *(s.ramp or ())[:1])]
    if isinstance(schedule, str):
        if stages % pp:
            raise InputError(f"--pipeline {layout}: {stages} stages on {pp} ranks; each rank takes equally many")
        order = schedule_order(schedule, pp, stages, 2 * pp)  # checks the name, and whether it takes these stages
        place = placement(schedule, pp, stages)
    else:
        order, place = schedule, check(schedule, pp, stages, numbers[0], str(s.schedule))
        if s.ramp:
            raise InputError(f"--batch-ramp {s.batch_ramp}: the order of {s.schedule} is for one number of micro"
                             " batches")  # fmt: skip
    if s.lora_rank and is_split(order):
        raise InputError(f"--schedule {s.schedule} with --lora-rank: it computes gradients of weights later, and these"
                         " are frozen; give 1F1B, Interleaved1F1B or GPipe")  # fmt: skip
    for rank in range(pp):
        if not any(set(stage) & {"t", "m"} for stage, r in zip(layout.stages, place, strict=True) if r == rank):
            raise InputError(f"--pipeline {layout}: process {rank} of --pp {pp} has no layer")
    for rows, number in zip((f"--batch {s.batch}", f"--batch-ramp {s.batch_ramp}"), numbers, strict=False):
        if isinstance(schedule, str) and number % pp:
            raise InputError(f"{rows} gives each pipeline {counted(number, 'micro batch')}, and --pp {pp} needs a"
                             f" multiple of {pp}: give a smaller --micro-batch")  # fmt: skip
        if isinstance(schedule, str):
            check(schedule_order(schedule, pp, stages, number), pp, stages, number, schedule)


def stages_of(s: Settings, config: LingConfig) -> PipelineLayout:
    """The layout of --pipeline, or the default of --pp."""
    return PipelineLayout.parse(s.pipeline) if s.pipeline else PipelineLayout.even(config, s.pp)


def schedule_of(s: Settings, layout: PipelineLayout) -> str | Order:
    """The name of --schedule or the order in its file, or the default."""
    if s.schedule is not None:
        return read_csv(s.schedule) if s.schedule.endswith(".csv") else s.schedule
    return "1F1B" if len(layout.stages) == s.pp else "Interleaved1F1B"

"""The model of a run: its weights, the part of it that this process trains, FP8 layers, recomputation."""

import re
from collections.abc import Callable
from functools import partial

import torch

from ..model import Ling, LingConfig, load_model
from ..nn import Exchange, MoE
from ..nn.fp8 import to_fp8
from ..parallel.deep_ep import deep_ep
from ..parallel.official import whole_on_meta
from ..parallel.parts import draw_weights_, give_memory_, read_weights_
from ..parallel.pipeline import Pipeline
from ..parallel.ranks import Ranks
from ..parallel.shares import Shares
from ..parallel.symmetric import symmetric
from .optimizer import OF_WHOLE, to_masters
from .prepare import Run
from .prepare.checks_parallel import schedule_of, stages_of
from .settings import Settings


def make_model(run: Run) -> tuple[Ling, Shares]:
    """The model with its master weights, in training mode, and what this process trains of it: from the checkpoint, the
    model's folder, or random."""
    s, ranks, folder = run.settings, run.ranks, run.checkpoint or run.weights
    if s.lora_rank:  # a checkpoint has the adapters alone
        folder = run.weights
    if ranks.size > 1:
        model = whole_on_meta(run.config)
        to_masters(model, s.master)
        shares = divide(model, s, ranks, run.precision, run.device, exchange_of(s, run.config, ranks, run.device))
        give_memory_(model, run.device)
        if folder:
            read_weights_(shares, folder)
        else:
            draw_weights_(shares, s.seed)
    else:
        only_fp8 = s.fp8_weights == "only"  # then what is not FP8 is bf16
        if folder:
            dtype = torch.bfloat16 if only_fp8 else torch.float32
            model = load_model(folder, dtype=dtype, device=run.device, fp8=only_fp8)
            model.config = run.config  # its end token may be the tokenizer's, its rotary base the settings'
            model.reset_buffers()
        else:
            model = Ling(run.config)
            model.init_weights(torch.Generator().manual_seed(s.seed))  # on the CPU: the same on every device
            to_masters(model, s.master)  # in bf16 the model takes half of the GPU's memory
            model.to(run.device)
        if not only_fp8:
            to_masters(model, s.master)
        shares = Shares(model, ranks)
    torch.manual_seed(s.seed)
    return model.train(), shares


def divide(
    model: Ling, s: Settings, ranks: Ranks, precision: torch.dtype, device: torch.device,
    exchange: str | Callable[[MoE], Exchange],
) -> Shares:  # fmt: skip
    """What this process trains of a whole model, in place. exchange: of `Shares`."""
    pipeline = partial(make_pipeline, model, s, ranks, precision, device) if ranks.pp > 1 else None
    return Shares(model, ranks, pipeline, exchange, whole=s.optimizer in OF_WHOLE)


def exchange_of(s: Settings, config: LingConfig, ranks: Ranks, device: torch.device) -> str | Callable:
    """The exchange of `Shares` that --exchange names. Buffers have room for the tokens of a micro batch on a rank."""
    tokens, topk = rows_of_pass(s, ranks) * s.seq_len // ranks.sharing, config.num_experts_per_tok
    if s.exchange == "deepep":
        return deep_ep(ranks.experts.group, config.hidden_size, topk, tokens)
    if s.exchange == "symmetric":
        return symmetric(ranks.experts.group, config.num_experts, topk, tokens, device)
    return s.exchange


def rows_of_pass(s: Settings, ranks: Ranks) -> int:
    """Rows of a forward pass of one of the dp ranks."""
    return s.micro_batch or s.batch // ranks.dp


def make_pipeline(model: Ling, s: Settings, ranks: Ranks, precision: torch.dtype, device: torch.device) -> Pipeline:
    """This process's stages of the model, in place."""
    layout = stages_of(s, model.config)
    micro = rows_of_pass(s, ranks)
    return Pipeline(
        model, layout, schedule_of(s, layout), s.batch // ranks.dp // micro, (micro, s.seq_len), ranks.stages,
        precision, device,
    )  # fmt: skip


def apply_fp8_and_recompute(model: Ling, s: Settings) -> list[str]:
    """Replace layers by FP8 ones and switch recomputation on, as the settings say; returns lines that describe it."""
    notes = []
    if s.fp8_weights == "only":
        notes.append("fp8        the weights of all layers whose sizes are multiples of 128, in memory too")
    elif s.precision == "fp8":
        replaced, left = to_fp8(
            model, s.recompute, wgrad=s.fp8_wgrad, transposed=s.fp8_transposed, weights=s.fp8_weights,
            pow2=s.fp8_scales == "pow2",
        )  # fmt: skip
        kinds = dict.fromkeys(re.sub(r"\b\d+\.", "*.", name) for name in left)
        rest = f"; in bf16, because sizes are not multiples of 128: {'; '.join(kinds)}" if left else ""
        notes.append(f"fp8        {len(replaced)} of {len(replaced) + len(left)} layers{rest}")
    elif s.fp8_watch:
        notes.append("fp8        none of the layers: --fp8-watch has nothing to measure")
    if s.recompute == "full":
        model.recompute_()
    elif s.recompute_mtp:
        model.recompute_(mtp_only=True)
    return notes

"""Ling's scaling laws, and the defaults of learning rate, warm-up and batch that follow from a model's size.

The laws are of "Towards Greater Leverage: Scaling Laws for Efficient Mixture-of-Experts Language Models", arXiv
2507.17702, section 3.1, fitted between 3e17 and 3e20 FLOPs. C is the compute of a run: FLOPs per token (forward and
backward, without MTP) times tokens. With the 20e12 tokens of Ling-2.0 they give the peak learning rates and batches of
its models (arXiv 2510.22115, table 1) within 2 % and 9 %.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from numbers import Real

from ..errors import InputError, counted
from ..model import LingConfig
from .settings import BY_SIZE, Settings

SMALLEST_FIT = 3e17  # FLOPs of the smallest runs behind the laws
LING_TOKENS = 20e12  # of Ling-2.0's pre-training
CONTINUED = 0.1  # of the peak, for trained weights: 3e-5 for mini in Ling-V2's scripts of continued pre-training
ADAPTERS = 10  # times the rate of all weights, as adapters want it (Schulman et al., "LoRA Without Regret", 2025)
WARMUP = 2000  # steps of Ling-2.0's warm-up
WARMUP_SHARE = 1 / 15  # of a shorter run
FORWARD_TOKENS = 16384  # tokens of a forward pass, up to which a batch is not divided


def peak_lr(compute: float) -> float:
    """The best learning rate of AdamW for a run of `compute` FLOPs. Below the range of the fit that of its smallest
    runs, because the law's rise towards smaller ones is untested."""
    return 1.1576 * max(positive("compute", compute), SMALLEST_FIT) ** -0.1529


def batch_tokens(compute: float) -> float:
    """Tokens in the best batch for a run of `compute` FLOPs."""
    return 0.0694 * positive("compute", compute) ** 0.3644


def batch_tokens_in(flops_per_token: float, steps: int) -> float:
    """Tokens in the best batch for a run of that many steps, B = batch_tokens(flops_per_token * steps * B)."""
    return batch_tokens(flops_per_token * steps) ** (1 / (1 - 0.3644))


def compute_of_lr(lr: float) -> float:
    """The compute in FLOPs for which a learning rate is the best."""
    return (positive("lr", lr) / 1.1576) ** (-1 / 0.1529)


def best_flops_per_token(compute: float) -> float:
    """The FLOPs per token of the best MoE model for a run of `compute` FLOPs; the rest are best_tokens."""
    return 0.1915 * positive("compute", compute) ** 0.5095


def best_tokens(compute: float) -> float:
    return 5.2232 * positive("compute", compute) ** 0.4905


def compute_of_model(flops: float) -> float:
    """The compute for which a model of so many FLOPs per token is the best."""
    return (positive("flops", flops) / 0.1915) ** (1 / 0.5095)


def efficiency_leverage(activation: float, granularity: float, compute: float) -> float:
    """How many times the compute a dense model needs for the loss of an MoE model (section 4, equation of EL).

    activation: activated experts over all, shared ones included. granularity: 2 hidden / expert size. The logarithms
    are of base 10 of the compute and of base 2 of the granularity, which the paper does not say; they give its value of
    about 7 for Ling-mini-beta and its best granularity of about 11.
    """
    if positive("activation", activation) > 1:
        raise InputError(f"activation is a share of the experts, at most 1; got {activation}")
    a, d, gamma, beta, start, most = 1.23, -7.61e-2, 1.67e-2, -1.17e-1, 1.63e-2, 5.28e16
    saturated = 1 / (1 / (activation + 1 / (1 / start - 1 / most)) + 1 / most)
    g, digits = math.log2(positive("granularity", granularity)), math.log10(positive("compute", compute))
    return saturated ** (a + d * digits + gamma * g * g + beta * g)


def positive(name: str, value: float) -> float:
    """The value. Raises InputError unless it is a finite number above 0, for which alone the laws hold."""
    if not isinstance(value, Real) or not 0 < value < math.inf:
        raise InputError(f"{name} is a number above 0; got {value!r}")
    return value


def warmup_steps(steps: int) -> int:
    return min(WARMUP, round(WARMUP_SHARE * steps))


def flops_per_token(config: LingConfig, seq_len: int) -> float:
    """FLOPs per token as the laws count them."""
    return replace(config, num_nextn_predict_layers=0).flops_per_token(seq_len)


def trained_peak_lr(config: LingConfig, seq_len: int) -> float:
    """The peak with which Ling-2.0 would have trained a model of this shape."""
    return peak_lr(flops_per_token(config, seq_len) * LING_TOKENS)


def with_defaults(
    s: Settings, config: LingConfig, trained: bool, given: Collection[str] = ()
) -> tuple[Settings, list[str]]:
    """The settings with lr, warm-up and batch, and lines that say where each comes from.

    trained: the run continues a model's weights. given: settings that the user gave; of others with the value of a
    preset's recipe, which `Settings` has already, the recipe is named.
    """
    steps, seq_len, micro = max(1, s.steps), max(1, s.seq_len), max(1, s.micro_batch or 1)
    flops, recipe = flops_per_token(config, seq_len), s.recipe()
    of_recipe = {name for name in BY_SIZE if name not in given and recipe.get(name) == getattr(s, name)}
    sources = {name: "recipe" if name in of_recipe else "given" for name in BY_SIZE}
    chosen: dict = {}
    if s.batch is None:
        rows = batch_tokens_in(flops, steps) / seq_len
        chosen["batch"] = micro * max(1, round(rows / micro))
        if s.micro_batch is None and not s.step_in_backward:
            chosen["micro_batch"] = forward_rows(chosen["batch"], seq_len)
        sources["batch"] = "Ling's scaling law"
    if s.warmup is None:
        chosen["warmup"], sources["warmup"] = warmup_steps(steps), f"{WARMUP}, or 1/15 of a shorter run"
    peak = trained_peak_lr(config, seq_len)
    if s.lr is None and s.lora_rank:
        chosen["lr"], sources["lr"] = float(f"{ADAPTERS * CONTINUED * peak:.2e}"), "ten times that of all weights"
    elif s.lr is None and trained:
        chosen["lr"] = float(f"{CONTINUED * peak:.2e}")
        sources["lr"] = "a tenth of the peak of Ling's scaling law, as the weights are trained"
    elif s.lr is None:
        compute = flops * steps * seq_len * max(1, chosen.get("batch") or s.batch)
        chosen["lr"], sources["lr"] = float(f"{peak_lr(compute):.2e}"), "Ling's scaling law"
    s = replace(s, **chosen)
    lines = [schedule_line(s, sources)]
    if s.warmup > s.steps:
        lines.append(f"warning    the warm-up of {s.warmup} steps is longer than the run of {s.steps}")
    if trained and s.lr > peak and not s.lora_rank:
        lines.append(
            f"warning    lr {s.lr:g} is above {peak:.2e}, the peak of Ling's scaling law for its size: trained weights"
            " may be lost"
        )
    return s, lines


def schedule_line(s: Settings, sources: Mapping[str, str] | None = None) -> str:
    """What a run does with its learning rate and its batch. sources: where lr, warmup and batch come from."""
    lr, warmup, batch = (f" ({sources[name]})" if sources else "" for name in BY_SIZE)
    decay = "no decay"
    if s.decay != "none":
        decay = f"{s.decay} decay to {s.min_lr:g} over the last {s.lr_schedule['decay_steps']}"
    micro_batch = f", {s.micro_batch} at a time" if s.micro_batch else ""
    return (
        f"schedule   lr {s.lr:g}{lr}, warm-up {counted(s.warmup, 'step')}{warmup}, {decay};"
        f" batch {counted(s.batch, 'row')} of {s.seq_len} tokens{micro_batch}{batch}"
    )


def forward_rows(batch: int, seq_len: int) -> int | None:
    """Rows of a forward pass of about FORWARD_TOKENS tokens that divide the batch; None: all of them."""
    most = max(1, FORWARD_TOKENS // seq_len)
    return None if batch <= most else max(rows for rows in range(1, most + 1) if batch % rows == 0)

"""python -m ling_kernels.generate.plan --model mini: what a decode step must read, and how fast that lets it be.

A step writes a token of each of `batch` texts and reads every weight that it needs once: of E experts, of which each
token takes k at random, E (1 - (1 - k / E)^batch) on the average. What it reads of the cache grows with the texts.
Nothing but bytes over bandwidth is counted: launches, activations and arithmetic come on top. Where weights and cache
are more than a GPU holds, what is told is how many would: the engine serves on one.
"""

import math
import sys

from ..errors import InputError, Parser, command
from ..gpu import HOPPER
from ..model import LingConfig, resolve_model
from .engine import SHARE

SIZES = {"bf16": 2.0, "fp8": 1.0}


def step_bytes(
    c: LingConfig,
    batch: int = 1,
    context: int = 0,
    weights: str = "bf16",
    head: str = "bf16",
    cache: str = "bf16",
    met: float | None = None,
) -> dict[str, float]:
    """{part: bytes} of a step over texts of `context` tokens. weights are those of linear layers and experts.

    met: how many experts of a layer the batch does meet, where that is known.
    """
    w = SIZES[weights] + (4 / 128**2 if weights == "fp8" else 0)  # with a scale for each 128 x 128
    h = SIZES[head] + (4 / 128**2 if head == "fp8" else 0)
    cell = c.head_dim * SIZES[cache] + (4 if cache == "fp8" else 0)  # with a scale for each token and head
    H, F, L, dense = c.hidden_size, c.moe_intermediate_size, c.num_hidden_layers, c.first_k_dense_replace
    heads = 2 * c.num_attention_heads + 2 * c.num_key_value_heads
    met = c.num_experts * (1 - (1 - c.num_experts_per_tok / c.num_experts) ** batch) if met is None else met
    return {
        "attention": L * H * heads * c.head_dim * w,
        "dense MLPs": dense * 3 * H * c.intermediate_size * w,
        "routers": (L - dense) * c.num_experts * H * 2.0,
        "shared experts": (L - dense) * c.num_shared_experts * 3 * H * F * w,
        "experts": (L - dense) * met * 3 * H * F * w,
        "norms": 2.0 * (L * (2 * H + 2 * c.head_dim) + H),
        "embedding": 2.0 * batch * H,
        "lm_head": c.vocab_size * H * h,
        "KV cache": 2.0 * L * batch * context * c.num_key_value_heads * cell,
    }


def held_bytes(c: LingConfig, *how) -> dict[str, float]:
    """{part: bytes} that lie in memory for such steps; arguments are step_bytes'."""
    return step_bytes(c, *how, met=c.num_experts) | {"embedding": 2.0 * c.vocab_size * c.hidden_size}


def gpus(held: dict[str, float], memory: float) -> int:
    """How many of so much memory the parts need at least; the engine leaves a tenth of what the weights leave free."""
    return math.ceil((sum(held.values()) + (1 / SHARE - 1) * held["KV cache"]) / memory)


def tokens_per_second(parts: dict[str, float], batch: int, bandwidth: float) -> float:
    """At most."""
    return batch * bandwidth / sum(parts.values())


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser("python -m ling_kernels.generate.plan", allow_abbrev=False, description=__doc__.split("\n\n")[0])
    add, kinds = parser.add_argument, sorted(SIZES)
    add("--model", required=True, help="tiny, mini, flash, 1t, or a checkpoint folder")
    add("--batch", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="texts at once (default: 1 8 64)")
    add("--context", type=int, default=4096, metavar="N", help="tokens in each text (default: 4096)")
    add("--weights", choices=kinds, default="bf16", help="of linear layers and experts (default: bf16)")
    add("--head", choices=kinds, default="bf16", help="of lm_head (default: bf16)")
    add("--cache", choices=kinds, default="bf16", help="keys and values (default: bf16)")
    args = parser.parse_args(argv)
    if min(args.batch) < 1 or args.context < 0:
        raise InputError("--batch takes numbers from 1 on, --context from 0 on")
    config, _ = resolve_model(args.model)
    how = [(config, b, args.context, args.weights, args.head, args.cache) for b in args.batch]
    columns, held = [step_bytes(*h) for h in how], [held_bytes(*h) for h in how]
    print(f"A decode step of {args.model} over {args.context} tokens of context: MB that it reads")
    print(f"(weights {args.weights}, lm_head {args.head}, cache {args.cache})\n")
    rows = [("batch", *map(str, args.batch))]
    rows += [(part, *(f"{c[part] / 1e6:.1f}" for c in columns)) for part in columns[0]]
    rows += [("all", *(f"{sum(c.values()) / 1e6:.1f}" for c in columns)), ("",)]
    rows += [("in memory, GB",), ("  weights", *(f"{(sum(h.values()) - h['KV cache']) / 1e9:.1f}" for h in held))]
    rows += [("  KV cache", *(f"{h['KV cache'] / 1e9:.1f}" for h in held)), ("",), ("tokens/s at most",)]
    for gpu in HOPPER.values():
        cells = []
        for column, parts, batch in zip(columns, held, args.batch, strict=True):
            n = gpus(parts, gpu.memory)
            cells.append(f"{tokens_per_second(column, batch, gpu.bandwidth):.0f}" if n == 1 else f"needs {n} GPUs")
        rows.append((f"  {gpu.name}, {gpu.bandwidth / 1e12:g} TB/s", *cells))
    for name, *values in rows:
        print((f"{name:20}" + "".join(f"{v:>15}" for v in values)).rstrip())
    print("\nPrediction: bytes over the data sheet's bandwidth. Not measured.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

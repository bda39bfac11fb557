"""python -m ling_kernels.plan decode --model mini: the bytes that a decode step must read, and tokens/s at most.

A step writes one token of each of `batch` texts and reads each weight that it needs once. With E experts, of which
each token takes k at random, it needs E (1 - (1 - k / E)^batch) experts on average. The bytes read from the cache
grow with the texts. The bound is bytes over bandwidth alone; for one text decode_time.py adds launches and latency.
With --tp the table is of one of the n GPUs that share the model (parallel/decode.py), without the time of their
all-reduces. Where weights and cache exceed a GPU's memory it gives the number of GPUs that would hold them.
"""

import math
from collections.abc import Sequence

from ..commands import Parser, command
from ..errors import InputError
from ..generate.engine import SHARE
from ..gpu import HOPPER
from ..model import LingConfig, resolve_model
from ..parallel.decode import part_config
from .decode_time import EFFICIENCY, GAP, PUBLISHED, step_time

BYTES = {"bf16": 2.0, "fp8": 1.0}  # of an element, without scales


WHOLE = ("routers", "norms")  # on every GPU that has a part of the model


def step_bytes(
    c: LingConfig,
    batch: int = 1,
    context: int = 0,
    weights: str = "bf16",
    head: str = "bf16",
    cache: str = "bf16",
    met: float | None = None,
) -> dict[str, float]:
    """{part: bytes read} by a step over texts of `context` tokens.

    weights: precision of linear layers and experts. met: number of experts of a layer that the batch uses, where it is
    known; otherwise the average.
    """
    w = BYTES[weights] + (4 / 128**2 if weights == "fp8" else 0)  # an fp32 scale for each 128 x 128
    h = BYTES[head] + (4 / 128**2 if head == "fp8" else 0)
    cell = c.head_dim * BYTES[cache] + (4 if cache == "fp8" else 0)  # an fp32 scale for each token and head
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


def held_bytes(c: LingConfig, *arguments) -> dict[str, float]:
    """{part: bytes held in memory} for such a step; takes step_bytes' arguments."""
    return step_bytes(c, *arguments, met=c.num_experts) | {"embedding": 2.0 * c.vocab_size * c.hidden_size}


def of_rank(parts: dict[str, float], n: int) -> dict[str, float]:
    """The bytes of one of n GPUs that divide the model."""
    return {part: size if part in WHOLE else size / n for part, size in parts.items()}


def gpus(held: dict[str, float], memory: float) -> int:
    """Least number of GPUs with `memory` bytes each. The engine leaves a tenth of what the weights leave free."""
    return math.ceil((sum(held.values()) + (1 / SHARE - 1) * held["KV cache"]) / memory)


def tokens_per_second(parts: dict[str, float], batch: int, bandwidth: float) -> float:
    """Upper bound for a step that reads `parts`; bandwidth in bytes/s."""
    return batch * bandwidth / sum(parts.values())


@command
def main(argv: Sequence[str] | None = None) -> int:
    description = __doc__.partition(": ")[2].split("\n\n")[0]
    parser = Parser("python -m ling_kernels.plan decode", description=description)
    add, kinds = parser.add_argument, sorted(BYTES)
    add("--model", required=True, help="tiny, mini, flash, 1t, or a checkpoint folder")
    add("--batch", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="texts at once (default: 1 8 64)")
    add("--context", type=int, metavar="N", help="tokens in each text (default: 4096, or all positions if fewer)")
    add("--weights", choices=kinds, default="bf16", help="of linear layers and experts (default: bf16)")
    add("--head", choices=kinds, default="bf16", help="of lm_head (default: bf16)")
    add("--cache", choices=kinds, default="bf16", help="keys and values (default: bf16)")
    add("--tp", type=int, default=1, metavar="N", help="GPUs that divide the model (default: 1)")
    args = parser.parse_args(argv)
    config, _ = resolve_model(args.model)
    if args.tp < 1:
        raise InputError(f"--tp is {args.tp}; it must be at least 1")
    part_config(config, args.tp)
    args.context = min(4096, config.max_positions) if args.context is None else args.context
    if min(args.batch) < 1 or args.context < 0:
        raise InputError("--batch must be at least 1, --context at least 0")
    if args.context > config.max_positions:
        raise InputError(
            f"--context {args.context} exceeds the {config.max_positions} positions of {args.model}; a config.json"
            " with YaRN in rope_scaling may have more"
        )
    cases = [(config, b, args.context, args.weights, args.head, args.cache) for b in args.batch]
    steps, held = [[of_rank(f(*case), args.tp) for case in cases] for f in (step_bytes, held_bytes)]
    each = f" on each of {args.tp} GPUs" if args.tp > 1 else ""
    print(f"A decode step of {args.model} over {args.context} tokens of context: MB that it reads{each}")
    print(f"(weights {args.weights}, lm_head {args.head}, cache {args.cache})\n")
    rows = [("batch", *map(str, args.batch))]
    rows += [(part, *(f"{step[part] / 1e6:.1f}" for step in steps)) for part in steps[0]]
    rows += [("all", *(f"{sum(step.values()) / 1e6:.1f}" for step in steps)), ("",)]
    rows += [("in memory, GB",), ("  weights", *(f"{(sum(h.values()) - h['KV cache']) / 1e9:.1f}" for h in held))]
    rows += [("  KV cache", *(f"{h['KV cache'] / 1e9:.1f}" for h in held)), ("",), ("tokens/s at most",)]
    for gpu in HOPPER.values():
        cells = []
        for step, parts, batch in zip(steps, held, args.batch, strict=True):
            n = gpus(parts, gpu.memory)
            needed = f"needs {n} GPUs" if args.tp == 1 else "does not fit"
            cells.append(f"{tokens_per_second(step, batch, gpu.bandwidth):.0f}" if n == 1 else needed)
        rows.append((f"  {gpu.name}, {gpu.bandwidth / 1e12:g} TB/s", *cells))
    for name, *values in rows:
        print((f"{name:20}" + "".join(f"{v:>15}" for v in values)).rstrip())
    print("\nThe bound is bytes over the data sheet's bandwidth.")
    if args.tp == 1:
        print_times(args.model, config, args.context, args.weights, args.head, args.cache)
    return 0


def print_times(model: str, c: LingConfig, context: int, weights: str, head: str, cache: str) -> None:
    """The predicted time of a step for one text, on each GPU that holds the model; for sizes that csrc/ has."""
    parts, held = (f(c, 1, context, weights, head, cache) for f in (step_bytes, held_bytes))
    fitting = [gpu for gpu in HOPPER.values() if gpus(held, gpu.memory) == 1]
    if not fitting or c.head_dim != 128 or c.num_experts != 256:
        return
    print(
        f"\nPrediction for one text: kernels at {EFFICIENCY:.0%} of that bandwidth or as long as their own instructions"
        f" take,\nand {GAP * 1e6:g} us after each. Not measured."
    )
    for gpu in fitting:
        seconds = step_time(c, parts, gpu, weights, head, cache)
        known = PUBLISHED.get((model, gpu.name))
        beside = f" (published for another engine: {known}+)" if known else ""
        print(f"  {gpu.name:6} {seconds * 1e6:5.0f} us, {1 / seconds:.0f} tokens/s{beside}")

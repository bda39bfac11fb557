"""Predicted time of a training step's products and passes over memory, one after another. Nothing here is measured.

A product takes as long as its FLOPs at a share of the data sheet's rate, or as its bytes at EFFICIENCY of the data
sheet's bandwidth, whichever is longer, and at least LAUNCH; everything else as its bytes. Left out: the start and end
of each kernel, the host's own work, power limits, other programs. So a real step is slower.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..gpu import Gpu
from ..model import LingConfig
from ..nn.fp8 import FP8_ROWS
from ..train.settings import Settings
from .decode_time import EFFICIENCY

# Shares of the peak that the machine code of csrc/ allows on an H200: docs/kernels-predicted.md, which a test compares.
# Other Hopper GPUs get the same shares.
FP8_SHARES = dict(up=0.85, down=0.79, dgrad=0.75, wgrad=0.76, dense=0.94)
ATTENTION_SHARES = dict(forward=0.92, backward=0.60)
BF16_SHARE = 0.7  # of products in bf16, for which there is no such count; assumed
LAUNCH = 10e-6  # s, from one kernel to the next, as Python launches them; assumed
NODE = 8  # GPUs that NVLink connects
LINKS = {True: 450e9, False: 50e9}  # bytes/s of a GPU within a node (NVLink) and beyond (400 Gbit/s); assumed


class Work(NamedTuple):
    """A kernel, or several that take their time together."""

    name: str
    flops: float  # 0: a pass over memory
    bytes: float
    precision: str = "bf16"
    share: float = BF16_SHARE  # of the peak

    def seconds(self, gpu: Gpu) -> float:
        products = self.flops / (gpu.rate(self.precision) * self.share)
        return max(products, self.bytes / (gpu.bandwidth * EFFICIENCY), LAUNCH)


class Pass(NamedTuple):
    """What a micro batch does in one part of the model; backward holds what it computes once more."""

    forward: list[Work]
    backward: list[Work]


def product(
    name: str, rows: float, out: int, inner: int, groups: int = 1, fp8: bool = False, wgrad: bool | None = None,
    forward: str = "dense", grad_bytes: int = 4,
) -> Pass:  # fmt: skip
    """y [rows, out] = x [rows, inner] w [groups, out, inner]^T and its gradients, dw added to what is there.

    fp8: precision of forward and dgrad; wgrad: of dw, as fp8 if None.
    """
    flops, weights = 2.0 * rows * out * inner, groups * out * inner
    wgrad = fp8 if wgrad is None else wgrad

    def work(kind: str, in_fp8: bool, share: str, read: float, written: float) -> Work:
        size = (1 if in_fp8 else 2) * read + written
        rate = FP8_SHARES[share] if in_fp8 else BF16_SHARE
        return Work(f"{name} {kind}", flops, size, "fp8" if in_fp8 else "bf16", rate)

    return Pass(
        [work("forward", fp8, forward, rows * inner + weights, 2 * rows * out)],
        [
            work("dgrad", fp8, "dgrad", rows * out + weights, 2 * rows * inner),
            work("wgrad", wgrad, "wgrad", rows * (out + inner), 2 * grad_bytes * weights),
        ],
    )


def layer(c: LingConfig, s: Settings, tokens: int, moe: bool, groups: int) -> Pass:
    """A layer over a micro batch of `tokens`; groups: experts on this GPU."""
    H, D, k = c.hidden_size, c.head_dim, c.num_experts_per_tok
    heads, kv = c.num_attention_heads, c.num_key_value_heads
    fp8, master = s.precision == "fp8", 4 if s.master == "fp32" else 2
    wgrad = fp8 and (s.fp8_wgrad == "fp8" or (s.fp8_wgrad == "auto" and tokens * k / groups >= FP8_ROWS))
    dense: dict[str, Any] = dict(fp8=fp8, wgrad=fp8 and s.fp8_wgrad != "bf16", grad_bytes=master)
    attention = 2.0 * tokens * heads * D * s.seq_len  # both products, causal
    qkv = (heads + 2 * kv) * D
    parts = [
        product("query_key_value", tokens, qkv, H, **dense),
        Pass(
            [Work("attention forward", attention, 2 * tokens * (qkv + heads * D), share=ATTENTION_SHARES["forward"])],
            [Work("attention backward", 2.5 * attention, 4 * tokens * (qkv + heads * D),
                  share=ATTENTION_SHARES["backward"])],
        ),
        product("dense", tokens, H, heads * D, **dense),
    ]  # fmt: skip
    mlps = [(c.num_shared_experts * c.moe_intermediate_size, tokens)] if moe else [(c.intermediate_size, tokens)]
    for F, rows in mlps:
        parts += [product("MLP up", rows, 2 * F, H, **dense), product("MLP down", rows, H, F, **dense)]
    passes = 10 * H + 2 * (heads + kv) * D + 3 * mlps[0][0], 12 * H + 3 * (heads + kv) * D + 5 * mlps[0][0]
    outputs = qkv + H + 2 * mlps[0][0] + H  # dy of the products, which FP8 quantises along both directions
    if moe:
        F, rows, experts = c.moe_intermediate_size, tokens * k, dense | dict(wgrad=wgrad)
        parts += [
            product("router", tokens, c.num_experts, H),
            product("experts up", rows, 2 * F, H, groups, forward="up", **experts),
            product("experts down", rows, H, F, groups, forward="down", **experts),
        ]
        passes = passes[0] + 2 * (k + 1) * H + 3 * k * F, passes[1] + 2 * (k + 1) * H + 5 * k * F
        outputs += k * (2 * F + H)
    weights = sum(n * (out * inner) for n, out, inner in shapes(c, moe, groups))
    quantise = (master + 1) * weights if fp8 and s.fp8_weights == "each_forward" else 0
    forward = [w for p in parts for w in p.forward] + [Work("element-wise", 0, 2 * tokens * passes[0] + quantise)]
    backward = [w for p in parts for w in p.backward]
    backward.append(Work("element-wise", 0, 2 * tokens * passes[1] + (4 * tokens * outputs if fp8 else 0)))
    again = dict(full=forward, experts=[w for w in forward if w.name in ("experts up forward", "element-wise")],
                 norm_act=forward[-1:], none=[])  # fmt: skip
    return Pass(forward, [*again[s.recompute], *backward])


def shapes(c: LingConfig, moe: bool, groups: int) -> list[tuple[int, int, int]]:
    """(number, out, inner) of the matrices of a layer that FP8 quantises."""
    H, D, heads, kv = c.hidden_size, c.head_dim, c.num_attention_heads, c.num_key_value_heads
    F, S = c.moe_intermediate_size, c.num_shared_experts * c.moe_intermediate_size if moe else c.intermediate_size
    experts = [(groups, 3 * F, H)] if moe else []
    return [(1, (heads + 2 * kv) * D, H), (1, H, heads * D), (1, 3 * S, H), *experts]


def unit(c: LingConfig, s: Settings, kind: str, groups: int) -> Pass:
    """A micro batch in d, a dense layer; t, a MoE layer; m, an MTP layer; L, the head and one loss. groups: experts of
    a layer on this GPU."""
    tokens, master = (s.micro_batch or s.batch) * s.seq_len, 4 if s.master == "fp32" else 2
    if kind == "L":  # logits: written, read for the loss, their gradient written and read twice
        head = product("lm_head", tokens, c.vocab_size, c.hidden_size, grad_bytes=master)
        return Pass(head.forward, [*head.backward, Work("loss", 0, 10.0 * tokens * c.vocab_size)])
    parts = [layer(c, s, tokens, kind != "d", groups)]
    if kind == "m":
        if s.recompute_mtp and s.recompute != "full":
            parts.append(Pass([], parts[0].forward))
        parts.append(product("eh_proj", tokens, c.hidden_size, 2 * c.hidden_size, grad_bytes=master))
    return Pass([w for p in parts for w in p.forward], [w for p in parts for w in p.backward])


def once(s: Settings, peak: dict[str, int]) -> list[Work]:
    """What a step does once: the optimizer reads gradients, reads and writes weights and state. peak: the plan's bytes
    of one GPU."""
    master = 4 if s.master == "fp32" else 2
    moments = dict(adamw=8, adamw8bit=2, muon=master)[s.optimizer]
    state = peak["optimizer"]
    kept = peak["FP8 weights"] if s.precision == "fp8" and s.fp8_weights == "kept" else 0
    return [Work("optimizer", 0, 2 * state + 3 * master * state / moments + kept)]


def exchange_seconds(c: LingConfig, s: Settings, ep: int, mtp: bool = False) -> tuple[float, float]:
    """Seconds that the rows of a micro batch travel for one MoE layer, in its forward and in its backward: to the
    experts and back, and so do their gradients. Recomputing the whole layer sends the rows again. mtp: of an MTP layer.
    """
    rows = 2.0 * c.num_experts_per_tok * (s.micro_batch or s.batch) * s.seq_len * c.hidden_size * (ep - 1) / ep
    both_ways = 2 * rows / LINKS[ep <= NODE]
    return both_ways, both_ways * (2 if s.recompute == "full" or (mtp and s.recompute_mtp) else 1)


def total(works: Iterable[Work], gpu: Gpu) -> float:
    return sum(work.seconds(gpu) for work in works)

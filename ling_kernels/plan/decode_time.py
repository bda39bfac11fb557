"""Predicted time of a decode step for one text: its kernels one after another, as docs/serving.md lists them.

A kernel takes as long as memory needs for its bytes, or as one warp needs on its way through it, and then the next one
begins. Products of few rows and the router prepare while the kernel ahead runs, beside which an SM has room for them
(registers: not for the next layer's first kernel beside moe_decode); their way begins where they have waited for it.
Nothing here is measured.
"""

from ..gpu import Gpu
from ..model import LingConfig

EFFICIENCY = 0.85  # of the data sheet's bandwidth that a kernel reaches; assumed
GAP = 0.7e-6  # s from the end of a kernel to the next one's first useful instruction, in a CUDA graph with programmatic
# dependent launch; assumed
CLOCKS = {  # of one warp, each loop once: "after the kernel ahead" or "whole" in docs/kernels-clocks.md, for one row
    "rms_norm_linear_kernel<true>": 3690,
    "rms_norm_linear_kernel<false>": 2780,
    "gemm_fp8_few_rows_kernel<false>": 1730,
    "attention_decode_kernel<bfloat16, bfloat16, true>": 7970,
    "attention_decode_kernel<bfloat16, unsigned char, true>": 9280,
    "rms_norm_router_kernel<bfloat16, bfloat16, 1>": 1710,
    "moe_decode_kernel<true, 4, Router<256, 8, 4, 8>>": 9700,
    "moe_decode_kernel<false, 4, Router<256, 8, 4, 8>>": 9690,
}
OTHER = 4000  # clocks of a kernel that is not in the table: element-wise, embedding, sampling; assumed
PUBLISHED = {("mini", "H20"): 300, ("flash", "H20"): 200}  # tokens/s at least, by the authors of Ling 2.0


def kernels(
    c: LingConfig, parts: dict[str, float], weights: str, head: str, cache: str
) -> list[tuple[int, float, int]]:
    """(number, bytes of each, clocks of each) of a step's kernels; parts is `step_bytes` of one text."""
    fp8, L, dense = weights == "fp8", c.num_hidden_layers, c.first_k_dense_replace
    moes = L - dense
    linear = {kind: CLOCKS[f"rms_norm_linear_kernel<{str(kind == 'fp8').lower()}>"] for kind in ("bf16", "fp8")}
    output = CLOCKS["gemm_fp8_few_rows_kernel<false>"] if fp8 else linear["bf16"]
    cells = "unsigned char" if cache == "fp8" else "bfloat16"
    heads = c.num_attention_heads + 2 * c.num_key_value_heads
    qkv = parts["attention"] * heads / (heads + c.num_attention_heads)
    out = [
        (L, qkv / L, linear[weights]),
        (L, parts["KV cache"] / L, CLOCKS[f"attention_decode_kernel<bfloat16, {cells}, true>"]),
        (L, (parts["attention"] - qkv) / L, output),
        (1, parts["lm_head"], linear[head]),
        (2, 0.0, OTHER),  # before the layers, and sampling
    ]
    if moes:
        moe = CLOCKS[f"moe_decode_kernel<{str(fp8).lower()}, 4, Router<256, 8, 4, 8>>"]
        out += [(moes, parts["routers"] / moes, CLOCKS["rms_norm_router_kernel<bfloat16, bfloat16, 1>"])]
        out += [(moes, (parts["experts"] + parts["shared experts"]) / moes, moe)]
    if dense:  # two products, and norm, quantisation, SwiGLU and sum
        out += [(2 * dense, parts["dense MLPs"] / (2 * dense), output), (4 * dense, 0.0, OTHER)]
    return out


def step_time(c: LingConfig, parts: dict[str, float], gpu: Gpu, weights: str, head: str, cache: str) -> float:
    """Seconds of a step for one text."""
    bandwidth = gpu.bandwidth * EFFICIENCY
    return sum(
        number * (max(size / bandwidth, clocks / gpu.clock) + GAP)
        for number, size, clocks in kernels(c, parts, weights, head, cache)
    )

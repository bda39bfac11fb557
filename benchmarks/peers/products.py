"""Matrix products: torch, DeepGEMM, linghe, quack, SGLang, Transformer Engine, vLLM."""

import torch
from torch.nn import functional as F

from ling_kernels.op import E4M3
from ling_kernels.ops.quantize import dequantize

from . import first, only, peer


def owned(offsets):
    """Of the rows that an expert has."""
    rows = int(offsets[-1])
    return lambda theirs, ours: (first(theirs)[:rows], first(ours)[:rows])


@peer("grouped_gemm", "torch grouped_mm")
def grouped_mm(a, b, offsets):
    ends = offsets[1:]
    return lambda: F.grouped_mm(a, b.transpose(1, 2), offs=ends), owned(offsets)


@peer("grouped_gemm", "quack", "quack")
def quack_grouped(a, b, offsets):
    from quack.gemm_interface import gemm

    return lambda: gemm(a, b.transpose(1, 2), cu_seqlens_m=offsets), owned(offsets)


@peer("grouped_gemm", "Transformer Engine", "transformer_engine.pytorch")
def te_grouped(a, b, offsets):
    import transformer_engine.pytorch as te

    (E, N, K), splits = b.shape, offsets.diff().tolist()
    layer = te.GroupedLinear(E, K, N, bias=False, params_dtype=b.dtype, device=b.device)
    for e in range(E):
        getattr(layer, f"weight{e}").data.copy_(b[e])
    return lambda: layer(a, splits), owned(offsets)


class Padded:
    """Rows that each expert begins at a multiple of 128, as DeepGEMM wants them."""

    def __init__(self, offsets):
        counts = offsets.diff()
        padded = (counts + 127) // 128 * 128
        ends = padded.cumsum(0)
        rows = torch.arange(int(offsets[-1]), device=offsets.device)
        owner = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
        self.place = rows - offsets[owner] + (ends - padded)[owner]
        self.group = torch.repeat_interleave(torch.arange(len(counts), device=offsets.device), padded).int()

    def spread(self, x):
        bits = x.view(torch.uint8) if x.dtype == E4M3 else x
        out = bits.new_zeros(len(self.group), x.shape[1])
        return out.index_copy_(0, self.place, bits[: len(self.place)].contiguous()).view(x.dtype)

    def alike(self, theirs, ours):
        return theirs[self.place], first(ours)[: len(self.place)]


@peer("grouped_gemm", "DeepGEMM, rows padded to 128", "deep_gemm")
def deep_gemm_grouped_bf16(a, b, offsets):
    import deep_gemm

    only(a.dtype == torch.bfloat16, "other dtype than bf16")
    padded = Padded(offsets)
    x = padded.spread(a)
    d = a.new_empty(len(x), b.shape[1])

    def call():
        deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, b, d, padded.group)
        return d

    return call, padded.alike


@peer("grouped_wgrad", "torch grouped_mm, bf16 out")
def grouped_mm_wgrad(dy, x, offsets, out=None, accumulate=False, dy_scale=None, x_scale=None, *columns, **variant):
    only(dy_scale is None and not accumulate, "FP8 or accumulation")
    ends, dy = offsets[1:], dy.T.contiguous()
    return lambda: F.grouped_mm(dy, x, offs=ends)


@peer("gemm_fp8", "torch scaled_mm")
def scaled_mm(a, a_scale, b, b_scale, out=None, accumulate=False, dtype=torch.bfloat16, transposed=False):
    only(out is None and not transposed, "accumulation and no transposed operand")
    kinds = F.ScalingType
    kind = kinds.BlockWise1x128 if len(b_scale) == len(b) else kinds.BlockWise128x128
    return lambda: F.scaled_mm(a, b.T, a_scale, kinds.BlockWise1x128, b_scale.T, kind, output_dtype=dtype)


@peer("gemm_fp8", "DeepGEMM", "deep_gemm")
def deep_gemm(a, a_scale, b, b_scale, out=None, accumulate=False, dtype=torch.bfloat16, transposed=False):
    import deep_gemm

    only(out is None and not transposed and len(b_scale) != len(b), "this operand layout here")
    d = torch.empty(len(a), len(b), dtype=torch.bfloat16, device=a.device)

    def call():
        deep_gemm.fp8_gemm_nt((a, a_scale), (b, b_scale), d)
        return d

    return call


@peer("gemm_fp8", "linghe", "linghe")
def linghe(a, a_scale, b, b_scale, out=None, accumulate=False, dtype=torch.bfloat16, transposed=False):
    from linghe.gemm.blockwise_fp8_gemm import triton_tt_fp8_gemm

    only(out is None and not transposed, "accumulation and no transposed operand")
    rows = b_scale.repeat_interleave(len(b) // len(b_scale), 0)
    a_scale, rows = a_scale.contiguous(), rows.contiguous()
    return lambda: triton_tt_fp8_gemm(a, b, a_scale, rows, out_dtype=dtype)


@peer("gemm_fp8", "SGLang", "sgl_kernel")
def sglang(a, a_scale, b, b_scale, out=None, accumulate=False, dtype=torch.bfloat16, transposed=False):
    import sgl_kernel

    only(out is None and not transposed and len(b_scale) != len(b), "this operand layout")
    return lambda: sgl_kernel.fp8_blockwise_scaled_mm(a, b.T, a_scale, b_scale.T, dtype)


@peer("gemm_fp8", "vLLM", "vllm")
def vllm(a, a_scale, b, b_scale, out=None, accumulate=False, dtype=torch.bfloat16, transposed=False):
    from vllm import _custom_ops

    only(out is None and not transposed and len(b_scale) != len(b), "this operand layout")
    return lambda: _custom_ops.cutlass_scaled_mm(a, b.T, scale_a=a_scale, scale_b=b_scale.T, out_dtype=dtype)


@peer("grouped_gemm_fp8", "torch scaled_grouped_mm, one scale a row")
def scaled_grouped_mm(a, a_scale, b, b_scale, offsets, plan=None, **variant):
    only(plan is None and not variant, "gather, SwiGLU or transposed weights")
    ends, kind = offsets[1:], F.ScalingType.RowWise

    def with_row_scales(q, scale):
        wide = dequantize(q, scale)
        row = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
        return (wide / row).to(E4M3), row.squeeze(-1)

    (a, a_scale), (b, b_scale) = with_row_scales(a, a_scale), with_row_scales(b, b_scale)
    return (
        lambda: F.scaled_grouped_mm(a, b.transpose(1, 2), a_scale, kind, b_scale, kind, offs=ends),
        owned(offsets),
    )


@peer("grouped_gemm_fp8", "DeepGEMM, rows padded to 128", "deep_gemm")
def deep_gemm_grouped(a, a_scale, b, b_scale, offsets, plan=None, **variant):
    import deep_gemm

    only(plan is None and not variant, "gather, SwiGLU or transposed weights")
    padded = Padded(offsets)
    x, x_scale = padded.spread(a), padded.spread(a_scale).T.contiguous().T
    d = torch.empty(len(x), b.shape[1], dtype=torch.bfloat16, device=a.device)

    def call():
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous((x, x_scale), (b, b_scale), d, padded.group)
        return d

    return call, padded.alike


@peer("grouped_gemm_fp8_masked", "DeepGEMM", "deep_gemm")
def deep_gemm_masked(a, a_scale, b, b_scale, counts, dtype=torch.bfloat16):
    import deep_gemm

    only(dtype == torch.bfloat16, "other result than bf16")
    x_scale = a_scale.transpose(1, 2).contiguous().transpose(1, 2)
    d = torch.empty(*a.shape[:2], b.shape[1], dtype=dtype, device=a.device)
    expected = max(1, int(counts.float().mean()))
    valid = torch.arange(a.shape[1], device=a.device) < counts[:, None]

    def call():
        deep_gemm.m_grouped_fp8_gemm_nt_masked((a, x_scale), (b, b_scale), d, counts, expected)
        return d

    return call, lambda theirs, ours: (theirs[valid], ours[valid])


@peer("router_gemm", "linghe", "linghe")
def linghe_router(x, w):
    from linghe.facade.fp32_gemm import fp32_gemm

    only(x.dtype == w.dtype == torch.bfloat16, "operand but bf16")
    return lambda: fp32_gemm(x, w)

"""Products of DeepGEMM, linghe, SGLang, vLLM, quack, and Transformer Engine's GroupedLinear."""

import torch

from .arithmetic import wide


def nt(a, b, d, c=None, recipe=None):
    assert a[1].stride(0) == 1 and c is recipe is None
    d.copy_(wide(*a) @ wide(*b).T)


def grouped(a, b, group):
    assert all(len({*part.tolist()}) == 1 for part in group.split(128)), "an expert begins inside a block of 128 rows"
    return torch.stack([row @ b[e].T for row, e in zip(a, group.tolist(), strict=True)])


def contiguous(a, b, d, grouped_layout, recipe=None):
    assert a[1].stride(0) == 1 and grouped_layout.dtype == torch.int32
    d.copy_(grouped(wide(*a), wide(*b), grouped_layout))


def contiguous_bf16(a, b, d, grouped_layout, compiled_dims="nk"):
    d.copy_(grouped(a.float(), b.float(), grouped_layout))


def masked(a, b, d, masked_m, expected_m, recipe=None):
    assert (a[1].stride(1) == 1 or 1 in a[1].shape) and isinstance(expected_m, int)
    for e, n in enumerate(masked_m.tolist()):
        d[e, :n] = wide(a[0][e, :n], a[1][e, :n]) @ wide(b[0][e], b[1][e]).T if n else 0


def tt(a, b, a_s, b_s, out_dtype=torch.bfloat16, block_size=128):
    assert a_s.is_contiguous() and b_s.is_contiguous() and len(b_s) == len(b)
    return (wide(a, a_s) @ wide(b, b_s).T).to(out_dtype)


def blockwise(mat_a, mat_b, scales_a, scales_b, out_dtype):
    assert mat_b.stride(0) == scales_a.stride(0) == scales_b.stride(0) == 1
    return (wide(mat_a, scales_a) @ wide(mat_b, scales_b)).to(out_dtype)


def cutlass(a, b, scale_a, scale_b, out_dtype, bias=None):
    return blockwise(a, b, scale_a, scale_b, out_dtype)


def quack_gemm(A, B, out=None, bias=None, alpha=1.0, out_dtype=None, cu_seqlens_m=None):
    parts = A.split(cu_seqlens_m.diff().tolist() + [len(A) - int(cu_seqlens_m[-1])])
    return torch.cat([a @ b for a, b in zip(parts, [*B, B[0]], strict=True)])


class GroupedLinear:
    def __init__(self, num_gemms, in_features, out_features, bias=True, params_dtype=None, device="cuda"):
        assert not bias
        for e in range(num_gemms):
            setattr(self, f"weight{e}", torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype)))

    def __call__(self, inp, m_splits):
        parts = inp[: sum(m_splits)].split(m_splits)
        out = inp.new_zeros(len(inp), self.weight0.shape[0])
        out[: sum(m_splits)] = torch.cat([p @ getattr(self, f"weight{e}").T for e, p in enumerate(parts)])
        return out.detach()

"""FlashAttention 2, 3 and 4, and FlashInfer's decode wrapper."""

import torch
from torch.nn import functional as F


def varlen(q, k, v, cu_q, cu_k, scale, causal):
    outs = []
    for b in range(len(cu_q) - 1):
        one = [t[c[b] : c[b + 1]].transpose(0, 1).float() for t, c in ((q, cu_q), (k, cu_k), (v, cu_k))]
        n, m = one[0].shape[1], one[1].shape[1]
        mask = torch.ones(n, m).tril(m - n).bool() if causal else torch.ones(n, m).bool()
        y = F.scaled_dot_product_attention(*one, attn_mask=mask, scale=scale, enable_gqa=True)
        outs.append(y.nan_to_num().transpose(0, 1))
    return torch.cat(outs).to(q.dtype)


def fa2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False):  # fmt: skip
    assert max_seqlen_k >= max(cu_seqlens_k.diff()) and isinstance(max_seqlen_q, int)
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


def fa3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False):  # fmt: skip
    assert seqused_q is None and seqused_k is None
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)


def fa4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False):  # fmt: skip
    assert qv is None and gather_kv_indices is None
    return varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal), None


def paged(q, k, v, lengths, table, scale):
    """q [B, n, Hq, D], pages [blocks, size, Hkv, D]."""
    outs = []
    for b, length in enumerate(lengths.tolist()):
        keys, values = (t[table[b].long()].flatten(0, 1)[:length] for t in (k, v))
        ends = [torch.tensor([0, n]) for n in (q.shape[1], length)]
        outs.append(varlen(q[b], keys, values, *ends, scale, True))
    return torch.stack(outs)


def kv2(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False):  # fmt: skip
    assert k is None and causal
    return paged(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale)


def kv3(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
        cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
        causal=False):  # fmt: skip
    assert k is None and causal
    return paged(q, k_cache, v_cache, cache_seqlens, page_table, softmax_scale)


class FlashInferDecode:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False):
        assert kv_layout == "NHD" and use_tensor_cores

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, q_data_type,
             kv_data_type, sm_scale):  # fmt: skip
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32 and len(indices) == indptr[-1]
        self.pages = [indices[a:b] for a, b in zip(indptr[:-1], indptr[1:], strict=True)]
        self.lengths = [(len(p) - 1) * page_size + int(n) for p, n in zip(self.pages, last_page_len, strict=True)]
        self.heads, self.scale = (num_qo_heads, num_kv_heads, head_dim), sm_scale

    def run(self, q, paged_kv_cache, *args, out=None):
        k, v = paged_kv_cache
        assert (q.shape[1], k.shape[2], k.shape[3]) == self.heads
        return torch.cat([
            paged(q[b, None, None], k, v, torch.tensor([n]), pages[None], self.scale)[:, 0]
            for b, (pages, n) in enumerate(zip(self.pages, self.lengths, strict=True))
        ])  # fmt: skip

"""Attention of torch, FlashAttention and FlashInfer."""

import importlib

import torch
from torch.nn import functional as F

from . import first, only, peer


def sdpa(backend: str):
    def prepare(q, k, v, cu_seqlens_q, cu_seqlens_k=None, causal=True, scale=None):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        lengths = cu_seqlens_q.diff().tolist()
        only(len({*lengths}) == 1 and cu_seqlens_k is None, "sequences of several lengths")
        q, k, v = (t.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2).contiguous() for t in (q, k, v))
        one = [getattr(SDPBackend, backend)]

        def call():
            with sdpa_kernel(one):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)

        return call, lambda theirs, ours: (theirs.transpose(1, 2).flatten(0, 1), ours[0])

    return prepare


peer("attention", "torch SDPA cuDNN")(sdpa("CUDNN_ATTENTION"))
peer("attention", "torch SDPA flash")(sdpa("FLASH_ATTENTION"))


def flash(module: str):
    def prepare(q, k, v, cu_seqlens_q, cu_seqlens_k=None, causal=True, scale=None):
        fn = importlib.import_module(module).flash_attn_varlen_func
        ends = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        sequences = dict(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=ends, max_seqlen_q=int(cu_seqlens_q.diff().max()),
                         max_seqlen_k=int(ends.diff().max()))  # fmt: skip
        return lambda: fn(q, k, v, softmax_scale=scale, causal=causal, **sequences)

    return prepare


peer("attention", "FlashAttention 2", "flash_attn")(flash("flash_attn"))
peer("attention", "FlashAttention 3", "flash_attn_interface")(flash("flash_attn_interface"))
peer("attention", "FlashAttention 4", "flash_attn.cute")(flash("flash_attn.cute"))


def flash_decode(module: str, table: str):
    def prepare(q, cache, block_table, lengths, scale=None):
        fn = importlib.import_module(module).flash_attn_with_kvcache
        only(cache.k_scale is None, "scale for each token and head of the cache")
        pages = dict(cache_seqlens=lengths, **{table: block_table})
        return lambda: fn(q, cache.k, cache.v, softmax_scale=scale, causal=True, **pages)

    return prepare


peer("attention_decode", "FlashAttention 2", "flash_attn")(flash_decode("flash_attn", "block_table"))
peer("attention_decode", "FlashAttention 3", "flash_attn_interface")(flash_decode("flash_attn_interface", "page_table"))


@peer("attention_decode", "FlashInfer", "flashinfer")
def flashinfer_decode(q, cache, block_table, lengths, scale=None):
    import flashinfer

    only(q.shape[1] == 1 and cache.k_scale is None, "several query tokens, or scales of the cache, here")
    block = cache.k.shape[1]
    counts = (lengths + block - 1) // block
    used = torch.arange(block_table.shape[1], device=q.device) < counts[:, None]
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(starts, block_table[used], (lengths - 1) % block + 1, q.shape[2], cache.k.shape[2], q.shape[3], block,
                 q_data_type=q.dtype, kv_data_type=cache.k.dtype, sm_scale=scale)  # fmt: skip
    rows = q[:, 0].contiguous()
    return lambda: wrapper.run(rows, (cache.k, cache.v)), lambda theirs, ours: (first(theirs), ours[:, 0])

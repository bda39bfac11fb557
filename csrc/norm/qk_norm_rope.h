#pragma once
#include "tensor.h"

namespace ling {

// q, k and v of qkv: RMS norm of every query and key head of 128, rotation of its first 64 dims (see qk_norm_rope.py)
void qk_norm_rope_fwd(cudaStream_t stream,
                      Tensor qkv,        // [T, Hq + 2 Hkv, 128]  f32, f16 or bf16
                      Tensor q_weight,   // [128]                 as qkv, or f32
                      Tensor k_weight,   // [128]                 as q_weight
                      Tensor cos,        // [P, 32]               f32
                      Tensor sin,        // [P, 32]               f32
                      Tensor positions,  // [T]                   i32 or i64; outside 0..P-1 the result is NaN
                      Tensor slots,    // [T]                   i64 or None: cells of the cache; others are not written
                      Tensor q,        // [T, Hq, 128]          as qkv, or None: not needed (out)
                      Tensor k,        // [T, Hkv, 128]         as qkv (out)
                      Tensor v,        // [T, Hkv, 128]         as qkv, or None where there is no cache (out)
                      Tensor k_cache,  // [blocks, block_size, Hkv, 128] as qkv, or None (out)
                      Tensor v_cache,  // as k_cache (out)
                      float eps);

void qk_norm_rope_bwd(cudaStream_t stream,
                      Tensor dq,   // [T, Hq, 128]          as qkv
                      Tensor dk,   // [T, Hkv, 128]         as qkv
                      Tensor dv,   // [T, Hkv, 128]         as qkv
                      Tensor qkv,  // as above, and so the next five
                      Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor positions,
                      Tensor dqkv,  // as qkv (out)
                      Tensor dw,    // [programs, groups of query heads, then of key heads, 128] f32 partial sums (out)
                      float eps);

}  // namespace ling

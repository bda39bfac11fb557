#pragma once
#include "tensor.h"

namespace ling {

// Attention of n new tokens over a paged cache (see attention_decode.py). With R = n Hq / Hkv rows for a KV head; W,
// which partial's size tells, is how many blocks share the keys.
void attention_decode_fwd(cudaStream_t stream,
                          Tensor q,        // [B, n, Hq, 128]  f16 or bf16
                          Tensor k,        // [num_blocks, block_size, Hkv, 128] as q, or e4m3; 16 divides block_size
                          Tensor v,        // as k
                          Tensor k_scale,  // [num_blocks, block_size, Hkv] f32 with e4m3, otherwise None
                          Tensor v_scale,  // as k_scale
                          Tensor block_table,  // [B, max_blocks] i32; checked on the device by LING_DEBUG builds, as
                          Tensor lengths,      // [B] i32         are these; otherwise clamped into what there is
                          Tensor out,          // as q (out)
                          Tensor partial,      // [W + B, Hkv, R, 128] f32 (scratch)
                          Tensor lse,          // [W + B, Hkv, R] f32 (scratch)
                          float scale);

// The same for tokens that are not in the cache yet: their queries and keys are normed and rotated, their keys and
// values written into the cache first (see qk_norm_attention_decode.py).
void qk_norm_attention_decode_fwd(cudaStream_t stream,
                                  Tensor qkv,       // [B, n, Hq + 2 Hkv, 128]  f16 or bf16
                                  Tensor q_weight,  // [128] as qkv, or f32
                                  Tensor k_weight,  // as q_weight
                                  Tensor cos,       // [P, 32] f32
                                  Tensor sin,       // as cos
                                  Tensor k,         // as above, and so the next three (out)
                                  Tensor v, Tensor k_scale, Tensor v_scale,
                                  Tensor block_table,  // as above
                                  Tensor lengths,      // as above, the n new tokens counted
                                  Tensor out,          // [B, n, Hq, 128] as qkv (out)
                                  Tensor out_q,        // [B n, 128 Hq] e4m3 or None: out's FP8, see quantize.h (out)
                                  Tensor out_scale,    // [B n, Hq] f32, B n contiguous, with out_q (out)
                                  Tensor partial, Tensor lse, float scale, float eps);

}  // namespace ling

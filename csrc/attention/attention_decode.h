#pragma once
#include "tensor.h"

namespace ling {

// Attention of n new tokens over a paged cache (see attention_decode.py). R = n Hq / Hkv rows of a KV head; W blocks
// share the keys, and W + B is partial's size.
void attention_decode_fwd(cudaStream_t stream,
                          Tensor q,        // [B, n, Hq, 128]  f16 or bf16
                          Tensor k,        // [num_blocks, block_size, Hkv, 128] as q, or e4m3; 16 divides block_size
                          Tensor v,        // as k
                          Tensor k_scale,  // [num_blocks, block_size, Hkv] f32 with e4m3, otherwise None
                          Tensor v_scale,  // as k_scale
                          Tensor block_table,  // [B, max_blocks] i32; LING_DEBUG builds check both on the device,
                          Tensor lengths,      // [B] i32         others clamp them to the cache and the table
                          Tensor out,          // as q (out)
                          Tensor partial,      // [W + B, Hkv, R, 128] f32 (scratch)
                          Tensor lse_log2,     // [W + B, Hkv, R] f32 (scratch): log-sum-exp in base 2
                          float scale);

// The same for tokens that are not in the cache yet: the kernel norms and rotates their queries and keys, and writes
// their keys and values into the cache (see qk_norm_attention_decode.py).
void qk_norm_attention_decode_fwd(cudaStream_t stream,
                                  Tensor qkv,       // [B, n, Hq + 2 Hkv, 128]  f16 or bf16
                                  Tensor q_weight,  // [128] as qkv, or f32
                                  Tensor k_weight,  // as q_weight
                                  Tensor cos,       // [P, 32] f32
                                  Tensor sin,       // as cos
                                  Tensor k,         // this and the next three as above (out)
                                  Tensor v, Tensor k_scale, Tensor v_scale,
                                  Tensor block_table,  // as above
                                  Tensor lengths,      // as above, with the n new tokens
                                  Tensor out,          // [B, n, Hq, 128] as qkv (out)
                                  Tensor out_q,        // [B n, 128 Hq] e4m3 or None: out's FP8, see quantize.h (out)
                                  Tensor out_scale,    // [B n, Hq] f32, B n contiguous, with out_q (out)
                                  Tensor partial, Tensor lse_log2, float scale, float eps);

}  // namespace ling

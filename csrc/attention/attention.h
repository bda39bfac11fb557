#pragma once
#include "tensor.h"

namespace ling {

// q [Tq, Hq, 128], k and v [Tk, Hkv, 128] bf16, packed as cu_q and cu_k [B + 1] int32 say -> out as q, lse [Hq, Tq]
// fp32. Causal aligned at the bottom right. scale multiplies q k^T.
// With q_weight [128] bf16 or fp32, cos and sin [P, 32] fp32 and positions [Tq] int32 or int64, q is normed and rotated
// first (norm/qk_norm_rope.h).
void attention_fwd(cudaStream_t stream, Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, Tensor out, Tensor lse,
                   bool causal, float scale, Tensor q_weight, Tensor cos, Tensor sin, Tensor positions, float eps);

// dq, dk and dv, as q, k and v, from dout and what attention_fwd left; scratch [2, Hq, Tq rounded up to 4] fp32. Tq, Tk
// > 0.
void attention_bwd(cudaStream_t stream, Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_q,
                   Tensor cu_k, Tensor dq, Tensor dk, Tensor dv, bool causal, float scale, Tensor scratch);

}  // namespace ling

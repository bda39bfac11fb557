#pragma once
#include "tensor.h"

namespace ling {

// q [Tq, Hq, 128], k and v [Tk, Hkv, 128] bf16, packed by cu_q and cu_k [B + 1] int32 (cu_k may be None: as cu_q) ->
// out as q, lse [Hq, Tq] fp32. The causal mask is aligned at the bottom right. scale multiplies q k^T. Tk > 0 or Tq =
// 0. With q_weight [128] bf16 or fp32, cos and sin [P, 32] fp32 and positions [Tq] int32 or int64, the kernel norms and
// rotates q first (norm/qk_norm_rope.h); otherwise these four are None.
void attention_fwd(cudaStream_t stream, Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, Tensor out, Tensor lse,
                   bool causal, float scale, Tensor q_weight, Tensor cos, Tensor sin, Tensor positions, float eps);

// dq, dk and dv, as q, k and v, from dout and the out and lse of attention_fwd; scratch [2, Hq, Tq rounded up to 4]
// fp32. Tq, Tk > 0.
void attention_bwd(cudaStream_t stream, Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_q,
                   Tensor cu_k, Tensor dq, Tensor dk, Tensor dv, bool causal, float scale, Tensor scratch);

}  // namespace ling

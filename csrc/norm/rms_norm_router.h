#pragma once
#include "tensor.h"

namespace ling {

// total = x + residual,  h = total * rstd * w,  logits = h router_w^T with the rounded h. For a few rows: it reads
// router_w and w while the preceding kernel still runs.
void rms_norm_router_fwd(cudaStream_t stream,
                         Tensor x,         // [T, H] bf16; rows may be strided; H % 8 == 0, H <= 8192
                         Tensor w,         // [H]    bf16 or f32
                         Tensor router_w,  // [E, H] bf16 or f32
                         Tensor residual,  // [T, H] bf16 or f32, or None; rows may be strided
                         Tensor h,         // [T, H] bf16 (out)
                         Tensor total,     // [T, H] as residual, or None (out)
                         Tensor logits,    // [T, E] f32  (out)
                         float eps);

}  // namespace ling

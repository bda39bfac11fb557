#pragma once
#include "tensor.h"

namespace ling {

// y = rms_norm(x) w^T, or x w^T without a norm, for 1 to 8 rows
void rms_norm_linear_fwd(cudaStream_t stream,
                         Tensor x,        // [M, K] bf16; rows may be strided; M <= 8, K <= 8192
                         Tensor norm,     // [K]    bf16 or f32, or None, which FP8 does not support
                         Tensor w,        // [N, K] bf16, K % 64 == 0, or e4m3, K % 128 == 0; N % 16 == 0
                         Tensor w_scale,  // [N/128, K/128] f32 with e4m3, otherwise None
                         Tensor y,        // [M, N] bf16 or f32 (out)
                         float eps);

}  // namespace ling

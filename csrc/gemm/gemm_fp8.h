#pragma once
#include "tensor.h"

namespace ling {

// d [M, N] bf16 or fp32 (+)= a [M, K] b [N, K]^T, e4m3 with a_scale [M, K/128], M contiguous, and b_scale fp32
// [N/128, K/128], or [N, K/128], N contiguous. K % 128 == 0, N % 8 == 0. transposed: a b, of b [K, N] and b_scale
// [K/128, N/128].
void gemm_fp8_fwd(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor d, bool accumulate,
                  bool transposed);

// y [S, N]: rows offsets[e] : offsets[e + 1] of a times b[e] [N, K]^T, b_scale [E, N/128, K/128], offsets [E + 1]
// int32. With source [S] int32, a is [T, K] and row s is a[source[s] / topk]. With y_scale [S, F/128], S contiguous, y
// is [S, F] e4m3, F = N / 2, and they are the quantised silu(gate) * up of the product [gate | up].
void grouped_gemm_fp8_fwd(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets,
                          Tensor source, int topk, Tensor y, Tensor y_scale, bool transposed);

// The same for a [E, max_m, K], a_scale [E, max_m, K/128], counts [E] int32 -> y [E, max_m, N].
void grouped_gemm_fp8_masked_fwd(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor counts,
                                 Tensor y);

}  // namespace ling

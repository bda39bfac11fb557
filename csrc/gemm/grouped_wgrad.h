#pragma once
#include "tensor.h"

namespace ling {

// out [E, N, K] fp32 or bf16 (+)= dy_e^T x_e over the rows offsets[e] : offsets[e + 1], int32 [E + 1]. Either, with
// columns, dy [N, S_pad] and x [K, S_pad] e4m3, whose runs of rows start at multiples of 128, with dy_scale
// [N, S_pad/128], N contiguous, and x_scale [K, S_pad/128]; or dy [S, N] and x [S, K] bf16 without scales.
// With S = 0 nothing is written.
void grouped_wgrad_fwd(cudaStream_t stream, Tensor dy, Tensor x, Tensor offsets, Tensor out, bool accumulate,
                       Tensor dy_scale, Tensor x_scale, bool columns);

}  // namespace ling

#pragma once
#include "tensor.h"

namespace ling {

// x in e4m3 with one scale per 1 x 128 and, transposed, with one per 128 x 1: either or both, from one read of x.
// With source [M], row m is x[source[m] / topk]. With offsets, rows past the last expert's are not written.
void quantize_fwd(cudaStream_t stream,
                  Tensor x,               // [M, K] (with source: any number of rows), K % 128 == 0; f32, f16 or bf16
                  Tensor x_q,             // [M, K]          e4m3 or None (out)
                  Tensor x_scale,         // [M, K/128]      f32 or None, M contiguous (out)
                  Tensor xt_q,            // [K, M_pad]      e4m3 or None, M_pad % 128 == 0 (out)
                  Tensor xt_scale,        // [K, M_pad/128]  f32 or None, K contiguous (out)
                  Tensor offsets,         // [E + 1] i32 or None: expert e's rows
                  Tensor padded_offsets,  // [E + 1] i32 or None: where they start among the columns of xt_q
                  Tensor source,          // [M] i32 or None
                  int topk, bool pow2);

// w in e4m3 with one scale per 128 x 128
void quantize_weight_fwd(cudaStream_t stream,
                         Tensor w,        // [(E,) N, K]            f32, f16 or bf16; N % 128 == K % 128 == 0
                         Tensor w_q,      // [(E,) N, K]            e4m3 (out)
                         Tensor w_scale,  // [(E,) N/128, K/128]    f32  (out)
                         bool pow2);

}  // namespace ling

#pragma once
#include "tensor.h"

namespace ling {

// y = silu(gate) * up * weights, computed in f32, for x = [gate | up]; in x's dtype, in FP8 (see quantize.h), or both;
// y and a column-wise copy (yt_q) exclude each other
void swiglu_fwd(cudaStream_t stream,
                Tensor x,         // [M, 2F]      f32, f16 or bf16; F % 8 == 0, for FP8 F % 128 == 0
                Tensor weights,   // [M]          f32 or None: 1
                Tensor y,         // [M, F]       as x, or None (out)
                Tensor y_q,       // [M, F]       e4m3 or None (out)
                Tensor y_scale,   // [M, F/128]   f32 or None, M contiguous (out)
                Tensor yt_q,      // [F, M_pad]   e4m3 or None (out)
                Tensor yt_scale,  // [F, M_pad/128] f32 or None, F contiguous (out)
                Tensor offsets,   // [E + 1] i32 or None: expert e's rows; rows past the last expert's are not written
                Tensor padded_offsets,  // [E + 1] i32 or None: the first column of each expert's rows in yt_q
                bool pow2);

void swiglu_bwd(cudaStream_t stream,
                Tensor dy,              // [M, F]        as x
                Tensor x,               // [M, 2F]       f32, f16 or bf16
                Tensor weights,         // [M]           f32 or None
                Tensor dx,              // [M, 2F]       as x, or None (out)
                Tensor dweights,        // [M]           f32 or None (out)
                Tensor dx_q,            // [M, 2F]       e4m3 or None (out)
                Tensor dx_scale,        // [M, 2F/128]   f32 or None, M contiguous (out)
                Tensor dxt_q,           // None: only the Triton kernel writes column-wise copies of dx
                Tensor dxt_scale,       // None
                Tensor offsets,         // [E + 1] i32 or None: rows past the last expert's are not written
                Tensor padded_offsets,  // None
                bool pow2);

}  // namespace ling

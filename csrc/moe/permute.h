#pragma once
#include "tensor.h"

namespace ling {

// Quantise every token's row once (quant/quantize.h) and copy it to the row of each of its choices. For column-wise
// copies see quantize_fwd with `source`.
void permute_quantize_fwd(cudaStream_t stream,
                          Tensor x,        // [T, H]     f32, f16 or bf16, H % 128 == 0
                          Tensor slot,     // [T, topk]  i32: the row of each choice; -1: none
                          Tensor x_q,      // [S, H]     e4m3 (out)
                          Tensor x_scale,  // [S, H/128] f32, S contiguous (out)
                          Tensor offsets,  // not read, like source; only the Triton kernel reads them
                          Tensor source, bool pow2);

}  // namespace ling

#pragma once
#include "tensor.h"

namespace ling {

// out[t] = sum over k of weights[t, k] * y[slot[t, k]], k ascending, product and sum rounded to fp32 one by one.
void unpermute_fwd(cudaStream_t stream,
                   Tensor y,        // [S, H]    f32, f16 or bf16
                   Tensor weights,  // [T, topk] f32 or None: all 1
                   Tensor slot,     // [T, topk] i32; -1 contributes nothing
                   Tensor out);     // [T, H]    as y (out)

// dy[slot[t, k]] = weights[t, k] * dout[t], dweights[t, k] = the inner product of y[slot[t, k]] and dout[t].
// With neither weights nor offsets this is `permute`.
void unpermute_bwd(cudaStream_t stream,
                   Tensor dout,       // [T, H]    f32, f16 or bf16
                   Tensor weights,    // [T, topk] f32 or None
                   Tensor y,          // [S, H]    as dout, or None without dweights
                   Tensor offsets,    // [E + 1]   i32 or None; with it, rows of dy from offsets[E] on become 0
                   Tensor slot,       // [T, topk] i32; -1: none
                   Tensor dy,         // [S, H]    as dout (out)
                   Tensor dweights);  // [T, topk] f32 or None (out), with weights

}  // namespace ling

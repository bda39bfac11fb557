#pragma once
#include "tensor.h"

namespace ling {

// out[t] = sum over k of weights[t, k] * y[slot[t, k]], k ascending, product and sum rounded to fp32 one by one.
void gather_sum(cudaStream_t stream,
                Tensor y,        // [S, H]    f32, f16 or bf16
                Tensor weights,  // [T, topk] f32 or None: all weights are 1
                Tensor slot,     // [T, topk] i32: rows of y; -1 contributes nothing
                Tensor out);     // [T, H]    as y (out)

// out[slot[t, k]] = weights[t, k] * x[t], dots[t, k] = the inner product of y[slot[t, k]] and x[t]. With neither
// weights nor offsets this is `permute`; with x = dout, out = dy and dots = dweights the backward of unpermute.
void scatter_rows(cudaStream_t stream,
                  Tensor x,        // [T, H]    f32, f16 or bf16
                  Tensor weights,  // [T, topk] f32 or None
                  Tensor y,        // [S, H]    as x, or None without dots
                  Tensor offsets,  // [E + 1]   i32 or None; with it, rows of out from offsets[E] on become 0
                  Tensor slot,     // [T, topk] i32: rows of out; -1: none
                  Tensor out,      // [S, H]    as x (out)
                  Tensor dots);    // [T, topk] f32 or None (out), with weights

}  // namespace ling

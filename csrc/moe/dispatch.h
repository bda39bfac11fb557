#pragma once
#include "tensor.h"

namespace ling {

// The choices (token, k) sorted by expert, stably in token order; choices that are not routed here (-1) go last.
// E <= 512.
void dispatch_fwd(cudaStream_t stream,
                  Tensor experts,  // [T, topk] i32
                  Tensor counts,   // [E]       i32: how often each expert occurs in experts
                  Tensor before,   // [any, E]  i32 or None: scratch; the more rows, the more blocks share the work
                  Tensor offsets,  // [E + 1]   i32 (out): expert e's rows
                  Tensor slot,     // [T, topk] i32 (out): the row of each choice, -1 where not routed here
                  Tensor source,   // [S]       i32 (out): the choice t * topk + k of each row
                  Tensor padded_offsets);  // [E + 1]   i32 (out): the same runs, each from a multiple of 128 on

}  // namespace ling

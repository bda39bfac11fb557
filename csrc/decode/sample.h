#pragma once
#include "tensor.h"

namespace ling {

// The next token of each row, as sample_ref of ops/sample.py defines it; -1 for a row whose largest logit is not
// finite.
void sample_fwd(cudaStream_t stream,
                Tensor logits,       // [R, V] f32, bf16 or f16, dense rows
                Tensor lanes,        // [B] i64, each of R / B rows; this and all below None for greedy rows
                Tensor positions,    // [R] i64: the row's sequence is token_ids[lane, 0 .. position]
                Tensor token_ids,    // [lanes, P] i32; negative ones count as token 0
                Tensor seeds,        // [lanes] i64
                Tensor temperature,  // [lanes] f32
                Tensor top_p, Tensor min_p, Tensor repetition_penalty,  // [lanes] f32
                Tensor top_k,                                           // [lanes] i64, 1 to V
                Tensor tokens,                                          // [R] i64
                bool random,                                            // whether a lane may have a temperature above 0
                bool penalised);                                        // whether a lane may have a repetition penalty

}  // namespace ling

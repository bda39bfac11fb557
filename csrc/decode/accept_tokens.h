#pragma once
#include "tensor.h"

namespace ling {

// Writes the tokens of a decode pass into the lanes, behind the rows that they were computed from. Lanes of length 0
// stay as they are.
void accept_tokens_fwd(cudaStream_t stream,
                       Tensor tokens,     // [B, n] i64: the token after each row
                       Tensor lanes,      // [B] i64, different ones but for those of length 0
                       Tensor positions,  // [B, n] i64 of the rows
                       Tensor token_ids,  // [lanes, P] i32 (in and out)
                       Tensor lengths,    // [lanes] i64 (in and out)
                       Tensor output,     // [B, n + 1] i64: the tokens, and the number of accepted draft tokens
                       bool lookup);      // write n - 1 draft tokens by prompt lookup behind the tokens

}  // namespace ling

#pragma once
#include "tensor.h"

namespace ling {

// The rows of a decode pass: row b * n + i is the i-th of lane lanes[b], at position max(lengths[lane] - 1 + i, 0).
void decode_inputs_fwd(cudaStream_t stream,
                       Tensor lanes,         // [B] i64
                       Tensor token_ids,     // [lanes, P] i32; a negative one counts as token 0
                       Tensor lengths,       // [lanes] i64
                       Tensor block_tables,  // [lanes, pages] i32
                       Tensor embeddings,    // [V, H]
                       Tensor x,             // [B n, H] of embeddings' dtype: those of the rows' tokens
                       Tensor positions,     // [B n] i64
                       Tensor attended,      // [B] i32: the length with the n rows, 0 for a lane of length 0
                       Tensor block_table);  // [B, width] i32: the first columns of the lanes' block tables

}  // namespace ling

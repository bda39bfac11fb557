#pragma once
#include "tensor.h"

namespace ling {

// bias += rate * (sign(mean(c) - c) - mean(sign(mean(c) - c))), every step rounded as the reference's.
void balance_bias_fwd(cudaStream_t stream,
                      Tensor bias,    // [E] f32 (in and out)
                      Tensor counts,  // [E] i32 or i64: tokens of each expert
                      float rate);

}  // namespace ling

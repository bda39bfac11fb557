// sigmoid(x) = 1 / (1 + exp(-x)) and silu(x) = x sigmoid(x), as SwiGLU needs them.
#pragma once
#include "common.cuh"

namespace ling {

// Within 2^-21 where it is not negligible, by two special functions. Exact ones would make SwiGLU compute-bound.
__device__ inline float sigmoid(float x) { return reciprocal(1 + exp2_approx(x * -1.44269504f)); }

__device__ inline float silu(float x) { return x * sigmoid(x); }

}  // namespace ling

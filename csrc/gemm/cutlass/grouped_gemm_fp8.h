#pragma once
#include "gemm/grouped_gemm_fp8_cutlass.h"

namespace ling {

// One translation unit each: they take minutes to compile.
void grouped_gemm_fp8_cooperative(cudaStream_t stream, const Groups& groups, int E);
void grouped_gemm_fp8_pingpong(cudaStream_t stream, const Groups& groups, int E);

}  // namespace ling

#pragma once
#include "gemm/cutlass/groups.h"

namespace ling {

// y[s] = a[s] b[e]^T for each expert e and the rows offsets[e] <= s < offsets[e + 1], by CUTLASS's blockwise
// collectives. Arguments as grouped_gemm_fp8_setup has them; two launches. pingpong: two warpgroups alternate, each
// with a tile of 64 rows; otherwise both share a tile of 128 rows.
void grouped_gemm_fp8(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets, Tensor y,
                      Tensor workspace, bool pingpong);

// The second launch. One translation unit each: they take minutes to compile.
void grouped_gemm_fp8_cooperative(cudaStream_t stream, const Groups& groups, int E);
void grouped_gemm_fp8_pingpong(cudaStream_t stream, const Groups& groups, int E);

}  // namespace ling

#pragma once
#include "tensor.h"

namespace ling {

// Whether the kernel below holds M rows of K in shared memory.
bool few_rows_fit(int64_t M, int64_t K);

// gemm_fp8_fwd for 1 to 8 rows and a weight [N, K] as stored. The caller has checked the arguments.
void gemm_fp8_few_rows(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor d,
                       bool accumulate);

}  // namespace ling

#include "gemm/cutlass/grouped_gemm_fp8.h"

namespace ling {

void grouped_gemm_fp8(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets, Tensor y,
                      Tensor workspace, bool pingpong) {
    grouped_gemm_fp8_setup(stream, a, a_scale, b, b_scale, offsets, y, workspace);
    const int64_t S = a.shape[0], E = b.shape[0], N = b.shape[1], K = a.shape[1];
    if (S == 0 || N == 0) return;
    (pingpong ? grouped_gemm_fp8_pingpong : grouped_gemm_fp8_cooperative)(stream, Groups(workspace.data, S, E, K), E);
}

}  // namespace ling

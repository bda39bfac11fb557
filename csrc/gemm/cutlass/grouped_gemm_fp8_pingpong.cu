#include "gemm/cutlass/grouped_gemm_fp8.cuh"

namespace ling {

struct grouped_gemm_fp8_pingpong_kernel
    : GroupedGemmFp8<64, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedPingpongFP8Blockwise,
                     cutlass::epilogue::PtrArrayTmaWarpSpecializedPingpong>::Kernel {};

void grouped_gemm_fp8_pingpong(cudaStream_t stream, const Groups& groups, int E) {
    run_grouped_gemm_fp8<grouped_gemm_fp8_pingpong_kernel>(stream, groups, E);
}

}  // namespace ling

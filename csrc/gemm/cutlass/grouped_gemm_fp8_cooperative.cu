#include "gemm/cutlass/grouped_gemm_fp8.cuh"

namespace ling {

struct grouped_gemm_fp8_cooperative_kernel
    : GroupedGemmFp8<128, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperativeFP8Blockwise,
                     cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative>::Kernel {};

void grouped_gemm_fp8_cooperative(cudaStream_t stream, const Groups& groups, int E) {
    run_grouped_gemm_fp8<grouped_gemm_fp8_cooperative_kernel>(stream, groups, E);
}

}  // namespace ling

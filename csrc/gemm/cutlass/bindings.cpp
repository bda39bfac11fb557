// The optional module ling_kernels._cutlass.
#include "bindings.h"
#include "gemm/cutlass/grouped_gemm_fp8.h"

#ifndef LING_MODULE  // tests/gpu builds _C_gpu
#define LING_MODULE _cutlass
#endif

LING_BINDINGS(m) {
    def(m, "grouped_gemm_fp8", ling::grouped_gemm_fp8);
    def(m, "grouped_gemm_fp8_workspace", ling::grouped_gemm_fp8_workspace);
}

// The optional module ling_kernels._cutlass.
#include "bindings.h"
#include "gemm/cutlass/grouped_gemm_fp8.h"

#ifndef LING_MODULE  // tests/gpu builds _C_gpu
#define LING_MODULE _cutlass
#endif

PYBIND11_MODULE(LING_MODULE, m) {
    def(m, "grouped_gemm_fp8", ling::grouped_gemm_fp8);
    m.def("grouped_gemm_fp8_workspace", ling::grouped_gemm_fp8_workspace);
}

// The optional module ling_kernels._cutlass.
#include "bindings.h"
#include "gemm/cutlass/grouped_gemm_fp8.h"

PYBIND11_MODULE(_cutlass, m) {
    def(m, "grouped_gemm_fp8", ling::grouped_gemm_fp8);
    m.def("grouped_gemm_fp8_workspace", ling::grouped_gemm_fp8_workspace);
}

// The setup kernel of CUTLASS's grouped GEMM as a module: the tests need no headers of CUTLASS for it.
#include "bindings.h"
#include "gemm/cutlass/groups.h"

LING_BINDINGS(m) {
    def(m, "grouped_gemm_fp8_setup", ling::grouped_gemm_fp8_setup);
    def(m, "grouped_gemm_fp8_workspace", ling::grouped_gemm_fp8_workspace);
}

// The arrays that describe every group of rows to CUTLASS.
#pragma once
#include "tensor.h"

namespace ling {

// Views of the workspace, in this order, each at a multiple of 128 bytes.
struct Groups {
    float* scales;  // [S * K/128]  a's scales, group after group, each [K/128, M]: the mainloop takes the group's M as
                    //              the leading dimension and ignores the layout that it is passed
    int* shape;     // [E, 3]       M, N, K
    void **a, **b, **a_scale, **b_scale, **y;  // [E] each
    int64_t *a_stride, *b_stride, *y_stride;   // [E] each: elements from row to row
    void* scratch;                             // kScratch bytes for CUTLASS's tensor maps, five for each SM

    static constexpr int64_t kScratch = 1 << 20;
    Groups(void* workspace, int64_t S, int64_t E, int64_t K);
};

int64_t grouped_gemm_fp8_workspace(int64_t S, int64_t E, int64_t K);  // bytes

// Fills the workspace, on the device: only the device knows how many rows each expert has.
void grouped_gemm_fp8_setup(cudaStream_t stream,
                            Tensor a,           // [S, K]             e4m3
                            Tensor a_scale,     // [S, K/128]         f32, stride 1 along S
                            Tensor b,           // [E, N, K]          e4m3
                            Tensor b_scale,     // [E, N/128, K/128]  f32
                            Tensor offsets,     // [E + 1]            i32
                            Tensor y,           // [S, N]             bf16, whose address is noted
                            Tensor workspace);  // [grouped_gemm_fp8_workspace(S, E, K)] u8 (out)

}  // namespace ling

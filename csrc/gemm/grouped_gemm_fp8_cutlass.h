#pragma once
#include "tensor.h"

namespace ling {

// y[s] = a[s] b[e]^T for each expert e and the rows offsets[e] <= s < offsets[e + 1], by CUTLASS's blockwise
// collectives: tiles of 128 rows that two warpgroups share, or of 64 rows for each of two that take turns (pingpong).
// Two launches.
void grouped_gemm_fp8_cutlass(cudaStream_t stream,
                              Tensor a,          // [S, K]             e4m3
                              Tensor a_scale,    // [S, K/128]         f32, stride 1 along S
                              Tensor b,          // [E, N, K]          e4m3
                              Tensor b_scale,    // [E, N/128, K/128]  f32
                              Tensor offsets,    // [E + 1]            i32
                              Tensor y,          // [S, N]             bf16 (out)
                              Tensor workspace,  // [grouped_gemm_fp8_workspace(S, E, K)] u8 (scratch)
                              bool pingpong);

int64_t grouped_gemm_fp8_workspace(int64_t S, int64_t E, int64_t K);  // bytes

// The first of the two launches: fills the workspace. Only the device knows how many rows an expert has.
void grouped_gemm_fp8_setup(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets,
                            Tensor y, Tensor workspace);

// What CUTLASS reads of every group, an array for each kind: views of the workspace, in this order.
struct Groups {
    float* scales;  // [S * K/128]  a's scales, group after group, each [K/128, M]: its mainloop takes the leading
                    //              dimension to be the group's M, and does not look at the layout that it is given
    int* shape;     // [E, 3]       M, N, K
    void **a, **b, **a_scale, **b_scale, **y;  // [E] each
    int64_t *a_stride, *b_stride, *y_stride;   // [E] each: elements from row to row
    void* rest;                                // kRest bytes for its tensor maps, five for each SM

    static constexpr int64_t kRest = 1 << 20;
    Groups(void* workspace, int64_t S, int64_t E, int64_t K);
};

}  // namespace ling

// A row in registers, normed and quantised: the same bits in every kernel that norms.
#pragma once
#include "common.cuh"
#include "quant/fp8_tile.cuh"

namespace ling {
namespace {

// A row belongs to `warps` warps of a block, a power of two, and stays in their registers, kVectors vectors of 8
// elements in a lane: vector i of a lane is vector i * 32 * warps + lane of the row. Half a warp has 128 columns, one
// FP8 scale.
constexpr int kMaxN = 8192, kRowThreads = 256, kRowVectors = 4;

template <int kVectors> __device__ int column_of(int i, int warps) {
    const int thread = threadIdx.x;
    return 8 * (32 * (i * warps + (thread / 32 & (warps - 1))) + thread % 32);
}

inline int warps_of(int64_t N, int vectors) {
    int warps = 1;
    while (warps * 32 * vectors * 8 < N) warps *= 2;
    return warps;
}

// The sum over the warps of a row. Consecutive calls need different `part`s: a fast warp may be one call ahead.
__device__ inline float row_sum(float x, int warps, float (&part)[32]) {
    x = warp_sum(x);
    if (warps == 1) return x;
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) part[warp] = x;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < warps; i++) sum += part[(warp & -warps) + i];
    return sum;
}

// 1 / sqrt(mean(v^2) + eps) of the row of N columns, v zero outside of it
__device__ inline float row_rstd(const Vec<8> (&v)[kRowVectors], int N, int warps, float eps, float (&part)[32]) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kRowVectors; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) sum += v[i][j] * v[i][j];
    return rsqrtf(row_sum(sum, warps, part) / N + eps);
}

// Calls store_codes(column, the codes of 8 columns) for every vector of a lane, and store_scale(column, scale) once for
// every 128 columns. v is zero outside of the row; all lanes of a warp call this.
template <typename Codes, typename Scale>
__device__ void quantize_row(const Vec<8> (&v)[kRowVectors], int warps, Codes&& store_codes, Scale&& store_scale) {
    unsigned amax[kRowVectors];
#pragma unroll
    for (int i = 0; i < kRowVectors; i++) amax[i] = amax8(v[i].v);
    const float scale = block_scale(amax_of_rows(amax), false);  // in lane i: of vector i
    const Quotient<false> divide(scale);
    const bool any_tiny = __any_sync(~0u, divide.is_tiny());
    if (const int lane = threadIdx.x % 16; lane < kRowVectors) store_scale(column_of<kRowVectors>(lane, warps), scale);
#pragma unroll
    for (int i = 0; i < kRowVectors; i++)
        store_codes(column_of<kRowVectors>(i, warps), encode8(v[i].v, divide.of_lane(i, 16), any_tiny));
}

}  // namespace
}  // namespace ling

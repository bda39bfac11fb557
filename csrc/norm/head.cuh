// RMS norm of a head of 128 and rotation of its first 64 dims, by half a warp.
#pragma once
#include "common.cuh"

namespace ling {

// Lane l has dims 8 l .. 8 l + 7. Dim i < 32 is rotated with dim i + 32, so lane l < 8 with lane l ^ 4.
constexpr int kDim = 128, kHalf = 32, kLanes = 16, kVec = kDim / kLanes;

__device__ inline float head_sum(float x) {
#pragma unroll
    for (int d = kLanes / 2; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
}

// cos and sin for the dims of this lane: 0 unless the token is real, NaN for a position outside the tables.
struct Angles {
    Vec<kVec> cos, sin;
    __device__ Angles(const float* cos_table, const float* sin_table, int64_t position, int P, bool real) {
        const int lane = threadIdx.x % kLanes;
        const bool in_table = position >= 0 && position < P;
        const float missing = real && !in_table ? __int_as_float(0x7fffffff) : 0.f;
#pragma unroll
        for (int j = 0; j < kVec; j++) cos[j] = sin[j] = missing;
        if (lane < 8 && real && in_table) {
            cos = load<kVec>(cos_table + position * kHalf + lane % 4 * kVec);
            sin = load<kVec>(sin_table + position * kHalf + lane % 4 * kVec);
        }
    }
    // (a, b) -> (a cos - b sin, b cos + a sin), or its transpose
    __device__ void rotate(Vec<kVec>& y, bool back) const {
        const int lane = threadIdx.x % kLanes;
        const bool minus = (lane < 4) != back;
#pragma unroll
        for (int j = 0; j < kVec; j++) {
            const float partner = __shfl_xor_sync(~0u, y[j], 4);
            if (lane < 8) y[j] = y[j] * cos[j] + (minus ? -partner : partner) * sin[j];
        }
    }
};

__device__ inline float rstd_of(const Vec<kVec>& x, float eps) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kVec; j++) sum += x[j] * x[j];
    return rsqrtf(head_sum(sum) / kDim + eps);
}

__device__ inline void norm_and_rotate(Vec<kVec>& x, const Vec<kVec>& w, const Angles& angles, float eps) {
    const float r = rstd_of(x, eps);
#pragma unroll
    for (int j = 0; j < kVec; j++) x[j] = x[j] * r * w[j];
    angles.rotate(x, false);
}

}  // namespace ling

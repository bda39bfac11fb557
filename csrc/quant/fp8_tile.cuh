// A 128 x 128 tile in the registers of 512 threads, quantised to FP8 along rows and along columns.
#pragma once
#include "quant/fp8.cuh"

namespace ling {
namespace {

constexpr int kBlock = 128, kTileThreads = 512;

// Thread t holds rows 4 (t / 16) + i and columns 8 (t % 16) + j: half a warp holds whole rows, in 16-byte vectors.
template <typename T> struct Tile {
    alignas(16) T v[4][8];
};

template <typename T> __device__ void load8(T (&v)[8], const T* p) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof v / 16); i++)
        reinterpret_cast<uint4*>(v)[i] = reinterpret_cast<const uint4*>(p)[i];
}

template <typename T> __device__ void clear8(T (&v)[8]) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof v / 16); i++) reinterpret_cast<uint4*>(v)[i] = {};
}

template <typename T> __device__ unsigned amax8(const T (&v)[8]) {
    unsigned amax = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) amax = max(amax, abs_bits(static_cast<float>(v[j])));
    return amax;
}

template <bool kPow2, typename T> __device__ uint2 encode8(const T (&v)[8], const Quotient<kPow2>& divide) {
    float q[8];
#pragma unroll
    for (int j = 0; j < 8; j++) q[j] = divide(static_cast<float>(v[j]));
    return {to_e4m3x4(q[0], q[1], q[2], q[3]), to_e4m3x4(q[4], q[5], q[6], q[7])};
}

// Returns the largest a[i] of 16 lanes, in lanes with lane % N == i. Each step halves the rows a lane keeps.
template <int N> __device__ unsigned amax_of_rows(unsigned (&a)[N]) {
    const int lane = threadIdx.x % 16;
#pragma unroll
    for (int n = N / 2; n; n /= 2)
#pragma unroll
        for (int i = 0; i < n; i++) {
            const unsigned sent = lane & n ? a[i] : a[i + n], own_max = lane & n ? a[i + n] : a[i];
            a[i] = max(own_max, __shfl_xor_sync(~0u, sent, n));
        }
#pragma unroll
    for (int n = N; n < 16; n *= 2) a[0] = max(a[0], __shfl_xor_sync(~0u, a[0], n));
    return a[0];
}

// Quantise N rows of 128 elements, of which a lane of half a warp holds 8 each. Stores min(N, rows) rows starting at
// `row`, columns 128 k ... 128 k + 127, of x_q [., K] and their scales to x_scale [., K/128], strides 1 and ld_scale.
template <bool kPow2, int N, typename T>
__device__ void store_rows(const T (&v)[N][8], int64_t row, int rows, int k, uint8_t* x_q, float* x_scale, int K,
                           int64_t ld_scale) {
    const int lane = threadIdx.x % 16;
    unsigned amax[N];
#pragma unroll
    for (int i = 0; i < N; i++) amax[i] = amax8(v[i]);
    const float scale = block_scale(amax_of_rows(amax), kPow2), inverse = 1.f / scale;
    if (lane < N && lane < rows) x_scale[k * ld_scale + row + lane] = scale;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const Quotient<kPow2> divide(__shfl_sync(~0u, scale, i, 16), __shfl_sync(~0u, inverse, i, 16));
        const uint2 codes = encode8(v[i], divide);
        if (i < rows) *reinterpret_cast<uint2*>(x_q + (row + i) * K + k * kBlock + 8 * lane) = codes;
    }
}

// Quantise tile number `tile` of 128 rows, columns 128 k ... 128 k + 127, to xt_q [K, M_pad] and xt_scale
// [K, M_pad/128], strides 1 and K. Rows that do not exist must be zero in the tile.
template <bool kPow2, typename T>
__device__ void store_columns(const Tile<T>& x, int tile, int k, uint8_t* xt_q, float* xt_scale, int K, int64_t M_pad) {
    __shared__ __align__(16) unsigned amax[kTileThreads / 32][kBlock];
    __shared__ __align__(16) float scale[kBlock], inverse[kBlock];
    __shared__ __align__(16) unsigned codes[kBlock][kBlock / 4];
    const int t = threadIdx.x, tx = t % 16, ty = t / 16;

    // Columns 0..3 of the eight go to the lower half of the warp, the others to the upper one.
    unsigned a[8] = {};
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] = max(a[j], abs_bits(static_cast<float>(x.v[i][j])));
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const unsigned sent = ty % 2 ? a[j] : a[j + 4], own_max = ty % 2 ? a[j + 4] : a[j];
        a[j] = max(own_max, __shfl_xor_sync(~0u, sent, 16));
    }
    *reinterpret_cast<uint4*>(&amax[t / 32][8 * tx + ty % 2 * 4]) = {a[0], a[1], a[2], a[3]};
    __syncthreads();
    if (t < kBlock) {
        unsigned most = 0;
        for (const auto& warp : amax) most = max(most, warp[t]);
        scale[t] = block_scale(most, kPow2), inverse[t] = 1.f / scale[t];
        xt_scale[static_cast<int64_t>(tile) * K + k * kBlock + t] = scale[t];
    }
    __syncthreads();

    // Word r of column c, which is rows 4 r..4 r + 3, lies at r ^ c / 8 * 2: no bank conflicts on either side.
#pragma unroll
    for (int j0 = 0; j0 < 8; j0 += 4) {
        const Vec<4> s = load<4>(scale + 8 * tx + j0), inv = load<4>(inverse + 8 * tx + j0);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const Quotient<kPow2> divide(s[j], inv[j]);
            float q[4];
#pragma unroll
            for (int i = 0; i < 4; i++) q[i] = divide(static_cast<float>(x.v[i][j0 + j]));
            codes[8 * tx + j0 + j][ty ^ 2 * tx] = to_e4m3x4(q[0], q[1], q[2], q[3]);
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = t; i < kBlock * 8; i += kTileThreads) {
        const int c = i / 8, r = i % 8, group = c / 8;
        uint4 out = *reinterpret_cast<const uint4*>(&codes[c][4 * (r ^ group / 2)]);
        if (group % 2) out = {out.z, out.w, out.x, out.y};
        *reinterpret_cast<uint4*>(xt_q + (k * kBlock + c) * M_pad + tile * int64_t{kBlock} + 16 * r) = out;
    }
}

// A tile has the rows first ... first + count - 1 of x, at most 128 of them; live: an expert owns it.
struct TileRows {
    int first, count;
    bool live;
};

// Without padded_offsets, tiles cover the rows of x up to M or, with a plan's offsets, up to its last routed slot.
// Otherwise `tile` counts 128 columns of a column-wise copy, in which every expert starts a new tile.
__device__ inline TileRows tile_rows(int tile, int M, const int* offsets, const int* padded_offsets, int E) {
    const int start = tile * kBlock;
    if (!padded_offsets) {
        const int end = offsets ? offsets[E] : M;
        return {start, end - start, start < end};
    }
    int expert = 0;  // the first whose run ends after `start`
    for (int e = threadIdx.x; e - static_cast<int>(threadIdx.x) < E; e += kTileThreads)
        expert += __syncthreads_count(e < E && padded_offsets[e + 1] <= start);
    if (expert == E) return {0, 0, false};
    const int first = offsets[expert] + start - padded_offsets[expert];
    return {first, offsets[expert + 1] - first, true};
}

}  // namespace
}  // namespace ling

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

// A word of 32 bits holds kPerWord elements. Their absolute values are compared a word at a time.
template <typename T> constexpr int kPerWord = 4 / sizeof(T);
template <typename T> constexpr int kWords = 8 / kPerWord<T>;

template <typename T> __device__ unsigned word_of(const T (&v)[8], int i) {
    return reinterpret_cast<const unsigned*>(v)[i];
}

// The larger absolute value of each element, with any sign; NaN where one is NaN
template <typename T> __device__ unsigned larger(unsigned a, unsigned b) {
    if constexpr (kPerWord<T> == 2) return max_abs_or_nan<dtype_of<T> == DType::bf16>(a, b);
    else return __float_as_uint(max_or_nan(fabsf(__uint_as_float(a)), fabsf(__uint_as_float(b))));
}

// abs_bits of element i of a word
template <typename T> __device__ unsigned bits_of(unsigned word, int i) {
    if constexpr (kPerWord<T> == 1) return word & 0x7fffffff;
    else if constexpr (dtype_of<T> == DType::bf16) return (i ? word : word << 16) & 0x7fff0000;
    else return abs_bits(__half2float(__ushort_as_half(i ? word >> 16 : word & 0xffff)));
}

// The largest |v[i]| as abs_bits
template <typename T> __device__ unsigned amax8(const T (&v)[8]) {
    unsigned most = word_of(v, 0);
#pragma unroll
    for (int i = 1; i < kWords<T>; i++) most = larger<T>(most, word_of(v, i));
    return max(bits_of<T>(most, 0), bits_of<T>(most, 1));
}

template <bool kPow2, typename T> __device__ uint2 encode8(const T (&v)[8], const Quotient<kPow2, T>& divide,
                                                           bool any_tiny) {
    float q[8];
#pragma unroll
    for (int j = 0; j < 8; j++) q[j] = static_cast<float>(v[j]);
    divide(q, any_tiny);
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
    const float scale = block_scale(amax_of_rows(amax), kPow2);
    if (lane < N && lane < rows) x_scale[k * ld_scale + row + lane] = scale;
    const Quotient<kPow2, T> divide(scale);
    const bool any_tiny = divide.kLifts && __any_sync(~0u, divide.is_tiny());
    x_q += row * K + k * kBlock + 8 * lane;
#pragma unroll
    for (int i = 0; i < N; i++, x_q += K) {
        const uint2 codes = encode8(v[i], divide.of_lane(i, 16), any_tiny);
        if (i < rows) *reinterpret_cast<uint2*>(x_q) = codes;
    }
}

// Quantise tile number `tile` of 128 rows, columns 128 k ... 128 k + 127, to xt_q [K, M_pad] and xt_scale
// [K, M_pad/128], strides 1 and K. Rows that do not exist must be zero in the tile.
template <bool kPow2, typename T>
__device__ void store_columns(const Tile<T>& x, int tile, int k, uint8_t* xt_q, float* xt_scale, int K, int64_t M_pad) {
    constexpr int kHalf = kWords<T> / 2;  // words with the amax of 4 columns
    constexpr int kUpper = 80;            // where the second 64 columns begin: 16 banks beside the first
    __shared__ __align__(16) unsigned amax[kTileThreads / 32][(kUpper + 64) / kPerWord<T>];
    __shared__ __align__(16) float divisor[kUpper + 64], inverse[kUpper + 64];
    __shared__ __align__(16) unsigned codes[kBlock][kBlock / 4];
    const int t = threadIdx.x, tx = t % 16, ty = t / 16;

    // Columns 0..3 of the eight go to the lower half of the warp, the others to the upper one. Shared memory has the
    // former of all eights before the latter: no bank conflicts.
    unsigned a[kWords<T>];
#pragma unroll
    for (int j = 0; j < kWords<T>; j++) {
        a[j] = word_of(x.v[0], j);
#pragma unroll
        for (int i = 1; i < 4; i++) a[j] = larger<T>(a[j], word_of(x.v[i], j));
    }
#pragma unroll
    for (int j = 0; j < kHalf; j++) {
        const unsigned sent = ty % 2 ? a[j] : a[j + kHalf], own_max = ty % 2 ? a[j + kHalf] : a[j];
        a[j] = larger<T>(own_max, __shfl_xor_sync(~0u, sent, 16));
    }
#pragma unroll
    for (int j = 0; j < kHalf; j++) amax[t / 32][(kUpper / 4 * (ty % 2) + tx) * kHalf + j] = a[j];
    __syncthreads();
    if (t < kBlock) {
        const int at = kUpper * (t / 4 % 2) + t / 8 * 4 + t % 4;  // of column t
        unsigned most = 0;
#pragma unroll
        for (const auto& warp : amax) most = larger<T>(most, warp[at / kPerWord<T>]);
        const float scale = block_scale(bits_of<T>(most, at % kPerWord<T>), kPow2);
        const Quotient<kPow2, T> divide(scale);
        divisor[at] = divide.divisor, inverse[at] = divide.inverse;
        xt_scale[static_cast<int64_t>(tile) * K + k * kBlock + t] = scale;
    }
    __syncthreads();

    // Word r of column c, which is rows 4 r..4 r + 3, lies at r ^ c / 8 * 2: no bank conflicts on either side.
#pragma unroll
    for (int j0 = 0; j0 < 8; j0 += 4) {
        const Vec<4> d = load<4>(divisor + kUpper / 4 * j0 + 4 * tx), inv = load<4>(inverse + kUpper / 4 * j0 + 4 * tx);
        const auto divide = [&](int j) { return Quotient<kPow2, T>(d[j], inv[j]); };
        const bool tiny = divide(0).is_tiny() || divide(1).is_tiny() || divide(2).is_tiny() || divide(3).is_tiny();
        const bool any_tiny = divide(0).kLifts && __any_sync(~0u, tiny);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float q[4];
#pragma unroll
            for (int i = 0; i < 4; i++) q[i] = static_cast<float>(x.v[i][j0 + j]);
            divide(j)(q, any_tiny);
            codes[8 * tx + j0 + j][ty ^ 2 * tx] = to_e4m3x4(q[0], q[1], q[2], q[3]);
        }
    }
    __syncthreads();
    const int r = t % 8, group = t / 64;  // a thread stores 16 rows of two columns, 64 apart
    uint8_t* to = xt_q + (k * kBlock + t / 8) * M_pad + tile * int64_t{kBlock} + 16 * r;
#pragma unroll
    for (int i = 0; i < 2; i++, to += 64 * M_pad) {
        uint4 out = *reinterpret_cast<const uint4*>(&codes[t / 8 + 64 * i][4 * (r ^ (group / 2 + 4 * i))]);
        if (group % 2) out = {out.z, out.w, out.x, out.y};
        *reinterpret_cast<uint4*>(to) = out;
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

// Epilogues of the FP8 GEMM: plain stores, accumulation into y, and quantised SwiGLU.
#pragma once
#include "gemm/tiles.cuh"
#include "moe/silu.cuh"

namespace ling::gemm_fp8 {

// With accumulate, add y, of T, to the sums. Store results of fp32: 4 lanes hold 32 bytes of a row.
template <typename V, typename T>
__device__ void finish_in_place(const Problem& p, const Tile& t, float (&sum)[V::kHalves][V::kRegs]) {
    constexpr bool kFp32 = dtype_of<T> == DType::f32;
    constexpr int kBatch = V::kRegs < 32 ? V::kRegs : 32;  // results whose old values load at once
    constexpr int kNeighbours = V::kSwap ? 1 : 2;          // results of a thread that are neighbours in y
    const Place place;
    const int row = 64 * place.warpgroup + place.row;
    const int m = V::kSwap ? place.column : row, n = V::kSwap ? row : place.column;  // of the thread's first result
    const int rows = t.rows - m, columns = p.N - t.n - n;                            // that exist from there on
    T* const y = static_cast<T*>(p.y) + t.group * p.y_g + (t.m + m) * p.y_m + t.n + n;
#pragma unroll
    for (int i = 0; i < V::kHalves * V::kRegs; i += kBatch) {
        float* const d = sum[i / V::kRegs] + i % V::kRegs;
        const auto each = [&](auto&& f) {
#pragma unroll
            for (int j = 0; j < kBatch; j += kNeighbours) {
                const int r = i % V::kRegs + j, down = (r & 2) * 4, right = r / 4 * 8 + (r & 1);
                const int dm = V::kSwap ? right : down, dn = i / V::kRegs * 128 + (V::kSwap ? down : right);
                if (dm < rows && dn < columns) f(j, y + dm * p.y_m + dn);
            }
        };
        if (p.accumulate) {
            unsigned old[kBatch] = {};  // not yet converted: nothing waits for a load before all have started
            each([&](int j, const T* from) {
                if constexpr (kFp32 && V::kSwap) old[j] = *reinterpret_cast<const unsigned*>(from);
                else if constexpr (kFp32) {
                    const uint2 two = *reinterpret_cast<const uint2*>(from);
                    old[j] = two.x, old[j + 1] = two.y;
                } else if constexpr (V::kSwap) old[j] = *reinterpret_cast<const uint16_t*>(from);
                else old[j] = *reinterpret_cast<const unsigned*>(from);
            });
#pragma unroll
            for (int j = 0; j < kBatch; j++) {
                const unsigned word = kFp32 || j % kNeighbours == 0 ? old[j] : old[j - 1];
                d[j] += __uint_as_float(kFp32 ? word : j % kNeighbours ? word & 0xffff0000 : word << 16);
            }
        }
        if constexpr (kFp32)
            each([&](int j, float* to) {
                if constexpr (V::kSwap) *to = d[j];
                else *reinterpret_cast<float2*>(to) = {d[j], d[j + 1]};
            });
    }
}

// Copy 16 bytes of a staged line of 128 bytes to the row that starts at `to`.
__device__ inline void store_chunk(const uint8_t* lines, int line, int chunk, uint8_t* to) {
    *reinterpret_cast<uint4*>(to + chunk * 16) = *reinterpret_cast<const uint4*>(lines + swizzled(line, chunk));
}

// Tokens are the rows of the warpgroup's product; each warp owns 16 of them.
template <typename V>
__device__ void write_rows(Shared<V>& s, const Problem& p, const Tile& t, const float (&sum)[V::kHalves][V::kRegs]) {
    const Place place;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = lane / 4, first = 16 * warp;
    uint8_t* lines = s.staging + warp * 16 * 128;
    if constexpr (V::kSwiglu) {
#pragma unroll
        for (int i = 0; i < 2; i++) {  // the upper row, and the lower
            float y[32];
#pragma unroll
            for (int j = 0; j < 32; j++) {
                const int r = j / 2 * 4 + 2 * i + j % 2;
                y[j] = silu(sum[0][r]) * sum[1][r];
            }
            unsigned largest = largest_bits(y);
            largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
            const float scale = block_scale(largest, false);
            const Quotient<false> divide(scale);
            divide(y, divide.is_tiny());
            const int row = line + 8 * i, m = first + row;
#pragma unroll
            for (int j = 0; j < 16; j++) {
                *reinterpret_cast<uint16_t*>(lines + swizzled(row, j / 2) + j % 2 * 8 + place.column) =
                    to_e4m3x2(y[2 * j], y[2 * j + 1]);
            }
            if (lane % 4 == 0 && m < t.rows) p.y_scale[t.n / 128 * p.y_scale_k + t.m + m] = scale;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = 4 * i + lane / 8;
            if (first + row < t.rows)
                store_chunk(lines, row, lane % 8, static_cast<uint8_t*>(p.y) + (t.m + first + row) * p.y_m + t.n);
        }
        __syncwarp();
    } else {
#pragma unroll
        for (int part = 0; part < 2 * V::kHalves; part++) {  // 64 columns each
            const int n = t.n + 64 * part;
            if (n >= p.N) break;
            store_rows(lines, sum[part / 2] + part % 2 * 32, p.N - n, [&](int row) -> bf16* {
                if (first + row >= t.rows) return nullptr;
                return static_cast<bf16*>(p.y) + t.group * p.y_g + (t.m + first + row) * p.y_m + n;
            });
        }
    }
}

// The largest a[i] of this lane and lane ^ mask. Each keeps n of 2 n of them, or both keep the only one; returns the
// number of the first one kept.
template <int n, int N> __device__ int larger_half(unsigned (&a)[N], int mask) {
    const bool upper = threadIdx.x & mask;
    if constexpr (n == 0) a[0] = max(a[0], __shfl_xor_sync(~0u, a[0], mask));
#pragma unroll
    for (int i = 0; i < n; i++) {
        const unsigned low = a[i], high = a[i + n];
        a[i] = max(upper ? high : low, __shfl_xor_sync(~0u, upper ? low : high, mask));
    }
    return upper ? n : 0;
}

// Tokens are the columns of the product. Staging lines are tokens; one warpgroup fills a line, or both for FP8.
template <typename V>
__device__ void write_columns(Shared<V>& s, const Problem& p, const Tile& t, const float (&sum)[V::kHalves][V::kRegs]) {
    const Place place;
    const int thread = threadIdx.x;
    if constexpr (V::kSwiglu) {
        unsigned* const largest = reinterpret_cast<unsigned*>(s.staging + V::kBlockM * 128);
        Quotient<false>* const quotients = reinterpret_cast<Quotient<false>*>(largest + V::kBlockM);
        const auto token_of = [&](int i) { return i / 2 * 8 + place.column + i % 2; };  // of a thread's column i
        float y[V::kRegs / 2][2];                                                       // by column
        unsigned bits[V::kRegs / 2];
        if (thread < V::kBlockM) largest[thread] = 0;
        named_barrier(1, kConsumers);
#pragma unroll
        for (int i = 0; i < V::kRegs / 2; i++) {
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int r = i / 2 * 4 + i % 2 + 2 * j;
                y[i][j] = silu(sum[0][r]) * sum[1][r];
            }
            bits[i] = largest_bits(y[i]);
        }
        int first = larger_half<V::kRegs / 4>(bits, 16);  // over the 8 lanes of these columns
        first += larger_half<V::kRegs / 8>(bits, 8), first += larger_half<V::kRegs / 16>(bits, 4);
#pragma unroll
        for (int i = 0; i < ceil_div(V::kRegs / 2, 8); i++) atomicMax(largest + token_of(first + i), bits[i]);
        named_barrier(1, kConsumers);
        if (thread < V::kBlockM) {
            const float scale = block_scale(largest[thread], false);
            quotients[thread] = Quotient<false>(scale);
            if (thread < t.rows) p.y_scale[t.n / 128 * p.y_scale_k + t.m + thread] = scale;
        }
        named_barrier(1, kConsumers);
#pragma unroll
        for (int i = 0; i < V::kRegs / 2; i++) {
            const int token = token_of(i), f = 64 * place.warpgroup + place.row;
            const Quotient<false> divide = quotients[token];
            divide(y[i], divide.is_tiny());
            const unsigned codes = to_e4m3x2(y[i][0], y[i][1]);
            s.staging[swizzled(token, f / 16) + f % 16] = codes;
            s.staging[swizzled(token, f / 16) + f % 16 + 8] = codes >> 8;
        }
        named_barrier(1, kConsumers);
        for (int i = thread; i < t.rows * 8; i += kConsumers)
            store_chunk(s.staging, i / 8, i % 8, static_cast<uint8_t*>(p.y) + (t.m + i / 8) * p.y_m + t.n);
        named_barrier(1, kConsumers);
    } else {
        uint8_t* lines = s.staging + place.warpgroup * kStaging / 2;
#pragma unroll
        for (int h = 0; h < V::kHalves; h++) {
            const int n = t.n + 128 * h + 64 * place.warpgroup;
#pragma unroll
            for (int i = 0; i < V::kRegs; i++) {
                const int token = i / 4 * 8 + place.column + i % 2, row = place.row + (i & 2) * 4;
                *reinterpret_cast<bf16*>(lines + swizzled(token, row / 8) + row % 8 * 2) =
                    __float2bfloat16_rn(sum[h][i]);
            }
            named_barrier(1 + place.warpgroup, 128);
            for (int i = thread % 128; i < t.rows * 8; i += 128)
                if (n + i % 8 * 8 < p.N)
                    store_chunk(lines, i / 8, i % 8,
                                reinterpret_cast<uint8_t*>(static_cast<bf16*>(p.y) + (t.m + i / 8) * p.y_m + n));
            named_barrier(1 + place.warpgroup, 128);
        }
    }
}

}  // namespace ling::gemm_fp8

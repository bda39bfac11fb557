// Epilogues of the FP8 GEMM: plain stores, accumulation into y, and quantised SwiGLU.
#pragma once
#include "gemm/tiles.cuh"
#include "moe/silu.cuh"

namespace ling::gemm_fp8 {

// f(j, exists, place in y) for each of the thread's results first + j of half h, j < kBatch; for neighbours once.
template <typename V, typename T, typename F>
__device__ void each_result(const Problem& p, const Tile& t, int h, int first, F&& f) {
    const Place<V> place;
    const int row = 64 * place.warpgroup + place.row;
    const int m = V::kSwap ? place.column : row, n = V::kSwap ? row : place.column;  // of the thread's first result
    const int rows = t.rows - m, columns = p.N - t.n - n;                            // that exist from there on
    T* const y = static_cast<T*>(p.y) + t.group * p.y_g + (t.m + m) * p.y_m + t.n + n;
#pragma unroll
    for (int j = 0; j < V::kBatch; j++) {
        if (V::kNeighbours == 2 && (j & V::kNext)) continue;
        const int r = first + j, down = (r & 2) / 2 * V::kBelow, right = r / 4 * 8 + (r & 1);
        const int dm = V::kSwap ? right : down, dn = h * 128 + (V::kSwap ? down : right);
        f(j, dm < rows && dn < columns, y + dm * p.y_m + dn);
    }
}

// Add y, of T, to a batch of sums d, if `adds`; else -0, which changes none. By adding always, results are new numbers,
// whose place in registers does not bind that of the sums in the main loop.
template <typename V, typename T>
__device__ void add_old(const Problem& p, const Tile& t, int h, int first, bool adds, float* d) {
    constexpr bool kFp32 = dtype_of<T> == DType::f32;
    unsigned old[V::kBatch];  // not yet converted: nothing waits for a load before all have started
#pragma unroll
    for (int j = 0; j < V::kBatch; j++) old[j] = kFp32 ? 0x80000000 : 0x80008000;
    if (adds)
        each_result<V, T>(p, t, h, first, [&](int j, bool exists, const T* from) {
            if constexpr (kFp32 && V::kNeighbours == 2) {
                uint2 two{old[j], old[j + V::kNext]};
                load_if(exists, from, two);
                old[j] = two.x, old[j + V::kNext] = two.y;
            } else if constexpr (!kFp32 && V::kNeighbours == 1) {
                uint16_t one = old[j];
                load_if(exists, from, one);
                old[j] = one;
            } else load_if(exists, from, old[j]);
        });
#pragma unroll
    for (int j = 0; j < V::kBatch; j++) {
        const bool second = V::kNeighbours == 2 && (j & V::kNext);
        const unsigned word = !kFp32 && second ? old[j - V::kNext] : old[j];
        d[j] += __uint_as_float(kFp32 ? word : second ? word & 0xffff0000 : word << 16);
    }
}

// Store results of fp32, with accumulate added to y: 4 lanes hold 32 bytes of a row.
template <typename V>
__device__ void write_fp32(const Problem& p, const Tile& t, float (&sum)[V::kHalves][V::kRegs]) {
#pragma unroll
    for (int i = 0; i < V::kHalves * V::kRegs; i += V::kBatch) {
        const int h = i / V::kRegs, first = i % V::kRegs;
        float* const d = sum[h] + first;
        add_old<V, float>(p, t, h, first, p.accumulate, d);
        each_result<V, float>(p, t, h, first, [&](int j, bool exists, float* to) {
            const unsigned one = __float_as_uint(d[j]);
            if constexpr (V::kNeighbours == 1) store_if(exists, to, one);
            else store_if(exists, to, uint2{one, __float_as_uint(d[j + V::kNext])});
        });
    }
}

// Copy 16 bytes of a staged line of 128 bytes to the row that starts at `to`.
__device__ inline void store_chunk(const uint8_t* lines, int line, int chunk, uint8_t* to) {
    *reinterpret_cast<uint4*>(to + chunk * 16) = *reinterpret_cast<const uint4*>(lines + swizzled(line, chunk));
}

// Tokens are the rows of the warpgroup's product; each warp owns 16 of them.
template <typename V, bool kAdds>
__device__ void write_rows(Shared<V>& s, const Problem& p, const Tile& t, float (&sum)[V::kHalves][V::kRegs]) {
    const Place<V> place;
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
        bf16* const y = static_cast<bf16*>(p.y) + t.group * p.y_g + (t.m + first) * p.y_m + t.n;
#pragma unroll
        for (int part = 0; part < 2 * V::kHalves; part++) {  // 64 columns each
            float* const d = sum[part / 2] + part % 2 * 32;
            if (kAdds) add_old<V, bf16>(p, t, part / 2, part % 2 * 32, true, d);
            store_rows(lines, d, y + 64 * part, p.y_m, t.rows - first, p.N - t.n - 64 * part);
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
template <typename V, bool kAdds>
__device__ void write_columns(Shared<V>& s, const Problem& p, const Tile& t, float (&sum)[V::kHalves][V::kRegs]) {
    const Place<V> place;
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
        constexpr int kLines = V::kBlockM < 64 ? V::kBlockM : 64;  // tokens that are staged at a time
        uint8_t* const lines = s.staging + place.warpgroup * kStaging / 2;
        bf16* const y = static_cast<bf16*>(p.y) + t.m * p.y_m + t.n + 64 * place.warpgroup;
#pragma unroll
        for (int part = 0; part < V::kHalves * V::kBlockM / kLines; part++) {
            const int n = part * kLines / V::kBlockM * 128, m = part * kLines % V::kBlockM;
            float* const d = sum[n / 128] + m / 2;
            if (kAdds) add_old<V, bf16>(p, t, n / 128, m / 2, true, d);
#pragma unroll
            for (int i = 0; i < kLines / 2; i++) {
                const int token = i / 4 * 8 + place.column + i % 2, row = place.row + (i & 2) / 2 * V::kBelow;
                uint8_t* const to = lines + swizzled(token, row / 8) + row % 8 * 2;
                if constexpr (!V::kTransposed) *reinterpret_cast<bf16*>(to) = __float2bfloat16_rn(d[i]);
                else if (!(i & 2)) *reinterpret_cast<unsigned*>(to) = pack_bf16(d[i], d[i + 2]);
            }
            named_barrier(1 + place.warpgroup, 128);
            store_lines<kLines, 128>(lines, y + m * p.y_m + n, p.y_m, t.rows - m, p.N - t.n - 64 * place.warpgroup - n);
            named_barrier(1 + place.warpgroup, 128);
        }
    }
}

// Write a tile. Plain bf16 has a path of its own: where it meets another one, sums are moved between registers.
template <typename V>
__device__ void finish(Shared<V>& s, const Problem& p, const Tile& t, float (&sum)[V::kHalves][V::kRegs]) {
    const auto write = [&]<bool kAdds>() {
        if constexpr (V::kSwap) write_columns<V, kAdds>(s, p, t, sum);
        else write_rows<V, kAdds>(s, p, t, sum);
    };
    if constexpr (V::kSwiglu) write.template operator()<false>();
    else if (p.fp32) write_fp32<V>(p, t, sum);
    else if (p.accumulate) write.template operator()<true>();
    else write.template operator()<false>();
}

}  // namespace ling::gemm_fp8

#include "moe/swiglu.h"
#include "moe/silu.cuh"
#include "quant/fp8_tile.cuh"

namespace ling {
namespace {

// y = SwiGLU of 8 columns, from `column` on, of rows `row` + i of x, times the rows' weights. All loads are issued at
// once. Only `rows` of the N rows exist; the others give 0.
template <int N, typename T>
__device__ void gated(float (&y)[N][8], const T* x, const float* weights, int64_t row, int rows, int column, int F) {
    alignas(16) T gate[N][8], up[N][8];
#pragma unroll
    for (int i = 0; i < N; i++) {
        const T* x_row = x + (row + i) * 2 * F + column;
        i < rows ? load8(gate[i], x_row) : clear8(gate[i]);
        i < rows ? load8(up[i], x_row + F) : clear8(up[i]);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float weight = weights && i < rows ? weights[row + i] : 1;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float g = static_cast<float>(gate[i][j]);
            y[i][j] = silu(g) * static_cast<float>(up[i][j]) * weight;
        }
    }
}

template <typename T> __device__ void store_wide(T* p, const float (&v)[8]) {
    Vec<8> out;
#pragma unroll
    for (int j = 0; j < 8; j++) out[j] = v[j];
    store(p, out);
}

// Half a warp takes 4 rows of one block of 128 columns; a block of threads 32 rows of 256 columns.
template <typename T, bool kPow2>
__global__ void __launch_bounds__(256)
    swiglu_rows_kernel(const T* x, const float* weights, T* y, uint8_t* y_q, float* y_scale, const int* offsets,
                       Divisor column_tiles, int M, int F, int E, int64_t ld_scale) {
    constexpr int kRows = 4;
    const int k = column_tiles.remainder(blockIdx.x) * 2 + threadIdx.x / 16 % 2;
    const int first = column_tiles.quotient(blockIdx.x) * 8 * kRows + threadIdx.x / 32 * kRows;
    const int column = k * kBlock + threadIdx.x % 16 * 8, end = offsets ? offsets[E] : M;
    const int rows = column < F ? end - first : 0;
    float v[kRows][8];
    gated(v, x, weights, first, rows, column, F);
    if (y) {
#pragma unroll
        for (int i = 0; i < kRows; i++)
            if (i < rows) store_wide(y + int64_t{first + i} * F + column, v[i]);
    }
    if (y_q) store_rows<kPow2>(v, first, rows, k, y_q, y_scale, F, ld_scale);
}

// One thread block per 128 x 128 tile of y, which stays in registers between its quantisations.
template <typename T, bool kPow2>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 2 ? 2 : 1)
    swiglu_tiles_kernel(const T* x, const float* weights, uint8_t* y_q, float* y_scale, uint8_t* yt_q, float* yt_scale,
                        const int* offsets, const int* padded_offsets, Divisor column_tiles, int M, int F, int E,
                        int64_t ld_scale, int64_t M_pad) {
    const int tile = column_tiles.quotient(blockIdx.x), k = column_tiles.remainder(blockIdx.x);
    const auto [first, count, live] = tile_rows(tile, M, offsets, padded_offsets, E);
    if (!live) return;
    const int row = first + threadIdx.x / 16 * 4, rows = count - threadIdx.x / 16 * 4;
    const int column = k * kBlock + threadIdx.x % 16 * 8;
    Tile<float> out;  // by halves: all of gate and up would not fit into registers beside it
    gated(reinterpret_cast<float (&)[2][8]>(out.v[0]), x, weights, row, rows, column, F);
    gated(reinterpret_cast<float (&)[2][8]>(out.v[2]), x, weights, row + 2, rows - 2, column, F);
    if (y_q) store_rows<kPow2>(out.v, row, rows, k, y_q, y_scale, F, ld_scale);
    store_columns<kPow2>(out, tile, k, yt_q, yt_scale, F, M_pad);
}

// Half a warp takes 2 whole rows, block of 128 columns by block, since dweights sums over them. With g = dy weight:
// dup = g silu(gate),  dgate = g up sig (1 + gate (1 - sig)),  dweight = sum of dy silu(gate) up.
template <typename T, bool kPow2>
__global__ void __launch_bounds__(256)
    swiglu_bwd_kernel(const T* dy, const T* x, const float* weights, T* dx, float* dweights, uint8_t* dx_q,
                      float* dx_scale, const int* offsets, int M, int F, int E, int64_t ld_scale) {
    constexpr int kRows = 2;
    const int first = (blockIdx.x * 256 + threadIdx.x) / 16 * kRows, lane = threadIdx.x % 16;
    const int end = offsets ? offsets[E] : M;
    float dw[kRows] = {}, weight[kRows];
#pragma unroll
    for (int i = 0; i < kRows; i++) weight[i] = weights && first + i < end ? weights[first + i] : 1;
    for (int k = 0; k * kBlock < F; k++) {
        const int column = k * kBlock + 8 * lane, rows = column < F ? end - first : 0;
        alignas(16) T gate[kRows][8], up[kRows][8], g[kRows][8];
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const int64_t row = first + i;
            i < rows ? load8(g[i], dy + row * F + column) : clear8(g[i]);
            i < rows ? load8(gate[i], x + row * 2 * F + column) : clear8(gate[i]);
            i < rows ? load8(up[i], x + row * 2 * F + F + column) : clear8(up[i]);
        }
        float dgate[kRows][8], dup[kRows][8];
#pragma unroll
        for (int i = 0; i < kRows; i++)
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float a = static_cast<float>(gate[i][j]), b = static_cast<float>(up[i][j]);
                const float sig = sigmoid(a), d = static_cast<float>(g[i][j]), dweighted = d * weight[i];
                dw[i] += d * a * sig * b;
                dgate[i][j] = dweighted * b * sig * (1 + a * (1 - sig));
                dup[i][j] = dweighted * a * sig;
            }
        if (dx) {
#pragma unroll
            for (int i = 0; i < kRows; i++) {
                if (i >= rows) continue;
                T* dx_row = dx + int64_t{first + i} * 2 * F + column;
                store_wide(dx_row, dgate[i]);
                store_wide(dx_row + F, dup[i]);
            }
        }
        if (dx_q) {
            store_rows<kPow2>(dgate, first, rows, k, dx_q, dx_scale, 2 * F, ld_scale);
            store_rows<kPow2>(dup, first, rows, k + F / kBlock, dx_q, dx_scale, 2 * F, ld_scale);
        }
    }
    if (!dweights) return;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
#pragma unroll
        for (int d = 8; d; d /= 2) dw[i] += __shfl_xor_sync(~0u, dw[i], d);
        if (lane == 0 && first + i < end) dweights[first + i] = dw[i];
    }
}

void check_fp8(const Tensor& q, const Tensor& scale, int64_t M, int64_t K) {
    LING_CHECK(K % kBlock == 0 && q.is(DType::e4m3, {M, K}) && q.contiguous() && q.aligned());
    LING_CHECK(scale.is(DType::f32, {M, K / kBlock}) && (M <= 1 || scale.stride[0] == 1));
}

template <typename F> void dispatch_pow2(DType dtype, bool pow2, F&& f) {
    dispatch<float, f16, bf16>(
        dtype, [&]<typename T>() { pow2 ? f.template operator()<T, true>() : f.template operator()<T, false>(); });
}

}  // namespace

void swiglu_fwd(cudaStream_t stream, Tensor x, Tensor weights, Tensor y, Tensor y_q, Tensor y_scale, Tensor yt_q,
                Tensor yt_scale, Tensor offsets, Tensor padded_offsets, bool pow2) {
    const int64_t M = x.shape[0], F = x.shape[1] / 2, M_pad = yt_q.ndim ? yt_q.shape[1] : 0;
    const int64_t E = offsets.ndim ? offsets.shape[0] - 1 : 0;
    LING_CHECK(x.is(x.dtype, {M, 2 * F}) && F % 8 == 0 && M < 1ll << 31 && F < 1ll << 30 && M_pad < 1ll << 31);
    if (M == 0 || F == 0) return;
    LING_CHECK(x.contiguous() && x.aligned());
    LING_CHECK(!weights.ndim || (weights.is(DType::f32, {M}) && weights.contiguous()));
    LING_CHECK(!y.ndim || (y.is(x.dtype, {M, F}) && y.contiguous() && y.aligned()));
    LING_CHECK(!offsets.ndim || (offsets.is(DType::i32, {E + 1}) && offsets.contiguous()));
    if (y_q.ndim) check_fp8(y_q, y_scale, M, F);
    if (yt_q.ndim) {
        LING_CHECK(!y.ndim && F % kBlock == 0 && yt_q.is(DType::e4m3, {F, M_pad}) && yt_q.contiguous() &&
                   yt_q.aligned());
        LING_CHECK(M_pad % kBlock == 0 && (padded_offsets.ndim || M_pad >= M));
        LING_CHECK(yt_scale.is(DType::f32, {F, M_pad / kBlock}) && yt_scale.stride[0] == 1);
        LING_CHECK(M_pad == kBlock || yt_scale.stride[1] == F);
    }
    if (padded_offsets.ndim)
        LING_CHECK(offsets.ndim && yt_q.ndim && padded_offsets.is(DType::i32, {E + 1}) && padded_offsets.contiguous());
    const int64_t blocks = ceil_div<int64_t>(F, kBlock);
    const int64_t grid = yt_q.ndim ? M_pad / kBlock * blocks : ceil_div<int64_t>(M, 32) * ceil_div<int64_t>(blocks, 2);
    LING_CHECK(grid < 1ll << 31);
    dispatch_pow2(x.dtype, pow2, [&]<typename T, bool kPow2>() {
        if (yt_q.ndim)
            launch<swiglu_tiles_kernel<T, kPow2>>(static_cast<unsigned>(grid), kTileThreads, 0, stream, x.ptr<T>(),
                                                  weights.ptr<float>(), y_q.ptr<uint8_t>(), y_scale.ptr<float>(),
                                                  yt_q.ptr<uint8_t>(), yt_scale.ptr<float>(), offsets.ptr<int>(),
                                                  padded_offsets.ptr<int>(), Divisor(blocks), static_cast<int>(M),
                                                  static_cast<int>(F), static_cast<int>(E), y_scale.stride[1], M_pad);
        else
            launch<swiglu_rows_kernel<T, kPow2>>(
                static_cast<unsigned>(grid), 256, 0, stream, x.ptr<T>(), weights.ptr<float>(), y.ptr<T>(),
                y_q.ptr<uint8_t>(), y_scale.ptr<float>(), offsets.ptr<int>(), Divisor(ceil_div<int64_t>(blocks, 2)),
                static_cast<int>(M), static_cast<int>(F), static_cast<int>(E), y_scale.stride[1]);
    });
}

void swiglu_bwd(cudaStream_t stream, Tensor dy, Tensor x, Tensor weights, Tensor dx, Tensor dweights, Tensor dx_q,
                Tensor dx_scale, Tensor dxt_q, Tensor dxt_scale, Tensor offsets, Tensor padded_offsets, bool pow2) {
    const int64_t M = dy.shape[0], F = dy.shape[1], E = offsets.ndim ? offsets.shape[0] - 1 : 0;
    LING_CHECK(dy.is(x.dtype, {M, F}) && x.is(x.dtype, {M, 2 * F}) && F % 8 == 0 && M < 1ll << 31 && F < 1ll << 30);
    LING_CHECK(!dxt_q.ndim && !dxt_scale.ndim && !padded_offsets.ndim);
    if (M == 0 || F == 0) return;
    LING_CHECK(dy.contiguous() && dy.aligned() && x.contiguous() && x.aligned());
    LING_CHECK(!weights.ndim || (weights.is(DType::f32, {M}) && weights.contiguous()));
    LING_CHECK(!dweights.ndim || (dweights.is(DType::f32, {M}) && dweights.contiguous()));
    LING_CHECK(!dx.ndim || (dx.is(x.dtype, {M, 2 * F}) && dx.contiguous() && dx.aligned()));
    LING_CHECK(!offsets.ndim || (offsets.is(DType::i32, {E + 1}) && offsets.contiguous()));
    if (dx_q.ndim) {
        LING_CHECK(F % kBlock == 0);
        check_fp8(dx_q, dx_scale, M, 2 * F);
    }
    dispatch_pow2(x.dtype, pow2, [&]<typename T, bool kPow2>() {
        launch<swiglu_bwd_kernel<T, kPow2>>(
            static_cast<unsigned>(ceil_div<int64_t>(M, 32)), 256, 0, stream, dy.ptr<T>(), x.ptr<T>(),
            weights.ptr<float>(), dx.ptr<T>(), dweights.ptr<float>(), dx_q.ptr<uint8_t>(), dx_scale.ptr<float>(),
            offsets.ptr<int>(), static_cast<int>(M), static_cast<int>(F), static_cast<int>(E), dx_scale.stride[1]);
    });
}

}  // namespace ling

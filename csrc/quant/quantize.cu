#include "quant/quantize.h"
#include "quant/fp8_tile.cuh"

namespace ling {
namespace {

template <typename T>
__device__ const T* line(const T* x, const int* source, Divisor topk, int row, int64_t ldx) {
    return x + (source ? topk.quotient(source[row]) : row) * ldx;
}

// Half a warp takes 4 rows of one block of 128 columns and issues all loads at once. A thread block takes 32 rows of
// 256 columns, so that it reads 512 bytes of each row and writes 128 bytes of scales together.
template <typename T, bool kPow2>
__global__ void __launch_bounds__(256)
    quantize_rows_kernel(const T* x, uint8_t* x_q, float* x_scale, const int* offsets, const int* source, Divisor topk,
                         Divisor column_tiles, int64_t ldx, int M, int K, int E, int64_t ld_scale) {
    constexpr int kRows = 4;
    launch_dependents();
    wait_for_previous();
    const int lane = threadIdx.x % 16, k = column_tiles.remainder(blockIdx.x) * 2 + threadIdx.x / 16 % 2;
    const int first = column_tiles.quotient(blockIdx.x) * 8 * kRows + threadIdx.x / 32 * kRows;
    const int end = offsets ? offsets[E] : M, rows = k * kBlock < K ? end - first : 0;

    alignas(16) T v[kRows][8];
#pragma unroll
    for (int i = 0; i < kRows; i++)
        if (i < rows) load8(v[i], line(x, source, topk, first + i, ldx) + k * kBlock + 8 * lane);
        else clear8(v[i]);
    store_rows<kPow2>(v, first, rows, k, x_q, x_scale, K, ld_scale);
}

// One thread block per 128 x 128 tile, which stays in registers between its two quantisations.
template <typename T, bool kRows, bool kPow2>
__global__ void __launch_bounds__(kTileThreads, 2)
    quantize_tiles_kernel(const T* x, uint8_t* x_q, float* x_scale, uint8_t* xt_q, float* xt_scale, const int* offsets,
                          const int* padded_offsets, const int* source, Divisor topk, Divisor column_tiles, int64_t ldx,
                          int M, int K, int E, int64_t ld_scale, int64_t M_pad) {
    const int tile = column_tiles.quotient(blockIdx.x), k = column_tiles.remainder(blockIdx.x);
    const auto [first, count, live] = tile_rows(tile, M, offsets, padded_offsets, E);
    if (!live) return;
    const int row = threadIdx.x / 16 * 4, rows = count - row;
    Tile<T> in;
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < rows) load8(in.v[i], line(x, source, topk, first + row + i, ldx) + k * kBlock + threadIdx.x % 16 * 8);
        else clear8(in.v[i]);
    if constexpr (kRows) store_rows<kPow2>(in.v, first + row, rows, k, x_q, x_scale, K, ld_scale);
    store_columns<kPow2>(in, tile, k, xt_q, xt_scale, K, M_pad);
}

// One thread block per 128 x 128 block of the weight.
template <typename T, bool kPow2>
__global__ void __launch_bounds__(kTileThreads, 2)
    quantize_weight_kernel(const T* w, uint8_t* w_q, float* w_scale, int K, Divisor column_tiles) {
    __shared__ unsigned amax[kTileThreads / 32];
    const int64_t offset = (column_tiles.quotient(blockIdx.x) * int64_t{kBlock} + threadIdx.x / 16 * 4) * K +
                           column_tiles.remainder(blockIdx.x) * kBlock + threadIdx.x % 16 * 8;
    Tile<T> in;
#pragma unroll
    for (int i = 0; i < 4; i++) load8(in.v[i], w + offset + i * int64_t{K});
    unsigned most = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) most = max(most, amax8(in.v[i]));
    most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % 32 == 0) amax[threadIdx.x / 32] = most;
    __syncthreads();
    for (const unsigned warp_amax : amax) most = max(most, warp_amax);

    const float scale = block_scale(most, kPow2);
    if (threadIdx.x == 0) w_scale[blockIdx.x] = scale;
    const Quotient<kPow2, T> divide(scale);
#pragma unroll
    for (int i = 0; i < 4; i++)
        *reinterpret_cast<uint2*>(w_q + offset + i * int64_t{K}) = encode8(in.v[i], divide, divide.is_tiny());
    __threadfence();  // for a kernel that starts as this one ends and reads weights before it waits
}

template <typename F> void dispatch(DType dtype, bool pow2, F&& f) {
    dispatch<float, f16, bf16>(
        dtype, [&]<typename T>() { pow2 ? f.template operator()<T, true>() : f.template operator()<T, false>(); });
}

}  // namespace

void quantize_fwd(cudaStream_t stream, Tensor x, Tensor x_q, Tensor x_scale, Tensor xt_q, Tensor xt_scale,
                  Tensor offsets, Tensor padded_offsets, Tensor source, int topk, bool pow2) {
    const bool rows = x_q.ndim, columns = xt_q.ndim, planned = offsets.ndim, padded = padded_offsets.ndim;
    LING_CHECK(x.ndim == 2 && (rows || columns) && topk > 0);
    const int64_t M = source.ndim ? source.shape[0] : x.shape[0], K = x.shape[1], blocks = K / kBlock;
    const int64_t M_pad = columns ? xt_q.shape[1] : 0, E = planned ? offsets.shape[0] - 1 : 0;
    LING_CHECK(K % kBlock == 0 && M < 1ll << 31 && K < 1ll << 31 && M_pad < 1ll << 31);
    if (M == 0 || K == 0) return;
    LING_CHECK(!source.ndim || (source.is(DType::i32, {M}) && source.contiguous()));
    LING_CHECK(!planned || (offsets.is(DType::i32, {E + 1}) && offsets.contiguous()));
    LING_CHECK(!padded ||
               (planned && columns && padded_offsets.is(DType::i32, {E + 1}) && padded_offsets.contiguous()));
    if (rows) {
        LING_CHECK(x_q.is(DType::e4m3, {M, K}) && x_q.contiguous() && x_q.aligned());
        LING_CHECK(x_scale.is(DType::f32, {M, blocks}) && (M <= 1 || x_scale.stride[0] == 1));
    }
    if (columns) {
        LING_CHECK(xt_q.is(DType::e4m3, {K, M_pad}) && xt_q.contiguous() && xt_q.aligned());
        LING_CHECK(M_pad % kBlock == 0 && (padded || M_pad >= M) && xt_scale.is(DType::f32, {K, M_pad / kBlock}));
        LING_CHECK((K <= 1 || xt_scale.stride[0] == 1) && (M_pad <= kBlock || xt_scale.stride[1] == K));
    }
    const int64_t vector = x.dtype == DType::f32 ? 4 : 8;
    LING_CHECK(x.aligned() && x.stride[1] == 1 && (x.shape[0] == 1 || x.stride[0] % vector == 0));

    const int64_t grid = columns ? M_pad / kBlock * blocks : ceil_div<int64_t>(M, 32) * ceil_div<int64_t>(blocks, 2);
    LING_CHECK(grid < 1ll << 31);
    dispatch(x.dtype, pow2, [&]<typename T, bool kPow2>() {
        const auto tiles = [&]<bool kRows>() {
            launch<quantize_tiles_kernel<T, kRows, kPow2>>(
                grid, kTileThreads, 0, stream, x.ptr<T>(), x_q.ptr<uint8_t>(), x_scale.ptr<float>(),
                xt_q.ptr<uint8_t>(), xt_scale.ptr<float>(), offsets.ptr<int>(), padded_offsets.ptr<int>(),
                source.ptr<int>(), Divisor(topk), Divisor(blocks), x.stride[0], M, K, E, x_scale.stride[1], M_pad);
        };
        if (!columns)
            launch<quantize_rows_kernel<T, kPow2>, kOverlaps>(
                grid, 256, 0, stream, x.ptr<T>(), x_q.ptr<uint8_t>(), x_scale.ptr<float>(), offsets.ptr<int>(),
                source.ptr<int>(), Divisor(topk), Divisor(ceil_div<int64_t>(blocks, 2)), x.stride[0], M, K, E,
                x_scale.stride[1]);
        else rows ? tiles.template operator()<true>() : tiles.template operator()<false>();
    });
}

void quantize_weight_fwd(cudaStream_t stream, Tensor w, Tensor w_q, Tensor w_scale, bool pow2) {
    LING_CHECK(w.ndim == 2 || w.ndim == 3);
    const bool many = w.ndim == 3;
    const int64_t E = many ? w.shape[0] : 1, N = w.shape[w.ndim - 2], K = w.shape[w.ndim - 1];
    LING_CHECK(N % kBlock == 0 && K % kBlock == 0 && w.contiguous() && w_q.contiguous() && w_scale.contiguous());
    LING_CHECK(many ? w_q.is(DType::e4m3, {E, N, K}) && w_scale.is(DType::f32, {E, N / kBlock, K / kBlock})
                    : w_q.is(DType::e4m3, {N, K}) && w_scale.is(DType::f32, {N / kBlock, K / kBlock}));
    const int64_t grid = E * (N / kBlock) * (K / kBlock);
    if (grid == 0) return;
    LING_CHECK(w.aligned() && w_q.aligned() && grid < 1ll << 31 && K < 1ll << 31);
    dispatch(w.dtype, pow2, [&]<typename T, bool kPow2>() {
        launch<quantize_weight_kernel<T, kPow2>>(grid, kTileThreads, 0, stream, w.ptr<T>(), w_q.ptr<uint8_t>(),
                                                 w_scale.ptr<float>(), static_cast<int>(K), Divisor(K / kBlock));
    });
}

}  // namespace ling

#include "moe/permute.h"
#include "quant/fp8_tile.cuh"

namespace ling {
namespace {

constexpr int kThreads = 256;

// Half a warp takes one block of 128 columns of one token, 16 bytes per lane. It quantises once and writes the codes to
// all rows of the token's experts, so a warp writes 256 bytes per row.
template <typename T, bool kPow2>
__global__ void __launch_bounds__(kThreads)
    permute_quantize_kernel(const T* __restrict__ x, const int* __restrict__ slot, uint8_t* __restrict__ x_q,
                            float* __restrict__ x_scale, Divisor column_tiles, int T_, int H, int topk, int64_t ldx,
                            int64_t ld_scale) {
    const int lane = threadIdx.x % 16, warp = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
    const int t = column_tiles.quotient(warp), k = column_tiles.remainder(warp) * 2 + threadIdx.x / 16 % 2;
    if (t >= T_) return;
    const bool exists = k * kBlock < H;

    alignas(16) T v[8];
    if (exists) load8(v, x + t * ldx + k * kBlock + 8 * lane);
    else clear8(v);
    unsigned amax = amax8(v);
#pragma unroll
    for (int d = 8; d; d /= 2) amax = max(amax, __shfl_xor_sync(~0u, amax, d));
    if (!exists) return;
    const float scale = block_scale(amax, kPow2);
    const Quotient<kPow2, T> divide(scale);
    const uint2 codes = encode8(v, divide, divide.is_tiny());
#pragma unroll 8
    for (int i = 0; i < topk; i++) {
        const int64_t row = slot[int64_t{t} * topk + i];
        if (row < 0) continue;
        *reinterpret_cast<uint2*>(x_q + row * H + k * kBlock + 8 * lane) = codes;
        if (lane == i % 16) x_scale[k * ld_scale + row] = scale;
    }
}

}  // namespace

void permute_quantize_fwd(cudaStream_t stream, Tensor x, Tensor slot, Tensor x_q, Tensor x_scale, Tensor, Tensor,
                          bool pow2) {
    const int64_t T = x.shape[0], H = x.shape[1], topk = slot.shape[1], S = T * topk;
    LING_CHECK(x.ndim == 2 && H % kBlock == 0 && slot.is(DType::i32, {T, topk}) && slot.contiguous());
    LING_CHECK(x_q.is(DType::e4m3, {S, H}) && x_q.contiguous() && x_q.aligned());
    LING_CHECK(x_scale.is(DType::f32, {S, H / kBlock}) && (S <= 1 || x_scale.stride[0] == 1));
    if (S == 0 || H == 0) return;
    const int64_t vector = x.dtype == DType::f32 ? 4 : 8;
    LING_CHECK(x.aligned() && x.stride[1] == 1 && (T == 1 || x.stride[0] % vector == 0));
    const int64_t column_tiles = ceil_div<int64_t>(H, 2 * kBlock), warps = T * column_tiles;
    const int64_t grid = ceil_div<int64_t>(warps, kThreads / 32);
    LING_CHECK(grid * (kThreads / 32) < 1ll << 31 && S < 1ll << 31);
    dispatch<float, f16, bf16>(x.dtype, [&]<typename X>() {
        const auto run = [&]<bool kPow2>() {
            launch<permute_quantize_kernel<X, kPow2>>(grid, kThreads, 0, stream, x.ptr<X>(), slot.ptr<int>(),
                                                      x_q.ptr<uint8_t>(), x_scale.ptr<float>(), Divisor(column_tiles),
                                                      static_cast<int>(T), static_cast<int>(H), static_cast<int>(topk),
                                                      x.stride[0], x_scale.stride[1]);
        };
        pow2 ? run.template operator()<true>() : run.template operator()<false>();
    });
}

}  // namespace ling

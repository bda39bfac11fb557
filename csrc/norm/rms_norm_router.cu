#include "norm/rms_norm_router.h"
#include "common.cuh"
#include "norm/rows.h"

namespace ling {
namespace {

constexpr int kVec = 8, kMaxThreads = 1024,
              kExperts = 2;     // columns of a thread; experts of a block: 256 experts give 128 blocks
constexpr int kPitch = 32 + 4;  // of the warps' sums: lanes store to different banks

// The sums of v[i] over the warp; lane l returns the sum for i = l % N. Each step exchanges half of the partial sums.
template <int N> __device__ float warp_sums(float (&v)[N]) {
    static_assert(N <= 32 && (N & (N - 1)) == 0);
#pragma unroll
    for (int n = N / 2; n; n /= 2) {
        const bool upper = threadIdx.x & n;
#pragma unroll
        for (int i = 0; i < n; i++) v[i] = (upper ? v[i + n] : v[i]) + __shfl_xor_sync(~0u, upper ? v[i] : v[i + n], n);
    }
#pragma unroll
    for (int d = N; d < 32; d *= 2) v[0] += __shfl_xor_sync(~0u, v[0], d);
    return v[0];
}

// The sum over the block's warps, a multiple of 4
__device__ float sum_of(const float (&part)[kPitch]) {
    float sum = 0;
    for (int i = 0; i < static_cast<int>(blockDim.x) / 32; i += 4) {
        const auto four = load<4>(part + i);
        sum += (four[0] + four[1]) + (four[2] + four[3]);
    }
    return sum;
}

// Every block norms all rows, kRows at once; a thread has 8 columns. It loads its experts' columns into registers
// before the preceding kernel has ended. Block t writes row t.
template <typename W, typename R, int kRows>
__global__ void __launch_bounds__(std::min(2048 / kRows, kMaxThreads), 1)
    rms_norm_router_kernel(const bf16* x, const void* w, bool fp32_weight, const W* router_w, const R* residual,
                           bf16* h, R* total, float* logits, int T, int H, int E, int64_t ldx, int64_t ldr, float eps) {
    __shared__ __align__(16) float squares[kRows][kPitch], products[kRows * kExperts][kPitch];
    const int n = threadIdx.x * kVec, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    launch_dependents();
    Vec<kVec> g = {}, ws[kExperts] = {};
    if (n < H)
        g = fp32_weight ? load<kVec>(static_cast<const float*>(w) + n) : load<kVec>(static_cast<const bf16*>(w) + n);
#pragma unroll
    for (int e = 0; e < kExperts; e++)
        if (const int expert = blockIdx.x * kExperts + e; n < H && expert < E)
            ws[e] = load<kVec>(router_w + int64_t{expert} * H + n);
    wait_for_previous();

    for (int first = 0; first < T; first += kRows) {
        Vec<kVec> v[kRows] = {}, only = {};  // the residual of an only row: it loads together with x
        float sums[kRows], dots[kRows * kExperts];
        const auto inside = [&](int i) { return first + i < T && n < H; };
        if (kRows == 1 && residual && inside(0)) only = load<kVec>(residual + first * ldr + n);
#pragma unroll
        for (int i = 0; i < kRows; i++)
            if (inside(i)) v[i] = load<kVec>(x + (first + i) * ldx + n);
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            if (residual && inside(i)) {
                const auto r = kRows == 1 ? only : load<kVec>(residual + (first + i) * ldr + n);
#pragma unroll
                for (int j = 0; j < kVec; j++) v[i][j] = static_cast<float>(static_cast<R>(v[i][j] + r[j]));
            }
            sums[i] = 0;
#pragma unroll
            for (int j = 0; j < kVec; j++) sums[i] += v[i][j] * v[i][j];
        }
        const float sum = warp_sums(sums);
        if (lane < kRows) squares[lane][warp] = sum;
        __syncthreads();

#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const int t = first + i;
            const bool writes = inside(i) && t % gridDim.x == blockIdx.x;
            if (writes && residual) store(total + int64_t{t} * H + n, v[i]);
            const float r = rsqrtf(sum_of(squares[i]) / H + eps);
#pragma unroll
            for (int j = 0; j < kVec; j++) v[i][j] = static_cast<float>(static_cast<bf16>(v[i][j] * r * g[j]));
            if (writes) store(h + int64_t{t} * H + n, v[i]);
#pragma unroll
            for (int e = 0; e < kExperts; e++) {
                float dot = 0;
#pragma unroll
                for (int j = 0; j < kVec; j++) dot += v[i][j] * ws[e][j];
                dots[i * kExperts + e] = dot;
            }
        }
        const float dot = warp_sums(dots);
        if (lane < kRows * kExperts) products[lane][warp] = dot;
        __syncthreads();
        const int t = first + threadIdx.x / kExperts, e = blockIdx.x * kExperts + threadIdx.x % kExperts;
        if (threadIdx.x < kRows * kExperts && t < T && e < E)
            logits[int64_t{t} * E + e] = sum_of(products[threadIdx.x]);
    }
}

}  // namespace

void rms_norm_router_fwd(cudaStream_t stream, Tensor x, Tensor w, Tensor router_w, Tensor residual, Tensor h,
                         Tensor total, Tensor logits, float eps) {
    const int64_t T = x.shape[0], H = x.shape[1], E = router_w.shape[0];
    LING_CHECK(x.is(DType::bf16, {T, H}) && h.is(DType::bf16, {T, H}) && H % kVec == 0 && H <= kVec * kMaxThreads);
    LING_CHECK(w.is(w.dtype, {H}) && (w.dtype == DType::bf16 || w.dtype == DType::f32) && w.contiguous());
    LING_CHECK(router_w.is(router_w.dtype, {E, H}) && router_w.contiguous() && T < 1 << 30 && E < 1 << 30);
    LING_CHECK(logits.is(DType::f32, {T, E}) && logits.contiguous());
    const DType normed = residual.ndim ? residual.dtype : DType::bf16;
    LING_CHECK(!residual.ndim || (residual.is(normed, {T, H}) && total.is(normed, {T, H})));
    if (!T || !H || !E) return;
    LING_CHECK(rows_aligned(x) && w.aligned() && router_w.aligned() && h.contiguous() && h.aligned());
    LING_CHECK(!residual.ndim || (rows_aligned(residual) && total.contiguous() && total.aligned()));
    const int threads = ceil_div<int>(H, 128 * kVec) * 128, blocks = ceil_div<int>(E, kExperts);
    dispatch<float, bf16>(router_w.dtype, [&]<typename W>() {
        dispatch<float, bf16>(normed, [&]<typename R>() {
            const auto launch_rows = [&]<int kRows>() {
                launch<rms_norm_router_kernel<W, R, kRows>, kOverlapsInGraphs>(
                    blocks, threads, 0, stream, x.ptr<bf16>(), w.data, w.dtype == DType::f32, router_w.ptr<W>(),
                    residual.ptr<R>(), h.ptr<bf16>(), total.ptr<R>(), logits.ptr<float>(), static_cast<int>(T),
                    static_cast<int>(H), static_cast<int>(E), x.stride[0], residual.stride[0], eps);
            };
            if (T == 1) launch_rows.template operator()<1>();
            else if (T == 2 || threads > 512) launch_rows.template operator()<2>();
            else if (T <= 4 || threads > 256) launch_rows.template operator()<4>();
            else launch_rows.template operator()<8>();
        });
    });
}

}  // namespace ling

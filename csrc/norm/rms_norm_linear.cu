#include "norm/rms_norm_linear.h"
#include "gemm/few_rows_product.cuh"
#include "norm/norm_row.cuh"
#include "norm/rows.h"

namespace ling {
namespace {

using namespace few_rows;
static_assert(kThreads == kRowThreads);

struct Rows {
    const bf16* x;
    int64_t ldx;
    const void* norm;
    bool fp32_norm;
    int warps;  // of a row
    float eps;
};

// Every block norms all rows. The norm's weight is loaded before the preceding kernel has ended.
template <bool kFp8> __device__ void stage_normed(const Operand<kFp8>& to, const Rows& in, int K) {
    __shared__ float part[2][32];
    Vec<8> g[kRowVectors] = {};
#pragma unroll
    for (int i = 0; i < kRowVectors; i++)
        if (const int n = column_of<kRowVectors>(i, in.warps); n < K)
            g[i] = in.fp32_norm ? load<8>(static_cast<const float*>(in.norm) + n)
                                : load<8>(static_cast<const bf16*>(in.norm) + n);
    wait_for_previous();
    const int shift = __ffs(in.warps) - 1;
    for (int first = 0, parity = 0; first < to.rows; first += kWarps >> shift, parity ^= 1) {
        const int m = first + (threadIdx.x / 32 >> shift);
        const auto inside = [&](int n) { return m < to.rows && n < K; };
        Vec<8> v[kRowVectors] = {};
#pragma unroll
        for (int i = 0; i < kRowVectors; i++)
            if (const int n = column_of<kRowVectors>(i, in.warps); inside(n)) v[i] = load<8>(in.x + m * in.ldx + n);
        const float r = row_rstd(v, K, in.warps, in.eps, part[parity]);
#pragma unroll
        for (int i = 0; i < kRowVectors; i++)
#pragma unroll
            for (int j = 0; j < 8; j++) v[i][j] = v[i][j] * r * g[i][j];
        uint8_t* const row = to.data + m * to.pitch;
        if constexpr (kFp8) {
            quantize_row(
                v, in.warps,
                [&](int n, uint2 codes) {
                    if (inside(n)) *reinterpret_cast<uint2*>(row + n) = codes;
                },
                [&](int n, float scale) {
                    if (inside(n)) to.scale[n / kStep * to.rows + m] = scale;
                });
        } else
#pragma unroll
            for (int i = 0; i < kRowVectors; i++)
                if (const int n = column_of<kRowVectors>(i, in.warps); inside(n))
                    store(reinterpret_cast<bf16*>(row) + n, v[i]);
    }
}

template <bool kFp8> __global__ void __launch_bounds__(kThreads, kSms)
    rms_norm_linear_kernel(const Product p, const Rows in) {
    launch_dependents();
    multiply_rows<kFp8, false>(p, [&](const Operand<kFp8>& x) {
        if (kFp8 || in.norm) return stage_normed(x, in, p.K);
        wait_for_previous();
        copy_rows(x, reinterpret_cast<const uint8_t*>(in.x), in.ldx * sizeof(bf16), p.K * x.kSize);
    });
}

template <bool kFp8> void start(cudaStream_t stream, Product& p, const Rows& in) {
    const size_t bytes = shared_bytes<kFp8>(p.M, p.K);
    LING_CHECK(bytes <= kSharedMemory);
    const int blocks = divide<kFp8>(p);
    launch<rms_norm_linear_kernel<kFp8>, kOverlapsInGraphs>(blocks, kThreads, bytes, stream, p, in);
}

}  // namespace

void rms_norm_linear_fwd(cudaStream_t stream, Tensor x, Tensor norm, Tensor w, Tensor w_scale, Tensor y, float eps) {
    const int64_t M = x.shape[0], K = x.shape[1], N = w.shape[0];
    const bool fp8 = w.dtype == DType::e4m3;
    LING_CHECK(x.is(DType::bf16, {M, K}) && rows_aligned(x) && M > 0 && M <= kMaxRows && K > 0 && K <= kMaxN);
    LING_CHECK(!norm.ndim || ((norm.dtype == DType::bf16 || norm.dtype == DType::f32) && norm.is(norm.dtype, {K})));
    LING_CHECK(norm.contiguous() && norm.aligned());
    LING_CHECK(w.is(fp8 ? DType::e4m3 : DType::bf16, {N, K}) && K * (fp8 ? 1 : 2) % kStep == 0 && w.stride[1] == 1);
    LING_CHECK(w.aligned() && w.stride[0] * (fp8 ? 1 : 2) % 16 == 0 && N > 0 && N % kLines == 0 && N < 1 << 30);
    LING_CHECK(!fp8 || (norm.ndim && N % 128 == 0 && w_scale.is(DType::f32, {N / 128, K / 128})));
    LING_CHECK((y.dtype == DType::bf16 || y.dtype == DType::f32) && y.is(y.dtype, {M, N}) && y.stride[1] == 1);
    Product p{};
    p.w = w.ptr<uint8_t>(), p.pitch = w.stride[0] * (fp8 ? 1 : 2);
    p.w_scale = w_scale.ptr<float>(), p.scale_n = w_scale.stride[0], p.scale_k = w_scale.stride[1];
    p.d = y.data, p.ldd = y.stride[0], p.fp32 = y.dtype == DType::f32;
    p.M = M, p.N = N, p.K = K;
    const Rows in{x.ptr<bf16>(), x.stride[0], norm.data, norm.dtype == DType::f32, warps_of(K, kRowVectors), eps};
    fp8 ? start<true>(stream, p, in) : start<false>(stream, p, in);
}

}  // namespace ling

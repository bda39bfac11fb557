#include "gemm/gemm_fp8.h"
#include "gemm/launch_gemm_fp8.cuh"

namespace ling {

using namespace gemm_fp8;

static Problem grouped(const Tensor& a_scale, const Tensor& b, Tensor b_scale, int64_t S, const Tensor& y,
                       bool transposed) {
    const int64_t G = b.shape[0], N = b.shape[transposed ? 2 : 1], K = b.shape[transposed ? 1 : 2];
    LING_CHECK(b.is(DType::e4m3, {G, b.shape[1], b.shape[2]}) && N % 128 == 0 && K % 128 == 0 && K > 0);
    if (transposed) b_scale = b_scale.transposed();
    LING_CHECK(b_scale.is(DType::f32, {G, N / 128, K / 128}) && a_scale.dtype == DType::f32 && G > 0 &&
               G <= kMaxGroups);
    LING_CHECK(by_rows(b) && (G == 1 || b.stride[0] == b.shape[1] * b.stride[1]));
    const int last = y.ndim - 1;
    LING_CHECK(y.stride[last] == 1 && y.stride[last - 1] % 16 == 0 && y.aligned());
    Problem p{};
    p.M = S, p.N = N, p.K = K, p.G = G;
    p.weight_scale = b_scale.ptr<float>(), p.weight_scale_g = b_scale.stride[0];
    p.weight_scale_n = b_scale.stride[1], p.weight_scale_k = b_scale.stride[2];
    p.y = y.data, p.y_m = y.stride[last - 1], p.fp32 = y.dtype == DType::f32;
    return p;
}

void grouped_gemm_fp8_fwd(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets,
                          Tensor source, int topk, Tensor y, Tensor y_scale, bool transposed) {
    const int64_t S = y.shape[0], N = b.shape[transposed ? 2 : 1], K = b.shape[transposed ? 1 : 2];
    const bool swiglu = y_scale.ndim > 0, gather = source.ndim > 0;
    if (!y.data) return;
    Problem p = grouped(a_scale, b, b_scale, S, y, transposed);
    LING_CHECK(a.is(DType::e4m3, {gather ? a.shape[0] : S, K}) && a_scale.is(DType::f32, {a.shape[0], K / 128}));
    LING_CHECK(offsets.is(DType::i32, {p.G + 1}) && offsets.contiguous());
    LING_CHECK(!gather || (source.is(DType::i32, {S}) && source.contiguous() && topk > 0));
    LING_CHECK(by_rows(a) && (gather || by_columns(a_scale)));
    p.offsets = offsets.ptr<int>(), p.source = source.ptr<int>(), p.topk = topk;
    const int rows = ceil_div<int64_t>(S, p.G);
    if (swiglu) {
        LING_CHECK(!transposed && N % 256 == 0 && y.is(DType::e4m3, {S, N / 2}));
        LING_CHECK(y_scale.is(DType::f32, {S, N / 256}) && (y_scale.stride[0] == 1 || S == 1));
        p.y_scale = y_scale.ptr<float>(), p.y_scale_k = y_scale.stride[1];
        if (gather) launch_for_rows<Output::swiglu, Tokens::gathered>(stream, p, rows, a, a_scale, b);
        else launch_for_rows<Output::swiglu, Tokens::tiles>(stream, p, rows, a, a_scale, b);
    } else {
        LING_CHECK(y.ndim == 2 && y.shape[1] == N && (y.dtype == DType::bf16 || y.dtype == DType::f32));
        LING_CHECK(!(transposed && gather));
        if (transposed) launch_transposed(stream, p, rows, a, a_scale, b);
        else if (gather) launch_for_rows<Output::plain, Tokens::gathered>(stream, p, rows, a, a_scale, b);
        else launch_for_rows<Output::plain, Tokens::tiles>(stream, p, rows, a, a_scale, b);
    }
}

void grouped_gemm_fp8_masked_fwd(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor counts,
                                 Tensor y) {
    const int64_t G = b.shape[0], max_m = a.shape[1], N = b.shape[1], K = b.shape[2];
    if (!y.data) return;
    Problem p = grouped(a_scale, b, b_scale, G * max_m, y, false);
    LING_CHECK(a.is(DType::e4m3, {G, max_m, K}) && a.contiguous() && a_scale.is(DType::f32, {G, max_m, K / 128}));
    LING_CHECK(counts.is(DType::i32, {G}) && counts.contiguous());
    LING_CHECK(y.is(y.dtype, {G, max_m, N}) && y.contiguous() && (y.dtype == DType::bf16 || y.dtype == DType::f32));
    p.counts = counts.ptr<int>(), p.max_m = max_m;
    // [G, max_m, ..] as [G max_m, ..]
    const auto flat = [](Tensor t) {
        LING_CHECK(t.shape[0] == 1 || t.stride[0] == t.shape[1] * t.stride[1]);
        t.shape[0] *= t.shape[1], t.shape[1] = t.shape[2], t.stride[0] = t.stride[1], t.stride[1] = t.stride[2];
        t.ndim = 2;
        return t;
    };
    a = flat(a), a_scale = flat(a_scale);
    LING_CHECK(by_rows(a) && by_columns(a_scale));
    launch_for_rows<Output::plain, Tokens::tiles>(stream, p, max_m, a, a_scale, b);
}

}  // namespace ling

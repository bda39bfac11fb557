#include "gemm/gemm_fp8.h"
#include "gemm/gemm_fp8_few_rows.h"
#include "gemm/launch_gemm_fp8.cuh"

namespace ling {

using namespace gemm_fp8;

void gemm_fp8_fwd(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor d, bool accumulate,
                  bool transposed) {
    const int64_t M = a.shape[0], K = a.shape[1], N = b.shape[transposed ? 1 : 0];
    LING_CHECK(a.is(DType::e4m3, {M, K}) && b.is(DType::e4m3, {transposed ? K : N, transposed ? N : K}));
    LING_CHECK(K % 128 == 0 && N % 8 == 0 && a_scale.is(DType::f32, {M, K / 128}));
    LING_CHECK(d.is(d.dtype, {M, N}) && (d.dtype == DType::bf16 || d.dtype == DType::f32));
    const bool row_scales = !transposed && b_scale.shape[0] == N;
    if (transposed) b_scale = b_scale.transposed();
    LING_CHECK(b_scale.is(DType::f32, {row_scales ? N : N / 128, K / 128}) && (row_scales || N % 128 == 0));
    if (!M || !N) return;
    LING_CHECK(K > 0 && by_rows(a) && by_rows(b) && by_columns(a_scale) && (!row_scales || by_columns(b_scale)));
    LING_CHECK(d.stride[1] == 1 && d.stride[0] % 8 == 0 && d.aligned());
    if (!row_scales && !transposed && few_rows_fit(M, K))
        return gemm_fp8_few_rows(stream, a, a_scale, b, b_scale, d, accumulate);
    Problem p{};
    p.M = M, p.N = N, p.K = K, p.G = 1;
    p.weight_scale = b_scale.ptr<float>(), p.weight_scale_n = b_scale.stride[0], p.weight_scale_k = b_scale.stride[1];
    p.y = d.data, p.y_m = d.stride[0], p.fp32 = d.dtype == DType::f32, p.accumulate = accumulate;
    if (row_scales)
        launch_gemm_fp8<Variant<0, 2, Scales::rows, Output::plain, Tokens::tiles, Contraction::all>>(
            stream, p, a, a_scale, b, b_scale);
    else if (transposed) launch_transposed(stream, p, M, a, a_scale, b);
    else launch_for_rows<Output::plain, Tokens::tiles>(stream, p, M, a, a_scale, b);
}

}  // namespace ling

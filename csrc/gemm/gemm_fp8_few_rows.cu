#include "gemm/gemm_fp8_few_rows.h"
#include "gemm/few_rows_product.cuh"

namespace ling {
namespace {

using namespace few_rows;

// Reads of a wait for the preceding kernel, reads of the weight do not.
template <bool kAdds> __global__ void __launch_bounds__(kThreads, kSms)
    gemm_fp8_few_rows_kernel(const Product p, const uint8_t* a, int64_t lda, const float* a_scale, int a_scale_k) {
    launch_dependents();
    multiply_rows<true, kAdds>(p, [&](const Operand<true>& x) {
        wait_for_previous();
        copy_rows(x, a, lda, p.K);
        const int m = kWarps - 1 - threadIdx.x / 32;  // up to 4 rows, not the warps that wait for the codes
#pragma unroll 1
        for (int k = threadIdx.x % 32; m < p.M && k < p.K / kStep; k += 32)
            x.scale[k * p.M + m] = a_scale[m + int64_t{k} * a_scale_k];
    });
}

}  // namespace

bool few_rows_fit(int64_t M, int64_t K) { return M <= kMaxRows && shared_bytes<true>(M, K) <= kSharedMemory; }

void gemm_fp8_few_rows(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor d,
                       bool accumulate) {
    const int64_t M = a.shape[0], K = a.shape[1], N = b.shape[0];
    LING_CHECK(few_rows_fit(M, K) && N < 1 << 30);
    Product p{};
    p.w = b.ptr<uint8_t>(), p.pitch = b.stride[0];
    p.w_scale = b_scale.ptr<float>(), p.scale_n = b_scale.stride[0], p.scale_k = b_scale.stride[1];
    p.d = d.data, p.ldd = d.stride[0], p.fp32 = d.dtype == DType::f32;
    p.M = M, p.N = N, p.K = K;
    const int blocks = divide<true>(p);
    const auto start = [&]<bool kAdds>() {
        launch<gemm_fp8_few_rows_kernel<kAdds>, kOverlapsInGraphs>(
            blocks, kThreads, shared_bytes<true>(M, K), stream, p, a.ptr<uint8_t>(), a.stride[0], a_scale.ptr<float>(),
            static_cast<int>(a_scale.stride[1]));
    };
    accumulate ? start.operator()<true>() : start.operator()<false>();
}

}  // namespace ling

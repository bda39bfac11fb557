#include "moe/balance_bias.h"
#include "common.cuh"

namespace ling {
namespace {

constexpr int kThreads = 256;

__device__ int64_t block_sum(int64_t v) {
    __shared__ int64_t sums[kThreads / 32];
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    int64_t total = 0;
    for (const int64_t sum : sums) total += sum;
    __syncthreads();
    return total;
}

// One block. An expert's load is compared with the mean in integers: E * c with sum(c).
template <typename I>
__global__ void __launch_bounds__(kThreads) balance_bias_kernel(float* bias, const I* counts, int E, float rate) {
    int64_t all = 0, signs = 0;
    for (int e = threadIdx.x; e < E; e += kThreads) all += counts[e];
    all = block_sum(all);
    const auto sign = [&](int e) {
        const int64_t above = all - int64_t{E} * counts[e];
        return (above > 0) - (above < 0);
    };
    for (int e = threadIdx.x; e < E; e += kThreads) signs += sign(e);
    const float mean = static_cast<float>(block_sum(signs)) / static_cast<float>(E);
    for (int e = threadIdx.x; e < E; e += kThreads)
        bias[e] = __fadd_rn(bias[e], __fmul_rn(rate, __fadd_rn(static_cast<float>(sign(e)), -mean)));
}

}  // namespace

void balance_bias_fwd(cudaStream_t stream, Tensor bias, Tensor counts, float rate) {
    const int64_t E = bias.shape[0];
    LING_CHECK(bias.is(DType::f32, {E}) && bias.contiguous() && counts.is(counts.dtype, {E}) && counts.contiguous());
    LING_CHECK((counts.dtype == DType::i32 || counts.dtype == DType::i64) && E < 1ll << 31);
    if (E == 0) return;
    const auto run = [&]<typename I>() {
        launch<balance_bias_kernel<I>>(1, kThreads, 0, stream, bias.ptr<float>(), counts.ptr<I>(), static_cast<int>(E),
                                       rate);
    };
    counts.dtype == DType::i32 ? run.operator()<int>() : run.operator()<int64_t>();
}

}  // namespace ling

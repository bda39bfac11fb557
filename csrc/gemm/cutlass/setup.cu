#include "common.cuh"
#include "gemm/cutlass/groups.h"

namespace ling {
namespace {

constexpr int kThreads = 256;

// Thread s copies the scales of row s, coalesced, into its group's part; thread e of the blocks with y = 0 writes the
// shape, pointers and strides of group e.
__global__ void __launch_bounds__(kThreads)
    grouped_gemm_fp8_setup_kernel(const char* a, const float* a_scale, const char* b, const float* b_scale,
                                  const int* offsets, char* y, Groups groups, int S, int E, int N, int K,
                                  int64_t ld_scale) {
    wait_for_previous();
    launch_dependents();
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (blockIdx.y == 0 && i < E) {
        const int64_t first = offsets[i], rows = offsets[i + 1] - first, e = i;
        LING_DEVICE_CHECK(rows >= 0 && first >= 0 && first + rows <= S);
        groups.shape[3 * i] = rows, groups.shape[3 * i + 1] = N, groups.shape[3 * i + 2] = K;
        groups.a[i] = const_cast<char*>(a + first * K);
        groups.b[i] = const_cast<char*>(b + e * N * K);
        groups.y[i] = y + first * N * sizeof(bf16);
        groups.a_scale[i] = groups.scales + first * (K / 128);
        groups.b_scale[i] = const_cast<float*>(b_scale + e * (N / 128) * (K / 128));
        groups.a_stride[i] = groups.b_stride[i] = K, groups.y_stride[i] = N;
    }

    if (i >= offsets[E]) return;
    int e = 0;  // becomes the last group with offsets[e] <= i: empty groups before it have the same offset
    for (int end = E; end - e > 1;) {
        const int middle = (e + end) / 2;
        (offsets[middle] <= i ? e : end) = middle;
    }
    const int64_t first = offsets[e], rows = offsets[e + 1] - first;
    float* scales = groups.scales + first * (K / 128) + i - first;
    for (int k = blockIdx.y; k < K / 128; k += gridDim.y) scales[k * rows] = a_scale[k * ld_scale + i];
}

template <typename T> T* take(char*& p, int64_t n) {
    T* const array = reinterpret_cast<T*>(p);
    p += (n * sizeof(T) + 127) / 128 * 128;  // tensor maps in the scratch memory need 64
    return array;
}

}  // namespace

Groups::Groups(void* workspace, int64_t S, int64_t E, int64_t K) {
    char* p = static_cast<char*>(workspace);
    scales = take<float>(p, S * (K / 128));
    shape = take<int>(p, 3 * E);
    for (void*** array : {&a, &b, &a_scale, &b_scale, &y}) *array = take<void*>(p, E);
    for (int64_t** array : {&a_stride, &b_stride, &y_stride}) *array = take<int64_t>(p, E);
    scratch = p;
}

int64_t grouped_gemm_fp8_workspace(int64_t S, int64_t E, int64_t K) {
    return static_cast<char*>(Groups(nullptr, S, E, K).scratch) - static_cast<char*>(nullptr) + Groups::kScratch;
}

void grouped_gemm_fp8_setup(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets,
                            Tensor y, Tensor workspace) {
    const int S = a.shape[0], E = b.shape[0], N = b.shape[1], K = a.shape[1];
    LING_CHECK(a.is(DType::e4m3, {S, K}) && a.contiguous() && b.is(DType::e4m3, {E, N, K}) && b.contiguous());
    LING_CHECK(E > 0 && N % 128 == 0 && K % 128 == 0 && K > 0);
    LING_CHECK(a_scale.is(DType::f32, {S, K / 128}) && (S == 1 || a_scale.stride[0] == 1));
    LING_CHECK(b_scale.is(DType::f32, {E, N / 128, K / 128}) && b_scale.contiguous());
    LING_CHECK(offsets.is(DType::i32, {E + 1}) && offsets.contiguous());
    LING_CHECK(y.is(DType::bf16, {S, N}) && y.contiguous());
    LING_CHECK(workspace.is(DType::u8, {workspace.shape[0]}) && workspace.contiguous());
    LING_CHECK(workspace.shape[0] >= grouped_gemm_fp8_workspace(S, E, K));
    LING_CHECK(a.aligned() && b.aligned() && y.aligned() && reinterpret_cast<uintptr_t>(workspace.data) % 128 == 0);
    if (S == 0 || N == 0) return;
    const dim3 grid(ceil_div(std::max(S, E), kThreads), std::min(K / 128, 8));
    launch<grouped_gemm_fp8_setup_kernel, kOverlaps>(
        grid, kThreads, 0, stream, a.ptr<char>(), a_scale.ptr<float>(), b.ptr<char>(), b_scale.ptr<float>(),
        offsets.ptr<int>(), y.ptr<char>(), Groups(workspace.data, S, E, K), S, E, N, K, a_scale.stride[1]);
}

}  // namespace ling

#include "gemm/gemm_fp8_few_rows.h"
#include "gemm/few_rows.cuh"

namespace ling {
namespace {

using namespace few_rows;

constexpr int kWarps = 8, kDepth = 4;  // 64 KB of a weight pending per block; an SM of an H20 needs about 40
constexpr int kPitch = kLines + 4;     // of a warp's sums: no bank conflicts when a fragment is stored
constexpr int kSms = 2;                // blocks per SM, at most

struct Shared {
    __align__(16) uint8_t ring[kWarps][Stream<true, kDepth>::kBytes];
    float sums[2][kWarps][kMaxRows * kPitch];  // two buffers: one is read while the next tile writes the other
};

struct Problem {
    const uint8_t *a, *b;
    const float *a_scale, *b_scale;
    void* d;
    int64_t lda, ldb, ldd;
    int a_scale_k, b_scale_n, b_scale_k;
    int M, N, K, split;  // warps that share 16 rows of the weight: 1, 2, 4 or 8
    bool fp32, accumulate;
};

// Position of a warp: its 16 rows of the weight, and the index of the 128-wide block of K.
struct Cursor {
    int line, k;
};

__host__ __device__ constexpr int row_of(int K) { return K + kGap; }  // bytes of a row of x in shared memory

// A block's tile is 8 / split times 16 rows of the weight. `split` warps share 16 rows, each with a part of K; their
// sums are added in the order of K. Reads of x wait for the preceding kernel, reads of the weight do not.
__global__ void __launch_bounds__(32 * kWarps, kSms) gemm_fp8_few_rows_kernel(const Problem p) {
    Shared& shared = *dynamic_shared<Shared>();
    uint8_t* const x = reinterpret_cast<uint8_t*>(&shared + 1);              // [M, K], row_of(K) apart
    float* const x_scale = reinterpret_cast<float*>(x + p.M * row_of(p.K));  // [K / 128, 8]
    const int warp = threadIdx.x / 32, blocks = p.K / kStep, part_of_k = warp % p.split, g = lane_row(),
              c = lane_column();
    const int from = part_of_k * blocks / p.split,
              to = (part_of_k + 1) * blocks / p.split;  // blocks of this warp's part of K
    const int stride = gridDim.x * (kWarps / p.split) * kLines;
    const int start = (blockIdx.x * kWarps + warp) / p.split * kLines;
    launch_dependents();

    Stream<true, kDepth> stream(shared.ring[warp]);
    Cursor ahead{start, from};
    const auto push = [&] {
        if (ahead.line >= p.N || from == to) return stream.push();
        const uint8_t* upper = p.b + (ahead.line + g) * p.ldb + ahead.k * kStep;
        const float* scale = p.b_scale + ahead.line / 128 * p.b_scale_n + ahead.k * p.b_scale_k;
        stream.push(upper, upper + 8 * p.ldb, scale, scale);
        if (++ahead.k == to) ahead = {ahead.line + stride, from};
    };
    for (int i = 0; i < kDepth; i++) push();

    wait_for_previous();
    for (int i = threadIdx.x; i < p.M * p.K / 16; i += 32 * kWarps) {
        const int m = i / (p.K / 16), column = i % (p.K / 16) * 16;
        *reinterpret_cast<uint4*>(x + m * row_of(p.K) + column) =
            *reinterpret_cast<const uint4*>(p.a + m * p.lda + column);
    }
    for (int i = threadIdx.x; i < kMaxRows * blocks; i += 32 * kWarps) {
        const int m = i % kMaxRows;
        x_scale[i] = m < p.M ? p.a_scale[m + int64_t{i / kMaxRows} * p.a_scale_k] : 0.f;
    }
    __syncthreads();
    const uint8_t* const row = x + min(g, p.M - 1) * row_of(p.K);

    int buffer = 0;
    // All warps of a block run the same number of iterations, since tiles belong to the block.
    for (int tile = blockIdx.x; tile * (kWarps / p.split) * kLines < p.N; tile += gridDim.x, buffer ^= 1) {
        const int line = (tile * kWarps + warp) / p.split * kLines;
        float sum[4] = {};
        for (int k = from; line < p.N && k < to; k++) {
            const Step step = stream.take();
            const Part part = multiply<true>(step, row + k * kStep);
            const float scale0 = x_scale[k * kMaxRows + c], scale1 = x_scale[k * kMaxRows + c + 1];
            sum[0] += part.v[0] * (scale0 * step.upper_scale), sum[1] += part.v[1] * (scale1 * step.upper_scale);
            sum[2] += part.v[2] * (scale0 * step.lower_scale), sum[3] += part.v[3] * (scale1 * step.lower_scale);
            push();
        }
        float* const warp_sums = shared.sums[buffer][warp];
        warp_sums[c * kPitch + g] = sum[0], warp_sums[(c + 1) * kPitch + g] = sum[1];
        warp_sums[c * kPitch + g + 8] = sum[2], warp_sums[(c + 1) * kPitch + g + 8] = sum[3];
        if (p.split == 1) __syncwarp();
        else __syncthreads();
        for (int i = part_of_k * 32 + threadIdx.x % 32; i < kLines * p.M && line < p.N; i += 32 * p.split) {
            const int m = i / kLines, n = i % kLines;
            float y = 0;
            for (int w = 0; w < p.split; w++) y += shared.sums[buffer][warp - part_of_k + w][m * kPitch + n];
            const int64_t index = m * p.ldd + line + n;
            if (p.fp32) {
                float* d = static_cast<float*>(p.d) + index;
                *d = p.accumulate ? *d + y : y;
            } else {
                bf16* d = static_cast<bf16*>(p.d) + index;
                *d = static_cast<bf16>(p.accumulate ? static_cast<float>(*d) + y : y);
            }
        }
    }
}

size_t bytes(int64_t M, int64_t K) { return sizeof(Shared) + M * row_of(K) + kMaxRows * (K / kStep) * sizeof(float); }

}  // namespace

bool few_rows_fit(int64_t M, int64_t K) { return M <= kMaxRows && bytes(M, K) <= kSharedMemory; }

void gemm_fp8_few_rows(cudaStream_t stream, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor d,
                       bool accumulate) {
    const int64_t M = a.shape[0], K = a.shape[1], N = b.shape[0];
    LING_CHECK(few_rows_fit(M, K) && N < 1 << 30);
    Problem p{};
    p.a = a.ptr<uint8_t>(), p.lda = a.stride[0], p.b = b.ptr<uint8_t>(), p.ldb = b.stride[0];
    p.a_scale = a_scale.ptr<float>(), p.a_scale_k = a_scale.stride[1];
    p.b_scale = b_scale.ptr<float>(), p.b_scale_n = b_scale.stride[0], p.b_scale_k = b_scale.stride[1];
    p.d = d.data, p.ldd = d.stride[0], p.fp32 = d.dtype == DType::f32, p.accumulate = accumulate;
    p.M = M, p.N = N, p.K = K, p.split = 1;
    // Split K until every SM has enough warps; not measured. Independent of M, so that a row's result has the same bits
    // in every batch.
    const int sms = multiprocessors(), lines = N / kLines;
    while (p.split < kWarps && p.split < K / kStep && lines * p.split < kWarps * sms) p.split *= 2;
    const int at_once = 2 * (bytes(M, K) + 1024) <= 228 << 10 ? kSms * sms : sms;
    launch<gemm_fp8_few_rows_kernel, kOverlapsInGraphs>(std::min(ceil_div(lines * p.split, kWarps), at_once),
                                                        32 * kWarps, bytes(M, K), stream, p);
}

}  // namespace ling

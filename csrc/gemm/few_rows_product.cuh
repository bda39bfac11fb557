// d [M, N] = x [M, K] w [N, K]^T for 1 to 8 rows: the part of a block, with x staged by the kernel.
#pragma once
#include "gemm/few_rows.cuh"

namespace ling::few_rows {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kDepth = 4;           // 64 KB of a weight pending per block; an SM of an H20 needs about 40
constexpr int kPitch = kLines + 4;  // of a warp's sums: no bank conflicts when a fragment is stored
constexpr int kSms = 2;             // blocks per SM, at most

template <bool kFp8> struct Shared {
    __align__(16) uint8_t ring[kWarps][Stream<kFp8, kDepth>::kBytes];
    float sums[2][kWarps][kMaxRows * kPitch];  // two buffers: one is read while the next tile writes the other
};

struct Product {
    const uint8_t* w;
    const float* w_scale;  // only with FP8: one of 128 x 128
    int64_t pitch;         // of w, in bytes
    int scale_n, scale_k;
    void* d;
    int64_t ldd;
    bool fp32;
    int M, N, K, split;  // log2 of the warps that share 16 rows of the weight: 0 to 3
};

// Position of a warp: its 16 rows of the weight, and the index of the step of K.
struct Cursor {
    int line, k;
};

// Copies rows of `bytes` bytes, a multiple of 16, to shared memory; each warp has a row, and 4 KB in flight.
template <bool kFp8> __device__ void copy_rows(const Operand<kFp8>& to, const uint8_t* from, int64_t pitch, int bytes) {
    static_assert(kWarps == kMaxRows);
    constexpr int kVectors = 8, kWarpBytes = 32 * 16;
    const int m = threadIdx.x / 32;
    if (m >= to.rows) return;
#pragma unroll 1
    for (int at = threadIdx.x % 32 * 16; at < bytes; at += kVectors * kWarpBytes) {
        uint4 v[kVectors];
#pragma unroll
        for (int i = 0; i < kVectors; i++)  // without a condition for each, which would delay the last ones
            v[i] = *reinterpret_cast<const uint4*>(from + m * pitch + min(at + i * kWarpBytes, bytes - 16));
#pragma unroll
        for (int i = 0; i < kVectors; i++)
            if (const int n = at + i * kWarpBytes; n < bytes)
                *reinterpret_cast<uint4*>(to.data + m * to.pitch + n) = v[i];
    }
}

// A block's tile is 8 / 2^split times 16 rows of the weight. 2^split warps share 16 rows, each with a part of K; their
// sums are added in the order of K, and with kAdds to d. stage(x): waits for the preceding kernel and fills x, while
// the weight's first steps arrive.
template <bool kFp8, bool kAdds, typename Stage> __device__ void multiply_rows(const Product& p, Stage&& stage) {
    Shared<kFp8>& shared = *dynamic_shared<Shared<kFp8>>();
    const Operand<kFp8> x(reinterpret_cast<uint8_t*>(&shared + 1), p.M, p.K);
    const int warp = threadIdx.x / 32, steps = p.K * x.kSize / kStep, sharing = 1 << p.split,
              part_of_k = warp & (sharing - 1), g = lane_row(), c = lane_column();
    const int from = part_of_k * steps >> p.split,
              to = (part_of_k + 1) * steps >> p.split;  // steps of this warp's part of K
    const int stride = gridDim.x * (kWarps >> p.split) * kLines;
    const int start = (blockIdx.x * kWarps + warp >> p.split) * kLines;

    Stream<kFp8, kDepth> stream(shared.ring[warp]);
    Cursor ahead{start, from};
    const auto push = [&] {
        if (ahead.line >= p.N || from == to) return stream.push();
        const uint8_t* upper = p.w + (ahead.line + g) * p.pitch + ahead.k * kStep;
        if constexpr (kFp8) {
            const float* scale = p.w_scale + ahead.line / 128 * p.scale_n + ahead.k * p.scale_k;
            stream.push(upper, upper + 8 * p.pitch, scale, scale);
        } else stream.push(upper, upper + 8 * p.pitch);
        if (++ahead.k == to) ahead = {ahead.line + stride, from};
    };
    for (int i = 0; i < kDepth; i++) push();
    stage(x);
    __syncthreads();

    int buffer = 0;
    // All warps of a block run the same number of iterations, since tiles belong to the block.
    for (int tile = blockIdx.x; tile * (kWarps >> p.split) * kLines < p.N; tile += gridDim.x, buffer ^= 1) {
        const int line = (tile * kWarps + warp >> p.split) * kLines;
        float sum[4] = {};
        for (int k = from; line < p.N && k < to; k++) {
            add_product(sum, stream.take(), x, k);
            push();
        }
        float* const warp_sums = shared.sums[buffer][warp];
        warp_sums[c * kPitch + g] = sum[0], warp_sums[(c + 1) * kPitch + g] = sum[1];
        warp_sums[c * kPitch + g + 8] = sum[2], warp_sums[(c + 1) * kPitch + g + 8] = sum[3];
        if (p.split == 0) __syncwarp();
        else __syncthreads();
        for (int i = part_of_k * 32 + threadIdx.x % 32; i < kLines * p.M && line < p.N; i += 32 * sharing) {
            const int m = i / kLines, n = i % kLines;
            float y = 0;
            for (int w = 0; w < sharing; w++) y += shared.sums[buffer][warp - part_of_k + w][m * kPitch + n];
            const int64_t index = m * p.ldd + line + n;
            if (p.fp32) {
                float* d = static_cast<float*>(p.d) + index;
                *d = kAdds ? *d + y : y;
            } else {
                bf16* d = static_cast<bf16*>(p.d) + index;
                *d = static_cast<bf16>(kAdds ? static_cast<float>(*d) + y : y);
            }
        }
    }
}

template <bool kFp8> size_t shared_bytes(int64_t M, int64_t K) {
    return sizeof(Shared<kFp8>) + Operand<kFp8>::bytes(M, K);
}

// The blocks of a launch. Splits K until every SM has enough warps; not measured. The split is independent of M, so
// that a row's result has the same bits in every batch.
template <bool kFp8> int divide(Product& p) {
    const int sms = multiprocessors(), lines = p.N / kLines, steps = p.K * Operand<kFp8>::kSize / kStep;
    const auto shared_by = [&] { return 1 << p.split; };
    for (p.split = 0; shared_by() < std::min(kWarps, steps) && lines * shared_by() < kWarps * sms;) p.split++;
    const int at_once = 2 * (shared_bytes<kFp8>(p.M, p.K) + 1024) <= 228 << 10 ? kSms * sms : sms;
    return std::min(ceil_div(lines * shared_by(), kWarps), at_once);
}

}  // namespace ling::few_rows

// Products of 1 to 8 rows with a weight, bound by reading the weight: the part of a warp, from memory to registers.
//
// A step is 16 rows of the weight by 128 bytes of K, times the same 128 bytes of K of up to 8 rows of x in shared
// memory: 128 codes of e4m3, or 64 bf16. The weight's rows are the 16 rows of the tensor core's product, x's its 8
// columns. As the contraction may take K in any order, a lane uses its 16 bytes of a row as loaded.
//
//     Stream<kFp8, kDepth> stream(shared memory of this warp);
//     for (i < kDepth) stream.push(address of step i), or stream.push() without such a step
//     for (each step) {
//         add_product(sum, stream.take(), x, step's number);
//         stream.push(address of the step kDepth later), or stream.push()
//     }
#pragma once
#include "mma.cuh"
#include "sm90.cuh"

namespace ling::few_rows {

constexpr int kMaxRows = 8, kLines = 16, kStep = 128;  // rows of x; rows of the weight and bytes of K in a step
// Bytes between rows of x in shared memory. A row is a multiple of 128 bytes; without the gap all rows start in the
// same bank.
constexpr int kGap = 64;

// With g = l / 4 and c = l % 4, lane l holds 16 bytes from byte 16 c on of both halves of the step, for rows g and g +
// 8 of the weight and row g of x; of the product [16, 8] it holds rows g and g + 8 of columns 2c and 2c + 1 (see mma).
__device__ inline int lane_row() { return threadIdx.x % 32 / 4; }
__device__ inline int lane_byte() { return threadIdx.x % 4 * 16; }
__device__ inline int lane_column() { return threadIdx.x % 4 * 2; }

struct Step {
    uint4 upper[2], lower[2];        // rows g and g + 8
    float upper_scale, lower_scale;  // for FP8: the scales of rows 0 to 7 and of rows 8 to 15
};

// A warp's queue of kDepth asynchronous copies of steps to shared memory, first in, first out. A lane reads only bytes
// that it copied itself, so it needs no barrier but the wait for its copies, and copies may be pending across barriers.
template <bool kFp8, int kDepth> class Stream {
    static constexpr int kVectors = kLines * kStep / 16;
    uint4* lane_ring;
    float* scales;  // [kDepth][2]
    int first = 0, next = 0;

    __device__ void advance(int& slot) { slot = slot + 1 < kDepth ? slot + 1 : 0; }

public:
    static constexpr int kBytes = kDepth * (kLines * kStep + (kFp8 ? 8 : 0));  // of shared memory, aligned to 16
    static_assert(kBytes % 16 == 0);

    __device__ explicit Stream(void* ring)
        : lane_ring(static_cast<uint4*>(ring) + threadIdx.x % 32),
          scales(reinterpret_cast<float*>(static_cast<uint4*>(ring) + kDepth * kVectors)) {}

    // upper, lower: the step's first bytes of rows g and g + 8, aligned to 16; the scales, for FP8, are equal in all
    // lanes. At most kDepth steps may be pending.
    __device__ void push(const uint8_t* upper, const uint8_t* lower, const float* upper_scale = nullptr,
                         const float* lower_scale = nullptr) {
        uint4* to = lane_ring + next * kVectors;
        upper += lane_byte(), lower += lane_byte();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            copy_async<16>(to + 64 * half, upper + half * kStep / 2, false);
            copy_async<16>(to + 64 * half + 32, lower + half * kStep / 2, false);
        }
        if constexpr (kFp8) {
            __syncwarp();  // all lanes have read the scales that these replace
            if (const int lane = threadIdx.x % 32; lane < 2)
                copy_async<4>(scales + 2 * next + lane, lane ? lower_scale : upper_scale, false);
        }
        push();
    }
    // Push an empty step, which keeps the count.
    __device__ void push() { commit_copies(), advance(next); }

    // Pop the oldest step; kDepth steps must be pending.
    __device__ Step take() {
        wait_copies<kDepth - 1>();
        if constexpr (kFp8) __syncwarp();
        const uint4* from = lane_ring + first * kVectors;
        Step step{{from[0], from[64]}, {from[32], from[96]}, 1, 1};
        if constexpr (kFp8) step.upper_scale = scales[2 * first], step.lower_scale = scales[2 * first + 1];
        advance(first);
        return step;
    }
};

// Rows of x in shared memory, in the weight's type
template <bool kFp8> struct Operand {
    static constexpr int kSize = kFp8 ? 1 : 2;
    uint8_t* data;
    float* scale;  // only with FP8: [K / 128][rows]
    int rows, pitch;

    Operand(const Operand&) = default;
    __device__ Operand(uint8_t* data, int rows, int K)
        : data(data), scale(reinterpret_cast<float*>(data + rows * pitch_of(K))), rows(rows), pitch(pitch_of(K)) {}
    static constexpr int pitch_of(int K) { return K * kSize + kGap; }
    static constexpr int bytes(int rows, int K) {
        return ceil_div(rows * (pitch_of(K) + (kFp8 ? K / kStep * 4 : 0)), 16) * 16;
    }
    __device__ const uint8_t* row(int r) const { return data + r * pitch; }
};

struct Part {
    float v[4] = {};  // (row g, column 2c), (g, 2c + 1), (g + 8, 2c), (g + 8, 2c + 1)
};

// [16, 8] = step [16, 128 bytes] x [8, 128 bytes]^T, unscaled. x: the step's first byte of row g of x; where x has no
// row g, any row: that column is then ignored. Products of e4m3 are exact in f16.
template <bool kFp8> __device__ Part multiply(const Step& step, const uint8_t* x) {
    using T = std::conditional_t<kFp8, f16, bf16>;
    using C = std::conditional_t<kFp8, uint8_t, bf16>;
    Part part;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const Chunk<T, C> upper(step.upper[half]), lower(step.lower[half]),
            b(*reinterpret_cast<const uint4*>(x + half * kStep / 2 + lane_byte()));
#pragma unroll
        for (int i = 0; i < b.kElements / 2; i += 2)
            mma<T>(part.v, {upper.pair[i], lower.pair[i], upper.pair[i + 1], lower.pair[i + 1]}, b.pair[i],
                   b.pair[i + 1]);
    }
    return part;
}

// sum += step k of the weight times all rows of x, scaled. Columns past x's rows hold numbers without a meaning.
template <bool kFp8> __device__ void add_product(float (&sum)[4], const Step& step, const Operand<kFp8>& x, int k) {
    const int last = x.rows - 1, n0 = min(lane_column(), last), n1 = min(lane_column() + 1, last);
    const Part part = multiply<kFp8>(step, x.row(min(lane_row(), last)) + k * kStep);
    float scale[2] = {1, 1};
    if constexpr (kFp8) scale[0] = x.scale[k * x.rows + n0], scale[1] = x.scale[k * x.rows + n1];
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += part.v[i] * (scale[i % 2] * (i < 2 ? step.upper_scale : step.lower_scale));
}

}  // namespace ling::few_rows

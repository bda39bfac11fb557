// Products of 1 to 8 rows with a weight, which wait for the weight: what a warp does, from global memory to registers.
//
// A step is 16 rows of the weight by 128 bytes of K, times the same 128 bytes of K of up to 8 rows of x in shared
// memory: 128 codes of e4m3, or 64 bf16. The weight's rows are the 16 rows of the tensor core's product, x's its 8
// columns. As the contraction may take K in any order, a lane's 16 bytes of a row serve as they are.
//
//     Stream<kDepth> stream(bytes of shared memory of this warp);
//     for (i < kDepth) stream.push(rows of step i);       // or push() where there is no such step
//     for (each step) {
//         const auto weight = stream.take();
//         multiply<is it e4m3>(sum, weight, row g of x + 128 * k);
//         stream.push(rows of the step kDepth further on);  // or push()
//     }
#pragma once
#include "mma.cuh"
#include "sm90.cuh"

namespace ling::few_rows {

constexpr int kMost = 8, kLines = 16, kStep = 128;  // rows of x; rows of the weight; bytes of K
constexpr int kGap =
    64;  // bytes between rows of x in shared memory, beyond a multiple of 128: they begin in other banks

// Lane l is g = l / 4, c = l % 4. Of a step it has of the weight's rows g and g + 8, and of row g of x, bytes 16 c on
// of either half; and of the sum [16, 8] rows g and g + 8 of columns 2c and 2c + 1 (see mma).
__device__ inline int lane_row() { return threadIdx.x % 32 / 4; }
__device__ inline int lane_byte() { return threadIdx.x % 4 * 16; }
__device__ inline int lane_column() { return threadIdx.x % 4 * 2; }

struct Step {
    uint4 upper[2], lower[2];  // of rows g and g + 8
};

// A warp's steps on their way through shared memory, kDepth of them, oldest first. Every lane reads back what it copied
// itself, so nothing but the copies' own wait orders them, and they stay on their way across barriers.
template <int kDepth> class Stream {
    uint4* mine;
    int first = 0, next = 0;

    __device__ void turn(int& slot) { slot = slot + 1 < kDepth ? slot + 1 : 0; }

public:
    static constexpr int kBytes = kDepth * kLines * kStep;  // of shared memory, aligned to 16

    __device__ explicit Stream(void* ring) : mine(static_cast<uint4*>(ring) + threadIdx.x % 32) {}

    // upper, lower: the step's first byte in rows g and g + 8, 16-byte aligned. At most kDepth steps may be on their
    // way.
    __device__ void push(const uint8_t* upper, const uint8_t* lower) {
        uint4* to = mine + next * (kLines * kStep / 16);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = half * kStep / 2 + lane_byte();
            copy_async<16>(to + 64 * half, upper + at, false);
            copy_async<16>(to + 64 * half + 32, lower + at, false);
        }
        push();
    }
    // No step: keeps count.
    __device__ void push() { commit_copies(), turn(next); }

    // The oldest; kDepth have been pushed since the beginning or the last one was taken.
    __device__ Step take() {
        wait_copies<kDepth - 1>();
        const uint4* from = mine + first * (kLines * kStep / 16);
        turn(first);
        return {{from[0], from[64]}, {from[32], from[96]}};
    }
};

// sum [16, 8] += step [16, 128 bytes] x [8, 128 bytes]^T. x: the step's first byte in row g of x, or in any other row
// where x has no row g: its column of the sum is then meaningless. Products of e4m3 are exact in f16; scales are the
// caller's, who begins a new sum for each 128 of K.
template <bool kFp8> __device__ void multiply(float (&sum)[4], const Step& step, const uint8_t* x) {
    using T = std::conditional_t<kFp8, f16, bf16>;
    using C = std::conditional_t<kFp8, uint8_t, bf16>;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const Chunk<T, C> upper(step.upper[half]), lower(step.lower[half]),
            b(*reinterpret_cast<const uint4*>(x + half * kStep / 2 + lane_byte()));
#pragma unroll
        for (int i = 0; i < b.kElements / 2; i += 2)
            mma<T>(sum, {upper.pair[i], lower.pair[i], upper.pair[i + 1], lower.pair[i + 1]}, b.pair[i], b.pair[i + 1]);
    }
}

}  // namespace ling::few_rows

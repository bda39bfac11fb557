// The layouts of wgmma's operands and results, as csrc/ computes them: cute_layouts.cpp prints CuTe's. 64 rows of 128
// bytes of e4m3; 64 tokens of 128 columns of bf16, tokens outermost; descriptors of one instruction's operands; the
// row and column of each of a thread's results. One block of 128 threads.
#include "gemm/gemm_fp8.cuh"

using namespace ling;

extern "C" __global__ void layouts(int64_t* out) {
    constexpr int kBox = 64 * 128;
    for (int i = threadIdx.x; i < kBox; i += 128) {
        const int row = i / 128, k = i % 128, column = i / 64, token = i % 64;
        out[i] = swizzled(row, k / 16) + k % 16;
        out[kBox + i] = column / 64 * kBox + swizzled(token, column % 64 / 8) + column % 8 * 2;
    }
    out += 2 * kBox;
    if (threadIdx.x == 0) out[0] = operand(nullptr), out[1] = operand(nullptr, kBox);
    using namespace gemm_fp8;
    const Place<Variant<0, 2, Scales::blocks, Output::plain, Tokens::tiles, Contraction::all>> place;
    for (int i = 0; i < 64; i++)
        out[2 + 64 * threadIdx.x + i] = place.row + (i & 2) * 4 + 64 * (i / 4 * 8 + place.column + (i & 1));
}

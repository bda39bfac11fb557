// A warp's 16 x 8 x 16 product on tensor cores, from registers, its CPU version for tests/host, and the conversion of
// 16 bytes of memory to operands.
#pragma once
#include <cuda_fp8.h>

#include "common.cuh"

namespace ling {

// d [16, 8] += A [16, 16] B [8, 16]^T, T f16 or bf16, two elements in a register. Lane l, g = l / 4, c = l % 4, holds
//     a[0], a[1]    rows g, g + 8 of A, columns 2c and 2c + 1;  a[2], a[3]: the same rows, columns 2c + 8 and 2c + 9
//     b0, b1        row g of B, columns 2c and 2c + 1;  2c + 8 and 2c + 9
//     d[0], d[1]    row g of d, columns 2c and 2c + 1;  d[2], d[3]: row g + 8, the same columns
#ifdef __CUDACC__
template <typename T>
__device__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#define LING_MMA(type)                                                                  \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
    if constexpr (dtype_of<T> == DType::bf16) LING_MMA("bf16");
    else LING_MMA("f16");
#undef LING_MMA
}
#else
template <typename T>
void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
         cuda_on_host::Where where = cuda_on_host::Where::current()) {
    const auto value = [](uint64_t pair, int i) {
        return static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(pair >> 16 * i)));
    };
    const int g = cuda_on_host::lane() / 4, c = cuda_on_host::lane() % 4;
    float rows[2][16], columns[2][16];
    for (int i = 0; i < 2; i++) {  // 8 columns to the left, and to the right
        const uint64_t* all = cuda_on_host::exchange("mma", ~0u, a[2 * i] | uint64_t{a[2 * i + 1]} << 32, where);
        for (int j = 0; j < 8; j++)
            for (int r = 0; r < 2; r++) rows[r][8 * i + j] = value(all[4 * g + j / 2] >> 32 * r, j % 2);
    }
    const uint64_t* all = cuda_on_host::exchange("mma", ~0u, b0 | uint64_t{b1} << 32, where);
    for (int n = 0; n < 2; n++)
        for (int k = 0; k < 16; k++) columns[n][k] = value(all[4 * (2 * c + n) + k % 8 / 2] >> k / 8 * 32, k % 2);
    for (int r = 0; r < 2; r++)
        for (int n = 0; n < 2; n++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += rows[r][k] * columns[n][k];
            d[2 * r + n] += sum;
        }
}
#endif

template <typename T> __device__ unsigned pack(float low, float high) {
    if constexpr (dtype_of<T> == DType::bf16) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const unsigned*>(&pair);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const unsigned*>(&pair);
    }
}

// 16 bytes of C, which is T or e4m3 codes, as pairs of T
template <typename T, typename C> struct Chunk {
    static constexpr int kElements = 16 / sizeof(C);
    unsigned pair[kElements / 2];

    __device__ explicit Chunk(uint4 raw) {
        const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < kElements / 2; i++)
            if constexpr (sizeof(C) == 2) pair[i] = words[i];
            else {
                const __half2 two = __nv_cvt_fp8x2_to_halfraw2(words[i / 2] >> i % 2 * 16 & 0xffff, __NV_E4M3);
                const float2 wide = __half22float2(two);
                pair[i] =
                    dtype_of<T> == DType::f16 ? *reinterpret_cast<const unsigned*>(&two) : pack<T>(wide.x, wide.y);
            }
    }
};

}  // namespace ling

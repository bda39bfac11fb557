// A warp's 16 x 8 x 16 product on tensor cores, from registers, and the conversion of 16 bytes of memory to
// operands.
#pragma once
#include <cuda_fp8.h>

#include "common.cuh"

namespace ling {

// d [16, 8] += A [16, 16] B [8, 16]^T, T f16 or bf16, two elements in a register. Lane l, g = l / 4, c = l % 4, holds
//     a[0], a[1]    rows g, g + 8 of A, columns 2c and 2c + 1;  a[2], a[3]: the same rows, columns 2c + 8 and 2c + 9
//     b0, b1        row g of B, columns 2c and 2c + 1;  2c + 8 and 2c + 9
//     d[0], d[1]    row g of d, columns 2c and 2c + 1;  d[2], d[3]: row g + 8, the same columns
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

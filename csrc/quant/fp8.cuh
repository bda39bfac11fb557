// FP8 (e4m3) on the device, equal to `quantize_blocks` of ops/quantize.py bit for bit.
//   scale = max(amax / 448, 1e-30) over a block,  code = e4m3(x / scale)
#pragma once
#include <cuda_fp8.h>

#include "common.cuh"

namespace ling {

// |x| as an integer. Its maximum keeps NaN, which a float maximum drops: NaN > inf > every number.
__device__ inline unsigned abs_bits(float x) { return __float_as_uint(x) & 0x7fffffff; }

// The scale of a block whose largest abs_bits is amax, rounded up to a power of two if pow2. NaN and inf stay.
__device__ inline float block_scale(unsigned amax, bool pow2) {
    const float scale = __uint_as_float(amax) / 448.f;
    const unsigned bits = __float_as_uint(scale < 1e-30f ? 1e-30f : scale);
    return __uint_as_float(pow2 && bits < 0x7f800000 ? (bits + 0x7fffff) & 0xff800000 : bits);
}

// Round to nearest even, saturate at +-448; NaN stays NaN.
__device__ inline uint8_t to_e4m3(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

__device__ inline unsigned to_e4m3x4(float a, float b, float c, float d) {
    const unsigned low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
    return low | static_cast<unsigned>(__nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3)) << 16;
}

// x / scale, correctly rounded as in the reference, for many x of one scale, whose reciprocal is computed once.
template <bool kPow2> class Quotient {
    float scale, inverse;
    bool plain;

public:
    __device__ explicit Quotient(float scale) : Quotient(scale, 1.f / scale) {}
    __device__ Quotient(float scale, float inverse)
        : scale(scale), inverse(inverse), plain(!(scale > 1e-20f && scale < 1e20f)) {}

    __device__ float operator()(float x) const {
        if constexpr (kPow2) return x * inverse;  // exact
        if (plain) return x / scale;              // NaN, inf, or a remainder that would underflow
        // Two corrections by the remainder, whose sign is flipped so that -0 stays -0. A division tests every x.
        float q = x * inverse;
        q = fmaf(-fmaf(q, scale, -x), inverse, q);
        return fmaf(-fmaf(q, scale, -x), inverse, q);
    }
};

}  // namespace ling

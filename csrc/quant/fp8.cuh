// FP8 (e4m3) on the device, equal to `quantize_blocks` of ops/quantize.py bit for bit.
//   scale = max(amax / 448, 1e-30) over a block,  code = e4m3(x / scale)
//
// Divisions are written out: the compiler's own calls a function for rare divisors, and after such a call no two
// divisions overlap.
#pragma once
#include <cuda_fp8.h>

#include "common.cuh"

namespace ling {

// |x| as an integer. Its maximum keeps NaN, which a float maximum drops: NaN > inf > every number.
__device__ inline unsigned abs_bits(float x) { return __float_as_uint(x) & 0x7fffffff; }

// The largest |v[i]| as abs_bits: exact, and NaN where one is NaN
template <int N> __device__ unsigned largest_bits(const float (&v)[N]) {
    float most = fabsf(v[0]);
#pragma unroll
    for (int i = 1; i < N; i++) most = max_or_nan(most, fabsf(v[i]));
    return abs_bits(most);
}

// x / divisor: q = x inverse, plus its remainder times inverse. It is correctly rounded if inverse is 1 / divisor
// correctly rounded (Markstein 1990) and no remainder underflows. The remainder's sign is flipped so that -0 stays -0.
__device__ inline float quotient(float x, float divisor, float inverse) {
    const float q = x * inverse;
    return fmaf(-fmaf(q, divisor, -x), inverse, q);
}

// The scale of a block whose largest abs_bits is amax, rounded up to a power of two if pow2. NaN and inf stay.
__device__ inline float block_scale(unsigned amax, bool pow2) {
    constexpr unsigned kInfinity = 0x7f800000;
    const float x = __uint_as_float(amax);
    const float scale = quotient(x, 448.f, 1 / 448.f);  // NaN for inf
    const unsigned bits = amax < kInfinity ? __float_as_uint(scale < 1e-30f ? 1e-30f : scale) : amax;
    return __uint_as_float(pow2 && bits < kInfinity ? (bits + 0x7fffff) & 0xff800000 : bits);
}

// Round to nearest even, saturate at +-448; NaN stays NaN.
__device__ inline uint8_t to_e4m3(float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); }

__device__ inline unsigned to_e4m3x2(float a, float b) {
    return __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
}

__device__ inline unsigned to_e4m3x4(float a, float b, float c, float d) {
    return to_e4m3x2(a, b) | to_e4m3x2(c, d) << 16;
}

// Divides many x, converted from T, by one scale of block_scale
template <bool kPow2, typename T = float> struct Quotient {
    // Whether remainders may underflow: then x and the scale are multiplied by 2^64. Codes of bf16 are right without
    // (tests/test_csrc_quant.py tries all pairs of an element and the largest one), and fp16 has no such numbers but 0.
    static constexpr bool kLifts = !kPow2 && sizeof(T) == 4;
    float divisor, inverse;

    __device__ Quotient(float divisor, float inverse) : divisor(divisor), inverse(inverse) {}
    __device__ explicit Quotient(float scale) : divisor(scale), inverse(reciprocal(scale)) {
        // To the correctly rounded reciprocal, as the compiler's own division does. x / inf is x * 0, which a divisor
        // of 1 does not change.
        if (scale < INFINITY) inverse = fmaf(inverse, fmaf(-scale, inverse, 1.f), inverse);
        else divisor = 1;
    }
    // That of another lane in a group of `width`
    __device__ Quotient of_lane(int lane, int width) const {
        return {__shfl_sync(~0u, divisor, lane, width), __shfl_sync(~0u, inverse, lane, width)};
    }
    __device__ bool is_tiny() const { return kLifts && divisor < 1e-20f; }

    // any_tiny: some lane's quotient is_tiny(); equal in the whole warp, so that no branch stands between divisions
    template <int N> __device__ void operator()(float (&x)[N], bool any_tiny) const {
        if (kLifts && any_tiny) {
            const float lift = is_tiny() ? 0x1p64f : 1, lower = is_tiny() ? 0x1p-64f : 1;
#pragma unroll
            for (int i = 0; i < N; i++) x[i] = quotient(x[i] * lift, divisor * lift, inverse * lower);
        } else {
#pragma unroll
            for (int i = 0; i < N; i++) x[i] = kPow2 ? x[i] * inverse : quotient(x[i], divisor, inverse);
        }
    }
};

}  // namespace ling

// Vectors of 32 lanes, and what GCC makes of them too slowly for AVX-512: masks and half precision.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES(type) typedef __attribute__((vector_size(32 * sizeof(type)))) type
LANES(uint16_t) U16;
LANES(int16_t) S16;
LANES(uint32_t) U32;
LANES(int32_t) S32;
LANES(float) F32;
LANES(uint64_t) U64;
LANES(int64_t) S64;
typedef S32 Pred;  // all ones or zeros
#define EACH_LANE for (int l = 0; l < 32; l++)
#define LANE_OF(mask) \
    for (uint32_t rest_ = (mask), l = 0; rest_ && (l = __builtin_ctz(rest_), true); rest_ &= rest_ - 1)
#define IN static inline __attribute__((always_inline))

#ifdef __AVX512F__
IN Pred lanes(uint32_t mask) {
    Pred r;
    for (int i = 0; i < 2; i++) ((__m512i*)&r)[i] = _mm512_maskz_set1_epi32(mask >> 16 * i, -1);
    return r;
}
IN uint32_t bits(Pred p) {
    const __m512i* v = (const __m512i*)&p;
    return _mm512_test_epi32_mask(v[0], v[0]) | uint32_t(_mm512_test_epi32_mask(v[1], v[1])) << 16;
}
IN U16 f16_of(F32 x) {
    U16 r;
    for (int i = 0; i < 2; i++) ((__m256i*)&r)[i] = _mm512_cvtps_ph(((__m512*)&x)[i], _MM_FROUND_TO_NEAREST_INT);
    return r;
}
IN F32 of_f16(U16 x) {
    F32 r;
    for (int i = 0; i < 2; i++) ((__m512*)&r)[i] = _mm512_cvtph_ps(((__m256i*)&x)[i]);
    return r;
}
#else
IN Pred lanes(uint32_t mask) {
    Pred r;
    EACH_LANE r[l] = -int(mask >> l & 1);
    return r;
}
IN uint32_t bits(Pred p) {
    uint32_t r = 0;
    EACH_LANE r |= uint32_t(p[l] & 1) << l;
    return r;
}
IN U16 f16_of(F32 x) {
    U16 r;
    EACH_LANE r[l] = __builtin_bit_cast(uint16_t, _Float16(x[l]));
    return r;
}
IN F32 of_f16(U16 x) {
    F32 r;
    EACH_LANE r[l] = float(__builtin_bit_cast(_Float16, uint16_t(x[l])));
    return r;
}
#endif

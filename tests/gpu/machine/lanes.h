// Arithmetic of PTX on registers, each a vector of 32 lanes. "ISA 9.7" is the section of the PTX manual, version 9.0.
#pragma once
#include <type_traits>

#include "simd.h"

#define TO(type, x) __builtin_convertvector(x, type)
IN void put(U32& d, U32 v, Pred m) { d = m ? v : d; }
IN void put(Pred& d, Pred v, Pred m) { d = m ? v : d; }
IN void put(U64& d, U64 v, Pred m) { d = TO(S64, m) ? v : d; }
IN void put(U16& d, U16 v, Pred m) { d = TO(S16, m) ? v : d; }
IN Pred pred(S32 x) { return x; }
IN Pred pred(S64 x) { return TO(S32, x); }
IN Pred pred(S16 x) { return TO(S32, x); }
IN Pred k1(bool x) { return Pred{} - int(x); }
IN U16 k16(uint16_t x) { return U16{} + x; }
IN U32 k32(uint32_t x) { return U32{} + x; }
IN U64 k64(uint64_t x) { return U64{} + x; }
template <class V> IN V pick(Pred p, V a, V b) {
    if constexpr (sizeof(V) == 256) return TO(S64, p) ? a : b;
    else if constexpr (sizeof(V) == 64) return TO(S16, p) ? a : b;
    else return p ? a : b;
}

// ---- integers (ISA 9.7.1, 9.7.8)
template <class V> constexpr uint32_t width_of = sizeof(V) / 4;  // bits of a lane
template <class V> IN V resized(U32 n) {
    if constexpr (sizeof(V) == 256) return (V)TO(U64, n);
    else if constexpr (sizeof(V) == 64) return (V)TO(U16, n);
    else return (V)n;
}
template <class V> constexpr bool is_signed = std::is_signed_v<std::remove_cvref_t<decltype(V{}[0])>>;
template <class V> IN V lower(V a, V b) { return a < b ? a : b; }
template <class V> IN V higher(V a, V b) { return a > b ? a : b; }
template <class V> IN V magnitude(V a) { return a < 0 ? -a : a; }
template <class V> IN V negative(V a) { return -a; }
template <class V> IN V shift_left(V a, U32 n) {  // amounts above the width clear
    return pick(pred(n < width_of<V>), V(a << resized<V>(n & (width_of<V> - 1))), V{});
}
template <class V> IN V shift_right(V a, U32 n) {
    const V rest = a < 0 ? V{} - 1 : V{};  // the sign of a signed type fills
    return pick(pred(n < width_of<V>), V(a >> resized<V>(n & (width_of<V> - 1))), rest);
}
template <class V> IN V divide(V a, V b) {  // by zero: all ones, as GPUs give
    V r;
    EACH_LANE r[l] = !b[l] ? ~(a[l] & 0) : is_signed<V> && b[l] + 1 == 0 ? -a[l] : a[l] / b[l];
    return r;
}
template <class V> IN V remainder_of(V a, V b) { return (b == 0) ? a : a - divide(a, b) * b; }
IN F32 divide(F32 a, F32 b) { return a / b; }
template <class V, class Wide> IN V high_part(V a, V b) { return TO(V, (TO(Wide, a) * TO(Wide, b)) >> width_of<V>); }
IN U32 high(U32 a, U32 b) { return high_part<U32, U64>(a, b); }
IN S32 high(S32 a, S32 b) { return high_part<S32, S64>(a, b); }
IN U16 high(U16 a, U16 b) { return high_part<U16, U32>(a, b); }
IN S16 high(S16 a, S16 b) { return high_part<S16, S32>(a, b); }
template <class V, class Wide> IN V high_by_lane(V a, V b) {
    V r;
    EACH_LANE r[l] = Wide(a[l]) * b[l] >> 64;
    return r;
}
IN U64 high(U64 a, U64 b) { return high_by_lane<U64, unsigned __int128>(a, b); }
IN S64 high(S64 a, S64 b) { return high_by_lane<S64, __int128>(a, b); }
IN U32 funnel_left(U32 a, U32 b, U32 n) { return TO(U32, ((TO(U64, b) << 32 | TO(U64, a)) << TO(U64, n)) >> 32); }
IN U32 funnel_right(U32 a, U32 b, U32 n) { return TO(U32, (TO(U64, b) << 32 | TO(U64, a)) >> TO(U64, n)); }
template <int table> IN U32 lop3(U32 a, U32 b, U32 c) {
    U32 r = {};
    for (int i = 0; i < 8; i++)
        if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
}
U32 popcount(const U32&);
U32 popcount(const U64&);
U32 reverse(const U32&);
U64 reverse(const U64&);
U32 leading_zeros(const U32&);
U32 leading_zeros(const U64&);
template <bool shift> U32 find_highest(const U32&);
template <bool shift> U32 find_highest(const S32&);
U32 byte_permute(const U32& a, const U32& b, const U32& selector);
U32 insert_bits(const U32& a, const U32& b, const U32& at, const U32& length);
U64 insert_bits(const U64& a, const U64& b, const U32& at, const U32& length);
U32 extract_bits(const U32& a, const U32& at, const U32& length);
S32 extract_bits(const S32& a, const U32& at, const U32& length);
U64 extract_bits(const U64& a, const U32& at, const U32& length);
S64 extract_bits(const S64& a, const U32& at, const U32& length);

// ---- floats (ISA 9.7.3)
IN F32 flush(F32 x) {  // subnormal numbers to zero, with their sign
    const U32 u = (U32)x;
    return (F32)((u & 0x7f800000u) ? u : u & 0x80000000u);
}
IN F32 saturate(F32 x) { return x > 0.f ? (x < 1.f ? x : F32{} + 1.f) : F32{}; }
IN F32 magnitude(F32 x) { return (F32)((U32)x & 0x7fffffffu); }
IN F32 negative(F32 x) { return (F32)((U32)x ^ 0x80000000u); }
IN F32 lower(F32 a, F32 b) {
    return (b != b) ? a : (a < b) | ((a == b) & ((S32)a < 0)) ? a : b;
}  // not the NaN; -0 < +0
IN F32 higher(F32 a, F32 b) { return (b != b) ? a : (a > b) | ((a == b) & ((S32)b < 0)) ? a : b; }
IN F32 lower_nan(F32 a, F32 b) { return (a != a) ? a : (b != b) ? b : lower(a, b); }
IN F32 higher_nan(F32 a, F32 b) { return (a != a) ? a : (b != b) ? b : higher(a, b); }
IN F32 xor_sign(F32 m, F32 a, F32 b) { return (F32)(((U32)m & 0x7fffffffu) | (((U32)a ^ (U32)b) & 0x80000000u)); }
#define BY_LANE(V, name, args, expr) \
    IN V name args {                 \
        V r;                         \
        EACH_LANE r[l] = expr;       \
        return r;                    \
    }
BY_LANE(F32, fma_rn, (F32 a, F32 b, F32 c), __builtin_fmaf(a[l], b[l], c[l]))
BY_LANE(F32, square_root, (F32 a), __builtin_sqrtf(a[l]))
enum Round { kTowardZero, kNearest, kFloor, kCeiling };
F32 fma_rounded(const F32& a, const F32& b, const F32& c, Round);
IN F32 fma_odd(F32 a, F32 b, F32 c) {  // the last bit of what is not exact is 1: to round again is to round once
    const U32 down = (U32)fma_rounded(a, b, c, kFloor), up = (U32)fma_rounded(a, b, c, kCeiling);
    return (F32)((down & 1u) ? down : up);
}
F32 exp2_of(const F32&);
F32 log2_of(const F32&);
F32 sine(const F32&);
F32 cosine(const F32&);
F32 tanh_of(const F32&);

// ---- conversions (ISA 9.7.9.22)
IN U16 bf16_of(F32 x) {
    const U32 u = (U32)x, rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    return TO(U16, (x != x) ? k32(0x7fff) : rounded);
}
IN F32 of_bf16(U16 x) { return (F32)(TO(U32, x) << 16); }
IN U32 pair(U16 low, U16 high) { return TO(U32, low) | TO(U32, high) << 16; }
IN U16 low(U32 x) { return TO(U16, x & 0xffffu); }
IN U16 top(U32 x) { return TO(U16, x >> 16); }
U16 e4m3x2_of(const F32& high, const F32& low);  // saturating
U16 e5m2x2_of(const F32& high, const F32& low);
U32 f16x2_of_e4m3x2(const U16&);
U32 f16x2_of_e5m2x2(const U16&);
F32 integral(const F32&, Round);
template <class V> V to_int(const F32&, Round);  // saturating; V: U32, S32, U64 or S64

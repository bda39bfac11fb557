// What translated PTX is written in. A warp's virtual register is a vector of 32 lanes; a basic block is a function
// that is given the lanes which stand at its beginning. Arithmetic is inline here; memory, collectives and asynchronous
// units are in emu.cpp. "ISA 9.7" is the section of the PTX manual, version 9.0.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define LANES(type, bytes) __attribute__((vector_size(bytes))) type
typedef LANES(uint16_t, 64) U16;
typedef LANES(int16_t, 64) S16;
typedef LANES(uint32_t, 128) U32;
typedef LANES(int32_t, 128) S32;
typedef LANES(float, 128) F32;
typedef LANES(uint64_t, 256) U64;
typedef LANES(int64_t, 256) S64;
typedef LANES(double, 256) F64;
typedef S32 Pred;  // all ones or zeros

#define EACH_LANE for (int l = 0; l < 32; l++)
#define LANE_OF(mask) \
    for (uint32_t rest_ = (mask), l = 0; rest_ && (l = __builtin_ctz(rest_), true); rest_ &= rest_ - 1)
#define IN static inline __attribute__((always_inline))
#define TO(type, x) __builtin_convertvector(x, type)

constexpr int kExit = 1 << 30;

enum Space { kGlobal, kShared, kGeneric, kParam, kLocal };

struct Warp;
// An instruction: `s` are its operands, as offsets into the warp's registers or as numbers; M is `mask`, widened
typedef void (*Op)(Warp&, char* registers, const int64_t* s, uint32_t mask, const int32_t* wide_mask);

struct Instruction {
    Op run;
    const int64_t* operands;
};
struct BlockCode {
    int first, count, line;
    int next, target;        // where lanes go: those for which the predicate holds to the target
    int predicate, negated;  // its offset; -1: all lanes go to next
    int classes[8];          // instructions: fp32, int, sfu, lsu, tensor, branch, move, other
};
struct SiteInfo {  // an instruction that memory, a collective or an asynchronous unit serves
    int line;
    const char* text;
    int bytes;  // to be counted, where that is not what a lane accesses; -1: it is
};
struct Kernel {
    const char* name;
    int blocks, sites;
    const BlockCode* block;
    const Instruction* code;
    const SiteInfo* site;
    size_t registers, params, shared, local;  // bytes: of a warp's registers, parameters, static shared, local memory
};

struct Special {  // registers, by lane
    U32 tid_x, tid_y, tid_z, lane;
    uint32_t ctaid_x, ctaid_y, ctaid_z, ntid_x, ntid_y, ntid_z, nctaid_x, nctaid_y, nctaid_z, warp;
};
struct WarpBase {
    Special sr;
    char* params;
    char* local;  // of lane 0; others follow `local_size` bytes apart
    size_t local_size;
    char* shared;
    bool yield;  // end the turn after this block
    uint32_t barrier_result;
};

// ---- masks and writes
IN Pred mask_of(uint32_t m) {
    Pred r;
    EACH_LANE r[l] = -int(m >> l & 1);
    return r;
}
#ifdef __AVX512F__
IN Pred lanes(uint32_t m) {
    Pred r;
    ((__m512i*)&r)[0] = _mm512_maskz_set1_epi32(m, -1), ((__m512i*)&r)[1] = _mm512_maskz_set1_epi32(m >> 16, -1);
    return r;
}
IN uint32_t bits(Pred p) {
    const __m512i* v = (const __m512i*)&p;
    return _mm512_test_epi32_mask(v[0], v[0]) | uint32_t(_mm512_test_epi32_mask(v[1], v[1])) << 16;
}
#else
IN Pred lanes(uint32_t m) { return mask_of(m); }
IN uint32_t bits(Pred p) {
    uint32_t r = 0;
    EACH_LANE r |= uint32_t(p[l] & 1) << l;
    return r;
}
#endif
IN WarpBase& base(Warp& w) { return reinterpret_cast<WarpBase&>(w); }
IN void put(U32& d, U32 v, Pred m) { d = m ? v : d; }
IN void put(Pred& d, Pred v, Pred m) { d = m ? v : d; }
IN void put(U64& d, U64 v, Pred m) { d = TO(S64, m) ? v : d; }
IN void put(U16& d, U16 v, Pred m) { d = TO(S16, m) ? v : d; }
IN Pred pred(S32 x) { return x; }
IN Pred pred(S64 x) { return TO(S32, x); }
IN Pred pred(S16 x) { return TO(S32, x); }
IN U32 k32(uint32_t x) { return U32{} + x; }
IN U64 k64(uint64_t x) { return U64{} + x; }
IN U16 k16(uint16_t x) { return U16{} + x; }
IN Pred kpred(bool x) { return Pred{} - int(x); }

// ---- integers (ISA 9.7.1, 9.7.8)
template <class V> IN V pick(Pred p, V a, V b) {
    if constexpr (sizeof(V) == 256) return TO(S64, p) ? a : b;
    else if constexpr (sizeof(V) == 64) return TO(S16, p) ? a : b;
    else return p ? a : b;
}
template <class V> IN V lower(V a, V b) { return a < b ? a : b; }
template <class V> IN V higher(V a, V b) { return a > b ? a : b; }
template <class V> constexpr uint32_t width_of = sizeof(V) == 256 ? 64 : sizeof(V) == 64 ? 16 : 32;
template <class V> IN V shift_left(V a, U32 n) {  // amounts above the width clear
    const Pred in = pred(n < width_of<V>);
    n = n & (width_of<V> - 1);
    if constexpr (sizeof(V) == 256) return pick(in, V(a << TO(U64, n)), V{});
    else if constexpr (sizeof(V) == 64) return pick(in, V(a << TO(U16, n)), V{});
    else return pick(in, V(a << n), V{});
}
template <class V> IN V shift_right(V a, U32 n) {
    const Pred in = pred(n < width_of<V>);
    n = n & (width_of<V> - 1);
    if constexpr (sizeof(V) == 256) return pick(in, V(a >> TO(U64, n)), V{});
    else if constexpr (sizeof(V) == 64) return pick(in, V(a >> TO(U16, n)), V{});
    else return pick(in, V(a >> n), V{});
}
IN S32 shift_right(S32 a, U32 n) { return a >> (S32)lower(n, k32(31)); }  // the sign fills
IN S64 shift_right(S64 a, U32 n) { return a >> TO(S64, lower(n, k32(63))); }
IN S16 shift_right(S16 a, U32 n) { return a >> TO(S16, lower(n, k32(15))); }
#define BY_LANE(name, V, expr)        \
    IN V name(V a, V b, uint32_t m) { \
        V r = {};                     \
        LANE_OF(m) r[l] = expr;       \
        return r;                     \
    }
template <class V> BY_LANE(divide, V, b[l] ? a[l] / b[l] : ~(a[l] & 0))
template <class V> BY_LANE(modulo, V, b[l] ? a[l] % b[l] : a[l])
#undef BY_LANE
IN U32 high(U32 a, U32 b) {
    return TO(U32, (TO(U64, a) * TO(U64, b)) >> 32);
}
IN S32 high(S32 a, S32 b) { return TO(S32, (TO(S64, a) * TO(S64, b)) >> 32); }
IN U16 high(U16 a, U16 b) { return TO(U16, (TO(U32, a) * TO(U32, b)) >> 16); }
IN S16 high(S16 a, S16 b) { return TO(S16, (TO(S32, a) * TO(S32, b)) >> 16); }
IN U64 high(U64 a, U64 b) {
    U64 r;
    EACH_LANE r[l] = uint64_t((unsigned __int128)a[l] * b[l] >> 64);
    return r;
}
IN S64 high(S64 a, S64 b) {
    S64 r;
    EACH_LANE r[l] = int64_t((__int128)a[l] * b[l] >> 64);
    return r;
}
U32 popcount(const U32&);
U32 popcount(const U64&);
U32 reverse(const U32&);
U32 leading_zeros(const U32&);
U32 find_highest(const U32&, bool is_signed, bool shift);
U32 byte_permute(const U32& a, const U32& b, const U32& selector);
U32 insert_bits(const U32& a, const U32& b, const U32& at, const U32& length);
U64 insert_bits(const U64& a, const U64& b, const U32& at, const U32& length);
U32 extract_bits(const U32& a, const U32& at, const U32& length, bool is_signed);
IN U32 funnel_left(U32 lo, U32 hi, U32 n) {
    n = n & 31u;
    return TO(U32, ((TO(U64, hi) << 32 | TO(U64, lo)) << TO(U64, n)) >> 32);
}
IN U32 funnel_right(U32 lo, U32 hi, U32 n) {
    n = n & 31u;
    return TO(U32, (TO(U64, hi) << 32 | TO(U64, lo)) >> TO(U64, n));
}
template <int table> IN U32 lop3(U32 a, U32 b, U32 c) {
    U32 r = {};
    for (int i = 0; i < 8; i++)
        if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return r;
}

// ---- floats (ISA 9.7.3)
IN F32 flush(F32 x) {  // denormals to zero, with their sign
    const U32 u = (U32)x;
    return (F32)((u & 0x7f800000u) ? u : u & 0x80000000u);
}
IN F32 saturate(F32 x) { return x > 0.f ? (x < 1.f ? x : F32{} + 1.f) : F32{}; }
#ifdef __AVX512F__
IN F32 fma_rn(F32 a, F32 b, F32 c) {
    F32 r;
    for (int i = 0; i < 2; i++)
        ((__m512*)&r)[i] = _mm512_fmadd_ps(((__m512*)&a)[i], ((__m512*)&b)[i], ((__m512*)&c)[i]);
    return r;
}
IN F32 fma_rm(F32 a, F32 b, F32 c) {
    F32 r;
    for (int i = 0; i < 2; i++)
        ((__m512*)&r)[i] = _mm512_fmadd_round_ps(((__m512*)&a)[i], ((__m512*)&b)[i], ((__m512*)&c)[i],
                                                 _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    return r;
}
IN F32 square_root(F32 a) {
    F32 r;
    for (int i = 0; i < 2; i++) ((__m512*)&r)[i] = _mm512_sqrt_ps(((__m512*)&a)[i]);
    return r;
}
#else
IN F32 fma_rn(F32 a, F32 b, F32 c) {
    F32 r;
    EACH_LANE r[l] = __builtin_fmaf(a[l], b[l], c[l]);
    return r;
}
F32 fma_rm(F32 a, F32 b, F32 c);
IN F32 square_root(F32 a) {
    F32 r;
    EACH_LANE r[l] = sqrtf(a[l]);
    return r;
}
#endif
template <class V> IN V fmin_(V a, V b) {  // the number where one is NaN
    const auto nan = b != b;
    const V r = a < b ? a : b;
    return nan ? a : r;
}
template <class V> IN V fmax_(V a, V b) {
    const auto nan = b != b;
    const V r = a > b ? a : b;
    return nan ? a : r;
}
IN F32 fmin_nan(F32 a, F32 b) { return (a != a) ? a : (b != b) ? b : fmin_(a, b); }
IN F32 fmax_nan(F32 a, F32 b) { return (a != a) ? a : (b != b) ? b : fmax_(a, b); }
IN F32 magnitude(F32 x) { return (F32)((U32)x & 0x7fffffffu); }
IN F32 negative(F32 x) { return (F32)((U32)x ^ 0x80000000u); }
F32 exp2_(const F32&);
F32 log2_(const F32&);
F32 sin_(const F32&);
F32 cos_(const F32&);
F32 tanh_(const F32&);

// ---- conversions (ISA 9.7.9.22)
IN U16 bf16_of(F32 x) {
    const U32 u = (U32)x, rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
    return TO(U16, (x != x) ? k32(0x7fff) : rounded);
}
IN F32 of_bf16(U16 x) { return (F32)(TO(U32, x) << 16); }
#if defined(__AVX512F__)
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
IN U16 f16_of(F32 x) {
    U16 r;
    EACH_LANE r[l] = _cvtss_sh(x[l], 0);
    return r;
}
IN F32 of_f16(U16 x) {
    F32 r;
    EACH_LANE r[l] = _cvtsh_ss(x[l]);
    return r;
}
#endif
IN U32 pair(U16 low, U16 high) { return TO(U32, low) | TO(U32, high) << 16; }
IN U16 low(U32 x) { return TO(U16, x & 0xffffu); }
IN U16 top(U32 x) { return TO(U16, x >> 16); }
U16 e4m3x2_of(const F32& high, const F32& low);  // saturating
U16 e5m2x2_of(const F32& high, const F32& low);
U32 f16x2_of_e4m3x2(const U16&);
U32 f16x2_of_e5m2x2(const U16&);
U32 to_u32(const F32&, int round);  // saturating; round: 0 to zero, 1 nearest even, 2 down, 3 up
S32 to_s32(const F32&, int round);
S64 to_s64(const F32&, int round);
F32 to_integer(const F32&, int round);

// ---- memory (ISA 9.7.9); T as it lies in memory, R a lane of the register
template <class T, class R> void load(Warp&, int site, Space, const U64& at, uint32_t mask, int n, R* const* to);
template <class T, class R> void store(Warp&, int site, Space, const U64& at, uint32_t mask, int n,
                                       const R* const* from);
enum Atomic { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc };
template <class T> void atomic(Warp&, int site, Space, Atomic, const U64& at, uint32_t mask, const T* a, const T* b,
                               T* old);
void copy_async(Warp&, int site, const U64& to, const U64& from, int bytes, const U32& real, uint32_t mask);
void copy_commit(Warp&, int site, uint32_t mask);
void copy_wait(Warp&, int site, int left, uint32_t mask);
void load_matrix(Warp&, int site, int n, bool transposed, const U64& at, uint32_t mask, U32* const* to);
void store_matrix(Warp&, int site, int n, bool transposed, const U64& at, uint32_t mask, const U32* const* from);

// ---- of a warp (ISA 9.7.9.6, 9.7.13)
enum Shuffle { kUp, kDown, kButterfly, kIndex };
U32 shuffle(Warp&, int site, Shuffle, const U32& a, const U32& b, const U32& c, const U32& members, uint32_t mask,
            Pred* ok);
uint32_t ballot(Warp&, int site, const Pred&, const U32& members, uint32_t mask);
void warp_sync(Warp&, int site, const U32& members, uint32_t mask);
U32 match_any(Warp&, int site, const U32&, const U32& members, uint32_t mask);
U32 match_any(Warp&, int site, const U64&, const U32& members, uint32_t mask);
uint32_t reduce(Warp&, int site, Atomic, bool is_signed, const U32&, const U32& members, uint32_t mask);
uint32_t elect(Warp&, int site, const U32& members, uint32_t mask);
void whole(Warp&, int site, uint32_t mask);  // .aligned: all lanes must be here

// ---- barriers (ISA 9.7.13)
void barrier(Warp&, int site, uint32_t id, uint32_t threads, bool waits, uint32_t mask, const Pred* vote = nullptr);
void mbarrier_init(Warp&, int site, const U64& at, const U32& count, uint32_t mask);
void mbarrier_arrive(Warp&, int site, const U64& at, const U32& count, const U32& bytes, uint32_t mask);
void mbarrier_expect(Warp&, int site, const U64& at, const U32& bytes, uint32_t mask);
void mbarrier_inval(Warp&, int site, const U64& at, uint32_t mask);
Pred mbarrier_try(Warp&, int site, const U64& at, const U32& parity, uint32_t mask);
void proxy_fence(Warp&, uint32_t mask);
void nap(Warp&, int site);

// ---- asynchronous units (ISA 9.7.9.25, 9.7.15)
void tma_load(Warp&, int site, const U64& to, const U64& map, int n, const U32* const* coordinates, const U64& barrier,
              uint32_t mask);
void map_replace(Warp&, int site, const U64& at, int field, int which, const U64& value,
                 uint32_t mask);  // ISA 9.7.9.28
void map_copy(Warp&, int site, const U64& to, const U64& from, uint32_t mask);
void tma_store(Warp&, int site, const U64& map, int n, const U32* const* coordinates, const U64& from, uint32_t mask);
void tma_commit(Warp&, int site, uint32_t mask);
void tma_wait(Warp&, int site, int left, uint32_t mask);
enum Element { kE4m3, kE5m2, kBf16, kF16, kTf32 };
void mma(Warp&, int site, int k, Element a, Element b, U32* const* d, const U32* const* ra, const U32* const* rb,
         const U32* const* c, uint32_t mask);
void wgmma(Warp&, int site, int n, int k, Element a, Element b, U32* const* d, const U32* const* ra, U64 da, U64 db,
           const Pred& accumulate, bool ta, bool tb, int sign_a, int sign_b, uint32_t mask);
void wgmma_commit(Warp&, int site, uint32_t mask);
void wgmma_wait(Warp&, int site, int left, uint32_t mask);
void wgmma_fence(Warp&, int site, uint32_t mask);
[[noreturn]] void trap(Warp&, int site, const char* why);

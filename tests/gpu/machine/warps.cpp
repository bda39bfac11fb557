// Instructions in which the lanes of a warp take part together, and arithmetic that goes lane by lane.
#include <cfenv>

#include "machine.h"

void trap(Warp& w, int site, const char* why) { fault(w, site, why); }
void need_whole_warp(Warp& w, int site, uint32_t mask) {
    if (mask != w.alive) throw Park{site, "only lanes " + hex(mask) + " of " + hex(w.alive) + " are here"};
    meet(w);
}
void need_members(Warp& w, int site, const U32& members, uint32_t mask) {
    bool all = true;
    LANE_OF(mask) {
        all &= !(w.alive & ~members[l]);
        if (!(members[l] >> l & 1)) fault(w, site, lane_name(l) + " is not in its own mask " + hex(members[l]));
        if (members[l] & w.alive & ~mask)
            throw Park{site, "the mask names lanes " + hex(members[l]) + ", but only " + hex(mask) + " are here"};
    }
    if (all) meet(w);
}
void warp_sync(Warp& w, int site, const U32& members, uint32_t mask) { need_members(w, site, members, mask), sync(w); }
U32 shuffle(Warp& w, int site, Shuffle how, const U32& a, const U32& b, const U32& c, const U32& members, uint32_t mask,
            Pred* ok) {
    need_members(w, site, members, mask);
    U32 r = {};
    *ok = Pred{};
    LANE_OF(mask) {  // ISA 9.7.9.6
        const int shift = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31, lane = l;
        const int most = (lane & segment) | (clamp & ~segment);
        int from = how == kUp          ? lane - shift
                   : how == kDown      ? lane + shift
                   : how == kButterfly ? lane ^ shift
                                       : (lane & segment) | (shift & ~segment);
        const bool inside = how == kUp ? from >= most : from <= most;
        if (!inside) from = lane;
        if (!(mask >> from & 1))
            fault(w, site, lane_name(l) + " reads lane " + std::to_string(from) + ", which is not here");
        r[l] = a[from], (*ok)[l] = -int(inside);
    }
    return r;
}
uint32_t ballot(Warp& w, int site, const Pred& p, const U32& members, uint32_t mask) {
    need_members(w, site, members, mask);
    return bits(p) & mask;
}
template <class V> static U32 match(Warp& w, int site, const V& a, const U32& members, uint32_t mask) {
    need_members(w, site, members, mask);
    U32 r = {};
    LANE_OF(mask)
    for (int other = 0; other < 32; other++) r[l] |= uint32_t(mask >> other & 1 && a[other] == a[l]) << other;
    return r;
}
U32 match_any(Warp& w, int site, const U32& a, const U32& members, uint32_t mask) {
    return match(w, site, a, members, mask);
}
U32 match_any(Warp& w, int site, const U64& a, const U32& members, uint32_t mask) {
    return match(w, site, a, members, mask);
}
template <class T> uint32_t reduce(Warp& w, int site, Atomic how, const U32& a, const U32& members, uint32_t mask) {
    need_members(w, site, members, mask);
    T r = T(a[std::countr_zero(mask)]);
    LANE_OF(mask & (mask - 1)) {
        const T x = T(a[l]);
        r = how == kAdd   ? r + x
            : how == kAnd ? r & x
            : how == kOr  ? r | x
            : how == kXor ? r ^ x
            : how == kMin ? std::min(r, x)
                          : std::max(r, x);
    }
    return r;
}
template uint32_t reduce<uint32_t>(Warp&, int, Atomic, const U32&, const U32&, uint32_t);
template uint32_t reduce<int32_t>(Warp&, int, Atomic, const U32&, const U32&, uint32_t);
uint32_t elect(Warp& w, int site, const U32& members, uint32_t mask) {
    need_members(w, site, members, mask);
    return std::countr_zero(mask);
}

// setmaxnreg (ISA 9.7.19.5): more registers come from what other warps of the block gave up, and may have to be waited
// for
void set_registers(Warp& w, int site, int count, bool more, uint32_t mask) {
    need_whole_warp(w, site, mask);
    Block& b = *w.block;
    if (count < 24 || count > 256 || count % 8)
        fault(w, site, "a thread cannot have " + std::to_string(count) + " registers");
    if (!b.processor->kernel.pool) fault(w, site, "setmaxnreg in a kernel without .maxntid or .maxnreg");
    if (more ? count < w.budget : count > w.budget)
        fault(w, site,
              "a thread has " + std::to_string(w.budget) + " registers, and asks for " + (more ? "more: " : "fewer: ") +
                  std::to_string(count));
    const int wanted = 32 * (count - w.budget);
    if (wanted > b.pool) {
        w.yield = true, w.site = site;
        throw Park{-1, "setmaxnreg waits for " + std::to_string(wanted) + " registers, and " + std::to_string(b.pool) +
                           " are free"};
    }
    b.pool -= wanted, w.budget = count, b.processor->events++;
}
void launch_dependents(Warp& w) {
    w.block->processor->dependents = true;
    if (!w.waited) w.block->processor->early = true;
}
void wait_for_previous(Warp& w) { w.waited = w.block->processor->waits = true; }
void nap(Warp& w, int site) { w.yield = true, w.site = site; }

// ---- registers
void touch(Warp& w, char* registers, const int64_t* s, uint32_t mask) {
    if (!guarded(registers, s, mask)) return;
    for (int64_t i = 0; i < s[3]; i++) {
        uint32_t& mark = *(uint32_t*)(registers + s[4 + 2 * i]);
        if (mark == kInFlight ? s[5 + 2 * i] & 1 : s[5 + 2 * i] & 2) continue;
        if (mark != kInFlight) mark = w.wgmma_fences;
        else fault(w, s[0], "a register of a wgmma that has not been waited for is used");
    }
}
void note_written(char* registers, const int64_t* s, uint32_t mask) {
    for (int64_t i = 0; i < s[3]; i++) *(uint32_t*)(registers + s[4 + i]) &= ~guarded(registers, s, mask);
}
void need_written(Warp& w, char* registers, const int64_t* s, uint32_t mask) {
    if (!w.block->processor->checks(kUninitialised)) return;
    for (int64_t i = 0; i < s[3]; i++)
        if (const uint32_t missing = *(uint32_t*)(registers + s[4 + i]) & guarded(registers, s, mask))
            fault(w, s[0], lane_name(std::countr_zero(missing)) + " reads a register that nothing has written");
}

// ---- arithmetic by lane
#define LANES_OF(type, name, args, expr) \
    type name args {                     \
        type r;                          \
        EACH_LANE r[l] = expr;           \
        return r;                        \
    }
template <class T> static T reversed(T x) {
    T y = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); i++) y |= (x >> i & 1) << (8 * sizeof(T) - 1 - i);
    return y;
}
LANES_OF(U32, popcount, (const U32& a), std::popcount(uint32_t(a[l])))
LANES_OF(U32, popcount, (const U64& a), std::popcount(uint64_t(a[l])))
LANES_OF(U32, leading_zeros, (const U32& a), std::countl_zero(uint32_t(a[l])))
LANES_OF(U32, leading_zeros, (const U64& a), std::countl_zero(uint64_t(a[l])))
LANES_OF(U32, reverse, (const U32& a), reversed<uint32_t>(a[l]))
LANES_OF(U64, reverse, (const U64& a), reversed<uint64_t>(a[l]))
static uint32_t highest(uint32_t x, bool shift) {
    return !x ? ~0u : shift ? std::countl_zero(x) : 31 - std::countl_zero(x);
}
template <bool shift> LANES_OF(U32, find_highest, (const U32& a), highest(a[l], shift))
template <bool shift> LANES_OF(U32, find_highest, (const S32& a), highest(a[l] < 0 ? ~a[l] : a[l], shift))
template U32 find_highest<true>(const U32&);
template U32 find_highest<false>(const U32&);
template U32 find_highest<true>(const S32&);
template U32 find_highest<false>(const S32&);
static uint32_t permuted(uint64_t bytes, uint32_t selector) {
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t s = selector >> 4 * i, byte = bytes >> 8 * (s & 7) & 0xff;
        out |= (s & 8 ? byte >> 7 ? 0xffu : 0u : byte) << 8 * i;
    }
    return out;
}
LANES_OF(U32, byte_permute, (const U32& a, const U32& b, const U32& s), permuted(uint64_t(b[l]) << 32 | a[l], s[l]))
template <class T> static T inserted(T a, T b, uint32_t at, uint32_t length) {
    const uint32_t width = 8 * sizeof(T);
    at &= 255, length &= 255;
    if (at >= width || !length) return b;
    const T ones = length >= width ? ~T{} : (T{1} << length) - 1;
    return (b & ~(ones << at)) | (a & ones) << at;
}
LANES_OF(U32, insert_bits, (const U32& a, const U32& b, const U32& at, const U32& n),
         inserted<uint32_t>(a[l], b[l], at[l], n[l]))
LANES_OF(U64, insert_bits, (const U64& a, const U64& b, const U32& at, const U32& n),
         inserted<uint64_t>(a[l], b[l], at[l], n[l]))
template <class T> static T extracted(T a, uint32_t at, uint32_t length) {  // a signed type's missing bits are its sign
    const int width = 8 * sizeof(T);
    const int from = at & 255, n = length & 255;
    if (!n) return 0;
    const auto bit = [&](int i) { return i < width ? a >> i & 1 : a < 0; };
    std::make_unsigned_t<T> r = 0;
    const bool sign = std::is_signed_v<T> && bit(std::min(from + n - 1, width - 1));
    for (int i = 0; i < width; i++)
        r |= std::make_unsigned_t<T>(i < n ? i + from < width ? bit(i + from) : sign : sign) << i;
    return r;
}
LANES_OF(U32, extract_bits, (const U32& a, const U32& at, const U32& n), extracted<uint32_t>(a[l], at[l], n[l]))
LANES_OF(S32, extract_bits, (const S32& a, const U32& at, const U32& n), extracted<int32_t>(a[l], at[l], n[l]))
LANES_OF(U64, extract_bits, (const U64& a, const U32& at, const U32& n), extracted<uint64_t>(a[l], at[l], n[l]))
LANES_OF(S64, extract_bits, (const S64& a, const U32& at, const U32& n), extracted<int64_t>(a[l], at[l], n[l]))

LANES_OF(F32, exp2_of, (const F32& a), exp2f(a[l]))
LANES_OF(F32, log2_of, (const F32& a), log2f(a[l]))
LANES_OF(F32, sine, (const F32& a), sinf(a[l]))
LANES_OF(F32, cosine, (const F32& a), cosf(a[l]))
LANES_OF(F32, tanh_of, (const F32& a), tanhf(a[l]))
__attribute__((noipa)) static LANES_OF(F32, fma_now, (const F32& a, const F32& b, const F32& c),
                                       __builtin_fmaf(a[l], b[l], c[l])) F32
    fma_rounded(const F32& a, const F32& b, const F32& c, Round how) {
    std::fesetround(how == kTowardZero ? FE_TOWARDZERO
                    : how == kFloor    ? FE_DOWNWARD
                    : how == kCeiling  ? FE_UPWARD
                                       : FE_TONEAREST);
    const F32 r = fma_now(a, b, c);
    std::fesetround(FE_TONEAREST);
    return r;
}
static double rounded(double x, Round how) {
    return how == kTowardZero ? std::trunc(x)
           : how == kNearest  ? std::nearbyint(x)
           : how == kFloor    ? std::floor(x)
                              : std::ceil(x);
}
LANES_OF(F32, integral, (const F32& a, Round how), float(rounded(a[l], how)))
template <class T> static T saturated(double x, Round how) {
    x = rounded(x, how);
    if (x != x) return sizeof(T) == 8 ? T{1} << 63 : T{};  // ISA 9.7.9.22
    if (x <= double(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
    return x >= double(std::numeric_limits<T>::max()) ? std::numeric_limits<T>::max() : T(x);
}
template <> LANES_OF(U32, to_int<U32>, (const F32& a, Round how), saturated<uint32_t>(a[l], how))
template <> LANES_OF(S32, to_int<S32>, (const F32& a, Round how), saturated<int32_t>(a[l], how))
template <> LANES_OF(U64, to_int<U64>, (const F32& a, Round how), saturated<uint64_t>(a[l], how))
template <> LANES_OF(S64, to_int<S64>, (const F32& a, Round how), saturated<int64_t>(a[l], how))

// FP8 (ISA 5.2.3): e4m3 has no infinities and one NaN a sign, e5m2 has both
const float* fp8_values(bool e5m2) {
    static const auto tables = [] {
        std::array<std::array<float, 256>, 2> t;
        for (int i = 0; i < 256; i++)
            for (int k = 0; k < 2; k++) {
                const int digits = k ? 2 : 3, e = (i & 127) >> digits, m = i & ((1 << digits) - 1), one = 1 << digits;
                const float x = std::ldexp(float(e ? one + m : m), (e ? e : 1) - (k ? 17 : 10));
                const bool nan = k ? e == 31 && m : (i & 127) == 127;
                t[k][i] = (i & 128 ? -1.f : 1.f) * (nan ? NAN : k && e == 31 ? INFINITY : x);
            }
        return t;
    }();
    return tables[e5m2].data();
}
static uint8_t fp8_of(float x, bool e5m2) {  // to nearest even, saturating
    const float *values = fp8_values(e5m2), a = std::fabs(x);
    const int last = e5m2 ? 0x7b : 0x7e, sign = std::signbit(x) ? 128 : 0;
    if (x != x) return 0x7f;
    if (a >= values[last]) return sign | last;
    const int above = std::upper_bound(values, values + last + 1, a) - values, below = above - 1;
    const float low = a - values[below], high = values[above] - a;
    return sign | (low < high || (low == high && below % 2 == 0) ? below : above);
}
LANES_OF(U16, e4m3x2_of, (const F32& high, const F32& low),
         uint16_t(fp8_of(high[l], false) << 8 | fp8_of(low[l], false)))
LANES_OF(U16, e5m2x2_of, (const F32& high, const F32& low), uint16_t(fp8_of(high[l], true) << 8 | fp8_of(low[l], true)))
static U32 halves(const U16& x, const float* values) {
    F32 low, high;
    EACH_LANE low[l] = values[x[l] & 255], high[l] = values[x[l] >> 8];
    return pair(f16_of(low), f16_of(high));
}
U32 f16x2_of_e4m3x2(const U16& x) { return halves(x, fp8_values(false)); }
U32 f16x2_of_e5m2x2(const U16& x) { return halves(x, fp8_values(true)); }

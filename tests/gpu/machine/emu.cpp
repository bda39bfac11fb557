// Runs translated kernels: blocks of a grid, warps of a block, groups of a warp's lanes; memory; what is asynchronous.
#include "emu.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace {

struct Fault {
    std::string what;
};

struct Group {   // lanes that stand before an instruction
    int pc, at;  // its block, its place in there
    uint32_t mask;
    bool parked = false;  // it takes lanes that are not here
};
struct Park {
    int site;
    std::string why;
};

struct Site {  // counters of an instruction
    uint64_t runs, lanes, units, ideal, useful, failed;
};
struct Counters {
    uint64_t *block_runs, *block_lanes;
    Site* site;
};

struct Product {  // a wgmma that has been issued
    int n, k;
    Element a, b;
    U32* d[128];
    const U32* ra[4];
    bool registers, accumulate, ta, tb;
    float sign;
    uint64_t da, db;
    int site;
};
struct Copy {  // cp.async of a lane
    uint64_t to, from;
    int bytes, real, lane;
};
struct TensorMap {  // what our cuTensorMapEncodeTiled makes of a CUtensorMap
    uint64_t magic;
    char* base;
    uint32_t rank, element, swizzle, nan;
    uint32_t sizes[5], box[5];
    uint64_t strides[4];
};
static_assert(sizeof(TensorMap) <= 128);
constexpr uint64_t kMagic = 0x7031746d61707478;
struct Box {
    TensorMap map;
    int64_t at[5];
    uint64_t shared, barrier;
    int site;
};

template <class T> struct InFlight {
    std::vector<std::vector<T>> groups;
    std::vector<T> open;
    void commit() { groups.push_back(std::move(open)), open.clear(); }
    bool empty() const {
        return open.empty() && std::all_of(groups.begin(), groups.end(), [](auto& g) { return g.empty(); });
    }
};

struct Block;
struct Clock {  // of up to 32 warps: who has seen what
    uint32_t at[32] = {};
    void join(const Clock& o) {
        for (int i = 0; i < 32; i++) at[i] = std::max(at[i], o.at[i]);
    }
};
struct Stamp {  // who wrote a word of shared memory last, by ordinary instructions
    uint8_t written, warp, lane, atomic;
    uint32_t time, syncs, fences;
};
}  // namespace

struct Warp : WarpBase {
    Block* block;
    int id;
    uint32_t alive;  // lanes that have not returned
    std::vector<Group> groups;
    std::vector<char> registers_memory;
    void* registers;
    std::vector<char> local_memory;
    int waits_at = -1;           // a barrier's number
    Clock clock, fenced;         // what it knows of every warp's time, and knew at its last fence.proxy.async
    uint32_t syncs, fences[32];  // how often its lanes met, and each fenced off the asynchronous proxy
    int site = -1;               // where it waits
    InFlight<Product> products;
    InFlight<Copy> copies;
    InFlight<Box> stores;
};

namespace {

struct Barrier {
    uint32_t arrived, expected, yes, all;
    bool whole;  // all threads of the block
    Clock clock;
};

struct Launch {
    const Kernel* kernel;
    uint32_t grid[3], block[3], dynamic;
    std::vector<char> params;
    uint64_t seed, events = 0;
    bool counting;
    Counters count;
    std::mt19937_64 rng;
    std::map<std::string, uint64_t> totals;
    uint64_t macs[5] = {}, tma_bytes = 0;
};

struct Block {
    Launch* launch;
    uint32_t index[3];
    std::vector<Warp> warps;
    char* shared;
    uint64_t shared_size;
    Barrier barriers[16];
    std::vector<Box> loads;
    int alive;
    bool rotate = false;
    std::vector<Stamp> stamps;         // by word
    std::map<uint64_t, Clock> clocks;  // of mbarriers
};

struct Range {
    uint64_t low, high;
    std::string name;
};
std::vector<Range> ranges;  // sorted; none: nothing is checked
size_t last_range;
std::string failure;
int checking;  // races in shared memory; 2: also that mbarriers are fenced after their initialisation

std::string place(const Warp& w) {
    const Block& b = *w.block;
    char text[128];
    snprintf(text, sizeof text, "block (%u,%u,%u) warp %d", b.index[0], b.index[1], b.index[2], w.id);
    return text;
}
std::string at(const Warp& w, int site) {
    const SiteInfo& s = w.block->launch->kernel->site[site];
    return " at PTX line " + std::to_string(s.line) + ": " + s.text;
}
[[noreturn]] void fault(const Warp& w, int site, const std::string& why) {
    throw Fault{place(w) + ": " + why + at(w, site)};
}
std::string hex(uint64_t x) {
    char t[32];
    snprintf(t, sizeof t, "0x%llx", (unsigned long long)x);
    return t;
}

// ---- addresses
void check_global(Warp& w, int site, uint64_t p, size_t n, int lane) {
    if (ranges.empty()) return;
    if (const Range& r = ranges[last_range]; p >= r.low && p + n <= r.high) return;
    auto it = std::upper_bound(ranges.begin(), ranges.end(), p, [](uint64_t x, const Range& r) { return x < r.low; });
    if (it != ranges.begin()) {
        --it;
        if (p >= it->low && p + n <= it->high) return void(last_range = it - ranges.begin());
        fault(w, site,
              "lane " + std::to_string(lane) + " reaches " + std::to_string(n) + " bytes at " + hex(p) + ", " +
                  std::to_string(int64_t(p + n - it->high)) + " bytes past the end of " + it->name);
    }
    fault(w, site, "lane " + std::to_string(lane) + " reaches " + hex(p) + ", which is no tensor's");
}
bool in_shared(const Warp& w, uint64_t p) {
    const uint64_t s = uint64_t(w.block->shared);
    return p >= s && p < s + w.block->shared_size;
}
char* resolve(Warp& w, int site, Space space, uint64_t p, size_t n, int lane) {
    if (p % n) fault(w, site, "lane " + std::to_string(lane) + ": misaligned address " + hex(p));
    switch (space) {
        case kShared:
            if (p + n > w.block->shared_size || p + n < n)
                fault(w, site,
                      "lane " + std::to_string(lane) + ": shared address " + hex(p) + " is past the end, " +
                          hex(w.block->shared_size));
            return w.block->shared + p;
        case kGeneric:
            if (in_shared(w, p)) return (char*)p;
            if (p >= uint64_t(w.params) && p + n <= uint64_t(w.params) + w.block->launch->params.size())
                return (char*)p;
            if (w.local_size && p >= uint64_t(w.local) && p + n <= uint64_t(w.local) + 32 * w.local_size)
                return (char*)p;
            [[fallthrough]];
        case kGlobal: check_global(w, site, p, n, lane); return (char*)p;
        case kParam:
            if (p < uint64_t(w.params) || p + n > uint64_t(w.params) + w.block->launch->params.size())
                fault(w, site, "outside the parameters");
            return (char*)p;
        case kLocal: return (char*)p;
    }
    return nullptr;
}

// ---- races in shared memory: between warps, by vector clocks over bar and mbarrier; within a warp, where lanes have
// not met since; between ordinary writes and the asynchronous proxy (ISA 8.9), where the writer has not fenced since
enum Reader { kLane, kWarp, kAsync };
void release(Warp& w, Clock& c) { c.join(w.clock), w.clock.at[w.id]++; }
void check_read(Warp& w, int site, uint64_t p, size_t n, int lane, Reader reader, bool atomic = false,
                bool writes = false) {
    if (!checking) return;
    for (uint64_t word = p / 4; word <= (p + n - 1) / 4; word++) {
        const Stamp& s = w.block->stamps[word];
        if (!s.written || (atomic && s.atomic)) continue;
        const std::string who = "warp " + std::to_string(s.warp) + " lane " + std::to_string(s.lane);
        const char* what = writes ? " writes" : " reads";
        if (s.warp != w.id && s.time > w.clock.at[s.warp] && !(writes && n < 4))  // bytes beside each other are no race
            fault(w, site,
                  "race: lane " + std::to_string(lane) + what + " shared address " + hex(4 * word) + ", which " + who +
                      " wrote, and no barrier lies between");
        if (s.warp == w.id && reader != kAsync && (reader == kWarp || s.lane != lane) && s.syncs == w.syncs && !writes)
            fault(w, site,
                  "race: lane " + std::to_string(lane) + what + " shared address " + hex(4 * word) + ", which " + who +
                      " wrote, and no bar.warp.sync lies between");
        // The fence may be the writer's or, after the barrier that lies between, the reader's (Triton's order)
        if (reader == kAsync && s.fences == w.block->warps[s.warp].fences[s.lane] &&
            (s.warp == w.id || s.time > w.fenced.at[s.warp]))
            fault(w, site,
                  "shared address " + hex(4 * word) + " was written by " + who + " without fence.proxy.async since");
    }
}
void stamp(Warp& w, uint64_t p, size_t n, int lane, bool atomic = false) {
    if (!checking) return;
    for (uint64_t word = p / 4; word <= (p + n - 1) / 4; word++)
        w.block->stamps[word] = {1, uint8_t(w.id), uint8_t(lane), atomic, w.clock.at[w.id], w.syncs, w.fences[lane]};
}
void check_write(Warp& w, int site, uint64_t p, size_t n, int lane, bool atomic = false) {
    check_read(w, site, p, n, lane, kLane, atomic, true), stamp(w, p, n, lane, atomic);
}

// ---- counting
// Sectors of 32 bytes that a warp's request touches, and the fewest that its bytes could fill
void count_global(Site& s, const uint64_t* p, int lanes, int size) {
    uint64_t sector[64], address[32];
    int n = 0;
    for (int i = 0; i < lanes; i++) {
        address[i] = p[i];
        for (uint64_t x = p[i] / 32; x <= (p[i] + size - 1) / 32; x++) sector[n++] = x;
    }
    std::sort(sector, sector + n), std::sort(address, address + lanes);
    const int distinct = std::unique(address, address + lanes) - address;
    s.units += std::unique(sector, sector + n) - sector;
    s.ideal += (distinct * size + 31) / 32;
    s.useful += uint64_t(distinct) * size;
}
// Passes over 32 banks of 4 bytes: 8-byte accesses go by half, 16-byte ones by quarter warps
void count_shared(Site& s, const uint64_t* p, const int* lane, int lanes, int size) {
    const int per = size >= 16 ? 8 : size >= 8 ? 16 : 32, words = std::max(size / 4, 1);
    for (int begin = 0; begin < 32; begin += per) {
        uint64_t seen[32][32];
        int n[32] = {}, most = 0, all = 0;
        for (int i = 0; i < lanes; i++) {
            if (lane[i] < begin || lane[i] >= begin + per) continue;
            for (int j = 0; j < words; j++) {
                const uint64_t word = p[i] / 4 + j, bank = word % 32;
                if (std::find(seen[bank], seen[bank] + n[bank], word) == seen[bank] + n[bank])
                    seen[bank][n[bank]++] = word, most = std::max(most, n[bank]), all++;
            }
        }
        s.units += most, s.ideal += (all + 31) / 32;
        s.useful += all * 4;
    }
}
void count(Warp& w, int site, Space space, const uint64_t* p, const int* lane, int lanes, int size) {
    if (!w.block->launch->counting) return;
    Site& s = w.block->launch->count.site[site];
    if (const int merged = w.block->launch->kernel->site[site].bytes; merged >= 0) size = merged;
    if (!size) return;  // a part of another access
    s.runs++, s.lanes += lanes;
    if (!lanes) return;
    if (space == kGeneric) space = in_shared(w, p[0]) ? kShared : kGlobal;
    if (space == kShared) count_shared(s, p, lane, lanes, size);
    else if (space == kGlobal) count_global(s, p, lanes, size);
}
void count_run(Warp& w, int site, uint32_t mask) {
    if (!w.block->launch->counting) return;
    Site& s = w.block->launch->count.site[site];
    s.runs++, s.lanes += std::popcount(mask);
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))
void trap(Warp& w, int site, const char* why) { fault(w, site, why); }

// ---- arithmetic by lanes
#define LANES_OF(type, name, args, expr) \
    type name args {                     \
        type r;                          \
        EACH_LANE r[l] = expr;           \
        return r;                        \
    }
LANES_OF(U32, popcount, (const U32& a), std::popcount(uint32_t(a[l])))
LANES_OF(U32, popcount, (const U64& a), std::popcount(uint64_t(a[l])))
LANES_OF(U32, leading_zeros, (const U32& a), std::countl_zero(uint32_t(a[l])))
LANES_OF(F32, exp2_, (const F32& a), exp2f(a[l]))
LANES_OF(F32, log2_, (const F32& a), log2f(a[l]))
LANES_OF(F32, sin_, (const F32& a), sinf(a[l]))
LANES_OF(F32, cos_, (const F32& a), cosf(a[l]))
LANES_OF(F32, tanh_, (const F32& a), tanhf(a[l]))
static uint32_t reversed(uint32_t x) {
    uint32_t y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
    return y;
}
LANES_OF(U32, reverse, (const U32& a), reversed(a[l]))
U32 find_highest(const U32& a, bool is_signed, bool shift) {
    U32 r;
    EACH_LANE {
        const uint32_t x = is_signed && int32_t(a[l]) < 0 ? ~a[l] : a[l];
        const int at = x ? 31 - std::countl_zero(x) : -1;
        r[l] = at < 0 ? ~0u : shift ? 31 - at : at;
    }
    return r;
}
U32 byte_permute(const U32& a, const U32& b, const U32& selector) {
    U32 r;
    EACH_LANE {
        const uint64_t bytes = uint64_t(b[l]) << 32 | a[l];
        uint32_t out = 0;
        for (int i = 0; i < 4; i++) {
            const uint32_t s = selector[l] >> 4 * i, byte = bytes >> 8 * (s & 7) & 0xff;
            out |= (s & 8 ? byte >> 7 ? 0xffu : 0u : byte) << 8 * i;
        }
        r[l] = out;
    }
    return r;
}
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
U32 extract_bits(const U32& a, const U32& at, const U32& length, bool is_signed) {
    U32 r;
    EACH_LANE {
        const uint32_t p = at[l] & 255, n = length[l] & 255;
        const int64_t x = is_signed ? int64_t(int32_t(a[l])) : int64_t(uint64_t(a[l]));
        const uint64_t shifted = p > 31 ? uint64_t(x >> 63) : uint64_t(x >> p);
        const uint64_t ones = n >= 32 ? ~0u : (1u << n) - 1;
        uint64_t v = shifted & ones;
        if (is_signed && n && n < 32 && v >> (n - 1) & 1) v |= ~ones;
        r[l] = uint32_t(v);
    }
    return r;
}
#ifndef __AVX512F__
F32 fma_rm(F32 a, F32 b, F32 c) {
    F32 r;
    EACH_LANE {
        const double x = double(a[l]) * b[l] + c[l];
        float y = x;
        r[l] = y > x ? nextafterf(y, -INFINITY) : y;
    }
    return r;
}
#endif
static double rounded(float x, int how) {
    return how == 0 ? std::trunc(x) : how == 1 ? std::nearbyint(x) : how == 2 ? std::floor(x) : std::ceil(x);
}
U32 to_u32(const F32& a, int how) {
    U32 r;
    EACH_LANE {
        const double x = rounded(a[l], how);
        r[l] = a[l] != a[l] || x <= 0 ? 0 : x >= 4294967295.0 ? ~0u : uint32_t(x);
    }
    return r;
}
S32 to_s32(const F32& a, int how) {
    S32 r;
    EACH_LANE {
        const double x = rounded(a[l], how);
        r[l] = a[l] != a[l] ? 0 : x <= -2147483648.0 ? INT32_MIN : x >= 2147483647.0 ? INT32_MAX : int32_t(x);
    }
    return r;
}
S64 to_s64(const F32& a, int how) {
    S64 r;
    EACH_LANE r[l] = int64_t(rounded(a[l], how));
    return r;
}
LANES_OF(F32, to_integer, (const F32& a, int how), float(rounded(a[l], how)))

// FP8 (ISA 5.2.3): e4m3 has no infinities and one NaN a sign, e5m2 has both
static const std::array<float, 256>& fp8_values(bool e5m2) {
    static const auto tables = [] {
        std::array<std::array<float, 256>, 2> t;
        for (int i = 0; i < 256; i++) {
            const int e = i >> 3 & 15, m = i & 7;
            const float x = e ? std::ldexp(8.f + m, e - 10) : std::ldexp(float(m), -9);
            t[0][i] = (i & 127) == 127 ? NAN : i & 128 ? -x : x;
            const int e5 = i >> 2 & 31, m5 = i & 3;
            const float y = e5 == 31 ? (m5 ? NAN : INFINITY)
                            : e5     ? std::ldexp(4.f + m5, e5 - 17)
                                     : std::ldexp(float(m5), -16);
            t[1][i] = i & 128 ? -y : y;
        }
        return t;
    }();
    return tables[e5m2];
}
static uint8_t fp8_of(float x, bool e5m2) {  // to nearest even, saturating
    const auto& values = fp8_values(e5m2);
    const int last = e5m2 ? 0x7b : 0x7e;
    const uint8_t sign = std::signbit(x) ? 128 : 0;
    if (x != x) return 0x7f;
    const float a = std::fabs(x);
    if (a >= values[last]) return sign | last;
    const int above = std::upper_bound(values.begin(), values.begin() + last + 1, a) - values.begin(),
              below = above - 1;
    const float low = a - values[below], high = values[above] - a;
    return sign | (low < high || (low == high && below % 2 == 0) ? below : above);
}
LANES_OF(U16, e4m3x2_of, (const F32& high, const F32& low),
         uint16_t(fp8_of(high[l], false) << 8 | fp8_of(low[l], false)))
LANES_OF(U16, e5m2x2_of, (const F32& high, const F32& low), uint16_t(fp8_of(high[l], true) << 8 | fp8_of(low[l], true)))
static uint32_t halves(uint16_t x, bool e5m2) {
    const auto& v = fp8_values(e5m2);
    return uint32_t(_cvtss_sh(v[x & 255], 0)) | uint32_t(_cvtss_sh(v[x >> 8], 0)) << 16;
}
LANES_OF(U32, f16x2_of_e4m3x2, (const U16& a), halves(a[l], false))
LANES_OF(U32, f16x2_of_e5m2x2, (const U16& a), halves(a[l], true))

// ---- memory
template <class T, class R>
void load(Warp& w, int site, Space space, const U64& at, uint32_t mask, int n, R* const* to) {
    uint64_t p[32];
    int lane[32], lanes = 0;
    LANE_OF(mask) {
        const char* from = resolve(w, site, space, at[l], n * sizeof(T), l);
        if (checking && (space == kShared || (space == kGeneric && in_shared(w, at[l]))))
            check_read(w, site, from - w.block->shared, n * sizeof(T), l, kLane);
        p[lanes] = at[l], lane[lanes++] = l;
        for (int i = 0; i < n; i++) {
            T v;
            memcpy(&v, from + i * sizeof(T), sizeof(T));
            to[i][l] = R(v);
        }
    }
    if (space != kParam) count(w, site, space, p, lane, lanes, n * sizeof(T));
}
template <class T, class R>
void store(Warp& w, int site, Space space, const U64& at, uint32_t mask, int n, const R* const* from) {
    uint64_t p[32];
    int lane[32], lanes = 0;
    LANE_OF(mask) {
        char* to = resolve(w, site, space, at[l], n * sizeof(T), l);
        p[lanes] = at[l], lane[lanes++] = l;
        T v[8];
        for (int i = 0; i < n; i++) v[i] = T(from[i][l]);
        if (checking && (space == kShared || (space == kGeneric && in_shared(w, at[l])))) {
            const uint64_t begin = to - w.block->shared;  // warps that hold the same value may all write it
            if (memcmp(to, v, n * sizeof(T))) check_write(w, site, begin, n * sizeof(T), l);
            else stamp(w, begin, n * sizeof(T), l);
        }
        memcpy(to, v, n * sizeof(T));
    }
    w.block->launch->events++;
    count(w, site, space, p, lane, lanes, n * sizeof(T));
}
#define LOADS(T)                                                                                     \
    template void load<T, uint16_t>(Warp&, int, Space, const U64&, uint32_t, int, uint16_t* const*); \
    template void load<T, uint32_t>(Warp&, int, Space, const U64&, uint32_t, int, uint32_t* const*); \
    template void load<T, uint64_t>(Warp&, int, Space, const U64&, uint32_t, int, uint64_t* const*);
#define STORES(T)                                                                                           \
    template void store<T, uint16_t>(Warp&, int, Space, const U64&, uint32_t, int, const uint16_t* const*); \
    template void store<T, uint32_t>(Warp&, int, Space, const U64&, uint32_t, int, const uint32_t* const*); \
    template void store<T, uint64_t>(Warp&, int, Space, const U64&, uint32_t, int, const uint64_t* const*);
LOADS(uint8_t)
LOADS(int8_t) LOADS(uint16_t) LOADS(int16_t) LOADS(uint32_t) LOADS(int32_t) LOADS(uint64_t) LOADS(int64_t)
    STORES(uint8_t) STORES(uint16_t) STORES(uint32_t) STORES(uint64_t)

        template <class T>
        void atomic(Warp& w, int site, Space space, Atomic how, const U64& at, uint32_t mask, const T* a, const T* b,
                    T* old) {
    uint64_t p[32];
    int lane[32], lanes = 0;
    LANE_OF(mask) {
        T* to = (T*)resolve(w, site, space, at[l], sizeof(T), l);
        if (checking && (space == kShared || (space == kGeneric && in_shared(w, at[l]))))
            check_write(w, site, (char*)to - w.block->shared, sizeof(T), l, true);
        p[lanes] = at[l], lane[lanes++] = l;
        const T was = *to, v = a[l];
        old[l] = was;
        if constexpr (std::is_same_v<T, float>) {
            *to = how == kAdd ? was + v : how == kExch ? v : (trap(w, site, "atomic on floats"), v);
        } else {
            switch (how) {
                case kAdd: *to = was + v; break;
                case kMin: *to = std::min(was, v); break;
                case kMax: *to = std::max(was, v); break;
                case kAnd: *to = was & v; break;
                case kOr: *to = was | v; break;
                case kXor: *to = was ^ v; break;
                case kExch: *to = v; break;
                case kCas: *to = was == v ? b[l] : was; break;
                case kInc: *to = was >= v ? 0 : was + 1; break;
            }
        }
    }
    w.block->launch->events++;
    count(w, site, space, p, lane, lanes, sizeof(T));
}
#define ATOMICS(T) template void atomic<T>(Warp&, int, Space, Atomic, const U64&, uint32_t, const T*, const T*, T*);
ATOMICS(uint32_t)
ATOMICS(int32_t) ATOMICS(uint64_t) ATOMICS(int64_t) ATOMICS(float)

    // cp.async (ISA 9.7.9.25.3): done at its wait
    void copy_async(Warp& w, int site, const U64& to, const U64& from, int bytes, const U32& real, uint32_t mask) {
    uint64_t p[32], q[32];
    int lane[32], lanes = 0, reads = 0;
    LANE_OF(mask) {
        resolve(w, site, kShared, to[l], bytes, l);
        if (real[l]) {
            resolve(w, site, kGlobal, from[l], bytes, l);
            q[reads++] = from[l];
        }
        p[lanes] = to[l], lane[lanes++] = l;
        w.copies.open.push_back({to[l], from[l], bytes, int(real[l]), int(l)});
    }
    if (w.block->launch->counting) {
        Site& s = w.block->launch->count.site[site];
        s.runs++, s.lanes += lanes;
        if (reads) count_global(s, q, reads, bytes);
    }
}
void copy_commit(Warp& w, int site, uint32_t mask) { whole(w, site, mask), w.copies.commit(); }
void copy_wait(Warp& w, int site, int left, uint32_t mask) {
    whole(w, site, mask);
    auto& groups = w.copies.groups;
    const int done = std::max(int(groups.size()) - left, 0);
    for (int i = 0; i < done; i++)
        for (const Copy& c : groups[i]) {
            check_write(w, site, c.to, c.bytes, c.lane);
            memset(w.block->shared + c.to, 0, c.bytes);
            memcpy(w.block->shared + c.to, (const void*)c.from, c.real);
        }
    groups.erase(groups.begin(), groups.begin() + done);
}

// ldmatrix, stmatrix (ISA 9.7.14.5.15)
static void count_matrix(Warp& w, int site, int n, const U64& at, uint32_t mask) {
    uint64_t p[32];
    int lane[32];
    for (int l = 0; l < 8 * n; l++) p[l] = at[l], lane[l] = l, resolve(w, site, kShared, at[l], 16, l);
    whole(w, site, mask);
    count(w, site, kShared, p, lane, 8 * n, 16);
}
void load_matrix(Warp& w, int site, int n, bool transposed, const U64& at, uint32_t mask, U32* const* to) {
    count_matrix(w, site, n, at, mask);
    for (int l = 0; l < 8 * n; l++) check_read(w, site, at[l], 16, l, kWarp);
    for (int i = 0; i < n; i++) {
        U32 r;
        EACH_LANE {
            uint16_t v[2];
            for (int h = 0; h < 2; h++) {
                const int row = transposed ? 2 * (l % 4) + h : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + h;
                memcpy(&v[h], w.block->shared + at[8 * i + row] + 2 * column, 2);
            }
            r[l] = v[0] | uint32_t(v[1]) << 16;
        }
        *to[i] = r;
    }
}
void store_matrix(Warp& w, int site, int n, bool transposed, const U64& at, uint32_t mask, const U32* const* from) {
    count_matrix(w, site, n, at, mask);
    char before[32][16];
    for (int l = 0; l < 8 * n; l++) memcpy(before[l], w.block->shared + at[l], 16);
    w.block->launch->events++;
    for (int i = 0; i < n; i++) EACH_LANE for (int h = 0; h < 2; h++) {
            const int row = transposed ? 2 * (l % 4) + h : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + h;
            const uint16_t v = (*from[i])[l] >> 16 * h;
            memcpy(w.block->shared + at[8 * i + row] + 2 * column, &v, 2);
        }
    for (int l = 0; l < 8 * n; l++)
        if (memcmp(before[l], w.block->shared + at[l], 16)) check_write(w, site, at[l], 16, l);
        else stamp(w, at[l], 16, l);
}

// ---- of a warp
void whole(Warp& w, int site, uint32_t mask) {
    if (mask != w.alive) throw Park{site, "only lanes " + hex(mask) + " of " + hex(w.alive) + " are here"};
}
static void members_here(Warp& w, int site, const U32& members, uint32_t mask) {
    LANE_OF(mask) {
        if (!(members[l] >> l & 1))
            fault(w, site, "lane " + std::to_string(l) + " is not in its own mask " + hex(members[l]));
        if (members[l] & w.alive & ~mask)
            throw Park{site, "the mask names lanes " + hex(members[l]) + ", but only " + hex(mask) + " are here"};
    }
}
void warp_sync(Warp& w, int site, const U32& members, uint32_t mask) {
    members_here(w, site, members, mask);
    w.syncs++;
    count_run(w, site, mask);
}
U32 shuffle(Warp& w, int site, Shuffle how, const U32& a, const U32& b, const U32& c, const U32& members, uint32_t mask,
            Pred* ok) {
    members_here(w, site, members, mask), count_run(w, site, mask);
    U32 r = {};
    LANE_OF(mask) {  // ISA 9.7.9.6
        const int shift = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
        const int most = (l & segment) | (clamp & ~segment), least = l & segment;
        int from = l;
        bool p = false;
        switch (how) {
            case kUp: from = int(l) - shift, p = from >= most; break;
            case kDown: from = l + shift, p = from <= most; break;
            case kButterfly: from = l ^ shift, p = from <= most; break;
            case kIndex: from = least | (shift & ~segment), p = from <= most; break;
        }
        if (!p) from = l;
        if (!(mask >> from & 1))
            fault(w, site, "lane " + std::to_string(l) + " reads lane " + std::to_string(from) + ", which is not here");
        r[l] = a[from], (*ok)[l] = -int(p);
    }
    return r;
}
uint32_t ballot(Warp& w, int site, const Pred& p, const U32& members, uint32_t mask) {
    members_here(w, site, members, mask), count_run(w, site, mask);
    return bits(p) & mask;
}
template <class V> static U32 match(Warp& w, int site, const V& a, const U32& members, uint32_t mask) {
    members_here(w, site, members, mask), count_run(w, site, mask);
    U32 r = {};
    LANE_OF(mask) {
        uint32_t same = 0;
        for (int o = 0; o < 32; o++) same |= uint32_t(mask >> o & 1 && a[o] == a[l]) << o;
        r[l] = same;
    }
    return r;
}
U32 match_any(Warp& w, int site, const U32& a, const U32& members, uint32_t mask) {
    return match(w, site, a, members, mask);
}
U32 match_any(Warp& w, int site, const U64& a, const U32& members, uint32_t mask) {
    return match(w, site, a, members, mask);
}
uint32_t reduce(Warp& w, int site, Atomic how, bool is_signed, const U32& a, const U32& members, uint32_t mask) {
    members_here(w, site, members, mask), count_run(w, site, mask);
    bool first = true;
    uint32_t r = 0;
    LANE_OF(mask) {
        const uint32_t x = a[l];
        if (first) r = x;
        else if (how == kAdd) r += x;
        else if (how == kAnd) r &= x;
        else if (how == kOr) r |= x;
        else if (how == kXor) r ^= x;
        else {
            const bool less = is_signed ? int32_t(x) < int32_t(r) : x < r;
            if ((how == kMin) == less) r = x;
        }
        first = false;
    }
    return r;
}
uint32_t elect(Warp& w, int site, const U32& members, uint32_t mask) {
    members_here(w, site, members, mask);
    return std::countr_zero(mask);
}

// ---- barriers
static void open_barrier(Block& b, int id) {
    Barrier& a = b.barriers[id];
    for (Warp& w : b.warps)
        if (w.waits_at == id) w.waits_at = -1, w.barrier_result = a.yes | a.all << 16, w.clock.join(a.clock), w.syncs++;
    a = {};
    b.launch->events++;
}
static void check_barrier(Block& b, int id) {
    Barrier& a = b.barriers[id];
    if (!a.arrived) return;
    if (a.whole) a.expected = 32 * b.alive;
    if (a.arrived >= a.expected) open_barrier(b, id);
}
void barrier(Warp& w, int site, uint32_t id, uint32_t threads, bool waits, uint32_t mask, const Pred* vote) {
    whole(w, site, mask);
    count_run(w, site, mask);
    if (id > 15) fault(w, site, "barrier " + std::to_string(id));
    if (threads % 32) fault(w, site, "a barrier of " + std::to_string(threads) + " threads");
    Barrier& a = w.block->barriers[id];
    if (a.arrived && (a.whole != !threads || (threads && a.expected != threads)))
        fault(w, site,
              "barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads, and others say " +
                  std::to_string(a.expected));
    a.whole = !threads, a.expected = threads ? threads : 32 * w.block->alive;
    if (waits) w.waits_at = id, w.site = site, w.yield = true;
    a.arrived += 32, a.all += std::popcount(mask);
    release(w, a.clock);
    if (vote) a.yes += std::popcount(bits(*vote) & mask);
    w.block->launch->events++;
    check_barrier(*w.block, id);
}

namespace {
// mbarrier (ISA 9.7.13.15) as eight bytes of shared memory
struct MBarrier {
    uint64_t phase : 1, expected : 20, pending : 20, mark : 2;
    int64_t bytes : 21;
    void settle(Launch& l) {
        if (!pending && !bytes) pending = expected, phase ^= 1, l.events++;
    }
};
static_assert(sizeof(MBarrier) == 8);
MBarrier& mbarrier(Warp& w, int site, uint64_t at, int lane) {
    MBarrier& b = *(MBarrier*)resolve(w, site, kShared, at, 8, lane);
    check_read(w, site, at, 8, lane, kLane);
    if (b.mark != 2) fault(w, site, "shared address " + hex(at) + " is no mbarrier");
    return b;
}
}  // namespace
void mbarrier_init(Warp& w, int site, const U64& at, const U32& n, uint32_t mask) {
    LANE_OF(mask) {
        MBarrier b = {};
        b.mark = 2, b.expected = b.pending = n[l];
        stamp(w, at[l], 8, l);
        w.block->clocks.erase(at[l]);
        memcpy(resolve(w, site, kShared, at[l], 8, l), &b, 8);
    }
}
void mbarrier_inval(Warp& w, int site, const U64& at, uint32_t mask) {
    LANE_OF(mask) mbarrier(w, site, at[l], l).mark = 0;
}
void mbarrier_arrive(Warp& w, int site, const U64& at, const U32& n, const U32& bytes, uint32_t mask) {
    count_run(w, site, mask);
    LANE_OF(mask) {
        MBarrier& b = mbarrier(w, site, at[l], l);
        if (b.pending < n[l]) fault(w, site, "more arrivals than the mbarrier counts");
        release(w, w.block->clocks[at[l]]);
        b.bytes += bytes[l], b.pending -= n[l];
        b.settle(*w.block->launch);
    }
    w.block->launch->events++;
}
void mbarrier_expect(Warp& w, int site, const U64& at, const U32& bytes, uint32_t mask) {
    LANE_OF(mask) mbarrier(w, site, at[l], l).bytes += bytes[l];
}
Pred mbarrier_try(Warp& w, int site, const U64& at, const U32& parity, uint32_t mask) {
    count_run(w, site, mask);
    Pred r = {};
    LANE_OF(mask) {
        const MBarrier& b = mbarrier(w, site, at[l], l);
        r[l] = -int(b.phase != (parity[l] & 1));
        if (r[l]) w.clock.join(w.block->clocks[at[l]]), w.syncs++;
        if (!r[l]) {
            w.yield = true, w.site = site;
            if (w.block->launch->counting) w.block->launch->count.site[site].failed++;
        }
    }
    return r;
}
void proxy_fence(Warp& w, uint32_t mask) {
    LANE_OF(mask) w.fences[l]++;
    w.fenced = w.clock;
}
void nap(Warp& w, int site) { w.yield = true, w.site = site; }

// ---- TMA (ISA 5.5, 9.7.9.25.5)
static void move_box(Warp& w, const Box& box, bool loads) {
    const TensorMap& m = box.map;
    const uint64_t line = uint64_t(m.box[0]) * m.element;
    uint64_t lines = 1;
    for (uint32_t d = 1; d < m.rank; d++) lines *= m.box[d];
    static const uint32_t swizzle_bits[] = {0, 1, 3, 7};
    const uint32_t bits = swizzle_bits[m.swizzle];
    for (uint64_t i = 0; i < lines; i++) {
        uint64_t rest = i;
        bool inside = true;
        const char* from = m.base;
        for (uint32_t d = 1; d < m.rank; d++) {
            const int64_t at = box.at[d] + int64_t(rest % m.box[d]);
            rest /= m.box[d];
            inside &= at >= 0 && at < int64_t(m.sizes[d]);
            from += at * int64_t(m.strides[d - 1]);
        }
        for (uint64_t c = 0; c < line; c += 16) {
            const uint64_t flat = box.shared + i * line + c, shared = flat ^ (flat >> 7 & bits) << 4;
            char* here = w.block->shared + shared;
            if (checking && loads) std::fill_n(&w.block->stamps[shared / 4], 4, Stamp{});
            if (checking && !loads) check_read(w, box.site, shared, 16, 0, kAsync);
            for (uint64_t e = 0; e < std::min<uint64_t>(16, line - c); e += m.element) {
                const int64_t column = box.at[0] + int64_t((c + e) / m.element);
                const bool real = inside && column >= 0 && column < int64_t(m.sizes[0]);
                const char* there = from + column * m.element;
                if (loads && !real) memset(here + e, 0, m.element);
                else if (loads) memcpy(here + e, there, m.element);
                else if (real) memcpy((char*)there, here + e, m.element);
            }
        }
    }
}
static Box box_of(Warp& w, int site, uint64_t map, int n, const U32* const* at, uint64_t shared, int lane) {
    Box box = {};
    memcpy(&box.map, (const void*)map, sizeof box.map);
    if (box.map.magic != kMagic) fault(w, site, hex(map) + " is no tensor map");
    if (int(box.map.rank) != n) fault(w, site, "a map of " + std::to_string(box.map.rank) + " dimensions");
    uint64_t bytes = box.map.element;
    for (int d = 0; d < n; d++) box.at[d] = int32_t((*at[d])[lane]), bytes *= box.map.box[d];
    if (shared % (box.map.swizzle ? 256 << box.map.swizzle >> 1 : 128) || shared % 128)
        fault(w, site, "shared address " + hex(shared) + " of a tile");
    if (shared + bytes > w.block->shared_size) fault(w, site, "the tile ends past the shared memory");
    box.shared = shared, box.site = site;
    if (w.block->launch->counting) {
        Site& s = w.block->launch->count.site[site];
        s.runs++, s.lanes++, s.useful += bytes;
    }
    w.block->launch->tma_bytes += bytes;
    return box;
}
void tma_load(Warp& w, int site, const U64& to, const U64& map, int n, const U32* const* at, const U64& bar,
              uint32_t mask) {
    LANE_OF(mask) {
        Box box = box_of(w, site, map[l], n, at, to[l], l);
        mbarrier(w, site, bar[l], l);
        if (checking > 1) check_read(w, site, bar[l], 8, l, kAsync);  // its initialisation: Triton does not fence it
        box.barrier = bar[l];
        w.block->loads.push_back(box);
    }
}
static void finish_load(Block& b, size_t i) {
    const Box box = b.loads[i];
    b.loads.erase(b.loads.begin() + i);
    Warp& w = b.warps[0];
    move_box(w, box, true);
    MBarrier& bar = *(MBarrier*)(b.shared + box.barrier);  // the unit's own access
    uint64_t bytes = box.map.element;
    for (uint32_t d = 0; d < box.map.rank; d++) bytes *= box.map.box[d];
    bar.bytes -= bytes, bar.settle(*b.launch);
    b.launch->events++;
}
void tma_store(Warp& w, int site, const U64& map, int n, const U32* const* at, const U64& from, uint32_t mask) {
    LANE_OF(mask) w.stores.open.push_back(box_of(w, site, map[l], n, at, from[l], l));
}
// Maps that a kernel makes in shared memory: 128 bytes of zeros and then one field after another
void map_replace(Warp& w, int site, const U64& at, int field, int which, const U64& value, uint32_t mask) {
    static const uint32_t sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
    LANE_OF(mask) {
        TensorMap m;
        char* p = resolve(w, site, kShared, at[l], 128, l);
        memcpy(&m, p, sizeof m);
        m.magic = kMagic;
        const uint64_t v = value[l];
        if (which > 4) fault(w, site, "dimension " + std::to_string(which));
        switch (field) {
            case 0: m.base = (char*)v; break;
            case 1: m.rank = v + 1; break;
            case 2: m.box[which] = v; break;
            case 3: m.sizes[which] = v; break;
            case 4: m.strides[which] = v; break;
            case 5:
                if (v != 1) fault(w, site, "element stride " + hex(v));
                break;
            case 6: m.element = v < 13 ? sizes[v] : 0; break;
            case 7:
                if (v) fault(w, site, "interleaved layout");
                break;
            case 8: m.swizzle = v; break;
            case 9: m.nan = v; break;
        }
        memcpy(p, &m, sizeof m);
    }
}
void map_copy(Warp& w, int site, const U64& to, const U64& from, uint32_t mask) {
    whole(w, site, mask);
    count_run(w, site, mask);
    memcpy(resolve(w, site, kGlobal, to[0], 128, 0), resolve(w, site, kShared, from[0], 128, 0), 128);
}
void tma_commit(Warp& w, int, uint32_t) { w.stores.commit(); }
void tma_wait(Warp& w, int, int left, uint32_t) {
    auto& groups = w.stores.groups;
    const int done = std::max(int(groups.size()) - left, 0);
    for (int i = 0; i < done; i++)
        for (const Box& box : groups[i]) move_box(w, box, false);
    groups.erase(groups.begin(), groups.begin() + done);
    w.block->launch->events++;
}

// ---- tensor cores
static int bytes_of(Element e) { return e == kE4m3 || e == kE5m2 ? 1 : e == kTf32 ? 4 : 2; }
static float value(Element e, uint32_t x) {
    switch (e) {
        case kE4m3: return fp8_values(false)[x & 255];
        case kE5m2: return fp8_values(true)[x & 255];
        case kBf16: return std::bit_cast<float>(x << 16);
        case kF16: return _cvtsh_ss(x & 0xffff);
        case kTf32: return std::bit_cast<float>(x & 0xffffe000);
    }
    return 0;
}
// From registers: rows lane / 4 and 8 below, 4 bytes of columns at lane % 4 and 16 bytes further (ISA 9.7.14.5)
static void rows_of_registers(const U32* const* r, Element e, int registers, float* a, int k) {
    const int per = 4 / bytes_of(e);
    for (int i = 0; i < registers; i++) EACH_LANE for (int j = 0; j < per; j++) {
            const int row = l / 4 + i % 2 * 8, column = i / 2 * 4 * per + l % 4 * per + j;
            a[row * k + column] = value(e, (*r[i])[l] >> 32 / per * j & (per == 4 ? 0xff : per == 2 ? 0xffff : ~0u));
        }
}
void mma(Warp& w, int site, int k, Element ea, Element eb, U32* const* d, const U32* const* ra, const U32* const* rb,
         const U32* const* c, uint32_t mask) {
    whole(w, site, mask), count_run(w, site, mask);
    float a[16 * 64] = {}, b[8 * 64] = {};
    const int per = 4 / bytes_of(ea), steps = k / (4 * per);  // columns of 4 lanes
    rows_of_registers(ra, ea, 2 * steps, a, k);
    for (int i = 0; i < steps; i++)
        EACH_LANE for (int j = 0; j < per; j++) b[l / 4 * k + i * 4 * per + l % 4 * per + j] =
            value(eb, (*rb[i])[l] >> 32 / per * j & (per == 4   ? 0xff
                                                     : per == 2 ? 0xffff
                                                                : ~0u));
    U32 out[4];
    for (int i = 0; i < 4; i++) EACH_LANE {
            const float* x = a + (l / 4 + i / 2 * 8) * k;
            const float* y = b + (l % 4 * 2 + i % 2) * k;
            float sum = 0;
            for (int j = 0; j < k; j++) sum += x[j] * y[j];
            out[i][l] = std::bit_cast<uint32_t>(std::bit_cast<float>(uint32_t((*c[i])[l])) + sum);
        }
    for (int i = 0; i < 4; i++) *d[i] = out[i];
    w.block->launch->macs[ea] += 16 * 8 * k;
}

// An operand of wgmma in shared memory (ISA 9.7.15.5.1): `rows` of k elements, as floats
static void rows_of_shared(Warp& w, int site, uint64_t d, Element e, bool transposed, int rows, int first, int k,
                           float* out) {
    const uint32_t start = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4;
    const int mode = d >> 62, size = bytes_of(e);
    static const uint32_t swizzle_bits[] = {0, 7, 3, 1}, widths[] = {16, 128, 64, 32};
    const uint32_t bits = swizzle_bits[mode], width = widths[mode];
    if (d >> 49 & 7) fault(w, site, "a base offset in a matrix descriptor");
    if (transposed && (mode == 0 || size != 2)) fault(w, site, "a transposed operand without swizzle");
    const auto read = [&](uint32_t at) {
        const uint32_t p = at ^ (at >> 7 & bits) << 4;
        if (p + 16 > w.block->shared_size) fault(w, site, "an operand ends past the shared memory, at " + hex(p));
        check_read(w, site, p, 16, 0, kAsync);
        return w.block->shared + p;
    };
    const auto unpack = [&](const char* from, float* to, int step) {
        for (int i = 0; i < 16 / size; i++) {
            uint32_t x = 0;
            memcpy(&x, from + i * size, size);
            to[i * step] = value(e, x);
        }
    };
    if (!transposed)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < k * size; c += 16) {
                const uint32_t row = first + r;
                const uint32_t at = mode ? start + row / 8 * stride + row % 8 * width + c
                                         : start + row / 8 * stride + c / 16 * leading + row % 8 * 16;
                unpack(read(at), out + r * k + c / size, 1);
            }
    else  // lines of `width` bytes lie along the rows, 8 of the contraction to a group
        for (int r = 0; r < rows; r += 8)
            for (int c = 0; c < k; c++) {
                const uint32_t byte = (first + r) * 2;
                unpack(read(start + byte / width * leading + c / 8 * stride + c % 8 * width + byte % width),
                       out + r * k + c, k);
            }
}
static void finish(Warp& w, const Product& p) {
    alignas(64) static float a[16 * 64], b[256 * 64], t[64 * 256];
    const int row = w.id % 4 * 16;
    if (p.registers) rows_of_registers(p.ra, p.a, 4, a, p.k);
    else rows_of_shared(w, p.site, p.da, p.a, p.ta, 16, row, p.k, a);
    rows_of_shared(w, p.site, p.db, p.b, p.tb, p.n, 0, p.k, b);
    for (int j = 0; j < p.n; j++)
        for (int k = 0; k < p.k; k++) t[k * p.n + j] = b[j * p.k + k];
    for (int r = 0; r < 16; r++) {
        alignas(64) float sum[256] = {};
        for (int k = 0; k < p.k; k++) {
            const float x = a[r * p.k + k] * p.sign;
            const float* y = t + k * p.n;
            for (int j = 0; j < p.n; j++) sum[j] += x * y[j];
        }
        for (int j = 0; j < p.n; j++) {
            U32& d = *p.d[j / 8 * 4 + r / 8 * 2 + j % 2];
            const int l = r % 8 * 4 + j % 8 / 2;
            const float old = p.accumulate ? std::bit_cast<float>(uint32_t(d[l])) : 0;
            d[l] = std::bit_cast<uint32_t>(old + sum[j]);
        }
    }
}
void wgmma(Warp& w, int site, int n, int k, Element a, Element b, U32* const* d, const U32* const* ra, U64 da, U64 db,
           const Pred& accumulate, bool ta, bool tb, int sign_a, int sign_b, uint32_t mask) {
    whole(w, site, mask), count_run(w, site, mask);
    EACH_LANE if (da[l] != da[0] || db[l] != db[0] || accumulate[l] != accumulate[0])
        fault(w, site, "lanes differ in a descriptor");
    Product p = {n,     k,     a,   b, {}, {}, ra != nullptr, accumulate[0] != 0, ta, tb, float(sign_a * sign_b),
                 da[0], db[0], site};
    std::copy_n(d, n / 2, p.d);
    if (ra) std::copy_n(ra, 4, p.ra);
    w.products.open.push_back(p);
    w.block->launch->macs[a] += 16ull * n * k;
}
void wgmma_commit(Warp& w, int site, uint32_t mask) { whole(w, site, mask), w.products.commit(); }
void wgmma_fence(Warp& w, int site, uint32_t mask) { whole(w, site, mask); }
void wgmma_wait(Warp& w, int site, int left, uint32_t mask) {
    whole(w, site, mask), count_run(w, site, mask);
    auto& groups = w.products.groups;
    const int done = std::max(int(groups.size()) - left, 0);
    for (int i = 0; i < done; i++)
        for (const Product& p : groups[i]) finish(w, p);
    groups.erase(groups.begin(), groups.begin() + done);
}

// ---- the schedule
namespace {

void add(Warp& w, int pc, int at, uint32_t mask, bool parked = false) {
    if (!mask) return;
    if (pc == kExit) {
        w.alive &= ~mask, w.block->launch->events++;
        for (Group& g : w.groups) g.parked = false;
        return;
    }
    for (Group& g : w.groups)
        if (g.pc == pc && g.at == at) return void((g.mask |= mask, g.parked = false));
    w.groups.push_back({pc, at, mask, parked});
}

void turn(Warp& w, int quota) {
    Launch& launch = *w.block->launch;
    const Kernel& k = *launch.kernel;
    w.yield = false;
    Park last = {-1, ""};
    while (quota-- > 0 && !w.groups.empty() && !w.yield) {
        int g = -1;
        for (int i = 0; i < int(w.groups.size()); i++) {
            const Group &a = w.groups[i], &b = w.groups[std::max(g, 0)];
            if (a.parked) continue;
            if (g < 0 || (w.block->rotate ? launch.rng() % 2 : a.pc != b.pc ? a.pc < b.pc : a.at < b.at)) g = i;
        }
        if (g < 0) fault(w, last.site, last.why);
        const Group now = w.groups[g];
        w.groups.erase(w.groups.begin() + g);
        const BlockCode& code = k.block[now.pc];
        if (launch.counting && !now.at)
            launch.count.block_runs[now.pc]++, launch.count.block_lanes[now.pc] += std::popcount(now.mask);
        const Pred wide = lanes(now.mask);
        char* const registers = (char*)w.registers;
        const Instruction *i = k.code + code.first + now.at, *const end = k.code + code.first + code.count;
        try {
            for (; i < end; i++) i->run(w, registers, i->operands, now.mask, (const int32_t*)&wide);
        } catch (const Park& park) {
            last = park;
            add(w, now.pc, i - k.code - code.first, now.mask, true);
            continue;
        }
        uint32_t taken = 0;
        if (code.predicate >= 0) {
            taken = bits(*(const Pred*)(registers + code.predicate));
            taken = now.mask & (code.negated ? ~taken : taken);
            add(w, code.target, 0, taken);
        }
        add(w, code.next, 0, now.mask & ~taken);
    }
    if (w.groups.empty()) {
        if (!w.products.empty())
            fault(w, w.products.groups.empty() ? w.products.open[0].site : w.products.groups[0][0].site,
                  "the warp ends before its wgmma");
        if (!w.stores.empty()) throw Fault{place(w) + ": the warp ends before its TMA stores"};
        w.block->alive--;
        for (int i = 0; i < 16; i++)
            if (w.block->barriers[i].whole) check_barrier(*w.block, i);
    }
}

bool step(Block& b) {  // every warp once; false where none could run
    Launch& l = *b.launch;
    std::vector<int> order(b.warps.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    if (l.seed) std::shuffle(order.begin(), order.end(), l.rng);
    bool ran = false;
    for (int i : order) {
        Warp& w = b.warps[i];
        if (w.groups.empty() || w.waits_at >= 0) continue;
        turn(w, l.seed ? 1 + l.rng() % 64 : 4096);
        ran = true;
    }
    return ran;
}

void begin(Block& b, Launch& l, uint64_t number) {
    const Kernel& k = *l.kernel;
    b.launch = &l;
    b.index[0] = number % l.grid[0], b.index[1] = number / l.grid[0] % l.grid[1],
    b.index[2] = number / l.grid[0] / l.grid[1];
    const uint32_t threads = l.block[0] * l.block[1] * l.block[2];
    const bool fresh = b.warps.empty();
    b.warps.resize((threads + 31) / 32);
    if (fresh)
        b.shared_size = k.shared + l.dynamic,
        b.shared = (char*)aligned_alloc(1024, (b.shared_size + 2047) / 1024 * 1024);
    memset(b.shared, 0xff, b.shared_size);
    std::fill_n(b.barriers, 16, Barrier{});
    b.loads.clear(), b.clocks.clear();
    if (checking) b.stamps.assign(b.shared_size / 4 + 4, Stamp{});
    b.alive = b.warps.size();
    for (size_t i = 0; i < b.warps.size(); i++) {
        Warp& w = b.warps[i];
        w.block = &b, w.id = i, w.waits_at = w.site = -1;
        w.groups.clear(), w.products = {}, w.copies = {}, w.stores = {};
        w.registers_memory.assign(k.registers + 256, char(0xff));
        w.registers = (void*)((uintptr_t(w.registers_memory.data()) + 255) & ~uintptr_t{255});
        w.local_size = k.local, w.local_memory.assign(32 * k.local + 64, char(0xff));
        w.local = (char*)((uintptr_t(w.local_memory.data()) + 63) & ~uintptr_t{63});
        w.params = l.params.data(), w.shared = b.shared;
        const uint32_t left = std::min<uint32_t>(32, threads - 32 * i);
        w.alive = left == 32 ? ~0u : (1u << left) - 1;
        EACH_LANE {
            const uint32_t t = 32 * uint32_t(i) + uint32_t(l);
            w.sr.lane[l] = l;
            w.sr.tid_x[l] = t % b.launch->block[0], w.sr.tid_y[l] = t / b.launch->block[0] % b.launch->block[1];
            w.sr.tid_z[l] = t / (b.launch->block[0] * b.launch->block[1]);
        }
        auto& s = w.sr;
        s.ctaid_x = b.index[0], s.ctaid_y = b.index[1], s.ctaid_z = b.index[2];
        s.ntid_x = l.block[0], s.ntid_y = l.block[1], s.ntid_z = l.block[2];
        s.nctaid_x = l.grid[0], s.nctaid_y = l.grid[1], s.nctaid_z = l.grid[2];
        s.warp = i;
        w.clock = w.fenced = {}, w.clock.at[i] = 1, w.syncs = 0, std::fill_n(w.fences, 32, 0);
        w.groups.push_back({0, 0, w.alive});
    }
}

std::string deadlock(const std::vector<Block*>& blocks) {
    std::map<std::string, std::pair<int, std::string>> seen;
    for (const Block* b : blocks)
        for (const Warp& w : b->warps)
            for (const Group& g : w.groups) {
                std::string s = w.waits_at >= 0
                                    ? "in barrier " + std::to_string(w.waits_at) + " (" +
                                          std::to_string(b->barriers[w.waits_at].arrived) + " of " +
                                          std::to_string(b->barriers[w.waits_at].expected) + " threads)"
                                    : "before block of line " + std::to_string(b->launch->kernel->block[g.pc].line);
                if (w.site >= 0) s += at(w, w.site);
                auto& [n, first] = seen[s];
                if (!n++) first = place(w);
            }
    std::string out = "deadlock:";
    for (const auto& [what, who] : seen)
        out += "\n  " + std::to_string(who.first) + " group(s) of lanes, first " + who.second + ": " + what;
    return out;
}

void run(Launch& l, bool together) {
    const uint64_t n = uint64_t(l.grid[0]) * l.grid[1] * l.grid[2];
    std::vector<uint64_t> order(n);
    for (uint64_t i = 0; i < n; i++) order[i] = i;
    if (l.seed) std::shuffle(order.begin(), order.end(), l.rng);
    const uint64_t at_once = together ? n : 1;
    std::vector<Block> blocks(at_once);
    struct Free {
        std::vector<Block>& b;
        ~Free() {
            for (Block& x : b) free(x.shared), x.shared = nullptr;
        }
    } free_{blocks};
    for (Block& b : blocks) b.shared = nullptr;
    for (uint64_t begun = 0; begun < n; begun += at_once) {
        std::vector<Block*> live;
        for (uint64_t i = 0; i < at_once; i++) begin(blocks[i], l, order[begun + i]), live.push_back(&blocks[i]);
        uint64_t seen = l.events, idle = 0;
        while (!live.empty()) {
            if (l.seed) std::shuffle(live.begin(), live.end(), l.rng);
            for (Block* b : live) {
                b->rotate = idle > 64;
                const bool ran = step(*b);
                if (!b->loads.empty() && (l.events == seen || !ran || (l.seed && l.rng() % 4 == 0)))
                    finish_load(*b, l.seed ? l.rng() % b->loads.size() : 0);
                if (!b->alive && !b->loads.empty())
                    fault(b->warps[0], b->loads[0].site, "the block ends before its TMA loads");
            }
            std::erase_if(live, [](Block* b) { return !b->alive; });
            idle = l.events == seen ? idle + 1 : 0;
            seen = l.events;
            if (idle > 2000) throw Fault{deadlock(live)};
        }
    }
}
}  // namespace

extern "C" {
EXPORT void emu_ranges(int n, const uint64_t* low, const uint64_t* high, const char* const* names) {
    ranges.clear(), last_range = 0;
    for (int i = 0; i < n; i++) ranges.push_back({low[i], high[i], names[i]});
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.low < b.low; });
}

EXPORT void emu_check_races(int on) { checking = on; }
EXPORT void emu_more_ranges(int n, const uint64_t* low, const uint64_t* high) {  // of a module's variables
    for (int i = 0; i < n && !ranges.empty(); i++)
        if (std::none_of(ranges.begin(), ranges.end(), [&](const Range& r) { return r.low == low[i]; }))
            ranges.push_back({low[i], high[i], "a global variable"});
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.low < b.low; });
}

// null, or what went wrong. totals: MACs by Element, bytes of TMA
EXPORT const char* emu_launch(const Kernel* k, const uint32_t* grid, const uint32_t* block, uint32_t dynamic,
                              const void* params, uint64_t seed, int together, uint64_t* block_runs,
                              uint64_t* block_lanes, uint64_t* sites, uint64_t* totals) {
    Launch l;
    l.kernel = k, l.dynamic = dynamic, l.seed = seed, l.counting = block_runs != nullptr;
    std::copy_n(grid, 3, l.grid), std::copy_n(block, 3, l.block);
    l.params.assign((const char*)params, (const char*)params + k->params);
    l.params.resize(k->params + 64);
    l.count = {block_runs, block_lanes, (Site*)sites};
    l.rng.seed(seed);
    failure.clear();
    try {
        run(l, together);
    } catch (const Fault& f) { failure = f.what; }
    for (int i = 0; i < 5; i++) totals[i] += l.macs[i];
    totals[5] += l.tma_bytes;
    return failure.empty() ? nullptr : failure.c_str();
}
}

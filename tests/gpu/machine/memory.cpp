// Loads, stores, atomics, cp.async and matrices of shared memory; addresses and bounds; counters of memory accesses.
#include <mutex>

#include "machine.h"

// ---- addresses
struct Range {
    uint64_t low, high;
    std::string name;
};
static std::vector<Range> ranges;  // of the tensors, sorted; none: nothing is checked
static thread_local size_t last_range;

extern "C" __attribute__((visibility("default"))) void gpu_ranges(int n, const uint64_t* low, const uint64_t* high,
                                                                  const char* const* names, int replace) {
    if (replace) ranges.clear();
    last_range = 0;
    for (int i = 0; i < n; i++)
        if (replace || (!ranges.empty() &&
                        std::none_of(ranges.begin(), ranges.end(), [&](const Range& r) { return r.low == low[i]; })))
            ranges.push_back({low[i], high[i], names[i]});
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.low < b.low; });
}
void check_bounds(Warp& w, int site, uint64_t p, size_t n, int lane) {
    if (ranges.empty()) return;
    if (last_range < ranges.size() && p >= ranges[last_range].low && p + n <= ranges[last_range].high) return;
    auto next = std::upper_bound(ranges.begin(), ranges.end(), p, [](uint64_t x, const Range& r) { return x < r.low; });
    const std::string what = lane_name(lane) + " reaches " + std::to_string(n) + " bytes at " + hex(p) + ", ";
    std::string where = next == ranges.end() ? "" : std::to_string(next->low - p) + " bytes before " + next->name;
    if (next != ranges.begin()) {
        const Range& r = *--next;
        if (p + n <= r.high) return void(last_range = next - ranges.begin());
        if (where.empty() || p + n - r.high < 65536)
            where = std::to_string(p + n - r.high) + " bytes past the end of " + r.name;
    }
    fault(w, site, what + where);
}

Block* shared_block(Warp& w, int site, Space space, uint64_t p, uint64_t& offset) {
    Block& own = *w.block;
    Block* const first = &own - own.rank;
    const auto alive = [&](Block* b) {
        if (!b->alive)
            fault(w, site,
                  "block " + std::to_string(b->rank) + " of the cluster has ended, and its shared memory with it");
        return b;
    };
    if (space == kShared) {
        const uint64_t rank = p >> 24;
        if (rank > uint64_t(own.company->cluster))
            fault(w, site, "shared address " + hex(p) + " names no block of the cluster");
        offset = p & 0xffffff;
        return alive(rank ? first + rank - 1 : &own);
    }
    for (int i = 0; i < own.company->cluster; i++)
        if (const uint64_t s = uint64_t(first[i].shared); p >= s && p < s + first[i].shared_size)
            return offset = p - s, alive(first + i);
    return nullptr;
}
char* resolve(Warp& w, int site, Space space, uint64_t p, size_t n, int lane) {
    if (p % n) fault(w, site, lane_name(lane) + ": misaligned address " + hex(p));
    const auto within = [&](const char* begin, uint64_t size) {
        return p >= uint64_t(begin) && p + n <= uint64_t(begin) + size;
    };
    uint64_t offset;
    if (space == kShared || space == kGeneric)
        if (Block* b = shared_block(w, site, space, p, offset)) {
            if (offset + n <= b->shared_size) return b->shared + offset;
            fault(w, site, lane_name(lane) + ": shared address " + hex(p) + " is past the end, " + hex(b->shared_size));
        }
    const bool param = within(w.params, w.block->processor->params_size), local = within(w.local, 32 * w.local_size);
    if (space == kParam && !param) fault(w, site, lane_name(lane) + ": outside the parameters");
    if (space == kLocal && !local) fault(w, site, lane_name(lane) + ": outside local memory");
    if (space == kConstant || (space != kGlobal && (param || local))) return (char*)p;
    check_bounds(w, site, p, n, lane);
    return (char*)p;
}
U64 to_shared(Warp& w, const U64& p) {
    U64 r = p;
    EACH_LANE {
        uint64_t offset;
        if (Block* b = shared_block(w, 0, kGeneric, p[l], offset))
            r[l] = offset | (b == w.block ? 0 : uint64_t(b->rank + 1) << 24);
    }
    return r;
}
static char* shared_at(Warp& w, uint64_t p) {
    return (p >> 24 ? w.block + (int64_t(p >> 24) - 1 - w.block->rank) : w.block)->shared + (p & 0xffffff);
}
U64 to_generic(Warp& w, const U64& p) {
    U64 r;
    EACH_LANE r[l] = (p[l] >> 24) <= uint64_t(w.block->company->cluster) ? uint64_t(shared_at(w, p[l])) : 0;
    return r;
}
U64 map_shared(Warp& w, const U64& p, const U32& rank, bool generic) {
    U64 r;
    EACH_LANE {
        const uint64_t offset = generic ? p[l] - uint64_t(w.block->shared) : p[l] & 0xffffff,
                       mapped = uint64_t(rank[l] + 1) << 24 | offset;
        r[l] = rank[l] >= uint32_t(w.block->company->cluster) ? ~0ull
               : generic                                      ? uint64_t(shared_at(w, mapped))
                                                              : mapped;
    }
    return r;
}

// ---- counters
static void count_global(Passes& sectors, const uint64_t* p, int lanes, int size) {
    uint64_t sector[64], address[32];
    int n = 0;
    for (int i = 0; i < lanes; i++) {
        address[i] = p[i];
        for (uint64_t x = p[i] / 32; x <= (p[i] + size - 1) / 32; x++) sector[n++] = x;
    }
    std::sort(sector, sector + n), std::sort(address, address + lanes);
    const int distinct = std::unique(address, address + lanes) - address;
    sectors.done += std::unique(sector, sector + n) - sector, sectors.least += (distinct * size + 31) / 32;
}
// Passes over 32 banks of 4 bytes; lanes that access the same word share it. Accesses of 8 bytes a lane go by half
// warps, those of 16 by quarters
static void count_shared(Passes& wavefronts, const uint64_t* p, const int* lane, int lanes, int size) {
    const int per = size >= 16 ? 8 : size >= 8 ? 16 : 32, words = std::max(size / 4, 1);
    for (int begin = 0; begin < 32; begin += per) {
        uint64_t seen[32][32];
        int n[32] = {}, most = 0, all = 0;
        for (int i = 0; i < lanes; i++)
            for (int j = 0; j < words && lane[i] >= begin && lane[i] < begin + per; j++) {
                const uint64_t word = p[i] / 4 + j, bank = word % 32;
                if (std::find(seen[bank], seen[bank] + n[bank], word) != seen[bank] + n[bank]) continue;
                seen[bank][n[bank]++] = word, most = std::max(most, n[bank]), all++;
            }
        wavefronts.done += most, wavefronts.least += (all + 31) / 32;
    }
}
void count(Warp& w, int site, Space space, const uint64_t* p, const int* lane, int lanes, int size) {
    Processor& q = *w.block->processor;
    if (!q.counting()) return;
    if (const int merged = q.kernel.site[site].bytes; merged >= 0) size = merged;
    if (!size || !lanes) return;  // 0 bytes: a part of another access
    uint64_t offset;
    if (space == kGeneric) space = shared_block(w, site, kGeneric, p[0], offset) ? kShared : kGlobal;
    if (space == kShared) count_shared(q.sites[site].wavefronts, p, lane, lanes, size);
    else if (space == kGlobal) count_global(q.sites[site].sectors, p, lanes, size);
}

// ---- loads, stores, atomics
template <class T, class R>
void load(Warp& w, int site, Space space, Order order, const U64& at, uint32_t mask, int n, R* const* to) {
    uint64_t p[32], offset;
    int lane[32], lanes = 0;
    const size_t bytes = n * sizeof(T);
    LANE_OF(mask) {
        const char* from = resolve(w, site, space, at[l], bytes, l);
        if (w.block->processor->request.checks && space != kParam && space != kLocal && space != kConstant) {
            if (Block* b = space == kGlobal ? nullptr : shared_block(w, site, space, at[l], offset))
                check_read(w, site, *b, offset, bytes, l, kOneLane, w.seen);
            else global_access(w, site, at[l], bytes, l, order, true, false, w.waited);
        }
        p[lanes] = at[l], lane[lanes++] = l;
        for (int i = 0; i < n; i++) {
            T v;
            memcpy(&v, from + i * sizeof(T), sizeof(T));
            to[i][l] = R(v);
        }
    }
    if (order != kPlain && order != kNonCoherent) w.yield = true, w.site = site;  // it may poll
    if (space != kParam && space != kConstant) count(w, site, space, p, lane, lanes, bytes);
}
template <class T, class R>
void store(Warp& w, int site, Space space, Order order, const U64& at, uint32_t mask, int n, const R* const* from) {
    uint64_t p[32], offset;
    int lane[32], lanes = 0;
    const size_t bytes = n * sizeof(T);
    LANE_OF(mask) {
        char* to = resolve(w, site, space, at[l], bytes, l);
        p[lanes] = at[l], lane[lanes++] = l;
        T v[8];
        for (int i = 0; i < n; i++) v[i] = T(from[i][l]);
        if (Block* b = space == kShared || space == kGeneric ? shared_block(w, site, space, at[l], offset) : nullptr) {
            if (memcmp(to, v, bytes)) check_write(w, site, *b, offset, bytes, l, kOrdinary);
            else check_same_write(w, *b, offset, bytes, l);
            b->wrote(offset, bytes);
        } else if (space != kLocal) global_access(w, site, at[l], bytes, l, order, false, true, w.waited);
        memcpy(to, v, bytes);
    }
    w.block->processor->events++;
    count(w, site, space, p, lane, lanes, bytes);
}
#define LOADS(T)                                                                                            \
    template void load<T, uint16_t>(Warp&, int, Space, Order, const U64&, uint32_t, int, uint16_t* const*); \
    template void load<T, uint32_t>(Warp&, int, Space, Order, const U64&, uint32_t, int, uint32_t* const*); \
    template void load<T, uint64_t>(Warp&, int, Space, Order, const U64&, uint32_t, int, uint64_t* const*);
#define STORES(T)                                                                                                  \
    template void store<T, uint16_t>(Warp&, int, Space, Order, const U64&, uint32_t, int, const uint16_t* const*); \
    template void store<T, uint32_t>(Warp&, int, Space, Order, const U64&, uint32_t, int, const uint32_t* const*); \
    template void store<T, uint64_t>(Warp&, int, Space, Order, const U64&, uint32_t, int, const uint64_t* const*);
LOADS(uint8_t)
LOADS(int8_t)
LOADS(uint16_t)
LOADS(int16_t)
LOADS(uint32_t)
LOADS(int32_t)
LOADS(uint64_t)
LOADS(int64_t)
STORES(uint8_t)
STORES(uint16_t)
STORES(uint32_t)
STORES(uint64_t)

template <class T> static T combined(Atomic how, T was, T a, T b) {
    switch (how) {
        case kAdd: return was + a;
        case kMin: return std::min(was, a);
        case kMax: return std::max(was, a);
        case kExch: return a;
        case kCas: return was == a ? b : was;
        case kInc: return was >= a ? 0 : was + 1;
        case kDec: return was == 0 || was > a ? a : was - 1;
        case kAnd: return was & a;
        case kOr: return was | a;
        default: return was ^ a;
    }
}
static std::mutex atomics;  // of the host threads that run blocks
template <class T>
void atomic(Warp& w, int site, Space space, Order order, Atomic how, const U64& at, uint32_t mask, const void* a,
            const void* b, void* old) {
    uint64_t p[32], offset;
    int lane[32], lanes = 0;
    const std::lock_guard lock(atomics);
    LANE_OF(mask) {
        T* const to = (T*)resolve(w, site, space, at[l], sizeof(T), l);
        if (Block* s = space == kGlobal ? nullptr : shared_block(w, site, space, at[l], offset))
            check_write(w, site, *s, offset, sizeof(T), l, kAtomicWrite), s->wrote(offset, sizeof(T));
        else global_access(w, site, at[l], sizeof(T), l, order, true, true, w.waited);
        p[lanes] = at[l], lane[lanes++] = l;
        const T was = *to;
        ((T*)old)[l] = was;
        *to = combined(how, was, ((const T*)a)[l], b ? ((const T*)b)[l] : T{});
    }
    w.block->processor->events++;
    count(w, site, space, p, lane, lanes, sizeof(T));
}
#define ATOMICS(T) \
    template void atomic<T>(Warp&, int, Space, Order, Atomic, const U64&, uint32_t, const void*, const void*, void*);
ATOMICS(uint32_t)
ATOMICS(int32_t)
ATOMICS(uint64_t)
ATOMICS(int64_t)

// ---- cp.async (ISA 9.7.9.25.3): done at its wait
void copy_async(Warp& w, int site, const U64& to, const U64& from, int bytes, const U32& real, uint32_t mask) {
    uint64_t source[32], target[32];
    int lane[32], all[32], lanes = 0, targets = 0;
    LANE_OF(mask) {
        resolve(w, site, kShared, to[l], bytes, l);
        target[targets] = to[l], all[targets++] = l;
        if (real[l] > uint32_t(bytes)) fault(w, site, lane_name(l) + " copies more bytes than the copy has");
        if (real[l]) {
            resolve(w, site, kGlobal, from[l], bytes, l);
            global_access(w, site, from[l], real[l], l, kPlain, true, false, w.waited);
            source[lanes] = from[l], lane[lanes++] = l;
        }
        check_write(w, site, *w.block, to[l], bytes, l, kCopying);
        w.copies.open.push_back({site, to[l], from[l], bytes, int(real[l]), int(l)});
    }
    count(w, site, kGlobal, source, lane, lanes, bytes), count(w, site, kShared, target, all, targets, bytes);
}
static void finish(Warp& w, const std::vector<Copy>& copies) {
    for (const Copy& c : copies) {
        stamp(w, *w.block, c.to, c.bytes, c.lane, kOrdinary), w.block->wrote(c.to, c.bytes);
        memset(w.block->shared + c.to, 0, c.bytes);
        memcpy(w.block->shared + c.to, (const void*)c.from, c.real);
    }
}
void copy_commit(Warp& w, int site, uint32_t mask) { need_whole_warp(w, site, mask), w.copies.commit(); }
void copy_wait(Warp& w, int site, int left, uint32_t mask) {
    need_whole_warp(w, site, mask), finish(w, w.copies.take(left));
}
void copy_arrive(Warp& w, int site, const U64& barrier,
                 uint32_t mask) {  // cp.async.mbarrier.arrive.noinc, as early as can be
    need_whole_warp(w, site, mask), w.copies.commit(), finish(w, w.copies.take(0));
    mbarrier_arrive(w, site, kShared, kRelease, barrier, k32(1), k32(0), false, mask);
}

// ---- ldmatrix, stmatrix (ISA 9.7.14.5.15): matrix i's row r, of 16 bytes, lies at the address of lane 8 i + r
static uint16_t* element(Warp& w, const U64& at, int matrix, int lane, int half, bool transposed) {
    const int a = lane / 4, b = 2 * (lane % 4) + half;
    return (uint16_t*)(w.block->shared + at[8 * matrix + (transposed ? b : a)]) + (transposed ? a : b);
}
static void count_matrix(Warp& w, int site, int n, const U64& at, uint32_t mask) {
    uint64_t p[32];
    int lane[32];
    need_whole_warp(w, site, mask);
    for (int l = 0; l < 8 * n; l++) p[l] = at[l], lane[l] = l, resolve(w, site, kShared, at[l], 16, l);
    count(w, site, kShared, p, lane, 8 * n, 16);
}
void load_matrix(Warp& w, int site, int n, bool transposed, const U64& at, uint32_t mask, U32* const* to) {
    count_matrix(w, site, n, at, mask);
    for (int l = 0; l < 8 * n; l++) check_read(w, site, *w.block, at[l], 16, l, kAllLanes, w.seen);
    U32 r[4];
    for (int i = 0; i < n; i++)
        EACH_LANE r[i][l] = *element(w, at, i, l, 0, transposed) | uint32_t(*element(w, at, i, l, 1, transposed)) << 16;
    for (int i = 0; i < n; i++) *to[i] = r[i];
}
void store_matrix(Warp& w, int site, int n, bool transposed, const U64& at, uint32_t mask, const U32* const* from) {
    count_matrix(w, site, n, at, mask);
    char before[32][16];
    for (int l = 0; l < 8 * n; l++) memcpy(before[l], w.block->shared + at[l], 16);
    for (int i = 0; i < n; i++)
        EACH_LANE for (int h = 0; h < 2; h++) * element(w, at, i, l, h, transposed) = (*from[i])[l] >> 16 * h;
    for (int l = 0; l < 8 * n; l++) {
        if (memcmp(before[l], w.block->shared + at[l], 16)) check_write(w, site, *w.block, at[l], 16, l, kOrdinary);
        else check_same_write(w, *w.block, at[l], 16, l);
        w.block->wrote(at[l], 16);
    }
    w.block->processor->events++;
}

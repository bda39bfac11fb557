// Barriers: of a block, of a cluster, and mbarriers in shared memory (ISA 9.7.13).
#include "machine.h"

// ---- of a block
static void open(Block& b, int id) {
    Barrier& a = b.barriers[id];
    for (Warp& w : b.warps)
        if (w.waits_at == id) w.waits_at = -1, w.barrier_result = a.yes | a.all << 16, acquire(w, a.clock), sync(w);
    a = {};
    b.processor->events++;
}
void open_if_complete(Block& b, int id) {
    Barrier& a = b.barriers[id];
    if (!a.arrived) return;
    if (a.whole) a.expected = 32 * b.alive;
    if (a.arrived >= a.expected) open(b, id);
}
void barrier(Warp& w, int site, const U32& ids, const U32& counts, bool waits, uint32_t mask, const Pred* vote) {
    need_whole_warp(w, site, mask);
    Block& b = *w.block;
    const int first = std::countr_zero(mask);
    const uint32_t id = ids[first], threads = counts[first];
    LANE_OF(mask) if (ids[l] != id || counts[l] != threads) fault(w, site, "lanes differ in a barrier");
    if (id > 15) fault(w, site, "barrier " + std::to_string(id) + ": there are 16");
    if (threads % 32)
        fault(w, site, "a barrier of " + std::to_string(threads) + " threads: a multiple of 32 is needed");
    Barrier& a = b.barriers[id];
    const uint32_t expected = threads ? threads : 32 * b.alive;
    if (a.arrived && (a.whole != !threads || (threads && a.expected != threads)))
        fault(w, site,
              "barrier " + std::to_string(id) + " of " + std::to_string(expected) + " threads, and others say " +
                  std::to_string(a.expected));
    a.whole = !threads, a.expected = expected, a.arrived += 32, a.all += std::popcount(mask);
    if (waits) w.waits_at = id, w.site = site, w.yield = true;
    if (vote) a.yes += std::popcount(bits(*vote) & mask);
    release(w, a.clock);
    b.processor->events++;
    open_if_complete(b, id);
}

// ---- of a cluster: a warp arrives, and later waits
void open_if_complete(Company& company, int cluster) {
    ClusterBarrier& c = company.barriers[cluster];
    int warps = 0;
    for (int i = 0; i < company.cluster; i++) warps += company.blocks[cluster * company.cluster + i].alive;
    if (c.arrived && c.arrived >= warps) c.arrived = 0, c.phase++, c.done = std::move(c.now), c.now = {};
}
static ClusterBarrier& cluster_barrier(Warp& w) {
    return w.block->company->barriers[w.block->number / w.block->company->cluster];
}
void cluster_arrive(Warp& w, int site, bool releases, uint32_t mask) {
    need_whole_warp(w, site, mask);
    ClusterBarrier& c = cluster_barrier(w);
    if (w.cluster_phase > c.phase) fault(w, site, "barrier.cluster.arrive twice, and no wait between");
    w.cluster_phase = c.phase + 1;
    if (releases) release(w, c.now);
    else join(c.now, w.released);
    c.arrived++, w.block->processor->events++;
    open_if_complete(*w.block->company, w.block->number / w.block->company->cluster);
}
void cluster_wait(Warp& w, int site, bool acquires, uint32_t mask) {
    need_whole_warp(w, site, mask);
    ClusterBarrier& c = cluster_barrier(w);
    if (w.cluster_phase > c.phase) {
        w.yield = true, w.site = site;
        throw Park{-1, "waits for the cluster"};
    }
    if (acquires) acquire(w, c.done), sync(w);
}

// ---- mbarriers (ISA 9.7.13.15)
namespace {
constexpr unsigned kMark = 2;
struct Found {
    MBarrier& barrier;
    Block& block;
    uint64_t offset;
};
Found find(Warp& w, int site, Space space, uint64_t at, int lane) {
    MBarrier& m = *(MBarrier*)resolve(w, site, space, at, 8, lane);
    uint64_t offset;
    Block* const b = shared_block(w, site, space, at, offset);
    if (!b || m.mark != kMark) fault(w, site, lane_name(lane) + ": " + hex(at) + " is no mbarrier");
    check_read(w, site, *b, offset, 8, lane, kOneLane, w.seen);
    return {m, *b, offset};
}
void settle(const Found& f) {
    if (f.barrier.pending || f.barrier.bytes) return;
    f.barrier.pending = f.barrier.expected, f.barrier.phase ^= 1, f.block.processor->events++;
    PhaseClock& c = f.block.clocks[f.offset];
    join(c.done, c.now), c.now.clear();
}
}  // namespace
void check_mbarrier(Warp& w, int site, Block& b, uint64_t at, int lane) {
    find(w, site, kGeneric, uint64_t(b.shared) + at, lane);
    if (w.block->processor->checks(kInitFences)) check_read(w, site, b, at, 8, lane, kUnit, w.seen);
}
void mbarrier_init(Warp& w, int site, const U64& at, const U32& n, uint32_t mask) {
    LANE_OF(mask) {
        char* const p = resolve(w, site, kShared, at[l], 8, l);
        MBarrier m = {};
        m.mark = kMark, m.expected = m.pending = n[l];
        check_write(w, site, *w.block, at[l], 8, l, kOrdinary), w.block->wrote(at[l], 8);
        w.block->clocks.erase(at[l]);
        memcpy(p, &m, 8);
    }
}
void mbarrier_inval(Warp& w, int site, const U64& at, uint32_t mask) {
    LANE_OF(mask) find(w, site, kShared, at[l], l).barrier.mark = 0;
}
U64 mbarrier_arrive(Warp& w, int site, Space space, Order order, const U64& at, const U32& n, const U32& bytes,
                    bool drop, uint32_t mask) {
    U64 phase = {};
    LANE_OF(mask) {
        const Found f = find(w, site, space, at[l], l);
        if (f.barrier.pending < n[l]) fault(w, site, "more arrivals than the mbarrier counts");
        if (order != kRelaxed) release(w, f.block.clocks[f.offset].now);
        phase[l] = f.barrier.phase;
        f.barrier.bytes += bytes[l], f.barrier.pending -= n[l];
        if (drop) f.barrier.expected -= n[l];
        settle(f);
    }
    w.block->processor->events++;
    return phase;
}
void mbarrier_expect(Warp& w, int site, Space space, const U64& at, const U32& bytes, uint32_t mask) {
    LANE_OF(mask) find(w, site, space, at[l], l).barrier.bytes += bytes[l];
}
Pred mbarrier_try(Warp& w, int site, Space space, Order order, const U64& at, const U32& parity, uint32_t mask) {
    Pred r = {};
    w.polling = false;
    LANE_OF(mask) {
        const Found f = find(w, site, space, at[l], l);
        r[l] = -int(f.barrier.phase != (parity[l] & 1));
        if (r[l]) {
            if (order != kRelaxed) acquire(w, f.block.clocks[f.offset].done);
        } else {
            w.yield = w.polling = true, w.site = site, w.awaited = at[l];
            if (w.block->processor->counting()) w.block->processor->sites[site].polls++;
        }
    }
    return r;
}
void count_bytes(Block& b, uint64_t at, int64_t bytes, int agent, uint32_t time) {
    MBarrier& m = *(MBarrier*)(b.shared + at);
    PhaseClock& c = b.clocks[at];
    if (!b.stamps.empty()) {
        if (c.now.size() <= size_t(agent)) c.now.resize(agent + 1);
        c.now[agent] = std::max(c.now[agent], time);
    }
    m.bytes -= bytes, b.processor->events++;
    settle({m, b, at});
}
void proxy_fence(Warp& w, uint32_t mask) {
    LANE_OF(mask) w.seen.fences[l]++;
    w.seen.fenced = w.seen.clock;
}

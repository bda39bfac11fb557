// Bulk copies: TMA's tiles and st.async; and tensor maps (ISA 5.5, 9.7.9.25, 9.7.9.28). A load is delivered
// as late as anything waits for it or, with a seed, at any time before; a store runs when its group is waited for.
#include "machine.h"
#include "tensor_map.h"

namespace {
struct Box {
    TensorMap map;
    int64_t at[5];
    uint64_t shared, lines, line;  // address; number of lines and the bytes of each
    uint64_t bytes() const { return lines * line; }
};
// A line of the box in global memory, null where it lies outside the tensor, and its bytes [low, high) that lie inside
char* line_of(const Box& box, uint64_t i, int64_t& low, int64_t& high) {
    const TensorMap& m = box.map;
    char* p = m.base + box.at[0] * int64_t(m.element);
    low = std::max<int64_t>(-box.at[0], 0) * m.element;
    high = std::min<int64_t>(m.box[0], int64_t(m.sizes[0]) - box.at[0]) * m.element;
    for (uint32_t d = 1; d < m.rank; i /= m.box[d++]) {
        const int64_t at = box.at[d] + int64_t(i % m.box[d]);
        if (at < 0 || at >= int64_t(m.sizes[d])) return nullptr;
        p += at * int64_t(m.strides[d - 1]);
    }
    return low < high ? p : nullptr;
}
template <class F> void each_chunk(const Box& box, F&& f) {  // f(shared address, global address, its bytes [low, high))
    static const uint32_t masks[] = {0, 1, 3, 7};
    for (uint64_t i = 0; i < box.lines; i++) {
        int64_t low, high;
        char* const line = line_of(box, i, low, high);
        for (int64_t c = 0; c < int64_t(box.line); c += 16) {
            const uint64_t flat = box.shared + i * box.line + c;
            const int64_t end = std::min<int64_t>(16, box.line - c), from = std::clamp<int64_t>(low - c, 0, end);
            f(flat ^ (flat >> 7 & masks[box.map.swizzle]) << 4, line + c, line ? from : 0,
              line ? std::clamp<int64_t>(high - c, from, end) : 0);
        }
    }
}
Box box_of(Warp& w, int site, uint64_t map, int n, const U32* at, uint64_t shared, int lane, bool loads) {
    Box box = {};
    if (w.block->company->maps[map])
        fault(w, site, "the tensor map has been changed, and no fence.proxy.tensormap acquires it");
    if (map % 64) fault(w, site, "a tensor map at " + hex(map) + " is not aligned to 64 bytes");
    memcpy(&box.map, (const void*)map, sizeof box.map);
    const TensorMap& m = box.map;
    if (m.magic != kTensorMap) fault(w, site, hex(map) + " is no tensor map");
    if (int(m.rank) != n)
        fault(w, site, std::to_string(n) + " coordinates, and a map of " + std::to_string(m.rank) + " dimensions");
    box.shared = shared, box.line = uint64_t(m.box[0]) * m.element, box.lines = 1;
    for (int d = 1; d < n; d++) box.lines *= m.box[d];
    for (int d = 0; d < n; d++) box.at[d] = int32_t(at[d][lane]);
    if (shared % (m.swizzle ? 128 << m.swizzle : 128))
        fault(w, site, "a tile at shared address " + hex(shared) + " is not aligned to its swizzle");
    if (shared + box.bytes() > w.block->shared_size) fault(w, site, "the tile ends past the shared memory");
    for (uint64_t i = 0; i < box.lines; i++) {
        int64_t low, high;
        if (char* const p = line_of(box, i, low, high)) {
            check_bounds(w, site, uint64_t(p) + low, high - low, lane);
            global_access(w, site, uint64_t(p) + low, high - low, lane, kPlain, loads, !loads, w.waited);
        }
    }
    return box;
}
void count_bulk(Warp& w, int site, uint64_t bytes) {
    Processor& q = *w.block->processor;
    if (q.counting()) q.sites[site].bulk_bytes += bytes;
}
// Begins a copy of n bytes to shared address `to` of each block that `ranks` has a bit for, or of the one that is named
void begin(Warp& w, int site, int lane, uint64_t to, uint32_t n, uint64_t barrier, const uint32_t* ranks,
           std::function<void(Block&, uint64_t)> move) {
    uint64_t offset, at;
    Block* const named = shared_block(w, site, kShared, to, offset);
    Block* const first = w.block - w.block->rank;
    Block* const signals = shared_block(w, site, kShared, barrier, at);
    if (!ranks && signals != named) fault(w, site, "the mbarrier is another block's than the destination of the copy");
    for (int rank = 0; rank < w.block->company->cluster; rank++) {
        if (!(ranks ? *ranks >> rank & 1 : first + rank == named)) continue;
        Block& b = first[rank];
        if (!b.alive)
            fault(w, site,
                  "block " + std::to_string(rank) + " of the cluster has ended, and its shared memory with it");
        if (offset + n > b.shared_size) fault(w, site, "the copy ends past the shared memory");
        check_mbarrier(w, site, b, at, lane);
        check_write(w, site, b, offset, n, lane, kCopying);
        b.transfers.push_back({site, &w, &b, at, n, [&b, offset, n, move, agent = w.block->unit](uint32_t time) {
                                   move(b, offset);
                                   b.wrote(offset, n), stamp_copied(b, offset, n, agent, time);
                               }});
    }
}
}  // namespace

void tma_load(Warp& w, int site, const U64& to, const U64& map, int n, const U32* at, const U64& barrier,
              const U32* ranks, uint32_t mask) {
    LANE_OF(mask) {
        uint64_t offset;
        if (!shared_block(w, site, kShared, to[l], offset)) continue;
        const Box box = box_of(w, site, map[l], n, at, offset, l, true);
        count_bulk(w, site, box.bytes());
        const uint32_t mask_of_ranks = ranks ? (*ranks)[l] & 0xffff : 0;
        begin(w, site, l, to[l], box.bytes(), barrier[l], ranks ? &mask_of_ranks : nullptr, [box](Block& b, uint64_t) {
            each_chunk(box, [&](uint64_t p, const char* from, int64_t low, int64_t high) {
                memset(b.shared + p, 0, 16);
                memcpy(b.shared + p + low, from + low, high - low);
            });
        });
    }
}
void tma_store(Warp& w, int site, const U64& map, int n, const U32* at, const U64& from, uint32_t mask) {
    LANE_OF(mask) {
        const Box box = box_of(w, site, map[l], n, at, from[l], l, false);
        count_bulk(w, site, box.bytes());
        w.stores.open.push_back({site, [&w, site, box, lane = int(l), seen = w.seen] {
                                     check_read(w, site, *w.block, box.shared, box.bytes(), lane, kUnit, seen);
                                     each_chunk(box, [&](uint64_t p, char* to, int64_t low, int64_t high) {
                                         memcpy(to + low, w.block->shared + p + low, high - low);
                                     });
                                 }});
    }
}
void store_async(Warp& w, int site, const U64& at, int n, int bytes, const U64* values, const U64& barrier,
                 uint32_t mask) {
    LANE_OF(mask) {
        std::array<uint64_t, 4> v = {};
        for (int i = 0; i < n; i++) memcpy((char*)&v + i * bytes, &values[i][l], bytes);
        begin(w, site, l, at[l], n * bytes, barrier[l], nullptr,
              [=](Block& b, uint64_t p) { memcpy(b.shared + p, &v, n * bytes); });
    }
}
void deliver(Block& b, size_t i) {
    const Transfer t = b.transfers[i];
    b.transfers.erase(b.transfers.begin() + i);
    const int unit = t.by->block->unit;
    const uint32_t time = b.company->tick(unit);
    t.deliver(time);
    count_bytes(b, t.barrier, t.bytes, unit, time);
}
void bulk_commit(Warp& w, uint32_t mask) {
    if (mask) w.stores.commit();
}
void bulk_wait(Warp& w, int left, uint32_t mask) {
    if (!mask) return;
    for (const Store& s : w.stores.take(left)) s.run();
    w.block->processor->events++;
}

// ---- tensor maps that kernels make, or change, in shared or global memory
void map_replace(Warp& w, int site, Space space, const U64& at, int field, int which, const U64& value, uint32_t mask) {
    static const uint32_t sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};  // bytes, by elemtype
    LANE_OF(mask) {
        TensorMap m;
        char* const p = resolve(w, site, space, at[l], 128, l);
        memcpy(&m, p, sizeof m);
        m.magic = kTensorMap;
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
        uint64_t offset;
        if (space == kShared || shared_block(w, site, space, at[l], offset))
            stamp(w, *w.block, space == kShared ? at[l] : offset, 128, l, kOrdinary);
        else w.block->company->maps[at[l]] = true;
    }
}
void map_copy(Warp& w, int site, const U64& to, const U64& from, uint32_t mask) {
    need_whole_warp(w, site, mask);
    memcpy(resolve(w, site, kGlobal, to[0], 128, 0), resolve(w, site, kShared, from[0], 128, 0), 128);
    w.block->company->maps[to[0]] = true;
}
void map_acquire(Warp& w, int site, const U64& at, uint32_t mask) {
    LANE_OF(mask) w.block->company->maps[at[l]] = false;
}

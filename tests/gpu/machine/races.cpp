// Order of accesses: vector clocks over barriers, stamps of reads and writes on shared memory, and what a launch has
// read and written in global memory.
#include "machine.h"

void release(Warp& w, Clock& c) {
    if (w.seen.clock.empty()) return;
    join(c, w.seen.clock);
    w.seen.clock[w.agent]++;
}
void acquire(Warp& w, const Clock& c) { join(w.seen.clock, c); }
void meet(Warp& w) {
    if (!w.seen.clock.empty()) w.met = ++w.seen.clock[w.agent];
}
void sync(Warp& w) { meet(w), w.synced = w.met; }

// ---- shared memory
constexpr uint32_t kTogether = 254,
                   kSeveral = 255;  // in a stamp of a read: all lanes by one instruction, or several lanes
static std::string race(int lane, const char* does, uint64_t word, const std::string& rest) {
    return "race: " + lane_name(lane) + does + "shared address " + hex(4 * word) + ", which " + rest;
}
static std::string agent_name(Company& c, int agent, int lane) {
    const int per = c.blocks[0].agents(), warps = c.blocks[0].warps.size();
    if (agent % per == warps) return "an asynchronous copy";
    const std::string block = c.blocks.size() > 1 ? name_of(c.blocks[agent / per]) + " " : "";
    if (agent % per > warps) return block + "warpgroup " + std::to_string(agent % per - warps - 1) + "'s wgmma";
    return block + "warp " + std::to_string(agent % per) + (lane < 32 ? " " + lane_name(lane) : "");
}
// A write that the access does not come after
static void check_after_write(Warp& w, int site, Block& b, uint64_t word, int lane, Access access, const Seen& seen,
                              bool writes) {
    const Stamp& s = b.stamps[word];
    const char* does = writes ? " writes " : " reads ";
    if (!s.agent) return;
    const int agent = s.agent - 1;
    if (s.kind == kCopying) fault(w, site, race(lane, does, word, "an asynchronous copy still writes"));
    const bool repeated = s.kind == kRepeated;
    if (agent != w.agent && !repeated && s.time > seen.clock[agent])
        fault(w, site,
              race(lane, does, word, agent_name(*b.company, agent, s.lane) + " wrote, and no barrier lies between"));
    if (agent == w.agent && !repeated && access < kUnit && (access == kAllLanes || s.lane != lane) &&
        s.time >= w.synced && !writes)
        fault(w, site,
              race(lane, does, word,
                   agent_name(*b.company, agent, s.lane) + " wrote, and no bar.warp.sync or barrier lies between"));
    if (access < kUnit || writes || s.kind == kCopied) return;
    // The fence may be the writer's or, after the barrier that lies between, the reader's (Triton's order)
    const bool unfenced = agent == w.agent
                              ? s.fences >= seen.fences[s.lane]
                              : s.fences == b.company->warp(agent)->seen.fences[s.lane] && s.time > seen.fenced[agent];
    if (unfenced)
        fault(w, site,
              "the asynchronous proxy reads shared address " + hex(4 * word) + ", which " +
                  agent_name(*b.company, agent, s.lane) + " wrote without fence.proxy.async since");
}
static int first_agent(const Block& b) { return b.unit - int(b.warps.size()) - b.rank * b.agents(); }
static int stride(const Block& b) { return b.company->cluster * b.agents(); }
int tensor_core(const Warp& w) { return w.block->unit + 1 + w.id / 4; }

void check_read(Warp& w, int site, Block& b, uint64_t p, size_t n, int lane, Access access, const Seen& seen) {
    if (b.stamps.empty()) return;
    const int first = first_agent(b), agents = stride(b);
    for (uint64_t word = p / 4; word <= (p + n - 1) / 4; word++) {
        check_after_write(w, site, b, word, lane, access, seen, false);
        if (!b.stamps[word].agent && w.block->processor->checks(kUninitialised))
            fault(w, site, lane_name(lane) + " reads shared address " + hex(4 * word) + ", which nothing has written");
        if (access == kTensor) {
            b.reads[word * agents + tensor_core(w) - first] = b.company->time[tensor_core(w)] << 8 | kTogether;
            continue;
        }
        uint32_t& read = b.reads[word * agents + w.agent - first];
        const uint32_t before = read >> 8 >= w.met ? read & 255 : 0;  // by the warp since its lanes have met
        const uint32_t code = access == kOneLane ? lane + 1 : kTogether;
        read = w.time() << 8 | (!before || before == code || before == kTogether ? code
                                : code == kTogether                              ? before
                                                                                 : kSeveral);
    }
}
void check_write(Warp& w, int site, Block& b, uint64_t p, size_t n, int lane, Kind kind) {
    if (b.stamps.empty()) return;
    const int first = first_agent(b), agents = stride(b);
    for (uint64_t word = p / 4; word <= (p + n - 1) / 4 && n >= 4; word++) {  // bytes beside each other are no race
        if (kind != kAtomicWrite || b.stamps[word].kind != kAtomicWrite)
            check_after_write(w, site, b, word, lane, kind == kCopying ? kUnit : kOneLane, w.seen, true);
        for (int a = 0; a < agents; a++) {
            const uint32_t read = b.reads[word * agents + a], time = read >> 8, by = read & 255;
            const bool own = a + first == w.agent;
            if (!by ||
                (own ? time < w.met || by == uint32_t(lane + 1) || by == kTogether : time <= w.seen.clock[a + first]))
                continue;
            fault(w, site,
                  race(lane, kind == kCopying ? "'s asynchronous copy writes " : " writes ", word,
                       agent_name(*b.company, a + first, int(by) - 1) + " has read, and no " +
                           (own ? "bar.warp.sync or " : "") + "barrier lies between"));
        }
    }
    const Stamp& old = b.stamps[p / 4];  // of a part of a word, the other part may be another warp's
    const bool recent = old.agent - 1 == w.agent ? old.kind == kRepeated && old.time >= w.synced
                                                 : old.agent && old.time > w.seen.clock[old.agent - 1];
    const bool shared = n < 4 && recent;
    stamp(w, b, p, n, lane, shared ? kRepeated : kind);
}
void check_same_write(Warp& w, Block& b, uint64_t p, size_t n, int lane) {
    if (b.stamps.empty()) return;
    for (uint64_t word = p / 4; word <= (p + n - 1) / 4; word++) {
        Stamp& s = b.stamps[word];
        const bool own = s.agent - 1 == w.agent;
        if (!s.agent) stamp(w, b, 4 * word, 4, lane, kOrdinary);
        else if (own ? s.lane != lane && s.time >= w.synced : s.time > w.seen.clock[s.agent - 1]) s.kind = kRepeated;
        else if (n < 4 && !(own && s.kind == kRepeated && s.time >= w.synced))
            stamp(w, b, 4 * word, 4, lane, kOrdinary);
    }
}
void stamp(Warp& w, Block& b, uint64_t p, size_t n, int lane, Kind kind) {
    if (b.stamps.empty()) return;
    const Stamp s = {uint16_t(w.agent + 1), uint8_t(lane), kind, w.time(), w.seen.fences[lane]};
    std::fill(&b.stamps[p / 4], &b.stamps[(p + n - 1) / 4] + 1, s);
}
void stamp_copied(Block& b, uint64_t p, size_t n, int agent, uint32_t time) {
    if (!b.stamps.empty())
        std::fill(&b.stamps[p / 4], &b.stamps[(p + n - 1) / 4] + 1, Stamp{uint16_t(agent + 1), 255, kCopied, time, 0});
}

// ---- global memory
void Footprint::add(uint64_t p, size_t n) {
    for (uint64_t word = p / 4; word <= (p + n - 1) / 4; word++)
        pages_[word >> 10][word >> 6 & 15] |= 1ull << word % 64;
}
bool Footprint::has(uint64_t p, size_t n) const {
    for (uint64_t word = p / 4; word <= (p + n - 1) / 4; word++)
        if (const auto page = pages_.find(word >> 10);
            page != pages_.end() && page->second[word >> 6 & 15] >> word % 64 & 1)
            return true;
    return false;
}
void Footprint::merge(const Footprint& other) {
    for (const auto& [number, words] : other.pages_)
        for (int i = 0; i < 16; i++) pages_[number][i] |= words[i];
}
uint64_t Footprint::bytes() const {
    uint64_t n = 0;
    for (const auto& [number, words] : pages_)
        for (uint64_t bits : words) n += 4 * std::popcount(bits);
    return n;
}
static struct {  // the launches that may still run when the next begins early
    Footprint reads, writes;
} ahead;

void begin_stream(const Request& r) {
    if (!r.overlaps) ahead = {};
}
void end_stream(const Request& r, const Processor& p) {
    if (!r.overlaps || !p.early) ahead = {};  // it has waited for those before
    if (p.dependents) ahead.reads.merge(p.reads), ahead.writes.merge(p.writes);
}

void global_access(Warp& w, int site, uint64_t p, size_t n, int lane, Order order, bool reads, bool writes,
                   bool waited) {
    Processor& q = *w.block->processor;
    if (!q.checks(kRaces)) return;
    const std::string what = lane_name(lane) + (writes ? " writes " : " reads ") + hex(p);
    if (!waited && (ahead.writes.has(p, n) || (writes && ahead.reads.has(p, n))))
        fault(w, site,
              what + " before griddepcontrol.wait, and the kernel ahead " +
                  (ahead.writes.has(p, n) ? "writes" : "reads") + " it");
    if (order == kNonCoherent && q.writes.has(p, n))
        fault(w, site, what + " through the non-coherent cache, and this kernel has written it");
    if (reads) q.reads.add(p, n);
    if (writes) q.writes.add(p, n);
    Company& c = *w.block->company;
    if (c.blocks.size() == 1) return;
    const bool strong = order != kPlain && order != kNonCoherent;
    const auto sync = strong ? c.released.find(p) : c.released.end();
    if (reads && sync != c.released.end())
        join(order == kAcquire || order == kBoth ? w.seen.clock : w.pending, sync->second);
    const int per = c.blocks[0].warps.size() + 1;
    for (uint64_t word = p / 4; word <= (p + n - 1) / 4; word++) {
        const auto found = c.global.find(word);
        if (found == c.global.end() && !writes) continue;
        GlobalStamp& s = writes ? c.global[word] : found->second;
        const auto unordered = [&](uint32_t agent, uint32_t time) {
            return agent && (int(agent) - 1) / per != w.block->number && time > w.seen.clock[agent - 1];
        };
        if (unordered(s.writer, s.time) && !(strong && s.strong) && n >= 4)
            fault(w, site,
                  "race: " + what + ", which " + agent_name(c, s.writer - 1, 255) +
                      " wrote, and no release and acquire lie between");
        if (writes && !strong && unordered(s.reader, s.read_time))
            fault(w, site,
                  "race: " + what + ", which " + agent_name(c, s.reader - 1, 255) +
                      " has read, and no release and acquire lie between");
        if (writes) s = {uint32_t(w.agent + 1), w.time(), 0, 0, strong};
        else if (!strong) s.reader = w.agent + 1, s.read_time = w.time();
    }
    if (writes && strong) {
        if (order == kRelease || order == kBoth) release(w, c.released[p]);
        else join(c.released[p], w.released);
    }
}
void fence(Warp& w, int site, uint32_t mask) {
    if (w.seen.clock.empty()) return;
    join(w.seen.clock, w.pending);
    w.released = w.seen.clock, w.seen.clock[w.agent]++;
}

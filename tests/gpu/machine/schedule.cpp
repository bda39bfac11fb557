// A launch: companies of blocks, turns of warps, groups of lanes. Without a seed everything runs in order and copies
// come as late as they can; with one the order of blocks and warps, the length of turns and the copies' times are
// random.
#include <atomic>
#include <cstdio>
#include <thread>

#include "machine.h"

// ---- messages
std::string hex(uint64_t x) {
    char t[32];
    snprintf(t, sizeof t, "0x%llx", (unsigned long long)x);
    return t;
}
std::string name_of(const Block& b) {
    const uint32_t* i = b.index;
    return "block (" + std::to_string(i[0]) + "," + std::to_string(i[1]) + "," + std::to_string(i[2]) + ")";
}
std::string describe(const Warp& w) { return name_of(*w.block) + " warp " + std::to_string(w.id); }
std::string at(const Warp& w, int site) {
    const Site& s = w.block->processor->kernel.site[site];
    return std::string(" at ") + (*s.source ? s.source + std::string(", ") : "") + "PTX line " +
           std::to_string(s.line) + ": " + s.text;
}
void fault(const Warp& w, int site, const std::string& why) { throw Fault{describe(w) + ": " + why + at(w, site)}; }

// ---- a warp's turn
static void add(Warp& w, int pc, uint32_t mask, bool parked = false) {
    if (!mask) return;
    if (pc == kExit) {
        w.alive &= ~mask, w.block->processor->events++;
        for (Group& g : w.groups) g.parked = false;
        return;
    }
    for (Group& g : w.groups)
        if (g.pc == pc) return void((g.mask |= mask, g.parked = false));
    w.groups.push_back({pc, mask, parked});
}
// The group that is furthest behind, so that lanes which parted meet again; -1: all are parked
static int next_group(Warp& w) {
    int best = -1;
    for (int i = 0; i < int(w.groups.size()); i++)
        if (!w.groups[i].parked &&
            (best < 0 || (w.block->rotate ? w.block->processor->rng() % 2 : w.groups[i].pc < w.groups[best].pc)))
            best = i;
    return best;
}
static void end_warp(Warp& w) {
    Block& b = *w.block;
    if (const Product* p = w.products.first()) fault(w, p->site, "the warp ends before its wgmma");
    if (const Store* s = w.stores.first()) fault(w, s->site, "the warp ends before its bulk copy");
    b.alive--;
    for (int i = 0; i < 16; i++)
        if (b.barriers[i].whole) open_if_complete(b, i);
    open_if_complete(*b.company, b.number / b.company->cluster);
}
static void turn(Warp& w, int quota) {
    Processor& q = *w.block->processor;
    const Kernel& k = q.kernel;
    w.yield = false;
    Park last = {-1, ""};
    while (quota-- > 0 && !w.groups.empty() && !w.yield) {
        const int g = next_group(w);
        if (g < 0) fault(w, last.site, last.why);
        const Group now = w.groups[g];
        w.groups.erase(w.groups.begin() + g);
        const BasicBlock& code = k.block[now.pc];
        const Pred wide = lanes(now.mask);
        const Instruction *const begin = k.code + code.first, *const end = begin + code.count;
        try {
            for (const Instruction* i = begin; i < end; i++)
                i->run(w, w.registers, i->operands, now.mask, (const int32_t*)&wide);
        } catch (const Park& park) {
            if (park.site >= 0) last = park;
            add(w, now.pc, now.mask, park.site >= 0);  // what parks is the first of its block
            continue;
        }
        if (q.counting() && !w.polling) q.block_runs[now.pc]++, q.block_lanes[now.pc] += std::popcount(now.mask);
        uint32_t taken = 0;
        if (code.predicate >= 0) {
            taken = bits(*(const Pred*)(w.registers + code.predicate));
            taken = now.mask & (code.negated ? ~taken : taken);
            add(w, code.target, taken);
        }
        add(w, code.next, now.mask & ~taken);
    }
    if (w.groups.empty()) end_warp(w);
}
static bool step(Block& b) {  // every warp once; false where none could run
    Processor& q = *b.processor;
    std::vector<int> order(b.warps.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = i;
    if (q.request.seed) std::shuffle(order.begin(), order.end(), q.rng);
    bool ran = false;
    for (int i : order) {
        Warp& w = b.warps[i];
        if (w.groups.empty() || w.waits_at >= 0) continue;
        turn(w, q.request.seed ? 1 + q.rng() % 64 : 4096);
        ran = true;
    }
    return ran;
}

// ---- the beginning of a block
static char* aligned(std::vector<char>& memory, uintptr_t to) {
    return (char*)((uintptr_t(memory.data()) + to - 1) & ~(to - 1));
}
static void begin(Warp& w, int id, uint32_t threads) {
    Block& b = *w.block;
    const Processor& q = *b.processor;
    const Kernel& k = q.kernel;
    const uint32_t left = std::min<uint32_t>(32, threads - 32 * id);
    w.id = id, w.agent = b.number * b.agents() + id;
    w.alive = left == 32 ? ~0u : (1u << left) - 1;
    w.waits_at = w.site = -1, w.polling = false, w.cluster_phase = 0, w.waited = !q.request.overlaps, w.budget = k.pool,
    w.wgmma_fences = 1;
    w.groups = {{0, w.alive}}, w.products = {}, w.copies = {}, w.stores = {}, w.committed = 0;
    w.memory.assign(k.registers + 32 * k.local + 512, char(0xff));
    w.registers = aligned(w.memory, 256);
    w.local = w.registers + (k.registers + 63) / 64 * 64, w.local_size = k.local;
    w.params = q.params;
    Special& s = w.sr;
    EACH_LANE {
        uint32_t t = 32 * id + l;
        s.lane[l] = l;
        for (int d = 0; d < 3; t /= q.request.block[d++]) s.tid[d][l] = t % q.request.block[d];
    }
    for (int d = 0; d < 3; d++) {
        s.ctaid[d] = b.index[d], s.ntid[d] = q.request.block[d], s.nctaid[d] = q.request.grid[d];
        s.cluster_ctaid[d] = b.index[d] % q.request.cluster[d], s.cluster_nctaid[d] = q.request.cluster[d];
    }
    s.warp = id, s.rank = b.rank;
    w.seen = {}, w.pending = w.released = {}, w.met = w.synced = 1;
    if (q.checks(Checks(kRaces | kInitFences | kUninitialised)))
        w.seen.clock.assign(b.company->blocks.size() * b.agents(), 0), w.seen.clock[w.agent] = 1,
                                                                       w.seen.fenced = w.seen.clock;
}
static void begin(Block& b, Company& c, Processor& q, int number) {
    const uint32_t threads = q.request.block[0] * q.request.block[1] * q.request.block[2];
    b.company = &c, b.processor = &q, b.number = number, b.rank = number % c.cluster, b.rotate = false, b.pool = 0;
    b.warps.resize((threads + 31) / 32);
    b.alive = b.warps.size(), b.unit = number * b.agents() + b.alive;
    b.shared_size = q.kernel.shared + q.request.dynamic;
    b.memory.assign(b.shared_size + 2048, char(0xff));
    b.shared = aligned(b.memory, 1024);
    std::fill_n(b.barriers, 16, Barrier{});
    b.transfers.clear(), b.clocks.clear(), b.decoded.clear(), b.versions.assign(b.shared_size / 1024 + 1, 0);
    if (q.checks(Checks(kRaces | kInitFences | kUninitialised))) {
        b.stamps.assign(b.shared_size / 4 + 4, Stamp{});
        b.reads.assign((b.shared_size / 4 + 4) * c.cluster * b.agents(), 0);
    }
    for (size_t i = 0; i < b.warps.size(); i++) b.warps[i].block = &b, begin(b.warps[i], i, threads);
}

// ---- a company
static std::string deadlock(const std::vector<Block*>& blocks) {
    std::map<std::string, std::pair<int, std::string>> seen;
    for (const Block* b : blocks)
        for (const Warp& w : b->warps)
            for (const Group& g : w.groups) {
                std::string s = "before PTX line " + std::to_string(b->processor->kernel.block[g.pc].line);
                if (w.waits_at >= 0) {
                    const Barrier& a = b->barriers[w.waits_at];
                    s = "in barrier " + std::to_string(w.waits_at) + " (" + std::to_string(a.arrived) + " of " +
                        std::to_string(a.expected) + " threads)";
                }
                if (w.polling) {
                    const MBarrier& m = *(const MBarrier*)(b->shared + (w.awaited & 0xffffff));
                    s = "for " + std::to_string(m.pending) + " arrivals and " + std::to_string(m.bytes) +
                        " bytes at the mbarrier at shared address " + hex(w.awaited & 0xffffff);
                }
                if (w.site >= 0) s += at(w, w.site);
                auto& [n, first] = seen[s];
                if (!n++) first = describe(w);
            }
    std::string out = "deadlock:";
    for (const auto& [what, who] : seen)
        out += "\n  " + std::to_string(who.first) + " group(s) of lanes, first " + who.second + ": " + what;
    return out;
}
static void run(Company& c, Processor& q, uint64_t number, const std::atomic<bool>& stop) {
    const Request& r = q.request;
    q.rng.seed(r.seed * 0x9e3779b97f4a7c15 + number);
    c.barriers.assign(c.blocks.size() / c.cluster, {});
    c.global.clear(), c.released.clear(), c.maps.clear(), c.time.clear();
    std::vector<Block*> live;
    for (size_t i = 0; i < c.blocks.size(); i++) {
        Block& b = c.blocks[i];
        uint64_t cluster = number * (c.blocks.size() / c.cluster) + i / c.cluster, rank = i % c.cluster;
        for (int d = 0; d < 3; d++) {
            const uint32_t n = r.cluster[d], across = r.grid[d] / n;
            b.index[d] = cluster % across * n + rank % n, cluster /= across, rank /= n;
        }
        begin(b, c, q, i), live.push_back(&b);
    }
    for (uint64_t seen = q.events, idle = 0; !live.empty() && !stop;) {
        if (r.seed) std::shuffle(live.begin(), live.end(), q.rng);
        for (Block* b : live) {
            b->rotate = idle > 64;
            const bool ran = b->alive && step(*b);
            if (!b->transfers.empty() && (q.events == seen || !ran || (r.seed && q.rng() % 4 == 0)))
                deliver(*b, r.seed ? q.rng() % b->transfers.size() : 0);
            if (!b->alive && !b->transfers.empty())
                fault(*b->transfers[0].by, b->transfers[0].site, "the block ends before its copies have come");
        }
        std::erase_if(live, [](Block* b) { return !b->alive; });
        idle = q.events == seen ? idle + 1 : 0, seen = q.events;
        if (idle > 2000) throw Fault{deadlock(live)};
    }
}

// ---- a launch
static void run(const Request& r) {
    const uint64_t blocks = uint64_t(r.grid[0]) * r.grid[1] * r.grid[2],
                   cluster = uint64_t(r.cluster[0]) * r.cluster[1] * r.cluster[2];
    const uint64_t together = r.cooperative ? blocks : cluster, companies = blocks / together;
    std::vector<uint64_t> order(companies);
    for (uint64_t i = 0; i < companies; i++) order[i] = i;
    if (std::mt19937_64 rng(r.seed); r.seed) std::shuffle(order.begin(), order.end(), rng);

    const int threads =
        r.checks & (kRaces | kInitFences | kUninitialised) ? 1 : std::clamp<uint64_t>(r.threads, 1, companies);
    std::atomic<uint64_t> next = 0;
    std::atomic<bool> stop = false;
    std::vector<std::string> faults(threads);
    std::vector<Processor> processors;
    for (int i = 0; i < threads; i++) {
        Processor q = {r, *r.kernel};
        q.memory.resize(r.kernel->params + 256);
        q.params = aligned(q.memory, 256), q.params_size = r.kernel->params, memcpy(q.params, r.params, q.params_size);
        if (r.sites)
            q.sites.resize(r.kernel->sites + 1), q.block_runs.resize(r.kernel->blocks),
                q.block_lanes.resize(r.kernel->blocks);
        processors.push_back(std::move(q));
    }
    const auto work = [&](int i) {
        try {
            Company c = {std::vector<Block>(together), int(cluster)};
            for (uint64_t n; (n = next++) < companies && !stop;) run(c, processors[i], order[n], stop);
        } catch (const Fault& f) { faults[i] = f.what, stop = true; }
    };
    begin_stream(r);
    std::vector<std::thread> others;
    for (int i = 1; i < threads; i++) others.emplace_back(work, i);
    work(0);
    for (std::thread& t : others) t.join();
    for (const Processor& q : processors) {
        for (size_t i = 0; i < q.block_runs.size(); i++)
            r.block_runs[i] += q.block_runs[i], r.block_lanes[i] += q.block_lanes[i];
        for (size_t i = 0; i < sizeof(SiteCount) / 8 * q.sites.size(); i++)
            r.sites[i] += ((const uint64_t*)q.sites.data())[i];
        for (int i = 0; i < 5; i++) r.totals[i] += q.macs[i];
        r.totals[5] += q.reads.bytes() + q.writes.bytes();
    }
    end_stream(r, processors[0]);
    for (const std::string& f : faults)
        if (!f.empty()) throw Fault{f};
    const auto waits = [](const Processor& q) { return q.waits; };
    if (r.overlaps && r.checks & kRaces && std::none_of(processors.begin(), processors.end(), waits))
        throw Fault{std::string(r.kernel->name) +
                    " may overlap the launches ahead, and never executes griddepcontrol.wait"};
}
extern "C" __attribute__((visibility("default"))) const char* gpu_launch(
    const Request* request) {  // null, or what went wrong
    static std::string failure;
    try {
        run(*request);
        return nullptr;
    } catch (const Fault& f) { failure = f.what; }
    return failure.c_str();
}

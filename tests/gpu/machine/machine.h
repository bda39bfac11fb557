// The machine's state. A launch's blocks run one after another, except those that may wait for each other: the blocks
// of a cluster, or all blocks of a cooperative grid. Such a set is a Company; a host thread runs one company at a time.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <limits>
#include <string>
#include <unordered_map>
#include <vector>

#include "operations.h"

struct Fault {
    std::string what;
};
struct Park {  // thrown by an instruction that needs lanes which are not here; it is tried again when others have come
    int site;
    std::string why;
};
struct Group {  // lanes that stand before basic block `pc`
    int pc;
    uint32_t mask;
    bool parked = false;
};

// ---- order. An agent is a warp of the company, a block's unit of copies, or a warpgroup's tensor core; its time
// counts its releases
typedef std::vector<uint32_t> Clock;  // by agent: what is known of its time. Empty where nothing is checked
inline void join(Clock& a, const Clock& b) {
    if (a.size() < b.size()) a.resize(b.size());
    for (size_t i = 0; i < b.size(); i++) a[i] = std::max(a[i], b[i]);
}
struct Seen {                           // what a warp knows when it issues an instruction
    Clock clock, fenced;                // now, and at its last fence.proxy.async
    std::array<uint32_t, 32> fences{};  // each lane's number of fence.proxy.async
};
// kCopying: a copy may write at any time; kRepeated: warps wrote the same, which is no race
enum Kind : uint8_t { kOrdinary, kAtomicWrite, kCopying, kCopied, kRepeated };
struct Stamp {           // the last write to a word of shared memory
    uint16_t agent = 0;  // 1 + the agent; 0: nobody
    uint8_t lane = 0;
    Kind kind = kOrdinary;
    uint32_t time = 0, fences = 0;
};
struct GlobalStamp {  // of a word of global memory that a company has written; agents are 1 + their number
    uint32_t writer = 0, time = 0, reader = 0, read_time = 0;
    bool strong = false;
};
class Footprint {  // the words of global memory that a launch has read or written
public:
    void add(uint64_t p, size_t n);
    bool has(uint64_t p, size_t n) const;
    void merge(const Footprint&);
    uint64_t bytes() const;

private:
    std::unordered_map<uint64_t, std::array<uint64_t, 16>> pages_;  // of 4096 bytes
};

// ---- asynchronous work
template <class T> struct InFlight {
    std::vector<std::vector<T>> groups;
    std::vector<T> open;
    void commit() { groups.push_back(std::move(open)), open.clear(); }
    bool empty() const { return !first(); }
    const T* first() const {
        for (const auto& g : groups)
            if (!g.empty()) return &g[0];
        return open.empty() ? nullptr : &open[0];
    }
    std::vector<T> take(int left) {  // all but the last `left` groups
        std::vector<T> done;
        const auto end = groups.begin() + std::max(int(groups.size()) - left, 0);
        for (auto g = groups.begin(); g < end; ++g) done.insert(done.end(), g->begin(), g->end());
        groups.erase(groups.begin(), end);
        return done;
    }
};
struct Product {  // a wgmma
    int site;
    ProductForm form;
    U32* d[128];
    const U32* ra[4];
    uint32_t* marks[132];
    bool registers, accumulate;
    uint64_t da, db;
    Seen seen;
    bool done;  // then seen.clock is what those who wait for it know
};
struct Copy {  // cp.async of a lane
    int site;
    uint64_t to, from;
    int bytes, real, lane;
};
struct Store {  // a bulk copy out of shared memory
    int site;
    std::function<void()> run;
};
struct Block;
struct Transfer {  // a bulk copy into shared memory; its bytes count at an mbarrier of `to`
    int site;
    Warp* by;
    Block* to;
    uint64_t barrier;
    uint32_t bytes;
    std::function<void(uint32_t time)> deliver;
};

struct Company;
struct Processor;
struct Warp : WarpBase {
    Block* block;
    int id, agent;
    uint32_t alive;  // lanes that have not returned
    std::vector<Group> groups;
    std::vector<char> memory;  // of registers and local memory
    char* registers;
    bool yield;         // ends its turn after this basic block
    bool polling;       // its last wait on an mbarrier failed: how often it tries is not the kernel's work, nor counted
    uint64_t awaited;   // the address of that mbarrier
    int waits_at = -1;  // a barrier's number
    int site = -1;      // where it waits
    Seen seen;
    uint32_t met, synced;     // its time when its lanes last executed an instruction together, and bar.warp.sync
    Clock pending, released;  // what relaxed reads have met; what it knew at its last fence
    bool waited;              // for the kernel ahead: griddepcontrol.wait
    int cluster_phase;        // of the cluster's barrier, when it last arrived
    int budget;               // registers of a thread; 0: not yet divided
    InFlight<Product> products;
    int committed;  // groups of them
    InFlight<Copy> copies;
    InFlight<Store> stores;
    uint32_t time() const { return seen.clock.empty() ? 0 : seen.clock[agent]; }
};
struct Barrier {
    uint32_t arrived, expected, yes, all;
    bool whole;  // all threads of the block
    Clock clock;
};
struct PhaseClock {  // of an mbarrier: of the arrivals in this phase, and of those before
    Clock now, done;
};
struct Decoded {                              // operand B of a wgmma, which the four warps of a warpgroup share
    uint64_t low = 0, high = 0, version = 0;  // where it lies in shared memory, and the sum of its versions
    std::vector<float> values;
};
struct Block {
    Company* company;
    Processor* processor;
    int number, rank;  // in its company, in its cluster
    uint32_t index[3];
    std::vector<Warp> warps;
    std::vector<char> memory;
    char* shared;
    uint64_t shared_size;
    Barrier barriers[16];
    std::vector<Transfer> transfers;
    int alive;
    int agents() const { return warps.size() + 1 + (warps.size() + 3) / 4; }
    bool rotate;                                          // run groups of lanes in any order: one may poll for another
    int pool;                                             // registers that no thread has
    int unit;                                             // the asynchronous unit's agent
    std::vector<Stamp> stamps;                            // by word
    std::vector<uint32_t> reads;                          // by word and agent of the cluster: time << 8 | lanes
    std::map<uint64_t, PhaseClock> clocks;                // of mbarriers
    std::vector<uint64_t> versions;                       // of each 1024 bytes: how often they were written
    std::map<std::pair<int, uint64_t>, Decoded> decoded;  // by site and descriptor
    void wrote(uint64_t p, size_t n) {
        for (uint64_t i = p >> 10; i <= (p + n - 1) >> 10; i++) versions[i]++;
    }
};
struct ClusterBarrier {
    int arrived = 0, phase = 0;
    Clock now, done;
};
struct Company {
    std::vector<Block> blocks;
    int cluster;  // blocks of a cluster
    std::vector<ClusterBarrier> barriers;
    Clock time;  // of units of copies and of tensor cores
    uint32_t tick(int agent) {
        if (time.size() <= size_t(agent)) time.resize(agent + 1);
        return ++time[agent];
    }
    std::unordered_map<uint64_t, GlobalStamp> global;
    std::unordered_map<uint64_t, Clock> released;  // by address of global memory
    std::map<uint64_t, bool> maps;  // tensor maps that the kernel has changed: true until one is acquired
    Warp* warp(int agent) {
        const int per = blocks[0].agents();
        return &blocks[agent / per].warps[agent % per];
    }
};

// ---- a launch
// kWarpgroups: a warp that waits for a wgmma comes after what its warpgroup did before the wgmma
enum Checks { kRaces = 1, kInitFences = 2, kUninitialised = 4, kNarrowSums = 8, kWarpgroups = 16 };
struct Request {  // as program.py gives it
    const Kernel* kernel;
    uint32_t grid[3], block[3], cluster[3], dynamic;
    const void* params;
    uint64_t seed;
    int cooperative, overlaps, checks, threads;
    uint64_t *block_runs, *block_lanes, *sites, *totals;  // counters, or null: counters.py reads them
};
struct Passes {
    uint64_t done, least;  // least: the fewest that the request's bytes could take
};
struct SiteCount {
    Passes sectors, wavefronts;  // of global memory, 32 bytes; of shared memory, 128 bytes
    uint64_t bulk_bytes, polls;  // polls: waits on an mbarrier that had to be repeated
};
struct Processor {  // a host thread's
    const Request& request;
    const Kernel& kernel;
    std::vector<char> memory;  // of the parameters
    char* params;
    size_t params_size;
    std::mt19937_64 rng;
    uint64_t events = 0;  // whatever another warp may wait for
    std::vector<uint64_t> block_runs, block_lanes;
    std::vector<SiteCount> sites;
    uint64_t macs[5] = {};
    Footprint reads, writes;
    bool dependents = false;  // the next kernel may start before this one has ended
    bool early = false;       // and before it has waited
    bool waits = false;       // a warp has executed griddepcontrol.wait
    bool counting() const { return !sites.empty(); }
    bool checks(Checks c) const { return request.checks & c; }
};

struct MBarrier {  // eight bytes of shared memory
    uint64_t phase : 1, expected : 20, pending : 20, mark : 2;
    int64_t bytes : 21;
};
static_assert(sizeof(MBarrier) == 8);

// ---- messages
std::string hex(uint64_t);
std::string name_of(const Block&);
std::string describe(const Warp&);
std::string at(const Warp&, int site);
[[noreturn]] void fault(const Warp&, int site, const std::string& why);
inline std::string lane_name(int lane) { return "lane " + std::to_string(lane); }

// ---- memory.cpp
char* resolve(Warp&, int site, Space, uint64_t p, size_t n, int lane);
void check_bounds(Warp&, int site, uint64_t p, size_t n, int lane);
Block* shared_block(Warp&, int site, Space, uint64_t p, uint64_t& offset);  // whose shared memory p is in, or null
void count(Warp&, int site, Space, const uint64_t* p, const int* lane, int lanes, int size);
void need_whole_warp(Warp&, int site, uint32_t mask);
void need_members(Warp&, int site, const U32& members, uint32_t mask);

// ---- races.cpp
enum Access { kOneLane, kAllLanes, kUnit, kTensor };  // TMA and wgmma, through the asynchronous proxy
int tensor_core(const Warp&);                         // the agent
void release(Warp&, Clock&);
void acquire(Warp&, const Clock&);
void meet(Warp&);  // the warp's lanes execute an instruction together: none writes before another has read
void sync(Warp&);  // and see each other's writes
void check_read(Warp&, int site, Block&, uint64_t p, size_t n, int lane, Access, const Seen&);
void check_write(Warp&, int site, Block&, uint64_t p, size_t n, int lane, Kind);
void check_same_write(Warp&, Block&, uint64_t p, size_t n, int lane);  // of what memory holds already
void stamp(Warp&, Block&, uint64_t p, size_t n, int lane, Kind);
void stamp_copied(Block& to, uint64_t p, size_t n, int agent, uint32_t time);
void global_access(Warp&, int site, uint64_t p, size_t n, int lane, Order, bool reads, bool writes, bool waited);
void begin_stream(const Request&);
void end_stream(const Request&, const Processor&);

// ---- barriers.cpp
void open_if_complete(Block&, int barrier);
void open_if_complete(Company&, int cluster);
void count_bytes(Block&, uint64_t barrier, int64_t bytes, int agent, uint32_t time);  // complete_tx
void check_mbarrier(Warp&, int site, Block&, uint64_t at, int lane);
void deliver(Block&, size_t transfer);
const float* fp8_values(bool e5m2);

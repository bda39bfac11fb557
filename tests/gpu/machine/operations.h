// What the translated instructions call: memory, collectives of a warp, barriers and asynchronous units of the machine.
// An instruction is a function over a warp's registers. `mask` has a bit for each lane that executes it; `site` is its
// number in the kernel's table of sites, for messages and counters.
#pragma once
#include <cstddef>

#include "lanes.h"

struct Warp;
// s: operands, as offsets into the registers or as numbers; wide_mask: the mask as a Pred
typedef void (*Operation)(Warp&, char* registers, const int64_t* s, uint32_t mask, const int32_t* wide_mask);
struct Instruction {
    Operation run;
    const int64_t* operands;
};
struct BasicBlock {
    int first, count, line;
    int next, target;        // where lanes go: those for which the predicate holds to the target
    int predicate, negated;  // the predicate's offset; -1: all lanes go to next
};
struct Site {
    int line;          // of the PTX
    const char* text;  // of the instruction
    const char* source;
    int bytes;  // to be counted, where that is not what a lane accesses; -1: it is
};
struct Kernel {
    const char* name;
    int blocks, sites;
    const BasicBlock* block;
    const Instruction* code;
    const Site* site;
    size_t registers, params, shared, local;  // bytes: of a warp's registers, parameters, static shared, local memory
    int pool;                                 // registers of a block's threads together, which setmaxnreg divides anew
};

struct Special {  // registers, by lane or the same for all
    U32 tid[3], lane;
    uint32_t ctaid[3], ntid[3], nctaid[3], warp, rank, cluster_ctaid[3], cluster_nctaid[3];
};
struct WarpBase {  // what instructions see of a Warp
    Special sr;
    char *params, *local;  // local memory of lane 0; that of others follows, `local_size` bytes apart
    size_t local_size;
    uint32_t barrier_result, wgmma_fences;
};
IN WarpBase& base(Warp& w) { return reinterpret_cast<WarpBase&>(w); }
constexpr int kExit = 1 << 30;
[[noreturn]] void trap(Warp&, int site, const char* why);

// ---- registers that need care. Operands: site, guard (-1: none), whether it is negated, then places in the registers
constexpr uint32_t kInFlight = ~1u;  // a mark: a wgmma still reads or writes the register; ~0u: it is fresh;
                                     // else the number of wgmma.fences that came before its last use by others
IN uint32_t guarded(const char* registers, const int64_t* s, uint32_t mask) {
    return s[1] < 0 ? mask : mask & (bits(*(const Pred*)(registers + s[1])) ^ (s[2] ? ~0u : 0));
}
void touch(Warp&, char* registers, const int64_t* s,
           uint32_t mask);  // places: of a mark, and whether it may be in flight
void note_written(char* registers, const int64_t* s, uint32_t mask);         // places: of the lanes not yet written
void need_written(Warp&, char* registers, const int64_t* s, uint32_t mask);  // the same

// ---- memory (ISA 9.7.9). Shared addresses: bits 24 and up hold 1 + the rank of a block of the cluster, or 0: its own
enum Space { kGlobal, kShared, kGeneric, kParam, kLocal, kConstant };
enum Order { kPlain, kRelaxed, kAcquire, kRelease, kBoth, kNonCoherent };
enum Atomic { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };
// T as it lies in memory, R a lane of a register
template <class T, class R> void load(Warp&, int site, Space, Order, const U64& at, uint32_t mask, int n, R* const* to);
template <class T, class R> void store(Warp&, int site, Space, Order, const U64& at, uint32_t mask, int n,
                                       const R* const*);
template <class T> void atomic(Warp&, int site, Space, Order, Atomic, const U64& at, uint32_t mask, const void* a,
                               const void* b, void* old);
void fence(Warp&, int site, uint32_t mask);  // orders this warp's accesses for other blocks
U64 to_shared(Warp&, const U64& generic);
U64 to_generic(Warp&, const U64& shared);
U64 map_shared(Warp&, const U64& shared, const U32& rank, bool generic);
void copy_async(Warp&, int site, const U64& to, const U64& from, int bytes, const U32& real, uint32_t mask);
void copy_commit(Warp&, int site, uint32_t mask);
void copy_wait(Warp&, int site, int left, uint32_t mask);
void copy_arrive(Warp&, int site, const U64& barrier, uint32_t mask);
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
template <class T> uint32_t reduce(Warp&, int site, Atomic, const U32&, const U32& members, uint32_t mask);
uint32_t elect(Warp&, int site, const U32& members, uint32_t mask);
void set_registers(Warp&, int site, int count, bool more, uint32_t mask);
void launch_dependents(Warp&);
void wait_for_previous(Warp&);
void nap(Warp&, int site);

// ---- barriers (ISA 9.7.13)
void barrier(Warp&, int site, const U32& id, const U32& threads, bool waits, uint32_t mask, const Pred* vote);
void cluster_arrive(Warp&, int site, bool releases, uint32_t mask);
void cluster_wait(Warp&, int site, bool acquires, uint32_t mask);
void mbarrier_init(Warp&, int site, const U64& at, const U32& count, uint32_t mask);
void mbarrier_inval(Warp&, int site, const U64& at, uint32_t mask);
U64 mbarrier_arrive(Warp&, int site, Space, Order, const U64& at, const U32& count, const U32& bytes, bool drop,
                    uint32_t mask);
void mbarrier_expect(Warp&, int site, Space, const U64& at, const U32& bytes, uint32_t mask);
Pred mbarrier_try(Warp&, int site, Space, Order, const U64& at, const U32& parity, uint32_t mask);
void proxy_fence(Warp&, uint32_t mask);

// ---- bulk copies and tensor maps (ISA 5.5, 9.7.9.25, 9.7.9.28)
void tma_load(Warp&, int site, const U64& to, const U64& map, int n, const U32* at, const U64& barrier,
              const U32* ranks, uint32_t mask);
void tma_store(Warp&, int site, const U64& map, int n, const U32* at, const U64& from, uint32_t mask);
void store_async(Warp&, int site, const U64& at, int n, int bytes, const U64* values, const U64& barrier,
                 uint32_t mask);
void bulk_commit(Warp&, uint32_t mask);
void bulk_wait(Warp&, int left, uint32_t mask);
void map_replace(Warp&, int site, Space, const U64& at, int field, int which, const U64& value, uint32_t mask);
void map_copy(Warp&, int site, const U64& to, const U64& from, uint32_t mask);
void map_acquire(Warp&, int site, const U64& at, uint32_t mask);

// ---- tensor cores (ISA 9.7.14, 9.7.15)
enum Element { kE4m3, kE5m2, kBf16, kF16 };
void mma(Warp&, int site, int k, Element a, Element b, U32* const* d, const U32* const* ra, const U32* const* rb,
         const U32* const* c, uint32_t mask);
struct ProductForm {
    int n, k;
    Element a, b;
    bool transposed_a, transposed_b;
    int sign;
};
// marks: of the registers d and a, in this order
void wgmma(Warp&, int site, ProductForm, U32* const* d, const U32* const* ra, const U64& da, const U64& db,
           const Pred& accumulate, uint32_t* const* marks, uint32_t mask);
void wgmma_commit(Warp&, int site, uint32_t mask);
void wgmma_wait(Warp&, int site, int left, uint32_t mask);
void wgmma_fence(Warp&, int site, uint32_t mask);

// A barrier of all blocks of a cooperative launch, and a count of blocks that wait for nobody.
#pragma once
#include "common.cuh"

namespace ling {

// The counter is one unsigned in global memory, zero before its first use and not reset afterwards: each barrier flips
// bit 31 and leaves the other bits zero, for any grid size. So successive launches, and replays of a CUDA graph, may
// share a counter, but must not overlap: a kernel launched with kOverlaps first waits for the preceding one. All
// threads of all blocks call these functions, in the same order. Read results of other blocks by plain loads, not
// through const __restrict__ pointers (they may use the non-coherent cache) and not by TMA.
__device__ inline unsigned add_release(unsigned* p, unsigned v) {
    unsigned old;
    asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}
__device__ inline void wait_for_flip(const unsigned* p, unsigned old) {
    unsigned now;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(p) : "memory");
    while (!((now ^ old) >> 31));
}

// Writes of this block before the call are visible to every block after its grid_wait. Between the two calls a block
// can do work that needs no other block, such as prefetching. The block's first thread returns the token for grid_wait.
__device__ inline unsigned grid_arrive(unsigned* counter) {
    __syncthreads();
    unsigned old = 0;
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) {
        const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
        const bool first = blockIdx.x + blockIdx.y + blockIdx.z == 0;  // all shares add up to 2^31
        old = add_release(counter, first ? 0x80000000u - (blocks - 1) : 1);
    }
    return old;
}

__device__ inline void grid_wait(const unsigned* counter, unsigned old) {
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) wait_for_flip(counter, old);
    __syncthreads();
}

__device__ inline void grid_barrier(unsigned* counter) { grid_wait(counter, grid_arrive(counter)); }

// Whether this block is the last of `blocks` that call this with the same counter, which begins and ends at 0. Writes
// of the other blocks before their calls are visible to all threads of the last one; read them by plain loads. Called
// by a whole block.
__device__ inline bool is_last(unsigned* counter, unsigned blocks) {
    __syncthreads();
    unsigned before = blocks - 1;
    if (threadIdx.x == 0 && blocks > 1)  // wraps to 0 after blocks - 1
        asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;"
                     : "=r"(before)
                     : "l"(counter), "r"(blocks - 1)
                     : "memory");
    return __syncthreads_and(before == blocks - 1);
}

}  // namespace ling

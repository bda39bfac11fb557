// Pairs of blocks: clusters of two, whose blocks load into each other's shared memory.
#pragma once
#include "cluster.cuh"
#include "sm90.cuh"

namespace ling::gemm_fp8 {

// Arrive at the same barrier of block 0 or 1 of the pair. The release has the scope of a block, as in CUTLASS: what
// must come before are reads, which are complete. One of a cluster would first wait for all of the warp's stores of
// results.
__device__ inline void arrive_at(Barrier& barrier, unsigned block) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(&barrier)),
        "r"(block)
        : "memory");
}

// load_tile into both blocks, which count the bytes at a barrier each
__device__ inline void load_tile_to_both(void* to, const TensorMap& map, Barrier& barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier)), "h"(uint16_t{3})
        : "memory");
}

}  // namespace ling::gemm_fp8

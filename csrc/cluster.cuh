// Blocks of a cluster: their barrier, and each other's shared memory.
#pragma once
#include <cooperative_groups.h>

#include "common.cuh"

namespace ling {

__device__ inline unsigned cluster_rank() { return cooperative_groups::cluster_group::block_rank(); }

// What threads of the cluster wrote before it, to shared memory too, all see after it.
__device__ inline void cluster_barrier() { cooperative_groups::cluster_group::sync(); }

// Block r's copy of the shared variable that p points to. A block must not end before others have read its memory.
template <typename T> __device__ T* of_block(T* p, unsigned r) {
    return cooperative_groups::cluster_group::map_shared_rank(p, r);
}

}  // namespace ling

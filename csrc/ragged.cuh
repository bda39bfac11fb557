// Tiles of ragged groups (experts, sequences), whose sizes only the device knows.
#pragma once
#include "common.cuh"

namespace ling {

// Writes before[g] = the number of tiles of groups 0 .. g - 1, for g <= n, to shared memory; tiles_of(g) is called once
// for each group. The whole block calls this and is synchronised afterwards; sums holds an int per warp.
template <typename F> __device__ void count_tiles(int* before, int* sums, int n, F&& tiles_of) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    int passed = 0;
    for (int base = 0; base < n; base += blockDim.x) {
        const int g = base + threadIdx.x, tiles = g < n ? tiles_of(g) : 0;
        int sum = tiles;
        for (int d = 1; d < 32; d *= 2) {
            const int lower = __shfl_up_sync(~0u, sum, d);
            sum += lane >= d ? lower : 0;
        }
        if (lane == 31) sums[warp] = sum;
        __syncthreads();
        int earlier = passed + sum - tiles;
        for (int w = 0; w < warps; w++) {
            earlier += w < warp ? sums[w] : 0;
            passed += sums[w];
        }
        if (g < n) before[g] = earlier;
        __syncthreads();
    }
    if (threadIdx.x == 0) before[n] = passed;
    __syncthreads();
}

// The group that owns a tile below before[n]; empty groups own none. The whole warp calls this.
__device__ inline int find_group(const int* before, int n, int tile) {
    const int lane = threadIdx.x % 32, step = ceil_div(n, 32);
    const int first = (__popc(__ballot_sync(~0u, lane * step < n && before[lane * step] <= tile)) - 1) * step;
    int g = first;
    for (int i = lane; i - lane < step; i += 32)
        g += __popc(__ballot_sync(~0u, i < step && first + i < n && before[first + i] <= tile));
    return g - 1;
}

}  // namespace ling

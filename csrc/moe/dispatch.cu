#include "moe/dispatch.h"
#include "common.cuh"

namespace ling {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps, kMaxTiles = 128, kPad = 128;

// Count how often each expert occurs in a tile of slots; one block per tile.
__global__ void __launch_bounds__(kThreads)
    dispatch_count_kernel(const int* experts, int* before, int S, int E, int tile) {
    int* found = dynamic_shared<int>();
    launch_dependents();
    for (int e = threadIdx.x; e < E; e += kThreads) found[e] = 0;
    __syncthreads();
    const int first = blockIdx.x * tile, last = min(first + tile, S);
    for (int i = first + threadIdx.x; i < last; i += kThreads) {
        LING_DEVICE_CHECK(experts[i] < E);
        if (experts[i] >= 0) atomicAdd(found + experts[i], 1);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += kThreads) before[int64_t{E} * blockIdx.x + e] = found[e];
}

// The inclusive prefix sum of v over the threads of the block
__device__ int inclusive_sum(int v) {
    __shared__ int totals[kWarps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int d = 1; d < 32; d *= 2) {
        const int lower = __shfl_up_sync(~0u, v, d);
        if (lane >= d) v += lower;
    }
    if (lane == 31) totals[warp] = v;
    __syncthreads();
    for (int w = 0; w < warp; w++) v += totals[w];
    __syncthreads();
    return v;
}

// One block per tile, with a warp for each of its 16 runs of slots. A slot's row is the number of slots of lower
// experts, plus its expert's slots in earlier tiles (each block sums them itself), earlier warps, steps and lanes.
__global__ void __launch_bounds__(kThreads)
    dispatch_place_kernel(const int* experts, const int* counts, const int* before, int* offsets, int* slot,
                          int* source, int* padded_offsets, int S, int E, int tile) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, bins = E + 1;  // the last one: unrouted slots
    int* next = dynamic_shared<int>();                                         // [bins]
    int* found = next + bins;                                                  // [kWarps][bins]
    int* warp_found = found + warp * bins;
    const int run = tile / kWarps, first = blockIdx.x * tile + warp * run, last = min(first + run, S);
    const auto bin = [&](int i) { return experts[i] < 0 ? E : experts[i]; };

    const int e = threadIdx.x, count = e < E ? counts[e] : 0;
    const int end = inclusive_sum(count), padded_end = inclusive_sum((count + kPad - 1) / kPad * kPad);
    if (e < E) next[e] = end - count;
    // Unrouted slots follow the routed ones. Unrouted slots before this tile = its first slot - routed slots before it;
    // the loop over earlier tiles subtracts the latter.
    if (e == max(E, 1) - 1) next[E] = end + blockIdx.x * tile;
    if (blockIdx.x == 0) {
        if (e == 0) offsets[0] = padded_offsets[0] = 0;
        if (e < E) offsets[e + 1] = end, padded_offsets[e + 1] = padded_end;
    }
    for (int i = threadIdx.x; i < kWarps * bins; i += kThreads) found[i] = 0;
    __syncthreads();

    for (int i = first + lane; i < last; i += 32) atomicAdd(warp_found + bin(i), 1);
    wait_for_previous();  // for `before`; the other inputs are older than the counting kernel
    for (int c = lane; c - lane < E && blockIdx.x > 0; c += 32) {
        int sum = 0;
        if (c < E)
#pragma unroll 8
            for (int b = warp; b < static_cast<int>(blockIdx.x); b += kWarps) sum += before[int64_t{E} * b + c];
        if (sum) atomicAdd(next + c, sum);
        const int routed = __reduce_add_sync(~0u, sum);
        if (lane == 0 && routed) atomicAdd(next + E, -routed);
    }
    __syncthreads();

    for (int c = threadIdx.x; c < bins; c += kThreads)
        for (int w = 0, row = next[c]; w < kWarps; w++) {
            const int n = found[w * bins + c];
            found[w * bins + c] = row, row += n;
        }
    __syncthreads();

    for (int i = first + lane; i - lane < last; i += 32) {
        const int b = i < last ? bin(i) : -1;
        const unsigned same = __match_any_sync(~0u, b);
        const int rank = __popc(same & ((1u << lane) - 1)), row = b < 0 ? 0 : warp_found[b] + rank;
        __syncwarp();
        if (b >= 0) {
            if (rank == 0) warp_found[b] = row + __popc(same);
            slot[i] = b < E ? row : -1;
            LING_DEVICE_CHECK(row < S);
            if (row < S) source[row] = i;  // wrong counts must not cause writes out of bounds
        }
        __syncwarp();
    }
}

}  // namespace

void dispatch_fwd(cudaStream_t stream, Tensor experts, Tensor counts, Tensor before, Tensor offsets, Tensor slot,
                  Tensor source, Tensor padded_offsets) {
    const int64_t T = experts.shape[0], topk = experts.shape[1], S = T * topk, E = counts.shape[0];
    LING_CHECK(experts.is(DType::i32, {T, topk}) && experts.contiguous() && S < 1 << 30);
    LING_CHECK(counts.is(DType::i32, {E}) && counts.contiguous() && E <= kThreads);
    LING_CHECK(!before.ndim || (before.is(DType::i32, {before.shape[0], E}) && before.contiguous()));
    LING_CHECK(offsets.is(DType::i32, {E + 1}) && offsets.contiguous());
    LING_CHECK(padded_offsets.is(DType::i32, {E + 1}) && padded_offsets.contiguous());
    LING_CHECK(slot.is(DType::i32, {T, topk}) && slot.contiguous() && source.is(DType::i32, {S}));
    LING_CHECK(source.contiguous());
    const int most = before.ndim ? std::clamp<int64_t>(before.shape[0], 1, kMaxTiles) : 1;
    const int tile = ceil_div<int>(ceil_div<int64_t>(S, most), kThreads) * kThreads;
    const int tiles = S ? ceil_div<int>(S, tile) : 1;
    const size_t smem = (kWarps + 1) * (E + 1) * sizeof(int);
    const auto place = [&]<unsigned flags>() {
        launch<dispatch_place_kernel, flags>(tiles, kThreads, smem, stream, experts.ptr<int>(), counts.ptr<int>(),
                                             before.ptr<int>(), offsets.ptr<int>(), slot.ptr<int>(), source.ptr<int>(),
                                             padded_offsets.ptr<int>(), static_cast<int>(S), static_cast<int>(E), tile);
    };
    if (tiles == 1) return place.operator()<0>();
    launch<dispatch_count_kernel>(tiles, kThreads, E * sizeof(int), stream, experts.ptr<int>(), before.ptr<int>(),
                                  static_cast<int>(S), static_cast<int>(E), tile);
    place.operator()<kOverlaps>();
}

}  // namespace ling

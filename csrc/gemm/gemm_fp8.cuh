// The FP8 GEMM of Hopper: tokens [M, K] times weights [N, K]^T, ragged by groups. docs/kernels.md draws it.
//
// A persistent block has one producer warpgroup, which loads, and two consumer warpgroups, which multiply. A ring of
// stages connects them; a stage holds 128 of K of a tile's operands and scales. Each consumer owns 64 rows of the tile:
// it multiplies 128 of K on the tensor cores, scales the product, adds it in fp32, and writes its rows by itself. So
// the scaling and writing of one consumer overlap with the products of the other, and the producer runs ahead into the
// next tile.
#pragma once
#include "gemm/load.cuh"
#include "gemm/store.cuh"

namespace ling::gemm_fp8 {

// Of 64 weights of a transposed tile, 128 lines of K, the A fragments of 4 products of 32 of K: a warp has 16 of its
// columns, the 16 bytes `chunk` of each line. ldmatrix moves pairs of bytes, so a lane gets 2 columns of them, and
// byte_perm parts these: the upper row of its results and the lower, kBelow = 1. A lane of the right half takes the
// lines of K in another order, since lines 8 apart lie in the same banks.
__device__ inline void load_fragments(unsigned (&a)[4][4], const uint8_t* weights, int chunk) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, i = lane % 8;
    const int k = matrix / 2 * 16 + i / 2 * 4 + i % 2 + ((matrix % 2 == 1) != (i >= 4) ? 2 : 0);
    const unsigned even = lane % 4 < 2 ? 0x6420 : 0x2064, odd = even + 0x1111;
#pragma unroll
    for (int step = 0; step < 4; step++) {
        unsigned r[4];
        load_transposed(r, weights + swizzled(k, chunk) + step * 32 * 128);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            a[step][2 * j] = __byte_perm(r[2 * j], r[2 * j + 1], even);
            a[step][2 * j + 1] = __byte_perm(r[2 * j], r[2 * j + 1], odd);
        }
    }
}

// The A fragments of a stage's 64 tokens for the same 4 products; a warp has 16 of them.
__device__ inline void load_rows(unsigned (&a)[4][4], const uint8_t* tokens) {
    const int lane = threadIdx.x % 32, line = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < 4; step++) load_matrices(a[step], tokens + swizzled(line, 2 * step + lane / 16));
}

// sum[h] += the products of one stage with their scales. Scales are read while a product runs, as many as there are
// registers for, so that the stage is free when its last product is complete.
template <typename V>
__device__ void multiply(Shared<V>& s, const Problem& p, const Tile& t, int stage, bool busy, bool all_halves,
                         float (&sum)[V::kHalves][V::kRegs]) {
    constexpr bool kColumns = V::kSwap || V::kRowScales;  // a scale for each of the product's columns
    // Column scales that are read before the product is complete; the others follow at once, or one by one (kLate).
    constexpr bool kLate = V::kTransposed && V::kRegs == 64;
    constexpr int kEarly = kLate ? 0 : V::kRowScales ? V::kRegs / 4 : V::kRegs / 2;
    if (!busy) return free_stage(s, p, t, stage);
    const Place<V> place;
    const float* x_scale = s.a_scale[stage];
    const float upper = x_scale[V::kSwap ? 0 : 64 * place.warpgroup + place.row];
    const float lower = x_scale[V::kSwap ? 0 : 64 * place.warpgroup + place.row + 8];
    unsigned fragments[4][4];
    if constexpr (V::kTokenFragments) load_rows(fragments, s.a[stage] + 64 * 128 * place.warpgroup);
#pragma unroll
    for (int h = 0; h < V::kHalves; h++) {
        if (h && !all_halves) break;
        const uint8_t* x = s.a[stage] + (V::kSwap ? 0 : 64 * 128 * place.warpgroup);
        const uint8_t* const tile = s.b[stage] + 128 * 128 * h;
        const uint8_t* w = tile + (V::kSwap ? 64 * 128 * place.warpgroup : 0);
        const float w_scale = V::kRowScales ? 1 : s.b_scale[stage][h];
        const float* from = (V::kSwap ? x_scale : s.b_scale[stage] + 128 * h) + place.column;
        float column_scale[V::kRegs / 2];
        const auto read_scales = [&](int begin, int end) {
#pragma unroll
            for (int i = begin; kColumns && i < end; i++) column_scale[i] = from[i / 2 * 8 + i % 2];
        };
        read_scales(0, kEarly);
        float part[V::kRegs];
        const uint64_t first = operand(V::kSwap ? w : x), second = operand(V::kSwap ? x : w);
        if constexpr (V::kTransposed) load_fragments(fragments, tile, threadIdx.x / 32);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if constexpr (V::kTransposed || V::kTokenFragments)
                wgmma_fp8_registers(part, fragments[k], second + 2 * k, k > 0);
            else wgmma_fp8(part, first + 2 * k, second + 2 * k, k > 0);
        }
        wgmma_commit();
        wgmma_wait<0>(part);
        const bool last = h + 1 == V::kHalves || !all_halves;
        if (!kLate) read_scales(kEarly, V::kRegs / 2), free_stage(s, p, t, stage, last);
#pragma unroll
        for (int i = 0; i < V::kRegs / 2; i++) {
            const int j = i / 2 * 4 + i % 2;  // the column's upper row; j + 2: the lower one
            if (kLate && i % 2 == 0) read_scales(i, i + 2);
            const float scale = V::kSwap ? column_scale[i] * w_scale : V::kRowScales ? column_scale[i] : w_scale;
            sum[h][j] += part[j] * (V::kSwap ? scale : upper * scale);
            sum[h][j + 2] += part[j + 2] * (V::kSwap ? scale : lower * scale);
        }
        if (kLate) free_stage(s, p, t, stage, last);
    }
}

// The next tile, from the stage in which it begins
template <typename V> __device__ bool next_tile(Shared<V>& s, const Ring<V::kStages>& ring, Tile& t) {
    s.full[ring.stage].wait(ring.parity);
    t = s.tile[ring.stage];
    return t.rows > 0;
}

template <typename V> __device__ void multiply_tiles(Shared<V>& s, const Problem& p) {
    const int warpgroup = threadIdx.x / 128;
    Ring<V::kStages> ring;
    Tile t;
    // Warpgroup 1 begins when the second stage has arrived and stays behind from then on, so that one writes its tile
    // while the other multiplies. A block with a tile has a second stage: another step, or the end.
    if ((!V::kSwap || V::kTransposed) && warpgroup == 1 && next_tile(s, ring, t)) s.full[1].wait(0);
    while (next_tile(s, ring, t)) {
        const bool busy = V::kSwap || 64 * warpgroup < t.rows;  // otherwise no row of the warpgroup is in the group
        const bool all_halves = V::kSwiglu || V::kHalves == 1 || t.n + 128 < p.N;
        float sum[V::kHalves][V::kRegs] = {};
        for (int units_left = t.k_units; units_left > 0; units_left--, ring.next()) {
            s.full[ring.stage].wait(ring.parity);
            multiply(s, p, t, ring.stage, busy, all_halves, sum);
        }
        if (V::kWgrad && !t.k_units) free_stage(s, p, t, ring.stage), ring.next();
        if (busy) finish(s, p, t, sum);
    }
}

// Set up the barriers and the table of tiles.
template <typename V> __device__ Shared<V>& begin(const Problem& p) {
    Shared<V>& s = *dynamic_shared<Shared<V>>();
    if (threadIdx.x == 0) {
        check_swizzle_base(&s);
        for (int i = 0; i < V::kStages; i++) {
            s.full[i].init(V::kGather ? 128 + 1 : 2);
            s.empty[i].init(kConsumers / 32 * (1 + p.pairs));
        }
        publish_barriers();
    }
    if (threadIdx.x == kConsumers) {
        if (!V::kGather) prefetch_map(p.a);
        prefetch_map(p.b);
    }
    __syncthreads();
    if (V::kPairs && p.pairs) cluster_barrier();
    count_group_tiles(s, p);
    return s;
}

// A block of a pair stays until the other one no longer arrives at its barriers.
template <typename V> __device__ void end(const Problem& p) {
    if (V::kPairs && p.pairs) cluster_barrier();
}

template <typename V>
__global__ void __launch_bounds__(kThreads, 1) gemm_fp8_kernel(const __grid_constant__ Problem p) {
    Shared<V>& s = begin<V>(p);
    if (threadIdx.x >= kConsumers) {
        fewer_registers<V::kGather ? 72 : 40>();
        if constexpr (V::kGather) load_gathered(s, p);
        else if (threadIdx.x < kConsumers + 32) load_tiles(s, p);
    } else {
        more_registers<V::kGather ? 216 : 232>();
        multiply_tiles(s, p);
    }
    end<V>(p);
}

}  // namespace ling::gemm_fp8

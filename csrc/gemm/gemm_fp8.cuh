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

// sum[h] += the products of one stage with their scales. Scales are read while a product runs, as many as there are
// registers for, so that the stage is free when its last product is complete.
template <typename V>
__device__ void multiply(Shared<V>& s, const Problem& p, const Tile& t, int stage, bool busy, bool all_halves,
                         float (&sum)[V::kHalves][V::kRegs]) {
    constexpr bool kColumns = V::kSwap || V::kRowScales;  // a scale for each of the product's columns
    constexpr int kEarly = V::kRowScales ? V::kRegs / 4 : V::kRegs / 2;
    if (!busy) return free_stage(s, p, t, stage);
    const Place place;
    const float* x_scale = s.a_scale[stage];
    const float upper = x_scale[V::kSwap ? 0 : 64 * place.warpgroup + place.row];
    const float lower = x_scale[V::kSwap ? 0 : 64 * place.warpgroup + place.row + 8];
#pragma unroll
    for (int h = 0; h < V::kHalves; h++) {
        if (h && !all_halves) break;
        const uint8_t* x = s.a[stage] + (V::kSwap ? 0 : 64 * 128 * place.warpgroup);
        const uint8_t* w = s.b[stage] + 128 * 128 * h + (V::kSwap ? 64 * 128 * place.warpgroup : 0);
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
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma_fp8(part, first + 2 * k, second + 2 * k, k > 0);
        wgmma_commit();
        wgmma_wait<0>(part);
        read_scales(kEarly, V::kRegs / 2);
        free_stage(s, p, t, stage, h + 1 == V::kHalves || !all_halves);
#pragma unroll
        for (int i = 0; i < V::kRegs / 2; i++) {
            const int j = i / 2 * 4 + i % 2;  // the column's upper row; j + 2: the lower one
            const float scale = V::kSwap ? column_scale[i] * w_scale : V::kRowScales ? column_scale[i] : w_scale;
            sum[h][j] += part[j] * (V::kSwap ? scale : upper * scale);
            sum[h][j + 2] += part[j + 2] * (V::kSwap ? scale : lower * scale);
        }
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
    if (!V::kSwap && warpgroup == 1 && next_tile(s, ring, t)) s.full[1].wait(0);
    while (next_tile(s, ring, t)) {
        const bool busy = V::kSwap || 64 * warpgroup < t.rows;  // otherwise no row of the warpgroup is in the group
        const bool all_halves = V::kSwiglu || V::kHalves == 1 || t.n + 128 < p.N;
        float sum[V::kHalves][V::kRegs] = {};
        for (int units_left = t.k_units; units_left > 0; units_left--, ring.next()) {
            s.full[ring.stage].wait(ring.parity);
            multiply(s, p, t, ring.stage, busy, all_halves, sum);
        }
        if (V::kWgrad && !t.k_units) free_stage(s, p, t, ring.stage), ring.next();
        if (!busy) continue;
        if constexpr (!V::kSwiglu) {
            if (p.fp32) finish_in_place<V, float>(p, t, sum);
            else if (p.accumulate) finish_in_place<V, bf16>(p, t, sum);
        }
        if (V::kSwiglu || !p.fp32) {
            if constexpr (V::kSwap) write_columns(s, p, t, sum);
            else write_rows(s, p, t, sum);
        }
    }
}

// Set up the barriers and the table of tiles.
template <typename V> __device__ Shared<V>& begin(const Problem& p) {
    Shared<V>& s = *dynamic_shared<Shared<V>>();
    if (threadIdx.x == 0) {
        check_swizzle_base(&s);
        for (int i = 0; i < V::kStages; i++) {
            s.full[i].init(V::kGather || V::kTransposed ? 128 + 1 : 2);
            if (V::kTransposed) s.raw[i].init(1);
            s.empty[i].init(kConsumers / 32 * (1 + p.pairs));
        }
        publish_barriers();
    }
    if (threadIdx.x == kConsumers) {
        if (!V::kGather) prefetch_map(p.a);
        prefetch_map(p.b);
    }
    __syncthreads();
    if (V::kPairs && p.pairs) pair_barrier();
    count_group_tiles(s, p);
    return s;
}

// A block of a pair stays until the other one no longer arrives at its barriers.
template <typename V> __device__ void end(const Problem& p) {
    if (V::kPairs && p.pairs) pair_barrier();
}

template <typename V>
__global__ void __launch_bounds__(kThreads, 1) gemm_fp8_kernel(const __grid_constant__ Problem p) {
    Shared<V>& s = begin<V>(p);
    if (threadIdx.x >= kConsumers) {
        fewer_registers<V::kTransposed || V::kGather ? 72 : 40>();
        if constexpr (V::kGather) load_gathered(s, p);
        else if constexpr (V::kTransposed) load_and_transpose(s, p);
        else if (threadIdx.x < kConsumers + 32) load_tiles(s, p);
    } else {
        more_registers<V::kTransposed || V::kGather ? 216 : 232>();
        multiply_tiles(s, p);
    }
    end<V>(p);
}

}  // namespace ling::gemm_fp8

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

// sum[h] += the products of one stage with their scales
template <typename V>
__device__ void multiply(Shared<V>& s, int stage, const float (&w_scale)[V::kHalves], bool busy, int halves,
                         float (&sum)[V::kHalves][V::kRegs]) {
    const Place place;
    const float* x_scale = s.a_scale[stage];
    const float upper = x_scale[V::kSwap ? 0 : 64 * place.warpgroup + place.row];
    const float lower = x_scale[V::kSwap ? 0 : 64 * place.warpgroup + place.row + 8];
#pragma unroll
    for (int h = 0; h < V::kHalves; h++) {
        if (!busy || h >= halves) break;
        const uint8_t* x = s.a[stage] + (V::kSwap ? 0 : 64 * 128 * place.warpgroup);
        const uint8_t* w = s.b[stage] + 128 * 128 * h + (V::kSwap ? 64 * 128 * place.warpgroup : 0);
        float part[V::kRegs];
        const uint64_t first = operand(V::kSwap ? w : x), second = operand(V::kSwap ? x : w);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma_fp8(part, first + 2 * k, second + 2 * k, k > 0);
        wgmma_commit();
        wgmma_wait<0>(part);
#pragma unroll
        for (int j = 0; j < V::kRegs / 4; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int column = 8 * j + place.column + c;
                if (V::kSwap) {
                    const float scale = x_scale[column] * w_scale[h];
                    sum[h][4 * j + c] += part[4 * j + c] * scale;
                    sum[h][4 * j + 2 + c] += part[4 * j + 2 + c] * scale;
                } else {
                    const float scale = V::kRowScales ? s.b_scale[stage][128 * h + column] : w_scale[h];
                    sum[h][4 * j + c] += part[4 * j + c] * (upper * scale);
                    sum[h][4 * j + 2 + c] += part[4 * j + 2 + c] * (lower * scale);
                }
            }
    }
    release(s.empty[stage]);
}

template <typename V> __device__ void multiply_tiles(Shared<V>& s, const Problem& p) {
    const int warpgroup = threadIdx.x / 128;
    Ring<V::kStages> ring;
    Tile t;
    for (int tile = blockIdx.x; find_tile(s, p, tile, t); tile += gridDim.x) {
        const bool busy = V::kSwap || 64 * warpgroup < t.rows;  // otherwise no row of the warpgroup is in the group
        const int halves = V::kSwiglu ? 2 : min(V::kHalves, ceil_div(p.N - t.n, 128));
        float sum[V::kHalves][V::kRegs] = {};
        float w_scale[V::kHalves] = {}, next[V::kHalves] = {};
        int scale = t.group * p.weight_scale_g + t.n / 128 * p.weight_scale_n;
        const int up = (V::kSwiglu ? p.N / 256 : 1) * p.weight_scale_n;
        const auto load_scales = [&](bool any) {  // one step ahead, to hide the latency
#pragma unroll
            for (int h = 0; h < V::kHalves; h++) {
                w_scale[h] = next[h];
                if (!V::kRowScales && h < halves && any) next[h] = __ldg(p.weight_scale + scale + h * up);
            }
            scale += p.weight_scale_k;
        };
        load_scales(t.k_units > 0);
        for (int units_left = t.k_units; units_left > 0; units_left--, ring.next()) {
            load_scales(units_left > 1);
            s.full[ring.stage].wait(ring.parity);
            multiply(s, ring.stage, w_scale, busy, halves, sum);
        }
        if (!busy || (V::kWgrad && p.accumulate && !t.k_units)) continue;
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
        for (int i = 0; i < V::kStages; i++) {
            s.full[i].init(V::kGather || V::kTransposed ? 128 + 1 : 1);
            if (V::kTransposed) s.raw[i].init(1);
            s.empty[i].init(kConsumers / 32);
        }
        publish_barriers();
    }
    if (threadIdx.x == kConsumers) {
        if (!V::kGather) prefetch_map(p.a);
        prefetch_map(p.b);
    }
    __syncthreads();
    count_group_tiles(s, p);
    return s;
}

template <typename V>
__global__ void __launch_bounds__(kThreads, 1) gemm_fp8_kernel(const __grid_constant__ Problem p) {
    Shared<V>& s = begin<V>(p);
    if (threadIdx.x >= kConsumers) {
        fewer_registers<V::kTransposed ? 72 : V::kGather ? 56 : 40>();
        if constexpr (V::kGather) load_gathered(s, p);
        else if constexpr (V::kTransposed) load_and_transpose(s, p);
        else if (threadIdx.x < kConsumers + 32) load_tiles(s, p);
    } else {
        more_registers<V::kTransposed ? 216 : V::kGather ? 224 : 232>();
        multiply_tiles(s, p);
    }
}

}  // namespace ling::gemm_fp8

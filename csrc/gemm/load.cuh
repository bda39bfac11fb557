// How the FP8 GEMM's loading warpgroup fills the stages: tiles by TMA, gathered tokens.
#pragma once
#include "gemm/tiles.cuh"

namespace ling::gemm_fp8 {

// A box of half h of the weights: for both blocks of a pair, if they have the same weights and the half is this
// block's.
template <typename V>
__device__ void load_weight_box(Shared<V>& s, const Tile& t, unsigned h, void* to, const TensorMap& map, int stage,
                                int column, int row) {
    if (!V::kPairs || !t.joint) load_tile(to, map, s.full[stage], column, row);
    else if (h == cluster_rank()) load_tile_to_both(to, map, s.full[stage], column, row);
}

template <typename V> __device__ void load_weights(Shared<V>& s, const Problem& p, const Tile& t, int stage, int k) {
    const int group_row = V::kWgrad ? 0 : t.group * (V::kTransposed ? p.K : p.N), up = V::kSwiglu ? p.N / 2 : 128;
#pragma unroll
    for (int h = 0; h < V::kHalves; h++) {
        uint8_t* to = s.b[stage] + h * 128 * 128;
        const int n = t.n + h * up;
        if (V::kTransposed) load_weight_box(s, t, h, to, p.b, stage, n, group_row + k * 128);
        else load_weight_box(s, t, h, to, p.b, stage, k * 128, group_row + n);
        if (V::kRowScales) load_tile(s.b_scale[stage] + h * 128, p.b_scale, s.full[stage], n, k);
    }
}

template <typename V> __device__ void load_tokens(Shared<V>& s, const Problem& p, const Tile& t, int stage, int k) {
    load_tile(s.a[stage], p.a, s.full[stage], k * 128, t.m);
    load_tile(s.a_scale[stage], p.a_scale, s.full[stage], t.m, k);
}

// One thread waits until a stage is free. The first stage of a tile hands the tile over to the multiplying warps.
template <typename V>
__device__ void open_stage(Shared<V>& s, const Ring<V::kStages>& ring, const Tile& t, int step) {
    s.empty[ring.stage].wait(ring.parity ^ 1);
    if (step == 0) s.tile[ring.stage] = t;
}

// The scales of a tile's weights. A lane holds those of every 32nd step, so that a warp waits for memory once in 32.
template <typename V> class BlockScales {
    float lane_scales[V::kHalves] = {};

public:
    // Both by a whole warp, for each step.
    __device__ void load(const Problem& p, const Tile& t, int step) {
        if (!V::kBlockScales || step % 32) return;
        const int k = step + threadIdx.x % 32, up = (V::kSwiglu ? p.N / 256 : 1) * p.weight_scale_n;
        const float* from =
            p.weight_scale + t.group * p.weight_scale_g + t.n / 128 * p.weight_scale_n + k * p.weight_scale_k;
#pragma unroll
        for (int h = 0; h < V::kHalves; h++)
            if (k < t.k_units && (V::kSwiglu || t.n + 128 * h < p.N)) lane_scales[h] = __ldg(from + h * up);
    }
    __device__ void store(Shared<V>& s, int stage, int step) const {
#pragma unroll
        for (int h = 0; V::kBlockScales && h < V::kHalves; h++) {
            const float scale = __shfl_sync(~0u, lane_scales[h], step % 32);
            if (threadIdx.x % 32 == 0) s.b_scale[stage][h] = scale;
        }
    }
};

// A warp's part of a step: its first lane opens the stage and calls load, and all fetch the scales.
template <typename V, typename F>
__device__ void load_step(Shared<V>& s, const Problem& p, const Tile& t, const Ring<V::kStages>& ring, int step,
                          BlockScales<V>& scales, F&& load) {
    scales.load(p, t, step);
    if (threadIdx.x % 32 == 0) open_stage(s, ring, t, step), load();
    __syncwarp();
    scales.store(s, ring.stage, step);
}

// One warp loads everything by TMA; load(t, stage, step) starts the loads of a step. A tile without a contraction, and
// the end of all tiles, take a stage without loads.
template <typename V, typename F> __device__ void load_tiles(Shared<V>& s, const Problem& p, F&& load) {
    Ring<V::kStages> ring;
    BlockScales<V> scales;
    Tile t;
    bool more = true;
    for (int tile = blockIdx.x; more; tile += gridDim.x) {
        more = find_tile(s, p, tile, t);
        const int steps = ceil_div(t.k_units, V::kStageUnits);
        if (more && p.accumulate && !steps) continue;  // nothing to add
        for (int step = 0; step == 0 || step < steps; step++, ring.next()) {
            load_step(s, p, t, ring, step, scales, [&] {
                if (step < steps) load(t, ring.stage, step);
                else s.full[ring.stage].arrive();
            });
            if (threadIdx.x % 32 == 0) s.full[ring.stage].arrive();
        }
    }
}

template <typename V> __device__ void load_tiles(Shared<V>& s, const Problem& p) {
    load_tiles(s, p, [&](const Tile& t, int stage, int step) {
        s.full[stage].arrive_and_expect(V::kTokenBytes + V::kBBytes + V::kBScaleBytes);
        load_tokens(s, p, t, stage, t.k + step);
        load_weights(s, p, t, stage, t.k + step);
    });
}

// The other loaders, of four warps, keep the tile in shared memory, because they need the registers. The first warp
// alone uses it.
template <typename V> __device__ void keep_tile(Shared<V>& s, const Tile& t) {
    __syncwarp();
    if (threadIdx.x == kConsumers) s.loading = t;
    __syncwarp();
}

// Their end of all tiles, called by all of their threads
template <typename V> __device__ void end_tiles(Shared<V>& s, const Ring<V::kStages>& ring) {
    s.empty[ring.stage].wait(ring.parity ^ 1);  // all of them: no arrival may belong to the round before
    if (threadIdx.x == kConsumers) {
        open_stage(s, ring, Tile{}, 0);
        s.full[ring.stage].arrive();
    }
    s.full[ring.stage].arrive();
}

// Gather tokens through `source`: 8 threads copy a row of 128 bytes. The consumers get a stage kInFlight steps after
// its copies began.
template <typename V> __device__ void load_gathered(Shared<V>& s, const Problem& p) {
    constexpr int kInFlight = 2, kRows = V::kBlockM / 16;
    const int thread = threadIdx.x - kConsumers, chunk = thread % 8, line = thread / 8;
    Ring<V::kStages> ring, ready;
    BlockScales<V> scales;
    int open = 0;
    const auto publish = [&] {
        fence_async();
        s.full[ready.stage].arrive();
        ready.next(), open--;
    };
    Tile t;
    for (int tile = blockIdx.x; find_tile(s, p, tile, t); tile += gridDim.x) {
        keep_tile(s, t);
        int token[kRows];  // -1: past the group's end
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const int r = line + 16 * i;
            token[i] = r < t.rows ? p.source[t.m + r] / p.topk : -1;
        }
        const int scale_token = thread < t.rows ? p.source[t.m + thread] / p.topk : -1, k_units = t.k_units;
        for (int k = 0; k < k_units; k++, ring.next()) {
            s.empty[ring.stage].wait(ring.parity ^ 1);
            if (thread < 32)
                load_step(s, p, s.loading, ring, k, scales, [&] {
                    s.full[ring.stage].arrive_and_expect(V::kBBytes + V::kBScaleBytes);
                    load_weights(s, p, s.loading, ring.stage, k);
                });
#pragma unroll
            for (int i = 0; i < kRows; i++) {
                const uint8_t* from = p.tokens + max(token[i], 0) * p.tokens_m + k * 128 + chunk * 16;
                copy_async<16>(s.a[ring.stage] + swizzled(line + 16 * i, chunk), from, token[i] < 0);
            }
            if (thread < V::kBlockM)
                copy_async<4>(&s.a_scale[ring.stage][thread],
                              p.token_scale + max(scale_token, 0) * p.token_scale_m + k * p.token_scale_k,
                              scale_token < 0);
            commit_copies();
            if (++open > kInFlight) wait_copies<kInFlight>(), publish();
        }
    }
    wait_copies<0>();
    while (open) publish();
    end_tiles(s, ring);
}

}  // namespace ling::gemm_fp8

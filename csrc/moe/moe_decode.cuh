// The parts of moe_decode: the list of jobs, both halves of the layer, and the queue that prefetches weights.
#pragma once
#include "gemm/few_rows.cuh"
#include "moe/route.cuh"
#include "moe/silu.cuh"
#include "quant/fp8_tile.cuh"

namespace ling::moe_decode {

using namespace few_rows;

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kUnit = 8;  // columns of h in a unit of the first half: 8 rows of gate's weight and 8 of up's
constexpr int kMaxTop = 8, kMaxJobs = kMaxRows * kMaxTop + 1;
constexpr int kPartialFloats = kMaxRows * kWarps * kLines;  // sums of all warps for 8 columns: a group
constexpr int kGroupBytes = kPartialFloats * 4, kMostGroups = 4;

struct Weights {  // of the routed experts, or of the shared expert
    const uint8_t *gate_up, *down;
    const float *gate_up_scale, *down_scale;
    int F;  // 0: no shared expert
};

struct Problem {
    const bf16 *x, *residual;
    const float *logits, *bias;
    bf16* y;
    float* h;     // [T topk, F], then [T, Fs]
    int counter;  // of the barrier
    Weights routed, shared;
    int64_t ld_logits;
    int T, H;
    int groups, partials;  // of sums in shared memory; the offset of the first
    float scale;
    Divisor units_per_expert, steps_per_expert;  // of `up`, of `down`
};

// The experts that the rows chose, each once, in ascending order, then the shared expert. Slot t topk + k is the k-th
// choice of row t.
struct Jobs {
    // Of each expert: first the rows that chose it (bits, as in `rows`), and once the jobs are numbered, its job.
    alignas(4) uint8_t expert_rows_or_job[256];
    int count;  // of routed experts
    float weight[kMaxRows * kMaxTop];
    uint8_t chosen[kMaxRows * kMaxTop];        // expert of each slot
    uint8_t expert[kMaxJobs], rows[kMaxJobs];  // rows: bit t is set where row t chose the expert
    uint8_t slot[kMaxJobs][kMaxRows];  // slot of (job, row), 0 where the row did not choose it; shared expert: the row

    struct Item {
        bool shared;  // an item of the shared expert
        int job, index;
    };
    // Item i of all jobs: its job and its index in it. Each routed job has `items_per_job` items.
    __device__ Item item(int i, const Divisor& items_per_job) const {
        const int job = min(items_per_job.quotient(i), count);
        return {job == count, job, i - job * items_per_job.value()};
    }
};

template <bool kFp8, int kDepth> struct Layout {  // of a block's shared memory, in bytes
    using Queue = Stream<kFp8, kDepth>;
    static constexpr int kJobsOffset = kWarps * Queue::kBytes;
    static constexpr int kOperandsOffset = ceil_div<int>(kJobsOffset + sizeof(Jobs), 16) * 16;
    static int partials(int T, int H, int F, int Fs, int topk) {
        using Rows = Operand<kFp8>;
        return kOperandsOffset + std::max(Rows::bytes(T, H), Rows::bytes(T * topk, F) + Rows::bytes(T, Fs));
    }
};

// Copy rows [., K] to shared memory, quantised for FP8. Half a warp takes 128 columns of two rows.
template <bool kFp8, typename T>
__device__ void stage(const Operand<kFp8>& to, const T* from, int K, int warp, int warps) {
    constexpr int kRows = 2;
    const int half = threadIdx.x / 16 % 2, lane = threadIdx.x % 16, blocks = K / kBlock;
    const int tiles = ceil_div(to.rows, kRows) * blocks;
    for (int i = 2 * warp; i < tiles; i += 2 * warps) {
        const int row_tile = (i + half) / blocks, k = i + half - row_tile * blocks, row = row_tile * kRows;
        const int rows = i + half < tiles ? to.rows - row : 0;
        alignas(16) T v[kRows][8];
#pragma unroll
        for (int j = 0; j < kRows; j++)
            if (j < rows) load8(v[j], from + int64_t{row + j} * K + k * kBlock + 8 * lane);
            else clear8(v[j]);
        if constexpr (kFp8) store_rows<false>(v, row, rows, k, to.data, to.scale, to.pitch, to.rows);
        else
#pragma unroll
            for (int j = 0; j < kRows; j++) {
                Vec<8> wide;
#pragma unroll
                for (int n = 0; n < 8; n++) wide[n] = static_cast<float>(v[j][n]);
                if (j < rows)
                    store(reinterpret_cast<bf16*>(to.data + (row + j) * to.pitch) + k * kBlock + 8 * lane, wide);
            }
    }
}

// The steps of a warp in order: every 16th step of each unit's K, first of gate_up, then of down. A line is a row of
// the stacked weights of all experts; its number fits 32 bits, its address needs 64.
template <bool kFp8, int kDepth> struct Feed {
    static constexpr int kSize = Operand<kFp8>::kSize;
    const Problem& p;
    const Jobs& jobs;
    Stream<kFp8, kDepth> stream;
    const int warp = threadIdx.x / 32, g = lane_row();
    const int up_units = (jobs.count * p.routed.F + p.shared.F) / kUnit, up_steps = p.H * kSize / kStep;
    const int down_units = p.H / kLines, down_steps = (jobs.count * p.routed.F + p.shared.F) * kSize / kStep;
    int unit = blockIdx.x, step = warp;  // the next to fetch
    bool down = false;

    // Push step k_step of K: the 8 lines from `upper` on and the 8 from `lower` on, `pitch` bytes apart
    __device__ void push(const uint8_t* w, const float* scales, unsigned upper, unsigned lower, unsigned pitch,
                         int k_step) {
        w += k_step * kStep;
        const uint8_t *high = w + uint64_t{upper + g} * pitch, *low = w + uint64_t{lower + g} * pitch;
        if constexpr (kFp8) {
            const unsigned scale_columns = pitch / kBlock;
            stream.push(high, low, scales + (upper / kBlock * scale_columns + k_step),
                        scales + (lower / kBlock * scale_columns + k_step));
        } else stream.push(high, low);
    }
    __device__ void next(int steps) {
        step += kWarps;
        if (step >= steps) step = warp, unit += gridDim.x;
    }
    __device__ void push() {
        if (!down && (unit >= up_units || step >= up_steps)) down = true, unit = blockIdx.x, step = warp;
        if (!down) {
            const auto [shared, job, index] = jobs.item(unit, p.units_per_expert);
            const Weights& w = shared ? p.shared : p.routed;
            const unsigned F = w.F, line = jobs.expert[job] * 2 * F + index * kUnit;
            push(w.gate_up, w.gate_up_scale, line, line + F, p.H * kSize, step);
            next(up_steps);
        } else if (unit < down_units && step < down_steps) {
            const auto [shared, job, index] = jobs.item(step, p.steps_per_expert);
            const Weights& w = shared ? p.shared : p.routed;
            const unsigned line = jobs.expert[job] * p.H + unit * kLines;
            push(w.down, w.down_scale, line, line + kLines / 2, w.F * kSize, index);
            next(down_steps);
        } else stream.push();
    }
};

// The sums of all warps for up to 8 groups / T units, and their totals. The threads add up those of 8 / T units at
// once.
struct Partials {
    float* const all;  // [units][kWarps][16][T]
    const int T, at_once, per_pass = kMaxRows / T;
    const int part = threadIdx.x % 4, half = threadIdx.x / 4 % 2, row = threadIdx.x / 8 % T,
              c = threadIdx.x / 8 / T % 8,
              round = threadIdx.x / 8 / T / 8;  // the thread's total: line 8 half + c of a unit, for row `row` of x

    __device__ Partials(void* memory, int T, int groups)
        : all(static_cast<float*>(memory)), T(T), at_once(groups * kMaxRows / T) {}

    __device__ void store(int round, const float (&sum)[4]) const {
        float* to = all + ((round * kWarps + threadIdx.x / 32) * kLines + lane_row()) * T + lane_column();
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (lane_column() + i % 2 < T) to[i / 2 * 8 * T + i % 2] = sum[i];
    }
    // Calls f(round, whether the thread has a total there, the total). Four lanes add up each total in a fixed order,
    // and all four have it.
    template <typename F> __device__ void totals(int rounds, F&& f) const {
#pragma unroll 1
        for (int first = 0; first < rounds; first += per_pass) {
            const int mine = first + round;
            const bool has = round < per_pass && mine < rounds;
            float sum = 0;
            if (has)
#pragma unroll
                for (int w = part; w < kWarps; w += 4)
                    sum += all[((mine * kWarps + w) * kLines + 8 * half + c) * T + row];
            sum += __shfl_xor_sync(~0u, sum, 1);
            f(mine, has, sum + __shfl_xor_sync(~0u, sum, 2));
        }
    }
};

// Prefetches into L2; the blocks of the grid share the bytes
__device__ inline void prefetch(const uint8_t* from, int64_t bytes) {
    constexpr int kLine = 128;
    for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kLine; i < bytes;
         i += int64_t{kLine} * kThreads * gridDim.x)
        prefetch_line(from + i);
}

__device__ inline float rounded_to_bf16(float x) { return static_cast<float>(__float2bfloat16_rn(x)); }

// Every block builds the list of jobs while other warps stage x. jobs.slot is valid after the next __syncthreads().
template <bool kFp8, typename Router> __device__ void find_jobs(Jobs& jobs, const Problem& p, const Operand<kFp8>& x) {
    constexpr int kTop = Router::kTop, kPerLane = Router::kPerLane;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slots = p.T * kTop;
    for (int i = threadIdx.x; i < kMaxJobs * kMaxRows; i += kThreads) jobs.slot[0][i] = 0;
    unsigned* const words = reinterpret_cast<unsigned*>(jobs.expert_rows_or_job);
    for (int i = threadIdx.x; i < Router::kExperts / 4; i += kThreads) words[i] = 0;
    if (warp < p.T) {
        const Router router(p.bias);
        const float* row = p.logits + warp * p.ld_logits;
        float lane_logits[kPerLane];
#pragma unroll
        for (float& value : lane_logits) value = -INFINITY;
        if (router.exists) routing::load_lane(lane_logits, row + lane * kPerLane);
        uint8_t* chosen = jobs.chosen + warp * kTop;
        router.choose(lane_logits, chosen);
        __syncwarp();
        const float weight = routing::weight<kTop>(row[chosen[lane % kTop]], true, p.scale);
        if (lane < kTop) jobs.weight[warp * kTop + lane] = weight;
    } else stage(x, p.x, p.H, warp - p.T, kWarps - p.T);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < slots) {
        const int e = jobs.chosen[threadIdx.x];
        atomicOr(words + e / 4, 1u << (e % 4 * 8 + threadIdx.x / kTop));
    }
    __syncthreads();
    if (warp == 0) {  // the lane's experts: one byte each, the rows that chose it
        uint64_t rows = 0;
#pragma unroll
        for (int j = 0; j < kPerLane; j++)
            if (lane * kPerLane < Router::kExperts)
                rows |= uint64_t{jobs.expert_rows_or_job[lane * kPerLane + j]} << 8 * j;
        int end = 0;
#pragma unroll
        for (int j = 0; j < kPerLane; j++) end += (rows >> 8 * j & 255) != 0;
        int job = -end;
        for (int d = 1; d < 32; d *= 2) {
            const int lower = __shfl_up_sync(~0u, end, d);
            if (lane >= d) end += lower;
        }
        job += end;
#pragma unroll
        for (int j = 0; j < kPerLane; j++)
            if (const int expert_rows = rows >> 8 * j & 255) {
                const int e = lane * kPerLane + j;
                jobs.expert[job] = e, jobs.rows[job] = expert_rows, jobs.expert_rows_or_job[e] = job, job++;
            }
        if (lane == 31) jobs.count = end, jobs.expert[end] = 0, jobs.rows[end] = (1 << p.T) - 1;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < slots)
        jobs.slot[jobs.expert_rows_or_job[jobs.chosen[threadIdx.x]]][threadIdx.x / kTop] = threadIdx.x;
    if (static_cast<int>(threadIdx.x) < p.T) jobs.slot[jobs.count][threadIdx.x] = threadIdx.x;
}

// Writes h = SwiGLU(x gate_up^T) for the rows of every job to global memory. The product of the shared expert, and
// every product with bf16 weights, is rounded to bf16 as in the ops that define the layer.
template <bool kFp8, int kDepth>
__device__ void up(Feed<kFp8, kDepth>& feed, const Partials& partials, const Operand<kFp8>& x, int slots) {
    const Problem& p = feed.p;
    const Jobs& jobs = feed.jobs;
    const int at_once = partials.at_once;
    for (int first = blockIdx.x; first < feed.up_units; first += at_once * gridDim.x) {
        const int rounds = min(at_once, ceil_div<int>(feed.up_units - first, gridDim.x));
        for (int r = 0; r < rounds; r++) {
            float sum[4] = {};
            for (int k = feed.warp; k < feed.up_steps; k += kWarps) {
                add_product(sum, feed.stream.take(), x, k);
                feed.push();
            }
            partials.store(r, sum);
        }
        __syncthreads();
        partials.totals(rounds, [&](int round, bool has, float gate) {
            float up = __shfl_xor_sync(~0u, gate, 4);
            if (!has || partials.half || partials.part) return;
            const auto [shared, job, index] = jobs.item(first + round * gridDim.x, p.units_per_expert);
            const bool to_bf16 = shared || !kFp8;
            if (to_bf16) gate = rounded_to_bf16(gate), up = rounded_to_bf16(up);
            float h = silu(gate) * up;
            if (to_bf16) h = rounded_to_bf16(h);
            float* rows = shared ? p.h + int64_t{slots} * p.routed.F : p.h;
            const int64_t F = shared ? p.shared.F : p.routed.F;
            if (jobs.rows[job] >> partials.row & 1)
                rows[jobs.slot[job][partials.row] * F + index * kUnit + partials.c] = h;
        });
        __syncthreads();
    }
}

// y = residual + the weighted sum of h down^T over the jobs, summed in fp32
template <bool kFp8, int kDepth>
__device__ void down(Feed<kFp8, kDepth>& feed, const Partials& partials, const Operand<kFp8>& routed_h,
                     const Operand<kFp8>& shared_h) {
    const Problem& p = feed.p;
    const Jobs& jobs = feed.jobs;
    const int at_once = partials.at_once, n = lane_column();
    for (int first = blockIdx.x; first < feed.down_units; first += at_once * gridDim.x) {
        const int rounds = min(at_once, ceil_div<int>(feed.down_units - first, gridDim.x));
        for (int r = 0; r < rounds; r++) {
            float sum[4] = {};
            for (int k = feed.warp; k < feed.down_steps; k += kWarps) {
                const auto [shared, job, index] = jobs.item(k, p.steps_per_expert);
                const Operand<kFp8> h = shared ? shared_h : routed_h;
                const Step step = feed.stream.take();
                const Part part = multiply<kFp8>(step, h.row(jobs.slot[job][lane_row()]) + index * kStep);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int slot = jobs.slot[job][n + i];
                    const float weight = shared ? 1 : jobs.weight[slot];
                    const float scale = kFp8 ? h.scale[index * h.rows + slot] : 1;
                    if (jobs.rows[job] >> (n + i) & 1) {
                        sum[i] += weight * (part.v[i] * (scale * step.upper_scale));
                        sum[i + 2] += weight * (part.v[i + 2] * (scale * step.lower_scale));
                    }
                }
                feed.push();
            }
            partials.store(r, sum);
        }
        __syncthreads();
        partials.totals(rounds, [&](int round, bool has, float total) {
            if (!has || partials.part) return;
            const int unit = first + round * gridDim.x;
            const int64_t to = int64_t{partials.row} * p.H + unit * kLines + 8 * partials.half + partials.c;
            p.y[to] = __float2bfloat16_rn(p.residual ? total + static_cast<float>(p.residual[to]) : total);
        });
        __syncthreads();
    }
}

}  // namespace ling::moe_decode

// The parts of moe_decode: the list of jobs, both halves of the layer, and the queue that prefetches weights.
#pragma once
#include "gemm/few_rows.cuh"
#include "moe/route.cuh"
#include "quant/fp8_tile.cuh"

namespace ling::moe_decode {

using namespace few_rows;

constexpr int kWarps = 16, kThreads = 32 * kWarps;
constexpr int kUnit = 8;  // columns of h in a unit of the first half: 8 rows of gate's weight and 8 of up's
constexpr int kMaxTop = 8, kMaxJobs = kMaxRows * kMaxTop + 1;
constexpr int kPartial = kMaxRows * kWarps * kLines;  // floats: sums of all warps for 8 columns

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
    float scale;
};

// Rows in shared memory, in the weights' type
template <bool kFp8> struct Operand {
    static constexpr int kSize = kFp8 ? 1 : 2;
    uint8_t* data;
    float* scale;  // of FP8: [K / 128][rows]
    int rows, pitch;

    Operand(const Operand&) = default;
    __device__ Operand(uint8_t* at, int rows, int K)
        : data(at), scale(reinterpret_cast<float*>(at + rows * pitch_of(K))), rows(rows), pitch(pitch_of(K)) {}
    static constexpr int pitch_of(int K) { return K * kSize + kGap; }
    static constexpr int bytes(int rows, int K) {
        return ceil_div(rows * (pitch_of(K) + (kFp8 ? K / kBlock * 4 : 0)), 16) * 16;
    }
    __device__ const uint8_t* row(int r) const { return data + r * pitch; }
};

// i / by for i < 2^32 / by, by one multiplication; a division takes 20 instructions.
struct Divisor {
    unsigned by, inverse;
    __device__ explicit Divisor(unsigned by) : by(by), inverse(0xffffffffu / by + 1) {}
    __device__ int operator()(unsigned i) const { return by == 1 ? i : uint64_t{i} * inverse >> 32; }
};

// The experts that the rows chose, each once, in ascending order, then the shared expert. Slot t topk + k is the k-th
// choice of row t.
struct Jobs {
    alignas(4) uint8_t index[256];  // expert -> job; while jobs are built, the rows that chose the expert, as in `rows`
    int count;                      // of routed experts
    float weight[kMaxRows * kMaxTop];
    uint8_t chosen[kMaxRows * kMaxTop];        // the slots' experts
    uint8_t expert[kMaxJobs], rows[kMaxJobs];  // rows: bit t is set where row t chose the expert
    uint8_t slot[kMaxJobs][kMaxRows];          // of each row, 0 for other rows; for the shared expert the row itself

    struct Share {
        bool shared;
        int job, at;
    };
    // Every routed job has `each.by` items: the job of item i, and its number in the job
    __device__ Share share(int i, const Divisor& each) const {
        const int job = min(each(i), count);
        return {job == count, job, i - job * static_cast<int>(each.by)};
    }
};

template <bool kFp8, int kDepth> struct Layout {  // of a block's shared memory, in bytes
    using Queue = Stream<kFp8, kDepth>;
    static constexpr int kPartials = kWarps * Queue::kBytes, kJobs = kPartials + kPartial * 4;
    static constexpr int kOperands = ceil_div<int>(kJobs + sizeof(Jobs), 16) * 16;
    static int total(int T, int H, int F, int Fs, int topk) {
        using Rows = Operand<kFp8>;
        return kOperands + std::max(Rows::bytes(T, H), Rows::bytes(T * topk, F) + Rows::bytes(T, Fs));
    }
};

// Copy rows [., K] to shared memory, quantised for FP8. Half a warp takes 128 columns of two rows.
template <bool kFp8, typename T>
__device__ void stage(const Operand<kFp8>& to, const T* from, int K, int warp, int warps) {
    constexpr int kRows = 2;
    const int half = threadIdx.x / 16 % 2, lane = threadIdx.x % 16, blocks = K / kBlock;
    const int tiles = ceil_div(to.rows, kRows) * blocks;
    for (int i = 2 * warp; i < tiles; i += 2 * warps) {
        const int across = (i + half) / blocks, k = i + half - across * blocks, row = across * kRows;
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

// The steps of a warp in order: every 16th of each unit's K, first of gate_up, then of down. Lines are rows of all
// experts' weights; a line number fits 32 bits, its address needs 64.
template <bool kFp8, int kDepth> struct Feed {
    static constexpr int kSize = Operand<kFp8>::kSize;
    const Problem& p;
    const Jobs& jobs;
    Stream<kFp8, kDepth> stream;
    const int warp = threadIdx.x / 32, g = lane_row();
    const int up_units = (jobs.count * p.routed.F + p.shared.F) / kUnit, up_steps = p.H * kSize / kStep;
    const int down_units = p.H / kLines, down_steps = (jobs.count * p.routed.F + p.shared.F) * kSize / kStep;
    const Divisor up_each{static_cast<unsigned>(p.routed.F / kUnit)};            // units of an expert
    const Divisor down_each{static_cast<unsigned>(p.routed.F * kSize / kStep)};  // steps of an expert
    int unit = blockIdx.x, step = warp;                                          // the next to fetch
    bool down = false;

    // Push the 16 lines of a step, `pitch` bytes apart: 8 from line `upper` on, and 8 from `lower` on
    __device__ void push(const uint8_t* w, const float* scales, unsigned upper, unsigned lower, unsigned pitch,
                         int at) {
        w += at * kStep;
        const uint8_t *high = w + uint64_t{upper + g} * pitch, *low = w + uint64_t{lower + g} * pitch;
        if constexpr (kFp8) {
            const unsigned across = pitch / kBlock;
            stream.push(high, low, scales + (upper / kBlock * across + at), scales + (lower / kBlock * across + at));
        } else stream.push(high, low);
    }
    __device__ void next(int steps) {
        step += kWarps;
        if (step >= steps) step = warp, unit += gridDim.x;
    }
    __device__ void push() {
        if (!down && (unit >= up_units || step >= up_steps)) down = true, unit = blockIdx.x, step = warp;
        if (!down) {
            const auto [shared, job, at] = jobs.share(unit, up_each);
            const Weights& w = shared ? p.shared : p.routed;
            const unsigned F = w.F, line = jobs.expert[job] * 2 * F + at * kUnit;
            push(w.gate_up, w.gate_up_scale, line, line + F, p.H * kSize, step);
            next(up_steps);
        } else if (unit < down_units && step < down_steps) {
            const auto [shared, job, at] = jobs.share(step, down_each);
            const Weights& w = shared ? p.shared : p.routed;
            const unsigned line = jobs.expert[job] * p.H + unit * kLines;
            push(w.down, w.down_scale, line, line + kLines / 2, w.F * kSize, at);
            next(down_steps);
        } else stream.push();
    }
};

// The sums of all warps for up to 8 / T units, and their totals
struct Partials {
    float* const all;  // [8 / T][kWarps][16][T]
    const int T;
    const int part = threadIdx.x % 4, half = threadIdx.x / 4 % 2, row = threadIdx.x / 8 % T,
              c = threadIdx.x / 8 / T % 8,
              round = threadIdx.x / 8 / T / 8;  // the thread's total: line 8 half + c of a unit, for row `row` of x

    __device__ void keep(int round, const float (&sum)[4]) const {
        float* to = all + ((round * kWarps + threadIdx.x / 32) * kLines + lane_row()) * T + lane_column();
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (lane_column() + i % 2 < T) to[i / 2 * 8 * T + i % 2] = sum[i];
    }
    // 4 lanes compute each total in a fixed order; all of them get it
    __device__ float total(int rounds) const {
        float sum = 0;
        if (round < rounds)
#pragma unroll
            for (int w = part; w < kWarps; w += 4) sum += all[((round * kWarps + w) * kLines + 8 * half + c) * T + row];
        sum += __shfl_xor_sync(~0u, sum, 1);
        return sum + __shfl_xor_sync(~0u, sum, 2);
    }
};

// All blocks together prefetch into L2
__device__ inline void prefetch(const uint8_t* from, int64_t bytes) {
    constexpr int kLine = 128;
    for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kLine; i < bytes;
         i += int64_t{kLine} * kThreads * gridDim.x)
        prefetch_line(from + i);
}

__device__ inline float rounded(float x) { return static_cast<float>(__float2bfloat16_rn(x)); }

// Every block builds the list of jobs while other warps stage x. jobs.slot is valid after the next __syncthreads().
template <bool kFp8, typename Router> __device__ void find_jobs(Jobs& jobs, const Problem& p, const Operand<kFp8>& x) {
    constexpr int kTop = Router::kTop, kPer = Router::kPerLane;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slots = p.T * kTop;
    for (int i = threadIdx.x; i < kMaxJobs * kMaxRows; i += kThreads) jobs.slot[0][i] = 0;
    unsigned* const words = reinterpret_cast<unsigned*>(jobs.index);
    for (int i = threadIdx.x; i < Router::kExperts / 4; i += kThreads) words[i] = 0;
    if (warp < p.T) {
        const Router router(p.bias);
        const float* row = p.logits + warp * p.ld_logits;
        float own[kPer];
#pragma unroll
        for (float& value : own) value = -INFINITY;
        if (router.exists) routing::load_lane(own, row + lane * kPer);
        uint8_t* chosen = jobs.chosen + warp * kTop;
        router.choose(own, chosen);
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
    if (warp == 0) {  // one byte of rows for each of a lane's experts
        uint64_t rows = 0;
#pragma unroll
        for (int j = 0; j < kPer; j++)
            if (lane * kPer < Router::kExperts) rows |= uint64_t{jobs.index[lane * kPer + j]} << 8 * j;
        int end = 0;
#pragma unroll
        for (int j = 0; j < kPer; j++) end += (rows >> 8 * j & 255) != 0;
        int job = -end;
        for (int d = 1; d < 32; d *= 2) {
            const int left = __shfl_up_sync(~0u, end, d);
            if (lane >= d) end += left;
        }
        job += end;
#pragma unroll
        for (int j = 0; j < kPer; j++)
            if (const int mine = rows >> 8 * j & 255) {
                const int e = lane * kPer + j;
                jobs.expert[job] = e, jobs.rows[job] = mine, jobs.index[e] = job, job++;
            }
        if (lane == 31) jobs.count = end, jobs.expert[end] = 0, jobs.rows[end] = (1 << p.T) - 1;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < slots)
        jobs.slot[jobs.index[jobs.chosen[threadIdx.x]]][threadIdx.x / kTop] = threadIdx.x;
    if (static_cast<int>(threadIdx.x) < p.T) jobs.slot[jobs.count][threadIdx.x] = threadIdx.x;
}

// h = SwiGLU of x gate_up^T for the rows of every job, to global memory. The product of the shared expert, and every
// product with bf16 weights, is rounded as in the ops that define the layer.
template <bool kFp8, int kDepth>
__device__ void up(Feed<kFp8, kDepth>& feed, const Partials& partials, const Operand<kFp8>& x, int slots) {
    const Problem& p = feed.p;
    const Jobs& jobs = feed.jobs;
    const int at_once = kMaxRows / p.T, n0 = min(lane_column(), p.T - 1), n1 = min(lane_column() + 1, p.T - 1);
    const uint8_t* own = x.row(min(lane_row(), p.T - 1));
    for (int first = blockIdx.x; first < feed.up_units; first += at_once * gridDim.x) {
        const int rounds = min(at_once, ceil_div<int>(feed.up_units - first, gridDim.x));
        for (int r = 0; r < rounds; r++) {
            float sum[4] = {};
            for (int k = feed.warp; k < feed.up_steps; k += kWarps) {
                const Step step = feed.stream.take();
                const Part part = multiply<kFp8>(step, own + k * kStep);
                float scale[2] = {1, 1};
                if constexpr (kFp8) scale[0] = x.scale[k * p.T + n0], scale[1] = x.scale[k * p.T + n1];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    sum[i] += part.v[i] * (scale[i % 2] * (i < 2 ? step.upper_scale : step.lower_scale));
                feed.push();
            }
            partials.keep(r, sum);
        }
        __syncthreads();
        float gate = partials.total(rounds), up = __shfl_xor_sync(~0u, gate, 4);
        if (partials.round < rounds && partials.half == 0 && partials.part == 0) {
            const auto [shared, job, at] = jobs.share(first + partials.round * gridDim.x, feed.up_each);
            const bool rounds_off = shared || !kFp8;
            if (rounds_off) gate = rounded(gate), up = rounded(up);
            float h = gate / (1 + __expf(-gate)) * up;
            if (rounds_off) h = rounded(h);
            float* rows = shared ? p.h + int64_t{slots} * p.routed.F : p.h;
            const int64_t F = shared ? p.shared.F : p.routed.F;
            if (jobs.rows[job] >> partials.row & 1)
                rows[jobs.slot[job][partials.row] * F + at * kUnit + partials.c] = h;
        }
        __syncthreads();
    }
}

// y = the weighted sum over the jobs of h down^T, in f32, and the residual
template <bool kFp8, int kDepth>
__device__ void down(Feed<kFp8, kDepth>& feed, const Partials& partials, const Operand<kFp8>& routed,
                     const Operand<kFp8>& shared_one) {
    const Problem& p = feed.p;
    const Jobs& jobs = feed.jobs;
    const int at_once = kMaxRows / p.T, n = lane_column();
    for (int first = blockIdx.x; first < feed.down_units; first += at_once * gridDim.x) {
        const int rounds = min(at_once, ceil_div<int>(feed.down_units - first, gridDim.x));
        for (int r = 0; r < rounds; r++) {
            float sum[4] = {};
            for (int k = feed.warp; k < feed.down_steps; k += kWarps) {
                const auto [shared, job, at] = jobs.share(k, feed.down_each);
                const Operand<kFp8> h = shared ? shared_one : routed;
                const Step step = feed.stream.take();
                const Part part = multiply<kFp8>(step, h.row(jobs.slot[job][lane_row()]) + at * kStep);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int slot = jobs.slot[job][n + i];
                    const float weight = shared ? 1 : jobs.weight[slot];
                    const float scale = kFp8 ? h.scale[at * h.rows + slot] : 1;
                    if (jobs.rows[job] >> (n + i) & 1) {
                        sum[i] += weight * (part.v[i] * (scale * step.upper_scale));
                        sum[i + 2] += weight * (part.v[i + 2] * (scale * step.lower_scale));
                    }
                }
                feed.push();
            }
            partials.keep(r, sum);
        }
        __syncthreads();
        const float total = partials.total(rounds);
        if (partials.round < rounds && partials.part == 0) {
            const int unit = first + partials.round * gridDim.x;
            const int64_t to = int64_t{partials.row} * p.H + unit * kLines + 8 * partials.half + partials.c;
            p.y[to] = __float2bfloat16_rn(p.residual ? total + static_cast<float>(p.residual[to]) : total);
        }
        __syncthreads();
    }
}

}  // namespace ling::moe_decode

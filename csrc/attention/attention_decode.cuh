// The work of one warp of the decode kernel: attention over its part of a paged cache.
#pragma once
#include "mma.cuh"
#include "quant/fp8.cuh"

namespace ling::decode {

// A warp takes every 4th step of 16 keys of its block's run, from global memory straight to tensor cores: each lane
// loads 16 bytes each of the query and key rows that its mma fragment needs. The next step's keys load during this
// step's softmax and product with the values; its values load during its own scores. The 4 warps combine their results
// once per sequence in shared memory. A block finds its run of tiles of keys from the lengths, as in Triton.
constexpr int kD = 128, kWarps = 4, kThreads = 32 * kWarps, kStep = 16, kTile = kWarps * kStep, kRows = 16;
constexpr int kPitch = kD + 4;  // floats of a row in shared memory: rows start in different banks

struct Cache {
    const void *k, *v;
    const float *k_scale, *v_scale;
    const int *table, *lengths;
    int B, W, Hkv, num_pages, page_size, max_pages;  // page_size in tokens; max_pages: columns of the table

    __device__ int used(int b) const { return min(max(lengths[b], 0), max_pages * page_size); }
    __device__ int tiles(int b) const { return ceil_div(used(b), kTile); }
    // Tiles of a run. This and the following functions are called by a whole warp.
    __device__ int share(int all) const { return max(ceil_div(all, W), 1); }
    __device__ int tiles_before(int end) const {
        int sum = 0;
        for (int b = threadIdx.x % 32; b < end; b += 32) sum += tiles(b);
        return __reduce_add_sync(~0u, sum);
    }
    // The sequence of tile `first`, which must exist, and the number of its first tile
    __device__ void find(int first, int& seq, int& begin) const {
        const int lane = threadIdx.x % 32;
        seq = begin = 0;
        for (int b = 0; b < B; b += 32) {
            int end = b + lane < B ? tiles(b + lane) : 0;
            for (int d = 1; d < 32; d *= 2) {
                const int lower = __shfl_up_sync(~0u, end, d);
                if (lane >= d) end += lower;
            }
            const int ended = __popc(__ballot_sync(~0u, begin + end <= first));
            const int skipped = __shfl_sync(~0u, end, max(ended - 1, 0));
            seq = b + ended;
            begin += ended ? skipped : 0;
            if (ended < 32) return;
        }
    }
};

constexpr int kMostNew = 8;

// In shared memory of the kernel that appends the n new tokens: a tile's queries, normed and rotated, and the new keys
// and values in the cache's dtype. Blocks read new tokens here, because other blocks may be writing their cells.
template <typename T, typename C> struct Fresh {
    alignas(16) T q[kRows][kD];
    alignas(16) C cells[2][kMostNew][kD];  // keys, values
    float scales[2][kMostNew];
    int begin, n;  // position of the first new token in the sequence

    // Index of a key of the sequence among the new tokens, or -1
    __device__ int index(int key) const { return key >= begin && key < begin + n ? key - begin : -1; }
};

// A warp's part of a sequence's keys: scores of 16 rows in units of log2, and the values weighted by them.
// Lane l is g = l / 4, c = l % 4. The contraction may take dims in any order, so a lane's chunks of a key are used as
// loaded; output columns may have any order, so its chunks of values are too, once those of two keys are interleaved.
// kAppends: new tokens are read from `fresh`.
template <typename T, typename C, bool kAppends> struct Warp {
    static constexpr int kPer = Chunk<T, C>::kElements, kKeyChunks = kD / kPer / 4, kValueChunks = kD / kPer / 8;
    const Cache& cache;
    const Fresh<T, C>* fresh;
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, warp = threadIdx.x / 32;
    int seq, head, first, stop, used;  // keys of the block's run
    unsigned q[8][4];
    uint4 ks[2][kKeyChunks], vs[2][2][kValueChunks];  // key 8t + g; key 8t + 2c + i
    float k_scale[2][2], v_scale[2][2];               // of key 8t + 2c + i
    float largest[2], total[2], o[16][4];
    int lane_page;  // lane l: the page of step l of the current group of 32 steps

    __device__ int key(int step) const { return first + (step * kWarps + warp) * kStep; }

    __device__ void load_queries(const T* row0, const T* row1) {
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const int d = u / (kPer / 8) * 4 * kPer + c * kPer + u % (kPer / 8) * 8;
            const uint4 low = row0 ? *reinterpret_cast<const uint4*>(row0 + d) : uint4{};
            const uint4 high = row1 ? *reinterpret_cast<const uint4*>(row1 + d) : uint4{};
            q[2 * u][0] = low.x, q[2 * u][1] = high.x, q[2 * u][2] = low.y, q[2 * u][3] = high.y;
            q[2 * u + 1][0] = low.z, q[2 * u + 1][1] = high.z, q[2 * u + 1][2] = low.w, q[2 * u + 1][3] = high.w;
        }
    }

    // The cell of the step's first key; the 16 lie in one page.
    __device__ int64_t locate(int step) {
        if (step % 32 == 0) {
            const int lane_key = key(step + lane);
            lane_page = lane_key < stop ? cache.table[int64_t{seq} * cache.max_pages + lane_key / cache.page_size] : 0;
            LING_DEVICE_CHECK(lane_page >= 0 && lane_page < cache.num_pages);
            lane_page = min(max(lane_page, 0), cache.num_pages - 1);
        }
        return int64_t{__shfl_sync(~0u, lane_page, step % 32)} * cache.page_size + key(step) % cache.page_size;
    }

    // The row of key (kind 0) or value (kind 1) number `index` of a step
    __device__ const C* row_of(int kind, int step, int64_t cell, int index) const {
        if constexpr (kAppends)
            if (const int i = fresh->index(key(step) + index); i >= 0) return fresh->cells[kind][i];
        return static_cast<const C*>(kind ? cache.v : cache.k) + ((cell + index) * cache.Hkv + head) * kD;
    }

    // Keys past the sequence's end lie inside the page and their scores are masked. Values there are loaded as 0, as
    // their P is 0 and 0 times NaN is NaN.
    __device__ void load_keys(int step, int64_t cell) {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const C* row = row_of(0, step, cell, 8 * t + g) + c * kPer;
#pragma unroll
            for (int j = 0; j < kKeyChunks; j++) ks[t][j] = *reinterpret_cast<const uint4*>(row + j * 4 * kPer);
            if constexpr (sizeof(C) == 1) load_scales(k_scale[t], 0, step, cell, t);
        }
    }
    __device__ void load_values(int step, int64_t cell) {
#pragma unroll
        for (int t = 0; t < 2; t++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int index = 8 * t + 2 * c + i;
                const C* row = row_of(1, step, cell, index) + g * kPer;
#pragma unroll
                for (int j = 0; j < kValueChunks; j++)
                    vs[t][i][j] =
                        key(step) + index < used ? *reinterpret_cast<const uint4*>(row + j * 8 * kPer) : uint4{};
            }
            if constexpr (sizeof(C) == 1) load_scales(v_scale[t], 1, step, cell, t);
        }
    }
    __device__ void load_scales(float (&to)[2], int kind, int step, int64_t cell, int t) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int index = 8 * t + 2 * c + i;
            const float* from = (kind ? cache.v_scale : cache.k_scale) + (cell + index) * cache.Hkv + head;
            if constexpr (kAppends)
                if (const int new_one = fresh->index(key(step) + index); new_one >= 0)
                    from = &fresh->scales[kind][new_one];
            to[i] = key(step) + index < used ? *from : 0.f;
        }
    }

    __device__ void scores(float (&s)[2][4], float scale_log2) const {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            s[t][0] = s[t][1] = s[t][2] = s[t][3] = 0;
#pragma unroll
            for (int j = 0; j < kKeyChunks; j++) {
                const Chunk<T, C> chunk(ks[t][j]);
#pragma unroll
                for (int i = 0; i < kPer / 4; i++)
                    mma<T>(s[t], q[j * (kPer / 4) + i], chunk.pair[2 * i], chunk.pair[2 * i + 1]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) s[t][i] *= sizeof(C) == 1 ? k_scale[t][i % 2] * scale_log2 : scale_log2;
        }
    }

    // Turns s into P; last: the last key that each of the lane's two rows sees
    __device__ void softmax(float (&s)[2][4], int first_key, const int (&last)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float larger = largest[r];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& x = s[i / 2][2 * r + i % 2];
                if (first_key + i / 2 * 8 + 2 * c + i % 2 > last[r]) x = -INFINITY;
                larger = fmaxf(larger, x);
            }
            larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, 1));
            larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, 2));
            const float base = larger == -INFINITY ? 0.f : larger;  // -inf - -inf would be NaN
            const float shrink = exp2_approx(largest[r] - base);
            largest[r] = larger, total[r] *= shrink;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& x = s[i / 2][2 * r + i % 2];
                x = exp2_approx(x - base);
                total[r] += x;
                if constexpr (sizeof(C) == 1) x *= v_scale[i / 2][i % 2];
            }
#pragma unroll
            for (int i = 0; i < 16; i++) o[i][2 * r] *= shrink, o[i][2 * r + 1] *= shrink;
        }
    }

    __device__ void add_values(const float (&p)[2][4]) {
        const unsigned a[4] = {pack<T>(p[0][0], p[0][1]), pack<T>(p[0][2], p[0][3]), pack<T>(p[1][0], p[1][1]),
                               pack<T>(p[1][2], p[1][3])};
#pragma unroll
        for (int j = 0; j < kValueChunks; j++) {
            const Chunk<T, C> chunk[2][2] = {{Chunk<T, C>(vs[0][0][j]), Chunk<T, C>(vs[0][1][j])},
                                             {Chunk<T, C>(vs[1][0][j]), Chunk<T, C>(vs[1][1][j])}};
#pragma unroll
            for (int i = 0; i < kPer; i++) {
                unsigned b[2];
#pragma unroll
                for (int t = 0; t < 2; t++)
                    b[t] = __byte_perm(chunk[t][0].pair[i / 2], chunk[t][1].pair[i / 2], i % 2 ? 0x7632 : 0x5410);
                mma<T>(o[j * kPer + i], a, b[0], b[1]);
            }
        }
    }

    __device__ void run(float scale_log2, const int (&last)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) largest[r] = -INFINITY, total[r] = 0;
#pragma unroll
        for (auto& tile : o) tile[0] = tile[1] = tile[2] = tile[3] = 0;
        const int steps = max(ceil_div(stop - key(0), kTile), 0);
        int64_t cell = 0;
        if (steps) cell = locate(0), load_keys(0, cell), load_values(0, cell);
        for (int step = 0; step < steps; step++) {
            float s[2][4];
            scores(s, scale_log2);
            const bool more = step + 1 < steps;
            if (more) cell = locate(step + 1), load_keys(step + 1, cell);
            softmax(s, key(step), last);
            add_values(s);
            if (more) load_values(step + 1, cell);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            total[r] += __shfl_xor_sync(~0u, total[r], 1);
            total[r] += __shfl_xor_sync(~0u, total[r], 2);
        }
    }
};

}  // namespace ling::decode

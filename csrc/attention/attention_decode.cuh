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

struct Cache {
    const void *k, *v;
    const float *k_scale, *v_scale;
    const int *table, *lengths;
    int B, Hkv, num_pages, max_pages;  // max_pages: columns of the table
    Divisor page_size, W;              // in tokens; number of runs

    __device__ int used(int length) const { return min(max(length, 0), max_pages * page_size.value()); }
    __device__ int page_of(int seq, int key) const { return table[seq * max_pages + page_size.quotient(key)]; }
};

// The tiles of keys of all sequences. Each of W blocks has an equal run of them. A warp holds the first 32 lengths, so
// that a batch of at most 32 waits for memory once. All functions are called by a whole warp.
struct Runs {
    const Cache& cache;
    const int lane = threadIdx.x % 32;
    int length;  // of sequence `lane`; 0 past the last one
    int end;     // of the tiles of sequences 0 .. lane, if there are so many
    int all, share;

    __device__ explicit Runs(const Cache& cache) : cache(cache) {
        length = lane < cache.B ? cache.lengths[lane] : 0;
        end = sum_to(tiles(length));
        all = __shfl_sync(~0u, end, min(cache.B, 32) - 1);
        for (int b = 32; b < cache.B; b += 32) all += __reduce_add_sync(~0u, tiles(further(b + lane)));
        share = max(cache.W.quotient(all + cache.W.value() - 1), 1);
    }
    __device__ int tiles(int length) const { return ceil_div(cache.used(length), kTile); }
    __device__ int further(int b) const { return b < cache.B ? cache.lengths[b] : 0; }
    __device__ int length_of(int b) const { return b < 32 ? __shfl_sync(~0u, length, b) : further(b); }
    // The sum of x over lanes up to this one, for lanes that have a sequence
    __device__ int sum_to(int x) const {
        for (int d = 1; d < min(cache.B, 32); d *= 2) {
            const int lower = __shfl_up_sync(~0u, x, d);
            if (lane >= d) x += lower;
        }
        return x;
    }
    // The sequence of tile `first`, which must exist, and the number of its first tile
    __device__ void find(int first, int& seq, int& begin) const {
        seq = begin = 0;
        for (int ends = end;; ends = begin + sum_to(tiles(further(seq + lane)))) {
            const int ended = __popc(__ballot_sync(~0u, seq + lane < cache.B && ends <= first));
            if (ended) begin = __shfl_sync(~0u, ends, ended - 1);
            seq += ended;
            if (ended < 32) return;
        }
    }
};

// 2^exponent for exponents from -126 to 127, 0 for -127
__device__ inline float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

constexpr int kMostNew = 8;

// In shared memory of the kernel that appends the n new tokens: a tile's queries, normed and rotated, and the new keys
// and values in the cache's dtype. Blocks read new tokens here, because other blocks may be writing their cells.
template <typename T, typename C> struct Fresh {
    alignas(16) T q[kRows][kD];
    alignas(16) C cells[2][kMostNew][kD];  // keys, values
    float scales[2][kMostNew];
};

// Pairs of elements of two chunks of C, as operands of products of F
template <typename F, typename C> struct Interleaved {
    static constexpr int kElements = 16 / sizeof(C);
    unsigned pair[kElements];  // element i of the one, and of the other

    __device__ Interleaved(uint4 one, uint4 other) {
        const unsigned a[4] = {one.x, one.y, one.z, one.w}, b[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
        for (int i = 0; i < kElements; i += 2)
            if constexpr (sizeof(C) == 2) {
                pair[i] = __byte_perm(a[i / 2], b[i / 2], 0x5410);
                pair[i + 1] = __byte_perm(a[i / 2], b[i / 2], 0x7632);
            } else {
                const unsigned codes = __byte_perm(a[i / 4], b[i / 4], i % 4 ? 0x7362 : 0x5140);
                pair[i] = to_f16(codes & 0xffff), pair[i + 1] = to_f16(codes >> 16);
            }
    }
    static __device__ unsigned to_f16(unsigned two) {
        const __half2 pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
        return *reinterpret_cast<const unsigned*>(&pair);
    }
};

// A warp's part of a sequence's keys: scores of 16 rows in units of log2, and the values weighted by them.
// Lane l is g = l / 4, c = l % 4. The contraction may take dims in any order, so a lane's chunks of a key are used as
// loaded; output columns may have any order, so its chunks of values are too, once those of two keys are interleaved.
// kAppends: new tokens are read from `fresh`. Products with an FP8 cache are in f16, which is one instruction from two
// codes; bf16 would be three.
template <typename T, typename C, bool kAppends> struct Warp {
    static constexpr bool kFp8 = sizeof(C) == 1;
    using Factor = std::conditional_t<kFp8, f16, T>;
    static constexpr int kPer = 16 / sizeof(C), kKeyChunks = kD / kPer / 4, kValueChunks = kD / kPer / 8;
    const Cache& cache;
    const Fresh<T, C>* fresh;
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4, warp = threadIdx.x / 32;
    int seq, head, first, stop, used;  // keys of the block's run
    int cached;                        // keys before this one are in the cache; from here to `used` they are new tokens
    int shown;                         // keys before this one are seen by all rows
    unsigned q[8][4];
    float scale_log2[2];                              // of the lane's two rows of products of q and keys
    uint4 ks[2][kKeyChunks], vs[2][2][kValueChunks];  // key 8t + g; key 8t + 2c + i
    float scales;                                     // lane l: of key l, or of value l - 16
    int value_exponent;  // of the largest scale of a value so far, plus 127; P and o are in units of that power of two
    float largest[2], total[2], o[16][4];
    int lane_cell;    // lane l: the first cell of step l of the current group of 32 steps
    int lane_page;    // lane l: the page of step l of the next group
    int steps, cell;  // of this warp; the first cell of the next step to load

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

    // Turns bf16 queries into f16, divided by a power of two in rows with numbers too large for f16.
    __device__ void convert_queries(float scale) {
        constexpr int kLargest = 127 + 15;  // exponent of f16's largest numbers, plus 127
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int most = 0;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const int pair = q[i / 2][i % 2 * 2 + r];
                most = max(most, max(pair & 0x7fff, pair >> 16 & 0x7fff));
            }
            most = max(most, __shfl_xor_sync(~0u, most, 1));
            most = max(most, __shfl_xor_sync(~0u, most, 2));
            const int excess = max((most >> 7) - kLargest, 0);
            const float factor = power_of_two(-excess);
            scale_log2[r] = scale * power_of_two(excess);
#pragma unroll
            for (int i = 0; i < 16; i++) {
                unsigned& pair = q[i / 2][i % 2 * 2 + r];
                pair = pack<Factor>(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xffff0000) * factor);
            }
        }
    }

    // The page of the lane's step of the group that begins with step `group`
    __device__ int load_page(int group) const {
        const int lane_key = key(group + lane);
        return lane_key < stop ? cache.page_of(seq, lane_key) : 0;
    }

    // The cell of the step's first key; the 16 lie in one page. Called for one step after another.
    __device__ int locate(int step) {
        if (step % 32 == 0) {
            LING_DEVICE_CHECK(lane_page >= 0 && lane_page < cache.num_pages);
            const int page = min(max(lane_page, 0), cache.num_pages - 1);
            lane_cell = page * cache.page_size.value() + cache.page_size.remainder(key(step + lane));
            lane_page = load_page(step + 32);
        }
        return __shfl_sync(~0u, lane_cell, step % 32);
    }

    // The row of key (kind 0) or value (kind 1) number `index` after a cell
    __device__ const C* row_of(int kind, int cell, int index) const {
        const C* const of_head = static_cast<const C*>(kind ? cache.v : cache.k) + head * kD;
        return of_head + int64_t{cell + index} * (cache.Hkv * kD);
    }
    __device__ static int value_index(int i, int c) { return 8 * (i / 2) + 2 * c + i % 2; }

    // Neither new tokens, which other blocks may be writing, nor cells past the end are read.
    __device__ void load_keys(int step, int cell) {
        const int limit = cached - key(step);
#pragma unroll
        for (int t = 0; t < 2; t++) {
            const C* row = row_of(0, cell, 8 * t + g) + c * kPer;
            if (8 * t + g < limit)
#pragma unroll
                for (int j = 0; j < kKeyChunks; j++) ks[t][j] = *reinterpret_cast<const uint4*>(row + j * 4 * kPer);
        }
        if constexpr (kFp8) {
            const int kind = lane / kStep, index = lane % kStep;
            const float* from = (kind ? cache.v_scale : cache.k_scale) + int64_t{cell + index} * cache.Hkv + head;
            if (index < limit) scales = *from;
        }
    }
    __device__ void load_values(int step, int cell) {
        const int limit = cached - key(step);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int index = value_index(i, c);
            const C* row = row_of(1, cell, index) + g * kPer;
            if (index < limit)
#pragma unroll
                for (int j = 0; j < kValueChunks; j++)
                    vs[i / 2][i % 2][j] = *reinterpret_cast<const uint4*>(row + j * 8 * kPer);
        }
    }

    // Takes what a step has besides cells: new tokens, and zeros past the end, as P is 0 there and 0 times NaN is NaN.
    __device__ void complete(int step) {
        const int limit = cached - key(step), end = used - key(step);
        if (limit >= kStep) return;
        const auto is_new = [&](int index) { return kAppends && index >= limit && index < end; };
#pragma unroll
        for (int t = 0; t < 2; t++)
            if (const int index = 8 * t + g; is_new(index))
#pragma unroll
                for (int j = 0; j < kKeyChunks; j++)
                    ks[t][j] = *reinterpret_cast<const uint4*>(fresh->cells[0][index - limit] + (4 * j + c) * kPer);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int index = value_index(i, c);
            uint4(&value)[kValueChunks] = vs[i / 2][i % 2];
            if (is_new(index))
#pragma unroll
                for (int j = 0; j < kValueChunks; j++)
                    value[j] = *reinterpret_cast<const uint4*>(fresh->cells[1][index - limit] + (8 * j + g) * kPer);
            else if (index >= end)
#pragma unroll
                for (uint4& chunk : value) chunk = {};
        }
        if constexpr (kFp8) {
            const int index = lane % kStep;
            if (is_new(index)) scales = fresh->scales[lane / kStep][index - limit];
            else if (index >= end) scales = 0;
        }
    }

    // The scale of the lane's key (kind 0) or value (kind 1) 8t + 2c + i of the step
    __device__ float scale_of(int kind, int t, int i) const {
        return __shfl_sync(~0u, scales, kind * kStep + 8 * t + 2 * c + i);
    }

    __device__ void scores(float (&s)[2][4]) const {
#pragma unroll
        for (int t = 0; t < 2; t++) {
            s[t][0] = s[t][1] = s[t][2] = s[t][3] = 0;
#pragma unroll
            for (int j = 0; j < kKeyChunks; j++) {
                const Chunk<Factor, C> chunk(ks[t][j]);
#pragma unroll
                for (int i = 0; i < kPer / 4; i++)
                    mma<Factor>(s[t], q[j * (kPer / 4) + i], chunk.pair[2 * i], chunk.pair[2 * i + 1]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float scale = kFp8 ? scale_of(0, t, i) : 1;
                s[t][i] *= scale * scale_log2[0], s[t][2 + i] *= scale * scale_log2[1];
            }
        }
    }

    // The scales of the step's values in units of the largest power of two so far, so that P times a scale fits f16.
    // Returns the factor from the earlier unit to that one.
    __device__ float value_scales(float (&to)[2][2]) {
        const int most = __reduce_max_sync(~0u, lane < kStep ? 0 : __float_as_int(scales) & 0x7fffffff) >> 23;
        const int before = value_exponent;
        value_exponent = max(before, min(most, 253));
        const float inverse = power_of_two(127 - value_exponent);
#pragma unroll
        for (int i = 0; i < 4; i++) to[i / 2][i % 2] = scale_of(1, i / 2, i % 2) * inverse;
        return power_of_two(max(before - value_exponent, -127));
    }

    // Turns s into P; last: the last key that each of the lane's two rows sees
    __device__ void softmax(float (&s)[2][4], int first_key, const int (&last)[2], const float (&v_scale)[2][2],
                            float unit) {
        if (first_key + kStep > shown)
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (first_key + i / 4 * 8 + 2 * c + i % 2 > last[i / 2 % 2]) s[i / 4][i % 4] = -INFINITY;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float larger = largest[r];
#pragma unroll
            for (int i = 0; i < 4; i++) larger = fmaxf(larger, s[i / 2][2 * r + i % 2]);
            larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, 1));
            larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, 2));
            const float base = larger == -INFINITY ? 0.f : larger;  // -inf - -inf would be NaN
            float shrink = exp2_approx(largest[r] - base);
            largest[r] = larger, total[r] *= shrink;
            if constexpr (kFp8) shrink *= unit;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& x = s[i / 2][2 * r + i % 2];
                x = exp2_approx(x - base);
                total[r] += x;
                if constexpr (kFp8) x *= v_scale[i / 2][i % 2];
            }
#pragma unroll
            for (int i = 0; i < 16; i++) o[i][2 * r] *= shrink, o[i][2 * r + 1] *= shrink;
        }
    }

    __device__ void add_values(const float (&p)[2][4]) {
        const unsigned a[4] = {pack<Factor>(p[0][0], p[0][1]), pack<Factor>(p[0][2], p[0][3]),
                               pack<Factor>(p[1][0], p[1][1]), pack<Factor>(p[1][2], p[1][3])};
#pragma unroll
        for (int j = 0; j < kValueChunks; j++) {
            const Interleaved<Factor, C> low(vs[0][0][j], vs[0][1][j]), high(vs[1][0][j], vs[1][1][j]);
#pragma unroll
            for (int i = 0; i < kPer; i++) mma<Factor>(o[j * kPer + i], a, low.pair[i], high.pair[i]);
        }
    }

    // Loads the first step; called after lane_page = load_page(0).
    __device__ void start() {
        steps = max(ceil_div(stop - key(0), kTile), 0);
#pragma unroll
        for (auto& key : ks)
#pragma unroll
            for (uint4& chunk : key) chunk = {};
#pragma unroll
        for (auto& pair : vs)
#pragma unroll
            for (auto& value : pair)
#pragma unroll
                for (uint4& chunk : value) chunk = {};
        scales = 0;
        cell = locate(0), load_keys(0, cell),
        load_values(0, cell);  // nothing without steps: then key(0) is past the end
    }

    // row0, row1: queries of the lane's rows, or null. scale: of their products with keys, in base 2
    __device__ void run(const T* row0, const T* row1, const int (&last)[2], float scale) {
#pragma unroll
        for (int r = 0; r < 2; r++) largest[r] = -INFINITY, total[r] = 0;
#pragma unroll
        for (auto& tile : o) tile[0] = tile[1] = tile[2] = tile[3] = 0;
        value_exponent = 1;
        load_queries(row0, row1);
        if constexpr (std::is_same_v<T, Factor>) scale_log2[0] = scale_log2[1] = scale;
        else convert_queries(scale);
        for (int step = 0; step < steps; step++) {
            float s[2][4], v_scale[2][2], unit = 1;
            complete(step);
            scores(s);
            if constexpr (kFp8) unit = value_scales(v_scale);
            const bool more = step + 1 < steps;
            if (more) cell = locate(step + 1), load_keys(step + 1, cell);
            softmax(s, key(step), last, v_scale, unit);
            add_values(s);
            if (more) load_values(step + 1, cell);
        }
        if constexpr (kFp8)
#pragma unroll
            for (auto& tile : o)
#pragma unroll
                for (float& x : tile) x *= power_of_two(value_exponent - 127);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            total[r] += __shfl_xor_sync(~0u, total[r], 1);
            total[r] += __shfl_xor_sync(~0u, total[r], 2);
        }
    }
};

}  // namespace ling::decode

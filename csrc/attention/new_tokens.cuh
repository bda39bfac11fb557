// First phase of the decode kernel that appends: norm and rotation of the new tokens, and the write of their cells.
#pragma once
#include "attention/attention_decode.cuh"
#include "norm/head.cuh"

namespace ling::decode {

struct NewTokens {
    const void *qkv, *q_weight, *k_weight;
    bool fp32_weights;  // otherwise in qkv's dtype
    const float *cos, *sin;
    int P;
    float eps;
    void *k, *v;  // the cache's cells
    float *k_scale, *v_scale;
};

__device__ inline unsigned head_max(unsigned x) {
#pragma unroll
    for (int d = kLanes / 2; d; d /= 2) x = max(x, __shfl_xor_sync(~0u, x, d));
    return x;
}

// Stores a lane's part of a row of cells
template <typename C> __device__ void store_cell(C* row, const Vec<kVec>& y, float scale) {
    C* const to = row + threadIdx.x % kLanes * kVec;
    if constexpr (sizeof(C) == 2) store(to, y);
    else
        *reinterpret_cast<uint2*>(to) = {to_e4m3x4(y[0] / scale, y[1] / scale, y[2] / scale, y[3] / scale),
                                         to_e4m3x4(y[4] / scale, y[5] / scale, y[6] / scale, y[7] / scale)};
}

// A lane's part of both weights, as loaded
template <typename T> struct Weights {
    uint4 raw[2][2];  // of queries, of keys; the second half with fp32
    bool fp32;

    __device__ explicit Weights(const NewTokens& in) : fp32(in.fp32_weights) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const char* from = static_cast<const char*>(k ? in.k_weight : in.q_weight);
            from += threadIdx.x % kLanes * kVec * (fp32 ? sizeof(float) : sizeof(T));
            raw[k][0] = *reinterpret_cast<const uint4*>(from);
            raw[k][1] = *reinterpret_cast<const uint4*>(from + (fp32 ? 16 : 0));
        }
    }
    __device__ Vec<kVec> of(int kind) const {
        uint4 mine[2];
#pragma unroll
        for (int i = 0; i < 2; i++) mine[i] = kind ? raw[1][i] : raw[0][i];
        const Vec<kVec> half = load<kVec>(reinterpret_cast<const T*>(mine));
        Vec<kVec> weight = load<kVec>(reinterpret_cast<const float*>(mine));
#pragma unroll
        for (int j = 0; j < kVec; j++) weight[j] = fp32 ? weight[j] : half[j];
        return weight;
    }
};

// The first phase of a block, for a sequence and a KV head: the queries from row r0 on, and the new tokens among the
// block's keys first .. stop - 1. Half a warp has a row of qkv; all loads of a row are in flight at once. The blocks of
// the first rows write the cells.
template <typename T, typename C> struct Preparation {
    static constexpr int kAtOnce = kThreads / kLanes;
    const NewTokens& in;
    const Cache& cache;
    int seq, head, first, stop, n, r0, rows, begin;  // begin: position of the first new token
    const Divisor& G;
    const Weights<T>& weights;

    struct Row {
        int kind, token, position, page;  // kind: query, key, value; page: of a key or value
        bool stays;                       // it is a key or value of the block
        uint4 x;
        Angles angles;
    };

    __device__ int jobs() const { return rows + (stop > begin ? 2 * n : 0); }

    // Jobs past the last one load its row again, as branches between loads and their use are waits.
    __device__ Row load_row(int base) const {
        const int lane = threadIdx.x % kLanes, group = G.value(), heads = cache.Hkv * (group + 2);
        const int unclamped = base + threadIdx.x / kLanes, job = min(unclamped, jobs() - 1);
        const int kind = (job >= rows) + (job >= rows + n), query = r0 + job;
        const int token = kind ? job - rows - (kind - 1) * n : G.quotient(query), position = begin + token;
        const int h = kind ? heads - (3 - kind) * cache.Hkv + head : head * group + G.remainder(query);
        const bool real = position >= 0,
                   stays = unclamped == job && real && kind && position >= first && position < stop;
        LING_DEVICE_CHECK(!real || position < in.P);
        const auto* x = static_cast<const T*>(in.qkv) + int64_t{(seq * n + token) * heads + h} * kD + lane * kVec;
        return {kind,
                token,
                position,
                cache.page_of(seq, stays ? position : 0),
                stays,
                *reinterpret_cast<const uint4*>(x),
                Angles(in.cos, in.sin, position, in.P, real)};
    }

    __device__ void finish(const Row& row, int base, Fresh<T, C>& fresh) const {
        const int lane = threadIdx.x % kLanes, job = base + threadIdx.x / kLanes;
        const Vec<kVec> x = load<kVec>(reinterpret_cast<const T*>(&row.x));
        Vec<kVec> y = x;
        norm_and_rotate(y, weights.of(row.kind), row.angles, in.eps);
        if (row.kind == 2) y = x;
        unsigned amax = 0;
#pragma unroll
        for (int j = 0; j < kVec; j++)
            y[j] = static_cast<float>(static_cast<T>(y[j])), amax = max(amax, abs_bits(y[j]));
        const float scale = sizeof(C) == 1 ? block_scale(head_max(amax), false) : 1;
        if (row.kind == 0) {
            store(fresh.q[job] + lane * kVec, y);  // a token before the sequence sees no key
        } else if (row.stays) {
            const int i = row.kind - 1;
            store_cell(fresh.cells[i][row.token], y, scale);
            if (sizeof(C) == 1 && lane == 0) fresh.scales[i][row.token] = scale;
            if (blockIdx.z > 0 || row.page < 0 || row.page >= cache.num_pages) return;
            const int row_of_cache = row.page * cache.page_size.value() + cache.page_size.remainder(row.position);
            const int64_t cell = int64_t{row_of_cache} * cache.Hkv + head;
            store_cell(static_cast<C*>(i ? in.v : in.k) + cell * kD, y, scale);
            if (sizeof(C) == 1 && lane == 0) (i ? in.v_scale : in.k_scale)[cell] = scale;
        }
    }
};

}  // namespace ling::decode

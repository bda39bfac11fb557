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

// The first phase of a block, for a sequence and a KV head: the queries from row r0 on, and the new tokens among the
// block's keys first .. stop - 1. Half a warp has a row of qkv; all loads of a row are in flight at once. The blocks of
// the first rows write the cells.
template <typename T, typename C> struct Preparation {
    static constexpr int kAtOnce = kThreads / kLanes;
    const NewTokens& in;
    const Cache& cache;
    int seq, head, first, stop, n, r0, rows, begin;  // begin: position of the first new token
    const Divisor& G;

    struct Row {
        int kind, token, position, page;  // kind: query, key, value; page: of a key or value
        bool real, stays;                 // stays: it is a key or value of the block
        uint4 x, weight[2];
        Angles angles;
    };

    __device__ int jobs() const { return rows + (stop > begin ? 2 * n : 0); }

    __device__ Row load_row(int base) const {
        const int lane = threadIdx.x % kLanes, job = base + threadIdx.x / kLanes;
        const int kind = (job >= rows) + (job >= rows + n), group = G.value();
        const int token = kind ? job - rows - (kind - 1) * n : G.quotient(r0 + job), position = begin + token;
        const int h = kind ? cache.Hkv * (group + kind - 1) + head : head * group + G.remainder(r0 + job);
        const bool real = job < jobs() && position >= 0;
        LING_DEVICE_CHECK(!real || position < in.P);
        const bool stays = real && kind && position >= first && position < stop;
        Row row{kind, token, position, 0, real, stays, {}, {}, Angles(in.cos, in.sin, position, in.P, real)};
        if (real)
            row.x = *reinterpret_cast<const uint4*>(static_cast<const T*>(in.qkv) +
                                                    ((int64_t{seq} * n + token) * (cache.Hkv * (group + 2)) + h) * kD +
                                                    lane * kVec);
        const char* weight = static_cast<const char*>(kind ? in.k_weight : in.q_weight);
        weight += lane * kVec * (in.fp32_weights ? sizeof(float) : sizeof(T));
        row.weight[0] = *reinterpret_cast<const uint4*>(weight);
        row.weight[1] = *reinterpret_cast<const uint4*>(weight + (in.fp32_weights ? 16 : 0));
        row.page = cache.table[int64_t{seq} * cache.max_pages + (stays ? cache.page_size.quotient(position) : 0)];
        return row;
    }

    __device__ static Vec<kVec> to_floats(const uint4& raw) { return load<kVec>(reinterpret_cast<const T*>(&raw)); }

    __device__ void finish(const Row& row, int base, Fresh<T, C>& fresh) const {
        const int lane = threadIdx.x % kLanes, job = base + threadIdx.x / kLanes;
        const Vec<kVec> x = to_floats(row.x), whole = load<kVec>(reinterpret_cast<const float*>(row.weight));
        Vec<kVec> y = x, weight = to_floats(row.weight[0]);
#pragma unroll
        for (int j = 0; j < kVec; j++) weight[j] = in.fp32_weights ? whole[j] : weight[j];
        norm_and_rotate(y, weight, row.angles, in.eps);
        if (row.kind == 2) y = x;
        unsigned amax = 0;
#pragma unroll
        for (int j = 0; j < kVec; j++)
            y[j] = static_cast<float>(static_cast<T>(y[j])), amax = max(amax, abs_bits(y[j]));
        const float scale = sizeof(C) == 1 ? block_scale(head_max(amax), false) : 1;
        if (row.kind == 0) {
            store(fresh.q[job] + lane * kVec, y);  // 0 for a token before the sequence, which sees no key
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

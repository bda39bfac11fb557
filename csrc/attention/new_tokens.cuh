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

template <typename T> __device__ Vec<kVec> load_weight(const void* w, bool fp32) {
    const int column = threadIdx.x % kLanes * kVec;
    return fp32 ? load<kVec>(static_cast<const float*>(w) + column) : load<kVec>(static_cast<const T*>(w) + column);
}

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

// Called by a whole block; half a warp has a row of qkv. For sequence seq and KV head `head` it prepares the queries
// from row r0 on, and the new tokens among the block's keys first .. stop - 1. The blocks of the first rows write the
// cells.
template <typename T, typename C>
__device__ void prepare(Fresh<T, C>& fresh, const NewTokens& in, const Cache& cache, int seq, int head, int first,
                        int stop, int n, int G, int r0) {
    const int lane = threadIdx.x % kLanes, rows = min(n * G - r0, kRows), begin = cache.lengths[seq] - n;
    const int jobs = rows + (stop > begin ? 2 * n : 0);
    if (threadIdx.x == 0) fresh.begin = begin, fresh.n = n;
    for (int base = 0; base < jobs; base += kThreads / kLanes) {  // uniform: all threads shuffle
        const int job = base + threadIdx.x / kLanes, kind = (job >= rows) + (job >= rows + n);  // query, key, value
        const int token = kind ? (job - rows) % n : (r0 + job) / G, position = begin + token;
        const int h = kind ? cache.Hkv * (G + kind - 1) + head : head * G + (r0 + job) % G;
        const bool real = job < jobs && position >= 0, new_key = real && kind && position >= first && position < stop;
        const int page = new_key ? cache.table[int64_t{seq} * cache.max_pages + position / cache.page_size] : -1;
        LING_DEVICE_CHECK(!real || position < in.P);
        Vec<kVec> x = {};
        if (real)
            x = load<kVec>(static_cast<const T*>(in.qkv) +
                           ((int64_t{seq} * n + token) * (cache.Hkv * (G + 2)) + h) * kD + lane * kVec);
        Vec<kVec> y = x;
        const Angles angles(in.cos, in.sin, position, in.P, real);
        norm_and_rotate(y, load_weight<T>(kind ? in.k_weight : in.q_weight, in.fp32_weights), angles, in.eps);
        if (kind == 2) y = x;
        unsigned amax = 0;
#pragma unroll
        for (int j = 0; j < kVec; j++)
            y[j] = static_cast<float>(static_cast<T>(y[j])), amax = max(amax, abs_bits(y[j]));
        const float scale = sizeof(C) == 1 ? block_scale(head_max(amax), false) : 1;
        if (!real) continue;
        if (kind == 0) {
            store(fresh.q[job] + lane * kVec, y);
        } else if (new_key) {
            const int64_t cell = (int64_t{page} * cache.page_size + position % cache.page_size) * cache.Hkv + head;
            const bool writes = blockIdx.z == 0 && page >= 0 && page < cache.num_pages;
            store_cell(fresh.cells[kind - 1][token], y, scale);
            if (writes) store_cell(static_cast<C*>(kind == 1 ? in.k : in.v) + cell * kD, y, scale);
            if (sizeof(C) == 1 && lane == 0) {
                fresh.scales[kind - 1][token] = scale;
                if (writes) (kind == 1 ? in.k_scale : in.v_scale)[cell] = scale;
            }
        }
    }
}

}  // namespace ling::decode

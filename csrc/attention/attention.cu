#include "attention/attention.h"
#include "attention/tiles.cuh"
#include "counters.cuh"

namespace ling {
namespace {

// A persistent block has one warp that loads and two warpgroups that multiply, each with 64 queries of a tile of 128.
// While a warpgroup computes the exponentials of one block of keys, tensor cores compute its products with the next
// keys and the previous values. The two warpgroups take turns, so that exponentials of one overlap products of the
// other.
constexpr int kStages = 2;
constexpr int kBox = kBlock * 128;    // bytes of 128 rows of 64 columns
constexpr int kTileBytes = 2 * kBox;  // of 128 rows of a head

struct Shared {
    alignas(1024) uint8_t q[kTileBytes];
    alignas(1024) uint8_t k[kStages][kTileBytes];
    alignas(1024) uint8_t v[kStages][kTileBytes];
    alignas(128) uint8_t staging[kConsumers / 32][16 * 128];
    alignas(16) float q_weight[kD];
    TileQueue queue;
    TileCounts counts;
    int warp_sums[kThreads / 32];
    Barrier q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

struct Problem {
    TensorMap q, k, v;
    Sequences sequences;
    bf16* out;
    int64_t out_row;
    float* lse;
    float scale;
    int counter;  // of the tiles that blocks have taken
    // Operands of the norm and rotation of q
    const void *q_weight, *positions;
    bool fp32_weight, int64_positions;  // otherwise bf16, int32
    const float *cos, *sin;
    int P;
    float eps;
};

// The number of keys that query i of the tile sees
__device__ int keys_seen(const Tile& t, int i, bool causal) {
    return causal ? min(t.length, t.offset + i + t.shift + 1) : t.length;
}

// Blocks of keys that any query of the tile sees
__device__ int visible_blocks(const Tile& t) { return max(ceil_div(t.end, kBlock), 0); }

__device__ void load_head(uint8_t* to, const TensorMap& map, Barrier& full, int head, int row) {
    full.arrive_and_expect(kTileBytes);
    for (int i = 0; i < 2; i++) load_tile(to + i * kBox, map, full, head * kD + 64 * i, row);
}

__device__ void load_tiles(Shared& s, const Problem& p) {
    Ring<kStages> ring;
    Ring<1> q;
    const int all = s.counts.before[p.sequences.B] * p.sequences.Hq;
    const auto find = [&](int number) { return find_tile(p.sequences, s.counts, false, number); };
    s.queue.share(counters + p.counter, all, find, [&](const Tile& t) {
        const int blocks = visible_blocks(t);
        if (!blocks) return;
        s.q_empty.wait(q.parity ^ 1);
        load_head(s.q, p.q, s.q_full, t.head, t.first);
        q.next();
        for (int n = blocks - 1; n >= 0; n--, ring.next()) {
            s.k_empty[ring.stage].wait(ring.parity ^ 1);
            load_head(s.k[ring.stage], p.k, s.k_full[ring.stage], t.other_head, t.others + n * kBlock);
            s.v_empty[ring.stage].wait(ring.parity ^ 1);
            load_head(s.v[ring.stage], p.v, s.v_full[ring.stage], t.other_head, t.others + n * kBlock);
        }
    });
}

// Starts scores = q k^T
__device__ void multiply_keys(float (&scores)[64], const uint8_t* q, const uint8_t* k) {
#pragma unroll
    for (int i = 0; i < kD / 16; i++) {
        const int offset = i / 4 * kBox + i % 4 * 32;
        wgmma_bf16(scores, operand_after(q, offset), operand_after(k, offset), i > 0);
    }
    wgmma_commit();
}

// Starts out += p v
__device__ void multiply_values(float (&out)[64], const unsigned (&p)[8][4], const uint8_t* v) {
#pragma unroll
    for (int i = 0; i < kBlock / 16; i++) wgmma_bf16_registers(out, p[i], operand_after(v, i * 16 * 128, kBox), true);
    wgmma_commit();
}

// For each of a thread's two rows: the largest score so far, and the sum of the exponentials that the thread holds
struct Softmax {
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

    // Turns scores into exponentials relative to the largest one; shrink: the factor for earlier sums
    __device__ void next(float (&scores)[64], float scale_log2, float (&shrink)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float top = largest[r];
#pragma unroll
            for (int i = 0; i < 32; i++) top = fmaxf(top, scores[i / 2 * 4 + 2 * r + i % 2]);
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            const float base = top == -INFINITY ? 0 : top * scale_log2;  // no key seen yet
            shrink[r] = exp2_approx(largest[r] * scale_log2 - base);
            largest[r] = top, sum[r] *= shrink[r];
#pragma unroll
            for (int i = 0; i < 32; i++) {
                float& x = scores[i / 2 * 4 + 2 * r + i % 2];
                x = exp2_approx(x * scale_log2 - base);
                sum[r] += x;
            }
        }
    }
};

__device__ void mask_scores(float (&scores)[64], const Tile& t, bool causal, int n, int row) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int seen = keys_seen(t, row + 8 * r, causal) - n * kBlock - static_cast<int>(threadIdx.x % 4 * 2);
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float& x = scores[i / 2 * 4 + 2 * r + i % 2];
            x = i / 2 * 8 + i % 2 < seen ? x : -INFINITY;
        }
    }
}

// Values past the sequence's end belong to another sequence and may be NaN: 0 times NaN is NaN.
__device__ void clear_values(uint8_t* v, int from) {
    clear_lines<kBlock>(v, 2, from, kConsumers);
    fence_async();
    named_barrier(1, kConsumers);
}

// Two lanes have a row of queries for its norm and rotation, lanes l and l + 16 of the warp's 16 rows: half h has dims
// 16 h .. 16 h + 15, the dims 32 higher, with which they are rotated, and dims 64 + 32 h .. 95 + 32 h. So 8 lanes
// access different banks. chunk(i): the i-th of a lane's 8 chunks of 8 dims.
struct RowHalf {
    static constexpr int kDims = 16;
    const int half = threadIdx.x % 32 / 16, row = threadIdx.x / 32 * 16 + threadIdx.x % 16;

    __device__ int chunk(int i) const { return i < 4 ? i / 2 * 4 + 2 * half + i % 2 : 4 + 4 * half + i; }
};

// cos and sin of the rotated dims of a lane; NaN for a position outside the tables, 0 in rows past the tile's end
struct Angles {
    Vec<RowHalf::kDims> cos = {}, sin = {};

    __device__ Angles(const Problem& p, const Tile& t) {
        const RowHalf at;
        if (at.row >= t.rows) return;
        const int64_t token = t.first + at.row;
        const int64_t position = p.int64_positions ? static_cast<const int64_t*>(p.positions)[token]
                                                   : static_cast<const int*>(p.positions)[token];
        if (position >= 0 && position < p.P) {
            cos = load<RowHalf::kDims>(p.cos + position * 32 + at.half * RowHalf::kDims);
            sin = load<RowHalf::kDims>(p.sin + position * 32 + at.half * RowHalf::kDims);
        } else {
#pragma unroll
            for (int i = 0; i < RowHalf::kDims; i++) cos[i] = sin[i] = NAN;
        }
    }
};

// RMS norm of the queries of a tile in shared memory, then rotation of dims i and i + 32
__device__ void norm_and_rotate(Shared& s, const Problem& p, const Angles& angles) {
    constexpr int kDims = RowHalf::kDims;
    const RowHalf at;
    const auto line = [&](int i) {
        const int chunk = at.chunk(i);
        return reinterpret_cast<bf16*>(s.q + chunk / 8 * kBox + swizzled(at.row, chunk % 8));
    };
    float x[64], squares = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const auto v = load<8>(line(i));
#pragma unroll
        for (int j = 0; j < 8; j++) x[8 * i + j] = v[j], squares += v[j] * v[j];
    }
    squares += __shfl_xor_sync(~0u, squares, 16);
    const float rstd = rsqrtf(squares / kD + p.eps);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const auto w = load<8>(s.q_weight + 8 * at.chunk(i));
#pragma unroll
        for (int j = 0; j < 8; j++) x[8 * i + j] *= rstd * w[j];
    }
#pragma unroll
    for (int i = 0; i < kDims; i++) {
        const float a = x[i], b = x[i + kDims];
        x[i] = a * angles.cos[i] - b * angles.sin[i], x[i + kDims] = b * angles.cos[i] + a * angles.sin[i];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        Vec<8> v;
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = x[8 * i + j];
        store(line(i), v);
    }
    fence_async();
    named_barrier(4 + threadIdx.x / 128, 128);  // a warpgroup multiplies only rows of its own warps
}

template <bool kNorm> __device__ void attend(Shared& s, const Problem& p) {
    const int warpgroup = uniform(threadIdx.x / 128), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = 16 * warp + lane / 4;  // the thread also has row + 8
    const float scale_log2 = p.scale * kLog2e;
    const auto wait_for_turn = [&] { named_barrier(2 + warpgroup, kConsumers); };
    const auto pass_turn = [&] { named_arrive(3 - warpgroup, kConsumers); };
    unsigned blocks = 0, tiles = 0;  // finished so far; block i uses stage i % kStages
    const auto stage = [](unsigned i) { return i % kStages; };
    const auto parity = [](unsigned i) { return i / kStages % 2; };
    const bool causal = p.sequences.causal;
    if (warpgroup == 1) pass_turn();
    s.queue.for_each([&](const Tile t) {
        const int visible = uniform(visible_blocks(t));
        float out[64] = {}, scores[64], shrink[2];
        unsigned probabilities[8][4];
        Softmax softmax;
        const uint8_t* const q = s.q + 64 * 128 * warpgroup;
        const auto wait_for_values = [&](int n) {  // values of block n of keys, the previous one
            s.v_full[stage(blocks - 1)].wait(parity(blocks - 1));
            if ((n + 1) * kBlock > t.length) clear_values(s.v[stage(blocks - 1)], t.length - n * kBlock);
        };
        if (visible) {
            if constexpr (kNorm) {
                const Angles angles(p, t);  // loads while the queries are on their way
                s.q_full.wait(tiles++ % 2);
                norm_and_rotate(s, p, angles);
            } else {
                s.q_full.wait(tiles++ % 2);
            }
            for (int n = visible - 1; n >= 0; n--, blocks++) {
                const bool first = n == visible - 1;
                s.k_full[stage(blocks)].wait(parity(blocks));
                if (!first) wait_for_values(n + 1);
                wait_for_turn();
                wgmma_fence();
                multiply_keys(scores, q, s.k[stage(blocks)]);
                if (first) {
                    pass_turn();
                    wgmma_wait<0>(scores);
                } else {
                    wgmma_fence();
                    multiply_values(out, probabilities, s.v[stage(blocks - 1)]);
                    pass_turn();
                    wgmma_wait<1>(scores);
                }
                release(s.k_empty[stage(blocks)]);
                if (n == 0) release(s.q_empty);
                if ((n + 1) * kBlock > keys_seen(t, 64 * warpgroup, causal)) mask_scores(scores, t, causal, n, row);
                softmax.next(scores, scale_log2, shrink);
                if (!first) {
                    wgmma_wait<0>(out);
                    release(s.v_empty[stage(blocks - 1)]);
#pragma unroll
                    for (int i = 0; i < 64; i++) out[i] *= shrink[i / 2 % 2];
                }
                round_to_bf16(probabilities, scores);
            }
            wait_for_values(0);
            wgmma_fence();
            multiply_values(out, probabilities, s.v[stage(blocks - 1)]);
            wgmma_wait<0>(out);
            release(s.v_empty[stage(blocks - 1)]);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = softmax.sum[r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            const float inverse = sum > 0 || sum != sum ? reciprocal(sum) : 0;  // 0: the row sees no key
#pragma unroll
            for (int i = 0; i < 32; i++) out[i / 2 * 4 + 2 * r + i % 2] *= inverse;
            const int i = row + 8 * r;
            if (lane % 4 == 0 && i < t.rows)
                p.lse[int64_t{t.head} * p.sequences.Tq + t.first + i] = softmax.largest[r] * p.scale + logf(sum);
        }
#pragma unroll
        for (int part = 0; part < 2; part++)
            store_rows(s.staging[warp], out + 32 * part,
                       p.out + (t.first + 16 * warp) * p.out_row + t.head * kD + 64 * part, p.out_row,
                       t.rows - 16 * warp, 64);
    });
}

template <bool kNorm>
__global__ void __launch_bounds__(kThreads, 1) attention_fwd_kernel(const __grid_constant__ Problem p) {
    Shared& s = *dynamic_shared<Shared>();
    if (threadIdx.x == 0) {
        s.queue.init(), s.q_full.init(1), s.q_empty.init(kConsumers / 32);
        for (int i = 0; i < kStages; i++) {
            s.k_full[i].init(1), s.k_empty[i].init(kConsumers / 32);
            s.v_full[i].init(1), s.v_empty[i].init(kConsumers / 32);
        }
        publish_barriers();
    }
    if (kNorm && threadIdx.x < kD)
        s.q_weight[threadIdx.x] = p.fp32_weight ? static_cast<const float*>(p.q_weight)[threadIdx.x]
                                                : static_cast<float>(static_cast<const bf16*>(p.q_weight)[threadIdx.x]);
    if (threadIdx.x == kConsumers) prefetch_map(p.q), prefetch_map(p.k), prefetch_map(p.v);
    __syncthreads();
    s.counts.count(p.sequences, false, s.warp_sums);
    if (threadIdx.x >= kConsumers) {
        fewer_registers<40>();
        if (threadIdx.x < kConsumers + 32) load_tiles(s, p);
    } else {
        more_registers<232>();
        attend<kNorm>(s, p);
    }
}

}  // namespace

void attention_fwd(cudaStream_t stream, Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, Tensor out, Tensor lse,
                   bool causal, float scale, Tensor q_weight, Tensor cos, Tensor sin, Tensor positions, float eps) {
    const int64_t Tq = q.shape[0], Hq = q.shape[1], Tk = k.shape[0], Hkv = k.shape[1], B = cu_q.shape[0] - 1;
    LING_CHECK(q.is(DType::bf16, {Tq, Hq, kD}) && k.is(DType::bf16, {Tk, Hkv, kD}) && v.is(DType::bf16, {Tk, Hkv, kD}));
    LING_CHECK(out.is(DType::bf16, {Tq, Hq, kD}) && lse.is(DType::f32, {Hq, Tq}) && lse.contiguous());
    LING_CHECK(Hkv > 0 && Hq % Hkv == 0);
    if (!cu_k.data) cu_k = cu_q;
    LING_CHECK(cu_q.is(DType::i32, {B + 1}) && cu_q.contiguous() && B <= kMaxSequences && scale > 0);
    LING_CHECK(cu_k.is(DType::i32, {B + 1}) && cu_k.contiguous());
    if (!Tq || !B || !Hq) return;
    LING_CHECK(Tk > 0 && contiguous_heads(q) && contiguous_heads(k) && contiguous_heads(v) && contiguous_heads(out));
    Problem p{};
    p.q = map_of_heads(q, kBlock), p.k = map_of_heads(k, kBlock), p.v = map_of_heads(v, kBlock);
    const auto num = [](int64_t x) { return static_cast<int>(x); };
    p.sequences = {cu_q.ptr<int>(), cu_k.ptr<int>(), num(B), num(Tq), num(Tk), num(Hq), num(Hkv), causal};
    p.out = out.ptr<bf16>(), p.out_row = out.stride[0], p.lse = lse.ptr<float>(), p.scale = scale;
    p.counter = counter_of(stream);
    const int64_t tiles = (Tq / kBlock + std::min(B, Tq)) * Hq;  // at most
    const int blocks = std::min<int64_t>(multiprocessors(), tiles);
    if (!q_weight.ndim) return launch<attention_fwd_kernel<false>>(blocks, kThreads, sizeof(Shared), stream, p);
    LING_CHECK((q_weight.is(DType::bf16, {kD}) || q_weight.is(DType::f32, {kD})) && q_weight.contiguous());
    LING_CHECK(cos.is(DType::f32, {cos.shape[0], 32}) && cos.contiguous() && sin.is(DType::f32, {cos.shape[0], 32}));
    LING_CHECK((positions.is(DType::i32, {Tq}) || positions.is(DType::i64, {Tq})) && positions.contiguous());
    LING_CHECK(sin.contiguous() && cos.aligned() && sin.aligned());
    p.q_weight = q_weight.data, p.fp32_weight = q_weight.dtype == DType::f32;
    p.positions = positions.data, p.int64_positions = positions.dtype == DType::i64;
    p.cos = cos.ptr<float>(), p.sin = sin.ptr<float>(), p.P = cos.shape[0], p.eps = eps;
    launch<attention_fwd_kernel<true>>(blocks, kThreads, sizeof(Shared), stream, p);
}

}  // namespace ling

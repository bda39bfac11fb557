#include "attention/attention_decode.h"
#include "attention/new_tokens.cuh"
#include "counters.cuh"
#include "grid.cuh"
#include "quant/fp8_tile.cuh"

namespace ling {
namespace {

using namespace decode;

struct Shared {
    alignas(16) float outs[kWarps][kRows][kD];  // column d of a row at stored_at(d)
    float largest[kWarps][kRows], total[kWarps][kRows];
};

// Where a row's column d is stored: 8 lanes that store 16 bytes each, of 4 c and 2 g (see Warp), access different
// banks. kPer: elements of a chunk of values
template <int kPer> __device__ int stored_at(int row, int d) {
    constexpr int kSame = kPer / 4;  // values of c whose columns are multiples of 32 floats apart
    return d ^ 4 * (d / 32 % kSame + row % 2 * kSame);
}

// Combines the warps' results for the block's rows of a sequence, and stores them. The log-sum-exp of the scores is in
// base 2, like the scores. A warp takes every 4th row, a lane 4 columns.
template <int kPer> __device__ void combine_warps(const Shared& shared, float* partial, float* lse_log2, int rows) {
    const int lane = threadIdx.x % 32;
    for (int r = threadIdx.x / 32; r < rows; r += kWarps) {
        float largest = -INFINITY, total = 0;
        Vec<4> sum = {};
#pragma unroll
        for (int w = 0; w < kWarps; w++) largest = fmaxf(largest, shared.largest[w][r]);
        const float base = largest == -INFINITY ? 0.f : largest;
#pragma unroll
        for (int w = 0; w < kWarps; w++) {
            const float weight = exp2_approx(shared.largest[w][r] - base);
            const Vec<4> out = load<4>(&shared.outs[w][r][stored_at<kPer>(r, lane * 4)]);
            total += weight * shared.total[w][r];
#pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += weight * out[i];
        }
        const float inverse = reciprocal(total);  // at least 1
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] = total == 0 ? 0.f : sum[i] * inverse;
        store(partial + r * kD + lane * 4, sum);
        if (lane == 0) lse_log2[r] = total == 0 ? -INFINITY : largest + log2f(total);
    }
}

struct Result {
    void* out;
    uint8_t* out_q;    // with FP8, otherwise null
    float* out_scale;  // [B n, Hq], strides 1 and ld_scale
    int64_t ld_scale;
    int counter;  // the first of W * Hkv * tiles of rows
};

// Called by a warp: stores row r of sequence b and KV head h, which is one head. A lane has 4 columns.
template <typename T>
__device__ void store_result(const Result& to, const float (&x)[4], int Hkv, int b, int h, int r, int n,
                             const Divisor& G) {
    static_assert(kD == kBlock);
    const int lane = threadIdx.x % 32, head = h * G.value() + G.remainder(r), heads = Hkv * G.value();
    const int64_t token = int64_t{b} * n + G.quotient(r);
    const unsigned mine[2] = {pack<T>(x[0], x[1]), pack<T>(x[2], x[3])};
    alignas(16) T y[1][8];  // lane l < 16 stores columns 8 l to 8 l + 7, which lanes 2 l and 2 l + 1 have
#pragma unroll
    for (int i = 0; i < 4; i++)
        reinterpret_cast<unsigned*>(y[0])[i] = __shfl_sync(~0u, mine[i % 2], lane % 16 * 2 + i / 2);
    if (lane < 16)
        *reinterpret_cast<uint4*>(static_cast<T*>(to.out) + (token * heads + head) * kD + lane * 8) =
            *reinterpret_cast<const uint4*>(y[0]);
    if (to.out_q) store_rows<false>(y, token, lane < 16, head, to.out_q, to.out_scale, heads * kD, to.ld_scale);
}

// Called by a whole block: the result of a sequence without keys, for rows r0 ..
template <typename T>
__device__ void store_zeros(const Result& to, int Hkv, int b, int h, int r0, int n, const Divisor& G) {
    const int lane = threadIdx.x % 16, heads = Hkv * G.value();
#pragma unroll 1
    for (int r = r0 + threadIdx.x / 16; r < min(r0 + kRows, n * G.value()); r += kThreads / 16) {
        const int head = h * G.value() + G.remainder(r);
        const int64_t token = int64_t{b} * n + G.quotient(r), at = (token * heads + head) * kD + lane * 8;
        *reinterpret_cast<uint4*>(static_cast<T*>(to.out) + at) = {};
        if (to.out_q) *reinterpret_cast<uint2*>(to.out_q + at) = {};
        if (to.out_q && lane == 0) to.out_scale[head * to.ld_scale + token] = block_scale(0, false);
    }
}

// Called by a whole block: combines what the blocks of runs first .. stop - 1 found for rows r0 .. of sequence b and KV
// head h, in this order, and stores the result. A warp takes every 4th row.
template <typename T>
__device__ void combine_runs(const Result& to, const float* partial, const float* lse_log2, int Hkv, int b, int h,
                             int r0, int n, const Divisor& G, int first, int stop) {
    const int lane = threadIdx.x % 32, R = n * G.value(), rows = Hkv * R;
    for (int r = r0 + threadIdx.x / 32; r < min(r0 + kRows, R); r += kWarps) {
        float largest = -INFINITY, total = 0, sum[4] = {};
        for (int begin = first; begin < stop; begin += 32) {
            const int at = (begin + b) * rows + h * R + r;
            const float lse = begin + lane < stop ? lse_log2[at + lane * rows] : -INFINITY;  // lane l: of run begin + l
            const float* from = partial + int64_t{at} * kD + lane * 4;
            Vec<4> pieces[32] = {};  // all in flight
#pragma unroll
            for (int p = 0; p < 32; p++, from += rows * kD)
                if (begin + p < stop) pieces[p] = load<4>(from);
            float larger = fmaxf(largest, lse);
            for (int d = 16; d; d /= 2) larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, d));
            const float base = larger == -INFINITY ? 0.f : larger, shrink = exp2_approx(largest - base),
                        weight = exp2_approx(lse - base);
            largest = larger, total = total * shrink + warp_sum(weight);
#pragma unroll
            for (float& x : sum) x *= shrink;
#pragma unroll
            for (int p = 0; p < 32; p++) {
                const float p_weight = __shfl_sync(~0u, weight, p);
#pragma unroll
                for (int i = 0; i < 4; i++) sum[i] += p_weight * pieces[p][i];
            }
        }
        const float inverse = reciprocal(total);  // at least 1
#pragma unroll
        for (float& x : sum) x = total == 0 ? 0.f : x * inverse;
        store_result<T>(to, sum, Hkv, b, h, r, n, G);
    }
}

// Block (w, h, tile of rows) has run w of the tiles of keys of all sequences, for KV head h. The last of the blocks
// that have a run of a sequence combines their results. kAppends: the kernel first computes the queries, and the last n
// keys and values of every sequence, from `tokens`.
template <typename T, typename C, bool kAppends>
__global__ void __launch_bounds__(kThreads, 2)
    attention_decode_kernel(const T* q, NewTokens tokens, Cache cache, Result to, float* partial, float* lse_log2,
                            int n, Divisor G, float scale_log2) {
    __shared__ Shared shared;
    __shared__ std::conditional_t<kAppends, Fresh<T, C>, char> fresh;
    launch_dependents();
    wait_for_previous();
    std::conditional_t<kAppends, Weights<T>, NewTokens> weights(tokens);
    const Runs runs(cache);
    const int share = runs.share, R = n * G.value(), r0 = blockIdx.z * kRows, head = blockIdx.y;
    for (int b = blockIdx.x; b < cache.B; b += cache.W.value()) {
        const int length = runs.length_of(b);
        LING_DEVICE_CHECK(length == cache.used(length));
        if (!runs.tiles(length)) store_zeros<T>(to, cache.Hkv, b, head, r0, n, G);
    }
    int tile = blockIdx.x * share;
    if (tile >= runs.all) return;
    const int stop = min(tile + share, runs.all);
    int seq, begin;
    runs.find(tile, seq, begin);
    Warp<T, C, kAppends> me{cache};
    constexpr int kPer = decltype(me)::kPer;
    if constexpr (kAppends) me.fresh = &fresh;
    me.head = head;
    for (; tile < stop; seq++) {
        LING_DEVICE_CHECK(seq < cache.B && tile >= begin);
        const int length = runs.length_of(seq), end = begin + runs.tiles(length);
        if (tile < end) {
            me.seq = seq, me.used = cache.used(length);
            me.first = (tile - begin) * kTile, me.stop = min((min(stop, end) - begin) * kTile, me.used);
            me.cached = kAppends ? min(length - n, me.used) : me.used;
            me.lane_page = me.load_page(0);
            if constexpr (kAppends) {
                const Preparation<T, C> prepare{
                    tokens, cache, seq, head, me.first, me.stop, n, r0, min(R - r0, kRows), length - n, G, weights};
                for (int base = 0; base < prepare.jobs(); base += prepare.kAtOnce) {
                    const auto row = prepare.load_row(base);
                    if (base == 0) me.start();
                    prepare.finish(row, base, fresh);
                }
                __syncthreads();
            } else {
                me.start();
            }
            const T* row[2] = {};
            int last[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int r = r0 + me.g + 8 * i, token = G.quotient(r);
                if constexpr (kAppends) row[i] = r < R ? fresh.q[r - r0] : nullptr;
                else if (r < R)
                    row[i] =
                        q +
                        ((int64_t{seq} * n + token) * (cache.Hkv * G.value()) + head * G.value() + G.remainder(r)) * kD;
                last[i] = min(length - n + token, me.used - 1);
            }
            me.shown = min(length - n + G.quotient(r0) + 1, me.used);
            me.run(row[0], row[1], last, scale_log2);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int r = me.g + 8 * i;
                if (r0 + r >= R) continue;
                shared.largest[me.warp][r] = me.largest[i], shared.total[me.warp][r] = me.total[i];
#pragma unroll
                for (int j = 0; j < 16; j += 4)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int d = (2 * me.c + e + 8 * (j / kPer)) * kPer + j % kPer, element = 2 * i + e;
                        *reinterpret_cast<float4*>(&shared.outs[me.warp][r][stored_at<kPer>(r, d)]) = {
                            me.o[j][element], me.o[j + 1][element], me.o[j + 2][element], me.o[j + 3][element]};
                    }
            }
            __syncthreads();
            const int64_t at = (int64_t{blockIdx.x + seq} * cache.Hkv + head) * R + r0;
            combine_warps<kPer>(shared, partial + at * kD, lse_log2 + at, min(R - r0, kRows));
            // Only one sequence goes on in the next run, so that the sequence's first run names the counter.
            const int first = begin / share, last_run = (end - 1) / share;
            unsigned* const counter = counters + to.counter + (first * cache.Hkv + head) * gridDim.z + blockIdx.z;
            if (is_last(counter, last_run - first + 1))
                combine_runs<T>(to, partial, lse_log2, cache.Hkv, seq, head, r0, n, G, first, last_run + 1);
        }
        begin = end, tile = min(stop, end);
    }
}

// tokens null: q has the queries, and the cache has all keys and values.
void run(cudaStream_t stream, const Tensor& q, const NewTokens* tokens, const Tensor& k, const Tensor& v,
         const Tensor& k_scale, const Tensor& v_scale, const Tensor& block_table, const Tensor& lengths,
         const Tensor& out, const Tensor& out_q, const Tensor& out_scale, const Tensor& partial, const Tensor& lse_log2,
         float scale) {
    const int64_t B = out.shape[0], n = out.shape[1], Hq = out.shape[2], num_pages = k.shape[0];
    const int64_t page_size = k.shape[1], Hkv = k.shape[2], G = Hkv ? Hq / Hkv : 0;
    const int64_t max_pages = block_table.shape[1], W = partial.shape[0] - B;
    const bool fp8 = k.dtype == DType::e4m3;
    LING_CHECK(q.contiguous() && out.is(q.dtype, {B, n, Hq, kD}) && out.contiguous() && n > 0);
    LING_CHECK((fp8 || k.dtype == q.dtype) && Hkv > 0 && G > 0 && G * Hkv == Hq && page_size % kStep == 0);
    LING_CHECK(k.is(k.dtype, {num_pages, page_size, Hkv, kD}) && v.is(k.dtype, {num_pages, page_size, Hkv, kD}));
    LING_CHECK(k.contiguous() && v.contiguous());
    if (fp8) {
        LING_CHECK(k_scale.is(DType::f32, {num_pages, page_size, Hkv}) && k_scale.contiguous());
        LING_CHECK(v_scale.is(DType::f32, {num_pages, page_size, Hkv}) && v_scale.contiguous());
    }
    if (B == 0) return;
    LING_CHECK(block_table.is(DType::i32, {B, max_pages}) && block_table.contiguous());
    LING_CHECK(lengths.is(DType::i32, {B}) && lengths.contiguous());
    LING_CHECK(partial.is(DType::f32, {W + B, Hkv, n * G, kD}) && partial.contiguous() && W > 0);
    LING_CHECK(lse_log2.is(DType::f32, {W + B, Hkv, n * G}) && lse_log2.contiguous());
    LING_CHECK(max_pages * page_size < 1 << 30 && B * (ceil_div<int64_t>(max_pages * page_size, kTile) + 1) < 1 << 30);
    LING_CHECK(W + B < 1ll << 31 && Hq * n < 1 << 16 && num_pages * page_size < 1ll << 31);
    LING_CHECK((W + B) * Hq * n < 1ll << 31 && B * n * (Hq + 2 * Hkv) < 1ll << 31 && B * max_pages < 1ll << 31);
    LING_CHECK(!out_q.ndim || (out_q.is(DType::e4m3, {B * n, Hq * kD}) && out_q.contiguous() && out_q.aligned()));
    LING_CHECK(!out_q.ndim || (out_scale.is(DType::f32, {B * n, Hq}) && (B * n == 1 || out_scale.stride[0] == 1)));
    LING_CHECK(num_pages > 0 && page_size > 0 && max_pages > 0);
    LING_CHECK(q.aligned() && k.aligned() && v.aligned() && out.aligned() && partial.aligned());
    const auto num = [](int64_t x) { return static_cast<int>(x); };
    const Cache cache{
        k.data, v.data,   k_scale.ptr<float>(), v_scale.ptr<float>(), block_table.ptr<int>(), lengths.ptr<int>(),
        num(B), num(Hkv), num(num_pages),       num(max_pages),       Divisor(page_size),     Divisor(W)};
    const dim3 grid(W, Hkv, ceil_div<int64_t>(n * G, kRows));
    // With one run each sequence belongs to one block, which counts nothing.
    const int counter = W > 1 ? counter_of(stream, num(W * Hkv * grid.z)) : 0;
    const Result result{out.data, out_q.ptr<uint8_t>(), out_scale.ptr<float>(), out_scale.stride[1], counter};
    dispatch<f16, bf16>(q.dtype, [&]<typename T>() {
        const auto attend = [&]<typename C, bool kAppends>() {
            launch<attention_decode_kernel<T, C, kAppends>, kOverlaps>(
                grid, kThreads, 0, stream, q.ptr<T>(), tokens ? *tokens : NewTokens{}, cache, result,
                partial.ptr<float>(), lse_log2.ptr<float>(), num(n), Divisor(G), scale * 1.4426950408889634f);
        };
        const auto attend_to = [&]<typename C>(C) {
            tokens ? attend.template operator()<C, true>() : attend.template operator()<C, false>();
        };
        fp8 ? attend_to(uint8_t{}) : attend_to(T{});
    });
}

}  // namespace

void attention_decode_fwd(cudaStream_t stream, Tensor q, Tensor k, Tensor v, Tensor k_scale, Tensor v_scale,
                          Tensor block_table, Tensor lengths, Tensor out, Tensor partial, Tensor lse_log2,
                          float scale) {
    LING_CHECK(q.is(q.dtype, {out.shape[0], out.shape[1], out.shape[2], kD}));
    run(stream, q, nullptr, k, v, k_scale, v_scale, block_table, lengths, out, {}, {}, partial, lse_log2, scale);
}

void qk_norm_attention_decode_fwd(cudaStream_t stream, Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos,
                                  Tensor sin, Tensor k, Tensor v, Tensor k_scale, Tensor v_scale, Tensor block_table,
                                  Tensor lengths, Tensor out, Tensor out_q, Tensor out_scale, Tensor partial,
                                  Tensor lse_log2, float scale, float eps) {
    const int64_t n = out.shape[1], P = cos.shape[0];
    const bool fp32_weights = q_weight.dtype == DType::f32;
    LING_CHECK(qkv.is(qkv.dtype, {out.shape[0], n, out.shape[2] + 2 * k.shape[2], kD}) && n <= kMostNew);
    LING_CHECK((fp32_weights || q_weight.dtype == qkv.dtype) && q_weight.is(q_weight.dtype, {kD}) &&
               q_weight.contiguous());
    LING_CHECK(k_weight.is(q_weight.dtype, {kD}) && k_weight.contiguous());
    LING_CHECK(cos.is(DType::f32, {P, kHalf}) && cos.contiguous() && P < 1ll << 31);
    LING_CHECK(sin.is(DType::f32, {P, kHalf}) && sin.contiguous());
    LING_CHECK(q_weight.aligned() && k_weight.aligned() && cos.aligned() && sin.aligned());
    const NewTokens tokens{qkv.data,         q_weight.data,    k_weight.data,        fp32_weights,
                           cos.ptr<float>(), sin.ptr<float>(), static_cast<int>(P),  eps,
                           k.data,           v.data,           k_scale.ptr<float>(), v_scale.ptr<float>()};
    run(stream, qkv, &tokens, k, v, k_scale, v_scale, block_table, lengths, out, out_q, out_scale, partial, lse_log2,
        scale);
}

}  // namespace ling

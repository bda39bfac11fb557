#include "attention/attention.h"
#include "attention/tiles.cuh"
#include "counters.cuh"

namespace ling {
namespace {

// A tile of 128 rows of one side (queries, or keys) stays in shared memory while 64 rows at a time of the other side
// are loaded; a warpgroup has 64 of the 128 rows:
//   s = x y^T, dp = dx dy^T  with x, dx = q, dout (keys: k, v) and y, dy the same of the other side,
//   p = exp(scale s - lse), ds = p (dp - delta),  dq = scale ds k   (keys: dk = scale ds^T q, dv = p^T dout).
// p and ds are left operands of their products in registers, so scores of keys are computed transposed. Each sum has
// one writer. Blocks take tiles of keys first, as they have the most work.
constexpr int kOther = 64, kStages = 4;
constexpr int kBox = kBlock * 128, kOtherBox = kOther * 128;  // bytes of 64 columns

struct Maps {
    TensorMap x, dx, y, dy;
};

struct Problem {
    Maps of_queries, of_keys;  // for tiles of queries, and of keys
    TensorMap lse, delta;
    Sequences sequences;
    const float *lse_at, *delta_at;  // [Hq, stride]: start_s = -lse / scale and start_dp = -delta
    int64_t stride;
    bf16 *dq, *dk, *dv;
    int64_t dq_row, dk_row, dv_row;
    float scale;
    int counter;  // of the tiles that blocks have taken
};

struct Shared {
    alignas(1024) uint8_t x[2 * kBox], dx[2 * kBox];
    alignas(1024) uint8_t y[kStages][2 * kOtherBox], dy[kStages][2 * kOtherBox];
    alignas(128) float lse[kStages][kOther], delta[kStages][kOther];  // of the loaded queries
    alignas(128) uint8_t staging[kConsumers / 32][16 * 128];
    TileQueue queue;
    TileCounts counts_q, counts_k;
    int warp_sums[kThreads / 32];
    Barrier rows_empty, full[kStages], empty[kStages];
};

// The first row of the other side, rounded down to a block
__device__ int first_row(const Tile& t) { return t.begin / kOther * kOther; }

__device__ void load_pair(uint8_t* to, uint8_t* to2, const TensorMap& map, const TensorMap& map2, Barrier& full,
                          int box, int head, int row) {
#pragma unroll 1
    for (int i = 0; i < 2; i++) {
        load_tile(to + i * box, map, full, head * kD + 64 * i, row);
        load_tile(to2 + i * box, map2, full, head * kD + 64 * i, row);
    }
}

__device__ void load_tiles(Shared& s, const Problem& p) {
    Ring<kStages> ring;
    unsigned rows = 0;  // the parity to wait for
    const int of_keys = s.counts_k.before[p.sequences.B] * p.sequences.Hkv;
    const int all = of_keys + s.counts_q.before[p.sequences.B] * p.sequences.Hq;
    const auto find = [&](int number) {
        const bool keys = number < of_keys;
        return find_tile(p.sequences, keys ? s.counts_k : s.counts_q, keys, keys ? number : number - of_keys);
    };
    s.queue.share(counters + p.counter, all, find, [&](const Tile& t) {
        const Maps& maps = t.keys ? p.of_keys : p.of_queries;
        bool first = true;  // this stage also loads the tile's own rows
        for (int h = t.other_head; h < t.other_head + t.heads; h++)
            for (int n = first_row(t); n < t.end; n += kOther, ring.next(), first = false) {
                Barrier& full = s.full[ring.stage];
                s.empty[ring.stage].wait(ring.parity ^ 1);
                full.arrive_and_expect(4 * kOtherBox + (t.keys ? 2 * kOther * 4 : 0) + (first ? 4 * kBox : 0));
                if (first) {
                    s.rows_empty.wait(rows ^= 1);
                    load_pair(s.x, s.dx, maps.x, maps.dx, full, kBox, t.head, t.first);
                }
                load_pair(s.y[ring.stage], s.dy[ring.stage], maps.y, maps.dy, full, kOtherBox, h, t.others + n);
                if (t.keys) {
                    load_tile(s.lse[ring.stage], p.lse, full, t.others + n, h);
                    load_tile(s.delta[ring.stage], p.delta, full, t.others + n, h);
                }
            }
    });
}

// Starts scores [64, 64] += x y^T
__device__ void multiply_rows(float (&scores)[32], const uint8_t* x, const uint8_t* y) {
#pragma unroll
    for (int i = 0; i < kD / 16; i++)
        wgmma_bf16(scores, operand_after(x, i / 4 * kBox + i % 4 * 32),
                   operand_after(y, i / 4 * kOtherBox + i % 4 * 32), true);
    wgmma_commit();
}

// Starts sum += a y
__device__ void add_product(float (&sum)[64], const unsigned (&a)[4][4], const uint8_t* y) {
#pragma unroll
    for (int i = 0; i < kOther / 16; i++)
        wgmma_bf16_registers(sum, a[i], operand_after(y, i * 16 * 128, kOtherBox), true);
}

// Rows past the sequence's end belong to another sequence and may be NaN: 0 times NaN is NaN.
__device__ void clear_rows(uint8_t* y, uint8_t* dy, int from) {
    clear_lines<kOther>(y, 2, from, kConsumers);
    clear_lines<kOther>(dy, 2, from, kConsumers);
    fence_async();
    named_barrier(1, kConsumers);
}

// Computes tile t: dq of its queries, or dk and dv of its keys. done: blocks of the other side finished so far; block i
// uses stage i % kStages.
template <bool kKeys> __device__ void differentiate(Shared& s, const Problem& p, const Tile& t, unsigned& done) {
    const int warpgroup = uniform(threadIdx.x / 128), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int row = 16 * warp + lane / 4, column = lane % 4 * 2;  // the thread also has row + 8
    const float scale_log2 = p.scale * kLog2e;
    const bool causal = p.sequences.causal;
    float sum[64] = {}, sum2[64] = {};  // dq; or dk and dv
    float lse[2] = {}, delta[2] = {};   // of the tile's queries
    if (!kKeys)
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (row + 8 * r < t.rows) {
                const int64_t index = t.head * p.stride + t.first + row + 8 * r;
                lse[r] = p.lse_at[index], delta[r] = p.delta_at[index];
            }
    const int begin = first_row(t);
    int blocks_left = t.heads * max(ceil_div(t.end - begin, kOther), 0);
    const bool any = blocks_left;
    for (int n = begin; blocks_left; blocks_left--, done++) {
        const int stage = done % kStages;
        s.full[stage].wait(done / kStages % 2);
        const uint8_t *y = s.y[stage], *dy = s.dy[stage];
        if (n + kOther > t.end) clear_rows(s.y[stage], s.dy[stage], t.end - n);
        float scores[32], dp[32];  // start at -lse / scale and -delta of their query
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const int c = i / 4 * 8 + i % 2 + column, r = i / 2 % 2;
            scores[i] = kKeys ? s.lse[stage][c] : lse[r];
            dp[i] = kKeys ? s.delta[stage][c] : delta[r];
        }
        pin(scores), pin(dp);
        wgmma_fence();
        multiply_rows(scores, s.x + 64 * 128 * warpgroup, y);
        multiply_rows(dp, s.dx + 64 * 128 * warpgroup, dy);
        wgmma_wait<1>(scores);

        // Most blocks need no mask: every query sees every key of the block. Elsewhere hidden scores become -inf
        // and their dp, which may be a NaN of another sequence, 0.
        const int other = kKeys ? n : n + kOther - 1, edge = kKeys ? t.offset + kBlock - 1 : t.offset;
        const bool masked =
            n + kOther > t.end || (causal && !(kKeys ? other + t.shift >= edge : other <= edge + t.shift));
        int from[2], to[2];  // what each of the thread's two rows sees, as columns after n + column
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int tile_row = t.offset + row + 8 * r;
            from[r] = causal && kKeys ? tile_row - t.shift - n - column : -kOther;
            to[r] = (causal && !kKeys ? min(tile_row + t.shift + 1, t.end) : t.end) - n - column;
        }
        const auto hidden = [&](int i) {
            const int c = i / 4 * 8 + i % 2, r = i / 2 % 2;
            return (kKeys && c < from[r]) | (c >= to[r]);
        };
        if (masked)
#pragma unroll
            for (int i = 0; i < 32; i++) scores[i] = hidden(i) ? -INFINITY : scores[i];
#pragma unroll
        for (int i = 0; i < 32; i++) scores[i] = exp2_approx(scores[i] * scale_log2);
        pin(scores);  // before the wait for dp, which the exponentials overlap
        unsigned rounded[4][4], rounded2[4][4];
        if (kKeys) round_to_bf16(rounded2, scores);
        wgmma_wait<0>(dp);
        if (masked)
#pragma unroll
            for (int i = 0; i < 32; i++) dp[i] = hidden(i) ? 0 : dp[i];
#pragma unroll
        for (int i = 0; i < 32; i++) dp[i] *= scores[i];
        round_to_bf16(rounded, dp);
        wgmma_fence();
        if (kKeys) add_product(sum2, rounded2, dy);
        add_product(sum, rounded, y);
        wgmma_commit();
        wgmma_wait<0>(sum);
        if (kKeys) wgmma_wait<0>(sum2);
        release(s.empty[stage]);
        n = n + kOther < t.end ? n + kOther : begin;
    }
    if (any) release(s.rows_empty);
#pragma unroll
    for (int i = 0; i < 64; i++) sum[i] *= p.scale;
    const auto store = [&](const float (&d)[64], bf16* out, int64_t out_row) {
#pragma unroll
        for (int part = 0; part < 2; part++)
            store_rows(s.staging[warp], d + 32 * part, out + (t.first + 16 * warp) * out_row + t.head * kD + 64 * part,
                       out_row, t.rows - 16 * warp, 64);
    };
    store(sum, kKeys ? p.dk : p.dq, kKeys ? p.dk_row : p.dq_row);
    if (kKeys) store(sum2, p.dv, p.dv_row);
}

__global__ void __launch_bounds__(kThreads, 1) attention_bwd_kernel(const __grid_constant__ Problem p) {
    Shared& s = *dynamic_shared<Shared>();
    if (threadIdx.x == 0) {
        s.queue.init(), s.rows_empty.init(kConsumers / 32);
        for (int i = 0; i < kStages; i++) s.full[i].init(1), s.empty[i].init(kConsumers / 32);
        publish_barriers();
    }
    __syncthreads();
    s.counts_q.count(p.sequences, false, s.warp_sums);
    s.counts_k.count(p.sequences, true, s.warp_sums);
    wait_for_previous();  // attention_delta_kernel
    if (threadIdx.x >= kConsumers) {
        fewer_registers<40>();
        if (threadIdx.x < kConsumers + 32) load_tiles(s, p);
    } else {
        more_registers<232>();
        unsigned done = 0;
        s.queue.for_each(
            [&](const Tile& t) { t.keys ? differentiate<true>(s, p, t, done) : differentiate<false>(s, p, t, done); });
    }
}

// Half a warp per row: the start values of its scores, -lse / scale, and of dp, -delta = -dout . out.
__global__ void __launch_bounds__(256)
    attention_delta_kernel(const bf16* dout, int64_t dout_row, const bf16* out, int64_t out_row, const float* lse,
                           float* start_s, float* start_dp, float inverse_scale, int T, int H, int64_t stride) {
    launch_dependents();
    constexpr int kLanes = kD / 8;
    const int row = blockIdx.x * (256 / kLanes) + threadIdx.x / kLanes;
    const int64_t t = row / H, h = row % H;
    const int lane = threadIdx.x % kLanes;
    float sum = 0;
    if (t < T) {
        const auto a = load<8>(dout + t * dout_row + h * kD + lane * 8);
        const auto b = load<8>(out + t * out_row + h * kD + lane * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += a[i] * b[i];
    }
    for (int d = kLanes / 2; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane || t >= T) return;
    start_dp[h * stride + t] = -sum;
    start_s[h * stride + t] = -lse[h * T + t] * inverse_scale;
}

}  // namespace

void attention_bwd(cudaStream_t stream, Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_q,
                   Tensor cu_k, Tensor dq, Tensor dk, Tensor dv, bool causal, float scale, Tensor scratch) {
    const int64_t Tq = q.shape[0], Hq = q.shape[1], Tk = k.shape[0], Hkv = k.shape[1], B = cu_q.shape[0] - 1;
    const int64_t stride = (Tq + 3) / 4 * 4;
    for (const Tensor* t : {&q, &dout, &out, &dq}) LING_CHECK(t->is(DType::bf16, {Tq, Hq, kD}) && contiguous_heads(*t));
    for (const Tensor* t : {&k, &v, &dk, &dv}) LING_CHECK(t->is(DType::bf16, {Tk, Hkv, kD}) && contiguous_heads(*t));
    LING_CHECK(lse.is(DType::f32, {Hq, Tq}) && lse.contiguous() && Hkv > 0 && Hq % Hkv == 0);
    LING_CHECK(scratch.is(DType::f32, {2, Hq, stride}) && scratch.contiguous() && scratch.aligned());
    if (!cu_k.data) cu_k = cu_q;
    LING_CHECK(cu_q.is(DType::i32, {B + 1}) && cu_q.contiguous() && B > 0 && B <= kMaxSequences && Tq > 0 && Tk > 0);
    LING_CHECK(cu_k.is(DType::i32, {B + 1}) && cu_k.contiguous());
    LING_CHECK(Tq * Hq < (1ll << 31) - 16);
    Problem p{};
    p.lse_at = scratch.ptr<float>(), p.delta_at = p.lse_at + Hq * stride, p.stride = stride;
    launch<attention_delta_kernel>(ceil_div<int64_t>(Tq * Hq, 16), 256, 0, stream, dout.ptr<bf16>(), dout.stride[0],
                                   out.ptr<bf16>(), out.stride[0], lse.ptr<float>(), scratch.ptr<float>(),
                                   scratch.ptr<float>() + Hq * stride, 1 / scale, static_cast<int>(Tq),
                                   static_cast<int>(Hq), stride);

    const auto num = [](int64_t x) { return static_cast<int>(x); };
    p.sequences = {cu_q.ptr<int>(), cu_k.ptr<int>(), num(B), num(Tq), num(Tk), num(Hq), num(Hkv), causal};
    p.of_queries = {map_of_heads(q, kBlock), map_of_heads(dout, kBlock), map_of_heads(k, kOther),
                    map_of_heads(v, kOther)};
    p.of_keys = {map_of_heads(k, kBlock), map_of_heads(v, kBlock), map_of_heads(q, kOther), map_of_heads(dout, kOther)};
    p.lse = encode_map(p.lse_at, DType::f32, Hq, stride, stride * 4, 1, kOther, false);
    p.delta = encode_map(p.delta_at, DType::f32, Hq, stride, stride * 4, 1, kOther, false);
    p.dq = dq.ptr<bf16>(), p.dk = dk.ptr<bf16>(), p.dv = dv.ptr<bf16>();
    p.dq_row = dq.stride[0], p.dk_row = dk.stride[0], p.dv_row = dv.stride[0];
    p.scale = scale, p.counter = counter_of(stream);
    const auto tiles = [&](int64_t T, int64_t H) { return (T / kBlock + std::min(B, T)) * H; };  // at most
    const int blocks = std::min<int64_t>(multiprocessors(), tiles(Tq, Hq) + tiles(Tk, Hkv));
    launch<attention_bwd_kernel, kOverlaps>(blocks, kThreads, sizeof(Shared), stream, p);
}

}  // namespace ling

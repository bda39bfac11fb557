// The FP8 GEMM of Hopper: tokens [M, K] times weights [N, K]^T, ragged by groups. docs/kernels.md draws it.
//
// A persistent block has one warpgroup that loads and two that multiply; a ring of stages lies between them, each with
// 128 of K of a tile's operands and scales. A multiplying warpgroup has 64 rows of the tile to itself: it takes part
// of the sum from the tensor cores, scales it, adds it in fp32, and writes its rows alone. So one warpgroup's
// scaling and writing hide behind the other's products, and while K is short the next tile is there before this one
// is written.
#pragma once
#include "quant/fp8.cuh"
#include "ragged.cuh"
#include "sm90.cuh"

namespace ling::gemm_fp8 {

constexpr int kConsumers = 256, kThreads = kConsumers + 128, kBand = 16;
constexpr int kSharedMemory = 227 << 10, kStaging = 16 << 10, kMaxGroups = 512;

enum class Scales { blocks, rows };     // of the weights: per 128 x 128, or per 1 x 128
enum class Output { plain, swiglu };    // swiglu: a tile's two halves are gate and up, and y is quantised
enum class Tokens { tiles, gathered };  // by TMA, or row by row through `source`
enum class Contraction { all, group };  // group: not the rows but the contraction is a group's, and y has a matrix each

enum class Weights { by_rows, turned };  // turned: [K, N] in memory; the loading warpgroup transposes their tiles

// kTokens 0: the tokens are wgmma's M operand, 128 a tile. Otherwise they are its N operand, so few a tile, and the
// weights are M, of which 64 are the least. kHalves: how often 128 rows of the weights a tile has.
template <int kTokens, int kHalves_, Scales kScales, Output kOutput, Tokens kLoad, Contraction kOver,
          Weights kWeights = Weights::by_rows>
struct Variant {
    static constexpr bool kSwap = kTokens > 0;
    static constexpr int kBlockM = kSwap ? kTokens : 128, kHalves = kHalves_, kBlockN = 128 * kHalves;
    static constexpr bool kTall = kScales == Scales::rows, kSwiglu = kOutput == Output::swiglu;
    static constexpr bool kGather = kLoad == Tokens::gathered, kContract = kOver == Contraction::group;
    static constexpr bool kTurned = kWeights == Weights::turned;
    static constexpr int kUnit = 128;                       // of K: what one scale covers
    static constexpr int kRegs = kSwap ? kTokens / 2 : 64;  // a thread's part of one product

    static constexpr int kABytes = kBlockM * 128, kBBytes = kBlockN * 128;
    static constexpr int kAScaleBytes = kBlockM * 4 > 128 ? kBlockM * 4 : 128, kBScaleBytes = kTall ? kBlockN * 4 : 0;
    static constexpr int kTokenBytes = kABytes + kBlockM * 4;  // what TMA brings of them
    static constexpr int kStageBytes = kABytes + kBBytes + kAScaleBytes + kBScaleBytes;
    static constexpr int kTableBytes = 3 * 4 * (kMaxGroups + 1) + 4;
    static constexpr int kFree = kSharedMemory - kStaging - kTableBytes - 1024;
    static constexpr int kStages = kFree / kStageBytes < 8 ? kFree / kStageBytes : 8;
    static_assert(kStages >= 3 && kABytes % 1024 == 0);
};

template <typename V> struct Shared {
    alignas(1024) uint8_t a[V::kStages][V::kABytes];
    alignas(1024) uint8_t b[V::kStages][V::kBBytes];
    alignas(128) float a_scale[V::kStages][V::kAScaleBytes / 4];
    alignas(128) float b_scale[V::kStages][V::kTall ? V::kBlockN : 1];
    alignas(128) uint8_t staging[kStaging];  // of results, on their way to coalesced stores
    // Group g has the rows (or, with kContract, the units of K) first[g] .. first[g] + rows[g], and of all tiles of
    // rows the ones from tiles[g].
    int tiles[kMaxGroups + 1], first[kMaxGroups + 1], rows[kMaxGroups + 1];
    int warp_sums[kThreads / 32];
    Barrier full[V::kStages], empty[V::kStages], raw[V::kTurned ? V::kStages : 1];
};

struct Problem {
    TensorMap a, a_scale, b, b_scale;
    const uint8_t* tokens;  // and, to gather them:
    const float* token_scale;
    const int* source;
    int64_t tokens_m, token_scale_m, token_scale_k;
    int topk;
    const int *offsets, *counts;  // of groups; neither: all M rows are one
    const float* weight_scale;    // per block
    int weight_scale_g, weight_scale_n, weight_scale_k;
    void* y;
    float* y_scale;
    int64_t y_g, y_m, y_scale_k;
    int M, N, K, G, max_m;
    bool fp32, accumulate;
};

struct Tile {
    int group, m, n, rows;  // rows: how many of the tile's rows are the group's
    int k, blocks;          // of the contraction, in units of V::kUnit
};

template <typename V> __device__ void count_group_tiles(Shared<V>& s, const Problem& p) {
    count_tiles(s.tiles, s.warp_sums, p.G, [&](int g) {
        int first = p.offsets ? p.offsets[g] : g * p.max_m;
        int rows = p.offsets ? p.offsets[g + 1] - first : p.counts ? p.counts[g] : p.M;
        LING_DEVICE_CHECK(rows >= 0 && first >= 0 && first + rows <= (V::kContract ? p.K : p.M));
        LING_DEVICE_CHECK(!p.counts || rows <= p.max_m);
        LING_DEVICE_CHECK(!V::kContract || (first % V::kUnit == 0 && rows % V::kUnit == 0));
        if (V::kContract) first /= V::kUnit, rows /= V::kUnit;
        s.first[g] = first, s.rows[g] = rows;
        return ceil_div(V::kContract ? p.M : rows, V::kBlockM);
    });
}

// Tile -> place, by a whole warp: all tiles of a group before those of the next; in it, down the rows of a band of
// kBand, then to the next columns, so that a band's rows and what they share of the weights stay in L2.
template <typename V> __device__ bool find_tile(const Shared<V>& s, const Problem& p, int tile, Tile& found) {
    constexpr int kWidth = V::kSwiglu ? V::kBlockN / 2 : V::kBlockN;
    const int tiles_n = ceil_div(V::kSwiglu ? p.N / 2 : p.N, kWidth);
    if (tile / tiles_n >= s.tiles[p.G]) return false;
    const int g = find_group(s.tiles, p.G, tile / tiles_n);
    int own = tile - s.tiles[g] * tiles_n;
    const int tiles_m = s.tiles[g + 1] - s.tiles[g], band = own / (kBand * tiles_n);
    own -= band * kBand * tiles_n;
    const int height = min(tiles_m - band * kBand, kBand), m = (band * kBand + own % height) * V::kBlockM;
    const int end = V::kContract ? p.M : s.rows[g];
    found.group = g, found.m = V::kContract ? m : s.first[g] + m, found.n = own / height * kWidth;
    found.rows = min(end - m, V::kBlockM);
    found.k = V::kContract ? s.first[g] : 0, found.blocks = V::kContract ? s.rows[g] : p.K / 128;
    return true;
}

template <typename V> __device__ void load_weights(Shared<V>& s, const Problem& p, const Tile& t, int stage, int k) {
    const int group_row = V::kContract ? 0 : t.group * (V::kTurned ? p.K : p.N), up = V::kSwiglu ? p.N / 2 : 128;
#pragma unroll
    for (int h = 0; h < V::kHalves; h++) {
        uint8_t* to = s.b[stage] + h * 128 * 128;
        const int row = t.n + h * up;
        if (V::kTurned) load_tile(to, p.b, s.raw[stage], row, group_row + k * 128);
        else load_tile(to, p.b, s.full[stage], k * 128, group_row + row);
        if (V::kTall) load_tile(s.b_scale[stage] + h * 128, p.b_scale, s.full[stage], row, k);
    }
}

template <typename V> __device__ void load_tokens(Shared<V>& s, const Problem& p, const Tile& t, int stage, int k) {
    load_tile(s.a[stage], p.a, s.full[stage], k * 128, t.m);
    load_tile(s.a_scale[stage], p.a_scale, s.full[stage], t.m, k);
}

template <typename V> __device__ void load_tiles(Shared<V>& s, const Problem& p) {
    Ring<V::kStages> ring;
    Tile t;
    for (int tile = blockIdx.x; find_tile(s, p, tile, t); tile += gridDim.x) {
        for (int k = t.k; k < t.k + t.blocks; k++, ring.next()) {
            if (threadIdx.x % 32) continue;
            s.empty[ring.stage].wait(ring.parity ^ 1);
            s.full[ring.stage].arrive_and_expect(V::kTokenBytes + V::kBBytes + V::kBScaleBytes);
            load_tokens(s, p, t, ring.stage, k);
            load_weights(s, p, t, ring.stage, k);
        }
        __syncwarp();
    }
}

// Tokens through `source`: 8 threads copy a row of 128 bytes. A stage is handed on kInFlight steps after its copies
// began.
template <typename V> __device__ void load_gathered(Shared<V>& s, const Problem& p) {
    constexpr int kInFlight = 2, kRows = V::kBlockM / 16;
    const int thread = threadIdx.x - kConsumers, chunk = thread % 8, line = thread / 8;
    Ring<V::kStages> ring, ready;
    int open = 0;
    const auto hand_on = [&] {
        fence_async();
        s.full[ready.stage].arrive();
        ready.next(), open--;
    };
    Tile t;
    for (int tile = blockIdx.x; find_tile(s, p, tile, t); tile += gridDim.x) {
        int token[kRows];  // -1: past the group's end
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const int r = line + 16 * i;
            token[i] = r < t.rows ? p.source[t.m + r] / p.topk : -1;
        }
        const int own = thread < t.rows ? p.source[t.m + thread] / p.topk : -1;
        for (int k = 0; k < t.blocks; k++, ring.next()) {
            s.empty[ring.stage].wait(ring.parity ^ 1);
            if (thread == 0) {
                s.full[ring.stage].arrive_and_expect(V::kBBytes + V::kBScaleBytes);
                load_weights(s, p, t, ring.stage, k);
            }
#pragma unroll
            for (int i = 0; i < kRows; i++) {
                const uint8_t* from = p.tokens + max(token[i], 0) * p.tokens_m + k * 128 + chunk * 16;
                copy_async<16>(s.a[ring.stage] + swizzled(line + 16 * i, chunk), from, token[i] < 0);
            }
            if (thread < V::kBlockM)
                copy_async<4>(&s.a_scale[ring.stage][thread],
                              p.token_scale + max(own, 0) * p.token_scale_m + k * p.token_scale_k, own < 0);
            commit_copies();
            if (++open > kInFlight) wait_copies<kInFlight>(), hand_on();
        }
    }
    wait_copies<0>();
    while (open) hand_on();
}

// The 128 x 128 bytes of a tile in place, by one warpgroup. Its warps load all of it before one stores: with each load,
// 16 lines of 2 chunks. The order of the lines, and which of both chunks a lane takes first, avoid bank conflicts.
__device__ inline void transpose_tile(uint8_t* tile) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, matrix = lane / 8, i = lane % 8;
    const bool left = lane % 4 < 2, upper = lane / 4 < 4;        // of what this lane holds
    const auto chunk = [](int j) { return j % 2 + j / 2 * 4; };  // and the one that is 2 further
    unsigned r[8][4];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int n = (2 * warp + j / 4) * 16 + i / 2 * 4 + i % 2 + matrix % 2 * 2;
        load_transposed(r[j], tile + swizzled(n, chunk(j % 4) ^ ((i < 4) == (matrix < 2) ? 0 : 2)));
    }
    named_barrier(3, 128);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        unsigned out[4];
#pragma unroll
        for (int c = 0; c < 2; c++) {  // the chunks
            const bool first = left == (c == 0);
            const unsigned low = first ? r[j][0] : r[j][2], high = first ? r[j][1] : r[j][3];
            const unsigned even = __byte_perm(low, high, 0x6420), odd = __byte_perm(low, high, 0x7531);
            out[2 * c] = upper ? even : odd, out[2 * c + 1] = upper ? odd : even;
        }
        const int line = (chunk(j % 4) + matrix / 2 * 2) * 16 + 2 * i + ((matrix % 2 == 1) == (i < 4));
        store_matrices(tile + swizzled(line, 2 * warp + j / 4), out);
    }
}

// Weights whose contraction is outermost: kAhead steps after its loads began, a stage's weights are transposed.
template <typename V> __device__ void load_and_turn(Shared<V>& s, const Problem& p) {
    constexpr int kAhead = 2;
    Ring<V::kStages> ring, here;
    Tile t;
    int tile = blockIdx.x, k = 0, open = 0;
    for (bool more = find_tile(s, p, tile, t); more || open;) {
        if (more && open < kAhead) {
            if (threadIdx.x == kConsumers) {
                s.empty[ring.stage].wait(ring.parity ^ 1);
                s.full[ring.stage].arrive_and_expect(V::kTokenBytes);
                s.raw[ring.stage].arrive_and_expect(V::kBBytes);
                load_tokens(s, p, t, ring.stage, k);
                load_weights(s, p, t, ring.stage, k);
            }
            ring.next(), open++;
            if (++k == t.blocks) k = 0, more = find_tile(s, p, tile += gridDim.x, t);
            continue;
        }
        s.raw[here.stage].wait(here.parity);
        __syncwarp();
#pragma unroll 1
        for (int h = 0; h < V::kHalves; h++) transpose_tile(s.b[here.stage] + h * 128 * 128);
        fence_async();
        s.full[here.stage].arrive();
        here.next(), open--;
    }
}

// A thread's place in what its warpgroup multiplies: the rows `row` and row + 8 of its 64, and of each 8 columns two.
struct Place {
    int warpgroup, row, column;
    __device__ Place()
        : warpgroup(threadIdx.x / 128),
          row(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4),
          column(threadIdx.x % 4 * 2) {}
};

// sum[h] += the products of one stage with their scales
template <typename V>
__device__ void multiply(Shared<V>& s, int stage, const float (&w_scale)[V::kHalves], bool busy, int halves,
                         float (&sum)[V::kHalves][V::kRegs]) {
    const Place at;
    const float* x_scale = s.a_scale[stage];
    const float upper = x_scale[V::kSwap ? 0 : 64 * at.warpgroup + at.row];
    const float lower = x_scale[V::kSwap ? 0 : 64 * at.warpgroup + at.row + 8];
#pragma unroll
    for (int h = 0; h < V::kHalves; h++) {
        if (!busy || h >= halves) break;
        const uint8_t* x = s.a[stage] + (V::kSwap ? 0 : 64 * 128 * at.warpgroup);
        const uint8_t* w = s.b[stage] + 128 * 128 * h + (V::kSwap ? 64 * 128 * at.warpgroup : 0);
        float part[V::kRegs];
        const uint64_t first = operand(V::kSwap ? w : x), second = operand(V::kSwap ? x : w);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma_fp8(part, first + 2 * k, second + 2 * k, k > 0);
        wgmma_commit();
        wgmma_wait<0>(part);
#pragma unroll
        for (int j = 0; j < V::kRegs / 4; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int column = 8 * j + at.column + c;
                if (V::kSwap) {
                    const float scale = x_scale[column] * w_scale[h];
                    sum[h][4 * j + c] += part[4 * j + c] * scale;
                    sum[h][4 * j + 2 + c] += part[4 * j + 2 + c] * scale;
                } else {
                    const float scale = V::kTall ? s.b_scale[stage][128 * h + column] : w_scale[h];
                    sum[h][4 * j + c] += part[4 * j + c] * (upper * scale);
                    sum[h][4 * j + 2 + c] += part[4 * j + 2 + c] * (lower * scale);
                }
            }
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) s.empty[stage].arrive();
}

__device__ inline float silu(float x) { return x / (1 + __expf(-x)); }

// Adds what y holds, where it is to be added to, and stores fp32 results: 4 lanes have 32 bytes of a row.
template <typename V>
__device__ void finish_in_place(const Problem& p, const Tile& t, float (&sum)[V::kHalves][V::kRegs]) {
    constexpr int kBatch = V::kRegs < 32 ? V::kRegs : 32;  // loads in flight
    const Place at;
#pragma unroll
    for (int i = 0; i < V::kHalves * V::kRegs; i += kBatch) {
        float* const d = sum[i / V::kRegs] + i % V::kRegs;
        float old[kBatch] = {};
        const auto each = [&](auto&& f) {
#pragma unroll
            for (int j = 0; j < kBatch; j += V::kSwap ? 1 : 2) {
                const int r = i % V::kRegs + j;
                const int row = 64 * at.warpgroup + at.row + (r & 2) * 4, column = r / 4 * 8 + at.column + (r & 1);
                const int m = V::kSwap ? column : row, n = t.n + i / V::kRegs * 128 + (V::kSwap ? row : column);
                if (m < t.rows && n < p.N) f(j, t.group * p.y_g + (t.m + m) * p.y_m + n);
            }
        };
        if (p.accumulate)
            each([&](int j, int64_t place) {
                if (p.fp32) {
                    const float* y = static_cast<const float*>(p.y) + place;
                    old[j] = y[0];
                    if (!V::kSwap) old[j + 1] = y[1];
                } else {
                    const bf16* y = static_cast<const bf16*>(p.y) + place;
                    old[j] = static_cast<float>(y[0]);
                    if (!V::kSwap) old[j + 1] = static_cast<float>(y[1]);
                }
            });
#pragma unroll
        for (int j = 0; j < kBatch; j++) d[j] += old[j];
        if (p.fp32)
            each([&](int j, int64_t place) {
                float* y = static_cast<float*>(p.y) + place;
                if constexpr (V::kSwap) *y = d[j];
                else *reinterpret_cast<float2*>(y) = {d[j], d[j + 1]};
            });
    }
}

// 16 bytes of a staged line of 128: where they belong, if they are the group's
__device__ inline void store_chunk(const uint8_t* lines, int line, int chunk, uint8_t* to) {
    *reinterpret_cast<uint4*>(to + chunk * 16) = *reinterpret_cast<const uint4*>(lines + swizzled(line, chunk));
}

// Tokens are rows of the warpgroup's product: a warp has 16 of them to itself.
template <typename V>
__device__ void write_rows(Shared<V>& s, const Problem& p, const Tile& t, const float (&sum)[V::kHalves][V::kRegs]) {
    const Place at;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = lane / 4, first = 16 * warp;
    uint8_t* lines = s.staging + warp * 16 * 128;
    if constexpr (V::kSwiglu) {
#pragma unroll
        for (int i = 0; i < 2; i++) {  // the upper row, and the lower
            float y[32];
            unsigned largest = 0;
#pragma unroll
            for (int j = 0; j < 32; j++) {
                const int r = j / 2 * 4 + 2 * i + j % 2;
                y[j] = silu(sum[0][r]) * sum[1][r];
                largest = max(largest, abs_bits(y[j]));
            }
            largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
            largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
            const float scale = block_scale(largest, false);
            const Quotient<false> code(scale);
            const int row = line + 8 * i, m = first + row;
#pragma unroll
            for (int j = 0; j < 16; j++) {
                const unsigned codes = to_e4m3x4(code(y[2 * j]), code(y[2 * j + 1]), 0, 0);
                *reinterpret_cast<uint16_t*>(lines + swizzled(row, j / 2) + j % 2 * 8 + at.column) = codes;
            }
            if (lane % 4 == 0 && m < t.rows) p.y_scale[t.n / 128 * p.y_scale_k + t.m + m] = scale;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = 4 * i + lane / 8;
            if (first + row < t.rows)
                store_chunk(lines, row, lane % 8, static_cast<uint8_t*>(p.y) + (t.m + first + row) * p.y_m + t.n);
        }
        __syncwarp();
    } else {
#pragma unroll
        for (int part = 0; part < 2 * V::kHalves; part++) {  // 64 columns each
            const int n = t.n + 64 * part;
            if (n >= p.N) break;
            store_rows(lines, sum[part / 2] + part % 2 * 32, p.N - n, [&](int row) -> bf16* {
                if (first + row >= t.rows) return nullptr;
                return static_cast<bf16*>(p.y) + t.group * p.y_g + (t.m + first + row) * p.y_m + n;
            });
        }
    }
}

// Tokens are its columns: lines of the staging are tokens, and a warpgroup, or for FP8 both, fill one together.
template <typename V>
__device__ void write_columns(Shared<V>& s, const Problem& p, const Tile& t, const float (&sum)[V::kHalves][V::kRegs]) {
    const Place at;
    const int thread = threadIdx.x;
    if constexpr (V::kSwiglu) {
        unsigned* largest = reinterpret_cast<unsigned*>(s.staging + V::kBlockM * 128);
        float y[V::kRegs];
        if (thread < V::kBlockM) largest[thread] = 0;
        named_barrier(1, kConsumers);
#pragma unroll
        for (int i = 0; i < V::kRegs; i++) y[i] = silu(sum[0][i]) * sum[1][i];
#pragma unroll
        for (int j = 0; j < V::kRegs / 2; j++) {
            const int i = j / 2 * 4 + j % 2;
            unsigned bits = max(abs_bits(y[i]), abs_bits(y[i + 2]));
            for (int d = 4; d < 32; d *= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, d));
            if (threadIdx.x % 32 < 4) atomicMax(largest + j / 2 * 8 + at.column + j % 2, bits);
        }
        named_barrier(1, kConsumers);
#pragma unroll
        for (int j = 0; j < V::kRegs / 2; j++) {
            const int i = j / 2 * 4 + j % 2, token = j / 2 * 8 + at.column + j % 2, f = 64 * at.warpgroup + at.row;
            const Quotient<false> code(block_scale(largest[token], false));
            s.staging[swizzled(token, f / 16) + f % 16] = to_e4m3(code(y[i]));
            s.staging[swizzled(token, f / 16) + f % 16 + 8] = to_e4m3(code(y[i + 2]));
        }
        if (thread < t.rows) p.y_scale[t.n / 128 * p.y_scale_k + t.m + thread] = block_scale(largest[thread], false);
        named_barrier(1, kConsumers);
        for (int i = thread; i < t.rows * 8; i += kConsumers)
            store_chunk(s.staging, i / 8, i % 8, static_cast<uint8_t*>(p.y) + (t.m + i / 8) * p.y_m + t.n);
        named_barrier(1, kConsumers);
    } else {
        uint8_t* lines = s.staging + at.warpgroup * kStaging / 2;
#pragma unroll
        for (int h = 0; h < V::kHalves; h++) {
            const int n = t.n + 128 * h + 64 * at.warpgroup;
#pragma unroll
            for (int i = 0; i < V::kRegs; i++) {
                const int token = i / 4 * 8 + at.column + i % 2, row = at.row + (i & 2) * 4;
                *reinterpret_cast<bf16*>(lines + swizzled(token, row / 8) + row % 8 * 2) =
                    __float2bfloat16_rn(sum[h][i]);
            }
            named_barrier(1 + at.warpgroup, 128);
            for (int i = thread % 128; i < t.rows * 8; i += 128)
                if (n + i % 8 * 8 < p.N)
                    store_chunk(lines, i / 8, i % 8,
                                reinterpret_cast<uint8_t*>(static_cast<bf16*>(p.y) + (t.m + i / 8) * p.y_m + n));
            named_barrier(1 + at.warpgroup, 128);
        }
    }
}

template <typename V> __device__ void multiply_tiles(Shared<V>& s, const Problem& p) {
    const int warpgroup = threadIdx.x / 128;
    Ring<V::kStages> ring;
    Tile t;
    for (int tile = blockIdx.x; find_tile(s, p, tile, t); tile += gridDim.x) {
        const bool busy = V::kSwap || 64 * warpgroup < t.rows;  // or none of the warpgroup's rows is the group's
        const int halves = V::kSwiglu ? 2 : min(V::kHalves, ceil_div(p.N - t.n, 128));
        float sum[V::kHalves][V::kRegs] = {};
        float w_scale[V::kHalves] = {}, next[V::kHalves] = {};
        int scale = t.group * p.weight_scale_g + t.n / 128 * p.weight_scale_n;
        const int up = (V::kSwiglu ? p.N / 256 : 1) * p.weight_scale_n;
        const auto load_scales = [&](bool any) {  // a step ahead: their latency would stand between two products
#pragma unroll
            for (int h = 0; h < V::kHalves; h++) {
                w_scale[h] = next[h];
                if (!V::kTall && h < halves && any) next[h] = __ldg(p.weight_scale + scale + h * up);
            }
            scale += p.weight_scale_k;
        };
        load_scales(t.blocks > 0);
        for (int left = t.blocks; left > 0; left--, ring.next()) {
            load_scales(left > 1);
            s.full[ring.stage].wait(ring.parity);
            multiply(s, ring.stage, w_scale, busy, halves, sum);
        }
        if (!busy || (V::kContract && p.accumulate && !t.blocks)) continue;
        if (!V::kSwiglu && (p.fp32 || p.accumulate)) finish_in_place<V>(p, t, sum);
        if (V::kSwiglu || !p.fp32) {
            if constexpr (V::kSwap) write_columns(s, p, t, sum);
            else write_rows(s, p, t, sum);
        }
    }
}

// What every block does first: barriers, and the table of tiles.
template <typename V> __device__ Shared<V>& begin(const Problem& p) {
    Shared<V>& s = *dynamic_shared<Shared<V>>();
    if (threadIdx.x == 0) {
        for (int i = 0; i < V::kStages; i++) {
            s.full[i].init(V::kGather || V::kTurned ? 128 + 1 : 1);
            if (V::kTurned) s.raw[i].init(1);
            s.empty[i].init(kConsumers / 32);
        }
        publish_barriers();
    }
    if (threadIdx.x == kConsumers) {
        if (!V::kGather) prefetch_map(p.a);
        prefetch_map(p.b);
    }
    __syncthreads();
    count_group_tiles(s, p);
    return s;
}

template <typename V>
__global__ void __launch_bounds__(kThreads, 1) gemm_fp8_kernel(const __grid_constant__ Problem p) {
    Shared<V>& s = begin<V>(p);
    if (threadIdx.x >= kConsumers) {
        fewer_registers<V::kTurned ? 72 : V::kGather ? 56 : 40>();
        if constexpr (V::kGather) load_gathered(s, p);
        else if constexpr (V::kTurned) load_and_turn(s, p);
        else if (threadIdx.x < kConsumers + 32) load_tiles(s, p);
    } else {
        more_registers<V::kTurned ? 216 : V::kGather ? 224 : 232>();
        multiply_tiles(s, p);
    }
}

}  // namespace ling::gemm_fp8

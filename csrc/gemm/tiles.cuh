// Which tiles the FP8 GEMM has: its variants, what a block shares, and the walk over ragged groups.
#pragma once
#include "quant/fp8.cuh"
#include "ragged.cuh"
#include "sm90.cuh"

namespace ling::gemm_fp8 {

constexpr int kConsumers = 256, kThreads = kConsumers + 128, kBand = 16;
constexpr int kStaging = 16 << 10, kMaxGroups = 512;

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

// A thread's place in what its warpgroup multiplies: the rows `row` and row + 8 of its 64, and of each 8 columns two.
struct Place {
    int warpgroup, row, column;
    __device__ Place()
        : warpgroup(threadIdx.x / 128),
          row(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4),
          column(threadIdx.x % 4 * 2) {}
};

}  // namespace ling::gemm_fp8

// Tiles of the FP8 GEMM: its variants, a block's shared memory, and the walk over ragged groups.
#pragma once
#include "quant/fp8.cuh"
#include "ragged.cuh"
#include "gemm/pairs.cuh"

namespace ling::gemm_fp8 {

constexpr int kConsumers = 256, kThreads = kConsumers + 128, kBand = 16;
constexpr int kStaging = 16 << 10, kMaxGroups = 512;

enum class Scales { blocks, rows };     // weight scales per 128 x 128, or per 1 x 128
enum class Output { plain, swiglu };    // swiglu: the halves of a tile are gate and up, and y is quantised
enum class Tokens { tiles, gathered };  // loaded by TMA, or row by row through `source`
enum class Contraction { all, group };  // group (wgrad): groups divide the contraction, not the rows; y is [G, M, N]
enum class Weights { by_rows, transposed };  // transposed: [K, N] in memory, transposed on the way to registers

// kTokens 0: the tokens are wgmma's M operand, 128 per tile. Otherwise kTokens of them are its N operand and the
// weights are M, since wgmma's smallest M is 64 and its smallest N 8. A tile has kHalves times 128 rows of the weights.
template <int kTokens, int kHalves_, Scales kScales, Output kOutput, Tokens kLoad, Contraction kOver,
          Weights kWeights = Weights::by_rows>
struct Variant {
    static constexpr bool kSwap = kTokens > 0;
    static constexpr int kBlockM = kSwap ? kTokens : 128, kHalves = kHalves_, kBlockN = 128 * kHalves;
    static constexpr bool kRowScales = kScales == Scales::rows, kSwiglu = kOutput == Output::swiglu;
    static constexpr bool kGather = kLoad == Tokens::gathered, kWgrad = kOver == Contraction::group;
    static constexpr bool kTransposed = kWeights == Weights::transposed, kBlockScales = !kRowScales;
    // May run with Problem::pairs. Of a plain product with row scales registers would spill.
    static constexpr bool kPairs = kBlockM == 128 && (kBlockScales || kWgrad);
    // Tokens come to wgmma from registers, once for both halves. Row scales and gathering leave too few registers.
    static constexpr bool kTokenFragments = !kSwap && kBlockScales && !kGather;
    static constexpr int kUnit = 128;                       // elements of K per scale
    static constexpr int kStageUnits = 1;                   // units of a stage
    static constexpr int kRegs = kSwap ? kTokens / 2 : 64;  // results of one product in a thread
    // Rows of the product from a thread's upper results down to its lower ones: as wgmma has them, or neighbours
    static constexpr int kBelow = kTransposed ? 1 : 8;
    // How many of a thread's results are neighbours in y, and how far the second one is from the first
    static constexpr int kNeighbours = kSwap && !kTransposed ? 1 : 2, kNext = kTransposed ? 2 : 1;
    static constexpr int kBatch = kRegs < 32 ? kRegs : 32;  // results whose old values load at once

    static constexpr int kABytes = kBlockM * 128, kBBytes = kBlockN * 128;
    static constexpr int kAScaleBytes = kBlockM * 4 > 128 ? kBlockM * 4 : 128,
                         kBScaleBytes = kRowScales ? kBlockN * 4 : 0;
    static constexpr int kTokenBytes = kABytes + kBlockM * 4;  // that TMA loads
    static constexpr int kStageBytes = kABytes + kBBytes + kAScaleBytes + kBScaleBytes;
    static constexpr int kTableBytes = 3 * 4 * (kMaxGroups + 1) + 4;
    static constexpr int kFree = kSharedMemory - kStaging - kTableBytes - 1024;
    static constexpr int kStages = kFree / kStageBytes < 8 ? kFree / kStageBytes : 8;
    static_assert(kStages >= 3 && kABytes % 1024 == 0);
};

struct alignas(16) Tile {
    int group, m, n;
    int rows;        // that belong to the group; 0: there are no more tiles
    int k, k_units;  // the part of the contraction: its first unit and number of units of V::kUnit
    bool both;       // with pairs: the other block of the pair has a tile too
    bool joint;      // with pairs: both tiles have the same weights, of which each block loads one half for both
};

template <typename V> struct Shared {
    alignas(1024) uint8_t a[V::kStages][V::kABytes];
    alignas(1024) uint8_t b[V::kStages][V::kBBytes];
    alignas(128) float a_scale[V::kStages][V::kAScaleBytes / 4];
    alignas(128) float b_scale[V::kStages][V::kRowScales ? V::kBlockN : V::kHalves];
    alignas(128) uint8_t staging[kStaging];  // results before their coalesced stores
    // Group g has the rows (or, with kWgrad, the units of K) first[g] .. first[g] + rows[g]; its tiles of rows are
    // number tiles[g] and up.
    int tiles[kMaxGroups + 1], first[kMaxGroups + 1], rows[kMaxGroups + 1];
    int warp_sums[kThreads / 32];
    Tile tile[V::kStages];  // that begins in this stage
    Tile loading;           // by the loader of four warps
    Barrier full[V::kStages], empty[V::kStages];
};

struct Problem {
    TensorMap a, a_scale, b, b_scale;
    const uint8_t* tokens;  // the next five are used only by Tokens::gathered
    const float* token_scale;
    const int* source;
    int64_t tokens_m, token_scale_m, token_scale_k;
    int topk;
    const int *offsets, *counts;  // of the groups; with neither, all M rows are one group
    const float* weight_scale;    // per 128 x 128
    int weight_scale_g, weight_scale_n, weight_scale_k;
    void* y;
    float* y_scale;
    int64_t y_g, y_m, y_scale_k;
    int M, N, K, G, max_m;
    bool fp32, accumulate;
    bool pairs;  // blocks 2 i and 2 i + 1 are a cluster, whose tiles follow each other and have equal contractions
};

template <typename V> __device__ void count_group_tiles(Shared<V>& s, const Problem& p) {
    count_tiles(s.tiles, s.warp_sums, p.G, [&](int g) {
        int first = p.offsets ? p.offsets[g] : g * p.max_m;
        int rows = p.offsets ? p.offsets[g + 1] - first : p.counts ? p.counts[g] : p.M;
        LING_DEVICE_CHECK(rows >= 0 && first >= 0 && first + rows <= (V::kWgrad ? p.K : p.M));
        LING_DEVICE_CHECK(!p.counts || rows <= p.max_m);
        LING_DEVICE_CHECK(!V::kWgrad || (first % V::kUnit == 0 && rows % V::kUnit == 0));
        if (V::kWgrad) first /= V::kUnit, rows /= V::kUnit;
        s.first[g] = first, s.rows[g] = rows;
        return ceil_div(V::kWgrad ? p.M : rows, V::kBlockM);
    });
}

// The position of a tile, computed by a whole warp. Groups follow each other. Within a group, tiles go down the rows of
// a band of kBand tiles, then to the next columns, so that the band's rows and the weights that it shares stay in L2.
template <typename V> __device__ bool find_tile(const Shared<V>& s, const Problem& p, int tile, Tile& found) {
    constexpr int kWidth = V::kSwiglu ? V::kBlockN / 2 : V::kBlockN;
    const int tiles_n = ceil_div(V::kSwiglu ? p.N / 2 : p.N, kWidth);
    if (tile / tiles_n >= s.tiles[p.G]) {
        found = {};
        return false;
    }
    const int g = find_group(s.tiles, p.G, tile / tiles_n);
    int in_group = tile - s.tiles[g] * tiles_n;
    const int tiles_m = s.tiles[g + 1] - s.tiles[g], band = in_group / (kBand * tiles_n);
    in_group -= band * kBand * tiles_n;
    const int height = min(tiles_m - band * kBand, kBand), down = in_group % height,
              m = (band * kBand + down) * V::kBlockM;
    const int end = V::kWgrad ? p.M : s.rows[g];
    found.group = g, found.m = V::kWgrad ? m : s.first[g] + m, found.n = in_group / height * kWidth;
    found.rows = min(end - m, V::kBlockM);
    found.k = V::kWgrad ? s.first[g] : 0, found.k_units = V::kWgrad ? s.rows[g] : p.K / 128;
    if constexpr (V::kPairs) {  // the grid is even, so the pair's first block has even tiles
        const bool second = tile % 2;
        found.both = p.pairs && (second || tile + 1 < s.tiles[p.G] * tiles_n);
        found.joint = p.pairs && (second ? down > 0 : down + 1 < height);
    }
    return true;
}

// A warp frees a stage, if `last`. In a pair both blocks may load into it, so that both must free it: a warp arrives at
// both, or twice at its own block while that has the pair's only tile. The pairs of wgrad always have two.
template <typename V>
__device__ void free_stage(Shared<V>& s, const Problem& p, const Tile& t, int stage, bool last = true) {
    if constexpr (V::kPairs) {
        const unsigned lane = threadIdx.x % 32;
        __syncwarp();
        if (last && lane <= p.pairs) arrive_at(s.empty[stage], V::kWgrad || t.both ? lane : cluster_rank());
    } else release(s.empty[stage], last);
}

// The results of a thread in its warpgroup's product [64, ..]: rows `row` and row + kBelow, and two of each 8 columns.
template <typename V> struct Place {
    int warpgroup, row, column;
    __device__ Place()
        : warpgroup(threadIdx.x / 128),
          row(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 * (V::kTransposed ? 2 : 1)),
          column(threadIdx.x % 4 * 2) {}
};

}  // namespace ling::gemm_fp8

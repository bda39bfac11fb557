// The walk of the GEMM kernels over their tiles: tests/test_tile_walk.py computes the same in Python. A kernel writes
// (group, first row, first column, rows, both, joint) of every tile that each of its blocks takes, in the block's
// order; `most` rows of `out` for a block.
#include "gemm/grouped_wgrad.cu"

using namespace ling;
using namespace ling::gemm_fp8;

namespace {

template <int kTokens, int kHalves, Output kOutput = Output::plain>
using Plain = Variant<kTokens, kHalves, Scales::blocks, kOutput, Tokens::tiles, Contraction::all>;

template <typename V> __device__ void walk(const int* offsets, int N, int G, int* out, int most) {
    Problem p{};
    p.pairs = true, p.N = N, p.G = G, p.offsets = offsets;
    p.M = V::kWgrad ? N : offsets[G], p.K = V::kWgrad ? offsets[G] : 128;
    Shared<V>& s = *dynamic_shared<Shared<V>>();
    count_group_tiles(s, p);
    if (threadIdx.x >= 32) return;
    Tile t;
    out += 6 * most * blockIdx.x;
    for (int tile = blockIdx.x; find_tile(s, p, tile, t); tile += gridDim.x, out += 6)
        if (threadIdx.x == 0)
            out[0] = t.group, out[1] = t.m, out[2] = t.n, out[3] = t.rows, out[4] = t.both, out[5] = t.joint;
}

}  // namespace

#define LING_WALK(name, ...)                                                                \
    extern "C" __global__ void name(const int* offsets, int N, int G, int* out, int most) { \
        walk<__VA_ARGS__>(offsets, N, G, out, most);                                        \
    }
LING_WALK(walk_16x128, Plain<16, 1>)
LING_WALK(walk_64x128, Plain<64, 1>)
LING_WALK(walk_64x128_swiglu, Plain<64, 2, Output::swiglu>)
LING_WALK(walk_128x256, Plain<0, 2>)
LING_WALK(walk_wgrad, Fp8)
LING_WALK(walk_wgrad_bf16, Bf16)

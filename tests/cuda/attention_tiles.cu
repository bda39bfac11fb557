// The tiles of attention in the order in which blocks take them; tests/test_csrc_attention_tiles.py checks it. A kernel
// writes for each tile whether it has keys, its sequence's first row on the other side, its head, first row and number
// of rows, and the rows of the other side times heads that it reads; their number into `all`.
#include "attention/tiles.cuh"

using namespace ling;

namespace {

__device__ void list(const Sequences& p, bool keys, int* out, int* all) {
    __shared__ TileCounts counts;
    __shared__ int warp_sums[1];
    counts.count(p, keys, warp_sums);
    *all = counts.before[p.B] * (keys ? p.Hkv : p.Hq);
    for (int number = 0; number < *all; number++, out += 6) {
        const Tile t = find_tile(p, counts, keys, number);
        if (threadIdx.x == 0)
            out[0] = t.keys, out[1] = t.others, out[2] = t.head, out[3] = t.first, out[4] = t.rows,
            out[5] = t.heads * (t.end - t.begin);
    }
}

}  // namespace

extern "C" __global__ void list_tiles(const int* cu, int B, int T, int Hq, int Hkv, int keys, int* out, int* all) {
    list(Sequences{cu, cu, B, T, T, Hq, Hkv, true}, keys != 0, out, all);
}

// Prints the tiles of attention in the order in which blocks take them; tests/test_csrc_attention_tiles.py checks it.
//   attention_tiles forward|backward Hq Hkv rows..: for each tile whether it has keys, its sequence's first row on the
//   other side, its head, first row and number of rows, and the rows of the other side times heads that it reads
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "attention/tiles.cuh"

using namespace ling;

__global__ void tiles_kernel(Sequences p, bool keys) {
    __shared__ TileCounts counts;
    __shared__ int warp_sums[1];
    counts.count(p, keys, warp_sums);
    const int all = counts.before[p.B] * (keys ? p.Hkv : p.Hq);
    for (int number = 0; number < all; number++) {
        const Tile t = find_tile(p, counts, keys, number);
        if (threadIdx.x == 0)
            std::printf("%d %d %d %d %d %d\n", t.keys, t.others, t.head, t.first, t.rows, t.heads * (t.end - t.begin));
    }
}

int main(int argc, char** argv) {
    std::vector<int> cu{0};
    for (int i = 4; i < argc; i++) cu.push_back(cu.back() + std::atoi(argv[i]));
    const Sequences p{cu.data(), cu.data(),          argc - 4,           cu.back(),
                      cu.back(), std::atoi(argv[2]), std::atoi(argv[3]), true};
    if (std::string(argv[1]) == "backward") launch<tiles_kernel>(1, 32, 0, nullptr, p, true);
    launch<tiles_kernel>(1, 32, 0, nullptr, p, false);
}

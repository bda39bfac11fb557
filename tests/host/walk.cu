// Prints the tile walk and the shared-memory addresses of the GEMM kernels; tests/test_tile_walk.py computes the same
// in Python.
//   walk VARIANT SMS N rows..: SM, group, first row, first column and rows of every tile, in an SM's order
//   walk banks: for each matrix that transpose_tile loads or stores, the eighth of the banks that holds each of its 8
//               lines
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "sm90.cuh"

namespace ling {

std::vector<const void*> lines[128];  // the lines that each thread of transpose_tile accesses, in order
void spy_load(unsigned (&r)[4], const void* line) { lines[threadIdx.x].push_back(line), load_transposed(r, line); }
void spy_store(void* line, const unsigned (&r)[4]) { lines[threadIdx.x].push_back(line), store_matrices(line, r); }

}  // namespace ling

#define load_transposed spy_load
#define store_matrices spy_store
#include "gemm/grouped_wgrad.cu"

using namespace ling;
using namespace ling::gemm_fp8;

template <int kTokens, int kHalves, Output kOutput = Output::plain>
using Plain = Variant<kTokens, kHalves, Scales::blocks, kOutput, Tokens::tiles, Contraction::all>;

template <typename V> __global__ void walk_kernel(const Problem p) {
    const Shared<V>& s = begin<V>(p);
    if (threadIdx.x >= 32) return;
    Tile t;
    for (int tile = blockIdx.x; find_tile(s, p, tile, t); tile += gridDim.x)
        if (threadIdx.x == 0) std::printf("%d %d %d %d %d\n", blockIdx.x, t.group, t.m, t.n, t.rows);
}

template <typename V> void walk(const char* name, int argc, char** argv) {
    if (std::string(argv[1]) != name) return;
    std::vector<int> offsets{0};
    for (int i = 4; i < argc; i++) offsets.push_back(offsets.back() + std::atoi(argv[i]));
    Problem p{};
    p.N = std::atoi(argv[3]), p.G = argc - 4, p.offsets = offsets.data();
    p.M = V::kWgrad ? p.N : offsets.back(), p.K = V::kWgrad ? offsets.back() : 128;
    launch<walk_kernel<V>>(std::atoi(argv[2]), kThreads, sizeof(Shared<V>), nullptr, p);
}

__global__ void transpose_kernel(int) { transpose_tile(dynamic_shared<uint8_t>()); }

void banks() {
    launch<transpose_kernel>(1, 128, 128 * 128, nullptr, 0);
    for (size_t i = 0; i < lines[0].size(); i++)
        for (int matrix = 0; matrix < 128; matrix += 8)
            for (int t = matrix; t < matrix + 8; t++)
                std::printf("%d%c", static_cast<int>(reinterpret_cast<uintptr_t>(lines[t].at(i)) / 16 % 8),
                            " \n"[t == matrix + 7]);
}

int main(int argc, char** argv) {
    if (argc == 2) banks();
    walk<Plain<16, 1>>("16x128", argc, argv);
    walk<Plain<64, 1>>("64x128", argc, argv);
    walk<Plain<64, 2, Output::swiglu>>("64x128+128", argc, argv);
    walk<Plain<0, 2>>("128x256", argc, argv);
    walk<Fp8>("wgrad", argc, argv);
    walk<Bf16>("wgrad_bf16", argc, argv);
}

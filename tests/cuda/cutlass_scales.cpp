// M N K: the offsets that CUTLASS computes for a group's scales, of A for [M, K/128], then of B for [N/128, K/128].
#include <cute/tensor.hpp>

#include <cstdio>
#include <cstdlib>

#include "gemm/cutlass/scales.h"

int main(int, char** argv) {
    const int M = std::atoi(argv[1]), N = std::atoi(argv[2]), K = std::atoi(argv[3]);
    const auto shape = cute::make_shape(M, N, K, 1);
    const auto a = ling::GroupScales::tile_atom_to_shape_SFA(shape);
    const auto b = ling::GroupScales::tile_atom_to_shape_SFB(shape);
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K; k += 128) std::printf("%d ", static_cast<int>(a(m, k, 0)));
    for (int n = 0; n < N; n += 128)
        for (int k = 0; k < K; k += 128) std::printf("%d ", static_cast<int>(b(n, k, 0)));
}

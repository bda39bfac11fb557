// Prints the layouts of wgmma's operands and results, computed by csrc/ or, with -DCUTE, by CuTe: both programs must
// print the same. 64 rows of 128 bytes of e4m3; 64 tokens of 128 columns of bf16, tokens outermost; descriptors of
// one instruction's operands, without the address; the row and column of each of a thread's results.
#include <cstdio>

#ifdef CUTE
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
using namespace cute;
using bf16 = cutlass::bfloat16_t;

const auto e4m3_tile = tile_to_shape(GMMA::Layout_K_SW128_Atom<uint8_t>{}, make_shape(_64{}, _128{}));
const auto bf16_tile = tile_to_shape(GMMA::Layout_MN_SW128_Atom<bf16>{}, make_shape(_128{}, _64{}), Step<_2, _1>{});
int e4m3_offset(int row, int k) { return e4m3_tile(row, k); }
int bf16_offset(int column, int token) { return 2 * as_position_independent_swizzle_layout(bf16_tile)(column, token); }

uint64_t e4m3_descriptor() {
    const auto all = make_tensor(make_smem_ptr(static_cast<uint8_t*>(nullptr)), e4m3_tile);
    return SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(local_tile(all, Shape<_64, _32>{}, make_coord(0, 0))).desc_;
}
uint64_t bf16_descriptor() {
    const auto all = make_tensor(make_smem_ptr(static_cast<bf16*>(nullptr)), bf16_tile);
    return SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(local_tile(all, Shape<_128, _16>{}, make_coord(0, 0)))
        .desc_;
}
int result(int thread, int i) { return SM90::GMMA::CLayout_64x128{}(thread, i); }
#else
#include "gemm/gemm_fp8.cuh"
using namespace ling;
constexpr int kBox = 64 * 128;

int e4m3_offset(int row, int k) { return swizzled(row, k / 16) + k % 16; }
int bf16_offset(int column, int token) {
    return column / 64 * kBox + swizzled(token, column % 64 / 8) + column % 8 * 2;
}
uint64_t e4m3_descriptor() { return operand(nullptr); }
uint64_t bf16_descriptor() { return operand(nullptr, kBox); }
int result(int thread, int i) {
    threadIdx.x = thread;
    const gemm_fp8::Place place;
    return place.row + (i & 2) * 4 + 64 * (i / 4 * 8 + place.column + (i & 1));
}
#endif

int main() {
    for (int row = 0; row < 64; row++)
        for (int k = 0; k < 128; k++) std::printf("%d ", e4m3_offset(row, k));
    for (int column = 0; column < 128; column++)
        for (int token = 0; token < 64; token++) std::printf("%d ", bf16_offset(column, token));
    constexpr uint64_t kNoAddress = ~0x3fffull;
    std::printf("%llx %llx ", static_cast<unsigned long long>(e4m3_descriptor() & kNoAddress),
                static_cast<unsigned long long>(bf16_descriptor() & kNoAddress));
    for (int thread = 0; thread < 128; thread++)
        for (int i = 0; i < 64; i++) std::printf("%d ", result(thread, i));
}

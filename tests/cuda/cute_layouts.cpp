// What layouts.cu writes, as CuTe has it, printed.
#include <cstdio>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
using bf16 = cutlass::bfloat16_t;

int main() {
    const auto e4m3 = tile_to_shape(GMMA::Layout_K_SW128_Atom<uint8_t>{}, make_shape(_64{}, _128{}));
    const auto tokens = tile_to_shape(GMMA::Layout_MN_SW128_Atom<bf16>{}, make_shape(_128{}, _64{}), Step<_2, _1>{});
    const auto tokens_at = as_position_independent_swizzle_layout(tokens);
    const auto by_k = make_tensor(make_smem_ptr(static_cast<uint8_t*>(nullptr)), e4m3);
    const auto by_rows = make_tensor(make_smem_ptr(static_cast<bf16*>(nullptr)), tokens);
    const auto print = [](long long x) { std::printf("%lld ", x); };
    for (int row = 0; row < 64; row++)
        for (int k = 0; k < 128; k++) print(e4m3(row, k));
    for (int column = 0; column < 128; column++)
        for (int token = 0; token < 64; token++) print(2 * tokens_at(column, token));
    print(
        SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(local_tile(by_k, Shape<_64, _32>{}, make_coord(0, 0))).desc_);
    print(SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(local_tile(by_rows, Shape<_128, _16>{}, make_coord(0, 0)))
              .desc_);
    for (int thread = 0; thread < 128; thread++)
        for (int i = 0; i < 64; i++) print(SM90::GMMA::CLayout_64x128{}(thread, i));
}

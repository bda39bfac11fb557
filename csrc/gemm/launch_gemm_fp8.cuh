// Launches the FP8 GEMM with the tiles that fit the problem.
#pragma once
#include "gemm/gemm_fp8.cuh"

namespace ling::gemm_fp8 {

// TMA loads rows that are dense and start at multiples of 16 bytes.
inline bool by_rows(const Tensor& t) {
    const int size = t.dtype == DType::bf16 ? 2 : 1;
    return t.stride[t.ndim - 1] == 1 && t.stride[t.ndim - 2] * size % 16 == 0 && t.aligned();
}
inline bool by_columns(const Tensor& scale) {
    return scale.dtype == DType::f32 && scale.ndim == 2 && (scale.stride[0] == 1 || scale.shape[0] == 1) &&
           (scale.stride[1] % 4 == 0 || scale.shape[1] == 1) && scale.aligned();
}
inline TensorMap map_of_scales(const Tensor& scale, int box) {
    const int64_t stride = scale.shape[1] == 1 ? (scale.shape[0] + 3) / 4 * 4 : scale.stride[1];
    return encode_map(scale.data, DType::f32, scale.shape[1], scale.shape[0], stride * 4, 1, box, false);
}

// Runs the kernel with a block for each SM, or for each tile if there are fewer. Blocks are pairs where most of them
// find the same weights: each then takes half of them from L2 (docs/kernels.md; not measured).
template <typename V, auto kernel> void launch_tiles(cudaStream_t stream, Problem& p) {
    const int64_t rows = V::kWgrad ? int64_t(p.G) * ceil_div(p.M, V::kBlockM)
                                   : p.M / V::kBlockM + std::min(p.G, p.M);  // tiles of rows, at most
    const int64_t tiles = rows * ceil_div(V::kSwiglu ? p.N / 2 : p.N, V::kSwiglu ? V::kBlockN / 2 : V::kBlockN);
    const int sms = multiprocessors();
    p.pairs =
        V::kPairs && sms > 1 && (V::kWgrad ? ceil_div(p.M, V::kBlockM) % 2 == 0 : p.M > V::kBlockM * int64_t{p.G});
    if (p.pairs)
        launch<kernel, kPairs>(std::min<int64_t>(sms / 2, ceil_div<int64_t>(tiles, 2)) * 2, kThreads, sizeof(Shared<V>),
                               stream, p);
    else launch<kernel>(std::min<int64_t>(sms, tiles), kThreads, sizeof(Shared<V>), stream, p);
}

// a [rows, K], b [.., N, K], or [.., K, N] if transposed; b_scale only with row scales.
template <typename V>
void launch_gemm_fp8(cudaStream_t stream, Problem p, const Tensor& a, const Tensor& a_scale, const Tensor& b,
                     const Tensor& b_scale) {
    static_assert(sizeof(Shared<V>) <= kSharedMemory);
    const int64_t columns = a.shape[1], weight_rows = b.ndim == 3 ? b.shape[0] * b.shape[1] : b.shape[0];
    if (V::kGather) {
        p.tokens = a.ptr<uint8_t>(), p.tokens_m = a.stride[0];
        p.token_scale = a_scale.ptr<float>(), p.token_scale_m = a_scale.stride[0], p.token_scale_k = a_scale.stride[1];
    } else {
        p.a = encode_map(a.data, DType::e4m3, a.shape[0], columns, a.stride[0], V::kBlockM, 128, true);
        p.a_scale = map_of_scales(a_scale, V::kBlockM);
    }
    p.b = encode_map(b.data, DType::e4m3, weight_rows, b.shape[b.ndim - 1], b.stride[b.ndim - 2], 128, 128, true);
    if (V::kRowScales) p.b_scale = map_of_scales(b_scale, 128);
    launch_tiles<V, gemm_fp8_kernel<V>>(stream, p);
}

// Choose tiles for groups with `rows` rows on average; not measured. With few rows the weights are wgmma's M operand
// (at least 64), since its N operand may have as few as 8. An H20 gets the same choice although padding costs more
// there: tiles of 64 and of 128 rows both multiply at most 63 rows of padding.
template <Output kOutput, Tokens kLoad>
void launch_for_rows(cudaStream_t stream, const Problem& p, int rows, const Tensor& a, const Tensor& a_scale,
                     const Tensor& b) {
    constexpr int kHalves = kOutput == Output::swiglu ? 2 : 1;
    constexpr auto kScales = Scales::blocks;
    constexpr auto kOver = Contraction::all;
    const int sms = multiprocessors();
    if (rows <= 16) launch_gemm_fp8<Variant<16, kHalves, kScales, kOutput, kLoad, kOver>>(stream, p, a, a_scale, b, {});
    else if (rows <= 32)
        launch_gemm_fp8<Variant<32, kHalves, kScales, kOutput, kLoad, kOver>>(stream, p, a, a_scale, b, {});
    else if (rows <= 64 || (kHalves == 1 && int64_t(p.G) * ceil_div(rows, 128) * ceil_div(p.N, 256) < sms))
        launch_gemm_fp8<Variant<64, kHalves, kScales, kOutput, kLoad, kOver>>(stream, p, a, a_scale, b, {});
    else launch_gemm_fp8<Variant<0, 2, kScales, kOutput, kLoad, kOver>>(stream, p, a, a_scale, b, {});
}

// For dgrad, with weights [.., K, N] as the forward pass reads them.
inline void launch_transposed(cudaStream_t stream, const Problem& p, int rows, const Tensor& a, const Tensor& a_scale,
                              const Tensor& b) {
    constexpr auto kScales = Scales::blocks;
    constexpr auto kOver = Contraction::all;
    if (rows <= 64)
        launch_gemm_fp8<Variant<64, 1, kScales, Output::plain, Tokens::tiles, kOver, Weights::transposed>>(
            stream, p, a, a_scale, b, {});
    else
        launch_gemm_fp8<Variant<128, 2, kScales, Output::plain, Tokens::tiles, kOver, Weights::transposed>>(
            stream, p, a, a_scale, b, {});
}

}  // namespace ling::gemm_fp8

#include "gemm/grouped_wgrad.h"
#include "gemm/launch_gemm_fp8.cuh"

namespace ling {

using namespace gemm_fp8;

namespace {

constexpr auto kGroup = Contraction::group;
using Fp8 = Variant<0, 2, Scales::rows, Output::plain, Tokens::tiles, kGroup>;

// bf16 operands [tokens, columns] are loaded as stored. A stage holds kTokens tokens in boxes of 64 columns.
struct Bf16 : Fp8 {
    static constexpr bool kRowScales = false, kBlockScales = false;
    static constexpr int kUnit = 1, kTokens = 64, kStageUnits = kTokens, kBox = kTokens * 128;
    static_assert(kABytes == 2 * kBox && kBBytes == 4 * kBox);
};

__device__ void load_tokens(Shared<Bf16>& s, const Problem& p) {
    load_tiles(s, p, [&](const Tile& t, int stage, int step) {
        const int row = t.k + step * Bf16::kTokens;
        s.full[stage].arrive_and_expect(Bf16::kABytes + Bf16::kBBytes);
        for (int i = 0; i < 2; i++) load_tile(s.a[stage] + i * Bf16::kBox, p.a, s.full[stage], t.m + 64 * i, row);
        for (int i = 0; i < 4; i++)
            load_weight_box(s, t, i / 2, s.b[stage] + i * Bf16::kBox, p.b, stage, t.n + 64 * i, row);
    });
}

// The last stage of a group also holds tokens of the next group, which must not contribute, whatever their values.
__device__ void clear_tokens(Shared<Bf16>& s, int stage, int from) {
    clear_lines<Bf16::kTokens>(s.a[stage], 2, from, kConsumers);
    clear_lines<Bf16::kTokens>(s.b[stage], 4, from, kConsumers);
    fence_async();
    named_barrier(1, kConsumers);
}

__device__ void multiply_tokens(Shared<Bf16>& s, const Problem& p) {
    const int warpgroup = threadIdx.x / 128;
    Ring<Bf16::kStages> ring;
    Tile t;
    while (next_tile(s, ring, t)) {
        const bool busy = 64 * warpgroup < t.rows;
        float sum[2][64] = {};
        for (int row = 0; row < t.k_units; row += Bf16::kTokens, ring.next()) {
            s.full[ring.stage].wait(ring.parity);
            if (row + Bf16::kTokens > t.k_units) clear_tokens(s, ring.stage, t.k_units - row);
            if (busy) {
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < Bf16::kTokens / 16; k++) {
                    const int step = k * 16 * 128;
                    const uint64_t dy = operand(s.a[ring.stage] + warpgroup * Bf16::kBox + step, Bf16::kBox);
#pragma unroll
                    for (int h = 0; h < 2; h++)
                        wgmma_bf16_by_rows(sum[h], dy, operand(s.b[ring.stage] + 2 * h * Bf16::kBox + step, Bf16::kBox),
                                           true);
                }
                wgmma_commit();
                wgmma_wait<0>(sum[0]);
                wgmma_wait<0>(sum[1]);
            }
            free_stage(s, p, t, ring.stage);
        }
        if (!t.k_units) free_stage(s, p, t, ring.stage), ring.next();
        if (!busy) continue;
        finish(s, p, t, sum);
    }
}

// Like gemm_fp8_kernel, but the tensor cores accumulate the whole sum, since bf16 products need no scales.
__global__ void __launch_bounds__(kThreads, 1) grouped_wgrad_bf16_kernel(const __grid_constant__ Problem p) {
    Shared<Bf16>& s = begin<Bf16>(p);
    if (threadIdx.x >= kConsumers) {
        fewer_registers<40>();
        if (threadIdx.x < kConsumers + 32) load_tokens(s, p);
    } else {
        more_registers<232>();
        multiply_tokens(s, p);
    }
    end<Bf16>(p);
}

}  // namespace

void grouped_wgrad_fwd(cudaStream_t stream, Tensor dy, Tensor x, Tensor offsets, Tensor out, bool accumulate,
                       Tensor dy_scale, Tensor x_scale, bool columns) {
    const int64_t E = out.shape[0], N = out.shape[1], K = out.shape[2], S = dy.shape[columns ? 1 : 0];
    LING_CHECK(out.is(out.dtype, {E, N, K}) && (out.dtype == DType::f32 || out.dtype == DType::bf16));
    LING_CHECK(offsets.is(DType::i32, {E + 1}) && offsets.contiguous() && E <= kMaxGroups);
    if (!E || !N || !K || !S) return;
    LING_CHECK(by_rows(dy) && by_rows(x));
    LING_CHECK(out.stride[2] == 1 && out.stride[1] % 8 == 0 && out.stride[0] % 8 == 0 && out.aligned());
    Problem p{};
    p.M = N, p.N = K, p.K = S, p.G = E, p.offsets = offsets.ptr<int>();
    p.y = out.data, p.y_g = out.stride[0], p.y_m = out.stride[1];
    p.fp32 = out.dtype == DType::f32, p.accumulate = accumulate;
    if (columns) {
        LING_CHECK(dy.is(DType::e4m3, {N, S}) && x.is(DType::e4m3, {K, S}) && S % 128 == 0 && K % 8 == 0);
        LING_CHECK(dy_scale.is(DType::f32, {N, S / 128}) && x_scale.is(DType::f32, {K, S / 128}));
        LING_CHECK(by_columns(dy_scale) && by_columns(x_scale));
        launch_gemm_fp8<Fp8>(stream, p, dy, dy_scale, x, x_scale);
    } else {
        LING_CHECK(dy.is(DType::bf16, {S, N}) && x.is(DType::bf16, {S, K}) && N % 8 == 0 && K % 8 == 0);
        p.a = encode_map(dy.data, DType::bf16, S, N, dy.stride[0] * 2, Bf16::kTokens, 64, true);
        p.b = encode_map(x.data, DType::bf16, S, K, x.stride[0] * 2, Bf16::kTokens, 64, true);
        launch_tiles<Bf16, grouped_wgrad_bf16_kernel>(stream, p);
    }
}

}  // namespace ling

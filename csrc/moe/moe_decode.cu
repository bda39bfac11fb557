#include "moe/moe_decode.h"
#include "counters.cuh"
#include "grid.cuh"
#include "moe/moe_decode.cuh"

namespace ling {
namespace moe_decode {
namespace {

// Two halves with a grid barrier between them. The warps of a block split a unit's K, so that a block reads whole
// lines. Copies of down's weights are pending while the block waits for the h of other blocks.
template <bool kFp8, int kDepth, typename Router>
__global__ void __launch_bounds__(kThreads, 1) moe_decode_kernel(const __grid_constant__ Problem p) {
    using Memory = Layout<kFp8, kDepth>;
    using Rows = Operand<kFp8>;
    uint8_t* const memory = dynamic_shared<uint8_t>();
    Jobs& jobs = *reinterpret_cast<Jobs*>(memory + Memory::kJobsOffset);
    uint8_t* const operands = memory + Memory::kOperandsOffset;
    const int slots = p.T * Router::kTop, warp = threadIdx.x / 32;

    launch_dependents();
    prefetch(p.shared.gate_up, 2 * int64_t{p.shared.F} * p.H * Rows::kSize);
    prefetch(p.shared.down, int64_t{p.shared.F} * p.H * Rows::kSize);
    wait_for_previous();

    const Rows x(operands, p.T, p.H);
    find_jobs<kFp8, Router>(jobs, p, x);
    Feed<kFp8, kDepth> feed{p, jobs, Stream<kFp8, kDepth>(memory + warp * Memory::Queue::kBytes)};
    for (int i = 0; i < kDepth; i++) feed.push();

    const Partials partials(memory + p.partials, p.T, p.groups);
    up(feed, partials, x, slots);
    grid_barrier(counters + p.counter);

    const auto rows_of = [&](bool shared) {
        return shared ? Rows(operands + Rows::bytes(slots, p.routed.F), p.T, p.shared.F)
                      : Rows(operands, slots, p.routed.F);
    };
#pragma unroll 1
    for (int shared = 0; shared < 2; shared++)  // in reverse order of warps, to balance their work
        stage(rows_of(shared), p.h + (shared ? int64_t{slots} * p.routed.F : 0), shared ? p.shared.F : p.routed.F,
              shared ? kWarps - 1 - warp : warp, kWarps);
    __syncthreads();
    down(feed, partials, rows_of(false), rows_of(true));
}

// The depth of the queues that shared memory has room for; 0 if even the smallest does not fit.
template <bool kFp8> int depth(int T, int H, int F, int Fs, int topk) {
    const auto fits = [&]<int kDepth>() {
        return Layout<kFp8, kDepth>::partials(T, H, F, Fs, topk) + kGroupBytes <= kSharedMemory;
    };
    return fits.template operator()<4>() ? 4 : fits.template operator()<2>() ? 2 : 0;
}

Weights checked(const Tensor& gate_up, const Tensor& gate_up_scale, const Tensor& down, const Tensor& down_scale,
                int64_t E, int64_t H, bool fp8) {
    const int64_t F = down.shape[2];
    const DType type = fp8 ? DType::e4m3 : DType::bf16;
    LING_CHECK(gate_up.is(type, {E, 2 * F, H}) && gate_up.contiguous() && gate_up.aligned());
    LING_CHECK(down.is(type, {E, H, F}) && down.contiguous() && down.aligned());
    LING_CHECK(F % kBlock == 0 && E * 2 * F * H < 1ll << 40);
    if (fp8) {
        LING_CHECK(gate_up_scale.is(DType::f32, {E, 2 * F / kBlock, H / kBlock}) && gate_up_scale.contiguous());
        LING_CHECK(down_scale.is(DType::f32, {E, H / kBlock, F / kBlock}) && down_scale.contiguous());
    }
    return {gate_up.ptr<uint8_t>(), down.ptr<uint8_t>(), gate_up_scale.ptr<float>(), down_scale.ptr<float>(),
            static_cast<int>(F)};
}

Tensor stacked(Tensor t) {  // [N, K] as [1, N, K]
    if (t.ndim != 2) return t;
    return {t.data, t.dtype, 3, t.device, {1, t.shape[0], t.shape[1]}, {0, t.stride[0], t.stride[1]}};
}

}  // namespace
}  // namespace moe_decode

using namespace moe_decode;

bool moe_decode_fits(int T, int H, int F, int Fs, int topk, bool fp8) {
    return (fp8 ? depth<true>(T, H, F, Fs, topk) : depth<false>(T, H, F, Fs, topk)) > 0;
}

void moe_decode_fwd(cudaStream_t stream, Tensor x, Tensor logits, Tensor bias, Tensor w_gate_up, Tensor gate_up_scale,
                    Tensor w_down, Tensor down_scale, Tensor shared_gate_up, Tensor shared_gate_up_scale,
                    Tensor shared_down, Tensor shared_down_scale, Tensor residual, Tensor h, Tensor y, int num_groups,
                    int group_topk, int topk, float scale) {
    const int64_t T = x.shape[0], H = x.shape[1], E = logits.shape[1];
    const bool fp8 = w_gate_up.dtype == DType::e4m3;
    LING_CHECK(x.is(DType::bf16, {T, H}) && x.contiguous() && x.aligned() && T >= 1 && T <= kMaxRows);
    LING_CHECK(H % kBlock == 0 && H > 0 && H < 1 << 16);
    LING_CHECK(logits.is(DType::f32, {T, E}) && logits.aligned() && logits.stride[1] == 1);
    LING_CHECK(T == 1 || logits.stride[0] % 4 == 0);
    LING_CHECK(bias.is(DType::f32, {E}) && bias.contiguous() && bias.aligned());
    LING_CHECK(!residual.ndim || (residual.is(DType::bf16, {T, H}) && residual.contiguous()));
    LING_CHECK(y.is(DType::bf16, {T, H}) && y.contiguous());
    const Weights routed = checked(w_gate_up, gate_up_scale, w_down, down_scale, E, H, fp8);
    const Weights shared = !shared_gate_up.ndim ? Weights{}
                                                : checked(stacked(shared_gate_up), stacked(shared_gate_up_scale),
                                                          stacked(shared_down), stacked(shared_down_scale), 1, H, fp8);
    LING_CHECK(routed.F > 0 && h.is(DType::f32, {T * (topk * int64_t{routed.F} + shared.F)}) && h.aligned());
    Problem p{x.ptr<bf16>(),
              residual.ptr<bf16>(),
              logits.ptr<float>(),
              bias.ptr<float>(),
              y.ptr<bf16>(),
              h.ptr<float>(),
              counter_of(stream),
              routed,
              shared,
              logits.stride[0],
              static_cast<int>(T),
              static_cast<int>(H),
              0,
              0,
              scale,
              Divisor(routed.F / kUnit),
              Divisor(routed.F * (fp8 ? 1 : 2) / kStep)};
    const auto start = [&]<bool kFp8, int kDepth, int kExperts, int kGroups, int kTopGroups, int kTop>() {
        if (E != kExperts || num_groups != kGroups || group_topk != kTopGroups || topk != kTop) return false;
        constexpr auto kernel = moe_decode_kernel<kFp8, kDepth, routing::Router<kExperts, kGroups, kTopGroups, kTop>>;
        p.partials = Layout<kFp8, kDepth>::partials(p.T, p.H, routed.F, shared.F, topk);
        // More rows have fewer units in a group, and need more groups for as many units between two barriers.
        for (p.groups = std::min(p.T, kMostGroups); p.partials + p.groups * kGroupBytes > kSharedMemory;) p.groups--;
        const int bytes = p.partials + p.groups * kGroupBytes;
        const int blocks = std::min(multiprocessors(), resident<kernel>(kThreads, bytes));
        launch<kernel, kOverlaps | kCooperative>(blocks, kThreads, bytes, stream, p);
        return true;
    };
    const auto start_sizes = [&]<bool kFp8, int kDepth>() {
        const bool sizes_have_a_kernel = start.template operator()<kFp8, kDepth, 256, 8, 4, 8>() ||
                                         start.template operator()<kFp8, kDepth, 16, 4, 2, 4>();
        LING_CHECK(sizes_have_a_kernel);
    };
    const auto start_type = [&]<bool kFp8>() {
        const int steps = depth<kFp8>(p.T, p.H, routed.F, shared.F, topk);
        LING_CHECK(steps > 0);
        steps == 4 ? start_sizes.template operator()<kFp8, 4>() : start_sizes.template operator()<kFp8, 2>();
    };
    fp8 ? start_type.template operator()<true>() : start_type.template operator()<false>();
}

}  // namespace ling

#include "moe/unpermute.h"
#include "common.cuh"

namespace ling {
namespace {

constexpr int kThreads = 256, kBatch = 8;  // choices of a token whose rows load at once

// kVec elements as stored in memory: 16 bytes, or one element where rows are not aligned to 16 bytes
template <typename T, int kVec> struct Raw {
    alignas(kVec * sizeof(T)) T v[kVec];

    static __device__ Raw load(const T* p) {
        Raw raw;
        if constexpr (kVec == 1) raw.v[0] = *p;
        else *reinterpret_cast<uint4*>(raw.v) = *reinterpret_cast<const uint4*>(p);
        return raw;
    }
    static __device__ Raw zero() {
        Raw raw;
        if constexpr (kVec == 1) raw.v[0] = T(0.f);
        else *reinterpret_cast<uint4*>(raw.v) = {};
        return raw;
    }
    __device__ void store(T* p) const {
        if constexpr (kVec == 1) *p = v[0];
        else *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(v);
    }
};

// Neighbouring threads take neighbouring vectors of a token, blockDim.x of them; each has kBatch rows in flight.
template <typename T, int kVec, bool kWeights>
__global__ void __launch_bounds__(kThreads, 2)
    gather_sum_kernel(const T* __restrict__ y, const float* __restrict__ weights, const int* __restrict__ slot,
                      T* __restrict__ out, int64_t T_, int H, int topk) {
    using Row = Raw<T, kVec>;
    const int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (t >= T_) return;
    for (int h = threadIdx.x * kVec; h < H; h += blockDim.x * kVec) {
        float total[kVec] = {};
#pragma unroll 1
        for (int first = 0; first < topk; first += kBatch) {
            Row row[kBatch];
            float w[kBatch];
#pragma unroll
            for (int k = 0; k < kBatch; k++) {
                const int64_t s = first + k < topk ? slot[t * topk + first + k] : -1;
                row[k] = s >= 0 ? Row::load(y + s * H + h) : Row::zero();
                w[k] = kWeights && s >= 0 ? weights[t * topk + first + k] : 0;
            }
#pragma unroll
            for (int k = 0; k < kBatch; k++)
#pragma unroll
                for (int i = 0; i < kVec; i++) {
                    const float x = static_cast<float>(row[k].v[i]);
                    total[i] = __fadd_rn(total[i], kWeights ? __fmul_rn(w[k], x) : x);
                }
        }
        Row sum;
#pragma unroll
        for (int i = 0; i < kVec; i++) sum.v[i] = static_cast<T>(total[i]);
        sum.store(out + t * H + h);
    }
}

// The same layout; with dots a warp takes a whole token, so that its inner products need no barrier.
template <typename T, int kVec, bool kWeights, bool kDots>
__global__ void __launch_bounds__(kThreads, kDots ? 2 : 4)
    scatter_rows_kernel(const T* __restrict__ x, const float* __restrict__ weights, const T* __restrict__ y,
                        const int* __restrict__ offsets, const int* __restrict__ slot, T* __restrict__ out,
                        float* __restrict__ dots, int64_t T_, int H, int E, int topk) {
    using Row = Raw<T, kVec>;
    const int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (t >= T_) return;
    const int64_t end = offsets ? offsets[E] : T_ * topk;
    for (int first = 0; first < topk; first += kBatch) {
        int s[kBatch];
        float w[kBatch], dot[kBatch] = {};
#pragma unroll
        for (int k = 0; k < kBatch; k++) {
            const bool valid = first + k < topk;
            s[k] = valid ? slot[t * topk + first + k] : -1;
            w[k] = kWeights && valid ? weights[t * topk + first + k] : 0;
        }
        for (int h = threadIdx.x * kVec; h < H; h += blockDim.x * kVec) {
            const Row d = Row::load(x + t * H + h);
            if constexpr (kDots) {
                Row row[kBatch];
#pragma unroll
                for (int k = 0; k < kBatch; k++)
                    row[k] = s[k] >= 0 ? Row::load(y + int64_t{s[k]} * H + h) : Row::zero();
#pragma unroll
                for (int k = 0; k < kBatch; k++)
#pragma unroll
                    for (int i = 0; i < kVec; i++)
                        dot[k] += static_cast<float>(row[k].v[i]) * static_cast<float>(d.v[i]);
            }
#pragma unroll
            for (int k = 0; k < kBatch; k++) {
                Row scaled = d;
                if constexpr (kWeights)
#pragma unroll
                    for (int i = 0; i < kVec; i++) scaled.v[i] = static_cast<T>(static_cast<float>(d.v[i]) * w[k]);
                if (s[k] >= 0) scaled.store(out + int64_t{s[k]} * H + h);
                const int64_t row = t * topk + first + k;  // every token zeroes topk of the T * topk rows
                if (first + k < topk && row >= end) Row::zero().store(out + row * H + h);
            }
        }
        if constexpr (kDots)
#pragma unroll
            for (int k = 0; k < kBatch; k++) {
                const float sum = s[k] >= 0 ? warp_sum(dot[k]) : 0;  // a whole warp has the same s
                if (static_cast<int>(threadIdx.x) == k && first + k < topk) dots[t * topk + first + k] = sum;
            }
    }
}

// (threads along a row, rows of a block)
dim3 shape_of_block(int64_t vectors) {
    int along = 1;
    while (along < kThreads && along < vectors) along *= 2;
    return dim3(along, kThreads / along);
}

// f<T, kVec, true or false>(threads of a block): how wide the accesses to rows of H elements can be, and `choice`
template <typename F> void dispatch(const Tensor& x, bool aligned, bool choice, F&& f) {
    const int64_t H = x.shape[1];
    dispatch<float, f16, bf16>(x.dtype, [&]<typename T>() {
        const auto choose = [&]<int kVec>() {
            const dim3 block = shape_of_block(ceil_div<int64_t>(H, kVec));
            choice ? f.template operator()<T, kVec, true>(block) : f.template operator()<T, kVec, false>(block);
        };
        constexpr int kWide = 16 / sizeof(T);
        (aligned && H % kWide == 0) ? choose.template operator()<kWide>() : choose.template operator()<1>();
    });
}

}  // namespace

void gather_sum(cudaStream_t stream, Tensor y, Tensor weights, Tensor slot, Tensor out) {
    const int64_t S = y.shape[0], T = out.shape[0], H = out.shape[1], topk = slot.shape[1];
    LING_CHECK(y.is(y.dtype, {S, H}) && y.contiguous() && out.is(y.dtype, {T, H}) && out.contiguous());
    LING_CHECK(slot.is(DType::i32, {T, topk}) && slot.contiguous());
    LING_CHECK(!weights.ndim || (weights.is(DType::f32, {T, topk}) && weights.contiguous()));
    if (T == 0 || H == 0) return;
    dispatch(y, y.aligned() && out.aligned(), weights.ndim, [&]<typename X, int kVec, bool kWeights>(dim3 block) {
        launch<gather_sum_kernel<X, kVec, kWeights>>(ceil_div<int64_t>(T, block.y), block, 0, stream, y.ptr<X>(),
                                                     weights.ptr<float>(), slot.ptr<int>(), out.ptr<X>(), T,
                                                     static_cast<int>(H), static_cast<int>(topk));
    });
}

void scatter_rows(cudaStream_t stream, Tensor x, Tensor weights, Tensor y, Tensor offsets, Tensor slot, Tensor out,
                  Tensor dots) {
    const int64_t T = x.shape[0], H = x.shape[1], topk = slot.shape[1], S = out.shape[0];
    const bool with_dots = dots.ndim;
    LING_CHECK(x.is(x.dtype, {T, H}) && x.contiguous() && out.is(x.dtype, {S, H}) && out.contiguous());
    LING_CHECK(S == T * topk && slot.is(DType::i32, {T, topk}) && slot.contiguous());
    LING_CHECK(!weights.ndim || (weights.is(DType::f32, {T, topk}) && weights.contiguous()));
    LING_CHECK(!offsets.ndim || (offsets.ndim == 1 && offsets.dtype == DType::i32 && offsets.contiguous()));
    LING_CHECK(!with_dots || (weights.ndim && y.is(x.dtype, {S, H}) && y.contiguous()));
    LING_CHECK(!with_dots || (dots.is(DType::f32, {T, topk}) && dots.contiguous()));
    if (T == 0 || H == 0) return;
    const bool aligned = x.aligned() && out.aligned() && (!with_dots || y.aligned());
    dispatch(x, aligned, weights.ndim, [&]<typename X, int kVec, bool kWeights>(dim3 block) {
        const auto run = [&]<bool kDots>() {
            if (kDots) block = dim3(32, kThreads / 32);
            launch<scatter_rows_kernel<X, kVec, kWeights, kDots>>(
                ceil_div<int64_t>(T, block.y), block, 0, stream, x.ptr<X>(), weights.ptr<float>(), y.ptr<X>(),
                offsets.ptr<int>(), slot.ptr<int>(), out.ptr<X>(), dots.ptr<float>(), T, static_cast<int>(H),
                static_cast<int>(offsets.shape[0] - 1), static_cast<int>(topk));
        };
        if constexpr (kWeights) with_dots ? run.template operator()<true>() : run.template operator()<false>();
        else run.template operator()<false>();
    });
}

}  // namespace ling

#include "norm/qk_norm_rope.h"
#include "norm/head.cuh"

namespace ling {
namespace {

constexpr int kThreads = 128, kHeads = kThreads / kLanes;

struct Positions {
    const void* data;
    bool int64;
    __device__ int64_t operator[](int64_t t) const {
        return int64 ? static_cast<const int64_t*>(data)[t] : static_cast<const int*>(data)[t];
    }
};

// A block has one token. Each half warp holds the token's angles and computes every 8th head, with up to 4 loads in
// flight.
template <typename T, typename W>
__global__ void __launch_bounds__(kThreads)
    qk_norm_rope_fwd_kernel(const T* qkv, const W* q_weight, const W* k_weight, const float* cos, const float* sin,
                            Positions positions, const int64_t* slots, T* q, T* k, T* v, T* k_cache, T* v_cache, int Hq,
                            int Hkv, int P, int64_t cells, float eps) {
    constexpr int kAtOnce = 4;
    const int64_t t = blockIdx.x;
    const int H = Hq + 2 * Hkv, lane = threadIdx.x % kLanes;
    const Angles angles(cos, sin, positions[t], P, true);
    const int64_t slot = slots ? slots[t] : -1;
    const int end = v ? H : Hq + Hkv;
    for (int first = q ? 0 : Hq; first < end; first += kHeads * kAtOnce) {  // uniform: all threads shuffle
        Vec<kVec> x[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
            if (const int h = first + i * kHeads + threadIdx.x / kLanes; h < end)
                x[i] = load<kVec>(qkv + (t * H + h) * kDim + lane * kVec);
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int h = first + i * kHeads + threadIdx.x / kLanes;
            Vec<kVec> y = x[i];
            const Vec<kVec> w = load<kVec>((h < Hq ? q_weight : k_weight) + lane * kVec);
            norm_and_rotate(y, w, angles, eps);
            if (h >= end) continue;
            if (h < Hq) {
                store(q + (t * Hq + h) * kDim + lane * kVec, y);
                continue;
            }
            const bool key = h < Hq + Hkv;
            const int head = h - Hq - (key ? 0 : Hkv);
            if (!key) y = x[i];
            store((key ? k : v) + (t * Hkv + head) * kDim + lane * kVec, y);
            if (slot >= 0 && slot < cells)
                store((key ? k_cache : v_cache) + (slot * Hkv + head) * kDim + lane * kVec, y);
        }
    }
}

// Block (p, group) has a group of heads of every gridDim.x-th run of tokens, two of them in flight for half a warp, and
// sums its part of dw in registers. With z the gradient before the rotation, g = z w and x^ = x rstd:
// dx = rstd (g - x^ mean(g x^)),  dw = sum of z x^.
template <typename T, typename W>
__global__ void __launch_bounds__(kThreads)
    qk_norm_rope_bwd_kernel(const T* dq, const T* dk, const T* dv, const T* qkv, const W* q_weight, const W* k_weight,
                            const float* cos, const float* sin, Positions positions, T* dqkv, float* dw, int tokens,
                            int Hq, int Hkv, int P, int heads, float eps) {
    constexpr int kAtOnce = 2;
    __shared__ __align__(16) float sums[kHeads][kDim + 16];
    const int q_groups = ceil_div(Hq, heads), kv_groups = ceil_div(Hkv, heads), H = Hq + 2 * Hkv;
    const int kind =
        (static_cast<int>(blockIdx.y) >= q_groups) + (static_cast<int>(blockIdx.y) >= q_groups + kv_groups);
    const int group = blockIdx.y - (kind > 0) * q_groups - (kind > 1) * kv_groups;
    const int half_warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes, h = group * heads + half_warp % heads;
    const int num = kind ? Hkv : Hq, column = lane * kVec;
    const T* dout = (kind == 0 ? dq : kind == 1 ? dk : dv) + h * kDim + column;
    const int64_t offset = ((kind > 0) * Hq + (kind > 1) * Hkv + h) * kDim + column;

    Vec<kVec> w = {}, dws = {};
    if (kind < 2) w = load<kVec>((kind ? k_weight : q_weight) + column);
    const int run = kHeads / heads;  // tokens that the block has at once
    const int64_t stride = int64_t{gridDim.x} * run;
    for (int64_t first = blockIdx.x * run; first < tokens; first += kAtOnce * stride) {
        Vec<kVec> xs[kAtOnce] = {}, zs[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int64_t t = first + i * stride + half_warp / heads;
            if (h >= num || t >= tokens) continue;
            zs[i] = load<kVec>(dout + t * num * kDim);
            if (kind < 2) xs[i] = load<kVec>(qkv + t * H * kDim + offset);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
            const int64_t t = first + i * stride + half_warp / heads;
            const bool real = h < num && t < tokens;
            Vec<kVec>&x = xs[i], &z = zs[i];
            if (kind < 2) {
                const Angles angles(cos, sin, real ? positions[t] : 0, P, real);
                const float rstd = rstd_of(x, eps), r = real ? rstd : 0;  // without eps it is inf where no row is
                angles.rotate(z, true);
                float sum = 0;
#pragma unroll
                for (int j = 0; j < kVec; j++) {
                    x[j] *= r;
                    dws[j] += z[j] * x[j];
                    z[j] *= w[j];
                    sum += z[j] * x[j];
                }
                const float mean = head_sum(sum) / kDim;
#pragma unroll
                for (int j = 0; j < kVec; j++) z[j] = r * (z[j] - x[j] * mean);
            }
            if (real) store(dqkv + t * H * kDim + offset, z);
        }
    }
    if (kind == 2) return;
    // Dims 4 .. 7 of every eight lie apart, 16 banks further: no bank conflicts, neither here nor below.
    constexpr int kApart = kDim / 2 + 16;
    store(sums[half_warp] + column / 2, Vec<4>{dws[0], dws[1], dws[2], dws[3]});
    store(sums[half_warp] + column / 2 + kApart, Vec<4>{dws[4], dws[5], dws[6], dws[7]});
    __syncthreads();
    float sum = 0;
    for (const auto& part : sums) sum += part[threadIdx.x / 4 % 2 * kApart + threadIdx.x / 8 * 4 + threadIdx.x % 4];
    dw[(int64_t{blockIdx.x} * (q_groups + kv_groups) + blockIdx.y) * kDim + threadIdx.x] = sum;
}

struct Sizes {
    int64_t T, H, P;
};

Sizes check(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
            const Tensor& positions) {
    const int64_t T = qkv.shape[0], H = qkv.shape[1], P = cos.shape[0];
    LING_CHECK(qkv.is(qkv.dtype, {T, H, kDim}) && qkv.contiguous() && T < 1ll << 31);
    LING_CHECK(q_weight.dtype == qkv.dtype || q_weight.dtype == DType::f32);
    LING_CHECK(q_weight.is(q_weight.dtype, {kDim}) && k_weight.is(q_weight.dtype, {kDim}));
    LING_CHECK(q_weight.contiguous() && k_weight.contiguous());
    LING_CHECK(cos.is(DType::f32, {P, kHalf}) && sin.is(DType::f32, {P, kHalf}) && cos.contiguous() &&
               sin.contiguous());
    LING_CHECK((positions.dtype == DType::i32 || positions.dtype == DType::i64) && positions.contiguous());
    LING_CHECK(positions.is(positions.dtype, {T}) && P < 1ll << 31);
    LING_CHECK(qkv.aligned() && q_weight.aligned() && k_weight.aligned() && cos.aligned() && sin.aligned());
    return {T, H, P};
}

// f<T, W>() for the dtypes of qkv and of the weights
template <typename F> void dispatch_pair(DType dtype, DType weights, F&& f) {
    dispatch<float, f16, bf16>(dtype, [&]<typename T>() {
        weights == dtype ? f.template operator()<T, T>() : f.template operator()<T, float>();
    });
}

}  // namespace

void qk_norm_rope_fwd(cudaStream_t stream, Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,
                      Tensor positions, Tensor slots, Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache,
                      float eps) {
    const auto [T, H, P] = check(qkv, q_weight, k_weight, cos, sin, positions);
    const int64_t Hkv = k.shape[1], Hq = H - 2 * Hkv, cells = k_cache.ndim ? k_cache.shape[0] * k_cache.shape[1] : 0;
    LING_CHECK(k.is(qkv.dtype, {T, Hkv, kDim}) && k.contiguous() && Hq >= 0 && (v.ndim || !k_cache.ndim));
    LING_CHECK(!q.ndim || (q.is(qkv.dtype, {T, Hq, kDim}) && q.contiguous()));
    LING_CHECK(!v.ndim || (v.is(qkv.dtype, {T, Hkv, kDim}) && v.contiguous()));
    if (k_cache.ndim) {
        const int64_t blocks = k_cache.shape[0], size = k_cache.shape[1];
        LING_CHECK(k_cache.is(qkv.dtype, {blocks, size, Hkv, kDim}) &&
                   v_cache.is(qkv.dtype, {blocks, size, Hkv, kDim}));
        LING_CHECK(k_cache.contiguous() && v_cache.contiguous() && k_cache.aligned() && v_cache.aligned());
        LING_CHECK(slots.is(DType::i64, {T}) && slots.contiguous());
    }
    if (T == 0) return;
    LING_CHECK(q.aligned() && k.aligned() && v.aligned());
    const Positions token_positions{positions.data, positions.dtype == DType::i64};
    dispatch_pair(qkv.dtype, q_weight.dtype, [&]<typename E, typename W>() {
        launch<qk_norm_rope_fwd_kernel<E, W>>(static_cast<unsigned>(T), kThreads, 0, stream, qkv.ptr<E>(),
                                              q_weight.ptr<W>(), k_weight.ptr<W>(), cos.ptr<float>(), sin.ptr<float>(),
                                              token_positions, slots.ptr<int64_t>(), q.ptr<E>(), k.ptr<E>(), v.ptr<E>(),
                                              k_cache.ptr<E>(), v_cache.ptr<E>(), static_cast<int>(Hq),
                                              static_cast<int>(Hkv), static_cast<int>(P), cells, eps);
    });
}

void qk_norm_rope_bwd(cudaStream_t stream, Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor q_weight,
                      Tensor k_weight, Tensor cos, Tensor sin, Tensor positions, Tensor dqkv, Tensor dw, float eps) {
    const auto [T, H, P] = check(qkv, q_weight, k_weight, cos, sin, positions);
    const int64_t Hq = dq.shape[1], Hkv = dk.shape[1], programs = dw.shape[0], groups = dw.shape[1];
    LING_CHECK(dq.is(qkv.dtype, {T, Hq, kDim}) && dk.is(qkv.dtype, {T, Hkv, kDim}) && dv.is(qkv.dtype, {T, Hkv, kDim}));
    LING_CHECK(H == Hq + 2 * Hkv && dq.contiguous() && dk.contiguous() && dv.contiguous());
    LING_CHECK(dqkv.is(qkv.dtype, {T, H, kDim}) && dqkv.contiguous());
    LING_CHECK(dw.is(DType::f32, {programs, groups, kDim}) && dw.contiguous());
    int heads = 1;  // of a group, from the number of groups
    while (heads < kHeads && ceil_div<int64_t>(Hq, heads) + ceil_div<int64_t>(Hkv, heads) > groups) heads *= 2;
    LING_CHECK((ceil_div<int64_t>(Hq, heads) + ceil_div<int64_t>(Hkv, heads) == groups));
    if (T == 0) return;
    LING_CHECK(dq.aligned() && dk.aligned() && dv.aligned() && dqkv.aligned());
    const Positions token_positions{positions.data, positions.dtype == DType::i64};
    const dim3 grid(programs, groups + ceil_div<int64_t>(Hkv, heads));
    dispatch_pair(qkv.dtype, q_weight.dtype, [&]<typename E, typename W>() {
        launch<qk_norm_rope_bwd_kernel<E, W>>(
            grid, kThreads, 0, stream, dq.ptr<E>(), dk.ptr<E>(), dv.ptr<E>(), qkv.ptr<E>(), q_weight.ptr<W>(),
            k_weight.ptr<W>(), cos.ptr<float>(), sin.ptr<float>(), token_positions, dqkv.ptr<E>(), dw.ptr<float>(),
            static_cast<int>(T), static_cast<int>(Hq), static_cast<int>(Hkv), static_cast<int>(P), heads, eps);
    });
}

}  // namespace ling

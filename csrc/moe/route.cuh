// Routing of one token by one warp, as route.h defines it, for all kernels that route.
#pragma once
#include "common.cuh"

#include <cfloat>

namespace ling::routing {
namespace {

// An unsigned integer that orders like the float. Every finite float gives more than 0; key 0 means "not to be chosen".
__device__ unsigned ordered(float x) {
    const unsigned u = __float_as_uint(x);
    return u >> 31 ? ~u : u | 0x80000000u;
}

// log(sum(exp(x))) over the warp's N values per lane; also where x has infinities or NaN. Called by all 32 lanes.
template <int N> __device__ float log_sum_exp(const float (&x)[N]) {
    float top = x[0], sum = 0;
#pragma unroll
    for (int i = 1; i < N; i++) top = fmaxf(top, x[i]);
    for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    top = fabsf(top) == INFINITY ? 0 : top;
#pragma unroll
    for (int i = 0; i < N; i++) sum += expf(x[i] - top);
    return logf(warp_sum(sum)) + top;
}

// The score function (sigmoid). ops/route.py defines it for the reference and for Triton. All 32 lanes call the
// functions of a statistic, which may shuffle; logits x are -inf in lanes without experts.
struct Score {
    // What the scores of a row share, from the warp's logits x: nothing for sigmoid, log_sum_exp(x) for softmax.
    template <int N> __device__ static float row_statistic(const float (&x)[N]) { return 0; }
    // The same from only the chosen experts: kTop neighbouring lanes with one logit each. It may differ from
    // row_statistic by a common factor of all scores, because the weights are normalised.
    template <int kTop> __device__ static float chosen_statistic(float x) { return 0; }
    __device__ static float of(float x, float statistic) { return reciprocal(1 + expf(-x)); }
    // ds/dx at score s, for the gradient through normalised weights.
    __device__ static float derivative(float s) { return s * (1 - s); }
};

template <int N> __device__ void load_lane(float (&v)[N], const float* p) {
    if constexpr (N == 1) v[0] = *p;
    else
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const auto four = load<4>(p + i);
#pragma unroll
            for (int j = 0; j < 4; j++) v[i + j] = four[j];
        }
}

// The weight of each of kTop neighbouring lanes, from its logit; 0 where `routed` is false.
template <int kTop> __device__ float weight(float x, bool routed, float scale) {
    const float statistic = Score::chosen_statistic<kTop>(x), s = routed ? Score::of(x, statistic) : 0;
    float sum = s;
#pragma unroll
    for (int d = 1; d < kTop; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
    return s / (sum + 1e-20f) * scale;
}

// Lane l owns kPerLane neighbouring experts, so a group is kLanes neighbouring lanes. The experts of the best groups
// are spread evenly over the warp and sorted within each lane, so a choice is one maximum over the lanes' largest keys.
template <int kExperts_, int kGroups, int kTopGroups, int kTop_> struct Router {
    static constexpr int kExperts = kExperts_, kTop = kTop_, kPerLane = kExperts > 32 ? kExperts / 32 : 1;
    static constexpr int kLanes = kExperts / kPerLane / kGroups;
    static constexpr int kKeep = kPerLane > 1 ? kExperts / kGroups * kTopGroups / 32 : 1;  // candidates of a lane
    static_assert(kExperts <= 256 && kExperts / kGroups > 1 && 32 % kTop == 0 &&
                  (kPerLane == 1 || kPerLane == 2 * kKeep));
    const int lane = threadIdx.x % 32, group = lane / kLanes;
    const bool exists = lane * kPerLane < kExperts;  // this lane has experts
    float bias[kPerLane] = {};

    __device__ explicit Router(const float* all) {
        if (exists) load_lane(bias, all + lane * kPerLane);
    }

    // x: the lane's logits, -inf in a lane without experts. Writes the kTop chosen experts. Called by all 32 lanes.
    __device__ void choose(const float (&x)[kPerLane], uint8_t* chosen) const {
        const unsigned below = (1u << lane) - 1;
        float v[kPerLane];
        const float statistic = Score::row_statistic(x);
#pragma unroll
        for (int i = 0; i < kPerLane; i++) {
            const float biased = Score::of(x[i], statistic) + bias[i];
            v[i] = biased == biased ? fminf(fmaxf(biased, -FLT_MAX), FLT_MAX) : -1e30f;  // NaN loses to every number
        }

        // Scores of groups, and `better`: the rank of this lane's group; its lanes share the comparisons.
        float top = v[0], second = -INFINITY;
        if constexpr (kPerLane > 1) top = fmaxf(v[0], v[1]), second = fminf(v[0], v[1]);
#pragma unroll
        for (int i = 2; i < kPerLane; i++) second = fmaxf(second, fminf(top, v[i])), top = fmaxf(top, v[i]);
#pragma unroll
        for (int d = 1; d < kLanes; d *= 2) {
            const float o = __shfl_xor_sync(~0u, top, d), p = __shfl_xor_sync(~0u, second, d);
            second = fmaxf(fminf(top, o), fmaxf(second, p));
            top = fmaxf(top, o);
        }
        const unsigned group_score = ordered(top + second);
        int better = 0;
#pragma unroll
        for (int i = 0; i < kGroups; i += kLanes) {
            const int g = i + lane % kLanes;
            const unsigned other = __shfl_sync(~0u, group_score, g * kLanes);
            const bool wins = g < kGroups && other + (g < group) > group_score;  // the lower index wins ties
            better += __popc(__ballot_sync(~0u, wins) >> group * kLanes & ((1u << kLanes) - 1));
        }
        const bool keep = exists && better < kTopGroups;

        // The candidates: `expert` and the kKeep - 1 after it, in ascending order from lane to lane.
        unsigned key[kKeep];
        int expert = lane;
        if constexpr (kPerLane == 1) key[0] = keep ? ordered(v[0]) : 0;
        else {
            constexpr int kSpread = 32 / kTopGroups;  // lanes of a group that is kept, from here on
            unsigned kept_groups = __ballot_sync(~0u, keep && lane % kLanes == 0);
#pragma unroll
            for (int i = 1; i < kTopGroups; i++)
                if (lane >= i * kSpread) kept_groups &= kept_groups - 1;
            const int from = __ffs(kept_groups) - 1 + lane % kSpread / 2, half = lane % 2;
#pragma unroll
            for (int j = 0; j < kKeep; j++) {
                const float low = __shfl_sync(~0u, v[j], from), high = __shfl_sync(~0u, v[j + kKeep], from);
                key[j] = ordered(half ? high : low);
            }
            expert = from * kPerLane + half * kKeep;
        }

        // Stable descending sort of the lane's candidates; `order` holds their experts, one byte each.
        int sorted[kKeep];
#pragma unroll
        for (int j = 0; j < kKeep; j++) sorted[j] = expert + j;
#pragma unroll
        for (int m = kKeep - 1; m > 0; m--)
#pragma unroll
            for (int j = 0; j < m; j++) {
                const bool swap = key[j + 1] > key[j];
                const unsigned high = swap ? key[j + 1] : key[j], low = swap ? key[j] : key[j + 1];
                const int before = swap ? sorted[j + 1] : sorted[j], after = swap ? sorted[j] : sorted[j + 1];
                key[j] = high, key[j + 1] = low, sorted[j] = before, sorted[j + 1] = after;
            }
        unsigned order = 0;
#pragma unroll
        for (int j = 0; j < kKeep; j++) order |= sorted[j] << 8 * j;

#pragma unroll
        for (int i = 0; i < kTop; i++) {
            const unsigned best = __reduce_max_sync(~0u, key[0]);
            LING_DEVICE_CHECK(best != 0);
            const unsigned equal = __ballot_sync(~0u, key[0] == best);
            const bool wins = key[0] == best && !(equal & below);
            if (wins) chosen[i] = order;
            order = wins ? order >> 8 : order;
#pragma unroll
            for (int j = 1; j < kKeep; j++) key[j - 1] = wins ? key[j] : key[j - 1];
            key[kKeep - 1] = wins ? 0 : key[kKeep - 1];
        }
    }
};

}  // namespace
}  // namespace ling::routing

#include "decode/sample.h"
#include "cluster.cuh"

#include <cfloat>

namespace ling {
namespace sampling {
namespace {

// A cluster takes a row: block r the logits from r * slice on. Everything that is added up is an integer, so that no
// sum depends on an order: not on blocks, threads, or the batch.
constexpr int kBlocks = 8, kThreads = 1024, kWarps = kThreads / 32, kDigits = 256;
constexpr unsigned kLast = ~0u;                        // key of a logit that weighs nothing
constexpr float kKeys = 1 << 27, kWeights = 1u << 31;  // keys per unit of a logit over its temperature; weight of key 0
constexpr float kShares = 1 << 24;

struct Problem {
    const void* logits;
    const int64_t *lanes, *positions, *seeds, *top_k;
    const int* token_ids;
    const float *temperature, *top_p, *min_p, *penalty;
    int64_t* tokens;
    int64_t stride, P;  // of logits' rows; columns of token_ids
    int V, n, slice;    // rows of a lane; logits of a block, a multiple of 8
    bool random, penalised;
};

struct Part {  // what a block found in its slice
    uint64_t weight, ties;
};

struct Shared {
    unsigned histogram[2][2][kDigits];  // two in turn, of the low and high 16 bits of weights
    uint64_t scan[kWarps];
    Part warps[kWarps];
    uint64_t best;
    Part part;
    uint64_t before;
    int digit;
};

// Of the keys: kept are those below `key`, and the first `ties` of those equal to it
struct Cut {
    unsigned key = kLast;
    uint64_t ties = ~uint64_t{0};
};

// Keys and weights as sample_ref defines them. A likelier token has a smaller key.
__device__ unsigned key_of(float logit, float largest, float scale) {
    const float gap = __fmul_rn(largest - logit, scale);
    return gap < 32 ? static_cast<unsigned>(gap * kKeys) : kLast;
}
__device__ unsigned weight_of(unsigned key) {
    return __float2uint_rn(expf(static_cast<float>(key) * (-1 / kKeys)) * kWeights);
}

// total * share / 2^24, rounded down; the product may exceed 64 bits.
__device__ uint64_t share_of(uint64_t total, uint64_t share) {
    return (total >> 24) * share + ((total & 0xFFFFFF) * share >> 24);
}

__device__ uint64_t warp_sum(uint64_t v) {
    for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    return v;
}
__device__ uint64_t warp_scan(uint64_t v) {  // the sum of this and the lower lanes' values
    const int lane = threadIdx.x % 32;
    for (int d = 1; d < 32; d *= 2) {
        const uint64_t other = __shfl_up_sync(~0u, v, d);
        if (lane >= d) v += other;
    }
    return v;
}

// 24 random bits: SplitMix64 of seed and position (uniforms in ops/sample.py)
__device__ uint64_t random_bits(uint64_t seed, uint64_t position) {
    uint64_t x = seed + (position + 1) * 0x9E3779B97F4A7C15;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return (x ^ x >> 31) >> 40;
}

// The order of floats, NaN above all, as unsigned; above it the lower index.
__device__ uint64_t ranked(float value, int index) {
    const unsigned bits = __float_as_uint(value + 0.f);  // -0 equals 0
    const unsigned order = value != value ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
    return uint64_t{order} << 32 | ~static_cast<unsigned>(index);
}
__device__ float value_of(uint64_t rank) {
    const unsigned order = rank >> 32;
    return __uint_as_float(order >> 31 ? order & ~(1u << 31) : ~order);
}

class Row {
    Shared& s;
    unsigned* const keys;   // of the block's slice; before, the logits' bits
    const int first, size;  // the slice
    int turn = 0;           // which histogram is next

    __device__ int vectors() const { return (size + 3) / 4; }
    template <typename F> __device__ void for_keys(int begin, int end, int threads,
                                                   F&& f) const {  // by vectors of four
#pragma unroll 2
        for (int i = begin; i < end; i += threads) {
            const uint4 four = reinterpret_cast<const uint4*>(keys)[i];
            f(four.x), f(four.y), f(four.z), f(four.w);
        }
    }

public:
    __device__ Row(Shared& s, unsigned* keys, int first, int size) : s(s), keys(keys), first(first), size(size) {}

    // Bit i of `seen`: whether the sequence contains token first + i.
    __device__ void find_seen(unsigned* seen, const int* ids, int64_t count) const {
        for (int i = threadIdx.x; i < (size + 31) / 32; i += kThreads) seen[i] = 0;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < count; i += kThreads) {
            const int at = max(ids[i], 0) - first;
            if (at >= 0 && at < size) atomicOr(seen + at / 32, 1u << at % 32);
        }
        __syncthreads();
    }

    // Reads the slice, and returns the rank of the row's largest logit. seen: of penalty's tokens, or null.
    template <typename T>
    __device__ uint64_t read(const T* logits, const unsigned* seen, float penalty, bool keep) {
        constexpr int kVector = 16 / sizeof(T), kStep = kThreads * kVector;
        constexpr int kAhead = 3;  // loads of a thread in flight: all of Ling's vocabulary in bf16
        float best = -INFINITY;
        int index = first;
        const auto take = [&](float x, int i) {
            if (seen && seen[i / 32] >> i % 32 & 1) x = x > 0 ? __fdiv_rn(x, penalty) : x * penalty;
            if (x > best || x != x) best = x, index = first + i;
            if (keep) keys[i] = __float_as_uint(x);
        };
        const bool vectors = reinterpret_cast<uintptr_t>(logits) % 16 == 0;
        const int whole = vectors ? size / kVector * kVector : 0;
        for (int i = threadIdx.x * kVector; i < whole; i += kAhead * kStep) {
            uint4 raw[kAhead];
#pragma unroll
            for (int k = 0; k < kAhead; k++)
                if (i + k * kStep < whole) raw[k] = *reinterpret_cast<const uint4*>(logits + i + k * kStep);
#pragma unroll
            for (int k = 0; k < kAhead; k++) {
                if (i + k * kStep >= whole) break;
#pragma unroll
                for (int j = 0; j < kVector; j++)
                    take(static_cast<float>(reinterpret_cast<const T*>(raw + k)[j]), i + k * kStep + j);
            }
        }
        for (int i = whole + threadIdx.x; i < size; i += kThreads) take(static_cast<float>(logits[i]), i);
        uint64_t rank = size ? ranked(best, index) : 0;
        for (int d = 16; d; d /= 2) rank = max(rank, __shfl_xor_sync(~0u, rank, d));
        if (threadIdx.x % 32 == 0) s.scan[threadIdx.x / 32] = rank;
        __syncthreads();
        if (threadIdx.x < 32) {
            rank = s.scan[threadIdx.x];
            for (int d = 16; d; d /= 2) rank = max(rank, __shfl_xor_sync(~0u, rank, d));
            if (threadIdx.x == 0) s.best = rank;
        }
        cluster_barrier();
        for (int r = 0; r < kBlocks; r++) rank = max(rank, *of_block(&s.best, r));
        return rank;
    }

    // scale: 1 / temperature. The slice is filled up to whole vectors.
    __device__ void make_keys(float largest, float scale) {
        for (int i = threadIdx.x; i < 4 * vectors(); i += kThreads)
            keys[i] = i < size ? key_of(__uint_as_float(keys[i]), largest, scale) : kLast;
        __syncthreads();
    }

    // Of keys up to `limit`: the smallest up to which the values of keys add up to goal(their sum), as `key`, and as
    // `ties` what is missing from the goal before it. kLast if the sum is less. value(kLast) counts as 0.
    template <typename Value, typename Goal>
    __device__ Cut select(unsigned limit, Value value, Goal goal_of) {
        unsigned key = 0;
        uint64_t goal = 0, below = 0;
#pragma unroll 1
        for (int shift = 24; shift >= 0; shift -= 8) {
            unsigned (&histogram)[2][kDigits] = s.histogram[turn];
            turn ^= 1;
            if (threadIdx.x < 2 * kDigits) histogram[threadIdx.x / kDigits][threadIdx.x % kDigits] = 0;
            __syncthreads();
            // limit >= key: the keys with its digits so far are those up to key + reach
            const unsigned reach = min(min(limit, kLast - 1) - key, shift < 24 ? (1u << (shift + 8)) - 1 : kLast);
            for_keys(threadIdx.x, vectors(), kThreads, [&](unsigned k) {
                if (k - key > reach) return;
                const unsigned v = value(k), digit = k >> shift & (kDigits - 1);
                if (v & 0xFFFF) atomicAdd(&histogram[0][digit], v & 0xFFFF);
                if (v >> 16) atomicAdd(&histogram[1][digit], v >> 16);
            });
            cluster_barrier();
            uint64_t own = 0;
            if (threadIdx.x < kDigits)
                for (int r = 0; r < kBlocks; r++)
                    own += *of_block(&histogram[0][threadIdx.x], r) +
                           (uint64_t{*of_block(&histogram[1][threadIdx.x], r)} << 16);
            uint64_t sum = warp_scan(own);
            if (threadIdx.x % 32 == 31) s.scan[threadIdx.x / 32] = sum;
            __syncthreads();
            uint64_t all = 0;
            for (int w = 0; w < kDigits / 32; w++) {
                if (w < static_cast<int>(threadIdx.x / 32)) sum += s.scan[w];
                all += s.scan[w];
            }
            if (shift == 24 && all < (goal = goal_of(all))) return {};
            sum += below;
            if (threadIdx.x < kDigits && sum - own < goal && goal <= sum) s.digit = threadIdx.x, s.before = sum - own;
            __syncthreads();
            key |= static_cast<unsigned>(s.digit) << shift, below = s.before;
        }
        return {key, goal - below};
    }

    // The token at `bits` / 2^24 of the weight of the kept tokens, of those whose weight is at least `least`; the one
    // warp of the cluster that finds it writes it.
    __device__ void draw(Cut cut, unsigned least, uint64_t bits, int64_t* token) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_rank();
        const auto kept_weight = [&](unsigned key) {
            const unsigned w = weight_of(key);
            return w >= least ? w : 0;
        };
        const unsigned of_tie = kept_weight(cut.key);
        const int share = ceil_div(vectors(), kWarps), begin = min(warp * share, vectors());
        const int end = min(begin + share, vectors());  // of the warp's vectors of four keys
        uint64_t weight = 0, ties = 0;
        for_keys(begin + lane, end, 32, [&](unsigned key) {
            if (key < cut.key) weight += kept_weight(key);
            ties += key == cut.key;
        });
        weight = warp_sum(weight), ties = warp_sum(ties);
        if (lane == 0) s.warps[warp] = {weight, ties};
        __syncthreads();
        const Part mine = s.warps[lane];
        weight = warp_sum(mine.weight), ties = warp_sum(mine.ties);
        if (threadIdx.x == 0) s.part = {weight, ties};
        cluster_barrier();

        uint64_t left = cut.ties, total = 0, before = 0, left_here = 0;
        for (int r = 0; r < kBlocks; r++) {
            if (r == rank) before = total, left_here = left;
            const Part part = *of_block(&s.part, r);
            const uint64_t kept = min(left, part.ties);
            total += part.weight + kept * of_tie, left -= kept;
        }
        const uint64_t target = share_of(total, bits);
        // by warps, in the same way
        for (int w = 0; w < warp; w++) {
            const uint64_t kept = min(left_here, s.warps[w].ties);
            before += s.warps[w].weight + kept * of_tie, left_here -= kept;
        }
        const uint64_t here = s.warps[warp].weight + min(left_here, s.warps[warp].ties) * of_tie;
        if (target < before || target >= before + here) return;
        for (int i = 4 * begin; i < 4 * end; i += 32) {
            const unsigned key = i + lane < 4 * end ? keys[i + lane] : kLast;
            const unsigned tied = __ballot_sync(~0u, key == cut.key);
            const unsigned earlier = __popc(tied & ((1u << lane) - 1));
            const bool kept = key < cut.key || (tied >> lane & 1 && earlier < left_here);
            const uint64_t sum = warp_scan(kept ? kept_weight(key) : 0);
            const unsigned past = __ballot_sync(~0u, target < before + sum);
            if (past) {
                if (lane == 0) *token = first + i + __ffs(past) - 1;
                return;
            }
            before += __shfl_sync(~0u, sum, 31);
            left_here -= min(left_here, uint64_t(__popc(tied)));
        }
    }
};

template <typename T>
__global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads)
    sample_kernel(const __grid_constant__ Problem p) {
    __shared__ Shared shared;
    launch_dependents();
    wait_for_previous();
    const int64_t row = blockIdx.x / kBlocks, lane = p.random || p.penalised ? p.lanes[row / p.n] : 0;
    const int first = min(static_cast<int>(cluster_rank()) * p.slice, p.V), size = min(p.slice, p.V - first);
    unsigned* const keys = dynamic_shared<unsigned>();
    unsigned* const bits = keys + (p.random ? p.slice : 0);
    Row slice(shared, keys, first, size);

    const float temperature = p.random ? p.temperature[lane] : 0, penalty = p.penalised ? p.penalty[lane] : 1;
    const unsigned* const seen = penalty != 1 ? bits : nullptr;
    if (seen) slice.find_seen(bits, p.token_ids + lane * p.P, min(p.positions[row] + 1, p.P));
    const T* const logits = static_cast<const T*>(p.logits) + row * p.stride + first;
    const uint64_t best = slice.read(logits, seen, penalty, temperature > 0);
    const float largest = value_of(best);
    if (!isfinite(largest) || temperature <= 0) {
        if (threadIdx.x == 0 && cluster_rank() == 0)
            p.tokens[row] = isfinite(largest) ? static_cast<int64_t>(~static_cast<unsigned>(best)) : -1;
    } else {
        slice.make_keys(largest, fminf(__frcp_rn(temperature), FLT_MAX));
        Cut cut;
        if (p.top_k[lane] < p.V)
            cut.key =
                slice
                    .select(
                        kLast, [](unsigned) { return 1u; }, [&](uint64_t) { return max(p.top_k[lane], int64_t{1}); })
                    .key;
        if (const float top_p = p.top_p[lane]; top_p < 1) {
            cut = slice.select(cut.key, weight_of, [&](uint64_t all) {
                return max(share_of(all, __float2uint_rn(top_p * kShares)), uint64_t{1});
            });
            cut.ties = (cut.ties + weight_of(cut.key) - 1) / weight_of(cut.key);
        }
        const auto least = static_cast<unsigned>(ceilf(p.min_p[lane] * kWeights));
        slice.draw(cut, least, random_bits(p.seeds[lane], p.positions[row]), p.tokens + row);
    }
    cluster_barrier();  // others may still read this block's shared memory
}

int slice_of(int64_t V) { return ceil_div<int64_t>(V, 8 * kBlocks) * 8; }
int bytes_of(int slice, bool random, bool penalised) {
    return (random ? slice * 4 : 0) + (penalised ? ceil_div(slice, 32) * 4 : 0);
}

}  // namespace
}  // namespace sampling

using namespace sampling;

void sample_fwd(cudaStream_t stream, Tensor logits, Tensor lanes, Tensor positions, Tensor token_ids, Tensor seeds,
                Tensor temperature, Tensor top_p, Tensor min_p, Tensor repetition_penalty, Tensor top_k, Tensor tokens,
                bool random, bool penalised) {
    const int64_t R = logits.shape[0], V = logits.shape[1], B = lanes.shape[0];
    LING_CHECK(logits.ndim == 2 && V > 0 && (logits.stride[1] == 1 || V == 1) && R < 1 << 20);
    LING_CHECK(tokens.is(DType::i64, {R}) && tokens.contiguous());
    const int slice = slice_of(V), bytes = bytes_of(slice, random, penalised);
    LING_CHECK(V < 1 << 24 && bytes + static_cast<int>(sizeof(Shared)) <= kSharedMemory);
    if (random || penalised) {
        const int64_t L = seeds.shape[0], P = token_ids.shape[1];
        LING_CHECK(lanes.is(DType::i64, {B}) && lanes.contiguous() && (R == 0 || (B > 0 && R % B == 0)));
        LING_CHECK(positions.is(DType::i64, {R}) && positions.contiguous());
        LING_CHECK(token_ids.is(DType::i32, {L, P}) && token_ids.contiguous());
        LING_CHECK(seeds.is(DType::i64, {L}) && seeds.contiguous());
        LING_CHECK(top_k.is(DType::i64, {L}) && top_k.contiguous());
        for (const Tensor& t : {temperature, top_p, min_p, repetition_penalty})
            LING_CHECK(t.is(DType::f32, {L}) && t.contiguous());
    }
    if (R == 0) return;
    const Problem p{logits.data,
                    lanes.ptr<int64_t>(),
                    positions.ptr<int64_t>(),
                    seeds.ptr<int64_t>(),
                    top_k.ptr<int64_t>(),
                    token_ids.ptr<int>(),
                    temperature.ptr<float>(),
                    top_p.ptr<float>(),
                    min_p.ptr<float>(),
                    repetition_penalty.ptr<float>(),
                    tokens.ptr<int64_t>(),
                    logits.stride[0],
                    token_ids.shape[1],
                    static_cast<int>(V),
                    static_cast<int>(R / std::max<int64_t>(B, 1)),
                    slice,
                    random,
                    penalised};
    dispatch<float, bf16, f16>(logits.dtype, [&]<typename T>() {
        launch<sample_kernel<T>, kOverlaps>(R * kBlocks, kThreads, bytes, stream, p);
    });
}

}  // namespace ling

#include "decode/accept_tokens.h"
#include "common.cuh"

namespace ling {
namespace {

constexpr int kThreads = 1024, kMaxRows = 8;
constexpr int kNgram = 3;  // longest n-gram at a sequence's end that is looked up

__device__ unsigned block_max(unsigned v) {
    __shared__ unsigned largest[kThreads / 32];
    for (int d = 16; d; d /= 2) v = max(v, __shfl_xor_sync(~0u, v, d));
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = v;
    __syncthreads();
    for (const unsigned other : largest) v = max(v, other);
    return v;
}

// The draft tokens are those after the latest earlier occurrence of the last kNgram tokens, else of fewer, repeated up
// to `count`; without an occurrence they are the last token.
__device__ void write_drafts(int* ids, int length, int count, int P) {
    const int last = length - 1;
    int wanted[kNgram];
    for (int back = 0; back < kNgram; back++) wanted[back] = ids[max(last - back, 0)];
    unsigned found = 0;  // P * (length of the n-gram - 1) + the position after it: longer ones win, then later ones
    for (int i = threadIdx.x; i < last; i += kThreads) {
        if (ids[i] != wanted[0]) continue;
        int same = 1;
        while (same < kNgram && same <= i && ids[i - same] == wanted[same]) same++;
        found = max(found, static_cast<unsigned>((same - 1) * P + i + 1));
    }
    found = block_max(found);
    const int start = found ? static_cast<int>(found % P) : last;
    if (threadIdx.x < count) ids[length + threadIdx.x] = ids[start + static_cast<int>(threadIdx.x) % (length - start)];
}

// One block per lane
__global__ void __launch_bounds__(kThreads)
    accept_tokens_kernel(const int64_t* tokens, const int64_t* lanes, const int64_t* positions, int* token_ids,
                         int64_t* lengths, int64_t* output, int n, int P, bool lookup) {
    __shared__ int new_length;
    launch_dependents();
    wait_for_previous();
    const int64_t b = blockIdx.x, lane = lanes[b];
    int* const ids = token_ids + lane * P;
    const int i = threadIdx.x;
    if (i < 32) {
        const int64_t length = lengths[lane];
        const bool is_row = i < n;
        const int64_t token = is_row ? tokens[b * n + i] : 0;
        const bool right = i < n - 1 && ids[positions[b * n + i + 1]] == token;
        const int accepted = __ffs(~__ballot_sync(~0u, right)) - 1;  // by then all drafts have been read
        if (is_row) {
            output[b * (n + 1) + i] = token;
            if (length > 0) ids[positions[b * n + i] + 1] = static_cast<int>(token);
        }
        if (i == 0) {
            output[b * (n + 1) + n] = accepted;
            new_length = length > 0 ? static_cast<int>(length) + 1 + accepted : 0;
            if (length > 0) lengths[lane] = new_length;
        }
    }
    if (!lookup) return;
    __syncthreads();
    if (new_length) write_drafts(ids, new_length, n - 1, P);
}

}  // namespace

void accept_tokens_fwd(cudaStream_t stream, Tensor tokens, Tensor lanes, Tensor positions, Tensor token_ids,
                       Tensor lengths, Tensor output, bool lookup) {
    const int64_t B = tokens.shape[0], n = tokens.shape[1], L = lengths.shape[0], P = token_ids.shape[1];
    LING_CHECK(tokens.is(DType::i64, {B, n}) && positions.is(DType::i64, {B, n}) && n >= 1 && n <= kMaxRows);
    LING_CHECK(lanes.is(DType::i64, {B}) && lengths.is(DType::i64, {L}) && output.is(DType::i64, {B, n + 1}));
    LING_CHECK(token_ids.is(DType::i32, {L, P}) && token_ids.contiguous() && P < 1 << 29);
    LING_CHECK(tokens.contiguous() && positions.contiguous() && lanes.contiguous());
    LING_CHECK(lengths.contiguous() && output.contiguous());
    if (B == 0) return;
    launch<accept_tokens_kernel, kOverlaps>(B, lookup ? kThreads : 32, 0, stream, tokens.ptr<int64_t>(),
                                            lanes.ptr<int64_t>(), positions.ptr<int64_t>(), token_ids.ptr<int>(),
                                            lengths.ptr<int64_t>(), output.ptr<int64_t>(), static_cast<int>(n),
                                            static_cast<int>(P), lookup);
}

}  // namespace ling

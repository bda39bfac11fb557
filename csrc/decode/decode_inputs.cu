#include "decode/decode_inputs.h"
#include "common.cuh"

namespace ling {
namespace {

constexpr int kThreads = 128;

struct Problem {
    const int64_t *lanes, *lengths;
    const int *token_ids, *block_tables;
    const uint4* embeddings;
    uint4* x;
    int64_t* positions;
    int *attended, *block_table;
    int64_t P;                     // columns of token_ids
    int n, width, pages, vectors;  // rows of a lane; columns of block_table and of block_tables; uint4 of a row of x
};

// One block per row
__global__ void __launch_bounds__(kThreads) decode_inputs_kernel(const __grid_constant__ Problem p) {
    launch_dependents();
    wait_for_previous();
    const int row = blockIdx.x, b = row / p.n, i = row % p.n;
    const int64_t lane = p.lanes[b], length = p.lengths[lane];
    const int64_t position = max(length - 1 + i, int64_t{0});
    const int64_t token = max(p.token_ids[lane * p.P + position], 0);
    for (int k = threadIdx.x; k < p.vectors; k += kThreads)
        p.x[int64_t{row} * p.vectors + k] = p.embeddings[token * p.vectors + k];
    if (i == 0) {
        for (int k = threadIdx.x; k < p.width; k += kThreads)
            p.block_table[int64_t{b} * p.width + k] = p.block_tables[lane * p.pages + k];
        if (threadIdx.x == 0) p.attended[b] = length > 0 ? static_cast<int>(length) + p.n - 1 : 0;
    }
    if (threadIdx.x == 0) p.positions[row] = position;
}

}  // namespace

void decode_inputs_fwd(cudaStream_t stream, Tensor lanes, Tensor token_ids, Tensor lengths, Tensor block_tables,
                       Tensor embeddings, Tensor x, Tensor positions, Tensor attended, Tensor block_table) {
    const int64_t B = lanes.shape[0], L = lengths.shape[0], rows = x.shape[0], H = embeddings.shape[1];
    const int64_t width = block_table.shape[1], pages = block_tables.shape[1];
    const int64_t bytes = H * (embeddings.dtype == DType::f32 ? 4 : 2);
    LING_CHECK(lanes.is(DType::i64, {B}) && lengths.is(DType::i64, {L}));
    LING_CHECK(token_ids.is(DType::i32, {L, token_ids.shape[1]}) && token_ids.contiguous());
    LING_CHECK(block_tables.is(DType::i32, {L, pages}) && block_tables.contiguous() && width <= pages);
    LING_CHECK(embeddings.dtype == DType::f32 || embeddings.dtype == DType::bf16 || embeddings.dtype == DType::f16);
    LING_CHECK(embeddings.ndim == 2 && embeddings.contiguous() && embeddings.aligned() && bytes % 16 == 0);
    LING_CHECK(x.is(embeddings.dtype, {rows, H}) && x.contiguous() && x.aligned());
    LING_CHECK(positions.is(DType::i64, {rows}) && attended.is(DType::i32, {B}));
    LING_CHECK(block_table.is(DType::i32, {B, width}) && block_table.contiguous());
    LING_CHECK(lanes.contiguous() && lengths.contiguous() && positions.contiguous() && attended.contiguous());
    LING_CHECK(B == 0 ? rows == 0 : rows > 0 && rows % B == 0 && rows < 1 << 20);
    if (B == 0) return;
    launch<decode_inputs_kernel, kOverlaps>(
        rows, kThreads, 0, stream,
        Problem{lanes.ptr<int64_t>(), lengths.ptr<int64_t>(), token_ids.ptr<int>(), block_tables.ptr<int>(),
                embeddings.ptr<uint4>(), x.ptr<uint4>(), positions.ptr<int64_t>(), attended.ptr<int>(),
                block_table.ptr<int>(), token_ids.shape[1], static_cast<int>(rows / B), static_cast<int>(width),
                static_cast<int>(pages), static_cast<int>(bytes / 16)});
}

}  // namespace ling

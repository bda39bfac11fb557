// Shared by forward and backward: bf16 tensors [T, H, 128] with contiguous heads, in rows that may be wider, as qkv's.
#pragma once
#include "sm90.cuh"

namespace ling {

constexpr int kD = 128, kMaxSequences = 1024;
constexpr float kLog2e = 1.4426950408889634f;

inline bool contiguous_heads(const Tensor& t) {
    const bool side_by_side = t.stride[2] == 1 && (t.shape[1] == 1 || t.stride[1] == t.shape[2]);
    return side_by_side && t.stride[0] % 8 == 0 && t.aligned();
}

// operand(p + bytes, next): one addition to the descriptor of p, which is computed once
__device__ inline uint64_t operand_after(const void* p, int bytes, int next = 16) {
    const uint64_t first = operand(p, next);
    return (first >> 32 << 32) | (static_cast<uint32_t>(first) + (bytes >> 4));
}

// x, which is the same in all lanes; now the compiler knows, and keeps what follows from it in uniform registers.
__device__ inline int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Check the bounds of sequence b; the B sequences have T rows in all
__device__ inline void check_bounds(const int* cu, int b, int B, int T) {
    LING_DEVICE_CHECK(cu[b] <= cu[b + 1] && (b > 0 || cu[0] == 0) && (b + 1 < B || cu[B] == T));
}

// A map that loads boxes of `rows` rows and 64 columns
inline TensorMap map_of_heads(const Tensor& t, int rows) {
    return encode_map(t.data, DType::bf16, t.shape[0], t.shape[1] * t.shape[2], t.stride[0] * 2, rows, 64, true);
}

}  // namespace ling

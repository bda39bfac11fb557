// The arithmetic of csrc/quant/fp8.cuh, value by value: tests/test_csrc_quant.py.
#include "quant/fp8.cuh"

__device__ int index() { return blockIdx.x * blockDim.x + threadIdx.x; }

extern "C" __global__ void codes(const float* x, uint8_t* out, int n) {
    if (const int i = index(); i < n) out[i] = ling::to_e4m3(x[i]);
}
extern "C" __global__ void codes_of_four(const float* x, unsigned* out, int n) {  // n: a number of fours
    if (const int i = index(); i < n) out[i] = ling::to_e4m3x4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}
extern "C" __global__ void quotients(const float* x, const float* scale, float* out, int n) {
    if (const int i = index(); i < n) out[i] = ling::Quotient<false>(scale[i])(x[i]);
}
extern "C" __global__ void scales(const float* amax, float* out, int n, bool pow2) {
    if (const int i = index(); i < n) out[i] = ling::block_scale(ling::abs_bits(amax[i]), pow2);
}

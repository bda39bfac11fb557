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
    const int i = index();
    if (i >= n) return;
    const ling::Quotient<false> divide(scale[i]);
    float one[1] = {x[i]};
    divide(one, divide.is_tiny());
    out[i] = one[0];
}
// Thread i counts the bf16 |x| <= amax whose code differs from that of a division, for the amax number i of those so
// small that remainders underflow.
extern "C" __global__ void wrong_codes(int* out, int n) {
    const int i = index();
    if (i >= n) return;
    const int e = -91 + i / 128;
    const float amax = ldexpf(1 + i % 128 / 128.f, e), scale = ling::block_scale(ling::abs_bits(amax), false);
    const ling::Quotient<false, ling::bf16> divide(scale);
    int wrong = 0;
    for (int k = 0; k < 20; k++)
        for (int j = 0; j < 128; j++) {
            const float x = ldexpf(1 + j / 128.f, e - k);
            float q[1] = {x};
            divide(q, divide.is_tiny());
            wrong += x <= amax && ling::to_e4m3(q[0]) != ling::to_e4m3(x / scale);
        }
    out[i] = wrong;
}
extern "C" __global__ void scales(const float* amax, float* out, int n, bool pow2) {
    if (const int i = index(); i < n) out[i] = ling::block_scale(ling::abs_bits(amax[i]), pow2);
}

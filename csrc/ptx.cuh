// The PTX instructions of the SIMT kernels, one function each.
#pragma once

namespace ling {

// Wait until the preceding kernels in the stream have ended and their writes are visible.
__device__ inline void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel may start once every block has called this; its blocks use SMs that this kernel leaves free.
__device__ inline void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }
// 1 / x within 1 or 2 ulp, 0 where the result is below 2^-126; __fdividef needs three instructions more.
__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// 2^x within 2 ulp, 0 where the result is below 2^-126; exp2f also scales denormal results, three instructions more.
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The larger of a and b; NaN if one of them is NaN, which fmaxf drops.
__device__ inline float max_or_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
// The larger absolute value, of both 16-bit numbers of a and b, with any sign; NaN if one of them is NaN.
template <bool kBf16> __device__ unsigned max_abs_or_nan(unsigned a, unsigned b) {
    unsigned y;
    if constexpr (kBf16) asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    else asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
// Prefetch the 128 bytes around p into L2.
__device__ inline void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

}  // namespace ling

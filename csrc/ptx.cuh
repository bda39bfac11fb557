// The PTX instructions of the SIMT kernels, one function each, and their CPU versions for tests/host.
#pragma once

namespace ling {

#ifdef __CUDACC__
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
// 2^x within 2 ulp, 0 where the result is below 2^-126; exp2f needs three instructions more.
__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Prefetch the 128 bytes around p into L2.
__device__ inline void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
#else
inline void wait_for_previous() { cuda_on_host::wait_for_previous(); }
inline void launch_dependents() {}
inline float reciprocal(float x) { return 1 / x; }
inline float exp2_approx(float x) { return exp2f(x); }
inline void prefetch_line(const void*) {}
#endif

}  // namespace ling

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
// Prefetch the 128 bytes around p into L2.
__device__ inline void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

}  // namespace ling

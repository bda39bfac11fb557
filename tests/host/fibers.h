// Stacks of the fibers on which cuda_on_host.cpp runs CUDA threads, and the switch between them.
#pragma once
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
static void __asan_unpoison_memory_region(const volatile void*, size_t) {}
#endif

namespace cuda_on_host {

constexpr size_t kStack = 256 << 10, kGuard = 16 << 10;  // address space; pages are touched on demand
constexpr size_t kColours = 8 << 10;                     // stacks start at different offsets, or they share cache sets
constexpr size_t kGuarded = 8192;                        // stacks; a process may have 65530 mappings

#if defined(__x86_64__) && !defined(CUDA_ON_HOST_UCONTEXT)
using Context = void*;  // the stack pointer; callee-saved registers lie above it
extern "C" void cuda_on_host_switch(Context* from, Context* to);
asm(R"(
.text
.local cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
.size cuda_on_host_switch, .-cuda_on_host_switch
)");
inline void prepare(Context& c, char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStack) - 1;  // at entry rsp = 8 mod 16, as after a call
    *--top = reinterpret_cast<void*>(entry);
    c = std::fill_n(top - 6, 6, nullptr) - 6;
}
#else
using Context = ucontext_t;
inline void cuda_on_host_switch(Context* from, Context* to) { swapcontext(from, to); }
inline void prepare(Context& c, char* stack, void (*entry)()) {
    getcontext(&c);
    c.uc_stack.ss_sp = stack, c.uc_stack.ss_size = kStack, c.uc_link = nullptr;
    makecontext(&c, entry, 0);
}
#endif

// The stack with that number, which runs `entry` when it is first switched to
inline char* new_stack(size_t number, Context& context, void (*entry)()) {
    char* p = static_cast<char*>(
        mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (p == MAP_FAILED) throw std::bad_alloc();
    if (number < kGuarded) mprotect(p, kGuard, PROT_NONE);  // so that an overflow faults
    __asan_unpoison_memory_region(p + kGuard, kStack);      // it may still be poisoned by an earlier mapping
    prepare(context, p + kGuard - number * 448 % kColours, entry);
    return p + kGuard;
}

inline void free_stack(char* stack) { munmap(stack - kGuard, kGuard + kStack); }

}  // namespace cuda_on_host

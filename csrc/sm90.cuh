// Hopper's asynchronous units, one small function for each instruction: barriers in shared memory (mbarrier), copies
// of tiles (TMA), matrix products of a warpgroup (wgmma).
#pragma once
#include "common.cuh"

#include <cuda.h>  // for types only; the driver is not linked

namespace ling {

using TensorMap = CUtensorMap;

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Stops a block whose tiles are not swizzled as their descriptors say: they must begin at a multiple of 1024. The
// compiler takes this for granted of dynamic shared memory, so the address passes by it; a tool could move it.
__device__ inline void check_swizzle_base(const void* p) {
    uint32_t address = shared_address(p);
    asm volatile("" : "+r"(address));
    if (address % 1024) __trap();
}

// A phase ends when `arrivals` threads of init() have arrived and all expected bytes have been written.
struct Barrier {
    uint64_t state;

    __device__ void init(int arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
    }
    __device__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
    }
    __device__ void arrive_and_expect(int bytes) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                     : "memory");
    }
    // Wait until the phase of this parity has ended. A new barrier is in phase 0, and its phase 1 counts as ended.
    __device__ void wait(unsigned parity) {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@done bra over;\n"
            "bra again;\n"
            "over:\n"
            "}" ::"r"(shared_address(this)),
            "r"(parity)
            : "memory");
    }
};

// After init(), before __syncthreads().
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Orders this thread's ordinary accesses to shared memory before later accesses by TMA or wgmma.
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of `threads` threads, which all pass the same id; __syncthreads uses id 0.
__device__ inline void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrive at it without waiting.
__device__ inline void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters> __device__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters> __device__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// One thread loads the box of the map whose first element is (row, column), with zeros outside the tensor.
__device__ inline void load_tile(void* to, const TensorMap& map, Barrier& barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(to)),
        "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
        : "memory");
}
__device__ inline void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copy kBytes (4 or 16) from `from`, or zeros; complete after wait_copies.
template <int kBytes> __device__ void copy_async(void* to, const void* from, bool zeros) {
    const int bytes = zeros ? 0 : kBytes;
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                     "r"(bytes)
                     : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending> __device__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 lines of 16 bytes, i.e. 8 x 8 elements of 2 bytes; lane l passes the address of line l % 8 of
// matrix l / 8. r[i] holds two elements (line, column) of matrix i:
//     load_transposed                  low half (2 (l % 4), l / 4)    high half (2 (l % 4) + 1, l / 4)
//     load_matrices, store_matrices    low half (l / 4, 2 (l % 4))    high half (l / 4, 2 (l % 4) + 1)
__device__ inline void load_transposed(unsigned (&r)[4], const void* line) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(line))
                 : "memory");
}
__device__ inline void load_matrices(unsigned (&r)[4], const void* line) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(line))
                 : "memory");
}
__device__ inline void store_matrices(void* line, const unsigned (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(line)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// A compiler barrier for these registers: no access to them moves across.
template <int kRegs> __device__ void pin(float (&d)[kRegs]) {
#pragma unroll
    for (int i = 0; i < kRegs; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// wgmma: fence before the first, commit after the last, wait before d is read or the operands are overwritten.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending, int kRegs> __device__ void wgmma_wait(float (&d)[kRegs]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    pin(d);
}

#define LING_OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LING_OUT8(i) LING_OUT4(i), LING_OUT4(i + 4)
#define LING_OUT16(i) LING_OUT8(i), LING_OUT8(i + 8)
#define LING_OUT32(i) LING_OUT16(i), LING_OUT16(i + 16)
#define LING_OUT64(i) LING_OUT32(i), LING_OUT32(i + 32)
#define LING_D8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LING_D16 LING_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define LING_D32 LING_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LING_D64                                                                                             \
    LING_D32                                                                                                 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LING_WGMMA(type, d_text, a, b, p, flags, outs)                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p ", 0;\nwgmma.mma_async.sync.aligned." type " {" d_text \
                 "}, %" a ", %" b ", p, 1, 1" flags ";\n}"                                                     \
                 : outs                                                                                        \
                 : "l"(da), "l"(db), "r"(static_cast<int>(accumulate)))

// d [64, 2 kRegs] (+)= A [64, 32] B [2 kRegs, 32]^T in e4m3. The result fragment of thread t of the warpgroup, with
// r = t / 32 * 16 + t % 32 / 4 and q = t % 4:
//     d[4j], d[4j + 1]        row r,     columns 8j + 2q and 8j + 2q + 1
//     d[4j + 2], d[4j + 3]    row r + 8, the same columns
template <int kRegs> __device__ void wgmma_fp8(float (&d)[kRegs], uint64_t da, uint64_t db, bool accumulate) {
    if constexpr (kRegs == 64) LING_WGMMA("m64n128k32.f32.e4m3.e4m3", LING_D64, "64", "65", "66", "", LING_OUT64(0));
    else if constexpr (kRegs == 32)
        LING_WGMMA("m64n64k32.f32.e4m3.e4m3", LING_D32, "32", "33", "34", "", LING_OUT32(0));
    else if constexpr (kRegs == 16)
        LING_WGMMA("m64n32k32.f32.e4m3.e4m3", LING_D16, "16", "17", "18", "", LING_OUT16(0));
    else {
        static_assert(kRegs == 8);
        LING_WGMMA("m64n16k32.f32.e4m3.e4m3", LING_D8, "8", "9", "10", "", LING_OUT8(0));
    }
}

// d [64, 128] (+)= A^T B in bf16, A [16, 64] and B [16, 128] with the contraction outermost.
__device__ inline void wgmma_bf16_by_rows(float (&d)[64], uint64_t da, uint64_t db, bool accumulate) {
    LING_WGMMA("m64n128k16.f32.bf16.bf16", LING_D64, "64", "65", "66", ", 1, 1", LING_OUT64(0));
}

// d [64, 2 kRegs] (+)= A [64, 16] B [2 kRegs, 16]^T in bf16
template <int kRegs> __device__ void wgmma_bf16(float (&d)[kRegs], uint64_t da, uint64_t db, bool accumulate) {
    if constexpr (kRegs == 64)
        LING_WGMMA("m64n128k16.f32.bf16.bf16", LING_D64, "64", "65", "66", ", 0, 0", LING_OUT64(0));
    else {
        static_assert(kRegs == 32);
        LING_WGMMA("m64n64k16.f32.bf16.bf16", LING_D32, "32", "33", "34", ", 0, 0", LING_OUT32(0));
    }
}

// The A fragment of the next two: a[0] row r, a[1] row r + 8, the 4 bytes of columns at 4q; a[2], a[3] the same rows,
// 16 bytes to the right.
#define LING_WGMMA_REGISTERS(type, d_text, a_text, b, p, flags, outs)                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p ", 0;\nwgmma.mma_async.sync.aligned." type " {" d_text \
                 "}, {" a_text "}, %" b ", p, 1, 1" flags ";\n}"                                               \
                 : outs                                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(db), "r"(static_cast<int>(accumulate)))

// d [64, 128] (+)= A [64, 16] B in bf16, B [16, 128] with the contraction outermost.
__device__ inline void wgmma_bf16_registers(float (&d)[64], const unsigned (&a)[4], uint64_t db, bool accumulate) {
    LING_WGMMA_REGISTERS("m64n128k16.f32.bf16.bf16", LING_D64, "%64, %65, %66, %67", "68", "69", ", 1", LING_OUT64(0));
}

// d [64, 2 kRegs] (+)= A [64, 32] B [2 kRegs, 32]^T in e4m3
template <int kRegs>
__device__ void wgmma_fp8_registers(float (&d)[kRegs], const unsigned (&a)[4], uint64_t db, bool accumulate) {
    if constexpr (kRegs == 64)
        LING_WGMMA_REGISTERS("m64n128k32.f32.e4m3.e4m3", LING_D64, "%64, %65, %66, %67", "68", "69", "", LING_OUT64(0));
    else {
        static_assert(kRegs == 32);
        LING_WGMMA_REGISTERS("m64n64k32.f32.e4m3.e4m3", LING_D32, "%32, %33, %34, %35", "36", "37", "", LING_OUT32(0));
    }
}

#undef LING_WGMMA_REGISTERS
#undef LING_WGMMA
#undef LING_D64
#undef LING_D32
#undef LING_D16
#undef LING_D8
#undef LING_OUT64
#undef LING_OUT32
#undef LING_OUT16
#undef LING_OUT8
#undef LING_OUT4

// The map for loading boxes of a tensor [rows, columns] whose rows are `stride` bytes apart.
inline TensorMap encode_map(const void* data, DType dtype, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                            int box_columns, bool swizzled) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const auto encode = [] {  // looked up by the runtime, so that _C loads without a driver
        void* f = nullptr;
        cudaDriverEntryPointQueryResult found;
        LING_CUDA_CHECK(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found));
        if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(f);
    }();
    const auto type = dtype == DType::f32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                      : dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[2] = {1, 1};
    TensorMap map;
    const CUresult error =
        encode(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(error)));
    return map;
}

// Byte offset in a tile in shared memory of a 16-byte chunk of a 128-byte line: the chunk's index is xored with line
// % 8.
__device__ inline int swizzled(int line, int chunk) { return line * 128 + (chunk ^ line % 8) * 16; }

// wgmma's descriptor of a swizzled operand of 128-byte lines. Groups of 8 lines are 1024 bytes apart. next: the bytes
// between one 128 bytes of columns and the next, used only where lines are the contraction.
__device__ inline uint64_t operand(const void* p, int next = 16) {
    const uint64_t address = shared_address(p) >> 4, stride = 1024 >> 4, kSwizzle128 = 1;
    return (address & 0x3fff) | static_cast<uint64_t>(next >> 4) << 16 | stride << 32 | kSwizzle128 << 62;
}

// A warp frees a stage of the ring, if `last`; the barrier counts warps.
__device__ inline void release(Barrier& empty, bool last = true) {
    __syncwarp();
    if (last && threadIdx.x % 32 == 0) empty.arrive();
}

// Zeroes the lines `from` and up of each of `count` consecutive boxes of kLines lines of 128 bytes.
template <int kLines> __device__ void clear_lines(uint8_t* boxes, int count, int from, int threads) {
    const int lines = kLines - from;
    for (int i = threadIdx.x; i < count * lines * 8; i += threads)
        *reinterpret_cast<uint4*>(boxes + (i / 8 / lines * kLines + from + i / 8 % lines) * 128 + i % 8 * 16) = {};
}

__device__ inline unsigned pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
}

// Rounds a result fragment to A fragments of wgmma_bf16_registers; a[i] holds columns 16 i ... 16 i + 15.
template <int kSteps> __device__ void round_to_bf16(unsigned (&a)[kSteps][4], const float (&d)[8 * kSteps]) {
#pragma unroll
    for (int i = 0; i < 4 * kSteps; i++) a[i / 4][i % 4] = pack_bf16(d[2 * i], d[2 * i + 1]);
}

// Global memory, if `exists`, by a predicate: where many accesses follow each other the compiler likes to branch around
// each. Otherwise x stays as it is.
#define LING_IF(condition, access) "{\n.reg .pred p;\nsetp.ne.b32 p, " condition ", 0;\n@p " access ";\n}"
__device__ inline void load_if(bool exists, const void* from, uint16_t& x) {
    asm volatile(LING_IF("%1", "ld.global.b16 %0, [%2]") : "+h"(x) : "r"(int{exists}), "l"(from) : "memory");
}
__device__ inline void load_if(bool exists, const void* from, unsigned& x) {
    asm volatile(LING_IF("%1", "ld.global.b32 %0, [%2]") : "+r"(x) : "r"(int{exists}), "l"(from) : "memory");
}
__device__ inline void load_if(bool exists, const void* from, uint2& x) {
    asm volatile(LING_IF("%2", "ld.global.v2.b32 {%0, %1}, [%3]")
                 : "+r"(x.x), "+r"(x.y)
                 : "r"(int{exists}), "l"(from)
                 : "memory");
}
__device__ inline void store_if(bool exists, void* to, unsigned x) {
    asm volatile(LING_IF("%0", "st.global.b32 [%1], %2")::"r"(int{exists}), "l"(to), "r"(x) : "memory");
}
__device__ inline void store_if(bool exists, void* to, uint2 x) {
    asm volatile(LING_IF("%0", "st.global.v2.b32 [%1], {%2, %3}")::"r"(int{exists}), "l"(to), "r"(x.x), "r"(x.y)
                 : "memory");
}
__device__ inline void store_if(bool exists, void* to, uint4 x) {
    asm volatile(LING_IF("%0", "st.global.v4.b32 [%1], {%2, %3, %4, %5}")::"r"(int{exists}), "l"(to), "r"(x.x),
                 "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}
#undef LING_IF

// Copies kLines staged lines of 64 bf16 to the first rows of y, which are y_row elements apart; 8 of kThreads threads
// copy a line. Only `rows` rows of y exist, and groups of 8 columns that start below `columns`. All is loaded before it
// is stored, without a branch, so that latencies of shared memory overlap.
template <int kLines, int kThreads>
__device__ void store_lines(const uint8_t* lines, bf16* y, int64_t y_row, int rows, int columns) {
    constexpr int kStep = kThreads / 8;
    const int line = threadIdx.x % kThreads / 8, chunk = threadIdx.x % 8, left = chunk * 8 < columns ? rows - line : 0;
    uint4 chunks[kLines / kStep];
#pragma unroll
    for (int i = 0; i < kLines / kStep; i++)
        chunks[i] = *reinterpret_cast<const uint4*>(lines + swizzled(i * kStep + line, chunk));
    bf16* const to = y + line * y_row + chunk * 8;
#pragma unroll
    for (int i = 0; i < kLines / kStep; i++) store_if(i * kStep < left, to + i * kStep * y_row, chunks[i]);
}

// Stores 64 columns (a thread's d[0 .. 31]) of a warp's 16 rows of results as bf16, through 16 lines of 128 bytes in
// shared memory; the rest as store_lines.
__device__ inline void store_rows(uint8_t* lines, const float* d, bf16* y, int64_t y_row, int rows, int columns) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 32; j += 8) {  // 16 columns: the upper 8 rows and the lower, of 8 columns and the next 8
        unsigned r[4];
#pragma unroll
        for (int i = 0; i < 4; i++) r[i] = pack_bf16(d[j + 2 * i], d[j + 2 * i + 1]);
        store_matrices(lines + swizzled(lane % 16, j / 4 + lane / 16), r);
    }
    __syncwarp();
    store_lines<16, 32>(lines, y, y_row, rows, columns);
    __syncwarp();
}

// A position in a ring of stages, with the parity of the round.
template <int kStages> struct Ring {
    int stage = 0;
    unsigned parity = 0;
    __device__ void next() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

}  // namespace ling

// The CPU versions of the functions of csrc/sm90.cuh. Copies and products happen as late as the hardware might do them:
// a TMA load when nothing else can run (under a random order: at any time, in any order), a cp.async or wgmma at its
// wait. So a missing wait, a stage released too early, a wrong descriptor or swizzle changes the result. Not simulated:
// fences, and the 14 bits that FP8 tensor cores keep of a sum.
#pragma once
#include <cuda_fp8.h>

#include <array>
#include <deque>
#include <vector>

#include "cuda_on_host.h"

namespace ling {

struct TensorMap {
    const char* data;
    int64_t rows, columns, stride;
    int box_rows, box_columns, size;
    bool swizzled;
};

inline uint32_t shared_address(const void* p) {
    return static_cast<const char*>(p) - static_cast<char*>(cuda_on_host::dynamic_shared());
}

// Bits 4 to 6 of an address are xored with bits 7 to 9.
inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

struct Barrier {
    int64_t pending : 12, expected : 12, bytes : 39;
    uint64_t phase : 1;

    void init(int arrivals) { pending = expected = arrivals, bytes = 0, phase = 0; }
    void settle() {
        if (!pending && !bytes) pending = expected, phase ^= 1;
    }
    void arrive(cuda_on_host::Where where = cuda_on_host::Where::current()) {
        cuda_on_host::maybe_yield();
        if (!pending) cuda_on_host::fail("more arrivals than the mbarrier counts", where);
        pending--, settle();
    }
    void arrive_and_expect(int n, cuda_on_host::Where where = cuda_on_host::Where::current()) {
        bytes += n, arrive(where);
    }
    void wait(unsigned parity, cuda_on_host::Where where = cuda_on_host::Where::current()) {
        cuda_on_host::wait_until("mbarrier", [&] { return phase != parity; }, where);
    }
};

inline void publish_barriers() {}
inline void check_swizzle_base(const void*) {}
inline void fence_async() {}
inline void prefetch_map(const TensorMap&) {}
template <int> void more_registers() {}
template <int> void fewer_registers() {}

inline void named_barrier(int id, int threads, cuda_on_host::Where where = cuda_on_host::Where::current()) {
    cuda_on_host::named_barrier(id, threads, where);
}

inline void named_arrive(int id, int threads) { cuda_on_host::named_arrive(id, threads); }

inline void load_tile(void* to, const TensorMap& map, Barrier& barrier, int column, int row) {
    cuda_on_host::later([=, &map, &barrier] {
        const int line = map.box_columns * map.size;
        const uint32_t base = shared_address(to);
        char* shared = static_cast<char*>(cuda_on_host::dynamic_shared());
        for (int r = 0; r < map.box_rows; r++)
            for (int c = 0; c < map.box_columns; c++) {
                const uint32_t at = base + r * line + c * map.size;
                const int64_t from_row = int64_t(row) + r, from_column = int64_t(column) + c;
                const bool inside =
                    from_row >= 0 && from_row < map.rows && from_column >= 0 && from_column < map.columns;
                char* place = shared + (map.swizzled ? swizzle_128(at) : at);
                if (inside) std::memcpy(place, map.data + from_row * map.stride + from_column * map.size, map.size);
                else std::memset(place, 0, map.size);
            }
        barrier.bytes -= int64_t(line) * map.box_rows;
        barrier.settle();
    });
}

// A thread's operations in flight
struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool zeros;
};
struct Product {
    float* d;
    int columns;
    enum { kE4m3, kBf16, kBf16Outermost, kBf16Registers } type;  // outermost: the contraction; registers: A
    uint64_t a, b;
    bool accumulate;
    std::array<float, 32> rows = {};  // A from registers
};
template <typename T> struct InFlight {
    std::vector<std::vector<T>> groups;
    std::vector<T> open;
};
inline std::deque<InFlight<Copy>> copies;  // indexed by fiber
inline std::deque<InFlight<Product>> products;
template <typename T> InFlight<T>& own(std::deque<InFlight<T>>& all) {
    if (all.size() <= size_t(cuda_on_host::fiber())) all.resize(cuda_on_host::fiber() + 1);
    return all[cuda_on_host::fiber()];
}
inline int this_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

template <int kBytes> void copy_async(void* to, const void* from, bool zeros) {
    own(copies).open.push_back({to, from, kBytes, zeros});
}
inline void commit_copies() {
    auto& mine = own(copies);
    mine.groups.push_back(std::move(mine.open)), mine.open.clear();
}
template <int kPending> void wait_copies() {
    auto& groups = own(copies).groups;
    const int done = std::max(int(groups.size()) - kPending, 0);
    for (int i = 0; i < done; i++)
        for (const Copy& c : groups[i])
            if (c.zeros) std::memset(c.to, 0, c.bytes);
            else std::memcpy(c.to, c.from, c.bytes);
    groups.erase(groups.begin(), groups.begin() + done);
    cuda_on_host::maybe_yield();
}

inline void load_transposed(unsigned (&r)[4], const void* line,
                            cuda_on_host::Where where = cuda_on_host::Where::current()) {
    const int l = cuda_on_host::lane();
    const uint64_t* lines = cuda_on_host::exchange("ldmatrix", ~0u, reinterpret_cast<uint64_t>(line), where);
    for (int m = 0; m < 4; m++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++)
            std::memcpy(&pair[i], reinterpret_cast<const char*>(lines[8 * m + 2 * (l % 4) + i]) + 2 * (l / 4), 2);
        r[m] = pair[0] | unsigned(pair[1]) << 16;
    }
}
inline void store_matrices(void* line, const unsigned (&r)[4],
                           cuda_on_host::Where where = cuda_on_host::Where::current()) {
    const int l = cuda_on_host::lane();
    const uint64_t* lines = cuda_on_host::exchange("stmatrix", ~0u, reinterpret_cast<uint64_t>(line), where);
    for (int m = 0; m < 4; m++) std::memcpy(reinterpret_cast<char*>(lines[8 * m + l / 4]) + 4 * (l % 4), &r[m], 4);
}

inline const std::array<float, 256>& e4m3_values() {
    static const auto values = [] {
        std::array<float, 256> v;
        for (int i = 0; i < 256; i++) {
            const int e = i >> 3 & 15, m = i & 7;
            const float x = e ? std::ldexp(8.f + m, e - 10) : std::ldexp(float(m), -9);
            v[i] = (i & 127) == 127 ? NAN : i & 128 ? -x : x;
        }
        return v;
    }();
    return values;
}

// The address of an operand's element: `line` and `byte` of it, as PTX defines the canonical layouts
struct Operand {
    uint32_t start, next, stride;
    explicit Operand(uint64_t d)
        : start((d & 0x3fff) << 4), next((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {
        if (d >> 62 != 1)
            cuda_on_host::fail("the host supports only operands swizzled by 128 bytes", cuda_on_host::Where::current());
    }
    const unsigned char* at(uint32_t address) const {
        return static_cast<unsigned char*>(cuda_on_host::dynamic_shared()) + swizzle_128(address);
    }
    float bf16(uint32_t address) const {
        uint16_t bits;
        std::memcpy(&bits, at(start + address), 2);
        return std::bit_cast<float>(uint32_t(bits) << 16);
    }
    float get(int type, int i, int k) const {
        if (type == Product::kE4m3) return e4m3_values()[*at(start + i / 8 * stride + i % 8 * 128 + k)];
        if (type == Product::kBf16) return bf16(i / 8 * stride + i % 8 * 128 + 2 * k);
        return bf16(i / 64 * next + i % 64 * 2 + k / 8 * stride + k % 8 * 128);
    }
};

inline void multiply(const Product& p) {
    const int t = this_thread() % 128, K = p.type == Product::kE4m3 ? 32 : 16;
    const Operand b(p.b);
    float rows[2][32], column[32];
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < K; k++)
            rows[i][k] = p.type == Product::kBf16Registers
                             ? p.rows[16 * i + k]
                             : Operand(p.a).get(p.type, t / 32 * 16 + t % 32 / 4 + 8 * i, k);
    for (int j = 0; j < p.columns / 8; j++)
        for (int c = 0; c < 2; c++) {
            const int n = 8 * j + t % 4 * 2 + c;
            for (int k = 0; k < K; k++) column[k] = b.get(p.type, n, k);
            for (int i = 0; i < 2; i++) {
                float sum = 0;
                for (int k = 0; k < K; k++) sum += rows[i][k] * column[k];
                float& d = p.d[4 * j + 2 * i + c];
                d = p.accumulate ? d + sum : sum;
            }
        }
}

inline void wgmma_fence() {}
template <int kRegs> void pin(float (&)[kRegs]) {}
inline void wgmma_commit() {
    auto& mine = own(products);
    mine.groups.push_back(std::move(mine.open)), mine.open.clear();
}
template <int kPending, int kRegs> void wgmma_wait(float (&)[kRegs]) {
    __syncwarp();  // .sync.aligned
    auto& groups = own(products).groups;
    const int done = std::max(int(groups.size()) - kPending, 0);
    for (int i = 0; i < done; i++)
        for (const Product& p : groups[i]) multiply(p);
    groups.erase(groups.begin(), groups.begin() + done);
    cuda_on_host::maybe_yield();
}
template <int kRegs> void wgmma_fp8(float (&d)[kRegs], uint64_t a, uint64_t b, bool accumulate) {
    own(products).open.push_back({d, 2 * kRegs, Product::kE4m3, a, b, accumulate});
}
template <int kRegs> void wgmma_bf16(float (&d)[kRegs], uint64_t a, uint64_t b, bool accumulate) {
    own(products).open.push_back({d, 2 * kRegs, Product::kBf16, a, b, accumulate});
}
inline void wgmma_bf16_by_rows(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    own(products).open.push_back({d, 128, Product::kBf16Outermost, a, b, accumulate});
}
inline void wgmma_bf16_registers(float (&d)[64], const unsigned (&a)[4], uint64_t b, bool accumulate,
                                 cuda_on_host::Where where = cuda_on_host::Where::current()) {
    Product p{d, 128, Product::kBf16Registers, 0, b, accumulate};
    const int first = cuda_on_host::lane() & ~3;
    for (int i = 0; i < 4; i++) {
        const uint64_t* all = cuda_on_host::exchange("wgmma", ~0u, a[i], where);
        for (int q = 0; q < 4; q++)
            for (int c = 0; c < 2; c++)
                p.rows[i % 2 * 16 + i / 2 * 8 + 2 * q + c] =
                    std::bit_cast<float>(uint32_t(all[first + q] >> 16 * c) << 16);
    }
    own(products).open.push_back(p);
}

inline TensorMap encode_map(const void* data, DType dtype, int64_t rows, int64_t columns, int64_t stride, int box_rows,
                            int box_columns, bool swizzled) {
    const int size = dtype == DType::f32 ? 4 : dtype == DType::bf16 ? 2 : 1;
    const bool fits = rows > 0 && columns > 0 && stride % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                      box_rows > 0 && box_rows <= 256 && box_columns > 0 && box_columns <= 256 &&
                      box_columns * size % 16 == 0 && (!swizzled || box_columns * size <= 128);
    if (!fits) throw std::runtime_error("cuTensorMapEncodeTiled would refuse this");
    return {static_cast<const char*>(data), rows, columns, stride, box_rows, box_columns, size, swizzled};
}

}  // namespace ling

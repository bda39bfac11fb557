// Matrix products: mma of a warp (ISA 9.7.14) and wgmma of a warpgroup (9.7.15), which runs when it is waited for.
#include "machine.h"

static int bytes_of(Element e) { return e <= kE5m2 ? 1 : 2; }
static void unpack(Element e, const void* from, int n, float* to, int step) {
    for (int i = 0; i < n; i++) {
        uint32_t x = 0;
        memcpy(&x, (const char*)from + i * bytes_of(e), bytes_of(e));
        to[i * step] = e == kE4m3 || e == kE5m2 ? fp8_values(e == kE5m2)[x]
                       : e == kBf16             ? std::bit_cast<float>(x << 16)
                                                : float(std::bit_cast<_Float16>(uint16_t(x)));
    }
}

// ---- sums: d[r][j] += sum over k of a[r][k] b[k][j], for `rows` rows. Products of these types are exact in fp32
template <class V> __attribute__((optimize("O3,fp-contract=fast"))) static void multiply_by(const float* a,
                                                                                            const float* b, float* d,
                                                                                            int rows, int n, int k) {
    constexpr int kWidth = sizeof(V) / 4;
    for (int r = 0; r < rows; r += 8)
        for (int j = 0; j < n; j += kWidth) {
            V sum[8] = {};
            for (int i = 0; i < k; i++) {
                V y;
                memcpy(&y, b + i * n + j, sizeof y);
                for (int s = 0; s < 8; s++) sum[s] += a[(r + s) * k + i] * y;
            }
            for (int s = 0; s < 8; s++) {
                V old;
                memcpy(&old, d + (r + s) * n + j, sizeof old);
                old += sum[s];
                memcpy(d + (r + s) * n + j, &old, sizeof old);
            }
        }
}
static void multiply(const float* a, const float* b, float* d, int rows, int n, int k, bool narrow) {
    typedef float F8 __attribute__((vector_size(32)));
    typedef float F16 __attribute__((vector_size(64)));
    if (!narrow) return n % 16 ? multiply_by<F8>(a, b, d, rows, n, k) : multiply_by<F16>(a, b, d, rows, n, k);
    for (int r = 0; r < rows;
         r++)  // FP8 on Hopper: terms are aligned to the largest, and 13 bits after its first are kept
        for (int j = 0; j < n; j++) {
            float largest = std::fabs(d[r * n + j]), sum = 0;
            for (int i = 0; i < k; i++) largest = std::max(largest, std::fabs(a[r * k + i] * b[i * n + j]));
            if (largest == 0) continue;
            const float unit = std::ldexp(1.f, std::ilogb(largest) - 13);
            for (int i = 0; i < k; i++) sum += std::trunc(a[r * k + i] * b[i * n + j] / unit);
            d[r * n + j] = (std::trunc(d[r * n + j] / unit) + sum) * unit;
        }
}

// ---- fragments in registers: rows lane / 4 and 8 below, 4 bytes of columns at lane % 4 and 16 bytes further
// (ISA 9.7.14.5)
static void rows_of_registers(const U32* const* r, Element e, int registers, float* a, int k) {
    const int per = 4 / bytes_of(e);
    for (int i = 0; i < registers; i++)
        EACH_LANE unpack(e, (const uint32_t*)r[i] + l, per, a + (l / 4 + i % 2 * 8) * k + i / 2 * 4 * per + l % 4 * per,
                         1);
}
void mma(Warp& w, int site, int k, Element ea, Element eb, U32* const* d, const U32* const* ra, const U32* const* rb,
         const U32* const* c, uint32_t mask) {
    need_whole_warp(w, site, mask);
    float a[16 * 64], b[64 * 8], sum[16 * 8];
    const int per = 4 / bytes_of(ea), steps = k / (4 * per);
    rows_of_registers(ra, ea, 2 * steps, a, k);
    for (int i = 0; i < steps; i++)
        EACH_LANE unpack(eb, (const uint32_t*)rb[i] + l, per, b + (i * 4 * per + l % 4 * per) * 8 + l / 4, 8);
    const auto at = [](int i, int l) { return (l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2; };
    for (int i = 0; i < 4; i++) EACH_LANE sum[at(i, l)] = std::bit_cast<float>(uint32_t((*c[i])[l]));
    multiply(a, b, sum, 16, 8, k, ea <= kE5m2 && w.block->processor->checks(kNarrowSums));
    for (int i = 0; i < 4; i++) EACH_LANE(*d[i])[l] = std::bit_cast<uint32_t>(sum[at(i, l)]);
    w.block->processor->macs[ea] += 16 * 8 * k;
}

// ---- an operand in shared memory (ISA 9.7.15.5.1): f(row, column, address) for each 16 bytes of its rows
template <class F>
static void each_chunk(Warp& w, int site, uint64_t d, int size, bool transposed, int first, int rows, int k, F&& f) {
    const uint32_t start = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4;
    static const uint32_t swizzles[] = {0, 7, 3, 1}, widths[] = {16, 128, 64, 32};
    const uint32_t swizzle = swizzles[d >> 62], width = widths[d >> 62];
    if (d >> 49 & 7) fault(w, site, "a base offset in a matrix descriptor");
    if (transposed && (!swizzle || size != 2)) fault(w, site, "a transposed operand without swizzle");
    const auto chunk = [&](int row, int column, uint32_t at) {
        at ^= (at >> 7 & swizzle) << 4;
        if (at + 16 > w.block->shared_size) fault(w, site, "an operand ends past the shared memory, at " + hex(at));
        f(row, column, at);
    };
    if (!transposed)
        for (int row = first; row < first + rows; row++)
            for (int c = 0; c < k * size; c += 16)
                chunk(row - first, c / size,
                      start + row / 8 * stride + (swizzle ? row % 8 * width + c : c / 16 * leading + row % 8 * 16));
    else  // lines of `width` bytes lie along the rows, 8 of the contraction to a group
        for (int row = first; row < first + rows; row += 8)
            for (int c = 0; c < k; c++)
                chunk(row - first, c,
                      start + row * 2 / width * leading + c / 8 * stride + c % 8 * width + row * 2 % width);
}
static void check_operand(Warp& w, const Product& p, uint64_t d, Element e, bool transposed, int first, int rows) {
    if (w.block->stamps.empty()) return;
    each_chunk(w, p.site, d, bytes_of(e), transposed, first, rows, p.form.k,
               [&](int, int, uint32_t at) { check_read(w, p.site, *w.block, at, 16, 0, kTensor, p.seen); });
}
static const float* operand_b(Warp& w, const Product& p) {  // [k][n]
    const ProductForm& f = p.form;
    Block& b = *w.block;
    Decoded& out = b.decoded[{p.site, p.db}];
    const auto version = [&] {
        uint64_t sum = 1;
        for (uint64_t i = out.low >> 10; i <= out.high >> 10; i++) sum += b.versions[i];
        return sum;
    };
    if (out.version && out.version == version()) return out.values.data();
    out.values.resize(f.k * f.n), out.low = ~0ull, out.high = 0;
    each_chunk(w, p.site, p.db, bytes_of(f.b), f.transposed_b, 0, f.n, f.k, [&](int row, int column, uint64_t at) {
        unpack(f.b, b.shared + at, 16 / bytes_of(f.b), &out.values[column * f.n + row], f.transposed_b ? 1 : f.n);
        out.low = std::min(out.low, at), out.high = std::max(out.high, at + 15);
    });
    out.version = version();
    return out.values.data();
}
static void finish(Warp& w, const Product& p) {
    const ProductForm& f = p.form;
    float a[16 * 64], sum[16 * 256];
    const int row = w.id % 4 * 16;
    if (p.registers) rows_of_registers(p.ra, f.a, 4, a, f.k);
    else {
        check_operand(w, p, p.da, f.a, f.transposed_a, row, 16);
        each_chunk(w, p.site, p.da, bytes_of(f.a), f.transposed_a, row, 16, f.k, [&](int r, int column, uint32_t at) {
            unpack(f.a, w.block->shared + at, 16 / bytes_of(f.a), a + r * f.k + column, f.transposed_a ? f.k : 1);
        });
    }
    check_operand(w, p, p.db, f.b, f.transposed_b, 0, f.n);
    const float* const b = operand_b(w, p);
    for (int i = 0; f.sign < 0 && i < 16 * f.k; i++) a[i] = -a[i];
    const auto at = [&](int i, int l) { return (l / 4 + i / 2 % 2 * 8) * f.n + i / 4 * 8 + l % 4 * 2 + i % 2; };
    for (int i = 0; i < f.n / 2; i++)
        EACH_LANE sum[at(i, l)] = p.accumulate ? std::bit_cast<float>(uint32_t((*p.d[i])[l])) : 0.f;
    multiply(a, b, sum, 16, f.n, f.k, f.a <= kE5m2 && w.block->processor->checks(kNarrowSums));
    for (int i = 0; i < f.n / 2; i++) EACH_LANE(*p.d[i])[l] = std::bit_cast<uint32_t>(sum[at(i, l)]);
}

void wgmma(Warp& w, int site, ProductForm form, U32* const* d, const U32* const* ra, const U64& da, const U64& db,
           const Pred& accumulate, uint32_t* const* marks, uint32_t mask) {
    need_whole_warp(w, site, mask);
    EACH_LANE if (da[l] != da[0] || db[l] != db[0] || accumulate[l] != accumulate[0])
        fault(w, site, "lanes differ in a descriptor");
    Product p = {site, form, {}, {}, {}, ra != nullptr, accumulate[0] != 0, da[0], db[0], w.seen, false};
    const int n = form.n / 2, registers = n + (ra ? 4 : 0);
    if (w.wgmma_fences == 1) fault(w, site, "no wgmma.fence comes before the first wgmma");
    for (int i = 0; i < registers; i++) {
        if (*marks[i] != ~0u && *marks[i] != kInFlight && *marks[i] >= w.wgmma_fences)
            fault(w, site,
                  std::string(i < n ? "an accumulator" : "a fragment of A") +
                      " was used by another instruction, and no wgmma.fence lies between");
        *marks[i] = kInFlight;
    }
    std::copy_n(d, n, p.d), std::copy_n(marks, registers, p.marks);
    if (ra) std::copy_n(ra, 4, p.ra);
    w.products.open.push_back(p);
    w.block->processor->macs[form.a] += 16ull * form.n * form.k;
}
void wgmma_commit(Warp& w, int site, uint32_t mask) {
    need_whole_warp(w, site, mask), w.products.commit(), w.committed++;
}
void wgmma_fence(Warp& w, int site, uint32_t mask) { need_whole_warp(w, site, mask), w.wgmma_fences++; }
// A wgmma is one instruction of the four warps of a warpgroup: none has its result, or has read its operands, before
// all have issued it, and then all have. Groups up to number `committed` are done here, those of all four warps.
static void finish_group(Warp& w, int site, int committed) {
    Warp* const first = &w - w.id % 4;
    Warp* const end = std::min(first + 4, w.block->warps.data() + w.block->warps.size());
    for (Warp* v = first; v < end; v++)
        if (v->committed < committed) {
            w.yield = true, w.site = site;
            throw Park{-1, "waits for warps of its warpgroup, which have not issued the wgmma"};
        }
    Clock known;  // to a warp that has waited
    if (!w.seen.clock.empty())
        known.resize(w.seen.clock.size()), known[tensor_core(w)] = w.block->company->tick(tensor_core(w));
    std::vector<Product*> now;
    for (Warp* v = first; v < end; v++) {
        int number = v->committed - int(v->products.groups.size());
        for (auto g = v->products.groups.begin(); number < committed; number++, g++)
            for (Product& p : *g) {
                if (p.done) continue;
                finish(*v, p), now.push_back(&p);
                if (w.block->processor->checks(kWarpgroups)) known[v->agent] = p.seen.clock[v->agent];
            }
    }
    for (Product* p : now) p->done = true, p->seen.clock = known;
}
void wgmma_wait(Warp& w, int site, int left, uint32_t mask) {
    need_whole_warp(w, site, mask);
    if (int(w.products.groups.size()) > left) finish_group(w, site, w.committed - left);
    for (const Product& p : w.products.take(left)) {
        acquire(w, p.seen.clock);
        for (int i = 0; i < p.form.n / 2 + (p.registers ? 4 : 0); i++) *p.marks[i] = ~0u;
    }
    const auto fly = [&](const Product& p) {  // those that are left
        for (int i = 0; i < p.form.n / 2 + (p.registers ? 4 : 0); i++) *p.marks[i] = kInFlight;
    };
    for (const auto& g : w.products.groups) std::for_each(g.begin(), g.end(), fly);
    std::for_each(w.products.open.begin(), w.products.open.end(), fly);
}

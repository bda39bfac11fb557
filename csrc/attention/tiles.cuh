// The tiles of attention's forward and backward kernels: their order, and how blocks share them.
#pragma once
#include "attention/heads.h"
#include "ragged.cuh"

namespace ling {

constexpr int kBlock = 128;                                   // rows of a tile
constexpr int kConsumers = 256, kThreads = kConsumers + 128;  // threads that multiply, and all

// Packed sequences of queries and keys
struct Sequences {
    const int *cu_q, *cu_k;
    int B, Tq, Tk, Hq, Hkv;
    bool causal;
};

// 128 rows of queries, or of keys, of a head, and the rows of the other side that they see or that see them
struct Tile {
    bool keys;                      // it has keys
    int head, first, rows, offset;  // first row in the tensors; number of rows; first row in the sequence
    int other_head, heads;          // of the other side: first head, number of heads
    int others, length;             // first row in the tensors of the sequence, and its number of rows
    int begin, end;                 // its rows from begin to end - 1 matter
    int shift;                      // query i of the sequence sees keys up to i + shift
};

// In shared memory: the numbers of tiles of a head before each sequence
struct TileCounts {
    int before[kMaxSequences + 1];

    // All threads of a block call this.
    __device__ void count(const Sequences& p, bool keys, int* warp_sums) {
        const int* cu = keys ? p.cu_k : p.cu_q;
        count_tiles(before, warp_sums, p.B, [&](int b) {
            check_bounds(p.cu_q, b, p.B, p.Tq), check_bounds(p.cu_k, b, p.B, p.Tk);
            return ceil_div(cu[b + 1] - cu[b], kBlock);
        });
    }
};

// Tile `number` of one side, which must exist; called by a whole warp. Sequences follow each other. In a sequence the
// tiles with the most rows on the other side come first: of all heads where what they read of the other side fits the
// L2 cache, otherwise of the heads that read the same rows, so that these stay there.
__device__ inline Tile find_tile(const Sequences& p, const TileCounts& counts, bool keys, int number) {
    constexpr int kCached = 1 << 16;  // rows of two heads' 512 bytes: 32 MB
    const int H = keys ? p.Hkv : p.Hq, group = p.Hq / p.Hkv, b = find_group(counts.before, p.B, number / H);
    const int tiles = counts.before[b + 1] - counts.before[b];
    const int q0 = p.cu_q[b], k0 = p.cu_k[b], queries = p.cu_q[b + 1] - q0, length = p.cu_k[b + 1] - k0;
    const bool cached = keys ? int64_t{queries} * p.Hq <= kCached : int64_t{length} * p.Hkv <= kCached;
    const int together = cached ? H : keys ? 1 : group;
    const int local = number - counts.before[b] * H, section = local / (tiles * together);
    const int rest = local - section * tiles * together, rank = rest / together;
    Tile t;
    t.keys = keys, t.head = section * together + rest - rank * together, t.shift = length - queries;
    if (keys) {
        t.offset = rank * kBlock, t.first = k0 + t.offset, t.rows = min(length - t.offset, kBlock);
        t.other_head = t.head * group, t.heads = group, t.others = q0, t.length = t.end = queries;
        t.begin = p.causal ? max(t.offset - t.shift, 0) : 0;
    } else {
        t.offset = (tiles - 1 - rank) * kBlock, t.first = q0 + t.offset, t.rows = min(queries - t.offset, kBlock);
        t.other_head = t.head / group, t.heads = 1, t.others = k0, t.length = length, t.begin = 0;
        t.end = p.causal ? min(length, t.offset + t.rows + t.shift) : length;
    }
    return t;
}

// Passes tiles from the warp that loads to the warps that multiply.
struct TileQueue {
    Tile tiles[2];
    Barrier full[2], empty[2];

    __device__ void init() {
        for (int i = 0; i < 2; i++) full[i].init(1), empty[i].init(kConsumers / 32);
    }

    // Called by the loading warp of every block: calls load(t) in one lane for each tile that the block takes. A block
    // takes the tile of its own number, and whenever it has loaded one, the next one that no block has taken. That is
    // `all` draws from the counter, and the last one sets it to 0 for the next launch.
    template <typename F, typename G> __device__ void share(unsigned* counter, int all, F&& find, G&& load) {
        const int lane = threadIdx.x % 32;
        Ring<2> ring;
        for (int number = blockIdx.x;; ring.next()) {
            Tile t = {};  // no rows: the end
            if (number < all) t = find(number);
            if (lane == 0) {
                empty[ring.stage].wait(ring.parity ^ 1);
                tiles[ring.stage] = t;
                full[ring.stage].arrive();
            }
            if (number >= all) return;
            unsigned drawn = 0;
            if (lane == 0) {
                load(t);
                drawn = atomicAdd(counter, 1);
                if (drawn + 1 == static_cast<unsigned>(all)) *counter = 0;
            }
            number = gridDim.x + __shfl_sync(~0u, drawn, 0);
        }
    }

    // Called by every warp that multiplies: f(t) for each tile of the block
    template <typename F> __device__ void for_each(F&& f) {
        for (Ring<2> ring;; ring.next()) {
            full[ring.stage].wait(ring.parity);
            if (!tiles[ring.stage].rows) return;
            f(tiles[ring.stage]);
            release(empty[ring.stage]);
        }
    }
};

}  // namespace ling

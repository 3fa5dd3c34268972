// Which sequence, head and tile a thread block works on, and which tiles of the other side it visits.
#pragma once
#include "params.cuh"
#include "spec.cuh"

// One sequence's place in the arrays. For packed tensors the batch index of an address is 0 and rows start at the
// sequence's boundary; `index` is the sequence's number either way.
struct Sequence {
    int index;
    int batch;
    long long q_start, kv_start;
    int q_len, kv_len;
};

struct Work {
    Sequence sequence;
    int head;
    int tile;  // of the sequence's own rows
    bool exists;
};

__device__ __forceinline__ long long boundary(const Params& p, const void* cu_seqlens, int i) {
    return p.cu_seqlens_int64 ? static_cast<const long long*>(cu_seqlens)[i] : static_cast<const int*>(cu_seqlens)[i];
}

// Whether these are the rows after the last boundary of packed tensors, which belong to no sequence.
__device__ __forceinline__ bool is_outside(const Params& p, const Sequence& sequence) {
    return SPEC.packed && sequence.index == p.batch;
}

// Number `block` of the work: tiles of TILE_ROWS rows (of queries, or of keys if BY_KEYS), the tile index fastest.
//
// Packed: nobody on the host knows the lengths, so sequence i is given the tiles from boundary[i] / TILE_ROWS + i on.
// That start never decreases and leaves room for ceil(len / TILE_ROWS) tiles; what is left over does not exist. The
// rows after the last boundary are one more sequence, with nothing on the other side, so that their results become
// zero.
template <int TILE_ROWS, bool BY_KEYS>
__device__ __forceinline__ Work find_work(const Params& p, int block, int tiles, int heads) {
    Work work;
    int tile = block % tiles;
    if constexpr (SPEC.packed) {
        work.head = block / tiles % heads;
        const void* own = BY_KEYS ? p.cu_seqlens_k : p.cu_seqlens_q;
        const void* other = BY_KEYS ? p.cu_seqlens_q : p.cu_seqlens_k;
        int low = 0, high = p.batch;  // the largest i whose first tile is at most `tile`
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (boundary(p, own, middle) / TILE_ROWS + middle <= tile) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        const bool beyond = low == p.batch;
        const long long start = boundary(p, own, low);
        const long long stop = beyond ? (BY_KEYS ? p.kv_len : p.q_len) : boundary(p, own, low + 1);
        const long long other_start = beyond ? 0 : boundary(p, other, low);
        const long long other_stop = beyond ? 0 : boundary(p, other, low + 1);
        work.tile = tile - static_cast<int>(start / TILE_ROWS + low);
        const int own_len = static_cast<int>(stop - start), other_len = static_cast<int>(other_stop - other_start);
        work.sequence = BY_KEYS ? Sequence{low, 0, other_start, start, other_len, own_len}
                                : Sequence{low, 0, start, other_start, own_len, other_len};
        work.exists = work.tile * TILE_ROWS < own_len;
    } else {
        // Unsigned: a division is half as long.
        const unsigned int number = block, tiles_a_head = tiles;
        unsigned int pair = number / tiles_a_head;  // of batch and head
        if constexpr (SPEC.bounded_right) {
            // Under a right bound the last queries and the first keys have the most to do: in each section of heads
            // they go first.
            const unsigned int section_heads = p.section_heads, section = number / (section_heads * tiles_a_head);
            const unsigned int first = section * section_heads, within = number - first * tiles_a_head;
            const unsigned int pairs = min(section_heads, static_cast<unsigned int>(heads * p.batch) - first);
            const unsigned int rank = within / pairs;
            pair = first + within - rank * pairs;
            tile = BY_KEYS ? rank : tiles_a_head - 1 - rank;
        }
        const int batch = pair / static_cast<unsigned int>(heads);
        work.head = pair - batch * heads;
        work.tile = tile;
        work.sequence = Sequence{batch, batch, 0, 0, p.q_len, p.kv_len};
        work.exists = true;
    }
    return work;
}

// Tiles [first, last) of the other side.
struct TileRange {
    int first, last;
};

__device__ __forceinline__ TileRange tiles_of(int start, int stop, int length, int tile_rows) {
    start = max(start, 0);
    stop = min(stop, length);
    if (start >= stop) return TileRange{0, 0};
    const unsigned int rows = tile_rows;  // unsigned: a shift where the tile is a power of two
    return TileRange{static_cast<int>(start / rows), static_cast<int>((stop + rows - 1) / rows)};
}

// Which sequence, head and tile a thread block works on, and which tiles of the other side it visits.
#pragma once
#include "params.cuh"
#include "spec.cuh"

constexpr int RAGGED = 1 << 30;  // the length of the axis of rows of a packed tensor's map

// One sequence's place in the arrays. For packed tensors the batch index of an address is 0 and rows start at the
// sequence's boundary; `index` is the sequence's number either way.
struct Sequence {
    int index;
    int batch;
    long long q_start, kv_start;
    int q_len, kv_len;

    // The coordinates by which a tensor map finds row `row` of this sequence: on its axis of rows, and on that of
    // sequences (see tma.cuh).
    __device__ __forceinline__ int q_row(int row) const { return SPEC.packed ? RAGGED - q_len + row : row; }
    __device__ __forceinline__ int kv_row(int row) const { return SPEC.packed ? RAGGED - kv_len + row : row; }
    __device__ __forceinline__ int q_place() const { return SPEC.packed ? static_cast<int>(q_start) + q_len : batch; }
    __device__ __forceinline__ int kv_place() const {
        return SPEC.packed ? static_cast<int>(kv_start) + kv_len : batch;
    }
};

struct Work {
    Sequence sequence;
    int head;
    int tile;  // of the sequence's own rows
    bool exists;
};

__device__ __forceinline__ int boundary(const Params& p, const void* cu_seqlens, int i) {
    if (!p.cu_seqlens_int64) return static_cast<const int*>(cu_seqlens)[i];
    return static_cast<int>(static_cast<const long long*>(cu_seqlens)[i]);
}

// Whether these are the rows after the last boundary of packed tensors, which belong to no sequence.
__device__ __forceinline__ bool is_outside(const Params& p, const Sequence& sequence) {
    return SPEC.packed && sequence.index == p.batch;
}

constexpr int NARROW = 8;  // a window this many times narrower than the keys gives all tiles about as many

// Heads are worked on in sections of p.section_heads, `ranks` tasks each, all heads of a section in turn: which rank is
// number `number`, and of which `head` of all.
__device__ __forceinline__ unsigned int rank_in_section(const Params& p, unsigned int number, unsigned int ranks,
                                                        unsigned int heads, unsigned int& head) {
    const unsigned int section_heads = p.section_heads, section = number / (section_heads * ranks);
    const unsigned int first = section * section_heads, within = number - first * ranks;
    const unsigned int own_heads = min(section_heads, heads - first), rank = within / own_heads;
    head = first + within - rank * own_heads;
    return rank;
}

// Packed sequence `i`; p.batch is that of the rows after the last boundary, of queries (BY_KEYS: of keys).
template <bool BY_KEYS>
__device__ __forceinline__ Sequence packed_sequence(const Params& p, int i) {
    const void* own = BY_KEYS ? p.cu_seqlens_k : p.cu_seqlens_q;
    const void* other = BY_KEYS ? p.cu_seqlens_q : p.cu_seqlens_k;
    const bool beyond = i == p.batch;
    const int start = boundary(p, own, i);
    const int stop = beyond ? (BY_KEYS ? p.kv_len : p.q_len) : boundary(p, own, i + 1);
    const int other_start = beyond ? 0 : boundary(p, other, i);
    const int other_stop = beyond ? 0 : boundary(p, other, i + 1);
    const int own_len = stop - start, other_len = other_stop - other_start;
    return BY_KEYS ? Sequence{i, 0, other_start, start, other_len, own_len}
                   : Sequence{i, 0, start, other_start, own_len, other_len};
}

// Where the tiles of TILE_ROWS queries of a sequence begin among those of a head, as find_work numbers them.
template <int TILE_ROWS>
__device__ __forceinline__ int first_tile(const Sequence& sequence) {
    return SPEC.packed ? static_cast<int>(sequence.q_start) / TILE_ROWS + sequence.index : 0;
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
        int low = 0, high = p.batch;  // the largest i whose first tile is at most `tile`
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (boundary(p, own, middle) / TILE_ROWS + middle <= tile) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        work.sequence = packed_sequence<BY_KEYS>(p, low);
        work.tile =
            tile - static_cast<int>((BY_KEYS ? work.sequence.kv_start : work.sequence.q_start) / TILE_ROWS + low);
        work.exists = work.tile * TILE_ROWS < (BY_KEYS ? work.sequence.kv_len : work.sequence.q_len);
    } else {
        // Unsigned: a division is half as long.
        const unsigned int number = block, tiles_a_head = tiles;
        unsigned int pair = number / tiles_a_head;  // of batch and head
        if constexpr (SPEC.bounded_right) {
            // Under a right bound the last queries and the first keys have the most to do: in each section of heads
            // they go first.
            const unsigned int rank = rank_in_section(p, number, tiles_a_head, heads * p.batch, pair);
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

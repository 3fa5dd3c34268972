// The band mask -left <= kv_pos - q_pos <= right with kv_pos = kv_index and q_pos = q_index + kv_len - q_len:
// the range of tiles it leaves, whether a tile needs the predicate, and the predicate. The twin of cuflash/masking.py.
#pragma once
#include "schedule.cuh"

// A lane's columns across accumulator tiles: bit 2 n + u stands for column 8 n + u behind the lane's first. Those
// before `limit`:
__device__ __forceinline__ unsigned int columns_before(int limit) {
    const int count = limit <= 0 ? 0 : limit / 8 * 2 + min(limit % 8, 2);
    return __funnelshift_lc(0xFFFFFFFF, 0, count);  // ones in the `count` lowest bits, of 32 at most
}

// Columns [first, last), counted from one of a lane's own.
struct ColumnRange {
    int first, last;

    __device__ __forceinline__ bool contains(int col) const {
        return (!SPEC.bounded_left || col >= first) && col < last;
    }
};

struct Band {
    int left, right;
    int q_len, kv_len;
    int offset;  // q_pos - q_index

    __device__ __forceinline__ Band(const Params& p, const Sequence& s)
        : left(p.left), right(p.right), q_len(s.q_len), kv_len(s.kv_len), offset(s.kv_len - s.q_len) {}

    // Tiles of keys that some query of [q_first, q_last] may attend to.
    __device__ __forceinline__ TileRange kv_tiles(int q_first, int q_last) const {
        const int start = SPEC.bounded_left ? q_first + offset - left : 0;
        const int stop = SPEC.bounded_right ? q_last + offset + right + 1 : kv_len;
        return tiles_of(start, stop, kv_len, TILE.cols);
    }

    // Tiles of queries that may attend to some key of [kv_first, kv_last].
    __device__ __forceinline__ TileRange q_tiles(int kv_first, int kv_last) const {
        const int start = SPEC.bounded_right ? kv_first - right - offset : 0;
        const int stop = SPEC.bounded_left ? kv_last + left - offset + 1 : q_len;
        return tiles_of(start, stop, q_len, TILE.rows);
    }

    // Whether some pair of the queries [q_first, q_last] and the keys [kv_first, kv_last] is masked, or a key lies
    // outside the sequence.
    __device__ __forceinline__ bool cuts_keys(int q_first, int q_last, int kv_first, int kv_last) const {
        bool cut = kv_last >= kv_len;
        if constexpr (SPEC.bounded_left) cut |= kv_first < q_last + offset - left;
        if constexpr (SPEC.bounded_right) cut |= kv_last > q_first + offset + right;
        return cut;
    }

    // Whether some pair of a tile [rows, cols] at (q_first, kv_first) is masked or lies outside the sequence. (Not by
    // cuts_keys: with NVRTC 13.5 ptxas then spills in the Hopper backward.)
    __device__ __forceinline__ bool cuts(int q_first, int rows, int kv_first, int cols) const {
        const int q_last = q_first + rows - 1, kv_last = kv_first + cols - 1;
        bool cut = kv_last >= kv_len || q_last >= q_len;
        if constexpr (SPEC.bounded_left) cut |= kv_first < q_last + offset - left;
        if constexpr (SPEC.bounded_right) cut |= kv_last > q_first + offset + right;
        return cut;
    }

    // Which keys of a lane's columns, the first of them kv_index, a query may attend to.
    __device__ __forceinline__ unsigned int keys_of(int q_index, int kv_index) const {
        const ColumnRange columns = columns_of(q_index, kv_index);
        unsigned int allowed = q_index < q_len ? columns_before(columns.last) : 0;
        if constexpr (SPEC.bounded_left) allowed &= ~columns_before(columns.first);
        return allowed;
    }

    // The same as a range, counted from kv_index; q_index may lie beyond the last query.
    __device__ __forceinline__ ColumnRange columns_of(int q_index, int kv_index) const {
        const int position = q_index + offset;
        const int stop = SPEC.bounded_right ? min(kv_len, position + right + 1) : kv_len;
        return ColumnRange{position - left - kv_index, stop - kv_index};
    }

    __device__ __forceinline__ bool allows(int q_index, int kv_index) const {
        bool allowed = kv_index < kv_len && q_index < q_len;
        if constexpr (SPEC.bounded_left) allowed &= kv_index >= q_index + offset - left;
        if constexpr (SPEC.bounded_right) allowed &= kv_index <= q_index + offset + right;
        return allowed;
    }
};

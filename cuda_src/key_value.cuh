// The tiles of K and V of one kv head, in a ring of TILE.stages buffers in shared memory.
#pragma once
#include "copy.cuh"
#include "schedule.cuh"
#include "split.cuh"

// V_FIRST: that one is needed first, and K longest.
template <int D, int DV, bool V_FIRST = false>
struct KeyValueTiles {
    static constexpr int K_BYTES = TILE.cols * row_pitch(D), V_BYTES = TILE.cols * row_pitch(DV);

    RowStream<TILE.cols, D> K;
    RowStream<TILE.cols, DV> V;
    int kv_len;
    unsigned int smem;

    // Of a sequence's tiles from number `first` on.
    __device__ __forceinline__ KeyValueTiles(const Params& p, const Sequence& sequence, int kv_head, int first,
                                             unsigned int start)
        : K(head_rows(p.k, sequence.batch, sequence.kv_start + first * TILE.cols, kv_head), p.k.row_stride),
          V(head_rows(p.v, sequence.batch, sequence.kv_start + first * TILE.cols, kv_head), p.v.row_stride),
          kv_len(sequence.kv_len),
          smem(start) {}

    __device__ __forceinline__ unsigned int K_smem(int tile) const {
        return smem + tile % TILE.stages * (K_BYTES + V_BYTES);
    }

    __device__ __forceinline__ unsigned int V_smem(int tile) const { return K_smem(tile) + K_BYTES; }

    __device__ __forceinline__ void load_K(const Params& p, int tile) {
        K.load(K_smem(tile), p.k.row_stride, kv_len - tile * TILE.cols);
    }

    __device__ __forceinline__ void load_V(const Params& p, int tile) {
        V.load(V_smem(tile), p.v.row_stride, kv_len - tile * TILE.cols);
    }

    __device__ __forceinline__ void load_first(const Params& p, int tile) {
        if constexpr (V_FIRST) {
            load_V(p, tile);
        } else {
            load_K(p, tile);
        }
    }

    __device__ __forceinline__ void load_second(const Params& p, int tile) {
        if constexpr (V_FIRST) {
            load_K(p, tile);
        } else {
            load_V(p, tile);
        }
    }

    __device__ __forceinline__ void split_K(int tile) const { split_rows<TILE.cols, D>(K_smem(tile)); }
    __device__ __forceinline__ void split_V(int tile) const { split_rows<TILE.cols, DV>(V_smem(tile)); }

    // One asynchronous group; an empty one from tile `last` on.
    __device__ __forceinline__ void load(const Params& p, int tile, int last) {
        if (tile < last) {
            load_K(p, tile);
            load_V(p, tile);
        }
        copy_async_commit();
    }

    // `begin` before the first tile, then for each tile `take_first` and, when everything that reads this one of K and
    // V for the first time is issued, `take_second`. With one stage they are on their way in turn, each under the work
    // on the other; with more the ring brings both.
    __device__ __forceinline__ void begin(const Params& p, const TileRange& tiles) {
        if constexpr (TILE.stages == 1) {
            if (tiles.first < tiles.last) load_first(p, tiles.first);
            copy_async_commit();
        } else {
            for (int stage = 0; stage < TILE.stages - 1; ++stage) load(p, tiles.first + stage, tiles.last);
        }
    }

    __device__ __forceinline__ void take_first(const Params& p, const TileRange& tiles, int tile) {
        if constexpr (TILE.stages == 1) {
            copy_async_wait<0>();
            V_FIRST ? split_V(tile) : split_K(tile);
            __syncthreads();  // and everyone is done with the second one of the tile before
            load_second(p, tile);
            copy_async_commit();
        } else {
            advance_ring(
                tile, [&](int next) { load(p, next, tiles.last); },
                [&] {
                    split_K(tile);
                    split_V(tile);
                });
        }
    }

    __device__ __forceinline__ void take_second(const Params& p, const TileRange& tiles, int tile) {
        if constexpr (TILE.stages == 1) {
            copy_async_wait<0>();
            V_FIRST ? split_K(tile) : split_V(tile);
            __syncthreads();  // and everyone is done with the first one
            if (tile + 1 < tiles.last) load_first(p, tile + 1);
            copy_async_commit();
        }
    }
};

// The tiles of K and V of one kv head, in a ring of TILE.stages buffers in shared memory.
#pragma once
#include "copy.cuh"
#include "schedule.cuh"

template <int D, int DV>
struct KeyValueTiles {
    static constexpr int K_BYTES = TILE.cols * row_pitch(D), V_BYTES = TILE.cols * row_pitch(DV);

    const Element *K_gmem, *V_gmem;  // row 0 of the sequence
    int kv_len;
    unsigned int smem;

    __device__ __forceinline__ KeyValueTiles(const Params& p, const Sequence& sequence, int kv_head, unsigned int start)
        : K_gmem(head_rows(p.k, sequence.batch, sequence.kv_start, kv_head)),
          V_gmem(head_rows(p.v, sequence.batch, sequence.kv_start, kv_head)),
          kv_len(sequence.kv_len),
          smem(start) {}

    __device__ __forceinline__ unsigned int K_smem(int tile) const {
        return smem + tile % TILE.stages * (K_BYTES + V_BYTES);
    }

    __device__ __forceinline__ unsigned int V_smem(int tile) const { return K_smem(tile) + K_BYTES; }

    __device__ __forceinline__ void load_K(const Params& p, int tile) const {
        const int first = tile * TILE.cols;
        load_tile<TILE.cols, D>(K_smem(tile), K_gmem + first * p.k.row_stride, p.k.row_stride, kv_len - first);
    }

    __device__ __forceinline__ void load_V(const Params& p, int tile) const {
        const int first = tile * TILE.cols;
        load_tile<TILE.cols, DV>(V_smem(tile), V_gmem + first * p.v.row_stride, p.v.row_stride, kv_len - first);
    }

    // One asynchronous group; an empty one from tile `last` on.
    __device__ __forceinline__ void load(const Params& p, int tile, int last) const {
        if (tile < last) {
            load_K(p, tile);
            load_V(p, tile);
        }
        copy_async_commit();
    }

    // Where K is needed first and V after it, in that order a tile: `begin` before the first tile, then for each tile
    // `take_K` and, when everything that reads this K is issued, `take_V`. With one stage K and V are on their way in
    // turn, each under the work on the other; with more the ring brings both.
    __device__ __forceinline__ void begin(const Params& p, const TileRange& tiles) const {
        if constexpr (TILE.stages == 1) {
            if (tiles.first < tiles.last) load_K(p, tiles.first);
            copy_async_commit();
        } else {
            for (int stage = 0; stage < TILE.stages - 1; ++stage) load(p, tiles.first + stage, tiles.last);
        }
    }

    __device__ __forceinline__ void take_K(const Params& p, const TileRange& tiles, int tile) const {
        if constexpr (TILE.stages == 1) {
            copy_async_wait<0>();
            __syncthreads();  // and everyone is done with the V before
            load_V(p, tile);
            copy_async_commit();
        } else {
            advance_ring(tile, [&](int next) { load(p, next, tiles.last); });
        }
    }

    __device__ __forceinline__ void take_V(const Params& p, const TileRange& tiles, int tile) const {
        if constexpr (TILE.stages == 1) {
            copy_async_wait<0>();
            __syncthreads();  // and everyone is done with this K
            if (tile + 1 < tiles.last) load_K(p, tile + 1);
            copy_async_commit();
        }
    }
};

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

    // One asynchronous group; an empty one from tile `last` on.
    __device__ __forceinline__ void load(const Params& p, int tile, int last) const {
        if (tile < last) {
            const int first = tile * TILE.cols, rows = kv_len - first;
            load_tile<TILE.cols, D>(K_smem(tile), K_gmem + first * p.k.row_stride, p.k.row_stride, rows);
            load_tile<TILE.cols, DV>(V_smem(tile), V_gmem + first * p.v.row_stride, p.v.row_stride, rows);
        }
        copy_async_commit();
    }
};

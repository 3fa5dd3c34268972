// dQ / scale as a sum in float32 over the tiles of keys, of the portable backward: p.dq_sum, in pieces [64, 64] that
// consist of accumulator tiles [16, 8] of 128 numbers. Piece by piece the tiles of its first 8 columns come first, from
// row 0 on. From sm_90 on the four numbers of a lane stand together, as one instruction adds them (and as the Hopper
// kernel leaves them); before, the numbers of all lanes for one register.
#pragma once
#include "copy.cuh"
#include "schedule.cuh"

constexpr bool LANES_APART = __CUDA_ARCH__ >= 900;  // by four numbers

// An accumulator tile of a warp is added to the one in memory.
__device__ __forceinline__ void add_accumulators(float* tile_gmem, const float (&x)[4]) {
    const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(tile_gmem + 4 * lane), "f"(x[0]), "f"(x[1]),
                 "f"(x[2]), "f"(x[3])
                 : "memory");
#else
#pragma unroll
    for (int r = 0; r < 4; ++r) atomicAdd(tile_gmem + 32 * r + lane, x[r]);
#endif
}

// dQ += dS K  [rows, head_dim] of tile `q_tile` of a sequence's queries, with dS^T [cols, rows] and K [cols, head_dim]
// in shared memory. Each warp has 32 rows of it and some blocks of 16 columns, BLOCKS of them at a time.
template <int D, int DS_PITCH>
__device__ __forceinline__ void add_dq(const Params& p, const Sequence& sequence, int head, int q_tile,
                                       unsigned int dS_smem, unsigned int K_smem) {
    static_assert(TILE.rows % 64 == 0 && TILE.warps % (TILE.rows / 32) == 0);
    constexpr int DOWN = TILE.rows / 32, ACROSS = TILE.warps / DOWN;  // warps
    constexpr int OWN = ceil_div(padded_dim(D) / 16, ACROSS);         // blocks of a warp; some may lie beyond head_dim
    constexpr int BLOCKS = OWN % 2 == 0 ? 2 : 1;
    constexpr int PANELS = ceil_div(D, 64), PIECES = TILE.rows / 64;  // of a tile, across and down
    const int warp = threadIdx.x / 32, row = warp % DOWN * 32;
    const long long pair = static_cast<long long>(sequence.batch) * p.heads + head;
    const long long tile = pair * p.q_tiles + first_tile<TILE.rows>(sequence) + q_tile;
    float* pieces = p.dq_sum + (tile * PIECES + row / 64) * PANELS * PIECE_SIZE + row % 64 / 16 * 128;
#pragma unroll 1
    for (int block = warp / DOWN * OWN; block < (warp / DOWN + 1) * OWN; block += BLOCKS) {
        float dQ[2][2 * BLOCKS][4] = {};
        multiply_stored<D, TILE.cols / 16, DS_PITCH, true>(dQ, dS_smem + row * ELEMENT_BYTES, K_smem + block * 32);
#pragma unroll
        for (int n = 0; n < 2 * BLOCKS; ++n) {
            const int across = 2 * block + n;
            if (8 * across >= D) continue;
            float* column = pieces + across / 8 * PIECE_SIZE + across % 8 * 4 * 128;
            add_accumulators(column, dQ[0][n]);
            add_accumulators(column + 128, dQ[1][n]);
        }
    }
}

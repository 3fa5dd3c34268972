// Backward attention with mma.sync, dK and dV: one thread block a tile of keys of one kv head, looping over the query
// heads of its group and their tiles of queries. Everything is computed transposed, [keys, queries], so that P^T and
// dS^T are accumulators and become the left operands of dV and dK without leaving registers. No atomics: bitwise
// reproducible.
//
// TILE.split warps share rows of keys: each computes the same P^T and dS^T and keeps its slice of dK and dV.
#include "backward_stage.cuh"
#include "copy.cuh"
#include "dense.cuh"

constexpr int D = SPEC.head_dim, DV = SPEC.head_dim_v;
constexpr int WARP_ROWS = TILE.cols / (TILE.warps / TILE.split);  // keys
constexpr int M = WARP_ROWS / 16;
constexpr int N = TILE.rows / 8;  // across S^T
constexpr int SLICE_D = padded_dim(D) / TILE.split, SLICE_DV = padded_dim(DV) / TILE.split;
constexpr int K_BYTES = TILE.cols * row_pitch(D), V_BYTES = TILE.cols * row_pitch(DV);
constexpr int Q_BYTES = TILE.rows * row_pitch(D), DO_BYTES = TILE.rows * row_pitch(DV);
constexpr int STATISTIC_BYTES = TILE.rows * 4;
constexpr int STAGE_BYTES = Q_BYTES + DO_BYTES + 2 * STATISTIC_BYTES;

KERNEL(backward_portable_dkv, TILE.blocks)(ARGUMENT(Params) p) {
    extern __shared__ __align__(16) unsigned char smem[];
    const unsigned int K_smem = shared_address(smem);
    const unsigned int V_smem = K_smem + K_BYTES;
    const unsigned int stages_smem = V_smem + V_BYTES;
    const DenseTile dense{reinterpret_cast<float*>(smem + K_BYTES + V_BYTES + TILE.stages * STAGE_BYTES)};

    const Work work = find_work<TILE.cols, true>(p, blockIdx.x, p.kv_tiles, p.heads / p.group);
    if (!work.exists) return;
    const Sequence& sequence = work.sequence;
    const int kv_first = work.tile * TILE.cols;
    const int kv_rows = min(TILE.cols, sequence.kv_len - kv_first);
    const Band band(p, sequence);
    const TileRange tiles = band.q_tiles(kv_first, kv_first + kv_rows - 1);
    const int tiles_a_head = tiles.last - tiles.first, steps = tiles_a_head * p.group;

    auto load_step = [&](int step) {  // Q, dO, LSE and D of one tile of one head
        if (step < steps) {
            const int head = work.head * p.group + step / tiles_a_head;
            const int q_first = (tiles.first + step % tiles_a_head) * TILE.rows, rows = sequence.q_len - q_first;
            const long long row = sequence.q_start + q_first;
            const unsigned int Q_smem = stages_smem + (step % TILE.stages) * STAGE_BYTES;
            const unsigned int lse_smem = Q_smem + Q_BYTES + DO_BYTES;
            load_tile<TILE.rows, D>(Q_smem, head_rows(p.q, sequence.batch, row, head), p.q.row_stride, rows);
            load_tile<TILE.rows, DV>(Q_smem + Q_BYTES, head_rows(p.dout, sequence.batch, row, head), p.dout.row_stride,
                                     rows);
            load_statistic<TILE.rows>(lse_smem, statistic_rows(p.lse, sequence.batch, row, head), rows);
            load_statistic<TILE.rows>(lse_smem + STATISTIC_BYTES, statistic_rows(p.delta, sequence.batch, row, head),
                                      rows);
        }
        copy_async_commit();
    };

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / TILE.split * WARP_ROWS, slice = warp % TILE.split;
    float dK[M][SLICE_D / 8][4] = {};   // [keys, head_dim]
    float dV[M][SLICE_DV / 8][4] = {};  // [keys, head_dim_v]

    load_tile<TILE.cols, D>(K_smem, head_rows(p.k, sequence.batch, sequence.kv_start + kv_first, work.head),
                            p.k.row_stride, kv_rows);
    load_tile<TILE.cols, DV>(V_smem, head_rows(p.v, sequence.batch, sequence.kv_start + kv_first, work.head),
                             p.v.row_stride, kv_rows);
    for (int stage = 0; stage < TILE.stages - 1; ++stage) load_step(stage);
    for (int step = 0; step < steps; ++step) {
        advance_ring(step, load_step);
        const int stage_offset = (step % TILE.stages) * STAGE_BYTES;
        const unsigned int Q_smem = stages_smem + stage_offset, dO_smem = Q_smem + Q_BYTES;
        const float* lse = reinterpret_cast<const float*>(smem + K_BYTES + V_BYTES + stage_offset + Q_BYTES + DO_BYTES);
        const float* delta = lse + TILE.rows;
        const int head = work.head * p.group + step / tiles_a_head;
        const int q_first = (tiles.first + step % tiles_a_head) * TILE.rows;

        if constexpr (DENSE) dense.load(p, sequence.batch, head, q_first, kv_first);

        // S^T = K Q^T and dP^T = V dO^T  [keys, queries]
        float S[M][N][4] = {}, dP[M][N][4] = {};
        multiply_nt<D>(S, K_smem + warp_row * row_pitch(D), Q_smem);
        multiply_nt<DV>(dP, V_smem + warp_row * row_pitch(DV), dO_smem);

        // P^T (in S) and dS^T (in dP)
        const Scores scores(p, sequence.index, head, band.offset);
        const Dropout dropout(p, sequence.index, head);
        const float distance = scores.distance(q_first + lane % 4 * 2, kv_first + warp_row + lane / 4);
        auto differentiate_all = [&](bool masked) {
#pragma unroll
            for (int i = 0; i < M; ++i) {
                Kept<N / 2> kept;
                if constexpr (SPEC.dropout) dropout.draw_transposed(kept, q_first, kv_first + warp_row + 16 * i);
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int col = 8 * n + lane % 4 * 2 + r % 2;
                        const int kv_index = kv_first + warp_row + 16 * i + lane / 4 + r / 2 * 8;
                        differentiate(S[i][n][r], dP[i][n][r], scores, band, masked, q_first + col, kv_index,
                                      distance + (8 * n + r % 2 - 16 * i - r / 2 * 8), exponent_reference(lse[col]),
                                      delta[col], dropout.factor(kept, n, r), dense.addend(col, kv_index - kv_first));
                    }
                }
            }
        };
        const bool cut = band.cuts(q_first, TILE.rows, kv_first, TILE.cols);
        if (LONG_STAGE || cut) {
            differentiate_all(cut);
        } else {  // most tiles need no mask: around the loops, as in them it would be computed
            differentiate_all(false);
        }

        // dV += P^T dO  [keys, head_dim_v]    dK += dS^T Q  [keys, head_dim]
        multiply_nn<DV>(dV, S, dO_smem + slice * SLICE_DV * ELEMENT_BYTES);
        multiply_nn<D>(dK, dP, Q_smem + slice * SLICE_D * ELEMENT_BYTES);
    }
    copy_async_commit();
    copy_async_wait<0>();

#pragma unroll
    for (int i = 0; i < M; ++i) {
        const int row = warp_row + 16 * i;
        const long long kv_row = sequence.kv_start + kv_first + row;
        store_gradient<D>(p.dk, p.dk_float32, sequence.batch, kv_row, work.head, kv_rows - row, slice * SLICE_D, dK[i],
                          p.scale, p.accumulate);
        store_gradient<DV>(p.dv, p.dv_float32, sequence.batch, kv_row, work.head, kv_rows - row, slice * SLICE_DV,
                           dV[i], 1.0f, p.accumulate);
    }
}

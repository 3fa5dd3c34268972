// Backward attention with mma.sync, dQ: one thread block a tile of queries of one head, looping over tiles of keys.
// S and dP are computed again rather than passed on by the dK/dV kernel: two products more, but no workspace, no
// atomics, and dS is an accumulator that becomes the left operand of dQ without leaving registers. TILE.split warps
// share rows: each computes the same dS and keeps its slice of dQ. With a bias dS is also its gradient, and goes from
// here to memory.
#include "backward_stage.cuh"
#include "copy.cuh"
#include "dense.cuh"
#include "key_value.cuh"
#include "split.cuh"

constexpr int D = SPEC.head_dim, DV = SPEC.head_dim_v;
constexpr int WARP_ROWS = TILE.rows / (TILE.warps / TILE.split);
constexpr int M = WARP_ROWS / 16;
constexpr int N = TILE.cols / 8;  // across S
constexpr int SLICE = padded_dim(D) / TILE.split;
constexpr int Q_BYTES = TILE.rows * row_pitch(D), DO_BYTES = TILE.rows * row_pitch(DV);
constexpr int KV_BYTES = TILE.stages * TILE.cols * (row_pitch(D) + row_pitch(DV));

__device__ __forceinline__ void differentiate_queries(const Params& p, const Work& work) {
    extern __shared__ __align__(16) unsigned char smem[];
    const unsigned int Q_smem = shared_address(smem);
    const unsigned int dO_smem = Q_smem + Q_BYTES;
    const unsigned int KV_smem = dO_smem + DO_BYTES;
    const DenseTile dense{reinterpret_cast<float*>(smem + Q_BYTES + DO_BYTES + KV_BYTES)};

    const Sequence& sequence = work.sequence;
    const int head = work.head, kv_head = head / p.group;
    const int q_first = work.tile * TILE.rows;
    const int q_rows = min(TILE.rows, sequence.q_len - q_first);
    const long long q_row = sequence.q_start + q_first;
    const Band band(p, sequence);
    const TileRange tiles = band.kv_tiles(q_first, q_first + q_rows - 1);

    KeyValueTiles<D, DV, true> kv(p, sequence, kv_head, tiles.first, KV_smem);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / TILE.split * WARP_ROWS, first_col = warp % TILE.split * SLICE;
    const Scores scores(p, sequence.index, head, band.offset);
    const Dropout dropout(p, sequence.index, head);
    const float* lse_gmem = statistic_rows(p.lse, sequence.batch, q_row, head);
    const float* delta_gmem = statistic_rows(p.delta, sequence.batch, q_row, head);
    float reference[M][2], delta[M][2];  // of this lane's rows
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + 16 * i + lane / 4 + 8 * half;
            reference[i][half] = row < q_rows ? exponent_reference(lse_gmem[row]) : 0.0f;
            delta[i][half] = row < q_rows ? delta_gmem[row] : 0.0f;
        }
    }
    float dQ[M][SLICE / 8][4] = {};  // [rows, head_dim]

    load_tile<TILE.rows, D>(Q_smem, head_rows(p.q, sequence.batch, q_row, head), p.q.row_stride, q_rows);
    load_tile<TILE.rows, DV>(dO_smem, head_rows(p.dout, sequence.batch, q_row, head), p.dout.row_stride, q_rows);
    kv.begin(p, tiles);
    split_resident<TILE.rows, D, DV>(Q_smem, dO_smem);
    for (int tile = tiles.first; tile < tiles.last; ++tile) {
        kv.take_first(p, tiles, tile);
        const unsigned int K_smem = kv.K_smem(tile), V_smem = kv.V_smem(tile);
        const int kv_first = tile * TILE.cols;

        if constexpr (DENSE) dense.load(p, sequence.batch, head, q_first, kv_first);

        // dP = dO V^T and S = Q K^T  [rows, cols]
        float dP[M][N][4] = {}, S[M][N][4] = {};
        const unsigned int Q_warp = Q_smem + warp_row * row_pitch(D), dO_warp = dO_smem + warp_row * row_pitch(DV);
        multiply_nt<DV>(dP, dO_warp, V_smem);
        apply_units<DV>(dP, dO_warp, V_smem);
        kv.take_second(p, tiles, tile);
        multiply_nt<D>(S, Q_warp, K_smem);
        apply_units<D>(S, Q_warp, K_smem);

        // dS times d S / d (scale q.k) (in dP), and with a bias dS (in its tile)
        const float distance = scores.distance(q_first + warp_row + lane / 4, kv_first + lane % 4 * 2);
        auto differentiate_all = [&](bool masked) {
#pragma unroll
            for (int i = 0; i < M; ++i) {
                Kept<N / 2> kept;
                if constexpr (SPEC.dropout) dropout.draw(kept, q_first + warp_row + 16 * i, kv_first);
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int q_index = q_first + warp_row + 16 * i + lane / 4 + r / 2 * 8;
                        const int kv_index = kv_first + 8 * n + lane % 4 * 2 + r % 2;
                        const float ds = differentiate(S[i][n][r], dP[i][n][r], scores, band, masked, q_index, kv_index,
                                                       distance + (16 * i + r / 2 * 8 - 8 * n - r % 2),
                                                       reference[i][r / 2], delta[i][r / 2], dropout.factor(kept, n, r),
                                                       dense.addend(q_index - q_first, kv_index - kv_first));
                        if constexpr (SPEC.bias) {
                            if (first_col == 0) dense.gradient(q_index - q_first, kv_index - kv_first) = ds;
                        }
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

        if constexpr (SPEC.bias) {
            if (wants_gradient(p)) {
                __syncthreads();
                dense.put_gradient(p, sequence.batch, head, q_first, kv_first);
            }
        }

        // dQ += dS K  [rows, head_dim]
        AccumulatorOperand<N> dS[M];
        apply_column_units<D>(dP, K_smem);  // which the product with rows of K wants
        RowUnits<M> dS_units;
        set_operand(dS, dS_units, dP);
        multiply_nn<D>(dQ, dS, K_smem + first_col * OPERAND_BYTES, dS_units);
    }
    copy_async_commit();
    copy_async_wait<0>();
    if constexpr (SPEC.bias) {
        if (wants_gradient(p) && p.dbias_sum == nullptr) {  // keys of other tiles
            clear_gradient(p, sequence.batch, head, q_first, q_rows, 0, min(tiles.first * TILE.cols, sequence.kv_len));
            clear_gradient(p, sequence.batch, head, q_first, q_rows, tiles.last * TILE.cols, sequence.kv_len);
        }
    }

#pragma unroll
    for (int i = 0; i < M; ++i) {
        const int row = warp_row + 16 * i;
        store_gradient<D>(p.dq, p.dq_float32, sequence.batch, q_row + row, head, q_rows - row, first_col, dQ[i],
                          p.scale, p.accumulate);
    }
}

KERNEL(backward_portable_dq, TILE.blocks)(ARGUMENT(Params) p) {
    if constexpr (ORDERED) {  // all tiles that add to the same elements of dbias, one after the other
        const int heads = p.dbias.head_stride ? p.heads : 1, tiles = p.dbias.row_stride ? p.q_tiles : 1;
        const int tile = blockIdx.x % tiles, head = blockIdx.x / tiles % heads, batch = blockIdx.x / tiles / heads;
        for (int b = batch; b < (p.dbias.batch_stride ? batch + 1 : p.batch); ++b) {
            for (int h = head; h < (p.dbias.head_stride ? head + 1 : p.heads); ++h) {
                for (int t = tile; t < (p.dbias.row_stride ? tile + 1 : p.q_tiles); ++t) {
                    __syncthreads();  // everyone is done with the shared memory
                    differentiate_queries(p, Work{Sequence{b, b, 0, 0, p.q_len, p.kv_len}, h, t, true});
                }
            }
        }
    } else {
        const Work work = find_work<TILE.rows, false>(p, blockIdx.x, p.q_tiles, p.heads);
        if (work.exists) differentiate_queries(p, work);
    }
}

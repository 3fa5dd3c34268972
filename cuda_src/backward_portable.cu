// Backward attention with mma.sync, dK and dV, and unless SPEC.lean dQ: one thread block a tile of keys of one kv head,
// looping over the query heads of its group and their tiles of queries. Scores are computed transposed, [keys,
// queries], so that P^T and dS^T are accumulators and become the left operands of dV and dK without leaving registers.
//
// TILE.split warps share rows of keys, and each keeps its slice of dK and dV. Lean, each computes the same P^T and
// dS^T, nothing is atomic, and dQ is left to backward_portable_dq.cu. Otherwise dS^T goes through shared memory to
// become the left operand of dQ = dS K, of which each warp adds a part to a sum in float32 (backward_finish.cu rounds
// it); and of warps that share keys each computes P^T and dS^T of its queries, which the others read there.
#include "backward_stage.cuh"
#include "copy.cuh"
#include "dense.cuh"
#include "query_sum.cuh"
#include "split.cuh"

constexpr int D = SPEC.head_dim, DV = SPEC.head_dim_v;
constexpr int WARP_ROWS = TILE.cols / (TILE.warps / TILE.split);  // keys
constexpr int M = WARP_ROWS / 16;
constexpr bool SUMS_DQ = !SPEC.lean;
static_assert(!SUMS_DQ || !(LONG_STAGE || IS_FLOAT32));
// Then dO and Q come under the product that is dQ of the step before, or with two stages Q a step earlier still.
constexpr bool EARLY_Q = SUMS_DQ && TILE.stages > 1;
constexpr bool EXCHANGES = SUMS_DQ && TILE.split > 1;                     // P^T and dS^T, among warps that share keys
constexpr int OWN_ROWS = EXCHANGES ? TILE.rows / TILE.split : TILE.rows;  // queries of this warp
constexpr int N = OWN_ROWS / 8;                                           // across S^T
constexpr int SLICE_D = padded_dim(D) / TILE.split, SLICE_DV = padded_dim(DV) / TILE.split;
constexpr int K_BYTES = TILE.cols * row_pitch(D), V_BYTES = TILE.cols * row_pitch(DV);
constexpr int Q_BYTES = TILE.rows * row_pitch(D), DO_BYTES = TILE.rows * row_pitch(DV);
constexpr int Q_STAGE = Q_BYTES + TILE.rows * 4, DO_STAGE = DO_BYTES + TILE.rows * 4;  // with LSE, and with D
constexpr int DO_STAGES = SUMS_DQ ? 1 : TILE.stages;
constexpr int STAGES_BYTES = TILE.stages * Q_STAGE + DO_STAGES * DO_STAGE;
// P^T and dS^T [keys, queries] in shared memory: rows of an odd number of 16-byte chunks, as in product.cuh.
constexpr int SCORE_PITCH = TILE.rows * ELEMENT_BYTES + 16, SCORE_BYTES = TILE.cols * SCORE_PITCH;

// A tile of queries of one head.
struct Step {
    int head, tile;

    // To the head's next, or the first of the next head, which is said.
    __device__ __forceinline__ bool advance(const TileRange& tiles) {
        if (++tile < tiles.last) return false;
        tile = tiles.first;
        ++head;
        return true;
    }

    __device__ __forceinline__ Step before(const TileRange& tiles) const {
        return tile > tiles.first ? Step{head, tile - 1} : Step{head - 1, tiles.last - 1};
    }
};

// Q and LSE, or dO and D, of one step after the other.
template <int DIM>
struct StepStream {
    Step next;
    RowStream<TILE.rows, DIM> rows;

    __device__ __forceinline__ StepStream(const Tensor& tensor, const Sequence& sequence, const Step& first)
        : next(first), rows(of_head(tensor, sequence, first)) {}

    static __device__ __forceinline__ RowStream<TILE.rows, DIM> of_head(const Tensor& tensor, const Sequence& sequence,
                                                                        const Step& first) {
        const long long row = sequence.q_start + first.tile * TILE.rows;
        return RowStream<TILE.rows, DIM>(head_rows(tensor, sequence.batch, row, first.head), tensor.row_stride);
    }

    __device__ __forceinline__ void load(unsigned int X_smem, const Tensor& tensor, const RowStatistic& statistic,
                                         const Sequence& sequence, const TileRange& tiles) {
        const int q_first = next.tile * TILE.rows, left = sequence.q_len - q_first;
        rows.load(X_smem, tensor.row_stride, left);
        const float* x_gmem = statistic_rows(statistic, sequence.batch, sequence.q_start + q_first, next.head);
        load_statistic<TILE.rows>(X_smem + TILE.rows * row_pitch(DIM), x_gmem, left);
        if (next.advance(tiles)) rows = of_head(tensor, sequence, next);
    }
};

// A warp's operands to its place there.
__device__ __forceinline__ void store_scores(unsigned int smem, const AccumulatorOperand<N> (&X)[M]) {
    const int lane = threadIdx.x % 32;
    const unsigned int lane_smem = smem + lane / 4 * SCORE_PITCH + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                store_shared_word(lane_smem + (16 * i + 8 * half) * SCORE_PITCH + 16 * n,
                                  X[i].steps[n / 2].hi[n % 2 * 2 + half]);
            }
        }
    }
}

KERNEL(backward_portable, TILE.blocks)(ARGUMENT(Params) p) {
    extern __shared__ __align__(16) unsigned char smem[];
    const unsigned int K_smem = shared_address(smem);
    const unsigned int V_smem = K_smem + K_BYTES;
    const unsigned int stages_smem = V_smem + V_BYTES;
    const unsigned int dS_smem = stages_smem + STAGES_BYTES, P_smem = dS_smem + SCORE_BYTES;
    const DenseTile dense{reinterpret_cast<float*>(smem + K_BYTES + V_BYTES + STAGES_BYTES)};

    const Work work = find_work<TILE.cols, true>(p, blockIdx.x, p.kv_tiles, p.heads / p.group);
    if (!work.exists) return;
    const Sequence& sequence = work.sequence;
    const int kv_first = work.tile * TILE.cols;
    const int kv_rows = min(TILE.cols, sequence.kv_len - kv_first);
    const Band band(p, sequence);
    const TileRange tiles = band.q_tiles(kv_first, kv_first + kv_rows - 1);
    const int steps = (tiles.last - tiles.first) * p.group;

    const Step first{work.head * p.group, tiles.first};
    Step in_turn = first;  // what is at work; where dQ is summed, the step before the next dO says it
    StepStream<D> Q(p.q, sequence, first);
    StepStream<DV> dO(p.dout, sequence, first);
    const auto Q_place = [](int step) { return step % TILE.stages * Q_STAGE; };
    const auto dO_place = [](int step) { return TILE.stages * Q_STAGE + step % DO_STAGES * DO_STAGE; };
    const auto load_Q = [&](int step) {
        if (step < steps) Q.load(stages_smem + Q_place(step), p.q, p.lse, sequence, tiles);
    };
    const auto load_dO = [&](int step) {
        if (step < steps) dO.load(stages_smem + dO_place(step), p.dout, p.delta, sequence, tiles);
    };
    const auto load_step = [&](int step) {
        load_Q(step);
        load_dO(step);
        copy_async_commit();
    };

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / TILE.split * WARP_ROWS, slice = warp % TILE.split;
    const int own = EXCHANGES ? slice * OWN_ROWS : 0;  // this warp's first query of a tile
    float dK[M][SLICE_D / 8][4] = {};                  // [keys, head_dim]
    float dV[M][SLICE_DV / 8][4] = {};                 // [keys, head_dim_v]

    load_tile<TILE.cols, D>(K_smem, head_rows(p.k, sequence.batch, sequence.kv_start + kv_first, work.head),
                            p.k.row_stride, kv_rows);
    load_tile<TILE.cols, DV>(V_smem, head_rows(p.v, sequence.batch, sequence.kv_start + kv_first, work.head),
                             p.v.row_stride, kv_rows);
    if constexpr (EARLY_Q) {
        load_Q(0);
        copy_async_commit();
        load_dO(0);
        copy_async_commit();
        load_Q(1);
        copy_async_commit();
        copy_async_wait<2>();
        __syncthreads();
    } else {
        for (int stage = 0; stage < (SUMS_DQ ? 1 : TILE.stages - 1); ++stage) load_step(stage);
    }
    split_resident<TILE.cols, D, DV>(K_smem, V_smem);
    for (int step = 0; step < steps; ++step) {
        if constexpr (!SUMS_DQ) {
            advance_ring(step, load_step, [&] {
                split_rows<TILE.rows, D>(stages_smem + Q_place(step));
                split_rows<TILE.rows, DV>(stages_smem + dO_place(step));
            });
        } else if constexpr (!EARLY_Q) {
            copy_async_wait<0>();
            __syncthreads();
        }
        const unsigned int Q_smem = stages_smem + Q_place(step), dO_smem = stages_smem + dO_place(step);
        const unsigned char* stages = smem + K_BYTES + V_BYTES;
        const float* lse = reinterpret_cast<const float*>(stages + Q_place(step) + Q_BYTES);
        const float* delta = reinterpret_cast<const float*>(stages + dO_place(step) + DO_BYTES);
        const Step now = SUMS_DQ ? dO.next.before(tiles) : in_turn;
        const int head = now.head, q_first = now.tile * TILE.rows;

        if constexpr (DENSE) dense.load(p, sequence.batch, head, q_first, kv_first);

        // P^T and dS^T, from S^T = K Q^T and dP^T = V dO^T  [keys, queries], of this warp's queries
        AccumulatorOperand<N> P[M], dS[M];
        const unsigned int K_warp = K_smem + warp_row * row_pitch(D), V_warp = V_smem + warp_row * row_pitch(DV);
        const unsigned int Q_own = Q_smem + own * row_pitch(D), dO_own = dO_smem + own * row_pitch(DV);
        const Scores scores(p, sequence.index, head, band.offset);
        const bool cut = band.cuts(q_first, TILE.rows, kv_first, TILE.cols);
        const auto kv_of = [&](int i, int r) { return kv_first + warp_row + 16 * i + lane / 4 + r / 2 * 8; };
        const auto column = [&](int n, int r) { return own + 8 * n + lane % 4 * 2 + r % 2; };
        // dV += P^T dO  [keys, head_dim_v] and dK += dS^T Q  [keys, head_dim], of this warp's queries
        const unsigned int dO_slice = dO_smem + slice * SLICE_DV * OPERAND_BYTES;
        const unsigned int Q_slice = Q_smem + slice * SLICE_D * OPERAND_BYTES;
        const auto add_dV = [&](const RowUnits<M>& units) {
            multiply_nn<DV>(dV, P, dO_slice + own * row_pitch(DV), units);
        };
        const auto add_dK = [&](const RowUnits<M>& units) {
            multiply_nn<D>(dK, dS, Q_slice + own * row_pitch(D), units);
        };
        if constexpr (SUMS_DQ) {  // P^T, packed, before dP^T: there are registers for one of S^T and dP^T
            float S[M][N][4] = {};
            multiply_nt<D, 8>(S, K_warp, Q_own);
            // Masks come before the exponentials, so that these and the product that is dP^T are one block of code: a
            // score that times the factor is -inf.
            const float factor = scores.factor == 0.0f ? SMALLEST : scores.factor;
            if (cut) {
#pragma unroll
                for (int i = 0; i < M; ++i) {
#pragma unroll
                    for (int n = 0; n < N; ++n) {
#pragma unroll
                        for (int r = 0; r < 4; ++r) {
                            if (!band.allows(q_first + column(n, r), kv_of(i, r)))
                                S[i][n][r] = factor > 0.0f ? MINUS_INFINITY : -MINUS_INFINITY;
                        }
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < M; ++i) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        S[i][n][r] = exponential(S[i][n][r] * factor - exponent_reference(lse[column(n, r)]));
                    }
                }
                P[i].set(S[i]);
            }
            if constexpr (EARLY_Q) {
                copy_async_wait<1>();
                __syncthreads();  // dO is there, and everyone is done with dS^T of the step before
            }
            float dP[M][N][4] = {};
            multiply_nt<DV, 8>(dP, V_warp, dO_own);
#pragma unroll
            for (int i = 0; i < M; ++i) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) dP[i][n][r] = P[i].element(n, r) * (dP[i][n][r] - delta[column(n, r)]);
                }
                dS[i].set(dP[i]);
            }
        } else {
            float S[M][N][4] = {}, dP[M][N][4] = {};
            multiply_nt<D>(S, K_warp, Q_own);
            multiply_nt<DV>(dP, V_warp, dO_own);
            apply_units<D>(S, K_warp, Q_own);
            apply_units<DV>(dP, V_warp, dO_own);
            const Dropout dropout(p, sequence.index, head);
            const float distance = scores.distance(q_first + column(0, 0), kv_of(0, 0));
            auto differentiate_all = [&](bool masked) {
#pragma unroll
                for (int i = 0; i < M; ++i) {
                    Kept<N / 2> kept;
                    if constexpr (SPEC.dropout) dropout.draw_transposed(kept, q_first, kv_of(i, 0) - lane / 4);
#pragma unroll
                    for (int n = 0; n < N; ++n) {
#pragma unroll
                        for (int r = 0; r < 4; ++r) {
                            const int col = column(n, r), kv_index = kv_of(i, r);
                            differentiate(S[i][n][r], dP[i][n][r], scores, band, masked, q_first + col, kv_index,
                                          distance + (8 * n + r % 2 - 16 * i - r / 2 * 8), exponent_reference(lse[col]),
                                          delta[col], dropout.factor(kept, n, r),
                                          dense.addend(col, kv_index - kv_first));
                        }
                    }
                }
            };
            if (LONG_STAGE || cut) {
                differentiate_all(cut);
            } else {  // most tiles need no mask: around the loops, as in them it would be computed
                differentiate_all(false);
            }
            RowUnits<M> units;
            apply_column_units<DV>(S, dO_own);  // which products with rows of dO and Q want
            set_operand(P, units, S);
            add_dV(units);
            apply_column_units<D>(dP, Q_own);
            set_operand(dS, units, dP);
            add_dK(units);
        }
        if constexpr (SUMS_DQ) {
            const unsigned int own_scores = warp_row * SCORE_PITCH + own * ELEMENT_BYTES;
            store_scores(dS_smem + own_scores, dS);
            if constexpr (EXCHANGES) store_scores(P_smem + own_scores, P);
            add_dV(RowUnits<M>());
            add_dK(RowUnits<M>());
            if constexpr (EARLY_Q) copy_async_wait<0>();
            __syncthreads();  // P^T and dS^T are there, and the next Q
#pragma unroll
            for (int other = 1; other < (EXCHANGES ? TILE.split : 1); ++other) {
                const int row = (slice + other) % TILE.split * OWN_ROWS;
                const unsigned int score = warp_row * SCORE_PITCH + row * ELEMENT_BYTES;
                multiply_stored<DV, OWN_ROWS / 16, SCORE_PITCH, false>(dV, P_smem + score,
                                                                       dO_slice + row * row_pitch(DV));
                multiply_stored<D, OWN_ROWS / 16, SCORE_PITCH, false>(dK, dS_smem + score,
                                                                      Q_slice + row * row_pitch(D));
            }
            if constexpr (EXCHANGES) __syncthreads();  // everyone is done with Q and dO
            if constexpr (EARLY_Q) {
                load_dO(step + 1);
                copy_async_commit();
                load_Q(step + 2);
                copy_async_commit();
            } else {
                load_step(step + 1);
            }
            add_dq<D, SCORE_PITCH>(p, sequence, head, now.tile, dS_smem, K_smem);
        }
        in_turn.advance(tiles);
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

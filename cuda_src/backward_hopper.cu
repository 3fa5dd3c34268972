// Backward attention for sm_90a with TMA and wgmma. With P = e^(S - LSE), dP = dO V^T and dS = P (dP - D):
//
//   dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K
//
// A thread block keeps a tile of TILE.cols keys of one kv head and steps over the tiles of TILE.rows queries of the
// heads of its group. Two warpgroups own 64 keys each and compute everything transposed, [keys, queries], so that P^T
// and dS^T are accumulators that become the left operands of dV and dK without leaving registers. dQ sums over keys:
// both warpgroups put dS into shared memory, each multiplies one piece [64, 64] of dS K, and a warp adds the piece to a
// float32 sum in global memory by bulk copies (backward_finish.cu makes dQ of it). The product of a step's dS with K is
// issued one step later, so that no warpgroup waits for the other: out of phase, one's exponentials run under the
// other's products.
//
// With SPEC.deterministic the tiles of keys add to a piece of dQ in their order. With SPEC.lean dQ is left to
// backward_hopper_dq.cu.
#include "backward_keys.cuh"

constexpr bool WITH_DQ = !SPEC.lean;
constexpr int GROUPS = 2;              // warpgroups that compute
constexpr int PIECES_ACROSS = D / 64;  // of a row of dQ
// Slots for dS, which let the warpgroups drift apart, and for a warpgroup's pieces of dQ, of which a second lets it go
// on while the first waits for its turn.
constexpr int DQ_SLOTS = SPEC.deterministic && R == 64 ? 2 : 1;
constexpr int DS_SLOTS = DQ_SLOTS == 1 && R == 64 ? 3 : 2;
constexpr int DS_BYTES = R * TILE.cols * 2, DQ_BYTES = PIECE_SIZE * 4;
// The producer warps would like 40 registers; where the math warpgroups need 240, they make do with 24.
constexpr bool WIDE_PRODUCER = D == 128 && !FOLD && !SPEC.softcap && !SPEC.dropout;
constexpr int PRODUCER_REGISTERS = WIDE_PRODUCER ? 40 : 24, MATH_REGISTERS = WIDE_PRODUCER ? 232 : 240;
static_assert(TILE.cols == 64 * GROUPS && TILE.warps == 4 * (GROUPS + 1));
static_assert(PRODUCER_REGISTERS + GROUPS * MATH_REGISTERS <= (GROUPS + 1) * LAUNCH_REGISTERS);
static_assert(!WITH_DQ || R / 64 * PIECES_ACROSS == GROUPS, "each warpgroup makes one piece of dQ a step");

enum NamedBarrier { FIRST_DONE = 1, DQ_FULL = 2, DQ_EMPTY = 6 };  // of the first warpgroup's first slot

__device__ __forceinline__ int dq_slot(int slot, int warpgroup) { return slot * GROUPS + warpgroup; }

// Where everything lies in shared memory.
struct Layout : Barriers {
    unsigned int K, V, Q, dO, dS, dQ, statistics;

    __device__ __forceinline__ explicit Layout(unsigned int start)
        : K(start),
          V(K + K_BYTES),
          Q(V + V_BYTES),
          dO(Q + TILE.stages * Q_BYTES),
          dS(dO + TILE.stages * DO_BYTES),
          dQ(dS + WITH_DQ * DS_SLOTS * DS_BYTES),
          statistics(dQ + WITH_DQ * DQ_SLOTS * GROUPS * DQ_BYTES) {
        barriers = statistics + TILE.stages * STATISTIC_BYTES;
    }
};

// The number of a step's piece of dQ.
__device__ __forceinline__ long long piece_of(const Params& p, const Work& work, const Steps& steps, int warpgroup) {
    const long long pair = static_cast<long long>(work.sequence.batch) * p.heads + steps.head;
    return (pair * p.q_tiles + first_tile<R>(work.sequence) + steps.tile) * GROUPS + warpgroup;
}

// One warp for each warpgroup: its piece of dQ of every step is added to the sum in global memory. With
// SPEC.deterministic that waits until the tiles of keys before this one have added theirs; whether they have is asked
// ahead, while the piece before is on its way.
__device__ __forceinline__ void add_dq(const Params& p, const Layout& smem, int warpgroup) {
    const bool leader = threadIdx.x % 32 == 0;
    for (int i = 0; i < DQ_SLOTS; ++i) named_barrier_arrive(DQ_EMPTY + dq_slot(i, warpgroup), 160);
    int slot = 0;
    for_each_tile<false>(p, smem, [&](const Work& work, const Band& band, Steps steps) {
        int turn = -1;
        while (steps.more()) {
            const long long piece = piece_of(p, work, steps, warpgroup);
            if (SPEC.deterministic && leader) {
                const int q_first = steps.tile * R, q_last = min(q_first + R, band.q_len) - 1;
                const int own_turn = work.tile - band.kv_tiles(q_first, q_last).first;
                while (turn != own_turn) turn = load_relaxed(p.dq_turns + piece);
            }
            __syncwarp();
            named_barrier_wait(DQ_FULL + dq_slot(slot, warpgroup), 160);
            if (leader) {
                reduce_add_bulk(p.dq_sum + piece * PIECE_SIZE, smem.dQ + dq_slot(slot, warpgroup) * DQ_BYTES, DQ_BYTES);
                bulk_commit();
                bulk_wait_read();
            }
            __syncwarp();
            named_barrier_arrive(DQ_EMPTY + dq_slot(slot, warpgroup), 160);
            slot = (slot + 1) % DQ_SLOTS;
            steps.advance();
            if (SPEC.deterministic && leader) {
                turn = steps.more() ? load_relaxed(p.dq_turns + piece_of(p, work, steps, warpgroup)) : -1;
                bulk_wait();
                add_release(p.dq_turns + piece, 1);
            }
        }
    });
    if (leader) bulk_wait();
}

// A warpgroup's piece of dQ = dS K  [64, 64], asynchronous.
__device__ __forceinline__ void issue_dq(float (&dQ)[8][4], unsigned int dS_smem, unsigned int K_smem, int warpgroup) {
    const unsigned long long dS = tile_descriptor(dS_smem + warpgroup / PIECES_ACROSS * 64 * 128, 16);
    const unsigned long long K = tile_descriptor(K_smem + warpgroup % PIECES_ACROSS * KV_PANEL, KV_PANEL);
#pragma unroll
    for (int step = 0; step < TILE.cols / 16; ++step) {
        wgmma_ss<MN_MAJOR>(dQ, dS + step / 4 * (Q_PANEL / 16) + step % 4 * 2, K + step * 128, step > 0);
    }
    wgmma_commit();
}

// One warpgroup: dK and dV of 64 keys of every tile, and its pieces of dQ.
__device__ __forceinline__ void differentiate_keys(const Params& p, const Layout& smem, int warpgroup) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const unsigned int K_smem = smem.K + warpgroup * 64 * 128, V_smem = smem.V + warpgroup * 64 * 128;
    const unsigned int piece_smem = smem.dQ + threadIdx.x % 128 * 16;
    // Where stmatrix puts this warp's part of dS [rows, 64 keys]: lane l gives row l % 8 of matrix l / 8, of two by two
    // matrices of 8 queries and 8 keys.
    const int dS_row = lane / 16 * 8 + lane % 8, dS_chunk = 2 * warp + lane / 8 % 2;
    const unsigned int dS_lane = warpgroup * Q_PANEL + dS_row * 128 + (dS_chunk ^ lane % 8) * 16;
    unsigned int lse_ones[4], delta_ones[4];
    statistic_columns(lse_ones, 0);
    statistic_columns(delta_ones, 3);
    Ring ring;
    Ring<DS_SLOTS> slot;
    int dQ_slot = 0;
    unsigned int parity = 0;  // of the phase of K and V

    auto start_dq = [&](float (&dQ)[8][4], const Ring<DS_SLOTS>& from) {  // of the step whose dS is in slot `from`
        barrier_wait(smem.slot_full(from.stage), from.parity);
        wgmma_fence();
        issue_dq(dQ, smem.dS + from.stage * DS_BYTES, smem.K, warpgroup);
    };
    auto finish_dq = [&](float (&dQ)[8][4], const Ring<DS_SLOTS>& from) {  // to the warp that adds it
        pin(dQ);
        if (lane == 0) barrier_arrive(smem.slot_empty(from.stage));
        named_barrier_wait(DQ_EMPTY + dq_slot(dQ_slot, warpgroup), 160);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            store_shared(piece_smem + dq_slot(dQ_slot, warpgroup) * DQ_BYTES + n * 2048, __float_as_uint(dQ[n][0]),
                         __float_as_uint(dQ[n][1]), __float_as_uint(dQ[n][2]), __float_as_uint(dQ[n][3]));
        }
        fence_async_proxy();
        named_barrier_arrive(DQ_FULL + dq_slot(dQ_slot, warpgroup), 160);
        dQ_slot = (dQ_slot + 1) % DQ_SLOTS;
    };

    for_each_tile<false>(p, smem, [&](const Work& work, const Band& band, Steps steps) {
        const Sequence& sequence = work.sequence;
        const int kv_first = work.tile * TILE.cols + warpgroup * 64;
        const Elementwise elementwise{band, work.tile * TILE.cols, kv_first + warp * 16};
        float dK[D / 8][4], dV[DV / 8][4];

        auto step = [&](const bool first) {  // a constant where it is inlined
            const Stage stage{smem.Q + ring.stage * Q_BYTES, smem.dO + ring.stage * DO_BYTES,
                              smem.statistics + ring.stage * STATISTIC_BYTES};
            const int q_first = steps.tile * R;
            const Scores scores(p, sequence.index, steps.head, band.offset);
            const bool cut = band.cuts(q_first, R, kv_first, 64);

            // S^T and dP^T  [64, rows]
            float S[N][4], dP[N][4];
            if (FOLD_SLOPE && steps.first_of_head()) {
                slope_columns(lse_ones, scores.slope / scores.factor, warpgroup * 64 + warp * 16 + lane / 4);
            }
            barrier_wait(smem.Q_full(ring.stage), ring.parity);
            barrier_wait(smem.statistics_full(ring.stage), ring.parity);
            wgmma_fence();
            issue_scores(S, K_smem, stage, lse_ones);
            barrier_wait(smem.dO_full(ring.stage), ring.parity);
            issue_dp(dP, V_smem, stage, delta_ones);

            // P^T and dS^T  [64, rows]
            unsigned int P[N / 2][4], dS[N / 2][4], derivatives[N][2];
            const Dropout dropout(p, sequence.index, steps.head);
            Kept<N / 2> kept;  // random numbers, drawn while S is computed
            if constexpr (SPEC.dropout) dropout.draw_transposed(kept, q_first, kv_first + warp * 16);
            wgmma_wait<1>();
            pin(S);
            elementwise.probabilities(S, derivatives, scores, stage, q_first, cut);
            pack_all(P, S);
            pin(P);
            wgmma_wait<0>();
            pin(dP);
            elementwise.score_gradients(dP, P, derivatives, dropout, kept, stage);
            if constexpr (SPEC.dropout) drop(P, kept);
            if (first && warpgroup == 0) named_barrier_arrive(FIRST_DONE, 256);
            pack_all(dS, dP);

            // dS to shared memory  [rows, 64]
            if constexpr (WITH_DQ) {
                barrier_wait(smem.slot_empty(slot.stage), slot.parity ^ 1);
#pragma unroll
                for (int i = 0; i < R / 16; ++i) {
                    store_matrix_x4_transposed(smem.dS + slot.stage * DS_BYTES + dS_lane + i * 2048, dS[i]);
                }
                fence_async_proxy();
                __syncwarp();
                if (lane == 0) barrier_arrive(smem.slot_full(slot.stage));
            }

            // dQ of the step before, dV += P^T dO  [64, head_dim_v], dK += dS^T Q  [64, head_dim]
            float dQ[8][4];
            if (WITH_DQ && !first) {
                start_dq(dQ, slot.previous());
            } else {
                wgmma_fence();
            }
            issue_gradient(dV, P, stage.dO, !first);
            issue_gradient(dK, dS, stage.Q, !first);
            wgmma_commit();
            if (WITH_DQ && !first) {
                wgmma_wait<1>();
                finish_dq(dQ, slot.previous());
            }
            wgmma_wait<0>();
            pin(dV);
            pin(dK);
            pin(P);
            pin(dS);
            give_back(smem, ring.stage);
            ring.advance();
            slot.advance();
            steps.advance();
        };

        const int kv_row = kv_first + warp * 16;
        if (!steps.more()) {
            store_no_keys<SPEC.head_dim>(p, p.dk, p.dk_float32, work, kv_row);
            store_no_keys<SPEC.head_dim_v>(p, p.dv, p.dv_float32, work, kv_row);
            return;
        }
        barrier_wait(smem.K_full(), parity);
        barrier_wait(smem.V_full(), parity);
        parity ^= 1;
        if (warpgroup == 1) named_barrier_wait(FIRST_DONE, 256);  // out of phase from the start
        step(true);
#pragma unroll 1
        while (steps.more()) step(false);
        if constexpr (WITH_DQ) {  // of the last step
            float dQ[8][4];
            start_dq(dQ, slot.previous());
            wgmma_wait<0>();
            finish_dq(dQ, slot.previous());
        }
        if (lane == 0) barrier_arrive(smem.KV_empty());
        store_keys<SPEC.head_dim>(p, p.dk, p.dk_float32, work, kv_row, dK, p.scale);
        store_keys<SPEC.head_dim_v>(p, p.dv, p.dv_float32, work, kv_row, dV, dv_scale(p));
    });
    if constexpr (WITH_DQ) {  // no arrival is left over
        for (int i = 0; i < DQ_SLOTS; ++i) named_barrier_wait(DQ_EMPTY + dq_slot(i, warpgroup), 160);
    }
}

KERNEL(backward_hopper, 1)(ARGUMENT(Params) p, ARGUMENT(TensorMap) Q_map, ARGUMENT(TensorMap) K_map,
                           ARGUMENT(TensorMap) V_map, ARGUMENT(TensorMap) dO_map) {
    extern __shared__ __align__(1024) unsigned char smem_start[];
    const Layout smem(shared_address(smem_start));
    // Math warps, the warp of statistics and those that add dQ; all math warps share a slot.
    if (threadIdx.x == 0) smem.init(WITH_DQ ? 11 : 9, DS_SLOTS, 4 * GROUPS);
    __syncthreads();

    // The warp's number, known to be the same in all its lanes.
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
    if (warp < 4) {
        release_registers<PRODUCER_REGISTERS>();
        if (warp == 0) {
            if (threadIdx.x == 0) load(p, Q_map, K_map, V_map, dO_map, smem);
        } else if (warp == 2) {
            load_statistics(p, smem);
        } else if constexpr (WITH_DQ) {
            add_dq(p, smem, warp / 2);
        }
    } else {
        take_registers<MATH_REGISTERS>();
        differentiate_keys(p, smem, warp / 4 - 1);
    }
}

// Backward attention for sm_90a, dK and dV of wide heads, whose accumulators together would not fit one warpgroup: with
// P = e^(S - LSE), dP = dO V^T and dS = P (dP - D)
//
//   dV = P^T dO    dK = scale dS^T Q
//
// Both warpgroups work on the same TILE.cols = 64 keys. The first computes S^T and P^T and keeps dV; the second
// computes dP^T, takes P^T from the first through shared memory, and keeps dK of dS^T. They are out of phase by nature,
// so that one's elementwise stage runs under the other's products. dQ is left to backward_hopper_dq.cu; nothing is
// atomic.
#include "backward_keys.cuh"

constexpr int P_SLOTS = 2;
constexpr int P_BYTES = R * TILE.cols * 2;
static_assert(TILE.cols == 64 && TILE.warps == 12 && !SPEC.softcap);

// Where everything lies in shared memory.
struct Layout : Barriers {
    unsigned int K, V, Q, dO, P, statistics;

    __device__ __forceinline__ explicit Layout(unsigned int start)
        : K(start),
          V(K + K_BYTES),
          Q(V + V_BYTES),
          dO(Q + TILE.stages * Q_BYTES),
          P(dO + TILE.stages * DO_BYTES),
          statistics(P + P_SLOTS * P_BYTES) {
        barriers = statistics + TILE.stages * STATISTIC_BYTES;
    }
};

// Where a warpgroup is in the rings.
struct Walk {
    Ring<> ring;
    Ring<P_SLOTS> slot;
    unsigned int parity = 0;  // of the phase of K and V

    __device__ __forceinline__ Stage stage(const Layout& smem) const {
        return Stage{smem.Q + ring.stage * Q_BYTES, smem.dO + ring.stage * DO_BYTES,
                     smem.statistics + ring.stage * STATISTIC_BYTES};
    }

    __device__ __forceinline__ void advance(const Layout& smem) {
        give_back(smem, ring.stage);
        ring.advance();
        slot.advance();
    }
};

// P of this thread in a slot: the registers of step `step` of the left operand.
__device__ __forceinline__ unsigned int P_address(const Layout& smem, int slot, int step) {
    return smem.P + slot * P_BYTES + step * 2048 + threadIdx.x % 128 * 16;
}

// The first warpgroup: dV of every tile of keys.
__device__ __forceinline__ void differentiate_values(const Params& p, const Layout& smem) {
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 % 4 * 16;
    unsigned int ones[4];
    statistic_columns(ones, 0);
    Walk walk;
    for_each_tile<false>(p, smem, [&](const Work& work, const Band& band, Steps steps) {
        const int kv_first = work.tile * TILE.cols;
        const Elementwise elementwise{band, kv_first, kv_first + warp_row};
        float dV[DV / 8][4];

        auto step = [&](const bool first) {  // a constant where it is inlined
            const Stage stage = walk.stage(smem);
            const int q_first = steps.tile * R;
            const Scores scores(p, work.sequence.index, steps.head, band.offset);

            // S^T, P^T  [64, rows]
            float S[N][4];
            if (FOLD_SLOPE && steps.first_of_head()) {
                slope_columns(ones, scores.slope / scores.factor, warp_row + lane / 4);
            }
            barrier_wait(smem.Q_full(walk.ring.stage), walk.ring.parity);
            barrier_wait(smem.statistics_full(walk.ring.stage), walk.ring.parity);
            wgmma_fence();
            issue_scores(S, smem.K, stage, ones);
            Kept<N / 2> kept;  // random numbers, drawn while S is computed
            if constexpr (SPEC.dropout) {
                const Dropout dropout(p, work.sequence.index, steps.head);
                dropout.draw_transposed(kept, q_first, kv_first + warp_row);
            }
            wgmma_wait<0>();
            pin(S);
            unsigned int none[N][2];  // of softcap
            elementwise.probabilities(S, none, scores, stage, q_first, band.cuts(q_first, R, kv_first, TILE.cols));
            unsigned int P[N / 2][4];
            pack_all(P, S);

            // P^T to the other warpgroup
            barrier_wait(smem.slot_empty(walk.slot.stage), walk.slot.parity ^ 1);
#pragma unroll
            for (int i = 0; i < R / 16; ++i) {
                store_shared(P_address(smem, walk.slot.stage, i), P[i][0], P[i][1], P[i][2], P[i][3]);
            }
            barrier_arrive(smem.slot_full(walk.slot.stage));

            // dV += P^T dO  [64, head_dim_v], without what is dropped
            if constexpr (SPEC.dropout) drop(P, kept);
            barrier_wait(smem.dO_full(walk.ring.stage), walk.ring.parity);
            wgmma_fence();
            issue_gradient(dV, P, stage.dO, !first);
            wgmma_commit();
            wgmma_wait<0>();
            pin(dV);
            pin(P);
            walk.advance(smem);
            steps.advance();
        };

        if (!steps.more()) {
            store_no_keys<SPEC.head_dim_v>(p, p.dv, p.dv_float32, work, kv_first + warp_row);
            return;
        }
        barrier_wait(smem.K_full(), walk.parity);
        walk.parity ^= 1;
        step(true);
#pragma unroll 1
        while (steps.more()) step(false);
        if (lane == 0) barrier_arrive(smem.KV_empty());
        store_keys<SPEC.head_dim_v>(p, p.dv, p.dv_float32, work, kv_first + warp_row, dV, dv_scale(p));
    });
}

// The second warpgroup: dK of every tile of keys.
__device__ __forceinline__ void differentiate_keys(const Params& p, const Layout& smem) {
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 % 4 * 16;
    unsigned int ones[4];
    statistic_columns(ones, 3);
    Walk walk;
    for_each_tile<false>(p, smem, [&](const Work& work, const Band& band, Steps steps) {
        const int kv_first = work.tile * TILE.cols;
        const Elementwise elementwise{band, kv_first, kv_first + warp_row};
        float dK[D / 8][4];

        auto step = [&](const bool first) {  // a constant where it is inlined
            const Stage stage = walk.stage(smem);
            const int q_first = steps.tile * R;
            const Dropout dropout(p, work.sequence.index, steps.head);

            // dP^T  [64, rows]
            float dP[N][4];
            barrier_wait(smem.dO_full(walk.ring.stage), walk.ring.parity);
            barrier_wait(smem.statistics_full(walk.ring.stage), walk.ring.parity);
            wgmma_fence();
            issue_dp(dP, smem.V, stage, ones);
            Kept<N / 2> kept;  // random numbers, drawn while dP is computed
            if constexpr (SPEC.dropout) dropout.draw_transposed(kept, q_first, kv_first + warp_row);
            wgmma_wait<0>();
            pin(dP);

            // P^T from the other warpgroup, dS^T  [64, rows]
            unsigned int P[N / 2][4], dS[N / 2][4];
            barrier_wait(smem.slot_full(walk.slot.stage), walk.slot.parity);
#pragma unroll
            for (int i = 0; i < R / 16; ++i) load_shared(P[i], P_address(smem, walk.slot.stage, i));
            barrier_arrive(smem.slot_empty(walk.slot.stage));
            const unsigned int none[N][2] = {};  // of softcap
            elementwise.score_gradients(dP, P, none, dropout, kept, stage);
            pack_all(dS, dP);

            // dK += dS^T Q  [64, head_dim]
            barrier_wait(smem.Q_full(walk.ring.stage), walk.ring.parity);
            wgmma_fence();
            issue_gradient(dK, dS, stage.Q, !first);
            wgmma_commit();
            wgmma_wait<0>();
            pin(dK);
            pin(dS);
            walk.advance(smem);
            steps.advance();
        };

        if (!steps.more()) {
            store_no_keys<SPEC.head_dim>(p, p.dk, p.dk_float32, work, kv_first + warp_row);
            return;
        }
        barrier_wait(smem.V_full(), walk.parity);
        walk.parity ^= 1;
        step(true);
#pragma unroll 1
        while (steps.more()) step(false);
        if (lane == 0) barrier_arrive(smem.KV_empty());
        store_keys<SPEC.head_dim>(p, p.dk, p.dk_float32, work, kv_first + warp_row, dK, p.scale);
    });
}

KERNEL(backward_hopper_wide, 1)(ARGUMENT(Params) p, ARGUMENT(TensorMap) Q_map, ARGUMENT(TensorMap) K_map,
                                ARGUMENT(TensorMap) V_map, ARGUMENT(TensorMap) dO_map) {
    extern __shared__ __align__(1024) unsigned char smem_start[];
    const Layout smem(shared_address(smem_start));
    // Math warps and the warp of statistics; a slot passes from the threads of one warpgroup to those of the other.
    if (threadIdx.x == 0) smem.init(9, P_SLOTS, 128);
    __syncthreads();

    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);  // known to be the same in all lanes
    if (warp < 4) {
        release_registers<40>();
        if (threadIdx.x == 0) {
            load(p, Q_map, K_map, V_map, dO_map, smem);
        } else if (warp == 2) {
            load_statistics(p, smem);
        }
    } else {
        take_registers<232>();
        if (warp < 8) {
            differentiate_values(p, smem);
        } else {
            differentiate_keys(p, smem);
        }
    }
}

// Backward attention for sm_90a, dQ by itself: dQ = scale dS K with dS = P (dP - D), P = e^(S - LSE), dP = dO V^T.
//
// S and dP are computed again rather than passed on by backward_hopper.cu: two products more, but no workspace and no
// atomics. A thread block works on a tile of TILE.rows queries of one head and loops over tiles of TILE.cols keys.
// Warpgroup 0 produces; each other warpgroup owns 64 rows and keeps its part of S, dP and dQ in registers, where dS is
// the left operand of dQ. The product of a tile's dS with K runs under the next tile's S and dP.
#include "backward_stage.cuh"
#include "barrier.cuh"
#include "copy.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// Head dimensions in whole panels of 64 columns; columns beyond the tensors' are zeros.
constexpr int D = round_up(SPEC.head_dim, 64), DV = round_up(SPEC.head_dim_v, 64);
constexpr int GROUPS = TILE.warps / 4 - 1;                            // warpgroups that compute
constexpr int N = TILE.cols / 8;                                      // accumulator tiles across S and dP
constexpr int Q_PANEL = TILE.rows * 128, KV_PANEL = TILE.cols * 128;  // bytes of 64 columns
constexpr int Q_BYTES = D / 64 * Q_PANEL, DO_BYTES = DV / 64 * Q_PANEL;
constexpr int K_BYTES = D / 64 * KV_PANEL, V_BYTES = DV / 64 * KV_PANEL;
constexpr int V_STAGES = D > 128 ? 1 : TILE.stages;  // V is done with early in a step, K late in the next
// Whether Q and dO are left operands from registers, which halves what the products read from shared memory.
constexpr bool IN_REGISTERS = D <= 128 && TILE.cols == 64 && !SPEC.softcap && !SPEC.dropout;
static_assert(GROUPS == 2 && TILE.rows == 64 * GROUPS);

// The second warpgroup starts when the first has its first dP: out of phase, one's exponentials run under the other's
// products.
enum NamedBarrier { FIRST_DONE = 1 };

// Where everything lies in shared memory.
struct Layout {
    unsigned int Q, dO, K, V, barriers;

    __device__ __forceinline__ explicit Layout(unsigned int start)
        : Q(start), dO(Q + Q_BYTES), K(dO + DO_BYTES), V(K + TILE.stages * K_BYTES), barriers(V + V_STAGES * V_BYTES) {}

    __device__ __forceinline__ unsigned int Q_full() const { return barriers; }
    __device__ __forceinline__ unsigned int dO_full() const { return barriers + 8; }
    __device__ __forceinline__ unsigned int K_full(int stage) const { return barriers + 16 + 32 * stage; }
    __device__ __forceinline__ unsigned int K_empty(int stage) const { return barriers + 24 + 32 * stage; }
    __device__ __forceinline__ unsigned int V_full(int stage) const { return barriers + 32 + 32 * stage; }
    __device__ __forceinline__ unsigned int V_empty(int stage) const { return barriers + 40 + 32 * stage; }
};

// One thread: all copies, in the order the consumers need them.
__device__ __forceinline__ void load(const Params& p, const TensorMap& Q_map, const TensorMap& K_map,
                                     const TensorMap& V_map, const TensorMap& dO_map, const Layout& smem,
                                     const Work& work, const TileRange& tiles) {
    const Sequence& sequence = work.sequence;
    const int q_row = sequence.q_row(work.tile * TILE.rows), q_place = sequence.q_place();
    const int kv_head = work.head / p.group, kv_place = sequence.kv_place();
    Ring K_ring;
    Ring<V_STAGES> V_ring;
    for (int tile = tiles.first; tile < tiles.last; ++tile) {
        const int kv_row = sequence.kv_row(tile * TILE.cols);
        if (tile == tiles.first) {
            barrier_expect(smem.Q_full(), Q_BYTES);
            load_panels<SPEC.head_dim, Q_PANEL>(smem.Q, Q_map, smem.Q_full(), q_row, work.head, q_place, EVICT_FIRST);
        }
        const unsigned int K_full = smem.K_full(K_ring.stage), V_full = smem.V_full(V_ring.stage);
        barrier_wait(smem.K_empty(K_ring.stage), K_ring.parity ^ 1);
        barrier_expect(K_full, K_BYTES);
        load_panels<SPEC.head_dim, KV_PANEL>(smem.K + K_ring.stage * K_BYTES, K_map, K_full, kv_row, kv_head, kv_place,
                                             EVICT_LAST);
        if (tile == tiles.first) {
            barrier_expect(smem.dO_full(), DO_BYTES);
            load_panels<SPEC.head_dim_v, Q_PANEL>(smem.dO, dO_map, smem.dO_full(), q_row, work.head, q_place,
                                                  EVICT_FIRST);
        }
        barrier_wait(smem.V_empty(V_ring.stage), V_ring.parity ^ 1);
        barrier_expect(V_full, V_BYTES);
        load_panels<SPEC.head_dim_v, KV_PANEL>(smem.V + V_ring.stage * V_BYTES, V_map, V_full, kv_row, kv_head,
                                               kv_place, EVICT_LAST);
        K_ring.advance();
        V_ring.advance();
    }
}

// A left operand [64, 16 STEPS] of a tile of queries: registers, or where it lies in shared memory.
template <int STEPS>
struct LeftOperand {
    unsigned int smem;
    unsigned int frag[IN_REGISTERS ? STEPS : 1][4];

    __device__ __forceinline__ void load(unsigned int A_smem) {
        smem = A_smem;
        if constexpr (IN_REGISTERS) {
            const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16, half = threadIdx.x % 32 / 16;
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                const int chunk = (step % 4 * 2 + half) ^ row % 8;
                load_matrix_x4(frag[step], A_smem + step / 4 * Q_PANEL + row * 128 + chunk * 16);
            }
        }
    }
};

// X = A B^T  [64, cols], B [cols, 16 STEPS] of a tile of keys, asynchronous.
template <int STEPS>
__device__ __forceinline__ void issue_product(float (&X)[N][4], LeftOperand<STEPS>& left, unsigned int B_smem) {
    const unsigned long long A = tile_descriptor(left.smem, 16), B = tile_descriptor(B_smem, 16);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int in_panel = step % 4 * 2;  // 32 bytes
        const unsigned long long B_step = B + step / 4 * (KV_PANEL / 16) + in_panel;
        if constexpr (IN_REGISTERS) {
            wgmma_rs<K_MAJOR>(X, left.frag[step], B_step, step > 0);
        } else {
            wgmma_ss<K_MAJOR>(X, A + step / 4 * (Q_PANEL / 16) + in_panel, B_step, step > 0);
        }
    }
}

// dQ += dS K  [64, head_dim], asynchronous.
__device__ __forceinline__ void issue_dq(float (&dQ)[D / 8][4], unsigned int (&dS)[N / 2][4], unsigned int K_smem,
                                         bool add) {
    const unsigned long long K = tile_descriptor(K_smem, KV_PANEL);
#pragma unroll
    for (int step = 0; step < TILE.cols / 16; ++step) wgmma_rs<MN_MAJOR>(dQ, dS[step], K + step * 128, add || step > 0);
    wgmma_commit();
}

// One warpgroup: dQ of 64 rows.
__device__ __forceinline__ void differentiate_queries(const Params& p, const Layout& smem, const Work& work,
                                                      const Band& band, const TileRange& tiles, int warpgroup) {
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 % 4 * 16, head = work.head;
    const Sequence& sequence = work.sequence;
    const int q_first = work.tile * TILE.rows + warpgroup * 64;
    const int rows = sequence.q_len - q_first - warp_row;  // that exist, of this warp's 16 and those below
    const long long row = sequence.q_start + q_first + warp_row;

    float dQ[D / 8][4];
    if (tiles.first < tiles.last) {
        const Scores scores(p, sequence.index, head, band.offset);
        const Dropout dropout(p, sequence.index, head);
        float reference[2], delta[2];  // of this lane's rows
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = lane / 4 + 8 * half;
            const bool inside = i < rows;
            reference[half] = inside ? exponent_reference(statistic_rows(p.lse, sequence.batch, row, head)[i]) : 0.0f;
            delta[half] = inside ? statistic_rows(p.delta, sequence.batch, row, head)[i] : 0.0f;
        }
        LeftOperand<D / 16> Q;
        LeftOperand<DV / 16> dO;
        barrier_wait(smem.Q_full(), 0);
        Q.load(smem.Q + warpgroup * 64 * 128);
        barrier_wait(smem.dO_full(), 0);
        dO.load(smem.dO + warpgroup * 64 * 128);
        if (warpgroup > 0) named_barrier_wait(FIRST_DONE, 128 * GROUPS);

        Ring K_ring;
        Ring<V_STAGES> V_ring;
        auto step = [&](int tile, const bool first) {  // `first` is a constant where this is inlined
            const int kv_first = tile * TILE.cols;
            const unsigned int K_smem = smem.K + K_ring.stage * K_BYTES;

            // S = Q K^T and dP = dO V^T  [64, cols]
            float S[N][4], dP[N][4];
            barrier_wait(smem.K_full(K_ring.stage), K_ring.parity);
            wgmma_fence();
            issue_product(S, Q, K_smem);
            barrier_wait(smem.V_full(V_ring.stage), V_ring.parity);
            issue_product(dP, dO, smem.V + V_ring.stage * V_BYTES);
            wgmma_commit();
            Kept<N / 2> kept;
            if constexpr (SPEC.dropout) dropout.draw(kept, q_first + warp_row, kv_first);
            wgmma_wait<0>();
            pin(S);
            pin(dP);
            if (first && warpgroup == 0) named_barrier_arrive(FIRST_DONE, 128 * GROUPS);
            if (lane == 0) barrier_arrive(smem.V_empty(V_ring.stage));
            V_ring.advance();

            // dS  [64, cols]
            const bool cut = band.cuts(q_first, 64, kv_first, TILE.cols);
            const float distance = scores.distance(q_first + warp_row + lane / 4, kv_first + lane % 4 * 2);
            if constexpr (SPEC.softcap) tanh_of_tile<false>(S, scores.factor, scores.cap);
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int q_index = q_first + warp_row + lane / 4 + r / 2 * 8;
                    const int kv_index = kv_first + 8 * n + lane % 4 * 2 + r % 2;
                    differentiate<true>(S[n][r], dP[n][r], scores, band, false, q_index, kv_index,
                                        distance + (r / 2 * 8 - 8 * n - r % 2), reference[r / 2], delta[r / 2],
                                        dropout.factor(kept, n, r));
                }
            }
            if (cut) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int q_index = q_first + warp_row + lane / 4 + r / 2 * 8;
                        const int kv_index = kv_first + 8 * n + lane % 4 * 2 + r % 2;
                        if (!band.allows(q_index, kv_index)) dP[n][r] = 0.0f;
                    }
                }
            }
            unsigned int dS[N / 2][4];
            pack_all(dS, dP);

            // dQ += dS K  [64, head_dim]
            wgmma_fence();
            issue_dq(dQ, dS, K_smem, !first);
            wgmma_wait<0>();
            pin(dQ);
            pin(dS);
            if (lane == 0) barrier_arrive(smem.K_empty(K_ring.stage));
            K_ring.advance();
        };
        step(tiles.first, true);
#pragma unroll 1
        for (int tile = tiles.first + 1; tile < tiles.last; ++tile) step(tile, false);
    } else {
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
            for (int r = 0; r < 4; ++r) dQ[n][r] = 0.0f;
        }
    }
    store_gradient<SPEC.head_dim>(p.dq, p.dq_float32, sequence.batch, row, head, rows, 0, dQ, p.scale, p.accumulate);
}

KERNEL(backward_hopper_dq, 1)(ARGUMENT(Params) p, ARGUMENT(TensorMap) Q_map, ARGUMENT(TensorMap) K_map,
                              ARGUMENT(TensorMap) V_map, ARGUMENT(TensorMap) dO_map) {
    extern __shared__ __align__(1024) unsigned char smem_start[];
    const Layout smem(shared_address(smem_start));
    if (threadIdx.x == 0) {
        barrier_init(smem.Q_full(), 1);
        barrier_init(smem.dO_full(), 1);
        for (int stage = 0; stage < TILE.stages; ++stage) {
            barrier_init(smem.K_full(stage), 1);
            barrier_init(smem.K_empty(stage), 4 * GROUPS);
            barrier_init(smem.V_full(stage), 1);
            barrier_init(smem.V_empty(stage), 4 * GROUPS);
        }
        fence_barrier_init();
    }
    __syncthreads();

    const Work work = find_work<TILE.rows, false>(p, blockIdx.x, p.q_tiles, p.heads);
    if (!work.exists) return;
    const Band band(p, work.sequence);
    const int q_first = work.tile * TILE.rows;
    const TileRange tiles = band.kv_tiles(q_first, min(q_first + TILE.rows, work.sequence.q_len) - 1);
    const int warpgroup = threadIdx.x / 128;
    if (warpgroup == 0) {
        release_registers<24>();
        if (threadIdx.x == 0) load(p, Q_map, K_map, V_map, dO_map, smem, work, tiles);
    } else {
        take_registers<240>();
        differentiate_queries(p, smem, work, band, tiles, warpgroup - 1);
    }
}

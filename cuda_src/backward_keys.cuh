// What the Hopper kernels of dK and dV share. A thread block keeps a tile of TILE.cols keys of one kv head and steps
// over the tiles of TILE.rows queries of the heads of its group; everything is transposed, [keys, queries], so that P^T
// and dS^T are accumulators that become the left operands of dV and dK without leaving registers. Then it goes on to
// the next tile of keys that nobody has taken: Q and dO pass through one ring all the while.
//
// A kernel's Layout, derived from Barriers, says where its tiles lie in shared memory.
#pragma once
#include "backward_stage.cuh"
#include "barrier.cuh"
#include "copy.cuh"
#include "list.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// Head dimensions in whole panels of 64 columns; columns beyond the tensors' are zeros.
constexpr int D = round_up(SPEC.head_dim, 64), DV = round_up(SPEC.head_dim_v, 64);
constexpr int R = TILE.rows;                                  // queries a step
constexpr int N = R / 8;                                      // accumulator tiles across S^T and dP^T
constexpr int Q_PANEL = R * 128, KV_PANEL = TILE.cols * 128;  // bytes of 64 columns
constexpr int K_BYTES = D / 64 * KV_PANEL, V_BYTES = DV / 64 * KV_PANEL;
constexpr int Q_BYTES = D / 64 * Q_PANEL, DO_BYTES = DV / 64 * Q_PANEL;
constexpr int STATISTIC_BYTES = R * 16;

// Whether the products subtract LSE and D: one step more of their contraction, of ones and of the statistics in three
// bfloat16 terms, gives S - LSE / scale and dP - D. float16 has not the range.
//
// ALiBi joins them. Of -slope |distance| the part of the query stands with its LSE; the part of the key, which has the
// other sign, is another three terms, times one. That takes all keys of a step for keys behind their query, or all for
// keys ahead; where the diagonal crosses the step, the keys ahead are made up for. (Not packed, where it would spill.)
constexpr bool FOLD = !SPEC.softcap && !SPEC.dropout && !(SPEC.alibi && SPEC.packed) && SPEC.dtype == Dtype::bfloat16;
constexpr bool FOLD_SLOPE = FOLD && SPEC.alibi;
// A stage is given back by a lane of each math warp where only products read it, by every thread where all read LSE and
// D.
constexpr int EMPTY_ARRIVALS = FOLD ? 8 : 256;
constexpr float NEVER = 1e30f;  // as the LSE of a row outside the sequence: P = 0

// Deterministic sums of dQ take the tiles of keys in order. Tiles of queries from the last to the first then suit a
// causal mask: thread blocks that start one after the other stay one after the other, and nobody waits.
constexpr bool DESCENDING = SPEC.deterministic;

// The steps of a tile of keys: the tiles of queries that may attend to it, of every head of its group.
struct Steps {
    TileRange tiles;
    int head, last_head;  // query heads
    int tile;

    __device__ __forceinline__ Steps(const Work& work, const Band& band, int group)
        : tiles(band.q_tiles(work.tile * TILE.cols, min((work.tile + 1) * TILE.cols, band.kv_len) - 1)),
          head(work.head * group),
          last_head(tiles.first < tiles.last ? head + group : head),
          tile(DESCENDING ? tiles.last - 1 : tiles.first) {}

    __device__ __forceinline__ bool more() const { return head < last_head; }
    __device__ __forceinline__ bool first_of_head() const {
        return tile == (DESCENDING ? tiles.last - 1 : tiles.first);
    }
    __device__ __forceinline__ void advance() {
        if (tile == (DESCENDING ? tiles.first : tiles.last - 1)) {
            tile = DESCENDING ? tiles.last - 1 : tiles.first;
            ++head;
        } else {
            tile += DESCENDING ? -1 : 1;
        }
    }
};

// The barriers that both kernels have: of K and V, of the number of the next tile of keys, of what each kernel passes
// between its warpgroups (up to three slots), and of the ring of Q, dO and their statistics.
struct Barriers {
    unsigned int barriers;

    __device__ __forceinline__ unsigned int K_full() const { return barriers; }
    __device__ __forceinline__ unsigned int V_full() const { return barriers + 8; }
    __device__ __forceinline__ unsigned int KV_empty() const { return barriers + 16; }
    __device__ __forceinline__ unsigned int next_full() const { return barriers + 24; }
    __device__ __forceinline__ unsigned int next_empty() const { return barriers + 32; }
    __device__ __forceinline__ unsigned int next() const { return barriers + 40; }
    __device__ __forceinline__ unsigned int slot_full(int slot) const { return barriers + 48 + 16 * slot; }
    __device__ __forceinline__ unsigned int slot_empty(int slot) const { return barriers + 56 + 16 * slot; }
    __device__ __forceinline__ unsigned int Q_full(int stage) const { return barriers + 96 + 32 * stage; }
    __device__ __forceinline__ unsigned int dO_full(int stage) const { return barriers + 104 + 32 * stage; }
    __device__ __forceinline__ unsigned int statistics_full(int stage) const { return barriers + 112 + 32 * stage; }
    __device__ __forceinline__ unsigned int empty(int stage) const { return barriers + 120 + 32 * stage; }

    // One thread; `walkers` warps take the number of the next tile, `slot_arrivals` arrivals fill or empty a slot.
    __device__ __forceinline__ void init(int walkers, int slots, int slot_arrivals) const {
        barrier_init(K_full(), 1);
        barrier_init(V_full(), 1);
        barrier_init(KV_empty(), 8);
        barrier_init(next_full(), 1);
        barrier_init(next_empty(), walkers);
        for (int slot = 0; slot < slots; ++slot) {
            barrier_init(slot_full(slot), slot_arrivals);
            barrier_init(slot_empty(slot), slot_arrivals);
        }
        for (int stage = 0; stage < TILE.stages; ++stage) {
            barrier_init(Q_full(stage), 1);
            barrier_init(dO_full(stage), 1);
            barrier_init(statistics_full(stage), 32);
            barrier_init(empty(stage), EMPTY_ARRIVALS);
        }
        fence_barrier_init();
    }
};

// The number of this thread block's next tile of keys: the loading thread (LEADER) takes it from a counter and tells
// the other warps. The first tile is that of the block's own number, except where tiles wait for each other
// (deterministic sums): there the first number is taken too, so that all tiles before a taken one are being worked on
// by blocks that run, however few of the grid do.
constexpr bool TAKES_FIRST = SPEC.deterministic;

template <bool LEADER>
__device__ __forceinline__ int next_tile(const Params& p, const Barriers& smem, unsigned int& parity) {
    int number;
    if constexpr (LEADER) {
        number = (TAKES_FIRST ? 0 : gridDim.x) + atomicAdd(p.tickets, 1);
        barrier_wait(smem.next_empty(), parity ^ 1);
        store_shared_word(smem.next(), number);
        barrier_arrive(smem.next_full());
    } else {
        barrier_wait(smem.next_full(), parity);
        const bool leader = threadIdx.x % 32 == 0;
        number = __shfl_sync(0xFFFFFFFF, leader ? load_shared_word(smem.next()) : 0, 0);
        if (leader) barrier_arrive(smem.next_empty());
    }
    parity ^= 1;
    return number;
}

// The tiles of keys of this thread block, visit(work, band, steps).
template <bool LEADER, typename Visit>
__device__ __forceinline__ void for_each_tile(const Params& p, const Barriers& smem, Visit visit) {
    const int kv_heads = p.heads / p.group, blocks = p.kv_tiles * kv_heads * p.batch;
    if constexpr (SPEC.packed) {
        for_each_listed<LEADER, !LEADER>(p, Mail{smem.next_full(), smem.next_empty(), smem.next()}, kv_heads,
                                         [&](const Work& work, Tickets& tickets) {
                                             Band band(p, work.sequence);
                                             const Steps steps(work, band, p.group);
                                             band.q_len = RAGGED;  // rows beyond have P = 0 by their LSE
                                             visit(work, band, steps);
                                             if constexpr (LEADER) tickets.take();
                                         });
        return;
    }
    unsigned int parity = 0;
    int block = TAKES_FIRST ? next_tile<LEADER>(p, smem, parity) : blockIdx.x;
#pragma unroll 1
    while (block < blocks) {
        const Work work = find_work<TILE.cols, true>(p, block, p.kv_tiles, kv_heads);
        const Band band(p, work.sequence);
        visit(work, band, Steps(work, band, p.group));
        block = next_tile<LEADER>(p, smem, parity);
    }
}

// One thread: the copies of K and V for every tile, of Q and dO for every step. The first Q comes before V, which is
// needed later; not where tasks are listed, which leaves no registers for that.
template <typename Layout>
__device__ __forceinline__ void load(const Params& p, const TensorMap& Q_map, const TensorMap& K_map,
                                     const TensorMap& V_map, const TensorMap& dO_map, const Layout& smem) {
    Ring ring;
    unsigned int parity = 0;  // of the phase of K and V
    for_each_tile<true>(p, smem, [&](const Work& work, const Band& band, Steps steps) {
        const Sequence& sequence = work.sequence;
        const int kv_row = sequence.kv_row(work.tile * TILE.cols), kv_place = sequence.kv_place();
        auto load_K = [&] {
            barrier_wait(smem.KV_empty(), parity ^ 1);
            barrier_expect(smem.K_full(), K_BYTES);
            load_panels<SPEC.head_dim, KV_PANEL>(smem.K, K_map, smem.K_full(), kv_row, work.head, kv_place,
                                                 EVICT_FIRST);
        };
        auto load_V = [&] {
            barrier_expect(smem.V_full(), V_BYTES);
            load_panels<SPEC.head_dim_v, KV_PANEL>(smem.V, V_map, smem.V_full(), kv_row, work.head, kv_place,
                                                   EVICT_FIRST);
            parity ^= 1;
        };
        if (SPEC.packed && steps.more()) {
            load_K();
            load_V();
        }
        for (bool first = !SPEC.packed; steps.more(); steps.advance(), first = false) {
            const int stage = ring.stage, q_row = sequence.q_row(steps.tile * R), q_place = sequence.q_place();
            if (first) load_K();
            barrier_wait(smem.empty(stage), ring.parity ^ 1);
            barrier_expect(smem.Q_full(stage), Q_BYTES);
            load_panels<SPEC.head_dim, Q_PANEL>(smem.Q + stage * Q_BYTES, Q_map, smem.Q_full(stage), q_row, steps.head,
                                                q_place, EVICT_LAST);
            if (first) load_V();
            barrier_expect(smem.dO_full(stage), DO_BYTES);
            load_panels<SPEC.head_dim_v, Q_PANEL>(smem.dO + stage * DO_BYTES, dO_map, smem.dO_full(stage), q_row,
                                                  steps.head, q_place, EVICT_LAST);
            ring.advance();
        }
    });
}

// x = hi + mid + lo to 24 bits, each a bfloat16.
__device__ __forceinline__ void split(float x, float (&term)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        term[i] = __bfloat162float(__float2bfloat16_rn(x));
        x = i == 0 && isinf(x) ? 0.0f : x - term[i];
    }
}

// Whether no query of a step is behind a key of the tile, where the first query is `behind` the first key.
__device__ __forceinline__ bool all_ahead(int behind) { return behind + R - 1 <= 0; }

// One warp: LSE and D of every step's rows, as the math warpgroups take them.
template <typename Layout>
__device__ __forceinline__ void load_statistics(const Params& p, const Layout& smem) {
    const int lane = threadIdx.x % 32;
    Ring ring;
    for_each_tile<false>(p, smem, [&](const Work& work, const Band& band, Steps steps) {
        const Sequence& sequence = work.sequence;
        for (; steps.more(); steps.advance()) {
            const int q_first = steps.tile * R, rows = sequence.q_len - q_first;
            const float* lse_gmem = statistic_rows(p.lse, sequence.batch, sequence.q_start + q_first, steps.head);
            const float* delta_gmem = statistic_rows(p.delta, sequence.batch, sequence.q_start + q_first, steps.head);
            float lse[R / 32], delta[R / 32];
#pragma unroll
            for (int i = 0; i < R / 32; ++i) {
                const int row = lane + 32 * i;
                lse[i] = row < rows ? lse_gmem[row] : MINUS_INFINITY;
                delta[i] = row < rows ? delta_gmem[row] : 0.0f;
            }
            unsigned int side = 0;  // with ALiBi: 1 for a step of keys behind their queries, else -1, twice
            if constexpr (FOLD_SLOPE) {
                const int behind = q_first + band.offset - work.tile * TILE.cols;  // the first query the first key
                const float sign = all_ahead(behind) ? -1.0f : 1.0f;
                const float slope = sign * (1.0f / UNIT) * Scores(p, sequence.index, steps.head, 0).slope;
#pragma unroll
                for (int i = 0; i < R / 32; ++i) lse[i] += slope * (behind + lane + 32 * i);
                side = pack(sign, sign);
            }
            barrier_wait(smem.empty(ring.stage), ring.parity ^ 1);
#pragma unroll
            for (int i = 0; i < R / 32; ++i) {
                const unsigned int row_smem = smem.statistics + ring.stage * STATISTIC_BYTES + (lane + 32 * i) * 16;
                const float reference = lse[i] == MINUS_INFINITY ? NEVER : lse[i];  // a row that attends to nothing
                if constexpr (FOLD) {
                    float s[3], d[3];
                    // (Two ways, as ptxas spills with the second where there is ALiBi, and with the first elsewhere.)
                    split(FOLD_SLOPE ? -reference * reciprocal_approximate(p.scale) : -reference / p.scale, s);
                    split(-delta[i], d);
                    store_shared(row_smem, pack(s[0], s[1]), pack(s[2], d[0]), pack(d[1], d[2]), side);
                } else {
                    store_shared(row_smem, __float_as_uint(reference * UNIT), __float_as_uint(delta[i]), 0u, 0u);
                }
            }
            fence_async_proxy();
            barrier_arrive(smem.statistics_full(ring.stage));
            ring.advance();
        }
    });
}

// A math warp is done with a stage.
__device__ __forceinline__ void give_back(const Barriers& smem, int stage) {
    if (!FOLD || threadIdx.x % 32 == 0) barrier_arrive(smem.empty(stage));
}

// A step's operands: addresses in shared memory.
struct Stage {
    unsigned int Q, dO, statistics;
};

// The left operand [64, 16] that adds a statistic: ones in the columns `first` to `first` + 2 of its three terms.
// Opaque to the compiler, which would make the constants anew for every product.
__device__ __forceinline__ void statistic_columns(unsigned int (&ones)[4], int first) {
    const int col = threadIdx.x % 4 * 2;
    const unsigned int low = col >= first && col < first + 3 ? 0x3F80 : 0;
    const unsigned int high = col + 1 >= first && col + 1 < first + 3 ? 0x3F800000 : 0;
    ones[0] = ones[1] = low | high;
    ones[2] = ones[3] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(ones[i]));
}

// ALiBi in that operand: columns 6, 7 and 14, to which the statistics give the side, hold the slope, in the units of S,
// times the key's place in the tile, in three terms. `kv_row` is the place of the lane's first key.
__device__ __forceinline__ void slope_columns(unsigned int (&ones)[4], float slope, int kv_row) {
    if (threadIdx.x % 4 != 3) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float term[3];
        split(slope * (kv_row + 8 * half), term);
        ones[half] = pack(term[0], term[1]);
        ones[2 + half] = pack(term[2], 0.0f);
    }
}

// X = A B^T  [64, rows], A [64, 16 STEPS] of a tile of keys and B [rows, 16 STEPS] of queries, asynchronous; with FOLD
// minus the statistic in the columns of `ones`.
template <int STEPS>
__device__ __forceinline__ void issue_nt(float (&X)[N][4], unsigned int A_smem, unsigned int B_smem,
                                         unsigned int statistics_smem, const unsigned int (&ones)[4]) {
    const unsigned long long A = tile_descriptor(A_smem, 16), B = tile_descriptor(B_smem, 16);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int in_panel = step % 4 * 2;  // 32 bytes
        wgmma_ss<K_MAJOR>(X, A + step / 4 * (KV_PANEL / 16) + in_panel, B + step / 4 * (Q_PANEL / 16) + in_panel,
                          step > 0);
    }
    if constexpr (FOLD) wgmma_rs<K_MAJOR>(X, ones, narrow_descriptor(statistics_smem), true);
    wgmma_commit();
}

// S^T = K Q^T and dP^T = V dO^T  [64, rows], asynchronous; with FOLD minus LSE / scale and D.
__device__ __forceinline__ void issue_scores(float (&S)[N][4], unsigned int K_smem, const Stage& stage,
                                             const unsigned int (&ones)[4]) {
    issue_nt<D / 16>(S, K_smem, stage.Q, stage.statistics, ones);
}

__device__ __forceinline__ void issue_dp(float (&dP)[N][4], unsigned int V_smem, const Stage& stage,
                                         const unsigned int (&ones)[4]) {
    issue_nt<DV / 16>(dP, V_smem, stage.dO, stage.statistics, ones);
}

// X += A B  [64, 8 TILES], A [64, rows] in registers and B [rows, 8 TILES] in shared memory, asynchronous.
template <int TILES>
__device__ __forceinline__ void issue_gradient(float (&X)[TILES][4], unsigned int (&A)[N / 2][4], unsigned int B_smem,
                                               bool add) {
    const unsigned long long B = tile_descriptor(B_smem, Q_PANEL);
#pragma unroll
    for (int step = 0; step < R / 16; ++step) wgmma_rs<MN_MAJOR>(X, A[step], B + step * 128, add || step > 0);
}

// The elementwise stage of one warpgroup.
struct Elementwise {
    const Band& band;
    int tile_kv;  // the first key of the tile
    int warp_kv;  // and of this warp

    // LSE and D of this lane's two columns of accumulator tile n, in turn.
    __device__ __forceinline__ static float4 statistics(const Stage& stage, int n) {
        const unsigned int row_smem = stage.statistics + (8 * n + threadIdx.x % 4 * 2) * 16;
        const float2 even = load_shared_pair(row_smem), odd = load_shared_pair(row_smem + 16);
        return make_float4(even.x, even.y, odd.x, odd.y);
    }

    __device__ __forceinline__ int q_index(int q_first, int n, int r) const {
        return q_first + 8 * n + threadIdx.x % 4 * 2 + r % 2;
    }

    __device__ __forceinline__ int kv_index(int r) const { return warp_kv + threadIdx.x % 32 / 4 + r / 2 * 8; }

    // Whether keys of this warp are ahead of their query in a step that counts as behind.
    __device__ __forceinline__ bool crossed(int q_first) const {
        return !all_ahead(q_first + band.offset - tile_kv) && q_first + band.offset < warp_kv + 15;
    }

    // S becomes P. With softcap its derivatives, 1 - tanh^2, are packed too.
    __device__ __forceinline__ void probabilities(float (&S)[N][4], unsigned int (&derivatives)[N][2],
                                                  const Scores& scores, const Stage& stage, int q_first,
                                                  bool cut) const {
        if constexpr (SPEC.softcap) tanh_of_tile<false>(S, scores.factor, scores.cap);
        const float distance = scores.distance(q_index(q_first, 0, 0), kv_index(0));
        if (FOLD_SLOPE && crossed(q_first)) mirror_slope<1>(S, scores.slope / scores.factor, distance);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float4 reference;
            if constexpr (!FOLD) reference = statistics(stage, n);
            float derivative[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                if constexpr (FOLD) {
                    S[n][r] = exp2_approximate(S[n][r] * scores.factor);
                } else {
                    const float further = 8 * n + r % 2 - r / 2 * 8;
                    const float exponent = scores.exponent<true>(S[n][r], distance + further, derivative[r]);
                    S[n][r] = exponential(exponent - (r % 2 ? reference.z : reference.x));
                }
            }
            if constexpr (SPEC.softcap) {
                derivatives[n][0] = pack_half(derivative[0], derivative[1]);
                derivatives[n][1] = pack_half(derivative[2], derivative[3]);
            }
        }
        if (cut) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    if (!band.allows(q_index(q_first, n, r), kv_index(r))) S[n][r] = 0.0f;
                }
            }
        }
    }

    // dP becomes dS = P (dP - D), with P as it was rounded for dV, times the derivative of softcap. Elements that are
    // dropped have no dP.
    __device__ __forceinline__ void score_gradients(float (&dP)[N][4], const unsigned int (&P)[N / 2][4],
                                                    const unsigned int (&derivatives)[N][2], const Dropout& dropout,
                                                    const Kept<N / 2>& kept, const Stage& stage) const {
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float4 reference;
            if constexpr (!FOLD) reference = statistics(stage, n);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 pair = unpack(P[n / 2][n % 2 * 2 + half]);
                float2 derivative;
                if constexpr (SPEC.softcap) derivative = unpack_half(derivatives[n][half]);
#pragma unroll
                for (int u = 0; u < 2; ++u) {
                    float& x = dP[n][2 * half + u];
                    if constexpr (SPEC.dropout) x *= dropout.factor(kept, n, 2 * half + u);
                    if constexpr (!FOLD) x -= u ? reference.w : reference.y;
                    x *= u ? pair.y : pair.x;
                    if constexpr (SPEC.softcap) x *= u ? derivative.y : derivative.x;
                }
            }
        }
    }
};

// Dropped elements of P become 0; the others are multiplied by p.dropout_scale in dV.
__device__ __forceinline__ void drop(unsigned int (&P)[N / 2][4], const Kept<N / 2>& kept) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) P[n / 2][n % 2 * 2 + half] &= kept.packed_mask(n, half);
    }
}

__device__ __forceinline__ float dv_scale(const Params& p) { return SPEC.dropout ? p.dropout_scale : 1.0f; }

// dK or dV of one warp's 16 keys from `kv_row` on, zero where no query attends to them.
template <int DIM, int TILES>
__device__ __forceinline__ void store_keys(const Params& p, const Tensor& tensor, bool is_float32, const Work& work,
                                           int kv_row, const float (&X)[TILES][4], float scale) {
    store_gradient<DIM>(tensor, is_float32, work.sequence.batch, work.sequence.kv_start + kv_row, work.head,
                        work.sequence.kv_len - kv_row, 0, X, scale, p.accumulate);
}

template <int DIM>
__device__ __forceinline__ void store_no_keys(const Params& p, const Tensor& tensor, bool is_float32, const Work& work,
                                              int kv_row) {
    if (p.accumulate) return;
    const int rows = min(16, work.sequence.kv_len - kv_row);
    const long long first = work.sequence.batch * tensor.batch_stride +
                            (work.sequence.kv_start + kv_row) * tensor.row_stride + work.head * tensor.head_stride;
#pragma unroll 1  // rare, and unrolled it would be long to compile
    for (int i = threadIdx.x % 32; i < rows * DIM; i += 32) {
        const long long offset = first + i / DIM * tensor.row_stride + i % DIM;
        if (is_float32) {
            static_cast<float*>(tensor.data)[offset] = 0.0f;
        } else {
            from_float(static_cast<Element*>(tensor.data)[offset], 0.0f);
        }
    }
}

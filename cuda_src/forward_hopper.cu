// Forward attention for sm_90a with TMA and wgmma: O = softmax(S) V, S = scale Q K^T, and LSE, by online softmax.
//
// A thread block works on tiles of TILE.rows queries of one head. Warpgroup 0 produces: one thread issues the copies of
// Q, K and V tiles. Each other warpgroup owns 64 rows and keeps its part of S, P and O in registers. Within a
// warpgroup the products of the next scores S_j = Q K_j^T and of O += P_{j-1} V_{j-1} run while the softmax of S_j
// waits for the first of them alone; between warpgroups one's softmax runs under the other's products.
#include "barrier.cuh"
#include "copy.cuh"
#include "dropout.cuh"
#include "mask.cuh"
#include "scores.cuh"
#include "softmax.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

// Head dimensions in whole panels of 64 columns; columns beyond the tensors' are zeros.
constexpr int D = round_up(SPEC.head_dim, 64), DV = round_up(SPEC.head_dim_v, 64);
constexpr int GROUPS = TILE.warps / 4 - 1;                            // warpgroups that compute
constexpr int N = TILE.cols / 8;                                      // accumulator tiles across S
constexpr int N_OUT = DV / 8;                                         // and across O
constexpr int Q_PANEL = TILE.rows * 128, KV_PANEL = TILE.cols * 128;  // bytes of 64 columns
constexpr int Q_BYTES = D / 64 * Q_PANEL, K_BYTES = D / 64 * KV_PANEL, V_BYTES = DV / 64 * KV_PANEL;
constexpr int PRODUCER_REGISTERS = GROUPS == 3 ? 32 : 24, MATH_REGISTERS = GROUPS == 3 ? 160 : 240;
static_assert(!SPEC.dropout || TILE.p_sets == 1);
static_assert(TILE.rows == 64 * GROUPS && TILE.cols % 16 == 0);

// Without softcap and ALiBi S stays as the product gives it, and the scale joins the subtraction of the maximum.
constexpr bool RAW_SCORES = !SPEC.softcap && !SPEC.alibi;
constexpr bool LONG_SCORE_STAGE = !RAW_SCORES || SPEC.dropout;  // which needs registers of its own
// How far (in log2) scores may grow past m before m follows: P stays below 2^8.
constexpr float RESCALE_THRESHOLD = 8.0f;
// The largest sum of a lane's part of a row of P for which P counts as in range (also of float16).
constexpr float LARGEST_SUM = 4096.0f;

// Where everything lies in shared memory.
struct Layout {
    unsigned int Q, K, V, barriers;

    __device__ __forceinline__ explicit Layout(unsigned int start)
        : Q(start), K(Q + Q_BYTES), V(K + TILE.stages * K_BYTES), barriers(V + TILE.stages * V_BYTES) {}

    __device__ __forceinline__ unsigned int Q_full() const { return barriers; }
    __device__ __forceinline__ unsigned int Q_empty() const { return barriers + 8; }
    __device__ __forceinline__ unsigned int K_full(int stage) const { return barriers + 16 + 32 * stage; }
    __device__ __forceinline__ unsigned int K_empty(int stage) const { return barriers + 24 + 32 * stage; }
    __device__ __forceinline__ unsigned int V_full(int stage) const { return barriers + 32 + 32 * stage; }
    __device__ __forceinline__ unsigned int V_empty(int stage) const { return barriers + 40 + 32 * stage; }
};

__device__ __forceinline__ TileRange tiles_of_work(const Band& band, int q_first, int q_len) {
    return band.kv_tiles(q_first, min(q_first + TILE.rows, q_len) - 1);
}

// One thread: the copies of all work, in the order the consumers need them.
__device__ __forceinline__ void produce(const Params& p, const TensorMap& Q_map, const TensorMap& K_map,
                                        const TensorMap& V_map, const Layout& smem, int blocks) {
    Ring ring;
    unsigned int q_parity = 0;
    for (int round = 0; round < ceil_div(blocks, gridDim.x); ++round) {
        const int block = work_of_round(round);
        if (block >= blocks) break;
        const Work work = find_work<TILE.rows, false>(p, block, p.q_tiles, p.heads);
        const int q_first = work.tile * TILE.rows, kv_head = work.head / p.group, batch = work.sequence.batch;
        const TileRange tiles = tiles_of_work(Band(p, work.sequence), q_first, work.sequence.q_len);
        if (tiles.first == tiles.last) continue;

        barrier_wait(smem.Q_empty(), q_parity ^ 1);
        barrier_expect(smem.Q_full(), Q_BYTES);
        load_panels<SPEC.head_dim, Q_PANEL>(smem.Q, Q_map, smem.Q_full(), q_first, work.head, batch, EVICT_FIRST);
        q_parity ^= 1;
        for (int tile = tiles.first; tile < tiles.last; ++tile) {
            const int stage = ring.stage, kv_first = tile * TILE.cols;
            barrier_wait(smem.K_empty(stage), ring.parity ^ 1);
            barrier_expect(smem.K_full(stage), K_BYTES);
            load_panels<SPEC.head_dim, KV_PANEL>(smem.K + stage * K_BYTES, K_map, smem.K_full(stage), kv_first, kv_head,
                                                 batch, EVICT_LAST);
            barrier_wait(smem.V_empty(stage), ring.parity ^ 1);
            barrier_expect(smem.V_full(stage), V_BYTES);
            load_panels<SPEC.head_dim_v, KV_PANEL>(smem.V + stage * V_BYTES, V_map, smem.V_full(stage), kv_first,
                                                   kv_head, batch, EVICT_LAST);
            ring.advance();
        }
    }
}

// The state of the online softmax of this lane's two rows.
//
// A step is right whatever point m the exponentials refer to, as long as P stays in range. So m need not follow the row
// maximum, and O is rarely rescaled.
struct Softmax {
    float m[2] = {MINUS_INFINITY, MINUS_INFINITY};  // the point exponentials refer to, in the units of S
    float l[2] = {0.0f, 0.0f};                      // row sums of P, this lane's columns
    float factor;                                   // from the units of S to log2

    // Move m to the row maximum if for some row of the warp it is `threshold` (in log2) below. Then O must be
    // multiplied by `rescale`.
    __device__ __forceinline__ bool follow(const float (&S)[N][4], float threshold, float (&rescale)[2]) {
        float largest[2];
        bool grown = false;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float x = m[half];
#pragma unroll
            for (int n = 0; n < N; ++n) x = fmaxf(x, fmaxf(S[n][2 * half], S[n][2 * half + 1]));
            x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
            largest[half] = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
            grown |= (largest[half] - m[half]) * factor > threshold;
        }
        const bool moved = __any_sync(0xFFFFFFFF, grown);
        if (moved) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float reference = largest[half] == MINUS_INFINITY ? 0.0f : largest[half];
                rescale[half] = exp2_approximate((m[half] - reference) * factor);
                l[half] *= rescale[half];
                m[half] = largest[half];
            }
        }
        return moved;
    }

    // P = 2^(factor (S - m)) and this lane's row sums, four neighbours at a time: `use(n, p)` takes accumulator tile n.
    template <typename Use>
    __device__ __forceinline__ void exponentials(const float (&S)[N][4], float (&sum)[2], Use use) const {
        const float offset[2] = {m[0] == MINUS_INFINITY ? 0.0f : m[0] * factor,
                                 m[1] == MINUS_INFINITY ? 0.0f : m[1] * factor};
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float p[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                p[r] = exp2_approximate(fmaf(S[n][r], factor, -offset[r / 2]));
                sum[r / 2] += p[r];
            }
            use(n, p);
        }
    }

    // Whether exponentials with these sums are in range in every row of the warp. (NaN counts as out of range.)
    __device__ __forceinline__ bool in_range(const float (&sum)[2]) const {
        const bool fits = sum[0] < LARGEST_SUM && sum[1] < LARGEST_SUM;
        return __all_sync(0xFFFFFFFF, fits && m[0] > MINUS_INFINITY && m[1] > MINUS_INFINITY);
    }

    __device__ __forceinline__ void add(const float (&sum)[2]) {
        l[0] += sum[0];
        l[1] += sum[1];
    }
};

// Softcap, ALiBi and mask of a tile of scores of one warp.
__device__ __forceinline__ void finish_scores(float (&S)[N][4], const Scores& scores, const Band& band, int q_first,
                                              int kv_first, int warp_row) {
    const bool cut = band.cuts(q_first, 64, kv_first, TILE.cols);
    if (RAW_SCORES && !cut) return;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int q_index = q_first + warp_row + lane / 4 + r / 2 * 8;
            const int kv_index = kv_first + 8 * n + lane % 4 * 2 + r % 2;
            float derivative;
            if constexpr (!RAW_SCORES) S[n][r] = scores.exponent(S[n][r], q_index, kv_index, derivative);
            if (cut && !band.allows(q_index, kv_index)) S[n][r] = MINUS_INFINITY;
        }
    }
}

// One accumulator tile of P, rounded to its place in the left operand of the next product.
__device__ __forceinline__ void pack_tile(unsigned int (&P)[N / 2][4], int n, const float (&p)[4]) {
    P[n / 2][n % 2 * 2] = pack(p[0], p[1]);
    P[n / 2][n % 2 * 2 + 1] = pack(p[2], p[3]);
}

// All of P, which stands in S; dropped elements become 0.
__device__ __forceinline__ void pack_all(unsigned int (&P)[N / 2][4], float (&S)[N][4], const Dropout& dropout,
                                         int q_row, int kv_first) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        if constexpr (SPEC.dropout) {
            float factors[2][4];
            dropout.factors(factors, q_row, kv_first + 8 * n);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                S[n][r] *= factors[0][r];
                S[n + 1][r] *= factors[1][r];
            }
        }
        pack_tile(P, n, S[n]);
        pack_tile(P, n + 1, S[n + 1]);
    }
}

// S = Q K^T  [64, cols], asynchronous.
__device__ __forceinline__ void issue_scores(float (&S)[N][4], unsigned int Q_smem, unsigned int K_smem) {
    // Q stays in place, so the compiler keeps the descriptors of all steps in uniform registers. Where these are too
    // many beside the rest, an address that looks new has them computed here each time.
    if constexpr (D > 128 || DV > 128 || LONG_SCORE_STAGE) asm volatile("" : "+r"(Q_smem));
    const unsigned long long Q = tile_descriptor(Q_smem, 16), K = tile_descriptor(K_smem, 16);
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        const int in_panel = step % 4 * 2;  // 32 bytes
        wgmma_ss<K_MAJOR>(S, Q + step / 4 * (Q_PANEL / 16) + in_panel, K + step / 4 * (KV_PANEL / 16) + in_panel,
                          step > 0);
    }
    wgmma_commit();
}

// O += P V  [64, head_dim_v], asynchronous.
__device__ __forceinline__ void issue_output(float (&O)[N_OUT][4], unsigned int (&P)[N / 2][4], unsigned int V_smem,
                                             bool add) {
    const unsigned long long V = tile_descriptor(V_smem, KV_PANEL);
#pragma unroll
    for (int step = 0; step < TILE.cols / 16; ++step) wgmma_rs<MN_MAJOR>(O, P[step], V + step * 128, add || step > 0);
    wgmma_commit();
}

// O / l and LSE of the 16 rows of one warp, from row `first` of the sequence on.
__device__ __forceinline__ void finish_rows(const Params& p, const Work& work, int first, const Softmax& softmax,
                                            const float (&O)[N_OUT][4]) {
    const Sequence& sequence = work.sequence;
    const int lane = threadIdx.x % 32, rows = sequence.q_len - first;  // that exist, of these 16 and those below
    const long long row = sequence.q_start + first;
    float* lse_gmem = statistic_rows(p.lse, sequence.batch, row, work.head);
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float lse;
        scale[half] = finish_row(p, sequence, work.head, softmax.m[half] * softmax.factor, softmax.l[half], lse);
        const int i = lane / 4 + 8 * half;
        if (lane % 4 == 0 && i < rows) lse_gmem[i] = lse;
    }
    Element* O_gmem = head_rows(p.out, sequence.batch, row, work.head);
    store_accumulators<SPEC.head_dim_v>(O_gmem, p.out.row_stride, rows, 0, O, scale, false);
}

// One warpgroup: 64 rows of every tile of work.
__device__ __forceinline__ void attend(const Params& p, const Layout& smem, int blocks, int warpgroup) {
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 % 4 * 16;
    const unsigned int Q_smem = smem.Q + warpgroup * 64 * 128;
    Ring ring;
    unsigned int q_parity = 0;
    for (int round = 0; round < ceil_div(blocks, gridDim.x); ++round) {
        const int block = work_of_round(round);
        if (block >= blocks) break;
        const Work work = find_work<TILE.rows, false>(p, block, p.q_tiles, p.heads);
        const Sequence& sequence = work.sequence;
        const int q_tile = work.tile * TILE.rows, q_first = q_tile + warpgroup * 64, head = work.head;
        const Band band(p, sequence);
        const TileRange tiles = tiles_of_work(band, q_tile, sequence.q_len);
        const Scores scores(p, sequence.index, head, band.offset);
        const Dropout dropout(p, sequence.index, head);
        Softmax softmax;
        softmax.factor = RAW_SCORES ? scores.factor : 1.0f;
        if (tiles.first == tiles.last) {
            // Not the O below: two places that define it would need two sets of registers.
            const float zeros[N_OUT][4] = {};
            finish_rows(p, work, q_first + warp_row, softmax, zeros);
            continue;
        }
        float O[N_OUT][4];
        float S[N][4];
        // P of tiles first, first + 2, ... and of those between; one set of registers for both if TILE.p_sets is 1
        unsigned int P_even[N / 2][4], P_other[N / 2][4];
        auto in_place = [&](int n, const float (&p)[4]) {
#pragma unroll
            for (int r = 0; r < 4; ++r) S[n][r] = p[r];
        };
        auto& P_odd = TILE.p_sets == 2 ? P_other : P_even;
        float rescale[2], sum[2];
        barrier_wait(smem.Q_full(), q_parity);
        q_parity ^= 1;

        // P_first
        barrier_wait(smem.K_full(ring.stage), ring.parity);
        wgmma_fence();
        issue_scores(S, Q_smem, smem.K + ring.stage * K_BYTES);
        wgmma_wait<0>();
        pin(S);
        if (lane == 0) barrier_arrive(smem.K_empty(ring.stage));
        finish_scores(S, scores, band, q_first, tiles.first * TILE.cols, warp_row);
        softmax.follow(S, 0.0f, rescale);
        softmax.exponentials(S, sum, in_place);
        softmax.add(sum);
        pack_all(P_even, S, dropout, q_first + warp_row, tiles.first * TILE.cols);

        // P_tile, while O += P_{tile - 1} V_{tile - 1}
        auto advance = [&](int tile, unsigned int (&P_previous)[N / 2][4], unsigned int (&P)[N / 2][4]) {
            const Ring previous = ring;
            ring.advance();
            barrier_wait(smem.K_full(ring.stage), ring.parity);
            wgmma_fence();
            issue_scores(S, Q_smem, smem.K + ring.stage * K_BYTES);
            barrier_wait(smem.V_full(previous.stage), previous.parity);
            issue_output(O, P_previous, smem.V + previous.stage * V_BYTES, tile > tiles.first + 1);
            wgmma_wait<1>();
            pin(S);
            if (lane == 0) barrier_arrive(smem.K_empty(ring.stage));
            finish_scores(S, scores, band, q_first, tile * TILE.cols, warp_row);
            bool moved = false;
            if constexpr (TILE.p_sets == 2) {
                // Another set of registers takes P while the product reads the previous one, so S is still there if
                // the exponentials turn out to need a new m: in the steady state nobody looks for the maximum.
                auto into_P = [&](int n, const float (&p)[4]) { pack_tile(P, n, p); };
                softmax.exponentials(S, sum, into_P);
                if (!softmax.in_range(sum)) {
                    moved = softmax.follow(S, 0.0f, rescale);
                    softmax.exponentials(S, sum, into_P);
                }
            } else {
                moved = softmax.follow(S, RESCALE_THRESHOLD, rescale);
                softmax.exponentials(S, sum, in_place);
            }
            softmax.add(sum);
            wgmma_wait<0>();
            pin(O);
            pin(P_previous);
            if (lane == 0) barrier_arrive(smem.V_empty(previous.stage));
            if (moved) {
#pragma unroll
                for (int n = 0; n < N_OUT; ++n) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) O[n][r] *= rescale[r / 2];
                }
            }
            if constexpr (TILE.p_sets == 1) {
                pack_all(P, S, dropout, q_first + warp_row, tile * TILE.cols);
            }
        };
        int tile = tiles.first + 1;
#pragma unroll 1
        for (; tile + 1 < tiles.last; tile += 2) {
            advance(tile, P_even, P_odd);
            advance(tile + 1, P_odd, P_even);
        }
        const bool one_more = tile < tiles.last;
        if (one_more) advance(tile, P_even, P_odd);
        if (lane == 0) barrier_arrive(smem.Q_empty());

        // The last O += P V
        barrier_wait(smem.V_full(ring.stage), ring.parity);
        wgmma_fence();
        if (one_more) {
            issue_output(O, P_odd, smem.V + ring.stage * V_BYTES, true);
            wgmma_wait<0>();
            pin(O);
            pin(P_odd);
        } else {
            issue_output(O, P_even, smem.V + ring.stage * V_BYTES, tiles.last - tiles.first > 1);
            wgmma_wait<0>();
            pin(O);
            pin(P_even);
        }
        if (lane == 0) barrier_arrive(smem.V_empty(ring.stage));
        ring.advance();
        finish_rows(p, work, q_first + warp_row, softmax, O);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward_hopper(const __grid_constant__ Params p, const __grid_constant__ TensorMap Q_map,
                   const __grid_constant__ TensorMap K_map, const __grid_constant__ TensorMap V_map) {
    extern __shared__ __align__(1024) unsigned char smem_start[];
    const Layout smem(shared_address(smem_start));
    const int blocks = p.q_tiles * p.heads * p.batch;
    if (threadIdx.x == 0) {
        barrier_init(smem.Q_full(), 1);
        barrier_init(smem.Q_empty(), 4 * GROUPS);
        for (int stage = 0; stage < TILE.stages; ++stage) {
            barrier_init(smem.K_full(stage), 1);
            barrier_init(smem.K_empty(stage), 4 * GROUPS);
            barrier_init(smem.V_full(stage), 1);
            barrier_init(smem.V_empty(stage), 4 * GROUPS);
        }
        fence_barrier_init();
    }
    __syncthreads();

    // The shuffle tells the compiler that the number is uniform, and so are the descriptors computed from it.
    const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);
    if (warpgroup == 0) {
        release_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce(p, Q_map, K_map, V_map, smem, blocks);
    } else {
        take_registers<MATH_REGISTERS>();
        attend(p, smem, blocks, warpgroup - 1);
    }
}

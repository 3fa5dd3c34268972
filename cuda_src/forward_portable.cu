// Forward attention with mma.sync: O = softmax(S) V, S = scale Q K^T, and LSE, by online softmax over tiles of keys.
// One thread block a tile of queries of one head; each warp owns WARP_ROWS of its rows and keeps its part of
// S, P and O in registers. K and V tiles stream through a ring of TILE.stages buffers. TILE.split warps share rows:
// each computes the same P and keeps its slice of O.
#include "copy.cuh"
#include "dense.cuh"
#include "dropout.cuh"
#include "key_value.cuh"
#include "mask.cuh"
#include "scores.cuh"
#include "softmax.cuh"

constexpr int D = SPEC.head_dim, DV = SPEC.head_dim_v;
constexpr int WARP_ROWS = TILE.rows / (TILE.warps / TILE.split);
constexpr int M = WARP_ROWS / 16;  // accumulator tiles down
constexpr int N = TILE.cols / 8;   // and across S
constexpr int SLICE = padded_dim(DV) / TILE.split;
constexpr int N_OUT = SLICE / 8;  // and across a slice of O
constexpr int Q_BYTES = TILE.rows * row_pitch(D);
constexpr int KV_BYTES = TILE.stages * TILE.cols * (row_pitch(D) + row_pitch(DV));

KERNEL(forward_portable, TILE.blocks)(ARGUMENT(Params) p) {
    extern __shared__ __align__(16) unsigned char smem[];
    const unsigned int Q_smem = shared_address(smem);
    const unsigned int KV_smem = Q_smem + Q_BYTES;
    const DenseTile dense{reinterpret_cast<float*>(smem + Q_BYTES + KV_BYTES)};

    const Work work = find_work<TILE.rows, false>(p, blockIdx.x, p.q_tiles, p.heads);
    if (!work.exists) return;
    const Sequence& sequence = work.sequence;
    const int head = work.head, kv_head = head / p.group;
    const int q_first = work.tile * TILE.rows;
    const int q_rows = min(TILE.rows, sequence.q_len - q_first);
    const Band band(p, sequence);
    const TileRange tiles = band.kv_tiles(q_first, q_first + q_rows - 1);

    const Element* Q_gmem = head_rows(p.q, sequence.batch, sequence.q_start + q_first, head);
    const KeyValueTiles<D, DV> kv(p, sequence, kv_head, KV_smem);
    auto load_kv = [&](int tile) { kv.load(p, tile, tiles.last); };

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / TILE.split * WARP_ROWS, first_col = warp % TILE.split * SLICE;
    const Scores scores(p, sequence.index, head, band.offset);
    const Dropout dropout(p, sequence.index, head);
    float O[M][N_OUT][4] = {};  // [rows, head_dim_v]
    float m[M][2], l[M][2];     // running row maximum of S (times UNIT) and row sum of e^(S - m), this lane's columns
#pragma unroll
    for (int i = 0; i < M; ++i) {
        m[i][0] = m[i][1] = MINUS_INFINITY;
        l[i][0] = l[i][1] = 0.0f;
    }

    load_tile<TILE.rows, D>(Q_smem, Q_gmem, p.q.row_stride, q_rows);
    for (int stage = 0; stage < TILE.stages - 1; ++stage) load_kv(tiles.first + stage);
    for (int tile = tiles.first; tile < tiles.last; ++tile) {
        advance_ring(tile, load_kv);
        const unsigned int K_smem = kv.K_smem(tile), V_smem = kv.V_smem(tile);
        const int kv_first = tile * TILE.cols;

        if constexpr (DENSE) dense.load(p, sequence.batch, head, q_first, kv_first);

        // S = Q K^T  [rows, cols]
        float S[M][N][4] = {};
        multiply_nt<D>(S, Q_smem + warp_row * row_pitch(D), K_smem);

        // Scale, softcap, ALiBi, bias and masks; S is times UNIT from here on.
        const bool cut = band.cuts(q_first, TILE.rows, kv_first, TILE.cols);
        const float distance = scores.distance(q_first + warp_row + lane / 4, kv_first + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < M; ++i) {
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int q_index = q_first + warp_row + 16 * i + lane / 4 + r / 2 * 8;
                    const int kv_index = kv_first + 8 * n + lane % 4 * 2 + r % 2;
                    float derivative;
                    S[i][n][r] = scores.exponent(S[i][n][r], distance + (16 * i + r / 2 * 8 - 8 * n - r % 2),
                                                 derivative, dense.addend(q_index - q_first, kv_index - kv_first));
                    if (cut && !band.allows(q_index, kv_index)) S[i][n][r] = MINUS_INFINITY;
                }
            }
        }

        // P = e^(S - m) with the new maximum; O and l follow it.
#pragma unroll
        for (int i = 0; i < M; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float m_new = m[i][half];
#pragma unroll
                for (int n = 0; n < N; ++n) m_new = fmaxf(m_new, fmaxf(S[i][n][2 * half], S[i][n][2 * half + 1]));
                m_new = fmaxf(m_new, __shfl_xor_sync(0xFFFFFFFF, m_new, 1));
                m_new = fmaxf(m_new, __shfl_xor_sync(0xFFFFFFFF, m_new, 2));
                const float reference =
                    m_new == MINUS_INFINITY ? 0.0f : m_new;  // a row with no keys yet: e^(-inf - 0) = 0
                const float rescale = exponential(m[i][half] - reference);
                m[i][half] = m_new;
                l[i][half] *= rescale;
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int r = 2 * half; r < 2 * half + 2; ++r) {
                        S[i][n][r] = exponential(S[i][n][r] - reference);
                        l[i][half] += S[i][n][r];
                    }
                }
#pragma unroll
                for (int n = 0; n < N_OUT; ++n) {
                    O[i][n][2 * half] *= rescale;
                    O[i][n][2 * half + 1] *= rescale;
                }
            }
        }
        if constexpr (SPEC.dropout) {
#pragma unroll
            for (int i = 0; i < M; ++i) {
                Kept<N / 2> kept;
                dropout.draw(kept, q_first + warp_row + 16 * i, kv_first);
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) S[i][n][r] *= dropout.factor(kept, n, r);
                }
            }
        }

        // O += P V  [rows, head_dim_v]
        multiply_nn<DV>(O, S, V_smem + first_col * ELEMENT_BYTES);
    }
    copy_async_commit();
    copy_async_wait<0>();

    // O / l and LSE; exp(sink) joins the denominator.
    Element* O_gmem = head_rows(p.out, sequence.batch, sequence.q_start + q_first, head);
    float* lse_gmem = statistic_rows(p.lse, sequence.batch, sequence.q_start + q_first, head);
#pragma unroll
    for (int i = 0; i < M; ++i) {
        float scale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float lse;
            scale[half] = finish_row(m[i][half], l[i][half], scores.sink, lse);
            const int row = warp_row + 16 * i + lane / 4 + 8 * half;
            if (p.lse.data != nullptr && lane % 4 == 0 && first_col == 0 && row < q_rows) lse_gmem[row] = lse;
        }
        const int row = warp_row + 16 * i;
        store_accumulators<DV>(O_gmem + row * p.out.row_stride, p.out.row_stride, q_rows - row, first_col, O[i], scale,
                               false);
    }
}

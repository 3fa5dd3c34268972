// Forward attention with mma.sync: O = softmax(S) V, S = scale Q K^T, and LSE, by online softmax over tiles of keys.
// One thread block a tile of queries of one head; each warp owns WARP_ROWS of its rows and keeps its part of
// S, P and O in registers. K and V tiles stream through a ring of TILE.stages buffers. TILE.split warps share rows:
// each computes the same P and keeps its slice of O.
//
// With SPEC.parts, for few queries, the rows of a tile are those of all heads of a group, head by head within a query,
// so that K and V are read once for them all; and a thread block visits one part of the keys, of which it leaves O,
// m and l (forward_combine.cu puts the parts together).
#include "copy.cuh"
#include "dense.cuh"
#include "dropout.cuh"
#include "key_value.cuh"
#include "mask.cuh"
#include "partial.cuh"
#include "scores.cuh"
#include "softmax.cuh"

constexpr int D = SPEC.head_dim, DV = SPEC.head_dim_v;
constexpr int WARP_ROWS = TILE.rows / (TILE.warps / TILE.split);
constexpr int M = WARP_ROWS / 16;  // accumulator tiles down
constexpr int N = TILE.cols / 8;   // and across S
constexpr int SLICE = padded_dim(DV) / TILE.split;
constexpr int N_OUT = SLICE / 8;  // and across a slice of O
// Steps of S in one piece: where heads are wide it is short of keys, and registers suffice for more.
constexpr int S_UNROLLED = IS_FLOAT32 ? 2 : D <= 128 ? STEPS_UNROLLED : 16;
// What P is multiplied by for float32, and O divided: terms far above the smallest float16, and exact where P is 1.
constexpr float PEAK = 16384.0f;
constexpr bool LINEAR = !SPEC.softcap && !SPEC.alibi && !DENSE;
// Whether where the rows belong is kept over the loop. That takes registers, which ptxas finds for Hopper and 16-bit
// types, where it is faster by up to 2%; else it is worked out anew (but not packed, where that takes a search).
constexpr bool REMEMBERS = SPEC.packed || (__CUDA_ARCH__ / 100 == 9 && !IS_FLOAT32);
static_assert(!SPEC.parts || !(SPEC.packed || SPEC.dropout || DENSE));
constexpr int Q_BYTES = TILE.rows * row_pitch(D);
constexpr int KV_BYTES = TILE.stages * TILE.cols * (row_pitch(D) + row_pitch(DV));

KERNEL(forward_portable, TILE.blocks)(ARGUMENT(Params) p) {
    extern __shared__ __align__(16) unsigned char smem[];
    const unsigned int Q_smem = shared_address(smem);
    const unsigned int KV_smem = Q_smem + Q_BYTES;
    const DenseTile dense{reinterpret_cast<float*>(smem + Q_BYTES + KV_BYTES)};

    const int sharing = SPEC.parts ? p.group : 1;  // heads whose rows a tile has
    // Blocks next to each other have the same keys of different heads, which are neighbours in memory.
    const int places = SPEC.parts ? p.q_tiles * (p.heads / sharing) * p.batch : 1;
    const int part = SPEC.parts ? blockIdx.x / places : 0;
    const Work work =
        find_work<TILE.rows, false>(p, SPEC.parts ? blockIdx.x % places : blockIdx.x, p.q_tiles, p.heads / sharing);
    if (!work.exists) return;
    const Sequence& sequence = work.sequence;
    const int head = work.head * sharing, kv_head = head / p.group;  // the first head
    const int first_row = work.tile * TILE.rows;
    const int rows = min(TILE.rows, sequence.q_len * sharing - first_row);
    const int q_first = first_row / sharing, q_last = (first_row + rows - 1) / sharing;
    const Band band(p, sequence);
    TileRange tiles = band.kv_tiles(q_first, q_last);
    if constexpr (SPEC.parts) {
        tiles.first = min(tiles.first + part * p.part_tiles, tiles.last);
        tiles.last = min(tiles.first + p.part_tiles, tiles.last);
    }

    KeyValueTiles<D, DV> kv(p, sequence, kv_head, tiles.first, KV_smem);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / TILE.split * WARP_ROWS, first_col = warp % TILE.split * SLICE;
    const Scores scores(p, sequence.index, head, band.offset);
    const Dropout dropout(p, sequence.index, head);
    int q_of[M][2];        // the queries of this lane's rows
    float slope_of[M][2];  // and the ALiBi slopes of their heads
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + warp_row + 16 * i + lane / 4 + 8 * half;
            q_of[i][half] = row / sharing;
            slope_of[i][half] = scores.slope;
            if constexpr (SPEC.parts) slope_of[i][half] = Scores(p, sequence.index, head + row % sharing, 0).slope;
        }
    }
    // q.k becomes an exponent by one multiplication, which is left to the exponential where the factor is positive.
    const bool by_factor = LINEAR && !(scores.factor > 0.0f);
    const float unit = LINEAR && !by_factor ? scores.factor : 1.0f;
    float O[M][N_OUT][4] = {};  // [rows, head_dim_v]
    float m[M][2];              // running row maximum of S (times UNIT)
    float l[M][2] = {};         // and row sum of e^(S - m), this lane's columns
#pragma unroll
    for (int i = 0; i < M; ++i) m[i][0] = m[i][1] = LOWEST;

    const Element* Q_gmem = head_rows(p.q, sequence.batch, sequence.q_start + (SPEC.parts ? 0 : first_row), head);
    if constexpr (SPEC.parts) {
        const auto row_of = [&](int row) {
            const int of_all = first_row + row;
            return Q_gmem + of_all / sharing * p.q.row_stride + of_all % sharing * p.q.head_stride;
        };
        load_rows<TILE.rows, D>(Q_smem, row_of, rows);
    } else {
        load_tile<TILE.rows, D>(Q_smem, Q_gmem, p.q.row_stride, rows);
    }
    kv.begin(p, tiles);
    if constexpr (IS_FLOAT32) {
        copy_async_wait<0>();
        __syncthreads();
        split_rows<TILE.rows, D>(Q_smem);
    }
    for (int tile = tiles.first; tile < tiles.last; ++tile) {
        kv.take_first(p, tiles, tile);
        const unsigned int K_smem = kv.K_smem(tile), V_smem = kv.V_smem(tile);
        const int kv_first = tile * TILE.cols;

        if constexpr (DENSE) dense.load(p, sequence.batch, head, q_first, kv_first);

        // S = Q K^T  [rows, cols]
        float S[M][N][4] = {};
        const unsigned int Q_warp = Q_smem + warp_row * row_pitch(D);
        multiply_nt<D, S_UNROLLED>(S, Q_warp, K_smem);
        apply_units<D>(S, Q_warp, K_smem);
        kv.take_second(p, tiles, tile);

        // Softcap, ALiBi and bias, from where on S is times UNIT.
        if (!LINEAR || by_factor) {
            const int first_key = kv_first + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < M; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float distance = scores.distance(q_of[i][half], first_key);
                    Scores of_row = scores;
                    of_row.slope = slope_of[i][half];
#pragma unroll
                    for (int n = 0; n < N; ++n) {
#pragma unroll
                        for (int r = 2 * half; r < 2 * half + 2; ++r) {
                            const int col = 8 * n + r % 2;
                            const float addend = dense.addend(q_of[i][half] - q_first, first_key + col - kv_first);
                            float derivative;
                            S[i][n][r] = of_row.exponent(S[i][n][r], distance - col, derivative, addend);
                        }
                    }
                }
            }
        }
        // Masks, where the tile is cut. (Rows beyond the last query are never looked at.)
        if (band.cuts_keys(q_first, q_last, kv_first, kv_first + TILE.cols - 1)) {
#pragma unroll
            for (int i = 0; i < M; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const ColumnRange allowed = band.columns_of(q_of[i][half], kv_first + lane % 4 * 2);
#pragma unroll
                    for (int n = 0; n < N; ++n) {
#pragma unroll
                        for (int r = 2 * half; r < 2 * half + 2; ++r) {
                            if (!allowed.contains(8 * n + r % 2)) S[i][n][r] = MINUS_INFINITY;
                        }
                    }
                }
            }
        }

        // The new maximum; O and l follow it. (Maxima of two columns side by side, so that one does not wait for the
        // other. In a row with no keys yet m stays finite, and e^(-inf - m) = 0.)
        float rescale[M][2];
        bool moved = false;
#pragma unroll
        for (int i = 0; i < M; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float largest[2] = {MINUS_INFINITY, MINUS_INFINITY};
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    largest[0] = fmaxf(largest[0], S[i][n][2 * half]);
                    largest[1] = fmaxf(largest[1], S[i][n][2 * half + 1]);
                }
                const float m_new = fmaxf(m[i][half], row_maximum(fmaxf(largest[0], largest[1])) * unit);
                rescale[i][half] = exponential(m[i][half] - m_new);
                m[i][half] = m_new;
                l[i][half] *= rescale[i][half];
                moved |= rescale[i][half] != 1.0f;
            }
        }
        if (__any_sync(0xFFFFFFFF, moved)) {  // later maxima hardly change
#pragma unroll
            for (int i = 0; i < M; ++i) {
#pragma unroll
                for (int n = 0; n < N_OUT; ++n) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) O[i][n][r] *= rescale[i][r / 2];
                }
            }
        }

        // P = e^(S - m)  [rows, 16] and O += P V  [rows, head_dim_v], step by step: the exponentials of a step run
        // under the products of the one before.
        Kept<N / 2> kept[M];
        if constexpr (SPEC.dropout) {
#pragma unroll
            for (int i = 0; i < M; ++i) dropout.draw(kept[i], q_first + warp_row + 16 * i, kv_first);
        }
        const float V_unit = IS_FLOAT32 ? largest_unit<TILE.cols, DV>(V_smem) : 1.0f;
        const float per_unit = PEAK * inverse_power(V_unit);
        float of_tile[M][2] = {};  // its row sums, apart for float32: the fewer numbers a sum has, the less it rounds
        constexpr int STEP = 2;    // accumulator tiles, 16 keys
#pragma unroll
        for (int n = 0; n < N; n += STEP) {
            AccumulatorOperand<STEP> P[M];
            // The units of V's rows, in that of the largest, which P takes over: where they differ by more than 2^17 in
            // a tile, queries that attend to the small ones alone lose bits of them.
            float unit_of[STEP][2];
            if constexpr (IS_FLOAT32) {
#pragma unroll
                for (int j = 0; j < STEP; ++j) {
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        unit_of[j][r] = unit_of_row<DV>(V_smem, 8 * (n + j) + lane % 4 * 2 + r) * per_unit;
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < M; ++i) {
                float p_of_step[STEP][4];
#pragma unroll
                for (int j = 0; j < STEP; ++j) {
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        float& x = p_of_step[j][r];
                        x = exponential(fmaf(S[i][n + j][r], unit, -m[i][r / 2]));
                        (IS_FLOAT32 ? of_tile : l)[i][r / 2] += x;
                        if constexpr (SPEC.dropout) x = kept[i].element(n + j, r) ? x : 0.0f;
                        if constexpr (IS_FLOAT32) x *= unit_of[j][r % 2];
                    }
                }
                P[i].set(p_of_step);
            }
            multiply_nn<DV>(O, P, V_smem + 8 * n * row_pitch(DV) + first_col * OPERAND_BYTES,
                            RowUnits<M>(V_unit / PEAK));
        }
        if constexpr (IS_FLOAT32) {
#pragma unroll
            for (int i = 0; i < M; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) l[i][half] += of_tile[i][half];
            }
        }
    }
    copy_async_commit();
    copy_async_wait<0>();

    if constexpr (SPEC.parts) {  // O, m and l as they are
        const Partial partial(p, sequence.batch, kv_head);
        const float as_it_is[2] = {1.0f, 1.0f};
#pragma unroll
        for (int i = 0; i < M; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = row_sum(l[i][half]);
                const int row = warp_row + 16 * i + lane / 4 + 8 * half;
                if (lane % 4 == 0 && first_col == 0 && row < rows) {
                    partial.statistics[partial.place(first_row + row, part)] = make_float2(m[i][half], sum);
                }
            }
            const int row = warp_row + 16 * i;
            store_accumulators<DV>(partial.O + partial.place(first_row + row, part) * DV, p.parts * DV, rows - row,
                                   first_col, O[i], as_it_is, false);
        }
        return;
    }

    // O / l and LSE; exp(sink) joins the denominator.
    const Work end = REMEMBERS ? work : find_work<TILE.rows, false>(p, forgotten(blockIdx.x), p.q_tiles, p.heads);
    const int end_first = end.tile * TILE.rows, end_rows = min(TILE.rows, end.sequence.q_len - end_first);
    const long long end_row = end.sequence.q_start + end_first;
    const float sink = Scores(p, end.sequence.index, end.head, 0).sink;
    Element* O_gmem = head_rows(p.out, end.sequence.batch, end_row, end.head);
    float* lse_gmem = statistic_rows(p.lse, end.sequence.batch, end_row, end.head);
#pragma unroll
    for (int i = 0; i < M; ++i) {
        float scale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float lse;
            scale[half] = finish_row(m[i][half], row_sum(l[i][half]), sink, lse);
            if constexpr (SPEC.dropout) scale[half] *= dropout.scale;
            const int row = warp_row + 16 * i + lane / 4 + 8 * half;
            if (p.lse.data != nullptr && lane % 4 == 0 && first_col == 0 && row < end_rows) lse_gmem[row] = lse;
        }
        const int row = warp_row + 16 * i;
        store_accumulators<DV>(O_gmem + row * p.out.row_stride, p.out.row_stride, end_rows - row, first_col, O[i],
                               scale, false);
    }
}

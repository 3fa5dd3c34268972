// float32 on tensor cores: x = unit (hi + lo), two numbers of float16 with 11 bits each, which keep all 24 bits of x.
// unit is a power of two that a row has in common and that keeps hi in the range of float16: with the largest |hi|
// between 2^14 and 2^15, numbers down to 2^-17 of the largest keep their bits, and what is lost of any is less than
// 2^-39 of the largest. A product takes three of float16 (hi hi + hi lo + lo hi), each twice as fast as one of TF32.
// (Two terms of TF32: Markidis et al., 2018, https://arxiv.org/abs/1803.04014; of float16 with a scale: Ootomo and
// Yokota, 2022, https://arxiv.org/abs/2203.03341.)
//
// With SPEC.allow_tf32 there is hi alone, which has the 11 bits of a TF32 number.
#pragma once
#include "copy.cuh"

// x = unit (scale x), scale x below 2^15.
struct PowerOfTwo {
    float scale, unit;

    // For numbers up to `largest`. (Both stay far from the ends of float32: what is below 2^-98 loses bits.)
    __device__ __forceinline__ explicit PowerOfTwo(float largest) {
        const unsigned int exponent = max(__float_as_uint(largest) >> 23, 29u);
        scale = __uint_as_float((268u - exponent) << 23);
        unit = __uint_as_float((exponent - 14u) << 23);
    }
};

// The largest finite |x| of each row of numbers: one that is not finite must not make the others zero.
template <int ROWS, int COUNT>
__device__ __forceinline__ void largest_finite(float (&largest)[ROWS], const float (&x)[ROWS][COUNT]) {
    float of_all = 0.0f;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
        largest[row] = 0.0f;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) largest[row] = fmaxf(largest[row], fabsf(x[row][i]));  // NaN does not count
        of_all = fmaxf(of_all, largest[row]);
    }
    while (of_all == -MINUS_INFINITY) {  // once; an `if` would be computed always
        of_all = 0.0f;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            largest[row] = 0.0f;
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                if (fabsf(x[row][i]) < -MINUS_INFINITY) largest[row] = fmaxf(largest[row], fabsf(x[row][i]));
            }
            of_all = fmaxf(of_all, largest[row]);
        }
    }
}

// The largest of the numbers of LANES neighbouring lanes, none of them negative.
template <int LANES = 32>
__device__ __forceinline__ float largest_of_lanes(float x) {
#if CUFLASH_ARCH >= 800
    if constexpr (LANES == 32) return __uint_as_float(__reduce_max_sync(0xFFFFFFFF, __float_as_uint(x)));
#endif
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, distance));
    }
    return x;
}

// A tile of float32 in shared memory, rows of DIM numbers, that becomes row by row DIM numbers hi, DIM numbers lo
// behind them, and in the row's padding its unit. A warp splits whole rows: those that it copied itself, where OWN.
template <int ROWS, int DIM>
struct SplitTile {
    static constexpr int PITCH = row_pitch(DIM), PADDING = PITCH - 16, CHUNKS = padded_dim(DIM) / CHUNK;
    static constexpr int LANES = 32 % CHUNKS == 0 ? CHUNKS : 32, DOWN = 32 / LANES;  // of a row; rows of a warp
    static constexpr int ACROSS = ceil_div(CHUNKS, LANES), COUNT = ACROSS * CHUNK;   // chunks and numbers of a lane
    static constexpr int STEP = DOWN * TILE.warps;
    static constexpr bool OWN = RowStream<ROWS, DIM>::BY_COLUMN && ACROSS == 1;

    // Rows that a lane has under way together, which hides latencies.
    static constexpr int VISITS = ceil_div(ROWS, STEP), MOST = 4 / ACROSS;
    static constexpr int TOGETHER = VISITS % MOST == 0 ? MOST : VISITS % 2 == 0 ? 2 : 1;

    unsigned int smem;
    int lane_row, lane_chunk;

    __device__ __forceinline__ explicit SplitTile(unsigned int X_smem)
        : smem(X_smem), lane_row(threadIdx.x / LANES), lane_chunk(threadIdx.x % LANES) {}

    // Whether this lane has a chunk i of the row, of those that the block visits together, that is `first` rows on.
    __device__ __forceinline__ bool has(int first, int i) const {
        return (ROWS % STEP == 0 || first + lane_row < ROWS) &&
               (CHUNKS % LANES == 0 || lane_chunk + LANES * i < CHUNKS);
    }

    __device__ __forceinline__ unsigned int row_smem(int first) const { return smem + (first + lane_row) * PITCH; }

    __device__ __forceinline__ void load(float (&x)[COUNT], int first) const {
#pragma unroll
        for (int i = 0; i < ACROSS; ++i) {
            unsigned int word[4];
            const bool mine = has(first, i);
            if (mine) load_shared(word, row_smem(first) + (lane_chunk + LANES * i) * 16);
#pragma unroll
            for (int j = 0; j < 4; ++j) x[4 * i + j] = mine ? __uint_as_float(word[j]) : 0.0f;
        }
    }

    // The terms take the place of the row, which the warp has read.
    __device__ __forceinline__ void store(const float (&x)[COUNT], int first, float scale) const {
#pragma unroll
        for (int i = 0; i < ACROSS; ++i) {
            if (!has(first, i)) continue;
            const unsigned int chunk_smem = row_smem(first) + (lane_chunk + LANES * i) * 8;
            unsigned int hi[2], lo[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float low = x[4 * i + 2 * j] * scale, high = x[4 * i + 2 * j + 1] * scale;
                hi[j] = pack_half(low, high);
                if constexpr (TWO_TERMS) lo[j] = pack_rest(low, high, hi[j]);
            }
            store_shared_pair(chunk_smem, hi);
            if constexpr (TWO_TERMS) store_shared_pair(chunk_smem + term_distance(DIM), lo);
        }
    }
};

// Once this thread's copies of the tile are there; then everyone has to wait for everyone.
template <int ROWS, int DIM>
__device__ __forceinline__ void split_rows(unsigned int X_smem) {
    if constexpr (IS_FLOAT32) {
        using Split = SplitTile<ROWS, DIM>;
        if constexpr (!Split::OWN) __syncthreads();
        const Split tile(X_smem);
#pragma unroll 1
        for (int begin = 0; begin < ROWS; begin += Split::TOGETHER * Split::STEP) {
            float x[Split::TOGETHER][Split::COUNT], largest[Split::TOGETHER];
            float scale[Split::TOGETHER], unit[Split::TOGETHER];
#pragma unroll
            for (int i = 0; i < Split::TOGETHER; ++i) tile.load(x[i], begin + i * Split::STEP);
            largest_finite(largest, x);
#pragma unroll
            for (int i = 0; i < Split::TOGETHER; ++i) {
                const PowerOfTwo power(largest_of_lanes<Split::LANES>(largest[i]));
                scale[i] = power.scale;
                unit[i] = power.unit;
            }
            __syncwarp();  // a row is read and written by one warp
#pragma unroll
            for (int i = 0; i < Split::TOGETHER; ++i) {
                const int first = begin + i * Split::STEP;
                tile.store(x[i], first, scale[i]);
                if (tile.lane_chunk == 0 && tile.has(first, 0)) {
                    store_shared_word(tile.row_smem(first) + Split::PADDING, __float_as_uint(unit[i]));
                }
            }
        }
    }
}

// Two tiles that stay, with all copies under way; as above.
template <int ROWS, int DIM_X, int DIM_Y>
__device__ __forceinline__ void split_resident(unsigned int X_smem, unsigned int Y_smem) {
    if constexpr (IS_FLOAT32) {
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        split_rows<ROWS, DIM_X>(X_smem);
        split_rows<ROWS, DIM_Y>(Y_smem);
    }
}

template <int DIM>
__device__ __forceinline__ float unit_of_row(unsigned int X_smem, int row) {
    return __uint_as_float(load_shared_word(X_smem + row * row_pitch(DIM) + row_pitch(DIM) - 16));
}

// Accumulators of A B^T get the units of the rows of B, which are columns of them.
template <int DIM, int M, int N>
__device__ __forceinline__ void apply_column_units(float (&acc)[M][N][4], unsigned int b_smem) {
    if constexpr (IS_FLOAT32) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float unit = unit_of_row<DIM>(b_smem, 8 * n + threadIdx.x % 4 * 2 + r);
#pragma unroll
                for (int i = 0; i < M; ++i) {
                    acc[i][n][r] *= unit;
                    acc[i][n][2 + r] *= unit;
                }
            }
        }
    }
}

// And those of the rows of A.
template <int DIM, int M, int N>
__device__ __forceinline__ void apply_units(float (&acc)[M][N][4], unsigned int a_smem, unsigned int b_smem) {
    if constexpr (IS_FLOAT32) {
#pragma unroll
        for (int i = 0; i < M; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float unit = unit_of_row<DIM>(a_smem, threadIdx.x % 32 / 4 + 16 * i + 8 * half);
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    acc[i][n][2 * half] *= unit;
                    acc[i][n][2 * half + 1] *= unit;
                }
            }
        }
        apply_column_units<DIM>(acc, b_smem);
    }
}

// The largest unit of a tile's rows, and 1 / x of a unit.
template <int ROWS, int DIM>
__device__ __forceinline__ float largest_unit(unsigned int X_smem) {
    float largest = 0.0f;
#pragma unroll
    for (int first = 0; first < ROWS; first += 32) {
        const int row = first + threadIdx.x % 32;
        if (row < ROWS) largest = fmaxf(largest, unit_of_row<DIM>(X_smem, row));
    }
    return largest_of_lanes(largest);
}

__device__ __forceinline__ float inverse_power(float x) { return __uint_as_float((254u << 23) - __float_as_uint(x)); }

// Accumulators as a left operand; for float32 a row times a power of two, whose inverse becomes its unit.
template <int M, int K>
__device__ __forceinline__ void set_operand(AccumulatorOperand<K> (&P)[M], RowUnits<M>& units, float (&p)[M][K][4]) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
        if constexpr (IS_FLOAT32) {
            float of_row[2][2 * K], largest[2];
#pragma unroll
            for (int n = 0; n < K; ++n) {
#pragma unroll
                for (int r = 0; r < 4; ++r) of_row[r / 2][2 * n + r % 2] = p[i][n][r];
            }
            largest_finite(largest, of_row);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const PowerOfTwo power(largest_of_lanes<4>(largest[half]));
                units.of[i][half] = power.unit;
#pragma unroll
                for (int n = 0; n < K; ++n) {
                    p[i][n][2 * half] *= power.scale;
                    p[i][n][2 * half + 1] *= power.scale;
                }
            }
        }
        P[i].set(p[i]);
    }
}

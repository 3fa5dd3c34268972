// The two tile products of attention, for one warp. All five products of forward and backward are one of them:
//   multiply_nt: acc += A B^T, A and B rows in shared memory     S = Q K^T, dP = dO V^T and their transposes
//   multiply_nn: acc += P B, P the accumulators of the former    O = P V, dV = P^T dO, dK = dS^T Q, dQ = dS K
// P never leaves registers: an accumulator already has the layout of a left operand, but for an order of the
// contraction index that the right operand follows.
#pragma once
#include "element.cuh"
#include "mma.cuh"

constexpr bool IS_FLOAT32 = SPEC.dtype == Dtype::float32;
constexpr bool THREE_TERMS = IS_FLOAT32 && !SPEC.allow_tf32;
constexpr int STEPS_UNROLLED = IS_FLOAT32 ? 1 : 4;  // more only makes the code longer and takes registers

// A row in shared memory is padded with zeros to whole steps of every warp that shares it, and then to an odd number of
// 16-byte chunks, so that eight rows of one column of chunks lie in eight different groups of banks: no conflicts in
// any of the loads below.
__device__ constexpr int padded_dim(int dim) { return round_up(dim, 16 * TILE.split); }
__device__ constexpr int row_pitch(int dim) { return padded_dim(dim) * ELEMENT_BYTES + 16; }

// An operand of one step: for float32 split into two TF32 terms, x = hi + lo, which keep 23 of its 24 bits. hi is x
// rounded to nearest, whose carry may run into the exponent, and tensor cores ignore the last 13 bits of lo. (A NaN
// stays one in lo; an infinity becomes one: inf - inf.)
template <int REGISTERS>
struct Fragment {
    unsigned int hi[REGISTERS];
    unsigned int lo[REGISTERS];  // unused unless THREE_TERMS

    __device__ __forceinline__ void set(int i, unsigned int raw) {
        if constexpr (THREE_TERMS) {
            hi[i] = raw + 0x1000 & 0xFFFFE000;
            lo[i] = __float_as_uint(__uint_as_float(raw) - __uint_as_float(hi[i]));
        } else if constexpr (IS_FLOAT32) {
            hi[i] = round_to_tf32(__uint_as_float(raw));
        } else {
            hi[i] = raw;
        }
    }
};

// acc [16, 8] += A [16, K_STEP] B [K_STEP, 8]. With float32 the product of the two low terms counts (WITH_LOW_LOW)
// where both operands are inputs: S of a large score must be right to its last bit.
template <bool WITH_LOW_LOW>
__device__ __forceinline__ void multiply_add(float (&acc)[4], const Fragment<4>& a, const Fragment<2>& b) {
    if constexpr (SPEC.dtype == Dtype::bfloat16) {
        mma_bf16_m16n8k16(acc, a.hi, b.hi);
    } else if constexpr (SPEC.dtype == Dtype::float16) {
#if CUFLASH_ARCH >= 800
        mma_f16_m16n8k16(acc, a.hi, b.hi);
#else
        mma_f16_m16n8k8(acc, a.hi[0], a.hi[1], b.hi[0]);
        mma_f16_m16n8k8(acc, a.hi[2], a.hi[3], b.hi[1]);
#endif
    } else {
        // Tensor cores truncate when they accumulate: each step starts at zero and is added in float32.
        float step[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if constexpr (THREE_TERMS) {
            if constexpr (WITH_LOW_LOW) mma_tf32_m16n8k8(step, a.lo, b.lo);
            mma_tf32_m16n8k8(step, a.lo, b.hi);
            mma_tf32_m16n8k8(step, a.hi, b.lo);
        }
        mma_tf32_m16n8k8(step, a.hi, b.hi);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[i] += step[i];
    }
}

// Accumulator tiles n and n + 1 of acc [16 M, 8 N] += A [16 M, K_STEP] B [K_STEP, 16], B as one load gave it.
template <bool WITH_LOW_LOW, int M, int N>
__device__ __forceinline__ void multiply_pair(float (&acc)[M][N][4], int n, const Fragment<4> (&a)[M],
                                              const unsigned int (&raw)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Fragment<2> b;
        b.set(0, raw[2 * half]);
        b.set(1, raw[2 * half + 1]);
#pragma unroll
        for (int m = 0; m < M; ++m) multiply_add<WITH_LOW_LOW>(acc[m][n + half], a[m], b);
    }
}

// acc [16 M, 8 N] += A [16 M, DIM] B [8 N, DIM]^T; rows in shared memory from the given addresses on.
template <int DIM, int UNROLLED = STEPS_UNROLLED, int M, int N>
__device__ __forceinline__ void multiply_nt(float (&acc)[M][N][4], unsigned int a_smem, unsigned int b_smem) {
    static_assert(N % 2 == 0);
    constexpr int PITCH = row_pitch(DIM);
    const int lane = threadIdx.x % 32;
    const unsigned int a_lane = a_smem + (lane % 16) * PITCH + (lane / 16) * 16;
    const unsigned int b_lane = b_smem + (lane % 8 + lane / 16 * 8) * PITCH + (lane / 8 % 2) * 16;
#pragma unroll UNROLLED
    for (int step = 0; step < padded_dim(DIM) / K_STEP; ++step) {
        Fragment<4> a[M];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            unsigned int raw[4];
            load_matrix_x4(raw, a_lane + m * 16 * PITCH + step * 32);
#pragma unroll
            for (int i = 0; i < 4; ++i) a[m].set(i, raw[i]);
        }
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned int raw[4];
            load_matrix_x4(raw, b_lane + n * 8 * PITCH + step * 32);
            multiply_pair<true>(acc, n, a, raw);
        }
    }
}

// P [16, 8 K] as a left operand: packed for 16-bit types, 16 columns a step; for float32, 8 columns a step, as it is.
template <int K>
struct AccumulatorOperand {
    unsigned int raw[8 * K / K_STEP][4];

    // Rows l/4 (half 0) or l/4 + 8 of lane l, from accumulators.
    __device__ __forceinline__ void set(int half, const float (&p)[K][4]) {
#pragma unroll
        for (int n = 0; n < K; ++n) {
            if constexpr (IS_FLOAT32) {  // contraction index t is column 2 t, and t + 4 is column 2 t + 1
                raw[n][half] = __float_as_uint(p[n][2 * half]);
                raw[n][2 + half] = __float_as_uint(p[n][2 * half + 1]);
            } else {
                unsigned int& word = raw[n / 2][n % 2 * 2 + half];
                word = pack(p[n][2 * half], p[n][2 * half + 1]);
                asm volatile("" : "+r"(word));  // now: the registers of a row are needed for the next
            }
        }
    }

    __device__ __forceinline__ void set(const float (&p)[K][4]) {
        set(0, p);
        set(1, p);
    }

    // Register r of accumulator tile n, as it was rounded to a 16-bit type.
    __device__ __forceinline__ float element(int n, int r) const {
        const float2 pair = unpack(raw[n / 2][n % 2 * 2 + r / 2]);
        return r % 2 ? pair.y : pair.x;
    }

    __device__ __forceinline__ Fragment<4> step(int i) const {
        Fragment<4> a;
#pragma unroll
        for (int j = 0; j < 4; ++j) a.set(j, raw[i][j]);
        return a;
    }
};

// acc [16 M, 8 N] += P [16 M, 8 K] B [8 K, 8 N]; B's rows of DIM elements in shared memory, from the given address on.
template <int DIM, int M, int K, int N>
__device__ __forceinline__ void multiply_nn(float (&acc)[M][N][4], const AccumulatorOperand<K> (&p)[M],
                                            unsigned int b_smem) {
    constexpr int PITCH = row_pitch(DIM);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < 8 * K / K_STEP; ++step) {
        Fragment<4> a[M];
#pragma unroll
        for (int m = 0; m < M; ++m) a[m] = p[m].step(step);
        if constexpr (IS_FLOAT32) {  // rows 2 t and 2 t + 1, column of the lane's group
            const unsigned int b_lane = b_smem + (8 * step + 2 * (lane % 4)) * PITCH + (lane / 4) * 4;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                Fragment<2> b;
                b.set(0, load_shared_word(b_lane + n * 32));
                b.set(1, load_shared_word(b_lane + n * 32 + PITCH));
#pragma unroll
                for (int m = 0; m < M; ++m) multiply_add<false>(acc[m][n], a[m], b);
            }
        } else {
            static_assert(N % 2 == 0);
            const unsigned int b_lane = b_smem + (16 * step + lane % 16) * PITCH + (lane / 16) * 16;
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                unsigned int raw[4];
                load_matrix_x4_transposed(raw, b_lane + n * 16);
                multiply_pair<false>(acc, n, a, raw);
            }
        }
    }
}

// acc [16 M, 8 N] += A [16 M, 16 STEPS] B [16 STEPS, 8 N], of 16-bit types, both operands in shared memory: A's rows,
// or TRANSPOSED its columns, A_PITCH bytes apart, B's rows of DIM elements as above.
template <int DIM, int STEPS, int A_PITCH, bool TRANSPOSED, int M, int N>
__device__ __forceinline__ void multiply_stored(float (&acc)[M][N][4], unsigned int a_smem, unsigned int b_smem) {
    static_assert(!IS_FLOAT32 && N % 2 == 0);
    constexpr int PITCH = row_pitch(DIM);
    const int lane = threadIdx.x % 32;
    const unsigned int a_lane = TRANSPOSED ? a_smem + (lane % 8 + lane / 16 * 8) * A_PITCH + (lane / 8 % 2) * 16
                                           : a_smem + (lane % 16) * A_PITCH + (lane / 16) * 16;
    const unsigned int b_lane = b_smem + (lane % 16) * PITCH + (lane / 16) * 16;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        Fragment<4> a[M];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            if constexpr (TRANSPOSED) {
                load_matrix_x4_transposed(a[m].hi, a_lane + step * 16 * A_PITCH + m * 32);
            } else {
                load_matrix_x4(a[m].hi, a_lane + m * 16 * A_PITCH + step * 32);
            }
        }
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            unsigned int raw[4];
            load_matrix_x4_transposed(raw, b_lane + step * 16 * PITCH + n * 16);
            multiply_pair<false>(acc, n, a, raw);
        }
    }
}

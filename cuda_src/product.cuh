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

// An operand of one step: for float32 split into two TF32 terms, x = hi + lo, which keep 23 of its 24 bits. (An
// infinity becomes NaN: inf - inf.)
template <int REGISTERS>
struct Fragment {
    unsigned int hi[REGISTERS];
    unsigned int lo[REGISTERS];  // unused unless THREE_TERMS

    __device__ __forceinline__ void set(int i, unsigned int raw) {
        if constexpr (IS_FLOAT32) {
            const float x = __uint_as_float(raw);
            hi[i] = round_to_tf32(x);
            if constexpr (THREE_TERMS) lo[i] = round_to_tf32(x - __uint_as_float(hi[i]));
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

// acc [16 M, 8 N] += A [16 M, DIM] B [8 N, DIM]^T; rows in shared memory from the given addresses on.
template <int DIM, int M, int N>
__device__ __forceinline__ void multiply_nt(float (&acc)[M][N][4], unsigned int a_smem, unsigned int b_smem) {
    static_assert(N % 2 == 0);
    constexpr int PITCH = row_pitch(DIM);
    const int lane = threadIdx.x % 32;
    const unsigned int a_lane = a_smem + (lane % 16) * PITCH + (lane / 16) * 16;
    const unsigned int b_lane = b_smem + (lane % 8 + lane / 16 * 8) * PITCH + (lane / 8 % 2) * 16;
#pragma unroll STEPS_UNROLLED
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
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Fragment<2> b;
                b.set(0, raw[2 * half]);
                b.set(1, raw[2 * half + 1]);
#pragma unroll
                for (int m = 0; m < M; ++m) multiply_add<true>(acc[m][n + half], a[m], b);
            }
        }
    }
}

// Step `step` of a product whose left operand is P: accumulators of 16 columns for 16-bit types, of 8 for float32.
template <int K>
__device__ __forceinline__ Fragment<4> accumulators_as_operand(const float (&p)[K][4], int step) {
    Fragment<4> a;
    if constexpr (IS_FLOAT32) {  // contraction index t is column 2 t, and t + 4 is column 2 t + 1
        a.set(0, __float_as_uint(p[step][0]));
        a.set(1, __float_as_uint(p[step][2]));
        a.set(2, __float_as_uint(p[step][1]));
        a.set(3, __float_as_uint(p[step][3]));
    } else {
        a.set(0, pack(p[2 * step][0], p[2 * step][1]));
        a.set(1, pack(p[2 * step][2], p[2 * step][3]));
        a.set(2, pack(p[2 * step + 1][0], p[2 * step + 1][1]));
        a.set(3, pack(p[2 * step + 1][2], p[2 * step + 1][3]));
    }
    return a;
}

// acc [16 M, 8 N] += P [16 M, 8 K] B [8 K, 8 N]; B's rows of DIM elements in shared memory, from the given address on.
template <int DIM, int M, int K, int N>
__device__ __forceinline__ void multiply_nn(float (&acc)[M][N][4], const float (&p)[M][K][4], unsigned int b_smem) {
    constexpr int PITCH = row_pitch(DIM);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < 8 * K / K_STEP; ++step) {
        Fragment<4> a[M];
#pragma unroll
        for (int m = 0; m < M; ++m) a[m] = accumulators_as_operand(p[m], step);
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
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Fragment<2> b;
                    b.set(0, raw[2 * half]);
                    b.set(1, raw[2 * half + 1]);
#pragma unroll
                    for (int m = 0; m < M; ++m) multiply_add<false>(acc[m][n + half], a[m], b);
                }
            }
        }
    }
}

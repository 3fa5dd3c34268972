// The two tile products of attention, for one warp. All five products of forward and backward are one of them:
//   multiply_nt: acc += A B^T, A and B rows in shared memory     S = Q K^T, dP = dO V^T and their transposes
//   multiply_nn: acc += P B, P the accumulators of the former    O = P V, dV = P^T dO, dK = dS^T Q, dQ = dS K
// P never leaves registers: an accumulator already has the layout of a left operand, but for an order of the
// contraction index that the right operand follows.
#pragma once
#include "element.cuh"
#include "mma.cuh"

constexpr bool IS_FLOAT32 = SPEC.dtype == Dtype::float32;
constexpr bool TWO_TERMS = IS_FLOAT32 && !SPEC.allow_tf32;
constexpr int STEPS_UNROLLED = IS_FLOAT32 && SPEC.head_dim > 128 ? 2 : 4;  // more takes registers

// A row in shared memory is padded with zeros to whole steps of every warp that shares it, and then to an odd number of
// 16-byte chunks, so that eight rows of one column of chunks lie in eight different groups of banks: no conflicts in
// any of the loads below.
__device__ constexpr int padded_dim(int dim) { return round_up(dim, 16 * TILE.split); }
__device__ constexpr int row_pitch(int dim) { return padded_dim(dim) * ELEMENT_BYTES + 16; }

// An operand of one step as the tensor cores take it, in 16-bit numbers: x, or for float32 its two terms (split.cuh).
struct Fragment {
    unsigned int hi[4];
    unsigned int lo[4];  // unused unless TWO_TERMS
};

// What the rows of a left operand are to be multiplied by, those of a lane; for float32 alone.
template <int M>
struct RowUnits {
    float of[M][2];

    __device__ __forceinline__ explicit RowUnits(float of_all = 1.0f) {
#pragma unroll
        for (int i = 0; i < M; ++i) of[i][0] = of[i][1] = of_all;
    }
};

// The bytes from a row's hi to its lo.
__device__ constexpr int term_distance(int dim) { return padded_dim(dim) * OPERAND_BYTES; }

// Four matrices at a lane's address in rows of DIM elements.
template <int DIM>
__device__ __forceinline__ void load_operand(Fragment& x, unsigned int smem_address) {
    load_matrix_x4(x.hi, smem_address);
    if constexpr (TWO_TERMS) load_matrix_x4(x.lo, smem_address + term_distance(DIM));
}

template <int DIM>
__device__ __forceinline__ void load_operand_transposed(Fragment& x, unsigned int smem_address) {
    load_matrix_x4_transposed(x.hi, smem_address);
    if constexpr (TWO_TERMS) load_matrix_x4_transposed(x.lo, smem_address + term_distance(DIM));
}

__device__ __forceinline__ void multiply_half(float (&acc)[4], const unsigned int (&a)[4], unsigned int b0,
                                              unsigned int b1) {
#if CUFLASH_ARCH >= 800
    mma_f16_m16n8k16(acc, a, b0, b1);
#else
    mma_f16_m16n8k8(acc, a[0], a[1], b0);
    mma_f16_m16n8k8(acc, a[2], a[3], b1);
#endif
}

// The product of one term of A, hi or lo, and one of B, added to its accumulator tiles.
template <bool A_LOW, bool B_LOW, int M>
__device__ __forceinline__ void multiply_terms(float (&step)[2][M][4], const Fragment (&a)[M], const Fragment& b) {
    const unsigned int (&of_b)[4] = B_LOW ? b.lo : b.hi;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            multiply_half(step[half][m], A_LOW ? a[m].lo : a[m].hi, of_b[2 * half], of_b[2 * half + 1]);
        }
    }
}

// Accumulator tiles n and n + 1 of acc [16 M, 8 N] += units A [16 M, K_STEP] B [K_STEP, 16], B as one load gave it.
template <int M, int N>
__device__ __forceinline__ void multiply_pair(float (&acc)[M][N][4], int n, const Fragment (&a)[M], const Fragment& b,
                                              const RowUnits<M>& units) {
    if constexpr (IS_FLOAT32) {
        // Tensor cores truncate when they accumulate: each step starts at zero and is added in float32. (What the
        // product of the low terms would add is less than a float32's last bit of the factors.)
        float step[2][M][4] = {};
        if constexpr (TWO_TERMS) {
            multiply_terms<true, false>(step, a, b);
            multiply_terms<false, true>(step, a, b);
        }
        multiply_terms<false, false>(step, a, b);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    acc[m][n + half][r] = fmaf(units.of[m][r / 2], step[half][m][r], acc[m][n + half][r]);
                }
            }
        }
    } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
                if constexpr (SPEC.dtype == Dtype::bfloat16) {
                    mma_bf16_m16n8k16(acc[m][n + half], a[m].hi, b.hi[2 * half], b.hi[2 * half + 1]);
                } else {
                    multiply_half(acc[m][n + half], a[m].hi, b.hi[2 * half], b.hi[2 * half + 1]);
                }
            }
        }
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
        Fragment a[M];
#pragma unroll
        for (int m = 0; m < M; ++m) load_operand<DIM>(a[m], a_lane + m * 16 * PITCH + step * 32);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            Fragment b;
            load_operand<DIM>(b, b_lane + n * 8 * PITCH + step * 32);
            multiply_pair(acc, n, a, b, RowUnits<M>());
        }
    }
}

// P [16, 8 K] as a left operand, packed, 16 columns a step.
template <int K>
struct AccumulatorOperand {
    Fragment steps[K / 2];

    // Rows l/4 (half 0) or l/4 + 8 of lane l, from accumulators; of float32 those up to 2^15.
    __device__ __forceinline__ void set(int half, const float (&p)[K][4]) {
#pragma unroll
        for (int n = 0; n < K; ++n) {
            const float x = p[n][2 * half], y = p[n][2 * half + 1];
            unsigned int& word = steps[n / 2].hi[n % 2 * 2 + half];
            if constexpr (IS_FLOAT32) {
                word = pack_half(x, y);
                if constexpr (TWO_TERMS) steps[n / 2].lo[n % 2 * 2 + half] = pack_rest(x, y, word);
            } else {
                word = pack(x, y);
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
        const float2 pair = unpack(steps[n / 2].hi[n % 2 * 2 + r / 2]);
        return r % 2 ? pair.y : pair.x;
    }
};

// acc [16 M, 8 N] += units P [16 M, 8 K] B [8 K, 8 N]; B's rows of DIM elements in shared memory, from the given
// address on.
template <int DIM, int M, int K, int N>
__device__ __forceinline__ void multiply_nn(float (&acc)[M][N][4], const AccumulatorOperand<K> (&p)[M],
                                            unsigned int b_smem, const RowUnits<M>& units = RowUnits<M>()) {
    static_assert(N % 2 == 0);
    constexpr int PITCH = row_pitch(DIM);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < 8 * K / K_STEP; ++step) {
        Fragment a[M];
#pragma unroll
        for (int m = 0; m < M; ++m) a[m] = p[m].steps[step];
        const unsigned int b_lane = b_smem + (16 * step + lane % 16) * PITCH + (lane / 16) * 16;
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            Fragment b;
            load_operand_transposed<DIM>(b, b_lane + n * 16);
            multiply_pair(acc, n, a, b, units);
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
        Fragment a[M];
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
            Fragment b;
            load_matrix_x4_transposed(b.hi, b_lane + step * 16 * PITCH + n * 16);
            multiply_pair(acc, n, a, b, RowUnits<M>());
        }
    }
}

// A bias and a mask [batch, heads, q_len, kv_len], each at any strides, 0 where it is broadcast: read into shared
// memory a tile at a time, for the score stage; and the gradient of the bias, written from there.
#pragma once
#include "element.cuh"
#include "params.cuh"
#include "scores.cuh"

// Whether dbias is summed in a fixed order: by one thread block for all that meets in an element, and not by atomics.
constexpr bool ORDERED = SPEC.bias && SPEC.deterministic;

// Whether anybody asks for dbias.
__device__ __forceinline__ bool wants_gradient(const Params& p) {
    return p.dbias.data != nullptr || p.dbias_sum != nullptr;
}

constexpr int DENSE_PITCH = TILE.cols + 4;
constexpr int DENSE_BYTES = DENSE ? 4 * TILE.rows * DENSE_PITCH : 0;
constexpr int GRADIENT_ROW = TILE.split > 1 ? TILE.rows : 0;  // where a tile of dS starts

__device__ __forceinline__ long long dense_index(const DenseArray& array, int batch, int head, int row, int col) {
    return batch * array.batch_stride + head * array.head_stride + row * array.row_stride + col * array.col_stride;
}

// A tile of one head, [rows, cols] float32 in shared memory, from row q_first and column kv_first on.
struct DenseTile {
    float* smem;

    __device__ __forceinline__ float& at(int row, int col) const { return smem[row * DENSE_PITCH + col]; }

    // What is added to a score.
    __device__ __forceinline__ float addend(int row, int col) const {
        if constexpr (DENSE) return at(row, col);
        return 0.0f;
    }

    // The addends, for everyone: UNIT bias, or -inf where masked.
    __device__ __forceinline__ void load(const Params& p, int batch, int head, int q_first, int kv_first) const {
#pragma unroll 4
        for (int i = threadIdx.x; i < TILE.rows * TILE.cols; i += THREADS) {
            const int row = i / TILE.cols, col = i % TILE.cols;
            const int q_index = q_first + row, kv_index = kv_first + col;
            float x = 0.0f;
            if (q_index < p.q_len && kv_index < p.kv_len) {
                if constexpr (SPEC.bias) {
                    const long long index = dense_index(p.bias, batch, head, q_index, kv_index);
                    x = UNIT * load_scalar(p.bias.data, index, p.bias_float32);
                }
                if constexpr (SPEC.mask) {
                    const long long index = dense_index(p.mask, batch, head, q_index, kv_index);
                    if (!static_cast<const unsigned char*>(p.mask.data)[index]) x = MINUS_INFINITY;
                }
            }
            at(row, col) = x;
        }
        __syncthreads();
    }

    // dS of an element, zero where masked, to be put into dbias. It takes the place of the addend, unless warps that
    // share rows may still have to read that.
    __device__ __forceinline__ float& gradient(int row, int col) const { return at(GRADIENT_ROW + row, col); }

    // A tile of dS goes to dbias: each element is stored or, where the bias is broadcast, added to its sum.
    __device__ __forceinline__ void put_gradient(const Params& p, int batch, int head, int q_first,
                                                 int kv_first) const {
        const bool one_row = p.dbias.row_stride == 0, one_col = p.dbias.col_stride == 0;
        if (one_row) {  // the sum of all rows, in the first
            for (int col = threadIdx.x; col < TILE.cols; col += THREADS) {
                float sum = 0.0f;
#pragma unroll 8
                for (int row = 0; row < TILE.rows; ++row) sum += gradient(row, col);
                gradient(0, col) = sum;
            }
            __syncthreads();
        }
        const int rows = one_row ? 1 : min(TILE.rows, p.q_len - q_first);
        if (one_col) {
            for (int row = threadIdx.x; row < rows; row += THREADS) {
                float sum = 0.0f;
#pragma unroll 8
                for (int col = 0; col < TILE.cols; ++col) sum += gradient(row, col);
                gradient(row, 0) = sum;
            }
            __syncthreads();
        }
        const int cols = one_col ? 1 : min(TILE.cols, p.kv_len - kv_first);
        for (int i = threadIdx.x; i < rows * TILE.cols; i += THREADS) {
            const int row = i / TILE.cols, col = i % TILE.cols;
            if (col >= cols) continue;
            put_element(p, dense_index(p.dbias, batch, head, q_first + row, kv_first + col), gradient(row, col));
        }
    }

    static __device__ __forceinline__ void put_element(const Params& p, long long index, float ds) {
        if (p.dbias_sum == nullptr) {
            if (p.bias_float32) {
                static_cast<float*>(p.dbias.data)[index] = ds;
            } else {
                from_float(static_cast<Element*>(p.dbias.data)[index], ds);
            }
        } else if constexpr (ORDERED) {
            p.dbias_sum[index] += ds;
        } else {
            atomicAdd(p.dbias_sum + index, ds);
        }
    }
};

// Zeros in dbias, where its elements are stored: for keys of [kv_first, kv_last) that no query of these rows may attend
// to.
__device__ __forceinline__ void clear_gradient(const Params& p, int batch, int head, int q_first, int rows,
                                               int kv_first, int kv_last) {
    for (int row = q_first; row < q_first + rows; ++row) {
        for (int col = kv_first + threadIdx.x; col < kv_last; col += THREADS) {
            DenseTile::put_element(p, dense_index(p.dbias, batch, head, row, col), 0.0f);
        }
    }
}

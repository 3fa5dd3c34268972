// Tiles from global to shared memory, asynchronous on sm_80 and newer, through registers on sm_75; and accumulators
// from registers to global memory.
#pragma once
#include "params.cuh"
#include "product.cuh"

__device__ __forceinline__ unsigned int shared_address(const void* pointer) {
    return static_cast<unsigned int>(__cvta_generic_to_shared(pointer));
}

#if CUFLASH_ARCH >= 800
// 16 bytes, of which the first `bytes` are read and the others become zero. What else is in their 128 bytes is about to
// be read too.
__device__ __forceinline__ void copy_async_16(unsigned int smem_address, const void* gmem, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_address), "l"(gmem), "r"(bytes));
}

// 4 bytes, or zero.
__device__ __forceinline__ void copy_async_4(unsigned int smem_address, const void* gmem, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem_address), "l"(gmem), "r"(bytes));
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;"); }

// Wait until at most PENDING of the latest committed groups are under way.
template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#else
__device__ __forceinline__ void copy_async_16(unsigned int smem_address, const void* gmem, int bytes) {
    const uint4 value = bytes > 0 ? *static_cast<const uint4*>(gmem) : make_uint4(0, 0, 0, 0);
    store_shared(smem_address, value.x, value.y, value.z, value.w);
}

__device__ __forceinline__ void copy_async_4(unsigned int smem_address, const void* gmem, int bytes) {
    const unsigned int value = bytes > 0 ? *static_cast<const unsigned int*>(gmem) : 0;
    store_shared_word(smem_address, value);
}

__device__ __forceinline__ void copy_async_commit() {}

template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {}
#endif

// The address of row 0 of one head of one sequence.
__device__ __forceinline__ Element* head_rows(const Tensor& tensor, int batch, long long row, int head) {
    return static_cast<Element*>(tensor.data) + batch * tensor.batch_stride + row * tensor.row_stride +
           head * tensor.head_stride;
}

// X_smem [ROWS, padded DIM] = the rows at row_of(0) to row_of(rows - 1), zero from `rows` on: rows outside a sequence
// are never read.
template <int ROWS, int DIM, typename RowOf>
__device__ __forceinline__ void load_rows(unsigned int X_smem, RowOf row_of, int rows) {
    constexpr int CHUNKS = padded_dim(DIM) / CHUNK;  // 16-byte chunks a row
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS;
        const int col = i % CHUNKS * CHUNK;
        const Element* source = row_of(row) + col;
        const unsigned int target = X_smem + row * row_pitch(DIM) + col * ELEMENT_BYTES;
        if constexpr (TILE.vector == 16) {
            const bool inside = row < rows && col < DIM;
            copy_async_16(target, inside ? source : row_of(0), inside ? 16 : 0);
        } else {  // rows that are not aligned: an element at a time
            Element chunk[CHUNK];
#pragma unroll
            for (int j = 0; j < CHUNK; ++j) {
                if (row < rows && col + j < DIM) {
                    chunk[j] = source[j];
                } else {
                    from_float(chunk[j], 0.0f);
                }
            }
            uint4 value;
            memcpy(&value, chunk, 16);
            store_shared(target, value.x, value.y, value.z, value.w);
        }
    }
}

// The same of rows that are row_stride apart. (Not by a RowStream: predicates here would take registers from loops.)
template <int ROWS, int DIM>
__device__ __forceinline__ void load_tile(unsigned int X_smem, const Element* X_gmem, long long row_stride, int rows) {
    constexpr int CHUNKS = padded_dim(DIM) / CHUNK;
    if constexpr (TILE.vector == 16 && padded_dim(DIM) == DIM && THREADS % CHUNKS == 0) {
        if (rows >= ROWS) {  // a thread copies one column of chunks, and nothing has to be asked
            constexpr int STEP = THREADS / CHUNKS;
            const int first = threadIdx.x / CHUNKS, col = threadIdx.x % CHUNKS * CHUNK;
            const Element* source = X_gmem + first * row_stride + col;
            const unsigned int target = X_smem + first * row_pitch(DIM) + col * ELEMENT_BYTES;
#pragma unroll
            for (int row = 0; row < ROWS; row += STEP) {
                if (ROWS % STEP == 0 || first + row < ROWS) copy_async_16(target + row * row_pitch(DIM), source, 16);
                source += STEP * row_stride;
            }
            return;
        }
    }
    load_rows<ROWS, DIM>(X_smem, [=](int row) { return X_gmem + row * row_stride; }, rows);
}

// Tiles of ROWS rows of one head on their way to shared memory, one after the other.
template <int ROWS, int DIM>
struct RowStream {
    static constexpr int CHUNKS = padded_dim(DIM) / CHUNK, STEP = THREADS / CHUNKS;
    // Whether a thread copies one column of chunks, so that its place in the next tile is where it is done with this.
    static constexpr bool BY_COLUMN =
        TILE.vector == 16 && padded_dim(DIM) == DIM && THREADS % CHUNKS == 0 && ROWS % STEP == 0;

    const Element* next;  // row 0 of the next tile, or this thread's first chunk of it

    __device__ __forceinline__ RowStream(const Element* X_gmem, long long row_stride) : next(X_gmem) {
        if constexpr (BY_COLUMN) next += threadIdx.x / CHUNKS * row_stride + threadIdx.x % CHUNKS * CHUNK;
    }

    // X_smem [ROWS, padded DIM] = the next tile, zero from `rows` on.
    __device__ __forceinline__ void load(unsigned int X_smem, long long row_stride, int rows) {
        if constexpr (BY_COLUMN) {
            const int first = threadIdx.x / CHUNKS;
            const unsigned int target = X_smem + first * row_pitch(DIM) + threadIdx.x % CHUNKS * 16;
#pragma unroll
            for (int row = 0; row < ROWS; row += STEP) {
                copy_async_16(target + row * row_pitch(DIM), next, row < rows - first ? 16 : 0);
                next += STEP * row_stride;
            }
        } else {
            const Element* first = next;
            load_rows<ROWS, DIM>(X_smem, [=](int row) { return first + row * row_stride; }, rows);
            next += ROWS * row_stride;
        }
    }
};

// The statistic's address of row 0 of one head of one sequence.
__device__ __forceinline__ float* statistic_rows(const RowStatistic& statistic, int batch, long long row, int head) {
    return statistic.data + batch * statistic.batch_stride + head * statistic.head_stride + row;
}

// x_smem [ROWS] = x_gmem [rows], zero from `rows` on.
template <int ROWS>
__device__ __forceinline__ void load_statistic(unsigned int x_smem, const float* x_gmem, int rows) {
#pragma unroll
    for (int first = 0; first < ROWS; first += THREADS) {
        const int row = first + threadIdx.x;
        const bool inside = row < rows;
        if (row < ROWS) copy_async_4(x_smem + 4 * row, inside ? x_gmem + row : x_gmem, inside ? 4 : 0);
    }
}

// One step of a ring of TILE.stages buffers: waits until tile `i` is there for everyone, and everyone is done with the
// buffer of the tile before; `load(j)` then fills the next one. The first TILE.stages - 1 tiles are loaded before.
// `arrived` is called when this thread's copies of the tile are there, and before everyone waits for everyone.
template <typename Load, typename Arrived>
__device__ __forceinline__ void advance_ring(int i, Load load, Arrived arrived) {
    if constexpr (TILE.stages == 1) {
        __syncthreads();
        load(i);
        copy_async_wait<0>();
        arrived();
        __syncthreads();
    } else {
        copy_async_wait<TILE.stages - 2>();
        arrived();
        __syncthreads();
        load(i + TILE.stages - 1);
    }
}

// Word i of lane c of every four neighbours becomes word c of lane i.
__device__ __forceinline__ void transpose_quad(unsigned int (&word)[4]) {
    const bool odd = threadIdx.x % 2, upper = threadIdx.x / 2 % 2;
    const unsigned int a = __shfl_xor_sync(0xFFFFFFFF, odd ? word[0] : word[1], 1);
    const unsigned int b = __shfl_xor_sync(0xFFFFFFFF, odd ? word[2] : word[3], 1);
    word[0] = odd ? a : word[0];
    word[1] = odd ? word[1] : a;
    word[2] = odd ? b : word[2];
    word[3] = odd ? word[3] : b;
    const unsigned int c = __shfl_xor_sync(0xFFFFFFFF, upper ? word[0] : word[2], 2);
    const unsigned int d = __shfl_xor_sync(0xFFFFFFFF, upper ? word[1] : word[3], 2);
    word[0] = upper ? c : word[0];
    word[1] = upper ? d : word[1];
    word[2] = upper ? word[2] : c;
    word[3] = upper ? word[3] : d;
}

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
    T x, y;
};

// Y_gmem [rows, DIM] = Y, accumulators [16, 8 N] of one warp whose column 0 is column `first_col` of the row; `scale`
// holds one factor for each of the lane's two rows. Y_gmem points to the warp's row 0; Out is Element or float.
template <int DIM, typename Out, int N>
__device__ __forceinline__ void store_accumulators(Out* Y_gmem, long long row_stride, int rows, int first_col,
                                                   const float (&acc)[N][4], const float (&scale)[2], bool accumulate) {
    const int lane = threadIdx.x % 32;
    if constexpr (TILE.vector == 16 && sizeof(Out) == 2 && N % 4 == 0) {
        if (!accumulate) {  // the four lanes of a row exchange their pairs, so that each stores 16 bytes
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = lane / 4 + 8 * half;
                Out* row_gmem = Y_gmem + row * row_stride;
#pragma unroll
                for (int n = 0; n < N; n += 4) {
                    unsigned int word[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        word[i] = pack(acc[n + i][2 * half] * scale[half], acc[n + i][2 * half + 1] * scale[half]);
                    }
                    transpose_quad(word);
                    const int col = first_col + 8 * (n + lane % 4);
                    if (row < rows && col < DIM) {
                        *reinterpret_cast<uint4*>(row_gmem + col) = make_uint4(word[0], word[1], word[2], word[3]);
                    }
                }
            }
            return;
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + 8 * half;
        if (row >= rows) continue;
        Out* row_gmem = Y_gmem + row * row_stride;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const int col = first_col + 8 * n + lane % 4 * 2;
            float x = acc[n][2 * half] * scale[half], y = acc[n][2 * half + 1] * scale[half];
            if constexpr (TILE.vector == 16) {  // rows are aligned and DIM is even: two elements at a time
                if (col < DIM) {
                    Pair<Out>* target = reinterpret_cast<Pair<Out>*>(row_gmem + col);
                    if (accumulate) {
                        x += to_float(target->x);
                        y += to_float(target->y);
                    }
                    Pair<Out> pair;
                    from_float(pair.x, x);
                    from_float(pair.y, y);
                    *target = pair;
                }
            } else {
                if (col < DIM) from_float(row_gmem[col], accumulate ? to_float(row_gmem[col]) + x : x);
                if (col + 1 < DIM) from_float(row_gmem[col + 1], accumulate ? to_float(row_gmem[col + 1]) + y : y);
            }
        }
    }
}

// A gradient's tile, in the dtype of q or in float32.
template <int DIM, int N>
__device__ __forceinline__ void store_gradient(const Tensor& tensor, bool is_float32, int batch, long long row,
                                               int head, int rows, int first_col, const float (&acc)[N][4], float scale,
                                               bool accumulate) {
    const long long offset = batch * tensor.batch_stride + row * tensor.row_stride + head * tensor.head_stride;
    const float factors[2] = {scale, scale};
    if (is_float32) {
        store_accumulators<DIM>(static_cast<float*>(tensor.data) + offset, tensor.row_stride, rows, first_col, acc,
                                factors, accumulate);
    } else {
        store_accumulators<DIM>(static_cast<Element*>(tensor.data) + offset, tensor.row_stride, rows, first_col, acc,
                                factors, accumulate);
    }
}

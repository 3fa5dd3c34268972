// Unit kernels over the headers of primitives, each one thread block, run by test_primitives.py against NumPy.
#include "barrier.cuh"
#include "copy.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int D = SPEC.head_dim;
constexpr int A_PANEL = 64 * 128, B_PANEL = TILE.cols * 128;  // bytes of 64 columns
constexpr int A_BYTES = D / 64 * A_PANEL, B_BYTES = D / 64 * B_PANEL;

// acc[n][r] is element (row, col) of the product.
__device__ __forceinline__ int element_row(int r) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + r / 2 * 8; }

__device__ __forceinline__ int element_col(int n, int r) { return 8 * n + threadIdx.x % 4 * 2 + r % 2; }

// A barrier that one thread has initialised for `arrivals`, at `barrier`.
__device__ __forceinline__ void start_barrier(unsigned int barrier, int arrivals) {
    if (threadIdx.x == 0) {
        barrier_init(barrier, arrivals);
        fence_barrier_init();
    }
    __syncthreads();
}

// X [64, cols] = A B^T, A [64, D] and B [cols, D] through TMA, both K-major in shared memory. 128 threads.
extern "C" __global__ void __launch_bounds__(128, 1)
    product_of_shared(const __grid_constant__ TensorMap A_map, const __grid_constant__ TensorMap B_map, float* X) {
    extern __shared__ __align__(1024) unsigned char smem[];
    const unsigned int A_smem = shared_address(smem), B_smem = A_smem + A_BYTES, barrier = B_smem + B_BYTES;
    start_barrier(barrier, 1);
    if (threadIdx.x == 0) {
        barrier_expect(barrier, A_BYTES + B_BYTES);
        load_panels<D, A_PANEL>(A_smem, A_map, barrier, 0, 0, 0, EVICT_FIRST);
        load_panels<D, B_PANEL>(B_smem, B_map, barrier, 0, 0, 0, EVICT_LAST);
    }
    barrier_wait(barrier, 0);
    float acc[TILE.cols / 8][4];
    const unsigned long long A = tile_descriptor(A_smem, 16), B = tile_descriptor(B_smem, 16);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        const int in_panel = step % 4 * 2;
        wgmma_ss<K_MAJOR>(acc, A + step / 4 * (A_PANEL / 16) + in_panel, B + step / 4 * (B_PANEL / 16) + in_panel,
                          step > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(acc);
#pragma unroll
    for (int n = 0; n < TILE.cols / 8; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) X[element_row(r) * TILE.cols + element_col(n, r)] = acc[n][r];
    }
}

// X [64, D] = A B, A [64, cols] float32 from memory to registers and B [cols, D] through TMA, MN-major. 128 threads.
extern "C" __global__ void __launch_bounds__(128, 1)
    product_of_registers(const float* A_gmem, const __grid_constant__ TensorMap B_map, float* X) {
    extern __shared__ __align__(1024) unsigned char smem[];
    const unsigned int B_smem = shared_address(smem), barrier = B_smem + B_BYTES;
    start_barrier(barrier, 1);
    if (threadIdx.x == 0) {
        barrier_expect(barrier, B_BYTES);
        load_panels<D, B_PANEL>(B_smem, B_map, barrier, 0, 0, 0, EVICT_LAST);
    }
    float left[TILE.cols / 8][4];
#pragma unroll
    for (int n = 0; n < TILE.cols / 8; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) left[n][r] = A_gmem[element_row(r) * TILE.cols + element_col(n, r)];
    }
    unsigned int A[TILE.cols / 16][4];
    pack_all(A, left);
    barrier_wait(barrier, 0);
    float acc[D / 8][4];
    const unsigned long long B = tile_descriptor(B_smem, B_PANEL);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < TILE.cols / 16; ++step) wgmma_rs<MN_MAJOR>(acc, A[step], B + step * 128, step > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(acc);
    pin(A);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) X[element_row(r) * D + element_col(n, r)] = acc[n][r];
    }
}

// X = the bytes in shared memory of the tile [cols, D] from row `row` of head 1 of batch 1 on, panel after panel.
extern "C" __global__ void load_tile(const __grid_constant__ TensorMap map, int row, unsigned int* X) {
    extern __shared__ __align__(1024) unsigned char smem[];
    const unsigned int tile_smem = shared_address(smem), barrier = tile_smem + B_BYTES;
    start_barrier(barrier, 1);
    if (threadIdx.x == 0) {
        barrier_expect(barrier, B_BYTES);
        load_panels<D, B_PANEL>(tile_smem, map, barrier, row, 1, 1, EVICT_FIRST);
    }
    barrier_wait(barrier, 0);
    for (int i = threadIdx.x; i < B_BYTES / 4; i += blockDim.x) X[i] = load_shared_word(tile_smem + 4 * i);
}

// The tile [16, D] from row `row` of head 1 of batch 1 on = X, through registers and stmatrix. One warp.
extern "C" __global__ void store_tile(const float* X, const __grid_constant__ TensorMap map, int row) {
    extern __shared__ __align__(1024) unsigned char smem[];
    constexpr int PANEL = 16 * 128;
    const int lane = threadIdx.x;
    const unsigned int tile_smem = shared_address(smem);
    const unsigned int lane_smem = tile_smem + lane % 16 * 128 + (lane / 16 ^ lane % 8) * 16;
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
        unsigned int words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* pair = X + element_row(i % 2 * 2) * D + element_col(n + i / 2, 0);
            words[i] = pack(pair[0], pair[1]);
        }
        store_matrix_x4((lane_smem ^ n % 8 * 16) + n / 8 * PANEL, words);
    }
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
        store_panels<D, PANEL>(map, tile_smem, row, 1, 1);
        bulk_commit();
        bulk_wait_read();
    }
}

// X += Y for 1,024 float32. Any number of blocks.
extern "C" __global__ void add_in_bulk(float* X, const float* Y) {
    extern __shared__ __align__(1024) unsigned char smem[];
    float* Y_smem = reinterpret_cast<float*>(smem);
    for (int i = threadIdx.x; i < 1024; i += blockDim.x) Y_smem[i] = Y[i];
    fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 0) {
        reduce_add_bulk(X, shared_address(smem), 4096);
        bulk_commit();
        bulk_wait();
    }
}

// Numbers 0 to count - 1 through a ring of TILE.stages slots: thread 0 puts, the other warps' first lanes take and sum.
// X[warp - 1] is the sum. 128 threads.
extern "C" __global__ void pass_through_ring(int count, int* X) {
    extern __shared__ __align__(1024) unsigned char smem[];
    const unsigned int slots = shared_address(smem), barriers = slots + 16 * TILE.stages;
    auto full = [&](int stage) { return barriers + 16 * stage; };
    auto empty = [&](int stage) { return barriers + 16 * stage + 8; };
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < TILE.stages; ++stage) {
            barrier_init(full(stage), 1);
            barrier_init(empty(stage), 3);
        }
        fence_barrier_init();
    }
    __syncthreads();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 != 0) return;
    Ring<> ring;
    int sum = 0;
    for (int i = 0; i < count; ++i) {
        if (warp == 0) {
            barrier_wait(empty(ring.stage), ring.parity ^ 1);
            store_shared_word(slots + 16 * ring.stage, i);
            barrier_arrive(full(ring.stage));
        } else {
            barrier_wait(full(ring.stage), ring.parity);
            sum += load_shared_word(slots + 16 * ring.stage);
            barrier_arrive(empty(ring.stage));
        }
        ring.advance();
    }
    if (warp > 0) X[warp - 1] = sum;
}

// X[i] = whether all 128 threads voted yes in vote i, as thread 0 (even i) or thread 127 (odd i) was told; thread
// `who[i]` votes no.
extern "C" __global__ void vote(const int* who, int votes, int* X) {
    for (int i = 0; i < votes; ++i) {
        const bool all = named_barrier_all(1 + i % 3, 128, who[i] != static_cast<int>(threadIdx.x));
        if (threadIdx.x == (i % 2 == 0 ? 0 : 127)) X[i] = all;
    }
}

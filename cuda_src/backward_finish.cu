// Backward, last step of the Hopper kernels: dQ = scale times the sum that backward_hopper.cu left, in the dtype and at
// the strides of dQ. One thread block a piece [64, 64], which stands in the order of accumulators: float 4 (128 j + t)
// + r of it is register r of thread t's accumulator tile j, in row 16 (t / 32) + t % 32 / 4 + 8 (r / 2) and column
// 8 j + 2 (t % 4) + r % 2.
#include "copy.cuh"
#include "schedule.cuh"

constexpr int D = round_up(SPEC.head_dim, 64), PIECE = 64 * 64;
constexpr int R = 2 * PIECE / D;  // queries a tile of backward_hopper.cu, which makes two pieces of it

// Eight neighbouring columns of one row.
template <typename Out>
__device__ __forceinline__ void store_columns(Out* target, const float (&x)[8], bool accumulate) {
    struct alignas(TILE.vector == 16 ? 16 : sizeof(Out)) Columns {
        Out x[8];
    };
    Columns& columns = *reinterpret_cast<Columns*>(target);
    Columns sum;
    if (accumulate) sum = columns;
#pragma unroll
    for (int i = 0; i < 8; ++i) from_float(sum.x[i], accumulate ? to_float(sum.x[i]) + x[i] : x[i]);
    columns = sum;
}

KERNEL(backward_finish, 0)(ARGUMENT(Params) p) {
    // The pieces of a head in turn, those across its columns fastest.
    const long long piece = blockIdx.x;
    const int panel = piece % (D / 64), block = piece / (D / 64) % p.q_tiles;
    const int pair = piece / (D / 64) / p.q_tiles, head = pair % p.heads, batch = pair / p.heads;
    // Packed, p.q_tiles blocks of 64 rows are the tiles of all sequences, and of none.
    long long start = 0;
    int first = 64 * block, q_len = p.q_len;
    if constexpr (SPEC.packed) {
        const Work work = find_work<R, false>(p, block * 64 / R, p.q_tiles * 64 / R, 1);
        if (!work.exists) return;
        start = work.sequence.q_start;
        first = work.tile * R + block * 64 % R;
        q_len = work.sequence.q_len;
    }
    const float4* sum_gmem = reinterpret_cast<const float4*>(p.dq_sum + piece * PIECE);
    const int warp = threadIdx.x / 32, j = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int quad = threadIdx.x % 32 / 8 + 4 * i;  // four lanes that hold two rows of tile j
        float x[2][8];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float4 sum = sum_gmem[128 * j + 32 * warp + 4 * quad + c];
            x[0][2 * c] = sum.x * p.scale;
            x[0][2 * c + 1] = sum.y * p.scale;
            x[1][2 * c] = sum.z * p.scale;
            x[1][2 * c + 1] = sum.w * p.scale;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first + 16 * warp + quad + 8 * half;
            if (row >= q_len || 64 * panel + 8 * j >= SPEC.head_dim) continue;
            const long long offset = batch * p.dq.batch_stride + (start + row) * p.dq.row_stride +
                                     head * p.dq.head_stride + 64 * panel + 8 * j;
            if (p.dq_float32) {
                store_columns(static_cast<float*>(p.dq.data) + offset, x[half], p.accumulate);
            } else {
                store_columns(static_cast<Element*>(p.dq.data) + offset, x[half], p.accumulate);
            }
        }
    }
}

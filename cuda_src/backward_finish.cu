// Backward, last step: dQ = scale times the sum that backward_hopper.cu or backward_portable.cu left, in tiles of
// TILE.rows queries, in the dtype and at the strides of dQ. One thread block a piece [64, 64] of it, which stands in
// the order of accumulators (query_sum.cuh): register r of lane t of accumulator tile (i, j) is in row 16 i + t / 4 +
// 8 (r / 2) and column 8 j + 2 (t % 4) + r % 2.
#include "query_sum.cuh"

constexpr int D = round_up(SPEC.head_dim, 64);
constexpr int R = TILE.rows;

// Eight neighbouring columns of one row, of which the first `columns` exist.
template <typename Out>
__device__ __forceinline__ void store_columns(Out* target, const float (&x)[8], int columns, bool accumulate) {
    if constexpr (SPEC.head_dim % 8 == 0) {
        struct alignas(TILE.vector == 16 ? 16 : sizeof(Out)) Columns {
            Out x[8];
        };
        Columns& all = *reinterpret_cast<Columns*>(target);
        Columns sum;
        if (accumulate) sum = all;
#pragma unroll
        for (int i = 0; i < 8; ++i) from_float(sum.x[i], accumulate ? to_float(sum.x[i]) + x[i] : x[i]);
        all = sum;
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i < columns) from_float(target[i], accumulate ? to_float(target[i]) + x[i] : x[i]);
        }
    }
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
    const float4* sum_gmem = reinterpret_cast<const float4*>(p.dq_sum + piece * PIECE_SIZE);
    const int warp = threadIdx.x / 32, j = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int quad = threadIdx.x % 32 / 8 + 4 * i;  // four lanes that hold two rows of tile j
        float x[2][8];
#pragma unroll
        for (int c = 0; c < 4; ++c) {  // the four registers of a lane, or one of the four lanes
            const float4 sum = sum_gmem[128 * j + 32 * warp + (LANES_APART ? 4 * quad + c : quad + 8 * c)];
            const float four[4] = {sum.x * p.scale, sum.y * p.scale, sum.z * p.scale, sum.w * p.scale};
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                const int lane = LANES_APART ? c : u, r = LANES_APART ? u : c;
                x[r / 2][2 * lane + r % 2] = four[u];
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first + 16 * warp + quad + 8 * half;
            const int col = 64 * panel + 8 * j, columns = SPEC.head_dim - col;
            if (row >= q_len || columns <= 0) continue;
            const long long offset =
                batch * p.dq.batch_stride + (start + row) * p.dq.row_stride + head * p.dq.head_stride + col;
            if (p.dq_float32) {
                store_columns(static_cast<float*>(p.dq.data) + offset, x[half], columns, p.accumulate);
            } else {
                store_columns(static_cast<Element*>(p.dq.data) + offset, x[half], columns, p.accumulate);
            }
        }
    }
}

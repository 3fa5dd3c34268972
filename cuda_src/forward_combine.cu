// The forward of few queries, last step: O and LSE of a row from what was summed over the parts of its keys,
//   m = max m_i,   l = sum_i e^(m_i - m) l_i,   O = sum_i e^(m_i - m) O_i / l,   LSE = m + ln l.
// One thread block a row, a thread a part. The order of the sums is fixed: bitwise reproducible.
#include "copy.cuh"
#include "partial.cuh"
#include "softmax.cuh"

constexpr int DV = SPEC.head_dim_v;

// The x of all threads joined; everyone gets it.
template <typename Join>
__device__ __forceinline__ float over_block(float x, Join join) {
    __shared__ float of_warp[TILE.warps];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x = join(x, __shfl_xor_sync(0xFFFFFFFF, x, distance));
    __syncthreads();  // everyone has read what was there
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warp[0];
#pragma unroll
    for (int warp = 1; warp < TILE.warps; ++warp) x = join(x, of_warp[warp]);
    return x;
}

KERNEL(forward_combine, 0)(ARGUMENT(Params) p) {
    __shared__ float weights[TILE.cols];  // e^(m_i - m)
    static_assert(TILE.cols == THREADS);
    const int rows = p.q_len * p.group;  // of a kv head
    const unsigned int kv_pair = blockIdx.x / rows, row = blockIdx.x - kv_pair * rows;
    const unsigned int kv_heads = p.heads / p.group, batch = kv_pair / kv_heads, kv_head = kv_pair - batch * kv_heads;
    const unsigned int q_index = row / p.group, head = kv_head * p.group + row % p.group;
    const Partial partial(p, batch, kv_head);
    const int part = threadIdx.x;

    const float2 of_part =
        part < p.parts ? partial.statistics[partial.place(row, part)] : make_float2(MINUS_INFINITY, 0.0f);
    const float m = over_block(of_part.x, [](float x, float y) { return fmaxf(x, y); });
    const float weight = exponential(of_part.x - m);
    weights[part] = weight;
    const float l = over_block(weight * of_part.y, [](float x, float y) { return x + y; });
    float sink = MINUS_INFINITY, lse;
    if constexpr (SPEC.sinks) sink = load_scalar(p.sinks, head * p.sinks_stride, p.sinks_float32);
    const float scale = finish_row(m, l, sink, lse);
    if (p.lse.data != nullptr && threadIdx.x == 0) statistic_rows(p.lse, batch, q_index, head)[0] = lse;

    // Each warp sums every WARPS-th part, a lane some columns; then the warps' sums are added.
    constexpr int WARPS = TILE.warps, WIDTH = DV % 2 == 0 ? 2 : 1, GROUPS = ceil_div(DV, 32 * WIDTH);
    __shared__ float sums[WARPS][DV];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* O_parts = partial.O + partial.place(row, 0) * DV;
    float sum[GROUPS][WIDTH] = {};
#pragma unroll 8
    for (int i = warp; i < p.parts; i += WARPS) {
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            const int col = (32 * group + lane) * WIDTH;
            if (col >= DV) continue;
            float x[WIDTH];
            memcpy(x, __builtin_assume_aligned(O_parts + i * DV + col, sizeof x), sizeof x);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) sum[group][j] += weights[i] != 0.0f ? weights[i] * x[j] : 0.0f;
        }
    }
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            const int col = (32 * group + lane) * WIDTH + j;
            if (col < DV) sums[warp][col] = sum[group][j];
        }
    }
    __syncthreads();
    Element* O_gmem = head_rows(p.out, batch, q_index, head);
    for (int col = threadIdx.x; col < DV; col += THREADS) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) total += sums[i][col];
        from_float(O_gmem[col], total * scale);
    }
}

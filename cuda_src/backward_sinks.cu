// Backward of the sinks: dsink = -sum over rows of exp(sink - LSE) D, one thread block a head, in a fixed order.
#include "copy.cuh"
#include "schedule.cuh"
#include "scores.cuh"

KERNEL(backward_sinks, TILE.blocks)(ARGUMENT(Params) p) {
    __shared__ float partial[TILE.warps];
    const int head = blockIdx.x;
    const float sink = load_scalar(p.sinks, head * p.sinks_stride, p.sinks_float32);
    // Rows after the last boundary of packed sequences belong to no sequence.
    const int rows = SPEC.packed ? static_cast<int>(boundary(p, p.cu_seqlens_q, p.batch)) : p.q_len;
    const int batches = SPEC.packed ? 1 : p.batch;
    float sum = 0.0f;
    for (int batch = 0; batch < batches; ++batch) {
        const float* lse = statistic_rows(p.lse, batch, 0, head);
        const float* delta = statistic_rows(p.delta, batch, 0, head);
        for (int row = threadIdx.x; row < rows; row += THREADS) {
            const float reference = lse[row] == MINUS_INFINITY ? 0.0f : lse[row];
            sum -= exp2_approximate((sink - reference) * LOG2_E) * delta[row];
        }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, distance);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0.0f;
        for (int warp = 0; warp < TILE.warps; ++warp) sum += partial[warp];
        if (p.sinks_float32) {
            static_cast<float*>(p.dsinks)[head] = sum;
        } else {
            from_float(static_cast<Element*>(p.dsinks)[head], sum);
        }
    }
}

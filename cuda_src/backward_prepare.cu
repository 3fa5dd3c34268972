// Backward, first step: D = rowsum(dO * O) - dLSE for every query row, one warp a row.
// (dS = P * (dP - D): the row sum of the softmax's derivative, and what a gradient of LSE adds to it.)
#include "copy.cuh"

constexpr int DV = SPEC.head_dim_v;

extern "C" __global__ void __launch_bounds__(THREADS, TILE.blocks) backward_prepare(const __grid_constant__ Params p) {
    const long long index = static_cast<long long>(blockIdx.x) * TILE.warps + threadIdx.x / 32;
    const int head = index % p.heads;
    const int row = index / p.heads % p.q_len;
    const int batch = index / p.heads / p.q_len;
    if (batch >= (SPEC.packed ? 1 : p.batch)) return;

    const Element* dO_gmem = head_rows(p.dout, batch, row, head);
    const Element* O_gmem = head_rows(p.out, batch, row, head);
    float sum = 0.0f;
    for (int col = threadIdx.x % 32; col < DV; col += 32) sum += to_float(dO_gmem[col]) * to_float(O_gmem[col]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, distance);
    if (threadIdx.x % 32 == 0) {
        if (p.dlse.data != nullptr) sum -= *statistic_rows(p.dlse, batch, row, head);
        *statistic_rows(p.delta, batch, row, head) = sum;
    }
}

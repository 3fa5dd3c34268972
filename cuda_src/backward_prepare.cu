// Backward, first step: D = rowsum(dO * O) - dLSE for every query row.
// Also puts the counter of the Hopper kernels to zero. (dS = P * (dP - D): the row sum of the softmax's
// derivative, and what a gradient of LSE adds to it.)
//
// A thread block takes TILE.rows tokens with all their heads, which usually lie one after the other in memory. LANES
// neighbouring threads share a row, TILE.vector bytes each at a time.
#include "copy.cuh"

constexpr int DV = SPEC.head_dim_v;
constexpr int WIDTH = TILE.vector / ELEMENT_BYTES;  // elements a thread loads at once

__device__ constexpr int lanes_of_row() {  // the power of two that covers a row, a warp at most
    int lanes = 1;
    while (lanes < 32 && lanes * WIDTH < DV) lanes *= 2;
    return lanes;
}
constexpr int LANES = lanes_of_row();

struct alignas(TILE.vector) Piece {
    Element x[WIDTH];
};

KERNEL(backward_prepare, 0)(ARGUMENT(Params) p) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.tickets = 0;
    const unsigned int tokens = (SPEC.packed ? 1u : p.batch) * static_cast<unsigned int>(p.q_len);
    const unsigned int first = blockIdx.x * TILE.rows;
    const int heads = p.heads, pairs = min(static_cast<unsigned int>(TILE.rows), tokens - first) * heads;
    const int lane = threadIdx.x % LANES;
    // A loop of whole warps, so that the shuffles below always find their partners.
#pragma unroll 4
    for (int start = 0; start < pairs; start += THREADS / LANES) {
        const int pair = start + threadIdx.x / LANES;
        const unsigned int token = first + min(pair, pairs - 1) / heads;
        const int head = min(pair, pairs - 1) % heads;
        const int batch = token / p.q_len, row = token % p.q_len;
        const Element* dO_gmem = head_rows(p.dout, batch, row, head);
        const Element* O_gmem = head_rows(p.out, batch, row, head);
        float sum = 0.0f;
#pragma unroll
        for (int col = lane * WIDTH; col < DV; col += LANES * WIDTH) {
            const Piece dO = *reinterpret_cast<const Piece*>(dO_gmem + col);
            const Piece O = *reinterpret_cast<const Piece*>(O_gmem + col);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) sum += to_float(dO.x[i]) * to_float(O.x[i]);
        }
#pragma unroll
        for (int distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, distance);
        if (lane == 0 && pair < pairs) {
            if (p.dlse.data != nullptr) sum -= *statistic_rows(p.dlse, batch, row, head);
            *statistic_rows(p.delta, batch, row, head) = sum;
        }
    }
}

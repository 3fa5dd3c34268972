// The end of the online softmax of one row.
#pragma once
#include "schedule.cuh"
#include "scores.cuh"

// The factor 1 / l of a row of O and its LSE, from the point m its exponentials refer to (in units of log2, -inf for a
// row without keys) and this lane's part of the row sum l; exp(sink) joins the denominator here.
__device__ __forceinline__ float finish_row(const Params& p, const Sequence& sequence, int head, float m, float l,
                                            float& lse) {
    l += __shfl_xor_sync(0xFFFFFFFF, l, 1);
    l += __shfl_xor_sync(0xFFFFFFFF, l, 2);
    float reference = m == MINUS_INFINITY ? 0.0f : m;
    float rescale = 1.0f;
    if (SPEC.sinks && !is_outside(p, sequence)) {
        const float sink = LOG2_E * load_scalar(p.sinks, head * p.sinks_stride, p.sinks_float32);
        const float largest = fmaxf(m, sink);
        const float with_sink = largest == MINUS_INFINITY ? 0.0f : largest;
        rescale = exp2_approximate(reference - with_sink);
        l = l * rescale + exp2_approximate(sink - with_sink);
        reference = with_sink;
    }
    const bool empty = l == 0.0f;  // a row that may attend to nothing
    lse = empty ? MINUS_INFINITY : fmaf(reference, LN_2, logf(l));
    return empty ? 0.0f : rescale / l;
}

// The end of the online softmax of one row.
#pragma once
#include "schedule.cuh"
#include "scores.cuh"

// The factor 1 / l of a row of O and its LSE, from the point m its exponentials refer to (times UNIT, -inf for a row
// without keys) and this lane's part of the row sum l; exp(sink) joins the denominator here.
__device__ __forceinline__ float finish_row(const Params& p, const Sequence& sequence, int head, float m, float l,
                                            float& lse) {
    l += __shfl_xor_sync(0xFFFFFFFF, l, 1);
    l += __shfl_xor_sync(0xFFFFFFFF, l, 2);
    float rescale = 1.0f;
    if (SPEC.sinks && !is_outside(p, sequence)) {
        // In natural units, so that a sink far above all scores is the LSE to its last bit.
        const float sink = load_scalar(p.sinks, head * p.sinks_stride, p.sinks_float32);
        const float m_natural = m * (1.0f / UNIT);
        const float largest = fmaxf(m_natural, sink);
        const float reference = largest == MINUS_INFINITY ? 0.0f : largest;
        rescale = exp2_approximate((m_natural - reference) * LOG2_E);
        l = l * rescale + exp2_approximate((sink - reference) * LOG2_E);
        lse = reference + logf(l);
    } else {
        lse = fmaf(m == MINUS_INFINITY ? 0.0f : m, 1.0f / UNIT, logf(l));
    }
    const bool empty = l == 0.0f;  // a row that may attend to nothing
    if (empty) lse = MINUS_INFINITY;
    return empty ? 0.0f : rescale / l;
}

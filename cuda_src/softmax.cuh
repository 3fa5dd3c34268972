// The end of the online softmax of one row.
#pragma once
#include "schedule.cuh"
#include "scores.cuh"

// ln x and 1 / x: to the last bits for float32, to a relative error of 2^-22 (of ln x near 1: an absolute one) for
// 16-bit types.
__device__ __forceinline__ float log_of(float x) {
    if constexpr (SPEC.dtype == Dtype::float32) {
        return logf(x);
    } else {
        return log2_approximate(x) * LN_2;
    }
}

__device__ __forceinline__ float reciprocal(float x) {
    if constexpr (SPEC.dtype == Dtype::float32) {
        return 1.0f / x;
    } else {
        return reciprocal_approximate(x);
    }
}

// The largest of a row of accumulators from that of this lane's part of it.
__device__ __forceinline__ float row_maximum(float m) {
    m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFF, m, 1));
    return fmaxf(m, __shfl_xor_sync(0xFFFFFFFF, m, 2));
}

// The row sum of accumulators from this lane's part of it.
__device__ __forceinline__ float row_sum(float l) {
    l += __shfl_xor_sync(0xFFFFFFFF, l, 1);
    l += __shfl_xor_sync(0xFFFFFFFF, l, 2);
    return l;
}

// The factor 1 / l of a row of O and its LSE, from the point m its exponentials refer to (times UNIT; -inf or LOWEST
// for a row without keys) and the row sum l; exp(sink) joins the denominator here.
__device__ __forceinline__ float finish_row(float m, float l, float sink, float& lse) {
    float rescale = 1.0f;
    if constexpr (SPEC.sinks) {
        // In natural units, so that a sink far above all scores is the LSE to its last bit.
        const float m_natural = m * (1.0f / UNIT);
        const float largest = fmaxf(m_natural, sink);
        const float reference = largest == MINUS_INFINITY ? 0.0f : largest;
        rescale = exp2_approximate((m_natural - reference) * LOG2_E);
        l = l * rescale + exp2_approximate((sink - reference) * LOG2_E);
        lse = reference + log_of(l);
    } else {
        lse = fmaf(m == MINUS_INFINITY ? 0.0f : m, 1.0f / UNIT, log_of(l));
    }
    const bool empty = l == 0.0f;  // a row that may attend to nothing
    if (empty) lse = MINUS_INFINITY;
    return empty ? 0.0f : rescale * reciprocal(l);
}

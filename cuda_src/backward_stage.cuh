// The elementwise stage of the backward, for both of its kernels: from S and dP to P (dropped) and dS.
#pragma once
#include "dropout.cuh"
#include "mask.cuh"
#include "scores.cuh"

// LSE times UNIT, as the point exponentials refer to; 0 for a row that attends to nothing, where S is -inf.
__device__ __forceinline__ float exponent_reference(float lse) { return lse == MINUS_INFINITY ? 0.0f : lse * UNIT; }

// P = e^(S - LSE) and dS = P * (dropout * dP - D) * d S / d (scale q.k) of one element; P comes back dropped.
__device__ __forceinline__ void differentiate(float& s, float& dp, const Scores& scores, const Band& band, bool cut,
                                              int q_index, int kv_index, float reference, float delta, float dropped) {
    float derivative;
    const float exponent = scores.exponent(s, q_index, kv_index, derivative);
    const float p = cut && !band.allows(q_index, kv_index) ? 0.0f : exponential(exponent - reference);
    dp = p * (dp * dropped - delta) * derivative;
    s = p * dropped;
}

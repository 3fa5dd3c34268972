// The elementwise stage of the backward, for both of its kernels: from S and dP to P (dropped) and dS.
#pragma once
#include "dropout.cuh"
#include "mask.cuh"
#include "scores.cuh"

// Where it is so long that there is no second one without masks.
constexpr bool LONG_STAGE = SPEC.softcap || SPEC.alibi || SPEC.dropout || DENSE;

// LSE times UNIT, as the point exponentials refer to; 0 for a row that attends to nothing, where S is -inf.
__device__ __forceinline__ float exponent_reference(float lse) { return lse == MINUS_INFINITY ? 0.0f : lse * UNIT; }

// P = e^(S - LSE) and dS = P * (dropout * dP - D) of one element. In the place of s and dp come P, dropped, and
// dS * d S / d (scale q.k); dS itself, which is the gradient of the element's bias, is returned. TANH as for exponent.
template <bool TANH = false>
__device__ __forceinline__ float differentiate(float& s, float& dp, const Scores& scores, const Band& band, bool cut,
                                               int q_index, int kv_index, float distance, float reference, float delta,
                                               float dropped, float addend = 0.0f) {
    float derivative;
    const float exponent = scores.exponent<TANH>(s, distance, derivative, addend);
    const float p = cut && !band.allows(q_index, kv_index) ? 0.0f : exponential(exponent - reference);
    const float ds = p * (dp * dropped - delta);
    dp = ds * derivative;
    s = p * dropped;
    return ds;
}

// The score stage: from the product q.k to the exponent of 2, and its derivative. Softcap and ALiBi live here, and
// bias and dense mask join.
#pragma once
#include "element.cuh"
#include "params.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// 2^x, 2^-inf = 0.
__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh: to the last bits for float32, to a relative error of 1e-6 for 16-bit types (near 0 by its series, where the
// quotient cancels).
__device__ __forceinline__ float tanh_of(float x) {
    if constexpr (SPEC.dtype == Dtype::float32) {
        return tanhf(x);
    } else {
        const float square = x * x;
        const float series = x * (1.0f - square * (0.33333333f - square * (0.13333333f - square * 0.053968254f)));
        const float quotient = 1.0f - __fdividef(2.0f, 1.0f + exp2_approximate(x * (2.0f * LOG2_E)));
        return fabsf(x) < 0.15f ? series : quotient;
    }
}

// Scores are kept times UNIT: log2(e) for 16-bit types, which saves a multiplication in the exponential, and 1 for
// float32, whose roundings then are those of the plain formula.
constexpr float UNIT = SPEC.dtype == Dtype::float32 ? 1.0f : LOG2_E;

// e^(x / UNIT)
__device__ __forceinline__ float exponential(float x) { return exp2_approximate(x * (LOG2_E / UNIT)); }

struct Scores {
    float factor;  // UNIT scale, or with softcap: scale / softcap
    float cap;     // UNIT softcap
    float slope;   // UNIT ALiBi slope of the head
    int offset;    // q_pos - q_index

    __device__ __forceinline__ Scores(const Params& p, int sequence, int head, int position_offset)
        : factor(SPEC.softcap ? p.scale / p.softcap : p.scale * UNIT),
          cap(p.softcap * UNIT),
          slope(0.0f),
          offset(position_offset) {
        if (SPEC.alibi && sequence < p.batch) {  // the rows outside of all sequences have no slope
            const long long index = sequence * p.alibi_batch_stride + head * p.alibi_head_stride;
            slope = UNIT * load_scalar(p.alibi_slopes, index, p.alibi_float32);
        }
    }

    // UNIT S from q.k; `derivative` becomes d S / d (scale q.k). `addend` is of the bias and the mask (dense.cuh).
    __device__ __forceinline__ float exponent(float product, int q_index, int kv_index, float& derivative,
                                              float addend = 0.0f) const {
        float s;
        if constexpr (SPEC.softcap) {  // c tanh(s / c)
            const float t = tanh_of(product * factor);
            derivative = 1.0f - t * t;
            s = t * cap;
        } else {
            derivative = 1.0f;
            s = product * factor;
        }
        if constexpr (SPEC.alibi) s -= slope * fabsf(static_cast<float>(q_index + offset - kv_index));
        if constexpr (DENSE) s = addend == MINUS_INFINITY ? addend : s + addend;  // -inf masks, whatever the score
        return s;
    }
};

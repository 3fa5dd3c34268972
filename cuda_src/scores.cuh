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

// 1 / x to a relative error of 2^-23.
__device__ __forceinline__ float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2 x to an absolute error of 2^-22.
__device__ __forceinline__ float log2_approximate(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh of x / (2 log2(e)) to an absolute error of 2e-7.
__device__ __forceinline__ float tanh_by_exponential(float x) {
    return fmaf(-2.0f, reciprocal_approximate(1.0f + exp2_approximate(x)), 1.0f);
}

// tanh: to the last bits for float32, to a relative error of 1e-6 for 16-bit types (near 0 by its series, where the
// difference cancels).
__device__ __forceinline__ float tanh_of(float x) {
    if constexpr (SPEC.dtype == Dtype::float32) {
        return tanhf(x);
    } else {
        const float square = x * x;
        const float series = x * (1.0f - square * (0.33333333f - square * (0.13333333f - square * 0.053968254f)));
        return fabsf(x) < 0.15f ? series : tanh_by_exponential(2.0f * LOG2_E * x);
    }
}

// X becomes tanh(factor X), for 16-bit types. An absolute error of 2e-7 is nothing in a score of up to `cap`, unless
// the cap is large.
//
// HALVED: where the cap is not large, it becomes (tanh - 1) / 2 = -1 / (1 + e^(2 factor X)), an instruction less. The
// capped score is then halved_factor(cap) X + halved_shift(cap), of which a softmax needs the factor alone.
constexpr float LARGE_CAP = 512.0f;
__device__ __forceinline__ float halved_factor(float cap) { return cap > LARGE_CAP ? cap : 2.0f * cap; }
__device__ __forceinline__ float halved_shift(float cap) { return cap > LARGE_CAP ? 0.0f : cap; }

template <bool HALVED, int TILES>
__device__ __forceinline__ void tanh_of_tile(float (&X)[TILES][4], float factor, float cap) {
    if (cap > LARGE_CAP) {  // around the loops: in them both would be computed
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int r = 0; r < 4; ++r) X[n][r] = tanh_of(factor * X[n][r]);
        }
    } else {
        factor *= 2.0f * LOG2_E;
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float x = factor * X[n][r];
                X[n][r] = HALVED ? reciprocal_approximate(-1.0f - exp2_approximate(x)) : tanh_by_exponential(x);
            }
        }
    }
}

// Scores are kept times UNIT: log2(e) for 16-bit types, which saves a multiplication in the exponential, and 1 for
// float32, whose roundings then are those of the plain formula.
constexpr float UNIT = SPEC.dtype == Dtype::float32 ? 1.0f : LOG2_E;

// e^(x / UNIT); for float32 what rounds off x log2(e) is made up for.
__device__ __forceinline__ float exponential(float x) {
    if constexpr (SPEC.dtype != Dtype::float32) return exp2_approximate(x);
    // e^-104 is 0, and -inf - -inf would be NaN; NaN stays.
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(-104.0f));
    const float exponent = x * LOG2_E, y = exp2_approximate(exponent);
    return fmaf(y * LN_2, fmaf(x, LOG2_E, -exponent), y);
}

struct Scores {
    float factor;  // UNIT scale, or with softcap: scale / softcap
    float cap;     // UNIT softcap
    float slope;   // UNIT ALiBi slope of the head
    float sink;    // of the head, if it has one
    int offset;    // q_pos - q_index

    __device__ __forceinline__ Scores(const Params& p, int sequence, int head, int position_offset)
        : factor(SPEC.softcap ? p.scale / p.softcap : p.scale * UNIT),
          cap(p.softcap * UNIT),
          slope(0.0f),
          sink(MINUS_INFINITY),
          offset(position_offset) {
        if (sequence == p.batch) return;  // the rows outside of all sequences have no slope and no sink
        if constexpr (SPEC.alibi) {
            const long long index = sequence * p.alibi_batch_stride + head * p.alibi_head_stride;
            slope = UNIT * load_scalar(p.alibi_slopes, index, p.alibi_float32);
        }
        if constexpr (SPEC.sinks) sink = load_scalar(p.sinks, head * p.sinks_stride, p.sinks_float32);
    }

    // How far a query is behind a key. To be asked once a tile, for a lane's first element: conversions are slow.
    __device__ __forceinline__ float distance(int q_index, int kv_index) const {
        return SPEC.alibi ? static_cast<float>(q_index + offset - kv_index) : 0.0f;
    }

    // UNIT S from q.k, or with softcap and TANH from the tanh; `derivative` becomes d S / d (scale q.k). `addend` is of
    // the bias and the mask (dense.cuh).
    template <bool TANH = false>
    __device__ __forceinline__ float exponent(float product, float distance, float& derivative,
                                              float addend = 0.0f) const {
        float s;
        if constexpr (SPEC.softcap) {  // c tanh(s / c)
            const float t = TANH ? product : tanh_of(product * factor);
            derivative = 1.0f - t * t;
            s = t * cap;
        } else {
            derivative = 1.0f;
            s = product * factor;
        }
        if constexpr (SPEC.alibi) s -= slope * fabsf(distance);
        if constexpr (DENSE) s = addend == MINUS_INFINITY ? addend : s + addend;  // -inf masks, whatever the score
        return s;
    }
};

// Where ALiBi has taken all keys of a tile for keys behind their query, as -slope distance: those ahead, at a negative
// distance, get what is missing to -slope |distance|, twice the slope times the distance. The slope is in the units of
// X, `distance` that of the lane's first element; a column further adds STEP to it (1: a query; -1: a key), and a row
// further takes it away.
template <int STEP, int TILES>
__device__ __forceinline__ void mirror_slope(float (&X)[TILES][4], float slope, float distance) {
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const float further = STEP * (8 * n + r % 2 - r / 2 * 8);
            X[n][r] = fmaf(2.0f * slope, fminf(distance + further, 0.0f), X[n][r]);
        }
    }
}

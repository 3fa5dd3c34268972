// The element type of the tensors and its conversions.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "spec.cuh"

template <Dtype>
struct ElementOf;
template <>
struct ElementOf<Dtype::float16> {
    using Type = __half;
};
template <>
struct ElementOf<Dtype::bfloat16> {
    using Type = __nv_bfloat16;
};
template <>
struct ElementOf<Dtype::float32> {
    using Type = float;
};
using Element = ElementOf<SPEC.dtype>::Type;

constexpr int ELEMENT_BYTES = sizeof(Element);
constexpr int CHUNK = 16 / ELEMENT_BYTES;  // elements in 16 bytes
constexpr int OPERAND_BYTES = 2;           // of an element, or a term of it, as tensor cores take it
constexpr int K_STEP = 16;                 // contraction length of one of their steps

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void from_float(float& y, float x) { y = x; }
__device__ __forceinline__ void from_float(__half& y, float x) { y = __float2half_rn(x); }
__device__ __forceinline__ void from_float(__nv_bfloat16& y, float x) { y = __float2bfloat16_rn(x); }

// Two floats rounded and packed into one register, the first in the low half.
__device__ __forceinline__ unsigned int pack(float low, float high) {
    Element pair[2];
    from_float(pair[0], low);
    from_float(pair[1], high);
    unsigned int packed;
    memcpy(&packed, pair, 4);
    return packed;
}

__device__ __forceinline__ float2 unpack(unsigned int packed) {
    Element pair[2];
    memcpy(pair, &packed, 4);
    return make_float2(to_float(pair[0]), to_float(pair[1]));
}

// The same as float16 whatever the dtype: of numbers up to 1, to 11 bits.
__device__ __forceinline__ unsigned int pack_half(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    unsigned int packed;
    memcpy(&packed, &pair, 4);
    return packed;
}

__device__ __forceinline__ float2 unpack_half(unsigned int packed) {
    __half2 pair;
    memcpy(&pair, &packed, 4);
    return __half22float2(pair);
}

// What pack_half rounded off, packed.
__device__ __forceinline__ unsigned int pack_rest(float low, float high, unsigned int packed) {
    const float2 rounded = unpack_half(packed);
    return pack_half(low - rounded.x, high - rounded.y);
}

// A scalar option array that is float32 or has the dtype of q.
__device__ __forceinline__ float load_scalar(const void* data, long long index, bool is_float32) {
    return is_float32 ? static_cast<const float*>(data)[index] : to_float(static_cast<const Element*>(data)[index]);
}

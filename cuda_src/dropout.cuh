// Dropout of P by Philox4x32-10 (Salmon et al., 2011): the mask of cuflash/dropout.py, which says which counter and
// which 16 bits belong to an element.
#pragma once
#include "params.cuh"

struct Dropout {
    unsigned int key0, key1, head, batch;
    unsigned int threshold;
    float scale;  // of kept elements

    __device__ __forceinline__ Dropout(const Params& p, int sequence, int head_index)
        : key0(static_cast<unsigned int>(p.seed)),
          key1(static_cast<unsigned int>(p.seed >> 32)),
          head(head_index),
          batch(sequence),
          threshold(p.dropout_threshold),
          scale(p.dropout_scale) {}

    // The four words of a counter.
    __device__ __forceinline__ uint4 philox(unsigned int x0, unsigned int x1) const {
        unsigned int x2 = head, x3 = batch, k0 = key0, k1 = key1;
#pragma unroll 2
        for (int round = 0; round < 10; ++round) {
            const unsigned long long product0 = 0xD2511F53ull * x0, product1 = 0xCD9E8D57ull * x2;
            x0 = static_cast<unsigned int>(product1 >> 32) ^ x1 ^ k0;
            x2 = static_cast<unsigned int>(product0 >> 32) ^ x3 ^ k1;
            x1 = static_cast<unsigned int>(product1);
            x3 = static_cast<unsigned int>(product0);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        return make_uint4(x0, x1, x2, x3);
    }

    __device__ __forceinline__ float factor_of(unsigned int number) const { return number >= threshold ? scale : 0.0f; }

    // Factors (0 or 1 / (1 - p)) of a [16, 16] block of accumulators, rows queries, columns keys: f[t] as accumulator
    // t.
    __device__ __forceinline__ void factors(float (&f)[2][4], int q_first, int kv_first) const {
        const int lane = threadIdx.x % 32;
        const uint4 words = philox(q_first / 2 + lane / 4, kv_first / 4 + lane % 4);
        const unsigned int word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                f[t][2 * s] = factor_of(word[2 * s + t] & 0xFFFFu);
                f[t][2 * s + 1] = factor_of(word[2 * s + t] >> 16);
            }
        }
    }

    // The same for rows keys, columns queries.
    __device__ __forceinline__ void factors_transposed(float (&f)[2][4], int q_first, int kv_first) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const uint4 words = philox(q_first / 2 + lane % 4 * 2 + e, kv_first / 4 + lane / 8);
            const unsigned int word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int s = 0; s < 2; ++s) {
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    const unsigned int pair = word[2 * s + t];
                    f[s][2 * t + e] = factor_of(lane / 4 % 2 ? pair >> 16 : pair & 0xFFFFu);
                }
            }
        }
    }
};

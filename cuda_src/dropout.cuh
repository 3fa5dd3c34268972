// Dropout of P by Philox4x32-7 (Salmon et al., 2011): the mask of cuflash/dropout.py, which says which counter and
// which 15 bits belong to an element, and whether dropped elements are drawn or kept ones.
#pragma once
#include "params.cuh"

// Byte i of the result is byte s of (low, high), s the bits 4 i to 4 i + 2 of the selector, or where its bit 4 i + 3 is
// set the sign of that byte, eight times.
__device__ __forceinline__ unsigned int permute_bytes(unsigned int low, unsigned int high, unsigned int selector) {
    unsigned int y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(high), "r"(selector));
    return y;
}

// Ones in each half of x whose low 15 bits are below those of that half of `limit`, which is at most 0x7C00. They are
// compared as float16, whose magnitudes are ordered as their bits are, up to infinity, 0x7C00; NaNs, above it, are
// below nothing. (One instruction, where integers would take three.)
__device__ __forceinline__ unsigned int halves_below(unsigned int x, unsigned int limit) {
    unsigned int y;
    asm("{ .reg .b32 magnitude; abs.f16x2 magnitude, %1; set.lt.u32.f16x2 %0, magnitude, %2; }"
        : "=r"(y)
        : "r"(x), "r"(limit));
    return y;
}

// The two words of a b. (For 64-bit integers the compiler adds the product of their upper words, which are 0.)
__device__ __forceinline__ void multiply_wide(unsigned int& low, unsigned int& high, unsigned int a, unsigned int b) {
    asm("{ .reg .b64 product; mul.wide.u32 product, %2, %3; mov.b64 {%0, %1}, product; }"
        : "=r"(low), "=r"(high)
        : "r"(a), "r"(b));
}

// Which elements of BLOCKS blocks [16, 16] of accumulators are kept, this lane's. Of block j the pair of elements
// (accumulator tile 2 j + t; r = 2 s, 2 s + 1) has number i = 4 j + 2 s + t: bits i and i + 16, of a word for 4 blocks.
template <int BLOCKS>
struct Kept {
    unsigned int words[ceil_div(BLOCKS, 4)];

    // A mask of both elements as they are packed: ones in the half of one that is kept.
    __device__ __forceinline__ unsigned int packed_mask(int tile, int half) const {
        return permute_bytes(words[tile / 8] << (15 - number(tile, half)), 0, 0xBB99);  // signs of the halves
    }

    __device__ __forceinline__ bool element(int tile, int r) const {
        return words[tile / 8] >> (number(tile, r / 2) + r % 2 * 16) & 1;
    }

    __device__ __forceinline__ static int number(int tile, int half) { return tile / 2 % 4 * 4 + 2 * half + tile % 2; }
};

struct Dropout {
    const RoundKeys& keys;
    unsigned int head, batch;
    unsigned int limit, flip;  // of two elements: p.dropout_limit and p.dropout_flip
    float scale;               // of kept elements

    __device__ __forceinline__ Dropout(const Params& p, int sequence, int head_index)
        : keys(p.keys),
          head(head_index),
          batch(sequence),
          limit(p.dropout_limit),
          flip(p.dropout_flip),
          scale(p.dropout_scale) {}

    // The four words of a counter, for sixteen elements.
    __device__ __forceinline__ uint4 words(unsigned int x0, unsigned int x1) const {
        unsigned int x2 = head, x3 = batch;
        const unsigned long long key[] = {keys.r0, keys.r1, keys.r2, keys.r3, keys.r4, keys.r5, keys.r6};
#pragma unroll
        for (int round = 0; round < 7; ++round) {
            unsigned int low0, high0, low1, high1;
            multiply_wide(low0, high0, x0, 0xD2511F53u);
            multiply_wide(low1, high1, x2, 0xCD9E8D57u);
            x0 = high1 ^ x1 ^ static_cast<unsigned int>(key[round]);
            x2 = high0 ^ x3 ^ static_cast<unsigned int>(key[round] >> 32);
            x1 = low1;
            x3 = low0;
        }
        return make_uint4(x0, x1, x2, x3);
    }

    // The two of them whose elements have the 16 keys from kv_first on.
    __device__ __forceinline__ static uint2 words_of_keys(const uint4& words, int kv_first) {
        return kv_first / 16 % 2 ? make_uint2(words.z, words.w) : make_uint2(words.x, words.y);
    }

    // Which two elements of a word are drawn, those of one t: ones in their halves.
    __device__ __forceinline__ unsigned int drawn(unsigned int word, int t) const {
        return halves_below(t % 2 ? __funnelshift_l(word, word, 8) : word, limit);
    }

    // Zeros in the place of dropped elements of P, packed as an operand: rows queries from q_first on, columns keys
    // from kv_first on, a multiple of 32.
    template <int BLOCKS>
    __device__ __forceinline__ void drop(unsigned int (&P)[BLOCKS][4], int q_first, int kv_first) const {
        static_assert(BLOCKS % 2 == 0);
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int block = 0; block < BLOCKS; block += 2) {
            const uint4 words = this->words(q_first / 2 + lane / 4, kv_first / 8 + 2 * block + lane % 4);
            const unsigned int word[2][2] = {{words.x, words.y}, {words.z, words.w}};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                unsigned int (&p)[4] = P[block + i];  // by accumulator tile, then by row
#pragma unroll
                for (int s = 0; s < 2; ++s) {
#pragma unroll
                    for (int t = 0; t < 2; ++t) p[2 * t + s] &= drawn(word[i][s], t) ^ flip;
                }
                // One counter after the other, which saves registers.
                asm volatile("" : "+r"(p[0]), "+r"(p[1]), "+r"(p[2]), "+r"(p[3]));
            }
        }
    }

    // Rows queries from q_first on, columns keys from kv_first on, a multiple of 16 for one block, else of 32.
    template <int BLOCKS>
    __device__ __forceinline__ void draw(Kept<BLOCKS>& kept, int q_first, int kv_first) const {
        static_assert(BLOCKS % 2 == 0 || BLOCKS == 1);
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int block = 0; block < BLOCKS; block += 2) {
            const uint4 word = words(q_first / 2 + lane / 4, kv_first / 32 * 4 + 2 * block + lane % 4);
            if constexpr (BLOCKS == 1) {
                collect<false>(kept, 0, words_of_keys(word, kv_first));
            } else {
                collect<false>(kept, block, make_uint2(word.x, word.y));
                collect<false>(kept, block + 1, make_uint2(word.z, word.w));
            }
        }
    }

    // Rows 16 keys, columns queries from q_first on. Two lanes, of an even key and the odd one behind it, need the same
    // two counters, of an even query and the odd one: each takes one.
    template <int BLOCKS>
    __device__ __forceinline__ void draw_transposed(Kept<BLOCKS>& kept, int q_first, int kv_first) const {
        const int lane = threadIdx.x % 32, odd = lane / 4 % 2;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const unsigned int query = q_first / 2 + 8 * block + lane % 4 * 2 + odd;
            collect<true>(kept, block, words_of_keys(words(query, kv_first / 32 * 4 + lane / 8), kv_first));
        }
#pragma unroll
        for (unsigned int& word : kept.words) {
            const unsigned int other = __shfl_xor_sync(0xFFFFFFFF, word, 4);
            word = permute_bytes(word, other, odd ? 0x3276 : 0x5410);
        }
    }

    // What an element of P is multiplied by: 0 or 1 / (1 - p), and 1 without dropout.
    template <int BLOCKS>
    __device__ __forceinline__ float factor(const Kept<BLOCKS>& kept, int tile, int r) const {
        if constexpr (!SPEC.dropout) return 1.0f;
        return kept.element(tile, r) ? scale : 0.0f;
    }

    // The bits of a block [16, 16] from two words, of its upper and its lower eight queries.
    template <bool TRANSPOSED, int BLOCKS>
    __device__ __forceinline__ void collect(Kept<BLOCKS>& kept, int block, const uint2& words) const {
        unsigned int& bits = kept.words[block / 4];
        if (block % 4 == 0) bits = flip;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const int i = block % 4 * 4 + (TRANSPOSED ? 2 * t + s : 2 * s + t);
                bits ^= drawn(s ? words.y : words.x, t) & 0x10001u << i;
            }
        }
        // One block after the other, which saves registers, and here instead of where the bits are used: Hopper kernels
        // draw while their tensor cores work.
        asm volatile("" : "+r"(bits));
    }
};

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

__device__ __forceinline__ unsigned int low_word(unsigned long long x) { return static_cast<unsigned int>(x); }
__device__ __forceinline__ unsigned int high_word(unsigned long long x) { return static_cast<unsigned int>(x >> 32); }

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
    static constexpr unsigned int FACTOR_0 = 0xD2511F53, FACTOR_1 = 0xCD9E8D57;
    static constexpr int MIX = 4;
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

    // What the counters of a row (x0, x1 = the keys', head, batch) have in common: their first three rounds without
    // what x1 goes into, which is one of the two products in the second round and in the third.
    struct Row {
        unsigned int x0_first, x2_second, x0_third, x2_third, x3_third;
    };
    __device__ __forceinline__ Row row(unsigned int x0) const {
        unsigned int low0, high0, low1, high1;
        Row row;
        multiply_wide(low0, high0, x0, FACTOR_0);
        multiply_wide(low1, high1, head, FACTOR_1);
        row.x0_first = high1 ^ low_word(keys.r0);  // ^ x1
        row.x2_second = low0 ^ high_word(keys.r1);
        const unsigned int x1 = low1, x2 = high0 ^ batch ^ high_word(keys.r0);
        multiply_wide(low1, high1, x2, FACTOR_1);
        row.x0_third = low1 ^ low_word(keys.r2);
        multiply_wide(low0, high0, high1 ^ x1 ^ low_word(keys.r1), FACTOR_0);
        row.x2_third = high0 ^ high_word(keys.r2);
        row.x3_third = low0;
        return row;
    }

    // The four words of a counter: those of sixteen elements, of the first 32 keys of 64.
    __device__ __forceinline__ uint4 words(const Row& row, unsigned int keys_counter) const {
        unsigned int low0, high0, low1, high1;
        multiply_wide(low0, high0, row.x0_first ^ keys_counter, FACTOR_0);
        multiply_wide(low1, high1, row.x2_second ^ high0, FACTOR_1);
        unsigned int x0 = row.x0_third ^ high1, x1 = low1, x2 = row.x2_third ^ low0, x3 = row.x3_third;
        const unsigned long long key[] = {keys.r3, keys.r4, keys.r5, keys.r6};
#pragma unroll
        for (int round = 0; round < 4; ++round) {
            multiply_wide(low0, high0, x0, FACTOR_0);
            multiply_wide(low1, high1, x2, FACTOR_1);
            x0 = high1 ^ x1 ^ low_word(key[round]);
            x2 = high0 ^ x3 ^ high_word(key[round]);
            x1 = low1;
            x3 = low0;
        }
        return make_uint4(x0, x1, x2, x3);
    }

    // The row of counters of this lane, of 16 rows from q_first on, with what the lane adds to the keys' counter, which
    // is a multiple of 4 but for that.
    __device__ __forceinline__ Row own_row(int q_first) const {
        const int lane = threadIdx.x % 32;
        Row own = row(q_first / 2 + lane / 4);
        own.x0_first ^= lane % 4;
        return own;
    }

    __device__ __forceinline__ static unsigned int rotate(unsigned int word, int bits) {
        return __funnelshift_l(word, word, bits);
    }

    // A word of a counter, or, where all bits of `mixes` are ones and not zeros, its mixture with its partner.
    __device__ __forceinline__ static unsigned int mix(unsigned int word, unsigned int partner, unsigned int mixes) {
        return word ^ rotate(partner, MIX) & mixes;
    }

    // The words of a counter, or those of its other sixteen elements, of the last 32 keys.
    __device__ __forceinline__ static uint4 mixed(const uint4& words, unsigned int mixes) {
        const auto [x, y, z, w] = words;
        return make_uint4(mix(x, z, mixes), mix(y, w, mixes), mix(z, y, mixes), mix(w, x, mixes));
    }
    __device__ __forceinline__ static unsigned int mixes(int kv_first) { return kv_first / 32 % 2 ? 0xFFFFFFFF : 0; }

    // The words for blocks `block` and `block` + 1 of BLOCKS, each of 16 keys from kv_first on. Where tiles begin with
    // a counter, that of the first two, `counter`, serves the next two as well.
    template <int BLOCKS>
    __device__ __forceinline__ uint4 words_of_blocks(uint4& counter, int block, const Row& row, int kv_first) const {
        constexpr bool WHOLE = BLOCKS % 4 == 0;
        const int kv = kv_first + 16 * block;
        if (!WHOLE || block % 4 == 0) counter = words(row, kv / 64 * 4);
        return mixed(counter, mixes(WHOLE ? 16 * block : kv));
    }

    // The two words of a counter whose elements have the 16 keys from kv_first on.
    __device__ __forceinline__ static uint2 words_of_keys(const uint4& words, int kv_first) {
        const auto [x, y, z, w] = words;
        uint2 own = make_uint2(x, y), other = make_uint2(z, w);
        if (kv_first / 16 % 2) own = make_uint2(z, w), other = make_uint2(y, x);
        return make_uint2(mix(own.x, other.x, mixes(kv_first)), mix(own.y, other.y, mixes(kv_first)));
    }

    // Which two elements of a word are drawn, those of one t: ones in their halves.
    __device__ __forceinline__ unsigned int drawn(unsigned int word, int t) const {
        return halves_below(t % 2 ? rotate(word, 8) : word, limit);
    }

    // Zeros in the place of dropped elements of P, packed as an operand: rows those of own_row, columns keys from
    // kv_first on, a multiple of 32, and of 64 if BLOCKS is one of 4.
    template <int BLOCKS>
    __device__ __forceinline__ void drop(unsigned int (&P)[BLOCKS][4], const Row& row, int kv_first) const {
        uint4 counter;
#pragma unroll
        for (int block = 0; block < BLOCKS; block += 2) drop_blocks(P, block, counter, row, kv_first);
    }

    // The same of blocks `block` and `block` + 1 alone; `counter` goes from one such part to the next.
    template <int BLOCKS>
    __device__ __forceinline__ void drop_blocks(unsigned int (&P)[BLOCKS][4], int block, uint4& counter, const Row& row,
                                                int kv_first) const {
        static_assert(BLOCKS % 2 == 0 || !SPEC.dropout);
        const auto [x, y, z, w] = words_of_blocks<BLOCKS>(counter, block, row, kv_first);
        const unsigned int word[2][2] = {{x, y}, {z, w}};
#pragma unroll
        for (int next = 0; next < 2; ++next) {
#pragma unroll
            for (int s = 0; s < 2; ++s) {
#pragma unroll
                for (int t = 0; t < 2; ++t) P[block + next][2 * t + s] &= drawn(word[next][s], t) ^ flip;
            }
        }
    }

    // Rows queries from q_first on, columns keys from kv_first on, a multiple of 16 for one block, else as for `drop`.
    template <int BLOCKS>
    __device__ __forceinline__ void draw(Kept<BLOCKS>& kept, int q_first, int kv_first) const {
        static_assert(BLOCKS % 2 == 0 || BLOCKS == 1);
        const Row row = own_row(q_first);
        if constexpr (BLOCKS == 1) {
            collect<false>(kept, 0, words_of_keys(words(row, kv_first / 64 * 4), kv_first));
        } else {
            uint4 counter;
#pragma unroll
            for (int block = 0; block < BLOCKS; block += 2) {
                const uint4 word = words_of_blocks<BLOCKS>(counter, block, row, kv_first);
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
            collect<true>(kept, block, words_of_keys(words(row(query), kv_first / 64 * 4 + lane / 8), kv_first));
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

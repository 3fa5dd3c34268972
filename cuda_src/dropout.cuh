// Dropout of P by Philox4x32-7 (Salmon et al., 2011): the mask of cuflash/dropout.py, which says which counter and
// which 15 bits belong to an element.
#pragma once
#include "params.cuh"

// Byte i of the result is byte s of (low, high), s the bits 4 i to 4 i + 2 of the selector, or where its bit 4 i + 3 is
// set the sign of that byte, eight times.
__device__ __forceinline__ unsigned int permute_bytes(unsigned int low, unsigned int high, unsigned int selector) {
    unsigned int y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(high), "r"(selector));
    return y;
}

// The two words of a b. (For 64-bit integers the compiler adds the product of their upper words, which are 0.)
__device__ __forceinline__ void multiply_wide(unsigned int& low, unsigned int& high, unsigned int a, unsigned int b) {
    asm("{ .reg .b64 product; mul.wide.u32 product, %2, %3; mov.b64 {%0, %1}, product; }"
        : "=r"(low), "=r"(high)
        : "r"(a), "r"(b));
}

constexpr unsigned int SIGNS = 0x80008000u;  // of the two halves of a word

// Ones in each half whose sign is set.
__device__ __forceinline__ unsigned int mask_of(unsigned int word) { return permute_bytes(word, 0, 0xBB99); }

// Which elements of BLOCKS blocks [16, 16] of accumulators are kept, this lane's. Of block j the pair of elements
// (accumulator tile 2 j + t; r = 2 s, 2 s + 1) has number i = 4 j + 2 s + t: bits i and i + 16, of a word for 4 blocks.
template <int BLOCKS>
struct Kept {
    unsigned int words[ceil_div(BLOCKS, 4)];

    // A mask of both elements as they are packed: ones in the half of one that is kept.
    __device__ __forceinline__ unsigned int packed_mask(int tile, int half) const {
        return mask_of(words[tile / 8] << (15 - number(tile, half)));
    }

    __device__ __forceinline__ bool element(int tile, int r) const {
        return words[tile / 8] >> (number(tile, r / 2) + r % 2 * 16) & 1;
    }

    __device__ __forceinline__ static int number(int tile, int half) { return tile / 2 % 4 * 4 + 2 * half + tile % 2; }
};

struct Dropout {
    const RoundKeys& keys;
    unsigned int head, batch;
    unsigned int addend;  // of both numbers in a word: carries into the sign of a half where it is kept
    float scale;          // of kept elements

    __device__ __forceinline__ Dropout(const Params& p, int sequence, int head_index)
        : keys(p.keys),
          head(head_index),
          batch(sequence),
          addend((0x8000u - p.dropout_threshold) * 0x10001u),
          scale(p.dropout_scale) {}

    // The four words of a counter, for eight elements: the sign of a half is set where its element is kept.
    __device__ __forceinline__ uint4 signs(unsigned int x0, unsigned int x1) const {
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
        const auto compared = [&](unsigned int word) { return (word & ~SIGNS) + addend; };
        return make_uint4(compared(x0), compared(x1), compared(x2), compared(x3));
    }

    // Zeros in the place of dropped elements of P, packed as an operand: rows queries from q_first on, columns keys.
    template <int BLOCKS>
    __device__ __forceinline__ void drop(unsigned int (&P)[BLOCKS][4], int q_first, int kv_first) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const uint4 word = signs(q_first / 2 + lane / 4, kv_first / 4 + 4 * block + lane % 4);
            unsigned int (&p)[4] = P[block];  // by accumulator tile, then by row; the words the other way
            p[0] &= mask_of(word.x);
            p[2] &= mask_of(word.y);
            p[1] &= mask_of(word.z);
            p[3] &= mask_of(word.w);
            // One block after the other, which saves registers.
            asm volatile("" : "+r"(p[0]), "+r"(p[1]), "+r"(p[2]), "+r"(p[3]));
        }
    }

    // Rows queries from q_first on, columns keys.
    template <int BLOCKS>
    __device__ __forceinline__ void draw(Kept<BLOCKS>& kept, int q_first, int kv_first) const {
        const int lane = threadIdx.x % 32;
        collect(kept, [&](int block) { return signs(q_first / 2 + lane / 4, kv_first / 4 + 4 * block + lane % 4); });
    }

    // Rows keys, columns queries from q_first on. Two lanes, of an even key and the odd one behind it, need the same
    // two counters, of an even query and the odd one: each takes one.
    template <int BLOCKS>
    __device__ __forceinline__ void draw_transposed(Kept<BLOCKS>& kept, int q_first, int kv_first) const {
        const int lane = threadIdx.x % 32, odd = lane / 4 % 2;
        collect(kept, [&](int block) {
            const uint4 words = signs(q_first / 2 + 8 * block + lane % 4 * 2 + odd, kv_first / 4 + lane / 8);
            return make_uint4(words.x, words.z, words.y, words.w);  // rows and columns change places
        });
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

    template <int BLOCKS, typename Signs>
    __device__ __forceinline__ static void collect(Kept<BLOCKS>& kept, Signs signs_of) {
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
            const uint4 signs = signs_of(block);
            const unsigned int word[4] = {signs.x, signs.y, signs.z, signs.w};
            unsigned int& bits = kept.words[block / 4];
            if (block % 4 == 0) bits = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) bits |= (word[i] & SIGNS) >> (15 - (block % 4 * 4 + i));
            // One block after the other, which saves registers, and here instead of where the bits are used: Hopper
            // kernels draw while their tensor cores work.
            asm volatile("" : "+r"(bits));
        }
    }
};

// The compile-time problem and tiling: the same fields as Spec and Tile of cuflash/spec.py, which render the two
// constants SPEC and TILE below. Everything a kernel decides with `if constexpr` comes from them.
#pragma once

enum class Dtype { float16, bfloat16, float32 };

struct Spec {
    Dtype dtype;         // of q, k, v and the result
    int head_dim;        // of q and k
    int head_dim_v;      // of v and out
    bool bounded_left;   // the mask has a left bound
    bool bounded_right;  // the mask has a right bound (causal is the bound 0)
    bool softcap;
    bool alibi;
    bool sinks;
    bool bias;
    bool mask;    // a dense boolean one
    bool packed;  // sequences are delimited by cu_seqlens
    bool dropout;
    bool deterministic;
    bool lean;        // the backward uses no workspace for dQ
    bool allow_tf32;  // float32 numbers as one term with the mantissa of TF32 instead of two
    bool parts;       // few queries: their heads share tiles, and thread blocks share the keys (forward_combine.cu)
};

struct Tile {
    int rows;    // queries a tile
    int cols;    // keys a tile
    int stages;  // tiles in flight
    int warps;
    int split;    // warps that share rows and divide the head dimension of the accumulators
    int blocks;   // thread blocks that must fit on a multiprocessor: bounds the registers; 0 leaves it to the compiler
    int p_sets;   // register sets of P in the Hopper forward: with two the steady state needs no row maximum
    int q_slots;  // pieces of 64 rows of Q in shared memory of the Hopper forward
    bool turns;   // the warpgroups of the Hopper forward issue their products in turn
    bool staged;  // O of the Hopper forward goes to memory through shared memory
    int vector;   // bytes one copy instruction moves: 16, or the size of an element where alignment allows no more
};

#include "variant.cuh"

constexpr int THREADS = 32 * TILE.warps;

// KERNEL(name, blocks)(ARGUMENT(Params) p, ...) heads a kernel of which `blocks` must fit on a multiprocessor (0: no
// such bound). Its arguments are passed by value; with CUFLASH_FLAT it is a function for the entry that
// cuflash/cuda/flat.py renders behind the source, for callers that pass every field of Params by itself.
#ifdef CUFLASH_FLAT
#define KERNEL(name, blocks)       \
    constexpr int BLOCKS = blocks; \
    __device__ __forceinline__ void name
#define ARGUMENT(Type) const Type&
#else
#define KERNEL(name, blocks) extern "C" __global__ void __launch_bounds__(THREADS, blocks) name
#define ARGUMENT(Type) const __grid_constant__ Type
#endif
constexpr float MINUS_INFINITY = __builtin_bit_cast(float, 0xFF800000u);
constexpr float LOWEST = __builtin_bit_cast(float, 0xFF7FFFFFu);    // the lowest finite one
constexpr float SMALLEST = __builtin_bit_cast(float, 0x00800000u);  // above 0, and normal

// x, of which the compiler does not know that it has it already.
__device__ __forceinline__ unsigned int forgotten(unsigned int x) {
    asm volatile("" : "+r"(x));
    return x;
}

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

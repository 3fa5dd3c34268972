// The run-time parameters of the portable kernels; cuflash/cuda/launch.py packs the same struct.
#pragma once
#include "spec.cuh"

// A tensor [batch, len, heads, dim] with a contiguous last axis; packed tensors have batch stride 0.
struct Tensor {
    void* data;
    long long batch_stride;  // strides in elements
    long long row_stride;
    long long head_stride;
};

// A float32 statistic of every query row, [batch, heads, q_len] (packed [heads, total]) with a contiguous last axis.
struct RowStatistic {
    float* data;
    long long batch_stride;
    long long head_stride;
};

// An array [batch, heads, q_len, kv_len], every stride free: 0 along an axis of length 1, which broadcasts it.
struct DenseArray {
    void* data;
    long long batch_stride;  // strides in elements
    long long head_stride;
    long long row_stride;
    long long col_stride;
};

// The keys of Philox's rounds, of which the kernels read them as constants: the low word is that of the first factor.
struct RoundKeys {
    unsigned long long r0, r1, r2, r3, r4, r5, r6;
};

// What every call has.
struct CommonParams {
    Tensor q, k, v, out;       // the forward's arrays
    Tensor dout, dq, dk, dv;   // the backward's, null in the forward
    RowStatistic lse;          // natural log of the softmax's denominator
    RowStatistic dlse;         // gradient of the LSE; may be null
    RowStatistic delta;        // D = rowsum(dO * O) - dLSE
    float* dq_sum;             // dQ / scale where a kernel sums it, zero before: pieces [batch, heads, q_len / PIECE,
                               // head_dim / PIECE] of [PIECE, PIECE], each in the order of accumulators; may be null
    int* dq_turns;             // deterministic: how many tiles of keys have added to a piece, zero before
    int* tickets;              // one counter: how many tasks the thread blocks of a Hopper kernel have taken
    int* tasks;                // packed: the tasks of the Hopper kernels (list.cuh)
    float* partial;            // sums over parts of the keys (partial.cuh)
    const void* alibi_slopes;  // [heads] (batch stride 0) or [batch, heads]
    long long alibi_batch_stride;
    long long alibi_head_stride;
    const void* sinks;  // [heads]
    long long sinks_stride;
    void* dsinks;              // [heads], sinks' dtype
    const void* cu_seqlens_q;  // [batch + 1] int32 or int64
    const void* cu_seqlens_k;
    RoundKeys keys;  // of the seed of dropout
    int batch;       // sequences
    int heads;
    int group;  // heads / kv_heads
    int q_len;  // packed: the total of all rows
    int kv_len;
    int q_tiles;                 // tiles of a head's queries (packed: an upper bound for all sequences)
    int kv_tiles;                // tiles of a head's keys
    int section_heads;           // heads whose tiles are worked on together, the longest first
    int parts, part_tiles;       // into how many parts the keys are divided, and the tiles of one
    int left, right;             // the mask keeps -left <= kv_pos - q_pos <= right
    unsigned int dropout_limit;  // in both halves: an element of P is drawn when its 15-bit number is below
    unsigned int dropout_flip;   // what makes ones of kept elements of ones of drawn ones, by XOR: 0, or all ones
    float dropout_scale;         // 1 / (1 - dropout_p)
    float scale;                 // of the scores
    float softcap;
    int cu_seqlens_int64;                    // flags: cu_seqlens are int64,
    int alibi_float32;                       // alibi_slopes are float32 (else the dtype of q),
    int sinks_float32;                       // sinks are float32 (else the dtype of q),
    int dq_float32, dk_float32, dv_float32;  // the gradient is float32 (else the dtype of q),
    int accumulate;                          // the gradients are added to what is there
};

constexpr bool DENSE = SPEC.bias || SPEC.mask;  // scores have terms that are read from memory

// What a call with a bias or a mask has besides. Without them it takes no bytes, and all is null.
template <bool PRESENT>
struct DenseParams {
    static constexpr DenseArray bias{}, mask{}, dbias{};
    static constexpr float* dbias_sum = nullptr;
    static constexpr long long dbias_size = 0;
    static constexpr int bias_float32 = 0;
};

template <>
struct DenseParams<true> {
    DenseArray bias;       // is added to the scores
    DenseArray mask;       // bool: true where a query may attend
    DenseArray dbias;      // gradient of the bias, contiguous, of its shape and dtype; may be null
    float* dbias_sum;      // where the bias is broadcast: the sum that becomes dbias, zero before; else null
    long long dbias_size;  // elements of dbias
    int bias_float32;      // flag: bias and dbias are float32 (else the dtype of q)
};

constexpr int PIECE = 64;  // rows and columns of a piece of dq_sum
constexpr int PIECE_SIZE = PIECE * PIECE;

struct Params : CommonParams, DenseParams<DENSE> {};

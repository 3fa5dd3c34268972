// The results of parts of the keys, on their way from forward_portable.cu to forward_combine.cu. For every kv head, row
// of its group (head by head within a query) and part: O [head_dim_v] as it was summed, the point m that its
// exponentials refer to (times UNIT, LOWEST without keys), and their sum l.
#pragma once
#include "params.cuh"

struct Partial {
    float* O;
    float2* statistics;  // (m, l), before O
    long long first;     // the kv head's place
    int parts;

    __device__ __forceinline__ Partial(const Params& p, int batch, int kv_head)
        : statistics(reinterpret_cast<float2*>(p.partial)),
          first((static_cast<long long>(batch) * (p.heads / p.group) + kv_head) * p.q_len * p.group),
          parts(p.parts) {
        O = p.partial + 2ll * p.batch * p.heads * p.q_len * p.parts;
    }

    __device__ __forceinline__ long long place(int row, int part) const { return (first + row) * parts + part; }
};

// Backward of a bias that is broadcast, last step: dbias is the float32 sum that backward_portable_dq.cu left, in the
// dtype of the bias. Both are contiguous.
#include "element.cuh"
#include "params.cuh"

KERNEL(backward_bias, 0)(ARGUMENT(Params) p) {
    const long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= p.dbias_size) return;
    if (p.bias_float32) {
        static_cast<float*>(p.dbias.data)[i] = p.dbias_sum[i];
    } else {
        from_float(static_cast<Element*>(p.dbias.data)[i], p.dbias_sum[i]);
    }
}

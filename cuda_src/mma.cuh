// Tensor-core products of one warp (mma.sync) and the loads of their operands, one PTX instruction a wrapper.
// Accumulator of m16n8: lane l holds rows l/4 and l/4 + 8 (registers 0, 1 and 2, 3), columns 2 (l%4) and + 1.
#pragma once

__device__ __forceinline__ void mma_f16_m16n8k16(float (&d)[4], const unsigned int (&a)[4], unsigned int b0,
                                                 unsigned int b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16_m16n8k16(float (&d)[4], const unsigned int (&a)[4], unsigned int b0,
                                                  unsigned int b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Turing: contraction length 8.
__device__ __forceinline__ void mma_f16_m16n8k8(float (&d)[4], unsigned int a0, unsigned int a1, unsigned int b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b));
}

// Four 8 x 16-byte matrices; lane l gives the address of row l%8 of matrix l/8.
__device__ __forceinline__ void load_matrix_x4(unsigned int (&r)[4], unsigned int smem_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_address));
}

__device__ __forceinline__ void load_matrix_x4_transposed(unsigned int (&r)[4], unsigned int smem_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_address));
}

// Four 8 x 8 matrices of 16-bit accumulators to memory (sm_90); addresses as above.
__device__ __forceinline__ void store_matrix_x4(unsigned int smem_address, const unsigned int (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(smem_address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// The same, transposed.
__device__ __forceinline__ void store_matrix_x4_transposed(unsigned int smem_address, const unsigned int (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(smem_address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

__device__ __forceinline__ unsigned int load_shared_word(unsigned int smem_address) {
    unsigned int word;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(smem_address) : "memory");
    return word;
}

__device__ __forceinline__ void store_shared_word(unsigned int smem_address, unsigned int word) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(smem_address), "r"(word) : "memory");
}

__device__ __forceinline__ void store_shared_pair(unsigned int smem_address, const unsigned int (&r)[2]) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(smem_address), "r"(r[0]), "r"(r[1]) : "memory");
}

__device__ __forceinline__ float2 load_shared_pair(unsigned int smem_address) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(smem_address));
    return pair;
}

__device__ __forceinline__ void store_shared(unsigned int smem_address, unsigned int x, unsigned int y, unsigned int z,
                                             unsigned int w) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(smem_address), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}

__device__ __forceinline__ void load_shared(unsigned int (&r)[4], unsigned int smem_address) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_address)
                 : "memory");
}

// Warpgroup products of Hopper (wgmma), one PTX instruction a wrapper, and the descriptors of their shared operands.
// D [64, N] += A [64, 16] B [16, N]: warp w of the group holds rows 16 w to 16 w + 15 of D as mma.sync's m16n8 tiles
// do.
#pragma once

#include "element.cuh"

// Accumulator tiles i and on as asm operands.
#define TILE_1(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define TILES_2(d, i) TILE_1(d, i), TILE_1(d, i + 1)
#define TILES_4(d, i) TILES_2(d, i), TILES_2(d, i + 2)
#define TILES_8(d, i) TILES_4(d, i), TILES_4(d, i + 4)
#define TILES_10(d, i) TILES_8(d, i), TILES_2(d, i + 8)
#define TILES_12(d, i) TILES_8(d, i), TILES_4(d, i + 8)
#define TILES_14(d, i) TILES_12(d, i), TILES_2(d, i + 12)
#define TILES_16(d, i) TILES_8(d, i), TILES_8(d, i + 8)
#define TILES_24(d, i) TILES_16(d, i), TILES_8(d, i + 16)
#define TILES_32(d, i) TILES_16(d, i), TILES_16(d, i + 16)

// Registers that asynchronous products wrote or read are not touched before this point.
template <int TILES>
__device__ __forceinline__ void pin(float (&d)[TILES][4]) {
#pragma unroll
    for (int i = 0; i < TILES; ++i) asm volatile("" : TILE_1(d, i)::"memory");
}

template <int STEPS>
__device__ __forceinline__ void pin(unsigned int (&a)[STEPS][4]) {
#pragma unroll
    for (int i = 0; i < STEPS; ++i)
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

// Registers of accumulators and operands that were touched are visible to the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most PENDING groups are under way. Nobody may touch their registers before.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Descriptor of a tile of 128-byte rows swizzled by 128 bytes: address, leading and stride byte offsets in units of 16.
// K-major operands (rows are the contraction's contiguous axis): the stride offset is 8 rows, the leading one unused,
// 16 more of the contraction are 32 bytes further. MN-major operands: the leading offset is the next panel of 64
// columns, 16 more of the contraction are 16 rows, 2048 bytes, further.
__device__ __forceinline__ unsigned long long tile_descriptor(unsigned int smem_address, int panel_bytes) {
    return static_cast<unsigned long long>((smem_address & 0x3FFFF) >> 4) |
           static_cast<unsigned long long>(panel_bytes >> 4) << 16 | static_cast<unsigned long long>(1024 >> 4) << 32 |
           1ull << 62;
}

// The same without swizzle, for a K-major operand of 8 columns that stands for both halves of a contraction of 16: rows
// of 16 bytes one after the other.
__device__ __forceinline__ unsigned long long narrow_descriptor(unsigned int smem_address) {
    return static_cast<unsigned long long>((smem_address & 0x3FFFF) >> 4) | static_cast<unsigned long long>(128 >> 4)
                                                                                << 32;
}

// The names of the first accumulator registers.
#define REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32 \
    REGISTERS_16     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_40 REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define REGISTERS_48 REGISTERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_56 REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define REGISTERS_64 REGISTERS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_96                                                                   \
    REGISTERS_64                                                                       \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_128                                                                              \
    REGISTERS_96                                                                                   \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// How B lies in shared memory: K_MAJOR with the contraction contiguous, MN_MAJOR with its columns.
enum Major { K_MAJOR = 0, MN_MAJOR = 1 };

// The instruction with A (K-major) and B in shared memory; %A, %B, %P and %T are the numbers of the operands that
// follow the accumulators.
#define WGMMA_SS_OF(TYPE, N, REGISTERS, TILES, A, B, P, T)                                                         \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " {" REGISTERS "}, %" #A ", %" #B ", p, 1, 1, 0, %" #T "; }"                             \
                 : TILES(d, 0)                                                                                     \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(MAJOR)))

// The same with A in registers.
#define WGMMA_RS_OF(TYPE, N, REGISTERS, TILES, A0, A1, A2, A3, B, P, T)                                              \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #P ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE   \
                 "." TYPE " {" REGISTERS "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #T "; }" \
                 : TILES(d, 0)                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),                   \
                   "n"(static_cast<int>(MAJOR)))

// Either, for the dtype of the kernel.
#define WGMMA(OF, ...)                             \
    if constexpr (SPEC.dtype == Dtype::bfloat16) { \
        OF("bf16", __VA_ARGS__);                   \
    } else {                                       \
        OF("f16", __VA_ARGS__);                    \
    }

// d [64, 8 TILES] = A B, or += with `add`. Asynchronous: see wgmma_commit.
template <Major MAJOR, int TILES>
__device__ __forceinline__ void wgmma_ss(float (&d)[TILES][4], unsigned long long a, unsigned long long b, bool add) {
    if constexpr (TILES == 4) {
        WGMMA(WGMMA_SS_OF, 32, REGISTERS_16, TILES_4, 16, 17, 18, 19)
    } else if constexpr (TILES == 8) {
        WGMMA(WGMMA_SS_OF, 64, REGISTERS_32, TILES_8, 32, 33, 34, 35)
    } else if constexpr (TILES == 10) {
        WGMMA(WGMMA_SS_OF, 80, REGISTERS_40, TILES_10, 40, 41, 42, 43)
    } else if constexpr (TILES == 12) {
        WGMMA(WGMMA_SS_OF, 96, REGISTERS_48, TILES_12, 48, 49, 50, 51)
    } else if constexpr (TILES == 14) {
        WGMMA(WGMMA_SS_OF, 112, REGISTERS_56, TILES_14, 56, 57, 58, 59)
    } else {
        static_assert(TILES == 16);
        WGMMA(WGMMA_SS_OF, 128, REGISTERS_64, TILES_16, 64, 65, 66, 67)
    }
}

template <Major MAJOR, int TILES>
__device__ __forceinline__ void wgmma_rs(float (&d)[TILES][4], const unsigned int (&a)[4], unsigned long long b,
                                         bool add) {
    if constexpr (TILES == 8) {
        WGMMA(WGMMA_RS_OF, 64, REGISTERS_32, TILES_8, 32, 33, 34, 35, 36, 37, 38)
    } else if constexpr (TILES == 16) {
        WGMMA(WGMMA_RS_OF, 128, REGISTERS_64, TILES_16, 64, 65, 66, 67, 68, 69, 70)
    } else if constexpr (TILES == 24) {
        WGMMA(WGMMA_RS_OF, 192, REGISTERS_96, TILES_24, 96, 97, 98, 99, 100, 101, 102)
    } else {
        static_assert(TILES == 32);
        WGMMA(WGMMA_RS_OF, 256, REGISTERS_128, TILES_32, 128, 129, 130, 131, 132, 133, 134)
    }
}

// Accumulator tile `n`, rounded to its place in the left operand of the next product.
template <int STEPS>
__device__ __forceinline__ void pack_tile(unsigned int (&packed)[STEPS][4], int n, const float (&d)[4]) {
    packed[n / 2][n % 2 * 2] = pack(d[0], d[1]);
    packed[n / 2][n % 2 * 2 + 1] = pack(d[2], d[3]);
}

template <int TILES>
__device__ __forceinline__ void pack_all(unsigned int (&packed)[TILES / 2][4], const float (&d)[TILES][4]) {
#pragma unroll
    for (int n = 0; n < TILES; ++n) pack_tile(packed, n, d[n]);
}

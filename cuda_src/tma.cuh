// Bulk tensor copies of Hopper, one PTX instruction a wrapper. Tensors are described by maps that the host encodes
// (cuflash/cuda/tensor_map.py): [batch, heads, dim / 64, len, 64], so that one copy loads a tile as panels of 64
// elements, each row 128 bytes, swizzled by 128 bytes; rows beyond the tensor become zeros.
#pragma once
#include "schedule.cuh"

struct alignas(64) TensorMap {
    unsigned char opaque[128];
};

// How long L2 keeps what a copy reads; the encodings of createpolicy with fraction 1.
constexpr unsigned long long EVICT_FIRST = 0x12F0000000000000ull;
constexpr unsigned long long EVICT_LAST = 0x14F0000000000000ull;

// X_smem = the tile at row `row` of one head; `barrier` counts the bytes.
__device__ __forceinline__ void load_tile_tma(unsigned int X_smem, const TensorMap& map, unsigned int barrier, int row,
                                              int head, int batch, unsigned long long policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4, %3, %5, %6}], [%2], %7;" ::"r"(X_smem),
        "l"(&map), "r"(barrier), "r"(0), "r"(row), "r"(head), "r"(batch), "l"(policy)
        : "memory");
}

// The same where dim is not a multiple of 64: the map is [batch, heads, len, dim], and one copy loads one panel, the
// columns from `col` on; those beyond the tensor become zeros.
//
// And where tensors are packed. There rows beyond a sequence's end must count as rows beyond the tensor, though the
// next sequence lies behind. So the map is [any, any, heads, RAGGED, dim]: a sequence's rows are counted so that its
// last is the last of the axis of RAGGED rows; the second axis, of the same stride, says behind which row that is; and
// the first, with minus that stride modulo 2^64 / RAGGED, takes RAGGED rows away again.
__device__ __forceinline__ void load_panel_tma(unsigned int X_smem, const TensorMap& map, unsigned int barrier, int col,
                                               int row, int head, int place, unsigned long long policy) {
    if constexpr (SPEC.packed) {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(X_smem),
            "l"(&map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(place), "r"(RAGGED), "l"(policy)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(X_smem),
            "l"(&map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(place), "l"(policy)
            : "memory");
    }
}

// X_smem = the tile at row `row` of one head, DIM columns in panels of PANEL bytes; `row` and `place` are coordinates
// of the map (Sequence::q_row, q_place).
template <int DIM, int PANEL>
__device__ __forceinline__ void load_panels(unsigned int X_smem, const TensorMap& map, unsigned int barrier, int row,
                                            int head, int place, unsigned long long policy) {
    if constexpr (DIM % 64 == 0 && !SPEC.packed) {
        load_tile_tma(X_smem, map, barrier, row, head, place, policy);
    } else {
#pragma unroll
        for (int panel = 0; panel < ceil_div(DIM, 64); ++panel) {
            load_panel_tma(X_smem + panel * PANEL, map, barrier, 64 * panel, row, head, place, policy);
        }
    }
}

// The tile at row `row` of one head = X_smem, panels of PANEL bytes; what lies beyond the tensor is left out.
template <int DIM, int PANEL>
__device__ __forceinline__ void store_panels(const TensorMap& map, unsigned int X_smem, int row, int head, int place) {
    if constexpr (DIM % 64 == 0 && !SPEC.packed) {
        asm volatile(
            "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %2, %4, %5}], [%1];" ::"l"(&map),
            "r"(X_smem), "r"(0), "r"(row), "r"(head), "r"(place)
            : "memory");
    } else {
#pragma unroll
        for (int panel = 0; panel < ceil_div(DIM, 64); ++panel) {
            const unsigned int panel_smem = X_smem + panel * PANEL;
            if constexpr (SPEC.packed) {
                asm volatile(
                    "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::
                        "l"(&map),
                    "r"(panel_smem), "r"(64 * panel), "r"(row), "r"(head), "r"(place), "r"(RAGGED)
                    : "memory");
            } else {
                asm volatile(
                    "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
                        &map),
                    "r"(panel_smem), "r"(64 * panel), "r"(row), "r"(head), "r"(place)
                    : "memory");
            }
        }
    }
}

// X_gmem += X_smem for `bytes` bytes of float32, each element atomically.
__device__ __forceinline__ void reduce_add_bulk(float* X_gmem, unsigned int X_smem, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(X_gmem),
                 "r"(X_smem), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until all of this thread's committed groups have read their shared memory, or are complete.
__device__ __forceinline__ void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Barriers of Hopper kernels, one PTX instruction a wrapper: mbarriers in shared memory between TMA, producer and
// consumers, named barriers between warps, and the registers that a warpgroup hands over.
#pragma once

#include "spec.cuh"

// `arrivals` arrivals complete a phase.
__device__ __forceinline__ void barrier_init(unsigned int barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Barriers initialised by this thread are seen by TMA.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned int barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and let the phase wait for `bytes` from TMA too.
__device__ __forceinline__ void barrier_expect(unsigned int barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Whether the phase of this parity is complete; waits a while before it says no.
__device__ __forceinline__ bool barrier_try_wait(unsigned int barrier, unsigned int parity) {
    unsigned int done;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return done != 0;
}

__device__ __forceinline__ void barrier_wait(unsigned int barrier, unsigned int parity) {
    while (!barrier_try_wait(barrier, parity)) {
    }
}

// A place in a ring of buffers and the parity of its barriers' phase.
template <int STAGES = TILE.stages>
struct Ring {
    int stage = 0;
    unsigned int parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }

    __device__ __forceinline__ Ring previous() const {
        Ring ring;
        ring.stage = stage == 0 ? STAGES - 1 : stage - 1;
        ring.parity = stage == 0 ? parity ^ 1 : parity;
        return ring;
    }
};

// Named barrier `id` (1 to 15) of `threads` threads: those that wait, and those that only say that they came.
__device__ __forceinline__ void named_barrier_wait(int id, int threads) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
    asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same with a vote of those that wait, all of them: whether all say yes.
__device__ __forceinline__ bool named_barrier_all(int id, int threads, bool yes) {
    int all;
    asm volatile(
        "{ .reg .pred p, q; setp.ne.b32 p, %3, 0; barrier.cta.red.and.pred q, %1, %2, p; selp.b32 %0, 1, 0, q; }"
        : "=r"(all)
        : "r"(id), "r"(threads), "r"(static_cast<int>(yes))
        : "memory");
    return all != 0;
}

// What this thread wrote to shared memory is seen by TMA and wgmma of those whom it tells by a barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Give registers back to, or take them from, the pool of the thread block; a whole warpgroup, one branch a role. The
// pool is what the block was launched with, so many a thread: who takes more than that in all waits for ever.
constexpr int LAUNCH_REGISTERS = 65'536 / THREADS / 8 * 8;

template <int REGISTERS>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Counters in global memory that order what thread blocks do: the one that comes after reads no data of the others, it
// only issues its copies once it has seen the counter.
__device__ __forceinline__ int load_relaxed(const int* counter) {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

__device__ __forceinline__ void add_release(int* counter, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

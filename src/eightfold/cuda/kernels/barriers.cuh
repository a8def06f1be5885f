#pragma once
// Rings of slots in shared memory: asynchronous copies fill them, warps that never meet read them. A slot has two barriers,
// one passed when all copies are there, one when every reader is done with it. Bulk copies, which pass a barrier, too.
#include "common.cuh"

// The next slot to be filled, read or left, of COUNT slots of BYTES each from the shared address FIRST on.
template <u32 FIRST, int BYTES, int COUNT>
struct RingSlot {
  u32 at = 0, round = 0;
  __device__ __forceinline__ u32 address() const { return FIRST + at * BYTES; }
  __device__ __forceinline__ void advance() {
    if (++at == COUNT) {
      at = 0;
      round ^= 1;
    }
  }
};

__device__ __forceinline__ void start_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}
// Copy `bytes`, a multiple of 16, from global memory to the shared address `to` and make the barrier wait for them: by one
// thread, from compute capability 9.0 on. It reads what kernels stored that this one has waited for as a whole. A
// fence.proxy.async between would be for nothing, and wait until all copies that the thread has begun are there.
__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }" ::"r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// Barriers are to be seen by bulk copies.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives when all copies that this thread has begun are there.
__device__ __forceinline__ void arrive_with_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
// Until the barrier's phase `round` (0 or 1, the phase before the first counts as 1) is over.
__device__ __forceinline__ void wait(u32 barrier, u32 round) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred over;\nAGAIN: mbarrier.try_wait.parity.shared.b64 over, [%0], %1;\n@!over bra AGAIN; }"
               ::"r"(barrier), "r"(round) : "memory");
#else
  asm volatile("{ .reg .pred over;\nAGAIN: mbarrier.test_wait.parity.shared.b64 over, [%0], %1;\n@!over bra AGAIN; }"
               ::"r"(barrier), "r"(round) : "memory");
#endif
}

#pragma once
// Codes to float16 weights, two at a time: nibbles in the order of pair_nibbles to eight weights in theirs. Wants E8P_STAGES,
// E81B_STAGES, COPIES.
#include "decode.cuh"

constexpr int STAGES = E8P_STAGES + E81B_STAGES;

__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u32 pair_of(float f) { return float_to_half(f) * 0x10001u; }
__device__ __forceinline__ void multiply_half(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Eight weights of one code as pairs of float16, (u - OFFSET / 2) / 512, exactly: a nibble in the last bits of a float16,
// or in the four before, is u / 2^24, or u / 2^20, of subnormal numbers.
template <int OFFSET>
__device__ __forceinline__ void to_pairs(u32 (&pairs)[4], u32 nibbles) {
  constexpr u32 LOW = 0x000f000f, NEXT = 0x00f000f0, TIMES_2_15 = 0x78007800, TIMES_2_11 = 0x68006800;
  constexpr u32 MINUS = OFFSET == 15 ? 0xa380a380 : 0xa400a400; // -7.5 / 512, -8 / 512
  pairs[0] = fma_pair(nibbles & LOW, TIMES_2_15, MINUS);
  pairs[1] = fma_pair(nibbles & NEXT, TIMES_2_11, MINUS);
  pairs[2] = fma_pair(nibbles >> 8 & LOW, TIMES_2_15, MINUS);
  pairs[3] = fma_pair(nibbles >> 8 & NEXT, TIMES_2_11, MINUS);
}

// All stages of one code: eight weights divided by 256 times the first ratio. The last stage comes first, so that what is
// rounded on the way is small. ratios[s]: that of stage s + 1 to stage s.
__device__ __forceinline__ void decode(u32 (&weights)[4], const u32 (&nibbles)[STAGES], const u32 (&ratios)[STAGES]) {
#pragma unroll
  for (int s = STAGES - 1; s >= 0; --s) {
    u32 pairs[4];
    if (s < E8P_STAGES) to_pairs<15>(pairs, nibbles[s]);
    else to_pairs<16>(pairs, nibbles[s]);
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = s == STAGES - 1 ? pairs[i] : fma_pair(weights[i], ratios[s], pairs[i]);
  }
}

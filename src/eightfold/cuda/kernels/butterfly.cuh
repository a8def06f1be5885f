#pragma once
// Hadamard transforms on tensor cores: 256 coordinates of a warp as a 16 x 16 matrix, multiplied by one of order 16 from
// either side, are eight mma; additions between lanes would be 40 shuffles.
//
// Coordinate 8 * lane + r lies in v[r] before and after. With lane = 4 g + t, row k and column n of the matrix have the
// bits of the coordinate
//   k: 0 (neighbours in a register), 3 and 4 (t), 1      n: 5, 6 and 7 (g), 2
// so that v is a B fragment of the first product and what the first leaves is one of the second, over n. A float goes in
// as two bfloat16, which keep 17 bits of it and all of its range.
#include "common.cuh"

// A fragments of both matrices, of entries 1, -1 and 0: the transforms are of order 1 << log.
struct Butterfly {
  u32 k[4], n[4];
  int log;
};

// The Hadamard matrix over the bits `active` of row and column; over the others the identity, with zeros of either sign.
// ONE: 1 as 16 bits of the operands' type.
template <u32 ONE = 0x3f80u>
__device__ __forceinline__ void hadamard_fragment(u32 (&a)[4], int active) {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane)); // volatile: not to be kept ready in registers through a loop
  // Register r has row g + 8 (r & 1) of columns 2 t + 8 (r >> 1) and the next. The bits of both numbers act apart: of the
  // middle two come sign and presence for all registers, of the last which of a pair, of the first which register.
  const int g = lane >> 2, t = lane & 3, middle = active >> 1 & 3;
  const bool odd = g & 1, last = active & 1, first = active & 8;
  const u32 one = (g >> 1 ^ t) & ~middle ? 0 : ONE | (0x6996u >> (g >> 1 & t & middle) & 1) << 15; // bits of 0x6996: parities
  const u32 left = last || !odd ? one : 0, right = last ? one ^ odd << 15 : odd ? one : 0;
  a[0] = left | right << 16;
  a[1] = a[2] = first ? a[0] : 0;
  a[3] = first ? a[0] ^ 0x80008000u : a[0];
}
__device__ __forceinline__ Butterfly butterfly(int log) {
  Butterfly b;
  b.log = log;
  hadamard_fragment(b.k, (log > 0) | (log > 3) << 1 | (log > 4) << 2 | (log > 1) << 3);
  hadamard_fragment(b.n, (log > 5) | (log > 6) << 1 | (log > 7) << 2 | (log > 2) << 3);
  return b;
}

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The matrix `a` times floats: columns of one tile.
__device__ __forceinline__ void multiply_floats(float (&d)[4], const u32 (&a)[4], float x0, float x1, float x2, float x3) {
  const u32 high0 = bfloat_pair(x0, x1), high1 = bfloat_pair(x2, x3);
  const u32 low0 = bfloat_pair(x0 - __uint_as_float(high0 << 16), x1 - __uint_as_float(high0 & 0xffff0000u));
  const u32 low1 = bfloat_pair(x2 - __uint_as_float(high1 << 16), x3 - __uint_as_float(high1 & 0xffff0000u));
  d[0] = d[1] = d[2] = d[3] = 0.f;
  multiply(d, a, low0, low1);
  multiply(d, a, high0, high1);
}
// Unnormalised transforms of the 256 coordinates of a warp, 8 * lane + r in v[r].
__device__ __forceinline__ void transform(float (&v)[8], const Butterfly& b) {
  float c[2][4], d[2][4];
#pragma unroll
  for (int i = 0; i < 2; ++i) multiply_floats(c[i], b.k, v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    multiply_floats(d[i], b.n, c[0][2 * i], c[0][2 * i + 1], c[1][2 * i], c[1][2 * i + 1]);
#pragma unroll
    for (int r = 0; r < 4; ++r) v[2 * i + (r & 1) + 4 * (r >> 1)] = d[i][r];
  }
}

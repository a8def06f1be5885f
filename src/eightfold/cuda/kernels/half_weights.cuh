#pragma once
// Codes to float16 weights as the A operand of tensor cores: lane (g, t) decodes the codes 2 t and 2 t + 1 of rows g and
// g + 8 of a tile of 16 rows by 64 columns. Wants E8P_STAGES, E81B_STAGES, M_TILES (tiles of a warp), COPIES.
#include "pairs.cuh"

constexpr int CODE_BYTES = 256 * E8P_STAGES + 128 * E81B_STAGES; // of 16 rows by 64 columns: stage, row, code

__device__ __forceinline__ u32 read_word(u32 at) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
  return word;
}

// Of a warp's rows, a lane's: words of two codes, or the nibbles of one of these codes.
using Words = u32[M_TILES][2][STAGES];

__device__ __forceinline__ void read_codes(Words& words, u32 from, u32 lane) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 tile = from + m * CODE_BYTES;
#pragma unroll
      for (int s = 0; s < E8P_STAGES; ++s) words[m][half][s] = read_word(tile + 256 * s + 128 * half + 4 * lane);
#pragma unroll
      for (int s = E8P_STAGES; s < STAGES; ++s) {
        u16 two;
        asm volatile("ld.shared.u16 %0, [%1];"
                     : "=h"(two) : "r"(tile + 256 * E8P_STAGES + 64 * half + 2 * lane) : "memory");
        words[m][half][s] = two;
      }
    }
}

// Of code number CODE (0 or 1) of every word.
template <int CODE>
__device__ __forceinline__ void find_nibbles(Words& nibbles, const Words& words, u32 lane4) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int s = 0; s < STAGES; ++s) {
        const u32 word = words[m][half][s];
        nibbles[m][half][s] = s < E8P_STAGES ? look_up<0, 2 * CODE + 1>(word, lane4) ^ look_up<1, 2 * CODE>(word, lane4)
                                             : look_up<2, CODE>(word, lane4);
      }
}

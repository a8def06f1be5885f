// The product of a linear for 17 to some hundred tokens, on float16 tensor cores: every weight is decoded once for a tile
// of TOKENS tokens. The activations come rotated from rotate_input; rotate_output adds the partial sums.
//
// A CTA owns ROWS rows by one tile of tokens at a time; a warp M_TILES tiles of 16 rows by all of these tokens. A step is
// 64 columns. The steps of all row tiles, one tile after the other, are cut evenly among the CTAs, so that a row tile may
// be shared by several: each stores the sums of its part as a slice of its own, slice 0 being the first part. So results
// do not depend on timing, nor on the other tokens of a launch of as many token tiles.
//
// Codes and activations of the next steps come by asynchronous copies into a ring of DEPTH slots. Lane (g, t) decodes the
// codes 2 t and 2 t + 1 of rows g and g + 8: each code is the lane's part of two mma over 16 columns, of which the order
// does not matter as long as the activations have the same; theirs are then 16 bytes in a row.
//
// Compiled with E8P_STAGES, E81B_STAGES, TOKENS, M_TILES, WARPS, CTAS (on a multiprocessor), DEPTH, COPIES (of the tables).
#include "decode.cuh"

constexpr int STAGES = E8P_STAGES + E81B_STAGES;
constexpr int N_TILES = TOKENS / 8;
constexpr int ROWS = 16 * M_TILES * WARPS;
constexpr int CODE_BYTES = 256 * E8P_STAGES + 128 * E81B_STAGES; // of 16 rows by 64 columns: stage, row, code
constexpr int X_BYTES = 128 * TOKENS;                            // of TOKENS by 64 columns
constexpr int SLOT = X_BYTES + WARPS * M_TILES * CODE_BYTES;

struct Params {
  const void* codes[STAGES]; // in the order that the strides below say
  const u16* x;              // float16 [tokens, columns]
  const float* ratios;
  float* partial;            // [slices, tokens, rows]
  u32 row_stride, column_stride, tile_stride; // as for matvec
  int tokens, columns, rows, slices;          // rows: a multiple of 16; columns: of 64
};

template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  if (BYTES == 16) asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global.L2::256B [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}
__device__ __forceinline__ u32 read_word(u32 at) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
  return word;
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u32 pair_of(float f) { return float_to_half(f) * 0x10001u; }

// Eight weights of one code as pairs of float16, (u - OFFSET / 2) / 512, exactly: a nibble in the last bits of a float16,
// or in the four before, is u / 2^24, or u / 2^20, of subnormal numbers.
template <int OFFSET>
__device__ __forceinline__ void to_pairs(u32 (&pairs)[4], u32 pattern, u32 signs) {
  constexpr u32 LOW = 0x000f000f, NEXT = 0x00f000f0, TIMES_2_15 = 0x78007800, TIMES_2_11 = 0x68006800;
  constexpr u32 MINUS = OFFSET == 15 ? 0xa380a380 : 0xa400a400; // -7.5 / 512, -8 / 512
  const u32 shifted = (pattern ^ signs) >> 8;
  asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(pairs[0]) : "r"(pattern), "r"(signs), "n"(LOW)); // (a ^ b) & c
  asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(pairs[1]) : "r"(pattern), "r"(signs), "n"(NEXT));
  pairs[0] = fma_pair(pairs[0], TIMES_2_15, MINUS);
  pairs[1] = fma_pair(pairs[1], TIMES_2_11, MINUS);
  pairs[2] = fma_pair(shifted & LOW, TIMES_2_15, MINUS);
  pairs[3] = fma_pair(shifted & NEXT, TIMES_2_11, MINUS);
}

// Code number CODE (0 or 1) of one row, all stages: eight weights divided by 256 times the first ratio. The last stage
// comes first, so that what is rounded on the way is small. ratios[s]: that of stage s + 1 to stage s.
template <int CODE>
__device__ __forceinline__ void decode(u32 (&weights)[4], const u32 (&words)[STAGES], const u32 (&ratios)[STAGES],
                                       u32 lane4) {
#pragma unroll
  for (int s = STAGES - 1; s >= 0; --s) {
    u32 pairs[4];
    if (s < E8P_STAGES) to_pairs<15>(pairs, look_up<0, 2 * CODE + 1>(words[s], lane4), look_up<1, 2 * CODE>(words[s], lane4));
    else to_pairs<16>(pairs, look_up<2, CODE>(words[s], lane4), 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = s == STAGES - 1 ? pairs[i] : fma_pair(weights[i], ratios[s], pairs[i]);
  }
}

template <int CODE>
__device__ __forceinline__ void multiply_codes(float (&sums)[M_TILES][N_TILES][4], const u32 (&words)[M_TILES][2][STAGES],
                                               const u32 (&ratios)[STAGES], u32 x, u32 lane4) {
  u32 a[M_TILES][2][4];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) decode<CODE>(a[m][half], words[m][half], ratios, lane4);
#pragma unroll
  for (int n = 0; n < N_TILES; ++n) {
    u32 b[4];
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(x + 1024 * n));
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
      multiply(sums[m][n], a[m][0][0], a[m][1][0], a[m][0][1], a[m][1][1], b[0], b[1]);
      multiply(sums[m][n], a[m][0][2], a[m][1][2], a[m][0][3], a[m][1][3], b[2], b[3]);
    }
  }
}

// Where a warp's codes lie in global memory, and where its lanes put them: lane l takes row l % 16 of every other tile.
struct Codes {
  u32 at[(M_TILES + 1) / 2]; // number of the first code of the lane's row in the next step
  int tiles;                 // of 16 rows, all there are

  __device__ __forceinline__ void start(const Params& p, int row_tile, int step, int warp, int lane) {
#pragma unroll
    for (int m = 0; m < (M_TILES + 1) / 2; ++m) {
      const int tile = (row_tile * WARPS + warp) * M_TILES + 2 * m + (lane >> 4);
      const bool there = 2 * m + (lane >> 4) < M_TILES && tile < tiles;
      at[m] = there ? tile * p.tile_stride + (lane & 15) * p.row_stride + step * p.column_stride : ~0u;
    }
  }
  __device__ __forceinline__ void copy(const Params& p, u32 to, int lane) { // of the warp's codes in a slot
#pragma unroll
    for (int m = 0; m < (M_TILES + 1) / 2; ++m) {
      if (at[m] == ~0u) continue; // no such rows: what lies in the slot is multiplied and not stored
      const u32 tile = to + (2 * m + (lane >> 4)) * CODE_BYTES;
#pragma unroll
      for (int s = 0; s < E8P_STAGES; ++s)
        copy_async<16>(tile + 256 * s + 16 * (lane & 15), static_cast<const u8*>(p.codes[s]) + 2ull * at[m]);
#pragma unroll
      for (int s = 0; s < E81B_STAGES; ++s)
        copy_async<8>(tile + 256 * E8P_STAGES + 8 * (lane & 15), static_cast<const u8*>(p.codes[E8P_STAGES + s]) + at[m]);
      at[m] += p.column_stride;
    }
  }
};

// The next 64 columns of a tile of tokens, eight columns a thread and round: eight number e of a token lies in a slot at
// word e ^ token % 2, so that the lanes of a quarter warp, two tokens by four even or odd eights, read different banks.
struct Activations {
  static constexpr int ROUND = 4 * WARPS; // tokens
  const u16* at;
  u32 to;     // in a slot
  int tokens; // that there are from the thread's on
  int step;

  __device__ __forceinline__ void start(const Params& p, int token0, int first_step) {
    const int token = threadIdx.x >> 3, eight = threadIdx.x & 7;
    at = p.x + (long long)(token0 + token) * p.columns + 64 * first_step + 8 * eight;
    to = 128 * token + 16 * (eight ^ (token & 1));
    tokens = min(TOKENS, p.tokens - token0) - token;
    step = first_step;
  }
  __device__ __forceinline__ void copy(const Params& p, u32 slot, int steps) {
#pragma unroll
    for (int round = 0; round < (TOKENS + ROUND - 1) / ROUND; ++round)
      if (round * ROUND < tokens)
        copy_async<16>(slot + to + 128 * ROUND * round, at + (long long)(round * ROUND) * p.columns);
    at += 64;
    if (++step == steps) {
      step = 0;
      at -= p.columns;
    }
  }
};

// Store a warp's sums of a row tile and start again from zero.
__device__ __forceinline__ void store(float (&sums)[M_TILES][N_TILES][4], const Params& p, int slice, int token0, int row0,
                                      float factor, int lane) {
  int token = token0 + 2 * (lane & 3);
  float* to = p.partial + ((long long)slice * p.tokens + token) * p.rows + row0 + (lane >> 2);
#pragma unroll
  for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
        if (token + (i & 1) < p.tokens && row0 + 16 * m < p.rows)
          to[(i & 1 ? p.rows : 0) + 16 * m + 8 * (i >> 1)] = sums[m][n][i] * factor;
        sums[m][n][i] = 0;
      }
    token += 8;
    to += 8ll * p.rows;
  }
}

// Grid: CTAs that share the steps, tiles of tokens.
extern "C" __global__ void __launch_bounds__(32 * WARPS, CTAS) gemm(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 dynamic[];
  launch_dependents();
  const u32 base = u32(__cvta_generic_to_shared(dynamic));
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const u32 steps = p.columns / 64, all = steps * ((p.rows + ROWS - 1) / ROWS), ctas = gridDim.x, cta = blockIdx.x;
  const int count = all * (cta + 1) / ctas - all * cta / ctas;
  const int token0 = blockIdx.y * TOKENS;
  int row_tile = all * cta / ctas / steps, step = all * cta / ctas - row_tile * steps;

  // Weights depend on nothing: their first copies go out before the activations are there.
  const u32 my_codes = X_BYTES + warp * M_TILES * CODE_BYTES; // in a slot
  Codes codes;
  codes.tiles = p.rows / 16;
  codes.start(p, row_tile, step, warp, lane);
  int next_tile = row_tile, next_step = step;
  const auto copy_codes = [&](int slot) {
    codes.copy(p, TABLES_END + slot * SLOT + my_codes, lane);
    if (++next_step == steps) {
      next_step = 0;
      codes.start(p, ++next_tile, 0, warp, lane);
    }
  };
  Activations activations;
  activations.start(p, token0, step);
#pragma unroll 1
  for (int d = 0; d < DEPTH - 1; ++d)
    if (d < count) copy_codes(d);
  if (base > TABLES) __trap();
  fill_tables<true>(dynamic - base + TABLES);
  u32 ratios[STAGES]; // of stage s + 1 to stage s; the first stage's own waits until sums are stored
  const float first_ratio = p.ratios[0];
#pragma unroll
  for (int s = 0; s + 1 < STAGES; ++s) ratios[s] = pair_of(p.ratios[s + 1] / p.ratios[s]);
  wait_for_previous();
#pragma unroll 1
  for (int d = 0; d < DEPTH - 1; ++d) {
    if (d < count) activations.copy(p, TABLES_END + d * SLOT, steps);
    commit();
  }

  const u32 of_lane = COPIES == 32 ? 4 * lane : 0, g = lane >> 2, t = lane & 3;
  const u32 x0 = 128 * g + 16 * (2 * t + (g & 1)), x1 = x0 ^ 16;
  float sums[M_TILES][N_TILES][4] = {};
  for (int i = 0, slot = 0; i < count; ++i) {
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2) : "memory");
    __syncthreads(); // everybody's copies are there, and the slot before this one is free
    if (i + DEPTH - 1 < count) {
      const int free = slot == 0 ? DEPTH - 1 : slot - 1;
      copy_codes(free);
      activations.copy(p, TABLES_END + free * SLOT, steps);
    }
    commit();
    const u32 at = TABLES_END + slot * SLOT;
    u32 words[M_TILES][2][STAGES];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const u32 tile = at + my_codes + m * CODE_BYTES;
#pragma unroll
        for (int s = 0; s < E8P_STAGES; ++s) words[m][half][s] = read_word(tile + 256 * s + 128 * half + 4 * lane);
#pragma unroll
        for (int s = E8P_STAGES; s < STAGES; ++s) {
          u16 two;
          asm volatile("ld.shared.u16 %0, [%1];" : "=h"(two) : "r"(tile + 256 * E8P_STAGES + 64 * half + 2 * lane));
          words[m][half][s] = two;
        }
      }
    multiply_codes<0>(sums, words, ratios, at + x0, of_lane);
    multiply_codes<1>(sums, words, ratios, at + x1, of_lane);
    if (++slot == DEPTH) slot = 0;
    if (++step < steps && i + 1 < count) continue;
    const u32 owner = ((row_tile * steps + 1) * ctas - 1) / all; // the CTA of the row tile's first step
    const int row0 = row_tile * ROWS + 16 * M_TILES * warp;
    store(sums, p, cta - owner, token0, row0, 256.f * first_ratio, lane);
    if (step == steps) // the row tile is complete: zeros for slices that others have and it does not
      for (int slice = cta - owner + 1; slice < p.slices; ++slice)
        for (int token = token0; token < min(token0 + TOKENS, p.tokens); ++token)
          for (int row = row0 + lane; row < min(row0 + 16 * M_TILES, p.rows); row += 32)
            p.partial[((long long)slice * p.tokens + token) * p.rows + row] = 0;
    step = 0;
    ++row_tile;
  }
}

// The product of a linear for 17 to some hundred tokens, on float16 tensor cores: every weight is decoded once for a tile
// of TOKENS tokens. The activations come rotated from rotate_input; rotate_output adds the partial sums.
//
// A CTA owns ROWS rows by one tile of tokens at a time; a warp M_TILES tiles of 16 rows by all of these tokens. A step is
// 64 columns. The steps of all row tiles, one tile after the other, are cut evenly among the CTAs, so that a row tile may
// be shared by several: each stores the sums of its part as a slice of its own, slice 0 being the first part. So results
// do not depend on timing, nor on the other tokens of a launch of as many token tiles.
//
// Codes and activations come by asynchronous copies, LEAD steps ahead, into a ring of DEPTH slots. No barrier holds all
// warps: a slot has one that is passed when every thread's copies are there, and one when every warp is done with it, so
// that warps drift apart by some steps and keep different units busy. Lane (g, t) decodes the codes 2 t and 2 t + 1 of rows
// g and g + 8: each code is the lane's part of two mma over 16 columns, of which the order does not matter as long as the
// activations have the same; theirs are then 16 bytes in a row. Lookups run half a step ahead of the mma.
//
// Compiled with E8P_STAGES, E81B_STAGES, TOKENS, M_TILES, WARPS, CTAS (on a multiprocessor), DEPTH, COPIES (of the tables).
#include "barriers.cuh"
#include "half_weights.cuh"

constexpr int N_TILES = TOKENS / 8;
constexpr int ROWS = 16 * M_TILES * WARPS;
constexpr int X_BYTES = 128 * TOKENS;                            // of TOKENS by 64 columns
constexpr int SLOT = X_BYTES + WARPS * M_TILES * CODE_BYTES;
constexpr int LEAD = (DEPTH + 1) / 2; // less than DEPTH: a slot is filled that was left some steps ago
constexpr u32 FULL = TABLES_END + DEPTH * SLOT, EMPTY = FULL + 8 * DEPTH; // barriers of the slots

struct Params {
  const void* codes[STAGES]; // in the order that the strides below say
  const u16* x;              // float16 [tokens, columns]
  const float* ratios;
  float* partial;            // [slices, tokens, rows]
  u32 row_stride, column_stride, tile_stride; // as for matvec
  int tokens, columns, rows, slices;          // rows: a multiple of 16; columns: of 64
};

using Slot = RingSlot<TABLES_END, SLOT, DEPTH>;

// x: where the lane's eight columns of the first tokens lie.
__device__ __forceinline__ void multiply_codes(float (&sums)[M_TILES][N_TILES][4], const Words& nibbles,
                                               const u32 (&ratios)[STAGES], u32 x) {
  u32 a[M_TILES][2][4];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) decode(a[m][half], nibbles[m][half], ratios);
#pragma unroll
  for (int n = 0; n < N_TILES; ++n) {
    u32 b[4];
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(x + 1024 * n));
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
      multiply_half(sums[m][n], {a[m][0][0], a[m][1][0], a[m][0][1], a[m][1][1]}, b[0], b[1]);
      multiply_half(sums[m][n], {a[m][0][2], a[m][1][2], a[m][0][3], a[m][1][3]}, b[2], b[3]);
    }
  }
}

// Where a warp's codes lie in global memory, and where its lanes put them: lane l takes row l % 16 of every other tile.
struct Codes {
  u32 at[(M_TILES + 1) / 2]; // number of the first code of the lane's row in the next step
  u32 to, to_e81b;           // in the warp's part of a slot
  int tiles;                 // of 16 rows, all there are

  __device__ __forceinline__ void start(const Params& p, int row_tile, int step, int warp, int lane) {
#pragma unroll
    for (int m = 0; m < (M_TILES + 1) / 2; ++m) {
      const int tile = (row_tile * WARPS + warp) * M_TILES + 2 * m + (lane >> 4);
      const bool there = 2 * m + (lane >> 4) < M_TILES && tile < tiles;
      at[m] = there ? tile * p.tile_stride + (lane & 15) * p.row_stride + step * p.column_stride : ~0u;
    }
  }
  __device__ __forceinline__ void copy(const Params& p, u32 slot) { // of the warp's codes in a slot
#pragma unroll
    for (int m = 0; m < (M_TILES + 1) / 2; ++m) {
      if (at[m] == ~0u) continue; // no such rows: what lies in the slot is multiplied and not stored
      const u32 tile = slot + 2 * m * CODE_BYTES;
#pragma unroll
      for (int s = 0; s < E8P_STAGES; ++s)
        copy_async<16>(tile + 256 * s + to, static_cast<const u8*>(p.codes[s]) + 2ull * at[m]);
#pragma unroll
      for (int s = 0; s < E81B_STAGES; ++s)
        copy_async<8>(tile + to_e81b, static_cast<const u8*>(p.codes[E8P_STAGES + s]) + at[m]);
      at[m] += p.column_stride;
    }
  }
};

// 64 columns of a tile of tokens, eight columns a thread and round: eight number e of a token lies in a slot at word
// e ^ token % 2, so that the lanes of a quarter warp, two tokens by four even or odd eights, read different banks. In the
// place of tokens that are not there comes the last.
struct Activations {
  static constexpr int ROUND = 4 * WARPS, ROUNDS = (TOKENS + ROUND - 1) / ROUND; // tokens; a tile has
  u32 at[ROUNDS]; // number of the first element of step 0
  u32 to;         // in a slot
  int token;

  __device__ __forceinline__ void start(const Params& p, int token0, int thread) {
    const int eight = thread & 7;
    token = thread >> 3;
    to = 128 * token + 16 * (eight ^ (token & 1));
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round)
      at[round] = min(token0 + token + round * ROUND, p.tokens - 1) * p.columns + 8 * eight;
  }
  __device__ __forceinline__ void copy(const Params& p, u32 slot, int step) const {
#pragma unroll
    for (int round = 0; round < ROUNDS; ++round)
      if ((round + 1) * ROUND <= TOKENS || token < TOKENS - round * ROUND)
        copy_async<16>(slot + to + 128 * ROUND * round, p.x + (at[round] + 64 * step));
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
  // Through shuffles the compiler cannot see: else it reads the thread's number again in every step.
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = __shfl_sync(0xffffffffu, threadIdx.x & 31, threadIdx.x);
  const u32 steps = p.columns / 64, all = steps * ((p.rows + ROWS - 1) / ROWS), ctas = gridDim.x, cta = blockIdx.x;
  const int count = all * (cta + 1) / ctas - all * cta / ctas;
  const int token0 = blockIdx.y * TOKENS;
  int row_tile = all * cta / ctas / steps, step = all * cta / ctas - row_tile * steps;

  if (threadIdx.x < DEPTH) {
    start_barrier(FULL + 8 * threadIdx.x, 32 * WARPS);
    start_barrier(EMPTY + 8 * threadIdx.x, WARPS);
  }
  // Tables and weights depend on nothing: their first copies go out before the activations are there.
  TableRows<32 * WARPS> tables;
  tables.load();
  const u32 my_codes = X_BYTES + warp * M_TILES * CODE_BYTES; // in a slot
  Codes codes;
  codes.tiles = p.rows / 16;
  codes.to = my_codes + (lane >> 4) * CODE_BYTES + 16 * (lane & 15);
  codes.to_e81b = my_codes + (lane >> 4) * CODE_BYTES + 256 * E8P_STAGES + 8 * (lane & 15);
  codes.start(p, row_tile, step, warp, lane);
  int next_tile = row_tile, next_step = step;
  const auto advance = [&] {
    if (++next_step == steps) {
      next_step = 0;
      codes.start(p, ++next_tile, 0, warp, lane);
    }
  };
#pragma unroll 1
  for (int d = 0; d < min(LEAD, count); ++d) {
    codes.copy(p, TABLES_END + d * SLOT);
    advance();
  }
  if (base > TABLES) __trap();
  tables.store<true>(dynamic - base + TABLES);
  u32 ratios[STAGES]; // of stage s + 1 to stage s; the first stage's own waits until sums are stored
  const float first_ratio = p.ratios[0];
#pragma unroll
  for (int s = 0; s + 1 < STAGES; ++s) ratios[s] = pair_of(p.ratios[s + 1] / p.ratios[s]);
  __syncthreads(); // barriers and tables
  wait_for_previous();
  Slot filled, left, next; // that are filled, multiplied and left, read ahead
  Activations activations;
  activations.start(p, token0, 32 * warp + lane);
#pragma unroll 1
  for (int d = 0, of_slot = step; d < LEAD; ++d, filled.advance())
    if (d < count) {
      activations.copy(p, filled.address(), of_slot);
      arrive_with_copies(FULL + 8 * filled.at);
      if (++of_slot == steps) of_slot = 0;
    }

  const u32 of_lane = COPIES == 32 ? 4 * lane : 0, g = lane >> 2, t = lane & 3;
  const u32 x0 = 128 * g + 16 * (2 * t + (g & 1));
  float sums[M_TILES][N_TILES][4] = {};
  Words words, nibbles;
  wait(FULL, 0);
  read_codes(words, TABLES_END + my_codes, lane);
  find_nibbles<0>(nibbles, words, of_lane);
  next.advance();
  for (int i = 0; i < count; ++i) {
    if (i + LEAD < count) {
      wait(EMPTY + 8 * filled.at, filled.round ^ 1);
      codes.copy(p, filled.address());
      activations.copy(p, filled.address(), next_step);
      arrive_with_copies(FULL + 8 * filled.at);
      advance();
      filled.advance();
    }
    if (i + 1 < count) wait(FULL + 8 * next.at, next.round);
    const u32 at = left.address();
    Words second;
    find_nibbles<1>(second, words, of_lane);
    read_codes(words, next.address() + my_codes, lane); // after the last step: whatever is there
    multiply_codes(sums, nibbles, ratios, at + x0);
    find_nibbles<0>(nibbles, words, of_lane);
    multiply_codes(sums, second, ratios, at + (x0 ^ 16));
    __syncwarp();
    if (lane == 0) arrive(EMPTY + 8 * left.at);
    left = next;
    next.advance();
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

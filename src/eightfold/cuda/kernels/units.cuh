#pragma once
// Units of weights for matvec: where a warp's codes lie, how they come to its registers. Wants matvec's Params and macros.
// Bytes of codes in a unit: ROWS tiles of 16 rows by 256 columns. A tile's stages come one after another.
constexpr u32 E8P_BYTES = 1024, E81B_BYTES = 512, TILE_BYTES = E8P_STAGES * E8P_BYTES + E81B_STAGES * E81B_BYTES;
constexpr u32 UNIT_BYTES = ROWS * TILE_BYTES;
// Shared memory after the tables: the rings of the warps, DEPTH units each, then what the kernel lays behind.
constexpr u32 RINGS = TABLES_END, RINGS_END = RINGS + (ALIGNED ? WARPS * DEPTH * UNIT_BYTES : 0);

// The codes of one unit that a lane multiplies.
struct Unit {
  u32 e8p[ROWS][E8P_STAGES][2][4];
  u32 e81b[ROWS][E81B_STAGES ? E81B_STAGES : 1][2][2];
};

// Where the next unit lies: its first code (at most 2^29), its first tile, its number in the slice.
struct Cursor {
  u32 at;
  int tile, unit;
};

__device__ __forceinline__ void advance(Cursor& c, int units, const Params& p) {
  c.at += 4 * p.column_stride;
  if (++c.unit == units) {
    c.unit = 0;
    c.tile += ROWS;
    c.at += ROWS * p.tile_stride - 4 * p.column_stride * units;
  }
}

#if ALIGNED
// A lane copies 64 columns of one row at a time, of the row lane % 16, so that a warp reads consecutive memory. They lie in
// shared memory by steps of 64 columns, then rows; the rows of a step are exchanged so that the lanes (g, t) that read
// together, a row or two of every step, find theirs in different banks.
__device__ __forceinline__ u32 first_code(const Params& p) { // where a lane starts in a unit
  return (threadIdx.x & 15) * p.row_stride + (threadIdx.x >> 4 & 1) * p.column_stride;
}
// The cursor starts at the lane's first code. `steps`: of 64 columns that the unit has. Outside of the slice the activations
// are zeros and sums beyond the CTA's `tiles` are not used, so that codes which are there already do in place of those.
// TO_L2: no further than there.
template <bool TO_L2 = false>
__device__ __forceinline__ void copy_unit(u32 to, const Params& p, const Cursor& c, int tiles, int steps) {
  const u32 lane = threadIdx.x & 31, row = lane & 15;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const u32 step = (lane >> 4) + 2 * h;
    const u32 at = int(step) < steps ? c.at + 2 * h * p.column_stride : c.at - (lane >> 4) * p.column_stride;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const u32 code = r == 0 || c.tile + r < tiles ? at + r * p.tile_stride : at, tile = to + r * TILE_BYTES;
#pragma unroll
      for (int s = 0; s < E8P_STAGES; ++s) {
        const u8* const from = static_cast<const u8*>(p.codes[s]) + 2ull * code;
        if (TO_L2) prefetch(from);
        else copy_async<16>(tile + s * E8P_BYTES + 256 * step + (16 * row ^ 32 * step), from);
      }
#pragma unroll
      for (int s = 0; s < E81B_STAGES; ++s) {
        const u8* const from = static_cast<const u8*>(p.codes[E8P_STAGES + s]) + code;
        if (TO_L2) prefetch(from);
        else copy_async<8>(tile + E8P_STAGES * E8P_BYTES + s * E81B_BYTES + 128 * step + (8 * row ^ 32 * step), from);
      }
    }
  }
}
__device__ __forceinline__ void read_unit(Unit& w, u32 from) {
  const u32 lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int s = 0; s < E8P_STAGES; ++s) {
        u32(&v)[4] = w.e8p[r][s][half];
        const u32 at = from + r * TILE_BYTES + s * E8P_BYTES + 128 * half + 256 * t + (16 * g ^ 32 * t);
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(at) : "memory");
      }
#pragma unroll
      for (int s = 0; s < E81B_STAGES; ++s) {
        u32(&v)[2] = w.e81b[r][s][half];
        const u32 at = from + r * TILE_BYTES + E8P_STAGES * E8P_BYTES + s * E81B_BYTES + 128 * t + (8 * g ^ 32 * t ^ 64 * half);
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(at) : "memory");
      }
    }
}
#else // rows that are not whole tiles, columns that are not whole steps: code by code
__device__ inline void load_unit(Unit& w, const Params& p, const Cursor& c, int codes) {
  const int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 at = c.at + r * p.tile_stride + (g + 8 * half) * p.row_stride + 8 * t;
      const int valid = 16 * (c.tile + r) + 8 * half + g < p.padded ? codes - 32 * c.unit - 8 * t : 0;
#pragma unroll
      for (int s = 0; s < E8P_STAGES; ++s)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const u16* const code = static_cast<const u16*>(p.codes[s]) + at + 2 * k;
          w.e8p[r][s][half][k] = (2 * k < valid ? code[0] : 0) | u32(2 * k + 1 < valid ? code[1] : 0) << 16;
        }
#pragma unroll
      for (int s = 0; s < E81B_STAGES; ++s)
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          const u8* const code = static_cast<const u8*>(p.codes[E8P_STAGES + s]) + at + k;
          u32& word = w.e81b[r][s][half][k / 4];
          word = (k % 4 ? word : 0) | u32(k < valid ? *code : 0) << 8 * (k % 4);
        }
    }
}
#endif

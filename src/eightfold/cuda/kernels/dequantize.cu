// Codes to float16 weights, still rotated and without scale vectors: what a dense matrix product reads for many tokens.
// Compiled with E8P_STAGES, E81B_STAGES.
#include "decode.cuh"

constexpr int STAGES = E8P_STAGES + E81B_STAGES;
constexpr int LANES = 8;  // copies of the tables in shared memory: lane l reads copy l % 8, so that few meet on a bank
constexpr int DEPTH = 4;  // codes that a thread has under way
constexpr int TILES = 8;  // of 16 rows by 64 columns that a CTA decodes at a time, side by side

struct Params {
  const void* codes[STAGES];
  const float* ratios;
  uint4* weights;            // float16 [rows, 8 columns]
  u32 row_stride, column_stride, tile_stride; // as for matvec
  int row0, rows, columns;   // first row to decode; columns of codes
};

__device__ __forceinline__ void fill(u32* table, const u32* words) {
  for (int i = threadIdx.x; i < 256 * LANES; i += blockDim.x) table[i] = words[i / LANES];
}

// v += ratio / 2 * (2 u - offset) for the nibbles u of a word; `half_ratio` is ratio / 2. A nibble in the mantissa of a
// float from 2^23 on is an integer: subtracting is exact, and so is a factor of 16.
template <int OFFSET>
__device__ __forceinline__ void add_stage(float (&v)[8], u32 word, float half_ratio) {
  const u32 turned = __byte_perm(word, 0, 0x1032); // nibbles 4 to 7, 0 to 3
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const int place = (k & 3) ? k & 3 : 4; // nibbles 1 to 4 of either word; at 0, half an odd offset is lost
    const float unit = float(1 << 4 * place);
    const u32 nibble = (k == 0 || k > 4 ? turned : word) & 15u << 4 * place;
    const float integer = __uint_as_float(nibble | 0x4b000000u) - (8388608.f + 0.5f * OFFSET * unit);
    v[k] += half_ratio / unit * integer;
  }
}

// A CTA takes 16 rows by 512 columns after another. A warp makes 4 rows by 64 columns at a time, a thread one code,
// which is 16 bytes of weights: what a warp stores is whole lines of 128 bytes.
extern "C" __global__ void __launch_bounds__(256, 4) dequantize(const __grid_constant__ Params p) {
  __shared__ u32 tables[2 + (E81B_STAGES > 0)][256 * LANES];
  launch_dependents();
  fill(tables[0], PATTERNS);
  fill(tables[1], SIGNS);
  if (E81B_STAGES) fill(tables[2], E81B);
  float half_ratios[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; ++s) half_ratios[s] = 0.5f * p.ratios[s];
  __syncthreads();
  wait_for_previous();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 *const patterns = tables[0] + (lane & 7), *const signs = tables[1] + (lane & 7);
  const int across = (p.columns + 8 * TILES - 1) / (8 * TILES), items = across * ((p.rows + 15) / 16);
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int row = item / across * 16 + (warp & 3) * 4 + (lane >> 3);
    const int column = item % across * (8 * TILES) + (warp >> 2) * 8 + (lane & 7); // and every 16th from there
    if (row >= p.rows) continue;
    const u32 from = (p.row0 + row >> 4) * p.tile_stride + (p.row0 + row & 15) * p.row_stride;
    u32 codes[DEPTH][STAGES];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      const int c = min(column + 16 * d, p.columns - 1);
      const u32 at = from + (c >> 3) * p.column_stride + (c & 7);
#pragma unroll
      for (int s = 0; s < STAGES; ++s)
        codes[d][s] = s < E8P_STAGES ? static_cast<const u16*>(p.codes[s])[at] : static_cast<const u8*>(p.codes[s])[at];
    }
    uint4* const to = p.weights + (long long)row * p.columns + column;
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      float v[8] = {};
#pragma unroll
      for (int s = 0; s < STAGES; ++s)
        if (s < E8P_STAGES)
          add_stage<15>(v, patterns[(codes[d][s] >> 8) * LANES] ^ signs[(codes[d][s] & 255) * LANES], half_ratios[s]);
        else add_stage<16>(v, tables[2 * E81B_STAGES][codes[d][s] * LANES + (lane & 7)], half_ratios[s]);
      if (column + 16 * d < p.columns) to[16 * d] = pack8(v, FLOAT16);
    }
  }
}

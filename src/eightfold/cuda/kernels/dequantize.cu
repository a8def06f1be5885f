// Codes to float16 weights, still rotated and without scale vectors: what a dense matrix product reads for many tokens.
// Compiled with E8P_STAGES, E81B_STAGES.
#include "decode.cuh"

constexpr int STAGES = E8P_STAGES + E81B_STAGES;

struct Params {
  const void* codes[STAGES];
  const float* ratios;
  uint4* weights;            // float16 [rows, 8 columns]
  u32 row_stride, column_stride, tile_stride; // as for matvec
  int row0, rows, columns;   // first row to decode; columns of codes
};

// One thread a code, which is 16 bytes of weights.
extern "C" __global__ void __launch_bounds__(256) dequantize(const __grid_constant__ Params p) {
  __shared__ u32 tables[768];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    tables[i] = PATTERNS[i];
    tables[256 + i] = SIGNS[i];
    tables[512 + i] = E81B[i];
  }
  __syncthreads();
  float ratios[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; ++s) ratios[s] = 0.25f * p.ratios[s];
  for (int row = blockIdx.y; row < p.rows; row += gridDim.y)
    for (int column = blockIdx.x * blockDim.x + threadIdx.x; column < p.columns; column += gridDim.x * blockDim.x) {
      const u32 at = (p.row0 + row >> 4) * p.tile_stride + (p.row0 + row & 15) * p.row_stride +
                     (column >> 3) * p.column_stride + (column & 7);
      float v[8] = {};
#pragma unroll
      for (int s = 0; s < STAGES; ++s) {
        u32 word;
        int offset;
        if (s < E8P_STAGES) {
          const u32 code = static_cast<const u16*>(p.codes[s])[at];
          word = tables[code >> 8] ^ tables[256 + (code & 255)];
          offset = 15;
        } else {
          word = tables[512 + static_cast<const u8*>(p.codes[s])[at]];
          offset = 16;
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) v[k] += ratios[s] * float(int(2 * (word >> 4 * k & 15)) - offset);
      }
      store8(p.weights, 8 * ((long long)row * p.columns + column), 8ll * p.rows * p.columns, FLOAT16, v);
    }
}

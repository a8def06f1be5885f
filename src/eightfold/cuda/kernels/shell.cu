// Codes of E8 shells to float16 weights, still rotated and without scale vectors: dequantize.cu for a codebook too large
// for shared memory. Compiled with SHELL_STAGES, SHELL256_STAGES.
#include "common.cuh"

constexpr int STAGES = SHELL_STAGES + SHELL256_STAGES;

struct Params {
  const void* codes[STAGES];
  const float* ratios;
  const uint2* points;       // int8 [65536, 8]: twice the points
  uint4* weights;            // float16 [rows, 8 columns]
  u32 row_stride, column_stride, tile_stride; // as for matvec
  int row0, rows, columns;   // first row to decode; columns of codes
};

// One thread a code, which is 16 bytes of weights.
extern "C" __global__ void __launch_bounds__(256) dequantize_shell(const __grid_constant__ Params p) {
  launch_dependents();
  float ratios[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; ++s) ratios[s] = 0.5f * p.ratios[s];
  wait_for_previous(); // it may still read what the weights go over
  const long long count = (long long)p.rows * p.columns, all = (long long)gridDim.x * blockDim.x;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count; i += all) {
    const int row = int(i / p.columns), column = int(i - (long long)row * p.columns);
    const u32 at = (p.row0 + row >> 4) * p.tile_stride + (p.row0 + row & 15) * p.row_stride +
                   (column >> 3) * p.column_stride + (column & 7);
    float v[8] = {};
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
      const u32 code =
          s < SHELL_STAGES ? u32(static_cast<const u16*>(p.codes[s])[at]) : u32(static_cast<const u8*>(p.codes[s])[at]);
      const uint2 point = __ldg(p.points + code);
#pragma unroll
      for (int k = 0; k < 8; ++k) // the byte, its sign extended
        v[k] += ratios[s] * float(int((k < 4 ? point.x : point.y) << 24 - 8 * (k & 3)) >> 24);
    }
    store8(p.weights, 8 * i, 8 * count, FLOAT16, v);
  }
}

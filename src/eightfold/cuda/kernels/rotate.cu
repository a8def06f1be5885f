// Input and output sides of a linear, apart from its product: rotations, scale vectors, quantized activations.
#include "quantize.cuh"

constexpr int THREADS = 512; // of every kernel here
// Transforms of order up to 256, and the part below 256 of wider ones, of the coordinates [begin, end); normalised.
// load(v, k, limit) fills v with the coordinates from k on, zeros from `limit` on; store(v, k, limit) takes them.
template <class Load, class Store>
__device__ __forceinline__ void rotate(const Runs& runs, int begin, int end, Load load, Store store) {
  for (int number = threadIdx.x >> 5;; number += THREADS / 32) {
    const Segment segment = find_segment(runs, begin, end, number);
    if (segment.begin < 0) return;
    const int k = segment.begin + 8 * (threadIdx.x & 31);
    float v[8];
    load(v, k, segment.end);
    hadamard_segment(v, segment.log);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= hadamard_norm(segment.log);
    store(v, k, segment.end);
  }
}

struct QuantizeParams {
  const void* x;        // [tokens, features], rows x_stride apart
  const void* scale_in; // [features]
  uint4* planes;        // int8 planes in the order of matvec's B fragments
  float* scales;        // [tokens, slices]: an activation is its integer times this
  int* sums;            // [tokens, slices]: of the integers
  u32* counters;        // matvec's, set to zero here
  float* scratch;       // one buffer of `buffer` floats for each CTA where shared memory is too small, or null
  long long x_stride;
  int x_dtype, scale_dtype, features, tokens, slices, counter_count, buffer;
  int chunk_slice[MAX_SLICES + 1]; // chunk c, one CTA's work, is the slices from chunk_slice[c] up to [c + 1]
  int slice_start[MAX_SLICES + 1];
  Runs runs;
};

// Rotate and quantize x. Grid: chunks, tokens.
extern "C" __global__ void __launch_bounds__(THREADS) quantize_input(const __grid_constant__ QuantizeParams p) {
  extern __shared__ float shared_buffer[];
  launch_dependents();
  const int token = blockIdx.y, first = p.chunk_slice[blockIdx.x], last = p.chunk_slice[blockIdx.x + 1];
  const int begin = p.slice_start[first], end = p.slice_start[last];
  const long long cta = blockIdx.x + (long long)gridDim.x * blockIdx.y;
  u32* reduced = reinterpret_cast<u32*>(shared_buffer); // two words a slice
  float* const buffer = p.scratch ? p.scratch + cta * p.buffer : shared_buffer + 2 * MAX_SLICES;
  if (threadIdx.x < 2 * MAX_SLICES) reduced[threadIdx.x] = 0;
  for (int k = begin + 32 * threadIdx.x; k < min(end, p.features); k += 32 * THREADS)
    prefetch(static_cast<const u8*>(p.scale_in) + k * (p.scale_dtype == FLOAT32 ? 4 : 2));
  wait_for_previous();
  for (int i = threadIdx.x + cta * THREADS; i < p.counter_count; i += THREADS * gridDim.x * gridDim.y)
    p.counters[i] = 0;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Input input = {p.x, p.scale_in, token * p.x_stride, p.x_dtype, p.scale_dtype, p.features};
  rotate(p.runs, begin, end, input, [&](const float(&v)[8], int k, int limit) {
    store8(buffer, k - begin, limit - begin, FLOAT32, v);
  });
  __syncthreads();
  for (int r = 0; r < p.runs.count; ++r) {
    const int low = max(p.runs.start[r], begin), high = min(p.runs.start[r + 1], end);
    if (low < high && p.runs.log[r] > 8) hadamard_wide(buffer + low - begin, high - low, 1 << p.runs.log[r]);
  }
  for (int slice = first; slice < last; ++slice, reduced += 2) {
    const int start = p.slice_start[slice], length = p.slice_start[slice + 1] - start;
    Values<THREADS / 32, MAX_SLICE / SEGMENT> values;
#pragma unroll
    for (int s = 0; s < values.COUNT; ++s) {
      const int k = SEGMENT * (warp + s * THREADS / 32) + 8 * lane;
      values.at[s] = k < length ? k : -1;
      load8(values.v[s], buffer + start - begin, k, length, FLOAT32);
    }
    uint4* const planes = p.planes + ((start >> 8) + slice) * 8ll * p.tokens * 4; // slices begin that far apart at least
    const float scale = quantize(values, length, planes, p.tokens, token, reduced);
    __syncthreads();
    if (threadIdx.x == 0) {
      p.scales[token * p.slices + slice] = scale;
      p.sums[token * p.slices + slice] = int(reduced[1]);
    }
  }
}

struct RotateParams {
  const void* x;     // [tokens, features] of the input side; of the output side float16 [tokens, padded], or what
                     // matvec leaves, float32 [slices, tokens, padded]
  const void* scale; // [features]
  const void* bias;  // [features] or null; output side only
  void* y;           // float16 [tokens, padded] of the input side; [tokens, features] of the output side
  float* scales;     // [tokens]: what a rotated input was divided by, a power of two
  float* scratch;    // as above
  long long x_stride;
  int x_dtype, y_dtype, scale_dtype, bias_dtype, features, padded, tokens, slices, buffer;
  Runs runs;
};

// x, scaled and rotated, as float16 for a matrix product, divided by a power of two that leaves a norm from 64 to 128:
// no element and no product with a row of weights of unit size can then overflow. CTAs take token after token.
extern "C" __global__ void __launch_bounds__(THREADS) rotate_input(const __grid_constant__ RotateParams p) {
  extern __shared__ float shared_buffer[];
  float* const buffer = p.scratch ? p.scratch + (long long)blockIdx.x * p.buffer : shared_buffer + 32;
  for (int token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const long long row = token * p.x_stride, out = (long long)token * p.padded;
    const Input load = {p.x, p.scale, row, p.x_dtype, p.scale_dtype, p.features};
    float squares = 0;
    for (int k = 8 * threadIdx.x; k < p.features; k += 8 * THREADS) {
      float v[8];
      load(v, k, p.features);
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
    }
#pragma unroll
    for (int lanes = 16; lanes; lanes >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
    if ((threadIdx.x & 31) == 0) shared_buffer[threadIdx.x >> 5] = squares;
    __syncthreads();
    squares = 0;
    for (int w = 0; w < THREADS / 32; ++w) squares += shared_buffer[w];
    const int exponent = int(__float_as_uint(squares) >> 23 & 255) - 127; // 2^exponent <= squares < 2^(exponent + 1)
    const bool usable = squares > 1e-30f && squares < 3e38f;
    const float divisor = usable ? __uint_as_float(u32(127 + (exponent >> 1) - 6) << 23) : 1.f;
    const float inverse = 1.f / divisor;
    if (threadIdx.x == 0) p.scales[token] = divisor;

    const auto keep = [&](const float(&v)[8], int k, int limit) {
      float scaled[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) scaled[i] = v[i] * inverse;
      store8(p.y, out + k, out + limit, FLOAT16, scaled);
    };
    for (int r = 0; r < p.runs.count; ++r) {
      const int log = p.runs.log[r], size = log > 8 ? 1 << log : p.runs.start[r + 1] - p.runs.start[r];
      for (int low = p.runs.start[r]; low < p.runs.start[r + 1]; low += size) {
        rotate(p.runs, low, low + size, load, [&](const float(&v)[8], int k, int limit) {
          if (log <= 8) keep(v, k, limit);
          else
#pragma unroll
            for (int i = 0; i < 8; ++i) buffer[k + i - low] = v[i];
        });
        if (log <= 8) continue;
        __syncthreads();
        hadamard_wide(buffer, size, size);
        for (int k = 8 * threadIdx.x; k < size; k += 8 * THREADS) {
          float v[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) v[i] = buffer[k + i];
          keep(v, low + k, low + size);
        }
        __syncthreads();
      }
    }
    __syncthreads();
  }
}

// The output side: add the slices, if there are some, rotate back, then scales and bias. CTAs take token after token;
// blocks above 256, and runs of smaller ones, go round those along y.
extern "C" __global__ void __launch_bounds__(THREADS) rotate_output(const __grid_constant__ RotateParams p) {
  extern __shared__ float shared_buffer[];
  const long long cta = blockIdx.x + (long long)gridDim.x * blockIdx.y;
  float* const buffer = p.scratch ? p.scratch + cta * p.buffer : shared_buffer + 32;
  for (int token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const long long row = (long long)token * p.padded, out = (long long)token * p.features;
    const float factor = p.scales ? p.scales[token] : 1.f;
    const auto load = [&](float(&v)[8], int k, int limit) {
      load8(v, p.x, row + k, row + limit, p.x_dtype);
      for (int s = 1; s < p.slices; ++s) {
        const long long at = row + (long long)s * p.tokens * p.padded;
        float more[8];
        load8(more, p.x, at + k, at + limit, p.x_dtype);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] += more[i];
      }
    };
    const auto keep = [&](const float(&v)[8], int k, int limit) {
      const int stop = min(limit, p.features);
      float s[8], b[8] = {}, sum[8];
      load8(s, p.scale, k, stop, p.scale_dtype);
      if (p.bias) load8(b, p.bias, k, stop, p.bias_dtype);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] = v[i] * factor * s[i] + b[i];
      store8(p.y, out + k, out + stop, p.y_dtype, sum);
    };
    int turn = 0;
    for (int r = 0; r < p.runs.count; ++r) {
      const int log = p.runs.log[r], size = log > 8 ? 1 << log : p.runs.start[r + 1] - p.runs.start[r];
      for (int low = p.runs.start[r]; low < p.runs.start[r + 1]; low += size) {
        if (turn++ % gridDim.y != blockIdx.y) continue;
        rotate(p.runs, low, low + size, load, [&](const float(&v)[8], int k, int limit) {
          if (log <= 8) keep(v, k, limit);
          else
#pragma unroll
            for (int i = 0; i < 8; ++i) buffer[k + i - low] = v[i];
        });
        if (log <= 8) continue;
        __syncthreads();
        hadamard_wide(buffer, size, size);
        for (int k = 8 * threadIdx.x; k < size; k += 8 * THREADS) {
          float v[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) v[i] = buffer[k + i];
          keep(v, low + k, low + size);
        }
        __syncthreads();
      }
    }
  }
}

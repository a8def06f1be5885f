// Input and output sides of a linear, apart from its product: rotations, scale vectors, quantized activations.
#include "quantize.cuh"
#include "slices.cuh"

constexpr int THREADS = 512; // of the kernels that use shared memory
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
    transform(v, butterfly(segment.log));
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
  float* scratch;       // one buffer of `buffer` floats for each CTA where shared memory is too small, or null
  long long x_stride;
  int x_dtype, scale_dtype, features, tokens, slices, buffer;
  int chunk_slice[MAX_SLICES + 1]; // chunk c, one CTA's work, is the slices from chunk_slice[c] up to [c + 1]
  int slice_start[MAX_SLICES + 1];
  Runs runs;
};

// Quantize the slice of a token that the CTA holds, and store its planes, scale and sum. reduced: two zeros.
template <class V>
__device__ __forceinline__ void quantize_slice(const QuantizeParams& p, const V& values, int slice, int start, int length,
                                               int token, u32* reduced) {
  uint4* const planes = p.planes + ((start >> 8) + slice) * 8ll * p.tokens * 4; // slices begin that far apart at least
  const float scale = quantize(values, length, planes, p.tokens, token, reduced);
  __syncthreads();
  if (threadIdx.x == 0) {
    p.scales[token * p.slices + slice] = scale;
    p.sums[token * p.slices + slice] = int(reduced[1]);
  }
}

// Rotate and quantize x where every slice is a chunk of blocks up to 256, in registers. Grid: slices, tokens.
extern "C" __global__ void __launch_bounds__(THREADS) quantize_input(const __grid_constant__ QuantizeParams p) {
  __shared__ u32 reduced[2];
  launch_dependents();
  const int slice = blockIdx.x, token = blockIdx.y, start = p.slice_start[slice], end = p.slice_start[slice + 1];
  Slice<THREADS / 32> own;
  own.load_scales(p.runs, start, end, p.scale_in, p.scale_dtype, p.features);
  own.prepare();
  if (threadIdx.x < 2) reduced[threadIdx.x] = 0;
  __syncthreads();
  wait_for_previous();
  own.load(p.x, token * p.x_stride, p.features);
  own.rotate(start, p.x_dtype, p.scale_dtype);
  quantize_slice(p, own.values, slice, start, end - start, token, reduced);
}

// The same of any blocks: a chunk goes through a buffer. Grid: chunks, tokens.
extern "C" __global__ void __launch_bounds__(THREADS) quantize_wide_input(const __grid_constant__ QuantizeParams p) {
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
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Input input = {p.x, p.scale_in, token * p.x_stride, p.x_dtype, p.scale_dtype, p.features};
  rotate(p.runs, begin, end, input, [&](const float(&v)[8], int k, int limit) {
    store8(buffer, k - begin, limit - begin, FLOAT32, v);
  });
  __syncthreads();
  for (int r = 0; r < p.runs.count; ++r) {
    const int low = max(run_start(p.runs, r), begin), high = min(run_start(p.runs, r + 1), end), log = run_log(p.runs, r);
    if (low < high && log > 8) hadamard_wide(buffer + low - begin, high - low, 1 << log);
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
    quantize_slice(p, values, slice, start, length, token, reduced);
  }
}

struct RotateParams {
  const void* x;     // input side: [tokens, features]. Output side: [tokens, end - begin] of float16, or of what matvec
                     // leaves, float32 [slices, tokens, end - begin]. Rows are x_stride apart
  const void* scale; // [features]
  const void* bias;  // [features] or null; output side only
  void* y;           // float16 [tokens, padded], or tiled, of the input side; [tokens, features] of the output side
  float* divisors;   // [tokens]: what a rotated input was divided by, a power of two
  float* scratch;    // as above
  long long x_stride;
  int x_dtype, y_dtype, scale_dtype, bias_dtype, features, tokens, slices, buffer;
  int begin, end; // coordinates, whole blocks: all of the input side with padding, or a part of the output side
  int tile;       // tokens of a tile of the input side's y, 0 for rows as they are; then runs end on multiples of 64
  Runs runs;
};

// From the sum of squares of a row, the power of two that leaves a norm from 64 to 128: no element of the rotated row and
// no product with a row of weights of unit size can then overflow a float16.
__device__ __forceinline__ float divisor_of(float squares) {
  const int exponent = int(__float_as_uint(squares) >> 23 & 255) - 127; // 2^exponent <= squares < 2^(exponent + 1)
  const bool usable = squares > 1e-30f && squares < 3e38f;
  return usable ? __uint_as_float(u32(127 + (exponent >> 1) - 6) << 23) : 1.f;
}
__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int lanes = 16; lanes; lanes >>= 1) v += __shfl_xor_sync(0xffffffffu, v, lanes);
  return v;
}

// For wgmma.cu: tile after tile of tokens; of each, steps of 64 columns; of each, the tokens' 128 bytes. There the columns
// lie in the order in which lanes decode codes: a lane of four, t, has the codes 2 t and 2 t + 1, and of a code the pair w
// of coordinates is its part w of two mma. So 16 bytes number 4 (code & 1) + w are the pairs w of the four codes of that
// parity. They are swizzled: exchanged by the last bits of the token's number. Lane l holds code l & 7 of a step.
__device__ __forceinline__ void to_chunk(uint4& packed, int lane) {
  u32 w[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) // the transpose of four pairs of four codes
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(i & bit)) {
        const bool high = lane & 2 * bit;
        const u32 other = __shfl_xor_sync(0xffffffffu, high ? w[i] : w[i + bit], 2 * bit);
        if (high) w[i] = other;
        else w[i + bit] = other;
      }
  packed = make_uint4(w[0], w[1], w[2], w[3]);
}
// Eight coordinates of a rotated row from k on, those below `limit`, by all lanes of a warp; lane l holds eight number l.
template <bool TILED>
__device__ __forceinline__ void store_rotated(const RotateParams& p, int token, int k, int limit, const float (&v)[8]) {
  long long at = (long long)token * p.end + k;
  if (!TILED) return store8(p.y, at, at - k + limit, FLOAT16, v);
  uint4 packed = pack8(v, FLOAT16);
  {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane)); // volatile: not to be kept in registers that are not there
    to_chunk(packed, lane);
    const u32 tile = u32(token) / u32(p.tile);
    at = 8ll * ((tile * u32(p.end / 64 - 1) + (k >> 6)) * u32(p.tile) + token) + (4 * (lane & 1) + (lane >> 1 & 3) ^ token & 7);
  }
  if (k < limit) static_cast<uint4*>(p.y)[at] = packed;
  __syncwarp(); // else the compiler works on several of them at once, for which there are no registers
}

// Eight coordinates of the output side from `begin` + k on, those from `begin` + limit on as zeros; slices are added in
// their order.
__device__ __forceinline__ void load_sum(float (&v)[8], const RotateParams& p, int token, int k, int limit) {
  const long long row = token * p.x_stride;
  if (p.slices == 1) {
    load8(v, p.x, row + k, row + limit, p.x_dtype);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = 0.f;
    // Four find no registers.
    add_slices<3>(v, static_cast<const float*>(p.x) + row + k, p.tokens * p.x_stride, p.slices, limit - k);
  }
}

// The kernels for blocks up to 256: a warp holds several segments at a time, so that as many loads are in flight.
constexpr int ITEMS = 4;
constexpr int ROW_THREADS = 896; // most of rotate_input: a row is ITEMS segments of each warp
constexpr int TILED_THREADS = 512; // most of rotate_input_tiled, which goes through a row twice

// What a row is to be multiplied with, whose divisor this stores. `squares`: those of the thread's coordinates; `of_warps`:
// memory for a number of each warp, not that of the row before, so one barrier is enough.
__device__ __forceinline__ float inverse_divisor(const RotateParams& p, int token, float squares, float (&of_warps)[32]) {
  const int lane = threadIdx.x & 31;
  squares = sum_of_warp(squares);
  if (lane == 0) of_warps[threadIdx.x >> 5] = squares;
  __syncthreads();
  const float divisor = divisor_of(sum_of_warp(lane < blockDim.x >> 5 ? of_warps[lane] : 0.f));
  if (threadIdx.x == 0) p.divisors[token] = divisor;
  return __uint_as_float((254u << 23) - __float_as_uint(divisor)); // exact, of a power of two
}

// Rows of the input side, of which each warp holds up to COUNT segments. Loaded as early as can be: later loads wait for the
// copies of codes that the next kernel starts on the same multiprocessor.
template <int COUNT>
__device__ __forceinline__ void rotate_rows(const RotateParams& p, float (&squares_of)[2][32]) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  int places[COUNT]; // 16 times the first coordinate of the lane, or `end` for none, and the log
  constexpr bool KEEP = COUNT == 1; // there are registers for scales of 16 bits
  const bool narrow = KEEP && p.scale_dtype != FLOAT32;
  uint4 scales[COUNT] = {};
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const Segment segment = find_segment(p.runs, 0, p.end, warp + i * warps);
    const int k = segment.begin + 8 * lane;
    places[i] = 16 * (segment.begin >= 0 && k < segment.end ? k : p.end) + segment.log;
    if (narrow) scales[i] = load8_packed(p.scale, places[i] >> 4, p.features);
    else if (segment.begin >= 0 && k < p.features)
      prefetch(static_cast<const u8*>(p.scale) + k * (p.scale_dtype == FLOAT32 ? 4 : 2));
  }
  Butterfly b = butterfly(places[0] & 15);
  wait_for_previous();
  for (int token = blockIdx.x, turn = 0; token < p.tokens; token += gridDim.x, turn ^= 1) {
    const long long row = token * p.x_stride;
    uint4 packed[COUNT];
    float squares = 0;
    const auto scaled = [&](float(&v)[8], int i) {
      float scale[8];
      if (narrow) unpack8(scale, scales[i], p.scale_dtype);
      else load8(scale, p.scale, places[i] >> 4, p.features, p.scale_dtype);
      unpack8(v, packed[i], p.x_dtype);
#pragma unroll
      for (int k = 0; k < 8; ++k) v[k] *= scale[k];
    };
#pragma unroll
    for (int i = 0; i < COUNT; ++i) packed[i] = load8_packed(p.x, row + (places[i] >> 4), row + p.features);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      float v[8];
      scaled(v, i);
#pragma unroll
      for (int k = 0; k < 8; ++k) squares += v[k] * v[k];
    }
    const float inverse = inverse_divisor(p, token, squares, squares_of[turn]);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      // Without this the compiler keeps what it unpacked before the barrier, in registers that are not there.
      asm volatile("" : "+r"(packed[i].x), "+r"(packed[i].y), "+r"(packed[i].z), "+r"(packed[i].w));
      const int log = places[i] & 15;
      float v[8];
      scaled(v, i);
      if (log != b.log) b = butterfly(log);
      transform(v, b);
#pragma unroll
      for (int k = 0; k < 8; ++k) v[k] *= inverse * hadamard_norm(log);
      store_rotated<false>(p, token, places[i] >> 4, p.end, v);
    }
  }
}

// x, scaled and rotated, as float16 for a matrix product, divided by a power of two. A CTA takes row after row, each in
// registers as a whole: its divisor must be known before it is written.
extern "C" __global__ void __launch_bounds__(ROW_THREADS) rotate_input(const __grid_constant__ RotateParams p) {
  __shared__ float squares_of[2][32];
  launch_dependents();
  const int warps = blockDim.x >> 5;
  if (find_segment(p.runs, 0, p.end, warps).begin < 0) rotate_rows<1>(p, squares_of);
  else if (find_segment(p.runs, 0, p.end, 2 * warps).begin < 0) rotate_rows<2>(p, squares_of);
  else rotate_rows<ITEMS>(p, squares_of);
}

// The same in the order of wgmma.cu, for many tokens: loops in place of registers, since the code of a row that lies in
// registers is too long for the instruction cache. The second time a row is read it comes from L1 or L2.
extern "C" __global__ void __launch_bounds__(TILED_THREADS, 2) rotate_input_tiled(const __grid_constant__ RotateParams p) {
  __shared__ float squares_of[2][32];
  launch_dependents();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  Butterfly b = butterfly(run_log(p.runs, 0));
  wait_for_previous();
  for (int token = blockIdx.x, turn = 0; token < p.tokens; token += gridDim.x, turn ^= 1) {
    const long long row = token * p.x_stride;
    float squares = 0;
#pragma unroll 4
    for (int k = 8 * threadIdx.x; k < p.features; k += 8 * blockDim.x) {
      float v[8], scale[8];
      unpack8(v, load8_packed(p.x, row + k, row + p.features), p.x_dtype);
      load8(scale, p.scale, k, p.features, p.scale_dtype);
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += v[i] * scale[i] * (v[i] * scale[i]);
    }
    const float inverse = inverse_divisor(p, token, squares, squares_of[turn]);
    Segment segment = find_segment(p.runs, 0, p.end, warp);
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (segment.begin >= 0) packed = load8_packed(p.x, row + segment.begin + 8 * lane, row + p.features);
#pragma unroll 1
    for (int number = warp; segment.begin >= 0;) {
      const Segment next = find_segment(p.runs, 0, p.end, number += warps);
      uint4 ahead = packed;
      if (next.begin >= 0) ahead = load8_packed(p.x, row + next.begin + 8 * lane, row + p.features);
      const int k = segment.begin + 8 * lane;
      float v[8], scale[8];
      unpack8(v, packed, p.x_dtype);
      load8(scale, p.scale, k, p.features, p.scale_dtype);
      if (segment.log != b.log) b = butterfly(segment.log);
      const bool inside = k < segment.end; // else the coordinates are another run's
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = inside ? v[i] * scale[i] * inverse : 0.f;
      transform(v, b);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= hadamard_norm(segment.log);
      store_rotated<true>(p, token, k, segment.end, v);
      segment = next, packed = ahead;
    }
  }
}

// The output side: add the slices, if there are some, rotate back, then scales and bias. A warp keeps to its segment,
// with what belongs to it, and goes through tokens. Grid: tokens, eight segments each.
extern "C" __global__ void __launch_bounds__(256, 3) rotate_output(const __grid_constant__ RotateParams p) {
  launch_dependents();
  const Segment segment = find_segment(p.runs, p.begin, p.end, blockIdx.y * 8 + (threadIdx.x >> 5));
  const int k = segment.begin + 8 * (threadIdx.x & 31), limit = segment.end, stop = min(limit, p.features);
  float scale[8];
  Butterfly b;
  if (segment.begin >= 0) {
    b = butterfly(segment.log);
    load8(scale, p.scale, k, stop, p.scale_dtype);
#pragma unroll
    for (int i = 0; i < 8; ++i) scale[i] *= hadamard_norm(segment.log);
  }
  wait_for_previous();
  if (segment.begin < 0) return;
  const auto finish = [&](float(&v)[8], int token) {
    const long long out = (long long)token * p.features;
    const float divisor = p.divisors ? p.divisors[token] : 1.f; // there before the transform is done
    transform(v, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= divisor * scale[i];
    if (p.bias) {
      float bias[8];
      load8(bias, p.bias, k, stop, p.bias_dtype);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += bias[i];
    }
    store8(p.y, out + k, out + stop, p.y_dtype, v);
  };
  if (p.x_dtype == FLOAT32) {
    for (int token = blockIdx.x; token < p.tokens; token += gridDim.x) {
      float v[8];
      load_sum(v, p, token, k - p.begin, limit - p.begin);
      finish(v, token);
    }
    return;
  }
  for (int first = blockIdx.x; first < p.tokens; first += ITEMS * gridDim.x) {
    uint4 packed[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int token = min(first + i * int(gridDim.x), p.tokens - 1);
      const long long row = token * p.x_stride + (k - p.begin);
      packed[i] = load8_packed(p.x, row, row + (limit - k));
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int token = first + i * gridDim.x;
      if (token >= p.tokens) return;
      float v[8];
      unpack8(v, packed[i], p.x_dtype);
      finish(v, token);
    }
  }
}

// Either side with blocks above 256, which a CTA holds in its buffer: CTAs take token after token along x; along y the
// blocks, and runs of blocks up to 256, go round (the input side: one CTA, which first finds the row's divisor).
template <bool INPUT>
__device__ __forceinline__ void rotate_wide(const RotateParams& p) {
  extern __shared__ float shared_buffer[];
  const long long cta = blockIdx.x + (long long)gridDim.x * blockIdx.y;
  float* const buffer = p.scratch ? p.scratch + cta * p.buffer : shared_buffer + 32;
  launch_dependents();
  wait_for_previous();
  for (int token = blockIdx.x; token < p.tokens; token += gridDim.x) {
    const long long out = (long long)token * p.features;
    const Input input = {p.x, p.scale, token * p.x_stride, p.x_dtype, p.scale_dtype, p.features};
    float factor = p.divisors && !INPUT ? p.divisors[token] : 1.f;
    if (INPUT) {
      float squares = 0;
      for (int k = 8 * threadIdx.x; k < p.features; k += 8 * THREADS) {
        float v[8];
        input(v, k, p.features);
#pragma unroll
        for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
      }
      squares = sum_of_warp(squares);
      __syncthreads(); // the row before is done with the buffer, and with these
      if ((threadIdx.x & 31) == 0) shared_buffer[threadIdx.x >> 5] = squares;
      __syncthreads();
      squares = 0;
      for (int w = 0; w < THREADS / 32; ++w) squares += shared_buffer[w];
      const float divisor = divisor_of(squares);
      if (threadIdx.x == 0) p.divisors[token] = divisor;
      factor = 1.f / divisor;
    }
    const auto load = [&](float(&v)[8], int k, int limit) {
      if (INPUT) input(v, k, limit);
      else load_sum(v, p, token, k - p.begin, limit - p.begin);
    };
    const auto keep = [&](const float(&v)[8], int k, int limit) {
      const int stop = min(limit, p.features);
      float scale[8], bias[8] = {}, result[8];
      if (!INPUT) load8(scale, p.scale, k, stop, p.scale_dtype);
      if (!INPUT && p.bias) load8(bias, p.bias, k, stop, p.bias_dtype);
#pragma unroll
      for (int i = 0; i < 8; ++i) result[i] = INPUT ? v[i] * factor : v[i] * factor * scale[i] + bias[i];
      if (INPUT && p.tile) store_rotated<true>(p, token, k, limit, result);
      else if (INPUT) store_rotated<false>(p, token, k, limit, result);
      else store8(p.y, out + k, out + stop, p.y_dtype, result);
    };
    int turn = 0;
    for (int r = 0; r < p.runs.count; ++r) {
      const int begin = max(run_start(p.runs, r), p.begin), end = min(run_start(p.runs, r + 1), p.end);
      const int log = run_log(p.runs, r);
      const int size = log > 8 ? 1 << log : end - begin;
      for (int low = begin; low < end; low += size) {
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
extern "C" __global__ void __launch_bounds__(THREADS, 1) rotate_wide_input(const __grid_constant__ RotateParams p) {
  rotate_wide<true>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) rotate_wide_output(const __grid_constant__ RotateParams p) {
  rotate_wide<false>(p);
}

#pragma once
// Activations of a linear as integers: scaled, rotated, and quantized to 16 bits with a scale for each token and slice.
//
// An integer is 256 * high + low, both int8. Sixteen coordinates from 256 u + 64 t + 16 j of a slice make, for either
// plane, one 16-byte word: the even ones of the first and the second eight, then the odd ones: two pairs of neighbouring
// registers, as the mma of even and of odd nibbles want them. At [u][j] lie the words of
// all tokens, planes and t: that of lane number 4 (2 token + plane) + t, the lane that an mma.m16n8k32 wants it in, at
// swizzle(lane, j), so that warps which write them and warps which read them find different banks.
#include "butterfly.cuh"

constexpr int MAX_SLICE = 4096; // coordinates
// Largest |integer|: with it the high plane, (i + 128) >> 8, stays within 8 bits.
constexpr float TOP = 32600.f;
// 1.5 * 2^23: added to a small number, it leaves that rounded to an integer in the last bits, in one instruction where
// conversions go at a quarter of the speed.
constexpr float MAGIC = 12582912.f;
constexpr u32 MAGIC_BITS = 0x4b400000u;

__device__ __forceinline__ int swizzle(int lane, int j) { return lane ^ j ^ (j & 1) << 2; }

// What one of the CTA_WARPS warps of a CTA holds of a slice of up to SEGMENTS segments: eight coordinates a lane and
// segment, from `at` on; at < 0: none.
template <int CTA_WARPS, int SEGMENTS>
struct Values {
  static constexpr int COUNT = (SEGMENTS + CTA_WARPS - 1) / CTA_WARPS, THREADS = 32 * CTA_WARPS;
  float v[COUNT][8];
  int at[COUNT];
};

// A slice of one token of blocks up to 256, of up to MAX_SLICE / SEGMENT segments, on its way through the registers of the
// CTA_WARPS warps of a CTA. In steps, for other work to lie between.
template <int CTA_WARPS>
struct Slice {
  Values<CTA_WARPS, MAX_SLICE / SEGMENT> values;
  Segment segments[decltype(values)::COUNT];
  Raw8 scales[decltype(values)::COUNT];
  uint4 inputs[decltype(values)::COUNT];
  Butterfly butterflies;

  // What depends on no kernel before: scales of the slice [start, end).
  __device__ __forceinline__ void load_scales(const Runs& runs, int start, int end, const void* scale, int dtype, int features) {
#pragma unroll
    for (int s = 0; s < values.COUNT; ++s) {
      segments[s] = find_segment(runs, start, end, (threadIdx.x >> 5) + s * CTA_WARPS);
      const int k = segments[s].begin + 8 * (threadIdx.x & 31);
      if (segments[s].begin >= 0) scales[s] = load8_raw(scale, k, min(segments[s].end, features), dtype);
    }
  }
  // `row`: where the token starts in x.
  __device__ __forceinline__ void load(const void* x, long long row, int features) {
#pragma unroll
    for (int s = 0; s < values.COUNT; ++s) {
      const int k = segments[s].begin + 8 * (threadIdx.x & 31);
      if (segments[s].begin >= 0) inputs[s] = load8_packed(x, row + k, row + min(segments[s].end, features));
    }
  }
  // The same of a slice that lies in shared memory as a whole.
  __device__ __forceinline__ void read(const u16* slice, int start) {
#pragma unroll
    for (int s = 0; s < values.COUNT; ++s) {
      const int k = segments[s].begin + 8 * (threadIdx.x & 31);
      inputs[s] = make_uint4(0, 0, 0, 0);
      if (segments[s].begin >= 0 && k < segments[s].end) inputs[s] = *reinterpret_cast<const uint4*>(slice + (k - start));
    }
  }
  // Ahead of `rotate`.
  __device__ __forceinline__ void prepare() { butterflies = butterfly(segments[0].log); }
  __device__ __forceinline__ void rotate(int start, int x_dtype, int scale_dtype) {
#pragma unroll
    for (int s = 0; s < values.COUNT; ++s) {
      values.at[s] = -1;
      if (segments[s].begin < 0) continue;
      const int k = segments[s].begin + 8 * (threadIdx.x & 31);
      float scale[8];
      convert8(scale, scales[s], scale_dtype);
      unpack8(values.v[s], inputs[s], x_dtype);
#pragma unroll
      for (int i = 0; i < 8; ++i) values.v[s][i] *= scale[i] * hadamard_norm(segments[s].log);
      if (segments[s].log != butterflies.log) butterflies = butterfly(segments[s].log);
      transform(values.v[s], butterflies);
      if (k < segments[s].end) values.at[s] = k - start;
    }
  }
};

// x and its scale vector, one row.
struct Input {
  const void *x, *scale;
  long long row; // where the row starts in x
  int x_dtype, scale_dtype, features;

  // Eight scaled coordinates from k on, those from `limit` on as zeros.
  __device__ __forceinline__ void operator()(float (&v)[8], int k, int limit) const {
    const int stop = min(limit, features);
    float s[8];
    load8(v, x, row + k, row + stop, x_dtype);
    load8(s, scale, k, stop, scale_dtype);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = k + i < stop ? v[i] * s[i] : 0.f;
  }
};

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float found;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(found) : "f"(a), "f"(b));
  return found;
}
// Byte BYTE of each.
template <int BYTE>
__device__ __forceinline__ u32 pick(u32 a, u32 b, u32 c, u32 d) {
  constexpr u32 TWO = BYTE | (4 + BYTE) << 4;
  return __byte_perm(__byte_perm(a, b, TWO), __byte_perm(c, d, TWO), 0x5410);
}

// Quantize one slice of one token into its planes; returns the scale. By all threads of the CTA. reduced[0], the largest
// magnitude, and reduced[1], the sum of the integers, are zero before; the sum is there after the caller's next barrier.
template <class V>
__device__ __forceinline__ float quantize(const V& values, int length, uint4* planes, int tokens, int token,
                                          u32* reduced) {
  const int lane = threadIdx.x & 31;
  float most = 0;
#pragma unroll
  for (int s = 0; s < values.COUNT; ++s)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (values.at[s] >= 0) most = max_or_nan(most, fabsf(values.v[s][i]));
  // Bits of magnitudes compare like values, and NaN is above infinity.
  u32 largest = __reduce_max_sync(0xffffffffu, __float_as_uint(most));
  if (lane == 0) atomicMax(reduced, largest);
  __syncthreads();
  largest = reduced[0];
  const float top = __uint_as_float(largest);
  const bool usable = top > 1e-30f && largest < 0x7f800000u;
  const float inverse = usable ? TOP / top : 0.f;
  const auto store = [&](int k, const u32 (&even)[2], const u32 (&odd)[2]) { // of the high and the low plane
    const int unit = k >> 8, j = k >> 4 & 3, lane = 8 * token + (k >> 6 & 3);
    u32* const at = reinterpret_cast<u32*>(planes + (unit * 4 + j) * 8 * tokens) + (k >> 3 & 1);
#pragma unroll
    for (int plane = 0; plane < 2; ++plane) {
      at[4 * swizzle(lane + 4 * plane, j)] = even[plane];
      at[4 * swizzle(lane + 4 * plane, j) + 2] = odd[plane];
    }
  };
  u32 sum = 0;
#pragma unroll
  for (int s = 0; s < values.COUNT; ++s)
    if (values.at[s] >= 0) {
      u32 low[8], high[8]; // integers, whose first byte is the low plane; 128 more, whose second is the high one
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        low[i] = __float_as_uint(__fmaf_rn(values.v[s][i], inverse, MAGIC));
        high[i] = low[i] + 128;
        sum += low[i];
      }
      sum -= 8 * MAGIC_BITS;
      u32 even[2], odd[2];
      even[0] = pick<1>(high[0], high[2], high[4], high[6]), odd[0] = pick<1>(high[1], high[3], high[5], high[7]);
      even[1] = pick<0>(low[0], low[2], low[4], low[6]), odd[1] = pick<0>(low[1], low[3], low[5], low[7]);
      store(values.at[s], even, odd);
    }
  constexpr u32 NONE[2] = {};
  for (int k = length + 8 * threadIdx.x; k < (length + SEGMENT - 1) / SEGMENT * SEGMENT; k += 8 * V::THREADS)
    store(k, NONE, NONE);
  sum = __reduce_add_sync(0xffffffffu, sum);
  if (lane == 0) atomicAdd(reduced + 1, sum);
  return largest >= 0x7f800000u ? __uint_as_float(0x7fffffffu) : usable ? top / TOP : 0.f;
}

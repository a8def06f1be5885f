#pragma once
// Activations of a linear as integers: scaled, rotated, and quantized to 16 bits with a scale for each token and slice.
//
// An integer is 256 * high + low, both int8. Sixteen coordinates from 256 u + 64 t + 16 j of a slice make, for either
// plane, one 16-byte word: the even and the odd ones of the first eight, then of the second. At [u][j] lie the words of
// all tokens, planes and t: that of lane number 4 (2 token + plane) + t, the lane that an mma.m16n8k32 wants it in, at
// swizzle(lane, j), so that warps which write them and warps which read them find different banks.
#include "common.cuh"

constexpr int MAX_SLICE = 4096; // coordinates
// Largest |integer|: with it the high plane, (i + 128) >> 8, stays within 8 bits.
constexpr float TOP = 32600.f;

__device__ __forceinline__ int swizzle(int lane, int j) { return lane ^ j ^ (j & 1) << 2; }

// What one of the GROUP warps that share a token holds of a slice of up to SEGMENTS segments: eight coordinates a lane and
// segment, from `at` on; at < 0: none.
template <int GROUP, int SEGMENTS>
struct Values {
  static constexpr int COUNT = (SEGMENTS + GROUP - 1) / GROUP, THREADS_A_TOKEN = 32 * GROUP;
  float v[COUNT][8];
  int at[COUNT];
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

// Quantize one slice of one token, if there is one of that number, into its planes; returns the scale. By all threads of
// the CTA. reduced[0], the largest magnitude, and reduced[1], the sum of the integers, are zero before; the sum is there
// after the caller's next barrier.
template <class V>
__device__ __forceinline__ float quantize(const V& values, int length, uint4* planes, int tokens, int token,
                                          u32* reduced) {
  const int lane = threadIdx.x & 31;
  u32 largest = 0; // bits of magnitudes compare like values, and NaN is above infinity
#pragma unroll
  for (int s = 0; s < values.COUNT; ++s)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (values.at[s] >= 0) largest = max(largest, __float_as_uint(values.v[s][i]) & 0x7fffffffu);
  largest = __reduce_max_sync(0xffffffffu, largest);
  if (lane == 0) atomicMax(reduced, largest);
  __syncthreads();
  if (token >= tokens) return 0;
  largest = reduced[0];
  const float top = __uint_as_float(largest);
  const bool usable = top > 1e-30f && largest < 0x7f800000u;
  const float inverse = usable ? TOP / top : 0.f;
  const auto store = [&](int k, const uint2& high, const uint2& low) { // even, odd
    const int unit = k >> 8, j = k >> 4 & 3, lane = 8 * token + (k >> 6 & 3);
    uint2* const at = reinterpret_cast<uint2*>(planes + (unit * 4 + j) * 8 * tokens) + (k >> 3 & 1);
    at[2 * swizzle(lane, j)] = high;
    at[2 * swizzle(lane + 4, j)] = low;
  };
  int sum = 0;
#pragma unroll
  for (int s = 0; s < values.COUNT; ++s)
    if (values.at[s] >= 0) {
      u32 words[4] = {}; // of the high plane even, odd; of the low one
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int integer = __float2int_rn(values.v[s][i] * inverse);
        words[i & 1] |= u32((integer + 128) >> 8 & 255) << (i / 2 * 8);
        words[2 + (i & 1)] |= u32(integer & 255) << (i / 2 * 8); // low: the rest, which has the same last bits
        sum += integer;
      }
      store(values.at[s], make_uint2(words[0], words[1]), make_uint2(words[2], words[3]));
    }
  for (int k = length + 8 * (threadIdx.x % V::THREADS_A_TOKEN); k < (length + SEGMENT - 1) / SEGMENT * SEGMENT;
       k += 8 * V::THREADS_A_TOKEN)
    store(k, make_uint2(0, 0), make_uint2(0, 0));
  sum = __reduce_add_sync(0xffffffffu, sum);
  if (lane == 0) atomicAdd(reduced + 1, u32(sum));
  return largest >= 0x7f800000u ? __uint_as_float(0x7fffffffu) : usable ? top / TOP : 0.f;
}

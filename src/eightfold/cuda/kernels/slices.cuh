#pragma once
// Sums over slices of the input, which different CTAs have made.
#include "common.cuh"

// Add up to eight numbers of each slice, `count` of them, to v, in the order of the slices, of which AT_ONCE are on their way
// at a time. They lie `apart` floats from each other, the first at `at`; not from L1, since other CTAs write them.
template <int AT_ONCE>
__device__ __forceinline__ void add_slices(float (&v)[8], const float* at, long long apart, int slices, int count) {
  if (count < 8 || ((reinterpret_cast<u64>(at) | 4 * apart) & 15)) { // seldom: short, see load8_packed
    for (; slices > 0; --slices, at += apart)
#pragma unroll 1
      for (int k = 0; k < 8; ++k) { // v goes round
        const float sum = k < count ? v[0] + __ldcg(at + k) : v[0];
#pragma unroll
        for (int i = 0; i < 7; ++i) v[i] = v[i + 1];
        v[7] = sum;
      }
    return;
  }
  for (; slices > 0; slices -= AT_ONCE, at += AT_ONCE * apart) {
    float4 low[AT_ONCE], high[AT_ONCE];
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s)
      if (s < slices) {
        const float4* const from = reinterpret_cast<const float4*>(at + s * apart);
        low[s] = __ldcg(from), high[s] = __ldcg(from + 1);
      }
#pragma unroll
    for (int s = 0; s < AT_ONCE; ++s)
      if (s < slices) {
        v[0] += low[s].x, v[1] += low[s].y, v[2] += low[s].z, v[3] += low[s].w;
        v[4] += high[s].x, v[5] += high[s].y, v[6] += high[s].z, v[7] += high[s].w;
      }
  }
}

#pragma once
// What every kernel uses: types, scalar conversions, and Hadamard transforms of rotation blocks. No headers: NVRTC
// compiles these files as they are.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum Dtype { FLOAT16 = 0, BFLOAT16 = 1, FLOAT32 = 2 };

constexpr int SEGMENT = 256;   // coordinates that one warp transforms in registers, 8 a lane
constexpr int MAX_RUNS = 96;   // of equal rotation blocks on one side of a linear
constexpr int MAX_SLICES = 64; // of the input

// Rotation blocks of one side: run r is blocks of 1 << run_log from coordinate run_start up to that of run r + 1. Both lie
// side by side: parameters come to a multiprocessor line by line, and each line takes its time.
struct Runs {
  int count;
  int at[MAX_RUNS + MAX_RUNS + 1]; // start, log, start, log, ..., end
};
__device__ __forceinline__ int run_start(const Runs& runs, int r) { return runs.at[2 * r]; }
__device__ __forceinline__ int run_log(const Runs& runs, int r) { return runs.at[2 * r + 1]; }

__device__ __forceinline__ float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ u16 float_to_bfloat(float f) {
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ u32 bfloat_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ u32 half_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float load_as_float(const void* p, long long i, int dtype) {
  if (dtype == FLOAT32) return static_cast<const float*>(p)[i];
  const u16 bits = static_cast<const u16*>(p)[i];
  return dtype == FLOAT16 ? half_to_float(bits) : __uint_as_float(u32(bits) << 16);
}
__device__ __forceinline__ void store_float(void* p, long long i, int dtype, float v) {
  if (dtype == FLOAT32) static_cast<float*>(p)[i] = v;
  else static_cast<u16*>(p)[i] = dtype == FLOAT16 ? float_to_half(v) : float_to_bfloat(v);
}
// Eight numbers of 16 bits, in order, and back.
__device__ __forceinline__ void unpack8(float (&v)[8], const uint4& packed, int dtype) {
  const u32 w[4] = {packed.x, packed.y, packed.z, packed.w};
  if (dtype == FLOAT16) {
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = half_to_float(u16(w[k / 2] >> 16 * (k & 1)));
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = __uint_as_float(k & 1 ? w[k / 2] & 0xffff0000u : w[k / 2] << 16);
  }
}
__device__ __forceinline__ uint4 pack8(const float (&v)[8], int dtype) {
  u32 w[4];
  if (dtype == FLOAT16) {
#pragma unroll
    for (int k = 0; k < 4; ++k) w[k] = half_pair(v[2 * k], v[2 * k + 1]);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) w[k] = bfloat_pair(v[2 * k], v[2 * k + 1]);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}
// Where eight coordinates do not lie in one or two aligned 16 bytes, they come and go one by one, through the first of them,
// past which the rest move: code that seldom runs should be short, for code that always runs is fetched across it.

// Eight coordinates of a dtype of 16 bits from i on, as they are, zeros from `end` on.
template <class Index>
__device__ __forceinline__ uint4 load8_packed(const void* p, Index i, Index end) {
  const u16* const at = static_cast<const u16*>(p) + i;
  if (i + 8 <= end && (reinterpret_cast<u64>(at) & 15) == 0) return *reinterpret_cast<const uint4*>(at);
  uint4 w = make_uint4(0, 0, 0, 0);
#pragma unroll 1
  for (int k = 7; k >= 0; --k) {
    w.w = w.w << 16 | w.z >> 16, w.z = w.z << 16 | w.y >> 16, w.y = w.y << 16 | w.x >> 16, w.x <<= 16;
    if (i + k < end) w.x |= at[k];
  }
  return w;
}
// The same of any dtype: to be loaded early and converted late, so that nobody waits in between.
struct Raw8 {
  uint4 first, second; // of 16-bit dtypes the first alone
};
template <class Index>
__device__ __forceinline__ Raw8 load8_raw(const void* p, Index i, Index end, int dtype) {
  if (dtype != FLOAT32) return {load8_packed(p, i, end), make_uint4(0, 0, 0, 0)};
  const u32* const at = static_cast<const u32*>(p) + i;
  if (i + 8 <= end && (reinterpret_cast<u64>(at) & 15) == 0)
    return {reinterpret_cast<const uint4*>(at)[0], reinterpret_cast<const uint4*>(at)[1]};
  Raw8 w = {};
#pragma unroll 1
  for (int k = 7; k >= 0; --k) {
    w.second = make_uint4(w.first.w, w.second.x, w.second.y, w.second.z);
    w.first = make_uint4(i + k < end ? at[k] : 0, w.first.x, w.first.y, w.first.z);
  }
  return w;
}
__device__ __forceinline__ void convert8(float (&v)[8], const Raw8& raw, int dtype) {
  if (dtype == FLOAT32) {
    v[0] = __uint_as_float(raw.first.x), v[1] = __uint_as_float(raw.first.y);
    v[2] = __uint_as_float(raw.first.z), v[3] = __uint_as_float(raw.first.w);
    v[4] = __uint_as_float(raw.second.x), v[5] = __uint_as_float(raw.second.y);
    v[6] = __uint_as_float(raw.second.z), v[7] = __uint_as_float(raw.second.w);
  } else {
    unpack8(v, raw.first, dtype);
  }
}
template <class Index>
__device__ __forceinline__ void load8(float (&v)[8], const void* p, Index i, Index end, int dtype) {
  convert8(v, load8_raw(p, i, end, dtype), dtype);
}
__device__ __forceinline__ void store8(void* p, long long i, long long end, int dtype, const float (&v)[8]) {
  char* at = static_cast<char*>(p) + (i << (dtype == FLOAT32 ? 2 : 1));
  if (i + 8 <= end && (reinterpret_cast<u64>(at) & 15) == 0) {
    if (dtype == FLOAT32) {
      reinterpret_cast<float4*>(at)[0] = make_float4(v[0], v[1], v[2], v[3]);
      reinterpret_cast<float4*>(at)[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
      *reinterpret_cast<uint4*>(at) = pack8(v, dtype);
    }
    return;
  }
  float w[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) w[k] = v[k];
#pragma unroll 1
  for (int k = 0; k < 8; ++k) {
    if (i + k < end) store_float(p, i + k, dtype, w[0]);
#pragma unroll
    for (int j = 0; j < 7; ++j) w[j] = w[j + 1];
  }
}

// Into L2, for what is read once, late, and by a kernel that has nothing to do yet.
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// 16 bytes, past L1 since codes are read once, or fewer, which only L1 takes, into shared memory: done when waited for.
template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  if (BYTES == 16) asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global.L2::256B [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(BYTES) : "memory");
}

// 2^(-log/2), the norm of a Hadamard matrix of order 2^log.
__device__ __forceinline__ float hadamard_norm(int log) {
  return __uint_as_float(u32(127 - (log >> 1)) << 23) * (log & 1 ? 0.70710678118654752f : 1.f);
}

// BITS stages of unnormalised transforms from distance h on, in place over `length` coordinates, by all threads of the CTA.
template <int BITS>
__device__ __forceinline__ void hadamard_stages(float* buffer, int length, int h) {
  for (int i = threadIdx.x; i < length >> BITS; i += blockDim.x) {
    float* const at = buffer + ((i & ~(h - 1)) << BITS | (i & (h - 1)));
    float v[1 << BITS];
#pragma unroll
    for (int k = 0; k < 1 << BITS; ++k) v[k] = at[k * h];
#pragma unroll
    for (int bit = 0; bit < BITS; ++bit)
#pragma unroll
      for (int k = 0; k < 1 << BITS; ++k)
        if (!(k >> bit & 1)) {
          const float a = v[k], b = v[k | 1 << bit];
          v[k] = a + b;
          v[k | 1 << bit] = a - b;
        }
#pragma unroll
    for (int k = 0; k < 1 << BITS; ++k) at[k * h] = v[k];
  }
  __syncthreads();
}

// The stages above 256 of unnormalised transforms of order `size`, in place over `length` coordinates (whole blocks), by
// all threads of the CTA. Ends with a barrier.
__device__ __forceinline__ void hadamard_wide(float* buffer, int length, int size) {
  int h = SEGMENT;
  for (; 8 * h <= size; h *= 8) hadamard_stages<3>(buffer, length, h);
  if (4 * h <= size) hadamard_stages<2>(buffer, length, h);
  else if (2 * h <= size) hadamard_stages<1>(buffer, length, h);
}

// Part of a run of blocks that one warp transforms: up to 256 coordinates from `begin` on, those below `end`.
struct Segment {
  int begin, end, log;
};

// Segment `number` of the coordinates [begin, end), which hold whole blocks or whole 256ths of a block; {-1} if there are
// not so many.
__device__ __forceinline__ Segment find_segment(const Runs& runs, int begin, int end, int number) {
  if (runs.count == 1) { // the rule: no loop, in which every parameter is waited for
    const int at = begin + SEGMENT * number;
    return at < end ? Segment{at, end, run_log(runs, 0)} : Segment{-1, -1, 0};
  }
  for (int r = 0; r < runs.count; ++r) {
    const int low = max(run_start(runs, r), begin), high = min(run_start(runs, r + 1), end);
    if (low >= high) continue;
    const int count = (high - low + SEGMENT - 1) / SEGMENT;
    if (number < count) return {low + SEGMENT * number, high, run_log(runs, r)};
    number -= count;
  }
  return {-1, -1, 0};
}

// Programmatic dependent launch: let the next kernel start now; wait for all that the kernel before this one wrote.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

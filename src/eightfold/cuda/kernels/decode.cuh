#pragma once
// Codes to weights by two table lookups and a XOR.
//
// Four times an E8P coordinate is an odd integer from -11 to 11, so it is 2 u - 15 with a 4-bit u; four times an E81B
// coordinate is 2 u - 16. The eight u of an E8P code are the nibbles of PATTERN[high byte] ^ SIGNS[low byte], exactly,
// because every sign flips the upper three bits of its nibble and the shift the last bit of all; those of an E81B code
// are the nibbles of E81B[code]. Nibble i is coordinate i. Even nibbles masked out are bytes u, odd ones bytes 16 u:
// operands of integer tensor cores as they are.
#include "common.cuh"
#include "decode_tables.cuh"

constexpr u32 EVEN = 0x0f0f0f0fu, ODD = 0xf0f0f0f0u;

// Tables in shared memory: of patterns, of signs, and of E81B, each with COPIES words a row. 32 copies: each lane reads its
// own bank, without conflicts; or 1 where shared memory is small.
#ifdef COPIES
constexpr u32 TABLES = 1024; // absolute shared address: lookups need no base; shared memory of a kernel starts below it
constexpr u32 ROW_BYTES = 4 * COPIES, TABLE_BYTES = 256 * ROW_BYTES;
#ifndef E81B_COPIES // half of them leave room for the next launch; then two lanes share a bank
#define E81B_COPIES COPIES
#endif
constexpr u32 E81B_ROW_BYTES = 4 * E81B_COPIES;
constexpr u32 TABLES_END = TABLES + 2 * TABLE_BYTES + E81B_STAGES * 256 * E81B_ROW_BYTES;

// Nibbles in the order 0, 2, 4, 6, 1, 3, 5, 7: neighbours lie at the same place of either half.
__device__ __forceinline__ u32 pair_nibbles(u32 word) {
  u32 paired = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) paired |= (word >> 4 * k & 15) << (16 * (k & 1) + 4 * (k >> 1));
  return paired;
}

// The tables on their way to shared memory, each row in one of the first THREADS threads of a CTA. In two steps: whoever
// starts copies of codes in between has the tables' loads ahead of these, not behind them.
template <int THREADS>
struct TableRows {
  static constexpr int ALL = 512 + 256 * E81B_STAGES, COUNT = (ALL + THREADS - 1) / THREADS;
  u32 words[COUNT];

  __device__ __forceinline__ void load() {
    __builtin_assume(threadIdx.x < THREADS);
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      const int i = threadIdx.x + c * THREADS, kind = i >> 8;
      if (i < ALL) words[c] = __ldg((kind == 0 ? PATTERNS : kind == 1 ? SIGNS : E81B) + (i & 255));
    }
  }
  // To `tables`, at address TABLES; no barrier. Lanes start at different copies of their rows, so that no two store to the
  // same bank. PAIRS: pair_nibbles of every word.
  template <bool PAIRS = false>
  __device__ __forceinline__ void store(u8* tables) const {
    __builtin_assume(threadIdx.x < THREADS);
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      const int i = threadIdx.x + c * THREADS, kind = i >> 8;
      if (i >= ALL) break;
      const u32 word = PAIRS ? pair_nibbles(words[c]) : words[c];
      if (COPIES == 32) {
        const int copies = kind == 2 ? E81B_COPIES / 4 : 8; // of 16 bytes
        u8* const to = tables + (kind == 2 ? 2 * TABLE_BYTES + E81B_ROW_BYTES * (i & 255) : ROW_BYTES * i);
#pragma unroll
        for (int k = 0; k < 8; ++k)
          if (k < copies)
            *reinterpret_cast<uint4*>(to + 16 * ((k + threadIdx.x) & (copies - 1))) = make_uint4(word, word, word, word);
      } else {
        reinterpret_cast<u32*>(tables)[i] = word;
      }
    }
  }
};

// Word of table number TABLE for a byte of `word`. The address is one dot product of bytes: that leaves the integer units,
// which are the busier ones, to the logic. `lane4`: 4 * lane, or 0 if there is one copy.
template <int TABLE, int BYTE>
__device__ __forceinline__ u32 look_up(u32 word, u32 lane4) {
  constexpr bool HALF = TABLE == 2 && E81B_COPIES < COPIES;
  constexpr u32 ROW = HALF ? E81B_ROW_BYTES : ROW_BYTES;
  u32 at, found;
  asm("dp4a.u32.u32 %0, %1, %2, %3;"
      : "=r"(at) : "r"(word), "n"(ROW << 8 * BYTE), "r"(HALF ? lane4 & (ROW - 1) : lane4));
  asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(found) : "r"(at), "n"(TABLES + TABLE * TABLE_BYTES));
  return found;
}
// Even and odd nibbles of code number CODE (0 or 1) in a word.
template <int CODE>
__device__ __forceinline__ void decode_e8p(u32 word, u32 lane4, u32& even, u32& odd) {
  const u32 pattern = look_up<0, 2 * CODE + 1>(word, lane4), signs = look_up<1, 2 * CODE>(word, lane4);
  // One LOP3 each, (a ^ b) & c; left to itself the compiler shares the XOR and takes three.
  asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(even) : "r"(pattern), "r"(signs), "n"(EVEN));
  asm("lop3.b32 %0, %1, %2, %3, 0x28;" : "=r"(odd) : "r"(pattern), "r"(signs), "n"(ODD));
}
template <int CODE> // 0 to 3
__device__ __forceinline__ void decode_e81b(u32 word, u32 lane4, u32& even, u32& odd) {
  const u32 nibbles = look_up<2, CODE>(word, lane4);
  even = nibbles & EVEN;
  odd = nibbles & ODD;
}
#endif

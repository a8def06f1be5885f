// The product of a linear for many tokens on Hopper (sm_90a): every weight is decoded once for a tile of TOKENS tokens,
// straight into the registers from which warpgroup mma reads it. The activations come rotated from rotate_input, in the
// very order and swizzle that the tensor cores want them in; rotate_output takes the sums.
//
// A CTA owns ROWS rows by one tile of tokens at a time; each warp of its GROUPS warpgroups 16 * M_TILES of the rows by all
// of these tokens, and its last warp copies. A step is 64 columns. The steps of all row tiles, one tile after the other,
// are cut evenly among the CTAs, so that a row tile may be shared by several: each stores the sums of its part as a slice
// of its own, slice 0 being the first part. So results do not depend on timing, nor on the other tokens of a launch of as
// many token tiles.
//
// The last warp fills a ring of DEPTH slots: codes by asynchronous copies of 16 bytes a lane, activations by one bulk copy.
// A lane of the others decodes one code of each of two rows at a time, which is its part of two mma over 16 columns; while
// these run it decodes the next. Their columns come in the order of the codes: see tile_chunk in rotate.cu.
//
// Compiled with E8P_STAGES, E81B_STAGES, TOKENS, M_TILES, GROUPS, DEPTH, COPIES (of the tables).
#include "barriers.cuh"
#include "half_weights.cuh"

constexpr int WARPS = 4 * GROUPS;                      // that multiply
constexpr int ROWS = 16 * M_TILES * WARPS;             // of a CTA
constexpr int SUMS = TOKENS / 2;                       // of a lane and tile
constexpr int X_BYTES = 128 * TOKENS;                  // of TOKENS by 64 columns
constexpr int SLOT = X_BYTES + WARPS * M_TILES * CODE_BYTES;
constexpr u32 FULL = TABLES_END + DEPTH * SLOT, EMPTY = FULL + 8 * DEPTH; // barriers of the slots
static_assert(SLOT % 1024 == 0, "the swizzle of activations goes by their address");
using Slot = RingSlot<TABLES_END, SLOT, DEPTH>;
// Whether the next step's codes are read in the middle of a step. No warp may wait there for its slot, or the compiler lets
// no mma overlap; so slots are waited for a step earlier, for which there must be enough of them.
constexpr bool AHEAD = DEPTH > 5;
// Registers of a thread: a CTA starts with as many for each, of 65,536; then one warpgroup, which copies, gives some of its
// own to those that multiply. More than there are would never come.
constexpr int START_REGISTERS = 65536 / (128 * GROUPS + 128) / 8 * 8, COPY_REGISTERS = 32;
constexpr int MULTIPLY_REGISTERS = (START_REGISTERS * (GROUPS + 1) - COPY_REGISTERS) / GROUPS / 8 * 8;

struct Params {
  const void* codes[STAGES]; // in the order that the strides below say
  const u8* x;               // float16, as rotate_input tiles it: tile of tokens, step, token, 64 columns
  const float* ratios;
  void* sums;                // float32 [slices, tokens, rows], or float16 [tokens, rows]
  u32 row_stride, column_stride, tile_stride;   // as for matvec
  int tokens, columns, rows, slices, sums_dtype; // rows: a multiple of 16; columns: of 64
};

// --- warpgroup mma

#define NAMES4 "%0,%1,%2,%3"
#define NAMES8 NAMES4 ",%4,%5,%6,%7"
#define NAMES16 NAMES8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES32 NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES64                                                                                     \
  NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53" \
          ",%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES128                                                                                                  \
  NAMES64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87"      \
          ",%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109"    \
          ",%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define D1(i) "+f"(d[i])
#define D4(i) D1(i), D1(i + 1), D1(i + 2), D1(i + 3)
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define D64(i) D32(i), D32(i + 32)
#define D128(i) D64(i), D64(i + 64)
#define WGMMA(N, NAMES, OUT, A0, A1, A2, A3, B, ADD)                                                              \
  asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #ADD ", 0;\n"                                               \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" NAMES "}, {%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 \
               "}, %" #B ", add, 1, 1, 0; }"                                                                      \
               : OUT : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add))

// d [16 rows of each warp, TOKENS] = (add ? d : 0) + a [these rows, 16 columns] times b, of which a descriptor is given.
__device__ __forceinline__ void start_mma(float (&d)[SUMS], const u32 (&a)[4], u64 b, int add) {
#if TOKENS == 128
  WGMMA(128, NAMES64, D64(0), 64, 65, 66, 67, 68, 69);
#else
  static_assert(TOKENS == 256, "a tile of 128 or 256 tokens");
  WGMMA(256, NAMES128, D128(0), 128, 129, 130, 131, 132, 133);
#endif
}
// Registers that were written by other instructions may be read by mma after this.
__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_mma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most LEFT of the committed groups run.
template <int LEFT>
__device__ __forceinline__ void wait_for_mma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Of activations at 16 times a shared address: rows of 128 bytes, swizzled, eight of them 1,024 bytes from the next eight.
__device__ __forceinline__ u64 descriptor(u32 sixteenth) { return u64(sixteenth | 1 << 16) | 64ull << 32 | 1ull << 62; }

// All threads of the CTA, each from its branch.
__device__ __forceinline__ void everyone() { asm volatile("bar.sync 0;" ::: "memory"); }

// --- the warp that copies

// Codes of the CTA's rows in the next step: lane l takes row l % 16 of every other tile of 16 rows. Even rows of a tile come
// first, then odd ones, so that a lane's two rows, g and g + 8 of the mma, are neighbours in memory.
struct Codes {
  u32 at, to, to_e81b; // number of the lane's first code; where it goes in a slot
  int tiles;           // that there are from the lane's first one on

  __device__ __forceinline__ void start(const Params& p, int row0, int step, int lane) {
    const int tile = row0 / 16 + (lane >> 4), row = lane & 15, place = 8 * (row & 1) + (row >> 1);
    tiles = p.rows / 16 - tile;
    at = tile * p.tile_stride + row * p.row_stride + step * p.column_stride;
    to = X_BYTES + (lane >> 4) * CODE_BYTES + 16 * place;
    to_e81b = X_BYTES + (lane >> 4) * CODE_BYTES + 256 * E8P_STAGES + 8 * place;
  }
  __device__ __forceinline__ void copy(const Params& p, u32 slot) {
    u32 from = at;
#pragma unroll
    for (int i = 0; i < WARPS * M_TILES; i += 2, from += 2 * p.tile_stride) {
      if (i >= tiles) break; // no such rows: what lies in the slot is multiplied and not stored
#pragma unroll
      for (int s = 0; s < E8P_STAGES; ++s)
        copy_async<16>(slot + to + i * CODE_BYTES + 256 * s, static_cast<const u8*>(p.codes[s]) + 2ull * from);
#pragma unroll
      for (int s = 0; s < E81B_STAGES; ++s)
        copy_async<8>(slot + to_e81b + i * CODE_BYTES, static_cast<const u8*>(p.codes[E8P_STAGES + s]) + from);
    }
    at += p.column_stride;
  }
};

// Which steps the CTA has: `count` of them from step `step` of row tile `row_tile` on.
struct Share {
  u32 steps, all; // of a row tile, of all
  u32 ctas, cta;  // that share them, this one
  int count, row_tile, step;

  __device__ __forceinline__ Share(const Params& p) {
    steps = p.columns / 64, all = steps * ((p.rows + ROWS - 1) / ROWS);
    ctas = gridDim.x, cta = blockIdx.x;
    const u32 first = all * cta / ctas;
    count = all * (cta + 1) / ctas - first;
    row_tile = first / steps, step = first - row_tile * steps;
  }
  // The slice that this CTA's part of the row tile is: that of the first part's CTA is 0.
  __device__ __forceinline__ int slice() const { return cta - ((row_tile * steps + 1) * ctas - 1) / all; }
};

// Fills the slots with the steps of a share: `begin` what depends on nothing, `run` the rest.
struct Filler {
  const Params& p;
  Share share;
  int lane;
  Codes codes;

  __device__ __forceinline__ void copy_codes(const Slot& slot) {
    codes.copy(p, slot.address());
    arrive_with_copies(FULL + 8 * slot.at);
    if (++share.step == share.steps) {
      share.step = 0, ++share.row_tile;
      codes.start(p, share.row_tile * ROWS, 0, lane);
    }
  }
  __device__ __forceinline__ void begin() {
    codes.start(p, share.row_tile * ROWS, share.step, lane);
    Slot slot;
#pragma unroll 1
    for (int i = 0; i < min(DEPTH, share.count); ++i, slot.advance()) copy_codes(slot);
  }
  // `step`: the first one's, of a row tile.
  __device__ __forceinline__ void run(u32 step) {
    const u8* const x = p.x + u64(blockIdx.y) * share.steps * X_BYTES;
    const u32 bytes = 128 * min(TOKENS, p.tokens - int(blockIdx.y) * TOKENS);
    Slot slot;
#pragma unroll 1
    for (int i = 0; i < share.count; ++i, slot.advance()) {
      if (i >= DEPTH) {
        wait(EMPTY + 8 * slot.at, slot.round ^ 1);
        copy_codes(slot);
      }
      if (lane == 0) copy_bulk(slot.address(), x + u64(step) * X_BYTES, bytes, FULL + 8 * slot.at);
      if (++step == share.steps) step = 0;
    }
  }
};

// --- the warps that multiply

__device__ __forceinline__ u32 transpose(u32 pair) { // of 8 x 8 numbers of 16 bits, a row of which four lanes hold
  u32 transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// A warp's sums of a row tile: of logical row g of a tile of 16 is row 2 g of the weight, of row g + 8 row 2 g + 1.
__device__ __forceinline__ void store(const float (&sums)[M_TILES][SUMS], const Params& p, int slice, int row0, float factor, int lane) {
  const int g = lane >> 2, t = lane & 3, token0 = blockIdx.y * TOKENS;
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    const int row = row0 + 16 * m;
    if (row >= p.rows) return;
    if (p.sums_dtype == FLOAT32) {
      float* const to = static_cast<float*>(p.sums) + (long long)slice * p.tokens * p.rows + row + 2 * g;
#pragma unroll
      for (int n = 0; n < TOKENS / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = token0 + 8 * n + 2 * t + i;
          if (token < p.tokens)
            *reinterpret_cast<float2*>(to + (long long)token * p.rows) =
                make_float2(sums[m][4 * n + i] * factor, sums[m][4 * n + 2 + i] * factor);
        }
    } else {
      u16* const to = static_cast<u16*>(p.sums) + row + 4 * t;
#pragma unroll
      for (int n = 0; n < TOKENS / 8; ++n) {
        const float* const d = sums[m] + 4 * n;
        const u32 even = transpose(half_pair(d[0] * factor, d[1] * factor)); // rows 4 t and 4 t + 2 of one token
        const u32 odd = transpose(half_pair(d[2] * factor, d[3] * factor));  // and 4 t + 1, 4 t + 3
        const int token = token0 + 8 * n + g;
        if (token < p.tokens)
          *reinterpret_cast<uint2*>(to + (long long)token * p.rows) =
              make_uint2(__byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632));
      }
    }
  }
}

// Decode the codes number CODE of the lane, when the mma that reads what lies in `a` are done, and start theirs.
template <int CODE>
__device__ __forceinline__ void multiply_codes(float (&sums)[M_TILES][SUMS], u32 (&a)[M_TILES][2][4], Words& nibbles,
                                               const u32 (&ratios)[STAGES], u32 x, int add) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    // Not to be decoded before that: the compiler would write registers that mma still read, and so let none overlap.
#pragma unroll
    for (int s = 0; s < STAGES; ++s) asm volatile("" : "+r"(nibbles[m][0][s]), "+r"(nibbles[m][1][s]));
    u32 even[4], odd[4]; // rows
    decode(even, nibbles[m][0], ratios);
    decode(odd, nibbles[m][1], ratios);
#pragma unroll
    for (int k = 0; k < 2; ++k)
      a[m][k][0] = even[2 * k], a[m][k][1] = odd[2 * k], a[m][k][2] = even[2 * k + 1], a[m][k][3] = odd[2 * k + 1];
  }
  fence_registers();
#pragma unroll
  for (int k = 0; k < 2; ++k)
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
      start_mma(sums[m], a[m][k], descriptor(x) + (4 * CODE + 2 * k), k ? 1 : add);
  commit_mma();
}

__device__ __forceinline__ void multiply_steps(const Params& p, Share share, int warp, int lane) {
  u32 ratios[STAGES]; // of stage s + 1 to stage s; the first stage's own waits until sums are stored
  const float first_ratio = p.ratios[0];
#pragma unroll
  for (int s = 0; s + 1 < STAGES; ++s) ratios[s] = pair_of(p.ratios[s + 1] / p.ratios[s]);
  const u32 my_codes = X_BYTES + warp * M_TILES * CODE_BYTES, of_lane = COPIES == 32 ? 4 * lane : 0;
  float sums[M_TILES][SUMS];
  u32 a[2][M_TILES][2][4];
  Words words, nibbles, second;
  Slot slot, next; // of this step, and of the next
  u32 before = 0;  // number of that of the step before
  next.advance();
  wait(FULL, 0);
  if (AHEAD && share.count > 1) wait(FULL + 8, 0);
  read_codes(words, slot.address() + my_codes, lane);
  find_nibbles<0>(nibbles, words, of_lane);
#pragma unroll 1
  while (share.count > 0) {
    const int steps = min(int(share.steps) - share.step, share.count);
#pragma unroll 1
    for (int i = 0; i < steps; ++i) { // lookups run half a step ahead of what decodes
      find_nibbles<1>(second, words, of_lane);
      wait_for_mma<1>(); // those of the first codes of the step before
      multiply_codes<0>(sums, a[0], nibbles, ratios, slot.address() / 16, i);
      if (AHEAD) read_codes(words, next.address() + my_codes, lane); // after the last step: whatever is there
      wait_for_mma<1>(); // those of the second
      if (i && lane == 0) arrive(EMPTY + 8 * before);
      multiply_codes<1>(sums, a[1], second, ratios, slot.address() / 16, 1);
      before = slot.at, slot = next;
      next.advance();
      if (AHEAD && i + 2 < share.count) wait(FULL + 8 * next.at, next.round);
      if (!AHEAD && i + 1 < share.count) wait(FULL + 8 * slot.at, slot.round);
      if (!AHEAD) read_codes(words, slot.address() + my_codes, lane);
      find_nibbles<0>(nibbles, words, of_lane);
    }
    wait_for_mma<0>();
    if (lane == 0) arrive(EMPTY + 8 * before);
    const int row0 = share.row_tile * ROWS + 16 * M_TILES * warp;
    store(sums, p, share.slice(), row0, 256.f * first_ratio, lane);
    share.step += steps, share.count -= steps;
    if (share.step < share.steps) return;
    // The row tile is complete: zeros for slices that others have and it does not.
    for (int slice = share.slice() + 1; slice < p.slices; ++slice)
      for (int token = blockIdx.y * TOKENS; token < min(int(blockIdx.y + 1) * TOKENS, p.tokens); ++token)
        for (int row = row0 + lane; row < min(row0 + 16 * M_TILES, p.rows); row += 32)
          static_cast<float*>(p.sums)[((long long)slice * p.tokens + token) * p.rows + row] = 0;
    share.step = 0, ++share.row_tile;
  }
}

// Grid: CTAs that share the steps, tiles of tokens.
extern "C" __global__ void __launch_bounds__(128 * GROUPS + 128, 1) wgmma(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 dynamic[];
  launch_dependents();
  const u32 base = u32(__cvta_generic_to_shared(dynamic));
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  if (base > TABLES) __trap();
  const Share share(p);
  if (warp >= WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPY_REGISTERS));
    if (warp == WARPS && lane < DEPTH) {
      start_barrier(FULL + 8 * lane, 33); // the lanes that copy codes, and the copy of activations
      start_barrier(EMPTY + 8 * lane, WARPS);
    }
    fence_barriers();
    __syncwarp();
    Filler filler = {p, share, lane};
    if (warp == WARPS) filler.begin();
    everyone();
    wait_for_previous();
    if (warp == WARPS) filler.run(share.step);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLY_REGISTERS));
    TableRows<32 * WARPS> tables;
    tables.load();
    tables.store<true>(dynamic - base + TABLES);
    everyone();
    multiply_steps(p, share, warp, lane);
  }
}

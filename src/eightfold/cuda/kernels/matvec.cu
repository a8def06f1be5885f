// The linear for up to 16 tokens: decode, multiply on integer tensor cores, and rotate back if counters are given, else
// leave that to rotate_output. The activations come from quantize_input, or, of one token, are rotated and quantized here
// by every CTA that needs them.
//
// A CTA owns some tiles of 16 rows over one slice of the input; its warps share out the units of those, ROWS tiles by 256
// columns, and copy the codes into rings of their own in shared memory, DEPTH units ahead. Of a unit lane (g, t) takes 64
// columns of rows g and g + 8, 16 bytes an E8P stage and row: four words of two codes, word j being the A operand of step
// j. The sums are exact integers, added up in shared memory in any order; a CTA turns its sums into floats and stores them;
// the CTA that completes a block of the output rotation adds the slices in their order and finishes the block. So results
// do not depend on timing, nor on the tokens beside one.
//
// Compiled with E8P_STAGES, E81B_STAGES, TILES (of 8 columns: a token is two, its high and low planes), ROWS, WARPS, CTAS
// (on a multiprocessor), DEPTH, AHEAD (units that go to L2 in time), COPIES (of the tables), E81B_COPIES (of one of them),
// ALIGNED (whole tiles and steps, 16-byte copies).
#include "barriers.cuh"
#include "decode.cuh"
#include "quantize.cuh"
#include "slices.cuh"

constexpr int STAGES = E8P_STAGES + E81B_STAGES;
constexpr bool ALONE = TILES == 1; // one token, which it can rotate and finish by itself
// Activations come by bulk copies: loads would wait for the codes that are on their way, whose copies come before them.
constexpr bool BULK = __CUDA_ARCH__ >= 900;

struct Params {
  const void* codes[STAGES]; // in the order that the strides below say
  const void* x;             // one token [columns], to be rotated and quantized here
  const void* scale_in;      // [columns]
  const uint4* planes;       // else from quantize_input, with its scales and sums; null
  const float* scales;
  const int* sums;
  float* partial;            // [slices, tokens, pitch], pitch a multiple of 4
  u32* counters;             // rows of each output block that are done: 0 before and after; null if rotate_output finishes
  const float* ratios;
  const void* scale_out;     // [features]
  const void* bias;          // [features] or null
  void* y;                   // [tokens, features]
  // Codes from row to row of a tile, from 64 columns to the next, from tile to tile: the file's rows of codes, or tiles
  // of 16 rows in which 16 rows by 64 columns lie together.
  u32 row_stride, column_stride, tile_stride;
  // Of the groups of ROWS tiles a CTA takes `share`, the first `more` of them one more.
  int x_dtype, y_dtype, scale_dtype, bias_dtype, tokens, columns, features, padded, pitch, slices, share, more;
  int slice_start[MAX_SLICES + 1];
  Runs in_runs, runs; // of the input, of the output
};
#include "units.cuh"

__device__ __forceinline__ void multiply(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

using Sums = int[ROWS][STAGES][2][TILES][4];

// Activations of one step, for lanes that have a column: the rest keep their zeros.
__device__ __forceinline__ void read_activations(u32 (&x)[TILES][4], u32 at, int words, int lane) {
#pragma unroll
  for (int n = 0; n < TILES; ++n)
    asm volatile(
        "{ .reg .pred q; setp.lt.s32 q, %5, %6;\n  @q ld.shared.v4.u32 {%0,%1,%2,%3}, [%4]; }"
        : "+r"(x[n][0]), "+r"(x[n][1]), "+r"(x[n][2]), "+r"(x[n][3])
        : "r"(at + 512 * n), "r"(lane + 32 * n), "r"(words));
}

// One step of 64 columns: the words J of both halves against one 16-byte word of activations a tile.
template <int J>
__device__ __forceinline__ void multiply_step(Sums& sums, const Unit& w, u32 (&x)[TILES][4], u32 at, int words,
                                              int lane, u32 lane4) {
  read_activations(x, at, words, lane);
  u32 even[4], odd[4];
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
      if (s < E8P_STAGES) {
        const u32(&v)[2][4] = w.e8p[r][s < E8P_STAGES ? s : 0];
        decode_e8p<0>(v[0][J], lane4, even[0], odd[0]);
        decode_e8p<0>(v[1][J], lane4, even[1], odd[1]);
        decode_e8p<1>(v[0][J], lane4, even[2], odd[2]);
        decode_e8p<1>(v[1][J], lane4, even[3], odd[3]);
      } else {
        constexpr int CODE = J % 2 * 2;
        const u32(&v)[2][2] = w.e81b[r][0];
        decode_e81b<CODE>(v[0][J / 2], lane4, even[0], odd[0]);
        decode_e81b<CODE>(v[1][J / 2], lane4, even[1], odd[1]);
        decode_e81b<CODE + 1>(v[0][J / 2], lane4, even[2], odd[2]);
        decode_e81b<CODE + 1>(v[1][J / 2], lane4, even[3], odd[3]);
      }
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        multiply(sums[r][s][0][n], even[0], even[1], even[2], even[3], x[n][0], x[n][1]);
        multiply(sums[r][s][1][n], odd[0], odd[1], odd[2], odd[3], x[n][2], x[n][3]);
      }
    }
}

// Adds to a counter; what the CTA wrote before its last barrier is then seen by the CTA that completes the count.
__device__ __forceinline__ u32 arrive(u32* counter, u32 count) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(count) : "memory");
  return before;
}

// Where half 0 or 1 of a tile's rows lies among its 16 sums of a token: exchanged for two of four tokens, so that the lanes
// of a warp add in different banks.
__device__ __forceinline__ int place(int half, int token) { return 8 * half ^ (token & 2) << 2; }

// Add a warp's sums over the tiles of a unit to the CTA's and start again from zero. [tile][stage][token][row] at `to`.
__device__ __forceinline__ void flush(Sums& sums, u32* to, int tiles, int tokens, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int s = 0; s < STAGES; ++s)
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        int(&e)[4] = sums[r][s][0][n], (&o)[4] = sums[r][s][1][n];
        const int token = 4 * n + t;
        if (token < tokens && r < tiles) { // odd sums are multiples of 16; unsigned: sums may wrap on the way, not at the end
          u32* const at = to + ((r * STAGES + s) * tokens + token) * 16 + g; // token is t but for fours
          atomicAdd(at + place(0, t), 256u * u32(e[0] + (o[0] >> 4)) + u32(e[1] + (o[1] >> 4)));
          atomicAdd(at + place(1, t), 256u * u32(e[2] + (o[2] >> 4)) + u32(e[3] + (o[3] >> 4)));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) e[i] = o[i] = 0;
      }
}

// A piece of the output: up to 256 rows of equal blocks, [begin, end), finished by one warp.
struct Piece {
  int number, begin, end, log;
};

// The piece that has this row.
__device__ __forceinline__ Piece find_piece(const Runs& runs, int row) {
  if (runs.count == 1) {
    const int number = row / SEGMENT, begin = SEGMENT * number;
    return {number, begin, min(begin + SEGMENT, run_start(runs, 1)), run_log(runs, 0)};
  }
  int before = 0;
  for (int r = 0;; ++r) {
    const int low = run_start(runs, r), high = run_start(runs, r + 1);
    if (row < high) {
      const int number = (row - low) / SEGMENT, begin = low + SEGMENT * number;
      return {before + number, begin, min(begin + SEGMENT, high), run_log(runs, r)};
    }
    before += (high - low + SEGMENT - 1) / SEGMENT;
  }
}

// The pieces that share rows with the CTA's, of one token: every WARPS-th is a warp's.
struct Finisher {
  const Params& p;
  int row, row1; // of the CTA's rows, those that are not in a piece yet
  int turn = 0;
  Piece piece;
  Raw8 scales, biases = {};
  Butterfly b;

  __device__ __forceinline__ bool next(int warp) {
    do {
      if (row >= row1) return false;
      piece = find_piece(p.runs, row);
      row = piece.end;
    } while (turn++ % WARPS != warp);
    return true;
  }
  // What is needed besides the sums.
  __device__ __forceinline__ void prepare() {
    const int first = piece.begin + 8 * (threadIdx.x & 31), stop = min(piece.end, p.features);
    scales = load8_raw(p.scale_out, first, stop, p.scale_dtype);
    if (p.bias) biases = load8_raw(p.bias, first, stop, p.bias_dtype);
    b = butterfly(piece.log);
  }
  // Add the slices, transform, scale, add the bias, store.
  __device__ __forceinline__ void finish() const {
    const int first = piece.begin + 8 * (threadIdx.x & 31);
    float v[8] = {}, scale[8], bias[8];
    add_slices<4>(v, p.partial + first, p.pitch, p.slices, piece.end - first);
    transform(v, b);
    convert8(scale, scales, p.scale_dtype);
    convert8(bias, biases, p.bias_dtype);
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = v[k] * hadamard_norm(piece.log) * scale[k] + bias[k];
    store8(p.y, first, min(piece.end, p.features), p.y_dtype, v);
  }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, CTAS) matvec(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 dynamic[];
  launch_dependents();
  const u32 base = u32(__cvta_generic_to_shared(dynamic));
  if (base > TABLES) __trap();
  u8* const shared = dynamic - base; // shared[a] is the byte at shared address a
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  TableRows<32 * WARPS> tables;
  tables.load();
  const int slice = blockIdx.y, cta = blockIdx.x, tokens = ALONE ? 1 : p.tokens;
  const int start = p.slice_start[slice], length = p.slice_start[slice + 1] - start;
  const int units = (length + SEGMENT - 1) / SEGMENT; // of ROWS tiles
  const int tile0 = ROWS * (p.share * cta + min(cta, p.more));
  const int tile1 = min(tile0 + ROWS * (p.share + (cta < p.more)), (p.padded + 15) / 16);
  const int all = (tile1 - tile0 + ROWS - 1) / ROWS * units;
  const int first = u32(all * warp) / WARPS, last = u32(all * (warp + 1)) / WARPS;

  const int row0 = 16 * tile0, row1 = min(16 * tile1, p.padded);
  // Shared memory after the rings: activations; a barrier, in 16 bytes; of every token largest magnitude, sum and scale, and
  // a word more, so that four sums are an aligned 16 bytes; sums.
  const int words = 8 * tokens; // 16-byte words of activations in a step
  uint4* const activations = reinterpret_cast<uint4*>(shared + RINGS_END);
  u32* const reduced = reinterpret_cast<u32*>(activations + 4 * units * words + 1);
  float* const factors = reinterpret_cast<float*>(reduced + 2 * tokens);
  u32* const sums = reduced + 4 * tokens;

  Slice<WARPS> own;
  if (ALONE && !p.planes) own.load_scales(p.in_runs, start, start + length, p.scale_in, p.scale_dtype, p.columns);

  // Weights depend on nothing: their first loads go out before the activations are there.
  const int skipped = int((first + 0.5f) / units); // exact: few units, and division is shorter of floats
  int tile = tile0 + ROWS * skipped, unit = first - skipped * units;
  Cursor next = {tile * p.tile_stride, tile, unit};
#if ALIGNED
  next.at += (start / 64 + 4 * unit) * p.column_stride + first_code(p);
  const u32 ring = RINGS + warp * DEPTH * UNIT_BYTES;
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) {
    if (first + d < last) {
      copy_unit(ring + d * UNIT_BYTES, p, next, tile1, length / 64 - 4 * next.unit);
      advance(next, units, p);
    }
    asm volatile("cp.async.commit_group;");
  }
#else
  next.at += start / 8 + 32 * unit;
#endif

  if (ALONE && !p.planes) own.prepare();
  tables.store(shared + TABLES);
#pragma unroll 1
  for (int row = row0 + 32 * threadIdx.x; row < min(row1, p.features); row += 32 * 32 * WARPS) {
    prefetch(static_cast<const u8*>(p.scale_out) + row * (p.scale_dtype == FLOAT32 ? 4 : 2));
    if (p.bias) prefetch(static_cast<const u8*>(p.bias) + row * (p.bias_dtype == FLOAT32 ? 4 : 2));
  }
  float ratios[STAGES];
#pragma unroll
  for (int s = 0; s < STAGES; ++s) ratios[s] = p.ratios[s];
#pragma unroll 1
  for (int i = threadIdx.x; i < 4 * tokens + (tile1 - tile0) * STAGES * tokens * 16; i += 32 * WARPS) reduced[i] = 0;
  // Once the kernel before has ended memory would be idle while activations are rotated: the next codes go to L2.
  const auto prefetch_units = [&] {
#if ALIGNED
    Cursor later = next;
    for (int i = first + DEPTH; i < min(first + DEPTH + AHEAD, last); ++i) {
      copy_unit<true>(0, p, later, tile1, length / 64 - 4 * later.unit);
      advance(later, units, p);
    }
#endif
  };
  const u32 activations_at = u32(__cvta_generic_to_shared(activations)), arrived = activations_at + 64 * units * words;
  if (BULK && threadIdx.x == 0) {
    start_barrier(arrived, 1);
    fence_barriers();
  }
  if (p.planes) {
    __syncthreads(); // the zeros
    wait_for_previous();
    prefetch_units();
    const uint4* const planes = p.planes + (long long)((start >> 8) + slice) * 4 * words;
    if (BULK && threadIdx.x == 0) copy_bulk(activations_at, planes, 64 * units * words, arrived);
    if (!BULK)
      for (int i = threadIdx.x; i < 4 * units * words; i += 32 * WARPS) activations[i] = planes[i];
    if (threadIdx.x < tokens) {
      const int at = threadIdx.x * p.slices + slice;
      reduced[2 * threadIdx.x + 1] = p.sums[at];
      factors[threadIdx.x] = p.scales[at];
    }
    if (BULK) wait(arrived, 0);
  } else if constexpr (ALONE) {
    __syncthreads(); // the zeros
    wait_for_previous();
    const u16* const x = static_cast<const u16*>(p.x) + start;
    const bool bulk = BULK && start + length <= p.columns && length % 8 == 0 && (reinterpret_cast<u64>(x) & 15) == 0;
    if (bulk && threadIdx.x == 0) copy_bulk(activations_at, x, 2 * length, arrived); // to where the planes will be
    if (!bulk) own.load(p.x, 0, p.columns);
    prefetch_units();
    if (bulk) {
      wait(arrived, 0);
      own.read(reinterpret_cast<const u16*>(activations), start);
    }
    own.rotate(start, p.x_dtype, p.scale_dtype);
    const float scale = quantize(own.values, length, activations, 1, 0, reduced);
    if (threadIdx.x == 0) factors[0] = scale;
  }
  __syncthreads();

  Sums acc = {};
  u32 x[TILES][4] = {};
  u32 lane4 = COPIES == 32 ? 4 * lane : 0;
  asm volatile("" : "+r"(lane4)); // kept in a register
  const u32 step = 16 * words;
  u32 from[4]; // where the lane finds its activations of the first unit
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    from[j] = activations_at + j * step + 16 * swizzle(lane, j);
    if (ALIGNED) asm volatile("" : "+r"(from[j]));
  }
  u32 slot = 0;
#pragma unroll 1
  for (int i = first; i < last; ++i) {
    Unit w;
#if ALIGNED
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
    __syncwarp();
    read_unit(w, ring + slot);
    __syncwarp(); // all have read: the next unit may come
    if (i + DEPTH < last) {
      copy_unit(ring + slot, p, next, tile1, length / 64 - 4 * next.unit);
      advance(next, units, p);
    }
    asm volatile("cp.async.commit_group;");
    slot = slot == (DEPTH - 1) * UNIT_BYTES ? 0 : slot + UNIT_BYTES;
#else
    load_unit(w, p, next, length / 8);
    advance(next, units, p);
#endif
    const u32 of_unit = unit * 4 * step;
    multiply_step<0>(acc, w, x, from[0] + of_unit, words, lane, lane4);
    multiply_step<1>(acc, w, x, from[1] + of_unit, words, lane, lane4);
    multiply_step<2>(acc, w, x, from[2] + of_unit, words, lane, lane4);
    multiply_step<3>(acc, w, x, from[3] + of_unit, words, lane, lane4);
    if (++unit == units || i + 1 == last) {
      flush(acc, sums + (tile - tile0) * STAGES * tokens * 16, tile1 - tile, tokens, lane);
      unit = 0;
      tile += ROWS;
    }
  }
  Finisher finisher = {p, row0, row1};
  bool finishes = false;
  if constexpr (ALONE)
    if (p.counters) finishes = finisher.next(warp);
  __syncthreads();

  // Four rows of a token at a time: of the sums of integers a float.
  const int quads = 4 * (tile1 - tile0);
#pragma unroll 1
  for (int i = threadIdx.x; i < quads * tokens; i += 32 * WARPS) {
    const int token = ALONE ? 0 : u32(i) / quads, quad = i - token * quads, row = row0 + 4 * quad;
    const u32* const at = sums + ((quad >> 2) * STAGES * tokens + token) * 16 + place(quad >> 1 & 1, token) + 4 * (quad & 1);
    float4 v = {};
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
      const uint4 u = *reinterpret_cast<const uint4*>(at + s * tokens * 16);
      const u32 offset = (s < E8P_STAGES ? 15 : 16) * reduced[2 * token + 1];
      v.x += ratios[s] * float(int(2 * u.x - offset)), v.y += ratios[s] * float(int(2 * u.y - offset));
      v.z += ratios[s] * float(int(2 * u.z - offset)), v.w += ratios[s] * float(int(2 * u.w - offset));
    }
    const float factor = 0.25f * factors[token];
    v = make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
    float* const to = p.partial + ((long long)slice * tokens + token) * p.pitch + row;
    if (row < row1) *reinterpret_cast<float4*>(to) = v;
  }
  if constexpr (!ALONE) return; // rotate_output does the rest
  if (!p.counters) return;      // here, too
  __syncthreads();
  for (; finishes; finishes = finisher.next(warp)) {
    const Piece& piece = finisher.piece;
    u32* const counter = p.counters + piece.number;
    const u32 mine = min(piece.end, row1) - max(piece.begin, row0);
    u32 before = 0;
    if (lane == 0) before = arrive(counter, mine);
    finisher.prepare(); // while that takes its time
    const bool complete = lane == 0 && before + mine == u32(p.slices * (piece.end - piece.begin));
    if (complete) *counter = 0; // as the next launch wants it
    if (!__any_sync(0xffffffffu, complete)) continue;
    __syncwarp(); // what the first lane may see now the others may, too
    finisher.finish();
  }
}

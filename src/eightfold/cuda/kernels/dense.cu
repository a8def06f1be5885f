// Codes to the dense weights that a linear stands for: decoded, rotated back on both sides, scaled, rounded to the dtype of
// the activations, which a matrix product for many tokens then takes as they are. Rotation blocks up to 256 on both sides.
//
// A CTA takes tile after tile: a segment of up to 256 rows by one of up to 256 columns, each whole blocks of one run. The
// tile lies in shared memory as 256 rows of 512 bytes whose 16-byte chunks are exchanged by the last bits of the row, so that
// eight rows of a chunk, or eight chunks of a row, are different banks.
//   1. A warp decodes 16 rows.
//   2. It transforms them along the columns, in place. The lower four bits of a column's number are a product of a Hadamard
//      matrix of order 16 with the weights, on tensor cores; the fifth is a sum of two products; the upper three are
//      additions of a lane's float32 sums. Rounded to float16 without a factor: numbers of 2^-7 to 2^-4, about.
//   3. It transforms 16 columns along the rows, in the same way; then float32 scales, norms, and the last rounding.
//   4. It stores its 16 rows. Step 1 of the next tile writes over nothing else, so two barriers a tile are enough: before
//      and after step 3. The next codes are in L2 by step 2 and on their way to registers during step 4.
// What is beyond a short segment is decoded from code 0: finite, so that a factor of 0 keeps it out of everything else.
//
// Compiled with E8P_STAGES, E81B_STAGES, COPIES (of the tables), E81B_COPIES.
#include "butterfly.cuh"
#include "pairs.cuh"

constexpr int THREADS = 512, GROUPS = SEGMENT / 16; // of 16 coordinates of a segment
constexpr u32 ROW = 2 * SEGMENT;                    // bytes of a row of the tile
constexpr u32 TILE = TABLES_END, ROW_SCALES = TILE + SEGMENT * ROW, COLUMN_SCALES = ROW_SCALES + 4 * SEGMENT;
constexpr u32 MATRICES = COLUMN_SCALES + 4 * SEGMENT; // Hadamard, of orders 1 to 16 along a diagonal, as A fragments
constexpr u32 NEXT = MATRICES + 5 * 512; // a warp's next tile, for which steps 2 and 3 have no registers
constexpr u32 RATIOS = NEXT + 16 * (THREADS / 32); // likewise: of stage s + 1 to stage s, as pairs of float16
constexpr u32 SHARED_END = RATIOS + 16;

struct Params {
  const void* codes[STAGES];
  const float* ratios;
  const void* scale_in;  // [features_in]
  const void* scale_out; // [features_out]
  uint4* weights;        // 16-bit [end - begin, 8 pitch], of which columns that are not there are zeros; no rows from
                         // features_out on
  u32 row_stride, column_stride, tile_stride; // as for matvec
  int scale_dtype, aligned;                   // aligned: the codes of 64 columns start at multiples of 16 bytes
  int begin, end, features_in, features_out;  // rows, whole blocks
  int pitch, across, tiles;                   // eights of columns; segments of columns, of both sides
  Runs in_runs, out_runs;
};

// One side of a tile in a register: up to 256 coordinates; columns are a multiple of 8.
struct Side {
  u32 packed;

  explicit __device__ __forceinline__ Side(u32 packed) : packed(packed) {}
  __device__ __forceinline__ Side(const Runs& runs, int begin, int end, int number) {
    const Segment found = find_segment(runs, begin, end, number);
    packed = u32(found.begin) << 12 | u32(min(found.end - found.begin, SEGMENT) - 1) << 4 | u32(found.log);
  }
  __device__ __forceinline__ int first() const { return packed >> 12; } // below 2^20
  __device__ __forceinline__ int count() const { return (packed >> 4 & 255) + 1; }
  __device__ __forceinline__ int log() const { return packed & 15; }
};
struct Tile {
  Side rows, columns;
};

__device__ __forceinline__ Tile find_tile(const Params& p, int number) {
  const int down = number / p.across;
  return {{p.out_runs, p.begin, p.end, down},
          {p.in_runs, 0, run_start(p.in_runs, p.in_runs.count), number - down * p.across}};
}

// The thread's number, asked for again wherever it is wanted: registers are short in steps 2 and 3.
struct Place {
  int warp, lane;

  __device__ __forceinline__ Place() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    warp = thread >> 5, lane = thread & 31;
  }
  __device__ __forceinline__ int row() const { return 16 * warp + (lane & 15); } // that it decodes
  __device__ __forceinline__ int part() const { return lane >> 4; }              // of which it has 64 columns, and the second next
};

// --- shared memory and tensor cores

__device__ __forceinline__ uint4 load_chunk(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ void store_chunk(u32 at, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
__device__ __forceinline__ float load_float(u32 at) {
  float f;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(f) : "r"(at) : "memory");
  return f;
}
__device__ __forceinline__ void store_float_shared(u32 at, float f) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(f) : "memory");
}
// Four matrices of 8 rows of 16 bytes; `at`: of row l % 8 of matrix l / 8 in lane l. Lane (g, t) has two neighbours of
// row g, or TRANSPOSED of column g.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(u32 (&m)[4], u32 at) {
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(at) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(at) : "memory");
}
template <bool TRANSPOSED>
__device__ __forceinline__ void store_matrices(u32 at, const u32 (&m)[4]) {
#if __CUDA_ARCH__ >= 900
  if (TRANSPOSED)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(at), "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3]) : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(at), "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3]) : "memory");
#else
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 pair = m[i];
    if (TRANSPOSED) asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(pair));
    const u32 to = __shfl_sync(0xffffffffu, at, 8 * i + (lane >> 2)) + 4 * (lane & 3);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(pair) : "memory");
  }
#endif
}

// --- codes

// Of one tile: a lane has row l % 16 of its warp's, of which it has the 64 columns number l / 16 and the second from there.
struct Codes {
  u32 words[2][STAGES][4]; // eight codes; of E81B the first two words

  static __device__ __forceinline__ u32 of_row(const Params& p, const Tile& tile, int row) {
    return (tile.rows.first() + row >> 4) * p.tile_stride + (tile.rows.first() + row & 15) * p.row_stride;
  }
  static __device__ __forceinline__ u32 of_column(const Params& p, int code) {
    return (code >> 3) * p.column_stride + (code & 7);
  }
  // Into L2: codes that `load` will want.
  static __device__ __forceinline__ void announce(const Params& p, const Tile& tile) {
    const Place place;
    const int row = place.row();
    int part = place.part();
    if (!p.aligned || row >= tile.rows.count()) return;
#pragma unroll
    for (int i = 0; i < 2; ++i, part += 2) {
      if (64 * part >= tile.columns.count()) return;
      const u32 at = of_row(p, tile, row) + of_column(p, tile.columns.first() / 8 + 8 * part);
#pragma unroll
      for (int s = 0; s < STAGES; ++s) prefetch(static_cast<const u8*>(p.codes[s]) + (s < E8P_STAGES ? 2ull : 1ull) * at);
    }
  }
  __device__ __forceinline__ void load(const Params& p, const Tile& tile) {
    const Place place;
    const int row = place.row();
    int part = place.part();
#pragma unroll
    for (int i = 0; i < 2; ++i, part += 2) {
#pragma unroll
      for (int s = 0; s < STAGES; ++s)
#pragma unroll
        for (int k = 0; k < 4; ++k) words[i][s][k] = 0;
      if (row >= tile.rows.count() || 64 * part >= tile.columns.count()) continue;
      const u32 from = of_row(p, tile, row);
      const int code = tile.columns.first() / 8 + 8 * part;
      if (p.aligned) {
        const u32 at = from + of_column(p, code);
#pragma unroll
        for (int s = 0; s < E8P_STAGES; ++s) {
          const uint4 v = __ldg(reinterpret_cast<const uint4*>(static_cast<const u16*>(p.codes[s]) + at));
          words[i][s][0] = v.x, words[i][s][1] = v.y, words[i][s][2] = v.z, words[i][s][3] = v.w;
        }
#pragma unroll
        for (int s = E8P_STAGES; s < STAGES; ++s) {
          const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const u8*>(p.codes[s]) + at));
          words[i][s][0] = v.x, words[i][s][1] = v.y;
        }
      } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if (64 * part + 8 * k >= tile.columns.count()) break;
          const u32 at = from + of_column(p, code + k);
#pragma unroll
          for (int s = 0; s < E8P_STAGES; ++s)
            words[i][s][k / 2] |= u32(static_cast<const u16*>(p.codes[s])[at]) << 16 * (k & 1);
#pragma unroll
          for (int s = E8P_STAGES; s < STAGES; ++s)
            words[i][s][k / 4] |= u32(static_cast<const u8*>(p.codes[s])[at]) << 8 * (k & 3);
        }
      }
    }
  }
  // Step 1. Eight lanes of a chunk are eight rows.
  __device__ __forceinline__ void decode_rows() const {
    const uint4 kept = load_chunk(RATIOS);
    const u32 every[4] = {kept.x, kept.y, kept.z, kept.w};
    u32 ratios[STAGES];
#pragma unroll
    for (int s = 0; s < STAGES; ++s) ratios[s] = every[s];
    const Place place;
    const int row = place.row(), part = place.part();
    const u32 lane4 = COPIES == 32 ? 4 * place.lane : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 to = TILE + ROW * row + 128 * (part + 2 * i), turn = row & 7;
#pragma unroll
      for (int k = 0; k < 8; ++k) { // the number of a code, an immediate
        u32 nibbles[STAGES], weights[4];
#pragma unroll
        for (int s = 0; s < E8P_STAGES; ++s)
          nibbles[s] = k & 1 ? look_up<0, 3>(words[i][s][k / 2], lane4) ^ look_up<1, 2>(words[i][s][k / 2], lane4)
                             : look_up<0, 1>(words[i][s][k / 2], lane4) ^ look_up<1, 0>(words[i][s][k / 2], lane4);
#pragma unroll
        for (int s = E8P_STAGES; s < STAGES; ++s) {
          const u32 word = words[i][s][k / 4];
          nibbles[s] = (k & 3) == 0   ? look_up<2, 0>(word, lane4)
                       : (k & 3) == 1 ? look_up<2, 1>(word, lane4)
                       : (k & 3) == 2 ? look_up<2, 2>(word, lane4)
                                      : look_up<2, 3>(word, lane4);
        }
        decode(weights, nibbles, ratios);
        store_chunk(to + 16 * (k ^ turn), weights[0], weights[1], weights[2], weights[3]);
      }
    }
  }
};

// --- transforms

// A Hadamard matrix H of order 2^min(log, 4) along a diagonal as an A fragment, and what takes pairs of groups of 16
// coordinates x, y to Hx + Py, Px + Qy: P is H and Q is -H if the transform goes on to the fifth bit, else they are 0 and H.
struct Matrix {
  u32 h[4], p[4], q[4];

  __device__ __forceinline__ void load(int log, int lane) {
    const uint4 v = load_chunk(MATRICES + 512 * min(log, 4) + 16 * lane);
    h[0] = v.x, h[1] = v.y, h[2] = v.z, h[3] = v.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = log > 4 ? h[i] : 0, q[i] = log > 4 ? h[i] ^ 0x80008000u : h[i];
  }
};

// The transforms of 256 coordinates of eight rows or, TRANSPOSED, columns. Of group j of 16 coordinates v[j] holds
// coordinate g of two neighbours 2 t, then coordinate g + 8. `at(j)`: for load_matrices, of the four eights of groups j and
// j + 1. WHOLE: log is 8, and the compiler knows it. Else factors are cheaper than branches, where it moves half of the sums.
template <bool WHOLE, bool TRANSPOSED, class At>
__device__ __forceinline__ void transform_eight(float (&v)[GROUPS][4], const Matrix& m, int log, At at) {
#pragma unroll
  for (int j = 0; j < GROUPS; j += 2) {
    u32 b[4];
    load_matrices<TRANSPOSED>(b, at(j));
#pragma unroll
    for (int r = 0; r < 4; ++r) v[j][r] = v[j + 1][r] = 0.f;
    multiply_half(v[j], m.h, b[0], b[1]);
    multiply_half(v[j + 1], m.p, b[0], b[1]);
    multiply_half(v[j], m.p, b[2], b[3]);
    multiply_half(v[j + 1], m.q, b[2], b[3]);
  }
#pragma unroll
  for (int bit = 1; bit < 4; ++bit) {
    const bool active = WHOLE || log > 4 + bit;
    const float f = active ? 1.f : 0.f, g = active ? -1.f : 1.f;
#pragma unroll
    for (int j = 0; j < GROUPS; ++j)
      if (!(j >> bit & 1)) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float a = v[j][r], b = v[j | 1 << bit][r];
          v[j][r] = WHOLE ? a + b : a + f * b;
          v[j | 1 << bit][r] = WHOLE ? a - b : f * a + g * b;
        }
      }
  }
}

// Step 2, of the warp's 16 rows: first eight, then the others.
template <bool WHOLE>
__device__ __forceinline__ void rotate_columns(int log) {
  const Place place;
  const int warp = place.warp, lane = place.lane;
  Matrix m;
  m.load(WHOLE ? 8 : log, lane);
  u32 start = TILE + ROW * (16 * warp + (lane & 7)) + 16 * (lane >> 3 ^ lane & 7);
#pragma unroll 1
  for (int half = 0; half < 2; ++half, start += 8 * ROW) {
    const auto at = [&](int j) { return (start ^ 32 * (j & 2)) + 128 * (j / 4); }; // chunks 2 j to 2 j + 3
    float v[GROUPS][4];
    transform_eight<WHOLE, false>(v, m, log, at);
#pragma unroll
    for (int j = 0; j < GROUPS; j += 2)
      store_matrices<true>(at(j), {half_pair(v[j][0], v[j][1]), half_pair(v[j][2], v[j][3]),
                                   half_pair(v[j + 1][0], v[j + 1][1]), half_pair(v[j + 1][2], v[j + 1][3])});
  }
}

// Where the scale of a row is kept: a lane wants rows g and g + 8 of two groups at a time.
__device__ __forceinline__ u32 row_scale(int row) {
  return ROW_SCALES + 4 * ((row & ~31) + 4 * (row & 7) + (row >> 3 & 3));
}

// Step 3, of 16 columns: first one chunk, then the other.
template <int DTYPE, bool WHOLE>
__device__ __forceinline__ void rotate_rows(int log) {
  const Place place;
  const int warp = place.warp, lane = place.lane;
  Matrix m;
  m.load(WHOLE ? 8 : log, lane);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int chunk = 2 * warp + half;
    const u32 start = TILE + ROW * lane + 16 * (chunk ^ lane & 7);
    const auto at = [&](int j) { return start + 16 * ROW * j; };
    float v[GROUPS][4];
    transform_eight<WHOLE, true>(v, m, log, at);
    const float left = load_float(COLUMN_SCALES + 32 * chunk + 8 * (lane & 3));
    const float right = load_float(COLUMN_SCALES + 32 * chunk + 8 * (lane & 3) + 4);
#pragma unroll
    for (int j = 0; j < GROUPS; j += 2) {
      const uint4 four = load_chunk(ROW_SCALES + 64 * j + 16 * (lane >> 2));
      const u32 scales[4] = {four.x, four.y, four.z, four.w};
      u32 packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale = __uint_as_float(scales[i]), *const pair = &v[j + i / 2][2 * (i & 1)];
        const float a = pair[0] * (scale * left), b = pair[1] * (scale * right);
        packed[i] = DTYPE == FLOAT16 ? half_pair(a, b) : bfloat_pair(a, b);
      }
      store_matrices<false>(at(j), packed);
    }
  }
}

// --- the kernel

// The thread's scale of a tile: of a row with all that is constant, or of a column; zeros beyond what is there.
__device__ __forceinline__ float find_scale(const Params& p, const Tile& tile) {
  const int i = threadIdx.x & SEGMENT - 1;
  if (threadIdx.x >= SEGMENT) {
    const int column = tile.columns.first() + i;
    const bool there = i < tile.columns.count() && column < p.features_in;
    return there ? load_as_float(p.scale_in, column, p.scale_dtype) : 0.f;
  }
  const float constant = 256.f * p.ratios[0] * hadamard_norm(tile.rows.log()) * hadamard_norm(tile.columns.log());
  const int row = tile.rows.first() + i;
  const bool there = i < tile.rows.count() && row < p.features_out;
  return there ? constant * load_as_float(p.scale_out, row, p.scale_dtype) : 0.f;
}
__device__ __forceinline__ void keep_scale(float scale) {
  const int i = threadIdx.x & SEGMENT - 1;
  store_float_shared(threadIdx.x < SEGMENT ? row_scale(i) : COLUMN_SCALES + 4 * i, scale);
}

// Step 4: a row is 512 bytes of a warp's lanes.
__device__ __forceinline__ void store_rows(const Params& p, const Tile& tile) {
  const Place place;
  const int warp = place.warp, lane = place.lane;
  const int first = tile.rows.first(), column = tile.columns.first();
  const int rows = min(tile.rows.count(), p.features_out - first) - 16 * warp;
  if (8 * lane >= min(tile.columns.count(), p.features_in - column)) return;
  uint4* const to = p.weights + (long long)(first - p.begin + 16 * warp) * p.pitch + column / 8 + lane;
#pragma unroll 4
  for (int i = 0; i < 16; ++i)
    if (i < rows) to[(long long)i * p.pitch] = load_chunk(TILE + ROW * (16 * warp + i) + 16 * (lane ^ i & 7));
}

template <int DTYPE>
__device__ __forceinline__ void make_dense(const Params& p) {
  extern __shared__ __align__(1024) u8 dynamic[];
  launch_dependents();
  const u32 base = u32(__cvta_generic_to_shared(dynamic));
  if (base > TABLES) __trap();
  Tile tile = find_tile(p, blockIdx.x);
  TableRows<THREADS> tables;
  tables.load();
  Codes codes;
  codes.load(p, tile);
  keep_scale(find_scale(p, tile));
  tables.store<true>(dynamic - base + TABLES);
  if (Place().warp < 5) {
    u32 a[4];
    hadamard_fragment<0x3c00u>(a, (1 << Place().warp) - 1);
    store_chunk(MATRICES + 512 * Place().warp + 16 * Place().lane, a[0], a[1], a[2], a[3]);
  }
  if (threadIdx.x == 0) { // the first stage's own is with the scales
    u32 ratios[4] = {};
#pragma unroll
    for (int s = 0; s + 1 < STAGES; ++s) ratios[s] = pair_of(p.ratios[s + 1] / p.ratios[s]);
    store_chunk(RATIOS, ratios[0], ratios[1], ratios[2], ratios[3]);
  }
  __syncthreads();
  wait_for_previous(); // it may still read what the weights go over
#pragma unroll 1
  for (int number = blockIdx.x; number < p.tiles;) {
    number += gridDim.x;
    // After the last: once more, or its codes had to be kept all the time.
    const Tile next = find_tile(p, min(number, p.tiles - 1));
    codes.decode_rows();
    __syncwarp();
    Codes::announce(p, next);
    if (Place().lane == 0) store_chunk(NEXT + 16 * Place().warp, next.rows.packed, next.columns.packed, 0, 0);
    if (16 * Place().warp < tile.rows.count()) {
      if (tile.columns.log() == 8) rotate_columns<true>(8);
      else rotate_columns<false>(tile.columns.log());
    }
    __syncthreads();
    if (16 * Place().warp < tile.columns.count()) {
      if (tile.rows.log() == 8) rotate_rows<DTYPE, true>(8);
      else rotate_rows<DTYPE, false>(tile.rows.log());
    }
    const uint4 kept = load_chunk(NEXT + 16 * Place().warp);
    const Tile done = tile;
    tile = {Side(kept.x), Side(kept.y)};
    codes.load(p, tile);
    const float scale = find_scale(p, tile);
    __syncthreads();
    keep_scale(scale);
    store_rows(p, done);
    __syncwarp();
  }
}

// Grid: CTAs that share the tiles, one a multiprocessor. One kernel for each dtype of the weights.
extern "C" __global__ void __launch_bounds__(THREADS, 1) dense_float16(const __grid_constant__ Params p) {
  make_dense<FLOAT16>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) dense_bfloat16(const __grid_constant__ Params p) {
  make_dense<BFLOAT16>(p);
}

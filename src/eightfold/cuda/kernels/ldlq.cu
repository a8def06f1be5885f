// The sequential part of LDLQ (ldlq.py): a panel of columns, group after group of 8, last group first.
//
// A warp takes ROWS rows, LANES lanes a row, and no warp waits for another. What the lanes of a row share out: while
// encoding, the two sums of codes that the encoder follows (rvq.py) and the two shifts of E8P; in the feedback, columns.
// Rows' targets and the panel's part of L stay in shared memory. Sums are taken in the order of the CPU's code and
// products are rounded before they are subtracted, so that only the feedback may differ from it in the last bits.

#include "decode_tables.cuh"
#include "encode.cuh"

typedef unsigned long long u64;

constexpr int GROUP = 8, PANEL = 128, LANES = 4, ROWS = 32 / LANES;
constexpr int PITCH = PANEL + 16;  // floats of a row in shared memory: neighbouring rows lie on other banks
constexpr int FACTOR = 32 * (PANEL / GROUP) * (PANEL / GROUP - 1);  // floats of L below the diagonal blocks
constexpr unsigned ALL = 0xffffffffu;

struct Params {
    const float* W;    // [N, K]
    float* T;          // [N, K]: the targets; in the panel's columns W_hat takes their place
    const float* L;    // [K, K]
    float* E;          // [N, PANEL]: W - W_hat in the panel's columns
    void* codes[4];    // of each stage int16 [N, K / 8], of E81B uint8
    float ratios[4];   // of each stage
    int N, K, start, width;  // the panel: columns from `start` on, a multiple of 8 and at most PANEL of them
    int stages, e81b_last;
};

// Rows of group g below the diagonal: 8 rows of 8 g floats each.
__device__ __forceinline__ int factor_at(int g) { return 32 * g * (g - 1); }

// The panel's part of L into shared memory, by all warps.
__device__ __forceinline__ void load_factor(const Params& p, float* factor) {
    const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    for (int j = GROUP + (threadIdx.x >> 5); j < p.width; j += warps) {
        const int g = j / GROUP;
        const float4* const from = reinterpret_cast<const float4*>(p.L + (long long)(p.start + j) * p.K + p.start);
        float4* const to = reinterpret_cast<float4*>(factor + factor_at(g) + (j % GROUP) * GROUP * g);
        if (lane < 2 * g) to[lane] = from[lane];
    }
}

// Coordinate i of a point, from its eight nibbles: in quarters 2 u - 15 for E8P, 2 u - 16 for E81B.
__device__ __forceinline__ float coordinate(unsigned word, int i, int offset) {
    return 0.25f * float(2 * int(word >> 4 * i & 15) - offset);
}

// Stage k of a sum whose codes are packed, the last one lowest.
__device__ __forceinline__ unsigned code_of(const Params& p, u64 codes, int k) {
    return unsigned(codes >> 16 * (p.stages - 1 - k)) & 0xffff;
}

// The word of nibbles of a code.
__device__ __forceinline__ unsigned nibbles(unsigned code, bool e81b) {
    return e81b ? E81B[code & 255] : PATTERNS[code >> 8] ^ SIGNS[code & 255];
}

// Residual.encode: the packed codes of `target`, the same in the LANES lanes of its row. Lane 2 p + s follows sum p and
// looks for the nearest point with shift s.
__device__ __forceinline__ u64 encode(const Params& p, const float (&target)[8]) {
    const int lane = threadIdx.x & 31, own = lane & 1, path = lane >> 1 & 1, base = lane & ~(LANES - 1);
    float left[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) left[i] = target[i];
    u64 codes = 0;
    for (int k = 0; k < p.stages; ++k) {
        const bool last = k == p.stages - 1, e81b = last && p.e81b_last;
        const float ratio = p.ratios[k];
        float x[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = __fdiv_rn(left[i], ratio);
        unsigned code;
        if (e81b) {
            code = nearest_e81b(x);
        } else {
            const float by_nibble[8] = {x[0], x[2], x[4], x[6], x[1], x[3], x[5], x[7]};
            const Found found = nearest_e8p(by_nibble, own);
            code = unsigned(found.code) & 0xffff;
            if (last) {  // the nearer of the two
                const float up = __shfl_sync(ALL, found.score, base + 2 * path);
                const float down = __shfl_sync(ALL, found.score, base + 2 * path + 1);
                code = __shfl_sync(ALL, code, base + 2 * path + (down > up));
            }
        }
        const unsigned word = nibbles(code, e81b);
        float norm = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            left[i] = __fsub_rn(left[i], __fmul_rn(ratio, coordinate(word, i, e81b ? 16 : 15)));
            norm += left[i] * left[i];
        }
        codes = codes << 16 | code;
        // Who leaves least goes on: after the first stage both of its candidates, after others two of four.
        int first = base, second = base + 1;
        if (last || k) {
            float norms[LANES];
#pragma unroll
            for (int j = 0; j < LANES; ++j) norms[j] = __shfl_sync(ALL, norm, base + j);
            int best = 0;
#pragma unroll
            for (int j = 1; j < LANES; ++j) best = norms[j] < norms[best] ? j : best;
            int next = best == 0;
#pragma unroll
            for (int j = 1; j < LANES; ++j) next = j != best && norms[j] < norms[next] ? j : next;
            first = base + best, second = base + next;
        }
        const int from = last || path == 0 ? first : second;
        codes = __shfl_sync(ALL, codes, from);
        if (!last) {
#pragma unroll
            for (int i = 0; i < 8; ++i) left[i] = __shfl_sync(ALL, left[i], from);
        }
    }
    return codes;
}

// targets[0 .. 8 g) += e @ L of group g, the lanes of a row taking every LANES-th four columns.
__device__ __forceinline__ void feed_back(const float* factor, float* targets, const float (&e)[8], int g) {
    const float4* const rows = reinterpret_cast<const float4*>(factor + factor_at(g));
    float4* const T = reinterpret_cast<float4*>(targets);
    for (int v = threadIdx.x & (LANES - 1); v < 2 * g; v += LANES) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float4 l = rows[2 * g * i + v];
            sum.x += e[i] * l.x, sum.y += e[i] * l.y, sum.z += e[i] * l.z, sum.w += e[i] * l.w;
        }
        float4 t = T[v];
        t.x += sum.x, t.y += sum.y, t.z += sum.z, t.w += sum.w;
        T[v] = t;
    }
}

// Rows of the panel between memory and shared memory, by the warp that owns them: from `first` on, up to N.
template <bool in>
__device__ __forceinline__ void copy_panel(const Params& p, float* targets, int first) {
    const int lane = threadIdx.x & 31;
    for (int r = 0; r < ROWS && first + r < p.N; ++r) {
        float4* const T = reinterpret_cast<float4*>(p.T + (long long)(first + r) * p.K + p.start);
        float4* const shared = reinterpret_cast<float4*>(targets + r * PITCH);
        if (4 * lane < p.width) in ? shared[lane] = T[lane] : T[lane] = shared[lane];
    }
}

extern "C" __global__ void __launch_bounds__(448) ldlq_panel(const __grid_constant__ Params p) {
    extern __shared__ float shared[];
    const int warp = threadIdx.x >> 5, part = threadIdx.x & (LANES - 1), row = (threadIdx.x & 31) / LANES;
    const int first = (blockIdx.x * (blockDim.x >> 5) + warp) * ROWS;
    float* const warp_targets = shared + FACTOR + warp * ROWS * PITCH;
    load_factor(p, shared);
    copy_panel<true>(p, warp_targets, first);
    __syncthreads();
    if (first >= p.N) return;
    // Rows beyond the last one compute with it and write nothing.
    const bool there = first + row < p.N;
    const long long n = there ? first + row : p.N - 1;
    float* const targets = warp_targets + (there ? row : p.N - 1 - first) * PITCH;
    for (int g = p.width / GROUP - 1; g >= 0; --g) {
        const int a = GROUP * g;
        const float4* const weights = reinterpret_cast<const float4*>(p.W + n * p.K + p.start + a);
        const float4 w0 = weights[0], w1 = weights[1];
        const float4 t0 = *reinterpret_cast<const float4*>(targets + a);
        const float4 t1 = *reinterpret_cast<const float4*>(targets + a + 4);
        const float target[8] = {t0.x, t0.y, t0.z, t0.w, t1.x, t1.y, t1.z, t1.w};
        const u64 codes = encode(p, target);

        float w[8] = {};
        for (int k = 0; k < p.stages; ++k) {  // Residual.decode
            const unsigned code = code_of(p, codes, k);
            const bool e81b = p.e81b_last && k == p.stages - 1;
            const unsigned word = nibbles(code, e81b);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                w[i] = __fadd_rn(w[i], __fmul_rn(p.ratios[k], coordinate(word, i, e81b ? 16 : 15)));
            const long long at = n * (p.K / GROUP) + p.start / GROUP + g;
            if (there && part == 0) {
                if (e81b) static_cast<unsigned char*>(p.codes[k])[at] = (unsigned char)code;
                else static_cast<short*>(p.codes[k])[at] = (short)code;
            }
        }
        const float e[8] = {w0.x - w[0], w0.y - w[1], w0.z - w[2], w0.w - w[3],
                            w1.x - w[4], w1.y - w[5], w1.z - w[6], w1.w - w[7]};
        if (there) {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i / 2 == part) targets[a + i] = w[i], p.E[n * PANEL + a + i] = e[i];
            feed_back(shared, targets, e, g);
        }
        __syncwarp();
    }
    copy_panel<false>(p, warp_targets, first);
}

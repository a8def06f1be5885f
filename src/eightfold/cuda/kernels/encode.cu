// Numbers of the nearest points of many vectors, a thread a vector.

#include "encode.cuh"

struct Params {
    const float4* x;  // [n, 8]
    void* codes;      // encode_e8p: int16 [n]; candidates_e8p: int16 [2, n]; encode_e81b: uint8 [n]
    long long n;
};

// Vector i, coordinate 0, 2, 4, 6, 1, 3, 5, 7: the order of the nibbles (NIBBLE in e8p.py).
__device__ __forceinline__ void load_by_nibble(const Params& p, long long i, float (&x)[8]) {
    const float4 a = p.x[2 * i], b = p.x[2 * i + 1];
    x[0] = a.x, x[1] = a.z, x[2] = b.x, x[3] = b.z, x[4] = a.y, x[5] = a.w, x[6] = b.y, x[7] = b.w;
}

#define FOR_EACH_VECTOR(i)                                                                                      \
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, stride = (long long)gridDim.x * blockDim.x; \
         i < p.n; i += stride)

// The nearest point of E8P.
extern "C" __global__ void __launch_bounds__(128) encode_e8p(const __grid_constant__ Params p) {
    FOR_EACH_VECTOR(i) {
        float x[8];
        load_by_nibble(p, i, x);
        const Found up = nearest_e8p(x, false), down = nearest_e8p(x, true);
        static_cast<short*>(p.codes)[i] = (short)(down.score > up.score ? down.code : up.code);
    }
}

// The nearest point of E8P with shift +1/4, and that with -1/4.
extern "C" __global__ void __launch_bounds__(128) candidates_e8p(const __grid_constant__ Params p) {
    FOR_EACH_VECTOR(i) {
        float x[8];
        load_by_nibble(p, i, x);
        static_cast<short*>(p.codes)[i] = (short)nearest_e8p(x, false).code;
        static_cast<short*>(p.codes)[p.n + i] = (short)nearest_e8p(x, true).code;
    }
}

// The nearest point of E81B.
extern "C" __global__ void __launch_bounds__(128) encode_e81b(const __grid_constant__ Params p) {
    FOR_EACH_VECTOR(i) {
        const float4 a = p.x[2 * i], b = p.x[2 * i + 1];
        const float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        static_cast<unsigned char*>(p.codes)[i] = (unsigned char)nearest_e81b(x);
    }
}

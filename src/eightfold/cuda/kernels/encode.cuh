#pragma once
// The nearest points of E8P and E81B: the maths of `E8P._nearest_of_cosets` (e8p.py), a thread a vector.
//
// Every product here is by a power of two: contracting it into a sum changes no bit, so the results do not depend on
// the compiler. Of equal scores the first wins. Not-a-numbers only fail comparisons; whatever they lead to is a code.

#include "encode_tables.cuh"

struct Found {
    int code;
    float score;  // (|x|^2 - |x - point|^2) / 2 + 5/4
};

__device__ __forceinline__ void put_larger_first(float& a, float& b, int& i, int& j) {
    const bool swap = a < b;
    const float larger = swap ? b : a, smaller = swap ? a : b;
    const int of_larger = swap ? j : i, of_smaller = swap ? i : j;
    a = larger, b = smaller, i = of_larger, j = of_smaller;
}

// Sorts eight values in descending order, and what they carry along: the network of 19 comparators.
__device__ __forceinline__ void sort(float (&v)[8], int (&at)[8]) {
#define PAIR(a, b) put_larger_first(v[a], v[b], at[a], at[b]);
    PAIR(0, 2) PAIR(1, 3) PAIR(4, 6) PAIR(5, 7)
    PAIR(0, 4) PAIR(1, 5) PAIR(2, 6) PAIR(3, 7)
    PAIR(0, 1) PAIR(2, 3) PAIR(4, 5) PAIR(6, 7)
    PAIR(2, 4) PAIR(3, 5)
    PAIR(1, 4) PAIR(3, 6)
    PAIR(1, 2) PAIR(3, 4) PAIR(5, 6)
#undef PAIR
}

// The nearest point of E8P with one shift: +1/4, or -1/4 if `down`. x is in the order of the nibbles.
__device__ __forceinline__ Found nearest_e8p(const float (&x)[8], bool down) {
    const float shift = down ? -0.25f : 0.25f;
    float magnitude[8], v[8], sum_x = 0.0f;
    int at[8], negative = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const float t = x[k] - shift;
        sum_x += x[k];
        negative |= (t < 0.0f) << k;
        v[k] = magnitude[k] = fabsf(t);
        at[k] = k;
    }
    sort(v, at);
    const bool odd_signs = __popc(negative) & 1;
    const float sum1 = v[0], sum2 = sum1 + v[1], sum3 = sum2 + v[2], sum4 = sum3 + v[3], sum5 = sum4 + v[4];
    const float sum8 = sum5 + v[5] + v[6] + v[7];

    // Scores count from that of the pattern of eight 1/2. A step from 1/2 to 3/2 costs 1, on to 5/2 costs 2; the wrong
    // parity costs the least magnitude.
    const float even = odd_signs ? v[7] : 0.0f, uneven = odd_signs ? 0.0f : v[7];  // by the number of steps
    float best = -even;
    int steps = 0;  // as E8P_PATTERN counts
    bool wrong = odd_signs;
    const auto consider = [&](float score, int its_steps, bool its_wrong) {
        const bool better = score > best;
        best = better ? score : best;
        steps = better ? its_steps : steps;
        wrong = better ? its_wrong : wrong;
    };
    const int one = 1 << at[0], two = one | 1 << at[1], three = two | 1 << at[2], four = three | 1 << at[3];
    consider(sum1 - 1.0f - uneven, one, !odd_signs);
    consider(sum2 - 2.0f - even, two, odd_signs);
    consider(sum3 - 3.0f - uneven, three, !odd_signs);
    consider(sum4 - 4.0f - even, four, odd_signs);
    consider(2.0f * sum1 - 3.0f - even, 256 + 9 * at[0], odd_signs);
    consider(sum1 + sum2 - 4.0f - uneven, 256 + 8 * at[0] + at[1], !odd_signs);
    int pattern = E8P_PATTERN[steps], cheapest = at[7];

    if (sum5 - 5.0f > best) {  // only then a pattern of squared norm 12 can be better
        // Their sums are odd. The wrong parity costs the least magnitude on a 1/2: where 3 times one on a 3/2, m, is
        // less, the pattern without that step has the right parity and scores 2 m + 1 more.
        int halves = 0;  // bits, where the best of these patterns has its 1/2; 0: none is better
#define CONSIDER(number, i, j, k)                                                                                 \
    {                                                                                                             \
        const float least = fminf(fminf(magnitude[i], magnitude[j]), magnitude[k]);                               \
        const float penalty = odd_signs ? 0.0f : least;                                                           \
        const float score = sum8 - (magnitude[i] + magnitude[j] + magnitude[k]) - 5.0f - penalty;                 \
        const bool better = score > best;                                                                         \
        best = better ? score : best;                                                                             \
        pattern = better ? number : pattern;                                                                      \
        halves = better ? 1 << i | 1 << j | 1 << k : halves;                                                      \
    }
        E8P_NORM_12(CONSIDER)
#undef CONSIDER
        if (halves) {
            wrong = !odd_signs;
            float least = v[0];
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const bool less = (halves >> k & 1) && magnitude[k] <= least;
                least = less ? magnitude[k] : least;
                cheapest = less ? k : cheapest;
            }
        }
    }

    // Sign bits count from the stored pattern, whose coordinate 7, in nibble 7, is negative if its sum is odd. They are
    // of odd number where the shift is -1/4: the bit of coordinate 0, in nibble 0, sees to it.
    const bool odd_pattern = wrong != odd_signs;
    const int signs = negative ^ wrong << cheapest ^ odd_pattern << 7 ^ int(down);
    // <t, p> is half of sum8 more than the score says, and <x, shift> is missing.
    return {pattern << 8 | signs, best + 0.5f * sum8 + shift * sum_x};
}

// The nearest point of E81B. Of each of its shapes the best point is known: the two largest magnitudes make the best
// e_i + e_j, the signs of x the best half vector, save that the least magnitude takes the other sign if their number
// is odd, and the largest makes the best 2 e_i. -2 e_7 is not there: where it would be best, some e_i - e_7 beats all
// other axes.
__device__ __forceinline__ int nearest_e81b(const float (&x)[8]) {
    float first = -1.0f, second = -1.0f, least = fabsf(x[7]), sum = 0.0f;
    int at_first = 0, at_second = 0, at_least = 7, negative = 0;  // bit k: coordinate k
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const float m = fabsf(x[k]);
        sum += m;
        negative |= (x[k] < 0.0f) << k;
        const bool above_first = m > first, above_second = m > second, below = m < least;
        at_second = above_first ? at_first : above_second ? k : at_second;
        second = above_first ? first : above_second ? m : second;
        at_first = above_first ? k : at_first;
        first = above_first ? m : first;
        at_least = below ? k : at_least;
        least = below ? m : least;
    }
    const int s = negative >> at_first & 1, r = negative >> at_second & 1;
    const bool odd_signs = __popc(negative) & 1;
    float best = 0.0f;  // <x, point> - |point|^2 / 2
    int code = E81B_ZERO;
    const auto consider = [&](float score, int its_code) {
        code = score > best ? its_code : code;
        best = score > best ? score : best;
    };
    consider(first + second - 1.0f, E81B_STEPS[32 * at_first + 4 * at_second + 2 * s + r]);
    // The points in lexicographic order count coordinate 0 highest; coordinate 7 follows from the others.
    const unsigned positive = ~(negative ^ odd_signs << at_least);
    consider(0.5f * sum - 1.0f - (odd_signs ? least : 0.0f), E81B_HALVES + (__brev(positive) >> 25));
    if (at_first < 7 || s == 0) consider(2.0f * first - 2.0f, E81B_STEPS[36 * at_first + 3 * s]);
    return code;
}

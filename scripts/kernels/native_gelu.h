// GELU and its slope at x. With a = |x| and Q(a) the normal distribution's tail beyond a, GELU is max(x, 0) - a Q(a), and
// its slope S(a) = Q(a) - a density(a) below 0, 1 - S(a) above.

#pragma once

#include "native_product.h"

#include <cmath>

namespace {

#ifdef __AVX512F__

constexpr double END = 6; // beyond which GELU is max(x, 0)

// Polynomials for equal parts of 0 .. END, which shuffles look up. Errors: 3e-8 with float32, 2e-5 with bfloat16.
template <int DEGREE, int PARTS> struct Pieces {
    float factors[DEGREE + 1][PARTS]; // by power of what lies beyond the middle of a part, in parts
    template <typename Function> explicit Pieces(Function f) {
        for (int part = 0; part < PARTS; part++) {
            // through the nodes of Chebyshev, by Newton's divided differences
            double node[DEGREE + 1], difference[DEGREE + 1], power[DEGREE + 1] = {};
            for (int i = 0; i <= DEGREE; i++) {
                node[i] = 0.5 * std::cos((2 * i + 1) * std::acos(-1.) / (2 * (DEGREE + 1)));
                difference[i] = f((part + 0.5 + node[i]) * END / PARTS);
            }
            for (int order = 1; order <= DEGREE; order++)
                for (int i = DEGREE; i >= order; i--)
                    difference[i] = (difference[i] - difference[i - 1]) / (node[i] - node[i - order]);
            for (int i = DEGREE; i >= 0; i--) { // power = power * (x - node) + difference
                for (int j = DEGREE; j > 0; j--) power[j] = power[j - 1] - node[i] * power[j];
                power[0] = difference[i] - node[i] * power[0];
            }
            for (int i = 0; i <= DEGREE; i++) factors[i][part] = (float)power[i];
        }
    }
    Floats at(Floats beyond, Words part) const {
        Floats sum = factor(DEGREE, part);
#pragma GCC unroll 4
        for (int i = DEGREE - 1; i >= 0; i--) sum = sum * beyond + factor(i, part);
        return sum;
    }
    Floats factor(int power, Words part) const {
        const __m512 low = _mm512_loadu_ps(factors[power]);
        if (PARTS == 16) return (Floats)_mm512_permutexvar_ps((__m512i)part, low);
        return (Floats)_mm512_permutex2var_ps(low, (__m512i)part, _mm512_loadu_ps(factors[power] + PARTS - 16));
    }
};

inline double tail(double a) { return 0.5 * std::erfc(a * std::sqrt(0.5)); }
inline double slope_below(double a) { return tail(a) - a * std::exp(-a * a / 2) / std::sqrt(2 * std::acos(-1.)); }

template <typename T> struct Gelu {
    static constexpr int DEGREE = Units<T>::NUMBERS == 1 ? 4 : 3, PARTS = Units<T>::NUMBERS == 1 ? 32 : 16;
    const Pieces<DEGREE, PARTS> tails{tail}, slopes{slope_below};
    // the part that |x| is in, and where in it
    static void locate(Floats a, Floats &beyond, Words &part) {
        const float magic = 12582912.f; // 1.5 * 2^23: adding it rounds to whole numbers
        const Floats inside = (Floats)_mm512_min_ps((__m512)(a * float(PARTS / END)), _mm512_set1_ps(PARTS - 0.001f)) - 0.5f;
        const Floats shifted = inside + magic;
        part = (Words)shifted & (PARTS - 1), beyond = inside - (shifted - magic);
    }
    static const Gelu &once() { static const Gelu made; return made; }
    Floats value(Floats x) const {
        Floats a = (Floats)((Words)x & 0x7fffffff), beyond;
        Words part;
        locate(a, beyond, part);
        return (Floats)_mm512_max_ps((__m512)x, _mm512_setzero_ps()) - a * tails.at(beyond, part);
    }
    Floats slope(Floats x) const {
        Floats beyond;
        Words part;
        locate((Floats)((Words)x & 0x7fffffff), beyond, part);
        const Floats below = slopes.at(beyond, part);
        return (Floats)_mm512_mask_sub_ps((__m512)below, _mm512_movepi32_mask(~(__m512i)x), _mm512_set1_ps(1), (__m512)below);
    }
};

#else

// By Abramowitz and Stegun 7.1.26, to 8e-8.
template <typename T> struct Gelu {
    static Floats choose(Words mask, Floats yes, Floats no) { return (Floats)((mask & (Words)yes) | (~mask & (Words)no)); }
    static Floats exponential(Floats x) { // of numbers from -87 to 0, to 2e-7 of it
        const float magic = 12582912.f; // 1.5 * 2^23: adding it rounds to whole numbers
        const Floats shifted = x * 1.44269504088896341f + magic, whole = shifted - magic;
        const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
        Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * r * r + r + 1.f;
        return (Floats)((Words)p + ((Words)shifted << 23));
    }
    // density * sqrt(2 pi), and what of the normal distribution lies below x
    static void normal(Floats x, Floats &density, Floats &below) {
        const Floats a = (Floats)((Words)x & 0x7fffffff), half = x * x * -0.5f;
        density = exponential(choose((Words)(half < -87.f), Floats{} - 87.f, half));
        const Floats t = 1.f / (1.f + a * (0.3275911f * 0.70710678f));
        Floats p = t * 1.061405429f - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = (p * t + 0.254829592f) * t;
        const Floats tail = 0.5f * p * density;
        below = choose((Words)(x < 0.f), tail, 1.f - tail);
    }
    static const Gelu &once() { static const Gelu made; return made; }
    Floats value(Floats x) const {
        Floats density, below;
        normal(x, density, below);
        return x * below;
    }
    Floats slope(Floats x) const {
        Floats density, below;
        normal(x, density, below);
        return below + x * density * 0.3989422804f;
    }
};

#endif

} // namespace

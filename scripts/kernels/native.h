// How numbers lie in memory and in registers: sixteen channels of a voxel are one vector, whatever the processor's own
// vectors are; float32 and bfloat16 are computed with in float32.

#pragma once

#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16; // channels of a vector

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

template <typename V, typename Number> V read(const Number *p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <typename V, typename Number> void write(Number *p, V v) { std::memcpy(p, &v, sizeof v); }

// How a channel is stored, and the number and the vector that computing uses.
struct F32 {
    typedef float Stored, Number;
    typedef Floats Vector;
    static Vector load(const Stored *p) { return read<Vector>(p); }
    static void store(Stored *p, Vector v) { write(p, v); }
};

struct F64 {
    typedef double Stored, Number;
    typedef Doubles Vector;
    static Vector load(const Stored *p) { return read<Vector>(p); }
    static void store(Stored *p, Vector v) { write(p, v); }
};

struct BF16 {
    typedef uint16_t Stored;
    typedef float Number;
    typedef Floats Vector;
    static Vector load(const Stored *p) { return (Vector)(__builtin_convertvector(read<Halves>(p), Words) << 16); }
    static Halves round(Vector v) { // to nearest, ties to even; NaN stays NaN
#ifdef __AVX512BF16__
        return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
        const Words bits = (Words)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (Words)(v != v);
        return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Halves);
#endif
    }
    static void store(Stored *p, Vector v) { write(p, round(v)); }
};

} // namespace


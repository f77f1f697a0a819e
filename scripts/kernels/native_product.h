// Matrix products of rows of voxels, a block of registers at a time.
//
// A product sums over "units" of 32 bits: a float, or two neighbouring bfloat16, whose products AVX512-BF16 adds in one
// instruction. What it takes from the left is a unit, broadcast; from the right, sixteen columns of units.

#pragma once

#include "native.h"

#include <algorithm>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 4; // vectors of a panel of columns: with the rows below they fill the registers
#else
constexpr int WIDTH = 1;
#endif
constexpr int64_t STEP = 24; // every number of `voxel_rows` divides it

constexpr int voxel_rows(int columns) { return WIDTH == 1 ? 6 : columns == 4 ? 6 : columns == 3 ? 8 : 12; }
constexpr int channel_rows(int columns) { return WIDTH == 1 || columns > 2 ? 4 : 8; } // divides 16

template <typename T> struct Units;

template <> struct Units<F32> {
    static constexpr int64_t NUMBERS = 1; // of a unit
    static Floats add_product(Floats sum, uint32_t a, Words b) {
        float number;
        std::memcpy(&number, &a, sizeof a);
        return sum + number * (Floats)b;
    }
    static Words pair(Floats v, Floats) { return (Words)v; }
};

template <> struct Units<BF16> {
    static constexpr int64_t NUMBERS = 2;
    static Floats add_product(Floats sum, uint32_t a, Words b) {
#ifdef __AVX512BF16__
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)b);
#else
        const Words both = Words{} + a;
        sum += (Floats)(both << 16) * (Floats)(b << 16);
        return sum + (Floats)(both & 0xffff0000) * (Floats)(b & 0xffff0000);
#endif
    }
    static Words pair(Floats low, Floats high) {
        return __builtin_convertvector(BF16::round(low), Words) | __builtin_convertvector(BF16::round(high), Words) << 16;
    }
};

// Memory that begins where a line of the cache does.
struct Buffer {
    std::vector<uint32_t> memory;
    uint32_t *units;
    explicit Buffer(int64_t count) : memory(count + LANES) {
        units = memory.data() + (64 - (uintptr_t)memory.data() % 64) % 64 / 4;
    }
    template <typename Number> Number *as() { return (Number *)units; }
};

template <int N> struct Columns { static constexpr int count = N; };

// Call visit(first column, Columns<vectors>) for every panel.
template <typename Visit> inline void each_panel(int64_t columns, Visit visit) {
    for (int64_t from = 0; from < columns;) {
        const int64_t vectors = std::min<int64_t>(WIDTH, (columns - from) / LANES);
        if (vectors >= 4) visit(from, Columns<WIDTH>());
        else if (vectors == 3) visit(from, Columns<std::min(3, WIDTH)>());
        else if (vectors == 2) visit(from, Columns<std::min(2, WIDTH)>());
        else visit(from, Columns<1>());
        from += vectors * LANES;
    }
}

// Columns of units, panel by panel: `depth` rows of a panel lie one after another.
struct Panels {
    Buffer buffer;
    int64_t depth;
    Panels(int64_t columns, int64_t depth) : buffer(columns * depth), depth(depth) {}
    uint32_t *at(int64_t column) { return buffer.units + column * depth; }
};

// Lay out a matrix (columns, depth) for sums over its second axis.
template <typename T> Panels packed(const void *matrix, int64_t columns, int64_t depth) {
    depth /= Units<T>::NUMBERS;
    Panels made(columns, depth);
    const uint32_t *from = (const uint32_t *)matrix;
    each_panel(columns, [&](int64_t column, auto panel) {
        constexpr int64_t width = decltype(panel)::count * LANES;
        uint32_t *to = made.at(column);
        for (int64_t i = 0; i < depth; i++)
            for (int64_t c = 0; c < width; c++) to[i * width + c] = from[(column + c) * depth + i];
    });
    return made;
}

template <int M, int N> struct Block { Floats sums[M][N]; };

// Sum `depth` units: M rows of `a`, `row` apart, whose units are `next` apart, by N vectors of columns of a panel.
template <typename T, int M, int N>
inline __attribute__((always_inline)) Block<M, N> multiply(const uint32_t *a, int64_t row, int64_t next,
                                                           const uint32_t *b, int64_t depth) {
    Block<M, N> block;
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) block.sums[m][n] = Floats{};
    for (int64_t i = 0; i < depth; i++, a += next, b += N * LANES) {
        Words columns[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) columns[n] = read<Words>(b + n * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) block.sums[m][n] = Units<T>::add_product(block.sums[m][n], a[m * row], columns[n]);
    }
    return block;
}

// Call finish(first voxel, first column, block) for every block of rows (voxels, depth) times panels.
template <typename T, typename Finish>
inline void each_block(const typename T::Stored *rows, int64_t voxels, Panels &panels, int64_t columns, Finish finish) {
    const int64_t depth = panels.depth;
    each_panel(columns, [&](int64_t column, auto panel) {
        constexpr int N = decltype(panel)::count, M = voxel_rows(N);
        for (int64_t v = 0; v < voxels; v += M)
            finish(v, column, multiply<T, M, N>((const uint32_t *)rows + v * depth, depth, 1, panels.at(column), depth));
    });
}

// Add to sums (channels, columns) the products, summed over `units` of voxels, of left (units, channels) and right.
template <typename T>
inline void correlate(const uint32_t *left, int64_t channels, Panels &right, int64_t units, int64_t columns, double *sums) {
    each_panel(columns, [&](int64_t column, auto panel) {
        constexpr int N = decltype(panel)::count, M = channel_rows(N);
        for (int64_t c = 0; c < channels; c += M) {
            const Block<M, N> block = multiply<T, M, N>(left + c, 1, channels, right.at(column), units);
            for (int m = 0; m < M; m++)
                for (int n = 0; n < N; n++) {
                    double *sum = sums + (c + m) * columns + column + n * LANES;
                    write(sum, read<Doubles>(sum) + __builtin_convertvector(block.sums[m][n], Doubles));
                }
        }
    });
}

} // namespace

// Norm, expansion, GELU, compression and residual of rows of voxels, forward and backward, a tile of voxels at a time,
// whose hidden layer never leaves the cache. y is (voxels, C), hidden (voxels, R), out (voxels, K); C, R and K are
// multiples of 16. See `mlp.py` for what is folded into the weights.
//
// A matrix product sums over "units" of 32 bits: a float, or two neighbouring bfloat16, whose products AVX512-BF16 adds
// in one instruction. What it takes from the left is a unit, broadcast; from the right, sixteen columns of units. Sums
// of a tile are float32, sums over tiles float64.

#include "native.h"

#include <algorithm>
#include <cmath>
#include <omp.h>
#include <vector>

extern "C" struct Mlp {
    int64_t voxels, channels, hidden, made;
    const void *y, *first, *second, *first_back, *second_back, *residual, *g; // in the precision of y
    const float *scale, *shift, *start, *end, *along;
    void *out, *dz; // in the precision of y
    double *sums;   // of each thread: (C, R) of first, transposed, (K, R) of second, (R,) of start, (K,) of end
};

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

// GELU and its slope at x. With a = |x| and Q(a) the normal distribution's tail beyond a, GELU is max(x, 0) - a Q(a), and
// its slope S(a) = Q(a) - a density(a) below 0, 1 - S(a) above.
#ifdef __AVX512F__

// Polynomials for equal parts of 0 .. 6, which shuffles look up. Errors: 3e-8 with float32, 2e-5 with bfloat16.
template <int DEGREE, int PARTS> struct Pieces {
    static constexpr double END = 6;
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
        const Floats inside = (Floats)_mm512_min_ps((__m512)(a * float(PARTS / 6.)), _mm512_set1_ps(PARTS - 0.001f)) - 0.5f;
        const Floats shifted = inside + magic;
        part = (Words)shifted & (PARTS - 1), beyond = inside - (shifted - magic);
    }
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

// The part of the voxels that a thread computes, whole steps of them but for the last.
struct Share {
    int64_t from, upto;
    explicit Share(int64_t voxels) {
        const int64_t threads = omp_get_num_threads(), each = (voxels + threads * STEP - 1) / (threads * STEP) * STEP;
        from = std::min(omp_get_thread_num() * each, voxels), upto = std::min(from + each, voxels);
    }
};

// of a tile; sums of more in float32 would err more than those of stock operators
template <typename T> int64_t tile_voxels(int64_t hidden) { return Units<T>::NUMBERS == 2 && hidden <= 256 ? 192 : 96; }

inline int64_t whole_steps(int64_t voxels) { return (voxels + STEP - 1) / STEP * STEP; }

// Copy voxels (count, C), times scale plus shift where given, to `rows`, and by pairs of voxels to `pairs`; fill up with
// zeros. With float32 both are the same.
template <typename T>
inline void take(const typename T::Stored *from, int64_t count, int64_t channels, const float *scale, const float *shift,
                 typename T::Stored *rows, uint32_t *pairs) {
    const int64_t rounded = whole_steps(count);
    for (int64_t c = 0; c < channels; c += LANES) {
        const Floats factor = scale ? read<Floats>(scale + c) : Floats{} + 1.f;
        const Floats offset = shift ? read<Floats>(shift + c) : Floats{};
        const auto value = [&](int64_t v) {
            return v < count ? T::load(from + v * channels + c) * factor + offset : Floats{};
        };
        for (int64_t v = 0; v < rounded; v += 2) {
            const Floats even = value(v), odd = value(v + 1);
            T::store(rows + v * channels + c, even);
            T::store(rows + (v + 1) * channels + c, odd);
            if (pairs && Units<T>::NUMBERS == 2) write(pairs + v / 2 * channels + c, Units<T>::pair(even, odd));
        }
    }
}

// Write a block of hidden columns by pairs of voxels into its panel.
template <typename T, int M, int N> inline void put(uint32_t *panel, int64_t voxel, const Block<M, N> &block) {
    constexpr int NUMBERS = Units<T>::NUMBERS;
    for (int m = 0; m < M; m += NUMBERS)
        for (int n = 0; n < N; n++)
            write(panel + ((voxel + m) / NUMBERS * N + n) * LANES,
                  Units<T>::pair(block.sums[m][n], block.sums[m + NUMBERS - 1][n]));
}

template <typename T> void forward(const Mlp &p) {
    typedef typename T::Stored Stored;
    static const Gelu<T> gelu;
    const int64_t C = p.channels, R = p.hidden, K = p.made, tile = tile_voxels<T>(R);
    Panels first = packed<T>(p.first, R, C), second = packed<T>(p.second, K, R);
#pragma omp parallel
    {
        Buffer z(tile * C), hidden(tile * R);
        const Share share(p.voxels);
        for (int64_t from = share.from; from < share.upto; from += tile) {
            const int64_t count = std::min(tile, share.upto - from), rounded = whole_steps(count);
            take<T>((const Stored *)p.y + from * C, count, C, p.scale, p.shift, z.as<Stored>(), nullptr);
            each_block<T>(z.as<Stored>(), rounded, first, R, [&](int64_t v, int64_t column, auto block) {
                for (auto &row : block.sums) {
                    Stored *to = hidden.as<Stored>() + v++ * R + column;
                    const float *start = p.start + column;
                    for (const Floats &sum : row) {
                        T::store(to, gelu.value(sum + read<Floats>(start)));
                        to += LANES, start += LANES;
                    }
                }
            });
            each_block<T>(hidden.as<Stored>(), rounded, second, K, [&](int64_t v, int64_t column, auto block) {
                for (auto &row : block.sums) {
                    if (v >= count) break;
                    int64_t at = (from + v++) * K + column, k = column;
                    for (const Floats &sum : row) {
                        Floats x = sum + read<Floats>(p.end + k);
                        if (p.residual) x += T::load((const Stored *)p.residual + at);
                        T::store((Stored *)p.out + at, x);
                        at += LANES, k += LANES;
                    }
                }
            });
        }
    }
}

// sums (R,) of each thread: squares of hidden
template <typename T> void energy(const Mlp &p) {
    typedef typename T::Stored Stored;
    static const Gelu<T> gelu;
    const int64_t C = p.channels, R = p.hidden, tile = tile_voxels<T>(R);
    Panels first = packed<T>(p.first, R, C);
#pragma omp parallel
    {
        Buffer z(tile * C);
        double *sums = p.sums + omp_get_thread_num() * R;
        const Share share(p.voxels);
        for (int64_t from = share.from; from < share.upto; from += tile) {
            const int64_t count = std::min(tile, share.upto - from);
            take<T>((const Stored *)p.y + from * C, count, C, p.scale, p.shift, z.as<Stored>(), nullptr);
            each_block<T>(z.as<Stored>(), whole_steps(count), first, R, [&](int64_t v, int64_t column, auto block) {
                for (auto &row : block.sums) {
                    if (v++ >= count) break;
                    int64_t r = column;
                    for (const Floats &sum : row) {
                        const Floats value = gelu.value(sum + read<Floats>(p.start + r));
                        const Doubles hidden = __builtin_convertvector(value, Doubles);
                        write(sums + r, read<Doubles>(sums + r) + hidden * hidden);
                        r += LANES;
                    }
                }
            });
        }
    }
}

template <typename T> void backward(const Mlp &p) {
    typedef typename T::Stored Stored;
    static const Gelu<T> gelu;
    constexpr int64_t NUMBERS = Units<T>::NUMBERS;
    const int64_t C = p.channels, R = p.hidden, K = p.made, tile = tile_voxels<T>(R);
    Panels first = packed<T>(p.first, R, C), second_back = packed<T>(p.second_back, R, K);
    Panels first_back = packed<T>(p.first_back, C, R);
#pragma omp parallel
    {
        Buffer z(tile * C), z_pairs(tile * C), g(tile * K), g_pairs(tile * K), dhidden(tile * R), slopes(STEP * 4 * LANES);
        Panels hidden_pairs(R, tile / NUMBERS), dhidden_pairs(R, tile / NUMBERS);
        std::vector<float> dstart(R);
        double *dfirst = p.sums + omp_get_thread_num() * ((C + K + 1) * R + K), *dsecond = dfirst + C * R;
        double *dstart_sum = dsecond + K * R, *dend_sum = dstart_sum + R;
        const uint32_t *z_left = NUMBERS == 2 ? z_pairs.units : z.units, *g_left = NUMBERS == 2 ? g_pairs.units : g.units;
        const Share share(p.voxels);
        for (int64_t from = share.from; from < share.upto; from += tile) {
            const int64_t count = std::min(tile, share.upto - from), rounded = whole_steps(count);
            take<T>((const Stored *)p.y + from * C, count, C, p.scale, p.shift, z.as<Stored>(), z_pairs.units);
            take<T>((const Stored *)p.g + from * K, count, K, nullptr, nullptr, g.as<Stored>(), g_pairs.units);
            std::fill(dstart.begin(), dstart.end(), 0.f);
            each_panel(R, [&](int64_t column, auto panel) {
                constexpr int N = decltype(panel)::count, M = voxel_rows(N);
                uint32_t *hidden_to = hidden_pairs.at(column), *dhidden_to = dhidden_pairs.at(column);
                for (int64_t v = 0; v < rounded; v += M) {
                    float *slope = slopes.as<float>();
                    Block<M, N> block = multiply<T, M, N>(z.units + v * first.depth, first.depth, 1, first.at(column),
                                                          first.depth);
                    for (int m = 0; m < M; m++)
                        for (int n = 0; n < N; n++) {
                            const Floats x = block.sums[m][n] + read<Floats>(p.start + column + n * LANES);
                            block.sums[m][n] = gelu.value(x);
                            write(slope + (m * N + n) * LANES, gelu.slope(x));
                        }
                    put<T>(hidden_to, v, block);
                    Block<M, N> gradient = multiply<T, M, N>(g.units + v * second_back.depth, second_back.depth, 1,
                                                             second_back.at(column), second_back.depth);
                    for (int m = 0; m < M; m++)
                        for (int n = 0; n < N; n++) {
                            Floats &d = gradient.sums[m][n];
                            const int64_t r = column + n * LANES;
                            if (p.along) d += block.sums[m][n] * read<Floats>(p.along + r);
                            d *= read<Floats>(slope + (m * N + n) * LANES);
                            T::store(dhidden.as<Stored>() + (v + m) * R + r, d);
                        }
                    for (int n = 0; n < N; n++) {
                        float *sum = dstart.data() + column + n * LANES;
                        Floats total = read<Floats>(sum);
                        for (int m = 0; m < M && v + m < count; m++) total += gradient.sums[m][n];
                        write(sum, total);
                    }
                    put<T>(dhidden_to, v, gradient);
                }
            });
            correlate<T>(z_left, C, dhidden_pairs, rounded / NUMBERS, R, dfirst);
            correlate<T>(g_left, K, hidden_pairs, rounded / NUMBERS, R, dsecond);
            for (int64_t r = 0; r < R; r++) dstart_sum[r] += dstart[r];
            for (int64_t k = 0; k < K; k += LANES) {
                Floats total{};
                for (int64_t v = 0; v < count; v++) total += T::load((const Stored *)p.g + (from + v) * K + k);
                write(dend_sum + k, read<Doubles>(dend_sum + k) + __builtin_convertvector(total, Doubles));
            }
            if (!p.dz) continue;
            each_block<T>(dhidden.as<Stored>(), rounded, first_back, C, [&](int64_t v, int64_t column, auto block) {
                for (auto &row : block.sums) {
                    if (v >= count) break;
                    Stored *to = (Stored *)p.dz + (from + v++) * C + column;
                    for (const Floats &sum : row) T::store(to, sum), to += LANES;
                }
            });
        }
    }
}

// dz -> dz * scale + y * shift + start, per channel
template <typename T> void combine(const Mlp &p) {
    typedef typename T::Stored Stored;
    const int64_t C = p.channels;
#pragma omp parallel
    {
        const Share share(p.voxels);
        for (int64_t at = share.from * C; at < share.upto * C; at += C)
            for (int64_t c = 0; c < C; c += LANES) {
                Stored *to = (Stored *)p.dz + at + c;
                const Floats y = T::load((const Stored *)p.y + at + c) * read<Floats>(p.shift + c);
                T::store(to, T::load(to) * read<Floats>(p.scale + c) + (y + read<Floats>(p.start + c)));
            }
    }
}

} // namespace

// The last argument of each says how tensors are stored: 0 float32, 2 bfloat16.
#define EITHER(CALL) stored == 0 ? CALL<F32>(*p) : CALL<BF16>(*p);

extern "C" {

int mednext_multiplies_bfloat16() { // in one instruction
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

void mednext_mlp_forward(const Mlp *p, int stored) { EITHER(forward) }
void mednext_mlp_energy(const Mlp *p, int stored) { EITHER(energy) }
void mednext_mlp_backward(const Mlp *p, int stored) { EITHER(backward) }
void mednext_mlp_combine(const Mlp *p, int stored) { EITHER(combine) }
}

// Norm, expansion, GELU, compression and residual of rows of voxels, forward and backward, a tile of voxels at a time,
// whose hidden layer never leaves the cache. y is (voxels, C), hidden (voxels, R), out (voxels, K); C, R and K are
// multiples of 16. See `mlp.py` for what is folded into the weights. Sums of a tile are float32, sums over tiles
// float64.

#include "native_gelu.h"

#include <omp.h>

extern "C" struct Mlp {
    int64_t voxels, channels, hidden, made;
    const void *y, *first, *second, *first_back, *second_back, *residual, *g; // in the precision of y
    const float *scale, *shift, *start, *end, *along;
    void *out, *dz; // in the precision of y
    double *sums;   // of each thread: (C, R) of first, transposed, (K, R) of second, (R,) of start, (K,) of end
};

namespace {

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
    const Gelu<T> &gelu = Gelu<T>::once();
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
    const Gelu<T> &gelu = Gelu<T>::once();
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
    const Gelu<T> &gelu = Gelu<T>::once();
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

// What PyTorch lacks a fast CPU version of: transposed depthwise convolution, the weight gradient of a depthwise one,
// and exact sums over voxels. Tensors are channels-last, (N, D, H, W, C), with C a multiple of 16. float32 and bfloat16
// are multiplied and added in float32 within a plane, in float64 beyond it.

#include "native.h"

#include <omp.h>

namespace {

constexpr int64_t BLOCK = 8;  // voxels of a row that are summed in registers at the same time
constexpr int64_t TILE = 256; // voxels that stay in the L1 cache while `moments` walks over their channels

} // namespace

extern "C" struct Shape { int64_t n, channels, fine[3], coarse[3], kernel[3], stride[3]; };

namespace {

// One axis of a strided convolution: its voxel `fine` is seen by voxel `coarse` through tap
// fine - coarse * stride + kernel / 2. A transposed convolution goes from coarse to fine.
struct Axis {
    int64_t fine, coarse, kernel, stride;
    Axis(const Shape &s, int a) : fine(s.fine[a]), coarse(s.coarse[a]), kernel(s.kernel[a]), stride(s.stride[a]) {}
    int64_t first_tap(int64_t f) const { return (f + kernel / 2) % stride; } // further taps are `stride` apart
    int64_t seen_by(int64_t f, int64_t tap) const { return (f + kernel / 2 - tap) / stride; }
    bool inside(int64_t f, int64_t tap) const { return f + kernel / 2 >= tap && seen_by(f, tap) < coarse; }
};

// The taps of one row that lie inside the volume: where their voxels and their weights begin.
template <typename T>
struct TapRow { const typename T::Stored *x; const typename T::Number *weight; };

// Sixteen channels of COUNT voxels `stride` apart, from `f` on. With COUNT 1 taps along the row may lie outside.
template <typename T, int64_t COUNT>
inline void sum_taps(typename T::Stored *y, const TapRow<T> *rows, int64_t row_count, typename T::Vector bias,
                     const Axis &axis, int64_t f, int64_t channels) {
    typename T::Vector sums[COUNT];
    for (int64_t b = 0; b < COUNT; b++) sums[b] = typename T::Vector{};
    for (int64_t r = 0; r < row_count; r++)
        for (int64_t tap = axis.first_tap(f); tap < axis.kernel; tap += axis.stride) {
            if (COUNT == 1 && !axis.inside(f, tap)) continue;
            const typename T::Vector weight = read<typename T::Vector>(rows[r].weight + tap * channels);
            const typename T::Stored *x = rows[r].x + axis.seen_by(f, tap) * channels;
#pragma GCC unroll 16
            for (int64_t b = 0; b < COUNT; b++) sums[b] += weight * T::load(x + b * channels);
        }
    for (int64_t b = 0; b < COUNT; b++) T::store(y + (f + b * axis.stride) * channels, sums[b] + bias);
}

// coarse x (N, D, H, W, C) -> fine y
template <typename T>
void transposed(const typename T::Stored *x, const typename T::Number *weight, const typename T::Number *bias,
                typename T::Stored *y, const Shape &s) {
    const int64_t C = s.channels;
    const Axis az(s, 0), ay(s, 1), ax(s, 2);
#pragma omp parallel
    {
        TapRow<T> *rows = new TapRow<T>[az.kernel * ay.kernel];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < s.n * az.fine * ay.fine; row++) {
            const int64_t fy = row % ay.fine, fz = row / ay.fine % az.fine, n = row / ay.fine / az.fine;
            for (int64_t c = 0; c < C; c += LANES) {
                int64_t count = 0;
                for (int64_t tz = az.first_tap(fz); tz < az.kernel; tz += az.stride)
                    for (int64_t ty = ay.first_tap(fy); ty < ay.kernel; ty += ay.stride)
                        if (az.inside(fz, tz) && ay.inside(fy, ty)) {
                            const int64_t cz = az.seen_by(fz, tz), cy = ay.seen_by(fy, ty);
                            rows[count++] = {x + ((n * az.coarse + cz) * ay.coarse + cy) * ax.coarse * C + c,
                                             weight + (tz * ay.kernel + ty) * ax.kernel * C + c};
                        }
                const typename T::Vector start = read<typename T::Vector>(bias + c);
                typename T::Stored *to = y + row * ax.fine * C + c;
                for (int64_t phase = 0; phase < ax.stride; phase++) { // voxels of one phase have the same taps
                    const int64_t low = ax.first_tap(phase), high = low + (ax.kernel - 1 - low) / ax.stride * ax.stride;
                    for (int64_t f = phase; f < ax.fine;) {
                        const int64_t last = f + (BLOCK - 1) * ax.stride;
                        const bool whole = last < ax.fine && ax.inside(f, high) && ax.inside(last, low);
                        if (whole) sum_taps<T, BLOCK>(to, rows, count, start, ax, f, C);
                        else sum_taps<T, 1>(to, rows, count, start, ax, f, C);
                        f += (whole ? BLOCK : 1) * ax.stride;
                    }
                }
            }
        }
        delete[] rows;
    }
}

// Sixteen channels of a row of voxels side by side, behind and before P voxels of zeros; without `from` all are zeros.
template <typename T, int64_t P>
void pack(typename T::Number *to, const typename T::Stored *from, int64_t width, int64_t channels) {
    typedef typename T::Vector Vector;
    for (int64_t v = -P; v < width + P; v++)
        write(to + (v + P) * LANES, from && v >= 0 && v < width ? T::load(from + v * channels) : Vector{});
}

// sums[thread][tap][channel] = sum over coarse voxels of coarse * the fine voxel that it sees through the tap
template <typename T, int K, int STRIDE>
void correlate(const typename T::Stored *fine, const typename T::Stored *coarse, double *sums, const Shape &s) {
    typedef typename T::Number Number;
    typedef typename T::Vector Vector;
    constexpr int64_t P = K / 2;
    constexpr int GROUP = K <= 3 ? K : 1; // rows of taps summed in registers at the same time
    const int64_t C = s.channels, taps = s.kernel[0] * K * K, length = (s.fine[2] + 2 * P) * LANES;
#pragma omp parallel
    {
        double *own = sums + omp_get_thread_num() * taps * C;
        Number *plane = new Number[taps * C];
        Number *memory = new Number[K * length + LANES]; // for the K rows that a coarse row sees, row y in y % K
        Number *rows = memory + (LANES - reinterpret_cast<uintptr_t>(memory) / sizeof(Number) % LANES) % LANES;
#pragma omp for schedule(static)
        for (int64_t index = 0; index < s.n * s.coarse[0]; index++) {
            const int64_t cz = index % s.coarse[0], n = index / s.coarse[0];
            std::memset(plane, 0, taps * C * sizeof *plane);
            for (int64_t tz = 0; tz < s.kernel[0]; tz++) {
                const int64_t fz = cz * s.stride[0] + tz - s.kernel[0] / 2;
                if (fz < 0 || fz >= s.fine[0]) continue;
                for (int64_t c = 0; c < C; c += LANES) {
                    int64_t next = 0; // row that is packed next, counted from the P rows of zeros before the first
                    for (int64_t cy = 0; cy < s.coarse[1]; cy++) {
                        for (; next < cy * STRIDE + K; next++) {
                            const int64_t fy = next - P;
                            const bool inside = fy >= 0 && fy < s.fine[1];
                            const int64_t row = (n * s.fine[0] + fz) * s.fine[1] + fy;
                            pack<T, P>(rows + next % K * length, inside ? fine + row * s.fine[2] * C + c : nullptr,
                                       s.fine[2], C);
                        }
                        const typename T::Stored *from = coarse + (index * s.coarse[1] + cy) * s.coarse[2] * C + c;
                        for (int64_t first = 0; first < K; first += GROUP) {
                            const Number *seen[GROUP];
                            for (int r = 0; r < GROUP; r++) seen[r] = rows + (cy * STRIDE + first + r) % K * length;
                            Vector acc[GROUP][K] = {};
                            for (int64_t v = 0; v < s.coarse[2]; v++) {
                                const Vector value = T::load(from + v * C);
                                for (int r = 0; r < GROUP; r++)
                                    for (int t = 0; t < K; t++)
                                        acc[r][t] += value * read<Vector>(seen[r] + (v * STRIDE + t) * LANES);
                            }
                            for (int r = 0; r < GROUP; r++)
                                for (int t = 0; t < K; t++) {
                                    Number *sum = plane + ((tz * K + first + r) * K + t) * C + c;
                                    write(sum, read<Vector>(sum) + acc[r][t]);
                                }
                        }
                    }
                }
            }
            for (int64_t i = 0; i < taps * C; i++) own[i] += plane[i];
        }
        delete[] memory;
        delete[] plane;
    }
}

// sums[thread][n][0 or 1][channel] = sum over voxels of x, of x * x
template <typename T>
void moments(const typename T::Stored *x, double *sums, const Shape &s) {
    const int64_t C = s.channels, voxels = s.fine[0] * s.fine[1] * s.fine[2], tiles = (voxels + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
    for (int64_t index = 0; index < s.n * tiles; index++) {
        const int64_t n = index / tiles, from = index % tiles * TILE, upto = from + TILE < voxels ? from + TILE : voxels;
        double *own = sums + (omp_get_thread_num() * s.n + n) * 2 * C;
        for (int64_t c = 0; c < C; c += LANES) {
            Doubles total = read<Doubles>(own + c), squares = read<Doubles>(own + C + c);
            for (int64_t v = from; v < upto; v++) {
                const Doubles value = __builtin_convertvector(T::load(x + (n * voxels + v) * C + c), Doubles);
                total += value;
                squares += value * value;
            }
            write(own + c, total);
            write(own + C + c, squares);
        }
    }
}

template <typename T, int K>
void correlate(const void *fine, const void *coarse, double *sums, const Shape &s) {
    typedef const typename T::Stored *Pointer;
    if (s.stride[2] == 1) correlate<T, K, 1>((Pointer)fine, (Pointer)coarse, sums, s);
    else correlate<T, K, 2>((Pointer)fine, (Pointer)coarse, sums, s);
}

template <typename T>
struct Run {
    typedef const typename T::Stored *Pointer;
    typedef const typename T::Number *Numbers;
    static void transposed(const void *x, const void *weight, const void *bias, void *y, const Shape &s) {
        ::transposed<T>((Pointer)x, (Numbers)weight, (Numbers)bias, (typename T::Stored *)y, s);
    }
    static void correlate(const void *fine, const void *coarse, double *sums, const Shape &s) {
        if (s.kernel[2] == 3) ::correlate<T, 3>(fine, coarse, sums, s);
        else if (s.kernel[2] == 5) ::correlate<T, 5>(fine, coarse, sums, s);
        else ::correlate<T, 7>(fine, coarse, sums, s);
    }
    static void moments(const void *x, double *sums, const Shape &s) { ::moments<T>((Pointer)x, sums, s); }
};

} // namespace

// The last argument of each is how tensors are stored: 0 float32, 1 float64, 2 bfloat16. Weights and biases are float64
// with 1, else float32; `sums` begin as zeros, one part a thread.
#define EACH(CALL)                    \
    if (stored == 0) Run<F32>::CALL;  \
    else if (stored == 1) Run<F64>::CALL; \
    else Run<BF16>::CALL;

extern "C" {

int mednext_threads() { return omp_get_max_threads(); }

void mednext_transposed(const void *x, const void *weight, const void *bias, void *y, const Shape *s, int stored) {
    EACH(transposed(x, weight, bias, y, *s))
}

void mednext_correlate(const void *fine, const void *coarse, double *sums, const Shape *s, int stored) {
    EACH(correlate(fine, coarse, sums, *s))
}

void mednext_moments(const void *x, double *sums, const Shape *s, int stored) { EACH(moments(x, sums, *s)) }
}

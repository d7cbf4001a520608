// Spectra of filters for the other kernels: half precision, in kernel order, each with the power of two that was taken out.
// A filter is a real sequence of N points on a circle: causal taps from the start, anticausal ones from the end, the skip weight added at lag
// zero. One block transforms it in single precision, in place in shared memory, as M = N / 2 complex points z[n] = x[2 n] + i x[2 n + 1]. What is
// rounded to half precision is the result alone: rounded stages, as sequences go through, would cost a bfloat16 output of few positions too much.
#pragma once
#include "small_transform.cuh"
#include "tile.cuh"

constexpr int kLogFilterThreads = 8, kFilterThreads = 1 << kLogFilterThreads, kMaximumFilterPoints = 16384;

DEVICE float absolute(float x) { return float_from_bits(bits_from_float(x) & 0x7fffffffu); }

// Over all threads of a block, which all get it; `exchange` has room for one number of each warp.
DEVICE float sum_of_block(float sum, float* exchange) {
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    if (thread_index() % 32 == 0) exchange[thread_index() / 32] = sum;
    block_barrier();
    sum = 0.f;
    for (int warp = 0; warp < kFilterThreads / 32; warp++) sum += exchange[warp];
    block_barrier();
    return sum;
}

struct Complex {
    float re, im;
};
DEVICE Complex operator+(Complex x, Complex y) { return {x.re + y.re, x.im + y.im}; }
DEVICE Complex operator-(Complex x, Complex y) { return {x.re - y.re, x.im - y.im}; }
DEVICE Complex operator*(Complex x, Complex y) { return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re}; }
DEVICE Complex conjugate(Complex x) { return {x.re, -x.im}; }

// exp(-2 pi i index / 2^log_order), for indices below the order.
DEVICE Complex unit_root(int index, int log_order) {
    Complex root;
    sine_cosine_pi(float(index) * power_of_two(1 - log_order), root.im, root.re);
    return conjugate(root);
}

// x + t and x - t with t = y exp(-2 pi i index / 16), for an index below 8 that is known at compile time.
DEVICE void add_turned(Complex& sum, Complex& difference, Complex x, Complex y, int index) {
    constexpr float kDiagonal = 0.70710678118654752f, kCosine = 0.92387953251128674f, kSine = 0.38268343236508977f;
    if (index % 4 == 1) y = y * Complex{kCosine, -kSine};
    if (index % 4 == 2) y = {(y.re + y.im) * kDiagonal, (y.im - y.re) * kDiagonal};
    if (index % 4 == 3) y = y * Complex{kSine, -kCosine};
    if (index / 4 == 1) y = {y.im, -y.re};
    sum = x + y, difference = x - y;
}

// Stages of a transform by decimation in frequency split groups of 2^log_size points into as many parts as they have points in a butterfly; the
// frequencies q + kPoints f' go to the q-th part. Of those of a transform the last is the smallest.
constexpr int kLogStage = 4;
HOST_DEVICE constexpr int log_stage(int log_size) { return log_size < kLogStage ? log_size : kLogStage; }

// The butterfly of points that lie equal parts of a group apart, by the root of the group's order to the number of its first point.
template <int kPoints>
DEVICE void butterfly(Complex (&x)[kPoints], Complex root) {
    small_transform(x);
    Complex twiddle = root;
#pragma unroll
    for (int q = 1; q < kPoints; q++, twiddle = twiddle * root) x[q] = x[q] * twiddle;
}

// Where all stages of a transform leave a frequency.
DEVICE int index_of_frequency(int frequency, int log_count) {
    int index = 0;
#pragma unroll
    for (int left = log_count; left > 0; left -= kLogStage) {
        const int log_points = log_stage(left);
        index += (frequency & ((1 << log_points) - 1)) << (left - log_points);
        frequency >>= log_points;
    }
    return index;
}

struct FilterParams : fft_conv_filter_params {
    int log_points;     // of N
    int log_group;      // of the channels whose taps are read together
    int log_size;       // of the groups of a stage in global memory

    HOST_DEVICE int window_count() const { return windows > 0 ? windows : 1; }

    DEVICE float skip_of(int channel) const { return skip ? skip[channel] : 0.f; }

    // Where channels go in pairs, a spectrum is taken at frequencies half-way between those of the FFT, of which each has another one, not itself, for
    // its mirror image. Then the convolution on the circle changes its sign from one turn to the next, and so do the taps that lie before its start.
    DEVICE Complex root(int frequency) const { return channel_pairs ? unit_root(2 * frequency + 1, log_points + 1) : unit_root(frequency, log_points); }

    // Points of half a circle of a filter, equal parts apart, from its point `first` on. Before the first half there are no taps.
    template <int kPoints>
    DEVICE void load_half(Complex* x, int channel, int half, int first) const {
        const int lag = half * (fft_size / 2) + 2 * first, reverse_lag = fft_size - 1 - lag, step = fft_size / 2 / kPoints;
        const float *const row = k + channel * k_stride + lag * k_tap_stride, *const reverse_row = k_rev + channel * k_rev_stride + reverse_lag * k_rev_tap_stride;
#pragma unroll
        for (int t = 0; t < kPoints; t++) {
            const float* const tap = row + t * step * k_tap_stride;
            x[t] = {u32(lag + t * step) < u32(taps) ? tap[0] : 0.f, u32(lag + t * step + 1) < u32(taps) ? tap[k_tap_stride] : 0.f};
        }
        if (taps_rev > 0)
#pragma unroll
            for (int t = 0; t < kPoints; t++) {
                const float* const tap = reverse_row - t * step * k_rev_tap_stride;
                if (reverse_lag - t * step < taps_rev) x[t].re += tap[0];
                if (reverse_lag - t * step - 1 < taps_rev) x[t].im += tap[-k_rev_tap_stride];
            }
        if (lag == 0) x[0].re += skip_of(channel);
    }

    // What a window has half a circle on: the half that the window before starts with.
    HOST_DEVICE int second_half(int window) const { return windows > 0 ? window - 1 : 1; }
};

// The points of filters, one after the other, in shared memory, a free one after sixteen, against bank conflicts.
struct FilterPoints {
    Complex* memory;
    int log_count;          // of one
    int log_filters = 0;

    HOST_DEVICE static constexpr int place(int index) { return index + (index >> 4); }
    HOST_DEVICE static constexpr int bytes(int count) { return place(count) * 8; }
    DEVICE Complex& operator[](int index) const { return memory[place(index)]; }

    // Of points that load(x, first, log_stride) gives. kOneColumn: all butterflies of a thread have the same number within their groups, as no stride is
    // larger than the number of threads.
    template <int kLogPoints, bool kOneColumn, class Load>
    DEVICE void stage(int log_size, Load load) const {
        const int log_stride = log_size - kLogPoints;
        Complex root;
#pragma unroll 1
        for (int i = thread_index(); i < 1 << (log_count + log_filters - kLogPoints); i += kFilterThreads) {
            const int column = i & ((1 << log_stride) - 1);
            if (!kOneColumn || i == thread_index()) root = unit_root(column, log_size);
            const int start = (i >> log_stride << log_size) + column;
            Complex x[1 << kLogPoints];
            load(x, start, log_stride);
            if (log_stride > 0)
                butterfly(x, root);
            else
                small_transform(x);
#pragma unroll
            for (int q = 0; q < 1 << kLogPoints; q++) at(start)[place(q << log_stride)] = x[q];
        }
        block_barrier();
    }
    // Numbers that have no bit in common have the sum of their places.
    DEVICE Complex* at(int start) const { return memory + place(start); }

    // Of points that are in shared memory or, if load(x, first, log_stride) is given, of those; there are at least 16.
    template <bool kOneColumn = false>
    DEVICE void transform() const {
        rest_of_transform<kOneColumn>(log_count);
    }
    template <bool kOneColumn = false, class Load>
    DEVICE void transform(Load load) const {
        stage<kLogStage, kOneColumn>(log_count, load);
        rest_of_transform<kOneColumn>(log_count - kLogStage);
    }
    template <bool kOneColumn>
    DEVICE void rest_of_transform(int log_size) const {
        const auto load = [this](auto& x, int start, int log_stride) {
#pragma unroll
            for (int t = 0; t < int(sizeof(x) / sizeof(Complex)); t++) x[t] = at(start)[place(t << log_stride)];
        };
#pragma unroll
        for (; log_size >= kLogStage; log_size -= kLogStage) stage<kLogStage, kOneColumn>(log_size, load);
        if (log_size == 3) stage<3, kOneColumn>(3, load);
        if (log_size == 2) stage<2, kOneColumn>(2, load);
        if (log_size == 1) stage<1, kOneColumn>(1, load);
    }

    DEVICE int index_of(int frequency) const { return index_of_frequency(frequency, log_count); }
};

// The scale of a spectrum by the bits of its largest magnitude: the power of two below; NaN if the spectrum is not finite.
DEVICE float scale_of_largest(u32 bits) {
    const u32 exponent = bits >> 23;
    return exponent == 255 ? float_from_bits(0x7fc00000u) : float_from_bits((exponent == 0 ? 1 : exponent) << 23);
}

// Two frequencies of a spectrum as the other kernels read them, by the reciprocal of its scale; zeros where that says that it is not finite.
DEVICE uint2 scaled_pair(Complex x, Complex y, float down) {
    return down == down ? uint2{pack(x.re * down, y.re * down), pack(x.im * down, y.im * down)} : uint2{0, 0};
}

// The frequency in a place of kernel order: row, fragment, lane and point of csrc/transform.cuh; of the other half of the pair, half the FFT on.
DEVICE int frequency_of(int rows, int row, int fragment, int lane, int point) { return row + rows * (2 * (lane / 4) + point + 16 * (lane % 4 + 4 * fragment)); }

// From the transform Z of z, z = Z[f] and w = conj(Z[M - f]), to that of the real sequence at f and f + M: X[f] = E[f] + w_N^f O[f] with E and O the
// transforms of the even and of the odd positions.
DEVICE void unpack_pair(Complex z, Complex w, Complex root, Complex& x, Complex& y) {
    const Complex even = {0.5f * (z.re + w.re), 0.5f * (z.im + w.im)}, odd = {0.5f * (z.im - w.im), 0.5f * (w.re - z.re)};
    const Complex turned = odd * root;
    x = even + turned, y = even - turned;
}

struct FilterSpectrum {
    const FilterParams& params;
    FilterPoints points;
    u32* largest;
    float* exchange;    // one for each warp

    DEVICE static void note(u32& magnitude, float value) {
        const u32 bits = bits_from_float(absolute(value));
        magnitude = bits > magnitude ? bits : magnitude;
    }

    // From the transform of z to that of the real sequence, in place. Of X[0 ... M] the first and the last, both real, share a place. Notes the largest magnitude.
    DEVICE void unpack() const {
        const int count = 1 << points.log_count;
        u32 magnitude = 0;
        for (int f = thread_index(); f <= count / 2; f += kFilterThreads) {
            Complex &at = points[points.index_of(f)], &mirrored = points[points.index_of((count - f) & (count - 1))];
            Complex x, y;
            unpack_pair(at, conjugate(mirrored), unit_root(f, params.log_points), x, y);
            mirrored = conjugate(y);
            at = f == 0 ? Complex{x.re, y.re} : x;
            for (float value : {x.re, x.im, y.re, y.im}) note(magnitude, value);
        }
        magnitude = warp_maximum(magnitude);
        if (thread_index() % 32 == 0) atomic_maximum(largest, magnitude);
    }

    // X[f] and X[f + M] for f below M.
    DEVICE void at(int frequency, Complex& x, Complex& y) const {
        const int count = 1 << points.log_count;
        x = points[points.index_of(frequency)];
        y = conjugate(points[points.index_of((count - frequency) & (count - 1))]);
        if (frequency == 0) x = {x.re, 0.f}, y = {-y.im, 0.f};
    }

    // A tap of the whole filter.
    DEVICE float tap_of_filter(int channel, int n) const {
        const float tap = params.k[channel * params.k_stride + n * params.k_tap_stride];
        return n == 0 ? tap + params.skip_of(channel) : tap;
    }

    // All windows of a filter have one scale, from its norm: eight times that is more than most values, of all windows. All threads.
    DEVICE float scale_of_windows(int channel) const {
        u32 magnitude = 0;
        for (int n = thread_index(); n < params.taps; n += kFilterThreads) note(magnitude, tap_of_filter(channel, n));
        magnitude = warp_maximum(magnitude);
        if (thread_index() % 32 == 0) atomic_maximum(largest, magnitude);
        block_barrier();
        const int exponent = int(*largest >> 23);
        if (exponent == 255) return float_from_bits(0x7fc00000u);
        const float down = power_of_two(exponent < 1 ? 126 : 127 - exponent);
        float sum = 0.f;
        for (int n = thread_index(); n < params.taps; n += kFilterThreads) {
            const float k = tap_of_filter(channel, n) * down;
            sum += k * k;
        }
        sum = sum_of_block(sum, exchange);
        const int root = (exponent < 1 ? -126 : exponent - 127) + ((int(bits_from_float(sum) >> 23) - 127) >> 1) + 3;
        return power_of_two(sum == 0.f || root < -126 ? -126 : root > 127 ? 127 : root);
    }

    DEVICE void store(int channel, int window, float scale) const {
        const float down = 1.f / scale;
        uint2* words = reinterpret_cast<uint2*>(params.spectrum + (int64_t(channel) * params.window_count() + window) * params.fft_size);
        for (int i = thread_index(); i < params.fft_size / 2; i += kFilterThreads) {
            Complex x, y;
            at(frequency_of(params.fft_size / kColumns, i / 128, i / 64 % 2, i / 2 % 32, i % 2), x, y);
            words[i] = scaled_pair(x, y, down);
        }
        if (thread_index() == 0 && window == 0) params.scale[channel] = scale;
    }

    DEVICE void run() const {
        for (int unit = block_index(); unit < params.channels * params.window_count(); unit += block_count()) {
            const int channel = unit / params.window_count(), window = unit % params.window_count();
            const int quarter = 1 << points.log_count >> 2;
            for (int i = thread_index(); i < quarter; i += kFilterThreads) {
                Complex x[4];
                params.load_half<2>(x, channel, window, i), params.load_half<2>(x + 2, channel, params.second_half(window), i);
                for (int t = 0; t < 4; t++) points[i + t * quarter] = x[t];
            }
            if (thread_index() == 0) *largest = 0;
            block_barrier();
            const float scale = params.windows > 0 ? scale_of_windows(channel) : 0.f;
            points.transform();
            unpack();
            block_barrier();
            store(channel, window, params.windows > 0 ? scale : scale_of_largest(*largest));
            block_barrier();
        }
    }
};

constexpr int kFilterControlBytes = 16 + kFilterThreads / 32 * 4;
constexpr int filter_shared_bytes(int fft_size) { return FilterPoints::bytes(fft_size / 2) + kFilterControlBytes; }

DEVICE void filter_spectra(const FilterParams& params) {
    u32* const largest = reinterpret_cast<u32*>(shared_memory());
    const FilterPoints points{reinterpret_cast<Complex*>(shared_memory() + kFilterControlBytes), params.log_points - 1};
    FilterSpectrum{params, points, largest, reinterpret_cast<float*>(largest + 4)}.run();
}

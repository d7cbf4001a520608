// Spectra of filters for the other kernels: half precision, in kernel order, each with the power of two that was taken out.
// A filter is a real sequence of N points on a circle: causal taps from the start, anticausal ones from the end, the skip weight added at lag
// zero. One block transforms it in single precision, in place in shared memory, as M = N / 2 complex points z[n] = x[2 n] + i x[2 n + 1]. What is
// rounded to half precision is the result alone: rounded stages, as sequences go through, would cost a bfloat16 output of few positions too much.
#pragma once
#include "small_transform.cuh"
#include "tile.cuh"

constexpr int kFilterThreads = 256, kMaximumFilterPoints = 16384;

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

// x + t and x - t with t = y exp(-2 pi i index / 16), for an even index that is known at compile time.
DEVICE void add_turned(Complex& sum, Complex& difference, Complex x, Complex y, int index) {
    constexpr float kDiagonal = 0.70710678118654752f;
    if (index % 4 == 2) y = {(y.re + y.im) * kDiagonal, (y.im - y.re) * kDiagonal};
    if (index / 4 == 1) y = {y.im, -y.re};
    sum = x + y, difference = x - y;
}

struct FilterParams : fft_conv_filter_params {
    int log_points;     // of N
    int log_group;      // of the channels whose taps are read together

    HOST_DEVICE int window_count() const { return windows > 0 ? windows : 1; }

    DEVICE float tap(int channel, int window, int n) const {
        if (windows > 0) {
            const int at = window * (fft_size / 2) + n - (n < fft_size / 2 ? 0 : fft_size);
            return at >= 0 && at < taps ? any_tap(channel, at) : 0.f;
        }
        float sum = 0.f;
        if (n < taps) sum += k[channel * k_stride + n * k_tap_stride];
        if (n >= fft_size - taps_rev) sum += k_rev[channel * k_rev_stride + (fft_size - 1 - n) * k_rev_tap_stride];
        return n == 0 && skip ? sum + skip[channel] : sum;
    }

    // A tap of the whole filter.
    DEVICE float any_tap(int channel, int n) const {
        const float tap = k[channel * k_stride + n * k_tap_stride];
        return n == 0 && skip ? tap + skip[channel] : tap;
    }
};

// The points of filters, one after the other, in shared memory, a free one after sixteen, against bank conflicts.
struct FilterPoints {
    Complex* memory;
    int log_count;          // of one
    int log_filters = 0;

    HOST_DEVICE static constexpr int place(int index) { return index + index / 16; }
    HOST_DEVICE static constexpr int bytes(int count) { return place(count) * 8; }
    DEVICE Complex& operator[](int index) const { return memory[place(index)]; }

    // One stage of decimation in frequency: the frequencies q + kPoints f' of each group of 2^log_size points go to its q-th part.
    template <int kLogPoints>
    DEVICE void stage(int log_size) const {
        constexpr int kPoints = 1 << kLogPoints;
        const int log_stride = log_size - kLogPoints;
        for (int i = thread_index(); i < 1 << (log_count + log_filters - kLogPoints); i += kFilterThreads) {
            const int column = i & ((1 << log_stride) - 1), first = (i >> log_stride << log_size) + column;
            Complex x[kPoints];
            for (int t = 0; t < kPoints; t++) x[t] = (*this)[first + (t << log_stride)];
            small_transform(x);
            const Complex root = unit_root(column, log_size);
            Complex twiddle = root;
            (*this)[first] = x[0];
            for (int q = 1; q < kPoints; q++) {
                (*this)[first + (q << log_stride)] = x[q] * twiddle;
                twiddle = twiddle * root;
            }
        }
        block_barrier();
    }

    DEVICE void transform() const {
        int log_size = log_count;
        for (; log_size >= 3; log_size -= 3) stage<3>(log_size);
        if (log_size == 2) stage<2>(2);
        if (log_size == 1) stage<1>(1);
    }

    // Where the stages leave a frequency.
    DEVICE int index_of(int frequency) const {
        int index = 0;
        for (int left = log_count; left > 0;) {
            const int log_points = left < 3 ? left : 3;
            left -= log_points;
            index += (frequency & ((1 << log_points) - 1)) << left;
            frequency >>= log_points;
        }
        return index;
    }
};

// The scale of a spectrum by the bits of its largest magnitude: the power of two below; NaN if the spectrum is not finite.
DEVICE float scale_of_largest(u32 bits) {
    const u32 exponent = bits >> 23;
    return exponent == 255 ? float_from_bits(0x7fc00000u) : float_from_bits((exponent == 0 ? 1 : exponent) << 23);
}

// Two frequencies of a spectrum as the other kernels read them; zeros where the scale says that the spectrum is not finite.
DEVICE uint2 scaled_pair(Complex x, Complex y, float scale) {
    const float down = 1.f / scale;
    return scale == scale ? uint2{pack(x.re * down, y.re * down), pack(x.im * down, y.im * down)} : uint2{0, 0};
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
        const u32 bits = bits_from_float(value) & 0x7fffffffu;
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

    // All windows of a filter have one scale, from its norm: eight times that is more than most values, of all windows. All threads.
    DEVICE float scale_of_windows(int channel) const {
        u32 magnitude = 0;
        for (int n = thread_index(); n < params.taps; n += kFilterThreads) note(magnitude, params.any_tap(channel, n));
        magnitude = warp_maximum(magnitude);
        if (thread_index() % 32 == 0) atomic_maximum(largest, magnitude);
        block_barrier();
        const int exponent = int(*largest >> 23);
        if (exponent == 255) return float_from_bits(0x7fc00000u);
        const float down = power_of_two(exponent < 1 ? 126 : 127 - exponent);
        float sum = 0.f;
        for (int n = thread_index(); n < params.taps; n += kFilterThreads) {
            const float k = params.any_tap(channel, n) * down;
            sum += k * k;
        }
        for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        if (thread_index() % 32 == 0) exchange[thread_index() / 32] = sum;
        block_barrier();
        sum = 0.f;
        for (int warp = 0; warp < kFilterThreads / 32; warp++) sum += exchange[warp];
        const int root = (exponent < 1 ? -126 : exponent - 127) + ((int(bits_from_float(sum) >> 23) - 127) >> 1) + 3;
        return power_of_two(sum == 0.f || root < -126 ? -126 : root > 127 ? 127 : root);
    }

    DEVICE void store(int channel, int window, float scale) const {
        uint2* words = reinterpret_cast<uint2*>(params.spectrum + (int64_t(channel) * params.window_count() + window) * params.fft_size);
        for (int i = thread_index(); i < params.fft_size / 2; i += kFilterThreads) {
            Complex x, y;
            at(frequency_of(params.fft_size / kColumns, i / 128, i / 64 % 2, i / 2 % 32, i % 2), x, y);
            words[i] = scaled_pair(x, y, scale);
        }
        if (thread_index() == 0 && window == 0) params.scale[channel] = scale;
    }

    DEVICE void run() const {
        for (int unit = block_index(); unit < params.channels * params.window_count(); unit += block_count()) {
            const int channel = unit / params.window_count(), window = unit % params.window_count();
            for (int i = thread_index(); i < 1 << points.log_count; i += kFilterThreads)
                points[i] = {params.tap(channel, window, 2 * i), params.tap(channel, window, 2 * i + 1)};
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

// Spectra of filters for the other kernels: half precision, in kernel order, each with the power of two that was taken out.
// A filter is a real sequence of N points on a circle: causal taps from the start, anticausal ones from the end, the skip weight added at lag
// zero. One block transforms it in single precision, in place in shared memory, as M = N / 2 complex points z[n] = x[2 n] + i x[2 n + 1]. What is
// rounded to half precision is the result alone: rounded stages, as sequences go through, would cost a bfloat16 output of few positions too much.
#pragma once
#include <algorithm>

#include "small_transform.cuh"
#include "tile.cuh"

// Where several blocks share a multiprocessor; a filter of the most points has one to itself.
constexpr int kLogFilterThreads = 8, kFilterThreads = 1 << kLogFilterThreads, kFilterBlocks = 3, kLargeFilterThreads = 512;
// The most points, and the fewest that may go in passes (csrc/long_filter.cuh).
constexpr int kMaximumFilterPoints = 32768, kFewestInPasses = 16384;
constexpr bool is_large_filter(int fft_size) { return fft_size == kMaximumFilterPoints; }
// A butterfly of sixteen complex points each, as far as there are threads.
constexpr int filter_threads(int fft_size) { return is_large_filter(fft_size) ? kLargeFilterThreads : std::clamp(fft_size / 32, 64, kFilterThreads); }
constexpr int filter_blocks(int fft_size) { return is_large_filter(fft_size) ? 1 : kFilterBlocks * kFilterThreads / filter_threads(fft_size); }

DEVICE float absolute(float x) { return float_from_bits(bits_from_float(x) & 0x7fffffffu); }

// The sum over all threads of a block: each gives its own, and after a barrier gets it; `exchange` has room for one number of each warp.
DEVICE void give_to_sum(float own, float* exchange) {
    for (int mask = 1; mask < 32; mask *= 2) own += shuffle_xor(own, mask);
    if (thread_index() % 32 == 0) exchange[thread_index() / 32] = own;
}
DEVICE float given_sum(const float* exchange) {
    float sum = 0.f;
    for (int warp = 0; warp < block_size() / 32; warp++) sum += exchange[warp];
    return sum;
}
DEVICE float sum_of_block(float own, float* exchange) {
    give_to_sum(own, exchange);
    block_barrier();
    const float sum = given_sum(exchange);
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

// exp(-2 pi i index / order) for a power of two up to 2^24. Its error is that of single precision, absolute: nothing beside half precision's.
DEVICE Complex root_of_unity(int index, int order) {
    const int turned = index & (order - 1), near = turned > order / 2 ? turned - order : turned;
    const float reciprocal = float_from_bits((254u << 23) - bits_from_float(float(order)));
    Complex root;
    fast_sine_cosine(float(near) * (reciprocal * -6.2831853071795865f), root.im, root.re);
    return root;
}
DEVICE Complex unit_root(int index, int log_order) { return root_of_unity(index, 1 << log_order); }

// x + t and x - t with t = y exp(-2 pi i index / 16), for an index below 8 that is known at compile time.
DEVICE void add_turned(Complex& sum, Complex& difference, Complex x, Complex y, int index) {
    constexpr float kDiagonal = 0.70710678118654752f, kCosine = 0.92387953251128674f, kSine = 0.38268343236508977f;
    if (index % 4 == 1) y = y * Complex{kCosine, -kSine};
    if (index % 4 == 2) y = {(y.re + y.im) * kDiagonal, (y.im - y.re) * kDiagonal};
    if (index % 4 == 3) y = y * Complex{kSine, -kCosine};
    if (index / 4 == 1) y = {y.im, -y.re};
    sum = x + y, difference = x - y;
}

// Stages of a transform by decimation in frequency split groups of points into as many parts as they have points in a butterfly; the frequencies
// q + kPoints f' go to the q-th part. All take sixteen points but the first, which takes what is left of the logarithm.
constexpr int kLogStage = 4;
HOST_DEVICE constexpr int log_first_stage(int log_count) { return (log_count - 1) % kLogStage + 1; }

// The butterfly of points that lie equal parts of a group apart, by the root of the group's order to the number of its first point.
template <int kPoints>
DEVICE void butterfly(Complex (&x)[kPoints], Complex root) {
    small_transform(x);
    Complex twiddle = root;
#pragma unroll
    for (int q = 1; q < kPoints; q++, twiddle = twiddle * root) x[q] = x[q] * twiddle;
}

// Where all stages of a transform leave a frequency: its digits in reverse order.
DEVICE int index_of_frequency(int frequency, int log_count) {
    static_assert(kLogStage == 4, "half a byte");
    const int log_first = log_first_stage(log_count), log_others = log_count - log_first;
    const u32 bytes = permute_bytes(u32(frequency >> log_first), 0, 0x0123), digits = (bytes >> 4 & 0x0f0f0f0fu) | (bytes & 0x0f0f0f0fu) << 4;
    return (frequency & ((1 << log_first) - 1)) << log_others | int(digits >> (28 - log_others) >> 4);
}

struct FilterParams : fft_conv_filter_params {
    int log_points;     // of N
    int log_group;      // of the channels whose taps are read together
    int log_size;       // of the groups of a stage in global memory

    HOST_DEVICE bool in_passes() const { return work; }
    HOST_DEVICE int window_count() const { return windows > 0 ? windows : 1; }

    DEVICE float skip_of(int channel) const { return skip ? skip[channel] : 0.f; }

    // Where channels go in pairs, a spectrum is taken at frequencies half-way between those of the FFT, of which each has another one, not itself, for
    // its mirror image. Then the convolution on the circle changes its sign from one turn to the next, and so do the taps that lie before its start.
    DEVICE Complex root(int frequency) const { return channel_pairs ? unit_root(2 * frequency + 1, log_points + 1) : unit_root(frequency, log_points); }

    // Points of half a circle of a filter, equal parts apart, from its point `first` on. Before the first half there are no taps.
    template <int kPoints>
    DEVICE void load_half(Complex* x, int channel, int half, int first) const {
        const int lag = half * (fft_size / 2) + 2 * first, reverse_lag = fft_size - 1 - lag, step = fft_size / 2 / kPoints;
        const int64_t tap_step = step * k_tap_stride, reverse_step = step * k_rev_tap_stride;
        const float *row = k + channel * k_stride + lag * k_tap_stride, *reverse_row = k_rev + channel * k_rev_stride + reverse_lag * k_rev_tap_stride;
#pragma unroll
        for (int t = 0; t < kPoints; t++, row += tap_step)
            x[t] = {u32(lag + t * step) < u32(taps) ? row[0] : 0.f, u32(lag + t * step + 1) < u32(taps) ? row[k_tap_stride] : 0.f};
        if (taps_rev > 0)
#pragma unroll
            for (int t = 0; t < kPoints; t++, reverse_row -= reverse_step) {
                if (reverse_lag - t * step < taps_rev) x[t].re += reverse_row[0];
                if (reverse_lag - t * step - 1 < taps_rev) x[t].im += reverse_row[-k_rev_tap_stride];
            }
        if (lag == 0) x[0].re += skip_of(channel);
    }

    // What a window has half a circle on: the half that the window before starts with.
    HOST_DEVICE int second_half(int window) const { return windows > 0 ? window - 1 : 1; }
};

// The points of filters, one after the other, in shared memory. Points whose indices differ in one digit of sixteen, whichever, lie in different banks.
struct FilterPoints {
    Complex* memory;
    int log_count;          // of one
    int log_filters = 0;

    HOST_DEVICE static constexpr int place(int index) { return index + (index >> 4) + (index >> 8) + (index >> 12); }
    HOST_DEVICE static constexpr int bytes(int count) { return place(count) * 8; }
    DEVICE Complex& operator[](int index) const { return memory[place(index)]; }

    // Numbers that have no bit in common have the sum of their places.
    DEVICE Complex* at(int start) const { return memory + place(start); }

    // Of groups of 2^(kLogPoints + log_stride) points that load(x, first, log_stride) gives. The stride is a power of sixteen.
    template <int kLogPoints, class Load>
    DEVICE void stage(int log_stride, Load load) const {
        const int log_size = log_stride + kLogPoints;
#pragma unroll 1
        for (int i = thread_index(); i < 1 << (log_count + log_filters - kLogPoints); i += block_size()) {
            const int column = i & ((1 << log_stride) - 1), start = (i >> log_stride << log_size) + column;
            Complex x[1 << kLogPoints];
            load(x, start, log_stride);
            if (log_stride > 0) butterfly(x, unit_root(column, log_size));
            else small_transform(x);
#pragma unroll
            for (int q = 0; q < 1 << kLogPoints; q++) at(start)[q * place(1 << log_stride)] = x[q];
        }
        block_barrier();
    }

    DEVICE auto in_memory() const {
        return [this](auto& x, int start, int log_stride) {
#pragma unroll
            for (int t = 0; t < int(sizeof(x) / sizeof(Complex)); t++) x[t] = at(start)[t * place(1 << log_stride)];
        };
    }

    // Of points that are in shared memory; or the first stage of those that load(x, first, log_stride) gives, and then the others.
    DEVICE void transform() const { first_stage(in_memory()), further_stages(); }
    template <class Load>
    DEVICE void first_stage(Load load) const {
        const int log_stride = log_count - log_first_stage(log_count);
        switch (log_first_stage(log_count)) {
            case 1: return stage<1>(log_stride, load);
            case 2: return stage<2>(log_stride, load);
            case 3: return stage<3>(log_stride, load);
            default: return stage<kLogStage>(log_stride, load);
        }
    }
    DEVICE void further_stages() const {
        static_assert(kMaximumFilterPoints / 2 <= 1 << 4 * kLogStage, "four stages");
        if (log_count > 3 * kLogStage) stage<kLogStage>(2 * kLogStage, in_memory());
        if (log_count > 2 * kLogStage) stage<kLogStage>(kLogStage, in_memory());
        if (log_count > kLogStage) stage<kLogStage>(0, in_memory());
    }

    DEVICE int index_of(int frequency) const { return index_of_frequency(frequency, log_count); }
};

// No value of a spectrum is larger than the sum of the taps' magnitudes, most are smaller by some root of their number: scaled values are below 16, so that
// sums of products with the largest values of a sequence's transform, the root of its length, are half-precision numbers. NaN if it is not finite.
DEVICE int exponent_of(float x) { return int(bits_from_float(x) >> 23) - 127; }
DEVICE float normal_power_of_two(int exponent) { return power_of_two(exponent < -126 ? -126 : exponent > 126 ? 126 : exponent); }
DEVICE float scale_of_sum(float sum) { return exponent_of(sum) == 128 ? float_from_bits(0x7fc00000u) : normal_power_of_two(exponent_of(sum) - 3); }

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

// Stores a spectrum at two neighbouring frequencies of a row in kernel order and, where these have a place of their own, at their mirror images: from the
// transform of z at both and at the mirror images, with w_N^f of the first and what takes that to the next.
DEVICE void store_spectrum(uint4* to, uint4* mirrored_to, const Complex (&z)[2], const Complex (&mirrored_z)[2], Complex root, Complex next, float down) {
    uint2 pair[2], mirrored[2];
#pragma unroll
    for (int t = 0; t < 2; t++) {
        Complex x, y;
        unpack_pair(z[t], conjugate(mirrored_z[t]), t ? root * next : root, x, y);
        pair[t] = scaled_pair(x, y, down), mirrored[1 - t] = scaled_pair(conjugate(y), conjugate(x), down);
    }
    *to = {pair[0].x, pair[0].y, pair[1].x, pair[1].y};
    if (mirrored_to) *mirrored_to = {mirrored[0].x, mirrored[0].y, mirrored[1].x, mirrored[1].y};
}
// Of 64 of them in a row, that of this thread.
DEVICE int spectrum_place() { return fresh_thread_index() % 64; }
DEVICE int frequency_of_place(int place) { return frequency_of(1, 0, place / 32, place % 32, 0); }

// A filter or a window of one that a block holds.
struct FilterSpectrum {
    const FilterParams& params;
    const FilterPoints points;
    float* const exchange;      // one for each warp

    // Of all windows, which have one scale.
    DEVICE float sum_of_taps(int channel) const {
        float sum = 0.f;
        for (int n = thread_index(); n < params.taps; n += block_size()) {
            const float tap = params.k[channel * params.k_stride + n * params.k_tap_stride];
            sum += absolute(n == 0 ? tap + params.skip_of(channel) : tap);
        }
        return sum;
    }

    // The rows r and R - r of kernel order, which are each other's mirror images, as the rows 0 and R / 2 are their own.
    DEVICE void store(uint4* words, float down) const {
        constexpr int kLast = kColumns / 2 - 1;
        const int rows = params.fft_size / kColumns, at_once = block_size() / 64, place = spectrum_place(), first = fresh_thread_index() / 64, q = frequency_of_place(place);
        auto index = [&](int row, int column) { return points.index_of(row + rows * column); };
        const int own[2] = {index(0, q), index(0, q + 1)}, mirrored[2] = {index(0, kLast - q), index(0, kLast - q - 1)};
        const Complex step = params.root(at_once), next = params.root(rows);
        Complex root = params.root(first + rows * q);
        for (int row = first; row <= rows / 2; row += at_once, root = root * step) {
            const int other = (rows - row) & (rows - 1);
            const Complex *const at_row = points.at(index(row, 0)), *const at_other = points.at(index(other, 0));
            Complex z[2], w[2];
#pragma unroll
            for (int t = 0; t < 2; t++) {
                z[t] = at_row[FilterPoints::place(own[t])];
                w[t] = row > 0 ? at_other[FilterPoints::place(mirrored[t])] : points[index(0, (kLast + 1 - q - t) & kLast)];
            }
            store_spectrum(words + row * 64 + place, other == row ? nullptr : words + other * 64 + 63 - place, z, w, root, next, down);
        }
    }

    DEVICE void run() const {
        for (int unit = block_index(); unit < params.channels * params.window_count(); unit += block_count()) {
            const int channel = unit / params.window_count(), window = unit % params.window_count();
            float sum = params.windows > 0 ? sum_of_taps(channel) : 0.f;
            points.first_stage([&](auto& x, int first, int) {
                constexpr int kHalf = sizeof(x) / sizeof(Complex) / 2;
                params.load_half<kHalf>(x, channel, window, first), params.load_half<kHalf>(x + kHalf, channel, params.second_half(window), first);
                if (params.windows == 0)
#pragma unroll
                    for (int t = 0; t < 2 * kHalf; t++) sum += absolute(x[t].re) + absolute(x[t].im);
            });
            give_to_sum(sum, exchange);
            points.further_stages();
            const float scale = scale_of_sum(given_sum(exchange));
            if (thread_index() == 0 && window == 0) params.scale[channel] = scale;
            store(reinterpret_cast<uint4*>(params.spectrum) + int64_t(unit) * (params.fft_size / 4), 1.f / scale);
            block_barrier();
        }
    }
};

constexpr int kFilterControlBytes = kLargeFilterThreads / 32 * 4;
constexpr int filter_shared_bytes(int fft_size) { return FilterPoints::bytes(fft_size / 2) + kFilterControlBytes; }

DEVICE void filter_spectra(const FilterParams& params) {
    float* const exchange = reinterpret_cast<float*>(shared_memory());
    const FilterPoints points{reinterpret_cast<Complex*>(shared_memory() + kFilterControlBytes), params.log_points - 1};
    FilterSpectrum{params, points, exchange}.run();
}

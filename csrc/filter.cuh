// Spectra of filters for the other kernels: half precision, in kernel order, each with the power of two that was taken out.
// A filter has N points: causal taps from the start, anticausal ones from the end, the skip weight added at lag zero. Folded (csrc/transform.cuh), those
// from the end are imaginary, and the point n is multiplied by w_N^(n / 4), for the quarter of a frequency. One block transforms the points in single
// precision, in place in shared memory. What is rounded to half precision is the result alone: rounded stages, as sequences go through, would cost a
// bfloat16 output of few positions too much.
#pragma once
#include <algorithm>

#include "small_transform.cuh"
#include "tile.cuh"

// Where several blocks share a multiprocessor; a filter of the most points has one to itself.
constexpr int kLogFilterThreads = 8, kFilterThreads = 1 << kLogFilterThreads, kFilterBlocks = 3, kLargeFilterThreads = 512;
// The most points, and the fewest that may go in passes (csrc/long_filter.cuh).
constexpr int kMaximumFilterPoints = 16384, kFewestInPasses = 8192;
constexpr bool is_large_filter(int fft_size) { return fft_size == kMaximumFilterPoints; }
// A butterfly of sixteen complex points each, as far as there are threads.
constexpr int filter_threads(int fft_size) { return is_large_filter(fft_size) ? kLargeFilterThreads : std::clamp(fft_size / 16, 64, kFilterThreads); }
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

// exp(-2 pi i index / order) for a power of two up to 2^25. Its error is that of single precision, absolute: nothing beside half precision's.
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

    // Points of a window of a filter, equal parts of it apart, from its point `first` on: its own taps; and of a filter without windows those from the end.
    template <int kPoints>
    DEVICE void load_taps(float (&x)[kPoints], int channel, int window, int first) const {
        const int lag = window * fft_size + first, step = fft_size / kPoints;
        const float* row = k + channel * k_stride + lag * k_tap_stride;
#pragma unroll
        for (int t = 0; t < kPoints; t++, row += step * k_tap_stride) x[t] = u32(lag + t * step) < u32(taps) ? row[0] : 0.f;
        if (lag == 0) x[0] += skip_of(channel);
    }
    template <int kPoints>
    DEVICE void load_taps_rev(float (&x)[kPoints], int channel, int first) const {
        const int before = fft_size - 1 - first, step = fft_size / kPoints;
        const float* row = k_rev + channel * k_rev_stride + before * k_rev_tap_stride;
#pragma unroll
        for (int t = 0; t < kPoints; t++, row -= step * k_rev_tap_stride) x[t] = before - t * step < taps_rev ? row[0] : 0.f;
    }

    // A point from its tap and the one that lies N before it.
    DEVICE Complex point(float tap, float before) const { return folded ? Complex{tap, before} : Complex{tap + before, 0.f}; }

    // What points, equal parts apart from `first` on, are multiplied by for the quarter of a frequency.
    template <int kPoints>
    DEVICE void add_quarter(Complex (&x)[kPoints], int first) const {
        constexpr Complex kSteps[] = {{0.70710678118654752f, -0.70710678118654752f}, {0.92387953251128674f, -0.38268343236508977f}, {0.98078528040323044f, -0.19509032201612827f}, {0.99518472667219693f, -0.09801714032956060f}};
        constexpr Complex kStep = kSteps[kPoints == 2 ? 0 : kPoints == 4 ? 1 : kPoints == 8 ? 2 : 3];
        if (!folded) return;
        Complex turn = quarter(first);
#pragma unroll
        for (int t = 0; t < kPoints; t++, turn = turn * kStep) x[t] = x[t] * turn;
    }
    DEVICE Complex quarter(int n) const { return unit_root(n, log_points + 2); }
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
        static_assert(kMaximumFilterPoints <= 1 << 4 * kLogStage, "four stages");
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

// The frequencies of a unit, each pair of neighbours after the other, as the other kernels read them, by the reciprocal of the spectrum's scale; zeros where
// that says that it is not finite.
DEVICE uint4 spectrum_unit(const Complex (&z)[2][2], float down) {
    if (down != down) return {0, 0, 0, 0};
    auto words = [&](Complex x, Complex y) { return uint2{pack(x.re * down, y.re * down), pack(x.im * down, y.im * down)}; };
    const uint2 first = words(z[0][0], z[1][0]), second = words(z[0][1], z[1][1]);
    return {first.x, first.y, second.x, second.y};
}

// The frequency in a place of kernel order: row, fragment, lane and point of csrc/transform.cuh; of the other half of the pair, half the FFT on.
DEVICE int frequency_of(int rows, int row, int fragment, int lane, int point) { return row + rows * (2 * (lane / 4) + point + 16 * (lane % 4 + 4 * fragment)); }

// Of the 64 units of a row in kernel order, that of this thread, and the first of its frequencies if there was no other row: a unit has two neighbours, and
// those half the FFT on.
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

    // In kernel order.
    DEVICE void store(uint4* words, float down) const {
        const int rows = params.fft_size / kColumns, at_once = block_size() / 64, place = spectrum_place(), q = frequency_of_place(place);
        int places[2][2];
        for (int half = 0; half < 2; half++)
            for (int t = 0; t < 2; t++) places[half][t] = FilterPoints::place(points.index_of(rows * (q + t + half * kColumns / 2)));
        for (int row = fresh_thread_index() / 64; row < rows; row += at_once) {
            const Complex* const at_row = points.at(points.index_of(row));
            const Complex z[2][2] = {{at_row[places[0][0]], at_row[places[0][1]]}, {at_row[places[1][0]], at_row[places[1][1]]}};
            words[row * 64 + place] = spectrum_unit(z, down);
        }
    }

    DEVICE void run() const {
        for (int unit = block_index(); unit < params.channels * params.window_count(); unit += block_count()) {
            const int channel = unit / params.window_count(), window = unit % params.window_count();
            float sum = params.windows > 0 ? sum_of_taps(channel) : 0.f;
            points.first_stage([&](auto& x, int first, int) {
                constexpr int kPoints = sizeof(x) / sizeof(Complex);
                float taps[kPoints], before[kPoints] = {};
                params.load_taps(taps, channel, window, first);
                if (window > 0) params.load_taps(before, channel, window - 1, first);
                if (params.taps_rev > 0) params.load_taps_rev(before, channel, first);
#pragma unroll
                for (int t = 0; t < kPoints; t++) {
                    x[t] = params.point(taps[t], before[t]);
                    if (params.windows == 0) sum += absolute(x[t].re) + absolute(x[t].im);
                }
                params.add_quarter(x, first);
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
constexpr int filter_shared_bytes(int fft_size) { return FilterPoints::bytes(fft_size) + kFilterControlBytes; }

DEVICE void filter_spectra(const FilterParams& params) {
    float* const exchange = reinterpret_cast<float*>(shared_memory());
    const FilterPoints points{reinterpret_cast<Complex*>(shared_memory() + kFilterControlBytes), params.log_points};
    FilterSpectrum{params, points, exchange}.run();
}

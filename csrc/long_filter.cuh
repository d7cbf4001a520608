// Spectra of filters that one block cannot hold: M = N / 2 complex points in single precision, of which the first stages go through global memory, each
// thread doing a butterfly, until rows of 4,096 points are left. A block transforms two of them: a real sequence's spectrum at f takes its transform at f and
// at M - f, and with M = A B and f = fa + A fb the row fa meets the row A - fa, the rows 0 and A / 2 themselves. A filter's scale comes from the sum of its
// taps' magnitudes, of which the first stage leaves partial sums. Half-way between these frequencies f meets M - 1 - f, and the row fa the row A - 1 - fa.
#pragma once
#include "filter.cuh"

constexpr int kLogFilterRow = 12, kLogFilterTile = 13;      // B, and the points that a block transforms at a time
constexpr int kLongFilterBytes = FilterPoints::bytes(1 << kLogFilterTile);

// The sum of the magnitudes and the norm of a filter's taps. Outputs of two filters that share a transform are to be of one size, so that none drowns in
// the other's rounding: their scales are as many times their norms as the one needs that needs more.
struct FilterSize {
    float sum, norm;

    // Zero for a filter without a size.
    DEVICE float headroom() const { return exponent_of(sum) < 128 && norm > 0.f ? scale_of_sum(sum) / norm : 0.f; }
    DEVICE float scale(const FilterSize& other) const {
        const float own = headroom(), needed = other.headroom(), scale = norm * (needed > own ? needed : own);
        return own == 0.f ? scale_of_sum(sum) : scale > 0x1p126f ? 0x1p126f : scale;
    }
};

struct LongFilter {
    const FilterParams& params;
    char* const memory;

    DEVICE explicit LongFilter(const FilterParams& params) : params(params), memory(shared_memory()) {}

    DEVICE int log_rows() const { return params.log_points - 1 - kLogFilterRow; }       // of A
    DEVICE Complex* intermediate(int64_t filter) const { return reinterpret_cast<Complex*>(params.work) + (filter << (params.log_points - 1)); }

    // Tiles of a channel or of a group of channels whose taps are read together: as many butterflies of a window as a block has threads.
    HOST_DEVICE static int log_tiles(const FilterParams& params, int log_stage_points) { return params.log_points - 1 - log_stage_points - kLogFilterThreads + params.log_group; }
    HOST_DEVICE static int64_t tiles(const FilterParams& params, int log_stage_points) {
        return int64_t((params.channels - 1 >> params.log_group) + 1) << log_tiles(params, log_stage_points);
    }

    // Of each 2^log_count consecutive threads, a part of a warp or the whole block.
    DEVICE float sum_of_threads(float sum, int log_count) const {
        if (log_count == kLogFilterThreads) return sum_of_block(sum, reinterpret_cast<float*>(memory));
        for (int mask = 1; mask < 1 << log_count; mask *= 2) sum += shuffle_xor(sum, mask);
        return sum;
    }

    // Of all partial sums of the taps, which their norms follow.
    DEVICE int64_t sums_of_channel() const { return int64_t(params.window_count()) << log_tiles(params, log_first_stage(log_rows())); }
    DEVICE int64_t norms() const { return params.channels * sums_of_channel(); }

    // Takes the transform of these points, equal parts of a window apart, half a frequency further. Those of the second half lie before the start.
    template <int kLogPoints>
    DEVICE void half_way(Complex (&x)[1 << kLogPoints], int first) const {
        constexpr Complex kSteps[] = {{0.f, -1.f}, {0.70710678118654752f, -0.70710678118654752f}, {0.92387953251128674f, -0.38268343236508977f}, {0.98078528040323044f, -0.19509032201612827f}};
        Complex turn = unit_root(first, params.log_points);
#pragma unroll
        for (int t = 0; t < 1 << kLogPoints; t++, turn = turn * kSteps[kLogPoints - 1]) {
            if (t == 1 << kLogPoints >> 1) turn = {-turn.re, -turn.im};
            x[t] = x[t] * turn;
        }
    }

    // Gives a thread's points to the thread with the number `to`. All threads.
    template <int kPoints>
    DEVICE void exchange(Complex (&x)[kPoints], int to) const {
        constexpr int kStride = FilterPoints::place(kFilterThreads);
        Complex* const points = reinterpret_cast<Complex*>(memory);
#pragma unroll
        for (int t = 0; t < kPoints; t++) points[t * kStride + FilterPoints::place(to)] = x[t];
        block_barrier();
#pragma unroll
        for (int t = 0; t < kPoints; t++) x[t] = points[t * kStride + FilterPoints::place(thread_index())];
        block_barrier();
    }

    // The first stage, from the taps, window after window: what one starts with the next one has half a circle on. Taps of neighbouring channels are read by
    // neighbouring threads, and exchanged so that neighbouring threads write what lies together.
    template <int kLogPoints>
    DEVICE void first_stage() const {
        constexpr int kPoints = 1 << kLogPoints, kHalf = kPoints / 2;
        const int log_group = params.log_group, log_lanes = kLogFilterThreads - log_group, log_tiles = LongFilter::log_tiles(params, kLogPoints), log_stride = params.log_points - 1 - kLogPoints;
        const int thread = thread_index(), lane = thread & ((1 << log_lanes) - 1), in_group = thread & ((1 << log_group) - 1);
        for (int64_t tile = block_index(); tile < tiles(params, kLogPoints); tile += block_count()) {
            const int part = int(tile & ((1 << log_tiles) - 1)), first = part << log_lanes, column = first + lane;
            const int first_channel = int(tile >> log_tiles) << log_group, channel = first_channel + (thread >> log_lanes);
            Complex before[kHalf] = {};
            const auto load = [&](int half) {
                if (first_channel + in_group < params.channels) params.load_half<kHalf>(before, first_channel + in_group, half, first + (thread >> log_group));
                if (log_group > 0) exchange(before, (in_group << log_lanes) + (thread >> log_group));
            };
            if (params.windows == 0) load(params.second_half(0));
#pragma unroll 1
            for (int window = 0; window < params.window_count(); window++) {
                Complex x[kPoints];
#pragma unroll
                for (int t = 0; t < kHalf; t++) x[kHalf + t] = before[t];
                load(window);
#pragma unroll
                for (int t = 0; t < kHalf; t++) x[t] = before[t];
                const int64_t filter = int64_t(channel) * params.window_count() + window;
                note_size(x, channel, params.partial_sums + (filter << log_tiles) + part, lane, log_lanes);
                if (params.channel_pairs) half_way<kLogPoints>(x, column);
                int of_root = column;       // whose root, worked out ahead, would want registers that the points need
                forget(of_root);
                butterfly(x, unit_root(of_root, params.log_points - 1));
                if (channel < params.channels)
#pragma unroll
                    for (int q = 0; q < kPoints; q++) intermediate(filter)[column + (q << log_stride)] = x[q];
            }
        }
    }

    // The sum of magnitudes and, behind all sums, the norm of the taps that a window does not share with the one before.
    template <int kPoints>
    DEVICE void note_size(const Complex (&x)[kPoints], int channel, float* partial, int lane, int log_lanes) const {
        float sum = 0.f, squares = 0.f;
#pragma unroll
        for (int t = 0; t < (params.windows > 0 ? kPoints / 2 : kPoints); t++) sum += absolute(x[t].re) + absolute(x[t].im);
        sum = sum_of_threads(sum, log_lanes);
        const bool stores = lane == 0 && channel < params.channels;
        if (stores) *partial = sum;
        if (!params.channel_pairs) return;
        // Scaled, so that no square leaves the range.
        const float down = normal_power_of_two(-exponent_of(sum)), up = normal_power_of_two(exponent_of(sum));
#pragma unroll
        for (int t = 0; t < kPoints / 2; t++) squares += x[t].re * down * (x[t].re * down) + x[t].im * down * (x[t].im * down);
        squares = sum_of_threads(squares, log_lanes);
        if (stores) partial[norms()] = square_root(squares) * up;
    }

    // A further stage, of groups of 2^log_size points.
    DEVICE void further_stage() const {
        constexpr int kPoints = 1 << kLogStage;
        const int log_stride = params.log_size - kLogStage, log_butterflies = params.log_points - 1 - kLogStage;      // of a window
        for (int64_t i = int64_t(block_index()) * kFilterThreads + thread_index(); i < int64_t(params.channels) * params.window_count() << log_butterflies; i += int64_t(block_count()) * kFilterThreads) {
            const int butterfly_of_window = int(i & ((1 << log_butterflies) - 1)), column = butterfly_of_window & ((1 << log_stride) - 1);
            Complex* const points = intermediate(i >> log_butterflies) + (butterfly_of_window >> log_stride << params.log_size) + column;
            Complex x[kPoints];
#pragma unroll
            for (int t = 0; t < kPoints; t++) x[t] = points[t << log_stride];
            butterfly(x, unit_root(column, params.log_size));
#pragma unroll
            for (int q = 0; q < kPoints; q++) points[q << log_stride] = x[q];
        }
    }

    // From the partial sums.
    DEVICE float scale_of(int channel) const {
        const FilterSize size = size_of(channel);
        return params.channel_pairs ? size.scale(size_of(channel ^ 1)) : scale_of_sum(size.sum);
    }
    DEVICE FilterSize size_of(int channel) const {
        const float* const sums = params.partial_sums + channel * sums_of_channel();
        const float sum = sum_of_partial(sums, [](float x) { return x; });
        if (!params.channel_pairs) return {sum, 0.f};
        const float down = normal_power_of_two(-exponent_of(sum)), squares = sum_of_partial(sums + norms(), [&](float x) { return x * down * (x * down); });
        return {sum, square_root(squares) * normal_power_of_two(exponent_of(sum))};
    }
    template <class Function>
    DEVICE float sum_of_partial(const float* partial, Function function) const {
        float sum = 0.f;
        for (int64_t i = thread_index(); i < sums_of_channel(); i += kFilterThreads) sum += function(partial[i]);
        return sum_of_block(sum, reinterpret_cast<float*>(memory));
    }

    // Where the stages of a row leave a frequency: its digits in reverse order.
    DEVICE static int place_in_row(int fb) {
        static_assert(kLogFilterRow == 3 * kLogStage && kLogStage == 4, "three digits");
        return (fb & 15) << 8 | (fb & 240) | fb >> 8;
    }

    // The rows fa and A - fa or, for fa = 0, the rows 0 and A / 2, and half-way between the frequencies the rows fa and A - 1 - fa.
    DEVICE void rows(int64_t filter, int fa, float scale) const {
        constexpr int kRow = 1 << kLogFilterRow;
        const bool half_way = params.channel_pairs, themselves = fa == 0 && !half_way;
        const int log_a = log_rows(), other = themselves ? 1 << log_a >> 1 : (1 << log_a) - fa - half_way, kernel_rows = params.fft_size / kColumns;
        const FilterPoints both{reinterpret_cast<Complex*>(memory), kLogFilterRow, 1};
        const Complex *const points = intermediate(filter) + (index_of_frequency(fa, log_a) << kLogFilterRow), *const others = intermediate(filter) + (index_of_frequency(other, log_a) << kLogFilterRow);
        both.first_stage([&](auto& x, int first, int log_stride) {
            const Complex* const from = first < kRow ? points + first : others + first - kRow;
#pragma unroll
            for (int t = 0; t < int(sizeof(x) / sizeof(Complex)); t++) x[t] = from[t << log_stride];
        });
        both.further_stages();
        // Each thread has two neighbouring places of kernel order in every fourth of the rows of csrc/transform.cuh that a row holds, which are every A-th.
        constexpr int kStep = kFilterThreads / 64;
        const int place = spectrum_place(), q = frequency_of_place(place);
        const float down = 1.f / scale;
        const Complex step = unit_root(kStep << log_a, params.log_points), next = unit_root(kernel_rows, params.log_points);
        uint4* const words = reinterpret_cast<uint4*>(params.spectrum) + (filter << (params.log_points - 2));
        for (int own = 0; own < (themselves ? 2 : 1); own++) {
            const int first = own ? other : fa, turn = kRow - (first > 0 || half_way);      // from a frequency of a row to its mirror image
            Complex root = params.root(first + ((thread_index() / 64) << log_a) + kernel_rows * q);
            for (int row = thread_index() / 64; row < kRow / (kColumns / 2); row += kStep, root = root * step) {
                Complex z[2], w[2];
#pragma unroll
                for (int t = 0; t < 2; t++) {
                    const int fb = row + kRow / (kColumns / 2) * (q + t), gb = (turn - fb) & (kRow - 1);
                    z[t] = both[(own << kLogFilterRow) + place_in_row(fb)], w[t] = both[((themselves ? own : 1) << kLogFilterRow) + place_in_row(gb)];
                }
                uint4* const mirrored = words + (other + (kRow / (kColumns / 2) - 1 - row << log_a)) * 64 + 63 - place;
                store_spectrum(words + (first + (row << log_a)) * 64 + place, themselves ? nullptr : mirrored, z, w, root, next, down);
            }
        }
        block_barrier();
    }

    HOST_DEVICE static int64_t row_pairs(const FilterParams& params) { return int64_t(params.channels) * params.window_count() << (params.log_points - 1 - kLogFilterTile); }
    DEVICE void row_pass() const {
        for (int64_t i = block_index(); i < row_pairs(params); i += block_count()) {
            const int64_t filter = i >> (log_rows() - 1);
            const int fa = int(i & ((1 << log_rows() >> 1) - 1)), channel = int(filter / params.window_count());
            const float scale = scale_of(channel);
            if (thread_index() == 0 && fa == 0 && filter % params.window_count() == 0) params.scale[channel] = scale;
            rows(filter, fa, scale);
        }
    }
};

// Each of these has what the threads exchange, half a butterfly each; blocks of a multiprocessor at a time; blocks that have work.
template <int kLogPoints>
struct FirstStage {
    DEVICE static void run(const FilterParams& params) { LongFilter(params).first_stage<kLogPoints>(); }
    static constexpr int kBytes = FilterPoints::bytes(kFilterThreads) << kLogPoints >> 1, kAtOnce = kLogPoints < kLogStage ? 4 : kFilterBlocks;
    static int64_t blocks(const FilterParams& params) { return LongFilter::tiles(params, kLogPoints); }
};
struct FurtherStage {
    DEVICE static void run(const FilterParams& params) { LongFilter(params).further_stage(); }
    static constexpr int kBytes = 0, kAtOnce = kFilterBlocks;
    static int64_t blocks(const FilterParams& params) { return int64_t(params.channels) * params.window_count() << (params.log_points - 1 - kLogStage - kLogFilterThreads); }
};

// Calls function(stage, its parameters) for the stages in global memory, one after the other, until an error.
template <class Function>
int for_stages(FilterParams params, Function function) {
    const int log_rows = params.log_points - 1 - kLogFilterRow;
    int error = 0;
    switch (log_first_stage(log_rows)) {
        case 1: error = function(FirstStage<1>{}, params); break;
        case 2: error = function(FirstStage<2>{}, params); break;
        case 3: error = function(FirstStage<3>{}, params); break;
        default: error = function(FirstStage<kLogStage>{}, params);
    }
    for (int left = log_rows - log_first_stage(log_rows); left > 0 && error == 0; left -= kLogStage) {
        params.log_size = left + kLogFilterRow;
        error = function(FurtherStage{}, params);
    }
    return error;
}

// Spectra of filters that one block cannot hold: M = N / 2 complex points in single precision, of which the first stages go through global memory, each
// thread doing a butterfly, until rows of 4,096 points are left. A block transforms two of them: a real sequence's spectrum at f takes its transform at f and
// at M - f, and with M = A B and f = fa + A fb the row fa meets the row A - fa, the rows 0 and A / 2 themselves. A filter's scale comes from the sum of its
// taps' magnitudes, of which the first stage leaves partial sums.
#pragma once
#include "filter.cuh"

constexpr int kLogFilterRow = 12, kLogFilterTile = 13;      // B, and the points that a block transforms at a time
constexpr int kLongFilterBytes = FilterPoints::bytes(1 << kLogFilterTile), kFilterStageBytes = FilterPoints::bytes(kFilterThreads) << kLogStage;

// No value of the spectrum is larger than the sum of the magnitudes, most are smaller by some root of the number of taps: scaled values are below 16, so
// that sums of products with the largest values of a sequence's transform, the root of its length, are half-precision numbers. NaN if it is not finite.
DEVICE float scale_of_sum(float sum) {
    const int exponent = int(bits_from_float(sum) >> 23), root = exponent - 127 - 3;
    return exponent == 255 ? float_from_bits(0x7fc00000u) : power_of_two(root < -126 ? -126 : root);
}

struct LongFilter {
    const FilterParams& params;
    char* const memory;

    DEVICE explicit LongFilter(const FilterParams& params) : params(params), memory(shared_memory()) {}

    DEVICE int log_rows() const { return params.log_points - 1 - kLogFilterRow; }       // of A
    DEVICE Complex* intermediate(int64_t filter) const { return reinterpret_cast<Complex*>(params.work) + (filter << (params.log_points - 1)); }

    // Tiles of a window, of a channel or of a group of channels whose taps are read together: as many butterflies as a block has threads.
    HOST_DEVICE static int log_tiles(const FilterParams& params, int log_stage_points) { return params.log_points - 1 - log_stage_points - kLogFilterThreads + params.log_group; }
    template <int kLogPoints>
    HOST_DEVICE static int64_t tiles(const FilterParams& params) {
        const int64_t groups = (params.channels - 1 >> params.log_group) + 1;
        return groups * params.window_count() << log_tiles(params, kLogPoints);
    }

    // Of each 2^log_count consecutive threads, a part of a warp or the whole block.
    DEVICE float sum_of_threads(float sum, int log_count) const {
        if (log_count == kLogFilterThreads) return sum_of_block(sum, reinterpret_cast<float*>(memory));
        for (int mask = 1; mask < 1 << log_count; mask *= 2) sum += shuffle_xor(sum, mask);
        return sum;
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

    // A stage in global memory; the first one starts from the taps. Windows share their taps, each of which is summed up once. Taps of neighbouring channels
    // are read by neighbouring threads, and exchanged so that neighbouring threads write what lies together.
    template <int kLogPoints, bool kFirst>
    DEVICE void stage() const {
        constexpr int kPoints = 1 << kLogPoints;
        const int log_size = kFirst ? params.log_points - 1 : params.log_size, log_stride = log_size - kLogPoints, windows = params.window_count();
        const int log_group = params.log_group, log_lanes = kLogFilterThreads - log_group, log_tiles = LongFilter::log_tiles(params, kLogPoints);
        const int thread = thread_index(), lane = thread & ((1 << log_lanes) - 1), in_group = thread & ((1 << log_group) - 1);
        for (int64_t tile = block_index(); tile < tiles<kLogPoints>(params); tile += block_count()) {
            const int part = int(tile & ((1 << log_tiles) - 1)), window = int((tile >> log_tiles) % windows), first_channel = int((tile >> log_tiles) / windows) << log_group;
            const int first = part << log_lanes, channel = first_channel + (thread >> log_lanes), column = (first + lane) & ((1 << log_stride) - 1);
            const int64_t filter = int64_t(channel) * windows + window;
            Complex* const points = intermediate(filter) + (first + lane >> log_stride << log_size) + column;
            Complex x[kPoints] = {};
            if (!kFirst) {
#pragma unroll
                for (int t = 0; t < kPoints; t++) x[t] = points[t << log_stride];
            } else {
                if (first_channel + in_group < params.channels) params.load_points(x, first_channel + in_group, window, first + (thread >> log_group));
                if (log_group > 0) exchange(x, (in_group << log_lanes) + (thread >> log_group));
                float sum = 0.f;
#pragma unroll
                for (int t = 0; t < (params.windows > 0 ? kPoints / 2 : kPoints); t++) sum += absolute(x[t].re) + absolute(x[t].im);
                sum = sum_of_threads(sum, log_lanes);
                if (lane == 0 && channel < params.channels) params.partial_sums[(filter << log_tiles) + part] = sum;
            }
            butterfly(x, unit_root(column, log_size));
            if (channel < params.channels)
#pragma unroll
                for (int q = 0; q < kPoints; q++) points[q << log_stride] = x[q];
        }
    }

    // From the partial sums to the scales, a channel in each block.
    DEVICE void scale_pass() const {
        const int64_t count = int64_t(params.window_count()) << log_tiles(params, log_stage(log_rows()));     // of a channel
        for (int channel = block_index(); channel < params.channels; channel += block_count()) {
            float sum = 0.f;
            for (int64_t i = thread_index(); i < count; i += kFilterThreads) sum += params.partial_sums[channel * count + i];
            sum = sum_of_block(sum, reinterpret_cast<float*>(memory));
            if (thread_index() == 0) params.scale[channel] = scale_of_sum(sum);
        }
    }

    // Where the stages of a row leave a frequency: its digits in reverse order.
    DEVICE static int place_in_row(int fb) {
        static_assert(kLogFilterRow == 3 * kLogStage && kLogStage == 4, "three digits");
        return (fb & 15) << 8 | (fb & 240) | fb >> 8;
    }

    // The rows fa and A - fa or, for fa = 0, the rows 0 and A / 2.
    DEVICE void rows(int64_t filter, int fa) const {
        constexpr int kRow = 1 << kLogFilterRow;
        const int log_a = log_rows(), other = fa == 0 ? 1 << log_a >> 1 : (1 << log_a) - fa, kernel_rows = params.fft_size / kColumns;
        const FilterPoints both{reinterpret_cast<Complex*>(memory), kLogFilterRow, 1};
        const Complex *const points = intermediate(filter) + (index_of_frequency(fa, log_a) << kLogFilterRow), *const others = intermediate(filter) + (index_of_frequency(other, log_a) << kLogFilterRow);
#pragma unroll 8
        for (int i = thread_index(); i < kRow; i += kFilterThreads) both[i] = points[i], both[kRow + i] = others[i];
        block_barrier();
        static_assert(kLogFilterRow - kLogStage <= kLogFilterThreads, "one column");
        both.transform<true>();
        // Each thread has two neighbouring places of kernel order in every fourth of the rows of csrc/transform.cuh that a row holds, which are every A-th.
        constexpr int kStep = kFilterThreads / 64;
        const int place = thread_index() % 64, q = frequency_of(1, 0, place / 32, place % 32, 0);
        const float down = 1.f / params.scale[filter / params.window_count()];
        const Complex step = unit_root(kStep << log_a, params.log_points), next = unit_root(kernel_rows, params.log_points);
        uint4* const words = reinterpret_cast<uint4*>(params.spectrum) + (filter << (params.log_points - 2));
        for (int own = 0; own < (fa == 0 ? 2 : 1); own++) {
            const int first = own ? other : fa;
            Complex root = unit_root(first + ((thread_index() / 64) << log_a) + kernel_rows * q, params.log_points);
            for (int row = thread_index() / 64; row < kRow / (kColumns / 2); row += kStep, root = root * step) {
                uint2 pair[2], mirrored[2];
                for (int t = 0; t < 2; t++) {
                    const int fb = row + kRow / (kColumns / 2) * (q + t), gb = (first == 0 ? kRow - fb : kRow - 1 - fb) & (kRow - 1);
                    const Complex z = both[(own << kLogFilterRow) + place_in_row(fb)], w = both[((fa == 0 ? own : 1) << kLogFilterRow) + place_in_row(gb)];
                    Complex x, y;
                    unpack_pair(z, conjugate(w), t ? root * next : root, x, y);
                    pair[t] = scaled_pair(x, y, down), mirrored[1 - t] = scaled_pair(conjugate(y), conjugate(x), down);
                }
                words[(first + (row << log_a)) * 64 + place] = {pair[0].x, pair[0].y, pair[1].x, pair[1].y};
                if (fa != 0) words[(other + (kRow / (kColumns / 2) - 1 - row << log_a)) * 64 + 63 - place] = {mirrored[0].x, mirrored[0].y, mirrored[1].x, mirrored[1].y};
            }
        }
        block_barrier();
    }

    HOST_DEVICE static int64_t row_pairs(const FilterParams& params) { return int64_t(params.channels) * params.window_count() << (params.log_points - 1 - kLogFilterTile); }
    DEVICE void row_pass() const {
        for (int64_t i = block_index(); i < row_pairs(params); i += block_count()) rows(i >> (log_rows() - 1), int(i & ((1 << log_rows() >> 1) - 1)));
    }
};

template <int kLogPoints_, bool kFirst_>
struct FilterStage {
    static constexpr int kLogPoints = kLogPoints_;
    static constexpr bool kFirst = kFirst_;
};

// Calls function(FilterStage<...>{}, its parameters) for the stages in global memory, one after the other, until an error.
template <class Function>
int for_stages(FilterParams params, Function function) {
    int left = params.log_points - 1 - kLogFilterRow;
    int error = left == 2 ? function(FilterStage<2, true>{}, params) : left == 3 ? function(FilterStage<3, true>{}, params) : function(FilterStage<kLogStage, true>{}, params);
    for (left -= log_stage(left), params.log_group = 0; left > 0 && error == 0; left -= log_stage(left)) {
        params.log_size = left + kLogFilterRow;
        switch (log_stage(left)) {
            case 1: error = function(FilterStage<1, false>{}, params); break;
            case 2: error = function(FilterStage<2, false>{}, params); break;
            case 3: error = function(FilterStage<3, false>{}, params); break;
            default: error = function(FilterStage<kLogStage, false>{}, params);
        }
    }
    return error;
}

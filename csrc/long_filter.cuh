// Spectra of filters that one block cannot hold: points in single precision, of which the first stages go through global memory, each thread doing a
// butterfly, until rows of 4,096 points are left, each for the frequencies f = fa + A fb of one fa, with N = A 4,096. A filter's scale comes from the sum of
// its taps' magnitudes, of which the first stage leaves partial sums.
#pragma once
#include "filter.cuh"

constexpr int kLogFilterRow = 12, kLogFilterTile = 13;      // of a row, and of what a block transforms at a time
constexpr int kLongFilterBytes = FilterPoints::bytes(1 << kLogFilterTile);

struct LongFilter {
    const FilterParams& params;
    char* const memory;

    DEVICE explicit LongFilter(const FilterParams& params) : params(params), memory(shared_memory()) {}

    DEVICE int log_rows() const { return params.log_points - kLogFilterRow; }       // of A
    DEVICE Complex* intermediate(int64_t filter) const { return reinterpret_cast<Complex*>(params.work) + (filter << params.log_points); }

    // Tiles of a channel or of a group of channels whose taps are read together: as many butterflies of a window as a block has threads.
    HOST_DEVICE static int log_tiles(const FilterParams& params, int log_stage_points) { return params.log_points - log_stage_points - kLogFilterThreads + params.log_group; }
    HOST_DEVICE static int64_t tiles(const FilterParams& params, int log_stage_points) {
        return int64_t((params.channels - 1 >> params.log_group) + 1) << log_tiles(params, log_stage_points);
    }

    // Of each 2^log_count consecutive threads, a part of a warp or the whole block.
    DEVICE float sum_of_threads(float sum, int log_count) const {
        if (log_count == kLogFilterThreads) return sum_of_block(sum, reinterpret_cast<float*>(memory));
        for (int mask = 1; mask < 1 << log_count; mask *= 2) sum += shuffle_xor(sum, mask);
        return sum;
    }

    // Partial sums of the taps.
    DEVICE int64_t sums_of_channel() const { return int64_t(params.window_count()) << log_tiles(params, log_first_stage(log_rows())); }

    // Gives a thread's taps to the thread with the number `to`. All threads.
    template <int kPoints>
    DEVICE void exchange(float (&x)[kPoints], int to) const {
        float* const taps = reinterpret_cast<float*>(memory);
#pragma unroll
        for (int t = 0; t < kPoints; t++) taps[t * kExchangeStride + FilterPoints::place(to)] = x[t];
        block_barrier();
#pragma unroll
        for (int t = 0; t < kPoints; t++) x[t] = taps[t * kExchangeStride + FilterPoints::place(thread_index())];
        block_barrier();
    }
    static constexpr int kExchangeStride = FilterPoints::place(kFilterThreads);

    // The first stage, from the taps, window after window: each is what lies before the next one. Taps of neighbouring channels are read by neighbouring
    // threads, and exchanged so that neighbouring threads write what lies together.
    template <int kLogPoints>
    DEVICE void first_stage() const {
        constexpr int kPoints = 1 << kLogPoints;
        const int log_group = params.log_group, log_lanes = kLogFilterThreads - log_group, log_tiles = LongFilter::log_tiles(params, kLogPoints), log_stride = params.log_points - kLogPoints;
        const int thread = thread_index(), lane = thread & ((1 << log_lanes) - 1), in_group = thread & ((1 << log_group) - 1);
        for (int64_t tile = block_index(); tile < tiles(params, kLogPoints); tile += block_count()) {
            const int part = int(tile & ((1 << log_tiles) - 1)), first = part << log_lanes, column = first + lane;
            const int first_channel = int(tile >> log_tiles) << log_group, channel = first_channel + (thread >> log_lanes);
            const int read_channel = first_channel + in_group, read_column = first + (thread >> log_group);
            float before[kPoints] = {};
            if (params.taps_rev > 0) {
                if (read_channel < params.channels) params.load_taps_rev(before, read_channel, read_column);
                if (log_group > 0) exchange(before, (in_group << log_lanes) + (thread >> log_group));
            }
#pragma unroll 1
            for (int window = 0; window < params.window_count(); window++) {
                float taps[kPoints] = {};
                if (read_channel < params.channels) params.load_taps(taps, read_channel, window, read_column);
                if (log_group > 0) exchange(taps, (in_group << log_lanes) + (thread >> log_group));
                const int64_t filter = int64_t(channel) * params.window_count() + window;
                Complex x[kPoints];
                float sum = 0.f;
#pragma unroll
                for (int t = 0; t < kPoints; t++) {
                    x[t] = params.point(taps[t], before[t]), before[t] = taps[t];
                    sum += absolute(x[t].re) + (params.windows == 0 ? absolute(x[t].im) : 0.f);
                }
                sum = sum_of_threads(sum, log_lanes);
                if (lane == 0 && channel < params.channels) params.partial_sums[(filter << log_tiles) + part] = sum;
                int of_root = column;       // whose roots, worked out ahead, would want registers that the points need
                forget(of_root);
                params.add_quarter(x, of_root);
                butterfly(x, unit_root(of_root, params.log_points));
                if (channel < params.channels)
#pragma unroll
                    for (int q = 0; q < kPoints; q++) intermediate(filter)[column + (q << log_stride)] = x[q];
            }
        }
    }

    // A further stage, of groups of 2^log_size points.
    DEVICE void further_stage() const {
        constexpr int kPoints = 1 << kLogStage;
        const int log_stride = params.log_size - kLogStage, log_butterflies = params.log_points - kLogStage;      // of a window
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
        const float* const sums = params.partial_sums + channel * sums_of_channel();
        float sum = 0.f;
        for (int64_t i = thread_index(); i < sums_of_channel(); i += kFilterThreads) sum += sums[i];
        return scale_of_sum(sum_of_block(sum, reinterpret_cast<float*>(memory)));
    }

    // Where the stages of a row leave a frequency: its digits in reverse order.
    DEVICE static int place_in_row(int fb) {
        static_assert(kLogFilterRow == 3 * kLogStage && kLogStage == 4, "three digits");
        return (fb & 15) << 8 | (fb & 240) | fb >> 8;
    }

    // The rows fa and fa + 1.
    DEVICE void rows(int64_t filter, int fa, float scale) const {
        constexpr int kRow = 1 << kLogFilterRow, kRows = kRow / kColumns;
        const int log_a = log_rows();
        const FilterPoints both{reinterpret_cast<Complex*>(memory), kLogFilterRow, 1};
        const Complex *const points = intermediate(filter) + (index_of_frequency(fa, log_a) << kLogFilterRow), *const others = intermediate(filter) + (index_of_frequency(fa + 1, log_a) << kLogFilterRow);
        both.first_stage([&](auto& x, int first, int log_stride) {
            const Complex* const from = first < kRow ? points + first : others + first - kRow;
#pragma unroll
            for (int t = 0; t < int(sizeof(x) / sizeof(Complex)); t++) x[t] = from[t << log_stride];
        });
        both.further_stages();
        // A row has kRows of the rows of csrc/transform.cuh, which are every A-th.
        const int place = spectrum_place(), q = frequency_of_place(place);
        const float down = 1.f / scale;
        uint4* const words = reinterpret_cast<uint4*>(params.spectrum) + (filter << (params.log_points - 2));
        for (int i = thread_index() / 64; i < 2 * kRows; i += kFilterThreads / 64) {
            const int own = i % 2, row = i / 2;
            auto at = [&](int column) { return both[own * kRow + place_in_row(row + kRows * column)]; };
            const Complex z[2][2] = {{at(q), at(q + 1)}, {at(q + kColumns / 2), at(q + kColumns / 2 + 1)}};
            words[(fa + own + (row << log_a)) * 64 + place] = spectrum_unit(z, down);
        }
        block_barrier();
    }

    HOST_DEVICE static int64_t row_pairs(const FilterParams& params) { return int64_t(params.channels) * params.window_count() << (params.log_points - kLogFilterTile); }
    DEVICE void row_pass() const {
        for (int64_t i = block_index(); i < row_pairs(params); i += block_count()) {
            const int64_t filter = i >> (log_rows() - 1);
            const int fa = 2 * int(i & ((1 << log_rows() >> 1) - 1)), channel = int(filter / params.window_count());
            const float scale = scale_of(channel);
            if (thread_index() == 0 && fa == 0 && filter % params.window_count() == 0) params.scale[channel] = scale;
            rows(filter, fa, scale);
        }
    }
};

// Each of these has what the threads exchange; blocks of a multiprocessor at a time; blocks that have work.
template <int kLogPoints>
struct FirstStage {
    DEVICE static void run(const FilterParams& params) { LongFilter(params).first_stage<kLogPoints>(); }
    static constexpr int kBytes = LongFilter::kExchangeStride * 4 << kLogPoints, kAtOnce = kLogPoints < kLogStage ? 4 : kFilterBlocks;
    static int64_t blocks(const FilterParams& params) { return LongFilter::tiles(params, kLogPoints); }
};
struct FurtherStage {
    DEVICE static void run(const FilterParams& params) { LongFilter(params).further_stage(); }
    static constexpr int kBytes = 0, kAtOnce = kFilterBlocks;
    static int64_t blocks(const FilterParams& params) { return int64_t(params.channels) * params.window_count() << (params.log_points - kLogStage - kLogFilterThreads); }
};

// Calls function(stage, its parameters) for the stages in global memory, one after the other, until an error.
template <class Function>
int for_stages(FilterParams params, Function function) {
    const int log_rows = params.log_points - kLogFilterRow;
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

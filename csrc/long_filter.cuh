// Spectra of filters that one block cannot hold, in two passes over an intermediate in single precision. With M = N / 2 = A B complex points,
//
//   n = B a + b,  f = fa + A fb
//
// the first pass transforms over a and multiplies by w_M^(fa b), the second transforms over b. A real sequence's spectrum at f takes its transform at f
// and at M - f, so that the second pass works on the rows fa and A - fa at a time. The scale of a filter comes from the sum of its taps' magnitudes, which is known before.
#pragma once
#include "filter.cuh"

constexpr int kLogFilterRow = 12, kLogFilterTile = 13;      // B, and the points that a block transforms at a time
constexpr int kLongFilterBytes = FilterPoints::bytes(1 << kLogFilterTile);

// No value of the spectrum is larger than the sum of the magnitudes, most are smaller by some root of the number of taps: scaled values are below 16, so
// that sums of products with the largest values of a sequence's transform, the root of its length, are half-precision numbers. NaN if it is not finite.
DEVICE float scale_of_sum(float sum) {
    const int exponent = int(bits_from_float(sum) >> 23), root = exponent - 127 - 3;
    return exponent == 255 ? float_from_bits(0x7fc00000u) : power_of_two(root < -126 ? -126 : root);
}

// The points of a tile of the first pass, or of the last one of csrc/long_taps.cuh: some neighbouring b of a window of a filter or, where taps are read together,
// of several filters. Points of one b lie together.
struct FilterTile {
    FilterPoints points;
    int log_group, first_channel, window, first_b;

    // Of A = 2^log_a. Tiles are counted from (channels, windows) on.
    DEVICE FilterTile(Complex* memory, int log_a, int log_group, int windows, int64_t tile) : points{memory, log_a, kLogFilterTile - log_a}, log_group(log_group) {
        const int log_b = points.log_filters - log_group, log_tiles = kLogFilterRow - log_b;
        first_b = int(tile & ((1 << log_tiles) - 1)) << log_b;
        window = int((tile >> log_tiles) % windows);
        first_channel = int((tile >> log_tiles) / windows) << log_group;
    }
    // What a thread's i-th of 2^kLogFilterTile points is: neighbours in memory first.
    DEVICE int column(int i) const { return i & ((1 << points.log_filters) - 1); }
    DEVICE int channel(int i) const { return first_channel + (i & ((1 << log_group) - 1)); }
    DEVICE int b(int i) const { return first_b + (column(i) >> log_group); }
    DEVICE int a(int i) const { return i >> points.log_filters; }
    DEVICE Complex& at(int i, int index) const { return points[(column(i) << points.log_count) + index]; }
};
// Tiles of all filters of A = 2^log_a.
HOST_DEVICE int64_t filter_tiles(int64_t channels, int windows, int log_a, int log_group) {
    return ((channels - 1 >> log_group) + 1) * windows << (kLogFilterRow + log_a + log_group - kLogFilterTile);
}

struct LongFilter {
    const FilterParams& params;
    const FilterPoints points;

    DEVICE explicit LongFilter(const FilterParams& params) : params(params), points{reinterpret_cast<Complex*>(shared_memory()), 0, 0} {}

    DEVICE int log_columns() const { return params.log_points - 1 - kLogFilterRow; }        // of A
    HOST_DEVICE static int64_t tiles(const FilterParams& params) { return filter_tiles(params.channels, params.window_count(), params.log_points - 1 - kLogFilterRow, params.log_group); }
    DEVICE Complex* intermediate(int64_t filter) const { return reinterpret_cast<Complex*>(params.work) + (filter << (params.log_points - 1)); }

    DEVICE void columns(const FilterTile& tile) const {
        for (int i = thread_index(); i < 1 << kLogFilterTile; i += kFilterThreads) {
            const int channel = tile.channel(i), n = (tile.a(i) << kLogFilterRow) + tile.b(i);
            const bool there = channel < params.channels;
            tile.at(i, tile.a(i)) = {there ? params.tap(channel, tile.window, 2 * n) : 0.f, there ? params.tap(channel, tile.window, 2 * n + 1) : 0.f};
        }
        block_barrier();
        tile.points.transform();
        for (int i = thread_index(); i < 1 << kLogFilterTile; i += kFilterThreads) {
            const int channel = tile.channel(i), b = tile.b(i), fa = tile.a(i);
            if (channel >= params.channels) continue;
            intermediate(int64_t(channel) * params.window_count() + tile.window)[(fa << kLogFilterRow) + b] = tile.at(i, tile.points.index_of(fa)) * unit_root(fa * b, params.log_points - 1);
        }
        block_barrier();
    }

    // The rows fa and A - fa, which may be the same.
    DEVICE void rows(int64_t filter, int fa) const {
        const int columns = 1 << log_columns(), mirrored = (columns - fa) & (columns - 1), count = mirrored == fa ? 1 : 2;
        const FilterPoints both{points.memory, kLogFilterRow, count - 1};
        for (int i = thread_index(); i < count << kLogFilterRow; i += kFilterThreads) {
            const int row = i >> kLogFilterRow ? mirrored : fa;
            both[i] = intermediate(filter)[(row << kLogFilterRow) + (i & ((1 << kLogFilterRow) - 1))];
        }
        block_barrier();
        both.transform();
        const int channel = int(filter / params.window_count()), kernel_rows = params.fft_size / kColumns;
        const float scale = scale_of_sum(params.tap_sums[channel]);
        uint2* const words = reinterpret_cast<uint2*>(params.spectrum) + (filter << (params.log_points - 1));
        for (int i = thread_index(); i < count << kLogFilterRow; i += kFilterThreads) {
            // Kernel order within the rows of csrc/transform.cuh that this row holds: every A-th.
            const int which = i >> kLogFilterRow, own = which ? mirrored : fa, row = own + ((i & ((1 << kLogFilterRow) - 1)) / (kColumns / 2) << log_columns()), place = i % (kColumns / 2);
            const int frequency = frequency_of(kernel_rows, row, place / 64, place / 2 % 32, place % 2), fb = frequency >> log_columns();
            const int other = own == 0 ? -fb & ((1 << kLogFilterRow) - 1) : (1 << kLogFilterRow) - 1 - fb;
            const Complex z = both[(which << kLogFilterRow) + both.index_of(fb)], w = conjugate(both[((count - 1 - which) << kLogFilterRow) + both.index_of(other)]);
            Complex x, y;
            unpack_pair(z, w, unit_root(frequency, params.log_points), x, y);
            words[row * (kColumns / 2) + place] = scaled_pair(x, y, scale);
        }
        if (fa == 0 && filter % params.window_count() == 0 && thread_index() == 0) params.scale[channel] = scale;
        block_barrier();
    }

    DEVICE void column_pass() const {
        for (int64_t i = block_index(); i < tiles(params); i += block_count()) columns(FilterTile(points.memory, log_columns(), params.log_group, params.window_count(), i));
    }
    DEVICE void row_pass() const {
        const int64_t filters = int64_t(params.channels) * params.window_count();
        const int pairs = (1 << log_columns() >> 1) + 1;
        for (int64_t i = block_index(); i < filters * pairs; i += block_count()) rows(i / pairs, int(i % pairs));
    }
};

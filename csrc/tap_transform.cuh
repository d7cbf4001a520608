// From sums of products of spectra to the gradients of the taps: the passes of csrc/filter.cuh and csrc/long_filter.cuh the other way. An inverse transform is
// the forward one between two conjugations, the second of which is a sign at the end. Where one block cannot hold the points they are, between the passes,
// in the place of the sums.
#pragma once
#include "long_filter.cuh"
#include "taps.cuh"

// Conjugated, with what the next window gives to the taps before its own first.
DEVICE Complex with_next(Complex sum, Complex next) { return {sum.re - next.im, sum.im + next.re}; }

// What a window has of sums at the rows of csrc/transform.cuh.
struct WindowSums {
    const TapParams& params;
    const int channel, window;
    const bool add_next;    // those of the next window

    // Loads `count` rows, from `first` on every step-th, of all splits, conjugated. The frequency of the i-th row and column c goes to the point i + count c
    // of those from `to` on.
    DEVICE void load(const FilterPoints& points, int first, int step, int count, int to) const {
        constexpr int kPlaces = kColumns / 2;
        const float4 *const sums = params.window_sums(channel, window), *const next = add_next ? params.window_sums(channel, window + 1) : nullptr;
#pragma unroll 4
        for (int i = thread_index(); i < count * kPlaces; i += block_size()) {
            const int row = i / kPlaces, place = i % kPlaces, column = frequency_of(1, 0, place / 64, place % 32, place / 32 % 2);
            const int64_t at = int64_t(first + row * step) * kPlaces + place;
            float4 v = sums[at];
            for (int split = 1; split < params.splits; split++) accumulate(v, sums[at + int64_t(split) * (params.fft_size / 2)]);
            Complex x = {v.x, -v.y}, y = {v.z, -v.w};
            if (next) {
                const float4 w = next[at];
                x = with_next(x, {w.x, -w.y}), y = with_next(y, {w.z, -w.w});
            }
            points[to + row + count * column] = x, points[to + row + count * (column + kPlaces)] = y;
        }
    }
};

// Gradients of windows that a block holds, one in each block of threads.
DEVICE void transform_windows(const TapParams& params) {
    const FilterPoints points{reinterpret_cast<Complex*>(shared_memory()), params.log_points};
    for (int64_t i = block_index(); i < int64_t(params.channels) * params.windows; i += block_count()) {
        const int channel = int(i / params.windows), window = int(i % params.windows);
        WindowSums{params, channel, window, window < params.windows - 1}.load(points, 0, 1, params.rows(), 0);
        block_barrier();
        points.transform();
        for (int n = thread_index(); n < params.fft_size; n += block_size()) params.store(channel, window, n, points[points.index_of(n)]);
        block_barrier();
    }
}

// The points of a tile of the last pass: some neighbouring b of a window of a filter or, where taps lie together, of several filters. Points of one b lie
// together.
struct TapTile {
    FilterPoints points;
    int log_group, first_channel, window, first_b;

    // Of A = 2^log_a. Tiles are counted from (channels, windows) on.
    DEVICE TapTile(Complex* memory, int log_a, int log_group, int windows, int64_t tile) : points{memory, log_a, kLogFilterTile - log_a}, log_group(log_group) {
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
HOST_DEVICE int64_t tap_tiles(int64_t channels, int windows, int log_a, int log_group) {
    return ((channels - 1 >> log_group) + 1) * windows << (kLogFilterRow + log_a + log_group - kLogFilterTile);
}

// Gradients of longer windows: with N = A B, the frequencies f = fa + A fb and the points n = b + B a, transforms over fb and, after w_N^(fa b), over fa.
struct LongTaps {
    const TapParams& params;
    Complex* const memory;

    DEVICE explicit LongTaps(const TapParams& params) : params(params), memory(reinterpret_cast<Complex*>(shared_memory())) {}

    DEVICE int log_columns() const { return params.log_points - kLogFilterRow; }        // of A
    HOST_DEVICE static int64_t tiles(const TapParams& params) { return tap_tiles(params.channels, params.windows, params.log_points - kLogFilterRow, params.log_group); }
    // Where the sums of the same fa were.
    DEVICE Complex& intermediate(int64_t channel, int window, int fa, int b) const {
        const int row = fa + (b / kColumns << log_columns());
        return reinterpret_cast<Complex*>(params.window_sums(channel, window) + row * (kColumns / 2))[b % kColumns];
    }

    // The rows fa and fa + 1.
    DEVICE void rows(int channel, int window, int fa) const {
        constexpr int kRow = 1 << kLogFilterRow;
        const FilterPoints both{memory, kLogFilterRow, 1};
        for (int own = 0; own < 2; own++) WindowSums{params, channel, window, false}.load(both, fa + own, 1 << log_columns(), kRow / kColumns, own * kRow);
        block_barrier();
        both.transform();
        for (int own = 0; own < 2; own++) {
            const Complex turn = unit_root((fa + own) * block_size(), params.log_points);
            Complex twist = unit_root((fa + own) * thread_index(), params.log_points);
            for (int b = thread_index(); b < kRow; b += block_size(), twist = twist * turn)
                intermediate(channel, window, fa + own, b) = both[own * kRow + LongFilter::place_in_row(b)] * twist;
        }
        block_barrier();
    }

    DEVICE void columns(const TapTile& tile) const {
        const bool last = tile.window == params.windows - 1;
#pragma unroll 4
        for (int i = thread_index(); i < 1 << kLogFilterTile; i += block_size()) {
            const int channel = tile.channel(i) < params.channels ? tile.channel(i) : 0, fa = tile.a(i);
            const Complex value = intermediate(channel, tile.window, fa, tile.b(i));
            tile.at(i, fa) = last ? value : with_next(value, intermediate(channel, tile.window + 1, fa, tile.b(i)));
        }
        block_barrier();
        tile.points.transform();
        for (int i = thread_index(); i < 1 << kLogFilterTile; i += block_size()) {
            const int channel = tile.channel(i);
            if (channel < params.channels) params.store(channel, tile.window, (tile.a(i) << kLogFilterRow) + tile.b(i), tile.at(i, tile.points.index_of(tile.a(i))));
        }
        block_barrier();
    }

    HOST_DEVICE static int row_pairs(const TapParams& params) { return 1 << (params.log_points - kLogFilterTile); }      // of a window
    DEVICE void row_pass() const {
        const int pairs = row_pairs(params);
        for (int64_t i = block_index(); i < int64_t(params.channels) * params.windows * pairs; i += block_count()) rows(int(i / pairs / params.windows), int(i / pairs % params.windows), 2 * int(i % pairs));
    }
    DEVICE void column_pass() const {
        for (int64_t i = block_index(); i < tiles(params); i += block_count()) columns(TapTile(memory, log_columns(), params.log_group, params.windows, i));
    }
};

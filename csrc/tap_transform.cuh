// From sums of products of spectra to the gradients of the taps: the passes of csrc/filter.cuh and csrc/long_filter.cuh the other way. Of the inverse
// transform of N points the real part is asked for, which that of the Hermitian part is, and the latter one of M = N / 2 complex points. An inverse
// transform is the forward one between two conjugations. Where one block cannot hold the points they are, between the passes, in the place of the sums.
#pragma once
#include "long_filter.cuh"
#include "taps.cuh"

// What the windows of a channel have at some places, of all splits: several windows have one.
struct WindowSums {
    const TapParams& params;
    const int64_t channel;
    const int window;
    // Whether with those of the next window, half a circle on: so taps after the lag of a window get what the next gives to those before its own.
    const bool with_next;

    // Of places in these rows or their mirror images, whose frequencies are odd where the row is.
    template <int kCount>
    DEVICE void load(float4 (&sum)[kCount], const int (&place)[kCount], const int (&row)[kCount]) const {
        const float4* const from = params.window_sums(channel, window);
#pragma unroll
        for (int n = 0; n < kCount; n++) sum[n] = from[place[n]];
#pragma unroll 1
        for (int i = 1; i < params.splits; i++)
#pragma unroll
            for (int n = 0; n < kCount; n++) accumulate(sum[n], from[int64_t(i) * (params.fft_size / 2) + place[n]]);
        if (!with_next) return;
        const float4* const next = params.window_sums(channel, window + 1);
#pragma unroll
        for (int n = 0; n < kCount; n++) {
            const float4 x = next[place[n]];
            accumulate(sum[n], row[n] % 2 ? make_float4(-x.x, -x.y, -x.z, -x.w) : x);
        }
    }
};

// Where the sums have a frequency and, in the other half of a float4, the one half the FFT on.
DEVICE int frequency_of_sum(int rows, int place) { return frequency_of(rows, place / 128, place / 64 % 2, place % 32, place / 32 % 2); }

// With M = A B, the points of every A-th row of csrc/transform.cuh are a row of B points here.
struct TapRows {
    const FilterPoints points;      // two such rows, or the only one
    const WindowSums& sums;
    const int log_a;

    // Conjugated, of the M points at f, from the sums v at f and w at M - f, the latter in turn where f = 0, and w_N^f.
    DEVICE static Complex half_spectrum(float4 v, float4 w, Complex root) {
        const Complex x = {0.5f * (v.x + w.z), 0.5f * (v.y - w.w)}, y = {0.5f * (v.z + w.x), 0.5f * (v.w - w.y)};
        const Complex even = x + y, odd = (x - y) * conjugate(root);
        return {even.re - odd.im, -even.im - odd.re};
    }

    // Of row 0.
    DEVICE static int place_of_frequency(int q) { return q / 64 * 64 + q % 2 * 32 + q / 2 % 8 * 4 + q / 16 % 4; }

    // Loads `count` rows of csrc/transform.cuh, from `first` on every A-th, which go to the points from `to` on, and their mirror images, which go to those
    // from `mirrored_to` on. The mirror image of row r and frequency q is row R - r and frequency 127 - q, whose place has all bits turned, but that of row 0
    // is in row 0.
    DEVICE void load(int first, int count, int to, int mirrored_to) const {
        constexpr int kPlaces = kColumns / 2, kAtOnce = 2;
        const TapParams& params = sums.params;
        const int rows = params.rows(), stride = rows >> log_a, step = block_size() / kPlaces, place = thread_index() % kPlaces, q = frequency_of_sum(1, place);
        const Complex turn = unit_root(step << log_a, params.log_points);
        Complex root = unit_root(first + (thread_index() / kPlaces << log_a) + rows * q, params.log_points);
#pragma unroll 1
        for (int start = thread_index() / kPlaces; start < count; start += kAtOnce * step) {
            float4 v[kAtOnce], w[kAtOnce];
            int row[kAtOnce], mirrored[kAtOnce], place_of_row[kAtOnce], place_of_mirrored[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                const int n = start + i * step;
                row[i] = first + ((n < count ? n : count - 1) << log_a), mirrored[i] = (rows - row[i]) & (rows - 1);
                place_of_row[i] = row[i] * kPlaces + place;
                place_of_mirrored[i] = mirrored[i] * kPlaces + (row[i] == 0 ? place_of_frequency(-q & (kPlaces - 1)) : kPlaces - 1 - place);
            }
            sums.load(v, place_of_row, row), sums.load(w, place_of_mirrored, row);
#pragma unroll
            for (int i = 0; i < kAtOnce; i++, root = root * turn) {
                if (start + i * step >= count) break;
                points[to + (row[i] >> log_a) + stride * q] = half_spectrum(v[i], row[i] == 0 && q == 0 ? make_float4(v[i].z, v[i].w, v[i].x, v[i].y) : w[i], root);
                if (mirrored[i] != row[i]) points[mirrored_to + (mirrored[i] >> log_a) + stride * (kPlaces - 1 - q)] = half_spectrum(w[i], v[i], {-root.re, root.im});
            }
        }
    }
};

// Gradients of windows that a block holds, one in each block of threads.
DEVICE void transform_windows(const TapParams& params) {
    const FilterPoints points{reinterpret_cast<Complex*>(shared_memory()), params.log_points - 1};
    for (int64_t i = block_index(); i < int64_t(params.channels) * params.windows; i += block_count()) {
        const int channel = int(i / params.windows), window = int(i % params.windows);
        const WindowSums sums{params, channel, window, window < params.windows - 1};
        TapRows{points, sums, 0}.load(0, params.rows() / 2 + 1, 0, 0);
        block_barrier();
        points.transform();
        for (int n = thread_index(); n < params.fft_size >> (params.several() ? 2 : 1); n += block_size()) params.store_pair(channel, window * (params.fft_size / 2) + 2 * n, points[points.index_of(n)]);
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

// Gradients of longer windows.
struct LongTaps {
    const TapParams& params;
    Complex* const memory;

    DEVICE explicit LongTaps(const TapParams& params) : params(params), memory(reinterpret_cast<Complex*>(shared_memory())) {}

    DEVICE int log_columns() const { return params.log_points - 1 - kLogFilterRow; }        // of A
    HOST_DEVICE static int64_t tiles(const TapParams& params) { return tap_tiles(params.channels, params.windows, params.log_points - 1 - kLogFilterRow, params.log_group); }
    // In the first half of what the sums of a row of csrc/transform.cuh take.
    DEVICE Complex& intermediate(int64_t channel, int window, int fa, int b) const {
        const int row = fa + (b / (kColumns / 2) << log_columns());
        return reinterpret_cast<Complex*>(params.window_sums(channel, window) + row * (kColumns / 2))[b % (kColumns / 2)];
    }

    // The rows fa and A - fa, each other's mirror images, or, for fa = 0, the rows 0 and A / 2, each its own.
    DEVICE void rows(int64_t channel, int window, int fa) const {
        constexpr int kRow = 1 << kLogFilterRow, kRows = kRow / (kColumns / 2);
        const int a = 1 << log_columns(), other = fa == 0 ? a / 2 : a - fa;
        const FilterPoints both{memory, kLogFilterRow, 1};
        const WindowSums sums{params, channel, window, false};
        const TapRows loaded{both, sums, log_columns()};
        if (fa == 0) loaded.load(0, kRows / 2 + 1, 0, 0), loaded.load(a / 2, kRows / 2, kRow, kRow);
        else loaded.load(fa, kRows, 0, kRow);
        block_barrier();
        both.transform();
        for (int half = 0; half < 2; half++) {
            const int own = half ? other : fa;
            const Complex turn = unit_root(own * block_size(), params.log_points - 1);
            Complex twist = unit_root(own * thread_index(), params.log_points - 1);
            for (int b = thread_index(); b < kRow; b += block_size(), twist = twist * turn)
                intermediate(channel, window, own, b) = both[half * kRow + LongFilter::place_in_row(b)] * twist;
        }
        block_barrier();
    }

    // The next window's share, half a circle on, changes the sign of every other fa.
    DEVICE void columns(const TapTile& tile) const {
        const bool last = tile.window == params.windows - 1;
#pragma unroll 4
        for (int i = thread_index(); i < 1 << kLogFilterTile; i += block_size()) {
            const int channel = tile.channel(i) < params.channels ? tile.channel(i) : 0, fa = tile.a(i);
            Complex value = intermediate(channel, tile.window, fa, tile.b(i));
            if (!last) {
                const Complex next = intermediate(channel, tile.window + 1, fa, tile.b(i));
                value = fa % 2 ? value - next : value + next;
            }
            tile.at(i, fa) = value;
        }
        block_barrier();
        tile.points.transform();
        const int count = 1 << (params.several() ? kLogFilterTile - 1 : kLogFilterTile);
        for (int i = thread_index(); i < count; i += block_size()) {
            const int channel = tile.channel(i), tap = tile.window * (params.fft_size / 2) + 2 * ((tile.a(i) << kLogFilterRow) + tile.b(i));
            const Complex value = tile.at(i, tile.points.index_of(tile.a(i)));
            if (channel < params.channels) params.store_pair(channel, tap, value);
        }
        block_barrier();
    }

    HOST_DEVICE static int row_pairs(const TapParams& params) { return 1 << (params.log_points - 1 - kLogFilterTile); }      // of a window
    DEVICE void row_pass() const {
        const int pairs = row_pairs(params);
        for (int64_t i = block_index(); i < int64_t(params.channels) * params.windows * pairs; i += block_count()) rows(i / pairs / params.windows, int(i / pairs % params.windows), int(i % pairs));
    }
    DEVICE void column_pass() const {
        for (int64_t i = block_index(); i < tiles(params); i += block_count()) columns(TapTile(memory, log_columns(), params.log_group, params.windows, i));
    }
};

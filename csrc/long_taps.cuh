// From the sums of csrc/taps.cuh to the gradients of the taps where one block cannot hold a window: the passes of csrc/long_filter.cuh the other way. Of the
// inverse transform of N points the real part is asked for, which that of the Hermitian part is, and the latter one of M = N / 2 complex points. Between
// the passes these are in the place of the sums. An inverse transform is the forward one between two conjugations.
#pragma once
#include "long_filter.cuh"
#include "taps.cuh"

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

struct LongTaps {
    const TapParams& params;
    const FilterPoints points;

    DEVICE explicit LongTaps(const TapParams& params) : params(params), points{reinterpret_cast<Complex*>(shared_memory()), 0, 0} {}

    DEVICE int log_columns() const { return params.log_points - 1 - kLogFilterRow; }        // of A
    HOST_DEVICE static int64_t tiles(const TapParams& params) { return tap_tiles(params.channels, params.windows, params.log_points - 1 - kLogFilterRow, params.log_group); }
    // In the first half of what the sums of a row of csrc/transform.cuh take; this row holds every A-th of those.
    DEVICE Complex& intermediate(int64_t channel, int window, int fa, int b) const {
        const int row = fa + (b / (kColumns / 2) << log_columns());
        return reinterpret_cast<Complex*>(params.window_sums(channel, window) + row * (kColumns / 2))[b % (kColumns / 2)];
    }

    // Conjugated, of the M points at f, from the sums v at f and w at M - f, the latter in turn where f = 0, and w_N^f.
    DEVICE static Complex half_spectrum(float4 v, float4 w, Complex root) {
        const Complex x = {0.5f * (v.x + w.z), 0.5f * (v.y - w.w)}, y = {0.5f * (v.z + w.x), 0.5f * (v.w - w.y)};
        const Complex even = x + y, odd = (x - y) * conjugate(root);
        return {even.re - odd.im, -even.im - odd.re};
    }

    // The rows fa and A - fa or, for fa = 0, the rows 0 and A / 2, each its own mirror image. Each thread has one place of every other of the rows of
    // csrc/transform.cuh that these hold, which are every A-th. The mirror image of row r and frequency q is row R - r and frequency 127 - q, whose place has
    // all bits turned, but that of row 0 is in row 0.
    DEVICE void rows(int64_t channel, int window, int fa) const {
        constexpr int kPlaces = kColumns / 2, kRow = 1 << kLogFilterRow, kRows = kRow / kPlaces, kStep = kFilterThreads / kPlaces, kAtOnce = 4;
        const bool themselves = fa == 0;
        const int log_a = log_columns(), other = themselves ? 1 << log_a >> 1 : (1 << log_a) - fa;
        const FilterPoints both{points.memory, kLogFilterRow, 1};
        const float4* const sums = params.window_sums(channel, window);
        const int place = thread_index() % kPlaces, q = frequency_of_sum(1, place);
        const Complex step = unit_root(kStep << log_a, params.log_points);
        for (int own = 0; own < (themselves ? 2 : 1); own++) {
            const int first = own ? other : fa, mirrored = themselves ? first : other;
            Complex root = unit_root(first + (thread_index() / kPlaces << log_a) + params.rows() * q, params.log_points);
#pragma unroll 1
            for (int start = thread_index() / kPlaces; start < kRows; start += kAtOnce * kStep) {
                float4 v[kAtOnce], w[kAtOnce];
                int row[kAtOnce], mirrored_row[kAtOnce], places[kAtOnce], mirrored_places[kAtOnce];
                bool zero[kAtOnce];
#pragma unroll
                for (int i = 0; i < kAtOnce; i++) {
                    row[i] = start + i * kStep, zero[i] = first == 0 && row[i] == 0;
                    mirrored_row[i] = zero[i] ? 0 : kRows - (first > 0) - row[i];
                    places[i] = (first + (row[i] << log_a)) * kPlaces + place;
                    mirrored_places[i] = (mirrored + (mirrored_row[i] << log_a)) * kPlaces + (zero[i] ? place_of_frequency(-q & (kPlaces - 1)) : kPlaces - 1 - place);
                }
                params.sum_splits(v, sums, places), params.sum_splits(w, sums, mirrored_places);
#pragma unroll
                for (int i = 0; i < kAtOnce; i++, root = root * step) {
                    both[own * kRow + row[i] + kRows * q] = half_spectrum(v[i], zero[i] && q == 0 ? make_float4(v[i].z, v[i].w, v[i].x, v[i].y) : w[i], root);
                    if (!themselves) both[kRow + mirrored_row[i] + kRows * (kPlaces - 1 - q)] = half_spectrum(w[i], v[i], {-root.re, root.im});
                }
            }
        }
        block_barrier();
        both.transform();
        for (int half = 0; half < 2; half++) {
            const int own = half ? other : fa;
            const Complex turn = unit_root(own * kFilterThreads, params.log_points - 1);
            Complex twist = unit_root(own * thread_index(), params.log_points - 1);
            for (int b = thread_index(); b < kRow; b += kFilterThreads, twist = twist * turn)
                intermediate(channel, window, own, b) = both[half * kRow + LongFilter::place_in_row(b)] * twist;
        }
        block_barrier();
    }
    // Of row 0.
    DEVICE static int place_of_frequency(int q) { return q / 64 * 64 + q % 2 * 32 + q / 2 % 8 * 4 + q / 16 % 4; }

    // The taps after the lag of a window get what the next window gives to those before its own: half a circle on, a change of sign of every other fa.
    DEVICE void columns(const TapTile& tile) const {
        const int half = params.fft_size / 2;
        const bool last = tile.window == params.windows - 1;
#pragma unroll 4
        for (int i = thread_index(); i < 1 << kLogFilterTile; i += kFilterThreads) {
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
        for (int i = thread_index(); i < count; i += kFilterThreads) {
            const int channel = tile.channel(i), tap = tile.window * half + 2 * ((tile.a(i) << kLogFilterRow) + tile.b(i));
            const Complex value = tile.at(i, tile.points.index_of(tile.a(i)));
            if (channel < params.channels) params.store(channel, tap, value.re), params.store(channel, tap + 1, -value.im);
        }
        block_barrier();
    }

    HOST_DEVICE static int row_pairs(const TapParams& params) { return 1 << (params.log_points - 1 - kLogFilterTile); }      // of a window
    DEVICE void row_pass() const {
        const int pairs = row_pairs(params);
        for (int64_t i = block_index(); i < int64_t(params.channels) * params.windows * pairs; i += block_count()) rows(i / pairs / params.windows, int(i / pairs % params.windows), int(i % pairs));
    }
    DEVICE void column_pass() const {
        for (int64_t i = block_index(); i < tiles(params); i += block_count()) columns(TapTile(points.memory, log_columns(), params.log_group, params.windows, i));
    }
};

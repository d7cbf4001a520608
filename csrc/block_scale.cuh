// The scales of blocked sequences. Spectra of several blocks are added up, so that all blocks of a sequence need one scale before the first of them
// is transformed. It is taken from samples of the sequence; one whose blocks then turn out not to fit it is done again, by a scale from all.
#pragma once
#include "tile_io.cuh"

// What brings a sequence to a root mean square near one, and what undoes it; zero and NaN if the sequence is not finite.
struct BlockScale {
    float down, up;

    // Of an energy given as value 4^exponent.
    DEVICE static BlockScale of(float value, int exponent, int length) {
        const int root = root_exponent(value, exponent, length);
        // Between 1 and 2. So the two sequences of a pair are of one size, and so are their errors.
        const u32 mean = bits_from_float(value / float(length));
        const float rest = square_root(float_from_bits((mean & 0x7fffffu) | (mean >> 23 & 1 ? 127u : 128u) << 23));
        return {power_of_two(-root) / rest, power_of_two(root) * rest};
    }
};

// Called by a group of eight warps, for a whole row.
template <class T>
struct BlockScales {
    using Element = typename T::Element;
    static constexpr int kUnit = 16 / int(sizeof(Element));     // neighbours that each thread samples
    const LaunchParams& params;
    float* exchange;        // shared memory, one for each warp, which nobody reads any more
    int group, warp, lane;

    // So many threads sample neighbours, in 64 places of a sequence from its first positions to its last, where gradients of a loss at one position are.
    static constexpr int kTogether = 4, kPlaces = T::kThreads / kTogether;
    DEVICE int first_sample() const {
        const int thread = fresh_thread_index() % T::kThreads, last = params.length - kTogether * kUnit;
        const int before_last = int(int64_t(last) * (kPlaces - 1 - thread / kTogether) / (kPlaces - 1)) / kUnit * kUnit;
        return last - before_last + thread % kTogether * kUnit;
    }

    // Sends for what from_samples will read, a line for each place.
    DEVICE void start(const TileSequences& row) const {
        const Element* const u = row.address<const Element>(params.u, 0) + first_sample();
        const Element* const gate = row.address<const Element>(params.pre_gate, 0) + first_sample();
        if (fresh_thread_index() % kTogether != 0) return;
        prefetch(u);
        if (params.pre_gate.data) prefetch(gate);
    }

    DEVICE BlockScale from_samples(const TileSequences& row) const {
        float sum = 0.f;
        auto add = [&](Pair v) { sum += v.x * v.x + v.y * v.y; };
        if (params.whole_units) {
            const uint4 values = load_spectrum(reinterpret_cast<const uint4*>(row.address<const Element>(params.u, 0) + first_sample()));
            uint4 gates = {};
            if (params.pre_gate.data) gates = load_spectrum(reinterpret_cast<const uint4*>(row.address<const Element>(params.pre_gate, 0) + first_sample()));
            for (int i = 0; i < kUnit / 2; i++) {
                const Pair v = elements(values, i), g = elements(gates, i);
                add(params.pre_gate.data ? Pair{v.x * g.x, v.y * g.y} : v);
            }
        } else {
            visit(row, first_sample(), first_sample() + kUnit, 2, add);
        }
        sum = group_sum(sum);
        return sum > 0x1p-60f && sum < 0x1p100f ? BlockScale::of(sum, 0, kUnit * T::kThreads) : BlockScale{1.f, 1.f};
    }

    // Whether the scale fits a row whose scaled blocks have this largest mean square.
    DEVICE static bool fits(float largest) { return largest >= 0x1p-12f && largest <= 32.f; }

    DEVICE BlockScale from_all(const TileSequences& row) const { return from_all(*this, row); }

private:
    RARE BlockScale from_all(BlockScales scales, TileSequences row) { return scales.measure(row); }
    DEVICE BlockScale measure(const TileSequences& row) const {
        const int first = 2 * (thread_index() % T::kThreads);
        u32 largest = 0;
        visit(row, first, params.length, 2 * T::kThreads, [&](Pair v) {
            const u32 a = bits_from_float(v.x) & 0x7fffffffu, b = bits_from_float(v.y) & 0x7fffffffu, larger = a > b ? a : b;
            largest = larger > largest ? larger : largest;
        });
        largest = group_maximum(largest);
        const int exponent = largest >> 23 < 1 ? -126 : int(largest >> 23) - 127;
        const float down = power_of_two(-exponent < 127 ? -exponent : 127);
        float sum = 0.f;
        visit(row, first, params.length, 2 * T::kThreads, [&](Pair v) { sum += v.x * down * (v.x * down) + v.y * down * (v.y * down); });
        sum = group_sum(sum);
        return largest == 0 ? BlockScale{1.f, 1.f} : exponent == 128 ? BlockScale{0.f, float_from_bits(0x7fc00000u)} : BlockScale::of(sum, exponent, params.length);
    }

    // The i-th two elements of a vector.
    DEVICE static Pair elements(uint4 v, int i) {
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        if constexpr (sizeof(Element) == 2)
            return widen(static_cast<const Element*>(nullptr), words[i]);
        else
            return {float_from_bits(words[2 * i]), float_from_bits(words[2 * i + 1])};
    }

    // Calls function for gated neighbours: those at `first` and every `step` positions on, as far as `end`.
    template <class Function>
    DEVICE void visit(const TileSequences& row, int first, int end, int step, Function function) const {
        const GlobalSequence<const Element, false> u(params.u, params, row, 0), gate(params.pre_gate, params, row, 0);
#pragma unroll 4
        for (int position = first; position < end; position += step) {
            Pair v = u.load(position);
            if (params.pre_gate.data) {
                const Pair g = gate.load(position);
                v = {v.x * g.x, v.y * g.y};
            }
            function(v);
        }
    }

    // Barriers follow the reads too: what comes next in the same place may come from a warp that is ahead.
    DEVICE float group_sum(float x) const {
        for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
        if (lane == 0) exchange[warp] = x;
        group_barrier(group);
        float sum = 0.f;
        for (int w = 0; w < T::kWarps; w++) sum += exchange[w];
        group_barrier(group);
        return sum;
    }

    DEVICE u32 group_maximum(u32 x) const {
        x = warp_maximum(x);
        if (lane == 0) exchange[warp] = float_from_bits(x);
        group_barrier(group);
        for (int w = 0; w < T::kWarps; w++) {
            const u32 other = bits_from_float(exchange[w]);
            x = other > x ? other : x;
        }
        group_barrier(group);
        return x;
    }
};

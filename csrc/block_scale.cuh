// The scales of blocked sequences. Spectra of several blocks are added up, so that all blocks of a sequence need one scale before the first of them
// is transformed. It is taken from samples of the sequence; a pair whose blocks then turn out not to fit it is done again, by a scale from all.
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

    // One scale for both sequences of a pair, those of lanes 2 p and 2 p + 1, so that products of their spectra may be added up; a sequence of
    // zeros or one that is not finite keeps its own.
    DEVICE BlockScale common() const {
        const BlockScale other{shuffle_xor(down, 1), shuffle_xor(up, 1)};
        const bool both = down != 0.f && up != 0.f && other.down != 0.f && other.up != 0.f;
        return both && other.down < down ? other : *this;
    }
    // What undoes it.
    DEVICE float undo_common() const {
        return larger_or_nan(up, shuffle_xor(up, 1));
    }
};

// Called by a group of eight warps; the results are those of sequence lane % 2 of a pair.
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
    DEVICE void start(const TileSequences& pair) const {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const Element* const u = pair.address<const Element>(params.u, c) + first_sample();
            const Element* const gate = pair.address<const Element>(params.pre_gate, c) + first_sample();
            if (fresh_thread_index() % kTogether != 0) continue;
            prefetch(u);
            if (params.pre_gate.data) prefetch(gate);
        }
    }

    DEVICE BlockScale from_samples(const TileSequences& pair) const {
        const bool present = shuffle(int(pair.valid), lane % 2);
        BlockScale scale{1.f, present ? 1.f : 0.f};
        uint4 values[2], gates[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            if (!params.whole_units) break;
            values[c] = load_spectrum(reinterpret_cast<const uint4*>(pair.address<const Element>(params.u, c) + first_sample()));
            if (params.pre_gate.data) gates[c] = load_spectrum(reinterpret_cast<const uint4*>(pair.address<const Element>(params.pre_gate, c) + first_sample()));
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float sum = 0.f;
            auto add = [&](Pair v) { sum += v.x * v.x + v.y * v.y; };
            if (params.whole_units) {
                for (int i = 0; i < kUnit / 2; i++) {
                    const Pair v = elements(values[c], i), g = elements(gates[c], i);
                    add(params.pre_gate.data ? Pair{v.x * g.x, v.y * g.y} : v);
                }
            } else {
                visit(pair, c, first_sample(), first_sample() + kUnit, 2, add);
            }
            sum = group_sum(sum);
            if (present && sum > 0x1p-60f && sum < 0x1p100f && lane % 2 == c) scale = BlockScale::of(sum, 0, kUnit * T::kThreads);
        }
        return scale;
    }

    // Whether the scales fit a pair. Its first lanes have the largest mean square of the scaled blocks of each sequence, and whether there is one: neither
    // drowns in the rounding of the other, or leaves the range of half precision. All lanes of a warp.
    DEVICE static bool fit(float largest, bool valid, int lane) {
        const float neighbour = shuffle_xor(largest, 1);
        const float other = shuffle_xor(int(valid), 1) ? neighbour : largest;
        return !warp_any(valid && lane < 2 && !(largest >= 0x1p-12f && largest <= 32.f && largest <= 64.f * other));
    }

    DEVICE BlockScale from_all(const TileSequences& pair) const { return from_all(*this, pair); }

private:
    RARE BlockScale from_all(BlockScales scales, TileSequences pair) { return scales.measure(pair); }
    DEVICE BlockScale measure(const TileSequences& pair) const {
        BlockScale scale{1.f, 1.f};
        const int first = 2 * (thread_index() % T::kThreads);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            u32 largest = 0;
            visit(pair, c, first, params.length, 2 * T::kThreads, [&](Pair v) {
                const u32 a = bits_from_float(v.x) & 0x7fffffffu, b = bits_from_float(v.y) & 0x7fffffffu, larger = a > b ? a : b;
                largest = larger > largest ? larger : largest;
            });
            largest = group_maximum(largest);
            const int exponent = largest >> 23 < 1 ? -126 : int(largest >> 23) - 127;
            const float down = power_of_two(-exponent < 127 ? -exponent : 127);
            float sum = 0.f;
            visit(pair, c, first, params.length, 2 * T::kThreads, [&](Pair v) { sum += v.x * down * (v.x * down) + v.y * down * (v.y * down); });
            sum = group_sum(sum);
            if (lane % 2 != c) continue;
            // What the rounding of the other sequence leaves of zeros is zero.
            scale = largest == 0 ? BlockScale{1.f, 0.f} : exponent == 128 ? BlockScale{0.f, float_from_bits(0x7fc00000u)} : BlockScale::of(sum, exponent, params.length);
        }
        return scale;
    }

    // The i-th two elements of a vector.
    DEVICE static Pair elements(uint4 v, int i) {
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        if constexpr (sizeof(Element) == 2)
            return widen(static_cast<const Element*>(nullptr), words[i]);
        else
            return {float_from_bits(words[2 * i]), float_from_bits(words[2 * i + 1])};
    }

    // Calls function for gated neighbours of sequence c: those at `first` and every `step` positions on, as far as `end`.
    template <class Function>
    DEVICE void visit(const TileSequences& pair, int c, int first, int end, int step, Function function) const {
        const GlobalSequence<const Element, false> u(params.u, params, pair, c), gate(params.pre_gate, params, pair, c);
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

// The scales of long sequences: known before the outer pass mixes the two sequences of a pair, from energies that other blocks have summed up.
#pragma once
#include "long.cuh"

// The energy of part of a sequence as value 4^exponent; a value that is NaN says that the part is not finite.
struct Energy {
    float value = 0.f;
    int exponent = -1024;

    DEVICE Energy operator+(Energy other) const {
        const int top = exponent > other.exponent ? exponent : other.exponent;
        return {lowered(top) + other.lowered(top), top};
    }

private:
    DEVICE float lowered(int top) const { return top == exponent ? value : top - exponent > 60 ? value * 0.f : value * power_of_two(2 * (exponent - top)); }
};

// What brings the two sequences of a pair to a root mean square near one, and what undoes it. A sequence that is not finite goes in as zeros and
// comes out as NaN. With `common` both get one scale, so that products of their spectra may be added up.
struct PairScales {
    float down[2], up[2];

    // Every warp adds up the parts of both sequences in one and the same order.
    DEVICE PairScales(const uint2* parts, int count, int length, bool common) {
        int root[2];
        bool finite[2];
        for (int c = 0; c < 2; c++) {
            Energy sum;
            for (int i = thread_index() % 32; i < count; i += 32) {
                const uint2 part = load_shared_by_blocks(parts + c * count + i);
                sum = sum + Energy{float_from_bits(part.x), int(part.y)};
            }
            for (int mask = 1; mask < 32; mask *= 2) sum = sum + Energy{shuffle_xor(sum.value, mask), shuffle_xor(sum.exponent, mask)};
            finite[c] = sum.value == sum.value;
            root[c] = sum.value > 0.f ? root_exponent(sum.value, sum.exponent, length) : -126;
        }
        if (common) root[0] = root[1] = root[0] > root[1] ? root[0] : root[1];
        for (int c = 0; c < 2; c++) {
            down[c] = finite[c] ? power_of_two(-root[c]) : 0.f;
            up[c] = finite[c] ? power_of_two(root[c]) : float_from_bits(0x7fc00000u);
        }
    }

    DEVICE static Pair apply(Pair v, float down) { return down == 0.f ? Pair{0.f, 0.f} : Pair{v.x * down, v.y * down}; }
};

// Eight neighbouring elements of a sequence that consists of aligned 16-byte units, zero beyond its length.
template <class Element>
DEVICE void load_units(const Element* data, int position, int length, Pair (&v)[4]) {
    constexpr int kPairs = 8 / int(sizeof(Element));
#pragma unroll
    for (int i = 0; i < 4; i += kPairs) {
        const bool inside = position + 2 * i < length;
        const uint4 unit = load_streaming(reinterpret_cast<const uint4*>(data + (inside ? position + 2 * i : 0)));
        if constexpr (kPairs == 4)
            v[0] = widen(data, unit.x), v[1] = widen(data, unit.y), v[2] = widen(data, unit.z), v[3] = widen(data, unit.w);
        else
            v[i] = widen(data, uint2{unit.x, unit.y}), v[i + 1] = widen(data, uint2{unit.z, unit.w});
#pragma unroll
        for (int pair = i; pair < i + kPairs; pair++)
            if (!inside) v[pair] = {0.f, 0.f};
    }
}

// The product of an operand and its gate, one sequence of a pair. Whether there is a gate is a constant, so that loads are under way together.
template <class Element, bool kAligned, bool kGated>
struct GatedSequence {
    GlobalSequence<const Element, kAligned> values, factors;
    bool whole_units;

    DEVICE GatedSequence(const fft_conv_tensor& tensor, const fft_conv_tensor& gate, const LaunchParams& params, const TileSequences& sequences, int c)
        : values(tensor, params, sequences, c), factors(kGated ? gate : tensor, params, sequences, c), whole_units(params.whole_units) {}

    DEVICE Pair load(int position) const {
        const Pair v = values.load(position);
        if constexpr (!kGated) return v;
        const Pair g = factors.load(position);
        return {v.x * g.x, v.y * g.y};
    }

    // Positions from a multiple of eight on.
    DEVICE void load_eight(int position, Pair (&v)[4]) const {
        if (!whole_units) {
            for (int i = 0; i < 4; i++) v[i] = load(position + 2 * i);
            return;
        }
        load_units(values.data, position, values.length, v);
        if constexpr (kGated) {
            Pair g[4];
            load_units(factors.data, position, factors.length, g);
            for (int i = 0; i < 4; i++) v[i] = {v[i].x * g[i].x, v[i].y * g[i].y};
        }
    }
};

// Pairs of a sequence at some positions, ones without it: all are under way before the first is used.
template <int kBatch, class Sequence, class Positions>
DEVICE void load_batch(Pair (&pairs)[kBatch][2], const Sequence& sequence, bool present, Positions position) {
#pragma unroll
    for (int i = 0; i < 2 * kBatch; i++) pairs[i / 2][i % 2] = {1.f, 1.f};
    if (!present) return;
#pragma unroll
    for (int i = 0; i < 2 * kBatch; i++) pairs[i / 2][i % 2] = sequence.load(position(i / 2, i % 2));
}

// Sums over a block of up to 16 warps, in a fixed order.
DEVICE float block_sum(float x, float* exchange) {
    for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
    block_barrier();
    if (thread_index() % 32 == 0) exchange[thread_index() / 32] = x;
    block_barrier();
    float sum = 0.f;
    for (int w = 0; w < block_size() / 32; w++) sum += exchange[w];
    return sum;
}

DEVICE u32 block_maximum(u32 x, u32* exchange) {
    block_barrier();
    if (thread_index() == 0) exchange[0] = 0;
    block_barrier();
    x = warp_maximum(x);
    if (thread_index() % 32 == 0) atomic_maximum(exchange, x);
    block_barrier();
    return exchange[0];
}

// Energies of one part of both sequences of a pair. This pass is also what brings the tensors from memory into the L2 cache.
template <class Sequence>
DEVICE void sum_energies(const Sequence& first, const Sequence& second, int begin, int end, uint2* parts, int part_count, float* exchange) {
    const int step = 2 * block_size();
    float sums[2] = {};
#pragma unroll 2
    for (int position = begin + 8 * thread_index(); position < end; position += 4 * step) {
        Pair v[4], w[4];
        first.load_eight(position, v), second.load_eight(position, w);
#pragma unroll
        for (int i = 0; i < 4; i++) sums[0] += v[i].x * v[i].x + v[i].y * v[i].y, sums[1] += w[i].x * w[i].x + w[i].y * w[i].y;
    }
    for (int c = 0; c < 2; c++) {
        const Sequence& sequence = c == 0 ? first : second;
        Energy energy{block_sum(sums[c], exchange), 0};
        if (!(energy.value > 0x1p-60f && energy.value < 0x1p100f) && sequence.values.length > 0) {
            // Too small or too large to be squared as they are.
            u32 largest = 0;
            for (int position = begin + 2 * thread_index(); position < end; position += step) {
                const Pair v = sequence.load(position);
                const u32 a = bits_from_float(v.x) & 0x7fffffffu, b = bits_from_float(v.y) & 0x7fffffffu;
                largest = largest > a ? largest : a, largest = largest > b ? largest : b;
            }
            largest = block_maximum(largest, reinterpret_cast<u32*>(exchange));
            const int exponent = int(largest >> 23);
            const float down = power_of_two(exponent < 1 ? 126 : 127 - exponent);
            float sum = 0.f;
            for (int position = begin + 2 * thread_index(); position < end; position += step) {
                const Pair v = sequence.load(position);
                sum += v.x * down * (v.x * down) + v.y * down * (v.y * down);
            }
            sum = block_sum(sum, exchange);
            energy = exponent == 255 ? Energy{float_from_bits(0x7fc00000u), 0} : largest == 0 ? Energy{} : Energy{sum, exponent < 1 ? -126 : exponent - 127};
        } else if (sequence.values.length == 0) {
            energy = Energy{};
        }
        if (thread_index() == 0) parts[c * part_count] = {bits_from_float(energy.value), u32(energy.exponent)};
    }
}

// The scales of long sequences: known before the outer pass mixes the two sequences of a pair, from energies that all teams have summed up.
#pragma once
#include "block_scale.cuh"
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

// What brings the two sequences of a pair to a root mean square near one, and what undoes it. One that is not finite goes in as zeros and comes out as NaN.
struct PairScales {
    float down[2], up[2];
};

// A warp adds up the parts of both sequences in one and the same order. Folded, they are halves of a row, and have one scale. Where transforms are kept
// they have, too, so that products of their spectra may be added up.
DEVICE PairScales scales_of_parts(const uint2* parts, const LongParams& params) {
    PairScales scales;
    Energy sums[2];
    for (int c = 0; c < 2; c++) {
        for (int i = thread_index() % 32; i < params.part_count; i += 32) {
            const uint2 part = load_shared_by_blocks(parts + c * params.part_count + i);
            sums[c] = sums[c] + Energy{float_from_bits(part.x), int(part.y)};
        }
        for (int mask = 1; mask < 32; mask *= 2) sums[c] = sums[c] + Energy{shuffle_xor(sums[c].value, mask), shuffle_xor(sums[c].exponent, mask)};
    }
    if (params.folded) sums[0] = sums[1] = sums[0] + sums[1];
    for (int c = 0; c < 2; c++) {
        const BlockScale own = sums[c].value > 0.f ? BlockScale::of(sums[c].value, sums[c].exponent, params.length) : BlockScale{power_of_two(126), power_of_two(-126)};
        scales.down[c] = own.down, scales.up[c] = own.up;
    }
    const int larger = scales.up[0] > scales.up[1] ? 0 : 1;
    for (int c = 0; c < 2; c++) {
        if (params.transforms) scales.down[c] = scales.down[larger], scales.up[c] = scales.up[larger];
        if (!(sums[c].value == sums[c].value)) scales.down[c] = 0.f, scales.up[c] = float_from_bits(0x7fc00000u);
    }
    return scales;
}

// Eight neighbouring elements of a sequence that consists of aligned 16-byte units, or ones if it is not there.
template <class Element>
DEVICE void load_units(bool really, const Element* data, Pair (&v)[4]) {
    constexpr int kPairs = 8 / int(sizeof(Element));
    const u32 one = ones(data);
#pragma unroll
    for (int i = 0; i < 4; i += kPairs) {
        const uint4 unit = load_streaming_if(really, reinterpret_cast<const uint4*>(data + 2 * i), make_uint4(one, one, one, one));
        if constexpr (kPairs == 4)
            v[0] = widen(data, unit.x), v[1] = widen(data, unit.y), v[2] = widen(data, unit.z), v[3] = widen(data, unit.w);
        else
            v[i] = widen(data, uint2{unit.x, unit.y}), v[i + 1] = widen(data, uint2{unit.z, unit.w});
    }
}

// The product of one sequence of a pair and its gate; one that is not there is ones.
template <class Element, bool kAligned>
struct GatedSequence {
    using Word = typename PairWord<Element>::type;
    struct Words {
        Word value, factor;
    };
    static constexpr bool kNarrow = sizeof(Word) == 4;
    GlobalSequence<const Element, kAligned> values, factors;

    // Two neighbouring elements of both, and their products.
    DEVICE Words load_words(int position) const { return {values.load_word(position), factors.load_word(position, two_ones(values.data))}; }
    DEVICE Pair product(Words words) const {
        const Pair v = widen(values.data, words.value), g = widen(values.data, words.factor);
        return {v.x * g.x, v.y * g.y};
    }
    DEVICE Pair load(int position) const { return product(load_words(position)); }

    // Positions from a multiple of eight on, of a sequence of whole units that has them.
    DEVICE void load_eight(int position, Pair (&v)[4]) const {
        Pair g[4];
        load_units(true, values.data + position, v), load_units(factors.length > 0, factors.data + position, g);
        for (int i = 0; i < 4; i++) v[i] = {v[i].x * g[i].x, v[i].y * g[i].y};
    }
};

// Sums over a team, in a fixed order.
template <class Team>
DEVICE float team_sum(const Team& team, float x, float* exchange) {
    for (int mask = 1; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
    team.barrier();
    if (team.lane == 0) exchange[team.warp] = x;
    team.barrier();
    float sum = 0.f;
    for (int w = 0; w < Team::kWarps; w++) sum += exchange[w];
    return sum;
}

template <class Team>
DEVICE u32 team_maximum(const Team& team, u32 x, u32* exchange) {
    team.barrier();
    if (team.thread == 0) exchange[0] = 0;
    team.barrier();
    x = warp_maximum(x);
    if (team.lane == 0) atomic_maximum(exchange, x);
    team.barrier();
    return exchange[0];
}

// The energy of the positions from `begin` to `end`, which is a part of the sequence. This pass is also what brings the tensors from memory into the L2 cache.
template <class Team, class Sequence>
DEVICE Energy part_energy(const Team& team, const Sequence& sequence, bool whole_units, int begin, int end, float* exchange) {
    constexpr int kStep = 2 * Team::kThreads;
    float sum = 0.f;
    auto add = [&](Pair v) { sum += v.x * v.x + v.y * v.y; };
    if (whole_units) {
#pragma unroll 4
        for (int position = begin + 8 * team.thread; position < end; position += 4 * kStep) {
            Pair v[4];
            sequence.load_eight(position, v);
            for (int i = 0; i < 4; i++) add(v[i]);
        }
    } else {
#pragma unroll 4
        for (int position = begin + 2 * team.thread; position < end; position += kStep) add(sequence.load(position));
    }
    sum = team_sum(team, sum, exchange);
    if (sum > 0x1p-60f && sum < 0x1p100f) return {sum, 0};
    // Too small or too large to be squared as they are.
    u32 largest = 0;
    for (int position = begin + 2 * team.thread; position < end; position += kStep) {
        const Pair v = sequence.load(position);
        const u32 a = bits_from_float(v.x) & 0x7fffffffu, b = bits_from_float(v.y) & 0x7fffffffu;
        largest = largest > a ? largest : a, largest = largest > b ? largest : b;
    }
    largest = team_maximum(team, largest, reinterpret_cast<u32*>(exchange));
    const int exponent = int(largest >> 23);
    const float down = power_of_two(exponent < 1 ? 126 : 127 - exponent);
    sum = 0.f;
    for (int position = begin + 2 * team.thread; position < end; position += kStep) {
        const Pair v = sequence.load(position);
        add({v.x * down, v.y * down});
    }
    sum = team_sum(team, sum, exchange);
    return exponent == 255 ? Energy{float_from_bits(0x7fc00000u), 0} : largest == 0 ? Energy{} : Energy{sum, exponent < 1 ? -126 : exponent - 127};
}

// Tensors on their way into and out of a tile: staging through shared memory, element pairs, the scale of each sequence.
//
// A segment is the 256 positions of one slot of one sequence; slot s belongs to pair s / slots_per_pair and holds the positions
// 256 (s % slots_per_pair) and up.
#pragma once
#include "tile.cuh"

// The power of two near the root mean square of a sequence with the energy value 4^exponent, one that can be divided by.
DEVICE int root_exponent(float value, int exponent, int length) {
    const int root = exponent + ((int(bits_from_float(value / float(length)) >> 23) - 127) >> 1);
    return root < -126 ? -126 : root > 126 ? 126 : root;
}

DEVICE float larger_or_nan(float x, float y) { return y > x || y != y ? y : x; }

// One tensor's segments of a tile in shared memory. What lies beyond the sequence or the batch is zero.
template <class T>
struct Stage {
    using Element = typename T::Element;
    char* memory;

    DEVICE explicit operator bool() const { return memory; }
    // Of slot 4 four + q. The parts of a segment lie rotated by q, so that the lanes of the outer stage, which read eight pairs from each of four
    // segments, meet no bank twice.
    DEVICE char* at(int sequence, int four, int q, int column) const {
        constexpr int kSize = int(sizeof(Element));
        const int in_segment = (((column & 127) * kSize) ^ (q * 16 * kSize)) + (column & 128) * kSize;
        return memory + (q * T::kSegment + in_segment) + (sequence * T::kSlots + 4 * four) * T::kSegment;
    }

    // Two neighbouring elements.
    DEVICE Pair load(int sequence, int four, int q, int column) const {
        using Word = typename PairWord<Element>::type;
        return widen(static_cast<const Element*>(nullptr), *reinterpret_cast<const Word*>(at(sequence, four, q, column)));
    }
};

// Brings tensors of a tile to shared memory; every thread of a team copies, asynchronously where the alignment allows. A warp copies whole
// segments.
template <class T>
struct Stager {
    using Element = typename T::Element;
    const LaunchParams& params;
    int thread;

    // One or two tensors, each to a stage of its own; none where there is no stage. sequences() tells of tiles that are not regular.
    template <class Sequences>
    DEVICE void start(const TileHeader& header, Sequences sequences, Stage<T> stage, TensorIndex index, Stage<T> other_stage = {nullptr}, TensorIndex other = kU) const {
        if (header.regular) {
            copy_units(header, stage, index, other_stage, other);
        } else {
            if (stage) copy_any(params, stage, index, sequences());
            if (other_stage) copy_any(params, other_stage, other, sequences());
        }
    }

private:
    // Blocked sequences share the L2 cache with what the kernel keeps there.
    DEVICE static void copy(char* to, const char* from, int bytes) {
        if constexpr (T::kBlocked)
            copy_async_once(to, from, bytes);
        else
            copy_async<16>(to, from, bytes);
    }
    // The same address. ptxas of CUDA 13.0 puts a wrong register into such a copy with a cache policy, an illegal instruction, where it finds that a part of
    // the address is the same in all threads; after a shuffle it does not.
    DEVICE static char* address_of_thread(char* to) {
        return T::kBlocked ? reinterpret_cast<char*>(shuffle_xor(reinterpret_cast<uintptr_t>(to), 0)) : to;
    }

    DEVICE void copy_units(const TileHeader& header, Stage<T> stage, TensorIndex index, Stage<T> other_stage, TensorIndex other) const {
        constexpr int kSize = int(sizeof(Element)), kUnit = 16 / kSize, kParts = kColumns / (32 * kUnit), kPartBytes = 32 * 16, kSteps = T::kSlots / T::kWarps;
        static_assert(T::kSlots % T::kWarps == 0, "every warp copies as many segments");
        const int warp = int(u32(thread) / 32 % T::kWarps), at = int(u32(thread) % 32) * kUnit;
        int bytes[2][kSteps][kParts];
#pragma unroll
        for (int i = 0; i < kSteps; i++)
#pragma unroll
            for (int part = 0; part < kParts; part++) {
                bytes[0][i][part] = T::slot_position(warp + i * T::kWarps) + at + part * 32 * kUnit < header.length ? 16 : 0;
                bytes[1][i][part] = header.second && T::slot_position(warp + i * T::kWarps) + at + part * 32 * kUnit < header.length - T::kSecondStart ? 16 : 0;
            }
        auto copy_tensor = [&](Stage<T> stage, TensorIndex index) {
            char* const to = address_of_thread(stage.at(0, warp / 4, warp % 4, at));
#pragma unroll
            for (int sequence = 0; sequence < 2; sequence++) {
                const char* const first = header.first[index] + (sequence * T::second_offset((&params.u)[index]) + at) * kSize;
#pragma unroll
                for (int i = 0; i < kSteps; i++) {
                    const int slot = warp + i * T::kWarps;
                    const char* from = first + T::slot_position(slot) * kSize;
                    if (T::kPairs > 1) from += T::slot_pair(slot) * header.pair_stride[index];
#pragma unroll
                    for (int part = 0; part < kParts; part++)
                        copy(to + (sequence * T::kSlots + i * T::kWarps) * T::kSegment + part * kPartBytes, from + part * kPartBytes, bytes[sequence][i][part]);
                }
            }
        };
        if (stage) copy_tensor(stage, index);
        if (other_stage) copy_tensor(other_stage, other);
    }

    RARE void copy_any(const LaunchParams& params, Stage<T> stage, TensorIndex index, TileSequences sequences) {
        const fft_conv_tensor& tensor = (&params.u)[index];
        if (params.alignment >= 16)
            copy_parts<16>(stage, tensor, sequences);
        else if (params.alignment >= 4)
            copy_parts<4>(stage, tensor, sequences);
        else if constexpr (sizeof(Element) == 2)
            copy_parts<2>(stage, tensor, sequences);
    }

    template <int kBytes>
    DEVICE static void copy_parts(Stage<T> stage, const fft_conv_tensor& tensor, const TileSequences& sequences) {
#pragma unroll 1
        for (int index = thread_index() / 32 % T::kWarps; index < 2 * T::kSlots; index += T::kWarps) {
            const int slot = index % T::kSlots, owner = 2 * T::slot_pair(slot) + index / T::kSlots, left = sequences.length_of(owner) - T::slot_position(slot);
            const char* from = sequences.address<const char>(tensor, owner, sizeof(Element)) + int64_t(T::slot_position(slot)) * int(sizeof(Element));
            const int bytes = left > 0 ? (left < kColumns ? left : kColumns) * int(sizeof(Element)) : 0;
#pragma unroll 1
            for (int at = thread_index() % 32 * kBytes; at < T::kSegment; at += 32 * kBytes) {
                char* to = stage.at(index / T::kSlots, slot / 4, slot % 4, at / int(sizeof(Element)));
                const int count = bytes - at < 0 ? 0 : bytes - at < kBytes ? bytes - at : kBytes;
                if constexpr (kBytes >= 4)
                    copy_async<kBytes>(to, count > 0 ? from + at : tensor.data, count);
                else
                    *reinterpret_cast<uint16_t*>(to) = count > 0 ? *reinterpret_cast<const uint16_t*>(from + at) : uint16_t(0);
            }
        }
    }
};

// Two neighbouring elements of a sequence in global memory, zero beyond its length.
template <class Element>
DEVICE Pair load_global(const Element* sequence, int position, int length, bool aligned) {
    if (aligned && position + 1 < length)
        return widen(sequence, load_streaming(reinterpret_cast<const typename PairWord<Element>::type*>(sequence + position)));
    return {position < length ? widen_one(sequence[position]) : 0.f, position + 1 < length ? widen_one(sequence[position + 1]) : 0.f};
}

template <class Element>
DEVICE void store_global(Element* sequence, int position, int length, bool aligned, float x, float y) {
    if (aligned && position + 1 < length) {
        narrow_two(sequence + position, x, y);
    } else {
        if (position < length) narrow_one(sequence + position, x);
        if (position + 1 < length) narrow_one(sequence + position + 1, y);
    }
}

// One sequence of a tile in global memory. kAligned: pairs may be moved as words, so that a pair lies inside the sequence or beyond it.
template <class Element, bool kAligned>
struct GlobalSequence {
    using Word = typename PairWord<typename RemoveConst<Element>::type>::type;
    Element* data;
    int length;     // zero if the sequence or the tensor is absent

    DEVICE GlobalSequence(const fft_conv_tensor& tensor, const LaunchParams& params, const TileSequences& sequences, int owner)
        : data(sequences.address<Element>(tensor, owner)), length(tensor.data ? sequences.length_of(owner) : 0) {}
    DEVICE GlobalSequence(Element* data, int length) : data(data), length(length) {}

    // Without branches where it can be, so that many loads are under way at a time.
    DEVICE Word load_word(int position, Word otherwise = {}) const {
        if constexpr (kAligned) {
            return load_streaming_if(position < length, reinterpret_cast<const Word*>(data + position), otherwise);
        } else {
            const Pair v = widen(data, otherwise);
            return narrow(data, position < length ? widen_one(data[position]) : v.x, position + 1 < length ? widen_one(data[position + 1]) : v.y);
        }
    }
    DEVICE Pair load(int position) const { return widen(data, load_word(position)); }

    DEVICE void store(int position, float x, float y) const {
        if constexpr (kAligned) {
            narrow_two_if<true>(position < length, data + position, x, y);
        } else {
            store_global(data, position, length, false, x, y);
        }
    }
};

// A tensor's sequences in global memory, for tiles whose tensors do not fit beside them in shared memory.
template <class T, bool kAligned>
struct DirectSource {
    using Sequence = GlobalSequence<const typename T::Element, kAligned>;
    const fft_conv_tensor& tensor;
    const LaunchParams& params;
    const TileSequences& sequences;
    Sequence first, second;     // of a tile's first pair

    DEVICE DirectSource(const fft_conv_tensor& tensor, const LaunchParams& params, const TileSequences& sequences)
        : tensor(tensor), params(params), sequences(sequences), first(tensor, params, sequences, 0), second(tensor, params, sequences, 1) {}

    DEVICE explicit operator bool() const { return tensor.data; }

    // All lanes of a warp.
    DEVICE Pair load(int sequence, int four, int q, int column) const {
        const int slot = 4 * four + q;
        const int position = T::slot_position(slot) + column;
        if constexpr (T::kPairs == 1)
            return (sequence == 0 ? first : second).load(position);
        else
            return Sequence(tensor, params, sequences, 2 * T::slot_pair(slot) + sequence).load(position);
    }
};

// Packs u (times gate, where there is one) as (re, im) = (first, second sequence of the pair). Column c of x[j]: a, a + 1, a + 128, a + 129.
// With kScaled every sequence is multiplied by the factor that its lane holds; a factor of zero drops a sequence that is not finite.
template <class T, bool kScaled, bool kGated, class Source>
DEVICE void pack_product(u32 (&x)[T::kSlots / 4][4], const Source& u, const Source& gate, float factor, int column, int lane) {
#pragma unroll
    for (int j = 0; j < T::kSlots / 4; j++) {
        const int slot = 4 * j + lane % 4;
        float first = 1.f, second = 1.f;
        u32 kept = ~0u;
        if constexpr (kScaled) {
            first = shuffle(factor, 2 * T::slot_pair(slot)), second = shuffle(factor, 2 * T::slot_pair(slot) + 1);
            kept = (first == 0.f ? 0 : 0xffffu) | (second == 0.f ? 0 : 0xffff0000u);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = column + 128 * half;
            Pair v = u.load(0, j, lane % 4, at), w = u.load(1, j, lane % 4, at);
            if constexpr (kGated) {
                const Pair g = gate.load(0, j, lane % 4, at), h = gate.load(1, j, lane % 4, at);
                v = {v.x * g.x, v.y * g.y}, w = {w.x * h.x, w.y * h.y};
            }
            if constexpr (kScaled) v = {v.x * first, v.y * first}, w = {w.x * second, w.y * second};
            x[j][2 * half] = pack(v.x, w.x) & kept, x[j][2 * half + 1] = pack(v.y, w.y) & kept;
        }
    }
}

// Scales every row of a tile by a power of two to a root mean square near one, so that half precision holds it whatever its size and neither of two rows
// that share a transform drowns in the other's rounding. Values are packed as they are first; only if a sequence's energy is then outside
// half precision's comfortable range are they packed again, from the largest magnitude. Called by the eight warps of a group.
template <class T>
struct SequenceScales {
    float* energies;    // shared memory, [2 kPairs][8]
    int group, warp, lane;
    float up = 1.f;     // what undoes the scale of this lane's sequence
    int root = 0;       // of its mean square as packed, which apply() makes near one

    DEVICE void publish(const u32 (&x)[T::kSlots / 4][4]) {
#pragma unroll
        for (int i = 0; i < T::kLanePairs; i++) {
            u32 sum = 0;
#pragma unroll
            for (int n = i; n < T::kSlots / 4; n += T::kLanePairs)
#pragma unroll
                for (int c = 0; c < 4; c++) sum = multiply_add2(x[n][c], x[n][c], sum);
            float first = low_half(sum), second = high_half(sum);
            if (T::kFolded) first += second;
            for (int mask = T::kPairs < 4 ? T::kPairs : 4; mask < 32; mask *= 2) {
                first += shuffle_xor(first, mask);
                if (!T::kFolded) second += shuffle_xor(second, mask);
            }
            // Worked out anew for each tile: it would be parked meanwhile.
            const int pair = T::slot_pair(4 * i + fresh_thread_index() % 4);
            if (lane < 4) {
                energies[2 * pair * 8 + warp] = first;
                if (!T::kFolded) energies[(2 * pair + 1) * 8 + warp] = second;
            }
        }
        group_barrier(group);
    }

    // Of this lane's sequence or, folded, of its row.
    DEVICE float mean_square() const {
        constexpr int kSequences = 2 * T::kPairs, kValues = T::kPairSlots * kColumns * (T::kFolded ? 2 : 1);
        const float4* const sums = reinterpret_cast<const float4*>(energies) + 2 * (lane < kSequences ? T::kFolded ? lane & ~1 : lane : 0);
        const float4 a = sums[0], b = sums[1];
        const float sum = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
        return lane < kSequences ? sum / kValues : 1.f;
    }

    // The factor that brings this lane's sequence to a largest magnitude near one; zero if the sequence is not finite.
    template <class Source>
    DEVICE float from_largest(const Source& u, const Source& gate, int column) {
        u32* largest = reinterpret_cast<u32*>(energies);
        group_barrier(group);
        if (warp == 0 && lane < 2 * T::kPairs) largest[lane] = 0;
        group_barrier(group);
        for (int j = 0; j < T::kSlots / 4; j++)
            for (int c = 0; c < 4; c++) {
                const int slot = 4 * j + lane % 4, sequence = c % 2, at = column + 128 * (c / 2);
                Pair v = u.load(sequence, j, lane % 4, at);
                if (gate) {
                    const Pair g = gate.load(sequence, j, lane % 4, at);
                    v = {v.x * g.x, v.y * g.y};
                }
                const u32 a = bits_from_float(v.x) & 0x7fffffffu, b = bits_from_float(v.y) & 0x7fffffffu;
                atomic_maximum(largest + 2 * T::slot_pair(slot) + sequence, a > b ? a : b);
            }
        group_barrier(group);
        u32 bits = lane < 2 * T::kPairs ? largest[lane] : 0;
        if (const u32 other = shuffle_xor(bits, 1); T::kFolded && other > bits) bits = other;
        const int exponent = int(bits >> 23);
        group_barrier(group);
        // So that zeros stay zeros, and what undoes any other scale is a normal number.
        return exponent == 255 ? 0.f : power_of_two(bits == 0 ? 126 : exponent < 13 ? 114 : 127 - exponent);
    }

    // Packs a tile's inputs into x, which apply() then scales; `up` undoes both. If `common`, both sequences of any pair get one scale, so that
    // products of their spectra may be added up, and one that leaves room for these: those of spectra of 2^17 points, unitary as they are, are below
    // 2^17 8 / 4^kLogRoom even if all is in one frequency.
    static constexpr int kLogRoom = 3;
    template <class Source>
    DEVICE void pack_measured(u32 (&x)[T::kSlots / 4][4], const Source& u, const Source& gate, bool valid, bool common) {
        const int column = outer_column(warp, lane);
        // Two texts, so that loads need not wait for a branch.
        if (gate)
            pack_product<T, false, true>(x, u, gate, 1.f, column, lane);
        else
            pack_product<T, false, false>(x, u, gate, 1.f, column, lane);
        publish(x);
        float square = mean_square(), factor = 1.f;
        if (warp_any(valid && !(square >= 0x1p-14f && square <= 0x1p10f))) {
            factor = from_largest(u, gate, column);
            if (common) {
                const float other = shuffle_xor(factor, 1);
                if (factor != 0.f && other != 0.f && other < factor) factor = other;
            }
            gate ? pack_product<T, true, true>(x, u, gate, factor, column, lane) : pack_product<T, true, false>(x, u, gate, factor, column, lane);
            publish(x);
            square = mean_square();
        }
        const int exponent = int(bits_from_float(square) >> 23) - 127;
        root = exponent < -24 ? -12 : exponent >> 1;
        if (common) {
            const int other = shuffle_xor(root, 1);
            root = (other > root ? other : root) + kLogRoom;
        }
        up = factor == 0.f ? float_from_bits(0x7fc00000u) : power_of_two(root) * power_of_two(127 - int(bits_from_float(factor) >> 23));
    }

    // Multiplies every packed sequence by the power of two whose exponent its lane holds.
    DEVICE void apply(u32 (&x)[T::kSlots / 4][4], int exponent) const {
        const float own = power_of_two(exponent);
#pragma unroll
        for (int i = 0; i < T::kLanePairs; i++) {
            const int pair = T::slot_pair(4 * i + fresh_thread_index() % 4);
            const float first = shuffle(own, 2 * pair);
            const u32 scale = pack(first, T::kFolded ? first : shuffle(own, 2 * pair + 1));
#pragma unroll
            for (int n = i; n < T::kSlots / 4; n += T::kLanePairs)
#pragma unroll
                for (int c = 0; c < 4; c++) x[n][c] = multiply2(x[n][c], scale);
        }
    }

    // Both at once.
    template <class Source>
    DEVICE void pack_scaled(u32 (&x)[T::kSlots / 4][4], const Source& u, const Source& gate, bool valid, bool common) {
        pack_measured(x, u, gate, valid, common);
        apply(x, -root);
    }

    // The same for blocked sequences, whose scales are known; a barrier passes, and mean_square() is that of the scaled tile.
    template <class Source, class Scale>
    DEVICE void pack_known(u32 (&x)[T::kSlots / 4][4], const Source& u, const Source& gate, const Scale& scale) {
        const int column = outer_column(warp, lane);
        if (gate)
            pack_product<T, true, true>(x, u, gate, scale.down, column, lane);
        else
            pack_product<T, true, false>(x, u, gate, scale.down, column, lane);
        up = scale.up;
        publish(x);
    }

    // The same three with inputs in global memory; an absent gate has no data.
    template <class Function>
    DEVICE void with_sources(const fft_conv_tensor& u, const fft_conv_tensor& gate, const LaunchParams& params, const TileSequences& sequences, Function function) {
        if (params.pair_aligned)
            function(DirectSource<T, true>(u, params, sequences), DirectSource<T, true>(gate, params, sequences));
        else
            function(DirectSource<T, false>(u, params, sequences), DirectSource<T, false>(gate, params, sequences));
    }
    DEVICE void measure_direct(u32 (&x)[T::kSlots / 4][4], const fft_conv_tensor& u, const fft_conv_tensor& gate, const LaunchParams& params,
                            const TileSequences& sequences, bool common) {
        with_sources(u, gate, params, sequences, [&](const auto& source, const auto& factor) { pack_measured(x, source, factor, sequences.valid, common); });
    }
    template <class Scale>
    DEVICE void known_direct(u32 (&x)[T::kSlots / 4][4], const fft_conv_tensor& u, const fft_conv_tensor& gate, const LaunchParams& params,
                            const TileSequences& sequences, const Scale& scale) {
        with_sources(u, gate, params, sequences, [&](const auto& source, const auto& factor) { pack_known(x, source, factor, scale); });
    }

    DEVICE void pack_direct(u32 (&x)[T::kSlots / 4][4], const fft_conv_tensor& u, const fft_conv_tensor& gate, const LaunchParams& params,
                            const TileSequences& sequences, bool common) {
        measure_direct(x, u, gate, params, sequences, common);
        apply(x, -root);
    }
};

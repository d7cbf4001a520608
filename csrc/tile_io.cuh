// Tensors on their way into and out of a tile: staging through shared memory, element pairs, the scale of each sequence.
//
// A segment is the 256 positions of one slot of one sequence; slot s belongs to pair s / slots_per_pair and holds the positions
// 256 (s % slots_per_pair) and up.
#pragma once
#include "tile.cuh"

template <class T>
struct SlotMap {
    int log_slots_per_pair;
    DEVICE int pair(int slot) const { return T::kMaxPairs == 1 ? 0 : slot >> log_slots_per_pair; }
    DEVICE int position(int slot) const { return (T::kMaxPairs == 1 ? slot : slot & ((1 << log_slots_per_pair) - 1)) * kColumns; }
};

// One tensor's segments of a tile in shared memory. Where rows are aligned to 16 bytes one warp has the copy engine bring them, else every
// thread copies. What lies beyond the sequence or the batch is zero.
template <class T>
struct Stage {
    using Element = typename T::Element;
    char* memory;

    DEVICE char* segment(int sequence, int slot) const { return memory + (sequence * T::kSlots + slot) * T::kSegment; }

    // Two neighbouring elements.
    DEVICE Pair load(int sequence, int slot, int column) const {
        using Word = typename PairWord<Element>::type;
        return widen(static_cast<const Element*>(nullptr), *reinterpret_cast<const Word*>(segment(sequence, slot) + column * int(sizeof(Element))));
    }

    DEVICE void clear() const {
        for (int i = thread_index(); i < T::kStageBytes / 16; i += T::kThreads) reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
    }

    // Bytes of a segment that exist; a multiple of 16 where rows are aligned to 16 bytes and the length is, too.
    DEVICE static int segment_bytes(const LaunchParams& params, int position) {
        const int left = params.length - position;
        return (left < 0 ? 0 : left < kColumns ? left : kColumns) * int(sizeof(Element));
    }

    // One segment by the copy engine, or zeros if its sequence is absent. All lanes call this; index is out of range for idle ones.
    // Returns the bytes that will arrive.
    DEVICE int copy_segment(int index, const fft_conv_tensor& tensor, const LaunchParams& params, SlotMap<T> slots,
                            const TileSequences& sequences, TransferBarrier arrived) const {
        const int slot = index % T::kSlots, owner = 2 * slots.pair(slot) + index / T::kSlots % 2, position = slots.position(slot);
        const int row = shuffle(sequences.row, owner), channel = shuffle(sequences.channel, owner);
        const bool valid = shuffle(int(sequences.valid), owner);
        if (index >= 2 * T::kSlots) return 0;
        uint4* to = reinterpret_cast<uint4*>(memory + index * T::kSegment);
        if (!valid) {
            for (int i = 0; i < kColumns * int(sizeof(Element)) / 16; i++) to[i] = make_uint4(0, 0, 0, 0);
            fence_before_bulk();
            return 0;
        }
        const int bytes = segment_bytes(params, position);
        if (bytes > 0)
            arrived.copy(to, static_cast<const Element*>(tensor.data) + row * tensor.batch_stride + channel * tensor.channel_stride + position, bytes);
        return bytes;
    }

    // All threads: chunks of kBytes, asynchronously where the hardware can.
    template <int kBytes>
    DEVICE void copy_chunks(const fft_conv_tensor& tensor, const LaunchParams& params, SlotMap<T> slots, const TileSequences& sequences) const {
        constexpr int kElements = kBytes / int(sizeof(Element));
#pragma unroll 1
        for (int index = thread_index() / 32; index < 2 * T::kSlots; index += T::kWarps) {
            const int slot = index % T::kSlots, owner = 2 * slots.pair(slot) + index / T::kSlots;
            const bool valid = shuffle(int(sequences.valid), owner);
            const Element* from = static_cast<const Element*>(tensor.data) + shuffle(sequences.row, owner) * tensor.batch_stride
                + shuffle(sequences.channel, owner) * tensor.channel_stride + slots.position(slot);
            const int bytes = valid ? segment_bytes(params, slots.position(slot)) : 0;
#pragma unroll 1
            for (int at = thread_index() % 32 * kBytes; at < kColumns * int(sizeof(Element)); at += 32 * kBytes) {
                char* to = memory + index * T::kSegment + at;
                const int count = bytes - at < 0 ? 0 : bytes - at < kBytes ? bytes - at : kBytes;
                if constexpr (kBytes >= 4)
                    copy_async<kBytes>(to, count > 0 ? from + at / int(sizeof(Element)) : tensor.data, count);
                else
                    *reinterpret_cast<uint16_t*>(to) = count > 0 ? *reinterpret_cast<const uint16_t*>(from + at / kBytes) : uint16_t(0);
            }
        }
    }

    DEVICE void copy(const fft_conv_tensor& tensor, const LaunchParams& params, SlotMap<T> slots, const TileSequences& sequences) const {
        if (params.alignment >= 16)
            copy_chunks<16>(tensor, params, slots, sequences);
        else if (params.alignment >= 4)
            copy_chunks<4>(tensor, params, slots, sequences);
        else if constexpr (sizeof(Element) == 2)
            copy_chunks<2>(tensor, params, slots, sequences);
    }
};

// Brings up to two tensors of a tile; the second may be absent.
template <class T>
struct Transfer {
    Stage<T> first, second;
    TransferBarrier arrived;

    DEVICE static bool bulk(const LaunchParams& params) {
        return kBulkCopies && params.alignment >= 16 && params.length * int(sizeof(typename T::Element)) % 16 == 0;
    }

    // Before the first start; a block barrier must follow.
    DEVICE void initialise() const {
        if (thread_index() == 0) arrived.initialise(T::kWarps);
        first.clear();
        if (second.memory) second.clear();
        fence_before_bulk();
    }

    // Segments are dealt to the warps in turn, one a lane.
    DEVICE void start(const fft_conv_tensor& a, const fft_conv_tensor& b, const LaunchParams& params, SlotMap<T> slots, const TileSequences& sequences) const {
        static_assert(4 * T::kSlots <= T::kThreads, "a lane copies one segment");
        if (bulk(params)) {
            const int lane = thread_index() % 32, index = lane * T::kWarps + thread_index() / 32;
            const bool is_second = index >= 2 * T::kSlots && second.memory;
            const Stage<T>& stage = is_second ? second : first;
            const int bytes = stage.copy_segment(is_second ? index - 2 * T::kSlots : index, is_second ? b : a, params, slots, sequences, arrived);
            const int total = warp_sum(bytes);
            if (lane == 0) arrived.expect(total);
        } else {
            first.copy(a, params, slots, sequences);
            if (second.memory) second.copy(b, params, slots, sequences);
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

template <class Element>
DEVICE Element* sequence_data(const fft_conv_tensor& tensor, int row, int channel) {
    return static_cast<Element*>(tensor.data) + row * tensor.batch_stride + channel * tensor.channel_stride;
}

// Packs u (times gate, where there is one) as (re, im) = (first, second sequence of the pair). Column c of x[j]: a, a + 1, a + 128, a + 129.
// With kScaled every sequence is multiplied by the factor that its lane holds; a factor of zero drops a sequence that is not finite.
template <class T, bool kScaled>
DEVICE void pack_product(u32 (&x)[T::kSlots / 4][4], const Stage<T>& u, const Stage<T>& gate, SlotMap<T> slots, float factor, int column, int lane) {
#pragma unroll
    for (int j = 0; j < T::kSlots / 4; j++) {
        const int slot = 4 * j + lane % 4;
        float first = 1.f, second = 1.f;
        if constexpr (kScaled) first = shuffle(factor, 2 * slots.pair(slot)), second = shuffle(factor, 2 * slots.pair(slot) + 1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = column + 128 * half;
            Pair v = u.load(0, slot, at), w = u.load(1, slot, at);
            if (gate.memory) {
                const Pair g = gate.load(0, slot, at), h = gate.load(1, slot, at);
                v = {v.x * g.x, v.y * g.y}, w = {w.x * h.x, w.y * h.y};
            }
            if constexpr (kScaled) {
                v = first == 0.f ? Pair{0.f, 0.f} : Pair{v.x * first, v.y * first};
                w = second == 0.f ? Pair{0.f, 0.f} : Pair{w.x * second, w.y * second};
            }
            x[j][2 * half] = pack(v.x, w.x), x[j][2 * half + 1] = pack(v.y, w.y);
        }
    }
}

// Scales every sequence of a tile by a power of two to a root mean square near one, so that half precision holds it whatever its size and
// neither sequence of a pair drowns in the other's rounding. Values are packed as they are first; only if a sequence's energy is then outside
// half precision's comfortable range are they packed again, from the largest magnitude.
template <class T>
struct SequenceScales {
    float* energies;    // shared memory, [2 kMaxPairs][8]
    float up;           // what undoes the scale of this lane's sequence

    DEVICE void publish(const u32 (&x)[T::kSlots / 4][4], SlotMap<T> slots, int warp, int lane) {
        if (warp >= 8) return;
        const int per_pair = 1 << slots.log_slots_per_pair;
        float re = 0.f, im = 0.f;
#pragma unroll
        for (int j = 0; j < T::kSlots / 4; j++) {
            u32 sum = 0;
#pragma unroll
            for (int c = 0; c < 4; c++) sum = multiply_add2(x[j][c], x[j][c], sum);
            re += low_half(sum), im += high_half(sum);
            if (T::kMaxPairs == 1 ? j + 1 < T::kSlots / 4 : 4 * (j + 1) % per_pair != 0 && per_pair > 4) continue;
            for (int mask = 4; mask < 32; mask *= 2) re += shuffle_xor(re, mask), im += shuffle_xor(im, mask);
            for (int mask = 1; mask < 4 && mask < per_pair; mask *= 2) re += shuffle_xor(re, mask), im += shuffle_xor(im, mask);
            const int pair = slots.pair(4 * j + lane % 4);
            if (lane < 4) energies[(2 * pair) * 8 + warp] = re, energies[(2 * pair + 1) * 8 + warp] = im;
            re = im = 0.f;
        }
    }

    DEVICE float mean_square(SlotMap<T> slots, int lane) const {
        if (lane >= T::kSlots >> slots.log_slots_per_pair << 1) return 1.f;
        float sum = 0.f;
        for (int w = 0; w < 8; w++) sum += energies[lane * 8 + w];
        return sum * power_of_two(-8 - slots.log_slots_per_pair);
    }

    // The factor that brings this lane's sequence to a largest magnitude near one; zero if the sequence is not finite.
    DEVICE float from_largest(const Stage<T>& u, const Stage<T>& gate, SlotMap<T> slots, int column, int lane) {
        u32* largest = reinterpret_cast<u32*>(energies);
        block_barrier();
        if (thread_index() < 2 * T::kMaxPairs) largest[thread_index()] = 0;
        block_barrier();
        for (int j = 0; j < T::kSlots / 4; j++)
            for (int c = 0; c < 4; c++) {
                const int slot = 4 * j + lane % 4, sequence = c % 2, at = column + 128 * (c / 2);
                Pair v = u.load(sequence, slot, at);
                if (gate.memory) {
                    const Pair g = gate.load(sequence, slot, at);
                    v = {v.x * g.x, v.y * g.y};
                }
                const u32 a = bits_from_float(v.x) & 0x7fffffffu, b = bits_from_float(v.y) & 0x7fffffffu;
                atomic_maximum(largest + 2 * slots.pair(slot) + sequence, a > b ? a : b);
            }
        block_barrier();
        const int exponent = lane < 2 * T::kMaxPairs ? int(largest[lane] >> 23) : 127;
        block_barrier();
        return exponent == 255 ? 0.f : power_of_two(exponent < 1 ? 126 : 127 - exponent);
    }

    // Packs the tile's inputs into x.
    DEVICE void pack_scaled(u32 (&x)[T::kSlots / 4][4], const Stage<T>& u, const Stage<T>& gate, SlotMap<T> slots, bool valid, int column, int warp, int lane) {
        pack_product<T, false>(x, u, gate, slots, 1.f, column, lane);
        publish(x, slots, warp, lane);
        block_barrier();
        float square = mean_square(slots, lane), factor = 1.f;
        if (warp_any(valid && !(square >= 0x1p-14f && square <= 0x1p10f))) {
            factor = from_largest(u, gate, slots, column, lane);
            pack_product<T, true>(x, u, gate, slots, factor, column, lane);
            publish(x, slots, warp, lane);
            block_barrier();
            square = mean_square(slots, lane);
        }
        const int exponent = int(bits_from_float(square) >> 23) - 127, root = exponent < -24 ? -12 : exponent >> 1;
        up = factor == 0.f ? float_from_bits(0x7fc00000u) : power_of_two(root) * power_of_two(127 - int(bits_from_float(factor) >> 23));
#pragma unroll
        for (int j = 0; j < T::kSlots / 4; j++) {
            const int pair = slots.pair(4 * j + lane % 4);
            const u32 scale = pack(power_of_two(-shuffle(root, 2 * pair)), power_of_two(-shuffle(root, 2 * pair + 1)));
#pragma unroll
            for (int c = 0; c < 4; c++) x[j][c] = multiply2(x[j][c], scale);
        }
    }
};

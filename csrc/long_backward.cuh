// Gradients over long sequences; see backward.cuh for the formulas. The sums of conj(G) E over the batch stay in shared memory over the pairs of
// an item of the row pass, and go through global memory from item to item, in a fixed order. When a channel's last pair is in, they go back through
// the passes like a pair, as its sheet of taps.
#pragma once
#include "backward.cuh"
#include "long_passes.cuh"

template <class Element, int kSlots>
struct LongBackwardPlan {
    using T = LongTile<Element>;
    static constexpr int kThreads = 512;
    static constexpr int kSumVectors = kLongPoints / 2;     // (re, im) of two points each, in single precision
    static constexpr int kPointBytes = kLongPoints * 4;
    static constexpr int kRowItemBytes = 2 * T::kRowBytes + kSumVectors * 16 + 2 * kPointBytes;
    static constexpr int kSharedBytes = LongPlan<Element, kSlots>::kFixedBytes + kRowItemBytes;
    static_assert(kRowItemBytes >= LongPlan<Element, kSlots>::column_bytes(true) && kSharedBytes <= kSharedLimit, "shared memory of a block");
};

template <class Element, int kSlots>
struct LongBackward : LongPasses<Element, kSlots> {
    using Base = LongPasses<Element, kSlots>;
    using Plan = LongBackwardPlan<Element, kSlots>;
    using T = typename Base::T;
    using Base::params, Base::counters, Base::tables, Base::warp, Base::block_warp, Base::lane;
    static constexpr int kWarps = Plan::kThreads / 32;
    uint4* const rows_g;
    uint4* const rows_e;
    uint4* const stage;     // of this group of eight warps
    uint4* const sums;      // four single-precision numbers each
    const int operand;      // which the group of eight warps brings in and out in the row pass

    DEVICE explicit LongBackward(const LongParams& params)
        : Base(params), rows_g(reinterpret_cast<uint4*>(Base::memory)), rows_e(rows_g + T::kRowBytes / 16),
          stage(rows_e + T::kRowBytes / 16 + Base::block_warp / 8 * (Plan::kPointBytes / 16)), sums(rows_e + (T::kRowBytes + 2 * Plan::kPointBytes) / 16),
          operand(block_warp / 8) {}

    // Where the sums of a row over some of a channel's pairs lie, and after all of them their weights.
    DEVICE int64_t partial(int group, int channel, int split, int row) const {
        const int place = group / params.channel_splits % params.ring;
        return ((int64_t(place) * params.group_channels + channel) * params.row_splits() + split) * params.radix + row;
    }
    DEVICE uint4* global_sums(int64_t partial) const { return static_cast<uint4*>(params.sums) + partial * Plan::kSumVectors; }
    DEVICE uint2* global_weight(int64_t partial) const { return reinterpret_cast<uint2*>(global_sums(int64_t(params.ring) * params.row_items())) + partial; }
    // What undoes the scale of a channel's taps, after all weights.
    DEVICE uint2* taps_scale(int channel) const { return global_weight(int64_t(params.ring) * params.row_items()) + channel; }

    // One k0 of several pairs of a channel: index = (row, channel, pairs).
    DEVICE u32* row_item(const LongItem& item) const {
        const int per_row = params.group_channels * params.row_splits(), row = item.index / per_row, rest = item.index % per_row;
        const int channel = rest / params.row_splits(), split = rest % params.row_splits(), channel_pairs = params.group_pairs / params.group_channels;
        const int count = channel_pairs - split * params.row_steps < params.row_steps ? channel_pairs - split * params.row_steps : params.row_steps;
        const int first = channel * channel_pairs + split * params.row_steps, k0 = params.natural_k0(row);
        const int64_t index = partial(item.group, channel, split, row);
        const bool continued = item.group % params.channel_splits > 0;
        auto start = [&](int pair) {
            if (pair < first + count && Base::pair_number(item.group, pair) >= 0) Base::start_points(stage, points(item.group, pair, row));
            copy_async_commit();
        };
        // Sums that go on, and a place of the ring that another channel's sums have left.
        counters.wait(item.group, kOuter, params.channel_splits > 1 ? item.group - 1 : -1, kRows);
        start(first);
        Base::fill_row_stages(k0);
        float weight = continued ? float_from_bits(load_shared_by_blocks(global_weight(index)).x) : 0.f;
        for (int i = thread_index(); i < Plan::kSumVectors; i += Plan::kThreads) sums[i] = continued ? load_shared_by_blocks(global_sums(index) + i) : make_uint4(0, 0, 0, 0);
        block_barrier();
        for (int pair = first; pair < first + count; pair++) {
            const int number = Base::pair_number(item.group, pair);
            copy_async_wait<0>();
            if (number < 0) break;
            Base::rows_from(stage, operand == 0 ? rows_g : rows_e);
            start(pair + 1);
            const PairScales g = Base::scales(number, 0), e = Base::scales(number, 1);
            // The second sequence's scale is the same unless it is not finite.
            const float pair_weight = g.up[0] * e.up[0] + 0.f * (g.up[1] * e.up[1]);
            weight += pair_weight;
            block_barrier();
            transform_rows(points(item.group, pair, row), k0, params.pairs.divide(number), pair_weight);
        }
        copy_async_wait<0>();
        u32 largest = 0;
        for (int i = thread_index(); i < Plan::kSumVectors; i += Plan::kThreads) {
            const uint4 v = sums[i];
            store_for_blocks(global_sums(index) + i, v);
            for (u32 word : {v.x, v.y, v.z, v.w}) largest = (word & 0x7fffffffu) > largest ? word & 0x7fffffffu : largest;
        }
        largest = block_maximum(largest, reinterpret_cast<u32*>(Base::exchange));
        if (thread_index() == 0) *global_weight(index) = {bits_from_float(weight), largest};
        return counters.done(item.group, kRows);
    }

    // Those of this group of eight warps.
    DEVICE uint4* points(int group, int pair, int row) const { return Base::intermediate(group, 2 * pair + operand) + int64_t(row) * kLongUnits; }

    DEVICE void transform_rows(uint4* points, int k0, int channel, float weight) const {
        uint4* const own_rows = operand == 0 ? rows_g : rows_e;
        const InnerConstants constants(InnerTables{tables.inner, lane});
        const int own_unit = fragment_unit(block_warp, lane);
#pragma unroll 1
        for (int k1 = block_warp; k1 < T::kRows; k1 += kWarps) {
            RowFragment spectrum, g, e;
            Base::load_row_spectrum(spectrum, channel, k0, k1);
            const RowFragment twiddle = Base::row_twiddles(k1);
            g.load(rows_g + k1 * kRowUnits + own_unit);
            g = inner_transform(g * twiddle, constants);
            e.load(rows_e + k1 * kRowUnits + own_unit);
            e = inner_transform(e * twiddle, constants);
            float4* const row_sums = reinterpret_cast<float4*>(sums) + k1 * 128 + lane;
            for (int i = 0; i < 4; i++) accumulate(row_sums[32 * i], g.value[i / 2][i % 2], e.value[i / 2][i % 2], weight);
            if (params.grad_post_gate.data) (inner_transform(conjugate_product(g, spectrum), constants) * twiddle).store(rows_g + k1 * kRowUnits + own_unit);
            (inner_transform(product_of_conjugate(e, spectrum), constants) * twiddle).store(rows_e + k1 * kRowUnits + own_unit);
        }
        block_barrier();
        if (operand == 1 || params.grad_post_gate.data) Base::rows_to(points, own_rows);
        block_barrier();
    }

    // The row pass of the sums of a channel, from frequencies on: index = (row, channel).
    DEVICE u32* taps_item(const LongItem& item) const {
        const int row = item.index / params.group_channels, channel = item.index % params.group_channels;
        const int number = Base::channel_number(item.group, channel), k0 = params.natural_k0(row);
        counters.wait(item.group, kRows);
        if (number >= 0 && Base::ends_channel(item.group)) {
            Base::fill_row_stages(k0);
            const int exponent = scale_exponent(item.group, channel);
            const float down = exponent == kNotFinite ? float_from_bits(0x7fc00000u) : power_of_two(-exponent);
            if (row == 0 && thread_index() == 0) *taps_scale(number) = {bits_from_float(power_of_two(exponent == kNotFinite ? 0 : exponent)), 0};
            inverse_rows(item.group, channel, row, down);
            if (operand == 0) Base::rows_to(Base::intermediate(item.group, params.pair_sheets() + channel) + int64_t(row) * kLongUnits, rows_g);
        }
        return counters.done(item.group, kTaps);
    }

    static constexpr int kNotFinite = 1 << 20;

    // A power of two under which the sums of a channel come near half precision's range, and on the way back cannot leave it: by the largest of
    // all rows, as few spectra are as uneven as they may be, which is all that the length tells. No output of a transform is larger than the sum
    // of its inputs, nor their energy than what all had at the largest: N of them grow, unitary, by sqrt(N) at most.
    DEVICE int scale_exponent(int group, int channel) const {
        u32 largest = 0;
        float weight = 0.f;
        for (int row = thread_index(); row < params.radix; row += block_size()) {
            float sum = 0.f;
            for (int split = 0; split < params.row_splits(); split++) {
                const uint2 v = load_shared_by_blocks(global_weight(partial(group, channel, split, row)));
                weight += float_from_bits(v.x), sum += float_from_bits(v.y);
            }
            const u32 bits = bits_from_float(sum) & 0x7fffffffu;
            largest = bits > largest ? bits : largest;
        }
        const bool finite = weight - weight == 0.f && largest < 0x7f800000u;
        largest = block_maximum(finite ? largest : 0x7f800000u, reinterpret_cast<u32*>(Base::exchange));
        const int exponent = int(largest >> 23) - 127 + 1;
        return largest >= 0x7f800000u ? kNotFinite : exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    }

    DEVICE void inverse_rows(int group, int channel, int row, float down) const {
        const InnerConstants constants(InnerTables{tables.inner, lane});
        const int own_unit = fragment_unit(block_warp, lane);
        for (int k1 = block_warp; k1 < T::kRows; k1 += kWarps) {
            RowFragment sum;
            for (int i = 0; i < 4; i++) {
                float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
                for (int split = 0; split < params.row_splits(); split++) {
                    const uint4 w = load_shared_by_blocks(global_sums(partial(group, channel, split, row)) + k1 * 128 + 32 * i + lane);
                    v.x += float_from_bits(w.x), v.y += float_from_bits(w.y), v.z += float_from_bits(w.z), v.w += float_from_bits(w.w);
                }
                sum.value[i / 2][i % 2] = {pack(v.x * down, v.z * down), pack(-v.y * down, -v.w * down)};
            }
            (inner_transform(sum, constants) * Base::row_twiddles(k1)).store(rows_g + k1 * kRowUnits + own_unit);
        }
        block_barrier();
    }

    DEVICE u32* inverse_item(const LongItem& item) const {
        const int sheet = item.index / params.column_items;
        const bool of_taps = sheet >= params.pair_sheets();
        const ColumnTile tile = Base::column_tile(item);
        Base::fill_column_stages(tile, true);
        counters.wait(item.group, of_taps ? kTaps : kRows);
        if (!Base::returns(item.group, sheet)) return counters.done(item.group, kInverse);
        if (of_taps) {
            const int channel = Base::channel_number(item.group, sheet - params.pair_sheets());
            const float factor = float_from_bits(load_shared_by_blocks(taps_scale(channel)).x) * params.spectrum_unit;
            const int half_size = params.outer_slots * Base::slot_stride();
            float* const taps = params.grad_filter + int64_t(channel) * params.tap_halves * half_size;
            Base::return_columns(item, tile, params.tap_halves, [&](const auto& value, int position, int half) __attribute__((always_inline)) { store_taps(value, taps + half * half_size + position, factor); });
            return counters.done(item.group, kInverse);
        }
        const int pair = Base::pair_number(item.group, sheet / 2), which = sheet % 2;
        const TileSequences sequences = TileSequences::consecutive(params, pair, lane);
        const PairScales scales = Base::scales(pair, which);
        const float spectrum_scale = params.spectrum_scale[params.pairs.divide(pair)];
        Base::with_alignment([&](auto aligned) {
            constexpr bool kAligned = decltype(aligned)::value;
            Base::return_columns(item, tile, 1, [&](const auto& value, int position, int) __attribute__((always_inline)) {
                store_gradients<kAligned>(value, position, sequences, which, scales, spectrum_scale);
            });
        });
        return counters.done(item.group, kInverse);
    }

    DEVICE void store_taps(const SingleSums (&value)[kSlots / 4][2], float* taps, float factor) const {
#pragma unroll
        for (int n = 0; n < kSlots / 4; n++) {
            const int slot = 4 * n + lane % 4;
            if (slot >= params.outer_slots) continue;
            for (int half = 0; half < 2; half++)
                narrow_two(taps + slot * Base::slot_stride() + 128 * half, value[n][0].d[2 * half] * factor, value[n][1].d[2 * half] * factor);
        }
    }

    // From the first operand comes grad_post_gate, from the second grad_u and grad_pre_gate: its result times another input.
    template <bool kAligned>
    DEVICE void store_gradients(const SingleSums (&value)[kSlots / 4][2], int first, const TileSequences& sequences, int which, const PairScales& scales, float spectrum_scale) const {
        constexpr int kBatch = 2;
        const bool has_factor = which == 0 || params.pre_gate.data, has_second = which == 1 && params.grad_pre_gate.data;
        const fft_conv_tensor &factors = which == 0 ? params.grad_output : has_factor ? params.pre_gate : params.u;
        auto position = [&](int n, int half) { return (4 * n + lane % 4) * Base::slot_stride() + first + 128 * half; };
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const GlobalSequence<const Element, kAligned> factor(factors, params, sequences, c), input(params.u, params, sequences, c);
            const GlobalSequence<Element, kAligned> output(which == 0 ? params.grad_post_gate : params.grad_u, params, sequences, c);
            const GlobalSequence<Element, kAligned> second(params.grad_pre_gate, params, sequences, c);
            const float undo = spectrum_scale * scales.up[c] * (c == 0 ? 1.f : -1.f);
#pragma unroll
            for (int batch = 0; batch < kSlots / 4; batch += kBatch) {
                Pair f[kBatch][2], u[kBatch][2];
                load_batch(f, factor, has_factor, [&](int n, int half) { return position(batch + n, half); });
                load_batch(u, input, has_second, [&](int n, int half) { return position(batch + n, half); });
#pragma unroll
                for (int n = 0; n < kBatch; n++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int at = position(batch + n, half);
                        const Pair z{value[batch + n][0].d[2 * half + c] * undo, value[batch + n][1].d[2 * half + c] * undo};
                        output.store(at, z.x * f[n][half].x, z.y * f[n][half].y);
                        if (has_second) second.store(at, z.x * u[n][half].x, z.y * u[n][half].y);
                    }
            }
        }
    }

    DEVICE void run() const {
        for_each_ticket(params, reinterpret_cast<u32*>(Base::exchange) + 16, [&](const LongItem& item) __attribute__((always_inline)) -> u32* {
            switch (item.kind) {
                case kScale: return Base::scale_item(item);
                case kOuter: return Base::outer_item(item);
                case kRows: return row_item(item);
                case kTaps: return taps_item(item);
                default: return inverse_item(item);
            }
        });
    }
};

// The passes over long sequences that both directions share, as items of a launch.
#pragma once
#include "long_columns.cuh"

template <class Element, int kSlots>
struct LongPlan {
    using T = LongTile<Element>;
    static constexpr int kStageVectors = (kSlots == 8 ? 16 : 64) / 8 * (kSlots / 8) * 32;      // of the outer pass, one way
    static constexpr int kTwiddleBytes = kColumns * 4, kExchangeBytes = 128;
    static constexpr int kFixedBytes = Tables<T, false>::kSharedBytes + 2 * kStageVectors * 16 + kTwiddleBytes + kExchangeBytes;
};

template <class Element, int kSlots>
struct LongPasses {
    using T = LongTile<Element>;
    using Plan = LongPlan<Element, kSlots>;
    const LongParams& params;
    const LongCounters counters;
    const Tables<T, false> tables;     // the stages of the transform of 8,192 points are replaced by those of each item
    uint4 *outer, *inverse, *column_twiddles;
    float* exchange;
    char* memory;               // what follows
    const int block_warp, warp, lane;

    DEVICE explicit LongPasses(const LongParams& params)
        : params(params), counters{params}, tables(params.tables, shared_memory(), T::kRows), block_warp(thread_index() / 32), warp(block_warp % 8), lane(thread_index() % 32) {
        outer = reinterpret_cast<uint4*>(shared_memory() + Tables<T, false>::kSharedBytes);
        inverse = outer + Plan::kStageVectors;
        column_twiddles = inverse + Plan::kStageVectors;
        exchange = reinterpret_cast<float*>(column_twiddles + Plan::kTwiddleBytes / 16);
        memory = shared_memory() + Plan::kFixedBytes;
        copy_async_wait<0>();
        block_barrier();
        fill_stage<kSlots>({words(outer), kSlots / 8, 1}, {words(inverse), 1, kSlots / 8}, params.outer_slots, params.outer_radix, 1, 0);
        block_barrier();
    }

    DEVICE static u32* words(const uint4* vectors) { return reinterpret_cast<u32*>(const_cast<uint4*>(vectors)); }

    // Consecutive pairs, over the batch first, then over the channels; where a channel's batch is split into several groups, the last of them
    // may have fewer. Negative if there is no such pair.
    DEVICE int pair_number(int group, int pair) const {
        const int channel = group / params.channel_splits, in_channel = group % params.channel_splits * params.group_pairs + pair;
        if (params.channel_splits > 1) return in_channel < params.pairs.divisor ? channel * params.pairs.divisor + in_channel : -1;
        const int number = group * params.group_pairs + pair;
        return number < params.pair_count ? number : -1;
    }

    // The channel whose taps a group's sums belong to, negative if there is none.
    DEVICE int channel_number(int group, int channel) const {
        const int number = group / params.channel_splits * params.group_channels + channel;
        return number < params.channels ? number : -1;
    }

    DEVICE bool ends_channel(int group) const { return group % params.channel_splits == params.channel_splits - 1; }

    // Whether a sheet holds anything on the way back.
    DEVICE bool returns(int group, int sheet) const {
        if (sheet >= params.pair_sheets()) return ends_channel(group) && channel_number(group, sheet - params.pair_sheets()) >= 0;
        const bool wanted = params.operands == 1 || (sheet % 2 == 0 ? params.grad_post_gate.data != nullptr : params.grad_u.data || params.grad_pre_gate.data);
        return wanted && pair_number(group, sheet / params.operands) >= 0;
    }

    DEVICE uint4* intermediate(int group, int sheet) const {
        return static_cast<uint4*>(params.scratch) + (int64_t(group % params.ring) * params.sheets() + sheet) * (params.fft_size / 4);
    }

    DEVICE uint2* energies(int pair, int operand) const {
        return static_cast<uint2*>(params.energies) + (int64_t(pair) * params.operands + operand) * 2 * params.part_count;
    }
    DEVICE PairScales scales(int pair, int operand) const { return PairScales(energies(pair, operand), params.part_count, params.length, params.operands == 2); }

    template <class Function>
    DEVICE void with_alignment(Function function) const {
        params.pair_aligned ? function(Aligned<true>{}) : function(Aligned<false>{});
    }

    // Calls function(first, second) with the two gated sequences of an operand.
    template <class Function>
    DEVICE void with_operand(int pair, int operand, Function function) const {
        const TileSequences sequences = TileSequences::consecutive(params, pair, lane);
        const fft_conv_tensor &tensor = operand == 0 ? params.u : params.grad_output, &gate = operand == 0 ? params.pre_gate : params.post_gate;
        with_alignment([&](auto aligned) {
            using Sequence = GatedSequence<Element, decltype(aligned)::value>;
            function(Sequence(tensor, gate, params, sequences, 0), Sequence(tensor, gate, params, sequences, 1));
        });
    }

    // index = (sheet, part)
    DEVICE u32* scale_item(const LongItem& item) const {
        const int sheet = item.index / params.part_count, part = item.index % params.part_count, operand = sheet % params.operands;
        const int pair = pair_number(item.group, sheet / params.operands);
        if (pair >= 0) {
            const int begin = part * kPartPositions, end = begin + kPartPositions < params.length ? begin + kPartPositions : params.length;
            with_operand(pair, operand, [&](const auto& first, const auto& second) {
                sum_energies(first, second, begin, end, energies(pair, operand) + part, params.part_count, exchange);
            });
        }
        return counters.scaled(item.group);
    }

    DEVICE int item_chunks() const { return params.column_chunks() / params.column_items; }

    // index = (sheet, chunks)
    DEVICE u32* outer_item(const LongItem& item) const {
        // An earlier group must have left this place of the ring.
        if (item.group >= params.ring) counters.wait_for_inverse(item.group - params.ring);
        counters.wait_for_scales(item.group);
        const int sheet = item.index / params.column_items, first_chunk = item.index % params.column_items * item_chunks(), operand = sheet % params.operands;
        const int pair = pair_number(item.group, sheet / params.operands);
        if (pair >= 0) {
            const PairScales pair_scales = scales(pair, operand);
            with_operand(pair, operand, [&](const auto& first, const auto& second) {
                outer_pass<kSlots>(params, first, second, pair_scales, outer, intermediate(item.group, sheet), first_chunk, first_chunk + item_chunks());
            });
        }
        return counters.columns(item.group);
    }

    // index = (part, sheet, chunks), so that a part is soon done with.
    DEVICE u32* middle_item(const LongItem& item, bool back) const {
        const int per_sub = (back ? params.sheets() : params.pair_sheets()) * params.middle_items, sub = item.index / per_sub;
        const int sheet = item.index % per_sub / params.middle_items, chunks = kLongPoints / kColumns / params.middle_items;
        const int first = item.index % params.middle_items * chunks;
        if (!back)
            counters.wait_for_columns(item.group);
        else
            sheet < params.pair_sheets() ? counters.wait_for_rows(item.group, sub) : counters.wait_for_taps(item.group, sub);
        if (back ? returns(item.group, sheet) : pair_number(item.group, sheet / params.operands) >= 0) {
            fill_stage<kLongMiddleRadix>({words(tables.outer), 4, 1}, {words(tables.outer_inverse), 4, 1}, kLongMiddleRadix, kLongMiddleRadix, params.outer_radix, sub);
            block_barrier();
            uint4* const part = intermediate(item.group, sheet) + int64_t(sub) * (kLongMiddleRadix * kLongPoints / 4);
            middle_pass(back ? tables.outer_inverse : tables.outer, part, first, first + chunks);
        }
        return back ? counters.returned(item.group) : counters.middle(item.group, sub);
    }

    // The constants of the transform of 8,192 points at k0.
    DEVICE void fill_row_stages(int k0) const {
        fill_stage<32>({words(tables.outer), 4, 1}, {words(tables.outer_inverse), 1, 4}, 32, 32, params.radix, k0);
        fill_column_twiddles(words(column_twiddles), k0, params.fft_size);
        block_barrier();
    }

    DEVICE RowFragment row_twiddles(int row) const {
        RowFragment twiddle, shift;
        twiddle.load_twiddles(tables.twiddle + row * 64, lane);
        shift.load(column_twiddles, lane);
        return twiddle * shift;
    }

    DEVICE void load_row_spectrum(RowFragment& spectrum, int channel, int k0, int row) const {
        spectrum.load_spectrum(reinterpret_cast<const uint4*>(params.spectrum) + int64_t(channel) * (params.fft_size / 4) + (k0 + row * params.radix) * 64, lane);
    }

    // Both outer stages of the transform of 8,192 points, for a group of eight warps, between the intermediate and rows in shared memory.
    DEVICE void rows_from(const uint4* points, uint4* rows) const {
        u32 x[8][4];
        load_units<32>(x, points + column_unit(warp, lane), 64, lane);
        outer_forward<T>(x, rows, tables.outer, 0, warp, lane);
    }

    DEVICE void rows_to(uint4* points, const uint4* rows) const {
        OuterResult<T> result;
        result.add(rows, tables.outer_inverse, 0, warp, lane);
        for (int n = 0; n < OuterResult<T>::kTiles; n++) store_for_blocks(points + column_unit(warp, lane) + (4 * n + lane % 4) * 64, unit_of(result.value[n]));
    }
};

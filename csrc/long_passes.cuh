// The passes over long sequences that both directions share, as items of a launch.
#pragma once
#include "long_columns.cuh"

// Shared memory: constants of the inner stages, matrices of the stages of an item, and a region that its kind makes use of.
template <class Element, int kSlots>
struct LongPlan {
    using T = LongTile<Element>;
    static constexpr int kStageVectors = (kSlots == 8 ? 16 : 64) / 8 * (kSlots / 8) * 32;      // of the outer pass, one way
    static constexpr int kTwiddleBytes = kColumns * 4, kExchangeBytes = 128;
    static constexpr int kFixedBytes = Tables<T, false>::kSharedBytes + kTwiddleBytes + kExchangeBytes;
    // The region of an item of the outer passes: the matrix of its outer stage and, with a middle stage, the roots and the tile between the two.
    static constexpr int kStageBytes = kStageVectors * 16, kRootBytes = (kSlots == 8 ? 16 : 64) * 32 * 8, kTileBytes = kLongItemPoints * 4;
    static constexpr int column_bytes(bool has_middle) { return kStageBytes + (has_middle ? kRootBytes + kTileBytes : 0); }
};

template <class Element, int kSlots>
struct LongPasses {
    using T = LongTile<Element>;
    using Plan = LongPlan<Element, kSlots>;
    const LongParams& params;
    const LongCounters counters;
    const Tables<T, false> tables;     // the stages of the transform of 8,192 points are replaced by those of each item
    uint4* column_twiddles;
    float* exchange;
    char* memory;               // the region of an item
    uint4* outer;               // there: the outer stage, one way
    const int block_warp, warp, lane;

    DEVICE explicit LongPasses(const LongParams& params)
        : params(params), counters{params}, tables(params.tables, shared_memory(), T::kRows), block_warp(thread_index() / 32), warp(block_warp % 8), lane(thread_index() % 32) {
        column_twiddles = reinterpret_cast<uint4*>(shared_memory() + Tables<T, false>::kSharedBytes);
        exchange = reinterpret_cast<float*>(column_twiddles + Plan::kTwiddleBytes / 16);
        memory = shared_memory() + Plan::kFixedBytes;
        outer = reinterpret_cast<uint4*>(memory);
        copy_async_wait<0>();
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
        params.pair_aligned ? function(Constant<true>{}) : function(Constant<false>{});
    }

    // Calls function(first, second) with the two gated sequences of an operand.
    template <class Function>
    DEVICE void with_operand(int pair, int operand, Function function) const {
        const TileSequences sequences = TileSequences::consecutive(params, pair, lane);
        const fft_conv_tensor &tensor = operand == 0 ? params.u : params.grad_output, &gate = operand == 0 ? params.pre_gate : params.post_gate;
        with_alignment([&](auto aligned) {
            auto with_gate = [&](auto gated) {
                using Sequence = GatedSequence<Element, decltype(aligned)::value, decltype(gated)::value>;
                function(Sequence(tensor, gate, params, sequences, 0), Sequence(tensor, gate, params, sequences, 1));
            };
            gate.data ? with_gate(Constant<true>{}) : with_gate(Constant<false>{});
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
        return counters.done(item.group, kScale);
    }

    // The tile of an item of the outer passes, index = (sheet, tile), and the constants of these passes: the outer stage one way, the middle stage.
    DEVICE ColumnTile column_tile(const LongItem& item) const {
        const int sheet = item.index / params.column_items, radix = params.middle_radix();
        int log_units = 0;
        while (1 << log_units < params.item_units()) log_units++;
        return {intermediate(item.group, sheet) + first_unit(item), reinterpret_cast<uint4*>(memory + Plan::kStageBytes + Plan::kRootBytes), reinterpret_cast<Complex*>(memory + Plan::kStageBytes), log_units,
                params.outer_radix, radix, lane};
    }
    DEVICE int first_unit(const LongItem& item) const { return item.index % params.column_items * params.item_units(); }

    template <class Function>
    DEVICE void with_middle_radix(Function function) const {
        switch (params.middle_radix()) {
            case 8: return function(Constant<8>{});
            case 16: return function(Constant<16>{});
            default: return function(Constant<32>{});
        }
    }

    DEVICE void fill_column_stages(const ColumnTile& tile, bool back) const {
        u32* const matrix = words(outer);
        back ? fill_stage<kSlots>({matrix, 1, kSlots / 8}, params.outer_slots, params.outer_radix, 1, 0, true)
             : fill_stage<kSlots>({matrix, kSlots / 8, 1}, params.outer_slots, params.outer_radix, 1, 0, false);
        if (!params.has_middle()) return;
        with_middle_radix([&](auto radix) __attribute__((always_inline)) { fill_stage<radix.value>({words(tables.outer), radix.value / 8, 1}, radix.value, radix.value, 1, 0, back); });
        tile.fill_roots();
    }

    DEVICE u32* outer_item(const LongItem& item) const {
        const ColumnTile tile = column_tile(item);
        fill_column_stages(tile, false);
        // An earlier group must have left this place of the ring.
        counters.wait(item.group, kScale, item.group - params.ring, kInverse);
        const int sheet = item.index / params.column_items, operand = sheet % params.operands, pair = pair_number(item.group, sheet / params.operands);
        if (pair >= 0) {
            const PairScales pair_scales = scales(pair, operand);
            with_operand(pair, operand, [&](const auto& first, const auto& second) {
                outer_pass<kSlots>(tile, first, second, pair_scales, outer, first_unit(item));
            });
            if (params.has_middle()) {
                block_barrier();
                with_middle_radix([&](auto radix) __attribute__((always_inline)) { middle_pass<radix.value>(tile, tables.outer); });
            }
        }
        return counters.done(item.group, kOuter);
    }

    // The passes back of an item whose sheet holds anything: calls store as inverse_pass does, once for each of the taps' halves.
    template <class Store>
    DEVICE void return_columns(const LongItem& item, const ColumnTile& tile, int halves, Store store) const {
        if (params.has_middle()) {
            with_middle_radix([&](auto radix) __attribute__((always_inline)) { middle_pass_back<radix.value>(tile, tables.outer); });
            block_barrier();
        }
        for (int half = 0; half < halves; half++)
            inverse_pass<kSlots>(tile, outer, first_unit(item), half == 0 ? 0 : 0x80008000u, [&](const auto& value, int position) __attribute__((always_inline)) { store(value, position, half); });
    }

    DEVICE int slot_stride() const { return params.middle_radix() * kLongPoints; }

    // The constants of the transform of 8,192 points at k0.
    DEVICE void fill_row_stages(int k0) const {
        fill_stage<32>({words(tables.outer), 4, 1}, 32, 32, params.radix, k0, false);
        fill_stage<32>({words(tables.outer_inverse), 1, 4}, 32, 32, params.radix, k0, true);
        fill_column_twiddles(words(column_twiddles), k0, params.fft_size);
    }

    // Row twiddles with the twist by columns.
    DEVICE RowFragment shifted(const RowFragment& twiddle) const {
        RowFragment shift;
        shift.load(column_twiddles + lane);
        return twiddle * shift;
    }
    DEVICE RowFragment row_twiddles(int row) const {
        RowFragment twiddle;
        twiddle.load_twiddles(tables.twiddle + row * 64 + lane);
        return shifted(twiddle);
    }

    DEVICE void load_row_spectrum(RowFragment& spectrum, int channel, int k0, int row) const {
        spectrum.load_spectrum(reinterpret_cast<const uint4*>(params.spectrum) + int64_t(channel) * (params.fft_size / 4) + (k0 + row * params.radix) * 64 + lane);
    }

    // Both outer stages of the transform of 8,192 points, for a group of eight warps, between the intermediate and rows in shared memory. Its points
    // come asynchronously to a place where every lane finds its own.
    DEVICE int row_unit_of_lane() const { return warp * 8 + lane / 4; }
    DEVICE void start_points(uint4* stage, const uint4* points) const {
#pragma unroll
        for (int j = 0; j < 8; j++) copy_async<16>(stage + (j * 8 + warp) * 32 + lane, points + row_unit_of_lane() + (4 * j + lane % 4) * 64);
    }
    DEVICE void rows_from(const uint4* stage, uint4* rows) const {
        u32 x[8][4];
#pragma unroll
        for (int j = 0; j < 8; j++) spread_unit(x[j], stage[(j * 8 + warp) * 32 + lane]);
        outer_forward<T>(x, rows, tables.outer, warp, lane);
    }

    DEVICE void rows_to(uint4* points, const uint4* rows) const {
        OuterResult<T> result;
        result.add(rows, tables.outer_inverse, warp, lane);
        for (int n = 0; n < OuterResult<T>::kTiles; n++) store_for_blocks(points + row_unit_of_lane() + (4 * n + lane % 4) * 64, unit_of(result.value[n]));
    }
};

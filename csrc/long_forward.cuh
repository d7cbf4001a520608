// The forward pass over long sequences.
#pragma once
#include "long_passes.cuh"

template <class Element, int kSlots>
struct LongForwardPlan {
    static constexpr int kThreads = 256, kBlocks = 2;
    static constexpr int kRowBytes = LongTile<Element>::kRowBytes, kPointBytes = kLongPoints * 4;
    static constexpr int shared_bytes(bool has_middle) {
        const int row_bytes = kRowBytes + kPointBytes, column_bytes = LongPlan<Element, kSlots>::column_bytes(has_middle);
        return LongPlan<Element, kSlots>::kFixedBytes + (row_bytes > column_bytes ? row_bytes : column_bytes);
    }
    static_assert(kBlocks * (shared_bytes(kSlots == 8) + 1024) <= kSharedLimit + 1024, "shared memory of a block");
};

template <class Element, int kSlots>
struct LongForward : LongPasses<Element, kSlots> {
    using Base = LongPasses<Element, kSlots>;
    using Plan = LongForwardPlan<Element, kSlots>;
    using T = typename Base::T;
    using Base::params, Base::counters, Base::tables, Base::warp, Base::lane;
    uint4 *const rows, *const stage;

    DEVICE explicit LongForward(const LongParams& params)
        : Base(params), rows(reinterpret_cast<uint4*>(Base::memory)), stage(reinterpret_cast<uint4*>(Base::memory + Plan::kRowBytes)) {}

    // Some rows, one after the other: step = (row, pair). The points of each come while the one before is worked on.
    DEVICE u32* row_item(const LongItem& item) const {
        const int first = item.index * params.row_steps, all = params.radix * params.group_pairs, last = first + params.row_steps < all ? first + params.row_steps : all;
        auto pair_of = [&](int step) { return Base::pair_number(item.group, step % params.group_pairs); };
        auto points_of = [&](int step) { return Base::intermediate(item.group, step % params.group_pairs) + int64_t(step / params.group_pairs) * kLongUnits; };
        auto start = [&](int step) {
            if (step < last && pair_of(step) >= 0) Base::start_points(stage, points_of(step));
            copy_async_commit();
        };
        counters.wait(item.group, kOuter);
        start(first);
        int filled = -1;
        for (int step = first; step < last; step++) {
            const int row = step / params.group_pairs, k0 = params.natural_k0(row), pair = pair_of(step);
            if (row != filled) Base::fill_row_stages(k0);
            if (row != filled) block_barrier();
            filled = row;
            copy_async_wait<0>();
            if (pair >= 0) Base::rows_from(stage, rows);
            start(step + 1);
            block_barrier();
            if (pair >= 0) transform_rows(points_of(step), params.pairs.divide(pair), k0);
        }
        copy_async_wait<0>();
        return counters.done(item.group, kRows);
    }

    DEVICE void transform_rows(uint4* points, int channel, int k0) const {
        const InnerConstants constants(InnerTables{tables.inner, lane});
        const int own_unit = fragment_unit(warp, lane);
        RowFragment next_spectrum, next_twiddle;
        auto load_next = [&](int row) {
            Base::load_row_spectrum(next_spectrum, channel, k0, row);
            next_twiddle.load_twiddles(tables.twiddle + row * 64 + lane);
        };
        load_next(warp);
#pragma unroll 1
        for (int row = warp; row < T::kRows; row += T::kWarps) {
            const RowFragment spectrum = next_spectrum, twiddle = Base::shifted(next_twiddle);
            if (row + T::kWarps < T::kRows) load_next(row + T::kWarps);
            uint4* words = rows + row * kRowUnits;
            RowFragment value;
            value.load(words + own_unit);
            value = inner_transform(value * twiddle, constants);
            value = conjugate_product(value, spectrum);
            value = inner_transform(value, constants) * twiddle;
            value.store(words + own_unit);
        }
        block_barrier();
        Base::rows_to(points, rows);
        block_barrier();
    }

    DEVICE u32* inverse_item(const LongItem& item) const {
        const ColumnTile tile = Base::column_tile(item);
        Base::fill_column_stages(tile, true);
        counters.wait(item.group, kRows);
        const int pair = Base::pair_number(item.group, item.index / params.column_items);
        if (pair >= 0) {
            const TileSequences sequences = TileSequences::consecutive(params, pair, lane);
            const PairScales scales = Base::scales(pair, 0);
            const float spectrum_scale = params.spectrum_scale[params.pairs.divide(pair)];
            Base::with_alignment([&](auto aligned) {
                constexpr bool kAligned = decltype(aligned)::value;
                Base::return_columns(item, tile, 1, [&](const auto& value, int position, int) __attribute__((always_inline)) { store_output<kAligned>(value, position, sequences, scales, spectrum_scale); });
            });
        }
        return counters.done(item.group, kInverse);
    }

    // Gates and stores; the imaginary sequence comes out conjugated. Slots that are not there lie beyond the sequence.
    template <bool kAligned>
    DEVICE void store_output(const SingleSums (&value)[kSlots / 4][2], int first, const TileSequences& sequences, const PairScales& scales, float spectrum_scale) const {
        constexpr int kBatch = kSlots == 8 ? 2 : 4;
        auto position = [&](int n, int half) { return (4 * n + lane % 4) * Base::slot_stride() + first + 128 * half; };
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const GlobalSequence<Element, kAligned> output(params.output, params, sequences, c);
            const GlobalSequence<const Element, kAligned> gate(params.post_gate.data ? params.post_gate : params.u, params, sequences, c);
            const float factor = spectrum_scale * scales.up[c] * (c == 0 ? 1.f : -1.f);
#pragma unroll
            for (int batch = 0; batch < kSlots / 4; batch += kBatch) {
                Pair gates[kBatch][2];
                load_batch(gates, gate, params.post_gate.data, [&](int n, int half) { return position(batch + n, half); });
#pragma unroll
                for (int n = 0; n < kBatch; n++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const SingleSums(&sums)[2] = value[batch + n];
                        output.store(position(batch + n, half), sums[0].d[2 * half + c] * factor * gates[n][half].x, sums[1].d[2 * half + c] * factor * gates[n][half].y);
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
                default: return inverse_item(item);
            }
        });
    }
};

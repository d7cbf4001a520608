// The forward pass over long sequences.
#pragma once
#include "long_passes.cuh"

template <class Element, int kSlots>
struct LongForwardPlan {
    static constexpr int kThreads = 256, kBlocks = 2;
    static constexpr int kSharedBytes = LongPlan<Element, kSlots>::kFixedBytes + LongTile<Element>::kRowBytes;
    static_assert(kBlocks * (kSharedBytes + 1024) <= kSharedLimit + 1024, "shared memory of a block");
};

template <class Element, int kSlots>
struct LongForward : LongPasses<Element, kSlots> {
    using Base = LongPasses<Element, kSlots>;
    using T = typename Base::T;
    using Base::params, Base::counters, Base::tables, Base::inverse, Base::warp, Base::lane;
    uint4* const rows;

    DEVICE explicit LongForward(const LongParams& params) : Base(params), rows(reinterpret_cast<uint4*>(Base::memory)) {}

    // One k0 of several pairs: index = (row, pairs).
    DEVICE u32* row_item(const LongItem& item) const {
        const int row = item.index / params.row_items(), first = item.index % params.row_items() * params.row_pairs;
        const int sub = row / (params.radix / params.subs), k0 = params.natural_k0(row);
        counters.wait_for_part(item.group, sub);
        Base::fill_row_stages(k0);
        for (int pair = first; pair < first + params.row_pairs && pair < params.group_pairs; pair++) {
            const int number = Base::pair_number(item.group, pair);
            if (number < 0) break;
            transform_rows(Base::intermediate(item.group, pair) + int64_t(row) * (kLongPoints / 4), params.pairs.divide(number), k0);
        }
        return counters.rows(item.group, sub);
    }

    DEVICE void transform_rows(uint4* points, int channel, int k0) const {
        Base::rows_from(points, rows);
        const InnerConstants constants(InnerTables{tables.inner, lane});
        block_barrier();
#pragma unroll 1
        for (int row = warp; row < T::kRows; row += T::kWarps) {
            RowFragment value, spectrum;
            Base::load_row_spectrum(spectrum, channel, k0, row);
            const RowFragment twiddle = Base::row_twiddles(row);
            uint4* words = rows + row * (kRowPitch / 4);
            value.load(words, lane);
            value = inner_transform(value * twiddle, constants);
            value = conjugate_product(value, spectrum);
            value = inner_transform(value, constants) * twiddle;
            value.store(words, lane);
        }
        block_barrier();
        Base::rows_to(points, rows);
        block_barrier();
    }

    DEVICE u32* inverse_item(const LongItem& item) const {
        counters.wait_for_return(item.group, false);
        const int sheet = item.index / params.column_items, first = item.index % params.column_items * Base::item_chunks();
        const int pair = Base::pair_number(item.group, sheet);
        if (pair >= 0) {
            const TileSequences sequences = TileSequences::consecutive(params, pair, lane);
            const PairScales scales = Base::scales(pair, 0);
            const float spectrum_scale = params.spectrum_scale[params.pairs.divide(pair)];
            Base::with_alignment([&](auto aligned) {
                constexpr bool kAligned = decltype(aligned)::value;
                inverse_pass<kSlots>(params, inverse, Base::intermediate(item.group, sheet), first, first + Base::item_chunks(), 0, [&](const auto& value, int chunk) {
                    store_output<kAligned>(value, chunk, sequences, scales, spectrum_scale);
                });
            });
        }
        return counters.inverted(item.group);
    }

    // Gates and stores; the imaginary sequence comes out conjugated.
    template <bool kAligned>
    DEVICE void store_output(const SingleSums (&value)[kSlots / 4][2], int chunk, const TileSequences& sequences, const PairScales& scales, float spectrum_scale) const {
        const int column = chunk * kColumns + outer_column(warp, lane), stride = params.fft_size / params.outer_radix;
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const GlobalSequence<Element, kAligned> output(params.output, params, sequences, c);
            const GlobalSequence<const Element, kAligned> gate(params.post_gate.data ? params.post_gate : params.u, params, sequences, c);
            const float factor = spectrum_scale * scales.up[c] * (c == 0 ? 1.f : -1.f);
#pragma unroll
            for (int n = 0; n < kSlots / 4; n++) {
                const int slot = 4 * n + lane % 4;
                if (slot >= params.outer_slots) continue;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int position = slot * stride + column + 128 * half;
                    Pair y{value[n][0].d[2 * half + c] * factor, value[n][1].d[2 * half + c] * factor};
                    if (params.post_gate.data) {
                        const Pair g = gate.load(position);
                        y = {y.x * g.x, y.y * g.y};
                    }
                    output.store(position, y.x, y.y);
                }
            }
        }
    }

    DEVICE void run() const {
        for_each_ticket(params, reinterpret_cast<u32*>(Base::exchange) + 16, [&](const LongItem& item) -> u32* {
            switch (item.kind) {
                case kScale: return Base::scale_item(item);
                case kOuter: return Base::outer_item(item);
                case kMiddle: return Base::middle_item(item, false);
                case kRows: return row_item(item);
                case kMiddleBack: return Base::middle_item(item, true);
                default: return inverse_item(item);
            }
        });
    }
};

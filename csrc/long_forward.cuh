// The forward pass over long sequences.
#pragma once
#include "long_columns.cuh"

template <class Element, int kSlots>
struct LongPlan {
    using T = LongTile<Element>;
    static constexpr int kThreads = 256, kBlocks = 2;
    static constexpr int kStageVectors = (kSlots == 8 ? 16 : 64) / 8 * (kSlots / 8) * 32;      // of the outer pass, one way
    static constexpr int kTwiddleBytes = kColumns * 4, kExchangeBytes = 128;
    static constexpr int kFixedBytes = Tables<T>::kSharedBytes + 2 * kStageVectors * 16 + kTwiddleBytes + kExchangeBytes;
    static constexpr int kSharedBytes = kFixedBytes + T::kRowBytes;
    static_assert(kBlocks * (kSharedBytes + 1024) <= kSharedLimit + 1024, "shared memory of a block");
};

template <class Element, int kSlots>
struct LongForward {
    using T = LongTile<Element>;
    using Plan = LongPlan<Element, kSlots>;
    const LongParams& params;
    const LongCounters counters;
    const Tables<T> tables;     // the stages of the transform of 8,192 points are replaced by those of each item
    uint4 *outer, *inverse, *column_twiddles, *rows;
    float* exchange;
    const int warp, lane;

    DEVICE explicit LongForward(const LongParams& params)
        : params(params), counters{params}, tables(params.tables, shared_memory()), warp(thread_index() / 32), lane(thread_index() % 32) {
        outer = reinterpret_cast<uint4*>(shared_memory() + Tables<T>::kSharedBytes);
        inverse = outer + Plan::kStageVectors;
        column_twiddles = inverse + Plan::kStageVectors;
        rows = column_twiddles + Plan::kTwiddleBytes / 16;
        exchange = reinterpret_cast<float*>(rows + T::kRowBytes / 16);
        block_barrier();
        fill_stage<kSlots>({reinterpret_cast<u32*>(outer), kSlots / 8, 1}, {reinterpret_cast<u32*>(inverse), 1, kSlots / 8}, params.outer_slots, params.outer_radix, 1, 0);
        block_barrier();
    }

    DEVICE int pair_number(const LongItem& item, int pair) const { return item.group * params.group_pairs + pair; }
    DEVICE uint4* intermediate(const LongItem& item, int pair) const {
        return static_cast<uint4*>(params.scratch) + (int64_t(item.group % params.ring) * params.group_pairs + pair) * (params.fft_size / 4);
    }
    DEVICE uint2* energies(const LongItem& item, int pair) const {
        return static_cast<uint2*>(params.energies) + int64_t(pair_number(item, pair)) * 2 * params.part_count;
    }

    template <class Function>
    DEVICE void with_alignment(Function function) const {
        params.pair_aligned ? function(Aligned<true>{}) : function(Aligned<false>{});
    }

    DEVICE u32* scale(const LongItem& item) const {
        const int pair = item.index / params.part_count, part = item.index % params.part_count;
        if (pair_number(item, pair) < params.pair_count) {
            const TileSequences sequences = TileSequences::consecutive(params, pair_number(item, pair), lane);
            const int begin = part * kPartPositions, end = begin + kPartPositions < params.length ? begin + kPartPositions : params.length;
            with_alignment([&](auto aligned) {
                using Sequence = GatedSequence<Element, decltype(aligned)::value>;
                const Sequence first(params.u, params.pre_gate, params, sequences, 0), second(params.u, params.pre_gate, params, sequences, 1);
                sum_energies(first, second, begin, end, energies(item, pair) + part, params.part_count, exchange);
            });
        }
        return counters.whole(item.group, counters.kScaled);
    }

    DEVICE u32* outer_item(const LongItem& item) const {
        // An earlier group must have left this place of the ring.
        if (item.group >= params.ring) counters.wait(counters.whole(item.group - params.ring, counters.kInverted), params.group_pairs * params.column_items);
        counters.wait(counters.whole(item.group, counters.kScaled), params.group_pairs * params.part_count);
        const int pair = item.index / params.column_items, chunks = params.column_chunks() / params.column_items, first = item.index % params.column_items * chunks;
        if (pair_number(item, pair) < params.pair_count) {
            const TileSequences sequences = TileSequences::consecutive(params, pair_number(item, pair), lane);
            const PairScales scales(energies(item, pair), params.part_count, params.length, false);
            with_alignment([&](auto aligned) {
                using Sequence = GatedSequence<Element, decltype(aligned)::value>;
                const Sequence re(params.u, params.pre_gate, params, sequences, 0), im(params.u, params.pre_gate, params, sequences, 1);
                outer_pass<kSlots>(params, re, im, scales, outer, intermediate(item, pair), first, first + chunks);
            });
        }
        return counters.whole(item.group, counters.kColumns);
    }

    // Parts of pairs: index = (sub, pair, item), so that a part is done with soon.
    DEVICE u32* middle(const LongItem& item, bool back) const {
        const int per_sub = params.group_pairs * params.middle_items, sub = item.index / per_sub, index = item.index % per_sub;
        const int pair = index / params.middle_items, chunks = kLongPoints / kColumns / params.middle_items, first = index % params.middle_items * chunks;
        if (back)
            counters.wait(counters.rows(item.group, sub), kLongMiddleRadix * row_items());
        else
            counters.wait(counters.whole(item.group, counters.kColumns), params.group_pairs * params.column_items);
        if (pair_number(item, pair) < params.pair_count) {
            const MatrixOperand forward_matrix{words(tables.outer), 4, 1}, back_matrix{words(tables.outer_inverse), 4, 1};
            fill_stage<kLongMiddleRadix>(forward_matrix, back_matrix, kLongMiddleRadix, kLongMiddleRadix, params.outer_radix, sub);
            block_barrier();
            middle_pass(back ? tables.outer_inverse : tables.outer, intermediate(item, pair) + int64_t(sub) * (kLongMiddleRadix * kLongPoints / 4), first, first + chunks);
        }
        return back ? counters.whole(item.group, counters.kReturned) : counters.middle(item.group, sub);
    }

    DEVICE static u32* words(const uint4* vectors) { return reinterpret_cast<u32*>(const_cast<uint4*>(vectors)); }

    DEVICE int row_items() const { return (params.group_pairs + params.row_pairs - 1) / params.row_pairs; }

    // One k0 of several pairs: index = (row, pairs).
    DEVICE u32* row_item(const LongItem& item) const {
        const int row = item.index / row_items(), first = item.index % row_items() * params.row_pairs, sub = params.has_middle() ? row / kLongMiddleRadix : 0;
        if (params.has_middle())
            counters.wait(counters.middle(item.group, sub), params.group_pairs * params.middle_items);
        else
            counters.wait(counters.whole(item.group, counters.kColumns), params.group_pairs * params.column_items);
        const int k0 = params.natural_k0(row);
        fill_stage<32>({words(tables.outer), 4, 1}, {words(tables.outer_inverse), 1, 4}, 32, 32, params.radix, k0);
        fill_column_twiddles(words(column_twiddles), k0, params.fft_size);
        block_barrier();
        for (int pair = first; pair < first + params.row_pairs && pair < params.group_pairs && pair_number(item, pair) < params.pair_count; pair++) {
            const int channel = params.pairs.divide(pair_number(item, pair));
            const uint4* const spectra = reinterpret_cast<const uint4*>(params.spectrum) + int64_t(channel) * (params.fft_size / 4) + k0 * 64;
            transform_rows(intermediate(item, pair) + int64_t(row) * (kLongPoints / 4), spectra);
        }
        return params.has_middle() ? counters.rows(item.group, sub) : counters.whole(item.group, counters.kReturned);
    }

    DEVICE void transform_rows(uint4* points, const uint4* spectra) const {
        uint4* const units = points + column_unit(warp, lane);
        u32 x[8][4];
        load_units<32>(x, units, 64, lane);
        outer_forward<T>(x, rows, tables.outer, warp, lane);
        InnerConstants constants;
        constants.load(tables.inner, lane);
        block_barrier();
#pragma unroll 1
        for (int row = warp; row < T::kRows; row += T::kWarps) {
            RowFragment value, spectrum, twiddle, shift;
            spectrum.load_spectrum(spectra + row * params.radix * 64, lane);
            twiddle.load_twiddles(tables.twiddle + row * 64, lane);
            shift.load(column_twiddles, lane);
            twiddle = twiddle * shift;
            uint4* words = rows + row * (kRowPitch / 4);
            value.load(words, lane);
            value = inner_transform(value * twiddle, constants);
            value = conjugate_product(value, spectrum);
            value = inner_transform(value, constants) * twiddle;
            value.store(words, lane);
        }
        block_barrier();
        OuterResult<T> result;
        result.transform(rows, tables.outer_inverse, warp, lane);
        for (int n = 0; n < OuterResult<T>::kTiles; n++) store_for_blocks(units + (4 * n + lane % 4) * 64, unit_of(result.value[n]));
        block_barrier();
    }

    DEVICE u32* inverse_item(const LongItem& item) const {
        const int returned = params.has_middle() ? params.outer_radix * params.group_pairs * params.middle_items : params.radix * row_items();
        counters.wait(counters.whole(item.group, counters.kReturned), returned);
        const int pair = item.index / params.column_items, chunks = params.column_chunks() / params.column_items, first = item.index % params.column_items * chunks;
        if (pair_number(item, pair) < params.pair_count) {
            const TileSequences sequences = TileSequences::consecutive(params, pair_number(item, pair), lane);
            const PairScales scales(energies(item, pair), params.part_count, params.length, false);
            const float spectrum_scale = params.spectrum_scale[params.pairs.divide(pair_number(item, pair))];
            with_alignment([&](auto aligned) {
                constexpr bool kAligned = decltype(aligned)::value;
                inverse_pass<kSlots>(params, inverse, intermediate(item, pair), first, first + chunks, [&](const float (&value)[kSlots / 4][2][4], int chunk) {
                    store_output<kAligned>(value, chunk, sequences, scales, spectrum_scale);
                });
            });
        }
        return counters.whole(item.group, counters.kInverted);
    }

    // Gates and stores; the imaginary sequence comes out conjugated.
    template <bool kAligned>
    DEVICE void store_output(const float (&value)[kSlots / 4][2][4], int chunk, const TileSequences& sequences, const PairScales& scales, float spectrum_scale) const {
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
                    Pair y{value[n][0][2 * half + c] * factor, value[n][1][2 * half + c] * factor};
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
        for_each_ticket(params, reinterpret_cast<u32*>(exchange) + 16, [&](const LongItem& item) -> u32* {
            switch (item.kind) {
                case kScale: return scale(item);
                case kOuter: return outer_item(item);
                case kMiddle: return middle(item, false);
                case kRows: return row_item(item);
                case kMiddleBack: return middle(item, true);
                default: return inverse_item(item);
            }
        });
    }
};

// y = post_gate * conv(pre_gate * u, k) over long sequences: the passes of csrc/long.cuh as items of one launch.
#pragma once
#include "long_columns.cuh"

// Shared memory: constants of all teams, and for each team a region that the kind of its item makes use of.
template <class Element, int kSlots>
struct LongPlan {
    using T = LongTile<Element>;
    static constexpr int kTeams = 2, kThreads = kTeams * kTeamThreads;     // at most, as shared memory allows
    static constexpr int kMaxRadix = kSlots == 8 ? 512 : 2048, kMaxOuterRadix = 2 * kSlots;
    // Of the outer stage, one way, of the middle stage, both ways, of the row twiddles of the first eight rows.
    static constexpr int kOuterVectors = kMaxOuterRadix / 8 * (kSlots / 8) * 32, kMiddleVectors = 512, kTwiddleVectors = T::kWarps * 64;
    static constexpr int kFixedBytes = (kInnerConstantVectors + 2 * kOuterVectors + kMiddleVectors + kTwiddleVectors) * 16 + kMaxRadix * 8;
    static constexpr int kRowStageVectors = 512, kRowItemBytes = T::kRowBytes + (2 * kRowStageVectors + 4 * 64) * 16;
    static constexpr int kRegionBytes = kLongItemPoints * 4, kControlBytes = 512, kTeamBytes = kControlBytes + kRegionBytes;
    static constexpr int shared_bytes(int teams) { return kFixedBytes + teams * kTeamBytes; }
    static_assert(kRowItemBytes <= kRegionBytes && shared_bytes(kTeams) <= kSharedLimit, "shared memory of a block");
};

template <class Element, int kSlots>
struct LongForward {
    using T = LongTile<Element>;
    using Plan = LongPlan<Element, kSlots>;
    struct Control {
        TileHeader header;
        LongTurns turns;
        float exchange[8];
    };
    static_assert(sizeof(Control) <= Plan::kControlBytes, "shared memory of a team");
    const LongParams& params;
    const LongCounters counters;
    const Team team;

    // Made anew for each item: what follows from its number a thread works out there, and does not park it meanwhile.
    DEVICE explicit LongForward(const LongParams& params) : params(params), counters{params}, team(fresh_thread_index()) {}

    DEVICE void fill_constants() const {
        const uint4* const tables = reinterpret_cast<const uint4*>(params.tables);
        for (int i = thread_index(); i < kInnerConstantVectors; i += block_size()) inner()[i] = tables[i];
        for (int i = thread_index(); i < Plan::kTwiddleVectors; i += block_size()) twiddles()[i] = tables[kInnerConstantVectors + 2 * Plan::kRowStageVectors + i];
        const int radix = params.outer_radix, middle = params.middle_radix(), down = stage_exponent(radix);
        // The middle stage takes half of its share on the way back, and this one twice its own.
        const float back = power_of_two(down) / float(radix) * (params.has_middle() ? 2.f : 1.f);
        MatrixOperand{outer(), kSlots / 8, 1}.fill(radix, kSlots, Plan::kMaxOuterRadix, power_of_two(-down));
        MatrixOperand{outer_back(), 1, kSlots / 8}.fill(radix, Plan::kMaxOuterRadix, kSlots, back);
        if (params.has_middle()) MatrixOperand{middle_stage(), middle / 8, 1}.fill(middle, middle, middle, power_of_two(-stage_exponent(middle)));
        for (int i = thread_index(); i < params.radix; i += block_size()) root_of_unity(i, params.radix, &roots()[i].re, &roots()[i].im);
        block_barrier();
    }

    DEVICE static uint4* inner() { return reinterpret_cast<uint4*>(shared_memory()); }
    DEVICE static uint4* outer() { return inner() + kInnerConstantVectors; }
    DEVICE static uint4* outer_back() { return outer() + Plan::kOuterVectors; }
    DEVICE static uint4* middle_stage() { return outer_back() + Plan::kOuterVectors; }
    DEVICE static uint4* twiddles() { return middle_stage() + Plan::kMiddleVectors; }
    DEVICE static Complex* roots() { return reinterpret_cast<Complex*>(twiddles() + Plan::kTwiddleVectors); }
    DEVICE Control& control() const { return *reinterpret_cast<Control*>(shared_memory() + Plan::kFixedBytes + team.index * Plan::kTeamBytes); }
    DEVICE char* region() const { return reinterpret_cast<char*>(&control()) + Plan::kControlBytes; }
    // In the region of an item of the row pass.
    DEVICE uint4* rows() const { return reinterpret_cast<uint4*>(region()); }
    DEVICE uint4* row_stage() const { return rows() + T::kRowBytes / 16; }
    DEVICE uint4* row_stage_back() const { return row_stage() + Plan::kRowStageVectors; }
    DEVICE uint4* column_twiddles() const { return row_stage_back() + Plan::kRowStageVectors; }

    // Consecutive pairs, over the batch first, then over the channels; negative if there is no such pair.
    DEVICE int pair_number(const LongItem& item) const {
        const int number = item.group * params.group_pairs + item.pair;
        return number < params.pair_count ? number : -1;
    }
    DEVICE uint4* sheet(const LongItem& item) const {
        return static_cast<uint4*>(params.scratch) + (int64_t(item.group % params.ring) * params.group_pairs + item.pair) * (params.fft_size / 4);
    }
    DEVICE ColumnTile column_tile(const LongItem& item) const { return {params, team, sheet(item), reinterpret_cast<uint4*>(region()), roots(), item.part}; }

    // A pair's scales in global memory, before the energies of all parts.
    DEVICE uint4* scales_of(int pair) const { return static_cast<uint4*>(params.energies) + pair; }
    DEVICE uint2* energies(int pair) const { return reinterpret_cast<uint2*>(scales_of(params.pair_count)) + int64_t(pair) * 2 * params.part_count; }
    DEVICE PairScales load_scales(int pair) const {
        const uint4 v = load_shared_by_blocks(scales_of(pair));
        return {{float_from_bits(v.x), float_from_bits(v.y)}, {float_from_bits(v.z), float_from_bits(v.w)}};
    }

    // Where the pair's sequences lie in every tensor; a barrier of the team must follow.
    DEVICE void fill_header(int pair) const {
        if (team.warp == 0 && pair >= 0) control().header.template fill<Element>(params, RegularSequences::consecutive<T>(params, pair), team.lane);
    }
    template <class X, bool kAligned>
    DEVICE GlobalSequence<X, kAligned> sequence(TensorIndex tensor, int c, bool present = true) const {
        const TileHeader& header = control().header;
        return {reinterpret_cast<X*>(header.first[tensor]) + c * (&params.u)[tensor].batch_stride, present && (c == 0 || header.second) ? params.length : 0};
    }
    // Calls function with a function that makes one of the two gated sequences.
    template <class Function>
    DEVICE void with_gated(Function function) const {
        auto with = [&](auto aligned, auto gated) __attribute__((always_inline)) {
            constexpr bool kAligned = decltype(aligned)::value, kGated = decltype(gated)::value;
            function([&](int c, bool present) {
                return GatedSequence<Element, kAligned, kGated>{sequence<const Element, kAligned>(kU, c, present), sequence<const Element, kAligned>(kPreGate, c, present)};
            });
        };
        if (params.pair_aligned)
            params.pre_gate.data ? with(Constant<true>{}, Constant<true>{}) : with(Constant<true>{}, Constant<false>{});
        else
            params.pre_gate.data ? with(Constant<false>{}, Constant<true>{}) : with(Constant<false>{}, Constant<false>{});
    }

    // The energies of a part of a pair. Who comes last finds its scales.
    DEVICE u32* scale_item(const LongItem& item) const {
        const int pair = pair_number(item), begin = item.part * kPartPositions, end = begin + kPartPositions < params.length ? begin + kPartPositions : params.length;
        if (pair < 0) return item.part == 0 ? counters.done(item.group, kScale) : nullptr;
        fill_header(pair);
        team.barrier();
        with_gated([&](auto sequence_of) __attribute__((always_inline)) {
#pragma unroll 1
            for (int c = 0; c < 2; c++) {
                const auto sequence = sequence_of(c, true);
                Energy energy;
                if (sequence.values.length > 0) energy = part_energy(team, sequence, params.whole_units, begin, end, control().exchange);
                if (team.thread == 0) energies(pair)[c * params.part_count + item.part] = {bits_from_float(energy.value), u32(energy.exponent)};
            }
        });
        return finish_scales(item, pair);
    }
    DEVICE u32* finish_scales(const LongItem& item, int pair) const {
        u32* const last = reinterpret_cast<u32*>(control().exchange);
        team.barrier();
        if (team.thread == 0) *last = take_ticket_in_order(counters.parts_done(pair)) == u32(params.part_count - 1);
        team.barrier();
        if (!*last) return nullptr;
        if (team.warp == 0) {
            const PairScales scales = scales_of_parts(energies(pair), params.part_count, params.length, params.transforms);
            if (team.lane == 0) {
                *scales_of(pair) = make_uint4(bits_from_float(scales.down[0]), bits_from_float(scales.down[1]), bits_from_float(scales.up[0]), bits_from_float(scales.up[1]));
                if (params.transforms) params.pair_scales[pair] = larger_or_nan(scales.up[0], scales.up[1]);
            }
        }
        return counters.done(item.group, kScale);
    }

    template <class Function>
    DEVICE void with_middle_radix(Function function) const {
        params.middle_radix() == 8 ? function(Constant<8>{}) : function(Constant<32>{});
    }

    DEVICE u32* outer_item(const LongItem& item, bool ready) const {
        const int pair = pair_number(item);
        fill_header(pair);
        counters.wait(team, item, ready);
        if (pair < 0) return counters.done(item.group, kOuter);
        const ColumnTile tile = column_tile(item);
        const PairScales scales = load_scales(pair);
        with_gated([&](auto sequence_of) __attribute__((always_inline)) {
            tile.template from_sequences<kSlots>(sequence_of(0, scales.down[0] > 0.f), sequence_of(1, scales.down[1] > 0.f), scales, outer());
        });
        if (params.has_middle()) {
            team.barrier();
            with_middle_radix([&](auto radix) __attribute__((always_inline)) { tile.template middle_there<radix.value>(middle_stage()); });
        }
        return counters.done(item.group, kOuter);
    }

    // One k0 of a pair.
    DEVICE u32* row_item(const LongItem& item, bool ready) const {
        const int pair = pair_number(item), k0 = params.natural_k0(item.part);
        // The spectrum's rows, of as many 128-byte lines as the team has threads.
        if (pair >= 0) prefetch(spectrum_row(pair, k0, team.thread / 8) + team.thread % 8 * 8);
        counters.wait(team, item, ready);
        if (pair < 0) return counters.done(item.group, kRows);
        // A lane has the unit warp * 8 + lane / 4 of the slots 4 j + lane % 4, which come to a place where it finds its own.
        uint4* const points = sheet(item) + int64_t(item.part) * kLongUnits + team.warp * 8 + team.lane / 4 + team.lane % 4 * kRowUnits;
        uint4* const own = rows() + team.thread;
#pragma unroll
        for (int j = 0; j < 8; j++) copy_async<16>(own + j * kTeamThreads, points + 4 * j * kRowUnits);
        copy_async_commit();
        fill_row_stages(team, row_stage(), row_stage_back(), params.radix, k0);
        fill_column_twiddles(team, column_twiddles(), params.radix, k0, params.fft_size);
        copy_async_wait<0>();
        u32 x[8][4];
#pragma unroll
        for (int j = 0; j < 8; j++) spread_unit(x[j], own[j * kTeamThreads]);
        team.barrier();
        outer_forward<T, 1>(x, rows(), row_stage(), team.warp, team.lane);
        team.barrier();
        transform_rows(pair, k0);
        if (!params.output.data) return counters.done(item.group, kRows);
        team.barrier();
        const uint4* const from = rows() + team.lane % 4 * kRowUnits + row_unit(team.lane, team.warp, team.lane);
#pragma unroll
        for (int j = 0; j < 8; j++) spread_unit(x[j], from[4 * j * kRowUnits]);
        contract<32, 1>(x, row_stage_back(), 8, team.lane, [&](int n, const SingleSums (&d)[2]) __attribute__((always_inline)) { store_for_blocks(points + 4 * n * kRowUnits, packed(d)); });
        return counters.done(item.group, kRows);
    }

    // Where row k1 of k0 lies in a transform.
    DEVICE int64_t transform_row(int k0, int k1) const { return (k0 + int64_t(k1) * params.radix) * kRowUnits; }
    DEVICE const uint4* spectrum_row(int pair, int k0, int k1) const {
        return reinterpret_cast<const uint4*>(params.spectrum) + int64_t(params.pairs.divide(pair)) * (params.fft_size / 4) + transform_row(k0, k1);
    }

    DEVICE void transform_rows(int pair, int k0) const {
        const InnerTables constants{inner(), team.lane};
        const int own_unit = fragment_unit(team.warp, team.lane);
        RowFragment next_spectrum;
        next_spectrum.load_spectrum(spectrum_row(pair, k0, team.warp) + team.lane);
#pragma unroll 1
        for (int k1 = team.warp; k1 < T::kRows; k1 += T::kWarps) {
            uint4* const words = rows() + k1 * kRowUnits + own_unit;
            RowFragment value, twiddle, shift;
            const RowFragment spectrum = next_spectrum;
            if (k1 + T::kWarps < T::kRows) next_spectrum.load_spectrum(spectrum_row(pair, k0, k1 + T::kWarps) + team.lane);
            twiddle.load(twiddles() + team.warp * 64 + team.lane), shift.load(column_twiddles() + k1 / T::kWarps * 64 + team.lane);
            twiddle = twiddle * shift;
            value.load(words);
            value = inner_transform(value * twiddle, constants);
            if (params.transforms) value.store(static_cast<uint4*>(params.transforms) + int64_t(pair) * (params.fft_size / 4) + transform_row(k0, k1) + team.lane);
            if (!params.output.data) continue;
            value = params.reverse ? product_of_conjugate(value, spectrum) : conjugate_product(value, spectrum);
            (inner_transform(value, constants) * twiddle).store(words);
        }
    }

    DEVICE u32* inverse_item(const LongItem& item, bool ready) const {
        const int pair = pair_number(item);
        fill_header(pair);
        counters.wait(team, item, ready);
        if (pair < 0 || !params.output.data) return counters.done(item.group, kInverse);
        const ColumnTile tile = column_tile(item);
        const PairScales scales = load_scales(pair);
        const float scale = params.spectrum_scale[params.pairs.divide(pair)];
        if (params.has_middle()) {
            with_middle_radix([&](auto radix) __attribute__((always_inline)) { tile.template middle_back<radix.value>(middle_stage()); });
            team.barrier();
        }
        auto with = [&](auto aligned) __attribute__((always_inline)) {
            GatedOutput<decltype(aligned)::value> output{*this, 4 * tile.slot_stride(), scale * scales.up[0], -scale * scales.up[1]};
            tile.template to_positions<kSlots>(
                outer_back(), [&](int position) __attribute__((always_inline)) { output.load_gates(kPostGate, position); },
                [&](const SingleSums (&value)[kSlots / 4][2], int position) __attribute__((always_inline)) {
                    output.store(value, position, kOutput, kPostGate);
                    if (!params.second_output.data) return;
                    output.load_gates(kSecondGate, position);
                    output.store(value, position, kSecondOutput, kSecondGate);
                });
        };
        params.pair_aligned ? with(Constant<true>{}) : with(Constant<false>{});
        return counters.done(item.group, kInverse);
    }

    // Gates and stores results; the imaginary sequence has come out conjugated. Slots that are not there lie beyond the sequence. Where registers have
    // room for them, the gates of a task are under way together, and before the results are there.
    template <bool kAligned>
    struct GatedOutput {
        using Word = typename PairWord<Element>::type;
        static constexpr bool kAhead = kSlots == 8 && sizeof(Word) == 4;
        const LongForward& pass;
        const int stride;
        const float first_factor, second_factor;
        Word gates[2][kSlots / 4][2];

        DEVICE int at(int position, int n, int half) const { return position + n * stride + 128 * half; }
        DEVICE bool gated(TensorIndex gate) const { return (&pass.params.u)[gate].data; }
        DEVICE void load_gate(TensorIndex gate, int position, int c, int n, int half) {
            gates[c][n][half] = pass.sequence<const Element, kAligned>(gate, c, gated(gate)).load_word(at(position, n, half));
        }
        DEVICE void load_gates(TensorIndex gate, int position) {
            if (!kAhead) return;
#pragma unroll
            for (int i = 0; i < kSlots; i++) load_gate(gate, position, i / (kSlots / 2), i / 2 % (kSlots / 4), i % 2);
        }
        DEVICE void store(const SingleSums (&value)[kSlots / 4][2], int position, TensorIndex output, TensorIndex gate) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const auto to = pass.sequence<Element, kAligned>(output, c);
                const float factor = c == 0 ? first_factor : second_factor;
#pragma unroll
                for (int i = 0; i < kSlots / 2; i++) {
                    const int n = i / 2, half = i % 2;
                    if (!kAhead) load_gate(gate, position, c, n, half);
                    const Pair y{value[n][0].d[2 * half + c] * factor, value[n][1].d[2 * half + c] * factor}, g = widen(static_cast<const Element*>(nullptr), gates[c][n][half]);
                    to.store(at(position, n, half), gated(gate) ? y.x * g.x : y.x, gated(gate) ? y.y * g.y : y.y);
                }
            }
        }
    };

    DEVICE void run() const {
        fill_constants();
        for_each_ticket(params, team, control().turns, [&](const LongItem& item, bool ready) __attribute__((always_inline)) -> u32* {
            const LongForward pass(params);
            switch (item.kind) {
                case kScale: return pass.scale_item(item);
                case kOuter: return pass.outer_item(item, ready);
                case kRows: return pass.row_item(item, ready);
                default: return pass.inverse_item(item, ready);
            }
        });
    }
};

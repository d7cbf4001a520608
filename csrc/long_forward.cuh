// y = post_gate * conv(pre_gate * u, k) over long sequences: the passes of csrc/long.cuh as items of one launch.
#pragma once
#include "long_columns.cuh"

// Shared memory: constants of all teams, and for each team a region that the kind of its item makes use of.
template <class Element, int kSlots>
struct LongPlan {
    using T = LongTile<Element>;
    static constexpr int kThreads = 512;    // at most, as shared memory allows
    static constexpr int kMaxOuterRadix = 2 * kSlots;
    // Of the stage of the rows, and of the row twiddles of the first eight.
    static constexpr int kRowStageVectors = 512, kTwiddleVectors = T::kWarps * 64;
    static constexpr int kFixedVectors = kInnerConstantVectors + 2 * kOuterVectors<kSlots> + kRowStageVectors + kTwiddleVectors;
    static constexpr int kRowItemBytes = T::kRowBytes + 4 * 64 * 16;
    struct alignas(16) Control {
        TileHeader header;
        LongTurns turns;
        Complex twists[kMaxOuterRadix];     // of an item of the outer passes: see ColumnTile
    };

    HOST_DEVICE static int root_count(const LongParams& params) { return (params.outer_radix - 1) * (params.middle_radix() - 1) + 1; }
    HOST_DEVICE static int fixed_bytes(const LongParams& params) { return kFixedVectors * 16 + (root_count(params) + 1) / 2 * 16; }
    HOST_DEVICE static int exchange_bytes(const LongParams& params) { return params.team_threads * 64 * 4; }
    HOST_DEVICE static int team_bytes(const LongParams& params) {
        // A stage takes 8 r^2 bytes. Where there is one only, its matrices for all chunks have the place of what would go between two.
        const int column_item = exchange_bytes(params) + 8 * params.middle_radix() * params.middle_radix();
        return int(sizeof(Control)) + (column_item > kRowItemBytes ? column_item : kRowItemBytes);
    }
    HOST_DEVICE static int shared_bytes(const LongParams& params, int teams) { return fixed_bytes(params) + teams * team_bytes(params); }
};

template <class Element, int kSlots, int kTeamThreads>
struct LongForward {
    using Team = ::Team<kTeamThreads>;
    using T = LongTile<Element>;
    using Plan = LongPlan<Element, kSlots>;
    using Control = typename Plan::Control;
    const LongParams& params;
    const LongCounters counters;
    const Team team;

    // Made anew for each item: what follows from its number a thread works out there, and does not park it meanwhile.
    DEVICE explicit LongForward(const LongParams& params) : params(params), counters{params}, team(fresh_thread_index()) {}

    DEVICE void fill_constants() const {
        const uint4* const tables = reinterpret_cast<const uint4*>(params.tables);
        for (int i = thread_index(); i < kInnerConstantVectors; i += block_size()) inner()[i] = tables[i];
        for (int i = thread_index(); i < Plan::kTwiddleVectors; i += block_size()) twiddles()[i] = tables[kInnerConstantVectors + 2 * Plan::kRowStageVectors + i];
        MatrixOperand{row_stage(), 4, 1}.fill(thread_index(), block_size(), {32, 32, 32, scale_there(32), false, 32, false, false});
        if (params.has_middle()) {
            const int radix = params.outer_radix;
            const bool folded = params.folded;
            MatrixOperand{outer(), kSlots / 8, 1}.fill(thread_index(), block_size(), {radix, kSlots, Plan::kMaxOuterRadix, scale_there(radix), false, radix, folded, folded});
            MatrixOperand{outer_back(), 1, kSlots / 8}.fill(thread_index(), block_size(), {radix, Plan::kMaxOuterRadix, kSlots, scale_back(radix), true, radix, folded, folded});
        }
        for (int i = thread_index(); i < Plan::root_count(params); i += block_size()) roots()[i] = root_of_unity(i, params.radix);
        block_barrier();
    }

    DEVICE static uint4* inner() { return reinterpret_cast<uint4*>(shared_memory()); }
    DEVICE static uint4* outer() { return inner() + kInnerConstantVectors; }
    DEVICE static uint4* outer_back() { return outer() + kOuterVectors<kSlots>; }
    DEVICE static uint4* row_stage() { return outer_back() + kOuterVectors<kSlots>; }
    DEVICE static uint4* twiddles() { return row_stage() + Plan::kRowStageVectors; }
    DEVICE static Complex* roots() { return reinterpret_cast<Complex*>(twiddles() + Plan::kTwiddleVectors); }
    DEVICE Control& control() const {
        return *reinterpret_cast<Control*>(shared_memory() + Plan::fixed_bytes(params) + team.index * Plan::team_bytes(params));
    }
    DEVICE char* region() const { return reinterpret_cast<char*>(&control() + 1); }
    // In the region of an item of the scales, of the row pass, and of the outer passes.
    DEVICE float* sums() const { return reinterpret_cast<float*>(region()); }
    DEVICE uint4* rows() const { return reinterpret_cast<uint4*>(region()); }
    DEVICE uint4* column_twiddles() const { return rows() + T::kRowBytes / 16; }
    DEVICE uint4* stage() const { return rows() + (params.has_middle() ? Plan::exchange_bytes(params) / 16 : 0); }

    // The stage next to the rows for an item's chunks, one way, and what follows from its chunk between two stages.
    DEVICE void fill_stage(const ColumnTile<Team>& tile, bool back) const {
        const int radix = params.last_radix(), outer = params.has_middle() ? radix : Plan::kMaxOuterRadix, slots = params.has_middle() ? radix : kSlots;
        const int inputs = back ? outer : slots, outputs = back ? slots : outer;
        // The rows take half of their share on the way back, and this stage twice its own.
        const float scale = back ? 2.f * scale_back(radix) : scale_there(radix);
        const bool by_steps = back && !params.has_middle();
        const MatrixOperand matrix{stage(), by_steps ? 1 : inputs / 8, by_steps ? outputs / 8 : 1};
        const bool folded = params.folded, halves = folded && !params.has_middle();
        for (int i = 0; i < tile.chunks(); i++)
            MatrixOperand{matrix.vectors + i * kOuterVectors<kSlots>, matrix.pair_stride, matrix.step_stride}.fill(
                team.thread, Team::kThreads, {radix, inputs, outputs, scale, back, params.radix, folded, halves, tile.first_chunk() + i});
        if (!params.has_middle()) return;
        for (int i = team.thread; i < params.outer_radix; i += Team::kThreads) control().twists[i] = root_of_unity(i * tile.first_chunk(), 32 * params.radix);
    }

    // Consecutive pairs, over the batch first, then over the channels; negative if there is no such pair.
    DEVICE int pair_number(const LongItem& item) const {
        const int number = item.group * params.group_pairs + item.pair;
        return number < params.pair_count ? number : -1;
    }
    DEVICE uint4* sheet(const LongItem& item) const {
        return static_cast<uint4*>(params.scratch) + (int64_t(item.group % params.ring) * params.group_pairs + item.pair) * (params.fft_size / 4);
    }
    DEVICE ColumnTile<Team> column_tile(const LongItem& item) const {
        return {params, team, sheet(item), reinterpret_cast<uint4*>(region()), stage(), roots(), control().twists, item.part << params.log_units, params.log_units};
    }

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
    DEVICE bool has(TensorIndex tensor) const { return (&params.u)[tensor].data; }
    template <class X, bool kAligned>
    DEVICE GlobalSequence<X, kAligned> sequence(TensorIndex tensor, int c, bool present = true) const {
        const TileHeader& header = control().header;
        X* first = reinterpret_cast<X*>(header.first[tensor]) + c * (params.folded ? params.fft_size / 2 : (&params.u)[tensor].batch_stride);
        forget(first);
        return {first, present && (c == 0 || header.second) ? length_of(c) : 0};
    }
    // Folded, the sequences of a pair are the halves of a row.
    DEVICE int length_of(int c) const {
        const int half = params.fft_size / 2, left = params.length - c * half;
        return !params.folded ? params.length : left < half ? left : half;
    }
    // Calls function with a function that makes one of the two gated sequences.
    template <class Function>
    DEVICE void with_gated(Function function) const {
        auto with = [&](auto aligned) __attribute__((always_inline)) {
            function([&](int c, bool present) {
                constexpr bool kAligned = decltype(aligned)::value;
                return GatedSequence<Element, kAligned>{sequence<const Element, kAligned>(kU, c, present), sequence<const Element, kAligned>(kPreGate, c, present && has(kPreGate))};
            });
        };
        params.pair_aligned ? with(Constant<true>{}) : with(Constant<false>{});
    }
    // Calls function with whether there is a middle stage, where it may be missing.
    template <class Function>
    DEVICE void with_middle(Function function) const {
        if (kSlots > 8 || params.has_middle())
            function(Constant<true>{});
        else
            function(Constant<(kSlots > 8)>{});
    }
    template <class Function>
    DEVICE void with_middle_radix(Function function) const {
        if (kSlots == 8 && params.middle_radix() == 8)
            function(Constant<(kSlots == 8 ? 8 : 32)>{});
        else
            function(Constant<32>{});
    }

    // The energies of a part of a pair. Who comes last finds its scales.
    DEVICE u32* scale_item(const LongItem& item, NextItem& next) const {
        const int pair = pair_number(item), begin = item.part * kPartPositions;
        if (pair < 0) return item.part == 0 ? counters.done(item.group, kScale) : nullptr;
        fill_header(pair);
        next.take();
        team.barrier();
        with_gated([&](auto sequence_of) __attribute__((always_inline)) {
#pragma unroll 1
            for (int c = 0; c < 2; c++) {
                const auto sequence = sequence_of(c, true);
                const int length = sequence.values.length, end = begin + kPartPositions < length ? begin + kPartPositions : length;
                Energy energy;
                if (begin < end) energy = part_energy(team, sequence, params.whole_units, begin, end, sums());
                if (team.thread == 0) energies(pair)[c * params.part_count + item.part] = {bits_from_float(energy.value), u32(energy.exponent)};
            }
        });
        next.ask();
        return finish_scales(item, pair);
    }
    DEVICE u32* finish_scales(const LongItem& item, int pair) const {
        u32* const last = reinterpret_cast<u32*>(sums());
        team.barrier();
        if (team.thread == 0) *last = take_ticket_in_order(counters.parts_done(pair)) == u32(params.part_count - 1);
        team.barrier();
        if (!*last) return nullptr;
        if (team.warp == 0) {
            const PairScales scales = scales_of_parts(energies(pair), params);
            if (team.lane == 0) {
                *scales_of(pair) = make_uint4(bits_from_float(scales.down[0]), bits_from_float(scales.down[1]), bits_from_float(scales.up[0]), bits_from_float(scales.up[1]));
                if (params.transforms) params.pair_scales[pair] = larger_or_nan(scales.up[0], scales.up[1]);
            }
        }
        return counters.done(item.group, kScale);
    }

    DEVICE u32* outer_item(const LongItem& item, bool ready, NextItem& next) const {
        const int pair = pair_number(item);
        const ColumnTile<Team> tile = column_tile(item);
        fill_header(pair);
        fill_stage(tile, false);
        counters.wait(team, item, ready);
        if (pair < 0) return counters.done(item.group, kOuter);
        next.take();
        const PairScales scales = load_scales(pair);
        with_gated([&](auto sequence_of) __attribute__((always_inline)) {
            with_middle([&](auto middle) __attribute__((always_inline)) {
                tile.template from_sequences<kSlots, middle.value>(sequence_of(0, scales.down[0] > 0.f), sequence_of(1, scales.down[1] > 0.f), scales, middle.value ? outer() : stage());
            });
        });
        next.ask();
        if (params.has_middle()) {
            team.barrier();
            with_middle_radix([&](auto radix) __attribute__((always_inline)) { tile.template middle_there<radix.value>(); });
        }
        return counters.done(item.group, kOuter);
    }

    // One k0 of a pair. A warp transforms the 32 rows of 32 columns at a time.
    DEVICE u32* row_item(const LongItem& item, bool ready, NextItem& next) const {
        const int pair = pair_number(item), k0 = params.natural_k0(item.part);
        // The spectrum's rows, 128-byte lines.
        if (pair >= 0)
            for (int i = team.thread; i < T::kRowBytes / 128; i += Team::kThreads) prefetch(spectrum_row(pair, k0, i / 8) + i % 8 * 8);
        counters.wait(team, item, ready);
        if (pair < 0) return counters.done(item.group, kRows);
        uint4* const points = sheet(item) + int64_t(item.part) * kLongUnits + team.lane / 4 + team.lane % 4 * kRowUnits;
        // A lane has the unit group * 8 + lane / 4 of the slots 4 j + lane % 4, which come to a place where it finds its own, beside those of its warp.
        uint4* const own = rows() + team.lane / 8 * kRowUnits + team.lane % 8;
        auto for_each_group = [&](auto work) __attribute__((always_inline)) {
#pragma unroll 1
            for (int group = team.warp; group < T::kWarps; group += Team::kWarps) work(group);
        };
        for_each_group([&](int group) __attribute__((always_inline)) {
#pragma unroll
            for (int j = 0; j < 8; j++) copy_async<16>(own + group * 8 + 4 * j * kRowUnits, points + group * 8 + 4 * j * kRowUnits);
        });
        copy_async_commit();
        fill_column_twiddles(team, column_twiddles(), params, k0);
        copy_async_wait<0>();
        next.take();
        u32 x[8][4];
        for_each_group([&](int group) __attribute__((always_inline)) {
#pragma unroll
            for (int j = 0; j < 8; j++) spread_unit(x[j], own[group * 8 + 4 * j * kRowUnits]);
            warp_barrier();
            outer_forward<T, 1>(x, rows(), row_stage(), group, team.lane);
        });
        team.barrier();
        transform_rows(pair, k0);
        if (!params.output.data) return counters.done(item.group, kRows);
        next.ask();
        team.barrier();
        for_each_group([&](int group) __attribute__((always_inline)) {
            const uint4* const from = rows() + team.lane % 4 * kRowUnits + row_unit(team.lane, group, team.lane);
#pragma unroll
            for (int j = 0; j < 8; j++) spread_unit(x[j], from[4 * j * kRowUnits]);
            contract<32, 1>(x, row_stage(), 8, team.lane, [&](int n, const SingleSums (&d)[2]) __attribute__((always_inline)) { store_for_blocks(points + group * 8 + 4 * n * kRowUnits, packed(d)); });
        });
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
        for (int k1 = team.warp; k1 < T::kRows; k1 += Team::kWarps) {
            uint4* const words = rows() + k1 * kRowUnits + own_unit;
            RowFragment value, twiddle, shift;
            const RowFragment spectrum = next_spectrum;
            if (k1 + Team::kWarps < T::kRows) next_spectrum.load_spectrum(spectrum_row(pair, k0, k1 + Team::kWarps) + team.lane);
            twiddle.load(twiddles() + k1 % T::kWarps * 64 + team.lane), shift.load(column_twiddles() + k1 / T::kWarps * 64 + team.lane);
            twiddle = twiddle * shift;
            value.load(words);
            value = inner_transform(value * twiddle, constants);
            if (params.transforms) value.store(static_cast<uint4*>(params.transforms) + int64_t(pair) * (params.fft_size / 4) + transform_row(k0, k1) + team.lane);
            if (!params.output.data) continue;
            value = params.reverse ? product_of_conjugate(value, spectrum) : conjugate_product(value, spectrum);
            (inner_transform(value, constants) * twiddle).store(words);
        }
    }

    DEVICE u32* inverse_item(const LongItem& item, bool ready, NextItem& next) const {
        const int pair = pair_number(item);
        const ColumnTile<Team> tile = column_tile(item);
        fill_header(pair);
        fill_stage(tile, true);
        counters.wait(team, item, ready);
        if (pair < 0 || !params.output.data) return counters.done(item.group, kInverse);
        next.take();
        const PairScales scales = load_scales(pair);
        const float scale = params.spectrum_scale[params.pairs.divide(pair)];
        if (params.has_middle()) {
            with_middle_radix([&](auto radix) __attribute__((always_inline)) { tile.template middle_back<radix.value>(); });
            team.barrier();
        }
        next.ask();
        auto with = [&](auto aligned, auto middle) __attribute__((always_inline)) {
            using Output = GatedOutput<decltype(aligned)::value>;
            const int stride = 4 * tile.slot_stride();
            Output output(*this, kOutput, kPostGate, stride, scale * scales.up[0], -scale * scales.up[1]);
            tile.template to_positions<kSlots, decltype(middle)::value>(
                decltype(middle)::value ? outer_back() : stage(), [&](int position) __attribute__((always_inline)) { output.load_gates(position); },
                [&](const SingleSums (&value)[kSlots / 4][2], int position) __attribute__((always_inline)) {
                    output.store(value, position);
                    if (!params.second_output.data) return;
                    Output second(*this, kSecondOutput, kSecondGate, stride, output.factors[0], output.factors[1]);
                    second.load_gates(position);
                    second.store(value, position);
                });
        };
        with_middle([&](auto middle) __attribute__((always_inline)) { params.pair_aligned ? with(Constant<true>{}, middle) : with(Constant<false>{}, middle); });
        return counters.done(item.group, kInverse);
    }

    // Gates and stores results; the second sequence has come out negative. Slots that are not there lie beyond the sequence. Where registers have
    // room for them, the gates of a task are under way together, and before the results are there. One that is not there is ones.
    template <bool kAligned>
    struct GatedOutput {
        using Word = typename PairWord<Element>::type;
        static constexpr bool kAhead = kSlots == 8 && sizeof(Word) == 4;
        const GlobalSequence<Element, kAligned> outputs[2];
        const GlobalSequence<const Element, kAligned> gates[2];
        const int stride;
        const float factors[2];
        Word words[2][kSlots / 4][2];

        DEVICE GatedOutput(const LongForward& pass, TensorIndex output, TensorIndex gate, int stride, float first_factor, float second_factor)
            : outputs{pass.sequence<Element, kAligned>(output, 0), pass.sequence<Element, kAligned>(output, 1)},
              gates{pass.sequence<const Element, kAligned>(gate, 0, pass.has(gate)), pass.sequence<const Element, kAligned>(gate, 1, pass.has(gate))}, stride(stride),
              factors{first_factor, second_factor} {}

        DEVICE int at(int position, int n, int half) const { return position + n * stride + 128 * half; }
        DEVICE void load_gate(int position, int c, int n, int half) { words[c][n][half] = gates[c].load_word(at(position, n, half), two_ones(gates[c].data)); }
        DEVICE void load_gates(int position) {
            if (!kAhead) return;
#pragma unroll
            for (int i = 0; i < kSlots; i++) load_gate(position, i / (kSlots / 2), i / 2 % (kSlots / 4), i % 2);
        }
        DEVICE void store(const SingleSums (&value)[kSlots / 4][2], int position) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
#pragma unroll
                for (int i = 0; i < kSlots / 2; i++) {
                    const int n = i / 2, half = i % 2;
                    if (!kAhead) load_gate(position, c, n, half);
                    const Pair g = widen(gates[c].data, words[c][n][half]);
                    outputs[c].store(at(position, n, half), value[n][0].d[2 * half + c] * factors[c] * g.x, value[n][1].d[2 * half + c] * factors[c] * g.y);
                }
            }
        }
    };

    DEVICE void run() const {
        fill_constants();
        for_each_ticket(params, team, control().turns, [&](const LongItem& item, bool ready, NextItem& next) __attribute__((always_inline)) -> u32* {
            const LongForward pass(params);
            switch (item.kind) {
                case kScale: return pass.scale_item(item, next);
                case kOuter: return pass.outer_item(item, ready, next);
                case kRows: return pass.row_item(item, ready, next);
                default: return pass.inverse_item(item, ready, next);
            }
        });
    }
};

// y = post_gate * conv(pre_gate * u, k): one kernel. Each block walks over tiles of sequence pairs with three groups of eight warps, which work on
// different tiles at the same time: the first packs inputs and does the outer stage, the second transforms the rows, multiplies them by the
// filter's spectrum and transforms them back, the third does the inverse outer stage, gates and stores. Rows pass from group to group in buffers
// of shared memory, guarded by barriers: full for the second group, full for the third, empty for the first.
//
// Sequences too long for one tile are blocked: with blocks x(j) of kPositions, y(i) = sum over d of x(i - d) * k(d), where window d of the filter is
// its taps less than a block away from lag d kPositions. The transforms of earlier blocks are kept in global memory by the lanes that will
// read them again. In reverse, the last block comes first and the spectra are conjugated: the transposed convolution.
#pragma once
#include "block_scale.cuh"
#include "forward_plan.cuh"
#include "tile_store.cuh"

template <class T>
struct Forward {
    using Plan = ForwardPlan<T>;
    using Element = typename T::Element;
    using Tables = ::Tables<T, Plan::kWide || T::kBlocked>;
    using Products = ::Products<T, Plan::kAtOnce>;
    using Result = OuterResult<T, typename Choose<(T::kSlots > 16), HalfSums, SingleSums>::type>;
    enum Barrier { kPack = 1, kStore = 2, kPacked = 3, kTransformed = kPacked + Plan::kBuffers, kEmpty = kTransformed + Plan::kBuffers };
    const LaunchParams& params;
    const int lane, warp;
    const Tables tables;
    const OwnPairs<T> pairs;       // of blocked sequences
    const WorkRange range;
    char* const memory;

    // Of blocked sequences, the own pairs that are to be done.
    DEVICE Forward(const LaunchParams& params, const OwnPairs<T>& pairs)
        : params(params), lane(thread_index() % 32), warp(thread_index() / 32 % T::kWarps), tables(params.tables, shared_memory()),
          pairs(pairs), range(T::kBlocked ? WorkRange{0, pairs.count * params.blocks.divisor} : work_range(tile_count<T>(params))), memory(shared_memory() + Tables::kSharedBytes) {}

    DEVICE uint4* rows(int buffer) const { return reinterpret_cast<uint4*>(memory + buffer * T::kRowBytes); }
    DEVICE char* control() const { return memory + Plan::kBuffers * T::kRowBytes + Plan::kOperandBytes; }
    DEVICE Stage<T> stage(int tensor) const { return {control() + Plan::kControlBytes + tensor * T::kStageBytes}; }
    // What undoes the scales of a tile's sequences, those of the filters included.
    DEVICE float* scales(int tile) const { return reinterpret_cast<float*>(control() + T::kEnergyBytes) + tile % Plan::kScaleSlots * 32; }
    // Of this tile and the next in turn, for the first and for the third group.
    DEVICE TileHeader& header(int group, int tile) const {
        return reinterpret_cast<TileHeader*>(control() + T::kEnergyBytes + Plan::kScaleSlots * 32 * 4)[2 * group + tile % 2];
    }
    DEVICE int own_pair(int i) const { return pairs[i]; }
    DEVICE int first_pair(TilePlace place) const { return place.first_pair(pairs); }
    DEVICE void fill_header(int group, int tile, TilePlace place) const {
        if (warp == 0) header(group, tile).template fill<Element>(params, RegularSequences::consecutive<T>(params, first_pair(place)), lane, place.start<T>(params));
    }
    DEVICE TileSequences sequences(TilePlace place) const { return TileSequences::consecutive<T>(params, first_pair(place), lane, place.start<T>(params)); }
    DEVICE Stager<T> stager() const { return {params, fresh_thread_index()}; }
    DEVICE int row_vector(int row) const { return row * 64 + lane; }

    // The first group.
    DEVICE void pack() const {
        const Stage<T> u = stage(0), pre{params.pre_gate.data ? stage(1).memory : nullptr};
        SequenceScales<T> sequence_scales{reinterpret_cast<float*>(control()), 0, warp, lane};
        auto start_inputs = [&](int tile, TilePlace place) {
            if (Plan::kStaged && tile < range.last) stager().start(header(0, tile), [&] { return sequences(place); }, u, kU, pre, kPreGate);
            copy_async_commit();
        };
        // Of blocked sequences: their scale, what undoes it and the filter's, the largest mean square of their blocks so far, the pairs that it
        // did not fit.
        const BlockScales<T> block_scales{params, reinterpret_cast<float*>(control()), 0, warp, lane};
        BlockScale scale{};
        float undo = 0.f, largest = 0.f;
        int misfits = 0;
        TilePlace place{range.first, 0}, next;
        if (T::kBlocked) block_scales.start(row_of(place));
        fill_header(0, range.first, place);
        named_barrier<256>(kPack);
        start_inputs(range.first, place);
        for (int tile = range.first; tile < range.last; tile++, place = next) {
            next = place.next<T>(params);
            copy_async_wait<0>();
            named_barrier<256>(kPack);
            fill_header(0, tile + 1, next);
            u32 x[T::kSlots / 4][4];
            if constexpr (T::kBlocked) {
                if (place.step == 0) {
                    const TileSequences row = row_of(place);
                    scale = pairs.list ? block_scales.from_all(row) : block_scales.from_samples(row);
                    largest = 0.f;
                    if (params.transforms && thread_index() == 0) params.pair_scales[first_pair(place)] = scale.up;
                    undo = undo_of(row, scale.up);
                }
                sequence_scales.pack_known(x, u, pre, scale);
                largest = larger_or_nan(largest, sequence_scales.mean_square());
                if (thread_index() == 0 && next.step == 0 && !pairs.list && !BlockScales<T>::fits(largest)) misfit_list()[misfits++] = place.index;
            } else {
                const TileSequences current = sequences(place);
                if constexpr (Plan::kStaged)
                    sequence_scales.pack_scaled(x, u, pre, current.valid, false);
                else
                    sequence_scales.pack_direct(x, params.u, params.pre_gate, params, current, false);
                undo = undo_of(current, sequence_scales.up);
            }
            // Every thread has read its inputs (a barrier has passed): the next tile's may come.
            start_inputs(tile + 1, next);
            if (warp == 0) scales(tile)[lane] = undo;
            if (T::kBlocked && next.step == 0) block_scales.start(row_of(next));
            const int number = tile - range.first, buffer = number % Plan::kBuffers;
            if (number >= Plan::kBuffers) named_barrier<512>(kEmpty + buffer);
            outer_forward<T>(x, rows(buffer), tables.outer, warp, lane);
            named_barrier_arrive<512>(kPacked + buffer);
        }
        if (T::kBlocked && thread_index() == 0) *misfit_count() = misfits;
    }

    // What undoes the scale of this lane's sequence and its filter's; for the lanes of the first warp.
    DEVICE float undo_of(const TileSequences& sequences, float up) const {
        return warp == 0 && sequences.valid ? params.spectrum_scale[sequences.channel] * up : 0.f;
    }

    // Of blocked sequences: the whole row that a tile is a part of, and the own pairs which the sampled scale did not fit.
    DEVICE TileSequences row_of(TilePlace place) const { return TileSequences::whole(params, first_pair(place)); }
    DEVICE int* misfit_list() const {
        uint4* const ring_end = static_cast<uint4*>(params.scratch) + int64_t(block_count()) * params.windows * kBlockVectors<T>;
        return reinterpret_cast<int*>(ring_end) + int64_t(block_index()) * (params.pairs.divisor * params.channels / block_count() + 1);
    }
    DEVICE int* misfit_count() const { return reinterpret_cast<int*>(control() + T::kEnergyBytes + Plan::kScaleSlots * 32 * 4 + 4 * int(sizeof(TileHeader))); }

    // The second group. A warp's rows, tile after tile, are its steps.
    DEVICE void transform() const {
        const InnerConstants constants(InnerTables{tables.inner, lane});
        const int own_unit = warp * kRowUnits + fragment_unit(warp, lane);
        const int tiles = range.last - range.first, steps = tiles * Plan::kRowsPerWarp;
        uint4* const operands = reinterpret_cast<uint4*>(memory + Plan::kBuffers * T::kRowBytes) + warp * Plan::kAhead * Plan::kOperandVectors;
        // Every lane copies what it will read itself: nothing but its own wait is needed.
        auto start_operands = [&](int step) {
            const int row = warp + step % Plan::kRowsPerWarp * T::kWarps;
            const int channel = row_channel(step / Plan::kRowsPerWarp, row), k1 = row % T::kPairRows, before = step - Plan::kAhead;
            const bool kept = Plan::kWide && before >= 0 && row_channel(before / Plan::kRowsPerWarp, row) == channel;
            if (step < steps && !kept) {
                uint4* const to = operands + step % Plan::kAhead * Plan::kOperandVectors + lane;
                const uint4* const spectrum = reinterpret_cast<const uint4*>(params.spectrum) + (int64_t(channel) * T::kPairRows + k1) * 64 + lane;
                copy_async<16>(to, spectrum), copy_async<16>(to + 32, spectrum + 32);
                if (!Plan::kWide) copy_async<16>(to + 64, tables.twiddle + k1 * 64 + lane), copy_async<16>(to + 96, tables.twiddle + k1 * 64 + 32 + lane);
            }
            copy_async_commit();
        };
        for (int step = 0; step < Plan::kAhead; step++) start_operands(step);
#pragma unroll 1
        for (int number = 0; number < tiles; number++) {
            const int buffer = number % Plan::kBuffers;
            uint4* const units = rows(buffer) + own_unit;
            named_barrier<512>(kPacked + buffer);
#pragma unroll 1
            for (int i = 0; i < Plan::kRowsPerWarp; i++) {
                const int step = number * Plan::kRowsPerWarp + i;
                const uint4* const operand = operands + step % Plan::kAhead * Plan::kOperandVectors;
                uint4* const row = units + i * T::kWarps * kRowUnits;
                const uint4* const twiddles = Plan::kWide ? tables.twiddle : operands;
                int twiddle = (Plan::kWide ? (warp + i * T::kWarps) % T::kPairRows * 64 : step % Plan::kAhead * Plan::kOperandVectors + 64) + lane;
                RowFragment value, factors;
                value.load(row);
                copy_async_wait<Plan::kAhead - 1>();
                factors.load(twiddles + twiddle);
                value = inner_transform(value * factors, constants);
                factors.load(operand + lane);
                value = inner_transform(conjugate_product(value, factors), constants);
                forget(twiddle);    // and read again: registers are scarce
                factors.load(twiddles + twiddle);
                (value * factors).store(row);
                start_operands(step + Plan::kAhead);
            }
            named_barrier_arrive<512>(kTransformed + buffer);
        }
        copy_async_wait<0>();
    }

    // The same for blocked sequences, whose products are the steps.
    DEVICE void transform_blocked() const {
        constexpr int kSteps = Plan::kAhead / Plan::kAtOnce;
        static_assert((kSteps & (kSteps - 1)) == 0, "places of operands");
        const InnerTables constants{tables.inner, lane};
        const int own_unit = fragment_unit(warp, lane);
        uint4* const operands = reinterpret_cast<uint4*>(memory + Plan::kBuffers * T::kRowBytes) + warp * Plan::kAhead * Plan::kOperandVectors;
        int place = 0;      // of the operands of this step, and then of those kSteps steps later
        Products next(*this);
        auto start_operands = [&] {
            if (next.own < pairs.count) {
#pragma unroll
                for (int i = 0; i < Plan::kAtOnce; i++) {
                    uint4* const to = operands + (place * Plan::kAtOnce + i) * Plan::kOperandVectors + lane;
                    const uint4 *const spectrum = next.spectra + next.window + i * Products::kRowStep, *const block = next.history.blocks + next.block + i * Products::kRowStep;
                    copy_async<16>(to, spectrum), copy_async<16>(to + 32, spectrum + 32);
                    if (next.left < next.windows) copy_async<16>(to + 64, block), copy_async<16>(to + 96, block + 32);
                }
                next.advance(*this);
            }
            copy_async_commit();
            place = (place + 1) & (kSteps - 1);
        };
        auto operand = [&] {
            copy_async_wait<kSteps - 1>();
            return operands + place * Plan::kAtOnce * Plan::kOperandVectors;
        };
        for (int i = 0; i < kSteps; i++) start_operands();
        int number = 0;     // of a tile
#pragma unroll 1
        for (int own = 0; own < pairs.count; own++) {
            const History<T> history(params, pairs[own]);
            int slot = 0;
#pragma unroll 1
            for (int step = 0; step < params.blocks.divisor; step++, number++) {
                const int buffer = number % Plan::kBuffers, windows = step + 1 < params.windows ? step + 1 : params.windows;
                uint4* const kept = history.blocks + slot * kBlockVectors<T>;
                slot = slot + 1 < history.count ? slot + 1 : 0;
                named_barrier<512>(kPacked + buffer);
#pragma unroll 1
                for (int row = warp; row < T::kRows; row += Plan::kAtOnce * T::kWarps) {
                    uint4* const words = rows(buffer) + row * kRowUnits;
                    RowFragment values[Plan::kAtOnce], sums[Plan::kAtOnce], other;
#pragma unroll
                    for (int i = 0; i < Plan::kAtOnce; i++) {
                        values[i].load(words + i * T::kWarps * kRowUnits + own_unit);
                        other.load(tables.twiddle + row * 64 + i * Products::kRowStep + lane);
                        values[i] = values[i] * other;
                    }
                    inner_transform(values, constants);
                    const uint4* operand_words = operand();
#pragma unroll
                    for (int i = 0; i < Plan::kAtOnce; i++) {
                        if (history.count > 1) values[i].store(kept + row * 64 + i * Products::kRowStep + lane);
                        other.load(operand_words + i * Plan::kOperandVectors + lane);
                        other.conjugate_if(params.reverse);
                        sums[i] = conjugate_product(values[i], other);
                    }
                    start_operands();
#pragma unroll 1
                    for (int window = 1; window < windows; window++) {
                        operand_words = operand();
#pragma unroll
                        for (int i = 0; i < Plan::kAtOnce; i++) {
                            const uint4* const both = operand_words + i * Plan::kOperandVectors;
                            other.load(both + lane), values[i].load(both + 64 + lane);
                            other.conjugate_if(params.reverse);
                            add_conjugate_product(sums[i], values[i], other);
                        }
                        start_operands();
                    }
#pragma unroll
                    for (int i = 0; i < Plan::kAtOnce; i++) sums[i].store(words + i * T::kWarps * kRowUnits + own_unit);
                }
                if (params.output.data)
                    named_barrier_arrive<512>(kTransformed + buffer);
                else if (number + Plan::kBuffers < range.last)
                    named_barrier_arrive<512>(kEmpty + buffer);
            }
        }
        copy_async_wait<0>();
    }

    // The way back of the rows of a blocked tile, which is the third group's work: the second has the products.
    DEVICE void transform_back(uint4* rows) const {
        const InnerTables constants{tables.inner, lane};
        const int own_unit = fragment_unit(warp, lane);
#pragma unroll 1
        for (int first = warp; first < T::kRows; first += 2 * T::kWarps) {
            RowFragment values[2], twiddles;
            for (int i = 0; i < 2; i++) values[i].load(rows + (first + i * T::kWarps) * kRowUnits + own_unit);
            inner_transform(values, constants);
            for (int i = 0; i < 2; i++) {
                const int row = first + i * T::kWarps;
                twiddles.load(tables.twiddle + row * 64 + lane);
                (values[i] * twiddles).store(rows + row * kRowUnits + own_unit);
            }
        }
        named_barrier<256>(kStore);
    }

    // The channel of a pair, or of the pair that a row of a tile belongs to; some channel if there is none.
    DEVICE int channel_of(int pair) const {
        const int channel = params.pairs.divide(pair);
        return channel < params.channels ? channel : 0;
    }
    DEVICE int row_channel(int tile, int row) const {
        return channel_of((range.first + tile) * T::kPairs + row / T::kPairRows);
    }

    // The third group.
    DEVICE void store() const {
        const TileStore<T, Result, T::kBlocked> output{params, warp, lane};
        const Stage<T> post{Plan::kStaged && params.post_gate.data ? stage(2).memory : nullptr};
        auto start_gate = [&](TensorIndex gate, int tile, TilePlace place) {
            if (post && tile < range.last) stager().start(header(1, tile), [&] { return sequences(place); }, post, gate);
            copy_async_commit();
        };
        TilePlace place{range.first, 0}, next;
        fill_header(1, range.first, place);
        named_barrier<256>(kStore);
        start_gate(kPostGate, range.first, place);
        for (int tile = range.first; tile < range.last; tile++, place = next) {
            next = place.next<T>(params);
            const int buffer = (tile - range.first) % Plan::kBuffers;
            named_barrier<512>(kTransformed + buffer);
            if constexpr (T::kBlocked) transform_back(rows(buffer));
            Result result;
            result.add(rows(buffer), tables.outer_inverse, warp, lane);
            const float scale = scales(tile)[lane];
            if (tile + Plan::kBuffers < range.last) named_barrier_arrive<512>(kEmpty + buffer);
            copy_async_wait<0>();
            named_barrier<256>(kStore);
            fill_header(1, tile + 1, next);
            auto start_second_gate = [&] {      // where the first was
                named_barrier<256>(kStore);
                start_gate(kSecondGate, tile, place);
            };
            output.store(result, header(1, tile), post, post, scale, kStore, start_second_gate, [&] { return sequences(place); });
            start_gate(kPostGate, tile + 1, next);
        }
    }

    DEVICE void run() const {
        copy_async_wait<0>();
        block_barrier();
        switch (thread_index() / T::kThreads) {
            case 0:
                own_registers<Plan::registers(0), Plan::kRegisters>();
                return pack();
            case 1:
                own_registers<Plan::registers(1), Plan::kRegisters>();
                if constexpr (T::kBlocked)
                    return transform_blocked();
                else
                    return transform();
            default:
                own_registers<Plan::registers(2), Plan::kRegisters>();
                if (params.output.data) store();
        }
    }
};

template <class T>
DEVICE void forward_pass(const LaunchParams& params) {
    OwnPairs<T> pairs(params);
    const Forward<T> all(params, pairs);
    all.run();
    if constexpr (T::kBlocked) {
        block_barrier();
        pairs.count = *all.misfit_count(), pairs.list = all.misfit_list();
        block_barrier();
        if (pairs.count > 0) Forward<T>(params, pairs).run();
    }
}

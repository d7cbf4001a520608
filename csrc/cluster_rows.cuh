// The second group of a cluster's block: the rows, from which the two transforms of csrc/cluster.cuh have come and to which they go back.
#pragma once
#include "cluster_plan.cuh"
#include "small_transform.cuh"

template <class T, bool kGradients, class Pass>
struct ClusterRows {
    using Plan = ClusterPlan<T, kGradients>;
    Pass& pass;

    DEVICE void run() const {
        if constexpr (T::kBlocked)
            transform_blocked();
        else
            transform();
    }

private:
    // This lane's units of a row.
    DEVICE uint4* units_of(uint4* rows, int row) const { return rows + row * kRowUnits + fragment_unit(row, pass.lane); }

    // Of the gradients of taps, where they are wanted: the sums over pairs of conj(G) E for the rows of this block, with the transforms G of the first turn
    // and E of the second. What fft_conv_tap_gradient wants in its order.
    DEVICE void add_product(const RowFragment& g, const RowFragment& e, int row) const {
        const int tile = pass.tile(Pass::kTransforming);
        const typename Plan::TurnSums sums = pass.sums_of(tile);
        const float weight = sums.scale * pass.sums_of(tile - 1).scale;     // undoes the scales of both
        float4* const to = reinterpret_cast<float4*>(pass.params.grad_filter) + int64_t(sums.number) * (2 * kBlockVectors<T>) + cluster_row<T>(pass.rank, row) * (kColumns / 2) + pass.lane;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const float4 product = weighted(product_of_conjugate(g.value[n / 2][n % 2], e.value[n / 2][n % 2]), weight);
            if (sums.first)
                to[32 * n] = product;
            else
                add_to_global(to + 32 * n, product);
        }
    }
    // Where a row of the first turn waits for that, if not where it came.
    DEVICE uint4* kept(int row) const { return static_cast<uint4*>(pass.params.scratch) + ((block_index() * T::kRows + row) * 64 + pass.lane); }

    // How far behind the warp's first row another one is, and this lane's units of that first row.
    DEVICE static int behind(int part, int row) { return (row * Plan::kParts + part) * T::kWarps; }
    DEVICE uint4* first_units(int number) const { return units_of(pass.rows(Plan::buffer(number)), pass.warp); }

    // The spectrum for a row, which stays as long as the channel does. Every lane copies what it will read itself: nothing but its own wait is needed.
    DEVICE uint4* spectrum(int behind) const { return pass.operands() + behind * 64; }
    DEVICE void start_spectrum(int behind, int tile) const {
        forget(pass.lane), forget(pass.warp);
        const uint4* const from = reinterpret_cast<const uint4*>(pass.params.spectrum) + int64_t(pass.channel_of(pass.pair(tile))) * kBlockVectors<T> + pass.row_vector(pass.warp + behind);
        copy_async<16>(spectrum(behind), from), copy_async<16>(spectrum(behind) + 32, from + 32);
    }
    // Of several rows in registers, those of a channel come together, so that no wait holds the rows apart; else one after the other.
    static constexpr bool kTogether = Plan::kInRegisters;
    template <class Tile>
    DEVICE void start_spectra(Tile tile) const {
        for (int row = 0; row < Plan::kRowsPerWarp; row++) start_spectrum(row * T::kWarps, tile()), copy_async_commit();
    }

    // What a tile is, by how many have gone before in this block.
    struct Work {
        int number;
        bool channel_ends, second, wanted, summed;      // the last of its channel, a second turn; with an output, with gradients of taps
    };

    DEVICE void transform() const {
        const InnerConstants constants(InnerTables{pass.tables.inner, pass.lane});
        start_spectra([&] { return pass.range().first; });
        bool channel_starts = true;
        pass.done(Pass::kTransforming) = 0;
#pragma unroll 1
        for (; pass.tile(Pass::kTransforming) < pass.range().last; pass.done(Pass::kTransforming) = pass.done(Pass::kTransforming) + 1) {
            const int number = pass.done(Pass::kTransforming), tile = pass.tile(Pass::kTransforming);
            const bool channel_ends = tile + 1 < pass.range().last && pass.channel_of(pass.pair(tile + 1)) != pass.channel_of(pass.pair(tile));
            auto transform_tile = [&](bool second) {
                const Work work{number, channel_ends, second, !kGradients || pass.tensors(tile).output.data, kGradients && pass.params.grad_filter};
                auto there_and_back = [&](const RowFragment& value, int behind) { return this->there_and_back(constants, work, value, behind); };
                if constexpr (Plan::kInRegisters)
                    transform_in_registers(work, there_and_back);
                else
                    transform_in_place(work, there_and_back);
            };
            if constexpr (kTogether) {
                if (channel_starts) copy_async_wait<0>();
                // A text for each turn: what is conditional in it holds rows apart.
                if (kGradients && pass.second_turn(tile))
                    transform_tile(true);
                else
                    transform_tile(false);
                if (channel_ends) start_spectra([&] { return tile + 1; });
                channel_starts = channel_ends;
            } else {
                transform_tile(pass.second_turn(tile));
            }
        }
        copy_async_wait<0>();
    }

    // A row of the transform, to frequencies and back.
    DEVICE RowFragment there_and_back(const InnerConstants& constants, const Work& work, RowFragment value, int behind) const {
        RowFragment factors, twiddles, g = {};
        forget(pass.lane), forget(pass.warp);
        if (work.summed && work.second && !Plan::kStay) g.load_again(kept(pass.warp + behind));
        if (!kTogether) copy_async_wait<Plan::kRowsPerWarp - 1>();
        twiddles.load(pass.tables.twiddle + (pass.warp + behind) * 64 + pass.lane);
        value = inner_transform(value * twiddles, constants);
        if (work.summed && !work.second) value.store(Plan::kStay ? first_units(work.number) + behind * kRowUnits : kept(pass.warp + behind));
        if (work.summed && work.second) {
            if (Plan::kStay) g.load(first_units(work.number - 1) + behind * kRowUnits);
            add_product(g, value, pass.warp + behind);
        }
        // Read again rather than kept: registers are scarce.
        if (kGradients) twiddles.load(pass.tables.twiddle + (pass.warp + behind) * 64 + pass.lane);
        if (work.wanted) {
            factors.load(spectrum(behind));
            factors.conjugate_if(work.second);
            value = inner_transform(conjugate_product(value, factors), constants) * twiddles;
        }
        if (!kTogether && work.channel_ends) start_spectrum(behind, pass.tile(Pass::kTransforming, 1));
        if (!kTogether) copy_async_commit();
        return value;
    }

    // A tile whose DFTs across blocks are done here, in registers.
    template <class Function>
    DEVICE void transform_in_registers(const Work& work, Function there_and_back) const {
        const int output = pass.outputs(work.number);
        auto leave = [&](int number, int part) {
            warp_barrier();
            if (pass.lane < T::kCluster) barrier_arrive(pass.lane, &pass.control().rows_free[Plan::buffer(number)][part]);
        };
#pragma unroll 1
        for (int part = 0; part < Plan::kParts; part++) {
            RowFragment x[T::kCluster];
            barrier_wait(&pass.control().rows_came[Plan::buffer(work.number)][part], Plan::round(work.number) % 2);
#pragma unroll
            for (int b = 0; b < T::kCluster; b++) x[b].load(first_units(work.number) + behind(part, b) * kRowUnits);
            if (!work.summed || work.second) leave(work.number, part);
            small_transform(x);
#pragma unroll
            for (int s = 0; s < T::kCluster; s++) x[s] = there_and_back(x[s], behind(part, s));
            if (work.summed && work.second) leave(work.number - 1, part);
            if (!work.wanted) continue;
            small_transform(x);
            if (part == 0) pass.wait_for_return(output);
            uint4* const to = units_of(pass.returned_rows(output), pass.rank * T::kOwnRows + pass.warp + part * T::kWarps);
#pragma unroll
            for (int b = 0; b < T::kCluster; b++)
                for (int i = 0; i < 2; i++) store_in_cluster(b, pass.rank, to + 32 * i, x[b].vector(i), pass.returned(output));
        }
        if (work.wanted) pass.has_returned(output);
    }

    // A tile whose DFTs across blocks other groups do.
    template <class Function>
    DEVICE void transform_in_place(const Work& work, Function there_and_back) const {
        named_barrier<512>(Pass::kReady + Plan::buffer(work.number));
#pragma unroll(kGradients ? 1 : 2)
        for (int row = 0; row < Plan::kRowsPerWarp; row++) {
            uint4* const own = first_units(work.number) + behind(0, row) * kRowUnits;
            RowFragment value;
            value.load(own);
            value = there_and_back(value, behind(0, row));
            if (work.wanted) value.store(own);
        }
        named_barrier_arrive<512>(Pass::kTransformed + Plan::buffer(work.number));
    }

    // Blocked sequences, whose products are the steps.
    DEVICE void transform_blocked() const {
        const typename NeededInnerTables<typename T::Element>::type constants{pass.tables.inner, pass.lane};
        int place = 0;      // of the operands of this step, and then of those kAhead steps later
        ::Products<T, 1> next(pass);
        auto start_operands = [&] {
            if (next.own < pass.control().blocked.pairs.count) {
                uint4* const to = pass.operands() + place * T::kWarps * Plan::kOperandVectors;
                const uint4 *const spectrum = next.spectra + next.window, *const block = next.history.blocks + next.block;
                copy_async<16>(to, spectrum), copy_async<16>(to + 32, spectrum + 32);
                if (next.left < next.windows) copy_async<16>(to + 64, block), copy_async<16>(to + 96, block + 32);
                next.advance(pass);
            }
            copy_async_commit();
            place = (place + 1) % Plan::kAhead;
        };
        pass.done(Pass::kTransforming) = pass.first();
        for (int i = 0; i < Plan::kAhead; i++) start_operands();
#pragma unroll 1
        for (int own = 0; own < pass.control().blocked.pairs.count; own++) {
            const History<T> history(pass.params, pass.own_pair(own));
#pragma unroll 1
            for (int step = 0; step < pass.params.blocks.divisor; step++, pass.done(Pass::kTransforming) = pass.done(Pass::kTransforming) + 1) {
                const int buffer = pass.done(Pass::kTransforming) % Plan::kBuffers, windows = step + 1 < pass.params.windows ? step + 1 : pass.params.windows;
                uint4* const kept = history.blocks + step % history.count * kBlockVectors<T>;
                // The sum of the products of a row, the first of which is that of `value`.
                auto products = [&](RowFragment value) {
                    RowFragment sums[2] = {};      // of even and of odd windows: fewer roundings of large sums
                    auto add_product = [&](RowFragment& sum, bool of_block) {
                        RowFragment factors;
                        copy_async_wait<Plan::kAhead - 1>();
                        const uint4* const operand = pass.operands() + place * T::kWarps * Plan::kOperandVectors;
                        factors.load(operand);
                        factors.conjugate_if(pass.params.reverse);
                        if (of_block) value.load(operand + 64);
                        add_conjugate_product(sum, value, factors);
                        start_operands();
                    };
                    add_product(sums[0], false);
#pragma unroll 1
                    for (int window = 1; window < windows; window += 2) {
                        add_product(sums[1], true);
                        if (window + 1 < windows) add_product(sums[0], true);
                    }
                    return sums[0] + sums[1];
                };
                named_barrier<512>(Pass::kReady + buffer);
#pragma unroll 1
                for (int row = pass.warp; row < T::kRows; row += T::kWarps) {
                    RowFragment value, twiddles;
                    value.load(units_of(pass.rows(buffer), row)), twiddles.load(pass.tables.twiddle + row * 64 + pass.lane);
                    value = inner_transform(value * twiddles, constants);
                    if (history.count > 1) value.store(kept + pass.row_vector(row));
                    value = inner_transform(products(value), constants);
                    twiddles.load(pass.tables.twiddle + row * 64 + pass.lane);
                    (value * twiddles).store(units_of(pass.rows(buffer), row));
                }
                named_barrier_arrive<512>(Pass::kTransformed + buffer);
            }
        }
        copy_async_wait<0>();
    }
};

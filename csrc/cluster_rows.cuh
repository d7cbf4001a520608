// The second group of a cluster's block: the rows, from which the two transforms of csrc/cluster.cuh have come and to which they go back.
#pragma once
#include "cluster_plan.cuh"

template <class T, bool kGradients, class Pass>
struct ClusterRows {
    using Plan = ClusterPlan<T>;
    Pass& pass;

    DEVICE void run() const {
        if constexpr (T::kBlocked)
            transform_blocked();
        else
            transform();
    }

private:
    // This lane's units of a row.
    DEVICE uint4* units_of(int buffer, int row) const { return pass.rows(buffer) + row * kRowUnits + fragment_unit(row, pass.lane); }

    // Of the gradients of taps, where they are wanted: the sums over pairs of conj(G) E for the rows of this block, with the transforms G of the first turn,
    // which are kept for the second, and E of that. What fft_conv_tap_gradient wants in its order.
    struct RowSums {
        const Pass& pass;
        float4* to;         // the first row of all
        float weight;       // that undoes the scales of both transforms
        bool first;         // pair of the sums

        DEVICE RowSums(const Pass& pass, int tile) : pass(pass) {
            const LaunchParams& params = pass.params;
            if (!kGradients || !params.grad_filter) return;
            const int own = pass.pair(tile), channel = params.pairs.divide(own), in_channel = own - channel * params.pairs.divisor;
            const int split = params.tiles_per_split.divide(in_channel);
            first = in_channel == split * params.tiles_per_split.divisor;
            to = reinterpret_cast<float4*>(params.grad_filter) + int64_t(channel * params.splits.divisor + split) * (2 * kBlockVectors<T>) + pass.lane;
            const float* const scales = pass.control().pair_scales;
            weight = scales[tile % Plan::kScaleSlots] * scales[(tile - 1) % Plan::kScaleSlots];
        }
        // Where the transform of the first turn waits, for the row that comes so many after the warp's first.
        DEVICE uint4* kept(int after) const { return static_cast<uint4*>(pass.params.scratch) + ((block_index() * T::kRows + pass.warp + after) * 64 + pass.lane); }
        DEVICE void add(const RowFragment& g, const RowFragment& e, int after) const {
            float4* const sums = to + cluster_row<T>(pass.rank, pass.warp + after) * (kColumns / 2);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float4 product = weighted_product_of_conjugate(g.value[n / 2][n % 2], e.value[n / 2][n % 2], weight);
                if (first)
                    sums[32 * n] = product;
                else
                    add_to_global(sums + 32 * n, product);
            }
        }
    };

    DEVICE void transform() const {
        const InnerConstants constants(InnerTables{pass.tables.inner, pass.lane});
        // Every lane copies what it will read itself: nothing but its own wait is needed. The spectrum stays as long as the channel does.
        auto operand = [&](int i) { return pass.operands() + i * 64; };
        auto start_operand = [&](int i, int of_tile, bool wanted) {
            if (wanted) {
                const uint4* const from = reinterpret_cast<const uint4*>(pass.params.spectrum) + int64_t(pass.channel_of(pass.pair(of_tile))) * kBlockVectors<T> + pass.row_vector(pass.warp + i * T::kWarps);
                copy_async<16>(operand(i), from), copy_async<16>(operand(i) + 32, from + 32);
            }
            copy_async_commit();
        };
        pass.done(Pass::kTransforming) = 0;
        for (int i = 0; i < Plan::kRowsPerWarp; i++) start_operand(i, pass.range().first, true);
#pragma unroll 1
        for (; pass.tile(Pass::kTransforming) < pass.range().last; pass.done(Pass::kTransforming) = pass.done(Pass::kTransforming) + 1) {
            const int buffer = pass.done(Pass::kTransforming) % Plan::kBuffers, next = pass.tile(Pass::kTransforming, 1);
            const bool channel_ends = next < pass.range().last && pass.channel_of(pass.pair(next)) != pass.channel_of(pass.pair(next - 1));
            named_barrier<512>(Pass::kReady + buffer);
            uint4* const first_row = pass.rows(buffer) + pass.warp * kRowUnits + fragment_unit(pass.warp, pass.lane);
            const uint4* const first_twiddle = pass.tables.twiddle + pass.warp * 64 + pass.lane;
            const bool second = pass.second_turn(next - 1), wanted = pass.tensors(next - 1).output.data;
            const RowSums sums(pass, next - 1);
#pragma unroll(kGradients ? 1 : 2)
            for (int i = 0; i < Plan::kRowsPerWarp; i++) {
                const int own = i * T::kWarps;
                RowFragment value, factors, twiddles;
                value.load(first_row + own * kRowUnits);
                RowFragment g = {};
                if (kGradients && second && pass.params.grad_filter) g.load_again(sums.kept(own));
                copy_async_wait<Plan::kRowsPerWarp - 1>();
                twiddles.load(first_twiddle + own * 64);
                value = inner_transform(value * twiddles, constants);
                if constexpr (kGradients) {
                    if (!second)
                        value.store(sums.kept(own));
                    else if (pass.params.grad_filter)
                        sums.add(g, value, own);
                    // Read again rather than kept: registers are scarce.
                    twiddles.load(first_twiddle + own * 64);
                }
                if (!kGradients || wanted) {
                    factors.load(operand(i));
                    factors.conjugate_if(second);
                    value = inner_transform(conjugate_product(value, factors), constants) * twiddles;
                    value.store(first_row + own * kRowUnits);
                }
                start_operand(i, next, channel_ends);
            }
            named_barrier_arrive<512>(Pass::kTransformed + pass.done(Pass::kTransforming) % Plan::kBuffers);
        }
        copy_async_wait<0>();
    }

    // The same for blocked sequences, whose products are the steps.
    DEVICE void transform_blocked() const {
        const typename NeededInnerTables<typename T::Element>::type constants{pass.tables.inner, pass.lane};
        int place = 0;      // of the operands of this step, and then of those kAhead steps later
        ::Products<T, 1> next(pass);
        auto start_operands = [&] {
            if (next.own < pass.control().blocked.pairs.count) {
                uint4* const to = pass.operands() + place * Plan::kOperandVectors;
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
                auto keep = [&](const RowFragment& value, int row) {
                    if (history.count > 1) value.store(kept + pass.row_vector(row));
                };
                // The sum of the products of a row, the first of which is that of `value`.
                auto products = [&](RowFragment value) {
                    RowFragment sums[2] = {};      // of even and of odd windows: fewer roundings of large sums
                    auto add_product = [&](RowFragment& sum, bool of_block) {
                        RowFragment factors;
                        copy_async_wait<Plan::kAhead - 1>();
                        const uint4* const operand = pass.operands() + place * Plan::kOperandVectors;
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
                auto transformed = [&](int row) {
                    RowFragment value, twiddles;
                    value.load(units_of(buffer, row)), twiddles.load(pass.tables.twiddle + row * 64 + pass.lane);
                    return inner_transform(value * twiddles, constants);
                };
                auto transform_back = [&](const RowFragment& sum, int row) {
                    RowFragment twiddles;
                    twiddles.load(pass.tables.twiddle + row * 64 + pass.lane);
                    (inner_transform(sum, constants) * twiddles).store(units_of(buffer, row));
                };
                named_barrier<512>(Pass::kReady + buffer);
                if (!pass.params.channel_pairs) {
#pragma unroll 1
                    for (int row = pass.warp; row < T::kRows; row += T::kWarps) {
                        const RowFragment value = transformed(row);
                        keep(value, row);
                        transform_back(products(value), row);
                    }
                } else {
#pragma unroll 1
                    for (int unit = pass.warp; unit < T::kRows / 2; unit += T::kWarps) {
                        const int row = pass.unit_row(unit, false), mirrored_row = pass.unit_row(unit, true);
                        RowFragment first = transformed(row), second = mirrored(transformed(mirrored_row));
                        split_halves(first, second);
                        keep(first, row), keep(second, mirrored_row);
                        first = products(first), second = products(second);
                        transform_back(first + second, row);
                        transform_back(mirrored(first - second), mirrored_row);
                    }
                }
                named_barrier_arrive<512>(Pass::kTransformed + buffer);
            }
        }
        copy_async_wait<0>();
    }
};

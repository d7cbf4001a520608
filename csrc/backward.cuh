// Gradients of y = post_gate * conv(pre_gate * u, k) in one pass over the inputs. With g = pre_gate * u, e = post_gate * grad_output, G and E
// their transforms and K the filter's spectrum:
//   grad_post_gate = grad_output * IFFT(G K),   grad_u = pre_gate * IFFT(E conj K),   grad_pre_gate = u * IFFT(E conj K),
//   gradient of the taps = IFFT(sum over pairs of conj(G) E), as csrc/tap_transform.cuh makes it of these sums.
// A block owns the sums of a channel (of several where pairs share a tile) over its share of the batch: no atomics, the same bits every time.
// Of its sixteen warps the first group of eight brings g in and grad_post_gate out, the second e and the other gradients.
#pragma once
#include "tile_io.cuh"
#include "transform.cuh"

template <class T>
struct BackwardPlan {
    static constexpr int kThreads = 512, kWarps = 16, kRowsPerWarp = T::kRows / kWarps;
    static constexpr int kExchangeBytes = 2 * 32 * 4;
    static constexpr int kControlBytes = (2 * T::kEnergyBytes + kExchangeBytes + 4 * int(sizeof(TileHeader)) + 127) / 128 * 128;      // copies like whole lines
    // Where the inputs wait. Staged: u, pre_gate and grad_output of this tile, which its end needs again, and of the next, and post_gate of one of
    // them. Overlaid: over the rows, which are free until the inputs are in registers. Else in global memory.
    static constexpr bool kSharedTwiddles = Tables<T, true>::kSharedBytes + kControlBytes + 2 * T::kRowBytes + 7 * T::kStageBytes <= kSharedLimit;
    static constexpr int kFixedBytes = Tables<T, kSharedTwiddles>::kSharedBytes + kControlBytes;
    static constexpr bool kStaged = kFixedBytes + 2 * T::kRowBytes + 7 * T::kStageBytes <= kSharedLimit;
    static constexpr bool kOverlaid = !kStaged && kFixedBytes + 4 * T::kStageBytes <= kSharedLimit;
    static constexpr int kOverlayBytes = kOverlaid && 4 * T::kStageBytes > 2 * T::kRowBytes ? 4 * T::kStageBytes : 2 * T::kRowBytes;
    static constexpr int kSharedBytes = kFixedBytes + (kStaged ? 2 * T::kRowBytes + 7 * T::kStageBytes : kOverlayBytes);
    static_assert(kSharedBytes <= kSharedLimit, "shared memory of a block");
};

// A unit is what one block sums over: the channels of a tile and one of the splits of the batch.
template <class T>
struct BackwardUnits {
    int channels_per_tile, count;

    HOST_DEVICE explicit BackwardUnits(const LaunchParams& params) {
        channels_per_tile = T::kPairs >> params.log_sharing;
        count = (params.channels + channels_per_tile - 1) / channels_per_tile * params.splits.divisor;
    }

    DEVICE int channel(const LaunchParams& params, int unit, int pair) const {
        return params.splits.divide(unit) * channels_per_tile + (pair >> params.log_sharing);
    }

    // Tiles of a unit; the last split may have fewer.
    DEVICE int tiles(const LaunchParams& params, int unit) const {
        const int sharing = 1 << params.log_sharing, all = (params.pairs.divisor + sharing - 1) / sharing;
        const int left = all - params.splits.remainder(unit) * params.tiles_per_split.divisor;
        return left < params.tiles_per_split.divisor ? left : params.tiles_per_split.divisor;
    }

    DEVICE TileSequences sequences(const LaunchParams& params, int unit, int tile, int lane) const {
        const int pair = lane / 2, first = (params.splits.remainder(unit) * params.tiles_per_split.divisor + tile) << params.log_sharing;
        return TileSequences::of_pair<T>(params, unit < count && pair < T::kPairs ? channel(params, unit, pair) : params.channels, first + (pair & ((1 << params.log_sharing) - 1)), lane);
    }

    DEVICE RegularSequences regular(const LaunchParams& params, int unit, int tile) const {
        const int sharing = 1 << params.log_sharing, first = (params.splits.remainder(unit) * params.tiles_per_split.divisor + tile) << params.log_sharing;
        const int rows = rows_of_pair(params);
        const bool across = sharing == 1, second = rows * (first + sharing) <= params.batch;
        return {rows * first, channel(params, unit, 0), across ? 0 : rows, across ? 1 : 0, second,
                (across || channels_per_tile == 1) && channel(params, unit, 0) + channels_per_tile <= params.channels && (second || (across && rows * first < params.batch))};
    }
};

template <class T>
struct Backward {
    using Plan = BackwardPlan<T>;
    using Element = typename T::Element;
    using Sums = float4[Plan::kRowsPerWarp][4];     // of the products, of a warp's rows
    const LaunchParams& params;
    const int lane, block_warp, group, warp;
    const BackwardUnits<T> units;
    const Stager<T> stager;
    const Tables<T, Plan::kSharedTwiddles> tables;
    uint4 *rows_g, *rows_e;
    float* energies;
    u32* exchange;          // 64 words: scales of the sequences
    TileHeader* headers;    // the group's, of this tile and the next in turn
    char* stages;

    DEVICE explicit Backward(const LaunchParams& params)
        : params(params), lane(thread_index() % 32), block_warp(thread_index() / 32), group(block_warp / 8), warp(block_warp % 8),
          units(params), stager{params, thread_index()}, tables(params.tables, shared_memory()) {
        char* memory = shared_memory() + Tables<T, Plan::kSharedTwiddles>::kSharedBytes;
        energies = reinterpret_cast<float*>(memory + group * T::kEnergyBytes);
        memory += 2 * T::kEnergyBytes;
        exchange = reinterpret_cast<u32*>(memory);
        headers = reinterpret_cast<TileHeader*>(memory + Plan::kExchangeBytes) + 2 * group;
        memory = shared_memory() + Plan::kFixedBytes;
        rows_g = reinterpret_cast<uint4*>(memory), rows_e = reinterpret_cast<uint4*>(memory + T::kRowBytes);
        stages = memory + (Plan::kStaged ? 2 * T::kRowBytes : 0);
    }

    DEVICE uint4* row_words(uint4* rows, int row) const { return rows + row * kRowUnits; }

    // Stages of a tensor in even and odd tiles.
    DEVICE Stage<T> stage(TensorIndex index, int turn) const {
        const int at = index == kPostGate ? (Plan::kStaged ? 6 : 3) : (Plan::kStaged ? 3 * turn : 0) + (index == kU ? 0 : index == kPreGate ? 1 : 2);
        return {(&params.u)[index].data ? stages + at * T::kStageBytes : nullptr};
    }

    DEVICE void start_inputs(const TileSequences& sequences, int turn, bool any) const {
        if ((Plan::kStaged || Plan::kOverlaid) && any) {
            const TensorIndex operand = group == 0 ? kU : kGradOutput, gate = group == 0 ? kPreGate : kPostGate;
            stager.start(headers[turn], [&] { return sequences; }, stage(operand, turn), operand, stage(gate, turn), gate);
        }
        copy_async_commit();
    }

    // Rows of both transforms: to the frequency domain, the sums, and back.
    DEVICE void transform_rows(int unit, Sums& sums) const {
        const InnerTables constants{tables.inner, lane};
        const int own_unit = fragment_unit(block_warp, lane);
#pragma unroll
        for (int i = 0; i < Plan::kRowsPerWarp; i++) {
            const int row = block_warp + i * Plan::kWarps, pair = row / T::kPairRows, channel = units.channel(params, unit, pair);
            RowFragment twiddle = tables.row_twiddles(row % T::kPairRows, lane), spectrum, x[2];
            RowFragment &g = x[0], &e = x[1];
            float4(&sum)[4] = sums[i];
            g.load(row_words(rows_g, row) + own_unit), e.load(row_words(rows_e, row) + own_unit);
            g = g * twiddle, e = e * twiddle;
            inner_transform(x, constants);
            spectrum.load_spectrum(reinterpret_cast<const uint4*>(params.spectrum) + (int64_t(channel < params.channels ? channel : 0) * T::kPairRows + row % T::kPairRows) * 64 + lane);
            const float* up = reinterpret_cast<const float*>(exchange);
            // The second sequence's scale is the same unless it is not finite.
            const float weight = up[2 * pair] * up[32 + 2 * pair] + 0.f * (up[2 * pair + 1] * up[32 + 2 * pair + 1]);
#pragma unroll
            for (int j = 0; j < 4; j++) accumulate(sum[j], weighted(product_of_conjugate(g.value[j / 2][j % 2], e.value[j / 2][j % 2]), weight));
            e = product_of_conjugate(e, spectrum);
            if (params.grad_post_gate.data) {
                g = conjugate_product(g, spectrum);
                inner_transform(x, constants);
            } else {
                e = inner_transform(e, constants);
            }
            // Read again rather than kept: registers are scarce.
            twiddle = tables.row_twiddles(row % T::kPairRows, lane);
            if (params.grad_post_gate.data) (g * twiddle).store(row_words(rows_g, row) + own_unit);
            (e * twiddle).store(row_words(rows_e, row) + own_unit);
        }
    }

    DEVICE void clear_sums(Sums& sums) const {
        for (auto& row : sums)
            for (float4& sum : row) sum = make_float4(0.f, 0.f, 0.f, 0.f);
    }

    // grad_post_gate from the first group, grad_u and grad_pre_gate from the second: each is the group's result times another input.
    template <bool kRegular, class Source>
    DEVICE void store_gradients(const OuterResult<T>& result, const TileHeader& header, const TileSequences& sequences, float scale, const Source& factor,
                                const Source& input) const {
        const int column = outer_column(warp, lane), slot = lane % 4;
        const TensorIndex index = group == 0 ? kGradPostGate : kGradU;
        const bool has_second = group == 1 && params.grad_pre_gate.data;
#pragma unroll
        for (int i = 0; i < T::kLanePairs; i++) {
            const int first_slot = slot + 4 * i, pair = T::slot_pair(first_slot);
            const float first_scale = shuffle(scale, 2 * pair);
#pragma unroll
            for (int c = 0; c < 2; c++) {
                if (kRegular && c == 1 && !(header.second && header.length > T::kSecondStart)) break;
                const GradientRow<kRegular> first(*this, index, header, sequences, first_slot, column, c), second(*this, kGradPreGate, header, sequences, first_slot, column, c);
                // Second sequences have come out negative.
                const float undo = c == 0 ? first_scale : T::kFolded ? -first_scale : -shuffle(scale, 2 * pair + 1);
#pragma unroll
                for (int m = 0; m < T::kLaneSlots; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int n = i + m * T::kLanePairs, at = column + 128 * half, offset = T::lane_position(m) + 128 * half;
                        Pair y = result.columns(n, half, c);
                        y = {y.x * undo, y.y * undo};
                        const Pair f = factor ? factor.load(c, n, slot, at) : Pair{1.f, 1.f};
                        first.store(offset, y.x * f.x, y.y * f.y);
                        if (has_second) {
                            const Pair v = input.load(c, n, slot, at);
                            second.store(offset, y.x * v.x, y.y * v.y);
                        }
                    }
            }
        }
    }

    // Where one sequence's gradient goes, from a column of a slot on.
    template <bool kRegular>
    struct GradientRow {
        Element* to;
        int left;       // elements to the end; none if there is no such sequence
        int aligned;

        DEVICE GradientRow(const Backward& pass, TensorIndex index, const TileHeader& header, const TileSequences& sequences, int slot, int column, int c) {
            const fft_conv_tensor& tensor = (&pass.params.u)[index];
            const int position = T::slot_position(slot) + column, pair = T::slot_pair(slot);
            aligned = pass.params.pair_aligned;
            if constexpr (kRegular) {
                to = reinterpret_cast<Element*>(header.first[index] + (T::kPairs == 1 ? 0 : pair * header.pair_stride[index])) + c * T::second_offset(tensor) + position;
                left = header.length - c * T::kSecondStart - position;
            } else {
                to = sequences.address<Element>(tensor, 2 * pair + c) + position;
                left = sequences.length_of(2 * pair + c) - position;
            }
        }

        DEVICE void store(int at, float x, float y) const {
            if constexpr (kRegular) {
                narrow_two_if<false>(at < left, to + at, x, y);
            } else {
                store_global(to, at, left, aligned, x, y);
            }
        }
    };

    DEVICE void store_gradients(const OuterResult<T>& result, const TileHeader& header, const TileSequences& sequences, float scale, int turn) const {
        const TensorIndex factor = group == 0 ? kGradOutput : kPreGate;
        if constexpr (Plan::kStaged) {
            if (header.regular)
                store_gradients<true>(result, header, sequences, scale, stage(factor, turn), stage(kU, turn));
            else
                store_gradients<false>(result, header, sequences, scale, stage(factor, turn), stage(kU, turn));
        } else if (params.pair_aligned) {
            store_gradients_from_memory<true>(result, header, sequences, scale, (&params.u)[factor]);
        } else {
            store_gradients_from_memory<false>(result, header, sequences, scale, (&params.u)[factor]);
        }
    }

    template <bool kAligned>
    DEVICE void store_gradients_from_memory(const OuterResult<T>& result, const TileHeader& header, const TileSequences& sequences, float scale,
                                            const fft_conv_tensor& factor) const {
        using Source = DirectSource<T, kAligned>;
        store_gradients<false>(result, header, sequences, scale, Source(factor, params, sequences), Source(params.u, params, sequences));
    }

    // What fft_conv_tap_gradient makes gradients of taps from. Where pairs of a channel share a tile, their sums are added up where the rows of both
    // transforms were.
    DEVICE void store_sums(int unit, const Sums& sums) const {
        auto store = [&](int row, int n, float4 sum) {
            const int64_t channel = units.channel(params, unit, row / T::kPairRows), number = channel * params.splits.divisor + params.splits.remainder(unit);
            if (channel < params.channels) reinterpret_cast<float4*>(params.grad_filter)[number * (T::kPositions / 2) + row % T::kPairRows * (kColumns / 2) + 32 * n + lane] = sum;
        };
        const bool shared = T::kPairs > 1 && params.log_sharing > 0;
        auto of_pair = [&](int row, int n) -> float4& { return reinterpret_cast<float4*>(rows_g)[(row * 4 + n) * 32 + lane]; };
        if (shared) block_barrier();
#pragma unroll
        for (int i = 0; i < Plan::kRowsPerWarp; i++)
            for (int n = 0; n < 4; n++) {
                const int row = block_warp + i * Plan::kWarps;
                if (shared)
                    of_pair(row, n) = sums[i][n];
                else
                    store(row, n, sums[i][n]);
            }
        if (!shared) return;
        block_barrier();
        const int sharing = 1 << params.log_sharing;
        for (int i = block_warp; i < 4 * T::kRows; i += Plan::kWarps) {
            const int row = i / 4, n = i % 4;
            if (row / T::kPairRows % sharing != 0) continue;
            float4 sum = of_pair(row, n);
#pragma unroll 4
            for (int pair = 1; pair < sharing; pair++) accumulate(sum, of_pair(row + pair * T::kPairRows, n));
            store(row, n, sum);
        }
        block_barrier();
    }

    DEVICE void fill_header(int unit, int tile, int turn) const {
        if (warp == 0) headers[turn].fill<Element>(params, units.regular(params, unit, tile), lane);
    }

    DEVICE void run() const {
        int turn = 0;
        fill_header(block_index(), 0, turn);
        copy_async_wait<0>();
        block_barrier();
        if (Plan::kStaged) start_inputs(units.sequences(params, block_index(), 0, lane), turn, block_index() < units.count);
        Sums sums;
        for (int unit = block_index(); unit < units.count; unit += block_count()) {
            clear_sums(sums);
            const int tiles = units.tiles(params, unit);
            for (int tile = 0; tile < tiles; tile++, turn ^= 1) {
                copy_async_wait<0>();
                block_barrier();
                const bool last = tile + 1 == tiles;
                const int next_unit = last ? unit + block_count() : unit, next_tile = last ? 0 : tile + 1;
                fill_header(next_unit, next_tile, turn ^ 1);
                const TileSequences sequences = units.sequences(params, unit, tile, lane);
                if (Plan::kOverlaid) {
                    start_inputs(sequences, turn, true);
                    copy_async_wait<0>();
                    block_barrier();
                }
                SequenceScales<T> scales{energies, group, warp, lane};
                u32 x[T::kSlots / 4][4];
                if constexpr (Plan::kStaged || Plan::kOverlaid)
                    scales.pack_scaled(x, stage(group == 0 ? kU : kGradOutput, turn), stage(group == 0 ? kPreGate : kPostGate, turn), sequences.valid, true);
                else
                    scales.pack_direct(x, group == 0 ? params.u : params.grad_output, group == 0 ? params.pre_gate : params.post_gate, params, sequences, true);
                if (warp == 0) exchange[32 * group + lane] = bits_from_float(scales.up);

                // Every thread of the group has read the group's inputs, and the stages of the tile before are free: the next tile's may come.
                if (Plan::kStaged) start_inputs(units.sequences(params, next_unit, next_tile, lane), turn ^ 1, next_unit < units.count);
                if (Plan::kOverlaid) block_barrier();

                outer_forward<T>(x, group == 0 ? rows_g : rows_e, tables.outer, warp, lane);
                block_barrier();
                transform_rows(unit, sums);
                block_barrier();
                if (!(&params.u)[group == 0 ? kGradPostGate : kGradU].data) continue;
                OuterResult<T> result;
                result.add(group == 0 ? rows_g : rows_e, tables.outer_inverse, warp, lane);
                const float scale = sequences.valid ? params.spectrum_scale[sequences.channel] * scales.up : 0.f;
                store_gradients(result, headers[turn], sequences, scale, turn);
            }
            if (params.grad_filter) store_sums(unit, sums);
        }
    }
};

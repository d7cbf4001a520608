// Gradients of y = post_gate * conv(pre_gate * u, k) in one pass over the inputs. With g = pre_gate * u, e = post_gate * grad_output, G and E
// their transforms and K the filter's spectrum:
//   grad_post_gate = grad_output * IFFT(G K),   grad_u = pre_gate * IFFT(E conj K),   grad_pre_gate = u * IFFT(E conj K),
//   gradient of the taps = real part of IFFT(sum over pairs of conj(G) E), exact for two packed real sequences.
// A block owns the sums of a channel (of several where pairs share a tile) over its share of the batch: no atomics, the same bits every time.
// Of its sixteen warps the first group of eight brings g in and grad_post_gate out, the second e and the other gradients.
#pragma once
#include "tile_io.cuh"
#include "transform.cuh"

template <class T>
struct BackwardPlan {
    static constexpr int kThreads = 512, kWarps = 16;
    static constexpr int kWeightBytes = 2 * 32 * 4;
    static constexpr int kSumBytes = T::kRows * 2048;                   // (re, im) of every frequency in single precision
    static constexpr bool kSharedSums = T::kRows <= 32;                 // else in global scratch memory, where they stay in the L2 cache
    static constexpr int kFixedBytes = Tables<T>::kSharedBytes + 2 * T::kRowBytes + 2 * T::kEnergyBytes + kWeightBytes + (kSharedSums ? kSumBytes : 0);
    // Where the inputs wait: beside the rows, so that a tile's come while the one before is worked on; over the rows, which are free until the
    // inputs are in registers; or in global memory.
    static constexpr int kOverlayBytes = 4 * T::kStageBytes > 2 * T::kRowBytes ? 4 * T::kStageBytes - 2 * T::kRowBytes : 0;
    static constexpr bool kPrefetched = kFixedBytes + 4 * T::kStageBytes <= kSharedLimit;
    static constexpr bool kStaged = kPrefetched || kFixedBytes + kOverlayBytes <= kSharedLimit;
    static constexpr int kSharedBytes = kFixedBytes + (kPrefetched ? 4 * T::kStageBytes : kStaged ? kOverlayBytes : 0);
    static_assert(kSharedBytes <= kSharedLimit, "shared memory of a block");
    static_assert(T::kGroups == 1, "a group of eight warps covers the outer stage");
};

// A unit is what one block sums over: the channels of a tile and one of the splits of the batch.
template <class T>
struct BackwardUnits {
    int channels_per_tile, count;

    HOST_DEVICE explicit BackwardUnits(const LaunchParams& params) {
        channels_per_tile = T::kRows >> params.log_radix >> params.log_sharing;
        count = (params.channels + channels_per_tile - 1) / channels_per_tile * params.splits.divisor;
    }

    DEVICE int channel(const LaunchParams& params, int unit, int pair) const {
        return params.splits.divide(unit) * channels_per_tile + (pair >> params.log_sharing);
    }

    // Tiles of a unit; the last split may have fewer.
    DEVICE int tiles(const LaunchParams& params, int unit) const {
        const int sharing = 1 << params.log_sharing, all = (params.pairs.divisor + sharing - 1) / sharing;
        const int left = all - params.splits.remainder(unit) * params.tiles_per_split;
        return left < params.tiles_per_split ? left : params.tiles_per_split;
    }

    DEVICE TileSequences sequences(const LaunchParams& params, int unit, int tile, int lane) const {
        const int pair = lane / 2, first = (params.splits.remainder(unit) * params.tiles_per_split + tile) << params.log_sharing;
        const int row = 2 * (first + (pair & ((1 << params.log_sharing) - 1))) + lane % 2;
        return TileSequences(params, unit < count && pair < T::kRows >> params.log_radix ? channel(params, unit, pair) : params.channels, row);
    }
};

// value += weight * conj(x) y, for the two points of a pair: (re, im, re, im).
DEVICE void accumulate(float4& value, PlanarPair x, PlanarPair y, float weight) {
    const float y_re0 = low_half(y.re) * weight, y_im0 = low_half(y.im) * weight, y_re1 = high_half(y.re) * weight, y_im1 = high_half(y.im) * weight;
    value.x += low_half(x.re) * y_re0 + low_half(x.im) * y_im0;
    value.y += low_half(x.re) * y_im0 - low_half(x.im) * y_re0;
    value.z += high_half(x.re) * y_re1 + high_half(x.im) * y_im1;
    value.w += high_half(x.re) * y_im1 - high_half(x.im) * y_re1;
}

template <class T>
struct Backward {
    using Plan = BackwardPlan<T>;
    using Element = typename T::Element;
    const LaunchParams& params;
    const int lane, block_warp, group, warp;
    const int radix;
    const BackwardUnits<T> units;
    const SlotMap<T> slots;
    const Tables<T> tables;
    uint4 *rows_g, *rows_e;
    float* energies;
    u32* exchange;      // 64 words: scales of the sequences, later the largest magnitudes of the sums
    float4* sums;
    char* stages;

    DEVICE explicit Backward(const LaunchParams& params)
        : params(params), lane(thread_index() % 32), block_warp(thread_index() / 32), group(block_warp / 8), warp(block_warp % 8), radix(1 << params.log_radix),
          units(params), slots{params.log_radix - (T::kSlots < T::kRows)}, tables(params.tables, shared_memory()) {
        char* memory = shared_memory() + Tables<T>::kSharedBytes;
        energies = reinterpret_cast<float*>(memory + group * T::kEnergyBytes);
        memory += 2 * T::kEnergyBytes;
        exchange = reinterpret_cast<u32*>(memory);
        memory += Plan::kWeightBytes;
        sums = reinterpret_cast<float4*>(Plan::kSharedSums ? memory : reinterpret_cast<char*>(params.scratch) + int64_t(block_index()) * Plan::kSumBytes);
        memory += Plan::kSharedSums ? Plan::kSumBytes : 0;
        rows_g = reinterpret_cast<uint4*>(memory);
        rows_e = reinterpret_cast<uint4*>(memory + T::kRowBytes);
        stages = memory + (Plan::kPrefetched ? 2 * T::kRowBytes : 0);
    }

    DEVICE uint4* row_words(uint4* rows, int row) const { return rows + row * (kRowPitch / 4); }

    DEVICE const uint4* twiddles(int row) const { return tables.twiddle + (row & (radix - 1)) * 64; }

    DEVICE const fft_conv_tensor& operand() const { return group == 0 ? params.u : params.grad_output; }
    DEVICE const fft_conv_tensor& gate() const { return group == 0 ? params.pre_gate : params.post_gate; }
    DEVICE Stage<T> operand_stage() const { return {stages + 2 * group * T::kStageBytes}; }
    DEVICE Stage<T> gate_stage() const { return {gate().data ? stages + (2 * group + 1) * T::kStageBytes : nullptr}; }

    DEVICE void start_inputs(const TileSequences& sequences, bool any) const {
        if constexpr (Plan::kStaged) {
            const Stager<T> stager(params, slots);
            if (any) {
                stager.start(operand_stage(), operand(), sequences);
                if (gate().data) stager.start(gate_stage(), gate(), sequences);
            }
            copy_async_commit();
        }
    }

    DEVICE void clear_sums() const {
        for (int row = block_warp; row < T::kRows; row += Plan::kWarps)
            for (int i = 0; i < 4; i++) sums[(row * 4 + i) * 32 + lane] = make_float4(0.f, 0.f, 0.f, 0.f);
    }

    // Rows of both transforms: to the frequency domain, the sums, and back.
    DEVICE void transform_rows(const TileSequences& sequences) const {
        InnerConstants constants;
        constants.load(tables.inner, lane);
#pragma unroll 1
        for (int row = block_warp; row < T::kRows; row += Plan::kWarps) {
            const int owner = 2 * (T::kMaxPairs == 1 ? 0 : row >> params.log_radix);
            const int64_t channel = shuffle(sequences.channel, owner);
            RowFragment twiddle, spectrum, g, e;
            twiddle.load_twiddles(twiddles(row), lane);
            spectrum.load_spectrum(reinterpret_cast<const uint4*>(params.spectrum) + (channel * radix + (row & (radix - 1))) * 64, lane);
            // From the L2 cache the sums take their time.
            float4* const row_sums = sums + row * 128 + lane;
            float4 early[4];
            if (!Plan::kSharedSums)
                for (int i = 0; i < 4; i++) early[i] = row_sums[32 * i];
            g.load(row_words(rows_g, row), lane);
            g = inner_transform(g * twiddle, constants);
            e.load(row_words(rows_e, row), lane);
            e = inner_transform(e * twiddle, constants);
            const float* up = reinterpret_cast<const float*>(exchange);
            // The second sequence's scale is the same unless it is not finite.
            const float weight = up[owner] * up[32 + owner] + 0.f * (up[owner + 1] * up[32 + owner + 1]);
            for (int i = 0; i < 4; i++) {
                float4 sum = Plan::kSharedSums ? row_sums[32 * i] : early[i];
                accumulate(sum, g.value[i / 2][i % 2], e.value[i / 2][i % 2], weight);
                row_sums[32 * i] = sum;
            }
            if (params.grad_post_gate.data) (inner_transform(conjugate_product(g, spectrum), constants) * twiddle).store(row_words(rows_g, row), lane);
            (inner_transform(product_of_conjugate(e, spectrum), constants) * twiddle).store(row_words(rows_e, row), lane);
        }
    }

    // grad_post_gate from the first group, grad_u and grad_pre_gate from the second: each is the group's result times another input, which the
    // L2 cache still holds. Loads go out in batches before their stores.
    template <bool kAligned>
    DEVICE void store_gradients(const OuterResult<T>& result, const TileSequences& sequences, float scale) const {
        constexpr int kBatch = 2;
        const bool has_factor = group == 0 || params.pre_gate.data;
        const fft_conv_tensor& factors = group == 0 ? params.grad_output : has_factor ? params.pre_gate : params.u;
        const fft_conv_tensor& outputs = group == 0 ? params.grad_post_gate : params.grad_u;
        const bool second_output = group == 1 && params.pre_gate.data;
        const int column = outer_column(warp, lane);
#pragma unroll
        for (int c = 0; c < 2; c++) {
            GlobalSequence<const Element, kAligned> factor(factors, params, sequences, c), input(params.u, params, sequences, c);
            GlobalSequence<Element, kAligned> output(outputs, params, sequences, c), output_pre(params.grad_pre_gate, params, sequences, c);
            float undo = shuffle(scale, c) * (c == 0 ? 1.f : -1.f);
#pragma unroll
            for (int first = 0; first < OuterResult<T>::kTiles; first += kBatch) {
                Pair factor_values[kBatch][2], input_values[kBatch][2];
#pragma unroll
                for (int i = 0; i < kBatch; i++) {
                    const int slot = OuterResult<T>::slot(first + i, warp, lane);
                    if (T::kMaxPairs > 1) {
                        const int owner = 2 * slots.pair(slot) + c;
                        factor = {factors, params, sequences, owner}, input = {params.u, params, sequences, owner};
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++) factor_values[i][half] = factor.load(slots.position(slot) + column + 128 * half);
                    if (second_output)
#pragma unroll
                        for (int half = 0; half < 2; half++) input_values[i][half] = input.load(slots.position(slot) + column + 128 * half);
                }
#pragma unroll
                for (int i = 0; i < kBatch; i++) {
                    const int n = first + i, slot = OuterResult<T>::slot(n, warp, lane);
                    if (T::kMaxPairs > 1) {
                        const int owner = 2 * slots.pair(slot) + c;
                        output = {outputs, params, sequences, owner}, output_pre = {params.grad_pre_gate, params, sequences, owner};
                        undo = shuffle(scale, owner) * (c == 0 ? 1.f : -1.f);
                    }
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int position = slots.position(slot) + column + 128 * half;
                        const float y0 = result.value[n][0][2 * half + c] * undo, y1 = result.value[n][1][2 * half + c] * undo;
                        const Pair f = has_factor ? factor_values[i][half] : Pair{1.f, 1.f}, v = input_values[i][half];
                        output.store(position, y0 * f.x, y1 * f.y);
                        if (second_output) output_pre.store(position, y0 * v.x, y1 * v.y);
                    }
                }
            }
        }
    }

    // From the sums of a unit to the gradient of its taps. Half transforms give the taps of the second half by the shift theorem: the signs of
    // odd frequencies change, which are those of odd rows.
    DEVICE void store_filter_gradient(int unit) const {
        block_barrier();
        if (block_warp == 0) exchange[lane] = 0;
        block_barrier();
        for (int row = block_warp; row < T::kRows; row += Plan::kWarps) {
            u32 largest = 0;
            for (int i = 0; i < 4; i++) {
                const float4 v = sums[(row * 4 + i) * 32 + lane];
                for (float x : {v.x, v.y, v.z, v.w}) {
                    const u32 bits = bits_from_float(x) & 0x7fffffffu;
                    largest = bits > largest ? bits : largest;
                }
            }
            largest = warp_maximum(largest);
            if (lane == 0) atomic_maximum(exchange + (row >> params.log_radix), largest);
        }
        block_barrier();
        InnerConstants constants;
        constants.load(tables.inner, lane);
        for (int row = block_warp; row < T::kRows; row += Plan::kWarps) {
            // Sums that are not finite go in as zeros, not to reach the other pairs of the tile, and come out as NaN by their scale.
            const float divisor = scale_of_sums(row >> params.log_radix);
            const bool finite = divisor == divisor;
            const float scale = finite ? 1.f / divisor : 0.f;
            RowFragment twiddle, sum;
            twiddle.load_twiddles(twiddles(row), lane);
            for (int i = 0; i < 4; i++) {
                const float4 v = finite ? sums[(row * 4 + i) * 32 + lane] : make_float4(0.f, 0.f, 0.f, 0.f);
                sum.value[i / 2][i % 2] = {pack(v.x * scale, v.z * scale), pack(-v.y * scale, -v.w * scale)};
            }
            sum = inner_transform(sum, constants) * twiddle;
            sum.store(row_words(rows_g, row), lane);
            if (T::kSlots < T::kRows) {
                if (row % 2 == 1)
                    for (int i = 0; i < 4; i++) sum.value[i / 2][i % 2] = {negate2(sum.value[i / 2][i % 2].re), negate2(sum.value[i / 2][i % 2].im)};
                sum.store(row_words(rows_e, row), lane);
            }
        }
        block_barrier();
        if (T::kSlots == T::kRows && group == 1) return;
        OuterResult<T> result;
        result.transform(group == 0 ? rows_g : rows_e, tables.outer_inverse, warp, lane);
        const int column = outer_column(warp, lane), offset = group * (params.fft_size / 2), split = params.splits.remainder(unit);
        for (int n = 0; n < OuterResult<T>::kTiles; n++) {
            const int slot = OuterResult<T>::slot(n, warp, lane), pair = slots.pair(slot), channel = units.channel(params, unit, pair);
            if (channel >= params.channels) continue;
            const int partial = (split << params.log_sharing) + (pair & ((1 << params.log_sharing) - 1));
            float* taps = params.grad_filter + (int64_t(partial) * params.channels + channel) * params.fft_size + slots.position(slot) + offset;
            const float factor = scale_of_sums(pair) * square_root(float(params.fft_size));
            for (int half = 0; half < 2; half++)
                narrow_two(taps + column + 128 * half, result.value[n][0][2 * half] * factor, result.value[n][1][2 * half] * factor);
        }
    }

    // A power of two near the largest magnitude among a pair's sums; NaN if they are not finite.
    DEVICE float scale_of_sums(int pair) const {
        const int exponent = int(exchange[pair] >> 23);
        return exponent == 255 ? float_from_bits(0x7fc00000u) : power_of_two(exponent < 2 ? -125 : exponent - 127);
    }

    DEVICE void run() const {
        int unit = block_index(), tile = 0;
        TileSequences sequences = units.sequences(params, unit, 0, lane);
        block_barrier();
        if (Plan::kPrefetched) start_inputs(sequences, unit < units.count);
        for (; unit < units.count; unit += block_count()) {
            clear_sums();
            const int tiles = units.tiles(params, unit);
            for (tile = 0; tile < tiles; tile++) {
                const TileSequences current = sequences;
                if (!Plan::kPrefetched) {
                    block_barrier();
                    start_inputs(current, true);
                }
                copy_async_wait<0>();
                block_barrier();
                SequenceScales<T> scales{energies, slots, group, warp, lane};
                u32 x[T::kSlots / 4][4];
                if constexpr (Plan::kStaged)
                    scales.template pack_scaled<true>(x, operand_stage(), gate_stage(), current.valid);
                else
                    scales.template pack_direct<true>(x, operand(), gate(), params, current);
                if (warp == 0) exchange[32 * group + lane] = bits_from_float(scales.up);

                // Every thread of the group has read the group's inputs: the next tile's may come.
                const bool last = tile + 1 == tiles;
                const int next_unit = last ? unit + block_count() : unit;
                sequences = units.sequences(params, next_unit, last ? 0 : tile + 1, lane);
                if (Plan::kPrefetched) start_inputs(sequences, next_unit < units.count);
                if (!Plan::kPrefetched) block_barrier();

                outer_forward<T>(x, group == 0 ? rows_g : rows_e, tables.outer, warp, lane);
                block_barrier();
                transform_rows(current);
                block_barrier();
                if (group == 0 && !params.grad_post_gate.data) continue;
                OuterResult<T> result;
                result.transform(group == 0 ? rows_g : rows_e, tables.outer_inverse, warp, lane);
                const float scale = current.valid ? params.spectrum_scale[current.channel] * scales.up : 0.f;
                params.pair_aligned ? store_gradients<true>(result, current, scale) : store_gradients<false>(result, current, scale);
            }
            store_filter_gradient(unit);
        }
    }
};

// y = post_gate * conv(pre_gate * u, k): one kernel, each block walks over tiles of sequence pairs.
#pragma once
#include "tile_io.cuh"
#include "transform.cuh"

template <class T>
struct ForwardPlan {
    static constexpr int bytes(int tensors) { return T::kRowBytes + T::kEnergyBytes + tensors * T::kStageBytes; }
    static constexpr int blocks(int tensors) { return T::kThreads <= 256 && 2 * (bytes(tensors) + 1024) <= kSharedLimit + 1024 ? 2 : 1; }
    static constexpr int kBlocks = blocks(2);                                                           // resident on a multiprocessor
    static constexpr bool kStagePost = bytes(3) <= kSharedLimit && blocks(3) == kBlocks;
    static constexpr int kSharedBytes = bytes(kStagePost ? 3 : 2);
};

template <class T>
DEVICE void forward_tiles(const LaunchParams& params) {
    using Plan = ForwardPlan<T>;
    using Element = typename T::Element;
    const int warp = thread_index() / 32, lane = thread_index() % 32, column = 2 * (warp % 8 * 8 + lane / 4);
    uint4* rows = reinterpret_cast<uint4*>(shared_memory());
    SequenceScales<T> scales{reinterpret_cast<float*>(shared_memory() + T::kRowBytes), 1.f};
    char* const stage_u = shared_memory() + T::kRowBytes + T::kEnergyBytes;
    char* const stage_pre = stage_u + T::kStageBytes;
    char* const stage_post = stage_pre + T::kStageBytes;

    const int radix = 1 << params.log_radix, pairs_per_tile = T::kRows >> params.log_radix;
    const SlotMap<T> slots{params.log_radix - (T::kSlots < T::kRows)};
    const WorkRange range = work_range(tile_count<T>(params), Plan::kBlocks);

    const Tables<T> tables(params.tables);

    auto stage_inputs = [&](int tile) {
        if (tile < range.last) {
            const TileSequences sequences(params, tile * pairs_per_tile, lane);
            stage<T>(stage_u, params.u, params.alignment, params.length, slots, sequences);
            if (params.pre_gate.data) stage<T>(stage_pre, params.pre_gate, params.alignment, params.length, slots, sequences);
        }
        copy_async_commit();
    };

    stage_inputs(range.first);
    for (int tile = range.first; tile < range.last; tile += range.step) {
        const TileSequences sequences(params, tile * pairs_per_tile, lane);
        copy_async_wait<0>();
        block_barrier();
        u32 x[T::kSlots / 4][4];
        scales.pack_scaled(x, stage_u, params.pre_gate.data ? stage_pre : nullptr, slots, sequences.valid, column, warp, lane);

        // Every thread has read its inputs (a barrier has passed): the next tile's may come.
        if (Plan::kStagePost && params.post_gate.data) stage<T>(stage_post, params.post_gate, params.alignment, params.length, slots, sequences);
        copy_async_commit();
        stage_inputs(tile + range.step);

        outer_forward<T>(x, rows, tables.outer, warp, lane);
        InnerConstants constants;
        constants.load(tables.inner, lane);
        block_barrier();
#pragma unroll 1
        for (int row = warp; row < T::kRows; row += T::kWarps) {
            const int k1 = row & (radix - 1), channel = shuffle(sequences.channel, 2 * (row >> params.log_radix));
            uint4* words = rows + row * (kRowPitch / 4);
            RowFragment value, twiddle, spectrum;
            twiddle.load_lanes(tables.twiddle + k1 * 64, lane);
            spectrum.load_lanes(reinterpret_cast<const uint4*>(params.spectrum) + (int64_t(channel) * radix + k1) * 64, lane);
            value.load(words, lane);
            value = inner_transform(value * twiddle, constants);
            value = conjugate_product(value, spectrum);
            value = inner_transform(value, constants) * twiddle;
            value.store(words, lane);
        }
        copy_async_wait<1>();
        block_barrier();

        OuterResult<T> result;
        result.transform(rows, tables.outer_inverse, warp, lane);
        const float scale = sequences.valid ? params.spectrum_scale[sequences.channel] * scales.up : 0.f;
#pragma unroll
        for (int n = 0; n < OuterResult<T>::kTiles; n++) {
            const int slot = OuterResult<T>::slot(n, warp, lane);
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int owner = 2 * slots.pair(slot) + c, row = shuffle(sequences.row, owner), channel = shuffle(sequences.channel, owner);
                const float factor = c == 0 ? shuffle(scale, owner) : -shuffle(scale, owner);
                if (!shuffle(int(sequences.valid), owner)) continue;
                Element* output = sequence_data<Element>(params.output, row, channel);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int at = column + 128 * half, position = slots.position(slot) + at;
                    float y0 = result.value[n][0][2 * half + c] * factor, y1 = result.value[n][1][2 * half + c] * factor;
                    if (params.post_gate.data) {
                        const Pair gate = Plan::kStagePost ? load_staged<T>(stage_post, c, slot, at)
                            : load_global(sequence_data<const Element>(params.post_gate, row, channel), position, params.length, params.pair_aligned);
                        y0 *= gate.x, y1 *= gate.y;
                    }
                    store_global(output, position, params.length, params.pair_aligned, y0, y1);
                }
            }
        }
    }
}

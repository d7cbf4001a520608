// y = post_gate * conv(pre_gate * u, k): one kernel, each block walks over tiles of sequence pairs.
#pragma once
#include "tile_io.cuh"
#include "transform.cuh"

template <class T>
struct ForwardPlan {
    static constexpr int bytes(int tensors) { return Tables<T>::kSharedBytes + T::kRowBytes + T::kGroups * T::kEnergyBytes + tensors * T::kStageBytes; }
    static constexpr int blocks(int tensors) { return T::kThreads <= 256 && 2 * (bytes(tensors) + 1024) <= kSharedLimit + 1024 ? 2 : 1; }
    static constexpr bool kStaged = bytes(2) <= kSharedLimit;                                           // else inputs come from global memory
    static constexpr int kBlocks = blocks(kStaged ? 2 : 0);                                             // resident on a multiprocessor
    static constexpr bool kStagePost = kStaged && bytes(3) <= kSharedLimit && blocks(3) == kBlocks;
    static constexpr int kSharedBytes = bytes(kStagePost ? 3 : kStaged ? 2 : 0);
    static_assert(kSharedBytes <= kSharedLimit, "shared memory of a block");
};

// Where one sequence of the tile goes, and what undoes its scales; the imaginary one comes out conjugated.
template <class T>
struct Output {
    typename T::Element* data;
    const typename T::Element* gate;
    float factor;
    bool valid;

    DEVICE Output(const LaunchParams& params, const TileSequences& sequences, float scale, int owner) {
        valid = shuffle(int(sequences.valid), owner);
        factor = shuffle(scale, owner) * (owner % 2 == 0 ? 1.f : -1.f);
        data = sequences.address<typename T::Element>(params.output, owner);
        gate = sequences.address<const typename T::Element>(params.post_gate, owner);
    }
};

// Gates and stores a tile. kRegular: every position of every slot exists, pairs are aligned, and the gate is staged if kGated and absent if not.
template <class T, bool kRegular, bool kGated>
DEVICE void store_output(const OuterResult<T>& result, const LaunchParams& params, const TileSequences& sequences, SlotMap<T> slots,
                         const Stage<T>& post, float scale, int warp, int lane) {
    const int column = outer_column(warp, lane);
#pragma unroll
    for (int c = 0; c < 2; c++) {
        Output<T> output(params, sequences, scale, c);
#pragma unroll
        for (int n = 0; n < OuterResult<T>::kTiles; n++) {
            const int slot = OuterResult<T>::slot(n, warp, lane);
            if (T::kMaxPairs > 1) output = Output<T>(params, sequences, scale, 2 * slots.pair(slot) + c);
            if (!output.valid) continue;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = column + 128 * half, position = slots.position(slot) + at;
                float y0 = result.value[n][0][2 * half + c] * output.factor, y1 = result.value[n][1][2 * half + c] * output.factor;
                if constexpr (kRegular) {
                    if constexpr (kGated) {
                        const Pair gate = post.load(c, slot, at);
                        y0 *= gate.x, y1 *= gate.y;
                    }
                    narrow_two(output.data + position, y0, y1);
                } else if (position < params.length) {
                    if (params.post_gate.data) {
                        const Pair gate = post.memory ? post.load(c, slot, at) : load_global(output.gate, position, params.length, params.pair_aligned);
                        y0 *= gate.x, y1 *= gate.y;
                    }
                    store_global(output.data, position, params.length, params.pair_aligned, y0, y1);
                }
            }
        }
    }
}

template <class T>
DEVICE void forward_tiles(const LaunchParams& params) {
    using Plan = ForwardPlan<T>;
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const Tables<T> tables(params.tables, shared_memory());
    char* const memory = shared_memory() + Tables<T>::kSharedBytes;
    uint4* rows = reinterpret_cast<uint4*>(memory);
    char* const stages = memory + T::kRowBytes + T::kGroups * T::kEnergyBytes;
    const bool stage_post = Plan::kStagePost && params.post_gate.data;
    const Stage<T> u{stages}, pre{params.pre_gate.data ? stages + T::kStageBytes : nullptr}, post{stages + 2 * T::kStageBytes};

    const int radix = 1 << params.log_radix, pairs_per_tile = T::kRows >> params.log_radix;
    const SlotMap<T> slots{params.log_radix - (T::kSlots < T::kRows)};
    const int group = T::kGroups == 1 ? 0 : warp / 8;
    SequenceScales<T> scales{reinterpret_cast<float*>(memory + T::kRowBytes + group * T::kEnergyBytes), slots, group, warp % 8, lane};
    const WorkRange range = work_range(tile_count<T>(params), Plan::kBlocks);
    const Stager<T> stager(params, slots);
    auto start_inputs = [&](int tile, const TileSequences& sequences) {
        if (Plan::kStaged && tile < range.last) {
            stager.start(u, params.u, sequences);
            if (pre.memory) stager.start(pre, params.pre_gate, sequences);
        }
        copy_async_commit();
    };

    TileSequences sequences = TileSequences::consecutive(params, range.first * pairs_per_tile, lane);
    start_inputs(range.first, sequences);
    for (int tile = range.first; tile < range.last; tile += range.step) {
        copy_async_wait<0>();
        block_barrier();
        u32 x[T::kSlots / 4][4];
        if constexpr (Plan::kStaged)
            scales.template pack_scaled<false>(x, u, pre, sequences.valid);
        else
            scales.template pack_direct<false>(x, params.u, params.pre_gate, params, sequences);
        if (T::kGroups > 1) block_barrier();

        // Every thread has read its inputs (a barrier has passed): the next tile's may come.
        const TileSequences current = sequences;
        if (stage_post) stager.start(post, params.post_gate, current);
        copy_async_commit();
        sequences = TileSequences::consecutive(params, (tile + range.step) * pairs_per_tile, lane);
        start_inputs(tile + range.step, sequences);

        outer_forward<T>(x, rows, tables.outer, warp, lane);
        InnerConstants constants;
        constants.load(tables.inner, lane);
        const uint4* const spectra = reinterpret_cast<const uint4*>(params.spectrum) + int64_t(current.channel) * radix * 64;
        RowFragment next_twiddle;
        next_twiddle.load_twiddles(tables.twiddle + (warp & (radix - 1)) * 64, lane);
        block_barrier();
#pragma unroll 1
        for (int row = warp; row < T::kRows; row += T::kWarps) {
            const RowFragment twiddle = next_twiddle;
            RowFragment value, spectrum;
            const uint4* spectrum_words = shuffle_pointer(spectra, T::kMaxPairs == 1 ? 0 : 2 * (row >> params.log_radix));
            spectrum.load_spectrum(spectrum_words + (row & (radix - 1)) * 64, lane);
            next_twiddle.load_twiddles(tables.twiddle + ((row + T::kWarps) & (radix - 1)) * 64, lane);
            uint4* words = rows + row * (kRowPitch / 4);
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
        const float scale = current.valid ? params.spectrum_scale[current.channel] * scales.up : 0.f;
        const bool regular = stager.regular && params.pair_aligned;
        if (regular && stage_post)
            store_output<T, true, true>(result, params, current, slots, post, scale, warp, lane);
        else if (regular && !params.post_gate.data)
            store_output<T, true, false>(result, params, current, slots, post, scale, warp, lane);
        else
            store_output<T, false, false>(result, params, current, slots, stage_post ? post : Stage<T>{nullptr}, scale, warp, lane);
    }
}

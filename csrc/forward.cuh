// y = post_gate * conv(pre_gate * u, k): one kernel. Each block walks over tiles of sequence pairs with three groups of eight warps, which work on
// different tiles at the same time: the first packs inputs and does the outer stage, the second transforms the rows, multiplies them by the
// filter's spectrum and transforms them back, the third does the inverse outer stage, gates and stores. Rows pass from group to group in buffers
// of shared memory, guarded by barriers: full for the second group, full for the third, empty for the first.
#pragma once
#include "tile_io.cuh"
#include "transform.cuh"

// What shared memory holds, if all of it fits: a third buffer of rows, the row twiddles, and the filter's spectrum for all rows of a tile, which
// stays as long as the channel does. Else each warp of the second group has both for its next row only.
template <class T>
struct ForwardPlan {
    static constexpr int kThreads = 3 * T::kThreads;
    static constexpr int kScaleSlots = 4;       // tiles under way between the first and the third group
    static constexpr int kControlBytes = T::kEnergyBytes + kScaleSlots * 32 * 4 + 4 * int(sizeof(TileHeader));
    static constexpr int kRowsPerWarp = T::kRows / T::kWarps;
    static constexpr int ahead(bool wide) { return wide ? kRowsPerWarp : 1; }           // rows whose operands a warp has before it comes to them
    static constexpr int operand_vectors(bool wide) { return wide ? 64 : 128; }         // of a row: spectrum, twiddles
    template <bool kWide>
    static constexpr int bytes(int stages) {
        return Tables<T, kWide>::kSharedBytes + (kWide ? 3 : 2) * T::kRowBytes + T::kWarps * ahead(kWide) * operand_vectors(kWide) * 16 + kControlBytes +
               stages * T::kStageBytes;
    }
    static constexpr bool kWide = bytes<true>(3) <= kSharedLimit;
    static constexpr bool kStaged = bytes<kWide>(3) <= kSharedLimit;        // else inputs come from global memory
    static constexpr int kBuffers = kWide ? 3 : 2, kAhead = ahead(kWide), kOperandVectors = operand_vectors(kWide);
    static constexpr int kOperandBytes = T::kWarps * kAhead * kOperandVectors * 16;
    static constexpr int kSharedBytes = bytes<kWide>(kStaged ? 3 : 0);
    static_assert(kSharedBytes <= kSharedLimit, "shared memory of a block");
};

template <class T>
struct Forward {
    using Plan = ForwardPlan<T>;
    using Element = typename T::Element;
    using Tables = ::Tables<T, Plan::kWide>;
    using Result = OuterResult<T, typename Choose<(T::kSlots > 16), HalfSums, SingleSums>::type>;
    enum Barrier { kPack = 1, kStore = 2, kPacked = 3, kTransformed = kPacked + Plan::kBuffers, kEmpty = kTransformed + Plan::kBuffers };
    const LaunchParams& params;
    const int lane, warp;
    const int radix, pairs_per_tile;
    const SlotMap<T> slots;
    const Tables tables;
    const WorkRange range;
    char* const memory;

    DEVICE explicit Forward(const LaunchParams& params)
        : params(params), lane(thread_index() % 32), warp(thread_index() / 32 % T::kWarps), radix(1 << params.log_radix),
          pairs_per_tile(T::kAllRows >> params.log_radix), slots{params.log_radix - T::kHalf}, tables(params.tables, shared_memory(), radix),
          range(work_range(tile_count<T>(params))), memory(shared_memory() + Tables::kSharedBytes) {}

    DEVICE uint4* rows(int buffer) const { return reinterpret_cast<uint4*>(memory + buffer * T::kRowBytes); }
    DEVICE char* control() const { return memory + Plan::kBuffers * T::kRowBytes + Plan::kOperandBytes; }
    DEVICE Stage<T> stage(int tensor) const { return {control() + Plan::kControlBytes + tensor * T::kStageBytes}; }
    // What undoes the scales of a tile's sequences, those of the filters included.
    DEVICE float* scales(int tile) const { return reinterpret_cast<float*>(control() + T::kEnergyBytes) + tile % Plan::kScaleSlots * 32; }
    // Of this tile and the next in turn, for the first and for the third group.
    DEVICE TileHeader& header(int group, int tile) const {
        return reinterpret_cast<TileHeader*>(control() + T::kEnergyBytes + Plan::kScaleSlots * 32 * 4)[2 * group + tile % 2];
    }
    DEVICE void fill_header(int group, int tile) const {
        if (warp == 0) header(group, tile).template fill<Element>(params, RegularSequences::consecutive<T>(params, tile * pairs_per_tile));
    }
    DEVICE TileSequences sequences(int tile) const { return TileSequences::consecutive(params, tile * pairs_per_tile, lane); }
    DEVICE int part_number(int tile, int part) const { return (tile - range.first) * T::kParts + part; }

    // The first group.
    DEVICE void pack() const {
        const Stager<T> stager{params, slots};
        const Stage<T> u = stage(0), pre{params.pre_gate.data ? stage(1).memory : nullptr};
        SequenceScales<T> sequence_scales{reinterpret_cast<float*>(control()), slots, 0, warp, lane};
        auto start_inputs = [&](int tile) {
            if (Plan::kStaged && tile < range.last) {
                stager.start(u, kU, header(0, tile), sequences(tile));
                if (pre) stager.start(pre, kPreGate, header(0, tile), sequences(tile));
            }
            copy_async_commit();
        };
        fill_header(0, range.first);
        named_barrier<256>(kPack);
        start_inputs(range.first);
        for (int tile = range.first; tile < range.last; tile++) {
            copy_async_wait<0>();
            named_barrier<256>(kPack);
            fill_header(0, tile + 1);
            const TileSequences current = sequences(tile);
            const float spectrum_scale = warp == 0 && current.valid ? params.spectrum_scale[current.channel] : 0.f;
            u32 x[T::kSlots / 4][4];
            if constexpr (Plan::kStaged)
                sequence_scales.template pack_scaled<false>(x, u, pre, current.valid);
            else
                sequence_scales.template pack_direct<false>(x, params.u, params.pre_gate, params, current);
            // Every thread has read its inputs (a barrier has passed): the next tile's may come.
            start_inputs(tile + 1);
            if (warp == 0) scales(tile)[lane] = current.valid ? spectrum_scale * sequence_scales.up : 0.f;
#pragma unroll 1
            for (int part = 0; part < T::kParts; part++) {
                const int number = part_number(tile, part), buffer = number % Plan::kBuffers;
                if (number >= Plan::kBuffers) named_barrier<512>(kEmpty + buffer);
                outer_forward<T>(x, rows(buffer), tables.outer, part, warp, lane);
                named_barrier_arrive<512>(kPacked + buffer);
            }
        }
    }

    // The second group. A warp's rows, part after part and tile after tile, are its steps.
    DEVICE void transform() const {
        const InnerConstants constants(InnerTables{tables.inner, lane});
        const int steps = part_number(range.last, 0) * Plan::kRowsPerWarp;
        uint4* const operands = reinterpret_cast<uint4*>(memory + Plan::kBuffers * T::kRowBytes) + warp * Plan::kAhead * Plan::kOperandVectors;
        // Every lane copies what it will read itself: nothing but its own wait is needed.
        auto start_operands = [&](int step) {
            const int number = step / Plan::kRowsPerWarp, row = number % T::kParts * T::kRows + warp + step % Plan::kRowsPerWarp * T::kWarps;
            const int channel = row_channel(number / T::kParts, row), k1 = row & (radix - 1), before = step - Plan::kAhead;
            const bool kept = Plan::kWide && before >= 0 && row_channel(before / Plan::kRowsPerWarp, row) == channel;
            if (step < steps && !kept) {
                uint4* const to = operands + step % Plan::kAhead * Plan::kOperandVectors + lane;
                const uint4* const spectrum = reinterpret_cast<const uint4*>(params.spectrum) + (int64_t(channel) * radix + k1) * 64 + lane;
                copy_async<16>(to, spectrum), copy_async<16>(to + 32, spectrum + 32);
                if (!Plan::kWide) copy_async<16>(to + 64, tables.twiddle + k1 * 64 + lane), copy_async<16>(to + 96, tables.twiddle + k1 * 64 + 32 + lane);
            }
            copy_async_commit();
        };
        for (int step = 0; step < Plan::kAhead; step++) start_operands(step);
#pragma unroll 1
        for (int number = 0; number < part_number(range.last, 0); number++) {
            const int buffer = number % Plan::kBuffers;
            uint4* const words = rows(buffer) + warp * (kRowPitch / 4);
            named_barrier<512>(kPacked + buffer);
#pragma unroll 1
            for (int i = 0; i < Plan::kRowsPerWarp; i++) {
                const int step = number * Plan::kRowsPerWarp + i;
                const uint4* const operand = operands + step % Plan::kAhead * Plan::kOperandVectors;
                uint4* const row = words + i * T::kWarps * (kRowPitch / 4);
                RowFragment value, spectrum, twiddles;
                value.load(row, lane);
                copy_async_wait<Plan::kAhead - 1>();
                spectrum.load(operand, lane);
                twiddles.load(Plan::kWide ? tables.twiddle + ((warp + i * T::kWarps) & (radix - 1)) * 64 : operand + 64, lane);
                value = inner_transform(value * twiddles, constants);
                value = inner_transform(conjugate_product(value, spectrum), constants) * twiddles;
                value.store(row, lane);
                start_operands(step + Plan::kAhead);
            }
            named_barrier_arrive<512>(kTransformed + buffer);
        }
        copy_async_wait<0>();
    }

    // The channel of the pair that a row of a tile belongs to; some channel if there is none.
    DEVICE int row_channel(int tile, int row) const {
        const int channel = params.pairs.divide((range.first + tile) * pairs_per_tile + (T::kMaxPairs == 1 ? 0 : row >> params.log_radix));
        return channel < params.channels ? channel : 0;
    }

    // The third group.
    DEVICE void store() const {
        const Stager<T> stager{params, slots};
        const Stage<T> post{Plan::kStaged && params.post_gate.data ? stage(2).memory : nullptr};
        auto start_post = [&](int tile) {
            if (post && tile < range.last) stager.start(post, kPostGate, header(1, tile), sequences(tile));
            copy_async_commit();
        };
        fill_header(1, range.first);
        named_barrier<256>(kStore);
        start_post(range.first);
        for (int tile = range.first; tile < range.last; tile++) {
            Result result;
            float scale = 0.f;
#pragma unroll 1
            for (int part = 0; part < T::kParts; part++) {
                const int number = part_number(tile, part), buffer = number % Plan::kBuffers;
                named_barrier<512>(kTransformed + buffer);
                result.add(rows(buffer), tables.outer_inverse, part, warp, lane);
                scale = scales(tile)[lane];
                if (number + Plan::kBuffers < part_number(range.last, 0)) named_barrier_arrive<512>(kEmpty + buffer);
            }
            copy_async_wait<0>();
            named_barrier<256>(kStore);
            fill_header(1, tile + 1);
            const TileHeader& current = header(1, tile);
            if (current.regular && post)
                store_regular<true>(result, current, post, scale);
            else if (current.regular && !params.post_gate.data)
                store_regular<false>(result, current, post, scale);
            else
                store_any(result, sequences(tile), post, scale);
            named_barrier<256>(kStore);
            start_post(tile + 1);
        }
    }

    // Gates and stores a tile of regular sequences; the gate is staged if kGated and absent if not. `scale` undoes the scales of the sequence that
    // a lane knows; the second sequence of a pair comes out conjugated.
    template <bool kGated>
    DEVICE void store_regular(const Result& result, const TileHeader& header, const Stage<T>& post, float scale) const {
        const int column = outer_column(warp, lane), slot = lane % 4;
#pragma unroll
        for (int c = 0; c < 2; c++) {
            if (c == 1 && !header.second) break;
            const int64_t second = c * params.output.batch_stride;
            Element* to = reinterpret_cast<Element*>(header.first[kOutput]) + second + column + (T::kMaxPairs == 1 ? slot * kColumns : 0);
            float factor = shuffle(scale, c) * (c == 0 ? 1.f : -1.f);
#pragma unroll
            for (int n = 0; n < Result::kTiles; n++) {
                const int at = slots.position(slot + 4 * n);
                if (T::kMaxPairs > 1) {
                    factor = shuffle(scale, 2 * slots.pair(slot + 4 * n) + c) * (c == 0 ? 1.f : -1.f);
                    to = reinterpret_cast<Element*>(header.first[kOutput] + slots.pair(slot + 4 * n) * header.pair_stride[kOutput]) + second + column + at;
                }
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    Pair y = result.columns(n, half, c);
                    y = {y.x * factor, y.y * factor};
                    if constexpr (kGated) {
                        const Pair gate = post.load(c, slot + 4 * n, column + 128 * half);
                        y = {y.x * gate.x, y.y * gate.y};
                    }
                    narrow_two_if(at + column + 128 * half < params.length, to + (T::kMaxPairs == 1 ? 4 * n * kColumns : 0) + 128 * half, y.x, y.y);
                }
            }
        }
    }

    // The same for any tile.
    DEVICE void store_any(const Result& result, const TileSequences& sequences, const Stage<T>& post, float scale) const {
        const int column = outer_column(warp, lane);
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
            for (int n = 0; n < Result::kTiles; n++) {
                const int slot = 4 * n + lane % 4, owner = 2 * slots.pair(slot) + c;
                const bool valid = shuffle(int(sequences.valid), owner);
                const float factor = shuffle(scale, owner) * (c == 0 ? 1.f : -1.f);
                Element* const to = sequences.address<Element>(params.output, owner);
                const Element* const gates = sequences.address<const Element>(params.post_gate, owner);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int at = column + 128 * half, position = slots.position(slot) + at;
                    if (!valid || position >= params.length) continue;
                    Pair y = result.columns(n, half, c), gate = {1.f, 1.f};
                    if (params.post_gate.data) gate = post ? post.load(c, slot, at) : load_global(gates, position, params.length, params.pair_aligned);
                    store_global(to, position, params.length, params.pair_aligned, y.x * factor * gate.x, y.y * factor * gate.y);
                }
            }
    }

    DEVICE void run() const {
        copy_async_wait<0>();
        block_barrier();
        switch (thread_index() / T::kThreads) {
            case 0: return pack();
            case 1: return transform();
            default: return store();
        }
    }
};

// The same as csrc/forward.cuh for sequences whose transform takes the shared memory of several blocks: a cluster of R = kCluster blocks works on a pair.
// And, with kGradients, the same as csrc/backward.cuh for these.
//
//   n = 256 n1 + p, n1 = R r + b,   f = k1 + 32 R (...), k1 = q + 32 s,   w_32R^(n1 (k1 + 1/4)) = w_32^(r (q + 1/4)) w_32R^(b (q + 1/4)) w_R^(b s)
//
// Block b contracts r, its own segments of 256 positions, by a matrix that has both factors without s. The rows q then pass through the cluster, each
// block receiving its own ones from all; it contracts b by a DFT of R points and has the rows k1 = q + 32 s of the whole transform. The way back
// is the same: a DFT of R points, rows that return to the blocks of their positions, a contraction of q. Rows travel from block to block as
// asynchronous stores that count for a barrier of the receiver; a receiver tells all blocks when its buffer is free.
//
// Of the three groups of warps, the first packs and sends, the second does the rows, the third contracts and stores. In clusters of two or four, the second
// also does the DFTs of R points, a warp having all R rows of one in registers, and sends the rows back. In larger ones the first does the DFTs of what has
// come of the pair before, and the third those on the way back.
//
// Longer causal sequences go in blocks, as in csrc/forward.cuh: a cluster works on the blocks of a pair one after the other, and its second group adds up
// the products of their transforms with the windows of the filter.
//
// For gradients every pair goes through all this twice: first pre_gate * u, for grad_post_gate, and then post_gate * grad_output, for the others. A warp of
// the second group keeps the rows of the first transform, where they came or else in global memory, until it has those of the second, and adds the products
// to the sums of the channel. The pairs of a channel, or of a part of it, are those of one cluster: the same bits every time.
#pragma once
#include "cluster_across.cuh"
#include "cluster_rows.cuh"
#include "tile_store.cuh"

template <class T, bool kGradients>
struct ClusterPass {
    static_assert(!kGradients || !T::kBlocked, "gradients of whole sequences");
    using Plan = ClusterPlan<T, kGradients>;
    using Control = typename Plan::Control;
    using TurnSums = typename Plan::TurnSums;
    using Tables = ::Tables<T, true>;
    using Result = OuterResult<T, typename Plan::Sums>;
    static constexpr int kRemoteBytes = (T::kCluster - 1) * T::kOwnRows * kRowUnits * 16;     // that come from other blocks
    using Across = AcrossBlocks<T>;
    using Vector = typename Across::Vector;
    enum Barrier { kPack = 1, kStore = 3, kReady = 4, kTransformed = kReady + Plan::kBuffers };
    static constexpr bool kTwoOutputs = T::kBlocked || kGradients;
    enum Group { kPacking, kTransforming, kStoring };
    const LaunchParams* const turns;    // of the pairs: two, for gradients; what is the same in both is `params`
    const LaunchParams& params;
    int lane, warp;
    const int rank;
    const Tables tables;
    char* const memory;

    DEVICE explicit ClusterPass(const LaunchParams* turns)
        : turns(turns), params(*turns), lane(thread_index() % 32), warp(thread_index() / 32 % T::kWarps), rank(cluster_rank()),
          tables(params.tables, shared_memory()), memory(shared_memory() + Tables::kSharedBytes) {}

    DEVICE uint4* rows(int buffer) const { return reinterpret_cast<uint4*>(memory + buffer * T::kRowBytes); }
    DEVICE uint4* returned_rows(int output) const { return rows(Plan::kBuffers + output % Plan::kReturnBuffers); }
    // Of this lane for its warp's first row or step; those of all warps for the next ones follow.
    DEVICE uint4* operands() const { return rows(Plan::kBuffers + Plan::kReturnBuffers) + warp * Plan::kOperandVectors + lane; }
    DEVICE char* control_memory() const { return memory + (Plan::kBuffers + Plan::kReturnBuffers) * T::kRowBytes + Plan::kOperandBytes; }
    DEVICE Control& control() const { return *reinterpret_cast<Control*>(control_memory()); }
    // Of an input, its gate and the gate of an output, where there are such.
    DEVICE Stage<T> stage(int place, bool wanted = true) const { return {Plan::kStaged && wanted ? control_memory() + Plan::kControlBytes + place * T::kStageBytes : nullptr}; }
    DEVICE Stager<T> stager(int tile) const { return {tensors(tile), fresh_thread_index()}; }
    DEVICE float* scales(int tile) const { return control().scales[tile % Plan::kScaleSlots]; }
    DEVICE TileHeader& header(int group, int tile) const { return control().headers[group][tile % 2u]; }
    // The block's tiles, and how many of them a group has done. They stay in shared memory: what registers have no room for the compiler would park in
    // local memory, as far as the L2 cache.
    DEVICE volatile const WorkRange& range() const { return control().range; }
    DEVICE volatile int& done(Group group) {
        forget(lane), forget(warp);
        return control().done[group][warp * 32 + lane];
    }
    DEVICE int tile(Group group, int ahead = 0) { return range().first + done(group) + ahead; }
    DEVICE int first() const { return T::kBlocked ? control().blocked.first : 0; }
    // A tile is a pair or, of blocked sequences, a block of one or, for gradients, one of the two turns of a pair; nobody may want the first.
    DEVICE bool second_turn(int tile) const { return kGradients && (tile & params.log_turns) == params.log_turns; }
    // The tensors of a tile.
    DEVICE const LaunchParams& tensors(int tile) const { return turns[second_turn(tile)]; }
    // How many of the first tiles have outputs.
    DEVICE int outputs(int tiles) const {
        if (!kGradients || params.log_turns == 0 || (turns[0].output.data && turns[1].output.data)) return tiles;
        return (tiles + (turns[0].output.data ? 1 : 0)) / 2;
    }
    DEVICE int own_pair(int i) const { return control().blocked.pairs[i]; }
    DEVICE TilePlace place(int tile) const {
        if constexpr (!T::kBlocked) return {tile, 0};
        const int own = params.blocks.divide(tile - first());
        return {own, tile - first() - own * params.blocks.divisor};
    }
    DEVICE int pair(int tile) const { return T::kBlocked ? own_pair(place(tile).index) : kGradients ? tile >> params.log_turns : tile; }
    DEVICE int start(int tile) const { return place(tile).template start<T>(params) + rank * kColumns; }
    DEVICE void fill_header(int group, int tile) const {
        if (warp == 0) header(group, tile).template fill<typename T::Element>(tensors(tile), RegularSequences::consecutive<T>(params, pair(tile)), lane, start(tile));
    }
    DEVICE TileSequences sequences(int tile) const { return TileSequences::consecutive<T>(params, pair(tile), lane, start(tile)); }
    DEVICE int row_vector(int own) const { return cluster_row<T>(rank, own) * 64 + lane; }
    DEVICE int channel_of(int pair) const {
        const int channel = params.pairs.divide(pair);
        return channel < params.channels ? channel : 0;
    }

    // The first group. A sequence gets one scale from those that the blocks find for their parts; a blocked one that of csrc/block_scale.cuh.
    DEVICE void pack() {
        auto start_inputs = [&](int ahead) {
            if (const int next = tile(kPacking, ahead); Plan::kStaged && next < range().last)
                stager(next).start(header(0, next), [&] { return sequences(tile(kPacking, ahead)); }, stage(0), kU, stage(1, tensors(next).pre_gate.data), kPreGate);
            copy_async_commit();
        };
        done(kPacking) = first();
        if constexpr (T::kBlocked) block_scales().start(whole_row(tile(kPacking)));
        fill_header(0, range().first + first());
        named_barrier<256>(kPack);
        start_inputs(0);
#pragma unroll 1
        for (;; done(kPacking) = done(kPacking) + 1) {
            if (tile(kPacking) == range().last) {
                transform_last_across();
                break;
            }
            copy_async_wait<0>();
            named_barrier<256>(kPack);
            fill_header(0, tile(kPacking, 1));
            u32 x[T::kSlots / 4][4];
            SequenceScales<T> sequence_scales{control().energies, 0, warp, lane};
            auto current = [&] { return sequences(tile(kPacking)); };
            const LaunchParams& in = tensors(tile(kPacking));
            const Stage<T> u = stage(0), gate = stage(1, in.pre_gate.data);
            if constexpr (T::kBlocked) {
                const BlockScale scale = scale_of_block();
                if constexpr (Plan::kStaged)
                    sequence_scales.pack_known(x, u, gate, scale);
                else
                    sequence_scales.known_direct(x, params.u, params.pre_gate, params, current(), scale);
                note_block(sequence_scales.mean_square());
                start_inputs(1);
                transform_last_across();
                send(x, done(kPacking));
                end_block();
                continue;
            }
            if constexpr (Plan::kStaged)
                sequence_scales.pack_measured(x, u, gate, current().valid, kGradients);
            else
                sequence_scales.measure_direct(x, in.u, in.pre_gate, params, current(), kGradients);
            const u32 own = bits_from_float(sequence_scales.up);
            if (warp == 0) control().scale_words.send(done(kPacking), shuffle(own, 0), lane);
            // Every thread has read its inputs (a barrier has passed): the next pair's may come.
            start_inputs(1);
            transform_last_across();
            const float up = control().scale_words.root_mean_square(done(kPacking), lane);
            const int down = int(own >> 23) - int(bits_from_float(up) >> 23) - sequence_scales.root;
            sequence_scales.apply(x, down < -30 ? -30 : down);
            if (warp == 0) {
                const int own = tile(kPacking);
                scales(own)[lane] = undo_of(current(), up);
                if (kGradients && lane == 0) sums_of(own) = own_sums(own, up);
            }
            send(x, done(kPacking));
        }
    }

    // Of the gradients of taps. The pairs of a channel are dealt to splits.
    DEVICE TurnSums& sums_of(int tile) const { return control().sums[tile % Plan::kScaleSlots]; }
    DEVICE TurnSums own_sums(int tile, float scale) const {
        const int own = pair(tile), channel = params.pairs.divide(own), in_channel = own - channel * params.pairs.divisor, split = params.tiles_per_split.divide(in_channel);
        return {scale, channel * params.splits.divisor + split, in_channel == split * params.tiles_per_split.divisor};
    }

    // What undoes the scale of this lane's sequence and its filter's.
    DEVICE float undo_of(const TileSequences& sequences, float up) const {
        return sequences.valid ? params.spectrum_scale[sequences.channel] * up : 0.f;
    }

    // Of blocked sequences: every block samples the whole of them, and all come to the same scale.
    DEVICE BlockScales<T> block_scales() const { return {params, control().energies, 0, warp, lane}; }
    DEVICE TileSequences whole_row(int tile) const { return TileSequences::whole(params, pair(tile)); }
    DEVICE BlockScale scale_of_block() {
        const int own = tile(kPacking);
        BlockScale scale;
        if (place(own).step > 0) {
            scale = control().blocked.scale;
        } else {
            const TileSequences whole = whole_row(own);
            scale = control().blocked.pairs.list ? block_scales().from_all(whole) : block_scales().from_samples(whole);
            if (params.transforms && rank == 0 && thread_index() == 0) params.pair_scales[pair(own)] = scale.up;
            if (thread_index() == 0) control().blocked.scale = scale, control().blocked.largest = 0.f;
        }
        if (warp == 0) scales(own)[lane] = undo_of(whole_row(own), scale.up);
        return scale;
    }

    // Notes the mean square of a block's part of a row, and tells the other blocks of the largest.
    DEVICE void note_block(float mean_square) {
        if (warp != 0) return;
        auto& own = control().blocked;
        if (lane == 0) own.largest = larger_or_nan(own.largest, mean_square);
        warp_barrier();
        const int now = tile(kPacking);
        if (ends_pair(now) && !own.pairs.list) control().scale_words.send(place(now).index, bits_from_float(own.largest), lane);
    }
    DEVICE bool ends_pair(int tile) const { return place(tile).step + 1 == params.blocks.divisor; }

    // Where a pair ends: lists it if its blocks do not fit its scale.
    DEVICE void end_block() {
        const int now = tile(kPacking);
        if (!ends_pair(now)) return;
        if (now + 1 < range().last) block_scales().start(whole_row(now + 1));
        if (control().blocked.pairs.list) return;
        const bool fits = BlockScales<T>::fits(control().scale_words.largest(place(now).index, lane));
        if (!fits && thread_index() == 0) misfit_list()[control().blocked.misfits++] = place(now).index;
    }
    // Each block keeps a list of its own, and all are the same.
    DEVICE int* misfit_list() const {
        uint4* const ring_end = static_cast<uint4*>(params.scratch) + int64_t(OwnPairs<T>::workers()) * params.windows * kBlockVectors<T>;
        return reinterpret_cast<int*>(ring_end) + int64_t(block_index()) * (params.pairs.divisor * params.channels / OwnPairs<T>::workers() + 1);
    }

    // Sends a pair's rows to their blocks, part by part.
    DEVICE void send(const u32 (&x)[T::kSlots / 4][4], int number) const {
        constexpr int kEights = T::kRows / 8 / Plan::kParts;       // of rows, in a part
        const u32 buffer = Plan::buffer(number), round = Plan::round(number);
        const int first = rank * T::kOwnRows;       // where they have this block's rows
        // Rows four apart have their units in the same places.
        const int slot = lane % 4, there = first + slot % T::kOwnRows;
        uint4* const units = rows(buffer) + there * kRowUnits + row_unit(there, warp, lane);
#pragma unroll
        for (int part = 0; part < Plan::kParts; part++) {
            TransactionBarrier* const came = &control().rows_came[buffer][part];
            if (round > 0) barrier_wait(&control().rows_free[buffer][part], (round - 1) % 2);
#pragma unroll
            for (int i = 0; i < kEights; i++) {
                const int eight = i * Plan::kParts + part;
                contract<T::kSlots>(x, tables.outer + eight * (T::kSlots / 8) * 32, 2, lane, [&](int n, const SingleSums (&d)[2]) {
                    const int row = 8 * eight + 4 * n;
                    store_in_cluster(row / T::kOwnRows + slot / T::kOwnRows, rank, units + row % T::kOwnRows * kRowUnits, packed(d), came);
                });
            }
            warp_barrier();
            if (lane == 0) barrier_expect(came, kRemoteBytes / Plan::kParts / T::kWarps);
        }
    }

    // From the rows of the pair before, which have come, to those of the whole transform, in place.
    DEVICE void transform_last_across() {
        const int number = done(kPacking) - 1, buffer = Plan::buffer(number);
        if (Plan::kInRegisters || number < first()) return;
        barrier_wait(control().rows_came[buffer], Plan::round(number) % 2);
        Across::transform(rows(buffer), warp, lane, [&](int s, int own, int at, Vector v) { *Across::vector_of(rows(buffer), s * T::kOwnRows + own, at) = v; });
        named_barrier_arrive<512>(kReady + buffer);
    }

    // Of the rows of an output, by how many have gone before: the barriers of those that come back to a block, the wait for room, and what follows the stores.
    DEVICE TransactionBarrier* returned(int output) const { return control().returned + output % Plan::kReturnBuffers; }
    DEVICE TransactionBarrier* return_free(int output) const { return control().return_free + output % Plan::kReturnBuffers; }
    DEVICE void wait_for_return(int output) const {
        if (const u32 round = output / Plan::kReturnBuffers; round > 0) barrier_wait(return_free(output), (round - 1) % 2);
    }
    DEVICE void has_returned(int output) const {
        warp_barrier();
        if (lane == 0) barrier_expect(returned(output), kRemoteBytes / T::kWarps);
    }

    // The way back, to the blocks of the positions.
    DEVICE void return_rows(int number) const {
        const int buffer = Plan::buffer(number), before = outputs(number);
        named_barrier<512>(kTransformed + buffer);
        if (tensors(range().first + number).output.data) {
            wait_for_return(before);
            Across::transform(rows(buffer), warp, lane, [&](int b, int own, int at, Vector v) {
                store_in_cluster(b, rank, Across::vector_of(returned_rows(before), rank * T::kOwnRows + own, at), v, returned(before));
            });
            has_returned(before);
        }
        named_barrier<256>(kStore);
        if (warp == 0 && lane < T::kCluster) barrier_arrive(lane, control().rows_free[buffer]);
    }

    // The third group: while the second works on a pair, stores the one before.
    DEVICE void store() {
        auto gate_stage = [&](int tile) { return stage(2, tensors(tile).output.data && tensors(tile).post_gate.data); };
        auto start_gate = [&] {
            if (const int next = tile(kStoring); next < range().last && gate_stage(next))
                stager(next).start(header(1, next), [&] { return sequences(tile(kStoring)); }, stage(2), kPostGate);
            copy_async_commit();
        };
        done(kStoring) = first();
        fill_header(1, range().first + first());
        named_barrier<256>(kStore);
        start_gate();
#pragma unroll 1
        for (;;) {
            const int number = done(kStoring), stored = tile(kStoring, -1);
            if (number > first() && tensors(stored).output.data) {
                const int output = outputs(number - 1);
                barrier_wait(returned(output), output / Plan::kReturnBuffers % 2u);
                Result result;
                result.add(returned_rows(output), tables.outer_inverse, warp, lane);
                const float scale = scales(stored)[lane];
                copy_async_wait<0>();
                named_barrier<256>(kStore);
                auto all = [&] { return sequences(tile(kStoring, -1)); };
                auto leave_rows = [&] {
                    if (warp == 0 && lane < T::kCluster) barrier_arrive(lane, return_free(output));
                };
                // The second gate comes to where the rows were or, if the second group waits for room there, to where the first gate was.
                const bool two = kTwoOutputs && Plan::kStaged && tensors(stored).second_output.data;
                const Stage<T> second{!two ? nullptr : Plan::kStay ? stage(2).memory : reinterpret_cast<char*>(returned_rows(output))};
                auto start_second_gate = [&] {
                    if (second) stager(stored).start(header(1, stored), all, second, kSecondGate);
                    copy_async_commit();
                };
                if (Plan::kStay || !second) leave_rows();
                if (!Plan::kStay) start_second_gate();
                fill_header(1, stored + 1);
                const TileStore<T, Result, kTwoOutputs> out{tensors(stored), warp, lane};
                out.store(result, header(1, stored), gate_stage(stored), second, scale, kStore, [&] {
                    if (!Plan::kStay) return;
                    named_barrier<256>(kStore);
                    start_second_gate();
                }, all);
                if (!Plan::kStay && second) leave_rows();
                start_gate();
            } else if (kGradients && number > first()) {
                fill_header(1, stored + 1);
                named_barrier<256>(kStore);
                start_gate();
            }
            if (tile(kStoring) >= range().last) break;
            if constexpr (!Plan::kInRegisters) return_rows(done(kStoring));
            done(kStoring) = done(kStoring) + 1;
        }
        copy_async_wait<0>();
    }

    DEVICE void run() {
        if (thread_index() == 0) {
            if constexpr (T::kBlocked)
                control().range = {0, 0}, control().blocked.misfits = 0, start_round(OwnPairs<T>(params));
            else
                control().range = tile_range();
            control().scale_words.start();
            for (auto& buffer : control().rows_came)
                for (TransactionBarrier& part : buffer) barrier_start(&part, T::kWarps);
            for (auto& buffer : control().rows_free)
                for (TransactionBarrier& part : buffer) barrier_start(&part, Plan::kInRegisters ? T::kCluster * T::kWarps : T::kCluster);
            for (u32 i = 0; i < Plan::kReturnBuffers; i++) barrier_start(control().returned + i, T::kWarps), barrier_start(control().return_free + i, T::kCluster);
        }
        copy_async_wait<0>();
        cluster_barrier();
#pragma unroll 1
        for (bool ends = !T::kBlocked;; ends = true) {
            switch (thread_index() / T::kThreads) {
                case kPacking:
                    own_registers<Plan::registers(kPacking), Plan::kRegisters>();
                    pack();
                    break;
                case kTransforming:
                    own_registers<Plan::registers(kTransforming), Plan::kRegisters>();
                    ClusterRows<T, kGradients, ClusterPass>{*this}.run();
                    break;
                default:
                    own_registers<Plan::registers(kStoring), Plan::kRegisters>();
                    store();
            }
            // Until all have read what others had for them.
            cluster_barrier();
            if (!T::kBlocked || ends || control().blocked.misfits == 0) return;
            if (thread_index() == 0) start_round({control().blocked.misfits, misfit_list()});
            cluster_barrier();
        }
    }

    // Of whole sequences.
    DEVICE WorkRange tile_range() const {
        if constexpr (!kGradients) return work_range(tile_count<T>(params), T::kCluster);
        const WorkRange units = work_range(params.channels * params.splits.divisor, T::kCluster);
        auto first_tile = [&](int unit) {
            const int channel = params.splits.divide(unit), in_channel = (unit - channel * params.splits.divisor) * params.tiles_per_split.divisor;
            return (channel * params.pairs.divisor + in_channel) << params.log_turns;
        };
        return {first_tile(units.first), first_tile(units.last)};
    }

    // Of blocked sequences, by one thread. Tiles are counted on.
    DEVICE void start_round(OwnPairs<T> pairs) const {
        control().blocked.pairs = pairs, control().blocked.first = control().range.last;
        control().range.last += pairs.count * params.blocks.divisor;
    }
};

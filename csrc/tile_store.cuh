// A tile's results on their way out: gates and stores.
#pragma once
#include "tile_io.cuh"
#include "transform.cuh"

// kTwoOutputs: if wanted, one result comes out by two gates.
template <class T, class Result, bool kTwoOutputs>
struct TileStore {
    using Element = typename T::Element;
    const LaunchParams& params;
    int warp, lane;

    // Gates and stores a tile. `stage` holds the gate if there is one and it is staged; `scale` undoes the scales of the sequence that a lane knows;
    // the second sequence of a pair comes out negative. Where there is a second output, its gate is on its way to `second_stage` after
    // start_second_gate(). All warps of a group, which has passed its `barrier` at the end; sequences() tells of tiles that are not regular.
    template <class Start, class Sequences>
    DEVICE void store(const Result& result, const TileHeader& header, const Stage<T>& stage, const Stage<T>& second_stage, float scale, int barrier, Start start_second_gate,
                      Sequences sequences) const {
        store_one(result, header, kOutput, kPostGate, stage, scale, sequences);
        if (kTwoOutputs && params.second_output.data) {
            start_second_gate();
            copy_async_wait<0>();
            named_barrier<256>(barrier);
            store_one(result, header, kSecondOutput, kSecondGate, second_stage, scale, sequences);
        }
        named_barrier<256>(barrier);
    }

private:
    template <class Sequences>
    DEVICE void store_one(const Result& result, const TileHeader& header, TensorIndex output, TensorIndex gate, const Stage<T>& stage, float scale, Sequences sequences) const {
        const bool gated = (&params.u)[gate].data;
        if (header.regular && stage)
            store_regular<true>(result, header, output, stage, scale);
        else if (header.regular && !gated)
            store_regular<false>(result, header, output, stage, scale);
        else
            store_any(params, result, sequences(), output, gate, stage, scale);
    }

    template <bool kGated>
    DEVICE void store_regular(const Result& result, const TileHeader& header, TensorIndex output, const Stage<T>& stage, float scale) const {
        // Not what the other output or another tile has found out: it would be parked until then.
        const int warp = fresh_thread_index() / 32, lane = fresh_thread_index() % 32;
        const int column = outer_column(warp, lane), slot = lane % 4;
#pragma unroll
        for (int i = 0; i < T::kLanePairs; i++) {
            const int pair = T::slot_pair(slot + 4 * i), first = T::slot_position(slot + 4 * i) + column;
            Element* const to = reinterpret_cast<Element*>(header.first[output] + pair * header.pair_stride[output]) + first;
            const float first_scale = shuffle(scale, 2 * pair);
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int length = header.length - c * T::kSecondStart;
                if (c == 1 && !(header.second && length > 0)) break;
                // Second sequences have come out negative.
                const float factor = c == 0 ? first_scale : T::kFolded ? -first_scale : -shuffle(scale, 2 * pair + 1);
#pragma unroll
                for (int m = 0; m < T::kLaneSlots; m++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const int n = i + m * T::kLanePairs, further = T::lane_position(m) + 128 * half;
                        Pair y = result.columns(n, half, c);
                        y = {y.x * factor, y.y * factor};
                        if constexpr (kGated) {
                            const Pair gate = stage.load(c, n, slot, column + 128 * half);
                            y = {y.x * gate.x, y.y * gate.y};
                        }
                        narrow_two_if<T::kBlocked>(first + further < length, to + c * T::second_offset((&params.u)[output]) + further, y.x, y.y);
                    }
            }
        }
    }

    RARE void store_any(const LaunchParams& params, Result result, TileSequences sequences, TensorIndex output_index, TensorIndex gate_index, Stage<T> stage, float scale) {
        const fft_conv_tensor &output = (&params.u)[output_index], &gate = (&params.u)[gate_index];
        const int lane = thread_index() % 32, column = outer_column(thread_index() / 32, lane);
#pragma unroll
        for (int c = 0; c < 2; c++)
#pragma unroll
            for (int n = 0; n < Result::kTiles; n++) {
                const int slot = 4 * n + lane % 4, owner = 2 * T::slot_pair(slot) + c;
                const int length = sequences.length_of(owner);
                const float factor = shuffle(scale, owner) * (c == 0 ? 1.f : -1.f);
                Element* const to = sequences.address<Element>(output, owner);
                const Element* const gates = sequences.address<const Element>(gate, owner);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int at = column + 128 * half, position = T::slot_position(slot) + at;
                    if (position >= length) continue;
                    Pair y = result.columns(n, half, c), by = {1.f, 1.f};
                    if (gate.data) by = stage ? stage.load(c, n, lane % 4, at) : load_global(gates, position, length, params.pair_aligned);
                    store_global(to, position, length, params.pair_aligned, y.x * factor * by.x, y.y * factor * by.y);
                }
            }
    }
};

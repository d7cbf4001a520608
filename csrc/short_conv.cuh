// The short depthwise causal convolution in front of the gates, forward and backward, alone or as three of which two are multiplied.
#pragma once
#include "short_tile.cuh"

// kCount neighbouring elements of 16-byte aligned memory.
template <int kCount, class Element>
DEVICE void read_run(float (&x)[kCount], const Element* p) {
    constexpr int kVector = 16 / int(sizeof(Element));
#pragma unroll
    for (int i = 0; i < kCount / kVector; i++) {
        const uint4 v = reinterpret_cast<const uint4*>(p)[i];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if constexpr (sizeof(Element) == 2) {
                const Pair pair = widen(p, word_of(v, j));
                x[8 * i + 2 * j] = pair.x, x[8 * i + 2 * j + 1] = pair.y;
            } else {
                x[4 * i + j] = float_from_bits(word_of(v, j));
            }
        }
    }
}

template <class Element>
DEVICE void write_run(Element* p, const float (&x)[kShortRun]) {
    constexpr int kWords = kShortRun * int(sizeof(Element)) / 4;
    u32 words[kWords];
#pragma unroll
    for (int i = 0; i < kShortRun; i += 2) narrow_two(reinterpret_cast<Element*>(words) + i, x[i], x[i + 1]);
#pragma unroll
    for (int i = 0; i < kWords; i += 4)
        reinterpret_cast<uint4*>(p)[i / 4] = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
}

DEVICE float load_any(const void* p, int element, int64_t i) {
    if (element == FFT_CONV_BFLOAT16) return widen_one(static_cast<const bfloat16*>(p)[i]);
    if (element == FFT_CONV_FLOAT16) return widen_one(static_cast<const float16*>(p)[i]);
    return static_cast<const float*>(p)[i];
}

// One channel's filter: the weight of a lag, and the offset.
template <int kTaps>
struct ShortFilter {
    float lag[kTaps], offset;

    DEVICE void load(const ShortParams& p, int64_t channel) {
#pragma unroll
        for (int s = 0; s < kTaps; s++)
            lag[s] = channel >= 0 && s < p.taps ? load_any(p.weight, p.weight_element, channel * p.taps + p.taps - 1 - s) : 0.f;
        offset = channel >= 0 && p.bias ? load_any(p.bias, p.bias_element, channel) : 0.f;
    }

    // y[i] from x, which starts kShortHalo positions earlier. Lags beyond the filter are left out: what is there need not be finite.
    template <int kCount>
    DEVICE void convolve(float (&y)[kCount], const float (&x)[kCount + kShortHalo], int taps) const {
#pragma unroll
        for (int i = 0; i < kCount; i++) {
            y[i] = offset;
#pragma unroll
            for (int s = 0; s < kTaps; s++)
                if (s < taps) y[i] += lag[s] * x[kShortHalo + i - s];
        }
    }
};

// The tiles of a block: one tile of channels, and a part of all batch rows and positions.
template <class Element, bool kGated, int kTaps>
struct ShortTiles {
    static constexpr int kInputs = kGated ? 3 : 1, kOutputs = kGated ? 2 : 1;
    static constexpr int kColumns = kShortTimes / kShortRun;

    const ShortParams& params;
    const int row = thread_index() / kColumns, run = thread_index() % kColumns * kShortRun;
    int first_channel, channels;
    ShortFilter<kTaps> filters[kInputs];

    DEVICE explicit ShortTiles(const ShortParams& p) : params(p) {}

    DEVICE int64_t input_channel(int i) const { return int64_t(kGated ? params.thirds[i] : 0) * params.channels + first_channel; }

    // Calls tile(batch, time) for the tiles of every unit of work of this block, and finish(split) after each unit.
    template <class Function, class Finish>
    DEVICE void each(Function tile, Finish finish) {
        for (int unit = block_index(); unit < params.units; unit += block_count()) {
            const int split = unit / params.channel_tiles;
            first_channel = unit % params.channel_tiles * kShortChannels;
            channels = params.channels - first_channel;
            for (int i = 0; i < kInputs; i++) filters[i].load(params, row < channels ? input_channel(i) + row : -1);
            const int64_t first = split * params.tiles_per_split, all = int64_t(params.batch) * params.time_tiles;
            const int64_t last = first + params.tiles_per_split < all ? first + params.tiles_per_split : all;
            int batch = int(first / params.time_tiles), column = int(first % params.time_tiles);
            for (int64_t i = first; i < last; i++) {
                tile(batch, column * kShortTimes);
                if (++column == params.time_tiles) column = 0, batch++;
            }
            finish(split);
        }
    }
};

template <class Element, bool kGated>
struct ShortForwardPlan {
    using Plane = ShortPlane<Element, kShortHalo, kShortHalo + kShortTimes>;
    static constexpr int kSharedBytes = (kGated ? 3 : 1) * Plane::kElements * int(sizeof(Element));
};

template <class Element, bool kGated, int kTaps>
DEVICE void short_forward(const ShortParams& params) {
    using Plane = typename ShortForwardPlan<Element, kGated>::Plane;
    ShortTiles<Element, kGated, kTaps> tiles(params);
    Element* const memory = reinterpret_cast<Element*>(shared_memory());
    const auto plane = [&](int i) { return Plane{memory + i * Plane::kElements}; };

    const auto result = [&](float (&y)[kShortRun], int i) {
        float x[kShortHalo + kShortRun];
        read_run(x, plane(i).at(tiles.row, tiles.run));
        tiles.filters[i].convolve(y, x, params.taps);
    };
    const auto store = [&](int output, int batch, int time, const float (&y)[kShortRun]) {
        const ShortView& view = params.outputs[output];
        if (tiles.row >= tiles.channels) return;
        const int64_t row = batch * view.batch_stride + (tiles.first_channel + tiles.row) * view.channel_stride;
        Element* to = reinterpret_cast<Element*>(view.data) + row + time + tiles.run;
        const int left = params.length - time - tiles.run;
        if (view.aligned && left >= kShortRun)
            write_run(to, y);
        else
            for (int i = 0; i < kShortRun; i++)
                if (i < left) narrow_one(to + i, y[i]);
    };

    const auto tile = [&](int batch, int time) {
        for (int i = 0; i < tiles.kInputs; i++) {
            const Plane p = plane(i);
            p.load(p.place(params.input, batch, tiles.input_channel(i), tiles.channels, time, params.taps - 1, params.length));
        }
        block_barrier();
        float y[kShortRun];
        result(y, 0);
        store(0, batch, time, y);
        if constexpr (kGated) {
            float factor[kShortRun];
            result(y, 1);
            result(factor, 2);
#pragma unroll
            for (int i = 0; i < kShortRun; i++) y[i] *= factor[i];
            store(1, batch, time, y);
        }
        block_barrier();
    };
    tiles.each(tile, [](int) {});
}

template <class Element, bool kGated>
struct ShortBackwardPlan {
    using Plane = ShortPlane<Element, kShortHalo, 2 * kShortHalo + kShortTimes>;
    using GradientPlane = ShortPlane<Element, 0, kShortTimes + kShortHalo>;
    static constexpr int kSharedBytes = ((kGated ? 3 : 1) * Plane::kElements + (kGated ? 2 : 1) * GradientPlane::kElements) * int(sizeof(Element));
};

template <class Element, bool kGated, int kTaps>
DEVICE void short_backward(const ShortParams& params) {
    using Plan = ShortBackwardPlan<Element, kGated>;
    using Plane = typename Plan::Plane;
    using GradientPlane = typename Plan::GradientPlane;
    constexpr int kInputs = kGated ? 3 : 1, kReach = kShortRun + kShortHalo;
    ShortTiles<Element, kGated, kTaps> tiles(params);
    Element* const memory = reinterpret_cast<Element*>(shared_memory());
    const auto plane = [&](int i) { return Plane{memory + i * Plane::kElements}; };
    const auto gradient = [&](int i) { return GradientPlane{memory + kInputs * Plane::kElements + i * GradientPlane::kElements}; };
    const int taps = params.taps;

    float sums[kInputs][kTaps + 1];
    const auto clear = [&] {
        for (auto& column : sums)
            for (float& sum : column) sum = 0.f;
    };
    clear();

    const auto tile = [&](int batch, int time) {
        for (int i = 0; i < kInputs; i++) {
            const Plane p = plane(i);
            p.load(p.place(params.input, batch, tiles.input_channel(i), tiles.channels, time, taps - 1, params.length));
        }
        for (int i = 0; i < tiles.kOutputs; i++) {
            const GradientPlane p = gradient(i);
            p.load(p.place(params.outputs[i], batch, tiles.first_channel, tiles.channels, time, taps - 1, params.length));
        }
        block_barrier();
        float dz[kInputs][kShortRun];
#pragma unroll
        for (int i = 0; i < kInputs; i++) {
            // The gradient of this convolution's output at the run's positions and at those that the run reaches.
            float dy[kReach];
            read_run(dy, gradient(i > 0).at(tiles.row, tiles.run));
            if (i > 0) {
                float x[kReach + kShortHalo], factor[kReach];
                read_run(x, plane(kInputs - i).at(tiles.row, tiles.run));
                tiles.filters[kInputs - i].convolve(factor, x, taps);
#pragma unroll
                for (int j = 0; j < kReach; j++) dy[j] *= factor[j];
            }
            float x[kShortHalo + kShortRun];
            read_run(x, plane(i).at(tiles.row, tiles.run));
#pragma unroll
            for (int j = 0; j < kShortRun; j++) {
                dz[i][j] = 0.f;
                sums[i][kTaps] += dy[j];
#pragma unroll
                for (int s = 0; s < kTaps; s++)
                    if (s < taps) {
                        dz[i][j] += tiles.filters[i].lag[s] * dy[j + s];
                        sums[i][s] += dy[j] * x[kShortHalo + j - s];
                    }
            }
        }
        block_barrier();
#pragma unroll
        for (int i = 0; i < kInputs; i++) write_run(plane(i).at(tiles.row, kShortHalo + tiles.run), dz[i]);
        block_barrier();
        for (int i = 0; i < kInputs; i++) {
            const Plane p = plane(i);
            p.store(p.place(params.input_gradient, batch, tiles.input_channel(i), tiles.channels, time, taps - 1, params.length));
        }
        block_barrier();
    };

    // The threads of a row add up in a fixed order; the splits are added by the caller.
    const auto finish = [&](int split) {
        for (int i = 0; i < kInputs; i++) {
            const int64_t channel = split * int64_t(kInputs) * params.channels + tiles.input_channel(i) + tiles.row;
#pragma unroll
            for (int s = 0; s <= kTaps; s++) {
                float sum = sums[i][s];
                for (int mask = 1; mask < tiles.kColumns; mask *= 2) sum += shuffle_xor(sum, mask);
                if (tiles.run != 0 || tiles.row >= tiles.channels) continue;
                if (s == kTaps) params.grad_filter[channel * (taps + 1) + taps] = sum;
                else if (s < taps) params.grad_filter[channel * (taps + 1) + taps - 1 - s] = sum;
            }
        }
        clear();
    };
    tiles.each(tile, finish);
}

template <class Element, bool kGated, int kTaps>
struct ShortLauncher {
    static int forward(const ShortParams& params, void* stream);
    static int backward(const ShortParams& params, void* stream);
};

// The short depthwise causal convolution in front of the gates, forward and backward, alone or as three of which two are multiplied.
#pragma once
#include "short_tile.cuh"

// The bits of a number of any type, and their value: apart, so that no load waits for the one before.
DEVICE u32 load_any(const void* p, int element, int64_t i) {
    return element == FFT_CONV_FLOAT32 ? static_cast<const u32*>(p)[i] : static_cast<const uint16_t*>(p)[i];
}
DEVICE float widen_any(u32 bits, int element) {
    return element == FFT_CONV_FLOAT32 ? float_from_bits(bits) : element == FFT_CONV_BFLOAT16 ? float_from_bits(bits << 16) : low_half(bits);
}

// One channel's filter: the weight of a lag, and the offset.
template <int kTaps>
struct ShortFilter {
    float lag[kTaps], offset;

    DEVICE void load(const ShortParams& p, int64_t channel) {
#pragma unroll
        for (int s = 0; s < kTaps; s++)
            lag[s] = float_from_bits(channel >= 0 && s < p.taps ? load_any(p.weight, p.weight_element, channel * p.taps + p.taps - 1 - s) : 0);
        offset = float_from_bits(channel >= 0 && p.bias ? load_any(p.bias, p.bias_element, channel) : 0);
    }

    DEVICE void widen(const ShortParams& p) {
#pragma unroll
        for (int s = 0; s < kTaps; s++) lag[s] = widen_any(bits_from_float(lag[s]), p.weight_element);
        offset = widen_any(bits_from_float(offset), p.bias_element);
    }

    // y[i] from x, which starts kBefore positions earlier. Lags beyond the filter are left out: what is there need not be finite.
    template <int kBefore, int kCount, int kLength>
    DEVICE void convolve(float (&y)[kCount], const float (&x)[kLength], int taps) const {
#pragma unroll
        for (int i = 0; i < kCount; i++) {
            y[i] = offset;
#pragma unroll
            for (int s = 0; s < kTaps; s++)
                if (s < taps) y[i] += lag[s] * x[kBefore + i - s];
        }
    }
};

// What the threads work on: one tile of channels, and a part of all batch rows and positions, along which they walk.
template <class Element, bool kGated, int kTaps>
struct ShortTiles {
    static constexpr int kInputs = kGated ? 3 : 1, kOutputs = kGated ? 2 : 1, kPack = kShortPack<Element>;
    // A whole number of eight bytes, which are read at a time.
    static constexpr int kHalo = kTaps <= 5 ? 4 : 8;

    const ShortParams& params;
    const int warp = thread_index() / 32, run = warp / kShortChannelWarps * kShortRuns + thread_index() % kShortRuns;
    const int word = warp % kShortChannelWarps * kShortWords + thread_index() % 32 / kShortRuns;
    int first_channel, channels;    // the first of this thread, and how many exist from it on
    ShortFilter<kTaps> filters[kInputs][kPack];

    DEVICE explicit ShortTiles(const ShortParams& p) : params(p) {}

    DEVICE int64_t input_channel(int i) const { return int64_t(kGated ? params.thirds[i] : 0) * params.channels + first_channel; }
    DEVICE ShortPlace input(const ShortView& view, int i, int batch, int time) const {
        return {view, batch, input_channel(i), channels, time, params.length};
    }
    DEVICE ShortPlace output(int i, int batch, int time) const {
        return {params.outputs[i], batch, first_channel, channels, time, params.length};
    }

    // Calls work(batch, time) for the runs of every unit of this thread, and finish(split) after each unit.
    template <class Function, class Finish>
    DEVICE void each(Function work, Finish finish) {
        for (int unit = block_index(); unit < params.units; unit += block_count()) {
            const int split = unit / params.channel_tiles;
            first_channel = unit % params.channel_tiles * kShortChannels<Element> + word * kPack;
            channels = params.channels - first_channel;
#pragma unroll
            for (int i = 0; i < kInputs; i++)
#pragma unroll
                for (int c = 0; c < kPack; c++) filters[i][c].load(params, c < channels ? input_channel(i) + c : -1);
#pragma unroll
            for (int i = 0; i < kInputs; i++)
#pragma unroll
                for (int c = 0; c < kPack; c++) filters[i][c].widen(params);
            const int64_t tiles = int64_t(params.batch) * params.time_tiles, first = tiles * split / params.splits;
            int batch = int(first / params.time_tiles), column = int(first % params.time_tiles);
            for (int64_t left = tiles * (split + 1) / params.splits - first; left > 0; left--) {
                work(batch, column * kShortTimes + run * kShortRun);
                if (++column == params.time_tiles) column = 0, batch++;
            }
            finish(split);
        }
    }
};

template <class Element, bool kGated, int kTaps>
DEVICE void short_forward(const ShortParams& params) {
    using Tiles = ShortTiles<Element, kGated, kTaps>;
    constexpr int kHalo = Tiles::kHalo;
    Tiles tiles(params);

    const auto work = [&](int batch, int time) {
        ShortStrip<Element, kHalo, 0> z[Tiles::kInputs];
        with_access(params.input.access, [&](auto access) {
#pragma unroll
            for (int i = 0; i < Tiles::kInputs; i++) z[i].load(access, tiles.input(params.input, i, batch, time), params.taps - 1);
        });
        ShortStrip<Element, 0, 0> results[Tiles::kOutputs];
#pragma unroll
        for (int i = 0; i < Tiles::kInputs; i++) z[i].turn(params.input.access);
#pragma unroll
        for (int c = 0; c < Tiles::kPack; c++) {
            const auto result = [&](float (&y)[kShortRun], int i) {
                float x[kHalo + kShortRun];
                z[i].get(x, c);
                tiles.filters[i][c].template convolve<kHalo>(y, x, params.taps);
            };
            float y[kShortRun];
            result(y, 0);
            results[0].set(y, c);
            if constexpr (kGated) {
                float factor[kShortRun];
                result(y, 1);
                result(factor, 2);
#pragma unroll
                for (int i = 0; i < kShortRun; i++) y[i] *= factor[i];
                results[1].set(y, c);
            }
        }
#pragma unroll
        for (int i = 0; i < Tiles::kOutputs; i++)
            with_access(params.outputs[i].access, [&](auto access) { results[i].store(access, tiles.output(i, batch, time)); });
    };
    tiles.each(work, [](int) {});
}

template <class Element, bool kGated, int kTaps>
DEVICE void short_backward(const ShortParams& params) {
    using Tiles = ShortTiles<Element, kGated, kTaps>;
    // The positions whose outputs the run takes part in.
    constexpr int kInputs = Tiles::kInputs, kPack = Tiles::kPack, kHalo = Tiles::kHalo, kReach = kShortRun + kTaps - 1;
    Tiles tiles(params);
    const int taps = params.taps;

    float sums[kInputs][kPack][kTaps + 1];
    const auto clear = [&] {
        for (auto& channel : sums)
            for (auto& column : channel)
                for (float& sum : column) sum = 0.f;
    };
    clear();

    const auto work = [&](int batch, int time) {
        using Input = ShortStrip<Element, kHalo, kHalo>;
        using Gradient = ShortStrip<Element, 0, kHalo>;
        Input z[kInputs];
        Gradient gradients[Tiles::kOutputs];
        with_access(params.input.access, [&](auto access) {
#pragma unroll
            for (int i = 0; i < kInputs; i++) z[i].load(access, tiles.input(params.input, i, batch, time), taps - 1);
        });
#pragma unroll
        for (int i = 0; i < Tiles::kOutputs; i++)
            with_access(params.outputs[i].access, [&](auto access) { gradients[i].load(access, tiles.output(i, batch, time), taps - 1); });
#pragma unroll
        for (int i = 0; i < kInputs; i++) z[i].turn(params.input.access);
#pragma unroll
        for (int i = 0; i < Tiles::kOutputs; i++) gradients[i].turn(params.outputs[i].access);

        const int left = params.length - time;
        ShortStrip<Element, 0, 0> dz[kInputs];
#pragma unroll
        for (int c = 0; c < kPack; c++) {
            const auto read = [&](auto& x, const auto& strip) {
                strip.get(x, c);
                constexpr int kLength = int(sizeof(x) / sizeof(float)), kBefore = kLength - kShortRun - kHalo;
                if (left < kShortRun + kHalo)
#pragma unroll
                    for (int j = 0; j < kLength; j++)
                        if (j - kBefore >= left) x[j] = 0.f;
            };
#pragma unroll
            for (int i = 0; i < kInputs; i++) {
                // The gradient of this convolution's output at the run's positions and at those that the run reaches.
                float dy[Gradient::kLength], x[Input::kLength];
                read(dy, gradients[i > 0]);
                if (i > 0) {
                    float factor[kReach];
                    read(x, z[kInputs - i]);
                    tiles.filters[kInputs - i][c].template convolve<kHalo>(factor, x, taps);
#pragma unroll
                    for (int j = 0; j < kReach; j++) dy[j] *= factor[j];
                }
                read(x, z[i]);
                float dx[kShortRun];
#pragma unroll
                for (int j = 0; j < kShortRun; j++) {
                    dx[j] = 0.f;
                    sums[i][c][kTaps] += dy[j];
#pragma unroll
                    for (int s = 0; s < kTaps; s++)
                        if (s < taps) {
                            dx[j] += tiles.filters[i][c].lag[s] * dy[j + s];
                            sums[i][c][s] += dy[j] * x[kHalo + j - s];
                        }
                }
                dz[i].set(dx, c);
            }
        }
        with_access(params.input_gradient.access, [&](auto access) {
#pragma unroll
            for (int i = 0; i < kInputs; i++) dz[i].store(access, tiles.input(params.input_gradient, i, batch, time));
        });
    };

    // The threads of a channel add up in a fixed order; the splits are added by the caller.
    const auto finish = [&](int split) {
#pragma unroll
        for (int i = 0; i < kInputs; i++)
#pragma unroll
            for (int c = 0; c < kPack; c++) {
                const int64_t part = split * kShortTimeWarps + tiles.run / kShortRuns;
                float* const to = params.grad_filter + (part * kInputs * params.channels + tiles.input_channel(i) + c) * (taps + 1);
#pragma unroll
                for (int s = 0; s <= kTaps; s++) {
                    float sum = sums[i][c][s];
                    for (int mask = 1; mask < kShortRuns; mask *= 2) sum += shuffle_xor(sum, mask);
                    if (tiles.run % kShortRuns != 0 || c >= tiles.channels) continue;
                    if (s == kTaps) to[taps] = sum;
                    else if (s < taps) to[taps - 1 - s] = sum;
                }
            }
        clear();
    };
    tiles.each(work, finish);
}

template <class Element, bool kGated, int kTaps>
struct ShortLauncher {
    // Blocks of a multiprocessor at a time, by the registers of a thread; units that are whole rounds of an H100's, few in the backward pass,
    // which writes sums for each. Constants, so that the order of summation does not depend on the device.
    static constexpr bool kFew = kTaps <= kShortFewTaps;
    static constexpr int kForwardBlocks = kGated ? (kFew ? 5 : 3) : (kFew ? 8 : 6), kBackwardBlocks = kGated ? (kFew ? 3 : 2) : (kFew ? 5 : 3);
    static constexpr int kForwardUnits = 132 * kForwardBlocks * 4, kBackwardUnits = 132 * kBackwardBlocks * 2;

    static int forward(const ShortParams& params, void* stream);
    static int backward(const ShortParams& params, void* stream);
};

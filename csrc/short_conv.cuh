// The short depthwise causal convolution in front of the gates, forward and backward, alone or as three of which two are multiplied.
// Tiles of 32 channels and 64 positions go through shared memory in rows of positions, whichever way the tensor lies in global memory.
#pragma once
#include <cstddef>

#include "fft_conv.h"
#include "primitives.cuh"

// What the host derives: how a tensor's elements are reached, and which tiles a block takes.
enum ShortLayout { kRowsOfTimes, kRowsOfChannels };

struct ShortView {
    char* data;
    int64_t batch_stride, channel_stride, time_stride;
    int layout, aligned;
};

struct ShortParams : fft_conv_short_params {
    ShortView input, input_gradient, outputs[2];
    int channel_tiles, time_tiles, units, splits;
    int64_t tiles_per_split;
    int thirds[3];      // where the gate and the two factors lie in the input
};

constexpr int kShortChannels = 32, kShortTimes = 64, kShortHalo = 8, kShortRun = 8, kShortThreads = 256;
constexpr int kShortMaxTaps = 7;
static_assert(kShortMaxTaps - 1 <= kShortHalo && kShortRun * kShortThreads == kShortChannels * kShortTimes);

DEVICE u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// A tile of one tensor in shared memory: kLeft positions before the tile's first, and kLength in all.
template <class Element, int kLeft, int kLength>
struct ShortPlane {
    static constexpr int kVector = 16 / int(sizeof(Element)), kPack = 4 / int(sizeof(Element));
    // Rows of neighbouring 16-byte groups of channels start in different banks.
    static constexpr int kPad = 32 / (kShortChannels / kVector) * kPack;
    static constexpr int kElements = kShortChannels * kLength + kShortChannels / kVector * kPad;
    static constexpr int kUnits = kLength / kPack * (kShortChannels / kVector);

    Element* memory;

    DEVICE Element* at(int channel, int index) const { return memory + channel * kLength + channel / kVector * kPad + index; }
    DEVICE u32* word_at(int channel, int index) const { return reinterpret_cast<u32*>(at(channel, index)); }

    struct Place {
        Element* base;          // of the tile's first channel, at time zero
        const ShortView& view;
        int channels;           // that exist from the tile's first on
        int first, begin, end;  // time of index zero, times that are wanted

        DEVICE Element* at(int channel, int time) const { return base + channel * view.channel_stride + time * view.time_stride; }
        DEVICE bool holds(int time) const { return time >= begin && time < end; }
    };

    DEVICE Place place(const ShortView& view, int batch, int64_t channel, int channels, int time, int reach, int length) const {
        Element* base = reinterpret_cast<Element*>(view.data) + batch * view.batch_stride + channel * view.channel_stride;
        const int begin = time - reach, end = time + kShortTimes + (kLength > kLeft + kShortTimes ? reach : 0);
        return {base, view, channels, time - kLeft, kLeft > 0 && begin > 0 ? begin : kLeft > 0 ? 0 : time, end < length ? end : length};
    }

    // Zeros stand for positions and channels that do not exist.
    DEVICE void load(const Place& from) const {
        if (from.view.layout == kRowsOfTimes && from.view.aligned)
            for (int i = thread_index(); i < kShortChannels * (kLength / kVector); i += kShortThreads) load_times(from, i / (kLength / kVector), i % (kLength / kVector) * kVector);
        else if (from.view.layout == kRowsOfChannels && from.view.aligned)
            for (int i = thread_index(); i < kUnits; i += kShortThreads) load_channels(from, i % (kShortChannels / kVector) * kVector, i / (kShortChannels / kVector) * kPack);
        else
            each_element(from, 0, kLength, [&](int channel, int index, int time) {
                const bool present = channel < from.channels && from.holds(time);
                if (present) *at(channel, index) = *from.at(channel, time);
                else narrow_one(at(channel, index), 0.f);
            });
    }

    DEVICE void store(const Place& to) const {
        if (to.view.layout == kRowsOfTimes && to.view.aligned)
            for (int i = thread_index(); i < kShortChannels * (kShortTimes / kVector); i += kShortThreads) store_times(to, i / (kShortTimes / kVector), kLeft + i % (kShortTimes / kVector) * kVector);
        else if (to.view.layout == kRowsOfChannels && to.view.aligned)
            for (int i = thread_index(); i < kShortTimes / kPack * (kShortChannels / kVector); i += kShortThreads)
                store_channels(to, i % (kShortChannels / kVector) * kVector, kLeft + i / (kShortChannels / kVector) * kPack);
        else
            each_element(to, kLeft, kShortTimes, [&](int channel, int index, int time) {
                if (channel < to.channels && time < to.end) *to.at(channel, time) = *at(channel, index);
            });
    }

private:
    // Neighbouring threads on neighbouring memory, one element each.
    template <class Function>
    DEVICE static void each_element(const Place& place, int start, int count, Function function) {
        for (int i = thread_index(); i < kShortChannels * count; i += kShortThreads) {
            const bool along = place.view.layout == kRowsOfTimes;
            const int channel = along ? i / count : i % kShortChannels, index = start + (along ? i % count : i / kShortChannels);
            function(channel, index, place.first + index);
        }
    }

    DEVICE void load_times(const Place& from, int channel, int index) const {
        const int time = from.first + index;
        uint4* to = reinterpret_cast<uint4*>(at(channel, index));
        if (channel < from.channels && time >= 0 && time + kVector <= from.end) {
            *to = *reinterpret_cast<const uint4*>(from.at(channel, time));
        } else {
            *to = make_uint4(0, 0, 0, 0);
            for (int i = 0; i < kVector; i++)
                if (channel < from.channels && from.holds(time + i)) *at(channel, index + i) = *from.at(channel, time + i);
        }
    }

    DEVICE void store_times(const Place& to, int channel, int index) const {
        const int time = to.first + index;
        if (channel >= to.channels) return;
        if (time + kVector <= to.end)
            *reinterpret_cast<uint4*>(to.at(channel, time)) = *reinterpret_cast<const uint4*>(at(channel, index));
        else
            for (int i = 0; time + i < to.end; i++) *to.at(channel, time + i) = *at(channel, index + i);
    }

    // kVector channels at kPack positions, turned in registers so that shared memory is written in whole words.
    DEVICE void load_channels(const Place& from, int channel, int index) const {
        uint4 x[kPack];
#pragma unroll
        for (int j = 0; j < kPack; j++) {
            const int time = from.first + index + j;
            const bool present = channel < from.channels && from.holds(time);
            x[j] = present ? *reinterpret_cast<const uint4*>(from.at(channel, time)) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (kPack == 2) {
                *word_at(channel + 2 * i, index) = join_low(word_of(x[0], i), word_of(x[1], i));
                *word_at(channel + 2 * i + 1, index) = join_high(word_of(x[0], i), word_of(x[1], i));
            } else {
                *word_at(channel + i, index) = word_of(x[0], i);
            }
        }
    }

    DEVICE void store_channels(const Place& to, int channel, int index) const {
        if (channel >= to.channels) return;
        u32 x[2][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (kPack == 2) {
                const u32 even = *word_at(channel + 2 * i, index), odd = *word_at(channel + 2 * i + 1, index);
                x[0][i] = join_low(even, odd), x[1][i] = join_high(even, odd);
            } else {
                x[0][i] = *word_at(channel + i, index);
            }
        }
#pragma unroll
        for (int j = 0; j < kPack; j++) {
            const int time = to.first + index + j;
            if (time < to.end) *reinterpret_cast<uint4*>(to.at(channel, time)) = make_uint4(x[j][0], x[j][1], x[j][2], x[j][3]);
        }
    }
};

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
    for (int i = 0; i < kWords; i += 4) *reinterpret_cast<uint4*>(&reinterpret_cast<u32*>(p)[i]) = make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
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
        for (int s = 0; s < kTaps; s++) lag[s] = channel >= 0 && s < p.taps ? load_any(p.weight, p.weight_element, channel * p.taps + p.taps - 1 - s) : 0.f;
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
        Element* to = reinterpret_cast<Element*>(view.data) + batch * view.batch_stride + (tiles.first_channel + tiles.row) * view.channel_stride + time + tiles.run;
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

// Tiles of 32 channels and 64 positions, between global memory of any layout and rows of positions in shared memory.
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
            for (int i = thread_index(); i < kShortChannels * (kLength / kVector); i += kShortThreads)
                load_times(from, i / (kLength / kVector), i % (kLength / kVector) * kVector);
        else if (from.view.layout == kRowsOfChannels && from.view.aligned)
            for (int i = thread_index(); i < kUnits; i += kShortThreads)
                load_channels(from, i % (kShortChannels / kVector) * kVector, i / (kShortChannels / kVector) * kPack);
        else
            each_element(from, 0, kLength, [&](int channel, int index, int time) {
                const bool present = channel < from.channels && from.holds(time);
                if (present) *at(channel, index) = *from.at(channel, time);
                else narrow_one(at(channel, index), 0.f);
            });
    }

    DEVICE void store(const Place& to) const {
        if (to.view.layout == kRowsOfTimes && to.view.aligned)
            for (int i = thread_index(); i < kShortChannels * (kShortTimes / kVector); i += kShortThreads)
                store_times(to, i / (kShortTimes / kVector), kLeft + i % (kShortTimes / kVector) * kVector);
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

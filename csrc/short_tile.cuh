// What a thread of the short convolutions holds of a tensor: a few channels at a run of positions and their neighbours, in words of two
// half-precision numbers or of one in single precision. It comes straight from global memory; the L1 cache serves what neighbours share.
#pragma once
#include <cstddef>

#include "fft_conv.h"
#include "primitives.cuh"

// How a tensor is read and written: words of neighbouring channels, 16 bytes or words of neighbouring positions, or single elements.
enum ShortAccess { kChannelWords, kTimeVectors, kTimeWords, kElements };

struct ShortView {
    char* data;
    int64_t batch_stride, channel_stride, time_stride;      // in bytes
    int access;
};

// What the host derives.
struct ShortParams : fft_conv_short_params {
    ShortView input, input_gradient, outputs[2];
    int channel_tiles, time_tiles, units, splits;
    int thirds[3];      // where the gate and the two factors lie in the input
};

// A warp works on eight words of channels and four runs, so that either layout is read and written in whole sectors. More warps along the
// channels read longer pieces of what has neighbouring channels, more along the time longer pieces of what has neighbouring positions, whose
// neighbours the L1 cache still has; two each are the fastest, as measured.
constexpr int kShortThreads = 128, kShortRun = 8, kShortRuns = 4, kShortWords = 32 / kShortRuns;
constexpr int kShortChannelWarps = 2, kShortTimeWarps = kShortThreads / 32 / kShortChannelWarps;
constexpr int kShortTimes = kShortRun * kShortRuns * kShortTimeWarps;
// Nearly all models have three taps.
constexpr int kShortFewTaps = 3, kShortMaxTaps = 7;
template <class Element>
constexpr int kShortPack = 4 / int(sizeof(Element));
template <class Element>
constexpr int kShortChannels = kShortWords * kShortChannelWarps * kShortPack<Element>;

template <int kAccess>
struct ShortAccessTag { static constexpr int value = kAccess; };

// Calls function(ShortAccessTag<...>{}): one branch for all loads of a kind, which are then all under way at a time.
template <class Function>
DEVICE void with_access(int access, Function function) {
    switch (access) {
        case kChannelWords: return function(ShortAccessTag<kChannelWords>{});
        case kTimeVectors: return function(ShortAccessTag<kTimeVectors>{});
        case kTimeWords: return function(ShortAccessTag<kTimeWords>{});
        default: return function(ShortAccessTag<kElements>{});
    }
}

// Where a thread's first channel and the first position of its run lie.
struct ShortPlace {
    char* data;
    int64_t channel_stride, time_stride;
    int channels;       // that exist from the first on
    int time, length;

    DEVICE ShortPlace(const ShortView& view, int batch, int64_t channel, int channels, int time, int length)
        : data(view.data + batch * view.batch_stride + channel * view.channel_stride + time * view.time_stride), channel_stride(view.channel_stride),
          time_stride(view.time_stride), channels(channels), time(time), length(length) {}
};

// A run with kBefore positions before it and kAfter behind it.
template <class Element, int kBefore, int kAfter>
struct ShortStrip {
    static constexpr int kPack = kShortPack<Element>, kLength = kBefore + kShortRun + kAfter;
    // words[kPack * j + c] holds channel c at positions kPack * j and on; while turned, words[i] holds all channels at position i.
    u32 words[kLength];

    // Zeros stand for what does not exist, and for positions further than `reach` from the run where they take loads of their own. The 16
    // bytes or the word in which a row ends are read whole: what lies beyond the end is the caller's to leave out.
    template <int kAccess>
    DEVICE void load(ShortAccessTag<kAccess>, const ShortPlace& from, int reach) {
        const int left = from.length - from.time;
        const bool any = left > 0 && from.channels > 0;
        const int begin = !any ? kLength : from.time < reach ? -from.time : -reach;
        const int end = !any ? -kLength : left < kShortRun + reach ? left : kShortRun + reach;
        // One comparison each: a run that exists begins before its end and does not begin before the sequence.
        const auto wanted = [&](int i, int count) { return i < 0 ? i + count > begin : i < end; };
        if constexpr (kAccess == kTimeVectors || kAccess == kTimeWords) {
#pragma unroll
            for (int c = 0; c < kPack; c++) {
                const char* const row = from.data + c * from.channel_stride;
#pragma unroll
                for (int i = -kBefore; i < kShortRun + kAfter;) {
                    constexpr int kWide = kAccess == kTimeWords ? 1 : 4;
                    const int count = kPack * (i >= 0 && i < kShortRun ? kWide : kWide < kEdgeWords ? kWide : kEdgeWords);
                    load_words(words + kBefore + i + c, count / kPack, row + i * int(sizeof(Element)), wanted(i, count) & (c < from.channels));
                    i += count;
                }
            }
        } else {
            const char* p = from.data - kBefore * from.time_stride;
#pragma unroll
            for (int i = -kBefore; i < kShortRun + kAfter; i++, p += from.time_stride) {
                if constexpr (kAccess == kChannelWords || kPack == 1) {
                    words[kBefore + i] = wanted(i, 1) ? *reinterpret_cast<const u32*>(p) : 0;
                } else {
                    const u32 low = wanted(i, 1) ? *reinterpret_cast<const uint16_t*>(p) : 0;
                    const u32 high = wanted(i, 1) & (from.channels > 1) ? *reinterpret_cast<const uint16_t*>(p + from.channel_stride) : 0;
                    words[kBefore + i] = low | high << 16;
                }
            }
        }
    }

    // Undoes the order in which `load` leaves what was not read along the positions. Without a branch, behind which no load would be under way.
    DEVICE void turn(int access) {
        if constexpr (kPack == 2) {
            const bool turned = access == kChannelWords || access == kElements;
            const u32 first = turned ? 0x5410 : 0x3210, second = turned ? 0x7632 : 0x7654;
#pragma unroll
            for (int i = 0; i < kLength; i += 2) {
                const u32 a = words[i], b = words[i + 1];
                words[i] = permute_bytes(a, b, first), words[i + 1] = permute_bytes(a, b, second);
            }
        }
    }

    DEVICE void get(float (&x)[kLength], int c) const {
#pragma unroll
        for (int i = 0; i < kLength; i++) {
            if constexpr (kPack == 2) {
                const Pair pair = widen(static_cast<const Element*>(nullptr), words[i / 2 * 2 + c]);
                x[i] = i % 2 ? pair.y : pair.x;
            } else {
                x[i] = float_from_bits(words[i]);
            }
        }
    }

    DEVICE void set(const float (&x)[kLength], int c) {
#pragma unroll
        for (int i = 0; i < kLength; i += kPack) {
            if constexpr (kPack == 2) words[i + c] = narrow(static_cast<const Element*>(nullptr), x[i], x[i + 1]);
            else words[i] = bits_from_float(x[i]);
        }
    }

    template <int kAccess>
    DEVICE void store(ShortAccessTag<kAccess>, const ShortPlace& to) {
        static_assert(kLength == kShortRun);
        const int left = to.length - to.time;
        if constexpr (kAccess == kChannelWords) {
            turn(kAccess);
            char* p = to.data;
#pragma unroll
            for (int i = 0; i < kShortRun; i++, p += to.time_stride)
                if (i < left && to.channels > 0) *reinterpret_cast<u32*>(p) = words[i];
        } else {
#pragma unroll
            for (int c = 0; c < kPack; c++) {
                if (c >= to.channels) break;
                char* p = to.data + c * to.channel_stride;
                if (kAccess == kTimeVectors && left >= kShortRun) {
#pragma unroll
                    for (int i = c; i < kShortRun; i += 4 * kPack) {
                        const uint4 v = make_uint4(words[i], words[i + kPack], words[i + 2 * kPack], words[i + 3 * kPack]);
                        reinterpret_cast<uint4*>(p)[i / (4 * kPack)] = v;
                    }
                } else if (kAccess == kTimeWords && left >= kShortRun) {
#pragma unroll
                    for (int i = c; i < kShortRun; i += kPack) reinterpret_cast<u32*>(p)[i / kPack] = words[i];
                } else {
#pragma unroll
                    for (int i = 0; i < kShortRun; i++, p += to.time_stride) {
                        if (i >= left) break;
                        if constexpr (kPack == 2) *reinterpret_cast<uint16_t*>(p) = uint16_t(words[i / 2 * 2 + c] >> 16 * (i % 2));
                        else *reinterpret_cast<u32*>(p) = words[i];
                    }
                }
            }
        }
    }

private:
    // What the neighbours need of a half-precision row may be less than 16 bytes.
    static constexpr int kEdgeWords = (kBefore > kAfter ? kBefore : kAfter) / kPack < 4 ? (kBefore > kAfter ? kBefore : kAfter) / kPack : 4;

    // Neighbouring words of one channel; without a branch, so that all loads can be under way.
    DEVICE static void load_words(u32* to, int count, const char* p, bool present) {
        if (count == 4) {
            const uint4 v = present ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0);
            to[0] = v.x, to[kPack] = v.y, to[2 * kPack] = v.z, to[3 * kPack] = v.w;
        } else if (count == 2) {
            const uint2 v = present ? *reinterpret_cast<const uint2*>(p) : make_uint2(0, 0);
            to[0] = v.x, to[kPack] = v.y;
        } else {
            to[0] = present ? *reinterpret_cast<const u32*>(p) : 0;
        }
    }
};

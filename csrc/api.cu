// The C interface: checks what the kernels rely on and picks the instance.
#include "launch.h"

static int log2_of(int x) {
    int log = 0;
    while (1 << log < x) log++;
    return log;
}

static Divider divider(int divisor) {
    const int log = log2_of(divisor);
    return {divisor, u32(((uint64_t(1) << (31 + log)) + divisor - 1) / divisor), u32(log > 0 ? log - 1 : 0)};
}

static bool valid(const fft_conv_params& p) {
    const int bytes = p.element == FFT_CONV_FLOAT32 ? 4 : 2;
    for (const fft_conv_tensor* t : {&p.u, &p.pre_gate, &p.post_gate, &p.grad_output, &p.output, &p.grad_u, &p.grad_pre_gate, &p.grad_post_gate})
        if (reinterpret_cast<uintptr_t>(t->data) % bytes != 0) return false;
    const int radix = p.fft_size / kColumns, reach = p.half ? p.fft_size / 2 : p.fft_size;
    return radix >= 1 && (radix & (radix - 1)) == 0 && radix * kColumns == p.fft_size && p.batch > 0 && p.channels > 0 && p.length > 0 && p.length <= reach;
}

// Derives what the host knows once for all threads: alignments and logarithms.
static LaunchParams derive(const fft_conv_params& p) {
    LaunchParams derived;
    static_cast<fft_conv_params&>(derived) = p;
    const int bytes = p.element == FFT_CONV_FLOAT32 ? 4 : 2;
    derived.alignment = derived.pair_aligned = 16;
    for (const fft_conv_tensor* t : {&p.u, &p.pre_gate, &p.post_gate, &p.grad_output}) derived.alignment = std::min(derived.alignment, common_alignment(*t, bytes));
    derived.pair_aligned = derived.alignment;
    for (const fft_conv_tensor* t : {&p.output, &p.grad_u, &p.grad_pre_gate, &p.grad_post_gate})
        derived.pair_aligned = std::min(derived.pair_aligned, common_alignment(*t, bytes));
    derived.pair_aligned = derived.pair_aligned >= 2 * bytes;
    derived.whole_units = derived.pair_aligned && derived.alignment >= 16 && p.length * bytes % 16 == 0;
    derived.log_radix = log2_of(p.fft_size / kColumns);
    derived.pairs = divider((p.batch + 1) / 2);
    const int pairs = (p.batch + 1) / 2, pairs_per_tile = tile_rows(p.fft_size / kColumns) >> derived.log_radix;
    derived.log_sharing = std::min(log2_of(pairs), log2_of(pairs_per_tile));
    const int tiles = (pairs + (1 << derived.log_sharing) - 1) >> derived.log_sharing, channels_per_tile = pairs_per_tile >> derived.log_sharing;
    const int channel_tiles = (p.channels + channels_per_tile - 1) / channels_per_tile;
    const int wanted = std::min(tiles, (kMaximumBackwardBlocks + channel_tiles - 1) / channel_tiles);
    derived.tiles_per_split = (tiles + wanted - 1) / wanted;
    derived.splits = divider((tiles + derived.tiles_per_split - 1) / derived.tiles_per_split);
    return derived;
}

static bool valid_long(const fft_conv_params& p) {
    const int radix = p.fft_size / kLongPoints, slots = p.half ? p.outer_radix / 2 : p.outer_radix, rest = radix / std::max(p.outer_radix, 1);
    const bool shapes = radix * kLongPoints == p.fft_size && (p.fft_size & (p.fft_size - 1)) == 0 && p.fft_size <= kLongMaximum && rest * p.outer_radix == radix;
    return shapes && (rest == 1 || rest == kLongMiddleRadix) && p.outer_radix >= 2 && slots <= 32 && p.outer_radix <= (slots <= 8 ? 16 : 64) && p.batch > 0 &&
           p.channels > 0 && p.length > 0 && p.length <= (p.half ? p.fft_size / 2 : p.fft_size) && p.group_pairs > 0 && p.group_channels > 0 && p.channel_splits > 0 && p.ring > 0 && p.period > 0;
}

static LongParams derive_long(const fft_conv_params& p, int operands) {
    LongParams derived;
    static_cast<LaunchParams&>(derived) = derive(p);
    derived.radix = p.fft_size / kLongPoints;
    derived.outer_slots = p.half ? p.outer_radix / 2 : p.outer_radix;
    derived.subs = derived.has_middle() ? p.outer_radix : 1;
    derived.operands = operands;
    const int inner = 2 * stage_exponent(16) + stage_exponent(32), middle = derived.has_middle() ? stage_exponent(kLongMiddleRadix) : 0;
    derived.spectrum_unit = float(1 << (inner + middle + stage_exponent(p.outer_radix)));
    derived.pair_count = (p.batch + 1) / 2 * p.channels;
    derived.groups = p.channel_splits > 1 ? p.channels * p.channel_splits : (derived.pair_count + p.group_pairs - 1) / p.group_pairs;
    return derived;
}

extern "C" int fft_conv_long_forward(const fft_conv_params* params, void* stream) {
    if (!valid_long(*params)) return kUnsupported;
    const LongParams derived = derive_long(*params, 1);
    return with_long(*params, derived.outer_slots, [&](auto launcher) { return decltype(launcher)::forward(derived, stream); });
}

extern "C" int fft_conv_forward(const fft_conv_params* params, void* stream) {
    if (!valid(*params)) return kUnsupported;
    const LaunchParams derived = derive(*params);
    return with_tile(*params, [&](auto tile) { return Launcher<decltype(tile)>::forward(derived, stream); });
}

extern "C" int fft_conv_filter_spectrum(const fft_conv_filter_params* params, void* stream) {
    FilterParams derived;
    static_cast<fft_conv_filter_params&>(derived) = *params;
    derived.log_points = log2_of(params->fft_size);
    if (params->fft_size < kColumns || params->fft_size > kMaximumFilterPoints || 1 << derived.log_points != params->fft_size) return kUnsupported;
    return launch_filter(derived, stream);
}

extern "C" int fft_conv_long_backward(const fft_conv_params* params, void* stream) {
    if (!valid_long(*params)) return kUnsupported;
    const LongParams derived = derive_long(*params, 2);
    return with_long(*params, derived.outer_slots, [&](auto launcher) { return decltype(launcher)::backward(derived, stream); });
}

extern "C" int fft_conv_backward(const fft_conv_params* params, void* stream) {
    if (!valid(*params)) return kUnsupported;
    const LaunchParams derived = derive(*params);
    return with_tile(*params, [&](auto tile) { return Launcher<decltype(tile)>::backward(derived, stream); });
}

extern "C" int fft_conv_backward_splits(const fft_conv_params* params) {
    const LaunchParams derived = derive(*params);
    return derived.splits.divisor << derived.log_sharing;
}

extern "C" int64_t fft_conv_backward_scratch(const fft_conv_params* params) {
    return int64_t(kMaximumBackwardBlocks) * with_tile(*params, [](auto tile) { return Launcher<decltype(tile)>::kSumBytes; });
}

extern "C" int fft_conv_shared_bytes(const fft_conv_params* params, int backward) {
    auto bytes_of = [&](auto launcher) { return backward ? decltype(launcher)::kBackwardSharedBytes : decltype(launcher)::kForwardSharedBytes; };
    if (params->outer_radix > 0) return with_long(*params, params->half ? params->outer_radix / 2 : params->outer_radix, bytes_of);
    const int bytes = with_tile(*params, [&](auto tile) { return bytes_of(Launcher<decltype(tile)>{}); });
    return bytes < 0 ? bytes : std::max(bytes, filter_shared_bytes(params->fft_size));
}

extern "C" int fft_conv_version() { return 2; }

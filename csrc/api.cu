// The C interface: checks what the kernels rely on and picks the instance.
#include "launch.h"
#include "short_conv.cuh"

static int log2_of(int x) {
    int log = 0;
    while (1 << log < x) log++;
    return log;
}

static Divider divider(int divisor) {
    const int log = log2_of(divisor);
    return {divisor, u32(((uint64_t(1) << (31 + log)) + divisor - 1) / divisor), u32(log > 0 ? log - 1 : 0)};
}

constexpr int kBlockPositions = BlockedTile<float>::kPositions;
// Tiles are counted in 32 bits, and looked ahead at.
constexpr int64_t kMaximumTiles = (int64_t(1) << 31) - (1 << 24);

static int block_count(const fft_conv_params& p) { return p.windows > 0 ? (p.length - 1) / p.fft_size + 1 : 1; }

static bool valid(const fft_conv_params& p) {
    const int bytes = p.element == FFT_CONV_FLOAT32 ? 4 : 2;
    for (const fft_conv_tensor* t : {&p.u, &p.pre_gate, &p.post_gate, &p.grad_output, &p.second_gate, &p.output, &p.grad_u, &p.grad_pre_gate, &p.grad_post_gate, &p.second_output})
        if (reinterpret_cast<uintptr_t>(t->data) % bytes != 0) return false;
    const int radix = p.fft_size / kColumns, reach = p.windows > 0 ? p.length : p.fft_size;
    if ((p.cluster > 0 || p.windows > 0) && (p.fft_size != std::max(p.cluster, 1) * kBlockPositions || !p.folded)) return false;
    if (p.windows > 0 && int64_t(pairs_of_channel(p)) * p.channels * block_count(p) > kMaximumTiles) return false;
    if (p.cluster > 0 && p.windows == 0 && (p.reverse || p.transforms || p.second_output.data)) return false;
    return radix >= (p.folded ? 2 : 1) && (radix & (radix - 1)) == 0 && radix * kColumns == p.fft_size && p.batch > 0 && p.channels > 0 && p.length > 0 && p.length <= reach;
}

// Pairs of a channel in a part of its own, so that clusters have done all parts first: each takes as long as its pairs and, with what is done about its
// sums afterwards, one and a half more.
static int pairs_per_split(const fft_conv_params& p) {
    const int pairs = pairs_of_channel(p), workers = kMaximumBackwardBlocks / 2 / p.cluster;
    int best = pairs;
    int64_t least = INT64_MAX;
    for (int splits = 1; splits <= std::min(pairs, workers); splits++) {
        const int part = (pairs + splits - 1) / splits;
        const int64_t rounds = (int64_t(p.channels) * splits + workers - 1) / workers, cost = rounds * (2 * part + 3);
        if (cost < least) least = cost, best = part;
    }
    return best;
}

// Derives what the host knows once for all threads: alignments and logarithms.
static LaunchParams derive(const fft_conv_params& p) {
    LaunchParams derived;
    static_cast<fft_conv_params&>(derived) = p;
    const int bytes = p.element == FFT_CONV_FLOAT32 ? 4 : 2;
    derived.alignment = derived.pair_aligned = 16;
    for (const fft_conv_tensor* t : {&p.u, &p.pre_gate, &p.post_gate, &p.grad_output, &p.second_gate})
        derived.alignment = std::min(derived.alignment, common_alignment(*t, bytes));
    derived.pair_aligned = derived.alignment;
    for (const fft_conv_tensor* t : {&p.output, &p.grad_u, &p.grad_pre_gate, &p.grad_post_gate, &p.second_output})
        derived.pair_aligned = std::min(derived.pair_aligned, common_alignment(*t, bytes));
    derived.pair_aligned = derived.pair_aligned >= 2 * bytes;
    derived.whole_units = derived.pair_aligned && derived.alignment >= 16 && p.length * bytes % 16 == 0;
    const int pairs = pairs_of_channel(p), pairs_per_tile = tile_pairs(p.fft_size / kColumns);
    derived.pairs = divider(pairs);
    derived.blocks = divider(block_count(p));
    derived.log_sharing = std::min(log2_of(pairs), log2_of(pairs_per_tile));
    const int tiles = (pairs + (1 << derived.log_sharing) - 1) >> derived.log_sharing, channels_per_tile = pairs_per_tile >> derived.log_sharing;
    const int channel_tiles = (p.channels + channels_per_tile - 1) / channels_per_tile;
    const int wanted = std::min(tiles, (kMaximumBackwardBlocks + channel_tiles - 1) / channel_tiles);
    const int tiles_per_split = p.cluster > 0 && p.grad_output.data ? pairs_per_split(p) : (tiles + wanted - 1) / wanted;
    derived.tiles_per_split = divider(tiles_per_split);
    derived.splits = divider((tiles + tiles_per_split - 1) / tiles_per_split);
    return derived;
}

// Of a row's units, where an item has 64 points of each thread of a team.
static bool valid_items(const fft_conv_params& p, int radix) {
    const int units = 16 * team_threads(radix) / radix;
    return p.column_items * (radix > p.outer_radix ? std::min(units, kChunkUnits) : units) == kLongPoints / 4;
}

static bool valid_long(const fft_conv_params& p) {
    const int radix = p.fft_size / kLongPoints, slots = p.outer_radix / (p.folded ? 2 : 1), rest = radix / std::max(p.outer_radix, 1);
    const bool shapes = radix * kLongPoints == p.fft_size && (p.fft_size & (p.fft_size - 1)) == 0 && p.fft_size <= kLongMaximum && rest * p.outer_radix == radix;
    const bool stages = (rest == 1 || rest == 8 || rest == 32) && p.outer_radix >= 2 && (slots <= 8 ? radix <= 512 : slots <= 32);
    return shapes && stages && p.batch > 0 && p.channels > 0 && p.length > 0 && p.length <= p.fft_size && p.group_pairs > 0 && p.ring > 0 &&
           p.period == p.group_pairs * (2 * p.column_items + radix + p.part_count) && int64_t(p.part_count) * kPartPositions >= std::min(p.length, p.fft_size / (p.folded ? 2 : 1)) && valid_items(p, radix);
}

static LongParams long_stages(const fft_conv_params& p) {
    LongParams derived = {};
    static_cast<fft_conv_params&>(derived) = p;
    derived.radix = p.fft_size / kLongPoints;
    derived.team_threads = team_threads(derived.radix);
    derived.log_middle = log2_of(derived.radix / p.outer_radix);
    return derived;
}

extern "C" int fft_conv_long_forward(const fft_conv_params* params, void* stream) {
    if (!valid_long(*params)) return kUnsupported;
    LongParams derived = long_stages(*params);
    static_cast<LaunchParams&>(derived) = derive(*params);
    derived.log_units = log2_of(kLongPoints / 4 / params->column_items);
    derived.pair_count = pairs_of_channel(*params) * params->channels;
    derived.groups = (derived.pair_count + params->group_pairs - 1) / params->group_pairs;
    return with_long(*params, [&](auto launcher) { return decltype(launcher)::forward(derived, stream); });
}

extern "C" int fft_conv_forward(const fft_conv_params* params, void* stream) {
    if (!valid(*params)) return kUnsupported;
    const LaunchParams derived = derive(*params);
    if (params->cluster > 0) return with_cluster(*params, [&](auto launcher) { return decltype(launcher)::forward(derived, stream); });
    auto launch = [&](auto tile) { return Launcher<decltype(tile)>::forward(derived, stream); };
    return params->windows > 0 ? with_blocked_tile(*params, launch) : with_tile(*params, launch);
}

// The logarithm of the channels whose taps are read or written together, so many where they are neighbours in memory.
static int log_channel_group(int64_t channel_stride, int64_t tap_stride, int log_channels) { return tap_stride > channel_stride ? log_channels : 0; }

extern "C" int fft_conv_filter_spectrum(const fft_conv_filter_params* params, void* stream) {
    FilterParams derived;
    static_cast<fft_conv_filter_params&>(derived) = *params;
    derived.log_points = log2_of(params->fft_size);
    derived.log_group = log_channel_group(params->k_stride, params->k_tap_stride, 4);
    if (params->windows > 0 && (params->taps_rev > 0 || !params->folded)) return kUnsupported;
    if (params->fft_size < kColumns || params->fft_size > kLongMaximum || 1 << derived.log_points != params->fft_size) return kUnsupported;
    if (params->fft_size > kMaximumFilterPoints && !derived.in_passes()) return kUnsupported;
    if (derived.in_passes() && !(params->fft_size >= kFewestInPasses && params->partial_sums && params->work_channels > 0)) return kUnsupported;
    const int block = derived.in_passes() ? params->work_channels : params->channels;
    int error = 0;
    for (int left = params->channels; left > 0 && error == 0; left -= block) {
        derived.channels = std::min(left, block);
        error = launch_filter(derived, stream);
        derived.k += block * params->k_stride;
        if (params->k_rev) derived.k_rev += block * params->k_rev_stride;
        if (params->skip) derived.skip += block;
        derived.spectrum += int64_t(block) * derived.window_count() * params->fft_size;
        derived.scale += block;
    }
    return error;
}

extern "C" int fft_conv_largest_filter(int device) {
    return filter_shared_bytes(kMaximumFilterPoints) <= fft_conv_shared_limit(device) ? kMaximumFilterPoints : kMaximumFilterPoints / 2;
}

extern "C" int fft_conv_tap_gradient(const fft_conv_tap_params* params, void* stream) {
    TapParams derived;
    static_cast<fft_conv_tap_params&>(derived) = *params;
    derived.log_points = log2_of(params->fft_size);
    // A tile may not have room for eight.
    derived.log_group = log_channel_group(params->k_stride, params->k_tap_stride, std::min(3, kLogFilterTile + kLogFilterRow - derived.log_points));
    const bool summed = params->transforms == nullptr;
    const bool sizes = params->channels > 0 && params->taps > 0 && params->windows > 0 && params->splits > 0 &&
                       (summed ? params->windows == 1 : params->splits == 1 && params->pairs > 0 && params->windows <= params->blocks);
    const bool held = params->in_passes ? params->fft_size >= kFewestInPasses : params->fft_size <= kMaximumFilterPoints;
    return sizes && held && params->fft_size >= kColumns && params->fft_size <= kLongMaximum && 1 << derived.log_points == params->fft_size ? launch_taps(derived, stream) : kUnsupported;
}

extern "C" int fft_conv_backward(const fft_conv_params* params, void* stream) {
    if (!valid(*params) || params->windows > 0) return kUnsupported;
    const LaunchParams derived = derive(*params);
    if (params->cluster > 0) return with_cluster(*params, [&](auto launcher) { return decltype(launcher)::backward(derived, stream); });
    return with_tile(*params, [&](auto tile) { return Launcher<decltype(tile)>::backward(derived, stream); });
}

extern "C" int fft_conv_backward_splits(const fft_conv_params* params) {
    const LaunchParams derived = derive(*params);
    return derived.splits.divisor;
}

extern "C" int64_t fft_conv_backward_scratch(const fft_conv_params* params) {
    return with_cluster(*params, [&](auto launcher) { return backward_clusters(params->cluster) * decltype(launcher)::kKeptBytes; });
}

extern "C" int64_t fft_conv_blocked_scratch(const fft_conv_params* params, int device) {
    int error = 0;
    const int64_t pairs = int64_t(pairs_of_channel(*params)) * params->channels;
    // Of each block or cluster of blocks that works: transforms of blocks, and a list of pairs; in a cluster all blocks have that list.
    const int64_t workers = std::min<int64_t>(pairs, params->cluster > 0 ? fft_conv_clusters(params) : processor_count(device, &error));
    return error ? kUnsupported : workers * params->windows * params->fft_size * 4 + std::max(params->cluster, 1) * (pairs + workers) * 4;
}

extern "C" int fft_conv_clusters(const fft_conv_params* params) {
    return with_cluster(*params, [](auto launcher) { return decltype(launcher)::clusters(); });
}

extern "C" int fft_conv_shared_bytes(const fft_conv_params* params, int backward) {
    auto bytes_of = [&](auto launcher) { return backward ? decltype(launcher)::kBackwardSharedBytes : decltype(launcher)::kForwardSharedBytes; };
    if (params->outer_radix > 0) return with_long(*params, [&](auto launcher) { return decltype(launcher)::shared_bytes(long_stages(*params)); });
    auto bytes_of_tile = [&](auto tile) { return bytes_of(Launcher<decltype(tile)>{}); };
    if (params->cluster > 0) return with_cluster(*params, [](auto launcher) { return decltype(launcher)::kForwardSharedBytes; });
    const int bytes = params->windows > 0 ? with_blocked_tile(*params, bytes_of_tile) : with_tile(*params, bytes_of_tile);
    return bytes < 0 ? bytes : std::max(bytes, filter_shared_bytes(params->fft_size));
}

static ShortView short_view(const fft_conv_strided_tensor& t, int channels, int bytes) {
    const bool along_times = t.time_stride == 1, along_channels = !along_times && t.channel_stride == 1 && channels * int64_t(bytes) % 4 == 0;
    const int64_t stride = along_times ? t.channel_stride : t.time_stride;
    const uint64_t bits = reinterpret_cast<uint64_t>(t.data) | uint64_t(t.batch_stride) * bytes | uint64_t(stride) * bytes;
    int access = kElements;
    if (bits % 4 == 0 && along_channels) access = kChannelWords;
    if (bits % 4 == 0 && along_times) access = bits % 16 == 0 ? kTimeVectors : kTimeWords;
    return {static_cast<char*>(t.data), t.batch_stride * bytes, t.channel_stride * bytes, t.time_stride * bytes, access};
}

static ShortParams derive(const fft_conv_short_params& p, int units) {
    ShortParams derived;
    static_cast<fft_conv_short_params&>(derived) = p;
    const int bytes = p.element == FFT_CONV_FLOAT32 ? 4 : 2, tile_channels = bytes == 4 ? kShortChannels<float> : kShortChannels<bfloat16>;
    derived.input = short_view(p.z, p.channels, bytes);
    derived.input_gradient = short_view(p.grad_z, p.channels, bytes);
    derived.outputs[0] = short_view({p.output.data, p.output.batch_stride, p.output.channel_stride, 1}, p.channels, bytes);
    derived.outputs[1] = short_view({p.product.data, p.product.batch_stride, p.product.channel_stride, 1}, p.channels, bytes);
    derived.thirds[0] = p.gate, derived.thirds[1] = p.gate == 0, derived.thirds[2] = p.gate == 2 ? 1 : 2;
    derived.channel_tiles = (p.channels - 1) / tile_channels + 1;
    derived.time_tiles = (p.length - 1) / kShortTimes + 1;
    derived.splits = int(std::min<int64_t>(int64_t(p.batch) * derived.time_tiles, (units - 1) / derived.channel_tiles + 1));
    derived.units = derived.splits * derived.channel_tiles;
    return derived;
}

static bool valid(const fft_conv_short_params& p) {
    return p.batch > 0 && p.channels > 0 && p.length > 0 && p.taps > 0 && p.taps <= kShortMaxTaps && p.gate < 3;
}

// Calls function(ShortLauncher<...>{}) for the kernel of these parameters.
template <class Element, class Function>
static int with_short(const fft_conv_short_params& p, Function function) {
    if (p.taps <= kShortFewTaps)
        return p.gate < 0 ? function(ShortLauncher<Element, false, kShortFewTaps>{}) : function(ShortLauncher<Element, true, kShortFewTaps>{});
    return p.gate < 0 ? function(ShortLauncher<Element, false, kShortMaxTaps>{}) : function(ShortLauncher<Element, true, kShortMaxTaps>{});
}

template <class Function>
static int with_short(const fft_conv_short_params& p, Function function) {
    if (!valid(p)) return kUnsupported;
    switch (p.element) {
        case FFT_CONV_BFLOAT16: return with_short<bfloat16>(p, function);
        case FFT_CONV_FLOAT16: return with_short<float16>(p, function);
        case FFT_CONV_FLOAT32: return with_short<float>(p, function);
        default: return kUnsupported;
    }
}

extern "C" int fft_conv_short_forward(const fft_conv_short_params* params, void* stream) {
    return with_short(*params, [&](auto launcher) { return launcher.forward(derive(*params, launcher.kForwardUnits), stream); });
}

extern "C" int fft_conv_short_backward(const fft_conv_short_params* params, void* stream) {
    return with_short(*params, [&](auto launcher) { return launcher.backward(derive(*params, launcher.kBackwardUnits), stream); });
}

extern "C" int fft_conv_short_splits(const fft_conv_short_params* params) {
    return with_short(*params, [&](auto launcher) { return derive(*params, launcher.kBackwardUnits).splits * kShortTimeWarps; });
}

extern "C" int fft_conv_version() { return 16; }

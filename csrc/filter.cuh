// Spectra of filters for the other kernels: half precision, in kernel order, each with the scale that was taken out.
// A filter is a real sequence on a circle of fft_size points: causal taps from the start, anticausal ones from the end, the skip weight added
// at lag zero. It goes through the same stages as a sequence of the tile's first halves, with an imaginary part of zero.
#pragma once
#include "tile_io.cuh"
#include "transform.cuh"

template <class T>
struct FilterPlan {
    static constexpr int kSharedBytes = Tables<T, false>::kSharedBytes + T::kRowBytes + T::kEnergyBytes;
};

struct FilterParams : fft_conv_filter_params {
    int log_radix;
};

// The taps of the tile's channels; lane 2 p knows the channel of pair p.
template <class T>
struct TapSource {
    const FilterParams& params;
    SlotMap<T> slots;
    int channel;    // negative if there is none
    bool present;

    DEVICE explicit operator bool() const { return present; }

    DEVICE float tap(int owner, int n) const {
        float sum = 0.f;
        if (n < params.taps) sum += params.k[owner * params.k_stride + n];
        if (n >= params.fft_size - params.taps_rev) sum += params.k_rev[owner * params.k_rev_stride + params.fft_size - 1 - n];
        return n == 0 && params.skip ? sum + params.skip[owner] : sum;
    }

    DEVICE Pair load(int sequence, int slot, int column) const {
        const int64_t owner = shuffle(channel, 2 * slots.pair(slot));
        const int n = slots.position(slot) + column;
        return sequence != 0 || owner < 0 ? Pair{0.f, 0.f} : Pair{tap(owner, n), tap(owner, n + 1)};
    }
};

template <class T>
DEVICE void filter_tiles(const FilterParams& params) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const Tables<T, false> tables(params.tables, shared_memory(), 1 << params.log_radix);
    char* const memory = shared_memory() + Tables<T, false>::kSharedBytes;
    uint4* rows = reinterpret_cast<uint4*>(memory);
    const int radix = 1 << params.log_radix, channels_per_tile = T::kRows >> params.log_radix;
    const SlotMap<T> slots{params.log_radix};
    SequenceScales<T> scales{reinterpret_cast<float*>(memory + T::kRowBytes), slots, 0, warp, lane};

    copy_async_wait<0>();
    block_barrier();
    for (int tile = block_index(); tile * channels_per_tile < params.channels; tile += block_count()) {
        int channel = tile * channels_per_tile + lane / 2;
        if (channel >= params.channels || lane / 2 >= channels_per_tile) channel = -1;
        u32 x[T::kSlots / 4][4];
        const bool used = channel >= 0 && lane % 2 == 0;
        scales.template pack_scaled<false>(x, TapSource<T>{params, slots, channel, true}, TapSource<T>{params, slots, channel, false}, used);
        outer_forward<T>(x, rows, tables.outer, 0, warp, lane);
        const InnerConstants constants(InnerTables{tables.inner, lane});
        block_barrier();
#pragma unroll 1
        for (int row = warp; row < T::kRows; row += T::kWarps) {
            const int64_t owner = shuffle(channel, 2 * (row >> params.log_radix));
            const int k1 = row & (radix - 1);
            RowFragment value;
            value.load(rows + row * (kRowPitch / 4), lane);
            value = inner_transform(value * tables.row_twiddles(k1, lane), constants);
            if (owner >= 0) value.store(reinterpret_cast<uint4*>(params.spectrum) + (owner * radix + k1) * 64, lane);
        }
        if (warp == 0 && used) params.scale[channel] = scales.up * square_root(float(params.fft_size));
        block_barrier();
    }
}

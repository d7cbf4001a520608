// The passes of a long transform outside of its rows: each contracts one index, for 32 columns a warp, in registers.
// In the intermediate a lane's four columns (a, a + 1, a + 128, a + 129) of a chunk of 256 are one 16-byte unit of (re, im) words.
#pragma once
#include "long_scale.cuh"

// Where a lane's unit lies among the 64 of a chunk.
DEVICE int column_unit(int warp, int lane) { return warp % 8 * 8 + lane / 4; }

DEVICE uint4 unit_of(const SingleSums (&d)[2]) { return make_uint4(pack(d[0].re(0), d[0].im(0)), pack(d[1].re(0), d[1].im(0)), pack(d[0].re(1), d[0].im(1)), pack(d[1].re(1), d[1].im(1))); }

// Brings the slots 4 j + q of a lane's columns; slots are `stride` units apart.
template <int kSlots>
DEVICE void load_units(u32 (&x)[kSlots / 4][4], const uint4* from, int stride, int lane) {
#pragma unroll
    for (int j = 0; j < kSlots / 4; j++) {
        const uint4 v = load_shared_by_blocks(from + int64_t(4 * j + lane % 4) * stride);
        x[j][0] = v.x, x[j][1] = v.y, x[j][2] = v.z, x[j][3] = v.w;
    }
}

// Operands of `contract_steps` from the intermediate; outputs of the stage beyond its radix are not there.
struct UnitLoader {
    const uint4* from;
    int stride, count, lane;
    u32 flip;   // 0x80008000 changes the signs of odd rows

    DEVICE void operator()(int s, u32 (&a)[2][4]) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = 8 * s + 4 * i + lane % 4;
            const uint4 v = row < count ? load_shared_by_blocks(from + int64_t(row) * stride) : make_uint4(0, 0, 0, 0);
            const u32 sign = lane % 2 ? flip : 0;
            a[0][2 * i] = v.x ^ sign, a[0][2 * i + 1] = v.z ^ sign, a[1][2 * i] = v.y ^ sign, a[1][2 * i + 1] = v.w ^ sign;
        }
    }
};

// From a pair of sequences to the intermediate: chunks of 256 columns from `first` to `last`, shared out over the block's groups of eight warps.
template <int kSlots, class Sequence>
DEVICE void outer_pass(const LongParams& params, const Sequence& first_sequence, const Sequence& second_sequence, const PairScales& scales, const uint4* matrix,
                       uint4* to, int first, int last) {
    const int warp = thread_index() / 32, lane = thread_index() % 32, stride = params.fft_size / params.outer_radix, column = outer_column(warp, lane);
    for (int chunk = first + warp / 8; chunk < last; chunk += block_size() / 256) {
        u32 x[kSlots / 4][4];
#pragma unroll
        for (int j = 0; j < kSlots / 4; j++) {
            const int slot = 4 * j + lane % 4;
            const bool used = slot < params.outer_slots;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int position = slot * stride + chunk * kColumns + column + 128 * half;
                Pair v{0.f, 0.f}, w{0.f, 0.f};
                if (used) v = first_sequence.load(position), w = second_sequence.load(position);
                v = PairScales::apply(v, scales.down[0]), w = PairScales::apply(w, scales.down[1]);
                x[j][2 * half] = pack(v.x, w.x), x[j][2 * half + 1] = pack(v.y, w.y);
            }
        }
        uint4* const units = to + chunk * 64 + column_unit(warp, lane);
        const int tiles = params.outer_radix < 8 ? 2 : params.outer_radix / 4;
        contract<kSlots>(x, matrix, 0, tiles, lane, [&](int n, const SingleSums (&d)[2]) {
            const int row = 4 * n + lane % 4;
            if (row < params.outer_radix) store_for_blocks(units + int64_t(row) * (stride / 4), unit_of(d));
        });
    }
}

// The middle pass over some chunks of one part of a pair, in place; the matrix tells which way.
DEVICE void middle_pass(const uint4* matrix, uint4* part, int first, int last) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    for (int chunk = first + warp / 8; chunk < last; chunk += block_size() / 256) {
        uint4* const units = part + chunk * 64 + column_unit(warp, lane);
        u32 x[kLongMiddleRadix / 4][4];
        load_units<kLongMiddleRadix>(x, units, kLongPoints / 4, lane);
        contract<kLongMiddleRadix>(x, matrix, 0, kLongMiddleRadix / 4, lane, [&](int n, const SingleSums (&d)[2]) {
            store_for_blocks(units + (4 * n + lane % 4) * (kLongPoints / 4), unit_of(d));
        });
    }
}

// From the intermediate back to positions: calls store(value, chunk) with the slots' results. Half transforms have those of the second half by
// the shift theorem: with `flip` the signs of odd rows change.
template <int kSlots, class Store>
DEVICE void inverse_pass(const LongParams& params, const uint4* matrix, const uint4* from, int first, int last, u32 flip, Store store) {
    const int warp = thread_index() / 32, lane = thread_index() % 32, stride = params.fft_size / params.outer_radix;
    for (int chunk = first + warp / 8; chunk < last; chunk += block_size() / 256) {
        SingleSums value[kSlots / 4][2];
        const UnitLoader load{from + chunk * 64 + column_unit(warp, lane), stride / 4, params.outer_radix, lane, flip};
        contract_steps(value, matrix, kSlots / 8, (params.outer_radix + 7) / 8, lane, load);
        store(value, chunk);
    }
}

// The passes of a long transform outside of its rows: each contracts n0 or k0, for some columns of a sheet.
// In the intermediate a lane's four columns (a, a + 1, a + 128, a + 129) of a chunk of 256 are one 16-byte unit of (re, im) words. A warp contracts
// eight units at a time, lane / 4 being the number of the unit, four columns of each slot or output.
#pragma once
#include "filter.cuh"
#include "long_scale.cuh"

// The units of a sheet's rows.
constexpr int kLongUnits = kLongPoints / 4;

// The first column of a unit.
DEVICE int unit_column(int unit) { return unit / 64 * kColumns + unit % 64 * 2; }

DEVICE uint4 unit_of(const SingleSums (&d)[2]) { return make_uint4(pack(d[0].re(0), d[0].im(0)), pack(d[1].re(0), d[1].im(0)), pack(d[0].re(1), d[0].im(1)), pack(d[1].re(1), d[1].im(1))); }

// The same, multiplied before it is rounded.
DEVICE uint4 unit_of(const SingleSums (&d)[2], Complex w) {
    auto product = [&](int t, int half) {
        const Complex z = Complex{d[t].re(half), d[t].im(half)} * w;
        return pack(z.re, z.im);
    };
    return make_uint4(product(0, 0), product(1, 0), product(0, 1), product(1, 1));
}

DEVICE void spread_unit(u32 (&x)[4], uint4 v) { x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w; }

// What an item of the outer passes works on: neighbouring units of all rows of a sheet, and where there are two stages a place for them in shared
// memory, in between. Units there are rotated by their row, so that neither stage meets a bank twice.
struct ColumnTile {
    uint4* sheet;       // at the first unit
    uint4* exchange;
    Complex* roots;     // w_R^i
    int log_units, outer_radix, middle_radix, lane;

    DEVICE int units() const { return 1 << log_units; }
    // Eight units at a time: task t has those with the numbers 8 t + lane / 4, the unit in the tile first, then the index that is not contracted.
    DEVICE int number(int task) const { return 8 * task + lane / 4; }
    DEVICE int unit(int number) const { return number & (units() - 1); }
    DEVICE int outer_tasks() const { return (middle_radix << log_units) / 8; }
    DEVICE int middle_tasks() const { return (outer_radix << log_units) / 8; }

    DEVICE uint4* in_sheet(int row, int unit) const { return sheet + int64_t(row) * kLongUnits + unit; }
    // The point of the indices k0a and n0b.
    DEVICE uint4& exchanged(int outer, int middle, int unit) const {
        const int place = ((outer * middle_radix + middle) << log_units) + unit;
        return exchange[log_units < 3 ? place : place ^ ((outer ^ middle) & 3) << 1];
    }
    DEVICE Complex twist(int outer, int middle) const { return roots[outer * middle]; }

    DEVICE void fill_roots() const {
        const int radix = outer_radix * middle_radix;
        for (int i = thread_index(); i < radix; i += block_size()) root_of_unity(i, radix, &roots[i].re, &roots[i].im);
    }
};

// Calls work(number) for a warp's tasks.
template <class Work>
DEVICE void for_each_task(const ColumnTile& tile, int tasks, Work work) {
#pragma unroll 1
    for (int task = thread_index() / 32; task < tasks; task += block_size() / 32) work(tile.number(task));
}

// From a pair of sequences, whose position of the tile's first unit is `column`, to the sheet or, with a middle stage, to shared memory.
template <int kSlots, class Sequence>
DEVICE void outer_pass(const ColumnTile& tile, const Sequence& first, const Sequence& second, const PairScales& scales, const uint4* matrix,
                       int first_unit) {
    const int q = tile.lane % 4, tiles = tile.outer_radix < 8 ? 2 : tile.outer_radix / 4;
    for_each_task(tile, tile.outer_tasks(), [&](int number) {
        const int unit = tile.unit(number), middle = number >> tile.log_units, column = middle * kLongPoints + unit_column(first_unit + unit);
        u32 x[kSlots / 4][4];
#pragma unroll
        for (int j = 0; j < kSlots / 4; j++) {
            const int slot = 4 * j + q, position = slot * tile.middle_radix * kLongPoints + column;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                // Slots that are not there lie beyond the sequence.
                Pair v = first.load(position + 128 * half), w = second.load(position + 128 * half);
                v = PairScales::apply(v, scales.down[0]), w = PairScales::apply(w, scales.down[1]);
                x[j][2 * half] = pack(v.x, w.x), x[j][2 * half + 1] = pack(v.y, w.y);
            }
        }
        contract<kSlots>(x, matrix, tiles, tile.lane, [&](int n, const SingleSums (&d)[2]) {
            const int row = 4 * n + q;
            if (row >= tile.outer_radix) return;
            if (tile.middle_radix == 1)
                store_for_blocks(tile.in_sheet(row, unit), unit_of(d));
            else
                tile.exchanged(row, middle, unit) = unit_of(d, tile.twist(row, middle));
        });
    });
}

// From shared memory to the sheet.
template <int kRadix>
DEVICE void middle_pass(const ColumnTile& tile, const uint4* matrix) {
    const int q = tile.lane % 4;
    for_each_task(tile, tile.middle_tasks(), [&](int number) {
        const int unit = tile.unit(number), outer = number >> tile.log_units;
        u32 x[kRadix / 4][4];
#pragma unroll
        for (int j = 0; j < kRadix / 4; j++) spread_unit(x[j], tile.exchanged(outer, 4 * j + q, unit));
        contract<kRadix>(x, matrix, kRadix / 4, tile.lane, [&](int n, const SingleSums (&d)[2]) {
            store_for_blocks(tile.in_sheet(outer * kRadix + 4 * n + q, unit), unit_of(d));
        });
    });
}

// From the sheet to shared memory.
template <int kRadix>
DEVICE void middle_pass_back(const ColumnTile& tile, const uint4* matrix) {
    const int q = tile.lane % 4;
    for_each_task(tile, tile.middle_tasks(), [&](int number) {
        const int unit = tile.unit(number), outer = number >> tile.log_units;
        u32 x[kRadix / 4][4];
#pragma unroll
        for (int j = 0; j < kRadix / 4; j++) spread_unit(x[j], load_shared_by_blocks(tile.in_sheet(outer * kRadix + 4 * j + q, unit)));
        contract<kRadix>(x, matrix, kRadix / 4, tile.lane, [&](int n, const SingleSums (&d)[2]) {
            const int middle = 4 * n + q;
            tile.exchanged(outer, middle, unit) = unit_of(d, tile.twist(outer, middle));
        });
    });
}

// From there, or from the sheet, to positions: calls store(value, position) with the results of the slots 4 n + lane % 4, whose positions follow
// `position` at distances of Rb 8192. Half transforms have those of the second half by the shift theorem: `flip` = 0x80008000 changes the signs
// of odd outer rows.
template <int kSlots, class Store>
DEVICE void inverse_pass(const ColumnTile& tile, const uint4* matrix, int first_unit, u32 flip, Store store) {
    const int q = tile.lane % 4;
    for_each_task(tile, tile.outer_tasks(), [&](int number) {
        const int unit = tile.unit(number), middle = number >> tile.log_units;
        const u32 sign = tile.lane % 2 ? flip : 0;
        SingleSums value[kSlots / 4][2];
        contract_steps(value, matrix, kSlots / 8, (tile.outer_radix + 7) / 8, tile.lane, [&](int s, u32 (&a)[2][4]) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = 8 * s + 4 * i + q;
                uint4 v = make_uint4(0, 0, 0, 0);
                // Outputs of the stage beyond its radix are not there.
                if (row < tile.outer_radix) v = tile.middle_radix == 1 ? load_shared_by_blocks(tile.in_sheet(row, unit)) : tile.exchanged(row, middle, unit);
                a[0][2 * i] = v.x ^ sign, a[0][2 * i + 1] = v.z ^ sign, a[1][2 * i] = v.y ^ sign, a[1][2 * i + 1] = v.w ^ sign;
            }
        });
        store(value, middle * kLongPoints + unit_column(first_unit + unit));
    });
}

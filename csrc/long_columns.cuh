// The passes of a long transform outside of its rows: each contracts n0 or k0, for some columns of a sheet, which is the intermediate of one pair.
// There a lane's four columns (a, a + 1, a + 128, a + 129) of a chunk of 256 are one 16-byte unit, as in the rows of a tile. A warp contracts eight
// units at a time, lane / 4 being the number of the unit, four columns of each slot or output.
#pragma once
#include "long_scale.cuh"

// The vectors of an outer stage, one way: kSlots inputs or outputs.
template <int kSlots>
constexpr int kOuterVectors = 2 * kSlots / 8 * (kSlots / 8) * 32;
// The units of a sheet's rows.
constexpr int kLongUnits = kLongPoints / 4;

// The first column of a unit.
DEVICE int unit_column(u32 unit) { return unit / kChunkUnits * kColumns + unit % kChunkUnits * 2; }

// The four columns of an output, multiplied before they are rounded.
DEVICE uint4 packed(const SingleSums (&d)[2], Complex w) {
    auto product = [&](int t, int half) { return Complex{d[t].re(half), d[t].im(half)} * w; };
    const Complex a = product(0, 0), b = product(0, 1), c = product(1, 0), e = product(1, 1);
    return make_uint4(pack(a.re, b.re), pack(a.im, b.im), pack(c.re, e.re), pack(c.im, e.im));
}

// A unit as operand of `contract`.
DEVICE void spread_unit(u32 (&x)[4], uint4 v) {
    x[0] = join_low(v.x, v.y), x[1] = join_low(v.z, v.w), x[2] = join_high(v.x, v.y), x[3] = join_high(v.z, v.w);
}

// What an item of the outer passes works on: neighbouring units of all rows of a sheet, and where there are two stages a place for them in shared
// memory, in between. Units there are rotated by their row, so that neither stage meets a bank twice.
template <class Team>
struct ColumnTile {
    const LongParams& params;
    const Team& team;
    uint4 *const sheet, *const exchange;
    const uint4* const stage;       // next to the rows
    const Complex *const roots, *const twists;  // between two stages: w_R^i, and w_(32 R)^(i chunk)
    const int first_unit, log_units;

    // Equal distances from one to the next.
    struct Places {
        uint4* const first;
        const int step;
        DEVICE uint4& operator[](int i) const { return first[i * step]; }
    };

    DEVICE int first_chunk() const { return first_unit / kChunkUnits; }
    DEVICE int chunks() const { return 1 << log_units < kChunkUnits ? 1 : (1 << log_units) / kChunkUnits; }
    // Calls work(unit, index) for a warp's tasks, which go over the units of the tile first, then over so many indices.
    template <class Work>
    DEVICE void for_each_task(int indices, Work work) const {
#pragma unroll 1
        for (int number = 8 * team.warp + team.lane / 4; number < indices << log_units; number += Team::kThreads / 4) work(number & ((1 << log_units) - 1), number >> log_units);
    }

    DEVICE uint4* in_sheet(int row, int unit) const { return sheet + int64_t(row) * kLongUnits + first_unit + unit; }
    DEVICE uint4* exchanged(int outer, int middle, int unit) const {
        const int place = ((outer * params.middle_radix() + middle) << log_units) + unit;
        return exchange + (log_units < 3 ? place : place ^ ((outer ^ middle) & 3) << 1);
    }
    // The points of every fourth k0a, or every fourth n0b, from lane % 4 on.
    DEVICE Places over_outer(int middle, int unit) const { return {exchanged(team.lane % 4, middle, unit), 4 * params.middle_radix() << log_units}; }
    DEVICE Places over_middle(int outer, int unit) const { return {exchanged(outer, team.lane % 4, unit), 4 << log_units}; }
    DEVICE Complex twist(int outer, int middle) const { return roots[outer * middle] * twists[outer]; }
    // The distance of neighbouring slots, and the first position of a lane's unit of slot lane % 4.
    DEVICE int slot_stride() const { return params.middle_radix() * kLongPoints; }
    DEVICE int position(int middle, int unit) const { return team.lane % 4 * slot_stride() + middle * kLongPoints + unit_column(first_unit + unit); }

    // From a pair of sequences to the sheet, by a matrix for each chunk, or with a middle stage to shared memory, by one for all. Slots that are not there
    // lie beyond the sequences. Where registers have room for them, the elements of a task come while the one before is worked on.
    template <int kSlots, bool kMiddle, class Sequence>
    DEVICE void from_sequences(const Sequence& first, const Sequence& second, const PairScales& scales, const uint4* matrix) const {
        constexpr bool kAhead = kSlots == 8 && Sequence::kNarrow;
        const int q = team.lane % 4, tiles = params.outer_radix < 8 ? 2 : params.outer_radix / 4, step = Team::kThreads / 4;
        typename Sequence::Words v[kSlots / 4][2], w[kSlots / 4][2];
        auto load = [&](int start, int j) __attribute__((always_inline)) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = start + 4 * j * slot_stride() + 128 * half;
                v[j][half] = first.load_words(at), w[j][half] = second.load_words(at);
            }
        };
        auto load_ahead = [&](int number) __attribute__((always_inline)) {
            const int start = position(number >> log_units, number & ((1 << log_units) - 1));
#pragma unroll
            for (int j = 0; j < kSlots / 4; j++) load(start, j);
        };
        if (kAhead) load_ahead(8 * team.warp + team.lane / 4);
        for_each_task(kMiddle ? params.middle_radix() : 1, [&](int unit, int middle) __attribute__((always_inline)) {
            u32 x[kSlots / 4][4];
#pragma unroll
            for (int j = 0; j < kSlots / 4; j++) {
                if (!kAhead) load(position(middle, unit), j);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const Pair a = first.product(v[j][half]), b = second.product(w[j][half]);
                    x[j][2 * half] = pack(a.x * scales.down[0], b.x * scales.down[1]), x[j][2 * half + 1] = pack(a.y * scales.down[0], b.y * scales.down[1]);
                }
            }
            const int next = (middle << log_units) + unit + step;
            if (kAhead && next < params.middle_radix() << log_units) load_ahead(next);
            const Places places = over_outer(middle, unit);
            contract<kSlots, kSlots / 4>(x, matrix + (kMiddle ? 0 : u32(unit) / kChunkUnits * kOuterVectors<kSlots>), tiles, team.lane, [&](int n, const SingleSums (&d)[2]) __attribute__((always_inline)) {
                const int row = 4 * n + q;
                if (row >= params.outer_radix) return;
                if constexpr (kMiddle)
                    places[n] = packed(d, twist(row, middle));
                else
                    store_for_blocks(in_sheet(row, unit), packed(d));
            });
        });
    }

    // From shared memory to the sheet.
    template <int kRadix>
    DEVICE void middle_there() const {
        for_each_task(params.outer_radix, [&](int unit, int outer) __attribute__((always_inline)) {
            const Places places = over_middle(outer, unit);
            u32 x[kRadix / 4][4];
#pragma unroll
            for (int j = 0; j < kRadix / 4; j++) spread_unit(x[j], places[j]);
            uint4* const to = in_sheet(outer * kRadix + team.lane % 4, unit);
            contract<kRadix, 2>(x, stage, kRadix / 4, team.lane, [&](int n, const SingleSums (&d)[2]) __attribute__((always_inline)) { store_for_blocks(to + 4 * n * kLongUnits, packed(d)); });
        });
    }

    // Back, the units come to the places which the lane that has asked for them fills again. Nobody reads them after that: whole lines of them, which
    // eight lanes have asked for, need not go to memory.
    template <int kRadix>
    DEVICE void middle_back() const {
        const int q = team.lane % 4;
        for_each_task(params.outer_radix, [&](int unit, int outer) __attribute__((always_inline)) {
            const uint4* const from = in_sheet(outer * kRadix + q, unit);
            const Places places = over_middle(outer, unit);
#pragma unroll
            for (int j = 0; j < kRadix / 4; j++) copy_async<16>(&places[j], from + 4 * j * kLongUnits);
        });
        copy_async_commit();
        copy_async_wait<0>();
        warp_barrier();
        if (log_units >= 3 && team.lane < 4)
            for_each_task(params.outer_radix, [&](int unit, int outer) __attribute__((always_inline)) {
                const uint4* const from = in_sheet(outer * kRadix + q, unit);
#pragma unroll
                for (int j = 0; j < kRadix / 4; j++) discard(from + 4 * j * kLongUnits);
            });
        for_each_task(params.outer_radix, [&](int unit, int outer) __attribute__((always_inline)) {
            const Places places = over_middle(outer, unit);
            u32 x[kRadix / 4][4];
#pragma unroll
            for (int j = 0; j < kRadix / 4; j++) spread_unit(x[j], places[j]);
            contract<kRadix, 2>(x, stage, kRadix / 4, team.lane, [&](int n, const SingleSums (&d)[2]) __attribute__((always_inline)) { places[n] = packed(d, twist(outer, 4 * n + q)); });
        });
    }

    // From there, or from the sheet, to positions: calls start(position), and store(value, position) with the results of the slots 4 n + lane % 4, whose
    // positions follow `position` at distances of four slots.
    template <int kSlots, bool kMiddle, class Start, class Store>
    DEVICE void to_positions(const uint4* matrix, Start start, Store store) const {
        const int q = team.lane % 4;
        for_each_task(kMiddle ? params.middle_radix() : 1, [&](int unit, int middle) __attribute__((always_inline)) {
            start(position(middle, unit));
            const Places places = over_outer(middle, unit);
            SingleSums value[kSlots / 4][2];
            contract_steps(value, matrix + (kMiddle ? 0 : u32(unit) / kChunkUnits * kOuterVectors<kSlots>), kSlots / 8, kSlots / 4, team.lane, [&](int s, u32 (&a)[2][4]) __attribute__((always_inline)) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int row = 8 * s + 4 * i + q;
                    uint4 v = make_uint4(0, 0, 0, 0);
                    // Outputs of the stage beyond its radix are not there.
                    if (row < params.outer_radix) v = kMiddle ? places[2 * s + i] : load_shared_by_blocks(in_sheet(row, unit));
                    a[0][2 * i] = join_low(v.x, v.y), a[0][2 * i + 1] = join_high(v.x, v.y), a[1][2 * i] = join_low(v.z, v.w), a[1][2 * i + 1] = join_high(v.z, v.w);
                }
            });
            store(value, position(middle, unit));
        });
    }
};

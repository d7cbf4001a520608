// Convolutions whose transform does not fit into one block's shared memory: N = R 8192 points with R = Ra or Ra 32, in passes over an
// intermediate in global memory that stays in the L2 cache.
//
//   n = n0 8192 + p,  f = k0 + R f'        with n0 = n0a 32 + n0b and k0 = k0a + Ra k0b where R = Ra 32
//
// The outer pass contracts n0a, the middle pass n0b for each k0a, the row pass transforms the 8,192 points of each k0, multiplies by the filter's
// spectrum and transforms back, and two passes return to positions. No twist has a pass of its own: stage s of radix r after stages of radices
// P = r1 .. r(s-1) that left the index o contracts its slot n with the matrix w_(rP)^(n (o + P k)), which holds the twiddle w_(rP)^(n o) of all
// stages before it. Only the twist by the columns of the innermost 256 points is left: w_N^(c k0), a factor of the row twiddles.
//
// One launch does it all. Blocks take tickets; a period of tickets, which hf_flashfftconv/ops/long_plan.py lays out, advances a group of pairs by
// one group, each pass some groups behind the one before. An item waits for the counters of the items that it needs, all of which have smaller
// tickets: some block always goes on, however few are resident.
#pragma once
#include "tile_io.cuh"
#include "transform.cuh"

constexpr int kLongPoints = 8192, kLongMiddleRadix = 32, kLongMaximum = 1 << 24;
constexpr int kPartPositions = 16384;       // positions of a sequence whose energy one item sums up

enum LongKind { kScale, kOuter, kMiddle, kRows, kMiddleBack, kInverse, kTaps };

struct LongParams : LaunchParams {
    int radix;          // R
    int outer_slots;    // slots of the outer pass that carry data
    int subs;           // parts of a sheet that the middle passes work on: Ra, or one without middle passes
    int operands;       // of the passes to frequencies: pre_gate * u, in the backward pass also post_gate * grad_output
    int pair_count, groups;

    float spectrum_unit;    // what a transform as the passes scale it has to be multiplied by to be one

    HOST_DEVICE bool has_middle() const { return radix > outer_radix; }
    HOST_DEVICE int column_chunks() const { return fft_size / outer_radix / kColumns; }
    HOST_DEVICE int natural_k0(int row) const { return has_middle() ? row / kLongMiddleRadix + outer_radix * (row % kLongMiddleRadix) : row; }
    // A sheet is the intermediate of one transform: first those of the group's pairs, then those of the gradients of its channels' taps.
    HOST_DEVICE int pair_sheets() const { return group_pairs * operands; }
    HOST_DEVICE int sheets() const { return pair_sheets() + (operands == 2 ? group_channels : 0); }
    HOST_DEVICE int row_splits() const { return (group_pairs / group_channels + row_pairs - 1) / row_pairs; }
    HOST_DEVICE int row_items() const { return group_channels * row_splits(); }
};

// The transform of 8,192 points that the row pass does on chip.
template <typename Element>
using LongTile = Tile<Element, 32, false, 1>;

// Whether two neighbouring elements of every tensor may be moved as one word, as a type.
template <bool kValue>
struct Aligned {
    static constexpr bool value = kValue;
};

// One ticket: a part of a pass over a group of pairs.
struct LongItem {
    int kind, group, index;

    DEVICE LongItem(const LongParams& params, int ticket) {
        const int period = ticket / params.period;
        const u32 entry = params.schedule[ticket - period * params.period];
        kind = entry & 15, group = period - int(entry >> 4 & 15), index = entry >> 8;
    }
};

// How many items of each pass over a group are done: the ticket counter, then for each group the passes over whole sheets and those over parts.
struct LongCounters {
    const LongParams& params;

    DEVICE u32* ticket() const { return params.counters; }
    DEVICE u32* scaled(int group) const { return of_group(group); }
    DEVICE u32* columns(int group) const { return of_group(group) + 1; }
    DEVICE u32* returned(int group) const { return of_group(group) + 2; }
    DEVICE u32* inverted(int group) const { return of_group(group) + 3; }
    DEVICE u32* middle(int group, int sub) const { return of_group(group) + 4 + sub; }
    DEVICE u32* rows(int group, int sub) const { return of_group(group) + 4 + params.subs + sub; }
    DEVICE u32* taps(int group, int sub) const { return of_group(group) + 4 + 2 * params.subs + sub; }

    DEVICE void wait_for_scales(int group) const { wait(scaled(group), params.pair_sheets() * params.part_count); }
    DEVICE void wait_for_inverse(int group) const { wait(inverted(group), params.sheets() * params.column_items); }
    DEVICE void wait_for_columns(int group) const { wait(columns(group), params.pair_sheets() * params.column_items); }
    // What the rows of a part need.
    DEVICE void wait_for_part(int group, int sub) const {
        params.has_middle() ? wait(middle(group, sub), params.pair_sheets() * params.middle_items) : wait_for_columns(group);
    }
    DEVICE void wait_for_rows(int group, int sub) const { wait(rows(group, sub), params.radix / params.subs * params.row_items()); }
    DEVICE void wait_for_taps(int group, int sub) const { wait(taps(group, sub), params.radix / params.subs * params.group_channels); }
    DEVICE void wait_for_return(int group, bool of_taps) const {
        if (params.has_middle())
            wait(returned(group), params.subs * params.sheets() * params.middle_items);
        else
            of_taps ? wait_for_taps(group, 0) : wait_for_rows(group, 0);
    }

private:
    DEVICE u32* of_group(int group) const { return params.counters + 1 + int64_t(group) * (4 + 3 * params.subs); }

    // All threads of the block.
    DEVICE static void wait(const u32* counter, int count) {
        if (thread_index() == 0) wait_acquire(counter, count);
        block_barrier();
    }
};

// Calls work(item) for each ticket that the block gets; it returns the counter to raise, or null. The next ticket is fetched ahead.
template <class Work>
DEVICE void for_each_ticket(const LongParams& params, u32* shared_words, Work work) {
    const LongCounters counters{params};
    if (thread_index() == 0) shared_words[0] = take_ticket(counters.ticket());
    block_barrier();
    for (int turn = 0;; turn ^= 1) {
        const u32 ticket = shared_words[turn];
        if (ticket >= u32(params.tickets)) return;
        u32 next = 0;
        if (thread_index() == 0) next = take_ticket(counters.ticket());
        const LongItem item(params, ticket);
        u32* const done = item.group >= 0 && item.group < params.groups ? work(item) : nullptr;
        if (thread_index() == 0) shared_words[turn ^ 1] = next;
        block_barrier();
        if (done && thread_index() == 0) add_release(done);
    }
}

// A B operand in shared memory for `contract` and `contract_steps`; strides count units of 32 vectors.
struct MatrixOperand {
    u32* words;
    int pair_stride, step_stride;

    DEVICE void set(int input, int output, float re, float im) const {
        const int unit = output / 8 * pair_stride + input / 8 * step_stride, lane = output % 4 * 8 + input % 4;
        u32* word = words + (unit * 32 + lane) * 4 + output / 4 % 2 * 2 + input / 4 % 2;
        word[0] = pack(re, -im), word[16] = pack(im, re);
    }
};

// exp(-2 pi i index / order) for a power of two up to 2^24
DEVICE void root_of_unity(int index, int order, float* re, float* im) {
    sine_cosine_pi(2.f * float(index & (order - 1)) / float(order), *im, *re);
    *im = -*im;
}

// Stages are scaled by powers of two, the way there and back by 1 / radix together: 1 / sqrt(radix) is mostly no half-precision number, and its
// error would be the same in all outputs.
HOST_DEVICE int stage_exponent(int radix) {
    int exponent = 0;
    for (; radix > 1; radix /= 4) exponent++;
    return exponent;
}

// The stage of `radix` with `slots` slots in use after stages of radix `previous` that left the index `offset`, and its transpose, which is the
// stage back. Both are padded with zeros, to kInputs slots and at least eight outputs.
template <int kInputs>
DEVICE void fill_stage(MatrixOperand forward, MatrixOperand back, int slots, int radix, int previous, int offset) {
    const float down = power_of_two(-stage_exponent(radix)), up = 1.f / (float(radix) * down);
    for (int i = thread_index(); i < kInputs * (radix < 8 ? 8 : radix); i += block_size()) {
        const int slot = i % kInputs, output = i / kInputs;
        float re = 0.f, im = 0.f;
        if (slot < slots && output < radix) root_of_unity(slot * (offset + previous * output), radix * previous, &re, &im);
        forward.set(slot, output, re * down, im * down);
        back.set(output, slot, re * up, im * up);
    }
}

// w_N^(c k0) for the columns c of the innermost 256 points, as a row of twiddles.
DEVICE void fill_column_twiddles(u32* words, int k0, int fft_size) {
    const int i = thread_index(), lane = i % 32, s = i / 32 % 2, t = i / 64;
    if (i >= 128) return;
    float re[2], im[2];
    for (int half = 0; half < 2; half++) root_of_unity(k0 * (16 * (lane % 4 + 4 * s + 8 * half) + 2 * (lane / 4) + t), fft_size, re + half, im + half);
    u32* word = words + (32 * s + lane) * 4 + 2 * t;
    word[0] = pack(re[0], re[1]), word[1] = pack(im[0], im[1]);
}

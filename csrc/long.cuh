// Convolutions whose transform does not fit into one block's shared memory: N = R 8192 points with R = Ra or Ra Rb, in passes over an
// intermediate in global memory that stays in the L2 cache.
//
//   n = n0 8192 + p,  f = k0 + R f'        with n0 = n0a Rb + n0b and k0 = k0a + Ra k0b, Rb being 8, 16 or 32
//
// The outer pass contracts n0: n0a and, where R = Ra Rb, after the twist w_R^(n0b k0a) also n0b, which passes through shared memory. The row pass
// transforms the 8,192 points of each k0, multiplies by the filter's spectrum and transforms back, and the inverse pass returns to positions. The
// twist between the outer pass and the rows, w_N^(p k0), has no pass of its own: the first stage of a row contracts its slot n with the matrix
// w_(32 R)^(n (k0 + R k)), which holds that of its slots, and what is left, w_N^(c k0) by the columns of the innermost 256 points, is a factor of
// the row twiddles.
//
// One launch does it all. Blocks take tickets; a period of tickets, which hf_flashfftconv/ops/long_plan.py lays out, advances a group of pairs by
// one group, each pass some groups behind the one before. An item waits for the counters of the items that it needs, all of which have smaller
// tickets: some block always goes on, however few are resident.
#pragma once
#include "tile_io.cuh"
#include "transform.cuh"

constexpr int kLongPoints = 8192, kLongMaximum = 1 << 24;
constexpr int kLongItemPoints = 16384;     // of an item of the outer passes
constexpr int kPartPositions = 16384;       // positions of a sequence whose energy one item sums up

enum LongKind { kScale, kOuter, kRows, kInverse, kTaps };

struct LongParams : LaunchParams {
    int radix;          // R
    int outer_slots;    // slots of the outer pass that carry data
    int operands;       // of the passes to frequencies: pre_gate * u, in the backward pass also post_gate * grad_output
    int pair_count, groups;

    float spectrum_unit;    // what a transform as the passes scale it has to be multiplied by to be one

    HOST_DEVICE bool has_middle() const { return radix > outer_radix; }
    HOST_DEVICE int middle_radix() const { return radix / outer_radix; }
    // Units of four columns (long_columns.cuh) that an item of the outer passes works on.
    HOST_DEVICE int item_units() const { return kLongPoints / 4 / column_items; }
    HOST_DEVICE int natural_k0(int row) const { return row / middle_radix() + outer_radix * (row % middle_radix()); }
    // A sheet is the intermediate of one transform: first those of the group's pairs, then those of the gradients of its channels' taps.
    HOST_DEVICE int pair_sheets() const { return group_pairs * operands; }
    HOST_DEVICE int sheets() const { return pair_sheets() + (operands == 2 ? group_channels : 0); }
    // Items of the row pass. Forward: of row_steps rows, each of one k0 and one pair, over the group's pairs first. Backward: of one k0 and row_steps
    // pairs of a channel.
    HOST_DEVICE int row_splits() const { return (group_pairs / group_channels + row_steps - 1) / row_steps; }
    HOST_DEVICE int row_items() const {
        return operands == 2 ? radix * group_channels * row_splits() : (radix * group_pairs + row_steps - 1) / row_steps;
    }
};

// The transform of 8,192 points that the row pass does on chip.
template <typename Element>
using LongTile = Tile<Element, 32, false, 1>;

// A condition or a radix as a type.
template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

// One ticket: a part of a pass over a group of pairs.
struct LongItem {
    int kind, group, index;

    DEVICE LongItem(int period, u32 entry) : kind(entry & 15), group(period - int(entry >> 4 & 15)), index(entry >> 8) {}
};

// How many items of each pass over a group are done, after the ticket counter.
struct LongCounters {
    const LongParams& params;

    DEVICE u32* ticket() const { return params.counters; }
    DEVICE u32* done(int group, int kind) const { return params.counters + 1 + int64_t(group) * 5 + kind; }

    // All threads of the block wait until the group has passed.
    DEVICE void wait(int group, int kind) const { wait(group, kind, group, kind); }
    // The same for two groups, which are asked for at the same time; numbers below zero mean none.
    DEVICE void wait(int group, int kind, int other_group, int other_kind) const {
        const int thread = thread_index();
        if (thread == 1) group = other_group, kind = other_kind;
        if (thread < 2 && group >= 0) wait_acquire(done(group, kind), count(kind));
        block_barrier();
    }

private:
    // Items of a group.
    DEVICE u32 count(int kind) const {
        switch (kind) {
            case kScale: return params.pair_sheets() * params.part_count;
            case kOuter: return params.pair_sheets() * params.column_items;
            case kRows: return params.row_items();
            case kInverse: return params.sheets() * params.column_items;
            default: return params.radix * params.group_channels;
        }
    }
};

// Calls work(item) for each ticket that the block gets; it returns the counter to raise, or null. Tickets and their entries in the schedule are
// fetched ahead: nothing waits for them.
template <class Work>
DEVICE void for_each_ticket(const LongParams& params, u32* shared_words, Work work) {
    const LongCounters counters{params};
    constexpr u32 kEnd = ~0u;
    const bool first_thread = thread_index() == 0;
    auto entry_of = [&](u32 ticket) { return ticket < u32(params.tickets) ? params.schedule[ticket % u32(params.period)] : kEnd; };
    u32 next = 0;
    if (first_thread) {
        const u32 ticket = take_ticket(counters.ticket());
        next = take_ticket(counters.ticket());
        shared_words[0] = ticket / u32(params.period), shared_words[1] = entry_of(ticket);
    }
    block_barrier();
    for (int turn = 0;; turn ^= 2) {
        const u32 period = shared_words[turn], entry = shared_words[turn + 1];
        if (entry == kEnd) return;
        u32 later = 0, next_entry = 0;
        if (first_thread) later = take_ticket(counters.ticket()), next_entry = entry_of(next);
        const LongItem item(int(period), entry);
        u32* const done = item.group >= 0 && item.group < params.groups ? work(item) : nullptr;
        if (first_thread) shared_words[turn ^ 2] = next / u32(params.period), shared_words[(turn ^ 2) + 1] = next_entry;
        next = later;
        block_barrier();
        if (done && first_thread) add_release(done);
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

// The stage of `radix` with `slots` slots in use after stages of radix `previous` that left the index `offset`, or its transpose, the stage back.
// Both are padded with zeros, to kInputs slots and at least eight outputs. A thread's outputs are some steps apart: from the first,
// w_(radix previous)^(slot (offset + previous output)), the others differ by powers of w_radix^(slot step).
template <int kInputs>
DEVICE void fill_stage(MatrixOperand matrix, int slots, int radix, int previous, int offset, bool back) {
    const float down = power_of_two(-stage_exponent(radix)), scale = back ? 1.f / (float(radix) * down) : down;
    const int slot = thread_index() % kInputs, step = block_size() / kInputs, first = thread_index() / kInputs;
    const bool used = slot < slots && first < radix;
    float re = 0.f, im = 0.f, turn_re = 1.f, turn_im = 0.f;
    if (used) root_of_unity(slot * (offset + previous * first), radix * previous, &re, &im);
    if (used && first + step < radix) root_of_unity(slot * step, radix, &turn_re, &turn_im);
    for (int output = first; output < (radix < 8 ? 8 : radix); output += step) {
        const float kept = used && output < radix ? scale : 0.f;
        back ? matrix.set(output, slot, re * kept, im * kept) : matrix.set(slot, output, re * kept, im * kept);
        const float turned = re * turn_re - im * turn_im;
        im = re * turn_im + im * turn_re, re = turned;
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

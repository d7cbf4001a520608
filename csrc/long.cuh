// Convolutions whose transform does not fit into one block's shared memory: N = R 8192 points with R = Ra or Ra Rb, in passes over an
// intermediate in global memory that stays in the L2 cache as far as it can.
//
//   n = n0 8192 + p,  f = k0 + R f'        with n0 = n0a Rb + n0b and k0 = k0a + Ra k0b, Rb being 8 or 32
//
// The outer pass contracts n0: n0a and, where R = Ra Rb, after the twist w_R^(n0b k0a) also n0b, which passes through shared memory. The row pass
// transforms the 8,192 points of each k0, multiplies by the filter's spectrum and transforms back, and the inverse pass returns to positions. The
// twist between the outer pass and the rows, w_N^(p k0) with p = 256 n + c, has no pass of its own. Its chunks n are few in an item of the outer
// pass: the stage next to the rows contracts with the matrix w_(32 r)^(k (32 m + n)) from m to k, its radix being r. If that is Rb, what k0a takes of
// the twist joins the one between the two stages. What is left, w_N^(c k0) by the columns c of the innermost 256 points, is a factor of the row twiddles.
// Folded, k0 + 1/4 has the place of k0: the quarter joins the first stage, the stage next to the rows, and the factor of the row twiddles.
//
// One launch does it all. Teams of warps, several in a block, which share its constants, take tickets; a period of tickets, which
// hf_flashfftconv/ops/long_plan.py lays out, advances a group of pairs by one group, each pass some groups behind the one before. An item waits for
// the counters of the items that it needs, all of which have smaller tickets: some team always goes on, however few are resident.
#pragma once
#include "tile_io.cuh"
#include "transform.cuh"

constexpr int kLongPoints = 8192, kLongMaximum = 1 << 23;
constexpr int kPartPositions = 16384;       // positions of a sequence whose energy one item sums up
constexpr int kChunkUnits = 64;             // of 256 points

enum LongKind { kScale, kOuter, kRows, kInverse, kLongKinds, kEnd = kLongKinds };

struct LongParams : LaunchParams {
    int radix;          // R
    int team_threads;   // for each of which an item of the outer passes has 64 points at most
    int log_units;      // of each row that such an item has: not more than a chunk where there are two stages
    int log_middle;     // of Rb, or zero
    int pair_count, groups;

    HOST_DEVICE bool has_middle() const { return log_middle > 0; }
    HOST_DEVICE int middle_radix() const { return 1 << log_middle; }
    // The stage next to the rows.
    HOST_DEVICE int last_radix() const { return has_middle() ? middle_radix() : outer_radix; }
    HOST_DEVICE int natural_k0(int row) const { return (row >> log_middle) + outer_radix * (row & (middle_radix() - 1)); }
};

// The transform of 8,192 points that the row pass does on chip.
template <typename Element>
using LongTile = Tile<Element, 32, false, 1>;

// A condition or a radix as a type.
template <int kValue>
struct Constant {
    static constexpr int value = kValue;
};

template <int kThreads_>
struct Team {
    static constexpr int kThreads = kThreads_, kWarps = kThreads / 32;
    const int index, thread, warp, lane;

    DEVICE explicit Team(int thread) : index(thread / kThreads), thread(thread % kThreads), warp(thread / 32 % kWarps), lane(thread % 32) {}
    DEVICE void barrier() const { named_barrier<kThreads>(1 + index); }
};

// One ticket: a part of a pass over one pair of a group, in the order of hf_flashfftconv/ops/long_plan.py.
struct LongItem {
    int kind, group, pair, part;

    DEVICE LongItem(const LongParams& params, u32 ticket) {
        const int step = ticket / u32(params.period);
        const int index = ticket - step * params.period;
        part = index / params.group_pairs, pair = index - part * params.group_pairs;
        auto is = [&](int of_kind, int delay, int parts) {
            kind = of_kind, group = step - delay;
            if (part < parts) return true;
            part -= parts;
            return false;
        };
        is(kInverse, params.inverse_delay, params.column_items) || is(kRows, params.row_delay, params.radix) || is(kOuter, params.outer_delay, params.column_items) ||
            is(kScale, 0, params.part_count);
        if (ticket >= u32(params.tickets)) kind = kEnd;
        if (group >= params.groups) group = -1;
    }
};

// What is done: after the ticket counter, items of each pass over a group, then for each pair the parts whose energies are known.
struct LongCounters {
    const LongParams& params;

    DEVICE u32* ticket() const { return params.counters; }
    DEVICE u32* done(int group, int kind) const { return params.counters + 1 + int64_t(group) * kLongKinds + kind; }
    DEVICE u32* parts_done(int pair) const { return done(params.groups, 0) + pair; }

    // The groups that must have passed before an item, negative where there is none: its own the pass before, and an earlier one that must have left
    // its place of the ring.
    DEVICE int needed(const LongItem& item, int i) const {
        if (item.kind == kScale || item.kind == kEnd) return -1;
        return i == 0 ? item.group : item.kind == kOuter ? item.group - params.ring : -1;
    }
    DEVICE int needed_kind(const LongItem& item, int i) const { return i == 0 ? item.kind - 1 : int(kInverse); }
    // How far these are now, and whether that is enough.
    DEVICE u32 seen(const LongItem& item, int i) const { return needed(item, i) >= 0 ? load_relaxed(done(needed(item, i), needed_kind(item, i))) : ~0u; }
    DEVICE bool enough(const LongItem& item, int i, u32 seen) const { return seen >= count(needed_kind(item, i)); }
    // The team waits until an item may begin.
    template <class Team>
    DEVICE void wait(const Team& team, const LongItem& item, bool ready) const {
        if (!ready && team.thread < 2 && needed(item, team.thread) >= 0) wait_acquire(done(needed(item, team.thread), needed_kind(item, team.thread)), count(needed_kind(item, team.thread)));
        team.barrier();
    }

private:
    // What a counter of a group comes to. Scales are counted by pairs.
    DEVICE u32 count(int kind) const { return params.group_pairs * (kind == kScale ? 1 : kind == kRows ? params.radix : params.column_items); }
};

// What a team works on and what comes next, in turn, and whether what that needs has been seen done.
struct LongTurns {
    LongItem items[2];
    int ready[2];
};

// What the first thread of a team does for the next item during one, in two steps, which the item may take when it likes: the answer to the first is there
// before the second, so that nothing waits for it. The later the first, the fewer items lie idle with a team while others wait for them.
struct NextItem {
    const LongParams& params;
    LongItem& item;
    const bool first_thread;
    u32 ticket = 0, seen[2] = {};
    int steps = 0;

    DEVICE void take() {
        if (steps++ == 0 && first_thread) ticket = take_ticket(LongCounters{params}.ticket());
    }
    DEVICE void ask() {
        if (steps++ != 1 || !first_thread) return;
        item = LongItem(params, ticket);
        for (int i = 0; i < 2; i++) seen[i] = LongCounters{params}.seen(item, i);
    }
    DEVICE bool ready() const { return LongCounters{params}.enough(item, 0, seen[0]) && LongCounters{params}.enough(item, 1, seen[1]); }
};

// Calls work(item, ready, next) for each ticket that the team gets; it returns the counter to raise, or null.
template <class Team, class Work>
DEVICE void for_each_ticket(const LongParams& params, const Team& team, LongTurns& turns, Work work) {
    const bool first_thread = team.thread == 0;
    if (first_thread) turns.items[0] = LongItem(params, take_ticket(LongCounters{params}.ticket())), turns.ready[0] = false;
    team.barrier();
    for (int turn = 0;; turn ^= 1) {
        const LongItem item = turns.items[turn];
        if (item.kind == kEnd) return;
        NextItem next{params, turns.items[turn ^ 1], first_thread};
        u32* const done = item.group >= 0 ? work(item, turns.ready[turn], next) : nullptr;
        if (next.steps == 0) next.take();
        if (next.steps == 1) next.ask();
        if (first_thread) turns.ready[turn ^ 1] = next.ready();
        team.barrier();
        // What this thread has seen done comes before what the others do after their next barrier.
        if (first_thread) done ? add_release(done) : fence();
    }
}

// Stages are scaled by powers of two, the way there and back by 1 / radix together: 1 / sqrt(radix) is mostly no half-precision number, and its
// error would be the same in all outputs.
HOST_DEVICE int stage_exponent(int radix) {
    int exponent = 0;
    for (; radix > 1; radix /= 4) exponent++;
    return exponent;
}

DEVICE float scale_there(int radix) { return power_of_two(-stage_exponent(radix)); }
DEVICE float scale_back(int radix) { return power_of_two(stage_exponent(radix)) / float(radix); }

// A B operand in shared memory for `contract` and `contract_steps`; strides count units of 32 vectors.
struct MatrixOperand {
    uint4* vectors;
    int pair_stride, step_stride;

    // The real matrix from one of the inputs to one of the outputs: what their first and their second sequence, or real and imaginary part, is multiplied by.
    struct Entry {
        float first_of_first, second_of_first, first_of_second, second_of_second;
    };
    DEVICE void set(int input, int output, Entry x) const {
        const int unit = output / 8 * pair_stride + input / 8 * step_stride, lane = output % 4 * 8 + input % 4;
        u32* word = reinterpret_cast<u32*>(vectors + unit * 32 + lane) + output / 4 % 2 * 2 + input / 4 % 2;
        word[0] = pack(x.first_of_first, x.second_of_first), word[16] = pack(x.first_of_second, x.second_of_second);
    }

    // The stage of a radix from some inputs to some outputs of it, by a multiple of `inputs` threads; what lies beyond the radix is zero. For a chunk of the
    // points next to it, it goes from m to k by w_(32 radix)^(k (32 m + chunk)), and back the other way. With the quarter of a frequency, of the `whole` radix
    // so far, by w_(32 whole)^((32 m + chunk) / 4) besides. From or to the halves of a sequence, m + radix / 2 has the place of m for the second one; which
    // comes back negative, as the imaginary parts of conjugates do.
    struct Stage {
        int radix, inputs, outputs;
        float scale;
        bool back;
        int whole;
        bool quarter, halves;
        int chunk = 0;
    };
    DEVICE void fill(int thread, int threads, const Stage& stage) const {
        const int radix = stage.radix, input = thread % stage.inputs;
        for (int output = thread / stage.inputs; output < stage.outputs; output += threads / stage.inputs) {
            const int m = stage.back ? output : input, k = stage.back ? input : output;
            auto root = [&](int of_m) { return root_of_unity((4 * k * (stage.whole / radix) + stage.quarter) * (32 * of_m + stage.chunk), 128 * stage.whole); };
            const float kept = k < radix && m < (stage.halves ? radix / 2 : radix) ? stage.scale : 0.f;
            const Complex first = root(m), second = stage.halves ? root(m + radix / 2) : Complex{-first.im, first.re};
            const Entry there{first.re, second.re, first.im, second.im}, returned{first.re, -first.im, -second.re, second.im};
            const Entry entry = stage.back ? returned : there;
            set(input, output, {entry.first_of_first * kept, entry.second_of_first * kept, entry.first_of_second * kept, entry.second_of_second * kept});
        }
    }
};

// w_N^(c (k0 + 8 R i)) for the columns c of the innermost 256 points, as row twiddles, i = 0 to 3.
template <class Team>
DEVICE void fill_column_twiddles(const Team& team, uint4* vectors, const LongParams& params, int k0) {
    const int s = team.warp % 2, t = team.warp / 2 % 2;
#pragma unroll
    for (int i = team.warp / 4; i < 4; i += Team::kWarps / 4) {
        Complex root[2];
        for (int half = 0; half < 2; half++)
            root[half] = root_of_unity((4 * (k0 + 8 * params.radix * i) + params.folded) * (16 * (team.lane % 4 + 4 * s + 8 * half) + 2 * (team.lane / 4) + t), 4 * params.fft_size);
        reinterpret_cast<uint2*>(vectors + 64 * i + 32 * s + team.lane)[t] = make_uint2(pack(root[0].re, root[1].re), pack(root[0].im, root[1].im));
    }
}

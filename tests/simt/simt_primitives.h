// The kernels' primitives for a CPU: every thread of a block is a fiber, warp operations exchange values between 32 of them, asynchronous
// copies land only when they are waited for, and shared memory starts poisoned. Slow and exact: it checks index maps and synchronisation.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <vector>

using u32 = uint32_t;
#define DEVICE inline
#define HOST_DEVICE inline
#define RARE static inline
#define __restrict__

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct float16 { uint16_t bits; };
struct bfloat16 { uint16_t bits; };

namespace simt {

struct Copy { void* to; const void* from; int bytes, valid; };

constexpr size_t kStackBytes = 256 * 1024;

struct Fiber {
    ucontext_t context;
    jmp_buf position;
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};   // left as it is: only what is touched costs memory
    int index = 0;
    bool done = false;
    bool polls = false;                     // looks again in its next turn
    const long* waits_for = nullptr;        // a generation that is to change
    long generation = 0;
    std::deque<std::vector<Copy>> groups{1};
};

struct Rendezvous {
    int arrived = 0;
    long generation = 0;
};

struct Warp {
    Rendezvous meet;
    alignas(16) unsigned char slots[2][32][64];     // of every other meeting: who is at the next has read these
};

// What is on its way to the shared memory of a block lands when that waits for it.
struct Delivery { void* to; unsigned char value[16]; int bytes; };

struct TransactionBarrier {
    int count = 0, missing = 0, bytes = 0;
    long generation = 0;
    std::vector<Delivery> deliveries;
};

struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Warp> warps;
    Rendezvous barrier, named_barriers[16], cluster_meeting;
    std::vector<unsigned char> shared;
    std::map<size_t, TransactionBarrier> transaction_barriers;    // by their places in shared memory
    int index = 0, count = 1, rank = 0;
    std::vector<Block>* cluster = nullptr;
    jmp_buf scheduler;
    Fiber* current = nullptr;
    std::function<void()> body;
};

inline Block* block;

// Contexts start fibers; jumps, which make no system call, switch between them.
inline void yield() {
    if (_setjmp(block->current->position) == 0) _longjmp(block->scheduler, 1);
}

// A turn ends with something to look for again.
inline void poll() {
    block->current->polls = true;
    yield();
}

inline void resume(Fiber* fiber) {
    block->current = fiber;
    if (_setjmp(block->scheduler) != 0) return;
    if (fiber->started) _longjmp(fiber->position, 1);
    fiber->started = true;
    setcontext(&fiber->context);
}

inline void arrive(Rendezvous& r, int participants) {
    if (++r.arrived == participants) {
        r.arrived = 0;
        r.generation++;
    }
}

inline void meet(Rendezvous& r, int participants) {
    const long generation = r.generation;
    arrive(r, participants);
    block->current->waits_for = &r.generation, block->current->generation = generation;
    while (r.generation == generation) yield();
    block->current->waits_for = nullptr;
}

inline void entry() {
    block->body();
    block->current->done = true;
    _longjmp(block->scheduler, 1);
}

// Whether anything is left to do.
inline bool run_warp(const std::unique_ptr<Fiber>* fibers) {
    auto for_each_fiber = [&](auto work) {
        bool any = false;
        for (int lane = 0; lane < 32; lane++) any |= work(fibers[lane].get());
        return any;
    };
    auto go_on = [](Fiber* fiber) {
        if (fiber->done || fiber->polls || (fiber->waits_for && *fiber->waits_for == fiber->generation)) return false;
        resume(fiber);
        return true;
    };
    while (for_each_fiber(go_on)) {}
    return for_each_fiber([](Fiber* fiber) { fiber->polls = false; return !fiber->done; });
}

// Runs body as a grid of blocks, one cluster after the other.
inline void launch(int blocks, int threads, int shared_bytes, std::function<void()> body, int cluster_size = 1) {
    for (int first = 0; first < blocks; first += cluster_size) {
        std::vector<Block> cluster(cluster_size);
        for (int rank = 0; rank < cluster_size; rank++) {
            Block& state = cluster[rank];
            state.index = first + rank, state.count = blocks, state.rank = rank, state.cluster = &cluster, state.body = body;
            state.warps.resize(threads / 32);
            state.shared.assign(shared_bytes + 128, 0xff);
            for (int t = 0; t < threads; t++) {
                auto fiber = std::make_unique<Fiber>();
                fiber->index = t;
                getcontext(&fiber->context);
                fiber->context.uc_stack.ss_sp = fiber->stack.get();
                fiber->context.uc_stack.ss_size = kStackBytes;
                fiber->context.uc_link = nullptr;
                makecontext(&fiber->context, entry, 0);
                state.fibers.push_back(std::move(fiber));
            }
        }
        // Each warp in turn goes on as far as it can without the others, in odd rounds the last one first: no order that code without a barrier may rely on.
        const int warps = threads / 32;
        for (long round = 0, running = 1; running > 0; round++) {
            running = 0;
            for (int i = 0; i < cluster_size * warps; i++) {
                const int at = round % 2 ? cluster_size * warps - 1 - i : i;
                block = &cluster[at / warps];
                running += run_warp(block->fibers.data() + at % warps * 32);
            }
        }
        block = nullptr;
    }
}

inline char* shared_memory(Block& of) {
    const auto address = reinterpret_cast<uintptr_t>(of.shared.data());
    return reinterpret_cast<char*>((address + 127) / 128 * 128);
}

inline size_t place(const void* p) { return size_t(static_cast<const char*>(p) - shared_memory(*block)); }

inline void complete(TransactionBarrier& barrier) {
    if (barrier.missing == 0 && barrier.bytes == 0) barrier.missing = barrier.count, barrier.generation++;
}

// What all lanes of a warp pass, for as long as the caller is at no other meeting.
template <class X>
struct Exchanged {
    const unsigned char (*slots)[64];
    const X& operator[](int lane) const { return *reinterpret_cast<const X*>(slots[lane]); }
};

template <class X>
Exchanged<X> exchange(const X& mine) {
    static_assert(sizeof(X) <= 64 && alignof(X) <= 16);
    Warp& warp = block->warps[block->current->index / 32];
    auto& slots = warp.slots[warp.meet.generation % 2];
    new (slots[block->current->index % 32]) X(mine);
    meet(warp.meet, 32);
    return {slots};
}

}  // namespace simt

inline int thread_index() { return simt::block->current->index; }
inline int fresh_thread_index() { return thread_index(); }
template <class X>
void forget(X&) {}
inline int block_index() { return simt::block->index; }
inline int block_count() { return simt::block->count; }
inline void block_barrier() { simt::meet(simt::block->barrier, int(simt::block->fibers.size())); }
inline void warp_barrier() { simt::meet(simt::block->warps[simt::block->current->index / 32].meet, 32); }
inline int block_size() { return int(simt::block->fibers.size()); }
template <int kThreads>
void named_barrier(int number) { simt::meet(simt::block->named_barriers[number], kThreads); }
template <int kThreads>
void named_barrier_arrive(int number) { simt::arrive(simt::block->named_barriers[number], kThreads); }
inline void group_barrier(int group) { named_barrier<256>(1 + group); }
template <int kCount, int kLaunched>
inline void own_registers() {}
inline char* shared_memory() { return simt::shared_memory(*simt::block); }

inline int cluster_rank() { return simt::block->rank; }
inline void cluster_barrier() {
    auto& cluster = *simt::block->cluster;
    simt::meet(cluster[0].cluster_meeting, int(cluster.size() * cluster[0].fibers.size()));
}
struct TransactionBarrier { uint64_t state; };
inline simt::TransactionBarrier& barrier_of(simt::Block& block, const TransactionBarrier* p) { return block.transaction_barriers.at(simt::place(p)); }
inline void barrier_start(TransactionBarrier* p, int arrivals) {
    simt::TransactionBarrier& barrier = simt::block->transaction_barriers[simt::place(p)];
    barrier.count = barrier.missing = arrivals;
}
inline void barrier_expect(TransactionBarrier* p, int bytes) {
    auto& barrier = barrier_of(*simt::block, p);
    barrier.bytes += bytes, barrier.missing--;
    simt::complete(barrier);
}
inline void barrier_arrive(int rank, TransactionBarrier* p) {
    auto& barrier = barrier_of((*simt::block->cluster)[rank], p);
    barrier.missing--;
    simt::complete(barrier);
}
template <class Word>
void store_to_block(int rank, Word* to, Word value, TransactionBarrier* p) {
    simt::Block& target = (*simt::block->cluster)[rank];
    simt::Delivery delivery{simt::shared_memory(target) + simt::place(to), {}, int(sizeof(Word))};
    std::memcpy(delivery.value, &value, sizeof(Word));
    barrier_of(target, p).deliveries.push_back(delivery);
}
template <class Word>
void store_in_cluster(int rank, int own, Word* to, Word value, TransactionBarrier* p) {
    if (rank == own)
        *to = value;
    else
        store_to_block(rank, to, value, p);
}
inline void barrier_wait(TransactionBarrier* p, int parity) {
    auto& barrier = barrier_of(*simt::block, p);
    for (;;) {
        for (const simt::Delivery& delivery : barrier.deliveries) {
            std::memcpy(delivery.to, delivery.value, delivery.bytes);
            barrier.bytes -= delivery.bytes;
        }
        barrier.deliveries.clear();
        simt::complete(barrier);
        if (barrier.generation % 2 != parity) return;
        simt::poll();
    }
}

inline void add_to_global(float4* p, float4 v) { p->x += v.x, p->y += v.y, p->z += v.z, p->w += v.w; }

inline float float_from_bits(u32 x) { float f; std::memcpy(&f, &x, 4); return f; }
inline u32 bits_from_float(float x) { u32 u; std::memcpy(&u, &x, 4); return u; }
inline float square_root(float x) { return std::sqrt(x); }
inline void fast_sine_cosine(float x, float& sine, float& cosine) { sine = std::sin(x), cosine = std::cos(x); }
inline float power_of_two(int exponent) { return float_from_bits(u32(exponent + 127) << 23); }

inline uint16_t half_bits(float x) { const _Float16 h = static_cast<_Float16>(x); uint16_t b; std::memcpy(&b, &h, 2); return b; }
inline float half_value(uint16_t b) { _Float16 h; std::memcpy(&h, &b, 2); return static_cast<float>(h); }
inline u32 pack(float low, float high) { return half_bits(low) | u32(half_bits(high)) << 16; }
inline float low_half(u32 x) { return half_value(uint16_t(x)); }
inline float high_half(u32 x) { return half_value(uint16_t(x >> 16)); }
inline u32 multiply2(u32 a, u32 b) { return pack(low_half(a) * low_half(b), high_half(a) * high_half(b)); }
inline u32 multiply_add2(u32 a, u32 b, u32 c) {
    return pack(low_half(a) * low_half(b) + low_half(c), high_half(a) * high_half(b) + high_half(c));
}
inline u32 add2(u32 a, u32 b) { return pack(low_half(a) + low_half(b), high_half(a) + high_half(b)); }
inline u32 subtract2(u32 a, u32 b) { return pack(low_half(a) - low_half(b), high_half(a) - high_half(b)); }
inline u32 negate2(u32 a) { return a ^ 0x80008000u; }
inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    u32 result = 0;
    for (int i = 0; i < 4; i++) result |= u32(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
inline u32 join_low(u32 a, u32 b) { return (a & 0xffffu) | b << 16; }
inline u32 join_high(u32 a, u32 b) { return a >> 16 | (b & 0xffff0000u); }

inline void matrix_multiply_add(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    struct Operands { float a[4][2], b[2][2]; };
    const auto all = simt::exchange(Operands{{{low_half(a0), high_half(a0)}, {low_half(a1), high_half(a1)}, {low_half(a2), high_half(a2)}, {low_half(a3), high_half(a3)}},
                                             {{low_half(b0), high_half(b0)}, {low_half(b1), high_half(b1)}}});
    const int lane = thread_index() % 32;
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = 0.f;
        for (int k = 0; k < 16; k++) sum += all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)][k % 2] * all[column * 4 + k % 8 / 2].b[k / 8][k % 2];
        d[i] += sum;
    }
}

inline void matrix_multiply_add(u32 (&d)[2], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    float sum[4] = {low_half(d[0]), high_half(d[0]), low_half(d[1]), high_half(d[1])};
    matrix_multiply_add(sum, a0, a1, a2, a3, b0, b1);
    d[0] = pack(sum[0], sum[1]), d[1] = pack(sum[2], sum[3]);
}

template <class X>
X shuffle(X x, int lane) { return simt::exchange(x)[lane & 31]; }
template <class X>
X shuffle_xor(X x, int mask) { return shuffle(x, (thread_index() % 32) ^ mask); }
inline u32 high_product(u32 a, u32 b) { return u32(uint64_t(a) * b >> 32); }
inline bool warp_any(bool x) {
    const auto all = simt::exchange(x);
    bool any = false;
    for (int i = 0; i < 32; i++) any |= all[i];
    return any;
}
inline u32 warp_maximum(u32 x) {
    const auto all = simt::exchange(x);
    u32 largest = 0;
    for (int i = 0; i < 32; i++) largest = std::max(largest, all[i]);
    return largest;
}
inline u32 warp_sum(u32 x) {
    const auto all = simt::exchange(x);
    u32 sum = 0;
    for (int i = 0; i < 32; i++) sum += all[i];
    return sum;
}
inline void atomic_maximum(u32* shared, u32 x) { if (x > *shared) *shared = x; }

template <int kBytes>
void copy_async(void* to, const void* from, int valid) {
    if (reinterpret_cast<uintptr_t>(to) % kBytes || (valid > 0 && reinterpret_cast<uintptr_t>(from) % kBytes)) throw std::runtime_error("misaligned copy");
    simt::block->current->groups.back().push_back({to, from, kBytes, valid});
}
template <int kBytes>
void copy_async(void* to, const void* from) { copy_async<kBytes>(to, from, kBytes); }
inline void copy_async_once(void* to, const void* from, int valid) { copy_async<16>(to, from, valid); }
inline void prefetch(const void*) {}
// What is read after all is not what it was.
inline void discard(const void* p) { std::memset(const_cast<void*>(p), 0xff, 128); }
inline void copy_async_commit() { simt::block->current->groups.emplace_back(); }
template <int kPending>
void copy_async_wait() {
    auto& groups = simt::block->current->groups;
    while (int(groups.size()) > kPending + 1) {
        for (const simt::Copy& c : groups.front()) {
            std::memset(c.to, 0, c.bytes);
            if (c.valid > 0) std::memcpy(c.to, c.from, c.valid);
        }
        groups.pop_front();
    }
}

inline uint4 load_shared_by_blocks(const uint4* p) { return *p; }
inline uint2 load_shared_by_blocks(const uint2* p) { return *p; }
inline void store_for_blocks(uint4* p, uint4 v) { *p = v; }
inline u32 take_ticket(u32* counter) { return (*counter)++; }
inline u32 take_ticket_in_order(u32* counter) { return (*counter)++; }
inline void add_release(u32* counter) { ++*counter; }
inline void fence() {}
inline u32 load_relaxed(const u32* counter) { return *counter; }
// Blocks run one after the other: only the other teams of this one can bring what is not there yet.
inline void wait_acquire(const u32* counter, u32 count) {
    for (int turns = 0; turns < 1000000; turns++) {
        if (*counter >= count) return;
        simt::poll();
    }
    std::fprintf(stderr, "a block waits for ever: a counter is at %u and was to be %u\n", *counter, count);
    std::abort();
}

inline uint4 load_table(const uint4* p) { return *p; }
inline uint4 load_spectrum(const uint4* p) { return *p; }
template <class Word>
Word load_streaming(const Word* p) { return *p; }
template <class Word>
Word load_streaming_if(bool really, const Word* p, Word otherwise) { return really ? *p : otherwise; }

struct Pair { float x, y; };
template <bool kFirst, class A, class B> struct Choose { using type = A; };
template <class A, class B> struct Choose<false, A, B> { using type = B; };
template <class X> struct RemoveConst { using type = X; };
template <class X> struct RemoveConst<const X> { using type = X; };
template <class Element> struct PairWord { using type = u32; };
template <> struct PairWord<float> { using type = uint2; };

inline float widen_one(bfloat16 x) { return float_from_bits(u32(x.bits) << 16); }
inline float widen_one(float16 x) { return half_value(x.bits); }
inline float widen_one(float x) { return x; }
inline Pair widen(const bfloat16*, u32 w) { return {float_from_bits(w << 16), float_from_bits(w & 0xffff0000u)}; }
inline Pair widen(const float16*, u32 w) { return {low_half(w), high_half(w)}; }
inline Pair widen(const float*, uint2 w) { return {float_from_bits(w.x), float_from_bits(w.y)}; }
inline void narrow_one(bfloat16* p, float x) {
    const u32 b = bits_from_float(x);
    p->bits = std::isnan(x) ? 0x7fc0 : uint16_t((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}
inline void narrow_one(float16* p, float x) { p->bits = half_bits(x); }
inline void narrow_one(float* p, float x) { *p = x; }
template <class Element>
u32 narrow(const Element*, float x, float y) {
    Element pair[2];
    u32 word;
    narrow_one(pair, x), narrow_one(pair + 1, y);
    std::memcpy(&word, pair, 4);
    return word;
}
inline uint2 narrow(const float*, float x, float y) { return {bits_from_float(x), bits_from_float(y)}; }
template <class Element>
auto two_ones(const Element* p) { return narrow(p, 1.f, 1.f); }
template <class Element>
u32 ones(const Element* p) {
    const auto both = two_ones(p);
    u32 word;
    std::memcpy(&word, &both, 4);
    return word;
}
template <class Element>
void narrow_two(Element* p, float x, float y) { narrow_one(p, x), narrow_one(p + 1, y); }
template <bool kOnce, class Element>
void narrow_two_if(bool really, Element* p, float x, float y) { if (really) narrow_two(p, x, y); }

// The few machine operations that the kernels are written in: packed half arithmetic, matrix products, asynchronous copies, barriers.
// Words of type u32 hold two half-precision numbers. The CPU build of the kernels (tests/simt) supplies the same names.
#pragma once
#ifndef __CUDACC__
#include "simt_primitives.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

using u32 = uint32_t;
using bfloat16 = __nv_bfloat16;
using float16 = __half;
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
// What few calls need: its registers and addresses are nothing to the code around it. Not so where warps have registers of their own.
#ifdef OWN_REGISTERS
#define RARE static DEVICE
#else
#define RARE static __device__ __noinline__
#endif

DEVICE int thread_index() { return threadIdx.x; }
// The same for rare work in a loop: what follows from it is computed there, and not ahead of the loop to be parked.
DEVICE int fresh_thread_index() {
    int index;
    asm volatile("mov.u32 %0, %tid.x;" : "=r"(index));
    return index;
}
// The compiler forgets what it knows of x: what follows from it is computed where it is used, and not ahead of a loop to be parked.
DEVICE void forget(int& x) { asm volatile("" : "+r"(x)); }
template <class X>
DEVICE void forget(X*& p) { asm volatile("" : "+l"(p)); }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_count() { return gridDim.x; }
DEVICE int block_size() { return blockDim.x; }
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
// Barriers beside the block's, by number from 1 on. Threads that only arrive do not wait for the others.
template <int kThreads>
DEVICE void named_barrier(int number) { asm volatile("bar.sync %0, %1;" :: "r"(number), "n"(kThreads) : "memory"); }
template <int kThreads>
DEVICE void named_barrier_arrive(int number) { asm volatile("bar.arrive %0, %1;" :: "r"(number), "n"(kThreads) : "memory"); }
// For the 256 threads of one group of eight warps.
DEVICE void group_barrier(int group) {
    if (block_size() == 256)
        __syncthreads();
    else
        named_barrier<256>(1 + group);
}
// How many registers the threads of a warp have from here on: first those of some warps get fewer, then those of others more. All the code for them must
// be in place, without calls. Where the architecture has no such thing, all keep what they are launched with.
template <int kCount, int kLaunched>
DEVICE void own_registers() {
#ifndef OWN_REGISTERS
    static_assert(kCount == kLaunched, "calls keep warps from having registers of their own");
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
    if constexpr (kCount > kLaunched)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(kCount));
    else if constexpr (kCount < kLaunched)
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(kCount));
#endif
}

DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

// Clusters of thread blocks, which reach into each other's shared memory: a block's rank, and for all their threads a barrier. Such code runs from
// compute capability 9.0 on; for others it is compiled to nothing.
#if __CUDA_ARCH__ >= 900
#define CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
#else
#define CLUSTER_ASM(...)
#endif
DEVICE int cluster_rank() {
    u32 rank = 0;
    CLUSTER_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE void cluster_barrier() {
    CLUSTER_ASM("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
// What lies in the same place in the shared memory of another block.
DEVICE u32 address_in_block(int rank, const void* p) {
    u32 address = 0;
    CLUSTER_ASM("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
    return address;
}
// A barrier in shared memory that waits, in phases of alternating parity, for arrivals and for so many bytes as they expect.
struct TransactionBarrier {
    uint64_t state;
};
DEVICE void barrier_start(TransactionBarrier* p, int arrivals) {
    CLUSTER_ASM("mbarrier.init.shared::cta.b64 [%0], %1; fence.mbarrier_init.release.cluster;" :: "r"(shared_address(p)), "r"(arrivals) : "memory");
}
DEVICE void barrier_expect(TransactionBarrier* p, int bytes) {
    CLUSTER_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(p)), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(int rank, TransactionBarrier* p) {
    CLUSTER_ASM("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(address_in_block(rank, p)) : "memory");
}
DEVICE void barrier_wait(TransactionBarrier* p, int parity) {
    CLUSTER_ASM("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }"
                :: "r"(shared_address(p)), "r"(parity) : "memory");
}
// A store to another block, which counts for its barrier.
DEVICE void store_to_block(int rank, u32* to, u32 v, TransactionBarrier* p) {
    CLUSTER_ASM("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
                :: "r"(address_in_block(rank, to)), "r"(v), "r"(address_in_block(rank, p)) : "memory");
}

// The same to any block: to this one, `own`, nothing is counted.
DEVICE void store_in_cluster(int rank, int own, uint4* to, uint4 v, TransactionBarrier* p) {
    CLUSTER_ASM("{ .reg .pred here; setp.eq.s32 here, %0, %1; @here st.shared.v4.b32 [%2], {%4, %5, %6, %7};"
                "@!here st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%3], {%4, %5, %6, %7}, [%8]; }"
                :: "r"(rank), "r"(own), "r"(shared_address(to)), "r"(address_in_block(rank, to)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(address_in_block(rank, p)) : "memory");
}
DEVICE void store_in_cluster(int rank, int own, uint2* to, uint2 v, TransactionBarrier* p) {
    CLUSTER_ASM("{ .reg .pred here; setp.eq.s32 here, %0, %1; @here st.shared.v2.b32 [%2], {%4, %5};"
                "@!here st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%3], {%4, %5}, [%6]; }"
                :: "r"(rank), "r"(own), "r"(shared_address(to)), "r"(address_in_block(rank, to)), "r"(v.x), "r"(v.y), "r"(address_in_block(rank, p)) : "memory");
}

// Adds up in the L2 cache. What one thread stores and adds in one place comes in that order, as far as a barrier lies between; reads may pass it.
DEVICE void add_to_global(float4* p, float4 v) {
    CLUSTER_ASM("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" :: "l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w));
}

DEVICE u32 as_word(__half2 x) { return *reinterpret_cast<u32*>(&x); }
DEVICE __half2 as_half2(u32 x) { return *reinterpret_cast<__half2*>(&x); }
DEVICE u32 pack(float low, float high) { return as_word(__floats2half2_rn(low, high)); }
DEVICE float low_half(u32 x) { return __low2float(as_half2(x)); }
DEVICE float high_half(u32 x) { return __high2float(as_half2(x)); }
DEVICE u32 multiply2(u32 a, u32 b) { return as_word(__hmul2(as_half2(a), as_half2(b))); }
DEVICE u32 multiply_add2(u32 a, u32 b, u32 c) { return as_word(__hfma2(as_half2(a), as_half2(b), as_half2(c))); }
DEVICE u32 add2(u32 a, u32 b) { return as_word(__hadd2(as_half2(a), as_half2(b))); }
DEVICE u32 subtract2(u32 a, u32 b) { return as_word(__hsub2(as_half2(a), as_half2(b))); }
DEVICE u32 negate2(u32 a) { return as_word(__hneg2(as_half2(a))); }
// Four of the bytes 0 to 3 of a and 4 to 7 of b, by the four low digits of the selector.
DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
DEVICE u32 join_low(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
DEVICE u32 join_high(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

// D += A B with A 16x16 (row major fragments), B 16x8, D 16x8: one warp, half-precision operands, single-precision sums.
DEVICE void matrix_multiply_add(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same with sums in half precision, which come out packed: the fragment of a next product. Its one more rounding, of the sum so far where
// products are chained, costs less than the packing would.
DEVICE void matrix_multiply_add(u32 (&d)[2], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
        : "+r"(d[0]), "+r"(d[1]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <class X>
DEVICE X shuffle_xor(X x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
template <class X>
DEVICE X shuffle(X x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE u32 high_product(u32 a, u32 b) { return __umulhi(a, b); }
DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }

// Copies kBytes from global to shared memory without waiting; bytes from `valid` on are filled with zeros.
template <int kBytes>
DEVICE void copy_async(void* to, const void* from, int valid) {
    const u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(address), "l"(from), "r"(valid) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" :: "r"(address), "l"(from), "n"(kBytes), "r"(valid) : "memory");
}
template <int kBytes>
DEVICE void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], %2;" :: "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from), "n"(kBytes) : "memory");
}
// The same for what will not be read again, which leaves the L2 cache first.
DEVICE void copy_async_once(void* to, const void* from, int valid) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
                 :: "r"(static_cast<u32>(__cvta_generic_to_shared(to))), "l"(from), "r"(valid), "l"(policy) : "memory");
}
// A line on its way into the L2 cache.
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" :: "l"(p)); }
// A line of 128 bytes whose contents are of no more use: it leaves the L2 cache without being written to memory.
DEVICE void discard(const void* p) { asm volatile("discard.global.L2 [%0], 128;" :: "l"(p) : "memory"); }
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(kPending) : "memory"); }

DEVICE u32 warp_maximum(u32 x) { return __reduce_max_sync(0xffffffffu, x); }
DEVICE u32 warp_sum(u32 x) { return __reduce_add_sync(0xffffffffu, x); }
DEVICE void atomic_maximum(u32* shared, u32 x) { atomicMax(shared, x); }

// Constants, which should stay in the L1 cache; volatile keeps the compiler from holding them in registers across a tile instead.
DEVICE uint4 load_table(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::evict_last.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

DEVICE uint4 load_spectrum(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// What other blocks of the same launch have written lies in the L2 cache; the L1 cache may hold older values.
DEVICE uint4 load_shared_by_blocks(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
DEVICE uint2 load_shared_by_blocks(const uint2* p) {
    uint2 v;
    asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}
DEVICE void store_for_blocks(uint4* p, uint4 v) {
    asm volatile("st.global.cg.v4.u32 [%0], {%1,%2,%3,%4};" :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Counters by which the blocks of a launch wait for each other's results.
DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
DEVICE u32 take_ticket(u32* counter) { return atomicAdd(counter, 1u); }
// The same after all that the thread has written or, at a barrier before, seen written, and before all that it reads.
DEVICE u32 take_ticket_in_order(u32* counter) {
    u32 ticket;
    fence();
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(ticket) : "l"(counter) : "memory");
    return ticket;
}
DEVICE void add_release(u32* counter) {
    fence();
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" :: "l"(counter) : "memory");
}
DEVICE u32 load_relaxed(const u32* counter) {
    u32 v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
    return v;
}
DEVICE void wait_acquire(const u32* counter, u32 count) {
    for (;;) {
        u32 v;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory");
        if (v >= count) return;
        __nanosleep(64);
    }
}

DEVICE float float_from_bits(u32 x) { return __uint_as_float(x); }
DEVICE u32 bits_from_float(float x) { return __float_as_uint(x); }

DEVICE float square_root(float x) { return sqrtf(x); }
// Of an angle from -pi to pi, to a few 2^-22.
DEVICE void fast_sine_cosine(float x, float& sine, float& cosine) { sine = __sinf(x), cosine = __cosf(x); }
DEVICE float power_of_two(int exponent) { return __uint_as_float(u32(exponent + 127) << 23); }

struct Pair { float x, y; };
template <bool kFirst, class A, class B> struct Choose { using type = A; };
template <class A, class B> struct Choose<false, A, B> { using type = B; };
template <class X> struct RemoveConst { using type = X; };
template <class X> struct RemoveConst<const X> { using type = X; };
template <class Element> struct PairWord { using type = u32; };
template <> struct PairWord<float> { using type = uint2; };
// Tensor elements that are read once.
DEVICE u32 load_streaming(const u32* p) {
    u32 v;
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
DEVICE uint2 load_streaming(const uint2* p) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

// The same where there is something, and another word elsewhere, by predicated instructions.
DEVICE u32 load_streaming_if(bool really, const u32* p, u32 otherwise) {
    u32 v = otherwise;
    asm("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p ld.global.nc.L1::no_allocate.u32 %0, [%2]; }" : "+r"(v) : "r"(u32(really)), "l"(p));
    return v;
}
DEVICE uint2 load_streaming_if(bool really, const uint2* p, uint2 otherwise) {
    uint2 v = otherwise;
    asm("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%3]; }" : "+r"(v.x), "+r"(v.y) : "r"(u32(really)), "l"(p));
    return v;
}
DEVICE uint4 load_streaming_if(bool really, const uint4* p, uint4 otherwise) {
    uint4 v = otherwise;
    asm("{ .reg .pred p; setp.ne.u32 p, %4, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%5]; }"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "r"(u32(really)), "l"(p));
    return v;
}

// Two neighbouring elements of a tensor, as single precision.
DEVICE Pair widen(const bfloat16*, u32 w) { return {__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u)}; }
DEVICE Pair widen(const float16*, u32 w) { return {low_half(w), high_half(w)}; }
DEVICE Pair widen(const float*, uint2 w) { return {__uint_as_float(w.x), __uint_as_float(w.y)}; }
DEVICE float widen_one(bfloat16 x) { return __bfloat162float(x); }
DEVICE float widen_one(float16 x) { return __half2float(x); }
DEVICE float widen_one(float x) { return x; }
DEVICE void narrow_one(bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
DEVICE void narrow_one(float16* p, float x) { *p = __float2half_rn(x); }
DEVICE void narrow_one(float* p, float x) { *p = x; }
// The same by a predicated instruction, without a branch around what was computed for it.
DEVICE void store_if(bool really, u32* p, u32 x) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.u32 [%1], %2; }" :: "r"(u32(really)), "l"(p), "r"(x) : "memory");
}
DEVICE void store_if(bool really, uint2* p, uint2 x) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.v2.u32 [%1], {%2,%3}; }" :: "r"(u32(really)), "l"(p), "r"(x.x), "r"(x.y) : "memory");
}
// The same for what is not read again by the kernel.
DEVICE void store_once_if(bool really, u32* p, u32 x) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.cs.u32 [%1], %2; }" :: "r"(u32(really)), "l"(p), "r"(x) : "memory");
}
DEVICE void store_once_if(bool really, uint2* p, uint2 x) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.cs.v2.u32 [%1], {%2,%3}; }" :: "r"(u32(really)), "l"(p), "r"(x.x), "r"(x.y) : "memory");
}
// A word of ones.
DEVICE u32 ones(const bfloat16*) { return 0x3f803f80u; }
DEVICE u32 ones(const float16*) { return 0x3c003c00u; }
DEVICE u32 ones(const float*) { return 0x3f800000u; }
template <class Element>
DEVICE typename PairWord<Element>::type two_ones(const Element* p) {
    const u32 one = ones(p);
    if constexpr (sizeof(Element) == 2)
        return one;
    else
        return make_uint2(one, one);
}
DEVICE u32 narrow(const bfloat16*, float x, float y) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<const u32*>(&v);
}
DEVICE u32 narrow(const float16*, float x, float y) { return pack(x, y); }
DEVICE uint2 narrow(const float*, float x, float y) { return make_uint2(__float_as_uint(x), __float_as_uint(y)); }
template <class Element>
DEVICE void narrow_two(Element* p, float x, float y) { *reinterpret_cast<typename PairWord<Element>::type*>(p) = narrow(p, x, y); }
template <bool kOnce, class Element>
DEVICE void narrow_two_if(bool really, Element* p, float x, float y) {
    const auto to = reinterpret_cast<typename PairWord<Element>::type*>(p);
    kOnce ? store_once_if(really, to, narrow(p, x, y)) : store_if(really, to, narrow(p, x, y));
}
#endif

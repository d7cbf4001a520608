// The Fourier transform of a tile as matrix products, after FlashFFTConv (arXiv 2311.05908, section 3.1).
//
//   N = radix * 16 * 16,  n = 256 n1 + 16 n2 + n3,  f = k1 + radix (k2 + 16 k3)
//
// The outer stage contracts n1 (all rows, across warps), the inner stages n2 and n3 (one row, one warp, in registers). Values travel as planar
// pairs: one word holds the real parts of two points, the next word their imaginary parts. Accumulators of one product are, once packed, the
// fragment of the next: after a product with the data as B a pair is two columns, and columns are what the following product with the data as
// A contracts; there a pair is two outputs, and these are what the inverse stage with the data as B contracts.
// Index maps of a lane with r = lane / 4, q = lane % 4 (i = half of a pair):
//   n2, k3 = q + 4 s + 8 i  for fragment s;     k2, n3 = 2 row + t  for fragment t (row = r in A and D rows, 2 q + i in D columns)
// All stages are unitary. An inverse transform is the forward one between two conjugations: the first is a part of the product with the
// spectrum, the second of the last stage, whose matrix gives second sequences with the opposite sign.
//
// Two sequences of N positions that share a transform are its real and its imaginary part, and are convolved on a circle of N points. Folded, one of N
// positions has it alone: the transform is taken at the frequencies f + 1/4, where w^N = -i (w = w_N^(f + 1/4)). So the inverse of a product of transforms,
//
//   sum over n < 2 N of y[n] w^n = sum over n < N of (y[n] - i y[N + n]) w^n,
//
// has the first half of the linear convolution y of two such sequences as its real part; and a tap before the start, w^-n = i w^(N - n), is an imaginary
// one at the end (the right-angle convolution of Crandall and Fagin, Discrete weighted transforms, 1994). A quarter costs nothing: it is a part of k1,
// in the matrices of the outer stage and the twiddles of the rows. What these matrices take as real and imaginary parts are the halves of the sequence,
// which are the first and the second sequence of a pair, too: all but the constants and the places of the sequences is the same.
#pragma once
#include "tile.cuh"

struct PlanarPair {
    u32 re, im;
};

// Sums of a product. In half precision where they are a fragment of the next product, or too many for the registers. Of an outer stage, those of one
// slot and one column pair: (re, im) at columns a + t and a + 128 + t.
struct SingleSums {
    float d[4] = {};
    DEVICE float re(int half) const { return d[2 * half]; }
    DEVICE float im(int half) const { return d[2 * half + 1]; }
    DEVICE u32 word(int half) const { return pack(re(half), im(half)); }
};
struct HalfSums {
    u32 d[2] = {};
    DEVICE float re(int half) const { return low_half(d[half]); }
    DEVICE float im(int half) const { return high_half(d[half]); }
    DEVICE u32 word(int half) const { return d[half]; }
};

DEVICE PlanarPair operator+(PlanarPair x, PlanarPair y) { return {add2(x.re, y.re), add2(x.im, y.im)}; }
DEVICE PlanarPair operator-(PlanarPair x, PlanarPair y) { return {subtract2(x.re, y.re), subtract2(x.im, y.im)}; }

// x + t and x - t with t = y exp(-2 pi i index / 16), for an index below 8 that is known at compile time. Of a product nothing is rounded but the sums.
DEVICE void add_turned(PlanarPair& sum, PlanarPair& difference, PlanarPair x, PlanarPair y, int index) {
    constexpr float kCosines[4] = {1.f, 0.92387953251128676f, 0.70710678118654752f, 0.38268343236508977f};
    if (index / 4 == 1) y = {y.im, negate2(y.re)};
    if (index % 4 == 0) {
        sum = x + y, difference = x - y;
    } else {
        const u32 cosine = pack(kCosines[index % 4], kCosines[index % 4]), sine = pack(kCosines[4 - index % 4], kCosines[4 - index % 4]);
        auto fused = [&](u32 c, u32 s) {
            return PlanarPair{multiply_add2(y.im, s, multiply_add2(y.re, c, x.re)), multiply_add2(y.im, c, multiply_add2(negate2(y.re), s, x.im))};
        };
        sum = fused(cosine, sine), difference = fused(negate2(cosine), negate2(sine));
    }
}

// (re, im) * (w.re, w.im) for two points.
DEVICE PlanarPair operator*(PlanarPair x, PlanarPair w) {
    return {multiply_add2(x.re, w.re, negate2(multiply2(x.im, w.im))), multiply_add2(x.re, w.im, multiply2(x.im, w.re))};
}

// conj(x * w)
DEVICE PlanarPair conjugate_product(PlanarPair x, PlanarPair w) {
    return {multiply_add2(x.re, w.re, negate2(multiply2(x.im, w.im))), multiply_add2(negate2(x.re), w.im, negate2(multiply2(x.im, w.re)))};
}

// conj(x) * w
DEVICE PlanarPair product_of_conjugate(PlanarPair x, PlanarPair w) {
    return {multiply_add2(x.re, w.re, multiply2(x.im, w.im)), multiply_add2(x.re, w.im, negate2(multiply2(x.im, w.re)))};
}

// sum += conj(x * w)
DEVICE void add_conjugate_product(PlanarPair& sum, PlanarPair x, PlanarPair w) {
    sum = {multiply_add2(x.re, w.re, multiply_add2(negate2(x.im), w.im, sum.re)), multiply_add2(negate2(x.re), w.im, multiply_add2(negate2(x.im), w.re, sum.im))};
}

// The constant operands of the inner stages: DFT-16 matrices as A and as B operand, and the twiddles w256^(k2 n3), read from shared memory where
// they are used. Operands of a matrix product are whole register groups, so that no move is needed in front of it.
struct InnerTables {
    using Sums = HalfSums;
    const uint4* table;
    int lane;

    DEVICE uint4 a(int m, int s) const { return table[(2 * m + s) * 32 + lane]; }
    DEVICE uint4 b(int h, int t) const { return table[(4 + 2 * h + t) * 32 + lane]; }    // of the real, then of the imaginary part
    DEVICE uint4 twiddle(int m) const { return table[(8 + m) * 32 + lane]; }
};

// The same for stages whose sums are rounded once. Outputs in bfloat16 are not the better for it.
struct PreciseInnerTables : InnerTables {
    using Sums = SingleSums;
};
template <class Element> struct NeededInnerTables { using type = PreciseInnerTables; };
template <> struct NeededInnerTables<bfloat16> { using type = InnerTables; };

// The same as the first, kept in registers.
struct InnerConstants {
    using Sums = HalfSums;
    uint4 a_[2][2], b_[2][2], twiddle_[2];

    DEVICE explicit InnerConstants(const InnerTables& tables) {
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++) a_[i][j] = tables.a(i, j), b_[i][j] = tables.b(i, j);
        for (int i = 0; i < 2; i++) twiddle_[i] = tables.twiddle(i);
    }
    DEVICE uint4 a(int m, int s) const { return a_[m][s]; }
    DEVICE uint4 b(int h, int t) const { return b_[h][t]; }
    DEVICE uint4 twiddle(int m) const { return twiddle_[m]; }
};
constexpr int kInnerConstantVectors = 320;

// weight * conj(x) y, for the two points of a pair: (re, im, re, im).
DEVICE float4 weighted_product_of_conjugate(PlanarPair x, PlanarPair y, float weight) {
    const float y_re0 = low_half(y.re) * weight, y_im0 = low_half(y.im) * weight, y_re1 = high_half(y.re) * weight, y_im1 = high_half(y.im) * weight;
    return make_float4(low_half(x.re) * y_re0 + low_half(x.im) * y_im0, low_half(x.re) * y_im0 - low_half(x.im) * y_re0,
                       high_half(x.re) * y_re1 + high_half(x.im) * y_im1, high_half(x.re) * y_im1 - high_half(x.im) * y_re1);
}

// weight * x for the two points of a pair: (re, im, re, im).
DEVICE float4 weighted(PlanarPair x, float weight) {
    return make_float4(low_half(x.re) * weight, low_half(x.im) * weight, high_half(x.re) * weight, high_half(x.im) * weight);
}

DEVICE void accumulate(float4& sum, float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }

// A row of 256 points in the registers of a warp: value[s][t] with the index maps above.
struct RowFragment {
    PlanarPair value[2][2];

    // From or to a lane's first unit; its second is 32 beyond it.
    DEVICE void load(const uint4* units) {
        for (int s = 0; s < 2; s++) {
            const uint4 v = units[32 * s];
            value[s][0] = {v.x, v.y}, value[s][1] = {v.z, v.w};
        }
    }

    DEVICE uint4 vector(int s) const { return make_uint4(value[s][0].re, value[s][0].im, value[s][1].re, value[s][1].im); }
    DEVICE void store(uint4* units) const {
        for (int s = 0; s < 2; s++) units[32 * s] = vector(s);
    }

    DEVICE void conjugate_if(bool wanted) {
        const u32 signs = wanted ? 0x80008000u : 0;
        for (int s = 0; s < 2; s++)
            for (int t = 0; t < 2; t++) value[s][t].im ^= signs;
    }

    // What this lane has stored in global memory.
    DEVICE void load_again(const uint4* units) {
        for (int s = 0; s < 2; s++) {
            const uint4 v = load_shared_by_blocks(units + 32 * s);
            value[s][0] = {v.x, v.y}, value[s][1] = {v.z, v.w};
        }
    }

    DEVICE void load_twiddles(const uint4* units) {
        for (int s = 0; s < 2; s++) {
            const uint4 v = load_table(units + 32 * s);
            value[s][0] = {v.x, v.y}, value[s][1] = {v.z, v.w};
        }
    }

    DEVICE void load_spectrum(const uint4* units) {
        for (int s = 0; s < 2; s++) {
            const uint4 v = ::load_spectrum(units + 32 * s);
            value[s][0] = {v.x, v.y}, value[s][1] = {v.z, v.w};
        }
    }
};

DEVICE RowFragment operator*(const RowFragment& x, const RowFragment& w) {
    RowFragment z;
    for (int s = 0; s < 2; s++)
        for (int t = 0; t < 2; t++) z.value[s][t] = x.value[s][t] * w.value[s][t];
    return z;
}

DEVICE RowFragment operator+(const RowFragment& x, const RowFragment& y) {
    RowFragment z;
    for (int s = 0; s < 2; s++)
        for (int t = 0; t < 2; t++) z.value[s][t] = x.value[s][t] + y.value[s][t];
    return z;
}

DEVICE void add_turned(RowFragment& sum, RowFragment& difference, const RowFragment& x, const RowFragment& y, int index) {
    for (int s = 0; s < 2; s++)
        for (int t = 0; t < 2; t++) add_turned(sum.value[s][t], difference.value[s][t], x.value[s][t], y.value[s][t], index);
}

DEVICE RowFragment conjugate_product(const RowFragment& x, const RowFragment& w) {
    RowFragment z;
    for (int s = 0; s < 2; s++)
        for (int t = 0; t < 2; t++) z.value[s][t] = conjugate_product(x.value[s][t], w.value[s][t]);
    return z;
}

DEVICE RowFragment product_of_conjugate(const RowFragment& x, const RowFragment& w) {
    RowFragment z;
    for (int s = 0; s < 2; s++)
        for (int t = 0; t < 2; t++) z.value[s][t] = product_of_conjugate(x.value[s][t], w.value[s][t]);
    return z;
}

DEVICE void add_conjugate_product(RowFragment& sum, const RowFragment& x, const RowFragment& w) {
    for (int s = 0; s < 2; s++)
        for (int t = 0; t < 2; t++) add_conjugate_product(sum.value[s][t], x.value[s][t], w.value[s][t]);
}

// DFT-256 of rows in place: contracts value[s][t] over s and lane % 4 (data as B), multiplies by the twiddles, contracts over t and lane % 4
// (data as A). Several rows at a time give a warp independent work while it waits for a product.
template <int kCount, class Constants>
DEVICE void inner_transform(RowFragment (&x)[kCount], const Constants& constants) {
    PlanarPair z[kCount][2][2];
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const uint4 a[2] = {constants.a(m, 0), constants.a(m, 1)}, twiddle = constants.twiddle(m);
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
            for (int i = 0; i < kCount; i++) {
                typename Constants::Sums sums;
#pragma unroll
                for (int s = 0; s < 2; s++) matrix_multiply_add(sums.d, a[s].x, a[s].y, a[s].z, a[s].w, x[i].value[s][t].re, x[i].value[s][t].im);
                z[i][m][t] = PlanarPair{sums.word(0), sums.word(1)} * (t == 0 ? PlanarPair{twiddle.x, twiddle.y} : PlanarPair{twiddle.z, twiddle.w});
            }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint4 b[2] = {constants.b(h, 0), constants.b(h, 1)};
#pragma unroll
        for (int i = 0; i < kCount; i++) {
            typename Constants::Sums re, im;
#pragma unroll
            for (int t = 0; t < 2; t++) {
                const PlanarPair low = z[i][0][t], high = z[i][1][t];
                matrix_multiply_add(re.d, low.re, high.re, low.im, high.im, b[t].x, b[t].y);
                matrix_multiply_add(im.d, low.re, high.re, low.im, high.im, b[t].z, b[t].w);
            }
            for (int half = 0; half < 2; half++) x[i].value[h][half] = {re.word(half), im.word(half)};
        }
    }
}

template <class Constants>
DEVICE RowFragment inner_transform(const RowFragment& x, const Constants& constants) {
    RowFragment y[1] = {x};
    inner_transform(y, constants);
    return y[0];
}

// Where a row in shared memory keeps the unit of lane (r, q) of the outer stage, and those that a lane of a RowFragment reads, 32 apart. A warp of
// the outer stage has 128 neighbouring bytes of each of its rows; with their order neither it nor RowFragment meets a bank twice.
DEVICE int row_unit(int row, int warp, int lane) { return warp % 8 * 8 + (lane / 4 ^ ((warp ^ row) & 3) * 2); }
DEVICE int fragment_unit(int row, int lane) { return row_unit(row, lane % 4, lane); }

// Contracts kSlots values of each of a warp's 32 columns to 4 `tiles` outputs: lane (r, q) holds the columns a, a + 1, a + 128, a + 129 with
// a = 16 warp + 2 r, and x[j][c] is (re, im) of slot 4 j + q at column c. emit(n, d) gets output 4 n + q. The fewer pairs of outputs are unrolled, the fewer
// registers it takes.
template <int kSlots, int kUnrolled = 4, class Emit>
DEVICE void contract(const u32 (&x)[kSlots / 4][4], const uint4* table, int tiles, int lane, Emit emit) {
    constexpr int kSteps = kSlots / 8;
#pragma unroll kUnrolled
    for (int n = 0; n < tiles; n += 2) {
        SingleSums d[2][2];
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            const uint4 b = table[(n / 2 * kSteps + s) * 32 + lane];
#pragma unroll
            for (int t = 0; t < 2; t++) {
                matrix_multiply_add(d[0][t].d, x[2 * s][t], x[2 * s][2 + t], x[2 * s + 1][t], x[2 * s + 1][2 + t], b.x, b.y);
                matrix_multiply_add(d[1][t].d, x[2 * s][t], x[2 * s][2 + t], x[2 * s + 1][t], x[2 * s + 1][2 + t], b.z, b.w);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) emit(n + i, d[i]);
    }
}

// The same to 4 kTiles outputs that stay in registers, value[n] being what emit(n, .) gets above, from inputs that come in steps of eight:
// load(s, a) brings those of step s as operands, a[t] for the columns a + t and a + 128 + t. `table` holds `pairs_per_step` pairs of tiles a step.
template <int kTiles, class Sums, class Load>
DEVICE void contract_steps(Sums (&value)[kTiles][2], const uint4* table, int pairs_per_step, int steps, int lane, Load load) {
#pragma unroll 4
    for (int s = 0; s < steps; s++) {
        u32 a[2][4];
        load(s, a);
#pragma unroll
        for (int n = 0; n < kTiles; n += 2) {
            const uint4 b = table[(s * pairs_per_step + n / 2) * 32 + lane];
#pragma unroll
            for (int t = 0; t < 2; t++) {
                matrix_multiply_add(value[n][t].d, a[t][0], a[t][1], a[t][2], a[t][3], b.x, b.y);
                matrix_multiply_add(value[n + 1][t].d, a[t][0], a[t][1], a[t][2], a[t][3], b.z, b.w);
            }
        }
    }
}

// The four columns of an output, as rows keep them.
DEVICE uint4 packed(const SingleSums (&d)[2]) {
    return make_uint4(pack(d[0].re(0), d[0].re(1)), pack(d[0].im(0), d[0].im(1)), pack(d[1].re(0), d[1].re(1)), pack(d[1].im(0), d[1].im(1)));
}

// The outer stage: writes the rows.
template <class T, int kUnrolled = 4>
DEVICE void outer_forward(const u32 (&x)[T::kSlots / 4][4], uint4* rows, const uint4* table, int warp, int lane) {
    uint4* const words = rows + lane % 4 * kRowUnits + row_unit(lane, warp, lane);
    contract<T::kSlots, kUnrolled>(x, table, T::kRows / 4, lane, [&](int n, const SingleSums (&d)[2]) { words[4 * n * kRowUnits] = packed(d); });
}

// The inverse outer stage: value[n][t] belongs to slot 4 n + q.
template <class T, class Sums = SingleSums>
struct OuterResult {
    static constexpr int kTiles = T::kSlots / 4;
    Sums value[kTiles][2];

    DEVICE void add(const uint4* rows, const uint4* table, int warp, int lane) {
        const uint4* const words = rows + lane % 4 * kRowUnits + row_unit(lane, warp, lane);
        contract_steps(value, table, T::kSlots / 8, T::kRows / 8, lane, [&](int s, u32 (&a)[2][4]) {
            const uint4 v = words[8 * s * kRowUnits], w = words[(8 * s + 4) * kRowUnits];
            a[0][0] = join_low(v.x, v.y), a[0][1] = join_high(v.x, v.y), a[0][2] = join_low(w.x, w.y), a[0][3] = join_high(w.x, w.y);
            a[1][0] = join_low(v.z, v.w), a[1][1] = join_high(v.z, v.w), a[1][2] = join_low(w.z, w.w), a[1][3] = join_high(w.z, w.w);
        });
    }

    // The first or the second sequence of the pair.
    DEVICE Pair columns(int n, int half, int sequence) const {
        return sequence == 0 ? Pair{value[n][0].re(half), value[n][1].re(half)} : Pair{value[n][0].im(half), value[n][1].im(half)};
    }
};

// The row of all, k1, that is row `own` of a block in a cluster: each has kOwnRows of every kRows.
template <class T>
DEVICE int cluster_row(int rank, int own) {
    return rank * T::kOwnRows + own % T::kOwnRows + own / T::kOwnRows * T::kRows;
}

// Where the constants of a transform lie: in shared memory, for all teams of a block. The row twiddles, as large as the transform itself, join
// them where there is room and else stay in global memory and the L1 cache.
template <class T, bool kSharedTwiddles>
struct Tables {
    static constexpr int kOuterVectors = T::kRows / 8 * (T::kSlots / 8) * 32;
    static constexpr int kFixedVectors = kInnerConstantVectors + 2 * kOuterVectors;
    static constexpr int kSharedBytes = (kFixedVectors + (kSharedTwiddles ? T::kPairRows * 64 : 0)) * 16;
    const uint4 *inner, *outer, *outer_inverse, *twiddle;

    // They come asynchronously: a wait and a block barrier must follow. Where a cluster shares a transform, each block has the outer stage's for its
    // points, and the twiddles of its rows.
    DEVICE Tables(const u32* words, char* memory) {
        const uint4* global = reinterpret_cast<const uint4*>(words);
        uint4* shared = reinterpret_cast<uint4*>(memory);
        auto copy = [&](int to, int from, int count) {
            for (int i = thread_index(); i < count; i += block_size()) copy_async<16>(shared + to + i, global + from + i);
        };
        if constexpr (T::kCluster == 1) {
            copy(0, 0, kFixedVectors + (kSharedTwiddles ? T::kPairRows * 64 : 0));
        } else {
            const int rank = cluster_rank(), inverse = kInnerConstantVectors + T::kCluster * kOuterVectors, twiddles = inverse + T::kCluster * kOuterVectors;
            copy(0, 0, kInnerConstantVectors);
            copy(kInnerConstantVectors, kInnerConstantVectors + rank * kOuterVectors, kOuterVectors);
            copy(kInnerConstantVectors + kOuterVectors, inverse + rank * kOuterVectors, kOuterVectors);
            copy(kFixedVectors, twiddles + rank * T::kRows * 64, T::kRows * 64);
        }
        copy_async_commit();
        inner = shared;
        outer = inner + kInnerConstantVectors;
        outer_inverse = outer + kOuterVectors;
        twiddle = (kSharedTwiddles ? shared : global) + kFixedVectors;
    }

    DEVICE RowFragment row_twiddles(int k1, int lane) const {
        RowFragment twiddles;
        if constexpr (kSharedTwiddles)
            twiddles.load(twiddle + k1 * 64 + lane);
        else
            twiddles.load_twiddles(twiddle + k1 * 64 + lane);
        return twiddles;
    }
};

/* Native half of the CPU backend: dequantise a weight, and multiply rows by it, experts included.
 *
 * Plain C, no Python and no torch headers: native.py loads it with ctypes and passes addresses.
 * The instruction set (AVX-512, AVX2, NEON, portable C) is chosen when the library is loaded.
 * Threads are borrowed from the OpenMP runtime that torch uses: native.py hands its GOMP entry
 * points to saml_set_threads, so there is one pool, and nothing is linked here.
 *
 * The product works on a few rows of W at a time, in one of two ways. A few rows of x meet codes
 * that are decoded in registers. With more, the rows of W are decoded once to scratch in the first
 * cache, and all rows of x that fit the second meet them there. The dequantised weight is never
 * written anywhere else.
 *
 * Compile with -ffp-contract=off: dequantised values then equal the reference bit for bit.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { ABI = 3, MAX_SCALES = 1024 }; /* both stand in native.py too */
enum { ALONE = 48 * 1024 };          /* products that a thread makes rather than wait for another */
enum { CACHE = 384 * 1024 };         /* bytes of x at a time: half of a common second-level cache */
enum { STREAMED = 2 };               /* rows of x up to which B is best read in one stream */
enum { SMALL = 8 * 1024 };           /* floats of scratch that are taken from the stack */
enum { PORTABLE = 0, HAS_AVX2 = 1, HAS_AVX512 = 2, HAS_NEON = 3 };
enum { FOUR_BIT = 0, INT8 = 1, FLOAT32 = 2 };

typedef struct {
    const uint8_t *codes;
    const void *absmax;       /* float32, or uint8 where nested is set */
    const float *nested;      /* NULL without double quantisation */
    const float *offset;      /* one float */
    const float *nested_code; /* 256 floats */
    const float *table;       /* 16 floats, 4-bit formats only */
    int64_t block;            /* elements under one scale */
    int64_t columns;
    int format;
} Weight;

/* What one tile reads: `rows` rows of codes (or floats), their scales, `m` rows of x. */
typedef struct {
    const uint8_t *codes; /* of the first row */
    int64_t stride;       /* bytes from row to row */
    const float *scales;  /* scale_stride floats a row; for codes alone */
    int64_t scale_stride;
    const float *x;       /* [m, columns], in the order of the codes */
    const float *table;
    const uint8_t *planes; /* its 16 first bytes, its 16 second bytes, ... */
    int64_t columns;
    int shift;            /* group of 64 >> shift is its scale; -1: two scales a group */
    /* The experts' share, absent for the projection itself (experts = 0). */
    int64_t experts, rank;
    const float *hidden;  /* [m, experts * rank], rows hidden_stride apart */
    const float *lora_b;  /* of the first row; rows lora_row, experts lora_stride floats apart */
    int64_t hidden_stride, lora_row, lora_stride;
    const float *open;    /* [experts]: one that is 0 is not read */
} Tile;

#if defined(__x86_64__) && defined(__GNUC__)
#define SAML_X86 1
#include <immintrin.h>
#include "native_x86.h"
#elif defined(__aarch64__) && defined(__GNUC__)
#define SAML_NEON 1
#include <arm_neon.h>
#include "native_neon.h"
#endif

/* ---------------------------------------------------------------- threads */

typedef void (*Region)(void *);
static void (*pool_run)(Region, void *, unsigned, unsigned);
static void (*pool_barrier)(void);
static int (*pool_index)(void);
static int (*pool_size)(void);

void saml_set_threads(void *run, void *barrier, void *index, void *size) {
    memcpy(&pool_run, &run, sizeof run);
    memcpy(&pool_barrier, &barrier, sizeof barrier);
    memcpy(&pool_index, &index, sizeof index);
    memcpy(&pool_size, &size, sizeof size);
}

static void parallel(Region region, void *job, int threads) {
    if (pool_run && threads > 1)
        pool_run(region, job, (unsigned)threads, 0);
    else
        region(job);
}

/* This thread's half-open share of `count` items, in multiples of `grain`. */
static void share(int64_t count, int64_t grain, int threads, int64_t *begin, int64_t *end) {
    int64_t size = threads > 1 ? pool_size() : 1, index = threads > 1 ? pool_index() : 0;
    int64_t grains = (count + grain - 1) / grain;
    *begin = grains * index / size * grain;
    *end = grains * (index + 1) / size * grain;
    if (*begin > count) *begin = count;
    if (*end > count) *end = count;
}

/* ---------------------------------------------------------------- instruction set */

static int level = PORTABLE;

/* Use `wanted` or the best below it that this processor has; returns the one in use. */
int saml_select(int wanted) {
    int best = PORTABLE;
#ifdef SAML_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = HAS_AVX2;
    if (best && __builtin_cpu_supports("avx512f")) best = HAS_AVX512;
#elif defined(SAML_NEON)
    best = wanted < HAS_NEON ? PORTABLE : HAS_NEON; /* every aarch64 has it */
#endif
    level = wanted < best ? wanted : best;
    return level;
}

int saml_level(void) { return level; }
int saml_abi(void) { return ABI; }

/* Most rows of x for which saml_linear beats dequantising W and calling the BLAS; 0: never.
 * Measured on Zen 5 against MKL, which keeps to AVX2 on AMD; elsewhere its own AVX-512 takes over. */
int64_t saml_most_rows(void) {
#ifdef SAML_X86
    if (level == HAS_AVX512) return __builtin_cpu_is("amd") ? INT64_MAX : 32;
    if (level == HAS_AVX2) return 16;
#elif defined(SAML_NEON)
    if (level == HAS_NEON) return 32; /* not measured: its BLAS is OpenBLAS or Arm's */
#endif
    return 0;
}

/* ---------------------------------------------------------------- dequantise */

static inline float scale_of(const Weight *w, int64_t block) {
    if (!w->nested) return ((const float *)w->absmax)[block];
    return w->nested_code[((const uint8_t *)w->absmax)[block]] * w->nested[block >> 8] + *w->offset;
}

static inline float code_at(const Weight *w, int64_t i) {
    if (w->format == INT8) return (float)((const int8_t *)w->codes)[i] / 127.0f;
    return w->table[i & 1 ? w->codes[i >> 1] & 15 : w->codes[i >> 1] >> 4];
}

static void run_portable(const Weight *w, int64_t first, int64_t count, float scale, float *out) {
    for (int64_t i = 0; i < count; i++) out[i] = code_at(w, first + i) * scale;
}

/* `count` elements from flat position `first`, all under one scale. */
static void run(const Weight *w, int64_t first, int64_t count, float scale, float *out) {
    int64_t done = 0;
    if ((first & 1) && count > 0) {
        run_portable(w, first, 1, scale, out);
        done = 1;
    }
#ifdef SAML_X86
    if (level == HAS_AVX512)
        done += run_avx512(w, first + done, count - done, scale, out + done);
    else if (level == HAS_AVX2)
        done += run_avx2(w, first + done, count - done, scale, out + done);
#elif defined(SAML_NEON)
    if (level == HAS_NEON) done += run_neon(w, first + done, count - done, scale, out + done);
#endif
    run_portable(w, first + done, count - done, scale, out + done);
}

static inline __attribute__((always_inline)) void round_all(const float *in, int64_t count,
                                                            uint16_t *out) {
    for (int64_t i = 0; i < count; i++) { /* to nearest, ties to even */
        uint32_t bits;
        memcpy(&bits, in + i, 4);
        out[i] = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
}

#ifdef SAML_X86 /* one loop, in each instruction set that the compiler can use for it */
AVX512 static void round_avx512(const float *in, int64_t n, uint16_t *out) { round_all(in, n, out); }
AVX2 static void round_avx2(const float *in, int64_t n, uint16_t *out) { round_all(in, n, out); }
#endif

static void to_bfloat16(const float *in, int64_t count, uint16_t *out) {
#ifdef SAML_X86
    if (level == HAS_AVX512) {
        round_avx512(in, count, out);
        return;
    }
    if (level == HAS_AVX2) {
        round_avx2(in, count, out);
        return;
    }
#endif
    round_all(in, count, out);
}

typedef struct {
    const Weight *weight;
    int64_t first, last;
    void *out;
    int bfloat16, threads;
} DequantiseJob;

static void dequantise_region(void *argument) {
    const DequantiseJob *job = argument;
    const Weight *w = job->weight;
    const int64_t base = job->first / w->block * w->block;
    int64_t begin, end;
    share(job->last - base, w->block, job->threads, &begin, &end);
    begin = base + begin > job->first ? base + begin : job->first;
    end += base;
    for (int64_t at = begin; at < end;) {
        int64_t block = at / w->block, stop = (block + 1) * w->block;
        float scale = scale_of(w, block);
        if (stop > end) stop = end;
        if (!job->bfloat16) {
            run(w, at, stop - at, scale, (float *)job->out + (at - job->first));
            at = stop;
            continue;
        }
        float piece[256];
        for (int64_t left; (left = stop - at) > 0; at += left) {
            if (left > 256) left = 256;
            run(w, at, left, scale, piece);
            to_bfloat16(piece, left, (uint16_t *)job->out + (at - job->first));
        }
    }
}

/* Rows [first_row, last_row) of the weight, row-major, as float32 or bfloat16. */
void saml_dequantise(const Weight *w, int64_t first_row, int64_t last_row, void *out, int bfloat16,
                     int threads) {
    DequantiseJob job = {w, first_row * w->columns, last_row * w->columns, out, bfloat16, threads};
    if (!pool_run || job.last - job.first < 32768) job.threads = 1;
    parallel(dequantise_region, &job, job.threads);
}

/* ---------------------------------------------------------------- y = x W^T + H B^T + bias */

#if defined(SAML_X86) || defined(SAML_NEON)

/* Scales of `count` blocks from `first` on: what scale_of gives, and 1 / 127 times that for int8. */
static void expand_scales(const Weight *w, int64_t first, int64_t count, float *restrict out) {
    if (!w->nested) {
        memcpy(out, (const float *)w->absmax + first, (size_t)count * sizeof *out);
    } else {
        const uint8_t *codes = (const uint8_t *)w->absmax + first;
        const float offset = *w->offset;
        for (int64_t i = 0; i < count; i++) out[i] = w->nested_code[codes[i]];
        for (int64_t i = 0, stop; i < count; i = stop) { /* a scale of scales holds for 256 */
            const float scale = w->nested[(first + i) >> 8];
            stop = (((first + i) >> 8) + 1) * 256 - first;
            if (stop > count) stop = count;
            for (int64_t k = i; k < stop; k++) out[k] = out[k] * scale + offset;
        }
    }
    for (int64_t i = 0; w->format == INT8 && i < count; i++) out[i] *= 1.0f / 127.0f;
}

/* Experts of which each row of x uses one speaker's: int8 under scales, or float32. */
typedef struct {
    Weight lora_a; /* [count * experts * rank, columns] */
    Weight lora_b; /* [count, groups, rows, span]; groups * span = experts * rank */
    int64_t count, groups, span;
} Speakers;

#include "native_experts.h"

typedef struct {
    Weight weight;       /* [rows, columns] */
    const float *lora_a; /* [experts * rank, columns] */
    const float *lora_b; /* [experts, rows, rank] */
    const float *router; /* [experts, columns], or NULL: the gates are given */
    const float *bias;   /* [rows] or NULL */
    int64_t rows, experts, rank, top_k;
    float scaling, temperature;
    Speakers speakers;   /* count > 0: in place of lora_a and lora_b, and a router for each */
} Layer;

/* One call; native.py: pack_call. All contiguous. */
typedef struct {
    const float *x;      /* [m, columns] */
    const float *gates;  /* [m, experts], rows gate_stride apart (0: one for all), or NULL */
    int64_t gate_stride;
    float *y;            /* [m, rows] */
    int64_t m, threads;
    const int32_t *index; /* the speaker of each `each` rows, or NULL: the first */
    int64_t each;
    int64_t added;       /* whether y holds x W^T + bias, to which the experts are added */
} Call;

typedef struct {
    const Layer *layer;
    const float *x;     /* [m, columns] */
    const float *gates; /* as in Call, or made by the router */
    int64_t gate_stride;
    float *y;           /* [m, rows] */
    /* Shared by the threads that work on the same slab: */
    float *packed;      /* [slab, columns]: x in the order of the codes, where that differs */
    float *hidden;      /* [slab, experts * rank]: scaling * gate * (x A^T) */
    /* A thread's own: */
    float *own_gates;   /* [slab, experts]: made by the router */
    float *open;        /* [experts]: 0 where an expert's gate is zero in the whole slab */
    float *beside;      /* [4, experts * rank]: rows of B with the experts side by side */
    float *spread;      /* [STREAMED, experts, UNIT]: hidden as `repeat` makes it */
    float *decoded;     /* [4, columns]: rows of W, unless codes are decoded in registers */
    int64_t m, slab;
    int threads, apart; /* apart: each has rows of x of its own */
    int preparing;      /* threads that share `packed` and `hidden`; 1: each has its own */
} LinearJob;

static int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; } /* 64 bytes */

/* Whether codes of W are decoded in registers, as m rows of x are multiplied. */
static int in_registers(int64_t m) {
#ifdef SAML_X86
    return m <= (level == HAS_AVX512 ? 24 : 16); /* as measured, python -m bench cpu-operator */
#else
    (void)m;
    return 0;
#endif
}

/* Whether the experts of m rows of x are added in a pass of their own, as B lies. */
static int streams_experts(const Layer *l, int64_t m) {
#ifdef SAML_X86
    return l->experts && l->rank && m <= STREAMED && UNIT % l->rank == 0 &&
           l->rows * l->rank % UNIT == 0;
#else
    (void)l, (void)m;
    return 0;
#endif
}

/* What a thread has of its own, for slabs of that many rows of x: all of it, and two of its parts. */
static int64_t decoded_floats(const Layer *l, int64_t slab) {
    return in_registers(slab) ? 0 : 4 * l->weight.columns;
}

static int64_t spread_floats(const Layer *l, int64_t slab) {
    return l->experts * UNIT * (slab < STREAMED ? slab : STREAMED);
}

static int64_t private_floats(const Layer *l, int64_t slab) {
    return aligned(decoded_floats(l, slab) + spread_floats(l, slab) +
                   4 * l->experts * l->rank + (slab + 1) * l->experts);
}

/* Rows of W and of x that a tile takes: what the registers hold. */
typedef struct {
    int rows, most;
} Shape;

static Shape tile_shape(int64_t m, int fused) {
    const Shape few = level == HAS_AVX2 ? (Shape){1, 8} : (Shape){2, 8};
    const Shape many = level == HAS_AVX512 ? (Shape){4, 6}
                       : level == HAS_AVX2 ? (Shape){2, 4}
                                           : (Shape){4, 4};
    if (level == HAS_AVX2 && m == 1) return (Shape){4, 1};
    return fused && m > many.most && m <= 8 ? few : many; /* codes are decoded once */
}

/* An even split of m into the fewest tiles. */
static int tile_width(int64_t m, int most) {
    const int64_t tiles = (m + most - 1) / most;
    return (int)((m + tiles - 1) / tiles);
}

static void any_tile(const Tile *t, int rows, int64_t ms, int format, float *sums) {
#ifdef SAML_X86
    if (level == HAS_AVX512)
        any_tile_avx512(t, rows, (int)ms, format, sums);
    else
        any_tile_avx2(t, rows, (int)ms, format, sums);
#else
    (void)format; /* codes are decoded first */
    any_tile_neon(t, rows, (int)ms, sums);
#endif
}

/* Gates of every row from its logits: softmax, over the top_k largest alone (the first of equals). */
static void softmax_rows(const Layer *l, int64_t m, float *gates) {
    for (int64_t i = 0; i < m; i++, gates += l->experts) {
        float largest = -INFINITY, sum = 0.0f;
        for (int64_t e = 0; e < l->experts; e++) {
            gates[e] /= l->temperature;
            if (gates[e] > largest || gates[e] != gates[e]) largest = gates[e];
        }
        for (int64_t e = 0; e < l->experts; e++) gates[e] = expf(gates[e] - largest);
        for (int64_t left = l->experts - l->top_k; left > 0; left--) {
            int64_t least = -1;
            for (int64_t e = l->experts - 1; e >= 0; e--)
                if (gates[e] >= 0.0f && (least < 0 || gates[e] < gates[least])) least = e;
            if (least >= 0) gates[least] = -1.0f;
        }
        for (int64_t e = 0; e < l->experts; e++) {
            if (gates[e] < 0.0f) gates[e] = 0.0f;
            sum += gates[e];
        }
        for (int64_t e = 0; e < l->experts; e++) gates[e] /= sum;
    }
}

/* out[i, row - from] = matrix[row] . x[i] for rows [begin, end), i < count; `out` has `width`
 * columns. `decoded` holds four rows, for codes that are not decoded in registers. */
static void project(const Weight *matrix, const float *x, int64_t count, int64_t begin, int64_t end,
                    int64_t from, int64_t width, float *decoded, float *out) {
    const int64_t columns = matrix->columns;
    const Shape shape = tile_shape(count, 0);
    const int height = shape.rows, most = tile_width(count, shape.most);
    int format = matrix->format;
#ifndef SAML_X86
    format = FLOAT32;
#endif
    Tile t = {.columns = columns, .stride = columns * (format == INT8 ? 1 : 4), .shift = -1};
    float scales[4 * MAX_SCALES], sums[24];
    if (matrix->format == INT8) {
        t.scales = scales;
        t.scale_stride = columns / matrix->block;
        for (int64_t size = matrix->block; size >= 64; size /= 2) t.shift++;
    }
    for (int64_t row = begin, rows; row < end; row += rows) {
        rows = end - row >= height ? height : 1;
        t.codes = matrix->codes + row * t.stride;
        if (format == INT8) {
            expand_scales(matrix, row * t.scale_stride, rows * t.scale_stride, scales);
        } else if (matrix->format == INT8) {
            for (int64_t at = row * columns, i = 0; i < rows * columns; i += matrix->block)
                run(matrix, at + i, matrix->block, scale_of(matrix, (at + i) / matrix->block),
                    decoded + i);
            t.codes = (const uint8_t *)decoded;
        }
        for (int64_t m = 0, ms; m < count; m += ms) {
            ms = count - m < most ? count - m : most;
            t.x = x + m * columns;
            any_tile(&t, (int)rows, ms, format, sums);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < ms; i++)
                    out[(m + i) * width + row - from + r] = sums[r * ms + i];
        }
    }
}

static Weight plain(const float *matrix, int64_t columns) {
    return (Weight){.codes = (const uint8_t *)matrix, .columns = columns, .format = FLOAT32};
}

/* Gates, x in the order of the codes, the experts' hidden: this thread's share of one slab. */
static void prepare(LinearJob *job) {
    const Layer *l = job->layer;
    const int64_t width = l->experts * l->rank;
    int64_t begin, end;
#ifdef SAML_X86
    if (job->packed != job->x) {
        share(job->m * l->weight.columns, 64, job->preparing, &begin, &end);
        pack_x86(job->x, begin, end, level == HAS_AVX512, job->packed);
    }
#endif
    if (l->router) { /* a few rows: each thread makes all gates rather than wait for another's */
        const Weight router = plain(l->router, l->weight.columns);
        project(&router, job->x, job->m, 0, l->experts, 0, l->experts, NULL, job->own_gates);
        softmax_rows(l, job->m, job->own_gates);
        job->gates = job->own_gates;
        job->gate_stride = l->experts;
    }
    for (int64_t e = 0; e < l->experts; e++) {
        job->open[e] = 0.0f;
        for (int64_t i = 0; i < job->m; i++)
            if (job->gates[i * job->gate_stride + e] != 0.0f) job->open[e] = 1.0f;
    }
    share(width, 1, job->preparing, &begin, &end);
    const Weight a = plain(l->lora_a, l->weight.columns);
    for (int64_t row = begin, stop; row < end; row = stop) { /* an expert, or what of it is ours */
        const int64_t e = row / l->rank;
        stop = (e + 1) * l->rank < end ? (e + 1) * l->rank : end;
        if (job->open[e] != 0.0f)
            project(&a, job->x, job->m, row, stop, 0, width, NULL, job->hidden);
        for (int64_t i = 0; i < job->m; i++)
            for (int64_t r = row; r < stop; r++) {
                float *h = job->hidden + i * width + r; /* a closed expert is not read */
                *h = job->open[e] != 0.0f
                         ? *h * job->gates[i * job->gate_stride + e] * l->scaling
                         : 0.0f;
            }
    }
}

/* The experts of rows [row, row + rows) of B, side by side: [rows, experts * rank]. */
static void lay_beside(const LinearJob *job, int64_t row, int64_t rows) {
    const Layer *l = job->layer;
    float *to = job->beside;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t e = 0; e < l->experts; e++) {
            const float *from = l->lora_b + (e * l->rows + row + r) * l->rank;
            if (job->open[e] != 0.0f)
                for (int64_t k = 0; k < l->rank; k++) *to++ = from[k];
            else
                for (int64_t k = 0; k < l->rank; k++) *to++ = 0.0f;
        }
}

/* This thread's share of the rows of W, times one slab of x. */
static void multiply(const LinearJob *job) {
    const Layer *l = job->layer;
    const Weight *w = &l->weight;
    const int fused = in_registers(job->m);
    const Shape shape = tile_shape(job->m, fused);
    const int height = shape.rows, most = tile_width(job->m, shape.most);
    const int64_t width = l->experts * l->rank;
    const float everything = 1.0f;
    float scales[4 * MAX_SCALES], sums[24];
    uint8_t planes[64];
    Tile t = {.columns = w->columns, .scales = scales, .table = w->table, .shift = -1};
    t.scale_stride = w->columns / w->block;
    t.planes = planes;
    for (int i = 0; i < 64 && w->table; i++)
        planes[i] = ((const uint8_t *)w->table)[i % 16 * 4 + i / 16];
    const int streams = streams_experts(l, job->m);
    t.experts = streams ? 0 : l->experts;
    t.rank = l->rank;
    t.hidden_stride = width;
    t.lora_stride = l->rows * l->rank;
    t.lora_row = l->rank;
    t.open = job->open;
    if (width && job->m > 8) { /* the experts as one of their whole width */
        t.experts = 1;
        t.rank = t.lora_row = width;
        t.open = &everything;
    }
    t.stride = !fused ? w->columns * 4 : w->format == INT8 ? w->columns : w->columns / 2;
    for (int64_t size = w->block; size >= 64; size /= 2) t.shift++;
    int64_t begin, end;
    const int64_t grain = streams && UNIT / l->rank > height ? UNIT / l->rank : height;
    share(l->rows, grain, job->threads, &begin, &end);
    for (int64_t row = begin, rows; row < end; row += rows) {
        rows = end - row >= height ? height : 1;
        if (fused) {
            expand_scales(w, row * t.scale_stride, rows * t.scale_stride, scales);
            t.codes = w->codes + row * t.stride;
        } else {
            for (int64_t at = row * w->columns, i = 0; i < rows * w->columns; i += w->block)
                run(w, at + i, w->block, scale_of(w, (at + i) / w->block), job->decoded + i);
            t.codes = (const uint8_t *)job->decoded;
        }
        t.lora_b = l->lora_b + row * l->rank;
        if (t.open == &everything) {
            lay_beside(job, row, rows);
            t.lora_b = job->beside;
        }
        for (int64_t m = 0, ms; m < job->m; m += ms) {
            ms = job->m - m < most ? job->m - m : most;
            t.x = (fused ? job->packed : job->x) + m * w->columns;
            t.hidden = job->hidden + m * width;
            any_tile(&t, (int)rows, ms, fused ? w->format : FLOAT32, sums);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < ms; i++)
                    job->y[(m + i) * l->rows + row + r] =
                        sums[r * ms + i] + (l->bias ? l->bias[row + r] : 0.0f);
        }
    }
    if (streams) {
        const Weight lora_b = plain(l->lora_b, l->rank);
        const Expansion b = {.lora_b = &lora_b, .rows = l->rows, .groups = l->experts,
                             .span = l->rank, .begin = begin, .end = end, .open = job->open};
        float *y[STREAMED];
        for (int64_t i = 0; i < job->m; i++) y[i] = job->y + i * l->rows;
        repeat(&b, job->hidden, job->m, job->spread);
        add_expansion(&b, job->spread, job->m, y);
    }
}

/* Slabs of x that stay in the cache, one after the other. With many rows each thread takes its own
 * (and its own scratch) and waits for nobody; with few, all threads share the rows of W. */
static void linear_region(void *argument) {
    const LinearJob *whole = argument;
    const Layer *l = whole->layer;
    const int64_t columns = l->weight.columns, width = l->experts * l->rank;
    const int index = whole->threads > 1 ? pool_index() : 0;
    LinearJob job = *whole;
    int64_t begin = 0, end = whole->m;
    if (whole->apart) {
        share(whole->m, 6, whole->threads, &begin, &end);
        job.threads = 1;
    }
    if (whole->preparing == 1) {
        job.packed += index * whole->slab * columns;
        job.hidden += index * whole->slab * width;
    }
    job.decoded += index * private_floats(l, whole->slab);
    job.spread = job.decoded + decoded_floats(l, whole->slab);
    job.beside = job.spread + spread_floats(l, whole->slab);
    job.own_gates = job.beside + 4 * width;
    job.open = job.own_gates + whole->slab * l->experts;
    float *const packed = job.packed;
    for (int64_t m = begin; m < end; m += whole->slab) {
        job.m = end - m < whole->slab ? end - m : whole->slab;
        job.x = whole->x + m * columns;
        job.gates = whole->gates + m * whole->gate_stride;
        job.gate_stride = whole->gate_stride;
        job.y = whole->y + m * l->rows;
        job.packed = in_registers(job.m) && l->weight.format == FOUR_BIT ? packed : (float *)job.x;
        if (m > begin && job.preparing > 1) pool_barrier();
        prepare(&job);
        if (job.preparing > 1) pool_barrier();
        multiply(&job);
    }
}

#include "native_speakers.h"

/* ---------------------------------------------------------------- the call */

/* How the threads share the work, and the floats of scratch that it takes. */
static int64_t plan(LinearJob *job, int threads) {
    const Layer *l = job->layer;
    const int64_t columns = l->weight.columns, m = job->m;
    job->threads = threads;
    if (!pool_run || m * l->rows * columns < 1 << 18) job->threads = 1; /* done before they wake up */
    job->apart = job->threads > 1 && m >= 12 * (int64_t)job->threads;
    job->slab = CACHE / (4 * columns) / 12 * 12;
    if (job->slab < 12) job->slab = 12;
    if (job->slab > m) job->slab = m;
    const int64_t width = l->experts * l->rank;
    /* Little to prepare: sooner done twice than waited for. */
    job->preparing = job->apart || m * (width + 1) * columns <= ALONE ? 1 : job->threads;
    const int copies = job->preparing == 1 ? job->threads : 1;
    return aligned(job->slab * (columns + width) * copies) +
           private_floats(l, job->slab) * job->threads;
}

static void place(LinearJob *job, float *scratch) {
    const Layer *l = job->layer;
    const int64_t columns = l->weight.columns, width = l->experts * l->rank;
    const int copies = job->preparing == 1 ? job->threads : 1;
    job->packed = scratch;
    job->hidden = scratch + job->slab * columns * copies;
    job->decoded = scratch + aligned(job->slab * (columns + width) * copies);
}

static int served(const Weight *w) {
    return w->block >= 32 && !(w->block & (w->block - 1)) && w->columns % 64 == 0 &&
           w->columns % w->block == 0 && w->columns / w->block <= MAX_SCALES;
}

/* y += the part of every row's own speaker; before it, unless it is there, the base. */
static int linear_of_speakers(const Layer *l, const Call *call) {
    const Speakers *s = &l->speakers;
    const Weight *a = &s->lora_a, *b = &s->lora_b;
    if ((a->format == INT8 && (!served(a) || b->block < UNIT || (b->block & (b->block - 1)))) ||
        s->span > UNIT || UNIT % s->span || l->rows * s->span % UNIT)
        return 1;
    Layer base = *l;
    base.experts = 0;
    base.router = NULL;
    LinearJob first = {.layer = &base, .x = call->x, .y = call->y, .m = call->m};
    const int64_t floats = plan(&first, (int)call->threads);
    SpeakersJob job = {.layer = l, .call = call, .threads = first.threads};
    const int64_t shared = call->added ? 0 : floats, own = speaker_floats(l);
    const size_t for_floats = (size_t)aligned(shared + own * job.threads) * sizeof(float);
    const size_t for_rows = (size_t)call->m * (sizeof(Group) + sizeof(int64_t));
    char *scratch = aligned_alloc(
        64, (for_floats + for_rows + (size_t)(s->count + 1) * sizeof(int64_t) + 63) / 64 * 64);
    if (!scratch) return 2;
    Group *groups = (Group *)(scratch + for_floats);
    int64_t *order = (int64_t *)(groups + call->m);
    job.count = group_rows(l, call, order, groups, order + call->m);
    job.order = order;
    job.groups = groups;
    job.scratch = (float *)scratch + shared;
    job.base = call->added ? NULL : &first;
    if (job.base) place(job.base, (float *)scratch);
    if (job.count >= 0) parallel(speakers_region, &job, job.threads);
    free(scratch);
    return job.count < 0 ? 3 : 0;
}

/* y = x W^T + scaling * sum over experts of gate * (x A^T) B^T + bias, all float32 and contiguous;
 * the gates [m, experts] in rows gate_stride apart, or softmax(x V^T / temperature) by the layer's
 * router V. Returns 0; 1 where the weight or the experts are not served (native.py: serves);
 * 2 without memory; 3 where a speaker's index is out of range. */
int saml_linear(const Layer *l, const Call *call) {
    if (level == PORTABLE || !served(&l->weight)) return 1;
    if (l->speakers.count) return linear_of_speakers(l, call);
    LinearJob job = {.layer = l, .x = call->x, .gates = call->gates, .y = call->y, .m = call->m};
    job.gate_stride = call->gate_stride;
    _Alignas(64) float here[SMALL]; /* a token's: it has no time for the heap */
    const int64_t floats = plan(&job, (int)call->threads);
    float *scratch = floats <= SMALL ? here : aligned_alloc(64, (size_t)floats * sizeof(float));
    if (!scratch) return 2;
    place(&job, scratch);
    parallel(linear_region, &job, job.threads);
    if (scratch != here) free(scratch);
    return 0;
}
#endif

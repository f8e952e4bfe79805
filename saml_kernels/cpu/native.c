/* Native half of the CPU backend: dequantise a weight, and multiply a few rows by it.
 *
 * Plain C, no Python and no torch headers: native.py loads it with ctypes and passes addresses.
 * The instruction set (AVX-512, AVX2, portable C) is chosen when the library is loaded.
 * Threads are borrowed from the OpenMP runtime that torch uses: native.py hands its GOMP entry
 * points to saml_set_threads, so there is one pool, and nothing is linked here.
 *
 * A 4-bit weight stores two codes a byte, the first in the high nibble. The products below do not
 * undo that order. They take 64 codes as 16 words of 16 bits, one word a lane, and shift by 0, 4, 8
 * and 12: the four shifts hold elements 4*lane + {1, 0, 3, 2}. x is laid out likewise, once a call.
 *
 * Compile with -ffp-contract=off: dequantised values then equal the reference bit for bit.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { ABI = 1, MAX_SCALES = 1024 }; /* both stand in native.py too */
enum { PORTABLE = 0, HAS_AVX2 = 1, HAS_AVX512 = 2 };
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

#if defined(__x86_64__) && defined(__GNUC__)
#define SAML_X86 1
#include <immintrin.h>
#include "native_x86.h"
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
#endif
    run_portable(w, first + done, count - done, scale, out + done);
}

static void to_bfloat16(const float *in, int64_t count, uint16_t *out) {
    for (int64_t i = 0; i < count; i++) { /* round to nearest, ties to even */
        uint32_t bits;
        memcpy(&bits, in + i, 4);
        out[i] = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
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

#ifdef SAML_X86

typedef struct {
    const Weight *weight;
    const float *x;      /* [m, columns] */
    const float *lora_a; /* [experts * rank, columns] */
    const float *lora_b; /* [experts, rows, rank] */
    const float *gates;  /* [m, experts] */
    const float *bias;   /* [rows] or NULL */
    float *y;            /* [m, rows] */
    float *packed;       /* [threads, slab, columns]: x in the order of the codes */
    float *hidden;       /* [slab, experts * rank]: scaling * gate * (x A^T) */
    int64_t m, slab, rows, experts, rank;
    float scaling;
    int threads, apart;
} LinearJob;

static void expand_scales(const Weight *w, int64_t row, float *out) {
    const int64_t count = w->columns / w->block, first = row * count;
    const float unit = w->format == INT8 ? 1.0f / 127.0f : 1.0f;
    for (int64_t i = 0; i < count; i++) out[i] = scale_of(w, first + i) * unit;
}


/* Rows of x a tile takes: an even split of m into the fewest tiles that the registers hold. */
static int tile_width(int64_t m) {
    const int64_t most = level == HAS_AVX512 ? 6 : 4, tiles = (m + most - 1) / most;
    return (int)((m + tiles - 1) / tiles);
}

static void any_tile(const Tile *t, int rows, int64_t ms, int format, float *sums) {
    if (level == HAS_AVX512)
        any_tile_avx512(t, rows, (int)ms, format, sums);
    else
        any_tile_avx2(t, rows, (int)ms, format, sums);
}

/* x in the order of the codes, and the experts' hidden: this thread's share of one slab. */
static void prepare(const LinearJob *job) {
    const int64_t columns = job->weight->columns, width = job->experts * job->rank;
    const int most = tile_width(job->m);
    int64_t begin, end;
    if (job->packed != job->x) {
        share(job->m * columns, 64, job->threads, &begin, &end);
        for (int64_t g = begin; g < end; g += 64)
            for (int l = 0; l < 16; l++) {
                const float *from = job->x + g + 4 * l;
                float *to = job->packed + g + l;
                to[0] = from[1];
                to[16] = from[0];
                to[32] = from[3];
                to[48] = from[2];
            }
    }
    Tile t = {.columns = columns};
    share(width, 1, job->threads, &begin, &end);
    for (int64_t row = begin; row < end; row++) {
        const float *gate = job->gates + row / job->rank;
        int open = 0;
        for (int64_t m = 0; m < job->m; m++) open |= gate[m * job->experts] != 0.0f;
        t.codes = (const uint8_t *)(job->lora_a + row * columns);
        for (int64_t m = 0, ms; m < job->m; m += ms) {
            float sums[6] = {0};
            ms = job->m - m < most ? job->m - m : most;
            t.x = job->x + m * columns;
            if (open) any_tile(&t, 1, ms, FLOAT32, sums); /* a closed expert is not read */
            for (int64_t i = m; i < m + ms; i++)
                job->hidden[i * width + row] = sums[i - m] * gate[i * job->experts] * job->scaling;
        }
    }
}

/* This thread's share of the rows of W, times one slab of x. */
static void multiply(const LinearJob *job) {
    const Weight *w = job->weight;
    const int height = level == HAS_AVX512 ? 4 : 2;
    const int most = tile_width(job->m);
    float scales[4 * MAX_SCALES], sums[24];
    Tile t = {.columns = w->columns, .scales = scales, .table = w->table, .shift = -1};
    t.stride = w->format == INT8 ? w->columns : w->columns / 2;
    t.experts = job->experts;
    t.rank = job->rank;
    t.lora_stride = job->rows * job->rank;
    for (int64_t size = w->block; size >= 64; size /= 2) t.shift++;
    int64_t begin, end;
    share(job->rows, height, job->threads, &begin, &end);
    for (int64_t row = begin, rows; row < end; row += rows) {
        rows = end - row >= height ? height : 1;
        for (int r = 0; r < rows; r++) expand_scales(w, row + r, scales + r * MAX_SCALES);
        t.codes = w->codes + row * t.stride;
        t.lora_b = job->lora_b + row * job->rank;
        for (int64_t m = 0, ms; m < job->m; m += ms) {
            ms = job->m - m < most ? job->m - m : most;
            t.x = job->packed + m * w->columns;
            t.hidden = job->hidden + m * job->experts * job->rank;
            t.gates = job->gates + m * job->experts;
            any_tile(&t, (int)rows, ms, w->format, sums);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < ms; i++)
                    job->y[(m + i) * job->rows + row + r] =
                        sums[r * ms + i] + (job->bias ? job->bias[row + r] : 0.0f);
        }
    }
}

/* Slabs of x that stay in the cache, one after the other. With many rows each thread takes its own
 * (and its own scratch) and waits for nobody; with few, all threads share the rows of W. */
static void linear_region(void *argument) {
    const LinearJob *whole = argument;
    LinearJob job = *whole;
    int64_t begin = 0, end = whole->m;
    if (whole->apart) {
        share(whole->m, 6, whole->threads, &begin, &end);
        job.threads = 1;
        job.packed += pool_index() * whole->slab * whole->weight->columns;
        job.hidden += pool_index() * whole->slab * whole->experts * whole->rank;
    }
    for (int64_t m = begin; m < end; m += whole->slab) {
        job.m = end - m < whole->slab ? end - m : whole->slab;
        job.x = whole->x + m * whole->weight->columns;
        job.gates = whole->gates + m * whole->experts;
        job.y = whole->y + m * whole->rows;
        if (whole->weight->format == INT8) job.packed = (float *)job.x; /* in order already */
        if (m > begin && job.threads > 1) pool_barrier();
        prepare(&job);
        if (job.threads > 1) pool_barrier();
        multiply(&job);
    }
}

/* y = x W^T + scaling * sum over experts of gate * (x A^T) B^T + bias, all float32 and contiguous.
 * Works through `slab` rows of x at a time: `packed` has room for [threads, slab, columns] and
 * `hidden` for [threads, slab, experts * rank]. Returns 0, or 1 where the weight is not served (native.py: fits). */
int saml_linear(const Weight *w, const float *x, const float *lora_a, const float *lora_b,
                const float *gates, const float *bias, float *y, float *packed, float *hidden,
                int64_t m, int64_t slab, int64_t rows, int64_t experts, int64_t rank,
                float scaling, int threads) {
    const int64_t columns = w->columns, block = w->block;
    if (level == PORTABLE || block < 32 || (block & (block - 1)) || columns % 64 || columns % block ||
        columns / block > MAX_SCALES)
        return 1;
    LinearJob job = {w,      x, lora_a, lora_b, gates,   bias, y,       packed,
                     hidden, m, slab,   rows,   experts, rank, scaling, threads, 0};
    if (!pool_run || m * rows * columns < 1 << 20) job.threads = 1; /* done before they wake up */
    job.apart = job.threads > 1 && m >= 12 * (int64_t)job.threads;
    parallel(linear_region, &job, job.threads);
    return 0;
}
#endif

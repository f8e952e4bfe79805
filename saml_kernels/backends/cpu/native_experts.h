/* The experts' expansion: y += H B^T for a few rows, B read as it lies, in one stream.
 *
 * Many outputs at a time: a vector of B holds several rows of it, and is multiplied by a row of H that
 * repeats. For ranks that a vector is a multiple of.
 *
 * Included by native.c.
 */

enum { TOGETHER = 8 }; /* rows of one speaker that a thread works on at a time */
enum { UNIT = 64 };    /* elements of lora_b at a time; `span` divides it */

typedef struct {
    const Weight *lora_b; /* [groups, rows, span] from element `first` on: int8 or float32 */
    int64_t first, rows, groups, span;
    int64_t begin, end;   /* of the rows; units of lora_b begin and end there */
    const float *open;    /* [groups]: one that is 0 is not read; NULL: all are */
} Expansion;

static inline int closed(const Expansion *b, int64_t group) {
    return b->open && b->open[group] == 0.0f;
}

/* hidden [count, groups, span], each group over and over: [count, groups, UNIT]. */
static void repeat(const Expansion *b, const float *hidden, int64_t count, float *spread) {
    for (int64_t i = 0; i < count * b->groups; i++) {
        float *to = spread + i * UNIT;
        memcpy(to, hidden + i * b->span, (size_t)b->span * sizeof *to);
        for (int64_t have = b->span; have < UNIT; have *= 2)
            memcpy(to + have, to, (size_t)have * sizeof *to);
    }
}

/* y[i][n] += sum over groups g, k < span of lora_b[g][n][k] * hidden[i][g][k], rows n of [begin, end);
 * `spread` [count, groups, UNIT] is what `repeat` makes of hidden. */
static void add_portable(const Expansion *b, const float *spread, int64_t count,
                         float *const *y) {
    const Weight *w_b = b->lora_b;
    const int64_t size = b->rows * b->span;
    float w[UNIT], sums[TOGETHER][UNIT];
    for (int64_t at = b->begin * b->span; at < b->end * b->span; at += UNIT) {
        memset(sums, 0, sizeof sums);
        for (int64_t g = 0; g < b->groups; g++) {
            const int64_t from = b->first + g * size + at;
            if (closed(b, g)) continue;
            if (w_b->format == INT8)
                run(w_b, from, UNIT, ((const float *)w_b->absmax)[from / w_b->block], w);
            else
                memcpy(w, (const float *)w_b->codes + from, sizeof w);
            for (int64_t i = 0; i < count; i++)
                for (int64_t k = 0; k < UNIT; k++)
                    sums[i][k] += w[k] * spread[(i * b->groups + g) * UNIT + k];
        }
        for (int64_t i = 0; i < count; i++)
            for (int64_t n = 0; n < UNIT / b->span; n++) {
                float total = 0.0f;
                for (int64_t k = 0; k < b->span; k++) total += sums[i][n * b->span + k];
                y[i][at / b->span + n] += total;
            }
    }
}

#ifdef SAML_X86

/* What is left of a unit: sums[n] = the total of its `span` elements, added to y. */
static void add_totals(const float *sums, int64_t elements, int64_t span, float *y) {
    for (int64_t n = 0; n < elements / span; n++) {
        float total = 0.0f;
        for (int64_t k = 0; k < span; k++) total += sums[n * span + k];
        y[n] += total;
    }
}

/* 16 outputs, each the sum of four elements that lie side by side. */
AVX512 INLINE __m512 fours_avx512(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512i order =
        _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512d ab = _mm512_castps_pd(
        _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(
        _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)),
                                     _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    return _mm512_permutexvar_ps(order, all);
}

AVX512 INLINE void add_rows_avx512(const Expansion *b, const float *spread, const int ms,
                                   const int format, float *const *y) {
    const int64_t span = b->span, size = b->rows * span;
    const uint8_t *codes = b->lora_b->codes;
    const float *absmax = b->lora_b->absmax;
    const int shift = format == INT8 ? __builtin_ctzll((uint64_t)b->lora_b->block) : 0;
    for (int64_t at = b->begin * span; at < b->end * span; at += UNIT) {
        __m512 acc[16];
#pragma GCC unroll 16
        for (int i = 0; i < 4 * ms; i++) acc[i] = _mm512_setzero_ps();
        for (int64_t g = 0; g < b->groups; g++) {
            const int64_t from = b->first + g * size + at;
            if (closed(b, g)) continue;
            const __m512 scale = format == INT8
                                     ? _mm512_set1_ps(absmax[from >> shift] * (1.0f / 127.0f))
                                     : _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m512 w;
                if (format == INT8) {
                    __m128i bytes = _mm_loadu_si128((const void *)(codes + from + 16 * j));
                    w = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale);
                } else {
                    w = _mm512_loadu_ps((const float *)codes + from + 16 * j);
                }
#pragma GCC unroll 4
                for (int m = 0; m < ms; m++) {
                    const float *h = spread + (m * b->groups + g) * UNIT + 16 * j;
                    acc[4 * m + j] = _mm512_fmadd_ps(w, _mm512_loadu_ps(h), acc[4 * m + j]);
                }
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < ms; m++) {
            const __m512 *sum = acc + 4 * m;
            float *to = y[m] + at / span, totals[UNIT];
            if (span == 4) {
                const __m512 all = fours_avx512(sum[0], sum[1], sum[2], sum[3]);
                _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), all));
            } else if (span == 16) {
                store_totals(halves(sum[0]), halves(sum[1]), halves(sum[2]), halves(sum[3]), 4,
                             totals);
                for (int n = 0; n < 4; n++) to[n] += totals[n];
            } else if (span == 8) {
                for (int j = 0; j < 4; j += 2)
                    store_totals(_mm512_castps512_ps256(sum[j]), high_half(sum[j]),
                                 _mm512_castps512_ps256(sum[j + 1]), high_half(sum[j + 1]), 4,
                                 totals + 2 * j);
                for (int n = 0; n < 8; n++) to[n] += totals[n];
            } else {
                for (int j = 0; j < 4; j++) _mm512_storeu_ps(totals + 16 * j, sum[j]);
                add_totals(totals, UNIT, span, to);
            }
        }
    }
}

/* Eight outputs, each the sum of four elements that lie side by side. */
AVX2 INLINE __m256 fours_avx2(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm256_permutevar8x32_ps(all, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

AVX2 INLINE void add_rows_avx2(const Expansion *b, const float *spread, const int ms,
                               const int format, float *const *y) {
    const int64_t span = b->span, size = b->rows * span;
    const uint8_t *codes = b->lora_b->codes;
    const float *absmax = b->lora_b->absmax;
    const int shift = format == INT8 ? __builtin_ctzll((uint64_t)b->lora_b->block) : 0;
    float totals[2][UNIT];
    for (int64_t half = b->begin * span; half < b->end * span; half += UNIT / 2) {
        const int64_t in_unit = half % UNIT;
        __m256 acc[8];
#pragma GCC unroll 8
        for (int i = 0; i < 4 * ms; i++) acc[i] = _mm256_setzero_ps();
        for (int64_t g = 0; g < b->groups; g++) {
            const int64_t from = b->first + g * size + half;
            if (closed(b, g)) continue;
            const __m256 scale = format == INT8
                                     ? _mm256_set1_ps(absmax[from >> shift] * (1.0f / 127.0f))
                                     : _mm256_setzero_ps();
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m256 w;
                if (format == INT8) {
                    __m128i bytes = _mm_loadl_epi64((const void *)(codes + from + 8 * j));
                    w = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), scale);
                } else {
                    w = _mm256_loadu_ps((const float *)codes + from + 8 * j);
                }
#pragma GCC unroll 2
                for (int m = 0; m < ms; m++) {
                    const float *h = spread + (m * b->groups + g) * UNIT + in_unit + 8 * j;
                    acc[4 * m + j] = _mm256_fmadd_ps(w, _mm256_loadu_ps(h), acc[4 * m + j]);
                }
            }
        }
#pragma GCC unroll 2
        for (int m = 0; m < ms; m++) {
            const __m256 *sum = acc + 4 * m;
            float *to = y[m] + half / span;
            if (span == 4) {
                const __m256 all = fours_avx2(sum[0], sum[1], sum[2], sum[3]);
                _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), all));
                continue;
            }
            if (span == 8) {
                store_totals(sum[0], sum[1], sum[2], sum[3], 4, totals[m]);
                for (int n = 0; n < 4; n++) to[n] += totals[m][n];
                continue;
            }
            for (int j = 0; j < 4; j++) _mm256_storeu_ps(totals[m] + in_unit + 8 * j, sum[j]);
            if (in_unit) add_totals(totals[m], UNIT, span, y[m] + (half - in_unit) / span);
        }
    }
}

#define ADD(ROWS, MS, FORMAT)                    \
    case (FORMAT) * 10 + (MS):                   \
        ROWS(b, spread, MS, FORMAT, y);   \
        break;

AVX512 static void add_avx512(const Expansion *b, const float *spread, int64_t count,
                              float *const *y) {
    for (int64_t ms; count > 0; count -= ms, spread += ms * b->groups * UNIT, y += ms) {
        ms = count >= 4 ? 4 : count >= 2 ? 2 : 1;
        switch (b->lora_b->format * 10 + ms) {
            ADD(add_rows_avx512, 1, INT8) ADD(add_rows_avx512, 2, INT8)
            ADD(add_rows_avx512, 4, INT8) ADD(add_rows_avx512, 1, FLOAT32)
            ADD(add_rows_avx512, 2, FLOAT32) ADD(add_rows_avx512, 4, FLOAT32)
        }
    }
}

AVX2 static void add_avx2(const Expansion *b, const float *spread, int64_t count,
                          float *const *y) {
    for (int64_t ms; count > 0; count -= ms, spread += ms * b->groups * UNIT, y += ms) {
        ms = count >= 2 ? 2 : 1;
        switch (b->lora_b->format * 10 + ms) {
            ADD(add_rows_avx2, 1, INT8) ADD(add_rows_avx2, 2, INT8)
            ADD(add_rows_avx2, 1, FLOAT32) ADD(add_rows_avx2, 2, FLOAT32)
        }
    }
}
#endif

/* `count` rows, TOGETHER at most. */
static void add_expansion(const Expansion *b, const float *spread, int64_t count, float *const *y) {
#ifdef SAML_X86
    if (level == HAS_AVX512) {
        add_avx512(b, spread, count, y);
        return;
    }
    if (level == HAS_AVX2) {
        add_avx2(b, spread, count, y);
        return;
    }
#endif
    add_portable(b, spread, count, y);
}

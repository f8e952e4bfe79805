/* Rows of many speakers: each row's experts are its own speaker's, added to y in a second pass.
 *
 * The rows are sorted by speaker and cut into groups of a few rows of one speaker, each of which one
 * thread works on: its experts are read once, as they are stored. Results do not depend on the number
 * of threads.
 *
 * Included by native.c.
 */

enum { TOGETHER = 8 }; /* rows of one speaker that a thread works on at a time */
enum { UNIT = 64 };    /* elements of lora_b at a time; `span` divides it */

typedef struct {
    int64_t speaker, first, count; /* rows order[first], ... */
} Group;

typedef struct {
    const Layer *layer;
    const Call *call;
    const int64_t *order; /* the rows of x, speaker by speaker */
    const Group *groups;
    int64_t count;        /* of groups */
    LinearJob *base;      /* NULL: y holds the base already */
    float *scratch;       /* speaker_floats for each thread */
    int threads;
} SpeakersJob;

static int64_t speaker_floats(const Layer *l) {
    const int64_t width = l->experts * l->rank, columns = l->weight.columns;
    return aligned((TOGETHER + 4) * columns + TOGETHER * (width + l->experts) + l->experts) +
           TOGETHER * l->speakers.groups * UNIT;
}

/* y[i][n] += sum over groups g, k < span of lora_b[g][n][k] * hidden, lora_b from element `first`;
 * `spread` [count, groups, UNIT] is the hidden of a group, over and over. */
static void add_portable(const Layer *l, int64_t first, const float *spread, int64_t count,
                         float *const *y) {
    const Speakers *s = &l->speakers;
    const Weight *b = &s->lora_b;
    const int64_t size = l->rows * s->span;
    float w[UNIT], sums[TOGETHER][UNIT];
    for (int64_t at = 0; at < size; at += UNIT) {
        memset(sums, 0, sizeof sums);
        for (int64_t g = 0; g < s->groups; g++) {
            const int64_t from = first + g * size + at;
            if (b->format == INT8)
                run(b, from, UNIT, ((const float *)b->absmax)[from / b->block], w);
            else
                memcpy(w, (const float *)b->codes + from, sizeof w);
            for (int64_t i = 0; i < count; i++)
                for (int64_t k = 0; k < UNIT; k++)
                    sums[i][k] += w[k] * spread[(i * s->groups + g) * UNIT + k];
        }
        for (int64_t i = 0; i < count; i++)
            for (int64_t n = 0; n < UNIT / s->span; n++) {
                float total = 0.0f;
                for (int64_t k = 0; k < s->span; k++) total += sums[i][n * s->span + k];
                y[i][at / s->span + n] += total;
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

AVX512 INLINE void add_rows_avx512(const Layer *l, int64_t first, const float *spread, const int ms,
                                   const int format, float *const *y) {
    const Speakers *s = &l->speakers;
    const int64_t span = s->span, size = l->rows * span;
    const uint8_t *codes = s->lora_b.codes;
    const float *absmax = s->lora_b.absmax;
    const int shift = format == INT8 ? __builtin_ctzll((uint64_t)s->lora_b.block) : 0;
    for (int64_t at = 0; at < size; at += UNIT) {
        __m512 acc[16];
#pragma GCC unroll 16
        for (int i = 0; i < 4 * ms; i++) acc[i] = _mm512_setzero_ps();
        for (int64_t g = 0; g < s->groups; g++) {
            const int64_t from = first + g * size + at;
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
                    const float *h = spread + (m * s->groups + g) * UNIT + 16 * j;
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

AVX2 INLINE void add_rows_avx2(const Layer *l, int64_t first, const float *spread, const int ms,
                               const int format, float *const *y) {
    const Speakers *s = &l->speakers;
    const int64_t span = s->span, size = l->rows * span;
    const uint8_t *codes = s->lora_b.codes;
    const float *absmax = s->lora_b.absmax;
    const int shift = format == INT8 ? __builtin_ctzll((uint64_t)s->lora_b.block) : 0;
    float totals[2][UNIT];
    for (int64_t half = 0; half < size; half += UNIT / 2) {
        const int64_t in_unit = half % UNIT;
        __m256 acc[8];
#pragma GCC unroll 8
        for (int i = 0; i < 4 * ms; i++) acc[i] = _mm256_setzero_ps();
        for (int64_t g = 0; g < s->groups; g++) {
            const int64_t from = first + g * size + half;
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
                    const float *h = spread + (m * s->groups + g) * UNIT + in_unit + 8 * j;
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
            for (int j = 0; j < 4; j++) _mm256_storeu_ps(totals[m] + in_unit + 8 * j, sum[j]);
            if (in_unit) add_totals(totals[m], UNIT, span, y[m] + (half - in_unit) / span);
        }
    }
}

#define ADD(ROWS, MS, FORMAT)                    \
    case (FORMAT) * 10 + (MS):                   \
        ROWS(l, first, spread, MS, FORMAT, y);   \
        break;

AVX512 static void add_avx512(const Layer *l, int64_t first, const float *spread, int64_t count,
                              float *const *y) {
    for (int64_t ms; count > 0; count -= ms, spread += ms * l->speakers.groups * UNIT, y += ms) {
        ms = count >= 4 ? 4 : count >= 2 ? 2 : 1;
        switch (l->speakers.lora_b.format * 10 + ms) {
            ADD(add_rows_avx512, 1, INT8) ADD(add_rows_avx512, 2, INT8)
            ADD(add_rows_avx512, 4, INT8) ADD(add_rows_avx512, 1, FLOAT32)
            ADD(add_rows_avx512, 2, FLOAT32) ADD(add_rows_avx512, 4, FLOAT32)
        }
    }
}

AVX2 static void add_avx2(const Layer *l, int64_t first, const float *spread, int64_t count,
                          float *const *y) {
    for (int64_t ms; count > 0; count -= ms, spread += ms * l->speakers.groups * UNIT, y += ms) {
        ms = count >= 2 ? 2 : 1;
        switch (l->speakers.lora_b.format * 10 + ms) {
            ADD(add_rows_avx2, 1, INT8) ADD(add_rows_avx2, 2, INT8)
            ADD(add_rows_avx2, 1, FLOAT32) ADD(add_rows_avx2, 2, FLOAT32)
        }
    }
}
#endif

/* The experts' part of one group's rows. */
static void add_group(const SpeakersJob *job, const Group *group, float *scratch) {
    const Layer *l = job->layer;
    const Speakers *s = &l->speakers;
    const int64_t columns = l->weight.columns, width = l->experts * l->rank, m = group->count;
    const int64_t *order = job->order + group->first;
    float *gathered = scratch, *decoded = gathered + TOGETHER * columns;
    float *hidden = decoded + 4 * columns, *gates = hidden + TOGETHER * width;
    float *open = gates + TOGETHER * l->experts;
    float *spread = scratch + speaker_floats(l) - TOGETHER * s->groups * UNIT;

    const float *x = job->call->x + order[0] * columns;
    if (order[m - 1] != order[0] + m - 1) { /* rising, so these lie apart */
        for (int64_t i = 0; i < m; i++)
            memcpy(gathered + i * columns, job->call->x + order[i] * columns,
                   (size_t)columns * sizeof *x);
        x = gathered;
    }
    if (l->router) {
        const int64_t first = group->speaker * l->experts;
        const Weight router = plain(l->router, columns);
        project(&router, x, m, first, first + l->experts, first, l->experts, NULL, gates);
        softmax_rows(l, m, gates);
    } else {
        for (int64_t i = 0; i < m; i++)
            memcpy(gates + i * l->experts, job->call->gates + order[i] * job->call->gate_stride,
                   (size_t)l->experts * sizeof *gates);
    }
    for (int64_t e = 0; e < l->experts; e++) {
        open[e] = 0.0f;
        for (int64_t i = 0; i < m; i++)
            if (gates[i * l->experts + e] != 0.0f) open[e] = 1.0f;
    }
    const int64_t from = group->speaker * width;
    for (int64_t e = 0, stop; e < l->experts; e = stop) { /* a closed expert is not read */
        for (stop = e + 1; stop < l->experts && open[stop] == open[e]; stop++) {}
        if (open[e] != 0.0f)
            project(&s->lora_a, x, m, from + e * l->rank, from + stop * l->rank, from, width,
                    decoded, hidden);
    }
    for (int64_t i = 0; i < m; i++)
        for (int64_t e = 0; e < l->experts; e++)
            for (int64_t r = e * l->rank; r < (e + 1) * l->rank; r++)
                hidden[i * width + r] = open[e] != 0.0f ? hidden[i * width + r] *
                                                              gates[i * l->experts + e] * l->scaling
                                                        : 0.0f;
    for (int64_t i = 0; i < m * s->groups; i++) { /* hidden is [m, groups, span] as well */
        float *to = spread + i * UNIT;
        memcpy(to, hidden + i * s->span, (size_t)s->span * sizeof *to);
        for (int64_t have = s->span; have < UNIT; have *= 2)
            memcpy(to + have, to, (size_t)have * sizeof *to);
    }
    const int64_t first = group->speaker * width * l->rows;
    float *y[TOGETHER];
    for (int64_t i = 0; i < m; i++) y[i] = job->call->y + order[i] * l->rows;
#ifdef SAML_X86
    if (level == HAS_AVX512) {
        add_avx512(l, first, spread, m, y);
        return;
    }
    if (level == HAS_AVX2) {
        add_avx2(l, first, spread, m, y);
        return;
    }
#endif
    add_portable(l, first, spread, m, y);
}

/* Ask for what a group reads before it is needed: short stretches, each of which the processor
 * would otherwise find out about by itself, a wait at a time. */
static void fetch_group(const Layer *l, const Group *group) {
    const Weight *a = &l->speakers.lora_a, *b = &l->speakers.lora_b;
    const int64_t width = l->experts * l->rank, columns = l->weight.columns;
    const int64_t bytes[] = {width * columns * (a->format == INT8 ? 1 : 4),
                             width * l->rows * (b->format == INT8 ? 1 : 4),
                             l->router ? l->experts * columns * 4 : 0};
    const uint8_t *from[] = {a->codes, b->codes, (const uint8_t *)l->router};
    for (int part = 0; part < 3; part++)
        for (int64_t at = 0; at < bytes[part]; at += 64)
            __builtin_prefetch(from[part] + group->speaker * bytes[part] + at, 0, 2);
}

static void speakers_region(void *argument) {
    const SpeakersJob *job = argument;
    const int index = job->threads > 1 ? pool_index() : 0;
    float *scratch = job->scratch + index * speaker_floats(job->layer);
    int64_t begin, end;
    share(job->count, 1, job->threads, &begin, &end);
    if (begin < end) fetch_group(job->layer, job->groups + begin);
    if (job->base) {
        linear_region(job->base);
        if (job->threads > 1) pool_barrier();
    }
    for (int64_t g = begin; g < end; g++) {
        if (g + 1 < end && job->groups[g + 1].speaker != job->groups[g].speaker)
            fetch_group(job->layer, job->groups + g + 1);
        add_group(job, job->groups + g, scratch);
    }
}

/* Rows by speaker, in their order, and cut into groups; the number of these, or -1 where an index
 * is out of range. `order` and `groups` have m entries, `starts` count + 1. */
static int64_t group_rows(const Layer *l, const Call *call, int64_t *order, Group *groups,
                          int64_t *starts) {
    const int64_t count = l->speakers.count;
    memset(starts, 0, (size_t)(count + 1) * sizeof *starts);
    for (int64_t i = 0; i < call->m; i++) {
        const int64_t s = call->index ? call->index[i / call->each] : 0;
        if (s < 0 || s >= count) return -1;
        starts[s + 1]++;
    }
    for (int64_t s = 0; s < count; s++) starts[s + 1] += starts[s];
    int64_t found = 0;
    for (int64_t s = 0; s < count; s++)
        for (int64_t i = starts[s]; i < starts[s + 1]; i += TOGETHER) {
            const int64_t left = starts[s + 1] - i;
            groups[found++] = (Group){s, i, left < TOGETHER ? left : TOGETHER};
        }
    for (int64_t i = 0; i < call->m; i++) /* starts[s] ends up where the next speaker's were */
        order[starts[call->index ? call->index[i / call->each] : 0]++] = i;
    return found;
}

/* The vector forms behind native.c: AVX-512 and AVX2, each compiled for its own target.
 *
 * Two things: `run_*` dequantises a stretch of codes in order; `any_tile_*` multiplies a few rows
 * of W, packed or decoded, by a few rows of x.
 */
#define AVX512 __attribute__((target("avx512f,fma")))
#define AVX2 __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline))

/* ---------------------------------------------------------------- dequantise */

/* Both vector forms start at an even element; the odd head and the tail are left to the caller. */
AVX512 static int64_t run_avx512(const Weight *w, int64_t first, int64_t count, float scale,
                                 float *out) {
    const __m512 s = _mm512_set1_ps(scale);
    int64_t i = 0;
    if (w->format == INT8) {
        const __m512 unit = _mm512_set1_ps(127.0f);
        for (; i + 16 <= count; i += 16) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)(w->codes + first + i));
            __m512 q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
            _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_div_ps(q, unit), s));
        }
        return i;
    }
    const __m512 table = _mm512_loadu_ps(w->table);
    for (; i + 16 <= count; i += 16) { /* a byte to 64 bits: high nibble in the low lane */
        __m128i bytes = _mm_loadl_epi64((const __m128i *)(w->codes + (first + i) / 2));
        __m512i wide = _mm512_cvtepu8_epi64(bytes);
        __m512i index = _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_permutexvar_ps(index, table), s));
    }
    return i;
}

/* Entries of a 16-float table: bits 0 to 2 of `index` choose in both halves, the sign of `half`. */
AVX2 INLINE __m256 look_up(__m256 low, __m256 high, __m256i index, __m256i half) {
    __m256 a = _mm256_permutevar8x32_ps(low, index), b = _mm256_permutevar8x32_ps(high, index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(half));
}

AVX2 static int64_t run_avx2(const Weight *w, int64_t first, int64_t count, float scale,
                             float *out) {
    const __m256 s = _mm256_set1_ps(scale);
    int64_t i = 0;
    if (w->format == INT8) {
        const __m256 unit = _mm256_set1_ps(127.0f);
        for (; i + 8 <= count; i += 8) {
            __m128i bytes = _mm_loadl_epi64((const __m128i *)(w->codes + first + i));
            __m256 q = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
            _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_div_ps(q, unit), s));
        }
        return i;
    }
    const __m256 low = _mm256_loadu_ps(w->table), high = _mm256_loadu_ps(w->table + 8);
    for (; i + 8 <= count; i += 8) {
        int32_t four;
        memcpy(&four, w->codes + (first + i) / 2, 4);
        __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
        __m256i index = _mm256_or_si256(_mm256_srli_epi64(wide, 4), _mm256_slli_epi64(wide, 32));
        __m256 code = look_up(low, high, index, _mm256_slli_epi32(index, 28));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(code, s));
    }
    return i;
}

/* ---------------------------------------------------------------- tiles */

/* The products do not undo the order of 4-bit codes; x is laid out likewise, once a call: elements
 * [begin, end), multiples of 64. AVX-512 takes 64 codes as 16 words of 16 bits, one word a lane, and
 * shifts by 0, 4, 8 and 12: the four shifts hold elements 4*lane + {1, 0, 3, 2}. AVX2 takes them as
 * 32 bytes, the high halves of all first: look_up_bytes. */
static void pack_x86(const float *x, int64_t begin, int64_t end, int avx512, float *packed) {
    for (int64_t g = begin; g < end; g += 64)
        for (int l = 0; l < 16; l++) {
            const float *from = x + g + 4 * l;
            float *to = packed + g + (avx512 ? l : l % 8 / 2 * 8 + l / 8 * 4 + l % 2 * 2);
            to[0] = from[avx512 ? 1 : 0];
            to[avx512 ? 16 : 32] = from[avx512 ? 0 : 1];
            to[avx512 ? 32 : 1] = from[avx512 ? 3 : 2];
            to[avx512 ? 48 : 33] = from[avx512 ? 2 : 3];
        }
}

/* The totals of up to four vectors at once, each summed in the same order. */
AVX2 INLINE void store_totals(__m256 a, __m256 b, __m256 c, __m256 d, int count, float *sums) {
    const __m256 v = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 all = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    if (count >= 4) {
        _mm_storeu_ps(sums, all);
        return;
    }
    float four[4];
    _mm_storeu_ps(four, all);
    for (int i = 0; i < count; i++) sums[i] = four[i];
}

AVX512 INLINE __m256 high_half(__m512 v) {
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
}

AVX512 INLINE __m256 halves(__m512 v) {
    return _mm256_add_ps(_mm512_castps512_ps256(v), high_half(v));
}

/* The dense form: rows of floats, and x in order. */
AVX512 INLINE void dense_avx512(const Tile *t, const int rows, const int ms, __m512 *acc) {
    for (int64_t k = 0; k < t->columns; k += 16) {
        __m512 x[6];
#pragma GCC unroll 6
        for (int m = 0; m < ms; m++) x[m] = _mm512_loadu_ps(t->x + m * t->columns + k);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m512 w = _mm512_loadu_ps((const float *)(t->codes + r * t->stride) + k);
#pragma GCC unroll 6
            for (int m = 0; m < ms; m++)
                acc[r * ms + m] = _mm512_fmadd_ps(w, x[m], acc[r * ms + m]);
        }
    }
}

/* One tile: sums[r * ms + m] = W[r] . x[m] + sum over experts of B[e][r] . hidden[m][e].
 * `rows`, `ms` and `format` are constants where this is inlined, so `acc` stays in registers. */
AVX512 INLINE void tile_avx512(const Tile *t, const int rows, const int ms, const int format,
                               float *sums) {
    const __m512 table = format == FOUR_BIT ? _mm512_loadu_ps(t->table) : _mm512_setzero_ps();
    const int late = format != FLOAT32 && ms <= 2; /* scale a group's sum, not its weights */
    __m512 acc[24];
#pragma GCC unroll 24
    for (int i = 0; i < rows * ms; i++) acc[i] = _mm512_setzero_ps();
    if (format == FLOAT32) dense_avx512(t, rows, ms, acc);
    for (int64_t g = 0; format != FLOAT32 && g < t->columns / 64; g++) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const uint8_t *codes = t->codes + r * t->stride;
            const float *scales = t->scales + r * t->scale_stride;
            __m512 scale = _mm512_set1_ps(t->shift < 0 ? scales[2 * g] : scales[g >> t->shift]);
            __m512 part[2];
            __m512i words = _mm512_setzero_si512();
            if (format == FOUR_BIT) {
                words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(codes + 32 * g)));
                if (t->shift < 0)
                    scale = _mm512_mask_mov_ps(scale, 0xff00, _mm512_set1_ps(scales[2 * g + 1]));
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m512 w;
                if (format == FOUR_BIT) {
                    w = _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * j), table);
                } else {
                    __m128i bytes = _mm_loadu_si128((const void *)(codes + 64 * g + 16 * j));
                    w = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
                    if (t->shift < 0) scale = _mm512_set1_ps(scales[2 * g + j / 2]);
                }
                if (!late) w = _mm512_mul_ps(w, scale);
#pragma GCC unroll 8
                for (int m = 0; m < ms; m++) {
                    __m512 x = _mm512_loadu_ps(t->x + m * t->columns + 64 * g + 16 * j);
                    if (!late) {
                        acc[r * ms + m] = _mm512_fmadd_ps(w, x, acc[r * ms + m]);
                        continue;
                    }
                    const int begins = format == FOUR_BIT ? j == 0 : j % 2 == 0;
                    const int ends = format == FOUR_BIT ? j == 3 : j % 2 == 1;
                    part[m] = begins ? _mm512_mul_ps(w, x) : _mm512_fmadd_ps(w, x, part[m]);
                    if (ends) acc[r * ms + m] = _mm512_fmadd_ps(part[m], scale, acc[r * ms + m]);
                }
            }
        }
    }
    for (int64_t e = 0; e < t->experts; e++)
        for (int64_t k = t->open[e] != 0.0f ? 0 : t->rank; k < t->rank; k += 16) {
            const int64_t left = t->rank - k;
            const __mmask16 mask = (__mmask16)(left < 16 ? (1u << left) - 1u : 0xffffu);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const float *b = t->lora_b + e * t->lora_stride + r * t->lora_row + k;
                const __m512 w = _mm512_maskz_loadu_ps(mask, b);
#pragma GCC unroll 8
                for (int m = 0; m < ms; m++) {
                    const float *h = t->hidden + m * t->hidden_stride + e * t->rank + k;
                    const __m512 x = _mm512_maskz_loadu_ps(mask, h);
                    acc[r * ms + m] = _mm512_fmadd_ps(w, x, acc[r * ms + m]);
                }
            }
        }
#pragma GCC unroll 24
    for (int i = 0; i < rows * ms; i += 4) {
        const int left = rows * ms - i; /* a tile of one row sums in the same order as any other */
        __m256 a = halves(acc[i]), b = left > 1 ? halves(acc[i + 1]) : a;
        __m256 c = left > 2 ? halves(acc[i + 2]) : a, d = left > 3 ? halves(acc[i + 3]) : a;
        store_totals(a, b, c, d, left, sums + i);
    }
}

AVX2 INLINE void dense_avx2(const Tile *t, const int rows, const int ms, __m256 *acc) {
    for (int64_t k = 0; k < t->columns; k += 8) {
        __m256 x[4];
#pragma GCC unroll 4
        for (int m = 0; m < ms; m++) x[m] = _mm256_loadu_ps(t->x + m * t->columns + k);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const __m256 w = _mm256_loadu_ps((const float *)(t->codes + r * t->stride) + k);
#pragma GCC unroll 4
            for (int m = 0; m < ms; m++)
                acc[r * ms + m] = _mm256_fmadd_ps(w, x[m], acc[r * ms + m]);
        }
    }
}

/* 32 codes of 4 bits, one a byte, as four vectors: of each half of the bytes four in a vector. The
 * four bytes of the floats come from a table of 16 bytes each, then are put together. */
AVX2 INLINE void look_up_bytes(const __m256i *planes, __m256i index, __m256 *out) {
    const __m256i b0 = _mm256_shuffle_epi8(planes[0], index);
    const __m256i b1 = _mm256_shuffle_epi8(planes[1], index);
    const __m256i b2 = _mm256_shuffle_epi8(planes[2], index);
    const __m256i b3 = _mm256_shuffle_epi8(planes[3], index);
    const __m256i low = _mm256_unpacklo_epi8(b0, b1), high = _mm256_unpackhi_epi8(b0, b1);
    const __m256i low2 = _mm256_unpacklo_epi8(b2, b3), high2 = _mm256_unpackhi_epi8(b2, b3);
    out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, low2));
    out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, low2));
    out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high, high2));
    out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, high2));
}

AVX2 INLINE void tile_avx2(const Tile *t, const int rows, const int ms, const int format,
                           float *sums) {
    const int late = format != FLOAT32 && ms <= 2; /* scale a group's sum, not its weights */
    __m256i planes[4];
    __m256 acc[8];
    if (format == FOUR_BIT)
        for (int b = 0; b < 4; b++)
            planes[b] = _mm256_broadcastsi128_si256(
                _mm_loadu_si128((const void *)(t->planes + 16 * b)));
#pragma GCC unroll 8
    for (int i = 0; i < rows * ms; i++) acc[i] = _mm256_setzero_ps();
    if (format == FLOAT32) dense_avx2(t, rows, ms, acc);
    for (int64_t g = 0; format != FLOAT32 && g < t->columns / 64; g++)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const uint8_t *codes = t->codes + r * t->stride;
            const float *scales = t->scales + r * t->scale_stride;
            __m256 scale = _mm256_broadcast_ss(scales + (t->shift < 0 ? 2 * g : g >> t->shift));
            __m256i bytes = _mm256_setzero_si256();
            __m256 part[2];
            if (format == FOUR_BIT) {
                bytes = _mm256_loadu_si256((const void *)(codes + 32 * g));
                if (t->shift < 0)
                    scale = _mm256_blend_ps(scale, _mm256_broadcast_ss(scales + 2 * g + 1), 0xf0);
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                __m256 w[4];
                if (format == FOUR_BIT) {
                    const __m256i nibble = _mm256_set1_epi8(15);
                    look_up_bytes(planes,
                                  _mm256_and_si256(half ? bytes : _mm256_srli_epi16(bytes, 4),
                                                   nibble),
                                  w);
                } else if (t->shift < 0) {
                    scale = _mm256_broadcast_ss(scales + 2 * g + half);
                }
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    const int64_t at = 64 * g + 32 * half + 8 * j;
                    if (format == INT8) {
                        __m128i eight = _mm_loadl_epi64((const void *)(codes + at));
                        w[j] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
                    }
                    if (!late) w[j] = _mm256_mul_ps(w[j], scale);
#pragma GCC unroll 8
                    for (int m = 0; m < ms; m++) {
                        const __m256 v = _mm256_loadu_ps(t->x + m * t->columns + at);
                        if (!late)
                            acc[r * ms + m] = _mm256_fmadd_ps(w[j], v, acc[r * ms + m]);
                        else
                            part[m] = j || (format == FOUR_BIT && half)
                                          ? _mm256_fmadd_ps(w[j], v, part[m])
                                          : _mm256_mul_ps(w[j], v);
                    }
                }
                if (late && (format == INT8 || half))
                    for (int m = 0; m < ms; m++)
                        acc[r * ms + m] = _mm256_fmadd_ps(part[m], scale, acc[r * ms + m]);
            }
        }
    for (int64_t e = 0; e < t->experts; e++)
        for (int64_t k = t->open[e] != 0.0f ? 0 : t->rank; k < t->rank; k += 8) {
            const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            const int left = t->rank - k < 8 ? (int)(t->rank - k) : 8;
            const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), lane);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                const float *b = t->lora_b + e * t->lora_stride + r * t->lora_row + k;
                const __m256 w = _mm256_maskload_ps(b, mask);
#pragma GCC unroll 8
                for (int m = 0; m < ms; m++) {
                    const float *h = t->hidden + m * t->hidden_stride + e * t->rank + k;
                    const __m256 x = _mm256_maskload_ps(h, mask);
                    acc[r * ms + m] = _mm256_fmadd_ps(w, x, acc[r * ms + m]);
                }
            }
        }
#pragma GCC unroll 8
    for (int i = 0; i < rows * ms; i += 4) {
        const int left = rows * ms - i; /* a tile of one row sums in the same order as any other */
        const __m256 a = acc[i], b = left > 1 ? acc[i + 1] : a;
        store_totals(a, b, left > 2 ? acc[i + 2] : a, left > 3 ? acc[i + 3] : a, left, sums + i);
    }
}

#define CASE(TILE, ROWS, MS, FORMAT)            \
    case (FORMAT) * 100 + (ROWS) * 10 + (MS):   \
        TILE(t, ROWS, MS, FORMAT, sums);        \
        break;
#define CASES_512(ROWS, FORMAT)                                                       \
    CASE(tile_avx512, ROWS, 1, FORMAT) CASE(tile_avx512, ROWS, 2, FORMAT)             \
    CASE(tile_avx512, ROWS, 3, FORMAT) CASE(tile_avx512, ROWS, 4, FORMAT)             \
    CASE(tile_avx512, ROWS, 5, FORMAT) CASE(tile_avx512, ROWS, 6, FORMAT)
#define WIDER_512(ROWS, FORMAT)                                                       \
    CASE(tile_avx512, ROWS, 7, FORMAT) CASE(tile_avx512, ROWS, 8, FORMAT)
#define CASES_256(ROWS, FORMAT)                                                       \
    CASE(tile_avx2, ROWS, 1, FORMAT) CASE(tile_avx2, ROWS, 2, FORMAT)                 \
    CASE(tile_avx2, ROWS, 3, FORMAT) CASE(tile_avx2, ROWS, 4, FORMAT)
#define WIDER_256(ROWS, FORMAT)                                                       \
    CASE(tile_avx2, ROWS, 5, FORMAT) CASE(tile_avx2, ROWS, 6, FORMAT)                 \
    CASE(tile_avx2, ROWS, 7, FORMAT) CASE(tile_avx2, ROWS, 8, FORMAT)

AVX512 static void any_tile_avx512(const Tile *t, int rows, int ms, int format, float *sums) {
    switch (format * 100 + rows * 10 + ms) {
        CASES_512(4, FOUR_BIT) CASES_512(1, FOUR_BIT) CASES_512(4, INT8) CASES_512(1, INT8)
        WIDER_512(2, FOUR_BIT) WIDER_512(1, FOUR_BIT) WIDER_512(2, INT8) WIDER_512(1, INT8)
        CASES_512(4, FLOAT32) CASES_512(1, FLOAT32)
    }
}

AVX2 static void any_tile_avx2(const Tile *t, int rows, int ms, int format, float *sums) {
    switch (format * 100 + rows * 10 + ms) {
        CASE(tile_avx2, 4, 1, FOUR_BIT) CASE(tile_avx2, 4, 1, INT8) CASE(tile_avx2, 4, 1, FLOAT32) CASES_256(2, FOUR_BIT) CASES_256(1, FOUR_BIT) CASES_256(2, INT8) CASES_256(1, INT8)
        WIDER_256(1, FOUR_BIT) WIDER_256(1, INT8)
        CASES_256(2, FLOAT32) CASES_256(1, FLOAT32)
    }
}

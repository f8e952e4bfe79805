/* The NEON forms behind native.c, which every aarch64 has.
 *
 * `run_neon` dequantises a stretch of codes in order: four table look-ups of 16 bytes give the four
 * bytes of 16 floats. `any_tile_neon` multiplies a few decoded rows of W by a few rows of x.
 */
#define INLINE static inline __attribute__((always_inline))

/* Starts at an even element; the odd head and the tail are left to the caller. */
static int64_t run_neon(const Weight *w, int64_t first, int64_t count, float scale, float *out) {
    const float32x4_t s = vdupq_n_f32(scale);
    int64_t i = 0;
    if (w->format == INT8) {
        const float32x4_t unit = vdupq_n_f32(127.0f);
        for (; i + 8 <= count; i += 8) {
            const int16x8_t q = vmovl_s8(vld1_s8((const int8_t *)w->codes + first + i));
            const float32x4_t a = vcvtq_f32_s32(vmovl_s16(vget_low_s16(q)));
            const float32x4_t b = vcvtq_f32_s32(vmovl_s16(vget_high_s16(q)));
            vst1q_f32(out + i, vmulq_f32(vdivq_f32(a, unit), s));
            vst1q_f32(out + i + 4, vmulq_f32(vdivq_f32(b, unit), s));
        }
        return i;
    }
    const uint8x16x4_t table = vld4q_u8((const uint8_t *)w->table); /* byte by byte of the floats */
    for (; i + 16 <= count; i += 16) {
        const uint8x8_t bytes = vld1_u8(w->codes + (first + i) / 2);
        const uint8x8x2_t pairs = vzip_u8(vshr_n_u8(bytes, 4), vand_u8(bytes, vdup_n_u8(15)));
        const uint8x16_t index = vcombine_u8(pairs.val[0], pairs.val[1]);
        const uint8x16_t b0 = vqtbl1q_u8(table.val[0], index), b1 = vqtbl1q_u8(table.val[1], index);
        const uint8x16_t b2 = vqtbl1q_u8(table.val[2], index), b3 = vqtbl1q_u8(table.val[3], index);
        const uint16x8x2_t low = {{vreinterpretq_u16_u8(vzip1q_u8(b0, b1)),
                                   vreinterpretq_u16_u8(vzip2q_u8(b0, b1))}};
        const uint16x8x2_t high = {{vreinterpretq_u16_u8(vzip1q_u8(b2, b3)),
                                    vreinterpretq_u16_u8(vzip2q_u8(b2, b3))}};
        for (int j = 0; j < 2; j++) {
            const uint16x8_t a = vzip1q_u16(low.val[j], high.val[j]);
            const uint16x8_t b = vzip2q_u16(low.val[j], high.val[j]);
            vst1q_f32(out + i + 8 * j, vmulq_f32(vreinterpretq_f32_u16(a), s));
            vst1q_f32(out + i + 8 * j + 4, vmulq_f32(vreinterpretq_f32_u16(b), s));
        }
    }
    return i;
}

/* One tile: sums[r * ms + m] = W[r] . x[m] + sum over experts of B[e][r] . hidden[m][e].
 * `rows` and `ms` are constants where this is inlined, so `acc` stays in registers. */
INLINE void tile_neon(const Tile *t, const int rows, const int ms, float *sums) {
    float32x4_t acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < rows * ms; i++) acc[i] = vdupq_n_f32(0.0f);
    for (int64_t k = 0; k < t->columns; k += 4) {
        float32x4_t x[4];
#pragma GCC unroll 4
        for (int m = 0; m < ms; m++) x[m] = vld1q_f32(t->x + m * t->columns + k);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const float32x4_t w = vld1q_f32((const float *)(t->codes + r * t->stride) + k);
#pragma GCC unroll 4
            for (int m = 0; m < ms; m++) acc[r * ms + m] = vfmaq_f32(acc[r * ms + m], w, x[m]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows * ms; i++) sums[i] = vaddvq_f32(acc[i]);
    for (int64_t e = 0; e < t->experts; e++) {
        if (t->open[e] == 0.0f) continue;
        for (int r = 0; r < rows; r++)
            for (int m = 0; m < ms; m++) {
                const float *b = t->lora_b + e * t->lora_stride + r * t->lora_row;
                const float *h = t->hidden + m * t->hidden_stride + e * t->rank;
                float32x4_t part = vdupq_n_f32(0.0f);
                int64_t k = 0;
                for (; k + 4 <= t->rank; k += 4)
                    part = vfmaq_f32(part, vld1q_f32(b + k), vld1q_f32(h + k));
                float sum = vaddvq_f32(part);
                for (; k < t->rank; k++) sum += b[k] * h[k];
                sums[r * ms + m] += sum;
            }
    }
}

#define CASE(ROWS, MS)              \
    case (ROWS) * 10 + (MS):        \
        tile_neon(t, ROWS, MS, sums); \
        break;

static void any_tile_neon(const Tile *t, int rows, int ms, float *sums) {
    switch (rows * 10 + ms) {
        CASE(4, 1) CASE(4, 2) CASE(4, 3) CASE(4, 4) CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4)
    }
}

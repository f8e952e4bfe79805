/* native.c on its own, against plain loops in double: every format, block, and class of shape.
 *
 * Built for another machine and run under an emulator by tests/emulate.sh; no Python. Given the
 * path of a built library, its functions are checked in place of those compiled in here.
 */
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>

#include "../saml_kernels/backends/cpu/native.c"

static __typeof__(saml_select) *select_level = saml_select;
static __typeof__(saml_abi) *abi = saml_abi;
static __typeof__(saml_dequantise) *dequantise = saml_dequantise;
static __typeof__(saml_linear) *linear = saml_linear;

static uint32_t seed = 1;
static float next(void) { /* in [-1, 1) */
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) / 8388608.0f - 1.0f;
}

static float *floats(int64_t count) {
    float *values = malloc((size_t)(count ? count : 1) * sizeof *values);
    for (int64_t i = 0; i < count; i++) values[i] = next();
    return values;
}

static int failures;
static void expect(int good, const char *what, int64_t m, const Layer *l) {
    if (good) return;
    failures++;
    printf("%s: m %ld, %ld x %ld, block %ld, format %d, experts %ld, rank %ld, top %ld\n", what,
           (long)m, (long)l->rows, (long)l->weight.columns, (long)l->weight.block,
           l->weight.format, (long)l->experts, (long)l->rank, (long)l->top_k);
}

static void check(int64_t m, int64_t rows, int64_t columns, int64_t block, int format, int nested,
                  int64_t experts, int64_t rank, int64_t top_k, int routed, int biased) {
    const int64_t size = rows * columns, blocks = (size + block - 1) / block;
    uint8_t *codes = malloc((size_t)size), *absmax8 = malloc((size_t)blocks);
    for (int64_t i = 0; i < size; i++) codes[i] = (uint8_t)(next() * 127.0f);
    for (int64_t i = 0; i < blocks; i++) absmax8[i] = (uint8_t)(next() * 127.0f + 128.0f);
    float *absmax = floats(blocks), *nests = floats(blocks / 256 + 1), *offset = floats(1);
    float *nested_code = floats(256), *table = floats(16), *x = floats(m * columns);
    float *a = floats(experts * rank * columns), *b = floats(experts * rows * rank);
    float *router = floats(experts * columns), *gates = floats(m * experts), *bias = floats(rows);
    if (experts > 1)
        for (int64_t i = 0; i < m; i++) gates[i * experts + 1] = 0.0f; /* a closed one */
    Weight w = {codes, nested ? (void *)absmax8 : (void *)absmax, nested ? nests : NULL, offset,
                nested_code, table, block, columns, format};
    Layer l = {w, a, b, routed ? router : NULL, biased ? bias : NULL, rows, experts, rank, top_k,
               0.75f, 1.5f, {.count = 0}};

    float *dense = malloc((size_t)size * sizeof *dense), *y = floats(m * rows);
    dequantise(&w, 0, rows, dense, 0, 1);
    int same = 1;
    for (int64_t i = 0; i < size; i++) {
        const float exact = code_at(&w, i) * scale_of(&w, i / block);
        same &= dense[i] == exact;
    }
    expect(same, "dequantised otherwise", m, &l);
    const Call call = {x, gates, experts, y, m, 1, NULL, 1, 0};
    const int refused = linear(&l, &call);
    expect(!refused, "refused", m, &l);

    double worst = 0.0, largest = 1e-3, *g = malloc((size_t)(experts + 1) * sizeof *g);
    for (int64_t i = 0; i < m && !refused; i++) {
        double total = 0.0, kept = 0.0;
        for (int64_t e = 0; e < experts; e++) {
            g[e] = gates[i * experts + e];
            if (!routed) continue;
            g[e] = 0.0;
            for (int64_t k = 0; k < columns; k++)
                g[e] += (double)router[e * columns + k] * x[i * columns + k];
            total += g[e] = exp(g[e] / 1.5);
        }
        for (int64_t left = experts - top_k; routed && left > 0; left--) {
            int64_t least = -1;
            for (int64_t e = 0; e < experts; e++)
                if (g[e] > 0.0 && (least < 0 || g[e] <= g[least])) least = e;
            g[least] = 0.0;
        }
        for (int64_t e = 0; e < experts; e++) kept += g[e];
        for (int64_t e = 0; routed && e < experts; e++) g[e] /= kept;
        for (int64_t n = 0; n < rows; n++) {
            double sum = biased ? bias[n] : 0.0;
            for (int64_t k = 0; k < columns; k++)
                sum += (double)dense[n * columns + k] * x[i * columns + k];
            for (int64_t e = 0; e < experts; e++)
                for (int64_t r = 0; r < rank; r++) {
                    double p = 0.0;
                    for (int64_t k = 0; k < columns; k++)
                        p += (double)a[(e * rank + r) * columns + k] * x[i * columns + k];
                    sum += 0.75 * g[e] * p * b[(e * rows + n) * rank + r];
                }
            largest = fmax(largest, fabs(sum));
            worst = fmax(worst, fabs(sum - y[i * rows + n]));
        }
    }
    expect(worst <= 2e-5 * largest, "product is off", m, &l);
    free(codes), free(absmax8), free(absmax), free(nests), free(offset), free(nested_code);
    free(table), free(x), free(a), free(b), free(router), free(gates), free(bias), free(dense);
    free(y), free(g);
}

/* Many speakers: int8 or float32 experts, the rows' speakers in no order, gates given. */
static void check_speakers(int64_t m, int64_t rows, int64_t columns, int format, int64_t groups,
                           int64_t span, int added) {
    const int64_t count = 3, rank = groups == 1 ? span / 2 : span, experts = groups * span / rank;
    const int64_t width = experts * rank, in_a = count * width * columns, in_b = count * width * rows;
    uint8_t *codes = malloc((size_t)(rows * columns));
    for (int64_t i = 0; i < rows * columns; i++) codes[i] = (uint8_t)(next() * 127.0f);
    float *scales = floats(rows * columns / 64), *table = floats(16), *x = floats(m * columns);
    float *gates = floats(m * experts), *a = floats(in_a), *b = floats(in_b);
    float *y = floats(m * rows), *base = floats(m * rows);
    int8_t *a8 = malloc((size_t)in_a), *b8 = malloc((size_t)in_b);
    float *scales_a = floats(in_a / 128), *scales_b = floats(in_b / 128);
    for (int64_t i = 0; i < in_a; i++) a8[i] = (int8_t)(next() * 127.0f);
    for (int64_t i = 0; i < in_b; i++) b8[i] = (int8_t)(next() * 127.0f);
    int32_t *index = malloc((size_t)m * sizeof *index);
    for (int64_t i = 0; i < m; i++) index[i] = (int32_t)(i * 7 % 3 * (i % 2));
    for (int64_t i = 0; i < m; i++) gates[i * experts] = 0.0f; /* a closed one */
    const int eight = format == INT8;
    Layer l = {.weight = {codes, scales, NULL, NULL, NULL, table, 64, columns, FOUR_BIT},
               .rows = rows, .experts = experts, .rank = rank, .top_k = experts, .scaling = 0.75f,
               .temperature = 1.0f};
    Layer alone = l;
    alone.experts = 0;
    l.speakers.lora_a = (Weight){eight ? (void *)a8 : (void *)a, scales_a, NULL, NULL, NULL, NULL,
                                 128, columns, format};
    l.speakers.lora_b = (Weight){eight ? (void *)b8 : (void *)b, scales_b, NULL, NULL, NULL, NULL,
                                 128, span, format};
    l.speakers.count = count, l.speakers.groups = groups, l.speakers.span = span;
    linear(&alone, &(Call){x, NULL, 0, base, m, 1, NULL, 1, 0});
    memcpy(y, base, (size_t)(m * rows) * sizeof *y);
    expect(!linear(&l, &(Call){x, gates, experts, y, m, 1, index, 1, added}), "refused", m, &l);
    double worst = 0.0, largest = 1e-3;
    for (int64_t i = 0; i < m; i++)
        for (int64_t n = 0; n < rows; n++) {
            double sum = base[i * rows + n];
            for (int64_t j = 0; j < width; j++) {
                const int64_t in_row = index[i] * width + j, e = j / rank;
                const int64_t at = ((index[i] * groups + j / span) * rows + n) * span + j % span;
                double p = 0.0;
                for (int64_t k = 0; k < columns; k++) {
                    const int64_t c = in_row * columns + k;
                    p += (eight ? a8[c] / 127.0 * scales_a[c / 128] : a[c]) * x[i * columns + k];
                }
                sum += 0.75 * gates[i * experts + e] * p *
                       (eight ? b8[at] / 127.0 * scales_b[at / 128] : b[at]);
            }
            largest = fmax(largest, fabs(sum));
            worst = fmax(worst, fabs(sum - y[i * rows + n]));
        }
    expect(worst <= 2e-5 * largest, "speakers are off", m, &l);
    index[m - 1] = 3;
    expect(linear(&l, &(Call){x, gates, experts, y, m, 1, index, 1, 0}) == 3, "index", m, &l);
    free(codes), free(scales), free(table), free(x), free(gates), free(a), free(b), free(y);
    free(base), free(a8), free(b8), free(scales_a), free(scales_b), free(index);
}

static int all(void) {
    static const int64_t sizes[] = {1, 2, 3, 4, 5, 7, 9, 17, 26};
    int done = 1;
    for (int format = FOUR_BIT; format <= INT8; format++)
        for (int nested = 0; nested < 2; nested++)
            for (int64_t block = 32; block <= 128; block *= 2)
                for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++, done += 3) {
                    const int64_t m = sizes[i], columns = 128 * (1 + i % 3);
                    check(m, 7 + i, columns, block, format, nested, 4, 8, 4, 0, 1);
                    check(m, 5, columns, block, format, nested, 3, 5, 2, 1, 0);
                    check(m, 4, columns, block, format, nested, 0, 1, 0, 0, i % 2);
                }
    check(1, 64, 128, 64, FOUR_BIT, 1, 2, 0, 2, 1, 1);
    for (int64_t rank = 1; rank <= 32; rank *= 2) /* B in one stream */
        for (int64_t m = 1; m <= 3; m++, done++)
            check(m, 64, 192, 64, FOUR_BIT, 1, 4, rank, 4, m % 2, 1);
    check(300, 9, 1536, 64, FOUR_BIT, 1, 2, 20, 2, 0, 1); /* more than one slab of x */
    for (int format = INT8; format <= FLOAT32; format++)
        for (int64_t span = 2; span <= 64; span *= 2)
            for (int64_t m = 1; m <= 33; m += 8, done++)
                check_speakers(m, 128, 128 * (1 + m % 3), format, span > 8 ? 1 : 4, span, m % 2);
    return done;
}

/* Take the functions of the library at `path`; 0 where it does not have them. */
static int take(const char *path) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) return printf("%s\n", dlerror()), 0;
    *(void **)&select_level = dlsym(library, "saml_select");
    *(void **)&abi = dlsym(library, "saml_abi");
    *(void **)&dequantise = dlsym(library, "saml_dequantise");
    *(void **)&linear = dlsym(library, "saml_linear");
    if (select_level && abi && dequantise && linear && abi() == ABI) return 1;
    return printf("%s: not a native library of this version\n", path), 0;
}

int main(int count, char **arguments) {
    int levels = 0;
    if (count > 1 && !take(arguments[1])) return 1;
    for (int wanted = HAS_AVX2; wanted <= HAS_NEON; wanted++)
        if (select_level(wanted) == wanted && ++levels)
            printf("level %d: %d calls, %d wrong\n", wanted, all(), failures);
    return failures != 0 || levels == 0;
}

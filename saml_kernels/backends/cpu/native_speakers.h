/* Rows of many speakers: each row's experts are its own speaker's, added to y in a second pass.
 *
 * The rows are sorted by speaker and cut into groups of a few rows of one speaker, each of which one
 * thread works on: its experts are read once, as they are stored. Results do not depend on the number
 * of threads.
 *
 * Included by native.c.
 */

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
    const Expansion b = {.lora_b = &s->lora_b, .first = group->speaker * width * l->rows,
                         .rows = l->rows, .groups = s->groups, .span = s->span, .end = l->rows,
                         .open = s->groups == l->experts ? open : NULL};
    float *y[TOGETHER];
    for (int64_t i = 0; i < m; i++) y[i] = job->call->y + order[i] * l->rows;
    repeat(&b, hidden, m, spread);
    add_expansion(&b, spread, m, y);
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

// dump.c - painters.c embedded: runs given tokens through given schedules and writes out what the
// tests compare. dump MODEL [--threads N] [--kernels NAME]; one command a line on stdin:
//
//   schedule PATH        what to run, as --path writes it    build METHOD START ARG   or as a flag
//   kv exact|mean        chunks N ...   tokens of each pass  segments N ...           of BERT
//   forward ID ...       all hidden states, and the logits of all rows
//   greedy N ID ...      N greedy tokens with a key/value cache
//   batch ID ... / ID ...        many sequences in one pass: hidden states and logits of all rows
//   family P ID ... / ID ...     the first is the parent of the others; P passes, one or two
//
// An answer is tables (a line "NAME ROWS COLUMNS", then floats in memory order) and a line "end".
#define PAINTERS_NO_MAIN
#include "../painters.c"

static struct {
    Session *s;
    Schedule schedule;
    int64_t n_rows, n_states;           // rows of the whole text, states seen
    int64_t done;                       // rows of earlier passes
    float **states;                     // [n_states][rows][dim]
} dump;

static void dump_table(const char *name, int64_t rows, int64_t columns, const float *x) {
    printf("%s %lld %lld\n", name, (long long)rows, (long long)columns);
    fwrite(x, sizeof *x, (size_t)(rows * columns), stdout);
}

// One pass over the rows in the batch; their logits (a classifier: of the first row) go to `out`.
static void dump_pass(float *out) {
    Session *s = dump.s;
    const Model *m = s->model;
    int64_t n = s->batch.n_rows, d = m->dim;
    embed(s);
    for (int64_t i = 0; i < dump.n_states; i++) {
        if (i > 0) run_step(s, &dump.schedule, i - 1);
        memcpy(dump.states[i] + dump.done * d, s->x, (size_t)(n * d) * sizeof(float));
    }
    if (m->arch == LLAMA || m->mlm.data) {
        int64_t *rows = allocate(n, sizeof *rows, "rows");
        for (int64_t i = 0; i < n; i++) rows[i] = i;
        logits(s, rows, n, out + dump.done * m->vocab_size);
        release(rows);
    } else if (m->n_heads_named) {
        float *x = allocate(d, sizeof *x, "pooled");
        pooled(s, (int64_t[]){0}, 1, x);
        matmul(out, x, &m->heads[0].weight, 1);
        release(x);
    }
    batch_commit(s);
    dump.done += n;
}

static int64_t dump_numbers(char *text, int64_t **out) {
    Ids ids = {0};
    for (char *word = strtok(text, " "); word; word = strtok(NULL, " ")) {
        int64_t v = -1;
        if (strcmp(word, "/") && !parse_int(word, 0, INT_MAX, &v)) die("dump: %s", word);
        ids_push(&ids, (int)v);
    }
    *out = allocate(ids.n + 1, sizeof **out, "numbers");
    for (int64_t i = 0; i < ids.n; i++) (*out)[i] = ids.id[i];
    release(ids.id);
    return ids.n;
}

static float *dump_start(int64_t n_rows) {
    const Model *m = dump.s->model;
    dump.n_rows = n_rows;
    dump.done = 0;
    dump.n_states = dump.schedule.n_steps + 1;
    dump.states = allocate(dump.n_states, sizeof *dump.states, "states");
    for (int64_t i = 0; i < dump.n_states; i++) {
        dump.states[i] = allocate(n_rows * m->dim, sizeof(float), "state");
    }
    session_reset(dump.s, 0);
    return allocate(n_rows * (m->vocab_size + 64), sizeof(float), "logits");
}

static void dump_finish(float *out) {
    const Model *m = dump.s->model;
    for (int64_t i = 0; i < dump.n_states; i++) {
        char name[32];
        snprintf(name, sizeof name, "state%d", (int)i);
        dump_table(name, dump.n_rows, m->dim, dump.states[i]);
        release(dump.states[i]);
    }
    release(dump.states);
    if (m->arch == LLAMA || m->mlm.data) dump_table("logits", dump.n_rows, m->vocab_size, out);
    else if (m->n_heads_named) dump_table("logits", 1, m->heads[0].n_labels, out);
    release(out);
}

// Without chunks one slot of the cache serves all layers, as in scoring; with chunks each its own.
static void dump_forward(const int64_t *id, int64_t n, const int64_t *chunk, int64_t n_chunks,
                        const int64_t *segment, int64_t n_segments) {
    float *out = dump_start(n);
    int64_t slots = n_chunks || dump.s->kv_mean ? schedule_slots(dump.s, &dump.schedule) : 1;
    int q = sequence_new(dump.s, -1, n, slots);
    for (int64_t i = 0, c = 0; i < n; c++) {
        int64_t stop = c < n_chunks && i + chunk[c] < n ? i + chunk[c] : n;
        for (; i < stop; i++) {
            batch_add(dump.s, q, (int)id[i], i < n_segments ? (int)segment[i] : 0);
        }
        dump_pass(out);
    }
    dump_finish(out);
}

static void dump_greedy(int64_t count, const int64_t *id, int64_t n) {
    Session *s = dump.s;
    int vocab = s->model->vocab_size, next = 0;
    float *made = allocate(count, sizeof *made, "tokens");
    float *z = allocate(vocab, sizeof *z, "logits");
    session_reset(s, 0);
    int q = sequence_new(s, -1, n + count, schedule_slots(s, &dump.schedule));
    for (int64_t i = 0; i < n; i++) batch_add(s, q, (int)id[i], 0);
    for (int64_t i = 0; i < count; i++) {
        if (i > 0) batch_add(s, q, next, 0);
        forward(s, &dump.schedule);
        logits(s, (int64_t[]){s->batch.n_rows - 1}, 1, z);
        batch_commit(s);
        log_softmax_at(z, vocab, 0, &next);
        made[i] = (float)next;
    }
    dump_table("ids", 1, count, made);
    release(made);
    release(z);
}

// Sequences divided by -1 in one pass; or the first as the parent of the others, in one or two.
static void dump_many(const int64_t *id, int64_t n, bool family, bool two_passes) {
    int64_t rows = 0, slots = two_passes ? schedule_slots(dump.s, &dump.schedule) : 1;
    for (int64_t i = 0; i < n; i++) rows += id[i] >= 0;
    float *out = dump_start(rows);
    int parent = -1;
    for (int64_t i = 0, to; i < n; i = to + 1) {
        for (to = i; to < n && id[to] >= 0; to++) {}
        int q = sequence_new(dump.s, i ? parent : -1, to - i, slots);
        if (family && i == 0) parent = q;
        for (int64_t j = i; j < to; j++) batch_add(dump.s, q, (int)id[j], 0);
        if (two_passes && i == 0) dump_pass(out);
    }
    dump_pass(out);
    dump_finish(out);
}

static Schedule dump_schedule_flag(char *text, int T) {
    const char *name = strtok(text, " "), *start_text = strtok(NULL, " ");
    const char *argument_text = strtok(NULL, " ");
    int64_t at = 0, argument = -1;
    if (!start_text || !parse_int(start_text, 0, INT_MAX, &at)) die("dump: start");
    if (argument_text) parse_int(argument_text, INT64_MIN, INT64_MAX, &argument);
    for (int i = 0; i < N_INTERVENTIONS; i++) {
        if (!strcmp(interventions[i].name, name)) {
            return schedule_build(&interventions[i], T, at, argument);
        }
    }
    return schedule_build(NULL, T, 0, -1);
}

int main(int argc, char **argv) {
    char *line = NULL;
    size_t room = 0;
    int64_t *chunk = NULL, *segment = NULL, n_chunks = 0, n_segments = 0, *id;
    for (int i = 2; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--kernels")) options.kernels = argv[i + 1];
#ifdef _OPENMP
        if (!strcmp(argv[i], "--threads")) omp_set_num_threads(atoi(argv[i + 1]));
#endif
    }
    Model *m = model_load(argv[1]);
    dump.s = session_new(m);
    for (ssize_t got; (got = getline(&line, &room, stdin)) > 0; puts("end"), fflush(stdout)) {
        line[got - 1] = 0;
        char *rest = strchr(line, ' ');
        if (rest) *rest++ = 0;
        else rest = line + got - 1;
        if (!strcmp(line, "schedule") || !strcmp(line, "build")) {
            dump.schedule = *line == 's' ? schedule_parse(rest, m->n_layers, "dump")
                                        : dump_schedule_flag(rest, m->n_layers);
            continue;
        }
        if (!strcmp(line, "kv")) {
            dump.s->kv_mean = !strcmp(rest, "mean");
            continue;
        }
        int64_t n = dump_numbers(rest, &id);
        if (!strcmp(line, "chunks")) {
            release(chunk);
            chunk = id, n_chunks = n;
            continue;
        }
        if (!strcmp(line, "segments")) {
            release(segment);
            segment = id, n_segments = n;
            continue;
        }
        if (!strcmp(line, "forward")) dump_forward(id, n, chunk, n_chunks, segment, n_segments);
        else if (!strcmp(line, "greedy")) dump_greedy(id[0], id + 1, n - 1);
        else if (!strcmp(line, "batch")) dump_many(id, n, false, false);
        else if (!strcmp(line, "family")) dump_many(id + 1, n - 1, true, id[0] == 2);
        else die("dump: no command %s", line);
        release(id);
    }
    release(chunk);
    release(segment);
    free(line);
    session_free(dump.s);
    model_free(m);
    return 0;
}

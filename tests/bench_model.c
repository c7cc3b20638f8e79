// The program's passes at work for tests/bench.py: answers each line of stdin with seconds.
//   prefill TOKENS               one sequence from nothing, and the logits of its last token
//   decode STEPS SEQUENCES PAST  steps of all sequences behind PAST tokens each, with their logits
//   logits TOKENS FILE           prefill of known tokens; writes the logits as float32
//   encode SEQUENCES TOKENS      BERT's hidden states
//   tokenize FILE                every line of it; the number of ids stands behind the seconds
//   cc -O3 -fopenmp tests/bench_model.c -o bench_model -lm && ./bench_model MODEL [kernels]
#define PAINTERS_NO_MAIN
#include "../painters.c"

static void add_tokens(Session *s, int sequence, int64_t n) {
    static uint32_t seed = 1;
    for (int64_t i = 0; i < n; i++) {
        seed = seed * 1664525 + 1013904223;
        batch_add(s, sequence, (int)((seed >> 8) % (uint32_t)s->model->vocab_size), 0);
    }
}

static void pass(Session *s, const Schedule *schedule, const int64_t *rows, int64_t n, float *out) {
    forward(s, schedule);
    if (n) logits(s, rows, n, out);
    batch_commit(s);
}

static void tokenize(const Tokenizer *t, const char *path) {
    int64_t bytes, count = 0;
    char *data = read_file(path, &bytes);
    Ids ids = {0};
    double start = seconds();
    for (int64_t at = 0, n; at < bytes; at += n + 1) {
        const char *end = memchr(data + at, '\n', (size_t)(bytes - at));
        n = end ? end - (data + at) : bytes - at;
        ids.n = 0;
        encode(t, data + at, n, &ids);
        count += ids.n;
    }
    printf("%.6f %lld\n", seconds() - start, (long long)count);
    release(ids.id);
    release(data);
}

static void write_logits(Session *s, const Schedule *schedule, int64_t n, const char *path) {
    int64_t vocabulary = s->model->vocab_size, last = n - 1;
    float *out = allocate(vocabulary, sizeof *out, "logits");
    session_reset(s, 0);
    sequence_new(s, -1, n, schedule_slots(s, schedule));
    for (int64_t i = 0; i < n; i++) batch_add(s, 0, (int)(i * 37 % 1000), 0);
    pass(s, schedule, &last, 1, out);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(out, sizeof *out, (size_t)vocabulary, f) != (size_t)vocabulary || fclose(f)) {
        die("%s: cannot be written", path);
    }
    release(out);
    printf("0\n");
}

int main(int argc, char **argv) {
    if (argc < 2) die("a model file, please");
    if (argc > 2) options.kernels = argv[2];
    Model *m = model_load(argv[1]);
    Session *s = session_new(m);
    Schedule schedule = schedule_build(NULL, m->n_layers, -1, 0);
    int64_t slots = schedule_slots(s, &schedule);
    char line[200];
    printf("%s\n", kernels_name());
    while (fflush(stdout), fgets(line, sizeof line, stdin)) {
        char what[20], path[180];
        if (sscanf(line, "tokenize %179s", path) == 1) {
            tokenize(m->tokenizer, path);
            continue;
        }
        long long a = 0, b = 1, c = 0;
        if (sscanf(line, "logits %lld %179s", &a, path) == 2) {
            write_logits(s, &schedule, a, path);
            continue;
        }
        if (sscanf(line, "%19s %lld %lld %lld", what, &a, &b, &c) < 2) die("what is: %s", line);
        float *out = allocate(b * m->vocab_size, sizeof *out, "logits");
        int64_t *rows = allocate(b, sizeof *rows, "rows");
        double start = seconds();
        session_reset(s, 0);
        if (!strcmp(what, "prefill")) {
            sequence_new(s, -1, a, slots);
            add_tokens(s, 0, a);
            rows[0] = a - 1;
            pass(s, &schedule, rows, 1, out);
        } else if (!strcmp(what, "encode")) {
            for (int i = 0; i < a; i++) add_tokens(s, sequence_new(s, -1, b, 1), b);
            pass(s, &schedule, NULL, 0, NULL);
        } else {
            for (int i = 0; i < b; i++) {
                rows[i] = i;
                add_tokens(s, sequence_new(s, -1, a + c, slots), c);
            }
            pass(s, &schedule, NULL, 0, NULL);
            start = seconds();
            for (int64_t step = 0; step < a; step++) {
                for (int i = 0; i < b; i++) add_tokens(s, i, 1);
                pass(s, &schedule, rows, b, out);
            }
        }
        printf("%.6f\n", seconds() - start);
        release(out);
        release(rows);
    }
    return 0;
}

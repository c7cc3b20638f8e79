// Lets tests/test_metrics.py and tests/oracle_eval.py call the pure functions of section 7. One
// request a line on stdin, one answer a line on stdout; texts are hexadecimal.
#define PAINTERS_NO_MAIN
#include "../painters.c"

// The bytes of a hexadecimal word.
static char *unhex(const char *word) {
    int64_t n = (int64_t)strlen(word) / 2;
    char *text = allocate(n + 1, 1, "text");
    for (int64_t i = 0; i < n; i++) {
        char pair[3] = {word[2 * i], word[2 * i + 1], 0};
        text[i] = (char)strtol(pair, NULL, 16);
    }
    return text;
}

static const char *next_word(void) {
    const char *word = strtok(NULL, " \n");
    return word ? word : "";
}

// match FLEXIBLE TEXT ANSWER
static void answer_match(void) {
    bool flexible = atoi(next_word());
    char *text = unhex(next_word()), *answer = unhex(next_word());
    printf("%d\n", exact_match(text, answer, flexible));
    release(text);
    release(answer);
}

// text TEXT: bytes of white space at the end, words, code points
static void answer_text(void) {
    char *text = unhex(next_word());
    int64_t tail, words = count_words(text, &tail);
    printf("%lld %lld %lld\n", (long long)tail, (long long)words,
           (long long)count_codepoints(text));
    release(text);
}

// metric KIND NAME ITEMS WIDTH VALUE ...: value and standard error
static void answer_metric(void) {
    const char *kind = next_word(), *name = next_word();
    int64_t n = atoll(next_word());
    int width = atoi(next_word());
    double *values = allocate(n * width, sizeof *values, "values"), error;
    for (int64_t i = 0; i < n * width; i++) values[i] = strtod(next_word(), NULL);
    const Metric *m = metric_find(kind, name);
    if (!m) die("%s: no metric %s", kind, name);
    double value = metric_value(m, values, n, width, &error);
    printf("%.17g %.17g\n", value, error);
    release(values);
}

// probe FILE ROWS FEATURES CLASSES STRENGTH: FILE holds float32 features, then float64 targets.
// Answers the weights, then what is predicted for each row.
static void answer_probe(void) {
    const char *path = next_word();
    int64_t n = atoll(next_word()), d = atoll(next_word()), bytes;
    int classes = atoi(next_word());
    double strength = strtod(next_word(), NULL), *y = allocate(n, sizeof *y, "targets");
    char *data = read_file(path, &bytes);
    if (bytes != n * d * 4 + n * 8) die("%s: %lld bytes", path, (long long)bytes);
    memcpy(y, data + n * d * 4, (size_t)n * sizeof *y);
    const float *x = (const float *)data;
    double *w = allocate(classes * (d + 1), sizeof *w, "weights");
    probe_fit(x, y, n, d, classes, strength, w);
    for (int64_t j = 0; j < classes * (d + 1); j++) printf("%.17g ", w[j]);
    for (int64_t i = 0; i < n; i++) printf("%.17g ", probe_predict(w, x + i * d, d, classes));
    putchar('\n');
    release(w);
    release(y);
    release(data);
}

int main(void) {
    static const struct {
        const char *name;
        void (*answer)(void);
    } commands[] = {{"match", answer_match}, {"text", answer_text}, {"metric", answer_metric},
                    {"probe", answer_probe}};
    char *line = NULL;
    size_t capacity = 0;
    while (getline(&line, &capacity, stdin) > 0) {
        const char *name = strtok(line, " \n");
        for (int i = 0; i < 4; i++) {
            if (name && !strcmp(name, commands[i].name)) commands[i].answer();
        }
        fflush(stdout);
    }
    free(line);
    return 0;
}

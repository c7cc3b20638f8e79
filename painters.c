// painters.c - run a frozen Llama or BERT with its layers skipped, repeated, reversed, shuffled, in
// parallel or looped, and measure what that does to it. One file, no dependencies but libc and libm.
//
//   The experiments are those of "Transformer Layers as Painters" (Sun, Pickett, Nain and Jones,
//   arXiv 2407.09298): the layers of a model are painters who pass a canvas along a line. What if
//   some stay at home, if they swap places, if many paint on copies that are then averaged?
//
//   Build     cc -O3 -fopenmp painters.c -o painters -lm        (or: make)
//   Run       ./painters model.bin --prompt "Once upon a time" --skip 4
//   Measure   ./painters model.bin --eval task.tsv --parallel 3
//   Embed     #define PAINTERS_NO_MAIN
//             #include "painters.c"                             (README.md shows 15 lines)
//
// How to read it: from top to bottom, as a token travels. A schedule says which layers run in which
// order (1). A model file is mapped and checked (2). Kernels multiply matrices (3), layers are made
// of kernels, and a pass is one loop over the steps of a schedule (4). Tokenizers turn text into ids
// and back (5), and a text is continued (6). Metrics turn kept values into scores (7); tasks turn
// lines of text into sequences and answers into values (8); a tree of schedules is walked over them
// (9). Reports print and draw what came out (10), runs tie it together (11), flags are a table (12).
//
// MIT License; see LICENSE. Model files come from export.py; README.md documents their format.

#ifndef LANES       // section 3 compiles a part of this file several times, by including it
#if !defined _POSIX_C_SOURCE && !defined _GNU_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#ifdef _WIN32
#include <direct.h>
#include <io.h>
#define isatty _isatty
#define fileno _fileno
#define mkdir(path, mode) _mkdir(path)
#else
#include <sys/mman.h>
#include <unistd.h>
#endif
#include <fcntl.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef PAINTERS_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

// ------------------------------------------------------------------------------------------------
// 0. Ground: errors, memory, text, numbers
// ------------------------------------------------------------------------------------------------

static bool quiet;                              // --quiet: no status on stderr, only errors
static void (*on_error)(const char *message);   // set by a program that embeds this file; must not return

// Ends the program with one line on stderr and status 1. Messages have the form
// "FILE: PLACE: what is wrong; how to mend it".
#ifdef __GNUC__
__attribute__((format(printf, 1, 2)))
#endif
_Noreturn static void die(const char *format, ...) {
    char message[2000];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    for (char *p = message; *p; p++) {
        if ((unsigned char)*p < 32) *p = ' ';   // hostile names cannot break the one line
    }
    if (on_error) on_error(message);
    fflush(stdout);
    fprintf(stderr, "painters: %s\n", message);
    exit(1);
}

// A line of status on stderr, unless --quiet.
#ifdef __GNUC__
__attribute__((format(printf, 1, 2)))
#endif
static void warn(const char *format, ...) {
    if (quiet) return;
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

// Zeroed memory on a 64-byte boundary; dies naming `what` when it does not fit. Pages that are
// never touched cost nothing, since calloc leaves zeroing to the system.
static void *allocate(int64_t count, int64_t size, const char *what) {
    if (count < 0 || size < 1 || count > (int64_t)(PTRDIFF_MAX - 128) / size) {
        die("memory: %s: %lld items of %lld bytes are beyond this machine; use a smaller model, "
            "batch or task", what, (long long)count, (long long)size);
    }
    char *raw = calloc(1, (size_t)(count * size) + 64);
    if (!raw) {
        die("memory: %s: %.1f MB do not fit; use a smaller --batch, or a machine with more memory",
            what, (double)count * (double)size / 1e6);
    }
    char *p = raw + 64 - (uintptr_t)raw % 64;
    p[-1] = (char)(p - raw);
    return p;
}

// Gives back what allocate() or grow() gave; NULL is allowed.
static void release(void *p) {
    if (p) free((char *)p - ((char *)p)[-1]);
}

// Makes room for `need` items in a growing array, keeping what it holds.
static void *grow(void *p, int64_t *capacity, int64_t need, int64_t size, const char *what) {
    if (need <= *capacity) return p;
    int64_t more = need > *capacity * 2 ? need : *capacity * 2;
    void *bigger = allocate(more < 16 ? 16 : more, size, what);
    if (p) memcpy(bigger, p, (size_t)(*capacity * size));
    release(p);
    *capacity = more < 16 ? 16 : more;
    return bigger;
}

typedef struct {                // a growing list of token ids
    int *id;
    int64_t n, capacity;
} Ids;

static void ids_push(Ids *ids, int id) {
    ids->id = grow(ids->id, &ids->capacity, ids->n + 1, sizeof *ids->id, "token ids");
    ids->id[ids->n++] = id;
}

typedef struct {                // a growing string of bytes, always with a NUL behind it
    char *s;
    int64_t n, capacity;
} Text;

static void text_add(Text *t, const char *s, int64_t n) {
    t->s = grow(t->s, &t->capacity, t->n + n + 1, 1, "text");
    if (n) memcpy(t->s + t->n, s, (size_t)n);
    t->n += n;
    t->s[t->n] = 0;
}

#ifdef __GNUC__
__attribute__((format(printf, 2, 3)))
#endif
static void text_printf(Text *t, const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    t->s = grow(t->s, &t->capacity, t->n + n + 1, 1, "text");
    vsnprintf(t->s + t->n, (size_t)n + 1, format, again);
    t->n += n;
    va_end(again);
    va_end(args);
}

static char *copy_string(const char *s) {
    Text t = {0};
    text_add(&t, s, (int64_t)strlen(s));
    return t.s;
}

// The whole of a file, with a NUL behind it; *bytes gets its length. "-" is stdin.
static char *read_file(const char *path, int64_t *bytes) {
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) die("%s: cannot be opened: %s; check the path", path, strerror(errno));
    Text t = {0};
    text_add(&t, "", 0);
    for (;;) {
        t.s = grow(t.s, &t.capacity, t.n + 65536 + 1, 1, path);
        size_t got = fread(t.s + t.n, 1, (size_t)(t.capacity - t.n - 1), f);
        t.n += (int64_t)got;
        if (!got) break;
    }
    if (ferror(f)) die("%s: byte %lld: cannot be read: %s; is it a file?", path, (long long)t.n,
                       strerror(errno));
    if (f != stdin) fclose(f);
    t.s[t.n] = 0;
    *bytes = t.n;
    return t.s;
}

// Closes a file that was written, so that a full disk is an error and not a lost line.
static void close_written(FILE *f, const char *path) {
    bool bad = ferror(f) != 0;
    if (fflush(f) || (f != stdout && fclose(f)) || bad) {
        die("%s: cannot be written: %s; free space or choose another place", path,
            strerror(errno));
    }
}

// Strict numbers: the whole text, nothing behind it, lo..hi.
static bool parse_int(const char *text, int64_t lo, int64_t hi, int64_t *out) {
    char *end;
    errno = 0;
    if (!(*text == '-' || (*text >= '0' && *text <= '9'))) return false;
    long long v = strtoll(text, &end, 10);
    if (errno || end == text || *end || v < lo || v > hi) return false;
    *out = v;
    return true;
}

static bool parse_double(const char *text, double *out) {
    char *end;
    if (!*text || strspn(text, "+-.0123456789eEnainf") != strlen(text)) return false;
    *out = strtod(text, &end);
    return end != text && !*end;
}

static double seconds(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// One line of progress with an ETA, drawn over itself, when stderr is a terminal. done == total
// ends the line.
static void progress(const char *what, int64_t done, int64_t total, double started) {
    static double drawn;
    double now = seconds(), spent = now - started;
    if (quiet || !isatty(fileno(stderr)) || (done < total && now - drawn < 0.2)) return;
    drawn = now;
    double rate = spent > 0 ? (double)done / spent : 0;
    double left = rate > 0 ? (double)(total - done) / rate : 0;
    fprintf(stderr, "\r%s %lld/%lld  %.1f/s  %s %d:%02d:%02d \033[K", what, (long long)done,
            (long long)total, rate, done < total ? "ETA" : "took",
            (int)(done < total ? left : spent) / 3600, (int)(done < total ? left : spent) / 60 % 60,
            (int)(done < total ? left : spent) % 60);
    if (done >= total) fputc('\n', stderr);
    fflush(stderr);
}

// A weight matrix as it lies in the file: row-major, one row per output. 1-D tensors have one row.
enum { F32, F16, BF16, Q8, N_TYPES };
static const char *const type_names[N_TYPES] = {"f32", "f16", "bf16", "q8"};

typedef struct {
    int type;
    int64_t rows, cols;
    const void *data;           // Q8: rows * cols int8
    const uint16_t *scale;      // Q8: [rows][ceil(cols / 32)] float16; weight = int8 * scale
} Tensor;

// ------------------------------------------------------------------------------------------------
// 1. The schedule: an intervention is data
// ------------------------------------------------------------------------------------------------

// A forward pass runs a list of steps. A step is one layer, or a group of layers that all read the
// same input and whose outputs are averaged. Every experiment of the paper is such a list, and so
// is any other that can be written down with --path. Nothing below this section knows one
// intervention from another.
typedef struct {
    int n_layers;               // T, of the model it is for
    int64_t n_steps, n_slots;   // a slot is a layer at its place in the schedule, counted through
    int64_t *first;             // [n_steps + 1]: step i runs layer[first[i]] .. layer[first[i+1]-1]
    int *layer;                 // [n_slots]
    const char *method;         // where it came from, for tables: "skip", ...
    int64_t start, argument;    // S (or the layer of drop and swap); seed or R; -1 where unused
    int64_t first_capacity, layer_capacity;
} Schedule;

enum { MAX_SLOTS = 1000000 };   // a typo such as *999999999 should not fill the memory

// Adds a layer as a step of its own (parallel = false) or to the group that is the last step.
static void schedule_add(Schedule *s, int layer, bool parallel) {
    if (s->n_slots >= MAX_SLOTS) die("schedule: more than %d layers to run; use fewer", MAX_SLOTS);
    s->layer = grow(s->layer, &s->layer_capacity, s->n_slots + 1, sizeof *s->layer, "schedule");
    s->first = grow(s->first, &s->first_capacity, s->n_steps + 2, sizeof *s->first, "schedule");
    s->layer[s->n_slots++] = layer;
    if (!parallel) s->n_steps++;
    s->first[s->n_steps] = s->n_slots;
}

static void schedule_free(Schedule *s) {
    release(s->layer);
    release(s->first);
    *s = (Schedule){0};
}

// Python's random.Random(seed), as far as shuffle() needs it: MT19937 seeded with the 32-bit words
// of |seed| (init_by_array of Matsumoto and Nishimura, mt19937ar 2002).
typedef struct {
    uint32_t word[624];
    int at;
} PythonRandom;

static void python_seed(PythonRandom *r, int64_t seed) {
    uint64_t size = seed < 0 ? 0 - (uint64_t)seed : (uint64_t)seed;
    uint32_t key[2] = {(uint32_t)size, (uint32_t)(size >> 32)}, *w = r->word;
    int n_key = key[1] ? 2 : 1, i = 1, j = 0;
    w[0] = 19650218u;
    for (int k = 1; k < 624; k++) {
        w[k] = 1812433253u * (w[k - 1] ^ (w[k - 1] >> 30)) + (uint32_t)k;
    }
    for (int k = 0; k < 624 + 623; k++) {
        uint32_t mixed = w[i - 1] ^ (w[i - 1] >> 30);
        if (k < 624) w[i] = (w[i] ^ (mixed * 1664525u)) + key[j] + (uint32_t)j;
        else w[i] = (w[i] ^ (mixed * 1566083941u)) - (uint32_t)i;
        j = (j + 1) % n_key;
        if (++i == 624) {
            w[0] = w[623];
            i = 1;
        }
    }
    w[0] = 0x80000000u;
    r->at = 624;
}

static uint32_t python_word(PythonRandom *r) {
    uint32_t *w = r->word;
    if (r->at == 624) {
        for (int i = 0; i < 624; i++) {
            uint32_t y = (w[i] & 0x80000000u) | (w[(i + 1) % 624] & 0x7fffffffu);
            w[i] = w[(i + 397) % 624] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0);
        }
        r->at = 0;
    }
    uint32_t y = w[r->at++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

// random.shuffle: Fisher-Yates from the top, each index drawn by rejection on getrandbits.
static void python_shuffle(PythonRandom *r, int *item, int n) {
    for (int i = n - 1; i > 0; i--) {
        int bits = 0;
        while ((i + 1) >> bits) bits++;
        int j;
        do j = (int)(python_word(r) >> (32 - bits));
        while (j > i);
        int swapped = item[i];
        item[i] = item[j];
        item[j] = swapped;
    }
}

// The interventions. Each builder fills in the middle lo <= i < hi of a model of T layers; the
// layers before and behind stay in place. For drop and swap the middle is the layers they name.
static void build_nothing(Schedule *s, int lo, int hi, int T, int64_t argument) {
    (void)s, (void)lo, (void)hi, (void)T, (void)argument;
}

static void build_repeat(Schedule *s, int lo, int hi, int T, int64_t argument) {
    (void)argument;
    for (int i = lo; i < hi; i++) schedule_add(s, T / 2, false);
}

static void build_reverse(Schedule *s, int lo, int hi, int T, int64_t argument) {
    (void)T, (void)argument;
    for (int i = hi - 1; i >= lo; i--) schedule_add(s, i, false);
}

static void build_random(Schedule *s, int lo, int hi, int T, int64_t seed) {
    (void)T;
    PythonRandom r;
    python_seed(&r, seed);
    int *order = allocate(hi - lo, sizeof *order, "schedule");
    for (int i = lo; i < hi; i++) order[i - lo] = i;
    python_shuffle(&r, order, hi - lo);
    for (int i = lo; i < hi; i++) schedule_add(s, order[i - lo], false);
    release(order);
}

static void build_loop(Schedule *s, int lo, int hi, int T, int64_t times) {
    (void)T;
    for (int64_t turn = 0; turn < times; turn++) {
        for (int i = lo; i < hi; i++) schedule_add(s, i, i > lo);
    }
}

// To add an intervention: write a builder above and a row here; flags, --help, --show, --sweep and
// the figures follow. A `range` of MIDDLE takes a start S and works on S < i < T-S; ONE takes a
// layer k; TWO takes k and k+1.
enum { MIDDLE, ONE, TWO };
typedef struct {
    const char *name;           // the flag is --name
    int range;
    const char *argument_flag;  // a second number: its flag, lowest and highest value, default
    int64_t lowest, highest, standard;
    void (*build)(Schedule *s, int lo, int hi, int T, int64_t argument);
    const char *help;
} Intervention;

static const Intervention interventions[] = {
    {"skip", MIDDLE, NULL, 0, 0, -1, build_nothing, "skip the middle layers S < i < T-S"},
    {"repeat", MIDDLE, NULL, 0, 0, -1, build_repeat, "run layer T/2 in place of each middle layer"},
    {"reverse", MIDDLE, NULL, 0, 0, -1, build_reverse, "run the middle layers last to first"},
    {"random", MIDDLE, "seed", -INT64_MAX, INT64_MAX, 0, build_random,
     "shuffle the middle layers as Python's random.seed(K) does"},
    {"parallel", MIDDLE, NULL, 1, 1, 1, build_loop, "run the middle layers as one averaged step"},
    {"loop", MIDDLE, "times", 1, 100000, 3, build_loop, "that step R times (looped parallel)"},
    {"drop", ONE, NULL, 0, 0, -1, build_nothing, "leave out one layer"},
    {"swap", TWO, NULL, 0, 0, -1, build_reverse, "exchange layers K and K+1"},
};
enum { N_INTERVENTIONS = sizeof interventions / sizeof *interventions };

// The largest start that an intervention has in a model of T layers; -1: none.
static int64_t largest_start(const Intervention *v, int T) {
    return v->range == MIDDLE ? (T >= 2 ? (T - 2) / 2 : -1) : T - 2 + (v->range == ONE && T > 1);
}

// The schedule of an intervention, or of the untouched model where v is NULL. Dies where there is
// no such start.
static Schedule schedule_build(const Intervention *v, int T, int64_t start, int64_t argument) {
    Schedule s = {.n_layers = T, .method = v ? v->name : "baseline", .start = v ? start : -1,
                  .argument = -1};
    int lo = T, hi = T;
    if (v) {
        int64_t most = largest_start(v, T);
        if (most < 0) die("--%s: a model of %d layers leaves nothing to change", v->name, T);
        if (start < 0 || start > most) {
            die("--%s: %lld is out of range for a model of %d layers; allowed are 0 to %lld%s",
                v->name, (long long)start, T, (long long)most,
                v->range == MIDDLE ? " (S must leave a middle layer, S < i < T-S)" : "");
        }
        if (v->argument_flag && (argument < v->lowest || argument > v->highest)) {
            die("--%s: %lld is out of range; allowed are %lld to %lld", v->argument_flag,
                (long long)argument, (long long)v->lowest, (long long)v->highest);
        }
        if (v->argument_flag) s.argument = argument;
        lo = (int)start + (v->range == MIDDLE);
        hi = v->range == MIDDLE ? T - (int)start : lo + (v->range == ONE ? 1 : 2);
    }
    for (int i = 0; i < lo; i++) schedule_add(&s, i, false);
    if (v) v->build(&s, lo, hi, T, v->argument_flag ? argument : v->standard);
    for (int i = hi; i < T; i++) schedule_add(&s, i, false);
    return s;
}

// The --path grammar, one function per rule; `at` walks the text.
//   path   = step { space step }
//   step   = ( range | layers | group ) [ "*" count ]     "*" only on a single layer or a group
//   range  = layer "-" layer                              layers = layer { "|" layer }
//   group  = "(" (range | layer) { "|" (range | layer) } ")"
typedef struct {
    const char *text, *at, *place;      // place: what to call it in errors
    int n_layers;
} PathReader;

_Noreturn static void path_error(const PathReader *r, const char *expected) {
    die("%s: character %d, at \"%.20s\": expected %s", r->place, (int)(r->at - r->text) + 1, r->at,
        expected);
}

static int64_t path_number(PathReader *r, const char *expected, int64_t lo, int64_t hi) {
    const char *from = r->at;
    int64_t n = 0;
    if (*r->at < '0' || *r->at > '9') path_error(r, expected);
    for (; *r->at >= '0' && *r->at <= '9'; r->at++) {
        if (n <= hi) n = n * 10 + (*r->at - '0');
    }
    if (n < lo || n > hi) {
        r->at = from;
        path_error(r, expected);
    }
    return n;
}

static int path_layer(PathReader *r) {
    char expected[64];
    snprintf(expected, sizeof expected, "a layer, 0 to %d", r->n_layers - 1);
    return (int)path_number(r, expected, 0, r->n_layers - 1);
}

// Adds `layer` or `layer "-" layer`, all its layers to the step that is open (parallel) or one step
// each; the first of them opens a step where `opens` says so. True if it was a range.
static bool path_range(PathReader *r, Schedule *s, bool opens, bool parallel) {
    int from = path_layer(r), to = from;
    bool range = *r->at == '-';
    if (range) {
        r->at++;
        to = path_layer(r);
    }
    for (int i = from;; i += from < to ? 1 : -1) {
        schedule_add(s, i, parallel && !(opens && i == from));
        if (i == to) return range;
    }
}

static void path_step(PathReader *r, Schedule *s) {
    int64_t from = s->n_slots;
    bool repeatable = true;             // a single layer or a group
    if (*r->at == '(') {
        do {
            r->at++;
            path_range(r, s, s->n_slots == from, true);
        } while (*r->at == '|');
        if (*r->at++ != ')') {
            r->at--;
            path_error(r, "\"|\", \"-\" or \")\" inside a group");
        }
    } else if (path_range(r, s, true, false)) {
        repeatable = false;
    } else {
        while (*r->at == '|') {
            r->at++;
            schedule_add(s, path_layer(r), true);
            repeatable = false;
        }
    }
    if (*r->at != '*') return;
    if (!repeatable) path_error(r, "a space or the end (\"*\" follows a layer or a (group) only)");
    r->at++;
    int64_t n = s->n_slots - from, times = path_number(r, "a count, 1 to 1000000", 1, MAX_SLOTS);
    for (int64_t turn = 1; turn < times; turn++) {
        for (int64_t i = 0; i < n; i++) schedule_add(s, s->layer[from + i], i > 0);
    }
}

// The schedule that a --path text writes down, for a model of T layers; `place` names it in errors.
static Schedule schedule_parse(const char *text, int T, const char *place) {
    Schedule s = {.n_layers = T, .method = "path", .start = -1, .argument = -1};
    PathReader r = {text, text, place, T};
    for (;;) {
        path_step(&r, &s);
        if (!*r.at) return s;
        if (*r.at != ' ') path_error(&r, "a space, or the end of the path");
        r.at++;
    }
}

// The schedule as --show prints it and --path reads it: `0 1 2|3|4 5`. The caller releases it.
static char *schedule_text(const Schedule *s) {
    Text t = {0};
    text_add(&t, "", 0);
    for (int64_t i = 0; i < s->n_steps; i++) {
        for (int64_t j = s->first[i]; j < s->first[i + 1]; j++) {
            text_printf(&t, "%s%d", j > s->first[i] ? "|" : i ? " " : "", s->layer[j]);
        }
    }
    return t.s;
}

// ------------------------------------------------------------------------------------------------
// 2. The model file: mapped, checked, and given names
// ------------------------------------------------------------------------------------------------

enum { LLAMA = 1, BERT = 2 };
enum { ROPE_HALVES = 1, ROPE_PAIRS = 2 };   // rotate (i, i + head_dim/2), or (2i, 2i + 1)

typedef struct Tokenizer Tokenizer;

typedef struct {                // one layer; biases and *_bias are BERT's alone
    Tensor q, k, v, o;          // [heads * head_dim, dim], twice [kv_heads * head_dim, dim], [dim, ..]
    Tensor gate, up, down;      // [hidden, dim] twice, [dim, hidden]; BERT has no gate
    float *attn_norm, *ffn_norm;                        // [dim]
    float *attn_norm_bias, *ffn_norm_bias;              // [dim]
    float *q_bias, *k_bias, *v_bias, *o_bias, *up_bias, *down_bias;
} Layer;

typedef struct {                // a linear classifier on BERT's pooled output
    char *name;
    Tensor weight;              // [labels, dim]
    float *bias;                // [labels]
    bool regression;
    int n_labels;
    char **labels;              // label names in the order of the outputs
} Head;

typedef struct {
    const char *path;
    const unsigned char *file;  // the whole file, read-only
    int64_t bytes;
    bool mapped;
    int arch, dim, hidden, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, max_length;
    int n_segments;             // BERT's token types
    int rope;                   // ROPE_HALVES (Hugging Face) or ROPE_PAIRS (Meta, llama2.c)
    float rope_theta, norm_eps;
    int bos, eos, unk, pad, mask;           // token ids, -1 where there is none; BERT: [CLS], [SEP]
    int tokenizer_kind, n_tensors;
    const unsigned char *table;             // n_tensors entries of 96 bytes
    const char *meta;                       // lines "key <TAB> value"
    int64_t meta_bytes;
    Tensor embed;                           // [vocab, dim]
    Tensor output;                          // Llama: the head, [vocab, dim]; `embed` where tied
    float *norm;                            // Llama: the final norm, [dim]
    Tensor positions, segments;             // BERT: [max_length, dim], [n_segments, dim]
    float *embed_norm, *embed_norm_bias;    // BERT: [dim]
    bool has_pooler, has_mlm;
    Tensor pooler, mlm, mlm_out;            // BERT: [dim, dim] twice, [vocab, dim]
    float *pooler_bias, *mlm_bias, *mlm_norm, *mlm_norm_bias, *mlm_out_bias;
    Layer *layers;                          // [n_layers]
    Head *heads;
    int n_heads_named;
    int64_t heads_capacity;
    float *rope_frequency;                  // Llama: [head_dim / 2], radians per position
    Tokenizer *tokenizer;                   // NULL where the file has none
    int last_found;                         // where the last look-up in the tensor table ended
} Model;

// Little-endian fields of the file, whatever their alignment. A big-endian machine is refused when
// the file is opened, since the weights are used as they lie.
static uint32_t read_u32(const unsigned char *p) {
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint64_t read_u64(const unsigned char *p) {
    return read_u32(p) | (uint64_t)read_u32(p + 4) << 32;
}

static float read_f32(const unsigned char *p) {
    uint32_t bits = read_u32(p);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

// CRC-32 as zlib computes it, of the header with the checksum's own field taken as zero.
static uint32_t header_checksum(const unsigned char *p, int64_t n) {
    uint32_t crc = 0xffffffffu;
    for (int64_t i = 0; i < n; i++) {
        crc ^= i >= 32 && i < 36 ? 0 : p[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

// Maps the file read-only; where there is no mmap, reads it.
static void model_map(Model *m) {
#ifdef _WIN32
    m->file = (unsigned char *)read_file(m->path, &m->bytes);
#else
    int fd = open(m->path, O_RDONLY);
    struct stat info;
    if (fd < 0 || fstat(fd, &info)) {
        die("%s: cannot be opened: %s; check the path", m->path, strerror(errno));
    }
    if (!S_ISREG(info.st_mode)) die("%s: is not a regular file; name a model file", m->path);
    m->bytes = info.st_size;
    if ((uint64_t)info.st_size > SIZE_MAX) {
        die("%s: %.1f GB cannot be addressed by this machine; use a 64-bit one", m->path,
            (double)info.st_size / 1e9);
    }
    if (m->bytes > 0) {
        void *p = mmap(NULL, (size_t)m->bytes, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED) {
            die("%s: cannot be mapped: %s; free memory or address space (ulimit -v)", m->path,
                strerror(errno));
        }
        m->file = p;
        m->mapped = true;
    }
    close(fd);
#endif
}

static int64_t stored_bytes(int type, int64_t rows, int64_t cols) {
    int64_t n = rows * cols;
    if (type == F32) return n * 4;
    if (type == F16 || type == BF16) return n * 2;
    return (n + 63) / 64 * 64 + rows * ((cols + 31) / 32) * 2;
}

static _Noreturn void bad_file(const Model *m, const char *place, const char *fault) {
    die("%s: %s: %s; export the model again", m->path, place, fault);
}

// A header field that must lie in lo..hi.
static int header_field(const Model *m, int offset, const char *name, int64_t lo, int64_t hi) {
    int64_t v = (int32_t)read_u32(m->file + offset);
    if (v < lo || v > hi) {
        die("%s: byte %d: %s is %lld, allowed are %lld to %lld; export the model again", m->path,
            offset, name, (long long)v, (long long)lo, (long long)hi);
    }
    return (int)v;
}

// Reads and checks the fixed part of the header, the tensor table and the places of the sections.
static void model_header(Model *m) {
    const unsigned char *f = m->file;
    const union { uint16_t word; unsigned char byte[2]; } endian = {1};
    if (!endian.byte[0]) die("%s: model files are little-endian, this machine is not", m->path);
    if (m->bytes < 192 || memcmp(f, "PAINTERS", 8)) {
        die("%s: byte 0: not a painters model file; make one with: python3 export.py model SOURCE "
            "OUT.bin", m->path);
    }
    if (read_u32(f + 8) != 1) {
        die("%s: byte 8: version %u, this program reads version 1; export the model again",
            m->path, read_u32(f + 8));
    }
    if (read_u64(f + 16) != (uint64_t)m->bytes) {
        die("%s: byte 16: the file should have %llu bytes and has %lld; copy or export it again",
            m->path, (unsigned long long)read_u64(f + 16), (long long)m->bytes);
    }
    uint64_t header = read_u64(f + 24), table = read_u64(f + 40), text = read_u64(f + 48);
    uint64_t text_bytes = read_u64(f + 56), meta = read_u64(f + 144), meta_bytes = read_u64(f + 152);
    if (header < 192 || header > (uint64_t)m->bytes || header % 64) {
        bad_file(m, "byte 24", "the header's length is wrong");
    }
    if (header_checksum(f, (int64_t)header) != read_u32(f + 32)) {
        bad_file(m, "byte 32", "the header's checksum is wrong: the file is damaged");
    }
    m->n_tensors = header_field(m, 36, "the number of tensors", 1, 1 << 20);
    if (table != 192 || (header - 192) / 96 < (uint64_t)m->n_tensors) {
        bad_file(m, "byte 40", "the tensor table lies outside the header");
    }
    if (text > header || text_bytes > header - text || meta > header || meta_bytes > header - meta) {
        bad_file(m, "byte 48", "the tokenizer or the notes lie outside the header");
    }
    m->table = f + table;
    m->meta = (const char *)f + meta;
    m->meta_bytes = (int64_t)meta_bytes;
    m->arch = header_field(m, 12, "the architecture", LLAMA, BERT);
    m->dim = header_field(m, 64, "dim", 1, 1 << 20);
    m->hidden = header_field(m, 68, "hidden", 1, 1 << 22);
    m->n_layers = header_field(m, 72, "the number of layers", 1, 1 << 14);
    m->n_heads = header_field(m, 76, "the number of heads", 1, 1 << 14);
    m->n_kv_heads = header_field(m, 80, "the number of key/value heads", 1, m->n_heads);
    m->vocab_size = header_field(m, 84, "the vocabulary", 1, 1 << 24);
    m->max_length = header_field(m, 88, "the context length", 1, 1 << 24);
    m->n_segments = header_field(m, 92, "the number of segments", m->arch == BERT, 1 << 10);
    m->rope = header_field(m, 96, "the rotary layout", m->arch == LLAMA, m->arch == LLAMA ? 2 : 0);
    m->rope_theta = read_f32(f + 100);
    m->norm_eps = read_f32(f + 104);
    m->tokenizer_kind = header_field(m, 108, "the kind of tokenizer", 0, 2);
    int *special[] = {&m->bos, &m->eos, &m->unk, &m->pad, &m->mask};
    for (int i = 0; i < 5; i++) {
        *special[i] = header_field(m, 112 + 4 * i, "a special token", -1, m->vocab_size - 1);
    }
    m->head_dim = header_field(m, 136, "head_dim", 1, 1 << 16);
    if (m->n_heads % m->n_kv_heads) {
        bad_file(m, "byte 80", "the heads are not a multiple of the key/value heads");
    }
    if (m->arch == LLAMA && (m->head_dim % 2 || !(m->rope_theta > 0 && m->rope_theta < 1e30f))) {
        bad_file(m, "byte 100", "head_dim is odd or the rotary base is not a positive number");
    }
    if (m->arch == BERT && (int64_t)m->n_heads * m->head_dim != m->dim) {
        bad_file(m, "byte 136", "BERT's heads do not add up to dim");
    }
    if (!(m->norm_eps >= 0 && m->norm_eps < 1)) bad_file(m, "byte 104", "the norm's epsilon is wrong");
    if ((m->tokenizer_kind != 0) != (text_bytes != 0)) {
        bad_file(m, "byte 108", "there is a tokenizer without a kind, or a kind without a tokenizer");
    }
    int64_t end = (int64_t)header;
    for (int i = 0; i < m->n_tensors; i++) {    // every entry: known type, in order, inside the file
        const unsigned char *e = m->table + 96 * (int64_t)i;
        uint32_t type = read_u32(e + 56), rank = read_u32(e + 60);
        uint64_t rows = read_u64(e + 64), cols = read_u64(e + 72);
        uint64_t offset = read_u64(e + 80), bytes = read_u64(e + 88);
        if (e[55] || type >= N_TYPES || rank < 1 || rank > 2 || (rank == 1 && rows != 1) ||
            rows < 1 || cols < 1 || rows > 1 << 30 || cols > 1 << 30 || offset % 64 ||
            offset < (uint64_t)end || offset > (uint64_t)m->bytes ||
            bytes > (uint64_t)m->bytes - offset ||
            bytes != (uint64_t)stored_bytes((int)type, (int64_t)rows, (int64_t)cols)) {
            die("%s: tensor %d (%.50s): its type, shape or place is wrong; export the model again",
                m->path, i, (const char *)e);
        }
        end = (int64_t)(offset + bytes);
    }
}

// Finds a tensor by name; NULL where the file has none. The look-up goes on from where the last
// ended, so reading all tensors in order is linear.
static const unsigned char *model_find(Model *m, const char *name) {
    for (int i = 0; i < m->n_tensors; i++) {
        int at = (m->last_found + i) % m->n_tensors;
        const unsigned char *e = m->table + 96 * (int64_t)at;
        if (strcmp((const char *)e, name)) continue;
        m->last_found = at + 1;
        return e;
    }
    return NULL;
}

// The tensor of an entry of the table.
static Tensor tensor_at(const Model *m, const unsigned char *e) {
    Tensor t = {(int)read_u32(e + 56), (int64_t)read_u64(e + 64), (int64_t)read_u64(e + 72),
                m->file + read_u64(e + 80), NULL};
    int64_t bytes = (t.rows * t.cols + 63) / 64 * 64;
    if (t.type == Q8) t.scale = (const uint16_t *)((const char *)t.data + bytes);
    return t;
}

// The tensor of that name, which must have that shape.
static Tensor model_tensor(Model *m, const char *name, int64_t rows, int64_t cols) {
    const unsigned char *e = model_find(m, name);
    if (!e) die("%s: the tensor %s is missing; export the model again", m->path, name);
    Tensor t = tensor_at(m, e);
    if (t.rows != rows || t.cols != cols) {
        die("%s: tensor %s: its shape is %lld x %lld and should be %lld x %lld; export the model "
            "again", m->path, name, (long long)t.rows, (long long)t.cols, (long long)rows,
            (long long)cols);
    }
    return t;
}

static void widen(float *out, const Tensor *w, int64_t row);

// A vector of that name, as float32 memory of our own.
static float *model_vector(Model *m, const char *name, int64_t n) {
    Tensor t = model_tensor(m, name, 1, n);
    float *out = allocate(n, sizeof *out, name);
    widen(out, &t, 0);
    return out;
}

// The value of a line "key <TAB> value" of the file's notes, as a string of its own; NULL if absent.
static char *model_note(const Model *m, const char *key) {
    size_t n = strlen(key);
    for (const char *p = m->meta, *end = m->meta + m->meta_bytes; p < end;) {
        const char *stop = memchr(p, '\n', (size_t)(end - p));
        if (!stop) stop = end;
        if ((size_t)(stop - p) > n && !memcmp(p, key, n) && p[n] == '\t') {
            Text t = {0};
            text_add(&t, p + n + 1, stop - p - (int64_t)n - 1);
            return t.s;
        }
        p = stop + 1;
    }
    return NULL;
}

// The tensors of a layer: a row each, so that reading and checking them is one loop.
static void model_layer(Model *m, int i, Layer *l) {
    int64_t d = m->dim, h = m->hidden, q = (int64_t)m->n_heads * m->head_dim;
    int64_t kv = (int64_t)m->n_kv_heads * m->head_dim;
    bool bert = m->arch == BERT;
    const struct { const char *name; Tensor *matrix; float **vector; int64_t rows, cols; int arch; }
    wanted[] = {
        {"attn_norm", NULL, &l->attn_norm, 1, d, 0},  {"q", &l->q, NULL, q, d, 0},
        {"k", &l->k, NULL, kv, d, 0},                 {"v", &l->v, NULL, kv, d, 0},
        {"o", &l->o, NULL, d, q, 0},                  {"ffn_norm", NULL, &l->ffn_norm, 1, d, 0},
        {"gate", &l->gate, NULL, h, d, LLAMA},        {"up", &l->up, NULL, h, d, 0},
        {"down", &l->down, NULL, d, h, 0},            {"q_bias", NULL, &l->q_bias, 1, q, BERT},
        {"k_bias", NULL, &l->k_bias, 1, kv, BERT},    {"v_bias", NULL, &l->v_bias, 1, kv, BERT},
        {"o_bias", NULL, &l->o_bias, 1, d, BERT},     {"up_bias", NULL, &l->up_bias, 1, h, BERT},
        {"down_bias", NULL, &l->down_bias, 1, d, BERT},
        {"attn_norm_bias", NULL, &l->attn_norm_bias, 1, d, BERT},
        {"ffn_norm_bias", NULL, &l->ffn_norm_bias, 1, d, BERT},
    };
    for (size_t j = 0; j < sizeof wanted / sizeof *wanted; j++) {
        char name[64];
        snprintf(name, sizeof name, "layers.%d.%s", i, wanted[j].name);
        if (wanted[j].arch && (wanted[j].arch == BERT) != bert) continue;
        if (wanted[j].matrix) {
            *wanted[j].matrix = model_tensor(m, name, wanted[j].rows, wanted[j].cols);
        } else {
            *wanted[j].vector = model_vector(m, name, wanted[j].cols);
        }
    }
}

// Every tensor "heads.NAME.weight" is a classifier; its labels stand in the notes.
static void model_heads(Model *m) {
    for (int i = 0; i < m->n_tensors; i++) {
        const char *name = (const char *)m->table + 96 * (int64_t)i, *end = strstr(name, ".weight");
        if (strncmp(name, "heads.", 6) || !end || end[7] || end == name + 5) continue;
        int64_t n = (int64_t)read_u64(m->table + 96 * (int64_t)i + 64);
        if (n > 1 << 16) bad_file(m, name, "a classifier with over 65536 labels");
        Head h = {.n_labels = (int)n, .weight = model_tensor(m, name, n, m->dim)};
        Text key = {0};
        text_add(&key, name + 6, end - name - 6);
        h.name = copy_string(key.s);
        key.n = 0;
        text_printf(&key, "heads.%s.bias", h.name);
        h.bias = model_vector(m, key.s, n);
        key.n = 0;
        text_printf(&key, "head.%s.kind", h.name);
        char *kind = model_note(m, key.s);
        h.regression = n == 1 || (kind && !strcmp(kind, "regress"));
        key.n = 0;
        text_printf(&key, "head.%s.labels", h.name);
        char *labels = model_note(m, key.s), *rest = labels;
        h.labels = allocate(n, sizeof *h.labels, "label names");
        for (int j = 0; j < h.n_labels; j++) {
            char *bar = rest ? strchr(rest, '|') : NULL;
            if (bar) *bar = 0;
            h.labels[j] = copy_string(rest ? rest : "");
            rest = bar ? bar + 1 : NULL;
        }
        m->heads = grow(m->heads, &m->heads_capacity, m->n_heads_named + 1, sizeof h, "heads");
        m->heads[m->n_heads_named++] = h;
        release(labels);
        release(kind);
        release(key.s);
    }
}

// Gives names to the tensors of an opened file.
static void model_weights(Model *m) {
    int64_t d = m->dim, vocab = m->vocab_size, length = m->max_length;
    m->embed = model_tensor(m, "embed", vocab, d);
    m->layers = allocate(m->n_layers, sizeof *m->layers, "layers");
    for (int i = 0; i < m->n_layers; i++) model_layer(m, i, &m->layers[i]);
    if (m->arch == LLAMA) {
        m->norm = model_vector(m, "norm", d);
        m->output = model_find(m, "head") ? model_tensor(m, "head", vocab, d) : m->embed;
        m->rope_frequency = allocate(m->head_dim / 2, sizeof(float), "rotary frequencies");
        for (int i = 0; i < m->head_dim / 2; i++) {     // float32 steps, as Hugging Face takes them
            m->rope_frequency[i] = 1.0f / powf(m->rope_theta, (float)(2 * i) / (float)m->head_dim);
        }
        return;
    }
    m->positions = model_tensor(m, "positions", length, d);
    m->segments = model_tensor(m, "segments", m->n_segments, d);
    m->embed_norm = model_vector(m, "embed_norm", d);
    m->embed_norm_bias = model_vector(m, "embed_norm_bias", d);
    m->has_pooler = model_find(m, "pooler") != NULL;
    m->has_mlm = model_find(m, "mlm") != NULL;
    if (m->has_pooler) {
        m->pooler = model_tensor(m, "pooler", d, d);
        m->pooler_bias = model_vector(m, "pooler_bias", d);
    }
    if (m->has_mlm) {
        m->mlm = model_tensor(m, "mlm", d, d);
        m->mlm_bias = model_vector(m, "mlm_bias", d);
        m->mlm_norm = model_vector(m, "mlm_norm", d);
        m->mlm_norm_bias = model_vector(m, "mlm_norm_bias", d);
        m->mlm_out = model_find(m, "mlm_out") ? model_tensor(m, "mlm_out", vocab, d) : m->embed;
        m->mlm_out_bias = model_vector(m, "mlm_out_bias", vocab);
    }
    model_heads(m);
}

// A number that changes when any byte of the file does: results name the model they belong to.
static uint64_t hash_bytes(const unsigned char *p, int64_t n) {
    uint64_t h = 0xcbf29ce484222325u ^ (uint64_t)n;
    for (int64_t i = 0; i < n; i += 8) {
        uint64_t word = 0;
        memcpy(&word, p + i, (size_t)(n - i < 8 ? n - i : 8));
        h = (h ^ word) * 0x9e3779b97f4a7c15u;
        h ^= h >> 32;
    }
    return h;
}

// ------------------------------------------------------------------------------------------------
// 3. Kernels: all the arithmetic that takes time
// ------------------------------------------------------------------------------------------------
//
// The plain_ functions say what is computed, and run anywhere. The fast ones behind them compute the
// same to rounding. On each path every output is summed in one fixed order that does not know how
// many rows, threads or pieces of cache there are, so none of these can change a result's bits.

#ifndef _OPENMP
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#endif

// Memory of the calling thread for intermediate results; slot's previous contents are lost.
static float *scratch(int slot, int64_t floats) {
    static _Thread_local struct {
        float *p;
        int64_t floats;
    } memory[2];
    if (floats > memory[slot].floats) {
        release(memory[slot].p);
        memory[slot].p = allocate(floats, sizeof(float), "intermediate results");
        memory[slot].floats = floats;
    }
    return memory[slot].p;
}

// float16 has 5 bits of exponent and 10 of fraction; exponent 0 is fraction * 2^-24, 31 is inf/nan.
static float from_f16(uint16_t h) {
    uint32_t magnitude = h & 0x7fff;
    if (magnitude < 0x400) return (float)magnitude * (h & 0x8000 ? -0x1p-24f : 0x1p-24f);
    uint32_t bits = (uint32_t)(h & 0x8000) << 16 | magnitude << 13;
    bits += (magnitude < 0x7c00 ? 112u : 224u) << 23;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

// bfloat16 is the upper half of a float32.
static float from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

// out[cols] = one row of a matrix of any type.
static void widen(float *out, const Tensor *w, int64_t row) {
    int64_t n = w->cols, groups = (n + 31) / 32;
    const float *f32 = (const float *)w->data + row * n;
    const uint16_t *f16 = (const uint16_t *)w->data + row * n;
    const int8_t *q8 = (const int8_t *)w->data + row * n;
    switch (w->type) {
    case F32: memcpy(out, f32, (size_t)n * sizeof *out); break;
    case F16: for (int64_t i = 0; i < n; i++) out[i] = from_f16(f16[i]); break;
    case BF16: for (int64_t i = 0; i < n; i++) out[i] = from_bf16(f16[i]); break;
    case Q8:
        for (int64_t g = 0; g < groups; g++) {
            float scale = from_f16(w->scale[row * groups + g]);
            for (int64_t i = 32 * g; i < n && i < 32 * g + 32; i++) out[i] = scale * q8[i];
        }
    }
}

// Sixteen sums side by side, so that compilers may use vector registers without reordering.
static float dot(const float *a, const float *b, int64_t n) {
    float sum[16] = {0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        for (int j = 0; j < 16; j++) sum[j] += a[i + j] * b[i + j];
    }
    for (; i < n; i++) sum[i % 16] += a[i] * b[i];
    for (int half = 8; half; half /= 2) {
        for (int j = 0; j < half; j++) sum[j] += sum[j + half];
    }
    return sum[0];
}

// y[n][w->rows] = x[n][w->cols] . W^T (+ bias[w->rows] unless NULL).
static void plain_matmul(float *y, const float *x, const Tensor *w, const float *bias, int64_t n) {
    #pragma omp parallel for if (n * w->rows * w->cols > 1 << 21)
    for (int64_t row = 0; row < w->rows; row++) {
        float *wide = scratch(0, w->cols);
        widen(wide, w, row);
        for (int64_t i = 0; i < n; i++) {
            y[i * w->rows + row] = dot(x + i * w->cols, wide, w->cols) + (bias ? bias[row] : 0);
        }
    }
}

// Keys and values of one KV head, a piece of the cache: keys in blocks of 16 positions,
// [ceil(count / 16)][head_dim][16]; values [count][head_dim rounded up to 16].
typedef struct {
    const float *k, *v;
    int64_t count;
} Span;

// out[row][group][head_dim] = softmax(q . K^T / sqrt(head_dim)) . V for n rows with consecutive
// positions, over the keys of all spans in a row; `group` query heads share the KV head. Row r of
// q and out is ld floats behind row r - 1. It sees the first past + r + 1 keys if causal, else
// past + n.
static void plain_attend(float *out, const float *q, int64_t ld, int64_t n, int64_t group,
                         int64_t head_dim, const Span *spans, int64_t n_spans, int64_t past,
                         bool causal) {
    float scale = 1 / sqrtf((float)head_dim), *score = scratch(0, past + n);
    for (int64_t i = 0; i < n * group; i++) {
        int64_t at = i / group * ld + i % group * head_dim, t = 0;
        int64_t seen = causal ? past + i / group + 1 : past + n;
        float max = -INFINITY, sum = 0;
        for (const Span *s = spans; s < spans + n_spans; s++) {
            for (int64_t j = 0; j < s->count && t < seen; j++, t++) {
                const float *key = s->k + j / 16 * head_dim * 16 + j % 16;
                score[t] = 0;
                for (int64_t d = 0; d < head_dim; d++) score[t] += q[at + d] * key[d * 16];
                score[t] *= scale;
                if (score[t] > max) max = score[t];
            }
        }
        for (t = 0; t < seen; t++) sum += score[t] = expf(score[t] - max);
        for (int64_t d = 0; d < head_dim; d++) out[at + d] = 0;
        t = 0;
        for (const Span *s = spans; s < spans + n_spans; s++) {
            for (int64_t j = 0; j < s->count && t < seen; j++, t++) {
                const float *value = s->v + j * ((head_dim + 15) / 16 * 16);
                for (int64_t d = 0; d < head_dim; d++) out[at + d] += score[t] * value[d];
            }
        }
        for (int64_t d = 0; d < head_dim; d++) out[at + d] /= sum;
    }
}

// gate = silu(gate) * up: the gated activation of Llama's feed-forward layers.
static void plain_silu_multiply(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

// x = x * Phi(x), with the normal distribution itself and not its tanh approximation.
static void plain_gelu(float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.70710678f));
}




// The fast paths. 3b is written once, for vectors of LANES floats, and compiled once a path by this
// file including itself.
// gcc for Windows cannot align 32-byte vectors on the stack (its bug 54412).
#if defined __x86_64__ && (!defined _WIN32 || defined __clang__)
#define HAVE_AVX2
#include <cpuid.h>
#include <immintrin.h>
#endif
#define ON_PATH__(name, path) name##_##path
#define ON_PATH_(name, path) ON_PATH__(name, path)
#define ON_PATH(name) ON_PATH_(name, PATH)
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define ROLLED _Pragma("clang loop unroll(disable)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1")
#endif
#ifdef __x86_64__                       // else compilers read a vector anew for each of its uses
#define IN_REGISTER(v) __asm__("" : "+x"(v))
#else
#define IN_REGISTER(v) (void)(v)
#endif
#define WEIGHT_BYTES(type) ((type) == F32 ? 4 : (type) == Q8 ? 1 : 2)

enum {
    WIDE = 16,                  // attention: keys, or elements of values, side by side
    PANEL = 24, DEPTH = 512,    // rows and columns of W that stay in the L2 cache
    PAD = 16,                   // rows a power of two apart would share cache lines
    CHUNK = 128,                // rows of x that meet a panel
    FEW = 32                    // up to so many, W is read as it is stored
};

#define PATH generic
#define LANES 4
#define ROWS 2
#include "painters.c"
#undef PATH
#undef LANES
#undef ROWS

#ifdef HAVE_AVX2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define PATH avx2
#define LANES 8
#define ROWS 6
#include "painters.c"
#undef PATH
#undef LANES
#undef ROWS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#endif  // LANES
#ifdef LANES

// ------------------------------------------------------------------------------------------------
// 3b. Fast kernels (skip on first reading): compiled once for each size of vectors
// ------------------------------------------------------------------------------------------------
//
// For matmul, column k of a sum belongs to chain k % LANES. A chain is summed from its first column
// to its last, and at the end the chains are added, in one order. So the chains are the lanes of a
// vector that walks along a row, whatever other rows of x and W are multiplied beside it: a few of
// each, so that what is loaded is used several times. For attention, tile() adds a few rows of x
// times 16 keys, or 16 elements of the values, as they lie in the cache; there a sum is one chain.

#define vec ON_PATH(vec)
#define ivec ON_PATH(ivec)
#define uvec ON_PATH(uvec)
#define loose_vec ON_PATH(loose_vec)
#define pick ON_PATH(pick)
#define load ON_PATH(load)
#define load_some ON_PATH(load_some)
#define sum_of ON_PATH(sum_of)
#define store_some ON_PATH(store_some)
#define load_weights ON_PATH(load_weights)
#define load_scale ON_PATH(load_scale)
#define widen_part ON_PATH(widen_part)
#define chains_of ON_PATH(chains_of)
#define chains ON_PATH(chains)
#define outputs ON_PATH(outputs)
#define tile ON_PATH(tile)
#define tile_of ON_PATH(tile_of)
#define exp_of ON_PATH(exp_of)
#define weigh ON_PATH(weigh)
#undef VECS
#define VECS (WIDE / LANES)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec pick(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

INLINE vec load(const float *p) { return *(const loose_vec *)p; }

// All lanes, in one order.
INLINE float sum_of(vec v) {
    for (int half = LANES / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    }
    return v[0];
}

// At most n floats in a vector, zeros behind them: tails run through the same code as the rest.
INLINE vec load_some(const float *p, int64_t n) {
    vec v = {0};
    if (n >= LANES) return load(p);
    if (n > 0) memcpy(&v, p, (size_t)n * sizeof *p);
    return v;
}

INLINE void store_some(float *p, vec v, int64_t n) {
    if (n >= LANES) *(loose_vec *)p = v;
    else if (n > 0) memcpy(p, &v, (size_t)n * sizeof *p);
}

// LANES neighbouring weights as float32 (8-bit ones without their scale).
INLINE vec load_weights(const void *p, const int type) {
    if (type == F32) return load(p);
#if defined HAVE_AVX2 && LANES == 8
    if (type == Q8) return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
    if (type == F16) return (vec)_mm256_cvtph_ps(_mm_loadu_si128(p));
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16);
#else
    typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
    typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    if (type == Q8) return __builtin_convertvector(*(const bytes *)p, vec);
    ivec bits = __builtin_convertvector(*(const halves *)p, ivec) << 16;
    if (type == BF16) return (vec)bits;
    vec f = (vec)(bits >> 3 & (int32_t)0x8fffe000) * 0x1p112f;      // see from_f16()
    return (vec)((ivec)f | ((((ivec)f & 0x7fffffff) >= 0x47800000) & 0x7f800000));
#endif
}

// The scale of 32 8-bit weights, for all lanes.
INLINE vec load_scale(const uint16_t *p) {
#if defined HAVE_AVX2 && LANES == 8
    return (vec)_mm256_cvtph_ps(_mm_set1_epi16((short)*p));
#else
    return from_f16(*p) - (vec){0};
#endif
}

// c[rows][WIDE] = or += a[rows][depth] . b[depth][WIDE].
INLINE void tile_of(const int rows, float *c, int64_t ldc, const float *a, int64_t lda,
                    const float *b, int64_t ldb, int64_t depth, bool more) {
    vec sum[6][VECS];
    UNROLL for (int i = 0; i < rows; i++) {
        UNROLL for (int v = 0; v < VECS; v++) {
            sum[i][v] = more ? load(c + i * ldc + v * LANES) : (vec){0};
        }
    }
    for (int64_t k = 0; k < depth; k++) {
        vec w[VECS];
        UNROLL for (int v = 0; v < VECS; v++) w[v] = load(b + k * ldb + v * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            UNROLL for (int v = 0; v < VECS; v++) sum[i][v] += a[i * lda + k] * w[v];
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        UNROLL for (int v = 0; v < VECS; v++) *(loose_vec *)(c + i * ldc + v * LANES) = sum[i][v];
    }
}

// The same for any number of rows, spread evenly over tiles.
static void tile(int64_t rows, float *c, int64_t ldc, const float *a, int64_t lda, const float *b,
                 int64_t ldb, int64_t depth, bool more) {
    for (int64_t left = (rows + ROWS - 1) / ROWS, n; left > 0; left--) {
        n = (rows + left - 1) / left;
        switch (n) {
#define TILE(n) case n: tile_of(n, c, ldc, a, lda, b, ldb, depth, more); break
            TILE(1); TILE(2); TILE(3); TILE(4); TILE(5); TILE(6);
#undef TILE
        }
        c += n * ldc, a += n * lda, rows -= n;
    }
}

// Columns k .. k + depth of a row of W as float32, with zeros up to a multiple of 32.
static void widen_part(float *out, const Tensor *w, int64_t row, int64_t k, int64_t depth) {
    const int type = w->type, bytes = WEIGHT_BYTES(type);
    const char *from = (const char *)w->data + (row * w->cols + k) * bytes;
    const uint16_t *scale = type == Q8 ? w->scale + row * ((w->cols + 31) / 32) + k / 32 : NULL;
    for (k = 0; k < depth; k += 32) {
        char tail[32 * 4] = {0};
        const char *p = from + k * bytes;
        if (depth - k < 32) p = memcpy(tail, p, (size_t)((depth - k) * bytes));
        vec factor = type == Q8 ? load_scale(scale + k / 32) : 1 - (vec){0};
        UNROLL for (int l = 0; l < 32; l += LANES) {
            *(loose_vec *)(out + k + l) = load_weights(p + l * bytes, type) * factor;
        }
    }
}

// Adds the first `depth` columns (a multiple of 32) of n rows of x and 8, 6 or 4 of W to their
// chains, c[n][PANEL][LANES]. Rows that W lacks repeat its last one.
INLINE void chains_of(float *c, const float *x, int64_t ldx, const Tensor *w, int64_t row,
                      int64_t depth, const float *next, const int n, const int type) {
    const int bytes = WEIGHT_BYTES(type), m = n == 1 ? 8 : 12 / n;
    vec sum[3][8], factor[8];
    const char *from[8];
    const uint16_t *scale[8];
    UNROLL for (int j = 0; j < m; j++) {
        int64_t at = row + j < w->rows ? row + j : w->rows - 1;
        from[j] = (const char *)w->data + at * w->cols * bytes;
        if (type == Q8) scale[j] = w->scale + at * (w->cols / 32);
        UNROLL for (int i = 0; i < n; i++) sum[i][j] = load(c + (i * PANEL + j) * LANES);
    }
    for (int64_t k = 0; k < depth; k += 32) {
        if (n == 3) __builtin_prefetch(next + k / 2);
        if (type == Q8) UNROLL for (int j = 0; j < m; j++) factor[j] = load_scale(scale[j] + k / 32);
        ROLLED for (int l = 0; l < 32; l += LANES) {
            vec a[3];
            UNROLL for (int i = 0; i < n; i++) {
                a[i] = load(x + i * ldx + k + l);
                IN_REGISTER(a[i]);
            }
            UNROLL for (int j = 0; j < m; j++) {
                vec f = load_weights(from[j] + (k + l) * bytes, type);
                if (type == Q8) f *= factor[j];
                IN_REGISTER(f);
                UNROLL for (int i = 0; i < n; i++) sum[i][j] += a[i] * f;
            }
        }
    }
    UNROLL for (int j = 0; j < m; j++) {
        UNROLL for (int i = 0; i < n; i++) *(loose_vec *)(c + (i * PANEL + j) * LANES) = sum[i][j];
    }
}

// The same for any number of rows of x and PANEL rows of W. Few rows of x meet many of W at a time,
// since then reading W is what takes time; three meet four, and the next three are fetched meanwhile.
static void chains(float *c, const float *x, int64_t ldx, int64_t n, const Tensor *w, int64_t row,
                   int64_t depth) {
    int64_t end = row + PANEL < w->rows ? row + PANEL : w->rows;
    for (int64_t left = (n + 2) / 3, some; left > 0; left--, n -= some) {
        some = (n + left - 1) / left;
        for (int64_t r = row; r < end; r += some == 1 ? 8 : 12 / some) {
            float *to = c + (r - row) * LANES;
            const float *next = x + 3 * ldx + (r - row) * depth / 8;
            switch (3 * w->type + some) {
#define TILE(n, type) \
            case 3 * type + n: chains_of(to, x, ldx, w, r, depth, next, n, type); break
            TILE(1, F32); TILE(1, F16); TILE(1, BF16); TILE(1, Q8);
            TILE(2, F32); TILE(2, F16); TILE(2, BF16); TILE(2, Q8);
            TILE(3, F32); TILE(3, F16); TILE(3, BF16); TILE(3, Q8);
#undef TILE
            }
        }
        c += some * PANEL * LANES, x += some * ldx;
    }
}

// Outputs row .. row + PANEL of rows first .. first + some of the n of x, which lies in `blocks` of
// depth columns each, [blocks][n][depth + PAD].
static void outputs(float *y, const float *x, const Tensor *w, const float *bias, int64_t n,
                    int64_t first, int64_t some, int64_t row, int64_t depth, int64_t blocks,
                    bool direct) {
    int64_t rows = w->rows - row < PANEL ? w->rows - row : PANEL, ldx = depth + PAD;
    float *c = scratch(1, PANEL * (CHUNK * LANES + DEPTH + PAD)), *wide = c + CHUNK * PANEL * LANES;
    const Tensor panel = {F32, rows, DEPTH + PAD, wide, NULL};
    memset(c, 0, (size_t)(some * PANEL * LANES) * sizeof *c);
    for (int64_t b = 0; b < blocks; b++) {
        int64_t k = b * depth, here = w->cols - k < depth ? w->cols - k : depth;
        for (int64_t r = 0; r < rows && !direct; r++) {
            widen_part(wide + r * (DEPTH + PAD), w, row + r, k, here);
        }
        chains(c, x + (b * n + first) * ldx, ldx, some, direct ? w : &panel, direct ? row : 0,
               (here + 31) / 32 * 32);
    }
    for (int64_t i = 0; i < some; i++) {
        for (int64_t r = 0; r < rows; r++) {
            float sum = sum_of(load(c + (i * PANEL + r) * LANES));
            y[(first + i) * w->rows + row + r] = sum + (bias ? bias[row + r] : 0);
        }
    }
}

static void ON_PATH(matmul)(float *y, const float *x, const Tensor *w, const float *bias,
                            int64_t n) {
    bool direct = n <= FEW && w->cols % 32 == 0;
    int64_t depth = direct ? w->cols : DEPTH, blocks = (w->cols + depth - 1) / depth;
    int64_t panels = (w->rows + PANEL - 1) / PANEL, chunks = (n + CHUNK - 1) / CHUNK;
    float *copy = scratch(0, blocks * n * (depth + PAD));
    #pragma omp parallel if (n * w->rows * w->cols > 1 << 21)
    {
        #pragma omp for
        for (int64_t i = 0; i < blocks * n; i++) {
            int64_t k = i / n * depth, here = w->cols - k < depth ? w->cols - k : depth;
            float *to = copy + i * (depth + PAD);
            memcpy(to, x + i % n * w->cols + k, (size_t)here * sizeof *x);
            for (; here % 32; here++) to[here] = 0;
        }
        #pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < panels * chunks; i++) {
            int64_t first = i % chunks * CHUNK, some = n - first < CHUNK ? n - first : CHUNK;
            outputs(y, copy, w, bias, n, first, some, i / chunks * PANEL, depth, blocks, direct);
        }
    }
}

// e^x by 2^n * e^r with |r| <= ln(2) / 2 (Cody and Waite's reduction); subnormal results become 0.
INLINE vec exp_of(vec x) {
    vec t = x * 1.44269504f + 0x1.8p23f, n = t - 0x1.8p23f;     // rounds to an integer
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1;
    p = (vec)((uvec)p + ((uvec)t << 23));
    p = pick(x < -87.3365f, (vec){0}, p);
    p = pick(x > 88.7228f, INFINITY - (vec){0}, p);
    return pick(x == x, p, x);
}

static void ON_PATH(silu_multiply)(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        vec x = load_some(gate + i, n - i);
        store_some(gate + i, x / (1 + exp_of(-x)) * load_some(up + i, n - i), n - i);
    }
}

// 1 - erf(z) as t * exp(polynomial(t) - z^2), a Chebyshev fit with relative error below 1.2e-7
// (Press et al., Numerical Recipes, erfcc).
static void ON_PATH(gelu)(float *x, int64_t n) {
    static const float c[] = {0.17087277f, -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                              -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f};
    for (int64_t i = 0; i < n; i += LANES) {
        vec v = load_some(x + i, n - i), z = (vec)((ivec)v & 0x7fffffff) * 0.70710678f;
        vec t = 1 / (1 + 0.5f * z), p = c[0] - (vec){0};
        for (int j = 1; j < 10; j++) p = p * t + c[j];
        vec half = 0.5f * t * exp_of(p - z * z);
        store_some(x + i, v * pick(v < 0, half, 1 - half), n - i);
    }
}

// c[rows][stride] += p[rows][from .. to] . V[from .. to][stride]; positions count through the spans.
static void weigh(float *c, int64_t stride, const float *p, int64_t ldp, int64_t rows,
                  const Span *s, int64_t from, int64_t to) {
    for (int64_t start = 0; start < to; start += s++->count) {
        int64_t first = from > start ? from : start;
        int64_t last = to < start + s->count ? to : start + s->count;
        for (int64_t t = first; t < last; t += DEPTH) {     // they stay in the cache for all rows
            for (int64_t d = 0; d < stride; d += WIDE) {
                tile(rows, c + d, stride, p + t, ldp, s->v + (t - start) * stride + d, stride,
                     last - t < DEPTH ? last - t : DEPTH, true);
            }
        }
    }
}

static void ON_PATH(attend)(float *out, const float *q, int64_t ld, int64_t n, int64_t group,
                            int64_t head_dim, const Span *spans, int64_t n_spans, int64_t past,
                            bool causal) {
    enum { SOME = 4 * ROWS };              // rows that read keys and values together
    int64_t stride = (head_dim + 15) / 16 * 16, lda = stride + 1;
    int64_t keys_padded = (past + n + 31) / 16 * 16, ldp = keys_padded + 16, rows;
    float *p = scratch(1, SOME * (ldp + stride + lda)), *c = p + SOME * ldp, *a = c + SOME * stride;
    for (int64_t i0 = 0; i0 < n * group; i0 += rows) {
        rows = n * group - i0 < SOME ? n * group - i0 : SOME;
        int64_t last = i0 + rows - 1, most = causal ? past + last / group + 1 : past + n, start = 0;
        for (int64_t i = 0; i < rows; i++) {
            const float *from = q + (i0 + i) / group * ld + (i0 + i) % group * head_dim;
            for (int64_t d = 0; d < head_dim; d++) a[i * lda + d] = from[d] / sqrtf((float)head_dim);
            memset(c + i * stride, 0, (size_t)stride * sizeof *c);
        }
        for (const Span *s = spans; s < spans + n_spans && start < most; start += s++->count) {
            int64_t keys = most - start < s->count ? most - start : s->count;
            for (int64_t t = 0; t < keys; t += WIDE) {
                tile(rows, p + start + t, ldp, a, lda, s->k + t * head_dim, WIDE, head_dim, false);
            }
        }
        float sums[SOME];
        for (int64_t i = 0; i < rows; i++) {        // softmax; keys that are not seen get weight 0
            int64_t seen = causal ? past + (i0 + i) / group + 1 : most;
            float *row = p + i * ldp, max = row[0];
            for (int64_t t = 1; t < seen; t++) max = row[t] > max ? row[t] : max;
            for (int64_t t = seen; t < keys_padded; t++) row[t] = -INFINITY;
            vec sum = {0};
            for (int64_t t = 0; t < keys_padded; t += LANES) {
                vec e = exp_of(load(row + t) - max);
                *(loose_vec *)(row + t) = e;
                sum += e;
            }
            sums[i] = sum_of(sum);
        }
        int64_t least = causal ? past + i0 / group + 1 : most;  // what the first row sees
        weigh(c, stride, p, ldp, rows, spans, 0, least);
        for (int64_t i = 0; i < rows && causal; i++) {
            weigh(c + i * stride, stride, p + i * ldp, ldp, 1, spans, least,
                  past + (i0 + i) / group + 1);
        }
        for (int64_t i = 0; i < rows; i++) {
            float *to = out + (i0 + i) / group * ld + (i0 + i) % group * head_dim;
            for (int64_t d = 0; d < head_dim; d++) to[d] = c[i * stride + d] / sums[i];
        }
    }
}

#endif  // LANES
#ifndef LANES

// ------------------------------------------------------------------------------------------------
// 3c. Choosing the kernels
// ------------------------------------------------------------------------------------------------

typedef struct {                // one way to compute all this; the last that the CPU has is taken
    const char *name;
    int level;                  // of the CPU: 0 any, 1 AVX2 with FMA and F16C
    void (*matmul)(float *, const float *, const Tensor *, const float *, int64_t);
    void (*attend)(float *, const float *, int64_t, int64_t, int64_t, int64_t, const Span *,
                   int64_t, int64_t, bool);
    void (*silu_multiply)(float *, const float *, int64_t);
    void (*gelu)(float *, int64_t);
} Kernels;

static const Kernels kernel_table[] = {
    {"plain", 0, plain_matmul, plain_attend, plain_silu_multiply, plain_gelu},
    {"generic", 0, matmul_generic, attend_generic, silu_multiply_generic, gelu_generic},
#ifdef HAVE_AVX2
    {"avx2", 1, matmul_avx2, attend_avx2, silu_multiply_avx2, gelu_avx2},
#endif
};
enum { N_KERNELS = sizeof kernel_table / sizeof *kernel_table };
static const Kernels *kernels = &kernel_table[0];

// Has this CPU what entry i of the table needs?
static bool kernels_available(int i) {
    int level = 0;
#ifdef HAVE_AVX2
    unsigned a, b, c, d;
    __builtin_cpu_init();
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    if (f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = 1;
#endif
    return kernel_table[i].level <= level;
}

// Chooses a path by name, or the fastest one this CPU has when name is NULL.
static void kernels_init(const char *name) {
    for (int i = N_KERNELS - 1; i >= 0; i--) {
        if (!kernels_available(i) || (name && strcmp(name, kernel_table[i].name))) continue;
        kernels = &kernel_table[i];
        return;
    }
    die("--kernels: this CPU has no \"%s\"; leave the flag out, or use plain", name ? name : "kernels");
}

static const char *kernels_name(void) { return kernels->name; }

static void matmul(float *y, const float *x, const Tensor *w, const float *bias, int64_t n) {
    kernels->matmul(y, x, w, bias, n);
}

static void attend(float *out, const float *q, int64_t ld, int64_t n, int64_t group,
                   int64_t head_dim, const Span *spans, int64_t n_spans, int64_t past,
                   bool causal) {
    kernels->attend(out, q, ld, n, group, head_dim, spans, n_spans, past, causal);
}

static void silu_multiply(float *gate, const float *up, int64_t n) {
    kernels->silu_multiply(gate, up, n);
}

static void gelu(float *x, int64_t n) { kernels->gelu(x, n); }

// ------------------------------------------------------------------------------------------------
// 4. Layers and the forward pass
// ------------------------------------------------------------------------------------------------

// A batch is ragged: rows of tokens from many sequences, no padding, one matmul over all rows. A
// sequence owns a segment of keys and values, and may have a parent whose rows come before its own:
// the choices of a question are children of its context, and read its keys instead of computing
// them again.
enum { MAX_DEPTH = 8 };         // a sequence and its ancestors

typedef struct {
    int parent;                 // index of the sequence that comes before, or -1
    int64_t before;             // rows of all ancestors: the position of the first own row
    int64_t length, pending;    // own rows held by the cache, and rows added by the present batch
    int64_t capacity;           // own rows there is room for, a multiple of 16
    int64_t n_slots;            // places of the schedule that keep their keys and values. 1: they
                                // are read in this pass only, and one slot serves every layer
    bool by_node;               // slots are numbered over a tree of schedules, not along one
    float *data;                // [n_slots][kv_heads] x { K [capacity/16][head_dim][16],
    int64_t data_capacity;      //                         V [capacity][value_stride] }
} Sequence;

// Where a layer runs: its place along the schedule, and in the tree that the schedule is part of.
typedef struct { int64_t slot, node; } Place;

typedef struct { int sequence; int64_t row, n; } Run;   // rows of one sequence, standing together

typedef struct {                // the rows that the next pass runs
    int64_t n_rows, capacity, n_runs, runs_capacity;
    int *token, *segment;       // [rows]; segment is BERT's token type
    int64_t *position;          // [rows]
    float *rope;                // [rows][head_dim / 2][2]: cosine and sine
    Run *runs;
} Batch;

typedef struct Session Session;
struct Session {                // everything a forward pass needs beside the model
    const Model *model;
    bool kv_mean;               // --kv mean: one slot per parallel step (SPEC: the public code)
    Sequence *sequences;
    int64_t n_sequences, sequences_capacity;
    Batch batch;
    float *x;                                   // [rows][dim]: the residual stream
    float *normed, *out, *input, *sum;          // [rows][dim]
    float *q, *att;                             // [rows][heads * head_dim]
    float *k, *v, *k_sum, *v_sum;               // [rows][kv_heads * head_dim]
    float *gate, *up;                           // [rows][hidden]
    float *work;                                // what all these are pieces of,
    int64_t work_rows;                          // and the rows they have room for
    int64_t layer_passes, layer_rows;           // layers run so far, and rows they ran on
    void (*listener)(Session *s, void *data);   // called on x after the embedding and each step
    void *listener_data;
};

static int64_t value_stride(const Model *m) { return (m->head_dim + 15) / 16 * 16; }

// Small work is not worth waking threads for. (Without OpenMP nobody asks.)
__attribute__((unused)) static bool worth_threads(int64_t operations) {
    return operations > 1 << 19;
}

static Session *session_new(const Model *m) {
    Session *s = allocate(1, sizeof *s, "session");
    s->model = m;
    return s;
}

static void batch_free(Batch *b) {
    release(b->token);
    release(b->segment);
    release(b->position);
    release(b->rope);
    release(b->runs);
    *b = (Batch){0};
}

static void session_free(Session *s) {
    for (int64_t i = 0; i < s->sequences_capacity; i++) release(s->sequences[i].data);
    release(s->work);
    batch_free(&s->batch);
    release(s->sequences);
    release(s);
}

// Forgets all sequences from index `keep` on; their memory stays for those that follow.
static void session_reset(Session *s, int64_t keep) {
    s->n_sequences = keep;
    s->batch.n_rows = s->batch.n_runs = 0;
    for (int64_t i = 0; i < keep; i++) s->sequences[i].pending = 0;
}

// Makes sequence `i` an empty one with room for `capacity` rows in each of n_slots slots.
static void sequence_open(Session *s, int64_t i, int parent, int64_t capacity, int64_t n_slots) {
    const Model *m = s->model;
    Sequence *q = &s->sequences[i];
    q->parent = parent;
    q->length = q->pending = 0;
    q->by_node = false;
    q->n_slots = n_slots;
    q->capacity = (capacity + 15) / 16 * 16;
    int64_t row = m->n_kv_heads * (m->head_dim + value_stride(m));
    if (q->capacity > (int64_t)(PTRDIFF_MAX / 64) / row / n_slots) {
        die("key/value cache: %lld tokens in %lld places of the schedule are beyond this machine; "
            "use a shorter schedule or text", (long long)capacity, (long long)n_slots);
    }
    if (q->data_capacity < q->capacity * row * n_slots) {
        release(q->data);
        q->data_capacity = 0;
        q->data = NULL;
        q->data = allocate(q->capacity * row * n_slots, sizeof *q->data, "key/value cache");
        q->data_capacity = q->capacity * row * n_slots;
    }
    const Sequence *p = parent < 0 ? NULL : &s->sequences[parent];
    q->before = p ? p->before + p->length + p->pending : 0;
}

// A new sequence behind `parent` (-1: none) with room for `capacity` rows in each of n_slots slots.
static int sequence_new(Session *s, int parent, int64_t capacity, int64_t n_slots) {
    int depth = 1;
    for (int i = parent; i >= 0; i = s->sequences[i].parent) depth++;
    if (depth > MAX_DEPTH) die("a sequence has over %d ancestors; put them into one", MAX_DEPTH);
    s->sequences = grow(s->sequences, &s->sequences_capacity, s->n_sequences + 1,
                        sizeof *s->sequences, "sequences");
    sequence_open(s, s->n_sequences, parent, capacity, n_slots);
    return (int)s->n_sequences++;
}

// Adds a token to the batch, behind what its sequence holds. The rows of a sequence stand together,
// and those of a parent come before its children's. `segment` is BERT's token type.
static void batch_add(Session *s, int sequence, int token, int segment) {
    Sequence *q = &s->sequences[sequence];
    const Model *m = s->model;
    Batch *b = &s->batch;
    int64_t position = q->before + q->length + q->pending, n = b->n_rows;
    if (token < 0 || token >= m->vocab_size) {
        die("token %d is out of range; the model knows 0 to %d", token, m->vocab_size - 1);
    }
    if (position >= m->max_length) {
        die("the text is longer than the model's context of %d tokens; shorten it", m->max_length);
    }
    if (n == b->capacity) {
        int64_t had[3] = {n, n, n * m->head_dim};
        b->token = grow(b->token, &had[0], n + 1, sizeof *b->token, "batch");
        b->segment = grow(b->segment, &had[1], n + 1, sizeof *b->segment, "batch");
        b->position = grow(b->position, &b->capacity, n + 1, sizeof *b->position, "batch");
        b->rope = grow(b->rope, &had[2], b->capacity * m->head_dim, sizeof *b->rope, "batch");
    }
    if (!b->n_runs || b->runs[b->n_runs - 1].sequence != sequence) {
        b->runs = grow(b->runs, &b->runs_capacity, b->n_runs + 1, sizeof *b->runs, "batch");
        b->runs[b->n_runs++] = (Run){sequence, n, 0};
    }
    b->runs[b->n_runs - 1].n++;
    b->token[n] = token;
    b->segment[n] = segment;
    b->position[n] = position;
    q->pending++;
    b->n_rows++;
}

// The keys (or the values) of one KV head in a slot of a sequence.
static float *cache_at(const Session *s, const Sequence *q, Place place, int head, bool values) {
    const Model *m = s->model;
    int64_t slot = q->n_slots == 1 ? 0 : q->by_node ? place.node : place.slot;
    int64_t keys = q->capacity * m->head_dim, both = keys + q->capacity * value_stride(m);
    return q->data + (slot * m->n_kv_heads + head) * both + (values ? keys : 0);
}

// Writes the rows' keys and values into the cache: keys in blocks of 16 positions, transposed, so
// that attention reads 16 keys at a time (Span, section 3).
static void cache_store(Session *s, Place place, const float *k, const float *v) {
    const Model *m = s->model;
    int64_t d = m->head_dim, width = m->n_kv_heads * d, stride = value_stride(m);
    for (int64_t i = 0; i < s->batch.n_runs; i++) {
        const Run run = s->batch.runs[i];
        const Sequence *q = &s->sequences[run.sequence];
        #pragma omp parallel for if (worth_threads(run.n * width))
        for (int head = 0; head < m->n_kv_heads; head++) {
            float *keys = cache_at(s, q, place, head, false);
            float *values = cache_at(s, q, place, head, true);
            for (int64_t r = 0; r < run.n; r++) {
                int64_t at = q->length + r, from = (run.row + r) * width + head * d;
                float *block = keys + at / 16 * 16 * d + at % 16;
                for (int64_t j = 0; j < d; j++) block[j * 16] = k[from + j];
                memcpy(values + at * stride, v + from, (size_t)d * sizeof *v);
            }
        }
    }
}

// Attention of all rows over the keys of their sequences and ancestors: s->q in, s->att out. One
// piece of work is a few rows of one sequence and one KV head.
static void attention(Session *s, Place place) {
    enum { PIECE = 32 };
    const Model *m = s->model;
    int64_t group = m->n_heads / m->n_kv_heads, ld = (int64_t)m->n_heads * m->head_dim;
    int64_t n_pieces = 0, operations = 0;
    for (int64_t i = 0; i < s->batch.n_runs; i++) {
        const Run *run = &s->batch.runs[i];
        n_pieces += (run->n + PIECE - 1) / PIECE;
        operations += run->n * (s->batch.position[run->row] + run->n) * ld;
    }
    struct { const Run *run; int64_t row; } *pieces = allocate(n_pieces, sizeof *pieces, "attention");
    for (int64_t i = 0, at = 0; i < s->batch.n_runs; i++) {
        const Run *run = &s->batch.runs[i];
        for (int64_t r = 0; r < run->n; r += PIECE, at++) {
            pieces[at].run = run;
            pieces[at].row = r;
        }
    }
    (void)operations;                       // without OpenMP
    #pragma omp parallel for schedule(dynamic) if (worth_threads(operations))
    for (int64_t work = 0; work < n_pieces * m->n_kv_heads; work++) {
        int64_t piece = n_pieces - 1 - work / m->n_kv_heads;    // the longest rows first
        int head = (int)(work % m->n_kv_heads);
        const Run *run = pieces[piece].run;
        int64_t row = pieces[piece].row, n = run->n - row < PIECE ? run->n - row : PIECE;
        Span spans[MAX_DEPTH];
        int at = MAX_DEPTH;
        for (int i = run->sequence; i >= 0 && at > 0; i = s->sequences[i].parent) {
            const Sequence *q = &s->sequences[i];
            spans[--at] = (Span){cache_at(s, q, place, head, false),
                                 cache_at(s, q, place, head, true), q->length + q->pending};
        }
        int64_t past = s->batch.position[run->row] + row, from = (run->row + row) * ld;
        if (m->arch == BERT) past = run->n - n;                 // every row sees the whole sequence
        from += head * group * m->head_dim;
        attend(s->att + from, s->q + from, ld, n, group, m->head_dim, spans + at, MAX_DEPTH - at,
               past, m->arch == LLAMA);
    }
    release(pieces);
}

// RMSNorm (Zhang and Sennrich 2019): out = x / rms(x) * weight, for n rows of d.
static void rms_norm(float *out, const float *x, const float *weight, float eps, int64_t n,
                     int64_t d) {
    #pragma omp parallel for if (worth_threads(n * d))
    for (int64_t r = 0; r < n; r++) {
        const float *in = x + r * d;
        float scale = 1.0f / sqrtf(dot(in, in, d) / (float)d + eps);
        for (int64_t i = 0; i < d; i++) out[r * d + i] = weight[i] * (in[i] * scale);
    }
}

// LayerNorm (Ba et al. 2016) of x + residual (or of x where residual is NULL), in place in x.
static void layer_norm(float *x, const float *residual, const float *weight, const float *bias,
                       float eps, int64_t n, int64_t d) {
    #pragma omp parallel for if (worth_threads(n * d))
    for (int64_t r = 0; r < n; r++) {
        float *row = x + r * d;
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < d; i++) {
            if (residual) row[i] += residual[r * d + i];
            mean += row[i];
        }
        mean /= (double)d;
        for (int64_t i = 0; i < d; i++) variance += (row[i] - mean) * (row[i] - mean);
        float scale = (float)(1.0 / sqrt(variance / (double)d + eps)), middle = (float)mean;
        for (int64_t i = 0; i < d; i++) row[i] = (row[i] - middle) * scale * weight[i] + bias[i];
    }
}

// Rotary position embedding (Su et al. 2021) of n_heads heads in each row, in place.
static void rotate(const Session *s, float *x, int n_heads) {
    const Model *m = s->model;
    int64_t half = m->head_dim / 2, width = (int64_t)n_heads * m->head_dim;
    int64_t step = m->rope == ROPE_PAIRS ? 2 : 1, other = m->rope == ROPE_PAIRS ? 1 : half;
    #pragma omp parallel for if (worth_threads(s->batch.n_rows * width))
    for (int64_t r = 0; r < s->batch.n_rows; r++) {
        const float *turn = s->batch.rope + r * 2 * half;
        for (int h = 0; h < n_heads; h++) {
            float *head = x + r * width + h * m->head_dim;
            for (int64_t i = 0; i < half; i++) {
                float a = head[i * step], b = head[i * step + other];
                head[i * step] = a * turn[2 * i] - b * turn[2 * i + 1];
                head[i * step + other] = b * turn[2 * i] + a * turn[2 * i + 1];
            }
        }
    }
}

static void add(float *x, const float *y, int64_t n) {
    #pragma omp parallel for if (worth_threads(n))
    for (int64_t i = 0; i < n; i++) x[i] += y[i];
}

// sum = x, or += x from the second on.
static void accumulate(float *sum, const float *x, int64_t n, bool first) {
    if (first) memcpy(sum, x, (size_t)n * sizeof *x);
    else add(sum, x, n);
}

static void divide(float *out, const float *x, int64_t n, int64_t by) {
    #pragma omp parallel for if (worth_threads(n))
    for (int64_t i = 0; i < n; i++) out[i] = x[i] / (float)by;
}

// One layer on all rows of the batch: s->x in, s->x out. It knows neither schedule nor task.
static void llama_layer(Session *s, const Layer *l, Place place) {
    const Model *m = s->model;
    int64_t n = s->batch.n_rows, d = m->dim, hidden = m->hidden;
    rms_norm(s->normed, s->x, l->attn_norm, m->norm_eps, n, d);
    matmul(s->q, s->normed, &l->q, NULL, n);
    matmul(s->k, s->normed, &l->k, NULL, n);
    matmul(s->v, s->normed, &l->v, NULL, n);
    rotate(s, s->q, m->n_heads);
    rotate(s, s->k, m->n_kv_heads);
    cache_store(s, place, s->k, s->v);
    attention(s, place);
    matmul(s->out, s->att, &l->o, NULL, n);
    add(s->x, s->out, n * d);
    rms_norm(s->normed, s->x, l->ffn_norm, m->norm_eps, n, d);
    matmul(s->gate, s->normed, &l->gate, NULL, n);
    matmul(s->up, s->normed, &l->up, NULL, n);
    #pragma omp parallel for if (worth_threads(n * hidden))
    for (int64_t r = 0; r < n; r++) silu_multiply(s->gate + r * hidden, s->up + r * hidden, hidden);
    matmul(s->out, s->gate, &l->down, NULL, n);
    add(s->x, s->out, n * d);
}

// The same for BERT: post-norm, biases, GELU, and every row sees the whole sequence.
static void bert_layer(Session *s, const Layer *l, Place place) {
    const Model *m = s->model;
    int64_t n = s->batch.n_rows, d = m->dim, hidden = m->hidden;
    matmul(s->q, s->x, &l->q, l->q_bias, n);
    matmul(s->k, s->x, &l->k, l->k_bias, n);
    matmul(s->v, s->x, &l->v, l->v_bias, n);
    cache_store(s, place, s->k, s->v);
    attention(s, place);
    matmul(s->out, s->att, &l->o, l->o_bias, n);
    layer_norm(s->x, s->out, l->attn_norm, l->attn_norm_bias, m->norm_eps, n, d);
    matmul(s->up, s->x, &l->up, l->up_bias, n);
    #pragma omp parallel for if (worth_threads(n * hidden))
    for (int64_t r = 0; r < n; r++) gelu(s->up + r * hidden, hidden);
    matmul(s->out, s->up, &l->down, l->down_bias, n);
    layer_norm(s->x, s->out, l->ffn_norm, l->ffn_norm_bias, m->norm_eps, n, d);
}

static void run_layer(Session *s, int layer, Place place) {
    if (s->model->arch == LLAMA) llama_layer(s, &s->model->layers[layer], place);
    else bert_layer(s, &s->model->layers[layer], place);
    s->layer_passes++;
    s->layer_rows += s->batch.n_rows;
}

// Slots that a step of n layers takes in the cache.
static int64_t step_slots(const Session *s, int64_t n) { return s->kv_mean ? 1 : n; }

// One step of a schedule: its layers run one after another on the same input into one sum, in the
// order they are named, and the sum is divided. Under --kv mean they share a slot: each layer reads
// its own keys and values of this pass's rows there, and leaves the mean of the group behind.
static void run_step(Session *s, const int *layers, int64_t n, Place place) {
    const Model *m = s->model;
    int64_t size = s->batch.n_rows * m->dim, kv = s->batch.n_rows * m->n_kv_heads * m->head_dim;
    if (n > 1) memcpy(s->input, s->x, (size_t)size * sizeof *s->x);
    for (int64_t i = 0; i < n; i++) {
        if (i > 0) memcpy(s->x, s->input, (size_t)size * sizeof *s->x);
        int64_t offset = s->kv_mean ? 0 : i;
        run_layer(s, layers[i], (Place){place.slot + offset, place.node + offset});
        if (n == 1) break;
        accumulate(s->sum, s->x, size, i == 0);
        if (!s->kv_mean) continue;
        accumulate(s->k_sum, s->k, kv, i == 0);
        accumulate(s->v_sum, s->v, kv, i == 0);
    }
    if (n > 1) divide(s->x, s->sum, size, n);
    if (n > 1 && s->kv_mean) {
        divide(s->k, s->k_sum, kv, n);
        divide(s->v, s->v_sum, kv, n);
        cache_store(s, place, s->k, s->v);
    }
    if (s->listener) s->listener(s, s->listener_data);
}

// Gives the working memory room for the rows of the batch.
static void session_room(Session *s) {
    const Model *m = s->model;
    if (s->batch.n_rows <= s->work_rows) return;
    int64_t n = (s->batch.n_rows + 15) / 16 * 16, q = (int64_t)m->n_heads * m->head_dim;
    int64_t kv = (int64_t)m->n_kv_heads * m->head_dim;
    const struct { float **p; int64_t width; } wanted[] = {
        {&s->x, m->dim}, {&s->normed, m->dim}, {&s->out, m->dim}, {&s->input, m->dim},
        {&s->sum, m->dim}, {&s->q, q}, {&s->att, q}, {&s->k, kv}, {&s->v, kv}, {&s->k_sum, kv},
        {&s->v_sum, kv}, {&s->gate, m->hidden}, {&s->up, m->hidden}};
    enum { PIECES = sizeof wanted / sizeof *wanted };
    int64_t width = 0;
    for (int i = 0; i < PIECES; i++) width += wanted[i].width;
    release(s->work);
    s->work_rows = 0;
    s->work = NULL;
    s->work = allocate(n * width, sizeof(float), "activations of a batch");
    s->work_rows = n;
    float *at = s->work;
    for (int i = 0; i < PIECES; at += n * wanted[i++].width) *wanted[i].p = at;
}

// Starts a pass: the rows' embeddings in s->x.
static void embed(Session *s) {
    const Model *m = s->model;
    int64_t d = m->dim, half = m->head_dim / 2;
    session_room(s);
    #pragma omp parallel for if (worth_threads(s->batch.n_rows * d))
    for (int64_t r = 0; r < s->batch.n_rows; r++) {
        widen(s->x + r * d, &m->embed, s->batch.token[r]);
        if (m->arch == LLAMA) {
            for (int64_t i = 0; i < half; i++) {
                double angle = (double)((float)s->batch.position[r] * m->rope_frequency[i]);
                s->batch.rope[(r * half + i) * 2] = (float)cos(angle);
                s->batch.rope[(r * half + i) * 2 + 1] = (float)sin(angle);
            }
            continue;
        }
        float *position = s->normed + r * d, *segment = s->out + r * d;
        widen(segment, &m->segments, s->batch.segment[r]);
        widen(position, &m->positions, s->batch.position[r]);
        for (int64_t i = 0; i < d; i++) {
            s->x[r * d + i] = s->x[r * d + i] + segment[i] + position[i];
        }
    }
    if (m->arch == BERT) {
        layer_norm(s->x, NULL, m->embed_norm, m->embed_norm_bias, m->norm_eps, s->batch.n_rows, d);
    }
    if (s->listener) s->listener(s, s->listener_data);
}

// Ends a pass: the batch's rows now belong to their sequences, and the batch is empty.
static void batch_commit(Session *s) {
    for (int64_t i = 0; i < s->batch.n_runs; i++) {
        Sequence *q = &s->sequences[s->batch.runs[i].sequence];
        q->length += q->pending;
        q->pending = 0;
    }
    s->batch.n_rows = s->batch.n_runs = 0;
}

// Runs the rows of the batch through the steps of a schedule. Afterwards s->x holds their hidden
// states, [rows][dim], before the final norm; logits() and batch_commit() usually follow.
static void forward(Session *s, const Schedule *schedule) {
    embed(s);
    Place place = {0, 0};
    for (int64_t i = 0; i < schedule->n_steps; i++) {
        int64_t n = schedule->first[i + 1] - schedule->first[i];
        run_step(s, schedule->layer + schedule->first[i], n, place);
        place.slot += step_slots(s, n);
        place.node = place.slot;
    }
}

// Slots of the cache that a schedule takes.
static int64_t schedule_slots(const Session *s, const Schedule *schedule) {
    return s->kv_mean ? schedule->n_steps : schedule->n_slots;
}

// A copy of chosen rows of x: [n][dim].
static float *pick_rows(const Session *s, const int64_t *rows, int64_t n) {
    int64_t d = s->model->dim;
    float *picked = allocate(n * d, sizeof *picked, "rows to score");
    for (int64_t i = 0; i < n; i++) {
        memcpy(picked + i * d, s->x + rows[i] * d, (size_t)d * sizeof *picked);
    }
    return picked;
}

// The output distribution of chosen rows of x, before softmax: Llama's head or BERT's masked-LM
// head. out: [n][vocab].
static void logits(Session *s, const int64_t *rows, int64_t n, float *out) {
    const Model *m = s->model;
    int64_t d = m->dim;
    float *picked = pick_rows(s, rows, n);
    float *hidden = allocate(n * d, sizeof *hidden, "rows to score");
    if (m->arch == LLAMA) {
        rms_norm(hidden, picked, m->norm, m->norm_eps, n, d);
        matmul(out, hidden, &m->output, NULL, n);
    } else {
        if (!m->has_mlm) die("%s: has no masked-LM head; export a checkpoint with one", m->path);
        matmul(hidden, picked, &m->mlm, m->mlm_bias, n);
        gelu(hidden, n * d);
        layer_norm(hidden, NULL, m->mlm_norm, m->mlm_norm_bias, m->norm_eps, n, d);
        matmul(out, hidden, &m->mlm_out, m->mlm_out_bias, n);
    }
    release(picked);
    release(hidden);
}

// BERT's pooled output of chosen rows (those of [CLS]): tanh of a dense layer. out: [n][dim].
static void pooled(Session *s, const int64_t *rows, int64_t n, float *out) {
    const Model *m = s->model;
    int64_t d = m->dim;
    if (!m->has_pooler) die("%s: has no pooler; export a checkpoint with one", m->path);
    float *picked = pick_rows(s, rows, n);
    matmul(out, picked, &m->pooler, m->pooler_bias, n);
    for (int64_t i = 0; i < n * d; i++) out[i] = tanhf(out[i]);
    release(picked);
}

// 8-bit weights: groups of 32 along a row share a scale, the largest magnitude over 127.

// float16 nearest to f, which is not negative and below 65520.
static uint16_t to_f16(float f) {
    uint32_t bits;
    if (f < 0x1p-14f) return (uint16_t)lrintf(f * 0x1p24f);
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10);
}

// One row in 8 bits. error[0] and error[1] become the sums of squares of what is lost and of all.
static void quantize_row(int8_t *q, uint16_t *scale, const float *x, int64_t n, double *error) {
    error[0] = error[1] = 0;
    for (int64_t from = 0; from < n; from += 32) {
        int64_t to = n - from < 32 ? n : from + 32;
        float largest = 0;
        for (int64_t i = from; i < to; i++) {
            if (!(fabsf(x[i]) <= largest)) largest = fabsf(x[i]);
        }
        if (!(largest < 127 * 65504.0f)) error[0] = INFINITY;   // too large, or not a number
        scale[from / 32] = to_f16(largest < 127 * 65504.0f ? largest / 127 : 0);
        float step = from_f16(scale[from / 32]);
        for (int64_t i = from; i < to; i++) {
            float steps = step > 0 ? x[i] / step : 0;
            q[i] = (int8_t)lrintf(steps > 127 ? 127 : steps < -127 ? -127 : steps);
            double lost = (double)x[i] - (double)(step * q[i]);
            error[0] += lost * lost;
            error[1] += (double)x[i] * (double)x[i];
        }
    }
}

// Appends a matrix in 8 bits; returns the root of the mean squared error over that of the weights.
static double write_quantized(FILE *f, const Tensor *w, const char *name) {
    enum { BLOCK = 256 };                   // rows in memory at a time
    int64_t groups = (w->cols + 31) / 32, padding = (64 - w->rows * w->cols % 64) % 64;
    float *wide = allocate(BLOCK * w->cols, sizeof *wide, name);
    int8_t *q = allocate(BLOCK * w->cols, sizeof *q, name);
    uint16_t *scale = allocate(w->rows * groups, sizeof *scale, name);
    double *error = allocate(BLOCK * 2, sizeof *error, name), sum[2] = {0};
    for (int64_t from = 0; from < w->rows; from += BLOCK) {
        int64_t rows = w->rows - from < BLOCK ? w->rows - from : BLOCK;
        #pragma omp parallel for if (worth_threads(rows * w->cols))
        for (int64_t r = 0; r < rows; r++) {
            widen(wide + r * w->cols, w, from + r);
            quantize_row(q + r * w->cols, scale + (from + r) * groups, wide + r * w->cols, w->cols,
                         error + 2 * r);
        }
        for (int64_t i = 0; i < 2 * rows; i++) sum[i % 2] += error[i];
        fwrite(q, 1, (size_t)(rows * w->cols), f);
    }
    fwrite((char[64]){0}, 1, (size_t)padding, f);
    fwrite(scale, sizeof *scale, (size_t)(w->rows * groups), f);
    release(wide);
    release(q);
    release(scale);
    release(error);
    return sum[1] > 0 ? sqrt(sum[0] / sum[1]) : sum[0];
}

// Writes the model to `path` with every matrix in 8 bits and all else as it is, and prints what each
// lost. It grows under another name and takes its own at the end.
static void model_quantize(const Model *m, const char *path) {
    int64_t header_bytes = (int64_t)read_u64(m->file + 24), end = header_bytes;
    unsigned char *header = allocate(header_bytes, 1, "header");
    memcpy(header, m->file, (size_t)header_bytes);
    for (int i = 0; i < m->n_tensors; i++) {
        unsigned char *e = header + 192 + 96 * (int64_t)i;
        uint32_t type = read_u32(e + 60) == 2 ? Q8 : read_u32(e + 56);
        uint64_t offset = (uint64_t)end, bytes = (uint64_t)stored_bytes(
            (int)type, (int64_t)read_u64(e + 64), (int64_t)read_u64(e + 72));
        memcpy(e + 56, &type, sizeof type);
        memcpy(e + 80, &offset, sizeof offset);
        memcpy(e + 88, &bytes, sizeof bytes);
        end += (int64_t)(bytes + 63) / 64 * 64;
    }
    memcpy(header + 16, &end, sizeof end);
    uint32_t checksum = header_checksum(header, header_bytes);
    memcpy(header + 32, &checksum, sizeof checksum);

    Text aside = {0};
    text_printf(&aside, "%s.tmp", path);
    FILE *f = fopen(aside.s, "wb");
    if (!f) die("%s: cannot be written: %s; choose another place", path, strerror(errno));
    bool good = fwrite(header, 1, (size_t)header_bytes, f) > 0;
    const char *bad = NULL;
    printf("%-24s %8s x %-8s  relative error\n", "matrix", "rows", "columns");
    for (int i = 0; i < m->n_tensors && good && !bad; i++) {
        const unsigned char *e = m->table + 96 * (int64_t)i;
        const char *name = (const char *)e;
        Tensor w = tensor_at(m, e);
        int64_t bytes = (int64_t)read_u64(header + 192 + 96 * (int64_t)i + 88);
        if (read_u32(e + 60) == 2 && w.type != Q8) {
            double error = write_quantized(f, &w, name);
            printf("%-24s %8lld x %-8lld  %.5f\n", name, (long long)w.rows, (long long)w.cols,
                   error);
            fflush(stdout);
            if (!(error < INFINITY)) bad = name;
        } else {
            fwrite(w.data, 1, (size_t)bytes, f);
        }
        fwrite((char[64]){0}, 1, (size_t)((64 - bytes % 64) % 64), f);
        good = !ferror(f);
    }
    if (fclose(f)) good = false;
    if (bad || !good || rename(aside.s, path)) {
        int reason = errno;
        remove(aside.s);
        if (bad) die("%s: tensor %s: has weights that are not numbers of 8 bits; leave it as it is",
                     m->path, bad);
        die("%s: cannot be written: %s; free space or choose another place", path, strerror(reason));
    }
    warn("%s: %.1f MB, of %.1f MB", path, (double)end / 1e6, (double)m->bytes / 1e6);
    release(aside.s);
    release(header);
}

// ------------------------------------------------------------------------------------------------
// 5. Tokenizers: text -> ids -> text
// ------------------------------------------------------------------------------------------------
//
// Two ways of cutting text, each exactly that of its reference implementation:
//
//   SentencePiece BPE (Llama)  The text, with a space before it and every space written as U+2581,
//                              falls into characters; the adjacent pair whose union is the piece
//                              of best score merges, leftmost first, until no pair is a piece.
//                              What is no piece then is spelled in byte tokens.
//   WordPiece (BERT)           Special tokens are cut out verbatim; the rest is cleaned and folded
//                              (lower case, accents) and cut at spaces, punctuation and CJK; each
//                              word is covered by the longest pieces that fit, from the left.
//
// What a space, an accent or a lower-case letter is, C does not know: export.py writes what
// Python's unicodedata says into the model file, as ranges of code points with one rule each.
// The tokenizer section of a model file (little-endian, nothing aligned):
//
//   u32 n_tokens, then for each token  f32 score, u32 type, u32 length, `length` bytes
//   WordPiece: u32 n_ranges, u32 n_strings,
//              n_ranges times  u32 first code point | rule << 24, i32 value,
//              n_strings times u32: strings of code points, each preceded by its length
//
// A range reaches up to the next one's first code point (the last one to 0x10FFFF); the first
// starts at 0. Rules are the RULE_ constants below.

enum { NO_TOKENIZER, SENTENCEPIECE, WORDPIECE };    // kinds, as in the model file's header
enum {                      // token types, sentencepiece's numbers
    PIECE_NORMAL = 1,
    PIECE_UNKNOWN,
    PIECE_CONTROL,          // SentencePiece: never comes from text. WordPiece: [SEP] and its like,
                            // taken verbatim where the text has it, and part of the vocabulary
    PIECE_VERBATIM,         // taken verbatim, before anything else is looked at
    PIECE_UNUSED,           // not accepted
    PIECE_BYTE,             // <0x00> to <0xFF>
};
enum {                      // what a code point does to a WordPiece text
    RULE_LETTER,            // part of a word, as the code point plus value
    RULE_GONE,              // vanishes: control characters, accents
    RULE_SPACE,             // ends a word
    RULE_ALONE,             // a word by itself, as the code point plus value
    RULE_BARRIER,           // vanishes, but combining marks do not change places across it
    RULE_COMBINING,         // part of a word; marks in a row are sorted by value (Unicode's
                            // canonical combining class), equal ones staying in order
    RULE_STRING,            // the string at index `value`, part of a word
    RULE_HANGUL,            // a Hangul syllable, part of a word as its two or three letters
    N_RULES
};

typedef struct {
    const char *text;       // lies in the model file; no NUL behind it
    int length, type;
    float score;
} Piece;

typedef struct {
    uint32_t first;         // code point
    int rule, value;
} Range;

typedef struct {            // of an open-addressing hash table
    uint32_t hash;
    int id;                 // -1: empty
} Slot;

typedef struct Tokenizer {
    int kind;               // SENTENCEPIECE, WORDPIECE or NO_TOKENIZER
    int n_tokens;           // at most the model's vocabulary
    int unk;                // WordPiece: the id of a word that no pieces cover
    bool lower;             // WordPiece: letters are lower-cased (the table does it; for --info)
    bool cut;               // SentencePiece: no piece reaches from one word into the next
    int longest;            // piece, in bytes
    int longest_verbatim;   // the same of those taken verbatim
    Piece *piece;           // [n_tokens]
    Slot *slot;             // [slots] finds a piece by its text; slots is a power of two
    int64_t slots;
    bool starts[256];       // does a piece taken verbatim start with this byte?
    int byte_id[256];       // SentencePiece: ids of the byte tokens
    Range *range;           // [n_ranges] WordPiece: the Unicode table
    uint32_t *string;       // [n_strings]
    int64_t n_ranges, n_strings;
    int ascii[128];         // index into range, for speed
} Tokenizer;

#define WORD_SPACE "\xe2\x96\x81"   // U+2581: sentencepiece's visible space
enum {
    WORD_CHARS = 100,       // WordPiece: a word of more characters is unknown
    LONGEST_PIECE = 4000,   // bytes
    LONGEST_VERBATIM = 255,
    LONGEST_STRING = 8      // code points that one can become
};

// Reads the code point at s, n > 0 bytes before the end of the text, and returns its length. A
// byte that starts no valid sequence is U+FFFD of length 1: sentencepiece's rule.
static int utf8_read(const char *s, int64_t n, uint32_t *code) {
    const unsigned char *p = (const unsigned char *)s;
    static const uint32_t least[5] = {0, 0, 0x80, 0x800, 0x10000};
    int length = p[0] < 0x80 ? 1 : p[0] < 0xC0 ? 0 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3
               : p[0] < 0xF8 ? 4 : 0;
    *code = length == 1 ? p[0] : p[0] & (0x7Fu >> length);
    if (length == 1) return 1;
    bool good = length > 0 && length <= n;
    for (int i = 1; good && i < length; i++) {
        good = (p[i] & 0xC0) == 0x80;
        *code = *code << 6 | (p[i] & 0x3F);
    }
    if (good && *code >= least[length] && *code <= 0x10FFFF && (*code & 0xFFFFF800) != 0xD800) {
        return length;
    }
    *code = 0xFFFD;
    return 1;
}

// Writes a code point and returns its length, at most 4.
static int utf8_write(char *s, uint32_t c) {
    int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) s[i] = (char)(0x80 | (c & 0x3F));
    s[0] = (char)(n == 1 ? c : (0xF00u >> n & 0xFF) | c);
    return n;
}

// FNV-1a, to be continued from h: the hash of a prefix is on the way to that of the whole.
#define HASH_START 2166136261u
static uint32_t hash_more(uint32_t h, const char *s, int64_t n) {
    for (int64_t i = 0; i < n; i++) h = (h ^ (unsigned char)s[i]) * 16777619u;
    return h;
}

// The slot of a text with this hash: its piece's, or the empty one where it would go.
static Slot *slot_of(const Tokenizer *t, const char *s, int64_t n, uint32_t hash) {
    for (uint32_t i = hash ^ hash >> 16;; i++) {
        Slot *slot = &t->slot[i & (uint32_t)(t->slots - 1)];
        if (slot->id < 0) return slot;
        const Piece *p = &t->piece[slot->id];
        if (slot->hash == hash && p->length == n && !memcmp(p->text, s, (size_t)n)) return slot;
    }
}

static bool is_verbatim(const Tokenizer *t, const Piece *p) {
    return p->type == PIECE_VERBATIM || (p->type == PIECE_CONTROL && t->kind == WORDPIECE);
}

// The longest piece taken verbatim that the text starts with, or -1.
static int match_verbatim(const Tokenizer *t, const char *text, int64_t bytes) {
    int best = -1;
    uint32_t hash = HASH_START;
    if (!t->starts[(unsigned char)*text]) return -1;
    for (int n = 1; n <= bytes && n <= t->longest_verbatim; n++) {
        hash = hash_more(hash, text + n - 1, 1);
        int id = slot_of(t, text, n, hash)->id;
        if (id >= 0 && is_verbatim(t, &t->piece[id])) best = id;
    }
    return best;
}

// --- Loading -------------------------------------------------------------------------------------

typedef struct {            // where the reader stands in the tokenizer section
    const char *file;
    const unsigned char *data;
    int64_t at, bytes;
} SectionReader;

static const unsigned char *section_take(SectionReader *r, int64_t n, const char *what) {
    if (n < 0 || n > r->bytes - r->at) {
        die("%s: tokenizer, byte %lld of %lld: %s ends beyond the section; export the model again",
            r->file, (long long)r->at, (long long)r->bytes, what);
    }
    r->at += n;
    return r->data + r->at - n;
}

static uint32_t section_u32(SectionReader *r, const char *what) {
    return read_u32(section_take(r, 4, what));
}

// Ends the program over a fault of token i.
static _Noreturn void bad_piece(const SectionReader *r, int64_t i, const char *fault) {
    die("%s: tokenizer, token %lld, before byte %lld: %s; export the model again", r->file,
        (long long)i, (long long)r->at, fault);
}

// Does a non-space stand before a U+2581 in it?
static bool spans_words(const Piece *p) {
    for (int i = 1; i + 3 <= p->length; i++) {
        if (!memcmp(p->text + i, WORD_SPACE, 3)
            && (i < 3 || memcmp(p->text + i - 3, WORD_SPACE, 3))) return true;
    }
    return false;
}

// The value of a byte token's text, <0x00> to <0xFF>; above 255 if it is something else.
static unsigned byte_value(const Piece *p) {
    char text[7] = {0};
    unsigned value = 256;
    memcpy(text, p->text, p->length == 6 ? 6 : 0);
    return sscanf(text, "<0x%2X>", &value) == 1 ? value : 256;
}

// Enters token i into the tables that its type asks for.
static void enter_piece(Tokenizer *t, const SectionReader *r, int i) {
    const Piece *p = &t->piece[i];
    bool sentencepiece = t->kind == SENTENCEPIECE;
    if (!p->length && (sentencepiece || is_verbatim(t, p))) bad_piece(r, i, "empty");
    if (sentencepiece && p->type == PIECE_BYTE) {
        unsigned byte = byte_value(p);
        if (byte > 255 || t->byte_id[byte] >= 0) bad_piece(r, i, "a byte token that is wrong");
        t->byte_id[byte] = i;
    }
    if (is_verbatim(t, p)) {
        if (p->length > LONGEST_VERBATIM) bad_piece(r, i, "taken verbatim, but over 255 bytes");
        t->starts[(unsigned char)p->text[0]] = true;
        if (p->length > t->longest_verbatim) t->longest_verbatim = p->length;
    }
    if (p->type != PIECE_NORMAL && !is_verbatim(t, p)) return;
    uint32_t hash = hash_more(HASH_START, p->text, p->length);
    Slot *slot = slot_of(t, p->text, p->length, hash);
    if (slot->id >= 0 && sentencepiece) bad_piece(r, i, "the same text as an earlier token");
    *slot = (Slot){hash, i};        // WordPiece: the last of equal lines in vocab.txt counts
    if (p->length > t->longest) t->longest = p->length;
    if (spans_words(p)) t->cut = false;
}

// Is range i in its place, and its value one that the rule can have?
static bool good_range(const Tokenizer *t, int64_t i) {
    const Range *r = &t->range[i];
    int64_t first = r->first, v = r->value;
    int64_t last = i + 1 < t->n_ranges ? (int64_t)r[1].first - 1 : 0x10FFFF;
    if (r->rule >= N_RULES || first > last || last > 0x10FFFF || (i == 0 && first)) return false;
    switch (r->rule) {
    case RULE_LETTER:
    case RULE_ALONE: return first + v >= 0 && last + v <= 0x10FFFF;
    case RULE_COMBINING: return v > 0 && v < 256;
    case RULE_HANGUL: return first >= 0xAC00 && last <= 0xD7A3;
    case RULE_STRING:
        if (v < 0 || v >= t->n_strings || t->string[v] >= t->n_strings - v
            || t->string[v] > LONGEST_STRING) return false;
        for (int64_t k = 1; k <= t->string[v]; k++) {
            if (t->string[v + k] > 0x10FFFF) return false;
        }
        return true;
    default: return true;
    }
}

// Reads the Unicode table of a WordPiece section.
static void load_ranges(Tokenizer *t, SectionReader *r) {
    t->n_ranges = section_u32(r, "the Unicode table");
    t->n_strings = section_u32(r, "the Unicode table");
    if (t->n_ranges < 1 || t->n_ranges * 8 + t->n_strings * 4 != r->bytes - r->at) {
        die("%s: tokenizer, byte %lld: the Unicode table has another size than it says; export "
            "the model again", r->file, (long long)r->at);
    }
    t->range = allocate(t->n_ranges, sizeof *t->range, "Unicode ranges");
    t->string = allocate(t->n_strings + 1, sizeof *t->string, "Unicode strings");
    for (int64_t i = 0; i < t->n_ranges; i++) {
        uint32_t packed = section_u32(r, "a range"), value = section_u32(r, "a range");
        t->range[i] = (Range){packed & 0xFFFFFF, (int)(packed >> 24), (int32_t)value};
    }
    for (int64_t i = 0; i < t->n_strings; i++) t->string[i] = section_u32(r, "a string");
    for (int64_t i = 0; i < t->n_ranges; i++) {
        if (!good_range(t, i)) {
            die("%s: tokenizer, Unicode range %lld: out of order or of bounds; export the model "
                "again", r->file, (long long)i);
        }
    }
    for (int c = 0, i = 0; c < 128; c++) {
        while (i + 1 < t->n_ranges && t->range[i + 1].first <= (uint32_t)c) i++;
        t->ascii[c] = i;
    }
}

// Reads and checks the tokenizer section of a model file, whose bytes must outlive the tokenizer;
// `kind`, `unk` and `lower` come from the file's header. Dies naming file, place, fault and mend.
static void tokenizer_load(Tokenizer *t, const char *file, int kind, const unsigned char *data,
                           int64_t bytes, int vocab_size, int unk, bool lower) {
    SectionReader r = {file, data, 0, bytes};
    *t = (Tokenizer){.kind = kind, .unk = unk, .lower = lower, .cut = true};
    int64_t n = section_u32(&r, "the number of tokens");
    if (n < 1 || n > vocab_size || n > bytes / 12) {
        die("%s: tokenizer, byte 0: %lld tokens, for a vocabulary of %d in a section of %lld bytes; "
            "export the model again with the tokenizer it was trained with", file, (long long)n,
            vocab_size, (long long)bytes);
    }
    t->n_tokens = (int)n;
    t->piece = allocate(n, sizeof *t->piece, "pieces");
    for (t->slots = 16; t->slots < 2 * n;) t->slots *= 2;
    t->slot = allocate(t->slots, sizeof *t->slot, "hash table of pieces");
    for (int64_t i = 0; i < t->slots; i++) t->slot[i].id = -1;
    for (int i = 0; i < 256; i++) t->byte_id[i] = -1;

    for (int i = 0; i < n; i++) {
        Piece *p = &t->piece[i];
        uint32_t score = section_u32(&r, "a token"), type = section_u32(&r, "a token");
        uint32_t length = section_u32(&r, "a token");
        memcpy(&p->score, &score, 4);
        p->text = (const char *)section_take(&r, length, "a token's text");
        if (length > LONGEST_PIECE) bad_piece(&r, i, "longer than 4000 bytes");
        if (!isfinite(p->score)) bad_piece(&r, i, "a score that is not a number");
        if (type < PIECE_NORMAL || type > PIECE_BYTE || type == PIECE_UNUSED) {
            bad_piece(&r, i, "of a type that is not 1, 2, 3, 4 or 6");
        }
        p->length = (int)length;
        p->type = (int)type;
        enter_piece(t, &r, i);
    }
    if (kind == WORDPIECE) {
        if (unk < 0 || unk >= n) {
            die("%s: tokenizer: [UNK] is token %d of %d; export the model again", file, unk,
                t->n_tokens);
        }
        load_ranges(t, &r);
    }
    for (int i = 0; kind == SENTENCEPIECE && i < 256; i++) {
        if (t->byte_id[i] < 0) {
            die("%s: tokenizer: no token <0x%02X>; only SentencePiece models with byte fallback "
                "work here", file, i);
        }
    }
    if (r.at != bytes) {
        die("%s: tokenizer, byte %lld: %lld bytes too many; export the model again", file,
            (long long)r.at, (long long)(bytes - r.at));
    }
}

static void tokenizer_free(Tokenizer *t) {
    release(t->piece);
    release(t->slot);
    release(t->range);
    release(t->string);
    *t = (Tokenizer){0};
}

// --- SentencePiece BPE ---------------------------------------------------------------------------

typedef struct {            // a run of bytes of the text, a piece in the making
    int start, bytes;       // bytes = 0: merged into the one before it
    int previous, next;     // neighbours, -1 at the ends
    int id;                 // of its piece; -1 while not looked up
    bool frozen;            // a piece taken verbatim never merges
} Symbol;

typedef struct {            // two neighbours that could merge
    float score;
    int left;               // index of the left symbol
    int bytes;              // of both; another sum later means that one has changed since
    int id;
} Merge;

typedef struct {            // working memory of one encode()
    Text text;              // normalised
    Symbol *symbol;
    Merge *heap;            // the best merge is on top
    int64_t n, capacity, heap_n, heap_capacity;
} Bpe;

static bool merges_before(const Merge *a, const Merge *b) {
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

static void heap_push(Bpe *b, Merge m) {
    b->heap = grow(b->heap, &b->heap_capacity, b->heap_n + 1, sizeof m, "merges");
    int64_t i = b->heap_n++;
    for (; i > 0 && merges_before(&m, &b->heap[(i - 1) / 2]); i = (i - 1) / 2) {
        b->heap[i] = b->heap[(i - 1) / 2];
    }
    b->heap[i] = m;
}

static Merge heap_pop(Bpe *b) {
    Merge top = b->heap[0], last = b->heap[--b->heap_n];
    int64_t i = 0;
    for (int64_t child; (child = 2 * i + 1) < b->heap_n; i = child) {
        if (child + 1 < b->heap_n && merges_before(&b->heap[child + 1], &b->heap[child])) child++;
        if (!merges_before(&b->heap[child], &last)) break;
        b->heap[i] = b->heap[child];
    }
    b->heap[i] = last;
    return top;
}

// Puts symbol `left` and its right neighbour on the heap if together they are a piece.
static void offer_merge(const Tokenizer *t, Bpe *b, int left) {
    if (left < 0 || b->symbol[left].next < 0) return;
    const Symbol *l = &b->symbol[left], *r = &b->symbol[l->next];
    int bytes = l->bytes + r->bytes;
    if (l->frozen || r->frozen || bytes > t->longest) return;
    const char *s = b->text.s + l->start;
    const Slot *slot = slot_of(t, s, bytes, hash_more(HASH_START, s, bytes));
    if (slot->id >= 0) {
        heap_push(b, (Merge){t->piece[slot->id].score, left, bytes, slot->id});
    }
}

// Merges the symbols collected so far, appends their ids and starts afresh.
static void merge_symbols(const Tokenizer *t, Bpe *b, Ids *out) {
    Symbol *symbol = b->symbol;
    for (int i = 0; i + 1 < b->n; i++) offer_merge(t, b, i);
    while (b->heap_n) {
        Merge m = heap_pop(b);
        Symbol *left = &symbol[m.left];
        if (!left->bytes || left->next < 0) continue;
        Symbol *right = &symbol[left->next];
        if (left->bytes + right->bytes != m.bytes) continue;
        left->bytes = m.bytes;
        left->id = m.id;
        left->next = right->next;
        right->bytes = 0;
        if (left->next >= 0) symbol[left->next].previous = m.left;
        offer_merge(t, b, left->previous);
        offer_merge(t, b, m.left);
    }
    for (int i = 0; b->n && i >= 0; i = symbol[i].next) {
        const char *s = b->text.s + symbol[i].start;
        int id = symbol[i].id, bytes = symbol[i].bytes;
        if (id < 0) id = slot_of(t, s, bytes, hash_more(HASH_START, s, bytes))->id;
        for (int k = 0; id < 0 && k < bytes; k++) ids_push(out, t->byte_id[(unsigned char)s[k]]);
        if (id >= 0) ids_push(out, id);
    }
    b->n = 0;
}

// Writes the text as sentencepiece sees it: a space in front, spaces as U+2581, valid UTF-8.
static void normalise(const char *text, int64_t bytes, Text *out) {
    out->s = grow(out->s, &out->capacity, 3 * bytes + 4, 1, "text");
    char *o = out->s;
    memcpy(o, WORD_SPACE, 3);
    o += 3;
    for (int64_t i = 0; i < bytes;) {
        uint32_t code;
        int n = utf8_read(text + i, bytes - i, &code);
        o += utf8_write(o, code == ' ' ? 0x2581 : code);
        i += n;
    }
    out->n = o - out->s;
}

// Where no piece spans two words, words are merged one by one: no merge in one can touch another.
static void encode_sentencepiece(const Tokenizer *t, const char *text, int64_t bytes, Ids *out) {
    if (!bytes) return;
    if (bytes > INT_MAX / 3 - 16) {
        die("text: %lld bytes: more than this tokenizer takes at once; cut it into parts",
            (long long)bytes);
    }
    Bpe b = {0};
    normalise(text, bytes, &b.text);
    bool was_space = true;
    for (int at = 0; at < b.text.n;) {
        const char *s = b.text.s + at;
        uint32_t code;
        int n = utf8_read(s, b.text.n - at, &code), id = match_verbatim(t, s, b.text.n - at);
        if (id >= 0) n = t->piece[id].length;
        bool space = code == 0x2581;
        if (t->cut && space && !was_space) merge_symbols(t, &b, out);
        b.symbol = grow(b.symbol, &b.capacity, b.n + 1, sizeof *b.symbol, "symbols");
        if (b.n) b.symbol[b.n - 1].next = (int)b.n;
        b.symbol[b.n] = (Symbol){at, n, (int)b.n - 1, -1, id, id >= 0};
        b.n++;
        at += n;
        was_space = space && id < 0;
    }
    merge_symbols(t, &b, out);
    release(b.text.s);
    release(b.symbol);
    release(b.heap);
}

// --- WordPiece -----------------------------------------------------------------------------------

typedef struct {            // a word in the making
    int n;                  // characters; WORD_CHARS + 1 also stands for more
    int fixed;              // the first `fixed` of them stay where they are
    uint32_t code[WORD_CHARS + 1];
    int class[WORD_CHARS + 1];      // canonical combining classes, 0 for all but few
} Word;

// Appends a character; a combining mark (class > 0) goes before marks of higher classes.
static void word_add(Word *w, uint32_t code, int class) {
    if (w->n > WORD_CHARS) return;
    int i = w->n++;
    for (; class && i > w->fixed && w->class[i - 1] > class; i--) {
        w->code[i] = w->code[i - 1];
        w->class[i] = w->class[i - 1];
    }
    w->code[i] = code;
    w->class[i] = class;
    if (!class) w->fixed = w->n;
}

// Appends the ids of the word's pieces, longest first from the left; [UNK] alone where that fails.
static void word_end(const Tokenizer *t, Word *w, Ids *out) {
    char buffer[2 + 4 * WORD_CHARS];    // two bytes for "##" in front
    int at[WORD_CHARS + 1], n = w->n;   // where each character starts
    int64_t before = out->n;
    w->n = w->fixed = 0;
    if (n > WORD_CHARS) {
        ids_push(out, t->unk);
        return;
    }
    at[0] = 2;
    for (int i = 0; i < n; i++) at[i + 1] = at[i] + utf8_write(buffer + at[i], w->code[i]);
    for (int start = 0, end; start < n; start = end) {
        uint32_t hash[WORD_CHARS + 1];
        char *s = buffer + at[start];
        hash[start] = HASH_START;
        if (start) {                    // the bytes overwritten belong to pieces already found
            s = memcpy(s - 2, "##", 2);
            hash[start] = hash_more(HASH_START, s, 2);
        }
        for (end = start; end < n && buffer + at[end + 1] - s <= t->longest; end++) {
            hash[end + 1] = hash_more(hash[end], buffer + at[end], at[end + 1] - at[end]);
        }
        int id = -1;
        for (; end > start; end--) {
            id = slot_of(t, s, buffer + at[end] - s, hash[end])->id;
            if (id >= 0 && t->piece[id].type != PIECE_VERBATIM) break;
            id = -1;
        }
        if (id < 0) {
            out->n = before;
            ids_push(out, t->unk);
            return;
        }
        ids_push(out, id);
    }
}

// The range that holds a code point.
static const Range *range_of(const Tokenizer *t, uint32_t code) {
    if (code < 128) return &t->range[t->ascii[code]];
    int64_t lo = 0, hi = t->n_ranges;
    while (hi - lo > 1) {
        int64_t middle = (lo + hi) / 2;
        if (t->range[middle].first <= code) lo = middle; else hi = middle;
    }
    return &t->range[lo];
}

// Splits a Hangul syllable into its letters, by Unicode's arithmetic.
static void word_add_hangul(Word *w, uint32_t code) {
    uint32_t i = code - 0xAC00;
    word_add(w, 0x1100 + i / 588, 0);
    word_add(w, 0x1161 + i % 588 / 28, 0);
    if (i % 28) word_add(w, 0x11A7 + i % 28, 0);
}

// Lets one code point of the text do what its rule says.
static void word_feed(const Tokenizer *t, Word *w, uint32_t code, Ids *out) {
    const Range *r = range_of(t, code);
    switch (r->rule) {
    case RULE_LETTER: word_add(w, code + (uint32_t)r->value, 0); break;
    case RULE_COMBINING: word_add(w, code, r->value); break;
    case RULE_HANGUL: word_add_hangul(w, code); break;
    case RULE_BARRIER: w->fixed = w->n; break;
    case RULE_SPACE: word_end(t, w, out); break;
    case RULE_ALONE:
        word_end(t, w, out);
        word_add(w, code + (uint32_t)r->value, 0);
        word_end(t, w, out);
        break;
    case RULE_STRING:
        for (uint32_t i = 1; i <= t->string[r->value]; i++) {
            uint32_t c = t->string[r->value + (int)i];
            const Range *own = range_of(t, c);
            word_add(w, c, own->rule == RULE_COMBINING ? own->value : 0);
        }
        break;
    default: break;
    }
}

static void encode_wordpiece(const Tokenizer *t, const char *text, int64_t bytes, Ids *out) {
    Word w;
    w.n = w.fixed = 0;
    for (int64_t i = 0; i < bytes;) {
        int id = match_verbatim(t, text + i, bytes - i);
        if (id >= 0) {
            word_end(t, &w, out);
            ids_push(out, id);
            i += t->piece[id].length;
        } else {
            uint32_t code;
            i += utf8_read(text + i, bytes - i, &code);
            word_feed(t, &w, code, out);
        }
    }
    word_end(t, &w, out);
}

// --- Both ----------------------------------------------------------------------------------------

// Appends the ids of text[0..bytes), without BOS, [CLS] or [SEP]. Any bytes are a text: one that
// is not UTF-8 counts as U+FFFD, as sentencepiece has it (and WordPiece drops it).
static void encode(const Tokenizer *t, const char *text, int64_t bytes, Ids *out) {
    if (t->kind == SENTENCEPIECE) encode_sentencepiece(t, text, bytes, out);
    else encode_wordpiece(t, text, bytes, out);
}

// Appends the text of one token as it continues the token `previous` (-1: it starts a text).
// SentencePiece: control tokens give nothing, byte tokens their byte, and the space that was put
// before the text is dropped again. WordPiece: a space comes before all but "##" pieces.
static void decode(const Tokenizer *t, int previous, int id, Text *out) {
    if (id < 0 || id >= t->n_tokens) return;
    const Piece *p = &t->piece[id];
    int at = 0;
    if (t->kind == WORDPIECE) {
        bool glued = p->length > 2 && !memcmp(p->text, "##", 2);
        if (glued) at = 2;
        else if (previous >= 0) text_add(out, " ", 1);
        text_add(out, p->text + at, p->length - at);
        return;
    }
    bool first = previous < 0 || previous >= t->n_tokens
               || t->piece[previous].type == PIECE_CONTROL;
    if (p->type == PIECE_CONTROL) return;
    if (p->type == PIECE_UNKNOWN) {
        text_add(out, " \xe2\x81\x87 ", 5);
        return;
    }
    if (p->type == PIECE_BYTE) {
        text_add(out, &(char){(char)byte_value(p)}, 1);
        return;
    }
    if (first && p->length >= 3 && !memcmp(p->text, WORD_SPACE, 3)) at = 3;
    while (at < p->length) {
        bool space = at + 3 <= p->length && !memcmp(p->text + at, WORD_SPACE, 3);
        text_add(out, space ? " " : p->text + at, 1);
        at += space ? 3 : 1;
    }
}
// ------------------------------------------------------------------------------------------------
// 6. Loading a model, and continuing a text
// ------------------------------------------------------------------------------------------------

// Opens a model file. Dies where the file is not what it should be. The embedding API is this,
// encode() and decode(), session_new(), sequence_new(), batch_add(), forward(), logits(),
// batch_commit(), session_free() and model_free(): README.md has an example.
static const char *kernels_wanted;     // --kernels NAME; NULL: the fastest this CPU has

static Model *model_load(const char *path) {
    kernels_init(kernels_wanted);
    Model *m = allocate(1, sizeof *m, "model");
    m->path = copy_string(path);
    model_map(m);
    model_header(m);
    model_weights(m);
    if (m->tokenizer_kind) {
        m->tokenizer = allocate(1, sizeof *m->tokenizer, "tokenizer");
        tokenizer_load(m->tokenizer, path, m->tokenizer_kind, m->file + read_u64(m->file + 48),
                       (int64_t)read_u64(m->file + 56), m->vocab_size, m->unk,
                       read_u32(m->file + 132) & 1);
    }
    return m;
}

static void model_free(Model *m) {
    for (int i = 0; i < m->n_layers; i++) {
        Layer *l = &m->layers[i];
        float *own[] = {l->attn_norm, l->ffn_norm, l->attn_norm_bias, l->ffn_norm_bias, l->q_bias,
                        l->k_bias, l->v_bias, l->o_bias, l->up_bias, l->down_bias};
        for (size_t j = 0; j < sizeof own / sizeof *own; j++) release(own[j]);
    }
    for (int i = 0; i < m->n_heads_named; i++) {
        for (int j = 0; j < m->heads[i].n_labels; j++) release(m->heads[i].labels[j]);
        release(m->heads[i].labels);
        release(m->heads[i].name);
        release(m->heads[i].bias);
    }
    float *own[] = {m->norm, m->embed_norm, m->embed_norm_bias, m->pooler_bias, m->mlm_bias,
                    m->mlm_norm, m->mlm_norm_bias, m->mlm_out_bias, m->rope_frequency};
    for (size_t j = 0; j < sizeof own / sizeof *own; j++) release(own[j]);
    if (m->tokenizer) tokenizer_free(m->tokenizer);
    release(m->tokenizer);
    release(m->layers);
    release(m->heads);
#ifndef _WIN32
    if (m->mapped) munmap((void *)(uintptr_t)m->file, (size_t)m->bytes);
#endif
    if (!m->mapped) release((void *)(uintptr_t)m->file);
    release((void *)(uintptr_t)m->path);
    release(m);
}

// Natural logarithm of the softmax of z at `token`; *best gets the largest one's index.
static double log_softmax_at(const float *z, int64_t n, int token, int *best) {
    int top = 0;
    for (int64_t i = 1; i < n; i++) {
        if (z[i] > z[top]) top = (int)i;
    }
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)expf(z[i] - z[top]);
    if (best) *best = top;
    return (double)(z[token] - z[top]) - log(sum);
}

typedef struct {                // how --prompt picks the next token
    double temperature, top_p;  // 0: the likeliest token; 1: from the whole distribution
    uint64_t seed;
} Sampler;

typedef struct { float p; int token; } Candidate;

static int by_probability(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->p > y->p ? -1 : x->p < y->p ? 1 : x->token - y->token;
}

// Draws a token from the smallest set of likeliest tokens that holds top_p of the probability
// (nucleus sampling, Holtzman et al. 2020); splitmix64 gives the number.
static int sample(Sampler *s, const float *z, int n) {
    int best = 0;
    double sum = 0, kept = 0;
    for (int i = 1; i < n; i++) {
        if (z[i] > z[best]) best = i;
    }
    if (s->temperature <= 0) return best;
    Candidate *c = allocate(n, sizeof *c, "candidates");
    for (int i = 0; i < n; i++) {
        c[i] = (Candidate){expf((z[i] - z[best]) / (float)s->temperature), i};
        sum += c[i].p;
    }
    qsort(c, (size_t)n, sizeof *c, by_probability);
    int last = 0;
    for (kept = c[0].p; last + 1 < n && kept < s->top_p * sum; last++) kept += c[last + 1].p;
    uint64_t bits = s->seed += 0x9e3779b97f4a7c15u;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
    double left = (double)((bits ^ bits >> 31) >> 11) * 0x1p-53 * kept;
    int drawn = 0;
    while (drawn < last && left >= c[drawn].p) left -= c[drawn++].p;
    int token = c[drawn].token;
    release(c);
    return token;
}

static const Tokenizer *need_tokenizer(const Model *m) {
    if (!m->tokenizer) {
        die("%s: has no tokenizer; export it again with --tokenizer FILE", m->path);
    }
    return m->tokenizer;
}

// --prompt for Llama: prints the text and up to n_tokens of its continuation, as they come.
static void continue_text(Session *s, const Schedule *schedule, const char *prompt, bool bos,
                          int64_t n_tokens, Sampler *sampler) {
    const Model *m = s->model;
    Ids ids = {0};
    Text piece = {0};
    if (bos && m->bos >= 0) ids_push(&ids, m->bos);
    encode(need_tokenizer(m), prompt, (int64_t)strlen(prompt), &ids);
    if (!ids.n) die("--prompt: no tokens to start from; give some text, or --bos");
    if (ids.n > m->max_length) {
        die("--prompt: %lld tokens, the model's context holds %d; shorten the text",
            (long long)ids.n, m->max_length);
    }
    if (ids.n + n_tokens > m->max_length) n_tokens = m->max_length - ids.n + 1;
    int q = sequence_new(s, -1, ids.n + n_tokens, schedule_slots(s, schedule));
    for (int64_t i = 0; i < ids.n; i++) batch_add(s, q, ids.id[i], 0);
    float *z = allocate(m->vocab_size, sizeof *z, "logits");
    fputs(prompt, stdout);
    double start = seconds(), decoding = 0;
    int64_t made = 0;
    for (int previous = ids.id[ids.n - 1]; made < n_tokens;) {
        forward(s, schedule);
        logits(s, (int64_t[]){s->batch.n_rows - 1}, 1, z);
        batch_commit(s);
        if (!made++) decoding = seconds();
        int next = sample(sampler, z, m->vocab_size);
        if (next == m->eos || next == m->bos) break;
        piece.n = 0;
        decode(m->tokenizer, previous, next, &piece);
        fwrite(piece.s, 1, (size_t)piece.n, stdout);
        fflush(stdout);
        previous = next;
        if (made < n_tokens) batch_add(s, q, next, 0);
    }
    fputc('\n', stdout);
    double end = seconds();
    warn("prompt: %lld tokens in %.2f s (%.1f tokens/s); continuation: %lld tokens in %.2f s "
         "(%.1f tokens/s)", (long long)ids.n, decoding - start,
         (double)ids.n / (decoding - start + 1e-9), (long long)made, end - decoding,
         (double)(made - 1) / (end - decoding + 1e-9));
    release(z);
    release(ids.id);
    release(piece.s);
}

// --prompt for BERT: the five likeliest tokens for every [MASK], with their probabilities.
static void fill_masks(Session *s, const Schedule *schedule, const char *prompt) {
    const Model *m = s->model;
    Ids ids = {0};
    ids_push(&ids, m->bos);
    encode(need_tokenizer(m), prompt, (int64_t)strlen(prompt), &ids);
    ids_push(&ids, m->eos);
    if (ids.n > m->max_length) {
        die("--prompt: %lld tokens, the model's context holds %d; shorten the text",
            (long long)ids.n, m->max_length);
    }
    int q = sequence_new(s, -1, ids.n, 1), n_masks = 0;
    for (int64_t i = 0; i < ids.n; i++) batch_add(s, q, ids.id[i], 0);
    forward(s, schedule);
    float *z = allocate(m->vocab_size, sizeof *z, "logits");
    Candidate *c = allocate(m->vocab_size, sizeof *c, "candidates");
    Text piece = {0};
    for (int64_t i = 0; i < ids.n; i++) {
        if (ids.id[i] != m->mask) continue;
        logits(s, &i, 1, z);
        double base = log_softmax_at(z, m->vocab_size, 0, NULL) - z[0];
        for (int t = 0; t < m->vocab_size; t++) {
            c[t] = (Candidate){(float)exp(z[t] + base), t};
        }
        qsort(c, (size_t)m->vocab_size, sizeof *c, by_probability);
        printf("[MASK] %d, token %lld\n", ++n_masks, (long long)i);
        for (int t = 0; t < 5 && t < m->vocab_size; t++) {
            piece.n = 0;
            decode(m->tokenizer, -1, c[t].token, &piece);
            printf("  %-20.*s %.4f\n", (int)piece.n, piece.s, (double)c[t].p);
        }
    }
    if (!n_masks) die("--prompt: no [MASK] in the text; put one where a word should be filled in");
    release(z);
    release(c);
    release(ids.id);
    release(piece.s);
}

// ------------------------------------------------------------------------------------------------
// 7. Metrics: kept values -> a score and its standard error
// ------------------------------------------------------------------------------------------------

// Bytes of the white-space character at s, by Python's str.isspace(); 0 if there is none.
static int space_bytes(const char *s) {
    static const char *const wide[] = {
        "\xC2\x85", "\u00A0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005",
        "\u2006", "\u2007", "\u2008", "\u2009", "\u200A", "\u2028", "\u2029", "\u202F", "\u205F",
        "\u3000"};
    if (*s == ' ' || (*s >= 9 && *s <= 13) || (*s >= 28 && *s <= 31)) return 1;
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++) {
        if (!strncmp(s, wide[i], strlen(wide[i]))) return (int)strlen(wide[i]);
    }
    return 0;
}

// Bytes of white space at the end of a text.
static int64_t trailing_space(const char *text) {
    const char *end = text;
    for (const char *s = text; *s;) {
        int space = space_bytes(s);
        s += space ? space : 1;
        if (!space) end = s;
    }
    return (int64_t)strlen(end);
}

// What the harness counts as words of running text: len(re.split(r"\s+", text)).
static int64_t count_words(const char *text) {
    int64_t words = 1;
    for (int before = 0; *text;) {
        int space = space_bytes(text);
        words += space && !before;
        before = space;
        text += space ? space : 1;
    }
    return words;
}

static int64_t count_codepoints(const char *text) {
    int64_t n = 0;
    for (; *text; text++) n += ((unsigned char)*text & 0xC0) != 0x80;
    return n;
}

// The number that the harness's filters take from a generated text: strict, the group of the first
// `#### (\-?[0-9\.\,]+)`; flexible, the last `(-?[$0-9.,]{2,})|(-?[0-9]+)`; else `[invalid]`.
static const char *find_number(const char *text, bool flexible, int64_t *bytes) {
    const char *found = "[invalid]";
    *bytes = (int64_t)strlen(found);
    for (const char *p = text; *p; p++) {
        if (!flexible && strncmp(p, "#### ", 5)) continue;
        const char *start = flexible ? p : p + 5;
        int sign = *start == '-';
        size_t run = strspn(start + sign, flexible ? "$0123456789.," : "0123456789.,");
        if (!run || (flexible && run == 1 && strchr("$.,", start[sign]))) continue;
        found = start;
        *bytes = sign + (int64_t)run;
        if (!flexible) break;
        p += *bytes - 1;
    }
    return found;
}

// One side of the comparison: without `,` and `$`, without everything up to the last `#### `,
// without a final `.` (Python's `\.$`, which also sees it before a last newline), in lower case.
static Text normalise_number(const char *s, int64_t bytes) {
    Text t = {0};
    text_add(&t, "", 0);
    for (int64_t i = 0; i < bytes; i++) {
        char c = s[i] >= 'A' && s[i] <= 'Z' ? (char)(s[i] + 32) : s[i];
        if (c != ',' && c != '$') text_add(&t, &c, 1);
        if (t.n >= 5 && !strcmp(t.s + t.n - 5, "#### ")) t.n = 0;
    }
    t.s[t.n] = 0;
    int64_t last = t.n - 1 - (t.n && t.s[t.n - 1] == '\n');
    if (last >= 0 && t.s[last] == '.') memmove(t.s + last, t.s + last + 1, (size_t)(t.n - last));
    return t;
}

// GSM8K's exact match of a generated text and an answer.
static bool exact_match(const char *text, const char *answer, bool flexible) {
    int64_t bytes;
    const char *number = find_number(text, flexible, &bytes);
    Text ours = normalise_number(number, bytes);
    Text gold = normalise_number(answer, (int64_t)strlen(answer));
    bool same = !strcmp(ours.s, gold.s);
    release(ours.s);
    release(gold.s);
    return same;
}

// Kept values of n items, or of a bootstrap's resample of them, in which some count several times.
typedef struct {
    const double *values;       // [n][width]
    int width;
    int64_t n;
    int *pick;                  // [n] which items count
    double *ranks;              // [2][n] scratch
} Sample;

static double kept(const Sample *s, int64_t i, int column) {
    return s->values[(int64_t)s->pick[i] * s->width + column];
}

// Sum of a column; column -1 holds a 1 in every row.
static double total(const Sample *s, int column) {
    double sum = 0;
    for (int64_t i = 0; i < s->n; i++) sum += column < 0 ? 1 : kept(s, i, column);
    return sum;
}

static double share(const Sample *s, int a, int b) { return total(s, a) / total(s, b); }

static double perplexity(const Sample *s, int a, int b) { return exp(-share(s, a, b)); }

static double agreement(const Sample *s, int a, int b) {
    int64_t same = 0;
    for (int64_t i = 0; i < s->n; i++) same += kept(s, i, a) == kept(s, i, b);
    return (double)same / (double)s->n;
}

// F1 of class 1; 0 where there is nothing to be right about.
static double f1(const Sample *s, int a, int b) {
    double hits = 0, named = 0;
    for (int64_t i = 0; i < s->n; i++) {
        hits += kept(s, i, a) == 1 && kept(s, i, b) == 1;
        named += (kept(s, i, a) == 1) + (kept(s, i, b) == 1);
    }
    return named > 0 ? 2 * hits / named : 0;
}

// Matthews correlation of any number of classes; 0 where one side is constant.
static double matthews(const Sample *s, int a, int b) {
    double n = (double)s->n, above = agreement(s, a, b) * n * n, spread_a = n * n, spread_b = n * n;
    double seen = 0;
    for (int k = 0; seen < 2 * n; k++) {
        double count_a = 0, count_b = 0;
        for (int64_t i = 0; i < s->n; i++) {
            count_a += kept(s, i, a) == k;
            count_b += kept(s, i, b) == k;
        }
        above -= count_a * count_b;
        spread_a -= count_a * count_a;
        spread_b -= count_b * count_b;
        seen += count_a + count_b;
    }
    return spread_a > 0 && spread_b > 0 ? above / sqrt(spread_a * spread_b) : 0;
}

// Pearson correlation; NaN where one side is constant.
static double pearson(const Sample *s, int a, int b) {
    double mean_a = share(s, a, -1), mean_b = share(s, b, -1), aa = 0, bb = 0, ab = 0;
    bool same_a = true, same_b = true;
    for (int64_t i = 0; i < s->n; i++) {
        double x = kept(s, i, a) - mean_a, y = kept(s, i, b) - mean_b;
        same_a &= kept(s, i, a) == kept(s, 0, a);
        same_b &= kept(s, i, b) == kept(s, 0, b);
        aa += x * x;
        bb += y * y;
        ab += x * y;
    }
    return same_a || same_b ? NAN : fmax(-1, fmin(1, ab / (sqrt(aa) * sqrt(bb))));
}

// Spearman correlation, ties sharing their average rank; NaN where one side is constant. The values
// are whole numbers below n in the right order (see ordered), so that counting ranks a resample.
static double spearman(const Sample *s, int a, int b) {
    int column[2] = {a, b};
    double square[2] = {0}, product = 0, middle = (double)(s->n + 1) / 2;
    for (int side = 0; side < 2; side++) {
        double *rank = s->ranks + side * s->n, below = 0;
        memset(rank, 0, (size_t)s->n * sizeof *rank);
        for (int64_t i = 0; i < s->n; i++) rank[(int64_t)kept(s, i, column[side])]++;
        for (int64_t k = 0; k < s->n; k++) {        // counts become ranks, measured from the middle
            double here = rank[k];
            rank[k] = below + (here + 1) / 2 - middle;
            square[side] += here * rank[k] * rank[k];
            below += here;
        }
    }
    for (int64_t i = 0; i < s->n; i++) {
        product += s->ranks[(int64_t)kept(s, i, a)] * s->ranks[s->n + (int64_t)kept(s, i, b)];
    }
    return square[0] > 0 && square[1] > 0 ? product / sqrt(square[0] * square[1]) : NAN;
}

// Each value of a sample's table replaced by how many of its column are smaller.
static double *ordered(const Sample *s) {
    double *order = allocate(s->n * s->width, sizeof *order, "ranks");
    for (int64_t i = 0; i < s->n * s->width; i++) {
        for (int64_t j = i % s->width; j < s->n * s->width; j += s->width) {
            order[i] += s->values[j] < s->values[i];
        }
    }
    return order;
}

// A new metric is a row here. Its function reads columns a and b of the values that its kind of
// task keeps per item. Where it is a share of the items, its error has a formula.
typedef struct {
    const char *kind, *name;
    double (*value)(const Sample *s, int a, int b);
    int a, b;
    bool formula;
} Metric;

static const Metric metrics[] = {
    {"choice", "acc", share, 0, -1, true},          // keeps: correct, correct_norm
    {"choice", "acc_norm", share, 1, -1, true},
    {"contexts", "acc", share, 0, -1, true},        // keeps: correct
    {"lastword", "acc", share, 1, -1, true},        // keeps: loglik, greedy
    {"lastword", "perplexity", perplexity, 0, -1, false},
    {"generate", "strict", share, 0, -1, true},     // keeps: strict, flexible
    {"generate", "flexible", share, 1, -1, true},
    {"classify", "acc", agreement, 0, 1, true},     // keeps: prediction, gold
    {"classify", "f1", f1, 0, 1, false},
    {"classify", "matthews", matthews, 0, 1, false},
    {"regress", "pearson", pearson, 0, 1, false},   // keeps: prediction, gold
    {"regress", "spearman", spearman, 0, 1, false},
    {"text", "token_perplexity", perplexity, 0, 1, false},  // keeps: loglik, tokens, words, bytes,
    {"text", "word_perplexity", perplexity, 0, 2, false},   //        hits
    {"text", "byte_perplexity", perplexity, 0, 3, false},
    {"text", "pseudo_perplexity", perplexity, 0, 1, false},
    {"text", "masked_acc", share, 4, 1, false},
};

// The metric of that name for a kind of task; NULL if the kind has none such.
static const Metric *metric_find(const char *kind, const char *name) {
    for (size_t i = 0; i < sizeof metrics / sizeof *metrics; i++) {
        if (!strcmp(metrics[i].kind, kind) && !strcmp(metrics[i].name, name)) return &metrics[i];
    }
    return NULL;
}

// A random 64-bit number from a counter (splitmix64, Steele et al. 2014).
static uint64_t mix64(uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// Standard deviation of a metric over resamples of the items, drawn with replacement; resamples
// without a value (a constant has no correlation) do not count. Resample r has random numbers of
// its own, so that the figure does not depend on the number of threads.
static double bootstrap(const Metric *m, const Sample *all) {
    enum { RESAMPLES = 10000 };
    double *found = allocate(RESAMPLES, sizeof *found, "bootstrap"), mean = 0, squares = 0;
    int count = 0;
    #pragma omp parallel
    {
        Sample s = *all;
        s.pick = allocate(s.n, sizeof *s.pick, "bootstrap");
        s.ranks = allocate(2 * s.n, sizeof *s.ranks, "bootstrap");
        #pragma omp for
        for (int r = 0; r < RESAMPLES; r++) {
            uint64_t base = mix64((uint64_t)r);
            for (int64_t i = 0; i < s.n; i++) {
                s.pick[i] = (int)((mix64(base + (uint64_t)i) >> 32) * (uint64_t)s.n >> 32);
            }
            found[r] = m->value(&s, m->a, m->b);
        }
        release(s.pick);
        release(s.ranks);
    }
    for (int r = 0; r < RESAMPLES; r++) {           // Welford's running mean and squares
        if (isnan(found[r])) continue;
        double before = found[r] - mean;
        mean += before / ++count;
        squares += before * (found[r] - mean);
    }
    release(found);
    return count > 1 ? sqrt(squares / (count - 1)) : NAN;
}

// A metric of n items with `width` kept values each, and its standard error: by formula (sample
// deviation over the root of n) for shares, otherwise by bootstrap. NaN is undefined.
static double metric_value(const Metric *m, const double *values, int64_t n, int width,
                           double *error) {
    Sample all = {values, width, n, allocate(n, sizeof *all.pick, "metric"),
                  allocate(2 * n, sizeof *all.ranks, "metric")};
    double *order = NULL, value = NAN;
    bool whole = n > 0;
    for (int64_t i = 0; i < n; i++) all.pick[i] = (int)i;
    for (int64_t i = 0; i < n * width; i++) whole &= !isnan(values[i]);
    if (whole && m->value == spearman) all.values = order = ordered(&all);
    if (whole) value = m->value(&all, m->a, m->b);
    *error = n < 2 || !isfinite(value) ? NAN
           : m->formula ? sqrt(value * (1 - value) / (double)(n - 1)) : bootstrap(m, &all);
    release(all.pick);
    release(all.ranks);
    release(order);
    return value;
}

// The probe: a linear classifier, or a regression, on n rows of d frozen features. It minimises
//     sum over rows of loss(row) + strength / 2 * (sum of squares of all weights but the biases)
// where the loss is the negative log-likelihood of a softmax over the classes, or half the squared
// error: scikit-learn's LogisticRegression(C = 1 / strength) and Ridge(alpha = strength). Of two
// classes only the difference counts, so that their weights are punished twice to be the same as a
// single logistic. Newton's method with conjugate gradients, until the mean gradient is below 1e-8.
typedef struct {
    const float *x;             // [n][d], centred: that saves half of the passes
    const double *y;            // [n] class or target
    int64_t n, d, outputs;      // outputs: classes, or 1 for a regression
    double strength;
    double *p;                  // [n][outputs] probabilities at the last point
    double *parts;              // [PROBE_PARTS][outputs][d + 2] sums over a part of the rows
} Probe;

enum { PROBE_PARTS = 64 };      // fixed, so that sums do not depend on the number of threads

// Eight sums side by side, which a compiler can keep in vectors.
static double probe_dot(const double *w, const float *x, int64_t d) {
    double lane[8] = {0};
    for (int64_t j = 0; j < d / 8 * 8; j += 8) {
        for (int l = 0; l < 8; l++) lane[l] += w[j + l] * (double)x[j + l];
    }
    for (int64_t j = d / 8 * 8; j < d; j++) lane[j % 8] += w[j] * (double)x[j];
    for (int l = 0; l < 4; l++) lane[l] += lane[l + 4];
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// Row i: scores z become the loss's gradient by the scores; returns the loss and keeps the
// probabilities. With `curve`, z is a change of the scores and becomes that of the gradient.
static double probe_loss(const Probe *f, int64_t i, double *z, bool curve) {
    double *p = f->p + i * f->outputs, top = z[0], sum = 0, own = z[(int64_t)f->y[i] % f->outputs];
    if (f->outputs == 1) {
        if (!curve) z[0] -= f->y[i];
        return z[0] * z[0] / 2;
    }
    if (curve) {
        for (int64_t k = 0; k < f->outputs; k++) sum += p[k] * z[k];
        for (int64_t k = 0; k < f->outputs; k++) z[k] = p[k] * (z[k] - sum);
        return 0;
    }
    for (int64_t k = 1; k < f->outputs; k++) top = fmax(top, z[k]);
    for (int64_t k = 0; k < f->outputs; k++) sum += exp(z[k] - top);
    for (int64_t k = 0; k < f->outputs; k++) {
        p[k] = exp(z[k] - top) / sum;
        z[k] = p[k] - ((double)k == f->y[i]);
    }
    return top + log(sum) - own;
}

// One pass over the features: the objective at w and, in out, its gradient; or with `curve` the
// Hessian of the last such point times w. w and out are [outputs][d + 1], the bias last.
static double probe_pass(const Probe *f, const double *w, double *out, bool curve) {
    int64_t d = f->d, outputs = f->outputs, size = outputs * (d + 1);
    double losses[PROBE_PARTS] = {0}, loss = 0;
    #pragma omp parallel for schedule(static)
    for (int part = 0; part < PROBE_PARTS; part++) {
        double *sum = f->parts + part * (size + outputs), *z = sum + size;
        memset(sum, 0, (size_t)size * sizeof *sum);
        for (int64_t i = f->n * part / PROBE_PARTS; i < f->n * (part + 1) / PROBE_PARTS; i++) {
            const float *x = f->x + i * d;
            for (int64_t k = 0; k < outputs; k++) {
                z[k] = probe_dot(w + k * (d + 1), x, d) + w[k * (d + 1) + d];
            }
            losses[part] += probe_loss(f, i, z, curve);
            for (int64_t k = 0; k < outputs; k++) {
                double *row = sum + k * (d + 1);
                for (int64_t j = 0; j < d; j++) row[j] += z[k] * (double)x[j];
                row[d] += z[k];
            }
        }
    }
    for (int64_t j = 0; j < size; j++) {
        double punished = j % (d + 1) < d ? f->strength * w[j] : 0;
        loss += punished * w[j] / 2;
        out[j] = punished;
        for (int64_t p = 0; p < PROBE_PARTS; p++) out[j] += f->parts[p * (size + outputs) + j];
    }
    for (int part = 0; part < PROBE_PARTS; part++) loss += losses[part];
    return loss;
}

static double inner(const double *a, const double *b, int64_t n) {
    double sum = 0;
    for (int64_t j = 0; j < n; j++) sum += a[j] * b[j];
    return sum;
}

// Newton's step: solves Hessian . step = -gradient by conjugate gradients until the residual is
// `tolerance` times the gradient. work is [3][size].
static void probe_step(const Probe *f, const double *gradient, double tolerance, double *step,
                       double *work) {
    int64_t size = f->outputs * (f->d + 1);
    double *residual = work, *along = work + size, *curved = work + 2 * size;
    for (int64_t j = 0; j < size; j++) {
        step[j] = 0;
        residual[j] = along[j] = -gradient[j];
    }
    double rest = inner(residual, residual, size), goal = rest * tolerance * tolerance;
    for (int turn = 0; turn < 1000 && rest > goal; turn++) {
        probe_pass(f, along, curved, true);
        double length = rest / inner(along, curved, size), before = rest;
        for (int64_t j = 0; j < size; j++) {
            step[j] += length * along[j];
            residual[j] -= length * curved[j];
        }
        rest = inner(residual, residual, size);
        for (int64_t j = 0; j < size; j++) along[j] = residual[j] + rest / before * along[j];
    }
}

// Fits the probe described above; classes is 1 for a regression. w is [classes][d + 1], the bias
// last. The same bits for any number of threads.
static void probe_fit(const float *x, const double *y, int64_t n, int64_t d, int classes,
                      double strength, double *w) {
    int64_t size = classes * (d + 1);
    float *centred = allocate(n * d, sizeof *centred, "probe");
    Probe f = {centred, y, n, d, classes, classes == 2 ? 2 * strength : strength, NULL, NULL};
    f.p = allocate(n * classes, sizeof *f.p, "probe");
    f.parts = allocate(PROBE_PARTS * (size + classes), sizeof *f.parts, "probe");
    double *work = allocate(6 * size + d, sizeof *work, "probe"), *mean = work + 6 * size;
    double *gradient = work + 3 * size, *step = work + 4 * size, *next = work + 5 * size;
    for (int64_t i = 0; i < n * d; i++) mean[i % d] += x[i];
    for (int64_t j = 0; j < d; j++) mean[j] /= (double)n;
    for (int64_t i = 0; i < n * d; i++) centred[i] = (float)(x[i] - mean[i % d]);
    memset(w, 0, (size_t)size * sizeof *w);
    double loss = probe_pass(&f, w, gradient, false), start = inner(gradient, gradient, size);
    for (int turn = 0; turn < 100; turn++) {
        double steep = inner(gradient, gradient, size), before = loss, t = 1;
        if (sqrt(steep) <= 1e-8 * (double)n) break;
        probe_step(&f, gradient, fmin(0.1, pow(steep / start, 0.25)), step, work);
        double slope = inner(gradient, step, size);
        for (; t > 1e-6; t /= 2) {                  // halve a step that goes too far
            for (int64_t j = 0; j < size; j++) next[j] = w[j] + t * step[j];
            loss = probe_pass(&f, next, gradient, false);
            if (loss <= before + 1e-4 * t * slope) break;
        }
        if (!(loss < before)) break;                // nothing left but rounding
        memcpy(w, next, (size_t)size * sizeof *w);
    }
    for (int k = 0; k < classes; k++) w[k * (d + 1) + d] -= inner(w + k * (d + 1), mean, d);
    release(centred);
    release(f.p);
    release(f.parts);
    release(work);
}

// What a fitted probe makes of one row of features: a class, or the target of a regression.
static double probe_predict(const double *w, const float *x, int64_t d, int classes) {
    double best = 0, top = -INFINITY;
    for (int k = 0; k < classes; k++) {
        double z = probe_dot(w + k * (d + 1), x, d) + w[k * (d + 1) + d];
        if (classes == 1) return z;
        if (z > top) top = z, best = k;
    }
    return best;
}
// ------------------------------------------------------------------------------------------------
// 8. Tasks: lines of text -> sequences -> kept values
// ------------------------------------------------------------------------------------------------

// A task file is text: a header line, then one example a line, fields separated by tabs
// (README.md: task files). An item becomes one or several requests; what the model answers becomes
// a few numbers that are kept, since metrics and their errors need all items.
typedef struct {
    int64_t item;               // index in the task
    int choice;                 // which of the item's requests
    int64_t first, n;           // tokens fed: task->pool.id[first .. first + n)
    int64_t segment_from;       // BERT: tokens from here on are of segment 1
    int64_t mask_at;            // BERT: this token is fed as [MASK]; -1: none
    int64_t row;                // the first row that is scored, counted from the first fed token
    int64_t target, n_targets;  // rows row, row + 1, ... are scored against pool.id[target], ...
    int64_t shared, parent_row, own_row;    // where its rows are in the batch: the first `shared`
                                            // ones end before row parent_row + shared of a parent
    int sequence;
    double loglik, prediction;  // the answer
    bool greedy;
    Text text;
} Request;

typedef struct { char **field; int n_fields; int64_t line; } Item;

typedef struct Kind Kind;

typedef struct {
    char *path, *name, *head, *identity;    // identity: the line that results of this task carry
    const Kind *kind;
    const Metric *metrics[8];
    int n_metrics, n_labels, n_stops;
    char **labels, **stops;
    int64_t max_tokens;
    double chance;
    uint64_t hash;                          // of the file's bytes
    Item *items;
    int64_t n_items;
    char *text;                             // the file's bytes, which the fields point into
    Ids pool;
    Request *requests;
    int64_t n_requests, requests_capacity;
    bool *cut;                              // [n_items]: did not fit the context
    const Head *classifier;                 // BERT: with the order of its labels
    int *label_of;                          // [outputs]: the task's label of each output
} Task;

// To add a kind of task: how an item becomes requests, how answers become values, and a row in
// `kinds`. ADDS: values of several requests add up, so that an item may be spread over batches.
enum Output { SCORES, GENERATES, CLASSIFIES };
struct Kind {
    const char *name;
    int arch;                               // LLAMA, BERT, or 0 for both
    enum Output output;
    int width;                              // values kept per item
    int fewest_fields, most_fields;
    bool adds;
    void (*ask)(Task *t, const Model *m, bool bos, int64_t item);
    void (*value)(const Task *t, const Request *r, int64_t n, double *value);
};

_Noreturn static void bad_item(const Task *t, int64_t item, const char *fault) {
    die("%s: line %lld: %s; mend the line", t->path, (long long)t->items[item].line, fault);
}

static Request *new_request(Task *t, int64_t item, int choice) {
    t->requests = grow(t->requests, &t->requests_capacity, t->n_requests + 1, sizeof *t->requests,
                       "requests");
    Request *r = &t->requests[t->n_requests++];
    *r = (Request){.item = item, .choice = choice, .mask_at = -1, .first = t->pool.n};
    return r;
}

// The harness's log-likelihood request: white space at the end of the context moves to the
// continuation, the model reads encode(context) and then what encode(context + continuation) has
// behind as many tokens, cut to the last max_length + 1; an empty context is BOS.
static void ask_continuation(Task *t, const Model *m, bool bos, int64_t item, int choice,
                             const char *context, const char *continuation) {
    Text whole = {0};
    int64_t n = (int64_t)strlen(context), tail = trailing_space(context);
    text_add(&whole, context, n);
    text_add(&whole, " ", 1);
    text_add(&whole, continuation, (int64_t)strlen(continuation));
    Request *r = new_request(t, item, choice);
    Ids *p = &t->pool, all = {0};
    n -= tail;
    if ((bos || n == 0) && m->bos < 0) die("%s: has no BOS token; leave out --bos", m->path);
    if (bos || n == 0) ids_push(p, m->bos);
    if (bos && n > 0) ids_push(&all, m->bos);
    if (n > 0) encode(m->tokenizer, context, n, p);
    int64_t context_ids = p->n - r->first;
    if (n > 0) encode(m->tokenizer, whole.s, whole.n, &all);
    else encode(m->tokenizer, whole.s, whole.n, p);
    for (int64_t i = context_ids; i < all.n; i++) ids_push(p, all.id[i]);
    int64_t length = p->n - r->first, excess = length - (m->max_length + 1);
    r->target = r->first + context_ids;
    if (excess > 0) {
        r->first += excess;
        length -= excess;
        if (r->target < r->first + 1) r->target = r->first + 1;
        t->cut[item] = true;
    }
    r->n = length > 1 ? length - 1 : 1;
    r->row = r->target - r->first - 1;
    r->n_targets = p->n - r->target;
    release(all.id);
    release(whole.s);
}

// gold, context, choice, choice, ...
static void ask_choice(Task *t, const Model *m, bool bos, int64_t item) {
    const Item *i = &t->items[item];
    for (int c = 2; c < i->n_fields; c++) {
        ask_continuation(t, m, bos, item, c - 2, i->field[1], i->field[c]);
    }
}

// gold, continuation, context, context, ...
static void ask_contexts(Task *t, const Model *m, bool bos, int64_t item) {
    const Item *i = &t->items[item];
    for (int c = 2; c < i->n_fields; c++) {
        ask_continuation(t, m, bos, item, c - 2, i->field[c], i->field[1]);
    }
}

// context, target
static void ask_lastword(Task *t, const Model *m, bool bos, int64_t item) {
    ask_continuation(t, m, bos, item, 0, t->items[item].field[0], t->items[item].field[1]);
}

// prompt, answer
static void ask_generate(Task *t, const Model *m, bool bos, int64_t item) {
    const char *prompt = t->items[item].field[0];
    Request *r = new_request(t, item, 0);
    if (t->max_tokens >= m->max_length) {
        die("%s: max_tokens is %lld, the model's context holds %d; lower it", t->path,
            (long long)t->max_tokens, m->max_length);
    }
    if ((bos || !*prompt) && m->bos < 0) die("%s: has no BOS token; leave out --bos", m->path);
    if (bos || !*prompt) ids_push(&t->pool, m->bos);
    encode(m->tokenizer, prompt, (int64_t)strlen(prompt), &t->pool);
    r->n = t->pool.n - r->first;
    int64_t excess = r->n - (m->max_length - t->max_tokens);
    if (excess > 0) {
        r->first += excess;
        r->n -= excess;
        t->cut[item] = true;
    }
    r->row = r->n - 1;
}

// text: rolling windows as the harness cuts them (BOS first, one token of context), or for BERT
// every token masked once, in windows of the model's length.
static void ask_text(Task *t, const Model *m, bool bos, int64_t item) {
    (void)bos;
    Ids ids = {0};
    const char *text = t->items[item].field[0];
    encode(m->tokenizer, text, (int64_t)strlen(text), &ids);
    if (m->bos < 0) die("%s: has no BOS token, which running text begins with", m->path);
    if (m->arch == LLAMA) {
        int64_t start = t->pool.n, window = m->max_length;
        ids_push(&t->pool, m->bos);
        for (int64_t i = 0; i < ids.n; i++) ids_push(&t->pool, ids.id[i]);
        if (!ids.n) new_request(t, item, 0)->n = 1, t->requests[t->n_requests - 1].first = start;
        for (int64_t done = 0, end; done < ids.n; done = end) {
            end = done + window < ids.n ? done + window : ids.n;
            Request *r = new_request(t, item, 0);
            int64_t from = end - window > 0 ? end - window : 0;
            r->first = start + from;            // pool[start + i] is the token before ids[i]
            r->n = end - from;
            r->row = done - from;
            r->target = start + done + 1;
            r->n_targets = end - done;
        }
    } else {
        int64_t window = (m->max_length < 512 ? m->max_length : 512) - 2;
        if (window < 1) die("%s: its context holds no text between [CLS] and [SEP]", m->path);
        for (int64_t done = 0; done == 0 || done < ids.n; done += window) {
            int64_t n = ids.n - done < window ? ids.n - done : window, start = t->pool.n;
            ids_push(&t->pool, m->bos);
            for (int64_t i = 0; i < n; i++) ids_push(&t->pool, ids.id[done + i]);
            ids_push(&t->pool, m->eos);
            for (int64_t i = 1; i <= n || i == 1; i++) {    // an empty text asks for nothing
                Request *r = new_request(t, item, 0);
                *r = (Request){.item = item, .first = start, .n = n + 2, .segment_from = n + 2,
                               .mask_at = n ? i : -1, .row = i, .target = start + i,
                               .n_targets = n > 0};
            }
        }
    }
    release(ids.id);
}

// gold, text [, second text]: [CLS] a [SEP] b [SEP] in 128 tokens, the longer text cut first, as
// Hugging Face's fast tokenizers cut it.
static void ask_classify(Task *t, const Model *m, bool bos, int64_t item) {
    (void)bos;
    const Item *it = &t->items[item];
    Request *r = new_request(t, item, 0);
    Ids text[2] = {{0}, {0}};
    int pair = it->n_fields > 2;
    int64_t limit = (m->max_length < 128 ? m->max_length : 128) - 2 - pair, n[2] = {0, 0};
    for (int i = 0; i <= pair; i++) {
        encode(m->tokenizer, it->field[1 + i], (int64_t)strlen(it->field[1 + i]), &text[i]);
        n[i] = text[i].n;
    }
    if (n[0] + n[1] > limit) {
        int longer = pair && n[1] >= n[0];
        int64_t small = n[!longer] * pair;
        int64_t large = small > limit || limit - small < small ? small : limit - small;
        if (small + large > limit) {
            small = limit / 2;
            large = limit - small;
        }
        n[longer] = large;
        n[!longer] = small;
        t->cut[item] = true;
    }
    ids_push(&t->pool, m->bos);
    for (int64_t i = 0; i < n[0]; i++) ids_push(&t->pool, text[0].id[i]);
    ids_push(&t->pool, m->eos);
    r->segment_from = t->pool.n - r->first;
    for (int64_t i = 0; i < n[1]; i++) ids_push(&t->pool, text[1].id[i]);
    if (pair) ids_push(&t->pool, m->eos);
    r->n = t->pool.n - r->first;
    release(text[0].id);
    release(text[1].id);
}

static double gold_of(const Task *t, int64_t item) { return strtod(t->items[item].field[0], NULL); }

static void value_choice(const Task *t, const Request *r, int64_t n, double *value) {
    const Item *i = &t->items[r->item];
    int64_t best = -1, best_norm = -1;      // a model that answers NaN is never right
    double top = -INFINITY, top_norm = -INFINITY;
    for (int64_t c = 0; c < n; c++) {
        double norm = r[c].loglik / (double)count_codepoints(i->field[2 + c]);
        if (r[c].loglik > top) top = r[c].loglik, best = c;
        if (norm > top_norm) top_norm = norm, best_norm = c;
    }
    value[0] = (double)best == gold_of(t, r->item);
    if (t->kind->width > 1) value[1] = (double)best_norm == gold_of(t, r->item);
}

static void value_lastword(const Task *t, const Request *r, int64_t n, double *value) {
    (void)t, (void)n;
    value[0] = r->loglik;
    value[1] = r->greedy;
}

static void value_generate(const Task *t, const Request *r, int64_t n, double *value) {
    (void)n;
    value[0] = exact_match(r->text.s ? r->text.s : "", t->items[r->item].field[1], false);
    value[1] = exact_match(r->text.s ? r->text.s : "", t->items[r->item].field[1], true);
}

static void value_classify(const Task *t, const Request *r, int64_t n, double *value) {
    (void)n;
    value[0] = r->prediction;
    value[1] = gold_of(t, r->item);
}

static void value_text(const Task *t, const Request *r, int64_t n, double *value) {
    const char *text = t->items[r->item].field[0];
    value[2] = (double)count_words(text);
    value[3] = (double)strlen(text);
    for (int64_t i = 0; i < n; i++) {
        value[0] += r[i].loglik;
        value[1] += (double)r[i].n_targets;
        value[4] += r[i].greedy && r[i].n_targets;
    }
}

static const Kind kinds[] = {
    {"choice", LLAMA, SCORES, 2, 4, INT_MAX, false, ask_choice, value_choice},
    {"contexts", LLAMA, SCORES, 1, 4, INT_MAX, false, ask_contexts, value_choice},
    {"lastword", LLAMA, SCORES, 2, 2, 2, false, ask_lastword, value_lastword},
    {"generate", LLAMA, GENERATES, 2, 2, 2, false, ask_generate, value_generate},
    {"classify", BERT, CLASSIFIES, 2, 2, 3, false, ask_classify, value_classify},
    {"regress", BERT, CLASSIFIES, 2, 2, 3, false, ask_classify, value_classify},
    {"text", 0, SCORES, 5, 1, 1, true, ask_text, value_text},
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

// Undoes \n, \t, \r and \\ in place; a bar written \| stays apart from one that separates. False
// where another escape is met.
static bool unescape(char *s) {
    char *to = s;
    for (; *s; s++) {
        if (*s != '\\') {
            *to++ = *s;
            continue;
        }
        const char *known = strchr("ntr\\|", *++s);
        if (!*s || !known) return false;
        *to++ = *s == 'n' ? '\n' : *s == 't' ? '\t' : *s == 'r' ? '\r' : *s;
    }
    *to = 0;
    return true;
}

// Splits `s` at each `separator` that no backslash stands before; returns the pieces and their
// number. The pieces are parts of s.
static char **split(char *s, char separator, int *n) {
    char **piece = NULL;
    int64_t capacity = 0;
    for (*n = 0;; s++) {
        piece = grow(piece, &capacity, *n + 1, sizeof *piece, "fields");
        piece[(*n)++] = s;
        for (; *s && *s != separator; s++) {
            if (*s == '\\' && s[1]) s++;
        }
        if (!*s) return piece;
        *s = 0;
    }
}

// One option of the header, "key=value".
static void task_option(Task *t, char *option) {
    char *value = strchr(option, '=');
    if (!value) die("%s: line 1: \"%s\" is not of the form key=value", t->path, option);
    *value++ = 0;
    int n;
    if (!strcmp(option, "name")) t->name = value;
    else if (!strcmp(option, "head")) t->head = value;
    else if (!strcmp(option, "kind")) {
        for (int i = 0; i < N_KINDS; i++) {
            if (!strcmp(kinds[i].name, value)) t->kind = &kinds[i];
        }
        if (!t->kind) die("%s: line 1: kind \"%s\" is unknown; see README.md", t->path, value);
    } else if (!strcmp(option, "chance")) {
        if (!parse_double(value, &t->chance)) {
            die("%s: line 1: chance \"%s\" is not a number", t->path, value);
        }
    } else if (!strcmp(option, "max_tokens")) {
        if (!parse_int(value, 1, 1 << 20, &t->max_tokens)) {
            die("%s: line 1: max_tokens \"%s\" is not a whole number from 1", t->path, value);
        }
    } else if (!strcmp(option, "metrics")) {
        char **names = split(value, ',', &n);
        if (!t->kind) die("%s: line 1: kind= must stand before metrics=", t->path);
        for (int i = 0; i < n; i++) {
            const Metric *m = metric_find(t->kind->name, names[i]);
            if (!m || t->n_metrics == 8) {
                die("%s: line 1: \"%s\" is no metric of kind %s", t->path, names[i], t->kind->name);
            }
            t->metrics[t->n_metrics++] = m;
        }
        release(names);
    } else if (!strcmp(option, "labels") || !strcmp(option, "stop")) {
        char **parts = split(value, '|', &n);
        for (int i = 0; i < n; i++) {
            if (!unescape(parts[i]) || !*parts[i]) {
                die("%s: line 1: %s has an empty part or a bad escape", t->path, option);
            }
        }
        if (*option == 'l') t->labels = parts, t->n_labels = n;
        else t->stops = parts, t->n_stops = n;
    } else {
        die("%s: line 1: option \"%s\" is unknown; see README.md", t->path, option);
    }
}

// Checks the fields of an item, so that all that follows can trust them.
static void check_item(const Task *t, int64_t i) {
    const Item *it = &t->items[i];
    const char *kind = t->kind->name;
    double number;
    int64_t gold;
    if (it->n_fields < t->kind->fewest_fields || it->n_fields > t->kind->most_fields) {
        die("%s: line %lld: %d columns, kind %s has %d%s; mend the line", t->path,
            (long long)it->line, it->n_fields, kind, t->kind->fewest_fields,
            t->kind->most_fields > t->kind->fewest_fields ? " or more" : "");
    }
    for (int f = 0; f < it->n_fields; f++) {
        if (!unescape(it->field[f])) bad_item(t, i, "a backslash before other than n, t, r or \\");
    }
    if (!strcmp(kind, "choice") || !strcmp(kind, "contexts")) {
        if (!parse_int(it->field[0], 0, it->n_fields - 3, &gold)) {
            bad_item(t, i, "the first column is not the number of a choice, counted from 0");
        }
        for (int f = *kind == 'c' && kind[1] == 'h' ? 2 : 1; f < it->n_fields; f++) {
            if (!*it->field[f] && (kind[1] == 'h' || f == 1)) bad_item(t, i, "an empty continuation");
        }
    } else if (!strcmp(kind, "lastword")) {
        if (!*it->field[1]) bad_item(t, i, "an empty target");
    } else if (!strcmp(kind, "classify")) {
        if (!parse_int(it->field[0], 0, t->n_labels - 1, &gold)) {
            bad_item(t, i, "the first column is not the number of a label, counted from 0");
        }
    } else if (!strcmp(kind, "regress")) {
        if (!parse_double(it->field[0], &number) || !isfinite(number)) {
            bad_item(t, i, "the first column is not a number");
        }
    }
}

// Reads a task file and checks all of it.
static Task *task_load(const char *path) {
    Task *t = allocate(1, sizeof *t, "task");
    int64_t bytes, capacity = 0, line = 0;
    t->path = copy_string(path);
    t->text = read_file(path, &bytes);
    t->chance = NAN;
    t->max_tokens = 256;
    t->hash = hash_bytes((unsigned char *)t->text, bytes);
    char *at = t->text, *end = at + bytes;
    if (!strncmp(at, "\xef\xbb\xbf", 3)) at += 3;
    while (at < end) {
        char *stop = memchr(at, '\n', (size_t)(end - at));
        if (!stop) stop = end;
        line++;
        if (memchr(at, 0, (size_t)(stop - at))) {
            die("%s: line %lld: a NUL byte; task files are text", path, (long long)line);
        }
        *stop = 0;
        if (stop > at && stop[-1] == '\r') stop[-1] = 0;
        int n;
        char **field = split(at, '\t', &n);
        at = stop + 1;
        if (line == 1) {
            if (strcmp(field[0], "#painters-task") || n < 2 || strcmp(field[1], "1")) {
                die("%s: line 1: not a task file of version 1; it begins #painters-task<TAB>1", path);
            }
            for (int i = 2; i < n; i++) task_option(t, field[i]);
            release(field);
            continue;
        }
        if (n == 1 && !*field[0]) {             // an empty line at the end is no item
            release(field);
            if (at < end) die("%s: line %lld: an empty line; remove it", path, (long long)line);
            continue;
        }
        t->items = grow(t->items, &capacity, t->n_items + 1, sizeof *t->items, "items");
        t->items[t->n_items++] = (Item){field, n, line};
    }
    if (!t->kind || !t->name || !t->n_metrics) {
        die("%s: line 1: name=, kind= and metrics= are needed", path);
    }
    for (const char *c = t->name; *c; c++) {    // it becomes a column of tables and a file name
        if (!strchr("._-", *c) && !(*c >= '0' && *c <= '9') && !((*c | 32) >= 'a' && (*c | 32) <= 'z')) {
            die("%s: line 1: the name \"%s\" has other characters than A-Z a-z 0-9 . _ -", path, t->name);
        }
    }
    if (!strcmp(t->kind->name, "classify") && t->n_labels < 2) {
        die("%s: line 1: labels=A|B|... is needed for kind classify", path);
    }
    for (int64_t i = 0; i < t->n_items; i++) check_item(t, i);
    if (!t->n_items) die("%s: line 2: no items; a task has at least one", path);
    t->cut = allocate(t->n_items, sizeof *t->cut, "items");
    Text id = {0};
    text_printf(&id, "#task\t%s\t%016llx\t%s\t%lld\t%.9g\t", t->name, (unsigned long long)t->hash,
                t->kind->name, (long long)t->n_items, t->chance);
    for (int i = 0; i < t->n_metrics; i++) {
        text_printf(&id, "%s%s", i ? "," : "", t->metrics[i]->name);
    }
    t->identity = id.s;
    return t;
}

static void task_free(Task *t) {
    for (int64_t i = 0; i < t->n_items && t->items; i++) release(t->items[i].field);
    for (int64_t i = 0; i < t->n_requests; i++) release(t->requests[i].text.s);
    void *own[] = {t->path, t->text, t->identity, t->items, t->labels, t->stops, t->pool.id,
                   t->requests, t->cut, t->label_of};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++) release(own[i]);
    release(t);
}

// ------------------------------------------------------------------------------------------------
// 9. Sweeps: a tree of schedules, walked over batches of items, and what is kept of it
// ------------------------------------------------------------------------------------------------

typedef struct {             // one metric of one task under one schedule, ready to print or draw
    const char *task, *metric;
    const char *method;      // "baseline", a name from `interventions`, or "path"
    int start;               // S, or the layer of drop and swap; -1 for baseline and path
    int64_t arg;             // seed of random, R of loop; -1 otherwise
    const char *schedule;    // as --show prints it
    int layers;              // T
    double value, error;     // error: standard error; NaN when there is none
    int64_t n, cut;          // items; items that did not fit the context
    double chance;           // of the task's first metric; NaN unknown
    bool first;              // is this the task's first (summary) metric
    const char *bos;         // "bos", "no-bos", "-" (BERT)
    const char *family;      // "llama" or "bert"
} Row;

// A schedule among those of a run, with a key that names it in files: "skip:3", "random:3:7",
// "path:0 1 3".
enum { MAX_TASKS = 64 };
enum { MISSING, DONE, DONE_CUT };
typedef struct {
    Schedule schedule;
    char *key, *text;
    bool wanted;                    // by this run; others were found in the result file
    double *kept[MAX_TASKS];        // [n_items][width] of each task
    unsigned char *state[MAX_TASKS];    // [n_items]: MISSING, DONE, DONE_CUT
} Entry;

typedef struct {                    // results: in memory, and line by line in an append-only file
    Entry *entries;
    int64_t n_entries, capacity;
    Task *tasks[MAX_TASKS];
    int n_tasks;
    bool wanted_task[MAX_TASKS];
    char *identity;                 // the line that says what settings the results belong to
    char family[8], bos[8];
    int layers;
    const char *path;               // --out
    FILE *out;
} Store;

static char *schedule_key(const Schedule *s) {
    Text t = {0};
    text_printf(&t, "%s", s->method);
    if (s->start >= 0) text_printf(&t, ":%lld", (long long)s->start);
    if (s->argument >= 0 || !strcmp(s->method, "random")) {
        if (s->start >= 0 && s->argument != -1) text_printf(&t, ":%lld", (long long)s->argument);
    }
    if (!strcmp(s->method, "path")) {
        char *text = schedule_text(s);
        text_printf(&t, ":%s", text);
        release(text);
    }
    return t.s;
}

static const Intervention *intervention_named(const char *name, size_t n) {
    for (int i = 0; i < N_INTERVENTIONS; i++) {
        if (strlen(interventions[i].name) == n && !strncmp(interventions[i].name, name, n)) {
            return &interventions[i];
        }
    }
    return NULL;
}

// The schedule that a key names; `place` is for errors.
static Schedule key_schedule(const char *key, int T, const char *place) {
    if (!strcmp(key, "baseline")) return schedule_build(NULL, T, -1, -1);
    if (!strncmp(key, "path:", 5)) return schedule_parse(key + 5, T, place);
    const Intervention *v = intervention_named(key, strcspn(key, ":"));
    int64_t start = -1, argument = -1;
    char *copy = copy_string(key), *a = strchr(copy, ':'), *b = a ? strchr(a + 1, ':') : NULL;
    if (b) *b++ = 0;
    if (!v || !a || !parse_int(a + 1, 0, largest_start(v, T), &start) ||
        !v->argument_flag != !b || (b && !parse_int(b, v->lowest, v->highest, &argument))) {
        die("%s: \"%s\" names no schedule of a model with %d layers", place, key, T);
    }
    release(copy);
    return schedule_build(v, T, start, argument);
}

// Adds a schedule, or finds it by its key.
static Entry *store_schedule(Store *st, Schedule schedule, bool wanted) {
    char *key = schedule_key(&schedule);
    for (int64_t i = 0; i < st->n_entries; i++) {
        if (strcmp(st->entries[i].key, key)) continue;
        st->entries[i].wanted |= wanted;
        release(key);
        schedule_free(&schedule);
        return &st->entries[i];
    }
    st->entries = grow(st->entries, &st->capacity, st->n_entries + 1, sizeof *st->entries,
                       "schedules");
    Entry *e = &st->entries[st->n_entries++];
    *e = (Entry){.schedule = schedule, .key = key, .text = schedule_text(&schedule),
                 .wanted = wanted};
    return e;
}

// Makes room for the values of a task under a schedule.
static void entry_room(Entry *e, const Store *st, int task) {
    const Task *t = st->tasks[task];
    if (e->kept[task]) return;
    e->kept[task] = allocate(t->n_items * t->kind->width, sizeof(double), "results");
    e->state[task] = allocate(t->n_items, 1, "results");
}

static int store_task(Store *st, Task *t, bool wanted) {
    for (int i = 0; i < st->n_tasks; i++) {
        if (strcmp(st->tasks[i]->name, t->name)) continue;
        if (strcmp(st->tasks[i]->identity, t->identity)) {
            die("%s: task %s is not the one of the other results; keep them in files of their own",
                t->path, t->name);
        }
        st->wanted_task[i] |= wanted;
        return i;
    }
    if (st->n_tasks == MAX_TASKS) die("%s: over %d tasks in one run", t->path, MAX_TASKS);
    st->wanted_task[st->n_tasks] = wanted;
    st->tasks[st->n_tasks] = t;
    return st->n_tasks++;
}

// A task as a line of a result file knows it: #task name hash kind items chance metrics, and with
// --probe what its classifier was fitted on.
static Task *task_from_line(const char *line, const char *path, int64_t number) {
    Task *t = allocate(1, sizeof *t, "task");
    int n, n_metrics = 0;
    t->path = copy_string(path);
    t->identity = copy_string(line);
    t->text = copy_string(line);
    char **field = split(t->text, '\t', &n), **metric = NULL;
    for (int i = 0; i < N_KINDS && n >= 7; i++) {
        if (!strcmp(kinds[i].name, field[3])) t->kind = &kinds[i];
    }
    if (!t->kind || !parse_int(field[4], 1, INT64_MAX / 64, &t->n_items) ||
        !parse_double(field[5], &t->chance)) {
        die("%s: line %lld: not the description of a task", path, (long long)number);
    }
    t->name = field[1];
    metric = split(field[6], ',', &n_metrics);
    for (int i = 0; i < n_metrics && i < 8; i++) {
        t->metrics[i] = metric_find(t->kind->name, metric[i]);
        if (!t->metrics[i]) {
            die("%s: line %lld: \"%s\" is no metric", path, (long long)number, metric[i]);
        }
        t->n_metrics = i + 1;
    }
    release(metric);
    release(field);
    return t;
}

// One result: task, schedule, item, state, values ...
static void store_record(Store *st, char *line, const char *path, int64_t number) {
    char place[64];
    int n, task = 0;
    int64_t item, state;
    snprintf(place, sizeof place, "line %lld", (long long)number);
    char **field = split(line, '\t', &n);
    while (task < st->n_tasks && strcmp(st->tasks[task]->name, field[0])) task++;
    const Task *t = task < st->n_tasks ? st->tasks[task] : NULL;
    if (!t || n != 4 + t->kind->width || !parse_int(field[2], 0, t->n_items - 1, &item) ||
        !parse_int(field[3], DONE, DONE_CUT, &state)) {
        die("%s: %s: not a result of a task named above it; remove the line", path, place);
    }
    Entry *e = store_schedule(st, key_schedule(field[1], st->layers, path), false);
    entry_room(e, st, task);
    double *kept = e->kept[task] + item * t->kind->width;
    for (int i = 0; i < t->kind->width; i++) {
        double value;
        if (!parse_double(field[4 + i], &value)) {
            die("%s: %s: \"%s\" is not a number", path, place, field[4 + i]);
        }
        if (t->kind->output == CLASSIFIES && strcmp(t->kind->name, "regress") &&
            (value < 0 || value > 65535 || value != floor(value))) {
            die("%s: %s: \"%s\" is no label", path, place, field[4 + i]);
        }
        bool same = kept[i] == value || (isnan(kept[i]) && isnan(value));
        if (e->state[task][item] != MISSING && !same) {
            die("%s: %s: another result of item %lld of %s under %s than before; the files do not "
                "belong together", path, place, (long long)item, t->name, e->key);
        }
        kept[i] = value;
    }
    e->state[task][item] = (unsigned char)state;
    release(field);
}

// The first line of a result file: what the results belong to. A store without an identity takes
// that of the file.
static void store_identity(Store *st, const char *line, const char *path, int64_t number) {
    if (st->identity && strcmp(st->identity, line)) {
        die("%s: line %lld: these results belong to another model or other settings (%s; now %s); "
            "choose another file", path, (long long)number, line, st->identity);
    }
    if (st->identity) return;
    char *copy = copy_string(line);
    int n;
    int64_t layers;
    char **field = split(copy, '\t', &n);
    if (n < 6 || strcmp(field[1], "1") || strncmp(field[3], "family=", 7) ||
        strncmp(field[4], "layers=", 7) || !parse_int(field[4] + 7, 1, 16384, &layers) ||
        strncmp(field[5], "bos=", 4)) {
        die("%s: line %lld: not a result file of version 1", path, (long long)number);
    }
    st->identity = copy_string(line);
    st->layers = (int)layers;
    snprintf(st->family, sizeof st->family, "%s", field[3] + 7);
    snprintf(st->bos, sizeof st->bos, "%s", field[5] + 4);
    release(field);
    release(copy);
}

// Reads a result file into the store and returns the length of its whole lines: a line that a kill
// left unfinished is not counted.
static int64_t store_read(Store *st, const char *path) {
    int64_t bytes, number = 0;
    char *text = read_file(path, &bytes), *at = text, *stop;
    for (; (stop = memchr(at, '\n', (size_t)(text + bytes - at))) != NULL; at = stop + 1) {
        *stop = 0;
        number++;
        if (memchr(at, 0, (size_t)(stop - at))) {
            die("%s: line %lld: a NUL byte; the file is damaged", path, (long long)number);
        }
        if (!strncmp(at, "#painters-results\t", 18)) store_identity(st, at, path, number);
        else if (!st->identity) die("%s: line 1: not a result file of painters --out", path);
        else if (!strncmp(at, "#task\t", 6)) {
            Task *t = task_from_line(at, path, number);
            int known = st->n_tasks;
            if (store_task(st, t, false) < known) task_free(t);
        } else store_record(st, at, path, number);
    }
    int64_t whole = at - text;
    release(text);
    return whole;
}

// Opens --out: reads what is there, cuts off a line that a kill left unfinished, and adds the lines
// that say what follows.
static void store_open(Store *st, const char *path) {
    FILE *f = fopen(path, "ab+");
    if (!f) die("%s: cannot be written: %s; choose another place", path, strerror(errno));
    int known = st->n_tasks;
    char *own[MAX_TASKS];
    for (int i = 0; i < known; i++) own[i] = st->tasks[i]->identity;
    fseek(f, 0, SEEK_END);
    int64_t length = ftell(f), whole = length > 0 ? store_read(st, path) : 0;
#ifdef _WIN32
    if (whole < length && _chsize_s(_fileno(f), whole)) die("%s: cannot be cut: %s", path, strerror(errno));
#else
    if (whole < length && ftruncate(fileno(f), (off_t)whole)) {
        die("%s: cannot be cut: %s", path, strerror(errno));
    }
#endif
    st->path = path;
    st->out = f;
    fprintf(f, "%s\n", st->identity);
    for (int i = 0; i < known; i++) fprintf(f, "%s\n", own[i]);
    if (fflush(f)) die("%s: cannot be written: %s; free space", path, strerror(errno));
}

// The tree of a run's schedules: equal beginnings are one path from the root.
typedef struct {
    const int *layers;          // the step that leads here
    int64_t n;
    Place place;
    int parent, child, sibling; // first child, next sibling; -1: none
    int ends;                   // the first schedule that ends here, an index into Tree.entry; -1
    int heavy;                  // the child visited last: the one that saves most states below it
    int saves;
    bool active;
} Node;

typedef struct {
    Node *nodes;
    int64_t n_nodes, capacity, n_slots;     // n_slots: over all nodes
    int64_t *entry;             // [n]: which schedules of the store
    int *node, *next;           // [n]: where each ends, and the next one that ends there
    int n;
} Tree;

static void tree_build(Tree *t, const Session *s, const Store *st, const int64_t *entry, int n) {
    *t = (Tree){.n = n};
    t->entry = allocate(n, sizeof *t->entry, "schedules");
    t->node = allocate(n, sizeof *t->node, "schedules");
    t->next = allocate(n, sizeof *t->next, "schedules");
    t->nodes = grow(NULL, &t->capacity, 1, sizeof *t->nodes, "schedules");
    t->nodes[t->n_nodes++] = (Node){.parent = -1, .child = -1, .sibling = -1, .ends = -1};
    for (int i = 0; i < n; i++) {
        const Schedule *sc = &st->entries[entry[i]].schedule;
        int at = 0;
        for (int64_t step = 0; step < sc->n_steps; step++) {
            const int *layers = sc->layer + sc->first[step];
            int64_t count = sc->first[step + 1] - sc->first[step];
            int child = t->nodes[at].child;
            while (child >= 0 && (t->nodes[child].n != count ||
                   memcmp(t->nodes[child].layers, layers, (size_t)count * sizeof *layers))) {
                child = t->nodes[child].sibling;
            }
            if (child < 0) {
                child = (int)t->n_nodes;
                t->nodes = grow(t->nodes, &t->capacity, child + 1, sizeof *t->nodes, "schedules");
                Node *p = &t->nodes[at];
                Place place = {p->place.slot + (at ? step_slots(s, p->n) : 0), t->n_slots};
                t->nodes[t->n_nodes++] = (Node){layers, count, place, at, -1, p->child, -1, -1, 0,
                                                false};
                p->child = child;
                t->n_slots += step_slots(s, count);
            }
            at = child;
        }
        t->entry[i] = entry[i];
        t->node[i] = at;
        t->next[i] = t->nodes[at].ends;
        t->nodes[at].ends = i;
    }
    for (int64_t i = t->n_nodes - 1; i >= 0; i--) {     // children stand behind their parents
        int most = -1, second = -1;
        t->nodes[i].heavy = -1;
        for (int c = t->nodes[i].child; c >= 0; c = t->nodes[c].sibling) {
            if (t->nodes[c].saves > most) {
                second = most;
                most = t->nodes[c].saves;
                t->nodes[i].heavy = c;
            } else if (t->nodes[c].saves > second) {
                second = t->nodes[c].saves;
            }
        }
        t->nodes[i].saves = second + 1 > most ? second + 1 : most < 0 ? 0 : most;
    }
}

static void tree_free(Tree *t) {
    release(t->nodes);
    release(t->entry);
    release(t->node);
    release(t->next);
    *t = (Tree){0};
}

// A run of the evaluator over the items of one task.
typedef struct {
    Session *s;
    Store *store;
    Tree tree;
    Task *t;
    int task;                   // its index in the store
    bool bos;
    int64_t batch_tokens, first, last;      // the batch runs requests first .. last-1
    int64_t prefix;             // tokens that all requests begin with, computed once
    int64_t n_slots;            // of the longest schedule
    bool prefilling;            // the tree is walked for the prefix alone
    bool prefix_kept;           // its keys and values stay; otherwise it is a row of every batch
    int64_t separate_passes;    // layer passes that a run of its own per schedule would need
    int64_t answers, answers_due;
    double started;
    double *partial;            // [tree.n][width]: values of an item that is not yet complete
    FILE *log;
    float **features;           // --probe: pooled features are collected here, [tree.n][items][dim]
    double **weights;           // --probe: or classified by these
    int n_outputs;
} Evaluation;

static volatile sig_atomic_t interrupted;

static void on_interrupt(int signal_number) { interrupted = signal_number; }

// Stops where Ctrl-C or a termination signal asked for it; all that was finished is in --out.
static void stop_if_interrupted(const Evaluation *e) {
    if (!interrupted) return;
    if (e->store->out) {
        warn("\nstopped; %s keeps what is done, and the same command goes on from there",
             e->store->path);
    } else {
        warn("\nstopped; with --out FILE a run can go on where it was stopped");
    }
    if (e->log) fflush(e->log);
    exit(128 + (int)interrupted);
}

// Runs the steps from the root to a node on the rows of the batch.
static void run_to(Evaluation *e, int node) {
    if (node <= 0) return;
    const Node *at = &e->tree.nodes[node];
    if (at->parent > 0) run_to(e, at->parent);
    run_step(e->s, at->layers, at->n, at->place);
}

enum { LOGIT_ROWS = 128 };      // logits of so many rows are held at a time

// Log-probabilities of all scored tokens of the batch.
static void score_requests(Evaluation *e) {
    Session *s = e->s;
    int64_t vocab = s->model->vocab_size, n_rows = 0, *rows;
    int64_t *index = allocate(s->batch.n_rows, sizeof *index, "rows to score");
    rows = allocate(s->batch.n_rows, sizeof *rows, "rows to score");
    for (int pass = 0; pass < 2; pass++) {      // find the scored rows, then visit them in chunks
        int64_t chunks = pass ? (n_rows + LOGIT_ROWS - 1) / LOGIT_ROWS : 1;
        float *z = pass ? allocate(LOGIT_ROWS * vocab, sizeof *z, "logits") : NULL;
        for (int64_t c = 0; c < chunks; c++) {
            int64_t from = c * LOGIT_ROWS;
            int64_t n = n_rows - from < LOGIT_ROWS ? n_rows - from : LOGIT_ROWS;
            if (pass) logits(s, rows + from, n, z);
            #pragma omp parallel for schedule(dynamic) if (pass)
            for (int64_t i = e->first; i < e->last; i++) {
                Request *r = &e->t->requests[i];
                for (int64_t k = 0; k < r->n_targets; k++) {
                    int64_t j = r->row + k;
                    int64_t row = j < r->shared ? r->parent_row + j : r->own_row + j - r->shared;
                    if (!pass) {
                        r->loglik = 0;
                        r->greedy = true;
                        if (!index[row]) {
                            rows[n_rows++] = row;
                            index[row] = n_rows;
                        }
                        continue;
                    }
                    int64_t at = index[row] - 1 - from;
                    if (at < 0 || at >= n) continue;
                    int best, token = e->t->pool.id[r->target + k];
                    r->loglik += log_softmax_at(z + at * vocab, vocab, token, &best);
                    r->greedy &= best == token;
                }
            }
        }
        release(z);
    }
    release(index);
    release(rows);
}

// What the classifier (or the probe of schedule i) makes of the batch's [CLS] rows.
static void classify_requests(Evaluation *e, int i) {
    const Model *m = e->s->model;
    int64_t n = e->last - e->first, d = m->dim;
    int64_t *rows = allocate(n, sizeof *rows, "rows to classify");
    float *x = allocate(n * d, sizeof *x, "pooled features");
    for (int64_t j = 0; j < n; j++) rows[j] = e->t->requests[e->first + j].own_row;
    pooled(e->s, rows, n, x);
    const Head *h = e->t->classifier;
    float *z = h ? allocate(n * h->n_labels, sizeof *z, "class scores") : NULL;
    if (h) matmul(z, x, &h->weight, h->bias, n);
    for (int64_t j = 0; j < n; j++) {
        Request *r = &e->t->requests[e->first + j];
        if (e->features) {
            memcpy(e->features[i] + r->item * d, x + j * d, (size_t)d * sizeof *x);
        } else if (e->weights) {
            r->prediction = probe_predict(e->weights[i], x + j * d, d, e->n_outputs);
        } else if (h->regression) {
            r->prediction = (double)z[j];
        } else {
            int best;
            log_softmax_at(z + j * h->n_labels, h->n_labels, 0, &best);
            r->prediction = e->t->label_of[best];
        }
        r->text.n = 0;
        for (int k = 0; z && k < h->n_labels; k++) {
            text_printf(&r->text, "%s%.6f", k ? " " : "", (double)z[j * h->n_labels + k]);
        }
    }
    release(rows);
    release(x);
    release(z);
}

// A text as a field of --log: escaped, and bytes that are no UTF-8 as U+FFFD.
static void write_escaped(FILE *f, const Text *text) {
    for (int64_t i = 0, n; i < text->n; i += n) {
        uint32_t code;
        char out[4];
        n = utf8_read(text->s + i, text->n - i, &code);
        const char *plain = "\n\t\r\\", *at = code && code < 128 ? strchr(plain, (int)code) : NULL;
        if (at) fprintf(f, "\\%c", "ntr\\"[at - plain]);
        else fwrite(out, 1, (size_t)utf8_write(out, code), f);
    }
}

// Keeps what the answers of an item come to under schedule i of the tree: in memory, in --out and
// in --log.
static void keep_item(Evaluation *e, int i, const Request *r, int64_t n, const double *value) {
    Store *st = e->store;
    Entry *entry = &st->entries[e->tree.entry[i]];
    const Task *t = e->t;
    int width = t->kind->width;
    e->answers++;
    if (e->features || entry->state[e->task][r->item]) return;
    memcpy(entry->kept[e->task] + r->item * width, value, (size_t)width * sizeof *value);
    entry->state[e->task][r->item] = t->cut[r->item] ? DONE_CUT : DONE;
    if (st->out) {
        fprintf(st->out, "%s\t%s\t%lld\t%d", t->name, entry->key, (long long)r->item,
                entry->state[e->task][r->item]);
        for (int k = 0; k < width; k++) fprintf(st->out, "\t%.17g", value[k]);
        fputc('\n', st->out);
    }
    if (!e->log) return;
    fprintf(e->log, "%s\t%s\t%lld\t%d", t->name, entry->key, (long long)r->item, t->cut[r->item]);
    for (int k = 0; k < width; k++) fprintf(e->log, "\t%.9g", value[k]);
    fputc('\t', e->log);
    for (int64_t k = 0; k < n && t->kind->output == SCORES && !t->kind->adds; k++) {
        fprintf(e->log, "%s%.12g", k ? " " : "", r[k].loglik);
    }
    if (t->kind->output != SCORES) write_escaped(e->log, &r->text);
    fputc('\n', e->log);
}

// Turns the answers to requests from .. end-1 into kept values, item by item.
static void keep_range(Evaluation *e, int i, int64_t from, int64_t end) {
    const Task *t = e->t;
    int width = t->kind->width;
    for (int64_t to; from < end; from = to) {
        const Request *r = &t->requests[from];
        for (to = from + 1; to < end && t->requests[to].item == r->item; to++) {}
        double none[8] = {0}, *value = t->kind->adds ? e->partial + i * width : none;
        t->kind->value(t, r, to - from, value);
        if (t->kind->adds && to < t->n_requests && t->requests[to].item == r->item) continue;
        keep_item(e, i, r, to - from, value);
        memset(value, 0, (size_t)width * sizeof *value);
    }
    if (e->store->out && (fflush(e->store->out) || ferror(e->store->out))) {
        die("%s: cannot be written: %s; free space, then run the same command again",
            e->store->path, strerror(errno));
    }
    progress(t->name, e->answers, e->answers_due, e->started);
    stop_if_interrupted(e);
}

typedef struct {                // a text that is being generated
    int64_t request, made, row;
    int sequence, previous;
    bool begun;                 // a token other than BOS has come
} Voice;

// Adds a token to a voice's text; true when the text has come to its end.
static bool voice_takes(const Evaluation *e, Voice *v, int token) {
    const Task *t = e->t;
    Text *text = &t->requests[v->request].text;
    char *cut = NULL;
    v->made++;
    if (token == e->s->model->eos) return true;
    decode(e->s->model->tokenizer, v->begun ? token : -1, token, text);  // -1: a text begins
    v->begun |= token != e->s->model->bos;
    v->previous = token;
    for (int i = 0; i < t->n_stops; i++) {      // cut at the first of the stop texts
        char *stop = strstr(text->s, t->stops[i]);
        if (stop && (!cut || stop < cut)) cut = stop;
    }
    if (cut) {
        *cut = 0;
        text->n = cut - text->s;
    }
    return cut || v->made >= t->max_tokens;
}

// Takes the next token of every voice from the pass that was just run. Those that end are kept and
// leave; their sequences are free at once. Returns how many go on.
static int64_t take_tokens(Evaluation *e, int i, Voice *voices, int64_t n, int *free_list,
                           int64_t *n_free) {
    int64_t vocab = e->s->model->vocab_size, left = 0;
    float *z = allocate((n < LOGIT_ROWS ? n : LOGIT_ROWS) * vocab, sizeof *z, "logits");
    int64_t *rows = allocate(n, sizeof *rows, "rows to score");
    for (int64_t k = 0; k < n; k++) rows[k] = voices[k].row;
    for (int64_t from = 0; from < n; from += LOGIT_ROWS) {
        int64_t count = n - from < LOGIT_ROWS ? n - from : LOGIT_ROWS;
        logits(e->s, rows + from, count, z);
        for (int64_t k = 0; k < count; k++) {
            Voice v = voices[from + k];
            int best;
            log_softmax_at(z + k * vocab, vocab, 0, &best);
            if (!voice_takes(e, &v, best)) {
                voices[left++] = v;
                continue;
            }
            free_list[(*n_free)++] = v.sequence;
            keep_range(e, i, v.request, v.request + 1);
        }
    }
    release(z);
    release(rows);
    return left;
}

// Rows that a request needs in the cache behind the common prefix.
static int64_t rows_needed(const Evaluation *e, const Request *r) {
    bool more = e->t->kind->output == GENERATES;
    return r->n - e->prefix + (more ? e->t->max_tokens : 0);
}

// Memory for the keys and values of texts being generated; beyond it they wait.
enum { CACHE_MEGABYTES = 2048 };

static bool cache_full(const Evaluation *e, int64_t rows) {
    const Model *m = e->s->model;
    double row = 4.0 * m->n_kv_heads * (double)(m->head_dim + value_stride(m));
    return (double)rows * row * (double)e->n_slots > CACHE_MEGABYTES * 1e6;
}

// Puts the tokens of a request from position `from` up to `to` into the batch.
static void add_rows(Evaluation *e, const Request *r, int sequence, int64_t from, int64_t to) {
    const Model *m = e->s->model;
    for (int64_t j = from; j < to; j++) {
        int token = j == r->mask_at ? m->mask : e->t->pool.id[r->first + j];
        batch_add(e->s, sequence, token, m->arch == BERT && j >= r->segment_from);
    }
}

// Greedy generation under schedule i for requests from .. to-1. Either the batch holds their
// prompts and s->x the states behind the last step (admit = false: the tree was walked), or they
// are let in here as room comes free, prompts and next tokens running in the same passes.
static void generate(Evaluation *e, int i, int64_t from, int64_t to, bool admit) {
    Session *s = e->s;
    int64_t n = 0, n_free = 0, rows = 0;
    Voice *voices = allocate(to - from, sizeof *voices, "texts");
    int *free_list = allocate(to - from, sizeof *free_list, "texts");
    for (int64_t r = from; r < to; r++) {
        e->t->requests[r].text.n = 0;
        text_add(&e->t->requests[r].text, "", 0);
    }
    for (int64_t r = from; r < to && !admit; r++) {
        const Request *q = &e->t->requests[r];
        voices[n++] = (Voice){r, 0, q->own_row + q->row - q->shared, q->sequence, -1,
                              false};
    }
    for (;;) {
        if (n) n = take_tokens(e, i, voices, n, free_list, &n_free);
        batch_commit(s);
        rows = 0;
        for (int64_t k = 0; k < n; k++) {
            batch_add(s, voices[k].sequence, voices[k].previous, 0);
            voices[k].row = s->batch.n_rows - 1;
            rows += rows_needed(e, &e->t->requests[voices[k].request]);
        }
        while (admit && from < to) {
            const Request *r = &e->t->requests[from];
            rows += rows_needed(e, r);
            if (n && (s->batch.n_rows + r->n - e->prefix > e->batch_tokens || cache_full(e, rows))) {
                break;
            }
            int parent = e->prefix ? 0 : -1, sequence;
            if (n_free) {
                sequence = free_list[--n_free];
                sequence_open(s, sequence, parent, rows_needed(e, r), e->n_slots);
            } else {
                sequence = sequence_new(s, parent, rows_needed(e, r), e->n_slots);
            }
            add_rows(e, r, sequence, e->prefix, r->n);
            voices[n++] = (Voice){from++, 0, s->batch.n_rows - 1, sequence, -1, false};
        }
        if (!n) break;
        stop_if_interrupted(e);
        embed(s);
        run_to(e, e->tree.node[i]);
    }
    release(voices);
    release(free_list);
}

// The same at a leaf of a tree walk: what the batch held is put back for the leaves to come.
static void generate_at_leaf(Evaluation *e, int i) {
    Session *s = e->s;
    Batch kept = s->batch;
    int64_t n = kept.n_runs, from = e->first, to = e->last;
    Run *runs = allocate(n, sizeof *runs, "batch");
    memcpy(runs, kept.runs, (size_t)n * sizeof *runs);
    // take_tokens reads s->x alone, so the batch may go before it: its rows are committed first.
    for (int64_t k = 0; k < n; k++) {
        Sequence *q = &s->sequences[runs[k].sequence];
        q->length += q->pending;
        q->pending = 0;
    }
    s->batch = (Batch){0};
    generate(e, i, from, to, false);
    batch_free(&s->batch);
    s->batch = kept;
    for (int64_t k = 0; k < n; k++) {
        Sequence *q = &s->sequences[runs[k].sequence];
        q->length = 0;
        q->pending = runs[k].n;
    }
    release(runs);
}

// The tree has reached the end of schedule i: s->x is what that schedule makes of the batch.
static void leaf(Evaluation *e, int i) {
    int64_t passes = e->s->layer_passes;
    e->separate_passes += e->store->entries[e->tree.entry[i]].schedule.n_slots;
    if (e->prefilling) return;
    if (e->t->kind->output == GENERATES) {
        generate_at_leaf(e, i);
        e->separate_passes += e->s->layer_passes - passes;
        return;
    }
    if (e->t->kind->output == SCORES) score_requests(e);
    else classify_requests(e, i);
    keep_range(e, i, e->first, e->last);
}

static bool schedule_active(const Evaluation *e, int i) {
    const Entry *entry = &e->store->entries[e->tree.entry[i]];
    if (e->prefilling || e->features) return true;
    for (int64_t r = e->first; r < e->last; r++) {
        if (!entry->state[e->task][e->t->requests[r].item]) return true;
    }
    return false;
}

// Walks the tree depth first from a node whose output is s->x. At a fork the rows are saved, and
// the child that will itself need most saves comes last, in this same loop: so few states are ever
// kept, and a schedule of a million steps is no deep recursion.
static void walk(Evaluation *e, int at) {
    Session *s = e->s;
    size_t bytes = (size_t)(s->batch.n_rows * s->model->dim) * sizeof *s->x;
    for (;;) {
        const Node *node = &e->tree.nodes[at];
        // Generation works in s->x, which children and other schedules that end here still need.
        bool spoils = e->t->kind->output == GENERATES && node->ends >= 0 && !e->prefilling;
        int left = 0, last = -1;
        stop_if_interrupted(e);
        for (int c = node->child; c >= 0; c = e->tree.nodes[c].sibling) {
            if (!e->tree.nodes[c].active) continue;
            left++;
            if (last < 0 || c == node->heavy) last = c;
        }
        float *saved = NULL;
        if (left > 1 || (spoils && (left || e->tree.next[node->ends] >= 0))) {
            saved = allocate(s->batch.n_rows * s->model->dim, sizeof *saved, "states at a fork");
            memcpy(saved, s->x, bytes);
        }
        for (int i = node->ends; i >= 0; i = e->tree.next[i]) {
            if (!schedule_active(e, i)) continue;
            leaf(e, i);
            if (saved) memcpy(s->x, saved, bytes);
        }
        for (int c = node->child; c >= 0; c = e->tree.nodes[c].sibling) {
            if (!e->tree.nodes[c].active || c == last) continue;
            run_step(s, e->tree.nodes[c].layers, e->tree.nodes[c].n, e->tree.nodes[c].place);
            walk(e, c);
            memcpy(s->x, saved, bytes);
        }
        release(saved);
        if (last < 0) return;
        run_step(s, e->tree.nodes[last].layers, e->tree.nodes[last].n, e->tree.nodes[last].place);
        at = last;
    }
}

// Runs the rows of the batch through every schedule that is not done with them.
static void walk_batch(Evaluation *e) {
    for (int64_t i = 0; i < e->tree.n_nodes; i++) e->tree.nodes[i].active = false;
    bool any = false;
    for (int i = 0; i < e->tree.n; i++) {
        if (!schedule_active(e, i)) continue;
        any = true;
        for (int at = e->tree.node[i]; at >= 0 && !e->tree.nodes[at].active;) {
            e->tree.nodes[at].active = true;
            at = e->tree.nodes[at].parent;
        }
    }
    if (!any) return;
    embed(e->s);
    walk(e, 0);
}

static int64_t common_beginning(const Task *t, const Request *a, const Request *b, int64_t most) {
    int64_t n = 0;
    while (n < most && n < b->n && t->pool.id[a->first + n] == t->pool.id[b->first + n]) n++;
    return n;
}

// Few-shot text that all requests begin with is computed once and stays, as the parent of all
// others, unless its keys and values under all schedules are too many: then every batch has it.
static void find_prefix(Evaluation *e) {
    Session *s = e->s;
    const Task *t = e->t;
    const Request *r = t->requests;
    e->prefix = 0;
    e->prefix_kept = false;
    session_reset(s, 0);
    if (s->model->arch == BERT || s->kv_mean || t->kind->adds || t->n_requests < 2) return;
    int64_t n = r[0].n, row = s->model->n_kv_heads * (s->model->head_dim + value_stride(s->model));
    for (int64_t i = 0; i < t->n_requests; i++) {
        n = common_beginning(t, r, &r[i], n < r[i].row ? n : r[i].row);
    }
    if (n < 16 || r[0].item == r[t->n_requests - 1].item) return;
    e->prefix = n;
    double bytes = 4.0 * (double)row * (double)n * (double)e->tree.n_slots;
    e->prefix_kept = e->tree.n == 1 || bytes < CACHE_MEGABYTES * 1e6;
    if (!e->prefix_kept) return;
    int q = sequence_new(s, -1, n, e->tree.n_slots);
    s->sequences[q].by_node = true;
    add_rows(e, r, q, 0, n);
    e->prefilling = true;
    walk_batch(e);
    e->prefilling = false;
    batch_commit(s);
}

// Fills the batch with requests from `from` on, whole items at a time, until it has its tokens.
// What the requests of an item have in common is a sequence of its own, with them as its children.
static void open_batch(Evaluation *e, int64_t from) {
    Session *s = e->s;
    Task *t = e->t;
    Request *r = t->requests;
    int64_t slots = t->kind->output == GENERATES ? e->n_slots : 1, to = from, cached = 0;
    int prefix = e->prefix_kept ? 0 : -1;
    session_reset(s, e->prefix_kept);
    if (e->prefix && !e->prefix_kept) {
        prefix = sequence_new(s, -1, e->prefix, slots);
        add_rows(e, &r[from], prefix, 0, e->prefix);
    }
    while (to < t->n_requests) {
        int64_t end = to + 1, shared = r[to].n, rows = 0;
        while (end < t->n_requests && !t->kind->adds && r[end].item == r[to].item) end++;
        for (int64_t i = to; i < end; i++) shared = common_beginning(t, &r[to], &r[i], shared);
        if (end == to + 1) shared = e->prefix;
        for (int64_t i = to; i < end; i++) {
            rows += r[i].n - shared;
            cached += rows_needed(e, &r[i]);
        }
        if (to > from && (s->batch.n_rows + shared - e->prefix + rows > e->batch_tokens ||
                          (slots > 1 && cache_full(e, cached)))) break;
        int parent = prefix;
        int64_t parent_row = s->batch.n_rows - e->prefix;
        if (shared > e->prefix) {
            parent = sequence_new(s, prefix, shared - e->prefix, slots);
            add_rows(e, &r[to], parent, e->prefix, shared);
        }
        for (; to < end; to++) {
            r[to].shared = shared;
            r[to].parent_row = parent_row;
            r[to].own_row = s->batch.n_rows;
            if (r[to].n == shared) continue;
            int64_t capacity = slots > 1 ? rows_needed(e, &r[to]) : r[to].n - shared;
            r[to].sequence = sequence_new(s, parent, capacity, slots);
            add_rows(e, &r[to], r[to].sequence, shared, r[to].n);
        }
    }
    e->first = from;
    e->last = to;
}

// Makes the requests of the items that this run is to answer and that are not answered yet.
static void ask_items(Evaluation *e, int64_t limit, int64_t shard, int64_t n_shards) {
    Task *t = e->t;
    t->n_requests = t->pool.n = 0;
    e->answers_due = 0;
    for (int64_t item = 0; item < t->n_items; item++) {
        int due = 0;
        if ((limit >= 0 && item >= limit) || item % n_shards != shard - 1) continue;
        for (int i = 0; i < e->tree.n; i++) {
            due += e->features || !e->store->entries[e->tree.entry[i]].state[e->task][item];
        }
        if (!due) continue;
        t->kind->ask(t, e->s->model, e->bos, item);
        e->answers_due += due;
    }
}

// Answers all requests of the task under all schedules of the tree.
static void run_requests(Evaluation *e) {
    e->n_slots = 1;
    for (int64_t i = 1; i < e->tree.n_nodes; i++) {
        int64_t end = e->tree.nodes[i].place.slot + step_slots(e->s, e->tree.nodes[i].n);
        if (end > e->n_slots) e->n_slots = end;
    }
    e->answers = 0;
    e->started = seconds();
    e->partial = allocate((int64_t)e->tree.n * e->t->kind->width, sizeof(double), "results");
    find_prefix(e);
    if (e->t->kind->output == GENERATES && e->tree.n == 1) {
        int64_t passes = e->s->layer_passes;
        generate(e, 0, 0, e->t->n_requests, true);
        e->separate_passes += e->s->layer_passes - passes;
    } else {
        for (int64_t from = 0; from < e->t->n_requests; from = e->last) {
            open_batch(e, from);
            walk_batch(e);
        }
    }
    session_reset(e->s, 0);
    release(e->partial);
    e->partial = NULL;
}

// ------------------------------------------------------------------------------------------------
// 10. Reports: result rows -> table, summary, chart in the terminal, figures as SVG
// ------------------------------------------------------------------------------------------------

// All rows of a report are of one model and one BOS setting. They are sorted by the keys below, so
// that a panel (one metric of one task), a series (one line of a figure) and a point are spans of
// neighbours. The summary becomes rows of a panel of its own: what draws a task also draws it.
#define PANEL "t1m"             // task, first metric or not, metric
#define SERIES "MR"             // method, R
#define POINT SERIES "Sp"       // start, path
#define SCHEDULE POINT "k"      // seed

static const char MEAN[] = "mean", MEDIAN[] = "median";    // metrics of the summary, made here

static const Intervention *row_method(const Row *r) {
    return intervention_named(r->method, strlen(r->method));
}

// The order of tables and legends: the baseline, the methods as in `interventions`, then paths.
static int method_rank(const Row *r) {
    const Intervention *v = row_method(r);
    return v ? 1 + (int)(v - interventions) : strcmp(r->method, "baseline") ? 1000 : 0;
}

// Whether a row's second number is that of this flag.
static bool takes(const Row *r, const char *flag) {
    const Intervention *v = row_method(r);
    return v && v->argument_flag && !strcmp(v->argument_flag, flag);
}

static int compare_rows(const Row *a, const Row *b, const char *keys) {
    int c = 0;
    for (; *keys && !c; keys++) {
        switch (*keys) {
        case 't': c = strcmp(a->task, b->task); break;
        case '1': c = b->first - a->first; break;
        case 'm': c = strcmp(a->metric, b->metric); break;
        case 'M': c = method_rank(a) - method_rank(b); break;
        case 'R': c = takes(a, "seed") ? 0 : (a->arg > b->arg) - (a->arg < b->arg); break;
        case 'S': c = a->start - b->start; break;
        case 'p': c = a->start < 0 ? strcmp(a->schedule, b->schedule) : 0; break;
        case 'k': c = (a->arg > b->arg) - (a->arg < b->arg); break;
        case 'v': c = (a->value > b->value) - (a->value < b->value); break;
        }
    }
    return c;
}

static const char *sort_keys;   // qsort has no way to hand it on

static int compare_by_keys(const void *a, const void *b) {
    return compare_rows(a, b, sort_keys);
}

static void sort_rows(Row *rows, int64_t n, const char *keys) {
    sort_keys = keys;
    qsort(rows, (size_t)n, sizeof *rows, compare_by_keys);
}

// How many of the first rows have equal keys.
static int64_t span(const Row *rows, int64_t n, const char *keys) {
    int64_t k = 0;
    while (k < n && !compare_rows(rows, rows + k, keys)) k++;
    return k;
}

// Sorts rows and makes one of those with equal keys: their mean or median, the standard deviation
// of several as error, their number as n. Returns how many rows are left.
static int64_t merge_rows(Row *rows, int64_t n, const char *keys, bool median) {
    int64_t kept = 0;
    sort_rows(rows, n, keys);
    for (int64_t i = 0, k; i < n; i += k) {
        Row r = rows[i];
        double sum = 0, chance = 0, squares = 0;
        k = span(rows + i, n - i, keys);
        for (int64_t j = i; j < i + k; j++) {
            sum += rows[j].value;
            chance += rows[j].chance;
        }
        r.value = sum / (double)k;
        r.chance = chance / (double)k;
        r.n = k;
        for (int64_t j = i; j < i + k; j++) squares += pow(rows[j].value - r.value, 2);
        if (k > 1) r.error = sqrt(squares / (double)(k - 1));
        if (median && !isnan(sum)) {
            sort_rows(rows + i, k, "v");
            r.value = (rows[i + (k - 1) / 2].value + rows[i + k / 2].value) / 2;
        }
        rows[kept++] = r;
    }
    return kept;
}

static bool is_llama(const Row *r) {
    return !strcmp(r->family, "llama");
}

static bool is_summary(const Row *r) {
    return r->metric == MEAN || r->metric == MEDIAN;
}

static bool lower_is_better(const Row *r) {
    return strstr(r->metric, "perplexity") != NULL;
}

// The summary: the median or mean of the tasks' scores, for schedules that have them all. A score
// is, for Llama, (score - chance) / (full - chance) of the first metric, if the baseline is above
// chance; for BERT, the mean of the task's metrics. Perplexities do not count. rows: n sorted rows.
// Returns how many rows it made, at most n; their `cut` is the number of tasks.
static int64_t make_summary(Row *out, const Row *rows, int64_t n) {
    int64_t n_out = 0, n_tasks = 0, kept = 0;
    for (int64_t i = 0, k; i < n; i += k) {
        const Row *task = rows + i;
        double range = is_llama(task) ? task->value - task->chance : 1;
        k = span(task, n - i, "t");
        if (!task->first || lower_is_better(task)) continue;
        if (is_llama(task) && (method_rank(task) || !(range > 0))) continue;
        n_tasks++;
        for (const Row *r = task; r < task + k; r++) {
            if (lower_is_better(r) || (is_llama(r) && !r->first)) continue;
            out[n_out] = *r;
            if (is_llama(r)) out[n_out].value = (r->value - r->chance) / range;
            n_out++;
        }
    }
    n_out = merge_rows(out, n_out, "t" SCHEDULE, false);
    for (Row *r = out; r < out + n_out; r++) {
        r->task = "summary";
        r->metric = is_llama(r) ? MEDIAN : MEAN;
        r->first = true;
        if (is_llama(r)) r->chance = 0;
    }
    n_out = merge_rows(out, n_out, SCHEDULE, n && is_llama(rows));
    for (const Row *r = out; r < out + n_out; r++) {
        if (r->n < n_tasks) continue;
        out[kept] = *r;
        out[kept].error = NAN;                  // the deviation over tasks is no error
        out[kept++].cut = n_tasks;
    }
    return kept;
}

// A sorted copy of the rows, with the summary behind them.
static Row *sorted_rows(const Row *rows, int64_t n, int64_t *n_summary) {
    Row *all = allocate(2 * n + 1, sizeof *all, "result rows");
    if (n) memcpy(all, rows, (size_t)n * sizeof *all);
    sort_rows(all, n, PANEL SCHEDULE);
    *n_summary = make_summary(all + n, all, n);
    return all;
}

// ------------------------------------------------------------------------------------------------
// Tables and charts
// ------------------------------------------------------------------------------------------------

// Prints lines of tab-separated cells as columns two spaces apart, the first `left` of them flush
// left, the last one as it is. All lines have as many cells as the first.
static void print_columns(FILE *f, const char *text, int left) {
    int width[MAX_TASKS + 16] = {0};
    for (int pass = 0; pass < 2; pass++) {
        int column = 0;
        for (const char *p = text; *p; p++) {
            int bytes = (int)strcspn(p, "\t\n"), wide = 0;
            for (int i = 0; i < bytes; i++) wide += (p[i] & 0xC0) != 0x80;
            bool last = p[bytes] == '\n';
            int pad = last ? 0 : width[column] - wide;
            if (pass) {
                fprintf(f, "%*s%.*s", column < left ? 0 : pad, "", bytes, p);
                fprintf(f, "%*s%s", column < left ? pad : 0, "", last ? "\n" : "  ");
            } else if (wide > width[column]) width[column] = wide;
            column = last ? 0 : column + 1;
            p += bytes;
        }
    }
}

// A cell with a number; NaN is "-".
static void add_number(Text *t, const char *format, double v) {
    char number[40] = "-";
    if (!isnan(v)) snprintf(number, sizeof number, format, v);
    text_printf(t, "\t%s", number);
}

static void add_model(Text *t, const Row *r) {
    text_printf(t, "%s, %d layers%s%s", is_llama(r) ? "Llama" : "BERT", r->layers,
                strcmp(r->bos, "-") ? ", " : "", strcmp(r->bos, "-") ? r->bos : "");
}

static const char *metric_label(const Row *r) {
    return r->metric == MEDIAN ? "median of (score − chance) / (full − chance)"
         : r->metric == MEAN ? "mean of the scores" : r->metric;
}

// Prints rows in aligned columns, under a line that begins with "#". Cells hold no blanks, so that
// awk and sort find them; only paths, at the end, do.
static void print_rows(FILE *f, const Row *rows, int64_t n) {
    if (!n) return;
    bool summary = is_summary(rows);
    Text t = {0};
    add_model(&t, rows);
    if (summary) text_printf(&t, ": %s; tasks: %lld", metric_label(rows), (long long)rows->cut);
    fprintf(f, "# %s\n", t.s);
    t.n = 0;
    text_printf(&t, "task\tmetric\tmethod\tS/k\tseed/R\tvalue\terror\t%s\tcut\tBOS\tpath\n",
                summary ? "seeds" : "items");
    for (const Row *r = rows; r < rows + n; r++) {
        bool argument = takes(r, "times") || (takes(r, "seed") && !summary);
        text_printf(&t, "%s\t%s\t%s", r->task, r->metric, r->method);
        add_number(&t, "%.0f", r->start < 0 ? NAN : r->start);
        add_number(&t, "%.0f", argument ? (double)r->arg : NAN);
        add_number(&t, fabs(r->value) < 1e4 ? "%.4f" : "%.5g", r->value);
        add_number(&t, fabs(r->error) < 1e4 ? "%.4f" : "%.5g", r->error);
        add_number(&t, "%.0f", (double)r->n);
        add_number(&t, "%.0f", summary ? NAN : (double)r->cut);
        text_printf(&t, "\t%s\t%s\n", r->bos, strcmp(r->method, "path") ? "-" : r->schedule);
    }
    print_columns(f, t.s, 3);
    fputc('\n', f);
    release(t.s);
}

// Every row.
static void report_table(FILE *f, const Row *rows, int64_t n) {
    int64_t n_summary;
    Row *all = sorted_rows(rows, n, &n_summary);
    print_rows(f, all, n);
    release(all);
}

// The summary of every schedule: of random the mean over seeds, with their standard deviation.
static void report_summary(FILE *f, const Row *rows, int64_t n) {
    int64_t n_summary;
    Row *all = sorted_rows(rows, n, &n_summary);
    print_rows(f, all + n, merge_rows(all + n, n_summary, POINT, false));
    if (n && !n_summary) fprintf(f, "# No summary: no task with a baseline above chance.\n\n");
    release(all);
}

// A range of values laid on a range of places: pixels, levels of a bar, parts of a colour ramp.
typedef struct {
    double lo, hi, from, to;
    bool log;
} Scale;

static void include(Scale *s, double v) {
    if (!isfinite(v)) return;
    s->lo = fmin(s->lo, v);
    s->hi = fmax(s->hi, v);
}

// The place of a value; values beyond the range stay on its border.
static double place(const Scale *s, double v) {
    double part = (v - s->lo) / (s->hi - s->lo);
    if (s->log) part = v > 0 ? log(v / s->lo) / log(s->hi / s->lo) : 0;
    return s->from + (s->to - s->from) * fmin(fmax(part, 0), 1);
}

// A panel's points on one axis, sorted by series, with the ranges of places and values.
typedef struct {
    Row *point;                 // NULL: there is nothing to draw
    int64_t n;
    double line[2];             // baseline and chance; NaN: unknown
    Scale x, y;                 // y: logarithmic for perplexities over more than two decades
} Plot;

// The points of starts S (range MIDDLE) or of layers k (ONE). Of looped parallel all R or, with
// `one_loop`, R = 3, as the paper has it, and if that was not run the largest.
static Plot plot_panel(const Row *panel, int64_t n, int range, bool one_loop) {
    Row *p = allocate(n + 1, sizeof *p, "points of a figure");
    Scale none = {INFINITY, -INFINITY, 0, 1, false};
    Plot plot = {.point = p, .x = none, .y = none};
    int64_t turns = 0;
    plot.line[0] = method_rank(panel) ? NAN : panel->value;
    plot.line[1] = panel->first ? panel->chance : NAN;
    for (const Row *r = panel; r < panel + n; r++) {
        if (takes(r, "times") && turns != 3 && (r->arg > turns || r->arg == 3)) turns = r->arg;
    }
    for (const Row *r = panel; r < panel + n; r++) {
        const Intervention *v = row_method(r);
        bool other_loop = one_loop && takes(r, "times") && r->arg != turns;
        if (v && (v->range == MIDDLE) == (range == MIDDLE) && !other_loop) p[plot.n++] = *r;
    }
    plot.n = merge_rows(p, plot.n, POINT, false);
    for (int64_t i = 0; i < plot.n; i++) {
        include(&plot.x, p[i].start);
        include(&plot.y, p[i].value);
    }
    if (plot.y.hi < plot.y.lo) {
        release(p);
        plot.point = NULL;
        return plot;
    }
    include(&plot.y, plot.line[0]);
    include(&plot.y, plot.line[1]);
    plot.y.log = lower_is_better(panel) && plot.y.lo > 0 && plot.y.hi / plot.y.lo > 100;
    for (int64_t i = 0; i < plot.n && !plot.y.log; i++) {
        include(&plot.y, p[i].value - p[i].error);
        include(&plot.y, p[i].value + p[i].error);
    }
    double pad = plot.y.hi > plot.y.lo ? 0.04 * (plot.y.hi - plot.y.lo) : 0.05;
    double factor = pow(plot.y.hi / plot.y.lo, 0.04);
    plot.y.lo = plot.y.log ? plot.y.lo / factor : plot.y.lo - pad;
    plot.y.hi = plot.y.log ? plot.y.hi * factor : plot.y.hi + pad;
    return plot;
}

// What a line is called: "skip", "random, seeds: 10", "loop, R = 3".
static void series_name(char *out, size_t size, const Row *p, int64_t n) {
    int64_t seeds = 0;
    for (int64_t i = 0; i < n; i++) seeds = p[i].n > seeds ? p[i].n : seeds;
    bool loop = takes(p, "times"), random = takes(p, "seed");
    snprintf(out, size, loop ? "%s, R = %lld" : random ? "%s, seeds: %lld" : "%s", p->method,
             (long long)(loop ? p->arg : seeds));
}

// A chart of a panel: a line for each series, for each place a bar in eighths of the line.
static void chart_panel(FILE *f, const Row *panel, int64_t n, int range) {
    static const char *const bar[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
    Plot plot = plot_panel(panel, n, range, false);
    if (!plot.point) return;
    Scale level = {plot.y.lo, plot.y.hi, 1, 8, plot.y.log};
    int first = (int)plot.x.lo, last = (int)plot.x.hi, step = (last - first) / 36 + 1;
    fprintf(f, "%s: %s\n  %s = %d to %d, height %.4g to %.4g%s, baseline %.4g, chance %.4g\n",
            panel->task, metric_label(panel), range == MIDDLE ? "start S" : "layer k", first, last,
            plot.y.lo, plot.y.hi, plot.y.log ? " (log)" : "", plot.line[0], plot.line[1]);
    for (int64_t i = 0, k; i < plot.n; i += k) {
        const Row *p = plot.point + i;
        Scale seen = {INFINITY, -INFINITY, 0, 1, false};
        char name[40];
        k = span(p, plot.n - i, SERIES);
        series_name(name, sizeof name, p, k);
        fprintf(f, "  %-18.18s", name);
        for (int x = first; x <= last; x += step) {
            const char *block = bar[0];
            for (int64_t j = 0; j < k; j++) {
                include(&seen, p[j].value);
                if (p[j].start != x || !isfinite(p[j].value)) continue;
                block = bar[(int)(place(&level, p[j].value) + 0.5)];
            }
            fprintf(f, (last - first) / step < 18 ? "%s%s" : "%s", block, block);
        }
        fprintf(f, "  %.4g to %.4g\n", seen.lo, seen.hi);
    }
    fputc('\n', f);
    release(plot.point);
}

// Every task's first metric, and the summary of several, in at most 80 columns of UTF-8.
static void report_chart(FILE *f, const Row *rows, int64_t n) {
    int64_t n_summary;
    Row *all = sorted_rows(rows, n, &n_summary);
    if (n_summary && all[n].cut > 1) n += n_summary;    // of several tasks
    for (int64_t i = 0, k; i < n; i += k) {
        k = span(all + i, n - i, PANEL);
        if (!all[i].first) continue;
        chart_panel(f, all + i, k, MIDDLE);
        chart_panel(f, all + i, k, ONE);
    }
    release(all);
}

// ------------------------------------------------------------------------------------------------
// Figures
// ------------------------------------------------------------------------------------------------

// How the lines of a plot look, in the order of `interventions`; methods beyond begin anew. The
// colours are those of Okabe and Ito, which the colour-blind tell apart; dashes and markers tell
// lines apart in grey print. A marker is an SVG path around (0, 0).
static const struct { const char *colour, *dash, *marker; } looks[] = {
    {"#0072B2", "none", "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z"},
    {"#D55E00", "8 3", "M-4 -4h8v8h-8z"},
    {"#009E73", "2 2.5", "M0 -5L5 4H-5z"},
    {"#CC79A7", "9 3 2 3", "M0 -6L5.5 0L0 6L-5.5 0z"},
    {"#E69F00", "15 3", "M0 5.5L5.5 -3.5H-5.5z"},
    {"#56B4E9", "4 3", "M-2 -5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z"},
    {"#0072B2", "none", "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z"},
    {"#D55E00", "8 3", "M-4 -4h8v8h-8z"},
    {"#666666", "3 3", "M-5 -4L0 -1L5 -4V4L0 1L-5 4z"},
};
enum { N_LOOKS = sizeof looks / sizeof *looks, LEFT = 92, TOP = 66, WIDTH = 540, HEIGHT = 330 };
static const char MIDDLE_TEXT[] = "text-anchor='middle'", END_TEXT[] = "text-anchor='end'";

// Adds a text; `style`: further attributes. What XML does not allow becomes "?".
static void svg_text(Text *t, double x, double y, const char *style, const char *s) {
    text_printf(t, "<text x='%.2f' y='%.2f' %s>", x, y, style);
    for (uint32_t code; *s;) {
        int length = utf8_read(s, (int64_t)strlen(s), &code);
        bool odd = code < ' ' || code == 0x7F || (code >= 0xFFFD && code <= 0xFFFF);
        if (odd) text_add(t, "?", 1);
        else if (strchr("&<>", *s)) text_printf(t, "&#%d;", *s);
        else text_add(t, s, length);
        s += length;
    }
    text_printf(t, "</text>\n");
}

static void svg_line(Text *t, double x1, double y1, double x2, double y2, const char *style) {
    text_printf(t, "<line x1='%.2f' y1='%.2f' x2='%.2f' y2='%.2f' %s/>\n", x1, y1, x2, y2, style);
}

static void svg_box(Text *t, double x, double y, double width, double height, const char *style) {
    text_printf(t, "<rect x='%.2f' y='%.2f' width='%.2f' height='%.2f' %s/>\n", x, y, width, height,
                style);
}

// A white page at least as wide as its title, and the names of the axes of a box on it.
static void svg_open(Text *t, double width, double right, double bottom, const char *title,
                     const char *subtitle, const char *x_label, const char *y_label) {
    char turned[80];
    width = fmax(width, 40 + fmax(10.5 * (double)count_codepoints(title),
                                  7.5 * (double)count_codepoints(subtitle)));
    text_printf(t, "<svg xmlns='http://www.w3.org/2000/svg' role='img' width='%.0f' height='%.0f' "
                "font-family='Helvetica, Arial, DejaVu Sans, sans-serif' font-size='12'>\n"
                "<rect width='100%%' height='100%%' fill='#ffffff'/>\n", width, bottom + 60);
    svg_text(t, 20, 28, "font-size='16' font-weight='bold'", title);
    svg_text(t, 20, 47, "fill='#444444'", subtitle);
    svg_text(t, (LEFT + right) / 2, bottom + 44, MIDDLE_TEXT, x_label);
    snprintf(turned, sizeof turned, "%s transform='rotate(-90 24 %.1f)'", MIDDLE_TEXT,
             (TOP + bottom) / 2);
    svg_text(t, 24, (TOP + bottom) / 2, turned, y_label);
    svg_box(t, LEFT, TOP, right - LEFT, bottom - TOP, "fill='none' stroke='#333333'");
}

// Writes about n round values, multiples of 1, 2 or 5 times a power of ten or, on a logarithmic
// scale, powers of ten, at x = `at` beside a vertical scale or at y = `at` below a horizontal one.
// Vertical: with lines from x0 to x1.
static void svg_axis(Text *t, const Scale *s, int n, bool vertical, double at, double x0,
                     double x1) {
    double lo = s->log ? log10(s->lo) : s->lo, hi = s->log ? log10(s->hi) : s->hi;
    double least = (hi - lo) / n, step = pow(10, floor(log10(least)));
    step *= least <= step ? 1 : least <= 2 * step ? 2 : least <= 5 * step ? 5 : 10;
    if (!vertical || s->log) step = fmax(step, 1);
    for (double k = ceil(lo / step); k * step <= hi; k++) {
        char label[40];
        double v = s->log ? pow(10, k * step) : k == 0 ? 0 : k * step, here = place(s, v);
        int decimals = step < 1 ? (int)ceil(-log10(step) - 1e-9) : 0;
        snprintf(label, sizeof label, s->log ? "%.*g" : "%.*f", s->log ? 10 : decimals, v);
        if (vertical) svg_line(t, x0, here, x1, here, "stroke='#dddddd'");
        if (vertical) svg_text(t, at, here + 4, at < x0 ? END_TEXT : "", label);
        else svg_text(t, here, at, MIDDLE_TEXT, label);
    }
}

static void svg_marker(Text *t, int look, double x, double y, double size) {
    text_printf(t, "<path d='%s' transform='translate(%.2f %.2f) scale(%.2f)' fill='%s' "
                "stroke='#ffffff' stroke-width='0.8'", looks[look].marker, x, y, size,
                looks[look].colour);
}

// One series and its entry in the legend: error bars, a line that is broken where a value is
// missing, markers that hold the exact values. `shift` keeps the bars of several series apart.
static void svg_series(Text *t, const Plot *plot, const Row *p, int64_t n, double shift,
                       double size, double legend) {
    int look = (method_rank(p) - 1) % N_LOOKS;
    bool begun = false;
    char name[80], style[120];
    Text line = {0}, bars = {0}, markers = {0};
    for (int64_t i = 0; i < n; i++) {
        const Row *r = p + i;
        double x = place(&plot->x, r->start) + shift, y = place(&plot->y, r->value);
        double lo = place(&plot->y, r->value - r->error), hi = place(&plot->y, r->value + r->error);
        bool there = isfinite(r->value);
        if (there) text_printf(&line, "%s%.2f %.2f", begun ? "L" : "M", x, y);
        begun = there;
        if (!there) continue;
        if (isfinite(r->error)) {
            text_printf(&bars, "M%.2f %.2fh%.2fM%.2f %.2fV%.2fM%.2f %.2fh%.2f", x - 3 * size, lo,
                        6 * size, x, lo, hi, x - 3 * size, hi, 6 * size);
        }
        svg_marker(&markers, look, x, y, size);
        text_printf(&markers, " data-method='%s' data-x='%d' data-arg='%lld' data-value='%.17g' "
                    "data-error='%.17g'/>\n", r->method, r->start, (long long)r->arg, r->value,
                    r->error);
    }
    snprintf(style, sizeof style, "fill='none' stroke='%s' stroke-width='2' stroke-dasharray='%s'",
             looks[look].colour, looks[look].dash);
    if (bars.n) text_printf(t, "<path fill='none' stroke='%s' d='%s'/>\n", looks[look].colour,
                            bars.s);
    if (line.n) text_printf(t, "<path %s d='%s'/>\n%s", style, line.s, markers.s);
    series_name(name, sizeof name, p, n);
    svg_line(t, plot->x.to + 20, legend, plot->x.to + 56, legend, style);
    svg_marker(t, look, plot->x.to + 38, legend, 1);
    text_printf(t, "/>\n");
    svg_text(t, plot->x.to + 64, legend + 4, "", name);
    release(line.s);
    release(bars.s);
    release(markers.s);
}

// A panel's values against start S (range MIDDLE) or layer k (ONE); nothing if there are none.
static void svg_plot(Text *t, const Row *panel, int64_t n, int range) {
    static const char *const line_names[] = {"baseline", "chance"}, *const line_styles[] = {
        "stroke='#000000' stroke-width='1.5' stroke-dasharray='10 4'",
        "stroke='#555555' stroke-width='1.5' stroke-dasharray='2 4'"};
    Plot plot = plot_panel(panel, n, range, true);
    Text title = {0}, subtitle = {0};
    double right = LEFT + WIDTH, bottom = TOP + HEIGHT, legend = TOP + 12, n_series = 0;
    if (!plot.point) return;
    plot.x = (Scale){plot.x.lo - 0.5, plot.x.hi + 0.5, LEFT, right, false};
    plot.y = (Scale){plot.y.lo, plot.y.hi, bottom, TOP, plot.y.log};
    text_printf(&title, "%s: %s%s", panel->task, metric_label(panel),
                lower_is_better(panel) ? " (lower is better)" : "");
    add_model(&subtitle, panel);
    text_printf(&subtitle, "; %lld %s; bars: %s", is_summary(panel) ? (long long)panel->cut
                : (long long)panel->n, is_summary(panel) ? "tasks" : "items",
                is_summary(panel) ? "deviation over seeds"
                : "standard error, of random the deviation over seeds");
    svg_open(t, right + 205, right, bottom, title.s, subtitle.s, range != MIDDLE ? "layer k" :
             "start layer S (layers S+1 to T−S−1 are changed)", metric_label(panel));
    svg_axis(t, &plot.y, 8, true, LEFT - 8, LEFT, right);
    svg_axis(t, &plot.x, 12, false, bottom + 20, 0, 0);
    for (int i = 0; i < 2; i++) {
        char name[60], style[200];
        double v = plot.line[i], y = place(&plot.y, v);
        if (!isfinite(v)) continue;
        snprintf(name, sizeof name, "%s %.4g", line_names[i], v);
        snprintf(style, sizeof style, "%s data-line='%s' data-value='%.17g'", line_styles[i],
                 line_names[i], v);
        svg_line(t, LEFT, y, right, y, style);
        svg_line(t, right + 20, legend, right + 56, legend, line_styles[i]);
        svg_text(t, right + 64, legend + 4, "", name);
        legend += 24;
    }
    for (int64_t i = 0; i < plot.n; n_series++) i += span(plot.point + i, plot.n - i, SERIES);
    double spacing = WIDTH / (plot.x.hi - plot.x.lo), size = fmin(fmax(spacing / 14, 0.55), 1);
    double gap = fmin(3.5, 0.55 * spacing / n_series), shift = -gap * (n_series - 1) / 2;
    for (int64_t i = 0, k; i < plot.n; i += k, shift += gap, legend += 24) {
        k = span(plot.point + i, plot.n - i, SERIES);
        svg_series(t, &plot, plot.point + i, k, shift, size, legend);
    }
    text_printf(t, "</svg>\n");
    release(title.s);
    release(subtitle.s);
    release(plot.point);
}

// Dark blue to yellow, after matplotlib's viridis: lightness rises evenly, also for the
// colour-blind and in grey print. `part` is 0 to 9.
static void colour_at(double part, int rgb[3]) {
    static const unsigned char stops[10][3] = {
        {68, 1, 84}, {72, 40, 120}, {62, 74, 137}, {49, 104, 142}, {38, 130, 142},
        {31, 158, 137}, {53, 183, 121}, {110, 206, 88}, {181, 222, 43}, {253, 231, 37},
    };
    int i = part < 8 ? (int)part : 8;
    for (int c = 0; c < 3; c++) {
        rgb[c] = (int)(stops[i][c] + (part - i) * (stops[i + 1][c] - stops[i][c]) + 0.5);
    }
}

// One cell: its colour, its value if that fits, crossed out if it is NaN, framed if it is best.
static void svg_cell(Text *t, const Scale *colour, double v, int row, int col, double size,
                     bool best) {
    double x = LEFT + size * col, y = TOP + size * row;
    int rgb[3];
    char number[24], style[160];
    colour_at(isfinite(v) ? place(colour, v) : 0, rgb);
    bool dark = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] < 128;
    snprintf(style, sizeof style, "fill='rgb(%d,%d,%d)' shape-rendering='crispEdges' data-row='%d' "
             "data-col='%d' data-value='%.17g'", rgb[0], rgb[1], rgb[2], row, col, v);
    if (isfinite(v)) svg_box(t, x, y, size, size, style);
    else svg_line(t, x, y + size, x + size, y, "stroke='#888888' data-value='nan'");
    if (best) svg_box(t, x + 2, y + 2, size - 4, size - 4, dark ?
                      "fill='none' stroke='#ffffff' stroke-width='3' data-best='1'" :
                      "fill='none' stroke='#000000' stroke-width='3' data-best='1'");
    snprintf(number, sizeof number, fabs(v) < 9.995 ? "%.2f" : fabs(v) < 1000 ? "%.3g" : "%.3gk",
             fabs(v) < 5e-3 ? 0 : fabs(v) < 1000 ? v : v / 1000);
    snprintf(style, sizeof style, "%s fill='%s'", MIDDLE_TEXT, dark ? "#ffffff" : "#000000");
    bool fits = 7.5 * (double)strlen(number) < size - 2;
    if (isfinite(v) && fits) svg_text(t, x + size / 2, y + size / 2 + 4, style, number);
}

// A matrix [rows][cols] as a picture, the first row on top. best: 1 or -1 frames the largest or the
// smallest value of each column. colour: values to 0 ... 9.
static void svg_heatmap(Text *t, const char *title, const char *subtitle, const double *cell,
                        int rows, int cols, const char *x_label, const char *y_label,
                        char **x_names, char **y_names, Scale colour, int best) {
    double size = fmin(fmax(720.0 / (rows > cols ? rows : cols), 8), 46), wide = 1;
    double right = LEFT + size * cols, bottom = TOP + size * rows;
    svg_open(t, right + 130, right, bottom, title, subtitle, x_label, y_label);
    for (int i = 0; i < rows * cols; i++) {
        bool is_best = best && isfinite(cell[i]);
        for (int j = i % cols; j < rows * cols; j += cols) {
            if (best * cell[j] > best * cell[i]) is_best = false;
        }
        svg_cell(t, &colour, cell[i], i / cols, i % cols, size, is_best);
    }
    for (int i = 0; i < cols; i++) {
        wide = fmax(wide, 7.5 * (double)count_codepoints(x_names[i]) + 6);
    }
    for (int i = 0; i < cols; i += (int)ceil(wide / size)) {
        svg_text(t, LEFT + size * (i + 0.5), bottom + 20, MIDDLE_TEXT, x_names[i]);
    }
    for (int i = 0; i < rows; i += (int)ceil(15 / size)) {
        svg_text(t, LEFT - 8, TOP + size * (i + 0.5) + 4, END_TEXT, y_names[i]);
    }
    Scale bar = {colour.lo, colour.hi, bottom, TOP, colour.log};
    for (int i = 0, rgb[3]; i < 90; i++) {
        char style[60];
        colour_at(i / 10.0, rgb);
        snprintf(style, sizeof style, "fill='rgb(%d,%d,%d)'", rgb[0], rgb[1], rgb[2]);
        svg_box(t, right + 24, bottom - (i + 1) * (bottom - TOP) / 90, 20, (bottom - TOP) / 90 + 1,
                style);
    }
    svg_axis(t, &bar, (int)fmax(2, (bottom - TOP) / 40), true, right + 54, right + 44, right + 49);
    text_printf(t, "</svg>\n");
}

// The grid of looped parallel: R turns, upwards, against the number of layers in parallel, T-2S-1.
// Plain parallel is R = 1. Nothing unless there is more than one R, all below 100.
static void svg_loops(Text *t, const Row *panel, int64_t n) {
    Scale turns = {INFINITY, -INFINITY, 0, 9, false}, start = turns, value = turns;
    for (const Row *r = panel; r < panel + n; r++) {
        if (!takes(r, "times")) continue;
        include(&turns, (double)r->arg);
        include(&start, r->start);
        include(&value, r->value);
    }
    if (!(turns.lo < turns.hi && turns.hi < 100 && value.lo < value.hi)) return;
    int rows = (int)turns.hi, cols = (int)(start.hi - start.lo) + 1;
    double *cell = allocate(rows * cols, sizeof *cell, "loop grid");
    char **names = allocate(rows + cols, sizeof *names, "loop grid");
    for (int i = 0; i < rows * cols; i++) {
        cell[i] = NAN;
        for (const Row *r = panel; r < panel + n; r++) {
            int64_t turn = takes(r, "times") ? r->arg : !strcmp(r->method, "parallel");
            if (turn == rows - i / cols && r->start == start.hi - i % cols) cell[i] = r->value;
        }
        include(&value, cell[i]);
    }
    for (int i = 0; i < rows + cols; i++) {
        Text name = {0};
        int layers = panel->layers - 2 * ((int)start.hi - (i - rows)) - 1;
        text_printf(&name, "%d", i < rows ? rows - i : layers);
        names[i] = name.s;
    }
    bool lower = lower_is_better(panel);
    Text title = {0}, subtitle = {0};
    text_printf(&title, "%s: looped parallel", panel->task);
    add_model(&subtitle, panel);
    text_printf(&subtitle, "; %s%s; framed: the best R of each column", metric_label(panel),
                lower ? " (lower is better)" : "");
    value.log = lower && value.lo > 0 && value.hi / value.lo > 100;
    svg_heatmap(t, title.s, subtitle.s, cell, rows, cols, "layers in parallel, T − 2S − 1",
                "turns R", names + rows, names, value, lower ? -1 : 1);
    for (int i = 0; i < rows + cols; i++) release(names[i]);
    release(names);
    release(cell);
    release(title.s);
    release(subtitle.s);
}

// Writes a file under another name and then renames it, so that half of one never stands there.
static void write_figure(const char *path, const Text *t) {
    Text aside = {0};
    text_printf(&aside, "%s.tmp", path);
    FILE *f = fopen(aside.s, "wb");
    if (!f) die("%s: cannot be written: %s; choose another place", path, strerror(errno));
    fwrite(t->s, 1, (size_t)t->n, f);
    close_written(f, aside.s);
    if (rename(aside.s, path)) die("%s: cannot be written: %s; choose another place", path,
                                   strerror(errno));
    release(aside.s);
}

// A matrix [rows][cols] as an SVG file, its first row on top. lo and hi: the values of the darkest
// and the lightest colour.
static void heatmap_svg(const char *path, const char *title, const double *cell, int rows, int cols,
                        const char *x_label, const char *y_label, char **x_names, char **y_names,
                        double lo, double hi) {
    Text t = {0};
    svg_heatmap(&t, title, "", cell, rows, cols, x_label, y_label, x_names, y_names,
                (Scale){lo, hi > lo ? hi : lo + 1, 0, 9, false}, 0);
    write_figure(path, &t);
    release(t.s);
}

// The file of a figure: `where` itself or, in that folder, "llama12-bos-hellaswag-acc-loops.svg";
// other characters than A-Z a-z 0-9 . - _ are made "_".
static Text figure_path(const char *where, bool file, const Row *panel, const char *kind) {
    Text t = {0};
    text_printf(&t, "%s", where);
    if (file) return t;
    text_printf(&t, "/");
    int64_t start = t.n;
    text_printf(&t, "%s%d%s-%s%s%s%s.svg", panel->family, panel->layers,
                strcmp(panel->bos, "bos") ? "" : "-bos", panel->task, is_summary(panel) ? "" : "-",
                is_summary(panel) ? "" : panel->metric, kind);
    for (char *p = t.s + start; *p; p++) {
        bool letter = (*p | 32) >= 'a' && (*p | 32) <= 'z';
        if (!letter && !strchr("._-0123456789", *p)) *p = '_';
    }
    return t;
}

// All figures that the rows give: for every metric of every task, and the summary of several tasks,
// the values against S and against layer k, and the grid of looped parallel. `where` is a file
// NAME.svg if there is one figure, otherwise a folder, made if missing.
static void report_figures(const char *where, const Row *rows, int64_t n) {
    static const char *const part[] = {"", "-layers", "-loops"};
    int64_t n_summary;
    Row *all = sorted_rows(rows, n, &n_summary);
    if (n_summary && all[n].cut > 1) n += n_summary;    // of several tasks
    const char *dot = strrchr(where, '.');
    bool file = dot && !strcmp(dot, ".svg");
    if (!file && mkdir(where, 0777) && errno != EEXIST) {
        die("%s: cannot be made: %s; choose another place", where, strerror(errno));
    }
    int64_t count = 0;
    for (int pass = 0; pass < 2; pass++) {      // the first one only counts
        for (int64_t i = 0, k; i < n; i += k) {
            k = span(all + i, n - i, PANEL);
            for (int kind = 0; kind < 3; kind++) {
                Text svg = {0};
                if (kind == 2) svg_loops(&svg, all + i, k);
                else svg_plot(&svg, all + i, k, kind ? ONE : MIDDLE);
                count += pass == 0 && svg.n;
                if (pass && svg.n) {
                    Text path = figure_path(where, file, all + i, part[kind]);
                    write_figure(path.s, &svg);
                    release(path.s);
                }
                release(svg.s);
            }
        }
        if (!count) die("%s: no result has a start S or a layer k to draw; use --sweep", where);
        if (file && count > 1) die("%s: these results make %lld figures; name a folder", where,
                                   (long long)count);
    }
    release(all);
}
// ------------------------------------------------------------------------------------------------
// 11. Runs: --eval, --probe, --sweep, --report, --cosine
// ------------------------------------------------------------------------------------------------

// What a run is asked for; the command line fills it in.
typedef struct {
    const char **evals, **reports, *probe, *sweep, *head, *out, *log, *svg;
    int64_t n_evals, n_reports, limit, batch_tokens, shard, n_shards;
    double strength;
    bool bos;
} Wanted;

// Adds the schedules of one --sweep word: all starts of a method (random:SEEDS, loop:R or
// loop:R1-R2), or path:FILE with one path a line.
static void sweep_word(Store *st, const char *word) {
    size_t n = strcspn(word, ":");
    const char *argument = word[n] ? word + n + 1 : NULL;
    int T = st->layers;
    if (n == 4 && !strncmp(word, "path", 4) && argument) {
        int64_t bytes, number = 1;
        char *text = read_file(argument, &bytes), *at = text, place[4200];
        for (char *stop; *at; at = stop, number++) {
            stop = at + strcspn(at, "\r\n");
            if (*stop == '\r') *stop++ = 0;
            if (*stop == '\n') *stop++ = 0;
            snprintf(place, sizeof place, "%s: line %lld", argument, (long long)number);
            store_schedule(st, schedule_parse(at, T, place), true);
        }
        release(text);
        return;
    }
    const Intervention *v = intervention_named(word, n);
    if (!v) die("--sweep: \"%s\" is no method; use skip, repeat, ..., or path:FILE", word);
    int64_t low = v->standard, high = v->standard;
    if (v->argument_flag) {
        bool seeds = !strcmp(v->argument_flag, "seed");
        char *copy = copy_string(argument ? argument : seeds ? "10" : "3"), *dash = strchr(copy, '-');
        if (dash && !seeds) *dash++ = 0;
        if (!parse_int(copy, 1, 100000, &low) ||
            (dash && !parse_int(dash, low, 100000, &high))) {
            die("--sweep: \"%s\": expected %s", word,
                seeds ? "random:SEEDS, from 1" : "loop:R or loop:R1-R2, from 1");
        }
        if (!dash) high = low;
        if (seeds) high = low - 1, low = 0;
        release(copy);
    } else if (argument) {
        die("--sweep: \"%s\": %s takes no argument", word, v->name);
    }
    for (int64_t start = 0; start <= largest_start(v, T); start++) {
        for (int64_t a = low; a <= high; a++) {
            store_schedule(st, schedule_build(v, T, start, a), true);
        }
    }
}

// The baseline and all schedules of a --sweep list.
static void sweep_schedules(Store *st, const char *sweep) {
    char *list = copy_string(sweep), *at = list;
    store_schedule(st, schedule_build(NULL, st->layers, -1, -1), true);
    for (char *stop; *at; at = stop) {
        stop = at + strcspn(at, ",");
        if (*stop) *stop++ = 0;
        sweep_word(st, at);
    }
    release(list);
}

// --sweep LIST --show: the schedules, one a line, and how much of their work is shared.
static void show_sweep(Session *s, const char *sweep, int T) {
    Store st = {.layers = T};
    Tree tree;
    int64_t shared = 0, separate = 0;
    sweep_schedules(&st, sweep);
    int64_t *entry = allocate(st.n_entries, sizeof *entry, "schedules");
    for (int64_t i = 0; i < st.n_entries; i++) {
        entry[i] = i;
        separate += st.entries[i].schedule.n_slots;
        puts(st.entries[i].text);
    }
    tree_build(&tree, s, &st, entry, (int)st.n_entries);
    for (int64_t i = 1; i < tree.n_nodes; i++) shared += tree.nodes[i].n;
    warn("%lld schedules: %lld layer passes, %lld for a run of its own each: %.2f times less",
         (long long)st.n_entries, (long long)shared, (long long)separate,
         (double)separate / (double)shared);
    tree_free(&tree);
    release(entry);
}

// The order of a classifier's outputs in terms of the task's labels, by name. Where the names do
// not tell (LABEL_0, ...), the order is taken as it is, and that is said.
static void match_labels(Task *t, const Model *m, const char *wanted) {
    const char *name = wanted ? wanted : t->head;
    t->classifier = NULL;
    for (int i = 0; i < m->n_heads_named; i++) {
        if (name ? !strcmp(m->heads[i].name, name) : m->n_heads_named == 1) {
            t->classifier = &m->heads[i];
        }
    }
    const Head *h = t->classifier;
    if (!h) {
        die("%s: %s%s; name one with --head, or fit one with --probe (see --info)", m->path,
            name ? "has no classifier called " : "which classifier is meant, of its number ",
            name ? name : m->n_heads_named ? "of several" : "0");
    }
    bool regress = !strcmp(t->kind->name, "regress");
    if (regress != h->regression || (!regress && h->n_labels != t->n_labels)) {
        die("%s: task %s has %d labels and classifier %s %d outputs; choose another with --head",
            t->path, t->name, regress ? 1 : t->n_labels, h->name, h->n_labels);
    }
    release(t->label_of);
    t->label_of = allocate(h->n_labels, sizeof *t->label_of, "labels");
    int known = 0;
    for (int i = 0; i < h->n_labels && !regress; i++) {
        for (int j = 0; j < t->n_labels; j++) {
            if (strcmp(h->labels[i], t->labels[j])) continue;
            t->label_of[i] = j;
            known++;
        }
    }
    if (regress || known == h->n_labels) return;
    for (int i = 0; i < h->n_labels; i++) t->label_of[i] = i;
    warn("%s: the labels of classifier %s (%s, ...) are not those of task %s: taken in order",
         m->path, h->name, h->labels[0], t->name);
}

// Checks that the model can do the task at all.
static void check_task(const Task *t, const Model *m, bool probe) {
    const Kind *k = t->kind;
    need_tokenizer(m);
    if (k->arch && k->arch != m->arch) {
        die("%s: a task of kind %s is for %s; %s is another model", t->path, k->name,
            k->arch == LLAMA ? "Llama" : "BERT", m->path);
    }
    if (m->arch == BERT && (m->bos < 0 || m->eos < 0)) {
        die("%s: has no [CLS] or [SEP] token; export it again with its vocabulary", m->path);
    }
    if (k->output == SCORES && m->arch == BERT && (!m->has_mlm || m->mask < 0)) {
        die("%s: has no masked-LM head, which kind text needs; export a checkpoint with one",
            m->path);
    }
    if (k->output == CLASSIFIES && !m->has_pooler) {
        die("%s: has no pooler, which kind %s needs; export a checkpoint with one", m->path,
            k->name);
    }
    if (probe && k->output != CLASSIFIES) {
        die("%s: --probe is for tasks of kind classify and regress", t->path);
    }
    for (int64_t i = 0; i < t->n_items && k->output == CLASSIFIES; i++) {
        if (t->items[i].n_fields > 2 && m->n_segments < 2) {
            die("%s: line %lld: two texts, but %s knows one segment only", t->path,
                (long long)t->items[i].line, m->path);
        }
    }
}

// Rows for tables and figures, of what the store holds.
static Row *store_rows(const Store *st, int64_t *n_rows) {
    Row *rows = NULL;
    int64_t capacity = 0;
    *n_rows = 0;
    for (int k = 0; k < st->n_tasks; k++) {
        const Task *t = st->tasks[k];
        int width = t->kind->width;
        double *kept = allocate(t->n_items * width, sizeof *kept, "results");
        for (int64_t i = 0; i < st->n_entries && st->wanted_task[k]; i++) {
            const Entry *e = &st->entries[i];
            int64_t n = 0, cut = 0;
            if (!e->wanted || !e->kept[k]) continue;
            for (int64_t item = 0; item < t->n_items; item++) {
                if (e->state[k][item] == MISSING) continue;
                memcpy(kept + n++ * width, e->kept[k] + item * width, (size_t)width * sizeof *kept);
                cut += e->state[k][item] == DONE_CUT;
            }
            for (int j = 0; j < t->n_metrics && n; j++) {
                rows = grow(rows, &capacity, *n_rows + 1, sizeof *rows, "results");
                Row *r = &rows[(*n_rows)++];
                *r = (Row){.task = t->name, .metric = t->metrics[j]->name, .first = j == 0,
                           .method = e->schedule.method, .start = (int)e->schedule.start,
                           .arg = e->schedule.argument, .schedule = e->text, .layers = st->layers,
                           .n = n, .cut = cut, .chance = t->chance, .bos = st->bos,
                           .family = st->family};
                r->value = metric_value(t->metrics[j], kept, n, width, &r->error);
            }
        }
        release(kept);
    }
    return rows;
}

// Everything that is printed and drawn of results: a table, and where many schedules were run, the
// summary and charts.
static void show_results(const Store *st, const char *svg) {
    int64_t n;
    Row *rows = store_rows(st, &n);
    if (!n) die("no results to show");
    report_table(stdout, rows, n);
    if (st->n_entries > 1) {
        report_summary(stdout, rows, n);
        report_chart(stdout, rows, n);
    }
    if (svg) report_figures(svg, rows, n);
    release(rows);
}

// --report FILE ...: tables and figures of finished results, no model needed.
static void report_files(const Wanted *w) {
    Store st = {0};
    for (int64_t i = 0; i < w->n_reports; i++) store_read(&st, w->reports[i]);
    for (int64_t i = 0; i < st.n_entries; i++) st.entries[i].wanted = true;
    for (int k = 0; k < st.n_tasks; k++) st.wanted_task[k] = true;
    show_results(&st, w->svg);
}

static void open_log(Evaluation *e, const char *path) {
    e->log = fopen(path, "w");
    if (!e->log) die("%s: cannot be written: %s; choose another place", path, strerror(errno));
    fputs("#task\tschedule\titem\tcut\tkept values\tscores or text\n", e->log);
}

// --probe: pools the features of the train items under the schedules of the tree, fits a
// classifier on each, and answers the dev items with them.
static void run_probe(Evaluation *e, Task *train, Task *dev, const Wanted *w) {
    const Model *m = e->s->model;
    bool regress = !strcmp(dev->kind->name, "regress");
    int n = e->tree.n, outputs = regress ? 1 : dev->n_labels;
    double *gold = allocate(train->n_items, sizeof *gold, "labels");
    for (int64_t i = 0; i < train->n_items; i++) gold[i] = gold_of(train, i);
    e->features = allocate(n, sizeof *e->features, "pooled features");
    e->weights = allocate(n, sizeof *e->weights, "probes");
    for (int i = 0; i < n; i++) {
        e->features[i] = allocate(train->n_items * m->dim, sizeof(float), "pooled features");
    }
    e->t = train;
    ask_items(e, -1, 1, 1);
    run_requests(e);
    double started = seconds();
    for (int i = 0; i < n; i++) {
        e->weights[i] = allocate(outputs * ((int64_t)m->dim + 1), sizeof(double), "probes");
        probe_fit(e->features[i], gold, train->n_items, m->dim, outputs, w->strength,
                  e->weights[i]);
        release(e->features[i]);
        progress("fitting", i + 1, n, started);
        stop_if_interrupted(e);
    }
    release(e->features);
    e->features = NULL;
    e->n_outputs = outputs;
    e->t = dev;
    ask_items(e, w->limit, w->shard, w->n_shards);
    run_requests(e);
    for (int i = 0; i < n; i++) release(e->weights[i]);
    release(e->weights);
    e->weights = NULL;
    release(gold);
}

// Features of so many train items under so many schedules are held at a time.
enum { FEATURE_MEGABYTES = 1024 };

// Runs one task under all wanted schedules that are not done with it.
static void run_task(Evaluation *e, const Wanted *w, Task *train) {
    Store *st = e->store;
    Task *t = st->tasks[e->task];
    int64_t *entry = allocate(st->n_entries, sizeof *entry, "schedules"), n = 0, group;
    for (int64_t i = 0; i < st->n_entries; i++) {
        Entry *x = &st->entries[i];
        if (!x->wanted) continue;
        entry_room(x, st, e->task);
        for (int64_t item = w->shard - 1; item < t->n_items; item += w->n_shards) {
            if ((w->limit >= 0 && item >= w->limit) || x->state[e->task][item]) continue;
            entry[n++] = i;
            break;
        }
    }
    group = n;
    if (train) {
        double each = 4.0 * (double)train->n_items * e->s->model->dim;
        group = (int64_t)(FEATURE_MEGABYTES * 1e6 / each);
        if (group < 1) group = 1;
    }
    for (int64_t from = 0; from < n; from += group) {
        int count = (int)(n - from < group ? n - from : group);
        tree_build(&e->tree, e->s, st, entry + from, count);
        e->t = t;
        if (train) {
            run_probe(e, train, t, w);
        } else {
            ask_items(e, w->limit, w->shard, w->n_shards);
            run_requests(e);
        }
        tree_free(&e->tree);
    }
    release(entry);
}

// --eval: all tasks under one schedule, or under those of a sweep.
static void evaluate(Session *s, const Wanted *w, Schedule schedule) {
    const Model *m = s->model;
    Store st = {.layers = m->n_layers};
    Evaluation e = {.s = s, .store = &st, .bos = w->bos, .batch_tokens = w->batch_tokens};
    Task *train = w->probe ? task_load(w->probe) : NULL;
    Text id = {0};
    snprintf(st.family, sizeof st.family, "%s", m->arch == LLAMA ? "llama" : "bert");
    snprintf(st.bos, sizeof st.bos, "%s", m->arch == BERT ? "-" : w->bos ? "bos" : "no-bos");
    text_printf(&id, "#painters-results\t1\tmodel=%016llx\tfamily=%s\tlayers=%d\tbos=%s\tkv=%s\t"
                "head=%s", w->out ? (unsigned long long)hash_bytes(m->file, m->bytes) : 0,
                st.family, m->n_layers, st.bos, s->kv_mean ? "mean" : "exact",
                w->head ? w->head : "-");
    st.identity = id.s;
    for (int64_t i = 0; i < w->n_evals; i++) {
        Task *t = task_load(w->evals[i]);
        check_task(t, m, train != NULL);
        if (m->arch == BERT && t->kind->output == CLASSIFIES && !train) {
            match_labels(t, m, w->head);
        }
        if (train && (train->kind != t->kind || train->n_labels != t->n_labels)) {
            die("%s: its kind or labels are not those of %s", t->path, train->path);
        }
        if (train) {                            // results of a probe belong to its train items too
            Text probe = {0};
            text_printf(&probe, "%s\tprobe=%016llx\tstrength=%g", t->identity,
                        (unsigned long long)train->hash, w->strength);
            release(t->identity);
            t->identity = probe.s;
        }
        if (store_task(&st, t, true) < i) die("%s: task %s is given twice", t->path, t->name);
    }
    if (train) check_task(train, m, true);
    if (w->sweep) {
        sweep_schedules(&st, w->sweep);
        schedule_free(&schedule);
    } else {
        store_schedule(&st, schedule, true);
    }
    if (w->out) store_open(&st, w->out);
    if (w->log) open_log(&e, w->log);
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
    for (e.task = 0; e.task < (int)w->n_evals; e.task++) run_task(&e, w, train);
    if (st.out) close_written(st.out, st.path);
    if (e.log) close_written(e.log, w->log);
    if (w->sweep && s->layer_passes) {
        warn("layer passes: %lld run, %lld for a run of its own per schedule: %.2f times less",
             (long long)s->layer_passes, (long long)e.separate_passes,
             (double)e.separate_passes / (double)s->layer_passes);
    }
    show_results(&st, w->svg);
}

// The listener of --cosine: keeps the states between steps, one copy of the rows each.
typedef struct { float **state; int64_t n, capacity; } States;

static void keep_state(Session *s, void *data) {
    States *st = data;
    int64_t size = s->batch.n_rows * s->model->dim;
    st->state = grow(st->state, &st->capacity, st->n + 1, sizeof *st->state, "hidden states");
    st->state[st->n] = allocate(size, sizeof(float), "hidden states");
    memcpy(st->state[st->n++], s->x, (size_t)size * sizeof(float));
}

// Cosine similarity of every pair of hidden states of one sequence, flattened over its positions,
// added to sum [n][n].
static void add_cosines(Session *s, const Schedule *schedule, const Task *t, const Request *r,
                        double *sum, int64_t n) {
    const Model *m = s->model;
    States states = {0};
    s->listener = keep_state;
    s->listener_data = &states;
    session_reset(s, 0);
    int q = sequence_new(s, -1, r->n, 1);
    for (int64_t j = 0; j < r->n; j++) {
        batch_add(s, q, t->pool.id[r->first + j], m->arch == BERT && j >= r->segment_from);
    }
    forward(s, schedule);
    s->listener = NULL;
    int64_t size = r->n * m->dim;
    double *dot = allocate(n * n, sizeof *dot, "similarities");
    #pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j <= i; j++) {
            double total = 0;
            for (int64_t k = 0; k < size; k++) {
                total += (double)states.state[i][k] * (double)states.state[j][k];
            }
            dot[i * n + j] = total;
        }
    }
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j <= i; j++) {
            double cosine = dot[i * n + j] / sqrt(dot[i * n + i] * dot[j * n + j]);
            sum[i * n + j] += cosine;
            if (i != j) sum[j * n + i] += cosine;
        }
    }
    for (int64_t i = 0; i < n; i++) release(states.state[i]);
    release(states.state);
    release(dot);
}

// --cosine: the paper's similarity matrix, averaged over a task's sequences or of one prompt, one
// sequence in memory at a time.
static void cosine(Session *s, const Wanted *w, const Schedule *schedule, const char *path,
                   const char *prompt) {
    const Model *m = s->model;
    Task *t;
    if (path) {
        t = task_load(path);
        check_task(t, m, false);
        for (int64_t i = 0; i < t->n_items && (w->limit < 0 || i < w->limit); i++) {
            t->kind->ask(t, m, w->bos, i);
        }
    } else {
        t = allocate(1, sizeof *t, "task");
        Request *r = new_request(t, 0, 0);
        if ((m->arch == BERT || w->bos) && m->bos >= 0) ids_push(&t->pool, m->bos);
        encode(need_tokenizer(m), prompt, (int64_t)strlen(prompt), &t->pool);
        if (m->arch == BERT && m->eos >= 0) ids_push(&t->pool, m->eos);
        r->n = r->segment_from = t->pool.n;
        if (!r->n) die("--prompt: no tokens; give some text");
    }
    int64_t n = schedule->n_steps + 1, done = 0;
    double *sum = allocate(n * n, sizeof *sum, "similarities"), started = seconds();
    char **names = allocate(n, sizeof *names, "names");
    names[0] = copy_string("emb");
    char *text = schedule_text(schedule), *at = text;
    for (int64_t i = 1; i < n; i++, at++) {
        Text name = {0};
        text_add(&name, at, (int64_t)strcspn(at, " "));
        names[i] = name.s;
        at += name.n;
    }
    for (int64_t i = 0; i < t->n_requests; i++) {
        if (i && t->requests[i].mask_at >= 0 && t->requests[i].first == t->requests[i - 1].first) {
            continue;                           // BERT's windows of running text: each once
        }
        add_cosines(s, schedule, t, &t->requests[i], sum, n);
        done++;
        progress("cosine", i + 1, t->n_requests, started);
    }
    for (int64_t i = 0; i < n * n; i++) sum[i] /= (double)done;
    for (int64_t j = 0; j < n; j++) printf("\t%s", names[j]);
    putchar('\n');
    for (int64_t i = 0; i < n; i++) {
        printf("%s", names[i]);
        for (int64_t j = 0; j < n; j++) printf("\t%.6f", sum[i * n + j]);
        putchar('\n');
    }
    if (w->svg) {
        double lo = 1;
        for (int64_t i = 0; i < n * n; i++) lo = sum[i] < lo ? sum[i] : lo;
        heatmap_svg(w->svg, "Cosine similarity of hidden states", sum, (int)n, (int)n, "state after",
                    "state after", names, names, lo, 1);
    }
    for (int64_t i = 0; i < n; i++) release(names[i]);
    release(names);
    release(text);
    release(sum);
    task_free(t);
}

// ------------------------------------------------------------------------------------------------
// 12. The command line
// ------------------------------------------------------------------------------------------------

static void print_info(const Model *m) {
    static const char *const tokenizers[] = {"none", "SentencePiece BPE", "WordPiece"};
    int64_t weights = 0, count[N_TYPES] = {0};
    for (int i = 0; i < m->n_tensors; i++) {
        const unsigned char *e = m->table + 96 * (int64_t)i;
        weights += (int64_t)(read_u64(e + 64) * read_u64(e + 72));
        count[read_u32(e + 56)]++;
    }
    printf("file          %s, %.1f MB\n", m->path, (double)m->bytes / 1e6);
    char *source = model_note(m, "source");
    if (source) printf("source        %s\n", source);
    release(source);
    printf("architecture  %s\n", m->arch == LLAMA ? "Llama" : "BERT");
    printf("layers        %d\ndim           %d\nhidden        %d\n", m->n_layers, m->dim, m->hidden);
    printf("heads         %d of %d, %d for keys and values\n", m->n_heads, m->head_dim,
           m->n_kv_heads);
    printf("vocabulary    %d\ncontext       %d tokens\n", m->vocab_size, m->max_length);
    if (m->arch == LLAMA) {
        printf("rotary        base %g, pairs %s\n", (double)m->rope_theta,
               m->rope == ROPE_HALVES ? "(i, i + head_dim/2)" : "(2i, 2i + 1)");
        printf("output head   %s\n", m->output.data == m->embed.data ? "tied" : "its own");
    }
    printf("norm epsilon  %g\n", (double)m->norm_eps);
    printf("tokenizer     %s; bos %d, eos %d\n", tokenizers[m->tokenizer_kind], m->bos, m->eos);
    printf("weights       %.1f million in %d tensors:", (double)weights / 1e6, m->n_tensors);
    for (int t = 0; t < N_TYPES; t++) {
        if (count[t]) printf(" %lld %s", (long long)count[t], type_names[t]);
    }
    putchar('\n');
    if (m->arch == BERT) {
        printf("parts         encoder%s%s\n", m->has_pooler ? ", pooler" : "",
               m->has_mlm ? ", masked-LM head" : "");
    }
    for (int i = 0; i < m->n_heads_named; i++) {
        const Head *h = &m->heads[i];
        printf("head          %s: %s", h->name, h->regression ? "regression" : "labels");
        for (int j = 0; j < h->n_labels; j++) printf(" %s", h->labels[j]);
        putchar('\n');
    }
    printf("kernels       %s\n", kernels_name());
}

// What the command line asked for. Flags are rows of the table below and write into this.
static struct {
    const char *model, *prompt, *cosine, *probe, *sweep, *head, *path, *kv, *out, *log, *shard;
    const char *svg, *quantize;
    const char **evals, **reports;
    int64_t n_evals, n_reports, evals_capacity, reports_capacity;
    int64_t layers, start[N_INTERVENTIONS], seed, times, threads, limit, batch, tokens, sample_seed;
    double temperature, top_p, strength;
    bool given[N_INTERVENTIONS], seed_given, times_given, info, show, bos, no_bos, help;
} options = {.layers = -1, .times = 3, .limit = -1, .batch = 2048, .tokens = 256, .top_p = 1,
             .strength = 1};

// To add a flag: a field above, a row here, and its use in main. The type says what the value is.
enum { SWITCH, WORD, OPTIONAL, WORDS, INTEGER, NUMBER };
typedef struct {
    const char *name, *value;   // --name VALUE
    int type;
    void *target;
    double lowest, highest;
    const char *help;
} Flag;

typedef struct { const char ***list; int64_t *n, *capacity; } WordList;
static WordList eval_list = {&options.evals, &options.n_evals, &options.evals_capacity};
static WordList report_list = {&options.reports, &options.n_reports, &options.reports_capacity};

static const Flag flags[] = {
    {"What", NULL, SWITCH, NULL, 0, 0, NULL},
    {"prompt", "TEXT", WORD, &options.prompt, 0, 0,
     "Llama: continue TEXT; BERT: fill every [MASK] in it"},
    {"eval", "TASK.tsv ...", WORDS, &eval_list, 0, 0, "score task files"},
    {"sweep", "LIST", WORD, &options.sweep, 0, 0,
     "with --eval: many schedules, e.g. skip,reverse,random:10,loop:1-8"},
    {"probe", "TRAIN.tsv", WORD, &options.probe, 0, 0,
     "BERT: fit a classifier on frozen pooled features, then --eval with it"},
    {"cosine", "[TASK.tsv]", OPTIONAL, &options.cosine, 0, 0,
     "cosine similarity of hidden states, over a task or of --prompt"},
    {"report", "FILE ...", WORDS, &report_list, 0, 0,
     "tables and figures from finished --out files; needs no model"},
    {"quantize", "OUT", WORD, &options.quantize, 0, 0, "write the model to OUT with 8-bit weights"},
    {"info", NULL, SWITCH, &options.info, 0, 0, "what the model file holds"},
    {"show", NULL, SWITCH, &options.show, 0, 0, "print the schedule and stop"},
    {"help", NULL, SWITCH, &options.help, 0, 0, "this text"},
    {"Which layers", NULL, SWITCH, NULL, 0, 0, NULL},
    // (the interventions of section 1 come here)
    {"seed", "K", INTEGER, &options.seed, -9.2e18, 9.2e18, "seed of --random (default 0)"},
    {"times", "R", INTEGER, &options.times, 1, 100000, "how often --loop runs its step (default 3)"},
    {"path", "EXPR", WORD, &options.path, 0, 0, "the schedule itself, e.g. \"0-3 (4-7)*2 8-11\""},
    {"layers", "T", INTEGER, &options.layers, 1, 16384, "with --show: for T layers, without a model"},
    {"How", NULL, SWITCH, NULL, 0, 0, NULL},
    {"threads", "N", INTEGER, &options.threads, 1, 1024, "threads (default: one a core)"},
    {"limit", "N", INTEGER, &options.limit, 1, 9e15, "only the first N items of each task"},
    {"batch", "TOKENS", INTEGER, &options.batch, 1, 1 << 24, "tokens in one pass (default 2048)"},
    {"bos", NULL, SWITCH, &options.bos, 0, 0, "begin texts with BOS (default for --prompt)"},
    {"no-bos", NULL, SWITCH, &options.no_bos, 0, 0, "do not (default for --eval)"},
    {"kv", "exact|mean", WORD, &options.kv, 0, 0,
     "keys and values of parallel layers: each its own, or the group's mean"},
    {"head", "NAME", WORD, &options.head, 0, 0, "BERT: which classifier of the file"},
    {"strength", "X", NUMBER, &options.strength, 1e-9, 1e9, "L2 penalty of --probe (default 1)"},
    {"out", "FILE", WORD, &options.out, 0, 0, "keep every result; the same command goes on from it"},
    {"log", "FILE", WORD, &options.log, 0, 0, "write every item: scores or text, prediction, gold"},
    {"shard", "I/N", WORD, &options.shard, 0, 0, "the I-th of N parts of the items"},
    {"svg", "FILE|DIR", WORD, &options.svg, 0, 0, "draw the figure there, or the figures"},
    {"tokens", "N", INTEGER, &options.tokens, 1, 9e15, "how far --prompt continues (default 256)"},
    {"temperature", "X", NUMBER, &options.temperature, 0, 1e6, "0 takes the likeliest (default)"},
    {"top-p", "X", NUMBER, &options.top_p, 1e-9, 1, "sample from this much of the distribution"},
    {"sample-seed", "K", INTEGER, &options.sample_seed, -9.2e18, 9.2e18, "seed of sampling"},
    {"kernels", "NAME", WORD, &kernels_wanted, 0, 0, "plain: the ones to learn from; see --info"},
    {"quiet", NULL, SWITCH, &quiet, 0, 0, "no status on stderr"},
};
enum { N_FLAGS = sizeof flags / sizeof *flags };

static void print_help(void) {
    puts("painters - run a frozen Llama or BERT with its layers skipped, shuffled, in parallel ...\n\n"
         "  painters MODEL [what to do] [which layers] [how]");
    for (int i = 0; i < N_FLAGS; i++) {
        const Flag *f = &flags[i];
        char name[64];
        snprintf(name, sizeof name, "--%s %s", f->name, f->value ? f->value : "");
        if (f->help) printf("  %-24s %s\n", name, f->help);
        else printf("\n%s\n", f->name);
        if (f->help || strcmp(f->name, "Which layers")) continue;
        for (int j = 0; j < N_INTERVENTIONS; j++) {
            snprintf(name, sizeof name, "--%s %s", interventions[j].name,
                     interventions[j].range == MIDDLE ? "S" : "K");
            printf("  %-24s %s\n", name, interventions[j].help);
        }
    }
    puts("\nExamples\n"
         "  painters llama.bin --prompt \"Once upon a time\" --parallel 3\n"
         "  painters llama.bin --prompt \"Once upon a time\" --path \"0-3 (4-7)*2 8-11\"\n"
         "  painters bert.bin --prompt \"The cat [MASK] on the mat.\" --drop 5\n"
         "  painters llama.bin --eval arc.tsv lambada.tsv --skip 4 --limit 100\n"
         "  painters llama.bin --eval arc.tsv --sweep skip,reverse,random:10 --out arc.out --svg figs\n"
         "  painters --layers 32 --random 9 --seed 3 --show");
}

static void take_value(const Flag *f, const char *value) {
    int64_t integer;
    double number;
    if (f->type == WORD || f->type == OPTIONAL) *(const char **)f->target = value;
    if (f->type == INTEGER) {
        if (!parse_int(value, (int64_t)f->lowest, (int64_t)f->highest, &integer)) {
            die("--%s: \"%s\" is not a whole number from %.0f to %.0f", f->name, value, f->lowest,
                f->highest);
        }
        *(int64_t *)f->target = integer;
        options.seed_given |= f->target == &options.seed;
        options.times_given |= f->target == &options.times;
    }
    if (f->type == NUMBER) {
        if (!parse_double(value, &number) || !(number >= f->lowest && number <= f->highest)) {
            die("--%s: \"%s\" is not a number from %g to %g", f->name, value, f->lowest, f->highest);
        }
        *(double *)f->target = number;
    }
}

static void add_argument(void *target, const char *word) {
    WordList *list = target;
    *list->list = grow((void *)(uintptr_t)*list->list, list->capacity, *list->n + 1, sizeof word,
                       "arguments");
    (*list->list)[(*list->n)++] = word;
}

// Reads the arguments into `options`. Every flag is known, has the values it needs, and numbers
// are numbers; otherwise one line says which is not.
static void parse_arguments(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (strncmp(argv[i], "--", 2)) {
            if (options.model) {
                die("\"%s\": one model at a time; a text of several words needs quotes", argv[i]);
            }
            options.model = argv[i];
            continue;
        }
        const char *name = argv[i] + 2, *value = i + 1 < argc ? argv[i + 1] : NULL;
        const Flag *f = NULL;
        for (int j = 0; j < N_FLAGS; j++) {
            if (flags[j].help && !strcmp(flags[j].name, name)) f = &flags[j];
        }
        const Intervention *v = NULL;
        for (int j = 0; j < N_INTERVENTIONS; j++) {
            if (!strcmp(interventions[j].name, name)) v = &interventions[j];
        }
        if (!f && !v) die("%s: no such flag; painters --help lists them", argv[i]);
        if (f && f->type == SWITCH) {
            *(bool *)f->target = true;
            continue;
        }
        if (f && f->type == OPTIONAL && (!value || !strncmp(value, "--", 2))) {
            *(const char **)f->target = "";
            continue;
        }
        if (!value) die("%s: a value is missing: %s", argv[i], v ? "a layer" : f->value);
        i++;
        if (v) {
            options.given[v - interventions] = true;
            if (!parse_int(value, INT64_MIN, INT64_MAX, &options.start[v - interventions])) {
                die("--%s: \"%s\" is not a layer; give a whole number", name, value);
            }
        } else if (f->type == WORDS) {
            add_argument(f->target, value);
            while (i + 1 < argc && strncmp(argv[i + 1], "--", 2)) add_argument(f->target, argv[++i]);
        } else {
            take_value(f, value);
        }
    }
}

// The one schedule that the flags name, for a model of T layers.
static Schedule chosen_schedule(int T) {
    const Intervention *chosen = NULL;
    for (int i = 0; i < N_INTERVENTIONS; i++) {
        if (!options.given[i]) continue;
        if (chosen) die("--%s: --%s is given too; one at a time, or write them as a --path",
                        interventions[i].name, chosen->name);
        chosen = &interventions[i];
    }
    const char *second = chosen && chosen->argument_flag ? chosen->argument_flag : "";
    if (options.seed_given && strcmp(second, "seed")) die("--seed: needs --random S beside it");
    if (options.times_given && strcmp(second, "times")) die("--times: needs --loop S beside it");
    if (options.path) {
        if (chosen) die("--path: --%s is given too; choose one", chosen->name);
        return schedule_parse(options.path, T, "--path");
    }
    int64_t argument = !strcmp(second, "seed") ? options.seed : options.times;
    return schedule_build(chosen, T, chosen ? options.start[chosen - interventions] : -1, argument);
}

// I/N of --shard.
static void read_shard(Wanted *w) {
    char *copy = copy_string(options.shard ? options.shard : "1/1"), *n = strchr(copy, '/');
    if (n) *n++ = 0;
    if (!n || !parse_int(n, 1, 1000000, &w->n_shards) ||
        !parse_int(copy, 1, w->n_shards, &w->shard)) {
        die("--shard: \"%s\" is not I/N with I from 1 to N, as in 2/8", options.shard);
    }
    release(copy);
}

// Flags that need or exclude one another.
static void check_options(void) {
    if (options.bos && options.no_bos) die("--bos: --no-bos is given too; choose one");
    if (options.kv && strcmp(options.kv, "exact") && strcmp(options.kv, "mean")) {
        die("--kv: \"%s\" is unknown; use exact or mean", options.kv);
    }
    const struct { bool given; const char *flag, *needs; bool there; } needs[] = {
        {options.sweep != NULL, "sweep", "--eval or --show", options.n_evals || options.show},
        {options.probe != NULL, "probe", "--eval", options.n_evals > 0},
        {options.out != NULL, "out", "--eval", options.n_evals > 0},
        {options.log != NULL, "log", "--eval", options.n_evals > 0},
        {options.shard != NULL, "shard", "--eval", options.n_evals > 0},
        {options.cosine && !*options.cosine, "cosine", "TASK.tsv or --prompt",
         options.prompt != NULL},
        {options.layers > 0, "layers", "--show", options.show}};
    for (size_t i = 0; i < sizeof needs / sizeof *needs; i++) {
        if (needs[i].given && !needs[i].there) {
            die("--%s: needs %s beside it", needs[i].flag, needs[i].needs);
        }
    }
}

#ifndef PAINTERS_NO_MAIN
int main(int argc, char **argv) {
    parse_arguments(argc, argv);
    if (options.help || argc == 1) {
        print_help();
        return argc == 1;
    }
    check_options();
#ifdef _OPENMP
    if (options.threads) omp_set_num_threads((int)options.threads);
#endif
    Wanted w = {options.evals, options.reports, options.probe, options.sweep, options.head,
                options.out, options.log, options.svg, options.n_evals, options.n_reports,
                options.limit, options.batch, 1, 1, options.strength, options.bos};
    read_shard(&w);
    if (options.n_reports) {
        report_files(&w);
        close_written(stdout, "stdout");
        return 0;
    }
    if (!options.model && options.layers < 0) {
        die("no model file; give one first: painters MODEL ... (or --help)");
    }
    Model *m = options.layers > 0 ? NULL : model_load(options.model);
    Schedule schedule = chosen_schedule(m ? m->n_layers : (int)options.layers);
    Session *s = session_new(m);
    if (options.show) {
        if (options.sweep) show_sweep(s, options.sweep, schedule.n_layers);
        else puts(schedule_text(&schedule));
        close_written(stdout, "stdout");
        return 0;
    }
    s->kv_mean = options.kv && !strcmp(options.kv, "mean");
    if (options.info) {
        print_info(m);
    } else if (options.quantize) {
        model_quantize(m, options.quantize);
    } else if (options.cosine) {
        cosine(s, &w, &schedule, *options.cosine ? options.cosine : NULL, options.prompt);
    } else if (options.prompt && m->arch == BERT) {
        fill_masks(s, &schedule, options.prompt);
    } else if (options.prompt) {
        Sampler sampler = {options.temperature, options.top_p, (uint64_t)options.sample_seed};
        continue_text(s, &schedule, options.prompt, !options.no_bos, options.tokens, &sampler);
    } else if (options.n_evals) {
        evaluate(s, &w, schedule);
    } else {
        die("nothing to do; add --prompt TEXT, --eval TASK.tsv, --info, ... (see --help)");
    }
    close_written(stdout, "stdout");
    session_free(s);
    model_free(m);
    return 0;
}
#endif
#endif  // LANES

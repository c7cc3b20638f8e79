// painters.c - run a frozen Llama or BERT with its layers skipped, repeated, reversed, shuffled, in
// parallel or looped, and measure what that does to it. One file, nothing but libc and libm.
//
//   The experiments are those of "Transformer Layers as Painters" (Sun, Pickett, Nain and Jones,
//   arXiv 2407.09298): the layers of a model are painters who pass a canvas along a line.
//
//   Build     cc -O3 -fopenmp painters.c -o painters -lm        (or: make)
//   Run       ./painters model.bin --prompt "Once upon a time" --skip 4
//   Measure   ./painters model.bin --eval task.tsv --parallel 3
//   Embed     #define PAINTERS_NO_MAIN, then #include "painters.c"    (README.md has an example)
//
// How to read it: from top to bottom, as a token travels. A schedule says which layers run in which
// order (1). A model file is mapped and checked (2). Kernels multiply matrices (3), and a pass is a
// loop over the steps of a schedule (4). Tokenizers turn text into ids and back (5), and a text is
// continued (6). Metrics turn kept values into scores (7), tasks turn text into sequences and
// answers into values (8), a tree of schedules is walked over them (9). Reports print and draw what
// came out (10), runs tie it together (11), flags are a table (12).
//
// MIT License; see LICENSE. Model files come from export.py; README.md documents their format.

#ifndef LANES       // section 3 compiles a part of this file several times, by including it
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
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
#define ftruncate _chsize_s
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
static void (*on_error)(const char *message);   // of a program that embeds this; never returns

// Ends the program with one line on stderr: "FILE: PLACE: what is wrong; how to mend it".
__attribute__((format(printf, 1, 2)))
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
__attribute__((format(printf, 1, 2)))
static void warn(const char *format, ...) {
    if (quiet) return;
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

// Zeroed memory on a 64-byte boundary; dies naming `what` when it does not fit. Pages that are
// never touched cost nothing, since calloc leaves zeroing to the system. Before it stand its size
// and what calloc gave.
static void *allocate(int64_t count, int64_t size, const char *what) {
    bool possible = count >= 0 && count <= (int64_t)(PTRDIFF_MAX - 128) / size;
    char *raw = possible ? calloc(1, (size_t)(count * size) + 128) : NULL;
    if (!raw) {
        die("memory: %s: %lld items of %lld bytes do not fit; use a smaller --batch, or a machine "
            "with more memory", what, (long long)count, (long long)size);
    }
    void *p = raw + 128 - (uintptr_t)raw % 64;
    ((int64_t *)p)[-2] = count * size;
    ((void **)p)[-1] = raw;
    return p;
}

// The size in bytes of what allocate() or grow() gave; NULL has none.
static int64_t allocated(const void *p) { return p ? ((const int64_t *)p)[-2] : 0; }

// Gives it back; NULL is allowed.
static void release(void *p) {
    if (p) free(((void **)p)[-1]);
}

// Makes room for `need` items in a growing array, keeping what it holds.
static void *grow(void *p, int64_t need, int64_t size, const char *what) {
    int64_t bytes = allocated(p), more = bytes / size < 8 ? 16 : bytes / size * 2;
    if (need * size <= bytes) return p;
    void *bigger = allocate(more < need ? need : more, size, what);
    if (p) memcpy(bigger, p, (size_t)bytes);
    release(p);
    return bigger;
}

typedef struct {                // a growing list of token ids
    int *id;
    int64_t n;
} Ids;

static void ids_push(Ids *ids, int id) {
    ids->id = grow(ids->id, ids->n + 1, sizeof *ids->id, "token ids");
    ids->id[ids->n++] = id;
}

typedef struct {                // a growing string of bytes, always with a NUL behind it
    char *s;
    int64_t n;
} Text;

static void text_add(Text *t, const char *s, int64_t n) {
    t->s = grow(t->s, t->n + n + 1, 1, "text");
    if (n) memcpy(t->s + t->n, s, (size_t)n);
    t->n += n;
    t->s[t->n] = 0;
}

__attribute__((format(printf, 2, 3)))
static void text_printf(Text *t, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    t->s = grow(t->s, t->n + n + 1, 1, "text");
    va_start(args, format);
    t->n += vsnprintf(t->s + t->n, (size_t)n + 1, format, args);
    va_end(args);
}

static char *copy_string(const char *s) {
    return strcpy(allocate((int64_t)strlen(s) + 1, 1, "text"), s);
}

// The files that this run has read or written, so that no output takes the place of one.
static struct {
    char **path;
    int64_t n;
} used;

static void use_file(const char *path) {
    for (int64_t i = 0; i < used.n; i++) {
        if (!strcmp(used.path[i], path)) return;
    }
    used.path = grow(used.path, used.n + 1, sizeof *used.path, "names of files");
    used.path[used.n++] = copy_string(path);
}

// Dies where an output would take the place of a device or a pipe, or of a file that this run has
// read or written, whatever name it is called by.
static void check_output(const char *path) {
    struct stat info, other;
    if (stat(path, &info) || S_ISDIR(info.st_mode)) return;     // figures can go into a folder
    if (!S_ISREG(info.st_mode)) die("%s: is no regular file; choose another place", path);
    for (int64_t i = 0; i < used.n; i++) {
        const char *name = used.path[i];
        bool same = info.st_ino && !stat(name, &other) && info.st_dev == other.st_dev &&
                    info.st_ino == other.st_ino;        // on Windows, where it is 0, names tell
        if (!same && strcmp(path, name)) continue;
        die("%s: is a file that this run uses, %s; choose another place", path, name);
    }
}

// Opens a file to write. All outputs are opened here.
static FILE *open_output(const char *path, const char *mode) {
    check_output(path);
    FILE *f = fopen(path, mode);
    if (!f) die("%s: cannot be written: %s; choose another place", path, strerror(errno));
    use_file(path);
    return f;
}

// The whole of a file, with a NUL behind it; *bytes gets its length.
static char *read_file(const char *path, int64_t *bytes) {
    use_file(path);
    FILE *f = fopen(path, "rb");
    if (!f) die("%s: cannot be opened: %s; check the path", path, strerror(errno));
    Text t = {0};
    char part[65536];
    text_add(&t, "", 0);
    for (size_t n; (n = fread(part, 1, sizeof part, f)) > 0;) text_add(&t, part, (int64_t)n);
    if (ferror(f)) die("%s: cannot be read: %s; is it a file?", path, strerror(errno));
    fclose(f);
    *bytes = t.n;
    return t.s;
}

// Closes a file that was written, so that a full disk is an error and not a lost line.
static void close_written(FILE *f, const char *path) {
    if (fflush(f) || ferror(f) || (f != stdout && fclose(f))) {
        die("%s: cannot be written: %s; free space or choose another", path, strerror(errno));
    }
}

// Strict numbers: the whole text, nothing around it, lo..hi.
static bool parse_int(const char *text, int64_t lo, int64_t hi, int64_t *out) {
    char *end;
    errno = 0;
    *out = strtoll(text, &end, 10);
    return strspn(text, "-0123456789") && !*end && !errno && *out >= lo && *out <= hi;
}

static bool parse_double(const char *text, double *out) {
    char *end;
    *out = strtod(text, &end);
    return strspn(text, "+-.0123456789eEnainf") == strlen(text) && end != text && !*end;
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// One line of progress, drawn over itself, when stderr is a terminal. done == total ends the line.
static void progress(const char *what, int64_t done, int64_t total, double started) {
    static double drawn;
    double now = seconds(), spent = now - started;
    bool over = done >= total;
    if (quiet || !isatty(fileno(stderr)) || (!over && now - drawn < 0.2)) return;
    drawn = now;
    double left = spent / (double)(done ? done : 1) * (double)(total - done);
    fprintf(stderr, "\r%s %lld/%lld  %s %.1f min \033[K%s", what, (long long)done,
            (long long)total, over ? "took" : "ETA", (over ? spent : left) / 60, over ? "\n" : "");
}

// A weight matrix as it lies in the file: row-major, one row per output. 1-D tensors have one row.
enum { F32, F16, BF16, Q8, N_TYPES };
static const char *const type_names[N_TYPES] = {"f32", "f16", "bf16", "q8"};

typedef struct {
    int type;
    int64_t rows, cols;
    const void *data;           // Q8: rows * cols int8
    const uint16_t *scale;      // Q8: [rows][ceil(cols / 32)] float16; weight = int8 * scale
    const float *bias;          // [rows], of a norm [cols]: what BERT adds to the product, or NULL
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
} Schedule;

enum { MAX_SLOTS = 1000000 };   // a typo such as *999999999 should not fill the memory

// Adds a layer as a step of its own (parallel = false) or to the group that is the last step.
static void schedule_add(Schedule *s, int layer, bool parallel) {
    if (s->n_slots >= MAX_SLOTS) die("schedule: more than %d layers to run; use fewer", MAX_SLOTS);
    s->layer = grow(s->layer, s->n_slots + 1, sizeof *s->layer, "schedule");
    s->first = grow(s->first, s->n_steps + 2, sizeof *s->first, "schedule");
    s->layer[s->n_slots++] = layer;
    if (!parallel) s->n_steps++;
    s->first[s->n_steps] = s->n_slots;
}

// Python's random.Random(seed), as far as shuffle() needs it: MT19937 in w[624], seeded with the
// 32-bit words of |seed| (init_by_array of Matsumoto and Nishimura, mt19937ar 2002).
static void python_seed(uint32_t *w, int64_t seed) {
    uint64_t size = seed < 0 ? 0 - (uint64_t)seed : (uint64_t)seed;
    uint32_t key[2] = {(uint32_t)size, (uint32_t)(size >> 32)};
    w[0] = 19650218u;
    for (uint32_t k = 1; k < 624; k++) w[k] = 1812433253u * (w[k - 1] ^ w[k - 1] >> 30) + k;
    for (int k = 0; k < 624 + 623; k++) {       // round words 1 to 623 twice, from 1 to 1 and on
        int i = k % 623 + 1, j = key[1] ? k % 2 : 0;
        uint32_t before = w[k && i == 1 ? 623 : i - 1], mixed = before ^ before >> 30;
        if (k < 624) w[i] = (w[i] ^ mixed * 1664525u) + key[j] + (uint32_t)j;
        else w[i] = (w[i] ^ mixed * 1566083941u) - (uint32_t)i;
    }
    w[0] = 0x80000000u;
}

// Its n-th number, 32 bits; n counts up from 0.
static uint32_t python_word(uint32_t *w, int64_t n) {
    int64_t i = n % 624;
    uint32_t y = (w[i] & 0x80000000u) | (w[(i + 1) % 624] & 0x7fffffffu);
    y = w[i] = w[(i + 397) % 624] ^ y >> 1 ^ (y & 1 ? 0x9908b0dfu : 0);
    y ^= y >> 11;
    y ^= y << 7 & 0x9d2c5680u;
    y ^= y << 15 & 0xefc60000u;
    return y ^ y >> 18;
}

// The interventions. Each builder fills in the middle lo <= i < hi of the T = s->n_layers layers;
// those before and behind stay in place. For drop and swap the middle is the layers they name.
static void build_repeat(Schedule *s, int lo, int hi) {
    for (int i = lo; i < hi; i++) schedule_add(s, s->n_layers / 2, false);
}

static void build_reverse(Schedule *s, int lo, int hi) {
    for (int i = hi - 1; i >= lo; i--) schedule_add(s, i, false);
}

static void build_parallel(Schedule *s, int lo, int hi) {
    for (int i = lo; i < hi; i++) schedule_add(s, i, i > lo);
}

static void build_loop(Schedule *s, int lo, int hi) {
    for (int64_t turn = 0; turn < s->argument; turn++) build_parallel(s, lo, hi);
}

// random.shuffle: Fisher-Yates from the top, each index drawn by rejection on getrandbits.
static void build_random(Schedule *s, int lo, int hi) {
    uint32_t state[624];
    int64_t drawn = 0;
    python_seed(state, s->argument);
    for (int i = lo; i < hi; i++) schedule_add(s, i, false);
    int *middle = s->layer + lo;
    for (int i = hi - lo - 1; i > 0; i--) {
        int j, bits = 0, top = middle[i];
        while ((i + 1) >> bits) bits++;
        do j = (int)(python_word(state, drawn++) >> (32 - bits));
        while (j > i);
        middle[i] = middle[j];
        middle[j] = top;
    }
}

// To add an intervention: write a builder above and a row here; flags, --help, --show, --sweep and
// the figures follow. A `range` of MIDDLE takes a start S and works on S < i < T-S; ONE takes a
// layer k; TWO takes k and k+1.
enum { MIDDLE, ONE, TWO };
typedef struct {
    const char *name, *help;    // the flag is --name
    int range;
    void (*build)(Schedule *s, int lo, int hi);     // NULL: leaves the middle out
    const char *argument_flag, *argument_help;      // a second number, s->argument; NULL: none
    int64_t lowest, highest, standard;              // what it can be, and is by default
} Intervention;

static const Intervention interventions[] = {
    {"skip", "leave out the middle", .range = MIDDLE},
    {"repeat", "run layer T/2 in place of each of the middle", .build = build_repeat},
    {"reverse", "run the middle last to first", .build = build_reverse},
    {"random", "shuffle the middle", .build = build_random,
     .argument_flag = "seed", .lowest = -9.2e18, .highest = 9.2e18, .standard = 0,
     .argument_help = "with --random: as Python's random.seed(N) shuffles (default 0)"},
    {"parallel", "run the middle as one step, its outputs averaged", .build = build_parallel},
    {"loop", "run that step several times, each on the last average", .build = build_loop,
     .argument_flag = "times", .lowest = 1, .highest = 100000, .standard = 3,
     .argument_help = "with --loop: how many times (default 3)"},
    {"drop", "leave out layer K", .range = ONE},
    {"swap", "exchange layers K and K+1", .range = TWO, .build = build_reverse},
};
enum { N_INTERVENTIONS = sizeof interventions / sizeof *interventions };

// The largest start that an intervention has in a model of T layers; -1: none.
static int64_t largest_start(const Intervention *v, int T) {
    return T < 2 ? -1 : v->range == MIDDLE ? (T - 2) / 2 : T - v->range;
}

// The schedule of an intervention, or of the untouched model where v is NULL. Dies where there is
// no such start.
static Schedule schedule_build(const Intervention *v, int T, int64_t start, int64_t argument) {
    Schedule s = {.n_layers = T, .method = v ? v->name : "baseline", .start = v ? start : -1,
                  .argument = v && v->argument_flag ? argument : -1};
    int lo = T, hi = T;
    if (v) {
        int64_t most = largest_start(v, T);
        if (most < 0) die("--%s: a model of %d layers leaves nothing to change", v->name, T);
        if (start < 0 || start > most) {
            die("--%s: %lld is out of range; with %d layers, allowed are 0 to %lld", v->name,
                (long long)start, T, (long long)most);
        }
        lo = (int)start + (v->range == MIDDLE);
        hi = v->range == MIDDLE ? T - (int)start : lo + v->range;
    }
    for (int i = 0; i < lo; i++) schedule_add(&s, i, false);
    if (v && v->build) v->build(&s, lo, hi);
    for (int i = hi; i < T; i++) schedule_add(&s, i, false);
    return s;
}

// The --path grammar; `at` walks the text.
//   path   = step { space step }
//   step   = ( range | layers | group ) [ "*" count ]     "*" only on a single layer or a group
//   range  = layer "-" layer                              layers = layer { "|" layer }
//   group  = "(" (range | layer) { "|" (range | layer) } ")"
typedef struct {
    const char *text, *at, *place;      // place: what to call it in errors
} PathReader;

_Noreturn static void path_error(const PathReader *r, const char *expected) {
    die("%s: character %d, at \"%.20s\": expected %s", r->place, (int)(r->at - r->text) + 1, r->at,
        expected);
}

static int path_number(PathReader *r, const char *what, int lo, int hi) {
    char expected[64], *end = NULL;
    bool digit = *r->at >= '0' && *r->at <= '9';
    long long n = digit ? strtoll(r->at, &end, 10) : -1;
    snprintf(expected, sizeof expected, "%s, %d to %d", what, lo, hi);
    if (n < lo || n > hi) path_error(r, expected);
    r->at = end;
    return (int)n;
}

static bool path_take(PathReader *r, char c) { return *r->at == c && r->at++; }

static void path_step(PathReader *r, Schedule *s) {
    int64_t from = s->n_slots;
    bool group = path_take(r, '('), range = false;
    do {
        int i = path_number(r, "a layer", 0, s->n_layers - 1), to = i;
        if ((group || s->n_slots == from) && path_take(r, '-')) {
            range = true;
            to = path_number(r, "a layer", 0, s->n_layers - 1);
        }
        for (int way = i < to ? 1 : -1; i != to + way; i += way) {
            schedule_add(s, i, s->n_slots > from && (group || !range));
        }
    } while ((group || !range) && path_take(r, '|'));
    if (group && !path_take(r, ')')) path_error(r, "\"|\", \"-\" or \")\" inside a group");
    int64_t n = s->n_slots - from;
    bool repeats = (group || (n == 1 && !range)) && path_take(r, '*');
    int times = repeats ? path_number(r, "a count", 1, MAX_SLOTS) : 1;
    for (int64_t i = 0; i < n * (times - 1); i++) schedule_add(s, s->layer[from + i], i % n > 0);
}

// The schedule that a --path text writes down, for a model of T layers; `place` names it in errors.
static Schedule schedule_parse(const char *text, int T, const char *place) {
    Schedule s = {.n_layers = T, .method = "path", .start = -1, .argument = -1};
    PathReader r = {text, text, place};
    for (path_step(&r, &s); *r.at; path_step(&r, &s)) {
        if (path_take(&r, ' ')) continue;
        path_error(&r, "a space or the end (\"*\" follows a single layer or a group)");
    }
    return s;
}

// The schedule as --show prints it and --path reads it: `0 1 2|3|4 5`. The caller releases it.
static char *schedule_text(const Schedule *s) {
    Text t = {0};
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

typedef struct {                // one layer
    Tensor q, k, v, o;          // [heads * head_dim, dim], [kv_heads * head_dim, dim] x2, [dim, *]
    Tensor gate, up, down;      // [hidden, dim] twice, [dim, hidden]; BERT has no gate
    Tensor attn_norm, ffn_norm; // float32 [dim], as all norms
} Layer;

typedef struct {                // a linear classifier on BERT's pooled output
    char name[56];
    Tensor weight;              // [labels, dim]
    bool regression;
    int n_labels;
    char **labels;              // label names in the order of the outputs
} Head;

typedef struct {
    const char *path;
    const unsigned char *file;              // the whole file, read-only
    int64_t bytes;
    int arch;                               // LLAMA or BERT
    // From here to head_dim as in the file, byte 64 on.
    int dim, hidden, n_layers, n_heads, n_kv_heads, vocab_size, max_length;
    int n_segments;                         // BERT's token types
    int rope;                               // ROPE_HALVES (Hugging Face) or ROPE_PAIRS (Meta)
    float rope_theta, norm_eps;
    int tokenizer_kind;
    int bos, eos, unk, pad, mask;           // token ids, -1 where there is none; BERT: [CLS], [SEP]
    int flags, head_dim, n_tensors, n_heads_named;
    Tensor *tensors;                        // [n_tensors] in the order of the file's table
    char *notes;                            // strings "key <TAB> value", the last one is empty
    Tensor embed;                           // [vocab, dim]
    Tensor output;                          // Llama: the head, [vocab, dim]; `embed` where tied
    Tensor norm;                            // Llama: the final norm, [dim]
    Tensor positions, segments, embed_norm; // BERT: [max_length, dim], [n_segments, dim], [dim]
    Tensor pooler, mlm, mlm_norm, mlm_out;  // BERT: [dim, dim] twice, [dim], [vocab, dim];
                                            // without data where the file has none
    Layer *layers;                          // [n_layers]
    Head *heads;                            // [n_heads_named]
    float *rope_frequency;                  // Llama: [head_dim / 2], radians per position
    Tokenizer *tokenizer;                   // NULL where the file has none
    void **own;                             // [n_own]: what model_free() gives back
    int64_t n_own;
} Model;

// allocate(), for as long as the model lives.
static void *model_allocate(Model *m, int64_t count, int64_t size, const char *what) {
    m->own = grow(m->own, m->n_own + 1, sizeof *m->own, "model");
    return m->own[m->n_own++] = allocate(count, size, what);
}

// Fields of the file, which is little-endian, at any alignment.
static uint32_t read_u32(const unsigned char *p) {
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static int64_t read_i64(const unsigned char *p) {
    return (int64_t)(read_u32(p) | (uint64_t)read_u32(p + 4) << 32);
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
    struct stat info;
    int fd = open(m->path, O_RDONLY);
    if (fd < 0 || fstat(fd, &info)) {
        die("%s: cannot be opened: %s; check the path", m->path, strerror(errno));
    }
    m->bytes = S_ISREG(info.st_mode) ? info.st_size : 0;
    if (!m->bytes) die("%s: is no regular file, or an empty one; name a model", m->path);
    void *p = mmap(NULL, (size_t)m->bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
        die("%s: its %lld bytes do not fit into memory: %s; allow this program more of it", m->path,
            (long long)m->bytes, strerror(errno));
    }
    use_file(m->path);
    m->file = p;
    close(fd);
#endif
}

static void need(const Model *m, bool good, const char *place, const char *fault) {
    if (!good) die("%s: %s: %s; export the model again", m->path, place, fault);
}

// The integer of 4 or 8 bytes at byte `at` of the header; it must lie in lo..hi.
static int64_t header_field(const Model *m, int64_t at, int bytes, int64_t lo, int64_t hi,
                            const char *name) {
    int64_t v = bytes == 8 ? read_i64(m->file + at) : (int32_t)read_u32(m->file + at);
    if (v >= lo && v <= hi) return v;
    die("%s: byte %lld: %s is %lld, allowed are %lld to %lld; export the model again", m->path,
        (long long)at, name, (long long)v, (long long)lo, (long long)hi);
}

static int64_t stored_bytes(int type, int64_t rows, int64_t cols) {
    if (type == Q8) return (rows * cols + 63) / 64 * 64 + rows * ((cols + 31) / 32) * 2;
    return rows * cols * (type == F32 ? 4 : 2);
}

static const char *tensor_name(const Model *m, int i) {
    return (const char *)m->file + 192 + 96 * (int64_t)i;
}

// Reads and checks the header: its fields, the tensor table and the places of the sections.
static void model_header(Model *m) {
    const unsigned char *f = m->file;
    if (__BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__) {    // weights are used as they lie
        die("%s: model files are little-endian, this machine is not; use another", m->path);
    }
    need(m, m->bytes >= 192 && !memcmp(f, "PAINTERS", 8), "byte 0", "not a painters model file");
    header_field(m, 8, 4, 1, 1, "version");
    m->arch = (int)header_field(m, 12, 4, LLAMA, BERT, "arch");
    need(m, read_i64(f + 16) == m->bytes, "byte 16", "the file is cut off, or too long");
    int64_t header = header_field(m, 24, 8, 192, m->bytes, "header_bytes");
    need(m, header % 64 == 0 && header_checksum(f, header) == read_u32(f + 32), "byte 32",
         "the header's checksum is wrong: the file is damaged");
    m->n_tensors = (int)header_field(m, 36, 4, 1, (header - 192) / 96, "n_tensors");
    header_field(m, 40, 8, 192, 192, "table_offset");
    int64_t text = header_field(m, 48, 8, 0, header, "tokenizer_offset");
    int64_t text_bytes = header_field(m, 56, 8, 0, header - text, "tokenizer_bytes");
    int64_t notes = header_field(m, 144, 8, 0, header, "meta_offset");
    int64_t notes_bytes = header_field(m, 152, 8, 0, header - notes, "meta_bytes");
    m->notes = model_allocate(m, notes_bytes + 2, 1, "notes");
    memcpy(m->notes, f + notes, (size_t)notes_bytes);
    for (char *p = m->notes; (p = strchr(p, '\n'));) *p++ = 0;

    bool llama = m->arch == LLAMA;
    _Static_assert(offsetof(Model, head_dim) - offsetof(Model, dim) == 18 * 4, "file's order");
    memcpy((char *)m + offsetof(Model, dim), f + 64, 19 * 4);
    int64_t ids = (int64_t)m->vocab_size - 1, any = 1LL << 32;
    const struct { const char *name; int64_t lo, hi; } fields[19] = {
        {"dim", 1, 1 << 20}, {"hidden", 1, 1 << 22}, {"n_layers", 1, 1 << 14},
        {"n_heads", 1, 1 << 14}, {"n_kv_heads", 1, m->n_heads}, {"vocab_size", 1, 1 << 24},
        {"max_length", 1, 1 << 24}, {"n_segments", !llama, 1 << 10},
        {"rope_pairs", llama, 2 * llama}, {"rope_theta", -any, any}, {"norm_eps", -any, any},
        {"tokenizer", text_bytes > 0, text_bytes > 0 ? 2 : 0},
        {"bos", -1, ids}, {"eos", -1, ids}, {"unk", -1, ids}, {"pad", -1, ids}, {"mask", -1, ids},
        {"flags", -any, any}, {"head_dim", 1, 1 << 16}};
    for (int i = 0; i < 19; i++) {
        header_field(m, 64 + 4 * i, 4, fields[i].lo, fields[i].hi, fields[i].name);
    }
    need(m, m->n_heads % m->n_kv_heads == 0 && m->norm_eps >= 0 && m->norm_eps < 1 &&
         (llama ? m->head_dim % 2 == 0 && m->rope_theta > 0 && m->rope_theta < 1e30f
                : (int64_t)m->n_heads * m->head_dim == m->dim), "byte 64",
         "n_heads, n_kv_heads, head_dim, dim, norm_eps and rope_theta cannot all be right");

    m->tensors = model_allocate(m, m->n_tensors, sizeof *m->tensors, "tensors");
    int64_t end = header;
    for (int i = 0; i < m->n_tensors; i++) {    // of known types, in order, inside the file
        int64_t e = 192 + 96 * (int64_t)i;
        int type = (int)header_field(m, e + 56, 4, 0, N_TYPES - 1, "a tensor's type");
        int64_t rank = header_field(m, e + 60, 4, 1, 2, "a tensor's rank");
        int64_t rows = header_field(m, e + 64, 8, 1, rank == 1 ? 1 : 1 << 30, "a tensor's rows");
        int64_t cols = header_field(m, e + 72, 8, 1, 1 << 30, "a tensor's columns");
        int64_t bytes = stored_bytes(type, rows, cols);
        int64_t at = header_field(m, e + 80, 8, end, m->bytes - bytes, "a tensor's offset");
        header_field(m, e + 88, 8, bytes, bytes, "a tensor's length");
        need(m, !f[e + 55] && at % 64 == 0, "byte 192", "a tensor's name or place is wrong");
        m->tensors[i] = (Tensor){type, rows, cols, f + at, NULL, NULL};
        if (type == Q8) m->tensors[i].scale = (const void *)(f + at + (rows * cols + 63) / 64 * 64);
        end = at + bytes;
    }
}

// Finds a tensor by name; NULL where the file has none.
static const Tensor *model_find(const Model *m, const char *name) {
    for (int i = 0; i < m->n_tensors; i++) {
        if (!strcmp(tensor_name(m, i), name)) return &m->tensors[i];
    }
    return NULL;
}

// The value of a line "key <TAB> value" of the file's notes; "" where there is none.
static char *model_note(const Model *m, const char *key) {
    size_t n = strlen(key);
    char *p = m->notes;
    for (; *p; p += strlen(p) + 1) {
        if (!strncmp(p, key, n) && p[n] == '\t') return p + n + 1;
    }
    return p;
}

static void widen(float *out, const Tensor *w, int64_t row);
static char **split(char *s, char separator, int *n);

// The tensor PREFIX NAME, which must be there in this shape, and where it is `biased` its bias
// PREFIX NAME_bias. A vector has 0 rows here; its values are widened to float32.
static Tensor model_part(Model *m, const char *prefix, const char *name, int64_t rows,
                         int64_t cols, bool biased) {
    char whole[160];
    snprintf(whole, sizeof whole, "%.79s%.79s", prefix, name);
    const Tensor *t = model_find(m, whole);
    need(m, t && t->rows == (rows ? rows : 1) && t->cols == cols, whole,
         "the tensor is missing, or not of the shape that the header says");
    Tensor part = *t;
    if (!rows) {
        float *wide = model_allocate(m, cols, sizeof *wide, whole);
        widen(wide, t, 0);
        part = (Tensor){F32, 1, cols, wide, NULL, NULL};
    }
    snprintf(whole, sizeof whole, "%.79s_bias", name);
    if (biased) part.bias = model_part(m, prefix, whole, 0, rows ? rows : cols, false).data;
    return part;
}

// Every tensor "heads.NAME.weight" is a classifier; its labels stand in the notes.
static void model_heads(Model *m) {
    m->heads = model_allocate(m, m->n_tensors, sizeof *m->heads, "classifiers");
    for (int i = 0; i < m->n_tensors; i++) {
        const char *name = tensor_name(m, i), *end = strstr(name, ".weight");
        if (strncmp(name, "heads.", 6) || !end || end[7] || end == name + 5) continue;
        int64_t n = m->tensors[i].rows;
        Head *h = &m->heads[m->n_heads_named++];
        char key[80];
        snprintf(h->name, sizeof h->name, "%.*s", (int)(end - name - 6), name + 6);
        snprintf(key, sizeof key, "heads.%s.", h->name);
        h->weight = model_part(m, key, "weight", n, m->dim, false);
        h->weight.bias = model_part(m, key, "bias", 0, n, false).data;
        snprintf(key, sizeof key, "head.%s.kind", h->name);
        h->regression = n == 1 || !strcmp(model_note(m, key), "regress");
        snprintf(key, sizeof key, "head.%s.labels", h->name);
        h->labels = split(model_note(m, key), '|', &h->n_labels);
        need(m, h->n_labels == n, name, "the notes have not a name for each of its labels");
    }
}

// Gives names to the tensors of an opened file.
static void model_weights(Model *m) {
    int64_t d = m->dim, h = m->hidden, vocab = m->vocab_size;
    int64_t q = (int64_t)m->n_heads * m->head_dim, kv = (int64_t)m->n_kv_heads * m->head_dim;
    bool bert = m->arch == BERT, head = !bert && model_find(m, "head");
    m->embed = model_part(m, "", "embed", vocab, d, false);
    m->output = model_part(m, "", head ? "head" : "embed", vocab, d, false);
    if (bert) {
        m->positions = model_part(m, "", "positions", m->max_length, d, false);
        m->segments = model_part(m, "", "segments", m->n_segments, d, false);
        m->embed_norm = model_part(m, "", "embed_norm", 0, d, true);
        model_heads(m);
    } else {
        m->norm = model_part(m, "", "norm", 0, d, false);
    }
    if (bert && model_find(m, "pooler")) m->pooler = model_part(m, "", "pooler", d, d, true);
    if (bert && model_find(m, "mlm")) {
        const char *output = model_find(m, "mlm_out") ? "mlm_out" : "embed";
        m->mlm = model_part(m, "", "mlm", d, d, true);
        m->mlm_norm = model_part(m, "", "mlm_norm", 0, d, true);
        m->mlm_out = model_part(m, "", output, vocab, d, false);
        m->mlm_out.bias = model_part(m, "", "mlm_out_bias", 0, vocab, false).data;
    }
    m->layers = model_allocate(m, m->n_layers, sizeof *m->layers, "layers");
    for (int i = 0; i < m->n_layers; i++) {
        Layer *l = &m->layers[i];
        char at[32];
        snprintf(at, sizeof at, "layers.%d.", i);
        l->attn_norm = model_part(m, at, "attn_norm", 0, d, bert);
        l->q = model_part(m, at, "q", q, d, bert);
        l->k = model_part(m, at, "k", kv, d, bert);
        l->v = model_part(m, at, "v", kv, d, bert);
        l->o = model_part(m, at, "o", d, q, bert);
        l->ffn_norm = model_part(m, at, "ffn_norm", 0, d, bert);
        if (!bert) l->gate = model_part(m, at, "gate", h, d, false);
        l->up = model_part(m, at, "up", h, d, bert);
        l->down = model_part(m, at, "down", d, h, bert);
    }
    m->rope_frequency = model_allocate(m, m->head_dim / 2, sizeof(float), "rotary frequencies");
    for (int i = 0; i < m->head_dim / 2; i++) {         // float32 steps, as Hugging Face takes them
        m->rope_frequency[i] = 1.0f / powf(m->rope_theta, (float)(2 * i) / (float)m->head_dim);
    }
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
// The plain_ functions say what is computed, and run anywhere. The fast ones behind them compute
// the same to rounding. On each path every output is summed in one fixed order that does not know
// how many rows, threads or pieces of cache there are, so none of these can change a result's bits.

#pragma GCC diagnostic ignored "-Wpsabi"        // no vector crosses into other people's code
#ifndef _OPENMP
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#endif

// Memory of the calling thread for intermediate results; slot's previous contents are lost.
static float *scratch(int slot, int64_t floats) {
    static _Thread_local float *memory[3];
    if (floats * (int64_t)sizeof(float) > allocated(memory[slot])) {
        release(memory[slot]);
        memory[slot] = NULL;            // should allocate() not return
        memory[slot] = allocate(floats, sizeof(float), "intermediate results");
    }
    return memory[slot];
}

// n pieces of work are as many stretches as there are threads, up to STRETCHES. A thread takes the
// pieces of its own, one behind the other, since memory gives more to those who read on: on a Zen 5
// decoding is 1.1 (float32) to 1.4 (8 bits) times as fast as with pieces taken from one heap. Then
// it helps the others. Returns n when there are no more; next, [STRETCHES], begins with zeros.
enum { STRETCHES = 64 };
static int64_t take(int64_t *next, int64_t n) {
    int64_t own = 0, count = 1;
#ifdef _OPENMP
    count = omp_get_num_threads() < STRETCHES ? omp_get_num_threads() : STRETCHES;
    own = omp_get_thread_num() % count;
#endif
    for (int64_t k = own; k < own + count; k++) {
        int64_t stretch = k % count, first = n * stretch / count, i;
        #pragma omp atomic capture
        i = next[stretch]++;
        if (first + i < n * (stretch + 1) / count) return first + i;
    }
    return n;
}

enum { WORTH_THREADS = 1 << 19 };       // operations; kernels do four products in the time of one

// Is this a thread of somebody else's team, which must not share our loops?
static bool in_parallel(void) {
#ifdef _OPENMP
    return omp_in_parallel();
#else
    return false;
#endif
}

// Calls a function whose loops, where marked `omp for`, all threads share; where so many operations
// are not worth waking the others, on this thread alone. (`omp parallel if` makes a team even then,
// and takes it apart with a call of the system: a quarter of the time of stories260K.) A function
// with sums of its own is ONE_COPY: compilers may round two copies differently.
#define ONE_COPY __attribute__((noinline))
#define TOGETHER(operations, call) \
    do { \
        if ((operations) > WORTH_THREADS || in_parallel()) { \
            _Pragma("omp parallel") \
            call; \
        } else { \
            call; \
        } \
    } while (0)

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

// y[n][w->rows] = x[n][w->cols] . W^T, + bias where W has one.
static void plain_matmul(float *y, const float *x, const Tensor *w, int64_t n) {
    #pragma omp parallel for if (n * w->rows * w->cols > 1 << 21)
    for (int64_t row = 0; row < w->rows; row++) {
        float *wide = scratch(0, w->cols);
        widen(wide, w, row);
        for (int64_t i = 0; i < n; i++) {
            y[i * w->rows + row] = dot(x + i * w->cols, wide, w->cols) +
                                 (w->bias ? w->bias[row] : 0);
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

// The fast paths. Section 3b is written once, for vectors of LANES floats, and compiled once a path
// by this file including itself. ACCUMULATORS is how many sums the vector registers hold at a time.
// PAINTERS_PORTABLE leaves out those for some CPUs only.
#if defined __x86_64__ && !defined PAINTERS_PORTABLE && (!defined _WIN32 || defined __clang__)
#define HAVE_AVX            // gcc for Windows cannot align wide vectors (its bug 54412)
#include <cpuid.h>
#include <immintrin.h>
#endif
#define ON_PATH__(name, path) name##_##path
#define ON_PATH_(name, path) ON_PATH__(name, path)
#define ON_PATH(name) ON_PATH_(name, PATH)
#define INLINE static inline __attribute__((always_inline))
#define DO_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define ROLLED _Pragma("clang loop unroll(disable)")
#define TARGET(t) DO_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define ROLLED _Pragma("GCC unroll 1")
#define TARGET(t) _Pragma("GCC push_options") DO_PRAGMA(GCC target(t))
#define END_TARGET _Pragma("GCC pop_options")
#endif
#define WEIGHT_BYTES(type) ((type) == F32 ? 4 : (type) == Q8 ? 1 : 2)

enum {
    WIDE = 16,                  // attention: keys, or elements of values, side by side
    DEPTH = 512,                // and values that stay in the cache for all rows
    PANEL = 24,                 // rows of W that are multiplied with
    CHUNK = 32,                 // so many rows of x, at most, as one piece of work
    BLOCK = 1024,               // columns of float32 that stay in the nearest cache: see outputs()
    GROUP = 8,                  // panels that meet a chunk one after another
    PACK = 64, PACK_X = 132,    // rows of W and x that meet chain by chain,
    PACK_CHUNK = 512,           // rows of x as one piece of work, when there are many
    PAD = 16,                   // rows a power of two apart would share cache lines
    LONG = 1024,                // columns of W from which on its rows meet a single x one by one,
    AHEAD = 6144                // fetched so many bytes ahead
};

typedef struct {                // a panel of W and a chunk of x
    int type;
    int64_t rows, groups;       // of the panel; 32 columns each
    const char *w;              // [rows], one ldw bytes behind the other
    const uint16_t *scale;      // [rows][groups]
    const float *x;             // [n][ldx]
    float *y;                   // [n][ldy]
    const float *bias;          // [rows]
    int64_t n, ldw, ldx, ldy;
    int64_t tiles, from, to;    // of x: see outputs(); columns to be multiplied next
} Block;

// Copies rows of `bytes` bytes, with zeros behind them up to `padded`, to places ld bytes apart.
static void *pad_rows(void *to, int64_t ld, const void *from, int64_t rows, int64_t bytes,
                      int64_t padded) {
    for (int64_t r = 0; r < rows; r++) {
        char *row = memcpy((char *)to + r * ld, (const char *)from + r * bytes, (size_t)bytes);
        memset(row + bytes, 0, (size_t)(padded - bytes));
    }
    return to;
}

#define PATH generic
#define LANES 4
#define ACCUMULATORS 12
#include "painters.c"

#ifdef HAVE_AVX
TARGET("avx2,fma,f16c")
#define PATH avx2
#define LANES 8
#define ACCUMULATORS 12
#include "painters.c"
END_TARGET

TARGET("avx512f,avx512bw,avx2,fma,f16c")
#define PATH avx512
#define LANES 16
#define ACCUMULATORS 24
#include "painters.c"
END_TARGET
#endif

#endif  // LANES
#ifdef LANES

// ------------------------------------------------------------------------------------------------
// 3b. Fast kernels (skip on first reading): compiled once for each size of vectors
// ------------------------------------------------------------------------------------------------
//
// For matmul, a sum is LANES chains, each of every LANES-th column in the order in which weights
// of a type are widened. A chain is summed from its first column to its last, and at the end the
// chains are added, in one order. This can be done in two ways. With few rows of x the chains are
// the lanes of a vector that walks along a row, and a few rows of x and W meet in registers, so
// that what is loaded is used several times. With many, W's rows are the lanes: one chain after
// the other, tile() adds a few rows of x times WIDE_W rows of W, which were transposed for it. That
// is up to 1.3 times as fast, but transposing takes as long as some 15 rows of x.
//
// For attention, tile() adds a few queries times 16 keys, or weights times 16 elements of the
// values, as they lie in the cache; there a sum is one chain.

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
#define load_f16 ON_PATH(load_f16)
#define arrange ON_PATH(arrange)
#define tile_of ON_PATH(tile_of)
#define tile ON_PATH(tile)
#define transpose ON_PATH(transpose)
#define place_in_row ON_PATH(place_in_row)
#define pack_x ON_PATH(pack_x)
#define pack ON_PATH(pack)
#define sum_of_chains ON_PATH(sum_of_chains)
#define outputs_by_chains ON_PATH(outputs_by_chains)
#define Tile ON_PATH(Tile)
#define fetch ON_PATH(fetch)
#define multiply ON_PATH(multiply)
#define shorts ON_PATH(shorts)
#define load_shorts ON_PATH(load_shorts)
#define pairs ON_PATH(pairs)
#define round_row ON_PATH(round_row)
#define multiply_q8 ON_PATH(multiply_q8)
#define outputs_of ON_PATH(outputs_of)
#define outputs ON_PATH(outputs)
#define share_of_matmul ON_PATH(share_of_matmul)
#define exp_of ON_PATH(exp_of)
#define weigh ON_PATH(weigh)
#undef VECS
#undef TILE_X
#undef TILE_W
#undef ROWS
#undef IN_REGISTER
#undef BY_HALVES
#undef WIDE_W
#undef FEW
#undef EACH_LANE
#define TILE_X (ACCUMULATORS == 24 ? 4 : 3)     // rows of x that meet so many of W, at most
#define TILE_W (ACCUMULATORS / TILE_X)
// Fewer where widening takes registers that sums would need.
#define ROWS(type) (LANES == 8 && ((type) == BF16 || (type) == Q8) ? 3 : TILE_W)
#define WIDE_W (LANES == 16 ? 32 : 16)
// More rows of x are many: as measured on a Zen 3, never where the other way keeps up. Not measured
// for vectors of 16, where float32 alone had room to gain (74% of peak, other types 85% or more).
#define FEW(type) \
    ((type) == F32 || (LANES == 4 && (type) != Q8) ? 40 \
     : (type) == BF16 && LANES == 8 ? 64 : INT64_MAX)
#ifdef __x86_64__                       // else compilers read a vector anew for each of its uses
#define IN_REGISTER(v) __asm__("" : "+v"(v))
#else
#define IN_REGISTER(v) (void)(v)
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec pick(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

INLINE vec load(const float *p) { return *(const loose_vec *)p; }

// All lanes: the upper half is added to the lower one, until one is left.
INLINE float sum_of(vec v) {
#if LANES >= 8
#if LANES == 16
    __m256 w = _mm512_castps512_ps256(v) + (__m256)_mm512_extractf64x4_pd((__m512d)v, 1);
#else
    __m256 w = v;
#endif
    __m128 q = _mm256_castps256_ps128(w) + _mm256_extractf128_ps(w, 1);
    q += _mm_movehl_ps(q, q);
    return q[0] + q[1];
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
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

// LANES numbers of float16.
INLINE vec load_f16(const void *p) {
#if LANES == 16
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif LANES == 8
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128(p));
#elif defined __aarch64__
    typedef __fp16 halves __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
    return __builtin_convertvector(*(const halves *)p, vec);
#else
    const uint16_t *h = p;
    return (vec){from_f16(h[0]), from_f16(h[1]), from_f16(h[2]), from_f16(h[3])};
#endif
}

// LANES weights at p, of 16 bits or more. Where no instruction widens those of 16 it is every other
// of 2 * LANES, the even ones or (half = 1) the odd: a shift or a mask. x lies in that order.
#ifdef __aarch64__
#define BY_HALVES(type) ((type) == BF16)
#else
#define BY_HALVES(type) ((type) == BF16 || (LANES == 4 && (type) == F16))
#endif
INLINE vec load_weights(const char *p, const int half, const int type) {
    typedef int32_t loose_ivec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
    if (type == F32) return load((const void *)p);
    if (!BY_HALVES(type)) return load_f16(p);
    ivec both = *(const loose_ivec *)p, bits = half ? both & (int32_t)0xffff0000 : both << 16;
    if (type == BF16) return (vec)bits;
    vec f = (vec)(bits >> 3 & (int32_t)0x8fffe000) * 0x1p112f;      // see from_f16()
    return (vec)((ivec)f | ((((ivec)f & 0x7fffffff) >= 0x47800000) & 0x7f800000));
}

// Puts n columns of a row of x into that order; behind them is room for 2 * LANES.
static void arrange(float *x, int64_t n) {
    for (; n > 0; n -= 2 * LANES, x += 2 * LANES) {
        float odd[LANES];
        for (int l = 0; l < LANES; l++) odd[l] = x[2 * l + 1];
        for (int l = 0; l < LANES; l++) x[l] = x[2 * l];
        memcpy(x + LANES, odd, sizeof odd);
    }
}

// c[rows][wide] = or += a[rows][depth] . b[depth][wide].
INLINE void tile_of(const int rows, const int wide, float *c, int64_t ldc, const float *a,
                    int64_t lda, const float *b, int64_t ldb, int64_t depth, bool more) {
    vec sum[12][WIDE / 4];
    UNROLL for (int i = 0; i < rows; i++) {
        UNROLL for (int v = 0; v < wide / LANES; v++) {
            sum[i][v] = more ? load(c + i * ldc + v * LANES) : (vec){0};
        }
    }
    for (int64_t k = 0; k < depth; k++) {
        vec w[WIDE / 4];
        UNROLL for (int v = 0; v < wide / LANES; v++) w[v] = load(b + k * ldb + v * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            UNROLL for (int v = 0; v < wide / LANES; v++) sum[i][v] += a[i * lda + k] * w[v];
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        UNROLL for (int v = 0; v < wide / LANES; v++) {
            *(loose_vec *)(c + i * ldc + v * LANES) = sum[i][v];
        }
    }
}

// The same for any number of rows: as many at a time as fit into registers, or one less.
INLINE void tile(int64_t rows, const int wide, float *c, int64_t ldc, const float *a, int64_t lda,
                 const float *b, int64_t ldb, int64_t depth, bool more) {
    const int most = ACCUMULATORS * LANES / wide > 12 ? 12 : ACCUMULATORS * LANES / wide;
    for (int64_t n; rows > 0; rows -= n) {
        n = rows % most ? most - 1 : most;
        if (n > rows) n = rows >= 3 ? 3 : 1;
        if (n == most) tile_of(most, wide, c, ldc, a, lda, b, ldb, depth, more);
        else if (n == most - 1) tile_of(most - 1, wide, c, ldc, a, lda, b, ldb, depth, more);
        else if (n == 3) tile_of(3, wide, c, ldc, a, lda, b, ldb, depth, more);
        else tile_of(1, wide, c, ldc, a, lda, b, ldb, depth, more);
        c += n * ldc, a += n * lda;
    }
}

// Transposes v[LANES]: of every two vectors blocks of h lanes change places, h = 1, 2, 4, ...
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#define FOUR_LANES(f, h, l) f(h, l), f(h, (l) + 1), f(h, (l) + 2), f(h, (l) + 3)
#if LANES == 16
#define EACH_LANE(f, h) \
    FOUR_LANES(f, h, 0), FOUR_LANES(f, h, 4), FOUR_LANES(f, h, 8), FOUR_LANES(f, h, 12)
#elif LANES == 8
#define EACH_LANE(f, h) FOUR_LANES(f, h, 0), FOUR_LANES(f, h, 4)
#else
#define EACH_LANE(f, h) FOUR_LANES(f, h, 0)
#endif
#define OF_FIRST(h, l) ((l) & (h) ? LANES + (l) - (h) : (l))
#define OF_SECOND(h, l) (((l) & (h) ? LANES + (l) : (l) + (h)) % (2 * LANES))
#define EXCHANGE(h) \
    UNROLL for (int i = 0; i < LANES; i++) { \
        if (i & h || h >= LANES) continue; \
        vec a = v[i], b = v[(i + h) % LANES]; \
        v[i] = SHUFFLE(a, b, EACH_LANE(OF_FIRST, h)); \
        v[(i + h) % LANES] = SHUFFLE(a, b, EACH_LANE(OF_SECOND, h)); \
    }
INLINE void transpose(vec *v) { EXCHANGE(1) EXCHANGE(2) EXCHANGE(4) EXCHANGE(8) }

// Where in a row, as arrange() leaves it, the i-th elements of all chains lie: see multiply().
INLINE int64_t place_in_row(int64_t i, int64_t depth, const int type) {
    const int64_t some = 128 / LANES, first = i / some * some, j = i - first;
    int64_t half = (depth - first < some ? depth - first : some) / 2;
    if (!BY_HALVES(type)) return i * LANES;
    return (first + (j < half ? 2 * j : 2 * (j - half) + 1)) * LANES;
}

// to[LANES][depth] = the chains of a row of x.
static void pack_x(float *to, const float *x, int64_t depth, int type) {
    for (int64_t i = 0; i < depth; i += LANES) {
        vec v[LANES];
        for (int64_t l = 0; l < LANES; l++) {
            v[l] = i + l < depth ? load(x + place_in_row(i + l, depth, type)) : (vec){0};
        }
        transpose(v);
        for (int64_t l = 0; l < LANES; l++) store_some(to + l * depth + i, v[l], depth - i);
    }
}

// to[LANES][PACK / WIDE_W][depth][WIDE_W] = those of a panel of W, `lane` floats from one to the
// next. Rows that W lacks repeat its last one. Those behind are fetched meanwhile.
INLINE void pack(float *to, int64_t lane, const Block *p, int64_t depth, const int type) {
    for (int64_t r = 0; r < (p->rows + WIDE_W - 1) / WIDE_W * WIDE_W; r += LANES) {
        float *at = to + r / WIDE_W * depth * WIDE_W + r % WIDE_W;
        const char *w[LANES], *next = p->w + (r + LANES) * p->ldw;
        for (int64_t j = 0; j < LANES; j++) {
            w[j] = p->w + (r + j < p->rows ? r + j : p->rows - 1) * p->ldw;
        }
        for (int64_t i = 0; i < depth; i++, at += WIDE_W) {
            int64_t k = place_in_row(i, depth, type), half = BY_HALVES(type) ? k / LANES % 2 : 0;
            vec v[LANES];
            for (int b = 0; b < LANES * LANES * WEIGHT_BYTES(type); b += 64) {
                __builtin_prefetch(next + i * LANES * LANES * WEIGHT_BYTES(type) + b, 0, 2);
            }
            k = (k - half * LANES) * WEIGHT_BYTES(type);
            UNROLL for (int j = 0; j < LANES; j++) v[j] = load_weights(w[j] + k, (int)half, type);
            transpose(v);
            UNROLL for (int l = 0; l < LANES; l++) *(loose_vec *)(at + l * lane) = v[l];
        }
    }
}

// sums[n][PACK] = chains first, first + step and so on of n rows of x and a panel of W, both
// packed, added as sum_of() does. Behind sums is room for as many, for each doubling of step.
static void sum_of_chains(const Block *p, float *sums, int64_t first, int64_t step) {
    if (step < LANES) {
        float *others = sums + p->n * PACK;
        sum_of_chains(p, sums, first, 2 * step);
        sum_of_chains(p, others, first + step, 2 * step);
        for (int64_t i = 0; i < p->n * PACK; i++) sums[i] += others[i];
        return;
    }
    int64_t depth = 32 * p->groups / LANES;
    const float *w = (const float *)(const void *)p->w + first * p->ldw, *x = p->x + first * depth;
    for (int64_t k = 0; k < depth; k += DEPTH) {
        for (int64_t r = 0; r < p->rows; r += WIDE_W) {
            tile(p->n, WIDE_W, sums + r, PACK, x + k, p->ldx, w + r * depth + k * WIDE_W, WIDE_W,
                 depth - k < DEPTH ? depth - k : DEPTH, k > 0);
        }
    }
}

// Outputs of a panel of W and a chunk of many rows of x, which are packed.
static void outputs_by_chains(Block p) {
    int64_t depth = 32 * p.groups / LANES, lane = PACK * depth + PAD, n = p.n;
    float *packed = scratch(2, LANES * lane + 5 * PACK_X * PACK), *sums = packed + LANES * lane;
    switch (p.type) {
    case F32: pack(packed, lane, &p, depth, F32); break;
    case F16: pack(packed, lane, &p, depth, F16); break;
    case BF16: pack(packed, lane, &p, depth, BF16); break;
    }
    p.w = (const char *)packed, p.ldw = lane;
    for (int64_t i = 0; i < n; i += p.n, p.x += p.n * p.ldx) {
        p.n = n - i < PACK_X ? n - i : PACK_X;
        sum_of_chains(&p, sums, 0, 1);
        for (int64_t j = 0; j < p.n; j++) {
            float *y = p.y + (i + j) * p.ldy;
            for (int64_t r = 0; r < p.rows; r++) y[r] = sums[j * PACK + r] + p.bias[r];
        }
    }
}

typedef struct {                // n rows of x and m of W that meet in registers
    const float *x;             // [n][ldx], in the weights' order: see arrange(), round_row()
    int64_t ldx, depth, from, to;   // columns in all, and those to multiply
    const char *w[TILE_W];
    const uint16_t *scale[TILE_W];
    const char *next;           // what is fetched meanwhile: `step` bytes for every 32 columns
    int64_t step;
} Tile;

// Fetches what belongs beside so many columns.
INLINE void fetch(Tile *t, int64_t columns) {
    const char *end = t->next + columns / 32 * t->step;
    for (; t->next < end; t->next += 64) __builtin_prefetch(t->next, 0, 3);
    t->next = end;
}

// sum[n][m] += x . W^T, a chain in each lane, 128 columns at a time: of bfloat16 the even ones
// first, then the odd, in loops so short that compilers keep all sums in registers.
INLINE void multiply(vec (*sum)[TILE_W], Tile *t, const int n, const int m, const int type) {
    const int halves = BY_HALVES(type) ? 2 : 1;
    for (int64_t from = t->from, to; from < t->to; from = to) {
        to = from + 128 < t->to ? from + 128 : t->to;
        fetch(t, to - from);
        UNROLL for (int half = 0; half < halves; half++) {
            ROLLED for (int64_t k = from; k < to; k += halves * LANES) {
                vec a[TILE_X];
                UNROLL for (int i = 0; i < n; i++) {
                    a[i] = load(t->x + i * t->ldx + k + half * LANES);
                    IN_REGISTER(a[i]);
                }
                UNROLL for (int j = 0; j < m; j++) {
                    vec f = load_weights(t->w[j] + k * WEIGHT_BYTES(type), half, type);
                    IN_REGISTER(f);
                    UNROLL for (int i = 0; i < n; i++) sum[i][j] += a[i] * f;
                }
            }
        }
    }
}

// 8-bit weights are multiplied as integers, twice as many in a vector as floats, with x rounded to
// 16 bits. Of each 32 products only sums become floats, one for each chain, and are scaled.
typedef int16_t shorts __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

// 2 * LANES 8-bit weights.
INLINE shorts load_shorts(const char *p) {
#if LANES == 16
    return (shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)p));
#elif LANES == 8
    return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)p));
#else
    typedef int8_t bytes __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
    return __builtin_convertvector(*(const bytes *)p, shorts);
#endif
}

// The products of a and b, each added to its neighbour.
INLINE ivec pairs(shorts a, shorts b) {
#if LANES == 16
    return (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif LANES == 8
    return (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return ((ivec)a >> 16) * ((ivec)b >> 16) + ((ivec)a << 16 >> 16) * ((ivec)b << 16 >> 16);
#endif
}

// A row of x as 16-bit integers, [groups][32], and behind them a scale for each group. What is not
// finite makes its group's scale so.
static void round_row(float *out, const float *x, int64_t cols) {
    typedef int16_t few __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    int64_t groups = (cols + 31) / 32;
    for (int64_t g = 0; g < groups; g++) {
        float part[32] = {0}, most = 0;
        vec top = {0}, finite = {0};
        memcpy(part, x + 32 * g, (size_t)(cols - 32 * g < 32 ? cols - 32 * g : 32) * sizeof *x);
        for (int l = 0; l < 32; l += LANES) {
            vec v = load(part + l), size = (vec)((ivec)v & 0x7fffffff);
            top = pick(size > top, size, top);
            finite += 0 * v;
        }
        for (int l = 0; l < LANES; l++) most = top[l] > most ? top[l] : most;
        for (int l = 0; l < 32; l += LANES) {       // the sum with 0x1.8p23 rounds to an integer
            vec t = load(part + l) * (most > 0 ? 32767 / most : 0) + 0x1.8p23f;
            ivec rounded = (ivec)t - (ivec)(0x1.8p23f - (vec){0});
            few *to = (void *)((char *)out + 2 * (32 * g + l));
            *to = __builtin_convertvector(rounded, few);
        }
        out[16 * groups + g] = most / 32767 + sum_of(finite);
    }
}

// The same of rows that round_row() has made.
INLINE void multiply_q8(vec (*sum)[TILE_W], Tile *t, const int n, const int m) {
    float factor[TILE_X][TILE_W][LANES];
    for (int64_t g = t->from / 32; g < t->to / 32; g++) {
        fetch(t, 32);
        if (g % LANES == 0) {
            int64_t some = t->depth / 32 - g;       // scales, of this group and those behind it
            UNROLL for (int j = 0; j < m; j++) {
                uint16_t tail[LANES] = {0};
                if (some < LANES) memcpy(tail, t->scale[j] + g, (size_t)some * sizeof *tail);
                vec f = load_f16(some < LANES ? tail : t->scale[j] + g);
                UNROLL for (int i = 0; i < n; i++) {
                    *(loose_vec *)factor[i][j] = f * load(t->x + i * t->ldx + t->depth / 2 + g);
                }
            }
        }
        UNROLL for (int j = 0; j < m; j++) {
            shorts w[16 / LANES];
            UNROLL for (int l = 0; l < 16 / LANES; l++) {
                w[l] = load_shorts(t->w[j] + 32 * g + 2 * LANES * l);
            }
            UNROLL for (int i = 0; i < n; i++) {
                const shorts *x = (const void *)(t->x + i * t->ldx + 16 * g);
                ivec products = pairs(w[0], x[0]);
                UNROLL for (int l = 1; l < 16 / LANES; l++) products += pairs(w[l], x[l]);
                sum[i][j] += __builtin_convertvector(products, vec) * factor[i][j][g % LANES];
            }
        }
    }
}

// Outputs of n rows of x from i0 on, and m of W from r0 on, or their sums so far. Rows that W lacks
// repeat its last one. Meanwhile the next rows of W are fetched, a part of them beside each tile;
// but where little is done with much, it comes sooner by itself: float32 1.2 times on a Zen 3.
INLINE void outputs_of(const Block *p, int64_t i0, int64_t r0, int64_t tile, vec (*kept)[TILE_W],
                       const int n, const int m, const int type) {
    Tile t = {.x = p->x + i0 * p->ldx, .ldx = p->ldx, .depth = 32 * p->groups, .from = p->from,
              .to = p->to, .step = 32 * m * WEIGHT_BYTES(type) / p->tiles};
    if (LANES < 16 && 4 * n <= 3 * WEIGHT_BYTES(type)) t.step = 0;
    float *y = p->y + i0 * p->ldy + r0;
    vec sum[TILE_X][TILE_W];
    UNROLL for (int j = 0; j < m; j++) {
        int64_t at = r0 + j < p->rows ? r0 + j : p->rows - 1;
        t.w[j] = p->w + at * p->ldw;
        if (type == Q8) t.scale[j] = p->scale + at * p->groups;
        UNROLL for (int i = 0; i < n; i++) sum[i][j] = t.from ? kept[i][j] : (vec){0};
    }
    t.next = t.w[0] + (m == 1 ? AHEAD : m * p->ldw + tile * m * p->ldw / p->tiles);
    t.next += t.from / 32 * t.step;
    if (type == Q8) multiply_q8(sum, &t, n, m);
    else multiply(sum, &t, n, m, type);
    UNROLL for (int j = 0; j < m; j++) {
        UNROLL for (int i = 0; i < n; i++) {
            if (t.to < t.depth) kept[i][j] = sum[i][j];
            else if (r0 + j < p->rows) y[i * p->ldy + j] = sum_of(sum[i][j]) + p->bias[r0 + j];
        }
    }
}

// The same for all of the panel and the chunk, tile by tile: rows of W stay in the nearest cache
// while all rows of x pass. Rows of float32 are too long for it: in wide vectors, which would have
// to wait for them, they come in blocks. A single x meets long rows of W one by one, from end to
// end, where one sum at a time keeps up with memory: in wide vectors, and not of 8-bit weights.
static void outputs(Block p) {
    int64_t depth = 32 * p.groups, block = depth, least, some;
    bool one_by_one = p.n == 1 && LANES == 16 && p.type != Q8 && depth >= LONG;
    int64_t m = one_by_one ? 1 : p.n == 1 ? 4 : ROWS(p.type);
    vec kept[CHUNK / TILE_X + 1][TILE_X][TILE_W];
    p.tiles = (p.n + TILE_X - 1) / TILE_X;
    least = p.n / p.tiles;
    if (LANES == 16 && p.type == F32 && p.tiles > 1) block = BLOCK;
    for (int64_t r = 0; r < p.rows; r += m) {
        for (p.from = 0; p.from < depth; p.from = p.to) {
            p.to = p.from + block < depth ? p.from + block : depth;
            for (int64_t i = 0, t = 0; t < p.tiles; i += some, t++) {
                some = least + (t < p.n - least * p.tiles);
                switch (8 * p.type + (one_by_one ? 0 : some)) {
#define TILES(type) \
                case 8 * type: outputs_of(&p, 0, r, 0, kept[0], 1, 1, type); break; \
                case 8 * type + 1: outputs_of(&p, 0, r, 0, kept[0], 1, 4, type); break; \
                case 8 * type + 2: outputs_of(&p, i, r, t, kept[t], 2, ROWS(type), type); break; \
                case 8 * type + 3: outputs_of(&p, i, r, t, kept[t], 3, ROWS(type), type); break; \
                case 8 * type + 4: outputs_of(&p, i, r, t, kept[t], TILE_X, ROWS(type), type); break
                    TILES(F32); TILES(F16); TILES(BF16); TILES(Q8);
#undef TILES
                }
            }
        }
    }
}

// A thread's share of a matmul: of copying x first, padded and in the weights' order, or packed,
// then of the outputs, taken as they come. All threads call it, or one alone outside of any
// parallel region, where that costs nothing.
static void share_of_matmul(float *y, const float *x, const Tensor *w, int64_t n, float *copy,
                            int64_t ldx, int64_t *next) {
    static const float no_bias[PACK];
    const int type = w->type, bytes = WEIGHT_BYTES(type);
    const bool many = n > FEW(type);
    int64_t panel = many ? PACK : PANEL, chunk = many ? PACK_CHUNK : CHUNK;
    int64_t cols = w->cols, groups = (cols + 31) / 32, chunks = (n + chunk - 1) / chunk;
    int64_t panels = (w->rows + panel - 1) / panel;
    #pragma omp for
    for (int64_t i = 0; i < (copy ? n : 0); i++) {
        float *row = many ? scratch(1, ldx) : copy + i * ldx;
        pad_rows(row, 0, x + i * cols, 1, cols * 4, groups * 128);
        if (type == Q8) round_row(row, x + i * cols, cols);
        if (BY_HALVES(type)) arrange(row, 32 * groups);
        if (many) pack_x(copy + i * ldx, row, 32 * groups / LANES, type);
    }
    for (int64_t i; (i = take(next, panels * chunks)) < panels * chunks;) {
        int64_t group = i / (GROUP * chunks) * GROUP;       // its first panel
        int64_t inside = i - group * chunks, wide = panels - group < GROUP ? panels - group : GROUP;
        int64_t first = inside / wide * chunk, row = (group + inside % wide) * panel;
        Block p = {.type = type, .rows = w->rows - row < panel ? w->rows - row : panel,
                   .groups = groups, .w = (const char *)w->data + row * cols * bytes,
                   .scale = type == Q8 ? w->scale + row * groups : NULL,
                   .x = (copy ? copy : x) + first * ldx, .y = y + first * w->rows + row,
                   .bias = w->bias ? w->bias + row : no_bias,
                   .n = n - first < chunk ? n - first : chunk, .ldw = cols * bytes, .ldx = ldx,
                   .ldy = w->rows};
        if (cols % 32) {
            p.ldw = groups * 32 * bytes;
            float *padded = scratch(1, panel * groups * 32);
            p.w = pad_rows(padded, p.ldw, p.w, p.rows, cols * bytes, p.ldw);
        }
        if (many) outputs_by_chains(p);
        else outputs(p);
    }
}

static void ON_PATH(matmul)(float *y, const float *x, const Tensor *w, int64_t n) {
    bool ordered = w->type != Q8 && !BY_HALVES(w->type);        // rows of x can be used as they are
    bool copied = w->cols % 32 || !ordered || (n > 4 && w->type == F32) || n > FEW(w->type);
    int64_t ldx = copied ? (w->cols + 31) / 32 * 32 + PAD : w->cols, next[STRETCHES] = {0};
    float *copy = copied ? scratch(0, n * ldx) : NULL;
    TOGETHER(n * w->rows * w->cols / 4, share_of_matmul(y, x, w, n, copy, ldx, next));
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

// c[rows][stride] += p[rows][from .. to] . V[from .. to][stride]; the spans are one row of keys.
static void weigh(float *c, int64_t stride, const float *p, int64_t ldp, int64_t rows,
                  const Span *s, int64_t from, int64_t to) {
    for (int64_t start = 0; start < to; start += s++->count) {
        int64_t first = from > start ? from : start;
        int64_t last = to < start + s->count ? to : start + s->count;
        for (int64_t t = first; t < last; t += DEPTH) {     // they stay in the cache for all rows
            for (int64_t d = 0; d < stride; d += WIDE) {
                tile(rows, WIDE, c + d, stride, p + t, ldp, s->v + (t - start) * stride + d,
                     stride, last - t < DEPTH ? last - t : DEPTH, true);
            }
        }
    }
}

static void ON_PATH(attend)(float *out, const float *q, int64_t ld, int64_t n, int64_t group,
                            int64_t head_dim, const Span *spans, int64_t n_spans, int64_t past,
                            bool causal) {
    enum { SOME = 24 };                     // rows that read keys and values together
    float root = sqrtf((float)head_dim);
    int64_t stride = (head_dim + 15) / 16 * 16, lda = stride + 1;
    int64_t ldp = (past + n + 31) / 16 * 16 + 16, rows;
    float *p = scratch(1, SOME * (ldp + stride + lda)), *c = p + SOME * ldp, *a = c + SOME * stride;
    for (int64_t i0 = 0; i0 < n * group; i0 += rows) {
        rows = n * group - i0 < SOME ? n * group - i0 : SOME;
        int64_t last = (i0 + rows - 1) / group, most = causal ? past + last + 1 : past + n;
        for (int64_t i = 0; i < rows; i++) {
            const float *from = q + (i0 + i) / group * ld + (i0 + i) % group * head_dim;
            for (int64_t d = 0; d < head_dim; d++) a[i * lda + d] = from[d] / root;
        }
        const Span *s = spans;
        for (int64_t start = 0; s < spans + n_spans && start < most; start += s++->count) {
            int64_t keys = most - start < s->count ? most - start : s->count;
            for (int64_t t = 0; t < keys; t += WIDE) {
                tile(rows, WIDE, p + start + t, ldp, a, lda, s->k + t * head_dim, WIDE, head_dim,
                     false);
            }
        }
        float sums[SOME];
        for (int64_t i = 0; i < rows; i++) {        // softmax; keys that are not seen get weight 0
            int64_t seen = causal ? past + (i0 + i) / group + 1 : most;
            float *row = p + i * ldp, max = -INFINITY;
            vec sum = {0}, top = max - sum;
            for (int64_t t = seen; t < most + LANES; t++) row[t] = -INFINITY;
            for (int64_t t = 0; t < seen; t += LANES) {
                top = pick(load(row + t) > top, load(row + t), top);
            }
            for (int l = 0; l < LANES; l++) max = top[l] > max ? top[l] : max;
            for (int64_t t = 0; t < most; t += LANES) {
                vec e = exp_of(load(row + t) - max);
                *(loose_vec *)(row + t) = e;
                sum += e;
            }
            sums[i] = sum_of(sum);
        }
        int64_t least = causal ? past + i0 / group + 1 : most;      // what the first row sees
        memset(c, 0, (size_t)(rows * stride) * sizeof *c);
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
// 3c. Matrix products with AMX (skip on first reading), on Intel servers since 2023
// ------------------------------------------------------------------------------------------------
//
// One instruction multiplies tiles of bfloat16, 16 x 32 times 32 x 16, and adds to 16 x 16 float32.
// A float32 is split into two bfloat16, high and low, which hold 16 of its 24 bits:
//
//     W . x  =  Wh . xh  +  Wh . xl  +  Wl . xh      (Wl . xl is no more than the others' rounding)
//
// A float16 is such a sum too, and a bfloat16 a high part alone. With 8-bit weights the low part of
// x is left out: what they lost weighs more. Every output is summed along the columns in one order;
// rows are filled up to 32 with zeros, however few they are.

// Intrinsics of AMX came with gcc 11 and clang 12. The kernel has to be asked for the registers.
#if defined HAVE_AVX && defined __linux__ && \
    ((defined __clang__ && __clang_major__ >= 12) || (!defined __clang__ && __GNUC__ >= 11))
#define HAVE_AMX
#include <sys/syscall.h>
TARGET("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx2,fma,f16c")

enum {
    TILE_BF16 = 512,                                // bfloat16 in a tile: [16][32]
    AMX_DEPTH = 256,                                // columns of x and W that stay in the caches,
    AMX_GROUP = AMX_DEPTH / 32 * 2 * TILE_BF16,     // which for 16 rows are so many bfloat16
    AMX_PANEL = 256, AMX_CHUNK = 512                // rows of W that meet rows of x, at most
};

static void transpose_tile(float *t) {
    vec_avx512 v[16];
    UNROLL for (int i = 0; i < 16; i++) v[i] = load_avx512(t + i * 16);
    transpose_avx512(v);
    UNROLL for (int i = 0; i < 16; i++) *(loose_vec_avx512 *)(t + i * 16) = v[i];
}

// 16 neighbouring weights as float32 (8-bit ones without their scale).
INLINE vec_avx512 amx_load(const void *p, const int type) {
    if (type == Q8) return (vec_avx512)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
    if (type != BF16) return load_weights_avx512(p, 0, type);
    return (vec_avx512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16);
}

// Rows row .. row + 16 of W and AMX_DEPTH columns from k as tiles,
// [columns / 32][high, low][16][32], with zeros for what W lacks. A bfloat16 has no low part. The
// next columns are fetched meanwhile.
INLINE void amx_pack_of(uint16_t *to, const Tensor *w, int64_t row, int64_t k, const int type) {
    const int bytes = WEIGHT_BYTES(type);
    int64_t depth = w->cols - k < AMX_DEPTH ? w->cols - k : AMX_DEPTH;
    for (int i = 0; i < 16; i++, row++) {
        const char *from = (const char *)w->data + (row * w->cols + k) * bytes;
        for (int64_t c = 0; c < depth; c += 32) {
            uint16_t *high = to + c / 32 * 2 * TILE_BF16 + i * 32;
            char tail[32 * 4] = {0};
            const char *p = from + c * bytes;
            UNROLL for (int b = 0; b < 32 * bytes; b += 64) {
                __builtin_prefetch(p + AMX_DEPTH * bytes + b, 0, 2);
            }
            if (row >= w->rows) p = tail;
            else if (depth - c < 32) p = memcpy(tail, p, (size_t)((depth - c) * bytes));
            if (type == BF16) {
                memcpy(high, p, 64);
                continue;
            }
            vec_avx512 a = amx_load(p, type), b = amx_load(p + 16 * bytes, type);
            if (type == Q8 && row < w->rows) {
                int64_t group = row * ((w->cols + 31) / 32) + (k + c) / 32;
                vec_avx512 factor = _cvtsh_ss(w->scale[group]) - (vec_avx512){0};
                a *= factor, b *= factor;
            }
            _mm512_storeu_si512(high, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
            a -= amx_load(high, BF16);
            b -= amx_load(high + 16, BF16);
            _mm512_storeu_si512(high + TILE_BF16,
                                (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
        }
    }
}

static void amx_pack(uint16_t *to, const Tensor *w, int64_t row, int64_t k) {
    switch (w->type) {
    case F32: amx_pack_of(to, w, row, k, F32); break;
    case F16: amx_pack_of(to, w, row, k, F16); break;
    case BF16: amx_pack_of(to, w, row, k, BF16); break;
    case Q8: amx_pack_of(to, w, row, k, Q8); break;
    }
}

// c[2][2][16][16] = or += two groups of W times two groups of x, `tiles` of them along the columns.
static void amx_multiply(float *c, const uint16_t *w, const uint16_t *x, int64_t tiles, int type,
                         bool more) {
#define PRODUCTS() \
    { \
        _tile_dpbf16ps(0, 4, 6); \
        _tile_dpbf16ps(1, 4, 7); \
        _tile_dpbf16ps(2, 5, 6); \
        _tile_dpbf16ps(3, 5, 7); \
    }
#define FACTORS(first, second, p) \
    { \
        _tile_loadd(first, (p) + at, 64); \
        _tile_loadd(second, (p) + AMX_GROUP + at, 64); \
    }
    if (!more) memset(c, 0, 4 * 256 * sizeof *c);
    __asm__ volatile("" ::: "memory");              // gcc's _tile_loadd does not say that it reads
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + 256, 64);
    _tile_loadd(2, c + 512, 64);
    _tile_loadd(3, c + 768, 64);
    for (int64_t at = 0; at < tiles * 2 * TILE_BF16; at += 2 * TILE_BF16) {
        FACTORS(4, 5, w)
        if (type != Q8) {
            FACTORS(6, 7, x + TILE_BF16)
            PRODUCTS()
        }
        FACTORS(6, 7, x)
        PRODUCTS()
        if (type != BF16) {
            FACTORS(4, 5, w + TILE_BF16)
            PRODUCTS()
        }
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
#undef PRODUCTS
#undef FACTORS
}

// Outputs row .. row + rows of rows first .. first + some of the n of x, which is packed as
// [blocks of columns][groups of 16 rows].
static void amx_outputs(float *y, const uint16_t *x, const Tensor *w, int64_t n, int64_t first,
                        int64_t some, int64_t row, int64_t rows) {
    static const struct { uint8_t palette, start, zero[14]; uint16_t bytes[16]; uint8_t rows[16]; }
        shapes = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    int64_t groups = (n + 31) / 32 * 2;
    float *c = scratch(1, AMX_CHUNK * AMX_PANEL + AMX_PANEL / 16 * AMX_GROUP / 2), *block;
    uint16_t *packed = (uint16_t *)(void *)(c + AMX_CHUNK * AMX_PANEL);
    _tile_loadconfig(&shapes);
    for (int64_t k = 0; k < w->cols; k += AMX_DEPTH) {
        int64_t tiles = ((w->cols - k < AMX_DEPTH ? w->cols - k : AMX_DEPTH) + 31) / 32;
        for (int64_t r = 0; r < (rows + 31) / 32 * 32; r += 16) {
            amx_pack(packed + r / 16 * AMX_GROUP, w, row + r, k);
        }
        const uint16_t *from = x + (k / AMX_DEPTH * groups + first / 16) * AMX_GROUP;
        block = c;
        for (int64_t i = 0; i < some; i += 32, from += 2 * AMX_GROUP) {
            for (int64_t r = 0; r < rows; r += 32, block += 4 * 256) {
                amx_multiply(block, packed + r / 16 * AMX_GROUP, from, tiles, w->type, k > 0);
            }
        }
    }
    _tile_release();
    block = c;
    for (int64_t i = 0; i < some; i += 32) {
        for (int64_t r = 0; r < rows; r += 32) {
            for (int q = 0; q < 4; q++, block += 256) {     // a tile of outputs: [16 of W][16 of x]
                int64_t at = r + q / 2 * 16, left = rows - at;
                transpose_tile(block);
                for (int64_t j = i + q % 2 * 16, l = 0; l < 16 && j < some && left > 0; j++, l++) {
                    vec_avx512 sum = load_avx512(block + l * 16);
                    if (w->bias) sum += load_some_avx512(w->bias + row + at, left);
                    store_some_avx512(y + (first + j) * w->rows + row + at, sum, left);
                }
            }
        }
    }
}

static void share_of_matmul_amx(float *y, const float *x, const Tensor *w, int64_t n,
                                uint16_t *packed, int64_t *next) {
    int64_t groups = (n + 31) / 32 * 2, blocks = (w->cols + AMX_DEPTH - 1) / AMX_DEPTH;
    int64_t chunks = (n + AMX_CHUNK - 1) / AMX_CHUNK, panel = n <= CHUNK ? 32 : AMX_PANEL;
    while (panel > 32 && w->rows / panel * chunks < 8) panel /= 2;      // work for all threads
    int64_t panels = (w->rows + panel - 1) / panel;
    const Tensor rows = {.type = F32, .rows = n, .cols = w->cols, .data = x};
    #pragma omp for
    for (int64_t i = 0; i < blocks * groups; i++) {
        int64_t k = i / groups * AMX_DEPTH, left = (w->cols - k + 31) / 32 * 2 * TILE_BF16;
        uint16_t *to = packed + i * AMX_GROUP;
        amx_pack(to, &rows, i % groups * 16, k);
        for (int64_t t = 0; t < AMX_GROUP && t < left; t += TILE_BF16) {
            transpose_tile((float *)(void *)(to + t));      // as second factors have to stand, rows
        }                                                   // and pairs of columns change places
    }
    for (int64_t i; (i = take(next, panels * chunks)) < panels * chunks;) {
        int64_t first = i % chunks * AMX_CHUNK, row = i / chunks * panel;
        amx_outputs(y, packed, w, n, first, n - first < AMX_CHUNK ? n - first : AMX_CHUNK, row,
                    w->rows - row < panel ? w->rows - row : panel);
    }
}

static void matmul_amx(float *y, const float *x, const Tensor *w, int64_t n) {
    int64_t groups = (n + 31) / 32 * 2, blocks = (w->cols + AMX_DEPTH - 1) / AMX_DEPTH;
    uint16_t *packed = (uint16_t *)(void *)scratch(0, blocks * groups * AMX_GROUP / 2);
    int64_t next[STRETCHES] = {0};
    TOGETHER(n * w->rows * w->cols / 4, share_of_matmul_amx(y, x, w, n, packed, next));
}
END_TARGET
#endif

// ------------------------------------------------------------------------------------------------
// 3d. Choosing the kernels
// ------------------------------------------------------------------------------------------------

typedef void Matmul(float *y, const float *x, const Tensor *w, int64_t n);
typedef void Attend(float *out, const float *q, int64_t ld, int64_t n, int64_t group,
                    int64_t head_dim, const Span *spans, int64_t n_spans, int64_t past,
                    bool causal);
typedef void SiluMultiply(float *gate, const float *up, int64_t n);
typedef void Gelu(float *x, int64_t n);

enum { AMX_LEVEL = 3 };

typedef struct {                // one way to compute all this; the last that the CPU has is taken
    const char *name;
    int level;                  // of the CPU: -1 any; 0 rounds every result to float32, which the
                                // x87 does not; 1 has AVX2, FMA and F16C, 2 the first of AVX-512,
                                // AMX_LEVEL AMX
    Matmul *matmul;
    Attend *attend;
    SiluMultiply *silu_multiply;
    Gelu *gelu;
} Kernels;

static const Kernels kernel_table[] = {
    {"plain", -1, plain_matmul, plain_attend, plain_silu_multiply, plain_gelu},
    {"generic", 0, matmul_generic, attend_generic, silu_multiply_generic, gelu_generic},
#ifdef HAVE_AVX
    {"avx2", 1, matmul_avx2, attend_avx2, silu_multiply_avx2, gelu_avx2},
    {"avx512", 2, matmul_avx512, attend_avx512, silu_multiply_avx512, gelu_avx512},
#endif
#ifdef HAVE_AMX
    {"amx", AMX_LEVEL, matmul_amx, attend_avx512, silu_multiply_avx512, gelu_avx512},
#endif
};
enum { N_KERNELS = sizeof kernel_table / sizeof *kernel_table };

// Those in use.
static const Kernels *kernels = &kernel_table[0];
static Matmul *matmul = plain_matmul;
static Attend *attend = plain_attend;
static SiluMultiply *silu_multiply = plain_silu_multiply;
static Gelu *gelu = plain_gelu;

static const char *kernels_name(void) { return kernels->name; }

static void kernels_use(const Kernels *k) {
    kernels = k;
    matmul = k->matmul;
    attend = k->attend;
    silu_multiply = k->silu_multiply;
    gelu = k->gelu;
}

// Has this CPU what entry i of the table needs?
static bool kernels_available(int i) {
    int level = FLT_EVAL_METHOD == 0 ? 0 : -1;
#ifdef HAVE_AVX
    unsigned a, b, c, d;
    __builtin_cpu_init();
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    if (f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = 1;
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    if (level == 1 && wide) level = 2;
#ifdef HAVE_AMX
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & d >> 24 & 1);
    bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    if (level == 2 && tiles && bf16) {
        level += !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
    }
#endif
#endif
    return kernel_table[i].level <= level;
}

// Chooses a path by name, or the fastest one this CPU has when name is NULL. For tokens one by one
// that is not AMX: its tiles would stay empty, and packing the weights would take longer than their
// way from memory.
static void kernels_init(const char *name, bool one_by_one) {
    for (int i = N_KERNELS - 1; i >= 0; i--) {
        if (!kernels_available(i) || (name && strcmp(name, kernel_table[i].name))) continue;
        if (!name && one_by_one && kernel_table[i].level == AMX_LEVEL) continue;
        kernels_use(&kernel_table[i]);
        return;
    }
    die("--kernels: this CPU has no \"%s\"; leave the flag out, or use plain", name ? name : "");
}

// ------------------------------------------------------------------------------------------------
// 4. Layers and the forward pass
// ------------------------------------------------------------------------------------------------

// A batch is ragged: rows of tokens from many sequences, no padding, one matmul over all rows. A
// sequence owns a segment of keys and values, and may have a parent whose rows come before its own:
// the choices of a question are children of its context, and read its keys instead of computing
// them again.
enum {
    MAX_DEPTH = 8,              // a sequence and its ancestors
    RUN = 32                    // neighbouring rows of a sequence that attention takes together
};

typedef struct {
    int parent, depth;          // index of the sequence that comes before, or -1; 1 without one
    int64_t start, end;         // positions of its first token and behind its last
    int64_t capacity;           // tokens there is room for, a multiple of 16
    int64_t n_slots;            // places of the schedule that keep their keys and values. 1: they
                                // are read in this pass only, and one slot serves every layer
    int64_t bytes;              // of its keys and values:
    float *data;                // [n_slots][kv_heads] x { K [capacity/16][head_dim][16],
                                //                         V [capacity][value_stride] }
} Sequence;

typedef struct {
    int id, segment, sequence;  // segment: BERT's token type
    int64_t position;
} Token;

typedef struct {                // the rows that the next pass runs
    Token *tokens;              // [n_rows]
    int64_t *first;             // [n_runs + 1]: run i is rows first[i] to first[i + 1]
    int64_t n_rows, n_runs;
    int64_t n_pairs;            // of a row and a key that it sees
} Batch;

typedef struct {                // everything a forward pass needs beside the model
    const Model *model;
    bool kv_mean;               // --kv mean: one slot per parallel step (SPEC: the public code)
    Sequence *sequences;
    int64_t n_sequences;
    Batch batch;
    float *x, *y, *mean;                        // [rows][dim]: the residual stream before a layer,
                                                // behind it, and the mean of a step's layers
    float *h;                                   // [rows][dim]: input or output of half a layer
    float *q, *att;                             // [rows][heads * head_dim]
    float *k, *v, *k_mean, *v_mean;             // [rows][kv_heads * head_dim]
    float *gate, *up;                           // [rows][hidden]
    float *rope;                                // [rows][head_dim / 2][2]: cosine and sine
    float *work;                                // what all these are pieces of,
    int64_t work_rows, work_bytes;              // and the rows there is room for
    int64_t layer_passes;                       // layers run so far
} Session;

static int64_t value_stride(const Model *m) { return (m->head_dim + 15) / 16 * 16; }

static Session *session_new(const Model *m) {
    Session *s = allocate(1, sizeof *s, "session");
    s->model = m;
    return s;
}

static void session_free(Session *s) {
    int64_t n = allocated(s->sequences) / (int64_t)sizeof *s->sequences;    // used and forgotten
    for (int64_t i = 0; i < n; i++) release(s->sequences[i].data);
    release(s->sequences);
    release(s->batch.tokens);
    release(s->batch.first);
    release(s->work);
    release(s);
}

// Ends a pass: the batch's rows stay with their sequences, and the batch is empty.
static void batch_commit(Session *s) { s->batch.n_rows = s->batch.n_runs = s->batch.n_pairs = 0; }

// Forgets all sequences from index `keep` on.
static void session_reset(Session *s, int64_t keep) {
    s->n_sequences = keep;
    batch_commit(s);
}

// A new sequence behind `parent` (-1: none) with room for `capacity` tokens in each of its slots.
static int sequence_new(Session *s, int parent, int64_t capacity, int64_t n_slots) {
    const Model *m = s->model;
    int64_t width = m->n_kv_heads * (m->head_dim + value_stride(m));
    s->sequences = grow(s->sequences, s->n_sequences + 1, sizeof *s->sequences, "sequences");
    const Sequence *p = parent < 0 ? NULL : &s->sequences[parent];
    Sequence *q = &s->sequences[s->n_sequences];
    q->parent = parent;
    q->depth = p ? p->depth + 1 : 1;
    if (q->depth > MAX_DEPTH) die("a sequence has over %d ancestors; put them into one", MAX_DEPTH);
    q->start = q->end = p ? p->end : 0;
    q->capacity = (capacity + 15) / 16 * 16;
    q->n_slots = n_slots;
    q->bytes = q->capacity * n_slots * width * (int64_t)sizeof *q->data;
    float *data = allocate(q->capacity * n_slots, width * (int64_t)sizeof *data, "key/value cache");
    release(q->data);
    q->data = data;
    return (int)s->n_sequences++;
}

// Gives back the memory of a sequence that nobody reads any more.
static void sequence_close(Session *s, int i) {
    release(s->sequences[i].data);
    s->sequences[i].data = NULL;
    s->sequences[i].bytes = 0;
}

// Adds a token to the batch and to its sequence. The rows of a sequence stand together, and those
// of a parent come before its children's. `segment` is BERT's token type.
static void batch_add(Session *s, int sequence, int token, int segment) {
    const Model *m = s->model;
    Sequence *q = &s->sequences[sequence];
    Batch *b = &s->batch;
    if (token < 0 || token >= m->vocab_size) {
        die("token %d is out of range; the model knows 0 to %d", token, m->vocab_size - 1);
    }
    if (q->end >= m->max_length) {
        die("the text is longer than the model's context of %d tokens; shorten it", m->max_length);
    }
    if (q->end - q->start >= q->capacity) {
        die("sequence %d is full: it has room for %lld tokens; give it more", sequence,
            (long long)q->capacity);
    }
    if (m->arch == BERT && (segment < 0 || segment >= m->n_segments)) {
        die("segment %d is out of range; the model knows 0 to %d", segment, m->n_segments - 1);
    }
    b->tokens = grow(b->tokens, b->n_rows + 1, sizeof *b->tokens, "batch");
    b->first = grow(b->first, b->n_runs + 2, sizeof *b->first, "batch");
    bool goes_on = b->n_rows && b->tokens[b->n_rows - 1].sequence == sequence &&
                   b->n_rows - b->first[b->n_runs - 1] < RUN;
    if (!goes_on) b->n_runs++;
    b->tokens[b->n_rows++] = (Token){token, segment, sequence, q->end++};
    b->first[b->n_runs] = b->n_rows;
    b->n_pairs += q->end;
}

// The keys of one KV head in a slot of a sequence; its values follow behind capacity * head_dim.
static float *cache_at(const Session *s, const Sequence *q, int64_t slot, int64_t head) {
    const Model *m = s->model;
    if (q->n_slots == 1) slot = 0;
    return q->data + (slot * m->n_kv_heads + head) * q->capacity * (m->head_dim + value_stride(m));
}

// Writes the rows' keys and values into the cache: keys in blocks of 16 positions, transposed, so
// that attention reads 16 keys at a time (Span, section 3).
static void cache_store(Session *s, int64_t slot, const float *k, const float *v) {
    const Model *m = s->model;
    int64_t d = m->head_dim, width = m->n_kv_heads * d;
    #pragma omp for
    for (int64_t r = 0; r < s->batch.n_rows; r++) {
        const Token *token = &s->batch.tokens[r];
        const Sequence *q = &s->sequences[token->sequence];
        int64_t at = token->position - q->start;
        for (int head = 0; head < m->n_kv_heads; head++) {
            float *keys = cache_at(s, q, slot, head), *values = keys + q->capacity * d;
            int64_t from = r * width + head * d;
            for (int64_t i = 0; i < d; i++) keys[at / 16 * 16 * d + i * 16 + at % 16] = k[from + i];
            memcpy(values + at * value_stride(m), v + from, (size_t)d * sizeof *v);
        }
    }
}

// Attention of all rows over the keys and values of their sequences and ancestors: s->q in, s->att
// out. One piece of work is a run and a KV head, with the query heads that share it.
static void attention(Session *s, int64_t slot) {
    const Model *m = s->model;
    const Batch *b = &s->batch;
    int64_t group = m->n_heads / m->n_kv_heads, ld = (int64_t)m->n_heads * m->head_dim;
    cache_store(s, slot, s->k, s->v);
    #pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < b->n_runs * m->n_kv_heads; piece++) {
        int64_t run = b->n_runs - 1 - piece / m->n_kv_heads;    // rows that see most come first
        int64_t row = b->first[run], n = b->first[run + 1] - row, head = piece % m->n_kv_heads;
        int64_t at = row * ld + head * group * m->head_dim;
        const Sequence *own = &s->sequences[b->tokens[row].sequence];
        Span spans[MAX_DEPTH], *span = spans + MAX_DEPTH;
        int64_t end = own->end;         // of a parent is read what is before its child's start
        for (const Sequence *q = own; q; q = q->parent < 0 ? NULL : &s->sequences[q->parent]) {
            const float *keys = cache_at(s, q, slot, head);
            *--span = (Span){keys, keys + q->capacity * m->head_dim, end - q->start};
            end = q->start;
        }
        bool causal = m->arch == LLAMA;         // in BERT every row sees the whole sequence
        attend(s->att + at, s->q + at, ld, n, group, m->head_dim, span, own->depth,
               causal ? b->tokens[row].position : own->end - n, causal);
    }
}

// RMSNorm (Zhang and Sennrich 2019) of n rows: out = x / rms(x) * weight.
ONE_COPY static void rms_norm(float *out, const float *x, const Tensor *norm, const Model *m,
                              int64_t n) {
    const float *weight = norm->data;
    int64_t d = m->dim;
    #pragma omp for
    for (int64_t r = 0; r < n; r++) {
        const float *in = x + r * d;
        float scale = 1.0f / sqrtf(dot(in, in, d) / (float)d + m->norm_eps);
        for (int64_t i = 0; i < d; i++) out[r * d + i] = weight[i] * (in[i] * scale);
    }
}

// LayerNorm (Ba et al. 2016) of n rows, in place: x = (x - mean) / deviation * weight + bias.
ONE_COPY static void layer_norm(float *x, const Tensor *norm, const Model *m, int64_t n) {
    const float *weight = norm->data, *bias = norm->bias;
    int64_t d = m->dim;
    #pragma omp for
    for (int64_t r = 0; r < n; r++) {
        float *row = x + r * d;
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < d; i++) mean += row[i];
        mean /= (double)d;
        for (int64_t i = 0; i < d; i++) variance += (row[i] - mean) * (row[i] - mean);
        float scale = (float)(1.0 / sqrt(variance / (double)d + m->norm_eps)), middle = (float)mean;
        for (int64_t i = 0; i < d; i++) row[i] = (row[i] - middle) * scale * weight[i] + bias[i];
    }
}

// Rotary position embedding (Su et al. 2021) of n_heads heads in each row, in place.
ONE_COPY static void rotate(const Session *s, float *x, int n_heads) {
    const Model *m = s->model;
    int64_t half = m->head_dim / 2, width = (int64_t)n_heads * m->head_dim;
    int64_t step = m->rope == ROPE_PAIRS ? 2 : 1, other = m->rope == ROPE_PAIRS ? 1 : half;
    #pragma omp for
    for (int64_t r = 0; r < s->batch.n_rows; r++) {
        const float *turn = s->rope + r * m->head_dim;
        for (float *head = x + r * width; head < x + (r + 1) * width; head += m->head_dim) {
            for (int64_t i = 0; i < half; i++) {
                float a = head[i * step], b = head[i * step + other];
                head[i * step] = a * turn[2 * i] - b * turn[2 * i + 1];
                head[i * step + other] = b * turn[2 * i] + a * turn[2 * i + 1];
            }
        }
    }
}

static void add(float *sum, const float *a, const float *b, int64_t n) {
    #pragma omp for
    for (int64_t i = 0; i < n; i++) sum[i] = a[i] + b[i];
}

// The activation of the feed-forward layers, of all rows. The loop is here, not in the kernels, so
// that compilers round alike with OpenMP and without.
static void activate(Session *s) {
    int64_t hidden = s->model->hidden;
    #pragma omp for
    for (int64_t r = 0; r < s->batch.n_rows; r++) {
        float *gate = s->gate + r * hidden, *up = s->up + r * hidden;
        if (s->model->arch == LLAMA) silu_multiply(gate, up, hidden);
        else gelu(up, hidden);
    }
}

// One layer on all rows of the batch: s->x in, s->y out. It knows neither schedule nor task.
//     a = x + attention(norm(x))        y = a + feed_forward(norm(a))
static void llama_layer(Session *s, const Layer *l, int64_t slot) {
    const Model *m = s->model;
    int64_t n = s->batch.n_rows, size = n * m->dim;
    TOGETHER(size, rms_norm(s->h, s->x, &l->attn_norm, m, n));
    matmul(s->q, s->h, &l->q, n);
    matmul(s->k, s->h, &l->k, n);
    matmul(s->v, s->h, &l->v, n);
    TOGETHER(size, rotate(s, s->q, m->n_heads));
    TOGETHER(size, rotate(s, s->k, m->n_kv_heads));
    TOGETHER(s->batch.n_pairs * m->n_heads * m->head_dim, attention(s, slot));
    matmul(s->h, s->att, &l->o, n);
    TOGETHER(size, add(s->y, s->x, s->h, size));

    TOGETHER(size, rms_norm(s->h, s->y, &l->ffn_norm, m, n));
    matmul(s->gate, s->h, &l->gate, n);
    matmul(s->up, s->h, &l->up, n);
    TOGETHER(n * m->hidden, activate(s));
    matmul(s->h, s->gate, &l->down, n);
    TOGETHER(size, add(s->y, s->y, s->h, size));
}

// The same for BERT, which normalises behind each sum, has biases, and looks both ways:
//     a = norm(x + attention(x))        y = norm(a + feed_forward(a))
static void bert_layer(Session *s, const Layer *l, int64_t slot) {
    const Model *m = s->model;
    int64_t n = s->batch.n_rows, size = n * m->dim;
    matmul(s->q, s->x, &l->q, n);
    matmul(s->k, s->x, &l->k, n);
    matmul(s->v, s->x, &l->v, n);
    TOGETHER(s->batch.n_pairs * m->n_heads * m->head_dim, attention(s, slot));
    matmul(s->h, s->att, &l->o, n);
    TOGETHER(size, add(s->y, s->x, s->h, size));
    TOGETHER(size, layer_norm(s->y, &l->attn_norm, m, n));

    matmul(s->up, s->y, &l->up, n);
    TOGETHER(n * m->hidden, activate(s));
    matmul(s->h, s->up, &l->down, n);
    TOGETHER(size, add(s->y, s->y, s->h, size));
    TOGETHER(size, layer_norm(s->y, &l->ffn_norm, m, n));
}

// Takes x into a mean, as number i of n: they are added in their order, and the last one divides.
ONE_COPY static void average(float *mean, const float *x, int64_t size, int64_t i, int64_t n) {
    #pragma omp for
    for (int64_t j = 0; j < size; j++) {
        float sum = i == 0 ? x[j] : mean[j] + x[j];
        mean[j] = i == n - 1 ? sum / (float)n : sum;
    }
}

// Step i of a schedule: the mean of what its layers make of x, in the order they are named, becomes
// the new x. Under --kv mean they share a slot: each layer reads its own keys and values of this
// pass's rows there, and at the end it holds the mean of the group.
static void run_step(Session *s, const Schedule *schedule, int64_t i) {
    const Model *m = s->model;
    int64_t first = schedule->first[i], n = schedule->first[i + 1] - first;
    int64_t size = s->batch.n_rows * m->dim, kv = s->batch.n_rows * m->n_kv_heads * m->head_dim;
    void (*layer)(Session *, const Layer *, int64_t) = m->arch == LLAMA ? llama_layer : bert_layer;
    for (int64_t j = 0; j < n; j++) {
        layer(s, &m->layers[schedule->layer[first + j]], s->kv_mean ? i : first + j);
        s->layer_passes++;
        TOGETHER(size, average(s->mean, s->y, size, j, n));
        if (!s->kv_mean) continue;
        TOGETHER(kv, average(s->k_mean, s->k, kv, j, n));
        TOGETHER(kv, average(s->v_mean, s->v, kv, j, n));
    }
    if (s->kv_mean) TOGETHER(kv, cache_store(s, i, s->k_mean, s->v_mean));
    float *x = s->x;
    s->x = s->mean;
    s->mean = x;
}

// Slots of the cache that a schedule takes.
static int64_t schedule_slots(const Session *s, const Schedule *schedule) {
    return s->kv_mean ? schedule->n_steps : schedule->n_slots;
}

// Gives the working memory room for the rows of the batch.
static void session_room(Session *s) {
    const Model *m = s->model;
    int64_t d = m->dim, q = (int64_t)m->n_heads * m->head_dim, hidden = m->hidden;
    int64_t kv = (int64_t)m->n_kv_heads * m->head_dim, width = 0;
    int64_t n = (s->batch.n_rows + 15) / 16 * 16;
    const struct { float **p; int64_t width; } pieces[] = {
        {&s->x, d}, {&s->y, d}, {&s->mean, d}, {&s->h, d}, {&s->q, q}, {&s->att, q}, {&s->k, kv},
        {&s->v, kv}, {&s->k_mean, kv}, {&s->v_mean, kv}, {&s->gate, hidden}, {&s->up, hidden},
        {&s->rope, m->head_dim}};
    enum { PIECES = sizeof pieces / sizeof *pieces };
    for (int i = 0; i < PIECES; i++) width += pieces[i].width;
    if (n > s->work_rows) {
        float *work = allocate(n, width * (int64_t)sizeof *work, "activations of a batch");
        release(s->work);
        s->work = work;
        s->work_rows = n;
        s->work_bytes = n * width * (int64_t)sizeof *work;
    }
    float *at = s->work;
    for (int i = 0; i < PIECES; at += n * pieces[i++].width) *pieces[i].p = at;
}

// The rows' embeddings in s->x, and how far their positions turn.
static void embed_rows(Session *s) {
    const Model *m = s->model;
    int64_t d = m->dim, half = m->head_dim / 2;
    #pragma omp for
    for (int64_t r = 0; r < s->batch.n_rows; r++) {
        const Token *token = &s->batch.tokens[r];
        float *x = s->x + r * d, *position = s->y + r * d, *segment = s->h + r * d;
        widen(x, &m->embed, token->id);
        for (int64_t i = 0; i < half && m->arch == LLAMA; i++) {
            double angle = (double)((float)token->position * m->rope_frequency[i]);
            s->rope[(r * half + i) * 2] = (float)cos(angle);
            s->rope[(r * half + i) * 2 + 1] = (float)sin(angle);
        }
        if (m->arch == LLAMA) continue;
        widen(segment, &m->segments, token->segment);
        widen(position, &m->positions, token->position);
        for (int64_t i = 0; i < d; i++) x[i] = x[i] + segment[i] + position[i];
    }
}

// Starts a pass.
static void embed(Session *s) {
    const Model *m = s->model;
    int64_t n = s->batch.n_rows, size = n * m->dim;
    session_room(s);
    TOGETHER(size, embed_rows(s));
    if (m->arch == BERT) TOGETHER(size, layer_norm(s->x, &m->embed_norm, m, n));
}

// Runs the rows of the batch through the steps of a schedule. After each, s->x holds their hidden
// states, [rows][dim], before the final norm; logits() and batch_commit() usually follow.
static void forward(Session *s, const Schedule *schedule) {
    embed(s);
    for (int64_t i = 0; i < schedule->n_steps; i++) run_step(s, schedule, i);
}

// A copy of chosen rows of x, [n][dim], and behind it room for as much again.
static float *pick_rows(const Session *s, const int64_t *rows, int64_t n) {
    int64_t d = s->model->dim;
    float *picked = allocate(2 * n * d, sizeof *picked, "rows to score");
    for (int64_t i = 0; i < n; i++) {
        memcpy(picked + i * d, s->x + rows[i] * d, (size_t)d * sizeof *picked);
    }
    return picked;
}

// The output distribution of chosen rows of x, before softmax: Llama's head or BERT's masked-LM
// head. out: [n][vocab].
static void logits(Session *s, const int64_t *rows, int64_t n, float *out) {
    const Model *m = s->model;
    if (m->arch == BERT && !m->mlm.data) {
        die("%s: has no masked-LM head; export a checkpoint with one", m->path);
    }
    float *x = pick_rows(s, rows, n), *h = x + n * m->dim;
    if (m->arch == LLAMA) {
        TOGETHER(n * m->dim, rms_norm(h, x, &m->norm, m, n));
        matmul(out, h, &m->output, n);
    } else {
        matmul(h, x, &m->mlm, n);
        gelu(h, n * m->dim);
        TOGETHER(n * m->dim, layer_norm(h, &m->mlm_norm, m, n));
        matmul(out, h, &m->mlm_out, n);
    }
    release(x);
}

// BERT's pooled output of chosen rows (those of [CLS]): tanh of a dense layer. out: [n][dim].
static void pooled(Session *s, const int64_t *rows, int64_t n, float *out) {
    const Model *m = s->model;
    if (!m->pooler.data) die("%s: has no pooler; export a checkpoint with one", m->path);
    float *x = pick_rows(s, rows, n);
    matmul(out, x, &m->pooler, n);
    for (int64_t i = 0; i < n * m->dim; i++) out[i] = tanhf(out[i]);
    release(x);
}

// 8-bit weights: groups of 32 along a row share a scale, the largest magnitude over 127.

// float16 nearest to f, which is not negative; infinity where that is too large.
static uint16_t to_f16(float f) {
    int exponent;
    if (!(f < 65520)) return 0x7c00;
    frexpf(f, &exponent);
    if (f < 0x1p-14f) exponent = -13;           // subnormal, or zero
    return (uint16_t)(((exponent + 13) << 10) + lrintf(ldexpf(f, 11 - exponent)));
}

// One row in 8 bits. squares[0] becomes the sum of the squares of what is lost, squares[1] that of
// the weights; they are no numbers where a weight is none, or too large.
static void quantize_row(int8_t *q, uint16_t *scale, const float *x, int64_t n, double *squares) {
    squares[0] = squares[1] = 0;
    for (int64_t from = 0; from < n; from += 32) {
        int64_t to = n - from < 32 ? n : from + 32;
        float largest = 0;
        for (int64_t i = from; i < to; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
        scale[from / 32] = to_f16(largest / 127);
        float step = from_f16(scale[from / 32]);
        for (int64_t i = from; i < to; i++) {
            float steps = step > 0 ? x[i] / step : 0;
            q[i] = (int8_t)lrintf(steps > 127 ? 127 : steps < -127 ? -127 : steps);
            double lost = (double)x[i] - (double)(step * q[i]);
            squares[0] += lost * lost;
            squares[1] += (double)x[i] * (double)x[i];
        }
    }
}

// A matrix in 8 bits, as files hold it. *error becomes the root of the mean squared error over that
// of the weights.
static char *quantize(const Tensor *w, double *error) {
    int64_t n = w->cols, groups = (n + 31) / 32;
    char *out = allocate(stored_bytes(Q8, w->rows, n), 1, "8-bit weights");
    uint16_t *scale = (void *)(out + (w->rows * n + 63) / 64 * 64);
    double *squares = allocate(w->rows, 2 * sizeof *squares, "errors"), sum[2] = {0};
    #pragma omp parallel for if (w->rows * n > WORTH_THREADS)
    for (int64_t r = 0; r < w->rows; r++) {
        float *x = allocate(n, sizeof *x, "a row of weights");
        widen(x, w, r);
        quantize_row((int8_t *)out + r * n, scale + r * groups, x, n, squares + 2 * r);
        release(x);
    }
    for (int64_t i = 0; i < 2 * w->rows; i++) sum[i % 2] += squares[i];
    release(squares);
    *error = sum[1] > 0 ? sqrt(sum[0] / sum[1]) : sum[0];
    return out;
}

// Writes the model to `path` with every matrix in 8 bits and all else as it is, and prints what
// each lost. The file grows under another name and takes its own at the end.
static void model_quantize(const Model *m, const char *path) {
    int64_t header_bytes = read_i64(m->file + 24), end = header_bytes;
    unsigned char *header = allocate(header_bytes, 1, "header");
    memcpy(header, m->file, (size_t)header_bytes);
    Text aside = {0};
    check_output(path);
    text_printf(&aside, "%s.tmp", path);
    FILE *f = open_output(aside.s, "wb");
    fwrite(header, 1, (size_t)header_bytes, f);         // keeps the place of what it becomes
    printf("%-24s %8s x %-8s  relative error\n", "matrix", "rows", "columns");
    const char *bad = NULL;
    for (int i = 0; i < m->n_tensors && !bad && !ferror(f); i++) {
        const Tensor *w = &m->tensors[i];
        const char *name = tensor_name(m, i);
        unsigned char *entry = header + (name - (const char *)m->file);
        uint32_t type = read_u32(entry + 60) == 2 ? Q8 : (uint32_t)w->type;
        int64_t bytes = stored_bytes((int)type, w->rows, w->cols), padded = (bytes + 63) / 64 * 64;
        char *q8 = NULL;
        if (type == Q8 && w->type != Q8) {
            double error;
            q8 = quantize(w, &error);
            printf("%-24s %8lld x %-8lld  %.5f\n", name, (long long)w->rows, (long long)w->cols,
                   error);
            if (!(error < INFINITY)) bad = name;
        }
        fwrite(q8 ? q8 : w->data, 1, (size_t)bytes, f);
        fwrite((char[64]){0}, 1, (size_t)(padded - bytes), f);
        release(q8);
        memcpy(entry + 56, &type, sizeof type);
        memcpy(entry + 80, (int64_t[]){end, bytes}, 16);
        end += padded;
    }
    memcpy(header + 16, &end, sizeof end);
    uint32_t checksum = header_checksum(header, header_bytes);
    memcpy(header + 32, &checksum, sizeof checksum);
    bool good = !fseek(f, 0, SEEK_SET) && fwrite(header, 1, (size_t)header_bytes, f) && !ferror(f);
    if (fclose(f) || !good || bad || rename(aside.s, path)) {
        int reason = errno;
        remove(aside.s);
        if (bad) die("%s: tensor %s: has weights that are not numbers of 8 bits; leave it as it is",
                     m->path, bad);
        die("%s: cannot be written: %s; free space or choose another place", path,
            strerror(reason));
    }
    warn("%s: %.1f MB, of %.1f MB", path, (double)end / 1e6, (double)m->bytes / 1e6);
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
// Both find their pieces in one trie. What a space, an accent or a lower-case letter is, C does
// not know: export.py writes what Python's unicodedata says into the model file, as ranges of code
// points with one rule each. The tokenizer section of a model file (little-endian, nothing
// aligned):
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
    const char *text;       // as decode() gives it back; no NUL behind it
    int length, type;
    float score;
} Piece;

enum { NOWHERE, PIECES, VERBATIM, BYTES, N_ROOTS };     // nodes: no node, and three roots

typedef struct {            // a node of the trie; its index in the hash table is its number
    uint32_t key;           // its parent's number << 8 | the byte that leads to it; 0: a free place
    int id;                 // of the piece that ends here; -1: none
} Node;

typedef struct Tokenizer {
    int kind;               // SENTENCEPIECE or WORDPIECE
    int n_tokens;           // at most the model's vocabulary
    int unk;                // WordPiece: the id of a word that no pieces cover
    Piece *piece;           // [n_tokens]
    Node *node;             // [n_nodes] hash table, open addressing
    uint32_t n_nodes;       // a power of two
    uint32_t inside;        // WordPiece: the node of "##", where pieces inside a word begin
    int byte_id[256];       // SentencePiece: ids of the byte tokens
    char bytes[256];        // and their texts
    bool joined[1 << 16];   // SentencePiece, by pair_hash(): may a piece have these two in a row?
    uint32_t *fold;         // WordPiece: [0x110000] of each code point the rule << 24 | what it
                            // becomes: a code point, class, index of a string, Hangul syllable
    const unsigned char *strings;       // [n_strings] u32, in the model file
} Tokenizer;

#define WORD_SPACE "\xe2\x96\x81"   // U+2581: sentencepiece's visible space
enum {
    CODE_POINTS = 0x110000,
    WORD_CHARS = 100,       // WordPiece: a word of more characters is unknown
    LONGEST_PIECE = 4000,   // bytes
    LONGEST_VERBATIM = 255
};

// Reads the code point at s, n > 0 bytes before the end of the text, and returns its length. A
// byte that starts no valid sequence is U+FFFD of length 1: sentencepiece's rule.
static int utf8_read(const char *s, int64_t n, uint32_t *code) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    const unsigned char *p = (const unsigned char *)s;
    int length = *p < 0xC0 ? 1 : *p < 0xE0 ? 2 : *p < 0xF0 ? 3 : 4, i = 1;
    uint32_t c = length > 1 ? *p & 0xFFu >> length : *p < 0x80 ? *p : UINT32_MAX;
    for (; i < length && i < n && (p[i] & 0xC0) == 0x80; i++) c = c << 6 | (p[i] & 0x3F);
    bool good = i == length && c >= least[length] && c < CODE_POINTS && c >> 11 != 0xD800 >> 11;
    *code = good ? c : 0xFFFD;
    return good ? length : 1;
}

// Writes a code point and returns its length, at most 4.
static int utf8_write(char *s, uint32_t c) {
    int n = c < 0x80 ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, c >>= 6) s[i] = (char)(0x80 | (c & 0x3F));
    s[0] = (char)(n == 1 ? c : (0xF00u >> n & 0xFF) | c);
    return n;
}

// The node that s[0 .. n) leads to from another; NOWHERE where there is none, unless it is to be
// added.
static uint32_t trie_walk(const Tokenizer *t, uint32_t node, const char *s, int64_t n, bool add) {
    for (; n > 0 && node; s++, n--) {
        uint32_t key = node << 8 | (unsigned char)*s, mask = t->n_nodes - 1;
        uint32_t i = (uint32_t)(key * 0x9e3779b97f4a7c15u >> 32) & mask;
        while (t->node[i].key && t->node[i].key != key) i = (i + 1) & mask;
        if (add && !t->node[i].key) t->node[i] = (Node){key, -1};
        node = t->node[i].key ? i : NOWHERE;
    }
    return node;
}

// The longest piece below a node that s[0 .. n) starts with, and its length; -1: none.
static int longest_piece(const Tokenizer *t, uint32_t node, const char *s, int64_t n,
                         int64_t *length) {
    int id = -1;
    for (int64_t i = 0; i < n && (node = trie_walk(t, node, s + i, 1, false)); i++) {
        if (t->node[node].id < 0) continue;
        id = t->node[node].id;
        *length = i + 1;
    }
    return id;
}

// Where `joined` keeps a pair of code points. Pairs that share a place cost time, nothing else.
static uint32_t pair_hash(uint32_t a, uint32_t b) {
    return (a * 0x9e3779b1u ^ b) * 0x85ebca6bu >> 16;
}

// --- Loading -------------------------------------------------------------------------------------

typedef struct {            // where the reader stands in the tokenizer section
    const char *file;
    const unsigned char *data;
    int64_t at, bytes;
} SectionReader;

static void section_check(const SectionReader *r, bool good, const char *fault) {
    if (good) return;
    die("%s: tokenizer, byte %lld of %lld: %s; export the model again", r->file,
        (long long)r->at, (long long)r->bytes, fault);
}

static const unsigned char *section_take(SectionReader *r, int64_t n) {
    section_check(r, n <= r->bytes - r->at, "something ends beyond the section");
    r->at += n;
    return r->data + r->at - n;
}

static uint32_t section_u32(SectionReader *r) { return read_u32(section_take(r, 4)); }

// Reads token i and enters it where its type says that encode() will look for it.
static void load_piece(Tokenizer *t, SectionReader *r, int i) {
    bool sentencepiece = t->kind == SENTENCEPIECE;
    const unsigned char *head = section_take(r, 12);
    uint32_t type = read_u32(head + 4), length = read_u32(head + 8), code, before = 0;
    const char *text = (const char *)section_take(r, length);
    bool special = !sentencepiece && type == PIECE_CONTROL;
    bool verbatim = special || type == PIECE_VERBATIM;
    section_check(r, type >= PIECE_NORMAL && type <= PIECE_BYTE && type != PIECE_UNUSED,
                  "a token of a type that is not 1, 2, 3, 4 or 6");
    section_check(r, length <= (verbatim ? LONGEST_VERBATIM : LONGEST_PIECE), "a token too long");
    section_check(r, (r->bytes - r->at) / 12 >= t->n_tokens - 1 - i, "those after it cannot fit");
    // Of equal texts the last one counts, as in vocab.txt.
    if (type == PIECE_NORMAL || special) t->node[trie_walk(t, PIECES, text, length, true)].id = i;
    if (verbatim) t->node[trie_walk(t, VERBATIM, text, length, true)].id = i;
    if (type == PIECE_BYTE) t->node[trie_walk(t, BYTES, text, length, true)].id = i;
    for (int64_t k = 0; type == PIECE_NORMAL && k < length; before = code) {
        k += utf8_read(text + k, length - k, &code);
        t->joined[pair_hash(before, code)] = true;
    }
    Piece *p = &t->piece[i];
    *p = (Piece){text, (int)length, (int)type, 0};
    memcpy(&p->score, head, 4);
    section_check(r, isfinite(p->score), "a score that is not a number");
    if (sentencepiece && type == PIECE_CONTROL) p->length = 0;
    if (sentencepiece && type == PIECE_UNKNOWN) *p = (Piece){" \xe2\x81\x87 ", 5, (int)type, 0};
}

// Reads the Unicode table of a WordPiece section.
static void load_fold(Model *m, Tokenizer *t, SectionReader *r) {
    int64_t n_ranges = section_u32(r), n_strings = section_u32(r);
    const unsigned char *range = section_take(r, 8 * n_ranges), *last = range + 8 * (n_ranges - 1);
    t->strings = section_take(r, 4 * n_strings);
    for (int64_t i = 0; i < n_strings; i++) {
        section_check(r, read_u32(t->strings + 4 * i) < CODE_POINTS, "a string of no code points");
    }
    section_check(r, n_ranges && !(read_u32(range) & 0xFFFFFF), "no Unicode range starts at 0");
    t->fold = model_allocate(m, CODE_POINTS, sizeof *t->fold, "Unicode table");
    for (int64_t code = 0; code < CODE_POINTS; code++) {
        if (range < last && (read_u32(range + 8) & 0xFFFFFF) == code) range += 8;
        uint32_t rule = read_u32(range) >> 24;
        int64_t value = (int32_t)read_u32(range + 4);
        if (rule == RULE_LETTER || rule == RULE_ALONE) value += code;
        if (rule == RULE_HANGUL) value += code - 0xAC00;
        bool string = rule == RULE_STRING;
        bool good = rule < N_RULES && value >= 0 && value < (string ? n_strings : CODE_POINTS);
        if (good && string) good = read_u32(t->strings + 4 * value) < n_strings - value;
        section_check(r, good, "a Unicode rule that is unknown, or a value that it cannot have");
        t->fold[code] = rule << 24 | (uint32_t)value;
    }
    section_check(r, range == last, "a Unicode range out of order or of bounds");
}

// Reads and checks the tokenizer section of a model's file; kind and [UNK] stand in the header.
static void tokenizer_load(Model *m, const unsigned char *section, int64_t bytes) {
    Tokenizer *t = m->tokenizer = model_allocate(m, 1, sizeof *t, "tokenizer");
    SectionReader r = {m->path, section, 0, bytes};
    int64_t n = section_u32(&r), most_nodes = 2 * (bytes - 12 * n) + N_ROOTS;
    section_check(&r, n > 0 && n <= m->vocab_size && n <= bytes / 12,
                  "as many tokens as neither the section nor the vocabulary holds");
    section_check(&r, most_nodes < 1 << 23, "tokens of over 4 MB in all");
    section_check(&r, m->tokenizer_kind == SENTENCEPIECE || (m->unk >= 0 && m->unk < n),
                  "no token is [UNK]");
    *t = (Tokenizer){.kind = m->tokenizer_kind, .n_tokens = (int)n, .unk = m->unk, .n_nodes = 16};
    t->piece = model_allocate(m, n, sizeof *t->piece, "pieces");
    while (t->n_nodes <= most_nodes) t->n_nodes *= 2;
    t->node = model_allocate(m, t->n_nodes, sizeof *t->node, "trie of pieces");
    for (int i = 0; i < N_ROOTS; i++) t->node[i] = (Node){UINT32_MAX, -1};
    for (int i = 0; i < n; i++) load_piece(t, &r, i);
    if (t->kind == WORDPIECE) load_fold(m, t, &r);
    t->inside = trie_walk(t, PIECES, "##", 2, false);
    for (int i = 0; t->kind == SENTENCEPIECE && i < 256; i++) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", (unsigned char)i);
        int id = t->byte_id[i] = t->node[trie_walk(t, BYTES, name, 6, false)].id;
        section_check(&r, id >= 0, "a byte of the 256 has no token (no byte fallback)");
        t->bytes[i] = (char)i;
        t->piece[id] = (Piece){&t->bytes[i], 1, PIECE_BYTE, 0};
    }
    section_check(&r, r.at == bytes, "too many bytes");
}

// --- SentencePiece BPE ---------------------------------------------------------------------------

typedef struct {            // some bytes of the text, a piece in the making
    int bytes;              // 0: merged into one before it
    int left;               // bytes of its left neighbour
    uint32_t node, pair;    // of the trie: its own; that of it and its right neighbour in one
    float score;            // of the piece that the pair is, or -INFINITY
    int64_t best;           // see Bpe
} Symbol;

typedef struct {            // a run of text that merges by itself
    const char *s;          // [n]
    int64_t n;
    Symbol *symbol;         // [n + 1] by the byte that it starts at. They hold a tournament of
                            // pairs: its node n + i is symbol i, and each node k below n has the
                            // better of nodes 2k and 2k + 1, so that node 1 has the best of all
} Bpe;

// Finds what symbol i and its right neighbour would merge into, and replays its matches.
static void score_pair(const Tokenizer *t, Bpe *b, int64_t i) {
    Symbol *symbol = b->symbol, *x = &symbol[i], *y = x + x->bytes;
    x->pair = y->bytes ? trie_walk(t, x->node, b->s + i + x->bytes, y->bytes, false) : NOWHERE;
    int id = t->node[x->pair].id;
    x->score = id < 0 ? -INFINITY : t->piece[id].score;
    for (int64_t n = b->n, k = (n + i) / 2; k > 0; k /= 2) {
        int64_t left = 2 * k < n ? symbol[2 * k].best : 2 * k - n;
        int64_t right = 2 * k + 1 < n ? symbol[2 * k + 1].best : 2 * k + 1 - n;
        float own = symbol[left].score, other = symbol[right].score;
        symbol[k].best = own > other || (own == other && left < right) ? left : right;
    }
}

// Merges s[0 .. n) and appends its ids.
static void merge_run(const Tokenizer *t, Bpe *b, const char *s, int64_t n, Ids *out) {
    Symbol *symbol = b->symbol = grow(b->symbol, n + 2, sizeof *symbol, "symbols");
    b->s = s;
    b->n = n;
    memset(symbol, 0, (size_t)(n + 2) * sizeof *symbol);
    for (int64_t i = 0; i < n; i += symbol[i].bytes) {
        uint32_t code;
        int bytes = symbol[i].bytes = utf8_read(s + i, n - i, &code);
        symbol[i].node = trie_walk(t, PIECES, s + i, bytes, false);
        symbol[i + bytes].left = bytes;
    }
    for (int64_t i = 0; i < n; i++) score_pair(t, b, i);
    while (n && symbol[symbol[1].best].score > -INFINITY) {
        int64_t i = symbol[1].best;
        Symbol *x = &symbol[i], *y = x + x->bytes;
        int64_t changed[] = {i - x->left, i, i + x->bytes};
        x->node = x->pair;
        x->bytes += y->bytes;
        y->bytes = 0;
        x[x->bytes].left = x->bytes;
        for (int k = 0; k < 3; k++) score_pair(t, b, changed[k]);
    }
    for (int64_t i = 0; i < n; i += symbol[i].bytes) {
        int id = t->node[symbol[i].node].id;
        if (id >= 0) ids_push(out, id);
        for (int k = 0; id < 0 && k < symbol[i].bytes; k++) {
            ids_push(out, t->byte_id[(unsigned char)s[i + k]]);
        }
    }
}

// --- WordPiece -----------------------------------------------------------------------------------

typedef struct {            // a word in the making
    int n;                  // characters; WORD_CHARS + 1 also stands for more
    int fixed;              // marks do not go before that many of them
    uint32_t code[WORD_CHARS + 1];      // code point | canonical combining class << 24
} Word;

// Appends a character; a combining mark (class > 0) goes before marks of higher classes.
static void word_add(Word *w, uint32_t code, uint32_t class) {
    if (w->n > WORD_CHARS) return;
    int i = w->n++;
    for (; class && i > w->fixed && w->code[i - 1] >> 24 > class; i--) w->code[i] = w->code[i - 1];
    w->code[i] = code | class << 24;
}

// Appends the ids of the word's pieces, longest first from the left; [UNK] alone where that fails.
static void word_end(const Tokenizer *t, Word *w, Ids *out) {
    char s[4 * WORD_CHARS];
    int64_t at = 0, end = 0, n = 0, before = out->n;
    bool fits = w->n <= WORD_CHARS;
    for (int i = 0; fits && i < w->n; i++) end += utf8_write(s + end, w->code[i] & 0xFFFFFF);
    w->n = w->fixed = 0;
    for (; fits && at < end; at += n) {
        int id = longest_piece(t, at ? t->inside : PIECES, s + at, end - at, &n);
        fits = id >= 0;
        ids_push(out, id);
    }
    if (fits) return;
    out->n = before;
    ids_push(out, t->unk);
}

// Lets one code point of the text do what its rule says.
static void word_feed(const Tokenizer *t, Word *w, uint32_t code, Ids *out) {
    uint32_t value = t->fold[code] & 0xFFFFFF;
    switch (t->fold[code] >> 24) {
    case RULE_LETTER: word_add(w, value, 0); break;
    case RULE_COMBINING: word_add(w, code, value); break;
    case RULE_BARRIER: w->fixed = w->n; break;
    case RULE_SPACE: word_end(t, w, out); break;
    case RULE_ALONE:
        word_end(t, w, out);
        word_add(w, value, 0);
        word_end(t, w, out);
        break;
    case RULE_STRING:
        for (uint32_t i = 1; i <= read_u32(t->strings + 4 * value) && w->n <= WORD_CHARS; i++) {
            uint32_t c = read_u32(t->strings + 4 * (value + i)), own = t->fold[c];
            word_add(w, c, own >> 24 == RULE_COMBINING ? own & 0xFFFFFF : 0);
        }
        break;
    case RULE_HANGUL:                   // by Unicode's arithmetic
        word_add(w, 0x1100 + value / 588, 0);
        word_add(w, 0x1161 + value % 588 / 28, 0);
        if (value % 28) word_add(w, 0x11A7 + value % 28, 0);
        break;
    default: break;
    }
}

// --- Both ----------------------------------------------------------------------------------------

// The text as sentencepiece sees it: a space in front, spaces as U+2581, valid UTF-8.
static void normalise(const char *text, int64_t bytes, Text *out) {
    text_add(out, WORD_SPACE, 3);
    for (int64_t i = 0; i < bytes;) {
        uint32_t code;
        char c[4];
        i += utf8_read(text + i, bytes - i, &code);
        text_add(out, c, utf8_write(c, code == ' ' ? 0x2581 : code));
    }
}

// Appends the ids of text[0..bytes), without BOS, [CLS] or [SEP]. Any bytes are a text: one that
// is not UTF-8 counts as U+FFFD, as sentencepiece has it (and WordPiece drops it). Pieces taken
// verbatim end a word or run; between two characters that no piece joins a run ends too: 10 MB of
// short runs merge at 14 MB/s, as one run at 1.
static void encode(const Tokenizer *t, const char *text, int64_t bytes, Ids *out) {
    Bpe b = {0};
    Word w = {.n = 0};
    Text whole = {0};
    bool sentencepiece = t->kind == SENTENCEPIECE;
    uint32_t code = 0, before = 0;
    int64_t start = 0;
    if (sentencepiece && bytes) {
        normalise(text, bytes, &whole);
        text = whole.s;
        bytes = whole.n;
    }
    for (int64_t at = 0, n; at < bytes; at += n, before = code) {
        int id = longest_piece(t, VERBATIM, text + at, bytes - at, &n);
        if (id < 0) n = utf8_read(text + at, bytes - at, &code);
        if (!sentencepiece && id < 0) word_feed(t, &w, code, out);
        if (!sentencepiece && id >= 0) word_end(t, &w, out);
        if (sentencepiece && (id >= 0 || !t->joined[pair_hash(before, code)])) {
            merge_run(t, &b, text + start, at - start, out);
            start = at;
        }
        if (id < 0) continue;
        ids_push(out, id);
        start = at + n;
    }
    word_end(t, &w, out);
    if (sentencepiece) merge_run(t, &b, text + start, bytes - start, out);
    release(whole.s);
    release(b.symbol);
}

// Appends the text of one token as it continues the token `previous` (-1: it starts a text).
// SentencePiece: control tokens give nothing, byte tokens their byte, and the space that was put
// before the text is dropped again. WordPiece: a space comes before all but "##" pieces, which keep
// their mark at the start of a text.
static void decode(const Tokenizer *t, int previous, int id, Text *out) {
    if (id < 0 || id >= t->n_tokens) return;
    const Piece *p = &t->piece[id];
    bool sentencepiece = t->kind == SENTENCEPIECE;
    bool first = previous < 0 || (sentencepiece && (previous >= t->n_tokens
               || t->piece[previous].type == PIECE_CONTROL));
    const char *mark = sentencepiece ? WORD_SPACE : "##";
    bool marked = p->length > 2 && !memcmp(p->text, mark, strlen(mark));
    int at = marked && (sentencepiece || !first) ? (int)strlen(mark) : 0;
    if (marked == sentencepiece && !first) text_add(out, " ", 1);
    for (int n; at < p->length; at += n) {
        bool space = sentencepiece && p->length - at >= 3 && !memcmp(p->text + at, WORD_SPACE, 3);
        n = space ? 3 : 1;
        text_add(out, space ? " " : p->text + at, 1);
    }
}

// ------------------------------------------------------------------------------------------------
// 6. Loading a model, and continuing a text
// ------------------------------------------------------------------------------------------------

// What the command line asked for: the flags of section 12 write into this.
static struct {
    const char *model, *prompt, *cosine, *probe, *sweep, *head, *path, *kv, *out, *log, *shard;
    const char *svg, *quantize, *kernels, **evals, **reports, *argument_flag;
    const Intervention *method;         // of `start`; `argument` is --seed or --times
    int64_t start, argument, n_evals, n_reports, layers, threads, limit, batch, tokens, sample_seed;
    int64_t part, n_parts;              // --shard
    double temperature, top_p, strength;
    bool info, show, bos, no_bos, help;
} options = {.layers = -1, .limit = -1, .batch = 2048, .tokens = 256, .top_p = 1, .strength = 1,
             .part = 1, .n_parts = 1};

enum { MOST_PADDING = 1024 };   // rows of a vocabulary that round it up and have no token

// Opens a model file. Dies where the file is not what it should be. The embedding API is this,
// encode() and decode(), session_new(), sequence_new(), batch_add(), forward(), logits(),
// batch_commit(), session_free() and model_free(): README.md has an example.
static Model *model_load(const char *path) {
    kernels_init(options.kernels, options.prompt && !options.cosine);
    Model *m = allocate(1, sizeof *m, "model");
    m->path = strcpy(model_allocate(m, (int64_t)strlen(path) + 1, 1, "path"), path);
    model_map(m);
    model_header(m);
    model_weights(m);
    const unsigned char *f = m->file;
    if (m->tokenizer_kind) tokenizer_load(m, f + read_i64(f + 48), read_i64(f + 56));
    int known = m->tokenizer ? m->tokenizer->n_tokens : m->vocab_size;
    if (m->vocab_size - known > MOST_PADDING) {
        die("%s: the tokenizer knows %d tokens, the model %d; export it again with its own "
            "--tokenizer", path, known, m->vocab_size);
    }
    return m;
}

static void model_free(Model *m) {
    for (int64_t i = 0; i < m->n_own; i++) release(m->own[i]);
    release(m->own);
#ifdef _WIN32
    release((void *)(uintptr_t)m->file);
#else
    munmap((void *)(uintptr_t)m->file, (size_t)m->bytes);
#endif
    release(m);
}

// Natural logarithm of the softmax of z at `token`; *best becomes the largest one's index.
static double log_softmax_at(const float *z, int64_t n, int token, int *best) {
    int top = 0;
    for (int64_t i = 1; i < n; i++) {
        if (z[i] > z[top]) top = (int)i;
    }
    *best = top;
    double sum = (double)expf(z[0] - z[top]);
    for (int64_t i = 1; i < n; i++) sum += (double)expf(z[i] - z[top]);
    return (double)(z[token] - z[top]) - log(sum);
}

typedef struct { float p; int token; } Candidate;

static int by_probability(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    return x->p > y->p ? -1 : x->p < y->p ? 1 : x->token - y->token;
}

// Fills c[0..n) with the tokens, likeliest first, and what the softmax of z / temperature makes of
// them, times the sum that it returns.
static double rank_tokens(Candidate *c, const float *z, int n, double temperature) {
    int best;
    double sum = 0;
    float divisor = fmaxf((float)temperature, FLT_MIN);
    log_softmax_at(z, n, 0, &best);
    for (int i = 0; i < n; i++) {
        c[i] = (Candidate){expf((z[i] - z[best]) / divisor), i};
        sum += c[i].p;
    }
    qsort(c, (size_t)n, sizeof *c, by_probability);
    return sum;
}

// Draws a token from the smallest set of likeliest tokens that holds --top-p of the probability
// (nucleus sampling, Holtzman et al. 2020); splitmix64 gives the number.
static int sample(Candidate *c, const float *z, int n, uint64_t *random) {
    int last = 0, drawn = 0;
    if (options.temperature <= 0) {
        log_softmax_at(z, n, 0, &drawn);
        return drawn;
    }
    double sum = rank_tokens(c, z, n, options.temperature), kept = c[0].p;
    for (; last + 1 < n && kept < options.top_p * sum; last++) kept += c[last + 1].p;
    uint64_t bits = *random += 0x9e3779b97f4a7c15u;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
    double left = (double)((bits ^ bits >> 31) >> 11) * 0x1p-53 * kept;
    while (drawn < last && left >= c[drawn].p) left -= c[drawn++].p;
    return c[drawn].token;
}

static const Tokenizer *need_tokenizer(const Model *m) {
    if (!m->tokenizer) die("%s: has no tokenizer; export it again with --tokenizer FILE", m->path);
    return m->tokenizer;
}

// The ids of --prompt, with what the architecture puts around them; they fit the model's context.
static Ids prompt_ids(const Model *m, const char *prompt, bool bos) {
    Ids ids = {0};
    if ((bos || m->arch == BERT) && m->bos >= 0) ids_push(&ids, m->bos);
    encode(need_tokenizer(m), prompt, (int64_t)strlen(prompt), &ids);
    if (m->arch == BERT && m->eos >= 0) ids_push(&ids, m->eos);
    if (!ids.n) die("--prompt: no tokens; give some text, or --bos");
    if (ids.n > m->max_length) {
        die("--prompt: %lld tokens, the model's context takes %d; shorten it", (long long)ids.n,
            m->max_length);
    }
    return ids;
}

// --prompt for Llama: prints the text and up to --tokens of its continuation, as they come.
static void continue_text(Session *s, const Schedule *schedule) {
    const Model *m = s->model;
    Ids ids = prompt_ids(m, options.prompt, !options.no_bos);
    int64_t n = ids.n, room = m->max_length - n + 1, made = 0;
    if (room > options.tokens) room = options.tokens;
    int q = sequence_new(s, -1, n + room, schedule_slots(s, schedule));
    for (int64_t i = 0; i < n; i++) batch_add(s, q, ids.id[i], 0);
    float *z = allocate(m->vocab_size, sizeof *z, "logits");
    Candidate *c = allocate(m->vocab_size, sizeof *c, "candidates");
    Text piece = {0};
    uint64_t random = (uint64_t)options.sample_seed;
    double start = seconds(), decoding = start;
    for (fputs(options.prompt, stdout); made < room;) {
        forward(s, schedule);
        logits(s, (int64_t[]){s->batch.n_rows - 1}, 1, z);
        batch_commit(s);
        if (!made++) decoding = seconds();
        int next = sample(c, z, m->vocab_size, &random);
        // EOS ends a text; so does BOS, with which another begins: llama2.c's models were trained
        // that way, and it stops there too. (--eval stops at EOS alone, as the harness does.)
        if (next == m->eos || next == m->bos) break;
        piece.n = 0;
        decode(m->tokenizer, ids.id[ids.n - 1], next, &piece);
        fwrite(piece.s, 1, (size_t)piece.n, stdout);
        fflush(stdout);
        ids_push(&ids, next);
        if (made < room) batch_add(s, q, next, 0);
    }
    fputc('\n', stdout);
    warn("prompt: %lld tokens, %.1f tokens/s; continuation: %lld tokens, %.1f tokens/s",
         (long long)n, (double)n / (decoding - start + 1e-9), (long long)made,
         (double)(made - 1) / (seconds() - decoding + 1e-9));
}

// --prompt for BERT: the five likeliest tokens for every [MASK], with their probabilities.
static void fill_masks(Session *s, const Schedule *schedule) {
    const Model *m = s->model;
    Ids ids = prompt_ids(m, options.prompt, true);
    int q = sequence_new(s, -1, ids.n, 1), n_masks = 0;
    for (int64_t i = 0; i < ids.n; i++) batch_add(s, q, ids.id[i], 0);
    forward(s, schedule);
    float *z = allocate(m->vocab_size, sizeof *z, "logits");
    Candidate *c = allocate(m->vocab_size, sizeof *c, "candidates");
    for (int64_t i = 0; i < ids.n; i++) {
        if (ids.id[i] != m->mask) continue;
        logits(s, &i, 1, z);
        double sum = rank_tokens(c, z, m->vocab_size, 1);
        printf("[MASK] %d, token %lld\n", ++n_masks, (long long)i);
        for (int t = 0; t < 5 && t < m->vocab_size; t++) {
            Text piece = {0};
            decode(m->tokenizer, -1, c[t].token, &piece);
            printf("  %-20.*s %.4f\n", (int)piece.n, piece.s, (double)c[t].p / sum);
        }
    }
    if (!n_masks) die("--prompt: no [MASK] in the text; put one where a word should be filled in");
}

// ------------------------------------------------------------------------------------------------
// 7. Metrics: kept values -> a score and its standard error
// ------------------------------------------------------------------------------------------------

// Words of a running text as the harness counts them, len(re.split(r"\s+", text)), with the white
// space of Python's str.isspace(); *tail gets the bytes of it at the end.
static int64_t count_words(const char *text, int64_t *tail) {
    int64_t words = 1;
    uint32_t c;
    *tail = 0;
    for (int n; *text; text += n) {
        n = utf8_read(text, 4, &c);         // which goes no further than the NUL
        bool space = (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xA0
                  || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029
                  || c == 0x202F || c == 0x205F || c == 0x3000;
        words += space && !*tail;
        *tail = space ? *tail + n : 0;
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
static char *normalise_number(const char *s, int64_t bytes) {
    char *out = allocate(bytes + 1, 1, "answer"), *to = out;
    for (const char *end = s + bytes; s < end; s++) {
        if (*s == ',' || *s == '$') continue;
        *to++ = *s >= 'A' && *s <= 'Z' ? (char)(*s + 32) : *s;
        if (to - out >= 5 && !memcmp(to - 5, "#### ", 5)) to = out;
    }
    *to = 0;
    if (to > out && to[-1] == '\n') to--;
    if (to > out && to[-1] == '.') memmove(to - 1, to, strlen(to) + 1);
    return out;
}

// GSM8K's exact match of a generated text and an answer.
static bool exact_match(const char *text, const char *answer, bool flexible) {
    int64_t bytes;
    const char *number = find_number(text, flexible, &bytes);
    char *ours = normalise_number(number, bytes);
    char *gold = normalise_number(answer, (int64_t)strlen(answer));
    bool same = !strcmp(ours, gold);
    release(ours);
    release(gold);
    return same;
}

typedef struct { double x, y, times; } Pair;    // two kept values of an item; of so many items

// The functions of metrics take n pairs; y may be all ones. Of the items of a run each counts once,
// of a resample's as often as it was drawn.

static double share(const Pair *p, int64_t n) {
    double above = 0, below = 0;
    for (int64_t i = 0; i < n; i++) {
        above += p[i].times * p[i].x;
        below += p[i].times * p[i].y;
    }
    return above / below;
}

static double perplexity(const Pair *p, int64_t n) {
    return exp(-share(p, n));
}

static double count_items(const Pair *p, int64_t n) {
    double items = 0;
    for (int64_t i = 0; i < n; i++) items += p[i].times;
    return items;
}

static double agreement(const Pair *p, int64_t n) {
    double same = 0;
    for (int64_t i = 0; i < n; i++) same += p[i].x == p[i].y ? p[i].times : 0;
    return same / count_items(p, n);
}

// F1 of class 1; 0 where there is nothing to be right about.
static double f1(const Pair *p, int64_t n) {
    double hits = 0, named = 0;
    for (int64_t i = 0; i < n; i++) {
        hits += p[i].x == 1 && p[i].y == 1 ? p[i].times : 0;
        named += ((p[i].x == 1) + (p[i].y == 1)) * p[i].times;
    }
    return named > 0 ? 2 * hits / named : 0;
}

// Matthews correlation of any number of classes; 0 where one side is constant.
static double matthews(const Pair *p, int64_t n) {
    double items = count_items(p, n), square = items * items, above = agreement(p, n) * square;
    double spread_x = square, spread_y = square, seen = 0;
    for (int k = 0; seen < 2 * items; k++) {
        double count_x = 0, count_y = 0;
        for (int64_t i = 0; i < n; i++) {
            count_x += p[i].x == k ? p[i].times : 0;
            count_y += p[i].y == k ? p[i].times : 0;
        }
        above -= count_x * count_y;
        spread_x -= count_x * count_x;
        spread_y -= count_y * count_y;
        seen += count_x + count_y;
    }
    return spread_x > 0 && spread_y > 0 ? above / sqrt(spread_x * spread_y) : 0;
}

// Pearson correlation; NaN where one side is constant, whose distances from the first are exact.
static double pearson(const Pair *p, int64_t n) {
    double items = count_items(p, n), mean_x = 0, mean_y = 0, xx = 0, yy = 0, xy = 0;
    Pair first = p[0];
    for (int64_t i = 1; i < n && first.times == 0; i++) first = p[i];
    for (int64_t i = 0; i < n; i++) {
        mean_x += p[i].times * (p[i].x - first.x) / items;
        mean_y += p[i].times * (p[i].y - first.y) / items;
    }
    for (int64_t i = 0; i < n; i++) {
        double from_x = p[i].x - first.x - mean_x, from_y = p[i].y - first.y - mean_y;
        xx += p[i].times * from_x * from_x;
        yy += p[i].times * from_y * from_y;
        xy += p[i].times * from_x * from_y;
    }
    double found = xy / (sqrt(xx) * sqrt(yy));
    return fabs(found) > 1 ? copysign(1, found) : found;
}

// Each value replaced by how many others are smaller.
static void order(Pair *p, int64_t n) {
    Pair *smaller = allocate(n, sizeof *smaller, "ranks");
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < n; j++) {
            smaller[i].x += p[j].x < p[i].x;
            smaller[i].y += p[j].y < p[i].y;
        }
        smaller[i].times = p[i].times;
    }
    memcpy(p, smaller, (size_t)n * sizeof *p);
    release(smaller);
}

// Spearman correlation of values that order() has made, or of a resample of them, whose ranks come
// by counting; equal ones share their average rank.
static double spearman(const Pair *p, int64_t n) {
    int64_t items = (int64_t)count_items(p, n);
    Pair *rank = allocate(n + items, sizeof *rank, "ranks"), *count = rank + n, below = {0};
    for (int64_t i = 0; i < n; i++) {
        count[(int64_t)p[i].x].x += p[i].times;
        count[(int64_t)p[i].y].y += p[i].times;
    }
    for (int64_t k = 0; k < items; k++) {           // counts become ranks
        Pair here = count[k];
        count[k] = (Pair){below.x + (here.x + 1) / 2, below.y + (here.y + 1) / 2, 0};
        below.x += here.x;
        below.y += here.y;
    }
    for (int64_t i = 0; i < n; i++) {
        rank[i] = (Pair){count[(int64_t)p[i].x].x, count[(int64_t)p[i].y].y, p[i].times};
    }
    double found = pearson(rank, n);
    release(rank);
    return found;
}

// A new metric is a row here. Its pairs are columns a and b (-1: ones) of the values that its
// kind of task keeps per item. Where it is a share of the items, its error has a formula.
typedef struct {
    const char *kind, *name;
    double (*value)(const Pair *p, int64_t n);
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

// How many of so many items fall to a side that each falls to with probability p. Each is a random
// number, and the binary digits of all of them are compared with those of p at once: where the two
// differ an item is decided, which is half of those left. That takes n / 32 random words, not n.
static int64_t draw_side(uint64_t *seed, int64_t items, double p) {
    int64_t below = 0;
    while (items > 0 && p > 0) {
        int64_t ones = 0;                           // digits of so many are 1
        for (int64_t left = items; left > 0; left -= 64) {
            uint64_t digits = mix64((*seed)++);
            ones += __builtin_popcountll(left < 64 ? digits << (64 - left) : digits);
        }
        p *= 2;
        below += p >= 1 ? items - ones : 0;
        items = p >= 1 ? ones : items - ones;
        p -= p >= 1;
    }
    return below;
}

// Draws so many items with replacement from those of n pairs, of which before[i + 1] - before[i]
// have pair i: some from the first half of the pairs, the rest from the second, and so on, down to
// one pair, or to pairs of one item each, which are drawn one by one.
static void resample(Pair *p, const double *before, int64_t n, int64_t items, uint64_t *seed) {
    int64_t half = n / 2;
    double all = before[n] - before[0], first = before[half] - before[0];
    if (n == 1) {
        p->times = (double)items;
    } else if (all == (double)n) {
        for (int64_t i = 0; i < n; i++) p[i].times = 0;
        while (items-- > 0) p[(mix64((*seed)++) >> 32) * (uint64_t)n >> 32].times++;
    } else {
        int64_t drawn = draw_side(seed, items, first / all);
        resample(p, before, half, drawn, seed);
        resample(p + half, before + half, n - half, items - drawn, seed);
    }
}

static int by_values(const void *a, const void *b) {
    const Pair *p = a, *q = b;
    return p->x != q->x ? (p->x > q->x) - (p->x < q->x) : (p->y > q->y) - (p->y < q->y);
}

// Standard deviation of a metric over resamples of the items, drawn with replacement; resamples
// without a value (a constant has no correlation) do not count. Items with the same values are
// drawn together: F1 of 40,000 items is a matter of four pairs, and takes no time. Resample r has
// random numbers of its own, so that the figure does not depend on the number of threads.
static double bootstrap(const Metric *m, Pair *p, int64_t items) {
    enum { RESAMPLES = 10000 };
    double *found = allocate(RESAMPLES, sizeof *found, "bootstrap"), mean = 0, squares = 0;
    double *before = allocate(items + 1, sizeof *before, "bootstrap");
    int64_t n = 0;
    int count = 0;
    qsort(p, (size_t)items, sizeof *p, by_values);
    for (int64_t i = 0; i < items; i++) {
        if (i == 0 || by_values(&p[i], &p[n - 1])) p[n++] = p[i];
        before[n] = (double)(i + 1);
    }
    #pragma omp parallel
    {
        Pair *drawn = allocate(n, sizeof *drawn, "bootstrap");
        memcpy(drawn, p, (size_t)n * sizeof *drawn);
        #pragma omp for
        for (int r = 0; r < RESAMPLES; r++) {
            uint64_t seed = mix64((uint64_t)r);
            resample(drawn, before, n, items, &seed);
            found[r] = m->value(drawn, n);
        }
        release(drawn);
    }
    for (int r = 0; r < RESAMPLES; r++) {           // Welford's running mean and squares
        if (isnan(found[r])) continue;
        double from_mean = found[r] - mean;
        mean += from_mean / ++count;
        squares += from_mean * (found[r] - mean);
    }
    release(before);
    release(found);
    return count > 1 ? sqrt(squares / (count - 1)) : NAN;
}

// A metric of n items with `width` kept values each, and its standard error: by formula (sample
// deviation over the root of n) for shares, otherwise by bootstrap. NaN is undefined.
static double metric_value(const Metric *m, const double *values, int64_t n, int width,
                           double *error) {
    Pair *p = allocate(n, sizeof *p, "metric");
    double value = NAN;
    bool whole = n > 0;
    for (int64_t i = 0; i < n * width; i++) whole &= !isnan(values[i]);
    for (int64_t i = 0; i < n; i++) {
        p[i] = (Pair){values[i * width + m->a], m->b < 0 ? 1 : values[i * width + m->b], 1};
    }
    if (m->value == spearman) order(p, n);
    if (whole) value = m->value(p, n);
    *error = n < 2 || !isfinite(value) ? NAN
           : m->formula ? sqrt(value * (1 - value) / (double)(n - 1)) : bootstrap(m, p, n);
    release(p);
    return value;
}

// The probe: a linear classifier, or a regression, on n rows of frozen features. It minimises
//     sum over rows of loss(row) + strength / 2 * (sum of squares of all weights but the biases)
// where the loss is the negative log-likelihood of a softmax over the classes, or half the squared
// error: scikit-learn's LogisticRegression(C = 1 / strength) and Ridge(alpha = strength). Of two
// classes only the difference counts, so that their weights are punished twice to be the same as a
// single logistic. A turn is a Newton step with the Hessian of an earlier one, made as long as the
// step before it tells (Barzilai and Borwein 1988). Without a Hessian, features that nearly repeat
// one another would take thousands of turns; one for every turn would cost more than it saves.
// A regression is solved by the first turn.
typedef struct {
    const float *x;             // [n][d - 1]; a 1 goes behind each row, whose weight is the bias
    const double *y;            // [n] class or target
    int64_t n, d, outputs;      // outputs: classes, or 1 for a regression
    double strength;
    double *curve;              // [n] what a row of the last pass weighs in the Hessian
    double *row, *z;            // [d], [outputs] a row in work and its scores
    double *factor;             // [d][d] Cholesky factor of the Hessian, the same for every output
} Probe;

enum { PROBE_TURNS = 100 };     // until the Hessian is factored anew

// Eight sums side by side, which a compiler can keep in vectors.
static double inner(const double *a, const double *b, int64_t n) {
    double lane[8] = {0};
    int64_t whole = n / 8 * 8;
    for (int64_t j = 0; j < whole; j += 8) {
        for (int l = 0; l < 8; l++) lane[l] += a[j + l] * b[j + l];
    }
    for (int64_t j = whole; j < n; j++) lane[j - whole] += a[j] * b[j];
    for (int l = 0; l < 4; l++) lane[l] += lane[l + 4];
    return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// y += a * x
static void add_scaled(double *y, double a, const double *x, int64_t n) {
    for (int64_t j = 0; j < n; j++) y[j] += a * x[j];
}

static void probe_row(const Probe *f, int64_t i) {
    for (int64_t j = 0; j < f->d - 1; j++) f->row[j] = (double)f->x[i * (f->d - 1) + j];
    f->row[f->d - 1] = 1;
}

// The scores of row i become the gradient of its loss by them; returns the loss.
static double probe_loss(const Probe *f, int64_t i) {
    double *z = f->z, y = f->y[i], top = z[0], sum = 0, squares = 0;
    if (f->outputs == 1) {
        f->curve[i] = 1;
        z[0] -= y;
        return z[0] * z[0] / 2;
    }
    for (int64_t k = 1; k < f->outputs; k++) top = fmax(top, z[k]);
    for (int64_t k = 0; k < f->outputs; k++) sum += exp(z[k] - top);
    double loss = top + log(sum) - z[(int64_t)y];
    for (int64_t k = 0; k < f->outputs; k++) {
        double p = exp(z[k] - top) / sum;
        squares += p * p;
        z[k] = p - ((double)k == y);
    }
    f->curve[i] = (1 - squares) / (double)(f->outputs - 1);
    return loss;
}

// One pass over the features: the objective at w and its gradient, both [outputs][d].
static double probe_pass(const Probe *f, const double *w, double *gradient) {
    int64_t d = f->d;
    double loss = 0;
    for (int64_t j = 0; j < f->outputs * d; j++) {
        gradient[j] = (j + 1) % d ? f->strength * w[j] : 0;
        loss += gradient[j] * w[j] / 2;
    }
    for (int64_t i = 0; i < f->n; i++) {
        probe_row(f, i);
        for (int64_t k = 0; k < f->outputs; k++) f->z[k] = inner(w + k * d, f->row, d);
        loss += probe_loss(f, i);
        for (int64_t k = 0; k < f->outputs; k++) add_scaled(gradient + k * d, f->z[k], f->row, d);
    }
    return loss;
}

// The weighed X^T X + strength = factor . factor^T (lower triangle). With up to two outputs, and at
// w = 0, that is the Hessian along steps that add up to nothing over the outputs, as all steps do.
static void probe_factor(const Probe *f) {
    int64_t d = f->d;
    memset(f->factor, 0, (size_t)(d * d) * sizeof *f->factor);
    for (int64_t from = 0; from < d; from += 16) {  // rows of the factor that stay in the cache
        for (int64_t r = 0; r < f->n; r++) {
            probe_row(f, r);
            for (int64_t i = from; i < d && i < from + 16; i++) {
                add_scaled(f->factor + i * d, f->curve[r] * f->row[i], f->row, i + 1);
            }
        }
    }
    for (int64_t i = 0; i < d; i++) {
        double *own = f->factor + i * d, least = 1e-12 * own[i] + 1e-300;
        own[i] += i < d - 1 ? f->strength : 0;
        for (int64_t j = 0; j <= i; j++) {
            const double *other = f->factor + j * d;
            double rest = own[j] - inner(own, other, j);
            own[j] = j < i ? rest / other[j] : sqrt(fmax(rest, least));
        }
    }
}

// v = the inverse of the factored Hessian times the gradient; returns their inner product.
static double probe_solve(const Probe *f, const double *gradient, double *v) {
    int64_t d = f->d, size = f->outputs * d;
    memcpy(v, gradient, (size_t)size * sizeof *v);
    for (double *own = v; own < v + size; own += d) {
        for (int64_t i = 0; i < d; i++) {
            own[i] = (own[i] - inner(f->factor + i * d, own, i)) / f->factor[i * d + i];
        }
        for (int64_t i = d - 1; i >= 0; i--) {
            own[i] /= f->factor[i * d + i];
            add_scaled(own, -own[i], f->factor + i * d, i);
        }
    }
    return inner(gradient, v, size);
}

// Fits the probe described above; classes is 1 for a regression. w is [classes][d + 1], the bias
// last.
static void probe_fit(const float *x, const double *y, int64_t n, int64_t d, int classes,
                      double strength, double *w) {
    int64_t width = d + 1, size = classes * width, numbers = n + classes + (1 + width) * width;
    Probe f = {x, y, n, width, classes, classes == 2 ? 2 * strength : strength, .curve = NULL};
    f.curve = allocate(numbers + 2 * size, sizeof *f.curve, "probe");
    f.row = f.curve + n;
    f.z = f.row + width;
    f.factor = f.z + classes;
    double *gradient = f.factor + width * width, *v = gradient + size;
    memset(w, 0, (size_t)size * sizeof *w);
    double loss = probe_pass(&f, w, gradient), most = loss, slope = 0, length = 1;
    for (int turn = 0; turn < 10000 && length > 1e-9; turn++) {
        if (sqrt(inner(gradient, gradient, size)) <= 1e-8 * (double)n) break;
        if (turn % PROBE_TURNS == 0) {
            probe_factor(&f);
            slope = probe_solve(&f, gradient, v);
            most = loss * (1 + 1e-12);              // a sum over all rows is no more exact
            length = 1;
        }
        add_scaled(w, -length, v, size);
        while (!((loss = probe_pass(&f, w, gradient)) <= most) && length > 1e-9) {
            length /= 2;                            // it went too far: half of it back
            add_scaled(w, length, v, size);
        }
        double left = inner(gradient, v, size), next = probe_solve(&f, gradient, v);
        length *= (slope - left) / (slope - 2 * left + next);
        slope = next;
    }
    release(f.curve);
}

// What a fitted probe makes of one row of features: a class, or the target of a regression.
static double probe_predict(const double *w, const float *x, int64_t d, int classes) {
    double best = 0, top = -INFINITY;
    for (int k = 0; k < classes; k++, w += d + 1) {
        double z = w[d];
        for (int64_t j = 0; j < d; j++) z += w[j] * (double)x[j];
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
    int64_t first, n;           // tokens fed: task->pool.id[first .. first + n)
    int64_t segment_from;       // BERT: tokens from here on are of segment 1
    int64_t mask_at;            // BERT: this token is fed as [MASK]; -1: none
    int64_t shared;             // that many are the same as the request before it begins with
    int64_t row;                // the first row that is scored, counted from the first fed token
    int64_t target, n_targets;  // rows row, row + 1, ... are scored against pool.id[target], ...
    double loglik, prediction;  // the answer
    bool greedy;
    Text text;
} Request;

typedef struct { char **field; int n_fields; double gold; } Item;    // gold: of column g or x

typedef struct Kind Kind;
enum { MOST_METRICS = 8 };      // of a task

typedef struct {
    char *path, *name, *head, *header;      // header: the first line, as it stands
    char *identity;                         // the line that says which task results are of
    int index;                              // among the tasks of a run
    const Kind *kind;
    const Metric *metrics[MOST_METRICS];
    int n_metrics, n_labels, n_stops;
    char **labels, **stops;
    int64_t max_tokens;
    double chance;
    uint64_t hash;                          // of the file's bytes
    Item *items;
    int64_t n_items;
    Ids pool;
    Request *requests;
    int64_t n_requests;
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
    int width;                              // values kept per item,
    const char *values;                     // and what each can be; see value_possible()
    const char *columns;                    // what must be there: g the number of a choice or label
                                            // from 0, x a number, s a text, t one that is not empty
    int most;                               // columns; those more are like the last one
    bool adds;
    void (*ask)(Task *t, const Model *m, bool bos, int64_t item);
    void (*value)(const Task *t, const Request *r, int64_t n, double *value);
};

static Request *new_request(Task *t, int64_t item) {
    t->requests = grow(t->requests, t->n_requests + 1, sizeof *t->requests, "requests");
    Request *r = &t->requests[t->n_requests++];
    *r = (Request){.item = item, .mask_at = -1, .first = t->pool.n};
    return r;
}

static void push_ids(Ids *to, const Ids *from, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i++) ids_push(to, from->id[i]);
}

// The tokens of n bytes of text, behind BOS (BERT: [CLS]) if that is wanted.
static void push_text(const Model *m, bool bos, const char *text, int64_t n, Ids *to) {
    if (bos && m->bos < 0) die("%s: has no BOS token, which texts and --bos begin with", m->path);
    if (bos) ids_push(to, m->bos);
    encode(m->tokenizer, text, n, to);
}

// A request feeds what has been pushed since it was made, without the beginning if that is over
// `most` tokens.
static void end_request(Task *t, Request *r, int64_t most) {
    if (t->pool.n - r->first > most) {
        r->first = t->pool.n - most;
        t->cut[r->item] = true;
    }
    r->n = t->pool.n - r->first;
}

// gold, context, choice, choice, ...; or gold, continuation, context, context, ...; or context,
// continuation: the harness's log-likelihood requests. White space at the end of the context moves
// to the continuation, the model reads encode(context) and then what encode(context + continuation)
// has behind as many tokens, cut to the last max_length + 1; an empty context is BOS.
static void ask_continuations(Task *t, const Model *m, bool bos, int64_t item) {
    const Item *it = &t->items[item];
    bool contexts = t->kind->columns[1] == 't', single = it->n_fields == 2;
    for (int c = single ? 1 : 2; c < it->n_fields; c++) {
        const char *context = it->field[single ? 0 : contexts ? c : 1];
        int64_t n = (int64_t)strlen(context), tail;
        Text whole = {0};
        Ids all = {0};
        Request *r = new_request(t, item);
        count_words(context, &tail);
        n -= tail;
        text_printf(&whole, "%s %s", context, it->field[contexts ? 1 : c]);
        push_text(m, bos || !n, context, n, &t->pool);
        push_text(m, bos || !n, whole.s, whole.n, &all);
        r->target = t->pool.n;
        push_ids(&t->pool, &all, t->pool.n - r->first, all.n);
        end_request(t, r, m->max_length + 1);
        if (r->n > 1) r->n--;           // the last token is not fed
        if (r->target <= r->first) r->target = r->first + 1;
        r->row = r->target - r->first - 1;
        r->n_targets = t->pool.n - r->target;
        release(all.id);
        release(whole.s);
    }
}

// prompt, answer
static void ask_generate(Task *t, const Model *m, bool bos, int64_t item) {
    const char *prompt = t->items[item].field[0];
    Request *r = new_request(t, item);
    if (t->max_tokens >= m->max_length) {
        die("%s: max_tokens is %lld, the model's context holds %d; lower it", t->path,
            (long long)t->max_tokens, m->max_length);
    }
    push_text(m, bos || !*prompt, prompt, (int64_t)strlen(prompt), &t->pool);
    end_request(t, r, m->max_length - t->max_tokens);
    r->row = r->n - 1;
    r->n_targets = 1;           // the first token behind it
}

// text: windows of running text, which score each token once. Llama: as the harness rolls them (BOS
// first, later ones with tokens before those they score); BERT: [CLS] tokens [SEP], asked for every
// token with that one masked, in windows of the model's length.
static void ask_text(Task *t, const Model *m, bool bos, int64_t item) {
    (void)bos;
    const char *text = t->items[item].field[0];
    bool bert = m->arch == BERT;
    int64_t window = !bert ? m->max_length : (m->max_length < 512 ? m->max_length : 512) - 2;
    Ids ids = {0};
    if (window < 1) die("%s: its context holds no text between [CLS] and [SEP]", m->path);
    push_text(m, true, text, (int64_t)strlen(text), &ids);
    for (int64_t done = 1, end = 0; done < ids.n || (bert && !end); done = end) {
        end = done + window < ids.n ? done + window : ids.n;
        if (!bert) {
            int64_t from = end - 1 > window ? end - 1 - window : 0;
            Request *r = new_request(t, item);
            push_ids(&t->pool, &ids, from, end);
            r->n = end - 1 - from;
            r->row = done - 1 - from;
            r->target = r->first + done - from;
            r->n_targets = end - done;
            continue;
        }
        int64_t first = t->pool.n, n = end - done;
        ids_push(&t->pool, m->bos);
        push_ids(&t->pool, &ids, done, end);
        ids_push(&t->pool, m->eos);
        for (int64_t i = 1; i <= n || i == 1; i++) {    // no tokens: nothing to mask or score
            *new_request(t, item) = (Request){
                .item = item, .first = first, .n = n + 2, .segment_from = n + 2,
                .mask_at = n ? i : -1, .row = i, .target = first + i, .n_targets = n > 0};
        }
    }
    release(ids.id);
}

// gold, text [, second text]: [CLS] a [SEP] b [SEP] in 128 tokens, the longer text cut first, as
// Hugging Face's fast tokenizers cut it.
static void ask_classify(Task *t, const Model *m, bool bos, int64_t item) {
    (void)bos;
    const Item *it = &t->items[item];
    Request *r = new_request(t, item);
    Ids text[2] = {{0}, {0}};
    int pair = it->n_fields > 2;
    int64_t limit = (m->max_length < 128 ? m->max_length : 128) - 2 - pair;
    for (int i = 0; i <= pair; i++) {
        push_text(m, false, it->field[1 + i], (int64_t)strlen(it->field[1 + i]), &text[i]);
    }
    if (text[0].n + text[1].n > limit) {
        int longer = pair && text[1].n >= text[0].n;
        if (text[!longer].n > limit / 2) text[!longer].n = limit / 2;
        text[longer].n = limit - text[!longer].n;
        t->cut[item] = true;
    }
    r->n_targets = 1;                   // row 0, of [CLS], is what the classifier sees
    ids_push(&t->pool, m->bos);
    push_ids(&t->pool, &text[0], 0, text[0].n);
    ids_push(&t->pool, m->eos);
    r->segment_from = t->pool.n - r->first;
    push_ids(&t->pool, &text[1], 0, text[1].n);
    if (pair) ids_push(&t->pool, m->eos);
    end_request(t, r, m->max_length);
    release(text[0].id);
    release(text[1].id);
}

static void value_choice(const Task *t, const Request *r, int64_t n, double *value) {
    const Item *i = &t->items[r->item];
    for (int norm = 0; norm < t->kind->width; norm++) {     // acc, acc_norm
        double top = -INFINITY, best = -1;  // a model that answers NaN is never right
        for (int64_t c = 0; c < n; c++) {
            double length = norm ? (double)count_codepoints(i->field[2 + c]) : 1;
            if (r[c].loglik / length > top) top = r[c].loglik / length, best = (double)c;
        }
        value[norm] = best == i->gold;
    }
}

static void value_lastword(const Task *t, const Request *r, int64_t n, double *value) {
    (void)t, (void)n;
    value[0] = r->loglik;
    value[1] = r->greedy;
}

static void value_generate(const Task *t, const Request *r, int64_t n, double *value) {
    (void)n;
    const char *text = r->text.s ? r->text.s : "", *answer = t->items[r->item].field[1];
    value[0] = exact_match(text, answer, false);
    value[1] = exact_match(text, answer, true);
}

static void value_classify(const Task *t, const Request *r, int64_t n, double *value) {
    (void)n;
    value[0] = r->prediction;
    value[1] = t->items[r->item].gold;
}

static void value_text(const Task *t, const Request *r, int64_t n, double *value) {
    const char *text = t->items[r->item].field[0];
    int64_t tail;
    value[2] = (double)count_words(text, &tail);
    value[3] = (double)strlen(text);
    for (int64_t i = 0; i < n; i++) {
        value[0] += r[i].loglik;
        value[1] += (double)r[i].n_targets;
        value[4] += r[i].greedy && r[i].n_targets;
    }
}

static const Kind kinds[] = {
    {"choice", LLAMA, SCORES, 2, "bb", "gstt", INT_MAX, false, ask_continuations, value_choice},
    {"contexts", LLAMA, SCORES, 1, "b", "gtss", INT_MAX, false, ask_continuations, value_choice},
    {"lastword", LLAMA, SCORES, 2, "lb", "st", 2, false, ask_continuations, value_lastword},
    {"generate", LLAMA, GENERATES, 2, "bb", "ss", 2, false, ask_generate, value_generate},
    {"classify", BERT, CLASSIFIES, 2, "gg", "gs", 3, false, ask_classify, value_classify},
    {"regress", BERT, CLASSIFIES, 2, "xf", "xs", 3, false, ask_classify, value_classify},
    {"text", 0, SCORES, 5, "lnnnn", "t", 1, true, ask_text, value_text},
};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

// Can a kept value be this? b: no or yes; g: a label; n: a count; l: a log-likelihood, which may be
// rounded up or NaN; f: a number; x: whatever a model may say.
static bool value_possible(const Task *t, char type, double v) {
    double highest = type == 'b' ? 1 : type == 'g' ? t->n_labels - 1 : 0x1p53;
    if (type == 'l') return !(v > 1);
    if (type == 'f') return isfinite(v);
    return type == 'x' || (v >= 0 && v <= highest && v == floor(v));
}

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

// Splits `s` at each `separator` that no backslash stands before (at the end of a line it escapes
// nothing); returns the pieces and their number. The pieces are parts of s, lines without a \r at
// their end.
static char **split(char *s, char separator, int *n) {
    char **piece = NULL;
    for (*n = 0;; s++) {
        piece = grow(piece, *n + 1, sizeof *piece, "fields");
        piece[(*n)++] = s;
        for (; *s && *s != separator; s++) {
            if (*s == '\\' && s[1] && s[1] != '\n') s++;
        }
        if (separator == '\n' && s > piece[*n - 1] && s[-1] == '\r') s[-1] = 0;
        if (!*s) return piece;
        *s = 0;
    }
}

// The texts of an option, a|b|...; NULL where one is empty or has a bad escape.
static char **option_texts(char *value, int *n) {
    char **text = split(value, '|', n);
    for (int i = 0; i < *n; i++) {
        if (!unescape(text[i]) || !*text[i]) return NULL;
    }
    return text;
}

// Reads the n options, "key=value", of the task's header that stands at `place`. To add one: a row
// in the table, and its reading.
static void read_options(Task *t, const char *place, char **field, int n) {
    char *name = "", *kind = "", *list = "", *tokens = "256";
    char *labels = NULL, *stop = NULL, *chance = NULL;
    const struct { const char *key; char **value; } option[] = {
        {"name", &name}, {"kind", &kind}, {"metrics", &list}, {"head", &t->head}, {"stop", &stop},
        {"labels", &labels}, {"chance", &chance}, {"max_tokens", &tokens}, {NULL, NULL}};
    const char *bad = NULL;
    for (int i = 0, k = 0; i < n && !bad; i++, k = 0) {
        char *equals = strchr(field[i], '=');
        if (equals) *equals = 0;
        while (option[k].key && strcmp(option[k].key, field[i])) k++;
        if (option[k].key && equals) *option[k].value = equals + 1;
        else bad = field[i];
    }
    t->chance = NAN;
    if (chance && !(parse_double(chance, &t->chance) && fabs(t->chance) <= 1)) bad = "chance";
    if (!parse_int(tokens, 1, 1 << 20, &t->max_tokens)) bad = "max_tokens";
    if (labels && !(t->labels = option_texts(labels, &t->n_labels))) bad = "labels";
    if (stop && !(t->stops = option_texts(stop, &t->n_stops))) bad = "stop";
    if (!strcmp(kind, "classify") && t->n_labels < 2) bad = "labels";
    if (!strcmp(kind, "regress")) t->n_labels = 1;      // one output, the number itself
    char **metric = split(list, ',', &n);
    for (t->n_metrics = 0; t->n_metrics < n && t->n_metrics < MOST_METRICS; t->n_metrics++) {
        if (!(t->metrics[t->n_metrics] = metric_find(kind, metric[t->n_metrics]))) break;
    }
    if (t->n_metrics < n) bad = "metrics";
    for (int i = 0; i < N_KINDS; i++) {
        if (!strcmp(kinds[i].name, kind)) t->kind = &kinds[i];
    }
    if (!t->kind) bad = "kind";
    t->name = name;                 // it becomes a column of tables and a file name
    if (!*name || name[strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-_."
                                    "abcdefghijklmnopqrstuvwxyz0123456789")]) bad = "name";
    if (bad) {
        die("%s: %s=: missing, or no such option or value (names have A-Z a-z 0-9 . _ -); see "
            "README.md, A task of your own", place, bad);
    }
}

// Checks the columns of an item, so that all that follows can trust them, and undoes escapes.
static void check_item(const Task *t, Item *it, int64_t line) {
    const Kind *k = t->kind;
    const char *fault = NULL;
    int fewest = (int)strlen(k->columns);
    int64_t gold = 0, choices = k->output == CLASSIFIES ? t->n_labels : it->n_fields - 2;
    for (int f = 0; f < it->n_fields; f++) {
        char *field = it->field[f], column = k->columns[f < fewest ? f : fewest - 1];
        bool number = column == 'x' ? parse_double(field, &it->gold) && isfinite(it->gold)
                    : column != 'g' || parse_int(field, 0, choices - 1, &gold);
        if (!unescape(field)) fault = "a backslash before other than n, t, r or \\";
        else if (column == 't' && !*field) fault = "an empty column";
        else if (!number) fault = "the first column is not a number, or of no choice or label";
        if (column == 'g') it->gold = (double)gold;
    }
    if (it->n_fields < fewest || it->n_fields > k->most) fault = "too few or too many columns";
    if (fault) {
        die("%s: line %lld: %s, for kind %s; see README.md, A task of your own", t->path,
            (long long)line, fault, k->name);
    }
}

// Reads a task file and checks all of it. Its text stays: fields are parts of it.
static Task *task_load(const char *path) {
    Task *t = allocate(1, sizeof *t, "task");
    Text place = {0};
    int64_t bytes;
    int n, n_lines;
    char *text = read_file(path, &bytes);
    t->path = copy_string(path);
    t->hash = hash_bytes((unsigned char *)text, bytes);
    bool whole = (int64_t)strlen(text) == bytes;
    char **line = split(text + 3 * !strncmp(text, "\xef\xbb\xbf", 3), '\n', &n_lines);
    if (!whole) die("%s: line %d: a NUL byte; task files are text", path, n_lines);
    while (n_lines > 1 && !*line[n_lines - 1]) n_lines--;
    t->header = copy_string(line[0]);
    char **field = split(line[0], '\t', &n);
    if (n < 2 || strcmp(field[0], "#painters-task") || strcmp(field[1], "1")) {
        die("%s: line 1: not a task file of version 1; it begins #painters-task<TAB>1", path);
    }
    text_printf(&place, "%s: line 1", path);
    read_options(t, place.s, field + 2, n - 2);
    if (n_lines < 2) die("%s: line 2: no items; a task has at least one", path);
    t->n_items = n_lines - 1;
    t->items = allocate(t->n_items, sizeof *t->items, "items");
    t->cut = allocate(t->n_items, sizeof *t->cut, "items");
    for (int i = 1; i < n_lines; i++) {
        Item *it = &t->items[i - 1];
        it->field = split(line[i], '\t', &it->n_fields);
        check_item(t, it, i + 1);
    }
    return t;
}

// ------------------------------------------------------------------------------------------------
// 9. Sweeps: schedules walked as a tree over batches of items, and what is kept of it
// ------------------------------------------------------------------------------------------------

typedef struct {             // one metric of one task under one schedule, ready to print or draw
    const char *task, *metric;
    const char *method;      // "baseline", a name from `interventions`, or "path"
    int rank;                // of methods: 0 the baseline, then as in `interventions`, then paths
    int start;               // S, or the layer of drop and swap; -1 for baseline and path
    int turns;               // R of loop; -1 otherwise
    double seed;             // of random; NaN otherwise
    const char *schedule;    // as --show prints it
    int layers;              // T
    double value, error;     // error: standard error; NaN when there is none
    int64_t n, cut;          // items (of the summary: tasks); items that did not fit the context
    int64_t items;           // that the task has; n are done
    int64_t merged;          // seeds that it is the mean of
    double chance;           // of the task's first metric; NaN unknown
    bool first;              // is this the task's first (summary) metric
    const char *bos;         // "bos", "no-bos", "-" (BERT)
    const char *family;      // "llama" or "bert"
} Row;

enum { MAX_TASKS = 64 };
enum { MISSING, DONE, DONE_CUT };       // state of an item; cut: it did not fit the context

typedef struct {                // a schedule and its results
    Schedule schedule;
    char *key, *text;           // its name in files ("skip:3", "random:3:7"); as --show prints it
    double *kept[MAX_TASKS];    // of each task [n_items][1 + width]: state, values; NULL: nothing
    int64_t common;             // steps shared with the schedule before it in a walk,
    float *state;               // and the batch's rows behind them, once the walk was there
    float *features;            // --probe: pooled features of the train items, [n_items][dim],
    double *weights;            // and what is fitted to them, [outputs][dim + 1]
} Entry;

typedef struct {                // results: in memory, and line by line in an append-only file
    Entry *entries;
    Task *tasks[MAX_TASKS];
    int64_t n_entries, n_wanted;            // this run's come first, then others from the file
    int64_t latest;                         // found; of lines of a file most are the same or next
    int n_tasks, n_wanted_tasks;
    char *identity, family[8], bos[8];      // identity: the line that says what results belong to
    int layers;
    Text place;                             // what is being read, for errors: "FILE: line 7"
    FILE *out;                              // --out
} Store;

static const Intervention *intervention_named(const char *name, size_t n) {
    for (int i = 0; i < N_INTERVENTIONS; i++) {
        if (strlen(interventions[i].name) == n && !strncmp(interventions[i].name, name, n)) {
            return &interventions[i];
        }
    }
    return NULL;
}

static Entry *store_find(Store *st, const char *key) {
    for (int64_t i = 0; i < st->n_entries; i++) {
        int64_t k = (st->latest + i) % st->n_entries;
        if (strcmp(st->entries[k].key, key)) continue;
        st->latest = k;
        return &st->entries[k];
    }
    return NULL;
}

// Adds a schedule, or finds it where it was added before.
static Entry *store_schedule(Store *st, Schedule s) {
    const Intervention *v = intervention_named(s.method, strlen(s.method));
    Entry new = {.schedule = s, .text = schedule_text(&s)}, *known;
    Text key = {0};
    text_printf(&key, "%s", s.method);
    if (v) text_printf(&key, ":%lld", (long long)s.start);
    if (v && v->argument_flag) text_printf(&key, ":%lld", (long long)s.argument);
    if (!strcmp(s.method, "path")) text_printf(&key, ":%s", new.text);
    if ((known = store_find(st, key.s))) return known;
    new.key = key.s;
    st->entries = grow(st->entries, st->n_entries + 1, sizeof new, "schedules");
    st->entries[st->n_entries] = new;
    return &st->entries[st->n_entries++];
}

// Where two lines that describe results differ, as "kv=exact, not kv=mean".
static char *difference(const char *a, const char *b) {
    Text t = {0};
    int64_t word = 0;
    for (int64_t i = 0; a[i] && a[i] == b[i]; i++) word = strchr(" \t", a[i]) ? i + 1 : word;
    a += word;
    b += word;
    text_printf(&t, "%.*s, not %.*s", (int)strcspn(a, " \t"), a, (int)strcspn(b, " \t"), b);
    return t.s;
}

// Adds a task, which must be the one of that name that is there. How its line differs is looked for
// behind the number of items, which the hash of its file says better.
static void store_task(Store *st, Task *t) {
    for (int i = 0; i < st->n_tasks; i++) {
        if (strcmp(st->tasks[i]->name, t->name)) continue;
        if (!strcmp(st->tasks[i]->identity, t->identity)) return;
        die("%s: task %s is not the one of the other results (%s); keep them in files of their own",
            t->path, t->name, difference(strchr(t->identity + 6, '\t'),
                                         strchr(st->tasks[i]->identity + 6, '\t')));
    }
    if (st->n_tasks == MAX_TASKS) die("%s: over %d tasks in one run", t->path, MAX_TASKS);
    t->index = st->n_tasks;
    st->tasks[st->n_tasks++] = t;
}

// Room for what is kept of an item: state, values.
static double *kept_of(Entry *e, const Task *t, int64_t item) {
    int64_t n = 1 + t->kind->width;
    double **kept = &e->kept[t->index];
    if (!*kept) *kept = allocate(t->n_items * n, sizeof **kept, "results");
    return *kept + item * n;
}

_Noreturn static void bad_line(const Store *st, const char *fault) {
    die("%s: %s; choose another file, or remove the line", st->place.s, fault);
}

// What results belong to, the first line of a result file: that of this run, or else of the file.
static void store_identity(Store *st, const char *line) {
    if (st->identity && strcmp(st->identity, line)) {
        die("%s: these results belong to another model or other settings (%s); choose another file",
            st->place.s, difference(line, st->identity));
    }
    st->identity = copy_string(line);
    if (sscanf(line, "#painters-results 1 model=%*16[0-9a-f] family=%7[a-z] layers=%5d bos=%7s",
               st->family, &st->layers, st->bos) != 3 || st->layers < 1 || st->layers > 16384) {
        bad_line(st, "not a result file of version 1");
    }
}

// A task as its line in a result file knows it: #task, items, hashes, and its own header's options.
static Task *task_from_line(const Store *st, const char *line) {
    Task *t = allocate(1, sizeof *t, "task");
    int n;
    char **field = split(copy_string(line), '\t', &n);
    *t = (Task){.path = copy_string(st->place.s), .identity = copy_string(line)};
    if (n < 3 || !parse_int(field[1], 1, INT64_MAX / 64, &t->n_items)) {
        bad_line(st, "not the description of a task");
    }
    read_options(t, t->path, field + 3, n - 3);
    return t;
}

// The schedule that a key of a result file names.
static Schedule key_schedule(const Store *st, const char *key) {
    if (!strncmp(key, "path:", 5)) return schedule_parse(key + 5, st->layers, st->place.s);
    int n;
    char **part = split(copy_string(key), ':', &n);
    const Intervention *v = intervention_named(part[0], strlen(part[0]));
    int64_t start = -1, argument = -1;
    if (n != (v ? v->argument_flag ? 3 : 2 : 1) || (!v && strcmp(key, "baseline")) ||
        (n > 1 && !parse_int(part[1], 0, largest_start(v, st->layers), &start)) ||
        (n > 2 && !parse_int(part[2], v->lowest, v->highest, &argument))) {
        bad_line(st, "no schedule of such a model");
    }
    return schedule_build(v, st->layers, start, argument);
}

// One result: task, schedule, item, state, values ...
static void store_result(Store *st, char *line) {
    int n, task = 0;
    int64_t item;
    char **field = split(line, '\t', &n);
    while (task < st->n_tasks && strcmp(st->tasks[task]->name, field[0])) task++;
    const Task *t = task < st->n_tasks ? st->tasks[task] : NULL;
    if (!t || n != 4 + t->kind->width || !parse_int(field[2], 0, t->n_items - 1, &item)) {
        bad_line(st, "not a result of a task named above it");
    }
    Entry *e = store_find(st, field[1]);
    if (!e) e = store_schedule(st, key_schedule(st, field[1]));
    double value[16], *kept = kept_of(e, t, item);
    for (int i = 0; i < n - 3; i++) {
        bool good = parse_double(field[3 + i], &value[i]);
        if (i) good = good && value_possible(t, t->kind->values[i - 1], value[i]);
        else good = good && (value[0] == DONE || value[0] == DONE_CUT);
        if (!good) bad_line(st, "a value is no number, or not one that can stand there");
    }
    size_t bytes = (size_t)(n - 3) * sizeof *kept;
    if (kept[0] != MISSING && memcmp(kept, value, bytes)) {
        bad_line(st, "another result of the same item than before");
    }
    memcpy(kept, value, bytes);
    release(field);
}

// Reads a result file into the store and returns the length of its whole lines: a line that a kill
// left unfinished is not counted.
static int64_t store_read(Store *st, const char *path) {
    int64_t bytes, line = 0;
    char *text = read_file(path, &bytes), *at = text, *stop;
    for (; (stop = memchr(at, '\n', (size_t)(text + bytes - at))); at = stop + 1) {
        st->place.n = 0;
        text_printf(&st->place, "%s: line %lld", path, (long long)++line);
        *stop = 0;
        if (strlen(at) < (size_t)(stop - at)) bad_line(st, "a NUL byte");
        if (!strncmp(at, "#painters-results\t", 18)) store_identity(st, at);
        else if (!st->identity || line == 1) bad_line(st, "not a result file");
        else if (!strncmp(at, "#task\t", 6)) store_task(st, task_from_line(st, at));
        else store_result(st, at);
    }
    release(text);
    return at - text;
}

// Opens --out: reads what is there, cuts off a line that a kill left unfinished, and adds the lines
// that say what follows.
static void store_open(Store *st) {
    st->out = open_output(options.out, "ab");
    fseek(st->out, 0, SEEK_END);
    int64_t length = ftell(st->out), whole = length > 0 ? store_read(st, options.out) : 0;
    if (whole < length && ftruncate(fileno(st->out), whole)) {
        die("%s: cannot be cut: %s", options.out, strerror(errno));
    }
    fprintf(st->out, "%s\n", st->identity);
    for (int i = 0; i < st->n_wanted_tasks; i++) fprintf(st->out, "%s\n", st->tasks[i]->identity);
}

// Steps that two schedules, as --show prints them, begin with in common.
static int64_t common_steps(const char *a, const char *b) {
    int64_t n = 0;
    for (; *a && *a == *b; a++, b++) n += *a == ' ';
    return n + ((!*a || *a == ' ') && (!*b || *b == ' '));
}

// High layers and groups come before low layers: where the paper's schedules part, the branch that
// parts again is then mostly the last one, and few states need to be saved.
static int by_text(const void *a, const void *b) {
    return strcmp((*(Entry *const *)b)->text, (*(Entry *const *)a)->text);
}

// Puts schedules into the order of a walk: those that begin with the same steps are neighbours, and
// from one to the next the walk goes back only to where they part. That is a tree of schedules,
// walked depth first. Returns the layer passes that it takes.
static int64_t plan_walk(Entry **entry, int64_t n) {
    int64_t passes = 0;
    qsort(entry, (size_t)n, sizeof *entry, by_text);
    for (int64_t k = 0; k < n; k++) {
        Entry *x = entry[k];
        x->common = k ? common_steps(entry[k - 1]->text, x->text) : 0;
        passes += x->schedule.n_slots - x->schedule.first[x->common];
    }
    return passes;
}

typedef struct {                // a row of the batch that is scored or classified
    Request *request;
    int64_t row;
    int token, best;            // the token whose probability is asked for; the likeliest one
    double loglik;              // of `token`
    int sequence;               // of a text that is being generated,
    int64_t made;               // with so many tokens,
    bool begun;                 // not all of them BOS
} Target;

typedef struct {                // the evaluator at work on the items of one task
    Session *s;
    Store store;
    Entry **entry;              // [n]: the schedules of a walk, in its order
    int64_t n;
    Task *t, *train;            // train: of --probe, or NULL
    int64_t first, last;        // the batch holds requests first .. last-1
    Target *target;             // [n_targets]: its rows to score
    int64_t n_targets;
    int64_t *row_at;            // [max_length + 1]: rows of the last request's tokens in the batch
    int64_t prefix;             // tokens that all requests begin with, kept as sequence 0; or 0
    int64_t answers, answers_due;
    int64_t separate_passes;    // layer passes that a run of its own per schedule would need
    double cache_bytes, prefix_bytes;       // of keys and values, of kept prefixes: the most so far
    double started;
    FILE *log;
} Evaluation;

// Ctrl-C and termination: all that was finished is in --out already.
static const char *farewell;

static void on_interrupt(int signal_number) {
    if (write(fileno(stderr), farewell, strlen(farewell)) < 0) _Exit(1);
    _Exit(128 + signal_number);
}

// Whether this run has still to answer an item of a task under a schedule. Of the train items,
// whose features are collected before anything is answered, it needs all.
static bool due(Entry *x, const Task *t, int64_t item) {
    if (x->features) return true;
    if (options.limit >= 0 && item >= options.limit) return false;
    if (item % options.n_parts != options.part - 1) return false;
    return kept_of(x, t, item)[0] == MISSING;
}

// Fills in what the model says behind rows of the batch, some at a time: the log-likelihoods of
// tokens, which add up in their requests.
static void score(Session *s, Target *target, int64_t n) {
    enum { AT_ONCE = 128 };
    int64_t vocab = s->model->vocab_size, rows[AT_ONCE];
    float *z = allocate(AT_ONCE * vocab, sizeof *z, "logits");
    for (int64_t i = 0; i < n; i++) {
        target[i].request->loglik = 0;
        target[i].request->greedy = true;
    }
    for (int64_t from = 0, count; from < n; from += count) {
        Target *t = target + from;
        count = n - from < AT_ONCE ? n - from : AT_ONCE;
        for (int64_t i = 0; i < count; i++) rows[i] = t[i].row;
        logits(s, rows, count, z);
        #pragma omp parallel for
        for (int64_t i = 0; i < count; i++) {
            t[i].loglik = log_softmax_at(z + i * vocab, vocab, t[i].token, &t[i].best);
        }
        for (int64_t i = 0; i < count; i++) {
            t[i].request->loglik += t[i].loglik;
            t[i].request->greedy &= t[i].best == t[i].token;
        }
    }
    release(z);
}

// What the classifier, or a schedule's probe, makes of the batch's [CLS] rows.
static void classify(Evaluation *e, Entry *entry) {
    const Head *h = e->t->classifier;
    int64_t n = e->n_targets, d = e->s->model->dim, width = h ? h->n_labels : 0;
    int64_t *rows = allocate(n, sizeof *rows, "rows to classify");
    float *x = allocate(n * d, sizeof *x, "pooled features");
    float *z = allocate(n * width, sizeof *z, "class scores");
    for (int64_t j = 0; j < n; j++) rows[j] = e->target[j].row;
    pooled(e->s, rows, n, x);
    if (h) matmul(z, x, &h->weight, n);
    for (int64_t j = 0; j < n; j++) {
        Request *r = e->target[j].request;
        const float *own = x + j * d, *scores = z + j * width;
        int best = 0;
        r->text.n = 0;
        for (int k = 0; k < width; k++) {
            text_printf(&r->text, "%s%.6f", k ? " " : "", (double)scores[k]);
            if (scores[k] > scores[best]) best = k;
        }
        if (entry->features) memcpy(entry->features + r->item * d, own, (size_t)d * sizeof *own);
        else if (!h) r->prediction = probe_predict(entry->weights, own, d, e->t->n_labels);
        else r->prediction = h->regression ? (double)scores[0] : e->t->label_of[best];
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

// Writes an item's result, answered by n requests, to --out and --log; the log has the answers too.
static void write_result(const Evaluation *e, const Entry *x, const double *kept, const Request *r,
                         int64_t n) {
    const Kind *kind = e->t->kind;
    FILE *file[] = {e->store.out, e->log};
    for (int i = 0; i < 2; i++) {
        FILE *f = file[i];
        if (!f) continue;
        fprintf(f, "%s\t%s\t%lld", e->t->name, x->key, (long long)r->item);
        for (int k = 0; k <= kind->width; k++) fprintf(f, "\t%.17g", kept[k]);
        if (f == e->log) {
            fputc('\t', f);
            if (kind->output != SCORES) write_escaped(f, &r->text);
            else for (int64_t k = 0; k < n && !kind->adds; k++) {
                fprintf(f, "%s%.12g", k ? " " : "", r[k].loglik);
            }
        }
        fputc('\n', f);
    }
}

// Turns the answers to requests from .. end-1 into kept values, item by item.
static void keep_answers(Evaluation *e, Entry *x, int64_t from, int64_t end) {
    const Task *t = e->t;
    FILE *out = e->store.out;
    for (int64_t to; from < end; from = to) {
        const Request *r = &t->requests[from];
        for (to = from + 1; to < end && t->requests[to].item == r->item; to++) {}
        bool over = to == t->n_requests || t->requests[to].item != r->item;
        e->answers += over && due(x, t, r->item);
        if (x->features || !due(x, t, r->item)) continue;
        double *kept = kept_of(x, t, r->item);
        t->kind->value(t, r, to - from, kept + 1);
        if (!over) continue;            // the others of the item are in the next batch
        kept[0] = t->cut[r->item] ? DONE_CUT : DONE;
        write_result(e, x, kept, r, to - from);
    }
    if (out && (fflush(out) || ferror(out))) {
        die("%s: cannot be written: %s; free space, then run the same command again",
            options.out, strerror(errno));
    }
    progress(t->name, e->answers, e->answers_due, e->started);
}

// Lets the texts that are being generated grow by their likeliest tokens. One that has come to its
// end is kept, and makes room for the next.
static void take_tokens(Evaluation *e) {
    const Task *t = e->t;
    const Model *m = e->s->model;
    for (int64_t j = e->n_targets; j-- > 0;) {
        Target *v = &e->target[j];
        Text *text = &v->request->text;
        int64_t i = v->request - t->requests;
        char *cut = NULL;
        text_add(text, "", 0);
        if (v->best != m->eos) decode(m->tokenizer, v->begun ? v->best : -1, v->best, text);
        v->begun |= v->best != m->bos;          // until then a text begins (-1)
        for (int k = 0; k < t->n_stops; k++) {  // cut at the first of the stop texts
            char *stop = strstr(text->s, t->stops[k]);
            if (stop && (!cut || stop < cut)) cut = stop;
        }
        if (cut) {
            *cut = 0;
            text->n = cut - text->s;
        }
        if (++v->made < t->max_tokens && !cut && v->best != m->eos) continue;
        keep_answers(e, e->entry[0], i, i + 1);
        sequence_close(e->s, v->sequence);
        *v = e->target[--e->n_targets];
    }
}

// Runs the batch through all schedules of the walk. The rows are saved where a later schedule
// parts from the present one, and taken up again when its turn comes.
static void walk(Evaluation *e) {
    Session *s = e->s;
    int64_t size = s->batch.n_rows * s->model->dim;
    double bytes = 0;
    for (int64_t i = 0; i < s->n_sequences; i++) bytes += (double)s->sequences[i].bytes;
    e->cache_bytes = fmax(e->cache_bytes, bytes);
    embed(s);
    for (int64_t k = 0; k < e->n; k++) {
        Entry *x = e->entry[k];
        const Schedule *sc = &x->schedule;
        if (x->state) memcpy(s->x, x->state, (size_t)size * sizeof *s->x);
        release(x->state);
        x->state = NULL;
        for (int64_t depth = x->common; depth < sc->n_steps; depth++) {
            int64_t next = k + 1;
            while (next < e->n && e->entry[next]->common > depth) next++;
            if (next < e->n && e->entry[next]->common == depth) {
                float *state = allocate(size, sizeof *state, "states at a fork");
                e->entry[next]->state = memcpy(state, s->x, (size_t)size * sizeof *state);
            }
            run_step(s, sc, depth);
        }
        e->separate_passes += sc->n_slots;
        if (e->t->kind->output == CLASSIFIES) classify(e, x);
        else score(s, e->target, e->n_targets);
        if (e->t->kind->output == GENERATES) take_tokens(e);
        else keep_answers(e, x, e->first, e->last);
    }
}

// Puts the tokens of a request from position `from` up to `to` into the batch.
static void add_rows(Session *s, const Task *t, const Request *r, int sequence, int64_t from,
                     int64_t to) {
    const Model *m = s->model;
    for (int64_t j = from; j < to; j++) {
        int token = j == r->mask_at ? m->mask : t->pool.id[r->first + j];
        batch_add(s, sequence, token, m->arch == BERT && j >= r->segment_from);
    }
}

// Puts a request into the batch. The tokens that it shares with the one before it are read in the
// sequence q of that one, or in its ancestors. Returns its own sequence, which has room for so many
// tokens `more`.
static int add_request(Evaluation *e, Request *r, int q, int64_t more, int64_t n_slots) {
    Session *s = e->s;
    int64_t shared = s->batch.n_rows ? r->shared : e->prefix;
    while (q >= 0 && s->sequences[q].start >= shared) q = s->sequences[q].parent;
    if (q >= 0 && s->sequences[q].depth == MAX_DEPTH) {
        shared = s->sequences[q].start;
        q = s->sequences[q].parent;
    }
    for (int64_t j = shared; j < r->n; j++) e->row_at[j] = s->batch.n_rows + j - shared;
    if (shared < r->n) {
        q = sequence_new(s, q, r->n - shared + more, n_slots);
        s->sequences[q].start = s->sequences[q].end = shared;
        add_rows(s, e->t, r, q, shared, r->n);
    }
    e->target = grow(e->target, e->n_targets + r->n_targets, sizeof *e->target, "tokens to score");
    for (int64_t j = 0; j < r->n_targets; j++) {
        e->target[e->n_targets++] = (Target){.request = r, .row = e->row_at[r->row + j],
                                             .token = e->t->pool.id[r->target + j], .sequence = q};
    }
    return q;
}

enum { CACHE_MEGABYTES = 2048 };        // for keys and values; beyond it texts wait

// Fills the batch: with a row of each text that is being generated, and with the next requests,
// whole items at a time, until it has its tokens. A request shares what it begins with in common
// with the one before it: the choices of a question their context, questions their examples. Many
// texts grow in the same passes, and as some end, the prompts of others come in, so that passes
// stay full: a sweep of 12 layers took 0.74 of the time of one that shared prompts between
// schedules and let each batch run out.
static void fill_batch(Evaluation *e) {
    Session *s = e->s;
    const Model *m = s->model;
    Task *t = e->t;
    Request *r = t->requests;
    bool grows = t->kind->output == GENERATES;
    int64_t more = grows ? t->max_tokens : 0, cached = 0;
    int64_t n_slots = grows ? schedule_slots(s, &e->entry[0]->schedule) : 1;
    double token_bytes = 4.0 * (double)(n_slots * m->n_kv_heads * (m->head_dim + value_stride(m)));
    int q = e->prefix ? 0 : -1;
    batch_commit(s);
    if (!grows) {
        session_reset(s, e->prefix > 0);
        e->n_targets = 0;
    }
    for (int64_t i = 0; i < e->n_targets; i++) {
        Target *v = &e->target[i];
        v->row = s->batch.n_rows;
        batch_add(s, v->sequence, v->best, 0);
        cached += s->sequences[v->sequence].capacity;
    }
    for (e->first = e->last; e->last < t->n_requests;) {
        int64_t end = e->last, rows = 0;
        do rows += r[end].n - r[end].shared;
        while (++end < t->n_requests && !t->kind->adds && r[end].item == r[end - 1].item);
        cached += rows + more;
        if (s->batch.n_rows && (s->batch.n_rows + rows > options.batch ||
                                (double)cached * token_bytes > CACHE_MEGABYTES * 1e6)) break;
        while (e->last < end) q = add_request(e, &r[e->last++], q, more, n_slots);
    }
}

// Makes the requests of what is due of a task under the schedules of the walk. The tokens that all
// of them begin with, before the first row that is scored, are run only once where there is one
// schedule (the keys and values of many would not fit into memory).
static void ask(Evaluation *e, Task *t) {
    const Model *m = e->s->model;
    bool llama = m->arch == LLAMA;
    while (t->n_requests) release(t->requests[--t->n_requests].text.s);
    t->pool.n = 0;
    for (int64_t item = 0; item < t->n_items; item++) {
        bool any = false;
        for (int64_t k = 0; k < e->n && !any; k++) any = due(e->entry[k], t, item);
        if (any) t->kind->ask(t, m, options.bos, item);
    }
    e->prefix = llama && e->n == 1 && !e->s->kv_mean ? m->max_length : 0;
    for (int64_t i = 0; i < t->n_requests; i++) {
        Request *r = &t->requests[i], *before = i && llama ? r - 1 : NULL;
        const int *id = t->pool.id;
        while (before && r->shared < r->n && r->shared < before->n &&
               id[r->first + r->shared] == id[before->first + r->shared]) r->shared++;
        if (before && r->shared < e->prefix) e->prefix = r->shared;
        if (r->row < e->prefix) e->prefix = r->row;
    }
    if (e->prefix < 16) e->prefix = 0;          // not worth a pass
    for (int64_t i = 0; i < t->n_requests && t->kind->output == GENERATES; i++) {
        t->requests[i].shared = e->prefix;      // the text before it may have ended
    }
}

// Answers what is due of a task under the schedules of the walk.
static void run_requests(Evaluation *e, Task *t) {
    Session *s = e->s;
    e->t = t;
    e->first = e->last = e->n_targets = 0;
    ask(e, t);
    session_reset(s, 0);
    if (e->prefix) {
        int q = sequence_new(s, -1, e->prefix, schedule_slots(s, &e->entry[0]->schedule));
        add_rows(s, t, t->requests, q, 0, e->prefix);
        e->prefix_bytes = fmax(e->prefix_bytes, (double)s->sequences[q].bytes);
        walk(e);
    }
    for (fill_batch(e); s->batch.n_rows; fill_batch(e)) walk(e);
}

// ------------------------------------------------------------------------------------------------
// 10. Reports: result rows -> table, summary, chart in the terminal, figures as SVG
// ------------------------------------------------------------------------------------------------

// All rows of a report are of one model and one BOS setting. They are sorted by the keys below, so
// that a task, a panel (one metric of it), a series (one line of a figure), a point (of random all
// seeds) and a schedule are spans of neighbours, which agree in this many keys.
enum { BY_TASK = 1, BY_PANEL = 3, BY_SERIES = 5, BY_POINT = 7, BY_SCHEDULE = 8, ALL_KEYS = 10 };

static int compare_rows(const Row *a, const Row *b, int n_keys) {
    const int key[ALL_KEYS] = {
        strcmp(a->task, b->task), b->first - a->first, strcmp(a->metric, b->metric),
        a->rank - b->rank, a->turns - b->turns, a->start - b->start,
        a->start < 0 ? strcmp(a->schedule, b->schedule) : 0,
        (a->seed > b->seed) - (a->seed < b->seed),
        !isnan(a->value) - !isnan(b->value), (a->value > b->value) - (a->value < b->value),
    };
    int i = 0;
    while (i < n_keys - 1 && !key[i]) i++;
    return key[i];
}

static int by_all_keys(const void *a, const void *b) {
    return compare_rows(a, b, ALL_KEYS);
}

// How many of the first rows agree in so many keys.
static int64_t span(const Row *rows, int64_t n, int n_keys) {
    int64_t k = 0;
    while (k < n && !compare_rows(rows, rows + k, n_keys)) k++;
    return k;
}

// Makes one of sorted rows that agree in so many keys: their mean or median, the standard deviation
// of several as error. Returns how many rows are left.
static int64_t merge_rows(Row *rows, int64_t n, int n_keys, bool median) {
    int64_t kept = 0;
    for (int64_t i = 0, k; i < n; i += k) {
        Row r = rows[i];
        double squares = 0;
        k = span(rows + i, n - i, n_keys);
        for (int64_t j = i + 1; j < i + k; j++) {
            r.value += rows[j].value;
            r.chance += rows[j].chance;
            if (rows[j].n < r.n) r.n = rows[j].n;
        }
        r.value /= (double)k;
        r.chance /= (double)k;
        for (int64_t j = i; j < i + k; j++) squares += pow(rows[j].value - r.value, 2);
        if (median) r.value = (rows[i + (k - 1) / 2].value + rows[i + k / 2].value) / 2;
        if (k > 1) {
            r.error = sqrt(squares / (double)(k - 1));
            r.merged = k;
        }
        rows[kept++] = r;
    }
    return kept;
}

static const char MEAN[] = "mean", MEDIAN[] = "median";    // metrics of the summary, made here

static bool is_summary(const Row *r) {
    return r->metric == MEAN || r->metric == MEDIAN;
}

static bool is_llama(const Row *r) {
    return !strcmp(r->family, "llama");
}

static bool lower_is_better(const Row *r) {
    return strstr(r->metric, "perplexity") != NULL;
}

// Why a task does not count in the summary; NULL if it does. task: the first of its rows, which is
// the baseline, if that ran.
static const char *left_out(const Row *task) {
    if (lower_is_better(task)) return "perplexity";
    if (!is_llama(task)) return NULL;
    if (task->rank) return "no baseline";
    if (isnan(task->chance)) return "level of chance unknown";
    return task->value > task->chance ? NULL : "baseline not above chance";
}

// The summary, as rows of one more task: the median or mean of the tasks' scores, for schedules
// that have them all. A score is, for Llama, (score - chance) / (full - chance) of the first
// metric; for BERT, the mean of the task's metrics. Perplexities do not count. rows: n sorted rows;
// left: gets the tasks that do not count. Returns how many rows it made, at most n.
static int64_t make_summary(Row *out, const Row *rows, int64_t n, Text *left) {
    int64_t n_out = 0, n_tasks = 0, kept = 0;
    bool llama = n && is_llama(rows);
    const Row *task = NULL;
    const char *why = NULL;
    for (int64_t i = 0; i < n; i++) {
        const Row *r = &rows[i];
        if (!task || strcmp(r->task, task->task)) {
            task = r;
            why = left_out(task);
            n_tasks += !why;
            if (why) text_printf(left, "%s%s (%s)", left->n ? ", " : "", task->task, why);
        }
        double range = task->value - task->chance;
        if (why || lower_is_better(r) || (llama && !r->first)) continue;
        out[n_out] = *r;
        out[n_out].first = true;
        out[n_out].metric = llama ? MEDIAN : MEAN;
        out[n_out].value = llama ? (r->value - r->chance) / range : r->value;
        out[n_out++].chance = llama ? 0 : r->chance;
    }
    qsort(out, (size_t)n_out, sizeof *out, by_all_keys);
    n_out = merge_rows(out, n_out, BY_SCHEDULE, false);         // the metrics of a task
    for (Row *r = out; r < out + n_out; r++) {
        r->task = "summary";
        r->merged = 1;
    }
    qsort(out, (size_t)n_out, sizeof *out, by_all_keys);
    n_out = merge_rows(out, n_out, BY_SCHEDULE, llama);         // the tasks of a schedule
    for (const Row *r = out; r < out + n_out; r++) {
        if (r->merged < n_tasks) continue;
        out[kept] = *r;
        out[kept].error = NAN;                  // the deviation over tasks is no error
        out[kept].merged = 1;
        out[kept++].n = n_tasks;
    }
    return merge_rows(out, kept, BY_POINT, false);
}

// ------------------------------------------------------------------------------------------------
// Tables
// ------------------------------------------------------------------------------------------------

// A new string; a very long one is cut.
__attribute__((format(printf, 1, 2)))
static char *text_of(const char *format, ...) {
    char s[8000];               // more than a path can have
    va_list args;
    va_start(args, format);
    vsnprintf(s, sizeof s, format, args);
    va_end(args);
    return copy_string(s);
}

// "Llama, 32 layers, no-bos"
static char *model_label(const Row *r) {
    bool bos = strcmp(r->bos, "-");
    return text_of("%s, %d layers%s%s", is_llama(r) ? "Llama" : "BERT", r->layers,
                   bos ? ", " : "", bos ? r->bos : "");
}

static const char *metric_label(const Row *r) {
    return r->metric == MEDIAN ? "median of (score − chance) / (full − chance)"
         : r->metric == MEAN ? "mean of the scores" : r->metric;
}

// "400 items" of rows of one task; if some have fewer than the task, "10 to 20 of 400 items".
static char *items_label(const Row *rows, int64_t n) {
    int64_t least = rows->n, most = rows->n;
    if (is_summary(rows)) return text_of("%lld tasks", (long long)rows->n);
    for (int64_t i = 1; i < n; i++) {
        if (rows[i].n < least) least = rows[i].n;
        if (rows[i].n > most) most = rows[i].n;
    }
    char *part = least < most ? text_of("%lld to ", (long long)least) : "";
    if (least == rows->items) return text_of("%lld items", (long long)least);
    return text_of("%s%lld of %lld items", part, (long long)most, (long long)rows->items);
}

// A cell with a number; NaN is "-".
static void print_number(FILE *f, int width, const char *format, double v) {
    char number[40] = "-";
    if (!isnan(v)) snprintf(number, sizeof number, format, v);
    fprintf(f, "  %*s", width, number);
}

// Prints rows in aligned columns, under a line that begins with "#". Cells hold no blanks, so that
// awk and sort find them; only paths, at the end, do. Tasks that are not done whole follow.
static void print_rows(FILE *f, const Row *rows, int64_t n) {
    int task_width = 4, metric_width = 6;
    if (!n) return;
    bool summary = is_summary(rows);
    for (const Row *r = rows; r < rows + n; r++) {
        task_width = (int)fmax(task_width, (double)count_codepoints(r->task));
        metric_width = (int)fmax(metric_width, (double)strlen(r->metric));
    }
    fprintf(f, "# %s", model_label(rows));
    if (summary) fprintf(f, ": %s; tasks: %lld", metric_label(rows), (long long)rows->n);
    fprintf(f, "\n%-*s  %-*s  method    S/k  seed/R      value     error   %s  seeds   cut     BOS"
            "  path\n", task_width, "task", metric_width, "metric", summary ? "tasks" : "items");
    for (const Row *r = rows; r < rows + n; r++) {
        int pad = task_width - (int)count_codepoints(r->task);
        fprintf(f, "%s%*s  %-*s  %-8s", r->task, pad, "", metric_width, r->metric, r->method);
        print_number(f, 3, "%.0f", r->start < 0 ? NAN : r->start);
        print_number(f, 6, "%.0f", r->turns > 0 ? r->turns : r->merged > 1 ? NAN : r->seed);
        print_number(f, 9, fabs(r->value) < 1e4 ? "%.4f" : "%.5g", r->value);
        print_number(f, 8, fabs(r->error) < 1e4 ? "%.4f" : "%.5g", r->error);
        print_number(f, 6, "%.0f", (double)r->n);
        print_number(f, 5, "%.0f", isnan(r->seed) ? NAN : (double)r->merged);
        print_number(f, 4, "%.0f", summary ? NAN : (double)r->cut);
        fprintf(f, "  %6s  %s\n", r->bos, strcmp(r->method, "path") ? "-" : r->schedule);
    }
    for (int64_t i = 0, k; i < n && !summary; i += k) {
        bool whole = true;
        k = span(rows + i, n - i, BY_TASK);
        for (int64_t j = i; j < i + k; j++) whole = whole && rows[j].n == rows[j].items;
        if (!whole) fprintf(f, "# %s: %s\n", rows[i].task, items_label(rows + i, k));
    }
    fputc('\n', f);
}

// ------------------------------------------------------------------------------------------------
// Figures: prepared, then printed as charts or drawn as SVG
// ------------------------------------------------------------------------------------------------

typedef struct {                // a range of values
    double lo, hi;
    bool log;                   // lo and hi are log10 of values
} Scale;

static void include(Scale *s, double v) {
    if (!isfinite(v)) return;
    s->lo = fmin(s->lo, v);
    s->hi = fmax(s->hi, v);
}

// Where a value lies in the range, 0 to 1; values beyond it stay on its border.
static double place(const Scale *s, double v) {
    double x = s->log ? log10(v) : v;
    return fmin(fmax((x - s->lo) / (s->hi - s->lo), 0), 1);
}

// What there is to see of a panel: lines of values against S or against k, and the grid of looped
// parallel, R turns upwards, as a heat map. A matrix is a heat map that is of no panel.
enum { STARTS, LAYERS, LOOPS, MATRIX };
static const struct { const char *file, *x_label; } views[] = {
    {"", "start layer S (layers S+1 to T−S−1 are changed)"},
    {"-layers", "layer k"},
    {"-loops", "layers in parallel, T − 2S − 1"},
};

typedef struct {
    int view, rows, cols;
    const char *title, *subtitle, *x_label, *y_label;
    char **row_name, **col_name;
    Row *cell;                  // [rows][cols], the first row on top; a value of NaN: missing
    Scale scale;                // of the values
    const Row *panel;
    double level[2];            // baseline and chance; NaN: unknown
} Figure;

// The range of a figure's values, logarithmic for perplexities over more than two decades; that of
// lines has room for baseline, chance and error bars; those of perplexities may be cut off.
static Scale figure_scale(const Figure *g) {
    Scale s = {INFINITY, -INFINITY, false};
    const Row *end = g->cell + g->rows * g->cols;
    for (const Row *r = g->cell; r < end; r++) include(&s, r->value);
    for (int i = 0; i < 2 && g->view != LOOPS; i++) include(&s, g->level[i]);
    if (lower_is_better(g->panel) && s.lo > 0 && s.hi > 100 * s.lo) {
        s = (Scale){log10(s.lo), log10(s.hi), true};
    }
    if (g->view == LOOPS) return s;
    for (const Row *r = g->cell; r < end && !lower_is_better(g->panel); r++) {
        include(&s, r->value - r->error);
        include(&s, r->value + r->error);
    }
    double margin = s.hi > s.lo ? 0.04 * (s.hi - s.lo) : 0.05;
    return (Scale){s.lo - margin, s.hi + margin, s.log};
}

// Whether a view has a row for a series. Among other methods, looped parallel is shown with one R.
// In the grid, plain parallel is R = 1.
static bool in_view(const Row *r, int view, int turns, int least) {
    bool loop = r->turns > 0;
    if (r->start < 0) return false;             // no intervention
    if (view == LOOPS) return loop || (least > 1 && !strcmp(r->method, "parallel"));
    bool middle = interventions[r->rank - 1].range == MIDDLE;
    return middle == (view == STARTS) && (!loop || r->turns == turns);
}

static char *series_name(const Row *r, int view) {
    if (view == LOOPS) return text_of("%d", r->turns > 0 ? r->turns : 1);
    if (r->turns > 0) return text_of("%s, R = %d", r->method, r->turns);
    return text_of(r->merged > 1 ? "%s, seeds: %lld" : "%s", r->method, (long long)r->merged);
}

// What the frames or error bars of a figure mean.
static const char *figure_note(const Figure *g) {
    bool single = false, seeds = false;
    if (g->view == LOOPS) return "; framed: the best R of each column, of equals the least";
    for (const Row *r = g->cell; r < g->cell + g->rows * g->cols; r++) {
        single = single || (isfinite(r->error) && r->merged == 1);
        seeds = seeds || (isfinite(r->error) && r->merged > 1);
    }
    return single && seeds ? "; bars: standard error, of random the deviation over seeds"
         : single ? "; bars: standard error"
         : seeds ? "; bars: of random the deviation over seeds" : "";
}

// The figure of a view of a panel's points; without rows if there is nothing to see.
static Figure make_figure(const Row *panel, int64_t n, int view) {
    bool grid = view == LOOPS;
    int T = panel->layers, row = 0, turns = 0, least = 0, most = 0;
    Figure g = {.view = view, .panel = panel, .cols = view == LAYERS ? T : T / 2,
                .level = {panel->rank ? NAN : panel->value, panel->first ? panel->chance : NAN},
                .x_label = views[view].x_label, .y_label = grid ? "turns R" : metric_label(panel)};
    for (const Row *r = panel; r < panel + n; r++) {
        if (r->turns < 0) continue;
        if (!least) least = r->turns;
        if (turns != 3) turns = r->turns;       // of R = 3, as in the paper, or else the largest
        most = r->turns;
    }
    if (grid && least == most) return g;
    for (int64_t i = 0; i < n; i += span(panel + i, n - i, BY_SERIES)) {
        g.rows += in_view(panel + i, view, turns, least);
    }
    g.cell = allocate(g.rows * g.cols, sizeof *g.cell, "values of a figure");
    g.row_name = allocate(g.rows, sizeof *g.row_name, "names");
    g.col_name = allocate(g.cols, sizeof *g.col_name, "names");
    for (int col = 0; col < g.cols; col++) {
        g.col_name[col] = text_of("%d", grid ? 2 * col + 1 + T % 2 : col);
    }
    for (int64_t i = 0, k; i < n; i += k) {
        const Row *r = panel + i;
        k = span(r, n - i, BY_SERIES);
        if (!in_view(r, view, turns, least)) continue;
        int at = grid ? g.rows - 1 - row++ : row++;
        Row *cell = g.cell + at * g.cols;
        for (int col = 0; col < g.cols; col++) {
            cell[col] = *r;
            cell[col].value = cell[col].error = NAN;
        }
        for (int j = 0; j < k; j++) cell[grid ? g.cols - 1 - r[j].start : r[j].start] = r[j];
        g.row_name[at] = series_name(r, view);
    }
    g.scale = figure_scale(&g);
    g.title = text_of("%s: %s%s%s", panel->task, metric_label(panel),
                      grid ? " of looped parallel" : "",
                      lower_is_better(panel) ? " (lower is better)" : "");
    g.subtitle = text_of("%s; %s%s", model_label(panel), items_label(panel, n), figure_note(&g));
    return g;
}

// A chart: a line for each row, for each value a bar in eighths of the line. At most 80 columns:
// where there are more values, a bar is the worst of its neighbours.
static void print_chart(FILE *f, const Figure *g) {
    static const char *const bar[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
    const Scale *s = &g->scale;
    int step = (g->cols - 1) / 60 + 1;
    fprintf(f, "%s\n  across: %s, %s to %s%s\n  up: %.4g to %.4g%s", g->title, g->x_label,
            g->col_name[0], g->col_name[g->cols - 1],
            step > 1 ? text_of(", each bar the worst of %d", step) : "",
            s->log ? pow(10, s->lo) : s->lo, s->log ? pow(10, s->hi) : s->hi,
            s->log ? " (log)" : "");
    if (!isnan(g->level[0])) fprintf(f, ", baseline %.4g", g->level[0]);
    if (!isnan(g->level[1])) fprintf(f, ", chance %.4g", g->level[1]);
    fputc('\n', f);
    for (int row = 0; row < g->rows; row++) {
        const Row *cell = g->cell + row * g->cols;
        Scale seen = {INFINITY, -INFINITY, false};
        fprintf(f, "  %-18.18s", g->row_name[row]);
        for (int i = 0; i < g->cols; i += step) {
            Scale part = {INFINITY, -INFINITY, false};
            for (int j = i; j < i + step && j < g->cols; j++) include(&part, cell[j].value);
            double worst = lower_is_better(g->panel) ? part.hi : part.lo;
            fputs(isfinite(worst) ? bar[(int)(7 * place(s, worst) + 0.5)] : " ", f);
            include(&seen, part.lo);
            include(&seen, part.hi);
        }
        if (g->cols > 36) fprintf(f, "\n%20s", "");       // no room beside the bars
        fprintf(f, "  %.4g to %.4g\n", seen.lo, seen.hi);
    }
    fputc('\n', f);
}

// How the lines of a plot look: baseline, chance, then methods in the order of `interventions`;
// those beyond begin anew with the third. The colours are those of Okabe and Ito, which the
// colour-blind tell apart; dashes and markers tell lines apart in grey print. A marker is an SVG
// path around (0, 0).
typedef struct {
    const char *colour, *dash, *marker;
} Look;

static const Look looks[] = {
    {"#000000", "10 4", ""},
    {"#555555", "2 4", ""},
    {"#0072B2", "none", "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z"},
    {"#D55E00", "8 3", "M-4 -4h8v8h-8z"},
    {"#009E73", "2 2.5", "M0 -5L5 4H-5z"},
    {"#CC79A7", "9 3 2 3", "M0 -6L5.5 0L0 6L-5.5 0z"},
    {"#E69F00", "15 3", "M0 5.5L5.5 -3.5H-5.5z"},
    {"#56B4E9", "4 3", "M-2 -5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z"},
};
enum { N_LOOKS = sizeof looks / sizeof *looks };
enum { LEFT = 92, TOP = 66, RIGHT = LEFT + 540, BOTTOM = TOP + 330 };   // of lines on their page
#define STROKE "fill='none' stroke='%s' stroke-width='2' stroke-dasharray='%s'"
static const char MIDDLE_TEXT[] = "text-anchor='middle'", END_TEXT[] = "text-anchor='end'";

// Adds a text; `style`: further attributes. What XML does not allow becomes "?".
static void svg_text(Text *t, double x, double y, const char *style, const char *s) {
    text_printf(t, "<text x='%g' y='%g' %s>", x, y, style);
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

// A scale from `bottom` up to TOP: a text at x for every few of round values, multiples of 1, 2 or
// 5 times a power of ten or, where it is logarithmic, powers of ten, and lines from x0 to x1.
static void svg_axis(Text *t, const Scale *s, double bottom, double x, double x0, double x1) {
    double least = (s->hi - s->lo) / fmax(2, (bottom - TOP) / 40);
    double step = pow(10, floor(log10(least)));
    step *= least <= step ? 1 : least <= 2 * step ? 2 : least <= 5 * step ? 5 : 10;
    if (s->log) step = fmax(step, 1);
    int decimals = step < 1 ? (int)ceil(-log10(step) - 1e-9) : 0;
    double first = ceil(s->lo / step) + 0.0;    // + 0.0: no "-0"
    for (int i = 0; i < 999 && (first + i) * step <= s->hi; i++) {
        double v = (first + i) * step, y = bottom - (bottom - TOP) * (v - s->lo) / (s->hi - s->lo);
        text_printf(t, "<path d='M%g %gH%g' stroke='#dddddd'/>\n", x0, y, x1);
        svg_text(t, x, y + 4, x < x0 ? END_TEXT : "",
                 s->log ? text_of("%.10g", pow(10, v)) : text_of("%.*f", decimals, v));
    }
}

static void svg_marker(Text *t, const Look *look, double x, double y, double size) {
    text_printf(t, "<path d='%s' transform='translate(%.2f %.2f) scale(%g)' fill='%s' "
                "stroke='#ffffff' stroke-width='0.8'", look->marker, x, y, size, look->colour);
}

static void svg_legend(Text *t, const Look *look, double y, const char *name) {
    text_printf(t, "<line x1='%d' y1='%g' x2='%d' y2='%g' " STROKE "/>\n", RIGHT + 20, y,
                RIGHT + 56, y, look->colour, look->dash);
    svg_marker(t, look, RIGHT + 38, y, 1);
    text_printf(t, "/>\n");
    svg_text(t, RIGHT + 64, y + 4, "", name);
}

static double height(const Figure *g, double value) {
    return BOTTOM - (BOTTOM - TOP) * place(&g->scale, value);
}

// A row of values as a line that is broken where one is missing, with error bars, and with markers
// that hold the exact values. x: of the first value; dx: from one to the next.
static void svg_line(Text *t, const Figure *g, int row, const Look *look, double x, double dx) {
    const char *step = "M";
    Text points = {0};
    text_printf(t, "<path " STROKE " d='", look->colour, look->dash);
    for (int col = 0; col < g->cols; col++, x += dx) {
        const Row *r = &g->cell[row * g->cols + col];
        bool there = isfinite(r->value);
        double y = height(g, r->value);
        if (there) text_printf(t, "%s%.2f %.2f", step, x, y);
        step = there ? "L" : "M";
        if (!there) continue;
        if (isfinite(r->error)) {
            text_printf(&points, "<path stroke='%s' d='M%.2f %.2fV%.2f'/>\n", look->colour, x,
                        height(g, r->value - r->error), height(g, r->value + r->error));
        }
        svg_marker(&points, look, x, y, fmin(fmax(dx / 14, 0.55), 1));
        text_printf(&points, " data-method='%s' data-x='%s' data-arg='%d' data-value='%.17g' "
                    "data-error='%.17g'/>\n", r->method, g->col_name[col], r->turns, r->value,
                    r->error);
    }
    text_printf(t, "'/>\n");
    text_add(t, points.s, points.n);
}

// Lines of values, baseline and chance, with a legend. Lines stand a little aside from one another,
// so that their error bars can be told apart.
static void svg_lines(Text *t, const Figure *g, double dx) {
    double legend = TOP - 12, gap = fmin(3.5, 0.55 * dx / g->rows);
    svg_axis(t, &g->scale, BOTTOM, LEFT - 8, LEFT, RIGHT);
    for (int i = 0; i < 2; i++) {
        const char *name = i ? "chance" : "baseline";
        double v = g->level[i], y = height(g, v);
        if (!isfinite(v)) continue;
        text_printf(t, "<line x1='%d' y1='%g' x2='%d' y2='%g' data-line='%s' data-value='%.17g' "
                    STROKE "/>\n", LEFT, y, RIGHT, y, name, v, looks[i].colour, looks[i].dash);
        svg_legend(t, &looks[i], legend += 24, text_of("%s %.4g", name, v));
    }
    for (int row = 0; row < g->rows; row++) {
        const Look *look = &looks[2 + (g->cell[row * g->cols].rank - 1) % (N_LOOKS - 2)];
        svg_line(t, g, row, look, LEFT + dx / 2 + gap * (row - (g->rows - 1) / 2.0), dx);
        svg_legend(t, look, legend += 24, g->row_name[row]);
    }
}

// Dark blue to yellow, after matplotlib's viridis: lightness rises evenly, also for the
// colour-blind and in grey print.
enum { STOPS = 5 };
static const int stops[STOPS][3] = {
    {68, 1, 84}, {59, 82, 139}, {33, 145, 140}, {94, 201, 98}, {253, 231, 37},
};

// One cell: its colour, its value if that fits, framed if it is the best of its column, of several
// the lowest.
static void svg_cell(Text *t, const Figure *g, int row, int col, double size) {
    double v = g->cell[row * g->cols + col].value, x = LEFT + size * col, y = TOP + size * row;
    double part = (STOPS - 1) * place(&g->scale, v);
    int stop = part < STOPS - 2 ? (int)part : STOPS - 2, rgb[3];
    bool best = g->view == LOOPS;
    if (!isfinite(v)) return;
    for (int c = 0; c < 3; c++) {
        int lo = stops[stop][c], hi = stops[stop + 1][c];
        rgb[c] = (int)(lo + (part - stop) * (hi - lo) + 0.5);
    }
    const char *ink = 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2] < 128 ? "#ffffff" : "#000000";
    for (int i = 0; best && i < g->rows; i++) {
        double other = g->cell[i * g->cols + col].value;
        best = !(lower_is_better(g->panel) ? other < v : other > v) && !(i > row && other == v);
    }
    double frame = best ? 3 : 0, side = size - frame;
    text_printf(t, "<rect x='%g' y='%g' width='%g' height='%g' fill='rgb(%d,%d,%d)' stroke='%s' "
                "stroke-width='%g' shape-rendering='crispEdges' data-row='%d' data-col='%d' "
                "data-value='%.17g'%s/>\n", x + frame / 2, y + frame / 2, side, side, rgb[0],
                rgb[1], rgb[2], ink, frame, row, col, v, best ? " data-best='1'" : "");
    char *number = text_of("%.*f", fabs(v) < 10 ? 2 : fabs(v) < 100 ? 1 : 0, v);
    if (7.5 * (double)strlen(number) > size - 2) return;
    svg_text(t, x + size / 2, y + size / 2 + 4, text_of("%s fill='%s'", MIDDLE_TEXT, ink), number);
}

// A heat map with names of its rows, and what its colours mean.
static void svg_cells(Text *t, const Figure *g, double size, double right, double bottom) {
    for (int i = 0; i < g->rows * g->cols; i++) svg_cell(t, g, i / g->cols, i % g->cols, size);
    for (int i = 0; i < g->rows; i += (int)ceil(15 / size)) {
        svg_text(t, LEFT - 8, TOP + size * (i + 0.5) + 4, END_TEXT, g->row_name[i]);
    }
    text_printf(t, "<linearGradient id='ramp' x1='0' y1='1' x2='0' y2='0'>\n");
    for (int i = 0; i < STOPS; i++) {
        text_printf(t, "<stop offset='%g' stop-color='rgb(%d,%d,%d)'/>\n", i / (STOPS - 1.0),
                    stops[i][0], stops[i][1], stops[i][2]);
    }
    text_printf(t, "</linearGradient>\n<rect x='%g' y='%d' width='20' height='%g' "
                "fill='url(#ramp)'/>\n", right + 24, TOP, bottom - TOP);
    svg_axis(t, &g->scale, bottom, right + 54, right + 44, right + 49);
}

// A white page at least as wide as its title, with a box for lines or cells, and writes it.
static void write_svg(const char *path, const Figure *g) {
    bool heat = g->view >= LOOPS;
    double size = fmin(fmax(720.0 / (g->rows > g->cols ? g->rows : g->cols), 8), 46), wide = 1;
    double dx = heat ? size : (double)(RIGHT - LEFT) / g->cols, right = LEFT + dx * g->cols;
    double bottom = heat ? TOP + size * g->rows : BOTTOM, middle = (TOP + bottom) / 2;
    double title = 10.5 * (double)count_codepoints(g->title);
    double subtitle = 7.5 * (double)count_codepoints(g->subtitle);
    Text t = {0};
    text_printf(&t, "<svg xmlns='http://www.w3.org/2000/svg' role='img' width='%.0f' height='%.0f' "
                "font-family='Helvetica, Arial, DejaVu Sans, sans-serif' font-size='12'>\n"
                "<rect width='100%%' height='100%%' fill='#ffffff'/>\n"
                "<rect x='%d' y='%d' width='%g' height='%g' fill='none' stroke='#333333'/>\n",
                fmax(right + 205, 40 + fmax(title, subtitle)), bottom + 60, LEFT, TOP, right - LEFT,
                bottom - TOP);
    svg_text(&t, 20, 28, "font-size='16' font-weight='bold'", g->title);
    svg_text(&t, 20, 47, "fill='#444444'", g->subtitle);
    svg_text(&t, (LEFT + right) / 2, bottom + 44, MIDDLE_TEXT, g->x_label);
    svg_text(&t, -middle, 24, "text-anchor='middle' transform='rotate(-90)'", g->y_label);
    for (int i = 0; i < g->cols; i++) {
        wide = fmax(wide, 7 * (double)count_codepoints(g->col_name[i]) + 4);
    }
    for (int i = 0; i < g->cols; i += (int)ceil(wide / dx)) {
        svg_text(&t, LEFT + dx * (i + 0.5), bottom + 20, MIDDLE_TEXT, g->col_name[i]);
    }
    if (heat) svg_cells(&t, g, size, right, bottom);
    else svg_lines(&t, g, dx);
    text_printf(&t, "</svg>\n");
    FILE *f = open_output(path, "wb");
    fwrite(t.s, 1, (size_t)t.n, f);
    close_written(f, path);
}

typedef struct {
    Row *rows, *summary;        // sorted; seeds are one row
    int64_t n, n_summary, n_figures;
    Text left_out;              // of the summary
    Figure *figures;            // of all metrics of all tasks, and of the summary of several tasks
} Report;

// Prepares a report. Sorts the rows.
static Report make_report(Row *rows, int64_t n) {
    Row *points = allocate(2 * n + 1, sizeof *points, "rows of a report");
    int64_t n_points;
    if (n) {
        qsort(rows, (size_t)n, sizeof *rows, by_all_keys);
        memcpy(points, rows, (size_t)n * sizeof *rows);
    }
    n_points = merge_rows(points, n, BY_POINT, false);
    Report report = {.rows = points, .n = n_points, .summary = points + n_points};
    report.n_summary = make_summary(report.summary, rows, n, &report.left_out);
    if (report.n_summary && report.summary->n > 1) n_points += report.n_summary;
    for (int64_t i = 0, k; i < n_points; i += k) {
        k = span(points + i, n_points - i, BY_PANEL);
        for (int view = STARTS; view <= LOOPS; view++) {
            Figure g = make_figure(points + i, k, view);
            int64_t at = report.n_figures;
            if (!g.rows) continue;
            report.figures = grow(report.figures, at + 1, sizeof g, "figures");
            report.figures[report.n_figures++] = g;
        }
    }
    return report;
}

// The summary of every schedule: of random the mean over seeds, with their standard deviation.
static void report_summary(FILE *f, const Report *report) {
    const char *title = report->n_summary ? "Not in the summary" : "No summary";
    print_rows(f, report->summary, report->n_summary);
    if (report->left_out.n) fprintf(f, "# %s: %s\n\n", title, report->left_out.s);
}

// Every task's first metric, and the summary of several.
static void report_chart(FILE *f, const Report *report) {
    for (int64_t i = 0; i < report->n_figures; i++) {
        if (report->figures[i].panel->first) print_chart(f, &report->figures[i]);
    }
}

// Ends the program, before a long run, if a file cannot be made; or a folder, which it then makes.
static void check_place(const char *path, bool folder) {
    const char *slash = strrchr(path, '/');
    if (folder) mkdir(path, 0777);
    char *inside = folder ? text_of("%s/.", path)
                          : text_of("%.*s.", slash ? (int)(slash - path) + 1 : 0, path);
    if (access(inside, W_OK)) {
        die("%s: cannot be made: %s; choose another place", path, strerror(errno));
    }
}

// Whether n figures can be drawn to `where`: a file NAME.svg if there is one, otherwise a folder.
// Returns whether it is a folder.
static bool check_figures(const char *where, int64_t n) {
    const char *dot = strrchr(where, '.');
    bool folder = !dot || strcmp(dot, ".svg");
    if (!n) die("%s: no result has a start S or a layer k to draw; use --sweep", where);
    if (!folder && n > 1) {
        die("%s: these results make %lld figures; name a folder", where, (long long)n);
    }
    check_place(where, folder);
    return folder;
}

// Draws all figures, in a folder as files like "llama12-bos-hellaswag-acc-loops.svg"; other
// characters than A-Z a-z 0-9 . - _ are made "_".
static void report_figures(const char *where, const Report *report) {
    int64_t n = report->n_figures;
    bool folder = check_figures(where, n);
    for (int64_t i = 0; i < n; i++) {
        const Figure *g = &report->figures[i];
        const Row *r = g->panel;
        char *name = text_of("%s%d%s-%s%s%s%s.svg", r->family, r->layers,
                             strcmp(r->bos, "bos") ? "" : "-bos", r->task,
                             is_summary(r) ? "" : "-", is_summary(r) ? "" : r->metric,
                             views[g->view].file);
        for (char *p = name; *p; p++) {
            bool letter = (*p | 32) >= 'a' && (*p | 32) <= 'z';
            if (!letter && !strchr("._-0123456789", *p)) *p = '_';
        }
        write_svg(folder ? text_of("%s/%s", where, name) : where, g);
    }
}

// ------------------------------------------------------------------------------------------------
// 11. Runs: --eval, --probe, --sweep, --report, --cosine
// ------------------------------------------------------------------------------------------------

// Adds all starts of a method to a sweep: "skip", "random:SEEDS", "loop:R" or "loop:R1-R2".
static void sweep_method(Store *st, const char *word) {
    size_t length = strcspn(word, ":");
    const Intervention *v = intervention_named(word, length);
    const char *takes = v ? v->argument_flag : NULL;
    bool seeds = takes && !strcmp(takes, "seed"), good = v != NULL;
    int64_t low = good ? v->standard : 0, high = seeds ? 9 : low;
    if (word[length]) {
        int n;
        char **end = split(copy_string(word + length + 1), '-', &n);
        good = takes && n <= (seeds ? 1 : 2) && parse_int(end[0], 1, 100000, &low) &&
               parse_int(end[n - 1], low, 100000, &high);
        if (seeds) low = 0, high--;
    }
    if (!good) die("--sweep: \"%s\": expected a method, random:SEEDS, loop:R1-R2, path:FILE", word);
    for (int64_t start = 0; start <= largest_start(v, st->layers); start++) {
        for (int64_t a = low; a <= high; a++) {
            store_schedule(st, schedule_build(v, st->layers, start, a));
        }
    }
}

// The baseline and all schedules of a --sweep list: methods, and files with one path a line.
static void sweep_schedules(Store *st) {
    int n_words, n;
    char **word = split(copy_string(options.sweep), ',', &n_words);
    store_schedule(st, schedule_build(NULL, st->layers, -1, -1));
    for (char **w = word; w < word + n_words; w++) {
        int64_t bytes;
        if (strncmp(*w, "path:", 5)) {
            sweep_method(st, *w);
            continue;
        }
        char **line = split(read_file(*w + 5, &bytes), '\n', &n);
        for (int i = 0; i < n && (*line[i] || i + 1 < n); i++) {
            st->place.n = 0;
            text_printf(&st->place, "%s: line %d", *w + 5, i + 1);
            line[i][strcspn(line[i], "\r")] = 0;
            store_schedule(st, schedule_parse(line[i], st->layers, st->place.s));
        }
    }
}

// --sweep LIST --show: the schedules, one a line, and how much of their work is shared.
static void show_sweep(int T) {
    Store st = {.layers = T};
    int64_t separate = 0;
    sweep_schedules(&st);
    Entry **entry = allocate(st.n_entries, sizeof *entry, "schedules");
    for (int64_t i = 0; i < st.n_entries; i++) {
        entry[i] = &st.entries[i];
        separate += entry[i]->schedule.n_slots;
        puts(entry[i]->text);
    }
    int64_t shared = plan_walk(entry, st.n_entries);
    warn("%lld schedules: %lld layer passes, %lld for a run of its own each: %.2f times less",
         (long long)st.n_entries, (long long)shared, (long long)separate,
         (double)separate / (double)shared);
}

// Finds the classifier of a task, and the task's label of each of its outputs, by name. Where the
// names do not tell (LABEL_0, ...), the order is taken as it is, and that is said.
static void match_labels(Task *t, const Model *m) {
    const char *name = options.head ? options.head : t->head;
    const Head *h = NULL;
    for (int i = 0; i < m->n_heads_named; i++) {
        if (name ? !strcmp(m->heads[i].name, name) : m->n_heads_named == 1) h = &m->heads[i];
    }
    bool regress = !strcmp(t->kind->name, "regress"), known = true;
    if (!h || regress != h->regression || t->n_labels != h->n_labels) {
        die("%s: task %s needs a classifier with %d outputs; \"%s\" names none such of its %d; "
            "choose one with --head, or use --probe", m->path, t->name, t->n_labels,
            name ? name : "", m->n_heads_named);
    }
    t->classifier = h;
    t->label_of = allocate(h->n_labels, sizeof *t->label_of, "labels");
    for (int i = 0; i < h->n_labels && !regress; i++) {
        int *j = &t->label_of[i];
        while (*j < t->n_labels && strcmp(h->labels[i], t->labels[*j])) ++*j;
        known &= *j < t->n_labels;
    }
    if (known) return;
    for (int i = 0; i < h->n_labels; i++) t->label_of[i] = i;
    warn("%s: the labels of classifier %s (%s, ...) are not those of task %s: taken in order",
         m->path, h->name, h->labels[0], t->name);
}

// Checks that the model can do the task at all.
static void check_task(const Task *t, const Model *m) {
    const Kind *k = t->kind;
    bool bert = m->arch == BERT, classifies = k->output == CLASSIFIES;
    const char *missing = NULL;
    need_tokenizer(m);
    if (k->arch && k->arch != m->arch) {
        die("%s: a task of kind %s is for %s; %s is another model", t->path, k->name,
            k->arch == LLAMA ? "Llama" : "BERT", m->path);
    }
    if (options.probe && !classifies) die("%s: --probe is for kinds classify and regress", t->path);
    if (!bert && m->tokenizer_kind == WORDPIECE) missing = "tokenizer that leaves no text empty";
    else if (bert && (m->bos < 0 || m->eos < 0)) missing = "[CLS] or [SEP] token";
    else if (bert && !classifies && (!m->mlm.data || m->mask < 0)) missing = "masked-LM head";
    else if (classifies && !m->pooler.data) missing = "pooler";
    if (missing) {
        die("%s: has no %s, which kind %s needs; export a checkpoint with one", m->path, missing,
            k->name);
    }
    for (int64_t i = 0; i < t->n_items && classifies && m->n_segments < 2; i++) {
        if (t->items[i].n_fields < 3) continue;
        die("%s: line %lld: two texts, but %s knows one segment", t->path,
            (long long)i + 2, m->path);
    }
}

// The row of a schedule, still without a result.
static Row schedule_row(const Schedule *s, const char *text) {
    Row r = {.method = s->method, .start = (int)s->start, .schedule = text, .turns = -1,
             .seed = NAN, .layers = s->n_layers, .merged = 1};
    const Intervention *v = intervention_named(s->method, strlen(s->method));
    if (v) r.rank = 1 + (int)(v - interventions);
    else if (strcmp(s->method, "baseline")) r.rank = INT_MAX;
    if (!v || !v->argument_flag) return r;
    if (!strcmp(v->argument_flag, "seed")) r.seed = (double)s->argument;
    else r.turns = (int)s->argument;
    return r;
}

// What the store holds, as a report; or, planned, what it will hold, with values of NaN.
static Report store_report(const Store *st, bool planned) {
    Row *rows = NULL;
    int64_t n_rows = 0;
    for (int k = 0; k < st->n_wanted_tasks; k++) {
        const Task *t = st->tasks[k];
        int64_t width = t->kind->width;
        double *values = allocate(t->n_items * width, sizeof *values, "results");
        for (int64_t at = 0; at < st->n_wanted; at++) {
            const Entry *e = &st->entries[at];
            Row r = schedule_row(&e->schedule, e->text);
            r.task = t->name;
            r.chance = t->chance;
            r.bos = st->bos;
            r.family = st->family;
            r.items = t->n_items;
            for (int64_t item = 0; item < t->n_items && e->kept[k]; item++) {
                const double *kept = e->kept[k] + item * (1 + width);
                if (kept[0] == MISSING) continue;
                memcpy(values + r.n++ * width, kept + 1, (size_t)width * sizeof *kept);
                r.cut += kept[0] == DONE_CUT;
            }
            for (int j = 0; j < t->n_metrics && (r.n || planned); j++) {
                r.metric = t->metrics[j]->name;
                r.first = j == 0;
                r.value = r.error = NAN;
                if (!planned) {
                    r.value = metric_value(t->metrics[j], values, r.n, (int)width, &r.error);
                }
                rows = grow(rows, n_rows + 1, sizeof *rows, "results");
                rows[n_rows++] = r;
            }
        }
        release(values);
    }
    return make_report(rows, n_rows);
}

// Everything that is printed and drawn of results: a table, and where many schedules were run, the
// summary and charts.
static void show_results(const Store *st, const char *svg) {
    Report report = store_report(st, false);
    if (!report.n) {                    // a shard of few items may have none
        warn("no results to show");
        return;
    }
    if (svg) check_output(svg);
    print_rows(stdout, report.rows, report.n);
    if (st->n_wanted > 1) {
        report_summary(stdout, &report);
        report_chart(stdout, &report);
    }
    if (svg) report_figures(svg, &report);
}

// --report FILE ...: tables and figures of finished results, no model needed.
static void report_files(void) {
    Store st = {0};
    for (int64_t i = 0; i < options.n_reports; i++) store_read(&st, options.reports[i]);
    st.n_wanted = st.n_entries;
    st.n_wanted_tasks = st.n_tasks;
    show_results(&st, options.svg);
}

// --probe: pools the features of the train items under the schedules of the walk, and fits a
// classifier on each.
static void fit_probes(Evaluation *e) {
    Task *train = e->train;
    int64_t n = train->n_items, d = e->s->model->dim;
    double *gold = allocate(n, sizeof *gold, "labels");
    for (int64_t i = 0; i < n; i++) gold[i] = train->items[i].gold;
    for (int64_t k = 0; k < e->n; k++) {
        e->entry[k]->features = allocate(n * d, sizeof(float), "pooled features");
    }
    run_requests(e, train);
    #pragma omp parallel for schedule(dynamic)      // one thread a fit: the features took longer
    for (int64_t k = 0; k < e->n; k++) {
        Entry *x = e->entry[k];
        release(x->weights);
        x->weights = allocate(train->n_labels * (d + 1), sizeof *x->weights, "probes");
        probe_fit(x->features, gold, n, d, train->n_labels, options.strength, x->weights);
        release(x->features);
        x->features = NULL;
    }
    release(gold);
}

// Answers that are due of a task under a schedule; those of the train items count too.
static int64_t count_due(Entry *x, const Task *t, const Task *train) {
    int64_t n = 0;
    for (int64_t item = 0; item < t->n_items; item++) n += due(x, t, item);
    return n && train ? n + train->n_items : n;
}

// Under how many schedules the features of the train items are held at a time: under as many as a
// quarter of the memory holds, but few enough that results come in, as a run that is stopped loses
// what is pooled. Groups of 16 share nearly all: of the paper's schedules of 24 layers, 1.28 times
// fewer passes than separate runs instead of 1.31 in one group; of 4 it is 1.21, of 2 1.13.
static int64_t probe_group(int64_t n_features) {
    enum { MOST = 16 };
    double memory = 4e9;
#ifdef _SC_PHYS_PAGES
    memory = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
#endif
    double group = memory / 4 / ((double)n_features * sizeof(float));
    return group < 1 ? 1 : group > MOST ? MOST : (int64_t)group;
}

// Runs a task under all wanted schedules that are not done with it.
static void run_task(Evaluation *e, Task *t) {
    Store *st = &e->store;
    Entry **entry = allocate(st->n_wanted, sizeof *entry, "schedules");
    int64_t n = 0, most = t->kind->output == GENERATES ? 1 : st->n_wanted;
    if (e->train) most = probe_group(e->train->n_items * e->s->model->dim);
    for (int64_t i = 0; i < st->n_wanted; i++) {
        Entry *x = &st->entries[i];
        if (count_due(x, t, NULL)) entry[n++] = x;
    }
    plan_walk(entry, n);
    for (int64_t from = 0; from < n; from += most) {
        e->entry = entry + from;
        e->n = n - from < most ? n - from : most;
        e->entry[0]->common = 0;
        if (e->train) fit_probes(e);
        run_requests(e, t);
    }
}

// Begins the results of a run: what they belong to, its tasks and its schedules. Opens --out.
static void begin_results(Evaluation *e, Schedule schedule) {
    const Model *m = e->s->model;
    Store *st = &e->store;
    Text id = {0};
    text_printf(&id, "#painters-results\t1\tmodel=%016llx\tfamily=%s\tlayers=%d\tbos=%s\tkv=%s\t"
                "kernels=%s",
                options.out ? (unsigned long long)hash_bytes(m->file, m->bytes) : 0,
                m->arch == LLAMA ? "llama" : "bert", m->n_layers,
                m->arch == BERT ? "-" : options.bos ? "bos" : "no-bos",
                e->s->kv_mean ? "mean" : "exact", kernels_name());
    store_identity(st, id.s);
    if (options.probe) e->train = task_load(options.probe);
    if (e->train) check_task(e->train, m);
    for (; st->n_wanted_tasks < options.n_evals; st->n_wanted_tasks++) {
        Task *t = task_load(options.evals[st->n_wanted_tasks]), *train = e->train;
        check_task(t, m);
        if (train && (train->kind != t->kind || train->n_labels != t->n_labels)) {
            die("%s: its kind or labels are not those of %s", t->path, train->path);
        }
        if (!train && t->kind->output == CLASSIFIES) match_labels(t, m);
        Text line = {0};
        text_printf(&line, "#task\t%lld\tfile=%016llx", (long long)t->n_items,
                    (unsigned long long)t->hash);
        if (t->classifier) text_printf(&line, " head=%s", t->classifier->name);
        if (train) {
            text_printf(&line, " probe=%016llx strength=%g", (unsigned long long)train->hash,
                        options.strength);
        }
        text_printf(&line, "%s", t->header + strlen("#painters-task\t1"));
        t->identity = line.s;
        store_task(st, t);
        if (st->n_tasks == st->n_wanted_tasks) die("%s: task %s is given twice", t->path, t->name);
    }
    if (options.sweep) sweep_schedules(st);
    else store_schedule(st, schedule);
    st->n_wanted = st->n_entries;
    if (options.svg) check_figures(options.svg, store_report(st, true).n_figures);
    if (options.out) store_open(st);
}

// --eval: all tasks under one schedule, or under those of a sweep.
static void evaluate(Session *s, Schedule schedule) {
    const char *out = options.out;
    Evaluation e = {.s = s};
    Store *st = &e.store;
    e.row_at = allocate(s->model->max_length + 1, sizeof *e.row_at, "rows of a text");
    begin_results(&e, schedule);
    if (options.log) {
        e.log = open_output(options.log, out ? "ab" : "wb");     // a continued run's log goes on
        fputs("#task\tschedule\titem\tstate (2: cut)\tkept values\tscores or text\n", e.log);
    }
    if (options.svg) check_output(options.svg);
    farewell = quiet ? "" : out ? "\nstopped; the same command goes on from there\n"
                                : "\nstopped; with --out FILE a run can be continued\n";
    signal(SIGINT, on_interrupt);
    signal(SIGTERM, on_interrupt);
    for (int i = 0; i < st->n_wanted_tasks; i++) {
        for (int64_t k = 0; k < st->n_wanted; k++) {
            e.answers_due += count_due(&st->entries[k], st->tasks[i], e.train);
        }
    }
    e.started = seconds();
    for (int i = 0; i < st->n_wanted_tasks; i++) run_task(&e, st->tasks[i]);
    if (st->out) close_written(st->out, out);
    if (e.log) close_written(e.log, options.log);
    warn("memory: %.1f MB of activations, %.1f MB of keys and values, %.1f MB of kept prefixes",
         (double)s->work_bytes / 1e6, e.cache_bytes / 1e6, e.prefix_bytes / 1e6);
    if (options.sweep && s->layer_passes) {
        warn("layer passes: %lld run, %lld for a run of its own per schedule: %.2f times less",
             (long long)s->layer_passes, (long long)e.separate_passes,
             (double)e.separate_passes / (double)s->layer_passes);
    }
    show_results(st, options.svg);
}

// Cosine similarity of every pair of hidden states of one sequence, flattened over its positions,
// added to sum [n][n].
static void add_cosines(Session *s, const Schedule *schedule, const Task *t, Request *r,
                        double *sum) {
    int64_t size = r->n * s->model->dim, n = schedule->n_steps + 1;
    float *state = allocate(n * size, sizeof *state, "hidden states");
    r->mask_at = -1;
    session_reset(s, 0);
    add_rows(s, t, r, sequence_new(s, -1, r->n, 1), 0, r->n);
    embed(s);
    for (int64_t i = 0; i < n; i++) {
        if (i > 0) run_step(s, schedule, i - 1);
        memcpy(state + i * size, s->x, (size_t)size * sizeof *state);
    }
    #pragma omp parallel for
    for (int64_t pair = 0; pair < n * n; pair++) {
        const float *a = state + pair / n * size, *b = state + pair % n * size;
        double aa = 0, ab = 0, bb = 0;
        for (int64_t k = 0; k < size; k++) {
            aa += (double)a[k] * (double)a[k];
            ab += (double)a[k] * (double)b[k];
            bb += (double)b[k] * (double)b[k];
        }
        sum[pair] += ab / sqrt(aa * bb);
    }
    release(state);
}

// The similarity matrix [n][n] as a heat map. Steps with long names are shown by their numbers.
static void draw_cosines(const Model *m, const Schedule *schedule, const Task *t, int64_t done,
                         char **step, const double *similarity, int n, double lowest) {
    Row *cell = allocate(n * (int64_t)n, sizeof *cell, "cells of a figure");
    char **name = allocate(n, sizeof *name, "names");
    Row r = schedule_row(schedule, schedule_text(schedule));
    r.family = m->arch == LLAMA ? "llama" : "bert";
    r.layers = m->n_layers;
    r.bos = m->arch == BERT ? "-" : options.bos ? "bos" : "no-bos";
    for (int i = 0; i < n; i++) name[i] = strlen(step[i]) > 6 ? text_of("step %d", i) : step[i];
    for (int64_t i = 0; i < n * (int64_t)n; i++) cell[i].value = similarity[i];
    Text what = {0};
    if (*options.cosine) text_printf(&what, "%s, sequences: %lld", t->name, (long long)done);
    else text_printf(&what, "“%.60s”", options.prompt);
    text_printf(&what, "; %s", strcmp(r.method, "path") ? r.method : r.schedule);
    if (r.start >= 0) text_printf(&what, " %d", r.start);
    if (r.turns > 0) text_printf(&what, ", R = %d", r.turns);
    if (!isnan(r.seed)) text_printf(&what, ", seed %.0f", r.seed);
    Figure g = {.view = MATRIX, .rows = n, .cols = n, .row_name = name, .col_name = name,
                .title = "Cosine similarity of hidden states",
                .subtitle = text_of("%s; %s", model_label(&r), what.s),
                .x_label = "state after", .y_label = "state after",
                .cell = cell, .scale = {lowest, 1, false}};
    write_svg(options.svg, &g);
}

// --cosine: the paper's similarity matrix, averaged over a task's sequences or of one prompt, one
// sequence in memory at a time.
static void cosine(Session *s, const Schedule *schedule) {
    const Model *m = s->model;
    Task *t = *options.cosine ? task_load(options.cosine) : allocate(1, sizeof *t, "task");
    Text heading = {0};
    int n;
    if (options.svg) check_place(options.svg, false);
    if (options.svg) check_output(options.svg);
    if (*options.cosine) {
        check_task(t, m);
        for (int64_t i = 0; i < t->n_items && (options.limit < 0 || i < options.limit); i++) {
            t->kind->ask(t, m, options.bos, i);
        }
    } else {
        Request *r = new_request(t, 0);
        t->pool = prompt_ids(m, options.prompt, options.bos);
        r->n = r->segment_from = t->pool.n;
    }
    text_printf(&heading, "emb %s", schedule_text(schedule));
    char **name = split(heading.s, ' ', &n);
    double *mean = allocate(n * (int64_t)n, sizeof *mean, "similarities"), started = seconds();
    double lowest = 1, done = 0;
    for (int64_t i = 0; i < t->n_requests; i++) {
        Request *r = &t->requests[i];
        if (i && r->mask_at >= 0 && r->first == r[-1].first) continue;  // a window of running text
        add_cosines(s, schedule, t, r, mean);
        done++;
        progress("cosine", i + 1, t->n_requests, started);
    }
    for (int i = 0; i < n; i++) printf("\t%s", name[i]);
    for (int64_t i = 0; i < n * (int64_t)n; i++) {
        mean[i] /= done;
        lowest = mean[i] < lowest ? mean[i] : lowest;
        if (i % n == 0) printf("\n%s", name[i / n]);
        printf("\t%.6f", mean[i]);
    }
    putchar('\n');
    if (options.svg) draw_cosines(m, schedule, t, (int64_t)done, name, mean, n, lowest);
}

// ------------------------------------------------------------------------------------------------
// 12. The command line
// ------------------------------------------------------------------------------------------------

static void print_info(const Model *m) {
    static const char *const tokenizers[] = {"none", "SentencePiece BPE", "WordPiece"};
    bool llama = m->arch == LLAMA;
    int64_t weights = 0, count[N_TYPES] = {0};
    for (const Tensor *t = m->tensors; t < m->tensors + m->n_tensors; t++) {
        weights += t->rows * t->cols;
        count[t->type]++;
    }
    printf("file          %s, %.1f MB, of %s\n"
           "architecture  %s, %d layers of dim %d, hidden %d, norm epsilon %g\n"
           "heads         %d of %d, %d for keys and values\n", m->path, (double)m->bytes / 1e6,
           model_note(m, "source"), llama ? "Llama" : "BERT", m->n_layers, m->dim, m->hidden,
           (double)m->norm_eps, m->n_heads, m->head_dim, m->n_kv_heads);
    if (llama) {
        printf("rotary        base %g, pairs %s\noutput head   %s\n", (double)m->rope_theta,
               m->rope == ROPE_HALVES ? "(i, i + head_dim/2)" : "(2i, 2i + 1)",
               m->output.data == m->embed.data ? "tied" : "its own");
    } else {
        printf("parts         encoder%s%s\n", m->pooler.data ? ", pooler" : "",
               m->mlm.data ? ", masked-LM head" : "");
    }
    printf("tokenizer     %s, %d tokens; vocabulary %d, bos %d, eos %d; context %d tokens\n",
           tokenizers[m->tokenizer_kind], m->tokenizer ? m->tokenizer->n_tokens : 0, m->vocab_size,
           m->bos, m->eos, m->max_length);
    printf("weights       %.1f million in %d tensors:", (double)weights / 1e6, m->n_tensors);
    for (int t = 0; t < N_TYPES; t++) {
        if (count[t]) printf(" %lld %s", (long long)count[t], type_names[t]);
    }
    for (int i = 0; i < m->n_heads_named; i++) {
        const Head *h = &m->heads[i];
        printf("\nhead          %s: %s", h->name, h->regression ? "regression" : "labels");
        for (int j = 0; j < h->n_labels; j++) printf(" %s", h->labels[j]);
    }
    bool amx = !strcmp(kernels_name(), "amx") && !options.kernels;
    printf("\nkernels       %s%s\n", kernels_name(), amx ? "; avx512 for --prompt" : "");
}

// To add a flag: a field in `options` (section 6), a row here, and its use. The type says what the
// value is. The interventions of section 1 and their second numbers are flags too. A run takes one
// flag of those under the first heading and of those under the last, and any of the others.
enum { WHAT, HOW, WHICH_LAYERS, N_GROUPS };
enum { HEADING, SWITCH, OPTIONAL, WORD, WORDS, INTEGER, NUMBER };
enum { MOST_THREADS = 1024 };
typedef struct {
    const char *name, *value;   // --name VALUE
    int type;
    void *target;               // of that type: bool, const char *, list of those, int64_t, double
    double lowest, highest;
    const char *help;
} Flag;

static const Flag flags[] = {
    {"What", "", HEADING, NULL, 0, 0, ""},
    {"prompt", "TEXT", WORD, &options.prompt, 0, 0, "Llama: continue TEXT; BERT: fill its [MASK]s"},
    {"eval", "TASK.tsv ...", WORDS, &options.evals, 0, 0, "score task files"},
    {"cosine", "[TASK.tsv]", OPTIONAL, &options.cosine, 0, 0,
     "cosine similarity of hidden states, over a task or of --prompt"},
    {"report", "FILE ...", WORDS, &options.reports, 0, 0, "tables and figures of --out files"},
    {"quantize", "OUT", WORD, &options.quantize, 0, 0, "write the model to OUT with 8-bit weights"},
    {"info", "", SWITCH, &options.info, 0, 0, "what the model file holds"},
    {"show", "", SWITCH, &options.show, 0, 0, "print the schedule, or all of a --sweep"},
    {"How", "", HEADING, NULL, 0, 0, ""},
    {"help", "", SWITCH, &options.help, 0, 0, "this text"},
    {"layers", "T", INTEGER, &options.layers, 1, 16384, "with --show: T layers, no model needed"},
    {"threads", "N", INTEGER, &options.threads, 1, MOST_THREADS, "threads (default: one a core)"},
    {"limit", "N", INTEGER, &options.limit, 1, 9e15, "only the first N items of each task"},
    {"batch", "TOKENS", INTEGER, &options.batch, 1, 1 << 24, "tokens in one pass (default 2048)"},
    {"bos", "", SWITCH, &options.bos, 0, 0, "begin texts with BOS (default for --prompt)"},
    {"no-bos", "", SWITCH, &options.no_bos, 0, 0, "begin them without (default for --eval)"},
    {"kv", "exact|mean", WORD, &options.kv, 0, 0, "parallel layers keep their own keys, or a mean"},
    {"head", "NAME", WORD, &options.head, 0, 0, "BERT: which classifier of the file"},
    {"probe", "TRAIN.tsv", WORD, &options.probe, 0, 0, "BERT: fit a classifier, --eval with it"},
    {"strength", "X", NUMBER, &options.strength, 1e-9, 1e9, "L2 penalty of --probe (default 1)"},
    {"out", "FILE", WORD, &options.out, 0, 0, "keep all results; the same command goes on"},
    {"log", "FILE", WORD, &options.log, 0, 0, "write every item (with --out: add it to FILE)"},
    {"shard", "I/N", WORD, &options.shard, 0, 0, "only the I-th of N parts of the items"},
    {"svg", "FILE|DIR", WORD, &options.svg, 0, 0, "draw the figure in FILE, several in folder DIR"},
    {"tokens", "N", INTEGER, &options.tokens, 1, 9e15, "how far --prompt continues (default 256)"},
    {"temperature", "X", NUMBER, &options.temperature, 0, 1e6, "0 takes the likeliest (default)"},
    {"top-p", "X", NUMBER, &options.top_p, 1e-9, 1, "sample from this much of the distribution"},
    {"sample-seed", "K", INTEGER, &options.sample_seed, -9.2e18, 9.2e18, "seed of sampling"},
    {"kernels", "NAME", WORD, &options.kernels, 0, 0, "plain: the ones to learn from; see --info"},
    {"quiet", "", SWITCH, &quiet, 0, 0, "no status on stderr"},
    {"Which layers (0 to T-1; the middle is S < i < T-S)", "", HEADING, NULL, 0, 0, ""},
    {"path", "EXPR", WORD, &options.path, 0, 0, "the schedule itself, e.g. \"0-3 (4-7)*2 8-11\""},
    {"sweep", "LIST", WORD, &options.sweep, 0, 0, "many schedules, as in skip,random:10,loop:1-8"},
};
enum { N_FLAGS = sizeof flags / sizeof *flags, MOST_FLAGS = N_FLAGS + 2 * N_INTERVENTIONS };

// The i-th of all flags: the rows above, then two for each intervention, the second with the name
// "" where it takes no second number.
static Flag flag_at(int i) {
    if (i < N_FLAGS) return flags[i];
    const Intervention *v = &interventions[(i - N_FLAGS) / 2];
    Flag method = {v->name, v->range == MIDDLE ? "S" : "K", INTEGER, &options.start, -9.2e18,
                   9.2e18, v->help};
    Flag argument = {v->argument_flag ? v->argument_flag : "", "N", INTEGER, &options.argument,
                     (double)v->lowest, (double)v->highest, v->argument_help};
    return (i - N_FLAGS) % 2 ? argument : method;
}

static void print_help(void) {
    puts("painters - run a frozen Llama or BERT with its layers skipped, shuffled, ...\n\n"
         "  painters MODEL [what to do] [how] [which layers]");
    for (int i = 0; i < MOST_FLAGS; i++) {
        Flag f = flag_at(i);
        int left = 21 - (int)strlen(f.name);
        if (f.type == HEADING) printf("\n%s\n", f.name);
        else if (*f.name) printf("  --%s %-*s %s\n", f.name, left, f.value, f.help);
    }
    puts("\nExamples\n"
         "  painters llama.bin --prompt \"Once upon a time\" --parallel 3\n"
         "  painters bert.bin --prompt \"The cat [MASK] on the mat.\" --drop 5\n"
         "  painters llama.bin --eval arc.tsv --sweep skip,random:10 --out arc.out --svg figs\n"
         "  painters --layers 32 --random 9 --seed 3 --show");
}

static void take_number(const Flag *f, const char *value) {
    bool whole = f->type == INTEGER, good;
    double *number = f->target;
    if (whole) good = parse_int(value, (int64_t)f->lowest, (int64_t)f->highest, f->target);
    else good = parse_double(value, number) && *number >= f->lowest && *number <= f->highest;
    if (!good) die("--%s: \"%s\" is not a %snumber from %.9g to %.9g", f->name, value,
                   whole ? "whole " : "", f->lowest, f->highest);
}

// Reads the arguments into `options`. Every flag is known, has the values it needs, and numbers
// are numbers; otherwise one line says which is not. A value does not begin with "--", so that none
// swallows the flag behind it; only the text of --prompt may be anything.
static void parse_arguments(int argc, char **argv) {
    const char **list = NULL;           // where words go, behind a flag that takes many
    const char *chosen[N_GROUPS] = {0};
    options.evals = allocate(argc, sizeof *options.evals, "arguments");
    options.reports = allocate(argc, sizeof *options.reports, "arguments");
    for (int i = 1, at = 0, group = -1; i < argc; i++, at = 0, group = -1) {
        const char *word = strcmp(argv[i], "-h") ? argv[i] : "--help";
        const char *next = argv[i + 1];             // NULL behind the last
        bool value = next && strncmp(next, "--", 2), file = next && *next != '-';
        if (*word != '-') {
            if (list) *list++ = word;
            else if (!options.model) options.model = word;
            else die("\"%s\": one model at a time; quote a text of words", word);
            continue;
        }
        Flag f = flag_at(at);
        while (f.type == HEADING || !*f.name || word[1] != '-' || strcmp(f.name, word + 2)) {
            group += f.type == HEADING;
            if (++at == MOST_FLAGS) die("%s: no such flag; painters --help lists them", word);
            f = flag_at(at);
        }
        list = f.type == WORDS ? *(const char ***)f.target : NULL;
        while (list && *list) list++;
        if (f.target == &options.prompt) value = next;
        if (f.type == WORDS ? !file : f.type >= WORD && !value) {
            die("%s: a value is missing: %s", word, f.value);
        }
        if (f.type == SWITCH) *(bool *)f.target = true;
        else if (f.type == OPTIONAL) *(const char **)f.target = file ? argv[++i] : "";
        else if (f.type == WORD) *(const char **)f.target = argv[++i];
        else if (f.type != WORDS) take_number(&f, argv[++i]);
        if (f.target == &options.argument) options.argument_flag = f.name;
        if (f.target == &options.start) options.method = &interventions[(at - N_FLAGS) / 2];
        bool alone = group != HOW && f.target != &options.argument &&
                     (f.type != OPTIONAL || file) && (f.type != WORDS || chosen[group] != f.name);
        if (!alone) continue;
        if (chosen[group]) die("%s: --%s is given too; one at a time", word, chosen[group]);
        chosen[group] = f.name;
    }
    while (options.evals[options.n_evals]) options.n_evals++;
    while (options.reports[options.n_reports]) options.n_reports++;
    if (options.method && !options.argument_flag) options.argument = options.method->standard;
}

// Flags that need others, and values that are more than a number.
static void check_options(void) {
    const Intervention *v = options.method;
    const char *second = options.argument_flag, *takes = v ? v->argument_flag : NULL;
    const char *kv = options.kv ? options.kv : "exact", *cosine_of = options.cosine;
    bool eval = options.n_evals, report = options.n_reports, samples = options.temperature > 0;
    bool runs = eval || options.prompt || cosine_of || options.show;
    const struct { bool broken; const char *flag, *where; } rule[] = {
        {options.sweep && !eval && !options.show, "sweep", "with --eval or --show"},
        {(options.path || v) && !runs, v ? v->name : "path", "with --prompt, --eval or --show"},
        {options.probe && !eval, "probe", "with --eval"},
        {options.out && !eval, "out", "with --eval"},
        {options.log && !eval, "log", "with --eval"},
        {options.shard && !eval, "shard", "with --eval"},
        {options.head && (!eval || options.probe), "head", "with --eval and without --probe"},
        {options.strength != 1 && !options.probe, "strength", "with --probe"},
        {options.svg && !eval && !report && !cosine_of, "svg", "with --eval, --cosine, --report"},
        {cosine_of && !*cosine_of && !options.prompt, "cosine", "with a task or --prompt"},
        {samples && !options.prompt, "temperature", "with --prompt"},
        {options.top_p < 1 && !samples, "top-p", "with a --temperature over 0"},
        {options.bos && options.no_bos, "bos", "without --no-bos"},
        {options.layers > 0 && (!options.show || options.model), "layers",
         "with --show and without a model"},
        {report && options.model, "report", "without a model"},
        {strcmp(kv, "exact") && strcmp(kv, "mean"), "kv", "exact or mean"},
        {second && (!takes || strcmp(second, takes)), second, "with the flag that --help names"}};
    for (size_t i = 0; i < sizeof rule / sizeof *rule; i++) {
        if (rule[i].broken) die("--%s: only %s", rule[i].flag, rule[i].where);
    }
    if (!options.model && options.layers < 0 && !report) {
        die("no model file; give one first: painters MODEL ... (or --help)");
    }
    if (!options.shard) return;
    int n;
    char **part = split(copy_string(options.shard), '/', &n);
    if (n != 2 || !parse_int(part[1], 1, 1000000, &options.n_parts) ||
        !parse_int(part[0], 1, options.n_parts, &options.part)) {
        die("--shard: \"%s\" is not I/N with I from 1 to N, as in 2/8", options.shard);
    }
}

static Schedule chosen_schedule(int T) {
    if (options.path) return schedule_parse(options.path, T, "--path");
    return schedule_build(options.method, T, options.start, options.argument);
}

// --show: needs no model, only its number of layers.
static void show_schedules(void) {
    int T = options.layers > 0 ? (int)options.layers : model_load(options.model)->n_layers;
    Schedule schedule = chosen_schedule(T);
    if (options.sweep) show_sweep(T);
    else puts(schedule_text(&schedule));
}

// Everything that needs a model.
static void run_command(void) {
    Model *m = model_load(options.model);
    Schedule schedule = chosen_schedule(m->n_layers);
    Session *s = session_new(m);
    s->kv_mean = options.kv && !strcmp(options.kv, "mean");
    if (options.head && !m->n_heads_named) die("--head: %s has no classifiers", m->path);
    if (options.info) print_info(m);
    else if (options.quantize) model_quantize(m, options.quantize);
    else if (options.cosine) cosine(s, &schedule);
    else if (options.prompt && m->arch == BERT) fill_masks(s, &schedule);
    else if (options.prompt) continue_text(s, &schedule);
    else if (options.n_evals) evaluate(s, schedule);
    else die("nothing to do; add --prompt TEXT, --eval TASK.tsv, --info, ... (see --help)");
    session_free(s);
    model_free(m);
}

#ifndef PAINTERS_NO_MAIN
static void set_threads(void) {
#ifdef _OPENMP
#ifndef _WIN32      // an absurd number would make LLVM's OpenMP end the program: it must not see it
    const char *text = getenv("OMP_NUM_THREADS");
    char *end = "";
    long n = text ? strtol(text, &end, 10) : 1;
    if (n < 1 || n > MOST_THREADS || (*end && *end != ',')) {
        warn("OMP_NUM_THREADS: \"%s\" is not 1 to %d and does not count", text, MOST_THREADS);
        unsetenv("OMP_NUM_THREADS");
    }
#endif
    if (options.threads) omp_set_num_threads((int)options.threads);
#endif
}

int main(int argc, char **argv) {
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN);       // a file over the system's limit is then an error
#endif
    parse_arguments(argc, argv);
    set_threads();
    if (options.help || argc == 1) print_help();
    else {
        check_options();
        if (options.n_reports) report_files();
        else if (options.show) show_schedules();
        else run_command();
    }
    close_written(stdout, "stdout");
    return argc == 1;
}
#endif
#endif  // LANES
#undef PATH
#undef LANES
#undef ACCUMULATORS

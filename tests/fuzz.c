// Fuzz targets, each the whole program but for the tokenizers. A find is whatever is not status 0
// or one line of error: a crash, a hang, a sanitizer's report, memory without reason.
//
//   python3 tests/fuzzing.py MINUTES [TARGET ...]     builds and runs them with clang's libFuzzer
//
// Built with any other compiler the program runs the files that it is given, one after another:
// tests/test_fuzz.py does that with all of tests/fuzz/TARGET. The environment names the target
// (FUZZ_TARGET) and a folder with llama.bin and bert.bin (FUZZ_FOLDER). The bytes of an input are:
//
//   model       a model file; its length and checksum are put right first
//   tokenizer   u8 kind (odd: SentencePiece), u16 bytes of the section, the section, a text
//   task        u8 (odd: for BERT), a task file; its items are asked of a small model
//   results     a result file, as --report reads it
//   path        u8 number of layers, a --path text
//   command     arguments, a newline behind each; @l and @b stand for the models
#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void *fuzz_calloc(size_t n, size_t size);
static void fuzz_free(void *p);
static FILE *fuzz_open(const char *name, const char *mode);
static int fuzz_close(FILE *f);
static void *fuzz_map(void *at, size_t bytes, int protection, int flags, int fd, long offset);
static int fuzz_unmap(void *p, size_t bytes);
static _Noreturn void fuzz_exit(int status);

#define main painters_main
#define calloc fuzz_calloc
#define free fuzz_free
#define fopen fuzz_open
#define fclose fuzz_close
#define mmap fuzz_map
#define munmap fuzz_unmap
#define exit fuzz_exit
#include "../painters.c"
#undef main
#undef calloc
#undef free
#undef fopen
#undef fclose
#undef mmap
#undef munmap
#undef exit

// What a run that ends in exit() leaves behind is given back here, so that hours fit in memory.
typedef struct Allocation {
    struct Allocation *next, *before;
    size_t bytes[2];                            // keeps what follows aligned
} Allocation;
static Allocation blocks = {&blocks, &blocks, {0}};
static bool keep_memory = true;                 // what was allocated before the first input stays

static void *fuzz_calloc(size_t n, size_t size) {
    if (size && n > ((size_t)1 << 31) / size) abort();     // inputs of some kilobytes do not justify it
    Allocation *b = calloc(1, sizeof *b + n * size);
    if (!b) abort();
    b->next = b->before = b;
    #pragma omp critical (blocks)               // a bootstrap's threads allocate too
    if (!keep_memory) {
        *b = (Allocation){blocks.next, &blocks, {n * size}};
        blocks.next = b->next->before = b;
    }
    return b + 1;
}

static void fuzz_free(void *p) {
    if (!p) return;
    Allocation *b = (Allocation *)p - 1;
    #pragma omp critical (blocks)
    {
        b->before->next = b->next;
        b->next->before = b->before;
    }
    free(b);
}

// A mapped file is memory of its exact size, so that a byte too far is seen.
static void *fuzz_map(void *at, size_t bytes, int protection, int flags, int fd, long offset) {
    (void)at, (void)protection, (void)flags;
    void *p = fuzz_calloc(1, bytes);
    return pread(fd, p, bytes, offset) == (ssize_t)bytes ? p : MAP_FAILED;
}

static int fuzz_unmap(void *p, size_t bytes) {
    (void)bytes;
    fuzz_free(p);
    return 0;
}

// Nothing is written anywhere; files that were left open are closed.
enum { FILES = 16 };
static FILE *files[FILES];

static FILE *fuzz_open(const char *name, const char *mode) {
    for (int i = 0; i < FILES; i++) {
        if (!files[i]) return files[i] = fopen(strchr("wa", *mode) ? "/dev/null" : name, mode);
    }
    abort();
}

static int fuzz_close(FILE *f) {
    for (int i = 0; i < FILES; i++) {
        if (files[i] == f) files[i] = NULL;
    }
    return fclose(f);
}

static void clean_up(void) {
    for (int i = 0; i < FILES; i++) {
        if (files[i]) fuzz_close(files[i]);
    }
    while (blocks.next != &blocks) fuzz_free(blocks.next + 1);
}

static jmp_buf ended;
static _Noreturn void fuzz_exit(int status) {
    (void)status;
    longjmp(ended, 1);
}
static void on_fault(const char *text) {
    if (strchr(text, '\n')) abort();            // one line
    longjmp(ended, 1);
}

static char input[256], llama[256], bert[256];

static void write_input(const uint8_t *data, size_t size) {
    FILE *f = fopen(input, "wb");
    if (!f || (size && fwrite(data, 1, size, f) != size) || fclose(f)) abort();
}

// One run of the program, from a state as at its start.
static __typeof__(options) options_at_start;
static void run_program(char **words, int n) {
    options = options_at_start;
    memset(&used, 0, sizeof used);
    quiet = true;
    if (!setjmp(ended)) painters_main(n, words);
    fflush(stdout);
    clean_up();
}
#define RUN(...) run_program((char *[]){"painters", __VA_ARGS__, NULL}, \
                     (int)(sizeof (char *[]){"painters", __VA_ARGS__} / sizeof(char *)))

static void fuzz_model(const uint8_t *data, size_t size) {
    static uint8_t copy[1 << 20];
    if (size > sizeof copy) return;
    memcpy(copy, data, size);
    if (size >= 36) {
        for (int i = 0; i < 8; i++) copy[16 + i] = (uint8_t)((uint64_t)size >> 8 * i);
        int64_t header = read_i64(copy + 24);
        bool whole = header >= 0 && header <= (int64_t)size;
        uint32_t sum = whole ? header_checksum(copy, header) : 0;
        for (int i = 0; i < 4; i++) copy[32 + i] = (uint8_t)(sum >> 8 * i);
    }
    write_input(copy, size);
    RUN(input, "--info");
    RUN(input, "--prompt", "the cat [MASK]", "--tokens", "3", "--limit", "3");
}

static void fuzz_tokenizer(const uint8_t *data, size_t size) {
    if (size < 3) return;
    int64_t bytes = data[1] | data[2] << 8, rest = (int64_t)size - 3;
    if (bytes > rest) bytes = rest;
    // Of their exact sizes, so that a byte too far is seen.
    unsigned char *section = malloc(bytes ? (size_t)bytes : 1);
    unsigned char *text = malloc(rest > bytes ? (size_t)(rest - bytes) : 1);
    memcpy(section, data + 3, (size_t)bytes);
    memcpy(text, data + 3 + bytes, (size_t)(rest - bytes));
    if (!setjmp(ended)) {
        static Model m;
        Ids ids = {0};
        Text back = {0};
        m = (Model){.path = "section", .tokenizer_kind = data[0] % 2 ? SENTENCEPIECE : WORDPIECE,
                    .vocab_size = 1 << 20, .unk = 1};
        tokenizer_load(&m, section, bytes);
        const Tokenizer *t = m.tokenizer;
        encode(t, (const char *)text, rest - bytes, &ids);
        for (int64_t i = 0; i < ids.n; i++) {
            if (ids.id[i] < 0 || ids.id[i] >= t->n_tokens) abort();
            decode(t, i ? ids.id[i - 1] : -1, ids.id[i], &back);
        }
    }
    clean_up();
    free(section);
    free(text);
}

static void fuzz_task(const uint8_t *data, size_t size) {
    if (!size) return;
    write_input(data + 1, size - 1);
    RUN(*data % 2 ? bert : llama, "--eval", input, "--limit", "2", "--drop", "1");
}

static void fuzz_results(const uint8_t *data, size_t size) {
    write_input(data, size);
    RUN("--report", input);
}

static void fuzz_path(const uint8_t *data, size_t size) {
    char layers[8], *text = malloc(size + 1);
    if (!size) return free(text);
    snprintf(layers, sizeof layers, "%d", *data + 1);
    memcpy(text, data + 1, size - 1);
    text[size - 1] = 0;
    RUN("--layers", layers, "--show", "--path", text);
    free(text);
}

static void fuzz_command(const uint8_t *data, size_t size) {
    char *words[64] = {"painters"}, *text = malloc(size + 1);
    int n = 1;
    memcpy(text, data, size);
    text[size] = 0;
    for (char *at = text, *end; n < 63 && (end = strchr(at, '\n')) != NULL; at = end + 1) {
        *end = 0;
        words[n++] = !strcmp(at, "@l") ? llama : !strcmp(at, "@b") ? bert : at;
        if (strstr(at, "/dev") || strstr(at, "/proc")) n--;     // endless files are none of ours
    }
    run_program(words, n);
    free(text);
}

static void begin(const char *folder) {
    if (!freopen("/dev/null", "w", stdout)) abort();
    if (!freopen("/dev/null", "r", stdin)) abort();
    snprintf(input, sizeof input, "%s/input-%ld", folder, (long)getpid());
    snprintf(llama, sizeof llama, "%s/llama.bin", folder);
    snprintf(bert, sizeof bert, "%s/bert.bin", folder);
    options_at_start = options;
    on_error = on_fault;
    #pragma omp parallel
    for (int slot = 0; slot < 2; slot++) scratch(slot, 1 << 23);     // per thread; there to stay
    keep_memory = false;
}

static const struct {
    const char *name;
    void (*run)(const uint8_t *data, size_t size);
} targets[] = {{"model", fuzz_model}, {"tokenizer", fuzz_tokenizer}, {"task", fuzz_task},
               {"results", fuzz_results}, {"path", fuzz_path}, {"command", fuzz_command}};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static void (*target)(const uint8_t *, size_t);
    for (size_t i = 0; !target && i < sizeof targets / sizeof *targets; i++) {
        if (strcmp(targets[i].name, getenv("FUZZ_TARGET"))) continue;
        begin(getenv("FUZZ_FOLDER"));
        target = targets[i].run;
    }
    target(data, size);
    return 0;
}

#ifndef FUZZER
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        static uint8_t data[1 << 20];
        FILE *f = fopen(argv[i], "rb");
        if (!f) return 1;
        size_t size = fread(data, 1, sizeof data, f);
        fclose(f);
        LLVMFuzzerTestOneInput(data, size);
    }
    remove(input);
    fprintf(stderr, "%d inputs\n", argc - 1);
    return 0;
}
#endif

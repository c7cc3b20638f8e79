// libFuzzer target: a tokenizer section and a text, both hostile. Any error but die() is a find.
//
//   clang -g -O1 -std=gnu11 -fsanitize=fuzzer,address,undefined tests/fuzz_tokenizer.c -o fuzz -lm
//   python3 tests/tokenizing.py SEEDS                 (writes inputs to start from)
//   ASAN_OPTIONS=detect_leaks=0 ./fuzz -max_len=20000 FOUND SEEDS
//
// Input: u8 kind (odd: SentencePiece), u16 bytes of the section, the section, the text. An error
// leaves through longjmp, hence no check for leaks.
#include <setjmp.h>
#define PAINTERS_NO_MAIN
#include "../painters.c"

static jmp_buf refused;

static void refuse(const char *message) {
    if (!strstr(message, "; ")) abort();        // every message says how to mend the fault
    longjmp(refused, 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < 3) return 0;
    int64_t bytes = data[1] | data[2] << 8, rest = (int64_t)size - 3;
    if (bytes > rest) bytes = rest;
    static unsigned char *section, *text;       // of their exact sizes, so that ASan sees a byte too far
    static Tokenizer t;
    static Ids ids;
    static Text back;
    free(section);
    free(text);
    section = malloc(bytes ? (size_t)bytes : 1);
    text = malloc(rest > bytes ? (size_t)(rest - bytes) : 1);
    memcpy(section, data + 3, (size_t)bytes);
    memcpy(text, data + 3 + bytes, (size_t)(rest - bytes));
    on_error = refuse;
    ids.n = back.n = 0;
    tokenizer_free(&t);
    if (setjmp(refused)) return 0;
    tokenizer_load(&t, "section", data[0] % 2 ? SENTENCEPIECE : WORDPIECE, section, bytes, 1 << 20,
                   1);
    encode(&t, (const char *)text, rest - bytes, &ids);
    for (int64_t i = 0; i < ids.n; i++) {
        if (ids.id[i] < 0 || ids.id[i] >= t.n_tokens) abort();
        decode(&t, i ? ids.id[i - 1] : -1, ids.id[i], &back);
    }
    return 0;
}

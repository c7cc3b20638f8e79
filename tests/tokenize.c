// Runs a tokenizer section, the part of a model file that export.py's read_tokenizer() makes.
//
//   tokenize SECTION KIND VOCABULARY UNK        KIND 1 SentencePiece, 2 WordPiece
//
// Reads commands from stdin and answers each with a line:
//   e N <newline> N bytes     ids of the text
//   d ID ID ... <newline>     the text of these ids, in hexadecimal
//   t N <newline> N bytes     seconds of CPU that encoding takes, the best of three, and the number
//                             of ids
#define PAINTERS_NO_MAIN
#include "../painters.c"

static void command_encode(const Tokenizer *t, int64_t bytes, bool timed) {
    char *text = allocate(bytes + 1, 1, "text");
    if (fread(text, 1, (size_t)bytes, stdin) != (size_t)bytes) die("stdin: the text ends early");
    Ids ids = {0};
    double best = 1e9;
    for (int i = 0; i < (timed ? 3 : 1); i++) {
        clock_t start = clock();
        ids.n = 0;
        encode(t, text, bytes, &ids);
        double spent = (double)(clock() - start) / CLOCKS_PER_SEC;
        if (spent < best) best = spent;
    }
    if (timed) printf("%.6f %lld", best, (long long)ids.n);
    for (int64_t i = 0; !timed && i < ids.n; i++) printf(i ? " %d" : "%d", ids.id[i]);
    putchar('\n');
    release(text);
    release(ids.id);
}

static void command_decode(const Tokenizer *t, char *words) {
    Text text = {0};
    int previous = -1;
    for (char *word = strtok(words, " \n"); word; word = strtok(NULL, " \n")) {
        int id = atoi(word);
        decode(t, previous, id, &text);
        previous = id;
    }
    for (int64_t i = 0; i < text.n; i++) printf("%02x", (unsigned char)text.s[i]);
    putchar('\n');
    release(text.s);
}

int main(int argc, char **argv) {
    if (argc != 5) die("tokenize: four arguments are needed; see the source");
    int64_t bytes;
    char *data = read_file(argv[1], &bytes);
    char *exact = allocate(bytes, 1, "section");    // so that sanitizers see a byte too far
    memcpy(exact, data, (size_t)bytes);
    Model m = {.path = argv[1], .tokenizer_kind = atoi(argv[2]), .vocab_size = atoi(argv[3]),
               .unk = atoi(argv[4])};
    tokenizer_load(&m, (unsigned char *)exact, bytes);
    static char line[1 << 20];
    while (fgets(line, sizeof line, stdin)) {
        if (*line == 'd') command_decode(m.tokenizer, line + 1);
        else command_encode(m.tokenizer, atoll(line + 1), *line == 't');
        fflush(stdout);
    }
    for (int64_t i = 0; i < m.n_own; i++) release(m.own[i]);
    release(m.own);
    release(exact);
    release(data);
    return 0;
}

// Checks every kernel path of this build against sums in double precision, and that results have
// the same bits whatever the number of rows, threads and pieces of cache.
//   cc -O1 -fopenmp tests/test_kernels.c -o test_kernels -lm && ./test_kernels
// Prints file:line for each kind of failure, and returns 1 if there was any.
#define PAINTERS_NO_MAIN
#if defined EMULATE_AMX && defined __x86_64__
#include "emulate_amx.h"
#endif
#include "../painters.c"

static int failures;

#define CHECK(ok, ...) \
    do { \
        if (!(ok) && failures++ < 20) { \
            printf("%s:%d: %s: ", __FILE__, __LINE__, kernels_name()); \
            printf(__VA_ARGS__); \
            printf("\n"); \
        } \
    } while (0)

static bool on_amx(void) { return !strcmp(kernels_name(), "amx"); }

static uint32_t seed = 1;

static uint32_t bits32(void) {
    seed = seed * 1664525 + 1013904223;
    return seed >> 8 ^ seed << 24;
}

static int64_t below(int64_t n) { return (int64_t)(bits32() & 0xffffff) % n; }
static float uniform(void) { return (float)(bits32() & 0xffffff) / (1 << 23) - 1; }     // -1..1

// Exactly this many bytes, so that address sanitizers and valgrind see any read behind them.
static void *exact(int64_t bytes) {
    void *p = malloc((size_t)(bytes ? bytes : 1));
    if (!p) exit(2);
    return p;
}

static float *uniforms(int64_t n) {
    float *p = exact(n * 4);
    for (int64_t i = 0; i < n; i++) p[i] = uniform();
    return p;
}

// What float16 means, from its definition.
static double f16_value(int h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double v = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
    if (exponent == 31) v = fraction ? NAN : INFINITY;
    return h & 0x8000 ? -v : v;
}

static Tensor random_tensor(int type, int64_t rows, int64_t cols) {
    int64_t n = rows * cols, groups = rows * ((cols + 31) / 32);
    uint16_t *scale = NULL;
    void *data = exact(n * (type == F32 ? 4 : type == Q8 ? 1 : 2));
    for (int64_t i = 0; i < n; i++) {
        float f = uniform();
        uint32_t u;
        memcpy(&u, &f, 4);
        if (type == F32) ((float *)data)[i] = f;
        if (type == BF16) ((uint16_t *)data)[i] = (uint16_t)(u >> 16);
        if (type == F16) ((uint16_t *)data)[i] = (uint16_t)((bits32() & 0x83ff) | below(16) << 10);
        if (type == Q8) ((int8_t *)data)[i] = (int8_t)(below(255) - 127);
    }
    if (type == Q8) {
        scale = exact(groups * 2);
        for (int64_t i = 0; i < groups; i++) scale[i] = (uint16_t)(0x2000 + below(0x400));
    }
    return (Tensor){type, rows, cols, data, scale, NULL};
}

static void free_tensor(Tensor w) {
    free((void *)(uintptr_t)w.data);
    free((void *)(uintptr_t)w.scale);
}

static double weight(const Tensor *w, int64_t row, int64_t col) {
    int64_t i = row * w->cols + col;
    uint32_t u;
    float f;
    switch (w->type) {
    case F32: return (double)((const float *)w->data)[i];
    case F16: return f16_value(((const uint16_t *)w->data)[i]);
    case BF16:
        u = (uint32_t)((const uint16_t *)w->data)[i] << 16;
        memcpy(&f, &u, 4);
        return (double)f;
    default:
        return ((const int8_t *)w->data)[i] * f16_value(w->scale[row * ((w->cols + 31) / 32)
                                                                 + col / 32]);
    }
}

static void check_widen(void) {
    for (int type = 0; type < N_TYPES; type++) {
        for (int64_t cols = 1; cols < 100; cols += 11) {
            Tensor w = random_tensor(type, 3, cols);
            float *row = exact(cols * 4);
            for (int64_t r = 0; r < 3; r++) {
                widen(row, &w, r);
                for (int64_t c = 0; c < cols; c++) {
                    CHECK((double)row[c] == weight(&w, r, c), "%s[%lld][%lld] is %g, not %g",
                          type_names[type], (long long)r, (long long)c, (double)row[c],
                          weight(&w, r, c));
                }
            }
            free(row);
            free_tensor(w);
        }
    }
}

// Every float16 there is, through a matrix product with 1.
static void check_f16(void) {
    enum { N = 65536 };
    uint16_t *h = exact(N * 2);
    float *y = exact(N * 4), one = 1;
    for (int i = 0; i < N; i++) h[i] = (uint16_t)i;
    matmul(y, &one, &(Tensor){F16, N, 1, h, NULL, NULL}, 1);
    for (int i = 0; i < N; i++) {
        double v = f16_value(i);
        bool odd = v != v || (on_amx() && isinf(v));    // infinity has no low part
        CHECK((double)y[i] == v || (y[i] != y[i] && odd), "float16 %04x becomes %g, not %g", i,
              (double)y[i], v);
    }
    free(h), free(y);
}

// Do the kernels round x to 16 bits of the largest in its group of 32?
static bool rounds_x(const Tensor *w) {
    return w->type == Q8 && !on_amx() && strcmp(kernels_name(), "plain");
}

// Rounding errors of a sum grow like a random walk. AMX also loses what two bfloat16 do not hold:
// at most 2^-16 of x, of a float32 weight, and of the product of what was left out; with 8-bit
// weights x is a single bfloat16, or has 16 bits.
static void check_matmul(int type, int64_t n, int64_t rows, int64_t cols, bool with_bias) {
    Tensor w = random_tensor(type, rows, cols);
    float *x = uniforms(n * cols), *y = exact(n * rows * 4);
    float *bias = with_bias ? uniforms(rows) : NULL;
    w.bias = bias;
    matmul(y, x, &w, n);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t r = 0; r < rows; r++) {
            double sum = bias ? (double)bias[r] : 0, size = fabs(sum), weights = 0;
            for (int64_t c = 0; c < cols; c++) {
                double product = (double)x[i * cols + c] * weight(&w, r, c);
                sum += product, size += fabs(product), weights += fabs(weight(&w, r, c));
            }
            double error = fabs((double)y[i * rows + r] - sum);
            double lost = on_amx() ? ldexp(size * 3, type == Q8 ? -9 : -16)
                        : rounds_x(&w) ? ldexp(weights, -16) : 0;
            CHECK(error <= lost + ldexp(size * (3 + sqrt((double)cols)), -24),
                  "%s %lld x %lld x %lld: y[%lld][%lld] = %g, not %g (error %g of %g)",
                  type_names[type], (long long)n, (long long)rows, (long long)cols, (long long)i,
                  (long long)r, (double)y[i * rows + r], sum, error, size);
        }
    }
    free(x), free(y), free(bias);
    free_tensor(w);
}

static bool same(const float *a, const float *b, int64_t n) {
    return !memcmp(a, b, (size_t)n * sizeof *a);
}

// The largest error over the outputs' rms: float32's class, also with AMX; 8-bit weights have x rounded.
static void check_error(int type) {
    enum { N = 32, ROWS = 100, COLS = 4096 };
    Tensor w = random_tensor(type, ROWS, COLS);
    float *x = uniforms(N * COLS), *y = exact(N * ROWS * 4);
    double worst = 0, squares = 0, most = on_amx() ? 2e-5 : 6e-6;
    if (type == Q8) most = on_amx() ? 1e-2 : rounds_x(&w) ? 1e-4 : most;
    matmul(y, x, &w, N);
    for (int i = 0; i < N * ROWS; i++) {
        double sum = 0;
        for (int c = 0; c < COLS; c++) {
            sum += (double)x[i / ROWS * COLS + c] * weight(&w, i % ROWS, c);
        }
        squares += sum * sum, worst = fmax(worst, fabs((double)y[i] - sum));
    }
    worst /= sqrt(squares / (N * ROWS));
    printf("%s: %s: largest error over rms %.1e\n", kernels_name(), type_names[type], worst);
    CHECK(worst <= most, "%s: largest error over rms %g", type_names[type], worst);
    free(x), free(y);
    free_tensor(w);
}

// Zeros give the bias, and what is no number gives none.
static void check_odd_x(int type) {
    enum { ROWS = 9, COLS = 352 };
    Tensor w = random_tensor(type, ROWS, COLS);
    float odd[] = {NAN, INFINITY, -INFINITY}, y[ROWS], x[COLS] = {0}, *bias = uniforms(ROWS);
    w.bias = bias;
    matmul(y, x, &w, 1);
    CHECK(same(y, bias, ROWS), "%s: zeros give more than the bias", type_names[type]);
    for (int i = 0; i < 3 * COLS; i++) {
        for (int c = 0; c < COLS; c++) x[c] = uniform();
        x[i % COLS] = odd[i / COLS];
        matmul(y, x, &w, 1);
        for (int r = 0; r < ROWS; r++) {
            CHECK(!isfinite(y[r]), "%s: column %d is %g, y[%d] is %g", type_names[type], i % COLS,
                  (double)odd[i / COLS], r, (double)y[r]);
        }
    }
    free(bias);
    free_tensor(w);
}

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// A row's results do not depend on its neighbours, nor on the number of threads.
static void check_matmul_bits(int type, int64_t rows, int64_t cols) {
    enum { N = 560 };           // more than PACK_CHUNK
    Tensor w = random_tensor(type, rows, cols);
    float *x = uniforms(N * cols), *all = exact(N * rows * 4), *y = exact(N * rows * 4);
    set_threads(1);
    matmul(all, x, &w, N);
    for (int n = 1; n <= N; n += n < 70 ? 1 : 49) {
        int first = (int)below(N - n + 1);
        matmul(y, x + first * cols, &w, n);
        CHECK(same(y, all + first * rows, n * rows), "%s, %lld x %lld: %d rows change the bits",
              type_names[type], (long long)rows, (long long)cols, n);
    }
    for (int threads = 1; threads <= 8; threads++) {
        set_threads(threads);
        for (int n = 1; n <= N; n += 1 + n) {
            matmul(y, x, &w, n);
            CHECK(same(y, all, n * rows), "%s, %lld x %lld x %lld: %d threads change the bits",
                  type_names[type], (long long)n, (long long)rows, (long long)cols, threads);
        }
    }
    set_threads(2);
    free(x), free(all), free(y);
    free_tensor(w);
}

static void mark(char *done, int n) {
    #pragma omp for
    for (int i = 0; i < n; i++) done[i] = 1;
}

// Every piece of work is taken once, by however many threads, and their counters have their room.
static void check_take(void) {
    enum { BEHIND = 16, MOST = 200 };
    static const int threads[] = {1, 2, 3, STRETCHES, STRETCHES + BEHIND}, works[] = {0, 1, 5, MOST};
    for (int t = 0; t < 5; t++) {
        for (int w = 0; w < 4; w++) {
            int64_t next[STRETCHES + BEHIND] = {0}, n = works[w];
            int done[MOST] = {0};
            #pragma omp parallel num_threads(threads[t])
            for (int64_t i; (i = take(next, n)) < n;) {
                #pragma omp atomic
                done[i]++;
            }
            for (int i = 0; i < MOST; i++) {
                CHECK(done[i] == (i < n), "%d threads: piece %d of %d taken %d times", threads[t], i,
                      works[w], done[i]);
            }
            for (int i = 0; i < BEHIND; i++) CHECK(!next[STRETCHES + i], "counter %d", STRETCHES + i);
        }
    }
}

// Threads of a program that embeds this each do all of their own work, however little it is.
static void check_teams(void) {
    #pragma omp parallel num_threads(2)
    for (int64_t work = 0; work <= 2 * WORTH_THREADS; work += 2 * WORTH_THREADS) {
        char done[100] = {0};
        TOGETHER(work, mark(done, 100));
        #pragma omp critical (checks)
        CHECK(!memchr(done, 0, 100), "a loop was shared with another team (%d)", (int)work);
    }
}

typedef struct {                // keys and values in one piece, [count][head_dim]
    float *k, *v;
    int64_t count, head_dim;
} Cache;

// The same keys and values cut into spans. What a span has room for but does not hold is NaN.
static Span *cut(const Cache *c, int64_t most, int64_t *n_spans) {
    Span *spans = exact((c->count + 1) * (int64_t)sizeof *spans);
    int64_t d = c->head_dim, stride = (d + 15) / 16 * 16, n = 0;
    for (int64_t t = 0; t < c->count; n++) {
        int64_t count = 1 + below(most);
        if (count > c->count - t) count = c->count - t;
        int64_t blocks = (count + 15) / 16;
        float *k = exact(blocks * d * 64), *v = exact(count * stride * 4);
        for (int64_t i = 0; i < blocks * d * 16; i++) k[i] = NAN;
        for (int64_t i = 0; i < count * stride; i++) v[i] = NAN;
        for (int64_t j = 0; j < count; j++) {
            for (int64_t i = 0; i < d; i++) {
                k[(j / 16 * d + i) * 16 + j % 16] = c->k[(t + j) * d + i];
                v[j * stride + i] = c->v[(t + j) * d + i];
            }
        }
        spans[n] = (Span){k, v, count};
        t += count;
    }
    *n_spans = n;
    return spans;
}

static void free_spans(Span *spans, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        free((void *)(uintptr_t)spans[i].k);
        free((void *)(uintptr_t)spans[i].v);
    }
    free(spans);
}

static void check_attend(int64_t n, int64_t past, int64_t group, int64_t head_dim, bool causal) {
    int64_t keys = past + n, width = group * head_dim, ld = width + 3, n_spans;
    Cache c = {uniforms(keys * head_dim), uniforms(keys * head_dim), keys, head_dim};
    float *q = uniforms(n * ld), *out = exact(n * ld * 4), *again = exact(n * ld * 4);
    for (int64_t i = 0; i < n * ld; i++) out[i] = again[i] = 0, q[i] *= 4;
    Span *spans = cut(&c, keys, &n_spans);
    attend(out, q, ld, n, group, head_dim, spans, n_spans, past, causal);
    free_spans(spans, n_spans);

    double *p = exact(keys * 8);
    for (int64_t i = 0; i < n * group; i++) {
        int64_t at = i / group * ld + i % group * head_dim;
        int64_t seen = causal ? past + i / group + 1 : keys;
        double sum = 0;
        for (int64_t t = 0; t < seen; t++) {
            p[t] = 0;
            for (int64_t d = 0; d < head_dim; d++) {
                p[t] += (double)q[at + d] * (double)c.k[t * head_dim + d];
            }
            sum += p[t] = exp(p[t] / sqrt((double)head_dim));
        }
        for (int64_t d = 0; d < head_dim; d++) {
            double v = 0;
            for (int64_t t = 0; t < seen; t++) v += p[t] / sum * (double)c.v[t * head_dim + d];
            CHECK(fabs((double)out[at + d] - v) <= 2e-6,
                  "attend %lld rows, past %lld, group %lld, head_dim %lld%s: out[%lld][%lld] = %g, "
                  "not %g", (long long)n, (long long)past, (long long)group, (long long)head_dim,
                  causal ? ", causal" : "", (long long)i, (long long)d, (double)out[at + d], v);
        }
    }
    free(p);

    for (int turn = 0; turn < 4; turn++) {      // other cuts of the cache, and of the rows
        spans = cut(&c, turn == 0 ? 1 : turn == 1 ? keys : 40, &n_spans);
        for (int64_t r = 0, rows; r < n; r += rows) {
            rows = causal ? 1 + below(n - r) : n - r;
            attend(again + r * ld, q + r * ld, ld, rows, group, head_dim, spans, n_spans,
                   past + r, causal);
        }
        CHECK(same(out, again, n * ld), "attend %lld rows, past %lld, group %lld, head_dim %lld%s: "
              "%lld pieces change the bits", (long long)n, (long long)past, (long long)group,
              (long long)head_dim, causal ? ", causal" : "", (long long)n_spans);
        free_spans(spans, n_spans);
    }
    free(c.k), free(c.v), free(q), free(out), free(again);
}

// Later keys and values are not there for a row, not even if they are not numbers.
static void check_causality(void) {
    enum { N = 50, D = 20 };
    Cache c = {uniforms(N * D), uniforms(N * D), N, D};
    float *q = uniforms(N * D), *before = exact(N * D * 4), *after = exact(N * D * 4);
    int64_t n_spans;
    Span *spans = cut(&c, 9, &n_spans);
    attend(before, q, D, N, 1, D, spans, n_spans, 0, true);
    free_spans(spans, n_spans);
    for (int i = 23 * D; i < N * D; i++) c.k[i] = c.v[i] = i % 2 ? NAN : INFINITY;
    spans = cut(&c, 9, &n_spans);
    attend(after, q, D, N, 1, D, spans, n_spans, 0, true);
    CHECK(same(before, after, 23 * D), "attend: later keys or values change earlier rows");
    free_spans(spans, n_spans);
    free(c.k), free(c.v), free(q), free(before), free(after);
}

static double ulps(double got, double want) {
    if (got == want || (got != got && want != want)) return 0;
    int e;
    frexp(fabs(want) < 0x1p-126 ? 0x1p-126 : want, &e);
    return fabs(got - want) / ldexp(1, e - 24);
}

static void check_elements(void) {
    enum { N = 20000 };
    float *x = exact(N * 4), *silu = exact(N * 4), *normal = exact(N * 4), *up = exact(N * 4);
    double worst_silu = 0, worst_gelu = 0, absolute = 0;
    for (int i = 0; i < N; i++) x[i] = (float)(i - N / 2) * (i % 3 ? 2e-3f : i % 2 ? 9e-3f : 1e-5f);
    for (int i = 0; i < N; i++) up[i] = 1, silu[i] = normal[i] = x[i];
    silu_multiply(silu, up, N);
    gelu(normal, N);
    for (int i = 0; i < N; i++) {
        double v = (double)x[i], s = v / (1 + exp(-v)), g = 0.5 * v * erfc(-v / sqrt(2));
        if (v > -87) worst_silu = fmax(worst_silu, ulps((double)silu[i], s));
        if (v > -4) worst_gelu = fmax(worst_gelu, ulps((double)normal[i], g));
        absolute = fmax(absolute, fabs((double)normal[i] - g) / fmax(1, fabs(v)));
        CHECK(ulps((double)silu[i], s) <= 4 || v < -87, "silu(%g) = %g, not %g", v, (double)silu[i], s);
        CHECK(fabs((double)normal[i] - g) <= 1.5e-7 * fmax(1, fabs(v)), "gelu(%g) = %g, not %g", v,
              (double)normal[i], g);
    }
    printf("%s: silu is right to %.1f ulp, gelu to %.1f ulp for x > -4 and to %.1e everywhere\n",
           kernels_name(), worst_silu, worst_gelu, absolute);
    for (int n = 1; n < 40; n++) {
        int first = (int)below(N - n);
        float a[40], b[40];
        memcpy(a, x + first, (size_t)n * 4), memcpy(b, x + first, (size_t)n * 4);
        silu_multiply(a, up, n), gelu(b, n);
        CHECK(same(a, silu + first, n), "silu: the number of elements changes the bits");
        CHECK(same(b, normal + first, n), "gelu: the number of elements changes the bits");
    }
    float odd[] = {INFINITY, -INFINITY, NAN, 0, -200, 200, -1e30f, 1e30f}, twin[8], ones[8];
    memcpy(twin, odd, sizeof odd);
    for (int i = 0; i < 8; i++) ones[i] = 1;
    silu_multiply(odd, ones, 8), gelu(twin, 8);
    CHECK(odd[0] == INFINITY && odd[2] != odd[2] && odd[3] == 0 && fabsf(odd[4]) < 1e-37f
          && odd[5] == 200 && fabsf(odd[6]) < 1e-37f && odd[7] == 1e30f, "silu of odd values");
    CHECK(twin[0] == INFINITY && twin[2] != twin[2] && twin[3] == 0 && fabsf(twin[4]) < 1e-37f
          && twin[5] == 200 && fabsf(twin[6]) < 1e-37f && twin[7] == 1e30f, "gelu of odd values");
    free(x), free(silu), free(normal), free(up);
}

static void check_path(bool quick) {
    static const int64_t sizes[] = {1, 2, 3, 8, 15, 16, 17, 31, 33, 64, 100, 172, 257, 515};
    enum { N_SIZES = sizeof sizes / sizeof *sizes };
    check_widen();
    check_f16();
    for (int type = 0; type < N_TYPES; type++) {
        for (int i = 0; i < N_SIZES; i++) {
            for (int j = 0; j < N_SIZES; j++) {
                if (quick && (i + j) % 3) continue;
                check_matmul(type, 1 + below(j % 2 ? 40 : 9), sizes[i], sizes[j], (i + j) % 2);
            }
        }
        check_matmul(type, quick ? 70 : 300, 40, 300, true);
        check_error(type);
        check_odd_x(type);
        check_matmul_bits(type, 37, 300);
        check_matmul_bits(type, quick ? 150 : 301, 515);
        check_matmul_bits(type, 37, 1056);          // W as it is stored, and a long row by itself
        check_matmul_bits(type, 5, 8300);           // chains longer than DEPTH
        check_matmul(type, 70, 5, 8300, false);
        check_matmul(type, 1, 33, 1056, true);
        check_matmul(type, quick ? 9 : 70, 50, 1056, false);
    }
    for (int64_t group = 1; group <= 8; group++) {
        for (int causal = 0; causal < 2; causal++) {
            check_attend(1, 0, group, 16, causal);
            check_attend(1, 70, group, 8 * group, causal);
            check_attend(1 + below(40), below(100), group, 1 + below(90), causal);
            check_attend(1 + below(9), 250 + below(9), group, 48, causal);
        }
    }
    check_attend(quick ? 3 : 30, 300, 2, 128, true);
    check_attend(4, 30, 2, 300, false);
    check_causality();
    check_elements();
}

int main(int argc, char **argv) {
    bool quick = argc > 1 && !strcmp(argv[1], "quick");
#ifdef EMULATE_AMX
#ifdef HAVE_AMX
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512bf16")) return 77;
    for (int i = 0; i < N_KERNELS; i++) {
        if (kernel_table[i].level == AMX_LEVEL) kernels_use(&kernel_table[i]);
    }
    check_path(quick);
    return failures ? 1 : 0;
#else
    return 77;
#endif
#endif
    kernels_init(NULL, false);
    printf("this CPU's path is %s\n", kernels_name());
    check_take();
    check_teams();
    for (int i = 0; i < N_KERNELS; i++) {
        if (!kernels_available(i)) continue;
        kernels_init(kernel_table[i].name, false);
        check_path(quick);
    }
    if (failures) printf("%d failures\n", failures);
    return failures ? 1 : 0;
}

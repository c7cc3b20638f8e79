// How fast the kernels are, against what the cores and the memory allow.
//   cc -O3 -fopenmp tests/bench_kernels.c -o bench -lm && ./bench [path] [seconds per figure]
// GFLOP/s and GB/s are medians; "of peak" compares with a loop of fused multiply-adds (or, without
// such, multiplications and additions) timed just before and after each figure.
#define PAINTERS_NO_MAIN
#include "../painters.c"

static double patience = 0.5;
volatile double sink;           // results go here, so that no work is left out

#if defined __x86_64__ && !defined __AVX512F__
#define BENCH_TARGET __attribute__((target("avx2,fma")))
typedef float Lanes __attribute__((vector_size(32)));
#elif defined __AVX512F__
#define BENCH_TARGET
typedef float Lanes __attribute__((vector_size(64)));
#else
#define BENCH_TARGET
typedef float Lanes __attribute__((vector_size(16)));
#endif

BENCH_TARGET static double multiply_adds(int64_t rounds) {
    Lanes a[12], x = (Lanes){0} + 0.999f, y = (Lanes){0} + 1e-6f;
    for (int i = 0; i < 12; i++) a[i] = (Lanes){0} + (float)i;
    for (int64_t r = 0; r < rounds; r++) {
        _Pragma("GCC unroll 12") for (int i = 0; i < 12; i++) a[i] = a[i] * x + y;
    }
    for (int i = 1; i < 12; i++) a[0] += a[i];
    return (double)a[0][0];
}

static int threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// GFLOP/s of all threads together on registers alone.
static double peak(void) {
    enum { ROUNDS = 2000000 };
    double start = seconds(), total = 0;
    #pragma omp parallel reduction(+ : total)
    total += multiply_adds(ROUNDS);
    sink = total;
    return 24.0 * sizeof(Lanes) / 4 * ROUNDS * threads() / (seconds() - start) * 1e-9;
}

// GB/s of reading memory by all threads.
static double bandwidth(const float *p, int64_t n) {
    double start = seconds(), total = 0;
    #pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t i = 0; i < n / 4096; i++) {
        float sum[32] = {0};
        for (int64_t j = 0; j < 4096; j += 32) {
            for (int l = 0; l < 32; l++) sum[l] += p[i * 4096 + j + l];
        }
        for (int l = 0; l < 32; l++) total += (double)sum[l];
    }
    sink = total;
    return (double)n * 4 / (seconds() - start) * 1e-9;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *v, int n) {
    qsort(v, (size_t)n, sizeof *v, by_size);
    return v[n / 2];
}

static void fill(void *p, int64_t bytes) {
    uint32_t seed = 1;
    for (int64_t i = 0; i < bytes / 2; i++) {       // float16 and bfloat16 around 0.01 .. 1
        seed = seed * 1664525 + 1013904223;
        ((uint16_t *)p)[i] = (uint16_t)((seed >> 16 & 0x83ff) | 0x3800 | (seed >> 5 & 0x0400));
    }
}

static void bench_matmul(int type, int64_t n, int64_t rows, int64_t cols) {
    static const int bytes[N_TYPES] = {4, 2, 2, 1};
    float *x = allocate(n * cols, 4, "x"), *y = allocate(n * rows, 4, "y");
    void *data = allocate(rows * cols, bytes[type], "w");
    uint16_t *scale = allocate(rows * (cols / 32 + 1), 2, "scale");
    fill(x, n * cols * 4), fill(data, rows * cols * bytes[type]);
    for (int64_t i = 0; i < rows * (cols / 32); i++) scale[i] = 0x2000;
    Tensor w = {type, rows, cols, data, scale};
    double flops[999], peaks[999], began = seconds();
    int runs = 0;
    for (matmul(y, x, &w, n); runs < 999 && (runs < 3 || seconds() - began < patience); runs++) {
        double start = seconds();
        matmul(y, x, &w, n);
        flops[runs] = 2.0 * (double)n * (double)rows * (double)cols / (seconds() - start) * 1e-9;
        peaks[runs] = n > 8 ? peak() : 1;
    }
    for (int i = 0; i < runs; i++) peaks[i] = flops[i] / peaks[i];
    double speed = median(flops, runs), part = median(peaks, runs);
    double gb = ((double)bytes[type] + (type == Q8 ? 2. / 32 : 0)) * speed / (2 * (double)n);
    printf("%-8s %-4s %4lld x %lld x %lld: %7.1f GFLOP/s", kernels_name(), type_names[type],
           (long long)n, (long long)rows, (long long)cols, speed);
    if (n > 8) printf(", %3.0f%% of peak", 100 * part);
    if (n <= 32) printf(", %5.1f GB/s", gb);
    printf("   (%d runs)\n", runs);
    fflush(stdout);
    release(x), release(y), release(data), release(scale);
}

static void bench_attend(int64_t n, int64_t past, int64_t group, int64_t heads, int64_t head_dim) {
    int64_t keys = past + n, stride = (head_dim + 15) / 16 * 16, ld = heads * group * head_dim;
    int64_t blocks = (keys + 15) / 16;
    float *q = allocate(n * ld, 4, "q"), *out = allocate(n * ld, 4, "out");
    float *k = allocate(heads * blocks * head_dim * 16, 4, "k");
    float *v = allocate(heads * keys * stride, 4, "v");
    fill(q, n * ld * 4), fill(k, heads * blocks * head_dim * 64), fill(v, heads * keys * stride * 4);
    double flops[999], peaks[999], began = seconds();
    int runs = 0;
    for (; runs < 999 && (runs < 3 || seconds() - began < patience); runs++) {
        double start = seconds();
        enum { PIECE = 64 };
        int64_t pieces = (n + PIECE - 1) / PIECE;
        #pragma omp parallel for schedule(dynamic, 1)
        for (int64_t item = 0; item < heads * pieces; item++) {
            int64_t h = item % heads, first = item / heads * PIECE;
            Span span = {k + h * blocks * head_dim * 16, v + h * keys * stride, keys};
            attend(out + first * ld + h * group * head_dim, q + first * ld + h * group * head_dim,
                   ld, n - first < PIECE ? n - first : PIECE, group, head_dim, &span, 1,
                   past + first, true);
        }
        double seen = (double)n * (double)past + (double)n * (double)(n + 1) / 2;
        flops[runs] = 4 * seen * (double)(heads * group * head_dim) / (seconds() - start) * 1e-9;
        peaks[runs] = n > 8 ? peak() : 1;
    }
    for (int i = 0; i < runs; i++) peaks[i] = flops[i] / peaks[i];
    double speed = median(flops, runs), part = median(peaks, runs);
    printf("%-8s attention, %lld rows over %lld keys, %lld x %lld heads of %lld: %7.1f GFLOP/s",
           kernels_name(), (long long)n, (long long)keys, (long long)heads, (long long)group,
           (long long)head_dim, speed);
    if (n > 8) printf(", %3.0f%% of peak", 100 * part);
    else printf(", %5.1f GB/s", speed / (double)group * 2);
    printf("   (%d runs)\n", runs);
    fflush(stdout);
    release(q), release(out), release(k), release(v);
}

static void bench_elements(const char *name, void (*f)(float *, const float *, int64_t)) {
    enum { N = 4096, ROUNDS = 200 };
    float *x = allocate(N, 4, "x"), *up = allocate(N, 4, "up");
    double times[99];
    for (int run = 0; run < 99; run++) {
        for (int i = 0; i < N; i++) x[i] = (float)(i % 97) / 8 - 6, up[i] = 1;
        double start = seconds();
        for (int r = 0; r < ROUNDS; r++) f(x, up, N);
        times[run] = (seconds() - start) / ROUNDS / N * 1e9;
    }
    printf("%-8s %s: %.2f ns an element\n", kernels_name(), name, median(times, 99));
    release(x), release(up);
}

static void gelu_of(float *x, const float *up, int64_t n) {
    (void)up;
    gelu(x, n);
}

int main(int argc, char **argv) {
    kernels_init(argc > 1 && *argv[1] ? argv[1] : NULL, false);
    if (argc > 2) patience = atof(argv[2]);
    float *p = allocate(1 << 26, 4, "memory");
    fill(p, 4 << 26);
    double b[5];
    for (int i = 0; i < 5; i++) b[i] = bandwidth(p, 1 << 26);
    release(p);
    printf("%d threads, peak %.0f GFLOP/s, memory %.1f GB/s\n", threads(), peak(), median(b, 5));
    static const int64_t sizes[] = {1, 4, 32, 128, 512};
    for (int type = 0; type < N_TYPES; type++) {
        for (int i = 0; i < 5; i++) bench_matmul(type, sizes[i], 4096, 4096);
    }
    bench_attend(512, 0, 8, 4, 64);
    bench_attend(512, 1536, 8, 4, 64);
    bench_attend(512, 1536, 1, 16, 128);
    bench_attend(1, 2047, 8, 4, 64);
    bench_attend(1, 2047, 1, 16, 64);
    bench_elements("silu", silu_multiply);
    bench_elements("gelu", gelu_of);
    return 0;
}

// AMX's instructions in C, after Intel's description of them, so that the kernels of section 3c are
// tested on machines without it. Comes before painters.c, whose intrinsics it replaces.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static _Thread_local union { uint16_t bf16[16][32]; float f32[16][16]; } amx_tile[8];

static void amx_copy(int tile, char *memory, int64_t stride, int store) {
    for (int i = 0; i < 16; i++) {
        char *row = (char *)amx_tile[tile].f32[i];
        memcpy(store ? memory + i * stride : row, store ? row : memory + i * stride, 64);
    }
}

static float amx_widen(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

// c[m][n] += a[m][2k] * b[k][2n] + a[m][2k + 1] * b[k][2n + 1]
static void amx_dot_product(int c, int a, int b) {
    for (int m = 0; m < 16; m++) {
        for (int k = 0; k < 16; k++) {
            for (int n = 0; n < 16; n++) {
                for (int half = 0; half < 2; half++) {
                    amx_tile[c].f32[m][n] += amx_widen(amx_tile[a].bf16[m][2 * k + half]) *
                                             amx_widen(amx_tile[b].bf16[k][2 * n + half]);
                }
            }
        }
    }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) (void)(shapes)
#define _tile_release() (void)0
#define _tile_loadd(tile, p, stride) amx_copy(tile, (char *)(uintptr_t)(p), stride, 0)
#define _tile_stored(tile, p, stride) amx_copy(tile, (char *)(p), stride, 1)
#define _tile_dpbf16ps(c, a, b) amx_dot_product(c, a, b)

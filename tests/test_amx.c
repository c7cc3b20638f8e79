// The checks of test_kernels.c on the kernels for AMX, with its instructions emulated.
// Returns 77 where the CPU lacks what surrounds them (AVX-512 with bfloat16).
#define EMULATE_AMX
#include "test_kernels.c"

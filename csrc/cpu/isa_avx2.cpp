// AVX2 with FMA: float arithmetic, bfloat16 widened.
#include "headers.h"

#if defined(__x86_64__)

#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define FA_NAMESPACE avx2
#define FA_WIDTH 8
#define FA_ROWS 6
#define FA_BF16 0
#include "isa.inl"
#endif

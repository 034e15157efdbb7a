// AVX-512: float arithmetic, bfloat16 widened.
#include "headers.h"

#if defined(__x86_64__)

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,f16c,bmi,bmi2")
#define FA_NAMESPACE avx512
#define FA_WIDTH 16
#define FA_ROWS 14
#define FA_BF16 0
#include "isa.inl"
#endif

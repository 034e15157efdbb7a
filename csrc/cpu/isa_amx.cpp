// AMX tiles for bfloat16, AVX-512 for the rest.
#include "headers.h"

#if defined(__x86_64__)

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi,bmi2")
#define FA_NAMESPACE amx
#define FA_WIDTH 16
#define FA_ROWS 14
#define FA_BF16 2
#include "isa.inl"
#endif

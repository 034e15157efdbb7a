// AVX-512 with vdpbf16ps.
#include "headers.h"

#if defined(__x86_64__)

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx512bf16,avx2,fma,f16c,bmi,bmi2")
#define FA_NAMESPACE avx512_bf16
#define FA_WIDTH 16
#define FA_ROWS 14
#define FA_BF16 1
#include "isa.inl"
#endif

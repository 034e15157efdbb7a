// Four floats a vector, whatever the machine: SSE2 on x86-64, NEON on arm64.
#include "headers.h"

#define FA_NAMESPACE portable
#define FA_WIDTH 4
#define FA_ROWS 4
#define FA_BF16 0
#include "isa.inl"

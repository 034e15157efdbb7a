// The AMX code with tiles as plain arrays: for tests on machines without AMX.
#include "headers.h"

#define FA_NAMESPACE amx_emulated
#define FA_WIDTH 4
#define FA_ROWS 4
#define FA_BF16 3
#include "isa.inl"

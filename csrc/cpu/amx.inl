// 32 x 32 tiles of products on AMX: two by two accumulators of 16 x 16, k in steps of 32 elements, which are bfloat16, or
// floats as sums of three.
// With FA_BF16 == 3 the tile registers are plain arrays, so that the same code is tested where there is no AMX.

#if FA_BF16 == 2
// Palette 1; 64 bytes a row and 16 rows in each of eight tiles. A constant, because GCC's _tile_loadconfig tells of only
// its first 8 bytes that they are read: stores of the others may be left out.
alignas(64) constexpr uint8_t kTileConfig[64] = {1,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,
                                                 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0,
                                                 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0, 0,  0,
                                                 16, 16, 16, 16, 16, 16, 16, 16};
struct AmxSession {
  AmxSession() { _tile_loadconfig(kTileConfig); }
  ~AmxSession() { _tile_release(); }
  AmxSession(const AmxSession&) = delete;
};
#define FA_TILE_ZERO(t) _tile_zero(t)
#define FA_TILE_LOAD(t, p, stride) _tile_loadd(t, p, stride)
#define FA_TILE_STORE(t, p, stride) _tile_stored(t, p, stride)
#define FA_TILE_DP(c, a, b) _tile_dpbf16ps(c, a, b)
#else
struct AmxSession {
  AmxSession() {}  // not trivial, as the real one
};
struct EmulatedTile {
  uint32_t word[16][16];
};
inline EmulatedTile& emulated(int t) {
  static thread_local EmulatedTile tiles[8];
  return tiles[t];
}
__attribute__((noinline)) inline void emulated_load(int t, const void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(emulated(t).word[r], (const char*)p + r * stride, 64);
}
__attribute__((noinline)) inline void emulated_store(int t, void* p, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy((char*)p + r * stride, emulated(t).word[r], 64);
}
// Sums and roundings in the order of the instruction: even and odd k each by themselves, then both, then the accumulator.
__attribute__((noinline)) inline void emulated_dp(int c, int a, int b) {
  auto as_float = [](uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; };
  float even[16][16], odd[16][16];
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < 16; ++n) {
      even[k][n] = as_float(emulated(b).word[k][n] << 16);
      odd[k][n] = as_float(emulated(b).word[k][n] & 0xffff0000u);
    }
  for (int m = 0; m < 16; ++m) {
    float sums[2][16] = {}, acc[16];
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = emulated(a).word[m][k];
      for (int n = 0; n < 16; ++n) {
        sums[0][n] += as_float(x << 16) * even[k][n];
        sums[1][n] += as_float(x & 0xffff0000u) * odd[k][n];
      }
    }
    std::memcpy(acc, emulated(c).word[m], sizeof acc);
    for (int n = 0; n < 16; ++n) acc[n] += sums[0][n] + sums[1][n];
    std::memcpy(emulated(c).word[m], acc, sizeof acc);
  }
}
#define FA_TILE_ZERO(t) std::memset(&emulated(t), 0, sizeof(EmulatedTile))
#define FA_TILE_LOAD(t, p, stride) emulated_load(t, p, stride)
#define FA_TILE_STORE(t, p, stride) emulated_store(t, p, stride)
#define FA_TILE_DP(c, a, b) emulated_dp(c, a, b)
#endif

// Tiles 0..3 accumulate (row half * 2 + column half), 4 and 5 hold A, 6 and 7 hold B; narrow leaves out the second half of
// the columns. A's rows past `rows` are read (the block is padded) and only make rows of c that nobody looks at, within
// c's padding. multiply(two) adds to the sums; two: whether there is a second half of the rows.
template <class Multiply>
FA_INLINE void amx_tile(bool narrow, int rows, float* c, int64_t ldc, bool accumulate, Multiply&& multiply) {
  const int64_t c_stride = ldc * 4;
  const bool two = rows > 16;
  __asm__ volatile("" ::: "memory");  // GCC's tile loads don't tell that they read memory
  if (accumulate) {
    FA_TILE_LOAD(0, c, c_stride);
    if (!narrow) FA_TILE_LOAD(1, c + 16, c_stride);
    if (two) {
      FA_TILE_LOAD(2, c + 16 * ldc, c_stride);
      if (!narrow) FA_TILE_LOAD(3, c + 16 * ldc + 16, c_stride);
    }
  } else {
    FA_TILE_ZERO(0);
    FA_TILE_ZERO(1);
    FA_TILE_ZERO(2);
    FA_TILE_ZERO(3);
  }
  multiply(two);
  FA_TILE_STORE(0, c, c_stride);
  if (!narrow) FA_TILE_STORE(1, c + 16, c_stride);
  if (two) {
    FA_TILE_STORE(2, c + 16 * ldc, c_stride);
    if (!narrow) FA_TILE_STORE(3, c + 16 * ldc + 16, c_stride);
  }
}

// kw words of k. beside(step) runs after each step of k, while the tile unit computes.
template <bool Narrow, class Beside>
FA_INLINE void amx_multiply(bool two, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t kw,
                            Beside&& beside) {
  for (int64_t k = 0; k < kw; k += 16) {
    FA_TILE_LOAD(4, a + k, lda * 4);
    FA_TILE_LOAD(6, b + k * ldb, ldb * 4);
    FA_TILE_DP(0, 4, 6);
    if (!Narrow) {
      FA_TILE_LOAD(7, b + k * ldb + 16, ldb * 4);
      FA_TILE_DP(1, 4, 7);
    }
    if (two) {
      FA_TILE_LOAD(5, a + 16 * lda + k, lda * 4);
      FA_TILE_DP(2, 5, 6);
      if (!Narrow) FA_TILE_DP(3, 5, 7);
    }
    beside(k / 16);
  }
}

// Groups of 32 floats of k in three parts each: 16 words of A's row and 16 rows of b [part][16][32] a part, the highest
// first. The products of a middle with a low part, and of two low ones, are below 2^-24 of a float's own: left out. In this
// order a float times one is itself to the last bit, on either side.
template <class Beside>
FA_INLINE void amx_multiply_parts(bool narrow, bool two, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t groups,
                                  Beside&& beside) {
  constexpr int high = 0, middle = 1, low = 2;
  for (int64_t group = 0; group < groups; ++group, a += 3 * 16, b += 3 * 16 * 32) {
    const auto a_part = [&](int part) __attribute__((always_inline)) {
      FA_TILE_LOAD(4, a + part * 16, lda * 4);
      if (two) FA_TILE_LOAD(5, a + 16 * lda + part * 16, lda * 4);
    };
    const auto b_part = [&](int part) __attribute__((always_inline)) {
      FA_TILE_LOAD(6, b + part * 512, 128);
      if (!narrow) FA_TILE_LOAD(7, b + part * 512 + 16, 128);
    };
    const auto products = [&]() __attribute__((always_inline)) {
      FA_TILE_DP(0, 4, 6);
      if (!narrow) FA_TILE_DP(1, 4, 7);
      if (two) {
        FA_TILE_DP(2, 5, 6);
        if (!narrow) FA_TILE_DP(3, 5, 7);
      }
    };
    a_part(high);
    b_part(low);
    products();
    b_part(middle);
    products();
    b_part(high);
    products();
    a_part(middle);
    products();
    b_part(middle);
    products();
    a_part(low);
    b_part(high);
    products();
    beside(group);
  }
}

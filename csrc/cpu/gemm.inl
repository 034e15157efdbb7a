// The matrix product under every op: rows of A (copied into a block with a constant row stride) by packed panels of B.
//
// A block is [k blocks][rows][kStride] words. The constant stride turns a row's address into an instruction's
// displacement, and 784 words (49 cache lines, an odd number) keep the rows of a tile apart in a set-associative cache.

constexpr int64_t kBlock = 768;   // words of k in a row of a block
constexpr int64_t kStride = 784;  // words between rows of an A block
// Words of k in one pass over a tile. Longer sums are added up from partial ones, which keeps the rounding error of
// float products at that of PyTorch's own; pairs round their inputs far more coarsely than that.
template <bool Pairs>
constexpr int64_t kPass = Pairs ? 384 : 256;
constexpr int64_t kAhead = 48;  // rows of B that are asked for before they are multiplied, where that pays

// How T is multiplied: as float words, or as pairs of bfloat16.
template <class T>
struct Operand {
  static constexpr bool pairs = false;
  static constexpr int per_word = 1;
  static constexpr int pad = 1;
  static constexpr int strip = 2 * W < 32 ? 2 * W : 32;
};
#if FA_BF16 != 0
template <>
struct Operand<bf16> {
  static constexpr bool pairs = true;
  static constexpr int per_word = 2;
  static constexpr int pad = FA_BF16 == 1 ? 2 : 32;  // AMX multiplies 32 at a time
  static constexpr int strip = 32;
};
#endif
// A panel's 32 columns are strips, as wide as the sums of a tile: a strip of B, 256 words deep, stays in the first-level
// cache while all rows pass by it. Within a packed panel each strip stands by itself, [k][kStrip].
template <class T>
constexpr int kStrip = Operand<T>::strip;

template <class T>
FA_INLINE int64_t words_of(int64_t k) {
  constexpr int pad = Operand<T>::pad, per = Operand<T>::per_word;
  return (k + pad - 1) / pad * pad / per;
}

// -- tiles: C[rows][kStrip] (+)= A[rows][kw] B[kw][kStrip] -----------------------------------------------------------

constexpr int kNV = 32 / W;  // vectors in a panel's row

template <bool Pairs>
FA_INLINE F multiply_add(F acc, U b, uint32_t a) {
#if FA_BF16 == 1
  if constexpr (Pairs)
    return (F)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)(__m512i)b);
#endif
  float f;
  std::memcpy(&f, &a, 4);
  return acc + (F)b * f;
}

// Ldb: words between rows of B where that is known, which spares the loop its address arithmetic; 0 where it isn't.
template <int MR, bool Pairs, int NV, int Ldb>
__attribute__((noinline)) void tile(const uint32_t* __restrict a, const uint32_t* __restrict b, int64_t ldb_, int64_t kw,
                                    float* __restrict c, int64_t ldc, bool accumulate) {
  const int64_t ldb = Ldb ? Ldb : ldb_;
  F acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[m][v] = F{};
  auto step = [&](int64_t j) __attribute__((always_inline)) {
    U row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) std::memcpy(&row[v], b + j * ldb + v * W, sizeof(U));
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      uint32_t x = a[m * kStride + j];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] = multiply_add<Pairs>(acc[m][v], row[v], x);
    }
  };
  // Short vectors make the loop's own instructions weigh; four steps a turn share them.
  constexpr int turn = W < 16 && Ldb ? 4 : 1;
  int64_t k = 0;
  for (; k + turn <= kw; k += turn) {
#pragma GCC unroll 4
    for (int j = 0; j < turn; ++j) step(j);
    if constexpr (W == 16) {
      __builtin_prefetch(b + kAhead * ldb, 0, 3);
      __builtin_prefetch(b + kAhead * ldb + 16, 0, 3);
    }
    b += turn * ldb;
    a += turn;
  }
  for (; k < kw; ++k) {
    step(0);
    b += ldb;
    a += 1;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* to = c + m * ldc + v * W;
      store(to, accumulate ? load(to) + acc[m][v] : acc[m][v]);
    }
}

using Tile = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, float*, int64_t, bool);
template <bool Pairs, int NV, int Ldb, int... M>
constexpr std::array<Tile, sizeof...(M)> tiles_of(std::integer_sequence<int, M...>) {
  return {tile<M + 1, Pairs, NV, Ldb>...};
}

#if FA_BF16 == 2 || FA_BF16 == 3
#include "amx.inl"
#endif

template <class T>
struct Tiles {
  static constexpr int max_rows = FA_ROWS;
  struct Session {};
  // One strip.
  static void run(int rows, const uint32_t* a, const uint32_t* b, int64_t ldb, int64_t kw, float* c, int64_t ldc,
                  bool accumulate) {
    vectors<kStrip<T> / W>(rows, a, b, ldb, kw, c, ldc, accumulate);
  }
  // Of a strip the first W columns only.
  static void run_narrow(int rows, const uint32_t* a, const uint32_t* b, int64_t ldb, int64_t kw, float* c, int64_t ldc,
                         bool accumulate) {
    vectors<1>(rows, a, b, ldb, kw, c, ldc, accumulate);
  }

 private:
  template <int NV>
  static void vectors(int rows, const uint32_t* a, const uint32_t* b, int64_t ldb, int64_t kw, float* c, int64_t ldc,
                      bool accumulate) {
    using Rows = std::make_integer_sequence<int, FA_ROWS>;
    static constexpr auto packed = tiles_of<Operand<T>::pairs, NV, kStrip<T>>(Rows{});
    static constexpr auto loose = tiles_of<Operand<T>::pairs, NV, 0>(Rows{});
    (ldb == kStrip<T> ? packed : loose)[rows - 1](a, b, ldb, kw, c, ldc, accumulate);
  }
};
#if FA_BF16 == 2 || FA_BF16 == 3
template <>
struct Tiles<bf16> {
  static constexpr int max_rows = 32;
  using Session = AmxSession;
  static void run(int rows, const uint32_t* a, const uint32_t* b, int64_t ldb, int64_t kw, float* c, int64_t ldc,
                  bool accumulate) {
    amx_tile(rows, a, b, ldb, kw, c, ldc, accumulate);
  }
  static void run_narrow(int rows, const uint32_t* a, const uint32_t* b, int64_t ldb, int64_t kw, float* c, int64_t ldc,
                         bool accumulate) {
    amx_tile(rows, a, b, ldb, kw, c, ldc, accumulate);
  }
};
#endif

// -- blocks of A -----------------------------------------------------------------------------------------------------

// Rows are padded so that a whole tile of rows may be read.
FA_INLINE int64_t padded_rows(int64_t rows) { return (rows + 31) / 32 * 32; }

struct ABlock {
  uint32_t* words;
  int64_t rows;  // padded
  uint32_t* row(int64_t m, int64_t kw) const { return words + ((kw / kBlock) * rows + m) * kStride + kw % kBlock; }
  static int64_t size(int64_t rows, int64_t kw) { return (kw + kBlock - 1) / kBlock * padded_rows(rows) * kStride; }
};

// Element i of row m and those after it.
template <class T>
FA_INLINE void put(const ABlock& a, int64_t m, int64_t i, F v, int64_t n) {
  if constexpr (Operand<T>::pairs) store_n((bf16*)a.row(m, i / 2), v, n);
  else store_n((float*)a.row(m, i), rounded<T>(v), n);
}
// Zeros from element k to the end of the last word group: what lies there is multiplied by B's zero padding.
// Element 0 is in word `start`.
template <class T>
FA_INLINE void pad_row(const ABlock& a, int64_t m, int64_t k, int64_t start = 0) {
  if constexpr (Operand<T>::pairs)
    for (int64_t i = k; i < words_of<T>(k) * 2; ++i) *((bf16*)a.row(m, start + i / 2) + i % 2) = 0;
}

// Row m of the block from a row in memory.
template <class T>
FA_INLINE void copy_row(const ABlock& a, int64_t m, const T* from, int64_t k) {
  if constexpr (Operand<T>::pairs || std::is_same_v<T, float>) {
    constexpr int per = Operand<T>::per_word;
    for (int64_t i = 0; i < k; i += kBlock * per)
      std::memcpy(a.row(m, i / per), from + i, sizeof(T) * (size_t)std::min(kBlock * per, k - i));
  } else {
    for (int64_t i = 0; i < k; i += W) put<T>(a, m, i, load_n(from + i, k - i), k - i);
  }
  pad_row<T>(a, m, k);
}

// -- the product -----------------------------------------------------------------------------------------------------

// Up to kPass of k: where they start in A, where in B's panel 0, how far the next panel and the next strip are.
struct Pass {
  int64_t a;
  const uint32_t* b;
  int64_t panel_stride, strip_stride, ldb, words;
};
// Where word k of a column (a multiple of W) stands in a packed matrix of `count` words of k.
template <class T>
FA_INLINE int64_t packed_at(int64_t count, int64_t column, int64_t k) {
  constexpr int64_t strip = kStrip<T>;
  return (column / strip * count + k) * strip + column % strip;
}
// All k of a packed matrix of `count` words of k.
template <class T>
FA_INLINE Pass packed_pass(int64_t a, const uint32_t* words, int64_t count) {
  return {a, words, count * 32, count * kStrip<T>, kStrip<T>, count};
}
// The passes over k of a product with one B, or with several below one another.
template <class T>
class Passes {
  static constexpr int64_t kLength = kPass<Operand<T>::pairs>;

 public:
  explicit Passes(int64_t start = 0) : start_(start) {}
  // A B whose rows are ldb apart.
  void add(const uint32_t* b, int64_t panel_stride, int64_t ldb, int64_t words) {
    add({0, b, panel_stride, kStrip<T>, ldb, words});
  }
  void add_packed(const uint32_t* b, int64_t words) { add(packed_pass<T>(0, b, words)); }
  int count() const { return count_; }
  const Pass& operator[](int i) const { return passes_[i]; }

 private:
  void add(const Pass& all) {
    for (int64_t k = 0; k < all.words; k += kLength) {
      Pass& pass = passes_[count_++] = all;
      pass.a = start_ + k;
      pass.b += k * all.ldb;
      pass.words = std::min(kLength, all.words - k);
    }
    start_ += (all.words + kBlock - 1) / kBlock * kBlock;  // the next B starts on a block of A
  }
  Pass passes_[kMaxPasses];
  int count_ = 0;
  int64_t start_;
};
template <class T>
FA_INLINE Passes<T> passes_of(const Packed& p) {
  Passes<T> list;
  list.add_packed(p.words, words_of<T>(p.k));
  return list;
}
// All strips of a panel for one tile of rows, a's words standing where the pass begins.
template <class T>
FA_INLINE void multiply_panel(int rows, const uint32_t* a, const Pass& pass, int64_t panel, float* c, int64_t ldc,
                              bool accumulate) {
  const uint32_t* b = pass.b + panel * pass.panel_stride;
  for (int strip = 0; strip < 32 / kStrip<T>; ++strip)
    Tiles<T>::run(rows, a, b + strip * pass.strip_stride, pass.ldb, pass.words, c + strip * kStrip<T>, ldc, accumulate);
}

// Asks for [from, to) of `of` equal shares of `bytes` from p on into the second-level cache; null asks for nothing.
FA_INLINE void prefetch(const void* p, int64_t bytes, int64_t from, int64_t to, int64_t of) {
  if (p == nullptr) return;
  for (int64_t i = bytes * from / of / 64 * 64; i < bytes * to / of; i += 64)
    __builtin_prefetch((const char*)p + i, 0, 2);
}
struct RowTile {  // rows [m, m + rows) of a block, all of one slot
  int64_t m, rows;
  int slot;
};
// What is added to the rows of a slot beside the product that all rows share.
struct Extra {
  const Pass* passes;
  int count;
};
// For every tile of the product of A's rows with panels [first, last): epilogue(panel, tile, c) with c [rows][32].
// tile_at(i) is the i-th of `blocks` tiles; `extras` is indexed by slot, or null; `columns` are the whole product's.
template <class T, class TileAt, class Epilogue>
FA_INLINE void product_of_tiles(const ABlock& a, int64_t blocks, TileAt&& tile_at, const Passes<T>& k,
                                const Extra* extras, int64_t columns, int64_t first, int64_t last, float* c,
                                Epilogue&& epilogue) {
  using Tl = Tiles<T>;
  [[maybe_unused]] typename Tl::Session session{};
  for (int64_t panel = first; panel < last; ++panel) {
    for (int i_pass = 0; i_pass < k.count(); ++i_pass) {
      const Pass& pass = k[i_pass];
      const uint32_t* b = pass.b + panel * pass.panel_stride;
      const int64_t wanted = std::min<int64_t>(32, columns - panel * 32);
      const int strips = (int)((wanted + kStrip<T> - 1) / kStrip<T>);
      const auto run = wanted <= W ? Tl::run_narrow : Tl::run;
      // While this piece of B is multiplied, memory brings the one that follows it.
      const bool more = i_pass + 1 < k.count();
      const Pass& next_pass = k[more ? i_pass + 1 : 0];
      const uint32_t* next = next_pass.b + (more ? panel : std::min(panel + 1, last - 1)) * next_pass.panel_stride;
      for (int strip = 0; strip < strips; ++strip) {
        const bool ready = !more && strip == strips - 1;
        for (int64_t i = 0; i < blocks; ++i) {
          const RowTile t = tile_at(i);
          float* tile = c + i * Tl::max_rows * 32;
          if (next_pass.ldb == kStrip<T>)
            prefetch(next + strip * next_pass.strip_stride, next_pass.words * kStrip<T> * 4, i, i + 1, blocks);
          run((int)t.rows, a.row(t.m, pass.a), b + strip * pass.strip_stride, pass.ldb, pass.words,
              tile + strip * kStrip<T>, 32, i_pass > 0);
          if (!ready) continue;
          if (extras)
            for (int e = 0; e < extras[t.slot].count; ++e) {
              const Pass& extra = extras[t.slot].passes[e];
              multiply_panel<T>((int)t.rows, a.row(t.m, extra.a), extra, panel, tile, 32, true);
            }
          epilogue(panel, t, tile);
        }
      }
    }
  }
}
// The same over all rows, with nothing to add; epilogue(panel, m, rows, c).
template <class T, class Epilogue>
FA_INLINE void product(const ABlock& a, int64_t rows, const Passes<T>& k, int64_t first, int64_t last, float* c,
                       Epilogue&& epilogue) {
  const int64_t blocks = (rows + Tiles<T>::max_rows - 1) / Tiles<T>::max_rows;
  auto tile_at = [&](int64_t i) -> RowTile {
    const int64_t m = rows * i / blocks;
    return {m, rows * (i + 1) / blocks - m, 0};
  };
  product_of_tiles<T>(a, blocks, tile_at, k, nullptr, last * 32, first, last, c,
                      [&](int64_t panel, const RowTile& t, const float* tile) { epilogue(panel, t.m, t.rows, tile); });
}
// The product into out [rows][ldo], which has room for 32 more rows and for whole panels.
template <class T, class Before>
FA_INLINE void product_into(const ABlock& a, int64_t rows, const Passes<T>& k, int64_t panels, float* c, float* out,
                            int64_t ldo, Before&& before_panel) {
  using Tl = Tiles<T>;
  if (k.count() == 1) {  // a tile may write rows past its own: the next one, made later, puts them right
    [[maybe_unused]] typename Tl::Session session{};
    const int64_t blocks = (rows + Tl::max_rows - 1) / Tl::max_rows;
    for (int64_t panel = 0; panel < panels; ++panel) {
      before_panel(panel);
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t m = rows * i / blocks, n = rows * (i + 1) / blocks - m;
        multiply_panel<T>((int)n, a.row(m, 0), k[0], panel, out + m * ldo + panel * 32, ldo, false);
      }
    }
    return;
  }
  product<T>(a, rows, k, 0, panels, c, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
    for (int64_t r = 0; r < mr; ++r)
      for (int v = 0; v < kNV; ++v) store(out + (m + r) * ldo + panel * 32 + v * W, load(tile + r * 32 + v * W));
  });
}
// Floats of scratch for c.
FA_INLINE int64_t tile_scratch(int64_t rows) { return (padded_rows(rows) + 32) * 32; }

// -- packing B -------------------------------------------------------------------------------------------------------

template <class T, class S>
void pack_as(const S* src, int64_t k, int64_t n, int64_t sk, int64_t sn, uint32_t* words) {
  const int64_t kw = words_of<T>(k), panels = (n + 31) / 32;
  auto value = [&](int64_t i, int64_t j) -> float {
    if (i >= k || j >= n) return 0.0f;
    const S v = src[i * sk + j * sn];
    if constexpr (std::is_same_v<S, bf16>) {
      uint32_t u = (uint32_t)v << 16;
      float f;
      std::memcpy(&f, &u, 4);
      return f;
    } else {
      return v;
    }
  };
  for (int64_t p = 0; p < panels; ++p) {
    uint32_t* panel = words + p * kw * 32;
    const int64_t columns = std::min<int64_t>(32, n - p * 32);
    if constexpr (!Operand<T>::pairs && std::is_same_v<S, float> && std::is_same_v<T, float>) {
      if (sk == 1 && columns == 32) {
        for (int j = 0; j < 32; j += kStrip<T>)
          transpose(src + (p * 32 + j) * sn, sn, kStrip<T>, k, (float*)panel + j * kw, kStrip<T>);
        continue;
      }
    }
    for (int64_t i = 0; i < kw; ++i)
      for (int64_t j = 0; j < 32; j += W) {
        float lanes[2][W];
        for (int l = 0; l < W; ++l) {
          lanes[0][l] = value(i * Operand<T>::per_word, p * 32 + j + l);
          lanes[1][l] = Operand<T>::pairs ? value(i * 2 + 1, p * 32 + j + l) : 0.0f;
        }
        U word;
        if constexpr (Operand<T>::pairs)
          word = round_bf16_bits(load(lanes[0])) | (round_bf16_bits(load(lanes[1])) << 16);
        else
          word = bits(rounded<T>(load(lanes[0])));
        std::memcpy(panel + packed_at<T>(kw, j, i), &word, sizeof word);
      }
  }
}

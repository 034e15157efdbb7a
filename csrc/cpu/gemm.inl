// The matrix product under every op: rows of A by packed panels of B. Rows are copied into a block with a constant row
// stride, or multiplied where they lie.
//
// A block is [k blocks][rows][kStride] words. The constant stride turns a row's address into an instruction's
// displacement, and an odd number of cache lines keeps the rows of a tile apart in a set-associative cache.

constexpr int64_t kBlock = FA_BF16 < 2 ? 768 : 2304;  // words of k in a row of a block: room for a LoRA of kMaxRank
constexpr int64_t kStride = kBlock + 16;              // words between rows of an A block

// A float as the sum of three bfloat16 numbers, which holds all of its 24 bits: where bfloat16 is multiplied far faster than
// float, six products of such parts are faster than one of floats, and as exact. A row of A has groups of 32 floats: 16
// words of their high parts, then of the middle and of the low ones. Packed weights are floats, and get their parts when
// they are multiplied.
struct Parts {};

// How T is multiplied: as float words, as pairs of bfloat16, or in parts. A's rows have groups of so many words for every
// `pad` elements; `per_word` is the number of elements in a word, if that says it all.
template <class T>
struct Operand {
  static constexpr bool pairs = false;
  static constexpr int per_word = 1;
  static constexpr int pad = 1, group = 1;
  static constexpr int strip = 2 * W < 32 ? 2 * W : 32;
};
#if FA_BF16 != 0
template <>
struct Operand<bf16> {
  static constexpr bool pairs = true;
  static constexpr int per_word = 2;
  static constexpr int pad = FA_BF16 == 1 ? 2 : 32, group = pad / 2;  // AMX multiplies 32 at a time
  static constexpr int strip = 32;
};
#endif
template <>
struct Operand<Parts> {
  static constexpr bool pairs = false;
  static constexpr int pad = 32, group = 3 * 16;
  static constexpr int strip = Operand<float>::strip;
};
// How rows of T are multiplied by packed weights, and how a LoRA's s by its B.
template <class T>
using Multiplied = std::conditional_t<std::is_same_v<T, float> && (FA_BF16 >= 2), Parts, T>;
template <class M>
constexpr bool in_parts = std::is_same_v<M, Parts>;
template <class M>
using Added = std::conditional_t<in_parts<M>, bf16, M>;
// A panel's 32 columns are strips, as wide as the sums of a tile: a strip of B, 256 words deep, stays in the first-level
// cache while all rows pass by it. Within a packed panel each strip stands by itself, [k][kStrip].
template <class T>
constexpr int kStrip = Operand<T>::strip;

// Words of k elements in a row of A, and before element i of them.
template <class M>
FA_INLINE constexpr int64_t words_of(int64_t k) {
  constexpr int pad = Operand<M>::pad;
  return (k + pad - 1) / pad * Operand<M>::group;
}
template <class M>
FA_INLINE int64_t word_at(int64_t i) {
  if constexpr (in_parts<M>) return i / 32 * Operand<M>::group + i % 32 / 2;
  else return i / Operand<M>::per_word;
}
// Words of k in a column of a packed matrix.
template <class M>
FA_INLINE int64_t packed_words_of(int64_t k) {
  return in_parts<M> ? k : words_of<M>(k);
}

// The parts of v: the nearest bfloat16 (ties away from zero), then of what is left; the last is exact, but for what is below
// 2^-133. Above 3.396e38 the nearest is infinite, and what is left NaN, as of infinity itself.
FA_INLINE F nearest_bf16(F v) { return (F)((bits(v) + 0x8000u) & 0xffff0000u); }
FA_INLINE void split(F v, F (&parts)[3]) {
  parts[0] = nearest_bf16(v);
  const F left = v - parts[0];
  parts[1] = nearest_bf16(left);
  parts[2] = (F)(bits(left - parts[1]) & 0xffff0000u);
}
// Words of two numbers that are bfloat16 already.
FA_INLINE U pair_of(F even, F odd) { return (bits(even) >> 16) | bits(odd); }

// -- what memory brings meanwhile ------------------------------------------------------------------------------------

struct Lines {
  const char* p;
  int64_t count;
};
FA_INLINE void ask(const Lines& lines) {
  for (int64_t i = 0; i < lines.count; ++i) __builtin_prefetch(lines.p + i * 64, 0, 2);
}
// Asks for whole rows of a few lines each.
FA_INLINE void prefetch(const void* p, int64_t bytes) { ask({(const char*)p, (bytes + 63) / 64}); }

// What is read after a product, in lines of the cache. Each tile asks for its share, a line or two at a time: a burst
// would take all of the few requests that a core may have under way, and the product's own would wait.
class Ahead {
 public:
  // weights: whether the product's own matrix is asked for too, or is known to be near.
  explicit Ahead(bool weights = true) : weights_(weights) {}
  void add(const void* p, int64_t bytes) {
    if (p == nullptr || bytes == 0) return;
    ranges_[ranges_used_++] = {(const char*)p, (bytes + 63) / 64};
    lines_ += (bytes + 63) / 64;
  }
  bool weights() const { return weights_; }
  // Share i of `of`; where it would reach into another range, what it has of the first.
  Lines share(int64_t i, int64_t of) const {
    int64_t from = lines_ * i / of;
    const int64_t count = lines_ * (i + 1) / of - from;
    for (int range = 0; range < ranges_used_; from -= ranges_[range++].count)
      if (from < ranges_[range].count)
        return {ranges_[range].p + from * 64, std::min(count, ranges_[range].count - from)};
    return {nullptr, 0};
  }

 private:
  Lines ranges_[3];
  int ranges_used_ = 0;
  int64_t lines_ = 0;
  bool weights_;
};

// -- tiles: C[rows][kStrip] (+)= A[rows][kw] B[kw][kStrip] -----------------------------------------------------------

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

// Lda, Ldb: words between rows of A, and of B where that is known, which spares the loop its address arithmetic; 0 where
// it isn't.
// asked: what is multiplied later; a line is asked for every four steps, and two of `ahead` as long as there are some.
template <int MR, bool Pairs, int NV, int Lda, int Ldb>
__attribute__((noinline)) void tile(const uint32_t* __restrict a, const uint32_t* __restrict b, int64_t ldb_, int64_t kw,
                                    float* __restrict c, int64_t ldc, bool accumulate, const char* asked,
                                    Lines ahead) {
  const int64_t ldb = Ldb ? Ldb : ldb_;
  F acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[m][v] = F{};
  constexpr int turn = Ldb ? 4 : 1;  // the loop's own instructions weigh; four steps share them
  auto step = [&](int64_t j) __attribute__((always_inline)) {
    U row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      std::memcpy(&row[v], b + j * ldb + v * W, sizeof(U));
      // A strip and a tile's rows don't fit a first-level cache of 32 KiB together: its next lines come in time.
      if constexpr (Ldb && W == 16) __builtin_prefetch(b + (j + turn) * ldb + v * W, 0, 3);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      uint32_t x = a[m * Lda + j];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] = multiply_add<Pairs>(acc[m][v], row[v], x);
    }
  };
  int64_t k = 0;
  for (; k + turn <= kw; k += turn) {
#pragma GCC unroll 4
    for (int j = 0; j < turn; ++j) step(j);
    if constexpr (Ldb && W == 16) {
      __builtin_prefetch(asked, 0, 2);
      asked += 64;
      if (ahead.count > 0) {
        __builtin_prefetch(ahead.p, 0, 2);
        __builtin_prefetch(ahead.p + 64, 0, 2);
        ahead = {ahead.p + 128, ahead.count - 2};
      }
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

using Tile = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, float*, int64_t, bool, const char*, Lines);
template <bool Pairs, int NV, int Lda, int Ldb, int... M>
constexpr std::array<Tile, sizeof...(M)> tiles_of(std::integer_sequence<int, M...>) {
  return {tile<M + 1, Pairs, NV, Lda, Ldb>...};
}

#if FA_BF16 == 2 || FA_BF16 == 3
#include "amx.inl"
#endif

// `pass`: words of k in one pass over a tile. Longer sums are added up from partial ones, which keeps the rounding error
// of float products at that of PyTorch's own; pairs round their inputs far more coarsely than that.
// `whole`: a tile of few rows costs as much as one of all. `apart`: a unit of its own multiplies, so that other work can run
// beside it.
template <class T>
struct Tiles {
  static constexpr int max_rows = FA_ROWS;
  static constexpr int64_t pass = Operand<T>::pairs ? 384 : 256;
  static constexpr bool whole = false, apart = false;
  static constexpr bool asks = W == 16;  // a tile asks for what is read later
  // The one length of rows in memory that a tile is made for. Past some columns a copy is repaid: its rows fall on more
  // sets of the first-level cache.
  static constexpr bool reads_rows(int64_t k, int64_t columns = 0) {
    return W == 16 && FA_BF16 < 2 && std::is_same_v<T, float> && k == kBlock && columns <= 1536;
  }
  struct Session {};
  // One strip; rows of A are kStride words apart, or kBlock where reads_rows.
  static void run(int rows, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t kw, float* c,
                  int64_t ldc, bool accumulate, const char* asked = nullptr, Lines ahead = {}) {
    vectors<kStrip<T> / W>(rows, a, lda, b, ldb, kw, c, ldc, accumulate, asked, ahead);
  }
  // Of a strip the first W columns only.
  static void run_narrow(int rows, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t kw, float* c,
                         int64_t ldc, bool accumulate, const char* asked = nullptr, Lines ahead = {}) {
    vectors<1>(rows, a, lda, b, ldb, kw, c, ldc, accumulate, asked, ahead);
  }

 private:
  template <int NV>
  static void vectors(int rows, const uint32_t* a, [[maybe_unused]] int64_t lda, const uint32_t* b, int64_t ldb,
                      int64_t kw, float* c, int64_t ldc, bool accumulate, const char* asked, const Lines& ahead) {
    const bool in_turn = asks && ldb == kStrip<T>;  // two lines every four steps
    const Lines within = in_turn ? Lines{ahead.p, std::min(ahead.count, kw / 4 * 2)} : Lines{nullptr, 0};
    ask({ahead.p + within.count * 64, ahead.count - within.count});
    using Rows = std::make_integer_sequence<int, FA_ROWS>;
    static constexpr auto packed = tiles_of<Operand<T>::pairs, NV, kStride, kStrip<T>>(Rows{});
    static constexpr auto loose = tiles_of<Operand<T>::pairs, NV, kStride, 0>(Rows{});
    const auto* tiles = ldb == kStrip<T> ? &packed : &loose;
    if constexpr (reads_rows(kBlock)) {
      static constexpr auto in_memory = tiles_of<Operand<T>::pairs, NV, kBlock, kStrip<T>>(Rows{});
      if (lda == kBlock) tiles = &in_memory;
    }
    (*tiles)[rows - 1](a, b, ldb, kw, c, ldc, accumulate, asked ? asked : (const char*)a, within);
  }
};
#if FA_BF16 == 2 || FA_BF16 == 3
template <>
struct Tiles<bf16> {
  static constexpr int max_rows = 32;
  // 16 KiB of A and as many of B: both stay in the first-level cache while they are multiplied.
  static constexpr int64_t pass = 128;
  static constexpr bool whole = true, apart = true;
  // Whole groups of words; 16 lines or a multiple apart they would fall on few sets of the first-level cache.
  static constexpr bool reads_rows(int64_t k, int64_t = 0) { return k % 32 == 0 && k / 32 % 16 != 0; }
  using Session = AmxSession;
  static void run(int rows, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t kw, float* c,
                  int64_t ldc, bool accumulate) {
    amx_tile(false, rows, c, ldc, accumulate, [&](bool two) __attribute__((always_inline)) {
      amx_multiply<false>(two, a, lda, b, ldb, kw, [](int64_t) {});
    });
  }
  // further(two) may multiply more into the sums before they are stored.
  template <class Beside, class Further>
  static FA_INLINE void run_beside(bool narrow, int rows, const uint32_t* a, int64_t lda, const uint32_t* b, int64_t kw,
                                   float* c, bool accumulate, Beside&& beside, Further&& further) {
    amx_tile(narrow, rows, c, 32, accumulate, [&](bool two) __attribute__((always_inline)) {
      if (narrow) amx_multiply<true>(two, a, lda, b, 32, kw, beside);
      else amx_multiply<false>(two, a, lda, b, 32, kw, beside);
      further(two);
    });
  }
  // More words of k, while the sums of a tile are still in registers.
  static FA_INLINE void multiply_more(bool two, const uint32_t* a, const uint32_t* b, int64_t kw) {
    amx_multiply<false>(two, a, kStride, b, 32, kw, [](int64_t) {});
  }
};
template <>
struct Tiles<Parts> {
  static constexpr int max_rows = 32;
  // Floats of k in a piece: 12 KiB of A and as many of B, whose next piece is made meanwhile.
  static constexpr int64_t pass = 64;
  // Words of A after which sums begin anew, and are added up: that keeps their rounding error at that of PyTorch's own, and
  // A's rows in the second-level cache while all columns pass by them.
  static constexpr int64_t section = 1152;
  static constexpr bool whole = true, apart = true;
  static constexpr bool reads_rows(int64_t, int64_t = 0) { return false; }
  using Session = AmxSession;
  template <class Beside, class Further>
  static FA_INLINE void run_beside(bool narrow, int rows, const uint32_t* a, const uint32_t* b, int64_t groups, float* c,
                                   bool accumulate, Beside&& beside, Further&& further) {
    amx_tile(narrow, rows, c, 32, accumulate, [&](bool two) __attribute__((always_inline)) {
      amx_multiply_parts(narrow, two, a, kStride, b, groups, beside);
      further(two);
    });
  }
};
static_assert(kBlock % Tiles<Parts>::section == 0 && Tiles<Parts>::section % words_of<Parts>(Tiles<Parts>::pass) == 0);
#endif

// -- blocks of A -----------------------------------------------------------------------------------------------------

// Rows are padded so that a whole tile of rows may be read.
FA_INLINE int64_t padded_rows(int64_t rows) { return (rows + 31) / 32 * 32; }

struct ABlock {
  uint32_t* words;
  int64_t rows;  // padded
  uint32_t* row(int64_t m, int64_t kw) const { return words + ((kw / kBlock) * rows + m) * kStride + kw % kBlock; }
  static constexpr int64_t stride() { return kStride; }
  static int64_t size(int64_t rows, int64_t kw) { return (kw + kBlock - 1) / kBlock * padded_rows(rows) * kStride; }
};

// Rows multiplied where they lie in memory.
struct RowsInPlace {
  const uint32_t* words;
  int64_t words_a_row;
  const uint32_t* row(int64_t m, int64_t kw) const { return words + m * words_a_row + kw; }
  int64_t stride() const { return words_a_row; }
};
// Where that is possible and pays for so many columns of the product; where a tile is always whole, of whole tiles only.
template <class M>
FA_INLINE bool in_place(int64_t rows, int64_t k, int64_t columns) {
  return Tiles<M>::reads_rows(k, columns) && (!Tiles<M>::whole || rows % Tiles<M>::max_rows == 0);
}

// fn(rows) for k elements a row of x in place, or for the block.
template <class M, class T, class Fn>
FA_INLINE void with_rows([[maybe_unused]] bool direct, [[maybe_unused]] const T* x, [[maybe_unused]] int64_t k,
                         const ABlock& block, Fn&& fn) {
  if constexpr (Tiles<M>::reads_rows(kBlock))
    if (direct) return fn(RowsInPlace{(const uint32_t*)x, word_at<M>(k)});
  fn(block);
}

// Element i of row m and those after it.
template <class M>
FA_INLINE void put(const ABlock& a, int64_t m, int64_t i, F v, int64_t n) {
  if constexpr (in_parts<M>) {
    F parts[3];
    split(v, parts);
    for (int part = 0; part < 3; ++part) store_n((bf16*)(a.row(m, word_at<M>(i)) + part * 16), parts[part], n);
  } else if constexpr (Operand<M>::pairs) {
    store_n((bf16*)a.row(m, word_at<M>(i)), v, n);
  } else {
    store_n((float*)a.row(m, i), rounded<M>(v), n);
  }
}
// Zeros from element k to the end of the last word group: what lies there is multiplied by B's zero padding.
template <class M>
FA_INLINE void pad_row(const ABlock& a, int64_t m, int64_t k) {
  constexpr int pad = Operand<M>::pad;
  if constexpr (pad > 1)
    for (int64_t i = k; i < (k + pad - 1) / pad * pad; ++i)
      for (int part = 0; part < (in_parts<M> ? 3 : 1); ++part)
        *((bf16*)(a.row(m, word_at<M>(i)) + part * 16) + i % 2) = 0;
}

// Row m of the block from a row in memory.
template <class M, class T>
FA_INLINE void copy_row(const ABlock& a, int64_t m, const T* from, int64_t k) {
  if constexpr (in_parts<M>) {
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
      F parts[3][kNV];
#pragma GCC unroll 8
      for (int v = 0; v < kNV; ++v) {
        F of_v[3];
        split(load(from + i + v * W), of_v);
        for (int part = 0; part < 3; ++part) parts[part][v] = of_v[part];
      }
      for (int part = 0; part < 3; ++part) store_row((bf16*)(a.row(m, word_at<M>(i)) + part * 16), parts[part]);
    }
    for (; i < k; i += W) put<M>(a, m, i, load_n(from + i, k - i), k - i);
  } else if constexpr (Operand<M>::pairs || std::is_same_v<T, float>) {
    constexpr int per = Operand<M>::per_word;
    for (int64_t i = 0; i < k; i += kBlock * per)
      std::memcpy(a.row(m, i / per), from + i, sizeof(T) * (size_t)std::min(kBlock * per, k - i));
  } else {
    static_assert(std::is_same_v<T, M>);  // so nothing has to be rounded
    for (int64_t i = 0; i < k; i += W) store_n((float*)a.row(m, i), load_n(from + i, k - i), k - i);
  }
  pad_row<M>(a, m, k);
}
// The n numbers of row m from element i on, at most 32, i a multiple of 32.
FA_INLINE void numbers_of_parts(const ABlock& a, int64_t m, int64_t start, int64_t i, float* to) {
  const auto* row = (const bf16*)a.row(m, start + word_at<Parts>(i));
  for (int v = 0; v < kNV; ++v)
    store(to + v * W, load(row + v * W) + load(row + 32 + v * W) + load(row + 64 + v * W));
}

// -- what is added to a product while its sums are in registers ------------------------------------------------------
//
// A LoRA's s stands behind x in a row, and is multiplied by B as Added<M>. Parts are numbers of their own there, those of
// the six products one after another: a rank of 8 is 48 words of k, where groups of 32 would be multiplied six times.

constexpr int kAddedLeft[6] = {0, 0, 0, 1, 1, 2}, kAddedRight[6] = {2, 1, 0, 1, 0, 0};

// Elements of a part: whole words.
FA_INLINE int64_t added_part(int64_t rank) { return (rank + 1) / 2 * 2; }
template <class M>
FA_INLINE int64_t added_words(int64_t rank) {
  return in_parts<M> ? words_of<Added<M>>(6 * added_part(rank)) : words_of<M>(rank);
}
// Numbers col and those after it of row m, whose words begin at `at`. The first of a row come first.
template <class M>
FA_INLINE void put_added(const ABlock& a, int64_t m, int64_t at, int64_t col, F v, int64_t n, int64_t rank) {
  auto* row = (bf16*)a.row(m, at);
  if constexpr (in_parts<M>) {
    if (col == 0) std::memset(row, 0, 4 * (size_t)added_words<M>(rank));
    F parts[3];
    split(v, parts);
    for (int i = 0; i < 6; ++i) store_n(row + i * added_part(rank) + col, parts[kAddedLeft[i]], n);
  } else if constexpr (Operand<M>::pairs) {
    store_n(row + col, v, n);
    for (int64_t i = rank; n <= W && i < words_of<M>(rank) * 2; ++i) row[i] = 0;
  } else {
    store_n((float*)row + col, rounded<M>(v), n);
  }
}

// -- the product -----------------------------------------------------------------------------------------------------

// Some words of B's k: where they start in A, where in B's panel 0, how far the next panel and the next strip are.
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
 public:
  // start: in words of A.
  explicit Passes(int64_t start = 0, int64_t length = Tiles<T>::pass) : start_(start), length_(length) {}
  // A B whose rows are ldb apart.
  void add(const uint32_t* b, int64_t panel_stride, int64_t ldb, int64_t words) {
    add({0, b, panel_stride, kStrip<T>, ldb, words});
  }
  void add_packed(const uint32_t* b, int64_t words) { add(packed_pass<T>(0, b, words)); }
  int count() const { return (int)passes_.size(); }
  const Pass& operator[](int i) const { return passes_[i]; }

 private:
  void add(const Pass& all) {
    passes_.reserve(passes_.size() + (all.words + length_ - 1) / length_);
    for (int64_t k = 0; k < all.words; k += length_) {
      Pass& pass = passes_.emplace_back(all);
      pass.a = start_ + (in_parts<T> ? words_of<T>(k) : k);
      pass.b += k * all.ldb;
      pass.words = std::min(length_, all.words - k);
    }
    const int64_t words = in_parts<T> ? words_of<T>(all.words) : all.words;
    start_ += (words + kBlock - 1) / kBlock * kBlock;  // the next B starts on a block of A
  }
  std::vector<Pass> passes_;
  int64_t start_, length_;
};
// Few columns get shorter passes: there BLAS sums in several chains, and rounds less.
template <class T>
FA_INLINE Passes<T> passes_of(const Packed& p) {
  Passes<T> list(0, p.n <= 16 ? std::min<int64_t>(128, Tiles<T>::pass) : Tiles<T>::pass);
  list.add_packed(p.words, packed_words_of<T>(p.k));
  return list;
}
// All strips of a panel for one tile of a block's rows, a's words standing where the pass begins.
template <class T>
FA_INLINE void multiply_panel(int rows, const uint32_t* a, const Pass& pass, int64_t panel, float* c, int64_t ldc,
                              bool accumulate) {
  const uint32_t* b = pass.b + panel * pass.panel_stride;
  for (int strip = 0; strip < 32 / kStrip<T>; ++strip)
    Tiles<T>::run(rows, a, kStride, b + strip * pass.strip_stride, pass.ldb, pass.words, c + strip * kStrip<T>, ldc,
                  accumulate);
}

struct RowTile {  // rows [m, m + rows) of a block, all of one slot
  int64_t m, rows;
  int slot;
};
// Part i of `parts` of the rows: where it begins. Parts are alike, or whole tiles but for the last row's.
template <class T>
FA_INLINE int64_t part_start(int64_t rows, int64_t i, int64_t parts) {
  constexpr int64_t unit = Tiles<T>::max_rows;
  if (!Tiles<T>::whole || rows < parts * unit) return rows * i / parts;
  return std::min(rows, (rows + unit - 1) / unit * i / parts * unit);
}
template <class T>
FA_INLINE int64_t tiles_in(int64_t rows) { return (rows + Tiles<T>::max_rows - 1) / Tiles<T>::max_rows; }
// Tile i of so many.
template <class T>
FA_INLINE RowTile tile_of(int64_t rows, int64_t i, int64_t tiles, int64_t first = 0, int slot = 0) {
  if constexpr (Tiles<T>::whole) {
    const int64_t m = i * Tiles<T>::max_rows;
    return {first + m, std::min<int64_t>(Tiles<T>::max_rows, rows - m), slot};
  }
  const int64_t m = rows * i / tiles;
  return {first + m, rows * (i + 1) / tiles - m, slot};
}
// Where a unit of its own multiplies, the epilogue of a tile runs beside the next one's product, some rows a step.
struct Waiting {
  int64_t panel = 0;
  RowTile tile{0, 0, 0};
  const float* c = nullptr;
  template <class Epilogue>
  FA_INLINE void some(int64_t step, int64_t share, Epilogue&& epilogue) const {
    const int64_t from = step * share, rows = std::min(share, tile.rows - from);
    if (rows > 0) epilogue(panel, RowTile{tile.m + from, rows, tile.slot}, c + from * 32);
  }
};
template <class T, class Rows, class TileAt, class Add, class Epilogue>
FA_INLINE void product_of_words(const Rows& a, int64_t blocks, TileAt&& tile_at, const Passes<T>& k, int64_t columns,
                                int64_t first, int64_t last, float* c, const Ahead& ahead, Add&& add,
                                Epilogue&& epilogue) {
  using Tl = Tiles<T>;
  [[maybe_unused]] typename Tl::Session session{};
  [[maybe_unused]] Waiting waiting;
  for (int64_t panel = first; panel < last; ++panel) {
    for (int i_pass = 0; i_pass < k.count(); ++i_pass) {
      const Pass& pass = k[i_pass];
      const uint32_t* b = pass.b + panel * pass.panel_stride;
      const int64_t wanted = std::min<int64_t>(32, columns - panel * 32);
      [[maybe_unused]] const int strips = (int)((wanted + kStrip<T> - 1) / kStrip<T>);
      const bool more = i_pass + 1 < k.count();
      // While this piece of B is multiplied, memory brings the one that follows it.
      const Pass& next = k[more ? i_pass + 1 : 0];
      const auto* wanted_next = (const char*)(next.b + (more ? panel : std::min(panel + 1, last - 1)) * next.panel_stride);
      const bool asks = ahead.weights() && next.ldb == kStrip<T>;
      [[maybe_unused]] const int64_t lines = asks ? next.words * kStrip<T> / 16 : 0;  // of a strip
      const auto share = [&](int64_t i) {
        return ahead.share(((panel - first) * k.count() + i_pass) * blocks + i, (last - first) * k.count() * blocks);
      };
      if constexpr (Tl::apart) {
        for (int64_t i = 0; i < blocks; ++i) {
          const RowTile t = tile_at(i);
          float* tile = c + i * Tl::max_rows * 32;
          const int64_t steps = pass.words / 16, some = (waiting.tile.rows + steps - 1) / steps;
          const int64_t of_b = lines / (blocks * steps);
          const char* asked = wanted_next + lines * i / blocks * 64;
          const Lines mine = share(i);
          const int64_t of_mine = (mine.count + steps - 1) / steps;
          Tl::run_beside(wanted <= W, (int)t.rows, a.row(t.m, pass.a), a.stride(), b, pass.words, tile, i_pass > 0,
                         [&](int64_t step) __attribute__((always_inline)) {
            ask({asked + step * of_b * 64, of_b});
            ask({mine.p + step * of_mine * 64, of_mine});
            waiting.some(step, some, epilogue);
          }, [&](bool two) __attribute__((always_inline)) {
            if (!more) add.while_in_registers(two, panel, t);
          });
          waiting.tile.rows = 0;
          if (more) continue;
          add(panel, t, tile);
          waiting = {panel, t, tile};
        }
      } else {
        const auto run = wanted <= W ? Tl::run_narrow : Tl::run;
        for (int strip = 0; strip < strips; ++strip) {
          const bool ready = !more && strip == strips - 1;
          for (int64_t i = 0; i < blocks; ++i) {
            const RowTile t = tile_at(i);
            float* tile = c + i * Tl::max_rows * 32;
            run((int)t.rows, a.row(t.m, pass.a), a.stride(), b + strip * pass.strip_stride, pass.ldb, pass.words,
                tile + strip * kStrip<T>, 32, i_pass > 0,
                lines ? wanted_next + strip * next.strip_stride * 4 + lines * i / blocks * 64 : nullptr,
                strip == 0 ? share(i) : Lines{});
            if (!ready) continue;
            add(panel, t, tile);
            epilogue(panel, t, tile);
          }
        }
      }
    }
  }
  if constexpr (Tl::apart) waiting.some(0, waiting.tile.rows, epilogue);
}
#if FA_BF16 == 2 || FA_BF16 == 3
#include "parts.inl"
#endif
// For every tile of the product of A's rows with panels [first, last): add(panel, tile, c), which may multiply more into c
// [rows][32] (or has done so while_in_registers, where a unit of its own multiplies), then epilogue(panel, tile, c), which
// may not multiply and may come in parts of a tile's rows. `ahead` is asked for meanwhile.
// tile_at(i) is the i-th of `blocks` tiles; `columns` are the whole product's.
template <class T, class Rows, class TileAt, class Add, class Epilogue>
FA_INLINE void product_of_tiles(const Rows& a, int64_t blocks, TileAt&& tile_at, const Passes<T>& k, int64_t columns,
                                int64_t first, int64_t last, float* c, const Ahead& ahead, Add&& add,
                                Epilogue&& epilogue) {
  if constexpr (in_parts<T>) product_of_parts(a, blocks, tile_at, k, columns, first, last, c, ahead, add, epilogue);
  else product_of_words<T>(a, blocks, tile_at, k, columns, first, last, c, ahead, add, epilogue);
}
struct NothingToAdd {
  void while_in_registers(bool, int64_t, const RowTile&) const {}
  void operator()(int64_t, const RowTile&, float*) const {}
};
// The same over all rows, with nothing to add; epilogue(panel, m, rows, c).
template <class T, class Rows, class Epilogue>
FA_INLINE void product(const Rows& a, int64_t rows, const Passes<T>& k, int64_t first, int64_t last, float* c,
                       const Ahead& ahead, Epilogue&& epilogue) {
  const int64_t tiles = tiles_in<T>(rows);
  product_of_tiles<T>(a, tiles, [&](int64_t i) { return tile_of<T>(rows, i, tiles); }, k, last * 32, first, last, c,
                      ahead, NothingToAdd{},
                      [&](int64_t panel, const RowTile& t, const float* tile) { epilogue(panel, t.m, t.rows, tile); });
}
// The product into out [rows][ldo], which has room for 32 more rows and for whole panels.
template <class T>
FA_INLINE void product_into(const ABlock& a, int64_t rows, const Passes<T>& k, int64_t panels, float* c, float* out,
                            int64_t ldo, const Ahead& ahead) {
  if constexpr (!in_parts<T>)
    if (k.count() == 1) {  // a tile may write rows past its own: the next one, made later, puts them right
      [[maybe_unused]] typename Tiles<T>::Session session{};
      const int64_t tiles = tiles_in<T>(rows);
      for (int64_t panel = 0; panel < panels; ++panel) {
        ask(ahead.share(panel, panels));
        for (int64_t i = 0; i < tiles; ++i) {
          const RowTile t = tile_of<T>(rows, i, tiles);
          multiply_panel<T>((int)t.rows, a.row(t.m, 0), k[0], panel, out + t.m * ldo + panel * 32, ldo, false);
        }
      }
      return;
    }
  product<T>(a, rows, k, 0, panels, c, ahead, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
    for (int64_t r = 0; r < mr; ++r)
      for (int v = 0; v < kNV; ++v) store(out + (m + r) * ldo + panel * 32 + v * W, load(tile + r * 32 + v * W));
  });
}
// Floats of scratch for c.
FA_INLINE int64_t tile_scratch(int64_t rows) { return (padded_rows(rows) + 32) * 32; }

// -- packing B -------------------------------------------------------------------------------------------------------

FA_INLINE float as_float(float v) { return v; }
FA_INLINE float as_float(bf16 v) {
  const uint32_t u = (uint32_t)v << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
// Order::added of floats in parts: words of two k, k running over the parts of added_part(k) rows.
template <class S>
void pack_added_parts(const S* src, int64_t k, int64_t n, int64_t sk, int64_t sn, uint32_t* words) {
  const int64_t kw = added_words<Parts>(k), part_words = added_part(k) / 2, panels = (n + 31) / 32;
  std::memset(words, 0, 4 * (size_t)(panels * kw * 32));
  for (int64_t first = 0; first < n; first += W) {
    uint32_t* panel = words + first / 32 * kw * 32;
    for (int64_t q = 0; q < part_words; ++q) {
      F parts[2][3];
      for (int half = 0; half < 2; ++half) {
        const int64_t row = 2 * q + half;
        float lanes[W] = {};
        for (int64_t l = 0; row < k && l < std::min<int64_t>(W, n - first); ++l)
          lanes[l] = as_float(src[row * sk + (first + l) * sn]);
        split(load(lanes), parts[half]);
      }
      for (int i = 0; i < 6; ++i) {
        const U word = pair_of(parts[0][kAddedRight[i]], parts[1][kAddedRight[i]]);
        std::memcpy(panel + packed_at<bf16>(kw, first % 32, i * part_words + q), &word, sizeof word);
      }
    }
  }
}
// Order::parted is that of `plain` for floats.
template <class T, class S>
void pack_as(const S* src, int64_t k, int64_t n, int64_t sk, int64_t sn, Order order, uint32_t* words) {
  const int64_t kw = words_of<T>(k), panels = (n + 31) / 32;
  auto value = [&](int64_t i, int64_t j) -> float {
    return i < k && j < n ? as_float(src[i * sk + j * sn]) : 0.0f;
  };
  const bool parts = order == Order::parted && std::is_same_v<T, bf16>;
  auto column = [&](int64_t j) { return parts ? j % 16 * 2 + j / 16 : j; };  // of a panel's 32, where column j is made
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
          const int64_t from = p * 32 + column(j + l);
          lanes[0][l] = value(i * Operand<T>::per_word, from);
          lanes[1][l] = Operand<T>::pairs ? value(i * 2 + 1, from) : 0.0f;
        }
        U word;
        if constexpr (Operand<T>::pairs)
          word = (round_up_bits(load(lanes[0])) >> 16) | (round_up_bits(load(lanes[1])) & 0xffff0000u);
        else
          word = bits(rounded<T>(load(lanes[0])));
        std::memcpy(panel + packed_at<T>(kw, j, i), &word, sizeof word);
      }
  }
}

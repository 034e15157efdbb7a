// W += d or W -= d over some rows of a matrix, d = t A with t = scale * b: the sum of fastadapt/ops/merge.py, in its
// order. A stands packed in panels of 64 columns, [panel][k][64], padded with zeros, so that a tile reads it in one
// stream whatever the matrix's width; for bfloat16 weights in the order of their pairs, see there.

// Denormals count: a caller that flushes them would get other bits than another thread.
class IeeeFloats {
 public:
#if defined(__x86_64__)
  IeeeFloats() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~IeeeFloats() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  IeeeFloats() {}
#endif
};

// a * b + c, rounded once.
#if FA_WIDTH == 16
FA_INLINE F fma1(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif FA_WIDTH == 8
FA_INLINE F fma1(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__aarch64__)
FA_INLINE F fma1(F a, F b, F c) {
  for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);  // one instruction for all
  return c;
}
#else
typedef double D __attribute__((vector_size(8 * FA_WIDTH)));
typedef int64_t L __attribute__((vector_size(8 * FA_WIDTH)));
// The product is exact as a double; the sum is rounded to odd, so that rounding it again to float can't round twice.
FA_INLINE F fma1(F a, F b, F c) {
  const D p = __builtin_convertvector(a, D) * __builtin_convertvector(b, D), d = __builtin_convertvector(c, D);
  const D s = p + d, part = s - p;
  const D error = (p - (s - part)) + (d - part);
  const L even = (L)(error != 0.0) & (((L)s & 1) == 0);
  const L step = ((error > 0.0) == (s > 0.0)) | 1;  // -1 (all bits) where they agree, else 1
  return __builtin_convertvector((D)((L)s - (even & step)), F);
}
#endif

typedef uint64_t Q __attribute__((vector_size(4 * FA_WIDTH)));
FA_INLINE bool any_of(U v) {
#if FA_WIDTH == 16
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif FA_WIDTH == 8
  return !_mm256_testz_si256((__m256i)v, (__m256i)v);
#else
  const Q q = (Q)v;
  return (q[0] | q[1]) != 0;
#endif
}

// The low byte of every lane, and back with its sign. The compiler's own conversion goes lane by lane.
FA_INLINE I8 low_bytes(I v) {
#if FA_WIDTH == 16
  return (I8)_mm512_cvtepi32_epi8((__m512i)v);
#elif FA_WIDTH == 8
  const __m256i each = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(each), _mm256_extracti128_si256(each, 1));
  I8 bytes;
  std::memcpy(&bytes, &both, sizeof bytes);
  return bytes;
#else
  return __builtin_convertvector(v, I8);
#endif
}
FA_INLINE I from_bytes(I8 v) {
#if FA_WIDTH == 16
  return (I)_mm512_cvtepi8_epi32((__m128i)v);
#elif FA_WIDTH == 8
  __m128i bytes = _mm_setzero_si128();
  std::memcpy(&bytes, &v, sizeof v);
  return (I)_mm256_cvtepi8_epi32(bytes);
#else
  return __builtin_convertvector(v, I);
#endif
}

// How a weight is stored: `raw` holds its bits in 32-bit lanes.
struct Single {
  using Word = uint32_t;
  static FA_INLINE U load(const Word* p) { U v; std::memcpy(&v, p, sizeof v); return v; }
  static FA_INLINE void store(Word* p, U raw) { std::memcpy(p, &raw, sizeof raw); }
  static FA_INLINE F value(U raw) { return (F)raw; }
  static FA_INLINE U narrow(F v) { return (U)v; }
};
struct Sixteen {
  using Word = uint16_t;
  static FA_INLINE U load(const Word* p) {
    U16 h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, U);
  }
  static FA_INLINE void store(Word* p, U raw) {
    const U16 h = __builtin_convertvector(raw, U16);
    std::memcpy(p, &h, sizeof h);
  }
};
struct Half : Sixteen {
#if FA_WIDTH == 16
  static FA_INLINE F value(U raw) { return (F)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)raw)); }
  static FA_INLINE U narrow(F v) {
    return (U)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif FA_WIDTH == 8
  static FA_INLINE F value(U raw) {
    const U16 h = __builtin_convertvector(raw, U16);
    return (F)_mm256_cvtph_ps((__m128i)h);
  }
  static FA_INLINE U narrow(F v) {
    return __builtin_convertvector((U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT), U);
  }
#else
  static FA_INLINE F value(U raw) {
    const U magnitude = (raw & 0x7fffu) << 13, sign = (raw & 0x8000u) << 16;
    const F scaled = (F)magnitude * 0x1p112f;  // exact, for denormals too
    return (F)((magnitude >= 0x0f800000u ? ((U)scaled | 0x7f800000u) : (U)scaled) | sign);
  }
  static FA_INLINE U narrow(F v) {
    const U u = (U)v & 0x7fffffffu, sign = ((U)v >> 16) & 0x8000u;
    const U normal = (u + (0xfffu + ((u >> 13) & 1u)) - 0x38000000u) >> 13;
    const U small = (U)((F)u + 0.5f) - 0x3f000000u;  // the addition rounds to a multiple of 2^-24
    const U finite = u < 0x38800000u ? small : normal;
    const U large = u > 0x7f800000u ? (U{} + 0x7e00u) : (U{} + 0x7c00u);
    return (u < 0x477ff000u ? finite : large) | sign;
  }
#endif
};

template <class Store>
FA_INLINE U load_raw(const typename Store::Word* p, int64_t n) {
  if (n >= W) return Store::load(p);
  typename Store::Word buffer[W] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return Store::load(buffer);
}
template <class Store>
FA_INLINE void store_raw(typename Store::Word* p, U raw, int64_t n) {
  if (n >= W) return Store::store(p, raw);
  typename Store::Word buffer[W];
  Store::store(buffer, raw);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

constexpr int64_t kMergePanel = 64;
constexpr int kMergeVectors = 4;                      // of a tile's row
constexpr int kMergeRows = FA_WIDTH == 16 ? 4 : 2;    // of a tile: as many sums as registers hold
constexpr int64_t kMergeFirstLevel = 24 << 10;        // bytes of A that stay in the first-level cache

// The weights of one row of a tile, n from `index` on, whose difference is not in a byte.
template <class Word, class Code>
__attribute__((noinline)) int64_t list_large(const Word* raw, const Code* code, int64_t n, int64_t index,
                                             MergeEntry* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i)
    if (code[i] < -128 || code[i] > 127) out[count++] = {static_cast<uint32_t>(index + i), raw[i]};
  return count;
}

// A row of codes of a tile. Nobody reads them soon, and a whole line of them need not be fetched before it is written.
template <bool Whole>
FA_INLINE void store_codes(int8_t* to, const I8 (&codes)[kMergeVectors], int64_t n) {
#if FA_WIDTH == 16
  if (Whole && (reinterpret_cast<uintptr_t>(to) & 63) == 0) {
    __m512i line = _mm512_castsi128_si512((__m128i)codes[0]);
    line = _mm512_inserti32x4(line, (__m128i)codes[1], 1);
    line = _mm512_inserti32x4(line, (__m128i)codes[2], 2);
    line = _mm512_inserti32x4(line, (__m128i)codes[3], 3);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
    return;
  }
#endif
  std::memcpy(to, codes, static_cast<size_t>(Whole ? sizeof codes : n));
}

// Asks for the `bytes` of a row that comes next: the hardware loses track of rows that end after a group of panels.
FA_INLINE void ask_for(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 1);
}
// How far the rows that come after these of a tile lie ahead; 0 at the end.
FA_INLINE int64_t next_rows(const MergeRows& p, int64_t row, int64_t rows) {
  return row + 2 * rows <= p.rows ? rows * p.cols : 0;
}

// d = t A of a tile.
template <int Rows>
FA_INLINE void merge_product(const MergeRows& p, const float* a, int64_t row, F (&d)[Rows][kMergeVectors]) {
  const float* t = p.t + row * p.rank;
  for (int64_t k = 0; k < p.rank; ++k) {
    F x[kMergeVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kMergeVectors; ++v) x[v] = load(a + k * kMergePanel + v * W);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const F factor = set1(t[i * p.rank + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kMergeVectors; ++v) d[i][v] = fma1(factor, x[v], d[i][v]);
    }
  }
}

enum class MergeStep { in_exact, in, out_exact, out };

// One tile: Rows rows of the n <= kMergeVectors * W columns from `col`.
template <class Store, MergeStep Step, int Rows, bool Whole>
FA_INLINE F merge_tile(MergeRows& p, const float* a, int64_t row, int64_t col, int64_t n) {
  using Word = typename Store::Word;
  F d[Rows][kMergeVectors] = {};
  merge_product<Rows>(p, a, row, d);
  const int64_t ahead = next_rows(p, row, Rows);
  F broken = {};
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    const int64_t at = (row + i) * p.cols + col;
    Word* w = static_cast<Word*>(p.w) + at;
    int8_t* bytes = p.codes + at;
    U raws[kMergeVectors], large = {};
    I codes[kMergeVectors];
    I8 packed[kMergeVectors];
    ask_for(w + ahead, kMergeVectors * W * static_cast<int64_t>(sizeof(Word)));
    if (Step == MergeStep::out_exact) ask_for(bytes + ahead, kMergeVectors * W);
#pragma GCC unroll 4
    for (int v = 0; v < kMergeVectors; ++v) {
      const int64_t left = Whole ? W : std::clamp<int64_t>(n - v * W, 0, W);
      const U raw = load_raw<Store>(w + v * W, left);
      if constexpr (Step == MergeStep::in || Step == MergeStep::in_exact) {
        const U sum = Store::narrow(Store::value(raw) + d[i][v]);
        store_raw<Store>(w + v * W, sum, left);
        const F merged = Store::value(sum);
        broken = broken + merged * 0.0f;  // NaN once one is not finite
        if constexpr (Step == MergeStep::in_exact) {
          const I code = (I)(raw - Store::narrow(merged - d[i][v]));
          packed[v] = low_bytes(code);
          raws[v] = raw;
          codes[v] = code;
          large = large | ((U)code + 128u);
        }
      } else {
        U back = Store::narrow(Store::value(raw) - d[i][v]);
        if constexpr (Step == MergeStep::out_exact) {
          I8 byte = {};
          std::memcpy(&byte, bytes + v * W, static_cast<size_t>(left));
          back = back + (U)from_bytes(byte);
        } else {
          broken = broken + Store::value(back) * 0.0f;
        }
        store_raw<Store>(w + v * W, back, left);
      }
    }
    if constexpr (Step == MergeStep::in_exact) {
      store_codes<Whole>(bytes, packed, n);
      if (__builtin_expect(any_of(large & ~255u), 0)) {
        uint32_t raw[kMergeVectors * W];  // copies, so that the common path keeps its own in registers
        int32_t code[kMergeVectors * W];
        std::memcpy(raw, raws, sizeof raw);
        std::memcpy(code, codes, sizeof code);
        p.count += list_large(raw, code, n, at, p.listed + p.count);
      }
    }
  }
  return broken;
}

// -- bfloat16: two weights a word --------------------------------------------------------------------------------

// A word has an even column in its lower half and the odd one after it in its upper, so that nothing crosses lanes on
// its way between 16 and 32 bits; panels have the even columns of every two vectors before the odd ones.
constexpr uint32_t kUpper = 0xffff0000u;
typedef uint16_t Pairs __attribute__((vector_size(4 * FA_WIDTH)));
typedef int8_t PairBytes __attribute__((vector_size(2 * FA_WIDTH)));

// v rounded to the nearest bfloat16, ties to even, in the upper half of a word; the lower half has no meaning. In
// integers, because the conversion instruction flushes denormals. A NaN here has no low bits set that could carry.
FA_INLINE U rounded_up(F v) {
#if FA_WIDTH == 16
  const __m512i u = (__m512i)v, half = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  return (U)_mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
#else
  return (U)v + (0x7fffu + (((U)v >> 16) & 1u));
#endif
}
FA_INLINE U joined(U even, U odd) { return (even >> 16) | (odd & kUpper); }
FA_INLINE U load_pairs(const uint16_t* p, int64_t n) {
  U v = {};
  std::memcpy(&v, p, static_cast<size_t>(2 * n));
  return v;
}
FA_INLINE PairBytes low_bytes(Pairs v) {
#if FA_WIDTH == 16
  return (PairBytes)_mm512_cvtepi16_epi8((__m512i)v);
#elif FA_WIDTH == 8
  const __m256i low = (__m256i)(v & 0xff), both = _mm256_packus_epi16(low, low);
  return (PairBytes)_mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 0x08));
#else
  return __builtin_convertvector(v, PairBytes);
#endif
}
FA_INLINE Pairs from_bytes(PairBytes v) {
#if FA_WIDTH == 16
  return (Pairs)_mm512_cvtepi8_epi16((__m256i)v);
#elif FA_WIDTH == 8
  return (Pairs)_mm256_cvtepi8_epi16((__m128i)v);
#else
  typedef int16_t Signed __attribute__((vector_size(4 * FA_WIDTH)));
  return (Pairs)__builtin_convertvector(v, Signed);
#endif
}

template <bool Whole>
FA_INLINE void store_codes(int8_t* to, const PairBytes (&codes)[kMergeVectors / 2], int64_t n) {
#if FA_WIDTH == 16
  if (Whole && (reinterpret_cast<uintptr_t>(to) & 63) == 0) {
    const __m512i line = _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)codes[0]), (__m256i)codes[1], 1);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line);
    return;
  }
#endif
  std::memcpy(to, codes, static_cast<size_t>(Whole ? sizeof codes : n));
}

// merge_tile in bfloat16. Differences are taken in 16 bits: those of finite weights are not so large that they would
// come out as another byte.
template <MergeStep Step, int Rows, bool Whole>
FA_INLINE F merge_tile_pairs(MergeRows& p, const float* a, int64_t row, int64_t col, int64_t n) {
  F d[Rows][kMergeVectors] = {};
  merge_product<Rows>(p, a, row, d);
  const int64_t ahead = next_rows(p, row, Rows);
  F broken = {};
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    const int64_t at = (row + i) * p.cols + col;
    uint16_t* w = static_cast<uint16_t*>(p.w) + at;
    int8_t* bytes = p.codes + at;
    U raws[kMergeVectors / 2];
    Pairs codes[kMergeVectors / 2], large = {};
    PairBytes packed[kMergeVectors / 2];
    ask_for(w + ahead, kMergeVectors * W * 2);
    if (Step == MergeStep::out_exact) ask_for(bytes + ahead, kMergeVectors * W);
#pragma GCC unroll 2
    for (int v = 0; v < kMergeVectors / 2; ++v) {
      const int64_t left = Whole ? 2 * W : std::clamp<int64_t>(n - v * 2 * W, 0, 2 * W);
      const F d_even = d[i][2 * v], d_odd = d[i][2 * v + 1];
      const U raw = load_pairs(w + v * 2 * W, left);
      const F even = (F)(raw << 16), odd = (F)(raw & kUpper);
      U after;
      if constexpr (Step == MergeStep::in || Step == MergeStep::in_exact) {
        const U up_even = rounded_up(even + d_even), up_odd = rounded_up(odd + d_odd);
        after = joined(up_even, up_odd);
        const F merged_even = (F)(up_even & kUpper), merged_odd = (F)(up_odd & kUpper);
        broken = broken + merged_even * 0.0f;  // NaN once one is not finite
        broken = broken + merged_odd * 0.0f;
        if constexpr (Step == MergeStep::in_exact) {
          const U back = joined(rounded_up(merged_even - d_even), rounded_up(merged_odd - d_odd));
          raws[v] = raw;
          codes[v] = (Pairs)raw - (Pairs)back;
          packed[v] = low_bytes(codes[v]);
          large = large | (codes[v] + 128);
        }
      } else {
        const U up_even = rounded_up(even - d_even), up_odd = rounded_up(odd - d_odd);
        after = joined(up_even, up_odd);
        if constexpr (Step == MergeStep::out_exact) {
          PairBytes byte = {};
          std::memcpy(&byte, bytes + v * 2 * W, static_cast<size_t>(left));
          after = (U)((Pairs)after + from_bytes(byte));
        } else {
          broken = broken + (F)(up_even & kUpper) * 0.0f;
          broken = broken + (F)(up_odd & kUpper) * 0.0f;
        }
      }
      std::memcpy(w + v * 2 * W, &after, static_cast<size_t>(2 * left));
    }
    if constexpr (Step == MergeStep::in_exact) {
      store_codes<Whole>(bytes, packed, n);
      if (__builtin_expect(any_of((U)(large & 0xff00)), 0)) {
        uint16_t raw[kMergeVectors * W];  // copies, so that the common path keeps its own in registers
        int16_t code[kMergeVectors * W];
        std::memcpy(raw, raws, sizeof raw);
        std::memcpy(code, codes, sizeof code);
        p.count += list_large(raw, code, n, at, p.listed + p.count);
      }
    }
  }
  return broken;
}

struct Brain {};  // a weight's storage, as Single and Half, that tiles of pairs serve

template <class Store, MergeStep Step, int Rows, bool Whole>
FA_INLINE F merge_one(MergeRows& p, const float* a, int64_t row, int64_t col, int64_t n) {
  if constexpr (std::is_same_v<Store, Brain>)
    return merge_tile_pairs<Step, Rows, Whole>(p, a, row, col, n);
  else
    return merge_tile<Store, Step, Rows, Whole>(p, a, row, col, n);
}

// As many panels at a time as the first-level cache holds of A, over all rows.
template <class Store, MergeStep Step>
bool merge_pass(MergeRows& p) {
  const IeeeFloats guard;
  const int64_t panels = (p.cols + kMergePanel - 1) / kMergePanel;
  const int64_t group = std::max<int64_t>(1, kMergeFirstLevel / (p.rank * kMergePanel * 4));
  F broken = {};
  for (int64_t first = 0; first < panels; first += group) {
    const int64_t begin = first * kMergePanel, end = std::min(p.cols, (first + group) * kMergePanel);
    int64_t row = 0;
    auto rows = [&](auto count) {
      for (int64_t col = begin; col < end; col += kMergeVectors * W) {
        const float* a = p.a + col / kMergePanel * p.rank * kMergePanel + col % kMergePanel;
        if (end - col >= kMergeVectors * W)
          broken = broken + merge_one<Store, Step, count, true>(p, a, row, col, kMergeVectors * W);
        else
          broken = broken + merge_one<Store, Step, count, false>(p, a, row, col, end - col);
      }
      row += count;
    };
    while (row + kMergeRows <= p.rows) rows(std::integral_constant<int, kMergeRows>{});
    while (row < p.rows) rows(std::integral_constant<int, 1>{});
  }
  return !any_of((U)(broken != broken));
}

template <MergeStep Step>
bool merge_typed(MergeRows& p) {
  switch (p.type) {
    case WeightType::f32: return merge_pass<Single, Step>(p);
    case WeightType::bf16: return merge_pass<Brain, Step>(p);
    default: return merge_pass<Half, Step>(p);
  }
}
inline bool merge_rows(MergeRows& p) {
  return p.codes ? merge_typed<MergeStep::in_exact>(p) : merge_typed<MergeStep::in>(p);
}
inline bool unmerge_rows(MergeRows& p) {
  return p.codes ? merge_typed<MergeStep::out_exact>(p) : merge_typed<MergeStep::out>(p);
}

// dst = src * scale as floats; false where a value of src is not finite.
template <class T>
bool scaled_floats(const T* src, int64_t n, float scale, float* dst) {
  F broken = {};
  for (int64_t i = 0; i < n; i += W) {
    const F v = load_n(src + i, n - i);
    broken = broken + v * 0.0f;
    store_n(dst + i, v * scale, n - i);
  }
  return !any_of((U)(broken != broken));
}
template <class T>
bool merge_panels(const T* a, int64_t rank, int64_t cols, bool pairs, float* dst) {
  bool finite = true;
  float row[kMergePanel];
  for (int64_t col = 0; col < cols; col += kMergePanel)
    for (int64_t k = 0; k < rank; ++k, dst += kMergePanel) {
      const int64_t n = std::min(kMergePanel, cols - col);
      float* const to = pairs ? row : dst;
      if (n < kMergePanel) std::memset(to, 0, sizeof(float) * kMergePanel);
      finite &= scaled_floats(a + k * cols + col, n, 1.0f, to);
      for (int64_t i = 0; pairs && i < kMergePanel; ++i) dst[i / (2 * W) * 2 * W + i % 2 * W + i % (2 * W) / 2] = row[i];
    }
  return finite;
}
inline bool merge_pack(const MergePack& p) {
  const IeeeFloats guard;
  const bool pairs = p.type == WeightType::bf16;
  const bool a = p.a_type == DType::f32 ? merge_panels((const float*)p.a, p.rank, p.cols, pairs, p.panels)
                                        : merge_panels((const bf16*)p.a, p.rank, p.cols, pairs, p.panels);
  const bool b = p.b_type == DType::f32 ? scaled_floats((const float*)p.b, p.rows * p.rank, p.scale, p.t)
                                        : scaled_floats((const bf16*)p.b, p.rows * p.rank, p.scale, p.t);
  return a && b;
}

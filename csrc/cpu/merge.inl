// W += d or W -= d over some rows of a matrix, d = t A with t = scale * b: the sum of fastadapt/ops/merge.py, in its
// order. A stands packed in panels of 64 columns, [panel][k][64], padded with zeros, so that a tile reads it in one
// stream whatever the matrix's width; for bfloat16 weights in the order of their pairs, see Brain.

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

// low_bytes of vec.inl for pairs, and the way back with the bytes' sign.
typedef uint16_t Pairs __attribute__((vector_size(4 * FA_WIDTH)));
typedef uint8_t PairBytes __attribute__((vector_size(2 * FA_WIDTH)));
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
FA_INLINE U from_bytes(U8 v) {
#if FA_WIDTH == 16
  return (U)_mm512_cvtepi8_epi32((__m128i)v);
#elif FA_WIDTH == 8
  __m128i bytes = _mm_setzero_si128();
  std::memcpy(&bytes, &v, sizeof v);
  return (U)_mm256_cvtepi8_epi32(bytes);
#else
  return (U)__builtin_convertvector((I8)v, I);
#endif
}
FA_INLINE Pairs from_bytes(PairBytes v) {
#if FA_WIDTH == 16
  return (Pairs)_mm512_cvtepi8_epi16((__m256i)v);
#elif FA_WIDTH == 8
  return (Pairs)_mm256_cvtepi8_epi16((__m128i)v);
#else
  typedef int8_t SignedBytes __attribute__((vector_size(2 * FA_WIDTH)));
  typedef int16_t Signed __attribute__((vector_size(4 * FA_WIDTH)));
  return (Pairs)__builtin_convertvector((SignedBytes)v, Signed);
#endif
}

// How weights are stored: a load's bits `raw` hold kParts vectors of them, a difference of bits is a Code.
struct InWords {
  static constexpr int kParts = 1;
  using Code = U;
  using Bytes = U8;
  using Lane = uint32_t;
};
struct Single : InWords {
  using Word = uint32_t;
  static FA_INLINE U load(const Word* p) { U v; std::memcpy(&v, p, sizeof v); return v; }
  static FA_INLINE void store(Word* p, U raw) { std::memcpy(p, &raw, sizeof raw); }
  static FA_INLINE void unpack(U raw, F (&x)[1]) { x[0] = (F)raw; }
  static FA_INLINE U pack(const F (&x)[1]) { return (U)x[0]; }
};
// Two bfloat16 a word, an even column in its lower half and the odd one after it in its upper, so that nothing crosses
// lanes on its way between 16 and 32 bits; panels have the even columns of every two vectors before the odd ones.
// Differences are taken in 16 bits: those of finite weights are not so large that they would come out as another byte.
struct Brain {
  static constexpr int kParts = 2;
  static constexpr uint32_t kUpper = 0xffff0000u;
  using Word = uint16_t;
  using Code = Pairs;
  using Bytes = PairBytes;
  using Lane = uint16_t;
  static FA_INLINE U load(const Word* p) { U v; std::memcpy(&v, p, sizeof v); return v; }
  static FA_INLINE void store(Word* p, U raw) { std::memcpy(p, &raw, sizeof raw); }
  static FA_INLINE void unpack(U raw, F (&x)[2]) {
    x[0] = (F)(raw << 16);
    x[1] = (F)(raw & kUpper);
  }
  static FA_INLINE U pack(const F (&x)[2]) { return (rounded(x[0]) >> 16) | (rounded(x[1]) & kUpper); }

 private:
  // To nearest even, in the upper half of a word; the lower half has no meaning. In integers, because the conversion
  // instruction flushes denormals. A NaN here has no low bits set that could carry.
  static FA_INLINE U rounded(F v) {
#if FA_WIDTH == 16
    const __m512i u = (__m512i)v, half = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    return (U)_mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
#else
    return (U)v + (0x7fffu + (((U)v >> 16) & 1u));
#endif
  }
};
struct Half : InWords {
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
  static FA_INLINE void unpack(U raw, F (&x)[1]) { x[0] = value(raw); }
  static FA_INLINE U pack(const F (&x)[1]) { return narrow(x[0]); }

 private:
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
  if (n >= Store::kParts * W) return Store::load(p);
  typename Store::Word buffer[Store::kParts * W] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return Store::load(buffer);
}
template <class Store>
FA_INLINE void store_raw(typename Store::Word* p, U raw, int64_t n) {
  if (n >= Store::kParts * W) return Store::store(p, raw);
  typename Store::Word buffer[Store::kParts * W];
  Store::store(buffer, raw);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

constexpr int64_t kMergePanel = 64;
constexpr int kMergeVectors = 4;                      // of a tile's row
constexpr int kMergeRows = FA_WIDTH == 16 ? 4 : 2;    // of a tile: as many sums as registers hold
constexpr int64_t kMergeFirstLevel = 24 << 10;        // bytes of A that stay in the first-level cache

// The weights of one row of a tile, n from `index` on, whose difference is not in a byte.
template <class Lane>
__attribute__((noinline)) int64_t list_large(const Lane* raw, const std::make_signed_t<Lane>* code, int64_t n,
                                             int64_t index, MergeEntry* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i)
    if (code[i] < -128 || code[i] > 127) out[count++] = {static_cast<uint32_t>(index + i), raw[i]};
  return count;
}

#if FA_WIDTH == 16
// The low bytes of a tile's row of codes in one line, by two or three instructions a vector fewer than one by one.
FA_INLINE __m512i line_of(const Pairs (&codes)[2]) {
  const __m512i low = _mm512_set1_epi16(0xff), order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  const __m512i a = _mm512_and_si512((__m512i)codes[0], low), b = _mm512_and_si512((__m512i)codes[1], low);
  return _mm512_permutexvar_epi64(order, _mm512_packus_epi16(a, b));
}
FA_INLINE __m512i line_of(const U (&codes)[4]) {
  const __m512i low = _mm512_set1_epi32(0xff);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i bytes[4];
  for (int i = 0; i < 4; ++i) bytes[i] = _mm512_and_si512((__m512i)codes[i], low);
  const __m512i a = _mm512_packus_epi32(bytes[0], bytes[1]), b = _mm512_packus_epi32(bytes[2], bytes[3]);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a, b));
}
#endif
// A row of codes of a tile. Nobody reads them soon, and a whole line of them need not be fetched before it is written.
template <bool Whole, class Bytes, class Code, int N>
FA_INLINE void store_codes(int8_t* to, const Code (&codes)[N], int64_t n) {
#if FA_WIDTH == 16
  if (Whole && (reinterpret_cast<uintptr_t>(to) & 63) == 0)
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line_of(codes));
#endif
  Bytes bytes[N];
  for (int i = 0; i < N; ++i) bytes[i] = low_bytes(codes[i]);
  std::memcpy(to, bytes, static_cast<size_t>(Whole ? sizeof bytes : n));
}

// Asks for the `bytes` of a row that comes next: the hardware loses track of rows that end after a group of panels.
FA_INLINE void ask_for(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at, 1);
}

enum class MergeStep { in_exact, in, out_exact, out };

// One tile: Rows rows of the n <= kMergeVectors * W columns from `col`.
template <class Store, MergeStep Step, int Rows, bool Whole>
FA_INLINE F merge_tile(MergeRows& p, const float* a, int64_t row, int64_t col, int64_t n) {
  using Word = typename Store::Word;
  using Code = typename Store::Code;
  using Lane = typename Store::Lane;
  constexpr int parts = Store::kParts, groups = kMergeVectors / parts;
  constexpr int64_t span = parts * W, width = kMergeVectors * W;
  constexpr bool in = Step == MergeStep::in || Step == MergeStep::in_exact;
  F d[Rows][kMergeVectors] = {};
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
  const int64_t ahead = row + 2 * Rows <= p.rows ? Rows * p.cols : 0;
  F broken = {};
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    const int64_t at = (row + i) * p.cols + col;
    Word* w = static_cast<Word*>(p.w) + at;
    int8_t* bytes = p.codes + at;
    U raws[groups];
    Code codes[groups], large = {};
    ask_for(w + ahead, width * static_cast<int64_t>(sizeof(Word)));
    if (Step == MergeStep::out_exact) ask_for(bytes + ahead, width);
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) {
      const int64_t left = Whole ? span : std::clamp<int64_t>(n - g * span, 0, span);
      const U raw = load_raw<Store>(w + g * span, left);
      const F* delta = d[i] + g * parts;
      F x[parts];
      Store::unpack(raw, x);
      for (int k = 0; k < parts; ++k) x[k] = in ? x[k] + delta[k] : x[k] - delta[k];
      U after = Store::pack(x);
      if constexpr (Step == MergeStep::out_exact) {
        typename Store::Bytes byte = {};
        std::memcpy(&byte, bytes + g * span, static_cast<size_t>(left));
        after = (U)((Code)after + from_bytes(byte));
      } else {
        Store::unpack(after, x);
        for (int k = 0; k < parts; ++k) broken = broken + x[k] * 0.0f;  // NaN once one is not finite
      }
      if constexpr (Step == MergeStep::in_exact) {
        for (int k = 0; k < parts; ++k) x[k] = x[k] - delta[k];
        raws[g] = raw;
        codes[g] = (Code)raw - (Code)Store::pack(x);
        large = large | (codes[g] + 128);
      }
      store_raw<Store>(w + g * span, after, left);
    }
    if constexpr (Step == MergeStep::in_exact) {
      store_codes<Whole, typename Store::Bytes>(bytes, codes, n);
      if (__builtin_expect(any_of((U)(large & ~(Code{} + 255))), 0)) {
        Lane raw[width];  // copies, so that the common path keeps its own in registers
        std::make_signed_t<Lane> code[width];
        std::memcpy(raw, raws, sizeof raw);
        std::memcpy(code, codes, sizeof code);
        p.count += list_large(raw, code, n, at, p.listed + p.count);
      }
    }
  }
  return broken;
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
          broken = broken + merge_tile<Store, Step, count, true>(p, a, row, col, kMergeVectors * W);
        else
          broken = broken + merge_tile<Store, Step, count, false>(p, a, row, col, end - col);
      }
      row += count;
    };
    while (row + kMergeRows <= p.rows) rows(std::integral_constant<int, kMergeRows>{});
    while (row < p.rows) rows(std::integral_constant<int, 1>{});
  }
  if constexpr (Step == MergeStep::in_exact) end_of_stream();  // another thread may read the codes next
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
      for (int64_t i = 0; pairs && i < kMergePanel; ++i)
        dst[i / (2 * W) * 2 * W + i % 2 * W + i % (2 * W) / 2] = row[i];
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

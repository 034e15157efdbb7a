// W += d or W -= d over some rows of a matrix, d = t A with t = scale * b: the sum of fastadapt/ops/merge.py, in its
// order. A stands packed in panels of 64 columns, [panel][k][64], padded with zeros, so that a tile reads it in one
// stream whatever the matrix's width.

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
struct Brain : Sixteen {
  static FA_INLINE F value(U raw) { return (F)(raw << 16); }
  // In integers, because the conversion instruction flushes denormals. A NaN here has no low bits set that could carry.
  static FA_INLINE U narrow(F v) {
#if FA_WIDTH == 16
    const __m512i u = (__m512i)v, half = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    return (U)_mm512_srli_epi32(_mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1)), 16);
#else
    return ((U)v + (0x7fffu + (((U)v >> 16) & 1u))) >> 16;
#endif
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

// The weights of one row of a tile whose difference is not in a byte.
inline __attribute__((noinline)) int64_t list_large(const U* raw, const I* code, int64_t n, int64_t index,
                                                    MergeEntry* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t c = code[i / W][i % W];
    if (c < -128 || c > 127) out[count++] = {static_cast<uint32_t>(index + i), raw[i / W][i % W]};
  }
  return count;
}

enum class MergeStep { in_exact, in, out_exact, out };

// One tile: Rows rows of the n <= kMergeVectors * W columns from `col`.
template <class Store, MergeStep Step, int Rows, bool Whole>
FA_INLINE F merge_tile(MergeRows& p, const float* a, int64_t row, int64_t col, int64_t n) {
  using Word = typename Store::Word;
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
  F broken = {};
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
    const int64_t at = (row + i) * p.cols + col;
    Word* w = static_cast<Word*>(p.w) + at;
    int8_t* bytes = p.codes + at;
    U raws[kMergeVectors], large = {};
    I codes[kMergeVectors];
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
          const I8 byte = low_bytes(code);
          std::memcpy(bytes + v * W, &byte, static_cast<size_t>(left));
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
    if constexpr (Step == MergeStep::in_exact)
      if (__builtin_expect(any_of(large & ~255u), 0)) {
        U raw[kMergeVectors];  // copies, so that the common path keeps its own in registers
        I code[kMergeVectors];
        for (int v = 0; v < kMergeVectors; ++v) {
          raw[v] = raws[v];
          code[v] = codes[v];
        }
        p.count += list_large(raw, code, n, at, p.listed + p.count);
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
bool merge_panels(const T* a, int64_t rank, int64_t cols, float* dst) {
  bool finite = true;
  for (int64_t col = 0; col < cols; col += kMergePanel)
    for (int64_t k = 0; k < rank; ++k, dst += kMergePanel) {
      const int64_t n = std::min(kMergePanel, cols - col);
      if (n < kMergePanel) std::memset(dst, 0, sizeof(float) * kMergePanel);
      finite &= scaled_floats(a + k * cols + col, n, 1.0f, dst);
    }
  return finite;
}
inline bool merge_pack(const MergePack& p) {
  const IeeeFloats guard;
  const bool a = p.a_type == DType::f32 ? merge_panels((const float*)p.a, p.rank, p.cols, p.panels)
                                        : merge_panels((const bf16*)p.a, p.rank, p.cols, p.panels);
  const bool b = p.b_type == DType::f32 ? scaled_floats((const float*)p.b, p.rows * p.rank, p.scale, p.t)
                                        : scaled_floats((const bf16*)p.b, p.rows * p.rank, p.scale, p.t);
  return a && b;
}

// Vectors of FA_WIDTH floats in the compiler's own vector types, so that one source serves every instruction set.
typedef float F __attribute__((vector_size(4 * FA_WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * FA_WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * FA_WIDTH)));
typedef uint16_t U16 __attribute__((vector_size(2 * FA_WIDTH)));
typedef int8_t I8 __attribute__((vector_size(FA_WIDTH)));
typedef uint16_t bf16;

#define FA_INLINE inline __attribute__((always_inline))

constexpr int W = FA_WIDTH;

FA_INLINE F set1(float v) { return F{} + v; }
FA_INLINE F load(const float* p) { F v; std::memcpy(&v, p, sizeof v); return v; }
FA_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
FA_INLINE U bits(F v) { return (U)v; }

FA_INLINE F load(const bf16* p) {
  U16 h;
  std::memcpy(&h, p, sizeof h);
  return (F)(__builtin_convertvector(h, U) << 16);
}
// Round to nearest even; a NaN stays a quiet NaN.
FA_INLINE U round_bf16_bits(F v) {
  U u = bits(v);
  U rounded = (u + (0x7fffu + ((u >> 16) & 1u))) >> 16;
  return (v == v) ? rounded : ((u >> 16) | 0x40u);
}
FA_INLINE void store(bf16* p, F v) {
#if FA_BF16 == 1 || FA_BF16 == 2
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);  // to nearest even as well; denormals become zero
#else
  U16 h = __builtin_convertvector(round_bf16_bits(v), U16);
#endif
  std::memcpy(p, &h, sizeof h);
}

// The first n lanes only (n may be W or more: then all).
template <class T>
FA_INLINE F load_n(const T* p, int64_t n) {
  if (n >= W) return load(p);
  T buffer[W] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
FA_INLINE void store_n(T* p, F v, int64_t n) {
  if (n >= W) return store(p, v);
  T buffer[W];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// The same where it is known that every vector of a row is whole.
template <bool Whole, class T>
FA_INLINE F load_n(const T* p, int64_t n) {
  if constexpr (Whole) return load(p);
  return load_n(p, n);
}
template <bool Whole, class T>
FA_INLINE void store_n(T* p, F v, int64_t n) {
  if constexpr (Whole) return store(p, v);
  store_n(p, v, n);
}
// fn(std::bool_constant<Whole>) for rows of n elements.
template <class Fn>
FA_INLINE void with_whole(int64_t n, Fn&& fn) {
  if (n % W == 0) fn(std::true_type{});
  else fn(std::false_type{});
}

// What a value becomes when it is stored as T and read again.
template <class T> FA_INLINE F rounded(F v);
template <> FA_INLINE F rounded<float>(F v) { return v; }
template <> FA_INLINE F rounded<bf16>(F v) {
#if FA_BF16 == 1 || FA_BF16 == 2
  return (F)(__builtin_convertvector((U16)_mm512_cvtneps_pbh((__m512)v), U) << 16);
#else
  return (F)(round_bf16_bits(v) << 16);
#endif
}

FA_INLINE float sum(F v) {
  float lanes[W];
  store(lanes, v);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}
FA_INLINE F max(F a, F b) { return a > b ? a : b; }
FA_INLINE F min(F a, F b) { return a < b ? a : b; }
FA_INLINE F abs(F v) { return (F)(bits(v) & 0x7fffffffu); }

// e^x: x = n ln2 + r, Taylor's polynomial of degree 7 on |r| <= ln2 / 2 (relative error 1e-8), 2^n by the exponent in two
// halves so that denormal results are right. NaN passes.
FA_INLINE F exp(F x) {
  F c = min(max(x, set1(-104.0f)), set1(89.0f));
  F shifted = c * 1.44269504088896341f + 12582912.0f;
  F n = shifted - 12582912.0f;
  F r = c - n * 0.693145751953125f;
  r = r - n * 1.42860677e-6f;
  F p = set1(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  I e = __builtin_convertvector(n, I);
  I half = e >> 1;
  F a = (F)((half + 127) << 23), b = (F)((e - half + 127) << 23);
  F y = p * a * b;
  return (x == x) ? y : x;
}

// erf(x / sqrt 2), absolute error below 2e-7: x q(u), q of degree 15 in u = 2 (x / 5.54)^2 - 1, fitted in float64
// with Lawson's reweighting; csrc/cpu/fit_erf.py makes the coefficients.
FA_INLINE F erf_sqrt2(F x) {
  constexpr float kLimit = 5.54f;
  F u = min(x * x * (2.0f / (kLimit * kLimit)) - 1.0f, set1(1.0f));
  constexpr float c[] = {0.255250349f,   -0.127439589f,   0.0948682597f,  -0.0772340922f,  0.0640717017f,   -0.0523253577f,
                         0.0412291817f,  -0.030625384f,   0.0210062524f,  -0.0141808088f,  0.00989224756f,  -0.00523727911f,
                         0.00143398542f, -0.00109077882f, 0.0014429796f,  -0.000556261614f};
  constexpr int n = sizeof(c) / sizeof(c[0]);
  F q = set1(c[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) q = q * u + c[i];
  return min(max(q * x, set1(-1.0f)), set1(1.0f));  // a NaN becomes -1: whoever calls multiplies by x
}

FA_INLINE F sigmoid(F x) { return 1.0f / (1.0f + exp(-x)); }
FA_INLINE F tanh(F x) {
  // Near zero e^2x - 1 cancels: the odd series is exact to float there.
  F a = abs(x);
  F e = exp(a * -2.0f);
  F large = (1.0f - e) / (1.0f + e);
  F t = a * a;
  F small = a * (1.0f + t * (-0.333333333f + t * (0.133333333f + t * (-0.0539682540f + t * (0.0218694885f +
            t * (-0.00886323553f + t * 0.00359212803f))))));
  F y = a < 0.55f ? small : large;
  return (F)(bits(y) | (bits(x) & 0x80000000u));
}

template <Act A>
FA_INLINE F act(F x) {
  if constexpr (A == Act::none) return x;
  if constexpr (A == Act::relu) return x < 0.0f ? F{} : x;
  if constexpr (A == Act::gelu) { F h = 0.5f * x; return h * erf_sqrt2(x) + h; }
  if constexpr (A == Act::gelu_new) {
    F h = 0.5f * x;
    return h * tanh(0.797884560802865f * (x + 0.044715f * x * x * x)) + h;
  }
  if constexpr (A == Act::silu) return x / (1.0f + exp(-x));
  if constexpr (A == Act::tanh) return tanh(x);
  if constexpr (A == Act::sigmoid) return sigmoid(x);
  if constexpr (A == Act::leaky_relu) return x > 0.0f ? x : 0.01f * x;
}

template <Act A>
FA_INLINE F d_act(F x) {
  if constexpr (A == Act::none) return set1(1.0f);
  if constexpr (A == Act::relu) return x > 0.0f ? set1(1.0f) : F{};
  if constexpr (A == Act::gelu) {
    F density = 0.398942280401433f * exp(-0.5f * x * x);
    return 0.5f * erf_sqrt2(x) + (0.5f + x * density);
  }
  if constexpr (A == Act::gelu_new) {
    F t = tanh(0.797884560802865f * (x + 0.044715f * x * x * x));
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * (0.797884560802865f * (1.0f + 0.134145f * x * x));
  }
  if constexpr (A == Act::silu) { F s = sigmoid(x); return s * (1.0f + x * (1.0f - s)); }
  if constexpr (A == Act::tanh) { F t = tanh(x); return 1.0f - t * t; }
  if constexpr (A == Act::sigmoid) { F s = sigmoid(x); return s * (1.0f - s); }
  if constexpr (A == Act::leaky_relu) return x > 0.0f ? set1(1.0f) : set1(0.01f);
}

// act' as a byte: round(202 act') + 26, so that 0 and 1 are exact.
typedef uint8_t U8 __attribute__((vector_size(FA_WIDTH)));
FA_INLINE void store_code(uint8_t* p, F d, int64_t n) {
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  const F shifted = min(max(d * 202.0f + 26.0f, F{}), set1(255.0f)) + 12582912.0f;
  U8 code = __builtin_convertvector(bits(shifted) & 0xffu, U8);
  std::memcpy(p, &code, (size_t)std::min<int64_t>(W, n));
}
FA_INLINE F load_code(const uint8_t* p, int64_t n) {
  U8 code = U8{};
  std::memcpy(&code, p, (size_t)std::min<int64_t>(W, n));
  return (__builtin_convertvector(__builtin_convertvector(code, I), F) - 26.0f) * (1.0f / 202.0f);
}

// fn(std::integral_constant<Act, a>) for the a at run time.
template <class Fn>
FA_INLINE void with_act(Act a, Fn&& fn) {
  switch (a) {
    case Act::none: return fn(std::integral_constant<Act, Act::none>{});
    case Act::relu: return fn(std::integral_constant<Act, Act::relu>{});
    case Act::gelu: return fn(std::integral_constant<Act, Act::gelu>{});
    case Act::gelu_new: return fn(std::integral_constant<Act, Act::gelu_new>{});
    case Act::silu: return fn(std::integral_constant<Act, Act::silu>{});
    case Act::tanh: return fn(std::integral_constant<Act, Act::tanh>{});
    case Act::sigmoid: return fn(std::integral_constant<Act, Act::sigmoid>{});
    case Act::leaky_relu: return fn(std::integral_constant<Act, Act::leaky_relu>{});
  }
}

// -- Philox4x32-10; the stream is defined in fastadapt/ops/dropout.py ------------------------------------------------

typedef uint64_t U64 __attribute__((vector_size(4 * FA_WIDTH)));

// The 64-bit products of the even 32-bit lanes.
FA_INLINE U64 mul_even(U a, uint32_t m) {
#if FA_WIDTH == 16
  return (U64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif FA_WIDTH == 8
  return (U64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return ((U64)a & 0xffffffffull) * (uint64_t)m;
#endif
}
FA_INLINE void mulhilo(U a, uint32_t m, U& hi, U& lo) {
  U64 even = mul_even(a, m), odd = mul_even((U)((U64)a >> 32), m);
  constexpr uint64_t high = 0xffffffff00000000ull;
  lo = (U)((even & ~high) | (odd << 32));
  hi = (U)((even >> 32) | (odd & high));
}
// The 64 keep bytes (-1 kept, 0 dropped) of an aligned block; block = element index / 64.
FA_INLINE void keep_block(uint64_t block, const Dropout& d, int8_t* keep) {
  const uint32_t limit = (uint32_t)d.threshold;
  for (int part = 0; part < 16 / W; ++part) {
    U c0, c1, c2 = U{}, c3 = U{};
    uint64_t first = block * 16 + (uint64_t)(part * W);
    for (int i = 0; i < W; ++i) c0[i] = i;
    c0 += (uint32_t)first;  // 16 divides 2^32: no carry inside a block
    c1 = U{} + (uint32_t)(first >> 32);
    uint32_t k0 = (uint32_t)d.seed, k1 = (uint32_t)(d.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      U hi0, lo0, hi1, lo1;
      mulhilo(c0, 0xD2511F53u, hi0, lo0);
      mulhilo(c2, 0xCD9E8D57u, hi1, lo1);
      c0 = hi1 ^ c1 ^ k0;
      c1 = lo1;
      c2 = hi0 ^ c3 ^ k1;
      c3 = lo0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    U words[4] = {c0, c1, c2, c3};
    for (int w = 0; w < 4; ++w) {
      I8 k = __builtin_convertvector((I)(words[w] >= limit), I8);
      std::memcpy(keep + 16 * w + part * W, &k, W);
    }
  }
}
// The keep bytes of one row of `cols` elements; `keep` has room for cols rounded up to 64.
inline void keep_row(int64_t row, int64_t cols, const Dropout& d, int8_t* keep) {
  const int64_t blocks = (cols + 63) / 64;
  if (d.threshold > 0xffffffffull) { std::memset(keep, 0, blocks * 64); return; }
  for (int64_t i = 0; i < blocks; ++i) keep_block((uint64_t)(row * blocks + i), d, keep + 64 * i);
}
FA_INLINE F dropped(F v, const int8_t* keep, float keep_scale) {
  I8 k;
  std::memcpy(&k, keep, W);
  I mask = __builtin_convertvector(k, I);
  return (F)(bits(v * keep_scale) & (U)mask);
}

// dst[c * ldd + r] = src[r * lds + c] for a rows x cols matrix, four by four.
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
inline void transpose(const float* src, int64_t lds, int64_t rows, int64_t cols, float* dst, int64_t ldd) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= cols; c += 4) {
      F4 a, b, d, e;
      std::memcpy(&a, src + r * lds + c, 16);
      std::memcpy(&b, src + (r + 1) * lds + c, 16);
      std::memcpy(&d, src + (r + 2) * lds + c, 16);
      std::memcpy(&e, src + (r + 3) * lds + c, 16);
      F4 ab_lo = __builtin_shuffle(a, b, I4{0, 4, 1, 5}), ab_hi = __builtin_shuffle(a, b, I4{2, 6, 3, 7});
      F4 de_lo = __builtin_shuffle(d, e, I4{0, 4, 1, 5}), de_hi = __builtin_shuffle(d, e, I4{2, 6, 3, 7});
      F4 o0 = __builtin_shuffle(ab_lo, de_lo, I4{0, 1, 4, 5}), o1 = __builtin_shuffle(ab_lo, de_lo, I4{2, 3, 6, 7});
      F4 o2 = __builtin_shuffle(ab_hi, de_hi, I4{0, 1, 4, 5}), o3 = __builtin_shuffle(ab_hi, de_hi, I4{2, 3, 6, 7});
      std::memcpy(dst + c * ldd + r, &o0, 16);
      std::memcpy(dst + (c + 1) * ldd + r, &o1, 16);
      std::memcpy(dst + (c + 2) * ldd + r, &o2, 16);
      std::memcpy(dst + (c + 3) * ldd + r, &o3, 16);
    }
    for (; c < cols; ++c)
      for (int64_t i = r; i < r + 4; ++i) dst[c * ldd + i] = src[i * lds + c];
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) dst[c * ldd + r] = src[r * lds + c];
}

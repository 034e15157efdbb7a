// Vectors of FA_WIDTH floats in the compiler's own vector types, so that one source serves every instruction set.
typedef float F __attribute__((vector_size(4 * FA_WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * FA_WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * FA_WIDTH)));
typedef uint16_t U16 __attribute__((vector_size(2 * FA_WIDTH)));
typedef int8_t I8 __attribute__((vector_size(FA_WIDTH)));
typedef uint16_t bf16;

#define FA_INLINE inline __attribute__((always_inline))

constexpr int W = FA_WIDTH;

FA_INLINE F set1(float v) { return v - F{}; }  // v + 0 would be an addition: it makes -0 another value
FA_INLINE F load(const float* p) { F v; std::memcpy(&v, p, sizeof v); return v; }
FA_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
FA_INLINE U bits(F v) { return (U)v; }

// GCC converts between vectors of words and of narrower integers in halves or lane by lane, hence the instructions.
FA_INLINE U widened(U16 h) {
#if FA_WIDTH == 16
  return (U)_mm512_cvtepu16_epi32((__m256i)h);
#else
  return __builtin_convertvector(h, U);
#endif
}
FA_INLINE F load(const bf16* p) {
  U16 h;
  std::memcpy(&h, p, sizeof h);
  return (F)(widened(h) << 16);
}
// Round to nearest even, into the upper half; the lower one is undefined. A NaN stays a quiet NaN.
FA_INLINE U round_up_bits(F v) {
#if FA_WIDTH == 16
  // A NaN becomes the one whose lower half is zero, so that no carry runs through it.
  const __m512i u = _mm512_castps_si512(_mm512_fixupimm_ps((__m512)v, (__m512)v, _mm512_set1_epi32(0x33), 0));
  const __m512i up = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  return (U)_mm512_mask_add_epi32(up, _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000)), up, _mm512_set1_epi32(1));
#else
  const U u = bits(v);
  return (v == v) ? u + (0x7fffu + ((u >> 16) & 1u)) : u | 0x400000u;
#endif
}
FA_INLINE U round_bf16_bits(F v) { return round_up_bits(v) >> 16; }
FA_INLINE void store(bf16* p, F v) {
#if FA_BF16 == 1 || FA_BF16 == 2
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);  // to nearest even as well; denormals become zero
#else
#if FA_WIDTH == 16
  U16 h = (U16)_mm512_cvtepi32_epi16((__m512i)round_bf16_bits(v));
#else
  U16 h = __builtin_convertvector(round_bf16_bits(v), U16);
#endif
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

// 32 values of a row.
constexpr int kNV = 32 / W;
#if FA_WIDTH == 16
typedef uint16_t Halves __attribute__((vector_size(64)));
#endif
FA_INLINE void store_row(float* p, const F (&v)[kNV]) {
#pragma GCC unroll 8
  for (int i = 0; i < kNV; ++i) store(p + i * W, v[i]);
}
FA_INLINE void store_row(bf16* p, const F (&v)[kNV]) {
#if FA_BF16 == 1 || FA_BF16 == 2
  const __m512bh h = _mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
  std::memcpy(p, &h, sizeof h);
#elif FA_WIDTH == 16
  constexpr Halves upper = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                            33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i first = (__m512i)round_up_bits(v[0]), second = (__m512i)round_up_bits(v[1]);
  const __m512i h = _mm512_permutex2var_epi16(first, (__m512i)upper, second);
  std::memcpy(p, &h, sizeof h);
#else
#pragma GCC unroll 8
  for (int i = 0; i < kNV; ++i) store(p + i * W, v[i]);
#endif
}
// 32 columns as words of two bfloat16, an even column in the low half and the odd one after it in the high half. Apart they
// are a shift and a mask; in the order of memory each half takes a conversion.
constexpr int kWordVectors = kNV / 2;
FA_INLINE U load_words(const bf16* p) { U v; std::memcpy(&v, p, sizeof v); return v; }
FA_INLINE void store_words(bf16* p, U v) { std::memcpy(p, &v, sizeof v); }
FA_INLINE F even(U words) { return (F)(words << 16); }
FA_INLINE F odd(U words) { return (F)(words & 0xffff0000u); }
FA_INLINE U joined(F even, F odd) {
#if FA_BF16 == 1 || FA_BF16 == 2
  constexpr Halves order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (U)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
  return (round_up_bits(even) >> 16) | (round_up_bits(odd) & 0xffff0000u);
#endif
}
// sums + even(a) even(b) + odd(a) odd(b)
FA_INLINE F add_dots(F sums, U a, U b) {
#if FA_BF16 == 1 || FA_BF16 == 2
  return (F)_mm512_dpbf16_ps((__m512)sums, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
  return sums + even(a) * even(b) + odd(a) * odd(b);
#endif
}
// Lanes 2 i + start of a and b one after another, and lanes of a and b by turns, of their first or second halves.
FA_INLINE F every_second(F a, F b, int start) {
  I lanes = {};
  for (int i = 0; i < W; ++i) lanes[i] = 2 * i + start;
  return __builtin_shuffle(a, b, lanes);
}
FA_INLINE F by_turns(F a, F b, int half) {
  I lanes = {};
  for (int i = 0; i < W; ++i) lanes[i] = i / 2 + half * (W / 2) + i % 2 * W;
  return __builtin_shuffle(a, b, lanes);
}
// 32 columns from the order of memory to "16 even, 16 odd", and back.
FA_INLINE void parted(const F (&from)[kNV], F (&to)[kNV]) {
#pragma GCC unroll 8
  for (int i = 0; i < kNV; ++i) {
    const int first = i % kWordVectors * 2;
    to[i] = every_second(from[first], from[first + 1], i / kWordVectors);
  }
}
FA_INLINE void unparted(const F (&from)[kNV], F (&to)[kNV]) {
#pragma GCC unroll 8
  for (int i = 0; i < kNV; ++i) to[i] = by_turns(from[i / 2], from[i / 2 + kWordVectors], i % 2);
}

// store_row past the caches, for a result too large to be found there again: a store that misses them brings its line
// first, and everything waits for it. Whole lines only.
constexpr int64_t kStreamed = int64_t{8} << 20;
#if FA_WIDTH == 16
FA_INLINE bool streams(const void* p, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kStreamed && row_bytes % 64 == 0 && (uintptr_t)p % 64 == 0;
}
FA_INLINE void stream_row(float* p, const F (&v)[kNV]) {
  _mm512_stream_ps(p, (__m512)v[0]);
  _mm512_stream_ps(p + W, (__m512)v[1]);
}
FA_INLINE void stream_row(bf16* p, const F (&v)[kNV]) {
  bf16 row[32];
  store_row(row, v);
  __m512i line;
  std::memcpy(&line, row, sizeof line);
  _mm512_stream_si512((__m512i*)p, line);
}
FA_INLINE void stream(float* p, F v) { _mm512_stream_ps(p, (__m512)v); }
FA_INLINE void stream_words(bf16* p, U v) { _mm512_stream_si512((__m512i*)p, (__m512i)v); }
FA_INLINE void end_of_stream() { _mm_sfence(); }
#else
FA_INLINE bool streams(const void*, int64_t, int64_t) { return false; }
template <class T>
FA_INLINE void stream_row(T* p, const F (&v)[kNV]) { store_row(p, v); }
FA_INLINE void stream(float* p, F v) { store(p, v); }
FA_INLINE void stream_words(bf16* p, U v) { store_words(p, v); }
FA_INLINE void end_of_stream() {}
#endif

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
  return (F)(widened((U16)_mm512_cvtneps_pbh((__m512)v)) << 16);
#else
  return (F)(round_up_bits(v) & 0xffff0000u);
#endif
}

FA_INLINE float sum(F v) {
#if FA_WIDTH == 16
  return _mm512_reduce_add_ps((__m512)v);  // halves onto each other, as below
#endif
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
FA_INLINE U8 low_bytes(U v) {
#if FA_WIDTH == 16
  return (U8)_mm512_cvtepi32_epi8((__m512i)v);
#elif FA_WIDTH == 8
  const __m256i each = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(each), _mm256_extracti128_si256(each, 1));
  U8 bytes;
  std::memcpy(&bytes, &both, sizeof bytes);
  return bytes;
#else
  return __builtin_convertvector(v & 0xffu, U8);
#endif
}
FA_INLINE I of_bytes(U8 v) {
#if FA_WIDTH == 16
  return (I)_mm512_cvtepu8_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, I);
#endif
}
FA_INLINE void store_code(uint8_t* p, F d, int64_t n) {
  // Adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  const F shifted = min(max(d * 202.0f + 26.0f, F{}), set1(255.0f)) + 12582912.0f;
  const U8 code = low_bytes(bits(shifted));
  std::memcpy(p, &code, (size_t)std::min<int64_t>(W, n));
}
FA_INLINE F load_code(const uint8_t* p, int64_t n) {
  U8 code = U8{};
  std::memcpy(&code, p, (size_t)std::min<int64_t>(W, n));
  return (__builtin_convertvector(of_bytes(code), F) - 26.0f) * (1.0f / 202.0f);
}

#if FA_WIDTH == 16
// GELU for results in bfloat16, from tables over |x| < 5.25 that csrc/cpu/fit_gelu.py makes: two registers hold one
// power's 32 coefficients. 1 - Phi has a relative error below 2^-12; a NaN comes through.
constexpr float kGeluTail[4][32] = {
    {0.50000002f, 0.43484104f, 0.37140868f, 0.31129353f, 0.25583179f, 0.20601913f, 0.1624657f, 0.12539409f,
     0.094675805f, 0.069896506f, 0.050437644f, 0.035561779f, 0.024490869f, 0.016470013f, 0.010812907f,
     0.0069286838f, 0.004332412f, 0.0026430131f, 0.0015728493f, 0.0009129095f, 0.00051672795f, 0.00028519116f,
     0.00015346213f, 8.0503162e-05f, 4.1165239e-05f, 2.0517159e-05f, 9.9664095e-06f, 4.7180653e-06f, 2.1765279e-06f,
     9.7839276e-07f, 4.2853527e-07f, 1.8287814e-07f},
    {-0.065452119f, -0.064578611f, -0.062024476f, -0.057989106f, -0.0527762f, -0.04675604f, -0.040322248f, -0.03385f,
     -0.027661714f, -0.022004195f, -0.017038738f, -0.012843236f, -0.0094235852f, -0.0067307287f, -0.0046796332f,
     -0.003167123f, -0.0020865127f, -0.0013380728f, -0.00083529641f, -0.0005075786f, -0.00030023923f,
     -0.00017287517f, -9.6894364e-05f, -5.2864577e-05f, -2.8075727e-05f, -1.4514328e-05f, -7.3040237e-06f,
     -3.5778854e-06f, -1.7060407e-06f, -7.9186419e-07f, -3.5777509e-07f, -1.5735019e-07f},
    {2.8413347e-06f, 0.00087908077f, 0.0016852751f, 0.0023609336f, 0.0028622593f, 0.0031666643f, 0.0032737143f,
     0.0032026587f, 0.0029873582f, 0.002669834f, 0.0022937453f, 0.0018988913f, 0.0015174341f, 0.0011720667f,
     0.00087594556f, 0.00063392898f, 0.00044455994f, 0.0003022606f, 0.00019933762f, 0.00012756072f, 7.9232437e-05f,
     4.7782137e-05f, 2.7983781e-05f, 1.5918926e-05f, 8.7976095e-06f, 4.7241842e-06f, 2.4652441e-06f, 1.2503081e-06f,
     6.1637559e-07f, 2.9538434e-07f, 1.3761989e-07f, 6.2339178e-08f},
    {0.0002902498f, 0.00026712835f, 0.00022401031f, 0.00016639139f, 0.00010126279f, 3.5936922e-05f, -2.3078595e-05f,
     -7.0940931e-05f, -0.00010493127f, -0.00012448389f, -0.00013085244f, -0.00012654574f, -0.0001146865f,
     -9.8428392e-05f, -8.0522101e-05f, -6.3066961e-05f, -4.7437865e-05f, -3.4345654e-05f, -2.3976726e-05f,
     -1.6160739e-05f, -1.0528056e-05f, -6.6347557e-06f, -4.0476133e-06f, -2.3918095e-06f, -1.3696939e-06f,
     -7.6045517e-07f, -4.0948194e-07f, -2.1391621e-07f, -1.0844755e-07f, -5.3366372e-08f, -2.5496468e-08f,
     -1.1828753e-08f},
};
constexpr float kGeluCode[3][32] = {
    {-0.0073134329f, 26.200076f, 51.027059f, 73.254692f, 91.960805f, 106.60464f, 117.05076f, 123.53396f, 126.57784f,
     126.88676f, 125.23304f, 122.35805f, 118.89981f, 115.35219f, 112.05381f, 109.2004f, 106.87155f, 105.06358f,
     103.72141f, 102.76518f, 102.10967f, 101.67649f, 101.40011f, 101.22968f, 101.12801f, 101.06928f, 101.03642f,
     101.0186f, 101.00923f, 101.00445f, 101.00209f, 101.00095f},
    {26.574336f, 25.855858f, 23.798622f, 20.643663f, 16.745487f, 12.513546f, 8.3492217f, 4.5908637f, 1.476385f,
     -0.87205634f, -2.4420894f, -3.3089691f, -3.6046364f, -3.4855718f, -3.1054416f, -2.5960214f, -2.0572776f,
     -1.5554505f, -1.1268108f, -0.78447298f, -0.5260023f, -0.34024921f, -0.21259938f, -0.12844648f, -0.07509873f,
     -0.042519094f, -0.023324809f, -0.012403323f, -0.0063961202f, -0.0031996459f, -0.0015531812f, -0.00073179418f},
    {-0.35318633f, -1.0175655f, -1.5632942f, -1.9340409f, -2.1022647f, -2.0715183f, -1.872572f, -1.5548314f,
     -1.1754738f, -0.78892969f, -0.43883155f, -0.15359586f, 0.054257971f, 0.18580825f, 0.25167986f, 0.26752393f,
     0.25004417f, 0.21415718f, 0.17144389f, 0.1297251f, 0.093421847f, 0.064328936f, 0.042492765f, 0.02699076f,
     0.016515685f, 0.0097493357f, 0.0055582864f, 0.0030633207f, 0.0016332702f, 0.00084297003f, 0.00042139271f,
     0.00020411795f},
};
struct Segment {
  I index;
  F place;
};
FA_INLINE Segment gelu_segment(F a) {
  const F s = a * (32.0f / 5.25f);
  const F inside = s > 31.999f ? set1(31.999f) : s;  // a NaN stays
  const I index = __builtin_convertvector(inside, I);
  return {index & 31, inside - __builtin_convertvector(index, F)};
}
FA_INLINE F from_table(const float (&row)[32], I index) { return __builtin_shuffle(load(row), load(row + 16), index); }
FA_INLINE F gelu_from(F x, F a, const Segment& s) {
  F q = from_table(kGeluTail[3], s.index);
  q = q * s.place + from_table(kGeluTail[2], s.index);
  q = q * s.place + from_table(kGeluTail[1], s.index);
  q = q * s.place + from_table(kGeluTail[0], s.index);
  return (x < 0.0f ? F{} : x) - a * q;
}
FA_INLINE F gelu_bf16(F x) {
  const F a = abs(x);
  return gelu_from(x, a, gelu_segment(a));
}
// GELU and, in `code`, its derivative as store_code has it.
FA_INLINE F gelu_bf16_with_code(F x, uint8_t* code) {
  const F a = abs(x);
  const Segment s = gelu_segment(a);
  F e = from_table(kGeluCode[2], s.index);
  e = e * s.place + from_table(kGeluCode[1], s.index);
  e = e * s.place + from_table(kGeluCode[0], s.index);
  // 127 + e for x above zero, 127 - e below; adding 1.5 * 2^23 leaves the rounded integer in the low bits.
  const F shifted = (F)(bits(e) ^ (bits(x) & 0x80000000u)) + (12582912.0f + 127.0f);
  const U8 byte = low_bytes(bits(shifted));
  std::memcpy(code, &byte, W);
  return gelu_from(x, a, s);
}
#endif

// act(x) for a result that is rounded to T.
template <class T, Act A>
FA_INLINE F act_as(F x) {
#if FA_WIDTH == 16
  if constexpr (A == Act::gelu && std::is_same_v<T, bf16>) return gelu_bf16(x);
#endif
  return act<A>(x);
}
// The same, with act' in a byte.
template <class T, Act A>
FA_INLINE F act_with_code(F x, uint8_t* code) {
#if FA_WIDTH == 16
  if constexpr (A == Act::gelu && std::is_same_v<T, bf16>) return gelu_bf16_with_code(x, code);
#endif
  store_code(code, d_act<A>(x), W);
  return act<A>(x);
}

// fn(std::integral_constant<Act, a>) for the a at run time; what it gives back has one type for all.
template <class Fn>
FA_INLINE auto for_act(Act a, Fn&& fn) {
  switch (a) {
    case Act::none: break;
    case Act::relu: return fn(std::integral_constant<Act, Act::relu>{});
    case Act::gelu: return fn(std::integral_constant<Act, Act::gelu>{});
    case Act::gelu_new: return fn(std::integral_constant<Act, Act::gelu_new>{});
    case Act::silu: return fn(std::integral_constant<Act, Act::silu>{});
    case Act::tanh: return fn(std::integral_constant<Act, Act::tanh>{});
    case Act::sigmoid: return fn(std::integral_constant<Act, Act::sigmoid>{});
    case Act::leaky_relu: return fn(std::integral_constant<Act, Act::leaky_relu>{});
  }
  return fn(std::integral_constant<Act, Act::none>{});
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
// One round of the even or the odd counters of a vector, in 64-bit lanes of which only the low half counts.
FA_INLINE void philox_round(U64& c0, U64& c1, U64& c2, U64& c3, uint32_t k0, uint32_t k1) {
  const U64 a = mul_even((U)c0, 0xD2511F53u), b = mul_even((U)c2, 0xCD9E8D57u);
  c0 = (b >> 32) ^ c1 ^ (uint64_t)k0;
  c1 = b;
  c2 = (a >> 32) ^ c3 ^ (uint64_t)k1;
  c3 = a;
}
// The 64 keep bytes (-1 kept, 0 dropped) of an aligned block; block = element index / 64.
FA_INLINE void keep_block(uint64_t block, const Dropout& d, int8_t* keep) {
  const uint32_t limit = (uint32_t)d.threshold;
  for (int part = 0; part < 16 / W; ++part) {
    const uint64_t first = block * 16 + (uint64_t)(part * W);  // 16 divides 2^32: no carry inside a block
    U64 even[4] = {}, odd[4] = {};
    for (int i = 0; i < W / 2; ++i) {
      even[0][i] = (uint32_t)first + 2 * i;
      odd[0][i] = (uint32_t)first + 2 * i + 1;
    }
    even[1] += first >> 32;
    odd[1] += first >> 32;
    uint32_t k0 = (uint32_t)d.seed, k1 = (uint32_t)(d.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      philox_round(even[0], even[1], even[2], even[3], k0, k1);
      philox_round(odd[0], odd[1], odd[2], odd[3], k0, k1);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    for (int w = 0; w < 4; ++w) {
      const U words = (U)((even[w] & 0xffffffffull) | (odd[w] << 32));
#if FA_WIDTH == 16
      const __mmask16 kept = _mm512_cmpge_epu32_mask((__m512i)words, _mm512_set1_epi32((int)limit));
      _mm_storeu_si128((__m128i*)(keep + 16 * w), _mm_movm_epi8(kept));
#else
      const I8 kept = __builtin_convertvector((I)(words >= limit), I8);
      std::memcpy(keep + 16 * w + part * W, &kept, W);
#endif
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
#if FA_WIDTH == 16
  const __mmask16 kept = _mm_movepi8_mask(_mm_loadu_si128((const __m128i*)keep));
  return (F)_mm512_maskz_mul_ps(kept, (__m512)v, _mm512_set1_ps(keep_scale));
#else
  I8 k;
  std::memcpy(&k, keep, W);
  I mask = __builtin_convertvector(k, I);
  return (F)(bits(v * keep_scale) & (U)mask);
#endif
}

// The same for 2 W columns that stand apart, even ones in `evens`.
FA_INLINE void drop_parted(F& evens, F& odds, const int8_t* keep, float keep_scale) {
#if FA_WIDTH == 16
  const uint32_t kept = _mm256_movepi8_mask(_mm256_loadu_si256((const __m256i*)keep));
  const __m512 factor = _mm512_set1_ps(keep_scale);
  evens = (F)_mm512_maskz_mul_ps((__mmask16)_pext_u32(kept, 0x55555555u), (__m512)evens, factor);
  odds = (F)_mm512_maskz_mul_ps((__mmask16)_pext_u32(kept, 0xaaaaaaaau), (__m512)odds, factor);
#else
  int8_t halves[2][W];
  for (int i = 0; i < 2 * W; ++i) halves[i % 2][i / 2] = keep[i];
  evens = dropped(evens, halves[0], keep_scale);
  odds = dropped(odds, halves[1], keep_scale);
#endif
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

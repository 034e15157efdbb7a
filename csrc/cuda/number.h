// Numbers of the three types as their bits, sixteen bytes of them at a time; activations; the dropout mask. Sums and
// products that have to come out the same to the bit go through add, multiply and fma, which nothing contracts.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/block.h"

namespace fastadapt::cuda {

enum class Type : int32_t { f32, bf16, f16 };

#if defined(__CUDACC__)
using Vector = uint4;
#else
struct alignas(16) Vector {
  uint32_t x, y, z, w;
};
#endif

FA_DEVICE float as_float(uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}
FA_DEVICE uint32_t as_bits(float value) {
#if defined(__CUDACC__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

// The same pointer, known to point to device memory: one that was read from a table could point anywhere, and the
// accesses through it would be generic ones.
template <class T>
FA_DEVICE T* global(T* p) {
#if defined(__CUDACC__)
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

FA_DEVICE float add(float a, float b) {
#if defined(__CUDACC__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
FA_DEVICE float multiply(float a, float b) {
#if defined(__CUDACC__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
FA_DEVICE float fma(float a, float b, float c) {
#if defined(__CUDACC__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
FA_DEVICE bool finite(float x) { return (as_bits(x) & 0x7f800000u) != 0x7f800000u; }

// How numbers are stored: `value` of a word's bits, `narrow` back to them, to nearest even.
struct Single {
  using Word = uint32_t;
  static constexpr Type kType = Type::f32;
  static FA_DEVICE float value(uint32_t bits) { return as_float(bits); }
  static FA_DEVICE uint32_t narrow(float x) { return as_bits(x); }
};
struct Brain {
  using Word = uint16_t;
  static constexpr Type kType = Type::bf16;
  static FA_DEVICE float value(uint32_t bits) { return as_float(bits << 16); }
  static FA_DEVICE uint32_t narrow(float x) {
#if defined(__CUDACC__)
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const uint32_t bits = as_bits(x);
    return x != x ? 0x7fffu : (bits + (0x7fffu + ((bits >> 16) & 1u))) >> 16;
#endif
  }
};
struct Half {
  using Word = uint16_t;
  static constexpr Type kType = Type::f16;
  static FA_DEVICE float value(uint32_t bits) {
#if defined(__CUDACC__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
    return x;
#else
    const uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
    const float scaled = as_float(magnitude) * 0x1p112f;  // exact, for denormals too
    return as_float((magnitude >= 0x0f800000u ? (as_bits(scaled) | 0x7f800000u) : as_bits(scaled)) | sign);
#endif
  }
  static FA_DEVICE uint32_t narrow(float x) {
#if defined(__CUDACC__)
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const uint32_t u = as_bits(x) & 0x7fffffffu, sign = (as_bits(x) >> 16) & 0x8000u;
    if (u > 0x7f800000u) return 0x7fffu;
    if (u >= 0x477ff000u) return 0x7c00u | sign;
    if (u < 0x38800000u) return (as_bits(as_float(u) + 0.5f) - 0x3f000000u) | sign;  // to a multiple of 2^-24
    return ((u + (0xfffu + ((u >> 13) & 1u)) - 0x38000000u) >> 13) | sign;
#endif
  }
};

// x as the type would store it.
template <class Store>
FA_DEVICE float rounded(float x) {
  return Store::value(Store::narrow(x));
}

// One number of any of the types.
FA_DEVICE float load_float(Type type, const void* p, int64_t i) {
  if (type == Type::f32) return global(static_cast<const float*>(p))[i];
  const uint32_t bits = global(static_cast<const uint16_t*>(p))[i];
  return type == Type::bf16 ? Brain::value(bits) : Half::value(bits);
}

template <class Store>
constexpr int kInVector = 16 / sizeof(typename Store::Word);

// Word i of a vector; i is known when the code is compiled.
template <class Store>
FA_DEVICE uint32_t word(const Vector& v, int i) {
  if constexpr (sizeof(typename Store::Word) == 4) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
  } else {
    const uint32_t pair = i < 2 ? v.x : i < 4 ? v.y : i < 6 ? v.z : v.w;
    return i % 2 ? pair >> 16 : pair & 0xffffu;
  }
}
template <class Store>
FA_DEVICE Vector packed(const uint32_t (&words)[kInVector<Store>]) {
  if constexpr (sizeof(typename Store::Word) == 4)
    return Vector{words[0], words[1], words[2], words[3]};
  else
    return Vector{words[0] | words[1] << 16, words[2] | words[3] << 16, words[4] | words[5] << 16,
                  words[6] | words[7] << 16};
}

// A vector whose first n words exist, the others zero; in one access where the address is a multiple of 16 bytes.
template <class Store>
FA_DEVICE Vector load_vector(const typename Store::Word* p, bool aligned, int64_t n) {
  if (n <= 0) return Vector{0, 0, 0, 0};
  if (aligned && n >= kInVector<Store>) return *global(reinterpret_cast<const Vector*>(p));
  uint32_t words[kInVector<Store>];
FA_UNROLL
  for (int i = 0; i < kInVector<Store>; ++i) words[i] = i < n ? global(p)[i] : 0u;
  return packed<Store>(words);
}
template <class Store>
FA_DEVICE void store_vector(typename Store::Word* p, const Vector& v, bool aligned, int64_t n) {
  if (n <= 0) return;
  if (aligned && n >= kInVector<Store>) {
    *global(reinterpret_cast<Vector*>(p)) = v;
    return;
  }
FA_UNROLL
  for (int i = 0; i < kInVector<Store>; ++i)
    if (i < n) global(p)[i] = static_cast<typename Store::Word>(word<Store>(v, i));
}

// -- activations: fastadapt/ops/activations.py --------------------------------------------------------------------

enum class Activation : int32_t { none, relu, gelu, gelu_new, silu, tanh, sigmoid, leaky_relu };

FA_DEVICE float activate(Activation name, float x) {
  switch (name) {
    case Activation::relu: return x > 0.0f || x != x ? x : 0.0f;  // NaN stays NaN
    case Activation::gelu: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::gelu_new: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::tanh: return tanhf(x);
    case Activation::sigmoid: return 1.0f / (1.0f + expf(-x));
    case Activation::leaky_relu: return x > 0.0f ? x : 0.01f * x;
    default: return x;
  }
}

// -- dropout: the mask of fastadapt/ops/dropout.py ----------------------------------------------------------------

struct Dropout {
  const int64_t* seed;  // null: nothing is dropped
  uint64_t threshold;   // words from here on are kept
  float factor;         // 1 / (1 - p); 0 at p = 1
};

// Word `which` of Philox4x32-10 at a counter below 2^64.
FA_DEVICE uint32_t philox(uint64_t seed, uint64_t counter, int which) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
FA_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return which == 0 ? c0 : which == 1 ? c1 : which == 2 ? c2 : c3;
}
FA_DEVICE float drop(const Dropout& d, float x, int64_t row, int64_t column, int64_t columns) {
  if (d.seed == nullptr) return x;
  const uint64_t e = static_cast<uint64_t>(row * ((columns + 63) / 64 * 64) + column);
  const uint32_t found = philox(static_cast<uint64_t>(*d.seed), (e >> 6) * 16 + (e & 15), static_cast<int>(e >> 4 & 3));
  return found >= d.threshold ? x * d.factor : 0.0f;  // a select: a dropped infinity leaves no NaN
}

}  // namespace fastadapt::cuda

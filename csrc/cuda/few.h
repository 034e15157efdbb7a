// Forward of the bottleneck and of add + LayerNorm for few rows, where launches and not bytes decide: all in one launch,
// R rows a block, products in float32 with the rows in shared memory.
//
//   z = x W_down^T + b_down,  a = act(z),  s = drop(scale (a W_up^T + b_up)) + [x if skip] + [residual],  y = LN(s) or s
//
// z, a and s are rounded to the compute type once, as eager code does; statistics are taken of the rounded s.
#pragma once
#include "cuda/kernels.h"

namespace fastadapt::cuda {

FA_DEVICE int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// What a thread keeps while a product goes on: its sums and its share of the matrix's next piece.
template <int R>
struct FewSums {
  static constexpr int kVectors = kPieceBytes / 16;
  float sum[R];
  Vector next[kVectors];
};

// emit(n, r, sum over k of v[r][k] m[n][k]) for every n < outputs and r < R.
//
// The matrix goes through shared memory in pieces of N rows by kFewThreads / N x kPieceBytes: thread t multiplies
// kPieceBytes of row t % N. v is shared, [R][stride], zero from k = inner to the end of the last piece. stage is shared,
// kStageBytes; rows of a piece are 16 bytes longer than they hold, so that neighbours lie in different banks.
template <class Store, int R, int N, class Block, class Emit>
FA_DEVICE void product(const Block& block, const void* matrix, int64_t outputs, int64_t inner, bool aligned,
                       const float* v, int64_t stride, char* stage, Emit&& emit) {
  using Word = typename Store::Word;
  constexpr int V = kInVector<Store>, kVectors = FewSums<R>::kVectors, kSlices = kFewThreads / N;
  constexpr int kPiece = kPieceBytes / static_cast<int>(sizeof(Word)), kDepth = kSlices * kPiece;
  constexpr int kAcross = kSlices * kVectors;  // vectors in a row of a piece
  constexpr int kRowBytes = kAcross * 16 + 16;
  const auto* m = static_cast<const Word*>(matrix);
  typename Block::template Local<FewSums<R>> sums(block);

  // Vector j of a thread: neighbours read neighbouring addresses.
  auto fetch = [&](int thread, int64_t n0, int64_t k0) {
FA_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      const int i = thread + j * kFewThreads;
      const int64_t n = n0 + i / kAcross, k = k0 + i % kAcross * V;
      sums[thread].next[j] = load_vector<Store>(m + n * inner + k, aligned, n < outputs ? inner - k : 0);
    }
  };
  for (int64_t n0 = 0; n0 < outputs; n0 += N) {
    block.each([&](int thread) {
FA_UNROLL
      for (int r = 0; r < R; ++r) sums[thread].sum[r] = 0.0f;
      fetch(thread, n0, 0);
    });
    for (int64_t k0 = 0; k0 < inner; k0 += kDepth) {
      block.each([&](int thread) {
FA_UNROLL
        for (int j = 0; j < kVectors; ++j) {
          const int i = thread + j * kFewThreads;
          *reinterpret_cast<Vector*>(stage + i / kAcross * kRowBytes + i % kAcross * 16) = sums[thread].next[j];
        }
      });
      block.each([&](int thread) {
        if (k0 + kDepth < inner) fetch(thread, n0, k0 + kDepth);
        const int n = thread % N, slice = thread / N;
        const float* values = v + k0 + slice * kPiece;
FA_UNROLL
        for (int j = 0; j < kVectors; ++j) {
          const Vector w = *reinterpret_cast<const Vector*>(stage + n * kRowBytes + (slice * kVectors + j) * 16);
FA_UNROLL
          for (int r = 0; r < R; ++r)
FA_UNROLL
            for (int i = 0; i < V; i += 4) {
              const Vector four = *reinterpret_cast<const Vector*>(values + r * stride + j * V + i);
              float sum = sums[thread].sum[r];
              sum = fma(as_float(four.x), Store::value(word<Store>(w, i)), sum);
              sum = fma(as_float(four.y), Store::value(word<Store>(w, i + 1)), sum);
              sum = fma(as_float(four.z), Store::value(word<Store>(w, i + 2)), sum);
              sums[thread].sum[r] = fma(as_float(four.w), Store::value(word<Store>(w, i + 3)), sum);
            }
        }
      });
    }
    auto* parts = reinterpret_cast<float*>(stage);  // [kSlices][R][N]
    block.each([&](int thread) {
FA_UNROLL
      for (int r = 0; r < R; ++r) parts[(thread / N * R + r) * N + thread % N] = sums[thread].sum[r];
    });
    block.each([&](int thread) {
      for (int i = thread; i < N * R; i += kFewThreads) {
        float total = parts[i];
        for (int slice = 1; slice < kSlices; ++slice) total = add(total, parts[slice * R * N + i]);
        if (n0 + i % N < outputs) emit(n0 + i % N, i / N, total);
      }
    });
  }
}

// The R rows from `row` on as floats in shared memory, [R][stride], zero where there is nothing.
template <class Store, int R, class Block>
FA_DEVICE void load_rows(const Block& block, const void* x, int64_t row, int64_t rows, int64_t hidden, bool aligned,
                         float* out, int64_t stride) {
  constexpr int V = kInVector<Store>;
  const auto* from = static_cast<const typename Store::Word*>(x);
  block.each([&](int thread) {
    for (int64_t i = thread; i < R * stride / V; i += kFewThreads) {
      const int64_t r = i / (stride / V), k = i % (stride / V) * V;
      const Vector v = load_vector<Store>(from + (row + r) * hidden + k, aligned, row + r < rows ? hidden - k : 0);
FA_UNROLL
      for (int j = 0; j < V; ++j) out[r * stride + k + j] = Store::value(word<Store>(v, j));
    }
  });
}

// Every row's sum over the columns of of(thread, r, column), in one order; parts is shared, [R][kFewThreads + 16], and the sums
// lie at parts[r * (kFewThreads + 16) + kFewThreads] to + 15, to be added up in order.
template <int R, class Block, class Of>
FA_DEVICE void sum_rows(const Block& block, int64_t hidden, float* parts, Of&& of) {
  constexpr int kStride = kFewThreads + 16;
  block.each([&](int thread) {
FA_UNROLL
    for (int r = 0; r < R; ++r) {
      float sum = 0.0f;
      for (int64_t k = thread; k < hidden; k += kFewThreads) sum = add(sum, of(thread, r, k));
      parts[r * kStride + thread] = sum;
    }
  });
  block.each([&](int thread) {
    if (thread >= 16 * R) return;
    const int r = thread / 16, first = thread % 16 * (kFewThreads / 16);
    float sum = 0.0f;
FA_UNROLL
    for (int i = 0; i < kFewThreads / 16; ++i) sum = add(sum, parts[r * kStride + first + i]);
    parts[r * kStride + kFewThreads + thread % 16] = sum;
  });
}
FA_DEVICE float summed(const float* parts, int r) {
  const float* of_row = parts + r * (kFewThreads + 16) + kFewThreads;
  float sum = 0.0f;
FA_UNROLL
  for (int i = 0; i < 16; ++i) sum = add(sum, of_row[i]);
  return sum;
}

template <int R>
struct FewMeans {
  float of[R];
};

struct Norm {
  const void *weight, *bias;
  Type weight_type, bias_type;
  float eps;
};

// y = LN(s) of rows in shared memory. Sums are of s less its first column, so a large mean loses no digits.
template <class Store, int R, class Block>
FA_DEVICE void normalise(const Block& block, const float* s, int64_t stride, const Norm& norm, int64_t row,
                         int64_t rows, int64_t hidden, float* parts, void* y) {
  const float share = 1.0f / static_cast<float>(hidden);
  typename Block::template Local<FewMeans<R>> means(block);
  sum_rows<R>(block, hidden, parts, [&](int, int r, int64_t k) { return add(s[r * stride + k], -s[r * stride]); });
  block.each([&](int thread) {
FA_UNROLL
    for (int r = 0; r < R; ++r) means[thread].of[r] = summed(parts, r) * share;
  });
  sum_rows<R>(block, hidden, parts, [&](int thread, int r, int64_t k) {
    const float centred = add(add(s[r * stride + k], -s[r * stride]), -means[thread].of[r]);
    return centred * centred;
  });
  auto* out = static_cast<typename Store::Word*>(y);
  block.each([&](int thread) {
FA_UNROLL
    for (int r = 0; r < R; ++r) {
      if (row + r >= rows) continue;
      const float rstd = 1.0f / sqrtf(summed(parts, r) * share + norm.eps);
      for (int64_t k = thread; k < hidden; k += kFewThreads) {
        const float centred = add(add(s[r * stride + k], -s[r * stride]), -means[thread].of[r]);
        const float gamma = load_float(norm.weight_type, norm.weight, k);
        const float beta = load_float(norm.bias_type, norm.bias, k);
        out[(row + r) * hidden + k] =
            static_cast<typename Store::Word>(Store::narrow(centred * rstd * gamma + beta));
      }
    }
  });
}

template <class Store, int R, class Block>
FA_DEVICE void bottleneck_rows(const Block& block, const BottleneckArgs& p, int64_t number, char* shared) {
  using Word = typename Store::Word;
  const int64_t row = number * R, stride = up_to(p.hidden, 256), width = up_to(p.width, 64);
  auto* s = reinterpret_cast<float*>(shared);  // x at first
  float* a = s + R * stride;
  char* stage = reinterpret_cast<char*>(a + R * width);
  load_rows<Store, R>(block, p.x, row, p.rows, p.hidden, p.x_aligned, s, stride);
  block.each([&](int thread) {
    for (int64_t i = thread; i < R * width; i += kFewThreads) a[i] = 0.0f;
  });
  product<Store, R, 64>(block, p.w_down, p.width, p.hidden, p.down_aligned, s, stride, stage,
                        [&](int64_t n, int r, float sum) {
                          if (p.b_down) sum = add(sum, Store::value(static_cast<const Word*>(p.b_down)[n]));
                          const uint32_t z = Store::narrow(sum);
                          if (p.z && row + r < p.rows)
                            static_cast<Word*>(p.z)[(row + r) * p.width + n] = static_cast<Word>(z);
                          a[r * width + n] = rounded<Store>(activate(p.activation, Store::value(z)));
                        });
  product<Store, R, kFewThreads>(
      block, p.w_up, p.hidden, p.width, p.up_aligned, a, width, stage, [&](int64_t n, int r, float sum) {
        if (row + r >= p.rows) return;
        const int64_t at = (row + r) * p.hidden + n;
        if (p.b_up) sum = add(sum, Store::value(static_cast<const Word*>(p.b_up)[n]));
        sum *= p.scale;
        if (p.scale_vector) sum *= load_float(p.vector_type, p.scale_vector, n);
        sum = drop(p.dropout, sum, row + r, n, p.hidden);
        if (p.skip) sum = add(sum, s[r * stride + n]);
        if (p.residual) sum = add(sum, Store::value(static_cast<const Word*>(p.residual)[at]));
        const uint32_t bits = Store::narrow(sum);
        s[r * stride + n] = Store::value(bits);  // in x's place, which nobody else reads
        if (p.s) static_cast<Word*>(p.s)[at] = static_cast<Word>(bits);
        if (!p.norm_weight) static_cast<Word*>(p.y)[at] = static_cast<Word>(bits);
      });
  if (p.norm_weight)
    normalise<Store, R>(block, s, stride, {p.norm_weight, p.norm_bias, p.weight_type, p.bias_type, p.eps}, row, p.rows,
                        p.hidden, reinterpret_cast<float*>(stage), p.y);
}

template <class Store, int R, class Block>
FA_DEVICE void add_norm_rows(const Block& block, const AddNormArgs& p, int64_t number, char* shared) {
  using Word = typename Store::Word;
  const int64_t row = number * R, stride = up_to(p.hidden, 256);
  auto* s = reinterpret_cast<float*>(shared);
  load_rows<Store, R>(block, p.x, row, p.rows, p.hidden, p.x_aligned, s, stride);
  block.each([&](int thread) {
FA_UNROLL
    for (int r = 0; r < R; ++r) {
      if (row + r >= p.rows) continue;
      for (int64_t k = thread; k < p.hidden; k += kFewThreads) {
        const int64_t at = (row + r) * p.hidden + k;
        float sum = drop(p.dropout, s[r * stride + k], row + r, k, p.hidden);
        if (p.residual) sum = add(sum, Store::value(static_cast<const Word*>(p.residual)[at]));
        const uint32_t bits = Store::narrow(sum);
        s[r * stride + k] = Store::value(bits);
        if (p.s) static_cast<Word*>(p.s)[at] = static_cast<Word>(bits);
      }
    }
  });
  normalise<Store, R>(block, s, stride, {p.norm_weight, p.norm_bias, p.weight_type, p.bias_type, p.eps}, row, p.rows,
                      p.hidden, s + R * stride, p.y);
}

}  // namespace fastadapt::cuda

// Self-attention of one (batch, head) at a time: K and V of a head stay in the cache, and nothing of size S x S leaves
// it. A prefix's keys and values stand before the sequence's own. Backward makes the probabilities again from the
// log-sum-exp. Queries are taken some at a time. A matrix becomes a B operand in one of two forms: with its columns
// as k (transposed words), or with its rows (row words).

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Queries at a time. Keys and values get their parts anew for each; floats leave memory more time with few.
template <class M>
constexpr int64_t kQueries = in_parts<M> ? 64 : W == 16 && !Operand<M>::pairs ? 16 : 32;
// So a row of an A block is one piece.
static_assert(kMaxAttentionLength <= kBlock && words_of<Multiplied<float>>(kMaxAttentionLength) <= kBlock);

FA_INLINE int64_t round32(int64_t n) { return (n + 31) / 32 * 32; }

// -- words -----------------------------------------------------------------------------------------------------------

// What an A block holds of a T: elements that are multiplied in pairs, or floats.
template <class T>
using Stored = std::conditional_t<Operand<T>::pairs, T, float>;

// W elements as the low halves of words.
FA_INLINE U halves(const bf16* p) {
  U16 h;
  std::memcpy(&h, p, sizeof h);
  return widened(h);
}
// Stands for rows that are not there.
template <class S>
inline const S zeros[kMaxAttentionLength] = {};

// W words of a row of n elements, from word w on; zeros past the row. Whole: it does not end here.
template <bool Whole, class T>
FA_INLINE U words_at(const T* row, int64_t w, int64_t n) {
  constexpr int per = Operand<T>::per_word;
  if constexpr (!Operand<T>::pairs) return bits(load_n<Whole>(row + w, n - w));
  U words;
  if constexpr (Whole) {
    std::memcpy(&words, row + w * per, sizeof words);
    return words;
  }
  T buffer[W * per] = {};
  for (int64_t i = 0; i < std::min<int64_t>(W * per, n - w * per); ++i) buffer[i] = row[w * per + i];
  std::memcpy(&words, buffer, sizeof words);
  return words;
}
// Words of two rows side by side where T is multiplied in pairs, else of one; from element i on, zeros past element n.
template <class T, bool Whole, class S>
FA_INLINE U words_across(const S* even, const S* odd, int64_t i, int64_t n) {
  if constexpr (Operand<T>::pairs && Whole) return halves(even + i) | (halves(odd + i) << 16);
  const U word = bits(load_n<Whole>(even + i, n - i));
  if constexpr (Operand<T>::pairs) return (word >> 16) | bits(load_n<Whole>(odd + i, n - i));
  return word;
}

// v[i][l] and v[l][i] change places: bit by bit of the two indices.
template <int S, int... L>
FA_INLINE void exchange(U& a, U& b, std::integer_sequence<int, L...>) {
  const U low = __builtin_shuffle(a, b, U{(uint32_t)(L & S ? W + L - S : L)...});
  b = __builtin_shuffle(a, b, U{(uint32_t)(L & S ? W + L : L + S)...});
  a = low;
}
template <int S = W / 2>
FA_INLINE void transpose(U* v) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) exchange<S>(v[i], v[i + S], std::make_integer_sequence<int, W>{});
  if constexpr (S > 1) transpose<S / 2>(v);
}

// n rows of d elements as the columns of a packed matrix, zeros up to `columns`, a multiple of 32.
template <class T, class Row>
FA_INLINE void transposed_words(int64_t n, int64_t d, int64_t columns, uint32_t* out, Row&& row) {
  const int64_t words = words_of<T>(d);
  for (int64_t r0 = 0; r0 < columns; r0 += W) {
    const T* rows[W];
    for (int i = 0; i < W; ++i) rows[i] = r0 + i < n ? row(r0 + i) : zeros<T>;
    auto block = [&](auto whole, int64_t w) {
      U v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = words_at<whole.value>(rows[i], w, d);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i)
        if (whole.value || w + i < words) std::memcpy(out + packed_at<T>(words, r0, w + i), &v[i], sizeof(U));
    };
    int64_t w = 0;
    for (; (w + W) * Operand<T>::per_word <= d; w += W) block(std::true_type{}, w);
    for (; w < words; w += W) block(std::false_type{}, w);
  }
}
// n rows of d elements into a packed matrix whose k, `count` words, runs over rows; from word w0 on, with zeros up to
// `columns`, a multiple of 32.
template <class T, class Row>
FA_INLINE void row_words(int64_t n, int64_t d, int64_t columns, uint32_t* out, int64_t count, int64_t w0, Row&& row) {
  constexpr int per = Operand<T>::per_word;
  for (int64_t r = 0; r < words_of<T>(n); ++r) {
    const T* even = r * per < n ? row(r * per) : zeros<T>;
    const T* odd = r * per + 1 < n ? row(r * per + 1) : zeros<T>;
    auto vector = [&](auto whole, int64_t i) {
      const U words = words_across<T, whole.value>(even, odd, i, d);
      std::memcpy(out + packed_at<T>(count, i, w0 + r), &words, sizeof words);
    };
    int64_t i = 0;
    for (; i + W <= d; i += W) vector(std::true_type{}, i);
    for (; i < columns; i += W) vector(std::false_type{}, i);
  }
}
// n rows of d elements as the rows of an A block.
template <class M, class T, class Row>
FA_INLINE void block_rows(int64_t n, int64_t d, const ABlock& a, Row&& row) {
  for (int64_t r = 0; r < n; ++r) {
    const T* from = row(r);
    if constexpr (in_parts<M>) {
      copy_row<M>(a, r, from, d);
      continue;
    }
    auto vector = [&](auto whole, int64_t w) {
      const U words = words_at<whole.value>(from, w, d);
      std::memcpy(a.row(r, w), &words, sizeof words);
    };
    int64_t w = 0;
    for (; (w + W) * Operand<T>::per_word <= d; w += W) vector(std::true_type{}, w);
    for (; w < words_of<T>(d); w += W) vector(std::false_type{}, w);
  }
}
template <class T>
FA_INLINE Stored<T>* stored_row(const ABlock& a, int64_t r) {
  return (Stored<T>*)a.row(r, 0);
}
template <class T>
FA_INLINE void put(Stored<T>* to, F v) {
  if constexpr (Operand<T>::pairs) store(to, v);
  else store(to, rounded<T>(v));
}
// W elements of a row of an A block from element j on.
template <class M>
FA_INLINE void put_probabilities(const ABlock& a, int64_t r, int64_t j, F v) {
  if constexpr (in_parts<M>) put<M>(a, r, j, v, W);
  else put<M>(stored_row<M>(a, r) + j, v);
}
// The first n rows of one A block as the columns of another, from word w0 on; `columns` is a multiple of W.
template <class T>
FA_INLINE void block_columns(const ABlock& from, int64_t n, const ABlock& to, int64_t columns, int64_t w0) {
  constexpr int per = Operand<T>::per_word;
  for (int64_t w = 0; w < words_of<T>(n); w += W) {
    const Stored<T>*even[W], *odd[W];
    for (int i = 0; i < W; ++i) {
      const int64_t r = (w + i) * per;
      even[i] = r < n ? stored_row<T>(from, r) : zeros<Stored<T>>;
      odd[i] = r + 1 < n ? stored_row<T>(from, r + 1) : zeros<Stored<T>>;
    }
    for (int64_t j = 0; j < columns; j += W) {
      U v[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) v[i] = words_across<T, true>(even[i], odd[i], j, columns);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) std::memcpy(to.row(j + i, w0 + w), &v[i], sizeof(U));
    }
  }
}

// -- where things stand ----------------------------------------------------------------------------------------------

// Row r of matrix `which` (0 q, 1 k, 2 v) of this head.
template <class T>
FA_INLINE const T* head_row(const Attention& p, int64_t batch, int64_t head, int which, int64_t r) {
  const int64_t h = p.heads * p.head_dim;
  return (const T*)p.qkv + (batch * p.length + r) * 3 * h + which * h + head * p.head_dim;
}
FA_INLINE int64_t keys_of(const Attention& p) { return p.prefix_length + p.length; }
// Row r of the keys (1) or values (2), the prefix's first.
template <class T>
FA_INLINE const T* key_row(const Attention& p, int64_t batch, int64_t head, int which, int64_t r) {
  if (r >= p.prefix_length) return head_row<T>(p, batch, head, which, r - p.prefix_length);
  const int64_t row = (which - 1) * p.prefix_length + r;
  return (const T*)p.prefix + batch * p.prefix_stride + (row * p.heads + head) * p.head_dim;
}
// Rows lie far apart, which no hardware foresees: asks for row r of the next head's matrices [first, last), of which 3 is
// dout. Between rows of arithmetic, because a burst would take all requests that a core may have under way.
template <class T>
FA_INLINE void prefetch_next_head(const Attention& p, int64_t batch, int64_t head, int64_t r, int first, int last) {
  if (++head == p.heads) head = 0, ++batch;
  if (batch == p.batch) return;
  const int64_t d = p.head_dim, bytes = d * (int64_t)sizeof(T);
  for (int which = first; which < std::min(last, 3); ++which) prefetch(head_row<T>(p, batch, head, which, r), bytes);
  if (last > 3) prefetch((const T*)p.dout + ((batch * p.length + r) * p.heads + head) * d, bytes);
}

// One query row of scores: times the factor, plus the mask, which leaves a prefix alone; -inf past the last key.
FA_INLINE void masked_row(const Attention& p, int64_t batch, int64_t head, int64_t query, float* row) {
  const int64_t n = p.length, all = keys_of(p), sp = round32(all);
  const int64_t* st = p.mask_strides;
  const int64_t base = batch * st[0] + head * st[1] + query * st[2];
  for (int64_t j = 0; j < sp; j += W) store(row + j, load(row + j) * p.scale);
  float* own = row + p.prefix_length;
  if (p.mask && p.mask_is_bool) {
    const uint8_t* m = (const uint8_t*)p.mask + base;
    for (int64_t j = 0; j < n; ++j)
      if (!m[j * st[3]]) own[j] = kMinusInfinity;
  } else if (p.mask) {
    const float* m = (const float*)p.mask + base;
    if (st[3] == 1)
      for (int64_t j = 0; j < n; j += W) store_n(own + j, load_n(own + j, n - j) + load_n(m + j, n - j), n - j);
    else
      for (int64_t j = 0; j < n; ++j) own[j] += m[j * st[3]];
  }
  for (int64_t j = all; j < sp; ++j) row[j] = kMinusInfinity;
}

// -- rows ------------------------------------------------------------------------------------------------------------

// e^x for x below 88, zero below -87.7: x = n ln2 + r and a polynomial of r, as in exp. Where T is bfloat16 its relative
// error may be 3e-6. NaN passes.
template <class T>
FA_INLINE F exp_of_score(F x) {
  const F c = max(set1(-88.0f), x);
  const F shifted = c * 1.44269504088896341f + 12582912.0f;
  const F n = shifted - 12582912.0f;
  F r = c - n * 0.693145751953125f;
  r = r - n * 1.42860677e-6f;
  F p;
  if constexpr (std::is_same_v<T, float>) {
    p = set1(1.98412698e-4f);
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
  } else {  // fitted to the relative error
    p = set1(0.0415136814f);
    p = p * r + 0.167875916f;
    p = p * r + 0.50003022f;
    p = p * r + 0.9999668f;
  }
  p = p * r + 1.0f;
  return p * (F)((bits(shifted) << 23) + 0x3f800000u);  // 2^n; n = -127 makes it zero
}

// The largest lane; NaN where no lane is larger than it.
FA_INLINE float largest(F v) {
#if FA_WIDTH == 16
  v = max(v, (F)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0x4e));  // halves onto each other, as below
  v = max(v, (F)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xb1));
  v = max(v, (F)_mm512_permute_ps((__m512)v, 0x4e));
  v = max(v, (F)_mm512_permute_ps((__m512)v, 0xb1));
  return v[0];
#endif
  float lanes[W];
  store(lanes, v);
  for (int step = W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
  return lanes[0];
}

// masked_row, and the largest score.
FA_INLINE float masked_row_highest(const Attention& p, int64_t batch, int64_t head, int64_t query, float* row) {
  const int64_t all = keys_of(p), sp = round32(all);
  F top = set1(kMinusInfinity);
  if (p.mask || all < sp) {
    masked_row(p, batch, head, query, row);
    for (int64_t j = 0; j < sp; j += W) top = max(load(row + j), top);
    return largest(top);
  }
  for (int64_t j = 0; j < sp; j += W) {
    const F v = load(row + j) * p.scale;
    store(row + j, v);
    top = max(v, top);
  }
  return largest(top);
}

// Rows of T (`row(r)`) by the sp columns of transposed words into out [rows + 32][sp].
template <class M, class T, class Row>
FA_INLINE void scores(const ABlock& a, int64_t rows, int64_t d, const uint32_t* words_t, int64_t sp, float* c,
                      float* out, Row&& row) {
  block_rows<M, T>(rows, d, a, row);
  Passes<M> k;
  k.add_packed(words_t, packed_words_of<M>(d));
  product_into<M>(a, rows, k, sp / 32, c, out, sp, Ahead());
}
// For every whole or partial vector of the product of a's rows with row words of d columns: write(row, column, v).
template <class M, class Write>
FA_INLINE void product_rows(const ABlock& a, int64_t rows, const uint32_t* words, int64_t k, int64_t d, float* c,
                            Write&& write) {
  Passes<M> passes;
  passes.add_packed(words, packed_words_of<M>(k));
  product<M>(a, rows, passes, 0, round32(d) / 32, c, Ahead(), [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
    for (int64_t r = 0; r < mr; ++r)
      for (int64_t v = 0; v < kNV && panel * 32 + v * W < d; ++v)
        write(m + r, panel * 32 + v * W, load(tile + r * 32 + v * W));
  });
}

template <class T>
void attention_forward_head(const Attention& p, int64_t batch, int64_t head) {
  using M = Multiplied<T>;
  constexpr int64_t at_once = kQueries<M>;
  Scratch& scr = scratch();
  const int64_t n = keys_of(p), length = p.length, d = p.head_dim, dp = round32(d), sp = round32(n), h = p.heads * d;
  uint32_t* keys_t = scr.get<uint32_t>(0, words_of<T>(d) * sp);
  uint32_t* values = scr.get<uint32_t>(1, words_of<T>(n) * dp);
  float* c = scr.get<float>(2, tile_scratch(at_once));
  ABlock q{scr.get<uint32_t>(3, ABlock::size(at_once, words_of<M>(d))), at_once};
  ABlock prob{scr.get<uint32_t>(4, ABlock::size(at_once, words_of<M>(sp))), at_once};
  float* s = scr.get<float>(5, (at_once + 32) * sp);
  int8_t* keep = p.drop.on ? scr.get<int8_t>(6, sp + 64) : nullptr;
  transposed_words<T>(n, d, sp, keys_t, [&](int64_t r) { return key_row<T>(p, batch, head, 1, r); });
  row_words<T>(n, d, dp, values, words_of<T>(n), 0, [&](int64_t r) { return key_row<T>(p, batch, head, 2, r); });
  float highest[at_once], total[at_once][W], inverse[at_once];
  for (int64_t q0 = 0; q0 < length; q0 += at_once) {
    const int64_t rows = std::min(at_once, length - q0), first = (batch * p.heads + head) * length + q0;
    scores<M, T>(q, rows, d, keys_t, sp, c, s, [&](int64_t r) { return head_row<T>(p, batch, head, 0, q0 + r); });
    for (int64_t r = 0; r < rows; ++r) {
      prefetch_next_head<T>(p, batch, head, q0 + r, 0, 1);
      highest[r] = masked_row_highest(p, batch, head, q0 + r, s + r * sp);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const bool any = highest[r] != kMinusInfinity;  // else every key is masked: the row attends to nothing
      const float from = any ? highest[r] : 0.0f;
      if (keep) keep_row(first + r, n, p.drop, keep);
      prefetch_next_head<T>(p, batch, head, q0 + r, 1, 3);
      F all = F{};
      for (int64_t j = 0; j < sp; j += W) {
        F e = exp_of_score<T>(load(s + r * sp + j) - from);
        all = all + e;
        if (keep) e = dropped(e, keep + j, 1.0f);
        put_probabilities<M>(prob, r, j, e);
      }
      store(total[r], all);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float all = sum(load(total[r]));
      inverse[r] = all != 0.0f ? p.drop.keep_scale / all : 0.0f;
      if (p.lse) p.lse[first + r] = all != 0.0f ? highest[r] + std::log(all) : kMinusInfinity;
    }
    product_rows<M>(prob, rows, values, n, d, c, [&](int64_t r, int64_t col, F v) {
      store_n((T*)p.out + (batch * length + q0 + r) * h + head * d + col, v * inverse[r], d - col);
    });
  }
}

template <class T>
void attention_backward_head(const Attention& p, int64_t batch, int64_t head) {
  using M = Multiplied<T>;  // of the scores and of dP; what is transposed is T's own
  constexpr int64_t at_once = kQueries<M>;
  Scratch& scr = scratch();
  const int64_t n = keys_of(p), length = p.length, d = p.head_dim, dp = round32(d), sp = round32(n), h = p.heads * d;
  const int64_t words = words_of<T>(d), query_words = words_of<T>(length);
  uint32_t* keys_t = scr.get<uint32_t>(0, words * sp);
  uint32_t* values_t = scr.get<uint32_t>(1, words * sp);
  uint32_t* keys = scr.get<uint32_t>(2, words_of<T>(n) * dp);
  uint32_t* queries = scr.get<uint32_t>(3, query_words * dp);
  uint32_t* douts = scr.get<uint32_t>(4, query_words * dp);
  float* c = scr.get<float>(5, tile_scratch(sp));
  ABlock a{scr.get<uint32_t>(6, ABlock::size(at_once, words_of<M>(d))), at_once};
  ABlock prob{scr.get<uint32_t>(7, ABlock::size(at_once, sp)), at_once};
  ABlock ds{scr.get<uint32_t>(8, ABlock::size(at_once, sp)), at_once};
  ABlock prob_t{scr.get<uint32_t>(9, ABlock::size(sp, query_words)), sp};
  ABlock ds_t{scr.get<uint32_t>(10, ABlock::size(sp, query_words)), sp};
  float* s = scr.get<float>(11, (at_once + 32) * sp);
  float* g = scr.get<float>(12, (at_once + 32) * sp);
  int8_t* keep = p.drop.on ? scr.get<int8_t>(13, sp + 64) : nullptr;
  auto key = [&](int64_t r) { return key_row<T>(p, batch, head, 1, r); };
  transposed_words<T>(n, d, sp, keys_t, key);
  transposed_words<T>(n, d, sp, values_t, [&](int64_t r) { return key_row<T>(p, batch, head, 2, r); });
  row_words<T>(n, d, dp, keys, words_of<T>(n), 0, key);
  auto write = [&](int which, int64_t row, int64_t col, F v) {
    store_n((T*)p.dqkv + (batch * length + row) * 3 * h + which * h + head * d + col, v, d - col);
  };
  const float keep_scale = p.drop.keep_scale, factor = keep_scale * p.scale;  // come in once the sums are made
  float total[at_once][W];
  for (int64_t q0 = 0; q0 < length; q0 += at_once) {
    const int64_t rows = std::min(at_once, length - q0), first = (batch * p.heads + head) * length + q0;
    const int64_t w0 = q0 / Operand<T>::per_word;
    auto query_row = [&](int64_t r) { return head_row<T>(p, batch, head, 0, q0 + r); };
    auto dout_row = [&](int64_t r) { return (const T*)p.dout + (batch * length + q0 + r) * h + head * d; };
    row_words<T>(rows, d, dp, queries, query_words, w0, query_row);
    row_words<T>(rows, d, dp, douts, query_words, w0, dout_row);
    scores<M, T>(a, rows, d, keys_t, sp, c, s, query_row);
    scores<M, T>(a, rows, d, values_t, sp, c, g, dout_row);  // dP = dO V^T
    for (int64_t r = 0; r < rows; ++r) {
      float *row = s + r * sp, *grad = g + r * sp;
      Stored<T>* out = stored_row<T>(prob, r);
      prefetch_next_head<T>(p, batch, head, q0 + r, 0, 2);
      masked_row(p, batch, head, q0 + r, row);
      // A row whose keys are all masked has lse = -inf and probability zero everywhere.
      const float lse = p.lse[first + r] == kMinusInfinity ? -kMinusInfinity : p.lse[first + r];
      if (keep) keep_row(first + r, n, p.drop, keep);
      F all = F{};
      for (int64_t j = 0; j < sp; j += W) {
        const F e = exp_of_score<T>(load(row + j) - lse);
        F v = load(grad + j);
        if (keep) {
          v = dropped(v, keep + j, 1.0f);
          store(grad + j, v);
        }
        all = all + e * v;
        store(row + j, e);
        put<T>(out + j, keep ? dropped(e, keep + j, 1.0f) : e);
      }
      store(total[r], all);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float mean = sum(load(total[r]));
      const float *e = s + r * sp, *grad = g + r * sp;
      Stored<T>* out = stored_row<T>(ds, r);
      prefetch_next_head<T>(p, batch, head, q0 + r, 2, 4);
      for (int64_t j = 0; j < sp; j += W) put<T>(out + j, load(e + j) * (load(grad + j) - mean) * factor);
    }
    block_columns<T>(prob, rows, prob_t, sp, w0);
    block_columns<T>(ds, rows, ds_t, sp, w0);
    product_rows<T>(ds, rows, keys, n, d, c, [&](int64_t r, int64_t col, F v) { write(0, q0 + r, col, v); });
  }
  for (int which = 1; which <= 2; ++which)
    product_rows<T>(which == 1 ? ds_t : prob_t, n, which == 1 ? queries : douts, length, d, c,
                    [&](int64_t r, int64_t col, F v) {
      if (which == 2) v = v * keep_scale;
      if (r >= p.prefix_length) return write(which, r - p.prefix_length, col, v);
      const int64_t row = (batch * 2 + which - 1) * p.prefix_length + r;
      store_n(p.dprefix + row * h + head * d + col, v, d - col);
    });
}

template <class T>
void attention_forward_typed(const Attention& p, Parallel parallel) {
  parallel_for(parallel, p.batch * p.heads,
               [&](int64_t task) { attention_forward_head<T>(p, task / p.heads, task % p.heads); });
}
template <class T>
void attention_backward_typed(const Attention& p, Parallel parallel) {
  parallel_for(parallel, p.batch * p.heads,
               [&](int64_t task) { attention_backward_head<T>(p, task / p.heads, task % p.heads); });
  if (p.dprefix_sum == nullptr) return;
  const int64_t h = p.heads * p.head_dim, rows = 2 * p.prefix_length;
  parallel_for(parallel, rows, [&](int64_t row) {
    ordered_sum(p.dprefix + row * h, p.batch, h, rows * h, p.dprefix_sum + row * h);
  });
}

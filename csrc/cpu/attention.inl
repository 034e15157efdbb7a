// Self-attention of one (batch, head) at a time: K and V of a head stay in the cache, and nothing of size S x S leaves
// it. Backward makes the probabilities again from the log-sum-exp. A head's matrices become B operands in two forms:
// with the head's dimension as k (transposed words), and with the sequence as k (row words).

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

FA_INLINE int64_t round32(int64_t n) { return (n + 31) / 32 * 32; }

// Row words: two rows side by side in a word where T is multiplied in pairs (the second may be absent), else one.
template <class T>
FA_INLINE void interleave(const float* even, const float* odd, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; i += W) {
    U word = bits(rounded<T>(load(even + i)));
    if constexpr (Operand<T>::pairs) word = (word >> 16) | (odd ? bits(rounded<T>(load(odd + i))) : U{});
    std::memcpy(out + i, &word, sizeof word);
  }
}
// [rows][ld] floats as row words [words_of(rows)][ld]; ld is a multiple of 32.
template <class T>
void row_words(const float* rows_f, int64_t rows, int64_t ld, uint32_t* out) {
  constexpr int per = Operand<T>::per_word;
  const int64_t words = words_of<T>(rows);
  for (int64_t r = 0; r < words; ++r) {
    if (r * per >= rows) std::memset(out + r * ld, 0, 4 * ld);
    else interleave<T>(rows_f + r * per * ld, r * per + 1 < rows ? rows_f + (r * per + 1) * ld : nullptr, ld, out + r * ld);
  }
}
// Row r of matrix `which` (0 q, 1 k, 2 v) of this head.
template <class T>
FA_INLINE const T* head_row(const Attention& p, int64_t batch, int64_t head, int which, int64_t r) {
  const int64_t h = p.heads * p.head_dim;
  return (const T*)p.qkv + (batch * p.length + r) * 3 * h + which * h + head * p.head_dim;
}
// n rows of d elements as floats [n][ld], zeros up to ld.
template <class T, class Row>
FA_INLINE void widen(int64_t n, int64_t d, int64_t ld, float* out, Row&& row) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t i = 0; i < ld; i += W) store(out + r * ld + i, i < d ? load_n(row(r) + i, d - i) : F{});
}
// n rows of d elements as the words of an A operand, and from them the transposed words [words_of(d)][ld] with zeros up
// to ld. `rows` is scratch.
template <class T, class Row>
FA_INLINE void transposed_words(int64_t n, int64_t d, int64_t ld, const ABlock& rows, uint32_t* out, Row&& row) {
  const int64_t words = words_of<T>(d);
  for (int64_t r0 = 0; r0 < n; r0 += kRows) {
    const int64_t count = std::min(kRows, n - r0);
    for (int64_t r = 0; r < count; ++r) copy_row<T>(rows, r, row(r0 + r), d);
    transpose((const float*)rows.words, kStride, count, words, (float*)out + r0, ld);
  }
  for (int64_t i = 0; i < words; ++i) std::memset(out + i * ld + n, 0, 4 * (size_t)(ld - n));
}

// Rows lie far apart, which no hardware foresees: asks for the next head's.
template <class T>
FA_INLINE void prefetch_next_head(const Attention& p, int64_t batch, int64_t head) {
  if (head + 1 == p.heads) return;
  const int64_t d = p.head_dim, h = p.heads * d, bytes = d * (int64_t)sizeof(T);
  for (int64_t r = 0; r < p.length; ++r) {
    for (int which = 0; which < 3; ++which) prefetch(head_row<T>(p, batch, head + 1, which, r), bytes, 0, 1, 1);
    if (p.dout) prefetch((const T*)p.dout + (batch * p.length + r) * h + (head + 1) * d, bytes, 0, 1, 1);
  }
}

// One query row of scores: times the factor, plus the mask; -inf past the sequence.
FA_INLINE void masked_row(const Attention& p, int64_t batch, int64_t head, int64_t query, float* row) {
  const int64_t n = p.length, sp = round32(n);
  const int64_t* st = p.mask_strides;
  const int64_t base = batch * st[0] + head * st[1] + query * st[2];
  if (p.mask && !p.mask_is_bool && st[3] == 1) {
    const float* m = (const float*)p.mask + base;
    for (int64_t j = 0; j < n; j += W) store(row + j, load(row + j) * p.scale + load_n(m + j, n - j));
  } else {
    for (int64_t j = 0; j < sp; j += W) store(row + j, load(row + j) * p.scale);
    if (p.mask && p.mask_is_bool) {
      const uint8_t* m = (const uint8_t*)p.mask + base;
      for (int64_t j = 0; j < n; ++j)
        if (!m[j * st[3]]) row[j] = kMinusInfinity;
    } else if (p.mask) {
      const float* m = (const float*)p.mask + base;
      for (int64_t j = 0; j < n; ++j) row[j] += m[j * st[3]];
    }
  }
  for (int64_t j = n; j < sp; ++j) row[j] = kMinusInfinity;
}

// Rows of T (`row(r)`) by transposed words [words_of(d)][sp] into out [rows + 32][sp].
template <class T, class Row>
FA_INLINE void scores(const ABlock& a, int64_t rows, int64_t d, const uint32_t* words_t, int64_t sp, float* c,
                      float* out, Row&& row) {
  for (int64_t r = 0; r < rows; ++r) copy_row<T>(a, r, row(r), d);
  Passes<T> k;
  k.add(words_t, 32, sp, words_of<T>(d));
  product_into<T>(a, rows, k, sp / 32, c, out, sp, [](int64_t) {});
}

template <class T>
void attention_forward_head(const Attention& p, int64_t batch, int64_t head) {
  Scratch& scr = scratch();
  const int64_t n = p.length, d = p.head_dim, dp = round32(d), sp = round32(n), h = p.heads * d;
  uint32_t* keys_t = scr.get<uint32_t>(0, words_of<T>(d) * sp);
  float* wide = scr.get<float>(1, n * dp);
  uint32_t* values = scr.get<uint32_t>(2, words_of<T>(n) * dp);
  float* c = scr.get<float>(3, tile_scratch(kRows));
  ABlock q{scr.get<uint32_t>(4, ABlock::size(kRows, words_of<T>(d))), padded_rows(kRows)};
  ABlock prob{scr.get<uint32_t>(5, ABlock::size(kRows, sp)), padded_rows(kRows)};
  float* s = scr.get<float>(6, (kRows + 32) * sp);
  int8_t* keep = p.drop.on ? scr.get<int8_t>(7, sp + 64) : nullptr;
  transposed_words<T>(n, d, sp, q, keys_t, [&](int64_t r) { return head_row<T>(p, batch, head, 1, r); });
  widen<T>(n, d, dp, wide, [&](int64_t r) { return head_row<T>(p, batch, head, 2, r); });
  row_words<T>(wide, n, dp, values);
  prefetch_next_head<T>(p, batch, head);
  float inverse[kRows];
  const int64_t blocks = (n + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t q0 = n * block / blocks, rows = n * (block + 1) / blocks - q0;
    scores<T>(q, rows, d, keys_t, sp, c, s, [&](int64_t r) { return head_row<T>(p, batch, head, 0, q0 + r); });
    for (int64_t r = 0; r < rows; ++r) {
      float* row = s + r * sp;
      masked_row(p, batch, head, q0 + r, row);
      F top = set1(kMinusInfinity);
      for (int64_t j = 0; j < sp; j += W) top = max(load(row + j), top);
      float highest = top[0];
      for (int l = 1; l < W; ++l) highest = top[l] > highest ? top[l] : highest;
      const int64_t query = (batch * p.heads + head) * n + q0 + r;
      const bool any = highest != kMinusInfinity;  // else every key is masked: the row attends to nothing
      if (keep) keep_row(query, n, p.drop, keep);
      F total = F{};
      for (int64_t j = 0; j < sp; j += W) {
        F e = any ? exp(load(row + j) - highest) : F{};
        total = total + e;
        if (keep) e = dropped(e, keep + j, 1.0f);
        put<T>(prob, r, j, e, W);
      }
      const float all = sum(total);
      inverse[r] = any ? p.drop.keep_scale / all : 0.0f;
      if (p.lse) p.lse[query] = any ? highest + std::log(all) : kMinusInfinity;
    }
    Passes<T> k;
    k.add(values, 32, dp, words_of<T>(n));
    product<T>(prob, rows, k, 0, dp / 32, c, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
      for (int v = 0; v < kNV; ++v) {
        const int64_t col = panel * 32 + v * W;
        if (col >= d) break;
        for (int64_t r = 0; r < mr; ++r)
          store_n((T*)p.out + (batch * n + q0 + m + r) * h + head * d + col,
                  load(tile + r * 32 + v * W) * inverse[m + r], d - col);
      }
    });
  }
}

template <class T>
void attention_backward_head(const Attention& p, int64_t batch, int64_t head) {
  Scratch& scr = scratch();
  const int64_t n = p.length, d = p.head_dim, dp = round32(d), sp = round32(n), h = p.heads * d;
  uint32_t* keys_t = scr.get<uint32_t>(0, words_of<T>(d) * sp);
  float* wide = scr.get<float>(1, std::max(n, kRows) * dp);
  uint32_t* values_t = scr.get<uint32_t>(2, words_of<T>(d) * sp);
  float* c = scr.get<float>(3, tile_scratch(std::max(kRows, d)));
  ABlock a{scr.get<uint32_t>(4, ABlock::size(kRows, words_of<T>(d))), padded_rows(kRows)};
  ABlock ds{scr.get<uint32_t>(5, ABlock::size(kRows, sp)), padded_rows(kRows)};
  float* s = scr.get<float>(6, (kRows + 32) * sp);
  int8_t* keep = p.drop.on ? scr.get<int8_t>(7, sp + 64) : nullptr;
  float* g = scr.get<float>(8, (kRows + 32) * sp);
  uint32_t* keys = scr.get<uint32_t>(9, words_of<T>(n) * dp);
  float* dk_t = scr.get<float>(10, d * sp);
  float* dv_t = scr.get<float>(11, d * sp);
  ABlock left{scr.get<uint32_t>(12, ABlock::size(d, kRows)), padded_rows(d)};
  uint32_t* left_rows = scr.get<uint32_t>(13, (kRows + 32) * dp);
  uint32_t* right = scr.get<uint32_t>(14, (kRows + 32) * sp);
  transposed_words<T>(n, d, sp, a, keys_t, [&](int64_t r) { return head_row<T>(p, batch, head, 1, r); });
  transposed_words<T>(n, d, sp, a, values_t, [&](int64_t r) { return head_row<T>(p, batch, head, 2, r); });
  widen<T>(n, d, dp, wide, [&](int64_t r) { return head_row<T>(p, batch, head, 1, r); });
  row_words<T>(wide, n, dp, keys);
  prefetch_next_head<T>(p, batch, head);
  std::memset(dk_t, 0, sizeof(float) * d * sp);
  std::memset(dv_t, 0, sizeof(float) * d * sp);

  // out [d][sp] += (rows [rows][d])^T times float rows `by` [rows][sp].
  auto add_product = [&](int64_t rows, const float* by, float* out, auto&& row) {
    widen<T>(rows, d, dp, wide, row);
    row_words<T>(wide, rows, dp, left_rows);
    transpose((const float*)left_rows, dp, words_of<T>(rows), d, (float*)left.words, kStride);
    row_words<T>(by, rows, sp, right);
    Passes<T> k;
    k.add(right, 32, sp, words_of<T>(rows));
    product<T>(left, d, k, 0, sp / 32, c, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
      for (int64_t r = 0; r < mr; ++r)
        for (int v = 0; v < kNV; ++v) {
          float* to = out + (m + r) * sp + panel * 32 + v * W;
          store(to, load(to) + load(tile + r * 32 + v * W));
        }
    });
  };
  auto write = [&](int which, int64_t row, int64_t col, F v) {
    store_n((T*)p.dqkv + (batch * n + row) * 3 * h + which * h + head * d + col, v, d - col);
  };

  const int64_t blocks = (n + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t q0 = n * block / blocks, rows = n * (block + 1) / blocks - q0;
    auto query_row = [&](int64_t r) { return head_row<T>(p, batch, head, 0, q0 + r); };
    auto dout_row = [&](int64_t r) { return (const T*)p.dout + (batch * n + q0 + r) * h + head * d; };
    scores<T>(a, rows, d, keys_t, sp, c, s, query_row);
    scores<T>(a, rows, d, values_t, sp, c, g, dout_row);  // dP = dO V^T
    for (int64_t r = 0; r < rows; ++r) {
      float* row = s + r * sp;
      float* grad = g + r * sp;
      masked_row(p, batch, head, q0 + r, row);
      const int64_t query = (batch * p.heads + head) * n + q0 + r;
      // A row whose keys are all masked has lse = -inf and probability zero everywhere.
      const float lse = p.lse[query] == kMinusInfinity ? -kMinusInfinity : p.lse[query];
      if (keep) keep_row(query, n, p.drop, keep);
      F total = F{};
      for (int64_t j = 0; j < sp; j += W) {
        const F e = exp(load(row + j) - lse);
        F v = load(grad + j);
        if (keep) v = dropped(v, keep + j, p.drop.keep_scale);
        total = total + e * v;
        store(grad + j, v);
        store(row + j, e);
      }
      const float mean = sum(total);
      for (int64_t j = 0; j < sp; j += W) {
        const F e = load(row + j), v = e * (load(grad + j) - mean) * p.scale;
        store(grad + j, v);
        put<T>(ds, r, j, v, W);
        if (keep) store(row + j, dropped(e, keep + j, p.drop.keep_scale));
      }
    }
    Passes<T> k;
    k.add(keys, 32, dp, words_of<T>(n));
    product<T>(ds, rows, k, 0, dp / 32, c, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
      for (int v = 0; v < kNV; ++v) {
        const int64_t col = panel * 32 + v * W;
        if (col >= d) break;
        for (int64_t r = 0; r < mr; ++r) write(0, q0 + m + r, col, load(tile + r * 32 + v * W));
      }
    });
    add_product(rows, s, dv_t, dout_row);
    add_product(rows, g, dk_t, query_row);
  }
  for (int which = 1; which <= 2; ++which) {
    transpose(which == 1 ? dk_t : dv_t, sp, d, n, wide, dp);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < d; i += W) write(which, r, i, load_n(wide + r * dp + i, d - i));
  }
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
}

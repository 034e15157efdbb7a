// Self-attention of one (batch, head) at a time, in float whatever T is: K and V of a head stay in the cache, and
// nothing of size S x S leaves it. Backward makes the probabilities again from the log-sum-exp.

// Rows [0, S) of matrix `which` (0 q, 1 k, 2 v) of this head as floats [S][ld], zeros up to ld.
template <class T>
void head_rows(const Attention& p, int64_t batch, int64_t head, int which, float factor, float* out, int64_t ld) {
  const int64_t d = p.head_dim, h = p.heads * d;
  for (int64_t r = 0; r < p.length; ++r) {
    const T* row = (const T*)p.qkv + (batch * p.length + r) * 3 * h + which * h + head * d;
    for (int64_t i = 0; i < ld; i += W) store(out + r * ld + i, i < d ? load_n(row + i, d - i) * factor : F{});
  }
}

// The mask of one query row, added to its scores.
FA_INLINE void add_mask(const Attention& p, int64_t batch, int64_t head, int64_t query, float* row) {
  if (!p.mask) return;
  const int64_t* st = p.mask_strides;
  const int64_t base = batch * st[0] + head * st[1] + query * st[2];
  if (p.mask_is_bool) {
    const uint8_t* m = (const uint8_t*)p.mask + base;
    for (int64_t j = 0; j < p.length; ++j)
      if (!m[j * st[3]]) row[j] = -std::numeric_limits<float>::infinity();
  } else {
    const float* m = (const float*)p.mask + base;
    if (st[3] == 1)
      for (int64_t j = 0; j < p.length; j += W)
        store_n(row + j, load_n(row + j, p.length - j) + load_n(m + j, p.length - j), p.length - j);
    else
      for (int64_t j = 0; j < p.length; ++j) row[j] += m[j * st[3]];
  }
}

// The scores of `rows` queries against all keys into block p_block: queries are scaled already.
FA_INLINE void scores(const float* q, int64_t ldq, int64_t rows, int64_t d, const float* keys_t, int64_t sp, ABlock a,
                      ABlock out, float* c) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < d; i += W) put<float>(a, r, i, load_n(q + r * ldq + i, d - i), d - i);
  Passes k;
  k.add((const uint32_t*)keys_t, 32, sp, d);
  product<float>(a, rows, k, 0, sp / 32, c, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
    for (int64_t r = 0; r < mr; ++r)
      for (int v = 0; v < kNV; ++v)
        store((float*)out.row(m + r, 0) + panel * 32 + v * W, load(tile + r * 32 + v * W));
  });
}

template <class T>
void attention_forward_head(const Attention& p, int64_t batch, int64_t head) {
  Scratch& scr = scratch();
  const int64_t n = p.length, d = p.head_dim, dp = (d + 31) / 32 * 32, sp = (n + 31) / 32 * 32, h = p.heads * d;
  float* rows_f = scr.get<float>(0, n * dp);
  float* keys_t = scr.get<float>(1, d * sp);
  float* values = scr.get<float>(2, n * dp);
  float* c = scr.get<float>(3, tile_scratch(kRows));
  ABlock q{scr.get<uint32_t>(4, ABlock::size(kRows, d)), padded_rows(kRows)};
  ABlock prob{scr.get<uint32_t>(5, ABlock::size(kRows, sp)), padded_rows(kRows)};
  int8_t* keep = p.drop.on ? scr.get<int8_t>(6, sp + 64) : nullptr;
  head_rows<T>(p, batch, head, 1, 1.0f, rows_f, dp);
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = n; j < sp; ++j) keys_t[i * sp + j] = 0.0f;
  transpose(rows_f, dp, n, d, keys_t, sp);
  head_rows<T>(p, batch, head, 2, 1.0f, values, dp);
  head_rows<T>(p, batch, head, 0, p.scale, rows_f, dp);
  float inverse[kRows];
  const int64_t blocks = (n + kRows - 1) / kRows;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t q0 = n * block / blocks, rows = n * (block + 1) / blocks - q0;
    scores(rows_f + q0 * dp, dp, rows, d, keys_t, sp, q, prob, c);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = (float*)prob.row(r, 0);
      add_mask(p, batch, head, q0 + r, row);
      F top = set1(-std::numeric_limits<float>::infinity());
      for (int64_t j = n; j < sp; ++j) row[j] = -std::numeric_limits<float>::infinity();
      for (int64_t j = 0; j < sp; j += W) top = max(load(row + j), top);
      float highest = top[0];
      for (int l = 1; l < W; ++l) highest = top[l] > highest ? top[l] : highest;
      const int64_t query = (batch * p.heads + head) * n + q0 + r;
      if (highest == -std::numeric_limits<float>::infinity()) {  // every key is masked: attends to nothing
        std::memset(row, 0, sizeof(float) * sp);
        inverse[r] = 0.0f;
        if (p.lse) p.lse[query] = highest;
        continue;
      }
      F total = F{};
      for (int64_t j = 0; j < sp; j += W) {
        const F e = exp(load(row + j) - highest);
        total = total + e;
        store(row + j, e);
      }
      const float all = sum(total);
      inverse[r] = 1.0f / all;
      if (p.lse) p.lse[query] = highest + std::log(all);
      if (keep) {
        keep_row(query, n, p.drop, keep);
        inverse[r] *= p.drop.keep_scale;
        for (int64_t j = 0; j < sp; j += W) store(row + j, dropped(load(row + j), keep + j, 1.0f));
      }
    }
    Passes k;
    k.add((const uint32_t*)values, 32, dp, n);
    product<float>(prob, rows, k, 0, dp / 32, c, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
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
  const int64_t n = p.length, d = p.head_dim, dp = (d + 31) / 32 * 32, sp = (n + 31) / 32 * 32, h = p.heads * d;
  float* queries = scr.get<float>(0, n * dp);
  float* keys = scr.get<float>(1, n * dp);
  float* keys_t = scr.get<float>(2, d * sp);
  float* values_t = scr.get<float>(3, d * sp);
  float* dk_t = scr.get<float>(4, d * sp);
  float* dv_t = scr.get<float>(5, d * sp);
  float* c = scr.get<float>(6, tile_scratch(std::max(kRows, d)));
  ABlock q{scr.get<uint32_t>(7, ABlock::size(kRows, d)), padded_rows(kRows)};
  ABlock prob{scr.get<uint32_t>(8, ABlock::size(kRows, sp)), padded_rows(kRows)};
  ABlock ds{scr.get<uint32_t>(9, ABlock::size(kRows, sp)), padded_rows(kRows)};
  ABlock left{scr.get<uint32_t>(10, ABlock::size(d, kRows)), padded_rows(d)};
  float* dout = scr.get<float>(11, kRows * dp);
  int8_t* keep = p.drop.on ? scr.get<int8_t>(12, sp + 64) : nullptr;
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = n; j < sp; ++j) keys_t[i * sp + j] = values_t[i * sp + j] = 0.0f;
  head_rows<T>(p, batch, head, 2, 1.0f, queries, dp);
  transpose(queries, dp, n, d, values_t, sp);
  head_rows<T>(p, batch, head, 1, 1.0f, keys, dp);
  transpose(keys, dp, n, d, keys_t, sp);
  head_rows<T>(p, batch, head, 0, p.scale, queries, dp);
  std::memset(dk_t, 0, sizeof(float) * d * sp);
  std::memset(dv_t, 0, sizeof(float) * d * sp);

  auto add_product = [&](const float* rows_of_left, int64_t rows, const ABlock& right, float* out) {
    transpose(rows_of_left, dp, rows, d, (float*)left.words, kStride);
    Passes k;
    k.add(right.words, 32, kStride, rows);
    product<float>(left, d, k, 0, sp / 32, c, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
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
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = (const T*)p.dout + (batch * n + q0 + r) * h + head * d;
      for (int64_t i = 0; i < dp; i += W) store(dout + r * dp + i, i < d ? load_n(row + i, d - i) : F{});
    }
    scores(queries + q0 * dp, dp, rows, d, keys_t, sp, q, prob, c);
    scores(dout, dp, rows, d, values_t, sp, q, ds, c);  // dP = dO V^T
    for (int64_t r = 0; r < rows; ++r) {
      float* row = (float*)prob.row(r, 0);
      float* grad = (float*)ds.row(r, 0);
      add_mask(p, batch, head, q0 + r, row);
      const int64_t query = (batch * p.heads + head) * n + q0 + r;
      // A row whose keys are all masked has lse = -inf and probability zero everywhere.
      const float lse = p.lse[query] == -std::numeric_limits<float>::infinity() ? std::numeric_limits<float>::infinity()
                                                                               : p.lse[query];
      if (keep) keep_row(query, n, p.drop, keep);
      F total = F{};
      for (int64_t j = n; j < sp; ++j) row[j] = -std::numeric_limits<float>::infinity();
      for (int64_t j = 0; j < sp; j += W) {
        const F e = exp(load(row + j) - lse);
        F g = load(grad + j);
        if (keep) g = dropped(g, keep + j, p.drop.keep_scale);
        total = total + e * g;
        store(grad + j, g);
        store(row + j, e);
      }
      const float mean = sum(total);
      for (int64_t j = 0; j < sp; j += W) {
        const F e = load(row + j);
        store(grad + j, e * (load(grad + j) - mean));
        if (keep) store(row + j, dropped(e, keep + j, p.drop.keep_scale));
      }
    }
    Passes k;
    k.add((const uint32_t*)keys, 32, dp, n);
    product<float>(ds, rows, k, 0, dp / 32, c, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
      for (int v = 0; v < kNV; ++v) {
        const int64_t col = panel * 32 + v * W;
        if (col >= d) break;
        for (int64_t r = 0; r < mr; ++r) write(0, q0 + m + r, col, load(tile + r * 32 + v * W) * p.scale);
      }
    });
    add_product(dout, rows, prob, dv_t);
    add_product(queries + q0 * dp, rows, ds, dk_t);
  }
  // `keys` is free now and holds each result with its rows the right way round.
  for (int which = 1; which <= 2; ++which) {
    transpose(which == 1 ? dk_t : dv_t, sp, d, n, keys, dp);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t i = 0; i < d; i += W) write(which, r, i, load_n(keys + r * dp + i, d - i));
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

// LayerNorm of a row that is in the cache, its backward, and s = drop(x) + residual, y = LN(s).

struct Moments {
  float mean, rstd;
};
// fn(i) for every vector start below n, four at a time so that sums have four chains; fn gets its chain too.
template <class Fn>
FA_INLINE void four_chains(int64_t n, Fn&& fn) {
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    fn(i, 0);
    fn(i + W, 1);
    fn(i + 2 * W, 2);
    fn(i + 3 * W, 3);
  }
  for (; i < n; i += W) fn(i, 0);
}
FA_INLINE float sum4(const F* t) { return sum((t[0] + t[1]) + (t[2] + t[3])); }

FA_INLINE F tail_zeroed(F v, int64_t valid) {
  if (valid < W)
    for (int64_t l = std::max<int64_t>(valid, 0); l < W; ++l) v[l] = 0.0f;
  return v;
}
// Mean and reciprocal deviation of a row, given the mean's first estimate. A second pass, because E[s^2] - E[s]^2
// cancels; it also finds what rounding left in the estimate.
template <bool Whole, class S>
FA_INLINE Moments row_moments(const S* s, int64_t n, float estimate, float eps) {
  F left[4] = {}, squares[4] = {};
  four_chains(n, [&](int64_t i, int chain) {
    F d = load_n<Whole>(s + i, n - i) - estimate;
    if constexpr (!Whole) d = tail_zeroed(d, n - i);
    left[chain] = left[chain] + d;
    squares[chain] = squares[chain] + d * d;
  });
  const float shift = sum4(left) / (float)n;
  return {estimate + shift, 1.0f / std::sqrt(sum4(squares) / (float)n - shift * shift + eps)};
}
// Stream: past the caches, for floats.
template <bool Whole, bool Stream = false, class S, class T>
FA_INLINE void normalise(const S* s, int64_t n, const Moments& m, const float* weight, const float* bias, T* y) {
  const float shift = -m.mean * m.rstd;
  four_chains(n, [&](int64_t i, int) {
    const F x = load_n<Whole>(s + i, n - i) * m.rstd + shift;
    const F value = x * load_n<Whole>(weight + i, n - i) + load_n<Whole>(bias + i, n - i);
    if constexpr (Stream) stream(y + i, value);
    else store_n<Whole>(y + i, value, n - i);
  });
}

// What a row's moments are made of, taken while its elements are in registers, 32 columns at a time; start comes with the
// first of them. The sums of some rows cancel: such a row is passed over again.
template <class T>
struct RowStatistics {  // of distances from the mean of the first 32 columns
  F total, squares;
  float origin;
  FA_INLINE void start(const float* row, int64_t valid) {
    total = squares = F{};
    F all = F{};
    for (int i = 0; i < kNV && i * W < valid; ++i) all = all + load_n(row + i * W, valid - i * W);
    origin = sum(all) / (float)std::min<int64_t>(32, valid);
  }
  FA_INLINE void add(const float* row, int64_t valid) {  // 32 columns, or those that there are
    F t = total, q = squares;
#pragma GCC unroll 8
    for (int i = 0; i < kNV; ++i) {
      if (i * W >= valid) break;
      const F d = tail_zeroed(load_n(row + i * W, valid - i * W) - origin, valid - i * W);
      t = t + d;
      q = q + d * d;
    }
    total = t;
    squares = q;
  }
  template <bool Whole>
  FA_INLINE Moments moments(const T* row, int64_t n, float eps) const {
    const float shift = sum(total) / (float)n, variance = sum(squares) / (float)n - shift * shift;
    if (shift * shift <= variance) return {origin + shift, 1.0f / std::sqrt(variance + eps)};
    return row_moments<Whole>(row, n, origin + shift, eps);
  }
};
// bfloat16: of the elements as they are stored. Their products are exact in float, so that the variance is right to some
// 2^-18 of the mean's square.
template <>
struct RowStatistics<bf16> {
  F total, squares;
  FA_INLINE void start(const bf16*, int64_t) { total = squares = F{}; }
  FA_INLINE void add(U words) {
    total = add_dots(total, words, U{} + 0x3f803f80u);  // ones
    squares = add_dots(squares, words, words);
  }
  FA_INLINE void add(const RowStatistics& other) {
    total = total + other.total;
    squares = squares + other.squares;
  }
  FA_INLINE void add(const bf16* row, int64_t valid) {  // 32 columns, or those that there are
    bf16 columns[32] = {};
    if (valid < 32) {
      std::memcpy(columns, row, sizeof(bf16) * valid);
      row = columns;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kWordVectors; ++i) add(load_words(row + i * 2 * W));
  }
  template <bool Whole>
  FA_INLINE Moments moments(const bf16* row, int64_t n, float eps) const {
    const float mean = sum(total) / (float)n, variance = sum(squares) / (float)n - mean * mean;
    if (mean * mean <= 64.0f * variance) return {mean, 1.0f / std::sqrt(variance + eps)};
    return row_moments<Whole>(row, n, mean, eps);
  }
};

// LayerNorm's weight and bias for rows of bfloat16 in words: of each 32 columns the even ones, then the odd ones.
struct PartedNorm {
  float *weight, *bias;
  int64_t n;
  PartedNorm(float* room, const float* w, const float* b, int64_t columns)
      : weight(room), bias(room + columns), n(columns) {
    for (int64_t i = 0; i < n; i += 32) {
      part(w + i, weight + i);
      part(b + i, bias + i);
    }
  }
  template <bool Stream>
  FA_INLINE void normalise(const bf16* s, const Moments& m, bf16* y) const {
    const float shift = -m.mean * m.rstd;
    for (int64_t i = 0; i < n; i += 32) {
#pragma GCC unroll 8
      for (int v = 0; v < kWordVectors; ++v) {
        const U words = load_words(s + i + v * 2 * W);
        const float *w = weight + i + v * W, *b = bias + i + v * W;
        const U value = joined((even(words) * m.rstd + shift) * load(w) + load(b),
                               (odd(words) * m.rstd + shift) * load(w + 16) + load(b + 16));
        if constexpr (Stream) stream_words(y + i + v * 2 * W, value);
        else store_words(y + i + v * 2 * W, value);
      }
    }
  }

 private:
  static void part(const float* from, float* to) {
    F values[kNV], parts[kNV];
    for (int i = 0; i < kNV; ++i) values[i] = load(from + i * W);
    parted(values, parts);
    store_row(to, parts);
  }
};

// Rows that lie one after another; `room` is for 2 n floats. stream: whether y is stored past the caches, which only
// stores of whole lines are.
template <class T>
FA_INLINE void normalise_rows(const T* s, int64_t rows, int64_t n, const RowStatistics<T>* statistics,
                              const float* weight, const float* bias, float eps, bool stream, float* room, T* y) {
  const auto each = [&](auto whole, auto&& one) {
    for (int64_t r = 0; r < rows; ++r)
      one(s + r * n, statistics[r].template moments<decltype(whole)::value>(s + r * n, n, eps), y + r * n);
  };
  if constexpr (std::is_same_v<T, bf16>) {
    if (n % 32 == 0) {
      const PartedNorm norm(room, weight, bias, n);
      if (stream) each(std::true_type{}, [&](auto... row) { norm.template normalise<true>(row...); });
      else each(std::true_type{}, [&](auto... row) { norm.template normalise<false>(row...); });
      if (stream) end_of_stream();
      return;
    }
  }
  if constexpr (std::is_same_v<T, float>) {
    if (stream) {
      each(std::true_type{}, [&](const T* row, const Moments& m, T* to) {
        normalise<true, true>(row, n, m, weight, bias, to);
      });
      return end_of_stream();
    }
  }
  with_whole(n, [&](auto whole) {
    each(whole, [&](const T* row, const Moments& m, T* to) { normalise<whole>(row, n, m, weight, bias, to); });
  });
}

// Sums over rows run in two steps, so that a long sum rounds no worse than PyTorch's: kNear rows into `near`, those
// into `far`. Both have the length `size`.
constexpr int64_t kNear = 16;
struct RowSum {
  float *near, *far;
  int64_t size;
  void start() const { std::memset(near, 0, sizeof(float) * size); }
  void end_row(int64_t r, bool last) const {
    if ((r + 1) % kNear != 0 && !last) return;
    for (int64_t i = 0; i < size; i += W) {
      store_n(far + i, load_n(far + i, size - i) + load_n(near + i, size - i), size - i);
      store_n(near + i, F{}, size - i);
    }
  }
};
FA_INLINE void add_to(float* sum, F v, int64_t n) { store_n(sum, load_n(sum, n) + v, n); }

// ds of y = LN(s), into ds; adds this row's shares to dweight and dbias (both or neither).
template <bool Whole, bool Sums, class T>
FA_INLINE void norm_backward_row(const T* dy, const T* s_row, float* s, int64_t n, const float* weight, float eps,
                                 float* ds, float* dweight, float* dbias) {
  F total[4] = {}, sum_d[4] = {}, sum_dx[4] = {};
  four_chains(n, [&](int64_t i, int chain) {
    const F v = load_n<Whole>(s_row + i, n - i);
    total[chain] = total[chain] + v;
    store_n<Whole>(s + i, v, n - i);
  });
  const Moments m = row_moments<Whole>(s, n, sum4(total) / (float)n, eps);
  four_chains(n, [&](int64_t i, int chain) {
    const F x = (load_n<Whole>(s + i, n - i) - m.mean) * m.rstd, g = load_n<Whole>(dy + i, n - i);
    const F d = g * load_n<Whole>(weight + i, n - i);
    sum_d[chain] = sum_d[chain] + d;  // lanes past n hold zeros in g
    sum_dx[chain] = sum_dx[chain] + d * x;
    store_n<Whole>(s + i, x, n - i);
    store_n<Whole>(ds + i, d, n - i);
    if constexpr (Sums) {
      store_n<Whole>(dweight + i, load_n<Whole>(dweight + i, n - i) + g * x, n - i);
      store_n<Whole>(dbias + i, load_n<Whole>(dbias + i, n - i) + g, n - i);
    }
  });
  const float mean_d = sum4(sum_d) / (float)n, mean_dx = sum4(sum_dx) / (float)n;
  four_chains(n, [&](int64_t i, int) {
    const F d = load_n<Whole>(ds + i, n - i), x = load_n<Whole>(s + i, n - i);
    store_n<Whole>(ds + i, (d - mean_d - x * mean_dx) * m.rstd, n - i);
  });
}
// fn(whole, sums) with both as constants.
template <class Fn>
FA_INLINE void with_row_kind(int64_t n, bool sums, Fn&& fn) {
  with_whole(n, [&](auto whole) {
    if (sums) fn(whole, std::true_type{});
    else fn(whole, std::false_type{});
  });
}

// Rows [first, last) of bfloat16 whose columns are whole groups of 32, without dropout.
inline void add_norm_parted_rows(const AddNormForward& p, int64_t first, int64_t last) {
  const int64_t h = p.hidden;
  const PartedNorm norm(scratch().get<float>(0, 2 * h), p.norm_weight, p.norm_bias, h);
  bf16* sums = scratch().get<bf16>(1, h);
  for (int64_t at = first * h; at < last * h; at += h) {
    const bf16 *x = (const bf16*)p.x + at, *residual = p.residual ? (const bf16*)p.residual + at : nullptr;
    bf16* s = p.s ? (bf16*)p.s + at : sums;
    RowStatistics<bf16> chains[2];  // two, because a sum waits for the one before it
    for (auto& chain : chains) chain.start(s, h);
    for (int64_t i = 0; i < h; i += 2 * W) {
      U words = load_words(x + i);
      if (residual) {
        const U other = load_words(residual + i);
        words = joined(even(words) + even(other), odd(words) + odd(other));
      }
      store_words(s + i, words);
      chains[i / (2 * W) % 2].add(words);
    }
    chains[0].add(chains[1]);
    norm.normalise<false>(s, chains[0].moments<true>(s, h, p.eps), (bf16*)p.y + at);
  }
}

template <class T>
void add_norm_forward_rows(const AddNormForward& p, int64_t first, int64_t last) {
  const int64_t h = p.hidden;
  if constexpr (std::is_same_v<T, bf16>)
    if (h % 32 == 0 && !p.drop.on) return add_norm_parted_rows(p, first, last);
  float* sums = scratch().get<float>(0, h + W);
  int8_t* keep = p.drop.on ? scratch().get<int8_t>(1, h + 64) : nullptr;
  with_whole(h, [&](auto whole) {
    for (int64_t r = first; r < last; ++r) {
      if (keep) keep_row(r, h, p.drop, keep);
      const T* x = (const T*)p.x + r * h;
      const T* residual = p.residual ? (const T*)p.residual + r * h : nullptr;
      T* s = p.s ? (T*)p.s + r * h : nullptr;
      F total[4] = {};
      four_chains(h, [&](int64_t i, int chain) {
        F v = load_n<whole>(x + i, h - i);
        if (keep) v = dropped(v, keep + i, p.drop.keep_scale);
        if (residual) v = v + load_n<whole>(residual + i, h - i);
        v = rounded<T>(v);
        total[chain] = total[chain] + v;
        store_n<whole>(sums + i, v, h - i);
        if (s) store_n<whole>(s + i, v, h - i);
      });
      const Moments m = row_moments<whole>(sums, h, sum4(total) / (float)h, p.eps);
      normalise<whole>(sums, h, m, p.norm_weight, p.norm_bias, (T*)p.y + r * h);
    }
  });
}

template <class T>
void add_norm_forward_typed(const AddNormForward& p, Parallel parallel) {
  const int64_t tasks = std::min<int64_t>(p.rows, p.threads);
  parallel_for(parallel, tasks, [&](int64_t task) {
    add_norm_forward_rows<T>(p, p.rows * task / tasks, p.rows * (task + 1) / tasks);
  });
}

// Adds the rows' shares to `sums`, [2][hidden]: dweight, then dbias; null where nobody asks for them.
template <class T>
void add_norm_backward_rows(const AddNormBackward& p, int64_t first, int64_t last, float* sums_of_weights) {
  const int64_t h = p.hidden;
  float* s = scratch().get<float>(0, h + W);
  float* d = scratch().get<float>(1, h + W);
  int8_t* keep = p.drop.on ? scratch().get<int8_t>(2, h + 64) : nullptr;
  const RowSum sums{scratch().get<float>(3, 2 * h), sums_of_weights, sums_of_weights ? 2 * h : 0};
  sums.start();
  with_row_kind(h, sums_of_weights != nullptr, [&](auto whole, auto summed) {
    for (int64_t r = first; r < last; ++r) {
      norm_backward_row<whole, summed>((const T*)p.dy + r * h, (const T*)p.s + r * h, s, h, p.norm_weight, p.eps, d,
                                       sums.near, sums.near + h);
      sums.end_row(r - first, r + 1 == last);
      if (keep) keep_row(r, h, p.drop, keep);
      const T* ds = p.ds ? (const T*)p.ds + r * h : nullptr;
      T* dresidual = p.dresidual ? (T*)p.dresidual + r * h : nullptr;
      T* dx = p.dx ? (T*)p.dx + r * h : nullptr;
      four_chains(h, [&](int64_t i, int) {
        F v = load_n<whole>(d + i, h - i);
        if (ds) v = v + load_n<whole>(ds + i, h - i);
        if (dresidual) store_n<whole>(dresidual + i, v, h - i);
        if (keep) v = dropped(v, keep + i, p.drop.keep_scale);
        if (dx) store_n<whole>(dx + i, v, h - i);
      });
    }
  });
}

template <class T>
void add_norm_backward_typed(const AddNormBackward& p, Parallel parallel) {
  const int64_t h = p.hidden, tasks = std::max<int64_t>(1, std::min<int64_t>(p.rows, p.threads));
  float* parts = p.dnorm_weight ? scratch().get<float>(15, tasks * 2 * h) : nullptr;
  if (parts) std::memset(parts, 0, sizeof(float) * tasks * 2 * h);
  parallel_for(parallel, tasks, [&](int64_t task) {
    add_norm_backward_rows<T>(p, p.rows * task / tasks, p.rows * (task + 1) / tasks,
                              parts ? parts + task * 2 * h : nullptr);
  });
  if (parts) {
    ordered_sum(parts, tasks, h, 2 * h, p.dnorm_weight);
    ordered_sum(parts + h, tasks, h, 2 * h, p.dnorm_bias);
  }
}

template <class T>
void drop_typed(const Drop& p, Parallel parallel) {
  const int64_t tasks = std::min<int64_t>(p.rows, p.threads);
  parallel_for(parallel, tasks, [&](int64_t task) {
    int8_t* keep = scratch().get<int8_t>(0, p.cols + 64);
    for (int64_t r = p.rows * task / tasks; r < p.rows * (task + 1) / tasks; ++r) {
      keep_row(r, p.cols, p.drop, keep);
      for (int64_t i = 0; i < p.cols; i += W) {
        const F v = load_n((const T*)p.x + r * p.cols + i, p.cols - i);
        store_n((T*)p.y + r * p.cols + i, dropped(v, keep + i, p.drop.keep_scale), p.cols - i);
      }
    }
  });
}

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
template <bool Whole, class S, class T>
FA_INLINE void normalise(const S* s, int64_t n, const Moments& m, const float* weight, const float* bias, T* y) {
  four_chains(n, [&](int64_t i, int) {
    const F x = (load_n<Whole>(s + i, n - i) - m.mean) * m.rstd;
    store_n<Whole>(y + i, x * load_n<Whole>(weight + i, n - i) + load_n<Whole>(bias + i, n - i), n - i);
  });
}

// What a row's moments are made of, taken while its elements are in registers, 32 columns at a time.
template <class T>
struct RowStatistics {  // float: an estimate of the mean; the row is passed over again
  F total;
  FA_INLINE void add(bool first, const F (&v)[kNV], int64_t valid) {
    F t = first ? F{} : total;
    for (int i = 0; i < kNV; ++i) t = t + tail_zeroed(v[i], valid - i * W);
    total = t;
  }
  template <bool Whole>
  FA_INLINE Moments moments(const T* row, int64_t n, float eps) const {
    return row_moments<Whole>(row, n, sum(total) / (float)n, eps);
  }
};
// bfloat16: sums of distances from the mean of the first 32 columns, and of their squares, of elements as they are stored.
// Those 32 are part of the row, so the square of their distance from its mean is at most n / 32 variances: little cancels.
template <>
struct RowStatistics<bf16> {
  F total, squares;
  float origin;
  FA_INLINE void add(bool first, const F (&v)[kNV], int64_t valid) {
    F t = total, q = squares;
    if (first) {
      F all = F{};
      for (int i = 0; i < kNV; ++i) all = all + tail_zeroed(v[i], valid - i * W);
      origin = sum(all) / (float)std::min<int64_t>(32, valid);
      t = q = F{};
    }
#pragma GCC unroll 8
    for (int i = 0; i < kNV; ++i) {
      const F d = tail_zeroed(rounded<bf16>(v[i]) - origin, valid - i * W);
      t = t + d;
      q = q + d * d;
    }
    total = t;
    squares = q;
  }
  template <bool Whole>
  FA_INLINE Moments moments(const bf16*, int64_t n, float eps) const {
    const float shift = sum(total) / (float)n, variance = sum(squares) / (float)n - shift * shift;
    return {origin + shift, 1.0f / std::sqrt(std::max(variance, 0.0f) + eps)};
  }
};

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

template <class T>
void add_norm_forward_rows(const AddNormForward& p, int64_t first, int64_t last) {
  const int64_t h = p.hidden;
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

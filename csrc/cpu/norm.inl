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
    for (int64_t l = valid; l < W; ++l) v[l] = 0.0f;
  return v;
}
// Mean and reciprocal deviation of a row, given the mean's first estimate. A second pass, because E[s^2] - E[s]^2
// cancels; it also finds what rounding left in the estimate.
FA_INLINE Moments moments(const float* s, int64_t n, float estimate, float eps) {
  F left[4] = {}, squares[4] = {};
  four_chains(n, [&](int64_t i, int chain) {
    const F d = tail_zeroed(load_n(s + i, n - i) - estimate, n - i);
    left[chain] = left[chain] + d;
    squares[chain] = squares[chain] + d * d;
  });
  const float shift = sum4(left) / (float)n;
  return {estimate + shift, 1.0f / std::sqrt(sum4(squares) / (float)n - shift * shift + eps)};
}
template <class T>
FA_INLINE void normalise(const float* s, int64_t n, float mean, const float* weight, const float* bias, float eps, T* y) {
  const Moments m = moments(s, n, mean, eps);
  for (int64_t i = 0; i < n; i += W)
    store_n(y + i, (load_n(s + i, n - i) - m.mean) * m.rstd * load_n(weight + i, n - i) + load_n(bias + i, n - i), n - i);
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
template <class T>
FA_INLINE void norm_backward_row(const T* dy, const T* s_row, float* s, int64_t n, const float* weight, float eps,
                                 float* ds, float* dweight, float* dbias) {
  F total[4] = {}, sum_d[4] = {}, sum_dx[4] = {};
  four_chains(n, [&](int64_t i, int chain) {
    const F v = load_n(s_row + i, n - i);
    total[chain] = total[chain] + v;
    store_n(s + i, v, n - i);
  });
  const Moments m = moments(s, n, sum4(total) / (float)n, eps);
  const float mean = m.mean, rstd = m.rstd;
  four_chains(n, [&](int64_t i, int chain) {
    const F x = (load_n(s + i, n - i) - mean) * rstd, g = load_n(dy + i, n - i), d = g * load_n(weight + i, n - i);
    sum_d[chain] = sum_d[chain] + d;  // lanes past n hold zeros in g
    sum_dx[chain] = sum_dx[chain] + d * x;
    if (dweight) {
      add_to(dweight + i, g * x, n - i);
      add_to(dbias + i, g, n - i);
    }
  });
  const float mean_d = sum4(sum_d) / (float)n, mean_dx = sum4(sum_dx) / (float)n;
  for (int64_t i = 0; i < n; i += W) {
    const F x = (load_n(s + i, n - i) - mean) * rstd, d = load_n(dy + i, n - i) * load_n(weight + i, n - i);
    store_n(ds + i, (d - mean_d - x * mean_dx) * rstd, n - i);
  }
}

template <class T>
void add_norm_forward_typed(const AddNormForward& p, Parallel parallel) {
  const int64_t h = p.hidden, tasks = std::min<int64_t>(p.rows, p.threads);
  parallel_for(parallel, tasks, [&](int64_t task) {
    float* sums = scratch().get<float>(0, h + W);
    int8_t* keep = scratch().get<int8_t>(1, h + 64);
    for (int64_t r = p.rows * task / tasks; r < p.rows * (task + 1) / tasks; ++r) {
      if (p.drop.on) keep_row(r, h, p.drop, keep);
      F total[4] = {};
      four_chains(h, [&](int64_t i, int chain) {
        F v = load_n((const T*)p.x + r * h + i, h - i);
        if (p.drop.on) v = dropped(v, keep + i, p.drop.keep_scale);
        if (p.residual) v = v + load_n((const T*)p.residual + r * h + i, h - i);
        v = rounded<T>(v);
        total[chain] = total[chain] + v;
        store_n(sums + i, v, h - i);
        if (p.s) store_n((T*)p.s + r * h + i, v, h - i);
      });
      normalise(sums, h, sum4(total) / (float)h, p.norm_weight, p.norm_bias, p.eps, (T*)p.y + r * h);
    }
  });
}

template <class T>
void add_norm_backward_typed(const AddNormBackward& p, Parallel parallel) {
  const int64_t h = p.hidden, tasks = std::max<int64_t>(1, std::min<int64_t>(p.rows, p.threads));
  float* parts = p.dnorm_weight ? scratch().get<float>(15, tasks * 2 * h) : nullptr;
  if (parts) std::memset(parts, 0, sizeof(float) * tasks * 2 * h);
  parallel_for(parallel, tasks, [&](int64_t task) {
    float* s = scratch().get<float>(0, h + W);
    float* d = scratch().get<float>(1, h + W);
    int8_t* keep = scratch().get<int8_t>(2, h + 64);
    const RowSum sums{scratch().get<float>(3, 2 * h), parts ? parts + task * 2 * h : nullptr, parts ? 2 * h : 0};
    float* dweight = parts ? sums.near : nullptr;
    float* dbias = parts ? sums.near + h : nullptr;
    sums.start();
    const int64_t first = p.rows * task / tasks, last = p.rows * (task + 1) / tasks;
    for (int64_t r = first; r < last; ++r) {
      norm_backward_row((const T*)p.dy + r * h, (const T*)p.s + r * h, s, h, p.norm_weight, p.eps, d, dweight, dbias);
      sums.end_row(r - first, r + 1 == last);
      if (p.drop.on) keep_row(r, h, p.drop, keep);
      for (int64_t i = 0; i < h; i += W) {
        F v = load_n(d + i, h - i);
        if (p.ds) v = v + load_n((const T*)p.ds + r * h + i, h - i);
        if (p.dresidual) store_n((T*)p.dresidual + r * h + i, v, h - i);
        if (p.drop.on) v = dropped(v, keep + i, p.drop.keep_scale);
        if (p.dx) store_n((T*)p.dx + r * h + i, v, h - i);
      }
    }
  });
  if (p.dnorm_weight) {
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

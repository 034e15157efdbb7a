// LayerNorm of a row that is in the cache, its backward, and s = drop(x) + residual, y = LN(s).

struct Moments {
  float mean, rstd;
};
// Two passes, because E[s^2] - E[s]^2 cancels.
FA_INLINE Moments moments(const float* s, int64_t n, float eps) {
  F total = F{}, squares = F{};
  for (int64_t i = 0; i < n; i += W) total = total + load_n(s + i, n - i);
  const float mean = sum(total) / (float)n;
  for (int64_t i = 0; i < n; i += W) {
    F d = load_n(s + i, n - i) - mean;
    if (n - i < W)
      for (int64_t l = n - i; l < W; ++l) d[l] = 0.0f;
    squares = squares + d * d;
  }
  return {mean, 1.0f / std::sqrt(sum(squares) / (float)n + eps)};
}
template <class T>
FA_INLINE void normalise(const float* s, int64_t n, const float* weight, const float* bias, float eps, T* y) {
  const Moments m = moments(s, n, eps);
  for (int64_t i = 0; i < n; i += W)
    store_n(y + i, (load_n(s + i, n - i) - m.mean) * m.rstd * load_n(weight + i, n - i) + load_n(bias + i, n - i), n - i);
}
// ds of y = LN(s), into ds; adds this row's shares to dweight and dbias (both or neither).
template <class T>
FA_INLINE void norm_backward_row(const T* dy, const T* s_row, float* s, int64_t n, const float* weight, float eps,
                                 float* ds, float* dweight, float* dbias) {
  for (int64_t i = 0; i < n; i += W) store_n(s + i, load_n(s_row + i, n - i), n - i);
  const Moments m = moments(s, n, eps);
  F sum_d = F{}, sum_dx = F{};
  for (int64_t i = 0; i < n; i += W) {
    const F x = (load_n(s + i, n - i) - m.mean) * m.rstd, g = load_n(dy + i, n - i), d = g * load_n(weight + i, n - i);
    sum_d = sum_d + d;  // lanes past n hold zeros in g
    sum_dx = sum_dx + d * x;
    if (dweight) {
      store_n(dweight + i, load_n(dweight + i, n - i) + g * x, n - i);
      store_n(dbias + i, load_n(dbias + i, n - i) + g, n - i);
    }
  }
  const float mean_d = sum(sum_d) / (float)n, mean_dx = sum(sum_dx) / (float)n;
  for (int64_t i = 0; i < n; i += W) {
    const F x = (load_n(s + i, n - i) - m.mean) * m.rstd, d = load_n(dy + i, n - i) * load_n(weight + i, n - i);
    store_n(ds + i, (d - mean_d - x * mean_dx) * m.rstd, n - i);
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
      for (int64_t i = 0; i < h; i += W) {
        F v = load_n((const T*)p.x + r * h + i, h - i);
        if (p.drop.on) v = dropped(v, keep + i, p.drop.keep_scale);
        if (p.residual) v = v + load_n((const T*)p.residual + r * h + i, h - i);
        v = rounded<T>(v);
        store_n(sums + i, v, h - i);
        if (p.s) store_n((T*)p.s + r * h + i, v, h - i);
      }
      normalise(sums, h, p.norm_weight, p.norm_bias, p.eps, (T*)p.y + r * h);
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
    float* dweight = p.dnorm_weight ? parts + task * 2 * h : nullptr;
    float* dbias = dweight ? dweight + h : nullptr;
    for (int64_t r = p.rows * task / tasks; r < p.rows * (task + 1) / tasks; ++r) {
      norm_backward_row((const T*)p.dy + r * h, (const T*)p.s + r * h, s, h, p.norm_weight, p.eps, d, dweight, dbias);
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

// AdapterFusion's mix in the bottlenecks: scores of N adapters, their softmax, the activations weighted with it. Every
// row stays in the first-level cache from its scores to its mix, and the weights are made again in backward.

template <class T>
struct MixRow {
  const T *sigma, *t;
  float* p;  // [count], with room for a vector more
};

// fn(first element, how many are left) for every vector of b elements.
template <class Fn>
FA_INLINE void each_vector(int64_t b, Fn&& fn) {
  for (int64_t i = 0; i < b; i += W) fn(i, b - i);
}

// The softmax of the row's scores into row.p.
template <bool Whole, class T>
FA_INLINE void mix_weights(const Mix& p, int64_t r, const MixRow<T>& row, const int8_t* keep) {
  const int64_t n = p.count, b = p.b;
  const float shift = p.shift ? load_n((const T*)p.shift + r, 1)[0] : 0.0f;
  for (int64_t a = 0; a < n; ++a) {
    F total{};
    each_vector(b, [&](int64_t i, int64_t left) {  // lanes past b hold zeros
      total = total + load_n<Whole>(row.sigma + a * b + i, left) * load_n<Whole>(row.t + a * b + i, left);
    });
    row.p[a] = sum(total);
  }
  float most = -std::numeric_limits<float>::infinity();
  each_vector(n, [&](int64_t i, int64_t left) {
    F score = load(row.p + i) + load_n(row.t + n * b + i, left) + shift;
    if (keep) score = dropped(score, keep + i, p.drop.keep_scale);
    store(row.p + i, score);
  });
  for (int64_t a = 0; a < n; ++a) most = row.p[a] > most || row.p[a] != row.p[a] ? row.p[a] : most;
  float total = 0.0f;
  for (int64_t i = 0; i < n; i += W) store(row.p + i, exp(load(row.p + i) - most));
  for (int64_t a = 0; a < n; ++a) total += row.p[a];
  for (int64_t i = 0; i < n; i += W) store(row.p + i, load(row.p + i) / total);
}

template <class T, class Fn>
void mix_over_rows(const Mix& p, Parallel parallel, Fn&& fn) {
  const int64_t tasks = std::min<int64_t>(p.rows, p.threads), n = p.count, width = n * p.b;
  parallel_for(parallel, tasks, [&](int64_t task) {
    float* weights = scratch().get<float>(0, n + W);
    std::memset(weights, 0, sizeof(float) * (n + W));
    int8_t* keep = p.drop.on ? scratch().get<int8_t>(1, n + 64) : nullptr;
    with_whole(p.b, [&](auto whole) {
      for (int64_t r = p.rows * task / tasks; r < p.rows * (task + 1) / tasks; ++r) {
        if (keep) keep_row(r, n, p.drop, keep);
        const MixRow<T> row{(const T*)p.sigma + r * width, (const T*)p.t + r * (width + n), weights};
        mix_weights<whole>(p, r, row, keep);
        fn(whole, r, row, keep);
      }
    });
  });
}

template <class T>
void mix_forward_typed(const Mix& p, Parallel parallel) {
  const int64_t n = p.count, b = p.b;
  mix_over_rows<T>(p, parallel, [&](auto whole, int64_t r, const MixRow<T>& row, const int8_t*) {
    T* m = (T*)p.m + r * (n * b + n);
    for (int64_t a = 0; a < n; ++a)
      each_vector(b, [&](int64_t i, int64_t left) {
        store_n<whole>(m + a * b + i, load_n<whole>(row.sigma + a * b + i, left) * row.p[a], left);
      });
    each_vector(n, [&](int64_t i, int64_t left) { store_n(m + n * b + i, load(row.p + i), left); });
  });
}

template <class T>
void mix_backward_typed(const Mix& p, Parallel parallel) {
  const int64_t n = p.count, b = p.b;
  mix_over_rows<T>(p, parallel, [&](auto whole, int64_t r, const MixRow<T>& row, const int8_t* keep) {
    const T* dm = (const T*)p.m + r * (n * b + n);
    T *dsigma = (T*)p.dsigma + r * n * b, *dt = (T*)p.dt + r * (n * b + n);
    float* d = scratch().get<float>(2, n + W);  // dp, then the scores' gradients
    float mean = 0.0f;
    for (int64_t a = 0; a < n; ++a) {
      F total{};
      each_vector(b, [&](int64_t i, int64_t left) {
        total = total + load_n<whole>(dm + a * b + i, left) * load_n<whole>(row.sigma + a * b + i, left);
      });
      d[a] = sum(total) + load_n(dm + n * b + a, 1)[0];
      mean += d[a] * row.p[a];
    }
    float dshift = 0.0f;
    for (int64_t a = 0; a < n; ++a) {
      d[a] = keep && !keep[a] ? 0.0f : row.p[a] * (d[a] - mean) * (keep ? p.drop.keep_scale : 1.0f);
      dshift += d[a];
      each_vector(b, [&](int64_t i, int64_t left) {
        const F s = load_n<whole>(row.sigma + a * b + i, left), g = load_n<whole>(row.t + a * b + i, left);
        const F dmixed = load_n<whole>(dm + a * b + i, left);
        store_n<whole>(dsigma + a * b + i, dmixed * row.p[a] + g * d[a], left);
        store_n<whole>(dt + a * b + i, s * d[a], left);
      });
    }
    each_vector(n, [&](int64_t i, int64_t left) { store_n(dt + n * b + i, load(d + i), left); });
    if (p.dshift) store_n((T*)p.dshift + r, set1(dshift), 1);
  });
}

// y = drop(act(x [W_0; W_1; ..]^T + bias)) and its backward dx = (drop(dy) act'(z)) [W_0; W_1; ..].
//
// A task is a chunk of rows, or where rows are few a chunk of rows and a share of the columns: x's chunk is copied
// once into an A block, the panels of the weights pass by it, and the epilogue works on tiles that are still in L1.

// Rows in a chunk: x's chunk comes from the second or third level cache again for every panel.
inline int64_t chunk_rows(int64_t rows, int64_t kw) {
  constexpr int64_t words = 260 * 1024;
  if (rows <= 128) return rows;
  return std::max<int64_t>(28, std::min<int64_t>(168, words / kw));
}

struct Split {
  int64_t chunks, columns;  // tasks = chunks * columns
};
inline Split split(int64_t rows, int64_t kw, int64_t panels, int threads) {
  int64_t chunks = (rows + chunk_rows(rows, kw) - 1) / chunk_rows(rows, kw);
  if (chunks >= threads) {
    chunks = std::min(rows, (chunks + threads - 1) / threads * threads);
    return {chunks, 1};
  }
  return {chunks, std::min<int64_t>(panels, (threads + chunks - 1) / chunks)};
}

template <class T>
void keep_rows(int64_t first, int64_t rows, int64_t cols, const Dropout& d, int8_t* keep) {
  const int64_t stride = (cols + 63) / 64 * 64;
  for (int64_t r = 0; r < rows; ++r) keep_row(first + r, cols, d, keep + r * stride);
}

template <class T, Act A>
void linear_forward_chunk(const LinearForward& p, int64_t r0, int64_t rows, int64_t column, int64_t columns) {
  Scratch& s = scratch();
  const int64_t kw = words_of<T>(p.k);
  ABlock a{s.get<uint32_t>(0, ABlock::size(rows, kw)), padded_rows(rows)};
  float* c = s.get<float>(1, tile_scratch(rows));
  for (int64_t r = 0; r < rows; ++r) copy_row<T>(a, r, (const T*)p.x + (r0 + r) * p.k, p.k);
  const int64_t keep_stride = (p.n + 63) / 64 * 64;
  int8_t* keep = nullptr;
  if (p.drop.on) {
    keep = s.get<int8_t>(2, rows * keep_stride);
    keep_rows<T>(r0, rows, p.n, p.drop, keep);
  }
  const int64_t bytes = rows * p.k * (int64_t)sizeof(T);
  const void* next = r0 + 2 * rows <= p.rows ? (const T*)p.x + (r0 + rows) * p.k : nullptr;
  int64_t offset = 0;
  for (int w = 0; w < p.count; ++w) {
    const int64_t n = p.weights[w].n, panels = (n + 31) / 32;
    product<T>(a, rows, passes_of<T>(p.weights[w]), panels * column / columns, panels * (column + 1) / columns, c,
               [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
      if (w == 0) prefetch(next, bytes, panel * rows + m, panel * rows + m + mr, panels * rows);
      for (int v = 0; v < kNV; ++v) {
        const int64_t local = panel * 32 + v * W, valid = n - local, col = offset + local;
        if (valid <= 0) break;
        const F bias = p.bias ? load_n(p.bias + col, valid) : F{};
        const float* from = tile + v * W;
        T* y = (T*)p.y + (r0 + m) * p.n + col;
        T* z = p.z ? (T*)p.z + (r0 + m) * p.n + col : nullptr;
        uint8_t* code = p.code ? p.code + (r0 + m) * p.n + col : nullptr;
        // The common cases apart: nothing but arithmetic in their loops.
        if (valid >= W && !keep && !z && !code) {
#pragma GCC unroll 4
          for (int64_t r = 0; r < mr; ++r) store(y + r * p.n, act<A>(load(from + r * 32) + bias));
          continue;
        }
        if (valid >= W && !keep && code) {
#pragma GCC unroll 4
          for (int64_t r = 0; r < mr; ++r) {
            const F before = load(from + r * 32) + bias;
            store(y + r * p.n, act<A>(before));
            store_code(code + r * p.n, d_act<A>(before), W);
          }
          continue;
        }
        if (valid >= W && keep && A == Act::none && p.n % 32 == 0) {
          const int8_t* kept = keep + m * keep_stride + col;
          for (int64_t r = 0; r < mr; ++r)
            store(y + r * p.n, dropped(rounded<T>(load(from + r * 32) + bias), kept + r * keep_stride, p.drop.keep_scale));
          continue;
        }
        for (int64_t r = 0; r < mr; ++r) {
          const F before = rounded<T>(load(from + r * 32) + bias);
          if (z) store_n(z + r * p.n, before, valid);
          if (code) store_code(code + r * p.n, d_act<A>(before), valid);
          F after = act<A>(before);
          if (keep) {
            int8_t lanes[W];  // several weights may start inside a block of 64
            std::memcpy(lanes, keep + (m + r) * keep_stride + col, (size_t)std::min<int64_t>(W, valid));
            after = dropped(rounded<T>(after), lanes, p.drop.keep_scale);
          }
          store_n(y + r * p.n, after, valid);
        }
      }
    });
    offset += n;
  }
}

template <class T, Act A>
void linear_backward_chunk(const LinearBackward& p, int64_t r0, int64_t rows, int64_t column, int64_t columns,
                           float* dbias) {
  Scratch& s = scratch();
  int64_t kw = 0;  // every weight's k starts a new block
  for (int w = 0; w < p.count; ++w) kw += (words_of<T>(p.weights[w].k) + kBlock - 1) / kBlock * kBlock;
  ABlock a{s.get<uint32_t>(0, ABlock::size(rows, kw)), padded_rows(rows)};
  float* c = s.get<float>(1, tile_scratch(rows));
  const int64_t keep_stride = (p.k + 63) / 64 * 64;
  int8_t* keep = p.drop.on ? s.get<int8_t>(2, keep_stride) : nullptr;
  if (dbias) std::memset(dbias, 0, sizeof(float) * p.k);
  const RowSum sums{scratch().get<float>(3, p.k), dbias, dbias ? p.k : 0};
  sums.start();
  for (int64_t r = 0; r < rows; ++r) {
    if (keep) keep_row(r0 + r, p.k, p.drop, keep);
    int64_t col = 0, base = 0;
    for (int w = 0; w < p.count; ++w) {
      const int64_t k = p.weights[w].k;
      ABlock part{a.words + base / kBlock * a.rows * kStride, a.rows};
      for (int64_t i = 0; i < k; i += W) {
        const int64_t at = (r0 + r) * p.k + col + i;
        F d = load_n((const T*)p.dy + at, k - i);
        if (keep) {
          int8_t lanes[W];
          std::memcpy(lanes, keep + col + i, (size_t)std::min<int64_t>(W, k - i));
          d = dropped(d, lanes, p.drop.keep_scale);
        }
        if constexpr (A != Act::none)
          d = d * (p.code ? load_code(p.code + at, k - i) : d_act<A>(load_n((const T*)p.z + at, k - i)));
        if (dbias) add_to(sums.near + col + i, d, k - i);
        if (p.dx) put<T>(part, r, i, d, k - i);
      }
      if (p.dx) pad_row<T>(part, r, k);
      col += k;
      base += (words_of<T>(k) + kBlock - 1) / kBlock * kBlock;
    }
    sums.end_row(r, r + 1 == rows);
  }
  if (!p.dx) return;
  Passes<T> passes;
  for (int w = 0; w < p.count; ++w) {
    const int64_t words = words_of<T>(p.weights[w].k);
    passes.add(p.weights[w].words, words * 32, 32, words);
  }
  const int64_t panels = (p.n + 31) / 32, elements = rows * p.k, at = r0 * p.k + elements;
  const bool more = r0 + 2 * rows <= p.rows;
  const void* next_dy = more ? (const T*)p.dy + at : nullptr;
  const void* next_code = more && p.code ? p.code + at : nullptr;
  const void* next_z = more && p.z ? (const T*)p.z + at : nullptr;
  product<T>(a, rows, passes, panels * column / columns, panels * (column + 1) / columns, c,
             [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
    const int64_t from = panel * rows + m, to = from + mr;
    prefetch(next_dy, elements * (int64_t)sizeof(T), from, to, panels * rows);
    prefetch(next_code, elements, from, to, panels * rows);
    prefetch(next_z, elements * (int64_t)sizeof(T), from, to, panels * rows);
    for (int v = 0; v < kNV; ++v) {
      const int64_t col = panel * 32 + v * W;
      if (col >= p.n) break;
      for (int64_t r = 0; r < mr; ++r)
        store_n((T*)p.dx + (r0 + m + r) * p.n + col, load(tile + r * 32 + v * W), p.n - col);
    }
  });
}

template <class T>
void linear_forward_typed(const LinearForward& p, Parallel parallel) {
  with_act(p.act, [&](auto a) {
    const Split s = split(p.rows, words_of<T>(p.k), (p.n + 31) / 32, p.threads);
    parallel_for(parallel, s.chunks * s.columns, [&](int64_t task) {
      const int64_t chunk = task / s.columns, r0 = p.rows * chunk / s.chunks, r1 = p.rows * (chunk + 1) / s.chunks;
      linear_forward_chunk<T, a.value>(p, r0, r1 - r0, task % s.columns, s.columns);
    });
  });
}

template <class T>
void linear_backward_typed(const LinearBackward& p, Parallel parallel) {
  with_act(p.act, [&](auto a) {
    const Split s = split(p.rows, words_of<T>(p.k), (p.n + 31) / 32, p.threads);
    float* parts = p.dbias ? scratch().get<float>(15, s.chunks * p.k) : nullptr;
    parallel_for(parallel, s.chunks * s.columns, [&](int64_t task) {
      const int64_t chunk = task / s.columns, column = task % s.columns;
      const int64_t r0 = p.rows * chunk / s.chunks, r1 = p.rows * (chunk + 1) / s.chunks;
      float* dbias = p.dbias && column == 0 ? parts + chunk * p.k : nullptr;
      linear_backward_chunk<T, a.value>(p, r0, r1 - r0, column, s.columns, dbias);
    });
    if (p.dbias) ordered_sum(parts, s.chunks, p.k, p.k, p.dbias);
  });
}

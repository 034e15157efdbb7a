// s = drop(scale (act(x W_down^T + b_down) W_up^T + b_up)) + [x] + [residual], y = LN(s), and its backward.
//
// A block of rows is read once: it stays in the second-level cache through both products, the sums and the LayerNorm.

constexpr int64_t kRows = 56;  // rows in a block: four tiles of 14

template <class T, Act A>
void bottleneck_forward_block(const BottleneckForward& p, int64_t r0, int64_t rows) {
  Scratch& scr = scratch();
  const int64_t h = p.hidden, b = p.b, stride = (h + 31) / 32 * 32 + 16, keep_stride = (h + 63) / 64 * 64;
  ABlock x{scr.get<uint32_t>(0, ABlock::size(rows, words_of<T>(h))), padded_rows(rows)};
  ABlock a{scr.get<uint32_t>(1, ABlock::size(rows, words_of<T>(b))), padded_rows(rows)};
  float* c = scr.get<float>(2, tile_scratch(rows));
  float* sums = scr.get<float>(3, (rows + 32) * stride);
  int8_t* keep = nullptr;
  if (p.drop.on) {
    keep = scr.get<int8_t>(4, rows * keep_stride);
    keep_rows<T>(r0, rows, h, p.drop, keep);
  }
  for (int64_t r = 0; r < rows; ++r) {
    copy_row<T>(x, r, (const T*)p.x + (r0 + r) * h, h);
    pad_row<T>(a, r, b);
  }
  product<T>(x, rows, passes_of<T>(p.down), 0, (b + 31) / 32, c, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
    for (int v = 0; v < kNV; ++v) {
      const int64_t col = panel * 32 + v * W;
      if (col >= b) break;
      const F bias = p.b_down ? load_n(p.b_down + col, b - col) : F{};
      for (int64_t r = 0; r < mr; ++r) {
        const F z = rounded<T>(load(tile + r * 32 + v * W) + bias);
        if (p.z) store_n((T*)p.z + (r0 + m + r) * b + col, z, b - col);
        put<T>(a, m + r, col, act<A>(z), b - col);
      }
    }
  });
  // While this product computes, memory brings what is read next: the residual, and the next block of x.
  const int64_t panels = (h + 31) / 32, bytes = rows * h * (int64_t)sizeof(T);
  const T* residual = p.residual ? (const T*)p.residual + r0 * h : nullptr;
  const T* next = r0 + 2 * rows <= p.rows ? (const T*)p.x + (r0 + rows) * h : nullptr;
  product_into<T>(a, rows, passes_of<T>(p.up), panels, c, sums, stride, [&](int64_t panel) {
    prefetch(residual, bytes, panel, panel + 1, panels);
    prefetch(next, bytes, panel, panel + 1, panels);
  });
  with_whole(h, [&](auto whole) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (r0 + r) * h;
      float* sum_row = sums + r * stride;
      const T* x_row = p.skip ? (const T*)p.x + at : nullptr;
      const T* residual_row = residual ? residual + r * h : nullptr;
      const int8_t* keep_row = keep ? keep + r * keep_stride : nullptr;
      T* s_row = p.s ? (T*)p.s + at : nullptr;
      T* y_row = (T*)p.y + at;
      F total[4] = {};
      four_chains(h, [&](int64_t i, int chain) {
        const int64_t n = h - i;
        F s = load(sum_row + i);
        if (p.b_up) s = s + load_n<whole>(p.b_up + i, n);
        s = s * p.factor;
        if (p.scale) s = s * load_n<whole>(p.scale + i, n);
        if (keep_row) s = dropped(s, keep_row + i, p.drop.keep_scale);
        if (x_row) s = s + load_n<whole>(x_row + i, n);
        if (residual_row) s = s + load_n<whole>(residual_row + i, n);
        if (!p.norm_weight) return store_n<whole>(y_row + i, s, n);
        s = rounded<T>(s);
        if constexpr (!whole) s = tail_zeroed(s, n);
        total[chain] = total[chain] + s;
        store(sum_row + i, s);
        if (s_row) store_n<whole>(s_row + i, s, n);
      });
      if (p.norm_weight)
        normalise<whole>(sum_row, h, sum4(total) / (float)h, p.norm_weight, p.norm_bias, p.eps, y_row);
    }
  });
}

template <class T>
void bottleneck_forward_typed(const BottleneckForward& p, Parallel parallel) {
  with_act(p.act, [&](auto a) {
    int64_t blocks = (p.rows + kRows - 1) / kRows;
    blocks = std::min(p.rows, (blocks + p.threads - 1) / p.threads * p.threads);
    parallel_for(parallel, blocks, [&](int64_t block) {
      const int64_t r0 = p.rows * block / blocks, r1 = p.rows * (block + 1) / blocks;
      bottleneck_forward_block<T, a.value>(p, r0, r1 - r0);
    });
  });
}

// One part's share of the parameters' gradients; matrices are [b, columns]. `vectors` are b_up's and the norm's weight
// and bias, as far as they are asked for.
struct BottleneckGrads {
  float *down, *up, *b_down, *vectors;
  int64_t columns, vectors_size;
};

template <class T, Act A>
void bottleneck_backward_block(const BottleneckBackward& p, int64_t r0, int64_t rows, const BottleneckGrads& grads) {
  Scratch& scr = scratch();
  const int64_t h = p.hidden, b = p.b, hp = (h + 31) / 32 * 32, bp = (b + 31) / 32 * 32;
  const bool weights = p.dw_down != nullptr;
  ABlock d{scr.get<uint32_t>(0, ABlock::size(rows, words_of<T>(h))), padded_rows(rows)};
  ABlock dh{scr.get<uint32_t>(1, ABlock::size(rows, words_of<T>(b))), padded_rows(rows)};
  float* c = scr.get<float>(2, tile_scratch(std::max(rows, b)));
  float* ds = scr.get<float>(3, rows * hp);
  float* g = p.drop.on ? scr.get<float>(4, rows * hp) : ds;
  float* s = scr.get<float>(5, h + W);
  int8_t* keep = p.drop.on ? scr.get<int8_t>(6, h + 64) : nullptr;

  const RowSum sums{scr.get<float>(12, grads.vectors_size), grads.vectors, grads.vectors_size};
  float* sum_b_up = weights ? sums.near : nullptr;
  float* sum_norm = p.dnorm_weight ? sums.near + (weights ? hp : 0) : nullptr;
  sums.start();
  with_row_kind(h, p.dnorm_weight != nullptr, [&](auto whole, auto summed) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (r0 + r) * h;
      float* ds_row = ds + r * hp;
      float* g_row = g + r * hp;
      const T* dy_row = (const T*)p.dy + at;
      T* dresidual = p.dresidual ? (T*)p.dresidual + at : nullptr;
      if (p.norm_weight)
        norm_backward_row<whole, summed>(dy_row, (const T*)p.s + at, s, h, p.norm_weight, p.eps, ds_row, sum_norm,
                                         summed ? sum_norm + hp : nullptr);
      else
        four_chains(h, [&](int64_t i, int) { store_n<whole>(ds_row + i, load_n<whole>(dy_row + i, h - i), h - i); });
      if (keep) keep_row(r0 + r, h, p.drop, keep);
      four_chains(h, [&](int64_t i, int) {
        const int64_t n = h - i;
        F v = load_n<whole>(ds_row + i, n);
        if (dresidual) store_n<whole>(dresidual + i, v, n);
        if (keep) {
          v = dropped(v, keep + i, p.drop.keep_scale);
          store_n<whole>(g_row + i, v, n);
        }
        if (sum_b_up) store_n<whole>(sum_b_up + i, load_n<whole>(sum_b_up + i, n) + v, n);
        v = v * p.factor;
        if (p.scale) v = v * load_n<whole>(p.scale + i, n);
        put<T>(d, r, i, v, whole ? W : n);
      });
      pad_row<T>(d, r, h);
      pad_row<T>(dh, r, b);
      for (int64_t i = h; i < hp; ++i) ds_row[i] = g_row[i] = 0.0f;
      sums.end_row(r, r + 1 == rows);
    }
  });

  // While the products compute, memory brings what is read after them: x, and the next block of dy and s.
  const int64_t bytes = rows * h * (int64_t)sizeof(T);
  const bool more = r0 + 2 * rows <= p.rows;
  const void* next_dy = more ? (const T*)p.dy + (r0 + rows) * h : nullptr;
  const void* next_s = more && p.s ? (const T*)p.s + (r0 + rows) * h : nullptr;
  const void* own_x = weights && p.x ? (const T*)p.x + r0 * h : nullptr;

  float* dh_rows = weights ? scr.get<float>(7, rows * bp) : nullptr;
  float* a_rows = weights ? scr.get<float>(8, rows * bp) : nullptr;
  product<T>(d, rows, passes_of<T>(p.up_t), 0, bp / 32, c, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
    prefetch(own_x, bytes, panel * rows + m, panel * rows + m + mr, bp / 32 * rows);
    for (int v = 0; v < kNV; ++v) {
      const int64_t col = panel * 32 + v * W;
      if (col >= b) break;
      F total = F{};
      for (int64_t r = 0; r < mr; ++r) {
        const F z = load_n((const T*)p.z + (r0 + m + r) * b + col, b - col);
        const F value = rounded<T>(load(tile + r * 32 + v * W) * d_act<A>(z));
        put<T>(dh, m + r, col, value, b - col);
        if (weights) {
          total = total + value;
          store(dh_rows + (m + r) * bp + col, value);
          store(a_rows + (m + r) * bp + col, rounded<T>(act<A>(z)));
        }
      }
      if (weights) add_to(grads.b_down + col, total, b - col);
    }
  });

  if (p.dx) {
    float* dx = scr.get<float>(11, (rows + 32) * hp);
    product_into<T>(dh, rows, passes_of<T>(p.down_t), hp / 32, c, dx, hp, [&](int64_t panel) {
      prefetch(next_dy, bytes, panel, panel + 1, hp / 32);
      prefetch(next_s, bytes, panel, panel + 1, hp / 32);
    });
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < h; i += W) {
        F value = load(dx + r * hp + i);
        if (p.skip) value = value + load(ds + r * hp + i);
        store_n((T*)p.dx + (r0 + r) * h + i, value, h - i);
      }
  }
  if (!weights) return;

  // Products over the block's rows, in float whatever T is: [b, rows] by [rows, H].
  ABlock left{scr.get<uint32_t>(9, ABlock::size(b, rows)), padded_rows(b)};
  auto add_product = [&](const float* rows_of_left, const float* right, int64_t ldb, float* out) {
    transpose(rows_of_left, bp, rows, b, (float*)left.words, kStride);
    Passes<float> k;
    k.add((const uint32_t*)right, 32, ldb, rows);
    product<float>(left, b, k, 0, hp / 32, c, [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
      for (int64_t r = 0; r < mr; ++r)
        for (int v = 0; v < kNV; ++v) {
          float* to = out + (m + r) * grads.columns + panel * 32 + v * W;
          store(to, load(to) + load(tile + r * 32 + v * W));
        }
    });
  };
  add_product(a_rows, g, hp, grads.up);
  if (!p.x) return;
  const float* x = (const float*)p.x + r0 * h;
  if (!std::is_same_v<T, float> || hp != h) {
    float* wide = scr.get<float>(10, rows * hp);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < hp; i += W)
        store(wide + r * hp + i, i < h ? load_n((const T*)p.x + (r0 + r) * h + i, h - i) : F{});
    x = wide;
  }
  add_product(dh_rows, x, hp, grads.down);
}

template <class T>
void bottleneck_backward_typed(const BottleneckBackward& p, Parallel parallel) {
  const int64_t h = p.hidden, b = p.b, hp = (h + 31) / 32 * 32;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(p.rows, p.threads));
  const int64_t matrix = p.dw_down ? b * hp : 0, wide = p.dw_down ? hp : 0, narrow = p.dw_down ? b + W : 0;
  const int64_t norm = p.dnorm_weight ? hp : 0, size = 2 * matrix + wide + narrow + 2 * norm;
  float* shares = scratch().get<float>(15, parts * size + 16);
  parallel_for(parallel, parts, [&](int64_t part) {
    float* base = shares + part * size;
    std::memset(base, 0, sizeof(float) * size);
    const BottleneckGrads grads{base, base + matrix, base + 2 * matrix, base + 2 * matrix + narrow, hp, wide + 2 * norm};
    const int64_t first = p.rows * part / parts, last = p.rows * (part + 1) / parts;
    const int64_t blocks = (last - first + kRows - 1) / kRows;
    with_act(p.act, [&](auto a) {
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t r0 = first + (last - first) * i / blocks, r1 = first + (last - first) * (i + 1) / blocks;
        bottleneck_backward_block<T, a.value>(p, r0, r1 - r0, grads);
      }
    });
  });
  if (p.dw_down) {
    for (int64_t i = 0; i < b; ++i) ordered_sum(shares + i * hp, parts, h, size, p.dw_down + i * h);
    ordered_sum(shares + matrix, parts, matrix, size, shares + matrix);
    transpose(shares + matrix, hp, b, h, p.g_up, b);
    ordered_sum(shares + 2 * matrix, parts, b, size, p.db_down);
    ordered_sum(shares + 2 * matrix + narrow, parts, h, size, p.g_bias);
  }
  if (norm) {
    ordered_sum(shares + 2 * matrix + narrow + wide, parts, h, size, p.dnorm_weight);
    ordered_sum(shares + 2 * matrix + narrow + wide + norm, parts, h, size, p.dnorm_bias);
  }
}

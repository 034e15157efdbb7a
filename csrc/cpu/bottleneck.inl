// s = drop(scale (act(x W_down^T + b_down) W_up^T + b_up)) + [x] + [residual], y = LN(s), and its backward.
//
// A block of rows is read once: it stays in the second-level cache through both products, the sums and the LayerNorm.

constexpr int64_t kRows = kBottleneckRows;

// s = drop(scale (c + b_up)) + [x] + [residual] of 32 columns, or those that there are, for some rows; c is the product's
// tile, whose columns are parted for bfloat16. Pointers are to the first row's first column.
template <class T>
struct SumColumns {
  const T *x, *residual;  // or null
  const int8_t* keep;     // or null
  T* s;
  int64_t h, keep_stride;
  float keep_scale;
  bool first;               // whether they are the first 32 columns of their rows
  F scale[kNV], bias[kNV];  // bias times scale, in the order of memory

  // All 32. Common: with both x and residual, without dropout; there is nothing but arithmetic in its loop.
  template <bool Common>
  FA_INLINE void whole(int64_t rows, const float* c, RowStatistics<T>* statistics) const {
    if constexpr (std::is_same_v<T, bf16>) {
      F scales[kNV], biases[kNV];
      parted(scale, scales);
      parted(bias, biases);
      for (int64_t r = 0; r < rows; ++r) {
        if (first) statistics[r].start(s + r * h, 32);
#pragma GCC unroll 8
        for (int v = 0; v < kWordVectors; ++v) {
          const int64_t at = r * h + v * 2 * W;
          F evens = load(c + r * 32 + v * W) * scales[v] + biases[v];
          F odds = load(c + r * 32 + 16 + v * W) * scales[v + kWordVectors] + biases[v + kWordVectors];
          if (!Common && keep) drop_parted(evens, odds, keep + r * keep_stride + v * 2 * W, keep_scale);
          for (const T* term : {x, residual}) {
            if (!Common && !term) continue;
            const U words = load_words(term + at);
            evens = evens + even(words);
            odds = odds + odd(words);
          }
          const U sums = joined(evens, odds);
          store_words(s + at, sums);
          statistics[r].add(sums);
        }
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        F sums[kNV];
#pragma GCC unroll 8
        for (int v = 0; v < kNV; ++v) {
          const int64_t at = r * h + v * W;
          sums[v] = load(c + r * 32 + v * W) * scale[v] + bias[v];
          if (!Common && keep) sums[v] = dropped(sums[v], keep + r * keep_stride + v * W, keep_scale);
          if (Common || x) sums[v] = sums[v] + load(x + at);
          if (Common || residual) sums[v] = sums[v] + load(residual + at);
        }
        store_row(s + r * h, sums);
        if (first) statistics[r].start(s + r * h, 32);
        statistics[r].add(s + r * h, 32);
      }
    }
  }
  void some(int64_t rows, int64_t columns, const float* c, RowStatistics<T>* statistics) const {
    for (int64_t r = 0; r < rows; ++r) {
      F tile[kNV], sums[kNV];
      for (int v = 0; v < kNV; ++v) tile[v] = load(c + r * 32 + v * W);
      if constexpr (std::is_same_v<T, bf16>) unparted(tile, sums);
      else std::copy(tile, tile + kNV, sums);
      for (int v = 0; v < kNV && v * W < columns; ++v) {
        const int64_t at = r * h + v * W, n = columns - v * W;
        F sum = sums[v] * scale[v] + bias[v];
        if (keep) sum = dropped_n(sum, keep + r * keep_stride + v * W, keep_scale, n);
        if (x) sum = sum + load_n(x + at, n);
        if (residual) sum = sum + load_n(residual + at, n);
        store_n(s + at, sum, n);
      }
      if (first) statistics[r].start(s + r * h, columns);
      statistics[r].add(s + r * h, columns);
    }
  }
};

// act(c + b_down) of 32 columns, or those that there are, for some rows of a block; c is the product's tile. A function for
// every activation: the products around it are compiled once for all of them.
template <class T>
struct Middle {
  const BottleneckForward& p;
  int64_t r0;  // the block's first row
  const ABlock& a;

  template <Act A>
  static void rows(const Middle& of, int64_t panel, int64_t m, int64_t mr, const float* tile) {
    const BottleneckForward& p = of.p;
    for (int v = 0; v < kNV; ++v) {
      const int64_t col = panel * 32 + v * W, n = p.b - col;
      if (n <= 0) break;
      const F bias = p.b_down ? load_n(p.b_down + col, n) : F{};
      for (int64_t r = 0; r < mr; ++r) {
        const F z = rounded<T>(load(tile + r * 32 + v * W) + bias);
        if (p.z) store_n((T*)p.z + (of.r0 + m + r) * p.z_stride + col, z, n);
        put<Multiplied<T>>(of.a, m + r, col, act_as<T, A>(z), n);
      }
    }
  }
};

// next: how many of the rows after these the same thread takes then; weights_far: whether W_down and W_up may be far away.
template <class T>
void bottleneck_forward_block(const BottleneckForward& p, int64_t r0, int64_t rows, int64_t next, bool weights_far) {
  using M = Multiplied<T>;
  Scratch& scr = scratch();
  const int64_t h = p.hidden, b = p.b, keep_stride = (h + 63) / 64 * 64;
  ABlock x{scr.get<uint32_t>(0, ABlock::size(rows, words_of<M>(h))), padded_rows(rows)};
  ABlock a{scr.get<uint32_t>(1, ABlock::size(rows, words_of<M>(b))), padded_rows(rows)};
  float* c = scr.get<float>(2, tile_scratch(rows));
  int8_t* keep = nullptr;
  if (p.drop.on) {
    keep = scr.get<int8_t>(4, rows * keep_stride);
    keep_rows(r0, rows, h, p.drop, keep);
  }
  const bool direct = in_place<M>(rows, h, b);
  for (int64_t r = 0; r < rows; ++r) {
    if (!direct) copy_row<M>(x, r, (const T*)p.x + (r0 + r) * h, h);
    pad_row<M>(a, r, b);
  }
  const int64_t panels_down = (b + 31) / 32, panels = (h + 31) / 32, bytes = rows * h * (int64_t)sizeof(T);
  const T* residual = p.residual ? (const T*)p.residual + r0 * h : nullptr;
  // While the products compute, memory brings what is read after them: the residual, then the next block of x.
  Ahead after_down(weights_far), after_up(weights_far);
  after_down.add(residual, bytes);
  after_up.add((const T*)p.x + (r0 + rows) * h, next * h * (int64_t)sizeof(T));
  const Middle<T> middle{p, r0, a};
  const auto rows_of = for_act(p.act, [](auto act) { return &Middle<T>::template rows<act.value>; });
  with_rows<M>(direct, (const T*)p.x + r0 * h, h, x, [&](const auto& from) {
    product<M>(from, rows, passes_of<M>(p.down), 0, panels_down, c, after_down,
               [&](int64_t panel, int64_t m, int64_t mr, const float* tile) { rows_of(middle, panel, m, mr, tile); });
  });
  // s is kept in the cache where nothing saves it; its rows' sums come from the product's epilogue.
  T* s = !p.norm_weight ? (T*)p.y + r0 * h : p.s ? (T*)p.s + r0 * h : scr.get<T>(5, rows * h);
  RowStatistics<T>* statistics = scr.get<RowStatistics<T>>(3, rows);
  auto sums_of = [&](int64_t panel, int64_t m, int64_t mr, const float* tile) {
    const int64_t at = m * h + panel * 32, left = h - panel * 32;
    SumColumns<T> columns{p.skip ? (const T*)p.x + r0 * h + at : nullptr,
                          residual ? residual + at : nullptr,
                          keep ? keep + m * keep_stride + panel * 32 : nullptr,
                          s + at,
                          h,
                          keep_stride,
                          p.drop.keep_scale,
                          panel == 0,
                          {},
                          {}};
    for (int v = 0; v < kNV; ++v) {
      const int64_t col = panel * 32 + v * W, n = h - col;
      columns.scale[v] = p.scale && n > 0 ? load_n(p.scale + col, n) * p.factor : set1(p.factor);
      columns.bias[v] = p.b_up && n > 0 ? load_n(p.b_up + col, n) * columns.scale[v] : F{};
    }
    if (left < 32) columns.some(mr, left, tile, statistics + m);
    else if (columns.x && columns.residual && !keep) columns.template whole<true>(mr, tile, statistics + m);
    else columns.template whole<false>(mr, tile, statistics + m);
  };
  product<M>(a, rows, passes_of<M>(p.up), 0, panels, c, after_up, sums_of);
  if (!p.norm_weight) return;
  const bool stream = streams(p.y, p.rows, h * (int64_t)sizeof(T));
  normalise_rows(s, rows, h, statistics, p.norm_weight, p.norm_bias, p.eps, stream, scr.get<float>(6, 2 * h),
                 (T*)p.y + r0 * h);
}

template <class T>
void bottleneck_forward_typed(const BottleneckForward& p, Parallel parallel) {
  using M = Multiplied<T>;
  int64_t blocks = (p.rows + kRows - 1) / kRows;
  blocks = std::min(p.rows, (blocks + p.threads - 1) / p.threads * p.threads);
  parallel_for(parallel, blocks, [&](int64_t block) {
    const int64_t r0 = part_start<M>(p.rows, block, blocks), r1 = part_start<M>(p.rows, block + 1, blocks);
    const int64_t next = has_next(block, blocks, p.threads) ? part_start<M>(p.rows, block + 2, blocks) - r1 : 0;
    bottleneck_forward_block<T>(p, r0, r1 - r0, next, begins_share(block, blocks, p.threads));
  });
}

// One part's share of the parameters' gradients; matrices are [b, columns]. `vectors` are b_up's and the norm's weight
// and bias, as far as they are asked for.
struct BottleneckGrads {
  float *down, *up, *b_down, *vectors;
  int64_t columns, vectors_size;
};

// dz = c act'(z) of 32 columns, or those that there are, for some rows of a block, and where matrices have gradients act(z)
// and b_down's.
template <class T>
struct MiddleBackward {
  const BottleneckBackward& p;
  int64_t r0;  // the block's first row
  const ABlock& dz;
  float *dz_rows, *a_rows, *b_down;  // or null; rows bp apart
  int64_t bp;

  template <Act A>
  static void rows(const MiddleBackward& of, int64_t panel, int64_t m, int64_t mr, const float* tile) {
    for (int v = 0; v < kNV; ++v) {
      const int64_t col = panel * 32 + v * W, n = of.p.b - col;
      if (n <= 0) break;
      F total = F{};
      for (int64_t r = 0; r < mr; ++r) {
        const F z = load_n((const T*)of.p.z + (of.r0 + m + r) * of.p.z_stride + col, n);
        const F value = rounded<T>(load(tile + r * 32 + v * W) * d_act<A>(z));
        put<Multiplied<T>>(of.dz, m + r, col, value, n);
        if (!of.b_down) continue;
        total = total + value;
        store(of.dz_rows + (m + r) * of.bp + col, value);
        store(of.a_rows + (m + r) * of.bp + col, rounded<T>(act<A>(z)));
      }
      if (of.b_down) add_to(of.b_down + col, total, n);
    }
  }
};

template <class T>
void bottleneck_backward_block(const BottleneckBackward& p, int64_t r0, int64_t rows, int64_t following,
                               const BottleneckGrads& grads) {
  using M = Multiplied<T>;
  Scratch& scr = scratch();
  const int64_t h = p.hidden, b = p.b, hp = (h + 31) / 32 * 32, bp = (b + 31) / 32 * 32;
  const bool weights = p.dw_down != nullptr;
  ABlock d{scr.get<uint32_t>(0, ABlock::size(rows, words_of<M>(h))), padded_rows(rows)};
  ABlock dz{scr.get<uint32_t>(1, ABlock::size(rows, words_of<M>(b))), padded_rows(rows)};
  float* c = scr.get<float>(2, tile_scratch(std::max(rows, b)));
  float* ds = scr.get<float>(3, rows * hp);
  T* g = weights ? scr.get<T>(4, rows * h + W) : nullptr;  // gradient of the scaled output, rounded as eager code does
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
      T* g_row = g ? g + r * h : nullptr;
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
        if (keep) v = dropped(v, keep + i, p.drop.keep_scale);
        if (g_row) store_n<whole>(g_row + i, v, n);
        if (sum_b_up) store_n<whole>(sum_b_up + i, load_n<whole>(sum_b_up + i, n) + v, n);
        v = v * p.factor;
        if (p.scale) v = v * load_n<whole>(p.scale + i, n);
        put<M>(d, r, i, v, whole ? W : n);
      });
      pad_row<M>(d, r, h);
      pad_row<M>(dz, r, b);
      for (int64_t i = h; i < hp; ++i) ds_row[i] = 0.0f;
      sums.end_row(r, r + 1 == rows);
    }
  });

  // While the products compute, memory brings what is read after them: x, and the next block of dy and s.
  const int64_t bytes = rows * h * (int64_t)sizeof(T);
  Ahead own_x, next;
  if (weights && p.x) own_x.add((const T*)p.x + r0 * h, bytes);
  const int64_t after = (r0 + rows) * h, bytes_after = following * h * (int64_t)sizeof(T);
  next.add((const T*)p.dy + after, bytes_after);
  if (p.s) next.add((const T*)p.s + after, bytes_after);

  float* dz_rows = weights ? scr.get<float>(7, rows * bp) : nullptr;
  float* a_rows = weights ? scr.get<float>(8, rows * bp) : nullptr;
  const MiddleBackward<T> middle{p, r0, dz, dz_rows, a_rows, weights ? grads.b_down : nullptr, bp};
  const auto rows_of = for_act(p.act, [](auto act) { return &MiddleBackward<T>::template rows<act.value>; });
  product<M>(d, rows, passes_of<M>(p.up_t), 0, bp / 32, c, own_x,
             [&](int64_t panel, int64_t m, int64_t mr, const float* tile) { rows_of(middle, panel, m, mr, tile); });

  if (p.dx) {
    float* dx = scr.get<float>(11, (rows + 32) * hp);
    product_into<M>(dz, rows, passes_of<M>(p.down_t), hp / 32, c, dx, hp, next);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < h; i += W) {
        F value = load(dx + r * hp + i);
        if (p.skip) value = value + load(ds + r * hp + i);
        store_n((T*)p.dx + (r0 + r) * h + i, value, h - i);
      }
  }
  if (!weights) return;

  add_over_rows<T>(rows, a_rows, bp, b, g, h, h, grads.up, grads.columns);
  if (p.x) add_over_rows<T>(rows, dz_rows, bp, b, (const T*)p.x + r0 * h, h, h, grads.down, grads.columns);
}

// Where one share of a slot's gradients keeps what; sizes in floats.
struct GradLayout {
  int64_t hp, matrix, wide, narrow, norm, size;
  explicit GradLayout(const BottleneckBackward& p)
      : hp((p.hidden + 31) / 32 * 32), matrix(p.dw_down ? p.b * hp : 0), wide(p.dw_down ? hp : 0),
        narrow(p.dw_down ? p.b + W : 0), norm(p.dnorm_weight ? hp : 0), size(2 * matrix + wide + narrow + 2 * norm) {}
  BottleneckGrads at(float* base) const {
    return {base, base + matrix, base + 2 * matrix, base + 2 * matrix + narrow, hp, wide + 2 * norm};
  }
};
// The gradients of a slot from `count` shares, which lie `stride` apart; the first is overwritten.
inline void finish_gradients(const BottleneckBackward& p, const GradLayout& l, float* shares, int64_t count,
                             int64_t stride) {
  const int64_t h = p.hidden, b = p.b;
  if (p.dw_down) {
    for (int64_t i = 0; i < b; ++i) ordered_sum(shares + i * l.hp, count, h, stride, p.dw_down + i * h);
    ordered_sum(shares + l.matrix, count, l.matrix, stride, shares + l.matrix);
    transpose(shares + l.matrix, l.hp, b, h, p.g_up, b);
    ordered_sum(shares + 2 * l.matrix, count, b, stride, p.db_down);
    ordered_sum(shares + 2 * l.matrix + l.narrow, count, h, stride, p.g_bias);
  }
  if (l.norm) {
    ordered_sum(shares + 2 * l.matrix + l.narrow + l.wide, count, h, stride, p.dnorm_weight);
    ordered_sum(shares + 2 * l.matrix + l.narrow + l.wide + l.norm, count, h, stride, p.dnorm_bias);
  }
}

template <class T>
void bottleneck_backward_typed(const BottleneckBackward& p, Parallel parallel) {
  using M = Multiplied<T>;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(p.rows, p.threads));
  const GradLayout layout(p);
  float* shares = scratch().get<float>(15, parts * layout.size + 16);
  parallel_for(parallel, parts, [&](int64_t part) {
    float* base = shares + part * layout.size;
    std::memset(base, 0, sizeof(float) * layout.size);
    const BottleneckGrads grads = layout.at(base);
    const int64_t first = p.rows * part / parts, last = p.rows * (part + 1) / parts;
    const int64_t blocks = (last - first + kRows - 1) / kRows;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t r0 = first + part_start<M>(last - first, i, blocks);
      const int64_t r1 = first + part_start<M>(last - first, i + 1, blocks);
      const int64_t r2 = i + 1 < blocks ? first + part_start<M>(last - first, i + 2, blocks) : r1;
      bottleneck_backward_block<T>(p, r0, r1 - r0, r2 - r1, grads);
    }
  });
  finish_gradients(p, layout, shares, parts, layout.size);
}

// -- rows that differ in their adapter -------------------------------------------------------------------------------

// How many rows the next block of a list has, if it goes on where this one ends.
inline int64_t rows_after(const SlotBlock& block) {
  const SlotBlock& next = *(&block + 1);
  return next.r0 == block.r0 + block.rows ? next.rows : 0;
}

template <class T>
void bottleneck_rows_forward_typed(const BottleneckRowsForward& all, Parallel parallel) {
  parallel_for(parallel, all.count, [&](int64_t i) {
    const SlotBlock& block = all.blocks[i];
    const BottleneckForward& p = all.slots[block.slot];
    if (p.b > 0) {
      const int64_t next = has_next(i, all.count, all.threads) ? rows_after(block) : 0;
      bottleneck_forward_block<T>(p, block.r0, block.rows, next, true);
      return;
    }
    AddNormForward n{};
    n.hidden = p.hidden;
    n.x = p.skip ? p.x : p.residual;
    n.residual = p.skip ? p.residual : nullptr;
    n.norm_weight = p.norm_weight;
    n.norm_bias = p.norm_bias;
    n.eps = p.eps;
    n.y = p.y;
    n.s = p.s;
    add_norm_forward_rows<T>(n, block.r0, block.r0 + block.rows);
  });
}

template <class T>
void bottleneck_rows_backward_block(const BottleneckBackward& p, const SlotBlock& block, int64_t next, float* share) {
  const GradLayout layout(p);
  if (p.b > 0) {
    bottleneck_backward_block<T>(p, block.r0, block.rows, next, layout.at(share));
    return;
  }
  const int64_t h = p.hidden;
  AddNormBackward n{};
  n.hidden = h;
  n.dy = p.dy;
  n.s = p.s;
  n.norm_weight = p.norm_weight;
  n.eps = p.eps;
  n.dx = p.skip ? p.dx : nullptr;
  n.dresidual = p.dresidual;
  float* sums = layout.norm ? scratch().get<float>(14, 2 * h) : nullptr;
  if (sums) std::memset(sums, 0, sizeof(float) * 2 * h);
  add_norm_backward_rows<T>(n, block.r0, block.r0 + block.rows, sums);
  for (int64_t i = 0; sums && i < h; ++i) {
    share[i] += sums[i];
    share[layout.norm + i] += sums[h + i];
  }
  if (p.dx && !p.skip) std::memset((T*)p.dx + block.r0 * h, 0, sizeof(T) * block.rows * h);
}

// The shares of a slot lie side by side in the order of their parts, so that their sum always runs in one order.
template <class T>
void bottleneck_rows_backward_typed(const BottleneckRowsBackward& all, Parallel parallel) {
  int64_t* start = scratch().get<int64_t>(13, all.slot_count);
  int64_t total = 0;
  for (int64_t slot = 0; slot < all.slot_count; ++slot) {
    start[slot] = total;
    total += std::max(1, all.shares[slot]) * GradLayout(all.slots[slot]).size;
  }
  float* shares = scratch().get<float>(15, total + 16);
  parallel_for(parallel, all.parts, [&](int64_t part) {
    const int64_t end = all.count * (part + 1) / all.parts;
    for (int64_t i = all.count * part / all.parts; i < end; ++i) {
      const SlotBlock& block = all.blocks[i];
      const BottleneckBackward& p = all.slots[block.slot];
      const int64_t size = GradLayout(p).size;
      float* share = shares + start[block.slot] + block.share * size;
      if (block.first) std::memset(share, 0, sizeof(float) * size);
      bottleneck_rows_backward_block<T>(p, block, i + 1 < end ? rows_after(block) : 0, share);
    }
  });
  parallel_for(parallel, all.slot_count, [&](int64_t slot) {
    const BottleneckBackward& p = all.slots[slot];
    const GradLayout layout(p);
    if (all.shares[slot] == 0) std::memset(shares + start[slot], 0, sizeof(float) * layout.size);
    finish_gradients(p, layout, shares + start[slot], std::max(1, all.shares[slot]), layout.size);
  });
}

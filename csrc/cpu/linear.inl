// y = drop(act(x [W_0; W_1; ..]^T + bias + low-rank additions)) and its backward.
//
// A task is a chunk of rows, or where rows are few a chunk of rows and a share of the columns: x's chunk is copied
// once into an A block, the panels of the weights pass by it, and the epilogue works on tiles that are still in L1.
// A LoRA is a few more words of k: s = scale x A^T stands behind x in the block, B^T behind W.

// Rows in a chunk: x's chunk comes from the second or third level cache again for every panel, and the weights from the
// third or from memory again for every chunk. The faster the product, the more rows a weight has to serve.
template <class M>
int64_t chunk_rows(int64_t rows, int64_t kw) {
  constexpr bool fast = Tiles<M>::whole;
  constexpr int64_t words = (fast ? 288 : W == 16 ? 520 : 260) * 1024, most = fast ? 512 : 168;
  if (rows <= 128) return rows;
  if constexpr (in_parts<M>) kw = std::min(kw, Tiles<M>::section);
  return std::max<int64_t>(32, std::min(most, words / kw) / Tiles<M>::max_rows * Tiles<M>::max_rows);
}

struct Shares {
  int64_t chunks, columns;  // tasks = chunks * columns
};
template <class M>
Shares shares_of(int64_t rows, int64_t kw, int64_t panels, int threads) {
  const int64_t each = chunk_rows<M>(rows, kw);
  int64_t chunks = (rows + each - 1) / each;
  if (chunks >= threads) {
    chunks = std::min(rows, (chunks + threads - 1) / threads * threads);
    return {chunks, 1};
  }
  return {chunks, std::min<int64_t>(panels, (threads + chunks - 1) / chunks)};
}

// How many rows the chunk after a task's has, if the same thread takes it then.
template <class T>
int64_t rows_after(int64_t rows, const Shares& s, int64_t task, int threads) {
  if (s.columns > 1 || !has_next(task, s.chunks, threads)) return 0;
  return part_start<T>(rows, task + 2, s.chunks) - part_start<T>(rows, task + 1, s.chunks);
}

inline void keep_rows(int64_t first, int64_t rows, int64_t cols, const Dropout& d, int8_t* keep) {
  const int64_t stride = (cols + 63) / 64 * 64;
  for (int64_t r = 0; r < rows; ++r) keep_row(first + r, cols, d, keep + r * stride);
}
FA_INLINE F dropped_n(F v, const int8_t* keep, float keep_scale, int64_t n) {
  if (n >= W) return dropped(v, keep, keep_scale);
  int8_t lanes[W] = {};
  std::memcpy(lanes, keep, (size_t)n);
  return dropped(v, lanes, keep_scale);
}

// -- low-rank additions ----------------------------------------------------------------------------------------------

inline int slot_of(const LowRanks& low, int64_t row, int64_t rows) {
  return low.table ? (int)low.table[row / (rows / low.batch)] : 0;
}
// fn(first, count, slot) for every run of rows of one slot in [r0, r0 + rows); `first` counts from r0.
template <class Fn>
FA_INLINE void for_runs(const LowRanks& low, int64_t all_rows, int64_t r0, int64_t rows, Fn&& fn) {
  const int64_t each = low.table ? all_rows / low.batch : all_rows;
  for (int64_t r = 0; r < rows;) {
    const int slot = slot_of(low, r0 + r, all_rows);
    int64_t end = r;
    do end = std::min(rows, ((r0 + end) / each + 1) * each - r0);
    while (end < rows && slot_of(low, r0 + end, all_rows) == slot);
    fn(r, end - r, slot);
    r = end;
  }
}
// The tiles of a chunk: none straddles a border of slots.
struct TileList {
  RowTile* tiles;
  int64_t count;
};
template <class T>
TileList tiles_of_chunk(const LowRanks& low, int64_t all_rows, int64_t r0, int64_t rows, int scratch_slot) {
  TileList list{scratch().get<RowTile>(scratch_slot, rows), 0};
  for_runs(low, all_rows, r0, rows, [&](int64_t first, int64_t count, int slot) {
    const int64_t tiles = tiles_in<T>(count);
    for (int64_t i = 0; i < tiles; ++i) list.tiles[list.count++] = tile_of<T>(count, i, tiles, first, slot);
  });
  return list;
}
template <class T>
bool all_whole(const TileList& list) {
  for (int64_t i = 0; i < list.count && Tiles<T>::whole; ++i)
    if (list.tiles[i].rows != Tiles<T>::max_rows) return false;
  return true;
}
// Floats of scratch for the c of so many tiles.
template <class T>
int64_t tile_scratch_of(const TileList& list) { return (list.count + 1) * Tiles<T>::max_rows * 32 + 1024; }

// Where in a row of the A block each LoRA's words stand, from `start` on; LoRAs of different slots share words.
// Returns the end.
template <class M>
int64_t place(const LowRanks& low, int64_t start, int64_t* at) {
  int64_t next = start, end = start;
  for (int i = 0; i < low.count; ++i) {
    if (i == 0 || low.loras[i].slot != low.loras[i - 1].slot) next = start;
    const int64_t words = added_words<M>(low.loras[i].rank);
    if (next % kBlock + words > kBlock) next = (next / kBlock + 1) * kBlock;
    at[i] = next;
    next += words;
    end = std::max(end, next);
  }
  return end;
}
// What is added to the rows of a slot beside the product that all rows share.
struct Extra {
  const Pass* passes;
  int count;
};
// Adds those of a tile's slot to it, then what `then` adds; `extras` is null where nothing is to be added.
template <class M, class Then>
struct Adding {
  const ABlock& a;
  const Extra* extras;
  const Then& then;
  FA_INLINE void while_in_registers([[maybe_unused]] bool two, [[maybe_unused]] int64_t panel,
                                    [[maybe_unused]] const RowTile& t) const {
    if constexpr (Tiles<M>::apart)
      for (int e = 0; extras && e < extras[t.slot].count; ++e) {
        const Pass& extra = extras[t.slot].passes[e];
        Tiles<Added<M>>::multiply_more(two, a.row(t.m, extra.a), extra.b + panel * extra.panel_stride, extra.words);
      }
  }
  FA_INLINE void operator()(int64_t panel, const RowTile& t, float* tile) const {
    if constexpr (!Tiles<M>::apart)
      for (int e = 0; extras && e < extras[t.slot].count; ++e) {
        const Pass& extra = extras[t.slot].passes[e];
        multiply_panel<Added<M>>((int)t.rows, a.row(t.m, extra.a), extra, panel, tile, 32, true);
      }
    then(panel, t, tile);
  }
};
// fn(pass) for those of a LoRA's second matrix: as long as any other product's, so that they round as little.
template <class M, class Fn>
FA_INLINE void for_added_passes(const LowRank& l, int64_t at, Fn&& fn) {
  Passes<Added<M>> passes(at);
  passes.add_packed(l.up.words, added_words<M>(l.rank));
  for (int i = 0; i < passes.count(); ++i) fn(passes[i]);
}
template <class M>
int64_t added_passes(const LowRanks& low) {
  int64_t count = 0;
  for (int i = 0; i < low.count; ++i) for_added_passes<M>(low.loras[i], 0, [&](const Pass&) { ++count; });
  return count;
}
// The passes that LoRAs chosen by `wanted` add, by slot; room for added_passes.
template <class M, class Wanted>
const Extra* extras_of(const LowRanks& low, const int64_t* at, Pass* passes, Extra* extras, Wanted&& wanted) {
  int count = 0, i = 0;
  for (int slot = 0; slot < low.slots; ++slot) {
    extras[slot] = {passes + count, 0};
    for (; i < low.count && low.loras[i].slot == slot; ++i) {
      if (!wanted(low.loras[i])) continue;
      for_added_passes<M>(low.loras[i], at[i], [&](const Pass& pass) {
        passes[count++] = pass;
        ++extras[slot].count;
      });
    }
  }
  return extras;
}
// The tiles of one slot, in a list of their own.
inline TileList only(const TileList& all, int slot, bool one_slot, int scratch_slot) {
  if (one_slot) return all;
  TileList list{scratch().get<RowTile>(scratch_slot, all.count), 0};
  for (int64_t i = 0; i < all.count; ++i)
    if (all.tiles[i].slot == slot) list.tiles[list.count++] = all.tiles[i];
  return list;
}
// The product of `from`, at words `start`, with a LoRA's first matrix, times the scale, into the words of `a` at `at`,
// and into `copy`, whose rows are `ld` apart, if there is one.
template <class T, class Rows, class S>
void low_product(const LowRank& l, const Rows& from, int64_t start, const ABlock& a, int64_t at,
                 const TileList& tiles, float* c, S* copy, int64_t ld) {
  using M = Multiplied<T>;
  Passes<M> k(start);
  k.add_packed(l.down.words, packed_words_of<M>(l.down.k));
  product_of_tiles<M>(from, tiles.count, [&](int64_t i) { return tiles.tiles[i]; }, k, l.rank, 0,
                      (l.rank + 31) / 32, c, Ahead(), NothingToAdd{},
                      [&](int64_t panel, const RowTile& t, const float* tile) {
    for (int64_t r = 0; r < t.rows; ++r)
      for (int v = 0; v < kNV; ++v) {
        const int64_t col = panel * 32 + v * W, n = l.rank - col;
        if (n <= 0) break;
        const F value = rounded<T>(load(tile + r * 32 + v * W) * l.scale);
        put_added<M>(a, t.m + r, at, col, value, n, l.rank);
        if (copy) store_n(copy + (t.m + r) * ld + col, value, n);
      }
  });
}
// Rows of x with a LoRA's own dropout, as an A block. `keep` are the bytes of the chunk's rows.
template <class T>
void masked_block(const ABlock& a, const T* x, int64_t rows, int64_t k, const int8_t* keep, float keep_scale) {
  using M = Multiplied<T>;
  const int64_t stride = (k + 63) / 64 * 64;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < k; i += W)
      put<M>(a, r, i, dropped_n(load_n(x + r * k + i, k - i), keep + r * stride + i, keep_scale, k - i), k - i);
    pad_row<M>(a, r, k);
  }
}

// A row of values that are already rounded to T, as words of a B or A operand whose k runs over rows: in pairs the rows
// `even` and `odd` (or null) side by side.
template <bool Pairs, class S>
FA_INLINE U row_word(const S* even, const S* odd) {
  if constexpr (!Pairs) return bits(load(even));
  else return (bits(load(even)) >> 16) | (odd ? bits(load(odd)) : U{});
}
// The same for a vector of which only n lanes are there.
template <bool Pairs, class S>
FA_INLINE U row_word_n(const S* even, const S* odd, int64_t n) {
  if constexpr (!Pairs) return bits(load_n(even, n));
  else return (bits(load_n(even, n)) >> 16) | (odd ? bits(load_n(odd, n)) : U{});
}
// [rows][n] of S, rows `stride` apart, as words [words_of(rows)][ld]; ld is n rounded up to a multiple of W or more.
template <class T, class S>
void words_over_rows(const S* from, int64_t stride, int64_t rows, int64_t n, uint32_t* words, int64_t ld) {
  constexpr bool pairs = Operand<T>::pairs;
  constexpr int64_t per = Operand<T>::per_word;
  const int64_t kw = words_of<T>(rows), full = rows / per;
  for (int64_t i = 0; i < kw; ++i) {
    const S* even = from + i * per * stride;
    const S* odd = i < full && pairs ? even + stride : nullptr;
    uint32_t* to = words + i * ld;
    if (i * per >= rows) {
      std::memset(to, 0, 4 * (size_t)ld);
    } else if (n % W == 0 && i < full) {
      for (int64_t j = 0; j < n; j += W) {
        const U w = row_word<pairs>(even + j, pairs ? even + stride + j : even);
        std::memcpy(to + j, &w, sizeof w);
      }
    } else {
      for (int64_t j = 0; j < n; j += W) {
        const U w = row_word_n<pairs>(even + j, odd ? odd + j : nullptr, n - j);
        std::memcpy(to + j, &w, sizeof w);
      }
    }
  }
}

// out[j][i] += sum over rows of left[row][j] right[row][i], j < m, i < n: the gradient of a matrix. Both hold values
// that are rounded to T; out's rows are `ldo` apart and have room for whole panels of 32. strip(col, words) adds the words
// of 32 columns of `right` to the passes that it gives back; `words` is room for them.
template <class T, class L, class Strip>
void add_over_rows_of(int64_t rows, const L* left, int64_t left_stride, int64_t m, int64_t n, float* out, int64_t ldo,
                      Strip&& strip) {
  Scratch& s = scratch();
  const int64_t kw = words_of<T>(rows), ld = (m + W - 1) / W * W;
  ABlock a{s.get<uint32_t>(9, ABlock::size(m, kw)), padded_rows(m)};
  uint32_t* words = s.get<uint32_t>(10, kw * std::max<int64_t>(ld, 32));
  float* c = s.get<float>(11, tile_scratch(m));
  words_over_rows<T>(left, left_stride, rows, m, words, ld);
  transpose((const float*)words, ld, kw, m, (float*)a.words, kStride);
  for (int64_t col = 0; col < n; col += 32)
    product<T>(a, m, strip(col, words), 0, 1, c, Ahead(), [&](int64_t, int64_t first, int64_t count, const float* tile) {
      for (int64_t r = 0; r < count; ++r)
        for (int v = 0; v < kNV; ++v) {
          float* to = out + (first + r) * ldo + col + v * W;
          store(to, load(to) + load(tile + r * 32 + v * W));
        }
    });
}
template <class T, class L, class R>
void add_over_rows(int64_t rows, const L* left, int64_t left_stride, int64_t m, const R* right, int64_t right_stride,
                   int64_t n, float* out, int64_t ldo) {
  add_over_rows_of<T>(rows, left, left_stride, m, n, out, ldo, [&](int64_t col, uint32_t* words) {
    Passes<T> k;
    if (std::is_same_v<R, float> && !Operand<T>::pairs && n - col >= 32) {
      k.add((const uint32_t*)(right + col), 0, right_stride, words_of<T>(rows));  // floats are their own words
    } else {
      words_over_rows<T>(right + col, right_stride, rows, std::min<int64_t>(32, n - col), words, 32);
      k.add(words, 0, 32, words_of<T>(rows));
    }
    return k;
  });
}
// `right` are n numbers of rows of a block, from word `start` on.
template <class T, class L>
void add_over_block_rows(int64_t rows, const L* left, int64_t left_stride, int64_t m, const ABlock& right, int64_t first,
                         int64_t start, int64_t n, float* out, int64_t ldo) {
  using M = Multiplied<T>;
  if constexpr (in_parts<M>) {
    add_over_rows_of<T>(rows, left, left_stride, m, n, out, ldo, [&](int64_t col, uint32_t* words) {
      for (int64_t r = 0; r < rows; ++r) numbers_of_parts(right, first + r, start, col, (float*)words + r * 32);
      Passes<T> k;
      k.add(words, 0, 32, words_of<T>(rows));
      return k;
    });
  } else {
    using D = std::conditional_t<Operand<T>::pairs, bf16, float>;
    constexpr int64_t per = Operand<T>::per_word, blocked = kBlock * per;  // a block of A is so many columns
    for (int64_t col = 0; col < n; col += blocked)
      add_over_rows<T>(rows, left, left_stride, m, (const D*)right.row(first, start + col / per), kStride * per,
                       std::min(blocked, n - col), out + col, ldo);
  }
}

// -- forward ---------------------------------------------------------------------------------------------------------

// next: how many of the rows after these the same thread takes then.
template <class T, Act A>
void linear_forward_chunk(const LinearForward& p, int64_t r0, int64_t rows, int64_t next, int64_t column,
                          int64_t columns) {
  using M = Multiplied<T>;
  Scratch& s = scratch();
  const LowRanks& low = p.low;
  const int64_t kw = words_of<M>(p.k);
  const TileList tiles = tiles_of_chunk<M>(low, p.rows, r0, rows, 3);
  int64_t* at = s.get<int64_t>(4, low.count);
  // Where x is read in place, only the LoRAs' words stand in the block.
  const bool direct = in_place<M>(rows, p.k, p.n / columns) && all_whole<M>(tiles);
  const int64_t words = std::max<int64_t>(1, place<M>(low, direct ? 0 : kw, at));
  const NothingToAdd nothing;
  ABlock a{s.get<uint32_t>(0, ABlock::size(rows + 32, words)), padded_rows(rows + 32)};
  float* c = s.get<float>(1, tile_scratch_of<M>(tiles));
  for (int64_t r = 0; r < rows && !direct; ++r) copy_row<M>(a, r, (const T*)p.x + (r0 + r) * p.k, p.k);
  for (int i = 0; i < low.count; ++i) {
    const LowRank& l = low.loras[i];
    const TileList mine = only(tiles, l.slot, low.slots == 1, 6);
    if (mine.count == 0) continue;
    ABlock dropped_x{nullptr, padded_rows(rows + 32)};
    if (l.drop.on) {
      const int64_t stride = (p.k + 63) / 64 * 64;
      int8_t* kept = s.get<int8_t>(2, rows * stride);
      keep_rows(r0, rows, p.k, l.drop, kept);
      dropped_x.words = s.get<uint32_t>(5, ABlock::size(rows + 32, kw));
      masked_block<T>(dropped_x, (const T*)p.x + r0 * p.k, rows, p.k, kept, l.drop.keep_scale);
    }
    with_rows<M>(direct && !l.drop.on, (const T*)p.x + r0 * p.k, p.k, l.drop.on ? dropped_x : a, [&](const auto& from) {
      T* saved = p.s && column == 0 ? (T*)p.s + r0 * low.columns + l.column : nullptr;
      low_product<T>(l, from, 0, a, at[i], mine, c, saved, low.columns);
    });
  }
  const int64_t keep_stride = (p.n + 63) / 64 * 64;
  int8_t* keep = nullptr;
  if (p.drop.on) {
    keep = s.get<int8_t>(2, rows * keep_stride);
    keep_rows(r0, rows, p.n, p.drop, keep);
  }
  Pass* passes = s.get<Pass>(7, added_passes<M>(low));
  Extra* extras = s.get<Extra>(8, low.slots);
  const int64_t row_bytes = p.n * (int64_t)sizeof(T);
  const bool stream = streams(p.y, p.rows, row_bytes) && (!p.z || streams(p.z, p.rows, row_bytes));
  int64_t offset = 0;
  for (int w = 0; w < p.count; ++w) {
    const int64_t n = p.weights[w].n, panels = (n + 31) / 32;
    const Extra* extra =
        low.count ? extras_of<M>(low, at, passes, extras, [&](const LowRank& l) { return l.owner == w; }) : nullptr;
    auto epilogue = [&](int64_t panel, const RowTile& t, const float* tile) {
      const int64_t m = t.m, mr = t.rows;
      // The common cases apart: nothing but arithmetic in their loops.
      const bool plain = !keep && !(p.z && p.code), dropped_only = keep && A == Act::none && !p.z && p.n % 32 == 0;
      if (n - panel * 32 >= 32 && (plain || dropped_only)) {
        const int64_t col = offset + panel * 32;
        F bias[kNV];
        for (int v = 0; v < kNV; ++v) bias[v] = p.bias ? load(p.bias + t.slot * p.n + col + v * W) : F{};
        T* y = (T*)p.y + (r0 + m) * p.n + col;
        T* z = p.z ? (T*)p.z + (r0 + m) * p.n + col : nullptr;
        uint8_t* code = p.code ? p.code + (r0 + m) * p.n + col : nullptr;
        const bool aligned = stream && offset % 32 == 0;  // what stands before it in a row may be of any width
        auto put_row = [&](T* row, const F (&values)[kNV]) {
          if (aligned) stream_row(row, values);
          else store_row(row, values);
        };
        // What finish(r, values) makes of a row's sums.
        auto rows_to = [&](auto&& finish) {
          for (int64_t r = 0; r < mr; ++r) {
            F values[kNV];
#pragma GCC unroll 8
            for (int v = 0; v < kNV; ++v) values[v] = load(tile + r * 32 + v * W) + bias[v];
            finish(r, values);
            put_row(y + r * p.n, values);
          }
        };
        if (keep) {
          const int8_t* kept = keep + m * keep_stride + col;
          rows_to([&](int64_t r, F(&values)[kNV]) {
#pragma GCC unroll 8
            for (int v = 0; v < kNV; ++v)
              values[v] = dropped(rounded<T>(values[v]), kept + r * keep_stride + v * W, p.drop.keep_scale);
          });
        } else if (z) {
          rows_to([&](int64_t r, F(&values)[kNV]) {
            put_row(z + r * p.n, values);
#pragma GCC unroll 8
            for (int v = 0; v < kNV; ++v) values[v] = act_as<T, A>(rounded<T>(values[v]));
          });
        } else if (code) {
          rows_to([&](int64_t r, F(&values)[kNV]) {
#pragma GCC unroll 8
            for (int v = 0; v < kNV; ++v) values[v] = act_with_code<T, A>(values[v], code + r * p.n + v * W);
          });
        } else {
          rows_to([](int64_t, F(&values)[kNV]) {
#pragma GCC unroll 8
            for (int v = 0; v < kNV; ++v) values[v] = act_as<T, A>(values[v]);
          });
        }
        return;
      }
      for (int v = 0; v < kNV; ++v) {
        const int64_t local = panel * 32 + v * W, valid = n - local, col = offset + local;
        if (valid <= 0) break;
        const F bias = p.bias ? load_n(p.bias + t.slot * p.n + col, valid) : F{};
        const float* from = tile + v * W;
        T* y = (T*)p.y + (r0 + m) * p.n + col;
        T* z = p.z ? (T*)p.z + (r0 + m) * p.n + col : nullptr;
        uint8_t* code = p.code ? p.code + (r0 + m) * p.n + col : nullptr;
        for (int64_t r = 0; r < mr; ++r) {
          const F before = rounded<T>(load(from + r * 32) + bias);
          if (z) store_n(z + r * p.n, before, valid);
          if (code) store_code(code + r * p.n, d_act<A>(before), valid);
          F after = act_as<T, A>(before);
          // Several weights may start inside a block of 64 keep bytes.
          if (keep) after = dropped_n(rounded<T>(after), keep + (m + r) * keep_stride + col, p.drop.keep_scale, valid);
          store_n(y + r * p.n, after, valid);
        }
      }
    };
    Ahead ahead;
    if (w == 0) ahead.add((const T*)p.x + (r0 + rows) * p.k, next * p.k * (int64_t)sizeof(T));
    auto multiply = [&](const auto& from) {
      product_of_tiles<M>(from, tiles.count, [&](int64_t i) { return tiles.tiles[i]; }, passes_of<M>(p.weights[w]),
                          panels * 32, panels * column / columns, panels * (column + 1) / columns, c, ahead,
                          Adding<M, NothingToAdd>{a, extra, nothing}, epilogue);
    };
    with_rows<M>(direct, (const T*)p.x + r0 * p.k, p.k, a, multiply);
    offset += n;
  }
  if (stream) end_of_stream();
}

template <class T>
void linear_forward_typed(const LinearForward& p, Parallel parallel) {
  using M = Multiplied<T>;
  for_act(p.act, [&](auto a) {
    const Shares s = shares_of<M>(p.rows, words_of<M>(p.k), (p.n + 31) / 32, p.threads);
    parallel_for(parallel, s.chunks * s.columns, [&](int64_t task) {
      const int64_t chunk = task / s.columns, r0 = part_start<M>(p.rows, chunk, s.chunks);
      const int64_t r1 = part_start<M>(p.rows, chunk + 1, s.chunks);
      linear_forward_chunk<T, a.value>(p, r0, r1 - r0, rows_after<M>(p.rows, s, task, p.threads), task % s.columns,
                                       s.columns);
    });
  });
}

// -- backward --------------------------------------------------------------------------------------------------------

// Where a task's shares of the parameters' gradients stand: dbias [slots][k], then every LoRA's dA [rank][padded n],
// then every LoRA's dB^T [rank][padded columns of its weight].
struct LinearGrads {
  int64_t dbias = 0, da = 0, db = 0, size = 0;
  int64_t padded_n = 0;
  explicit LinearGrads(const LinearBackward& p) {
    da = p.dbias ? (p.low.slots * p.k + 15) / 16 * 16 : 0;
    db = size = da;
    if (!weights(p)) return;
    padded_n = (p.n + 31) / 32 * 32;
    for (int i = 0; i < p.low.count; ++i) db += p.low.loras[i].rank * padded_n;
    size = db;
    for (int i = 0; i < p.low.count; ++i) size += p.low.loras[i].rank * padded_k(p, i);
  }
  static bool weights(const LinearBackward& p) { return p.low.count && p.low.loras[0].da; }
  static int64_t padded_k(const LinearBackward& p, int i) {
    return (p.weights[p.low.loras[i].owner].k + 31) / 32 * 32;
  }
};

// act' of n numbers, into whole vectors. A function for every activation: the products are compiled once for all of them.
template <class T, Act A>
void derivatives(const T* z, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += W) store(to + i, d_act<A>(load_n(z + i, n - i)));
}

template <class T>
void linear_backward_chunk(const LinearBackward& p, int64_t r0, int64_t rows, int64_t following, int64_t column,
                           int64_t columns, const LinearGrads& layout, float* grads) {
  using M = Multiplied<T>;
  Scratch& s = scratch();
  const LowRanks& low = p.low;
  int64_t kw = 0;  // every weight's k starts a new block
  for (int w = 0; w < p.count; ++w) kw += (words_of<M>(p.weights[w].k) + kBlock - 1) / kBlock * kBlock;
  const TileList tiles = tiles_of_chunk<M>(low, p.rows, r0, rows, 4);
  int64_t* at = s.get<int64_t>(5, low.count);
  const int64_t words = place<M>(low, kw, at);
  ABlock a{s.get<uint32_t>(0, ABlock::size(rows + 32, words)), padded_rows(rows + 32)};
  float* c = s.get<float>(1, tile_scratch_of<M>(tiles));
  const int64_t keep_stride = (p.k + 63) / 64 * 64;
  int8_t* keep = p.drop.on ? s.get<int8_t>(2, keep_stride) : nullptr;
  const bool weights = grads && LinearGrads::weights(p), filled = p.dx || low.count;
  float* dbias = grads && p.dbias ? grads + layout.dbias : nullptr;
  float* near = s.get<float>(3, p.k);
  float* slope = p.act != Act::none && !p.code ? s.get<float>(16, p.k + 2 * W) : nullptr;
  const auto derivatives_of = for_act(p.act, [](auto act) { return &derivatives<T, act.value>; });
  int slot = slot_of(low, r0, p.rows);
  RowSum sums{near, dbias ? dbias + slot * p.k : nullptr, dbias ? p.k : 0};
  sums.start();
  for (int64_t r = 0; r < rows; ++r) {
    if (keep) keep_row(r0 + r, p.k, p.drop, keep);
    if (slope) derivatives_of((const T*)p.z + (r0 + r) * p.k, p.k, slope);
    int64_t col = 0, base = 0;
    for (int w = 0; w < p.count; ++w) {
      const int64_t k = p.weights[w].k;
      ABlock part{a.words + base / kBlock * a.rows * kStride, a.rows};
      for (int64_t i = 0; i < k; i += W) {
        const int64_t from = (r0 + r) * p.k + col + i;
        F d = load_n((const T*)p.dy + from, k - i);
        if (keep) d = dropped_n(d, keep + col + i, p.drop.keep_scale, k - i);
        if (p.code) d = d * load_code(p.code + from, k - i);
        if (slope) d = d * load(slope + col + i);
        if (dbias) add_to(sums.near + col + i, d, k - i);
        if (filled) put<M>(part, r, i, d, k - i);
      }
      if (filled) pad_row<M>(part, r, k);
      col += k;
      base += (words_of<M>(k) + kBlock - 1) / kBlock * kBlock;
    }
    const int next = r + 1 < rows ? slot_of(low, r0 + r + 1, p.rows) : -1;
    sums.end_row(r, next != slot);
    if (next >= 0 && next != slot) {
      slot = next;
      if (dbias) sums.far = dbias + slot * p.k;
    }
  }
  if (!filled) return;

  // dlow = scale dz B, behind dz in the block; as floats where dA needs them.
  const int64_t low_stride = (low.columns + W - 1) / W * W;
  float* dlow = weights ? s.get<float>(6, rows * low_stride + W) : nullptr;
  for (int i = 0; i < low.count; ++i) {
    const LowRank& l = low.loras[i];
    const TileList mine = only(tiles, l.slot, low.slots == 1, 7);
    if (mine.count == 0) continue;
    int64_t base = 0;
    for (int w = 0; w < l.owner; ++w) base += (words_of<M>(p.weights[w].k) + kBlock - 1) / kBlock * kBlock;
    low_product<T>(l, a, base, a, at[i], mine, c, dlow ? dlow + l.column : nullptr, low_stride);
  }
  // The keep bytes of the LoRAs that drop, one after another.
  const int64_t x_stride = (p.n + 63) / 64 * 64;
  int dropping = 0;
  for (int i = 0; i < low.count; ++i) dropping += low.loras[i].drop.on;
  int8_t* kept = dropping ? s.get<int8_t>(14, dropping * rows * x_stride) : nullptr;
  auto kept_of = [&](int lora) {
    int64_t before = 0;
    for (int i = 0; i < lora; ++i) before += low.loras[i].drop.on;
    return kept + before * rows * x_stride;
  };
  for (int i = 0; i < low.count; ++i)
    if (low.loras[i].drop.on) keep_rows(r0, rows, p.n, low.loras[i].drop, kept_of(i));

  if (weights)
    for_runs(low, p.rows, r0, rows, [&](int64_t first, int64_t count, int run_slot) {
      int64_t da = layout.da, db = layout.db;
      for (int i = 0; i < low.count;) {
        const LowRank& l = low.loras[i];
        // LoRAs that read x as it is are one product.
        int end = i + 1;
        int64_t ranks = l.rank;
        while (!l.drop.on && end < low.count && low.loras[end].slot == l.slot && !low.loras[end].drop.on)
          ranks += low.loras[end++].rank;
        if (l.slot == run_slot) {
          const float* left = dlow + first * low_stride + l.column;
          const T* x = (const T*)p.x + (r0 + first) * p.n;
          if (l.drop.on) {
            const int8_t* mask = kept_of(i) + first * x_stride;
            T* masked = s.get<T>(12, count * p.n);
            for (int64_t r = 0; r < count; ++r)
              for (int64_t c0 = 0; c0 < p.n; c0 += W)
                store_n(masked + r * p.n + c0,
                        dropped_n(load_n(x + r * p.n + c0, p.n - c0), mask + r * x_stride + c0, l.drop.keep_scale, p.n - c0),
                        p.n - c0);
            x = masked;
          }
          add_over_rows<T>(count, left, low_stride, ranks, x, p.n, p.n, grads + da, layout.padded_n);
        }
        for (; i < end; ++i) {
          const LowRank& own = low.loras[i];
          const int64_t np = LinearGrads::padded_k(p, i), n = p.weights[own.owner].k;
          if (own.slot == run_slot) {
            int64_t base = 0;
            for (int w = 0; w < own.owner; ++w) base += (words_of<M>(p.weights[w].k) + kBlock - 1) / kBlock * kBlock;
            const T* left = (const T*)p.s + (r0 + first) * low.columns + own.column;
            add_over_block_rows<T>(count, left, low.columns, own.rank, a, first, base, n, grads + db, np);
          }
          da += own.rank * layout.padded_n;
          db += own.rank * np;
        }
      }
    });
  if (!p.dx) return;

  Passes<M> passes;
  for (int w = 0; w < p.count; ++w) passes.add_packed(p.weights[w].words, packed_words_of<M>(p.weights[w].k));
  const Extra* extras = nullptr;
  if (low.count > dropping)
    extras = extras_of<M>(low, at, s.get<Pass>(8, added_passes<M>(low)), s.get<Extra>(13, low.slots),
                          [](const LowRank& l) { return !l.drop.on; });
  float* apart = dropping ? s.get<float>(12, (Tiles<M>::max_rows + 32) * 32) : nullptr;
  const int64_t panels = (p.n + 31) / 32, after = (r0 + rows) * p.k, elements = following * p.k;
  Ahead next;
  next.add((const T*)p.dy + after, elements * (int64_t)sizeof(T));
  if (p.code) next.add(p.code + after, elements);
  if (p.z) next.add((const T*)p.z + after, elements * (int64_t)sizeof(T));
  auto dropped_terms = [&](int64_t panel, const RowTile& t, float* tile) {
    for (int i = 0; dropping && i < low.count; ++i) {  // what a LoRA's dropout hides gets no gradient from it
      const LowRank& l = low.loras[i];
      if (!l.drop.on || l.slot != t.slot) continue;
      for_added_passes<M>(l, at[i], [&](const Pass& up) {
        multiply_panel<Added<M>>((int)t.rows, a.row(t.m, up.a), up, panel, apart, 32, up.a != at[i]);
      });
      const int8_t* mask = kept_of(i) + t.m * x_stride + panel * 32;
      for (int64_t r = 0; r < t.rows; ++r)
        for (int v = 0; v < kNV && panel * 32 + v * W < p.n; ++v) {
          float* sum = tile + r * 32 + v * W;
          const F share = dropped_n(load(apart + r * 32 + v * W), mask + r * x_stride + v * W, l.drop.keep_scale, W);
          store(sum, load(sum) + share);
        }
    }
  };
  const bool stream = streams(p.dx, p.rows, p.n * (int64_t)sizeof(T));
  auto epilogue = [&](int64_t panel, const RowTile& t, const float* tile) {
    if (p.n - panel * 32 >= 32) {
      for (int64_t r = 0; r < t.rows; ++r) {
        F values[kNV];
#pragma GCC unroll 8
        for (int v = 0; v < kNV; ++v) values[v] = load(tile + r * 32 + v * W);
        T* dx = (T*)p.dx + (r0 + t.m + r) * p.n + panel * 32;
        if (stream) stream_row(dx, values);
        else store_row(dx, values);
      }
      return;
    }
    for (int v = 0; v < kNV; ++v) {
      const int64_t col = panel * 32 + v * W;
      if (col >= p.n) break;
      for (int64_t r = 0; r < t.rows; ++r)
        store_n((T*)p.dx + (r0 + t.m + r) * p.n + col, load(tile + r * 32 + v * W), p.n - col);
    }
  };
  product_of_tiles<M>(a, tiles.count, [&](int64_t i) { return tiles.tiles[i]; }, passes, panels * 32,
                      panels * column / columns, panels * (column + 1) / columns, c, next,
                      Adding<M, decltype(dropped_terms)>{a, extras, dropped_terms}, epilogue);
  if (stream) end_of_stream();
}

template <class T>
void linear_backward_typed(const LinearBackward& p, Parallel parallel) {
  using M = Multiplied<T>;
  const LinearGrads layout(p);
  const Shares s = shares_of<M>(p.rows, words_of<M>(p.k), (p.n + 31) / 32, p.threads);
  if (!LinearGrads::weights(p) && !p.dbias) {
    parallel_for(parallel, s.chunks * s.columns, [&](int64_t task) {
      const int64_t chunk = task / s.columns, column = task % s.columns;
      const int64_t r0 = part_start<M>(p.rows, chunk, s.chunks), r1 = part_start<M>(p.rows, chunk + 1, s.chunks);
      linear_backward_chunk<T>(p, r0, r1 - r0, rows_after<M>(p.rows, s, task, p.threads), column, s.columns, layout,
                               nullptr);
    });
    return;
  }
  // Gradients of parameters: a share a thread, not a share a chunk.
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(p.rows, p.threads)), size = layout.size;
  float* shares = scratch().get<float>(15, parts * size);
  parallel_for(parallel, parts, [&](int64_t part) {
    float* grads = shares + part * size;
    std::memset(grads, 0, sizeof(float) * size);
    const int64_t first = p.rows * part / parts, count = p.rows * (part + 1) / parts - first;
    const int64_t most = chunk_rows<M>(p.rows, words_of<M>(p.k)), chunks = (count + most - 1) / most;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t r0 = first + part_start<M>(count, i, chunks), r1 = first + part_start<M>(count, i + 1, chunks);
      const int64_t r2 = i + 1 < chunks ? first + part_start<M>(count, i + 2, chunks) : r1;
      linear_backward_chunk<T>(p, r0, r1 - r0, r2 - r1, 0, 1, layout, grads);
    }
  });
  if (p.dbias) ordered_sum(shares, parts, p.low.slots * p.k, size, p.dbias);
  if (!LinearGrads::weights(p)) return;
  int64_t da = layout.da, db = layout.db;
  for (int i = 0; i < p.low.count; ++i) {
    const LowRank& l = p.low.loras[i];
    const int64_t n = p.weights[l.owner].k, np = LinearGrads::padded_k(p, i);
    for (int64_t j = 0; j < l.rank; ++j)
      ordered_sum(shares + da + j * layout.padded_n, parts, p.n, size, l.da + j * p.n);
    ordered_sum(shares + db, parts, l.rank * np, size, shares + db);
    transpose(shares + db, np, l.rank, n, l.db, l.rank);
    da += l.rank * layout.padded_n;
    db += l.rank * np;
  }
}

// Taking low-rank updates out of weights and putting others in, one tile of one matrix a block:
//
//   out:  W <- R(W - D) + code, a listed weight from the list        D = sum over k of fma(t_k, a_k, d), t = fl(s b)
//   in:   W <- R(W + D), code = bits of the bare W - bits of R(R(W + D) - D), listed where a byte doesn't hold it
//
// fastadapt/ops/merge.py has the order of the sum and what the codes mean; the bits here are the same. A tile is
// kMergeRows rows by as many columns as the threads hold, sixteen bytes a row each, so all of it is in registers before
// anything is written, and a tile with a result that is not finite is left as it was.
#pragma once
#include "cuda/kernels.h"

namespace fastadapt::cuda {

FA_DEVICE const MergeMatrix& matrix_of(const MergeMatrix* matrices, int64_t count, int64_t tile) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (matrices[middle].first_tile <= tile)
      low = middle;
    else
      high = middle;
  }
  return matrices[low];
}

// The first position of the ascending list that is not below `least`.
FA_DEVICE int64_t lower_bound(const int32_t* list, int64_t count, int64_t least) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (list[middle] < least)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <class Store>
struct MergeTile {
  static constexpr int V = kInVector<Store>;
  int64_t row, col;  // of the thread's first weight
  int rows;          // that exist
  int64_t n;         // columns of the thread that exist, from col on; may be more than V or negative
  Vector raw[kMergeRows], merged[kMergeRows];
  uint32_t codes[kMergeRows][V / 4];  // a byte each
  uint32_t large;                     // bit i * V + v: the code of row i, word v doesn't fit its byte
  float d[kMergeRows][V];
};

// The N <= 8 numbers from a + at on, of which n exist.
template <class From, int N>
FA_DEVICE void load_floats(const void* a, int64_t at, bool aligned, int64_t n, float (&out)[N]) {
  constexpr int kStep = kInVector<From> < N ? kInVector<From> : N;
  const auto* p = global(static_cast<const typename From::Word*>(a)) + at;
  if constexpr (kInVector<From> > N) {  // half a vector, so word by word (bfloat16 factors of float32 weights)
FA_UNROLL
    for (int i = 0; i < N; ++i) out[i] = i < n ? From::value(p[i]) : 0.0f;
  } else {
FA_UNROLL
    for (int first = 0; first < N; first += kStep) {
      const Vector v = load_vector<From>(p + first, aligned, n - first);
FA_UNROLL
      for (int i = 0; i < kStep; ++i) out[first + i] = From::value(word<From>(v, i));
    }
  }
}

template <class Store, class From, class Tile>
FA_DEVICE void add_ranks(Tile& tile, const Update& u, int64_t first, int ranks, int64_t cols, bool aligned,
                         const float* t) {
  constexpr int V = kInVector<Store>;
FA_UNROLL_BY_4
  for (int k = 0; k < ranks; ++k) {
    float a[V];
    load_floats<From, V>(u.a, (first + k) * cols + tile.col, aligned, tile.n, a);
FA_UNROLL
    for (int i = 0; i < kMergeRows; ++i) {
      const float factor = t[k * kMergeRows + i];
FA_UNROLL
      for (int v = 0; v < V; ++v) tile.d[i][v] = fma(factor, a[v], tile.d[i][v]);
    }
  }
}

// tile.d = the update at the thread's weights; t is shared, [kMergeRankStep][kMergeRows].
template <class Store, class Block, class Local>
FA_DEVICE void difference(const Block& block, Local& tile, const Update& u, const MergeMatrix& m, float* t) {
  block.each([&](int thread) {
FA_UNROLL
    for (int i = 0; i < kMergeRows; ++i)
FA_UNROLL
      for (int v = 0; v < kInVector<Store>; ++v) tile[thread].d[i][v] = 0.0f;
  });
  for (int64_t first = 0; first < u.rank; first += kMergeRankStep) {
    const int ranks = static_cast<int>(u.rank - first < kMergeRankStep ? u.rank - first : kMergeRankStep);
    block.each([&](int thread) {
      for (int j = thread; j < ranks * kMergeRows; j += block.threads()) {
        const int i = j / ranks, k = j % ranks;
        const int64_t at = (tile[thread].row + i) * u.rank + first + k;
        t[k * kMergeRows + i] = i < tile[thread].rows ? multiply(load_float(u.b_type, u.b, at), u.scale) : 0.0f;
      }
    });
    block.each([&](int thread) {
      if (tile[thread].n <= 0) return;
      if (u.a_type == Type::f32)
        add_ranks<Store, Single>(tile[thread], u, first, ranks, m.cols, m.aligned, t);
      else if (u.a_type == Type::bf16)
        add_ranks<Store, Brain>(tile[thread], u, first, ranks, m.cols, m.aligned, t);
      else
        add_ranks<Store, Half>(tile[thread], u, first, ranks, m.cols, m.aligned, t);
    });
  }
}

// V bytes, n of which exist, as words of four.
template <int V>
FA_DEVICE void load_codes(const int8_t* p, bool aligned, int64_t n, uint32_t (&out)[V / 4]) {
FA_UNROLL
  for (int j = 0; j < V / 4; ++j) {
    out[j] = 0;
    if (aligned && n >= V) {
      out[j] = global(reinterpret_cast<const uint32_t*>(p))[j];
    } else {
FA_UNROLL
      for (int i = 0; i < 4; ++i)
        if (4 * j + i < n) out[j] |= static_cast<uint32_t>(static_cast<uint8_t>(global(p)[4 * j + i])) << 8 * i;
    }
  }
}
template <int V>
FA_DEVICE void store_codes(int8_t* p, bool aligned, int64_t n, const uint32_t (&codes)[V / 4]) {
FA_UNROLL
  for (int j = 0; j < V / 4; ++j) {
    if (aligned && n >= V) {
      global(reinterpret_cast<uint32_t*>(p))[j] = codes[j];
    } else {
FA_UNROLL
      for (int i = 0; i < 4; ++i)
        if (4 * j + i < n) global(p)[4 * j + i] = static_cast<int8_t>(codes[j] >> 8 * i & 0xffu);
    }
  }
}

// tile.raw = the bare weights; whether all of them are finite.
template <class Store>
FA_DEVICE bool take_out(MergeTile<Store>& tile, const MergeMatrix& m, const MergeArgs& p, int64_t number) {
  using Word = typename Store::Word;
  constexpr int V = kInVector<Store>;
  constexpr uint32_t kMask = sizeof(Word) == 4 ? 0xffffffffu : 0xffffu;
  bool all_finite = true;
FA_UNROLL
  for (int i = 0; i < kMergeRows; ++i) {
    if (i >= tile.rows) continue;
    const int64_t at = (tile.row + i) * m.cols + tile.col;
    uint32_t codes[V / 4] = {}, words[V];
    if (m.old_codes) load_codes<V>(m.old_codes + at, m.aligned, tile.n, codes);
FA_UNROLL
    for (int v = 0; v < V; ++v) {
      const float bare = add(Store::value(word<Store>(tile.raw[i], v)), -tile.d[i][v]);
      const int32_t code = static_cast<int8_t>(codes[v / 4] >> 8 * (v % 4) & 0xffu);
      words[v] = (Store::narrow(bare) + static_cast<uint32_t>(code)) & kMask;
    }
    // What is listed: by a change of this call, in the tile's room, else in the old list.
    if (p.mode == MergeMode::undo) {
      const MergeEntry* listed = p.entries + m.region + (number - m.first_tile) * m.capacity;
      for (int32_t j = 0; m.codes && j < p.counts[number]; ++j)
FA_UNROLL
        for (int v = 0; v < V; ++v)
          if (listed[j].index == at + v && v < tile.n) words[v] = listed[j].bits;
    } else if (m.old_count > 0) {
      for (int64_t j = lower_bound(m.old_index, m.old_count, at); j < m.old_count && m.old_index[j] < at + V; ++j)
FA_UNROLL
        for (int v = 0; v < V; ++v)
          if (m.old_index[j] == at + v && v < tile.n) words[v] = static_cast<const Word*>(m.old_bits)[j];
    }
FA_UNROLL
    for (int v = 0; v < V; ++v) all_finite &= v >= tile.n || (finite(Store::value(words[v])) && finite(tile.d[i][v]));
    tile.raw[i] = packed<Store>(words);
  }
  return all_finite;
}

// tile.merged, tile.codes and tile.large from the bare weights; whether all results are finite.
template <class Store>
FA_DEVICE bool put_in(MergeTile<Store>& tile) {
  constexpr int V = kInVector<Store>;
  bool all_finite = true;
  tile.large = 0;
FA_UNROLL
  for (int i = 0; i < kMergeRows; ++i) {
    uint32_t words[V], codes[V / 4] = {};
FA_UNROLL
    for (int v = 0; v < V; ++v) {
      const uint32_t raw = word<Store>(tile.raw[i], v);
      words[v] = Store::narrow(add(Store::value(raw), tile.d[i][v]));
      const float merged = Store::value(words[v]);
      const bool exists = i < tile.rows && v < tile.n;
      all_finite &= !exists || finite(merged);
      const int32_t code = static_cast<int32_t>(raw - Store::narrow(add(merged, -tile.d[i][v])));
      codes[v / 4] |= (static_cast<uint32_t>(code) & 0xffu) << 8 * (v % 4);
      if (exists && (code < -128 || code > 127)) tile.large |= 1u << (i * V + v);
    }
    tile.merged[i] = packed<Store>(words);
FA_UNROLL
    for (int j = 0; j < V / 4; ++j) tile.codes[i][j] = codes[j];
  }
  return all_finite;
}

FA_DEVICE int bits_set(uint32_t x) {
#if defined(__CUDACC__)
  return __popc(x);
#else
  return __builtin_popcount(x);
#endif
}

template <class Store, class Block>
FA_DEVICE void merge_tile(const Block& block, const MergeArgs& p, int64_t number, float* t) {
  using Word = typename Store::Word;
  constexpr int V = kInVector<Store>;
  const MergeMatrix& m = matrix_of(p.matrices, p.count, number);
  const int64_t local = number - m.first_tile;
  const bool undo = p.mode == MergeMode::undo;
  if (undo && p.broken[number]) return;  // it was not changed
  // Without `in`: because its list didn't fit.
  const bool bare_already = undo && m.codes && p.counts[number] > m.capacity;
  const bool out = (m.out.a || m.old_copy) && !bare_already;
  auto* w = static_cast<Word*>(m.w);

  typename Block::template Local<MergeTile<Store>> tile(block);
  typename Block::template Local<bool> bad(block);
  typename Block::template Local<int> count(block), before(block);
  block.each([&](int thread) {
    MergeTile<Store>& mine = tile[thread];
    mine.row = local / m.across * kMergeRows;
    mine.rows = static_cast<int>(m.rows - mine.row < kMergeRows ? m.rows - mine.row : kMergeRows);
    mine.col = (local % m.across * block.threads() + thread) * V;
    mine.n = m.cols - mine.col;
    mine.large = 0;
    const Word* from = m.old_copy && out ? static_cast<const Word*>(m.old_copy) : w;
FA_UNROLL
    for (int i = 0; i < kMergeRows; ++i)
      mine.raw[i] = load_vector<Store>(from + (mine.row + i) * m.cols + mine.col, m.aligned, i < mine.rows ? mine.n : 0);
    bad[thread] = false;
    count[thread] = 0;
  });
  if (out && !m.old_copy) {
    difference<Store>(block, tile, m.out, m, t);
    block.each([&](int thread) {
      if (tile[thread].n > 0 && !take_out(tile[thread], m, p, number)) bad[thread] = true;
    });
  }
  if (m.in.a) {
    difference<Store>(block, tile, m.in, m, t);
    block.each([&](int thread) {
      if (tile[thread].n > 0 && !put_in(tile[thread])) bad[thread] = true;
      count[thread] = bits_set(tile[thread].large);
    });
  }
  const bool broken = block.any(bad) && !undo;
  int total = 0;
  if (m.in.a && (m.codes || p.mode == MergeMode::check)) total = block.prefix(count, before);
  const bool deferred = !undo && m.codes && total > m.capacity;

  block.each([&](int thread) {
    if (!undo && thread == 0) {
      p.counts[number] = total;
      p.broken[number] = broken ? 1 : 0;
    }
    if (p.mode == MergeMode::check || broken || tile[thread].n <= 0) return;
    const MergeTile<Store>& mine = tile[thread];
    int64_t place = m.region + local * m.capacity + before[thread];
FA_UNROLL
    for (int i = 0; i < kMergeRows; ++i) {
      if (i >= mine.rows) continue;
      const int64_t at = (mine.row + i) * m.cols + mine.col;
      Vector result = mine.raw[i];  // not a choice of two places: that would put the tile in memory
      if (m.in.a && !deferred) result = mine.merged[i];
      store_vector<Store>(w + at, result, m.aligned, mine.n);
      if (!m.in.a || !m.codes || undo || deferred) continue;
      store_codes<V>(m.codes + at, m.aligned, mine.n, mine.codes[i]);
FA_UNROLL
      for (int v = 0; v < V; ++v)
        if (mine.large >> (i * V + v) & 1u)
          p.entries[place++] = {static_cast<int32_t>(at + v), word<Store>(mine.raw[i], v)};
    }
  });
}

// Totals of matrix `number` and the starts of its tiles' lists; `part` is shared, four numbers a thread.
template <class Block>
FA_DEVICE void summarise_matrix(const Block& block, const MergeSummary& p, int64_t number, int64_t (*part)[4]) {
  const MergeMatrix& m = p.matrices[number];
  const int64_t end = number + 1 < p.count ? p.matrices[number + 1].first_tile : p.tiles;
  const int64_t share = (end - m.first_tile + block.threads() - 1) / block.threads();
  block.each([&](int thread) {
    int64_t listed = 0, broken = 0, largest = 0, deferred = 0;
    const int64_t first = m.first_tile + thread * share;
    for (int64_t i = first; i < first + share && i < end; ++i) {
      listed += p.counts[i];
      broken += p.broken[i];
      largest = p.counts[i] > largest ? p.counts[i] : largest;
      deferred += p.counts[i] > m.capacity ? 1 : 0;
    }
    part[thread][0] = listed;
    part[thread][1] = broken;
    part[thread][2] = largest;
    part[thread][3] = deferred;
  });
  block.each([&](int thread) {
    int64_t listed = 0;
    for (int i = 0; i < thread; ++i) listed += part[i][0];
    const int64_t first = m.first_tile + thread * share;
    for (int64_t i = first; i < first + share && i < end; ++i) {
      p.starts[i] = listed;
      listed += p.counts[i];
    }
    if (thread != 0) return;
    MergeTotals all{0, 0, 0, 0};
    for (int i = 0; i < block.threads(); ++i) {
      all.listed += part[i][0];
      all.broken += part[i][1];
      all.largest = part[i][2] > all.largest ? part[i][2] : all.largest;
      all.deferred += part[i][3];
    }
    p.totals[number] = all;
  });
}

// Tiles side by side hold rows in turn, so the entries of all of them are ranked together.
template <class Word, class Block>
FA_DEVICE void collect_tile(const Block& block, const MergeCollect& p, int64_t number) {
  const MergeMatrix& m = matrix_of(p.matrices, p.count, number);
  const int64_t local = number - m.first_tile, first = number - local % m.across;
  const MergeEntry* mine = p.entries + m.region + local * m.capacity;
  block.each([&](int thread) {
    for (int32_t j = thread; m.codes && j < p.counts[number]; j += block.threads()) {
      int64_t rank = 0;
      for (int64_t tile = first; tile < first + m.across; ++tile) {
        const MergeEntry* theirs = p.entries + m.region + (tile - m.first_tile) * m.capacity;
        for (int32_t i = 0; i < p.counts[tile]; ++i) rank += theirs[i].index < mine[j].index ? 1 : 0;
      }
      const int64_t place = m.list + p.starts[first] + rank;
      p.index[place] = mine[j].index;
      static_cast<Word*>(p.bits)[place] = static_cast<Word>(mine[j].bits);
    }
  });
}

}  // namespace fastadapt::cuda

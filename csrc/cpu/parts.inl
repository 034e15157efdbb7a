// Products of floats in parts (Parts in gemm.inl).

// Rows 2 q and 2 q + 1 of a piece of a panel, q in [from, to), as words of k in three parts; zeros past the piece.
FA_INLINE void split_rows(const Pass& pass, int64_t panel, int64_t from, int64_t to, uint32_t* out) {
  const auto* b = (const float*)pass.b + panel * pass.panel_stride;
  for (int64_t q = from; q < to; ++q) {
    uint32_t* words = out + q / 16 * 3 * 512 + q % 16 * 32;
#pragma GCC unroll 8
    for (int64_t j = 0; j < 32; j += W) {
      const float* column = b + j / kStrip<Parts> * pass.strip_stride + j % kStrip<Parts>;
      F even[3], odd[3];
      split(2 * q < pass.words ? load(column + 2 * q * kStrip<Parts>) : F{}, even);
      split(2 * q + 1 < pass.words ? load(column + (2 * q + 1) * kStrip<Parts>) : F{}, odd);
      for (int part = 0; part < 3; ++part) {
        const U pair = pair_of(even[part], odd[part]);
        std::memcpy(words + part * 512 + j, &pair, sizeof pair);
      }
    }
  }
}

// The pieces of a product in the order of its work: in every section of k all panels, in every panel all pieces.
class PieceOrder {
 public:
  PieceOrder(const Passes<Parts>& pieces, int64_t first, int64_t last) : pieces_(pieces), first_(first), last_(last) {}
  struct Place {
    int64_t panel;
    int piece, begin, end;  // pieces [begin, end) are its section
  };
  FA_INLINE Place start() const { return {first_, 0, 0, end_of(0)}; }
  FA_INLINE bool done(const Place& at) const { return at.piece >= pieces_.count(); }
  FA_INLINE Place after(Place at) const {
    if (done(at) || ++at.piece < at.end) return at;
    if (++at.panel < last_) at.piece = at.begin;
    else at = {first_, at.end, at.end, end_of(at.end)};
    return at;
  }

 private:
  int end_of(int begin) const {
    int end = begin + 1;
    while (end < pieces_.count() && pieces_[end].a % Tiles<Parts>::section != 0) ++end;
    return end;
  }
  const Passes<Parts>& pieces_;
  int64_t first_, last_;
};
FA_INLINE int64_t groups_of(const Pass& piece) { return (piece.words + 31) / 32; }

// While a piece of B is multiplied, the next one gets its parts, and memory brings the
// one after that.
template <class TileAt, class Add, class Epilogue>
FA_INLINE void product_of_parts(const ABlock& a, int64_t blocks, TileAt&& tile_at, const Passes<Parts>& pieces,
                                int64_t columns, int64_t first, int64_t last, float* c, const Ahead& ahead, Add&& add,
                                Epilogue&& epilogue) {
  using Tl = Tiles<Parts>;
  if (first >= last || blocks == 0) return;
  constexpr int64_t piece_words = Tl::pass / 32 * 3 * 512, sums = Tl::max_rows * 32;
  uint32_t* parts = scratch().get<uint32_t>(kPartsScratch, 2 * piece_words);
  const PieceOrder order(pieces, first, last);
  PieceOrder::Place now = order.start(), next = order.after(now), later = order.after(next);
  const bool sections = now.end < pieces.count();
  float* totals = sections ? scratch().get<float>(kTotalsScratch, (last - first) * blocks * sums) : nullptr;
  split_rows(pieces[0], first, 0, groups_of(pieces[0]) * 16, parts);
  [[maybe_unused]] typename Tl::Session session{};
  Waiting waiting;
  for (int64_t turn = 0; !order.done(now); ++turn, now = next, next = later, later = order.after(later)) {
    const int64_t groups = groups_of(pieces[now.piece]), steps = blocks * groups, panel = now.panel;
    const bool opens = now.piece == now.begin, closes = now.piece + 1 == now.end, ends = now.end == pieces.count();
    const uint32_t* b = parts + turn % 2 * piece_words;
    uint32_t* b_next = parts + (turn + 1) % 2 * piece_words;
    const Pass& piece_next = pieces[order.done(next) ? 0 : next.piece];
    const int64_t next_rows = order.done(next) ? 0 : groups_of(piece_next) * 16;
    const bool asks = W == 16 && ahead.weights() && !order.done(later);
    const Pass& piece_later = pieces[asks ? later.piece : 0];
    const auto* asked = (const char*)(piece_later.b + later.panel * piece_later.panel_stride);
    const int64_t lines = asks ? piece_later.words * 2 : 0;
    for (int64_t i = 0; i < blocks; ++i) {
      const RowTile t = tile_at(i);
      float* tile = c + i * sums;
      const int64_t some = (waiting.tile.rows + groups - 1) / groups;
      const Lines mine = ahead.share(turn * blocks + i, (last - first) * pieces.count() * blocks);
      Tl::run_beside(columns - panel * 32 <= 16, (int)t.rows, a.row(t.m, pieces[now.piece].a), b, groups, tile, !opens,
                     [&](int64_t group) __attribute__((always_inline)) {
        const int64_t step = i * groups + group;
        ask({asked + lines * step / steps * 64, lines * (step + 1) / steps - lines * step / steps});
        ask({mine.p + mine.count * group / groups * 64,
             mine.count * (group + 1) / groups - mine.count * group / groups});
        split_rows(piece_next, next.panel, next_rows * step / steps, next_rows * (step + 1) / steps, b_next);
        waiting.some(group, some, epilogue);
      }, [&](bool two) __attribute__((always_inline)) {
        if (closes && ends) add.while_in_registers(two, panel, t);
      });
      waiting.tile.rows = 0;
      if (!closes) continue;
      if (sections) {
        float* total = totals + ((panel - first) * blocks + i) * sums;
        float* to = ends ? tile : total;
        for (int64_t j = 0; j < t.rows * 32; j += W)
          store(to + j, now.begin == 0 ? load(tile + j) : load(total + j) + load(tile + j));
      }
      if (!ends) continue;
      add(panel, t, tile);
      waiting = {panel, t, tile};
    }
  }
  waiting.some(0, waiting.tile.rows, epilogue);
}

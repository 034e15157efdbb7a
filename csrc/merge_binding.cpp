// remerge_ of fastadapt/ops/schemas.py: one pass over the chunks of all matrices. A pass that meets a result that is
// not finite is run backwards over the chunks that it changed, so either every weight changes or none. The way back is
// exact where residues were read and are made; where either step rounds, a dry run on copies of the chunks goes first,
// and what is left to fail then, an allocation for new residues, happens with a copy of the weights in hand.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/arguments.h"
#include "cpu/capability.h"
#include "cpu/kernels.h"
#include "cpu/pool.h"
#include "each.h"

namespace fastadapt::cpu {
namespace {

using at::Tensor;
using Entries = std::vector<MergeEntry>;

constexpr int64_t kChunk = int64_t{1} << 16;  // weights: with codes and lists they stay in the second-level cache
constexpr int64_t kRows = 4;                  // a chunk's rows are a multiple
constexpr int64_t kCopyAbove = 50;            // COPY_ABOVE of fastadapt/ops/merge.py
constexpr int64_t kPanelColumns = 64;

WeightType weight_type(const Tensor& w) {
  switch (w.scalar_type()) {
    case at::kFloat: return WeightType::f32;
    case at::kBFloat16: return WeightType::bf16;
    case at::kHalf: return WeightType::f16;
    default:
      TORCH_CHECK_TYPE(false, "weights: got ", w.scalar_type(), "; accepted are float32, bfloat16 and float16");
  }
}

// s * B A of every matrix, ready for the kernels.
class Updates {
 public:
  Updates(at::TensorList weights, at::TensorList a, at::TensorList b, at::ArrayRef<double> scales) {
    int64_t size = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      MergePack p{};
      p.type = weight_type(weights[i]);
      const Tensor& x = sources_.emplace_back(readable(a[i]));
      p.a_type = type_of(x);
      p.a = x.const_data_ptr();
      const Tensor& y = sources_.emplace_back(readable(b[i]));
      p.b_type = type_of(y);
      p.b = y.const_data_ptr();
      p.rows = b[i].size(0);
      p.cols = a[i].size(1);
      p.rank = a[i].size(0);
      p.scale = static_cast<float>(scales[i]);
      packs_.push_back(p);
      size += panels(p) + (p.rows * p.rank + 15) / 16 * 16;
    }
    floats_ = pooled_empty({size}, at::kFloat);
    float* at = size ? static_cast<float*>(floats_.data_ptr()) : nullptr;
    for (MergePack& p : packs_) {
      p.panels = at;
      p.t = at + panels(p);
      at = p.t + (p.rows * p.rank + 15) / 16 * 16;
    }
  }
  // The first matrix whose a, b or scale is not finite, else -1.
  int64_t pack(const Table& table) {
    std::atomic<int64_t> refused{std::numeric_limits<int64_t>::max()};
    const bool done = each(static_cast<int64_t>(packs_.size()), [&](int64_t i) {
      if (std::isfinite(packs_[i].scale) && table.merge_pack(packs_[i])) return;
      for (int64_t first = refused; i < first && !refused.compare_exchange_weak(first, i);) {
      }
    });
    TORCH_CHECK(done, "a parallel region of fastadapt failed");
    return refused == std::numeric_limits<int64_t>::max() ? -1 : refused.load();
  }
  bool empty() const { return packs_.empty(); }
  const MergePack& operator[](int64_t i) const { return packs_[i]; }

 private:
  static Tensor readable(const Tensor& t) {
    return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 ? t : t.to(at::kFloat);
  }
  static DType type_of(const Tensor& t) { return t.scalar_type() == at::kFloat ? DType::f32 : DType::bf16; }
  static int64_t panels(const MergePack& p) {
    return (p.cols + kPanelColumns - 1) / kPanelColumns * kPanelColumns * p.rank;
  }
  std::vector<Tensor> sources_;
  std::vector<MergePack> packs_;
  Tensor floats_;
};

struct Matrix {
  WeightType type;
  int64_t rows, cols, bytes;  // bytes of a weight
  char* w;
  // What is merged now: its codes, or a copy of the weight, or neither.
  const int8_t* old_codes = nullptr;
  const char* old_copy = nullptr;
  const int32_t* old_index = nullptr;
  const void* old_bits = nullptr;
  int64_t old_count = 0;
  int8_t* codes = nullptr;  // of what is being merged; null where its way back is to round
  std::atomic<int64_t> listed{0};
  Tensor copy;  // of the weight, where too many are listed

  int64_t numel() const { return rows * cols; }
  bool crowded() const { return codes && (listed * kCopyAbove > numel() || numel() > std::numeric_limits<int32_t>::max()); }
};

struct Chunk {
  int64_t matrix, row, rows;
  bool done = false;
  Entries listed;  // indices within the chunk
};

void put(char* w, int64_t bytes, uint32_t index, uint32_t bits) {
  if (bytes == 4) {
    std::memcpy(w + 4 * static_cast<int64_t>(index), &bits, 4);
  } else {
    const uint16_t half = static_cast<uint16_t>(bits);
    std::memcpy(w + 2 * static_cast<int64_t>(index), &half, 2);
  }
}

class Remerge {
 public:
  Remerge(at::TensorList weights, Updates& old_update, Updates& update, at::TensorList old_codes,
          at::TensorList old_index, at::TensorList old_bits, const Tensor& codes)
      : table_(active()), old_(old_update), new_(update), matrices_(weights.size()) {
    int64_t offset = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor& w = weights[i];
      Matrix& m = matrices_[i];
      m.type = weight_type(w);
      m.rows = w.size(0);
      m.cols = w.size(1);
      m.bytes = static_cast<int64_t>(w.element_size());
      m.w = static_cast<char*>(w.data_ptr());
      if (!old_codes.empty()) {
        if (old_codes[i].scalar_type() == at::kChar) {
          m.old_codes = old_codes[i].const_data_ptr<int8_t>();
          m.old_index = old_index[i].const_data_ptr<int32_t>();
          m.old_bits = old_bits[i].const_data_ptr();
          m.old_count = old_index[i].numel();
        } else {
          m.old_copy = static_cast<const char*>(old_codes[i].const_data_ptr());
        }
      }
      if (codes.defined()) m.codes = static_cast<int8_t*>(codes.data_ptr()) + offset;
      offset += code_bytes(w);
      if (m.numel() == 0) continue;
      const int64_t rows = std::max<int64_t>(1, kChunk / m.cols / kRows) * kRows;
      for (int64_t row = 0; row < m.rows; row += rows)
        chunks_.push_back({static_cast<int64_t>(i), row, std::min(rows, m.rows - row), false, {}});
    }
    const bool way_out_rounds = !old_.empty() && old_codes.empty();
    rounds_ = way_out_rounds || (!new_.empty() && !codes.defined());
    if (way_out_rounds && codes.defined())
      for (const Tensor& w : weights) before_.push_back(w.clone());
  }
  static int64_t code_bytes(const Tensor& w) { return (w.numel() + 63) / 64 * 64; }

  // -1, or the first matrix found whose result is not finite; then nothing has changed.
  int64_t run() {
    if (rounds_) {
      dry_run();
      if (refused_ >= 0) return refused_;
    }
    const bool ran = each(static_cast<int64_t>(chunks_.size()), [&](int64_t i) {
      Chunk& c = chunks_[i];
      if (refused_ < 0 && !broken_ && !matrices_[c.matrix].crowded()) change(c);
    });
    try {
      if (ran && !broken_ && refused_ < 0)
        for (size_t i = 0; i < matrices_.size() && refused_ < 0; ++i)
          if (matrices_[i].crowded()) copy_instead(static_cast<int64_t>(i));
    } catch (const std::exception&) {
      undo();
      throw;
    }
    if (ran && !broken_ && refused_ < 0) return -1;
    undo();
    TORCH_CHECK(refused_ >= 0, "merging failed in a parallel region; nothing was changed");
    return refused_;
  }

  // The residues' lists, and copies in place of codes; call after run().
  void collect(at::TensorList weights, const Tensor& all_codes, std::vector<Tensor>& codes, std::vector<Tensor>& index,
               std::vector<Tensor>& bits) {
    auto chunk = chunks_.begin();
    int64_t offset = 0;
    for (size_t i = 0; i < matrices_.size(); ++i) {
      const Matrix& m = matrices_[i];
      const int64_t count = m.copy.defined() ? 0 : m.listed.load();
      const Tensor where = pooled_empty({count}, at::kInt);
      const Tensor what = pooled_empty({count}, m.bytes == 4 ? at::kInt : at::kShort);
      auto* to = static_cast<int32_t*>(where.data_ptr());
      auto* to_bits = static_cast<char*>(what.data_ptr());
      int64_t n = 0;
      for (; chunk != chunks_.end() && chunk->matrix == static_cast<int64_t>(i); ++chunk)
        for (size_t k = 0; count && k < chunk->listed.size(); ++k, ++n) {
          to[n] = static_cast<int32_t>(chunk->row * m.cols + chunk->listed[k].index);
          put(to_bits, m.bytes, static_cast<uint32_t>(n), chunk->listed[k].bits);
        }
      codes.push_back(m.copy.defined() ? m.copy : all_codes.as_strided({m.rows, m.cols}, {m.cols, 1}, offset));
      index.push_back(where);
      bits.push_back(what);
      offset += code_bytes(weights[i]);
    }
  }
  void undo() {
    const bool undone = each(static_cast<int64_t>(chunks_.size()), [&](int64_t i) {
      Chunk& c = chunks_[i];
      if (!before_.empty()) {
        const Matrix& m = matrices_[c.matrix];
        const char* from = static_cast<const char*>(before_[c.matrix].const_data_ptr()) + c.row * m.cols * m.bytes;
        std::memcpy(at(c), from, static_cast<size_t>(c.rows * m.cols * m.bytes));
      } else if (c.done) {
        restore(c);
      }
    });
    TORCH_CHECK(undone, "a refused merge could not be undone: a parallel region of fastadapt failed");
  }

 private:
  MergeRows rows_of(const Chunk& c, char* w, const Updates& update, int8_t* codes) const {
    const Matrix& m = matrices_[c.matrix];
    const MergePack& u = update[c.matrix];
    MergeRows p{};
    p.type = m.type;
    p.rows = c.rows;
    p.cols = m.cols;
    p.rank = u.rank;
    p.w = w;
    p.a = u.panels;
    p.t = u.t + c.row * u.rank;
    p.codes = codes ? codes + c.row * m.cols : nullptr;
    return p;
  }
  char* at(const Chunk& c) const {
    const Matrix& m = matrices_[c.matrix];
    return m.w + c.row * m.cols * m.bytes;
  }

  // The old one out of w, the chunk's weights or a copy of them. False where a result is not finite.
  bool take_out(const Chunk& c, char* w) const {
    const Matrix& m = matrices_[c.matrix];
    const int64_t first = c.row * m.cols, count = c.rows * m.cols;
    if (m.old_copy) {
      std::memcpy(w, m.old_copy + first * m.bytes, static_cast<size_t>(count * m.bytes));
      return true;
    }
    MergeRows p = rows_of(c, w, old_, const_cast<int8_t*>(m.old_codes));
    const bool finite = table_.unmerge_rows(p);
    const int32_t* end = m.old_index + m.old_count;
    for (const int32_t* i = std::lower_bound(m.old_index, end, first); i != end && *i < first + count; ++i) {
      const int64_t n = i - m.old_index;
      const uint32_t bits = m.bytes == 4 ? static_cast<const uint32_t*>(m.old_bits)[n]
                                         : static_cast<const uint16_t*>(m.old_bits)[n];
      put(w, m.bytes, static_cast<uint32_t>(*i - first), bits);
    }
    return finite;
  }
  // From the chunk as the new one left it to the weights as they were without any.
  void take_new_out(const Chunk& c, const MergeEntry* listed, size_t count) const {
    const Matrix& m = matrices_[c.matrix];
    MergeRows p = rows_of(c, at(c), new_, m.codes);
    table_.unmerge_rows(p);
    for (size_t i = 0; i < count; ++i) put(at(c), m.bytes, listed[i].index, listed[i].bits);
  }
  void put_old_in(const Chunk& c) const {
    if (old_.empty()) return;
    MergeRows p = rows_of(c, at(c), old_, nullptr);
    table_.merge_rows(p);
  }

  void change(Chunk& c) {
    Matrix& m = matrices_[c.matrix];
    static thread_local Entries room;
    if (m.codes && static_cast<int64_t>(room.size()) < c.rows * m.cols) room.resize(c.rows * m.cols);
    bool finite = old_.empty() || take_out(c, at(c));
    c.done = true;
    if (new_.empty()) return;
    MergeRows p = rows_of(c, at(c), new_, m.codes);
    p.listed = room.data();
    finite &= table_.merge_rows(p);
    std::sort(room.begin(), room.begin() + p.count, [](auto& a, auto& b) { return a.index < b.index; });
    try {
      c.listed.assign(room.begin(), room.begin() + p.count);
    } catch (const std::bad_alloc&) {
      take_new_out(c, room.data(), static_cast<size_t>(p.count));
      put_old_in(c);
      c.done = false;
      broken_ = true;
      return;
    }
    m.listed += p.count;
    if (!finite) refused_ = c.matrix;
  }

  void restore(Chunk& c) {
    const Matrix& m = matrices_[c.matrix];
    if (m.copy.defined()) {
      const int64_t first = c.row * m.cols * m.bytes;
      std::memcpy(at(c), static_cast<const char*>(m.copy.const_data_ptr()) + first,
                  static_cast<size_t>(c.rows * m.cols * m.bytes));
    } else if (!new_.empty()) {
      take_new_out(c, c.listed.data(), c.listed.size());
    }
    put_old_in(c);
    c.done = false;
  }

  void dry_run() {
    const bool ran = each(static_cast<int64_t>(chunks_.size()), [&](int64_t i) {
      const Chunk& c = chunks_[i];
      const Matrix& m = matrices_[c.matrix];
      if (refused_ >= 0) return;
      static thread_local std::vector<char> copy;
      copy.assign(at(c), at(c) + c.rows * m.cols * m.bytes);
      bool finite = old_.empty() || take_out(c, copy.data());
      if (!new_.empty()) {
        MergeRows p = rows_of(c, copy.data(), new_, nullptr);
        finite &= table_.merge_rows(p);
      }
      if (!finite) refused_ = c.matrix;
    });
    TORCH_CHECK(ran, "a parallel region of fastadapt failed");
  }

  // Keeps a copy of a matrix of which too many weights would be listed.
  void copy_instead(int64_t matrix) {
    Matrix& m = matrices_[matrix];
    const at::ScalarType type = m.type == WeightType::f32    ? at::kFloat
                                : m.type == WeightType::bf16 ? at::kBFloat16
                                                             : at::kHalf;
    const Tensor copy = pooled_empty({m.rows, m.cols}, type);
    std::vector<Chunk*> mine;
    for (Chunk& c : chunks_)
      if (c.matrix == matrix) mine.push_back(&c);
    const auto size = static_cast<int64_t>(mine.size());
    // Bare weights into the copy first: then an interruption anywhere can be undone.
    bool ran = each(size, [&](int64_t i) {
      Chunk& c = *mine[i];
      if (c.done) {
        take_new_out(c, c.listed.data(), c.listed.size());
      } else if (!old_.empty()) {
        take_out(c, at(c));
      }
      c.done = true;
      c.listed.clear();
      const int64_t first = c.row * m.cols * m.bytes;
      std::memcpy(static_cast<char*>(copy.data_ptr()) + first, at(c), static_cast<size_t>(c.rows * m.cols * m.bytes));
    });
    TORCH_CHECK(ran, "a parallel region of fastadapt failed");
    m.copy = copy;
    ran = each(size, [&](int64_t i) {
      MergeRows p = rows_of(*mine[i], at(*mine[i]), new_, nullptr);
      if (!table_.merge_rows(p)) refused_ = matrix;
    });
    TORCH_CHECK(ran, "a parallel region of fastadapt failed");
  }

  const Table& table_;
  const Updates &old_, &new_;
  std::vector<Matrix> matrices_;
  std::vector<Chunk> chunks_;
  std::vector<Tensor> before_;
  bool rounds_ = false;
  std::atomic<int64_t> refused_{-1};
  std::atomic<bool> broken_{false};
};

// What the pass reads and writes by address. fastadapt/ops/merge.py has checked it already, but for the lists' values.
void check_contiguous(const char* name, size_t i, const Tensor& t) {
  TORCH_CHECK_VALUE(t.is_cpu() && t.dim() == 2 && t.is_contiguous(), name, "[", i, "]: got shape ", t.sizes(), " on ",
                    t.device(), "; accepted is a contiguous matrix on the CPU");
}
void check_update(at::TensorList weights, at::TensorList a, at::TensorList b, at::ArrayRef<double> scales) {
  if (a.empty() && b.empty() && scales.empty()) return;
  const size_t count = weights.size();
  TORCH_CHECK_VALUE(a.size() == count && b.size() == count && scales.size() == count, "a, b, scales: got ", a.size(), ", ",
                    b.size(), " and ", scales.size(), " for ", count, " weights; accepted is one each");
  for (size_t i = 0; i < count; ++i) {
    check_contiguous("a", i, a[i]);
    check_contiguous("b", i, b[i]);
    check_matrix("a", a[i], a[i].size(0), weights[i].size(1));
    check_matrix("b", b[i], weights[i].size(0), a[i].size(0));
  }
}
void check_residues(at::TensorList weights, at::TensorList codes, at::TensorList index, at::TensorList bits) {
  if (codes.empty() && index.empty() && bits.empty()) return;
  TORCH_CHECK_VALUE(codes.size() == weights.size() && index.size() == weights.size() && bits.size() == weights.size(),
                    "residues: got ", codes.size(), " for ", weights.size(), " weights; accepted is one each");
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    const auto of_bits = w.element_size() == 4 ? at::kInt : at::kShort;
    const bool fits = codes[i].sizes() == w.sizes() && index[i].dim() == 1 && index[i].sizes() == bits[i].sizes() &&
                      (codes[i].scalar_type() == at::kChar || codes[i].scalar_type() == w.scalar_type()) &&
                      index[i].scalar_type() == at::kInt && bits[i].scalar_type() == of_bits;
    const bool reachable = codes[i].is_cpu() && index[i].is_cpu() && bits[i].is_cpu() && codes[i].is_contiguous() &&
                           index[i].is_contiguous() && bits[i].is_contiguous();
    TORCH_CHECK_VALUE(fits && reachable, "residues[", i, "]: does not fit a weight of ", w.sizes(), " and ", w.scalar_type(),
                      "; accepted is what merge_ put there");
    const auto* at = index[i].const_data_ptr<int32_t>();
    const int64_t count = index[i].numel();
    int out_of_order = 0;  // one answer for all: the compiler makes vectors of it
    for (int64_t n = 1; n < count; ++n) out_of_order |= at[n] <= at[n - 1];
    TORCH_CHECK_VALUE(count == 0 || (!out_of_order && at[0] >= 0 && at[count - 1] < w.numel()), "residues[", i,
                      "].index: got ", out_of_order ? "places out of order" : "a place outside of the weight",
                      "; accepted are ascending places below ", w.numel(), "; nothing was changed");
  }
}

using Residues = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor>;

Residues remerge(at::TensorList weights, at::TensorList old_a, at::TensorList old_b, at::ArrayRef<double> old_scales,
                 at::TensorList old_codes, at::TensorList old_index, at::TensorList old_bits, at::TensorList a,
                 at::TensorList b, at::ArrayRef<double> scales, bool exact) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_contiguous("weights", i, weights[i]);
    weight_type(weights[i]);
  }
  check_update(weights, old_a, old_b, old_scales);
  check_update(weights, a, b, scales);
  check_residues(weights, old_codes, old_index, old_bits);
  Residues out;
  auto& [codes, index, bits, refused] = out;
  Updates old_update(weights, old_a, old_b, old_scales), update(weights, a, b, scales);
  int64_t culprit = old_update.pack(active());
  if (culprit < 0) culprit = update.pack(active());
  if (culprit < 0) {
    Tensor all_codes;
    if (exact && !update.empty()) {
      int64_t size = 0;
      for (const Tensor& w : weights) size += Remerge::code_bytes(w);
      all_codes = pooled_empty({size}, at::kChar);  // one block: fresh pages for each matrix would cost more than the pass
    }
    Remerge pass(weights, old_update, update, old_codes, old_index, old_bits, all_codes);
    culprit = pass.run();
    if (culprit < 0 && all_codes.defined()) {
      try {
        pass.collect(weights, all_codes, codes, index, bits);
      } catch (const std::exception&) {
        pass.undo();
        throw;
      }
    }
  }
  refused = pooled_empty({}, at::kLong);
  *refused.data_ptr<int64_t>() = culprit;
  return out;
}

}  // namespace
}  // namespace fastadapt::cpu

TORCH_LIBRARY_IMPL(fastadapt, CPU, m) { m.impl("remerge_", TORCH_FN(fastadapt::cpu::remerge)); }

// The CUDA kernels as implementations of the ops `fastadapt_cuda::...` (fastadapt/ops/schemas.py): checks nothing that
// the Python side has checked, allocates outputs, picks the launch. No header of CUDA's, so that every build compiles
// it; on CPU tensors the kernels run emulated, which is how their tests reach them without a GPU.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>
#include <vector>

#include "cuda/kernels.h"

namespace fastadapt::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

const Launcher& launcher(const Tensor& of) {
#if defined(FASTADAPT_CUDA)
  if (of.is_cuda()) return gpu_launcher();
#endif
  TORCH_CHECK(of.is_cpu(), "this build has no CUDA kernels");
  return emulated_launcher();
}
void* stream_of(const Tensor& t) {
  if (t.is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(t.device().type()).getStream(t.device()).native_handle();
}
void check(const char* error) { TORCH_CHECK(error == nullptr, "a CUDA kernel of fastadapt could not be launched: ", error); }

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: TORCH_CHECK(false, "the CUDA kernels take float32, bfloat16 and float16, got ", t.scalar_type());
  }
}
bool readable(const Tensor& t) {
  return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
}
bool aligned(const void* p, int64_t bytes = 16) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// -- few rows -----------------------------------------------------------------------------------------------------

// Contiguous and in the compute type, which costs nothing where it is so already. Keep the result while it is in use.
Tensor in_type(const Tensor& t, at::ScalarType type) { return t.to(type).contiguous(); }
OptionalTensor in_type(const OptionalTensor& t, at::ScalarType type) {
  return t.has_value() ? OptionalTensor(in_type(*t, type)) : t;
}
// Contiguous, in one of the three types as it is.
OptionalTensor as_it_is(const OptionalTensor& t) {
  if (!t.has_value()) return t;
  return (readable(*t) ? *t : t->to(at::kFloat)).contiguous();
}
const void* data(const OptionalTensor& t) { return t.has_value() ? t->const_data_ptr() : nullptr; }
Type type_or_f32(const OptionalTensor& t) { return t.has_value() ? type_of(*t) : Type::f32; }
bool rows_aligned(const Tensor& t) {
  return aligned(t.const_data_ptr()) && t.size(1) * static_cast<int64_t>(t.element_size()) % 16 == 0;
}

Dropout dropout_of(double p, const OptionalTensor& seed) {
  const auto threshold = static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
  if (!seed.has_value() || threshold == 0) return {nullptr, 0, 1.0f};
  return {seed->const_data_ptr<int64_t>(), threshold, p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p))};
}

Activation activation_of(std::string_view name) {
  static constexpr const char* kNames[] = {"none", "relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid", "leaky_relu"};
  for (int i = 0; i < 8; ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  TORCH_CHECK(false, "activation: got ", name);
}

// One row a block until all processors have one, then more, as far as shared memory goes.
template <class Bytes>
int rows_a_block(const Launcher& to, int64_t rows, Bytes&& shared_bytes) {
  const int64_t processors = to.processors();
  int chosen = rows <= processors ? 1 : rows <= 2 * processors ? 2 : kFewMostRows;
  while (chosen > 1 && shared_bytes(chosen) > kFewSharedBytes) chosen /= 2;
  TORCH_CHECK(shared_bytes(chosen) <= kFewSharedBytes, "a row is wider than shared memory holds");
  return chosen;
}

std::tuple<Tensor, Tensor, Tensor> bottleneck_forward(
    const Tensor& x, const Tensor& w_down, const OptionalTensor& b_down, const Tensor& w_up,
    const OptionalTensor& b_up, std::string_view activation, double scale, const OptionalTensor& scale_vector,
    bool skip, const OptionalTensor& residual, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    double eps, double dropout_p, const OptionalTensor& seed, bool save) {
  const c10::DeviceGuard device(x.device());
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Launcher& to = launcher(x);
  const auto type = x.scalar_type();
  const int64_t rows = x.size(0), hidden = x.size(1), width = w_down.size(0);
  Tensor y = at::empty_like(x);
  Tensor z = save ? at::empty({rows, width}, x.options()) : at::empty({0}, x.options());
  Tensor s = save && norm_weight.has_value() ? at::empty_like(x) : at::empty({0}, x.options());
  if (rows == 0) return {y, z, s};
  const Tensor down = in_type(w_down, type), up = in_type(w_up, type);
  const OptionalTensor down_bias = in_type(b_down, type), up_bias = in_type(b_up, type);
  const OptionalTensor vector = as_it_is(scale_vector), weight = as_it_is(norm_weight), bias = as_it_is(norm_bias);
  BottleneckArgs p{};
  p.x = x.const_data_ptr();
  p.w_down = down.const_data_ptr();
  p.b_down = data(down_bias);
  p.w_up = up.const_data_ptr();
  p.b_up = data(up_bias);
  p.scale_vector = data(vector);
  p.residual = data(residual);
  p.norm_weight = data(weight);
  p.norm_bias = data(bias);
  p.y = y.data_ptr();
  p.z = save ? z.data_ptr() : nullptr;
  p.s = s.numel() ? s.data_ptr() : nullptr;
  p.rows = rows;
  p.hidden = hidden;
  p.width = width;
  p.vector_type = type_or_f32(vector);
  p.weight_type = type_or_f32(weight);
  p.bias_type = type_or_f32(bias);
  p.activation = activation_of(activation);
  p.scale = static_cast<float>(scale);
  p.eps = static_cast<float>(eps);
  p.skip = skip;
  p.x_aligned = rows_aligned(x);
  p.down_aligned = rows_aligned(down);
  p.up_aligned = rows_aligned(up);
  p.dropout = dropout_of(dropout_p, seed);
  const int a_block = rows_a_block(to, rows, [&](int n) { return bottleneck_shared_bytes(hidden, width, n); });
  check(to.bottleneck(p, type_of(x), a_block, stream_of(x)));
  return {y, z, s};
}

std::tuple<Tensor, Tensor> add_norm_forward(const Tensor& x, const OptionalTensor& residual, const Tensor& norm_weight,
                                            const Tensor& norm_bias, double eps, double dropout_p,
                                            const OptionalTensor& seed, bool save) {
  const c10::DeviceGuard device(x.device());
  const at::AutoDispatchBelowADInplaceOrView guard;
  const Launcher& to = launcher(x);
  Tensor y = at::empty_like(x), s = save ? at::empty_like(x) : at::empty({0}, x.options());
  if (x.size(0) == 0) return {y, s};
  const OptionalTensor weight = as_it_is(norm_weight), bias = as_it_is(norm_bias);
  AddNormArgs p{};
  p.x = x.const_data_ptr();
  p.residual = data(residual);
  p.norm_weight = data(weight);
  p.norm_bias = data(bias);
  p.y = y.data_ptr();
  p.s = save ? s.data_ptr() : nullptr;
  p.rows = x.size(0);
  p.hidden = x.size(1);
  p.weight_type = type_of(*weight);
  p.bias_type = type_of(*bias);
  p.eps = static_cast<float>(eps);
  p.x_aligned = rows_aligned(x);
  p.dropout = dropout_of(dropout_p, seed);
  const int a_block = rows_a_block(to, p.rows, [&](int n) { return add_norm_shared_bytes(p.hidden, n); });
  check(to.add_norm(p, type_of(x), a_block, stream_of(x)));
  return {y, s};
}

// -- merging ------------------------------------------------------------------------------------------------------

constexpr int64_t kCopyAbove = 50;  // COPY_ABOVE of fastadapt/ops/merge.py
constexpr int64_t kRoom = 32;       // one weight in so many may be listed before a tile asks for more room

using Residues = std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor>;

// One call of remerge_ on the weights that have elements; `of` are their positions in the call's lists.
class Remerge {
 public:
  Remerge(std::vector<Tensor> weights) : weights_(std::move(weights)), to_(launcher(weights_[0])) {
    type_ = type_of(weights_[0]);
    threads_ = best_threads();
    columns_ = merge_tile_columns(type_, threads_);
    for (const Tensor& w : weights_) {
      MergeMatrix m{};
      m.w = w.data_ptr();
      m.rows = w.size(0);
      m.cols = w.size(1);
      m.across = (m.cols + columns_ - 1) / columns_;
      m.first_tile = tiles_;
      m.aligned = rows_aligned(w) && m.cols % 8 == 0;
      tiles_ += tiles_of(m);
      table_.push_back(m);
    }
    TORCH_CHECK(tiles_ < std::numeric_limits<int32_t>::max(), "weights: more than one launch can hold");
    const auto ints = weights_[0].options().dtype(at::kInt);
    counts_ = at::empty({tiles_}, ints);
    broken_ = at::empty({tiles_}, ints);
    starts_ = at::empty({tiles_}, ints.dtype(at::kLong));
  }

  void take_out(size_t i, const Tensor& a, const Tensor& b, double scale) { set(i, table_[i].out, a, b, scale); }
  void put_in(size_t i, const Tensor& a, const Tensor& b, double scale) { set(i, table_[i].in, a, b, scale); }
  void way_back(size_t i, const Tensor& codes, const Tensor& index, const Tensor& bits) {
    MergeMatrix& m = table_[i];
    if (codes.scalar_type() != at::kChar) {
      m.old_copy = codes.const_data_ptr();
      m.aligned = m.aligned && aligned(m.old_copy);
      return;
    }
    m.old_codes = codes.const_data_ptr<int8_t>();
    m.old_index = index.const_data_ptr<int32_t>();
    m.old_bits = bits.const_data_ptr();
    m.old_count = index.numel();
    m.aligned = m.aligned && aligned(m.old_codes, 8);
  }
  void keep_way_back(size_t i, const Tensor& codes) {
    MergeMatrix& m = table_[i];
    m.codes = codes.data_ptr<int8_t>();
    m.aligned = m.aligned && aligned(m.codes, 8);
    m.capacity = countable(m) ? kMergeRows * columns_ / kRoom : -1;  // -1: no tile's list ever fits
    m.region = room_;
    room_ += tiles_of(m) * std::max<int64_t>(m.capacity, 0);
  }

  // -1, or the first weight whose result is not finite; then nothing has changed.
  int64_t run(bool check_first) {
    const Tensor table = uploaded(table_);
    entries_ = room(room_);
    if (check_first) {
      launch(table, 0, table_.size(), MergeMode::check, entries_);
      if (const int64_t culprit = first_broken(); culprit >= 0) return culprit;
    }
    launch(table, 0, table_.size(), MergeMode::change, entries_);
    const int64_t culprit = first_broken();
    if (culprit >= 0) undo(true);
    return culprit;
  }

  // What makes the way back exact, after a run that succeeded.
  void collect(std::vector<Tensor>& codes, std::vector<Tensor>& index, std::vector<Tensor>& bits) {
    std::vector<bool> copied(table_.size()), again(table_.size());
    int64_t listed = 0;
    bool redo = false;
    for (size_t i = 0; i < table_.size(); ++i) {
      copied[i] = totals_[i].listed * kCopyAbove > numel(table_[i]) || !countable(table_[i]);
      again[i] = copied[i] || totals_[i].deferred > 0;
      redo |= again[i];
      table_[i].list = listed;
      listed += copied[i] ? 0 : totals_[i].listed;
    }
    const auto options = weights_[0].options();
    const Tensor all_index = at::empty({listed}, options.dtype(at::kInt));
    const Tensor all_bits = at::empty({listed}, options.dtype(type_ == Type::f32 ? at::kInt : at::kShort));
    if (redo) {
      undo(false, &again);
      const std::vector<MergeMatrix> before = table_;
      int64_t more = 0;
      for (size_t i = 0; i < table_.size(); ++i) {
        MergeMatrix& m = table_[i];
        m.out = {};
        m.old_copy = nullptr;
        if (copied[i]) {
          codes[i] = weights_[i].clone();
          m.codes = nullptr;
        }
        m.capacity = totals_[i].largest;
        m.region = more;
        if (again[i] && !copied[i]) more += tiles_of(m) * m.capacity;
      }
      const Tensor wider = room(more), table = uploaded(table_);
      for (size_t i = 0; i < table_.size(); ++i) {
        if (!again[i]) continue;
        launch(table, i, 1, MergeMode::change, wider);
        if (!copied[i]) list(table, i, 1, wider, all_index, all_bits);
        table_[i].codes = nullptr;  // listed already, or copied
      }
      for (size_t i = 0; i < table_.size(); ++i) {
        table_[i].capacity = before[i].capacity;
        table_[i].region = before[i].region;
      }
    }
    if (listed > 0) list(uploaded(table_), 0, table_.size(), entries_, all_index, all_bits);
    for (size_t i = 0; i < table_.size(); ++i) {
      const int64_t n = copied[i] ? 0 : totals_[i].listed;
      index.push_back(all_index.narrow(0, table_[i].list, n));
      bits.push_back(all_bits.narrow(0, table_[i].list, n));
    }
  }

 private:
  static int64_t numel(const MergeMatrix& m) { return m.rows * m.cols; }
  static bool countable(const MergeMatrix& m) { return numel(m) <= std::numeric_limits<int32_t>::max(); }
  static int64_t tiles_of(const MergeMatrix& m) { return (m.rows + kMergeRows - 1) / kMergeRows * m.across; }

  // Whole warps of which the fewest threads lie past a row's end.
  int best_threads() const {
    int best = 0;
    int64_t least = 0;
    for (const int threads : {128, 96}) {
      const int64_t columns = merge_tile_columns(type_, threads);
      int64_t held = 0;
      for (const Tensor& w : weights_) held += w.size(0) * ((w.size(1) + columns - 1) / columns * columns);
      if (best == 0 || held < least) {
        best = threads;
        least = held;
      }
    }
    return best;
  }

  void set(size_t i, Update& u, const Tensor& a, const Tensor& b, double scale) {
    const Tensor x = readable(a) ? a : a.to(at::kFloat), y = readable(b) ? b : b.to(at::kFloat);
    sources_.push_back(x);  // held until the launches are made
    sources_.push_back(y);
    u = {x.const_data_ptr(), y.const_data_ptr(), x.size(0), static_cast<float>(scale), type_of(x), type_of(y)};
    table_[i].aligned = table_[i].aligned && aligned(u.a);
  }

  Tensor uploaded(const std::vector<MergeMatrix>& table) const {
    const Tensor bytes = at::empty({static_cast<int64_t>(table.size() * sizeof(MergeMatrix))}, at::kByte);
    std::memcpy(bytes.data_ptr(), table.data(), table.size() * sizeof(MergeMatrix));
    return bytes.to(weights_[0].device());
  }
  Tensor room(int64_t entries) const {
    return at::empty({entries * static_cast<int64_t>(sizeof(MergeEntry))}, weights_[0].options().dtype(at::kByte));
  }
  int64_t first_tile(size_t i) const { return i < table_.size() ? table_[i].first_tile : tiles_; }

  // Of matrices [first, first + n).
  void launch(const Tensor& table, size_t first, size_t n, MergeMode mode, const Tensor& entries) {
    MergeArgs p{};
    p.matrices = static_cast<const MergeMatrix*>(table.const_data_ptr()) + first;
    p.count = static_cast<int64_t>(n);
    p.first = first_tile(first);
    p.tiles = first_tile(first + n) - p.first;
    p.mode = mode;
    p.counts = counts_.data_ptr<int32_t>();
    p.broken = broken_.data_ptr<int32_t>();
    p.entries = static_cast<MergeEntry*>(entries.data_ptr());
    check(to_.remerge(p, type_, threads_, stream_of(weights_[0])));
  }
  void list(const Tensor& table, size_t first, size_t n, const Tensor& entries, const Tensor& index,
            const Tensor& bits) {
    MergeCollect p{};
    p.matrices = static_cast<const MergeMatrix*>(table.const_data_ptr()) + first;
    p.count = static_cast<int64_t>(n);
    p.first = first_tile(first);
    p.tiles = first_tile(first + n) - p.first;
    p.counts = counts_.const_data_ptr<int32_t>();
    p.starts = starts_.const_data_ptr<int64_t>();
    p.entries = static_cast<const MergeEntry*>(entries.const_data_ptr());
    p.index = index.data_ptr<int32_t>();
    p.bits = bits.data_ptr();
    check(to_.collect(p, type_, stream_of(weights_[0])));
  }

  // Reads the totals of the last launch, which waits for it.
  int64_t first_broken() {
    const Tensor totals = at::empty({static_cast<int64_t>(table_.size()), 4}, counts_.options().dtype(at::kLong));
    const Tensor table = uploaded(table_);
    MergeSummary p{};
    p.matrices = static_cast<const MergeMatrix*>(table.const_data_ptr());
    p.count = static_cast<int64_t>(table_.size());
    p.counts = counts_.const_data_ptr<int32_t>();
    p.broken = broken_.const_data_ptr<int32_t>();
    p.tiles = tiles_;
    p.totals = static_cast<MergeTotals*>(totals.data_ptr());
    p.starts = starts_.data_ptr<int64_t>();
    check(to_.summarise(p, stream_of(weights_[0])));
    const Tensor here = totals.cpu();
    const auto* of = static_cast<const MergeTotals*>(here.const_data_ptr());
    totals_.assign(of, of + table_.size());
    for (size_t i = 0; i < table_.size(); ++i)
      if (totals_[i].broken > 0) return static_cast<int64_t>(i);
    return -1;
  }

  // From what a change left to the weights as they were before it, or, without `old_in`, to bare ones; of all matrices
  // or of the chosen.
  void undo(bool old_in, const std::vector<bool>* chosen = nullptr) {
    std::vector<MergeMatrix> back = table_;
    for (MergeMatrix& m : back) {
      const Update old = m.out;
      m.out = m.in;
      m.in = old_in ? old : Update{};
      m.old_codes = m.codes;
      m.old_copy = nullptr;
      m.old_index = nullptr;
      m.old_bits = nullptr;
      m.old_count = 0;
    }
    const Tensor table = uploaded(back);
    if (!chosen) return launch(table, 0, back.size(), MergeMode::undo, entries_);
    for (size_t i = 0; i < back.size(); ++i)
      if ((*chosen)[i]) launch(table, i, 1, MergeMode::undo, entries_);
  }

  std::vector<Tensor> weights_, sources_;
  const Launcher& to_;
  Type type_;
  int threads_ = 0;
  int64_t columns_ = 0, tiles_ = 0, room_ = 0;
  std::vector<MergeMatrix> table_;
  std::vector<MergeTotals> totals_;
  Tensor counts_, broken_, starts_, entries_;
};

bool all_finite(const Tensor& a, const Tensor& b, double scale) {
  return std::isfinite(scale) && at::isfinite(a).all().item<bool>() && at::isfinite(b).all().item<bool>();
}

Residues remerge(at::TensorList weights, at::TensorList old_a, at::TensorList old_b, at::ArrayRef<double> old_scales,
                 at::TensorList old_codes, at::TensorList old_index, at::TensorList old_bits, at::TensorList a,
                 at::TensorList b, at::ArrayRef<double> scales, bool exact) {
  const c10::DeviceGuard device(weights[0].device());
  const at::AutoDispatchBelowADInplaceOrView guard;
  const auto options = weights[0].options();
  const bool old = !old_a.empty(), fresh = !a.empty(), keep = exact && fresh;
  auto refuse = [](int64_t i) { return Residues{{}, {}, {}, at::scalar_tensor(i, at::kLong)}; };

  // The kernel finds what isn't finite where it multiplies it; what it never reads is looked at here.
  std::vector<Tensor> filled;
  std::vector<int64_t> at_index;
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool copied = !old_codes.empty() && old_codes[i].scalar_type() != at::kChar;
    if (old && (copied || weights[i].numel() == 0) && !all_finite(old_a[i], old_b[i], old_scales[i])) return refuse(i);
    if (fresh && weights[i].numel() == 0 && !all_finite(a[i], b[i], scales[i])) return refuse(i);
    if (weights[i].numel() == 0) continue;
    filled.push_back(weights[i]);
    at_index.push_back(static_cast<int64_t>(i));
  }

  Residues out;
  auto& [codes, index, bits, refused] = out;
  refused = at::scalar_tensor(-1, at::kLong);
  const Tensor none = at::empty({0}, options.dtype(at::kInt));
  const Tensor no_bits = at::empty({0}, options.dtype(weights[0].scalar_type() == at::kFloat ? at::kInt : at::kShort));
  if (keep) {
    int64_t size = 0;
    for (const Tensor& w : weights) size += rounded_up(w.numel(), 64);
    const Tensor all = at::empty({size}, options.dtype(at::kChar));
    int64_t offset = 0;
    for (const Tensor& w : weights) {
      codes.push_back(all.as_strided({w.size(0), w.size(1)}, {w.size(1), 1}, offset));
      offset += rounded_up(w.numel(), 64);
    }
    index.assign(weights.size(), none);
    bits.assign(weights.size(), no_bits);
  }
  if (filled.empty()) return out;

  Remerge pass(filled);
  for (size_t j = 0; j < filled.size(); ++j) {
    const int64_t i = at_index[j];
    if (old) pass.take_out(j, old_a[i], old_b[i], old_scales[i]);
    if (old && !old_codes.empty()) pass.way_back(j, old_codes[i], old_index[i], old_bits[i]);
    if (fresh) pass.put_in(j, a[i], b[i], scales[i]);
    if (keep) pass.keep_way_back(j, codes[i]);
  }
  // Where a step rounds there is no way back from it.
  const int64_t culprit = pass.run((old && old_codes.empty()) || (fresh && !exact));
  if (culprit >= 0) return refuse(at_index[culprit]);
  if (keep) {
    std::vector<Tensor> kept, listed, listed_bits;
    for (const int64_t i : at_index) kept.push_back(codes[i]);
    pass.collect(kept, listed, listed_bits);
    for (size_t j = 0; j < filled.size(); ++j) {
      codes[at_index[j]] = kept[j];
      index[at_index[j]] = listed[j];
      bits[at_index[j]] = listed_bits[j];
    }
  }
  return out;
}

void emulate(bool backwards) { emulate_backwards(backwards); }

}  // namespace
}  // namespace fastadapt::cuda

TORCH_LIBRARY_IMPL(fastadapt_cuda, CPU, m) {
  m.impl("bottleneck_forward", TORCH_FN(fastadapt::cuda::bottleneck_forward));
  m.impl("add_norm_forward", TORCH_FN(fastadapt::cuda::add_norm_forward));
  m.impl("remerge_", TORCH_FN(fastadapt::cuda::remerge));
}
#if defined(FASTADAPT_CUDA)
TORCH_LIBRARY_IMPL(fastadapt_cuda, CUDA, m) {
  m.impl("bottleneck_forward", TORCH_FN(fastadapt::cuda::bottleneck_forward));
  m.impl("add_norm_forward", TORCH_FN(fastadapt::cuda::add_norm_forward));
  m.impl("remerge_", TORCH_FN(fastadapt::cuda::remerge));
}
#endif
TORCH_LIBRARY_FRAGMENT(fastadapt_cuda, m) {
  m.def("emulate_backwards(bool backwards) -> ()", TORCH_FN(fastadapt::cuda::emulate));
}

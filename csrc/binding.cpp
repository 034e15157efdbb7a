// The CPU kernels as implementations of the ops that fastadapt/ops/schemas.py defines: checks shapes and dtypes, packs
// weights, allocates outputs, picks the instruction set.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <deque>

#include "cpu/arguments.h"
#include "cpu/capability.h"
#include "cpu/kernels.h"
#include "cpu/pack_cache.h"
#include "cpu/pool.h"
#include "each.h"

namespace fastadapt::cpu {
namespace {

using at::Tensor;

DType dtype_of(const Tensor& t) { return t.scalar_type() == at::kFloat ? DType::f32 : DType::bf16; }

Tensor empty_like_type(const Tensor& t, at::IntArrayRef size) { return pooled_empty(size, t.scalar_type()); }
Tensor empty_grad(at::IntArrayRef size) { return pooled_empty(size, at::kFloat); }
void* data(const Tensor& t) { return t.numel() ? t.data_ptr() : nullptr; }
const void* data(const OptionalTensor& t) { return t.has_value() ? t->data_ptr() : nullptr; }
float* grad(const Tensor& t) { return t.numel() ? static_cast<float*>(t.data_ptr()) : nullptr; }

// A parameter vector as floats, rounded to the compute type where `round` says so. Null stays null. Plain loops: for a
// few hundred elements an op of PyTorch's would cost more than the rest of a small call.
class Floats {
 public:
  Floats(const OptionalTensor& t, DType compute, bool round) {
    if (!t.has_value()) return;
    round = round && compute == DType::bf16 && t->scalar_type() != at::kBFloat16;
    if (t->scalar_type() == at::kFloat && t->is_contiguous() && !round) {
      data_ = static_cast<const float*>(t->data_ptr());  // the caller's tensor outlives the call
      return;
    }
    const bool direct = t->is_contiguous() && (t->scalar_type() == at::kFloat || t->scalar_type() == at::kBFloat16);
    const Tensor source = direct ? *t : t->to(at::kFloat).contiguous();
    const int64_t n = source.numel();
    values_.resize(n);
    if (source.scalar_type() == at::kFloat) {
      const float* from = static_cast<const float*>(source.data_ptr());
      for (int64_t i = 0; i < n; ++i) values_[i] = round ? static_cast<float>(c10::BFloat16(from[i])) : from[i];
    } else {
      const auto* from = static_cast<const c10::BFloat16*>(source.data_ptr());
      for (int64_t i = 0; i < n; ++i) values_[i] = static_cast<float>(from[i]);
    }
    data_ = values_.data();
  }
  Floats(const Floats&) = delete;
  const float* get() const { return data_; }

 private:
  std::vector<float> values_;
  const float* data_ = nullptr;
};

bool same(const OptionalTensor& a, const OptionalTensor& b) {
  return a.has_value() == b.has_value() && (!a.has_value() || a->is_same(*b));
}

void run_parallel(int64_t tasks, Task fn, void* context) {
  if (tasks == 1) return fn(0, context);
  TORCH_CHECK(each(tasks, [&](int64_t i) { fn(i, context); }), "a parallel region of fastadapt failed");
}

Act act_of(std::string_view name) {
  constexpr std::string_view names[] = {"none", "relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid", "leaky_relu"};
  for (int i = 0; i < 8; ++i)
    if (names[i] == name) return static_cast<Act>(i);
  TORCH_CHECK_VALUE(false, "activation: got ", name, "; accepted are those of fastadapt.ops.ACTIVATIONS");
}

// As derivative_in_a_byte of fastadapt/ops/schemas.py has it.
bool in_a_byte(DType type, Act act) {
  return type == DType::bf16 && (act == Act::relu || act == Act::gelu || act == Act::gelu_new || act == Act::silu ||
                                 act == Act::leaky_relu);
}

Dropout dropout_of(double p, const OptionalTensor& seed) {
  check_probability("dropout_p", p);
  Dropout d;
  if (p == 0.0 || !seed.has_value()) return d;
  TORCH_CHECK_VALUE(seed->numel() == 1 && seed->scalar_type() == at::kLong, "seed: got ", seed->toString(), " ",
                    seed->sizes(), "; accepted is one int64");
  d.on = true;
  d.seed = static_cast<uint64_t>(seed->item<int64_t>());
  d.threshold = static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
  d.keep_scale = p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p));
  return d;
}

// Weights that share the input of `k` columns; `n` columns together, or as many as they have where that is -1.
void check_linear(at::TensorList weights, int64_t n, int64_t k) {
  TORCH_CHECK_VALUE(!weights.empty(), "weights: got none; accepted is at least one");
  int64_t columns = 0;
  for (const Tensor& w : weights) {
    check_matrix("weight", w, w.dim() ? w.size(0) : 0, k);
    columns += w.size(0);
  }
  TORCH_CHECK_VALUE(n < 0 || columns == n, "weights: got ", columns, " columns in all; accepted are ", n);
  TORCH_CHECK_VALUE(columns && k, "weights: got ", columns, " columns of ", k, "; accepted is at least one of each");
}

void check_loras(at::TensorList weights, at::TensorList a, at::TensorList b, at::IntArrayRef owners,
                 at::IntArrayRef slots, int64_t slot_count) {
  const size_t count = std::min({a.size(), b.size(), owners.size(), slots.size()});  // LowRankArgs holds them equal
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(owners[i] >= 0 && owners[i] < static_cast<int64_t>(weights.size()) && slots[i] >= 0 &&
                          slots[i] < slot_count,
                      "loras: got weight ", owners[i], " and slot ", slots[i], "; accepted are ", weights.size(),
                      " weights and ", slot_count, " slots");
    check_floating("a", a[i]);
    TORCH_CHECK_VALUE(a[i].dim() == 2 && a[i].size(0) >= 1, "a: got shape ", a[i].sizes(), "; accepted is [r, ",
                      weights[0].size(1), "], r >= 1");
    check_matrix("a", a[i], a[i].size(0), weights[0].size(1));
    check_matrix("b", b[i], weights[owners[i]].size(0), a[i].size(0));
  }
}

// The LoRAs of a linear op, packed, in the order of their slots.
class LowRankArgs {
 public:
  LowRankArgs(const Table& table, DType type, bool backward, at::TensorList a, at::TensorList b,
              at::ArrayRef<double> scales, at::IntArrayRef owners, at::IntArrayRef slots, int64_t slot_count,
              const OptionalTensor& rows, at::ArrayRef<double> lora_p, const OptionalTensor& lora_seeds) {
    const size_t count = a.size();
    TORCH_CHECK_VALUE(b.size() == count && scales.size() == count && owners.size() == count && slots.size() == count &&
                          lora_p.size() == count &&
                          (!lora_seeds.has_value() || lora_seeds->numel() == static_cast<int64_t>(count)),
                      "a, b, scales, owners, slots, lora_p, lora_seeds: got ", count, " matrices a and ", b.size(),
                      " matrices b; accepted is one entry a LoRA in each");
    std::vector<int64_t> used(slot_count, 0);
    for (size_t i = 0; i < count; ++i) order_.push_back(i);
    std::stable_sort(order_.begin(), order_.end(), [&](size_t x, size_t y) { return slots[x] < slots[y]; });
    for (const size_t i : order_) {
      const PackedWeight pack_a = packed(table, a[i], type, {!backward, backward ? Order::added : Order::plain});
      const PackedWeight pack_b = packed(table, b[i], type, {!backward, backward ? Order::plain : Order::added});
      packs_.push_back(pack_a);
      packs_.push_back(pack_b);
      LowRank l{};
      l.owner = static_cast<int>(owners[i]);
      l.slot = static_cast<int>(slots[i]);
      l.rank = a[i].size(0);
      l.column = used[l.slot];
      used[l.slot] += l.rank;
      l.down = backward ? pack_b.view() : pack_a.view();
      l.up = backward ? pack_a.view() : pack_b.view();
      l.scale = static_cast<float>(scales[i]);
      if (lora_seeds.has_value()) l.drop = dropout_of(lora_p[i], lora_seeds->select(0, static_cast<int64_t>(i)));
      loras_.push_back(l);
    }
    view_.count = static_cast<int>(count);
    view_.columns = *std::max_element(used.begin(), used.end());
    TORCH_CHECK_VALUE(view_.columns <= kMaxRank, "a: got ranks of ", view_.columns, " in one slot; accepted are up to ",
                      kMaxRank, " in all");
    view_.slots = static_cast<int>(slot_count);
    if (rows.has_value()) {
      rows_ = rows->contiguous();
      view_.table = static_cast<const int64_t*>(rows_.data_ptr());
      view_.batch = rows_.numel();
    }
  }
  LowRankArgs(const LowRankArgs&) = delete;
  // Where the gradients of LoRA i, as the caller counts them, go.
  void set_grads(const std::vector<Tensor>& da, const std::vector<Tensor>& db) {
    for (size_t i = 0; i < order_.size(); ++i) {
      loras_[i].da = static_cast<float*>(da[order_[i]].data_ptr());
      loras_[i].db = static_cast<float*>(db[order_[i]].data_ptr());
    }
  }
  LowRanks view() {
    view_.loras = loras_.data();
    return view_;
  }

 private:
  std::vector<size_t> order_;
  std::vector<PackedWeight> packs_;
  std::vector<LowRank> loras_;
  LowRanks view_;
  Tensor rows_;
};

std::tuple<Tensor, Tensor, Tensor> lora_forward(const Tensor& x, at::TensorList weights,
                                                const c10::List<OptionalTensor>& biases, at::TensorList a,
                                                at::TensorList b, at::ArrayRef<double> scales, at::IntArrayRef owners,
                                                at::IntArrayRef slots, const OptionalTensor& rows,
                                                at::ArrayRef<double> lora_p, const OptionalTensor& lora_seeds,
                                                std::string_view activation, double dropout_p,
                                                const OptionalTensor& seed, bool save) {
  const Table& table = active();
  check_activation("x", x, 2);
  check_features(x);
  check_linear(weights, -1, x.size(1));
  TORCH_CHECK_VALUE(biases.size() && biases.size() % weights.size() == 0, "biases: got ", biases.size(), " for ",
                    weights.size(), " weights; accepted is one a weight for each slot");
  for (size_t i = 0; i < biases.size(); ++i)
    check_vector("bias", biases.get(i), weights[i % weights.size()].size(0));
  LinearForward p{};
  p.type = dtype_of(x);
  p.rows = x.size(0);
  p.k = x.size(1);
  p.act = act_of(activation);
  std::vector<PackedWeight> packs;
  std::vector<Packed> views;
  for (const Tensor& w : weights) {
    packs.push_back(packed(table, w, p.type, kTransposed));
    views.push_back(packs.back().view());
    p.n += w.size(0);
  }
  const int64_t slot_count = static_cast<int64_t>(biases.size() / weights.size());
  check_loras(weights, a, b, owners, slots, slot_count);
  if (rows.has_value()) check_rows(*rows, p.rows, slot_count);
  LowRankArgs low(table, p.type, false, a, b, scales, owners, slots, slot_count, rows, lora_p, lora_seeds);
  p.low = low.view();
  const Tensor y = empty_like_type(x, {p.rows, p.n});
  const bool keeps = save && p.act != Act::none, byte = keeps && in_a_byte(p.type, p.act);
  const Tensor z = byte    ? pooled_empty({p.rows, p.n}, at::kByte)
                   : keeps ? empty_like_type(x, {p.rows, p.n})
                           : empty_like_type(x, {0});
  const Tensor s = save && p.low.count ? empty_like_type(x, {p.rows, p.low.columns}) : empty_like_type(x, {0});
  if (s.numel() && rows.has_value()) s.zero_();  // a slot of fewer ranks leaves columns alone
  if (p.rows == 0 || p.n == 0) return {y, z, s};
  bool any_bias = false;
  for (size_t i = 0; i < biases.size(); ++i) any_bias |= std::optional<Tensor>(biases.get(i)).has_value();
  std::vector<float> bias(any_bias ? slot_count * p.n : 0, 0.0f);
  if (any_bias) {
    int64_t at = 0;
    for (size_t i = 0; i < biases.size(); ++i) {
      const OptionalTensor values_of = biases.get(i);
      const int64_t n = weights[i % weights.size()].size(0);
      if (i >= weights.size() && same(values_of, biases.get(i - weights.size()))) {  // slots mostly share it
        std::copy_n(bias.begin() + at - p.n, n, bias.begin() + at);
      } else {
        const Floats values(values_of, p.type, true);
        if (values.get()) std::copy_n(values.get(), n, bias.begin() + at);
      }
      at += n;
    }
  }
  p.x = data(x);
  p.count = static_cast<int>(views.size());
  p.weights = views.data();
  p.bias = any_bias ? bias.data() : nullptr;
  p.drop = dropout_of(dropout_p, seed);
  p.y = data(y);
  p.z = byte ? nullptr : data(z);
  p.code = byte ? static_cast<uint8_t*>(data(z)) : nullptr;
  p.s = data(s);
  p.threads = at::get_num_threads();
  table.linear_forward(p, run_parallel);
  return {y, z, s};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_backward(
    const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& s, at::TensorList weights, int64_t slot_count,
    at::TensorList a, at::TensorList b, at::ArrayRef<double> scales, at::IntArrayRef owners, at::IntArrayRef slots,
    const OptionalTensor& rows, at::ArrayRef<double> lora_p, const OptionalTensor& lora_seeds,
    std::string_view activation, double dropout_p, const OptionalTensor& seed, bool need_dx, bool need_dbias,
    bool need_dlora) {
  const Table& table = active();
  check_activation("dy", dy, 2);
  check_linear(weights, dy.size(1), weights.empty() || weights[0].dim() != 2 ? 0 : weights[0].size(1));
  LinearBackward p{};
  p.type = dtype_of(dy);
  p.rows = dy.size(0);
  p.k = dy.size(1);
  p.n = weights[0].size(1);
  p.act = act_of(activation);
  if (p.act != Act::none)
    TORCH_CHECK_VALUE(z.is_cpu() && z.is_contiguous() && z.sizes() == dy.sizes() &&
                          (z.scalar_type() == dy.scalar_type() ||
                           (z.scalar_type() == at::kByte && in_a_byte(p.type, p.act))),
                      "z: got ", z.toString(), " ", z.sizes(), "; accepted is what the forward gave for ", dy.sizes());
  TORCH_CHECK_VALUE(slot_count >= 1, "slot_count: got ", slot_count, "; accepted is at least 1");
  check_loras(weights, a, b, owners, slots, slot_count);
  if (rows.has_value()) check_rows(*rows, p.rows, slot_count);
  const Tensor dx = need_dx ? empty_like_type(dy, {p.rows, p.n}) : empty_like_type(dy, {0});
  const Tensor dbias = need_dbias ? empty_grad({slot_count, p.k}) : empty_grad({0});
  std::vector<Tensor> da, db;
  for (size_t i = 0; need_dlora && i < a.size(); ++i) {
    da.push_back(empty_grad(a[i].sizes()));
    db.push_back(empty_grad(b[i].sizes()));
  }
  if (p.rows == 0 || p.k == 0) {
    dbias.zero_();
    for (const auto* list : {&da, &db})
      for (const Tensor& t : *list) t.zero_();
    return {dx, dbias, da, db};
  }
  std::vector<PackedWeight> packs;
  std::vector<Packed> views;
  for (const Tensor& w : weights) {
    packs.push_back(packed(table, w, p.type, kPlain));
    views.push_back(packs.back().view());
  }
  LowRankArgs low(table, p.type, true, a, b, scales, owners, slots, slot_count, rows, lora_p, lora_seeds);
  if (need_dlora) low.set_grads(da, db);
  p.low = low.view();
  if (need_dlora && p.low.count) {
    check_activation("x", x, 2);
    check_activation("s", s, 2);
    TORCH_CHECK_VALUE(x.scalar_type() == dy.scalar_type() && x.size(0) == p.rows && x.size(1) == p.n, "x: got shape ",
                      x.sizes(), "; accepted is [", p.rows, ", ", p.n, "] in dy's dtype");
    TORCH_CHECK_VALUE(s.scalar_type() == dy.scalar_type() && s.size(0) == p.rows && s.size(1) == p.low.columns,
                      "s: got shape ", s.sizes(), "; accepted is what the forward gave");
  }
  p.dy = data(dy);
  const bool byte = z.scalar_type() == at::kByte;
  p.z = byte ? nullptr : data(z);
  p.code = byte ? static_cast<const uint8_t*>(data(z)) : nullptr;
  p.count = static_cast<int>(views.size());
  p.weights = views.data();
  p.drop = dropout_of(dropout_p, seed);
  p.x = data(x);
  p.s = data(s);
  p.dx = data(dx);
  p.dbias = grad(dbias);
  p.threads = at::get_num_threads();
  table.linear_backward(p, run_parallel);
  return {dx, dbias, da, db};
}

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, at::TensorList weights,
                                          const c10::List<OptionalTensor>& biases, std::string_view activation,
                                          double dropout_p, const OptionalTensor& seed, bool save) {
  auto [y, z, s] = lora_forward(x, weights, biases, {}, {}, {}, {}, {}, std::nullopt, {}, std::nullopt, activation,
                                dropout_p, seed, save);
  return {y, z};
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& z, at::TensorList weights,
                                           std::string_view activation, double dropout_p, const OptionalTensor& seed,
                                           bool need_dx, bool need_dbias) {
  auto [dx, dbias, da, db] = lora_backward(dy, dy, z, dy, weights, 1, {}, {}, {}, {}, {}, std::nullopt, {},
                                           std::nullopt, activation, dropout_p, seed, need_dx, need_dbias, false);
  return {dx, need_dbias ? dbias.view({dbias.numel()}) : dbias};
}

void check_adapter(int64_t hidden, const Tensor& w_down, const OptionalTensor& b_down, const Tensor& w_up,
                   const OptionalTensor& b_up, const OptionalTensor& scale_vector) {
  check_floating("w_down", w_down);
  TORCH_CHECK_VALUE(w_down.dim() == 2, "w_down: got shape ", w_down.sizes(), "; accepted is [b, ", hidden, "]");
  const int64_t b = w_down.size(0);
  TORCH_CHECK_VALUE(b, "w_down: got shape ", w_down.sizes(), "; accepted is [b, ", hidden, "] with b from 1");
  check_matrix("w_down", w_down, b, hidden);
  check_vector("b_down", b_down, b);
  check_matrix("w_up", w_up, hidden, b);
  check_vector("b_up", b_up, hidden);
  check_vector("scale_vector", scale_vector, hidden);
}

// What a forward kept for a backward whose dy has as many rows.
void check_kept(const char* name, const Tensor& t, const Tensor& dy, int64_t columns) {
  TORCH_CHECK_VALUE(t.is_cpu() && t.is_contiguous() && t.scalar_type() == dy.scalar_type() && t.dim() == 2 &&
                        t.size(0) == dy.size(0) && t.size(1) == columns,
                    name, ": got ", t.toString(), " ", t.sizes(), "; accepted is a contiguous ", dy.toString(), " [",
                    dy.size(0), ", ", columns, "]");
}

void check_norm(int64_t hidden, const OptionalTensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(weight.has_value() == bias.has_value(),
                    "norm_weight, norm_bias: got one of them; accepted are both or neither");
  check_vector("norm_weight", weight, hidden);
  check_vector("norm_bias", bias, hidden);
}

std::tuple<Tensor, Tensor, Tensor> bottleneck_forward(
    const Tensor& x, const Tensor& w_down, const OptionalTensor& b_down, const Tensor& w_up,
    const OptionalTensor& b_up, std::string_view activation, double scale, const OptionalTensor& scale_vector,
    bool skip, const OptionalTensor& residual, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    double eps, double dropout_p, const OptionalTensor& seed, bool save) {
  const Table& table = active();
  check_activation("x", x, 2);
  check_features(x);
  check_like("residual", residual, x);
  check_adapter(x.size(1), w_down, b_down, w_up, b_up, scale_vector);
  check_norm(x.size(1), norm_weight, norm_bias);
  check_epsilon(eps);
  BottleneckForward p{};
  p.type = dtype_of(x);
  p.rows = x.size(0);
  p.hidden = x.size(1);
  p.b = w_down.size(0);
  const bool norm = norm_weight.has_value();
  const Tensor y = empty_like_type(x, {p.rows, p.hidden});
  const Tensor z = save ? empty_like_type(x, {p.rows, p.b}) : empty_like_type(x, {0});
  const Tensor s = save && norm ? empty_like_type(x, {p.rows, p.hidden}) : empty_like_type(x, {0});
  if (p.rows == 0 || p.hidden == 0) return {y, z, s};
  const PackedWeight down = packed(table, w_down, p.type, kTransposed);
  const PackedWeight up = packed(table, w_up, p.type, kParted);
  const Floats bias_down(b_down, p.type, true), bias_up(b_up, p.type, true), vector(scale_vector, p.type, false);
  const Floats weight(norm_weight, p.type, false), bias(norm_bias, p.type, false);
  p.x = data(x);
  p.residual = data(residual);
  p.down = down.view();
  p.up = up.view();
  p.b_down = bias_down.get();
  p.b_up = bias_up.get();
  p.act = act_of(activation);
  p.scale = vector.get();
  p.factor = static_cast<float>(scale);
  p.skip = skip;
  p.norm_weight = weight.get();
  p.norm_bias = bias.get();
  p.eps = static_cast<float>(eps);
  p.drop = dropout_of(dropout_p, seed);
  p.y = data(y);
  p.z = data(z);
  p.z_stride = p.b;
  p.s = data(s);
  p.threads = at::get_num_threads();
  table.bottleneck_forward(p, run_parallel);
  return {y, z, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(
    const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& s, const Tensor& w_down, const Tensor& w_up,
    std::string_view activation, double scale, const OptionalTensor& scale_vector, bool skip,
    const OptionalTensor& norm_weight, double eps, double dropout_p, const OptionalTensor& seed, bool need_dx,
    bool need_dresidual, bool need_dweights, bool need_dnorm) {
  const Table& table = active();
  check_activation("dy", dy, 2);
  check_features(dy);
  check_adapter(dy.size(1), w_down, std::nullopt, w_up, std::nullopt, scale_vector);
  check_vector("norm_weight", norm_weight, dy.size(1));
  check_kept("z", z, dy, w_down.size(0));
  if (norm_weight.has_value()) check_kept("s", s, dy, dy.size(1));
  if (need_dweights && x.numel()) check_kept("x", x, dy, dy.size(1));
  BottleneckBackward p{};
  p.type = dtype_of(dy);
  p.rows = dy.size(0);
  p.hidden = dy.size(1);
  p.b = w_down.size(0);
  const int64_t h = p.hidden, b = p.b;
  auto activation_grad = [&](bool need) { return need ? empty_like_type(dy, {p.rows, h}) : empty_like_type(dy, {0}); };
  auto matrix = [&](bool need, int64_t m, int64_t n) { return need ? empty_grad({m, n}) : empty_grad({0}); };
  auto vector = [&](bool need, int64_t n) { return empty_grad({need ? n : 0}); };
  const Tensor dx = activation_grad(need_dx), dresidual = activation_grad(need_dresidual);
  const Tensor dw_down = matrix(need_dweights, b, h), db_down = vector(need_dweights, b);
  const Tensor g_up = matrix(need_dweights, h, b), g_bias = vector(need_dweights, h);
  const Tensor dnorm_weight = vector(need_dnorm, h), dnorm_bias = vector(need_dnorm, h);
  const std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> out{
      dx, dresidual, dw_down, db_down, g_up, g_bias, dnorm_weight, dnorm_bias};
  if (p.rows == 0 || h == 0) {
    for (const Tensor& t : {dw_down, db_down, g_up, g_bias, dnorm_weight, dnorm_bias}) t.zero_();
    return out;
  }
  const PackedWeight up_t = packed(table, w_up, p.type, kPlain);
  const PackedWeight down_t = packed(table, w_down, p.type, kPlain);
  const Floats factors(scale_vector, p.type, false), weight(norm_weight, p.type, false);
  p.dy = data(dy);
  p.x = data(x);
  p.z = data(z);
  p.z_stride = b;
  p.s = data(s);
  p.up_t = up_t.view();
  p.down_t = down_t.view();
  p.act = act_of(activation);
  p.scale = factors.get();
  p.factor = static_cast<float>(scale);
  p.skip = skip;
  p.norm_weight = weight.get();
  p.eps = static_cast<float>(eps);
  p.drop = dropout_of(dropout_p, seed);
  p.dx = data(dx);
  p.dresidual = data(dresidual);
  p.dw_down = grad(dw_down);
  p.db_down = grad(db_down);
  p.g_up = grad(g_up);
  p.g_bias = grad(g_bias);
  p.dnorm_weight = grad(dnorm_weight);
  p.dnorm_bias = grad(dnorm_bias);
  p.threads = at::get_num_threads();
  table.bottleneck_backward(p, run_parallel);
  return out;
}

// The blocks of rows that differ in their slot, in the order of the rows; none straddles a border of slots.
std::vector<SlotBlock> slot_blocks(const Tensor& table, int64_t rows) {
  std::vector<SlotBlock> blocks;
  const auto* slot = static_cast<const int64_t*>(table.data_ptr());
  const int64_t batch = table.numel(), each = rows / batch;
  for (int64_t i = 0, end; i < batch; i = end) {
    for (end = i + 1; end < batch && slot[end] == slot[i];) ++end;
    const int64_t first = i * each, all = (end - i) * each, count = (all + kBottleneckRows - 1) / kBottleneckRows;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t r0 = all * k / count, r1 = all * (k + 1) / count;
      blocks.push_back({first + r0, r1 - r0, static_cast<int>(slot[i]), 0, false});
    }
  }
  return blocks;
}

// One entry a slot in every list.
void check_entries(int64_t slots, std::initializer_list<size_t> sizes) {
  TORCH_CHECK_VALUE(slots >= 1, "norm_weights: got none; accepted is one for each of at least one slot");
  for (const size_t size : sizes)
    TORCH_CHECK_VALUE(static_cast<int64_t>(size) == slots, "slots: got a list of ", size, " beside one of ", slots,
                      "; accepted is one entry a slot in each");
}

std::tuple<Tensor, Tensor, Tensor> bottleneck_rows_forward(
    const Tensor& x, const OptionalTensor& residual, const Tensor& rows, const c10::List<OptionalTensor>& w_down,
    const c10::List<OptionalTensor>& b_down, const c10::List<OptionalTensor>& w_up,
    const c10::List<OptionalTensor>& b_up, const c10::List<OptionalTensor>& scale_vectors, at::TensorList norm_weights,
    at::TensorList norm_biases, const c10::List<std::string>& activations, at::ArrayRef<double> scales,
    const c10::List<bool>& skips, const c10::List<bool>& swaps, double eps, at::ArrayRef<double> dropout_p,
    const OptionalTensor& seed, bool save) {
  const Table& table = active();
  check_activation("x", x, 2);
  check_features(x);
  check_like("residual", residual, x);
  const DType type = dtype_of(x);
  const int64_t count = x.size(0), hidden = x.size(1), slots = static_cast<int64_t>(norm_weights.size());
  check_entries(slots, {w_down.size(), b_down.size(), w_up.size(), b_up.size(), scale_vectors.size(),
                        norm_biases.size(), activations.size(), scales.size(), skips.size(), swaps.size(),
                        dropout_p.size()});
  check_rows(rows, count, slots);
  check_epsilon(eps);
  int64_t widest = 0;
  for (int64_t i = 0; i < slots; ++i) {
    const OptionalTensor down = w_down.get(i), up = w_up.get(i);
    check_norm(hidden, norm_weights[i], norm_biases[i]);
    TORCH_CHECK_VALUE(residual.has_value() || (!swaps.get(i) && (down.has_value() || skips.get(i))),
                      "residual: got None, but slot ", i, " reads it; accepted is a tensor of x's shape");
    if (!down.has_value()) continue;
    TORCH_CHECK_VALUE(up.has_value(), "w_up: got None with w_down; accepted are both or neither");
    check_adapter(hidden, *down, b_down.get(i), *up, b_up.get(i), scale_vectors.get(i));
    widest = std::max(widest, down->size(0));
  }
  const Tensor y = empty_like_type(x, {count, hidden});
  const Tensor z = save ? empty_like_type(x, {count, widest}) : empty_like_type(x, {0});
  const Tensor s = save ? empty_like_type(x, {count, hidden}) : empty_like_type(x, {0});
  if (count == 0 || hidden == 0) return {y, z, s};
  std::vector<BottleneckForward> of(slots);
  std::vector<PackedWeight> packs;
  std::deque<Floats> floats;
  auto values = [&](const OptionalTensor& t, bool round) { return floats.emplace_back(t, type, round).get(); };
  for (int64_t i = 0; i < slots; ++i) {
    BottleneckForward& p = of[i];
    p.type = type;
    p.rows = count;
    p.hidden = hidden;
    p.x = data(x);
    p.residual = data(residual);
    if (swaps.get(i)) std::swap(p.x, p.residual);
    p.skip = skips.get(i);
    p.norm_weight = values(norm_weights[i], false);
    p.norm_bias = values(norm_biases[i], false);
    p.eps = static_cast<float>(eps);
    p.y = data(y);
    p.z = data(z);
    p.z_stride = widest;
    p.s = data(s);
    const OptionalTensor down = w_down.get(i), up = w_up.get(i);
    if (!down.has_value()) continue;
    p.b = down->size(0);
    packs.push_back(packed(table, *down, type, kTransposed));
    p.down = packs.back().view();
    packs.push_back(packed(table, *up, type, kParted));
    p.up = packs.back().view();
    p.b_down = values(b_down.get(i), true);
    p.b_up = values(b_up.get(i), true);
    p.act = act_of(std::string(activations.get(i)));
    p.scale = values(scale_vectors.get(i), false);
    p.factor = static_cast<float>(scales[i]);
    p.drop = dropout_of(dropout_p[i], seed);
  }
  const Tensor slot_of = rows.contiguous();
  const std::vector<SlotBlock> blocks = slot_blocks(slot_of, count);
  table.bottleneck_rows_forward(
      {type, of.data(), blocks.data(), static_cast<int64_t>(blocks.size()), at::get_num_threads()}, run_parallel);
  return {y, z, s};
}

using Tensors = std::vector<Tensor>;
std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors> bottleneck_rows_backward(
    const Tensor& dy, const Tensor& x, const Tensor& residual, const Tensor& z, const Tensor& s, const Tensor& rows,
    const c10::List<OptionalTensor>& w_down, const c10::List<OptionalTensor>& w_up,
    const c10::List<OptionalTensor>& scale_vectors, at::TensorList norm_weights,
    const c10::List<std::string>& activations, at::ArrayRef<double> scales, const c10::List<bool>& skips,
    const c10::List<bool>& swaps, double eps, at::ArrayRef<double> dropout_p, const OptionalTensor& seed, bool need_dx,
    bool need_dresidual, const c10::List<bool>& need_dweights, const c10::List<bool>& need_dnorm) {
  const Table& table = active();
  check_activation("dy", dy, 2);
  check_features(dy);
  const DType type = dtype_of(dy);
  const int64_t count = dy.size(0), hidden = dy.size(1), slots = static_cast<int64_t>(norm_weights.size());
  check_entries(slots, {w_down.size(), w_up.size(), scale_vectors.size(), activations.size(), scales.size(),
                        skips.size(), swaps.size(), dropout_p.size(), need_dweights.size(), need_dnorm.size()});
  check_rows(rows, count, slots);
  check_kept("s", s, dy, hidden);
  TORCH_CHECK_VALUE(z.dim() == 2, "z: got shape ", z.sizes(), "; accepted is what the forward gave");
  check_kept("z", z, dy, z.size(1));
  for (const auto& [name, read] : {std::pair<const char*, const Tensor*>{"x", &x}, {"residual", &residual}})
    if (read->numel()) check_kept(name, *read, dy, hidden);
  for (int64_t i = 0; i < slots; ++i) {
    const OptionalTensor down = w_down.get(i), up = w_up.get(i);
    check_vector("norm_weight", norm_weights[i], hidden);
    if (!down.has_value()) continue;
    TORCH_CHECK_VALUE(up.has_value(), "w_up: got None with w_down; accepted are both or neither");
    check_adapter(hidden, *down, std::nullopt, *up, std::nullopt, scale_vectors.get(i));
    TORCH_CHECK_VALUE(down->size(0) <= z.size(1), "z: got shape ", z.sizes(), "; accepted is what the forward gave");
  }
  auto activation_grad = [&](bool need) {
    return need ? empty_like_type(dy, {count, hidden}) : empty_like_type(dy, {0});
  };
  const Tensor dx = activation_grad(need_dx), dresidual = activation_grad(need_dresidual);
  Tensors dw_down, db_down, g_up, g_bias, dnorm_weight, dnorm_bias;
  for (int64_t i = 0; i < slots; ++i) {
    const OptionalTensor down = w_down.get(i);
    const bool weights = need_dweights.get(i) && down.has_value(), norm = need_dnorm.get(i);
    const int64_t b = weights ? down->size(0) : 0;
    dw_down.push_back(weights ? empty_grad({b, hidden}) : empty_grad({0}));
    db_down.push_back(empty_grad({b}));
    g_up.push_back(weights ? empty_grad({hidden, b}) : empty_grad({0}));
    g_bias.push_back(empty_grad({weights ? hidden : 0}));
    dnorm_weight.push_back(empty_grad({norm ? hidden : 0}));
    dnorm_bias.push_back(empty_grad({norm ? hidden : 0}));
  }
  const std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors> out{
      dx, dresidual, dw_down, db_down, g_up, g_bias, dnorm_weight, dnorm_bias};
  if (count == 0 || hidden == 0) {
    for (const Tensors* list : {&dw_down, &db_down, &g_up, &g_bias, &dnorm_weight, &dnorm_bias})
      for (const Tensor& t : *list) t.zero_();
    return out;
  }
  std::vector<BottleneckBackward> of(slots);
  std::vector<PackedWeight> packs;
  std::deque<Floats> floats;
  for (int64_t i = 0; i < slots; ++i) {
    BottleneckBackward& p = of[i];
    p.type = type;
    p.rows = count;
    p.hidden = hidden;
    p.dy = data(dy);
    p.s = data(s);
    p.z = data(z);
    p.z_stride = z.size(1);
    p.skip = skips.get(i);
    p.norm_weight = floats.emplace_back(norm_weights[i], type, false).get();
    p.eps = static_cast<float>(eps);
    p.dx = data(dx);
    p.dresidual = data(dresidual);
    if (swaps.get(i)) std::swap(p.dx, p.dresidual);
    p.dnorm_weight = grad(dnorm_weight[i]);
    p.dnorm_bias = grad(dnorm_bias[i]);
    const OptionalTensor down = w_down.get(i), up = w_up.get(i);
    if (!down.has_value()) continue;
    p.b = down->size(0);
    p.x = data(swaps.get(i) ? residual : x);
    packs.push_back(packed(table, *up, type, kPlain));
    p.up_t = packs.back().view();
    packs.push_back(packed(table, *down, type, kPlain));
    p.down_t = packs.back().view();
    p.act = act_of(std::string(activations.get(i)));
    p.scale = floats.emplace_back(scale_vectors.get(i), type, false).get();
    p.factor = static_cast<float>(scales[i]);
    p.drop = dropout_of(dropout_p[i], seed);
    p.dw_down = grad(dw_down[i]);
    p.db_down = grad(db_down[i]);
    p.g_up = grad(g_up[i]);
    p.g_bias = grad(g_bias[i]);
  }
  const Tensor slot_of = rows.contiguous();
  std::vector<SlotBlock> blocks = slot_blocks(slot_of, count);
  const int64_t block_count = static_cast<int64_t>(blocks.size());
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(block_count, at::get_num_threads()));
  std::vector<int> shares(slots, 0);
  std::vector<int64_t> last_part(slots, -1);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t i = block_count * part / parts; i < block_count * (part + 1) / parts; ++i) {
      SlotBlock& block = blocks[i];
      block.first = last_part[block.slot] != part;
      if (block.first) ++shares[block.slot];
      last_part[block.slot] = part;
      block.share = shares[block.slot] - 1;
    }
  table.bottleneck_rows_backward({type, of.data(), shares.data(), slots, blocks.data(), block_count, parts},
                                 run_parallel);
  return out;
}

std::tuple<Tensor, Tensor> add_norm_forward(const Tensor& x, const OptionalTensor& residual, const Tensor& norm_weight,
                                            const Tensor& norm_bias, double eps, double dropout_p,
                                            const OptionalTensor& seed, bool save) {
  check_activation("x", x, 2);
  check_features(x);
  check_like("residual", residual, x);
  check_norm(x.size(1), norm_weight, norm_bias);
  check_epsilon(eps);
  AddNormForward p{};
  p.type = dtype_of(x);
  p.rows = x.size(0);
  p.hidden = x.size(1);
  const Tensor y = empty_like_type(x, {p.rows, p.hidden});
  const Tensor s = save ? empty_like_type(x, {p.rows, p.hidden}) : empty_like_type(x, {0});
  if (p.rows == 0 || p.hidden == 0) return {y, s};
  const Floats weight(norm_weight, p.type, false), bias(norm_bias, p.type, false);
  p.x = data(x);
  p.residual = data(residual);
  p.norm_weight = weight.get();
  p.norm_bias = bias.get();
  p.eps = static_cast<float>(eps);
  p.drop = dropout_of(dropout_p, seed);
  p.y = data(y);
  p.s = data(s);
  p.threads = at::get_num_threads();
  active().add_norm_forward(p, run_parallel);
  return {y, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(const Tensor& dy, const OptionalTensor& ds,
                                                             const Tensor& s, const Tensor& norm_weight, double eps,
                                                             double dropout_p, const OptionalTensor& seed,
                                                             bool need_dx, bool need_dresidual, bool need_dnorm) {
  check_activation("dy", dy, 2);
  check_features(dy);
  check_like("ds", ds, dy);
  check_kept("s", s, dy, dy.size(1));
  check_vector("norm_weight", norm_weight, dy.size(1));
  AddNormBackward p{};
  p.type = dtype_of(dy);
  p.rows = dy.size(0);
  p.hidden = dy.size(1);
  auto activation_grad = [&](bool need) {
    return need ? empty_like_type(dy, {p.rows, p.hidden}) : empty_like_type(dy, {0});
  };
  const Tensor dx = activation_grad(need_dx), dresidual = activation_grad(need_dresidual);
  const Tensor dweight = empty_grad({need_dnorm ? p.hidden : 0}), dbias = empty_grad({need_dnorm ? p.hidden : 0});
  if (p.rows == 0 || p.hidden == 0) {
    dweight.zero_();
    dbias.zero_();
    return {dx, dresidual, dweight, dbias};
  }
  const Floats weight(norm_weight, p.type, false);
  p.dy = data(dy);
  p.ds = data(ds);
  p.s = data(s);
  p.norm_weight = weight.get();
  p.eps = static_cast<float>(eps);
  p.drop = dropout_of(dropout_p, seed);
  p.dx = data(dx);
  p.dresidual = data(dresidual);
  p.dnorm_weight = grad(dweight);
  p.dnorm_bias = grad(dbias);
  p.threads = at::get_num_threads();
  active().add_norm_backward(p, run_parallel);
  return {dx, dresidual, dweight, dbias};
}

Tensor drop(const Tensor& x, double dropout_p, const Tensor& seed) {
  check_activation("x", x, 2);
  Drop p{};
  p.type = dtype_of(x);
  p.rows = x.size(0);
  p.cols = x.size(1);
  const Tensor y = empty_like_type(x, x.sizes());
  if (y.numel() == 0) return y;
  p.x = data(x);
  p.drop = dropout_of(dropout_p, seed);
  if (!p.drop.on) return y.copy_(x);
  p.y = data(y);
  p.threads = at::get_num_threads();
  active().drop(p, run_parallel);
  return y;
}

Mix mix_of(const Tensor& sigma, const Tensor& t, const OptionalTensor& shift, int64_t count, double dropout_p,
           const OptionalTensor& seed) {
  check_activation("sigma", sigma, 2);
  check_activation("t", t, 2);
  TORCH_CHECK_VALUE(count >= 1 && sigma.size(1) % count == 0 && t.scalar_type() == sigma.scalar_type() &&
                        t.size(0) == sigma.size(0) && t.size(1) == sigma.size(1) + count,
                    "sigma, t: got shapes ", sigma.sizes(), " and ", t.sizes(), " for ", count,
                    " adapters; accepted are [T, N b] and [T, N b + N] of one dtype");
  if (shift.has_value())
    TORCH_CHECK_VALUE(shift->is_cpu() && shift->is_contiguous() && shift->scalar_type() == sigma.scalar_type() &&
                          shift->dim() == 1 && shift->size(0) == sigma.size(0),
                      "shift: got ", shift->toString(), " ", shift->sizes(), "; accepted is a contiguous [",
                      sigma.size(0), "]");
  Mix p{};
  p.type = dtype_of(sigma);
  p.rows = sigma.size(0);
  p.count = count;
  p.b = sigma.size(1) / count;
  p.sigma = data(sigma);
  p.t = data(t);
  p.shift = data(shift);
  p.drop = dropout_of(dropout_p, seed);
  p.threads = at::get_num_threads();
  return p;
}

Tensor mix_forward(const Tensor& sigma, const Tensor& t, const OptionalTensor& shift, int64_t count, double dropout_p,
                   const OptionalTensor& seed) {
  Mix p = mix_of(sigma, t, shift, count, dropout_p, seed);
  const Tensor m = empty_like_type(t, t.sizes());
  if (p.rows == 0) return m;
  p.m = data(m);
  active().mix_forward(p, run_parallel);
  return m;
}

std::tuple<Tensor, Tensor, Tensor> mix_backward(const Tensor& dm, const Tensor& sigma, const Tensor& t,
                                                const OptionalTensor& shift, int64_t count, double dropout_p,
                                                const OptionalTensor& seed) {
  Mix p = mix_of(sigma, t, shift, count, dropout_p, seed);
  check_like("dm", dm, t);
  const Tensor dsigma = empty_like_type(sigma, sigma.sizes()), dt = empty_like_type(t, t.sizes());
  const Tensor dshift = empty_like_type(t, {shift.has_value() ? p.rows : 0});
  if (p.rows == 0) return {dsigma, dt, dshift};
  p.m = data(dm);
  p.dsigma = data(dsigma);
  p.dt = data(dt);
  p.dshift = data(dshift);
  active().mix_backward(p, run_parallel);
  return {dsigma, dt, dshift};
}

void check_prefix(const Tensor& prefix, const Tensor& qkv) {
  const int64_t dim = prefix.dim();
  TORCH_CHECK_VALUE(prefix.is_cpu() && prefix.is_contiguous() && prefix.scalar_type() == qkv.scalar_type() &&
                        (dim == 3 || (dim == 4 && prefix.size(0) == qkv.size(0))) && prefix.size(-3) == 2 &&
                        prefix.size(-1) == qkv.size(2) / 3,
                    "prefix: got ", prefix.toString(), " ", prefix.sizes(), "; accepted are contiguous [2, P, H] and ",
                    "[B, 2, P, H] of qkv's dtype");
}

// Shared by both directions; `mask` keeps what the pointers of the result point into.
Attention attention_of(const Tensor& qkv, const OptionalTensor& prefix, OptionalTensor& mask, int64_t heads,
                       double scale, double dropout_p, const OptionalTensor& seed) {
  check_activation("qkv", qkv, 3);
  Attention p{};
  p.type = dtype_of(qkv);
  p.batch = qkv.size(0);
  p.length = qkv.size(1);
  p.heads = heads;
  TORCH_CHECK_VALUE(heads >= 1 && qkv.size(2) % (3 * heads) == 0, "qkv: got shape ", qkv.sizes(),
                    "; accepted is [B, S, 3H] with H a multiple of ", heads, " heads");
  p.head_dim = qkv.size(2) / 3 / heads;
  if (prefix.has_value()) check_prefix(*prefix, qkv);
  const int64_t keys = p.length + (prefix.has_value() ? prefix->size(-2) : 0);
  TORCH_CHECK_VALUE(p.head_dim <= kMaxHeadDim && keys <= kMaxAttentionLength, "qkv: got ", keys, " keys and heads of ",
                    p.head_dim, "; accepted are up to ", kMaxAttentionLength, " and ", kMaxHeadDim);
  if (mask.has_value()) {
    TORCH_CHECK_TYPE(mask->is_cpu() && (mask->scalar_type() == at::kBool || mask->is_floating_point()), "mask: got ",
                     mask->toString(), "; accepted are bool and floating on the CPU");
    TORCH_CHECK_VALUE(mask->sizes() == at::IntArrayRef({p.batch, heads, p.length, p.length}), "mask: got shape ",
                      mask->sizes(), "; accepted is [", p.batch, ", ", heads, ", ", p.length, ", ", p.length, "]");
  }
  p.qkv = data(qkv);
  if (prefix.has_value()) {
    p.prefix = data(*prefix);
    p.prefix_length = prefix->size(-2);
    p.prefix_stride = prefix->dim() == 4 ? 2 * p.prefix_length * heads * p.head_dim : 0;
  }
  if (mask.has_value()) {
    p.mask_is_bool = mask->scalar_type() == at::kBool;
    if (!p.mask_is_bool && mask->scalar_type() != at::kFloat) mask = mask->to(at::kFloat);
    p.mask = mask->data_ptr();
    for (int i = 0; i < 4; ++i) p.mask_strides[i] = mask->stride(i);
  }
  p.scale = static_cast<float>(scale);
  p.drop = dropout_of(dropout_p, seed);
  return p;
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& qkv, const OptionalTensor& prefix,
                                             const OptionalTensor& mask, int64_t heads, double scale, double dropout_p,
                                             const OptionalTensor& seed, bool save) {
  OptionalTensor held = mask;
  Attention p = attention_of(qkv, prefix, held, heads, scale, dropout_p, seed);
  const Tensor out = empty_like_type(qkv, {p.batch, p.length, heads * p.head_dim});
  const Tensor lse = save ? empty_grad({p.batch, heads, p.length}) : empty_grad({0});
  if (out.numel() == 0) return {out, lse};
  p.out = data(out);
  p.lse = grad(lse);
  active().attention_forward(p, run_parallel);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& qkv, const OptionalTensor& prefix,
                                              const OptionalTensor& mask, const Tensor& lse, int64_t heads,
                                              double scale, double dropout_p, const OptionalTensor& seed) {
  OptionalTensor held = mask;
  Attention p = attention_of(qkv, prefix, held, heads, scale, dropout_p, seed);
  check_activation("dout", dout, 3);
  TORCH_CHECK_VALUE(dout.scalar_type() == qkv.scalar_type() && dout.size(0) == p.batch && dout.size(1) == p.length &&
                        dout.size(2) == heads * p.head_dim,
                    "dout: got ", dout.toString(), " ", dout.sizes(), "; accepted is what the forward gave");
  TORCH_CHECK_VALUE(lse.is_cpu() && lse.scalar_type() == at::kFloat && lse.is_contiguous() &&
                        lse.sizes() == at::IntArrayRef({p.batch, heads, p.length}),
                    "lse: got ", lse.toString(), " ", lse.sizes(), "; accepted is what the forward gave");
  const Tensor dqkv = empty_like_type(qkv, qkv.sizes());
  const Tensor dprefix = prefix.has_value() ? empty_grad(prefix->sizes()) : empty_grad({0});
  if (dqkv.numel() == 0) {
    dprefix.zero_();
    return {dqkv, dprefix};
  }
  const bool shared = prefix.has_value() && prefix->dim() == 3;
  const Tensor by_row = shared ? empty_grad({p.batch, 2, p.prefix_length, heads * p.head_dim}) : dprefix;
  p.dout = data(dout);
  p.lse = grad(lse);
  p.dqkv = data(dqkv);
  p.dprefix = grad(by_row);
  p.dprefix_sum = shared ? grad(dprefix) : nullptr;
  active().attention_backward(p, run_parallel);
  return {dqkv, dprefix};
}

}  // namespace
}  // namespace fastadapt::cpu

TORCH_LIBRARY_IMPL(fastadapt, CPU, m) {
  using namespace fastadapt::cpu;
  m.impl("linear_forward", TORCH_FN(linear_forward));
  m.impl("linear_backward", TORCH_FN(linear_backward));
  m.impl("lora_forward", TORCH_FN(lora_forward));
  m.impl("lora_backward", TORCH_FN(lora_backward));
  m.impl("bottleneck_forward", TORCH_FN(bottleneck_forward));
  m.impl("bottleneck_backward", TORCH_FN(bottleneck_backward));
  m.impl("bottleneck_rows_forward", TORCH_FN(bottleneck_rows_forward));
  m.impl("bottleneck_rows_backward", TORCH_FN(bottleneck_rows_backward));
  m.impl("add_norm_forward", TORCH_FN(add_norm_forward));
  m.impl("add_norm_backward", TORCH_FN(add_norm_backward));
  m.impl("drop", TORCH_FN(drop));
  m.impl("mix_forward", TORCH_FN(mix_forward));
  m.impl("mix_backward", TORCH_FN(mix_backward));
  m.impl("attention_forward", TORCH_FN(attention_forward));
  m.impl("attention_backward", TORCH_FN(attention_backward));
}

TORCH_LIBRARY(fastadapt_cpu, m) {
  using namespace fastadapt::cpu;
  m.def("capabilities() -> str[]", []() { return supported_names(); });
  m.def("capability() -> str", []() { return std::string(active().name); });
  m.def("set_capability(str name) -> ()", [](std::string name) { set_active(name); });
  m.def("forget(Tensor[] tensors) -> int", [](at::TensorList tensors) { return forget(tensors); });
  m.def("release() -> int", []() { return release_all(); });
  m.def("limits() -> (int features, int rank, int length, int head_dim)", []() {
    using namespace fastadapt::cpu;
    return std::make_tuple(kMaxFeatures, kMaxRank, kMaxAttentionLength, kMaxHeadDim);
  });
}

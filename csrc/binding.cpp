// The CPU kernels as implementations of the ops that fastadapt/ops/schemas.py defines: checks nothing that the Python
// side has checked, packs weights, allocates outputs, picks the instruction set.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/library.h>

#include "cpu/capability.h"
#include "cpu/kernels.h"
#include "cpu/pack_cache.h"
#include "cpu/pool.h"

namespace fastadapt::cpu {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16,
              "the CPU kernels take float32 and bfloat16, got ", t.scalar_type());
  return t.scalar_type() == at::kFloat ? DType::f32 : DType::bf16;
}

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

void run_parallel(int64_t tasks, Task fn, void* context) {
  struct Call {
    Task fn;
    void* context;
  } call{fn, context};
  if (tasks == 1) return fn(0, context);
  const auto error = torch_parallel_for(
      0, tasks, 1,
      [](int64_t begin, int64_t end, void* c) {
        const Call* call = static_cast<Call*>(c);
        for (int64_t i = begin; i < end; ++i) call->fn(i, call->context);
      },
      &call);
  TORCH_CHECK(error == 0, "a parallel region of fastadapt failed");
}

Act act_of(std::string_view name) {
  constexpr std::string_view names[] = {"none", "relu", "gelu", "gelu_new", "silu", "tanh", "sigmoid", "leaky_relu"};
  for (int i = 0; i < 8; ++i)
    if (names[i] == name) return static_cast<Act>(i);
  TORCH_CHECK(false, "activation: got ", name);
}

// As derivative_in_a_byte of fastadapt/ops/schemas.py has it.
bool in_a_byte(DType type, Act act) {
  return type == DType::bf16 && (act == Act::relu || act == Act::gelu || act == Act::gelu_new || act == Act::silu ||
                                 act == Act::leaky_relu);
}

Dropout dropout_of(double p, const OptionalTensor& seed) {
  Dropout d;
  if (p == 0.0 || !seed.has_value()) return d;
  d.on = true;
  d.seed = static_cast<uint64_t>(seed->item<int64_t>());
  d.threshold = static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
  d.keep_scale = p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p));
  return d;
}

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, at::TensorList weights,
                                          const c10::List<OptionalTensor>& biases, std::string_view activation,
                                          double dropout_p, const OptionalTensor& seed, bool save) {
  const Table& table = active();
  LinearForward p{};
  p.type = dtype_of(x);
  p.rows = x.size(0);
  p.k = x.size(1);
  p.act = act_of(activation);
  std::vector<PackedWeight> packs;
  std::vector<Packed> views;
  bool any_bias = false;
  for (size_t i = 0; i < weights.size(); ++i) {
    packs.push_back(packed(table, weights[i], p.type, Layout::transposed));
    views.push_back(packs.back().view());
    p.n += weights[i].size(0);
    any_bias |= std::optional<Tensor>(biases.get(i)).has_value();
  }
  const Tensor y = empty_like_type(x, {p.rows, p.n});
  const bool keeps = save && p.act != Act::none, byte = keeps && in_a_byte(p.type, p.act);
  const Tensor z = byte    ? pooled_empty({p.rows, p.n}, at::kByte)
                   : keeps ? empty_like_type(x, {p.rows, p.n})
                           : empty_like_type(x, {0});
  if (p.rows == 0 || p.n == 0) return {y, z};
  std::vector<float> bias(any_bias ? p.n : 0, 0.0f);
  if (any_bias) {
    int64_t at = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      const OptionalTensor b = biases.get(i);
      const Floats values(b, p.type, true);
      if (values.get()) std::copy_n(values.get(), weights[i].size(0), bias.begin() + at);
      at += weights[i].size(0);
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
  p.threads = at::get_num_threads();
  table.linear_forward(p, run_parallel);
  return {y, z};
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& z, at::TensorList weights,
                                           std::string_view activation, double dropout_p, const OptionalTensor& seed,
                                           bool need_dx, bool need_dbias) {
  const Table& table = active();
  LinearBackward p{};
  p.type = dtype_of(dy);
  p.rows = dy.size(0);
  p.k = dy.size(1);
  p.n = weights[0].size(1);
  const Tensor dx = need_dx ? empty_like_type(dy, {p.rows, p.n}) : empty_like_type(dy, {0});
  const Tensor dbias = empty_grad({need_dbias ? p.k : 0});
  if (p.rows == 0 || p.k == 0) {
    dbias.zero_();
    return {dx, dbias};
  }
  std::vector<PackedWeight> packs;
  std::vector<Packed> views;
  for (const Tensor& w : weights) {
    packs.push_back(packed(table, w, p.type, Layout::plain));
    views.push_back(packs.back().view());
  }
  p.dy = data(dy);
  const bool byte = z.scalar_type() == at::kByte;
  p.z = byte ? nullptr : data(z);
  p.code = byte ? static_cast<const uint8_t*>(data(z)) : nullptr;
  p.count = static_cast<int>(views.size());
  p.weights = views.data();
  p.act = act_of(activation);
  p.drop = dropout_of(dropout_p, seed);
  p.dx = data(dx);
  p.dbias = grad(dbias);
  p.threads = at::get_num_threads();
  table.linear_backward(p, run_parallel);
  return {dx, dbias};
}

std::tuple<Tensor, Tensor, Tensor> bottleneck_forward(
    const Tensor& x, const Tensor& w_down, const OptionalTensor& b_down, const Tensor& w_up,
    const OptionalTensor& b_up, std::string_view activation, double scale, const OptionalTensor& scale_vector,
    bool skip, const OptionalTensor& residual, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    double eps, double dropout_p, const OptionalTensor& seed, bool save) {
  const Table& table = active();
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
  const PackedWeight down = packed(table, w_down, p.type, Layout::transposed);
  const PackedWeight up = packed(table, w_up, p.type, Layout::transposed);
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
  const PackedWeight up_t = packed(table, w_up, p.type, Layout::plain);
  const PackedWeight down_t = packed(table, w_down, p.type, Layout::plain);
  const Floats factors(scale_vector, p.type, false), weight(norm_weight, p.type, false);
  p.dy = data(dy);
  p.x = x.size(0) == p.rows ? data(x) : nullptr;
  p.z = data(z);
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

std::tuple<Tensor, Tensor> add_norm_forward(const Tensor& x, const OptionalTensor& residual, const Tensor& norm_weight,
                                            const Tensor& norm_bias, double eps, double dropout_p,
                                            const OptionalTensor& seed, bool save) {
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

// Shared by both directions; `mask` keeps what the pointers of the result point into.
Attention attention_of(const Tensor& qkv, OptionalTensor& mask, int64_t heads, double scale, double dropout_p,
                       const OptionalTensor& seed) {
  Attention p{};
  p.type = dtype_of(qkv);
  p.batch = qkv.size(0);
  p.length = qkv.size(1);
  p.heads = heads;
  p.head_dim = qkv.size(2) / 3 / heads;
  p.qkv = data(qkv);
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

std::tuple<Tensor, Tensor> attention_forward(const Tensor& qkv, const OptionalTensor& mask, int64_t heads,
                                             double scale, double dropout_p, const OptionalTensor& seed, bool save) {
  OptionalTensor held = mask;
  Attention p = attention_of(qkv, held, heads, scale, dropout_p, seed);
  const Tensor out = empty_like_type(qkv, {p.batch, p.length, heads * p.head_dim});
  const Tensor lse = save ? empty_grad({p.batch, heads, p.length}) : empty_grad({0});
  if (out.numel() == 0) return {out, lse};
  p.out = data(out);
  p.lse = grad(lse);
  active().attention_forward(p, run_parallel);
  return {out, lse};
}

Tensor attention_backward(const Tensor& dout, const Tensor& qkv, const OptionalTensor& mask, const Tensor& lse,
                          int64_t heads, double scale, double dropout_p, const OptionalTensor& seed) {
  OptionalTensor held = mask;
  Attention p = attention_of(qkv, held, heads, scale, dropout_p, seed);
  const Tensor dqkv = empty_like_type(qkv, qkv.sizes());
  if (dqkv.numel() == 0) return dqkv;
  p.dout = data(dout);
  p.lse = grad(lse);
  p.dqkv = data(dqkv);
  active().attention_backward(p, run_parallel);
  return dqkv;
}

}  // namespace
}  // namespace fastadapt::cpu

TORCH_LIBRARY_IMPL(fastadapt, CPU, m) {
  using namespace fastadapt::cpu;
  m.impl("linear_forward", TORCH_FN(linear_forward));
  m.impl("linear_backward", TORCH_FN(linear_backward));
  m.impl("bottleneck_forward", TORCH_FN(bottleneck_forward));
  m.impl("bottleneck_backward", TORCH_FN(bottleneck_backward));
  m.impl("add_norm_forward", TORCH_FN(add_norm_forward));
  m.impl("add_norm_backward", TORCH_FN(add_norm_backward));
  m.impl("drop", TORCH_FN(drop));
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
}

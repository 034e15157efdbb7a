// What an op is given must have the shapes that its kernel reads: an op can be called past fastadapt.ops, from an
// exported graph for one, and there a wrong shape would be a read past the end.
#pragma once
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "kernels.h"

namespace fastadapt::cpu {

using OptionalTensor = std::optional<at::Tensor>;

inline void check_floating(const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.is_floating_point() && t.is_cpu() && t.layout() == at::kStrided, name, ": got ", t.toString(),
                   "; accepted is a dense floating tensor on the CPU");
}

// An activation: contiguous, of a dtype that the kernels compute in.
inline void check_activation(const char* name, const at::Tensor& t, int64_t dim) {
  TORCH_CHECK_TYPE(t.is_cpu() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16), name, ": got ",
                   t.toString(), "; accepted are float32 and bfloat16 on the CPU");
  TORCH_CHECK_VALUE(t.dim() == dim && t.is_contiguous(), name, ": got shape ", t.sizes(), " with strides ", t.strides(),
                    "; accepted is a contiguous tensor of ", dim, " dimensions");
}

inline void check_features(const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.size(1) >= 1 && x.size(1) <= kMaxFeatures, "x: got ", x.size(1), " features; accepted are 1 to ",
                    kMaxFeatures);
}

// What goes beside x, element by element.
inline void check_like(const char* name, const OptionalTensor& t, const at::Tensor& x) {
  if (!t.has_value()) return;
  TORCH_CHECK_VALUE(t->is_cpu() && t->scalar_type() == x.scalar_type() && t->sizes() == x.sizes() && t->is_contiguous(),
                    name, ": got ", t->toString(), " ", t->sizes(), "; accepted is a contiguous ", x.toString(), " ",
                    x.sizes());
}

inline void check_matrix(const char* name, const at::Tensor& t, int64_t rows, int64_t columns) {
  check_floating(name, t);
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": got shape ", t.sizes(),
                    "; accepted is [", rows, ", ", columns, "]");
}

inline void check_vector(const char* name, const OptionalTensor& t, int64_t n) {
  if (!t.has_value()) return;
  check_floating(name, *t);
  TORCH_CHECK_VALUE(t->dim() == 1 && t->size(0) == n, name, ": got shape ", t->sizes(), "; accepted is [", n, "]");
}

// A slot for each of the batch's rows, of which x has a whole multiple.
inline void check_rows(const at::Tensor& table, int64_t rows, int64_t slots) {
  TORCH_CHECK_TYPE(table.is_cpu() && table.scalar_type() == at::kLong && table.dim() == 1, "rows: got ",
                   table.toString(), " ", table.sizes(), "; accepted is a vector of int64 on the CPU");
  const int64_t count = table.numel(), stride = count ? table.stride(0) : 0;
  TORCH_CHECK_VALUE(count ? rows % count == 0 : rows == 0, "rows: got ", count, " slots for ", rows,
                    " rows of x; accepted is one for every batch row");
  const int64_t* slot = count ? table.data_ptr<int64_t>() : nullptr;
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK_VALUE(slot[i * stride] >= 0 && slot[i * stride] < slots, "rows: got slot ", slot[i * stride],
                      "; accepted are 0 to ", slots - 1);
}

inline void check_epsilon(double eps) {
  TORCH_CHECK_VALUE(eps >= 0.0 && std::isfinite(eps), "eps: got ", eps, "; accepted is a number from 0");
}

inline void check_probability(const char* name, double p) {
  TORCH_CHECK_VALUE(p >= 0.0 && p <= 1.0, name, ": got ", p, "; accepted is a probability from 0 to 1");
}

}  // namespace fastadapt::cpu

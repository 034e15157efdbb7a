// Packed copies of weights, made at first use and again when a weight has changed.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>

#include "kernels.h"

namespace fastadapt::cpu {

struct Layout {
  bool transposed;  // B = w^T instead of w
  Order order = Order::plain;
  bool operator==(const Layout& o) const { return transposed == o.transposed && order == o.order; }
};
constexpr Layout kPlain{false}, kTransposed{true}, kParted{true, Order::parted};

class PackedWeight {
 public:
  Packed view() const { return {static_cast<const uint32_t*>(words_.data_ptr()), k_, n_}; }

 private:
  friend PackedWeight packed(const Table&, const at::Tensor&, DType, Layout);
  at::Tensor words_;  // keeps the copy while a kernel reads it
  int64_t k_ = 0, n_ = 0;
};

// The copy of `w` in the compute type. It is reused while the storage, its address and its version counter are the
// same; a tensor without a counter (made under inference_mode) is packed at every call.
PackedWeight packed(const Table& table, const at::Tensor& w, DType compute, Layout layout);

int64_t forget(at::TensorList tensors);  // drops the copies of these tensors; returns how many there were
int64_t release_all();                   // drops every copy and every cached page; returns the bytes

}  // namespace fastadapt::cpu

// Outputs from recycled pages: a fresh buffer of tens of megabytes costs more in page faults than in arithmetic.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastadapt::cpu {

at::Tensor pooled_empty(at::IntArrayRef size, at::ScalarType dtype);
int64_t release_pool();  // gives cached pages back to the system; returns their bytes

}  // namespace fastadapt::cpu

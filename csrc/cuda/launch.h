// Launching: the grid, and what CUDA says of it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastadapt::cuda {

inline unsigned grid(int64_t blocks) { return static_cast<unsigned>(blocks); }  // below 2^31: the host side checks
inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastadapt::cuda

// The kernels of few.h. Nothing of torch's: nvcc alone compiles this.
#include "cuda/few.h"
#include "cuda/launch.h"

namespace fastadapt::cuda {
namespace {

// One block a multiprocessor is enough where rows are few: the compiler shall not spill for more.
template <class Store, int R>
__global__ __launch_bounds__(kFewThreads, 1) void bottleneck_kernel(const BottleneckArgs p) {
  extern __shared__ __align__(16) char shared[];
  bottleneck_rows<Store, R>(GpuBlock(), p, blockIdx.x, shared);
}

template <class Store, int R>
__global__ __launch_bounds__(kFewThreads, 1) void add_norm_kernel(const AddNormArgs p) {
  extern __shared__ __align__(16) char shared[];
  add_norm_rows<Store, R>(GpuBlock(), p, blockIdx.x, shared);
}

template <class Args>
const char* launch(void (*kernel)(Args), const Args& p, int rows, int64_t shared, void* stream) {
  // More than 48 KiB has to be asked for, on every device anew; the call only sets a field of the kernel's.
  if (shared > (48 << 10)) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<grid((p.rows + rows - 1) / rows), kFewThreads, shared, static_cast<cudaStream_t>(stream)>>>(p);
  return launched();
}

template <class Store>
const char* bottleneck_of(const BottleneckArgs& p, int rows, void* stream) {
  const int64_t shared = bottleneck_shared_bytes(p.hidden, p.width, rows);
  switch (rows) {
    case 1: return launch(bottleneck_kernel<Store, 1>, p, 1, shared, stream);
    case 2: return launch(bottleneck_kernel<Store, 2>, p, 2, shared, stream);
    default: return launch(bottleneck_kernel<Store, 4>, p, 4, shared, stream);
  }
}
template <class Store>
const char* add_norm_of(const AddNormArgs& p, int rows, void* stream) {
  const int64_t shared = add_norm_shared_bytes(p.hidden, rows);
  switch (rows) {
    case 1: return launch(add_norm_kernel<Store, 1>, p, 1, shared, stream);
    case 2: return launch(add_norm_kernel<Store, 2>, p, 2, shared, stream);
    default: return launch(add_norm_kernel<Store, 4>, p, 4, shared, stream);
  }
}

}  // namespace

const char* gpu_bottleneck(const BottleneckArgs& p, Type type, int rows, void* stream) {
  switch (type) {
    case Type::f32: return bottleneck_of<Single>(p, rows, stream);
    case Type::bf16: return bottleneck_of<Brain>(p, rows, stream);
    default: return bottleneck_of<Half>(p, rows, stream);
  }
}
const char* gpu_add_norm(const AddNormArgs& p, Type type, int rows, void* stream) {
  switch (type) {
    case Type::f32: return add_norm_of<Single>(p, rows, stream);
    case Type::bf16: return add_norm_of<Brain>(p, rows, stream);
    default: return add_norm_of<Half>(p, rows, stream);
  }
}

}  // namespace fastadapt::cuda

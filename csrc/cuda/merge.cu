// The kernels of merge.h. Nothing of torch's: nvcc alone compiles this.
#include "cuda/launch.h"
#include "cuda/merge.h"

namespace fastadapt::cuda {
namespace {

template <class Store>
__global__ __launch_bounds__(kMergeMostThreads) void remerge_kernel(const MergeArgs p) {
  __shared__ float t[kMergeRankStep * kMergeRows];
  merge_tile<Store>(GpuBlock(), p, p.first + blockIdx.x, t);
}

__global__ __launch_bounds__(kMergeMostThreads) void summarise_kernel(const MergeSummary p) {
  __shared__ int64_t part[kMergeMostThreads][4];
  summarise_matrix(GpuBlock(), p, blockIdx.x, part);
}

template <class Word>
__global__ __launch_bounds__(kMergeMostThreads) void collect_kernel(const MergeCollect p) {
  collect_tile<Word>(GpuBlock(), p, p.first + blockIdx.x);
}

}  // namespace

const char* gpu_remerge(const MergeArgs& p, Type type, int threads, void* stream) {
  const auto kernel = type == Type::f32    ? remerge_kernel<Single>
                      : type == Type::bf16 ? remerge_kernel<Brain>
                                           : remerge_kernel<Half>;
  kernel<<<grid(p.tiles), threads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return launched();
}
const char* gpu_summarise(const MergeSummary& p, void* stream) {
  summarise_kernel<<<grid(p.count), kMergeMostThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return launched();
}
const char* gpu_collect(const MergeCollect& p, Type type, void* stream) {
  const auto kernel = type == Type::f32 ? collect_kernel<uint32_t> : collect_kernel<uint16_t>;
  kernel<<<grid(p.tiles), kMergeMostThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return launched();
}

}  // namespace fastadapt::cuda

// The launches on a GPU, as the host side asks for them.
#include "cuda/launch.h"
#include "cuda/kernels.h"

namespace fastadapt::cuda {

const char* gpu_remerge(const MergeArgs&, Type, int, void*);
const char* gpu_summarise(const MergeSummary&, void*);
const char* gpu_collect(const MergeCollect&, Type, void*);
const char* gpu_bottleneck(const BottleneckArgs&, Type, int, void*);
const char* gpu_add_norm(const AddNormArgs&, Type, int, void*);

namespace {
int processors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
}
}  // namespace

const Launcher& gpu_launcher() {
  static const Launcher launcher{gpu_remerge, gpu_summarise, gpu_collect, gpu_bottleneck, gpu_add_norm, processors};
  return launcher;
}

}  // namespace fastadapt::cuda

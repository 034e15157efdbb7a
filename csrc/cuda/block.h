// How a kernel's body is written so that it runs on a GPU and, unchanged, on a CPU: as phases. `block.each(fn)` runs
// fn(thread) for every thread of the block and ends with a barrier, so threads talk only through shared memory and only
// from one phase to the next. What a thread keeps between phases is a Block::Local. CpuBlock runs a phase's threads one
// after another, in either order: a phase whose threads depended on each other would give two results.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FA_DEVICE __device__ __forceinline__
#define FA_UNROLL _Pragma("unroll")
#define FA_UNROLL_BY_4 _Pragma("unroll 4")
#else
#include <memory>
#define FA_DEVICE inline
#define FA_UNROLL
#define FA_UNROLL_BY_4
#endif

namespace fastadapt::cuda {

#if defined(__CUDACC__)

class GpuBlock {
 public:
  template <class T>
  class Local {
   public:
    __device__ explicit Local(const GpuBlock&) {}
    __device__ T& operator[](int) { return value_; }

   private:
    T value_;
  };

  __device__ GpuBlock() {}
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  template <class Fn>
  __device__ __forceinline__ void each(Fn&& fn) const {
    fn(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
  // Whether any thread's value is true.
  __device__ __forceinline__ bool any(Local<bool>& value) const { return __syncthreads_or(value[0]) != 0; }
  // The sum over all threads; `before` receives each thread's sum over the threads before it. Whole warps, 32 at most.
  __device__ __forceinline__ int prefix(Local<int>& value, Local<int>& before) const {
    __shared__ int of_warp[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int inclusive = value[0];
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, inclusive, step);
      if (lane >= step) inclusive += other;
    }
    if (lane == 31) of_warp[warp] = inclusive;
    __syncthreads();
    int first = 0, total = 0;
    for (int i = 0; i < warps; ++i) {
      if (i < warp) first += of_warp[i];
      total += of_warp[i];
    }
    before[0] = first + inclusive - value[0];
    __syncthreads();
    return total;
  }
};

#else

class CpuBlock {
 public:
  template <class T>
  class Local {
   public:
    explicit Local(const CpuBlock& block) : values_(new T[block.threads()]) {}
    T& operator[](int thread) { return values_[thread]; }

   private:
    std::unique_ptr<T[]> values_;
  };

  CpuBlock(int threads, bool backwards) : threads_(threads), backwards_(backwards) {}
  int threads() const { return threads_; }
  template <class Fn>
  void each(Fn&& fn) const {
    for (int i = 0; i < threads_; ++i) fn(backwards_ ? threads_ - 1 - i : i);
  }
  bool any(Local<bool>& value) const {
    bool found = false;
    for (int i = 0; i < threads_; ++i) found |= value[i];
    return found;
  }
  int prefix(Local<int>& value, Local<int>& before) const {
    int total = 0;
    for (int i = 0; i < threads_; ++i) {
      before[i] = total;
      total += value[i];
    }
    return total;
  }

 private:
  int threads_;
  bool backwards_;
};

#endif

}  // namespace fastadapt::cuda

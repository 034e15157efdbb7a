#include "pool.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastadapt::cpu {
namespace {

constexpr size_t kSmall = size_t{32} << 10;   // below, malloc recycles well by itself
constexpr size_t kMedium = size_t{1} << 20;   // below, blocks are multiples of kSmall on ordinary pages
constexpr size_t kHuge = size_t{2} << 20;     // a huge page; larger blocks are multiples of it

class Pool final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const bool huge = bytes >= kMedium;
    const size_t unit = huge ? kHuge : kSmall, rounded = (bytes + unit - 1) / unit * unit;
    void* p = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto found = free_.find(rounded);
      if (found != free_.end() && !found->second.empty()) {
        p = found->second.back();
        found->second.pop_back();
        cached_ -= rounded;
      }
    }
    if (p == nullptr) {
      p = std::aligned_alloc(huge ? kHuge : 64, rounded);
      TORCH_CHECK_WITH(OutOfMemoryError, p != nullptr, "fastadapt could not allocate ", rounded, " bytes");
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      if (huge) madvise(p, rounded, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
    }
    report(p, static_cast<int64_t>(rounded));
    auto* block = new Block{p, rounded};
    return {p, block, &Pool::give_back, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* dest, const void* src, size_t count) const override { default_copy_data(dest, src, count); }

  int64_t release() {
    std::lock_guard<std::mutex> lock(mutex_);
    int64_t bytes = static_cast<int64_t>(cached_);
    for (auto& [size, blocks] : free_)
      for (void* p : blocks) std::free(p);
    free_.clear();
    cached_ = 0;
    return bytes;
  }

  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: tensors may outlive static destruction
    return *pool;
  }

 private:
  Pool() {
    // With the large buffers in this pool, glibc would never see one freed, keep its thresholds low and give the pages
    // of PyTorch's own activations back to the system after every use. Freeing one block lets it adapt as usual.
    void* volatile block = std::malloc(size_t{31} << 20);  // volatile: or the pair is compiled away
    std::free(block);
  }
  struct Block {
    void* data;
    size_t bytes;
  };
  // To PyTorch's profiler, as its own allocators do: what tensors hold, not what is kept for the next ones.
  static void report(void* p, int64_t bytes) {
    static std::atomic<int64_t> held{0};
    const int64_t now = held += bytes;
    if (c10::memoryProfilingEnabled())
      c10::reportMemoryUsageToProfiler(p, bytes, static_cast<size_t>(now), 0, c10::Device(c10::kCPU));
  }
  static void give_back(void* context) {
    auto* block = static_cast<Block*>(context);
    Pool& pool = instance();
    report(block->data, -static_cast<int64_t>(block->bytes));
    bool keep;
    {
      std::lock_guard<std::mutex> lock(pool.mutex_);
      keep = pool.cached_ + block->bytes <= pool.limit_;
      if (keep) {
        pool.free_[block->bytes].push_back(block->data);
        pool.cached_ += block->bytes;
      }
    }
    if (!keep) std::free(block->data);
    delete block;
  }
  static size_t default_limit() {
    if (const char* megabytes = std::getenv("FASTADAPT_POOL_MB"))
      return static_cast<size_t>(std::strtoull(megabytes, nullptr, 10)) << 20;
    return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE)) / 16;
  }

  std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;
  size_t cached_ = 0;
  const size_t limit_ = default_limit();
};

}  // namespace

at::Tensor pooled_empty(at::IntArrayRef size, at::ScalarType dtype) {
  size_t bytes = c10::elementSize(dtype);
  for (int64_t n : size) bytes *= static_cast<size_t>(n);
  c10::Allocator* allocator = bytes < kSmall ? c10::GetCPUAllocator() : &Pool::instance();
  return at::detail::empty_generic(size, allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), dtype, std::nullopt);
}

int64_t release_pool() { return Pool::instance().release(); }

}  // namespace fastadapt::cpu

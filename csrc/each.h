// Work shared out over PyTorch's threads.
#pragma once
#include <ATen/Parallel.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <type_traits>

namespace fastadapt::cpu {

// What is left of one thread's share of tasks: it takes the first, others that have none left take the last.
class alignas(64) Share {
 public:
  void set(uint32_t first, uint32_t end) { both_ = pack(first, end); }
  // A task, or -1 where none is left.
  int64_t take(bool own) {
    uint64_t both = both_;
    for (;;) {
      const auto first = static_cast<uint32_t>(both >> 32), end = static_cast<uint32_t>(both);
      if (first == end) return -1;
      if (both_.compare_exchange_weak(both, own ? pack(first + 1, end) : pack(first, end - 1)))
        return own ? first : end - 1;
    }
  }

 private:
  static uint64_t pack(uint32_t first, uint32_t end) { return static_cast<uint64_t>(first) << 32 | end; }
  std::atomic<uint64_t> both_;
};

// fn(i) for i in [0, n), n below 2^32. A thread goes through the share [n t / threads, n (t + 1) / threads) in order, so
// that the task after this one is most likely its next, and then helps others: the cores of a shared machine aren't
// equally fast. False where fn or the threads failed.
template <class Fn>
bool each(int64_t n, Fn&& fn) {
  constexpr int64_t most = 256;
  struct Call {
    std::remove_reference_t<Fn>* fn;
    int64_t threads;
    std::atomic<bool> failed;
    Share shares[most];
  } call;
  call.fn = &fn;
  call.threads = std::min<int64_t>({n, at::get_num_threads(), most});
  call.failed = false;
  for (int64_t t = 0; t < call.threads; ++t)
    call.shares[t].set(static_cast<uint32_t>(n * t / call.threads), static_cast<uint32_t>(n * (t + 1) / call.threads));
  const auto error = torch_parallel_for(
      0, call.threads, 1,
      [](int64_t begin, int64_t end, void* context) {
        Call& call = *static_cast<Call*>(context);
        try {
          for (int64_t thread = begin; thread < end; ++thread)
            for (int64_t k = 0; k < call.threads; ++k)
              for (int64_t i; (i = call.shares[(thread + k) % call.threads].take(k == 0)) >= 0;) (*call.fn)(i);
        } catch (const std::bad_alloc&) {
          call.failed = true;
        }
      },
      &call);
  return error == 0 && !call.failed;
}

}  // namespace fastadapt::cpu

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

// fn(i) for i in [0, n), whoever is free taking the next one: the cores of a shared machine aren't equally fast. False
// where fn or the threads failed.
template <class Fn>
bool each(int64_t n, Fn&& fn) {
  struct Call {
    std::remove_reference_t<Fn>* fn;
    std::atomic<int64_t> next;
    int64_t n;
    std::atomic<bool> failed;
  } call{&fn, {0}, n, {false}};
  const auto error = torch_parallel_for(
      0, std::min<int64_t>(n, at::get_num_threads()), 1,
      [](int64_t begin, int64_t end, void* context) {
        Call& call = *static_cast<Call*>(context);
        try {
          for (int64_t thread = begin; thread < end; ++thread)
            for (int64_t i; (i = call.next.fetch_add(1)) < call.n;) (*call.fn)(i);
        } catch (const std::bad_alloc&) {
          call.failed = true;
        }
      },
      &call);
  return error == 0 && !call.failed;
}

}  // namespace fastadapt::cpu

// The CUDA kernels' bodies on a CPU, block after block and thread after thread, for tests on machines without a GPU:
// the same arithmetic, indices, barriers and shared memory. What it can't show is what only a GPU does: the launch, the
// memory model, and the instructions that number.h picks under nvcc.
#include <cstring>
#include <vector>

#include "cuda/few.h"
#include "cuda/kernels.h"
#include "cuda/merge.h"

namespace fastadapt::cuda {
namespace {

bool backwards = false;

// body(block, number, shared) for every block; shared memory starts out as NaNs, as anything may lie there.
template <class Body>
const char* run(int64_t blocks, int threads, int64_t shared_bytes, Body&& body) {
  std::vector<Vector> shared((shared_bytes + 15) / 16);
  const CpuBlock block(threads, backwards);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t number = backwards ? blocks - 1 - i : i;
    std::memset(shared.data(), 0xff, shared.size() * sizeof(Vector));
    body(block, number, reinterpret_cast<char*>(shared.data()));
  }
  return nullptr;
}

template <class Fn>
const char* typed(Type type, Fn&& fn) {
  switch (type) {
    case Type::f32: return fn(Single());
    case Type::bf16: return fn(Brain());
    default: return fn(Half());
  }
}

const char* remerge(const MergeArgs& p, Type type, int threads, void*) {
  return typed(type, [&](auto store) {
    return run(p.tiles, threads, kMergeSharedBytes, [&](const CpuBlock& block, int64_t number, char* shared) {
      merge_tile<decltype(store)>(block, p, p.first + number, reinterpret_cast<float*>(shared));
    });
  });
}
const char* summarise(const MergeSummary& p, void*) {
  const int64_t bytes = kMergeMostThreads * 4 * sizeof(int64_t);
  return run(p.count, kMergeMostThreads, bytes, [&](const CpuBlock& block, int64_t number, char* shared) {
    summarise_matrix(block, p, number, reinterpret_cast<int64_t(*)[4]>(shared));
  });
}
const char* collect(const MergeCollect& p, Type type, void*) {
  return typed(type, [&](auto store) {
    return run(p.tiles, kMergeMostThreads, 0, [&](const CpuBlock& block, int64_t number, char*) {
      collect_tile<typename decltype(store)::Word>(block, p, p.first + number);
    });
  });
}

// Body<Store, R> over blocks of R rows.
template <class Args, class Body>
const char* few(const Args& p, Type type, int rows, int64_t shared_bytes, Body&& body) {
  return typed(type, [&](auto store) {
    const int64_t blocks = (p.rows + rows - 1) / rows;
    return run(blocks, kFewThreads, shared_bytes, [&](const CpuBlock& block, int64_t number, char* shared) {
      switch (rows) {
        case 1: return body(store, std::integral_constant<int, 1>(), block, number, shared);
        case 2: return body(store, std::integral_constant<int, 2>(), block, number, shared);
        default: return body(store, std::integral_constant<int, 4>(), block, number, shared);
      }
    });
  });
}
const char* bottleneck(const BottleneckArgs& p, Type type, int rows, void*) {
  const int64_t bytes = bottleneck_shared_bytes(p.hidden, p.width, rows);
  return few(p, type, rows, bytes, [&](auto store, auto r, const CpuBlock& block, int64_t number, char* shared) {
    bottleneck_rows<decltype(store), decltype(r)::value>(block, p, number, shared);
  });
}
const char* add_norm(const AddNormArgs& p, Type type, int rows, void*) {
  const int64_t bytes = add_norm_shared_bytes(p.hidden, rows);
  return few(p, type, rows, bytes, [&](auto store, auto r, const CpuBlock& block, int64_t number, char* shared) {
    add_norm_rows<decltype(store), decltype(r)::value>(block, p, number, shared);
  });
}
int processors() { return 2; }

}  // namespace

const Launcher& emulated_launcher() {
  static const Launcher launcher{remerge, summarise, collect, bottleneck, add_norm, processors};
  return launcher;
}
void emulate_backwards(bool value) { backwards = value; }

}  // namespace fastadapt::cuda

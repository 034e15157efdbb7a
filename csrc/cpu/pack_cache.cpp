#include "pack_cache.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "pool.h"

namespace fastadapt::cpu {
namespace {

// One packing of a matrix.
struct Entry {
  std::vector<int64_t> sizes, strides;
  int64_t offset;
  at::ScalarType source;
  DType compute;
  Layout layout;
  const char* table;
  const void* data;
  uint32_t version;
  at::Tensor words;

  bool is_of(const at::Tensor& w, DType type, Layout how, const char* name) const {
    return offset == w.storage_offset() && source == w.scalar_type() && compute == type && layout == how &&
           table == name && w.sizes() == at::IntArrayRef(sizes) && w.strides() == at::IntArrayRef(strides);
  }
};
// All packings of what one storage holds; the weak pointer keeps its address from being anybody else's.
struct Packings {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  std::vector<Entry> entries;
};

std::mutex mutex;
std::unordered_map<const void*, Packings> cache;

void drop_expired() {
  for (auto it = cache.begin(); it != cache.end();) it = it->second.storage.expired() ? cache.erase(it) : ++it;
}

// Frozen weights, which are read one after another, lie one after another: reading 57 MB of them is a fifth faster than
// from blocks that each begin on a huge page of their own. An arena lives as long as a matrix in it.
constexpr int64_t kArena = int64_t{32} << 20, kLarge = int64_t{256} << 10;
at::Tensor arena;
int64_t used = 0;

at::Tensor room_for(int64_t count) {
  const int64_t bytes = count * 4;
  if (bytes < kLarge || bytes > kArena) return pooled_empty({count}, at::kInt);
  if (!arena.defined() || used + bytes > kArena) {
    arena = pooled_empty({kArena / 4}, at::kInt);
    used = 0;
  }
  const at::Tensor words = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(arena.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), arena.dtype());
  words.unsafeGetTensorImpl()->set_storage_offset(used / 4);
  words.unsafeGetTensorImpl()->set_sizes_contiguous({count});
  used += (bytes + 63) / 64 * 64;
  return words;
}

}  // namespace

PackedWeight packed(const Table& table, const at::Tensor& w, DType compute, Layout layout) {
  PackedWeight result;
  const bool transposed = layout.transposed;
  result.k_ = w.size(transposed ? 1 : 0);
  result.n_ = w.size(transposed ? 0 : 1);
  const int64_t count = table.packed_words(compute, result.k_, result.n_, layout.order);
  auto pack = [&](const at::Tensor& words) {
    const at::Tensor source =
        w.scalar_type() == at::kFloat || w.scalar_type() == at::kBFloat16 ? w : w.to(at::kFloat);
    table.pack(compute, source.scalar_type() == at::kFloat ? DType::f32 : DType::bf16, source.data_ptr(), result.k_,
               result.n_, source.stride(transposed ? 1 : 0), source.stride(transposed ? 0 : 1),
               layout.order, static_cast<uint32_t*>(words.data_ptr()));
  };
  if (w.is_inference() || !w.has_storage()) {
    result.words_ = pooled_empty({count}, at::kInt);
    pack(result.words_);
    return result;
  }
  c10::StorageImpl* storage = w.storage().unsafeGetStorageImpl();
  const auto version = static_cast<uint32_t>(w._version());
  std::lock_guard<std::mutex> lock(mutex);
  auto of_storage = cache.find(storage);
  if (of_storage == cache.end()) {
    drop_expired();
    auto weak = c10::weak_intrusive_ptr<c10::StorageImpl>(
        c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage));
    of_storage = cache.emplace(storage, Packings{std::move(weak), {}}).first;
  }
  std::vector<Entry>& entries = of_storage->second.entries;
  const auto found = std::find_if(entries.begin(), entries.end(),
                                  [&](const Entry& e) { return e.is_of(w, compute, layout, table.name); });
  const bool known = found != entries.end();
  if (known && found->version == version && found->data == w.const_data_ptr()) {
    result.words_ = found->words;
    return result;
  }
  // A kernel on another thread may still read the old copy: it is written over only where nobody holds it.
  result.words_ = known && found->words.use_count() == 1 ? found->words : room_for(count);
  pack(result.words_);
  if (known) {
    found->version = version;
    found->data = w.const_data_ptr();
    found->words = result.words_;
  } else {
    entries.push_back({w.sizes().vec(), w.strides().vec(), w.storage_offset(), w.scalar_type(), compute, layout,
                       table.name, w.const_data_ptr(), version, result.words_});
  }
  return result;
}

int64_t forget(at::TensorList tensors) {
  std::lock_guard<std::mutex> lock(mutex);
  int64_t count = 0;
  for (const at::Tensor& t : tensors) {
    if (!t.has_storage()) continue;
    const auto found = cache.find(t.storage().unsafeGetStorageImpl());
    if (found == cache.end()) continue;
    count += static_cast<int64_t>(found->second.entries.size());
    cache.erase(found);
  }
  return count;
}

int64_t release_all() {
  int64_t bytes = 0;
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [storage, packings] : cache)
      for (const Entry& entry : packings.entries) bytes += static_cast<int64_t>(entry.words.nbytes());
    cache.clear();
    arena.reset();
  }
  return bytes + release_pool();
}

}  // namespace fastadapt::cpu

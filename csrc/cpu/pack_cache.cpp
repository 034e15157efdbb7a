#include "pack_cache.h"

#include <map>
#include <mutex>
#include <tuple>

#include "pool.h"

namespace fastadapt::cpu {
namespace {

using Key = std::tuple<const void*, int64_t, std::vector<int64_t>, std::vector<int64_t>, int, int, int, const char*>;

struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;  // while held, the address is nobody else's
  const void* data;
  uint32_t version;
  at::Tensor words;
};

std::mutex mutex;
std::map<Key, Entry> entries;
size_t inserted = 0;

// Frozen weights, which are read one after another, lie one after another: reading 57 MB of them is a quarter faster than
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

void drop_expired() {
  for (auto it = entries.begin(); it != entries.end();) it = it->second.storage.expired() ? entries.erase(it) : ++it;
}

}  // namespace

PackedWeight packed(const Table& table, const at::Tensor& w, DType compute, Layout layout) {
  PackedWeight result;
  const bool transposed = layout == Layout::transposed;
  result.k_ = w.size(transposed ? 1 : 0);
  result.n_ = w.size(transposed ? 0 : 1);
  const int64_t count = table.packed_words(compute, result.k_, result.n_);
  auto pack = [&](const at::Tensor& words) {
    const at::Tensor source =
        w.scalar_type() == at::kFloat || w.scalar_type() == at::kBFloat16 ? w : w.to(at::kFloat);
    table.pack(compute, source.scalar_type() == at::kFloat ? DType::f32 : DType::bf16, source.data_ptr(), result.k_,
               result.n_, source.stride(transposed ? 1 : 0), source.stride(transposed ? 0 : 1),
               static_cast<uint32_t*>(words.data_ptr()));
  };
  if (w.is_inference() || !w.has_storage()) {
    result.words_ = pooled_empty({count}, at::kInt);
    pack(result.words_);
    return result;
  }
  const auto& storage = w.storage();
  const Key key{storage.unsafeGetStorageImpl(), w.storage_offset(), w.sizes().vec(), w.strides().vec(),
                static_cast<int>(w.scalar_type()), static_cast<int>(compute), static_cast<int>(layout), table.name};
  const auto version = static_cast<uint32_t>(w._version());
  std::lock_guard<std::mutex> lock(mutex);
  auto found = entries.find(key);
  if (found != entries.end() && found->second.version == version && found->second.data == w.const_data_ptr()) {
    result.words_ = found->second.words;
    return result;
  }
  // A kernel on another thread may still read the old copy: it is written over only where nobody holds it.
  const bool reuse = found != entries.end() && found->second.words.use_count() == 1;
  result.words_ = reuse ? found->second.words : room_for(count);
  pack(result.words_);
  if (found != entries.end()) {
    found->second.version = version;
    found->second.data = w.const_data_ptr();
    found->second.words = result.words_;
  } else {
    if (++inserted % 64 == 0) drop_expired();
    entries.emplace(key, Entry{c10::weak_intrusive_ptr<c10::StorageImpl>(
                                   c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage.unsafeGetStorageImpl())),
                               w.const_data_ptr(), version, result.words_});
  }
  return result;
}

int64_t forget(at::TensorList tensors) {
  std::lock_guard<std::mutex> lock(mutex);
  int64_t count = 0;
  for (const at::Tensor& t : tensors) {
    if (!t.has_storage()) continue;
    const void* storage = t.storage().unsafeGetStorageImpl();
    for (auto it = entries.lower_bound(Key{storage, INT64_MIN, {}, {}, 0, 0, 0, nullptr});
         it != entries.end() && std::get<0>(it->first) == storage;) {
      it = entries.erase(it);
      ++count;
    }
  }
  return count;
}

int64_t release_all() {
  int64_t bytes = 0;
  {
    std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [key, entry] : entries) bytes += static_cast<int64_t>(entry.words.nbytes());
    entries.clear();
    arena.reset();
  }
  return bytes + release_pool();
}

}  // namespace fastadapt::cpu

#include "capability.h"

#include <atomic>
#include <cstdint>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastadapt::cpu {
namespace {

#if defined(__x86_64__)
// The tiles exist, the system saves them, and it lets this process use them.
bool has_amx_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d & (1u << 24), bf16 = d & (1u << 22);
  if (!tile || !bf16) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & 0x60000u) != 0x60000u) return false;
#if defined(__linux__)
  constexpr int request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Table*> detect() {
  std::vector<const Table*> tables{&table_portable};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    tables.push_back(&table_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd")) {
      tables.push_back(&table_avx512);
      if (__builtin_cpu_supports("avx512bf16")) {
        tables.push_back(&table_avx512_bf16);
        if (has_amx_bf16()) tables.push_back(&table_amx);
      }
    }
  }
#endif
  tables.push_back(&table_amx_emulated);
  return tables;
}

const std::vector<const Table*>& supported() {
  static const std::vector<const Table*> tables = detect();
  return tables;
}

// The fastest here. Intel multiplies pairs of bfloat16 (vdpbf16ps) at half the rate of widening them and multiplying
// floats, AMD at twice that rate: without tiles the narrower set serves Intel better (benchmarks/NOTES.md).
const Table* fastest() {
  const auto& tables = supported();
  const auto* widest = tables[tables.size() - 2];  // the last is emulated
#if defined(__x86_64__)
  if (widest == &table_avx512_bf16 && __builtin_cpu_is("intel")) return &table_avx512;
#endif
  return widest;
}

std::atomic<const Table*> chosen{nullptr};

}  // namespace

const Table& active() {
  static const Table* const by_itself = fastest();
  const Table* table = chosen.load(std::memory_order_relaxed);
  return table ? *table : *by_itself;
}

std::vector<std::string> supported_names() {
  std::vector<std::string> names;
  for (const Table* t : supported()) names.emplace_back(t->name);
  return names;
}

void set_active(const std::string& name) {
  std::string accepted;
  for (const Table* t : supported()) {
    if (name == t->name) {
      chosen.store(t, std::memory_order_relaxed);
      return;
    }
    accepted += (accepted.empty() ? "" : ", ") + std::string(t->name);
  }
  throw std::invalid_argument("capability: got '" + name + "'; this machine runs " + accepted);
}

}  // namespace fastadapt::cpu

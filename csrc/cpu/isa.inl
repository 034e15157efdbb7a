// Everything of one instruction set. The including file sets the target, FA_NAMESPACE, FA_WIDTH (floats in a vector),
// FA_ROWS (rows of a tile that fit the registers) and FA_BF16 (how bfloat16 is multiplied: 0 as float, 1 vdpbf16ps,
// 2 AMX, 3 AMX emulated), and has included the standard headers before the target pragma, so that no inline function
// of theirs is compiled for a machine that can't run it.
namespace fastadapt::cpu {
namespace FA_NAMESPACE {
#include "scratch.inl"
#include "vec.inl"
#include "gemm.inl"
#include "parallel.inl"
#include "norm.inl"
#include "linear.inl"
#include "bottleneck.inl"
#include "attention.inl"
#include "merge.inl"
#include "mix.inl"

inline int64_t packed_words(DType t, int64_t k, int64_t n, Order order) {
  const int64_t panels = (n + 31) / 32 * 32;
  if (order == Order::added)
    return (t == DType::f32 ? added_words<Multiplied<float>>(k) : added_words<Multiplied<bf16>>(k)) * panels;
  return (t == DType::f32 ? words_of<float>(k) : words_of<bf16>(k)) * panels;
}
template <class T>
void pack_from(DType source, const void* src, int64_t k, int64_t n, int64_t sk, int64_t sn, Order order,
               uint32_t* words) {
  auto from = [&](auto* values) {
    if constexpr (in_parts<Multiplied<T>>)
      if (order == Order::added) return pack_added_parts(values, k, n, sk, sn, words);
    pack_as<T>(values, k, n, sk, sn, order, words);
  };
  if (source == DType::f32) from((const float*)src);
  else from((const bf16*)src);
}
inline void pack(DType compute, DType source, const void* src, int64_t k, int64_t n, int64_t sk, int64_t sn,
                 Order order, uint32_t* words) {
  if (compute == DType::f32) pack_from<float>(source, src, k, n, sk, sn, order, words);
  else pack_from<bf16>(source, src, k, n, sk, sn, order, words);
}
#define FA_ENTRY(op, Params)                                 \
  inline void op(const Params& p, Parallel parallel) {       \
    p.type == DType::f32 ? op##_typed<float>(p, parallel) : op##_typed<bf16>(p, parallel); \
  }
FA_ENTRY(linear_forward, LinearForward)
FA_ENTRY(linear_backward, LinearBackward)
FA_ENTRY(bottleneck_forward, BottleneckForward)
FA_ENTRY(bottleneck_backward, BottleneckBackward)
FA_ENTRY(bottleneck_rows_forward, BottleneckRowsForward)
FA_ENTRY(bottleneck_rows_backward, BottleneckRowsBackward)
FA_ENTRY(add_norm_forward, AddNormForward)
FA_ENTRY(add_norm_backward, AddNormBackward)
FA_ENTRY(drop, Drop)
FA_ENTRY(mix_forward, Mix)
FA_ENTRY(mix_backward, Mix)
FA_ENTRY(attention_forward, Attention)
FA_ENTRY(attention_backward, Attention)
#undef FA_ENTRY
}  // namespace FA_NAMESPACE

#define FA_CONCAT2(a, b) a##b
#define FA_CONCAT(a, b) FA_CONCAT2(a, b)
#define FA_STRING2(a) #a
#define FA_STRING(a) FA_STRING2(a)
const Table FA_CONCAT(table_, FA_NAMESPACE) = {
    FA_STRING(FA_NAMESPACE),
    FA_NAMESPACE::packed_words,
    FA_NAMESPACE::pack,
    FA_NAMESPACE::linear_forward,
    FA_NAMESPACE::linear_backward,
    FA_NAMESPACE::bottleneck_forward,
    FA_NAMESPACE::bottleneck_backward,
    FA_NAMESPACE::bottleneck_rows_forward,
    FA_NAMESPACE::bottleneck_rows_backward,
    FA_NAMESPACE::add_norm_forward,
    FA_NAMESPACE::add_norm_backward,
    FA_NAMESPACE::drop,
    FA_NAMESPACE::mix_forward,
    FA_NAMESPACE::mix_backward,
    FA_NAMESPACE::attention_forward,
    FA_NAMESPACE::attention_backward,
    FA_NAMESPACE::merge_pack,
    FA_NAMESPACE::merge_rows,
    FA_NAMESPACE::unmerge_rows,
};
}  // namespace fastadapt::cpu

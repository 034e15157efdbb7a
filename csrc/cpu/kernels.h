// What every instruction set provides, as plain pointers: no torch type crosses this line.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastadapt::cpu {

enum class DType : int { f32 = 0, bf16 = 1 };
enum class Act : int { none, relu, gelu, gelu_new, silu, tanh, sigmoid, leaky_relu };

// A [k, n] matrix in panels of 32 columns, laid out as the instruction set multiplies it (gemm.inl). A word is one float,
// or two consecutive k of one column in bfloat16 where the instruction set multiplies those.
struct Packed {
  const uint32_t* words;
  int64_t k, n;
};
// What a packed matrix is for: `plain`; `parted`: of every 32 columns the even ones first, where the bottleneck wants them so;
// `added`: a LoRA's second matrix, multiplied into the sums of another product.
enum class Order : int { plain, parted, added };

struct Dropout {
  bool on = false;
  uint64_t seed = 0;
  uint64_t threshold = 0;  // the smallest 32-bit word that is kept
  float keep_scale = 1.0f;
};

// Runs fn(task, context) for every task in [0, tasks), on however many threads.
using Task = void (*)(int64_t task, void* context);
using Parallel = void (*)(int64_t tasks, Task fn, void* context);

// A low-rank addition to a linear op: scale drop(x) A^T B^T in the rows of its slot and the columns of weight `owner`.
struct LowRank {
  int owner, slot;
  int64_t rank, column;  // `column` of s is its first
  Packed down, up;       // forward: A^T [k, rank] and B^T [rank, n]; backward: B [n, rank] and A [rank, k]; `up` as added
  float scale;
  Dropout drop;
  float *da, *db;  // backward: [rank, k] and [n, rank], both or neither
};
struct LowRanks {
  int count = 0;
  const LowRank* loras = nullptr;  // in the order of their slots
  int64_t columns = 0;             // of s
  int slots = 1;
  const int64_t* table = nullptr;  // slot of each of `batch` equal groups of rows; null: slot 0 for all
  int64_t batch = 1;
};

struct LinearForward {  // y = drop(act(x [W_0; ..]^T + bias)); z = pre-activation or null
  DType type;
  int64_t rows, k, n;  // n: all columns of y
  const void* x;
  int count;
  const Packed* weights;
  const float* bias;  // [slots][n] or null
  Act act;
  Dropout drop;
  LowRanks low;
  void *y, *z, *s;  // s [rows][low.columns]: what B multiplies, or null
  uint8_t* code;  // instead of z: act' in a byte, see derivative_in_a_byte in fastadapt/ops/schemas.py; or null
  int threads;
};

struct LinearBackward {  // dx = (drop(dy) * act'(z)) [W_0; ..]
  DType type;
  int64_t rows, k, n;  // k: columns of dy, n: columns of dx
  const void *dy, *z;
  const uint8_t* code;  // instead of z, or null
  int count;
  const Packed* weights;  // each [k_i, n]
  Act act;
  Dropout drop;
  LowRanks low;
  const void *x, *s;  // where LoRAs have gradients
  void* dx;           // or null
  float* dbias;       // [slots][k] or null
  int threads;
};

struct Drop {  // y = x * mask / (1 - p)
  DType type;
  int64_t rows, cols;
  const void* x;
  Dropout drop;
  void* y;
  int threads;
};

struct BottleneckForward {
  DType type;
  int64_t rows, hidden, b;
  const void *x, *residual;  // residual or null
  Packed down, up;
  const float *b_down, *b_up;  // or null
  Act act;
  const float* scale;  // [hidden] or null
  float factor;
  bool skip;
  const float *norm_weight, *norm_bias;  // or null
  float eps;
  Dropout drop;
  void *y, *z, *s;  // z, s or null
  int64_t z_stride;  // elements from one row of z to the next
  int threads;
};

struct BottleneckBackward {
  DType type;
  int64_t rows, hidden, b;
  const void *dy, *x, *z, *s;  // x null where w_down has no gradient; s null without norm
  Packed up_t, down_t;         // w_up as [hidden, b], w_down as [b, hidden]
  Act act;
  const float* scale;
  float factor;
  bool skip;
  const float* norm_weight;
  float eps;
  Dropout drop;
  void *dx, *dresidual;                          // or null
  float *dw_down, *db_down, *g_up, *g_bias;      // all or none
  float *dnorm_weight, *dnorm_bias;              // both or none
  int64_t z_stride;                              // elements from one row of z to the next
  int threads;
};

// Rows that differ in their adapter: the parameters of every slot, which share type, rows, hidden and eps. A slot of
// b = 0 has no adapter: y = LN([x if skip] + [residual]), and in backward the dx of its rows is zero without the skip.
constexpr int64_t kBottleneckRows = 64;  // rows in a block
struct SlotBlock {
  int64_t r0, rows;
  int slot;
  int share;   // backward: which of the slot's shares of gradients the block adds to
  bool first;  // backward: whether it is the first that does
};
struct BottleneckRowsForward {
  DType type;
  const BottleneckForward* slots;
  const SlotBlock* blocks;
  int64_t count;  // of the blocks
  int threads;
};
struct BottleneckRowsBackward {
  DType type;
  const BottleneckBackward* slots;
  const int* shares;  // how many a slot has; 0 where no row is of it
  int64_t slot_count;
  const SlotBlock* blocks;
  int64_t count;
  int64_t parts;  // ranges of blocks; the blocks of a slot in one part have one share
};

struct AddNormForward {
  DType type;
  int64_t rows, hidden;
  const void *x, *residual;
  const float *norm_weight, *norm_bias;
  float eps;
  Dropout drop;
  void *y, *s;
  int threads;
};

struct AddNormBackward {
  DType type;
  int64_t rows, hidden;
  const void *dy, *ds, *s;  // ds or null
  const float* norm_weight;
  float eps;
  Dropout drop;
  void *dx, *dresidual;
  float *dnorm_weight, *dnorm_bias;
  int threads;
};

struct Attention {
  DType type;
  int64_t batch, length, heads, head_dim;
  const void* qkv;
  const void* prefix;     // keys [prefix_length, heads * head_dim], then values; null where prefix_length is 0
  int64_t prefix_length;
  int64_t prefix_stride;  // elements from one row of the batch to the next: 0 where all share one
  const void* mask;       // null, bool (one byte) or float
  bool mask_is_bool;
  int64_t mask_strides[4];  // batch, head, query, key, in elements
  float scale;
  Dropout drop;
  void* out;         // forward
  float* lse;        // forward: written or null; backward: read
  const void* dout;  // backward
  void* dqkv;        // backward
  float* dprefix;      // backward: [batch, 2, prefix_length, heads * head_dim]
  float* dprefix_sum;  // backward: its sum over the batch where the rows share a prefix, else null
};

struct Mix {  // of `count` adapters with bottlenecks of b
  DType type;
  int64_t rows, count, b;
  const void *sigma, *t, *shift;  // [rows, count b], [rows, count b + count], [rows] or null
  Dropout drop;
  void* m;                     // like t: forward: the mix, then the weights; backward: their gradient, read
  void *dsigma, *dt, *dshift;  // backward; dshift null where shift is
  int threads;
};

enum class WeightType : int { f32, bf16, f16 };

// A merged weight that the byte of its difference can't restore: its flat index and its bits.
struct MergeEntry {
  uint32_t index, bits;
};

struct MergePack {  // panels = a [rank, cols] in panels of 64 columns, t = scale * b [rows, rank]
  WeightType type;  // of the weights that they are for
  DType a_type, b_type;
  int64_t rows, cols, rank;
  const void *a, *b;
  float scale;
  float *panels, *t;
};

struct MergeRows {  // w += t a or w -= t a, rounded once
  WeightType type;
  int64_t rows, cols, rank;
  void* w;         // [rows, cols], as are the codes
  const float* a;  // in panels
  const float* t;  // [rows, rank]
  int8_t* codes;   // in: written; out: read; null where the way back rounds
  MergeEntry* listed;  // in with codes: room for every weight; in no order
  int64_t count;       // of the listed
};

constexpr int64_t kPanel = 32;
// The largest that the kernels serve; backends/cpu.py asks for them.
constexpr int64_t kMaxFeatures = 16384, kMaxRank = 768, kMaxAttentionLength = 768, kMaxHeadDim = 256;

struct Table {
  const char* name;
  int64_t (*packed_words)(DType compute, int64_t k, int64_t n, Order order);
  // src(k, n) = src[k * stride_k + n * stride_n]
  void (*pack)(DType compute, DType source, const void* src, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n,
               Order order, uint32_t* words);
  void (*linear_forward)(const LinearForward&, Parallel);
  void (*linear_backward)(const LinearBackward&, Parallel);
  void (*bottleneck_forward)(const BottleneckForward&, Parallel);
  void (*bottleneck_backward)(const BottleneckBackward&, Parallel);
  void (*bottleneck_rows_forward)(const BottleneckRowsForward&, Parallel);
  void (*bottleneck_rows_backward)(const BottleneckRowsBackward&, Parallel);
  void (*add_norm_forward)(const AddNormForward&, Parallel);
  void (*add_norm_backward)(const AddNormBackward&, Parallel);
  void (*drop)(const Drop&, Parallel);
  void (*mix_forward)(const Mix&, Parallel);
  void (*mix_backward)(const Mix&, Parallel);
  void (*attention_forward)(const Attention&, Parallel);
  void (*attention_backward)(const Attention&, Parallel);
  bool (*merge_pack)(const MergePack&);  // false: a or b holds NaN or infinity
  bool (*merge_rows)(MergeRows&);        // false: a result is NaN or infinite
  bool (*unmerge_rows)(MergeRows&);      // likewise; always true with codes
};

// One a file isa_*.cpp; each may be called only where supported(name) says so.
extern const Table table_portable, table_avx2, table_avx512, table_avx512_bf16, table_amx, table_amx_emulated;

}  // namespace fastadapt::cpu

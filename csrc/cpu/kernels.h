// What every instruction set provides, as plain pointers: no torch type crosses this line.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastadapt::cpu {

enum class DType : int { f32 = 0, bf16 = 1 };
enum class Act : int { none, relu, gelu, gelu_new, silu, tanh, sigmoid, leaky_relu };

// A [k, n] matrix in panels of 32 columns: word (p, kw, c) stands at (p * kw_count + kw) * 32 + c. A word is one float,
// or two consecutive k of one column in bfloat16 where the instruction set multiplies those.
struct Packed {
  const uint32_t* words;
  int64_t k, n;
};

struct Dropout {
  bool on = false;
  uint64_t seed = 0;
  uint64_t threshold = 0;  // the smallest 32-bit word that is kept
  float keep_scale = 1.0f;
};

// Runs fn(task, context) for every task in [0, tasks), on however many threads.
using Task = void (*)(int64_t task, void* context);
using Parallel = void (*)(int64_t tasks, Task fn, void* context);

struct LinearForward {  // y = drop(act(x [W_0; ..]^T + bias)); z = pre-activation or null
  DType type;
  int64_t rows, k, n;  // n: all columns of y
  const void* x;
  int count;
  const Packed* weights;
  const float* bias;  // [n] or null
  Act act;
  Dropout drop;
  void *y, *z;
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
  void* dx;      // or null
  float* dbias;  // [k] or null
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
  int threads;
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
  const void* mask;  // null, bool (one byte) or float
  bool mask_is_bool;
  int64_t mask_strides[4];  // batch, head, query, key, in elements
  float scale;
  Dropout drop;
  void* out;         // forward
  float* lse;        // forward: written or null; backward: read
  const void* dout;  // backward
  void* dqkv;        // backward
};

constexpr int64_t kPanel = 32;
constexpr int64_t kMaxAttentionLength = 768;
constexpr int64_t kMaxHeadDim = 256;
constexpr int kMaxPasses = 256;  // passes of 256 words: 65,536 floats of k

struct Table {
  const char* name;
  int64_t (*packed_words)(DType compute, int64_t k, int64_t n);
  // src(k, n) = src[k * stride_k + n * stride_n]
  void (*pack)(DType compute, DType source, const void* src, int64_t k, int64_t n, int64_t stride_k, int64_t stride_n,
               uint32_t* words);
  void (*linear_forward)(const LinearForward&, Parallel);
  void (*linear_backward)(const LinearBackward&, Parallel);
  void (*bottleneck_forward)(const BottleneckForward&, Parallel);
  void (*bottleneck_backward)(const BottleneckBackward&, Parallel);
  void (*add_norm_forward)(const AddNormForward&, Parallel);
  void (*add_norm_backward)(const AddNormBackward&, Parallel);
  void (*drop)(const Drop&, Parallel);
  void (*attention_forward)(const Attention&, Parallel);
  void (*attention_backward)(const Attention&, Parallel);
};

// One a file isa_*.cpp; each may be called only where supported(name) says so.
extern const Table table_portable, table_avx2, table_avx512, table_avx512_bf16, table_amx, table_amx_emulated;

}  // namespace fastadapt::cpu

// What the host side launches: plain structures, no header of torch's or CUDA's.
#pragma once
#include <cstdint>

#include "cuda/number.h"

namespace fastadapt::cuda {

// -- merging ------------------------------------------------------------------------------------------------------

// scale * B A; b is [rows, rank], a [rank, cols]. A null `a`: none.
struct Update {
  const void* a;
  const void* b;
  int64_t rank;
  float scale;
  Type a_type, b_type;
};

struct MergeEntry {
  int32_t index;  // flat, in the matrix
  uint32_t bits;
};

// One matrix: `out` is taken out of it, then `in` put in.
struct MergeMatrix {
  void* w;
  int64_t rows, cols;
  int64_t first_tile;
  int64_t across;  // tiles side by side
  Update out, in;
  // The way back of `out`: its codes and list, or a copy of the matrix, or neither (it rounds).
  const int8_t* old_codes;
  const void* old_copy;
  const int32_t* old_index;
  const void* old_bits;
  int64_t old_count;
  // The way back of `in`: null where it is to round. Tile i lists at entries + region + i * capacity.
  int8_t* codes;
  int64_t region;
  int64_t capacity;
  int64_t list;  // where the matrix's list begins in MergeCollect
  bool aligned;  // rows of all of these start at multiples of 16 bytes (of codes: 8)
};

enum class MergeMode : int32_t {
  check,   // only fills broken and counts
  change,  // changes the tiles whose results are finite. What a tile can't list in its room stays without `in`.
  undo,    // of tiles that a change with this `counts` and `broken` changed: `out` with what it listed, then `in`
};

struct MergeArgs {
  const MergeMatrix* matrices;
  int64_t count, first, tiles;  // the matrices, the first tile and how many of them
  MergeMode mode;
  int32_t* counts;  // of a tile: codes that don't fit a byte
  int32_t* broken;  // of a tile: 1 where a result is not finite
  MergeEntry* entries;
};

// Of every matrix; starts [tiles] are where a tile's part of the list begins within the matrix's, in order of tiles.
struct MergeTotals {
  int64_t listed, broken, largest, deferred;
};
struct MergeSummary {
  const MergeMatrix* matrices;
  int64_t count;
  const int32_t* counts;
  const int32_t* broken;
  int64_t tiles;
  MergeTotals* totals;
  int64_t* starts;
};

// The lists of all matrices one behind the other, each ascending.
struct MergeCollect {
  const MergeMatrix* matrices;
  int64_t count, first, tiles;
  const int32_t* counts;
  const int64_t* starts;
  const MergeEntry* entries;
  int32_t* index;
  void* bits;
};

constexpr int kMergeRows = 4;        // of a tile
constexpr int kMergeMostThreads = 128;
constexpr int kMergeRankStep = 64;   // ranks whose factors lie in shared memory at once
constexpr int kMergeSharedBytes = kMergeRankStep * kMergeRows * 4;
inline int64_t merge_tile_columns(Type type, int threads) { return threads * (type == Type::f32 ? 4 : 8); }

// -- few rows -----------------------------------------------------------------------------------------------------

// fastadapt/ops/bottleneck.py; all of x, residual, y, z, s, matrices and biases in the compute type.
struct BottleneckArgs {
  const void *x, *w_down, *b_down, *w_up, *b_up, *scale_vector, *residual, *norm_weight, *norm_bias;
  void *y, *z, *s;  // z and s null where they aren't kept
  int64_t rows, hidden, width;
  Type vector_type, weight_type, bias_type;  // of scale_vector and the LayerNorm's parameters
  Activation activation;
  float scale, eps;
  bool skip, x_aligned, down_aligned, up_aligned;
  Dropout dropout;
};

// fastadapt/ops/norm.py
struct AddNormArgs {
  const void *x, *residual, *norm_weight, *norm_bias;
  void *y, *s;
  int64_t rows, hidden;
  Type weight_type, bias_type;
  float eps;
  bool x_aligned;
  Dropout dropout;
};

constexpr int kFewThreads = 256;
constexpr int kFewMostRows = 4;            // of a block
constexpr int64_t kFewSharedBytes = 99 << 10;  // that a block may take on every GPU from compute capability 8.0 on
constexpr int kPieceBytes = 128;           // of a matrix's row, that a thread multiplies at a time
constexpr int kStageBytes = kFewThreads * (kPieceBytes + 16);

inline int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t padded_hidden(int64_t hidden) { return rounded_up(hidden, 256); }
inline int64_t padded_width(int64_t width) { return rounded_up(width, 64); }
inline int64_t bottleneck_shared_bytes(int64_t hidden, int64_t width, int rows) {
  return rows * 4 * (padded_hidden(hidden) + padded_width(width)) + kStageBytes;
}
inline int64_t add_norm_shared_bytes(int64_t hidden, int rows) {
  return rows * 4 * (padded_hidden(hidden) + kFewThreads + 16);
}

// -- launches -----------------------------------------------------------------------------------------------------

// On a GPU, or emulated. `stream` is a cudaStream_t; each returns null or what went wrong.
struct Launcher {
  const char* (*remerge)(const MergeArgs&, Type, int threads, void* stream);
  const char* (*summarise)(const MergeSummary&, void* stream);
  const char* (*collect)(const MergeCollect&, Type, void* stream);
  const char* (*bottleneck)(const BottleneckArgs&, Type, int rows_a_block, void* stream);
  const char* (*add_norm)(const AddNormArgs&, Type, int rows_a_block, void* stream);
  int (*processors)();  // of the current device
};
const Launcher& emulated_launcher();
#if defined(FASTADAPT_CUDA)
const Launcher& gpu_launcher();
#endif
void emulate_backwards(bool backwards);  // the order in which the emulation runs a block's threads

}  // namespace fastadapt::cuda

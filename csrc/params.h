// Arguments of the library's entry points: one struct per kernel, the shape beside each pointer, strides in elements.
//
// Python fills the same structs through ctypes, so every member has a fixed size, padding is explicit, and the total size is
// asserted.
#pragma once
#include <stdint.h>

/// Element types of tensor arguments.
enum RfDtype { RF_FLOAT32 = 0, RF_FLOAT16 = 1, RF_BFLOAT16 = 2 };

/// Strides of a (B, S, H, D) tensor whose last dim is contiguous, or of a (B, H, S) tensor.
struct RfStrides {
  int64_t batch;
  int64_t seq;
  int64_t head;
};

/// (out, lse) <- merge((out, lse), (out_part, lse_part)), in place.
struct RfMergeParams {
  float* out;             // (B, S, H, D)
  float* lse;             // (B, H, S), natural log; -inf marks a row that saw nothing
  const void* out_part;   // (B, S, H, D), of type out_part_dtype
  const float* lse_part;  // (B, H, S)
  RfStrides out_strides;
  RfStrides lse_strides;
  RfStrides out_part_strides;
  RfStrides lse_part_strides;
  int64_t batch;
  int64_t seq;
  int32_t heads;
  int32_t head_dim;
  int32_t out_part_dtype;  // RfDtype
  int32_t reserved;
};
static_assert(sizeof(RfMergeParams) == 160, "ringflash/ops.py mirrors this struct");

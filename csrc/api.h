// The library's C ABI. Every function returns RF_OK, a negative RfError, or a positive cudaError_t; rf_error_string names all
// three. Work is only enqueued on the given stream (a cudaStream_t of the current device); nothing here synchronises or
// allocates.
#pragma once
#include "params.h"

/// Grows when a struct or a function changes its meaning; a new function beside the others leaves it alone.
#define RF_ABI_VERSION 1

#define RF_API extern "C" __attribute__((visibility("default")))

enum RfError {
  RF_OK = 0,
  RF_ERROR_NULL_POINTER = -1,
  RF_ERROR_SHAPE = -2,
  RF_ERROR_DTYPE = -3,
  RF_ERROR_ALIGNMENT = -4,
  RF_ERROR_UNSUPPORTED = -5,
};

RF_API int rf_abi_version();

/// A static string for any value that a function of this library returned.
RF_API const char* rf_error_string(int code);

/// 1 if the library holds the Hopper kernels (csrc/hopper), else 0.
RF_API int rf_has_hopper();

/// Merges the partial result (out_part, lse_part) into the running float32 (out, lse), row by row:
///   lse' = log(exp(lse) + exp(lse_part)),  out' = out exp(lse - lse') + out_part exp(lse_part - lse').
/// (0, -inf) is the unit: a side whose lse is -inf counts for nothing. The two sides must not overlap in memory.
RF_API int rf_merge(const RfMergeParams* params, void* stream);

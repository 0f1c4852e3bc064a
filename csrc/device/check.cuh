// Early returns for the entry points: a failed condition or CUDA call becomes the function's error code.
#pragma once
#include <cuda_runtime_api.h>

#include "api.h"

/// Returns `code` (an RfError) from the enclosing function unless `condition` holds.
#define RF_REQUIRE(condition, code) \
  do {                              \
    if (!(condition)) return code;  \
  } while (0)

/// Returns the cudaError_t of `call` from the enclosing function unless it succeeded.
#define RF_CUDA(call)                                                   \
  do {                                                                  \
    const cudaError_t rf_status_ = (call);                              \
    if (rf_status_ != cudaSuccess) return static_cast<int>(rf_status_); \
  } while (0)

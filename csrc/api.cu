// Entry points that need no particular architecture: version, errors, and the merge of two partial results.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "api.h"
#include "device/check.cuh"

#ifndef RF_HOPPER  // the build says whether csrc/hopper is linked
#define RF_HOPPER 0
#endif

namespace {

constexpr int kThreads = 256;
constexpr int kMaxGridY = 65535;

/// N elements loaded or stored as whole 16-byte words (or as one shorter word).
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

struct MergeWeights {
  float mine;
  float theirs;
  float lse;
};

/// Weights that sum to 1 and the merged lse. Exponents are never positive, so nothing overflows; an lse of +inf or NaN makes
/// the row NaN, as it would be in one pass over all keys.
__device__ __forceinline__ MergeWeights merge_weights(float lse, float lse_part) {
  const float larger = fmaxf(lse, lse_part);
  const float shift = isfinite(larger) ? larger : 0.f;
  const float mine = expf(lse - shift);
  const float theirs = expf(lse_part - shift);
  const float sum = mine + theirs;
  return {mine / sum, theirs / sum, shift + logf(sum)};
}

/// 2^log2_lanes adjacent lanes of one warp own a row; blockIdx.x runs over the S * H rows of a batch entry, blockIdx.y over B.
/// Memory-bound: per row 2 x 4 D bytes of the running state and one read of the part.
template <typename Part, int N>
__global__ void __launch_bounds__(kThreads) merge_kernel(const RfMergeParams p, const int log2_lanes) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads >> log2_lanes) + (threadIdx.x >> log2_lanes);
  const int lane = threadIdx.x & ((1 << log2_lanes) - 1);
  const bool inside = row < p.seq * p.heads;
  const uint32_t seq = static_cast<uint32_t>(row) / static_cast<uint32_t>(p.heads);  // the launcher holds S * H below 2^31
  const uint32_t head = static_cast<uint32_t>(row) - seq * static_cast<uint32_t>(p.heads);

  for (int64_t batch = blockIdx.y; batch < p.batch; batch += gridDim.y) {
    float* const lse_at = p.lse + batch * p.lse_strides.batch + head * p.lse_strides.head + seq * p.lse_strides.seq;
    const float lse = inside ? *lse_at : 0.f;
    const float lse_part =
        inside ? p.lse_part[batch * p.lse_part_strides.batch + head * p.lse_part_strides.head + seq * p.lse_part_strides.seq]
               : -INFINITY;
    __syncwarp();                         // all lanes of a row have read lse before its first lane overwrites it
    if (lse_part == -INFINITY) continue;  // the unit leaves the row as it is

    const MergeWeights w = merge_weights(lse, lse_part);
    if (lane == 0) *lse_at = w.lse;
    float* const out = p.out + batch * p.out_strides.batch + seq * p.out_strides.seq + head * p.out_strides.head;
    const Part* const part = static_cast<const Part*>(p.out_part) + batch * p.out_part_strides.batch +
                             seq * p.out_part_strides.seq + head * p.out_part_strides.head;
    for (int d = lane * N; d < p.head_dim; d += N << log2_lanes) {
      const auto theirs = *reinterpret_cast<const Pack<Part, N>*>(part + d);
      Pack<float, N> mine{};
      if (lse != -INFINITY) mine = *reinterpret_cast<const Pack<float, N>*>(out + d);
#pragma unroll
      for (int i = 0; i < N; ++i) mine.values[i] = mine.values[i] * w.mine + to_float(theirs.values[i]) * w.theirs;
      *reinterpret_cast<Pack<float, N>*>(out + d) = mine;
    }
  }
}

/// True if every row of a (B, S, H, D) tensor starts on a 16-byte boundary.
bool rows_aligned(const void* data, const RfStrides& strides, int64_t element_size) {
  const int64_t bits =
      reinterpret_cast<intptr_t>(data) | strides.batch * element_size | strides.seq * element_size | strides.head * element_size;
  return bits % 16 == 0;
}

template <typename Part>
int launch_merge(const RfMergeParams& p, cudaStream_t stream) {
  constexpr int kWide = 8;  // elements per lane: one 16-byte word of a 16-bit part, two of float32
  const bool wide = p.head_dim % kWide == 0 && rows_aligned(p.out, p.out_strides, sizeof(float)) &&
                    rows_aligned(p.out_part, p.out_part_strides, sizeof(Part));
  const int packs = wide ? p.head_dim / kWide : p.head_dim;
  int log2_lanes = 0;
  while (log2_lanes < 5 && (1 << log2_lanes) < packs) ++log2_lanes;

  const int64_t rows = p.seq * p.heads;
  const int64_t rows_per_block = kThreads >> log2_lanes;
  const dim3 grid(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block),
                  static_cast<unsigned>(p.batch < kMaxGridY ? p.batch : kMaxGridY));
  if (wide) {
    merge_kernel<Part, kWide><<<grid, kThreads, 0, stream>>>(p, log2_lanes);
  } else {
    merge_kernel<Part, 1><<<grid, kThreads, 0, stream>>>(p, log2_lanes);
  }
  RF_CUDA(cudaGetLastError());
  return RF_OK;
}

}  // namespace

RF_API int rf_abi_version() { return RF_ABI_VERSION; }

RF_API int rf_has_hopper() { return RF_HOPPER; }

RF_API const char* rf_error_string(int code) {
  switch (code) {
    case RF_OK:
      return "no error";
    case RF_ERROR_NULL_POINTER:
      return "a pointer is null";
    case RF_ERROR_SHAPE:
      return "a size is negative or too large";
    case RF_ERROR_DTYPE:
      return "the element type is not supported";
    case RF_ERROR_ALIGNMENT:
      return "a pointer or stride is not aligned";
    case RF_ERROR_UNSUPPORTED:
      return "the library or this device does not have the kernel";
    default:
      return code > 0 ? cudaGetErrorString(static_cast<cudaError_t>(code)) : "unknown error";
  }
}

RF_API int rf_merge(const RfMergeParams* params, void* stream) {
  RF_REQUIRE(params != nullptr, RF_ERROR_NULL_POINTER);
  const RfMergeParams& p = *params;
  RF_REQUIRE(p.batch >= 0 && p.seq >= 0 && p.heads >= 0 && p.head_dim >= 0, RF_ERROR_SHAPE);
  if (p.batch == 0 || p.seq == 0 || p.heads == 0) return RF_OK;
  RF_REQUIRE(p.seq <= INT32_MAX / p.heads, RF_ERROR_SHAPE);
  RF_REQUIRE(p.lse != nullptr && p.lse_part != nullptr, RF_ERROR_NULL_POINTER);
  RF_REQUIRE(p.head_dim == 0 || (p.out != nullptr && p.out_part != nullptr), RF_ERROR_NULL_POINTER);
  switch (p.out_part_dtype) {
    case RF_FLOAT32:
      return launch_merge<float>(p, static_cast<cudaStream_t>(stream));
    case RF_FLOAT16:
      return launch_merge<__half>(p, static_cast<cudaStream_t>(stream));
    case RF_BFLOAT16:
      return launch_merge<__nv_bfloat16>(p, static_cast<cudaStream_t>(stream));
    default:
      return RF_ERROR_DTYPE;
  }
}

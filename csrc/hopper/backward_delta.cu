// What comes before and after the backward's kernel, once per pass, bound by memory: delta = rowsum(dout * out) - dlse and zeros,
// and rounding float32 gradients to their final dtype.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../device/check.cuh"
#include "backward_api.h"
#include "overlap.cuh"

namespace ringflash {

constexpr int kDeltaThreads = 256;

template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  static __device__ float2 of(uint32_t w) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&w)); }
  static __device__ uint32_t word(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};
template <>
struct Pair<__half> {
  static __device__ float2 of(uint32_t w) { return __half22float2(*reinterpret_cast<__half2*>(&w)); }
  static __device__ uint32_t word(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};
/// Sum of the products of 16 bytes of each.
template <class T>
__device__ float dot16(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 u = Pair<T>::of(x[i]), v = Pair<T>::of(y[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}
template <>
__device__ float dot16<float>(const uint4& a, const uint4& b) {
  const float4 x = *reinterpret_cast<const float4*>(&a), y = *reinterpret_cast<const float4*>(&b);
  return fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, x.w * y.w)));
}

/// `lanes` (a power of two up to 32) neighbouring threads share a row (b, s, h); h is fastest, as in memory. Each computes kRows
/// rows, a block's worth apart, whose loads are in flight together. Blocks go from the last row to the first, and so do the
/// zeros, so that what the kernel behind this one begins with is still in L2.
template <class T, int kRows>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(const __grid_constant__ RfDeltaParams p, int lanes) {
  constexpr int kVector = 16 / sizeof(T);
  let_kernel_behind_begin();
  const uint32_t rows = p.batch * p.seq * p.heads, heads = p.heads, seq = p.seq, block = gridDim.x - 1 - blockIdx.x;
  const uint32_t each = kDeltaThreads / lanes, first = block * (kRows * each) + threadIdx.x / lanes;
  const int part = threadIdx.x % lanes;
  const T *dout[kRows], *out[kRows];
  float sum[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    const uint32_t row = min(first + r * each, rows - 1), position = row / heads;
    const int64_t h = row - position * heads, b = position / seq, s = position - position / seq * seq;
    dout[r] = static_cast<const T*>(p.dout) + b * p.dout_strides.batch + s * p.dout_strides.seq + h * p.dout_strides.head;
    out[r] = static_cast<const T*>(p.out) + b * p.out_strides.batch + s * p.out_strides.seq + h * p.out_strides.head;
  }
#pragma unroll 1
  for (int d = part * kVector; d < p.head_dim; d += lanes * kVector) {
    uint4 x[kRows], y[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      x[r] = __ldg(reinterpret_cast<const uint4*>(dout[r] + d));
      y[r] = __ldg(reinterpret_cast<const uint4*>(out[r] + d));
    }
#pragma unroll
    for (int r = 0; r < kRows; r++) sum[r] += dot16<T>(x[r], y[r]);
  }
  const int64_t share = (p.zero_vectors + gridDim.x - 1) / gridDim.x, end = min((block + 1) * share, p.zero_vectors);
  for (int64_t v = block * share + threadIdx.x; v < end; v += kDeltaThreads)
    static_cast<uint4*>(p.zeros)[v] = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int r = 0; r < kRows; r++) {
    for (int step = lanes / 2; step; step /= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], step);
    const uint32_t row = first + r * each, position = row / heads;
    if (row >= rows || part) continue;
    const int64_t h = row - position * heads, b = position / seq, s = position - position / seq * seq;
    if (p.dlse) sum[r] -= p.dlse[b * p.dlse_strides.batch + s * p.dlse_strides.seq + h * p.dlse_strides.head];
    p.delta[b * p.delta_strides.batch + s * p.delta_strides.seq + h * p.delta_strides.head] = sum[r];
  }
}

/// Each thread rounds kVectors times 8 values, a block's worth apart. Last first: those were added to last and are still in L2.
template <class T, int kVectors>
__global__ void __launch_bounds__(kDeltaThreads) round_kernel(const float4* from, uint4* to, int64_t count) {
  await_kernel_before();
  const int64_t first = static_cast<int64_t>(gridDim.x - 1 - blockIdx.x) * (kVectors * kDeltaThreads) + threadIdx.x;
  float4 x[kVectors][2];
#pragma unroll
  for (int i = 0; i < kVectors; i++)
    if (first + i * kDeltaThreads < count) {
      x[i][0] = __ldcs(from + 2 * (first + i * kDeltaThreads));
      x[i][1] = __ldcs(from + 2 * (first + i * kDeltaThreads) + 1);
    }
#pragma unroll
  for (int i = 0; i < kVectors; i++)
    if (first + i * kDeltaThreads < count)
      to[first + i * kDeltaThreads] = make_uint4(Pair<T>::word(x[i][0].x, x[i][0].y), Pair<T>::word(x[i][0].z, x[i][0].w),
                                                 Pair<T>::word(x[i][1].x, x[i][1].y), Pair<T>::word(x[i][1].z, x[i][1].w));
}

template <class T>
int launch_delta(const RfDeltaParams& p, int64_t rows, cudaStream_t stream) {
  constexpr int kRows = 4;
  const int vectors = p.head_dim * static_cast<int>(sizeof(T)) / 16;
  int lanes = 1;
  while (lanes < vectors && lanes < 32) lanes *= 2;
  const int64_t of_block = kRows * kDeltaThreads / lanes, blocks = (rows + of_block - 1) / of_block;
  delta_kernel<T, kRows><<<static_cast<unsigned>(blocks), kDeltaThreads, 0, stream>>>(p, lanes);
  RF_CUDA(cudaGetLastError());
  return RF_OK;
}

template <class T>
int launch_round(const RfRoundParams& p, cudaStream_t stream) {
  constexpr int kVectors = 4;
  const int64_t count = p.count / 8, of_block = kVectors * kDeltaThreads, blocks = (count + of_block - 1) / of_block;
  RF_REQUIRE(blocks <= INT32_MAX, RF_ERROR_SHAPE);
  return launch_overlapping(round_kernel<T, kVectors>, static_cast<unsigned>(blocks), kDeltaThreads, 0, stream,
                            reinterpret_cast<const float4*>(p.from), static_cast<uint4*>(p.to), count);
}

}  // namespace ringflash

int rf_delta(const RfDeltaParams* params, void* stream) {
  RF_REQUIRE(params, RF_ERROR_NULL_POINTER);
  const RfDeltaParams& p = *params;
  RF_REQUIRE(p.batch >= 0 && p.seq >= 0 && p.heads >= 0 && p.head_dim > 0 && p.head_dim % 8 == 0, RF_ERROR_SHAPE);
  const int64_t rows = p.batch * p.seq * p.heads;
  if (rows == 0) return RF_OK;
  RF_REQUIRE(p.dout && p.out && p.delta && (p.zeros || p.zero_vectors == 0), RF_ERROR_NULL_POINTER);
  RF_REQUIRE(rows < INT32_MAX && p.zero_vectors >= 0, RF_ERROR_SHAPE);
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.dtype == RF_BFLOAT16) return ringflash::launch_delta<__nv_bfloat16>(p, rows, s);
  if (p.dtype == RF_FLOAT16) return ringflash::launch_delta<__half>(p, rows, s);
  if (p.dtype == RF_FLOAT32) return ringflash::launch_delta<float>(p, rows, s);
  return RF_ERROR_DTYPE;
}

int rf_round(const RfRoundParams* params, void* stream) {
  RF_REQUIRE(params, RF_ERROR_NULL_POINTER);
  const RfRoundParams& p = *params;
  RF_REQUIRE(p.count >= 0 && p.count % 8 == 0, RF_ERROR_SHAPE);
  if (p.count == 0) return RF_OK;
  RF_REQUIRE(p.from && p.to, RF_ERROR_NULL_POINTER);
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.dtype == RF_BFLOAT16) return ringflash::launch_round<__nv_bfloat16>(p, s);
  if (p.dtype == RF_FLOAT16) return ringflash::launch_round<__half>(p, s);
  return RF_ERROR_DTYPE;
}

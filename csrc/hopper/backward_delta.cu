// delta = rowsum(dout * out) - dlse: once per pass, bound by memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../device/check.cuh"
#include "backward_api.h"

namespace ringflash {

constexpr int kDeltaThreads = 256;

template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  static __device__ float2 of(uint32_t w) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&w)); }
};
template <>
struct Pair<__half> {
  static __device__ float2 of(uint32_t w) { return __half22float2(*reinterpret_cast<__half2*>(&w)); }
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

/// `lanes` (a power of two up to 32) neighbouring threads share a row (b, s, h); h is fastest, as in memory.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads) delta_kernel(const RfDeltaParams p, int lanes) {
  constexpr int kVector = 16 / sizeof(T);
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x) / lanes;
  const int part = threadIdx.x % lanes;
  const bool inside = row < p.batch * p.seq * p.heads;
  const int64_t h = row % p.heads, s = row / p.heads % p.seq, b = row / p.heads / p.seq;
  float sum = 0.f;
  if (inside) {
    const T* dout = static_cast<const T*>(p.dout) + b * p.dout_strides.batch + s * p.dout_strides.seq + h * p.dout_strides.head;
    const T* out = static_cast<const T*>(p.out) + b * p.out_strides.batch + s * p.out_strides.seq + h * p.out_strides.head;
    for (int d = part * kVector; d < p.head_dim; d += lanes * kVector)
      sum += dot16<T>(__ldg(reinterpret_cast<const uint4*>(dout + d)), __ldg(reinterpret_cast<const uint4*>(out + d)));
  }
  for (int step = lanes / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (inside && part == 0) {
    if (p.dlse) sum -= p.dlse[b * p.dlse_strides.batch + s * p.dlse_strides.seq + h * p.dlse_strides.head];
    p.delta[b * p.delta_strides.batch + s * p.delta_strides.seq + h * p.delta_strides.head] = sum;
  }
}

}  // namespace ringflash

int rf_delta(const RfDeltaParams* params, void* stream) {
  RF_REQUIRE(params, RF_ERROR_NULL_POINTER);
  const RfDeltaParams& p = *params;
  RF_REQUIRE(p.batch >= 0 && p.seq >= 0 && p.heads >= 0 && p.head_dim > 0 && p.head_dim % 8 == 0, RF_ERROR_SHAPE);
  const int64_t rows = p.batch * p.seq * p.heads;
  if (rows == 0) return RF_OK;
  RF_REQUIRE(p.dout && p.out && p.delta, RF_ERROR_NULL_POINTER);
  const int vectors = p.head_dim * (p.dtype == RF_FLOAT32 ? 4 : 2) / 16;
  int lanes = 1;
  while (lanes < vectors && lanes < 32) lanes *= 2;
  const int64_t blocks = (rows * lanes + ringflash::kDeltaThreads - 1) / ringflash::kDeltaThreads;
  RF_REQUIRE(blocks <= INT32_MAX, RF_ERROR_SHAPE);
  const auto s = static_cast<cudaStream_t>(stream);
  const auto grid = static_cast<unsigned>(blocks);
  if (p.dtype == RF_BFLOAT16)
    ringflash::delta_kernel<__nv_bfloat16><<<grid, ringflash::kDeltaThreads, 0, s>>>(p, lanes);
  else if (p.dtype == RF_FLOAT16)
    ringflash::delta_kernel<__half><<<grid, ringflash::kDeltaThreads, 0, s>>>(p, lanes);
  else if (p.dtype == RF_FLOAT32)
    ringflash::delta_kernel<float><<<grid, ringflash::kDeltaThreads, 0, s>>>(p, lanes);
  else
    return RF_ERROR_DTYPE;
  RF_CUDA(cudaGetLastError());
  return RF_OK;
}

// Host side of the backward kernels: tensor maps and launch.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "../device/check.cuh"
#include "backward_api.h"
#include "backward_common.cuh"

namespace ringflash {

/// cuTensorMapEncodeTiled through the runtime, so that nothing links against libcuda. nullptr without a driver.
inline decltype(&cuTensorMapEncodeTiled) backward_map_encoder() {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) entry = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return encode;
}

/// Map of a (B, S, H, D) tensor whose box is 128 bytes of `rows` rows of one head, swizzled. Reads past the end give zeros,
/// writes and additions past the end are dropped.
inline bool backward_map(CUtensorMap* map, CUtensorMapDataType type, const void* data, const RfStrides& strides, int batch,
                         int length, int heads, int head_dim, int rows) {
  const cuuint64_t size = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  const cuuint64_t dims[4] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(length), static_cast<cuuint64_t>(heads),
                              static_cast<cuuint64_t>(batch)};
  const cuuint64_t bytes[3] = {strides.seq * size, strides.head * size, strides.batch * size};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(128 / size), static_cast<cuuint32_t>(rows), 1, 1}, step[4] = {1, 1, 1, 1};
  return backward_map_encoder()(map, type, 4, const_cast<void*>(data), dims, bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/// Everything a launch needs besides the kernel. 0 or an error code.
template <class T, class Tile>
int backward_arguments(const RfHopperBackwardParams& c, CUtensorMap (&maps)[7], BackwardParams& p) {
  constexpr CUtensorMapDataType type =
      std::is_same<T, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  RF_REQUIRE(backward_map_encoder(), RF_ERROR_UNSUPPORTED);
  RF_REQUIRE(
      backward_map(&maps[0], type, c.q, c.q_strides, c.batch, c.q_len, c.heads, c.head_dim, Tile::kRows) &&
          backward_map(&maps[1], type, c.k, c.k_strides, c.batch, c.k_len, c.kv_heads, c.head_dim, Tile::kKeys) &&
          backward_map(&maps[2], type, c.v, c.v_strides, c.batch, c.k_len, c.kv_heads, c.head_dim_v, Tile::kKeys) &&
          backward_map(&maps[3], type, c.dout, c.dout_strides, c.batch, c.q_len, c.heads, c.head_dim_v, Tile::kRows) &&
          backward_map(&maps[4], CU_TENSOR_MAP_DATA_TYPE_FLOAT32, c.dq, c.dq_strides, c.batch, c.q_len, c.heads, c.head_dim, 64),
      RF_ERROR_ALIGNMENT);
  if (!c.store || (Tile::kStoresBoxes && !c.pairs)) {  // else dk and dv are stored from registers
    const CUtensorMapDataType result = c.store ? type : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    RF_REQUIRE(backward_map(&maps[5], result, c.dk, c.dk_strides, c.batch, c.k_len, c.kv_heads, c.head_dim, 64) &&
                   backward_map(&maps[6], result, c.dv, c.dv_strides, c.batch, c.k_len, c.kv_heads, c.head_dim_v, 64),
               RF_ERROR_ALIGNMENT);
  }
  p.lse = c.lse, p.delta = c.delta, p.dq = c.dq, p.dk = c.dk, p.dv = c.dv;
  p.items = reinterpret_cast<const int4*>(c.items), p.runs = reinterpret_cast<const int4*>(c.runs);
  p.bands = reinterpret_cast<const int4*>(c.bands);
  p.visit_offsets = c.visit_offsets, p.visits = reinterpret_cast<const int2*>(c.visits), p.turns = c.turns;
  p.portions = reinterpret_cast<float4*>(c.portions), p.portions_done = c.portions_done;
  p.counter = reinterpret_cast<unsigned*>(c.counter);
  p.lse_batch_stride = c.lse_batch_stride, p.lse_head_stride = c.lse_head_stride;
  p.delta_batch_stride = c.delta_batch_stride, p.delta_head_stride = c.delta_head_stride;
  p.dq_batch_stride = c.dq_strides.batch, p.dq_seq_stride = c.dq_strides.seq, p.dq_head_stride = c.dq_strides.head;
  p.dk_batch_stride = c.dk_strides.batch, p.dk_seq_stride = c.dk_strides.seq, p.dk_head_stride = c.dk_strides.head;
  p.dv_batch_stride = c.dv_strides.batch, p.dv_seq_stride = c.dv_strides.seq, p.dv_head_stride = c.dv_strides.head;
  p.q_len = c.q_len, p.k_len = c.k_len, p.heads = c.heads, p.heads_per_kv_head = c.heads / c.kv_heads;
  p.head_dim = c.head_dim, p.head_dim_v = c.head_dim_v, p.item_count = c.item_count;
  p.q_tiles = (c.q_len + Tile::kRows - 1) / Tile::kRows;
  p.last_claim = static_cast<unsigned>(c.item_count + c.ctas - 1);
  p.store = c.store != 0;
  p.scale = c.scale;
  p.scale_log2 = (c.softcap > 0.f ? c.softcap : c.scale) * kLog2E;
  p.tanh_exponent = c.softcap > 0.f ? 2.f * kLog2E * c.scale / c.softcap : 0.f;
  p.inverse_cap = c.softcap > 0.f ? kLogE2 / c.softcap : 0.f;
  return RF_OK;
}

/// Defined by one unit per (dtype, head dim).
template <class T, class Tile>
int launch_backward(const RfHopperBackwardParams& call, cudaStream_t stream);

/// Launches `kernel` with the shared memory of `Shared`.
template <class Tile, class Shared, class Kernel>
int launch_backward_kernel(Kernel kernel, const RfHopperBackwardParams& c, const CUtensorMap (&maps)[7], const BackwardParams& p,
                           cudaStream_t stream) {
  static_assert(sizeof(Shared) <= 227 * 1024, "shared memory of a multiprocessor");
  RF_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)));
  return launch_overlapping(kernel, c.ctas * (c.pairs ? 2 : 1), Tile::kThreads, sizeof(Shared), stream, maps[0], maps[1], maps[2],
                            maps[3], maps[4], maps[5], maps[6], p);
}

}  // namespace ringflash

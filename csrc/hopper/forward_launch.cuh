// Host side of one instantiation: tensor maps and launch.
#pragma once
#include <cmath>

#include "forward.cuh"

namespace ringflash {

/// cuTensorMapEncodeTiled through the runtime, so that nothing links against libcuda. nullptr without a driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
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

/// Map of a (B, S, H, D) tensor whose box is `columns` columns of `rows` rows of one head.
/// Columns from D on read as zeros, and rows from S on; neither is written.
inline bool make_tensor_map(CUtensorMap* map, CUtensorMapDataType type, CUtensorMapSwizzle swizzle, const void* data,
                            const RfStrides& stride, int batch, int length, int heads, int head_dim, int rows, int columns) {
  const cuuint64_t bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  const cuuint64_t dims[4] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(length), static_cast<cuuint64_t>(heads),
                              static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[3] = {stride.seq * bytes, stride.head * bytes, stride.batch * bytes};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(rows), 1, 1}, step[4] = {1, 1, 1, 1};
  return tensor_map_encoder()(map, type, 4, const_cast<void*>(data), dims, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                              swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class T, class Tile>
int launch_forward(const RfHopperForwardParams& c, cudaStream_t stream) {
  constexpr CUtensorMapDataType type =
      sizeof(T) == 2 && std::is_same<T, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!tensor_map_encoder()) return RF_ERROR_UNSUPPORTED;
  if (c.batch > 0xffff || c.heads > 0xffff) return RF_ERROR_SHAPE;  // an item holds both in one word
  CUtensorMap q_map, k_map, v_map, out_map{}, acc_map{};
  const auto half = [&](CUtensorMap* map, const void* data, const RfStrides& strides, int length, int heads, int head_dim,
                        int rows) {
    return make_tensor_map(map, type, CU_TENSOR_MAP_SWIZZLE_128B, data, strides, c.batch, length, heads, head_dim, rows, 64);
  };
  if (!half(&q_map, c.q, c.q_strides, c.q_len, c.heads, c.head_dim, Tile::kRows / Tile::kQParts) ||
      !half(&k_map, c.k, c.k_strides, c.k_len, c.kv_heads, c.head_dim, Tile::kKeys) ||
      !half(&v_map, c.v, c.v_strides, c.k_len, c.kv_heads, c.head_dim_v, Tile::kKeys))
    return RF_ERROR_ALIGNMENT;
  if (c.finish && Tile::kStagedStore && !half(&out_map, c.out, c.out_strides, c.q_len, c.heads, c.head_dim_v, 16))
    return RF_ERROR_ALIGNMENT;  // one warp stores 16 rows
  if (c.carry == RF_CARRY_STATE && !make_tensor_map(&acc_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_SWIZZLE_NONE, c.acc,
                                                    c.acc_strides, c.batch, c.q_len, c.heads, c.head_dim_v, Tile::kRows, 32))
    return RF_ERROR_ALIGNMENT;
  ForwardParams p{};
  p.out = c.out, p.acc = c.acc, p.lse_in = c.carry == RF_CARRY_NOTHING ? nullptr : c.lse_in, p.lse = c.lse;
  p.items = c.items, p.runs = c.runs, p.extra = c.extra, p.counter = c.counter;
  p.out_strides = c.out_strides, p.acc_strides = c.acc_strides, p.lse_in_strides = c.lse_in_strides,
  p.lse_strides = c.lse_strides;
  p.q_tiles = c.q_tiles, p.heads = c.heads, p.heads_per_kv_head = c.heads / c.kv_heads, p.batch_heads = c.batch * c.heads;
  p.items_in_all = static_cast<uint32_t>(c.q_tiles) * p.batch_heads;
  p.heads_per_group = c.heads_per_group, p.q_len = c.q_len, p.head_dim_v = c.head_dim_v;
  p.carry = c.carry == RF_CARRY_STATE, p.finish = c.finish;
  p.scale_log2 = (c.softcap > 0.f ? c.softcap : c.scale) * kLog2e;
  p.two_log2e_scale = c.softcap > 0.f ? 2.f * kLog2e * c.scale / c.softcap : 0.f;
  const auto kernel = c.softcap > 0.f ? forward_kernel<T, Tile, true> : forward_kernel<T, Tile, false>;
  constexpr int shared = sizeof(ForwardShared<Tile>);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  kernel<<<c.ctas, Tile::kThreads, shared, stream>>>(q_map, k_map, v_map, out_map, acc_map, p);
  return cudaGetLastError();
}

}  // namespace ringflash

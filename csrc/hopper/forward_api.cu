// From a call's head dims and dtype to the compiled kernel: the one place where run time becomes compile time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "forward_api.h"
#include "traits.h"

namespace ringflash {

template <class T, class Tile>
int launch_forward(const RfHopperForwardParams& call, cudaStream_t stream);

/// Calls use(Tile) with the smallest compiled tile that holds these head dims; RF_ERROR_UNSUPPORTED if there is none.
template <class Use>
int with_tile(int head_dim, int head_dim_v, int variant, const Use& use) {
  constexpr int kNone = RF_ERROR_UNSUPPORTED;
  if (head_dim <= 0 || head_dim_v <= 0 || head_dim % 8 || head_dim_v % 8) return kNone;
  const int d = head_dim > head_dim_v ? head_dim : head_dim_v;
  if (d <= 64 && variant == 1) return use(ForwardChoice<64, 64, 1>{});
  if (variant != 0) return kNone;
  if (d <= 64) return use(ForwardChoice<64, 64>{});
  if (d <= 96) return use(ForwardChoice<96, 96>{});
  if (d <= 128) return use(ForwardChoice<128, 128>{});
  if (d <= 192 && head_dim_v <= 128) return use(ForwardChoice<192, 128>{});
  if (d <= 192) return use(ForwardChoice<192, 192>{});
  if (d <= 256) return use(ForwardChoice<256, 256>{});
  return kNone;
}

}  // namespace ringflash

int rf_hopper_forward(const RfHopperForwardParams* call, void* stream) {
  if (!call) return RF_ERROR_NULL_POINTER;
  const auto s = static_cast<cudaStream_t>(stream);
  return ringflash::with_tile(call->head_dim, call->head_dim_v, call->variant, [&](auto tile) {
    using Tile = decltype(tile);
    if (call->dtype == RF_BFLOAT16) return ringflash::launch_forward<__nv_bfloat16, Tile>(*call, s);
    if (call->dtype == RF_FLOAT16) return ringflash::launch_forward<__half, Tile>(*call, s);
    return static_cast<int>(RF_ERROR_DTYPE);
  });
}

int rf_hopper_forward_tile(int32_t head_dim, int32_t head_dim_v, int32_t variant, int32_t* rows, int32_t* keys,
                           int32_t* tile_cost, int32_t* item_cost) {
  return ringflash::with_tile(head_dim, head_dim_v, variant, [&](auto tile) {
    using Tile = decltype(tile);
    *rows = Tile::kRows, *keys = Tile::kKeys;
    *tile_cost = Tile::kCost.tile, *item_cost = Tile::kCost.item;
    return 0;
  });
}

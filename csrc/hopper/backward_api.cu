// From a call's head dims and dtype to the compiled kernel: the one place where run time becomes compile time.
#include "backward_launch.cuh"
#include "backward_tiles.h"

namespace ringflash {

/// Calls use(Tile) with the smallest compiled tile that holds these head dims.
template <class Use>
int with_backward_tile(int head_dim, int head_dim_v, const Use& use) {
  if (head_dim <= 0 || head_dim_v <= 0 || head_dim % 8 || head_dim_v % 8) return RF_ERROR_UNSUPPORTED;
  const int d = head_dim > head_dim_v ? head_dim : head_dim_v;
  if (d <= 64) return use(NarrowTile<64, 128>{});
  if (d <= 96) return use(NarrowTile<96, 64>{});
  if (d <= 128) return use(NarrowTile<128, 64>{});
  if (d <= 192 && head_dim_v <= 128) return use(Wide192V128{});
  if (d <= 192) return use(Wide192{});
  if (d <= 256) return use(Wide256{});
  return RF_ERROR_UNSUPPORTED;
}

}  // namespace ringflash

int rf_hopper_backward(const RfHopperBackwardParams* params, void* stream) {
  RF_REQUIRE(params, RF_ERROR_NULL_POINTER);
  const RfHopperBackwardParams& c = *params;
  RF_REQUIRE(c.batch > 0 && c.q_len > 0 && c.k_len > 0 && c.kv_heads > 0 && c.heads > 0 && c.heads % c.kv_heads == 0,
             RF_ERROR_SHAPE);
  RF_REQUIRE(c.item_count > 0 && c.ctas > 0, RF_ERROR_SHAPE);
  RF_REQUIRE(c.dout && c.q && c.k && c.v && c.lse && c.delta && c.dq && c.dk && c.dv, RF_ERROR_NULL_POINTER);
  RF_REQUIRE(c.items && c.runs && c.bands && c.counter && (!c.turns || (c.visit_offsets && c.visits)), RF_ERROR_NULL_POINTER);
  RF_REQUIRE(c.dtype == RF_BFLOAT16 || c.dtype == RF_FLOAT16, RF_ERROR_DTYPE);
  RF_REQUIRE(c.scale > 0.f && c.softcap >= 0.f, RF_ERROR_SHAPE);
  return ringflash::with_backward_tile(c.head_dim, c.head_dim_v, [&](auto tile) {
    using Tile = decltype(tile);
    if (c.pairs && !Tile::kPairs) return static_cast<int>(RF_ERROR_UNSUPPORTED);
    const auto s = static_cast<cudaStream_t>(stream);
    return c.dtype == RF_FLOAT16 ? ringflash::launch_backward<__half, Tile>(c, s)
                                 : ringflash::launch_backward<__nv_bfloat16, Tile>(c, s);
  });
}

int rf_hopper_backward_tile(int32_t head_dim, int32_t head_dim_v, int32_t* rows, int32_t* keys, int32_t* pairs,
                            int32_t* portion) {
  RF_REQUIRE(rows && keys && pairs && portion, RF_ERROR_NULL_POINTER);
  return ringflash::with_backward_tile(head_dim, head_dim_v, [&](auto tile) {
    *rows = decltype(tile)::kRows;
    *keys = decltype(tile)::kKeys;
    *pairs = decltype(tile)::kPairs;
    *portion = decltype(tile)::kPortion;
    return static_cast<int>(RF_OK);
  });
}

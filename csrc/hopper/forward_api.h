// C ABI of the Hopper forward, in the conventions of csrc/api.h and csrc/params.h.
#pragma once
#include "../api.h"

/// What a pass starts from.
enum RfCarry {
  RF_CARRY_NOTHING = 0,  // (0, -inf)
  RF_CARRY_STATE = 1,    // (acc, lse_in), the running result
  RF_CARRY_SINKS = 2,    // (0, lse_in): attention sinks, with strides 0 along batch and sequence
};

/// Where the rows go.
enum RfFinish {
  RF_FINISH_NONE = 0,     // all into acc, in float32
  RF_FINISH_ALL = 1,      // all into out, in `dtype`
  RF_FINISH_SETTLED = 2,  // those of items marked in the table into out, the others into acc
};

/// Attention of the Slices of one step into a running (out, lse).
struct RfHopperForwardParams {
  const void* q;         // (B, Sq, H, D) of `dtype`; q, k, v 16-byte aligned, their strides multiples of 8
  const void* k;         // (B, Sk, Hkv, D)
  const void* v;         // (B, Sk, Hkv, Dv)
  void* out;             // (B, Sq, H, Dv) like q, 16-byte aligned, strides multiples of 8; see RfFinish
  float* acc;            // (B, Sq, H, Dv) running output, 16-byte aligned, strides multiples of 4; see RfCarry, RfFinish
  const float* lse_in;   // (B, H, Sq) running log-sum-exp; read unless RF_CARRY_NOTHING
  float* lse;            // (B, H, Sq), always written; may be lse_in
  const int32_t* items;  // (q_tiles, 16) of the tile table, ringflash/kernels/tiles.py
  const int32_t* runs;   // (.., 16)
  const int32_t* extra;  // (.., 8)
  int32_t* counter;      // (2): zeros, and zeros again after the launch. Launches that may overlap need their own
  RfStrides q_strides, k_strides, v_strides, out_strides, acc_strides, lse_in_strides, lse_strides;
  int32_t batch, q_len, k_len, heads, kv_heads, head_dim, head_dim_v, q_tiles;
  int32_t dtype;            // RfDtype, one of the 16-bit ones
  int32_t carry;            // RfCarry
  int32_t finish;           // RfFinish
  int32_t heads_per_group;  // (batch, head) pairs in work at the same time: their K and V should fit the L2 cache
  int32_t ctas;             // multiprocessors to use
  float scale;              // > 0
  float softcap;            // 0: none
  int32_t variant;          // of the tile, see rf_hopper_forward_tile
};
static_assert(sizeof(RfHopperForwardParams) == 320, "ringflash/kernels/hopper.py mirrors this struct");

RF_API int rf_hopper_forward(const RfHopperForwardParams* params, void* stream);

/// The tile (rows, keys) that the tables of these head dims are made for. Some head dims have several variants, numbered from 0;
/// tile_cost and item_cost (cycles of a multiprocessor) say which is best for a table. RF_ERROR_UNSUPPORTED if there is no such
/// kernel.
RF_API int rf_hopper_forward_tile(int32_t head_dim, int32_t head_dim_v, int32_t variant, int32_t* rows, int32_t* keys,
                                  int32_t* tile_cost, int32_t* item_cost);

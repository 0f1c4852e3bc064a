// C interface of the Hopper backward: plain structs and pointers, mirrored in ringflash/kernels/hopper_backward.py.
#pragma once
#include "../api.h"

/// Gradients of one step, added into float32 dq, dk, dv. Pointers of 2-byte tensors are 16-byte aligned and their strides
/// multiples of 8 elements; those of float32 gradients are 16-byte aligned and their strides multiples of 4.
struct RfHopperBackwardParams {
  const void* dout;      // (B, Sq, H, Dv)
  const void* q;         // (B, Sq, H, D)
  const void* k;         // (B, Sk, Hkv, D)
  const void* v;         // (B, Sk, Hkv, Dv)
  const float* lse;      // (B, H, Sq) of the whole softmax, natural log; -inf: the row sees nothing anywhere; stride of S is 1
  const float* delta;    // (B, H, Sq) rowsum(dout * out) - dlse; strides of lse
  float* dq;             // (B, Sq, H, D)
  void* dk;              // (B, Sk, Hkv, D) float32 to add to, or, with `store`, of q's type to write
  void* dv;              // (B, Sk, Hkv, Dv)
  const int32_t* items;  // (item_count, 8), runs (n, 4), bands (n, 8): see ringflash/kernels/tiles_backward.py
  const int32_t* runs;
  const int32_t* bands;
  const int32_t* visit_offsets;  // (query tiles + 1), (n, 2): who visits a query tile; deterministic only, else null
  const int32_t* visits;
  int32_t* turns;          // (B, H, query tiles) zeros, with pairs (.., 2); deterministic only, else null
  float* portions;         // of divided items, rf_hopper_backward_tile says how many float32 each; null: no item is divided
  int32_t* portions_done;  // (portions, 2), or with pairs 4, zeros, zero again after the launch, as counter
  int32_t* counter;        // 1 zero; zero again after the launch. Never shared by two launches that may overlap
  struct RfStrides dout_strides, q_strides, k_strides, v_strides, dq_strides, dk_strides, dv_strides;
  int64_t lse_batch_stride, lse_head_stride, delta_batch_stride, delta_head_stride;
  int32_t batch, q_len, k_len, heads, kv_heads, head_dim, head_dim_v;
  int32_t item_count;
  int32_t dtype;  // RfDtype: RF_FLOAT16 or RF_BFLOAT16
  int32_t ctas;   // how many work at the same time: CTAs, one a multiprocessor, or pairs of them
  float scale;
  float softcap;  // 0: none
  int32_t store;  // 1: dk, dv are written; every key must be in one item only, and keys in no item are left alone
  int32_t pairs;  // 1: two CTAs share an item of twice the keys
};

/// RF_ERROR_UNSUPPORTED: no kernel for these head dims or this device; RF_ERROR_ALIGNMENT: a tensor map was refused.
RF_API int rf_hopper_backward(const struct RfHopperBackwardParams* params, void* stream);

/// The tile whose tables the kernel of these head dims wants: rows of queries, keys. pairs: 1 if two CTAs can share an item,
/// whose tables then are those of twice the keys. portion: the float32 values of a portion of an item (of a pair's, twice as
/// many) that is divided though dk and dv are written; 0 if none may be.
RF_API int rf_hopper_backward_tile(int32_t head_dim, int32_t head_dim_v, int32_t* rows, int32_t* keys, int32_t* pairs,
                                   int32_t* portion);

/// delta = rowsum(dout * out) - dlse, the row constant of the softmax gradient.
struct RfDeltaParams {
  const void* dout;   // (B, S, H, D), 16-byte aligned, strides multiples of 16 bytes; also out
  const void* out;    // (B, S, H, D)
  const float* dlse;  // (B, H, S) or null
  float* delta;       // (B, H, S)
  struct RfStrides dout_strides, out_strides, dlse_strides, delta_strides;
  int64_t batch, seq;
  int32_t heads, head_dim;  // head_dim: a multiple of 8
  int32_t dtype;            // RfDtype
  int32_t reserved;
  void* zeros;           // made zeros beside it, 16-byte aligned; may be null
  int64_t zero_vectors;  // of 16 bytes
};
RF_API int rf_delta(const struct RfDeltaParams* params, void* stream);

/// to = from, rounded: float32 gradients in their final dtype.
struct RfRoundParams {
  const float* from;  // 16-byte aligned; so is to
  void* to;
  int64_t count;  // a multiple of 8
  int32_t dtype;  // of to: RF_FLOAT16 or RF_BFLOAT16
  int32_t reserved;
};
RF_API int rf_round(const struct RfRoundParams* params, void* stream);
static_assert(sizeof(RfHopperBackwardParams) == 400 && sizeof(RfDeltaParams) == 176 && sizeof(RfRoundParams) == 32,
              "ringflash/kernels/hopper_backward.py mirrors these structs");

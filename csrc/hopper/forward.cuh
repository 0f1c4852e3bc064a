// Attention forward for sm_90a: the Slices of one step into a running (out, lse).
//
// One persistent CTA per multiprocessor; an item of work is one tile of rows of one head. Warpgroup 0 holds the producer, one
// warp: it claims items (longest first), copies Q, K and V tiles into shared memory and, for a masked tile, writes each row's
// interval of visible columns beside K. The other warpgroups own 64 rows each and never meet a Slice. Their step computes S(i) =
// Q K(i)^T beside O += P(i-1) V(i-1), so that the tensor cores work while the exponentials of S(i) are formed (FlashAttention-3,
// section 3.2); across the end of an item too: the next item's first S rides with this one's last PV. So Q must be there early:
// head dims up to 128 have two buffers of it; above, each warpgroup gives its rows of the one buffer back as soon as its last S
// is done.
//
// A running result (out, lse) is an online-softmax state (accumulator = out, max = lse, sum = 1). Continuing is loading it.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "../device/band.cuh"
#include "../device/ptx.cuh"
#include "../device/softmax.cuh"
#include "forward_api.h"
#include "traits.h"

namespace ringflash {

/// Words of a record of the tile table. An item's record holds its first run too, so that short items need one load.
namespace record {
constexpr int kQTile = 0, kTiles = 1, kRunBegin = 2, kRunEnd = 3;                        // item
constexpr int kKeyTile = 4, kKeyTileEnd = 5, kExtraBegin = 6, kExtraEnd = 7, kBand = 8;  // run; kExtraBegin < 0: full, no mask
constexpr int kMaskedTiles = 14, kSettled = 15;  // item; the masked ones come first; whether RF_FINISH_SETTLED finishes it
constexpr int kWords = 16, kExtraWords = 8;
}  // namespace record

struct ForwardParams {
  void* out;
  float* acc;
  const float* lse_in;  // nullptr: start from nothing
  float* lse;
  const int32_t *items, *runs, *extra;
  int32_t* counter;
  RfStrides out_strides, acc_strides, lse_in_strides, lse_strides;
  int q_tiles, q_len, head_dim_v;
  uint32_t heads, heads_per_kv_head, batch_heads, heads_per_group, items_in_all;
  bool carry;             // acc is read
  int finish;             // RfFinish
  float scale_log2;       // scores are multiplied by this and exponentiated to base 2
  float two_log2e_scale;  // with softcap: 2 log2(e) scale / softcap
};

__device__ __forceinline__ int64_t offset(const RfStrides& strides, int b, int row, int h) {
  return b * strides.batch + row * strides.seq + h * strides.head;
}

struct Item {
  int q_tile;           // negative: no more work
  uint32_t batch_head;  // head | batch << 16
  int tiles;            // of keys
  uint32_t flags;       // finish | masked tiles (the first ones) << 1
  __device__ __forceinline__ int masked() const { return flags >> 1; }
  __device__ __forceinline__ bool finish() const { return flags & 1; }  // into out rather than acc
};

template <class Tile>
struct __align__(1024) ForwardShared {
  static constexpr int kIntervals = 2;
  // 128-byte-swizzled panels of 64 columns: [panel][row][64]
  uint16_t q[Tile::kQStages][Tile::kPanels * Tile::kRows * 64];
  uint16_t k[Tile::kKStages][Tile::kPanels * Tile::kKeys * 64];
  uint16_t v[Tile::kVStages][Tile::kPanelsV * Tile::kKeys * 64];
  uint16_t out[Tile::kStagedStore ? Tile::kPanelsV * Tile::kRows * 64 : 8];
  Interval intervals[kIntervals][Tile::kRows];  // of masked tiles
  Item item[Tile::kQStages][Tile::kQParts];
  uint64_t q_ready[Tile::kQStages][Tile::kQParts], q_free[Tile::kQStages][Tile::kQParts];
  uint64_t k_ready[Tile::kKStages], k_free[Tile::kKStages];
  uint64_t v_ready[Tile::kVStages], v_free[Tile::kVStages];
  uint64_t intervals_ready[kIntervals], intervals_free[kIntervals];
};

/// A place in a ring of N stages and the parity of its current phase.
template <int N>
struct Ring {
  int at;
  uint32_t parity;
  __device__ __forceinline__ void advance() {
    if (++at == N) {
      at = 0;
      parity ^= 1;
    }
  }
};

// ------------------------------------------------------------------------------------------------- producer

template <class Tile>
__device__ __forceinline__ void produce(ForwardShared<Tile>& s, const CUtensorMap* q_map, const CUtensorMap* k_map,
                                        const CUtensorMap* v_map, const CUtensorMap* acc_map, const ForwardParams& p) {
  using namespace record;
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys, kPartRows = kRows / Tile::kQParts;
  constexpr bool kKeysFirst = Tile::kQStages == 1;  // of an item, while its Q waits for the one buffer
  const int lane = threadIdx.x % 32;
  Ring<Tile::kQStages> q{0, 1};
  Ring<Tile::kKStages> k{0, 1};
  Ring<Tile::kVStages> v{0, 1};
  Ring<ForwardShared<Tile>::kIntervals> masks{0, 1};
  if (lane == 0) {
    ptx::prefetch_tensor_map(q_map);
    ptx::prefetch_tensor_map(k_map);
    ptx::prefetch_tensor_map(v_map);
  }
  const auto word = [](int rec, int field) { return __shfl_sync(~0u, rec, field); };  // a record is one word per lane

  // Items in groups of heads whose K and V fit L2; in a group, all heads of the longest Q tile first.
  uint32_t index = blockIdx.x, batch_head = 0;  // unsigned: their divisions take a third of the instructions
  int rec = 0;
  const auto fetch = [&] {
    if (index >= p.items_in_all) return;
    const uint32_t per_group = p.q_tiles * p.heads_per_group, group = index / per_group, rest = index - group * per_group;
    const uint32_t heads = min(p.heads_per_group, p.batch_heads - group * p.heads_per_group), place = rest / heads;
    batch_head = group * p.heads_per_group + rest - place * heads;
    rec = lane < kWords ? __ldg(p.items + place * kWords + lane) : 0;
  };
  fetch();
  while (index < p.items_in_all) {
    const uint32_t b = batch_head / p.heads, h = batch_head - b * p.heads;
    const uint32_t kv_place = h / p.heads_per_kv_head | b << 16;
    const int q_tile = word(rec, kQTile), tiles = word(rec, kTiles), run_end = word(rec, kRunEnd), settled = word(rec, kSettled);
    const uint32_t flags = word(rec, kMaskedTiles) << 1 | (p.finish == RF_FINISH_SETTLED ? settled : p.finish);
    const auto load_k = [&](int tile) {
      ptx::mbarrier_wait(&s.k_free[k.at], k.parity);
      if (lane == 0) {
        ptx::mbarrier_arrive_expect(&s.k_ready[k.at], sizeof(s.k[0]));
#pragma unroll
        for (int c = 0; c < Tile::kPanels; c++)
          ptx::tensor_load(s.k[k.at] + c * kKeys * 64, k_map, &s.k_ready[k.at], c * 64, tile * kKeys, kv_place & 0xffff,
                           kv_place >> 16, ptx::kEvictLast);
      }
    };
    if (kKeysFirst && tiles > 0) load_k(word(rec, kKeyTile));
#pragma unroll
    for (int part = 0; part < Tile::kQParts; part++) {
      const int row = part * kPartRows;
      ptx::mbarrier_wait(&s.q_free[q.at][part], q.parity);
      if (lane == 0) {
        s.item[q.at][part] = {q_tile, h | (b << 16), tiles, flags};
        if (tiles == 0) {
          ptx::mbarrier_arrive(&s.q_ready[q.at][part]);
          continue;
        }
        ptx::mbarrier_arrive_expect(&s.q_ready[q.at][part], sizeof(s.q[0]) / Tile::kQParts);
#pragma unroll
        for (int c = 0; c < Tile::kPanels; c++)
          ptx::tensor_load(s.q[q.at] + (c * kRows + row) * 64, q_map, &s.q_ready[q.at][part], c * 64, q_tile * kRows + row, h, b,
                           ptx::kEvictFirst);
      }
    }
    if (lane == 0 && p.carry)  // the running output on its way to L2
      for (int c = 0; c < p.head_dim_v; c += 32) ptx::tensor_prefetch(acc_map, c, q_tile * kRows, h, b);
    q.advance();
    // The next item is claimed as late as its latency allows: longest first balances only what is not claimed yet (claiming at
    // the start of an item cost 4-5 % at 16k causal).
    int run = rec, left = tiles, next = 0;
    const auto claim = [&] {
      if (lane == 0) next = gridDim.x + atomicAdd(p.counter, 1);
    };
    const auto take = [&] {
      index = word(next, 0);
      fetch();
    };
    if (tiles == 0) {
      claim();
      take();
      continue;
    }
#pragma unroll 1
    for (int r = word(rec, kRunBegin); r < run_end; r++) {
      int following = 0;
      if (r + 1 < run_end && lane < kWords) following = __ldg(p.runs + (r + 1) * kWords + lane);
      const int tile_end = word(run, kKeyTileEnd), extra_begin = word(run, kExtraBegin);
#pragma unroll 1
      for (int tile = word(run, kKeyTile); tile < tile_end; tile++) {
        if (--left == 0) claim();
        if (!kKeysFirst || left != tiles - 1) load_k(tile);
        if (extra_begin >= 0) {  // masked: this lane's rows' intervals
          ptx::mbarrier_wait(&s.intervals_free[masks.at], masks.parity);
          const int q0 = word(run, kBand), q1 = word(run, kBand + 1), k0 = word(run, kBand + 2), k1 = word(run, kBand + 3),
                    lo = word(run, kBand + 4), hi = word(run, kBand + 5);
#pragma unroll 1
          for (int e = 0; e < kRows; e += 32) {
            const int i = q_tile * kRows + e + lane;
            s.intervals[masks.at][e + lane] =
                i >= q0 && i < q1 ? band_interval(i, k0, k1, lo, hi, tile * kKeys, kKeys) : Interval::of(0, 0);
          }
          const int extra_end = word(run, kExtraEnd);
#pragma unroll 1
          for (int x = extra_begin; x < extra_end; x++) {  // further Slices, of other rows
            const int4 a = __ldg(reinterpret_cast<const int4*>(p.extra + x * kExtraWords));
            const int2 c = __ldg(reinterpret_cast<const int2*>(p.extra + x * kExtraWords + 4));
#pragma unroll 1
            for (int e = lane; e < kRows; e += 32) {
              const int i = q_tile * kRows + e;
              if (i >= a.x && i < a.y) s.intervals[masks.at][e] = band_interval(i, a.z, a.w, c.x, c.y, tile * kKeys, kKeys);
            }
          }
          ptx::mbarrier_arrive(&s.intervals_ready[masks.at]);
          masks.advance();
        }
        k.advance();
        if (left == 0) take();  // under the wait for V's place
        ptx::mbarrier_wait(&s.v_free[v.at], v.parity);
        if (lane == 0) {
          ptx::mbarrier_arrive_expect(&s.v_ready[v.at], sizeof(s.v[0]));
#pragma unroll
          for (int c = 0; c < Tile::kPanelsV; c++)
            ptx::tensor_load(s.v[v.at] + c * kKeys * 64, v_map, &s.v_ready[v.at], c * 64, tile * kKeys, kv_place & 0xffff,
                             kv_place >> 16, ptx::kEvictLast);
        }
        v.advance();
      }
      run = following;
    }
  }
#pragma unroll
  for (int part = 0; part < Tile::kQParts; part++) {
    ptx::mbarrier_wait(&s.q_free[q.at][part], q.parity);
    if (lane == 0) {
      s.item[q.at][part] = {-1, 0, 0, 0};
      ptx::mbarrier_arrive(&s.q_ready[q.at][part]);
    }
  }
  if (lane == 0 && atomicAdd(p.counter + 1, 1) == gridDim.x - 1) p.counter[0] = p.counter[1] = 0;  // ready for the next launch
}

// ------------------------------------------------------------------------------------------------- consumer

template <class T, class Tile, bool kSoftcap>
__device__ __forceinline__ void consume(ForwardShared<Tile>& s, const CUtensorMap* out_map, const ForwardParams& p) {
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys;
  constexpr int kS = kKeys / 2, kP = kKeys / 4, kO = Tile::kHeadDimV / 2;  // registers of S, P, O
  constexpr int kStepsQK = Tile::kHeadDim / 16, kStepsPV = kKeys / 16;
  constexpr bool kFreeQEarly = Tile::kQStages == 1 && !Tile::kQInRegisters;  // after the last S, not after the last step
  static_assert(!(kFreeQEarly && Tile::kPingPong), "who waits for Q in its turn keeps the other warpgroup from its last S");
  using QK = ptx::Wgmma<kKeys, T>;
  using PV = ptx::Wgmma<Tile::kHeadDimV, T, false, true>;
  // By shuffle, so that ptxas knows what follows to be uniform in the warp and keeps ring indices, descriptors and loop counters
  // in uniform registers. Without, every product costs two R2UR and two additions: 50 instructions a step, 7 % of the rate.
  const int w = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
  const int lane = threadIdx.x % 32, c0 = lane % 4 * 2;
  const int local_row = w * 64 + warp * 16 + lane / 4;  // this lane's rows in the tile: local_row and + 8
  const uint32_t q_low = ptx::descriptor_low(ptx::shared_address(s.q[0]) + w * 64 * 128);
  const uint32_t k_low = ptx::descriptor_low(ptx::shared_address(s.k[0]));
  const uint32_t v_low = ptx::descriptor_low(ptx::shared_address(s.v[0]), kKeys * 128);
  const int part = Tile::kQParts > 1 ? w : 0;  // of Q: this warpgroup's
  float o[kO];
  uint32_t probabilities[kP];
  uint32_t q_fragments[Tile::kQInRegisters ? 4 * kStepsQK : 1];
  OnlineSoftmax softmax;
  Ring<Tile::kQStages> q{0, 0};
  Ring<Tile::kKStages> k{0, 0};
  Ring<Tile::kVStages> v{0, 0};
  Ring<ForwardShared<Tile>::kIntervals> masks{0, 0};

  // Turns: each warpgroup waits at its own named barrier until the one before it has issued its products.
  const int own_turn = 1 + w, next_turn = 1 + (w + 1) % Tile::kConsumers;
  const auto turn = [&] {
    if constexpr (Tile::kPingPong) ptx::barrier_sync<256>(own_turn);
  };
  const auto pass = [&] {
    if constexpr (Tile::kPingPong) ptx::barrier_arrive<256>(next_turn);
  };
  const auto wait_k = [&] { ptx::mbarrier_wait(&s.k_ready[k.at], k.parity); };
  const auto wait_v = [&] { ptx::mbarrier_wait(&s.v_ready[v.at], v.parity); };
  const auto issue_qk = [&](float (&x)[kS]) {
    uint32_t a = q_low + q.at * (sizeof(s.q[0]) / 16);
    const uint32_t b = k_low + k.at * (sizeof(s.k[0]) / 16);
    if constexpr (kFreeQEarly) asm volatile("" : "+r"(a));  // else Q's descriptors are made once, outside: more than fit UR
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kStepsQK; i++) {
      const uint64_t key = ptx::descriptor(b + (i / 4) * kKeys * 8 + (i % 4) * 2);
      if constexpr (Tile::kQInRegisters) {
        if (i == 0)
          QK::rs_first(x, q_fragments, key);
        else
          QK::rs(x, q_fragments + 4 * i, key);
      } else {
        const uint64_t query = ptx::descriptor(a + (i / 4) * kRows * 8 + (i % 4) * 2);
        if (i == 0)
          QK::ss_first(x, query, key);
        else
          QK::ss(x, query, key);
      }
    }
    ptx::wgmma_commit();
  };
  const auto issue_pv = [&] {
    const uint32_t b = v_low + v.at * (sizeof(s.v[0]) / 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kStepsPV; i++) PV::rs(o, probabilities + 4 * i, ptx::descriptor(b + i * 128));
    ptx::wgmma_commit();
  };
  const auto pack = [&](float (&x)[kS]) {
#pragma unroll
    for (int i = 0; i < kP; i++) probabilities[i] = ptx::pack<T>(x[2 * i], x[2 * i + 1]);
  };
  const auto read_intervals = [&](Interval& upper, Interval& lower) {
    ptx::mbarrier_wait(&s.intervals_ready[masks.at], masks.parity);
    upper = s.intervals[masks.at][local_row];
    lower = s.intervals[masks.at][local_row + 8];
    ptx::mbarrier_arrive(&s.intervals_free[masks.at]);
    masks.advance();
  };
  const auto free_k = [&] {
    if (lane == 0) ptx::mbarrier_arrive(&s.k_free[k.at]);
    k.advance();
  };
  const auto free_v = [&] {
    if (lane == 0) ptx::mbarrier_arrive(&s.v_free[v.at]);
    v.advance();
  };
  const auto free_q = [&] {  // by every lane, since every lane read the item
    ptx::mbarrier_arrive(&s.q_free[q.at][part]);
    q.advance();
  };
  const auto load_q = [&] {
    if constexpr (Tile::kQInRegisters) {
      const uint32_t base = ptx::shared_address(s.q[q.at]) + (w * 64 + warp * 16 + (lane & 15)) * 128;
#pragma unroll
      for (int i = 0; i < kStepsQK; i++)
        ptx::ldmatrix_x4(q_fragments + 4 * i, base + (i / 4) * kRows * 128 + ((((i % 4) * 2 + (lane >> 4)) ^ (lane & 7)) << 4));
      free_q();
    }
  };
  const auto free_q_after = [&](bool last) {  // the item's last S
    if constexpr (kFreeQEarly) ptx::mbarrier_arrive_if(last, &s.q_free[q.at][part]);
  };
  const auto leave_q = [&] {  // at the end of an item
    if constexpr (kFreeQEarly)
      q.advance();
    else if constexpr (!Tile::kQInRegisters)
      free_q();
  };
  const auto next_item = [&] {
    ptx::mbarrier_wait(&s.q_ready[q.at][part], q.parity);
    return s.item[q.at][part];
  };
  const auto scores_to_weights = [&](float (&x)[kS], bool masked, Interval upper, Interval lower) {
    if constexpr (kSoftcap) tanh_scores(x, p.two_log2e_scale);
    if (masked) mask_scores(x, upper, lower, c0);
    softmax.update(x, p.scale_log2);
  };

  const auto acc_row = [&](const Item& item, int row) {
    return p.acc + offset(p.acc_strides, item.batch_head >> 16, row, item.batch_head & 0xffff);
  };
  const auto out_row = [&](const Item& item, int row) {
    return static_cast<T*>(p.out) + offset(p.out_strides, item.batch_head >> 16, row, item.batch_head & 0xffff);
  };
  const auto lse_at = [&](const Item& item, const RfStrides& strides, int row) {
    return offset(strides, item.batch_head >> 16, row, item.batch_head & 0xffff);
  };
  // A new item starts from nothing or from the running result. Its loads are issued early, under products and softmax.
  const auto carried_lse = [&](const Item& item, float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = item.q_tile * kRows + local_row + 8 * r;
      lse[r] = p.lse_in && row < p.q_len ? p.lse_in[lse_at(item, p.lse_in_strides, row)] : -INFINITY;
    }
  };
  const auto start_statistics = [&](const float (&lse)[2]) { softmax.start_from(lse[0], lse[1], lane % 4 == 0); };
  const auto load_accumulator = [&](const Item& item) {
    if (p.carry) {
      const int row = item.q_tile * kRows + local_row + (lane & 1) * 8;
      const float* g = acc_row(item, row) + (c0 & 4);
#pragma unroll
      for (int j = 0; j < kO / 4; j++) {
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
        if (row < p.q_len && j * 8 < p.head_dim_v) x = __ldcs(reinterpret_cast<const float4*>(g + j * 8));
        o[j * 4] = x.x, o[j * 4 + 1] = x.y, o[j * 4 + 2] = x.z, o[j * 4 + 3] = x.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kO; i++) o[i] = 0.f;
    }
  };
  const auto start_accumulator = [&] {  // after the item's first softmax, which may have raised the maxima
    if (p.carry) {
      const int odd = lane & 1;
#pragma unroll
      for (int j = 0; j < kO / 4; j++) {  // 16 bytes of one row per lane -> neighbours swap halves -> accumulator layout
        const float a = __shfl_xor_sync(~0u, odd ? o[j * 4] : o[j * 4 + 2], 1);
        const float b = __shfl_xor_sync(~0u, odd ? o[j * 4 + 1] : o[j * 4 + 3], 1);
        if (odd)
          o[j * 4] = a, o[j * 4 + 1] = b;
        else
          o[j * 4 + 2] = a, o[j * 4 + 3] = b;
      }
      softmax.rescale(o);
    }
    ptx::pin(o);  // without it ptxas lets o wander between registers and moves it in every step of the main loop
  };
  // Rows that see nothing in this launch: 0 and -inf (their sink), or what was carried in.
  const auto write_empty = [&](const Item& item) {
    if (p.carry && !item.finish()) return;
    const int first = item.q_tile * kRows + w * 64 + warp * 16;  // of the warp's 16 rows
    constexpr int kBatch = 8;                                    // rows in flight
#pragma unroll 1
    for (int r = first; r < min(first + 16, p.q_len); r += kBatch) {
#pragma unroll 1
      for (int j = lane * 4; j < p.head_dim_v; j += 128) {
        float4 x[kBatch];
#pragma unroll
        for (int e = 0; e < kBatch; e++) {
          x[e] = make_float4(0.f, 0.f, 0.f, 0.f);
          if (p.carry && r + e < p.q_len) x[e] = __ldcs(reinterpret_cast<const float4*>(acc_row(item, r + e) + j));
        }
#pragma unroll
        for (int e = 0; e < kBatch; e++) {
          if (r + e >= p.q_len) continue;
          if (item.finish())
            *reinterpret_cast<uint2*>(out_row(item, r + e) + j) =
                make_uint2(ptx::pack<T>(x[e].x, x[e].y), ptx::pack<T>(x[e].z, x[e].w));
          else
            *reinterpret_cast<float4*>(acc_row(item, r + e) + j) = x[e];
        }
      }
    }
    const int row = first + lane;
    if (lane < 16 && row < p.q_len)
      p.lse[lse_at(item, p.lse_strides, row)] = p.lse_in ? p.lse_in[lse_at(item, p.lse_in_strides, row)] : -INFINITY;
  };
  const auto store_staged = [&](const Item& item, float i0, float i1) {
    const uint32_t base = ptx::shared_address(s.out) + (w * 64 + warp * 16) * 128;
    if (lane == 0) ptx::bulk_wait_read<0>();  // the item before has left
    __syncwarp();
    const int row = (lane & 7) + ((lane >> 3) & 1) * 8;
#pragma unroll
    for (int i = 0; i < kO / 8; i++)  // 16 columns
      ptx::stmatrix_x4(base + (i / 4) * kRows * 128 + row * 128 + ((((i % 4) * 2 + (lane >> 4)) ^ (lane & 7)) << 4),
                       ptx::pack<T>(o[8 * i] * i0, o[8 * i + 1] * i0), ptx::pack<T>(o[8 * i + 2] * i1, o[8 * i + 3] * i1),
                       ptx::pack<T>(o[8 * i + 4] * i0, o[8 * i + 5] * i0), ptx::pack<T>(o[8 * i + 6] * i1, o[8 * i + 7] * i1));
    ptx::fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int c = 0; c < Tile::kPanelsV; c++)
        ptx::tensor_store(out_map, s.out + c * kRows * 64 + (w * 64 + warp * 16) * 64, c * 64,
                          item.q_tile * kRows + w * 64 + warp * 16, item.batch_head & 0xffff, item.batch_head >> 16);
      ptx::bulk_commit();
    }
  };
  const auto store_direct = [&](const Item& item, float i0, float i1) {  // 4 x 4 transposes in a quad: 16 bytes a lane, 64 a row
    const int member = lane & 3, row = item.q_tile * kRows + local_row;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      T* g = out_row(item, row + 8 * r) + member * 8;
      const float inverse = r ? i1 : i0;
#pragma unroll
      for (int jj = 0; jj < kO / 16; jj++) {
        uint32_t x[4];
#pragma unroll
        for (int e = 0; e < 4; e++)
          x[e] = ptx::pack<T>(o[(jj * 4 + e) * 4 + 2 * r] * inverse, o[(jj * 4 + e) * 4 + 2 * r + 1] * inverse);
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const uint32_t y = __shfl_xor_sync(~0u, (member & 1) ? x[e] : x[e + 1], 1);
          if (member & 1)
            x[e] = y;
          else
            x[e + 1] = y;
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const uint32_t y = __shfl_xor_sync(~0u, (member & 2) ? x[e] : x[e + 2], 2);
          if (member & 2)
            x[e] = y;
          else
            x[e + 2] = y;
        }
        if (row + 8 * r < p.q_len && jj * 32 + member * 8 < p.head_dim_v)
          *reinterpret_cast<uint4*>(g + jj * 32) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  };
  const auto store_float = [&](const Item& item, float i0, float i1) {
    const int odd = lane & 1, row = item.q_tile * kRows + local_row + odd * 8;
    float* g = acc_row(item, row) + (lane & 2) * 2;
#pragma unroll
    for (int j = 0; j < kO / 4; j++) {
      const float a = o[j * 4] * i0, b = o[j * 4 + 1] * i0, c = o[j * 4 + 2] * i1, d = o[j * 4 + 3] * i1;
      const float x = __shfl_xor_sync(~0u, odd ? a : c, 1), y = __shfl_xor_sync(~0u, odd ? b : d, 1);
      if (row < p.q_len && j * 8 < p.head_dim_v)
        __stcs(reinterpret_cast<float4*>(g + j * 8), odd ? make_float4(x, y, c, d) : make_float4(a, b, x, y));
    }
  };
  const auto store = [&](const Item& item) {
    softmax.finish();
    const int row = item.q_tile * kRows + local_row;
    if (lane % 4 == 0) {
      if (row < p.q_len) p.lse[lse_at(item, p.lse_strides, row)] = softmax.lse(0);
      if (row + 8 < p.q_len) p.lse[lse_at(item, p.lse_strides, row + 8)] = softmax.lse(1);
    }
    const float i0 = softmax.inverse(0), i1 = softmax.inverse(1);
    if (!item.finish())
      store_float(item, i0, i1);
    else if constexpr (Tile::kStagedStore)
      store_staged(item, i0, i1);
    else
      store_direct(item, i0, i1);
  };

  // One step: S of tile i beside PV of tile i - 1.
  const auto step = [&](auto is_masked, bool last) {
    constexpr bool kMasked = decltype(is_masked)::value;
    float x[kS];
    Interval upper{0}, lower{0};
    wait_k();
    turn();
    issue_qk(x);
    wait_v();
    issue_pv();
    pass();
    ptx::wgmma_wait<1>();
    ptx::pin(x);
    if constexpr (kMasked) read_intervals(upper, lower);
    free_q_after(last);
    free_k();
    scores_to_weights(x, kMasked, upper, lower);
    ptx::wgmma_wait<0>();
    ptx::pin(o);
    ptx::pin(probabilities);
    free_v();
    pack(x);
    softmax.rescale(o);
  };

  if (Tile::kPingPong && w == 0) ptx::barrier_arrive<256>(own_turn);  // the first turn is warpgroup 0's
  Item item = next_item();
  while (item.q_tile >= 0) {
    if (item.tiles == 0) {
      write_empty(item);
      free_q();
      item = next_item();
      continue;
    }
    load_q();
    {
      float x[kS], lse[2];
      Interval upper{0}, lower{0};
      wait_k();
      turn();
      issue_qk(x);
      pass();
      carried_lse(item, lse);
      start_statistics(lse);
      load_accumulator(item);
      ptx::wgmma_wait<0>();
      ptx::pin(x);
      if (item.masked() > 0) read_intervals(upper, lower);
      free_q_after(item.tiles == 1);
      free_k();
      scores_to_weights(x, item.masked() > 0, upper, lower);
      pack(x);
      start_accumulator();
    }
    for (;;) {
      int i = 1;
#pragma unroll 1
      for (; i < item.masked(); i++) step(std::true_type{}, i + 1 == item.tiles);
#pragma unroll 1
      for (; i < item.tiles; i++) step(std::false_type{}, i + 1 == item.tiles);
      // The seam: the next item's first S and this one's last PV together; the store runs under the other warpgroup's products.
      // In turns, both are issued in one; else PV goes first, so that it need not wait for the next Q.
      const Item done = item;
      const auto last_pv = [&] {
        wait_v();
        issue_pv();
      };
      if constexpr (!Tile::kPingPong) last_pv();
      leave_q();
      item = next_item();
      if (item.q_tile < 0 || item.tiles == 0) {
        turn();
        if constexpr (Tile::kPingPong) last_pv();
        pass();
        ptx::wgmma_wait<0>();
        ptx::pin(o);
        ptx::pin(probabilities);
        free_v();
        store(done);
        break;
      }
      load_q();
      float x[kS], lse[2];
      Interval upper{0}, lower{0};
      carried_lse(item, lse);
      wait_k();
      turn();
      issue_qk(x);
      if constexpr (Tile::kPingPong) last_pv();
      pass();
      ptx::wgmma_wait<0>();
      ptx::pin(x);
      ptx::pin(o);
      ptx::pin(probabilities);
      if (item.masked() > 0) read_intervals(upper, lower);
      free_q_after(item.tiles == 1);
      free_k();
      free_v();
      store(done);
      start_statistics(lse);
      load_accumulator(item);
      scores_to_weights(x, item.masked() > 0, upper, lower);
      pack(x);
      start_accumulator();
    }
  }
  if (Tile::kPingPong && w == 0) ptx::barrier_sync<256>(own_turn);  // takes back the last turn
  if (Tile::kStagedStore && lane == 0) ptx::bulk_wait<0>();
}

template <class T, class Tile, bool kSoftcap>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    forward_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap out_map,
                   const __grid_constant__ CUtensorMap acc_map, const __grid_constant__ ForwardParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& s = *reinterpret_cast<ForwardShared<Tile>*>(raw);
  static_assert(sizeof(s) <= 232448, "more shared memory than a CTA can have");
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4 * Tile::kConsumers;
    for (int i = 0; i < Tile::kQStages; i++) {
      for (int part = 0; part < Tile::kQParts; part++) {
        ptx::mbarrier_init(&s.q_ready[i][part], 1);
        ptx::mbarrier_init(&s.q_free[i][part], 32 * kWarps / Tile::kQParts);
      }
    }
    for (int i = 0; i < Tile::kKStages; i++) {
      ptx::mbarrier_init(&s.k_ready[i], 1);
      ptx::mbarrier_init(&s.k_free[i], kWarps);
    }
    for (int i = 0; i < Tile::kVStages; i++) {
      ptx::mbarrier_init(&s.v_ready[i], 1);
      ptx::mbarrier_init(&s.v_free[i], kWarps);
    }
    for (int i = 0; i < s.kIntervals; i++) {
      ptx::mbarrier_init(&s.intervals_ready[i], 32);
      ptx::mbarrier_init(&s.intervals_free[i], 32 * kWarps);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (__shfl_sync(~0u, threadIdx.x / 128, 0) == 0) {
    ptx::registers_lower<Tile::kProducerRegisters>();
    if (threadIdx.x < 32) produce<Tile>(s, &q_map, &k_map, &v_map, &acc_map, p);
  } else {
    ptx::registers_raise<Tile::kConsumerRegisters>();
    consume<T, Tile, kSoftcap>(s, &out_map, p);
  }
}

}  // namespace ringflash

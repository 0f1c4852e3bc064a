// Backward for head dim 128 by pairs of CTAs (clusters of two), for long sequences.
//
// A pair takes items of 256 keys. Each CTA owns 128 of them, as a CTA of backward_narrow.cuh does, and both walk over the same
// query tiles at the same time. Consumers send their dS to the other CTA, too, so that each CTA makes one panel (64 columns) of
// dQ over all 256 keys: half the additions to global memory, which bound the other kernel. Warpgroups as there; of the producers,
// warps 1 and 3 send dS. In deterministic mode they add dQ's boxes and end turns, and consumers send. K has one buffer, which
// makes room for a third stage of dO: an item is long.
//
// Barriers of CTA c (boxes: see backward_common.cuh); c' is the other one, h a consumer (0, 1), i a step, j an item.
//   q_full, q_free, dout_full, dout_free, k_full, v_full, v_free, step_told: as in backward_narrow.cuh
//   k_free        12: consumer and dQ warps, after the last step of j
//   ds_full[h]    4: the warps of consumer h wrote their half of dS(i)
//   ds_free[h]    8: dQ warps of c and c', after their products with half h of dS(i) of both CTAs. So c' has what was sent to it
//                 and has used it: ds and, in c', ds_other may be written again
//   sent_full[h]  1 and 8 KB: sender h of c announces, the copy by sender h of c' completes. Announced for step i when half h of
//                 dS(i) is written, thus after ds_free(i - 1), for which dQ of c saw the phase of i - 1 complete: never two
//                 announcements in one
//   claimed[n]    of CTA 1, a ring of 8, 1 and 4 bytes: its producer announces, the leader's n-th claim completes. The leader
//                 makes it in step n - 1 or later, when its consumers are done with step n - 5, for which they waited for
//                 ds_free(n - 6). So CTA 1 has told step n - 6, and before that read claim n - 5
// Consumers wait in step i for tiles of step i (loaded once the consumers of c are done with step i - 3) and for dQ of step i -
// 1; dQ(i) waits for dS(i) of all four consumers: every edge leads to an earlier step or to an earlier point of the same step, so
// nobody waits in a circle. A load of item j that waits for k_free or v_free of j - 1 has all loads of j - 1 behind it, in both
// CTAs. At the end a cluster barrier keeps shared memory alive until the last remote arrival.
#pragma once
#include "backward_common.cuh"
#include "backward_tiles.h"

namespace ringflash {

template <class Tile>
struct __align__(1024) PairShared {
  static constexpr int kStages = 3, kClaims = 8;
  uint16_t k[2][Tile::kKeys * 64];     // [panel][key][64], 128-byte swizzle; so are all below
  uint16_t k_other[Tile::kKeys * 64];  // the other CTA's keys, this CTA's panel of dQ
  uint16_t v[2][Tile::kKeys * 64];
  uint16_t q[kStages][2][Tile::kRows * 64];  // [stage][panel][query][64]
  uint16_t dout[kStages][2][Tile::kRows * 64];
  uint16_t ds[2][Tile::kRows * 64];        // [half of this CTA's keys][query][64 keys]
  uint16_t ds_other[2][Tile::kRows * 64];  // of the other CTA's
  float dq[1][2][64 * 32];                 // [32 columns of d][query][32]
  Statistics<Tile::kRows, Tile::kKeys> statistics[kStages];
  Step steps[kStepRing];
  Walk walk;
  int told[2];  // of the consumers, in gather_portions
  int claims[kClaims];
  uint64_t claimed[kClaims];
  uint64_t k_full, k_free, v_full, v_free;
  uint64_t q_full[kStages], q_free[kStages], dout_full[kStages], dout_free[kStages];
  uint64_t ds_full[2], ds_free[2], sent_full[2];
  uint64_t step_told[kStepRing];
  Boxes<1> boxes;
};

/// The next item of the pair: the leader claims it and tells the other. n: how many claims came before.
template <class Shared>
__device__ __forceinline__ int claim_for_pair(const BackwardParams& p, Shared& s, int n) {
  const int slot = n % Shared::kClaims;
  if (ptx::cluster_rank() == 0) {
    const int item = claim_item(p);
    ptx::store_remote(ptx::cluster_address(ptx::shared_address(&s.claims[slot]), 1), item,
                      ptx::cluster_address(ptx::shared_address(&s.claimed[slot]), 1));
    return item;
  }
  ptx::mbarrier_arrive_expect(&s.claimed[slot], sizeof(int));
  ptx::mbarrier_wait(&s.claimed[slot], n / Shared::kClaims & 1);
  return *const_cast<volatile int*>(&s.claims[slot]);
}

/// As produce_tiles, with half of the pair's keys and, of the other half, this CTA's panel of dQ.
template <class Tile, class Shared>
__device__ __forceinline__ void produce_pair_tiles(const BackwardParams& p, Shared& s, const CUtensorMap* q_map,
                                                   const CUtensorMap* k_map, const CUtensorMap* v_map,
                                                   const CUtensorMap* dout_map) {
  constexpr int kKeys = Tile::kKeys;
  ptx::prefetch_tensor_map(q_map), ptx::prefetch_tensor_map(k_map);
  ptx::prefetch_tensor_map(v_map), ptx::prefetch_tensor_map(dout_map);
  const auto claim = [&](int n) { return claim_for_pair(p, s, n); };
  const auto share = [] { return static_cast<int>(ptx::cluster_rank()) * kKeys; };  // read again: 24 registers
  walk_items(p, s, Tile::kRows, claim, share, [&](int i, const Step& step) {
    const int rank = ptx::cluster_rank();
    const int stage = i % Shared::kStages, free = (i / Shared::kStages & 1) ^ 1;
    ptx::mbarrier_wait(&s.q_free[stage], free);
    ptx::mbarrier_arrive_expect(&s.q_full[stage], sizeof(s.q[0]));
#pragma unroll 1
    for (int c = 0; c < 2; c++)
      ptx::tensor_load(s.q[stage][c], q_map, &s.q_full[stage], c * 64, step.first_row, step.head, step.batch, ptx::kEvictLast);
    if (step.flags & kFirst) {
      ptx::mbarrier_wait(&s.k_free, (s.walk.items & 1) ^ 1);
      ptx::mbarrier_arrive_expect(&s.k_full, sizeof(s.k) + sizeof(s.k_other));
#pragma unroll 1
      for (int c = 0; c < 2; c++)
        ptx::tensor_load(s.k[c], k_map, &s.k_full, c * 64, step.first_key, step.kv_head, step.batch, ptx::kEvictFirst);
      ptx::tensor_load(s.k_other, k_map, &s.k_full, rank * 64, step.first_key + (1 - 2 * rank) * kKeys, step.kv_head, step.batch,
                       ptx::kEvictFirst);
    }
    ptx::mbarrier_wait(&s.dout_free[stage], free);
    ptx::mbarrier_arrive_expect(&s.dout_full[stage], sizeof(s.dout[0]));
#pragma unroll 1
    for (int c = 0; c < 2; c++)
      ptx::tensor_load(s.dout[stage][c], dout_map, &s.dout_full[stage], c * 64, step.first_row, step.head, step.batch,
                       ptx::kEvictLast);
    if (step.flags & kFirst) {
      ptx::mbarrier_wait(&s.v_free, (s.walk.items & 1) ^ 1);
      ptx::mbarrier_arrive_expect(&s.v_full, sizeof(s.v));
#pragma unroll 1
      for (int c = 0; c < 2; c++)
        ptx::tensor_load(s.v[c], v_map, &s.v_full, c * 64, step.first_key, step.kv_head, step.batch, ptx::kEvictFirst);
    }
  });
}

/// Sends consumer h's half of a dS to the other CTA and announces what comes from there. By one thread.
template <class Shared>
__device__ __forceinline__ void send_half(Shared& s, int h) {
  const uint32_t other = ptx::cluster_rank() ^ 1;
  ptx::mbarrier_arrive_expect(&s.sent_full[h], sizeof(s.ds_other[h]));
  ptx::bulk_send(ptx::cluster_address(ptx::shared_address(s.ds_other[h]), other), s.ds[h], sizeof(s.ds_other[h]),
                 ptx::cluster_address(ptx::shared_address(&s.sent_full[h]), other));
}
/// That of each step.
template <class Shared>
__device__ __forceinline__ void send_halves(Shared& s, int h) {
#pragma unroll 1
  for (int i = 0;; i++) {
    ptx::mbarrier_wait(&s.step_told[i % kStepRing], (i / kStepRing) & 1);
    if (s.steps[i % kStepRing].flags & kStop) break;
    ptx::mbarrier_wait(&s.ds_full[h], i & 1);
    send_half(s, h);
  }
}

/// The warpgroup of dQ: this CTA's panel of dQ^T = K^T dS^T over the keys of both.
template <class T, class Tile, bool Deterministic, class Shared>
__device__ __forceinline__ void make_pair_dq(const BackwardParams& p, Shared& s, const CUtensorMap* dq_map, int thread) {
  using Product = ptx::Wgmma<64, T, true, false>;
  constexpr int kSteps = 64 / 16;
  const int rank = __shfl_sync(~0u, ptx::cluster_rank(), 0);
  const int warp = thread / 32, lane = thread % 32, c0 = (lane % 4) * 2;
  const uint32_t ds_low = ptx::descriptor_low(ptx::shared_offset(s.ds));
  const uint32_t other_low = ptx::descriptor_low(ptx::shared_offset(s.ds_other));
  const uint32_t k_low = ptx::descriptor_low(ptx::shared_offset(s.k[rank]));
  const uint32_t k_other_low = ptx::descriptor_low(ptx::shared_offset(s.k_other));
  const uint32_t peer_free = ptx::cluster_address(ptx::shared_address(s.ds_free), rank ^ 1);
  // As in make_dq: d = 16 warp + lane / 4 (+ 8) and queries 8 j + c0 (+ 1), free of bank conflicts.
  const uint32_t box = ptx::shared_address(s.dq) + (warp >> 1) * 64 * 128 + c0 * 128 +
                       ((((warp & 1) * 4 + (lane >> 4)) ^ c0) << 4) + ((lane >> 2) & 3) * 4;
  int items = 0;
#pragma unroll 1
  for (int i = 0;; i++) {
    const Step& step = s.steps[i % kStepRing];
    ptx::mbarrier_wait(&s.step_told[i % kStepRing], (i / kStepRing) & 1);
    const int flags = step.flags;
    if (flags & kStop) break;
    if (flags & kFirst) ptx::mbarrier_wait(&s.k_full, items++ & 1);
    float x[32];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      ptx::mbarrier_wait(&s.ds_full[h], i & 1);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSteps; k++) {
        const uint64_t a = ptx::descriptor(k_low + (h * kSteps + k) * 128),
                       b = ptx::descriptor(ds_low + h * Tile::kRows * 8 + k * 2);
        if (h == 0 && k == 0)
          Product::ss_first(x, a, b);
        else
          Product::ss(x, a, b);
      }
      ptx::wgmma_commit();
      ptx::mbarrier_wait(&s.sent_full[h], i & 1);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < kSteps; k++)
        Product::ss(x, ptx::descriptor(k_other_low + (h * kSteps + k) * 128), ptx::descriptor(other_low + h * 64 * 8 + k * 2));
      ptx::wgmma_commit();
      if (!Deterministic && h == 1) {
        if (thread == 0) ptx::bulk_wait_read<0>();
        ptx::barrier_sync<3, 128>();  // the boxes were read
      }
      ptx::wgmma_wait<0>();
      ptx::pin(x);
      if (lane == 0) {
        ptx::mbarrier_arrive(&s.ds_free[h]);
        ptx::mbarrier_arrive_remote(peer_free + h * 8);
      }
    }
    if (lane == 0 && (flags & kLast)) ptx::mbarrier_arrive(&s.k_free);
    if (Deterministic) ptx::mbarrier_wait(s.boxes.free, (i & 1) ^ 1);
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"((box ^ ((e & 1) * 16) ^ ((e >> 1) * 32)) + (e & 1) * 128 + j * 1024),
                     "f"(x[j * 4 + e])
                     : "memory");
    ptx::fence_async_proxy();
    if (Deterministic) {
      ptx::mbarrier_arrive(s.boxes.full);
      continue;
    }
    ptx::barrier_sync<2, 128>();
    if (thread == 0) {  // who alone reads the record so late: it arrives at ds_free of the next step itself
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int column = rank * 64 + c * 32;
        if (column < p.head_dim) ptx::tensor_reduce_add(dq_map, s.dq[0][c], column, step.first_row, step.head, step.batch);
      }
      ptx::bulk_commit();
    }
  }
  if (!Deterministic && thread == 0) ptx::bulk_wait<0>();
}

template <class T, class Tile, bool Softcap, bool Deterministic>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(Tile::kThreads, 1)
    backward_pair(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dout_map,
                  const __grid_constant__ CUtensorMap dq_map, const __grid_constant__ CUtensorMap dk_map,
                  const __grid_constant__ CUtensorMap dv_map, const __grid_constant__ BackwardParams p) {
  using Shared = PairShared<Tile>;
  constexpr int kD = Tile::kHeadDim, kRows = Tile::kRows, kKeys = Tile::kKeys;
  static_assert(Tile::kPanels * kRows == 128 && kKeys == 128, "64 x 64 of dQ for each CTA of the pair");
  extern __shared__ __align__(1024) uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.k_full, 1), ptx::mbarrier_init(&s.k_free, 12);
    ptx::mbarrier_init(&s.v_full, 1), ptx::mbarrier_init(&s.v_free, 8);
    for (int i = 0; i < Shared::kStages; i++) {
      ptx::mbarrier_init(&s.q_full[i], 33), ptx::mbarrier_init(&s.q_free[i], 256);
      ptx::mbarrier_init(&s.dout_full[i], 1), ptx::mbarrier_init(&s.dout_free[i], 8);
    }
    for (int h = 0; h < 2; h++)
      ptx::mbarrier_init(&s.ds_full[h], 4), ptx::mbarrier_init(&s.ds_free[h], 8), ptx::mbarrier_init(&s.sent_full[h], 1);
    for (int i = 0; i < Shared::kClaims; i++) ptx::mbarrier_init(&s.claimed[i], 1);
    for (int i = 0; i < kStepRing; i++) ptx::mbarrier_init(&s.step_told[i], 1);
    if (Deterministic) s.boxes.init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  ptx::cluster_sync();
  await_kernel_before();

  if (warpgroup == 0) {
    ptx::registers_lower<Tile::kProducerRegisters>();
    if (thread == 0) {
      produce_pair_tiles<Tile>(p, s, &q_map, &k_map, &v_map, &dout_map);
    } else if (thread / 32 == 2) {
      produce_statistics<kRows, kKeys, 2 * kKeys, Deterministic>(p, s, lane);
    } else if (Deterministic && thread == 96) {
      add_boxes<kRows, Tile::kPanels, 2, Deterministic>(p, s, &dq_map);
    } else if (Deterministic && thread == 32) {
      pass_turns_on(p, s);
    } else if (!Deterministic && (thread == 32 || thread == 96)) {
      send_halves(s, thread / 64);
    }
  } else if (warpgroup == 3) {
    ptx::registers_lower<Tile::kDqRegisters>();
    make_pair_dq<T, Tile, Deterministic>(p, s, &dq_map, thread);
  } else {
    ptx::registers_raise<Tile::kConsumerRegisters>();
    using Scores = ptx::Wgmma<kRows, T>;
    using Gradient = ptx::Wgmma<kD, T, false, true>;
    constexpr uint32_t kStage = sizeof(s.q[0]) / 16;  // in descriptor units
    const int w = __shfl_sync(~0u, warpgroup - 1, 0), warp = __shfl_sync(~0u, thread / 32, 0);
    const uint32_t k_low = ptx::descriptor_low(ptx::shared_offset(s.k) + w * 64 * 128);
    const uint32_t v_low = ptx::descriptor_low(ptx::shared_offset(s.v) + w * 64 * 128);
    const uint32_t q_low = ptx::descriptor_low(ptx::shared_offset(s.q), kRows * 128);
    const uint32_t dout_low = ptx::descriptor_low(ptx::shared_offset(s.dout), kRows * 128);
    const int c0 = (lane % 4) * 2, key = w * 64 + warp * 16 + lane / 4;
    const uint32_t ds_store = ptx::shared_address(s.ds[w]) + ((lane & 7) + ((lane >> 4) & 1) * 8) * 128 +
                              (((warp * 2 + ((lane >> 3) & 1)) ^ (lane & 7)) << 4);
    float dk[kD / 2], dv[kD / 2];
    float x[kRows / 2];     // S^T, then P^T, then dP^T
    uint32_t a[kRows / 4];  // P^T, then dS^T: A operands

    const auto issue_scores = [&](float (&d)[kRows / 2], uint32_t left, uint32_t right, int stage) {  // d = left right^T
      const uint32_t r = right + stage * kStage;
      Scores::ss_first(d, ptx::descriptor(left), ptx::descriptor(r));
#pragma unroll
      for (int k = 1; k < kD / 16; k++)
        Scores::ss(d, ptx::descriptor(left + (k / 4) * kKeys * 8 + (k % 4) * 2),
                   ptx::descriptor(r + (k / 4) * kRows * 8 + (k % 4) * 2));
      ptx::wgmma_commit();
    };
    const auto issue_gradient = [&](float (&d)[kD / 2], const uint32_t (&left)[kRows / 4], uint32_t right,
                                    int stage) {  // d += left right
#pragma unroll
      for (int k = 0; k < kRows / 16; k++) Gradient::rs(d, left + 4 * k, ptx::descriptor(right + stage * kStage + k * 128));
      ptx::wgmma_commit();
    };
    const auto sync_consumer = [&] {
      if (w == 0)
        ptx::barrier_sync<4, 128>();
      else
        ptx::barrier_sync<5, 128>();
    };

    int i = 0, stage = 0, phase = 0;
    ptx::mbarrier_wait(&s.step_told[0], 0);
    int flags = s.steps[0].flags, bands = s.steps[0].band_count & 0xffff;
#pragma unroll 1
    for (int items = 0; !(flags & kStop); items++) {
      ptx::mbarrier_wait(&s.k_full, items & 1);
      ptx::mbarrier_wait(&s.q_full[stage], phase);
      ptx::wgmma_fence();
      issue_scores(x, k_low, q_low, stage);
#pragma unroll
      for (int n = 0; n < kD / 2; n++) dk[n] = dv[n] = 0.f;
      if (thread == 0) ptx::bulk_wait_read<0>();  // the boxes of the item before lie where dS goes
      sync_consumer();
      ptx::mbarrier_wait(&s.v_full, items & 1);
      ptx::wgmma_wait<0>();
      ptx::pin(x);
      int last;
#pragma unroll 1
      do {
        const auto& rows = s.statistics[stage];
        if (Softcap) cap_scores(x, p);
        if (bands) mask_scores(x, rows.seen(key), rows.seen(key + 8), c0);
        exponentiate<Softcap>(x, rows.negative_lse + c0, p.scale_log2);
        ptx::pin(x);
        ptx::wgmma_wait<0>();  // dK of the step before
        ptx::pin(a);
        if (!(flags & kFirst)) ptx::mbarrier_arrive(&s.q_free[stage ? stage - 1 : Shared::kStages - 1]);
#pragma unroll
        for (int k = 0; k < kRows / 4; k++) a[k] = ptx::pack<T>(x[2 * k], x[2 * k + 1]);
        ptx::mbarrier_wait(&s.dout_full[stage], phase);
        ptx::wgmma_fence();
        issue_scores(x, v_low, dout_low, stage);
        issue_gradient(dv, a, dout_low, stage);
        const int at = (i + 1) % kStepRing;
        last = flags & kLast;
        ptx::mbarrier_wait(&s.step_told[at], ((i + 1) / kStepRing) & 1);
        const int next_flags = s.steps[at].flags;
        bands = s.steps[at].band_count & 0xffff;
        ptx::wgmma_wait<1>();  // dP
        ptx::pin(x);
        subtract_delta(x, rows.negative_delta + c0, p.scale);
        ptx::wgmma_wait<0>();  // dV
        ptx::pin(a);
        if (lane == 0) ptx::mbarrier_arrive(&s.dout_free[stage]);
        score_gradients<T, Softcap>(a, x, rows.negative_lse + c0, p);
        ptx::mbarrier_wait(&s.ds_free[w], (i & 1) ^ 1);
#pragma unroll
        for (int k = 0; k < kRows / 16; k++)
          ptx::stmatrix_x4_trans(ds_store + k * 16 * 128, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3]);
        ptx::fence_async_proxy();  // before the products: dS is waited for in both CTAs (behind them: 1-2 % slower)
        if (Deterministic) {       // the producers that would send keep the turns
          sync_consumer();
          if (thread == 0) send_half(s, w);
        } else {
          __syncwarp();
        }
        if (lane == 0) ptx::mbarrier_arrive(&s.ds_full[w]);
        // S of the next step; the last step of an item repeats its own, which nobody reads.
        int next = stage;
        if (!last) {
          next = stage + 1 < Shared::kStages ? stage + 1 : 0;
          if (next == 0) phase ^= 1;
          ptx::mbarrier_wait(&s.q_full[next], phase);
        }
        ptx::wgmma_fence();
        issue_scores(x, k_low, q_low, next);
        issue_gradient(dk, a, q_low, stage);
        ptx::wgmma_wait<1>();  // S of the next step
        ptx::pin(x);
        if (!last) stage = next;
        flags = next_flags;
        i++;
      } while (!last);
      ptx::wgmma_wait<0>();
      ptx::pin(dk);
      ptx::pin(dv);
      ptx::pin(a);
      ptx::mbarrier_arrive(&s.q_free[stage]);
      if (lane == 0) {
        ptx::mbarrier_arrive(&s.k_free);
        ptx::mbarrier_arrive(&s.v_free);
      }
      stage = stage + 1 < Shared::kStages ? stage + 1 : 0;
      if (stage == 0) phase ^= 1;
      const Step& step = s.steps[(i - 1) % kStepRing];
      const int part = step.flags >> kPartShift;
      const auto gather = [&] {
        const int consumer = 2 * static_cast<int>(ptx::cluster_rank()) + w;
        return gather_portions<4>(p, Portion(part), consumer, thread, dk, dv, s.told[w], sync_consumer);
      };
      if ((Deterministic || p.store) && part && !gather()) {
        // another portion of this tile writes it
      } else if (p.store) {
        const int row = step.first_key + key;
        const int64_t to_v = step.batch * p.dv_batch_stride + row * p.dv_seq_stride + step.kv_head * p.dv_head_stride;
        const int64_t to_k = step.batch * p.dk_batch_stride + row * p.dk_seq_stride + step.kv_head * p.dk_head_stride;
        store_rows(static_cast<T*>(p.dv) + to_v + (lane & 3) * 8, 8 * p.dv_seq_stride, dv, lane, p.k_len - row, p.head_dim_v);
        store_rows(static_cast<T*>(p.dk) + to_k + (lane & 3) * 8, 8 * p.dk_seq_stride, dk, lane, p.k_len - row, p.head_dim);
      } else {
        // Through this warpgroup's half of dS, 32 columns at a time, as dQ goes.
        constexpr int kBoxes = sizeof(s.ds[0]) / (64 * 128);
        ptx::mbarrier_wait(&s.ds_free[w], (i & 1) ^ 1);
#pragma unroll
        for (int n = 0; n < kD / 16; n++) {
          const int column = n * 32 % kD;
          uint16_t* const to = s.ds[w] + n % kBoxes * 64 * 64;
          if (n >= kBoxes) {
            if (thread == 0) ptx::bulk_wait_read<kBoxes - 1>();
            sync_consumer();
          }
          if (n * 32 < kD)
            fill_box(ptx::shared_address(to), dv, column, warp, lane);
          else
            fill_box(ptx::shared_address(to), dk, column, warp, lane);
          ptx::fence_async_proxy();
          sync_consumer();
          if (thread == 0) {
            if (column < (n * 32 < kD ? p.head_dim_v : p.head_dim))
              ptx::tensor_reduce_add(n * 32 < kD ? &dv_map : &dk_map, to, column, step.first_key + w * 64, step.kv_head,
                                     step.batch);
            ptx::bulk_commit();
          }
        }
      }
    }
    if (thread == 0) ptx::bulk_wait<0>();
  }
  ptx::cluster_sync();  // the other CTA may still arrive here
}

}  // namespace ringflash

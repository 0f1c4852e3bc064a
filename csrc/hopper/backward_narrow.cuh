// Backward for head dims up to 128.
//
// A CTA owns 128 keys of one KV head and walks over query tiles of every query head of the group, so dk and dv are summed in
// registers and added to memory once. Four warpgroups:
//   0     producers, 24 registers: warp 0 walks the work list and issues the tensor copies, warp 2 brings row statistics;
//         warp 3 has dQ added to memory (head dims above 64, and all that take turns), warp 1 ends turns
//   1, 2  64 keys each, 208 registers. S^T = K Q^T and dP^T = V dO^T are formed transposed, so that P^T and dS^T leave the
//         accumulators already as register A operands: dV += P^T dO and dK += dS^T Q read only B from shared memory
//   3     dQ, 72 registers: dQ^T = K^T dS^T in two halves, to shared memory, then added to global memory by the copy engine
// dS has two buffers between 1, 2 and 3: neither of the consumers waits for the other or, for half a step, for 3. Between items K
// and V trade places, and dk and dv leave through tiles that nobody reads any more: an item's end takes little more than dQ's
// last products. A consumer leaves out a step of which its keys see nothing. One step:
//   exp of S(i) [dK(i-1) in flight] | dP(i), dV(i) | dS(i), stored | issue S(i+1), dK(i) | dS(i) is told to 3 | wait for S(i+1)
// P enters dS as the rounded values that dV used; a float32 P would cost 32 registers more (error of dq, dk 2.4e-3 instead
// of 1.7e-3).
#pragma once
#include "backward_common.cuh"
#include "backward_tiles.h"

namespace ringflash {

template <class Tile>
struct __align__(1024) NarrowShared {
  static constexpr int kPanelRows = 64 * Tile::kPanels;
  uint16_t kv[2][Tile::kKeys * kPanelRows];  // K of even items, V of odd ones; the others; [panel][key][64], 128-byte swizzle
  uint16_t q[Tile::kQStages][Tile::kRows * kPanelRows];  // [stage][panel][query][64], swizzled like all below
  uint16_t dout[2][Tile::kRows * kPanelRows];
  uint16_t ds[2][2][Tile::kRows * 64];     // [stage][half of the keys][query][64 keys]
  float dq[Tile::kDqBuffers][2][64 * 32];  // [buffer][32 columns of d][query][32]
  Statistics<Tile::kRows, Tile::kKeys> statistics[Tile::kQStages];
  Step steps[kStepRing];
  Walk walk;
  int told[2];  // of the consumers, in gather_portions
  uint64_t k_full, k_free, v_full, v_free;
  uint64_t q_full[Tile::kQStages], q_free[Tile::kQStages], dout_full[2], dout_free[2], ds_full[2], ds_free[2];
  uint64_t left;
  uint64_t step_told[kStepRing];
  Boxes<Tile::kDqBuffers> boxes;

  static constexpr bool kTrade = true;
  __device__ __forceinline__ uint16_t* k_of(int item) { return kv[item & 1]; }
  __device__ __forceinline__ uint16_t* v_of(int item) { return kv[~item & 1]; }
};

template <class T, class Tile, bool Softcap, bool Deterministic>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    backward_narrow(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                    const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dout_map,
                    const __grid_constant__ CUtensorMap dq_map, const __grid_constant__ CUtensorMap dk_map,
                    const __grid_constant__ CUtensorMap dv_map, const __grid_constant__ BackwardParams p) {
  using Shared = NarrowShared<Tile>;
  constexpr int kD = Tile::kHeadDim, kRows = Tile::kRows, kKeys = Tile::kKeys, kPanels = Tile::kPanels;
  constexpr bool kAdder = Deterministic || Tile::kAdder, kKeep = kPanels == 2;  // an item's last dO and Q, for its dk
  extern __shared__ __align__(1024) uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.k_full, 1), ptx::mbarrier_init(&s.k_free, 12);  // one arrival per warp
    ptx::mbarrier_init(&s.v_full, 1), ptx::mbarrier_init(&s.v_free, 12), ptx::mbarrier_init(&s.left, 8);
    for (int i = 0; i < 2; i++) {
      ptx::mbarrier_init(&s.ds_full[i], 8), ptx::mbarrier_init(&s.ds_free[i], 4);
      ptx::mbarrier_init(&s.dout_full[i], 1), ptx::mbarrier_init(&s.dout_free[i], 8);
    }
    for (int i = 0; i < Tile::kQStages; i++)  // q_free: every lane, for what it read of the statistics
      ptx::mbarrier_init(&s.q_full[i], 33), ptx::mbarrier_init(&s.q_free[i], 256);
    for (int i = 0; i < kStepRing; i++) ptx::mbarrier_init(&s.step_told[i], 1);
    if (kAdder) s.boxes.init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  await_kernel_before();

  if (warpgroup == 0) {
    ptx::registers_lower<Tile::kProducerRegisters>();
    if (thread == 0) {
      produce_tiles<kRows, kKeys, kPanels, kPanels>(p, s, &q_map, &k_map, &v_map, &dout_map);
    } else if (thread / 32 == 2) {
      produce_statistics<kRows, kKeys, kKeys, Deterministic>(p, s, lane);
    } else if (kAdder && thread == 96) {
      add_boxes<kRows, kPanels, 1, Deterministic>(p, s, &dq_map);
    } else if (Deterministic && thread == 32) {
      pass_turns_on(p, s);
    }
  } else if (warpgroup == 3) {
    ptx::registers_lower<Tile::kDqRegisters>();
    make_dq<T, kRows, kKeys, kPanels, kAdder>(p, s, &dq_map, thread);
  } else {
    ptx::registers_raise<Tile::kConsumerRegisters>();
    using Scores = ptx::Wgmma<kRows, T>;
    using Gradient = ptx::Wgmma<kD, T, false, true>;
    constexpr uint32_t kStage = sizeof(s.q[0]) / 16;  // in descriptor units
    // Warp-uniform, so that descriptors live in uniform registers.
    const int w = __shfl_sync(~0u, warpgroup - 1, 0), warp = __shfl_sync(~0u, thread / 32, 0);
    const uint32_t kv_low = ptx::descriptor_low(ptx::shared_address(s.kv) + w * 64 * 128);
    const uint32_t q_low = ptx::descriptor_low(ptx::shared_address(s.q), kRows * 128);
    const uint32_t dout_low = ptx::descriptor_low(ptx::shared_address(s.dout), kRows * 128);
    const int c0 = (lane % 4) * 2,
              key = w * 64 + warp * 16 + lane / 4;  // this lane: keys `key` and + 8, queries 8 j + c0 and the next
    // Row address of this lane for stmatrix.trans: dS is stored [query][key].
    const uint32_t ds_store = ptx::shared_address(s.ds[0][w]) + ((lane & 7) + ((lane >> 4) & 1) * 8) * 128 +
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

    int i = 0, items = 0, q_stage = 0, q_phase = 0;
    ptx::mbarrier_wait(&s.step_told[0], 0);
    int flags = s.steps[0].flags, bands = s.steps[0].band_count & 0xffff;
    // Of `bands`: this warpgroup's keys see nothing, and pass_by takes the step. Of float16 it does not: two registers too many.
    const int idle = std::is_same<T, __half>::value ? 0 : kIdle << w;
    constexpr int kBegin = kStop;  // of flags, here: the first step of a stretch that is not idle
    // In an item's first step: boxes of the item before lie where dS goes, and in tiles kept for them, which go back now.
    const auto await_boxes = [&](int stage) {
      if (lane == 0) {
        ptx::bulk_wait_read<0>();
        if (kKeep && p.store && items) {
          ptx::mbarrier_arrive(&s.dout_free[stage ^ 1]);
          ptx::mbarrier_arrive(&s.q_free[q_stage ? q_stage - 1 : Tile::kQStages - 1], 32);
        }
      }
      sync_consumer();
    };
    // A step of which this warpgroup's keys see nothing, at the edge of a mask: dS is zero, and everything else is given back,
    // but not before it came, or it would be counted as what was there before. True at the item's end.
    const auto pass_by = [&] {
      const int stage = i & 1, phase = (i >> 1) & 1, end = flags & kLast;
      if (flags & kFirst) await_boxes(stage);
      ptx::mbarrier_wait(&s.ds_free[stage], phase ^ 1);
#pragma unroll
      for (int k = 0; k < kRows / 16; k++) ptx::stmatrix_x4_trans(ds_store + stage * sizeof(s.ds[0]) + k * 16 * 128, 0, 0, 0, 0);
      ptx::fence_async_proxy();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&s.ds_full[stage]);
      ptx::mbarrier_wait(&s.q_full[q_stage], q_phase);
      ptx::mbarrier_wait(&s.dout_full[stage], phase);
      if (end) ptx::mbarrier_wait(&s.k_full, items & 1), ptx::mbarrier_wait(&s.v_full, items & 1);
      __syncwarp();  // lane 0 speaks for all
      if (!end || !kKeep || !p.store) ptx::mbarrier_arrive(&s.q_free[q_stage]);
      if (lane == 0 && (!end || !kKeep)) ptx::mbarrier_arrive(&s.dout_free[stage]);
      if (lane == 0 && end) ptx::mbarrier_arrive(&s.v_free);
      i++;
      q_stage = q_stage + 1 < Tile::kQStages ? q_stage + 1 : 0;
      if (q_stage == 0) q_phase ^= 1;
      const int at = i % kStepRing;
      ptx::mbarrier_wait(&s.step_told[at], (i / kStepRing) & 1);
      flags = s.steps[at].flags;
      bands = s.steps[at].band_count & 0xffff;
      return end;
    };
#pragma unroll 1
    for (; !(flags & kStop); items++) {
      constexpr uint32_t kOther = sizeof(s.kv[0]) / 16;
      const uint32_t k_low = kv_low + (items & 1) * kOther, v_low = kv_low + (~items & 1) * kOther;
#pragma unroll
      for (int n = 0; n < kD / 2; n++) dk[n] = dv[n] = 0.f;
      int ended = 0;
#pragma unroll 1
      do {
        if (bands & idle) {
          ended = pass_by();
          continue;
        }
        flags |= kBegin;
        ptx::mbarrier_wait(&s.k_full, items & 1);
        ptx::mbarrier_wait(&s.q_full[q_stage], q_phase);
        ptx::wgmma_fence();
        issue_scores(x, k_low, q_low, q_stage);
        ptx::wgmma_wait<0>();
        ptx::pin(x);
        int last;
#pragma unroll 1
        do {
          const int stage = i & 1, phase = (i >> 1) & 1;
          const auto& rows = s.statistics[q_stage];
          if (Softcap) cap_scores(x, p);
          if (bands) mask_scores(x, rows.seen(key), rows.seen(key + 8), c0);
          exponentiate<Softcap>(x, rows.negative_lse + c0, p.scale_log2);
          ptx::pin(x);
          ptx::wgmma_wait<0>();  // dK of the step before
          ptx::pin(a);
          if (!(flags & kBegin)) ptx::mbarrier_arrive(&s.q_free[q_stage ? q_stage - 1 : Tile::kQStages - 1]);
#pragma unroll
          for (int k = 0; k < kRows / 4; k++) a[k] = ptx::pack<T>(x[2 * k], x[2 * k + 1]);
          if (flags & kBegin) ptx::mbarrier_wait(&s.v_full, items & 1);
          ptx::mbarrier_wait(&s.dout_full[stage], phase);
          ptx::wgmma_fence();
          issue_scores(x, v_low, dout_low, stage);
          issue_gradient(dv, a, dout_low, stage);
          const int at = (i + 1) % kStepRing;
          ptx::mbarrier_wait(&s.step_told[at], ((i + 1) / kStepRing) & 1);
          const int next_flags = s.steps[at].flags;
          bands = s.steps[at].band_count & 0xffff;
          last = (flags & kLast) | (bands & idle);
          ptx::wgmma_wait<kRows == 64 ? 1 : 0>();  // dP; of 128 rows dV too, ptxas finds no registers for both
          ptx::pin(x);
          const auto await_place = [&] {  // for dS
            ptx::pin(x);
            if (flags & kFirst) await_boxes(stage);
            ptx::mbarrier_wait(&s.ds_free[stage], phase ^ 1);
          };
          subtract_delta(x, rows.negative_delta + c0, p.scale);
          if (kRows == 128) await_place();  // early: the branch keeps ptxas from waiting for dV before the subtraction
          ptx::wgmma_wait<0>();             // dV
          ptx::pin(a);
          if (lane == 0) {
            if (flags & kLast) ptx::mbarrier_arrive(&s.v_free);
            if (!(flags & kLast) || !kKeep) ptx::mbarrier_arrive(&s.dout_free[stage]);
          }
          score_gradients<T, Softcap>(a, x, rows.negative_lse + c0, p);
          if (kRows == 64) await_place();  // there it takes more registers than there are
#pragma unroll
          for (int k = 0; k < kRows / 16; k++)
            ptx::stmatrix_x4_trans(ds_store + stage * sizeof(s.ds[0]) + k * 16 * 128, a[4 * k], a[4 * k + 1], a[4 * k + 2],
                                   a[4 * k + 3]);
          // S of the next step. The last of a stretch repeats its own S, which nobody reads: a conditional product would cost a
          // second code path.
          const int next = q_stage + 1 < Tile::kQStages ? q_stage + 1 : 0;
          if (next == 0) q_phase ^= 1;
          if (!last) ptx::mbarrier_wait(&s.q_full[next], q_phase);
          ptx::wgmma_fence();
          issue_scores(x, k_low, q_low, last ? q_stage : next);
          issue_gradient(dk, a, q_low, q_stage);
          ptx::fence_async_proxy();  // of the stores of dS; here it waits while the products run
          __syncwarp();
          if (lane == 0) ptx::mbarrier_arrive(&s.ds_full[stage]);
          ptx::wgmma_wait<1>();  // S of the next step
          ptx::pin(x);
          flags = next_flags;
          q_stage = next;
          i++;
        } while (!last);
        ptx::wgmma_wait<0>();
        ptx::pin(dk);
        ptx::pin(dv);
        ptx::pin(a);
        ended = last & kLast;
        if (!ended || !kKeep || !p.store) ptx::mbarrier_arrive(&s.q_free[q_stage ? q_stage - 1 : Tile::kQStages - 1]);
      } while (!ended);
      const int last_q = q_stage ? q_stage - 1 : Tile::kQStages - 1, last_stage = (i - 1) & 1;
      if (lane == 0) {
        if (kKeep) ptx::mbarrier_arrive(p.store ? &s.left : &s.dout_free[last_stage]);
        ptx::mbarrier_arrive(&s.k_free);
      }
      const Step& step = s.steps[(i - 1) % kStepRing];
      // Kept over the steps, it is spilled for float16; read again, ptxas serialises the products for bfloat16.
      const int lane = std::is_same<T, __half>::value ? own_thread() % 32 : thread % 32;
      const int part = step.flags >> kPartShift;
      const auto await_ds = [&](int at) { ptx::mbarrier_wait(&s.ds_free[at & 1], (at >> 1 & 1) ^ 1); };  // of step `at` - 2
      if ((Deterministic || p.store) && part &&
          !gather_portions<2>(p, Portion(part), w, thread, dk, dv, s.told[w], sync_consumer)) {
        // Another portion of this tile writes it. Neither consumer may be two items ahead: `left` counts both.
        if (kKeep && p.store) ptx::mbarrier_wait(&s.left, items & 1);
      } else if (p.store) {
        // Through boxes of 8 KB in shared memory. Where four are needed (kKeep): this warpgroup's dS of the step before the last
        // and of the last, once dQ has read them; of the last step's dO, which both consumers have read by then, and of its Q,
        // once both have left, a half each. Those tiles are given back when the copy engine has read the boxes, in the next
        // item's first step: they are the next item's second dO and third Q, which nobody misses until then.
        const auto leave = [&](const CUtensorMap* map, const uint16_t* box, int column, int columns) {
          if (column < columns) ptx::tensor_store(map, box, column, step.first_key + w * 64, step.kv_head, step.batch);
          ptx::bulk_commit();
        };
        static_assert(kKeep || kRows == 128, "two boxes of dS");
        uint16_t* const first = s.ds[i & 1][w];
        await_ds(i);
        fill_panel<T>(first, dv, 0, warp, lane);
        if (kKeep) {
          uint16_t *const second = s.ds[last_stage][w], *const third = s.dout[last_stage] + w * 64 * 64;
          uint16_t* const fourth = s.q[last_q] + w * 64 * 64;
          await_ds(i + 1);
          fill_panel<T>(second, dv, 64, warp, lane);
          fill_panel<T>(third, dk, 0, warp, lane);
          ptx::mbarrier_wait(&s.left, items & 1);
          fill_panel<T>(fourth, dk, 64, warp, lane);
          ptx::fence_async_proxy();
          sync_consumer();
          // By a thread each: one waits some 500 cycles for the copy engine to take a box.
          if (thread == 0) leave(&dv_map, first, 0, p.head_dim_v);
          if (thread == 32) leave(&dv_map, second, 64, p.head_dim_v);
          if (thread == 64) leave(&dk_map, third, 0, p.head_dim);
          if (thread == 96) leave(&dk_map, fourth, 64, p.head_dim);
        } else {
          uint16_t* const second = first + 64 * 64;
          fill_panel<T>(second, dk, 0, warp, lane);
          ptx::fence_async_proxy();
          sync_consumer();
          if (thread == 0) leave(&dv_map, first, 0, p.head_dim_v);
          if (thread == 32) leave(&dk_map, second, 0, p.head_dim);
        }
      } else {
        // Through this warpgroup's part of dS, 32 columns at a time, as dQ goes.
        constexpr int kBoxes = sizeof(s.ds[0][0]) / (64 * 128);
        uint16_t* const boxes = s.ds[i & 1][w];
        await_ds(i);
#pragma unroll
        for (int n = 0; n < kD / 16; n++) {
          const int column = n * 32 % kD;
          uint16_t* const to = boxes + n % kBoxes * 64 * 64;
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
    if (lane == 0) ptx::bulk_wait<0>();
  }
}

}  // namespace ringflash

// Backward for head dims above 128, where dk and dv of 64 keys fill the registers of two warpgroups.
//
// A CTA owns 64 keys of one KV head and walks over tiles of 64 queries. Four warpgroups:
//   0  producers, as in backward_narrow.cuh
//   1  scores: S^T = K Q^T, P^T = exp(S^T - lse); keeps the first panels of dk and dv
//   2  gradients of scores: dP^T = V dO^T, dS^T = P^T (dP^T - delta); keeps the other panels
//   3  dQ = dS K, panel by panel, as in backward_narrow.cuh
// P^T goes from 1 to 2 and dS^T from 2 to 1 and 3 through shared memory, two buffers each. Whoever made an operand uses it from
// registers, the others from shared memory. A step of 1: exp S(i) | store P | dV, S(i+1) | wait for dS, dK. Of 2: wait for P, dS
// | store | dV, dK, dP(i+1). So the two keep the tensor cores busy while the other is in its arithmetic.
#pragma once
#include "backward_common.cuh"
#include "backward_tiles.h"

namespace ringflash {

template <class Tile>
struct __align__(1024) WideShared {
  uint16_t k[64 * Tile::kHeadDim];  // [panel][key][64], 128-byte swizzle; so are all below
  uint16_t v[64 * Tile::kHeadDimV];
  uint16_t q[2][64 * Tile::kHeadDim];  // [stage][panel][query][64]
  uint16_t dout[Tile::kDoutStages][64 * Tile::kHeadDimV];
  uint16_t p[2][64 * 64];  // [stage][query][key]
  uint16_t ds[2][64 * 64];
  float dq[2][2][64 * 32];  // [buffer][32 columns of d][query][32]
  Statistics<64, 64> statistics[2];
  Step steps[kStepRing];
  Walk walk;
  uint64_t k_full, k_free, v_full, v_free;
  uint64_t q_full[2], q_free[2], dout_full[2], dout_free[2], p_full[2], p_free[2], ds_full[2], ds_free[2];
  uint64_t step_told[kStepRing];
  Boxes<2> boxes;

  static constexpr bool kTrade = false;
  __device__ __forceinline__ uint16_t* k_of(int) { return k; }
  __device__ __forceinline__ uint16_t* v_of(int) { return v; }
};

/// r[0 .. 3]: what stmatrix_x4_trans stored at the same address.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

template <class T, class Tile, bool Softcap, bool Deterministic>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    backward_wide(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map, const __grid_constant__ CUtensorMap dout_map,
                  const __grid_constant__ CUtensorMap dq_map, const __grid_constant__ CUtensorMap dk_map,
                  const __grid_constant__ CUtensorMap dv_map, const __grid_constant__ BackwardParams p) {
  using Shared = WideShared<Tile>;
  constexpr int kDoutStages = Tile::kDoutStages;
  constexpr int kPanels = Tile::kPanels, kPanelsV = Tile::kPanelsV;
  constexpr bool kAdder = Deterministic || Tile::kAdder;
  constexpr uint32_t kPanel = 64 * 128 / 16;  // in descriptor units, as are all strides of descriptors
  constexpr uint32_t kStage = kPanel * kPanels, kStageV = kPanel * kPanelsV;
  extern __shared__ __align__(1024) uint8_t raw[];
  Shared& s = *reinterpret_cast<Shared*>(raw);
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&s.k_full, 1), ptx::mbarrier_init(&s.v_full, 1);
    ptx::mbarrier_init(&s.k_free, 8), ptx::mbarrier_init(&s.v_free, 4);  // one arrival per warp; q_free: every lane
    for (int i = 0; i < 2; i++) {
      ptx::mbarrier_init(&s.q_full[i], 33), ptx::mbarrier_init(&s.dout_full[i], 1);
      ptx::mbarrier_init(&s.q_free[i], 256), ptx::mbarrier_init(&s.dout_free[i], 8);
      ptx::mbarrier_init(&s.p_full[i], 128), ptx::mbarrier_init(&s.p_free[i], 128);  // every lane: not wgmma alone reads P
      ptx::mbarrier_init(&s.ds_full[i], 4), ptx::mbarrier_init(&s.ds_free[i], 8);
    }
    for (int i = 0; i < kStepRing; i++) ptx::mbarrier_init(&s.step_told[i], 1);
    if (kAdder) s.boxes.init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  await_kernel_before();

  const int warp = __shfl_sync(~0u, thread / 32, 0);  // warp-uniform, so that descriptors live in uniform registers
  const int c0 = (lane % 4) * 2;   // of S^T and dP^T this lane holds keys first_of_lane(), + 8, and queries 8 j + c0, + 1
  const auto first_of_lane = [] {  // read again where it is needed: kept over the roles it would be spilled
    const int thread = own_thread();
    return thread / 32 * 16 + thread % 32 / 4;
  };
  // Row address of this lane for stmatrix.trans and ldmatrix.trans: P and dS are stored [query][key].
  const uint32_t exchange = ((lane & 7) + ((lane >> 4) & 1) * 8) * 128 + (((warp * 2 + ((lane >> 3) & 1)) ^ (lane & 7)) << 4);
  // Descriptors of an operand with one buffer do not change: made once, outside the loop, they would not fit the uniform
  // registers.
  const auto opaque = [](uint32_t low) {
    asm volatile("" : "+r"(low));
    return low;
  };
  const auto store = [&](uint32_t base, const uint32_t (&a)[16]) {
#pragma unroll
    for (int k = 0; k < 4; k++)
      ptx::stmatrix_x4_trans(base + exchange + k * 16 * 128, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3]);
    ptx::fence_async_proxy();
    __syncwarp();
  };

  if (warpgroup == 0) {
    ptx::registers_lower<Tile::kProducerRegisters>();
    if (thread == 0) {
      produce_tiles<64, 64, kPanels, kPanelsV>(p, s, &q_map, &k_map, &v_map, &dout_map);
    } else if (thread / 32 == 2) {
      produce_statistics<64, 64, 64, Deterministic>(p, s, lane);
    } else if (kAdder && thread == 96) {
      add_boxes<64, kPanels, 1, Deterministic>(p, s, &dq_map);
    } else if (Deterministic && thread == 32) {
      pass_turns_on(p, s);
    }
  } else if (warpgroup == 3) {
    ptx::registers_lower<Tile::kDqRegisters>();
    make_dq<T, 64, 64, kPanels, kAdder>(p, s, &dq_map, thread);
  } else if (warpgroup == 1) {
    ptx::registers_raise<Tile::kConsumerRegisters>();
    constexpr int kN = Tile::kFirstK * 64, kNV = Tile::kFirstV * 64;
    using Scores = ptx::Wgmma<64, T>;
    const uint32_t k_low = ptx::descriptor_low(ptx::shared_address(s.k)), ds_low = ptx::descriptor_low(ptx::shared_address(s.ds));
    const uint32_t q_low = ptx::descriptor_low(ptx::shared_address(s.q), 64 * 128);
    const uint32_t dout_low = ptx::descriptor_low(ptx::shared_address(s.dout), 64 * 128);
    const uint32_t p_store = ptx::shared_address(s.p);
    float dk[kN / 2], dv[kNV / 2], x[32];
    uint32_t a[16];
    const auto issue_scores = [&](int stage) {
      const uint32_t of_k = opaque(k_low), of_q = opaque(q_low + stage * kStage);
#pragma unroll
      for (int k = 0; k < 4 * kPanels; k++) {
        const uint64_t left = ptx::descriptor(of_k + (k / 4) * kPanel + (k % 4) * 2);
        const uint64_t right = ptx::descriptor(of_q + (k / 4) * kPanel + (k % 4) * 2);
        if (k == 0)
          Scores::ss_first(x, left, right);
        else
          Scores::ss(x, left, right);
      }
      ptx::wgmma_commit();
    };
    int i = 0, items = 0;
#pragma unroll 1
    while (true) {
      const int first = i % kStepRing;
      ptx::mbarrier_wait(&s.step_told[first], (i / kStepRing) & 1);
      int flags = uniform(s.steps[first].flags), bands = uniform(s.steps[first].band_count) & 0xffff;
      if (flags & kStop) break;
      const int first_key = s.steps[first].first_key, kv_head = s.steps[first].kv_head, batch = s.steps[first].batch;
      ptx::mbarrier_wait(&s.k_full, items & 1);
      ptx::mbarrier_wait(&s.q_full[i & 1], (i >> 1) & 1);
      ptx::wgmma_fence();
      issue_scores(i & 1);
#pragma unroll
      for (int n = 0; n < kN / 2; n++) dk[n] = 0.f;
#pragma unroll
      for (int n = 0; n < kNV / 2; n++) dv[n] = 0.f;
      ptx::wgmma_wait<0>();
      ptx::pin(x);
      bool running = false;  // dK of the step before is in flight
#pragma unroll 1
      while (true) {
        const int step = uniform(i), stage = step & 1, phase = (step >> 1) & 1;
        const auto& rows = s.statistics[stage];
        if (Softcap) cap_scores(x, p);
        if (bands) {
          const int key = first_of_lane();
          mask_scores(x, rows.seen(key), rows.seen(key + 8), c0);
        }
        exponentiate<Softcap>(x, rows.negative_lse + c0, p.scale_log2);
        ptx::pin(x);
        ptx::wgmma_wait<0>();  // dK of the step before
        if (running) ptx::mbarrier_arrive(&s.q_free[stage ^ 1]);
        if (running && lane == 0) ptx::mbarrier_arrive(&s.ds_free[stage ^ 1]);
        running = true;
#pragma unroll
        for (int k = 0; k < 16; k++) a[k] = ptx::pack<T>(x[2 * k], x[2 * k + 1]);
        ptx::mbarrier_wait(&s.p_free[stage], phase ^ 1);
        store(p_store + stage * (64 * 128), a);
        ptx::mbarrier_arrive(&s.p_full[stage]);
        ptx::mbarrier_wait(&s.dout_full[i % kDoutStages], (i / kDoutStages) & 1);
        const uint32_t of_dout = opaque(dout_low + step % kDoutStages * kStageV);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++) ptx::Wgmma<kNV, T, false, true>::rs(dv, a + 4 * k, ptx::descriptor(of_dout + k * 128));
        ptx::wgmma_commit();
        // The last step repeats its own S, which nobody reads: a conditional product would cost a second code path.
        const bool last = flags & kLast;
        const int next = uniform(last ? stage : stage ^ 1);
        if (!last) {
          ptx::mbarrier_wait(&s.q_full[next], ((i + 1) >> 1) & 1);
          flags = uniform(s.steps[(i + 1) % kStepRing].flags);
          bands = uniform(s.steps[(i + 1) % kStepRing].band_count) & 0xffff;
        }
        ptx::wgmma_fence();
        issue_scores(next);
        ptx::wgmma_wait<1>();  // dV
        ptx::pin(a);
        if (lane == 0) ptx::mbarrier_arrive(&s.dout_free[i % kDoutStages]);
        ptx::mbarrier_wait(&s.ds_full[stage], phase);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
          ptx::Wgmma<kN, T, true, true>::ss(dk, ptx::descriptor(ds_low + stage * kPanel + k * 128),
                                            ptx::descriptor(q_low + stage * kStage + k * 128));
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // S of the next step
        ptx::pin(x);
        i++;
        if (last) break;
      }
      ptx::wgmma_wait<0>();
      ptx::pin(dk);
      ptx::pin(dv);
      ptx::mbarrier_arrive(&s.q_free[(i - 1) & 1]);
      if (lane == 0) {
        ptx::mbarrier_arrive(&s.ds_free[(i - 1) & 1]);
        ptx::mbarrier_arrive(&s.k_free);
      }
      items++;
      finish_gradient<T>(p.dv, p.store, batch * p.dv_batch_stride + kv_head * p.dv_head_stride, p.dv_seq_stride,
                         first_key + first_of_lane(), p.k_len, dv, lane, p.head_dim_v);
      finish_gradient<T>(p.dk, p.store, batch * p.dk_batch_stride + kv_head * p.dk_head_stride, p.dk_seq_stride,
                         first_key + first_of_lane(), p.k_len, dk, lane, p.head_dim);
    }
  } else {
    ptx::registers_raise<Tile::kConsumerRegisters>();
    constexpr int kN = (kPanels - Tile::kFirstK) * 64, kNV = (kPanelsV - Tile::kFirstV) * 64;
    using Scores = ptx::Wgmma<64, T>;
    const uint32_t v_low = ptx::descriptor_low(ptx::shared_address(s.v)), p_low = ptx::descriptor_low(ptx::shared_address(s.p));
    const uint32_t q_low = ptx::descriptor_low(ptx::shared_address(s.q), 64 * 128) + Tile::kFirstK * kPanel;
    const uint32_t dout_low = ptx::descriptor_low(ptx::shared_address(s.dout), 64 * 128);
    const uint32_t p_load = ptx::shared_address(s.p), ds_store = ptx::shared_address(s.ds);
    float dk[kN / 2], dv[kNV / 2], x[32];
    uint32_t a[16];
    const auto issue_scores = [&](int stage) {
      const uint32_t of_v = opaque(v_low), of_dout = opaque(dout_low + stage * kStageV);
#pragma unroll
      for (int k = 0; k < 4 * kPanelsV; k++) {
        const uint64_t left = ptx::descriptor(of_v + (k / 4) * kPanel + (k % 4) * 2);
        const uint64_t right = ptx::descriptor(of_dout + (k / 4) * kPanel + (k % 4) * 2);
        if (k == 0)
          Scores::ss_first(x, left, right);
        else
          Scores::ss(x, left, right);
      }
      ptx::wgmma_commit();
    };
    int i = 0, items = 0;
#pragma unroll 1
    while (true) {
      const int first = i % kStepRing;
      ptx::mbarrier_wait(&s.step_told[first], (i / kStepRing) & 1);
      int flags = uniform(s.steps[first].flags);
      if (flags & kStop) break;
      const int first_key = s.steps[first].first_key, kv_head = s.steps[first].kv_head, batch = s.steps[first].batch;
      ptx::mbarrier_wait(&s.v_full, items & 1);
      ptx::mbarrier_wait(&s.dout_full[i % kDoutStages], (i / kDoutStages) & 1);
      ptx::wgmma_fence();
      issue_scores(i % kDoutStages);
#pragma unroll
      for (int n = 0; n < kN / 2; n++) dk[n] = 0.f;
#pragma unroll
      for (int n = 0; n < kNV / 2; n++) dv[n] = 0.f;
      ptx::wgmma_wait<0>();
      ptx::pin(x);
#pragma unroll 1
      while (true) {
        const int step = uniform(i), stage = step & 1, phase = (step >> 1) & 1;
        const auto& rows = s.statistics[stage];
        ptx::mbarrier_wait(&s.q_full[stage], phase);
        ptx::mbarrier_wait(&s.p_full[stage], phase);
#pragma unroll
        for (int k = 0; k < 4; k++)
          ldmatrix_x4_trans(*reinterpret_cast<uint32_t (*)[4]>(a + 4 * k), p_load + stage * (64 * 128) + exchange + k * 16 * 128);
        subtract_delta(x, rows.negative_delta + c0, p.scale);
        score_gradients<T, Softcap>(a, x, rows.negative_lse + c0, p);
        ptx::mbarrier_wait(&s.ds_free[stage], phase ^ 1);
        store(ds_store + stage * (64 * 128), a);
        if (lane == 0) ptx::mbarrier_arrive(&s.ds_full[stage]);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
          ptx::Wgmma<kNV, T, true, true>::ss(
              dv, ptx::descriptor(p_low + stage * kPanel + k * 128),
              ptx::descriptor(dout_low + Tile::kFirstV * kPanel + step % kDoutStages * kStageV + k * 128));
        ptx::wgmma_commit();
#pragma unroll
        for (int k = 0; k < 4; k++)
          ptx::Wgmma<kN, T, false, true>::rs(dk, a + 4 * k, ptx::descriptor(q_low + stage * kStage + k * 128));
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // dV
        const bool last = flags & kLast;
        ptx::mbarrier_arrive(&s.p_free[stage]);
        if (lane == 0 && !last) ptx::mbarrier_arrive(&s.dout_free[i % kDoutStages]);
        const int next = uniform(last ? step : step + 1);  // the last step repeats its own dP
        if (!last) ptx::mbarrier_wait(&s.dout_full[next % kDoutStages], (next / kDoutStages) & 1);
        ptx::wgmma_fence();
        issue_scores(next % kDoutStages);
        ptx::wgmma_wait<1>();  // dK
        ptx::pin(a);
        ptx::mbarrier_arrive(&s.q_free[stage]);
        ptx::wgmma_wait<0>();  // dP of the next step
        ptx::pin(x);
        i++;
        if (last) break;
        flags = uniform(s.steps[i % kStepRing].flags);
      }
      ptx::pin(dk);
      ptx::pin(dv);
      if (lane == 0) {
        ptx::mbarrier_arrive(&s.dout_free[(i - 1) % kDoutStages]);
        ptx::mbarrier_arrive(&s.v_free);
      }
      items++;
      finish_gradient<T>(p.dv, p.store, batch * p.dv_batch_stride + kv_head * p.dv_head_stride + Tile::kFirstV * 64,
                         p.dv_seq_stride, first_key + first_of_lane(), p.k_len, dv, lane, p.head_dim_v - Tile::kFirstV * 64);
      finish_gradient<T>(p.dk, p.store, batch * p.dk_batch_stride + kv_head * p.dk_head_stride + Tile::kFirstK * 64,
                         p.dk_seq_stride, first_key + first_of_lane(), p.k_len, dk, lane, p.head_dim - Tile::kFirstK * 64);
    }
  }
}

}  // namespace ringflash

// What the backward kernels share: tables, the producer warps that walk them, and the way gradients reach global memory.
//
// A CTA takes *items* (a tile of keys of one KV head, with the query tiles it meets) off a counter until none is left. Its
// producer warp turns the item's runs into *steps*, one query tile each, and tells the other warps through a small ring of Step
// records; a second warp brings each step's row statistics. Matrix warps never meet a table, a Slice or an index computation.
#pragma once
#include <type_traits>

#include "../device/band.cuh"
#include "../device/ptx.cuh"
#include "overlap.cuh"

namespace ringflash {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLogE2 = 0.6931471805599453f;

struct BackwardParams {
  const float* lse;          // (B, H, Sq)
  const float* delta;        // (B, H, Sq)
  float* dq;                 // (B, Sq, H, D)
  void* dk;                  // (B, Sk, Hkv, D) float32 to add to, or of q's type to write
  void* dv;                  // (B, Sk, Hkv, Dv)
  const int4* items;         // (item_count, 2)
  const int4* runs;          // (n)
  const int4* bands;         // (n, 2)
  const int* visit_offsets;  // (query tiles + 1)
  const int2* visits;        // (n)
  int* turns;                // (B, H, query tiles), of pairs each CTA's
  float4* portions;          // partial dk, dv of divided items, as registers hold them
  int* portions_done;        // (portions, consumers of an item) zeros
  unsigned* counter;
  int64_t lse_batch_stride, lse_head_stride, delta_batch_stride, delta_head_stride;
  int64_t dq_batch_stride, dq_seq_stride, dq_head_stride;
  int64_t dk_batch_stride, dk_seq_stride, dk_head_stride, dv_batch_stride, dv_seq_stride, dv_head_stride;
  int q_len, k_len, heads, heads_per_kv_head, head_dim, head_dim_v, item_count, q_tiles;
  bool store;
  unsigned last_claim;  // item_count + CTAs - 1, the last value the counter takes
  float scale;          // of dS: d(scores) / d(q.k); with a softcap still to be multiplied by 1 - tanh^2
  float scale_log2;     // exponent = q.k * scale_log2 - lse * log2(e); with a softcap the cap * log2(e)
  float tanh_exponent;  // with a softcap: exp2(q.k * tanh_exponent) = exp(2 x), x the argument of tanh
  float inverse_cap;    // with a softcap: ln 2 / cap
};

// An item of the work list is two int4: run_begin, run_end, first_key, batch; and kv_head, head_begin, head_end, part. Query
// heads [head_begin, head_end) are of the whole tensor; part is a Portion.
constexpr int kFirst = 1, kLast = 2, kStop = 4;  // flags of a step: first or last of its item; no step, the work is done
constexpr int kPartShift = 3;                    // above them an item's `part`

/// Which part of a divided tile of keys an item is, where dk and dv are written or everything is deterministic; 0: all of it, or
/// parts add up.
struct Portion {
  int slot, index, count;  // of its partial results; those of its tile are slots slot, .., slot + count - 1
  __device__ __forceinline__ explicit Portion(int part) : slot(part & 0x1fff), index(part >> 13 & 0xff), count(part >> 21) {}
};

constexpr int kIdle = 1 << 14;  // << h: no key of half h of the tile is seen in this step; told to backward_narrow.cuh alone

/// One step, as the producer tells it. 32 bytes.
struct __align__(16) Step {
  int flags, first_row, head, batch;
  int first_key, kv_head, band_begin,
      band_count;  // bands (0: nothing is masked) | kIdle of either half of the keys | the pass over this tile << 16

  __device__ __forceinline__ int bands() const { return band_count & (kIdle - 1); }
};
/// A record is written again 8 steps later. All its readers are done: the producer tells a step when the queries of 4 steps
/// before (3 in the wide kernel) are free, and whoever adds dQ is at most 3 steps behind those.
constexpr int kStepRing = 8;

/// A value that all lanes hold, in a uniform register.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

template <int Rows, int Keys>
struct __align__(16) Statistics {
  float negative_lse[Rows];    // -lse * log2(e); -inf: the row sees nothing, P = 0
  float negative_delta[Rows];  // -delta * scale
  uint16_t seen_by[Keys];  // of each key, the queries [low byte, high byte) of this tile that see it; written for masked steps

  __device__ __forceinline__ Interval seen(int key) const { return Interval::of(seen_by[key] & 0xff, seen_by[key] >> 8); }
};

/// Self-resetting counter: after every CTA of the grid was told "none left" it stands at zero again.
__device__ __forceinline__ int claim_item(const BackwardParams& p) {
  return static_cast<int>(atomicInc(p.counter, p.last_claim));
}

/// What the producer keeps in shared memory while it walks an item: it has 24 registers.
struct __align__(16) Walk {
  int4 item[2];
  int next, items;  // the item after this one; how many came before it
};

/// Tells every step of every item this CTA gets, in s.steps, then one with kStop; after each it calls on_step(i, step). claim(n)
/// gives the n-th item, share() says where in an item this CTA's keys begin. By one thread.
template <class Shared, class Claim, class Share, class OnStep>
__device__ __forceinline__ void walk_items(const BackwardParams& p, Shared& s, int rows, const Claim& claim, const Share& share,
                                           const OnStep& on_step) {
  int i = 0;
  s.walk.next = claim(0), s.walk.items = 0;
  while (s.walk.next < p.item_count) {
    const int item = s.walk.next;
    s.walk.item[0] = __ldg(p.items + 2 * item), s.walk.item[1] = __ldg(p.items + 2 * item + 1);
    int flags = kFirst;
#pragma unroll 1
    for (; s.walk.item[1].y < s.walk.item[1].z; s.walk.item[1].y++) {
#pragma unroll 1
      for (int run = s.walk.item[0].x; run < s.walk.item[0].y; run++) {
        int m = __ldg(&p.runs[run].x);
#pragma unroll 1
        do {
          Step& step = s.steps[i % kStepRing];
          const int4 r = __ldg(p.runs + run);  // again for every step: in L1, and cheaper than the registers
          step.first_row = m * rows, step.head = s.walk.item[1].y, step.batch = s.walk.item[0].w;
          step.first_key = s.walk.item[0].z + share(), step.kv_head = s.walk.item[1].x;
          step.band_begin = r.z, step.band_count = r.w;
          m = m + 1 < r.y ? m + 1 : -1;
          // The next item is claimed with the last tile and not earlier: early claims undo longest-first.
          if (m < 0 && run + 1 == s.walk.item[0].y && s.walk.item[1].y + 1 == s.walk.item[1].z) {
            flags |= kLast;
            s.walk.next = claim(s.walk.items + 1);
          }
          step.flags = flags | s.walk.item[1].w << kPartShift;
          flags = 0;
          ptx::mbarrier_arrive(&s.step_told[i % kStepRing]);
          on_step(i, step);
          i++;
        } while (m >= 0);
      }
    }
    s.walk.items++;
  }
  s.steps[i % kStepRing].flags = kStop;
  ptx::mbarrier_arrive(&s.step_told[i % kStepRing]);
}

/// The producer thread: walks the work list and copies the tiles of each step. Shared memory tiles are [panel][row][64]. With
/// Shared::kTrade an item's K goes where V of the item before was, its V where K was: V is free half a step before the item's
/// end, K only when dQ's last product is done, so K comes early, and V is needed late.
template <int Rows, int Keys, int Panels, int PanelsV, class Shared>
__device__ __forceinline__ void produce_tiles(const BackwardParams& p, Shared& s, const CUtensorMap* q_map,
                                              const CUtensorMap* k_map, const CUtensorMap* v_map, const CUtensorMap* dout_map) {
  ptx::prefetch_tensor_map(q_map), ptx::prefetch_tensor_map(k_map);
  ptx::prefetch_tensor_map(v_map), ptx::prefetch_tensor_map(dout_map);
  const auto claim = [&](int) { return claim_item(p); };
  const auto share = [] { return 0; };
  walk_items(p, s, Rows, claim, share, [&](int i, const Step& step) {
    constexpr int kStages = sizeof(s.q) / sizeof(s.q[0]);
    const int stage = i % kStages;
    ptx::mbarrier_wait(&s.q_free[stage], (i / kStages & 1) ^ 1);
    ptx::mbarrier_arrive_expect(&s.q_full[stage], sizeof(s.q[0]));
#pragma unroll 1
    for (int c = 0; c < Panels; c++)
      ptx::tensor_load(s.q[stage] + c * Rows * 64, q_map, &s.q_full[stage], c * 64, step.first_row, step.head, step.batch,
                       ptx::kEvictLast);
    if (step.flags & kFirst) {
      ptx::mbarrier_wait(Shared::kTrade ? &s.v_free : &s.k_free, (s.walk.items & 1) ^ 1);
      ptx::mbarrier_arrive_expect(&s.k_full, Panels * Keys * 128);
#pragma unroll 1
      for (int c = 0; c < Panels; c++)
        ptx::tensor_load(s.k_of(s.walk.items) + c * Keys * 64, k_map, &s.k_full, c * 64, step.first_key, step.kv_head, step.batch,
                         ptx::kEvictFirst);
    }
    constexpr int kDoutStages = sizeof(s.dout) / sizeof(s.dout[0]);
    const int at = i % kDoutStages;
    ptx::mbarrier_wait(&s.dout_free[at], (i / kDoutStages & 1) ^ 1);
    ptx::mbarrier_arrive_expect(&s.dout_full[at], sizeof(s.dout[0]));
#pragma unroll 1
    for (int c = 0; c < PanelsV; c++)
      ptx::tensor_load(s.dout[at] + c * Rows * 64, dout_map, &s.dout_full[at], c * 64, step.first_row, step.head, step.batch,
                       ptx::kEvictLast);
    if (step.flags & kFirst) {
      ptx::mbarrier_wait(Shared::kTrade ? &s.k_free : &s.v_free, (s.walk.items & 1) ^ 1);
      ptx::mbarrier_arrive_expect(&s.v_full, PanelsV * Keys * 128);
#pragma unroll 1
      for (int c = 0; c < PanelsV; c++)
        ptx::tensor_load(s.v_of(s.walk.items) + c * Keys * 64, v_map, &s.v_full, c * 64, step.first_key, step.kv_head, step.batch,
                         ptx::kEvictFirst);
    }
  });
}

/// Deterministic mode. A query tile is added to by key tiles from the last to the first, passes over one tile in turn: this many
/// visits come before that of a step. The work list hands out key tiles in the same order, so whoever is waited for has started:
/// no deadlock. Last to first, because under a causal mask that is the order in which they arrive. By a warp.
template <int Rows, int TileKeys>
__device__ __forceinline__ int turn_of(const BackwardParams& p, const Step& step, int lane) {
  const int q_tile = step.first_row / Rows, next_tile = step.first_key / TileKeys + 1;
  int before = 0;
#pragma unroll 1
  for (int v = __ldg(p.visit_offsets + q_tile) + lane; v < __ldg(p.visit_offsets + q_tile + 1); v += 32) {
    const int2 tiles = __ldg(p.visits + v);
    before += max(tiles.y - max(tiles.x, next_tile), 0);
  }
  return __reduce_add_sync(~0u, before) + (step.band_count >> 16);
}
/// The statistics of a step, and its turn in deterministic mode, by one warp. Rows past the end get P = 0. TileKeys: those of an
/// item.
template <int Rows, int Keys, int TileKeys, bool Deterministic, class Shared>
__device__ __forceinline__ void produce_statistics(const BackwardParams& p, Shared& s, int lane) {
  constexpr int kEach = Rows / 32, kStages = sizeof(s.q) / sizeof(s.q[0]);
#pragma unroll 1
  for (int i = 0;; i++) {
    const Step& step = s.steps[i % kStepRing];
    ptx::mbarrier_wait(&s.step_told[i % kStepRing], (i / kStepRing) & 1);
    if (step.flags & kStop) break;
    const int stage = i % kStages;
    Statistics<Rows, Keys>& to = s.statistics[stage];
    const int first = step.first_row + lane;
    float a[kEach], c[kEach];
    {
      const float* lse = p.lse + step.batch * p.lse_batch_stride + step.head * p.lse_head_stride;
#pragma unroll
      for (int r = 0; r < kEach; r++) a[r] = first + r * 32 < p.q_len ? __ldg(lse + first + r * 32) : -INFINITY;
    }
    {
      // Not __ldg: that is for memory nobody writes while the kernel runs, and this one may begin before delta's has ended.
      const float* delta = p.delta + step.batch * p.delta_batch_stride + step.head * p.delta_head_stride;
#pragma unroll
      for (int r = 0; r < kEach; r++) c[r] = first + r * 32 < p.q_len ? __ldcg(delta + first + r * 32) : 0.f;
    }
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      c[r] = a[r] == -INFINITY ? 0.f : -p.scale * c[r];
      a[r] = a[r] == -INFINITY ? a[r] : a[r] * -kLog2E;
    }
    if (Deterministic) {
      const int turn = turn_of<Rows, TileKeys>(p, step, lane);
      if (lane == 0) s.boxes.turn[i % kStepRing] = turn;
    }
    ptx::mbarrier_wait(&s.q_free[stage], (i / kStages & 1) ^ 1);
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      to.negative_lse[r * 32 + lane] = a[r];
      to.negative_delta[r * 32 + lane] = c[r];
    }
    if (step.bands()) {
#pragma unroll 1
      for (int r = lane; r < Keys; r += 32) {
        const int key = step.first_key + r;
        Interval seen = Interval::of(0, 0);
#pragma unroll 1
        for (int j = 0; j < step.bands(); j++) {  // bands of one pass share no key
          const int4 x = __ldg(p.bands + 2 * (step.band_begin + j)), y = __ldg(p.bands + 2 * (step.band_begin + j) + 1);
          if (key >= x.x && key < x.y) seen = band_interval(key, x.z, x.w, y.x, y.y, step.first_row, Rows);
        }
        to.seen_by[r] = static_cast<uint16_t>(seen.begin() | seen.end() << 8);
      }
    }
    ptx::mbarrier_arrive(&s.q_full[stage]);  // every lane, for what it stored
  }
}

/// Adds this lane's part of a 64 x 2N accumulator to float32 rows. row: the upper of the lane's two rows, at column 4 * (bit 1 of
/// lane); neighbouring lanes swap halves, so that each adds 16 bytes of one row. inside: the lane's row (upper for even lanes,
/// lower for odd ones) exists; columns: how many exist, from column 0.
template <int N>
__device__ __forceinline__ void add_rows(float* row, const float (&d)[N], int lane, bool inside, int columns) {
  const bool odd = lane & 1;
  const int first = (lane & 2) * 2;
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    const float a0 = __shfl_xor_sync(~0u, odd ? d[j * 4] : d[j * 4 + 2], 1);
    const float a1 = __shfl_xor_sync(~0u, odd ? d[j * 4 + 1] : d[j * 4 + 3], 1);
    const float y0 = odd ? a0 : d[j * 4], y1 = odd ? a1 : d[j * 4 + 1];
    const float y2 = odd ? d[j * 4 + 2] : a0, y3 = odd ? d[j * 4 + 3] : a1;
    if (inside && j * 8 + first < columns) ptx::reduce_add_v4(row + j * 8, y0, y1, y2, y3);
  }
}

/// Writes this lane's part of a 64 x 2N accumulator to rows of 2-byte elements. The four lanes of a quad exchange blocks of eight
/// columns, so that each writes 16 bytes. row: the upper of the lane's two rows, at column 8 * (lane % 4), the other is
/// eight_rows further; rows: how many exist from there on.
template <class T, int N>
__device__ __forceinline__ void store_rows(T* row, int64_t eight_rows, const float (&d)[N], int lane, int rows, int columns) {
  static_assert(N % 16 == 0, "blocks of 32 columns");
  const bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int j = 0; j < N / 4; j += 4) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; i++) w[i] = ptx::pack<T>(d[(j + i) * 4 + 2 * r], d[(j + i) * 4 + 2 * r + 1]);
      // Transposes the 4 x 4 words of the quad: lane c ends with block j + c.
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t other = __shfl_xor_sync(~0u, odd ? w[i] : w[i + 1], 1);
        if (odd)
          w[i] = other;
        else
          w[i + 1] = other;
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t other = __shfl_xor_sync(~0u, high ? w[i] : w[i + 2], 2);
        if (high)
          w[i] = other;
        else
          w[i + 2] = other;
      }
      if (8 * r < rows && (j + lane % 4) * 8 < columns)
        *reinterpret_cast<uint4*>(row + r * eight_rows + j * 8) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}
/// Puts 32 columns of a warpgroup's 64 x 32 block into a box for the copy engine: [row][32] float32, chunks swizzled by row % 8.
template <int N>
__device__ __forceinline__ void fill_box(uint32_t box, const float (&d)[N], int first, int warp, int lane) {
  const int row = warp * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(box + (row + 8 * r) * 128 +
                                                            (((2 * j + (lane % 4) / 2) ^ (row % 8)) << 4) + (lane & 1) * 8),
                   "f"(d[(first / 8 + j) * 4 + 2 * r]), "f"(d[(first / 8 + j) * 4 + 2 * r + 1])
                   : "memory");
}
/// Columns from `first` on, 64 at most, of this warp's 16 rows of a 64 x 2N accumulator, into a box of 64 rows of 64 2-byte
/// elements, swizzled as the tensor maps are.
template <class T, int N>
__device__ __forceinline__ void fill_panel(uint16_t* box, const float (&d)[N], int first, int warp, int lane) {
  const uint32_t row = ptx::shared_address(box) + (warp * 16 + (lane & 15)) * 128;
#pragma unroll
  for (int j = 0; j < 8 && first / 8 + j < N / 4; j += 2) {
    const float* x = d + (first / 8 + j) * 4;
    ptx::stmatrix_x4(row + (((j + (lane >> 4)) ^ (lane & 7)) << 4), ptx::pack<T>(x[0], x[1]), ptx::pack<T>(x[2], x[3]),
                     ptx::pack<T>(x[4], x[5]), ptx::pack<T>(x[6], x[7]));
  }
}
/// dk or dv of this lane's keys first_row and + 8 of a 64 x 2N accumulator: added to float32, or written as T.
template <class T, int N>
__device__ __forceinline__ void finish_gradient(void* base, bool store, int64_t offset, int64_t seq_stride, int first_row,
                                                int length, const float (&d)[N], int lane, int columns) {
  if (store) {
    T* to = static_cast<T*>(base) + offset + first_row * seq_stride + (lane & 3) * 8;
    store_rows(to, 8 * seq_stride, d, lane, length - first_row, columns);
  } else {
    const int row = first_row + (lane & 1) * 8;
    add_rows(static_cast<float*>(base) + offset + row * seq_stride + (lane & 2) * 2, d, lane, row < length, columns);
  }
}

/// This thread's number in its warpgroup, read from the special register where it is called.
__device__ __forceinline__ int own_thread() {
  uint32_t t;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
  return static_cast<int>(t % 128);
}

/// Leaves this warpgroup's dk and dv in its portion's slot. True for the last portion of a tile of keys: dk and dv are then the
/// sums, in the order of the portions, whichever came last. w: which of the Consumers warpgroups of an item; told: a word of this
/// one; sync: its barrier.
template <int Consumers, int N, class Sync>
__device__ __forceinline__ bool gather_portions(const BackwardParams& p, const Portion portion, int w, int thread, float (&dk)[N],
                                                float (&dv)[N], int& told, const Sync& sync) {
  constexpr int kThreads = 128, kStride = Consumers * (N / 2) * kThreads;  // float4 of a thread are 128 apart
  float4* const base = p.portions + static_cast<int64_t>(portion.slot) * kStride + w * (N / 2) * kThreads + thread;
  float4* const mine = base + portion.index * kStride;
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    __stcg(mine + j * kThreads, make_float4(dk[4 * j], dk[4 * j + 1], dk[4 * j + 2], dk[4 * j + 3]));
    __stcg(mine + (N / 4 + j) * kThreads, make_float4(dv[4 * j], dv[4 * j + 1], dv[4 * j + 2], dv[4 * j + 3]));
  }
  __threadfence();
  sync();
  if (thread == 0) {
    int* const done = p.portions_done + portion.slot * Consumers + w;
    told = atomicAdd(done, 1) == portion.count - 1;
    if (told) *done = 0;  // for the next launch
    __threadfence();
  }
  sync();
  if (!told) return false;
#pragma unroll
  for (int n = 0; n < N; n++) dk[n] = dv[n] = 0.f;
#pragma unroll 1
  for (int i = 0; i < portion.count; i++) {
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
      const float4 x = __ldcg(base + i * kStride + j * kThreads), y = __ldcg(base + i * kStride + (N / 4 + j) * kThreads);
      dk[4 * j] += x.x, dk[4 * j + 1] += x.y, dk[4 * j + 2] += x.z, dk[4 * j + 3] += x.w;
      dv[4 * j] += y.x, dv[4 * j + 1] += y.y, dv[4 * j + 2] += y.z, dv[4 * j + 3] += y.w;
    }
  }
  return true;
}

/// Between the warpgroup of dQ and the producer thread that has its boxes added, where there is one: it makes dq's additions
/// while that warpgroup is at the next box.
template <int Buffers>
struct Boxes {
  uint64_t full[Buffers];  // 128: every lane, for what it stored
  uint64_t free[Buffers];  // 1: the copy engine has read the box
  // Deterministic mode:
  uint64_t added[2];    // 1: the additions of step i are complete
  uint64_t passed[2];   // 1: and the next one can know
  int place[2];         // in p.turns, of step i; -1: the work is done
  int turn[kStepRing];  // of step i; by the statistics warp, before it tells q_full
  __device__ __forceinline__ void init() {
#pragma unroll
    for (int i = 0; i < Buffers; i++) ptx::mbarrier_init(&full[i], 128), ptx::mbarrier_init(&free[i], 1);
#pragma unroll
    for (int i = 0; i < 2; i++) ptx::mbarrier_init(&added[i], 1), ptx::mbarrier_init(&passed[i], 1);
  }
};

__device__ __forceinline__ int turn_now(const BackwardParams& p, int at) {
  int now;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(p.turns + at) : "memory");
  return now;
}
/// Has the boxes of each step added to dq; in deterministic mode when its turn has come. Ways: how many CTAs share a step, of
/// which each adds to columns of its own, in turns of its own. By one thread. It is at most a step behind the warpgroup of dQ: no
/// record is written again before it was read here.
template <int Rows, int Panels, int Ways, bool Deterministic, class Shared>
__device__ __forceinline__ void add_boxes(const BackwardParams& p, Shared& s, const CUtensorMap* dq_map) {
  constexpr int kParts = Panels * Rows / 64 / Ways, kBuffers = sizeof(s.dq) / sizeof(s.dq[0]);
  const int rank = Ways > 1 ? ptx::cluster_rank() : 0;
  const auto turns_of = [&](int i) -> int {  // where in p.turns; -1: the work is done
    const Step& step = s.steps[i % kStepRing];
    ptx::mbarrier_wait(&s.step_told[i % kStepRing], (i / kStepRing) & 1);
    if (step.flags & kStop) return -1;
    return ((step.batch * p.heads + step.head) * p.q_tiles + step.first_row / Rows) * Ways + rank;
  };
  int at = turns_of(0), i = 0, now = 0, buffer = 0, phase = 0;
#pragma unroll 1
  for (; at >= 0; i++) {
#pragma unroll 1
    for (int part = 0; part < kParts; part++) {
      const Step& step = s.steps[i % kStepRing];         // again for every part: cheaper than the registers
      ptx::mbarrier_wait(&s.boxes.full[buffer], phase);  // after what the statistics warp told
      if (Deterministic && part == 0) {
        while (now != s.boxes.turn[i % kStepRing]) now = turn_now(p, at);
        asm volatile("fence.proxy.async.global;" ::: "memory");
      }
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int column = (Ways > 1 ? rank : Rows == 64 ? part : 0) * 64 + c * 32;
        if (column < p.head_dim)
          ptx::tensor_reduce_add(dq_map, s.dq[buffer][c], column, step.first_row + (Rows == 64 ? 0 : part * 64), step.head,
                                 step.batch);
      }
      ptx::bulk_commit();
      ptx::bulk_wait_read<0>();
      ptx::mbarrier_arrive(&s.boxes.free[buffer]);
      buffer = buffer + 1 < kBuffers ? buffer + 1 : 0;
      if (buffer == 0) phase ^= 1;
    }
    const int next = turns_of(i + 1);
    if (Deterministic) {
      if (next >= 0) now = turn_now(p, next);  // while the additions are under way
      ptx::bulk_wait<0>();
      ptx::mbarrier_wait(&s.boxes.passed[i & 1], ((i >> 1) & 1) ^ 1);
      s.boxes.place[i & 1] = at;
      ptx::mbarrier_arrive(&s.boxes.added[i & 1]);
    }
    at = next;
  }
  if (Deterministic) {
    ptx::mbarrier_wait(&s.boxes.passed[i & 1], ((i >> 1) & 1) ^ 1);
    s.boxes.place[i & 1] = -1;
    ptx::mbarrier_arrive(&s.boxes.added[i & 1]);
  } else {
    ptx::bulk_wait<0>();
  }
}
/// Ends the turn of each step once its additions are complete. By a thread of its own: the one that adds would lose 3-9 % of the
/// kernel's time in the release's fence.
template <class Shared>
__device__ __forceinline__ void pass_turns_on(const BackwardParams& p, Shared& s) {
#pragma unroll 1
  for (int i = 0;; i++) {
    ptx::mbarrier_wait(&s.boxes.added[i & 1], (i >> 1) & 1);
    const int at = s.boxes.place[i & 1];
    if (at < 0) break;
    asm volatile("fence.proxy.async.global;\nred.release.gpu.global.add.s32 [%0], 1;" ::"l"(p.turns + at) : "memory");
    ptx::mbarrier_arrive(&s.boxes.passed[i & 1]);
  }
}
/// The warpgroup of dQ: dQ^T = K^T dS^T in parts of 64 columns of d (or, of tiles with one panel and 128 rows, of 64 queries),
/// through two or three buffers in shared memory to the copy engine, which adds them to global memory and clips rows and columns
/// past the end. Adder: another thread tells it to (add_boxes). red.global.add.v4 from registers instead takes more than twice as
/// long: its warps touch 16 rows at once.
template <class T, int Rows, int Keys, int Panels, bool Adder, class Shared>
__device__ __forceinline__ void make_dq(const BackwardParams& p, Shared& s, const CUtensorMap* dq_map, int thread) {
  using Product = ptx::Wgmma<64, T, true, false>;
  constexpr int kParts = Panels * Rows / 64;
  constexpr int kStages = sizeof(s.ds) / sizeof(s.ds[0]);
  constexpr int kBuffers = sizeof(s.dq) / sizeof(s.dq[0]);
  const int warp = thread / 32, lane = thread % 32, c0 = (lane % 4) * 2;
  const uint32_t ds_low = ptx::descriptor_low(ptx::shared_address(s.ds)),
                 k_low = ptx::descriptor_low(ptx::shared_address(s.k_of(0)));
  // This lane holds d = 16 warp + lane / 4 (+ 8) and queries 8 j + c0 (+ 1): 4-byte stores, one box row (32 d) per query, chunk
  // ^= query % 8: free of bank conflicts.
  const uint32_t box = ptx::shared_address(s.dq) + (warp >> 1) * 64 * 128 + c0 * 128 +
                       ((((warp & 1) * 4 + (lane >> 4)) ^ c0) << 4) + ((lane >> 2) & 3) * 4;
  int items = -1, i = 0, buffer = 0, phase = 0;
#pragma unroll 1
  for (;; i++) {
    const Step& step = s.steps[i % kStepRing];
    ptx::mbarrier_wait(&s.step_told[i % kStepRing], (i / kStepRing) & 1);
    const int flags = step.flags;
    if (flags & kStop) break;
    const int row = step.first_row, head = step.head, batch = step.batch;
    if (flags & kFirst) {
      items++;
      ptx::mbarrier_wait(&s.k_full, items & 1);
      if (Shared::kTrade && lane == 0) ptx::mbarrier_arrive(&s.v_free);  // else the next K could come before this one was seen
    }
    const uint32_t k_now = k_low + (Shared::kTrade ? items & 1 : 0) * (Keys * Panels * 128 / 16);
    const int stage = i % kStages;
    const uint32_t b = ds_low + stage * (sizeof(s.ds[0]) / 16);
    ptx::mbarrier_wait(&s.ds_full[stage], (i / kStages) & 1);
#pragma unroll 1  // unrolled, two parts would want 64 accumulators
    for (int part = 0; part < kParts; part++) {
      const uint32_t a_part = k_now + (Rows == 64 ? part : 0) * Keys * 8, b_part = b + (Rows == 64 ? 0 : part) * 64 * 8;
      float x[32];
      ptx::wgmma_fence();
      Product::ss_first(x, ptx::descriptor(a_part), ptx::descriptor(b_part));
#pragma unroll
      for (int k = 1; k < Keys / 16; k++)
        Product::ss(x, ptx::descriptor(a_part + k * 128), ptx::descriptor(b_part + (k / 4) * Rows * 8 + (k % 4) * 2));
      ptx::wgmma_commit();
      if (Adder) {
        ptx::mbarrier_wait(&s.boxes.free[buffer], phase ^ 1);
      } else {
        if (thread == 0) ptx::bulk_wait_read<kBuffers - 1>();
        ptx::barrier_sync<3, 128>();  // this buffer was read
      }
      ptx::wgmma_wait<0>();
      ptx::pin(x);
      if (part == kParts - 1 && lane == 0) {
        ptx::mbarrier_arrive(&s.ds_free[stage]);
        if (flags & kLast) ptx::mbarrier_arrive(&s.k_free);
      }
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          asm volatile("st.shared.f32 [%0], %1;" ::"r"((box ^ ((e & 1) * 16) ^ ((e >> 1) * 32)) + (e & 1) * 128 + j * 1024 +
                                                       buffer * (64 * 256)),
                       "f"(x[j * 4 + e])
                       : "memory");
      ptx::fence_async_proxy();
      if (Adder) {
        ptx::mbarrier_arrive(&s.boxes.full[buffer]);
      } else {
        ptx::barrier_sync<2, 128>();
        if (thread == 0) {
#pragma unroll
          for (int c = 0; c < 2; c++) {
            const int column = (Rows == 64 ? part * 64 : 0) + c * 32;
            if (column < p.head_dim)
              ptx::tensor_reduce_add(dq_map, s.dq[buffer][c], column, row + (Rows == 64 ? 0 : part * 64), head, batch);
          }
          ptx::bulk_commit();
        }
      }
      buffer = buffer + 1 < kBuffers ? buffer + 1 : 0;
      if (Adder && buffer == 0) phase ^= 1;
    }
  }
  if (!Adder && thread == 0) ptx::bulk_wait<0>();
}

/// Turns scores q.k into exponents (log2 units, before the subtraction of lse). Softcap: cap * tanh(score / cap) by exp2,
/// absolute error about 1e-7 of the cap; tanh.approx would move a score of 50 by 0.02.
template <int N>
__device__ __forceinline__ void cap_scores(float (&x)[N], const BackwardParams& p) {
#pragma unroll
  for (int i = 0; i < N; i++)
    x[i] = p.scale_log2 * fmaf(-2.f, __fdividef(1.f, 1.f + ptx::exp2_approx(x[i] * p.tanh_exponent)), 1.f);
}
/// 1 - tanh^2 of a capped score, found again from P: log2 P + lse * log2(e) is the score. A P that was rounded to 0 gives a
/// finite value.
__device__ __forceinline__ float cap_slope(float probability, float negative_lse, float inverse_cap) {
  const float t = fmaxf(fminf((__log2f(probability) - negative_lse) * inverse_cap, 1.f), -1.f);
  return fmaf(-t, t, 1.f);
}

/// x = exp2(x * scale_log2 - lse * log2 e): P^T from q.k, or from capped scores. negative_lse: of this lane's first query, in
/// shared memory.
template <bool Softcap, int N>
__device__ __forceinline__ void exponentiate(float (&x)[N], const float* negative_lse, float scale_log2) {
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    const float2 l = *reinterpret_cast<const float2*>(negative_lse + j * 8);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float shift = (e & 1) ? l.y : l.x;
      x[j * 4 + e] = ptx::exp2_approx(Softcap ? x[j * 4 + e] + shift : fmaf(x[j * 4 + e], scale_log2, shift));
    }
  }
}
/// The two values of a word; of bfloat16 by one instruction each (the conversion intrinsics take two).
template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t word) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value)
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  else
    return ptx::unpack<T>(word);
}
/// x, on entry dP^T, becomes scale * (dP - delta)^T. negative_delta: -scale * delta from this lane's first query on, in shared
/// memory.
template <int N>
__device__ __forceinline__ void subtract_delta(float (&x)[N], const float* negative_delta, float scale) {
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    const float2 delta = *reinterpret_cast<const float2*>(negative_delta + j * 8);
#pragma unroll
    for (int e = 0; e < 4; e++) x[j * 4 + e] = fmaf(x[j * 4 + e], scale, (e & 1) ? delta.y : delta.x);
  }
}
/// a, on entry P^T in pairs, becomes scale * dS^T = P^T x; with a softcap times 1 - tanh^2.
template <class T, bool Softcap, int N>
__device__ __forceinline__ void score_gradients(uint32_t (&a)[N / 2], const float (&x)[N], const float* negative_lse,
                                                const BackwardParams& p) {
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    float2 l = {};
    if (Softcap) l = *reinterpret_cast<const float2*>(negative_lse + j * 8);
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float2 prob = unpack_pair<T>(a[2 * j + e]);
      if (Softcap) {
        const float2 slope = {cap_slope(prob.x, l.x, p.inverse_cap), cap_slope(prob.y, l.y, p.inverse_cap)};
        prob.x *= slope.x, prob.y *= slope.y;
      }
      a[2 * j + e] = ptx::pack<T>(prob.x * x[j * 4 + 2 * e], prob.y * x[j * 4 + 2 * e + 1]);
    }
  }
}

}  // namespace ringflash

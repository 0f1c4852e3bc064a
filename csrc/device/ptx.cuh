// PTX of sm_90a behind named functions: mbarriers, bulk tensor copies, warpgroup matrix products, register budgets.
//
// Every wrapper is one instruction (or one loop around one). No state, no policy, no template library: the kernels above
// this file read like their mathematics, and this file reads like the PTX manual.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ringflash::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// ------------------------------------------------------------------------------------------------ mbarriers
// An mbarrier completes a phase when `arrivals` threads arrived and every announced byte came. Waiters name the parity of
// the phase they wait for: 0 first; a producer that waits for a place to be free starts with parity 1, which falls through.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
/// After the last mbarrier_init, before the __syncthreads that publishes them.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
/// So many arrivals at once.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
/// Arrives if `really`: a predicated instruction, not a branch, so that ptxas still knows the loop around it to be uniform.
__device__ __forceinline__ void mbarrier_arrive_if(bool really, uint64_t* barrier) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(shared_address(barrier)),
      "r"(static_cast<int>(really))
      : "memory");
}
/// Arrives and announces `bytes` of bulk copies; bytes that a copy fills with zeros out of bounds count too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef RINGFLASH_BOUNDED_WAITS  // debugging: a lost arrival becomes a trap instead of a hang
  for (int tries = 0; !mbarrier_try_wait(barrier, parity); tries++)
    if (tries > 2000000) asm volatile("trap;");
#else
  asm volatile(
      "{\n.reg .pred p;\nRETRY:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra RETRY;\nDONE:\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// ------------------------------------------------------------------------------------------- named barriers
// 16 per CTA, 0 is __syncthreads. Ids are template arguments: with a run-time id ptxas reserves all of them. That is harmless
// where there is one CTA on a multiprocessor anyway, and one instruction instead of one per id under a predicate.

template <int Id, int Threads>
__device__ __forceinline__ void barrier_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "n"(Threads) : "memory");
}

template <int Threads>
__device__ __forceinline__ void barrier_sync(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}
template <int Threads>
__device__ __forceinline__ void barrier_arrive(int id) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}

// ------------------------------------------------------------------------------------------------- clusters

/// This CTA's number in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
/// A shared address without the CTA's rank, which in a cluster fills its high bits; for matrix descriptors.
__device__ __forceinline__ uint32_t shared_offset(const void* p) { return shared_address(p) & 0x3ffff; }
/// All threads of the cluster. Orders shared memory of both CTAs.
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// The address, among those of the cluster, of this CTA's shared memory in CTA `rank`.
__device__ __forceinline__ uint32_t cluster_address(uint32_t shared_address, uint32_t rank) {
  uint32_t r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared_address), "r"(rank));
  return r;
}
/// Arrives in another CTA. Relaxed: what it tells is that asynchronous reads are complete; a release would be a GPU-wide fence.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t cluster_address) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_address) : "memory");
}
/// Copies shared memory to another CTA's, completing a barrier there.
__device__ __forceinline__ void bulk_send(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination),
               "r"(shared_address(source)), "r"(bytes), "r"(barrier)
               : "memory");
}
/// Stores a word in another CTA, completing 4 bytes of a barrier there.
__device__ __forceinline__ void store_remote(uint32_t destination, int value, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(destination), "r"(value),
               "r"(barrier)
               : "memory");
}

// ---------------------------------------------------------------------------------- fences, register budgets

/// Ordinary shared-memory stores before this become visible to wgmma and bulk copies; by each writing thread, before the barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// The budgets of all warpgroups must fit what the launch allocated: with 384 threads 3 x 168 = 504, with 512 threads 4 x 128 =
/// 512.
template <int Registers>
__device__ __forceinline__ void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ----------------------------------------------------------------------------------------- bulk tensor copies

/// L2 policies, as cuda::createpolicy encodes them.
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
constexpr uint64_t kEvictLast = 0x14F0000000000000ull;

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
/// One box at (c0, c1, c2, c3), innermost first, into shared memory; its bytes complete `barrier`. By one thread.
__device__ __forceinline__ void tensor_load(void* destination, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                                            int c3, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
/// Brings a box into L2.
__device__ __forceinline__ void tensor_prefetch(const CUtensorMap* map, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(c0), "r"(c1), "r"(c2),
               "r"(c3)
               : "memory");
}
/// Adds a box element by element to global memory. The order between CTAs is not determined.
__device__ __forceinline__ void tensor_reduce_add(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3) {
  asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
/// Contiguous bytes, 16-byte aligned, a multiple of 16.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(destination)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void bulk_reduce_add_f32(float* destination, const void* source, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(destination),
               "r"(shared_address(source)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Until all but the last `Pending` groups of this thread have read their shared memory.
template <int Pending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
/// Until all but the last `Pending` groups of this thread are complete, in global memory too.
template <int Pending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory");
}
__device__ __forceinline__ void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
/// Float32 addition in global memory, 16 bytes at once (16-byte aligned).
__device__ __forceinline__ void reduce_add_v4(float* address, float a, float b, float c, float d) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// -------------------------------------------------------------------------------- 8x8 matrices in shared memory

/// r[0 .. 3]: with the address of row lane % 16, column (lane / 16) * 8 this is the A fragment of a 16 x 16 tile.
__device__ __forceinline__ void ldmatrix_x4(uint32_t* r, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// ------------------------------------------------------------------------------------------------ arithmetic

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
/// Two floats rounded to nearest into one word, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&v);
}
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t word) {
  return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&word));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t word) {
  return __half22float2(*reinterpret_cast<__half2*>(&word));
}

// --------------------------------------------------------------------------------- warpgroup matrix products
// D (64 x N, float32 registers) = or += A (64 x 16) B (16 x N). Thread t of the warpgroup holds, of D, rows
// (t / 32) * 16 + (t % 32) / 4 and that plus 8, columns 8 j + 2 (t % 4) and the next: d[4 j], d[4 j + 1] and d[4 j + 2],
// d[4 j + 3]. So d[8 k .. 8 k + 7], packed in pairs, is the A fragment (registers) of 16 columns k: P needs no shuffle.

/// Before the first product of a chain and after any ordinary write to its registers.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
/// Pins registers at this point of the program: accumulators after the wait that completes them, else the compiler moves
/// their readers above it; register A operands after the wait that retires them, else it reuses them too early.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
__device__ __forceinline__ void pin(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i])::"memory");
}

/// Low word of the descriptor of an operand tile in shared memory: [panel][row][64 elements of 2 bytes], each row of a panel
/// 128 bytes, 16-byte chunks swizzled by chunk ^= row % 8, panels aligned to 1024 bytes.
/// K-major (the product sums along the 128-byte rows): the next 16 of K is + 2, the next panel + rows * 8; `panel_bytes` is
/// ignored. MN-major ("transposed", the product sums over rows): panel_bytes = rows * 128 is the step to the next 64 columns, the
/// next 16 rows are + 128.
__device__ __forceinline__ uint32_t descriptor_low(uint32_t shared_address, uint32_t panel_bytes = 16) {
  return (shared_address >> 4) | ((panel_bytes >> 4) << 16);
}
/// The whole descriptor: stride of 8-row groups 1024 bytes, 128-byte swizzle.
__device__ __forceinline__ uint64_t descriptor(uint32_t low) {
  return (static_cast<uint64_t>((1024 >> 4) | (1u << 30)) << 32) | low;
}

/// Product of one K step of 16. N: columns. T: __nv_bfloat16 or __half. TransA, TransB: operand is stored MN-major.
/// *_first overwrites d ("=f": with "+f" the old values would stay alive and cost registers), the others add to it.
/// ss: A in shared memory; rs: A in four registers.
template <int N, class T, bool TransA = false, bool TransB = false>
struct Wgmma;

#define RF_OUT(x) "=f"(x)
#define RF_INOUT(x) "+f"(x)
#define RF_D8(C, i) C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), C(d[i + 7])
#define RF_D16(C) RF_D8(C, 0), RF_D8(C, 8)
#define RF_D24(C) RF_D16(C), RF_D8(C, 16)
#define RF_D32(C) RF_D24(C), RF_D8(C, 24)
#define RF_D40(C) RF_D32(C), RF_D8(C, 32)
#define RF_D48(C) RF_D40(C), RF_D8(C, 40)
#define RF_D56(C) RF_D48(C), RF_D8(C, 48)
#define RF_D64(C) RF_D56(C), RF_D8(C, 56)
#define RF_D72(C) RF_D64(C), RF_D8(C, 64)
#define RF_D80(C) RF_D72(C), RF_D8(C, 72)
#define RF_D88(C) RF_D80(C), RF_D8(C, 80)
#define RF_D96(C) RF_D88(C), RF_D8(C, 88)
#define RF_D128(C) RF_D96(C), RF_D8(C, 96), RF_D8(C, 104), RF_D8(C, 112), RF_D8(C, 120)
#define RF_L16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define RF_L24 RF_L16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define RF_L32 RF_L24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define RF_L40 RF_L32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define RF_L48 RF_L40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define RF_L56 RF_L48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define RF_L64 RF_L56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define RF_L72 RF_L64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define RF_L80 RF_L72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define RF_L88 RF_L80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define RF_L96 RF_L88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define RF_L128                                                                  \
  RF_L96                                                                         \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// i0 .. i5: the numbers of the six operands after the R = N / 2 accumulators (at most four of A, one or two descriptors, flags).
#define RF_SS(NAME, N, R, TYPE, C, COMPARE, i0, i1, i2, i3)                                                              \
  static __device__ __forceinline__ void NAME(float (&d)[R], uint64_t a, uint64_t b) {                                   \
    asm volatile("{\n.reg .pred p;\nsetp." COMPARE ".b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " {" RF_L##R "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i2 ", %" #i3 ";\n}"                          \
                 : RF_D##R(C)                                                                                            \
                 : "l"(a), "l"(b), "n"(TransA), "n"(TransB));                                                            \
  }
#define RF_RS(NAME, N, R, TYPE, C, COMPARE, i0, i1, i2, i3, i4, i5)                                                      \
  static __device__ __forceinline__ void NAME(float (&d)[R], const uint32_t* a, uint64_t b) {                            \
    asm volatile("{\n.reg .pred p;\nsetp." COMPARE ".b32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " {" RF_L##R "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", p, 1, 1, %" #i5 ";\n}"    \
                 : RF_D##R(C)                                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(TransB));                                     \
  }
#define RF_WGMMA(N, R, CPP, TYPE, i0, i1, i2, i3, i4, i5)             \
  template <bool TransA, bool TransB>                                 \
  struct Wgmma<N, CPP, TransA, TransB> {                              \
    RF_SS(ss_first, N, R, TYPE, RF_OUT, "ne", i0, i1, i2, i3)         \
    RF_SS(ss, N, R, TYPE, RF_INOUT, "eq", i0, i1, i2, i3)             \
    RF_RS(rs_first, N, R, TYPE, RF_OUT, "ne", i0, i1, i2, i3, i4, i5) \
    RF_RS(rs, N, R, TYPE, RF_INOUT, "eq", i0, i1, i2, i3, i4, i5)     \
  };
#define RF_WGMMA_BOTH(N, R, ...)                     \
  RF_WGMMA(N, R, __nv_bfloat16, "bf16", __VA_ARGS__) \
  RF_WGMMA(N, R, __half, "f16", __VA_ARGS__)
RF_WGMMA_BOTH(32, 16, 16, 17, 18, 19, 20, 21)
RF_WGMMA_BOTH(48, 24, 24, 25, 26, 27, 28, 29)
RF_WGMMA_BOTH(64, 32, 32, 33, 34, 35, 36, 37)
RF_WGMMA_BOTH(80, 40, 40, 41, 42, 43, 44, 45)
RF_WGMMA_BOTH(96, 48, 48, 49, 50, 51, 52, 53)
RF_WGMMA_BOTH(112, 56, 56, 57, 58, 59, 60, 61)
RF_WGMMA_BOTH(128, 64, 64, 65, 66, 67, 68, 69)
RF_WGMMA_BOTH(144, 72, 72, 73, 74, 75, 76, 77)
RF_WGMMA_BOTH(160, 80, 80, 81, 82, 83, 84, 85)
RF_WGMMA_BOTH(176, 88, 88, 89, 90, 91, 92, 93)
RF_WGMMA_BOTH(192, 96, 96, 97, 98, 99, 100, 101)
RF_WGMMA_BOTH(256, 128, 128, 129, 130, 131, 132, 133)

// --------------------------------------------------------------------------------- rows of an accumulator

/// Multiplies this lane's upper row of an accumulator by `upper` and its lower row by `lower`, unless both are 1 in the whole
/// warp. In PTX for the sake of bra.uni: with a branch that ptxas does not know to be uniform, every descriptor of the
/// surrounding loop leaves the uniform registers (50 instructions more in the forward's step).
template <int N>
__device__ __forceinline__ void scale_rows_unless_one(float (&d)[N], float upper, float lower);
#define RF_MUL4(a, b, c, e)                                 \
  "mul.f32 %" #a ", %" #a ", upper;\nmul.f32 %" #b ", %" #b \
  ", upper;\n"                                              \
  "mul.f32 %" #c ", %" #c ", lower;\nmul.f32 %" #e ", %" #e ", lower;\n"
#define RF_MUL32        \
  RF_MUL4(0, 1, 2, 3)   \
  RF_MUL4(4, 5, 6, 7)   \
  RF_MUL4(8, 9, 10, 11) \
  RF_MUL4(12, 13, 14, 15) RF_MUL4(16, 17, 18, 19) RF_MUL4(20, 21, 22, 23) RF_MUL4(24, 25, 26, 27) RF_MUL4(28, 29, 30, 31)
#define RF_MUL48 \
  RF_MUL32       \
  RF_MUL4(32, 33, 34, 35) RF_MUL4(36, 37, 38, 39) RF_MUL4(40, 41, 42, 43) RF_MUL4(44, 45, 46, 47)
#define RF_MUL64 \
  RF_MUL48       \
  RF_MUL4(48, 49, 50, 51) RF_MUL4(52, 53, 54, 55) RF_MUL4(56, 57, 58, 59) RF_MUL4(60, 61, 62, 63)
#define RF_MUL96          \
  RF_MUL64                \
  RF_MUL4(64, 65, 66, 67) \
  RF_MUL4(68, 69, 70, 71) \
  RF_MUL4(72, 73, 74, 75) \
  RF_MUL4(76, 77, 78, 79) RF_MUL4(80, 81, 82, 83) RF_MUL4(84, 85, 86, 87) RF_MUL4(88, 89, 90, 91) RF_MUL4(92, 93, 94, 95)
#define RF_MUL128             \
  RF_MUL96                    \
  RF_MUL4(96, 97, 98, 99)     \
  RF_MUL4(100, 101, 102, 103) \
  RF_MUL4(104, 105, 106, 107) \
  RF_MUL4(108, 109, 110, 111) \
  RF_MUL4(112, 113, 114, 115) RF_MUL4(116, 117, 118, 119) RF_MUL4(120, 121, 122, 123) RF_MUL4(124, 125, 126, 127)
#define RF_SCALE_ROWS(N, i0, i1)                                                                                \
  template <>                                                                                                   \
  __device__ __forceinline__ void scale_rows_unless_one<N>(float (&d)[N], float upper, float lower) {           \
    asm volatile("{\n.reg .pred p, q;\n.reg .f32 upper, lower;\nmov.f32 upper, %" #i0 ";\nmov.f32 lower, %" #i1 \
                 ";\n"                                                                                          \
                 "setp.neu.f32 p, upper, 0f3F800000;\nsetp.neu.or.f32 p, lower, 0f3F800000, p;\n"               \
                 "vote.sync.any.pred q, p, 0xffffffff;\n@!q bra.uni SKIP;\n" RF_MUL##N "SKIP:\n}"               \
                 : RF_D##N(RF_INOUT)                                                                            \
                 : "f"(upper), "f"(lower));                                                                     \
  }
RF_SCALE_ROWS(32, 32, 33)
RF_SCALE_ROWS(48, 48, 49)
RF_SCALE_ROWS(64, 64, 65)
RF_SCALE_ROWS(96, 96, 97)
RF_SCALE_ROWS(128, 128, 129)
#undef RF_MUL4
#undef RF_SCALE_ROWS
#undef RF_OUT
#undef RF_INOUT
#undef RF_SS
#undef RF_RS
#undef RF_WGMMA
#undef RF_WGMMA_BOTH

}  // namespace ringflash::ptx

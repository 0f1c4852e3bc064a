// Online softmax of the rows of a warpgroup accumulator (Milakov & Gimelshein 2018, as FlashAttention uses it).
#pragma once
#include "ptx.cuh"

namespace ringflash {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLog2e = 1.4426950408889634f;

/// Running statistics of this lane's two rows, in units of log2: sum over seen keys of exp2(score - max).
/// `sum` is this lane's share; the four lanes of a quad add up at the end. An empty row has max = -inf, sum = 0.
struct OnlineSoftmax {
  float max[2], sum[2];
  float decay[2];  // what the last update multiplied older terms by

  /// Starts from a running result: max = lse, sum = 1 and accumulator = out are the state that stands for it. From lse = -inf,
  /// the state of an empty row.
  __device__ __forceinline__ void start_from(float lse_upper, float lse_lower, bool first_of_quad) {
    max[0] = lse_upper * kLog2e;
    max[1] = lse_lower * kLog2e;
    sum[0] = first_of_quad && lse_upper != -INFINITY ? 1.f : 0.f;
    sum[1] = first_of_quad && lse_lower != -INFINITY ? 1.f : 0.f;
  }
  /// Takes in the scores of a tile (to be multiplied by scale_log2 > 0) and turns them into exp2(score - max).
  template <int N>
  __device__ __forceinline__ void update(float (&x)[N], float scale_log2) {
    float even[2] = {x[0], x[2]}, odd[2] = {x[1], x[3]};
#pragma unroll
    for (int i = 4; i < N; i += 4) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        even[r] = fmaxf(even[r], x[i + 2 * r]);
        odd[r] = fmaxf(odd[r], x[i + 2 * r + 1]);
      }
    }
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = fmaxf(even[r], odd[r]);
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      top = fmaxf(max[r], top * scale_log2);
      shift[r] = top == -INFINITY ? 0.f : top;  // a row that has seen nothing yet: exp2(-inf - 0) = 0, not NaN
      decay[r] = ptx::exp2_approx(max[r] - shift[r]);
      max[r] = top;
      sum[r] *= decay[r];
    }
    float other[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < N; i += 4) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float &a = x[i + 2 * r], &b = x[i + 2 * r + 1];
        a = ptx::exp2_approx(fmaf(a, scale_log2, -shift[r]));
        b = ptx::exp2_approx(fmaf(b, scale_log2, -shift[r]));
        sum[r] += a;
        other[r] += b;
      }
    }
    sum[0] += other[0];
    sum[1] += other[1];
  }
  /// Multiplies the accumulator by what update() found; skipped when no maximum of the warp moved (measured: 1-4 %).
  template <int N>
  __device__ __forceinline__ void rescale(float (&o)[N]) const {
    ptx::scale_rows_unless_one(o, decay[0], decay[1]);
  }
  /// Adds up the quad. Afterwards inverse(r) normalises row r and lse(r) is its natural log-sum-exp.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }
  }
  /// A NaN sum stays NaN: only a row that saw nothing is zero.
  __device__ __forceinline__ float inverse(int r) const { return sum[r] == 0.f ? 0.f : 1.f / sum[r]; }
  __device__ __forceinline__ float lse(int r) const { return sum[r] == 0.f ? -INFINITY : (max[r] + __log2f(sum[r])) * kLn2; }
};

/// cap * tanh(x * scale) without the factor cap, by exp2: absolute error about 1e-7. tanh.approx (5e-4 relative) would move a
/// score of 50 by 0.02 and its weight by 2 %; a polynomial where scores are small would save the last digits (error relative to
/// the score, not to 1), and took 8-15 % of the forward.
template <int N>
__device__ __forceinline__ void tanh_scores(float (&x)[N], float two_log2e_scale) {
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = fmaf(-2.f, __fdividef(1.f, 1.f + ptx::exp2_approx(x[i] * two_log2e_scale)), 1.f);
}

}  // namespace ringflash

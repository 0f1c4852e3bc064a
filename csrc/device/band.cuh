// Bands: the one mask of every kernel. A Slice (q0, q1, k0, k1, lo, hi) lets row i in [q0, q1) see key j in [k0, k1) iff
// lo <= j - i <= hi. Inside one tile this is an interval of columns per row; the producer writes the intervals beside the tile,
// so the warps that compute never meet a Slice.
#pragma once
#include <cstdint>

#include "ptx.cuh"

namespace ringflash {

/// One row's visible columns [begin, end) of a tile of at most 65535 columns, in one word.
struct Interval {
  uint32_t word;
  static __device__ __forceinline__ Interval of(int begin, int end) {
    return {static_cast<uint32_t>(begin) | (static_cast<uint32_t>(end) << 16)};
  }
  __device__ __forceinline__ int begin() const { return word & 0xffff; }
  __device__ __forceinline__ int end() const { return word >> 16; }
};

/// The columns of tile [first, first + columns) that row `row` of a Slice sees.
__device__ __forceinline__ Interval band_interval(int row, int k0, int k1, int lo, int hi, int first, int columns) {
  const int begin = min(max(max(k0, row + lo) - first, 0), columns);
  const int end = max(min(min(k1, row + hi + 1) - first, columns), begin);
  return Interval::of(begin, end);
}

/// How many of the columns that a lane owns in one row of an accumulator (8 j + c0 and the next, j = 0, 1, ..) lie below x.
__device__ __forceinline__ int columns_below(int x, int c0) {
  const int y = max(x - c0, 0);
  return 2 * (y >> 3) + min(y & 7, 2);
}

/// Writes -inf where a row does not see. x: this lane's part of a 64 x (2 N) accumulator; upper, lower: its two rows' intervals;
/// c0: its first column. The intervals become bit masks that ptxas tests with R2P: one select a score.
template <int N>
__device__ __forceinline__ void mask_scores(float (&x)[N], Interval upper, Interval lower, int c0) {
  constexpr int kOwned = N / 2;  // columns of one row in this lane
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const Interval row = r ? lower : upper;
    const int begin = columns_below(row.begin(), c0), end = columns_below(row.end(), c0);
#pragma unroll
    for (int w = 0; w < (kOwned + 31) / 32; w++) {
      const int b = max(begin - 32 * w, 0), e = max(end - 32 * w, 0);
      const uint32_t bits = (e >= 32 ? ~0u : (1u << e) - 1) & (b >= 32 ? 0u : ~0u << b);
#pragma unroll
      for (int c = 0; c < 32; c++) {
        const int i = ((w * 32 + c) >> 1) * 4 + r * 2 + (c & 1);
        if (i < N) x[i] = (bits & (1u << c)) ? x[i] : -INFINITY;
      }
    }
  }
}

}  // namespace ringflash

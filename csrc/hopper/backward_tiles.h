// What is chosen per head dimension in the backward: tile sizes and register budgets.
#pragma once

namespace ringflash {

/// Head dims up to 128 (backward_narrow.cuh). Rows: queries of a tile. A consumer's accumulators are 64 x HeadDim (twice) and 64
/// x Rows.
template <int HeadDim_, int Rows_>
struct NarrowTile {
  static constexpr int kHeadDim = HeadDim_, kRows = Rows_, kKeys = 128;
  static constexpr bool kPairs = HeadDim_ == 128;  // whether backward_pair.cuh is compiled; at D 64 it lost, at 96 it did nothing
  static constexpr int kPanels = (HeadDim_ + 63) / 64;  // of 64 columns, 128 bytes
  static constexpr int kQStages =
      3;  // with two, the consumers could not work half a step apart (measured: D 64 loses 22 % of its time)
  static constexpr int kDqBuffers = HeadDim_ > 64 ? 3 : 2;  // of boxes; as shared memory allows
  static constexpr int kPortion = 2 * kKeys * HeadDim_;     // float32 values of dk and dv
  static constexpr bool kStoresBoxes = true;                // dk and dv leave a CTA alone by the copy engine
  static constexpr bool kAdder = HeadDim_ > 64;             // a thread of its own has the boxes added, else one that makes them
  static constexpr int kThreads = 512;
  static constexpr int kConsumerRegisters = 208, kDqRegisters = 72, kProducerRegisters = 24;
  static_assert(2 * kConsumerRegisters + kDqRegisters + kProducerRegisters == 512, "the register file of a multiprocessor");
  static_assert(Rows_ == 64 || kPanels == 1, "dQ is made in at most two parts");
};

/// Head dims above 128 (backward_wide.cuh): 64 keys, whose dk and dv two warpgroups share by panels of 64 columns: the first
/// holds KPanels of dk and VPanels of dv, the second the rest.
template <int HeadDim_, int HeadDimV_, int KPanels_, int VPanels_>
struct WideTile {
  static constexpr int kHeadDim = HeadDim_, kHeadDimV = HeadDimV_, kRows = 64, kKeys = 64;
  static constexpr bool kPairs = false;
  static constexpr int kPanels = HeadDim_ / 64, kPanelsV = HeadDimV_ / 64;
  static constexpr int kDoutStages = HeadDim_ + HeadDimV_ > 384 ? 1 : 2;  // as shared memory allows
  static constexpr int kFirstK = KPanels_, kFirstV = VPanels_;
  static constexpr int kPortion = 0;
  static constexpr bool kStoresBoxes = false;
  static constexpr bool kAdder = false;
  static constexpr int kThreads = 512;
  static constexpr int kConsumerRegisters = 208, kDqRegisters = 72, kProducerRegisters = 24;
  static_assert(2 * kConsumerRegisters + kDqRegisters + kProducerRegisters == 512, "the register file of a multiprocessor");
  static_assert(HeadDim_ % 64 == 0 && HeadDimV_ % 64 == 0, "whole panels");
};

using Wide192 = WideTile<192, 192, 1, 2>;
using Wide192V128 = WideTile<192, 128, 1, 1>;
using Wide256 = WideTile<256, 256, 2, 2>;

}  // namespace ringflash

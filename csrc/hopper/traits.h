// What is chosen per head dimension: tile sizes, pipeline depths, register budgets.
#pragma once
#include <cstdint>

namespace ringflash {

/// One configuration of the forward kernel.
/// HeadDim, HeadDimV: multiples of 16 up to 256; smaller tensors are padded with zeros by the tensor map.
template <int HeadDim_, int HeadDimV_, int Consumers_, int Keys_, int QStages_, int KStages_, int VStages_, bool QInRegisters_,
          bool PingPong_, bool StagedStore_>
struct ForwardTile {
  static constexpr int kHeadDim = HeadDim_, kHeadDimV = HeadDimV_;
  static constexpr int kConsumers = Consumers_;  // warpgroups of 64 rows
  static constexpr int kRows = 64 * Consumers_, kKeys = Keys_;
  static constexpr int kQStages = QStages_, kKStages = KStages_, kVStages = VStages_;
  static constexpr int kQParts = QStages_ == 1 ? Consumers_ : 1;  // the one buffer of Q changes hands by warpgroup
  static constexpr bool kQInRegisters = QInRegisters_;            // frees Q's shared memory at once
  static constexpr bool kPingPong = PingPong_;                    // warpgroups take turns in issuing their products
  static constexpr bool kStagedStore = StagedStore_;              // final output through shared memory and the copy engine
  static constexpr int kThreads = 128 * (Consumers_ + 1);
  static constexpr int kPanels = (HeadDim_ + 63) / 64, kPanelsV = (HeadDimV_ + 63) / 64;  // of 64 columns = 128 bytes
  static constexpr int kProducerRegisters = Consumers_ == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = Consumers_ == 3 ? 160 : 232;
};

/// How long a kernel works, in cycles measured on H200: one tile, and what an item (a tile of rows of one head) costs beside
/// its tiles. The host compares variants by these.
struct ForwardCost {
  int tile, item;
};

/// The configurations in use, measured on H200; the ladder is in LOG.md. A head dim may have several variants: the host takes the
/// cheapest one for the table at hand. Elements of the list: consumers, keys, stages of Q, K, V, Q in registers, ping-pong,
/// staged store.
template <int HeadDim, int HeadDimV, int Variant = 0>
struct ForwardChoice;
template <>
struct ForwardChoice<64, 64, 0> : ForwardTile<64, 64, 3, 128, 2, 3, 3, false, true, true> {
  static constexpr ForwardCost kCost{2600, 4000};
};
template <>  // 192 rows waste work at the ends of short sequences
struct ForwardChoice<64, 64, 1> : ForwardTile<64, 64, 2, 128, 1, 4, 4, true, false, true> {
  static constexpr ForwardCost kCost{2230, 1000};
};
template <>
struct ForwardChoice<96, 96> : ForwardTile<96, 96, 2, 128, 2, 2, 2, false, false, true> {
  static constexpr ForwardCost kCost{2300, 1500};
};
template <>
struct ForwardChoice<128, 128> : ForwardTile<128, 128, 2, 128, 2, 2, 2, false, false, true> {
  static constexpr ForwardCost kCost{2500, 1500};
};
template <>
struct ForwardChoice<192, 128> : ForwardTile<192, 128, 2, 128, 1, 2, 2, false, false, false> {
  static constexpr ForwardCost kCost{3100, 2000};
};
template <>
struct ForwardChoice<192, 192> : ForwardTile<192, 192, 2, 112, 1, 2, 2, false, false, false> {
  static constexpr ForwardCost kCost{3200, 3000};
};
template <>
struct ForwardChoice<256, 256> : ForwardTile<256, 256, 2, 80, 1, 2, 2, false, false, false> {
  static constexpr ForwardCost kCost{3000, 4000};
};

}  // namespace ringflash

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
  static constexpr int kConsumers = Consumers_;      // warpgroups of 64 rows
  static constexpr int kRows = 64 * Consumers_, kKeys = Keys_;
  static constexpr int kQStages = QStages_, kKStages = KStages_, kVStages = VStages_;
  static constexpr bool kQInRegisters = QInRegisters_;  // frees Q's shared memory at once
  static constexpr bool kPingPong = PingPong_;          // warpgroups take turns in issuing their products
  static constexpr bool kStagedStore = StagedStore_;    // final output through shared memory and the copy engine
  static constexpr int kThreads = 128 * (Consumers_ + 1);
  static constexpr int kPanels = (HeadDim_ + 63) / 64, kPanelsV = (HeadDimV_ + 63) / 64;  // of 64 columns = 128 bytes
  static constexpr int kProducerRegisters = Consumers_ == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = Consumers_ == 3 ? 160 : 232;
};

/// Measured on H200; the ladder is in LOG.md. Elements of the list: consumers, keys, stages of Q, K, V, Q in registers, ping-pong, staged store.
template <int HeadDim, int HeadDimV>
struct ForwardChoice;
template <>
struct ForwardChoice<64, 64> : ForwardTile<64, 64, 3, 128, 1, 3, 3, false, true, true> {};
template <>
struct ForwardChoice<96, 96> : ForwardTile<96, 96, 2, 128, 1, 2, 2, false, true, true> {};
template <>
struct ForwardChoice<128, 128> : ForwardTile<128, 128, 2, 128, 1, 3, 2, true, true, true> {};
template <>
struct ForwardChoice<192, 128> : ForwardTile<192, 128, 2, 128, 1, 2, 2, false, true, false> {};
template <>
struct ForwardChoice<192, 192> : ForwardTile<192, 192, 2, 112, 1, 2, 2, false, false, false> {};
template <>
struct ForwardChoice<256, 256> : ForwardTile<256, 256, 2, 80, 1, 2, 2, false, false, false> {};

}  // namespace ringflash

// One instantiation of the backward for head dims up to 128.
#pragma once
#include "backward_launch.cuh"
#include "backward_narrow.cuh"
#include "backward_pair.cuh"

namespace ringflash {

template <class T, class Tile>
int launch_backward(const RfHopperBackwardParams& c, cudaStream_t stream) {
  CUtensorMap maps[7] = {};
  BackwardParams p{};
  if (const int error = backward_arguments<T, Tile>(c, maps, p)) return error;
  const bool softcap = c.softcap > 0.f;
  if constexpr (Tile::kPairs) {
    const auto launch = [&](auto kernel) { return launch_backward_kernel<Tile, PairShared<Tile>>(kernel, c, maps, p, stream); };
    if (c.pairs && c.turns)
      return softcap ? launch(backward_pair<T, Tile, true, true>) : launch(backward_pair<T, Tile, false, true>);
    if (c.pairs) return softcap ? launch(backward_pair<T, Tile, true, false>) : launch(backward_pair<T, Tile, false, false>);
  }
  const auto launch = [&](auto kernel) { return launch_backward_kernel<Tile, NarrowShared<Tile>>(kernel, c, maps, p, stream); };
  if (c.turns) return softcap ? launch(backward_narrow<T, Tile, true, true>) : launch(backward_narrow<T, Tile, false, true>);
  return softcap ? launch(backward_narrow<T, Tile, true, false>) : launch(backward_narrow<T, Tile, false, false>);
}

}  // namespace ringflash

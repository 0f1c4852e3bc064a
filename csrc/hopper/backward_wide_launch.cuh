// One instantiation of the backward for head dims above 128.
#pragma once
#include "backward_launch.cuh"
#include "backward_wide.cuh"

namespace ringflash {

template <class T, class Tile>
int launch_backward(const RfHopperBackwardParams& c, cudaStream_t stream) {
  CUtensorMap maps[7] = {};
  BackwardParams p{};
  if (const int error = backward_arguments<T, Tile>(c, maps, p)) return error;
  const auto launch = [&](auto kernel) { return launch_backward_kernel<Tile, WideShared<Tile>>(kernel, c, maps, p, stream); };
  if (c.turns) return c.softcap > 0.f ? launch(backward_wide<T, Tile, true, true>) : launch(backward_wide<T, Tile, false, true>);
  return c.softcap > 0.f ? launch(backward_wide<T, Tile, true, false>) : launch(backward_wide<T, Tile, false, false>);
}

}  // namespace ringflash

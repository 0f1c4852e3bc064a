#include "backward_narrow_launch.cuh"

namespace ringflash {
template int launch_backward<__half, NarrowTile<64, 128>>(const RfHopperBackwardParams&, cudaStream_t);
}

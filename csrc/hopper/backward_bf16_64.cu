#include "backward_narrow_launch.cuh"

namespace ringflash {
template int launch_backward<__nv_bfloat16, NarrowTile<64, 128>>(const RfHopperBackwardParams&, cudaStream_t);
}

#include "backward_wide_launch.cuh"

namespace ringflash {
template int launch_backward<__half, Wide192>(const RfHopperBackwardParams&, cudaStream_t);
}

#include "forward_launch.cuh"

namespace ringflash {
template int launch_forward<__half, ForwardChoice<96, 96>>(const RfHopperForwardParams&, cudaStream_t);
}

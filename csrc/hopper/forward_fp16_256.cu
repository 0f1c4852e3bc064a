#include "forward_launch.cuh"

namespace ringflash {
template int launch_forward<__half, ForwardChoice<256, 256>>(const RfHopperForwardParams&, cudaStream_t);
}

#include "forward_launch.cuh"

namespace ringflash {
template int launch_forward<__half, ForwardChoice<64, 64>>(const RfHopperForwardParams&, cudaStream_t);
template int launch_forward<__half, ForwardChoice<64, 64, 1>>(const RfHopperForwardParams&, cudaStream_t);
}  // namespace ringflash

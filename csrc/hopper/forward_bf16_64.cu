#include "forward_launch.cuh"

namespace ringflash {
template int launch_forward<__nv_bfloat16, ForwardChoice<64, 64>>(const RfHopperForwardParams&, cudaStream_t);
template int launch_forward<__nv_bfloat16, ForwardChoice<64, 64, 1>>(const RfHopperForwardParams&, cudaStream_t);
}  // namespace ringflash

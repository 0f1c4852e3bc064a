#include "forward_launch.cuh"

namespace ringflash {
template int launch_forward<__nv_bfloat16, ForwardChoice<192, 192>>(const RfHopperForwardParams&, cudaStream_t);
}

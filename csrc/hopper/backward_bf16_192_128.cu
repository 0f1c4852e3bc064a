#include "backward_wide_launch.cuh"

namespace ringflash {
template int launch_backward<__nv_bfloat16, Wide192V128>(const RfHopperBackwardParams&, cudaStream_t);
}

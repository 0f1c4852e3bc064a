// Kernels of one stream whose beginnings overlap the ends of those before them (programmatic dependent launch).
//
// Every kernel launched so waits (await_kernel_before) in all its threads before it touches global memory. So it ends after the
// kernel before it, and with that after all before that: whoever waits for one has waited for all (provided that kernels of
// others that are launched so wait, too).
#pragma once
#include <cuda_runtime.h>

#include <utility>

#include "../device/check.cuh"

namespace ringflash {

/// Until the kernels launched before this one are complete and their writes visible.
__device__ __forceinline__ void await_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
/// From here on CTAs of the kernel behind this one may begin where there is room for them, when all CTAs of this one have come
/// here. Not for long kernels: what waits beside them would fill the multiprocessors that they leave free for others.
__device__ __forceinline__ void let_kernel_behind_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/// kernel<<<blocks, threads, shared, stream>>>(arguments...), possibly while the kernel before it comes to its end.
template <class... Parameters, class... Arguments>
int launch_overlapping(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared, cudaStream_t stream,
                       Arguments&&... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &overlap, config.numAttrs = 1;
  RF_CUDA(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
  return RF_OK;
}

}  // namespace ringflash

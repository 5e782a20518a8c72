// Sums over groups of threads, in a fixed order.
#pragma once

namespace ccp {

constexpr unsigned kFullWarp = 0xffffffffu;

// The sum over each group of kThreads neighbouring lanes, a power of two up to 32, in every lane.
template <int kThreads, class Acc>
__device__ __forceinline__ Acc warp_group_sum(Acc value) {
  for (int offset = kThreads / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// The sum over the block's kThreads threads, in thread 0. May be called repeatedly.
template <int kThreads, class Acc>
__device__ __forceinline__ Acc block_sum(Acc value) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Acc warp_sums[kWarps];
  value = warp_group_sum<32>(value);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp) value += warp_sums[warp];
  __syncthreads();
  return value;
}

// The sum over each group of kThreads neighbouring threads, a power of two up to 32 or the block's
// kThreads, in the group's first.
template <int kThreads, class Acc>
__device__ __forceinline__ Acc group_sum(Acc value) {
  if constexpr (kThreads <= 32) {
    return warp_group_sum<kThreads>(value);
  } else {
    return block_sum<kThreads>(value);
  }
}

}  // namespace ccp

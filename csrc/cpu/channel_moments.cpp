#include "csrc/channel_moments.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/dispatch.h"

#define CCP_KERNELS "csrc/cpu/channel_moments_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace ccp::cpu {
namespace {

constexpr int64_t kGrainElements = 32768;  // fewer are not worth a thread of their own
// Positions go in blocks, whose number depends on the shape only, so that the number of threads
// does not change the result, and is bounded, so that the blocks' moments take little memory.
constexpr int64_t kShortestBlock = 1024;
constexpr int64_t kMostBlocks = 64;
constexpr int64_t kLongestRun = 1 << 14;  // shorter ones are not split among blocks

int64_t block_length(const ChannelDotLayout& layout) {
  const int64_t block = std::max(kShortestBlock, ceil_div(layout.positions, kMostBlocks));
  const int64_t run = std::max<int64_t>(1, layout.innermost().size);
  return run <= kLongestRun ? ceil_div(block, run) * run : block;
}

template <class T>
void run(const ChannelMomentsParams& params) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t channels = layout.channel.size;
  const int64_t block = block_length(layout);
  const int64_t blocks = ceil_div(layout.positions, block);
  const bool by_position = unit_stride(layout.channel) && !unit_stride(layout.innermost());
  const auto kernel = by_position ? CCP_BEST_ISA(channel_moments_by_position<T>)
                                  : CCP_BEST_ISA(channel_moments_by_row<T>);
  const int64_t tile = by_position ? channels : std::min(channels, baseline::kRowChannels);
  const int64_t items = tile == 0 ? 0 : blocks * ceil_div(channels, tile);
  const int64_t elements = std::min(block, layout.positions) * tile;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements));
  std::vector<double> parts(blocks * kMomentRows * channels);
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    kernel(params, block, parts.data(), begin, end);
  });
  for (int64_t c = 0; c < channels; ++c) {
    Moments moments;
    for (int64_t b = 0; b < blocks; ++b)
      moments.add(Moments::read(parts.data() + b * kMomentRows * channels, channels, c));
    moments.finished().write(params.out, channels, c);
  }
}

Tensor channel_moments(const Tensor& x, int64_t channel_dim) {
  const int64_t channel = check_channel_moments(x, channel_dim);
  Tensor out = torch::stable::new_empty(x, {kMomentRows, x.size(channel)}, ScalarType::Double);
  const ChannelMomentsParams params = channel_moments_params(x, channel, out);
  dispatch_floating(x.scalar_type(),
                    [&](auto type) { run<typename decltype(type)::type>(params); });
  return out;
}

}  // namespace
}  // namespace ccp::cpu

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CPU, m) {
  m.impl("channel_moments", TORCH_BOX(&ccp::cpu::channel_moments));
}

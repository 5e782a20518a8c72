#include "csrc/channel_dot.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/dispatch.h"

#define CCP_KERNELS "csrc/cpu/channel_dot_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace ccp::cpu {
namespace {

// Fewer elements than this are not worth a thread of their own.
constexpr int64_t kGrainElements = 32768;

// Positions are summed in blocks of fixed length, so that the number of threads does not change
// the result. Long rows are thereby split among threads, and rounding errors stay small.
constexpr int64_t kRowBlock = 8192;
constexpr int64_t kPositionBlock = 1024;

template <class T, class Kernel>
void run_in_blocks(const ChannelDotParams& params, int64_t block, int64_t items_per_block,
                   int64_t elements_per_item, Kernel kernel) {
  using Acc = Accumulator<T>;
  const ChannelDotLayout& layout = params.layout;
  const int64_t outputs = layout.sample.size * layout.channel.size;
  const int64_t blocks = ceil_div(layout.positions, block);
  std::vector<Acc> partial(blocks > 1 ? blocks * outputs : 0);
  Acc* sums = blocks > 1 ? partial.data() : static_cast<Acc*>(params.out);
  const int64_t grain = std::max<int64_t>(1, kGrainElements / elements_per_item);
  torch::stable::parallel_for(0, blocks * items_per_block, grain, [&](int64_t begin, int64_t end) {
    kernel(params, block, sums, begin, end);
  });
  if (blocks == 1) return;
  Acc* out = static_cast<Acc*>(params.out);
  for (int64_t i = 0; i < outputs; ++i) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial[b * outputs + i];
    out[i] = static_cast<Acc>(sum);
  }
}

template <class T>
void run(const ChannelDotParams& params) {
  const ChannelDotLayout& layout = params.layout;
  const int64_t samples = layout.sample.size, channels = layout.channel.size;
  if (unit_stride(layout.channel) && !unit_stride(layout.innermost())) {
    run_in_blocks<T>(params, kPositionBlock, samples,
                     std::min(layout.positions, kPositionBlock) * channels,
                     CCP_BEST_ISA(channel_dot_by_position<T>));
  } else {
    const auto kernel = layout.kind == LayoutKind::kRows ? CCP_BEST_ISA(channel_dot_by_row<T>)
                                                         : CCP_BEST_ISA(channel_dot_by_run<T>);
    run_in_blocks<T>(params, kRowBlock, samples * channels, std::min(layout.positions, kRowBlock),
                     kernel);
  }
}

Tensor channel_dot(const Tensor& x, const Tensor& g, int64_t channel_dim) {
  const int64_t channel = check_channel_dot(x, g, channel_dim);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(channel)}, channel_dot_dtype(x));
  const ChannelDotParams params = channel_dot_params(x, g, channel, out);
  if (out.numel() == 0) return out;
  if (params.layout.positions == 0) return torch::stable::zero_(out);
  dispatch_floating(x.scalar_type(),
                    [&](auto type) { run<typename decltype(type)::type>(params); });
  return out;
}

}  // namespace
}  // namespace ccp::cpu

STABLE_TORCH_LIBRARY_IMPL(ccp_ext, CPU, m) {
  m.impl("channel_dot", TORCH_BOX(&ccp::cpu::channel_dot));
}

// The CPU kernels of channel_dot, in every instruction set that this processor has, not only the
// best one.
#include <algorithm>

#include "channel_dot_cases.h"
#include "csrc/cpu/isa.h"
#include "csrc/params.h"
#include "testing.h"

#define CCP_KERNELS "csrc/cpu/channel_dot_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace {

using ccp::ChannelDotParams;

template <class T>
using ChannelDotKernel = void (*)(const ChannelDotParams&, int64_t, ccp::Accumulator<T>*, int64_t,
                                  int64_t);

template <class T>
void check_channel_dot(const std::string& isa, ChannelDotKernel<T> by_row,
                       ChannelDotKernel<T> by_run, ChannelDotKernel<T> by_position) {
  for (const testing::Case& test : testing::channel_dot_cases()) {
    std::mt19937 random(7);
    const auto x = testing::random_values<T>(testing::extent(test, test.x_strides), random);
    const auto g = testing::random_values<T>(testing::extent(test, test.g_strides), random);
    ChannelDotParams params{
        x.data() + test.misalignment, g.data() + test.misalignment, nullptr, {}};
    ccp::make_layout(static_cast<int64_t>(test.sizes.size()), test.sizes.data(),
                     test.x_strides.data(), test.g_strides.data(), test.channel_dim,
                     &params.layout);
    const auto expected = testing::channel_dot_reference(test, x.data() + test.misalignment,
                                                         g.data() + test.misalignment);
    const int64_t outputs = static_cast<int64_t>(expected.sum.size());
    const auto compare = [&](const std::string& name, ChannelDotKernel<T> kernel, int64_t items,
                             int64_t block) {
      const int64_t blocks = ccp::ceil_div(params.layout.positions, block);
      auto sums = testing::unwritten<ccp::Accumulator<T>>(blocks * outputs);
      const int64_t parts[] = {0, blocks * items / 3, blocks * items};
      for (int i = 0; i < 2; ++i) kernel(params, block, sums.data(), parts[i], parts[i + 1]);
      for (int64_t i = 0; i < outputs; ++i) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += sums[b * outputs + i];
        testing::expect_close(isa + ", " + name + ", " + test.name, i,
                              static_cast<ccp::Accumulator<T>>(sum), expected.sum[i],
                              expected.magnitude[i]);
      }
    };
    for (const int64_t block : {params.layout.positions, params.layout.positions / 3 + 1}) {
      if (params.layout.kind == ccp::LayoutKind::kRows) compare("by row", by_row, outputs, block);
      compare("by run", by_run, outputs, block);
      if (unit_stride(params.layout.channel))
        compare("by position", by_position, params.layout.sample.size, block);
    }
  }
}

#define CHECK_CHANNEL_DOT(name, type)                                               \
  check_channel_dot<type>(name, channel_dot_by_row<type>, channel_dot_by_run<type>, \
                          channel_dot_by_position<type>)

#define CHECK_ISA(isa)                      \
  do {                                      \
    using namespace ccp::cpu::isa;          \
    std::printf("%s\n", #isa);              \
    CHECK_CHANNEL_DOT(#isa, float);         \
    CHECK_CHANNEL_DOT(#isa, double);        \
    CHECK_CHANNEL_DOT(#isa, ccp::BFloat16); \
    CHECK_CHANNEL_DOT(#isa, ccp::Half);     \
  } while (0)

}  // namespace

#include "cpu_main.h"

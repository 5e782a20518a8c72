// The CPU kernels of channel_moments, in every instruction set that this processor has.
#include "channel_moments_cases.h"
#include "csrc/cpu/isa.h"

#define CCP_KERNELS "csrc/cpu/channel_moments_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace {

using ccp::ChannelMomentsParams;
using ccp::Moments;

using Kernel = void (*)(const ChannelMomentsParams&, int64_t, double*, int64_t, int64_t);

constexpr int64_t kBlock = 100;  // positions

template <class T>
void check(const std::string& isa, Kernel by_row, Kernel by_position) {
  for (testing::MomentsCase test : testing::channel_moments_cases()) {
    const std::string name = test.name;
    const auto compare = [&](const std::string& kernel_name, Kernel kernel, bool one_channel) {
      test.name = isa + ", " + kernel_name + ", " + name;
      testing::check_channel_moments<T>(test, [&](const ChannelMomentsParams& params) {
        if (!one_channel && !unit_stride(params.layout.channel)) kernel = by_row;
        const int64_t channels = params.layout.channel.size;
        const int64_t blocks = ccp::ceil_div(params.layout.positions, kBlock);
        auto parts = testing::unwritten<double>(blocks * ccp::kMomentRows * channels);
        const int64_t tiles = ccp::ceil_div(channels, ccp::cpu::baseline::kRowChannels);
        kernel(params, kBlock, parts.data(), 0, kernel == by_row ? blocks * tiles : blocks);
        for (int64_t c = 0; c < channels; ++c) {
          Moments moments;
          for (int64_t b = 0; b < blocks; ++b)
            moments.add(Moments::read(parts.data() + b * ccp::kMomentRows * channels, channels, c));
          moments.finished().write(params.out, channels, c);
        }
      });
    };
    compare("by row", by_row, true);
    compare("by position", by_position, false);
  }
}

#define CHECK_ISA(isa)                                                                        \
  do {                                                                                        \
    using namespace ccp::cpu::isa;                                                            \
    std::printf("%s\n", #isa);                                                                \
    check<float>(#isa, channel_moments_by_row<float>, channel_moments_by_position<float>);    \
    check<double>(#isa, channel_moments_by_row<double>, channel_moments_by_position<double>); \
    check<ccp::BFloat16>(#isa, channel_moments_by_row<ccp::BFloat16>,                         \
                         channel_moments_by_position<ccp::BFloat16>);                         \
    check<ccp::Half>(#isa, channel_moments_by_row<ccp::Half>,                                 \
                     channel_moments_by_position<ccp::Half>);                                 \
  } while (0)

}  // namespace

#include "cpu_main.h"

// The CPU kernels of map_similarity, in every instruction set that this processor has.
#include "csrc/cpu/isa.h"
#include "csrc/triangle.h"
#include "map_similarity_cases.h"

#define CCP_KERNELS "csrc/cpu/map_similarity_kernels.h"
#include "csrc/cpu/for_each_isa.h"

namespace {

using ccp::Accumulator;
using ccp::MapSimilarityParams;
using ccp::SimilarityKind;

// What the launcher does, in one part and one sample at a time.
template <class T, class Pack, class Add>
void run(const MapSimilarityParams& params, int64_t width, int64_t packed_size, Pack pack,
         Add add) {
  using Acc = Accumulator<T>;
  const auto& layout = params.maps.layout;
  const int64_t channels = layout.channel.size, panels = ccp::ceil_div(channels, width);
  std::vector<Acc> rows(panels * packed_size), columns(panels * packed_size);
  std::vector<Acc> sums(panels * panels * width * width);
  for (int64_t n = 0; n < layout.sample.size; ++n) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      pack(params, false, n, panel, rows.data() + panel * packed_size);
      pack(params, true, n, panel, columns.data() + panel * packed_size);
    }
    for (int64_t tile = 0; tile < panels * panels; ++tile) {
      const int64_t row = tile / panels, column = tile % panels;
      add(rows.data() + row * packed_size, columns.data() + column * packed_size, layout.positions,
          std::min(width, channels - row * width), std::min(width, channels - column * width),
          params.symmetric && row == column, sums.data() + tile * width * width);
    }
  }
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t j = 0; j < channels; ++j) {
      const int64_t tile = i / width * panels + j / width;
      static_cast<Acc*>(params.maps.out)[i * channels + j] =
          sums[(tile * width + i % width) * width + j % width] /
          static_cast<Acc>(layout.sample.size);
    }
  }
}

#define CHECK_TYPE(T, tolerance)                                                            \
  for (testing::MapCase test : testing::map_similarity_cases()) {                           \
    test.name = isa + ", " + test.name;                                                     \
    testing::check_map_similarity<T, Accumulator<T>>(                                       \
        test, tolerance, [](const MapSimilarityParams& params) {                            \
          ccp::with_kind(params.kind, [&](auto kind) {                                      \
            run<T>(params, panel_width<Accumulator<T>>(),                                   \
                   packed_size<Accumulator<T>>(params.maps.layout.positions), pack_maps<T>, \
                   add_similarities<decltype(kind)::value, Accumulator<T>>);                \
          });                                                                               \
        });                                                                                 \
  }

#define CHECK_ISA(isa_name)             \
  do {                                  \
    using namespace ccp::cpu::isa_name; \
    const std::string isa = #isa_name;  \
    std::printf("%s\n", isa.c_str());   \
    CHECK_TYPE(float, 2e-6);            \
    CHECK_TYPE(double, 1e-12);          \
    CHECK_TYPE(ccp::BFloat16, 2e-6);    \
    CHECK_TYPE(ccp::Half, 2e-6);        \
  } while (0)

}  // namespace

#include "cpu_main.h"

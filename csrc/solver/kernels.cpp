#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../cpu/isa.h"

namespace ccp::cpu {
using solver::FloatProduct;
using solver::GainTerms;
}  // namespace ccp::cpu

#define CCP_KERNELS "row_kernels.h"
#include "../cpu/for_each_isa.h"

namespace ccp::cpu {
namespace {

solver::RowKernels best_kernels() { return CCP_BEST_ISA(row_kernels)(); }

}  // namespace
}  // namespace ccp::cpu

namespace ccp::solver {

const RowKernels rows = cpu::best_kernels();

}  // namespace ccp::solver

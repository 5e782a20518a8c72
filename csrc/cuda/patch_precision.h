// What the kernels of the patch products may do to their inputs.
#pragma once

namespace ccp {

enum class PatchPrecision {
  kExact,  // products exact to the accumulator's type
  kTf32,   // float32 inputs rounded to TF32
};

}  // namespace ccp

// Plain data that crosses between the portable code and the per-ISA kernels. Nothing here may be an inline function (see kernels/real.h).
#pragma once

#include <stdint.h>

namespace fused_opt {

constexpr int kMaxStates = 3;

// A stretch of one parameter and what belongs to it: `count` elements, densely packed, all of one dtype.
struct Run {
  void* param;
  const void* grad;
  void* states[kMaxStates];
  int64_t count;
};

using Kernel = void (*)(const double* scalars, const Run& run);

enum class Dtype : uint8_t { kFloat32, kFloat64 };
constexpr int kDtypes = 2;

struct KernelsByDtype {
  Kernel at[kDtypes];
};

// For each rule an array indexed by its flags.
struct KernelTable {
  const char* isa;
  const KernelsByDtype* adam;
  const KernelsByDtype* rmsprop;
  const KernelsByDtype* sgd;
};

// For each rule: its flag bits and the order of its scalars.
namespace adam {
enum Flag : unsigned { kAmsgrad = 1, kL2 = 2 };
constexpr unsigned kFlagCombinations = 4;
enum Scalar { kSign, kDecay, kKeep, kOneMinusBeta1, kBeta2, kOneMinusBeta2, kSqrtBiasCorrection2, kEps, kNegativeStepSize, kScalars };
}  // namespace adam

namespace rmsprop {
enum Flag : unsigned { kCentered = 1, kMomentum = 2, kL2 = 4 };
constexpr unsigned kFlagCombinations = 8;
enum Scalar { kSign, kDecay, kAlpha, kOneMinusAlpha, kEps, kMu, kNegativeLr, kScalars };
}  // namespace rmsprop

namespace sgd {
enum Flag : unsigned { kMomentum = 1, kNesterov = 2, kFirst = 4, kL2 = 8 };
constexpr unsigned kFlagCombinations = 16;
enum Scalar { kSign, kDecay, kMu, kOneMinusDampening, kNegativeLr, kScalars };
}  // namespace sgd

}  // namespace fused_opt

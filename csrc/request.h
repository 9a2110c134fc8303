// Plain data that crosses between the portable code and the per-ISA kernels. Nothing here may be an inline function (see kernels/real.h).
#pragma once

#include <stdint.h>

namespace fused_opt {

// A rule's operands, in this order: the parameter, its gradient, its states.
constexpr int kParam = 0, kGrad = 1, kFirstState = 2;
constexpr int kMaxStates = 3;
constexpr int kMaxOperands = kFirstState + kMaxStates;

// The operands of stages, which come after: each is there or not. A companion has what a weight's own 16 bits leave out.
constexpr int kMask = kMaxOperands, kAnchor = kMask + 1, kAverage = kMask + 2, kCompanion = kMask + 3;
constexpr int kStageOperands = 4;
constexpr int kAllOperands = kMaxOperands + kStageOperands;

// What a rule computes in: float or double.
enum class Precision : uint8_t { kSingle, kDouble };
constexpr int kPrecisions = 2;

// How a value is stored by itself. The first two are the precisions themselves. The last two only stages use: there are codecs for them,
// but no rule computes with them.
enum class Format : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kBool, kInt16 };
constexpr int kFormats = 4, kStoredFormats = 6;
constexpr int kFormatBytes[kStoredFormats] = {4, 8, 2, 2, 1, 2};
constexpr const char* kFormatNames[kStoredFormats] = {"float32", "float64", "bfloat16", "float16", "bool", "int16"};

// 8-bit codes of blocks of values, each block with a scale. States have kMuLaw, or kUnsignedMuLaw if they are never negative (see
// kernels/code8.h).
enum class Code : uint8_t { kLinear, kMuLaw, kUnsignedMuLaw };
constexpr int kCodes = 3;
constexpr const char* kCodeNames[kCodes] = {"linear", "mulaw", "unsigned_mulaw"};
constexpr int64_t kMinBlock = 32, kMaxBlock = 4096;

// Threads' shares of a tensor end at multiples of this many elements: two cache lines of fp32, one of 16-bit numbers, and a whole number of
// what kernels take at once. torch aligns new tensors to cache lines, so two threads seldom write to the same one. States in 8-bit codes
// are shared out by blocks, which are as long or longer.
constexpr int64_t kShareUnit = 32;

// `count` elements of each operand, densely packed in the kernel's own format, at any address.
struct Run {
  void* operands[kMaxOperands];
  int64_t count;
  int64_t first;  // position of the first element in the tensors, a multiple of kShareUnit and of the block size
  // Of kernels that round stochastically; else unused.
  const double* stage_scalars;
  int64_t number;  // of the parameter in its group
  // Of kernels for states in 8-bit codes; else unused.
  int64_t block_size;        // the last block of a tensor may be shorter
  void* scales[kMaxStates];  // of all blocks of the tensors, fp32
};

using Kernel = void (*)(const double* scalars, const Run& run);

// Those for 16-bit formats compute in single precision.
struct KernelsByFormat {
  Kernel at[kFormats];
  Kernel blocks[kFormats];  // for states in 8-bit codes, by the format of parameter and gradient; null if there can be none
  // For bfloat16, and the second for such codes: they round the parameter stochastically. Null if that is left to a stage.
  Kernel stochastic, stochastic_blocks;
};

// Between memory, `stride` elements from one value to the next, and densely packed numbers of a precision.
struct Codec {
  void (*decode)(const void* stored, int64_t stride, void* real, int64_t count);
  void (*encode)(const void* real, void* stored, int64_t stride, int64_t count);
};

struct CodecsByFormat {
  Codec at[kStoredFormats];
};

// What is done to numbers before and after a rule: see kernels/stages.h, and fused_opt/stages.py for the meaning of flags and scalars.
namespace stage {
enum Flag : unsigned {
  kClamp = 1,
  kSubgradient = 2,
  kPull = 4,
  kMasked = 8,
  kShrink = 16,
  kProximal = 32,
  kAveraged = 64,
  kStochastic = 128,
  kKahan = 256,
  kSplit = 512,
  kMaster = 1024
};
constexpr unsigned kOfGradient = kClamp | kSubgradient | kPull | kMasked;
constexpr unsigned kWithCompanion = kKahan | kSplit | kMaster;
constexpr unsigned kFlagCombinations = 2048;
// By which the operands from kMask on are used.
constexpr unsigned kUses[kStageOperands] = {kMasked, kPull, kAveraged, kWithCompanion};
enum Scalar { kFactor, kLimit, kL1, kAnchorDecay, kKeep, kThreshold, kAverageWeight, kSeed, kStep, kScalars };
}  // namespace stage

// Densely packed numbers of a precision, `count` of each operand; an operand that no stage needs may be null.
struct Tile {
  void* operands[kAllOperands];
  int64_t count;
  int64_t first;   // position of the first element in the tensors
  int64_t number;  // of the parameter in its group
  Format format;   // in which the parameter is stored
};

using Stages = void (*)(unsigned flags, const double* scalars, const Tile& tile);
struct StagesByPrecision {
  Stages before, after;
};

// Sums of squares and largest magnitudes, NaN if there is one, of numbers of a precision.
struct Norms {
  double (*sum_of_squares)(const void* real, int64_t count);
  double (*largest)(const void* real, int64_t count);
};

// How the fraction of a code is rounded, in 2^-14 of the distance between two codes; see Offsets in kernels/code8.h.
struct Rounding {
  uint16_t first, step;
};

// Between the codes of a block and its values, kMaxBlock at the most.
struct BlockCodec {
  void (*decode)(const uint8_t* codes, float scale, float* values, int64_t count, bool stream);  // `stream`: past the caches
  void (*encode)(const float* values, int64_t count, float scale, Rounding rounding, uint8_t* codes);
};

struct BlockCodecs {
  BlockCodec at[kCodes];
  uint32_t (*largest_magnitude)(const float* values, int64_t count);  // as bits
  float (*scale_of)(uint32_t largest);
  Rounding (*rounding_of)(bool stochastic, uint64_t seed, int64_t block);
};

struct KernelTable {
  const char* isa;
  // For each rule an array indexed by its flags.
  const KernelsByFormat* adam;
  const KernelsByFormat* rmsprop;
  const KernelsByFormat* sgd;
  const CodecsByFormat* codecs;     // indexed by precision
  const StagesByPrecision* stages;  // likewise
  const Norms* norms;               // likewise
  const BlockCodecs* block_codecs;
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

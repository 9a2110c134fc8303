// Compares between ISAs what isa_bits.cpp does not run by itself: the loops before and after a rule, norms, and the kernels that round
// parameters stochastically, which must have the bits of the float32 kernel and the stage for it.
#include <string>

#include "bits.h"

namespace bits {
namespace {

constexpr int64_t kFirst = 7 * kShareUnit;  // the tile's place in its tensors: in the middle of a draw of random numbers
constexpr int64_t kNumber = 3;
void stage_scalars(double* s) {
  s[stage::kFactor] = 0.37;
  s[stage::kLimit] = 0.01;
  s[stage::kL1] = 1e-3;
  s[stage::kAnchorDecay] = 0.02;
  s[stage::kKeep] = 0.999;
  s[stage::kThreshold] = 1e-3;
  s[stage::kAverageWeight] = 0.1;
  s[stage::kSeed] = 12345;
  s[stage::kStep] = 17;
}

void write_real(int precision, char* array, int64_t i, double x) {
  if (precision == 0) {
    const float single = static_cast<float>(x);
    memcpy(array + i * 4, &single, 4);
  } else {
    memcpy(array + i * 8, &x, 8);
  }
}

alignas(64) char operands[kAllOperands][(kMaxLength + kGuard) * 8];

// A weight with a companion is one of the numbers that its format has, and so is what its rounding left out; a mask is 0 or 1.
void make_operands(int precision, Format stored, bool with_companion) {
  const Layout& real = kLayouts[precision];
  uint64_t seed = 0;
  for (int k = 0; k < kAllOperands; ++k)
    for (int64_t i = 0; i < kMaxLength + kGuard; ++i) {
      uint64_t x = real.value(++seed, false);
      const bool is_weight = with_companion && (k == kParam || k == kCompanion);
      if (is_weight && stored == Format::kBFloat16) x &= 0xffff0000;
      real.write(operands[k], i, x);
      if (is_weight && stored == Format::kFloat16)  // nine bits of whole numbers and halves
        write_real(precision, operands[k], i, static_cast<double>(mix(seed) % 1024) / 2 - 256);
      if (k == kMask) write_real(precision, operands[k], i, static_cast<double>(mix(seed) & 1));
    }
}

// The companion of split weights: a whole number, decoded from 16 bits.
void make_lower_halves() {
  for (int64_t i = 0; i < kMaxLength + kGuard; ++i) write_real(0, operands[kCompanion], i, static_cast<double>(mix(i) % 65536) - 32768);
}

void check_loops(int precision, unsigned flags, Format stored, const std::vector<Isa>& isas, Count& count) {
  const Layout& real = kLayouts[precision];
  const Count before = count;
  double scalars[stage::kScalars];
  stage_scalars(scalars);
  make_operands(precision, stored, flags & stage::kWithCompanion);
  if (flags & stage::kSplit) make_lower_halves();
  std::vector<char> start(sizeof operands), reference(sizeof operands);
  memcpy(start.data(), operands, sizeof operands);
  const auto at = [](const std::vector<char>& all, int k) { return all.data() + static_cast<size_t>(k) * sizeof operands[0]; };
  for (const Isa& isa : isas) {
    const auto run = [&](int64_t length) {
      memcpy(operands, start.data(), sizeof operands);
      Tile tile = {};
      for (int k = 0; k < kAllOperands; ++k) tile.operands[k] = operands[k];
      tile.count = length;
      tile.first = kFirst;
      tile.number = kNumber;
      tile.format = stored;
      isa.table->stages[precision].before(flags, scalars, tile);
      isa.table->stages[precision].after(flags, scalars, tile);
    };
    if (&isa == &isas[0]) {
      run(kMaxLength);
      memcpy(reference.data(), operands, sizeof operands);
    }
    for (const int64_t length : kLengths) {
      run(length);
      for (int k = 0; k < kAllOperands; ++k)
        for (int64_t i = 0; i < length + kGuard; ++i)
          count.compare(real.read(operands[k], i), real.read(i < length ? at(reference, k) : at(start, k), i));
    }
  }
  uint64_t hash = 0;
  for (int k = 0; k < kAllOperands; ++k)
    for (int64_t i = 0; i < kMaxLength; ++i) hash = mix(hash ^ real.read(at(reference, k), i));
  char what[32];
  snprintf(what, sizeof what, "stages %u", flags);
  print_line(what, kFormatNames[static_cast<int>(stored)], count - before, hash);
}

void check_norms(int precision, const std::vector<Isa>& isas, Count& count) {
  const Count before = count;
  uint64_t hash = 0;
  make_operands(precision, static_cast<Format>(precision), false);
  for (const bool finite : {true, false}) {
    if (finite)
      for (int64_t i = 0; i < kMaxLength; ++i)
        write_real(precision, operands[0], i, (static_cast<double>(mix(i) >> 12) / 1e15 - 2) * (i % 3 == 0 ? 1e-9 : 1));
    const char* const numbers = operands[finite ? 0 : 1];
    for (const int64_t length : kLengths)
      for (double (*Norms::*norm)(const void*, int64_t) : {&Norms::sum_of_squares, &Norms::largest}) {
        uint64_t expected = 0;
        for (const Isa& isa : isas) {
          const double found = (isa.table->norms[precision].*norm)(numbers, length);
          const uint64_t bits = kLayouts[1].read(reinterpret_cast<const char*>(&found), 0);
          if (&isa == &isas[0]) expected = bits;
          count.compare(bits, expected);
        }
        hash = mix(hash ^ expected);
      }
  }
  print_line("norms", kFormatNames[precision], count - before, hash);
}

// Numbers in bfloat16: parameter, gradient, and states, which are never negative.
struct Shorts {
  std::vector<uint16_t> operands[kMaxOperands];
  std::vector<uint8_t> codes[kMaxStates];
  std::vector<float> scales[kMaxStates];

  explicit Shorts(int64_t length, int64_t block_size) {
    uint64_t seed = 0;
    for (int k = 0; k < kMaxOperands; ++k)
      for (int64_t i = 0; i < length; ++i) {
        const double x = static_cast<double>(mix(++seed) >> 12) / static_cast<double>(uint64_t(1) << 52) - (k < kFirstState ? 0.5 : 0);
        const float single = static_cast<float>(x);
        uint32_t bits;
        memcpy(&bits, &single, 4);
        operands[k].push_back(static_cast<uint16_t>(bits >> 16));
      }
    for (int s = 0; s < kMaxStates; ++s) {
      for (int64_t i = 0; i < length; ++i) codes[s].push_back(static_cast<uint8_t>(mix(++seed)));
      for (int64_t i = 0; i < (length + block_size - 1) / block_size; ++i) scales[s].push_back(0.01f * static_cast<float>(i % 7 + 1));
    }
  }
};

// A step of numbers in bfloat16 with states in bfloat16 or, `in_blocks`, in codes.
void step(const Isa& isa, const Rule& rule, unsigned flags, bool in_blocks, int64_t block_size, bool in_kernel, Shorts& n) {
  const KernelsByFormat& kernels = (isa.table->*rule.kernels)[flags];
  const int64_t length = static_cast<int64_t>(n.operands[0].size());
  const Codec& codec = isa.table->codecs[0].at[static_cast<int>(Format::kBFloat16)];
  double scalars[32], of_stages[stage::kScalars];
  rule.scalars(0, scalars);
  stage_scalars(of_stages);
  std::vector<float> reals[kMaxOperands];
  Run run = {};
  run.count = length;
  run.first = in_blocks ? 0 : kFirst;
  run.stage_scalars = of_stages;
  run.number = kNumber;
  run.block_size = block_size;
  const auto is_coded = [&](int k) { return in_blocks && k >= kFirstState; };
  for (int k = 0; k < kMaxOperands; ++k) {
    reals[k].resize(static_cast<size_t>(length) + 1);
    if (is_coded(k)) {
      run.operands[k] = n.codes[k - kFirstState].data();
      run.scales[k - kFirstState] = n.scales[k - kFirstState].data();
    } else if (in_kernel) {
      run.operands[k] = n.operands[k].data();
    } else {
      codec.decode(n.operands[k].data(), 1, reals[k].data(), length);
      run.operands[k] = reals[k].data();
    }
  }
  if (in_kernel) return (in_blocks ? kernels.stochastic_blocks : kernels.stochastic)(scalars, run);
  (in_blocks ? kernels.blocks : kernels.at)[static_cast<int>(Format::kFloat32)](scalars, run);
  Tile tile = {};
  tile.operands[kParam] = reals[kParam].data();
  tile.count = length;
  tile.first = run.first;
  tile.number = kNumber;
  tile.format = Format::kBFloat16;
  isa.table->stages[0].after(stage::kStochastic, of_stages, tile);
  for (int k = 0; k < kMaxOperands; ++k)
    if (k != kGrad && !is_coded(k)) codec.encode(reals[k].data(), n.operands[k].data(), 1, length);
}

void check_stochastic_kernel(const Rule& rule, unsigned flags, bool in_blocks, const std::vector<Isa>& isas, Count& count) {
  if (in_blocks && (isas[0].table->*rule.kernels)[flags].blocks[0] == nullptr) return;
  const Count before = count;
  uint64_t hash = 0;
  for (const int64_t block_size : {32, 256, 4096})
    for (const int64_t length : kLengths) {
      Shorts expected(length, block_size);
      step(isas[0], rule, flags, in_blocks, block_size, false, expected);
      for (const Isa& isa : isas) {
        const KernelsByFormat& kernels = (isa.table->*rule.kernels)[flags];
        if ((in_blocks ? kernels.stochastic_blocks : kernels.stochastic) == nullptr) continue;
        Shorts found(length, block_size);
        step(isa, rule, flags, in_blocks, block_size, true, found);
        for (size_t i = 0; i < static_cast<size_t>(length); ++i) {
          for (int k = 0; k < kMaxOperands; ++k) count.compare(found.operands[k][i], expected.operands[k][i]);
          for (int s = 0; s < kMaxStates; ++s) count.compare(found.codes[s][i], expected.codes[s][i]);
        }
        for (int s = 0; s < kMaxStates; ++s) count.compare(found.scales[s] != expected.scales[s], false);
      }
      for (const auto& numbers : expected.operands)
        for (const uint16_t x : numbers) hash = mix(hash ^ x);
    }
  char what[32];
  snprintf(what, sizeof what, "%s flags %u", rule.name, flags);
  print_line(what, in_blocks ? "stochastic int8" : "stochastic", count - before, hash);
}

}  // namespace

void check_stages(const std::vector<Isa>& isas, Count& count) {
  using namespace stage;
  constexpr unsigned kAll = kOfGradient | kShrink | kProximal | kAveraged;
  for (const int precision : {0, 1}) {
    for (unsigned flag = 1; flag <= kAveraged; flag *= 2) check_loops(precision, flag, static_cast<Format>(precision), isas, count);
    check_loops(precision, kAll, static_cast<Format>(precision), isas, count);
    check_norms(precision, isas, count);
  }
  for (const unsigned others : {0u, kAll}) {
    for (const unsigned weights : {+kStochastic, +kKahan, +kSplit, +kMaster})
      check_loops(0, others | weights, Format::kBFloat16, isas, count);
    for (const unsigned weights : {+kKahan, +kMaster}) check_loops(0, others | weights, Format::kFloat16, isas, count);
  }
  for (const Format stored : {Format::kBFloat16, Format::kFloat16}) check_loops(0, kAll, stored, isas, count);
  for (const bool in_blocks : {false, true})
    for (const Rule& rule : kRules)
      for (unsigned flags = 0; flags < rule.flag_combinations; ++flags) check_stochastic_kernel(rule, flags, in_blocks, isas, count);
}

}  // namespace bits

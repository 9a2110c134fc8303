// Runs every kernel of several ISAs on the same data and compares the bits of everything they may write.
//
//   isa_bits ISA...   (of: scalar, and on x86-64 avx2 and avx512; the first is the reference)
//
// An element's data depends on its index alone, so one full-length run of the reference says what the element must
// become for every ISA, length and base pointer; past the length nothing may change. Any two NaNs count as equal.
// Links the objects of csrc/kernels/table.cpp and is static: an emulated machine holds nothing else (avx512.sh, aarch64.sh).
#include <stdio.h>
#include <string.h>

#include <vector>

#include "request.h"

namespace fused_opt::scalar {
extern const KernelTable kernel_table;
}
#if defined(__x86_64__)
namespace fused_opt::avx2 {
extern const KernelTable kernel_table;
}
namespace fused_opt::avx512 {
extern const KernelTable kernel_table;
}
#endif

namespace {

using namespace fused_opt;

constexpr int64_t kLengths[] = {0, 1, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 4099};
constexpr int64_t kMaxLength = 4099;
constexpr int64_t kGuard = 32;  // elements after the last that must stay as they are
constexpr int kSteps = 4;
constexpr int kArrays = 1 + kMaxStates;  // param and the states, used or not
constexpr int kLayouts = 3;              // every base pointer at a 64-byte boundary, every one an element past it, each elsewhere

struct Isa {
  const char* name;
  const KernelTable* table;
} constexpr kIsas[] = {
    {"scalar", &scalar::kernel_table},
#if defined(__x86_64__)
    {"avx2", &avx2::kernel_table},
    {"avx512", &avx512::kernel_table},
#endif
};

// The scalars differ from step to step: both signs, both branches of Lerp (split at weight one half), decay and none.
double sign(int step) { return step == 2 ? -1 : 1; }
double decay(int step) { return step == 3 ? 0 : 0.013; }
double weight(int step) { return step == 1 ? 0.75 : 0.1; }

void adam_scalars(int step, double* s) {
  s[adam::kSign] = sign(step);
  s[adam::kDecay] = decay(step);
  s[adam::kKeep] = 1 - 1e-3 * decay(step);
  s[adam::kOneMinusBeta1] = weight(step);
  s[adam::kBeta2] = 0.999;
  s[adam::kOneMinusBeta2] = 1 - 0.999;
  s[adam::kSqrtBiasCorrection2] = 0.03 * (step + 1);
  s[adam::kEps] = 1e-8;
  s[adam::kNegativeStepSize] = -1e-2 / (step + 1);
}

void rmsprop_scalars(int step, double* s) {
  s[rmsprop::kSign] = sign(step);
  s[rmsprop::kDecay] = decay(step);
  s[rmsprop::kAlpha] = 1 - weight(step);
  s[rmsprop::kOneMinusAlpha] = weight(step);
  s[rmsprop::kEps] = 1e-8;
  s[rmsprop::kMu] = 0.9;
  s[rmsprop::kNegativeLr] = -1e-2;
}

void sgd_scalars(int step, double* s) {
  s[sgd::kSign] = sign(step);
  s[sgd::kDecay] = decay(step);
  s[sgd::kMu] = 0.9;
  s[sgd::kOneMinusDampening] = 1 - weight(step);
  s[sgd::kNegativeLr] = -1e-2;
}

struct Rule {
  const char* name;
  const KernelsByDtype* KernelTable::* kernels;
  unsigned flag_combinations;
  void (*scalars)(int step, double* s);
} constexpr kRules[] = {
    {"adam", &KernelTable::adam, adam::kFlagCombinations, adam_scalars},
    {"rmsprop", &KernelTable::rmsprop, rmsprop::kFlagCombinations, rmsprop_scalars},
    {"sgd", &KernelTable::sgd, sgd::kFlagCombinations, sgd_scalars},
};

template <class T>
uint64_t bits(T x) {  // the same for every NaN
  uint64_t b = x == x ? 0 : ~uint64_t(0);
  if (x == x) memcpy(&b, &x, sizeof x);
  return b;
}

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// Of 64 values 56 of ordinary size, 4 of any magnitude, and a subnormal, a zero, an infinity and a NaN.
template <class T>
T value(uint64_t seed, bool seldom_negative) {
  constexpr int kFractionBits = sizeof(T) == 4 ? 23 : 52, kMaxExponent = sizeof(T) == 4 ? 255 : 2047;
  const uint64_t random = mix(seed), kind = random >> 58;
  const bool negative = (random >> 55 & (seldom_negative ? 7 : 1)) == 0;
  uint64_t exponent = kind < 56 ? kMaxExponent / 2 - 9 + random % 13 : 1 + random % (kMaxExponent - 1);
  if (kind >= 60) exponent = kind < 62 ? 0 : kMaxExponent;
  const uint64_t fraction = kind == 61 || kind == 62 ? 0 : mix(random) >> (64 - kFractionBits) | 1;
  const uint64_t all = uint64_t(negative) << (8 * sizeof(T) - 1) | exponent << kFractionBits | fraction;
  T x;
  memcpy(&x, &all, sizeof x);  // little-endian
  return x;
}

template <class T>
struct Test {
  T start[kArrays][kMaxLength + kGuard], grad[kSteps][kMaxLength], reference[kArrays][kMaxLength + kGuard];
  alignas(64) T memory[kArrays + 1][(kMaxLength + kGuard + kArrays + 63) / 64 * 64];  // the last one is the gradient
  long long compared = 0, differing = 0;

  Test() {
    uint64_t seed = 0;
    for (int a = 0; a < kArrays; ++a)  // second moments are among the states
      for (T& x : start[a]) x = value<T>(++seed, a > 0);
    for (auto& step : grad)
      for (T& x : step) x = value<T>(++seed, false);
  }

  T* base(int array, int layout) { return memory[array] + (layout == 2 ? array : layout); }

  void run_steps(const Rule& rule, Kernel kernel, int64_t length, int layout) {
    for (int a = 0; a < kArrays; ++a) memcpy(base(a, layout), start[a], (length + kGuard) * sizeof(T));
    for (int step = 0; step < kSteps; ++step) {
      memcpy(base(kArrays, layout), grad[step], length * sizeof(T));
      double scalars[32];
      rule.scalars(step, scalars);
      Run run = {base(0, layout), base(kArrays, layout), {}, length};
      for (int s = 0; s < kMaxStates; ++s) run.states[s] = base(1 + s, layout);
      kernel(scalars, run);
    }
  }

  // One kernel, for every ISA, length and layout; prints one line.
  void check(const Rule& rule, unsigned flags, Dtype dtype, const std::vector<Isa>& isas) {
    const long long compared_before = compared, differing_before = differing;
    for (const Isa& isa : isas) {
      const Kernel kernel = (isa.table->*rule.kernels)[flags].at[static_cast<int>(dtype)];
      if (&isa == &isas[0]) {
        run_steps(rule, kernel, kMaxLength, 0);
        for (int a = 0; a < kArrays; ++a) memcpy(reference[a], base(a, 0), sizeof reference[a]);
      }
      for (int64_t length : kLengths)
        for (int layout = 0; layout < kLayouts; ++layout) {
          run_steps(rule, kernel, length, layout);
          for (int a = 0; a < kArrays; ++a)
            for (int64_t i = 0; i < length + kGuard; ++i, ++compared)
              differing += bits(base(a, layout)[i]) != bits(i < length ? reference[a][i] : start[a][i]);
        }
    }
    unsigned long long hash = 0;
    size_t nans = 0;
    for (auto& array : reference)
      for (T x : array) {
        hash = mix(hash ^ bits(x));
        nans += x != x;
      }
    printf("%-8s flags %2u  float%zu  %lld of %lld differ  hash %016llx  NaN %zu%%\n", rule.name, flags, 8 * sizeof(T),
           differing - differing_before, compared - compared_before, hash, 100 * sizeof(T) * nans / sizeof reference);
  }
};

Test<float> test32;
Test<double> test64;

}  // namespace

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // what was printed before a fault counts
  std::vector<Isa> isas;
  for (int i = 1; i < argc; ++i)
    for (const Isa& isa : kIsas)
      if (strcmp(argv[i], isa.name) == 0) isas.push_back(isa);
  if (argc < 2 || isas.size() != size_t(argc - 1)) {
    fprintf(stderr, "usage: %s ISA...   (of: scalar avx2 avx512; the first is the reference)\n", argv[0]);
    return 2;
  }
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  printf("CPU has avx2 and fma: %s, avx512 f, vl, bw and dq: %s; ", avx2 ? "yes" : "no", avx512 ? "yes" : "no");
#endif
  printf("running:");
  for (const Isa& isa : isas) printf(" %s", isa.name);
  printf("\n");

  for (const Rule& rule : kRules)
    for (unsigned flags = 0; flags < rule.flag_combinations; ++flags) {
      test32.check(rule, flags, Dtype::kFloat32, isas);
      test64.check(rule, flags, Dtype::kFloat64, isas);
    }
  const long long compared = test32.compared + test64.compared, differing = test32.differing + test64.differing;
  printf("%lld compared, %lld differing\n", compared, differing);
  return differing != 0;
}

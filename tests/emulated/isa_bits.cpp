// Runs every kernel and codec of several ISAs on the same data and compares the bits of everything they may write.
//
//   isa_bits ISA...   (of: scalar, and on x86-64 avx2 and avx512; the first is the reference)
//
// An element's data depends on its index alone, so one full-length run of the reference says what the element must
// become for every ISA, length and base pointer; past the length nothing may change. Any two NaNs count as equal.
// Linked with stage_bits.cpp and the objects of csrc/kernels/table.cpp, statically: an emulated machine holds nothing else (avx512.sh,
// aarch64.sh).
#include <string>
#include <vector>

#include "bits.h"

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

using namespace bits;

constexpr int kSteps = 4;
constexpr int kArrays = 1 + kMaxStates;  // param and the states, used or not
constexpr int kPlacements = 3;           // every base pointer at a 64-byte boundary, every one an element past it, each elsewhere

constexpr Isa kIsas[] = {
    {"scalar", &scalar::kernel_table},
#if defined(__x86_64__)
    {"avx2", &avx2::kernel_table},
    {"avx512", &avx512::kernel_table},
#endif
};

alignas(64) char memory[kArrays + 1][(kMaxLength + kGuard + kArrays + 63) / 64 * 64 * 8];  // the last one is the gradient
char start[kArrays][(kMaxLength + kGuard) * 8], grads[kSteps][kMaxLength * 8], reference[kArrays][(kMaxLength + kGuard) * 8];

char* base(int array, int placement, int bytes) { return memory[array] + bytes * (placement == 2 ? array : placement); }

void make_data(const Layout& layout) {
  uint64_t seed = 0;
  for (int a = 0; a < kArrays; ++a)  // second moments are among the states
    for (int64_t i = 0; i < kMaxLength + kGuard; ++i) layout.write(start[a], i, layout.value(++seed, a > 0));
  for (auto& step : grads)
    for (int64_t i = 0; i < kMaxLength; ++i) layout.write(step, i, layout.value(++seed, false));
}

void run_steps(const Rule& rule, Kernel kernel, int bytes, int64_t length, int placement) {
  for (int a = 0; a < kArrays; ++a) memcpy(base(a, placement, bytes), start[a], (length + kGuard) * bytes);
  for (int step = 0; step < kSteps; ++step) {
    memcpy(base(kArrays, placement, bytes), grads[step], length * bytes);
    double scalars[32];
    rule.scalars(step, scalars);
    Run run = {};
    run.count = length;
    run.operands[kParam] = base(0, placement, bytes);
    run.operands[kGrad] = base(kArrays, placement, bytes);
    for (int s = 0; s < kMaxStates; ++s) run.operands[kFirstState + s] = base(1 + s, placement, bytes);
    kernel(scalars, run);
  }
}

// One kernel, for every ISA, length and placement of the arrays; prints one line.
void check_kernel(const Rule& rule, unsigned flags, int format, const std::vector<Isa>& isas, Count& count) {
  const Layout& layout = kLayouts[format];
  const Count before = count;
  for (const Isa& isa : isas) {
    const Kernel kernel = (isa.table->*rule.kernels)[flags].at[format];
    if (&isa == &isas[0]) {
      run_steps(rule, kernel, layout.bytes, kMaxLength, 0);
      for (int a = 0; a < kArrays; ++a) memcpy(reference[a], base(a, 0, layout.bytes), (kMaxLength + kGuard) * layout.bytes);
    }
    for (int64_t length : kLengths)
      for (int placement = 0; placement < kPlacements; ++placement) {
        run_steps(rule, kernel, layout.bytes, length, placement);
        for (int a = 0; a < kArrays; ++a)
          for (int64_t i = 0; i < length + kGuard; ++i)
            count.compare(layout.read(base(a, placement, layout.bytes), i), layout.read(i < length ? reference[a] : start[a], i));
      }
  }
  uint64_t hash = 0;
  for (auto& array : reference)
    for (int64_t i = 0; i < kMaxLength + kGuard; ++i) hash = mix(hash ^ layout.read(array, i));
  char what[32];
  snprintf(what, sizeof what, "%s flags %u", rule.name, flags);
  print_line(what, kFormatNames[format], count - before, hash);
}

// One codec, both ways, densely packed and with gaps. 16-bit formats: all values, and for each of them the reals around the midpoint
// between it and the next one, where rounding turns.
void check_codec(int precision, int format, const std::vector<Isa>& isas, Count& count) {
  const Layout &stored = kLayouts[format], &real = kLayouts[precision];
  const int64_t n = 65536, strides[] = {1, 3};
  const int shift = real.fraction_bits - 12;  // beyond the longest 16-bit fraction
  const Count before = count;
  std::vector<char> values(n * stored.bytes), reals(n * real.bytes), decoded(n * real.bytes), encoded(n * stored.bytes);
  std::vector<char> spread(3 * n * stored.bytes), out(n * 8);
  for (int64_t i = 0; i < n; ++i) {
    stored.write(values.data(), i, stored.bytes == 2 ? i : stored.value(i, false));
    const uint64_t random = mix(i + n), upper = (random >> 40) << shift;
    const uint64_t near_tie = (random & 3) == 0 ? random >> 2 & ((1u << 12) - 1) : (random & 1);
    const uint64_t any = (real.value(i, false) & ~((uint64_t(1) << shift) - 1)) ^ (upper & ((uint64_t(1) << real.fraction_bits) - 1));
    real.write(reals.data(), i, any ^ near_tie);
  }
  uint64_t hash = 0;
  for (const Isa& isa : isas) {
    const Codec& codec = isa.table->codecs[precision].at[format];
    for (int64_t length : {n, int64_t(1), int64_t(7), int64_t(37)})
      for (int64_t stride : strides) {
        for (int64_t i = 0; i < length; ++i) memcpy(&spread[i * stride * stored.bytes], &values[i * stored.bytes], stored.bytes);
        codec.decode(spread.data(), stride, out.data(), length);
        if (&isa == &isas[0] && length == n && stride == 1) memcpy(decoded.data(), out.data(), decoded.size());
        for (int64_t i = 0; i < length; ++i) count.compare(real.read(out.data(), i), real.read(decoded.data(), i));
        codec.encode(reals.data(), spread.data(), stride, length);
        for (int64_t i = 0; i < length; ++i) memcpy(&out[i * stored.bytes], &spread[i * stride * stored.bytes], stored.bytes);
        if (&isa == &isas[0] && length == n && stride == 1) memcpy(encoded.data(), out.data(), encoded.size());
        for (int64_t i = 0; i < length; ++i) count.compare(stored.read(out.data(), i), stored.read(encoded.data(), i));
      }
  }
  for (int64_t i = 0; i < n; ++i) hash = mix(mix(hash ^ real.read(decoded.data(), i)) ^ stored.read(encoded.data(), i));
  char what[32];
  snprintf(what, sizeof what, "codec of %s", kFormatNames[precision]);
  print_line(what, kFormatNames[format], count - before, hash);
}

constexpr int64_t kBlockSizes[] = {32, 256, 4096};

// One kernel for states in 8-bit codes: whole tensors, since the last block of a shorter one has another scale.
void check_blocks_kernel(const Rule& rule, unsigned flags, int format, const std::vector<Isa>& isas, Count& count) {
  if ((isas[0].table->*rule.kernels)[flags].blocks[format] == nullptr) return;
  const Layout &layout = kLayouts[format], &of_scales = kLayouts[0];
  const int bytes = layout.bytes;
  const Count before = count;
  uint64_t hash = 0;
  for (const int64_t block_size : kBlockSizes)
    for (const int64_t length : kLengths) {
      const int64_t blocks = (length + block_size - 1) / block_size;
      std::vector<char> expected;
      for (const Isa& isa : isas)
        for (int placement = 0; placement < kPlacements; ++placement) {
          std::vector<float> scales(kMaxStates * static_cast<size_t>(blocks));
          for (size_t i = 0; i < scales.size(); ++i) scales[i] = 0.01f * static_cast<float>(i % 7);
          memcpy(base(0, placement, bytes), start[0], static_cast<size_t>(length * bytes));
          for (int s = 0; s < kMaxStates; ++s)
            for (int64_t i = 0; i < length; ++i)
              base(1 + s, placement, 1)[i] = static_cast<char>(mix(static_cast<uint64_t>(i * kMaxStates + s)));
          for (int step = 0; step < kSteps; ++step) {
            for (int64_t i = 0; i < length; ++i) {  // finite ones: else all is NaN
              uint64_t x = layout.read(grads[step], i);
              const uint64_t exponent = x >> layout.fraction_bits & layout.max_exponent();
              if (exponent > layout.max_exponent() / 4 * 3) x &= ~(uint64_t(1) << (8 * bytes - 2));
              layout.write(base(kArrays, placement, bytes), i, x);
            }
            double scalars[32];
            rule.scalars(step, scalars);
            Run run = {};
            run.count = length;
            run.first = 0;
            run.block_size = block_size;
            run.operands[kParam] = base(0, placement, bytes);
            run.operands[kGrad] = base(kArrays, placement, bytes);
            for (int s = 0; s < kMaxStates; ++s) {
              run.operands[kFirstState + s] = base(1 + s, placement, 1);
              run.scales[s] = &scales[static_cast<size_t>(s * blocks)];
            }
            (isa.table->*rule.kernels)[flags].blocks[format](scalars, run);
          }
          std::vector<char> result;
          for (int64_t i = 0; i < length; ++i) {
            const uint64_t x = layout.read(base(0, placement, bytes), i);
            result.insert(result.end(), reinterpret_cast<const char*>(&x), reinterpret_cast<const char*>(&x) + 4);
          }
          for (int s = 0; s < kMaxStates; ++s) result.insert(result.end(), base(1 + s, placement, 1), base(1 + s, placement, 1) + length);
          for (const float& scale : scales) {
            const uint64_t x = of_scales.read(reinterpret_cast<const char*>(&scale), 0);
            result.insert(result.end(), reinterpret_cast<const char*>(&x), reinterpret_cast<const char*>(&x) + 4);
          }
          if (expected.empty()) expected = result;
          for (size_t i = 0; i < result.size(); ++i) count.compare(static_cast<uint8_t>(result[i]), static_cast<uint8_t>(expected[i]));
        }
      for (const char c : expected) hash = mix(hash ^ static_cast<uint8_t>(c));
    }
  char what[32];
  snprintf(what, sizeof what, "%s flags %u", rule.name, flags);
  print_line(what, (std::string("int8 ") + kFormatNames[format]).c_str(), count - before, hash);
}

// One code, both ways, to the nearest and stochastically, with magnitudes that need no care and some that do.
void check_code(int code, const std::vector<Isa>& isas, Count& count) {
  const Count before = count;
  uint64_t hash = 0;
  for (const float size : {1.0f, 1e-40f, 1e-30f, 1e30f})
    for (const int64_t length : kLengths)
      for (const bool stochastic : {false, true}) {
        if (length > kMaxBlock) continue;
        std::vector<float> values(static_cast<size_t>(length)), decoded(values.size()), first_decoded;
        alignas(64) float memory_of_decoded[kMaxBlock];  // past the caches only to where vectors start
        std::vector<uint8_t> codes(values.size()), first_codes;
        for (size_t i = 0; i < values.size(); ++i) {
          const double x = static_cast<double>(mix(i) >> 12) / static_cast<double>(uint64_t(1) << 52);
          values[i] = size * static_cast<float>(x * x * (mix(i) & 1 && code != 2 ? -1 : 1));
        }
        for (const Isa& isa : isas) {
          const BlockCodecs& codecs = *isa.table->block_codecs;
          const float scale = codecs.scale_of(codecs.largest_magnitude(values.data(), length));
          const Rounding rounding = codecs.rounding_of(stochastic, 5, 1234567890123);
          codecs.at[code].encode(values.data(), length, scale, rounding, codes.data());
          codecs.at[code].decode(codes.data(), scale, memory_of_decoded, length, stochastic);
          memcpy(decoded.data(), memory_of_decoded, values.size() * sizeof(float));
          if (&isa == &isas[0]) first_codes = codes, first_decoded = decoded;
          for (size_t i = 0; i < values.size(); ++i) {
            count.compare(codes[i], first_codes[i]);
            count.compare(kLayouts[0].read(reinterpret_cast<const char*>(&decoded[i]), 0),
                          kLayouts[0].read(reinterpret_cast<const char*>(&first_decoded[i]), 0));
          }
        }
        for (const uint8_t c : first_codes) hash = mix(hash ^ c);
      }
  print_line("blocks in code", kCodeNames[code], count - before, hash);
}

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
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  printf("CPU has avx2, fma and f16c: %s, avx512 f, vl, bw and dq: %s; ", avx2 ? "yes" : "no", avx512 ? "yes" : "no");
#endif
  printf("running:");
  for (const Isa& isa : isas) printf(" %s", isa.name);
  printf("\n");

  Count count;
  for (int format = 0; format < kFormats; ++format) {
    make_data(kLayouts[format]);
    for (const Rule& rule : kRules)
      for (unsigned flags = 0; flags < rule.flag_combinations; ++flags) check_kernel(rule, flags, format, isas, count);
    for (int precision = 0; precision < kPrecisions; ++precision) check_codec(precision, format, isas, count);
  }
  for (int format = 0; format < kFormats; ++format) {
    make_data(kLayouts[format]);
    for (const Rule& rule : kRules)
      for (unsigned flags = 0; flags < rule.flag_combinations; ++flags) check_blocks_kernel(rule, flags, format, isas, count);
  }
  for (int code = 0; code < kCodes; ++code) check_code(code, isas, count);
  check_stages(isas, count);
  printf("%lld compared, %lld differing\n", count.compared, count.differing);
  return count.differing != 0;
}

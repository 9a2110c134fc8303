// 8-bit codes: a value relative to the largest magnitude of its block, in one byte. A code knows no block, optimizer or loop over memory.
//
// Decoding gives a number from -1 to 1 times the block's scale, which is its largest magnitude. Zero is code 0 and decodes to zero; the top
// code decodes to exactly the scale. Encoding what was decoded gives the same code, however it is rounded.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>  // its functions are never emitted on their own, so no copy of them can be shared with other code
#endif

#include "codec.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

// Codes that are decoded or encoded together. The arithmetic is written for vectors of that many numbers, which the compiler makes of what
// the processor has; gcc 12 would not do so by itself, because of the bytes.
constexpr int64_t kGroup = 8;
typedef float Floats __attribute__((vector_size(4 * kGroup)));
typedef int32_t Ints __attribute__((vector_size(4 * kGroup)));
typedef uint32_t Words __attribute__((vector_size(4 * kGroup)));

template <class V>
inline V load_group(const void* memory) {
  V group;
  __builtin_memcpy(&group, memory, sizeof group);
  return group;
}

// What is added to the elements of a block, one after the other, before the fraction of their codes is cut off, as a 19-bit fraction of the
// distance between two codes. One half: to the nearest. Otherwise a Weyl sequence, for stochastic rounding: where its start is uniform each
// element of it is, so that rounding is right on average. 14 bits of it, since the second moment moves by a 1000th of its size in a step,
// a 60th of that distance or less; the constant rest keeps 16 units from 0 and 1, so that the rounding errors of a decoded number, 6 units
// at the most, do not move it.
constexpr int kOffsetBits = 19;

class Offsets {
 public:
  explicit Offsets(Rounding rounding) : step_((uint32_t(kGroup) * rounding.step) << 18) {
    const Words lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    next_ = lanes * (uint32_t(rounding.step) << 18) + ((uint32_t(rounding.first) << 18) + (16 << 13));
  }

  // For the next kGroup elements.
  [[gnu::always_inline]] Words next() {
    const Words offsets = next_ >> 13;
    next_ += step_;
    return offsets;
  }

 private:
  Words next_;
  const uint32_t step_;
};

// Mu-law companding as in telephony (ITU-T G.711): the logarithm of 1 + mu |x|, linear between powers of two, 16 codes to each. So it is
// read from the bits of that number as a float: exponent and the first four bits of the fraction. Evenly spaced near zero, else by 3 to 6%.
template <bool kIsSigned>
struct MuLaw {
  static constexpr bool kSigned = kIsSigned;
  static constexpr uint32_t kOne = 127u << 23, kSign = 1u << 31;
  static constexpr float kMu = kSigned ? 247 : 63487;  // 1 + mu is 127 or 255 codes above 1
  static constexpr float kUnit = 1 / kMu;
  static_assert(kMu * kUnit == 1);

  static float inverse(float scale) { return kMu / scale; }

  [[gnu::always_inline]] static Floats decode(Ints codes, float scale) {
    const Ints magnitudes = kSigned ? (codes < 0 ? -codes : codes) : codes;
    const Floats values = (Floats((magnitudes << kOffsetBits) + kOne) - 1) * kUnit * scale;
    return kSigned ? Floats(Words(values) | (Words(codes) & kSign)) : values;
  }

  [[gnu::always_inline]] static Ints encode(Floats values, float inverse, Words offsets) {
    const Floats z = Floats(Words(values) & ~kSign) * inverse + 1;
    const Ints magnitudes = Ints((Words(z) - kOne + offsets) >> kOffsetBits), negative = Ints(values) >> 31;
    return kSigned ? (magnitudes ^ negative) - negative : magnitudes;
  }
};

// Evenly spaced: code / 127.
struct Linear {
  static constexpr bool kSigned = true;
  static constexpr float kUnit = 1.0f / 127;
  static_assert(127 * kUnit == 1);

  static float inverse(float scale) { return 127 / scale; }

  [[gnu::always_inline]] static Floats decode(Ints codes, float scale) { return __builtin_convertvector(codes, Floats) * kUnit * scale; }

  // Rounded to an integer, ties to even, by adding a number whose last bit weighs 1.
  [[gnu::always_inline]] static Ints encode(Floats values, float inverse, Words offsets) {
    constexpr float kInteger = 12582912;
    constexpr int32_t kHalf = 1 << (kOffsetBits - 1), kIntegerBits = 0x4b400000;
    const Floats moves = __builtin_convertvector(Ints(offsets) - kHalf, Floats) * (0.5f / kHalf);
    return Ints(values * inverse + moves + kInteger) - kIntegerBits;
  }
};

// kGroup bytes to integers and back.
template <bool kSigned>
[[gnu::always_inline]] inline Ints widen(const uint8_t* codes) {
#ifdef __AVX2__
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return Ints(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  Ints wide;
  for (int64_t i = 0; i < kGroup; ++i) wide[i] = kSigned ? static_cast<int8_t>(codes[i]) : codes[i];
  return wide;
#endif
}

template <bool kSigned>
[[gnu::always_inline]] inline void narrow(Ints wide, uint8_t* codes) {
#ifdef __AVX2__
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(__m256i(wide)), _mm256_extracti128_si256(__m256i(wide), 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(codes), kSigned ? _mm_packs_epi16(words, words) : _mm_packus_epi16(words, words));
#else
  for (int64_t i = 0; i < kGroup; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
#endif
}

template <class Code>
[[gnu::always_inline]] inline void decode_group(const uint8_t* codes, float scale, float* values) {
  const Floats group = Code::decode(widen<Code::kSigned>(codes), scale);
  __builtin_memcpy(values, &group, sizeof group);
}

template <class Code>
[[gnu::always_inline]] inline void encode_group(const float* values, float inverse, Words offsets, uint8_t* codes) {
  narrow<Code::kSigned>(Code::encode(load_group<Floats>(values), inverse, offsets), codes);
}

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA

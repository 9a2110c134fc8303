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

// The arithmetic is written for vectors of eight numbers, which the compiler makes of what the processor has; gcc 12 would not do so by
// itself, because of the bytes. Two such vectors are decoded or encoded together.
constexpr int64_t kLanes = 8, kGroup = 2 * kLanes;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

// What is added to the elements of a block, one after the other, before the fraction of their codes is cut off, as a 19-bit fraction of the
// distance between two codes. One half: to the nearest. Otherwise a Weyl sequence, for stochastic rounding: where its start is uniform each
// element of it is, so that rounding is right on average. 14 bits of it, since the second moment moves by a 1000th of its size in a step,
// a 60th of that distance or less; the constant rest keeps 16 units from 0 and 1, so that the rounding errors of a decoded number, 6 units
// at the most, do not move it.
constexpr int kOffsetBits = 19;

class Offsets {
 public:
  explicit Offsets(Rounding rounding) : step_(uint32_t(kLanes) * 32 * rounding.step) {
    const Words lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    next_ = (lanes * rounding.step + rounding.first) * 32 + 16;
  }

  // For the next kLanes elements.
  [[gnu::always_inline]] Words next() {
    const Words offsets = next_ & ((1u << kOffsetBits) - 1);
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
  static constexpr bool kSigned = kIsSigned, kSignsApart = kIsSigned;
  static constexpr uint32_t kSign = 1u << 31, kOne = 127u << 23, kZero = kOne >> kOffsetBits;  // kZero: what zero is encoded as
  static constexpr float kMu = kSigned ? 247 : 63487;                                          // 1 + mu is 127 or 255 codes above 1
  static constexpr float kUnit = 1 / kMu;
  static_assert(kMu * kUnit == 1);

  static float inverse(float scale) { return kMu / scale; }

  [[gnu::always_inline]] static Floats decode(Ints codes, float scale) {
    const Ints magnitudes = kSigned ? (codes < 0 ? -codes : codes) : codes;
    const Floats values = (Floats((magnitudes << kOffsetBits) + kOne) - 1) * kUnit * scale;
    return kSigned ? Floats(Words(values) | (Words(codes) & kSign)) : values;
  }

  // Magnitudes only.
  [[gnu::always_inline]] static Ints encode(Floats values, float inverse, Words offsets) {
    return Ints((Words(Floats(kSigned ? Words(values) & ~kSign : Words(values)) * inverse + 1) + offsets) >> kOffsetBits);
  }
};

// Evenly spaced: code / 127.
struct Linear {
  static constexpr bool kSigned = true, kSignsApart = false;
  static constexpr uint32_t kZero = 0;
  static constexpr float kUnit = 1.0f / 127;
  static_assert(127 * kUnit == 1);

  static float inverse(float scale) { return 127 / scale; }

  [[gnu::always_inline]] static Floats decode(Ints codes, float scale) { return __builtin_convertvector(codes, Floats) * kUnit * scale; }

  // Rounded to an integer, ties to even, by adding a number whose last bit weighs 1. The offsets about one half are made smaller by 2^-10,
  // so that the lowest is no tie.
  [[gnu::always_inline]] static Ints encode(Floats values, float inverse, Words offsets) {
    constexpr float kInteger = 12582912;
    constexpr int32_t kHalf = 1 << (kOffsetBits - 1), kIntegerBits = 0x4b400000;
    const Floats moves = __builtin_convertvector(Ints(offsets) - (kHalf + 16), Floats) * ((1 - 0x1p-10f) / (2 * kHalf));
    return Ints(values * inverse + moves + kInteger) - kIntegerBits;
  }
};

template <class V>
[[gnu::always_inline]] inline V load_lanes(const float* values) {
  V lanes;
  __builtin_memcpy(&lanes, values, sizeof lanes);
  return lanes;
}

// Bytes to integers.
template <bool kSigned>
[[gnu::always_inline]] inline Ints widen(const uint8_t* codes) {
#ifdef __AVX2__
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return Ints(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  Ints wide;
  for (int64_t i = 0; i < kLanes; ++i) wide[i] = kSigned ? static_cast<int8_t>(codes[i]) : codes[i];
  return wide;
#endif
}

// What Code::encode made of `values` to bytes.
template <class Code>
[[gnu::always_inline]] inline void narrow(Ints low, Ints high, const float* values, uint8_t* codes) {
#ifdef __AVX2__
  __m256i words = _mm256_packs_epi32(__m256i(low), __m256i(high));
  if (Code::kZero != 0) words = _mm256_sub_epi16(words, _mm256_set1_epi16(Code::kZero));
  if (Code::kSignsApart) {
    const __m256i signs = _mm256_packs_epi32(load_lanes<__m256i>(values), load_lanes<__m256i>(values + kLanes));
    words = _mm256_sign_epi16(words, signs);
  }
  words = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i first = _mm256_castsi256_si128(words), last = _mm256_extracti128_si256(words, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), Code::kSigned ? _mm_packs_epi16(first, last) : _mm_packus_epi16(first, last));
#else
  for (int64_t i = 0; i < kGroup; ++i) {
    const int32_t code = (i < kLanes ? low[i] : high[i - kLanes]) - static_cast<int32_t>(Code::kZero);
    codes[i] = static_cast<uint8_t>(Code::kSignsApart && bits_of(values[i]) >> 31 ? -code : code);
  }
#endif
}

template <class Code>
[[gnu::always_inline]] inline void decode_group(const uint8_t* codes, float scale, float* values) {
  for (int64_t i = 0; i < kGroup; i += kLanes) {
    const Floats lanes = Code::decode(widen<Code::kSigned>(codes + i), scale);
    __builtin_memcpy(values + i, &lanes, sizeof lanes);
  }
}

template <class Code>
[[gnu::always_inline]] inline void encode_group(const float* values, float inverse, Offsets& offsets, uint8_t* codes) {
  const Ints low = Code::encode(load_lanes<Floats>(values), inverse, offsets.next());
  const Ints high = Code::encode(load_lanes<Floats>(values + kLanes), inverse, offsets.next());
  narrow<Code>(low, high, values, codes);
}

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA

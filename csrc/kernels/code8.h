// 8-bit codes: a value relative to the largest magnitude of its block, in one byte. A code knows no block, optimizer or loop over memory.
//
// Decoding gives a number from -1 to 1 times the block's scale, which is its largest magnitude. Zero is code 0 and decodes to zero, the top
// code to the scale (mu-law: but for its last two bits). Encoding what was decoded gives the same code, however it is rounded, and so the
// same number again.
#pragma once

#include "codec.h"

namespace fused_opt::FUSED_OPT_ISA {
namespace {

// What is added to the elements of a block, one after the other, before the fraction of their codes is cut off, as a 19-bit fraction of the
// distance between two codes. One half: to the nearest. Otherwise a Weyl sequence, for stochastic rounding: where its start is uniform each
// element of it is, so that rounding is right on average. 14 bits of it, since the second moment moves by a 1000th of its size in a step,
// a 30th of that distance or less; the constant rest keeps 16 units from 0 and 1, so that the rounding errors of a decoded number, a few
// units, do not move it.
constexpr int kOffsetBits = 19;

class Offsets {
 public:
  explicit Offsets(Rounding rounding) : sequence_(32u * rounding.first + 16, 32u * rounding.step) {}

  // For the next kGroup elements.
  [[gnu::always_inline]] void next(Words* offsets) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < kVectors; ++v) offsets[v] = sequence_.next() & ((1u << kOffsetBits) - 1);
  }

 private:
  Weyl sequence_;
};

// From bits; but NaN if `scale`, which has no sign, is infinite or NaN.
inline float if_finite(float scale, uint32_t bits) { return float_of(bits_of(scale) < kInfinity ? bits : kNan); }

// A code is written for vectors. It has:
//   unit(scale), inverse(scale)           what decode and encode multiply with; NaN if the scale is not finite
//   decode(codes, unit)                   `codes` in the upper bytes of words
//   encode(values, inverse, offset)       to kZero for zero, kZero + 1 for the next code..., without the sign if kSignsApart

// Mu-law companding as in telephony (ITU-T G.711): the logarithm of 1 + mu |x|, linear between powers of two, 16 codes to each. So it is
// read from the bits of that number as a float: exponent and the first four bits of the fraction. Evenly spaced near zero, else by 3 to 6%.
//
// x is a multiple of the unit, scale / mu: so decoding is one fused multiply-add, and encoding another. A unit's last bit is 0: then that
// of what the top code stands for, mu units rounded to float, is the same one. It is a normal number, and mu units are finite.
template <bool kIsSigned>
struct MuLaw {
  static constexpr bool kSigned = kIsSigned, kSignsApart = kIsSigned;
  static constexpr uint32_t kOne = 127u << 23, kZero = kOne >> kOffsetBits;
  static constexpr float kMu = kSigned ? 247 : 63487;                                                 // 1 + mu is 127 or 255 codes above 1
  static constexpr uint32_t kLeastUnit = 1u << 23, kLargestUnit = kSigned ? 0x7b84a9f8 : 0x77842190;  // as bits

  static float unit(float scale) {
    const float nearest = scale / kMu;
    const uint32_t odd = bits_of(nearest) & 1;  // then to that neighbour of its to which the quotient is nearer
    const uint32_t below = bits_of(fma(-nearest, kMu, scale)) >> 31;
    uint32_t bits = bits_of(nearest) + odd - 2 * (odd & below);
    bits = bits < kLeastUnit ? kLeastUnit : bits;
    bits = bits > kLargestUnit ? kLargestUnit : bits;
    return if_finite(scale, bits);
  }

  static float inverse(float scale) {
    constexpr uint32_t kLargestInverse = (2 * 127u - 1) << 23;  // of kLeastUnit
    const uint32_t bits = bits_of(kMu / scale);
    return if_finite(scale, bits > kLargestInverse ? kLargestInverse : bits);
  }

  [[gnu::always_inline]] static Floats decode(Ints codes, float unit) {
    const Floats magnitudes = Floats(((kSigned ? absolute(codes) : Words(codes)) >> (24 - kOffsetBits)) + kOne);
    const Floats units = kSigned ? with_sign_of(codes, spread(unit)) : spread(unit);
    return kFastFma ? fma(magnitudes, units, -units) : (magnitudes - 1) * units;  // the same, since magnitudes - 1 is exact
  }

  [[gnu::always_inline]] static Words encode(Floats values, float inverse, Words offsets) {
    const Floats magnitudes = kSigned ? Floats(Words(values) & ~kSign) : values;
    return (Words(fma(magnitudes, inverse, spread(1))) + offsets) >> kOffsetBits;
  }
};

// Evenly spaced: code / 127.
struct Linear {
  static constexpr bool kSigned = true, kSignsApart = false;
  static constexpr uint32_t kZero = 0;
  static constexpr float kUnit = 1.0f / 127;
  static_assert(127 * kUnit == 1);

  static float unit(float scale) {
    constexpr float kLeast = 127 * 0x1p-126f;
    return if_finite(scale, bits_of(scale < kLeast ? kLeast : scale));
  }

  static float inverse(float scale) { return 127 / unit(scale); }

  [[gnu::always_inline]] static Floats decode(Ints codes, float unit) {
    return __builtin_convertvector(codes >> 24, Floats) * kUnit * unit;
  }

  // Rounded to an integer, ties to even, by adding a number whose last bit weighs 1. The offsets about one half are made smaller by 2^-10,
  // so that the lowest is no tie.
  [[gnu::always_inline]] static Words encode(Floats values, float inverse, Words offsets) {
    constexpr float kInteger = 12582912;
    constexpr int32_t kHalf = 1 << (kOffsetBits - 1), kIntegerBits = 0x4b400000;
    const Floats moves = __builtin_convertvector(Ints(offsets) - (kHalf + 16), Floats) * ((1 - 0x1p-10f) / (2 * kHalf));
    return Words(Ints(values * inverse + moves + kInteger) - kIntegerBits);
  }
};

// Where the bytes go: in groups of four, the last of each is the next one, and the rest is zero.
struct Places {
  alignas(64) char at[4 * kLanes] = {};
  constexpr Places() {
    for (int i = 0; i < 4 * kLanes; ++i) at[i] = static_cast<char>(i % 4 == 3 ? i / 4 : -1);
  }
};
constexpr Places kPlaces;

// Bytes to the upper bytes of words. (Masks of ones here and below: gcc 12 warns of the intrinsics without.)
[[gnu::always_inline]] inline Ints widen(const uint8_t* codes) {
#if defined(__AVX512BW__)
  return Ints(_mm512_shuffle_epi8(_mm512_maskz_broadcast_i32x4(0xffff, load_lanes<__m128i>(codes)), load_lanes<__m512i>(kPlaces.at)));
#elif defined(__AVX2__)
  return Ints(_mm256_shuffle_epi8(_mm256_set1_epi64x(load<int64_t>(codes, 0)), load_lanes<__m256i>(kPlaces.at)));
#else
  return Ints(__builtin_convertvector(load_lanes<Bytes>(codes), Words) << 24);
#endif
}

// What Code::encode made of `values`, to bytes.
template <class Code>
[[gnu::always_inline]] inline GroupOfBytes narrow(const Words* encoded, const float* values) {
#if defined(__AVX2__) && !defined(__AVX512BW__)
  const auto pack = [](__m256i a, __m256i b) { return _mm256_sub_epi16(_mm256_packs_epi32(a, b), _mm256_set1_epi16(Code::kZero)); };
  const __m256i low = pack(__m256i(encoded[0]), __m256i(encoded[1])), high = pack(__m256i(encoded[2]), __m256i(encoded[3]));
  __m256i bytes = Code::kSigned ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
  if (Code::kSignsApart) {
    __m256i v[kVectors];
    for (int64_t i = 0; i < kVectors; ++i) v[i] = load_lanes<__m256i>(values + i * kLanes);
    bytes = _mm256_sign_epi8(bytes, _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3])));
  }
  return GroupOfBytes(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));  // packed within halves
#else
  Words codes[kVectors];
  for (int64_t i = 0; i < kVectors; ++i) {
    codes[i] = encoded[i] - Code::kZero;
    if (Code::kSignsApart) codes[i] = load_lanes<Ints>(values + i * kLanes) < 0 ? -codes[i] : codes[i];
  }
#ifdef __AVX512BW__
  const auto bytes = [](Words x) { return _mm512_maskz_cvtepi32_epi8(0xffff, __m512i(x)); };
  return GroupOfBytes(_mm256_set_m128i(bytes(codes[1]), bytes(codes[0])));
#else
  GroupOfBytes bytes;
  for (int64_t i = 0; i < kGroup; ++i) bytes[i] = static_cast<uint8_t>(codes[i / kLanes][i % kLanes]);
  return bytes;
#endif
#endif
}

template <class Code, bool kStream = false>
[[gnu::always_inline]] inline void decode_group(const uint8_t* codes, float unit, float* values) {
  for (int64_t i = 0; i < kGroup; i += kLanes) {
    const Floats lanes = Code::decode(widen(codes + i), unit);
    kStream ? stream_lanes(values + i, lanes) : store_lanes(values + i, lanes);
  }
}

template <class Code>
[[gnu::always_inline]] inline GroupOfBytes encode_group(const float* values, float inverse, const Words* offsets) {
  Words encoded[kVectors];
#pragma GCC unroll 4
  for (int64_t i = 0; i < kVectors; ++i) encoded[i] = Code::encode(load_lanes<Floats>(values + i * kLanes), inverse, offsets[i]);
  return narrow<Code>(encoded, values);
}

}  // namespace
}  // namespace fused_opt::FUSED_OPT_ISA

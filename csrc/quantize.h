// Tensors to blocks of 8-bit codes and back.
#pragma once

#include <cstdint>

#include "isa.h"
#include "walk.h"

namespace fused_opt {

// A tensor of values, its codes and its scales. Blocks are of consecutive codes in memory; the last one may be shorter.
struct Quantized {
  char* values;
  Format format;  // of the values
  Walk walk;      // of values and codes, in the order of the codes
  uint8_t* codes;
  float* scales;
  int64_t count, block_size;  // any block size
  Code code;
  const float* table;  // 256 ascending numbers, used instead of `code`; else null
};

// Sets every block's scale: its largest magnitude, or NaN if it has a value that is not finite.
void measure(const Quantized& q, const Isa& isa, int max_threads);

// Of stochastic rounding; without it to the nearest.
struct Seeds {
  bool stochastic;
  uint64_t all;
  const uint64_t* of_blocks;  // used instead of `all`; or null
};

// Sets every code. The scales are taken as they are, or measured in the same pass over memory, which needs blocks of kMaxBlock values at
// the most. What is drawn depends on seed, place and values only.
void quantize(const Quantized& q, bool measured, const Seeds& seeds, const Isa& isa, int max_threads);

// Sets every value.
void dequantize(const Quantized& q, const Isa& isa, int max_threads);

}  // namespace fused_opt

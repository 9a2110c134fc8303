#include "quantize.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace fused_opt {
namespace {

// Results of so many elements are written past the caches, which they would fill: 32 MiB. (64M values: 1.4 times as fast.)
constexpr int64_t kStreamed = int64_t(1) << 23;

// A block, or a part of a longer one, that passes through scratch memory at once.
struct Piece {
  int64_t block, number, first, count;  // `number` among all pieces, `first` element
};

// Calls f(piece, scratch) for all pieces, on several threads.
template <class F>
void for_each_piece(const Quantized& q, int max_threads, F f) {
  if (q.count == 0) return;
  const int64_t blocks = (q.count + q.block_size - 1) / q.block_size, parts = (q.block_size + kMaxBlock - 1) / kMaxBlock;
  const double pieces_per_element = static_cast<double>(blocks * parts) / static_cast<double>(q.count);
  const auto piece_at = [&](int64_t element) {
    return element == q.count ? blocks * parts : static_cast<int64_t>(static_cast<double>(element) * pieces_per_element);
  };
  run_shares(q.count, max_threads, [&](int64_t begin, int64_t end) {
    alignas(64) float scratch[kMaxBlock];
    for (int64_t number = piece_at(begin); number < piece_at(end); ++number) {
      const int64_t block = number / parts, start = block * q.block_size;
      const int64_t first = start + number % parts * kMaxBlock, last = std::min(start + q.block_size, q.count);
      if (first < last) f(Piece{block, number, first, std::min(kMaxBlock, last - first)}, scratch);
    }
#ifdef __x86_64__
    __builtin_ia32_sfence();  // what was streamed is seen by the other threads
#endif
  });
}

bool in_place(const Quantized& q) { return q.format == Format::kFloat32 && q.walk.dense(0); }

float* values_at(const Quantized& q, int64_t first) { return reinterpret_cast<float*>(q.values) + first; }

// f(codec, memory, stride, scratch, count) for each row of a piece's values.
template <class F>
void transfer(const Quantized& q, const Isa& isa, const Piece& piece, float* scratch, F f) {
  const Codec& codec = isa.kernels->codecs[static_cast<int>(Precision::kSingle)].at[static_cast<int>(q.format)];
  const int64_t bytes = kFormatBytes[static_cast<int>(q.format)];
  q.walk.rows(0, piece.first, piece.count, [&](int64_t offset, int64_t stride, int64_t length) {
    f(codec, q.values + offset * bytes, stride, scratch, length);
    scratch += length;
  });
}

// The piece's values as fp32, where they are or in scratch memory.
const float* read(const Quantized& q, const Isa& isa, const Piece& piece, float* scratch) {
  if (in_place(q)) return values_at(q, piece.first);
  transfer(q, isa, piece, scratch, [](const Codec& codec, const void* stored, int64_t stride, float* real, int64_t count) {
    codec.decode(stored, stride, real, count);
  });
  return scratch;
}

// With a table no arithmetic gives the code, so it is looked up: the entry at or below the value, or the next one.
void encode_by_table(const float* table, const float* values, int64_t count, float scale, Rounding rounding, uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float x = scale > 0 ? values[i] / scale : 0;
    const int64_t above = std::clamp<int64_t>(std::upper_bound(table, table + 256, x) - table, 1, 255);
    const float low = table[above - 1], high = table[above];
    // As Offsets in kernels/code8.h has it; not from 0 to 1, so that the rounding error of a decoded number does not move it.
    const int64_t offset = ((rounding.first + i * rounding.step) % 16384) * 32 + 16;
    const bool up = (x - low) / (high - low) + static_cast<float>(offset) / (1 << 19) >= 1;
    codes[i] = static_cast<uint8_t>(up ? above : above - 1);
  }
}

}  // namespace

void measure(const Quantized& q, const Isa& isa, int max_threads) {
  const BlockCodecs& codecs = *isa.kernels->block_codecs;
  std::vector<std::atomic<uint32_t>> largest(static_cast<size_t>((q.count + q.block_size - 1) / q.block_size));
  for_each_piece(q, max_threads, [&](const Piece& piece, float* scratch) {
    const uint32_t own = codecs.largest_magnitude(read(q, isa, piece, scratch), piece.count);
    std::atomic<uint32_t>& shared = largest[static_cast<size_t>(piece.block)];
    for (uint32_t known = shared.load(); own > known && !shared.compare_exchange_weak(known, own);) {
    }
  });
  for (size_t i = 0; i < largest.size(); ++i) q.scales[i] = codecs.scale_of(largest[i]);
}

void quantize(const Quantized& q, bool measured, const Seeds& seeds, const Isa& isa, int max_threads) {
  const BlockCodecs& codecs = *isa.kernels->block_codecs;
  for_each_piece(q, max_threads, [&](const Piece& piece, float* scratch) {
    const float* const values = read(q, isa, piece, scratch);
    float& scale = q.scales[piece.block];
    if (!measured) scale = codecs.scale_of(codecs.largest_magnitude(values, piece.count));
    const uint64_t seed = seeds.of_blocks ? seeds.of_blocks[piece.block] : seeds.all;
    const Rounding rounding = codecs.rounding_of(seeds.stochastic, seed, piece.number);
    uint8_t* const codes = q.codes + piece.first;
    if (q.table)
      encode_by_table(q.table, values, piece.count, scale, rounding, codes);
    else
      codecs.at[static_cast<int>(q.code)].encode(values, piece.count, scale, rounding, codes);
  });
}

void dequantize(const Quantized& q, const Isa& isa, int max_threads) {
  const BlockCodec& codec = isa.kernels->block_codecs->at[static_cast<int>(q.code)];
  const bool stream = in_place(q) && q.count >= kStreamed;
  for_each_piece(q, max_threads, [&](const Piece& piece, float* scratch) {
    float* const values = in_place(q) ? values_at(q, piece.first) : scratch;
    const uint8_t* const codes = q.codes + piece.first;
    const float scale = q.scales[piece.block];
    if (q.table)
      for (int64_t i = 0; i < piece.count; ++i) values[i] = q.table[codes[i]] * scale;
    else
      codec.decode(codes, scale, values, piece.count, stream);
    if (!in_place(q))
      transfer(q, isa, piece, scratch, [](const Codec& to, void* stored, int64_t stride, const float* real, int64_t count) {
        to.encode(real, stored, stride, count);
      });
  });
}

}  // namespace fused_opt

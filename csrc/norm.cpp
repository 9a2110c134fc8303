#include "norm.h"

#include <algorithm>
#include <cmath>
#include <deque>

#include "parallel.h"

namespace fused_opt {
namespace {

// Elements of a piece: 32 KiB of doubles, where gradients have to be decoded.
constexpr int64_t kPiece = 4096;

struct Gradient {
  const Operand* operand;
  const Walk* walk;  // null if it is densely packed
  int place;         // among the walk's operands
  int64_t count;
  size_t first_piece;
};

double norm_of_piece(const Gradient& gradient, int64_t first, int64_t count, const KernelTable& kernels, bool largest) {
  const Operand& operand = *gradient.operand;
  const int format = static_cast<int>(operand.format);
  const int precision = static_cast<int>(operand.format == Format::kFloat64 ? Precision::kDouble : Precision::kSingle);
  const Norms& norms = kernels.norms[precision];
  const auto norm = largest ? norms.largest : norms.sum_of_squares;
  const char* const memory = static_cast<const char*>(operand.data);
  const int64_t bytes = kFormatBytes[format], real_bytes = kFormatBytes[precision];
  if (format == precision && !gradient.walk) return norm(memory + first * bytes, count);
  alignas(64) char real[kPiece * sizeof(double)];
  const Codec& codec = kernels.codecs[precision].at[format];
  int64_t done = 0;
  const auto row = [&](int64_t offset, int64_t stride, int64_t length) {
    codec.decode(memory + offset * bytes, stride, real + done * real_bytes, length);
    done += length;
  };
  gradient.walk ? gradient.walk->rows(gradient.place, first, count, row) : row(first, 1, count);
  return norm(real, count);
}

}  // namespace

double gradient_norm(const Batch& batch, const Isa& isa, bool largest, int max_threads) {
  std::vector<Gradient> gradients;
  std::deque<Walk> walks;  // of parameters without states yet
  size_t pieces = 0;
  int64_t total = 0;
  const auto append = [&](const Entry& entry, const Walk* walk, int place) {
    if (entry.in_tables) return;
    gradients.push_back({&entry.operands[kGrad], walk, place, entry.count, pieces});
    pieces += static_cast<size_t>((entry.count + kPiece - 1) / kPiece);
    total += entry.count;
  };
  for (const Entry& entry : batch.entries) append(entry, entry.walk < 0 ? nullptr : &batch.walks[static_cast<size_t>(entry.walk)], kGrad);
  for (const Batch::Candidate& candidate : batch.missing) {
    const TensorInfo* const grad = &candidate.grad;
    append(candidate.entry, is_dense(*grad) || candidate.entry.count == 0 ? nullptr : &walks.emplace_back(&grad, 1, 0), 0);
  }
  std::vector<double> norms(pieces);
  run_shares(total, max_threads, [&](int64_t begin, int64_t end) {  // pieces that start in the share
    int64_t start = 0;
    for (const Gradient& gradient : gradients) {
      const int64_t from = std::clamp<int64_t>(begin - start, 0, gradient.count), to = std::clamp<int64_t>(end - start, 0, gradient.count);
      for (int64_t first = (from + kPiece - 1) / kPiece * kPiece; first < to; first += kPiece)
        norms[gradient.first_piece + static_cast<size_t>(first / kPiece)] =
            norm_of_piece(gradient, first, std::min(kPiece, gradient.count - first), *isa.kernels, largest);
      start += gradient.count;
    }
  });
  double result = 0;
  for (const double norm : norms) result = !largest ? result + norm : std::isnan(result) || norm <= result ? result : norm;
  return result;
}

}  // namespace fused_opt

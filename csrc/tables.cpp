#include "tables.h"

#include <algorithm>

namespace fused_opt {
namespace {

constexpr int64_t kOwnScalars = -1;  // until the row has a number

int64_t address_of(const void* data) { return static_cast<int64_t>(reinterpret_cast<intptr_t>(data)); }

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

bool Bucket::takes(const Bucket& o) const {
  const bool same_blocks = block_size == o.block_size || (o.rows.size() == 1 && o.rows[0][kCount] <= std::min(block_size, o.block_size));
  return device == o.device && flags == o.flags && stages == o.stages && same_blocks && operand_count == o.operand_count &&
         std::equal(formats, formats + kAllOperands, o.formats);
}

void Tables::begin() {
  known_.swap(buckets_);
  buckets_.clear();
  of_one_block_.clear();
}

void Tables::add(const Batch& batch, const std::vector<unsigned>& flags, int64_t first_row, bool on_device,
                 const std::vector<unsigned>& stages) {
  for (const Entry& entry : batch.entries) {
    if (!entry.in_tables) continue;  // an empty one has no chunks, but its steps count
    const auto cohort = static_cast<size_t>(entry.cohort);
    const unsigned entry_stages = stages.empty() ? 0 : stages.at(cohort) & entry.stages;
    Bucket key{entry.device, flags.at(cohort), entry_stages, batch.operand_count(), {}, entry.block_size, {}, {}, true, true};
    Bucket::Row row{};
    bool aligned = true;
    for (int k = 0; k < key.operand_count; ++k) {
      const Operand& operand = entry.operands[k];
      if (!operand.scales) key.formats[k] = operand.format;
      row[Bucket::kOperands + static_cast<size_t>(k)] = address_of(operand.data);
      if (operand.scales) row[Bucket::kScales + static_cast<size_t>(k - kFirstState)] = address_of(operand.scales);
      aligned &= is_aligned(operand.data);
    }
    for (int k = 0; k < kStageOperands; ++k) {
      if (!(entry_stages & stage::kUses[k])) continue;
      const Operand& operand = entry.operands[kMask + k];
      key.formats[kMask + k] = operand.format;
      row[Bucket::kStages + static_cast<size_t>(k)] = address_of(operand.data);
      aligned &= is_aligned(operand.data);
    }
    row[Bucket::kCount] = entry.count;
    row[Bucket::kAligned] = aligned;
    row[Bucket::kConstants] = first_row + entry.cohort;
    row[Bucket::kScalars] = on_device ? kOwnScalars : row[Bucket::kConstants];
    row[Bucket::kNumber] = entry.number;
    if (on_device && entry.counter != nullptr && entry.counter_device == entry.device) {
      row[Bucket::kCounter] = address_of(entry.counter);
      row[Bucket::kCounterIsDouble] = entry.counter_is_double;
    }
    key.rows.push_back(row);
    if (entry.block_size > 0 && entry.count <= entry.block_size)
      of_one_block_.push_back(std::move(key));
    else
      place(key);
  }
}

void Tables::add_gradients(const Batch& batch) {
  const auto add = [this](const Entry& entry) {
    if (!entry.in_tables || entry.count == 0) return;
    const Operand& gradient = entry.operands[kGrad];
    Bucket key{entry.device, 0, 0, kFirstState, {}, 0, {}, {}, true, true};
    key.formats[kGrad] = gradient.format;
    Bucket::Row row{};
    row[Bucket::kOperands + kGrad] = address_of(gradient.data);
    row[Bucket::kCount] = entry.count;
    row[Bucket::kAligned] = is_aligned(gradient.data);
    key.rows.push_back(row);
    place(key);
  };
  for (const Entry& entry : batch.entries) add(entry);
  for (const Batch::Candidate& candidate : batch.missing) add(candidate.entry);
}

void Tables::place(Bucket& tensor) {
  Bucket::Row row = tensor.rows[0];
  auto bucket = std::find_if(buckets_.begin(), buckets_.end(), [&tensor](const Bucket& b) { return b.takes(tensor); });
  if (bucket == buckets_.end()) {
    tensor.rows.clear();
    bucket = buckets_.insert(buckets_.end(), std::move(tensor));
  }
  const auto number = static_cast<int64_t>(bucket->rows.size());
  if (row[Bucket::kScalars] == kOwnScalars) row[Bucket::kScalars] = number;
  bucket->rows.push_back(row);
  for (int64_t first = 0; first < row[Bucket::kCount]; first += chunk_)
    bucket->chunks.push_back({static_cast<int32_t>(number), static_cast<int32_t>(first / chunk_)});
}

void Tables::finish() {
  for (Bucket& tensor : of_one_block_) place(tensor);
  of_one_block_.clear();
  for (size_t i = 0; i < buckets_.size() && i < known_.size(); ++i) {
    Bucket& bucket = buckets_[i];
    if (!bucket.takes(known_[i])) continue;
    bucket.rows_changed = bucket.rows != known_[i].rows;
    bucket.chunks_changed = bucket.chunks != known_[i].chunks;
  }
}

}  // namespace fused_opt

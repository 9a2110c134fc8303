#include "tables.h"

#include <algorithm>

namespace fused_opt {

bool Bucket::takes(const Bucket& o) const {
  return device == o.device && flags == o.flags && block_size == o.block_size && operand_count == o.operand_count &&
         std::equal(formats, formats + operand_count, o.formats);
}

void Tables::begin() {
  known_.swap(buckets_);
  buckets_.clear();
}

void Tables::add(const Batch& batch, const std::vector<unsigned>& flags, int64_t first_row, bool on_device) {
  for (const Entry& entry : batch.entries) {
    if (!entry.in_tables) continue;  // an empty one has no chunks, but its steps count
    const auto cohort = static_cast<size_t>(entry.cohort);
    Bucket key{entry.device, flags[cohort], batch.operand_count(), {}, entry.block_size, {}, {}, true, true};
    Bucket::Row row{};
    bool aligned = true;
    for (int k = 0; k < key.operand_count; ++k) {
      const Operand& operand = entry.operands[k];
      key.formats[k] = operand.scales ? Format::kFloat32 : operand.format;
      row[Bucket::kOperands + static_cast<size_t>(k)] = reinterpret_cast<intptr_t>(operand.data);
      if (operand.scales) row[Bucket::kScales + static_cast<size_t>(k - kFirstState)] = reinterpret_cast<intptr_t>(operand.scales);
      aligned &= reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
    }
    auto bucket = std::find_if(buckets_.begin(), buckets_.end(), [&key](const Bucket& b) { return b.takes(key); });
    if (bucket == buckets_.end()) bucket = buckets_.insert(buckets_.end(), std::move(key));
    const auto number = static_cast<int64_t>(bucket->rows.size());
    row[Bucket::kCount] = entry.count;
    row[Bucket::kAligned] = aligned;
    row[Bucket::kConstants] = first_row + entry.cohort;
    row[Bucket::kScalars] = on_device ? number : row[Bucket::kConstants];
    if (on_device && entry.counter != nullptr && entry.counter_device == entry.device) {
      row[Bucket::kCounter] = reinterpret_cast<intptr_t>(entry.counter);
      row[Bucket::kCounterIsDouble] = entry.counter_is_double;
    }
    bucket->rows.push_back(row);
    for (int64_t first = 0; first < entry.count; first += chunk_)
      bucket->chunks.push_back({static_cast<int32_t>(number), static_cast<int32_t>(first / chunk_)});
  }
}

void Tables::finish() {
  for (size_t i = 0; i < buckets_.size() && i < known_.size(); ++i) {
    Bucket& bucket = buckets_[i];
    if (!bucket.takes(known_[i])) continue;
    bucket.rows_changed = bucket.rows != known_[i].rows;
    bucket.chunks_changed = bucket.chunks != known_[i].chunks;
  }
}

}  // namespace fused_opt

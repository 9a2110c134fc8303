// The tensors of a step that kernels on a device take: as tables that are copied there. See kernels/step.py for what reads them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "batch.h"

namespace fused_opt {

// What one launch serves: tensors on one device, of the same formats, with the same compile-time options.
struct Bucket {
  Device device;
  unsigned flags, stages;
  int operand_count;
  Format formats[kAllOperands];  // kFloat32 for states in 8-bit codes, and of what stages do not use
  int64_t block_size;            // of states in 8-bit codes; else 0

  // A row for each tensor.
  enum Column {
    kOperands,
    kScales = kOperands + kMaxOperands,
    kCount = kScales + kMaxStates,
    kAligned,    // whether all addresses are multiples of 16 bytes
    kScalars,    // row of the scalars: of the tensor's cohort or, if they are computed on the device, its own
    kConstants,  // row of its cohort, among those of all groups
    kCounter,    // address, or 0 if there is none on the device
    kCounterIsDouble,
    kStages,                             // addresses of what stages use; 0 for what is not there
    kNumber = kStages + kStageOperands,  // of the parameter in its group
    kColumns
  };
  using Row = std::array<int64_t, kColumns>;
  using Chunk = std::array<int32_t, 2>;  // row of its tensor, its number

  std::vector<Row> rows;
  std::vector<Chunk> chunks;
  bool rows_changed, chunks_changed;  // since the tables before

  // Whether their tensors can go together. Those of no more than one block can go with any that have longer ones.
  bool takes(const Bucket& other) const;
};

class Tables {
 public:
  // Elements in a chunk.
  explicit Tables(int64_t chunk) : chunk_(chunk) {}

  // Starts anew. What was there stays as what the new tables are compared with.
  void begin();

  // Adds a batch's entries for devices. `flags` and `stages`, which may be empty, have the options of each of its cohorts, whose constants,
  // and scalars unless `on_device`, are in rows from `first_row` on.
  void add(const Batch& batch, const std::vector<unsigned>& flags, int64_t first_row, bool on_device, const std::vector<unsigned>& stages);

  // Adds the gradients of a batch's tensors for devices, those without states, too; of each row only what concerns them is set.
  void add_gradients(const Batch& batch);

  // After the last batch.
  void finish();

  const std::vector<Bucket>& buckets() const { return buckets_; }

 private:
  void place(Bucket& tensor);

  const int64_t chunk_;
  std::vector<Bucket> buckets_, known_;
  std::vector<Bucket> of_one_block_;  // each of one tensor
};

}  // namespace fused_opt

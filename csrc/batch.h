// One parameter group's step as data: which parameters can be updated here, and where their memory is. No arithmetic.
#pragma once

#include <Python.h>

#include <string>
#include <utility>
#include <vector>

#include "sharing.h"
#include "task.h"
#include "tensor_reader.h"

namespace fused_opt {

// Parameters that take the same scalars and flags: they have made the same number of steps, and their states are new or not.
struct Cohort {
  static constexpr double kUnknown = -1;
  double step;  // made before this one; 0 for rules that do not count, kUnknown if the counter is on a GPU
  bool fresh;   // the states were created for this step
};

// Who steps the tensors of a kind of device: nobody here, the CPU's kernels, or kernels on the device, which take tables (see tables.h).
enum class Server : int { kNobody, kKernels, kTables };

struct Servers {
  Server cpu = Server::kKernels, gpu = Server::kNobody;

  Server of(const Device& device) const { return device.is_cpu() ? cpu : device.is_gpu() ? gpu : Server::kNobody; }
};

// A state as optimizer.state has it: a tensor like the parameter, or codes and their blocks' scales.
struct Slot {
  PyObject* name;    // interned key
  PyObject* scales;  // interned key
  bool non_negative;
};

// What a rule and the stages around it read and write beside parameter and gradient.
struct Layout {
  std::vector<Slot> slots;           // in the rule's order
  PyObject* counter;                 // interned key of the step counter, or null
  bool takes_codes;                  // whether states may be in 8-bit codes
  bool late;                         // whether the first of `slots` may be made after the counter: SGD's
  PyObject* stages[kStageOperands];  // interned keys of what stages use; null if the group has no such stage
  bool split;                        // whether companions are whole numbers
};

struct Entry {
  Operand operands[kAllOperands];  // those without data are not there
  int64_t bytes[kAllOperands];     // from an operand's first byte to its last
  int64_t number;                  // of the parameter in its group
  unsigned stages = 0;             // those that this parameter can have
  int64_t count;                   // real numbers in each operand
  Precision precision;
  Device device;
  bool in_tables = false;  // for kernels on the device; else for those of the CPU
  int64_t block_size = 0;  // of states in 8-bit codes; 0 if they are none
  int walk = -1;           // index in Batch::walks if some operand is not densely packed, or not in the others' order
  int cohort;
  void* counter = nullptr;  // the step counter's memory
  Device counter_device;
  bool counter_is_double = false;

  // Operand number `k` is the tensor, stored in a format.
  void place(int k, const TensorInfo& t, Format format) {
    operands[k] = {t.data, format, nullptr};
    bytes[k] = bytes_spanned(t);
    if (format == Format::kFloat64) precision = Precision::kDouble;
  }
};

inline int64_t blocks_of(int64_t numel, int64_t block_size) { return (numel + block_size - 1) / block_size; }

class Batch {
 public:
  Batch(const TensorReader& reader, Layout layout) : reader_(reader), layout_(std::move(layout)) {}
  ~Batch() { clear(); }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  // Reads the group; writes nothing. Every parameter with a gradient ends up in exactly one of: entries (with states), missing (to be
  // given states, see adopt), or declined (with the reason it cannot be served here). `state` maps parameters to dicts.
  // With assume_grad a parameter without gradient is read as if it had one of its own layout.
  // `servers` says who steps the tensors of each device. `first_number`: of the list's first parameter in its group.
  // Throws on what no implementation could use: a state of a wrong shape or kind, a key that is missing, a parameter whose elements share
  // memory. False if all is as in most steps: nothing is missing, declined, mixed or complex.
  bool gather(PyObject* params, PyObject* state, bool assume_grad, const Servers& servers, int64_t first_number = 0);

  // Completes missing parameter number `i` with its dict of states, of which some were just made; `fresh` if the rule's are among them.
  void adopt(size_t i, PyObject* param_state, bool fresh);

  // Drops every reference and entry; keeps the memory for the next step.
  void clear();

  // The memory that the step will touch: of entries and missing ones.
  void append_ranges(std::vector<Range>& ranges) const;

  // Of the kernel for an entry: the operands' own if they have one in common, are densely packed and pass no stage, else the precision's.
  Format kernel_format(const Entry& entry, unsigned stages) const;
  int operand_count() const { return kFirstState + static_cast<int>(layout_.slots.size()); }

  // Adds one to every counter in the CPU's memory; not to those of entries in tables if `on_device`, where kernels do it.
  void count_steps(bool on_device);

  struct Candidate {
    Py_ssize_t index;
    TensorInfo param, grad;
    bool dense;  // both, in the same order
    Entry entry;
  };
  std::vector<Entry> entries;
  std::vector<Cohort> cohorts;
  std::vector<Candidate> missing;
  std::vector<std::pair<Py_ssize_t, const char*>> declined;
  std::vector<Walk> walks;
  std::vector<Py_ssize_t> complex;        // indices of those of entries and missing that are complex
  std::vector<Py_ssize_t> mixed;          // indices of parameters of entries and missing whose gradient has another dtype
  std::vector<PyObject*> params;          // of entries and missing, in the order of the list
  std::vector<Py_ssize_t> indices;        // theirs
  std::vector<Py_ssize_t> table_indices;  // of those that kernels on a device take
  std::vector<PyObject*> written;         // states and counters of entries

 private:
  const char* classify(PyObject* param, PyObject* grad, Candidate& candidate) const;
  const char* why_not_in_tables(const Candidate& candidate) const;
  bool attach_states(PyObject* param_state, bool fresh, Candidate& candidate, const char** because);
  const char* attach_existing(PyObject* param_state, Candidate& candidate, TensorInfo* tensors, bool& dense, bool all);
  const char* why_not_completed(PyObject* param_state, Candidate candidate);
  void attach_scales(Candidate& candidate, int operand, const TensorInfo& codes, const TensorInfo& first, PyObject* tensor);
  const char* attach_stages(PyObject* param_state, Candidate& candidate, TensorInfo* tensors, bool& dense, bool all);
  bool lacks_rules(PyObject* param_state) const;
  bool lacks_stages(PyObject* param_state, const TensorInfo& param) const;
  void check_shapes(PyObject* param_state, const TensorInfo& param) const;
  PyObject* state(PyObject* param_state, PyObject* key, const Candidate& candidate);
  bool read_state(size_t index, size_t position, PyObject* tensor, TensorInfo& out);
  size_t positions() const { return 2 * layout_.slots.size() + 1 + kStageOperands; }
  PyObject* hold(PyObject* object);
  int cohort(double step, bool fresh);

  const TensorReader& reader_;
  const Layout layout_;
  Servers servers_;
  std::vector<PyObject*> held_;     // a reference to every object whose memory is used, so that none is freed without the GIL
  std::vector<Hold> small_states_;  // by index and position: slots, their scales, the counter, those of stages; see kMaxHeldBytes
};

}  // namespace fused_opt

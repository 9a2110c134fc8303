// One parameter group's step as data: which parameters can be updated here, and where their memory is. No arithmetic.
#pragma once

#include <Python.h>

#include <string>
#include <utility>
#include <vector>

#include "request.h"
#include "tensor_reader.h"

namespace fused_opt {

// Parameters that take the same scalars and flags: they have made the same number of steps, and their states are new or not.
struct Cohort {
  double step;  // steps made before this one; 0 for rules that do not count
  bool fresh;   // the states were created for this step
};

// What a rule reads and writes beside parameter and gradient.
struct Layout {
  std::vector<PyObject*> slots;  // interned state keys, in the rule's order
  PyObject* counter;             // interned key of the step counter, or null
};

struct Entry {
  Run run;
  Dtype dtype;
  int cohort;
  void* counter = nullptr;  // the step counter's memory
  bool counter_is_double = false;

  uint8_t item_size() const { return dtype == Dtype::kFloat32 ? 4 : 8; }
};

class Batch {
 public:
  Batch(const TensorReader& reader, Layout layout) : reader_(reader), layout_(std::move(layout)) {}
  ~Batch() { clear(); }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  // Reads the group; writes nothing. Every parameter with a gradient ends up in exactly one of: entries (with states), missing (to be
  // given states, see adopt), or declined (with the reason it cannot be served here). `state` maps parameters to dicts.
  // With assume_grad a parameter without gradient is read as if it had one of its own layout.
  // Throws on states that no implementation could use (a wrong shape or dtype, a key that is missing).
  void gather(PyObject* params, PyObject* state, bool assume_grad);

  // Completes missing parameter number `i` with the dict of states just made for it.
  void adopt(size_t i, PyObject* param_state);

  // Drops every reference and entry; keeps the memory for the next step.
  void clear();

  // True if memory that this step writes is also another tensor's: then order matters, and parameters must run one at a time.
  bool shares_memory();

  void count_steps();  // adds one to every counter

  struct Missing {
    Py_ssize_t index;
    Entry entry;
    TensorInfo param;
  };
  std::vector<Entry> entries;
  std::vector<Cohort> cohorts;
  std::vector<Missing> missing;
  std::vector<std::pair<Py_ssize_t, const char*>> declined;
  std::vector<PyObject*> params;    // of entries and missing, in the order of the list
  std::vector<Py_ssize_t> indices;  // theirs
  std::vector<PyObject*> written;   // states and counters of entries

 private:
  const char* classify(PyObject* param, PyObject* grad, TensorInfo& info, Entry& entry);
  bool is_negated(PyObject* tensor) const;
  bool attach_states(size_t index, PyObject* param_state, const TensorInfo& param, bool fresh, Entry& entry, const char** because);
  void check_shapes(PyObject* param_state, const TensorInfo& param) const;
  bool read_state(size_t index, size_t slot, PyObject* tensor, TensorInfo& out);
  PyObject* hold(PyObject* object);
  int cohort(double step, bool fresh);

  struct Range {
    uintptr_t begin, end;
    bool write;
    bool operator==(const Range& o) const { return begin == o.begin && end == o.end && write == o.write; }
  };

  const TensorReader& reader_;
  const Layout layout_;
  std::vector<PyObject*> held_;     // a reference to every object whose memory is used, so that none is freed without the GIL
  std::vector<Hold> small_states_;  // by index and slot, the counter last; see kMaxHeldBytes
  std::vector<Range> ranges_, known_ranges_;
  bool known_to_share_ = false;
};

}  // namespace fused_opt

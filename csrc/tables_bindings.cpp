// Tables as Python sees them; see fused_opt/device.py for their use.
#include "tables.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "bindings.h"

namespace py = pybind11;

namespace fused_opt {
namespace {

py::tuple names_of(const Format* formats, int count) {
  py::tuple names(static_cast<size_t>(count));
  for (int k = 0; k < count; ++k) names[static_cast<size_t>(k)] = kFormatNames[static_cast<int>(formats[k])];
  return names;
}

py::tuple describe(const Bucket& bucket) {
  return py::make_tuple(std::pair(bucket.device.type, bucket.device.index), bucket.flags, names_of(bucket.formats, bucket.operand_count),
                        bucket.block_size, bucket.stages, names_of(bucket.formats + kMask, kStageOperands), bucket.rows.size(),
                        bucket.chunks.size(), bucket.rows_changed, bucket.chunks_changed);
}

template <class T>
void copy_to(const std::vector<T>& from, uintptr_t address) {
  if (!from.empty()) std::memcpy(reinterpret_cast<void*>(address), from.data(), from.size() * sizeof(T));
}

}  // namespace

void add_tables(py::module_& m) {
  py::class_<Tables>(m, "Tables")
      .def(py::init<int64_t>(), py::arg("chunk"))
      .def("begin", &Tables::begin)
      .def("add", &Tables::add, py::arg("batch"), py::arg("flags"), py::arg("first_row"), py::arg("on_device"),
           py::arg("stages") = std::vector<unsigned>())
      .def("add_gradients", &Tables::add_gradients, py::arg("batch"))
      .def("finish",
           [](Tables& self) {
             self.finish();
             py::list list;
             for (const Bucket& bucket : self.buckets()) list.append(describe(bucket));
             return list;
           })
      .def("copy_rows", [](const Tables& self, size_t bucket, uintptr_t address) { copy_to(self.buckets().at(bucket).rows, address); })
      .def("copy_chunks", [](const Tables& self, size_t bucket, uintptr_t address) { copy_to(self.buckets().at(bucket).chunks, address); });
  m.attr("table_columns") = static_cast<int>(Bucket::kColumns);
}

}  // namespace fused_opt

// pyadv._C says how the libraries that were compiled ahead beside it were made. No tensor passes
// through here, so it needs no PyTorch header; the kernels are ops, registered by _ops.so.
#include <pybind11/pybind11.h>

#include "build_info.h"  // generated: kBuildInfo, a JSON object per library

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the native libraries in this package were compiled.";
  m.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(kBuildInfo); },
      "A dict per library (cpu, and cuda if compiled): source hash, flags, PyTorch and tools.");
}

// pyadv._C reports how the libraries beside it were compiled ahead of time. It handles no tensor
// and needs no PyTorch header; _ops.so registers the kernels.
#include <pybind11/pybind11.h>

#include "build_info.h"  // generated: kBuildInfo, a JSON object per library

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the native libraries in this package were compiled.";
  m.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(kBuildInfo); },
      "A dict per library (cpu, and cuda if compiled): source hash, flags, PyTorch and tools.");
}

// Registers the CPU kernels of the ops whose schemas pyadv/ops defines.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/kernels.h"

namespace pyadv {
namespace backend {

using namespace pyadv::cpu;

class Device {
 public:
  explicit Device(const torch::stable::Tensor&) {}

  // Splits the items among torch's threads. `grain` is the smallest number worth a thread.
  template <class Args>
  void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t items,
           int64_t grain) const {
    if (items <= grain) return kernel(args, 0, items);
    torch::stable::parallel_for(0, items, grain,
                                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
};

}  // namespace backend
}  // namespace pyadv

#include "glue/activation.h"
#include "glue/convolution.h"
#include "glue/geometry.h"
#include "glue/losses.h"
#include "glue/noise.h"
#include "glue/norms.h"
#include "glue/projections.h"
#include "glue/steps.h"
#include "glue/weights.h"

STABLE_TORCH_LIBRARY_IMPL(pyadv, CPU, m) {
  pyadv::register_steps(m);
  pyadv::register_projections(m);
  pyadv::register_losses(m);
  pyadv::register_geometry(m);
  pyadv::register_weights(m);
  pyadv::register_norms(m);
  pyadv::register_noise(m);
  pyadv::register_activation(m);
  pyadv::register_convolution(m);
}

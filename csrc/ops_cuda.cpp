// Registers the CUDA kernels of the ops whose schemas pyadv/ops defines. It needs no CUDA header,
// because the stream is a void*. With PYADV_CUDA_ON_CPU the tests' shim has compiled the kernels,
// and they serve CPU tensors.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/kernels.h"

#if !defined(PYADV_CUDA_ON_CPU)
#include <dlfcn.h>
#endif

namespace pyadv {
namespace backend {

using namespace pyadv::cuda;

#if defined(PYADV_CUDA_ON_CPU)
class Device {
 public:
  explicit Device(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
#else
// The tensor's device and its current stream. The symbol is looked up at run time, so that this
// library also loads into a PyTorch without CUDA.
class Device {
 public:
  explicit Device(const torch::stable::Tensor& t)
      : index_(t.get_device_index()), guard_(t.get_device_index()) {}
  void* stream() const {
    using Getter = AOTITorchError (*)(int32_t, void**);
    static const Getter getter = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      return library == nullptr
                 ? nullptr
                 : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(getter != nullptr, "pyadv: this PyTorch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(getter(index_, &stream));
    return stream;
  }
#endif

  // A CUDA launcher chooses its own grid; only the CPU uses the number of items and the grain.
  template <class Args>
  void run(int (*kernel)(const Args&, void*), const Args& args, int64_t, int64_t) const {
    const int error = kernel(args, stream());
    STD_TORCH_CHECK(error == 0, "pyadv: CUDA launch failed with error ", error);
  }

#if !defined(PYADV_CUDA_ON_CPU)
 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace backend
}  // namespace pyadv

#include "glue/activation.h"
#include "glue/geometry.h"
#include "glue/losses.h"
#include "glue/noise.h"
#include "glue/norms.h"
#include "glue/projections.h"
#include "glue/steps.h"
#include "glue/weights.h"

#if defined(PYADV_CUDA_ON_CPU)
STABLE_TORCH_LIBRARY_IMPL(pyadv, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(pyadv, CUDA, m) {
#endif
  pyadv::register_steps(m);
  pyadv::register_projections(m);
  pyadv::register_losses(m);
  pyadv::register_geometry(m);
  pyadv::register_weights(m);
  pyadv::register_norms(m);
  pyadv::register_noise(m);
  pyadv::register_activation(m);
}

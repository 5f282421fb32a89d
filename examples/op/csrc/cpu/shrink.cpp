#include "common/shrink.h"

#include "cpu/clones.h"
#include "cpu/kernels.h"

namespace pyadv {
namespace cpu {
namespace {

struct ShrinkLoop {
  template <class T, class C>
  PYADV_HD static void run(const T* x, T* out, int64_t n, C threshold) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(Shrink::apply(widen(x[i]), threshold));
  }
};

}  // namespace

void shrink(const ShrinkArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * args.n;
      run<ShrinkLoop>(static_cast<const T*>(args.x) + first, static_cast<T*>(args.out) + first,
                      args.n, args.threshold.at<compute_t<T>>(first));
    }
  });
}

}  // namespace cpu
}  // namespace pyadv

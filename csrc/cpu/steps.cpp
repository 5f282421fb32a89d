#include "common/steps.h"

#include <algorithm>

#include "cpu/clones.h"
#include "cpu/kernels.h"
#include "cpu/spans.h"

namespace pyadv {
namespace cpu {
namespace {

struct LinfLoop {
  template <class T, class C>
  PYADV_HD static void run(const T* a, const T* g, const T* x, T* out, int64_t n,
                           LinfStep<C> step) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i)
      out[i] = narrow<T>(step(widen(a[i]), widen(g[i]), widen(x[i])));
  }
};

// Parameters that vary from element to element, materialised in the order of the data.
struct LinfElementwiseLoop {
  template <class T, class C>
  PYADV_HD static void run(const T* a, const T* g, const T* x, T* out, int64_t n, const C* alpha,
                           const C* eps, const C* lo, const C* hi) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i)
      out[i] = narrow<T>(LinfStep<C>{alpha[i], eps[i], lo[i], hi[i]}(widen(a[i]), widen(g[i]),
                                                                     widen(x[i])));
  }
};

}  // namespace

void linf_step(const StepArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using C = compute_t<T>;
    const T* a = static_cast<const T*>(args.x_adv);
    const T* g = static_cast<const T*>(args.grad);
    const T* x = static_cast<const T*>(args.x);
    T* out = static_cast<T*>(args.out);
    const int64_t whole = args.active != nullptr ? args.n : end;
    const int64_t length =
        args.elementwise ? whole
                         : span_length({&args.alpha, &args.eps, &args.lo, &args.hi}, whole);
    for_spans(begin, end, length, [&](int64_t i, int64_t last) {
      if (args.active != nullptr && !args.active[i / args.n]) {
        if (out != a) std::copy(a + i, a + last, out + i);
      } else if (args.elementwise) {
        run<LinfElementwiseLoop>(a + i, g + i, x + i, out + i, last - i,
                                 static_cast<const C*>(args.alpha.data) + i,
                                 static_cast<const C*>(args.eps.data) + i,
                                 static_cast<const C*>(args.lo.data) + i,
                                 static_cast<const C*>(args.hi.data) + i);
      } else {
        run<LinfLoop>(a + i, g + i, x + i, out + i, last - i,
                      LinfStep<C>{args.alpha.at<C>(i), args.eps.at<C>(i), args.lo.at<C>(i),
                                  args.hi.at<C>(i)});
      }
    });
  });
}

}  // namespace cpu
}  // namespace pyadv

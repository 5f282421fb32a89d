#include "common/norms.h"

#include <cmath>

#include "cpu/clones.h"
#include "cpu/kernels.h"
#include "cpu/reduce.h"

namespace pyadv {
namespace cpu {
namespace {

struct SquareSumLoop {
  template <class T>
  PYADV_HD static void run(const T* w, int64_t n, double* total) {
    using C = compute_t<T>;
    *total = sum<C>(n, [w](int64_t i) {
      const C v = widen(w[i]);
      return v * v;
    });
  }
};

struct ScaleLoop {
  template <class T, class C>
  PYADV_HD static void run(const T* w, T* out, int64_t n, C scale) {
    PYADV_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(widen(w[i]) * scale);
  }
};

}  // namespace

void norm_pieces(const NormArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = begin; i < end; ++i) {
      const NormArgs::Piece p = args.piece(i);
      run<SquareSumLoop>(static_cast<const T*>(args.data[p.tensor]) + p.begin, p.end - p.begin,
                         args.partial + i);
    }
  });
}

void norm_roots(const NormArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto tag) {
    using C = compute_t<typename decltype(tag)::type>;
    for (int64_t t = begin; t < end; ++t)
      static_cast<C*>(args.norms)[t] = static_cast<C>(std::sqrt(args.sum_of(t)));
  });
}

void norms_backward(const NormArgs& args, int64_t begin, int64_t end) {
  dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t i = begin; i < end; ++i) {
      const NormArgs::Piece p = args.piece(i);
      run<ScaleLoop>(static_cast<const T*>(args.data[p.tensor]) + p.begin,
                     static_cast<T*>(args.grad[p.tensor]) + p.begin, p.end - p.begin,
                     args.scale<compute_t<T>>(p.tensor));
    }
  });
}

}  // namespace cpu
}  // namespace pyadv

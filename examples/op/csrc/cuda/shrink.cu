#include "common/shrink.h"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace pyadv {
namespace cuda {
namespace {

// x runs over the packs of a row, y over the rows.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) shrink_kernel(ShrinkArgs args) {
  using Pack = Vec<T, V>;
  using C = compute_t<T>;
  const int64_t packs = args.n / V;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < args.rows;
       row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    const C threshold = args.threshold.at<C>(row * args.n);
    const Pack* from = static_cast<const Pack*>(args.x) + row * packs;
    Pack* to = static_cast<Pack*>(args.out) + row * packs;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < packs;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      Pack pack = from[i];
#pragma unroll
      for (T& v : pack.v) v = narrow<T>(Shrink::apply(widen(v), threshold));
      to[i] = pack;
    }
  }
}

}  // namespace

int shrink(const ShrinkArgs& args, void* stream) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = 16 / sizeof(T);
    const bool vectors = aligned16(args.x, args.out) && args.n % V == 0;
    const RowGrid g(args.rows, vectors ? args.n / V : args.n);
    if (vectors)
      PYADV_LAUNCH((shrink_kernel<T, V>), g.grid, g.block, 0, stream, args);
    else
      PYADV_LAUNCH((shrink_kernel<T, 1>), g.grid, g.block, 0, stream, args);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace cuda
}  // namespace pyadv

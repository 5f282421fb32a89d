#include "common/steps.h"

#include "cuda/elements.cuh"
#include "cuda/kernels.h"
#include "cuda/rows.cuh"

namespace pyadv {
namespace cuda {
namespace {

struct Masked {
  const bool* mask;
  __device__ __forceinline__ bool operator()(int64_t row) const { return mask[row]; }
};

template <class T>
struct Better {
  KeepBestArgs k;
  __device__ __forceinline__ bool operator()(int64_t row) const { return k.better<T>(row); }
};

// blockIdx.z selects the pair of tensors. A unit U is 16 bytes or one.
template <class U, class Wanted>
__global__ void __launch_bounds__(kThreads) keep_rows_kernel(KeepRowsArgs k, Wanted wanted) {
  const int64_t units = k.row_bytes / static_cast<int64_t>(sizeof(U));
  const U* from = static_cast<const U*>(blockIdx.z == 0 ? k.from[0] : k.from[1]);
  U* to = static_cast<U*>(blockIdx.z == 0 ? k.to[0] : k.to[1]);
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < k.rows;
       row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    if (!wanted(row)) continue;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < units;
         i += static_cast<int64_t>(gridDim.x) * blockDim.x)
      to[row * units + i] = from[row * units + i];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) keep_losses_kernel(KeepBestArgs k) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < k.pairs.rows;
       row += stride)
    k.keep<T>(row);
}

template <class T>
__global__ void __launch_bounds__(kThreads) square_kernel(SquareStepArgs s) {
  const Window w = s.window;
  const auto place = [&](uint32_t i, int d, int64_t size) {
    return i / static_cast<uint32_t>(w.stride[d]) % static_cast<uint32_t>(size);
  };
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; row < s.rows;
       row += static_cast<int64_t>(gridDim.y) * blockDim.y) {
    const bool active = s.active == nullptr || s.active[row];
    if (!active && s.out == s.x_adv) continue;
    const T* from = static_cast<const T*>(active ? s.x_best : s.x_adv) + row * s.n;
    T* out = static_cast<T*>(s.out) + row * s.n;
    const int64_t top = w.top(row), left = w.left(row);
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < s.n;
         at += static_cast<int64_t>(gridDim.x) * blockDim.x) {
      const uint32_t i = static_cast<uint32_t>(at);
      const int64_t y = place(i, 1, w.height) - top, z = place(i, 2, w.width) - left;
      const bool inside = active && y >= 0 && y < w.side && z >= 0 && z < w.side;
      out[i] = inside ? SquareStep::at<T>(s, row * s.n + i, w.up(row, place(i, 0, w.channels)))
                      : from[i];
    }
  }
}

// For contiguous images: x runs over the packs of a line (one channel, one y), y over the lines, z
// over the rows. All parameters are constant in a line. x is read only in the window.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) square_lines_kernel(SquareStepArgs s) {
  using C = compute_t<T>;
  using Pack = Vec<T, V>;
  const Window w = s.window;
  const int packs = static_cast<int>(w.width) / V, height = static_cast<int>(w.height);
  const int lines = static_cast<int>(w.channels) * height, side = static_cast<int>(w.side);
  for (int64_t row = blockIdx.z; row < s.rows; row += gridDim.z) {
    const bool active = s.active == nullptr || s.active[row];
    if (!active && s.out == s.x_adv) continue;
    const int64_t first = row * s.n, begin = row * (s.n / V);
    const Pack* from = static_cast<const Pack*>(active ? s.x_best : s.x_adv) + begin;
    const Pack* x = static_cast<const Pack*>(s.x) + begin;
    Pack* out = static_cast<Pack*>(s.out) + begin;
    const int top = static_cast<int>(w.top(row)), left = static_cast<int>(w.left(row));
    for (int line = blockIdx.y * blockDim.y + threadIdx.y; line < lines;
         line += gridDim.y * blockDim.y) {
      const int channel = line / height, y = line - channel * height - top;
      const bool crosses = active && y >= 0 && y < side;
      const int64_t at = first + static_cast<int64_t>(line) * w.width;
      C eps = C(0), lo = C(0), hi = C(0);
      bool up = false;
      if (crosses) {
        eps = s.params.eps.template at<C>(at);
        lo = s.lo.template at<C>(at);
        hi = s.hi.template at<C>(at);
        up = w.up(row, channel);
      }
      for (int p = blockIdx.x * blockDim.x + threadIdx.x; p < packs; p += gridDim.x * blockDim.x) {
        const int64_t i = static_cast<int64_t>(line) * packs + p;
        const int z = p * V - left;
        Pack pack = from[i];
        if (crosses && z + V > 0 && z < side) {
          const Pack centre = x[i];
#pragma unroll
          for (int k = 0; k < V; ++k)
            if (z + k >= 0 && z + k < side)
              pack.v[k] = narrow<T>(
                  SquareStep::apply<C>(widen(pack.v[k]), widen(centre.v[k]), eps, lo, hi, up));
        }
        out[i] = pack;
      }
    }
  }
}

template <class Wanted>
void copy_rows(const KeepRowsArgs& k, const Wanted& wanted, void* stream) {
  if (k.row_bytes == 0) return;
  using Wide = Vec<unsigned char, 16>;
  const bool wide = aligned16(k.from[0], k.from[1], k.to[0], k.to[1]) && k.row_bytes % 16 == 0;
  RowGrid g(k.rows, wide ? k.row_bytes / 16 : k.row_bytes);
  g.grid.z = k.to[1] == nullptr ? 1 : 2;
  if (wide)
    PYADV_LAUNCH((keep_rows_kernel<Wide, Wanted>), g.grid, g.block, 0, stream, k, wanted);
  else
    PYADV_LAUNCH((keep_rows_kernel<unsigned char, Wanted>), g.grid, g.block, 0, stream, k, wanted);
}

}  // namespace

int linf_step(const StepArgs& s, void* stream) { return run_elements<LinfStep>(s, stream); }

int linf_momentum_step(const MomentumStepArgs& s, void* stream) {
  return run_elements<LinfMomentumStep>(s, stream);
}

int l2_step(const StepArgs& s, void* stream) { return run_rows<L2Step>(s, stream); }

int l2_momentum_step(const MomentumStepArgs& s, void* stream) {
  return run_rows<L2MomentumStep>(s, stream);
}

int linf_boundary_step(const BoundaryStepArgs& s, void* stream) {
  return run_rows<BoundaryStep<false>>(s, stream);
}

int l2_boundary_step(const BoundaryStepArgs& s, void* stream) {
  return run_rows<BoundaryStep<true>>(s, stream);
}

int l1_step(const SparseStepArgs& s, void* stream) { return run_rows<L1Step>(s, stream); }

int keep_rows(const KeepRowsArgs& k, void* stream) {
  copy_rows(k, Masked{k.mask}, stream);
  return static_cast<int>(cudaGetLastError());
}

// The losses need a second launch: several blocks share a row, and all of them must compare its
// loss before one overwrites it.
int keep_best(const KeepBestArgs& k, void* stream) {
  return dispatch(k.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    copy_rows(k.pairs, Better<T>{k}, stream);
    PYADV_LAUNCH((keep_losses_kernel<T>), elementwise_blocks(k.pairs.rows), kThreads, 0, stream, k);
    return static_cast<int>(cudaGetLastError());
  });
}

int square_step(const SquareStepArgs& s, void* stream) {
  return dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = 16 / sizeof(T);
    const Window& w = s.window;
    const bool contiguous = w.stride[2] == 1 && (w.height == 1 || w.stride[1] == w.width) &&
                            (w.channels == 1 || w.stride[0] == w.height * w.width);
    if (contiguous && !s.per_element && w.width % V == 0 &&
        aligned16(s.x_adv, s.x_best, s.x, s.out)) {
      RowGrid g(w.channels * w.height, w.width / V);
      g.grid.z = static_cast<unsigned>(s.rows < 65535 ? s.rows : 65535);
      PYADV_LAUNCH((square_lines_kernel<T, V>), g.grid, g.block, 0, stream, s);
    } else {
      const RowGrid g(s.rows, s.n);
      PYADV_LAUNCH((square_kernel<T>), g.grid, g.block, 0, stream, s);
    }
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace cuda
}  // namespace pyadv

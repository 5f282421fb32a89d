#include "common/activation.h"

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace pyadv {
namespace cuda {
namespace {

// The values of a parameter per channel that a thread reads, pack by pack. The packs of a thread
// lie a constant stride apart, so its place among the channels moves by a constant: a thread
// divides once, not for every pack.
template <class C, int V>
class Channels {
 public:
  __device__ __forceinline__ Channels(const Param& p, int64_t pack, int64_t stride)
      : data_(static_cast<const C*>(p.data)), inner_(p.inner), period_(p.period) {
    if (data_ == nullptr) return;
    const int64_t first = pack * V, step = stride * V;
    within_ = first % inner_;
    channel_ = first / inner_ % period_;
    step_within_ = step % inner_;
    step_channel_ = step / inner_ % period_;
  }

  // The value for element k of the pack.
  __device__ __forceinline__ C value(int k) const {
    return data_[inner_ == 1 ? channel_ + k : channel_];
  }

  __device__ __forceinline__ void advance() {
    within_ += step_within_;
    channel_ += step_channel_;
    if (within_ >= inner_) {
      within_ -= inner_;
      ++channel_;
    }
    if (channel_ >= period_) channel_ -= period_;
  }

  __device__ __forceinline__ bool given() const { return data_ != nullptr; }

 private:
  const C* data_;
  int64_t inner_, period_;
  int64_t within_ = 0, channel_ = 0, step_within_ = 0, step_channel_ = 0;
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) affine_relu_kernel(AffineReluArgs a) {
  using C = compute_t<T>;
  using Pack = Vec<T, V>;
  const int64_t packs = a.total / V, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const C slope = static_cast<C>(a.slope);
  Channels<C, V> scale(a.scale, begin, stride), shift(a.shift, begin, stride);
  for (int64_t i = begin; i < packs; i += stride) {
    Pack x = static_cast<const Pack*>(a.x)[i], added;
    if (a.added != nullptr) {
      added = static_cast<const Pack*>(a.added)[i];
#pragma unroll
      for (int k = 0; k < V; ++k) x.v[k] = narrow<T>(widen(x.v[k]) + widen(added.v[k]));
    }
    if (a.sum != nullptr) static_cast<Pack*>(a.sum)[i] = x;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      C v = widen(x.v[k]);
      if (scale.given()) v = v * scale.value(k);
      if (shift.given()) v = v + shift.value(k);
      x.v[k] = narrow<T>(below_zero(v, v, slope));
    }
    static_cast<Pack*>(a.out)[i] = x;
    scale.advance();
    shift.advance();
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) affine_relu_backward_kernel(AffineReluBackwardArgs a) {
  using C = compute_t<T>;
  using Pack = Vec<T, V>;
  const int64_t packs = a.total / V, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const C slope = static_cast<C>(a.slope);
  Channels<C, V> scale(a.scale, begin, stride);
  for (int64_t i = begin; i < packs; i += stride) {
    // All loads are issued before any arithmetic.
    const Pack y = static_cast<const Pack*>(a.y)[i], grad = static_cast<const Pack*>(a.grad)[i];
    Pack other{}, added{};
    if (a.other != nullptr) other = static_cast<const Pack*>(a.other)[i];
    if (a.added != nullptr) added = static_cast<const Pack*>(a.added)[i];
    Pack result;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      C v = widen(grad.v[k]);
      if (a.other != nullptr) v = v + widen(other.v[k]);
      v = below_zero(widen(y.v[k]), v, slope);
      if (scale.given()) v = v * scale.value(k);
      if (a.added != nullptr) v = v + widen(added.v[k]);
      result.v[k] = narrow<T>(v);
    }
    static_cast<Pack*>(a.out)[i] = result;
    scale.advance();
  }
}

// Whether a pack of V elements lies within one run of channels: V successive channels, or one.
bool fits_packs(const Param& p, int64_t V) {
  return p.data == nullptr || (p.inner == 1 ? p.period : p.inner) % V == 0;
}

}  // namespace

int affine_relu(const AffineReluArgs& a, void* stream) {
  return dispatch(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = 16 / sizeof(T);
    if (a.total % V == 0 && fits_packs(a.scale, V) && fits_packs(a.shift, V) &&
        aligned16(a.x, a.added, a.out, a.sum))
      PYADV_LAUNCH((affine_relu_kernel<T, V>), elementwise_blocks(a.total / V), kThreads, 0, stream,
                   a);
    else
      PYADV_LAUNCH((affine_relu_kernel<T, 1>), elementwise_blocks(a.total), kThreads, 0, stream, a);
    return static_cast<int>(cudaGetLastError());
  });
}

int affine_relu_backward(const AffineReluBackwardArgs& a, void* stream) {
  return dispatch(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int V = 16 / sizeof(T);
    if (a.total % V == 0 && fits_packs(a.scale, V) &&
        aligned16(a.y, a.grad, a.other, a.added, a.out))
      PYADV_LAUNCH((affine_relu_backward_kernel<T, V>), elementwise_blocks(a.total / V), kThreads,
                   0, stream, a);
    else
      PYADV_LAUNCH((affine_relu_backward_kernel<T, 1>), elementwise_blocks(a.total), kThreads, 0,
                   stream, a);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace cuda
}  // namespace pyadv

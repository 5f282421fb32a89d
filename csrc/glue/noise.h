// Noise: converts the tensors and launches one kernel.
#pragma once

#include "common/noise.h"
#include "glue/tensors.h"

namespace pyadv {

constexpr int64_t kBlockGrain = 4096;  // Philox blocks worth a thread
constexpr int64_t kHashGrain = 16384;  // hashed elements worth a thread

inline Integer integer_of(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == 1, op, ": ", name,
                  " must be one int64 value");
  STD_TORCH_CHECK(t.is_cpu() || t.is_cuda() == like.is_cuda(), op, ": ", name,
                  " is on another device than the first tensor");
  Integer integer;
  if (t.is_cpu())
    integer.value = *t.const_data_ptr<int64_t>();
  else
    integer.data = t.const_data_ptr<int64_t>();
  return integer;
}

// Draws the noise in row-major order and copies it if `like` has another layout.
template <class Kernel>
Tensor keyed(const char* op, Kernel kernel, const Tensor& like, const Tensor& ids,
             const Tensor& seed, const Tensor& stream) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.dim() == 1 &&
                      ids.numel() == rows_of(like) && ids.is_cuda() == like.is_cuda(),
                  op, ": ids must be an int64 tensor with one value per row, on the same device");
  STD_TORCH_CHECK(row_size(like) <= int64_t{1} << 34, op, ": a row has more than 2^34 elements");
  NoiseArgs args{};
  args.dtype = dtype_of(op, like);
  args.seed = integer_of(op, "seed", seed, like);
  args.stream = integer_of(op, "stream", stream, like);
  args.rows = rows_of(like);
  args.n = row_size(like);
  Tensor out = torch::stable::empty_like(like);
  if (out.numel() == 0) return out;
  backend::Device device(out);
  const bool direct = out.is_contiguous();
  const Tensor block = direct ? out : torch::stable::new_empty(out, out.sizes());
  const Tensor dense = torch::stable::contiguous(ids);
  args.out = block.mutable_data_ptr();
  args.ids = dense.const_data_ptr<int64_t>();
  device.run(kernel, args, args.rows * noise_blocks(args.n), kBlockGrain);
  if (!direct) torch::stable::copy_(out, block);
  return out;
}

inline Tensor keyed_uniform(const Tensor& like, const Tensor& ids, const Tensor& seed,
                            const Tensor& stream) {
  return keyed("keyed_uniform", backend::keyed_uniform, like, ids, seed, stream);
}

inline Tensor keyed_normal(const Tensor& like, const Tensor& ids, const Tensor& seed,
                           const Tensor& stream) {
  return keyed("keyed_normal", backend::keyed_normal, like, ids, seed, stream);
}

inline Tensor row_hash(const Tensor& x) {
  const DType dtype = dtype_of("row_hash", x);
  Tensor out = torch::stable::new_empty(x, {rows_of(x)}, ScalarType::Long);
  if (out.numel() == 0) return out;
  backend::Device device(x);
  const Tensor dense = torch::stable::contiguous(x);
  const HashArgs args{dtype, dense.const_data_ptr(), out.mutable_data_ptr<int64_t>(), rows_of(x),
                      row_size(x)};
  device.run(backend::row_hash, args, args.rows, kHashGrain / std::max<int64_t>(args.n, 1) + 1);
  return out;
}

template <class Library>
void register_noise(Library& m) {
  m.impl("keyed_uniform", TORCH_BOX(&keyed_uniform));
  m.impl("keyed_normal", TORCH_BOX(&keyed_normal));
  m.impl("row_hash", TORCH_BOX(&row_hash));
}

}  // namespace pyadv

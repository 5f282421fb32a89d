// Geometry: converts the tensors and launches one kernel.
#pragma once

#include "common/geometry.h"
#include "glue/tensors.h"

namespace pyadv {

// A (B,) tensor that a kernel changes in place. A tensor with gaps goes through a copy.
class InPlace {
 public:
  InPlace(const char* op, const char* name, const Tensor& t, ScalarType type, const Tensor& like)
      : t_(t), block_(torch::stable::contiguous(t)) {
    STD_TORCH_CHECK(t.scalar_type() == type && same_shape(t, like) && t.is_cuda() == like.is_cuda(),
                    op, ": ", name, " has the wrong dtype, shape or device");
  }
  template <class T>
  T* data() const {
    return block_.mutable_data_ptr<T>();
  }
  void finish() {
    if (block_.mutable_data_ptr() != t_.mutable_data_ptr()) torch::stable::copy_(t_, block_);
  }

 private:
  Tensor t_, block_;
};

inline void track(const Tensor& correct, Tensor kappa, Tensor active, Tensor patience) {
  const char* op = "track";
  STD_TORCH_CHECK(correct.scalar_type() == ScalarType::Bool && correct.dim() <= 1, op,
                  ": correct must be a bool tensor with one value per row");
  InPlace k(op, "kappa", kappa, ScalarType::Long, correct);
  InPlace a(op, "active", active, ScalarType::Bool, correct);
  InPlace p(op, "patience", patience, ScalarType::Long, correct);
  if (correct.numel() == 0) return;
  backend::Device device(correct);
  const Tensor dense = torch::stable::contiguous(correct);
  const TrackArgs args{dense.const_data_ptr<bool>(), k.data<int64_t>(), a.data<bool>(),
                       p.data<int64_t>(), correct.numel()};
  device.run(backend::track, args, args.rows, int64_t{65536});
  k.finish();
  a.finish();
  p.finish();
}

template <class Library>
void register_geometry(Library& m) {
  m.impl("track", TORCH_BOX(&track));
}

}  // namespace pyadv

// Soft thresholding: converts the tensors and launches one kernel.
#pragma once

#include "common/shrink.h"
#include "glue/tensors.h"

namespace pyadv {

inline void shrink(Tensor& out, const Tensor& x, const Tensor& threshold) {
  const char* op = "shrink";
  check_like(op, "out", out, x);
  ShrinkArgs args{};
  args.dtype = dtype_of(op, x);
  args.rows = rows_of(x);
  args.n = row_size(x);
  if (out.numel() == 0) return;
  backend::Device device(out);
  Output output(out);
  const Tensor in = in_layout_of(output.block(), x);
  Parameters parameters(op, output.block(), args.dtype);
  args.x = in.const_data_ptr();
  args.out = output.data();
  args.threshold = parameters.add(threshold);
  STD_TORCH_CHECK(parameters.constant_in_rows(args.threshold), op,
                  ": threshold must be one number or hold one per sample");
  device.run(backend::shrink, args, args.rows, std::max<int64_t>(1, 32768 / args.n));
  output.finish();
}

template <class Library>
void register_shrink(Library& m) {
  register_forms<shrink>(m, "shrink");
}

}  // namespace pyadv

// Norms: converts lists of tensors and launches once for every kNormTensors of them.
#pragma once

#include "common/norms.h"
#include "glue/tensors.h"

namespace pyadv {

constexpr int64_t kPieceGrain = 2;  // pieces worth a thread

// Returns the table of the tensors [begin, end). Their data may have any dense layout.
inline NormArgs norm_table(DType dtype, const std::vector<Tensor>& weights, size_t begin,
                           size_t end) {
  NormArgs args{};
  args.dtype = dtype;
  args.tensors = static_cast<int64_t>(end - begin);
  for (size_t i = begin; i < end; ++i) {
    const size_t t = i - begin;
    args.data[t] = weights[i].const_data_ptr();
    args.size[t] = weights[i].numel();
    args.first[t + 1] = args.first[t] + (args.size[t] + kNormPiece - 1) / kNormPiece;
  }
  return args;
}

// Calls f(args, begin) for every table; `begin` is the index of its first tensor.
template <class F>
void for_tables(DType dtype, const std::vector<Tensor>& weights, F&& f) {
  for (size_t begin = 0; begin < weights.size(); begin += kNormTensors)
    f(norm_table(dtype, weights, begin, std::min<size_t>(begin + kNormTensors, weights.size())),
      begin);
}

inline DType check_weights(const char* op, const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(!weights.empty(), op, ": weights must not be empty");
  for (const Tensor& w : weights)
    STD_TORCH_CHECK(
        w.scalar_type() == weights[0].scalar_type() && w.is_cuda() == weights[0].is_cuda(), op,
        ": all weights must have the same dtype and device");
  return dtype_of(op, weights[0]);
}

inline char* entry(const Tensor& t, size_t i, DType dtype) {
  const size_t bytes = dtype == DType::Double ? sizeof(double) : sizeof(float);
  return static_cast<char*>(t.mutable_data_ptr()) + i * bytes;
}

inline Tensor norms(const std::vector<Tensor>& weights) {
  const DType dtype = check_weights("norms", weights);
  backend::Device device(weights[0]);
  std::vector<Tensor> dense;
  for (const Tensor& w : weights) dense.push_back(is_dense(w) ? w : torch::stable::contiguous(w));
  const Tensor out = torch::stable::new_empty(weights[0], {static_cast<int64_t>(weights.size())},
                                              compute_type(dtype));
  for_tables(dtype, dense, [&](NormArgs args, size_t begin) {
    const int64_t pieces = args.first[args.tensors];
    const Tensor partial = torch::stable::new_empty(weights[0], {pieces}, ScalarType::Double);
    args.partial = partial.mutable_data_ptr<double>();
    args.norms = entry(out, begin, dtype);
    if (pieces > 0) device.run(backend::norm_pieces, args, pieces, kPieceGrain);
    device.run(backend::norm_roots, args, args.tensors, args.tensors);
  });
  return out;
}

inline std::vector<Tensor> norms_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                          const Tensor& norms) {
  const char* op = "norms_backward";
  const DType dtype = check_weights(op, weights);
  for (const Tensor& t : {grad, norms})
    STD_TORCH_CHECK(t.scalar_type() == compute_type(dtype) && t.dim() == 1 &&
                        t.numel() == static_cast<int64_t>(weights.size()) &&
                        t.is_cuda() == weights[0].is_cuda(),
                    op, ": grad and norms must hold one value per weight");
  backend::Device device(weights[0]);
  const Tensor cotangent = torch::stable::contiguous(grad),
               values = torch::stable::contiguous(norms);
  std::vector<Tensor> out, dense;
  for (const Tensor& w : weights) {
    out.push_back(torch::stable::empty_like(w));
    dense.push_back(in_layout_of(out.back(), w));
  }
  for_tables(dtype, dense, [&](NormArgs args, size_t begin) {
    const int64_t pieces = args.first[args.tensors];
    for (int64_t t = 0; t < args.tensors; ++t)
      args.grad[t] = out[begin + static_cast<size_t>(t)].mutable_data_ptr();
    args.norms = entry(values, begin, dtype);
    args.cotangent = entry(cotangent, begin, dtype);
    if (pieces > 0) device.run(backend::norms_backward, args, pieces, kPieceGrain);
  });
  return out;
}

template <class Library>
void register_norms(Library& m) {
  m.impl("norms", TORCH_BOX(&norms));
  m.impl("norms_backward", TORCH_BOX(&norms_backward));
}

}  // namespace pyadv

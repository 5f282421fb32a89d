// Winograd's convolution: converts channels-last tensors to pointers. Only the CPU has a kernel.
#pragma once

#include "common/convolution.h"
#include "glue/tensors.h"

namespace pyadv {

constexpr int64_t kPanelGrain = 1024;  // panel columns worth a thread
constexpr int64_t kTileGrain = 8;      // tiles worth a thread

using torch::headeronly::MemoryFormat;

inline void check_float(const char* op, const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == dim && t.is_cpu(), op, ": ",
                  name, " must be a float32 tensor of ", dim, " dimensions on the CPU");
}

inline Tensor winograd_weight(const Tensor& weight, bool transposed, int64_t stride) {
  const char* op = "winograd_weight";
  check_float(op, "weight", weight, 4);
  STD_TORCH_CHECK(weight.size(2) == 3 && weight.size(3) == 3, op, ": weight must be 3 x 3");
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2");
  WinogradWeightArgs args{};
  args.weight = weight.const_data_ptr<float>();
  args.row_stride = weight.stride(2);
  args.column_stride = weight.stride(3);
  args.outputs = weight.size(transposed ? 1 : 0);
  args.inputs = weight.size(transposed ? 0 : 1);
  args.output_stride = weight.stride(transposed ? 1 : 0);
  args.input_stride = weight.stride(transposed ? 0 : 1);
  if (transposed) {  // rotated by 180 degrees: read from the last element backwards
    args.weight += 2 * (args.row_stride + args.column_stride);
    args.row_stride = -args.row_stride;
    args.column_stride = -args.column_stride;
  }
  args.stride = stride;
  const int64_t panels = panels_of(args.outputs);
  const Tensor out = torch::stable::new_empty(weight, {panels, kSlots, args.inputs, kPanel});
  args.out = out.mutable_data_ptr<float>();
  const int64_t columns = panels * args.inputs;
  if (columns > 0)
    backend::Device(weight).run(backend::winograd_weight, args, columns, kPanelGrain);
  return out;
}

// `padding`: pixels by which the first tile's input reaches beyond the edge.
inline Tensor winograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& added, const OptionalTensor& mask, bool relu,
                       int64_t outputs, int64_t height, int64_t width, int64_t padding,
                       int64_t stride, bool transposed) {
  const char* op = "winograd";
  check_float(op, "x", x, 4);
  check_float(op, "weight", weight, 4);
  STD_TORCH_CHECK(stride == 1 || stride == 2, op, ": stride must be 1 or 2");
  STD_TORCH_CHECK(padding >= 0 && height > 0 && width > 0 && outputs >= 0, op,
                  ": padding must be >= 0, and the output not be empty");
  const Tensor image = torch::stable::contiguous(x, MemoryFormat::ChannelsLast),
               u = torch::stable::contiguous(weight);
  WinogradArgs args{};
  args.form = stride == 1   ? WinogradForm::Stride1
              : !transposed ? WinogradForm::Stride2
                            : WinogradForm::Transposed2;
  args.inputs = x.size(1);
  args.outputs = outputs;
  args.height = x.size(2);
  args.width = x.size(3);
  args.out_height = height;
  args.out_width = width;
  args.padding = padding;
  STD_TORCH_CHECK(u.size(0) == panels_of(outputs) && u.size(1) == kSlots &&
                      u.size(2) == args.inputs && u.size(3) == kPanel,
                  op, ": weight must be the result of winograd_weight for these channels");
  Tensor shift = weight;
  if (bias.has_value()) {
    check_float(op, "bias", *bias, 1);
    STD_TORCH_CHECK(bias->numel() == outputs, op, ": bias must have one value per output channel");
    shift = torch::stable::contiguous(*bias);
    args.bias = shift.const_data_ptr<float>();
  }
  const Tensor out =
      torch::stable::empty({x.size(0), outputs, height, width}, ScalarType::Float, std::nullopt,
                           std::nullopt, std::nullopt, MemoryFormat::ChannelsLast);
  std::vector<Tensor> kept;
  const auto like_out = [&](const char* name, const OptionalTensor& t) -> const float* {
    if (!t.has_value()) return nullptr;
    check_float(op, name, *t, 4);
    STD_TORCH_CHECK(same_shape(*t, out), op, ": ", name, " must have the shape of the result");
    kept.push_back(torch::stable::contiguous(*t, MemoryFormat::ChannelsLast));
    return kept.back().const_data_ptr<float>();
  };
  args.added = like_out("added", added);
  args.mask = like_out("mask", mask);
  args.relu = relu;
  args.x = image.const_data_ptr<float>();
  args.weight = u.const_data_ptr<float>();
  args.out = out.mutable_data_ptr<float>();
  const int64_t tile = tile_of(args.form);
  args.tiles_down = (height + tile - 1) / tile;
  args.tiles_across = (width + tile - 1) / tile;
  const int64_t tiles = x.size(0) * args.tiles_down * args.tiles_across;
  if (tiles > 0) backend::Device(x).run(backend::winograd, args, tiles, kTileGrain);
  return out;
}

template <class Library>
void register_convolution(Library& m) {
  m.impl("winograd_weight", TORCH_BOX(&winograd_weight));
  m.impl("winograd", TORCH_BOX(&winograd));
}

}  // namespace pyadv

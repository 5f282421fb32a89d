// Converts tensors to pointers: layouts, parameters, checks. Only ops_cpu.cpp and ops_cuda.cpp
// include it. Each of them first defines `backend`: the kernels, the device guard and the launch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/types.h"

namespace pyadv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::Float;
    case ScalarType::Double:
      return DType::Double;
    case ScalarType::Half:
      return DType::Half;
    case ScalarType::BFloat16:
      return DType::BFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": needs float16, bfloat16, float32 or float64 tensors");
  }
  return DType::Float;
}

// The type of the arithmetic, and of losses and other reductions.
inline ScalarType compute_type(DType dtype) {
  return dtype == DType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool same_shape(const Tensor& a, const Tensor& b) { return a.sizes().equals(b.sizes()); }

// Guards the memory of code that calls the op directly; the Python functions check the same with
// fuller messages.
inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(same_shape(t, like), op, ": ", name, " has another shape than the first tensor");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name,
                  " has another dtype than the first tensor");
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda(), op, ": ", name,
                  " is on another device than the first tensor");
}

inline int64_t rows_of(const Tensor& t) { return t.dim() == 0 ? 1 : t.size(0); }
inline int64_t row_size(const Tensor& t) {
  const int64_t rows = rows_of(t);
  return rows == 0 ? 0 : t.numel() / rows;
}

// Whether the elements fill one memory block without gaps, in some order of the dimensions.
inline bool is_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Whether t is dense and each row (dimension 0) is one block.
inline bool has_dense_rows(const Tensor& t) {
  return is_dense(t) && (t.dim() == 0 || t.size(0) <= 1 || t.stride(0) == row_size(t));
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// Returns `t` if its strides equal those of the dense tensor `like`, else a copy in that layout.
inline Tensor in_layout_of(const Tensor& like, const Tensor& t) {
  if (same_layout(t, like)) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

// The memory that a kernel writes: `out` itself if its rows are dense, else a block that `finish`
// copies to it.
class Output {
 public:
  enum class Content { Overwritten, Kept };  // Kept: the kernel writes only a part
  explicit Output(const Tensor& out, Content content = Content::Overwritten)
      : out_(out), direct_(has_dense_rows(out)), block_(direct_ ? out : fresh(out)) {
    if (!direct_ && content == Content::Kept) torch::stable::copy_(block_, out);
  }
  const Tensor& block() const { return block_; }
  void* data() const { return block_.mutable_data_ptr(); }
  void finish() {
    if (!direct_) torch::stable::copy_(out_, block_);
  }

 private:
  static Tensor fresh(const Tensor& like) {
    Tensor t = torch::stable::empty_like(like);
    return has_dense_rows(t) ? t : torch::stable::contiguous(t);
  }
  Tensor out_;
  bool direct_;
  Tensor block_;
};

// An optional (B,) bool mask. Without one, all rows are active.
class Mask {
 public:
  Mask(const char* op, const OptionalTensor& given, const Tensor& like) {
    if (!given.has_value()) return;
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Bool && given->dim() == 1 &&
                        given->numel() == rows_of(like) && given->is_cuda() == like.is_cuda(),
                    op,
                    ": active must be a bool tensor with one value per row, on the same device");
    kept_ = torch::stable::contiguous(*given);
  }
  const bool* data() const { return kept_.has_value() ? kept_->const_data_ptr<bool>() : nullptr; }

 private:
  OptionalTensor kept_;
};

// Converts tensor parameters to what kernels read, and keeps temporary tensors alive.
class Parameters {
 public:
  Parameters(const char* op, const Tensor& block, DType dtype)
      : op_(op), block_(block), type_(compute_type(dtype)) {}

  // `absent` replaces a parameter that is not given: the infinity that never binds, for a side of
  // the box.
  Param add(const OptionalTensor& given, double absent = 0.0) {
    Param p;
    p.value = absent;
    if (!given.has_value()) return p;
    if (given->numel() == 1 && given->is_cpu()) {
      p.value = read(*given);
      return p;
    }
    STD_TORCH_CHECK(given->is_cuda() == block_.is_cuda(), op_,
                    ": a parameter with more than one element is on another device than x");
    Tensor t = typed(torch::stable::contiguous(*given));
    p.data = t.const_data_ptr();
    p.period = t.numel();
    if (p.period == 1) {
      // one live value on the device
    } else if (t.dim() == 1) {
      STD_TORCH_CHECK(p.period == rows_of(block_), op_,
                      ": a 1-D parameter needs one value per row");
      p.inner = row_size(block_);
    } else if (!by_row(t, p) && !by_channel(t, p)) {
      within_rows_ = true;
    }
    kept_.push_back(std::move(t));
    return p;
  }

  // Whether some parameter so far differs within a row in a way that Param cannot describe.
  bool differ_within_rows() const { return within_rows_; }

  bool constant_in_rows(const Param& p) const {
    return p.period == 1 || p.inner == row_size(block_);
  }

  // Whether rows may have different values of the parameter.
  bool differs_between_rows(const OptionalTensor& given) const {
    return given.has_value() && given->numel() > 1 &&
           (given->dim() == 1 || given->dim() == block_.dim()) && given->size(0) > 1;
  }

  // The parameter as one value per element of `like`, which is the data or its first row.
  Param per_element(const OptionalTensor& given, const Tensor& like, double absent = 0.0) {
    Tensor full = torch::stable::empty_like(like);
    if (full.scalar_type() != type_) full = torch::stable::to(full, type_);
    if (!given.has_value()) {
      torch::stable::fill_(full, absent);
    } else if (given->dim() == 1 && given->numel() > 1) {
      std::vector<int64_t> shape(static_cast<size_t>(block_.dim()), 1);
      shape[0] = given->numel();
      torch::stable::copy_(full, torch::stable::view(*given, shape));
    } else {
      torch::stable::copy_(full, *given);
    }
    kept_.push_back(full);
    return Param{full.const_data_ptr(), 0.0, 1, full.numel()};
  }

 private:
  double read(const Tensor& t) const {
    if (t.scalar_type() == ScalarType::Double) return *t.const_data_ptr<double>();
    if (t.scalar_type() == ScalarType::Float) return *t.const_data_ptr<float>();
    return *torch::stable::to(t, ScalarType::Double).const_data_ptr<double>();
  }
  Tensor typed(const Tensor& t) const {
    return t.scalar_type() == type_ ? t : torch::stable::to(t, type_);
  }
  // (B, 1, ..., 1)
  bool by_row(const Tensor& t, Param& p) const {
    if (t.dim() != block_.dim() || t.size(0) != p.period) return false;
    p.inner = row_size(block_);
    return true;
  }
  // (1, C, 1, 1) or (C, 1, 1) where a channel is one block of each row
  bool by_channel(const Tensor& t, Param& p) const {
    const int64_t d = t.dim() - (block_.dim() - 1);  // index of dimension 1 of x in t
    if (block_.dim() < 2 || d < 0 || t.size(d) != p.period || block_.size(1) != p.period ||
        !block_.is_contiguous())
      return false;
    p.inner = row_size(block_) / p.period;
    return true;
  }

  const char* op_;
  Tensor block_;
  ScalarType type_;
  bool within_rows_ = false;
  std::vector<Tensor> kept_;
};

// The two forms of an op that computes one tensor like its first argument, made from a function
// that writes to its first parameter.
template <auto write>
struct Forms;

template <class... Args, void (*write)(Tensor&, const Tensor&, Args...)>
struct Forms<write> {
  static Tensor returning(const Tensor& first, Args... args) {
    Tensor out = torch::stable::empty_like(first);
    write(out, first, args...);
    return out;
  }
  static void writing(const Tensor& first, Args... args, Tensor out) { write(out, first, args...); }
};

// Registers `name`, which returns a new tensor, and `name`_out, which writes to its last argument.
template <auto write, class Library>
void register_forms(Library& m, const std::string& name) {
  m.impl(name.c_str(), TORCH_BOX(&Forms<write>::returning));
  m.impl((name + "_out").c_str(), TORCH_BOX(&Forms<write>::writing));
}

}  // namespace pyadv

// From tensors to pointers: layouts, parameters, checks. Included by ops_cpu.cpp and ops_cuda.cpp
// alone; each defines `backend` first (the kernels' namespace, the device guard and the launch).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <limits>
#include <optional>
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

// The type the arithmetic runs in, and the type of losses and other reductions.
inline ScalarType compute_type(DType dtype) {
  return dtype == DType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool same_shape(const Tensor& a, const Tensor& b) { return a.sizes().equals(b.sizes()); }

// The Python functions check with fuller messages; this guards the memory of direct callers.
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

// Every element of one memory block exactly once, in some order of the dimensions.
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

// The same, and each row (dimension 0) is one block.
inline bool has_dense_rows(const Tensor& t) {
  return is_dense(t) && (t.dim() == 0 || t.size(0) <= 1 || t.stride(0) == row_size(t));
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// `t` itself when its strides are those of `like` (dense), else a copy in that layout.
inline Tensor in_layout_of(const Tensor& like, const Tensor& t) {
  if (same_layout(t, like)) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

// Where a kernel writes: `out` itself if its rows are dense, else a block that is copied to it.
class Output {
 public:
  enum class Content { Overwritten, Kept };  // Kept: the kernel does not write all of it
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

// A (B,) bool mask; a missing one stands for all rows.
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

// Parameters of a step as the kernels want them; keeps the tensors made on the way alive.
class Parameters {
 public:
  Parameters(const char* op, const Tensor& block, DType dtype)
      : op_(op), block_(block), type_(compute_type(dtype)) {}

  // `absent` stands for a missing box side: the infinity that never binds.
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
      elementwise_ = true;
    }
    kept_.push_back(std::move(t));
    return p;
  }

  bool elementwise() const { return elementwise_; }

  // The value is the same in all of a row (needed where rules work on whole rows).
  bool constant_in_rows(const Param& p) const {
    return p.period == 1 || p.inner == row_size(block_);
  }

  // One value per element, in the layout of the data, for parameters no shorter rule describes: of
  // one row that all rows share, unless a parameter differs between rows.
  void expand(std::initializer_list<Param*> params,
              std::initializer_list<const OptionalTensor*> given) {
    bool differs = false;
    for (const OptionalTensor* t : given)
      differs = differs || (t->has_value() && (*t)->numel() > 1 &&
                            ((*t)->dim() == 1 || (*t)->dim() == block_.dim()) && (*t)->size(0) > 1);
    const Tensor like = differs ? block_ : torch::stable::narrow(block_, 0, 0, 1);
    auto source = given.begin();
    for (Param* p : params) {
      Tensor full = torch::stable::empty_like(like);
      if (full.scalar_type() != type_) full = torch::stable::to(full, type_);
      const OptionalTensor& t = **source++;
      if (!t.has_value()) {
        torch::stable::fill_(full, p->value);
      } else if (t->dim() == 1 && t->numel() > 1) {
        std::vector<int64_t> shape(static_cast<size_t>(block_.dim()), 1);
        shape[0] = t->numel();
        torch::stable::copy_(full, torch::stable::view(*t, shape));
      } else {
        torch::stable::copy_(full, *t);
      }
      *p = Param{full.const_data_ptr(), 0.0, 1, full.numel()};
      kept_.push_back(std::move(full));
    }
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
  bool elementwise_ = false;
  std::vector<Tensor> kept_;
};

}  // namespace pyadv

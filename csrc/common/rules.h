// The arguments that steps and projections share, and the two kinds of rules that compute them.
//
// An element rule computes one element from the values at the same place in every tensor:
//   Rule::apply(element, values)          returns the new element
// A row rule needs sums over a whole row (one sample) and makes several passes over it:
//   Rule::run(row, values)
// A row rule is written once, against a `row` object that each device implements:
//   row.size()                            number of elements
//   row.sums<K, L>(term, double total[K]) adds K terms over the row; term(element, L t[K]) computes
//                                         them for one element, L is the type of the partial sums
//   row.maximum(value)                    largest value(element), at least 0; NaN if any is NaN
//   row.store(value)                      writes value(element) to `out`, rounded once
//   row.copy_input()                      writes x_adv to `out` unchanged
// Intermediate points of a row rule are functions of the element, so that nothing is stored between
// passes.
//
// Every rule declares `Args`, the arguments of its kernel, and which optional tensors it reads
// (`kGrad`, `kPrev`).
#pragma once

#include "common/math.h"
#include "common/types.h"

namespace pyadv {

// Tensors of `rows` x `n` elements. All of them have the same dense layout, in which each row is
// one block. Tensors that an op does not have are null.
struct RuleTensors {
  DType dtype;
  const void* x_adv;
  const void* x;
  const void* grad;
  const void* x_prev;
  void* out;  // may be one of the inputs
  Param lo, hi;
  // Some parameter differs within a row. The box (for element rules also every other parameter)
  // then holds one value per element, in the order of the data.
  bool per_element;
  const bool* active;  // [rows] or null; rows that are not active are copied from x_adv
  int64_t rows, n;
};

// A family's parameters are a struct template over the type that stands for one parameter: Param in
// the arguments of a kernel, a number where a rule runs, a pointer where a loop reads one value per
// element. `map` converts between them.
template <template <class> class Params>
struct RuleArgs : RuleTensors {
  Params<Param> params;

  // The parameters' values at element i.
  template <class C>
  PYADV_HD Params<C> values_at(int64_t i) const {
    return params.template map<C>([i](const Param& p) PYADV_INLINE_LAMBDA { return p.at<C>(i); });
  }
};

// The longest span in which all parameters are constant, at most `whole`.
template <template <class> class Params>
PYADV_HD int64_t span_length(const RuleArgs<Params>& args, int64_t whole) {
  int64_t length = shorter_span(args.hi, shorter_span(args.lo, whole));
  args.params.template map<int>([&](const Param& p) {
    length = shorter_span(p, length);
    return 0;
  });
  return length > 1 ? length : 1;
}

// The values a rule reads at one element; those of absent tensors are 0.
template <class C>
struct Element {
  C x_adv, grad, x, x_prev, lo, hi;
};

}  // namespace pyadv

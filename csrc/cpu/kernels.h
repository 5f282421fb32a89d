// CPU kernels. Each one computes the items [begin, end); the caller splits the range among threads.
#pragma once

#include "common/activation.h"
#include "common/convolution.h"
#include "common/geometry.h"
#include "common/losses.h"
#include "common/noise.h"
#include "common/norms.h"
#include "common/steps.h"
#include "common/weights.h"

namespace pyadv {
namespace cpu {

// items: elements
void linf_step(const StepArgs& args, int64_t begin, int64_t end);
void linf_momentum_step(const MomentumStepArgs& args, int64_t begin, int64_t end);
void linf_project(const ProjectionArgs& args, int64_t begin, int64_t end);
// items: rows
void l2_step(const StepArgs& args, int64_t begin, int64_t end);
void l2_momentum_step(const MomentumStepArgs& args, int64_t begin, int64_t end);
void l1_step(const SparseStepArgs& args, int64_t begin, int64_t end);
void linf_boundary_step(const BoundaryStepArgs& args, int64_t begin, int64_t end);
void l2_boundary_step(const BoundaryStepArgs& args, int64_t begin, int64_t end);
void keep_rows(const KeepRowsArgs& args, int64_t begin, int64_t end);
void keep_best(const KeepBestArgs& args, int64_t begin, int64_t end);
void square_step(const SquareStepArgs& args, int64_t begin, int64_t end);
void l2_project(const ProjectionArgs& args, int64_t begin, int64_t end);
void l2_box_project(const ProjectionArgs& args, int64_t begin, int64_t end);
void l1_project(const ProjectionArgs& args, int64_t begin, int64_t end);

// items: rows
void attack_loss(const AttackArgs& args, int64_t begin, int64_t end);
void weighted_cross_entropy(const LossArgs& args, int64_t begin, int64_t end);
void kl(const LossArgs& args, int64_t begin, int64_t end);  // trades_kl and mart_kl
void mart_bce(const LossArgs& args, int64_t begin, int64_t end);
void softmax_cotangent(const SoftmaxArgs& args, int64_t begin, int64_t end);
void row_stats(const RowStatsArgs& args, int64_t begin, int64_t end);
void row_square_sum(const SquareArgs& args, int64_t begin, int64_t end);

void track(const TrackArgs& args, int64_t begin, int64_t end);  // items: rows

void weights(const WeightArgs& args, int64_t begin, int64_t end);  // items: one, all rows

void norm_pieces(const NormArgs& args, int64_t begin, int64_t end);     // items: pieces
void norm_roots(const NormArgs& args, int64_t begin, int64_t end);      // items: tensors
void norms_backward(const NormArgs& args, int64_t begin, int64_t end);  // items: pieces

void keyed_uniform(const NoiseArgs& args, int64_t begin, int64_t end);  // items: Philox blocks
void keyed_normal(const NoiseArgs& args, int64_t begin, int64_t end);   // items: Philox blocks
void row_hash(const HashArgs& args, int64_t begin, int64_t end);        // items: rows

// items: elements
void affine_relu(const AffineReluArgs& args, int64_t begin, int64_t end);
void affine_relu_backward(const AffineReluBackwardArgs& args, int64_t begin, int64_t end);

// items: panels x input channels
void winograd_weight(const WinogradWeightArgs& args, int64_t begin, int64_t end);
void winograd(const WinogradArgs& args, int64_t begin, int64_t end);  // items: tiles

}  // namespace cpu
}  // namespace pyadv

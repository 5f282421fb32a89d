// Launchers of the CUDA kernels. Each one returns a cudaError_t as int; 0 is success. This header
// includes nothing of CUDA, so that the host compiler can compile the tensor glue.
#pragma once

#include "common/activation.h"
#include "common/geometry.h"
#include "common/losses.h"
#include "common/noise.h"
#include "common/norms.h"
#include "common/steps.h"
#include "common/weights.h"

namespace pyadv {
namespace cuda {

int linf_step(const StepArgs& args, void* stream);
int linf_momentum_step(const MomentumStepArgs& args, void* stream);
int l2_step(const StepArgs& args, void* stream);
int l2_momentum_step(const MomentumStepArgs& args, void* stream);
int l1_step(const SparseStepArgs& args, void* stream);
int linf_boundary_step(const BoundaryStepArgs& args, void* stream);
int l2_boundary_step(const BoundaryStepArgs& args, void* stream);
int keep_rows(const KeepRowsArgs& args, void* stream);
int keep_best(const KeepBestArgs& args, void* stream);
int square_step(const SquareStepArgs& args, void* stream);

int linf_project(const ProjectionArgs& args, void* stream);
int l2_project(const ProjectionArgs& args, void* stream);
int l2_box_project(const ProjectionArgs& args, void* stream);
int l1_project(const ProjectionArgs& args, void* stream);

int attack_loss(const AttackArgs& args, void* stream);
int weighted_cross_entropy(const LossArgs& args, void* stream);
int kl(const LossArgs& args, void* stream);  // trades_kl and mart_kl
int mart_bce(const LossArgs& args, void* stream);
int softmax_cotangent(const SoftmaxArgs& args, void* stream);
int row_stats(const RowStatsArgs& args, void* stream);
int row_square_sum(const SquareArgs& args, void* stream);

int track(const TrackArgs& args, void* stream);

int weights(const WeightArgs& args, void* stream);

int norm_pieces(const NormArgs& args, void* stream);
int norm_roots(const NormArgs& args, void* stream);
int norms_backward(const NormArgs& args, void* stream);

int keyed_uniform(const NoiseArgs& args, void* stream);
int keyed_normal(const NoiseArgs& args, void* stream);
int row_hash(const HashArgs& args, void* stream);

int affine_relu(const AffineReluArgs& args, void* stream);
int affine_relu_backward(const AffineReluBackwardArgs& args, void* stream);

}  // namespace cuda
}  // namespace pyadv

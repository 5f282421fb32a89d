"""The specification of `pyadv.ops`: plain PyTorch functions of the same names."""

from pyadv.reference.activation import affine_relu, affine_relu_backward
from pyadv.reference.convolution import winograd_conv2d, winograd_conv2d_input, winograd_weight
from pyadv.reference.geometry import track
from pyadv.reference.losses import (
    attack_loss,
    attack_loss_value,
    mart_bce,
    mart_kl,
    row_square_sum,
    row_stats,
    softmax_cotangent,
    trades_kl,
    weighted_cross_entropy,
)
from pyadv.reference.noise import keyed_normal, keyed_uniform, row_hash
from pyadv.reference.norms import log_norm_product, norms
from pyadv.reference.projections import l1_project, l2_project, linf_project
from pyadv.reference.steps import (
    keep_best_,
    keep_rows_,
    l1_step,
    l2_boundary_step,
    l2_momentum_step,
    l2_step,
    linf_boundary_step,
    linf_momentum_step,
    linf_step,
    square_step,
)
from pyadv.reference.weights import gairat_weights, mail_weights, probabilistic_margin

__all__ = [
    "linf_step",
    "l2_step",
    "l1_step",
    "linf_momentum_step",
    "l2_momentum_step",
    "linf_boundary_step",
    "l2_boundary_step",
    "square_step",
    "keep_best_",
    "keep_rows_",
    "linf_project",
    "l2_project",
    "l1_project",
    "attack_loss",
    "attack_loss_value",
    "weighted_cross_entropy",
    "trades_kl",
    "mart_bce",
    "mart_kl",
    "row_square_sum",
    "softmax_cotangent",
    "row_stats",
    "track",
    "gairat_weights",
    "probabilistic_margin",
    "mail_weights",
    "norms",
    "log_norm_product",
    "keyed_uniform",
    "keyed_normal",
    "row_hash",
    "affine_relu",
    "affine_relu_backward",
    "winograd_weight",
    "winograd_conv2d",
    "winograd_conv2d_input",
]

"""EMR (Liu and Chan, BMVC 2022): the penalty of its training scripts."""

from __future__ import annotations

from torch import Tensor, nn

from pyadv.objectives import EMR
from pyadv.objectives.step import Step


def emr_penalty(model: nn.Module, x_adv: Tensor, temperature: float) -> Tensor:
    """|| grad_x (1/B) sum_b sum_k p_bk z_bk ||^2 over the whole batch, p = softmax(z / T) without
    gradient, the model in eval mode: 1/B times the mean over samples of `pyadv.objectives.EMR`.
    Add it to the loss, times lambda."""
    y = x_adv.new_zeros(len(x_adv)).long()  # no part in this penalty
    return EMR(1.0, temperature, reduction="official")(Step(model, x_adv, y, epoch=1))

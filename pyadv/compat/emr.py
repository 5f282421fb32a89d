"""EMR (Liu and Chan, BMVC 2022): the penalty of its training scripts, and its networks."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from pyadv.objectives import EMR, Step
from pyadv.passes.borrow import unwrap


def emr_penalty(model: nn.Module, x_adv: Tensor, temperature: float) -> Tensor:
    """Return || grad_x (1/B) sum_b sum_k p_bk z_bk ||^2 over the whole batch, in eval mode.

    p = softmax(z / temperature) carries no gradient. The value is 1/B times the mean over samples
    that `pyadv.objectives.EMR` computes. Add it to the loss, times lambda.

    Args:
        model: the network; for one of the official networks, `official(model)`.
    """
    y = x_adv.new_zeros(len(x_adv)).long()  # this penalty does not read labels
    return EMR(1.0, temperature, reduction="official")(Step(model, x_adv, y, epoch=1))


def official(model: nn.Module) -> nn.Module:
    """Return a module that runs an official EMR network in the mode that its caller has set.

    The networks of the official code have `forward(x, _eval=False)`, which calls `train()` or
    `eval()` itself and ends with `train()`. An attack that sets eval mode would silently run with
    batch statistics and move the running ones. The returned module passes `_eval=True` if all
    modules are in eval mode and `_eval=False` otherwise, and restores their modes after each pass.

    It shares parameters and buffers with `model`, whose `state_dict` is the one to save.

    Raises:
        TypeError: the `forward` of `model` has no argument `_eval`.
    """
    return _ModeByArgument(model)


class _ModeByArgument(nn.Module):
    """A network whose mode is an argument of `forward`, driven by the flags of its modules."""

    def __init__(self, network: nn.Module):
        super().__init__()
        forward = getattr(unwrap(network), "forward", None)
        if forward is None or "_eval" not in inspect.signature(forward).parameters:
            raise TypeError(
                "official: model must be a module whose forward has an argument _eval, as the "
                f"networks of EMR's code have, got {type(network).__name__}"
            )
        self.network = network

    def forward(self, x: Tensor) -> Any:
        modules = list(self.network.modules())
        modes = [m.training for m in modules]
        try:
            return self.network(x, _eval=not any(modes))
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode

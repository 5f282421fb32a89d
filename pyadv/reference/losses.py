"""Row-wise losses of logits and their gradients, in plain PyTorch. See `pyadv.ops.losses` for the
contract of each function."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyadv.tensors import per_row, widen

ATTACK_LOSSES = (
    *("ce", "margin", "dlr", "kl", "slm"),
    *("ce_targeted", "margin_targeted", "dlr_targeted"),
)

# The constants of the official MART code.
_MART_ONE, _MART_TINY, _MART_WEIGHT_ONE = 1.0001, 1e-12, 1.0000001


class AttackLoss(NamedTuple):
    loss: Tensor
    grad_logits: Tensor
    correct: Tensor


class RowStats(NamedTuple):
    runner_up: Tensor
    margin: Tensor
    prob_margin: Tensor
    top4: Tensor
    top4_index: Tensor


def attack_loss_value(
    logits: Tensor,
    y: Tensor,
    loss: str,
    reference_logits: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """The loss of `attack_loss` alone, (B,): differentiable any number of times, for labels that
    are classes and finite logits."""
    z = widen(logits)
    if loss == "kl":
        q = widen(reference_logits).softmax(1)
        return (q * (widen(reference_logits).log_softmax(1) - z.log_softmax(1))).sum(1)
    if loss in ("ce", "slm"):
        gap = _without(z, y).logsumexp(1) - _pick(z, y)
        return gap if loss == "slm" else torch.logaddexp(gap, torch.zeros_like(gap))
    if loss == "ce_targeted":
        return z.log_softmax(1).gather(1, target[:, None])[:, 0]
    index, weight, denominator, _ = _sparse_terms(z, y, loss, target)
    return (z.gather(1, index[:, :2]) * weight[:, :2]).sum(1) / denominator


def attack_loss(
    logits: Tensor,
    y: Tensor,
    loss: str,
    reference_logits: Tensor | None = None,
    target: Tensor | None = None,
    scale: str = "unit",
) -> AttackLoss:
    """Value, gradient and correctness per row. See `ops.attack_loss`."""
    z, classes = widen(logits), logits.shape[1]
    usable = z.isfinite().all(1) & _is_class(y, classes)
    if target is not None:
        usable &= _is_class(target, classes)
        target = target.where(usable, 0)
    natural = z if reference_logits is None else widen(reference_logits)
    usable &= natural.isfinite().all(1)
    z, natural = (t.where(usable[:, None], 0.0) for t in (z, natural))
    y = y.where(usable, 0)
    unit = scale == "unit"
    if loss == "kl":
        value, grad = _kl_and_gradient(z, natural, unit)
    elif loss in ("ce", "slm", "ce_targeted"):
        value, grad = _others_and_gradient(z, target if target is not None else y, loss, unit)
    else:
        value, grad = _sparse_and_gradient(z, y, loss, target, unit)
    return AttackLoss(
        value.where(usable, torch.nan),
        grad.where(usable[:, None], 0.0).to(logits.dtype),
        usable & (z.argmax(1) == y),
    )


def _is_class(y: Tensor, classes: int) -> Tensor:
    return (y >= 0) & (y < classes)


def _pick(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(1, y[:, None])[:, 0]


def _without(z: Tensor, y: Tensor) -> Tensor:
    return z.scatter(1, y[:, None], -torch.inf)


def _runner_up(z: Tensor, y: Tensor) -> Tensor:
    """argmax_{j != y} z_j, the first on ties."""
    return _without(z, y).argmax(1)


def _softplus(v: Tensor) -> Tensor:
    return v.clamp_min(0) + (-v.abs()).exp().log1p()


def _others_and_gradient(z: Tensor, t: Tensor, loss: str, unit: bool) -> tuple[Tensor, Tensor]:
    """By the softmax over the classes other than t, which never subtracts p_t from 1."""
    others = _without(z, t)
    base = others.amax(1)
    e = (others - base[:, None]).exp()
    total = e.sum(1)
    gap = (base - _pick(z, t)) + total.log()
    sign = -1.0 if loss == "ce_targeted" else 1.0
    mass = sign * (torch.ones_like(gap) if unit or loss == "slm" else gap.sigmoid())
    grad = (e * (mass / total)[:, None]).scatter(1, t[:, None], -mass[:, None])
    return gap if loss == "slm" else sign * _softplus(gap), grad


def _sparse_terms(
    z: Tensor, y: Tensor, loss: str, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Classes (B, n) and weights of the two in the numerator, then of those in the denominator; the
    denominator; its classes' weights."""
    rival = _runner_up(z, y) if target is None else target
    index = torch.stack([y, rival], 1)
    weight = _constants([-1.0, 1.0], z)
    if loss.startswith("margin"):
        return index, weight, torch.ones_like(z[:, 0]), weight[:, :0]
    values, order = z.sort(dim=1, descending=True, stable=True)
    if loss == "dlr":
        index = torch.cat([index, order[:, 0:3:2]], 1)  # a list would be copied to the device
        below, inner = values[:, 2], [1.0, -1.0]
    else:
        index = torch.cat([index, order[:, :1], order[:, 2:4]], 1)
        below, inner = (values[:, 2] + values[:, 3]) / 2, [1.0, -0.5, -0.5]
    return index, weight, (values[:, 0] - below) + 1e-12, _constants(inner, z)


def _constants(row: list[float], z: Tensor) -> Tensor:
    """(B, n), filled on the device: a copy from the host would wait for it."""
    return torch.stack([torch.full_like(z[:, 0], v) for v in row], 1)


def _sparse_and_gradient(
    z: Tensor, y: Tensor, loss: str, target: Tensor | None, unit: bool
) -> tuple[Tensor, Tensor]:
    index, weight, denominator, inner = _sparse_terms(z, y, loss, target)
    value = (z.gather(1, index[:, :2]) * weight).sum(1) / denominator
    entries = torch.cat([weight, -value[:, None] * inner], 1)
    grad = torch.zeros_like(z).scatter_add(1, index, entries)
    if not unit:
        return value, grad / denominator[:, None]
    most = grad.abs().amax(1, keepdim=True)
    return value, grad / most.where(most > 0, 1.0)


def _kl_and_gradient(z: Tensor, natural: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """KL(q || p) and p - q. Where both are confident of one class their difference there is lost in
    rounding, so that entry is minus the sum of the others."""
    q = natural.softmax(1)
    value = (q * (natural.log_softmax(1) - z.log_softmax(1))).sum(1)
    top = natural.argmax(1, keepdim=True)
    grad = (z.softmax(1) - q).scatter(1, top, 0.0)
    grad = grad.scatter(1, top, -grad.sum(1, keepdim=True))
    if unit:
        most = grad.abs().amax(1, keepdim=True)
        grad = grad / most.where(most > 0, 1.0)
    return value, grad


def weighted_cross_entropy(
    logits: Tensor, y: Tensor, weight: Tensor | None = None, ignore_index: int | None = None
) -> Tensor:
    """weight * cross-entropy per row. See `ops.weighted_cross_entropy`."""
    log_p = widen(logits).log_softmax(1)
    w = 1.0 if weight is None else weight.to(log_p.dtype)
    if y.dim() == 2:
        return -w * (y.to(log_p.dtype) * log_p).sum(1)
    ignored, known = _ignored_and_known(logits, y, ignore_index)
    rows = -w * _pick(log_p, y.where(known, 0))
    return rows.where(known, torch.nan).masked_fill(ignored, 0.0)


def weighted_cross_entropy_backward(
    grad: Tensor, logits: Tensor, y: Tensor, weight: Tensor | None, ignore_index: int | None
) -> Tensor:
    p = widen(logits).softmax(1)
    scale = grad if weight is None else grad * weight.to(p.dtype)
    if y.dim() == 2:
        target = y.to(p.dtype)
        return (scale[:, None] * (target.sum(1, keepdim=True) * p - target)).to(logits.dtype)
    ignored, known = _ignored_and_known(logits, y, ignore_index)
    rows = scale[:, None] * (p - _one_hot(p, y.where(known, 0)))
    return rows.where((known & ~ignored)[:, None], 0.0).to(logits.dtype)


def _ignored_and_known(
    logits: Tensor, y: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    ignored = torch.zeros_like(y, dtype=torch.bool) if ignore_index is None else y == ignore_index
    return ignored, _is_class(y, logits.shape[1])


def _one_hot(p: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(p).scatter(1, y[:, None], 1.0)


def trades_kl(logits_adv: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(logits_adv)) per row. See `ops.trades_kl`."""
    return _kl_terms(logits_adv, logits, tiny=False)[0]


def trades_kl_backward(grad: Tensor, logits_adv: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    divergence, log_ratio, q, p, _ = _kl_terms(logits_adv, logits, tiny=False)
    return (
        (grad[:, None] * (p - q)).to(logits_adv.dtype),
        (grad[:, None] * q * (log_ratio - divergence[:, None])).to(logits.dtype),
    )


def _kl_terms(
    logits_adv: Tensor, logits: Tensor, tiny: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KL(q || p), log(q / p), q, p, p / (p + tiny) with MART's tiny or 0."""
    z, u = widen(logits_adv), widen(logits)
    q, p = u.softmax(1), z.softmax(1)
    padded = p + _MART_TINY
    log_ratio = u.log_softmax(1) - (padded.log() if tiny else z.log_softmax(1))
    kept = p / padded if tiny else torch.ones_like(p)
    return (q * log_ratio).sum(1), log_ratio, q, p, kept


def mart_bce(logits_adv: Tensor, y: Tensor, exact: bool = False) -> Tensor:
    """-log p_y - log(1 - p_m), m the runner-up. See `ops.mart_bce`."""
    z = widen(logits_adv)
    known = _is_class(y, z.shape[1])
    y = y.where(known, 0)
    m = _runner_up(z, y)
    log_p = z.log_softmax(1)
    if exact:
        log_rest = _without(z, m).logsumexp(1) - z.logsumexp(1)
    else:
        log_rest = (_MART_ONE - _pick(z.softmax(1), m) + _MART_TINY).log()
    return (-_pick(log_p, y) - log_rest).where(known, torch.nan)


def mart_bce_backward(grad: Tensor, logits_adv: Tensor, y: Tensor, exact: bool) -> Tensor:
    z = widen(logits_adv)
    known = _is_class(y, z.shape[1])
    y = y.where(known, 0)
    m = _runner_up(z, y)
    p = z.softmax(1)
    p_m = _pick(p, m)
    if exact:  # the gradient of -log(1 - p_m) is p_m (e_m - softmax over the others)
        pull = p_m[:, None] * (_one_hot(p, m) - _without(z, m).softmax(1))
    else:
        pull = (p_m / (_MART_ONE - p_m + _MART_TINY))[:, None] * (_one_hot(p, m) - p)
    rows = grad[:, None] * (p - _one_hot(p, y) + pull)
    return rows.where(known[:, None], 0.0).to(logits_adv.dtype)


def mart_kl(
    logits_adv: Tensor, logits: Tensor, y: Tensor, exact: bool = False, detach_weight: bool = False
) -> Tensor:
    """(1 - q_y) KL(q || p) per row. See `ops.mart_kl`."""
    divergence, _, q, _, _ = _kl_terms(logits_adv, logits, tiny=not exact)
    known = _is_class(y, q.shape[1])
    w = _mart_weight(q, y.where(known, 0), exact)
    return ((w.detach() if detach_weight else w) * divergence).where(known, torch.nan)


def mart_kl_backward(
    grad: Tensor, logits_adv: Tensor, logits: Tensor, y: Tensor, exact: bool, detach_weight: bool
) -> tuple[Tensor, Tensor]:
    divergence, log_ratio, q, p, kept = _kl_terms(logits_adv, logits, tiny=not exact)
    known = _is_class(y, q.shape[1])
    y = y.where(known, 0)
    multiple = (grad * _mart_weight(q, y, exact))[:, None]
    to_adv = multiple * (p * (q * kept).sum(1, keepdim=True) - q * kept)
    to_natural = multiple * q * (log_ratio - divergence[:, None])
    if not detach_weight:
        through_weight = (grad * divergence * _pick(q, y))[:, None]
        to_natural = to_natural + through_weight * (q - _one_hot(q, y))
    return (
        to_adv.where(known[:, None], 0.0).to(logits_adv.dtype),
        to_natural.where(known[:, None], 0.0).to(logits.dtype),
    )


def _mart_weight(q: Tensor, y: Tensor, exact: bool) -> Tensor:
    return q.scatter(1, y[:, None], 0.0).sum(1) if exact else _MART_WEIGHT_ONE - _pick(q, y)


def row_square_sum(g: Tensor) -> Tensor:
    """Sum of squares of each row. See `ops.row_square_sum`."""
    squares = widen(g).square()
    return squares.sum(tuple(range(1, g.dim()))) if g.dim() > 1 else squares


def row_square_sum_backward(grad: Tensor, g: Tensor) -> Tensor:
    rows = (per_row(2 * grad, g) * widen(g)).to(g.dtype)
    return torch.empty_like(g).copy_(rows)


def softmax_cotangent(logits: Tensor, temperature: float, center: bool = False) -> Tensor:
    """softmax(logits / temperature), detached. See `ops.softmax_cotangent`."""
    p = (widen(logits.detach()) / temperature).softmax(1)
    return (p - 1.0 / p.shape[1] if center else p).to(logits.dtype).contiguous()


def row_stats(logits: Tensor, y: Tensor) -> RowStats:
    """Runner-up, margins and the four best classes of each row. See `ops.row_stats`."""
    z = widen(logits.detach())
    finite = z.isfinite().all(1)
    known = finite & _is_class(y, z.shape[1])
    z = z.where(finite[:, None], 0.0)
    safe = y.where(known, 0)
    runner_up = _runner_up(z, safe)
    margin = _pick(z, safe) - _pick(z, runner_up)
    total = (z - z.amax(1, keepdim=True)).exp().sum(1)
    prob_margin = -(-margin.abs()).expm1() / total * torch.where(margin < 0, -1.0, 1.0)
    values, index = z.sort(dim=1, descending=True, stable=True)
    missing = max(0, 4 - z.shape[1])
    pad = torch.nn.functional.pad
    top4 = pad(values[:, :4], (0, missing), value=-torch.inf)
    top4_index = pad(index[:, :4], (0, missing), value=-1)
    return RowStats(
        runner_up.where(known, -1),
        margin.where(known, torch.nan),
        prob_margin.where(known, torch.nan),
        top4.where(finite[:, None], torch.nan),
        top4_index.where(finite[:, None], -1),
    )

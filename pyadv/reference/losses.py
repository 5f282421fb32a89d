"""Row-wise losses of logits and their gradients, in plain PyTorch. `pyadv.ops.losses` documents the
contract of each function.

A logit of -inf takes its class out of play. A row has an answer if its largest logit is finite: no
logit is NaN or +inf, and at least one class is in play.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyadv.menus import AttackLossName, Scale
from pyadv.tensors import per_row, widen

# Constants of the official MART code.
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


def has_answer(logits: Tensor) -> Tensor:
    """Return (B,) bool: whether the largest logit of each row is finite."""
    return logits.amax(1).isfinite()


def is_correct(logits: Tensor, y: Tensor) -> Tensor:
    """Return (B,) bool: whether a row has an answer and its argmax, the first on ties, is y."""
    return has_answer(logits) & (logits.argmax(1) == y)


def attack_loss_value(
    logits: Tensor,
    y: Tensor,
    loss: AttackLossName,
    reference_logits: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Return the loss of `attack_loss` alone, (B,). It is differentiable any number of times.

    Labels must be classes and rows must have an answer. Where the loss is infinite, or no class but
    the label is in play, autograd may give NaN."""
    z = widen(logits)
    if loss == "kl":
        natural = widen(_given(loss, "reference_logits", reference_logits))
        log_ratio, escaped = _log_ratio(natural.log_softmax(1), z.log_softmax(1))
        return (natural.softmax(1) * log_ratio).sum(1).masked_fill(escaped, torch.inf)
    if loss in ("ce", "slm"):
        gap = _without(z, y).logsumexp(1) - _pick(z, y)
        return gap if loss == "slm" else torch.logaddexp(gap, torch.zeros_like(gap))
    if loss == "ce_targeted":
        return _pick(z.log_softmax(1), _given(loss, "target", target))
    return _sparse_terms(z, y, loss, target).value


def _given(loss: str, name: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(f"attack_loss_value: loss {loss!r} needs {name}, got None")
    return value


def attack_loss(
    logits: Tensor,
    y: Tensor,
    loss: AttackLossName,
    reference_logits: Tensor | None = None,
    target: Tensor | None = None,
    scale: Scale = "unit",
) -> AttackLoss:
    """Return value, gradient and correctness of each row. See `ops.attack_loss`."""
    z, classes = widen(logits), logits.shape[1]
    correct = is_correct(z, y)
    usable = has_answer(z) & _is_class(y, classes)
    if target is not None:
        usable &= _is_class(target, classes)
        target = target.where(usable, 0)
    natural = z if reference_logits is None else widen(reference_logits)
    usable &= has_answer(natural)
    z, natural = (t.where(usable[:, None], 0.0) for t in (z, natural))
    y = y.where(usable, 0)
    unit = scale == "unit"
    if loss == "kl":
        value, grad = _kl_and_gradient(z, natural, unit)
    elif loss in ("ce", "slm", "ce_targeted"):
        value, grad = _others_and_gradient(z, target if target is not None else y, loss, unit)
    else:
        value, grad = _sparse_and_gradient(z, y, loss, target, unit)
    moves = usable & _in_play(_pick(z, y))
    return AttackLoss(
        value.where(usable, torch.nan),
        grad.where(moves[:, None], 0.0).to(logits.dtype),
        correct,
    )


def _is_class(y: Tensor, classes: int) -> Tensor:
    return (y >= 0) & (y < classes)


def _in_play(z: Tensor) -> Tensor:
    return z > -torch.inf


def _pick(z: Tensor, y: Tensor) -> Tensor:
    return z.gather(1, y[:, None])[:, 0]


def _without(z: Tensor, y: Tensor) -> Tensor:
    return z.scatter(1, y[:, None], -torch.inf)


def _runner_up(z: Tensor, y: Tensor) -> Tensor:
    """Return argmax_{j != y} z_j, the first on ties."""
    best = _without(z, y).argmax(1)
    # Where no other class is in play, argmax is 0, which may be y itself.
    return torch.where(best == y, (y == 0).long(), best)


def _softplus(v: Tensor) -> Tensor:
    return v.clamp_min(0) + (-v.abs()).exp().log1p()


def _others_and_gradient(z: Tensor, t: Tensor, loss: str, unit: bool) -> tuple[Tensor, Tensor]:
    """Use the softmax over the classes other than t, which never subtracts p_t from 1."""
    others, own = _without(z, t), _pick(z, t)
    largest = others.amax(1)
    moves = _in_play(own) & _in_play(largest)
    base = largest.where(_in_play(largest), 0.0)
    e = (others - base[:, None]).exp()
    total = e.sum(1)
    gap = (base - own) + total.log()
    sign = -1.0 if loss == "ce_targeted" else 1.0
    mass = sign * (torch.ones_like(gap) if unit or loss == "slm" else gap.sigmoid())
    grad = (e * (mass / total)[:, None]).scatter(1, t[:, None], -mass[:, None])
    value = gap if loss == "slm" else sign * _softplus(gap)
    return value, grad.where(moves[:, None], 0.0)


class _Sparse(NamedTuple):
    """A loss of single logits: (z_rival - z_y) / denominator."""

    value: Tensor  # (B,); +inf if y is out of play, else -inf if the rival is
    places: Tensor  # (B, n): y, the rival, then the classes in the denominator
    weight: Tensor  # (B, 2): weights of y and the rival
    denominator: Tensor  # (B,)
    inner: Tensor  # (B, n - 2): weights of the classes in the denominator
    moves: Tensor  # (B,) bool: the value is finite


def _sparse_terms(z: Tensor, y: Tensor, loss: str, target: Tensor | None) -> _Sparse:
    rival = _runner_up(z, y) if target is None else target
    places = torch.stack([y, rival], 1)
    weight = _constants([-1.0, 1.0], z)
    if loss.startswith("margin"):
        denominator, inner = torch.ones_like(z[:, 0]), weight[:, :0]
    else:
        values, order = z.sort(dim=1, descending=True, stable=True)
        if loss == "dlr":
            # A list of columns would be copied to the device.
            places = torch.cat([places, order[:, 0:3:2]], 1)
            below, shares = values[:, 2], [1.0, -1.0]
        else:
            places = torch.cat([places, order[:, :1], order[:, 2:4]], 1)
            below, shares = (values[:, 2] + values[:, 3]) / 2, [1.0, -0.5, -0.5]
        # With too few classes in play for the denominator, the loss is the plain margin.
        enough = _in_play(below)
        denominator = ((values[:, 0] - below) + 1e-12).where(enough, 1.0)
        inner = _constants(shares, z).where(enough[:, None], 0.0)
    own, other = _pick(z, y), _pick(z, rival)
    value = ((other - own) / denominator).where(_in_play(own), torch.inf)
    moves = _in_play(own) & _in_play(other)
    return _Sparse(value, places, weight, denominator, inner, moves)


def _constants(row: list[float], z: Tensor) -> Tensor:
    """Return (B, n), filled on the device: a copy from the host would wait for it."""
    return torch.stack([torch.full_like(z[:, 0], v) for v in row], 1)


def _sparse_and_gradient(
    z: Tensor, y: Tensor, loss: str, target: Tensor | None, unit: bool
) -> tuple[Tensor, Tensor]:
    s = _sparse_terms(z, y, loss, target)
    entries = torch.cat([s.weight, -s.value[:, None] * s.inner], 1)
    entries = entries.where(s.moves[:, None], 0.0)
    grad = torch.zeros_like(z).scatter_add(1, s.places, entries)
    if not unit:
        return s.value, grad / s.denominator[:, None]
    most = grad.abs().amax(1, keepdim=True)
    return s.value, grad / most.where(most > 0, 1.0)


def _log_ratio(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(q / p), 0 where q has the class out of play, and (B,) bool: whether a class that
    is in play for q is not for p, which makes the divergence infinite."""
    log_ratio = torch.where(log_q == -torch.inf, 0.0, log_q - log_p)
    return log_ratio, (log_ratio == torch.inf).any(1)


def _kl_and_gradient(z: Tensor, natural: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """Return KL(q || p) and p - q. Where both are confident of one class, rounding loses their
    difference there, so that entry is minus the sum of the others."""
    q = natural.softmax(1)
    log_ratio, escaped = _log_ratio(natural.log_softmax(1), z.log_softmax(1))
    value = (q * log_ratio).sum(1).masked_fill(escaped, torch.inf)
    top = natural.argmax(1, keepdim=True)
    grad = (z.softmax(1) - q).scatter(1, top, 0.0)
    grad = grad.scatter(1, top, -grad.sum(1, keepdim=True))
    if unit:
        most = grad.abs().amax(1, keepdim=True)
        grad = grad / most.where(most > 0, 1.0)
    return value, grad.where(~escaped[:, None], 0.0)


def weighted_cross_entropy(
    logits: Tensor, y: Tensor, weight: Tensor | None = None, ignore_index: int | None = None
) -> Tensor:
    """Return weight * cross-entropy, (B,). See `ops.weighted_cross_entropy`."""
    z = widen(logits)
    w = 1.0 if weight is None else weight.to(z.dtype)
    if y.dim() == 2:
        target = y.to(z.dtype)
        infinite = _has_masked_target(z, target)
        log_p = _without_rows(z, infinite).log_softmax(1)
        terms = torch.where(target == 0, 0.0, target * log_p)
        return w * _answers_only(-terms.sum(1).masked_fill(infinite, -torch.inf), z)
    ignored, known = _ignored_and_known(logits, y, ignore_index)
    y = y.where(known, 0)
    infinite = _has_masked_label(z, y)
    log_p = _without_rows(z, infinite | ignored | ~known).log_softmax(1)
    value = w * (-_pick(log_p, y)).masked_fill(infinite, torch.inf)
    return value.where(known, torch.nan).masked_fill(ignored, 0.0)


def weighted_cross_entropy_backward(
    grad: Tensor, logits: Tensor, y: Tensor, weight: Tensor | None, ignore_index: int | None
) -> Tensor:
    z = widen(logits)
    p = z.softmax(1)
    scale = grad if weight is None else grad * weight.to(p.dtype)
    if y.dim() == 2:
        target = y.to(p.dtype)
        to_logits = scale[:, None] * (target.sum(1, keepdim=True) * p - target)
        return _zero_where(_has_masked_target(z, target), to_logits).to(logits.dtype)
    ignored, known = _ignored_and_known(logits, y, ignore_index)
    y = y.where(known, 0)
    zero = ~known | ignored | _has_masked_label(z, y)
    return _zero_where(zero, scale[:, None] * (p - _one_hot(p, y))).to(logits.dtype)


def _ignored_and_known(
    logits: Tensor, y: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    ignored = torch.zeros_like(y, dtype=torch.bool) if ignore_index is None else y == ignore_index
    return ignored, _is_class(y, logits.shape[1])


def _one_hot(p: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(p).scatter(1, y[:, None], 1.0)


def _has_masked_label(z: Tensor, y: Tensor) -> Tensor:
    """Return (B,) bool: whether a row that has an answer has its label out of play."""
    return has_answer(z) & ~_in_play(_pick(z, y))


def _has_masked_target(z: Tensor, target: Tensor) -> Tensor:
    """Return (B,) bool: whether a row that has an answer wants a class that is out of play."""
    return has_answer(z) & ((target != 0) & ~_in_play(z)).any(1)


def _without_rows(z: Tensor, dropped: Tensor) -> Tensor:
    """Return z with zeros in the rows `dropped`, through which no gradient passes."""
    return z.where(~dropped[:, None], 0.0)


def _zero_where(mask: Tensor, grad: Tensor) -> Tensor:
    return grad.where(~mask[:, None], 0.0)


def _answers_only(value: Tensor, *logits: Tensor) -> Tensor:
    """Return the values with NaN where one of the logits has no answer. Gradients pass."""
    usable = torch.stack([has_answer(z) for z in logits]).all(0)
    return value + torch.zeros_like(value).masked_fill(~usable, torch.nan)


def trades_kl(logits_adv: Tensor, logits: Tensor) -> Tensor:
    """Return KL(softmax(logits) || softmax(logits_adv)) per row. See `ops.trades_kl`."""
    return _kl_terms(logits_adv, logits, tiny=False).divergence


def trades_kl_backward(grad: Tensor, logits_adv: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    t = _kl_terms(logits_adv, logits, tiny=False)
    to_adv = grad[:, None] * (t.p - t.q)
    to_natural = grad[:, None] * t.q * (t.log_ratio - t.divergence[:, None])
    return (
        _zero_where(t.infinite, to_adv).to(logits_adv.dtype),
        _zero_where(t.infinite, to_natural).to(logits.dtype),
    )


class _KLTerms(NamedTuple):
    divergence: Tensor  # (B,) KL(q || p)
    log_ratio: Tensor  # log(q / p)
    q: Tensor
    p: Tensor
    kept: Tensor  # p / (p + tiny), tiny is MART's constant or 0
    infinite: Tensor  # (B,) bool, whether the divergence is infinite


def _kl_terms(logits_adv: Tensor, logits: Tensor, tiny: bool) -> _KLTerms:
    z, u = widen(logits_adv), widen(logits)
    answered = has_answer(z) & has_answer(u)
    if tiny:
        infinite = torch.zeros_like(answered)
    else:
        infinite = answered & (_in_play(u.log_softmax(1)) & ~_in_play(z.log_softmax(1))).any(1)
    z, u = (_without_rows(t, infinite) for t in (z, u))
    q, p = u.softmax(1), z.softmax(1)
    padded = p + _MART_TINY
    log_q = u.log_softmax(1)
    log_ratio, _ = _log_ratio(log_q, padded.log() if tiny else z.log_softmax(1))
    kept = p / padded if tiny else torch.ones_like(p)
    divergence = (q * log_ratio).sum(1).masked_fill(infinite, torch.inf)
    return _KLTerms(_answers_only(divergence, z, u), log_ratio, q, p, kept, infinite)


def mart_bce(logits_adv: Tensor, y: Tensor, exact: bool = False) -> Tensor:
    """Return -log p_y - log(1 - p_m), m the runner-up. See `ops.mart_bce`."""
    z = widen(logits_adv)
    known = _is_class(y, z.shape[1])
    y = y.where(known, 0)
    infinite = _has_masked_label(z, y)
    z = _without_rows(z, infinite)
    m = _runner_up(z, y)
    log_p = z.log_softmax(1)
    if exact:
        log_rest = _without(z, m).logsumexp(1) - z.logsumexp(1)
    else:
        log_rest = (_MART_ONE - _pick(z.softmax(1), m) + _MART_TINY).log()
    value = (-_pick(log_p, y) - log_rest).masked_fill(infinite, torch.inf)
    return value.where(known, torch.nan)


def mart_bce_backward(grad: Tensor, logits_adv: Tensor, y: Tensor, exact: bool) -> Tensor:
    z = widen(logits_adv)
    known = _is_class(y, z.shape[1])
    y = y.where(known, 0)
    infinite = _has_masked_label(z, y)
    z = _without_rows(z, infinite)
    m = _runner_up(z, y)
    p = z.softmax(1)
    p_m = _pick(p, m)
    if exact:  # the gradient of -log(1 - p_m) is p_m (e_m - softmax over the others)
        pull = p_m[:, None] * (_one_hot(p, m) - _without(z, m).softmax(1))
    else:
        pull = (p_m / (_MART_ONE - p_m + _MART_TINY))[:, None] * (_one_hot(p, m) - p)
    to_adv = grad[:, None] * (p - _one_hot(p, y) + pull)
    return _zero_where(~known | infinite, to_adv).to(logits_adv.dtype)


def mart_kl(
    logits_adv: Tensor, logits: Tensor, y: Tensor, exact: bool = False, detach_weight: bool = False
) -> Tensor:
    """Return (1 - q_y) KL(q || p) per row. See `ops.mart_kl`."""
    t = _kl_terms(logits_adv, logits, tiny=not exact)
    known = _is_class(y, t.q.shape[1])
    w = _mart_weight(t.q, y.where(known, 0), exact)
    value = (w.detach() if detach_weight else w) * t.divergence.masked_fill(t.infinite, 0.0)
    return value.masked_fill(t.infinite, torch.inf).where(known, torch.nan)


def mart_kl_backward(
    grad: Tensor, logits_adv: Tensor, logits: Tensor, y: Tensor, exact: bool, detach_weight: bool
) -> tuple[Tensor, Tensor]:
    t = _kl_terms(logits_adv, logits, tiny=not exact)
    known = _is_class(y, t.q.shape[1])
    y = y.where(known, 0)
    multiple = (grad * _mart_weight(t.q, y, exact))[:, None]
    kept = t.q * t.kept
    to_adv = multiple * (t.p * kept.sum(1, keepdim=True) - kept)
    to_natural = multiple * t.q * (t.log_ratio - t.divergence[:, None])
    if not detach_weight:
        through_weight = (grad * t.divergence * _pick(t.q, y))[:, None]
        to_natural = to_natural + through_weight * (t.q - _one_hot(t.q, y))
    zero = ~known | t.infinite
    return (
        _zero_where(zero, to_adv).to(logits_adv.dtype),
        _zero_where(zero, to_natural).to(logits.dtype),
    )


def _mart_weight(q: Tensor, y: Tensor, exact: bool) -> Tensor:
    return q.scatter(1, y[:, None], 0.0).sum(1) if exact else _MART_WEIGHT_ONE - _pick(q, y)


def row_square_sum(g: Tensor) -> Tensor:
    """Return the sum of squares of each row. See `ops.row_square_sum`."""
    squares = widen(g).square()
    return squares.sum(tuple(range(1, g.dim()))) if g.dim() > 1 else squares


def row_square_sum_backward(grad: Tensor, g: Tensor) -> Tensor:
    to_g = (per_row(2 * grad, g) * widen(g)).to(g.dtype)
    return torch.empty_like(g).copy_(to_g)


def softmax_cotangent(logits: Tensor, temperature: float, center: bool = False) -> Tensor:
    """Return softmax(logits / temperature), detached. See `ops.softmax_cotangent`."""
    z = widen(logits.detach())
    p = (z / temperature).softmax(1)
    if center:
        in_play = (z != -torch.inf).to(p.dtype)
        p = p - in_play / in_play.sum(1, keepdim=True)
    return p.to(logits.dtype).contiguous()


def row_stats(logits: Tensor, y: Tensor) -> RowStats:
    """Return runner-up, margins and the four best classes of each row. See `ops.row_stats`."""
    z = widen(logits.detach())
    usable = has_answer(z)
    known = usable & _is_class(y, z.shape[1])
    z = _without_rows(z, ~usable)
    safe = y.where(known, 0)
    runner_up = _runner_up(z, safe)
    margin = _pick(z, safe) - _pick(z, runner_up)
    total = (z - z.amax(1, keepdim=True)).exp().sum(1)
    prob_margin = -(-margin.abs()).expm1() / total * torch.where(margin < 0, -1.0, 1.0)
    values, index = z.sort(dim=1, descending=True, stable=True)
    missing = max(0, 4 - z.shape[1])
    top4 = torch.nn.functional.pad(values[:, :4], (0, missing), value=-torch.inf)
    top4_index = torch.nn.functional.pad(index[:, :4], (0, missing), value=-1)
    top4_index = top4_index.where(_in_play(top4), -1)
    return RowStats(
        runner_up.where(known, -1),
        margin.where(known, torch.nan),
        prob_margin.where(known, torch.nan),
        top4.where(usable[:, None], torch.nan),
        top4_index.where(usable[:, None], -1),
    )

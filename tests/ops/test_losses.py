"""Losses: against the reference, float64, closed forms and published vectors."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import (
    DTYPES,
    LAYOUTS,
    LOGIT_SHAPES,
    assert_within_twice,
    expanded,
    labels,
    layout_pairs,
    normal,
)

from pyadv import ops, reference
from pyadv.menus import ATTACK_LOSSES

CLASSES_NEEDED = {"dlr": 3, "dlr_targeted": 4}
# Rows long enough for a block of threads on CUDA, beside those that a warp takes.
SHAPES = (*LOGIT_SHAPES, (2, 1030))


def attack_arguments(loss, logits, seed=1):
    """The further arguments that `loss` takes."""
    rows, classes = logits.shape
    if loss == "kl":
        natural = normal((rows, classes), torch.float64, seed, scale=3).to(logits)
        return {"reference_logits": natural}
    if loss.endswith("_targeted"):
        return {"target": labels(rows, classes, seed, logits.device)}
    return {}


def attack_cases(shapes=SHAPES):
    for loss in ATTACK_LOSSES:
        for shape in shapes:
            if shape[1] >= CLASSES_NEEDED.get(loss, 2):
                yield pytest.param(loss, shape, id=f"{loss}-{shape[0]}x{shape[1]}")


def wide(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def wide_all(arguments):
    return {name: wide(value) for name, value in arguments.items()}


def close(actual, exact, dtype=None):
    """Within some roundings of the arithmetic and a few of `dtype`."""
    dtype = dtype or actual.dtype
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = 64 * torch.finfo(arithmetic).eps + 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        actual.double(), exact.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def as_precise_as_torch(actual, by_torch, exact):
    """The rule for reductions, with room for what rounding does to probabilities, which are of size
    1, and for float64, where the reference is not exact itself."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-13)
    else:
        one = torch.ones(1, dtype=torch.float64, device=actual.device)
        ends = [torch.cat([t.flatten(), one.to(t)]) for t in (actual, by_torch, exact)]
        assert_within_twice(*ends, ulps=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["unit", "exact"])
@pytest.mark.parametrize("loss, shape", attack_cases())
def test_attack_loss_is_the_reference_in_float64(loss, shape, scale, dtype, device):
    z = normal(shape, dtype, 0, device, scale=3)
    # the DLR of the last of three classes is constant: no gradient to compare, only its rounding
    y = z.argmax(1) if shape[1] == 3 else labels(*shape, 2, device)
    more = attack_arguments(loss, z)
    ours = ops.attack_loss(z, y, loss, scale=scale, **more)
    exact = reference.attack_loss(wide(z), y, loss, scale=scale, **wide_all(more))
    assert ours.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.grad_logits.dtype == dtype and ours.grad_logits.is_contiguous()
    # a small denominator magnifies the rounding of the logits' differences
    magnify = torch.ones_like(exact.loss)
    if loss.startswith("dlr"):
        steep = reference.attack_loss(wide(z), y, loss, scale="exact", **wide_all(more))
        magnify = steep.grad_logits.abs().amax(1).clamp(min=1)
    close(ours.loss / magnify, exact.loss / magnify, ours.loss.dtype)
    close(ours.grad_logits / magnify[:, None], exact.grad_logits / magnify[:, None], dtype)
    assert torch.equal(ours.correct, exact.correct)
    assert not ours.loss.requires_grad and not ours.grad_logits.requires_grad


@pytest.mark.parametrize("loss, shape", attack_cases(((5, 7),)))
def test_exact_gradient_is_the_derivative_of_the_value(loss, shape, device):
    z = normal(shape, torch.float64, 0, device, scale=3).requires_grad_()
    y = labels(*shape, 2, device)
    more = attack_arguments(loss, z.detach())
    ours = ops.attack_loss(z, y, loss, scale="exact", **more)
    value = reference.attack_loss_value(z, y, loss, **more)
    (grad,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(ours.loss, value.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad_logits, grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("loss, name", [("kl", "reference_logits"), ("ce_targeted", "target")])
def test_the_reference_names_what_a_loss_needs(loss, name):
    with pytest.raises(ValueError, match=f"attack_loss_value: loss '{loss}' needs {name}"):
        reference.attack_loss_value(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), loss)


@pytest.mark.parametrize("loss, shape", attack_cases(((5, 7),)))
def test_unit_scale_is_a_positive_multiple_of_the_gradient(loss, shape, device):
    z = normal(shape, torch.float64, 0, device, scale=3)
    y = labels(*shape, 2, device)
    more = attack_arguments(loss, z)
    unit = ops.attack_loss(z, y, loss, **more).grad_logits
    exact = ops.attack_loss(z, y, loss, scale="exact", **more).grad_logits
    largest, exact_largest = unit.abs().amax(1), exact.abs().amax(1)
    same = (largest == 0) & (exact_largest == 0)  # target == y
    assert (same | ((largest - 1).abs() < 1e-12)).all() and not same.all()
    factor = (largest / exact_largest).masked_fill(same, 1.0)[:, None]
    torch.testing.assert_close(unit, exact * factor, rtol=1e-10, atol=1e-12)


ADVERSARIAL = [[2, 1, -0.5, 0.3], [0.1, 1.2, 0.9, -1]]
NATURAL = [[1, 0.2, -0.3, 0], [0.5, 0.4, 1.5, -0.2]]


@pytest.fixture
def golden(device):
    def tensor(rows):
        return torch.tensor(rows, dtype=torch.float64, device=device)

    return tensor(ADVERSARIAL), tensor(NATURAL), torch.tensor([0, 2], device=device)


@pytest.mark.parametrize(
    "loss, expected",
    [
        ("ce", (0.49020321, 1.08138352)),
        ("margin", (-1.0, 0.3)),
        ("slm", (-0.45784115, 0.66719142)),
        ("dlr", (-0.58823529, 0.27272727)),
        ("dlr_targeted", (-0.47619048, 0.18181818)),
        ("kl", (0.07589236, 0.18119026)),
    ],
)
def test_attack_loss_vectors(golden, loss, expected):
    z, u, y = golden
    more = {"kl": {"reference_logits": u}, "dlr_targeted": {"target": torch.ones_like(y)}}
    ours = ops.attack_loss(z, y, loss, **more.get(loss, {}))
    torch.testing.assert_close(ours.loss, ours.loss.new_tensor(expected), rtol=0, atol=1e-8)
    assert ours.correct.tolist() == [True, False]


def test_training_loss_vectors(golden):
    z, u, y = golden
    for ours, expected in (
        (ops.weighted_cross_entropy(z, y), (0.49020321, 1.08138352)),
        (ops.trades_kl(z, u), (0.07589236, 0.18119026)),
        (ops.mart_bce(z, y), (0.74538823, 1.69326825)),
        (ops.mart_bce(z, y, exact=True), (0.74551731, 1.69345266)),
        (ops.mart_kl(z, u, y), (0.03957572, 0.08498820)),
    ):
        torch.testing.assert_close(ours, ours.new_tensor(expected), rtol=0, atol=1e-8)


def confident_model(margin, dtype, device, rows=6, features=64):
    """Inputs of a linear model whose logits have y ahead of all others by about `margin`."""
    weight = normal((10, features), torch.float64, 3, device)
    y = labels(rows, 10, 4, device)
    wanted = normal((rows, 10), torch.float64, 5, device)
    wanted -= wanted.amax(1, keepdim=True)
    wanted[torch.arange(rows, device=device), y] = margin
    x = wanted @ torch.linalg.pinv(weight).T
    return weight, (x @ weight.T), (x @ weight.T).to(dtype), y


@pytest.mark.parametrize("loss", ["ce", "ce_targeted"])
@pytest.mark.parametrize("margin", [2, 12, 15, 16, 17, 25, 40, 80, 110])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_input_gradient_keeps_its_signs_on_confident_rows(loss, margin, dtype, device):
    weight, wide_logits, logits, y = confident_model(margin, dtype, device)
    more = {"target": y} if loss == "ce_targeted" else {}
    ours = ops.attack_loss(logits, y, loss, **more).grad_logits
    # in float64 the direction of logsumexp_{j != y} z_j - z_y does not vanish
    exact = reference.attack_loss(logits.double(), y, loss, **more).grad_logits
    signs = (ours.double() @ weight).sign(), (exact @ weight).sign()
    assert (signs[0] == signs[1]).double().mean() >= 0.999
    if dtype == torch.float32 and margin <= 80:  # beyond, 1 - p_y is no normal number
        ours = ops.attack_loss(logits, y, loss, scale="exact", **more).grad_logits
        assert ((ours.double() @ weight).sign() == signs[1]).double().mean() >= 0.999


def test_kl_gradient_keeps_its_signs_where_both_are_confident(device):
    weight, logits, _, y = confident_model(25, torch.float32, device)
    natural = (logits + normal(logits.shape, torch.float64, 9, device)).float()
    logits = logits.float()
    for scale in ("unit", "exact"):
        ours = ops.attack_loss(logits, y, "kl", natural, scale=scale).grad_logits
        exact = reference.attack_loss(
            logits.double(), y, "kl", natural.double(), scale=scale
        ).grad_logits
        same = (ours.double() @ weight).sign() == (exact @ weight).sign()
        assert same.double().mean() >= 0.999


@pytest.mark.parametrize("classes", [10, 40])
@pytest.mark.parametrize("loss", ATTACK_LOSSES)
def test_rows_do_not_depend_on_their_batch(loss, classes, device):
    n = 70  # more than are computed side by side
    z = normal((n, classes), torch.float16, 0, device, scale=4)
    y = labels(n, classes, 1, device)
    z[33, 1], z[34, 0], y[35], y[69] = math.nan, math.inf, -1, classes
    z[36], y[36], y[37] = 1, 3, 0
    more = attack_arguments(loss, z)

    def rows(i):
        return ops.attack_loss(z[i], y[i], loss, **{k: v[i] for k, v in more.items()})

    one = [rows(slice(i, i + 1)) for i in range(n)]
    for whole, parts in zip(rows(slice(None)), zip(*one, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=0, equal_nan=True)
    usable = torch.ones(n, dtype=torch.bool, device=device)
    usable[[33, 34, 35, 69]] = False
    value, _, correct = rows(slice(None))
    assert torch.equal(value.isfinite(), usable)
    assert torch.equal(correct, usable & (z.argmax(1) == y))


@pytest.mark.parametrize("loss", ["dlr", "dlr_targeted"])
def test_dlr_ignores_scale_and_shift(loss, device):
    z = normal((6, 10), torch.float64, 0, device)
    y, more = labels(6, 10, 1, device), attack_arguments(loss, z)
    ours, moved = (ops.attack_loss(v, y, loss, **more) for v in (z, 7 * z + 3))
    torch.testing.assert_close(ours.loss, moved.loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.grad_logits, moved.grad_logits, rtol=1e-9, atol=1e-9)


def test_the_first_class_wins_ties(device):
    z = torch.tensor([[1.0, 5.0, 5.0, 5.0, 0.0]], device=device)

    def at(y):
        return torch.tensor([y], device=device)

    assert [ops.attack_loss(z, at(y), "ce").correct.item() for y in (1, 2, 3)] == [1, 0, 0]
    assert ops.attack_loss(z, at(1), "margin").grad_logits.tolist() == [[0, -1, 1, 0, 0]]
    assert ops.attack_loss(z, at(2), "margin").grad_logits.tolist() == [[0, 1, -1, 0, 0]]
    assert ops.attack_loss(z, at(0), "margin").grad_logits.tolist() == [[-1, 1, 0, 0, 0]]
    stats = ops.row_stats(z, at(1))
    assert stats.runner_up.item() == 2
    assert stats.top4_index.tolist() == [[1, 2, 3, 0]]
    # all logits equal: no direction is better, and nothing divides by zero
    for loss in ("dlr", "dlr_targeted"):
        more = {"target": at(3)} if loss == "dlr_targeted" else {}
        ours = ops.attack_loss(torch.ones(1, 5, device=device), at(0), loss, **more)
        assert ours.loss.item() == 0 and ours.grad_logits.isfinite().all()


def test_negative_logits_have_a_runner_up(device):
    z = -50 - normal((4, 10), torch.float32, 0, device).abs()
    y = labels(4, 10, 1, device)
    margin = ops.attack_loss(z, y, "margin").loss
    assert torch.equal(margin, z.scatter(1, y[:, None], -math.inf).amax(1) - z[range(4), y])


@pytest.mark.parametrize("loss", ATTACK_LOSSES)
@pytest.mark.parametrize("value", [math.nan, math.inf, None], ids=["nan", "inf", "all masked"])
@pytest.mark.parametrize("classes", [10, 1030])
def test_rows_without_an_answer_have_no_loss(loss, value, classes, device):
    z = normal((4, classes), torch.float32, 0, device)
    y = z.argmax(1)
    y[2] = classes
    if value is None:
        z[1], y[1] = -math.inf, 0
    else:
        z[1, 3] = value
    ours = ops.attack_loss(z, y, loss, **attack_arguments(loss, z.nan_to_num()))
    assert ours.loss.isnan().tolist() == [False, True, True, False]
    assert ours.correct.tolist() == [True, False, False, True]
    assert ours.grad_logits[1:3].count_nonzero() == 0
    assert (ours.grad_logits[[0, 3]].abs().amax(1) > 0).all()


def test_other_arguments_do_not_change_the_verdict(device):
    z = normal((2, 5), torch.float32, 0, device)
    y, bad = z.argmax(1), torch.full_like(z, math.nan)
    for loss, more in (
        ("kl", {"reference_logits": bad}),
        ("ce_targeted", {"target": torch.full_like(y, 5)}),
        ("margin_targeted", {"target": torch.full_like(y, -1)}),
    ):
        ours = ops.attack_loss(z, y, loss, **more)
        assert ours.loss.isnan().all() and ours.grad_logits.count_nonzero() == 0
        assert ours.correct.all()


def masked_problem(classes, dtype, device, seed=0):
    """Logits with a third of the classes at -inf, the same logits without those classes, and labels
    in play for both."""
    rows = 40 if classes < 100 else 5  # a tile holds 32 rows of few classes
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(classes, generator=generator)[: max(5, 2 * classes // 3)].sort().values
    kept = kept.to(device)
    small = normal((rows, len(kept)), dtype, seed, device, scale=3)
    large = torch.full((rows, classes), -math.inf, dtype=dtype, device=device)
    large[:, kept] = small
    y = labels(rows, len(kept), seed + 1, device)
    return large, small, kept[y], y, kept


def spread(small, kept, classes):
    """Put the columns of `small` at the classes `kept`, zeros elsewhere."""
    large = small.new_zeros((small.shape[0], classes))
    large[:, kept] = small
    return large


MASKED_CLASSES = [7, 10, 40, 1030]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", MASKED_CLASSES)
@pytest.mark.parametrize("scale", ["unit", "exact"])
@pytest.mark.parametrize("loss", ATTACK_LOSSES)
def test_a_masked_class_counts_as_if_it_were_not_there(loss, scale, classes, dtype, device):
    large, small, y_large, y_small, kept = masked_problem(classes, dtype, device)
    more_small = attack_arguments(loss, small)
    more_large = dict(more_small)
    if "target" in more_small:
        more_large["target"] = kept[more_small["target"]]
    if "reference_logits" in more_small:
        natural = torch.full_like(large, -math.inf)
        natural[:, kept] = more_small["reference_logits"]
        more_large["reference_logits"] = natural
    masked = ops.attack_loss(large, y_large, loss, scale=scale, **more_large)
    removed = ops.attack_loss(small, y_small, loss, scale=scale, **more_small)
    assert masked.loss.isfinite().all()
    magnify = torch.ones_like(removed.loss)
    if loss.startswith("dlr"):
        steep = ops.attack_loss(small, y_small, loss, scale="exact", **more_small)
        magnify = steep.grad_logits.abs().amax(1).clamp(min=1).to(magnify)
    close(masked.loss / magnify, removed.loss / magnify)
    expected = spread(removed.grad_logits, kept, classes)
    close(masked.grad_logits / magnify[:, None], expected / magnify[:, None], dtype)
    assert torch.equal(masked.correct, removed.correct)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", MASKED_CLASSES)
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_training_losses_leave_masked_classes_out(module, classes, dtype, device):
    large, small, y_large, y_small, kept = masked_problem(classes, dtype, device)
    other_small = normal(small.shape, dtype, 5, device, scale=3)
    other_large = torch.full_like(large, -math.inf)
    other_large[:, kept] = other_small
    soft = other_small.softmax(1)
    cases = {
        "weighted_cross_entropy": (y_large, y_small),
        "soft": (spread(soft, kept, classes), soft),
        "trades_kl": ((), ()),
        "mart_bce": (y_large, y_small),
        "mart_bce_exact": (y_large, y_small),
        "mart_kl": (y_large, y_small),
        "mart_kl_exact": (y_large, y_small),
    }

    def at(name, z, u, y):
        z, u = z.clone().requires_grad_(), u.clone().requires_grad_()
        if name in ("weighted_cross_entropy", "soft"):
            rows = module.weighted_cross_entropy(z, y)
        elif name == "trades_kl":
            rows = module.trades_kl(z, u)
        elif name.startswith("mart_bce"):
            rows = module.mart_bce(z, y, exact=name.endswith("exact"))
        else:
            rows = module.mart_kl(z, u, y, exact=name.endswith("exact"))
        grads = torch.autograd.grad(rows.sum(), (z, u), allow_unused=True)
        return rows.detach(), [g for g in grads if g is not None]

    for name, (y_l, y_s) in cases.items():
        masked, grads_masked = at(name, large, other_large, y_l)
        removed, grads_removed = at(name, small, other_small, y_s)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
        torch.testing.assert_close(masked, removed, **tolerance)
        for actual, expected in zip(grads_masked, grads_removed, strict=True):
            torch.testing.assert_close(actual, spread(expected, kept, classes), **tolerance)


@pytest.mark.parametrize("classes", MASKED_CLASSES)
def test_row_stats_and_cotangents_leave_masked_classes_out(classes, device):
    large, small, y_large, y_small, kept = masked_problem(classes, torch.float32, device)
    masked, removed = ops.row_stats(large, y_large), ops.row_stats(small, y_small)
    assert torch.equal(masked.runner_up, kept[removed.runner_up])
    assert torch.equal(masked.top4, removed.top4)
    assert torch.equal(masked.top4_index, kept[removed.top4_index])
    close(masked.margin, removed.margin)
    close(masked.prob_margin, removed.prob_margin)
    for center in (False, True):
        p = ops.softmax_cotangent(large, 2.0, center)
        close(p, spread(ops.softmax_cotangent(small, 2.0, center), kept, classes))


def test_row_stats_of_few_classes_in_play(device):
    z = torch.full((3, 6), -math.inf, device=device)
    z[0, 2], z[1, 2], z[1, 4], z[2, 0] = 1.0, 1.0, 3.0, 1.0
    stats = ops.row_stats(z, torch.tensor([2, 0, 0], device=device))
    assert stats.top4_index.tolist() == [[2, -1, -1, -1], [4, 2, -1, -1], [0, -1, -1, -1]]
    assert stats.top4[0].tolist() == [1.0, -math.inf, -math.inf, -math.inf]
    assert stats.runner_up.tolist() == [0, 4, 1]
    assert stats.margin.tolist() == [math.inf, -math.inf, math.inf]
    torch.testing.assert_close(stats.prob_margin.cpu(), torch.tensor([1, -0.880797, 1]))


# loss: values where the label is out of play, where no other class is in play, where the target is
# out of play, where label and target are
INFINITE = {
    "ce": (math.inf, 0.0),
    "margin": (math.inf, -math.inf),
    "dlr": (math.inf, -math.inf),
    "slm": (math.inf, -math.inf),
    "ce_targeted": (None, -math.inf, -math.inf, -math.inf),
    "margin_targeted": (math.inf, -math.inf, -math.inf, math.inf),
    "dlr_targeted": (math.inf, -math.inf, -math.inf, math.inf),
}


@pytest.mark.parametrize("classes", [6, 40, 1030])
@pytest.mark.parametrize("scale", ["unit", "exact"])
@pytest.mark.parametrize("loss", INFINITE)
def test_losses_at_the_limit(loss, scale, classes, device):
    z = normal((4, classes), torch.float32, 0, device)
    y, t = (torch.full((4,), k, device=device) for k in (2, 4))
    z[0, 2] = -math.inf
    z[1], z[1, 2] = -math.inf, 0.5
    z[2, 4] = -math.inf
    z[3, 2] = z[3, 4] = -math.inf
    more = {"target": t} if loss.endswith("targeted") else {}
    ours = ops.attack_loss(z, y, loss, scale=scale, **more)
    for value, expected in zip(ours.loss.tolist(), INFINITE[loss], strict=False):
        assert expected is None or value == expected
    assert not ours.loss.isnan().any()
    rows = slice(None) if more else slice(2)
    assert ours.grad_logits[rows].count_nonzero() == 0
    assert not ours.correct[0] and ours.correct[1]


@pytest.mark.parametrize("loss, inner", [("dlr", 2), ("dlr_targeted", 3)])
@pytest.mark.parametrize("classes", [6, 40])
def test_dlr_of_too_few_classes_in_play_is_the_margin(loss, inner, classes, device):
    z = torch.full((1, classes), -math.inf, device=device)
    z[0, :inner] = torch.tensor([1.0, 3.0, 2.0], device=device)[:inner]
    y, more = torch.tensor([0], device=device), {}
    if loss == "dlr_targeted":
        more = {"target": torch.tensor([1], device=device)}
    for scale in ("unit", "exact"):
        ours = ops.attack_loss(z, y, loss, scale=scale, **more)
        margin = ops.attack_loss(z, y, loss.replace("dlr", "margin"), scale=scale, **more)
        assert ours.loss.item() == margin.loss.item() == 2.0
        assert torch.equal(ours.grad_logits, margin.grad_logits)
        assert ours.grad_logits[0, :2].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("classes", [6, 40, 1030])
def test_kl_is_infinite_where_a_class_leaves_play(classes, device):
    z, u = (normal((3, classes), torch.float32, s, device) for s in (0, 1))
    z[1, 3] = -math.inf
    u[2, 3] = -math.inf
    y = torch.tensor([0, 0, 3], device=device)
    for scale in ("unit", "exact"):
        ours = ops.attack_loss(z, y, "kl", u, scale=scale)
        assert ours.loss.isfinite().tolist() == [True, False, True] and ours.loss[1] == math.inf
        assert ours.grad_logits[1].count_nonzero() == 0
        assert (ours.grad_logits[[0, 2]].abs().amax(1) > 0).all()
    for rows in (lambda m, z, u: m.trades_kl(z, u), lambda m, z, u: m.mart_kl(z, u, y, exact=True)):
        for module in (ops, reference):
            leaves = z.clone().requires_grad_(), u.clone().requires_grad_()
            value = rows(module, *leaves)
            assert value.isfinite().tolist() == [True, False, True] and value[1] == math.inf
            for grad in torch.autograd.grad(value.sum(), leaves):
                assert grad[1].count_nonzero() == 0 and grad.isfinite().all()


@pytest.mark.parametrize("classes", [6, 40])
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_training_losses_at_the_limit(module, classes, device):
    z = normal((3, classes), torch.float32, 0, device)
    y = torch.full((3,), 2, device=device)
    z[0, 2] = -math.inf
    z[1], z[1, 2] = -math.inf, 0.5
    soft = torch.zeros_like(z).scatter(1, y[:, None], 1.0)
    constant = -math.log(1.0001)  # of the official MART code
    for function, alone in (
        (lambda z: module.weighted_cross_entropy(z, y), 0.0),
        (lambda z: module.weighted_cross_entropy(z, soft), 0.0),
        (lambda z: module.mart_bce(z, y), constant),
        (lambda z: module.mart_bce(z, y, exact=True), 0.0),
    ):
        leaf = z.clone().requires_grad_()
        rows = function(leaf)
        assert rows[0] == math.inf and rows[1].item() == pytest.approx(alone, abs=1e-6)
        (grad,) = torch.autograd.grad(rows.sum(), leaf)
        assert grad.isfinite().all() and grad[2].abs().max() > 0
        assert grad[0].count_nonzero() == 0 and grad[1].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [5, 10, 40, 1030])
def test_kernels_are_the_reference_with_any_mask(classes, dtype, device):
    """Random masks, with every special case in some row: labels, targets and all others out."""
    rows = 300 if classes < 100 else 30
    generator = torch.Generator().manual_seed(classes)
    share = torch.rand(rows, 1, generator=generator)
    z, u = (normal((rows, classes), dtype, s, device, scale=3) for s in (0, 1))
    for t in (z, u):
        mask = torch.rand(rows, classes, generator=generator) < share
        t[mask.to(device)] = -math.inf
    u[::3] = torch.where(z[::3].isinf(), z[::3], u[::3].nan_to_num(neginf=0.0))
    z[5], z[6, 1], z[7, 2], u[8, 0] = -math.inf, math.nan, math.inf, math.nan
    y, t = (labels(rows, classes, s, device) for s in (2, 3))
    y[::2] = z[::2].nan_to_num(nan=0.0, posinf=0.0).argmax(1)
    for loss in ATTACK_LOSSES:
        more = {"target": t} if loss.endswith("targeted") else {}
        if loss == "kl":
            more = {"reference_logits": u}
        for scale in ("unit", "exact"):
            ours = ops.attack_loss(z, y, loss, scale=scale, **more)
            exact = reference.attack_loss(wide(z), y, loss, scale=scale, **wide_all(more))
            assert torch.equal(ours.correct, exact.correct)
            magnify = torch.ones_like(exact.loss)
            if loss.startswith("dlr"):
                steep = reference.attack_loss(wide(z), y, loss, scale="exact", **wide_all(more))
                steep = steep.grad_logits.abs().amax(1)
                magnify = steep.clamp(min=1)
                if scale == "unit":  # a constant DLR has no direction, only rounding errors
                    flat = ((steep > 0) & (steep < 1e-4))[:, None]
                    ours, exact = (
                        r._replace(grad_logits=r.grad_logits.masked_fill(flat, 0.0))
                        for r in (ours, exact)
                    )
            close(ours.loss / magnify, exact.loss / magnify, ours.loss.dtype)
            close(ours.grad_logits / magnify[:, None], exact.grad_logits / magnify[:, None], dtype)
    for name in TRAINING:
        if name == "row_square_sum":
            continue
        ours = values_and_gradients(ops, name, z, u, y)
        exact = values_and_gradients(reference, name, z.double(), u.double(), y)
        for actual, true in zip(ours, exact, strict=True):
            where = true.abs().amax(1, keepdim=True) if true.dim() == 2 else true.abs()
            scale = where.nan_to_num(1.0, 1.0).clamp(min=1)
            # A sum over 1030 classes rounds more often than `close` allows for.
            close(actual / scale / 4, true / scale / 4, dtype if true.dim() == 2 else actual.dtype)
    ours, exact = ops.row_stats(z, y), reference.row_stats(z.double(), y)
    for actual, true in zip(ours, exact, strict=True):
        close(actual, true, ours.margin.dtype)


@pytest.mark.parametrize("bad", [-1, -100, 10, 2**40])
def test_bad_labels_are_not_used_as_an_index(bad, device):
    z = normal((3, 10), torch.float32, 0, device).requires_grad_()
    y = torch.tensor([1, bad, 3], device=device)
    good = torch.tensor([1, 2, 3], device=device)
    for loss in ATTACK_LOSSES:
        more = attack_arguments(loss, z.detach())
        calls = [(y, more)]
        if "target" in more:
            calls.append((good, {"target": y}))
        for label, arguments in calls:
            ours = ops.attack_loss(z, label, loss, **arguments)
            assert ours.loss.isnan().tolist() == [False, True, False]
            assert ours.grad_logits[1].count_nonzero() == 0 and not ours.correct[1]
    for rows in (
        ops.weighted_cross_entropy(z, y),
        ops.mart_bce(z, y),
        ops.mart_kl(z, z * 2, y),
    ):
        assert rows.isnan().tolist() == [False, True, False]
        (grad,) = torch.autograd.grad(rows, z, torch.ones_like(rows))
        assert grad[1].count_nonzero() == 0 and grad.isfinite().all()
    stats = ops.row_stats(z, y)
    assert stats.runner_up[1] == -1 and stats.margin[1].isnan() and stats.prob_margin[1].isnan()
    assert stats.top4[1].isfinite().all()


@pytest.mark.parametrize("first, second", layout_pairs())
def test_layouts(first, second, device):
    z = normal((5, 9), torch.float32, 0, device)
    u = normal((5, 9), torch.float32, 1, device)
    y = labels(5, 9, 2, device)
    strided_y = torch.stack([y, y], 1)[:, 0]
    lz, lu = LAYOUTS[first](z), LAYOUTS[second](u)
    for actual, expected in zip(
        ops.attack_loss(lz, strided_y, "kl", lu), ops.attack_loss(z, y, "kl", u), strict=True
    ):
        torch.testing.assert_close(actual, expected)
    for loss in (ops.trades_kl, lambda a, b: ops.mart_kl(a, b, strided_y)):
        torch.testing.assert_close(loss(lz, lu), loss(z, u))
    for actual, expected in zip(ops.row_stats(lz, strided_y), ops.row_stats(z, y), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(ops.softmax_cotangent(lz, 2.0), ops.softmax_cotangent(z, 2.0))


def test_expanded_and_strided_rows(device):
    row = normal((10,), torch.float32, 0, device)
    y = labels(4, 10, 1, device)
    batch = expanded(row, 4)
    for loss in ("ce", "dlr"):
        for actual, expected in zip(
            ops.attack_loss(batch, y, loss), ops.attack_loss(batch.clone(), y, loss), strict=True
        ):
            assert torch.equal(actual, expected)
    narrow = normal((4, 20), torch.float32, 0, device)[:, 3:13]
    assert torch.equal(
        ops.weighted_cross_entropy(narrow, y), ops.weighted_cross_entropy(narrow.clone(), y)
    )


# name: (function of (module, adversarial logits, natural logits, labels)), plain PyTorch
TRAINING = {
    "ce": lambda m, z, u, y: m.weighted_cross_entropy(z, y),
    "weighted": lambda m, z, u, y: m.weighted_cross_entropy(z, y, row_weights(z)),
    "ignoring": lambda m, z, u, y: m.weighted_cross_entropy(z, y, row_weights(z), 1),
    "soft": lambda m, z, u, y: m.weighted_cross_entropy(z, soft_labels(z)),
    "trades_kl": lambda m, z, u, y: m.trades_kl(z, u),
    "mart_bce": lambda m, z, u, y: m.mart_bce(z, y),
    "mart_bce_exact": lambda m, z, u, y: m.mart_bce(z, y, exact=True),
    "mart_kl": lambda m, z, u, y: m.mart_kl(z, u, y),
    "mart_kl_exact": lambda m, z, u, y: m.mart_kl(z, u, y, exact=True),
    "mart_kl_detached": lambda m, z, u, y: m.mart_kl(z, u, y, detach_weight=True),
    "row_square_sum": lambda m, z, u, y: m.row_square_sum(z),
}


def row_weights(z):
    return torch.linspace(0, 2, z.shape[0], dtype=torch.float64, device=z.device)


def soft_labels(z):
    return normal(z.shape, torch.float64, 7, scale=2).softmax(1).to(z.device)


def values_and_gradients(module, name, z, u, y):
    z, u = z.detach().requires_grad_(), u.detach().requires_grad_()
    rows = TRAINING[name](module, z, u, y)
    cotangent = torch.linspace(0.5, 2, rows.numel(), dtype=rows.dtype, device=rows.device)
    grads = torch.autograd.grad(rows, (z, u), cotangent, allow_unused=True)
    return [rows.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TRAINING)
def test_training_losses_and_gradients(name, shape, dtype, device):
    z, u = (normal(shape, dtype, seed, device, scale=3) for seed in (0, 1))
    y = labels(*shape, 2, device)
    ours = values_and_gradients(ops, name, z, u, y)
    plain = values_and_gradients(reference, name, z, u, y)
    exact = values_and_gradients(reference, name, z.double(), u.double(), y)
    assert len(ours) == len(exact)
    for actual, by_torch, true in zip(ours, plain, exact, strict=True):
        assert actual.dtype == by_torch.dtype and actual.stride() == by_torch.stride()
        as_precise_as_torch(actual, by_torch, true)


@pytest.mark.parametrize("name", [name for name in TRAINING if name != "mart_kl_detached"])
def test_training_gradients_are_derivatives(name, device):
    z, u = (normal((4, 5), torch.float64, s, device).requires_grad_() for s in (0, 1))
    y = labels(4, 5, 2, device)
    assert torch.autograd.gradcheck(lambda z, u: TRAINING[name](ops, z, u, y), (z, u))


def test_weights_receive_a_gradient(device):
    z = normal((4, 5), torch.float64, 0, device)
    weight = row_weights(z).requires_grad_()
    y = labels(4, 5, 2, device)
    ops.weighted_cross_entropy(z, y, weight).sum().backward()
    torch.testing.assert_close(weight.grad, ops.weighted_cross_entropy(z, y))


@pytest.mark.parametrize("name", TRAINING)
def test_double_backward_is_refused(name, device):
    z, u = (normal((4, 5), torch.float64, s, device).requires_grad_() for s in (0, 1))
    rows = TRAINING[name](ops, z, u, labels(4, 5, 2, device))
    with pytest.raises(RuntimeError, match=r"no second derivative; use pyadv\.reference\."):
        (grad,) = torch.autograd.grad(rows.sum(), z, create_graph=True)
        grad.square().sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [10, 40])
@pytest.mark.parametrize("op", ["weighted_cross_entropy", "trades_kl", "mart_bce", "mart_kl"])
def test_one_pass_gives_what_two_give(op, classes, dtype, device):
    z, u = (normal((50, classes), dtype, seed, device, scale=3) for seed in (0, 1))
    y = labels(50, classes, 2, device)
    y[3], y[4], z[5, 2], z[6] = 1, classes, -math.inf, math.nan
    cases = {
        "weighted_cross_entropy": [(z, y, row_weights(z), 1), (z, soft_labels(z), None, None)],
        "trades_kl": [(z, u)],
        "mart_bce": [(z, y, True), (z, y, False)],
        "mart_kl": [(z, u, y, True, False), (z, u, y, False, True)],
    }
    forward, backward, both = (
        getattr(torch.ops.pyadv, op + what) for what in ("", "_backward", "_and_gradient")
    )
    for args in cases[op]:
        value, *grads = both(*args)
        separate = backward(torch.ones_like(value), *args)
        separate = separate if isinstance(separate, tuple) else (separate,)
        for actual, expected in zip((value, *grads), (forward(*args), *separate), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", TRAINING)
def test_a_graph_can_be_gone_through_again(name, device):
    z, u = (normal((4, 5), torch.float32, s, device).requires_grad_() for s in (0, 1))
    rows = TRAINING[name](ops, z, u, labels(4, 5, 2, device))
    first, again = (
        torch.autograd.grad(rows.sum(), (z, u), retain_graph=True, allow_unused=True)
        for _ in range(2)
    )
    torch.testing.assert_close(first, again)


@pytest.mark.parametrize("margin", [20.0, 60.0])
def test_training_losses_keep_confident_rows(margin, device):
    """1 - p is never a difference, so that value and gradient outlive float32's 1 - 1e-8."""
    ops.row_square_sum(torch.ones(1, 1, device=device))  # the first op loads the kernels
    key = device.type.upper()
    if not torch._C._dispatch_has_kernel_for_dispatch_key("pyadv::row_square_sum", key):
        pytest.skip("the reference is plain PyTorch, whose cross-entropy rounds 1 - p_y")
    z = torch.tensor([[margin, 0.0, -1.0]], device=device)
    for y, function in (
        (0, lambda z, y: ops.weighted_cross_entropy(z, y)),
        (1, lambda z, y: ops.mart_bce(z, y, exact=True)),
    ):
        y = torch.tensor([y], device=device)
        ours, exact = z.clone().requires_grad_(), z.double().requires_grad_()
        value, true = function(ours, y), function(exact, y)
        torch.testing.assert_close(value.double(), true, rtol=1e-5, atol=0)
        value.sum().backward(), true.sum().backward()
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", ["ce", "mart_bce"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 1])
def test_overflow_is_visible_in_value_and_gradient(name, value, column, device):
    z = normal((2, 5), torch.float32, 0, device)
    z[1, column] = value
    z.requires_grad_()
    rows = TRAINING[name](ops, z, z, torch.zeros(2, dtype=torch.int64, device=device))
    rows.sum().backward()
    assert rows.isnan().tolist() == [False, True]
    assert z.grad[0].isfinite().all() and z.grad[1].isnan().any()


def test_masked_classes(device):
    z = torch.tensor([[1.0, -math.inf, 0.5], [0.0, -math.inf, -math.inf]], device=device)
    z.requires_grad_()
    rows = ops.weighted_cross_entropy(z, torch.tensor([0, 0], device=device))
    rows.sum().backward()
    exact = torch.nn.functional.cross_entropy(
        z, torch.tensor([0, 0], device=device), reduction="none"
    )
    torch.testing.assert_close(rows, exact)
    assert z.grad[0, 1] == 0 and z.grad[1].count_nonzero() == 0


def test_ignored_rows_are_zero_whatever_they_hold(device):
    z = normal((3, 5), torch.float32, 0, device)
    z[1] = math.nan
    z.requires_grad_()
    y = torch.tensor([0, -100, 2], device=device)
    rows = ops.weighted_cross_entropy(z, y, ignore_index=-100)
    rows.sum().backward()
    assert rows[1] == 0 and z.grad[1].count_nonzero() == 0 and z.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (2, 0, 3), (0, 3), (5,), (2, 3000)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_square_sum_of_any_shape(shape, layout, device):
    g = LAYOUTS[layout](normal(shape, torch.float32, 0, device)).requires_grad_()
    rows = ops.row_square_sum(g)
    exact = (
        g.detach().double().reshape(shape[0], -1).square().sum(1) if g.numel() else rows.double()
    )
    torch.testing.assert_close(rows.double(), exact, rtol=1e-6, atol=1e-6)
    rows.sum().backward()
    assert torch.equal(g.grad, 2 * g.detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 40.0])
def test_softmax_cotangent(shape, dtype, temperature, device):
    z = normal(shape, dtype, 0, device, scale=3)
    for center in (False, True):
        p = ops.softmax_cotangent(z, temperature, center)
        exact = reference.softmax_cotangent(z.double(), temperature, center)
        plain = reference.softmax_cotangent(z, temperature, center)
        assert p.dtype == dtype and p.is_contiguous()
        as_precise_as_torch(p, plain, exact)
        if dtype == torch.float64:
            torch.testing.assert_close(
                p.sum(1), torch.full_like(p[:, 0], 0.0 if center else 1.0), rtol=0, atol=1e-12
            )


def test_softmax_cotangent_gives_the_published_penalty(device):
    """EMR of a linear model: R = sum_b |W^T p_b|^2 / B^2."""
    weight = torch.tensor([[1, -2, 0.5], [0, 1, 1], [0.3, -0.4, 2]], dtype=torch.float64)
    x = torch.tensor([[0.2, 0.1, -0.3], [0.7, 0.4, 0.5]], dtype=torch.float64)
    weight, x = weight.to(device), x.to(device)
    for temperature, expected in ((0.1, 1.25089437), (1, 0.88268587), (40, 0.88199705)):
        p = ops.softmax_cotangent(x @ weight.T, temperature)
        assert ops.row_square_sum(p @ weight).sum().item() / 4 == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_stats(shape, dtype, device):
    z = normal(shape, dtype, 0, device, scale=3)
    y = labels(*shape, 2, device)
    ours, exact = ops.row_stats(z, y), reference.row_stats(z.double(), y)
    for name in ("runner_up", "top4_index"):
        assert torch.equal(getattr(ours, name), getattr(exact, name))
    for name in ("margin", "prob_margin", "top4"):
        close(getattr(ours, name), getattr(exact, name))
        assert not getattr(ours, name).requires_grad


def test_row_stats_keeps_the_margin_of_probabilities(device):
    z = torch.tensor([[0.0, 1e-6, -80.0], [3.0, 3.0, 0.0]], device=device)
    y = torch.tensor([0, 1], device=device)
    stats = ops.row_stats(z, y)
    exact = z.double().softmax(1)[:, :2].diff(dim=1)[:, 0].neg()
    torch.testing.assert_close(stats.prob_margin[0].double(), exact[0], rtol=1e-6, atol=0)
    assert stats.prob_margin[1] == 0 and stats.runner_up.tolist() == [1, 0]
    z[0, 0] = math.nan
    stats = ops.row_stats(z, y)
    assert stats.runner_up[0] == -1 and stats.top4_index[0].tolist() == [-1] * 4
    assert stats.top4[0].isnan().all() and stats.margin[0].isnan()


@pytest.mark.slow
@pytest.mark.parametrize("classes", [5003, 50000])
def test_many_classes(classes, device):
    z, u = (normal((3, classes), torch.float32, s, device, scale=3) for s in (0, 1))
    y = labels(3, classes, 2, device)
    for loss in ATTACK_LOSSES:
        more = attack_arguments(loss, z)
        ours = ops.attack_loss(z, y, loss, **more)
        exact = reference.attack_loss(wide(z), y, loss, **wide_all(more))
        torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            ours.grad_logits.double(), exact.grad_logits, rtol=1e-4, atol=1e-6
        )
    for name in TRAINING:
        for actual, by_torch, true in zip(
            values_and_gradients(ops, name, z, u, y),
            values_and_gradients(reference, name, z, u, y),
            values_and_gradients(reference, name, z.double(), u.double(), y),
            strict=True,
        ):
            as_precise_as_torch(actual, by_torch, true)


def opcheck_cases():
    z, u = (normal((3, 5), torch.float32, s) for s in (0, 1))
    y, grad = labels(3, 5, 2), torch.rand(3)
    weight, soft = torch.rand(3), u.softmax(1)
    return {
        "attack_loss": [
            (z, y, "ce", None, None, "unit"),
            (z, y, "kl", u, None, "exact"),
            (z, y, "dlr_targeted", None, y, "unit"),
        ],
        "weighted_cross_entropy": [(z, y, None, None), (z, y, weight, 1), (z, soft, None, None)],
        "weighted_cross_entropy_backward": [
            (grad, z, y, weight, 1),
            (grad, z, soft, None, None),
        ],
        "trades_kl": [(z, u), (z.t().contiguous().t(), u)],
        "trades_kl_backward": [(grad, z, u)],
        "weighted_cross_entropy_and_gradient": [(z, y, weight, 1), (z, soft, None, None)],
        "trades_kl_and_gradient": [(z, u)],
        "mart_bce_and_gradient": [(z, y, True)],
        "mart_kl_and_gradient": [(z, u, y, True, False)],
        "mart_bce": [(z, y, False), (z, y, True)],
        "mart_bce_backward": [(grad, z, y, True)],
        "mart_kl": [(z, u, y, False, False)],
        "mart_kl_backward": [(grad, z, u, y, True, False)],
        "row_square_sum": [(z,), (z.t(),)],
        "row_square_sum_backward": [(grad, z), (torch.rand(5), z.t())],
        "softmax_cotangent": [(z, 2.0, True)],
        "row_stats": [(z, y)],
    }


@pytest.mark.parametrize("name", opcheck_cases())
def test_opcheck(name, device):
    for args in opcheck_cases()[name]:
        args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(getattr(torch.ops.pyadv, name).default, args)


@pytest.mark.slow
def test_compile_takes_losses_and_gradients_whole(device):
    z, u = (normal((4, 5), torch.float32, s, device).requires_grad_() for s in (0, 1))
    y = labels(4, 5, 2, device)

    def training(z, u):
        rows = ops.weighted_cross_entropy(z, y) + 6 * ops.trades_kl(z, u)
        rows = rows + ops.mart_bce(z, y) + ops.mart_kl(z, u, y) + ops.row_square_sum(u)
        return (rows * ops.row_stats(z, y).prob_margin).mean() + ops.attack_loss(z, y, "ce").loss[0]

    eager = training(z, u)
    expected = torch.autograd.grad(eager, (z, u))
    compiled = torch.compile(training, fullgraph=True, backend="aot_eager")(z, u)
    torch.testing.assert_close(compiled, eager)
    for actual, wanted in zip(torch.autograd.grad(compiled, (z, u)), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_errors():
    z, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    two = torch.randn(3, 2)
    cases = [
        (
            ValueError,
            "loss must be one of ce, .* got 'hinge'",
            lambda: ops.attack_loss(z, y, "hinge"),
        ),
        (
            ValueError,
            "scale must be one of unit, exact, got 'mean'",
            lambda: ops.attack_loss(z, y, "ce", scale="mean"),
        ),
        (
            ValueError,
            "loss 'dlr' needs at least 3 classes, got C = 2",
            lambda: ops.attack_loss(two, y.clamp(max=1), "dlr"),
        ),
        (
            ValueError,
            "loss 'dlr_targeted' needs at least 4 classes, got C = 2",
            lambda: ops.attack_loss(two, y, "dlr_targeted", target=y),
        ),
        (ValueError, "loss 'kl' needs reference_logits", lambda: ops.attack_loss(z, y, "kl")),
        (ValueError, "loss 'ce' takes no target", lambda: ops.attack_loss(z, y, "ce", target=y)),
        (ValueError, "'ce_targeted' needs target", lambda: ops.attack_loss(z, y, "ce_targeted")),
        (TypeError, "y must be a torch.int64 tensor", lambda: ops.attack_loss(z, y.int(), "ce")),
        (ValueError, r"y must have shape \[3\]", lambda: ops.attack_loss(z, y[:2], "ce")),
        (TypeError, "logits must be float16", lambda: ops.attack_loss(z.int(), y, "ce")),
        (ValueError, r"logits must have shape \[B, C\]", lambda: ops.attack_loss(z[0], y, "ce")),
        (TypeError, "logits must have the dtype", lambda: ops.trades_kl(z, z.double())),
        (ValueError, "logits must have the shape", lambda: ops.trades_kl(z, two)),
        (ValueError, "at least 2 classes, got C = 1", lambda: ops.mart_bce(z[:, :1], y)),
        (
            ValueError,
            "ignore_index is for hard labels",
            lambda: ops.weighted_cross_entropy(z, z.softmax(1), ignore_index=0),
        ),
        (
            ValueError,
            "soft labels y must have the shape",
            lambda: ops.weighted_cross_entropy(z, two),
        ),
        (
            ValueError,
            "must not require grad",
            lambda: ops.weighted_cross_entropy(z, z.clone().requires_grad_()),
        ),
        (
            ValueError,
            r"weight must have shape \[3\]",
            lambda: ops.weighted_cross_entropy(z, y, torch.ones(2)),
        ),
        (
            ValueError,
            "temperature must be a finite number > 0",
            lambda: ops.softmax_cotangent(z, 0.0),
        ),
        (
            TypeError,
            "temperature must be a float, got Tensor",
            lambda: ops.softmax_cotangent(z, torch.tensor(2.0)),
        ),
        (
            TypeError,
            "temperature must be a float, got bool",
            lambda: ops.softmax_cotangent(z, True),
        ),
        (
            ValueError,
            "g must have a batch dimension",
            lambda: ops.row_square_sum(torch.tensor(1.0)),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()

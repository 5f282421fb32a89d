"""Steps agree with the reference, move by alpha, and handle gradients of any size."""

from __future__ import annotations

import math

import pytest
import torch
from inputs import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    alternating,
    assert_same_bits,
    assert_within_twice,
    layout_pairs,
    normal,
    uniform,
    with_specials,
)
from torch import Tensor

from pyadv import ops, reference

LINF, ROWS = ("linf_step", "linf_momentum_step"), ("l2_step", "l2_momentum_step", "l1_step")
STEPS = LINF + ROWS
# (alpha, eps) for which ball and box bind in some entries and rows but not in all.
SIZES = {
    "linf_step": (0.02, 0.05),
    "linf_momentum_step": (0.02, 0.05),
    "l2_step": (0.3, 0.4),
    "l2_momentum_step": (0.3, 0.4),
    "l1_step": (0.5, 1.5),
}


class Inputs:
    """A gradient, and x_adv, x_prev and x near each other; parts of x lie on the border of the
    box."""

    def __init__(self, shape, dtype=torch.float32, device="cpu"):
        self.x = uniform(shape, dtype, 1, device, -0.1, 1.1).clamp(0, 1)
        self.x_adv = (self.x + normal(shape, dtype, 2, device, 0.03)).clamp(0, 1).to(dtype)
        self.x_prev = (self.x + normal(shape, dtype, 3, device, 0.03)).clamp(0, 1).to(dtype)
        self.grad = normal(shape, dtype, 4, device)

    def tensors(self, name: str) -> tuple[Tensor, ...]:
        previous = (self.x_prev,) if "momentum" in name else ()
        return (self.x_adv, *previous, self.grad, self.x)

    def args(self, name: str, alpha=None, eps=None, momentum=0.75) -> tuple:
        alpha = SIZES[name][0] if alpha is None else alpha
        eps = SIZES[name][1] if eps is None else eps
        return (*self.tensors(name), alpha, eps, *([momentum] if "momentum" in name else []))

    def map(self, change) -> Inputs:
        changed = object.__new__(Inputs)
        changed.__dict__ = {name: change(t) for name, t in self.__dict__.items()}
        return changed


def run(name: str, *args, **kw) -> Tensor:
    return getattr(ops, name)(*args, **kw)


def expected(name: str, *args, **kw) -> Tensor:
    return getattr(reference, name)(*args, **kw)


def in_float64(name: str, *args, **kw) -> Tensor:
    def wide(a):
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() else a

    return expected(name, *map(wide, args), **{key: wide(a) for key, a in kw.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LINF)
def test_linf_equals_reference(name, shape, dtype, device):
    inputs = Inputs(shape, dtype, device)
    inputs.grad = with_specials(inputs.grad)
    rows = torch.linspace(0, 0.1, shape[0], device=device)
    for alpha, eps in ((0.02, 0.05), (rows, 0.05), (0.02, rows), (rows, rows), (0.0, 0.0)):
        for active in (None, alternating(shape[0], device)):
            args = inputs.args(name, alpha, eps, 1 - rows)
            assert_same_bits(run(name, *args, active=active), expected(name, *args, active=active))


def test_linf_keeps_nan_of_every_input(device):
    values = [0.3, math.nan, math.inf, -math.inf]
    grid = torch.cartesian_prod(*[torch.tensor(values, device=device)] * 3)
    a, g, x = (column.view(1, -1) for column in grid.unbind(1))
    for lo, hi in ((0.0, 1.0), (None, None)):
        actual = ops.linf_step(a, g, x, 0.01, 0.03, lo, hi)
        assert_same_bits(actual, reference.linf_step(a, g, x, 0.01, 0.03, lo, hi))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ROWS)
def test_rows_agree_with_reference(name, shape, dtype, device):
    inputs = Inputs(shape, dtype, device)
    rows = torch.linspace(0, 1, shape[0], device=device)
    for alpha, eps in ((0.3, 0.4), (rows, 1e4), (0.3, rows), (0.0, 0.0)):
        for box in ((0.0, 1.0), (None, None), (None, 0.9)):
            args = (*inputs.args(name, alpha, eps), *box, alternating(shape[0], device))
            actual = run(name, *args)
            assert actual.dtype == dtype
            assert_within_twice(actual, expected(name, *args), in_float64(name, *args))
            assert_same_bits(actual[1::2], inputs.x_adv[1::2])


@pytest.mark.parametrize("layouts", layout_pairs(), ids="-".join)
@pytest.mark.parametrize("name", STEPS)
def test_layouts(name, layouts, device):
    inputs = Inputs((3, 3, 4, 5), torch.float32, device)
    mask = alternating(3, device)
    wanted = run(name, *inputs.args(name), active=mask)
    first, rest = LAYOUTS[layouts[0]], LAYOUTS[layouts[1]]
    laid = inputs.map(rest)
    laid.x_adv = first(inputs.x_adv)
    actual = run(name, *laid.args(name), active=mask)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-7)
    assert actual.stride() == torch.empty_like(laid.x_adv).stride()
    out = rest(torch.empty_like(wanted))
    assert run(name, *laid.args(name), active=mask, out=out) is out
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-7)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", STEPS)
def test_parameters_per_channel_and_element(name, layout, device):
    inputs = Inputs((3, 3, 4, 5), torch.float32, device).map(LAYOUTS[layout])
    lo = torch.tensor([-1.0, 0.2, 0.3], device=device).view(1, 3, 1, 1)
    hi = torch.tensor([0.6, 0.7, 2.0], device=device).view(3, 1, 1)
    sizes = [torch.full((3,), s, device=device) for s in SIZES[name]]
    for box in ((lo, hi), (lo, None), (lo.expand(3, 3, 4, 5), 0.9)):
        args = (*inputs.args(name, *sizes), *box)
        torch.testing.assert_close(
            run(name, *args).double(), in_float64(name, *args), rtol=0, atol=2e-7
        )
    if name in LINF:
        alpha = 0.1 * uniform((1, 3, 1, 1), seed=5, device=device)
        args = (*inputs.args(name, alpha, sizes[1]), lo, hi)
        assert_same_bits(run(name, *args), expected(name, *args))


@pytest.mark.parametrize("name", STEPS)
def test_scalar_tensors_and_columns(name, device):
    inputs = Inputs((2, 3, 4), torch.float32, device)
    alpha, eps = SIZES[name]
    wanted = run(name, *inputs.args(name))
    for shape in ((), (1,), (1, 1, 1), (2, 1, 1)):
        sizes = [torch.full(shape, s, device=device) for s in (alpha, eps)]
        assert_same_bits(run(name, *inputs.args(name, *sizes)), wanted)


@pytest.mark.parametrize("name", STEPS)
def test_in_place_counts_as_a_write(name, device):
    inputs = Inputs((4, 3, 5), torch.float32, device)
    mask = alternating(4, device)
    wanted, version = run(name, *inputs.args(name), active=mask), inputs.x_adv._version
    assert run(name, *inputs.args(name), active=mask, out=inputs.x_adv) is inputs.x_adv
    assert_same_bits(inputs.x_adv, wanted)
    assert inputs.x_adv._version > version


@pytest.mark.parametrize("name", ["linf_momentum_step", "l2_momentum_step"])
def test_momentum_may_write_over_the_previous_iterate(name, device):
    inputs = Inputs((3, 20), torch.float32, device)
    wanted = run(name, *inputs.args(name))
    run(name, *inputs.args(name), out=inputs.x_prev)
    assert_same_bits(inputs.x_prev, wanted)


@pytest.mark.parametrize("name", ["linf", "l2"])
def test_momentum_one_is_the_plain_step(name, device):
    inputs = Inputs((3, 40), torch.float64, device)
    step, momentum = f"{name}_step", f"{name}_momentum_step"
    alpha = torch.full((3,), SIZES[step][0], device=device)
    torch.testing.assert_close(
        run(momentum, *inputs.args(momentum, alpha, momentum=1.0)),
        run(step, *inputs.args(step, alpha)),
        rtol=0,
        atol=1e-15,
    )


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-12, 1e-6, 1.0, 1e12, 1e30, 3e37])
@pytest.mark.parametrize("name, order", [("l2_step", 2), ("l1_step", 1)])
def test_moves_by_alpha_for_gradients_of_any_size(name, order, size, device):
    """The step does not depend on the scale of the loss, as it would with an epsilon added to the
    norm."""
    x = torch.full((3, 200), 0.5, device=device)
    grad = normal((3, 200), seed=6, device=device) * size
    assert grad.isfinite().all()
    alpha = torch.tensor([1e-3, 0.01, 0.1], device=device)
    moved = run(name, x, grad, x, alpha, 10.0).double() - x.double()
    length = torch.linalg.vector_norm(moved, ord=order, dim=1)
    # For short steps the rounding of x + step to the precision of x dominates.
    rounding = 200 * torch.finfo(torch.float32).eps / 4
    torch.testing.assert_close(length, alpha.double(), rtol=1e-5, atol=rounding)


def test_l2_moves_by_alpha_to_1e_5(device):
    x = torch.zeros((4, 3, 8, 8), device=device)
    for size in (1e-30, 1.0, 1e30):
        grad = normal(x.shape, seed=7, device=device) * size
        moved = ops.l2_step(x, grad, x, 0.1, 10.0, None, None).double().flatten(1)
        length = torch.linalg.vector_norm(moved, dim=1)
        torch.testing.assert_close(length, torch.full_like(length, 0.1), rtol=1e-5, atol=0)
        direction = (grad.double() / size).flatten(1)
        cosine = torch.nn.functional.cosine_similarity(moved, direction)
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWS)
def test_zero_and_broken_gradients(name, dtype, device):
    """A zero gradient gives no step; a row with NaN or infinity is returned unchanged."""
    inputs = Inputs((4, 30), dtype, device)
    inputs.x_prev = inputs.x_adv.clone()
    inputs.x_adv[1:] += 0.5  # outside ball and box, but not projected
    inputs.grad[0] = 0.0
    inputs.grad[1, 3], inputs.grad[2, 5], inputs.grad[3, 7] = math.nan, math.inf, -math.inf
    actual = run(name, *inputs.args(name, 0.3, 100.0))
    tolerance = {"rtol": 0, "atol": 1e-7} if "momentum" in name else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(actual[:1], inputs.x_adv[:1], **tolerance)
    assert_same_bits(actual[1:], inputs.x_adv[1:])


def test_l2_step_that_comes_back_to_the_centre(device):
    """The step cancels x_adv - x. The law of cosines would give a norm of rounding errors only."""
    x = torch.full((2, 64), 0.5, device=device)
    d = normal((2, 64), seed=8, device=device, scale=0.05)
    length = torch.linalg.vector_norm(d, dim=1)
    eps = 1e-3
    actual = ops.l2_step(x + d, -d, x, length * 1.01, eps)
    wanted = in_float64("l2_step", x + d, -d, x, length * 1.01, eps)
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=2e-7)
    assert (torch.linalg.vector_norm(actual.double() - 0.5, dim=1) <= eps * (1 + 1e-4)).all()


def test_l1_keeps_the_largest_and_ties(device):
    x = torch.full((1, 10), 0.5, device=device)
    grad = torch.tensor([[0.1, -3.0, 2.0, 2.0, -2.0, 0.0, 1.0, 0.5, 0.2, 0.3]], device=device)
    moved = ops.l1_step(x, grad, x, 0.4, 10.0, keep=0.2) - x
    # `keep` asks for two entries, but three entries share the second largest value.
    wanted = torch.tensor([[0, -0.1, 0.1, 0.1, -0.1, 0, 0, 0, 0, 0]], device=device)
    torch.testing.assert_close(moved, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.2, 1 / 3, 0.9, 1.0])
@pytest.mark.parametrize("scale", [1.0, 1e-40])
def test_l1_count(keep, scale, device):
    x = torch.full((2, 97), 0.5, device=device)
    grad = normal((2, 97), seed=9, device=device) * scale
    grad[1, ::2] = 0.0  # zeros never move
    keeps = torch.tensor([keep, 1.0], device=device)
    count = (ops.l1_step(x, grad, x, 0.3, 10.0, keep=keeps) != x).sum(1).tolist()
    rank = min(math.floor((1 - torch.tensor(keep)).item() * 97), 96)
    assert count == [97 - rank, int((grad[1] != 0).sum())]


@pytest.mark.parametrize("name", STEPS)
def test_stays_in_ball_and_box(name, device):
    inputs = Inputs((8, 3, 6, 6), torch.float32, device)
    order = {"linf": math.inf, "l2": 2, "l1": 1}[name.partition("_")[0]]
    for alpha in (0.01, 1.0, 100.0):
        z = run(name, *inputs.args(name, alpha))
        length = torch.linalg.vector_norm((z - inputs.x).double().flatten(1), ord=order, dim=1)
        assert (length <= SIZES[name][1] * (1 + 1e-5)).all()
        assert ((z >= 0) & (z <= 1)).all()


@pytest.mark.parametrize("name", STEPS)
def test_rows_are_independent(name, device):
    inputs = Inputs((5, 3, 7), torch.float32, device)
    together = run(name, *inputs.args(name))
    for i in range(5):
        alone = inputs.map(lambda t, i=i: t[i : i + 1])
        assert_same_bits(run(name, *alone.args(name)), together[i : i + 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_long_rows(name, device):
    inputs = Inputs((2, 3, 224, 224), torch.float32, device)
    args = inputs.args(name, 10.0, 12.0)
    assert_within_twice(run(name, *args), expected(name, *args), in_float64(name, *args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (3, 15), (3,), (0, 4), (2, 0)])
def test_keep_rows(shape, dtype, device):
    x, grad = normal(shape, dtype, 1, device), normal(shape, dtype, 2, device)
    best, grad_best = normal(shape, dtype, 3, device), normal(shape, dtype, 4, device)
    mask = alternating(shape[0], device)
    before = best.clone(), grad_best.clone()
    versions = best._version, grad_best._version
    assert ops.keep_rows_(mask, x, grad, best, grad_best) is None
    for new, old, now in ((x, before[0], best), (grad, before[1], grad_best)):
        assert_same_bits(now[::2], new[::2])
        assert_same_bits(now[1::2], old[1::2])
    assert best._version > versions[0] and grad_best._version > versions[1]


@pytest.mark.parametrize("layouts", layout_pairs(), ids="-".join)
def test_keep_rows_layouts(layouts, device):
    shape = (3, 3, 4, 5)
    first, second = LAYOUTS[layouts[0]], LAYOUTS[layouts[1]]
    x, grad = (
        first(normal(shape, seed=1, device=device)),
        second(normal(shape, seed=2, device=device)),
    )
    best, grad_best = (
        second(torch.zeros(shape, device=device)),
        first(torch.ones(shape, device=device)),
    )
    ops.keep_rows_(alternating(3, device), x, grad, best, grad_best)
    assert torch.equal(best[::2], x[::2]) and torch.equal(grad_best[::2], grad[::2])
    assert (best[1] == 0).all() and (grad_best[1] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 2, 3, 4), (3,), (0, 4), (2, 0)])
@pytest.mark.parametrize("pairs", [1, 2])
def test_keep_best(shape, dtype, pairs, device):
    new = [normal(shape, dtype, i, device) for i in range(pairs)]
    best = [normal(shape, dtype, 2 + i, device) for i in range(pairs)]
    loss = torch.tensor([1.0, 0.0, math.nan, 2.0, -math.inf], device=device)[: shape[0]]
    loss_best = torch.tensor([0.0, 0.0, 0.0, -math.inf, 1.0], device=device)[: shape[0]]
    kept, loss_kept, before = [b.clone() for b in best], loss_best.clone(), loss_best._version
    none = [None] * (2 - pairs)
    assert ops.keep_best_(loss, *new, *none, loss_best, *best, *none) is None
    for row, better in enumerate([True, False, False, True, False][: shape[0]]):
        assert loss_best[row] == (loss if better else loss_kept)[row]
        for n, k, b in zip(new, kept, best, strict=True):
            assert_same_bits(b[row], (n if better else k)[row])
    assert loss_best._version > before and all(
        b._version > k._version for b, k in zip(best, kept, strict=True)
    )


@pytest.mark.parametrize("layouts", layout_pairs(), ids="-".join)
def test_keep_best_layouts(layouts, device):
    first, second = (LAYOUTS[name] for name in layouts)
    x, grad = first(normal((3, 3, 4, 5), device=device)), second(normal((3, 3, 4, 5), seed=1))
    best, grad_best = (f(torch.zeros(3, 3, 4, 5, device=device)) for f in (second, first))
    loss = torch.tensor([1.0, 9.0, -1.0, 9.0, 1.0], device=device)[::2]
    ops.keep_best_(loss, x, grad.to(device), torch.zeros_like(loss), best, grad_best)
    for new, kept in ((x, best), (grad.to(device), grad_best)):
        assert torch.equal(kept[::2], new[::2]) and not kept[1].any()


BOUNDARY = ("linf_boundary_step", "l2_boundary_step")


def boundary_inputs(shape, dtype, device):
    """Return x_adv, grad, x and values for hyperplanes through x_adv, near and far on both sides,
    and beyond the box."""
    inputs = Inputs(shape, dtype, device)
    size = inputs.grad.float().abs().flatten(1).sum(1) if len(shape) > 1 else inputs.grad.abs()
    shares = torch.tensor([0.05, -0.3, 0.01, 0.0, 5.0, -0.1], device=device)
    return (
        inputs.x_adv,
        inputs.grad,
        inputs.x,
        size.float() * shares[: shape[0]].resize_(size.shape),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] <= 6])
@pytest.mark.parametrize("name", BOUNDARY)
def test_boundary_agrees_with_reference(name, shape, dtype, device):
    inputs = boundary_inputs(shape, dtype, device)
    rows = torch.linspace(0, 1, shape[0], device=device)
    for share, overshoot in ((0.1, 1.05), (1.0, 1.0), (rows, 1 + rows)):
        for box in ((0.0, 1.0), (None, None), (None, 0.9)):
            for active in (None, alternating(shape[0], device)):
                args = (*inputs, share, overshoot, *box, active)
                actual = run(name, *args)
                # in float64 the two orders of one sum differ by a few ulps
                exact = in_float64(name, *args)
                assert_within_twice(actual, expected(name, *args), exact, ulps=4)
            assert_same_bits(actual[1::2], inputs[0][1::2])


@pytest.mark.parametrize("layouts", layout_pairs(), ids="-".join)
@pytest.mark.parametrize("name", BOUNDARY)
def test_boundary_layouts(name, layouts, device):
    x_adv, grad, x, value = boundary_inputs((3, 3, 4, 5), torch.float32, device)
    hi = torch.tensor([0.6, 0.7, 2.0], device=device).view(1, 3, 1, 1)
    wanted = expected(name, x_adv, grad, x, value, 0.5, 1.05, None, hi)
    first, second = (LAYOUTS[layout] for layout in layouts)
    x_adv = first(x_adv)
    args = (x_adv, second(grad), first(x), value, 0.5, 1.05, None, hi)
    torch.testing.assert_close(run(name, *args), wanted, rtol=0, atol=5e-7)
    assert run(name, *args, out=x_adv) is x_adv
    torch.testing.assert_close(x_adv, wanted, rtol=0, atol=5e-7)


def test_boundary_in_closed_form(device):
    x_adv, grad, x, value = boundary_inputs((6, 30), torch.float64, device)
    value = value.double()
    offset = ops.linf_boundary_step(x_adv, grad, x, value, 0.0, 1.0, None, None) - x_adv
    way = value / grad.abs().sum(1)
    torch.testing.assert_close(offset, -way[:, None] * grad.sign())
    offset = ops.l2_boundary_step(x_adv, grad, x, value, 0.0, 1.0, None, None) - x_adv
    torch.testing.assert_close(offset, -(value / grad.square().sum(1))[:, None] * grad)
    for step in (ops.linf_boundary_step, ops.l2_boundary_step):  # to the corner of the box
        corner = step(x_adv, grad, x, 1e30, 0.0, 1.0)
        assert torch.equal(corner, (grad < 0).double())


@pytest.mark.parametrize("scale", [1e-42, 1e-20, 1.0, 1e30])
@pytest.mark.parametrize("name", BOUNDARY)
def test_boundary_with_gradients_of_any_size(name, scale, device):
    x_adv, grad, x, value = boundary_inputs((4, 40), torch.float32, device)
    grad = (grad * scale).double().float()  # 1e-42 is denormal
    value = 0.1 * torch.tensor([1.0, -1.0, 0.5, 0.0], device=device) * grad.abs().sum(1)
    grad[2, 3], grad[3] = math.inf, 0.0
    args = (x_adv, grad, x, value, 0.1, 1.05)
    actual = run(name, *args)
    torch.testing.assert_close(actual[:2].double(), in_float64(name, *args)[:2], rtol=0, atol=5e-7)
    assert_same_bits(actual[2], x_adv[2])


def square_inputs(shape, dtype, device):
    inputs = Inputs(shape, dtype, device)
    u = torch.rand(shape[0], 2 + shape[1], generator=torch.Generator().manual_seed(5))
    u[-1:, :2] = 1 - 2.0**-24  # the last position
    return (inputs.x_adv, inputs.x_prev, inputs.x, u.to(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [1, 4])
def test_square_step_equals_reference(dtype, side, device):
    *tensors, u = square_inputs((6, 3, 7, 5), dtype, device)
    per_sample = torch.linspace(0.01, 0.2, 6, device=device)
    per_channel = torch.tensor([0.1, 0.2, 0.0], device=device).view(1, 3, 1, 1)
    per_element = uniform((6, 3, 7, 5), torch.float32, 9, device, 0.5, 1.0)
    for parameters in (
        (0.05,),
        (per_sample, None, 0.9),
        (per_channel, per_channel / 2, None),
        (per_channel, 0.0, per_element),
    ):
        for active in (None, alternating(6, device)):
            args = (*tensors, u, side, *parameters)
            result = ops.square_step(*args, active=active)
            assert_same_bits(result, reference.square_step(*args, active=active))


@pytest.mark.parametrize("layouts", layout_pairs(), ids="-".join)
def test_square_step_layouts(layouts, device):
    first, second = (LAYOUTS[name] for name in layouts)
    x_adv, x_best, x, u = square_inputs((4, 3, 6, 5), torch.float32, device)
    wanted = reference.square_step(x_adv, x_best, x, u, 3, 0.05)
    x_adv = first(x_adv)
    args = (x_adv, second(x_best), first(x), u, 3, 0.05)
    assert torch.equal(ops.square_step(*args), wanted)
    ops.square_step(*args, out=x_adv)
    assert torch.equal(x_adv, wanted)


def test_square_step_moves_one_square(device):
    x_best = x = torch.full((1, 2, 8, 8), 0.5, device=device)
    u = torch.tensor([[0.5, 0.99, 0.5, 0.49]], device=device)
    offset = ops.square_step(x, x_best, x, u, 3, 0.25) - x
    wanted = torch.zeros(1, 2, 8, 8, device=device)
    wanted[0, 0, 3:6, 5:], wanted[0, 1, 3:6, 5:] = 0.25, -0.25
    assert torch.equal(offset, wanted)
    # NaN and infinity give a window inside the image too
    u = torch.full((1, 4), math.nan, device=device)
    for v in (math.nan, math.inf, -7.0, 1e30):
        assert ((ops.square_step(x, x_best, x, u.fill_(v), 3, 0.25) - x) != 0).sum() == 18


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STEPS)
def test_opcheck(name, dtype, device):
    inputs = Inputs((2, 3, 4), dtype, device)
    sizes = [torch.tensor(s) for s in SIZES[name]]
    box_and_mask = (torch.tensor(0.0), None, alternating(2, device))
    momentum = torch.tensor(0.75)
    args = (*inputs.args(name, *sizes, momentum), *box_and_mask)
    args += (torch.tensor(0.2),) if name == "l1_step" else ()
    torch.library.opcheck(getattr(torch.ops.pyadv, name).default, args)
    out = torch.empty_like(inputs.x)
    torch.library.opcheck(getattr(torch.ops.pyadv, name + "_out").default, (*args, out))


def test_opcheck_keep_rows(device):
    tensors = [normal((2, 3), seed=i, device=device) for i in range(4)]
    torch.library.opcheck(torch.ops.pyadv.keep_rows_.default, (alternating(2, device), *tensors))
    losses = [normal((2,), seed=i, device=device) for i in range(2)]
    keep_best = torch.ops.pyadv.keep_best_.default
    x, grad, best, grad_best = tensors
    torch.library.opcheck(keep_best, (losses[0], x, grad, losses[1], best, grad_best))
    torch.library.opcheck(keep_best, (losses[0], x, None, losses[1], best, None))


@pytest.mark.parametrize("name", BOUNDARY)
def test_opcheck_boundary(name, device):
    numbers = (torch.tensor(0.1), torch.tensor(1.05), torch.tensor(0.0), None)
    args = (*boundary_inputs((2, 3, 4), torch.float32, device), *numbers, alternating(2, device))
    torch.library.opcheck(getattr(torch.ops.pyadv, name).default, args)
    out = torch.empty(2, 3, 4, device=device)
    torch.library.opcheck(getattr(torch.ops.pyadv, name + "_out").default, (*args, out))


def test_opcheck_square_step(device):
    sizes = (torch.tensor(0.1), torch.tensor(0.0), None, alternating(2, device))
    args = (*square_inputs((2, 3, 5, 4), torch.float32, device), 2, *sizes)
    torch.library.opcheck(torch.ops.pyadv.square_step.default, args)
    out = torch.empty(2, 3, 5, 4, device=device)
    torch.library.opcheck(torch.ops.pyadv.square_step_out.default, (*args, out))


@pytest.mark.parametrize("name", STEPS)
def test_results_do_not_require_grad(name, device):
    inputs = Inputs((2, 6), torch.float32, device).map(lambda t: t.requires_grad_())
    assert not run(name, *inputs.args(name)).requires_grad


def test_messages(device):
    inputs = Inputs((2, 3, 4), torch.float32, device)
    a, g, x = inputs.x_adv, inputs.grad, inputs.x
    with pytest.raises(ValueError, match=r"grad must have the shape of x_adv, got \[2, 3\]"):
        ops.l2_step(a, g[:, :, 0], x, 0.1, 1.0)
    with pytest.raises(TypeError, match="x must have the dtype of x_adv, got torch.float64"):
        ops.linf_step(a, g, x.double(), 0.1, 1.0)
    with pytest.raises(TypeError, match="x_adv must be float16, bfloat16, float32 or float64"):
        ops.l1_step(a.long(), g, x, 0.1, 1.0)
    with pytest.raises(ValueError, match="linf_step: eps must be a number >= 0, got -0.1"):
        ops.linf_step(a, g, x, 0.1, -0.1)
    with pytest.raises(ValueError, match="l2_step: alpha must be a number, got nan"):
        ops.l2_step(a, g, x, math.nan, 1.0)
    with pytest.raises(ValueError, match="l2_step: alpha must be a number or hold one per sample"):
        ops.l2_step(a, g, x, torch.ones(1, 3, 1, device=device), 1.0)
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\], got 20"):
        ops.l1_step(a, g, x, 0.1, 1.0, keep=20)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], got 1.5"):
        ops.linf_momentum_step(a, x, g, x, 0.1, 1.0, 1.5)
    with pytest.raises(TypeError, match="active must be a torch.bool tensor"):
        ops.linf_step(a, g, x, 0.1, 1.0, active=torch.ones(2, device=device))
    with pytest.raises(ValueError, match=r"active must have shape \[2\]"):
        ops.l2_step(a, g, x, 0.1, 1.0, active=alternating(3, device))
    with pytest.raises(ValueError, match="out shares memory with an input without being"):
        ops.l2_step(a, g, x, 0.1, 1.0, out=x.as_strided((2, 3, 4), (12, 1, 3)))
    with pytest.raises(ValueError, match="out must have its own memory for each element"):
        ops.linf_step(a, g, x, 0.1, 1.0, out=x[:1].expand(2, 3, 4))
    with pytest.raises(ValueError, match="eps must be on .*, got a tensor on meta"):
        ops.linf_step(a, g, x, 0.1, torch.tensor(1.0, device="meta"))
    with pytest.raises(ValueError, match="keep_rows_: x_best shares memory with an input"):
        ops.keep_rows_(alternating(2, device), a, g, a, x)
    with pytest.raises(ValueError, match="keep_rows_: grad_best shares memory with an input"):
        ops.keep_rows_(alternating(2, device), a, g, x, x)
    with pytest.raises(ValueError, match=r"linf_boundary_step: share must be in \[0, 1\], got 2"):
        ops.linf_boundary_step(a, g, x, 1.0, 2, 1.05)
    with pytest.raises(ValueError, match="l2_boundary_step: overshoot must be a number >= 0"):
        ops.l2_boundary_step(a, g, x, 1.0, 0.1, -1.0)
    with pytest.raises(
        ValueError, match="l2_boundary_step: value must be a number or hold one per"
    ):
        ops.l2_boundary_step(a, g, x, g[:1, :1], 0.1, 1.0)
    loss = torch.zeros(2, device=device)
    with pytest.raises(ValueError, match=r"keep_best_: loss must have shape \[2\]"):
        ops.keep_best_(loss[:1], a, None, loss[:1].clone(), x, None)
    with pytest.raises(ValueError, match="keep_best_: grad and grad_best come together"):
        ops.keep_best_(loss, a, g, loss.clone(), x, None)
    with pytest.raises(ValueError, match="keep_best_: loss_best shares memory with an input"):
        ops.keep_best_(loss, a, None, loss, x, None)
    with pytest.raises(ValueError, match="keep_best_: grad_best shares memory with an input"):
        ops.keep_best_(loss, a, g, loss.clone(), x, x)
    with pytest.raises(ValueError, match=r"square_step: x_adv must be images \[B, C, H, W\]"):
        ops.square_step(a, a, x, a, 1, 0.1)
    images = torch.rand(2, 3, 4, 5, device=device)
    u = torch.rand(2, 5, device=device)
    with pytest.raises(ValueError, match=r"square_step: u must have shape \[2, 5\], got \[2, 4\]"):
        ops.square_step(images, images, images, u[:, :4], 1, 0.1)
    with pytest.raises(TypeError, match="square_step: u must be a torch.float32 tensor"):
        ops.square_step(images, images, images, u.double(), 1, 0.1)
    with pytest.raises(
        ValueError, match=r"square_step: side must be an integer in 1 \.\. 4, got 5"
    ):
        ops.square_step(images, images, images, u, 5, 0.1)

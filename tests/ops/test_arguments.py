"""Checks of arguments that all ops share, and cases that the search in tests/fuzz found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pyadv import ops, reference


def step(**changed):
    x = (torch.arange(12.0, device="cpu") / 12).view(3, 4)
    arguments = {"x_adv": x, "grad": x - 0.5, "x": x.clone(), "alpha": 0.1, "eps": 0.2}
    return ops.linf_step(**arguments | changed)


def test_numbers_do_not_follow_the_default_device():
    """Scalars are made on the CPU, whatever the default device. Otherwise the op could not read
    them and returned uninitialised memory."""
    alpha, eps = 0.012345, 0.054321  # new values, so that they are made under the context
    with torch.device("meta"):
        there = step(alpha=alpha, eps=eps)
        ids = torch.arange(3, device="cpu")
        noise = ops.keyed_uniform(torch.zeros(3, 4, device="cpu"), ids, 987654, 1234)
    assert torch.equal(
        there, step(alpha=torch.tensor(alpha).double(), eps=torch.tensor(eps).double())
    )
    assert torch.equal(noise, ops.keyed_uniform(torch.zeros(3, 4), ids, 987654, 1234))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"grad": torch.rand(3, 4).to_sparse()}, "grad must be a dense tensor"),
        ({"x_adv": torch.rand(3, 4).to_sparse()}, "x_adv must be a dense tensor"),
        ({"active": torch.ones(3).bool().to_sparse()}, "active must be a dense tensor"),
        ({"eps": torch.rand(3).to_sparse()}, "eps must be a dense tensor"),
        (
            {"eps": torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8)},
            "eps must be real",
        ),
        ({"eps": 10**400}, "eps must fit a float"),
        ({"alpha": np.float32(math.nan)}, "alpha must be a float"),
    ],
)
def test_errors_name_the_argument(changed, message):
    with pytest.raises((TypeError, ValueError), match=f"linf_step: {message}"):
        step(**changed)


def test_outputs_that_cannot_be_written():
    with torch.inference_mode():
        made_there = torch.zeros(3, 4)
        assert step(out=torch.zeros(3, 4)).shape == (3, 4)
    with pytest.raises(ValueError, match="out was made in inference mode"):
        step(out=made_there)
    with pytest.raises(ValueError, match="out must not be a lazily negated view"):
        step(out=torch._neg_view(torch.zeros(3, 4)))


def test_square_step_does_not_write_over_x():
    x, best = torch.rand(2, 3, 5, 5), torch.rand(2, 3, 5, 5)
    u = torch.rand(2, 5)
    for out in (x, x.view_as(x)):
        with pytest.raises(ValueError, match="square_step: out shares memory with an input"):
            ops.square_step(best.clone(), best, x, u, 2, 0.1, out=out)
    expected = ops.square_step(best.clone(), best, x, u, 2, 0.1)
    assert torch.equal(ops.square_step(best.clone(), best, x, u, 2, 0.1, out=best), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", ["l2_boundary_step", "linf_boundary_step"])
def test_boundary_beyond_the_box(step, dtype):
    """The hyperplane lies outside the box, seen from both points."""
    a, g, x = (torch.tensor([v], dtype=dtype) for v in ([0.95, 0.5], [0.25, 0.0], [0.35, 0.5]))
    for value in (-0.5, -100.0):
        arguments = (a, g, x, value, 0.75, 0.5)
        result, expected = getattr(ops, step)(*arguments), getattr(reference, step)(*arguments)
        torch.testing.assert_close(result, expected)
        # The points are 0.05 and 0.65 away; an overshoot of 0.5 goes half of each distance.
        share = 0.05 / 0.7
        assert result[0, 0].item() == pytest.approx((1 - share) * 0.975 + share * 0.675, abs=1e-6)


@pytest.mark.parametrize("step", ["l2_boundary_step", "linf_boundary_step"])
def test_boundary_with_infinite_bounds(step):
    a, x = torch.rand(4, 6), torch.rand(4, 6)
    g = torch.randn(4, 6) * (torch.arange(6) % 2)
    g[0] = 0.0
    bounded = (a, g, x, -0.3, 0.5, 1.05)
    for of in (ops, reference):
        open_ = getattr(of, step)(*bounded, None, None)
        assert open_.isfinite().all()
        torch.testing.assert_close(getattr(of, step)(*bounded, -math.inf, math.inf), open_)


def test_l2_boundary_far_away():
    """The squares of the distances overflow."""
    a, x = torch.zeros(1, 2), torch.ones(1, 2)
    arguments = (a, torch.tensor([[1e-25, 0.0]]), x, -1.0, 1.0, 1.0, None, None)
    expected = reference.l2_boundary_step(*arguments)
    assert expected.isfinite().all() and expected[0, 0] == pytest.approx(1e25, rel=1e-5)
    torch.testing.assert_close(ops.l2_boundary_step(*arguments), expected)


def test_track_needs_rows():
    n = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="track: correct must have a batch dimension"):
        ops.track(torch.tensor(True), n, n > 0, n.clone())


@pytest.mark.parametrize("weights", [3.0, "ab", np.array(0.1), {}, torch.ones(2)])
@pytest.mark.parametrize("op", [ops.norms, ops.log_norm_product])
def test_norms_of_no_sequence(op, weights):
    with pytest.raises(TypeError, match=f"{op.__name__}: weights must be a sequence of tensors"):
        op(weights)


def test_gairat_slope_is_finite():
    """An infinite slope is refused, because it would give NaN at the centre."""
    with pytest.raises(ValueError, match="slope must be a finite number"):
        ops.gairat_weights(torch.tensor([5]), 10, slope=math.inf)
    with pytest.raises(TypeError, match="slope must be a float or None"):
        ops.gairat_weights(torch.tensor([5]), 10, slope="5")


def test_probabilistic_margin_names_itself():
    y = torch.zeros(2, dtype=torch.int64)
    for kind in ("nat", "adv", "dif", "dif_conf"):
        with pytest.raises(ValueError, match="^probabilistic_margin: logits must have shape"):
            ops.probabilistic_margin(torch.rand(2), y, torch.rand(2), kind)


def test_convolution_takes_integers_and_flags():
    x, weight = torch.rand(1, 2, 5, 5), ops.winograd_weight(torch.rand(3, 2, 3, 3))
    for bad, name in (
        ((None, 1), "outputs"),
        ((3, "1"), "padding"),
        ((3, 1, 1.0), "stride"),
    ):
        with pytest.raises(TypeError, match=f"winograd_conv2d: {name} must be an int"):
            ops.winograd_conv2d(x, weight, None, *bad)
    with pytest.raises(TypeError, match="relu must be a bool"):
        ops.winograd_conv2d(x, weight, None, 3, 1, relu=[])
    with pytest.raises(ValueError, match="shape must be four integers"):
        ops.winograd_conv2d_input(x, weight, 3.5, 1)


def test_choices_are_strings():
    with pytest.raises(ValueError, match="norms: kind must be one of"):
        ops.norms([torch.ones(2, 2)], np.array(["frobenius", "spectral"]))


def test_a_leaf_that_requires_grad_can_be_written():
    x = torch.rand(15)
    leaf = torch.rand(15, 3)[:, 0].requires_grad_()
    expected = ops.linf_project(leaf.detach(), x, 0.1)
    assert ops.linf_project(leaf, x, 0.1, out=leaf) is leaf
    assert torch.equal(leaf, expected) and leaf.requires_grad and leaf.grad is None


def test_weights_of_another_dtype_do_not_widen_the_loss():
    logits, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    loss = ops.weighted_cross_entropy(logits, y, weight)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert weight.grad.dtype == torch.float64


def test_constants_of_inference_mode():
    with torch.inference_mode():
        constant = torch.randn(3, 4)
    logits = torch.randn(3, 4, requires_grad=True)
    ops.trades_kl(constant, logits).sum().backward()
    expected = torch.autograd.grad(reference.trades_kl(constant.clone(), logits).sum(), logits)[0]
    torch.testing.assert_close(logits.grad, expected)


def test_a_bound_beyond_all_floats():
    with pytest.raises(ValueError, match="linf_project: hi must fit a float"):
        ops.linf_project(torch.rand(2), torch.rand(2), 0.1, 0.1, 10**400)

"""Instance weights agree with published values and the reference and are finite for every
lambda."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from inputs import DTYPES, LOGIT_SHAPES, generator, labels, normal

from pyadv import ops, reference

Z_ADV = [[2.0, 1.0, -0.5, 0.3], [0.1, 1.2, 0.9, -1.0]]
Z_NAT = [[1.0, 0.2, -0.3, 0.0], [0.5, 0.4, 1.5, -0.2]]
Y = [0, 2]


def rows(values, device, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=device)


# Weights for K = 10 and kappa = 0 ... 10, not normalised.
TANH = [0.99966465, 0.99752738, 0.98201379, 0.88079708, 0.5, 0.11920292, 0.01798621, 0.00247262]
TANH += [0.00033535, 0.00004540, 0.00000614]
SIGMOID = [0.98201379, 0.95257413, 0.88079708, 0.73105858, 0.5, 0.26894142, 0.11920292, 0.04742587]
SIGMOID += [0.01798621, 0.00669285, 0.00247262]
ODD = [0.99995460, 0.99921013, 0.98642308, 0.80667863, 0.19332137, 0.01357692, 0.00078987]
ODD += [0.00004540]
ODD_INT = [0.99995460, 0.99872898, 0.96555480, 0.5, 0.03444520, 0.00127101, 0.00004540, 0.00000162]


@pytest.mark.parametrize(
    "steps, options, expected",
    [
        (10, {}, TANH),
        (10, {"lam": -1.0, "int_half": True}, TANH),  # the centre is the same for even K
        (10, {"kind": "sigmoid"}, SIGMOID),
        (10, {"kind": "discrete"}, [(11 - k) / 11 for k in range(11)]),
        (7, {"lam": 0.0}, ODD),
        (7, {"lam": 0.0, "int_half": True}, ODD_INT),
        # GAIR-RST: (1 + tanh(lam + K / 2 - kappa)) / 2
        (5, {"lam": 3.0, "slope": 2.5}, [(1 + math.tanh(5.5 - k)) / 2 for k in range(6)]),
        (1, {"lam": 0.0, "int_half": True}, [(1 + math.tanh(5)) / 2, (1 + math.tanh(-5)) / 2]),
    ],
)
def test_gairat_vectors(steps, options, expected, device):
    kappa = torch.arange(steps + 1, device=device)
    weights = ops.gairat_weights(kappa, steps, normalize="none", **options)
    torch.testing.assert_close(weights, rows(expected, device), rtol=1e-6, atol=6e-9)


def test_gairat_batch_vector(device):
    weights = ops.gairat_weights(torch.tensor([0, 3, 5, 10], device=device), 10)
    expected = rows([1.99965845, 1.76188417, 0.23844509, 1.2290372e-5], device)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


LAMBDAS = (-math.inf, -1e300, -400.0, -20.0, -1.0, 0.0, 3.0, 400.0, math.inf)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("kind", ["tanh", "sigmoid", "discrete"])
def test_gairat_equals_reference_and_is_finite(kind, steps, device):
    batches = (
        torch.randint(0, steps + 1, (37,), generator=generator()).to(device),
        torch.full((5,), steps, device=device),  # all samples robust
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    shapes = itertools.cycle(itertools.product((None, 0.0, 2.5), (False, True)))
    for lam, normalize in itertools.product(LAMBDAS, ("mean", "sum", "none")):
        slope, int_half = next(shapes)
        for kappa in batches:
            args = (kappa, steps, lam, kind, normalize, slope, int_half)
            weights = ops.gairat_weights(*args)
            torch.testing.assert_close(weights, reference.gairat_weights(*args), rtol=3e-7, atol=0)
            assert weights.isfinite().all() and (weights >= 0).all()
            if normalize != "none":
                total = weights.double().sum()
                assert abs(total - (kappa.numel() if normalize == "mean" else 1)) < 1e-5 * total
            order = kappa.argsort(stable=True)
            assert (weights[order].diff() <= 0).all()  # weights do not increase with kappa


def test_gairat_degenerate_batches(device):
    kappa = torch.tensor([0, 4, 10], device=device)
    ones = torch.ones(3, device=device)
    assert torch.equal(ops.gairat_weights(kappa, 10, math.inf), ones)
    assert torch.equal(ops.gairat_weights(kappa, 10, -math.inf), ones)  # the sum is 0
    third = ops.gairat_weights(kappa, 10, -math.inf, normalize="sum")
    torch.testing.assert_close(third, ones / 3)
    assert torch.equal(ops.gairat_weights(kappa, 10, -math.inf, normalize="none"), 0 * ones)
    empty = ops.gairat_weights(kappa[:0], 10)
    assert empty.shape == (0,) and empty.dtype == torch.float32
    assert ops.gairat_weights(kappa, 10, math.nan * ones[0]).isnan().all()


def test_gairat_reads_lambda_where_it_is_and_strided_kappa(device):
    kappa = torch.arange(20, device=device) % 11
    expected = ops.gairat_weights(kappa, 10, 0.5)
    for lam in (torch.tensor(0.5), torch.tensor(0.5, device=device, dtype=torch.float64)):
        assert torch.equal(ops.gairat_weights(kappa, 10, lam), expected)
    gaps = torch.stack([kappa, kappa], dim=1)[:, 1]
    assert torch.equal(ops.gairat_weights(gaps, 10, 0.5), expected)
    order = torch.randperm(20, generator=generator()).to(device)
    shuffled = ops.gairat_weights(kappa[order], 10, 0.5)
    torch.testing.assert_close(shuffled, expected[order], rtol=3e-7, atol=0)


def test_mail_vectors(device):
    margin = ops.probabilistic_margin(rows(Z_ADV, device), rows(Y, device, torch.int64))
    torch.testing.assert_close(margin, rows([0.38717505, -0.11864622], device))
    official = ops.mail_weights(margin, 10.0, -0.5, "x3")
    torch.testing.assert_close(official, rows([4.20831e-4, 6.478019e-2], device), rtol=2e-6, atol=0)
    paper = ops.mail_weights(margin, 10.0, -0.5)
    torch.testing.assert_close(paper, rows([0.01290873, 1.98709127], device), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mail_equals_reference(dtype, device):
    for n in (0, 1, 7, 300):
        margin = normal((n,), dtype, device=device).clamp(-1, 1).requires_grad_()
        for slope, bias in ((10.0, -0.5), (0.0, 0.0), (1e6, 1.0), (torch.tensor(30.0), -0.07)):
            for normalize in ("mean", "x3", "none"):
                weights = ops.mail_weights(margin, slope, bias, normalize)
                expected = reference.mail_weights(margin, slope, bias, normalize)
                tolerance = 1e-13 if dtype == torch.float64 else 3e-7
                torch.testing.assert_close(weights, expected, rtol=tolerance, atol=0)
                assert weights.isfinite().all() and not weights.requires_grad
    saturated = torch.ones(3, dtype=dtype, device=device)
    weights = ops.mail_weights(saturated, math.inf, 0.0)
    assert torch.equal(weights, torch.ones_like(weights))


@pytest.mark.parametrize("kind", ["nat", "adv", "dif", "dif_conf"])
def test_probabilistic_margin_by_hand(kind, device):
    p, q = (torch.softmax(rows(z, "cpu", torch.float64), 1).tolist() for z in (Z_NAT, Z_ADV))
    expected = []
    for b, y in enumerate(Y):
        largest = {
            name: max(v for j, v in enumerate(r[b]) if j != y) for name, r in (("p", p), ("q", q))
        }
        expected.append(
            {
                "nat": p[b][y] - largest["p"],
                "adv": q[b][y] - largest["q"],
                "dif": p[b][y] - largest["q"],
                "dif_conf": p[b][y] - q[b][y],
            }[kind]
        )
    y = rows(Y, device, torch.int64)
    margin = ops.probabilistic_margin(rows(Z_NAT, device), y, rows(Z_ADV, device), kind)
    torch.testing.assert_close(margin, rows(expected, device), rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOGIT_SHAPES, ids=str)
def test_probabilistic_margin_equals_reference(shape, dtype, device):
    logits = normal(shape, dtype, 1, device, scale=3).requires_grad_()
    logits_adv = normal(shape, dtype, 2, device, scale=3)
    y = labels(*shape, device=device)
    tolerance = 1e-14 if dtype == torch.float64 else 3e-7
    for kind in ("nat", "adv", "dif", "dif_conf"):
        margin = ops.probabilistic_margin(logits, y, logits_adv, kind)
        expected = reference.probabilistic_margin(logits, y, logits_adv, kind)
        assert margin.dtype == expected.dtype and not margin.requires_grad
        torch.testing.assert_close(margin, expected, rtol=0, atol=tolerance)


def test_probabilistic_margin_of_bad_rows_is_nan(device):
    logits = normal((4, 5), device=device)
    broken = logits.clone()
    broken[1, 2], broken[2, 0] = math.nan, math.inf
    y = torch.tensor([0, 1, 2, 7], device=device)
    for kind in ("nat", "adv", "dif", "dif_conf"):
        for op in (ops, reference):
            margin = op.probabilistic_margin(broken, y, broken, kind)
            assert margin.isnan().tolist() == [False, True, True, True]


def test_well_formed_ops(device):
    for n in (0, 3):
        kappa = torch.arange(n, device=device)
        args = (kappa, 10, torch.tensor(-1.0), "tanh", "mean", None, False)
        torch.library.opcheck(torch.ops.pyadv.gairat_weights.default, args)
        margin = torch.linspace(-1, 1, n, device=device, requires_grad=True)
        args = (margin, torch.tensor(10.0), torch.tensor(-0.5, device=device), "x3")
        torch.library.opcheck(torch.ops.pyadv.mail_weights.default, args)


def test_refuses_bad_arguments(device):
    kappa, margin = torch.arange(3, device=device), torch.zeros(3, device=device)
    for error, message, call in (
        (TypeError, "kappa must be a torch.int64", lambda: ops.gairat_weights(margin, 10)),
        (ValueError, "kappa must have shape", lambda: ops.gairat_weights(kappa[:, None], 10)),
        (ValueError, "steps must be an integer >= 1, got 0", lambda: ops.gairat_weights(kappa, 0)),
        (ValueError, "steps must .*, got 2.5", lambda: ops.gairat_weights(kappa, 2.5)),
        (ValueError, "lam must be a number", lambda: ops.gairat_weights(kappa, 10, math.nan)),
        (
            ValueError,
            "lam must be a float or a 0-dim",
            lambda: ops.gairat_weights(kappa, 9, margin),
        ),
        (ValueError, "kind must be one of", lambda: ops.gairat_weights(kappa, 10, kind="step")),
        (ValueError, "slope must be", lambda: ops.gairat_weights(kappa, 10, slope=-1.0)),
        (ValueError, "normalize must be", lambda: ops.gairat_weights(kappa, 10, normalize="x3")),
        (TypeError, "margin must be float16", lambda: ops.mail_weights(kappa, 1.0, 0.0)),
        (ValueError, "normalize must be", lambda: ops.mail_weights(margin, 1.0, 0.0, "sum")),
        (ValueError, "bias must be a float or", lambda: ops.mail_weights(margin, 1.0, margin)),
    ):
        with pytest.raises(error, match=f"(gairat|mail)_weights: {message}"):
            call()
    logits, y = torch.zeros(3, 4, device=device), kappa
    with pytest.raises(ValueError, match="probabilistic_margin: kind='adv' needs logits_adv"):
        reference.probabilistic_margin(logits, y, kind="adv")
    with pytest.raises(ValueError, match="probabilistic_margin: kind='dif' needs logits_adv"):
        ops.probabilistic_margin(logits, y, kind="dif")
    with pytest.raises(ValueError, match="kind must be one of nat, adv, dif, dif_conf"):
        ops.probabilistic_margin(logits, y, logits, "pm")
    with pytest.raises(ValueError, match="logits_adv must have the shape of logits"):
        ops.probabilistic_margin(logits, y, logits[:2], "adv")

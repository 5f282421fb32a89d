"""Norms of lists of tensors, and NormProduct, agree with torch's norms, dense singular values and
closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from inputs import DTYPES, LAYOUTS, SHAPES, assert_within_twice, expanded, normal
from torch import nn

from pyadv import ops, reference


def tensors(dtype=torch.float32, device="cpu", scale=1.0):
    return [normal(s, dtype, i, device, scale) for i, s in enumerate(SHAPES)]


def exact(weights):
    return torch.stack([torch.linalg.vector_norm(w.double()) for w in weights])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_are_as_exact_as_torch(layout, dtype, device):
    weights = [LAYOUTS[layout](w) for w in tensors(dtype, device)]
    values = ops.norms(weights)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within_twice(values, reference.norms(weights), exact(weights))
    products = (op.log_norm_product(weights[:-2]) for op in (ops, reference))
    assert_within_twice(*products, exact(weights[:-2]).log().sum())


def test_sizes_around_pieces_and_tables(device):
    """Tensors may be longer than one piece of work, and more than one launch can take."""
    long = [normal((n,), seed=n, device=device) for n in (32767, 32768, 32769)]
    many = [normal((1 + i % 5,), seed=i, device=device) for i in range(200)]
    weights = [*many[:100], *long, *many[100:]]
    for w in weights:
        w.requires_grad_()
    values = ops.norms(weights)
    assert_within_twice(values, reference.norms(weights), exact(weights))
    assert torch.equal(ops.norms(weights), values)  # deterministic
    grads = torch.autograd.grad(ops.log_norm_product(weights), weights)
    for w, g, n in zip(weights, grads, values, strict=True):
        torch.testing.assert_close(g, w / n**2, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_a_large_tensor_is_as_exact_as_torch(device):
    weights = [normal((512, 512, 3, 3), seed=s, device=device) for s in range(2)]
    assert_within_twice(ops.norms(weights), reference.norms(weights), exact(weights))


def test_special_values(device):
    weights = [torch.tensor(v, device=device) for v in ([math.nan, 1.0], [math.inf, 1.0], [0.0])]
    values = ops.norms([*weights, torch.empty(0, 3, device=device)]).tolist()
    assert math.isnan(values[0]) and values[1:] == [math.inf, 0.0, 0.0]


def test_a_zero_tensor_has_gradient_zero(device):
    weights = [torch.zeros(2, 3, device=device), torch.ones(4, device=device)]
    for op in (ops, reference):
        given = [w.clone().requires_grad_() for w in weights]
        value = op.log_norm_product(given)
        assert value.item() == -math.inf
        zero, ones = torch.autograd.grad(value, given)
        assert torch.equal(zero, weights[0])
        torch.testing.assert_close(ones, weights[1] / 4)


@pytest.mark.parametrize("kind", ["frobenius", "spectral"])
def test_gradients(kind, device):
    weights = [
        normal(s, torch.float64, i, device) for i, s in enumerate([(3, 4), (2, 3, 2), (5, 1)])
    ]
    for w in weights:
        w.requires_grad_()
    assert torch.autograd.gradcheck(lambda *w: ops.norms(w, kind), weights)
    assert torch.autograd.gradcheck(lambda *w: ops.log_norm_product(w, kind), weights)
    for op in (ops, reference):
        grads = torch.autograd.grad(op.log_norm_product(weights, kind), weights)
        for w, g in zip(weights, grads, strict=True):
            u, s, vh = torch.linalg.svd(w.flatten(1), full_matrices=False)
            if kind == "spectral":
                expected = (u[:, :1] @ vh[:1] / s[0]).view_as(w)
            else:
                expected = w / w.square().sum()
            torch.testing.assert_close(g, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_keep_dtype_and_layout(layout, dtype, device):
    weights = [LAYOUTS[layout](w).requires_grad_() for w in tensors(dtype, device)]
    cotangent = normal((len(weights),), torch.float64, device=device)
    values = ops.norms(weights)
    grads = torch.autograd.grad(values, weights, cotangent.to(values.dtype))
    for w, g, c, n in zip(weights, grads, cotangent, exact(weights), strict=True):
        assert g.dtype == w.dtype and g.stride() == torch.empty_like(w).stride()
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            g.double(), w.double() * (c / n if n else 0), rtol=tolerance, atol=6e-8
        )


def test_only_some_weights_require_grad(device):
    weights = [normal((3,), seed=i, device=device) for i in range(3)]
    weights[1].requires_grad_()
    ops.log_norm_product(weights).backward()
    assert weights[0].grad is None
    torch.testing.assert_close(
        weights[1].grad, weights[1].detach() / exact(weights)[1].float() ** 2
    )
    assert not ops.norms(weights[:1]).requires_grad


def test_rescaling_layers_against_each_other_keeps_the_product(device):
    a, b = normal((4, 5), seed=1, device=device), normal((3, 4), seed=2, device=device)
    for kind in ("frobenius", "spectral"):
        product = ops.log_norm_product([a, b], kind)
        torch.testing.assert_close(ops.log_norm_product([8 * a, b / 8], kind), product)


def test_expanded_tensors(device):
    w = expanded(normal((3, 4), device=device), 5).requires_grad_()
    torch.testing.assert_close(ops.norms([w]), reference.norms([w]))
    assert torch.autograd.grad(ops.norms([w]).sum(), w)[0].shape == (5, 3, 4)


def test_double_backward_is_refused(device):
    w = normal((3, 4), device=device).requires_grad_()
    (g,) = torch.autograd.grad(ops.norms([w]).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="pyadv.reference.norms"):
        g.sum().backward()
    (g,) = torch.autograd.grad(reference.norms([w]).sum(), w, create_graph=True)
    g.sum().backward()


def test_well_formed_ops(device):
    for requires_grad in (False, True):
        weights = [w.requires_grad_(requires_grad) for w in tensors(device=device)[:4]]
        torch.library.opcheck(torch.ops.pyadv.norms.default, (weights,))
    weights = [w.detach() for w in weights]
    values = ops.norms(weights)
    torch.library.opcheck(
        torch.ops.pyadv.norms_backward.default, (torch.ones_like(values), weights, values)
    )


def test_refuses_bad_arguments(device):
    w = torch.ones(2, 3, device=device)
    for error, message, args in (
        (ValueError, "weights must not be empty", ([],)),
        (TypeError, "weights must be a sequence of tensors", (w,)),
        (TypeError, r"weights\[1\] must be a Tensor, got float", ([w, 1.0],)),
        (TypeError, r"weights\[0\] must be float16", ([w.int()],)),
        (TypeError, "all weights must have one dtype", ([w, w.double()],)),
        (ValueError, r"weights\[1\] must be on", ([w, w.to("meta")],)),
        (ValueError, "kind must be one of frobenius, spectral", ([w], "nuclear")),
        (ValueError, "a spectral norm needs at least two dimensions", ([w[0]], "spectral")),
    ):
        for op in (ops.norms, ops.log_norm_product):
            with pytest.raises(error, match=f"{op.__name__}: {message}"):
                op(*args)


# NormProduct

LAYERS = {
    "same": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8)),
    "strided groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 6)),
    "dilated": (lambda: nn.Conv1d(2, 3, 5, stride=3, dilation=2), (2, 17)),
    "kernel beyond input": (lambda: nn.Conv2d(2, 3, 5, padding=2), (2, 3, 3)),
    "volume": (lambda: nn.Conv3d(1, 2, (1, 3, 2), padding="valid"), (1, 3, 4, 3)),
}


def made(name, device):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make().double().to(device), shape


def matrix_of(layer, shape):
    """Return the matrix of a convolution, column by column."""
    n = math.prod(shape)
    basis = torch.eye(n, dtype=layer.weight.dtype, device=layer.weight.device).view(n, *shape)
    with torch.no_grad():
        bias = layer(torch.zeros_like(basis[:1]))
        return (layer(basis) - bias).flatten(1).T


def norm_of(layer, shape, kind, conv):
    product = ops.NormProduct(nn.Sequential(layer), shape, kind, conv).eval()
    product.iterate(300)
    (value,) = product.norms().values()
    torch.testing.assert_close(product(), value.log())
    return value.item()


@pytest.mark.parametrize("name", LAYERS)
def test_convolution_against_its_dense_matrix(name, device):
    layer, shape = made(name, device)
    matrix, kernel = matrix_of(layer, shape), layer.weight.detach().flatten(1)
    spectral, frobenius = torch.linalg.matrix_norm(matrix, 2).item(), matrix.norm().item()
    measured = norm_of(layer, shape, "spectral", "operator")
    assert spectral * (1 - 1e-4) <= measured <= spectral * (1 + 1e-9)
    assert norm_of(layer, shape, "frobenius", "operator") == pytest.approx(frobenius)
    assert norm_of(layer, shape, "frobenius", "reshape") == pytest.approx(kernel.norm().item())
    reshaped = torch.linalg.matrix_norm(kernel, 2).item()
    assert norm_of(layer, shape, "spectral", "reshape") == pytest.approx(reshaped)
    bound = norm_of(layer, shape, "spectral", "bound")
    assert spectral <= bound <= norm_of(layer, shape, "frobenius", "bound")
    if name == "same":
        assert bound == pytest.approx(3 * reshaped)
    if name == "kernel beyond input":  # a pixel reaches only 3 x 3 outputs, not 5 x 5
        assert bound == pytest.approx(3 * reshaped)


def test_circular_padding_has_an_operator_norm_but_no_bound(device):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular").double().to(device)
    spectral = torch.linalg.matrix_norm(matrix_of(layer, (3, 6, 6)), 2).item()
    assert norm_of(layer, (3, 6, 6), "spectral", "operator") == pytest.approx(spectral, rel=1e-4)
    for kind, conv in (("spectral", "bound"), ("frobenius", "operator")):
        with pytest.raises(ValueError, match="layer 0 has padding_mode='circular'"):
            ops.NormProduct(nn.Sequential(layer), (3, 6, 6), kind, conv)


def bartlett(device):
    """Return layers with spectral norms 5.526446 and 2.570353."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double().to(device)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2], [3, 4], [0, -1]]))
        model[2].weight.copy_(torch.tensor([[0.5, -1, 2], [1, 0, 1]]))
    return model


def test_linear_layers_and_the_gradient_u_v(device):
    model = bartlett(device)
    product = ops.NormProduct(model, (2,), "spectral").eval()
    product.iterate(100)
    values = product.norms()
    assert list(values) == ["0", "2"]
    assert [v.item() for v in values.values()] == pytest.approx([5.526446, 2.570353], abs=1e-6)
    weights = [model[0].weight, model[2].weight]
    grads = torch.autograd.grad(product(), weights)
    for w, g in zip(weights, grads, strict=True):
        u, s, vh = torch.linalg.svd(w)
        torch.testing.assert_close(g, u[:, :1] @ vh[:1] / s[0])
    frobenius = ops.NormProduct(model, (2,))
    torch.testing.assert_close(frobenius(), ops.log_norm_product(weights))


def test_vectors_follow_the_weights_in_training_mode_alone(device):
    model = bartlett(device)
    product = ops.NormProduct(model, (2,), "spectral")
    assert product.training and set(product.state_dict()) == {"v0", "v1"}
    (product() + product()).backward()  # the second call overwrites no vector of the first graph
    before = copy.deepcopy(product.state_dict())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0], [9, 0], [0, 1]]))
    product.eval()
    stale = product.norms()["0"]
    assert all(torch.equal(product.state_dict()[k], v) for k, v in before.items())
    product.train()
    with torch.inference_mode():
        for _ in range(20):
            fresh = product.norms()["0"]
    assert stale < fresh and fresh.item() == pytest.approx(9.0)
    with torch.no_grad():  # power iteration recovers from zero weights
        model[0].weight.zero_()
        assert product().item() == -math.inf
        model[0].weight.fill_(1.0)
        assert product.norms()["0"].item() == pytest.approx(math.sqrt(6))


class Mixed(nn.Module):
    """A model with an unused layer, a layer used twice, dropout and batch statistics."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.drop = nn.Dropout(0.5)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        torch.rand(3)  # the model draws random numbers
        x = self.frozen(self.norm(self.conv(self.conv(x))))
        return self.head(self.drop(x).mean((2, 3)))


def test_construction_leaves_the_model_and_the_generator_alone(device):
    model = Mixed().to(device)
    modes = {n: m.training for n, m in model.named_modules()}
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    product = ops.NormProduct(model, (3, 5, 5), "spectral", "operator")
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert list(product.norms()) == ["conv", "head"]
    assert not list(product.parameters())  # the model is not a sub-module
    with pytest.raises(RuntimeError):
        ops.NormProduct(model, (4, 5, 5))
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_weights(dtype, device):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).to(device, dtype)
    for kind in ("frobenius", "spectral"):
        product = ops.NormProduct(model, (6,), kind).eval()
        product.iterate(100)
        expected = reference.norms([model[0].weight, model[1].weight], kind)
        torch.testing.assert_close(torch.stack(list(product.norms().values())), expected)
        product().backward()
        assert model[0].weight.grad.dtype == dtype


def test_norm_product_refuses_bad_arguments():
    model = nn.Sequential(nn.Linear(2, 2))
    for error, message, args in (
        (TypeError, "model must be a Module, got list", ([], (2,))),
        (ValueError, "kind must be one of", (model, (2,), "nuclear")),
        (ValueError, "conv must be one of", (model, (2,), "spectral", "kernel")),
        (ValueError, "iters must be >= 0, got -1", (model, (2,), "spectral", "bound", -1)),
        (ValueError, "no linear or convolution layer", (nn.Sequential(nn.ReLU()), (2,))),
    ):
        with pytest.raises(error, match=f"NormProduct: .*{message}"):
            ops.NormProduct(*args)

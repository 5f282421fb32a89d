"""The transfer attacks against the expressions of their papers, written out, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pyadv import attacks
from pyadv.attacks.transfer import _resized_and_padded
from pyadv.engine import Noise

EPS, ALPHA, STEPS = 0.1, 0.03, 4
NUMBERS = {"eps": EPS, "alpha": ALPHA, "steps": STEPS, "seed": 3}


def gradient(net, x, y, through=lambda x: x):
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(through(leaf)), y, reduction="sum"), leaf)[0]


def mean(g):
    return g.abs().mean((1, 2, 3), keepdim=True)


def iterated(net, x, y, direction, decay=1.0):
    """MI-FGSM along `direction(x_adv, momentum, k)`, which is divided by its mean magnitude."""
    x_adv, momentum = x, torch.zeros_like(x)
    for k in range(STEPS):
        g = direction(x_adv, momentum, k)
        momentum = decay * momentum + g / mean(g)
        x_adv = x_adv + ALPHA * momentum.sign()
        x_adv = (x + (x_adv - x).clamp(-EPS, EPS)).clamp(0, 1)
    return x_adv


def noise(x, ids, kind, number):
    return Noise.of(ids, 3, 0).uniform(x, number, kind)


def kernel(shape, length):
    if shape == "gaussian":
        line = torch.exp(-torch.linspace(-3, 3, length).square() / 2)
    elif shape == "linear":
        line = 1 - torch.linspace((1 - length) / 2, (length - 1) / 2, length).abs() * 2 / (
            length + 1
        )
    else:
        line = torch.ones(length)
    square = torch.outer(line, line)
    return square / square.sum()


@pytest.fixture
def given(problem):
    net, x, y = problem
    return net, x, y, torch.arange(len(x))


def check(attack, given, direction, decay=1.0):
    net, x, y, ids = given
    found = attack.perturb(x, y, ids=ids, draw=0).x_adv
    torch.testing.assert_close(found, iterated(net, x, y, direction, decay), rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_ni_and_si(given, decay):
    net, _, y, _ = given

    def nesterov(x_adv, momentum, k):
        return gradient(net, x_adv + decay * ALPHA * momentum, y)

    def scaled(x_adv, momentum, k):
        point = x_adv + decay * ALPHA * momentum
        return sum(gradient(net, point, y, lambda x, i=i: x / 2**i) for i in range(3)) / 3

    check(attacks.NIFGSM(net, decay=decay, **NUMBERS), given, nesterov, decay)
    check(attacks.SINIFGSM(net, decay=decay, scales=3, **NUMBERS), given, scaled, decay)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("shape", ["gaussian", "linear", "uniform"])
@pytest.mark.parametrize("length", [3, 4, 15])
def test_ti(given, shape, length):
    net, x, y, _ = given
    window = kernel(shape, length).expand(x.shape[1], 1, length, length)

    def smoothed(x_adv, momentum, k):
        return F.conv2d(gradient(net, x_adv, y), window, padding="same", groups=x.shape[1])

    check(attacks.TIFGSM(net, kernel=length, kernel_shape=shape, **NUMBERS), given, smoothed)


@pytest.mark.parametrize("nesterov", [False, True])
def test_vmi_and_vni(given, nesterov):
    net, x, y, ids = given
    n, memory = 3, {"v": torch.zeros_like(x)}

    def tuned(x_adv, momentum, k):
        g = gradient(net, x_adv + nesterov * ALPHA * momentum, y)
        total = g + memory["v"]
        around = torch.zeros_like(g)
        for j in range(1, n + 1):
            u = noise(x, ids, 0, 1 + k * (n + 1) + j)
            around += gradient(net, x_adv + (2 * u - 1) * 1.5 * EPS, y)
        memory["v"] = around / n - g
        return total

    kind = attacks.VNIFGSM if nesterov else attacks.VMIFGSM
    check(kind(net, neighbours=n, **NUMBERS), given, tuned)


def test_admix(given):
    net, x, y, ids = given
    pool = torch.rand(7, *x.shape[1:])

    def mixed(x_adv, momentum, k):
        total = torch.zeros_like(x)
        for mix in range(2):
            u = noise(x.new_empty(len(x), 1), ids, 2, 1 + k * 6 + 3 * mix)[:, 0]
            other = pool[(7 * u).long()]
            for i in range(3):
                total += gradient(net, x_adv, y, lambda x, i=i, o=other: (x + 0.2 * o) / 2**i)
        return total / 6

    check(attacks.Admix(net, images=pool, mixes=2, scales=3, **NUMBERS), given, mixed)


def test_di(given):
    net, x, y, ids = given

    def diverse(x_adv, momentum, k):
        u = noise(x.new_empty(len(x), 4), ids, 1, 1 + k)

        def through(images):
            rows = []
            for image, (size, top, left, chance) in zip(images, u.tolist(), strict=True):
                if chance >= 0.6:
                    rows.append(image)
                    continue
                n, low = 6, 3
                pixels = low + int(size * (n - low))
                small = F.interpolate(image[None], (pixels, pixels), mode="bilinear")
                free = n - pixels
                above, before = int(top * (free + 1)), int(left * (free + 1))
                rows.append(F.pad(small[0], (before, free - before, above, free - above)))
            return torch.stack(rows)

        return gradient(net, x_adv, y, through)

    check(attacks.DIFGSM(net, diversity=0.6, resize=0.5, **NUMBERS), given, diverse)


@pytest.mark.parametrize("shape", [(5, 1, 1, 1), (5, 2, 9, 6), (5, 3, 4, 11)])
def test_resized_images_keep_their_shape_and_range(shape):
    images, u = torch.rand(shape), torch.tensor([0.0, 0.3, 0.5, 0.9, 1 - 2.0**-24])
    out = _resized_and_padded(images, 0.5, u, u.flip(0), u)
    assert out.shape == images.shape and out.min() >= 0 and out.max() <= images.max() + 1e-6


VARIANTS = {
    "all": dict(nesterov=True, diversity=0.7, kernel=3, scales=2, mixes=2, neighbours=2, mix=True),
    "di-ti": dict(diversity=0.7, kernel=5),
    "vt-si": dict(neighbours=2, scales=2),
}


def make(net, name, pool, **settings):
    own = dict(VARIANTS[name])
    own |= {"images": pool} if own.pop("mix", False) else {}
    return attacks.TransferFGSM(net, **{**NUMBERS, **own, **settings})


@pytest.mark.parametrize("name", VARIANTS)
def test_composed(given, name):
    net, x, y, ids = given
    pool = torch.rand(4, *x.shape[1:])
    eps = torch.tensor([0.02, 0.05, 0.1, 0.0, 0.2])
    attack = make(net, name, pool, eps=eps, alpha=0.05)
    whole = attack.run(x, y, ids=ids, draw=0)
    delta = (whole.x_adv - x).abs().flatten(1).amax(1)
    assert (delta <= eps + 1e-12).all() and (delta[eps > 0] > 0.9 * eps[eps > 0]).all()
    assert whole.x_adv.min() >= 0 and whole.x_adv.max() <= 1
    for i in range(len(x)):
        alone = make(net, name, pool, eps=float(eps[i]), alpha=0.05)
        single = alone.perturb(x[i : i + 1], y[i : i + 1], ids=ids[i : i + 1], draw=0).x_adv
        torch.testing.assert_close(single[0], whole.x_adv[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_compacted_and_masked_runs_agree(given, name):
    net, x, y, ids = given
    pool, far = torch.rand(4, *x.shape[1:]), {"eps": 0.4, "alpha": 0.06, "steps": 8}
    found = [
        make(net, name, pool, best="fooled", compact=compact, **far).run(x, y, ids=ids, draw=0)
        for compact in (True, False)
    ]
    torch.testing.assert_close(found[0].x_adv, found[1].x_adv, rtol=0, atol=1e-12)
    assert torch.equal(found[0].queries, found[1].queries)
    assert torch.equal(found[0].gradients, found[1].gradients)
    assert len(found[0].steps.unique()) > 1  # samples left at different steps


class Counted:
    def __init__(self, net):
        self.net, self.rows = net, 0

    def __call__(self, x):
        self.rows += len(x)
        return self.net(x)


@pytest.mark.parametrize("name", VARIANTS)
def test_passes_are_counted(given, name):
    net, x, y, ids = given
    counted = Counted(net)
    result = make(counted, name, torch.rand(4, *x.shape[1:])).run(x, y, ids=ids)
    assert result.queries.sum() == counted.rows
    copies = {"all": 2 * 2 * 3, "di-ti": 1, "vt-si": 2 * 3}[name]
    assert (result.gradients == STEPS * copies).all()


@pytest.mark.slow
def test_transfers_better_than_plain_steps():
    """The examples of a smooth gradient fool a network that was trained apart."""
    from pyadv.data import load
    from pyadv.models import create

    images = load("fashion-mini")
    x, y = images.train_x[:600], images.train_y[:600]
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = create("small-cnn", in_channels=1, image_size=(28, 28))
        optimiser = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(6):
            for part in torch.randperm(600).split(100):
                optimiser.zero_grad()
                F.cross_entropy(net(x[part]), y[part]).backward()
                optimiser.step()
        nets.append(net.eval())
    source, other = nets
    x, y = images.test_x[:300], images.test_y[:300]

    def still_right(attack):
        return (other(attack(x, y)).argmax(1) == y).float().mean().item()

    numbers = {"eps": 0.08, "steps": 10, "alpha": 0.008, "seed": 0}
    plain = still_right(attacks.PGD(source, start="none", **numbers))
    assert still_right(attacks.MIFGSM(source, **numbers)) <= plain
    assert still_right(attacks.VMIFGSM(source, neighbours=5, **numbers)) < plain


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"diversity": 1.5}, "diversity must be a share in"),
        ({"resize": 1.0}, "resize must be a share in"),
        ({"kernel": 2.5}, "kernel must be an integer"),
        ({"kernel_shape": "round"}, "kernel_shape must be one of"),
        ({"scales": 0}, "scales must be an integer >= 1"),
        ({"neighbours": -1}, "neighbours must be"),
        ({"eot": 2}, "eot must be 1"),
        ({"scales": 2, "scale": "unit"}, 'scale must be "exact"'),
        ({"images": torch.rand(0, 2)}, "images must be a tensor of one image or more"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        attacks.TransferFGSM(**settings)


def test_images_must_fit(given):
    net, x, y, _ = given
    with pytest.raises(ValueError, match="Admix needs images"):
        attacks.Admix(net)
    with pytest.raises(ValueError, match=r"images must have shape \(N, 2, 6, 6\) on cpu"):
        attacks.Admix(net, images=torch.rand(3, 2, 5, 5))(x, y)


def test_described(given):
    net, x, _, _ = given
    words = attacks.Admix(net, images=x, nesterov=True, kernel=5, **NUMBERS).describe()
    assert "Nesterov" in words and "gaussian kernel 5" in words and "3 mixes of 0.2" in words

"""pyadv.compat.torchattacks against torchattacks, in float64, where theirs is right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from objective_parts import make_batch, make_net

from pyadv.compat import torchattacks as ours

pytestmark = pytest.mark.peers
theirs = pytest.importorskip(
    "torchattacks", reason="torchattacks is not installed", exc_type=ImportError
)

NUMBERS = {"eps": 0.1, "alpha": 0.03, "steps": 4}


@pytest.fixture
def given():
    net, (x, y) = make_net().double(), make_batch(12)
    x = (0.05 + 0.8 * x).double()
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(10):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval(), x, y


def images(given):
    """The same as images of three channels, which TIFGSM asks for."""
    net, x, y = given
    mean = torch.nn.Conv2d(3, 1, 1, bias=False).double()
    torch.nn.init.constant_(mean.weight, 1 / 3)
    return torch.nn.Sequential(mean, net).eval(), x.repeat(1, 3, 1, 1), y


def both(name, given, mode=None, **settings):
    net, x, y = given
    found = []
    for library in (ours, theirs):
        attack = getattr(library, name)(net, **settings)
        if mode is not None:
            mode(attack)
        torch.manual_seed(5)
        found.append((attack(x, y), torch.rand(3)))
    return found


def assert_same(found, atol=1e-6):
    (a, drawn), (b, drawn_there) = found
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
    assert torch.equal(drawn, drawn_there)


SAME = {
    "VANILA": {},
    "GN": {"std": 0.05},
    "FGSM": {"eps": 0.1},
    "BIM": NUMBERS,
    "RFGSM": NUMBERS,
    "PGD": NUMBERS,
    "EOTPGD": NUMBERS,
    "FFGSM": {"eps": 0.1, "alpha": 0.12},
    "TPGD": NUMBERS,
    "MIFGSM": {**NUMBERS, "decay": 0.7},
    "NIFGSM": {**NUMBERS, "decay": 0.7},
    "SINIFGSM": {**NUMBERS, "decay": 0.7, "m": 3},
    "PGDL2": {**NUMBERS, "eps": 0.5, "alpha": 0.2},
}
TARGETED = [name for name in SAME if name not in ("VANILA", "GN", "TPGD")]


@pytest.mark.parametrize("name", SAME)
def test_the_same_examples(name, given):
    assert_same(both(name, given, **SAME[name]))


@pytest.mark.parametrize("name", TARGETED)
@pytest.mark.parametrize("mode", ["random", "least_likely", "by_label", "by_function"])
def test_targeted(name, mode, given):
    arguments = [lambda x, y: (y + 1) % 4] if mode == "by_function" else []

    def choose(attack):
        getattr(attack, f"set_mode_targeted_{mode}")(*arguments, quiet=True)

    assert_same(both(name, given, choose, **SAME[name]))


@pytest.mark.parametrize("name", ["PGD", "MIFGSM"])
def test_normalised(name, given):
    net, x, y = given

    def normalise(attack):
        attack.set_normalization_used([0.4], [0.25])

    assert_same(both(name, (net, (x - 0.4) / 0.25, y), normalise, **SAME[name]), atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"kernel_name": "linear"}, {"len_kernel": 4}])
def test_tifgsm(settings, given):
    net, x, y = images(given)
    attacks = []
    for library in (ours, theirs):
        attack = library.TIFGSM(net, **NUMBERS, **settings, diversity_prob=0.0, decay=0.5)
        if library is theirs:  # its kernel is float32
            attack.stacked_kernel = attack.stacked_kernel.double()
        attacks.append(attack)
    torch.testing.assert_close(attacks[0](x, y), attacks[1](x, y), rtol=0, atol=1e-6)


def test_difgsm_without_diversity(given):
    net, x, y = given
    found = [library.DIFGSM(net, **NUMBERS, diversity_prob=0.0)(x, y) for library in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["guassian", "uniform"])
@pytest.mark.parametrize("name", ["PGDRS", "PGDRSL2"])
def test_smoothed(name, kind, given):
    """Inputs lie far from the bounds: theirs projects onto the ball alone, and clips at the end."""
    net, x, y = given
    near = {"eps": 0.05, "alpha": 0.02, "steps": 3, "noise_sd": 0.2, "noise_type": kind}
    assert_same(both(name, (net, 0.3 + 0.4 * x, y), **near), atol=1e-5)
    assert_same(both(name, (net, 0.3 + 0.4 * x, y), batch_max=20, **near), atol=1e-5)


def test_deepfool(given):
    net, x, y = given
    found, expected = (library.DeepFool(net)(x, y) for library in (ours, theirs))
    assert (net(found).argmax(1) != y).all() and (net(expected).argmax(1) != y).all()
    near, far = ((t - x).flatten(1).norm(dim=1) for t in (found, expected))
    inside = (expected > 0).flatten(1).all(1) & (expected < 1).flatten(1).all(1)
    assert inside.any()  # clipping each step, as theirs does, or their sum, differs
    torch.testing.assert_close(near[inside], far[inside], rtol=1e-3, atol=1e-4)


def test_cw(given):
    """Theirs ends for the whole batch, ours for each sample, so only the outcome compares."""
    net, x, y = given
    found, expected = (
        library.CW(net, c=100, steps=60, lr=0.05)(x, y) for library in (ours, theirs)
    )
    distances = [(t - x).flatten(1).norm(dim=1) for t in (found, expected)]
    fooled = [net(t).argmax(1) != y for t in (found, expected)]
    assert (fooled[0] | ~fooled[1]).all() and fooled[1].any()
    both_fool = fooled[0] & fooled[1]
    ours_mean, theirs_mean = (d[both_fool].mean() for d in distances)
    assert ours_mean <= 1.05 * theirs_mean


TRANSFER = ("VMIFGSM", "VNIFGSM", "DIFGSM")


@pytest.mark.parametrize("name", ["APGD", "APGDT", "FAB", "Square", *TRANSFER])
def test_as_strong(name, given):
    """Attacks with noise of their own break as much, within two samples."""
    net, x, y = given
    more = {"APGDT": {"n_classes": 4}, "Square": {"n_queries": 300}}.get(name, {})
    settings = {"eps": 0.15, **more, **({"alpha": 0.04} if name in TRANSFER else {})}
    if name == "FAB":  # in float32, because theirs mixes types
        settings, net, x = {"eps": 0.2, "steps": 20}, net.float(), x.float()
    right = []
    for library in (ours, theirs):
        torch.set_default_dtype(x.dtype)
        try:
            x_adv = getattr(library, name)(net, **settings)(x, y)
        finally:
            torch.set_default_dtype(torch.float32)
        assert (x_adv - x).abs().max() <= settings["eps"] + 1e-6
        right.append(int((net(x_adv).argmax(1) == y).sum()))
    assert right[0] <= right[1] + 2 and right[0] < len(x)


def test_sets_are_exchanged(given, tmp_path, monkeypatch):
    """Each library reads what the other has saved."""
    net, x, y = given
    net, x = net.float(), x.float()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5)
    sets = []
    for writer, reader in ((ours, theirs), (theirs, ours)):
        attack = writer.BIM(net, **NUMBERS)
        path = tmp_path / f"{writer.__name__}.pt"
        report = attack.save(
            loader, path, verbose=False, return_verbose=True, save_predictions=True
        )
        loaded = reader.PGD(net).load(str(path), batch_size=12, load_predictions=True)
        sets.append((*next(iter(loaded)), *report[:2]))
    for a, b in zip(*sets, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_classes_and_arguments():
    """Each class of theirs is here, or says what is nearest; its arguments have their places."""
    import inspect

    for name in theirs.__all__:
        if name not in ours.__all__:
            assert name in ours._NEAREST
            continue
        here, there = (
            {
                k: p.default
                for k, p in inspect.signature(getattr(m, name).__init__).parameters.items()
            }
            for m in (ours, theirs)
        )
        assert list(here)[: len(there)] == list(there), name
        assert {k: here[k] for k in there} == there, name

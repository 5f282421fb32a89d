"""The attacks against torchattacks' expressions, from the same seed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from objective_parts import make_batch, make_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyadv.compat import torchattacks
from pyadv.models import Normalized

EPS, ALPHA, STEPS = 0.1, 0.03, 4


def gradient(net, x, y):
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(leaf), y), leaf)[0]


def pgd(net, x, y, sign=1.0):
    x_adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        x_adv = x_adv + sign * ALPHA * gradient(net, x_adv, y).sign()
        x_adv = (x + (x_adv - x).clamp(-EPS, EPS)).clamp(0, 1)
    return x_adv


def pgd_l2(net, x, y):
    delta = torch.empty_like(x).normal_()
    norms = delta.flatten(1).norm(dim=1)[:, None, None, None]
    delta = delta * torch.zeros_like(norms).uniform_(0, 1) / norms * EPS
    x_adv = (x + delta).clamp(0, 1)
    for _ in range(STEPS):
        g = gradient(net, x_adv, y)
        x_adv = x_adv + ALPHA * g / (g.flatten(1).norm(dim=1)[:, None, None, None] + 1e-10)
        delta = x_adv - x
        norms = delta.flatten(1).norm(dim=1)[:, None, None, None]
        x_adv = (x + delta * (EPS / norms).clamp(max=1)).clamp(0, 1)
    return x_adv


CASES = {
    "pgd": (lambda net: torchattacks.PGD(net, EPS, ALPHA, STEPS), pgd),
    "pgdl2": (lambda net: torchattacks.PGDL2(net, EPS, ALPHA, STEPS), pgd_l2),
    "fgsm": (
        lambda net: torchattacks.FGSM(net, EPS),
        lambda net, x, y: (x + EPS * gradient(net, x, y).sign()).clamp(0, 1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_examples_from_the_same_seed(name):
    make, expression = CASES[name]
    net, (x, y) = make_net().double().eval(), make_batch()
    x = x.double()
    torch.manual_seed(5)
    ours = make(net)(x, y)
    state = torch.rand(2)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, expression(net, x, y), rtol=0, atol=1e-7)
    assert torch.equal(state, torch.rand(2))


def test_targets():
    net, (x, y) = make_net().double().eval(), make_batch()
    x, target = x.double(), (y + 1) % 4
    attack = torchattacks.PGD(net, EPS, ALPHA, STEPS)
    attack.set_mode_targeted_by_label()
    torch.manual_seed(5)
    ours = attack(x, target)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, pgd(net, x, target, sign=-1.0))
    attack.set_mode_default()
    torch.manual_seed(5)
    untargeted = attack(x, y)
    torch.manual_seed(5)
    torch.testing.assert_close(untargeted, pgd(net, x, y))


def test_without_a_random_start():
    net, (x, y) = make_net().eval(), make_batch()
    attack = torchattacks.PGD(net, EPS, EPS, 1, random_start=False)
    assert torch.equal(attack(x, y), torchattacks.FGSM(net, EPS)(x, y))


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm, eps", [("Linf", 0.05), ("L2", 0.3)])
def test_apgd(norm, eps, loss):
    net, (x, y) = make_net().eval(), make_batch()
    state = torch.get_rng_state()
    attack = torchattacks.APGD(net, norm, eps, steps=8, n_restarts=2, seed=3, loss=loss)
    x_adv = attack(x, y)
    assert torch.equal(attack(x, y), x_adv) and torch.equal(torch.get_rng_state(), state)
    other = torchattacks.APGD(net, norm, eps, steps=8, n_restarts=2, seed=4, loss=loss)
    assert not torch.equal(other(x, y), x_adv)
    size = torch.linalg.vector_norm((x_adv - x).flatten(1), 2 if norm == "L2" else torch.inf, dim=1)
    assert (size <= eps + 1e-6).all() and size.max() > 0.9 * eps
    assert (net(x_adv).argmax(1) == y).sum() <= (net(x).argmax(1) == y).sum()


def trained():
    """A network that is right on its batch, and the batch."""
    net, (x, y) = make_net(), make_batch()
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(20):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval(), x, y


def accuracy(net, x, y):
    with torch.no_grad():
        return (net(x).argmax(1) == y).float().mean().item()


CLASSES = [n for n in torchattacks.__all__ if n not in torchattacks.__wrapper__]
MANY_QUERIES = ("Square", "AutoAttack")  # with the default eps, which breaks little here


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in MANY_QUERIES)) for n in CLASSES]
)
def test_what_their_own_test_asserts(name):
    """Each class, made with its defaults, does not raise the accuracy; neither does its random
    targeted mode, if it has one."""
    net, x, y = trained()
    x, y = x[:5], y[:5]
    attack = getattr(torchattacks, name)(net)
    clean = accuracy(net, x, y)
    x_adv = attack(x, y)
    assert x_adv.shape == x.shape and x_adv.min() >= 0 and x_adv.max() <= 1
    assert accuracy(net, x_adv, y) <= clean
    if "targeted" in attack.supported_mode:
        attack.set_mode_targeted_random(quiet=True)
        assert attack.get_mode() == "targeted(random)" and attack.targeted
        assert accuracy(net, attack(x, y), y) <= clean
    else:
        with pytest.raises(ValueError, match="not supported"):
            attack.set_mode_targeted_random()
    assert name in repr(attack) and "attack_mode=" in repr(attack)


LARGE = {"CW": {"c": 10, "lr": 0.1}, "GN": {"std": 0.5}, "TPGD": {}}


@pytest.mark.parametrize("name", CLASSES)
def test_each_attack_breaks_samples(name):
    net, x, y = trained()
    attack = getattr(torchattacks, name)(net, **LARGE.get(name, {}))
    if hasattr(attack, "eps"):
        attack.eps = 2.0 if getattr(attack, "norm", "Linf") == "L2" else 0.3
    if hasattr(attack, "alpha"):
        attack.alpha = attack.eps / 4
    torch.manual_seed(1)
    broken = accuracy(net, attack(x, y), y)
    assert broken < accuracy(net, x, y) or name == "VANILA"


def test_settings_take_effect_and_misspelt_ones_raise():
    net, x, y = trained()
    attack = torchattacks.PGD(net, random_start=False)
    small = attack(x, y)
    attack.eps, attack.alpha, attack.steps = 0.3, 0.1, 5
    large = attack(x, y)
    assert (small - x).abs().max() <= 8 / 255 + 1e-6
    assert torch.equal(large, torchattacks.PGD(net, 0.3, 0.1, 5, False)(x, y))
    with pytest.raises(AttributeError, match="no setting esp; did you mean 'eps'"):
        attack.esp = 0.1

    class Mine(torchattacks.PGD):
        def __init__(self, model):
            super().__init__(model)
            self.extra = 1

    mine = Mine(net)
    mine.extra = 2
    with pytest.raises(AttributeError, match="no setting"):
        mine.other = 1


def test_an_attack_is_kept_until_a_setting_changes():
    net, x, y = trained()
    attack = torchattacks.PGD(net)
    attack(x, y)
    first = attack._made[1]
    attack(x, y)
    assert attack._made[1] is first
    attack.eps = 0.1
    attack(x, y)
    assert attack._made[1] is not first and attack._made[1].settings.eps == 0.1


def test_a_forward_of_ones_own():
    class Brighter(torchattacks.Attack):
        def __init__(self, model):
            super().__init__("Brighter", model)

        def forward(self, inputs, labels=None):
            return (inputs + 0.1).clamp(0, 1)

    net, x, y = trained()
    attack = Brighter(net)
    assert torch.equal(attack(x, y), (x + 0.1).clamp(0, 1))
    attack.set_normalization_used([0.5], [0.25])
    torch.testing.assert_close(attack((x - 0.5) / 0.25, y), ((x + 0.1).clamp(0, 1) - 0.5) / 0.25)


MODES = {
    "targeted(label)": lambda a: a.set_mode_targeted_by_label(quiet=True),
    "targeted(custom)": lambda a: a.set_mode_targeted_by_function(
        lambda x, y: (y + 1) % 4, quiet=True
    ),
    "targeted(random)": lambda a: a.set_mode_targeted_random(quiet=True),
    "targeted(least-likely)": lambda a: a.set_mode_targeted_least_likely(2, quiet=True),
}


@pytest.mark.parametrize("mode", MODES)
def test_targeted_modes(mode):
    net, x, y = trained()
    attack = torchattacks.PGD(net, eps=1.0, alpha=0.1, steps=20, random_start=False)
    MODES[mode](attack)
    assert attack.get_mode() == mode
    torch.manual_seed(2)
    target = attack.get_target_label(x, y)
    torch.manual_seed(2)
    reached = net(attack(x, y)).argmax(1)
    assert (reached == target).float().mean() > 0.9
    if mode == "targeted(label)":
        assert torch.equal(target, y)
    else:
        assert not (target == y).any()
    if mode == "targeted(custom)":
        assert torch.equal(target, (y + 1) % 4)
    if mode == "targeted(least-likely)":
        order = net(x).argsort(1)
        assert torch.equal(target, torch.where(order[:, 0] == y, order[:, 2], order[:, 1]))
    attack.set_mode_default(quiet=True)
    assert attack.get_mode() == "default" and not attack.targeted


def test_modes_say_what_they_do(capsys):
    net, _, _ = trained()
    attack = torchattacks.PGD(net)
    attack.set_mode_targeted_by_label()
    attack.set_mode_default()
    said = capsys.readouterr().out
    assert "'targeted(label)'" in said and "'default.'" in said
    with pytest.raises(ValueError, match="kth_min"):
        attack.set_mode_targeted_least_likely(0)
    attack.set_mode_targeted_least_likely(4, quiet=True)
    with pytest.raises(ValueError, match="kth_min must be at most 3"):
        attack(*make_batch())


@pytest.mark.parametrize("name", ["PGD", "CW", "PGDRS", "SINIFGSM"])
def test_normalised_inputs(name):
    net, x, y = trained()
    settings = {"PGD": {"eps": 0.2}, "CW": {"c": 10, "lr": 0.1}}.get(name, {})
    plain = getattr(torchattacks, name)(Normalized(net, [0.4], [0.2]), **settings)
    normalised = getattr(torchattacks, name)(net, **settings)
    normalised.set_normalization_used([0.4], [0.2])
    torch.manual_seed(0)
    expected = (plain(x, y) - 0.4) / 0.2
    torch.manual_seed(0)
    found = normalised((x - 0.4) / 0.2, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 if name == "CW" else 1e-3)
    assert not torch.equal(found, (x - 0.4) / 0.2)


@pytest.mark.parametrize("name", ["Square", "AutoAttack", "APGDT", "FAB"])
def test_normalised_inputs_and_keyed_noise(name):
    """The noise depends on the values of the inputs, so a rounding changes it."""
    net, x, y = trained()
    settings = {"eps": 0.5, **({"n_queries": 200} if name == "Square" else {})}
    attack = getattr(torchattacks, name)(net, **settings)
    attack.set_normalization_used([0.4], [0.2])
    found = attack((x - 0.4) / 0.2, y)
    assert (found * 0.2 + 0.4 - x).abs().max() <= 0.5 + 1e-5
    assert accuracy(net, found, y) < accuracy(net, (x - 0.4) / 0.2, y)


def test_training_modes():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 4)
    )
    x, y = make_batch()
    seen = []
    net[4].register_forward_hook(lambda *_: seen.append([m.training for m in net]))
    for whole, batch_norm, dropout in [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)]:
        net.train()
        net[1].eval()
        attack = torchattacks.PGD(net, steps=1)
        attack.set_model_training_mode(bool(whole), bool(batch_norm), bool(dropout))
        seen.clear()
        before = net[1].running_mean.clone()
        attack(x, y)
        w = bool(whole)
        assert seen[0] == [w, w and bool(batch_norm), w and bool(dropout), w, w]
        assert [m.training for m in net] == [True, False, True, True, True]
        assert torch.equal(before, net[1].running_mean) is not (w and bool(batch_norm))


def test_device():
    net, x, y = trained()
    attack = torchattacks.PGD(net)
    assert attack.device == torch.device("cpu")
    attack.set_device("meta")
    assert attack.device == torch.device("meta")
    free = torchattacks.FGSM(lambda x: net(x))
    assert free.device is None and free(x, y).shape == x.shape


def test_labels_are_asked_for():
    net, x, _ = trained()
    with pytest.raises(TypeError, match="PGD needs labels"):
        torchattacks.PGD(net)(x)
    assert torchattacks.TPGD(net)(x).shape == x.shape
    assert torch.equal(torchattacks.VANILA(net)(x), x)


@pytest.mark.parametrize("save_type", ["float", "int"])
@pytest.mark.parametrize("normalised", [False, True])
def test_save_and_load(tmp_path, capsys, save_type, normalised):
    net, x, y = trained()
    attack = torchattacks.PGD(net, eps=0.3, alpha=0.1, random_start=False)
    inputs = x
    if normalised:
        attack.set_normalization_used([0.4], [0.2])
        inputs = (x - 0.4) / 0.2
    loader = DataLoader(TensorDataset(inputs, y), batch_size=10)
    path = tmp_path / "set.pt"
    net.train()
    report = attack.save(
        *(loader, path),
        return_verbose=True,
        save_predictions=True,
        save_clean_inputs=True,
        save_type=save_type,
    )
    assert net.training and "Robust accuracy" in capsys.readouterr().out
    net.eval()
    own = {"mean": [0.4], "std": [0.2]} if normalised else None
    loaded = torchattacks.Attack.load(
        path, batch_size=24, normalize=own, load_predictions=True, load_clean_inputs=True
    )
    x_adv, labels, predictions, clean = next(iter(loaded))
    atol = 1e-6 if save_type == "float" else (0.5 / 255 + 1e-6) * (5 if normalised else 1)
    torch.testing.assert_close(clean, inputs, rtol=0, atol=max(atol, 1e-5))
    torch.testing.assert_close(x_adv, attack(inputs, y), rtol=0, atol=max(atol, 1e-5))
    assert torch.equal(labels, y)
    right = predictions == y
    assert report[0] == pytest.approx(100 * right.float().mean().item())
    l2 = (attack(inputs, y) - inputs)[~right].flatten(1).norm(dim=1).mean().item()
    assert report[1] == pytest.approx(l2 * (0.2 if normalised else 1), rel=1e-4)
    with pytest.raises(ValueError, match="save_type must be one of"):
        attack.save(loader, path, save_type="double")


def test_a_saved_set_says_what_it_lacks(tmp_path):
    net, x, y = trained()
    attack = torchattacks.FGSM(net)
    assert attack.save([(x, y)], tmp_path / "set.pt", verbose=False) is None
    with pytest.raises(ValueError, match="holds no preds"):
        attack.load(tmp_path / "set.pt", load_predictions=True)
    with pytest.raises(ValueError, match="at least one batch"):
        attack.save([])


def test_multi_attack(capsys, tmp_path):
    net, x, y = trained()
    first = torchattacks.FGSM(net, eps=0.1)
    second = torchattacks.PGD(net, eps=0.3, alpha=0.1, random_start=False)
    attack = torchattacks.MultiAttack([first, second], verbose=True)
    found = attack(x, y)
    after_first = net(first(x, y)).argmax(1) != y
    assert torch.equal(found[after_first], first(x, y)[after_first])
    rest = ~after_first
    by_second = second(x[rest], y[rest])
    broken = net(by_second).argmax(1) != y[rest]
    assert torch.equal(found[rest][broken], by_second[broken])
    assert torch.equal(found[rest][~broken], x[rest][~broken])
    assert "Attack success rate" in capsys.readouterr().out
    report = attack.save([(x, y)], tmp_path / "set.pt", return_verbose=True)
    assert len(report) == 4 and report[1][0] == pytest.approx(100 * after_first.float().mean())
    attack.set_normalization_used([0.4], [0.2])
    assert first.normalization_used is not None
    attack((x - 0.4) / 0.2, y)
    with pytest.raises(ValueError, match="two or more"):
        torchattacks.MultiAttack([first])
    with pytest.raises(ValueError, match="same model"):
        torchattacks.MultiAttack([first, torchattacks.FGSM(make_net())])


def test_fab_and_deepfool_give_points_that_fool():
    net, x, y = trained()
    far = torchattacks.FAB(net, eps=1.0)(x, y)
    eps = (far - x).abs().flatten(1).amax(1).median().item()
    found = torchattacks.FAB(net, eps=eps)(x, y)
    away = (found - x).abs().flatten(1).amax(1)
    assert (away <= eps + 1e-6).all()
    fooled = net(found).argmax(1) != y
    assert torch.equal(away > 0, fooled) and fooled.any() and not fooled.all()
    assert accuracy(net, torchattacks.DeepFool(net)(x, y), y) == 0


@pytest.mark.parametrize("name", torchattacks._NEAREST)
def test_missing_classes_name_the_nearest(name):
    missing = getattr(torchattacks, name)
    with pytest.raises(NotImplementedError, match=f"pyadv has no {name}; the nearest is"):
        missing(make_net())
    assert name not in torchattacks.__all__
    with pytest.raises(AttributeError):
        torchattacks.Pgd  # noqa: B018

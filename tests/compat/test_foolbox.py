"""The interface of foolbox: shapes, criteria, epsilons, and what the attacks promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from objective_parts import make_batch, make_net
from torch import nn

from pyadv.compat import foolbox as fb
from pyadv.engine.norms import distance

FIXED = [
    f"{norm}{name}"
    for norm in ("L1", "L2", "Linf")
    for name in (
        "ProjectedGradientDescentAttack",
        "BasicIterativeAttack",
        "FastGradientAttack",
        "MomentumIterativeFastGradientMethod",
    )
]
NEAREST = [
    *("L2CarliniWagnerAttack", "L2DeepFoolAttack", "LinfDeepFoolAttack", "DDNAttack"),
    *("LInfFMNAttack", "L2FMNAttack", "L1FMNAttack", "L0FMNAttack"),
]
RADII = {"Linf": [0.01, 0.1, 0.3], "L2": [0.05, 0.5, 2.0], "L1": [0.3, 3.0, 10.0], "L0": [1, 4, 20]}


@pytest.fixture(scope="module")
def trained():
    """A network that is right on its batch, and the batch."""
    net, (x, y) = make_net(), make_batch(16)
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(15):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    return net.eval(), x, y


def make(name):
    kind = getattr(fb.attacks, name)
    if name == "L2CarliniWagnerAttack":
        return kind(steps=50, binary_search_steps=5, initial_const=1.0, stepsize=0.05)
    return kind()


def test_the_readme_of_foolbox(trained):
    net, x, y = trained
    fmodel = fb.PyTorchModel(net, bounds=(0, 1))
    assert fb.accuracy(fmodel, x, y) == 1.0
    attack = fb.attacks.LinfPGD()
    epsilons = [0.0, 0.005, 0.3, 1.0]
    raw, clipped, success = attack(fmodel, x, y, epsilons=epsilons)
    assert len(raw) == len(clipped) == 4 and success.shape == (4, 16)
    robust = 1 - success.float().mean(-1)
    assert robust[0] == 1 and robust[-1] < 0.5
    for eps, advs in zip(epsilons, clipped, strict=True):
        assert (advs - x).abs().max() <= eps + 1e-6
        expected = (net(advs).argmax(1) != y).float().mean()
        assert success[epsilons.index(eps)].float().mean() == expected


@pytest.mark.parametrize("name", FIXED + NEAREST)
def test_every_attack(name, trained):
    net, x, y = trained
    fmodel, attack = fb.PyTorchModel(net, bounds=(0, 1)), make(name)
    radii = RADII[attack.norm]
    raw, clipped, success = attack(fmodel, x, y, epsilons=radii)
    for k, eps in enumerate(radii):
        assert clipped[k].min() >= 0 and clipped[k].max() <= 1
        assert (distance(clipped[k], x, attack.norm) <= eps * (1 + 1e-5) + 1e-6).all()
        assert torch.equal(success[k], net(clipped[k]).argmax(1) != y)
    assert success[2].sum() >= success[0].sum() and success[2].any()
    one = attack(fmodel, x, y, epsilons=radii[2])
    assert one[0].shape == one[1].shape == x.shape and one[2].shape == y.shape
    if name in NEAREST:
        assert torch.equal(raw[0], raw[1])
        found, same, fooled = attack(fmodel, x, y, epsilons=None)
        assert torch.equal(found, same) and torch.equal(fooled, net(found).argmax(1) != y)
        assert fooled.any()
        clean_wrong, *_ = attack(fmodel, x, (y + 1) % 4, epsilons=None)
        assert torch.equal(clean_wrong, x)
    else:
        with pytest.raises(ValueError, match="needs a radius"):
            attack(fmodel, x, y, epsilons=None)
    assert type(attack).__name__ in repr(attack)


@pytest.mark.parametrize("name", FIXED + NEAREST)
def test_targets(name, trained):
    net, x, y = trained
    fmodel, attack = fb.PyTorchModel(net, bounds=(0, 1)), make(name)
    target = (y + 1) % 4
    criterion = fb.criteria.TargetedMisclassification(target)
    if "DeepFool" in name:
        with pytest.raises(ValueError, match="nearest boundary"):
            attack(fmodel, x, criterion, epsilons=1.0)
        return
    eps = 30.0 if attack.norm == "L0" else 20 * RADII[attack.norm][2] if name in NEAREST else None
    eps = eps or {"Linf": 0.5, "L2": 3.0, "L1": 15.0}[attack.norm]
    _, clipped, success = attack(fmodel, x, criterion, epsilons=eps)
    assert torch.equal(success, net(clipped).argmax(1) == target) and success.any()


def test_both_criteria(trained):
    net, x, y = trained
    fmodel = fb.PyTorchModel(net, bounds=(0, 1))
    both = fb.Misclassification(y) & fb.TargetedMisclassification((y + 1) % 4)
    assert not both(x, net(x)).any() and both(x, F.one_hot((y + 1) % 4, 4)).all()
    with pytest.raises(ValueError, match="criterion must be labels"):
        fb.attacks.LinfPGD()(fmodel, x, both, epsilons=0.1)


class Wrapped:
    """A tensor in the form of eagerpy's."""

    def __init__(self, raw):
        self.raw = raw


def test_wrapped_tensors(trained):
    net, x, y = trained
    fmodel = fb.PyTorchModel(net, bounds=(0, 1))
    raw, clipped, success = fb.attacks.LinfBasicIterativeAttack()(
        fmodel, Wrapped(x), Wrapped(y), epsilons=[0.1, 0.2]
    )
    assert all(isinstance(t, Wrapped) for t in (*raw, *clipped, success))
    plain = fb.attacks.LinfBasicIterativeAttack()(fmodel, x, y, epsilons=[0.1, 0.2])
    assert torch.equal(success.raw, plain[2]) and torch.equal(raw[0].raw, plain[0][0])


def test_preprocessing_and_bounds(trained):
    net, x, y = trained
    model = fb.PyTorchModel(
        net, bounds=(0, 255), preprocessing={"mean": [51.0], "std": [102.0], "axis": -3}
    )
    torch.testing.assert_close(model(255 * x), net((255 * x - 51) / 102))
    flipped = fb.PyTorchModel(net, bounds=(0, 1), preprocessing={"flip_axis": -1})
    torch.testing.assert_close(flipped(x), net(x.flip(-1)))
    unit = model.transform_bounds((0, 1))
    torch.testing.assert_close(unit(x), model(255 * x), rtol=1e-4, atol=1e-4)
    assert unit.bounds == (0, 1)
    wide = fb.attacks.LinfBasicIterativeAttack()(model, 255 * x, y, epsilons=255 * 0.1)[0]
    narrow = fb.attacks.LinfBasicIterativeAttack()(unit, x, y, epsilons=0.1)[0]
    torch.testing.assert_close(wide / 255, narrow, rtol=0, atol=2e-2)
    assert wide.max() > 1 and wide.max() <= 255
    for bad in ({"scale": 1}, {"mean": [0.0], "axis": 1}):
        with pytest.raises(ValueError, match="preprocessing"):
            fb.PyTorchModel(net, bounds=(0, 1), preprocessing=bad)
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module"):
        fb.PyTorchModel(lambda x: x, bounds=(0, 1))
    with pytest.warns(UserWarning, match="training mode"):
        fb.PyTorchModel(nn.Linear(1, 1), bounds=(0, 1))


def test_repeat(trained):
    net, x, y = trained
    fmodel = fb.PyTorchModel(net, bounds=(0, 1))
    once = fb.attacks.LinfPGD(steps=1, rel_stepsize=0.5)
    many = once.repeat(3).repeat(2)
    assert many.times == 6 and once.times == 1
    torch.manual_seed(0)
    singles = torch.stack([once(fmodel, x, y, epsilons=0.25)[2] for _ in range(6)])
    torch.manual_seed(0)
    _, clipped, success = many(fmodel, x, y, epsilons=0.25)
    assert torch.equal(success, singles.any(0))
    assert torch.equal(success, net(clipped).argmax(1) != y)
    found = fb.attacks.L2FMNAttack(steps=20).repeat(2)(fmodel, x, y, epsilons=None)
    assert torch.equal(found[2], net(found[0]).argmax(1) != y)


@pytest.mark.parametrize("name", fb.attacks._NEAREST)
def test_missing_classes_name_the_nearest(name):
    with pytest.raises(NotImplementedError, match=f"pyadv has no {name}; the nearest is"):
        getattr(fb.attacks, name)()
    with pytest.raises(AttributeError):
        fb.attacks.Nothing  # noqa: B018


# --- against foolbox


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("eagerpy", reason="eagerpy is not installed")
    return pytest.importorskip("foolbox", reason="foolbox is not installed", exc_type=ImportError)


SAME = ("Linf", "L2")
PARITY = [
    *(f"{n}ProjectedGradientDescentAttack" for n in SAME),
    *(f"{n}BasicIterativeAttack" for n in SAME),
    *(f"{n}FastGradientAttack" for n in SAME),
]


@pytest.mark.peers
@pytest.mark.parametrize("name", PARITY)
def test_the_same_as_foolbox(name, theirs):
    net, (x, y) = make_net().double().eval(), make_batch(8)
    x, found = x.double(), []
    for library in (fb, theirs):
        fmodel = library.PyTorchModel(net, bounds=(0, 1), device="cpu")
        torch.manual_seed(3)
        result = getattr(library.attacks, name)()(fmodel, x, y, epsilons=[0.05, 0.3])
        found.append((*result[0], *result[1], result[2], torch.rand(2)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize(
    "name", ["L2DeepFoolAttack", "LinfDeepFoolAttack", "DDNAttack", *NEAREST[4:7]]
)
def test_as_near_as_foolbox(name, theirs, trained):
    net, x, y = trained
    sizes = []
    for library in (fb, theirs):
        fmodel = library.PyTorchModel(net, bounds=(0, 1), device="cpu")
        attack = getattr(library.attacks, name)()
        raw, _, success = attack(fmodel, x, y, epsilons=None)
        assert success.all()
        sizes.append(distance(raw, x, getattr(fb.attacks, name).norm).median())
    assert sizes[0] <= 1.05 * sizes[1]


@pytest.mark.peers
def test_eagerpy(theirs, trained):
    import eagerpy

    net, x, y = trained
    images, labels = eagerpy.astensors(x, y)
    fmodel = fb.PyTorchModel(net, bounds=(0, 1))
    _, clipped, success = fb.attacks.LinfPGD()(fmodel, images, labels, epsilons=[0.1, 0.3])
    assert isinstance(clipped[0], eagerpy.PyTorchTensor)
    assert 0 <= 1 - success.float32().mean(axis=-1)[1].item() <= 1

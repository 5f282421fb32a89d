"""Settings that follow, settings that are changed, and settings that are misspelt."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from networks import RowLinear
from torch import nn

from pyadv import attacks
from pyadv.attacks import (
    APGD,
    CW,
    FAB,
    FGSM,
    FMN,
    MIFGSM,
    PGD,
    PGD0,
    Admix,
    AutoAttack,
    DeepFool,
    FriendlyPGD,
    PGDPlus,
    Square,
    TargetedAPGD,
)
from pyadv.engine import step_size
from pyadv.engine.attack import Attack


def problem():
    x = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return RowLinear(48), x, torch.arange(6) % 3


# --- Sizes that follow from others.


@pytest.mark.parametrize(
    ("norm", "steps", "share"),
    [
        ("Linf", 10, 1 / 4),
        ("Linf", 5, 1 / 2),
        ("Linf", 20, 1 / 8),
        ("Linf", 100, 1 / 10),
        ("Linf", 0, 1),
        ("L2", 5, 1),
        ("L2", 10, 1 / 2),
        ("L2", 100, 1 / 10),
        ("L1", 10, 1),
        ("L1", 50, 1 / 5),
    ],
)
def test_alpha_follows_eps_norm_and_steps(norm, steps, share):
    assert PGD(norm=norm, eps=0.5, steps=steps).alpha == pytest.approx(0.5 * share)
    radii = torch.tensor([0.1, 0.2])
    torch.testing.assert_close(step_size(radii, norm, steps), radii * share)


def test_published_sizes_stay():
    assert PGD().alpha == pytest.approx(2 / 255) and PGD().eps == 8 / 255
    plus = PGDPlus()
    assert (plus.eps, plus.steps, plus.restarts) == (0.031, 40, 5)
    assert plus.alpha == pytest.approx(0.01)
    assert MIFGSM(eps=0.4, steps=8).alpha == pytest.approx(0.05)
    assert FGSM(eps=0.3).alpha == 0.3
    assert FriendlyPGD(eps=0.4).alpha == pytest.approx(0.1)


def test_a_derived_alpha_follows_and_a_given_one_stays():
    derived, given = PGD(eps=0.1), PGD(eps=0.1, alpha=0.04)
    for attack in (derived, given):
        attack.eps = 0.2
    assert derived.alpha == pytest.approx(0.05) and given.alpha == 0.04
    derived.steps = 5
    assert derived.alpha == pytest.approx(0.1)
    for attack, size in ((FGSM(eps=0.1), 0.2), (PGDPlus(eps=0.1), 2 / 31), (APGD(eps=0.1), 0.4)):
        attack.eps = 0.2
        assert attack.settings.alpha == pytest.approx(size)


@pytest.mark.parametrize(
    "kind", [PGD, FGSM, MIFGSM, PGDPlus, FriendlyPGD, APGD, TargetedAPGD, Square, AutoAttack]
)
def test_eps_has_no_default_in_other_norms(kind):
    with pytest.raises(ValueError, match="eps must be given for norm L2"):
        kind(RowLinear(48), norm="L2")
    assert kind(RowLinear(48), norm="L2", eps=1.0).eps == 1.0
    with pytest.raises(ValueError, match="eps must be given for norm L1"):
        kind(RowLinear(48)).norm = "L1"


def test_steps_too_small_for_the_ball_are_told_once():
    with pytest.warns(UserWarning, match="10 steps of alpha = 0.007843 reach 0.07843") as told:
        attack = PGD(norm="L2", eps=2.0, alpha=2 / 255)
    assert told[0].filename == __file__
    model, x, y = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack.run(x, y, model=model)
        attack(x, y) if attack.model else attack.perturb(x, y, model=model)
        PGD(eps=1.0, alpha=0.01, steps=0)
        PGD(eps=1.0, alpha=0.05, steps=10)
        quiet = PGD(eps=0.1, alpha=0.05)
        quiet.seed = 3
    with pytest.warns(UserWarning, match="less than half of eps = 1;") as told:
        quiet.with_(alpha=0.04).eps = 1.0
    assert len(told) == 1 and told[0].filename == __file__


# --- Settings that are set.


def test_a_radius_that_is_set_takes_effect():
    model, x, y = problem()
    attack = PGD(model, eps=0.05, start="none")
    for eps in (0.05, 0.2, 0.01):
        attack.eps = eps
        assert attack.eps == eps
        assert (attack(x, y) - x).abs().max() == pytest.approx(eps, rel=1e-4)
        assert torch.equal(attack(x, y), PGD(model, eps=eps, start="none")(x, y))


EVERY = [
    value
    for value in vars(attacks).values()
    if isinstance(value, type) and issubclass(value, Attack)
]


@pytest.mark.parametrize("kind", EVERY)
def test_a_changed_attack_is_as_if_made_so(kind):
    model, x, y = problem()
    short = {"queries": 6} if kind is Square else {} if kind is FGSM else {"steps": 3}
    more = {"images": x} if kind is Admix else {}
    eps, other = (2, 5) if kind is PGD0 else (0.1, 0.3)
    changed = kind(model, **{k: v + 1 for k, v in short.items()}, eps=other, **more)
    for name, value in {**short, "eps": eps, "lo": -0.5, "output": None}.items():
        setattr(changed, name, value)
        assert getattr(changed, name) == value
    made = kind(model, **short, eps=eps, lo=-0.5, **more)
    again = copy.deepcopy(pickle.loads(pickle.dumps(changed)))
    assert changed.describe() == made.describe() == again.describe()
    assert changed.settings == made.settings
    expected = made.perturb(x, y, draw=0).x_adv
    assert torch.equal(changed.perturb(x, y, draw=0).x_adv, expected)
    again.eps = eps
    assert torch.equal(again.perturb(x, y, draw=0).x_adv, expected)


def test_a_copy_with_other_settings_is_checked_and_shares_the_model_alone():
    model, x, y = problem()
    attack = PGD(model, eps=0.1, seed=3)
    attack(x, y)
    other = attack.with_(eps=0.2, norm="l2", steps=5)
    assert (other.norm, other.eps, other.alpha, other.steps) == ("L2", 0.2, 0.2, 5)
    assert (attack.norm, attack.eps, attack.steps) == ("Linf", 0.1, 10)
    assert other.model is model and other.graphs is not attack.graphs
    assert other.seed == 3 and other.draw == attack.draw == 1
    with pytest.raises(TypeError, match="PGD has no setting 'epsilon'; did you mean 'eps'"):
        attack.with_(epsilon=0.2)
    with pytest.raises(ValueError, match="steps must be an integer"):
        attack.with_(steps=-1)


def test_what_is_refused_changes_nothing():
    attack = PGD(eps=0.1)
    for name, value in {"eps": -1.0, "steps": 1.5, "loss": "sce", "best": "x", "lo": 2.0}.items():
        with pytest.raises((ValueError, TypeError), match=name):
            setattr(attack, name, value)
    assert attack.settings == PGD(eps=0.1).settings
    with pytest.raises(ValueError, match="8 of 255 grey levels"):
        attack.eps = 8.0
    with pytest.raises(ValueError, match='scale="unit" needs eot=1'):
        attack.with_(scale="unit").eot = 4


@pytest.mark.parametrize(
    ("attack", "name", "meant"),
    [
        (PGD(), "epss", "eps"),
        (PGD(), "step", "steps"),
        (PGDPlus(), "restart", "restarts"),
        (FAB(), "early_stopping", "early_stop"),
        (CW(), "search", "searches"),
        (AutoAttack(RowLinear(48)), "epsilon", "eps"),
    ],
)
def test_a_misspelt_setting_raises(attack, name, meant):
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; did you mean '{meant}'"):
        setattr(attack, name, 0.1)
    assert not hasattr(attack, name)


def test_settings_that_an_attack_does_not_have_cannot_be_set():
    with pytest.raises(AttributeError, match="FAB has no argument 'bn'"):
        FAB().bn = "train"
    with pytest.raises(TypeError, match="FGSM has no argument steps"):
        FGSM().steps = 3
    with pytest.raises(AttributeError, match="no attribute 'alpha'"):
        APGD().alpha = 0.1


class Counting(PGD):
    """An attack with attributes of its own."""

    declared: int

    def __init__(self, model=None, factor=2.0, **settings):
        self.factor, self.seen = factor, []
        super().__init__(model, **settings)
        self.half = self.settings.eps / factor
        self.calls = 0

    def _search(self, task):
        self.calls += 1
        self.seen.append(len(task.x))
        self.declared = 1
        return super()._search(task)


def test_attributes_of_a_subclass_are_free_and_follow():
    model, x, y = problem()
    attack = Counting(model, eps=0.2)
    attack(x, y)
    attack.eps = 0.4
    assert (attack.half, attack.calls, attack.seen, attack.declared) == (0.2, 1, [6], 1)
    attack.factor = 4.0
    assert attack.half == 0.1 and attack.eps == 0.4
    assert attack.with_(eps=0.8).half == 0.2


def test_settings_that_have_been_replaced_whole_are_kept():
    from dataclasses import replace

    attack = PGD(eps=0.1)
    attack.settings = replace(attack.settings, bn="as_is")
    attack.steps = 4
    assert attack.bn == "as_is" and attack.with_(eps=0.2).bn == "as_is"


def test_other_classes_read_their_own_settings():
    assert (CW(steps=30, searches=2).steps, Square(queries=7).queries) == (30, 7)
    assert FAB().eps is None and FMN(eps=0.1).eps == 0.1 and DeepFool().norm == "L2"
    friendly = FriendlyPGD(tau=2, omega=0.01)
    friendly.tau = 1
    assert (friendly.tau, friendly.omega, friendly.settings.patience) == (1, 0.01, 1)


def test_autoattack_has_settings_too():
    model, x, y = problem()
    attack = AutoAttack(model, version="standard", seed=0, progress=None)
    attack.plan["square"].steps = 7
    attack.eps = 0.2
    assert attack.members(3)["square"].describe() == "Linf 0.2, 7 queries, keyed start"
    other = attack.with_(norm="L2", eps=1.0)
    other.plan["square"].steps = 9
    assert attack.plan["square"].steps == 7 and attack.eps == 0.2
    assert other.members(3)["square"].describe() == "L2 1, 9 queries, keyed start"
    made = AutoAttack(model, eps=0.2, seed=0, progress=None)
    made.plan["square"].steps = 7
    assert torch.equal(attack(x, y), made(x, y))


# --- Models that return probabilities.


def test_probabilities_are_told_in_run_once_for_each_model():
    _, x, y = problem()
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 3), nn.Softmax(1))
    attack = PGD(model, eps=0.1)
    with pytest.warns(UserWarning, match="seems to return probabilities") as told:
        attack.run(x, y)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack.run(x, y)
        PGD(model[:2], eps=0.1).run(x, y)
        PGD(model, eps=0.1, validate=False).run(x, y)
    for other in (FAB(model), Square(model, queries=3), PGD(model, restarts=2)):
        with pytest.warns(UserWarning, match="probabilities"):
            other.run(x, y)
    with pytest.warns(UserWarning, match="probabilities"):
        attack.run(x, y, model=copy.deepcopy(model))

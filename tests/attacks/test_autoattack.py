"""AutoAttack: verdicts in closed form, independence of batches, interruption, counts of passes."""

from __future__ import annotations

import pytest
import torch
from networks import ConvNet, RowLinear
from torch import nn

from pyadv.attacks import APGD, FAB, PGD, AutoAttack, Parity, Square, TargetedAPGD, TargetedFAB
from pyadv.engine.loop import predict

norms = pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
DUAL = {"Linf": 1, "L2": 2, "L1": torch.inf}
WHITE_BOX = ("apgd-ce", "apgd-t", "fab-t")


class Images(RowLinear):
    """A model of 3x4x4 images whose decision boundaries are nearer than the walls of the box."""

    def __init__(self, classes: int = 3, seed: int = 0):
        super().__init__(48, classes, seed)

    def forward(self, x):
        return super().forward(x - 0.5)

    def problem(self, n: int):
        x = 0.4 + 0.2 * torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(5))
        y = self(x).argmax(1)
        wrong = torch.arange(n) % 7 == 3
        return x, torch.where(wrong, (y + 1) % len(self.weight), y)

    def distances(self, x, y, norm):
        """Return the distances to the nearest boundary; 0 where x is misclassified."""
        with torch.no_grad():
            z = self(x)
            gaps = z.gather(1, y[:, None]) - z
            slopes = torch.linalg.vector_norm(
                self.weight[y][:, None] - self.weight[None], DUAL[norm], dim=2
            )
        own = nn.functional.one_hot(y, z.shape[1]).bool()
        return (gaps / slopes).masked_fill(own, torch.inf).amin(1).clamp(min=0)


def silent(model, **settings):
    settings = {"eps": 0.02, "seed": 0, "progress": None, **settings}
    if settings.get("version") == "custom":
        settings.setdefault("attacks", WHITE_BOX)
    return AutoAttack(model, **settings)


@norms
def test_verdicts_are_exact_on_a_linear_model(norm, device):
    model = Images().to(device)
    x, y = (t.to(device) for t in model.cpu().problem(40))
    model.to(device)
    distances = model.distances(x, y, norm)
    eps = float(distances[distances > 0].median())
    result = silent(model, norm=norm, eps=eps, version="custom").run(x, y, batch_size=16)
    clear = (distances / eps - 1).abs() > (0.15 if norm == "L1" else 1e-3)
    assert clear.sum() > 30 and torch.equal(result.correct[clear], (distances > eps)[clear])
    offsets = (result.x_adv - x).flatten(1)
    length = torch.linalg.vector_norm(offsets, {"Linf": torch.inf, "L2": 2, "L1": 1}[norm], dim=1)
    assert (length <= eps * (1 + 1e-5)).all()
    assert (length[result.correct] == 0).all() and result.x_adv.min() >= 0
    predicted = predict(model, result.x_adv, PGD().settings).argmax(1)
    assert torch.equal(result.prediction, predicted)
    assert torch.equal(predicted == y, result.correct)


def test_members_are_those_of_the_authors():
    expected = {
        "standard": [(APGD, 1, 0), (TargetedAPGD, 1, 9), (TargetedFAB, 1, 9), (Square, 1, 0)],
        "plus": [
            *((APGD, 5, 0), (APGD, 5, 0), (FAB, 5, 0), (Square, 1, 0)),
            *((TargetedAPGD, 1, 9), (TargetedFAB, 1, 9)),
        ],
        "rand": [(APGD, 1, 0), (APGD, 1, 0)],
    }
    for version, members in expected.items():
        attacks = silent(Images(), version=version).members(10)
        found = [(type(a), a.restarts, getattr(a, "targets", 0)) for a in attacks.values()]
        assert found == members
        for name, attack in attacks.items():
            s = attack.settings
            assert s.steps == (5000 if name == "square" else 100)
            assert getattr(s, "eot", 1) == (20 if version == "rand" else 1)
            assert s.eps == 0.02 and s.norm == "Linf"
            assert s.loss.loss == {"apgd-ce": "ce", "apgd-dlr": "dlr"}.get(name, s.loss.loss)
    l1 = silent(Images(), norm="L1", eps=3.0).members(10)
    assert (l1["apgd-ce"].restarts, l1["apgd-t"].targets, l1["fab-t"].targets) == (5, 5, 9)
    assert l1["apgd-ce"].multi_eps and l1["apgd-t"].multi_eps
    assert not silent(Images(), norm="L1", version="plus").members(10)["apgd-ce"].multi_eps


@pytest.mark.peers
@norms
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_members_against_the_package(norm, version):
    official = pytest.importorskip("pyautoattack").AutoAttack(
        Images(), norm=norm, eps=0.5, version=version
    )
    attacks = silent(Images(), norm=norm, eps=0.5, version=version).members(10)
    assert list(attacks) == official.attacks_to_run
    for name, attack in attacks.items():
        theirs = {"fab-t": official.fab, "fab": official.fab, "square": official.square}.get(
            name, official.apgd_targeted if name == "apgd-t" else official.apgd
        )
        steps = theirs.n_queries if name == "square" else theirs.n_iter
        assert attack.settings.steps == steps
        # FAB-T of the authors sets its restarts to 1 when it runs.
        assert attack.restarts == (1 if name == "fab-t" else theirs.n_restarts)
        if name in ("apgd-t", "fab-t"):
            assert attack.targets == theirs.n_target_classes
        if name.startswith("apgd"):
            assert attack.settings.eot == theirs.eot_iter
            assert attack.multi_eps == theirs.use_largereps


def test_nothing_depends_on_the_batches():
    model = Images()
    x, y = model.problem(30)
    eps = float(model.distances(x, y, "Linf").median())
    whole = silent(model, eps=eps, version="custom").run(x, y, batch_size=1000)
    parts = silent(model, eps=eps, version="custom").run(x, y, batch_size=7)
    for name in ("x_adv", "correct", "prediction", "broken_by", "queries", "gradients"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    order = torch.randperm(30)
    mixed = silent(model, eps=eps, version="custom").run(x[order], y[order])
    assert torch.equal(mixed.x_adv, whole.x_adv[order])
    attack = silent(model, eps=eps, version="custom")
    for i in (0, 3, 11):
        assert torch.equal(attack(x[i : i + 1], y[i : i + 1])[0], whole.x_adv[i])


class Counted(nn.Module):
    """A model that counts the rows of its forward and backward passes."""

    def __init__(self, net):
        super().__init__()
        self.net, self.forward_rows, self.backward_rows = net, 0, 0

    def forward(self, x):
        self.forward_rows += len(x)
        z = self.net(x)
        if z.requires_grad:
            z.register_hook(self._count)
        return z

    def _count(self, grad):
        self.backward_rows += len(grad)


def test_the_ledger_is_what_the_model_was_asked():
    model = Images()
    x, y = model.problem(40)
    eps = float(model.distances(x, y, "Linf").median())
    counted = Counted(model)
    result = silent(counted, eps=eps, version="custom").run(x, y, batch_size=40)
    forward, backward = int(result.queries.sum()), int(result.gradients.sum())
    # Rows leave only when enough of them are done, so a few more rows than necessary pass through.
    assert forward <= counted.forward_rows <= 1.1 * forward
    assert backward <= counted.backward_rows <= 1.1 * backward
    robust = result.correct.nonzero()[0]
    assert result.queries[robust, 0] == 1 and result.queries[robust, 1] == 102
    # Later attacks do not get samples that an earlier one broke.
    by_first = (result.broken_by == 1).nonzero()[:, 0]
    assert len(by_first) and (result.queries[by_first, 2:] == 0).all()
    assert (result.queries[result.broken_by == 0, 1:] == 0).all()


class Stop(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    model = Images()
    x, y = model.problem(30)
    eps = float(model.distances(x, y, "Linf").median())
    settings = dict(eps=eps, version="custom")
    whole = silent(model, **settings).run(x, y, batch_size=5)
    calls = []

    def interrupt(*now):
        calls.append(now)
        if now[0] == "apgd-ce" and now[1] > 10:
            raise Stop

    state = tmp_path / "deep" / "state.pt"
    with pytest.raises(Stop):
        silent(model, progress=interrupt, **settings).run(x, y, batch_size=5, state=state)
    seen = []
    again = silent(model, progress=lambda *now: seen.append(now), **settings)
    result = again.run(x, y, batch_size=5, state=state)
    for name in ("x_adv", "correct", "prediction", "broken_by", "queries", "gradients"):
        assert torch.equal(getattr(whole, name), getattr(result, name)), name
    assert seen[0][0] == "apgd-ce"  # the state contained the clean predictions
    assert seen[0][2] == calls[0][2] - int((~(model(x).argmax(1) == y)).sum()) - calls[-1][1]
    seen.clear()
    assert torch.equal(again.run(x, y, state=state).x_adv, whole.x_adv)
    assert not seen  # no attack ran again


def test_a_finished_state_costs_one_comparison(tmp_path):
    model = Counted(Images())
    x, y = model.net.problem(30)
    attack = silent(model, version="custom", attacks=["apgd-ce"])
    first = attack.run(x, y, state=tmp_path / "state.pt")
    before = model.forward_rows, model.backward_rows
    assert torch.equal(attack.run(x, y, state=tmp_path / "state.pt").x_adv, first.x_adv)
    # Each sample is compared once, and a few samples find the counters that a pass changes.
    assert model.forward_rows - before[0] == 30 + 8
    assert model.backward_rows - before[1] == 8


def test_a_state_of_something_else_is_refused(tmp_path):
    model = Images()
    x, y = model.problem(8)
    state = tmp_path / "state.pt"
    settings = dict(version="custom", attacks=["apgd-ce"])
    silent(model, **settings).run(x, y, state=state)
    with pytest.raises(ValueError, match=r"another apgd-ce\.alpha: 0\.04, now 0\.06; .*eps: 0\.02"):
        silent(model, **{**settings, "eps": 0.03}).run(x, y, state=state)
    with pytest.raises(ValueError, match=r"another apgd-ce\.seed: 0, now 1"):
        silent(model, **{**settings, "seed": 1}).run(x, y, state=state)
    with pytest.raises(ValueError, match=r"another apgd-ce\.hi: 1\.0, now 0\.9"):
        silent(model, hi=0.9, **settings).run(x, y, state=state)
    with pytest.raises(ValueError, match=r"another model\.weight"):
        silent(Images(seed=1), **settings).run(x, y, state=state)
    with pytest.raises(ValueError, match=r"must hold samples as before, float32 \[3, 4, 4\]"):
        silent(model, **settings).run(x[:, :, :2], y, state=state)
    (tmp_path / "text").write_text("no state")
    with pytest.raises(ValueError, match="cannot be read as a saved evaluation"):
        silent(model, **settings).run(x, y, state=tmp_path / "text")


def test_as_existing_scripts_call_it():
    model = Images()
    x, y = model.problem(20)
    eps = float(model.distances(x, y, "Linf").median())
    attack = silent(model, eps=eps, version="custom", attacks=["apgd-ce", "fab-t"])
    x_adv, labels = attack.run_standard_evaluation(x, y, bs=8, return_labels=True)
    assert torch.equal(model(x_adv).argmax(1), labels)
    one_by_one = attack.run_standard_evaluation_individual(x, y, bs=8)
    assert list(one_by_one) == ["apgd-ce", "fab-t"]
    robust = [(model(v).argmax(1) == y) for v in one_by_one.values()]
    assert torch.equal(robust[0] & robust[1], labels == y)
    assert not torch.equal(one_by_one["apgd-ce"], one_by_one["fab-t"])


def test_own_attacks():
    model = Images()
    x, y = model.problem(20)
    eps = float(model.distances(x, y, "Linf").median())
    weak = PGD(eps=eps, alpha=eps / 4, steps=1, seed=0)
    own = {"weak": weak, "strong": APGD(eps=eps, seed=0)}
    result = silent(model, version="custom", attacks=own).run(x, y)
    assert result.names == ("clean", "weak", "strong")
    assert set(result.broken_by.tolist()) == {-1, 0, 1, 2} and weak.draw == 0
    alone = weak.run(x, y, model=model, draw=0).correct
    assert torch.equal((result.broken_by == 1) | (result.broken_by == 0), ~alone)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("version", ["standard", "plus"])
def test_few_classes(classes, version, monkeypatch):
    model = Images(classes)
    x, y = model.problem(6)
    distances = model.distances(x, y, "Linf")
    eps = float(distances[distances > 0].median())
    attack = silent(model, eps=eps, version=version)
    members = attack.members

    def quick(n):
        chosen = members(n)
        for a in chosen.values():
            a.settings = a.settings.__class__(**{**vars(a.settings), "steps": 20})
        return chosen

    monkeypatch.setattr(attack, "members", quick)
    result = attack.run(x, y)
    clear = (distances / eps - 1).abs() > 0.02
    assert torch.equal(result.correct[clear], (distances > eps)[clear])
    with pytest.raises(ValueError, match="apgd-t has 9 targets, the model"):
        silent(model, parity=Parity(few_classes=True)).run(x, y)


def test_what_makes_the_numbers_doubtful_is_said():
    model = Images()
    x, y = model.problem(12)
    eps = float(model.distances(x, y, "Linf").quantile(0.6))
    blind = {"blind": PGD(eps=eps, steps=0, start="none"), "square": Square(eps=eps, queries=400)}
    with pytest.warns(UserWarning, match="Square, which uses no gradients, broke"):
        silent(model, version="custom", attacks=blind).run(x, y)
    with pytest.warns(UserWarning, match="seems to return probabilities"):
        silent(lambda x: model(x).softmax(1), version="custom").run(x, y)


def test_parity_switches():
    net = ConvNet(12).train()
    x, y = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    settings = dict(version="custom", attacks=["apgd-ce"], eps=0.01)
    before, rng = net.body[1].running_mean.clone(), torch.get_rng_state()
    silent(net, **settings).run(x, y)
    assert torch.equal(net.body[1].running_mean, before) and net.training and net.body.training
    assert torch.equal(torch.get_rng_state(), rng)

    silent(net, parity=Parity(keep_modes=True), **settings).run(x, y)
    assert not torch.equal(net.body[1].running_mean, before) and net.training
    silent(net.eval(), parity=Parity(reseed=True), **settings).run(x, y)
    assert not torch.equal(torch.get_rng_state(), rng)
    torch.manual_seed(0)
    torch.rand(0)
    attack = silent(net, parity=Parity.all(), version="plus", eps=0.01).members(20)["apgd-dlr"]
    assert attack.settings.rule.zero_first_check and attack.settings.loss.by_autograd
    assert attack.settings.start == "generator"
    with pytest.raises(ValueError, match=r"reseed needs a seed"):
        silent(net, parity=Parity(reseed=True), seed=None)


def test_awkward_calls(capsys):
    model = Images()
    x, y = model.problem(3)
    attack = AutoAttack(model, eps=0.01, version="custom", attacks=["apgd-ce"], seed=0)
    empty = attack.run(x[:0], y[:0])
    assert empty.x_adv.shape == (0, 3, 4, 4) and empty.correct.shape == (0,)
    plain = attack(x, y)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(attack(x.clone(), y.clone()), plain)
    assert "apgd-ce" in capsys.readouterr().err
    wide = Images().double()
    assert silent(wide, version="custom").run(x.double(), y).x_adv.dtype == torch.float64


def test_refusals():
    model = Images()
    x, y = model.problem(3)
    for settings, message in (
        (dict(version="strong"), "version must be one of standard, plus, rand, custom"),
        (dict(attacks=["square"], version="standard"), 'attacks= belongs to version="custom"'),
        (dict(version="custom", attacks=["pgd"]), "attacks must be one of apgd-ce"),
        (dict(version="custom", attacks=[]), "at least one attack"),
        (dict(eps=8.0), "8 of 255 grey levels"),
        (dict(norm="L7"), "norm must be"),
        (dict(progress="loud"), "progress must be one of auto"),
    ):
        with pytest.raises(ValueError, match=message):
            silent(model, **settings)
    with pytest.raises(TypeError, match="eps must be one float for all samples"):
        silent(model, eps=torch.full((3,), 0.1))
    attack = silent(model, version="custom", attacks=["apgd-ce"])
    with pytest.raises(ValueError, match="labels 0..2"):
        attack.run(x, y + 5)
    with pytest.raises(ValueError, match="must lie in the box"):
        attack.run(x + 3, y)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
        attack.run(x, y, batch_size=0)
    with pytest.raises(ValueError, match='no attack may be called "clean"'):
        silent(model, version="custom", attacks={"clean": PGD()}).run(x, y)

"""State files: the samples that a report covers, and the model and attacks of a state."""

from __future__ import annotations

import functools
import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyadv import _state
from pyadv.attacks import APGD, PGD, AutoAttack
from pyadv.attacks.identity import identity
from pyadv.compat.autoattack import AutoAttack as OfficialAutoAttack
from pyadv.evaluation import Report, evaluate
from pyadv.evaluation.evaluate import Heading, run_attacks


class Net(nn.Module):
    """A small network with one of each kind of attribute that an identity must contain."""

    def __init__(self, slope: float = 0.5, eps: float = 1e-5, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.slope = slope
        self.norm = nn.BatchNorm1d(6, eps=eps)
        self.linear = nn.Linear(6, 3, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(3, 6, generator=generator))
        self.register_buffer("shift", torch.tensor([1, 0, 0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * self.linear(self.norm(x.flatten(1))) + 0.1 * self.shift


def samples(n: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 6, generator=torch.Generator().manual_seed(1))
    return x, Net().eval()(x).argmax(1)


def attack(**settings: object) -> PGD:
    return PGD(**{"eps": 0.1, "alpha": 0.05, "steps": 3, "seed": 0, "loss": "margin", **settings})


def run(
    model: Callable[..., Tensor] | None,
    x: Tensor,
    y: Tensor,
    state: Path | None,
    **settings: object,
) -> Report:
    settings = {"attacks": {"pgd": attack()}, "eps": 0.1, "progress": None, **settings}
    return evaluate(Net() if model is None else model, x, y, state=state, **settings)


def same(a: Report, b: Report) -> None:
    assert a.to_dict() == b.to_dict()
    for ours, theirs in zip(a.rows, b.rows, strict=True):
        assert torch.equal(ours.correct, theirs.correct)
    for ours, theirs in zip(a.findings.examples(), b.findings.examples(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(a.findings.prediction, b.findings.prediction)


def interrupted(x: Tensor, y: Tensor, state: Path, after: int = 2, **settings: object) -> None:
    calls = []

    def stop(*now: object) -> None:
        calls.append(now)
        if len(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(None, x, y, state, progress=stop, **settings)


# --- Samples that a report covers.


@pytest.mark.parametrize(
    "chosen",
    [range(5), range(39, -1, -1), [7, 7, 3, 7], range(20, 50), range(45, 50)],
    ids=["fewer", "reordered", "duplicates", "overlapping", "others"],
)
@pytest.mark.parametrize("kind", ["all samples", "survivors"])
def test_a_report_covers_the_samples_it_was_given(
    tmp_path: Path, chosen: object, kind: str
) -> None:
    x, y = samples(50)
    attacks = {"weak": attack(steps=1, alpha=0.01), "pgd": attack()}
    if kind == "survivors":
        attacks = AutoAttack(Net(), eps=0.1, version="custom", attacks=attacks)
    settings = {"attacks": attacks, "batch_size": 15}
    interrupted(x[:40], y[:40], tmp_path / "state", after=5, **settings)
    rows = torch.tensor(list(chosen))
    found = run(None, x[rows], y[rows], tmp_path / "state", **settings)
    assert found.n == len(rows) == len(found.worst.correct)
    same(found, run(None, x[rows], y[rows], None, **settings))
    if kind == "survivors":
        part = AutoAttack(Net(), eps=0.1, version="custom", attacks=attacks.members(3))
        result = part.run(x[rows], y[rows], state=tmp_path / "state")
        assert torch.equal(result.correct, found.worst.correct)
        assert result.x_adv.shape == x[rows].shape
    # The state still holds the results of other samples.
    seen = []
    run(None, x[:40], y[:40], tmp_path / "state", **settings, progress=lambda *a: seen.append(a))
    assert all(now[0] != "clean" for now in seen)


def test_another_label_makes_another_sample(tmp_path: Path) -> None:
    x, y = samples(12)
    first = run(None, x, y, tmp_path / "state")
    other = run(None, x, (y + 1) % 3, tmp_path / "state")
    assert first["clean"].accuracy == 1 and other["clean"].accuracy == 0
    both = torch.cat([y, (y + 1) % 3])
    same(run(None, x.repeat(2, 1), both, tmp_path / "state"), run(None, x.repeat(2, 1), both, None))


def test_duplicates_are_attacked_once_and_counted_as_often_as_given() -> None:
    x, y = samples(4)
    rows, seen = torch.tensor([0, 1, 1, 2, 1]), []
    attacks = {"pgd": attack(eps=0.9, alpha=0.5)}
    progress = lambda *now: seen.append(now)  # noqa: E731
    found = run(None, x[rows], y[rows], None, attacks=attacks, eps=0.9, progress=progress)
    assert [now[2] for now in seen] == [3, 3]
    single = run(None, x, y, None, attacks=attacks, eps=0.9)
    assert torch.equal(found["pgd"].correct, single["pgd"].correct[rows])
    at, x_adv = found.findings.examples()
    where, examples = single.findings.examples()
    assert len(at) > 1 and torch.equal(at, torch.isin(rows, where).nonzero()[:, 0])
    for i, example in zip(at.tolist(), x_adv, strict=True):
        assert torch.equal(example, examples[(where == rows[i]).nonzero()[0, 0]])


# --- Model and attacks of a state.


class Scaled(nn.Module):
    """A wrapper with the same parameters and buffers as the model that it wraps."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * torch.tensor([1.0, 2.0, 3.0])


def plain_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def other_loss(logits: Tensor, y: Tensor) -> Tensor:
    return -F.softmax(logits, 1).gather(1, y[:, None])[:, 0]


def first_output(result: Tensor) -> Tensor:
    return result


def reversed_output(result: Tensor) -> Tensor:
    return result.flip(1)


def integer_buffer() -> Net:
    net = Net()
    net.shift[1] = 4
    return net


def frozen_view(net: nn.Module) -> nn.Module:
    """Return a module of the same type with a hook that changes the logits."""
    net.register_forward_hook(double_logits)
    return net


def double_logits(module: nn.Module, inputs: object, logits: Tensor) -> Tensor:
    return 2 * logits


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: Net(slope=0.25), "model.slope"),
        (lambda: Net(eps=1e-3), "model.norm.eps"),
        (integer_buffer, "model.shift"),
        (lambda: Net(seed=1), "model.linear.weight"),
        (lambda: Scaled(Net()), "model"),
        (lambda: frozen_view(Net()), "model._forward_hooks"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, other: Callable, named: str) -> None:
    x, y = samples(10)
    run(None, x, y, tmp_path / "state")
    kept = (tmp_path / "state").read_bytes()
    with pytest.raises(ValueError, match=f"holds an evaluation with another {named}"):
        run(other(), x, y, tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == kept


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ({"eps": 0.1}, {"eps": 0.1000001}, "eps"),
        ({"eps": torch.full((6,), 0.1)}, {"eps": torch.full((6,), 0.2)}, "eps"),
        ({"loss": plain_loss}, {"loss": other_loss}, "loss.loss"),
        ({"lo": 0.0}, {"lo": -1.0}, "lo"),
        ({"output": first_output}, {"output": reversed_output}, "output"),
        ({"steps": 3}, {"steps": 4}, "steps"),
        ({"restarts": 1}, {"restarts": 2}, "restarts"),
        ({"targeted": False}, {"targeted": True}, "loss.targeted"),
        ({"keep": 0.2}, {"keep": 0.3}, "keep"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, one: dict, other: dict, named: str) -> None:
    x, y = samples(6)
    per_channel = lambda s: {  # noqa: E731
        k: v.view(1, 6) if isinstance(v, Tensor) else v for k, v in s.items()
    }
    first, second = ({"pgd": attack(**per_channel(s))} for s in (one, other))

    def measure(attacks: dict, state: Path | None) -> Report:  # also what fits no report
        heading = Heading("Linf", 0.1, 0.0, 1.0)
        return run_attacks(Net(), x, y, heading, attacks, batch_size=9, state=state, progress=None)

    measure(first, tmp_path / "state")
    same(measure(first, tmp_path / "state"), measure(first, None))
    with pytest.raises(ValueError, match=rf"an evaluation with another .*pgd\.{named}: "):
        measure(second, tmp_path / "state")


def test_a_changed_attack_is_another_one_and_a_rebuilt_one_the_same(tmp_path: Path) -> None:
    x, y = samples(6)
    run(None, x, y, tmp_path / "state", attacks={"pgd": attack()})
    changed = PGD(eps=0.3, alpha=0.05, steps=3, seed=0, loss="margin")
    changed.eps = 0.1
    same(run(None, x, y, tmp_path / "state", attacks={"pgd": changed}), run(None, x, y, None))
    changed.steps = 4
    with pytest.raises(ValueError, match=r"another .*pgd\.steps"):
        run(None, x, y, tmp_path / "state", attacks={"pgd": changed})


def test_another_box_is_another_evaluation(tmp_path: Path) -> None:
    x, y = samples(6)
    run(None, x, y, tmp_path / "state", attacks={})
    with pytest.raises(ValueError, match=r"another clean\.lo"):
        run(None, x, y, tmp_path / "state", attacks={}, lo=-1.0)


def test_the_order_and_kind_of_attacks_matter(tmp_path: Path) -> None:
    x, y = samples(6)
    run(None, x, y, tmp_path / "state", attacks={"a": attack(), "b": attack()})
    for attacks in ({"b": attack(), "a": attack()}, {"a": attack()}):
        with pytest.raises(ValueError, match="with another attacks: "):
            run(None, x, y, tmp_path / "state", attacks=attacks)
    with pytest.raises(ValueError, match="with another a: pyadv.PGD, now pyadv.APGD"):
        run(None, x, y, tmp_path / "state", attacks={"a": APGD(eps=0.1, seed=0), "b": attack()})


class Counting(Net):
    """A model whose forward pass moves a counter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        return super().forward(x)


class Parallel(nn.parallel.DistributedDataParallel):
    """A stand-in for a parallel wrapper, in one process."""

    def __init__(self, module: nn.Module):
        nn.Module.__init__(self)
        self.module = module


@pytest.mark.parametrize(
    "same_model",
    [
        Net,
        lambda: Net().train(),
        lambda: Parallel(Net()),
        lambda: nn.DataParallel(Net()),
        lambda: torch.compile(Net(), backend="eager"),
        lambda: Parallel(torch.compile(Net(), backend="eager")),
        lambda: Net().requires_grad_(False),
    ],
    ids=["again", "train mode", "DDP", "DataParallel", "compiled", "DDP of compiled", "frozen"],
)
def test_what_changes_no_answer_is_left_out(tmp_path: Path, same_model: Callable) -> None:
    x, y = samples(12)
    interrupted(x, y, tmp_path / "state", after=1, batch_size=8)
    same(run(same_model(), x, y, tmp_path / "state"), run(None, x, y, None))


def test_counters_that_a_pass_moves_are_left_out(tmp_path: Path) -> None:
    x, y = samples(12)
    model = Counting()
    expected = run(Counting(), x, y, None)
    run(model, x[:4], y[:4], tmp_path / "state")
    assert model.calls > 1
    same(run(model, x, y, tmp_path / "state"), expected)
    same(run(Counting(), x, y, tmp_path / "state"), expected)


def test_settings_that_only_change_the_speed_are_left_out(tmp_path: Path) -> None:
    x, y = samples(12)
    run(None, x[:5], y[:5], tmp_path / "state", attacks={"pgd": attack(validate=False)})
    quick = {"pgd": attack(compact=True, graph=False)}
    seen = []
    run(None, x[:5], y[:5], tmp_path / "state", attacks=quick, progress=lambda *a: seen.append(a))
    assert not seen


# --- Callables without an identity.


def local_function() -> Callable[[Tensor], Tensor]:
    net = Net().eval()

    def model(x: Tensor) -> Tensor:
        return net(x)

    return model


def local_object() -> Callable[[Tensor], Tensor]:
    class Model:
        def __call__(self, x: Tensor) -> Tensor:
            return local_function()(x)

    return Model()


def with_lambda() -> nn.Module:
    net = Net()
    net.activation = lambda x: x
    return net


@pytest.mark.parametrize(
    "make",
    [
        local_function,
        local_object,
        with_lambda,
        lambda: lambda x: Net().eval()(x),
        lambda: functools.partial(lambda net, x: net(x), Net().eval()),
    ],
    ids=["local function", "local object", "attribute", "lambda", "partial"],
)
def test_a_callable_without_an_identity_needs_a_name(tmp_path: Path, make: Callable) -> None:
    x, y = samples(6)
    state, model = tmp_path / "state", make()
    asked = []

    def counted(*now: object) -> None:
        asked.append(now)

    with pytest.raises(ValueError, match=r"state needs state_name=: model"):
        run(model, x, y, state, progress=counted)
    assert not asked and not state.exists()
    expected = run(None, x, y, None)
    same(run(model, x, y, None), expected)  # without a state the callable needs no name
    same(run(model, x, y, state, state_name="mine"), expected)
    same(run(make(), x, y, state, state_name="mine"), expected)
    with pytest.raises(ValueError, match="with another state_name: 'mine', now 'yours'"):
        run(make(), x, y, state, state_name="yours")


def test_names_in_autoattack_and_compat(tmp_path: Path) -> None:
    x, y = samples(5)
    settings = {"eps": 0.1, "version": "custom", "attacks": ["apgd-ce"]}
    ours = AutoAttack(local_function(), seed=0, progress=None, **settings)
    settings["attacks_to_run"] = settings.pop("attacks")
    theirs = OfficialAutoAttack(local_function(), seed=0, verbose=False, **settings)
    methods = (
        (ours.run, "state"),
        (ours.run_standard_evaluation, "state_path"),
        (theirs.run_standard_evaluation, "state_path"),
    )
    for i, (method, keyword) in enumerate(methods):
        state = tmp_path / f"state {i}"
        with pytest.raises(ValueError, match="state needs state_name=: model is the local funct"):
            method(x, y, **{keyword: state})
        method(x, y, **{keyword: state}, state_name="net")
        assert state.exists()
    loss = {"pgd": attack(loss=lambda z, y: plain_loss(z, y))}
    with pytest.raises(
        ValueError, match=r"state_name=: attacks\.pgd\.settings\.loss\.loss is a la"
    ):
        run(None, x, y, tmp_path / "loss", attacks=loss)
    with pytest.raises(ValueError, match="state_name must be a string that is not empty, got ''"):
        run(None, x, y, tmp_path / "loss", state_name="")


def test_functions_of_modules_are_known_by_name_and_body() -> None:
    assert "torch.cross_entropy" in identity({"f": F.cross_entropy})["f"]
    one, other = (identity({"f": f})["f"] for f in (plain_loss, other_loss))
    assert one != other and one == identity({"f": plain_loss})["f"]
    bound = functools.partial(plain_loss, y=torch.zeros(2))
    assert identity({"f": bound}) != identity({"f": functools.partial(plain_loss, y=torch.ones(2))})


class Odd(Net):
    """A model with attributes of many kinds, some of which refer back to it."""

    def __init__(self) -> None:
        super().__init__()
        self.itself, self.method = [self], self.forward
        self.lock, self.log, self.draws = threading.Lock(), logging.getLogger("x"), random.Random(0)
        self.device, self.kind, self.table = "cuda:1", nn.ReLU, {"b": {1, 2}, "a": np.eye(2)}
        self.function, self.layer = torch.relu, functools.partial(nn.LayerNorm, eps=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        Odd,
        lambda: torch.jit.script(nn.Sequential(nn.Identity(), nn.ReLU())),
        lambda: torch.jit.freeze(torch.jit.script(nn.Sequential(nn.ReLU()).eval())),
        lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Identity(), nn.ReLU())),
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3, bias=False)),
        lambda: nn.LazyLinear(3),
        lambda: nn.TransformerEncoderLayer(4, 1),
        lambda: nn.Linear(2, 2, dtype=torch.complex64),
        lambda: nn.Linear(2, 2, dtype=torch.bfloat16),
        lambda: nn.Linear(2, 2, device="meta"),
    ],
)
def test_modules_of_every_kind_have_an_identity(make: Callable[[], nn.Module]) -> None:
    entries = []
    for _ in range(2):
        torch.manual_seed(0)
        entries.append(identity({"model": make()}))
    assert entries[0] == entries[1]


def test_the_names_of_our_classes_hold_no_files() -> None:
    entries = identity({"attack": attack(), "model": Net()})
    words = " ".join([*entries, *entries.values()])
    assert "pyadv.PGD" in words and "torch.BatchNorm1d" in words
    assert not any(f"pyadv.{p}." in words for p in ("attacks", "engine", "passes", "ops"))
    assert "torch.nn" not in words


# --- Logits show changes that no identity shows.

SECRET = 1.0


class Global(nn.Module):
    """A model that depends on a global variable, which is not part of the module."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :3] - 0.5) * torch.tensor([SECRET, 1.0, 1.0])


def test_logits_are_compared_on_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = samples(20)
    y = Global()(x).argmax(1)
    run(Global(), x[:10], y[:10], tmp_path / "state")
    # the rounding of another machine changes less than this
    monkeypatch.setitem(globals(), "SECRET", 1.001)
    run(Global(), x[:10], y[:10], tmp_path / "state")
    monkeypatch.setitem(globals(), "SECRET", 1.2)
    kept = (tmp_path / "state").read_bytes()
    with pytest.raises(ValueError, match=r"a model with other logits: for the sample at \d"):
        run(Global(), x, y, tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == kept
    run(Global(), x[10:], y[10:], tmp_path / "state")  # none of these is in the state


class Noisy(Net):
    """A model that adds random noise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(len(x), 3)


def test_random_models_are_exempt_with_a_note(tmp_path: Path) -> None:
    x, y = samples(30)
    first = run(Noisy(), x, y, tmp_path / "state")
    assert first.notes == ()
    again = run(Noisy(), x, y, tmp_path / "state")
    (note,) = again.notes
    assert "The model is random" in note and note in str(again)
    assert again.to_dict()["notes"] == [note]
    assert "The model is random" in again.to_markdown()
    assert torch.equal(again.worst.correct, first.worst.correct)


def test_states_of_the_old_format_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    x, y = samples(5)
    state = tmp_path / "state"
    _state.save(state, {"identity": {}, "findings": {}}, "evaluation", 1)
    with pytest.raises(ValueError, match="of the earlier format 1: it does not say which labels"):
        run(None, x, y, state)
    _state.save(state, {"identity": {}}, "evaluation", 2)
    with pytest.raises(ValueError, match="cannot be read as a saved evaluation"):
        run(None, x, y, state)
    state.unlink()
    run(None, x, y, state)
    state.write_bytes(state.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot be read as a saved evaluation"):
        run(None, x, y, state)

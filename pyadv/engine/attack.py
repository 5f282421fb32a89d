"""The base of all attacks: what their callers see, restarts, keyed noise, state."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from pyadv import ops
from pyadv.engine import checks
from pyadv.engine.graphs import Graphs
from pyadv.engine.loop import judge, search
from pyadv.engine.results import AttackResult, Perturbed
from pyadv.engine.settable import Settable, Setting
from pyadv.engine.starts import Noise
from pyadv.engine.task import GradientSettings, LoopSettings, Model, Settings, Task
from pyadv.menus import AUTO, BATCH_NORM_MODES, SPEEDS, Auto
from pyadv.passes.borrow import check_output, unwrap
from pyadv.passes.view import FastView, attacked


@dataclass(frozen=True)
class Plan:
    """How one batch is attacked.

    Attributes:
        task: the batch, as the first attempt attacks it.
        attempts: how often each sample is attacked.
        targets: (attempts B,) classes, attempt by attempt, for a loss that leads to one.
        queries: forward passes that the plan has cost.
    """

    task: Task
    attempts: int
    targets: Tensor | None = None
    queries: int = 0

    def part(self, first: int, last: int) -> Task:
        """Return attempts first .. last - 1 at all samples as one batch."""
        task, b = self.task, len(self.task.x)
        rows = torch.arange(first * b, last * b, device=task.x.device)
        sample = rows % max(b, 1)
        noise = task.noise.restarted(self.attempts)
        return replace(
            task.select(sample),
            noise=replace(noise, ids=noise.ids[rows]),
            target=None if self.targets is None else self.targets[rows],
            group=sample,
        )


# The models whose logits an attack has been warned about, or would have been.
_LOOKED_AT: WeakKeyDictionary[Attack, WeakSet[Any]] = WeakKeyDictionary()
_SIZES_OF_STEPS = {"eps", "alpha", "steps"}


class Attack(Settable):
    """The base of attacks; each says by its `Settings` what it searches for.

    `attack(x, y)` returns x_adv; `attack.run(x, y)` also says how it ended, for one forward pass
    more. The model's modes, BatchNorm statistics, `.grad` and `requires_grad` are afterwards as
    they were, also when the model raises; with keyed starts so is torch's generator. The model and
    the data are never moved.

    Settings are attributes: `attack.eps = 0.1` checks the value and takes effect, together with all
    that follows from it, and `attack.with_(eps=0.1)` returns a changed copy. See `Settable`.

    A subclass with a loop of its own overrides `_search`; one that chooses targets or attempts
    overrides `_plan` and `attempts`.

    Args:
        model: anything that maps x to logits (B, C); may be None when every call names a model.
        settings: of the search; `LoopSettings` for the loop of the engine.
        restarts: attempts at each sample, from different starts.
        seed: of the keyed noise; torch.initial_seed() by default.
        graph: whether to record the steps as CUDA graphs: "auto", True or False.

    Attributes:
        graphs: the recordings: how many there were, and why the last call was not a replay.
        draw: the number of the next draw of keyed noise.
        norm, eps, steps, ...: the settings in effect.
    """

    norm = Setting("settings.norm")
    eps = Setting("settings.eps")
    steps = Setting("settings.steps")
    start = Setting("settings.start")
    targeted = Setting("settings.loss.targeted")
    lo = Setting("settings.lo")
    hi = Setting("settings.hi")
    bn = Setting("settings.bn")
    update_stats = Setting("settings.update_stats")
    compact = Setting("settings.compact")
    output = Setting("settings.output")
    validate = Setting("settings.validate")
    speed = Setting("settings.speed")
    graph = Setting("graphs.mode")

    def __init__(
        self,
        model: Model | None,
        settings: Settings,
        restarts: int = 1,
        seed: int | None = None,
        graph: Auto = False,
    ):
        s = settings
        checks.flag("update_stats", s.update_stats)
        for name in s.sizes:
            checks.size(name, getattr(s, name))
        checks.box(s.norm, s.eps, s.lo, s.hi)
        checks.count("steps", s.steps, 0)
        if isinstance(s, LoopSettings):
            checks.count("eot", s.eot, 1)
        checks.choice("bn", s.bn, BATCH_NORM_MODES)
        checks.choice("compact", s.compact, AUTO)
        checks.choice("validate", s.validate, AUTO)
        checks.choice("speed", s.speed, SPEEDS)
        checks.choice("graph", graph, AUTO)
        check_output(s.output)
        self.model = model
        self.settings = settings
        self.restarts = checks.count("restarts", restarts, 1)
        self.seed = None if seed is None else checks.seed(seed)
        self.graphs = Graphs(graph)
        self.draw = 0

    def __copy__(self) -> Attack:
        """Return an attack with the same settings and model, without recordings."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, graphs=copy(self.graphs))
        return new

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return adversarial examples for x (B, ...) with labels y (B,)."""
        return self.perturb(x, y, ids).x_adv

    def perturb(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        draw: int | None = None,
        model: Model | None = None,
    ) -> Perturbed:
        """Return x_adv and what was learned on the way (kappa). Arguments as in `run`."""
        plan = self._plan(self._task(x, y, ids, draw, model))
        if plan.attempts == 1:
            found = self._find(replace(plan.task, target=plan.targets))
        else:
            best = self._best_of(plan)
            found = Perturbed(*(getattr(best, f.name) for f in fields(Perturbed)))
        found.queries += plan.queries
        return found

    def run(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        draw: int | None = None,
        model: Model | None = None,
    ) -> AttackResult:
        """Attack, and ask the model how it ended.

        Args:
            x: (B, ...) inputs in the box.
            y: (B,) int64 labels; the targets when `targeted`.
            ids: (B,) int64 sample ids for the keyed noise; a hash of each row of x by default.
            draw: which draw of the keyed noise; by default the attack's own counter, which every
                call advances.
            model: attack this model instead of the one given at construction.
        """
        plan = self._plan(self._task(x, y, ids, draw, model))
        if plan.attempts == 1:
            task = replace(plan.task, target=plan.targets)
            result = judge(task, self._find(task))
        else:
            result = self._best_of(plan)
        result.queries += plan.queries
        self._warn_of_probabilities(plan.task.model, result.logits)
        return result

    def attempts(self, classes: int) -> int:
        """Return how many attempts at each sample run as one batch, for a model with so many
        classes."""
        return self.restarts

    def describe(self) -> str:
        """Return one line that lets a reader repeat the attack."""
        s = self.settings
        eot = s.eot if isinstance(s, LoopSettings) else 1
        return ", ".join(
            [
                self._ball_words(),
                *self._search_words(),
                *(["targeted"] if s.loss.targeted else []),
                *([f"{show(s.start)} start"] if s.start != "none" else []),
                *([f"{self.restarts} restarts"] if self.restarts > 1 else []),
                *([f"{eot} gradients a step"] if eot > 1 else []),
                *([f"speed {s.speed}"] if s.speed != "exact" else []),
            ]
        )

    def _ball_words(self) -> str:
        """Return what `describe` says of where the attack looks."""
        return f"{self.settings.norm} {show(self.settings.eps)}"

    def _search_words(self) -> list[str]:
        """Return what `describe` says of steps and loss."""
        return [f"{self.settings.steps} steps"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.describe()}\n{self._about()}"

    def _about(self) -> str:
        """Return the model's class, the seed and the next draw in words."""
        model = "none" if self.model is None else type(unwrap(self.model)).__name__
        seed = "torch's" if self.seed is None else self.seed
        return f"model {model}, seed {seed}, draw {self.draw}"

    def state_dict(self) -> dict[str, int]:
        """Return what the keyed noise of later calls depends on."""
        return {"draw": self.draw}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.draw = int(state["draw"])

    def _change(self, changes: dict[str, Any]) -> None:
        graphs = self.graphs  # compare settings, so recordings stay right
        super()._change(changes)
        if "graph" not in changes:
            self.graphs = graphs

    def _settled(self, changes: dict[str, Any] | None) -> None:
        """Warn of a step size that the caller has chosen and that cannot cross half of the ball."""
        s, given = self.settings, vars(self)["_arguments"][1]
        if not isinstance(s, GradientSettings) or given.get("alpha") is None:
            return
        if changes is not None and not _SIZES_OF_STEPS & changes.keys():
            return
        if callable(s.start):  # which may lie anywhere, as where a search is continued
            return
        numbers = isinstance(s.alpha, (int, float)) and isinstance(s.eps, (int, float))
        if numbers and s.steps and s.steps * s.alpha < s.eps / 2:
            warnings.warn(
                f"{type(self).__name__}: {s.steps} steps of alpha = {s.alpha:.4g} reach "
                f"{s.steps * s.alpha:.4g}, less than half of eps = {s.eps:.4g}; leave alpha out "
                "for one that follows eps and steps",
                stacklevel=3 if changes is None else 5,
            )

    def _warn_of_probabilities(self, model: Model, logits: Tensor) -> None:
        """Warn if the model seems to return probabilities, once for each model. This reads values,
        so it waits for a GPU the first time; validate=False leaves it out."""
        if self.settings.validate is False or torch.compiler.is_compiling():
            return
        if logits.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        known = _LOOKED_AT.setdefault(self, WeakSet())
        model = getattr(unwrap(model), "__self__", unwrap(model))  # a bound method does not last
        try:
            if model in known:
                return
            known.add(model)
        except TypeError:  # no weak reference, or no hash: it may be warned about again
            pass
        checks.warn_of_probabilities(logits)

    def _plan(self, task: Task) -> Plan:
        return Plan(task, self.restarts)

    @property
    def _by_verdict(self) -> bool:
        """Whether the search stops, or picks its result, by what the model answers."""
        s = self.settings
        return isinstance(s, LoopSettings) and s.best in ("fooled", "nearest")

    def _find(self, task: Task) -> Perturbed:
        """Search on the network that `speed` chooses. Samples that have fooled the view and not the
        model are searched again on the model."""
        s = task.settings
        with attacked(task.model, task.x, s.speed, s.bn, s.output) as view:
            on_view = replace(task, model=view)
            found = self._search(on_view)
            if not (isinstance(view, FastView) and self._by_verdict):
                return found
            fooled = ~judge(on_view, found).correct
        again = (fooled & judge(task, found).correct).nonzero()[:, 0]
        found.queries += 2
        if len(again):
            more = self._search(task.select(again))
            for f in fields(Perturbed):
                total, value = getattr(found, f.name), getattr(more, f.name)
                total[again] = value if f.name in ("x_adv", "kappa") else total[again] + value
        return found

    def _search(self, task: Task) -> Perturbed:
        return search(task, self.graphs)

    def _best_of(self, plan: Plan) -> AttackResult:
        """Make all attempts, as one batch where memory and BatchNorm allow; return the best."""
        n = plan.attempts

        def attempts(first: int, last: int) -> AttackResult:
            task = plan.part(first, last)
            return judge(task, self._find(task))

        try:
            if plan.task.settings.bn == "eval":  # batch statistics belong to the batch as it is
                return _best(attempts(0, n), n)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        return _best(_concatenate([attempts(r, r + 1) for r in range(n)]), n)

    def _task(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None,
        draw: int | None,
        model: Model | None,
    ) -> Task:
        """Check the arguments of a call; return its task, and advance the counter of draws."""
        s = self.settings
        model = self.model if model is None else model
        if model is None:
            raise ValueError("attack: no model; give one at construction or as model=")
        checks.batch(x, y, ids)
        checks.parameters(x, s.parameters)
        if draw is None:
            draw = self.draw
            self.draw += 1
        draw = checks.integer("draw", draw)
        if ids is None:
            ids = ops.row_hash(x) if self._draws_noise else torch.zeros_like(y)
        seed = torch.initial_seed() if self.seed is None else self.seed
        return Task(model, x, y, s, Noise.of(ids, seed, draw))

    @property
    def _draws_noise(self) -> bool:
        """Whether the search draws keyed noise."""
        s = self.settings
        return s.start == "keyed" or (isinstance(s, LoopSettings) and s.rule.draws_noise)


def functional(name: str, attack: type[Attack]) -> Callable[..., Tensor]:
    """Return the attack as a function of (model, x, y), with the settings as keywords."""

    def function(
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        ids: Tensor | None = None,
        draw: int = 0,
        **settings: Any,
    ) -> Tensor:
        return attack(model, **settings).perturb(x, y, ids, draw).x_adv

    function.__name__ = function.__qualname__ = name
    function.__doc__ = (
        f"Return adversarial examples by `{attack.__name__}(model, **settings)`. Every call starts "
        "from the same keyed noise; pass `draw` for another."
    )
    return function


def show(value: Any) -> str:
    """Return a setting as `describe` writes it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Tensor):
        return "a size per sample"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return str(value)


def _concatenate(parts: list[AttackResult]) -> AttackResult:
    names = [f.name for f in fields(AttackResult)]
    return AttackResult(**{k: torch.cat([getattr(p, k) for p in parts]) for k in names})


def _best(result: AttackResult, n: int) -> AttackResult:
    """Return the best of n attempts at each sample: one that fooled the model if there is one, and
    among those the one of highest loss."""
    loss = result.loss.nan_to_num(nan=torch.finfo(result.loss.dtype).min).view(n, -1)
    fooled = ~result.correct.view(n, -1)
    candidates = torch.where(fooled | ~fooled.any(0), loss, -torch.inf)
    b = loss.shape[1]
    chosen = candidates.argmax(0) * b + torch.arange(b, device=loss.device)
    best = AttackResult(**{f.name: getattr(result, f.name)[chosen] for f in fields(AttackResult)})
    best.queries = result.queries.view(n, -1).sum(0)
    best.gradients = result.gradients.view(n, -1).sum(0)
    return best

"""What all attacks have in common for their callers: calling, restarts, noise, state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyadv import ops
from pyadv.engine import checks
from pyadv.engine.graphs import GRAPHS, Graphs
from pyadv.engine.loop import judge, search
from pyadv.engine.results import AttackResult, Perturbed
from pyadv.engine.starts import Noise
from pyadv.engine.state import Settings
from pyadv.passes.view import SPEEDS, FastView, attacked

Model = Callable[..., Any]


class Plan(NamedTuple):
    """How one batch is attacked."""

    settings: Settings
    targets: Tensor | None  # of each attempt, (attempts B,), if the loss leads to a class
    attempts: int  # at each sample
    queries: int  # forward passes that the plan has cost


class GradientAttack:
    """The base of the attacks that the engine runs; each says what it searches for by its
    `Settings`.

    `attack(x, y)` returns x_adv; `attack.run(x, y)` also says how it ended, for one forward pass
    more. The model's modes, BatchNorm statistics, `.grad` and `requires_grad` are afterwards as
    they were, also when the model raises; with keyed starts so is torch's generator. The model and
    the data are never moved.
    """

    def __init__(self, model: Model | None, settings: Settings, restarts: int, seed: int | None):
        s = settings
        checks.flag("update_stats", s.update_stats)
        checks.size("eps", s.eps)
        checks.size("alpha", s.alpha)
        checks.box(s.norm, s.eps, s.lo, s.hi)
        checks.count("steps", s.steps, 0)
        checks.count("eot", s.eot, 1)
        checks.choice("bn", s.bn, ("eval", "train", "as_is"))
        checks.choice("compact", s.compact, ("auto", True, False))
        checks.choice("validate", s.validate, ("auto", True, False))
        checks.choice("speed", s.speed, tuple(SPEEDS))
        checks.choice("graph", s.graphs.mode, GRAPHS)
        self.model = model
        self.settings = settings
        self.restarts = checks.count("restarts", restarts, 1)
        self.seed = None if seed is None else checks.seed(seed)
        self.draw = 0

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor | None = None) -> Tensor:
        """Adversarial examples for x (B, ...) with labels y (B,)."""
        return self.perturb(x, y, ids).x_adv

    def perturb(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        draw: int | None = None,
        model: Model | None = None,
    ) -> Perturbed:
        """x_adv and what was learned on the way (kappa). Arguments as in `run`."""
        model, noise = self._begin(x, y, ids, draw, model)
        plan = self._plan(model, x, y)
        if plan.attempts == 1:
            found = self._find(model, x, y, plan.settings, noise, plan.targets)
        else:
            best = self._best_of(model, x, y, plan, noise)
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
        """The attack and how it ended.

        Args:
            x: (B, ...) inputs in the box.
            y: (B,) int64 labels; the targets when `targeted`.
            ids: (B,) int64 sample ids for the keyed noise; a hash of each row of x by default.
            draw: which draw of the keyed noise; by default the attack's own counter, which every
                call advances.
            model: attack this model instead of the one given at construction.
        """
        model, noise = self._begin(x, y, ids, draw, model)
        plan = self._plan(model, x, y)
        s, targets = plan.settings, plan.targets
        if plan.attempts == 1:
            found = self._find(model, x, y, s, noise, targets)
            result = judge(model, x, y, found, s, targets)
        else:
            result = self._best_of(model, x, y, plan, noise)
        result.queries += plan.queries
        return result

    def attempts(self, classes: int) -> int:
        """At each sample of a model with so many classes, run as one batch."""
        return self.restarts

    def describe(self) -> str:
        """One line that lets a reader repeat the attack."""
        s = self.settings
        return ", ".join(
            [
                self._ball_words(),
                *self._search_words(),
                *(["targeted"] if s.loss.targeted else []),
                *([f"{_show(s.start)} start"] if s.start != "none" else []),
                *([f"{self.restarts} restarts"] if self.restarts > 1 else []),
                *([f"{s.eot} gradients a step"] if s.eot > 1 else []),
                *([f"speed {s.speed}"] if s.speed != "exact" else []),
            ]
        )

    def _ball_words(self) -> str:
        """What `describe` says of where the attack looks."""
        return f"{self.settings.norm} {_show(self.settings.eps)}"

    def _search_words(self) -> list[str]:
        """What `describe` says of steps and loss."""
        s = self.settings
        return [f"{s.steps} steps of {_show(s.alpha)}", f"loss {_show(s.loss.loss)}"]

    @property
    def graphs(self) -> Graphs:
        """The steps recorded as CUDA graphs: how many recordings and replays there were, and why
        the last call was not a replay."""
        return self.settings.graphs

    def state_dict(self) -> dict[str, int]:
        """What the keyed noise of later calls depends on."""
        return {"draw": self.draw}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.draw = int(state["draw"])

    def _plan(self, model: Model, x: Tensor, y: Tensor) -> Plan:
        return Plan(self.settings, None, self.restarts, 0)

    @property
    def _by_verdict(self) -> bool:
        """Whether the search stops, or picks its result, by what the model answers."""
        return self.settings.best in ("fooled", "nearest")

    def _find(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        settings: Settings,
        noise: Noise,
        target: Tensor | None,
        group: Tensor | None = None,
    ) -> Perturbed:
        """`_search`, on what stands for the model. Samples that have fooled that alone, and not the
        model, are searched again on the model."""
        s = settings
        with attacked(model, x, s.speed, s.bn, s.output) as view:
            found = self._search(view, x, y, s, noise, target, group)
            if not (isinstance(view, FastView) and self._by_verdict):
                return found
            fooled = ~judge(view, x, y, found, s, target).correct
        again = (fooled & judge(model, x, y, found, s, target).correct).nonzero()[:, 0]
        found.queries += 2
        if len(again):
            noise = replace(noise, ids=noise.ids[again])
            part = (x[again], y[again], s.select(again, x), noise)
            more = self._search(model, *part, None if target is None else target[again])
            for f in fields(Perturbed):
                total, value = getattr(found, f.name), getattr(more, f.name)
                total[again] = value if f.name in ("x_adv", "kappa") else total[again] + value
        return found

    def _search(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        settings: Settings,
        noise: Noise,
        target: Tensor | None,
        group: Tensor | None = None,
    ) -> Perturbed:
        return search(model, x, y, settings, noise, target, group)

    def _best_of(
        self, model: Model, x: Tensor, y: Tensor, plan: Plan, noise: Noise
    ) -> AttackResult:
        """All attempts at each sample, as one batch where memory and BatchNorm allow."""
        settings, targets, n, _ = plan
        b, noise = len(x), noise.restarted(n)

        def attempts(first: int, last: int) -> AttackResult:
            rows = torch.arange(first * b, last * b, device=x.device)
            sample = rows % max(b, 1)
            part = (x[sample], y[sample], settings.select(sample, x))
            t = None if targets is None else targets[rows]
            keyed = replace(noise, ids=noise.ids[rows])
            found = self._find(model, *part, keyed, t, sample)
            return judge(model, *part[:2], found, part[2], t)

        try:
            if settings.bn == "eval":  # batch statistics belong to the batch as it is
                return _best(attempts(0, n), n)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        return _best(_concatenate([attempts(r, r + 1) for r in range(n)]), n)

    def _begin(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None,
        draw: int | None,
        model: Model | None,
    ) -> tuple[Model, Noise]:
        model = self.model if model is None else model
        if model is None:
            raise ValueError("attack: no model; give one at construction or as model=")
        checks.batch(x, y, ids)
        checks.parameters(x, self.settings.parameters)
        if draw is None:
            draw = self.draw
            self.draw += 1
        draw = checks.integer("draw", draw)
        keyed = self.settings.start == "keyed" or self.settings.omega > 0
        if ids is None:
            ids = ops.row_hash(x) if keyed else torch.zeros_like(y)
        seed = torch.initial_seed() if self.seed is None else self.seed
        return model, Noise.of(ids, seed, draw)


def functional(name: str, attack: type[GradientAttack]) -> Callable[..., Tensor]:
    """The attack as a function of (model, x, y), with the settings as keywords."""

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
        f"Adversarial examples by `{attack.__name__}(model, **settings)`, as a function. Without "
        "state of its own it starts from the same keyed noise at every call; pass `draw` for "
        "another."
    )
    return function


def _show(value: Any) -> str:
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
    """Of n attempts, for each sample: one that fooled the model, and of those the highest loss."""
    loss = result.loss.nan_to_num(nan=torch.finfo(result.loss.dtype).min).view(n, -1)
    fooled = ~result.correct.view(n, -1)
    candidates = torch.where(fooled | ~fooled.any(0), loss, -torch.inf)
    b = loss.shape[1]
    chosen = candidates.argmax(0) * b + torch.arange(b, device=loss.device)
    best = AttackResult(**{f.name: getattr(result, f.name)[chosen] for f in fields(AttackResult)})
    best.queries = result.queries.view(n, -1).sum(0)
    best.gradients = result.gradients.view(n, -1).sum(0)
    return best

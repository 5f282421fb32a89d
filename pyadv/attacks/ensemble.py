"""Several attacks on the same samples: batches packed from the samples that still wait for an
attack, what was found kept for each sample, and saved as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyadv import _state, ops
from pyadv.engine import checks
from pyadv.engine.attack import Model
from pyadv.engine.results import AttackResult
from pyadv.passes.borrow import device_of

CLEAN = "clean"  # the name of the first look at each sample, without an attack

Progress = Callable[[str, int, int, int], None]
"""Called as (attack, samples done, samples it has, samples that no attack has broken so far)."""

_SAVE_EVERY = 30.0  # seconds, besides after each attack and at an interruption


class Attack(Protocol):
    """What an ensemble asks of its members."""

    def run(
        self,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        draw: int | None = None,
        model: Model | None = None,
    ) -> AttackResult: ...

    def attempts(self, classes: int) -> int:
        """At each sample, as one batch."""

    def describe(self) -> str:
        """What a reader needs to repeat it."""


class Findings:
    """What is known of the N samples seen so far, on the CPU. Column 0 belongs to the clean
    prediction, column k to attack k of `names`.

    Attributes:
        names: "clean" and the attacks' names, A + 1 in all.
        keys: (N,) int64, a hash of each sample's values.
        y: (N,) int64 labels.
        prediction: (N,) int64, of the example that broke the sample, else of the sample.
        done, broken: (N, A + 1) bool: the attack has had the sample; it fooled the model.
        queries, gradients: (N, A + 1) int64: forward and backward passes.
        classes: of the model; 0 before it was asked.
    """

    def __init__(self, names: Sequence[str]):
        self.names, width = tuple(names), len(names)
        self.keys = self.y = self.prediction = torch.zeros(0, dtype=torch.int64)
        self.done = self.broken = torch.zeros(0, width, dtype=torch.bool)
        self.queries = self.gradients = torch.zeros(0, width, dtype=torch.int64)
        self.classes = 0
        self._examples: list[tuple[Tensor, Tensor]] = []  # rows, and what broke them first

    @property
    def standing(self) -> Tensor:
        """(N,) bool: correctly classified under everything tried so far."""
        return ~self.broken.any(1)

    @property
    def broken_by(self) -> Tensor:
        """(N,) int64: the column that broke the sample first, -1 where none did."""
        return torch.where(self.standing, -1, self.broken.int().argmax(1))

    def examples(self) -> tuple[Tensor, Tensor]:
        """(rows (M,) in rising order, x_adv (M, ...)): the first example that fooled the model, for
        the samples it classifies correctly without an attack."""
        if not self._examples:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        rows, x_adv = (torch.cat(parts) for parts in zip(*self._examples, strict=True))
        order = rows.argsort()
        return rows[order], x_adv[order]

    def extend(self, first: int, keys: Tensor, y: Tensor) -> None:
        """Make room for samples first, first + 1, ...; those attacked already must be the same."""
        known = slice(first, min(first + len(y), len(self.y)))
        here = known.stop - first
        other = (self.keys[known] != keys[:here]) | (self.y[known] != y[:here])
        other &= self.done[known].any(1)
        if other.any():
            at = first + int(other.int().argmax())
            raise ValueError(f"sample {at} is not the one that the saved state was made with")
        self.keys[known], self.y[known] = keys[:here], y[:here]
        new, width = len(y) - here, len(self.names)
        self.keys, self.y = torch.cat([self.keys, keys[here:]]), torch.cat([self.y, y[here:]])
        self.prediction = torch.cat([self.prediction, y.new_full((new,), -1)])
        for name in ("done", "broken", "queries", "gradients"):
            table = getattr(self, name)
            setattr(self, name, torch.cat([table, table.new_zeros((new, width))]))

    def record(self, column: int, rows: Tensor, result: AttackResult) -> None:
        broken = ~result.correct.cpu()
        first = broken & ~self.broken[rows].any(1)
        self.done[rows, column] = True
        self.broken[rows, column] = broken
        self.queries[rows, column] = result.queries.cpu()
        self.gradients[rows, column] = result.gradients.cpu()
        keep = first if column else torch.ones_like(first)
        self.prediction[rows[keep]] = result.logits.argmax(1).cpu()[keep]
        if column and first.any():
            where = first.to(result.x_adv.device)
            self._examples.append((rows[first], result.x_adv[where].cpu()))

    def state_dict(self) -> dict[str, Any]:
        tables = ("keys", "y", "prediction", "done", "broken", "queries", "gradients", "classes")
        rows, x_adv = self.examples()
        return {name: getattr(self, name) for name in tables} | {"rows": rows, "x_adv": x_adv}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        examples = state["rows"], state["x_adv"]
        self._examples = [examples] if len(examples[0]) else []
        for name in state.keys() - {"rows", "x_adv"}:
            setattr(self, name, state[name])


class Ensemble:
    """Attacks that take their turns at samples given chunk by chunk.

    Args:
        model: what is attacked.
        names: of the attacks.
        attacks: number of classes -> the attacks by name.
        clean: an attack of no steps, for the first look.
        survivors: an attack gets only what those before it left standing, packed into full
            batches; otherwise each gets all samples.
        batch_size: rows that go through the model at once; an attack with n attempts at a sample
            gets batch_size / n samples at a time.
        state: a file. What is there already is not done again; what is found is written to it after
            each attack, every half minute, and at an interruption.
        identity: what the state must have been made with; strings by name.
        reseed: seed torch's generator before each batch.
    """

    def __init__(
        self,
        model: Model,
        names: Sequence[str],
        attacks: Callable[[int], Mapping[str, Attack]],
        clean: Attack,
        *,
        survivors: bool,
        batch_size: int,
        state: str | Path | None = None,
        identity: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        reseed: int | None = None,
    ):
        if CLEAN in names:
            raise ValueError(f'no attack may be called "{CLEAN}"')
        checks.count("batch_size", batch_size, 1)
        self.model, self.attacks, self.clean, self.survivors = model, attacks, clean, survivors
        self.batch_size, self.progress, self.reseed = batch_size, progress, reseed
        self.findings = Findings((CLEAN, *names))
        self.first, self.members = 0, None
        self.path = None if state is None else Path(state)
        self.identity, self.saved_at = dict(identity or {}), time.monotonic()
        if self.path is not None:
            self.identity["model"] = _fingerprint(model)
            if self.path.exists():
                self._resume()

    def attack(self, x: Tensor, y: Tensor) -> None:
        """Everything on the next chunk of samples: x (N, ...), y (N,) int64."""
        checks.batch(x, y, None)
        keys = torch.cat([ops.row_hash(part).cpu() for part in x.split(self.batch_size)])
        self.findings.extend(self.first, keys, y.cpu())
        try:
            self._attack(x, y)
        finally:
            self._save()
        self.first += len(y)

    def _attack(self, x: Tensor, y: Tensor) -> None:
        f = self.findings
        self._stage(0, self.clean, 0, x, y)
        if self.members is None:
            attacks = self.attacks(f.classes)
            # The draw stays what it is now, so that every batch has the same one.
            self.members = [(a, getattr(a, "draw", 0)) for a in map(attacks.get, f.names[1:])]
        for column, (attack, draw) in enumerate(self.members, 1):
            self._stage(column, attack, draw, x, y)
            self._save()

    def _stage(self, column: int, attack: Attack, draw: int, x: Tensor, y: Tensor) -> None:
        f, chunk = self.findings, slice(self.first, self.first + len(y))
        waits = ~f.done[chunk, column]
        if column and self.survivors:
            waits &= ~f.broken[chunk, :column].any(1)
        waiting = waits.nonzero()[:, 0]
        if not len(waiting):
            return
        attempts = attack.attempts(f.classes) if column else 1
        device, done = device_of(self.model, x), 0
        for part in waiting.split(max(1, self.batch_size // max(attempts, 1))):
            at, rows = part.to(x.device), part + self.first
            if self.reseed is not None:
                torch.manual_seed(self.reseed)
            ids = f.keys[rows].to(device)
            batch = x[at].to(device), y[at].to(device)
            result = attack.run(*batch, ids=ids, draw=draw, model=self.model)
            if column == 0:
                checks.logits(result.logits, batch[1])
            if not f.classes:
                f.classes = result.logits.shape[1]
                checks.warn_of_probabilities(result.logits)
            f.record(column, rows, result)
            done += len(part)
            if self.progress:
                self.progress(f.names[column], done, len(waiting), int(f.standing.sum()))
            if time.monotonic() - self.saved_at > _SAVE_EVERY:
                self._save()

    def _save(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            state = {"identity": self.identity, "findings": self.findings.state_dict()}
            _state.save(self.path, state, _KIND, _FORMAT)
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        state = _state.load(self.path, _KIND, _FORMAT)
        then = state["identity"]
        for name in sorted(then.keys() | self.identity.keys()):
            if then.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{self.path} holds an evaluation with another {name}: {then.get(name)}, now "
                    f"{self.identity.get(name)}; choose another file for this one"
                )
        self.findings.load_state_dict(state["findings"])


_KIND, _FORMAT = "evaluation", 1


def _fingerprint(model: Model) -> str:
    """Of the weights, so that a state is not continued with others."""
    if not isinstance(model, nn.Module):
        return "not a module"
    values = [v.detach() for v in model.state_dict().values() if v.is_floating_point()]
    words = [ops.row_hash(v.reshape(1, -1)).cpu() for v in values if v.numel()]
    places = range(1, 2 * len(words), 2)  # so that equal tensors in other places count
    return f"{int(sum(w * k for w, k in zip(words, places, strict=True))):x}"

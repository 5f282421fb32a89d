"""Several attacks on the same samples. The samples that still wait for an attack are packed into
full batches; what is found is kept per sample, and saved while the attacks run."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyadv import _state, ops
from pyadv.attacks.identity import identity as _identity
from pyadv.attacks.processes import ALONE, Processes
from pyadv.attacks.progress import Progress
from pyadv.engine import checks
from pyadv.engine.attack import Attack, Model
from pyadv.engine.results import AttackResult
from pyadv.menus import BatchNormMode
from pyadv.passes.borrow import (
    Output,
    borrowed,
    device_of,
    gradients_on,
    owned,
    pick_logits,
    unwrap,
)

CLEAN = "clean"  # the name of the first look at each sample, without an attack
_SAVE_EVERY = 30.0  # seconds, besides after each attack and at an interruption
_NEAR = 1e-2  # how far logits may move between two machines, as a share of the largest, at least 1
_TIED = 1e-3  # two logits this near to each other may change places
_SHOWN = 3  # differences in an error message
SAMPLES = "the samples, which each process must get whole, without a sampler that divides them,"
_PROBED = 8  # samples in the forward pass that shows which counters of the model move


class AttackLike(Protocol):
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
        """Return how many attempts at each sample run as one batch."""

    def describe(self) -> str:
        """Return one line that lets a reader repeat the attack."""


def check_attack(name: str, attack: Any) -> None:
    """Raise TypeError unless `attack` has the methods that an ensemble calls."""
    lacks = [m for m in ("run", "attempts", "describe") if not callable(getattr(attack, m, None))]
    if isinstance(attack, type):
        raise TypeError(f"attacks must hold attack objects, but {name!r} is the class {attack!r}")
    if lacks:
        raise TypeError(
            f"attacks must hold attacks such as PGD(...), but {name!r} is a "
            f"{type(attack).__name__}, which has no {', '.join(lacks)}"
        )


class Findings:
    """What is known of N samples, on the CPU, one row each. Column 0 belongs to the clean
    prediction, column k to attack k of `names`.

    Attributes:
        names: "clean" and the attacks' names, A + 1 in all.
        keys: (N,) int64, a hash of each sample's values.
        y: (N,) int64 labels.
        prediction: (N,) int64, for the example that broke the sample, else for the sample itself.
        logits: (N, C) float32, for the sample itself.
        done, broken: (N, A + 1) bool: the attack has run on the sample; it fooled the model.
        non_finite: (N, A + 1) bool: the attack's logits hold NaN or +inf, which counts as fooled.
        queries, gradients: (N, A + 1) int64: forward and backward passes.
        classes: number of classes of the model; 0 before its first forward pass.
        kind: dtype and shape of a sample; empty before the first one.
    """

    _TABLES: tuple[str, ...] = (
        *("keys", "y", "prediction", "logits", "done", "broken", "non_finite"),
        *("queries", "gradients"),
    )

    def __init__(self, names: Sequence[str]):
        self.names, width = tuple(names), len(names)
        self.keys = self.y = self.prediction = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.logits = torch.zeros(0, 0, device="cpu")
        self.done = self.broken = self.non_finite = torch.zeros(
            0, width, dtype=torch.bool, device="cpu"
        )
        self.queries = self.gradients = torch.zeros(0, width, dtype=torch.int64, device="cpu")
        self.kind = ""
        # Rows, and the examples that broke them first. A selection shares this list.
        self._examples: list[tuple[Tensor, Tensor]] = []
        self._selected: Tensor | None = None

    @property
    def classes(self) -> int:
        return self.logits.shape[1]

    @property
    def standing(self) -> Tensor:
        """(N,) bool: correctly classified under everything tried so far."""
        return ~self.broken.any(1)

    @property
    def broken_by(self) -> Tensor:
        """(N,) int64: the column that broke the sample first, -1 where none did."""
        return torch.where(self.standing, -1, self.broken.int().argmax(1))

    def examples(self) -> tuple[Tensor, Tensor]:
        """Return (rows (M,) in rising order, x_adv (M, ...)): the first example that fooled the
        model, for the samples that it classifies correctly without an attack."""
        if not self._examples:
            return torch.zeros(0, dtype=torch.int64, device="cpu"), torch.zeros(0, device="cpu")
        rows, x_adv = (torch.cat(parts) for parts in zip(*self._examples, strict=True))
        at = torch.full((max(int(rows.max()), int(self._last_row())) + 1,), -1, device="cpu")
        at[rows] = torch.arange(len(rows), device="cpu")
        chosen = at if self._selected is None else at[self._selected]
        found = (chosen >= 0).nonzero()[:, 0]
        return found, x_adv[chosen[found]]

    def select(self, rows: Tensor) -> Findings:
        """Return the findings of these rows, in this order; a row may come more than once."""
        chosen = Findings(self.names)
        for name in self._TABLES:
            setattr(chosen, name, getattr(self, name)[rows])
        chosen.kind, chosen._examples, chosen._selected = self.kind, self._examples, rows
        return chosen

    def _last_row(self) -> int:
        selected = self._selected
        return -1 if selected is None or not len(selected) else int(selected.max())


class _Records(Findings):
    """Findings that grow: one row for each different pair of sample and label."""

    def __init__(self, names: Sequence[str]):
        super().__init__(names)
        self._row_of: dict[tuple[int, int], int] = {}
        self.forget_news()

    def rows(self, keys: Tensor, y: Tensor) -> Tensor:
        """Return the row of each sample (hash, label); samples that are new get new rows."""
        pairs = list(zip(keys.tolist(), y.tolist(), strict=True))
        before = len(self._row_of)
        rows = torch.tensor(
            [self._row_of.setdefault(p, len(self._row_of)) for p in pairs], device="cpu"
        )
        new, width = len(self._row_of) - before, len(self.names)
        if new:
            added = torch.tensor(list(self._row_of)[before:], device="cpu").view(new, 2)
            self.keys, self.y = (
                torch.cat([self.keys, added[:, 0]]),
                torch.cat([self.y, added[:, 1]]),
            )
            self.prediction = torch.cat([self.prediction, added.new_full((new,), -1)])
            unknown = self.logits.new_full((new, self.classes), math.nan)
            self.logits = torch.cat([self.logits, unknown])
            for name in ("done", "broken", "non_finite", "queries", "gradients"):
                table = getattr(self, name)
                setattr(self, name, torch.cat([table, table.new_zeros((new, width))]))
        return rows.long()

    def record(self, column: int, rows: Tensor, result: AttackResult) -> None:
        """Enter what an attack found for these rows, each of which comes once."""
        broken = ~result.correct.cpu()
        first = broken & ~self.broken[rows].any(1)
        logits = result.logits.detach()
        if column == 0:
            self._know_classes(logits.shape[1])
            self.logits[rows] = logits.float().cpu()
        self.done[rows, column] = True
        self.broken[rows, column] = broken
        self.queries[rows, column] = result.queries.cpu()
        self.gradients[rows, column] = result.gradients.cpu()
        non_finite = getattr(result, "non_finite", None)
        if non_finite is not None:
            self.non_finite[rows, column] = non_finite.cpu()
        keep = first if column else torch.ones_like(first)
        self.prediction[rows[keep]] = logits.argmax(1).cpu()[keep]
        if column and first.any():
            where = first.to(result.x_adv.device)
            self._examples.append((rows[first], result.x_adv[where].cpu()))
        self._news.append(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        rows, x_adv = self.examples()
        tables = {name: getattr(self, name) for name in self._TABLES}
        return tables | {"names": self.names, "kind": self.kind, "rows": rows, "x_adv": x_adv}

    def news(self) -> dict[str, Any]:
        """Return the rows that were recorded since `forget_news`, as `state_dict` does."""
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        rows = torch.cat([none, *self._news]).unique()
        chosen = _Records(self.names)
        for name in self._TABLES:
            setattr(chosen, name, getattr(self, name)[rows])
        chosen.kind = self.kind
        for at, x_adv in self._examples[self._examples_told :]:
            among = torch.isin(at, rows)
            if among.any():
                chosen._examples.append((torch.searchsorted(rows, at[among]), x_adv[among]))
        return chosen.state_dict()

    def forget_news(self) -> None:
        """Take everything recorded so far as known to the other processes."""
        self._news: list[Tensor] = []
        self._examples_told = len(self._examples)

    def keep_as_news(self, state: dict[str, Any]) -> None:
        """Count the rows of a state that was merged among the news."""
        self._news.append(self.rows(state["keys"], state["y"]))
        self._examples_told = 0

    def merge(self, state: dict[str, Any]) -> None:
        """Enter what a `state_dict` or `news` holds and these records lack. Work that both hold
        counts once: its outcome is the same."""
        if not len(state["keys"]):
            return
        self.kind = self.kind or state["kind"]
        rows = self.rows(state["keys"], state["y"])
        if state["logits"].shape[1]:
            self._know_classes(state["logits"].shape[1])
        more = state["done"] & ~self.done[rows]
        unbroken = ~self.broken[rows].any(1)
        looked, broke = more[:, 0], unbroken & (more & state["broken"]).any(1)
        self.logits[rows[looked]] = state["logits"][looked]
        predicted = looked | broke
        self.prediction[rows[predicted]] = state["prediction"][predicted]
        for name in ("broken", "non_finite", "queries", "gradients", "done"):
            table = getattr(self, name)
            table[rows] = torch.where(more, state[name], table[rows])
        kept = broke[state["rows"]]
        if kept.any():
            self._examples.append((rows[state["rows"][kept]], state["x_adv"][kept]))

    def _know_classes(self, classes: int) -> None:
        if not self.classes:
            self.logits = torch.full((len(self.keys), classes), math.nan, device="cpu")


class Ensemble:
    """Attacks that run one after the other on samples given chunk by chunk.

    A sample is known by its values and its label. Equal samples are attacked once and counted as
    often as they are given; `findings` has exactly the samples given so far, whatever else the
    state holds.

    Args:
        model: the model to attack.
        names: names of the attacks.
        attacks: number of classes -> the attacks by name.
        clean: an attack of no steps, for the first look.
        survivors: an attack gets only what those before it left standing, packed into full
            batches; otherwise each gets all samples.
        batch_size: rows that go through the model at once; an attack with n attempts at a sample
            gets batch_size / n samples at a time.
        state: a file. Work that it holds is not done again; findings are written to it after each
            attack, every half minute, and at an interruption.
        described: the attacks by name, whose settings a state must have been made with.
        identity: what else the answers depend on, besides the model, by name.
        state_name: the user's name for callables without an identity.
        progress: called after each batch.
        reseed: seed torch's generator before each batch.
        as_is: the model keeps its modes, so its answers may depend on the batch.
        processes: those that work on the samples together, all given the same chunks. Each
            attack's samples are divided among them anew. Process 0 keeps `state`; the others keep
            what process 0 has not saved yet in files beside it, which any number of processes
            continues.

    Raises:
        ValueError: for names, batch_size, and a state that was made with another identity or needs
            a `state_name`; for settings that differ between the processes.
    """

    def __init__(
        self,
        model: Model,
        names: Sequence[str],
        attacks: Callable[[int], Mapping[str, AttackLike]],
        clean: Attack,
        *,
        survivors: bool,
        batch_size: int,
        state: str | Path | None = None,
        described: Mapping[str, AttackLike] | None = None,
        identity: Mapping[str, Any] | None = None,
        state_name: str | None = None,
        progress: Progress | None = None,
        reseed: int | None = None,
        as_is: bool = False,
        processes: Processes = ALONE,
    ):
        if CLEAN in names:
            raise ValueError(f'no attack may be called "{CLEAN}"')
        checks.count("batch_size", batch_size, 1)
        self.model, self.attacks, self.clean, self.survivors = model, attacks, clean, survivors
        self.batch_size, self.progress, self.reseed = batch_size, progress, reseed
        self.members: list[tuple[AttackLike, int]] | None = None
        self.notes: list[str] = []
        self._records = _Records((CLEAN, *names))
        self._given: list[Tensor] = []  # the rows of the samples given so far
        path = None if state is None else Path(state)
        parts = {"attacks": tuple(names), "survivors": survivors, "clean": clean}
        parts |= {f"attacks.{name}": attack for name, attack in (described or {}).items()}
        parts |= identity or {}
        self._processes = processes
        given = {**parts, "batch_size": batch_size, "state": path is not None}
        processes.compare("the settings of an evaluation", given)
        self._file = None if path is None else _StateFile(path, model, parts, state_name, processes)
        self._unchecked = torch.zeros(
            0, dtype=torch.bool, device="cpu"
        )  # rows that came from the file
        self._as_is, self._saved_at = as_is, time.monotonic()
        if self._file is not None:
            self._load(self._file)

    @property
    def findings(self) -> Findings:
        """The samples given so far, in the order given."""
        return self._records.select(self._rows_given())

    def attack(self, x: Tensor, y: Tensor) -> None:
        """Run everything on the next chunk of samples: x (N, ...), y (N,) int64."""
        checks.batch(x, y, None)
        f, kind = self._records, f"{x.dtype} {list(x.shape[1:])}".removeprefix("torch.")
        if f.kind not in ("", kind):
            raise ValueError(f"x must hold samples as before, {f.kind}, got {kind}")
        f.kind = kind
        keys = torch.cat([ops.row_hash(part).cpu() for part in x.split(self.batch_size)])
        self._processes.compare(SAMPLES, {"x": kind, "values of x": keys, "y": y.cpu()})
        rows = f.rows(keys, y.cpu())
        if self._file is not None and len(rows):
            self._file.check_model(x, self.clean.settings.output, self._as_is)
            self._compare(*_first_of_each(rows), x, y, self._file.path)
        self._given.append(rows)
        try:
            self._attack(*_first_of_each(rows), x, y)
        finally:
            self._save()

    def _load(self, file: _StateFile) -> None:
        """Merge what the files of all processes hold."""
        f = self._records
        for found in file.found if self._processes.rank == 0 else ():
            f.merge(found)
        if not self._processes.alone:
            f.merge(self._processes.first(f.state_dict()))
            mine = file.found if self._processes.rank else []
            for found in self._processes.each(mine):
                f.merge(found)
            f.forget_news()
            for found in mine:  # until process 0 has saved it
                f.keep_as_news(found)
        self._unchecked = f.done[:, 0].clone()

    def _rows_given(self) -> Tensor:
        return (
            torch.cat(self._given)
            if self._given
            else torch.zeros(0, dtype=torch.int64, device="cpu")
        )

    def _attack(self, rows: Tensor, places: Tensor, x: Tensor, y: Tensor) -> None:
        self._stage(0, self.clean, 0, rows, places, x, y)
        if self.members is None:
            attacks = self.attacks(self._records.classes)
            # The draw stays what it is now, so that every batch has the same one.
            names = self._records.names[1:]
            self.members = [(a, getattr(a, "draw", 0)) for a in (attacks[name] for name in names)]
        for column, (attack, draw) in enumerate(self.members, 1):
            self._stage(column, attack, draw, rows, places, x, y)

    def _stage(
        self, column: int, attack: AttackLike, draw: int, rows: Tensor, places: Tensor, *xy: Tensor
    ) -> None:
        """Run one attack on the samples that wait for it: `rows`, which stand in x at `places`.
        Save, and exchange what was found."""
        f, processes = self._records, self._processes
        waits = ~f.done[rows, column]
        if column and self.survivors:
            waits &= ~f.broken[rows, :column].any(1)
        rows, places = processes.part(rows[waits]), processes.part(places[waits])
        attempts = attack.attempts(f.classes) if column else 1
        given, done = self._rows_given(), 0
        for part, result, labels in self._results(attack, draw, rows, places, xy, attempts):
            if column == 0:
                checks.logits(result.logits, labels)
            f.record(column, part, result)
            done += len(part)
            if self.progress:
                standing = int(f.standing[given].sum())
                self.progress(f.names[column], done, len(rows), standing)
            if time.monotonic() - self._saved_at > _SAVE_EVERY:
                self._save()
        if not processes.alone:
            for news in processes.gather(f.news()):
                f.merge(news)
        if not processes.alone or (column and done):
            self._save(together=True)

    def _results(
        self,
        attack: AttackLike,
        draw: int,
        rows: Tensor,
        places: Tensor,
        xy: tuple[Tensor, ...],
        attempts: int = 1,
    ) -> Iterator[tuple[Tensor, AttackResult, Tensor]]:
        """Yield, batch by batch: rows, the attack's result, labels on the model's device."""
        device = device_of(self.model, xy[0])
        size = max(1, self.batch_size // max(attempts, 1))
        for part, at in zip(rows.split(size), places.split(size), strict=True):
            if not len(part):  # torch splits nothing into one empty part
                continue
            if self.reseed is not None:
                torch.manual_seed(self.reseed)
            x, y = (t[at.to(t.device)].to(device) for t in xy)
            ids = self._records.keys[part].to(device)
            yield part, attack.run(x, y, ids=ids, draw=draw, model=self.model), y

    def _compare(self, rows: Tensor, places: Tensor, x: Tensor, y: Tensor, path: Path) -> None:
        """Raise ValueError if the model's logits are not those that the state holds. A model whose
        logits change from pass to pass cannot be compared; the report says so."""
        f = self._records
        self._unchecked = nn.functional.pad(
            self._unchecked, (0, len(f.keys) - len(self._unchecked))
        )
        known = self._unchecked[rows]
        rows, places = rows[known], places[known]
        if not len(rows):
            return
        if self._as_is and _trains(self.model):
            self._note("The model is attacked in training mode, where logits depend on the batch")
            return
        if any(self._processes.gather(self._finds_random(rows, places, x, y, path))):
            self._note("The model is random: two forward passes on one batch differ")
            self._unchecked[:] = False
        self._unchecked[rows] = False

    def _finds_random(self, rows: Tensor, places: Tensor, x: Tensor, y: Tensor, path: Path) -> bool:
        """Compare this process's part with the logits in the state. Return whether they differ
        because the model is random; raise ValueError if they differ otherwise."""
        f, (rows, places) = self._records, map(self._processes.part, (rows, places))
        for part, result, _ in self._results(self.clean, 0, rows, places, (x, y)):
            z = result.logits.float().cpu()
            off = ~_agree(z, f.logits[part])
            if off.any():
                at = places[torch.isin(rows, part)]
                again = self._once_more(x, y, at, part)
                if bool((~_agree(again, z, rounding=True)).any()):
                    return True
                i = int(off.int().argmax())
                raise ValueError(
                    f"{path} holds an evaluation of a model with other logits: for "
                    f"the sample at {int(at[i])} {_shown(f.logits[part[i]])}, now {_shown(z[i])}; "
                    "choose another file for this model, or remove this one"
                )
        return False

    def _once_more(self, x: Tensor, y: Tensor, at: Tensor, rows: Tensor) -> Tensor:
        """Return logits by a second forward pass, without a seed of ours."""
        device = device_of(self.model, x)
        x, y = (t[at.to(t.device)].to(device) for t in (x, y))
        ids = self._records.keys[rows].to(device)
        return self.clean.run(x, y, ids=ids, draw=0, model=self.model).logits.float().cpu()

    def _note(self, reason: str) -> None:
        note = f"{reason}; it was not compared with the logits in the state file."
        if note not in self.notes:
            self.notes.append(note)

    def _save(self, together: bool = False) -> None:
        """Save: process 0 everything, another what process 0 has not saved. `together` follows an
        exchange, after which process 0 saves for all."""
        f, processes, file = self._records, self._processes, self._file
        if file is not None and processes.rank == 0:
            file.save(f.state_dict())
        elif file is not None and not together and len((news := f.news())["keys"]):
            file.save(news)
        if together and not processes.alone:
            if file is not None:
                processes.gather(None)  # process 0 has saved
                if processes.rank:
                    file.remove()
            f.forget_news()
        self._saved_at = time.monotonic()


def state_files(path: Path) -> list[Path]:
    """Return the files of the state `path` that exist: of process 0 and of others."""
    of_another = re.compile(re.escape(path.name) + r"\.process\d+")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    others = sorted(file for file in beside if of_another.fullmatch(file.name))
    return [path] * path.exists() + others


class _StateFile:
    """The file that holds the findings, with the identity of what they were made with.

    Parts of the model that a pass through it moves, such as counters, do not count. Which parts
    these are is known once a pass was made, so the model is compared then, the rest at once.

    Process 0 reads and writes the file `path` and reads those of other processes. Another process
    reads and writes its own.

    Attributes:
        path: the file that this process writes.
        found: the findings in the files that this process reads.
    """

    KIND, FORMAT = "evaluation", 2
    RETIRED = {
        1: "it does not say which labels and which settings its findings belong to, so it cannot "
        "be continued; remove it or choose another file"
    }

    def __init__(
        self,
        path: Path,
        model: Model,
        parts: Mapping[str, Any],
        name: str | None,
        processes: Processes,
    ):
        if name is not None and not (isinstance(name, str) and name):
            raise ValueError(f"state_name must be a string that is not empty, got {name!r}")
        files = state_files(path)
        if processes.rank:
            path = path.with_name(f"{path.name}.process{processes.rank}")
            files = [path] * path.exists()
        mine = {path, *(path.with_name(f"{path.name}.process{i}") for i in range(processes.count))}
        self.path, self.name, self.model = path, name, model
        self._left = [file for file in files if file not in mine]  # by processes that are no more
        self.settings = _identity(parts, name)
        self.of_model = _identity({"model": model}, name)
        self.moved: set[str] | None = None  # not known yet
        self.found: list[dict[str, Any]] = []
        self._then: list[tuple[Path, dict[str, str], set[str]]] = []
        for file in files:
            state = _state.load(file, self.KIND, self.FORMAT, self.RETIRED)
            try:
                self.found.append(state["findings"])
                self._then.append((file, state["model"], set(state["moved"])))
                self._refuse(file, state["identity"], self.settings, set())
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{file} cannot be read as a saved evaluation: {error!r}"
                ) from None

    def check_model(self, x: Tensor, output: Output, as_is: bool) -> None:
        """Raise ValueError if the findings were made with another model; x holds samples to pass
        through it."""
        if self.moved is not None:
            return
        with _passed(self.model, x[:_PROBED], output, as_is):
            now, before = _identity({"model": self.model}, self.name), self.of_model
        self.moved = {k for k in now.keys() | before.keys() if now.get(k) != before.get(k)}
        for _, _, moved in self._then:
            self.moved |= moved
        for file, then, _ in self._then:
            self._refuse(file, then, self.of_model, self.moved)

    def save(self, findings: dict[str, Any]) -> None:
        if self.moved is None:  # nothing was done yet
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        model = {k: v for k, v in self.of_model.items() if k not in self.moved}
        state = {"identity": self.settings, "model": model, "moved": sorted(self.moved)}
        _state.save(self.path, {**state, "findings": findings}, self.KIND, self.FORMAT)
        while self._left:
            self._left.pop().unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the file of this process."""
        self.path.unlink(missing_ok=True)

    def _refuse(
        self, file: Path, then: dict[str, str], now: dict[str, str], moved: set[str]
    ) -> None:
        names = sorted((then.keys() | now.keys()) - moved)
        differences = [
            f"{name.removeprefix('attacks.').replace('.settings.', '.')}: "
            f"{then.get(name, 'none')}, now {now.get(name, 'none')}"
            for name in names
            if then.get(name) != now.get(name)
        ]
        if differences:
            shown = "; ".join(differences[:_SHOWN])
            more = len(differences) - _SHOWN
            raise ValueError(
                f"{file} holds an evaluation with another {shown}"
                f"{f' and {more} more' if more > 0 else ''}; choose another file for this one, or "
                "remove that one"
            )


def _first_of_each(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different rows in the order in which they first come, and where that is."""
    different, inverse = rows.unique(return_inverse=True)
    last = torch.full_like(different, len(rows))
    first = last.scatter_reduce(0, inverse, torch.arange(len(rows), device="cpu"), "amin")
    places, order = first.sort()
    return different[order], places


def _agree(a: Tensor, b: Tensor, rounding: bool = False) -> Tensor:
    """Return (B,) bool: whether logits a and b (B, C) have the same leader and nearly the same
    values, `_NEAR` as a share of the largest; with `rounding`, up to rounding."""
    if a.shape != b.shape:
        return torch.zeros(len(a), dtype=torch.bool, device="cpu")
    scale = torch.where(b.isfinite(), b.abs(), 0.0).amax(1, keepdim=True).clamp(min=1.0)
    share = math.sqrt(torch.finfo(a.dtype).eps) if rounding else _NEAR
    near = ((a == b) | ((a - b).abs() <= share * scale)).all(1)
    lead = b.amax(1) - b.gather(1, a.argmax(1, keepdim=True))[:, 0]  # of b's leader over a's
    return near & ((lead == 0) | (lead <= _TIED * scale[:, 0]))


def _shown(logits: Tensor) -> str:
    first = ", ".join(f"{v:.4g}" for v in logits[:4].tolist())
    return f"({first}{', ...' if len(logits) > 4 else ''})"


def _trains(model: Model) -> bool:
    return isinstance(model, nn.Module) and any(m.training for m in model.modules())


@contextlib.contextmanager
def _passed(model: Model, x: Tensor, output: Output, as_is: bool) -> Iterator[None]:
    """Pass x forward and backward through the model. Inside the context the model is as the pass
    left it; afterwards its buffers are as before. Torch's generators do not move."""
    model, device = unwrap(model), device_of(model, x)
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    saved = [b.clone() for b in buffers]
    devices = [device] if device.type == "cuda" else []
    mode: BatchNormMode = "as_is" if as_is else "eval"
    with torch.random.fork_rng(devices), gradients_on(), borrowed(model, mode):
        leaf = owned(x).to(device, copy=True).requires_grad_()
        logits = pick_logits(model(leaf), output, len(leaf))
        if logits.requires_grad:
            torch.autograd.grad(logits.sum(), leaf, allow_unused=True)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, saved, strict=True):
                buffer.copy_(before)

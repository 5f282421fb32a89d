"""Write docs/benchmarks.md and docs/benchmarks-in-full.md with their pictures, and the pages of
questions that have their own, from the committed results.

python benchmarks/render.py
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from harness import HERE, Row, commit_words, load, quartiles, ratios, time_words, use_checkout
from questions import OWN_PAGES, QUESTIONS, SHOWN

DOCS = HERE.parent / "docs"
_BUSY = 0.5  # load per core above which a machine counts as busy

INTRO = """# Benchmarks

The cost of pyadv against the authors' codes and other libraries, in the three questions that users
ask first. The table names the fastest other code, also where it is faster than pyadv, and the
commit of pyadv that was measured.
"""

MORE = """## Measure it yourself

```bash
pip install --no-deps -r benchmarks/peers.txt     # optional: the libraries to compare with
python benchmarks/run.py                          # half an hour
pyadv bench --quick                               # on an installed pyadv: seconds, tiny cases
```

[The strength of attacks](strength.md) compares what attacks find rather than their time, and
[The methods compared](methods-compared.md) what training methods reach.
[Every benchmark](benchmarks-in-full.md) has how it is measured, the goals, met and missed, every
case where other code is faster, the single ops, and the machines.
"""

IN_FULL = """# Every benchmark

For developers of pyadv: goals, misses and parts. [Benchmarks](benchmarks.md) has the answers that
users ask for. `python benchmarks/render.py` generates both pages from the rows in
`benchmarks/results/`.

How it is measured. A provider whose result differs from the reference is listed as refused and not
timed. The others take turns in one process, in random order. The tables give the median and the
quartiles; ratios are medians over the rounds. The C heap is tuned to keep its pages
(`MALLOC_MMAP_THRESHOLD_` and others, see `benchmarks/harness.py`), because with the default heap
all code that allocates, eager PyTorch above all, is several times slower. Passes are the samples
that went forward and backward through the network; the same wrapper counts them for every provider.
Peak memory counts tensors that were allocated during the call.
"""


def main() -> None:
    use_checkout()
    import front

    parts, devices = [IN_FULL], []
    for folder in _newest(HERE / "results"):
        found = {
            name: load(folder / f"{name}.json")
            for name in SHOWN
            if (folder / f"{name}.json").is_file()
        }
        if found:
            parts += _device(folder.name, found)
            devices.append(found)
    _write("benchmarks-in-full", parts)
    _write("benchmarks", [INTRO, *front.page(devices, DOCS / "images"), MORE])
    for name in OWN_PAGES:
        found = sorted((HERE / "results").glob(f"*-????-??-??/{name}.json"), key=_date)
        if found:
            page = importlib.import_module(name).page(*load(found[-1]))
            _write(name, [page])


def _write(name: str, parts: list[str]) -> None:
    (DOCS / f"{name}.md").write_text("\n".join(parts).rstrip() + "\n")


def _date(path: Path) -> str:
    """Return the date that the name of a results folder ends with."""
    return path.parent.name[-10:]


def _newest(results: Path) -> list[Path]:
    """Return the last folder of each device; the names end with the date."""
    last: dict[str, Path] = {}
    for folder in sorted(results.glob("*-????-??-??")):
        if any((folder / f"{name}.json").is_file() for name in SHOWN):
            last[folder.name[:-11]] = folder
    return list(last.values())


def _device(folder: str, found: dict[str, tuple[dict[str, Any], list[Row]]]) -> list[str]:
    import pictures

    environment = next(iter(found.values()))[0]
    parts = [f"## {environment['device']}\n", _where(environment)]
    on_gpu = "cuda" in environment  # there the goals of the CPU questions do not apply
    asked = found if on_gpu else QUESTIONS
    questions = {name: importlib.import_module(name) for name in asked}
    parts += ["### Goals\n", goals(questions, found)]
    slower = _slower(row for _, rows in found.values() for row in rows)
    if slower:
        parts += ["### Where pyadv is slower\n", slower]
    for name, (e, rows) in found.items():
        module = questions[name]
        clock = "; times are CPU time of one thread" if e.get("clock") == "cpu" else ""
        parts += [f"### {module.TITLE}\n", module.__doc__.strip(), ""]
        took = f", {e['seconds']:.0f} s" if "seconds" in e else ""
        heap = f", {e['heap']} heap" if e["heap"] != environment["heap"] else ""
        network = f" The network: {e['network']}." if "network" in e else ""
        parts.append(f"{_command(name, e)}{took}{commit_words(e)}{heap}{clock}.{network}\n")
        for picture, caption in pictures.draw(name, rows, DOCS / "images", folder):
            parts.append(f"![{caption}](images/{picture})\n")
        parts.append(text(module, rows))
    return parts


def _command(name: str, e: dict[str, Any]) -> str:
    """Return how the rows were measured, in their own words or as a command of today."""
    asked = "gpu_suite.py --only autoattack" if name == "gpu_autoattack" else f"run.py {name}"
    return e.get("how") or f"`python benchmarks/{asked}`"


def _where(e: dict[str, Any]) -> str:
    versions = e.get("peers", {})
    peers = ", ".join(f"{k} {v}" for k, v in versions.items() if v) or "none"
    absent = ", ".join(k for k, v in versions.items() if not v)
    lines = [
        f"{e['processor']}, {e['cores']} cores (load {e['load']} at the start), "
        f"torch {e['torch']}, {_driver(e)}Python {e['python']}, "
        f"pyadv {e['pyadv']}{commit_words(e)}, {e['kernels']} kernels, "
        f"{e['heap']} heap, {e['date']}. Peers: {peers}."
    ]
    if absent:
        lines.append(f"Absent, because they could not be imported: {absent}.")
    if e["load"] and e["load"] > _BUSY * e["cores"]:
        lines.append(
            "**The machine was busy with other work**: wall times are too long, and their ratios "
            "rough."
        )
    return " ".join(lines) + "\n"


def _driver(e: dict[str, Any]) -> str:
    return f"CUDA {e['cuda']}, driver {e['driver']}, " if e.get("cuda") else ""


def goals(questions: dict[str, ModuleType], found: dict[str, Any]) -> str:
    """Return a table of all goals: the bound, the measured value, and whether it is met."""
    lines = ["| goal | threads | bound | measured | |", "|---|---|---|---|---|"]
    for name, module in questions.items():
        rows = found[name][1] if name in found else []
        for goal in getattr(module, "GOALS", []):
            outcomes = {n: goal.outcome(rows, n) for n in sorted({r.threads for r in rows})}
            outcomes = {n: o for n, o in outcomes.items() if o is not None}
            for n, (value, met) in outcomes.items():
                verdict = "met" if met else "**missed**"
                lines.append(f"| {goal.text} | {n} | {goal.bound} | {value:.3g} | {verdict} |")
            if not outcomes:
                lines.append(f"| {goal.text} | | {goal.bound} | not measured | |")
    return "\n".join(lines) + "\n"


def _slower(rows: Iterable[Row]) -> str:
    """Return a table of the cases where another provider is more than 5 % faster."""
    rows = [r for r in rows if r.times_us]
    ours = {(r.case, r.threads): r for r in rows if r.provider == r.ours}
    lines = ["| case | threads | faster provider | its time / pyadv's |", "|---|---|---|---|"]
    for row in rows:
        mine = ours.get((row.case, row.threads))
        variant = row.provider.startswith(row.ours)  # pyadv with other settings
        if mine is None or row.yardstick or variant:
            continue
        ratio = statistics.median(ratios(row, mine))
        if ratio < 0.95:
            lines.append(f"| {row.case} | {row.threads} | {row.provider} | {ratio:.3g} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def text(module: ModuleType, rows: list[Row]) -> str:
    """Return the tables of one question, in Markdown."""
    if hasattr(module, "text"):
        return module.text(rows)
    table = _matrix if module.LAYOUT == "matrix" else _list
    parts = [table(part) for part in _split(rows, module.LAYOUT)]
    refused = [f"- {r.case}: {r.provider}: {r.refused}" for r in rows if r.refused]
    if refused:
        parts.append("Not timed:\n\n" + "\n".join(dict.fromkeys(refused)) + "\n")
    return "\n".join(parts)


def _split(rows: list[Row], layout: str) -> Iterable[list[Row]]:
    def key(row: Row) -> str:
        return row.group if layout == "matrix" else row.case

    return [[r for r in rows if key(r) == k] for k in dict.fromkeys(map(key, rows))]


def _matrix(rows: list[Row]) -> str:
    """Return a table with a line for each case and number of threads and a column for each
    provider: its time, and the ratio to pyadv's time."""
    providers = list(dict.fromkeys(r.provider for r in rows if r.times_us))
    head = ["case", "threads", *providers]
    gigabytes = any(r.bytes for r in rows)
    if gigabytes:
        head += ["pyadv GB/s", "of copy_"]
    lines = [f"**{rows[0].group}**\n", _line(head), _line(["---"] * len(head))]
    for case, n in dict.fromkeys((r.case, r.threads) for r in rows):
        here = {r.provider: r for r in rows if (r.case, r.threads) == (case, n) and r.times_us}
        ours = here.get(next(iter(here.values())).ours) if here else None
        cells = [case, str(n)]
        for name in providers:
            row = here.get(name)
            cells.append("" if row is None else _time_and_ratio(row, ours))
        if gigabytes:
            cells += _bandwidth(ours, here.get("copy_"))
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _bandwidth(ours: Row | None, copy: Row | None) -> list[str]:
    speed = ours.gigabytes_per_second if ours else None
    if speed is None:
        return ["", ""]
    share = f"{100 * speed / copy.gigabytes_per_second:.0f} %" if copy else ""
    return [f"{speed:.3g}", share]


def _time_and_ratio(row: Row, ours: Row | None) -> str:
    if ours is None or row is ours:
        return f"**{time_words(row.median_us)}**" if row is ours else time_words(row.median_us)
    return f"{time_words(row.median_us)} ({statistics.median(ratios(row, ours)):.3g}x)"


def _list(rows: list[Row]) -> str:
    """Return a table with a line for each provider and number of threads. Empty columns are left
    out."""
    lines, timed = [], [r for r in rows if r.times_us]
    columns: dict[str, list[str]] = {
        k: []
        for k in ("threads", "provider", "median", "quartiles", "x ours", "quartiles of x", "runs")
    }
    extra = {k: [] for k in ("images/s", "steps/s", "forward", "backward", "peak MB")}
    facts = list(dict.fromkeys(k for r in timed for k in r.facts))
    extra |= {k: [] for k in facts}
    for r in timed:
        ours = [o for o in timed if (o.provider, o.threads) == (r.ours, r.threads)]
        relative = ratios(r, ours[0]) if ours else []
        low, high = r.quartiles_us
        name = f"**{r.provider}**" if r.provider == r.ours else r.provider
        spread = quartiles(relative) if relative else ()
        row = (
            str(r.threads),
            f"{name} (yardstick)" if r.yardstick else name,
            time_words(r.median_us),
            f"{time_words(low)} - {time_words(high)}",
            f"{statistics.median(relative):.3g}" if relative else "",
            " - ".join(f"{v:.3g}" for v in spread),
            str(len(r.times_us)),
        )
        for column, cell in zip(columns.values(), row, strict=True):
            column.append(cell)
        extra["images/s"].append(f"{r.per_second(r.images):,.0f}" if r.images else "")
        extra["steps/s"].append(f"{r.per_second(r.images * r.steps):,.0f}" if r.steps else "")
        extra["forward"].append("" if r.forwards is None else f"{r.forwards:,}")
        extra["backward"].append("" if r.backwards is None else f"{r.backwards:,}")
        extra["peak MB"].append("" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.1f}")
        for k in facts:
            extra[k].append(f"{r.facts[k]:g}" if k in r.facts else "")
    columns |= {k: cells for k, cells in extra.items() if any(cells)}
    lines = [f"**{rows[0].case}**\n", _line(columns), _line(["---"] * len(columns))]
    lines += [_line(cells) for cells in zip(*columns.values(), strict=True)]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

"""The result of gpu_setting.py: DIR/summary.md and its picture, from whatever is there."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

import harness
from gpu_stages import METHODS, Setting

COUNTERS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "launch__registers_per_thread",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


def summary(setting: Setting, status: dict[str, dict[str, Any]]) -> None:
    """Write summary.md and its picture.

    Args:
        setting: Where the results are.
        status: How each stage ended.
    """
    import gpu_attacks
    import gpu_autoattack
    import gpu_kernels
    import render
    import torch
    import training

    environment = harness.environment(torch.device(setting.device))
    lines = [f"# {environment['device']}\n", *(f"- {k}: {v}" for k, v in environment.items())]
    if setting.dry:
        lines.append("\n**A dry run on the CPU at tiny sizes: it says nothing about speed.**")
    lines += ["\n## Stages\n", "| stage | ended | seconds |", "|---|---|---|"]
    lines += [f"| {k} | {v['state']} | {v['seconds']} |" for k, v in status.items()]
    questions = {
        "gpu_attacks": gpu_attacks,
        "gpu_autoattack": gpu_autoattack,
        "gpu_kernels": gpu_kernels,
        "training": training,
    }
    there = {k: setting.out / f"{k}.json" for k in questions}
    found = {k: harness.load(p) for k, p in there.items() if p.exists()}
    if found:
        lines += ["\n## Goals\n", render.goals({k: questions[k] for k in found}, found)]
    for name, (_, rows) in found.items():
        lines += [f"\n## {questions[name].TITLE}\n", render.text(questions[name], rows)]
    lines += counted(setting.out / "ncu.csv") + _networks(setting.out)
    if "gpu_kernels" in found:
        with contextlib.suppress(ImportError):  # without matplotlib
            _picture(found["gpu_kernels"][1], setting.out / "kernels.png")
            lines.append("\n![Share of the copy's bandwidth](kernels.png)")
    (setting.out / "summary.md").write_text("\n".join(lines) + "\n")


def counted(path: Path) -> list[str]:
    """Return a table of what Nsight Compute has counted, with a line for each launch."""
    if not path.exists():
        return []
    text = [line for line in path.read_text().splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(text):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"][:60]})
        launch[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}"
    head = ["kernel", *COUNTERS]
    lines = ["\n## Counters\n", render_line(head), render_line(["---"] * len(head))]
    return lines + [render_line([v.get(k, "") for k in head]) for v in launches.values()]


def _networks(out: Path) -> list[str]:
    """Return a table of the trained networks."""
    there = [n for n in ("record", *METHODS) if (out / f"{n}.json").exists()]
    if not there:
        return []
    found = {n: json.loads((out / f"{n}.json").read_text()) for n in there}
    attacks = list(dict.fromkeys(a for f in found.values() for a in f.get("accuracy", {})))
    head = ["network", "epochs", *attacks, "median margin", "minutes of training", "seconds of"]
    lines = [f"\n## Networks on {found[there[0]]['data']}\n", render_line(head)]
    lines.append(render_line(["---"] * len(head)))
    for name, f in found.items():
        accuracy = f.get("accuracy", {})
        minutes = (f["seconds"]["first epoch"] + f["seconds"]["other epochs"]) / 60
        margin = f.get("effective margin, median")
        lines.append(
            render_line(
                [
                    name,
                    str(f["config"]["epochs"]),
                    *(f"{100 * accuracy[a]:.2f}" if a in accuracy else "" for a in attacks),
                    "" if margin is None else f"{margin:.4f}",
                    f"{minutes:.2f}",
                    ", ".join(f"{k} {v:.1f}" for k, v in f["seconds"].items()),
                ]
            )
        )
    speeds = found.get("record", {}).get("PGD-10", {})
    other = found.get("record", {}).get("otherwise", {})
    lines += [
        f"- PGD-10, speed {k}: {100 * v:.2f} % robust, {other[k]} verdicts differ from exact"
        for k, v in speeds.items()
    ]
    profile = found.get("record", {}).get("profile")
    if profile:
        lines += [f"\nA training step takes {1000 * profile['seconds of a step']:.2f} ms, of"]
        lines[-1] += f" which the device is busy {100 * profile['busy']:.0f} %:\n"
        lines += [f"- {100 * v:.1f} % {k[:100]}" for k, v in profile["shares"].items()]
    return lines


def render_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _picture(rows: list[harness.Row], path: Path) -> None:
    from matplotlib.figure import Figure

    copies = {r.case: r for r in rows if r.provider == "copy_" and r.times_us}
    shares = {
        r.case: r.gigabytes_per_second / copies[r.case].gigabytes_per_second
        for r in rows
        if r.provider == "pyadv" and r.times_us and r.bytes and r.case in copies
    }
    figure = Figure(figsize=(8, 1 + 0.2 * len(shares)), layout="constrained")
    axis = figure.add_subplot()
    axis.barh(range(len(shares)), list(shares.values()))
    axis.set_yticks(range(len(shares)), list(shares), fontsize=7)
    axis.axvline(0.9, color="black", linewidth=0.8, linestyle=":")
    axis.invert_yaxis()
    axis.set_xlabel("share of the copy's bandwidth")
    figure.savefig(path, dpi=110)

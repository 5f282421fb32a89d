"""How close is one Linf step to the cost of copying the tensor?

    python benchmarks/linf_step.py [--threads 1] [--out benchmarks/results/linf_step-1-thread.json]

Providers: copy_ (the yardstick), the expression everybody writes (eager, on a tuned heap, also in
place), torch.compile of it (also in place), and pyadv.ops.linf_step (also in place).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import harness
import torch

SHAPES = [(128, 3, 32, 32), (64, 3, 224, 224)]
EPS, ALPHA = 8 / 255, 2 / 255


def eager(x_adv, grad, x):
    moved = x_adv + ALPHA * grad.sign()
    return torch.clamp(torch.min(torch.max(moved, x - EPS), x + EPS), 0, 1)


def eager_in_place(x_adv, grad, low, high):
    """With the ball's bounds computed beforehand, as a careful hand would write it."""
    x_adv.add_(grad.sign(), alpha=ALPHA)
    torch.maximum(x_adv, low, out=x_adv)
    torch.minimum(x_adv, high, out=x_adv)
    return x_adv.clamp_(0, 1)


def providers(shape):
    from pyadv import ops, reference

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=generator)
    start = (x + EPS * (2 * torch.rand(shape, generator=generator) - 1)).clamp(0, 1)
    grad = torch.randn(shape, generator=generator)
    low, high = x - EPS, x + EPS
    # Each works on tensors of its own: x_adv is reset by the first call only, which is checked.
    own = {name: start.clone() for name in ("eager in place", "compile in place", "pyadv in place")}
    destination = torch.empty_like(x)
    compiled = torch.compile(eager)

    @torch.compile
    def compiled_in_place(x_adv, grad, x):
        return x_adv.copy_(eager(x_adv, grad, x))

    calls = {
        "copy_": lambda: destination.copy_(x),
        "eager": lambda: eager(start, grad, x),
        "eager in place": lambda: eager_in_place(own["eager in place"], grad, low, high),
        "compile": lambda: compiled(start, grad, x),
        "compile in place": lambda: compiled_in_place(own["compile in place"], grad, x),
        "pyadv": lambda: ops.linf_step(start, grad, x, ALPHA, EPS),
        "pyadv in place": lambda: ops.linf_step(
            own["pyadv in place"], grad, x, ALPHA, EPS, out=own["pyadv in place"]
        ),
    }
    return calls, reference.linf_step(start, grad, x, ALPHA, EPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    harness.tuned_heap()
    torch.set_num_threads(options.threads)
    rows = []
    with torch.no_grad():
        for shape in SHAPES:
            calls, expected = providers(shape)
            case = "x".join(map(str, shape))
            rows += harness.measure(case, calls, expected, runs=options.runs)
    print(harness.table(rows))
    if options.out:
        command = f"python benchmarks/linf_step.py --threads {options.threads}"
        title = f"One Linf step, {options.threads} thread(s)"
        harness.save(options.out, rows, title=title, command=command)


if __name__ == "__main__":
    main()

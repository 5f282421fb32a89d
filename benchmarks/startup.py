"""What do the import and the first use cost, in a fresh process?

`torch` is `import torch` alone. Cold is the first use ever, which compiles the kernels into an
empty cache; the other cases find them in the cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from harness import HEAP, Case, Goal, Options, Provider

TITLE = "Start-up"
LAYOUT = "list"

_IMPORT, _USE = "a process that imports", "a process that takes one Linf step"
_STEP = "import torch; from pyadv import ops; x = torch.zeros(2, 3); ops.linf_step(x, x, x, 1, 1)"

GOALS = [Goal("`import pyadv`: within 0.2 s of torch", _IMPORT, "torch", beyond_s=0.2)]


def cases(options: Options) -> Iterator[Case]:
    if options.clock == "cpu":
        return  # this clock does not see the time of other processes
    imports = {
        "pyadv": _process("import torch, pyadv, pyadv.ops, pyadv.attacks"),
        "torch": Provider(_process("import torch"), yardstick=True),
    }
    for name, module in (("torchattacks", "torchattacks"), ("foolbox", "foolbox")):
        if name in options.peers and not options.quick:
            imports[name] = Provider(_process(f"import torch, {module}"), peer=True)
    yield Case(_IMPORT, imports, runs=(4, 4), peak=False)
    if options.quick:
        return
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm"
        yield Case(
            _USE,
            {
                "pyadv": _process(_STEP, warm),
                "torch": Provider(_process("import torch; torch.zeros(2, 3)"), yardstick=True),
            },
            runs=(4, 4),
            peak=False,
        )
        yield Case(_USE + ", cold", {"pyadv": _fresh(Path(folder))}, runs=(1, 1), peak=False)


def _process(code: str, cache: Path | None = None) -> Callable[[], None]:
    environment = {k: v for k, v in os.environ.items() if k not in HEAP}
    environment |= {"PYADV_CACHE_DIR": str(cache)} if cache else {}

    def call() -> None:
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=environment,
            check=True,
            capture_output=True,
        )

    return call


def _fresh(folder: Path) -> Callable[[], None]:
    """Return a call that starts with an empty cache each time."""
    return lambda: _process(_STEP, Path(tempfile.mkdtemp(dir=folder)))()

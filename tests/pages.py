"""Run the code of the documentation: the `python` blocks of a page are one program. A block that no
test can run, since it needs a package or a download, is marked `py`. A title names the file that a
block is."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyadv.attacks import TargetedFAB
from pyadv.evaluation import Bisection, margins

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r'^```(\w+)(?: title="(.+?)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str = "python") -> list[str]:
    """Return the blocks of one language on a page, a path in the checkout."""
    found = _BLOCK.findall((ROOT / page).read_text())
    return [code for kind, title, code in found if kind == language and not title]


def run(
    page: str,
    names: Mapping[str, Any] | None = None,
    replace: Mapping[str, str] | None = None,
    shell: Callable[[str], Any] | None = None,
) -> types.ModuleType:
    """Run the Python blocks of a page in order, as one module, and return the module.

    Blocks with a title are written to the current folder as they come.

    Args:
        page: path in the checkout.
        names: what the program finds defined at its start.
        replace: pieces of code -> what runs in their place, to make a test cheap. Each piece must
            be there.
        shell: is called with each line of the `bash` blocks, which are else left out.
    """
    text = (ROOT / page).read_text()
    name = "page_" + re.sub(r"\W", "_", page)
    module = types.ModuleType(name)
    vars(module).update(names or {})
    sys.modules[name] = module  # dataclasses and pickle look a module up by its name
    missing = dict(replace or {})
    for found in _BLOCK.finditer(text):
        kind, title, code = found.groups()
        if title:
            Path(title).write_text(code)
        elif kind == "bash" and shell is not None:
            for line in code.strip().splitlines():
                shell(line)
        if title or kind != "python":
            continue
        for piece, other in (replace or {}).items():
            if piece in code:
                code = code.replace(piece, other)
                missing.pop(piece, None)
        before = text.count("\n", 0, found.start(3))  # tracebacks then show the page's lines
        exec(compile("\n" * before + code, str(ROOT / page), "exec"), vars(module))
    assert not missing, f"{page} does not contain {sorted(missing)}"
    return module


def hasten_margins(patch: Any) -> None:
    """Give the searches that `measure_margins` makes by default fewer steps, by means of a
    `pytest.MonkeyPatch`."""
    full = margins.margin_attacks

    def fewer(norm: str, **settings: Any) -> dict[str, margins.NearestPoint]:
        fab = TargetedFAB(norm=norm, steps=10, **settings)
        bisection = Bisection(norm=norm, rounds=2, **settings)
        attacks = {**full(norm, **settings), "FAB-T": fab, "bisection": bisection}
        assert attacks.keys() == full(norm, **settings).keys()
        return attacks

    patch.setattr(margins, "margin_attacks", fewer)

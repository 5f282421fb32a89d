"""The loop in docs/objectives.md that averages weights, run as it is written there."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from objective_parts import attack, make_net

from pyadv.attacks import PGD
from pyadv.objectives import AT, AWP

DOCUMENT = Path(__file__).parents[2] / "docs" / "objectives.md"


def test_the_documented_average_is_exponential_and_attackable(batch):
    section = DOCUMENT.read_text().split("## An average of the weights")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    code = code.replace("range(1, 101)", "range(1, 4)").replace("0.999", "0.9")
    model = make_net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(_copy(model)))
    names = {"model": model, "optimizer": optimizer, "loader": [batch, batch], "PGD": PGD}
    names |= {"objective": AWP(AT(attack()), 0.01), "x_test": batch[0], "y_test": batch[1]}
    exec(code, names)

    expected = seen[0]
    for state in seen[1:]:
        expected = {k: 0.9 * v + 0.1 * state[k] for k, v in expected.items()}
    assert len(seen) == 6
    found = names["average"].module.state_dict()
    for name, value in expected.items():
        if value.is_floating_point() and "num_batches" not in name:
            torch.testing.assert_close(found[name], value, msg=name)
    assert names["result"].correct.shape == (len(batch[0]),)
    assert not names["average"].training and model.training


def _copy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}

"""Give an attack a loss of your own, add a regulariser of your own to an objective, and train.

python examples/your_own_loss.py --images 2000
"""

import argparse

import torch
from torch import Tensor

from pyadv.attacks import PGD
from pyadv.data import load
from pyadv.models import SmallCNN
from pyadv.objectives import AT, Step


def logit_gap(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean of the other logits minus that of the label, (B,)."""
    own = logits.gather(1, y[:, None])[:, 0]
    return (logits.sum(1) - own) / (logits.shape[1] - 1) - own


class LogitPairing:
    """A regulariser: lam times the squared distance between clean and adversarial logits."""

    def __init__(self, lam: float):
        self.lam = lam

    def __call__(self, step: Step) -> Tensor:
        return self.lam * (step.logits - step.logits_adv).square().sum(1).mean()


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--images", type=int, default=10_000)
options = parser.parse_args()

torch.manual_seed(0)
data, model = load("fashion-mini"), SmallCNN()
x, y = data.train_x[: options.images], data.train_y[: options.images]
objective = AT(PGD(eps=0.1, steps=5, loss=logit_gap)) + LogitPairing(0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

for xb, yb in zip(x.split(100), y.split(100), strict=True):
    optimizer.zero_grad()
    objective(model, xb, yb).backward()
    optimizer.step()

test_x, test_y = data.test_x[:200], data.test_y[:200]
for loss in ("ce", "margin", logit_gap):
    attack = PGD(model, eps=0.1, steps=20, loss=loss, best="fooled")
    result = attack.run(test_x, test_y)
    name = loss if isinstance(loss, str) else loss.__name__
    print(f"PGD-20 on {name}: {100 * result.robust_accuracy:.1f} % withstand it")

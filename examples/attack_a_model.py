"""Attack a network, and draw clean images, adversarial ones and their differences.

python examples/attack_a_model.py --weights model.pt --out examples.png
"""

import argparse

import torch

from pyadv.attacks import PGD
from pyadv.data import load
from pyadv.evaluation.plots import worst_examples
from pyadv.models import SmallCNN

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--weights", default="model.pt", help="written by train_robustly.py")
parser.add_argument("--eps", type=float, default=0.1)
parser.add_argument("--out", default="examples.png")
options = parser.parse_args()

data, model = load("fashion-mini"), SmallCNN().eval()
model.load_state_dict(torch.load(options.weights, weights_only=True))
x, y = data.test_x[:100], data.test_y[:100]

attack = PGD(model, eps=options.eps, steps=20, best="fooled")
print(attack.describe())
result = attack.run(x, y)
print(f"{100 * result.robust_accuracy:.0f} of {len(x)} images withstand it")

# Images that the network knew, and the attack broke.
broken = (model(x).argmax(1) == y) & ~result.correct
shown = broken.nonzero()[:8, 0] if broken.any() else torch.arange(8)
seen = result.logits.argmax(1)
worst_examples(x[shown], result.x_adv[shown], y[shown], seen[shown], data.classes, options.out)
print(f"wrote {options.out}")

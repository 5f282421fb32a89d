"""Look for masked gradients, and measure how far the decision boundary is.

python examples/is_it_robust.py --weights model.pt --images 100
"""

import argparse

import torch

from pyadv.data import load
from pyadv.evaluation import check_masking, measure_margins
from pyadv.evaluation.plots import accuracy_against, margin_distributions
from pyadv.models import SmallCNN

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--weights", default="model.pt", help="written by train_robustly.py")
parser.add_argument("--images", type=int, default=100)
parser.add_argument("--eps", type=float, default=0.1)
options = parser.parse_args()

data, model = load("fashion-mini"), SmallCNN().eval()
model.load_state_dict(torch.load(options.weights, weights_only=True))
x, y = data.test_x[: options.images], data.test_y[: options.images]

masking = check_masking(model, x, y, eps=options.eps)
print(masking)
accuracy_against(masking.curves, "accuracy.png")

margins = measure_margins(model, x, y, norm="Linf")
print(margins)
margins.to_csv("margins.csv")
if margins.correct.any():
    margin_distributions(margins, "margins.png")
print("wrote accuracy.png, margins.csv, margins.png")

"""Run AutoAttack over a DataLoader. Stop it with Ctrl-C, and the same command continues.

python examples/evaluate_with_autoattack.py --weights model.pt --images 200
"""

import argparse

import torch
from torch.utils.data import DataLoader, TensorDataset

import pyadv
from pyadv.data import load
from pyadv.models import SmallCNN

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--weights", default="model.pt", help="written by train_robustly.py")
parser.add_argument("--images", type=int, default=200)
parser.add_argument("--eps", type=float, default=0.1)
options = parser.parse_args()

data, model = load("fashion-mini"), SmallCNN().eval()
model.load_state_dict(torch.load(options.weights, weights_only=True))
test = TensorDataset(data.test_x[: options.images], data.test_y[: options.images])

report = pyadv.evaluate(
    model,
    DataLoader(test, batch_size=100),
    eps=options.eps,
    attacks="autoattack",
    state="autoattack.state",  # what was found so far
)
print(report)
low, high = report.worst.interval
print(f"report this: {100 * report.worst.accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f})")

"""Train a small network by adversarial training, TRADES, MART or GAIRAT, and save its weights.

python examples/train_robustly.py --method trades --epochs 5 --out model.pt
"""

import argparse

import torch

from pyadv.attacks import PGD
from pyadv.data import load
from pyadv.models import SmallCNN
from pyadv.objectives import AT, GAIRAT, MART, TRADES

EPS = 0.1
METHODS = {
    "at": lambda epochs: AT(PGD(eps=EPS, steps=7)),
    "trades": lambda epochs: TRADES(PGD(eps=EPS, steps=7, loss="kl"), beta=6.0),
    "mart": lambda epochs: MART(PGD(eps=EPS, steps=7), beta=5.0),
    "gairat": lambda epochs: GAIRAT(PGD(eps=EPS, steps=7), begin_epoch=1 + epochs // 3),
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--method", choices=METHODS, default="at")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--images", type=int, default=10_000)
parser.add_argument("--out", default="model.pt")
options = parser.parse_args()

torch.manual_seed(0)
data, model = load("fashion-mini"), SmallCNN()
x, y = data.train_x[: options.images], data.train_y[: options.images]
objective = METHODS[options.method](options.epochs)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
steps = options.epochs * -(-len(x) // 100)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)

for epoch in range(1, options.epochs + 1):
    for ids in torch.randperm(len(x)).split(100):
        optimizer.zero_grad()
        loss = objective(model, x[ids], y[ids], epoch=epoch, ids=ids)
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}", flush=True)

torch.save(model.state_dict(), options.out)
print(f"wrote {options.out}")

"""A plain torch training loop whose step consists mostly of equal matrix products.

python work_script.py [--products N] [--steps N]
"""

import argparse

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--products", type=int, default=100)
parser.add_argument("--steps", type=int, default=100_000)
options = parser.parse_args()
torch.set_num_threads(1)
torch.manual_seed(0)
weight = torch.randn(160, 160) / 13
model = torch.nn.Linear(16, 16)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for _ in range(options.steps):
    rows = torch.randn(8, 16)
    with torch.no_grad():
        work = torch.ones(160, 160)
        for _ in range(options.products):
            work = work @ weight
    loss = (model(rows) - rows).pow(2).mean() + 0 * work[0, 0].clamp(0, 1)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

"""A plain torch training script without any import of lorameter."""

import sys
import time

import torch

model = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.manual_seed(0)
for _ in range(24):
    tokens = torch.randint(0, 32, (2, 9))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    time.sleep(0.06 if "--slow" in sys.argv else 0.01)
    optimizer.step()
    optimizer.zero_grad()
print(f"last loss {loss.item():.4f}")

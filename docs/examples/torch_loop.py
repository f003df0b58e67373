"""A plain loop of torch: no Trainer, no adapter, a loss of its own."""

import argparse

import torch
from torch import nn

options = argparse.ArgumentParser()
options.add_argument("--steps", type=int, default=40)
options.add_argument("--width", type=int, default=64)
options = options.parse_args()


class Model(nn.Module):
    """Predicts the next of 128 letters from each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded = nn.Embedding(128, options.width)
        self.layers = nn.Sequential(nn.Linear(options.width, 4 * options.width), nn.GELU())
        self.head = nn.Linear(4 * options.width, 128)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Scores of the next letter, (rows, positions, 128)."""
        return self.head(self.layers(self.embedded(input_ids)))


torch.manual_seed(0)
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(torch.randint(0, 128, (4 * options.steps, 33)), batch_size=4, shuffle=True)
for ids in loader:
    scores = model(ids[:, :-1])
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"last loss {loss.item():.4f}")

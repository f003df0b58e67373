"""One layer of attention written by hand, small enough to say what sees what.

In a model of a library a boundary between records is lost for all of them; here any single one can be.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from kernels_check.observation.records import record_numbers

WORDS, WIDTH = 50, 16


class SmallAttention(nn.Module):
    """Records are told by positions that restart.

    Args:
        sees: from what each token may see, [rows, tokens, tokens], and the numbers of the records, [rows, tokens], to
            what it sees.
        after: from the hidden states, [rows, tokens, features], to what the head is given.
        is_causal: what the model says of itself; None: nothing.
    """

    def __init__(
        self,
        sees: Callable[[Tensor, Tensor], Tensor] = lambda allowed, numbers: allowed,
        after: Callable[[Tensor], Tensor] = lambda hidden: hidden,
        is_causal: bool | None = True,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self.sees, self.after = sees, after
        if is_causal is not None:
            self.is_causal = is_causal

    def forward(
        self, input_ids: Tensor | None = None, position_ids: Any = None, inputs_embeds: Tensor | None = None
    ) -> SimpleNamespace:
        """Logits of [rows, tokens, words]."""
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        numbers = record_numbers(position_ids.expand(hidden.shape[:2]))
        allowed = self.sees((numbers[:, :, None] == numbers[:, None, :]).tril(), numbers)
        scores = self.mix(hidden) @ hidden.transpose(1, 2) / WIDTH**0.5
        hidden = hidden + softmax(scores.masked_fill(~allowed, float("-inf")), dim=-1) @ hidden
        return SimpleNamespace(logits=self.head(self.after(hidden)))


def packed(*lengths: int, rows: int = 1) -> dict[str, Tensor]:
    """Tokens, and positions of records of such lengths, the same in every row."""
    torch.manual_seed(5)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "input_ids": torch.randint(0, WORDS, (rows, len(positions))),
        "position_ids": positions.expand(rows, -1).clone(),
    }

"""How far two rows of logits lie apart, in the measures that answer different questions.

The argmax says whether greedy decoding would choose another token; the divergence of the distributions (Kullback &
Leibler 1951), in nats, whether sampling would; absolute differences and the cosine whether the arithmetic is the same
or another. Everything is worked out in float64: a divergence of 1e-9 is a difference of logarithms near 10, of which
float32 keeps nothing.
"""

from __future__ import annotations

import torch

from lorameter.errors import LorameterError
from lorameter.records.parity import LogitDistance

ROWS = 16
"""Positions at a time: 16 of 262,144 words are 34 MB in float64."""


def measure_distance(reference: torch.Tensor, other: torch.Tensor) -> LogitDistance:
    """The distance of `other` from `reference`, both of shape (positions, vocabulary), on one device.

    Raises:
        LorameterError: their shapes differ, there is no position, or a logit is not finite.
    """
    if reference.shape != other.shape or reference.dim() != 2 or not reference.numel():
        raise LorameterError(f"logits of shapes {tuple(reference.shape)} and {tuple(other.shape)} are not compared")
    for which, logits in (("the reference's", reference), ("its", other)):
        if not logits.isfinite().all():
            raise LorameterError(f"{which} logits hold a number that is not finite")
    differs, kl, means, largest, cosines = [], [], [], [], []
    for rows, others in zip(reference.split(ROWS), other.split(ROWS), strict=True):
        ours, theirs = rows.double(), others.double()
        differs.append(ours.argmax(-1) != theirs.argmax(-1))
        log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))  # rounding may go below what it cannot be
        apart = (ours - theirs).abs()
        means.append(apart.mean(-1))
        largest.append(apart.amax(-1))
        cosines.append(torch.cosine_similarity(ours, theirs, dim=-1))
    divergence, cosine = torch.cat(kl), torch.cat(cosines)
    return LogitDistance(
        positions=reference.shape[0],
        argmax_differs=int(torch.cat(differs).sum()),
        kl_mean_nats=float(divergence.mean()),
        kl_max_nats=float(divergence.max()),
        difference_mean=float(torch.cat(means).mean()),
        difference_max=float(torch.cat(largest).max()),
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
    )


def sequence_losses(logits: torch.Tensor, labels: torch.Tensor, length: int) -> list[float]:
    """Mean loss over the labelled tokens of each sequence of `length` tokens that has one, in nats.

    Args:
        logits: shape (rows, tokens, vocabulary); a row may hold several sequences one after the other.
        labels: shape (rows, tokens), as transformers takes them: a token's label is at its own position, -100 is none.
        length: tokens of a sequence. The first token of each has no label, or its loss would cross the border.
    """
    losses: list[float] = []
    for row, expected in zip(logits, labels, strict=True):
        each = torch.nn.functional.cross_entropy(row[:-1].float(), expected[1:], reduction="none", ignore_index=-100)
        each = torch.nn.functional.pad(each, (1, 0)).double().reshape(-1, length)
        counts = (torch.nn.functional.pad(expected[1:], (1, 0), value=-100) != -100).reshape(-1, length).sum(-1)
        losses += [float(total / count) for total, count in zip(each.sum(-1), counts, strict=True) if int(count)]
    return losses

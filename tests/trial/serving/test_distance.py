"""Tests of logit distances and sequence losses against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorameter.trial.serving.parity import ROWS, measure_distance, sequence_losses


@pytest.fixture
def pair():
    """Two similar sets of logits with more positions than one chunk."""
    rng = np.random.default_rng(3)
    reference = rng.normal(size=(ROWS * 2 + 3, 40)) * 4
    return reference, reference + rng.normal(size=reference.shape) * 0.5


def test_every_distance_equals_numpy_s(pair):
    """KL divergence, argmax agreement, differences and cosine equal their definitions."""
    reference, other = pair
    found = measure_distance(torch.tensor(reference), torch.tensor(other))

    def distribution(logits):
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    p, q = distribution(reference), distribution(other)
    kl = (p * np.log(p / q)).sum(axis=1)
    difference = np.abs(reference - other)
    cosine = (reference * other).sum(1) / np.linalg.norm(reference, axis=1) / np.linalg.norm(other, axis=1)
    assert found.positions == len(reference)
    assert found.argmax_differs == (reference.argmax(1) != other.argmax(1)).sum() > 0
    assert (found.kl_mean_nats, found.kl_max_nats) == pytest.approx((kl.mean(), kl.max()))
    assert (found.difference_mean, found.difference_max) == pytest.approx((difference.mean(), difference.max()))
    assert (found.cosine_mean, found.cosine_min) == pytest.approx((cosine.mean(), cosine.min()))


def test_losses_are_of_each_sequence():
    """In rows of two sequences, each loss is the mean over the labelled tokens; a sequence without a label has none."""
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(2, 8, 11)), rng.integers(0, 11, size=(2, 8))
    labels[:, [0, 4]] = -100
    labels[1, 4:] = -100
    labels[0, 2] = -100
    found = sequence_losses(torch.tensor(logits), torch.tensor(labels), 4)
    wanted = []
    for row, start in ((0, 0), (0, 4), (1, 0)):
        places = [place for place in range(start + 1, start + 4) if labels[row, place] != -100]
        each = [np.log(np.exp(logits[row, at - 1]).sum()) - logits[row, at - 1, labels[row, at]] for at in places]
        wanted.append(np.mean(each))
    assert found == pytest.approx(wanted, rel=1e-6)

"""What a drawn run feeds its model: whole rows, padded ones, or records packed into a row."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from drawn_layers import WORDS, Decoder
from drawn_model import PAD
from drawn_truth import true
from torch import Tensor

ROWS, LENGTH = 2, 12
WHOLE = [0, LENGTH]
"""Bounds of the records of a row that is one."""


def draw_inputs(run: Any, draw: random.Random) -> None:
    """Give a run its inputs and labels, of which the model is given the former alone."""
    ids = torch.randint(3, WORDS, (ROWS, LENGTH))
    run.inputs, run.labels = {"input_ids": ids}, ids.clone()
    plain = run.drawn.style == "plain"
    layout = draw.choice(["whole", "padded", "padded"]) if draw.random() < 0.4 else "whole"
    if plain and draw.random() < 0.3:
        layout = "packed"
    if layout == "whole":
        run.truths["padding.share"] = true(0.0, hidden=_repeats(ids, WHOLE))
    elif layout == "padded":
        _pad(run, draw, named=not plain)
    else:
        _pack(run, draw)


def _pad(run: Any, draw: random.Random, *, named: bool) -> None:
    """Pad the first row, under a mask that says so or one of ones.

    Args:
        run: whose inputs are whole.
        draw: of the place and the mask.
        named: whether the model's configuration names the token that pads.
    """
    ids, cut = run.inputs["input_ids"], draw.randint(1, LENGTH // 2)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, LENGTH - cut :] = 0
    text = ids.clone()
    ids[0, LENGTH - cut :] = PAD
    run.labels[0, LENGTH - cut :] = -100
    share = cut / (ROWS * LENGTH)
    honest = draw.random() < 0.8
    run.inputs["attention_mask"] = mask if honest else torch.ones_like(mask)
    # Under a mask of ones what repeats may be text; and one token that nobody names is like any other.
    repeats = _repeats(text[:1, : LENGTH - cut], [0, LENGTH - cut]) or _repeats(text[1:], WHOLE)
    alone = not honest and not named and cut == 1
    run.truths["padding.share"] = true(share, free={0.0} if alone else (), hidden=not honest and repeats)
    run.about.append("padded" if honest else "padded under a mask of ones")
    if named and honest and not any("elementwise" in one for one in run.about):
        run.truths["attention.mask"] = true("explicit")


def _pack(run: Any, draw: random.Random) -> None:
    """Pack records into the rows, told by positions that begin again; the model may lose a boundary."""
    ids = run.inputs["input_ids"]
    starts = sorted(draw.sample(range(2, LENGTH - 1), draw.randint(1, 3)))
    bounds = [0, *starts, LENGTH]
    places = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(bounds)])
    run.inputs["position_ids"] = places.expand(ROWS, -1).clone()
    run.batch = dict(run.inputs)
    run.truths["padding.share"] = true(0.0, hidden=_repeats(ids, bounds))
    if _stands(ids, bounds):
        run.truths["padding.share"] = true(free={0.0})
    trunk = next(module for module in run.model.modules() if isinstance(module, Decoder))
    hows = [layer.attention.how for layer in run.drawn.layers]
    masked = all(how.seen_mask == "explicit" for how in hows)
    if draw.random() < 0.4:
        trunk.merges = draw.randint(1, len(starts))
    certain = not any("dropout" in how.kind for how in hows)
    isolated = masked and trunk.merges is None
    run.truths["packing.isolated"] = true(isolated, hidden=not certain)
    if not masked:  # a single layer that does not mask lets records through, if its own mixing is large enough
        run.truths["packing.isolated"] = true(False, hidden=True)
    run.about.append("packed" if isolated else "packed, a boundary lost")


def _repeats(ids: Tensor, bounds: list[int]) -> bool:
    """Whether any record begins or ends with a token twice, which may be padding by all that is told."""
    records = (ids[:, start:end] for start, end in itertools.pairwise(bounds) if end - start > 1)
    return any(bool((one[:, 0] == one[:, 1]).any() | (one[:, -1] == one[:, -2]).any()) for one in records)


def _stands(ids: Tensor, bounds: list[int]) -> bool:
    """Whether two records are the same single token, which stands at the same place over and over as padding does."""
    alone = [start for start, end in itertools.pairwise(bounds) if end - start == 1]
    return any(bool((ids[:, one] == ids[:, one + 1]).any()) for one in alone if one + 1 in alone)

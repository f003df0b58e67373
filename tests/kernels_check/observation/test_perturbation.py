"""What is put in the place of tokens, and which of them may be replaced."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kernels_check.observation.perturbation import (
    configurations,
    largest_difference,
    other_tokens,
    special_tokens,
    three_of,
)


def model(**config):
    made = nn.Identity()
    made.config = SimpleNamespace(**config)
    return made


@pytest.mark.parametrize(
    ("tokens", "others"),
    [
        ([[5, 9, 5]], [[9, 5, 9]]),
        ([[3, 5, 9]], [[5, 9, 3]]),
        ([[4, 4, 4]], [[3, 3, 3]]),
        ([[0, 0, 0]], [[1, 1, 1]]),
    ],
)
def test_a_token_becomes_another_that_is_known(tokens, others):
    """Of the same batch, which the vocabulary surely has; of a single one a neighbour, and never one below 0."""
    replaced, changeable = other_tokens(torch.tensor(tokens), nn.Identity())
    assert replaced.tolist() == others
    assert bool(changeable.all())


def test_special_tokens_stay():
    """The place of an image means more than its embedding."""
    replaced, changeable = other_tokens(torch.tensor([[7, 5, 9]]), model(image_token_id=7))
    assert changeable.tolist() == [[False, True, True]]
    assert replaced[0, 1:].tolist() == [9, 5]


def test_the_features_of_embeddings_change_places():
    """Where they are all the same there is nothing to change."""
    tokens = torch.tensor([[[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]]])
    replaced, changeable = other_tokens(tokens, nn.Identity())
    assert replaced.tolist() == [[[2.0, 1.0, 2.0], [3.0, 3.0, 3.0]]]
    assert changeable.tolist() == [[True, False]]


def test_what_a_configuration_names():
    """Ids that end so, of the kinds asked for and not of those left out; a switch or a negative number is none."""
    config = SimpleNamespace(
        **{"pad_token_id": 0, "eos_token_id": [2, 3], "image_token_index": 7, "sep_token_id": -1, "bos_token_id": None},
        **{"cls_token_id": True, "pad_length": 11, "vocab_size": 99},
    )
    assert special_tokens([config]) == {0, 2, 3, 7}
    assert special_tokens([config], ("pad", "eos")) == {0, 2, 3}
    assert special_tokens([config], but=("pad", "image")) == {2, 3}


def test_configurations_are_those_of_all_parts_once():
    """A text model's lies in its whole; one that lies in itself does not go round."""
    text = SimpleNamespace(name="text")
    config = SimpleNamespace(name="whole", text_config=text, other_config=None, parts=SimpleNamespace(name="none"))
    text.parent_config = config
    made = nn.Identity()
    made.config = config
    assert sorted(one.name for one in configurations(made)) == ["text", "whole"]


def test_the_largest_difference_of_a_token():
    """Of all its features; what is not a number differs without end."""
    left, right = torch.zeros(1, 3, 2), torch.tensor([[[0.0, 0.0], [1.0, -2.0], [float("nan"), 0.0]]])
    assert largest_difference(left, right).tolist() == [[0.0, 2.0, float("inf")]]


def test_an_argument_for_three_rows():
    """One for each row, or one for all of them; what has no rows stays, and what does not fit cannot be taken apart."""
    rows = torch.tensor([[1, 2], [3, 4]])
    assert three_of(rows, 1, 2).tolist() == [[3, 4]] * 3
    assert three_of(rows[:1], 1, 2).tolist() == [[1, 2]] * 3
    assert three_of(rows, 1, 4) is None
    assert three_of(torch.tensor([1, 2]), 1, 2) is None
    assert three_of(torch.tensor(5), 1, 2).item() == 5
    assert three_of(True, 1, 2) is True


def test_an_argument_of_several_is_taken_apart_whole():
    """A mask for each kind of layer; one part that does not fit is enough against it, and None is no such part."""
    rows = torch.tensor([[1, 2], [3, 4]])
    given = three_of({"full": rows, "sliding": None}, 0, 2)
    assert (given["full"].tolist(), given["sliding"]) == ([[1, 2]] * 3, None)
    assert three_of({"full": rows, "sliding": torch.tensor([1, 2])}, 0, 2) is None

"""Tests that record boundaries are read from each input that marks them, and that inconsistent inputs are refused by
name."""

import pytest
import torch

from kernels_check.observe.padding import PADDING, LayoutError, find_records, record_numbers

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0]])
NUMBERS = [[0, 0, 0, 1, 1, 2]]


def test_a_repeated_position_is_one_filler():
    """A repeated position, as in padding, counts as one filler at either end."""
    positions = torch.tensor([[0, 1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 2, 0]])
    assert record_numbers(positions).tolist() == [[0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 2]]


def test_records_of_one_token_each_are_no_filler():
    """One-token records have the positions of padding but differing tokens; with equal tokens they count as one
    record."""
    given = {"position_ids": torch.tensor([[0, 1, 0, 0, 0, 1]] * 2)}
    given["input_ids"] = torch.tensor([[7, 8, 29, 58, 7, 8], [7, 8, 3, 3, 7, 8]])
    assert find_records(given, 2, 6).numbers.tolist() == [[0, 0, 1, 2, 3, 3], [0, 0, 1, 1, 2, 2]]


def _blocks(numbers):
    return (torch.tensor(numbers)[:, :, None] == torch.tensor(numbers)[:, None, :]).tril()[:, None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_ids", POSITIONS),
        ("position_ids", POSITIONS[0]),
        ("position_ids", POSITIONS.expand(4, 1, 6)),
        ("position_ids", POSITIONS.expand(3, 1, 6)),
        ("position_ids", torch.cat([POSITIONS[None], torch.full((3, 1, 6), 5)])),
        ("seq_idx", torch.tensor([[4, 4, 4, 7, 7, 4]])),
        ("cu_seq_lens_q", torch.tensor([0, 3, 5, 6])),
        ("cu_seqlens", torch.tensor([3, 5, 6], dtype=torch.int32)),
        ("attention_mask", torch.tensor([[1, 1, 1, 2, 2, 3]])),
        ("attention_mask", _blocks(NUMBERS)),
        ("attention_mask", _blocks(NUMBERS)[:, 0]),
        ("attention_mask", torch.zeros(1, 1, 6, 6).masked_fill(~_blocks(NUMBERS), torch.finfo(torch.float32).min)),
        ("attention_mask", {"full_attention": _blocks(NUMBERS)}),
    ],
)
def test_each_input_that_marks_records(name, value):
    """Positions, record numbers, cumulative lengths, counting masks and block masks all mark records."""
    found = find_records({name: value}, 1, 6)
    assert (found.numbers.tolist(), found.by, found.count, found.packed) == (NUMBERS, name, 3, True)


def test_the_first_input_that_shows_a_boundary_counts():
    """Positions without a restart do not hide the boundaries of a mask, and a mask of ones does not hide those of
    positions."""
    going_on = {"position_ids": torch.arange(6), "attention_mask": _blocks(NUMBERS)}
    assert find_records(going_on, 1, 6).by == "attention_mask"
    ones = {"position_ids": POSITIONS, "attention_mask": torch.ones(1, 6)}
    assert find_records(ones, 1, 6).by == "position_ids"
    assert not find_records({"position_ids": torch.arange(6)}, 1, 6).packed
    assert find_records({"attention_mask": torch.ones(1, 6), "labels": POSITIONS}, 1, 6) is None


def test_hidden_tokens_are_in_no_record():
    """Masked tokens at either end belong to no record; the other records count from 0."""
    mask = torch.tensor([[0, 1, 1, 1, 1, 0]])
    found = find_records({"position_ids": torch.tensor([[1, 0, 1, 0, 1, 1]]), "attention_mask": mask}, 1, 6)
    assert found.numbers.tolist() == [[PADDING, 0, 0, 1, 1, PADDING]]
    cumulated = find_records({"cu_seqlens": torch.tensor([0, 2, 4])}, 1, 6)
    assert cumulated.numbers.tolist() == [[0, 0, 1, 1, PADDING, PADDING]]


def test_rows_of_a_mask_that_were_opened_are_padding():
    """A fully masked row is opened so that its softmax is defined; such a row is padding."""
    mask = torch.ones(1, 1, 6, 6).tril().bool() & torch.tensor([0, 0, 1, 1, 1, 1]).bool()
    mask[..., 4:, :4] = False
    for one in (mask, mask | ~mask.any(dim=-1, keepdim=True)):
        found = find_records({"attention_mask": one}, 1, 6)
        assert found.numbers.tolist() == [[PADDING, PADDING, 0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"position_ids": torch.arange(5)}, r"position_ids of \[5\] does not fit tokens of \[2, 6\]"),
        ({"seq_idx": torch.ones(3, 6)}, r"seq_idx of \[3, 6\]"),
        ({"cu_seqlens": torch.tensor([0, 13])}, r"cu_seqlens ends at \[13\], and there are 2 x 6 tokens"),
        ({"cu_seqlens": torch.tensor([])}, "cu_seqlens ends at"),
        ({"cu_seqlens": torch.tensor([0, 4, 2])}, r"cu_seqlens ends at \[2\]"),
    ],
)
def test_inputs_of_another_size_are_refused(given, words):
    """The error gives both sizes."""
    with pytest.raises(LayoutError, match=words):
        find_records(given, 2, 6)


def test_places_of_an_image_begin_no_record():
    """In an image, time is constant and height and width restart; a record begins only where all three are zero."""
    planes = torch.tensor([[[0, 1, 1, 1, 1, 3]], [[0, 1, 1, 2, 2, 3]], [[0, 1, 2, 1, 2, 3]]])
    assert find_records({"position_ids": planes}, 1, 6).numbers.tolist() == [[0] * 6]

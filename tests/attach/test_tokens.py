"""Tests of what counts as a token in a batch."""

import pytest
import torch

from lorameter.attach.batches import AS_GIVEN, BY_ALL, BY_MASK, BY_POSITIONS, SHIFTED, copy_batch, count_tokens


def tokens_of(batch):
    return count_tokens(copy_batch(batch))


def counts(batch):
    found = tokens_of(batch)
    return found.sequences, found.padded_tokens, found.real_tokens, found.loss_tokens


IDS = torch.arange(12).reshape(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
LABELS = torch.tensor([[5, 5, 5, 5, 5, 5], [-100, 5, 5, -100, -100, -100]])


def test_masks_and_labels_give_the_real_and_loss_tokens():
    """Labels give the loss tokens; the first of each row is not predicted."""
    assert counts({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}) == (2, 12, 9, 7)
    assert tokens_of({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}).conventions == (BY_MASK, SHIFTED)


def test_a_packed_row_ends_where_its_records_do():
    """Zero positions without a label at the end of a row are filler; the first position of a record is not."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 0, 0]])
    labels = torch.tensor([[-100, 5, 5, -100, 5, 5], [-100, 5, 5, -100, -100, -100]])
    batch = {"input_ids": IDS, "position_ids": positions, "labels": labels}
    assert counts(batch) == (2, 12, 9, 6)
    assert tokens_of(batch).conventions == (BY_POSITIONS, SHIFTED)


def test_all_tokens_are_real_without_a_mask_or_labels():
    """This is the case of a loop over raw blocks; the first integer tensor of a tuple holds the tokens."""
    assert counts({"input_ids": IDS}) == (2, 12, 12, None)
    assert counts((IDS, IDS)) == (2, 12, 12, None)
    assert tokens_of((IDS,)).conventions == (BY_ALL,)


def test_labels_of_another_shape_are_counted_unshifted():
    """Labels of a classification and pre-shifted labels are counted unshifted."""
    assert counts({"input_ids": IDS, "labels": torch.tensor([1, -100])})[3] == 1
    shifted = {"input_ids": IDS, "labels": LABELS, "shift_labels": LABELS}
    assert counts(shifted)[3] == 8
    assert AS_GIVEN in tokens_of(shifted).conventions


def test_embedding_vectors_count_as_tokens():
    """For a model with embedding inputs, each vector counts as a token."""
    assert counts({"inputs_embeds": torch.zeros(2, 6, 8), "attention_mask": MASK}) == (2, 12, 9, None)


@pytest.mark.parametrize(
    "batch", [None, 3, {}, "text", {"pixels": "none"}, (torch.zeros(2, 3),), [{}], {"input_ids": torch.ones(2, 3, 4)}]
)
def test_other_batches_have_no_counts(batch):
    """Other batches have no counts."""
    found = tokens_of(batch)
    assert found[1:] == (None, None, None, ())


def test_a_batch_is_counted_before_its_tensors_are_reused():
    """A script may reuse the same tensors for its next batch."""
    batch = {"input_ids": IDS.clone(), "attention_mask": MASK.clone(), "labels": LABELS.clone()}
    copied = copy_batch(batch)
    for tensor in batch.values():
        tensor.fill_(-100)
    batch["attention_mask"].zero_()
    found = count_tokens(copied)
    assert (found.real_tokens, found.loss_tokens) == (9, 7)

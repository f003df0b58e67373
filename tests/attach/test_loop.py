"""Tests of a training loop that marks its own steps."""

import pytest
import torch

from lorameter.attach.meter import Meter


@pytest.fixture
def parts(make_model, rows):
    """A model, its optimizer and its batches of two rows."""
    model = make_model()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    batches = [
        {key: torch.stack([one[key] for one in rows[start : start + 2]]) for key in rows[0]}
        for start in range(0, 12, 2)
    ]
    return model, optimizer, batches


def meter_of(listener, model, **more):
    meter = Meter(model, **more)
    meter._make = lambda: listener
    return meter


def update(optimizer):
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.usefixtures("unattached")
def test_each_batch_is_a_step(listener, parts):
    """Each step has its tokens, its parts and the loss that the model returns; a second epoch continues the count."""
    model, optimizer, batches = parts
    losses = []
    with meter_of(listener, model) as meter:
        for _ in range(2):
            for batch in meter.steps(batches):
                loss = model(**batch).loss
                loss.backward()
                update(optimizer)
                losses.append(loss.item())
    assert [one.number for one in listener.readings] == list(range(1, 13))
    for reading, loss in zip(listener.readings, losses, strict=True):
        assert (reading.sequences, reading.padded_tokens, reading.real_tokens) == (2, 32, 28)
        assert reading.loss == pytest.approx(loss)
        parts = [reading.data_time_s, reading.forward_time_s, reading.backward_time_s, reading.optimizer_time_s]
        assert all(part > 0 for part in parts)
        assert sum(parts) < reading.step_time_s
    assert listener.ends == [None]
    assert not model._forward_hooks
    assert not hasattr(torch.autograd.backward, "__wrapped__")


@pytest.mark.usefixtures("unattached")
def test_accumulated_batches_are_one_step(listener, parts):
    """The loss of a step is the mean of its passes; leftover batches are not a step."""
    model, optimizer, batches = parts
    with meter_of(listener, model) as meter:
        for place, batch in enumerate(meter.steps(batches, accumulation=4)):
            (model(**batch).loss / 4).backward()
            if place % 4 == 3:
                update(optimizer)
    (reading,) = listener.readings
    assert reading.sequences == 8
    assert 3 < reading.loss < 6


@pytest.mark.usefixtures("unattached")
def test_an_evaluation_is_a_phase(listener, parts, clock):
    """The passes and the time of an evaluation belong to no step."""
    model, optimizer, batches = parts
    with meter_of(listener, model) as meter:
        for batch in meter.steps(batches[:3]):
            model(**batch).loss.backward()
            update(optimizer)
            with meter.evaluating(), torch.no_grad():
                model(**batches[3])
                clock.wait(100.0)
    assert max(one.step_time_s for one in listener.readings) < 100
    assert listener.phases == ["evaluate", "train"] * 3
    assert all(one.sequences in (2, None) for one in listener.readings)

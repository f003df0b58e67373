"""Tests of the steps of transformers' Trainer, as its meter reports them.

Tests of the parts of a step, computed from the clock at their borders.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from lorameter.attach import sources
from lorameter.attach.meter import Meter
from lorameter.attach.steps import sum_parts


def arguments(folder, **more):
    plain = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 4, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "per_device_train_batch_size": 2, "logging_steps": 2, "seed": 1,
    }  # fmt: skip
    return TrainingArguments(**plain | more)


@pytest.fixture
def followed(make_model, rows, tmp_path, monkeypatch):
    """A function that trains with a listener attached and returns the Trainer."""

    def train(listener, *, trainer=Trainer, callbacks=(), require=None, **more):
        meter = Meter(require=require)
        monkeypatch.setattr(sources, "make_observer", lambda **options: listener)
        made = trainer(
            model=make_model(), args=arguments(tmp_path, **more), train_dataset=rows, eval_dataset=rows[:4],
            callbacks=[meter, *callbacks],
        )  # fmt: skip
        made.train()
        return made

    return train


@pytest.mark.usefixtures("unattached")
def test_each_step_is_reported_with_its_tokens_and_parts(listener, followed):
    """Tokens are those of the batches, the parts lie within the step, and the loss is the one that the Trainer logs."""
    trainer = followed(listener, logging_steps=1)
    (training,) = listener.trainings
    assert (training.source, training.planned_steps, training.accumulation) == ("trainer", 4, 1)
    assert (training.trainable_parameters, training.total_parameters) == trainer.model.get_nb_trainable_parameters()
    assert [one.number for one in listener.readings] == [1, 2, 3, 4]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    for reading, loss, norm in zip(listener.readings, logged, norms, strict=True):
        assert (reading.sequences, reading.padded_tokens) == (2, 32)
        assert reading.real_tokens in (24, 28, 32)
        assert reading.loss == pytest.approx(loss, abs=1e-3)
        assert reading.gradient_norm == pytest.approx(norm)
        parts = [reading.data_time_s, reading.forward_time_s, reading.backward_time_s, reading.optimizer_time_s]
        assert all(part > 0 for part in parts)
        assert sum(parts) < reading.step_time_s
        assert reading.checks is None
    assert listener.ends == [None]


@pytest.mark.usefixtures("unattached")
def test_an_accumulated_step_is_one_step(listener, followed):
    """A step holds all its accumulated batches."""
    followed(listener, gradient_accumulation_steps=3, max_steps=2)
    assert listener.trainings[0].accumulation == 3
    assert [(one.sequences, one.padded_tokens) for one in listener.readings] == [(6, 96), (6, 96)]


class Slow(TrainerCallback):
    """A callback that makes an evaluation batch or a save slow."""

    def __init__(self, wait):
        self.wait = wait

    def on_prediction_step(self, *args, **kwargs):
        self.wait(100.0)


@pytest.mark.usefixtures("unattached")
def test_evaluation_and_saving_are_phases_in_no_steps_time(listener, followed, clock):
    """Evaluations and saves are phases in the Trainer's order, and no step time includes them."""
    followed(
        listener, callbacks=[Slow(clock.wait)], eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=4, per_device_eval_batch_size=4,
    )  # fmt: skip
    assert listener.phases == ["evaluate", "train", "evaluate", "save"]
    assert max(one.step_time_s for one in listener.readings) < 100


@pytest.mark.usefixtures("unattached")
def test_a_training_is_the_same_with_and_without(listener, followed, make_model, rows, tmp_path):
    """Weights and losses are bit-equal, and no hook or patch is left on the Trainer."""
    plain = Trainer(model=make_model(), args=arguments(tmp_path), train_dataset=rows)
    plain.train()
    metered = followed(listener)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, metered.model.state_dict()[name]), name
    losses = [[one["loss"] for one in trainer.state.log_history if "loss" in one] for trainer in (plain, metered)]
    assert losses[0] == losses[1]
    assert not {"compute_loss", "training_step", "get_batch_samples", "_get_grad_norm"} & set(vars(metered))
    assert not hasattr(Trainer.get_batch_samples, "__wrapped__")
    assert not metered.model._forward_hooks


@pytest.mark.usefixtures("unattached")
def test_an_error_of_the_meter_is_printed_once_and_the_training_continues(listener_class, followed, capfd):
    """The observer is notified that it did not observe the training to its end."""

    class Failing(listener_class):
        def step(self, reading):
            super().step(reading)
            raise OSError("no room")

    listener = Failing()
    trainer = followed(listener)
    assert trainer.state.global_step == 4
    assert len(listener.readings) == 1
    (error,) = listener.ends
    assert "the meter failed after 1 step: OSError: no room" in str(error)
    assert capfd.readouterr().err.count("the measurement failed and has stopped") == 1


@pytest.mark.usefixtures("unattached")
def test_batches_that_were_too_large_do_not_end_the_following(listener, followed):
    """A Trainer with auto_find_batch_size restarts after an OOM; its attempts are one training."""
    calls = []

    class Greedy(Trainer):
        def training_step(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(*args, **kwargs)

    followed(listener, trainer=Greedy, auto_find_batch_size=True)
    assert len(listener.trainings) == 1
    assert listener.readings[-1].sequences == 1
    assert listener.ends == [None]


def borders(*events, event_of=lambda at_s: None):
    """Return the borders of a step that begins at 0, one event each second: + begins a part, - ends it, < begins a
    backward pass after a forward pass."""
    kinds = {"+": "begin", "-": "end", "<": "backward"}
    found = [(None, "begin", 0.0, event_of(0.0))]
    for at_s, event in enumerate(events, 1):
        found.append((event[1:], kinds[event[0]], float(at_s), event_of(float(at_s))))
    return found


@pytest.mark.parametrize(
    ("events", "found"),
    [
        (["+forward", "-forward", "+backward", "-backward"], {"forward": 1.0, "backward": 1.0}),
        (["+forward", "-forward", "+forward", "-forward"], {"forward": 2.0}),
        (["+data", "-data", "<backward", "-backward", "<backward", "-backward"],
         {"data": 1.0, "forward": 2.0, "backward": 2.0}),
        (["+optimizer", "<backward", "-backward", "-optimizer"], {"optimizer": 1.0, "forward": 1.0, "backward": 1.0}),
        (["+optimizer", "+optimizer", "-optimizer", "-optimizer"], {"optimizer": 3.0}),
        (["+optimizer", "+backward", "-optimizer", "+forward", "-forward"],
         {"optimizer": 1.0, "backward": 1.0, "forward": 1.0}),
        (["+backward", "-backward", "-backward", "-optimizer"], {"backward": 1.0}),
        (["+forward", "-forward", "+backward"], {"forward": 1.0}),
    ],
    ids=["in turn", "twice", "passes", "a closure", "in itself", "an end left out", "an end too many", "none"],
)  # fmt: skip
def test_time_of_nested_parts_counts_for_the_innermost(events, found):
    """With any nesting and any missing end, no time is counted twice."""
    parts = sum_parts(borders(*events))
    parts.pop(None)
    assert parts == found


def test_on_a_gpu_the_device_stamps_all_but_the_wait_for_data():
    """This also holds for nested parts. The GPU's clock runs at half the speed of the host's."""

    def event_of(at_s):
        return SimpleNamespace(at_s=at_s / 2, elapsed_time=lambda later: (later.at_s - at_s / 2) * 1e3)

    events = ["+data", "-data", "+optimizer", "+data", "-data", "+forward", "-forward", "-optimizer"]
    parts = sum_parts(borders(*events, event_of=event_of))
    parts.pop(None)
    assert parts == {"data": 2.0, "optimizer": 1.5, "forward": 0.5}

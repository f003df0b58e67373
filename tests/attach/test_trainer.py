"""Tests of the steps of transformers' Trainer, as its meter reports them."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from lorameter.attach.meter import Meter


def arguments(folder, **more):
    plain = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": 4, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "per_device_train_batch_size": 2, "logging_steps": 2, "seed": 1,
    }  # fmt: skip
    return TrainingArguments(**plain | more)


@pytest.fixture
def followed(make_model, rows, tmp_path):
    """A function that trains with a listener attached and returns the Trainer."""

    def train(listener, *, trainer=Trainer, callbacks=(), require=None, **more):
        meter = Meter(require=require)
        meter._make = lambda: listener
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
        assert reading.loss_tokens == reading.real_tokens - 8
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
    assert listener.phases == ["evaluate", "train", "evaluate", "save", "train"]
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

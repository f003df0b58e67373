"""Tests of a training loop that marks its own steps.

Tests of what counts as a token in a batch.

Tests of the steps of a training as its observer receives them.

Tests of the FLOPs of a script's step on constructed steps, since no device with a known peak is needed to count.

Tests of the energy of a script's training: the GPU's counter over the periods of pure training.
"""

import weakref

import pytest
import torch

from lorameter.attach import measures as module
from lorameter.attach.batches import BY_ALL, BY_MASK, BY_POSITIONS, copy_batch, count_tokens
from lorameter.attach.measures import Energy, StepFlops, complete_columns, turn_columns
from lorameter.attach.meter import Meter
from lorameter.attach.observer import ObserverReply, StepReading, TrainingInfo
from lorameter.attach.steps import Steps, make_watch
from lorameter.machine.reading import Reading
from lorameter.models.costs.flops import StepTokens, count_products


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


def update(optimizer):
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.usefixtures("unattached")
def test_each_batch_is_a_step(listener, parts):
    """Each step has its tokens, its parts and the loss that the model returns; a second epoch continues the count."""
    model, optimizer, batches = parts
    losses = []
    with Meter(model) as meter:
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
    with Meter(model) as meter:
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
    with Meter(model) as meter:
        for batch in meter.steps(batches[:3]):
            model(**batch).loss.backward()
            update(optimizer)
            with meter.evaluating(), torch.no_grad():
                model(**batches[3])
                clock.wait(100.0)
    assert max(one.step_time_s for one in listener.readings) < 100
    assert listener.phases == ["evaluate", "train"] * 3
    assert all(one.sequences in (2, None) for one in listener.readings)


def tokens_of(batch):
    return count_tokens(copy_batch(batch))


def counts(batch):
    found = tokens_of(batch)
    return found.sequences, found.padded_tokens, found.real_tokens


IDS = torch.arange(12).reshape(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def test_a_mask_gives_the_real_tokens():
    """The positions that it keeps are real."""
    assert counts({"input_ids": IDS, "attention_mask": MASK}) == (2, 12, 9)
    assert tokens_of({"input_ids": IDS, "attention_mask": MASK}).conventions == (BY_MASK,)


def test_a_packed_row_ends_where_its_records_do():
    """Zero positions without a label at the end of a row are filler; the first position of a record is not."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 0, 0]])
    labels = torch.tensor([[-100, 5, 5, -100, 5, 5], [-100, 5, 5, -100, -100, -100]])
    batch = {"input_ids": IDS, "position_ids": positions, "labels": labels}
    assert counts(batch) == (2, 12, 9)
    assert tokens_of(batch).conventions == (BY_POSITIONS,)


def test_all_tokens_are_real_without_a_mask_or_labels():
    """This is the case of a loop over raw blocks; the first integer tensor of a tuple holds the tokens."""
    assert counts({"input_ids": IDS}) == (2, 12, 12)
    assert counts((IDS, IDS)) == (2, 12, 12)
    assert tokens_of((IDS,)).conventions == (BY_ALL,)


def test_embedding_vectors_count_as_tokens():
    """For a model with embedding inputs, each vector counts as a token."""
    assert counts({"inputs_embeds": torch.zeros(2, 6, 8), "attention_mask": MASK}) == (2, 12, 9)


@pytest.mark.parametrize(
    "batch", [None, 3, {}, "text", {"pixels": "none"}, (torch.zeros(2, 3),), [{}], {"input_ids": torch.ones(2, 3, 4)}]
)
def test_other_batches_have_no_counts(batch):
    """Other batches have no counts."""
    found = tokens_of(batch)
    assert found[1:] == (None, None, ())


def test_a_batch_is_counted_before_its_tensors_are_reused():
    """A script may reuse the same tensors for its next batch."""
    batch = {"input_ids": IDS.clone(), "attention_mask": MASK.clone()}
    copied = copy_batch(batch)
    for tensor in batch.values():
        tensor.fill_(-100)
    batch["attention_mask"].zero_()
    found = count_tokens(copied)
    assert found.real_tokens == 9


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(16, 4), torch.nn.Linear(4, 16))


def training_of(model):
    return TrainingInfo(
        source="loop", model=weakref.ref(model), planned_steps=None, trainable_parameters=1, total_parameters=1,
        accumulation=1,
    )  # fmt: skip


class PatientObserver:
    """An observer that accepts late reports; it records the reports and their times."""

    def __init__(self):
        self.readings, self.phases, self.errors = [], [], []

    def begin(self, training):
        return ObserverReply(flush_interval_s=3600.0)

    def step(self, reading):
        self.readings.append(reading)
        return ObserverReply(flush_interval_s=3600.0)

    def phase(self, phase):
        self.phases.append((phase, len(self.readings)))

    def end(self, error, *, seen=True):
        self.errors.append((error, len(self.readings)))


def test_steps_before_a_failure_of_the_meter_are_reported(model, capfd):
    """An error of the meter in a later step loses no earlier results."""
    observer = PatientObserver()
    training = training_of(model)
    steps = Steps(observer, training)
    steps.begin()
    for _ in range(3):
        steps.end_step()
    assert len(observer.readings) == 1
    steps._guard.run(lambda: 1 / 0)
    assert len(observer.readings) == 3
    ((error, readings),) = observer.errors
    assert readings == 3
    assert "ZeroDivisionError" in str(error)
    assert "has stopped" in capfd.readouterr().err


def test_a_meter_does_not_wait_for_other_ranks():
    """Other ranks may watch another step, and waiting for them would hang."""
    model = torch.nn.Linear(2, 2)
    with (watched := make_watch(model, {"ranks.base": True, "mode": "train"})):
        model(torch.ones(1, 2)).sum().backward()
    assert {check.path for check in watched.checks if check.required is not None} == {"mode"}


H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def gathered():
    """Steps of two rows with ten real tokens each."""
    step = StepReading(
        number=1, step_time_s=0.1, cpu_time_s=0.1, sequences=2, real_tokens=20, padded_tokens=32
    )  # fmt: skip
    return {name: values * 5 for name, values in complete_columns(turn_columns([step])).items()}


def work(model):
    return StepFlops(TrainingInfo(
        source="trainer", model=weakref.ref(model), planned_steps=None, trainable_parameters=1, total_parameters=1,
        accumulation=1,
    ))  # fmt: skip


TOKENS = StepTokens(positions=20, pairs=110, passes=1)


def test_flops_are_counted_from_the_modules(make_model, gathered):
    """The peak is that of the dtype of the products."""
    model = make_model()
    values = work(model).values(gathered, H100)
    assert values["model_flops_per_step"] == count_products(model).flops(TOKENS).model
    assert values["peak_flops_per_s"] == pytest.approx(66.9e12)
    assert work(model.to(torch.bfloat16)).values(gathered, H100)["peak_flops_per_s"] == pytest.approx(989.4e12)


def test_unknown_peaks_and_flops_are_left_out(make_model, gathered):
    """An unlisted device has no peak; a model without a configuration and steps with unknown tokens have no FLOPs."""
    assert "peak_flops_per_s" not in work(make_model()).values(gathered, "Test CPU")
    assert work(torch.nn.Linear(2, 2)).values(gathered, H100) == {}
    unseen = complete_columns(turn_columns([StepReading(number=1, step_time_s=0.1, cpu_time_s=0.1)]))
    assert work(make_model()).values(unseen, H100) == {}


class Gpu:
    """A GPU whose counter shows 100 W; the test advances its clock."""

    now_s = 50.0

    def energy_j(self):
        return Reading(value=1000.0 + 100.0 * self.now_s)


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()
    monkeypatch.setattr(module, "open_torch_gpu", lambda device: Reading(value=made))
    monkeypatch.setattr(module.time, "monotonic", lambda: made.now_s)
    return made


def reading(tokens=10):
    return StepReading(number=1, step_time_s=1.0, cpu_time_s=1.0, real_tokens=tokens)


def train(energy, gpu, seconds, steps=2, tokens=10):
    energy.begin()
    for _ in range(steps):
        energy.step(reading(tokens))
    gpu.now_s += seconds


def test_periods_add_up_without_the_time_between_them(gpu):
    """Energy, steps and tokens of the periods add up without the time between them; reading a current period does not
    change it."""
    energy = Energy("cuda:0")
    assert energy.values() == {}
    train(energy, gpu, 20.0)
    assert energy.values() == energy.values() == {
        "device_energy_train_j": 2000.0, "energy_steps": 2, "energy_tokens": 20,
    }  # fmt: skip
    energy.end()
    gpu.now_s += 500.0  # an evaluation
    assert energy.values()["device_energy_train_j"] == 2000.0
    train(energy, gpu, 30.0, steps=3)
    energy.end()
    energy.end()
    assert energy.values() == {"device_energy_train_j": 5000.0, "energy_steps": 5, "energy_tokens": 50}

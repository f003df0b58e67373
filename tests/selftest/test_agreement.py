"""The loops that the proof of a step's time compares see the same rows, in the same order."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from harness.studies.study_file import load_study

STEPS = 5


class Seeing(torch.nn.Module):
    """A model that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, input_ids, labels, use_cache=None):
        self.seen.append(input_ids.tolist())
        loss = self.weight * input_ids.float().mean()
        return SimpleNamespace(loss=loss) if use_cache is False else {"loss": loss}


class Stream:
    """Fewer rows than steps, as of a token file that starts again."""

    def __init__(self, size):
        self.size, self.taken = size, 0

    def take(self):
        self.taken += 1
        rows = torch.arange(self.size * 4).reshape(self.size, 4) + 100 * (self.taken % 3)
        return {"input_ids": rows, "labels": rows}


@pytest.mark.parametrize("size", [1, 2])
def test_loop_and_trainer_see_the_same_rows(program, monkeypatch, tmp_path, size):
    """In the order of the stream, whole batches, also after its end; a Trainer would shuffle what has a length."""
    loops, study = program("agreement_loops"), load_study("training-step")
    request = SimpleNamespace(
        variant=study.variants[0], workload=dataclasses.replace(study.workload, batch_size=size)
    )  # fmt: skip

    def train(by):
        model = Seeing()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        trainee = SimpleNamespace(
            model=model, optimizer=optimizer, schedule=schedule, parameters=list(model.parameters())
        )
        monkeypatch.setattr(loops, "build_both", lambda request, steps: (trainee, Stream(size)))
        by(request, STEPS)
        return model.seen

    monkeypatch.chdir(tmp_path)
    stream = Stream(size)
    expected = [stream.take()["input_ids"].tolist() for _ in range(STEPS)]
    assert train(loops.train_by_loop) == expected
    assert train(loops.train_by_trainer) == expected


WITHIN = {"loop": (0.96, 1.01), "trainer": (1.05, 1.12)}


@pytest.mark.parametrize("way", WITHIN)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"low": 0.5}, ["is what the loops differ in"]),
        ({"high": 1.5}, ["is what the loops differ in"]),
        ({"losses": "differ"}, ["the losses do not agree: differ"]),
        ({"losses": "unknown", "high": 1.5}, ["is what the loops differ in", "the losses do not agree: unknown"]),
    ],
)
def test_a_loop_agrees_where_its_interval_and_its_losses_do(program, way, changes, said):
    """All of the interval lies within the bound of its loop; losses that nobody saw agree do not."""
    low, high = WITHIN[way]
    found = program("agreement").judge_loop(way, {"low": low, "high": high, "losses": "agree"} | changes)
    assert len(found) == len(said)
    assert all(line.startswith(f"{way}: ") and words in line for line, words in zip(found, said, strict=True))


@pytest.mark.parametrize(("followed_s", "agrees"), [(0.0101, True), (0.0120, False), (0.0090, False)])
def test_a_training_that_is_read_twice_takes_as_long(program, followed_s, agrees):
    """From outside and from inside, but for what lies between two steps."""
    agreement = program("agreement")
    found = agreement.judge_twice(agreement.Twice(what="nf4", followed_s=followed_s, recorded_s=0.01))
    assert (found == []) is agrees

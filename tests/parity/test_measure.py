"""Tests of parity measured by real processes through the command line, and of its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorameter.cli import main
from lorameter.parity import CONFIG, DOCUMENT, WEIGHTS, Parity, _read
from lorameter.records import codec
from lorameter.records.record import Failure, PartialRecord
from lorameter.run.workers import TrialFiles
from lorameter.studies.request import serving_modes
from lorameter.studies.variant import LoraVariant
from tests.run.fakes import FakeExecutor

STUDY = """
[workload]
sequence_length = 32
batch_size = 2
train_sequences = 16
held_out_records = 4
held_out_sequences = 3
prompt_tokens = 8
new_tokens = 4
[protocol]
warmup_steps_min = 1
warmup_steps_max = 1
turns = 1
step_timeout_s = 900
[controls]
r = 4
learning_rate = 1e-2
[[variant]]
name = "nf4"
quantization = "nf4"
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study file with one minimal variant."""
    path = tmp_path_factory.mktemp("study") / "mine.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.selftest
def test_a_trained_adapter_is_served_in_every_mode(study, runs, capsys):
    """After training, each base is served in a separate process: the reference repeats itself bit for bit, the base
    without the adapter differs, and a merge into 4 bits changes logits."""
    command = ["parity", str(study), "--prompts", "6", "--epochs", "1.5", "--json", "--runs-dir", str(runs)]
    assert main([*command, "--if-busy", "share"]) == 0
    captured = capsys.readouterr()
    read = json.loads(captured.out, object_hook=lambda found: SimpleNamespace(**found))
    assert "serving: merged, nf4 dequantised" in captured.err
    assert read.valid
    assert read.training_steps == 12
    by_name = {row.way: row for row in read.ways}
    assert len(by_name) == 6
    assert by_name["unmerged, nf4, asked again"].difference_max == 0
    assert by_name["no adapter, nf4"].verdict == "differ"
    merged = by_name["merged into nf4"]
    assert merged.difference_max > 0
    assert merged.cosine_mean.value > 0.9
    assert merged.answers.of == 6
    assert merged.tokens.of == 24
    assert merged.loss_difference.low is not None
    (folder,) = runs.iterdir()
    assert str(folder) == read.path
    parity = codec.from_json(Parity, json.loads((folder / DOCUMENT).read_text()), DOCUMENT)
    assert len(parity.prompts) == 6
    assert parity.record.status == "ok"


class FailingExecutor(FakeExecutor):
    """An executor whose processes cannot load the adapter."""

    def start(self, folder, threads):
        self.log = folder / "logs" / "trial.log"
        self.log.parent.mkdir()
        self.log.touch()

    def make_place(self, trial, log):
        return TrialFiles(scratch=trial, log_path=str(self.log))

    def ask(self, command, trial, timeout_s, **arguments):
        return PartialRecord().failed("crashed", Failure(phase="parity", kind="RuntimeError", message="size mismatch"))


def test_an_adapter_that_cannot_be_served_is_an_error_message(study, runs, tmp_path, monkeypatch, capsys):
    """Without the reference the command prints only the reason and the log, and exits with 4."""
    monkeypatch.setattr("lorameter.commands.profile.open_executor", FailingExecutor)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / WEIGHTS).touch()
    before = list(runs.iterdir())
    command = ["parity", str(study), "--adapter", str(tmp_path), "--runs-dir", str(runs), "--if-busy", "share"]
    assert main(command) == 4
    errors = " ".join(capsys.readouterr().err.split())
    assert "unmerged, nf4, the reference, gave no answer: RuntimeError: size mismatch" in errors
    assert Path(errors.rpartition("The log is ")[2].removesuffix(".")).is_file()
    (folder,) = (one for one in runs.iterdir() if one not in before)
    assert not (folder / DOCUMENT).exists()


def test_a_crashed_process_is_a_row_for_each_of_its_serving_modes():
    """Each serving mode of the process has the reason, and the other modes count."""
    ways = serving_modes(LoraVariant(quantization="nf4"))[3]
    failure = Failure(phase="parity", kind="ProcessDied", message="killed")
    found = _read(PartialRecord().failed("crashed", failure), ways)
    assert [(one.way, one.failure) for one in found] == [(way.name, failure) for way in ways]
    assert [one.failure.kind for one in _read(PartialRecord(status="oom"), ways)] == ["Unknown"] * len(ways)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "nowhere"], "adapter = 'nowhere': it does not contain adapter_config.json"),
        (["--adapter", "a", "--epochs", "1"], "--adapter and --epochs"),
        (["--prompts", "0"], "held_out_records = 0"),
        (["--epochs", "-1"], "epochs = -1"),
        (["--model", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(study, tmp_path, capsys, options, words):
    """The command exits with 2 and the reason, and creates no folder."""
    assert main(["parity", str(study), *options, "--runs-dir", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("config", "words"),
    [("{", "cannot be read"), ("[1]", "cannot be read"), ('{"peft_type": "IA3"}', "peft_type = 'IA3'")],
)
def test_a_folder_of_something_else_is_refused(study, tmp_path, capsys, config, words):
    """A folder that PEFT did not save, or saved for another method, is refused."""
    (tmp_path / CONFIG).write_text(config)
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert main(["parity", str(study), "--adapter", str(tmp_path), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert words in capsys.readouterr().err

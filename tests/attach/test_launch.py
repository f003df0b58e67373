"""Tests of `lorameter wrap`: the command is unchanged, and its training is recorded however it ends.

Tests of the stored command: anything that looks like a credential is removed, and nothing else.

Tests of the hook in a child process: it attaches to a process that trains and to no other.
"""

import os
import shlex
import signal
import sys
import textwrap

import pytest

from lorameter.attach import launch
from lorameter.attach.launch import format_command
from lorameter.cli import main
from lorameter.commands.run import read_requirements
from lorameter.errors import UsageError
from lorameter.records import store
from lorameter.studies.script import split_command
from lorameter.studies.variant import ScriptVariant

LOOP = """
import os, signal, sys, time
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def train(steps):
    for ids in torch.utils.data.DataLoader(torch.randint(0, 32, (2 * steps, 6)), batch_size=2):
        torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
train(30)
print("trained")
"""


@pytest.fixture
def wrap(tmp_path, monkeypatch):
    """A function that wraps a script with the given text and returns the exit code and the run, or None without a
    run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(text, *options, python=(sys.executable,)):
        (tmp_path / "train.py").write_text(textwrap.dedent(text))
        code = main(["wrap", "--runs-dir", "runs", *options, "--", *python, "train.py"])
        (path, *_) = [*store.list_runs(tmp_path / "runs"), None]
        assert not [one for one in (tmp_path / "runs").iterdir() if one.name.startswith(".")]
        return code, None if path is None else store.read_run(str(path), path.parent)

    return run


def test_a_signal_reaches_the_command_and_the_measured_steps_are_kept(wrap):
    """The signal ends the command, and the run records it."""
    text = LOOP + "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
    code, run = wrap(text, "--no-report")
    (record,) = run.records
    assert code == 128 + signal.SIGTERM
    assert (run.state, record.status) == ("interrupted", "interrupted")
    assert "SIGTERM" in record.failure.message


@pytest.mark.faults
@pytest.mark.parametrize(
    ("end", "code", "status", "expected"),
    [
        ("raise ValueError('mine')", 1, "crashed", "mine"),
        ("os._exit(7)", 7, "crashed", "exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "crashed", "SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "crashed", "SIGSEGV"),
        ("signal.raise_signal(signal.SIGINT)", 130, "interrupted", "stopped"),
        ("raise torch.OutOfMemoryError('CUDA out of memory')", 1, "oom", "out of memory"),
        ("ids = model[1].weight.data.fill_(float('nan')); train(3)", 0, "invalid", "the loss is nan"),
    ],
    ids=["crash", "exit", "kill", "segfault", "ctrl-c", "memory", "nan"],
)
def test_a_training_that_ends_early_has_a_record_with_the_reason(wrap, end, code, status, expected):
    """The record has the reason, the command's own exit code, and the steps before the end."""
    found, run = wrap(LOOP + end + "\n", "--no-report")
    (record,) = run.records
    assert (found, record.status, run.state != "running") == (code, status, True)
    assert expected in record.failure.message


def test_a_crash_before_training_leaves_no_run(wrap, capfd):
    """A command without a training leaves no run; the exit code is the command's, or 4 with required paths."""
    assert wrap("raise SystemExit(5)") == (5, None)
    assert (
        "ended with exit code 5, and no Trainer and no optimizer of torch had begun to train" in capfd.readouterr().err
    )
    assert wrap("print('nothing')", "--require", "base.bits=4") == (4, None)
    printed = capfd.readouterr()
    assert printed.out == "nothing\n"
    assert "nothing was measured: the command has ended, and no Trainer" in printed.err


def test_an_isolated_interpreter_is_reported(wrap, capfd):
    """An isolated interpreter (-I) does not load the hook, and a message says so."""
    assert wrap("print('alone')", python=(sys.executable, "-I")) == (0, None)
    assert "no Python of the command has loaded the hook" in capfd.readouterr().err


RANKS = """
import atexit, os, time
atexit.register(os._exit, 0)  # torch's gloo aborts some processes at their end, measured or not
import torch.distributed as dist
dist.init_process_group("gloo")
"""


@pytest.mark.faults
def test_step_times_under_torchrun_are_those_of_the_slowest_rank(wrap):
    """Rank 1 needs 50 ms more for each step and rank 0 waits only at the end; step times are rank 1's, and tokens are
    those of both."""
    text = RANKS + LOOP.replace("batch_size=2):\n", "batch_size=2):\n        time.sleep(PAUSE_S)\n")
    text = text.replace("def train", "PAUSE_S = 0.05 * dist.get_rank()\ndef train") + "dist.barrier()\n"
    code, run = wrap(
        text, "--no-report",
        python=(
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
        ),
    )  # fmt: skip
    (record,) = run.records
    assert (code, record.status, record.values["ranks"]) == (0, "ok", 2), record.failure
    assert not record.notices
    assert min(record.samples["step_time_s"]) >= 0.05
    assert set(record.samples["turn_tokens"]) == {24.0}


@pytest.mark.faults
def test_a_console_script_of_trl_is_followed(tmp_path, monkeypatch, sft_command, capfd):
    """`lorameter wrap -- trl sft …` records the Trainer of the training process only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = [*shlex.split(sft_command), "--max_steps", "30", "--lora_r", "4"]
    code = main(["wrap", "--runs-dir", "runs", "--", *words])
    (path,) = store.list_runs(tmp_path / "runs")
    (record,) = store.read_run(str(path), path.parent).records
    assert (code, record.status, record.values["training_steps"]) == (0, "ok", 30), record.failure
    assert len(record.samples["step_time_s"]) >= 5
    assert record.values["trainable_parameters"] < record.values["total_parameters"]
    assert "steps are the Trainer's" in capfd.readouterr().err
    assert not record.notices


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("base.bits", "PATH=VALUE is expected"),
        ("no.such=1", "not known"),
        ("base.bits=seven", "must be one of"),
        ("base.bits=" + "9" * 5000, "must be one of"),
        ("base.bits=" + "[" * 100_000, "must be one of"),
        ("base.bits=NaN", "must be one of"),
    ],
)
def test_an_invalid_requirement_is_refused(given, expected):
    """An invalid requirement is refused before anything is started."""
    with pytest.raises(UsageError, match=expected):
        read_requirements([given])
    assert read_requirements(["base.bits=4", "peft.learning=True", "attention.backend=flash"]) == {
        "base.bits": 4, "peft.learning": True, "attention.backend": "flash",
    }  # fmt: skip


def test_unknown_and_missing_commands_are_refused(tmp_path, capsys):
    """An unknown command and a missing command are refused."""
    assert main(["wrap", "--runs-dir", str(tmp_path), "--", "no-such-program"]) == 2
    assert main(["wrap", "--runs-dir", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "no-such-program: No such file or directory" in printed
    assert "no command. Write it after --" in printed


def test_signals_of_a_terminal_are_not_sent_twice(monkeypatch):
    """Signals that the terminal sends to the whole group are not forwarded; all others are."""
    sent = []

    class Process:
        def send_signal(self, number):
            sent.append(number)

    for in_terminal in (True, False):
        monkeypatch.setattr(launch, "_in_terminal", lambda there=in_terminal: there)
        with launch.forward_signals(Process()):
            for number in (signal.SIGINT, signal.SIGUSR1):
                os.kill(os.getpid(), number)
    assert sent == [signal.SIGUSR1, signal.SIGINT, signal.SIGUSR1]


WORDS = [
    ["--hub_token", "hunter2"],
    ["hub_token=hunter2"],
    ["env", "HF_TOKEN=hunter2", "python"],
    ["--wandb-api-key", "hunter2"],
    ["https://user:hunter2@host/x"],
    ["https://host/x?rev=1&X-Amz-Signature=hunter2"],
    ["git+ssh://git:p%40hunter2@host/x"],
    ["sh", "-c", "python t.py --hub_token hunter2 && ls"],
    ["sh", "-c", "HF_TOKEN=$'hunter2' python t.py"],
    ["sh", "-c", 'curl -d "{\\"token\\": \\"hunter2\\"}" host'],
    ["sh", "-c", "python t.py --hub_token \\\n  hunter2"],
    ["--header", "Authorization: AWS4-HMAC-SHA256 Credential=x/y, Signature=hunter2"],
    ["--config", '{"hub": {"token": "hunter2", "push": true}}'],
    ["--config", "{token: hunter2}"],
    ["-c", "login(token=f'hunter2')"],
    ["-c", 'os.environ["HF_TOKEN"]="hunter2"'],
    ["hf_hunter2hunter2hunter2"],
    ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.hunter2hunter2"],
    ["--password=a;b|c,hunter2"],
    ["env", "DB_PASS=hunter2"],
]


@pytest.mark.parametrize("words", WORDS)
def test_a_credential_is_not_written_and_no_study_takes_it(words):
    """Credentials are recognised in options, Hydra fields, variables, addresses, shell lines, headers, JSON, programs,
    and by their own format. A study's command would be stored in each run."""
    line = ["python", "train.py", *words]
    written = format_command(line)
    assert "hunter2" not in written
    with pytest.raises(UsageError, match="inherit the credentials of your environment") as refused:
        ScriptVariant(name="a", command=shlex.join(line))
    assert "hunter2" not in str(refused.value)
    assert ScriptVariant(name="a", command=written).command == written


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "https://host:8080/x?revision=2"],
        ["git+ssh://git@github.com/x/y"],
        ["sh", "-c", "python t.py --hub_token $HF_TOKEN"],
        ["--use_auth_token", "True", "--no-auth", "x"],
        ["--hub_token=None"],
        ["--config", '{"push_token": null, "tokenizer": "x", "pad_token": "</s>"}'],
        ["--author", "me", "--max_tokens", "5"],
        ["-c", "token = os.environ['HF_TOKEN']"],
        ["-c", "os.environ['HF_TOKEN'] = os.environ['OTHER']"],
        ["--hub_token", "--push"],
        ["--forward_pass", "3", "--pwd", "/work", "--bypass=1"],
        ["--run_name", "sk-baseline-lora-r16-alpha32"],
    ],
)
def test_arguments_without_a_credential_are_accepted(words):
    """Host and port, a query, an SSH key file, a variable name, a switch and a vocabulary token are accepted."""
    assert ScriptVariant(name="a", command=shlex.join(["python", "train.py", *words])).command


@pytest.mark.parametrize("value", ["http://user:hunter2@proxy:3128", '{"token": "hunter2"}'])
def test_a_variable_of_a_study_is_read_by_the_same_rule(value):
    """The variables in `env` are stored in the run as well."""
    with pytest.raises(UsageError, match=r"env\.SOME: ") as refused:
        ScriptVariant(name="a", command="python train.py", env={"SOME": value})
    assert "hunter2" not in str(refused.value)


def test_an_invalid_command_is_refused_without_showing_its_credential():
    """The error repeats the command without the credential."""
    for line in ("HF_TOKEN=hunter2 python t.py", "python t.py --hub_token hunter2 | tee", "a 'b --auth=hunter2"):
        with pytest.raises(UsageError) as refused:
            split_command("variant", line)
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("option", ["--base-command", "--candidate-command", "--command"])
def test_no_option_takes_a_command_with_a_credential(option, tmp_path, capsys):
    """Commands of either side of an A/B, or of both, are refused before anything is started or written."""
    words = {"--base-command": "true", "--candidate-command": "true"} if option != "--command" else {}
    words |= {option: "python t.py https://user:hunter2@host/x"}
    sides = ["--base", "HEAD", "--candidate", "HEAD"] if option == "--command" else []
    flat = [word for pair in words.items() for word in pair]
    assert main(["ab", *sides, *flat, "--json", "--runs-dir", str(tmp_path / "runs")]) == 2
    printed = "".join(capsys.readouterr())
    assert "reads like a credential" in printed
    assert "hunter2" not in printed
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


LOOP_HOOK = """
    import torch
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    def train(steps):
        for ids in torch.utils.data.DataLoader(torch.randint(0, 32, (2 * steps, 6)), batch_size=2):
            loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()
"""


@pytest.fixture
def script(tmp_path):
    """A function that writes a script and returns its name."""

    def write(text, name="train.py", loop=LOOP_HOOK):
        (tmp_path / name).write_text(textwrap.dedent(loop) + textwrap.dedent(text))
        return name

    return write


@pytest.mark.faults
def test_data_workers_and_forks_are_not_followed(wrapped, script):
    """Spawned and forked data workers, and a forked child that trains itself, send no events."""
    text = """
        import os
        class Rows(torch.utils.data.Dataset):
            def __len__(self): return 8
            def __getitem__(self, place): return torch.tensor([place])
        if __name__ == "__main__":
            for context in ("spawn", "fork"):
                loader = torch.utils.data.DataLoader(Rows(), num_workers=1, multiprocessing_context=context)
                assert len(list(loader)) == 8
            train(3)
            child = os.fork()
            if not child:
                train(5)
                raise SystemExit(0)
            assert os.waitpid(child, 0)[1] == 0
            train(1)
    """
    done, events = wrapped("python", script(text))
    assert (done.returncode, done.stderr) == (0, "")
    assert [one["what"] for one in events] == ["begin", "step", "step", "step", "end"]
    assert len({one["pid"] for one in events}) == 1


@pytest.mark.faults
def test_children_forked_after_a_watched_step_exit(wrapped, script):
    """After a watched step, forked data workers and a forked child exit and do not wait for a thread of the
    profiler."""
    text = """
        import os
        class Rows(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, place): return torch.tensor([place])
        train(5)
        loader = torch.utils.data.DataLoader(Rows(), num_workers=1, multiprocessing_context="fork")
        print(sum(int(rows.sum()) for rows in loader))
        child = os.fork()
        if not child:
            raise SystemExit(0)
        assert os.waitpid(child, 0)[1] == 0
        train(2)
    """
    done, events = wrapped("python", script(text), WATCH_AFTER="2", timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "6\n", "")
    steps = [one["checks"] for one in events if one["what"] == "step"]
    assert steps[2] > 10
    assert steps[:2] + steps[3:] == [None] * 5


def test_a_script_that_never_trains_is_unchanged(wrapped, script, tmp_path):
    """A script without a training imports nothing of lorameter, has no hook folder on its path, and imports the user's
    own sitecustomize under its name."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sitecustomize.py").write_text("import builtins; builtins.MINE = True\n")
    text = """
        import sys, sitecustomize, transformers
        assert transformers.__version__
        print(MINE, sitecustomize.__file__, [p for p in sys.path if 'attach' in p])
        print([name for name in sys.modules if 'lorameter' in name])
    """
    done, events = wrapped("python", script(text, loop=""), python_path=str(tmp_path / "mine"))
    expected = ["True", str(tmp_path / "mine" / "sitecustomize.py"), "[]", "[]"]
    assert (done.stdout.split(), events) == (expected, []), done.stderr


def test_an_interpreter_without_the_needed_packages_is_not_measured(wrap, tmp_path, capfd):
    """The command runs unchanged, and the message names the missing package and how to install it."""
    for name in ("__init__.py", "optim/__init__.py", "optim/optimizer.py"):  # torch loads for seconds
        (tmp_path / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "torch" / name).touch()
    text = "import sys\nsys.modules['msgspec'] = None  # as if it were not installed\nimport torch.optim.optimizer\n"
    assert wrap(text + "print('trained')\n", "--no-report") == (0, None)
    printed = capfd.readouterr()
    assert printed.out == "trained\n"
    assert f"a training in this process is not measured: {sys.executable} lacks msgspec" in printed.err
    assert "nothing was measured: " in printed.err
    assert f"{sys.executable} -m pip install msgspec" in printed.err
    assert "no optimizer" not in printed.err

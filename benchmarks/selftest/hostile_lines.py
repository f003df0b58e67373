"""Command lines that nobody should be able to do harm with: any command, any options, good and odd values.

They go through the entry points of `lorameter`, of `python -m kernels_check` and of pytest, in a folder with
constructed runs and files. Nothing is measured, downloaded or installed: what would begin with that ends with a refusal
of its own. A line may begin with variables of the environment, as a shell's does; `PWD=gone` is a folder that has been
removed.
"""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import hostile_models
import pytest

from harness import cli
from harness.errors import EXIT_INVALID, InvalidRunError
from kernels_check.__main__ import main as of_kernels
from kernels_check.visible import make_visible

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
CODES = {"pytest": (0, 1, 2, 4, 5)}
"""Exit codes that are documented, where they are not those of lorameter; 3 is pytest's word for a defect."""
OF_LORAMETER = (0, 1, 2, 3, 4, 5)
VALUES = (
    "sound", "slower", "ab", "swept", "diverged", "schema-1", "missing-key", "cut-manifest", "damaged/wrong-type",
    "runs/sound", "files/foreign.json", "files/sound.json", "files/not-json.json", "files/strict.toml",
    "files/mistyped.toml", "lora-or-qlora", "training-step", "lora-or-qlora:lora-r16", "lora-or-qlora:nf4",
    "llama2-lora-parameters", "lora-r16", "qlora-nf4-r16", "tiny-llama", "random:llama2-70b", "random:",
    "random:random:tiny-llama", "synthetic", "nothing/here", "a/b/c", "baseline", "step_time_s", "*", "[", "?", "no*",
    "dropout", "nonsense", "HEAD", "HEAD~9999", "peft==0", "peft==0.19.1", "--", "-", "-1", "0", "1", "3", "8",
    "1e20", "100000000000000000000", "9" * 400, "nan", "inf", "-inf", "0.01", "1.5", "2", "1e-300", "", " ", ".",
    "..", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "/etc", "~nobody/x", "x" * 300, "é" * 200, "\x1b[2J",
    "\x9b31m", "a [/b] c", "[red]x", "\udcff.toml", "\n", "\u202egnp", "%s", "{0}", "files", "runs", "damaged",
    "none", "files/kernels.json", "shared-base", "lockstep", "replicates", "quick", "standard", "rigorous", "train",
    "generate", "cold", "text", "json", "markdown", "github", "models", "studies", "variants", "sizes",
    "wait", "refuse", "share", "pipe", "loop", "a-study.toml/", "data.jsonl", "data.jsonl.gz", "model", "model.gguf",
    "smollm2-135m", "GPU-0", "local", "harness.run.executors.local", "suite", "files/kernels.csv", "kernels.json.gz",
    "compile", "python train.py", "python train.py {--x}", "python train.py {--a|--b} --sep=--", "python other.py {}",
    "python 'x", "sh -c 'python train.py'", "./" + "x" * 260, "python train.py --hub_token hf_x", "A=1 python train.py",
    "base.bits=4", "base.bits=" + "9" * 5000, "attention.backend=flash", "base.bits=" + "[" * 9000, "no.such=1",
)  # fmt: skip
_STUDY = (
    "--model", "--data", "--variant", "--phase", "--replicates", "--effort", "--max-minutes", "--allow-disturbed",
    "--if-busy",
)  # fmt: skip
_OF_SCRIPT = ("--command", "--cwd", "--steps")
_OF_PYTEST = (
    "study", "profile", "model", "data", "effort", "replicates", "interleave", "allow-disturbed", "if-busy", "resume",
    "base", "policy", "runs-dir",
)  # fmt: skip
VARIABLES = (
    "LORAMETER_RUNS", "LORAMETER_CACHE", "LORAMETER_EXECUTOR", "LORAMETER_LOCKS", "GITHUB_STEP_SUMMARY", "HOME",
    "XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "COLUMNS", "LINES", "TERM", "PWD",
)  # fmt: skip
COMMANDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "run": (1, (*_STUDY, *_OF_SCRIPT, "--profile", "--interleave", "--precision", "--resume", "--dry-run")),
    "wrap": (0, ("--require", "--no-report")),
    "report": (1, ()),
    "list": (2, ("--model",)),
    "compare": (2, ("--metric", "--all-metrics", "--force")),
    "gate": (2, ("--policy", "--format")),
    "accept": (1, ()),
    "ab": (
        1,
        (
            *_STUDY,
            *_OF_SCRIPT,
            "--base",
            "--candidate",
            "--base-command",
            "--candidate-command",
            "--precision",
            "--policy",
            "--format",
            "--inject-rows",
            "--resume",
        ),
    ),
    "calibrate": (1, (*_STUDY, "--inject-rows", "--resume")),
    "estimate": (1, ("--model", "--data")),
    "profile": (1, ("--model", "--data", "--try", "--effort", "--if-busy")),
    "sample": (2, ("--replicate", "--count")),
    "claims": (1, ()),
    "doctor": (0, ()),
    "model": (2, ()),
    "kernels_check": (2, ("--check", "--json")),
    "pytest": (
        1,
        (*(f"--lorameter-{name}" for name in _OF_PYTEST), "--benchmark-disable", "--benchmark-skip", "--collect-only"),
    ),
}
"""How many places each command has, and its options; a few that it has not."""
SOUND: dict[str, tuple[str, ...]] = {
    "run": ("lora-or-qlora",), "ab": ("training-step",), "estimate": ("lora-or-qlora:lora-r16",),
    "profile": ("lora-or-qlora:lora-r16",), "report": ("sound",), "claims": ("swept",), "calibrate": ("training-step",),
    "list": ("sizes", "training-step"), "sample": ("swept", "r=16"), "compare": ("sound", "slower"),
    "gate": ("sound", "slower"), "accept": ("sound",), "doctor": (), "model": ("fetch", "smollm2-135m"),
    "kernels_check": ("trace", "files/kernels.json"), "pytest": ("suite",),
    "wrap": (),
}  # fmt: skip
"""Places that can be read."""
FLAGS = (
    "--allow-disturbed", "--dry-run", "--all-metrics", "--force", "--json", "--check", "--lorameter-allow-disturbed",
    "--benchmark-disable", "--benchmark-skip", "--collect-only", "--no-report",
)  # fmt: skip
WRAPPED = ("python", "train.py", "--sep=--", "--", "-x=--", "{}", "no-such-program", "", "x" * 300, "\x1b[2J", "--json")
"""Words of a command that is wrapped."""


def line_of(number: int, seed: int) -> list[str]:
    """Command line `number`."""
    source = random.Random(f"{seed} line {number}")
    command = source.choice(tuple(COMMANDS))
    places, options = COMMANDS[command]
    words = [source.choice(VALUES) for _ in range(places if source.random() < 0.9 else source.randint(0, 3))]
    if source.random() < 0.6:
        words = list(SOUND[command])
    chosen = source.sample(options, min(len(options), source.randint(0, 3)))
    of_command = command in ("run", "ab") and source.random() < 0.3
    if of_command:  # a script in place of variants
        words = ["compile"] if command == "run" else []
        both = ["--base-command", "--candidate-command"] if source.random() < 0.5 else ["--command"]
        chosen = [*(both if command == "ab" else ["--command"]), *(one for one in chosen if "command" not in one)]
    elif command == "ab" and "--resume" not in chosen:
        chosen = list(dict.fromkeys(("--base", "--candidate", *chosen)))
    for option in chosen:
        if option in FLAGS:
            words.append(option)
        elif source.random() < 0.5:
            words.append(f"{option}={source.choice(VALUES)}")
        else:
            words += [option, source.choice(VALUES)]
    if command == "wrap":
        runs_dir = ["--runs-dir", source.choice(("runs", "none", source.choice(VALUES)))]
        behind = [source.choice((*WRAPPED, source.choice(VALUES))) for _ in range(source.randint(0, 4))]
        return [command, *words, *runs_dir, *(("--", *behind) if source.random() < 0.9 else behind)]
    if command == "run" and source.random() < 0.7:
        words.append("--dry-run")
    variables = [f"{source.choice(VARIABLES)}={source.choice(VALUES)}"] if source.random() < 0.15 else []
    if command in ("kernels_check", "pytest"):
        return [*variables, command, *words]
    if source.random() < 0.3:
        words.append("--json")
    runs = source.choice(("runs", "runs", "runs", "damaged", source.choice(VALUES)))
    return [*variables, command, *words, *(("--runs-dir", runs) if source.random() < 0.9 else ())]


@contextmanager
def stand_in() -> Iterator[None]:
    """Meanwhile in a folder that is filled, with a refusal in the place of all that measures, downloads or installs."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, chdir(name):
        folder = Path(name)
        _fill(folder)
        own = {"LORAMETER_CACHE": str(folder / "cache"), "LORAMETER_LOCKS": str(folder), "COLUMNS": "160"}
        with mock.patch.dict(os.environ, own):  # a measurement beside this one is not waited for
            os.environ.pop("PYTEST_ADDOPTS", None)
            _refuse_to_measure()
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                pytest.main(["suite"])  # what it loads is loaded before the processes are forked
            yield


def _fill(folder: Path) -> None:
    for name in ("runs", "damaged", "files"):
        shutil.copytree(GOLDEN / name, folder / name)
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "a-study.toml").mkdir()
    records = "".join(
        json.dumps({"instruction": f"say {n}", "context": "", "response": "x " * 90}) + "\n" for n in range(600)
    )
    (folder / "data.jsonl").write_text(records)
    (folder / "data.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    (folder / "kernels.json.gz").write_bytes(gzip.compress((folder / "files" / "kernels.json").read_bytes()))
    (folder / "train.py").touch()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_bytes(hostile_models.configs()[0])
    (folder / "model.gguf").write_bytes(hostile_models.ggufs()[0])
    cached = folder / "cache" / "models" / hostile_models.CACHED
    cached.mkdir(parents=True)
    (cached / "lorameter.json").write_bytes(hostile_models.places_in_cache()[0])
    suite = folder / "suite"
    suite.mkdir()
    (suite / "conftest.py").write_text("from harness.pytest_plugin import attach as pytest_configure\n")
    (suite / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider -p no:xdist -q\n")
    body = "import pytest\n\n@pytest.mark.lorameter('train')\ndef test_train(replay):\n    replay()\n"
    (suite / "test_suite.py").write_text(body)


def _refuse_to_measure() -> None:
    def begun(*_: Any, **__: Any) -> NoReturn:
        raise InvalidRunError("begun")

    from harness.attach import wrapped
    from harness.commands import ab, profile, run  # noqa: F401 loaded before the processes are forked
    from harness.machine import doctor
    from harness.models import fetch
    from harness.profile import measure as profiling
    from harness.run import ab as sides
    from harness.run import measure
    from harness.run.executors import sides as opened
    from kernels_check.controls import selftest
    from kernels_check.probe import probe

    measure.measure = sides.measure = begun  # type: ignore[assignment]
    profiling.profile_variant = wrapped.run_command = begun  # type: ignore[assignment]
    fetch._build = begun  # type: ignore[assignment]
    opened._revision = opened._requirements = opened._interpreter = begun  # type: ignore[assignment]
    probe.run = selftest.run = lambda _: EXIT_INVALID  # they compile and train
    doctor.survey = functools.partial(doctor.survey, look_s=0.01)  # type: ignore[assignment]
    import harness.trial.building.sizes  # noqa: F401
    import kernels_check.trace.report  # noqa: F401


_VARIABLE = re.compile(r"[A-Z_]+=")


@contextmanager
def _surroundings(variables: list[str]) -> Iterator[None]:
    """Meanwhile with these variables; with PWD in a folder that is not there any more."""
    given = dict(variable.partition("=")[::2] for variable in variables)
    with mock.patch.dict(os.environ, given):
        if "PWD" not in given:
            yield
            return
        with tempfile.TemporaryDirectory(prefix="fuzz-") as gone, chdir(gone):
            os.rmdir(gone)  # noqa: PTH106 as it is named
            yield
            os.mkdir(gone)  # noqa: PTH102 for who removes it


def _enter(line: list[str]) -> int:
    if line and line[0] == "kernels_check":
        return of_kernels(line[1:])
    if line and line[0] == "pytest":
        return int(pytest.main(line[1:]))
    return cli.main(line)


def try_line(number: int, seed: int) -> str:
    """What comes of command line `number`."""
    return try_words(line_of(number, seed))


def try_words(line: list[str]) -> str:
    """`read`, `refused`, or what went wrong in a line."""
    out, errors = io.StringIO(), io.StringIO()
    given = list(itertools.takewhile(_VARIABLE.match, line))
    line = line[len(given) :]
    try:
        with _surroundings(given), redirect_stdout(out), redirect_stderr(errors):
            code = _enter(line)
    except SystemExit as ended:  # argparse's own
        code = int(ended.code or 0) if isinstance(ended.code, int) else 1
        if code not in (0, 2):
            return f"SystemExit {ended.code!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if code not in CODES.get(line[0] if line else "", OF_LORAMETER):
        said = (errors.getvalue() or out.getvalue()).strip().splitlines()
        return f"exit code {code}: {' | '.join(said[-4:])}"
    shown = out.getvalue() + errors.getvalue()
    if line and line[0] == "pytest":  # what pytest repeats of its own words is its own affair
        shown = "\n".join(one for one in shown.splitlines() if "lorameter:" in one)
    if raw := next((character for character in shown if make_visible(character) != character), None):
        return f"shows {raw!r} raw"
    if "Traceback" in errors.getvalue():
        return "a traceback"
    if "--json" in line and line[0] != "pytest" and code != 2 and out.getvalue().strip():
        try:
            json.loads(out.getvalue())
        except ValueError as error:
            return f"prints no JSON document: {error}"
    return "refused" if code == 2 else "read"

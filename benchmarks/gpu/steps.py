"""The steps of the campaign: the question that each answers on a GPU, its command, and its time limit.

The steps are ordered by how much they decide in a minute: facts of the GPU and its fast paths, Llama-2-7B on both
bases, the claims of the study of LoRA parameters, an A/B with an injected slow-down, and then the rest. Each step is a
separate process: a step that hangs or blocks the GPU costs only its own time. On a machine without a GPU each step is
rehearsed: by the same command if that reports its own skips, else by the part that reads studies, options and files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

STUDY, PROFILE = "lora-or-qlora", "--profile=gpu"
"""The default study, and its profile that fills a GPU with Llama-2-7B."""
BASES = ("lora-r16", "qlora-nf4-r16")
"""Its variants in bf16 and in NF4, which differ only in quantisation."""
SWEEP, TWINS = (str(Path(__file__).with_name(name)) for name in ("sweep.toml", "twins.toml"))
INJECTED_ROWS = 260_000
"""Extra rows in each adapted layer of `twins.toml`: reading and writing them costs about 5 % of a step on an H100."""
RUNS, XML = "{runs}", "{xml}"
"""Placeholders in a command for the folder of the step's runs and for the file of its test results."""
LORAMETER = ("-m", "lorameter.cli")
PYTEST = ("-m", "pytest", "-m", "gpu", "-q", "--no-header", "-rs", "-p", "no:cacheprovider", f"--junitxml={XML}")
VERDICTS = (0, 1, 3, 4)
"""Exit codes of a command that measured and reports its result; other codes mean that it could not measure."""
MIN_S = 60.0
"""The minimum time for which a resumable run is started: building a 7B model takes that long."""
CALL_S = 545.0
"""The longest step, so that it fits in a call of ten minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One question and the command that answers it, run by the campaign's interpreter."""

    name: str
    asks: str
    words: tuple[str, ...]
    """The arguments after the interpreter."""
    expected_s: float
    """The expected time on an H100, which is assumed and not measured."""
    limit_s: float
    """The longest time of one attempt."""
    rehearsal: tuple[str, ...] = ()
    """The command on a machine without a GPU; empty for the same command as `words`."""
    skipped: str
    """The part of the step that a rehearsal skips, and why."""
    answers: tuple[int, ...] = (0,)
    """Exit codes of a command with a result; a separate rehearsal command succeeds with 0."""
    resumes: tuple[str, ...] = ()
    """The command that resumes a stopped run, without the run's id; empty if none exists."""
    total_s: float = 0.0
    """The longest time of all attempts at such a run."""

    @property
    def least_s(self) -> float:
        """The remaining time of a call that the step needs to be started."""
        return min(self.limit_s, MIN_S) if self.resumes else self.limit_s


def measures(name: str, asks: str, study: str, *options: str, expected_s: float, total_s: float) -> Step:
    """Return a step that runs a study; a rehearsal plans it and does not measure."""
    run = (*LORAMETER, "run", study, *options, "--runs-dir", RUNS, "--json")
    return Step(
        name=name,
        asks=asks,
        words=run,
        expected_s=expected_s,
        limit_s=min(CALL_S, total_s),
        rehearsal=(*run, "--dry-run"),
        skipped="planned, not measured",
        answers=VERDICTS,
        resumes=(*LORAMETER, "run", "--runs-dir", RUNS, "--json", "--resume"),
        total_s=total_s,
    )


def tests(name: str, asks: str, *files: str, expected_s: float) -> Step:
    """Return a step that runs tests marked `gpu`, which give their own reasons of skipping."""
    return Step(
        name=f"tests-{name}",
        asks=asks,
        words=(*PYTEST, "--timeout=120", *files),
        expected_s=expected_s,
        limit_s=2 * expected_s,
        skipped="all skipped, since each needs a GPU",
        answers=(0, 1),
    )


def of_variant(command: str, variant: str, asks: str, *options: str, expected_s: float) -> Step:
    """Return a step that runs `lorameter estimate` or `profile` for one variant of the study; a rehearsal estimates it
    for this CPU."""
    named = (f"{STUDY}:{variant}", PROFILE)
    return Step(
        name=f"{command}-{variant}",
        asks=asks,
        words=(*LORAMETER, command, *named, *(options or ("--runs-dir", RUNS)), "--json"),
        expected_s=expected_s,
        limit_s=2 * expected_s,
        rehearsal=(*LORAMETER, "estimate", *named, "--runs-dir", RUNS, "--json"),
        skipped="estimated for this CPU",
        answers=VERDICTS,
    )


STEPS: tuple[Step, ...] = (
    tests(
        "paths",
        "flash, 4-bit and paged paths by their kernels; events, clocks, energy and memory against each other",
        "tests/kernels_check/test_gpu.py",
        "tests/machine/test_gpu.py",
        expected_s=130,
    ),
    measures(
        "study",
        "Llama-2-7B in bf16 and in NF4: does all that is claimed run, how fast, warm and cold, with which peak",
        STUDY,
        PROFILE,
        *(f"--variant={variant}" for variant in BASES),
        "--phase=train",
        "--phase=generate",
        "--phase=cold",
        "--replicates=1",
        expected_s=250,
        total_s=900,
    ),
    *(
        of_variant(
            "estimate",
            variant,
            "how far the estimated peak is from the measured one",
            "--runs-dir",
            "{runs of study}",
            expected_s=15,
        )
        for variant in BASES
    ),
    measures(
        "sweep",
        "the claims of time about alpha, dropout and r on Llama-2-7B, all settings on one base",
        SWEEP,
        "--phase=train",
        "--phase=generate",
        expected_s=400,
        total_s=2000,
    ),
    Step(
        name="claims",
        asks="what the sweep says of the claims",
        words=(*LORAMETER, "claims", "{newest of sweep}", "--runs-dir", "{runs of sweep}", "--json"),
        expected_s=10,
        limit_s=40,
        rehearsal=(*LORAMETER, "run", SWEEP, "--runs-dir", RUNS, "--json", "--dry-run"),
        skipped="there is no run to judge",
        answers=VERDICTS,
    ),
    Step(
        name="twins",
        asks="the same code against itself, and against itself with 5 % more work",
        words=(
            *LORAMETER, "ab", TWINS, "--base", "{python}", "--candidate", "{python}", "--phase", "train",
            "--inject-rows", str(INJECTED_ROWS), "--runs-dir", RUNS, "--json",
        ),
        expected_s=110,
        limit_s=300,
        rehearsal=(*LORAMETER, "run", TWINS, "--runs-dir", RUNS, "--json", "--dry-run"),
        skipped="planned, not measured",
        answers=VERDICTS,
        resumes=(*LORAMETER, "ab", "--runs-dir", RUNS, "--json", "--resume"),
        total_s=500,
    ),
    tests(
        "controls",
        "are faults that only a GPU shows found, and do their healthy controls pass",
        "tests/kernels_check/test_verification.py",
        expected_s=90,
    ),
    tests(
        "trial",
        "a step after the check, measured peaks, an account of memory",
        "tests/run/workers/test_gpu.py",
        "tests/trial/profiling/test_trial.py",
        expected_s=75,
    ),
    *(
        of_variant(
            "profile",
            variant,
            "do the phases explain the step, are its kernels known, which share of the peak is reached",
            expected_s=80,
        )
        for variant in reversed(BASES)
    ),
    Step(
        name="wrap",
        asks="is a script measured on the GPU that knows nothing of it",
        words=(*LORAMETER, "wrap", "--runs-dir", RUNS, "--", "{python}", "docs/examples/accelerate_loop.py"),
        expected_s=30,
        limit_s=90,
        skipped="measured on this CPU",
    ),
    measures(
        "compile", "do compiled steps run compiled", "compile", "--replicates=2", expected_s=90, total_s=300
    ),
    measures("liger", "do Liger's kernels run", "liger-kernel", "--replicates=2", expected_s=90, total_s=300),
)  # fmt: skip


def command(
    chosen: Step, *, python: str, state: Path, rehearsing: bool = False, resumed_run: str | None = None,
    newest: str | None = None,
) -> list[str]:  # fmt: skip
    """Return the whole command of a step, whose runs and files are in a folder of the state.

    Args:
        chosen: the step.
        python: the interpreter.
        state: the folder of the campaign's state.
        rehearsing: whether there is no GPU.
        resumed_run: the id of the step's stopped run; None to start a new one.
        newest: the id of the newest run of the sweep, or None.
    """
    words = chosen.rehearsal if rehearsing and chosen.rehearsal else chosen.words
    if resumed_run is not None:
        words = (*chosen.resumes, resumed_run)
    stand_ins = {
        RUNS: str(runs_of(chosen.name, state)),
        XML: str(state / "outputs" / f"{chosen.name}.xml"),
        "{runs of study}": str(runs_of("study", state)),
        "{runs of sweep}": str(runs_of("sweep", state)),
        "{newest of sweep}": newest or "no-run",
        "{python}": python,
    }
    return [python, *(re.sub(r"{[a-z ]+}", lambda found: stand_ins[found[0]], word) for word in words)]


def runs_of(name: str, state: Path) -> Path:
    """Return the folder of a step's runs."""
    return state / "runs" / name

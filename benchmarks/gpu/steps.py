"""The steps of the campaign: the question that each answers on a GPU, its command, and its time limit.

Steps that decide more claims per minute come first: the GPU's counters and fast paths, Llama-2-7B on both bases, the
claims of the study of LoRA parameters, an A/B with an injected slow-down, and then the rest. Each step is a separate
process: a step that hangs or blocks the GPU costs only its own time. A machine without a GPU rehearses each step: by
the same command if that skips its GPU parts, else by a command that only reads the study, options and files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

STUDY, PROFILE = "lora-or-qlora", "--profile=gpu"
"""The default study, and its profile that fills a GPU with Llama-2-7B."""
BASE_VARIANTS = ("lora-r16", "qlora-nf4-r16")
"""The study's variants in bf16 and in NF4, which differ only in quantisation."""
SWEEP, TWINS = (str(Path(__file__).with_name(name)) for name in ("sweep.toml", "twins.toml"))
INJECTED_ROWS = 260_000
"""Extra rows in each adapted layer of `twins.toml`: reading and writing them costs about 5 % of a step on an H100."""
RUNS, XML = "{runs}", "{xml}"
"""Placeholders in a command for the folder of the step's runs and for the file of its test results."""
LORAMETER = ("-m", "lorameter.cli")
PYTEST = ("-m", "pytest", "-m", "gpu", "-q", "--no-header", "-rs", "-p", "no:cacheprovider", f"--junitxml={XML}")
MEASURED_CODES = (0, 1, 3, 4)
"""Exit codes of a command that has measured; other codes mean that it could not measure."""
MIN_RUN_S = 60.0
"""The minimum remaining time for which a resumable run is started: building a 7B model takes that long."""
MAX_STEP_S = 545.0
"""The time limit of the longest step, so that it fits into a call of ten minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One question and the command that answers it, run by the campaign's interpreter."""

    name: str
    question: str
    arguments: tuple[str, ...]
    """The arguments of the interpreter."""
    expected_s: float
    """The expected time on an H100: an assumption, not a measurement."""
    limit_s: float
    """The longest time of one attempt."""
    rehearsal: tuple[str, ...] = ()
    """The command on a machine without a GPU; empty for the same command as on a GPU."""
    skipped: str
    """What a rehearsal leaves out, and why."""
    result_codes: tuple[int, ...] = (0,)
    """Exit codes with which the command has a result; a separate rehearsal command must exit with 0."""
    resume_command: tuple[str, ...] = ()
    """The command that resumes a stopped run, without the run's id; empty if none exists."""
    total_s: float = 0.0
    """Time limit of all attempts together, for a step that can be resumed."""

    @property
    def min_start_s(self) -> float:
        """The remaining time of a call that is needed to start the step."""
        return min(self.limit_s, MIN_RUN_S) if self.resume_command else self.limit_s


def make_study_step(name: str, question: str, study: str, *options: str, expected_s: float, total_s: float) -> Step:
    """Return a step that runs a study; a rehearsal plans it and does not measure."""
    run = (*LORAMETER, "run", study, *options, "--runs-dir", RUNS, "--json")
    return Step(
        name=name,
        question=question,
        arguments=run,
        expected_s=expected_s,
        limit_s=min(MAX_STEP_S, total_s),
        rehearsal=(*run, "--dry-run"),
        skipped="planned, not measured",
        result_codes=MEASURED_CODES,
        resume_command=(*LORAMETER, "run", "--runs-dir", RUNS, "--json", "--resume"),
        total_s=total_s,
    )


def make_test_step(name: str, question: str, *files: str, expected_s: float) -> Step:
    """Return a step that runs tests marked `gpu`; on a machine without a GPU each is skipped."""
    return Step(
        name=f"tests-{name}",
        question=question,
        arguments=(*PYTEST, "--timeout=120", *files),
        expected_s=expected_s,
        limit_s=2 * expected_s,
        skipped="all skipped, since each needs a GPU",
        result_codes=(0, 1),
    )


def make_variant_step(command: str, variant: str, question: str, *options: str, expected_s: float) -> Step:
    """Return a step that runs `lorameter estimate` or `profile` for one variant of the study; a rehearsal estimates it
    for this CPU."""
    named = (f"{STUDY}:{variant}", PROFILE)
    return Step(
        name=f"{command}-{variant}",
        question=question,
        arguments=(*LORAMETER, command, *named, *(options or ("--runs-dir", RUNS)), "--json"),
        expected_s=expected_s,
        limit_s=2 * expected_s,
        rehearsal=(*LORAMETER, "estimate", *named, "--runs-dir", RUNS, "--json"),
        skipped="estimated for this CPU",
        result_codes=MEASURED_CODES,
    )


STEPS: tuple[Step, ...] = (
    make_test_step(
        "paths",
        "whether flash, 4-bit and paged paths launch their kernels, and events, clocks, energy and memory agree",
        "tests/kernels_check/test_gpu.py",
        "tests/machine/test_gpu.py",
        expected_s=130,
    ),
    make_study_step(
        "study",
        "whether Llama-2-7B runs on its required paths in bf16 and in NF4; how fast it is and how much memory it takes",
        STUDY,
        PROFILE,
        *(f"--variant={variant}" for variant in BASE_VARIANTS),
        "--phase=train",
        "--phase=generate",
        "--phase=cold",
        "--replicates=1",
        expected_s=250,
        total_s=900,
    ),
    *(
        make_variant_step(
            "estimate",
            variant,
            "how far the estimated peak is from the measured one",
            "--runs-dir",
            "{runs of study}",
            expected_s=15,
        )
        for variant in BASE_VARIANTS
    ),
    make_study_step(
        "sweep",
        "how alpha, dropout and r change the times of Llama-2-7B, all settings on one base",
        SWEEP,
        "--phase=train",
        "--phase=generate",
        expected_s=400,
        total_s=2000,
    ),
    Step(
        name="claims",
        question="which claims the sweep supports",
        arguments=(*LORAMETER, "claims", "{newest of sweep}", "--runs-dir", "{runs of sweep}", "--json"),
        expected_s=10,
        limit_s=40,
        rehearsal=(*LORAMETER, "run", SWEEP, "--runs-dir", RUNS, "--json", "--dry-run"),
        skipped="there is no run to judge",
        result_codes=MEASURED_CODES,
    ),
    Step(
        name="twins",
        question="whether identical code is equivalent and 5 % more work is detected",
        arguments=(
            *LORAMETER, "ab", TWINS, "--base", "{python}", "--candidate", "{python}", "--phase", "train",
            "--inject-rows", str(INJECTED_ROWS), "--runs-dir", RUNS, "--json",
        ),
        expected_s=110,
        limit_s=300,
        rehearsal=(*LORAMETER, "run", TWINS, "--runs-dir", RUNS, "--json", "--dry-run"),
        skipped="planned, not measured",
        result_codes=MEASURED_CODES,
        resume_command=(*LORAMETER, "ab", "--runs-dir", RUNS, "--json", "--resume"),
        total_s=500,
    ),
    make_test_step(
        "controls",
        "whether faults that only a GPU shows are found, and their healthy controls pass",
        "tests/kernels_check/test_verification.py",
        expected_s=90,
    ),
    make_test_step(
        "trial",
        "whether steps after the check are as fast, peaks are plausible, and the memory breakdown adds up",
        "tests/run/workers/test_gpu.py",
        "tests/trial/profiling/test_trial.py",
        expected_s=75,
    ),
    *(
        make_variant_step(
            "profile",
            variant,
            "whether the phases explain the step, whether its kernels are known, which share of the peak it reaches",
            expected_s=80,
        )
        for variant in reversed(BASE_VARIANTS)
    ),
    Step(
        name="wrap",
        question="whether an unmodified script is measured on the GPU",
        arguments=(*LORAMETER, "wrap", "--runs-dir", RUNS, "--", "{python}", "docs/examples/accelerate_loop.py"),
        expected_s=30,
        limit_s=90,
        skipped="measured on this CPU",
    ),
    make_study_step(
        "compile", "whether compiled steps run compiled", "compile", "--replicates=2", expected_s=90, total_s=300
    ),
    make_study_step(
        "liger", "whether Liger's kernels run", "liger-kernel", "--replicates=2", expected_s=90, total_s=300
    ),
)  # fmt: skip


def build_command(
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
    arguments = chosen.rehearsal if rehearsing and chosen.rehearsal else chosen.arguments
    if resumed_run is not None:
        arguments = (*chosen.resume_command, resumed_run)
    placeholders = {
        RUNS: str(run_folder(chosen.name, state)),
        XML: str(state / "outputs" / f"{chosen.name}.xml"),
        "{runs of study}": str(run_folder("study", state)),
        "{runs of sweep}": str(run_folder("sweep", state)),
        "{newest of sweep}": newest or "no-run",
        "{python}": python,
    }
    return [python, *(re.sub(r"{[a-z ]+}", lambda found: placeholders[found[0]], word) for word in arguments)]


def run_folder(name: str, state: Path) -> Path:
    """Return the folder of a step's runs."""
    return state / "runs" / name

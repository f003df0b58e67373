"""The steps of the campaign: what each asks of a GPU, the command that answers, and what it may take.

Cheap questions of fact come first, so that little time on a GPU already says much; what may take as long as there is
time comes last. A step is a process of its own: one that hangs, or takes the GPU with it, costs its own time and
nothing else. On a machine without a GPU each is rehearsed by what of it can run there: the same command where that
says itself what it lacks, else the part of it that reads studies, options and files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STUDY, CARD = "lora-or-qlora", "--profile=gpu"
"""The default study, and the profile of it that fills a GPU with Llama-2-7B."""
BASES = ("lora-r16", "qlora-nf4-r16")
"""Its variants in bf16 and in NF4, which differ in nothing else."""
SWEEP = str(Path(__file__).with_name("sweep.toml"))
RUNS, XML = "{runs}", "{xml}"
"""Stand in a command for the folder of the step's runs, and for the file of its test results."""
LORAMETER = ("-m", "lorameter.cli")
KERNELS = ("-m", "kernels_check")
PYTEST = ("-m", "pytest", "-m", "gpu", "-q", "--no-header", "-rs", "-p", "no:cacheprovider", f"--junitxml={XML}")
VERDICTS = (0, 1, 3, 4)
"""Exit codes with which a command has measured and says what it found; the others say that it could not."""
LEAST_S = 60.0
"""A run that can be resumed is not begun for less: that is what building a model of 7B takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One question, as a command of the interpreter that runs the campaign."""

    name: str
    asks: str
    words: tuple[str, ...]
    """After the interpreter."""
    limit_s: float
    """Most seconds of one attempt; more than ten minutes would not fit in a call where these are limited."""
    rehearsal: tuple[str, ...] = ()
    """The command on a machine without a GPU; that of `words` where there is none."""
    skipped: str
    """What of the step a rehearsal does not do, and why."""
    answers: tuple[int, ...] = (0,)
    """Exit codes with which the command has answered; that of a rehearsal of its own answers with 0."""
    resumes: tuple[str, ...] = ()
    """The command that resumes a run that was stopped, up to the run's id; empty where there is none."""
    total_s: float = 0.0
    """Most seconds of all attempts at such a run."""

    @property
    def least_s(self) -> float:
        """What must be left of a call for the step to be begun."""
        return min(self.limit_s, LEAST_S) if self.resumes else self.limit_s


def measures(name: str, asks: str, study: str, *options: str, limit_s: float, total_s: float = 0.0) -> Step:
    """A run of a study, which a rehearsal plans and does not measure."""
    run = (*LORAMETER, "run", study, *options, "--runs-dir", RUNS, "--json")
    return Step(
        name=name,
        asks=asks,
        words=run,
        limit_s=limit_s,
        rehearsal=(*run, "--dry-run"),
        skipped="planned, not measured",
        answers=VERDICTS,
        resumes=(*LORAMETER, "run", "--runs-dir", RUNS, "--json", "--resume"),
        total_s=total_s or limit_s,
    )


def tests(name: str, asks: str, *files: str, limit_s: float) -> Step:
    """Tests marked `gpu`, which say themselves why they are skipped."""
    return Step(
        name=f"tests-{name}",
        asks=asks,
        words=(*PYTEST, "--timeout=120", *files),
        limit_s=limit_s,
        skipped="all skipped, since each needs a GPU",
        answers=(0, 1),
    )


def profiles(variant: str, *, limit_s: float) -> Step:
    """A profile of one variant of the study; a rehearsal reads the variant and estimates its memory."""
    named = (f"{STUDY}:{variant}", CARD)
    return Step(
        name=f"profile-{variant}",
        asks="do the phases explain the step, are its kernels known, which share of the peak is reached",
        words=(*LORAMETER, "profile", *named, "--runs-dir", RUNS, "--json"),
        limit_s=limit_s,
        rehearsal=(*LORAMETER, "estimate", *named, "--runs-dir", RUNS, "--json"),
        skipped="estimated, not profiled",
        answers=VERDICTS,
    )


STEPS: tuple[Step, ...] = (
    Step(
        name="probe",
        asks="the facts that the harness assumes of a GPU, its driver and its libraries",
        words=("-m", "benchmarks.gpu.probe"),
        limit_s=150,
        skipped="of its facts only the zygote's needs no GPU",
        answers=(0, 1),
    ),
    Step(
        name="doctor",
        asks="is the machine fit, and which counters does it give",
        words=(*LORAMETER, "doctor", "--json"),
        limit_s=30,
        skipped="this machine was examined, which has none",
        answers=VERDICTS,
    ),
    tests("meters", "events, energy, clocks and memory against each other", "tests/machine/test_gpu.py", limit_s=90),
    tests(
        "kernels",
        "the rule of every kernel name against the library that launches it",
        "tests/kernels_check/test_gpu.py",
        limit_s=200,
    ),
    tests(
        "trial",
        "a step after the check, measured peaks, an account of memory",
        "tests/run/workers/test_gpu.py",
        "tests/trial/profiling/test_peak.py",
        "tests/trial/profiling/test_memory_breakdown.py",
        limit_s=150,
    ),
    tests("7b", "does a trial of Llama-2-7B end on either base", "tests/test_gpu_study.py", limit_s=480),
    tests(
        "controls",
        "are faults that only a GPU shows found, and do their healthy controls pass",
        "tests/kernels_check/test_negative_controls.py",
        limit_s=200,
    ),
    Step(
        name="paths",
        asks="which fast paths run, and how exact",
        words=(*KERNELS, "probe", "--json"),
        limit_s=120,
        rehearsal=(*KERNELS, "--help"),
        skipped="the paths of a CPU are what `python -m kernels_check` probes",
        answers=VERDICTS,
    ),
    *(profiles(variant, limit_s=150) for variant in BASES),
    measures(
        "study",
        "Llama-2-7B in bf16 and in NF4: does all that is claimed run, and what does each cost",
        STUDY,
        CARD,
        *(f"--variant={variant}" for variant in BASES),
        "--phase=train",
        "--phase=generate",
        limit_s=420,
        total_s=600,
    ),
    Step(
        name="estimate",
        asks="how far the estimated peak is from the measured one",
        words=(*LORAMETER, "estimate", f"{STUDY}:{BASES[1]}", CARD, "--runs-dir", "{runs of study}", "--json"),
        limit_s=30,
        skipped="estimated for this CPU, with nothing measured beside it",
    ),
    Step(
        name="same",
        asks="the same code against itself: does an A/B on the GPU see a difference that is none",
        words=(
            *LORAMETER, "ab", "training-step", "--base", "{python}", "--candidate", "{python}", "--replicates", "5",
            "--runs-dir", RUNS, "--json",
        ),
        limit_s=180,
        rehearsal=(*LORAMETER, "run", "training-step", "--replicates", "5", "--runs-dir", RUNS, "--json", "--dry-run"),
        skipped="planned, not measured",
        answers=VERDICTS,
        resumes=(*LORAMETER, "ab", "--runs-dir", RUNS, "--json", "--resume"),
        total_s=180,
    ),
    *(
        measures(
            level,
            "how well each interleaving tells a control from itself",
            STUDY,
            f"--interleave={level}",
            "--phase=train",
            "--replicates=3",
            f"--variant={BASES[1]}",
            limit_s=100,
        )
        for level in ("lockstep", "replicates")
    ),
    measures(
        "cold",
        "a cold start on a GPU, with all its parts",
        STUDY,
        "--phase=cold",
        "--replicates=3",
        f"--variant={BASES[1]}",
        limit_s=150,
    ),
    measures(
        "sweep",
        "what alpha, dropout and r cost on Llama-2-7B, all settings on one base",
        SWEEP,
        "--phase=train",
        "--phase=generate",
        limit_s=570,
        total_s=3600,
    ),
)  # fmt: skip


def command(
    chosen: Step, *, python: str, state: Path, rehearsing: bool = False, going_on_with: str | None = None
) -> list[str]:
    """The whole command of a step, whose runs and files lie in a folder of the state.

    Args:
        chosen: the step.
        python: the interpreter.
        state: where the campaign keeps what it has.
        rehearsing: whether there is no GPU.
        going_on_with: the id of the step's run that was stopped; None to begin anew.
    """
    words = chosen.rehearsal if rehearsing and chosen.rehearsal else chosen.words
    if going_on_with is not None:
        words = (*chosen.resumes, going_on_with)
    stand_ins = {
        RUNS: str(runs_of(chosen.name, state)),
        XML: str(state / "outputs" / f"{chosen.name}.xml"),
        "{runs of study}": str(runs_of("study", state)),
        "{python}": python,
    }
    return [python, *(_filled(word, stand_ins) for word in words)]


def runs_of(name: str, state: Path) -> Path:
    """The folder of a step's runs."""
    return state / "runs" / name


def _filled(word: str, stand_ins: dict[str, str]) -> str:
    for name, value in stand_ins.items():
        word = word.replace(name, value)
    return word

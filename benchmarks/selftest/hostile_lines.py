"""Command lines that nobody should be able to do harm with: any command, any options, good and odd values.

They go through `harness.cli.main` in a folder with constructed runs and files. Nothing is measured, downloaded or
installed: what would begin with that ends with a refusal of its own.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from harness import cli
from harness.errors import InvalidRunError
from kernels_check.visible import make_visible

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
CODES = (0, 1, 2, 3, 4, 5)
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
)  # fmt: skip
_STUDY = ("--model", "--data", "--variant", "--phase", "--replicates", "--effort", "--max-minutes", "--allow-disturbed")
COMMANDS: dict[str, tuple[int, tuple[str, ...]]] = {
    "run": (1, (*_STUDY, "--profile", "--interleave", "--precision", "--resume", "--dry-run")),
    "report": (1, ()),
    "list": (2, ("--model",)),
    "compare": (2, ("--metric", "--all-metrics", "--force")),
    "gate": (2, ("--policy", "--format")),
    "accept": (1, ()),
    "ab": (1, (*_STUDY, "--base", "--candidate", "--precision", "--policy", "--format", "--inject-rows")),
    "calibrate": (1, (*_STUDY, "--inject-rows")),
    "estimate": (1, ("--model", "--data")),
    "profile": (1, ("--model", "--data", "--try", "--effort")),
    "sample": (2, ("--replicate", "--count")),
    "claims": (1, ()),
}
"""How many places each command has, and its options; a few that it has not."""
SOUND: dict[str, tuple[str, ...]] = {
    "run": ("lora-or-qlora",), "ab": ("training-step",), "estimate": ("lora-or-qlora:lora-r16",),
    "profile": ("lora-or-qlora:lora-r16",), "report": ("sound",), "claims": ("swept",), "calibrate": ("training-step",),
    "list": ("sizes", "training-step"), "sample": ("swept", "r=16"), "compare": ("sound", "slower"),
    "gate": ("sound", "slower"), "accept": ("sound",),
}  # fmt: skip
"""Places that can be read."""
FLAGS = ("--allow-disturbed", "--dry-run", "--all-metrics", "--force", "--json")


def line_of(number: int, seed: int) -> list[str]:
    """Command line `number`."""
    source = random.Random(f"{seed} line {number}")
    command = source.choice(tuple(COMMANDS))
    places, options = COMMANDS[command]
    words = [source.choice(VALUES) for _ in range(places if source.random() < 0.9 else source.randint(0, 3))]
    if source.random() < 0.6:
        words = list(SOUND[command])
    chosen = source.sample(options, min(len(options), source.randint(0, 3)))
    if command == "ab":
        chosen = list(dict.fromkeys(("--base", "--candidate", *chosen)))
    for option in chosen:
        if option in FLAGS:
            words.append(option)
        elif source.random() < 0.5:
            words.append(f"{option}={source.choice(VALUES)}")
        else:
            words += [option, source.choice(VALUES)]
    if command == "run" and source.random() < 0.7:
        words.append("--dry-run")
    if source.random() < 0.3:
        words.append("--json")
    return [command, *words, "--runs-dir", source.choice(("runs", "runs", "runs", "damaged", source.choice(VALUES)))]


def stand_in(folder: Path) -> None:
    """Fill a folder, go there, and put a refusal in the place of all that measures, downloads or installs."""
    for name in ("runs", "damaged", "files"):
        shutil.copytree(GOLDEN / name, folder / name)
    os.chdir(folder)
    os.environ |= {"LORAMETER_CACHE": str(folder / "cache"), "COLUMNS": "160"}

    def begun(*_: Any, **__: Any) -> NoReturn:
        raise InvalidRunError("begun")

    from harness.commands import ab, profile, run  # noqa: F401 loaded before the processes are forked
    from harness.models import fetch
    from harness.profile import measure as profiling
    from harness.run import ab as sides
    from harness.run import measure
    from harness.run.executors import sides as opened

    measure.measure = sides.measure = begun  # type: ignore[assignment]
    profiling.profile_variant = begun
    fetch._build = begun  # type: ignore[assignment]
    opened._revision = opened._requirements = opened._interpreter = begun  # type: ignore[assignment]
    import harness.trial.building.sizes  # noqa: F401


def try_line(number: int, seed: int) -> str:
    """What comes of command line `number`."""
    return try_words(line_of(number, seed))


def try_words(line: list[str]) -> str:
    """`read`, `refused`, or what went wrong in a line."""
    out, errors = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(errors):
            code = cli.main(line)
    except SystemExit as ended:  # argparse's own
        code = int(ended.code or 0) if isinstance(ended.code, int) else 1
        if code not in (0, 2):
            return f"SystemExit {ended.code!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if code not in CODES:
        said = errors.getvalue().strip().splitlines()
        return f"exit code {code}: {' | '.join(said[-4:-1])}"
    shown = out.getvalue() + errors.getvalue()
    if raw := next((character for character in shown if make_visible(character) != character), None):
        return f"shows {raw!r} raw"
    if "Traceback" in errors.getvalue():
        return "a traceback"
    if "--json" in line and code != 2 and out.getvalue().strip():
        try:
            json.loads(out.getvalue())
        except ValueError as error:
            return f"prints no JSON document: {error}"
    return "refused" if code == 2 else "read"

"""A training script with an engine and without it, said in one line: what stands in braces is the difference.

    python train.py --r 64 {--use_liger_kernel}              without it, and with it
    python train.py --optim {adamw_torch|adamw_torch_fused}  one, and the other
    python train.py --set {{a}} {--flag}                     braces that are the script's are doubled

Several braces are turned on together. What comes of it are two commands like any other two.
"""

from __future__ import annotations

import dataclasses
import shlex

from lorameter.errors import UsageError, shorten
from lorameter.studies.engine import Engine
from lorameter.studies.script import script_workload, split_command
from lorameter.studies.study import Study
from lorameter.studies.variant import Variant

_LABEL = "--command"
_ALTERNATIVE = "|"


def split_braces(command: str, example: str = "'python train.py {--flag}'") -> tuple[str, str]:
    """The command without what stands in braces, and with it; each a line of words. `example` is for refusals.

    Raises:
        UsageError: no braces, one that is open, empty or inside another, or nothing that a command could be.
    """
    if "{{{" in command or "}}}" in command:
        raise _refused(command, "three braces in a row can be read in two ways", "Put a blank between them")
    without: list[str] = []
    with_it: list[str] = []
    group: list[str] | None = None
    groups = place = 0
    while place < len(command):
        letter = command[place]
        if command[place : place + 2] in ("{{", "}}"):
            for part in [without, with_it] if group is None else [group]:
                part.append(letter)
            place += 2
            continue
        place += 1
        if letter == "{":
            if group is not None:
                raise _refused(command, "a brace is open inside another", "Close the first, or write {{ for a brace")
            if command[place - 2 : place - 1] == "$" or command[place : place + 1] in ("'", '"'):
                raise _refused(command, "a brace that is a shell's or the script's own", "Double those: {{ and }}")
            group = []
        elif letter == "}":
            if group is None:
                raise _refused(command, "a brace is closed that was not open", "Open it, or write }} for a brace")
            off, on = _alternatives(command, "".join(group), example)
            without.append(off)
            with_it.append(on)
            group, groups = None, groups + 1
        else:
            for part in [without, with_it] if group is None else [group]:
                part.append(letter)
    if group is not None:
        raise _refused(command, "a brace is open", "Close it, or write {{ for a brace")
    if not groups:
        raise _refused(command, "no braces, so nothing differs", f"Put what turns the engine on in braces: {example}")
    off, on = (shlex.join(split_command(_LABEL, "".join(text))) for text in (without, with_it))
    if off == on:
        raise _refused(command, "the same with the braces and without", f"Put a difference there: {example}")
    return off, on


def _alternatives(command: str, text: str, example: str) -> tuple[str, str]:
    """What stands there without the engine and with it."""
    if not text.strip():
        raise _refused(command, "an empty brace", f"Write what turns the engine on: {example}")
    off, bar, on = text.partition(_ALTERNATIVE)
    if not bar:
        return "", text
    if not off.strip() or not on.strip() or _ALTERNATIVE in on:
        raise _refused(command, f"{{{text}}} is not two alternatives", "Write {without|with}")
    return off, on


def _refused(command: str, why: str, remedy: str) -> UsageError:
    return UsageError(f"{_LABEL} = {shorten(repr(command), 120)}: {why}. {remedy}.")


def engine_of(study: Study) -> Engine:
    """The engine that a study is about. Raises `UsageError` for one that is about none."""
    if study.engine is None or not study.claims:
        raise UsageError(
            f"study {study.name}: it claims nothing of an engine, so there is nothing to judge a script by. Name one "
            "that does (`lorameter list studies`), or compare two commands: lorameter ab --base-command ... "
            "--candidate-command ..."
        )
    return study.engine


def study_of_engine(study: Study, command: str, *, cwd: str = "") -> Study:
    """What a study claims of an engine, asked of somebody's own script.

    Args:
        study: of the engine, as written.
        command: the script, with what turns the engine on in braces.
        cwd: folder that it is run in; "" for the one that one stands in.

    Raises:
        UsageError: a study of no engine, or a command that cannot be two.
    """
    engine = engine_of(study)
    off, on = split_braces(command, engine.example)
    return Study(
        name=study.name,
        title=f"{study.title}: {command}",
        workload=script_workload(study.workload.threads),
        protocol=dataclasses.replace(study.protocol, phases=("train",), epochs=0.0),
        variants=(
            Variant(name=study.reference, command=off, cwd=cwd),
            Variant(name=engine.variant, command=on, cwd=cwd),
        ),
        reference=study.reference,
        claims=study.claims,
        notes=study.notes,
        engine=dataclasses.replace(engine, workload={}),  # what commands train on is theirs
    )

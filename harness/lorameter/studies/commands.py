"""Studies of commands, and of the two commands that one line with braces describes.

One line describes a script with and without an engine; the text in braces is the difference:

    python train.py --r 64 {--use_liger_kernel}              without it, and with it
    python train.py --optim {adamw_torch|adamw_torch_fused}  one, and the other

Several braces are switched together. The result is two ordinary commands.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from typing import Any

from lorameter.errors import UsageError, require, shorten
from lorameter.studies.protocol import Protocol
from lorameter.studies.script import name_of_words, script_workload, split_command
from lorameter.studies.study import Study
from lorameter.studies.variant import ScriptVariant


def study_of_command(
    command: str,
    *,
    name: str = "",
    cwd: str = "",
    threads: int = 1,
    protocol: Protocol | None = None,
    requirements: Mapping[str, Any] | None = None,
) -> Study:
    """Make a study with the command as its only variant.

    Args:
        command: the command line (`shlex.join` of its words).
        name: name of the variant and of the study; default: that of the script.
        cwd: folder in which it runs; "" for the working folder.
        threads: CPU threads of each process.
        protocol: the protocol; for a run that measured a whole script: one replicate, with one timed step per turn.
        requirements: kernels_check paths that its step must have.

    Raises:
        UsageError: the command is empty, or needs a shell.
    """
    name = name or name_of_words(split_command("command", command))
    variant = ScriptVariant(name=name, command=command, cwd=cwd)
    return Study(
        name=name,
        title=command,
        workload=script_workload(threads),
        protocol=protocol or Protocol(phases=("train",)),
        variants=(variant,),
        reference=name,
        requirements=dict(requirements or {}),
    )


_LABEL = "--command"
_CHOICE = re.compile(r"(?<!\$)\{(?P<off>[^{}|\"'][^{}|]*)(?:\|(?P<on>[^{}|]+))?\}")
"""Text in braces, or two alternatives; ${...} and {"..."} belong to the shell or the script, and are refused."""


def split_braces(command: str, example: str = "'python train.py {--flag}'") -> tuple[str, str]:
    """The command without and with the text in braces; each is a line of words. `example` is for error messages.

    Raises:
        UsageError: the text in braces makes no difference, there are other braces, or there is no program.
    """
    named = f"{_LABEL} = {shorten(repr(command), 120)}"
    escaped = command.replace("{{", "\0").replace("}}", "\1")
    require(
        not set("{}") & set(_CHOICE.sub("", escaped)),
        f"{named}: braces that hold neither {{text}} nor {{without|with}}. Double those that belong to the script: "
        "{{ and }}.",
    )
    without = _CHOICE.sub(lambda choice: choice["off"] if choice["on"] else "", escaped)
    with_it = _CHOICE.sub(lambda choice: choice["on"] or choice["off"], escaped)
    lines = [line.replace("\0", "{").replace("\1", "}") for line in (without, with_it)]
    off, on = (shlex.join(split_command(_LABEL, line)) for line in lines)
    require(off != on, f"{named}: nothing differs. Put the text that turns the engine on into braces: {example}.")
    return off, on


def study_of_engine(study: Study, command: str, *, cwd: str = "") -> Study:
    """Make a study of an engine's claims with the user's own script.

    Args:
        study: the study of the engine.
        command: the script, with the text that turns the engine on in braces.
        cwd: folder in which it runs; "" for the working folder.

    Raises:
        UsageError: the study has no engine, or the command cannot be split into two.
    """
    engine = study.engine
    if engine is None or not study.claims:
        raise UsageError(
            f"study {study.name}: it has no claim about an engine, by which a script could be judged. Name one "
            "that has (`lorameter list studies`), or compare two commands: lorameter ab --base-command ... "
            "--candidate-command ..."
        )
    off, on = split_braces(command, f"'python train.py {engine.flag or '{--flag}'}'")
    return Study(
        name=study.name,
        title=f"{study.title}: {command}",
        workload=script_workload(study.workload.threads),
        protocol=dataclasses.replace(study.protocol, phases=("train",), epochs=0.0),
        variants=(
            ScriptVariant(name=study.reference, command=off, cwd=cwd),
            ScriptVariant(name=engine.variant, command=on, cwd=cwd),
        ),
        reference=study.reference,
        claims=study.claims,
        notes=study.notes,
        engine=engine,
    )

"""Variants that are commands: a command line that starts the user's own training script.

Such a variant has no fields for LoRA parameters, optimizer or dtype, which could contradict the script. The words are
executed without a shell, so that the measurement covers one program and its child processes, and so that signals reach
the program.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from lorameter.errors import HIDDEN, UsageError, is_credential, redact, require, shorten, sounds_secret
from lorameter.studies import protocol
from lorameter.studies.protocol import STEPS_PER_TURN, Protocol
from lorameter.studies.workload import Workload

if TYPE_CHECKING:
    from lorameter.studies.study import Study
    from lorameter.studies.variant import ScriptVariant

SIDE = "command"
"""Kind of a side of an A/B that is a separate command; the sides do not differ otherwise."""
OWN = "script"
"""Model and data of a workload that the scripts define themselves."""

_SHELL = ("&&", "||", "|", ";", "&", ">", ">>", "<", "2>", "2>&1")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*")
PYTHON = re.compile(r"python(\d+(\.\d+)?t?)?")
"""Names of Python interpreters."""
UNVERSIONED = ("python", "python3")
"""Words for the interpreter of the current environment, or of a side; `python3.12` always means that version."""


def check_script(label: str, variant: ScriptVariant) -> None:
    """Raise `UsageError` for a command that is invalid or contains a credential."""
    refuse_credentials(label, split_command(label, variant.command))
    for key in ("cwd", "python"):
        protocol.check_word(label, key, getattr(variant, key))
        refuse_credentials(f"{label}: {key}", [getattr(variant, key)])
    for name, value in variant.env.items():
        require(
            name.isascii() and name.isidentifier(),
            f"{label}: env.{shorten(name, 60)}: no name of a variable. Correct it.",
        )
        protocol.check_word(label, f"env.{name}", value, lines=True)
        require(
            not sounds_secret(name),
            f"{label}: env.{name} is a credential, and it is written into the run. Set it where lorameter is started: "
            "scripts inherit it.",
        )
        refuse_credentials(f"{label}: env.{name}", [value])


def script_workload(threads: int = 1) -> Workload:
    """The workload of scripts, which choose model, data and batch themselves; CPU threads are set at the start of a
    process."""
    return Workload(model=OWN, data=OWN, threads=threads)


def check_side(variant: ScriptVariant) -> None:
    """Raise `UsageError` for a command that brings its own interpreter: a side of an A/B could not replace it, and both
    sides would be the same."""
    program = split_command(f"variant {variant.name!r}", variant.command)[0]
    require(
        not variant.python and (program in UNVERSIONED or not PYTHON.fullmatch(PurePath(program).name)),
        f"variant {variant.name!r}: {variant.python or program}: it runs in this interpreter on both sides. Write "
        "python in its place, which is that of the side.",
    )


def check_own_workload(study: Study) -> None:
    """Raise `UsageError` for a study whose variants define model and data themselves, with a setting that only they can
    have."""
    where = f"study {study.name}"
    plain = script_workload(study.workload.threads)
    for field in dataclasses.fields(plain):
        value = getattr(study.workload, field.name)
        require(
            value == getattr(plain, field.name),
            f"{where}, [workload]: {field.name} = {value!r}: the variant is {study.form.form}, and model, data and "
            "batch are its own. Give it to the variant, as in an argument of a command; only threads can be set here.",
        )
    require(
        not study.protocol.epochs,
        f"{where}, [protocol]: epochs = {study.protocol.epochs:g}: the variant is {study.form.form}, whose data is not "
        "known. Set turns and steps_per_turn.",
    )


def time_steps(protocol: Protocol, steps: int) -> Protocol:
    """The protocol with this many timed steps in each process, in turns of the default length.

    Raises:
        UsageError: the steps do not form a whole number of turns.
    """
    require(
        steps > 0 and steps % STEPS_PER_TURN == 0,
        f"--steps = {steps}: {STEPS_PER_TURN} steps are timed in a turn. Use a multiple of {STEPS_PER_TURN}, "
        f"{STEPS_PER_TURN} or more.",
    )
    return dataclasses.replace(protocol, turns=steps // STEPS_PER_TURN, steps_per_turn=STEPS_PER_TURN)


def split_command(label: str, command: str) -> list[str]:
    """The words of a command line, without quotes; `label` names the command in errors.

    Raises:
        UsageError: the command is empty, has an open quote, or needs a shell.
    """
    protocol.check_word(label, "command", command, lines=True)
    named = f"{label}: command = {shorten(repr(' '.join(hide_credentials(command.split()))), 80)}"
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"{named}: {error}. Close the quote.") from None
    require(
        words and words[0],
        f'{label}: command = {command!r}: no program in it. Write one, as "python train.py --r 64".',
    )
    for word in words:
        require(
            word not in _SHELL,
            f"{named}: {word!r} is for a shell, and there is none. Name the one command that trains, and put others "
            "into a script.",
        )
    require(
        not _ASSIGNMENT.fullmatch(words[0]),
        f"{named}: {hide_credentials(words)[0]!r} sets a variable, for which it takes a shell. Write it as "
        "env = { ... } in a study, or put `env` in front of the command.",
    )
    return words


def name_of_words(words: Sequence[str]) -> str:
    """A name for the program of a command: the script's name without suffix, a module's, or the program's. It becomes
    part of the run's folder name, so it contains no credential."""
    words = hide_credentials(words)
    named = [PurePath(word).stem for word in words if word.endswith(".py") and "=" not in word]
    if not named and "-m" in words[1:-1]:
        named = [words[words.index("-m") + 1]]
    program = next((word for word in words if not PYTHON.fullmatch(PurePath(word).name)), words[0])
    name = re.sub(r"[^A-Za-z0-9._=-]+", "-", named[0] if named else PurePath(program).name).strip("-")
    return name[: protocol.NAME_BYTES] or "command"


# --- credentials ------------------------------------------------------------------------------------------------------

_FIELD = re.compile(r"[-+.\w]+")


def hide_credentials(words: Sequence[str]) -> list[str]:
    """Replace possible credentials in the words of a command by `***`; other words are unchanged.

    A command is stored in its run, and runs are shared. Within a word the rule is that of any text
    (`lorameter.errors.redact`); this function adds rules for word boundaries.
    """
    shown: list[str] = []
    secret = False
    for word in words:
        shown.append(HIDDEN if secret and is_credential(word, after_blank=True) else _hide_word(word))
        secret = word.startswith("-") and "=" not in word and sounds_secret(word)
    return shown


def refuse_credentials(label: str, words: Sequence[str]) -> None:
    """Raise `UsageError` for words that contain a credential; `label` names the command."""
    for word, before, shown in zip(words, ["", *words], hide_credentials(words), strict=False):
        if shown != word:
            place = before if shown == HIDDEN else shown
            raise UsageError(
                f"{label}: a value reads like a credential ({shorten(place, 60)}), and it is written into the run. "
                "Leave it out: scripts inherit the credentials of your environment, as HF_TOKEN, and ~/.netrc."
            )


def _hide_word(word: str) -> str:
    """Redact one word: the value of a field, an option or a variable extends to the end of the word, unless the word is
    a command line."""
    name, equals, value = word.partition("=")
    whole = name.startswith("-") or len(word.split()) == 1
    if equals and whole and _FIELD.fullmatch(name) and sounds_secret(name) and is_credential(value, after_blank=False):
        return f"{name}={HIDDEN}"
    return redact(word, whole_addresses=False)

"""Credentials in the words of a command: one rule, for what a study refuses and what is left out of a wrapped command.

A command is written into the run that measures it, and runs are sent around. Within a word the rule is that of any text
(`lorameter.errors.redact`); here is what the limits of words add to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorameter.errors import HIDDEN, UsageError, is_credential, redact, shorten, sounds_secret

_FIELD = re.compile(r"[-+.\w]+")


def hide_credentials(words: Sequence[str]) -> list[str]:
    """The words of a command with `***` in the place of what may be a credential; those without one as they are."""
    shown: list[str] = []
    secret = False
    for word in words:
        shown.append(HIDDEN if secret and is_credential(word, apart=True) else _hide_word(word))
        secret = word.startswith("-") and "=" not in word and sounds_secret(word)
    return shown


def refuse_credentials(label: str, words: Sequence[str]) -> None:
    """Raises `UsageError` for words with a credential in them; `label` names whose they are."""
    for word, before, shown in zip(words, ["", *words], hide_credentials(words), strict=False):
        if shown != word:
            place = before if shown == HIDDEN else shown
            raise UsageError(
                f"{label}: a value reads like a credential ({shorten(place, 60)}), and it is written into the run. "
                "Leave it out: scripts inherit the credentials of your environment, as HF_TOKEN, and ~/.netrc."
            )


def _hide_word(word: str) -> str:
    """What a field, an option or a variable is given goes on to the end of the word, unless it is a line of words."""
    name, equals, value = word.partition("=")
    whole = name.startswith("-") or len(word.split()) == 1
    if equals and whole and _FIELD.fullmatch(name) and sounds_secret(name) and is_credential(value, apart=False):
        return f"{name}={HIDDEN}"
    return redact(word, whole_addresses=False)

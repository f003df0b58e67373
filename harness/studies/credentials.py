"""Credentials in the words of a command: one rule, for what a study refuses and what is left out of a wrapped command.

A command is written into the run that measures it, and runs are sent around. A credential is told by what stands beside
it: an option, a field, a variable or a header whose name sounds like one, an address with a user's password in it, or
the shape that a service gives its own tokens. It may stand deeper than a word: in a line for `sh -c`, in JSON.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.errors import HIDDEN, UsageError, redact, shorten, sounds_secret

_NAMED = re.compile(r"""(?P<name>[-\w]+)["']?(?:\s*=\s*(?=["'])|\s*:\s*|=|(?P<blank>\s+))""")
"""A name with what parts it from its value: a sign, an equals sign with blanks around it before a quote, or blanks."""
_VALUE = re.compile(
    r"""(?:(?:Bearer|Basic|Token)\s+)?
        (?P<value> "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | [^\s"',;&|)}\]]+ )""",
    re.VERBOSE | re.IGNORECASE,
)
_NO_CREDENTIAL = re.compile(
    r"""["']? (?: \*\*\* | true | false | none | null | yes | no | [$-].* | ) ["']?""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
"""A switch, a variable's name for the shell, another option, what is hidden already, or nothing."""
_OWN_SHAPE = re.compile(r"(?<![\w-])(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abp]-|AKIA)[\w-]{16,}")
"""Tokens of Hugging Face, GitHub, GitLab, OpenAI, Slack and AWS."""
_PASSWORD = re.compile(r"://[^\s/?#:]*:[^\s/?#]*@|https?://(?!\*\*\*@)[^\s/?#]+@", re.IGNORECASE)
"""An address with a password; of HTTP also with a user alone, who may be a token."""
_SIGNED = re.compile(
    r"[?&][\w.-]*(?:sig|signature|key|token|secret|passw\w*|auth|credential)=(?!\*\*\*)", re.IGNORECASE
)
"""A query with a credential in it."""


def hide_credentials(words: Sequence[str]) -> list[str]:
    """The words of a command with `***` in the place of what may be a credential; those without one as they are."""
    shown: list[str] = []
    secret = False
    for word in words:
        given = not _NO_CREDENTIAL.fullmatch(word)
        shown.append(HIDDEN if secret and given else _hide(word))
        secret = word.startswith("-") and "=" not in word and sounds_secret(word)
    return shown


def refuse_credentials(label: str, words: Sequence[str]) -> None:
    """Raises `UsageError` for words with a credential in them; `label` names whose they are."""
    for word, before, shown in zip(words, ["", *words], hide_credentials(words), strict=False):
        if shown != word:
            place = before if shown == HIDDEN else shown
            raise UsageError(
                f"{label}: {shorten(place, 60)} reads like a credential, and what stands here is written into the run. "
                "Leave it out: scripts inherit the credentials of your environment, as HF_TOKEN, and ~/.netrc."
            )


def _hide(text: str) -> str:
    """A word, or a line of them, with credentials hidden."""
    if _PASSWORD.search(text) or _SIGNED.search(text):
        text = redact(text)
    text = _OWN_SHAPE.sub(HIDDEN, text)
    parts, at = [], 0
    for found in _NAMED.finditer(text):
        option = found["name"].startswith("-")
        if found.start() < at or (found["blank"] and not option) or not sounds_secret(found["name"]):
            continue
        value = _VALUE.match(text, found.end())
        if value is not None and not _NO_CREDENTIAL.fullmatch(value["value"]):
            quote = value["value"][0] if value["value"][0] in "\"'" else ""
            parts += [text[at : value.start("value")], f"{quote}{HIDDEN}{quote}"]
            at = value.end("value")
    return "".join([*parts, text[at:]])

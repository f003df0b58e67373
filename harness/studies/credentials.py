"""Credentials in the words of a command: one rule, for what a study refuses and what is left out of a wrapped command.

A command is written into the run that measures it, and runs are sent around. A credential is told by what stands beside
it: an option, a field, a variable or a header whose name sounds like one, an address with a user's password in it, or
the shape that a service gives its own tokens. It may stand deeper than a word: in a line for `sh -c`, in JSON.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.errors import HIDDEN, UsageError, redact, shorten, sounds_secret

_NAMED = re.compile(
    r"""(?<![-\w]) (?P<name>[-\w]++) (?:\\*["'])? \]?
        (?: \s*=\s*(?=\\*["']) | \s*(?P<colon>:)\s* | = | (?P<blank>(?:\s|\\\n)+) )""",
    re.VERBOSE,
)
"""A name, or a key, with what parts it from its value: a sign, an equals sign with blanks around it before a quote, or
blanks. Each word is read once, however long it is."""
_FIELD = re.compile(r"[-+.\w]+")
_SCHEME = r"(?:(?:Bearer|Basic|Token)\s+)?"
_VALUE = re.compile(
    _SCHEME
    + r"""(?:[$bfru]{1,2}(?=["']))?
        (?P<value> (?P<quote>\\*["']) (?:(?!(?P=quote))(?:\\.|.))*+ (?:(?P=quote)|\Z)
                 | (?:\\[^\n"']|[^\s"',;&|)}\]\\])+ )""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
"""In quotes, which stand behind backslashes in a line that is quoted itself and are of a shell's or Python's kinds, or
up to what ends a word."""
_HEADER = re.compile(_SCHEME + r"""(?!\\*["'])(?P<quote>)(?P<value>[^"'\n]+)""", re.IGNORECASE)
"""In a header any scheme, which may have several words behind it."""
_NO_CREDENTIAL = re.compile(
    r"""(?:\\*["'])? (?: \*\*\* | true | false | none | null | yes | no | \$(?!["']).* | ) (?:\\*["'])?""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
"""A switch, a variable's name for the shell, what is hidden already, or nothing."""
_OWN_SHAPE = re.compile(
    r"(?<![\w-])(?:(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-(?:(?:proj|ant|or|svcacct|admin)-|(?=\w{16}))|xox[a-z]-"
    r"|A[KS]IA|AIza|nvapi-)[\w-]{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"
)
"""Tokens of Hugging Face, GitHub, GitLab, OpenAI, Slack, AWS, Google and NVIDIA, and JSON web tokens."""
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
        shown.append(HIDDEN if secret and _is_credential(word, apart=True) else _hide_word(word))
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


def _is_credential(value: str, *, apart: bool) -> bool:
    """Whether what a name like that is given may be one; behind a blank it may be another option as well."""
    return not (apart and value.startswith("-")) and _NO_CREDENTIAL.fullmatch(value) is None


def _hide_word(word: str) -> str:
    """What a field, an option or a variable is given goes on to the end of the word, unless it is a line of words."""
    name, equals, value = word.partition("=")
    whole = name.startswith("-") or len(word.split()) == 1
    if equals and whole and _FIELD.fullmatch(name) and sounds_secret(name) and _is_credential(value, apart=False):
        return f"{name}={HIDDEN}"
    return _hide(word)


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
        header = found["colon"] and found["name"].lower().endswith("authorization")
        value = (_HEADER.match(text, found.end()) if header else None) or _VALUE.match(text, found.end())
        if value is not None and _is_credential(value["value"], apart=found["blank"] is not None):
            quote = value["quote"] or ""
            parts += [text[at : value.start("value")], f"{quote}{HIDDEN}{quote}"]
            at = value.end("value")
    return "".join([*parts, text[at:]])

"""Exceptions that stop a command, each with its exit code, and the redaction of credentials in all text.

A failed *trial* is not such an error: it becomes a record (see `record`). Every message follows one pattern: what
happened, where, the offending value, and what to do about it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

EXIT_PASS = 0
EXIT_REGRESSION = 1
EXIT_USAGE = 2
EXIT_INCONCLUSIVE = 3
EXIT_INVALID = 4
EXIT_NOT_COMPARABLE = 5
EXIT_UNEXPECTED = 70


class LorameterError(Exception):
    """An error that the user can fix; `exit_code` is the exit code of the command line.

    The message is redacted, because it is printed and stored in logs and records.
    """

    exit_code = EXIT_UNEXPECTED

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class UsageError(LorameterError):
    """Bad input: a file, key, value or option that cannot be used. Raised before any expensive work."""

    exit_code = EXIT_USAGE


class InvalidRunError(LorameterError):
    """The machine or the worker cannot measure at all (the zygote does not start, the disk is full)."""

    exit_code = EXIT_INVALID


def refused_value(where: str, key: str, value: object, why: str, remedy: str) -> UsageError:
    """The common form of a refused value: file or object, key, value, reason, remedy."""
    named = f"{shorten(where)}: {shorten(key)}" if key else shorten(where)
    return UsageError(f"{named} = {shorten(repr(value))}: {why}. {remedy}")


def suggest(word: str, known: Iterable[str]) -> str:
    """The remedy for an unknown word: the nearest known one in any case, or all of them."""
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(word.lower(), lower, n=1)
    return f"Did you mean {lower[near[0]]!r}?" if near else f"Known: {', '.join(lower.values())}."


def require(holds: object, message: str) -> None:
    """Raise `UsageError` with the message if a condition does not hold."""
    if not holds:
        raise UsageError(message)


# Each pattern reads a text once, however long it is: none begins again within what it has read in vain.
_USER = re.compile(r"(?<=[A-Za-z0-9+.-])(://)[^\s/?#]*@")
"""A quote in it is part of a password: no address ends before its host."""
_LOGIN = re.compile(r"(?<!\S)\S*@(?!sha256:)(?=[\w\[])")
"""A word up to the last sign before a host."""
_PASSWORD = re.compile(r"(?<![\w.%+~-])[\w.%+~-]++:(?!//)(?!\d+(?:[/?#'\",)\s]|$))[^\s@].*", re.DOTALL)
"""In such a word a user and a password in an invalid form of an address: without a scheme, as in git and scp, or with
an unescaped character. A host with a port is not a match, so that a revision after a path is kept."""
_QUERY = re.compile(r"(?<=[A-Za-z0-9+.-])(://[^\s?#'\"]*+)(?:(\?)(?:[^\s#'\"]|['\"](?![\s,.:;)\]}]|$))+)?")
"""A quote that is not followed by more of the address belongs to the surrounding text."""
_IN_ADDRESS = re.compile(
    r"://[^\s/?#:]*:[^\s/?#]*@|https?://(?!\*\*\*@)[^\s/?#]+@"
    r"|[?&][\w.-]*(?:sig|signature|key|token|secret|passw\w*|auth|credential)=(?!\*\*\*)",
    re.IGNORECASE,
)
"""An address that certainly contains a credential: a password, for HTTP also a user without one, which may be a token,
or a query with a name that looks like a credential."""
_SECRET = re.compile(
    r"token$|secret|passw|passphrase|(api|access|private)[-_]?key|credential|(^|[-_])(auth|bearer)$|authorization$"
    r"|(?-i:_(PASS|PWD|PAT|KEY)$)",
    re.IGNORECASE,
)
"""Words such as pass, pwd, pat and key are ordinary options; only at the end of a variable's name are they
credentials."""
_NO_SECRET = re.compile(
    r"(pad|eos|bos|unk|sep|cls|mask|stop|image|new|max|min|per|first|next|input|output)[-_]?token$|^-*no[-_]",
    re.IGNORECASE,
)
"""Vocabulary or text tokens in the options of training scripts and in metrics, and options without a value."""
HIDDEN = "***"
"""Replaces a credential."""
_HINT = re.compile(r"token|secret|passw|passphrase|key|credential|auth|bearer|_PASS|_PWD|_PAT", re.IGNORECASE)
"""Part of every name that looks like a credential: texts without it are not searched for names."""
_NAMED = re.compile(
    r"""(?<![-\w/]) (?P<name>[-\w]++) (?:\\*["'])? \]?
        (?: \s*=\s*(?=\\*["']) | \s*(?P<colon>:)\s* | = | (?P<blank>(?:\s|\\\n)+) )""",
    re.VERBOSE,
)
"""A name or key, with its separator from the value: a sign, an equals sign with blanks before a quote, or blanks. Each
word is scanned once, however long it is."""
_SCHEME = r"(?:(?:Bearer|Basic|Token)\s+)?"
_VALUE = re.compile(
    _SCHEME
    + r"""(?:[$bfru]{1,2}(?=["']))?
        (?P<value> (?P<quote>\\*["']) (?:(?!(?P=quote))(?:\\.|.))*+ (?:(?P=quote)|\Z)
                 | (?:\\[^\n"']|[^\s"',;&|)}\]\\])+ )""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
"""A value in quotes (of a shell or Python, possibly after backslashes in a quoted line), or up to the end of the
word."""
_HEADER = re.compile(_SCHEME + r"""(?!\\*["'])(?P<quote>)(?P<value>[^"'\n]+)""", re.IGNORECASE)
"""In a header, any scheme, possibly followed by several words."""
_NO_CREDENTIAL = re.compile(
    r"""(?:\\*["'])? (?: \*\*\*.* | true | false | none | null | yes | no | \$(?!["']).* | ) (?:\\*["'])?""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
"""A boolean, the name of a shell variable, an already redacted value, or nothing."""
_OWN_SHAPE = re.compile(
    r"(?<![\w-])(?:(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-(?:(?:proj|ant|or|svcacct|admin)-|(?=\w{16}))|xox[a-z]-"
    r"|A[KS]IA|AIza|nvapi-)[\w-]{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}|(?<=wandb login )[0-9a-f]{40}\b)"
)
"""Token formats of Hugging Face, GitHub, GitLab, OpenAI, Slack, AWS, Google, NVIDIA, Weights & Biases, and JSON web
tokens."""


def sounds_secret(name: str) -> bool:
    """Whether a variable or an option with this name probably holds a credential."""
    return _SECRET.search(name) is not None and _NO_SECRET.search(name) is None


def is_credential(value: str, *, after_blank: bool) -> bool:
    """Whether the value after such a name may be a credential; after a blank (`after_blank`) it may also be another
    option."""
    return not (after_blank and value.startswith("-")) and _NO_CREDENTIAL.fullmatch(value) is None


def redact(text: str, *, whole_addresses: bool = True) -> str:
    """Replace possible credentials in a text by `***`. Everything that is printed or stored in a run passes through
    here.

    A credential is recognised by the name before it (`HF_TOKEN=…`, `--password …`, `"token": …`, a header), by the
    token format of a service, or by its position in a URL (a user, a password, a query). It may be inside a line for
    `sh -c`, JSON or a program.

    Args:
        text: a text of any length.
        whole_addresses: whether to redact every user and query of a URL; else only those with a password, or with a
            name that looks like a credential. Requirements, indexes, remotes and proxies may have tokens as users.
    """
    if whole_addresses or _IN_ADDRESS.search(text):
        if "@" in text:
            text = _USER.sub(rf"\1{HIDDEN}@", text)
            text = _LOGIN.sub(lambda word: _PASSWORD.sub(f"{HIDDEN}@", word[0]), text)
        if "://" in text:
            text = _QUERY.sub(lambda address: f"{address[1]}?{HIDDEN}" if address[2] else address[0], text)
    text = _OWN_SHAPE.sub(HIDDEN, text)
    return _without_named(text) if _HINT.search(text) else text


def _without_named(text: str) -> str:
    parts, at = [], 0
    for found in _NAMED.finditer(text):
        option = found["name"].startswith("-")
        if found.start() < at or (found["blank"] and not option) or not sounds_secret(found["name"]):
            continue
        header = found["colon"] and found["name"].lower().endswith("authorization")
        value = (_HEADER.match(text, found.end()) if header else None) or _VALUE.match(text, found.end())
        if value is not None and is_credential(value["value"], after_blank=found["blank"] is not None):
            quote = value["quote"] or ""
            parts += [text[at : value.start("value")], f"{quote}{HIDDEN}{quote}"]
            at = value.end("value")
    return "".join([*parts, text[at:]])


def format_error(error: BaseException, most: int = 300) -> str:
    """The error message of a library on one line, with the type of the exception if it has fewer than two words."""
    line = redact(next(iter(str(error).strip().splitlines()), ""))
    return shorten(f"{type(error).__name__}: {line}" if len(line.split()) < 2 else line, most)


def shorten(text: str, most: int = 300) -> str:
    """The text, or its beginning and end; it is redacted first, because a cut may separate a credential from its
    name."""
    if len(text) <= most:
        return text
    text = redact(text)
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 4 :]}"

"""What can go wrong before or instead of a measurement, each with the exit code that says so.

A failing *trial* is not an error here: it is a row (see `record`). These are the errors that stop a command.
Every message follows one pattern: what happened, where, the offending value, and what to do about it.
"""

from __future__ import annotations

import re

EXIT_PASS = 0
EXIT_REGRESSION = 1
EXIT_USAGE = 2
EXIT_INCONCLUSIVE = 3
EXIT_INVALID = 4
EXIT_NOT_COMPARABLE = 5
EXIT_UNEXPECTED = 70


class LorameterError(Exception):
    """Something the user can act on; `exit_code` is what the command line returns for it.

    A message holds no credentials, whatever it repeats: it is printed, and goes into logs and records.
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


def impossible(where: str, key: str, value: object, why: str, remedy: str) -> UsageError:
    """The one shape of a refused value: file or object, key, value, reason, remedy."""
    named = f"{shorten(where)}: {shorten(key)}" if key else shorten(where)
    return UsageError(f"{named} = {shorten(repr(value))}: {why}. {remedy}")


_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#]*@")
"""A quote in it is a part of a password: no address ends before its host."""
_PASSWORD = re.compile(r"(?<![\w.%+~-])[\w.%+~-]+:(?!//)(?!\d+(?:[/?#'\",)\s]|$))[^\s@]\S*@(?!sha256:)(?=[\w\[])")
"""A user and a password as no address may have them: without a scheme, as git and scp take them, or with a character
that ought to have been escaped. A host and its port are none, so that a revision behind a path is kept."""
_SECRET = re.compile(
    r"token$|secret|passw|passphrase|(api|access|private)[-_]?key|credential|(^|[-_])(auth|bearer)$|authorization$"
    r"|(?-i:_(PASS|PWD|PAT)$)",
    re.IGNORECASE,
)
"""A pass, a working directory and a pattern are ordinary options; as the end of a variable's name they are none."""
_NO_SECRET = re.compile(r"(pad|eos|bos|unk|sep|cls|mask|stop|image|new|max|min)[-_]?token$|^-*no[-_]", re.IGNORECASE)
"""Tokens of a vocabulary, which options of training scripts name as well, and options that take nothing."""
HIDDEN = "***"
"""Stands where a credential stood."""
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?#'\"]*\?)(?:[^\s#'\"]|['\"](?![\s,.:;)\]}]|$))+")
"""A quote that nothing of the address follows is that of the text around."""


def sounds_secret(name: str) -> bool:
    """Whether a variable or an option of this name holds a credential, as far as names tell."""
    return _SECRET.search(name) is not None and _NO_SECRET.search(name) is None


def redact(text: str) -> str:
    """The text with what may be a credential in its URLs left out: a user with a password or token, and a query.

    Requirements, addresses of indexes, remotes and proxies carry them. Whatever installs or downloads needs them;
    whoever is told, or reads what was written down, does not.
    """
    if "@" in text:
        text = _PASSWORD.sub(f"{HIDDEN}@", _USER.sub(rf"\1{HIDDEN}@", text))
    return _QUERY.sub(rf"\1{HIDDEN}", text) if "://" in text else text


def said_by(error: BaseException, most: int = 300) -> str:
    """What an error of a library's says, in a line; its type where it says nothing, or nothing without it."""
    line = next(iter(str(error).strip().splitlines()), "")
    return shorten(f"{type(error).__name__}: {line}" if len(line.split()) < 2 else line, most)


def shorten(text: str, most: int = 300) -> str:
    """The text, or its beginning and its end: what is named must not bury what is said of it."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 4 :]}"

"""What can go wrong before or instead of a measurement, each with the exit code that says so, and the redaction of
credentials, which messages of errors go through as all other text does.

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


def require(holds: object, message: str) -> None:
    """Raises `UsageError` with the message where a condition does not hold."""
    if not holds:
        raise UsageError(message)


_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#]*@")
"""A quote in it is a part of a password: no address ends before its host."""
_PASSWORD = re.compile(r"(?<![\w.%+~-])[\w.%+~-]+:(?!//)(?!\d+(?:[/?#'\",)\s]|$))[^\s@]\S*@(?!sha256:)(?=[\w\[])")
"""A user and a password as no address may have them: without a scheme, as git and scp take them, or with a character
that ought to have been escaped. A host and its port are none, so that a revision behind a path is kept."""
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?#'\"]*\?)(?:[^\s#'\"]|['\"](?![\s,.:;)\]}]|$))+")
"""A quote that nothing of the address follows is that of the text around."""
_IN_ADDRESS = re.compile(
    r"://[^\s/?#:]*:[^\s/?#]*@|https?://(?!\*\*\*@)[^\s/?#]+@"
    r"|[?&][\w.-]*(?:sig|signature|key|token|secret|passw\w*|auth|credential)=(?!\*\*\*)",
    re.IGNORECASE,
)
"""An address that certainly has a credential in it: a password, of HTTP also a user alone, who may be a token, or a
query with a name that sounds like one."""
_SECRET = re.compile(
    r"token$|secret|passw|passphrase|(api|access|private)[-_]?key|credential|(^|[-_])(auth|bearer)$|authorization$"
    r"|(?-i:_(PASS|PWD|PAT|KEY)$)",
    re.IGNORECASE,
)
"""A pass, a working directory, a pattern and a key are ordinary options; as the end of a variable's name they are
none."""
_NO_SECRET = re.compile(
    r"(pad|eos|bos|unk|sep|cls|mask|stop|image|new|max|min|per|first|next|input|output)[-_]?token$|^-*no[-_]",
    re.IGNORECASE,
)
"""Tokens of a vocabulary or a text, which options of training scripts and metrics name, and options that take
nothing."""
HIDDEN = "***"
"""Replaces a credential."""
_HINT = re.compile(r"token|secret|passw|passphrase|key|credential|auth|bearer|_PASS|_PWD|_PAT", re.IGNORECASE)
"""Part of each name that sounds like a credential: texts without one are not searched for names."""
_NAMED = re.compile(
    r"""(?<![-\w/]) (?P<name>[-\w]++) (?:\\*["'])? \]?
        (?: \s*=\s*(?=\\*["']) | \s*(?P<colon>:)\s* | = | (?P<blank>(?:\s|\\\n)+) )""",
    re.VERBOSE,
)
"""A name, or a key, with what parts it from its value: a sign, an equals sign with blanks around it before a quote, or
blanks. Each word is read once, however long it is."""
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
    r"""(?:\\*["'])? (?: \*\*\*.* | true | false | none | null | yes | no | \$(?!["']).* | ) (?:\\*["'])?""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
"""A switch, a variable's name for the shell, what is hidden already, or nothing."""
_OWN_SHAPE = re.compile(
    r"(?<![\w-])(?:(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-(?:(?:proj|ant|or|svcacct|admin)-|(?=\w{16}))|xox[a-z]-"
    r"|A[KS]IA|AIza|nvapi-)[\w-]{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,}|(?<=wandb login )[0-9a-f]{40}\b)"
)
"""Tokens of Hugging Face, GitHub, GitLab, OpenAI, Slack, AWS, Google, NVIDIA, Weights & Biases, and JSON web tokens."""


def sounds_secret(name: str) -> bool:
    """Whether a variable or an option of this name holds a credential, as far as names tell."""
    return _SECRET.search(name) is not None and _NO_SECRET.search(name) is None


def is_credential(value: str, *, apart: bool) -> bool:
    """Whether what a name like that is given may be one; behind a blank (`apart`) it may be another option as well."""
    return not (apart and value.startswith("-")) and _NO_CREDENTIAL.fullmatch(value) is None


def redact(text: str, *, whole_addresses: bool = True) -> str:
    """The text with `***` in place of what may be a credential. All that is printed or written into a run passes here.

    A credential is recognised by the name before it (`HF_TOKEN=…`, `--password …`, `"token": …`, a header), by the
    shape that a service gives its tokens, or by its place in a URL (a user, a password, a query). It may be inside a
    line for `sh -c`, JSON or a program.

    Args:
        text: of any length.
        whole_addresses: whether each user and each query of a URL is left out; else only those that have a password, or
            a name that sounds like a credential. Requirements, indexes, remotes and proxies carry tokens as users.
    """
    if whole_addresses or _IN_ADDRESS.search(text):
        if "@" in text:
            text = _PASSWORD.sub(f"{HIDDEN}@", _USER.sub(rf"\1{HIDDEN}@", text))
        if "://" in text:
            text = _QUERY.sub(rf"\1{HIDDEN}", text)
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
        if value is not None and is_credential(value["value"], apart=found["blank"] is not None):
            quote = value["quote"] or ""
            parts += [text[at : value.start("value")], f"{quote}{HIDDEN}{quote}"]
            at = value.end("value")
    return "".join([*parts, text[at:]])


def said_by(error: BaseException, most: int = 300) -> str:
    """What an error of a library's says, in a line; its type where it says nothing, or nothing without it."""
    line = redact(next(iter(str(error).strip().splitlines()), ""))
    return shorten(f"{type(error).__name__}: {line}" if len(line.split()) < 2 else line, most)


def shorten(text: str, most: int = 300) -> str:
    """The text, or its beginning and its end, redacted first: a cut may part a credential from its name."""
    if len(text) <= most:
        return text
    text = redact(text)
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 4 :]}"

"""Requirements that a run has kept without their credential, so that they can be asked for again.

What is written down holds none (`lorameter.errors.redact`). An address without its user can still be asked: pip takes
the credential of a host from a netrc file, or from an index of the same host. A query that was left out is in neither.
"""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from lorameter.errors import HIDDEN, UsageError

_HIDDEN_USER = re.compile(rf"(?<=://){re.escape(HIDDEN)}@([^\s/?#]+)")
_FILES = (".netrc", "_netrc")
_INDEXES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")


def asked_again(whose: str, requirements: str, environment: Mapping[str, str] = os.environ) -> str:
    """The requirements as they can be asked for again: without users that are kept elsewhere.

    Args:
        whose: names them in a refusal.
        requirements: as they were written down.
        environment: where pip's variables, NETRC and HOME are looked up.

    Raises:
        UsageError: a credential that was left out is needed again, and is nowhere to be had.
    """
    if f"?{HIDDEN}" in requirements:
        raise UsageError(
            f"{whose}: {requirements}: the query of its address was a credential and is not kept, so it cannot be "
            "asked for again. Measure the A/B anew."
        )
    for host in _HIDDEN_USER.findall(requirements):
        name = urlsplit(f"//{host}").hostname or host
        if not _is_known(name, host, environment):
            raise UsageError(
                f"{whose}: {requirements}: its credential for {host} is not kept, and is needed again. Put it into "
                f"~/.netrc (machine {name} login USER password PASSWORD) or give it as an index of that host "
                f"(PIP_EXTRA_INDEX_URL=https://USER:PASSWORD@{host}/), then go on again."
            )
    return _HIDDEN_USER.sub(r"\1", requirements)


def _is_known(name: str, host: str, environment: Mapping[str, str]) -> bool:
    for index in " ".join(environment.get(variable, "") for variable in _INDEXES).split():
        user, at, place = urlsplit(index).netloc.rpartition("@")
        if at and user and place == host:
            return True
    given = environment.get("NETRC")
    files = [Path(given)] if given else [Path(environment.get("HOME", "~")).expanduser() / one for one in _FILES]
    for file in files:
        try:
            if netrc.netrc(str(file)).authenticators(name):
                return True
        except (OSError, netrc.NetrcParseError):  # there is none, or none that pip would read
            continue
    return False

"""A script that any Python can run: what is installed here, and which file an import would load.

It is passed to an interpreter as text (`python -c`), because that interpreter may have no lorameter, or an older
one. So it imports the standard library only, and none of the modules that it looks for.
"""

import importlib.metadata
import importlib.util
import json
import platform
import re
import sys


def packages() -> "dict[str, str]":
    """Normalised name to version of each distribution, the first on the path where there are several.

    A distribution that was installed from a repository has its commit added: the version alone does not
    distinguish two commits.
    """
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata  # once: each look at it reads and parses the file anew
        name = metadata["Name"]
        if name:  # a half-removed distribution has no name
            versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), str(metadata["Version"]) + _commit(distribution))
    return dict(sorted(versions.items()))


def _commit(distribution: importlib.metadata.Distribution) -> str:
    try:
        source = json.loads(distribution.read_text("direct_url.json") or "{}")
        return " (commit {})".format(source["vcs_info"]["commit_id"][:12])
    except (ValueError, KeyError, TypeError):  # whatever was written there
        return ""


def origin(module: str) -> "str | None":
    """The file that `import module` would load, None if there is none. `module` has no dots, so nothing is imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: a module without a spec is loaded already
        return None
    return None if spec is None else spec.origin


if __name__ == "__main__":
    print(  # on a line of its own, whatever was printed before
        "\n"
        + json.dumps(
            {
                "python": platform.python_version(),
                "executable": sys.executable,
                "packages": packages(),
                "origins": {name: origin(name) for name in json.loads(sys.argv[1])},
            }
        )
    )

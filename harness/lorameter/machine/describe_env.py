"""A script for any Python: lists the installed packages, and the files that imports would load.

It is passed to an interpreter as text (`python -c`), because that interpreter may have no lorameter, or an older one.
So it imports only the standard library, and not the modules that it looks for.
"""

import importlib.metadata
import importlib.util
import json
import platform
import re
import sys


def installed_packages() -> "dict[str, str]":
    """Version of each distribution by its normalised name; if there are several, the first on the path.

    The version of a distribution installed from a repository includes the commit, because two commits may have one
    version.
    """
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata  # once: each access reads and parses the file again
        name = metadata["Name"]
        if name:  # a half-removed distribution has no name
            versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), str(metadata["Version"]) + _commit(distribution))
    return dict(sorted(versions.items()))


def _commit(distribution: importlib.metadata.Distribution) -> str:
    try:
        source = json.loads(distribution.read_text("direct_url.json") or "{}")
        return " (commit {})".format(source["vcs_info"]["commit_id"][:12])
    except (ValueError, KeyError, TypeError):  # invalid content of the file
        return ""


def module_file(module: str) -> "str | None":
    """The file that `import module` would load, or None. `module` has no dots, so nothing is imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # ValueError: a module without a spec is already loaded
        return None
    return None if spec is None else spec.origin


if __name__ == "__main__":
    print(  # on a separate line, after any earlier output
        "\n"
        + json.dumps(
            {
                "python": platform.python_version(),
                "executable": sys.executable,
                "packages": installed_packages(),
                "origins": {name: module_file(name) for name in json.loads(sys.argv[1])},
            }
        )
    )

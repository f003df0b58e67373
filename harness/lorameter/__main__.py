"""`python -m lorameter`: the `lorameter` command, also where its script is not on PATH."""

import sys

from lorameter.entry import main

if __name__ == "__main__":
    sys.exit(main())

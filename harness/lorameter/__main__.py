"""`python -m lorameter`: runs the command if its script is not on the path."""

import sys

from lorameter.entry import main

if __name__ == "__main__":
    sys.exit(main())

"""The benchmark against TRL: `nox -s bench`, or this file by an interpreter that has the package. See `--help`."""

import sys

from stepbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
